"""Makes of the demo model one of the exact shape of Whisper tiny, base, small or medium that says
the same: what it costs is what the real model costs, and its text can still be checked.

    python -m tools.demo_model.widen tiny OUT [--source worker/demo_model] [--stored float16]

Every channel is there k times. A layer norm does not notice that; a matrix that reads k equal
channels has its scale divided by k; one that writes them has each row k times, and so whole heads
and units are there k times. Layers that the source lacks come last and add nothing. int8 values are
copied as they are, so nothing is rounded anew, unless the model is to be stored in floats.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from worker.engine.model_file import (
    NotAModel,
    read_contents,
    write_aliases,
    write_head,
    write_variable_head,
)

# Width, heads, encoder and decoder layers: openai/whisper, whisper/model.py and its checkpoints.
SHAPES = {
    "tiny": (384, 6, 4),
    "base": (512, 8, 6),
    "small": (768, 12, 12),
    "medium": (1024, 16, 24),
}
KINDS = ("int8", "int16", "int32", "float32")
SPEC = ("WhisperSpec", 3)
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
    """Raises NotWidenable unless the file is a whole Whisper model in int8 and float32."""
    with path.open("rb") as file:
        try:
            contents = read_contents(file)
        except NotAModel as exc:
            raise NotWidenable(f"{path} {exc}") from exc
        if (spec := (contents.spec, contents.revision)) != SPEC:
            raise NotWidenable(f"{path} holds {spec[0]} {spec[1]}; this tool reads {SPEC[0]} 3.")
        variables = {}
        for variable in contents.variables:
            if variable.kind not in KINDS:
                raise NotWidenable(f"{path} holds {variable.kind}, not only int8 and float32.")
            file.seek(variable.offset)
            values = np.frombuffer(file.read(variable.size_bytes), variable.kind)
            variables[variable.name] = values.reshape(variable.shape)
    return Model(*spec, variables, list(contents.aliases))


def write(model: Model, path: Path) -> None:
    with path.open("wb") as file:
        write_head(file, model.name, model.revision, len(model.variables))
        for key, value in model.variables.items():
            write_variable_head(file, key, value.dtype.name, value.shape)
            file.write(value.tobytes())
        write_aliases(file, model.aliases)


def stored_in(model: Model, kind: str) -> Model:
    """The same in float16 or float32, as models are published: every value that int8 and its scale
    mean."""
    found: Variables = {}
    for key, value in model.variables.items():
        scale = model.variables.get(f"{key}_scale")
        if scale is not None:
            found[key] = (value / scale.reshape(-1, *[1] * (value.ndim - 1))).astype(kind)
        elif not key.endswith("_scale"):
            found[key] = value.astype(kind) if value.dtype == np.float32 else value
    return replace(model, variables=found)


def widen(source: Path, target: Path, shape: str, kind: str = "int8") -> None:
    """Writes the folder `target`. Raises NotWidenable, and then has written nothing."""
    wide = widened(read(source / "model.bin"), shape)
    if kind != "int8":
        wide = stored_in(wide, kind)
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.json"):
        shutil.copy(file, target)
    write(wide, target / "model.bin")


def widened(model: Model, shape: str) -> Model:
    """The same in that shape. Raises NotWidenable."""
    if shape not in SHAPES:
        raise NotWidenable(f"There is no shape {shape}; there are {', '.join(SHAPES)}.")
    width, heads, layers = SHAPES[shape]
    narrow = model.variables["decoder/layer_norm/gamma"].shape[0]
    copies, rest = divmod(width, narrow)
    if rest:
        raise NotWidenable(f"A width of {width} is no multiple of the source's {narrow}.")
    wide: Variables = {}
    for key, value in model.variables.items():
        wide[key] = _widened(key, value, copies, model.variables)
    for side in ("encoder", "decoder"):
        if wide[f"{side}/num_heads"] != heads:
            raise NotWidenable(f"Heads of the source's {side} are no heads of {width // heads}.")
        _deepen(wide, side, layers)
    return replace(model, variables=wide)


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
    have = {key.split("/")[1] for key in variables if key.startswith(f"{side}/layer_")}
    have.discard("layer_norm")
    if len(have) > layers:
        raise NotWidenable(f"The source's {side} has {len(have)} layers, the shape {layers}.")
    for number in range(len(have), layers):
        for key, value in first.items():
            new = key.replace("/layer_0/", f"/layer_{number}/")
            variables[new] = np.zeros_like(value) if ADDS.search(key) else value


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model.widen")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("target", type=Path)
    parser.add_argument("--source", type=Path, default=Path("worker/demo_model"))
    parser.add_argument("--stored", choices=["int8", "float16", "float32"], default="int8")
    chosen = parser.parse_args()
    try:
        widen(chosen.source, chosen.target, chosen.shape, chosen.stored)
    except (NotWidenable, OSError) as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
