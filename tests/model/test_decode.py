"""Decoding: the library's own samples for good files, a clear error for each kind of bad one."""

from __future__ import annotations

import numpy as np
import pytest
from faster_whisper import decode_audio

from shared.errors import (
    AudioTooLong,
    AudioTooShort,
    NoAudioStream,
    TruncatedMedia,
    UnreadableMedia,
)
from tests.conftest import FOX
from tests.model.media import CODECS, encode, samples_of, tone, video, wav_header
from worker.engine.decode import decode

LIMIT = 3600.0


@pytest.mark.parametrize("suffix", CODECS)
def test_every_format_gives_the_samples_that_the_library_would(tmp_path, suffix):
    path = encode(tmp_path / f"a.{suffix}", samples_of(FOX))
    samples, is_partial = decode(path, max_seconds=LIMIT)
    assert np.array_equal(samples, decode_audio(str(path)))
    assert not is_partial
    assert len(samples) / 16_000 == pytest.approx(len(samples_of(FOX)) / 16_000, abs=0.15)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3"])
def test_another_rate_is_resampled_as_the_library_does(tmp_path, suffix):
    path = encode(tmp_path / f"a.{suffix}", tone(2, 44_100), 44_100)
    samples, _ = decode(path, max_seconds=LIMIT)
    assert np.array_equal(samples, decode_audio(str(path)))


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "m4a", "webm", "aiff"])
def test_a_file_that_ends_early_is_refused_or_used_as_it_is(tmp_path, suffix):
    """Half a recording must not pass for a whole one, unless the caller says so."""
    path = encode(tmp_path / f"a.{suffix}", tone(20))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    if suffix == "m4a":  # its index stands at the end: nothing can be read
        with pytest.raises(UnreadableMedia):
            decode(path, max_seconds=LIMIT)
        return
    with pytest.raises(TruncatedMedia, match=r"of the 20\.\d seconds"):
        decode(path, max_seconds=LIMIT)
    samples, is_partial = decode(path, max_seconds=LIMIT, allow_partial=True)
    assert is_partial
    assert 8 < len(samples) / 16_000 < 12


def test_a_wav_of_unknown_length_is_whole(tmp_path):
    """Programs that write to a pipe leave the length open."""
    path = tmp_path / "pipe.wav"
    path.write_bytes(wav_header(16_000, 1, 0xFFFFFFFF) + tone(2).tobytes())
    samples, is_partial = decode(path, max_seconds=LIMIT)
    assert len(samples) == 32_000
    assert not is_partial


def test_an_mp3_of_varying_bitrate_without_a_length_is_whole(tmp_path):
    """Where FFmpeg only guesses the length, the guess refuses nobody."""
    quiet_then_loud = np.concatenate([np.zeros(160_000, np.int16), tone(10)])
    path = encode(tmp_path / "a.mp3", quiet_then_loud)
    data = path.read_bytes()
    for tag in (b"Xing", b"Info"):
        data = data.replace(tag, b"\x00\x00\x00\x00")
    path.write_bytes(data)
    samples, is_partial = decode(path, max_seconds=LIMIT)
    assert len(samples) / 16_000 > 19
    assert not is_partial


def test_a_video_gives_its_sound_and_a_silent_one_an_error(tmp_path):
    samples, _ = decode(video(tmp_path / "b.mp4", tone(1)), max_seconds=LIMIT)
    assert len(samples) == pytest.approx(16_000, abs=2000)
    with pytest.raises(NoAudioStream):
        decode(video(tmp_path / "a.mp4"), max_seconds=LIMIT)
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "gone", max_seconds=LIMIT)


def test_longer_than_the_limit_is_refused_without_decoding_it_all(tmp_path):
    path = encode(tmp_path / "a.flac", tone(20))
    with pytest.raises(AudioTooLong, match="10 seconds"):
        decode(path, max_seconds=10)
    assert decode(path, max_seconds=20)


BAD = {
    "zeros": (bytes(10_000), UnreadableMedia),
    "noise": (np.random.default_rng(1).bytes(10_000), UnreadableMedia),
    "a gzip file": (b"\x1f\x8b\x08" + bytes(500), UnreadableMedia),
    "a wav of 1 Hz": (wav_header(1, 1, 10_000) + bytes(10_000), UnreadableMedia),
    "a wav of 2 GHz": (wav_header(2**31 - 1, 1, 100) + bytes(100), UnreadableMedia),
    "a wav of 255 channels": (wav_header(16_000, 255, 51_000) + bytes(51_000), UnreadableMedia),
    "a wav without samples": (wav_header(16_000, 1, 0), AudioTooShort),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_recording_is_refused(tmp_path, what):
    content, error = BAD[what]
    path = tmp_path / "audio"
    path.write_bytes(content)
    with pytest.raises(error):
        decode(path, max_seconds=LIMIT)


@pytest.mark.parametrize(
    "playlist", ["ffconcat version 1.0\nfile victim.wav\n", "#EXTM3U\n{path}\n"]
)
def test_a_playlist_does_not_read_another_file(tmp_path, playlist):
    """A file that names its neighbour, or any path, gets nothing of it."""
    victim = encode(tmp_path / "victim.wav", tone(2))
    for name in ("audio", "audio.m3u8", "audio.ffconcat"):
        path = tmp_path / name
        path.write_text(playlist.format(path=victim))
        with pytest.raises(UnreadableMedia):
            decode(path, max_seconds=LIMIT)
