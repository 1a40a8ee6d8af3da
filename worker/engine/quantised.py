"""A copy of a model with its weights in int8, which loads faster than the model.

Published models are stored in float16. To compute in int8, CTranslate2 converts all weights each
time that it loads them. The copy has the numbers that CTranslate2 would make, bit for bit, so what
is computed stays the same. It rests in

    <data dir>/models/<name of the model>/<key>.bin

and may be deleted at any time: then the next start makes it anew.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import ctranslate2
import numpy as np

from shared.settings import ComputeType, Settings
from worker.engine.model_file import (
    SIZES,
    Contents,
    NotAModel,
    Variable,
    read_contents,
    write_aliases,
    write_head,
    write_variable_head,
)

log = logging.getLogger(__name__)

# What CTranslate2 computes in int8 on a CPU (resolve_compute_type in its src/types.cc); it refuses
# int8_float16 and int8_bfloat16 there.
TYPES = {ComputeType.INT8, ComputeType.INT8_FLOAT32, ComputeType.AUTO}
FLOATS = {"float32", "float16"}
BLOCK = 1 << 17  # numbers that are converted at once: few enough for a core's cache
HUB_BLOB = re.compile(r"[0-9a-f]{64}")  # the Hub's cache names a file by its SHA-256


def copy_of(folder: Path, settings: Settings, device: str) -> Path | None:
    """The copy of the model in `folder`, made now if there is none yet. None where it would be of
    no use, or can't be had; then the log says why."""
    if device != "cpu" or settings.compute_type not in TYPES:
        return None
    if "int8_float32" not in ctranslate2.get_supported_compute_types("cpu"):
        return None
    home = settings.data_dir / "models" / re.sub("[^A-Za-z0-9]+", "-", settings.model_size)[-100:]
    try:
        return _found_or_made(folder / "model.bin", home, settings.min_free_disk_bytes)
    except (OSError, NotAModel) as exc:
        log.warning(
            "no copy of the model that would load faster: it loads as it is stored",
            extra={"action": "model_copy_missing", "reason": str(exc)},
        )
        return None


@contextmanager
def standing_in(copy: Path, folder: Path) -> Iterator[Path]:
    """A folder for the length of a load: all that the model's own has, with the copy as its
    model.bin. Raises OSError."""
    with tempfile.TemporaryDirectory(prefix="whisper-model-") as name:
        place = Path(name)
        for file in folder.absolute().iterdir():
            (place / file.name).symlink_to(copy.absolute() if file.name == "model.bin" else file)
        yield place


def discard(copy: Path) -> None:
    """One that does not load."""
    with suppress(OSError):
        copy.unlink(missing_ok=True)


def _found_or_made(source: Path, home: Path, min_free_bytes: int) -> Path | None:
    copy = home / f"{_key(source)}.bin"
    if copy.exists():
        return copy
    with source.open("rb") as file:
        contents = read_contents(file)
        if not _is_convertible(contents):
            return None
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _lock(home / "lock") as is_ours:
            if not is_ours:
                log.info(
                    "another worker makes a copy of the model: it loads as it is stored",
                    extra={"action": "model_copy_awaited"},
                )
                return None
            if not copy.exists():  # another worker may have made it just now
                _make(file, contents, copy, min_free_bytes)
    return copy


def _key(source: Path) -> str:
    """Changes with the model, and with the library that the copy has to agree with."""
    real = source.resolve(strict=True)
    facts = real.stat()
    of_content = HUB_BLOB.fullmatch(real.name)
    identity = real.name if of_content else f"{real} {facts.st_mtime_ns}"
    text = f"{ctranslate2.__version__} {facts.st_size} {identity}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _is_convertible(contents: Contents) -> bool:
    """Whether it is a Whisper model whose weights are all stored in floats."""
    kinds = {v.kind for v in contents.variables if v.name.endswith("weight")}
    ranks = {len(v.shape) if v.size_bytes else 0 for v in contents.variables if _is_quantised(v)}
    return contents.spec == "WhisperSpec" and kinds <= FLOATS and ranks == {2}


def _is_quantised(variable: Variable) -> bool:
    """Whether CTranslate2 makes int8 of it whatever it was built with. Convolutions are converted
    in some builds only, so they stay as they are and are left to it (set_compute_type in its
    src/models/model.cc)."""
    return variable.name.endswith("weight") and "conv" not in variable.name


def _size_bytes(contents: Contents) -> int:
    """Of the copy, about."""
    return sum(
        v.size_bytes // SIZES[v.kind] if _is_quantised(v) else v.size_bytes
        for v in contents.variables
    )


def _make(source: BinaryIO, contents: Contents, copy: Path, min_free_bytes: int) -> None:
    """Writes the copy, whole or not at all. Raises OSError, NotAModel."""
    began = time.perf_counter()
    home, part = copy.parent, copy.with_suffix(".part")
    # Of what the model was before, and of workers that were killed
    for file in [*home.glob("*.bin"), *home.glob("*.part")]:
        file.unlink()
    if shutil.disk_usage(home).free < min_free_bytes + _size_bytes(contents):
        raise OSError(errno.ENOSPC, "less than MIN_FREE_DISK_MB would stay free", str(home))
    try:
        with part.open("xb") as target:
            _convert(source, contents, target)
            target.flush()
            os.fsync(target.fileno())
        part.rename(copy)
    finally:
        part.unlink(missing_ok=True)
    log.info(
        "made a copy of the model that loads faster",
        extra={
            "action": "model_copy_made",
            "path": str(copy),
            "size_bytes": copy.stat().st_size,
            "seconds": round(time.perf_counter() - began, 3),
        },
    )


def _convert(source: BinaryIO, contents: Contents, target: BinaryIO) -> None:
    """Weights as CTranslate2 converts them, all else as it is stored."""
    added = sum(map(_is_quantised, contents.variables))
    write_head(target, contents.spec, contents.revision, len(contents.variables) + added)
    for variable in contents.variables:
        source.seek(variable.offset)
        if not _is_quantised(variable):
            write_variable_head(target, variable.name, variable.kind, variable.shape)
            target.write(source.read(variable.size_bytes))
            continue
        write_variable_head(target, variable.name, "int8", variable.shape)
        scales = []
        for rows in _blocks(source, variable):
            weights, scales_of_rows = quantise(rows)
            target.write(weights.tobytes())
            scales.append(scales_of_rows)
        write_variable_head(target, f"{variable.name}_scale", "float32", variable.shape[:1])
        target.write(np.concatenate(scales).tobytes())
    write_aliases(target, contents.aliases)


def _blocks(source: BinaryIO, variable: Variable) -> Iterator[np.ndarray]:
    """A matrix in float32, some rows at a time, so that no model needs much memory."""
    rows, width = variable.shape
    at_once = max(1, BLOCK // width)
    for first in range(0, rows, at_once):
        count = min(at_once, rows - first) * width
        numbers = np.frombuffer(source.read(count * SIZES[variable.kind]), variable.kind)
        yield numbers.reshape(-1, width).astype(np.float32)


def quantise(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 rows -> int8 rows and the scale of each, such that int8 / scale is about what it was
    (CTranslate2: quantize_s8 in src/cpu/kernels.cc). Overwrites `rows`. Raises NotAModel."""
    most = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    with np.errstate(all="ignore"):
        scales = np.where(most == 0, np.float32(1), np.float32(127) / most)
    if not (np.isfinite(scales) & (scales > 0)).all():
        raise NotAModel("holds weights that are no numbers, or too small to be scaled.")
    rows *= scales[:, None]
    return np.rint(rows, out=rows).astype(np.int8), scales


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Whether it is ours. It ends with the process."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
