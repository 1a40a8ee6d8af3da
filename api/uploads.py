"""The way of an upload's bytes: request stream -> parser -> storage, hashed and counted as they go.

Memory stays flat whatever the size: at most one write buffer is held. Options may come before or
after the files. Nothing of a refused or broken upload stays on disk.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiofiles
from aiofiles.threadpool.binary import AsyncBufferedIOBase
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from shared.errors import (
    BatchTooLarge,
    EmptyFile,
    FileTooLarge,
    InvalidField,
    MalformedUpload,
    MissingFile,
    NotAudio,
    RequestError,
    StorageFull,
    UploadTooSlow,
)

WRITE_BYTES = 1024 * 1024  # one hop to a thread for each write, so writes are large
MAX_FIELDS = 40
MAX_FIELD_BYTES = 16 * 1024
HEADER_BYTES = 4096  # of a part; no legal one has so many
FORM_OVERHEAD_BYTES = MAX_FIELDS * (MAX_FIELD_BYTES + HEADER_BYTES)  # what a form adds to its file
SNIFF_BYTES = 1024
SLOWEST_BYTES_PER_SECOND = 1024


Place = Callable[[], Awaitable[Path]]
Field = tuple[str, str]  # its name and its value
Judge = Callable[[str, Sequence[Field]], None]


@dataclass
class Upload:
    """A form that has arrived: the file is at the path that was given to `receive`."""

    checksum: str  # SHA-256, hex
    size_bytes: int
    sent: list[Field]  # in the order in which they came

    @property
    def fields(self) -> dict[str, str]:
        return dict(self.sent)


def once(name: str, before: Sequence[Field]) -> None:
    """A Judge: raises InvalidField for a field that was sent before."""
    if any(name == earlier for earlier, _ in before):
        raise InvalidField([(name[:64], "was sent twice")])


@dataclass
class ArrivedFile:
    """One file of a form, as far as it has arrived."""

    size_bytes: int = 0
    error: RequestError | None = None  # what is wrong with it, where that ends not the whole form
    pending: bytearray = field(default_factory=bytearray)  # not yet written
    is_complete: bool = False
    _sniffed: bool = False
    _hash: hashlib._Hash = field(default_factory=hashlib.sha256)
    _disk: AsyncBufferedIOBase | None = None

    @property
    def checksum(self) -> str:
        """SHA-256, hex."""
        return self._hash.hexdigest()

    def sniff(self) -> None:
        """Raises NotAudio as soon as that can be seen."""
        if not self._sniffed and (self.is_complete or len(self.pending) >= SNIFF_BYTES):
            refuse_text(self.pending[:SNIFF_BYTES])
            self._sniffed = True

    async def write_out(self, place: Place) -> None:
        """To the disk what is worth a write, or all when there will be no more."""
        if self._disk is None:
            self._disk = await aiofiles.open(await place(), "wb", opener=_keeping_its_place)
        if self.error:
            self.pending = bytearray()
            await self._disk.seek(0)
            await self._disk.truncate()
        elif len(self.pending) >= WRITE_BYTES or self.is_complete:
            self._hash.update(self.pending)
            await self._disk.write(self.pending)
            self.pending = bytearray()
        if self.is_complete:
            await self._disk.truncate()
            await self.close()

    async def close(self) -> None:
        if self._disk:
            await self._disk.close()


@dataclass
class _Form:
    """What the parser's callbacks have seen so far. Where it may hold several files, what is wrong
    with one of them is that file's error; where it may hold one, it is the form's."""

    max_file_bytes: int
    max_files: int = 1
    max_bytes: int | None = None  # of all files together
    judge: Judge = once
    takes_url: bool = False  # instead of a file
    sent: list[Field] = field(default_factory=list)
    files: list[ArrivedFile] = field(default_factory=list)
    is_complete: bool = False
    _header_name: bytes = b""
    _header_value: bytes = b""
    _disposition: bytes = b""
    _name: str = ""
    _in_file: bool = False
    _value: bytearray = field(default_factory=bytearray)

    @property
    def most_bytes(self) -> int:
        """Of the whole body: also what is no part of the form is counted."""
        files_bytes = self.max_bytes or self.max_file_bytes
        return files_bytes + self.max_files * HEADER_BYTES + FORM_OVERHEAD_BYTES

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
            # The library leaves out what it can't decode, as `filename*`.
            if b"filename" not in options and b"filename*" not in self._disposition.lower():
                raise MissingFile(
                    "The field `file` was sent as text, not as a file; with curl, "
                    'put an @ before the path: -F "file=@audio.mp3".'
                )
            self._begin_file()
        elif len(self.sent) >= MAX_FIELDS:
            raise MalformedUpload(f"The form has more than {MAX_FIELDS} fields.")
        self.judge(self._name, self.sent)

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if not self._in_file:
            self._value += data[start:end]
            if len(self._value) > MAX_FIELD_BYTES:
                raise InvalidField([(self._name[:64], f"is longer than {MAX_FIELD_BYTES} bytes")])
            return
        file = self.files[-1]
        file.size_bytes += end - start
        if self.max_bytes and sum(each.size_bytes for each in self.files) > self.max_bytes:
            raise batch_too_large(self.max_bytes)
        if file.size_bytes > self.max_file_bytes:
            self.refuse(file, too_large(self.max_file_bytes))
        if not file.error:
            file.pending += data[start:end]
            self._sniff(file)

    def on_part_end(self) -> None:
        if self._in_file:
            file = self.files[-1]
            file.is_complete = True
            if not file.size_bytes:
                self.refuse(file, EmptyFile())
            self._sniff(file)
            return
        try:
            self.sent.append((self._name, self._value.decode()))
        except UnicodeDecodeError as exc:
            raise InvalidField([(self._name[:64], "is not UTF-8 text")]) from exc

    def on_end(self) -> None:
        self.is_complete = True

    def refuse(self, file: ArrivedFile, error: RequestError) -> None:
        if self.max_files == 1:
            raise error
        file.error = file.error or error

    def _sniff(self, file: ArrivedFile) -> None:
        """While the bytes are parsed: what is wrong first is the error, however they were cut."""
        try:
            file.sniff()
        except NotAudio as exc:
            self.refuse(file, exc)

    def _begin_file(self) -> None:
        if len(self.files) == self.max_files == 1:
            raise InvalidField([("file", "was sent twice; send one file in each request")])
        if len(self.files) >= self.max_files:
            raise InvalidField([("file", f"was sent more than {self.max_files} times")])
        self.files.append(ArrivedFile())


def too_large(max_bytes: int) -> FileTooLarge:
    return FileTooLarge(
        f"The file is larger than {max_bytes // (1024 * 1024)} MB, the most this server accepts. "
        "Send a shorter or more compressed recording."
    )


def batch_too_large(max_bytes: int) -> BatchTooLarge:
    return BatchTooLarge(
        f"The files are larger together than {max_bytes // (1024 * 1024)} MB, the most that this "
        "server accepts at once. Send them in several batches."
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
    judge: Judge = once,
    *,
    takes_url: bool = False,
) -> Upload:
    """Writes the form's one file to `path` while it arrives.

    `judge` sees the name of each part when it begins (the file's is `file`) and the fields before
    it; what it raises ends the upload before that part is read. `takes_url`: a field `url` may come
    instead of the file; then nothing is written. Raises MalformedUpload, MissingFile, EmptyFile,
    FileTooLarge, NotAudio, InvalidField, StorageFull, UploadTooSlow; whoever called removes what
    was written.
    """

    async def place() -> Path:
        return path

    form = _Form(max_file_bytes, judge=judge, takes_url=takes_url)
    await _take(form, stream, content_type, place, patience_seconds)
    file = form.files[0] if form.files else ArrivedFile()
    return Upload(file.checksum, file.size_bytes, form.sent)


async def receive_files(
    stream: AsyncIterator[bytes],
    content_type: str,
    place: Place,
    limits: tuple[int, int, int],
    patience_seconds: float = 30,
) -> tuple[list[ArrivedFile], dict[str, str]]:
    """Writes each of the form's files to the path that `place` gives for it, one after the other;
    returns them in their order, and the other fields.

    `limits`: the bytes of a file, the number of files, the bytes of all. A file that is empty, too
    large or text has an `error`. Raises what `receive` raises for the whole form, BatchTooLarge,
    and whatever `place` raises.
    """
    max_file_bytes, max_files, max_bytes = limits
    form = _Form(max_file_bytes, max_files, max_bytes)
    await _take(form, stream, content_type, place, patience_seconds)
    return form.files, dict(form.sent)


async def _take(
    form: _Form,
    stream: AsyncIterator[bytes],
    content_type: str,
    place: Place,
    patience_seconds: float,
) -> None:
    parser = parser_for(content_type, form)
    written = 0  # files that are on the disk as a whole
    left_bytes = form.most_bytes
    try:
        async for chunk in paced(stream, patience_seconds):
            parser.write(chunk)
            left_bytes -= len(chunk)
            if left_bytes < 0:
                raise MalformedUpload(
                    "The multipart body is longer than its files and fields may be. End it with "
                    "its closing boundary."
                )
            written = await _write_out(form, written, place)
        parser.finalize()
        await _write_out(form, written, place)
    except FormParserError as exc:
        raise MalformedUpload(f"The multipart body is damaged: {exc}") from exc
    except OSError as exc:
        if exc.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise StorageFull from exc
        raise
    finally:
        for file in form.files:
            await file.close()
    if not form.is_complete:
        raise MalformedUpload("The multipart body ends early: its closing boundary is missing.")
    if form.takes_url and dict(form.sent).get("url", "").strip():
        if form.files:
            raise InvalidField([("url", "comes instead of the file; send one of them")])
    elif not form.files:
        or_url = f"{MissingFile.__doc__} Or send its address as `url`."
        raise MissingFile(or_url if form.takes_url else None)


async def _write_out(form: _Form, written: int, place: Place) -> int:
    """What the parser has seen of the files goes to the disk. Returns how many are done."""
    for file in form.files[written:]:
        await file.write_out(place)
        written += file.is_complete
    return written


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


_MARKUP = (b"<!doctype", b"<html", b"<head", b"<body", b"<script", b"<?xml", b"<svg")
_TEXT = frozenset(range(0x20, 0x7F)) | {0x09, 0x0A, 0x0D}


def refuse_text(head: bytes | bytearray) -> None:
    """Text is never audio, but some players follow it: playlists name other files and addresses.

    Every container that we decode has bytes outside printable ASCII within its first kilobyte.
    """
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_MARKUP):
        raise NotAudio(
            "The file is a web page (HTML or XML), not audio or video. Send the recording itself, "
            "or its own address, not that of a page that plays it."
        )
    if head and _TEXT.issuperset(head):
        raise NotAudio
