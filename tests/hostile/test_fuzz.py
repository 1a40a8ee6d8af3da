"""Good files with damage of a seeded generator, and forms that hypothesis makes. FUZZ in the
environment multiplies both (`make hostile` sets it)."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.uploads import MAX_FIELD_BYTES, MAX_FIELDS, receive
from shared.errors import RequestError
from tests.hostile.decoded import answer_of
from tests.model.media import CODECS, encode, tone, video
from worker.engine.decode import Decoder

FUZZ = int(os.environ.get("FUZZ", "1"))
SEED = os.environ.get("FUZZ_SEED", "5")
MEDIA_CODES = {
    "samples",
    "unreadable_media",
    "no_audio_stream",
    "no_audio_samples",
    "truncated_media",
    "audio_too_long",
}


# --- The decoder


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    decoder = Decoder()
    decoder.start()
    yield decoder
    decoder.close()


def damaged(whole: bytes, chance: random.Random) -> bytes:
    """Bits flipped, bytes cut out, doubled, or set to what breaks arithmetic."""
    data = bytearray(whole)
    for _ in range(chance.choice((1, 2, 8, 64))):
        # Half of the damage is in the first kilobyte, where the claims stand.
        end = min(len(data), 1024) if chance.random() < 0.5 else len(data)
        place, size = chance.randrange(end), chance.choice((1, 2, 4, 8, 100))
        match chance.randrange(5):
            case 0:
                data[place] ^= 1 << chance.randrange(8)
            case 1:
                data[place : place + size] = chance.choice((b"\xff", b"\0", b"\x7f")) * size
            case 2:
                del data[place : place + size]
            case 3:
                data[place:place] = data[place : place + size]
            case 4:
                data[place : place + 4] = chance.randbytes(4)
        if len(data) < 200:
            break
    return bytes(data[: chance.randrange(len(data))] if chance.random() < 0.2 else data)


@pytest.mark.parametrize("suffix", [*CODECS, "video"])
def test_a_damaged_file_has_an_answer_and_hurts_nobody(decoder, tmp_path, suffix):
    """Of its own kind; the server is still the same process."""
    name = tmp_path / f"whole.{suffix}"
    sound = tone(1)
    path = video(name.with_suffix(".mp4"), sound) if suffix == "video" else encode(name, sound)
    whole = path.read_bytes()
    server = decoder._server._process.pid
    for number in range(40 * FUZZ):
        content = damaged(whole, random.Random(f"{SEED} {suffix} {number}"))
        answer = answer_of(decoder, content, tmp_path / "upload")
        assert answer.code in MEDIA_CODES, number
        assert answer.seconds < 30, number
        assert answer.peak_mib < 512, number
    assert decoder._server._process.pid == server


# --- The form

BOUNDARY = b"x-boundary-x"
TYPE = f"multipart/form-data; boundary={BOUNDARY.decode()}"
NAMES = st.sampled_from(["language", "task", "file", "x", "", "a" * 100, "é", 'q"', "\r\n"])
BYTES = st.binary(max_size=300) | st.sampled_from(
    [b"\r\n--" + BOUNDARY, b"\r\n--" + BOUNDARY[:-1], b"--", b"\0" * 2000, b"\xff" * 3000]
)


@st.composite
def parts(draw: st.DrawFn) -> bytes:
    """One part of a form, more or less as it should be."""
    name, content = draw(NAMES).encode(), draw(BYTES)
    shape = draw(st.sampled_from([b'name="%s"', b"name=%s", b'name="%s"; filename="a.mp3"', b"%s"]))
    kind = draw(st.sampled_from([b"form-data; ", b"attachment; ", b"", b"form-data;;;"]))
    more = draw(st.sampled_from([b"", b"Content-Type: audio/mpeg\r\n", b"X: " + content[:50]]))
    end = draw(st.sampled_from([b"\r\n", b"\n", b""]))
    header = b"Content-Disposition: " + kind + shape % name + b"\r\n" + more
    return b"--" + BOUNDARY + b"\r\n" + header + b"\r\n" + content + end


FORMS = st.builds(
    lambda before, middle, end: before + b"".join(middle) + end,
    st.sampled_from([b"", b"\r\n", b"preamble\r\n"]),
    st.lists(parts(), max_size=6),
    st.sampled_from([b"--" + BOUNDARY + b"--\r\n", b"--" + BOUNDARY + b"--", b"", b"--"]),
)


async def received(body: bytes, path: Path, steps: list[int]):
    async def stream():
        place, number = 0, 0
        while place < len(body):
            step = steps[number % len(steps)]
            yield body[place : place + step]
            place, number = place + step, number + 1

    with suppress(FileNotFoundError):
        os.unlink(path)
    return await receive(stream(), TYPE, path, 10_000)


FUZZED = settings(
    max_examples=300 * FUZZ,
    deadline=None,
    derandomize=FUZZ == 1,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FUZZED
@given(body=FORMS | st.binary(max_size=500), steps=st.lists(st.integers(1, 700), min_size=1))
async def test_any_body_is_an_upload_or_a_clear_error(tmp_path, body, steps):
    """Never an exception of another kind, never more than the limits, however it is cut; and the
    cut changes nothing."""
    path = tmp_path / "audio.part"
    outcomes = []
    for each in (steps, [len(body) + 1]):
        try:
            upload = await received(body, path, each)
        except RequestError as exc:
            outcomes.append(exc.code)
            continue
        written = path.read_bytes()
        assert upload.checksum == hashlib.sha256(written).hexdigest()
        assert 0 < upload.size_bytes == len(written) <= 10_000
        assert len(upload.fields) <= MAX_FIELDS
        assert all(len(value.encode()) <= MAX_FIELD_BYTES for value in upload.fields.values())
        outcomes.append((upload, written))
    assert outcomes[0] == outcomes[1]


FIELDS = st.dictionaries(
    st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=20).filter(
        lambda name: name != "file"
    ),
    st.text(st.characters(codec="utf-8"), max_size=50),
    max_size=8,
)


@FUZZED
@given(fields=FIELDS, content=st.binary(min_size=1, max_size=5_000), place=st.integers(0, 8))
async def test_any_sound_form_arrives_as_it_was_sent(tmp_path, fields, content, place):
    """Every byte of the file and every field, wherever the file stands among them."""
    content = b"\0" + content  # no text, and no web page
    head = b'Content-Disposition: form-data; name="%s"%s\r\n\r\n'
    sent = [head % (name.encode(), b"") + value.encode() for name, value in fields.items()]
    sent.insert(place, head % (b"file", b'; filename="a"') + content)
    body = b"".join(b"--%s\r\n%s\r\n" % (BOUNDARY, part) for part in sent)
    path = tmp_path / "audio.part"
    upload = await received(body + b"--%s--\r\n" % BOUNDARY, path, [97])
    assert path.read_bytes() == content
    assert upload.fields == fields
