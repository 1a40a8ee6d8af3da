"""Makes of the demo model one of the exact shape of Whisper tiny, base, small or medium that says
the same: what it costs is what the real model costs, and its text can still be checked.

    python -m tools.demo_model.widen tiny OUT [--source worker/demo_model]

Every channel is there k times. A layer norm does not notice that; a matrix that reads k equal
channels has its scale divided by k; one that writes them has each row k times, and so whole heads
and units are there k times. Layers that the source lacks come last and add nothing. int8 values are
copied as they are, so nothing is rounded anew.
"""

from __future__ import annotations

import argparse
import re
import shutil
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

# Width, heads, encoder and decoder layers: openai/whisper, whisper/model.py and its checkpoints.
SHAPES = {
    "tiny": (384, 6, 4),
    "base": (512, 8, 6),
    "small": (768, 12, 12),
    "medium": (1024, 16, 24),
}
# CTranslate2's numbers for types: python/ctranslate2/specs/model_spec.py, 4.8.5
TYPES = (np.dtype("float32"), np.dtype("int8"), np.dtype("int16"), np.dtype("int32"))
VERSION = 6
# Matrices that hold the rows of several projections: (name, how many)
FUSED = (("/self_attention/linear_0", 3), ("/attention/linear_1", 2))
# What a layer adds to the residual stream goes through these.
ADDS = re.compile(r"(self_attention/linear_1|/attention/linear_2|ffn/linear_1)/(weight|bias)$")

Variables = dict[str, np.ndarray]


@dataclass
class Model:
    """A model.bin, read whole."""

    name: str
    revision: int
    variables: Variables
    aliases: list[tuple[str, str]]


class NotWidenable(Exception):
    """The source is no model that this file understands."""


def read(path: Path) -> Model:
    with path.open("rb") as file:

        def number(kind: str) -> int:
            return int(struct.unpack(kind, file.read(struct.calcsize(kind)))[0])

        def text() -> str:
            return file.read(number("H"))[:-1].decode()

        version = number("I")
        if version != VERSION:
            raise NotWidenable(f"{path} has format {version}; this tool reads {VERSION}.")
        name, revision = text(), number("I")
        variables = {}
        for _ in range(number("I")):
            key = text()
            shape = [number("I") for _ in range(number("B"))]
            kind = TYPES[number("B")]
            variables[key] = np.frombuffer(file.read(number("I")), kind).reshape(shape)
        aliases = [(text(), text()) for _ in range(number("I"))]
    return Model(name, revision, variables, aliases)


def write(model: Model, path: Path) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("I", VERSION))
        _write_text(file, model.name)
        file.write(struct.pack("II", model.revision, len(model.variables)))
        for key, value in model.variables.items():
            _write_text(file, key)
            file.write(struct.pack(f"=B{value.ndim}I", value.ndim, *value.shape))
            file.write(struct.pack("=BI", TYPES.index(value.dtype), value.nbytes))
            file.write(np.ascontiguousarray(value).tobytes())
        file.write(struct.pack("I", len(model.aliases)))
        for alias, target in model.aliases:
            _write_text(file, alias)
            _write_text(file, target)


def _write_text(file: BinaryIO, text: str) -> None:
    data = text.encode() + b"\0"
    file.write(struct.pack("H", len(data)) + data)


def widen(source: Path, target: Path, shape: str) -> None:
    """Writes the folder `target`. Raises NotWidenable."""
    width, heads, layers = SHAPES[shape]
    model = read(source / "model.bin")
    narrow = model.variables["decoder/layer_norm/gamma"].shape[0]
    copies, rest = divmod(width, narrow)
    if rest or model.variables["encoder/num_heads"] * copies != heads:
        raise NotWidenable(f"A width of {width} is no multiple of the source's {narrow}.")
    wide: Variables = {}
    for key, value in model.variables.items():
        wide[key] = _widened(key, value, copies, model.variables)
    for side in ("encoder", "decoder"):
        _deepen(wide, side, layers)
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.name != "model.bin" and file.suffix == ".json":
            shutil.copy(file, target)
    write(Model(model.name, model.revision, wide, model.aliases), target / "model.bin")


def _widened(key: str, value: np.ndarray, copies: int, source: Variables) -> np.ndarray:
    name, _, kind = key.rpartition("/")
    if key.endswith("/num_heads"):
        return value * np.int16(copies)
    if not value.ndim:
        return value
    if kind in {"gamma", "beta"}:
        # The projection reads k equal channels with the embedding's own scale.
        return np.tile(value, copies) / np.float32(copies if name == "decoder/layer_norm" else 1)
    if name.endswith("position_encodings") or key == "decoder/embeddings/weight":
        return np.tile(value, (1, copies))
    if name == "decoder/embeddings":
        return value
    blocks = next((n for part, n in FUSED if name.endswith(part)), 1)
    reads_copies = name != "encoder/conv1"
    if kind == "weight":
        wide = _rows(value, blocks, copies)
        if reads_copies:
            wide = np.tile(wide, (1, copies) + (1,) * (value.ndim - 2))
        is_float = f"{key}_scale" not in source
        return wide / np.float32(copies) if is_float and reads_copies else wide
    wide = _rows(value, blocks, copies)
    if kind == "weight_scale" and reads_copies:
        return wide * np.float32(copies)  # value = int8 / scale
    return wide


def _rows(value: np.ndarray, blocks: int, copies: int) -> np.ndarray:
    """Each projection's rows k times, projection after projection."""
    parts = np.split(value, blocks)
    return np.concatenate([np.concatenate([part] * copies) for part in parts])


def _deepen(variables: Variables, side: str, layers: int) -> None:
    """Adds layers that pass on what they get: shaped and busy like the first, but adding zero."""
    first = {key: value for key, value in variables.items() if key.startswith(f"{side}/layer_0/")}
    have = {key.split("/")[1] for key in variables if key.startswith(f"{side}/layer_")} - {
        "layer_norm"
    }
    for number in range(len(have), layers):
        for key, value in first.items():
            new = key.replace("/layer_0/", f"/layer_{number}/")
            variables[new] = np.zeros_like(value) if ADDS.search(key) else value


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model.widen")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("target", type=Path)
    parser.add_argument("--source", type=Path, default=Path("worker/demo_model"))
    chosen = parser.parse_args()
    try:
        widen(chosen.source, chosen.target, chosen.shape)
    except (NotWidenable, OSError) as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
