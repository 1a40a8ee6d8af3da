"""The way of an upload's bytes: request stream -> parser -> storage, hashed and counted as they go.

Memory stays flat whatever the size: at most one write buffer is held. Options may come before or
after the file. Nothing of a refused or broken upload stays on disk.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import aiofiles
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from shared.errors import (
    EmptyFile,
    FileTooLarge,
    InvalidField,
    MalformedUpload,
    MissingFile,
    NotAudio,
    StorageFull,
    UploadTooSlow,
)

WRITE_BYTES = 1024 * 1024  # one hop to a thread for each write, so writes are large
MAX_FIELDS = 40
MAX_FIELD_BYTES = 16 * 1024
FORM_OVERHEAD_BYTES = MAX_FIELDS * (MAX_FIELD_BYTES + 4096)  # what a form may add to its file
SNIFF_BYTES = 1024
SLOWEST_BYTES_PER_SECOND = 1024


@dataclass
class Upload:
    """A form that has arrived: the file is at the path that was given to `receive`."""

    checksum: str  # SHA-256, hex
    size_bytes: int
    fields: dict[str, str]


@dataclass
class _Form:
    """What the parser's callbacks have seen so far."""

    max_file_bytes: int
    fields: dict[str, str] = field(default_factory=dict)
    file_seen: bool = False
    file_bytes: int = 0
    pending: bytearray = field(default_factory=bytearray)  # file bytes not yet written
    is_complete: bool = False
    _header_name: bytes = b""
    _header_value: bytes = b""
    _disposition: bytes = b""
    _name: str = ""
    _in_file: bool = False
    _value: bytearray = field(default_factory=bytearray)

    def on_part_begin(self) -> None:
        self._disposition, self._value = b"", bytearray()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def on_headers_finished(self) -> None:
        kind, options = parse_options_header(self._disposition)
        name = options.get(b"name")
        if kind != b"form-data" or name is None:
            raise MalformedUpload("A part of the form has no name; send multipart/form-data.")
        self._name = name.decode("utf-8", "replace")
        self._in_file = self._name == "file"
        if self._in_file:
            if self.file_seen:
                raise InvalidField([("file", "was sent twice; send one file in each request")])
            if b"filename" not in options and b"filename*" not in options:
                raise MissingFile(
                    "The field `file` was sent as text, not as a file; with curl, "
                    'put an @ before the path: -F "file=@audio.mp3".'
                )
            self.file_seen = True
        elif self._name in self.fields:
            raise InvalidField([(self._name[:64], "was sent twice")])
        elif len(self.fields) >= MAX_FIELDS:
            raise MalformedUpload(f"The form has more than {MAX_FIELDS} fields.")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if not self._in_file:
            self._value += data[start:end]
            if len(self._value) > MAX_FIELD_BYTES:
                raise InvalidField([(self._name[:64], f"is longer than {MAX_FIELD_BYTES} bytes")])
            return
        self.file_bytes += end - start
        if self.file_bytes > self.max_file_bytes:
            raise too_large(self.max_file_bytes)
        self.pending += data[start:end]

    def on_part_end(self) -> None:
        if not self._in_file:
            try:
                self.fields[self._name] = self._value.decode()
            except UnicodeDecodeError as exc:
                raise InvalidField([(self._name[:64], "is not UTF-8 text")]) from exc

    def on_end(self) -> None:
        self.is_complete = True


def too_large(max_bytes: int) -> FileTooLarge:
    return FileTooLarge(
        f"The file is larger than {max_bytes // (1024 * 1024)} MB, the most this server accepts. "
        "Send a shorter or more compressed recording."
    )


def parser_for(content_type: str, form: _Form) -> MultipartParser:
    """Raises MalformedUpload unless the body claims to be a multipart form."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise MalformedUpload
    try:
        return MultipartParser(
            boundary,
            {
                "on_part_begin": form.on_part_begin,
                "on_header_field": form.on_header_field,
                "on_header_value": form.on_header_value,
                "on_header_end": form.on_header_end,
                "on_headers_finished": form.on_headers_finished,
                "on_part_data": form.on_part_data,
                "on_part_end": form.on_part_end,
                "on_end": form.on_end,
            },
        )
    except FormParserError as exc:
        raise MalformedUpload from exc


async def receive(
    stream: AsyncIterator[bytes],
    content_type: str,
    path: Path,
    max_file_bytes: int,
    patience_seconds: float = 30,
) -> Upload:
    """Writes the form's file to `path` while it arrives.

    Raises MalformedUpload, MissingFile, EmptyFile, FileTooLarge, NotAudio, InvalidField,
    StorageFull, UploadTooSlow; whoever called removes what was written.
    """
    form = _Form(max_file_bytes)
    parser = parser_for(content_type, form)
    checksum = hashlib.sha256()
    sniffed = False
    try:
        async with aiofiles.open(path, "wb", opener=_keeping_its_place) as file:
            async for chunk in paced(stream, patience_seconds):
                parser.write(chunk)
                if not sniffed and len(form.pending) >= SNIFF_BYTES:
                    refuse_text(form.pending[:SNIFF_BYTES])
                    sniffed = True
                if len(form.pending) >= WRITE_BYTES:
                    checksum.update(form.pending)
                    await file.write(form.pending)
                    form.pending = bytearray()
            parser.finalize()
            if not sniffed:
                refuse_text(form.pending)
            checksum.update(form.pending)
            await file.write(form.pending)
            await file.truncate()
    except FormParserError as exc:
        raise MalformedUpload(f"The multipart body is damaged: {exc}") from exc
    except OSError as exc:
        if exc.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise StorageFull from exc
        raise
    if not form.is_complete:
        raise MalformedUpload("The multipart body ends early: its closing boundary is missing.")
    if not form.file_seen:
        raise MissingFile
    if form.file_bytes == 0:
        raise EmptyFile
    return Upload(checksum.hexdigest(), form.file_bytes, form.fields)


def _keeping_its_place(path: str, flags: int) -> int:
    """Storage.begin may have reserved space for the file."""
    return os.open(path, flags & ~os.O_TRUNC, 0o600)


async def paced(stream: AsyncIterator[bytes], patience_seconds: float) -> AsyncIterator[bytes]:
    """The chunks. Raises UploadTooSlow when they stop for `patience_seconds`, and soon after that
    when they drip: a byte now and then would hold its place for ever."""
    clock = asyncio.get_running_loop().time
    latest = clock() + patience_seconds
    while True:
        try:
            async with asyncio.timeout_at(latest):
                chunk = await anext(stream, None)
        except TimeoutError as exc:
            raise UploadTooSlow from exc
        if chunk is None:
            return
        yield chunk
        # What was sent buys time, but never more than the patience at the beginning.
        latest += len(chunk) / SLOWEST_BYTES_PER_SECOND
        latest = min(latest, clock() + patience_seconds)


_TEXT = frozenset(range(0x20, 0x7F)) | {0x09, 0x0A, 0x0D}


def refuse_text(head: bytes | bytearray) -> None:
    """Text is never audio, but some players follow it: playlists name other files and addresses.

    Every container that we decode has bytes outside printable ASCII within its first kilobyte.
    """
    if head and _TEXT.issuperset(head):
        raise NotAudio
