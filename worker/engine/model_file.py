"""CTranslate2's model.bin: which variables it holds, where each is, and how one is written. The
format is that of python/ctranslate2/specs/model_spec.py, 4.8.5."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import BinaryIO

VERSION = 6
# Bytes of a number, in the order of CTranslate2's type ids
SIZES = {"float32": 4, "int8": 1, "int16": 2, "int32": 4, "float16": 2, "bfloat16": 2}


class NotAModel(Exception):
    """The file is no whole model.bin of this version."""


@dataclass(frozen=True)
class Variable:
    name: str
    kind: str  # of SIZES
    shape: tuple[int, ...]
    offset: int  # of its first number in the file

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * SIZES[self.kind]


@dataclass(frozen=True)
class Contents:
    """All of a file but the numbers."""

    spec: str  # WhisperSpec
    revision: int
    variables: tuple[Variable, ...]  # in the order of the file
    aliases: tuple[tuple[str, str], ...]  # second names of variables, and those


def read_contents(file: BinaryIO) -> Contents:
    """Skips the numbers. Raises NotAModel, with a sentence whose subject is the file."""

    def take(count: int) -> bytes:
        data = file.read(count)
        if len(data) < count:
            raise NotAModel("ends too early: it is cut or no CTranslate2 model.")
        return data

    def number(code: str) -> int:
        return int(struct.unpack(code, take(struct.calcsize(code)))[0])

    def text() -> str:
        return take(number("H"))[:-1].decode(errors="replace")

    def variable() -> Variable:
        name = text()
        shape = tuple(number("I") for _ in range(number("B")))
        kind, size = number("B"), number("I")
        if kind >= len(SIZES):
            raise NotAModel(f"is damaged: {name!r} is of type {kind}.")
        found = Variable(name, tuple(SIZES)[kind], shape, file.tell())
        if size != found.size_bytes:
            raise NotAModel(f"is damaged: {name!r} has another size than its shape.")
        file.seek(size, 1)
        return found

    if (version := number("I")) != VERSION:
        raise NotAModel(f"has format {version}, not {VERSION}.")
    spec, revision = text(), number("I")
    variables = tuple(variable() for _ in range(number("I")))
    aliases = tuple((text(), text()) for _ in range(number("I")))
    return Contents(spec, revision, variables, aliases)


def write_head(file: BinaryIO, spec: str, revision: int, variables: int) -> None:
    """What comes before so many variables."""
    file.write(struct.pack("I", VERSION))
    _write_text(file, spec)
    file.write(struct.pack("II", revision, variables))


def write_variable_head(file: BinaryIO, name: str, kind: str, shape: tuple[int, ...]) -> None:
    """What comes before a variable's numbers."""
    _write_text(file, name)
    file.write(struct.pack(f"=B{len(shape)}I", len(shape), *shape))
    file.write(struct.pack("=BI", tuple(SIZES).index(kind), prod(shape) * SIZES[kind]))


def write_aliases(file: BinaryIO, aliases: Iterable[tuple[str, str]]) -> None:
    """What comes after all variables."""
    pairs = list(aliases)
    file.write(struct.pack("I", len(pairs)))
    for alias, target in pairs:
        _write_text(file, alias)
        _write_text(file, target)


def _write_text(file: BinaryIO, text: str) -> None:
    data = text.encode() + b"\0"
    file.write(struct.pack("H", len(data)) + data)
