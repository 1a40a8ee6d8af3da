"""The upload parser: any order, any chunking, any size; and nothing strange gets through."""

from __future__ import annotations

import asyncio
import hashlib
import time

import pytest

from api.uploads import (
    FORM_OVERHEAD_BYTES,
    HEADER_BYTES,
    MAX_FIELD_BYTES,
    WRITE_BYTES,
    receive,
    receive_files,
)
from shared.errors import (
    BatchTooLarge,
    EmptyFile,
    FileTooLarge,
    InvalidField,
    MalformedUpload,
    MissingFile,
    NotAudio,
    ServiceError,
    UploadTooSlow,
)

TYPE = "multipart/form-data; boundary=xyz"
AUDIO = bytes(range(256)) * 20


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    tail = f'; filename="{filename}"' if filename is not None else ""
    head = f'--xyz\r\nContent-Disposition: form-data; name="{name}"{tail}\r\n\r\n'
    return head.encode() + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--xyz--\r\n"


async def send(
    body: bytes,
    tmp_path,
    *,
    step: int = 65_536,
    limit: int = 10**7,
    kind: str = TYPE,
    takes_url: bool = False,
):
    async def stream():
        for start in range(0, len(body), step):
            yield body[start : start + step]

    path = tmp_path / "audio.part"
    path.unlink(missing_ok=True)
    return await receive(stream(), kind, path, limit, takes_url=takes_url), path


@pytest.mark.parametrize("step", [1, 7, 1000, 10**6])
async def test_fields_may_come_before_or_after_the_file(tmp_path, step):
    """However the network cuts the body."""
    file = part("file", AUDIO, "a.mp3")
    before = form(part("language", b"en"), part("vad_filter", b"true"), file)
    after = form(file, part("language", b"en"), part("vad_filter", b"true"))
    for body in (before, after):
        upload, path = await send(body, tmp_path, step=step)
        assert upload.fields == {"language": "en", "vad_filter": "true"}
        assert path.read_bytes() == AUDIO
        assert upload.checksum == hashlib.sha256(AUDIO).hexdigest()
        assert upload.size_bytes == len(AUDIO)


async def test_a_file_that_holds_the_boundary_s_beginning_arrives_whole(tmp_path):
    tricky = b"\x00\r\n--xy\r\n--\r\n" * 1000
    _, path = await send(form(part("file", tricky, "a.wav")), tmp_path, step=3)
    assert path.read_bytes() == tricky


async def test_the_limit_counts_bytes_and_not_what_was_announced(tmp_path):
    assert (await send(form(part("file", AUDIO, "a")), tmp_path, limit=len(AUDIO)))[0]
    with pytest.raises(FileTooLarge):
        await send(form(part("file", AUDIO, "a")), tmp_path, limit=len(AUDIO) - 1)


@pytest.mark.parametrize("step", [1000, 10**6])
async def test_what_is_no_part_of_the_form_is_counted_too(tmp_path, step):
    """A little behind its end is dropped; more than a file may have is refused."""
    limit, whole = 10**6, form(part("file", AUDIO, "a"))
    most = limit + HEADER_BYTES + FORM_OVERHEAD_BYTES
    await send(whole + b"x" * (most - len(whole)), tmp_path, limit=limit, step=step)
    for body in (whole + b"x" * most, b"\r\n" * (most // 2) + whole):
        with pytest.raises(MalformedUpload):
            await send(body, tmp_path, limit=limit, step=step)


async def test_a_file_may_have_its_name_in_the_long_form_only(tmp_path):
    """filename*= of RFC 5987; names are of no use here."""
    body = form(part("file", AUDIO, "a").replace(b'filename="a"', b"filename*=utf-8''a"))
    assert (await send(body, tmp_path))[0].size_bytes == len(AUDIO)


FILE = part("file", AUDIO, "a")
BAD = {
    "no file": (form(part("language", b"en")), MissingFile),
    "the file as text": (form(part("file", b"abc")), MissingFile),
    "an empty file": (form(part("file", b"", "a.mp3")), EmptyFile),
    "a playlist": (form(part("file", b"#EXTM3U\n/etc/passwd\n", "a.mp3")), NotAudio),
    "a long text": (form(part("file", b"ffconcat version 1.0\n" * 500, "a.mp3")), NotAudio),
    "two files": (form(FILE, FILE), InvalidField),
    "a field twice": (form(FILE, part("task", b"a"), part("task", b"b")), InvalidField),
    "a huge field": (form(part("task", b"a" * (MAX_FIELD_BYTES + 1)), FILE), InvalidField),
    "a field that is no text": (form(part("task", b"\xff\xfe"), FILE), InvalidField),
    "a thousand fields": (form(*(part(f"f{i}", b"1") for i in range(1000))), MalformedUpload),
    "a body that ends early": (FILE[:-1000], MalformedUpload),
    "no closing boundary": (FILE, MalformedUpload),
    "another boundary": (form(FILE).replace(b"xyz", b"abc"), MalformedUpload),
    "an empty body": (b"", MalformedUpload),
    "a part without a name": (b"--xyz\r\nA: b\r\n\r\nc\r\n--xyz--\r\n", MalformedUpload),
    "garbage": (AUDIO, MalformedUpload),
    "endless headers": (b"--xyz\r\n" + b"A: b\r\n" * 10_000, MalformedUpload),
}


@pytest.mark.parametrize("what", BAD)
async def test_bad_forms_are_refused_with_their_own_error(tmp_path, what):
    body, error = BAD[what]
    for step in (13, 10**6):
        with pytest.raises(error) as caught:
            await send(body, tmp_path, step=step)
        assert isinstance(caught.value, ServiceError)
        assert caught.value.message


@pytest.mark.parametrize(
    "kind", ["", "application/json", "multipart/form-data", "multipart/form-data; boundary="]
)
async def test_a_body_of_another_type_is_refused(tmp_path, kind):
    with pytest.raises(MalformedUpload):
        await send(form(FILE), tmp_path, kind=kind)


async def received_at(pauses: list[float], path, patience_seconds: float):
    """The form in as many pieces as there are pauses; each pause comes before its piece."""
    body = form(FILE)
    step = -(-len(body) // len(pauses))

    async def stream():
        for number, pause in enumerate(pauses):
            await asyncio.sleep(pause)
            yield body[number * step : (number + 1) * step]

    return await receive(stream(), TYPE, path, 10**7, patience_seconds)


async def test_an_upload_that_stops_or_drips_is_cut_off(tmp_path):
    """A stop is as long as the patience; a drip may not buy more than its bytes are worth."""
    began = time.monotonic()
    with pytest.raises(UploadTooSlow):
        await received_at([0, 60], tmp_path / "stops", 0.3)
    assert time.monotonic() - began < 20

    async def drip():
        yield b"--xyz\r\n"
        while True:
            await asyncio.sleep(0.01)
            yield b"A"

    began = time.monotonic()
    with pytest.raises(UploadTooSlow):
        await receive(drip(), TYPE, tmp_path / "drips", 10**7, 0.3)
    assert time.monotonic() - began < 20


async def test_a_slow_upload_that_goes_on_is_taken(tmp_path):
    """Five kilobytes in twenty pieces, longer altogether than the patience."""
    upload = await received_at([0.05] * 20, tmp_path / "slow", 0.5)
    assert upload.size_bytes == len(AUDIO)


async def test_what_has_arrived_is_taken_however_late_we_are(tmp_path):
    """When the server stood still, its clients were not slow."""
    body = form(FILE)

    async def stream():
        for start in range(0, len(body), 1000):
            time.sleep(0.2)  # noqa: ASYNC251 - the whole loop stands still
            yield body[start : start + 1000]

    upload = await receive(stream(), TYPE, tmp_path / "late", 10**7, 0.1)
    assert upload.size_bytes == len(AUDIO)


def test_a_full_form_fits_its_allowance():
    """A request is refused by its announced length only when no legal form is so long."""
    assert FORM_OVERHEAD_BYTES > 40 * MAX_FIELD_BYTES


async def test_an_address_may_come_instead_of_the_file_where_it_is_taken(tmp_path):
    """And nowhere else: whoever knows no addresses must not take an empty file for one."""
    url, file = part("url", b"https://example.org/a.mp3"), part("file", AUDIO, "a.mp3")
    upload, _ = await send(form(url, part("language", b"en")), tmp_path, takes_url=True)
    assert upload.fields == {"url": "https://example.org/a.mp3", "language": "en"}
    upload, _ = await send(form(file, part("url", b" ")), tmp_path, takes_url=True)
    assert upload.size_bytes == len(AUDIO)
    with pytest.raises(MissingFile):
        await send(form(url), tmp_path)
    with pytest.raises(MissingFile):
        await send(form(part("url", b"")), tmp_path, takes_url=True)
    with pytest.raises(InvalidField, match="instead of the file"):
        await send(form(file, url), tmp_path, takes_url=True)


@pytest.mark.parametrize(
    "page",
    [
        "<!DOCTYPE html><title>Grüße</title>",
        "\ufeff\r\n<html lang='de'>ü",
        "<?xml version='1.0'?><ü/>",
        "<SCRIPT>ü</SCRIPT>",
    ],
)
async def test_a_web_page_is_refused_in_any_language(tmp_path, page):
    """Its text need not be ASCII."""
    body = form(part("file", page.encode() + b"\xc3\xbc" * 2000, "a.mp3"))
    with pytest.raises(NotAudio, match="web page"):
        await send(body, tmp_path)


# --- Several files --------------------------------------------------------------------------------


async def send_files(
    body: bytes, folder, *, step: int = 65_536, limits: tuple[int, int, int] = (10**7, 10, 10**8)
):
    """The files, the other fields, and what lies at each file's place."""

    async def stream():
        for start in range(0, len(body), step):
            yield body[start : start + step]

    places = []

    async def place():
        places.append(folder / f"{len(places)}.part")
        return places[-1]

    files, fields = await receive_files(stream(), TYPE, place, limits)
    return files, fields, [path.read_bytes() for path in places]


@pytest.mark.parametrize("step", [1, 13, 1000, 10**7])
async def test_several_files_arrive_in_their_order_with_fields_between_them(tmp_path, step):
    """However the network cuts the body; each with its own checksum."""
    contents = [AUDIO, AUDIO[1:] * 2, b"\x00", AUDIO]
    parts = [part("file", content, f"{n}.mp3") for n, content in enumerate(contents)]
    body = form(parts[0], part("language", b"en"), *parts[1:], part("fast", b"true"))
    files, fields, written = await send_files(body, tmp_path, step=step)
    assert fields == {"language": "en", "fast": "true"}
    assert written == contents
    assert [file.checksum for file in files] == [hashlib.sha256(c).hexdigest() for c in contents]
    assert [file.size_bytes for file in files] == [len(content) for content in contents]
    assert not any(file.error for file in files)


@pytest.mark.parametrize("step", [13, 10**7])
async def test_a_bad_file_spoils_no_other(tmp_path, step):
    """It has an error, its place is empty, and what was sent is counted."""
    large = AUDIO * 300
    sent = [AUDIO, b"", b"hello\n" * 500, large, AUDIO + b"x"]
    body = form(*(part("file", content, "a") for content in sent))
    files, _, written = await send_files(
        body, tmp_path, step=step, limits=(len(large) - 1, 10, 10**8)
    )
    assert [type(file.error) for file in files] == [
        type(None),
        EmptyFile,
        NotAudio,
        FileTooLarge,
        type(None),
    ]
    assert written == [AUDIO, b"", b"", b"", AUDIO + b"x"]
    assert [file.size_bytes for file in files] == [len(content) for content in sent]


@pytest.mark.parametrize(
    ("body", "limits", "error"),
    [
        (form(FILE, FILE, FILE), (10**7, 2, 10**8), InvalidField),
        (form(*[FILE] * 1000), (10**7, 100, 10**8), InvalidField),
        (form(FILE, FILE, FILE), (10**7, 9, 2 * len(AUDIO)), BatchTooLarge),
        (form(FILE, part("file", b"abc")), (10**7, 9, 10**8), MissingFile),
        (form(part("language", b"en")), (10**7, 9, 10**8), MissingFile),
        (form(FILE, part("task", b"a"), FILE, part("task", b"b")), (10**7, 9, 10**8), InvalidField),
        (FILE + FILE, (10**7, 9, 10**8), MalformedUpload),
        (form(FILE, FILE)[:-30], (10**7, 9, 10**8), MalformedUpload),
    ],
)
async def test_a_form_of_files_that_is_wrong_as_a_whole_is_refused(tmp_path, body, limits, error):
    for step in (13, 10**7):
        with pytest.raises(error):
            await send_files(body, tmp_path, step=step, limits=limits)


async def test_a_file_of_several_writes_is_one_file(tmp_path):
    """Larger than what is held in memory, with another one behind it in the same chunk."""
    large = bytes(range(256)) * (3 * WRITE_BYTES // 256 + 1)
    body = form(part("file", large, "a"), part("file", AUDIO, "b"))
    for step in (65_536, 10**7):
        _, _, written = await send_files(body, tmp_path, step=step)
        assert written == [large, AUDIO]
