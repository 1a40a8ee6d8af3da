"""Decoding: the library's own samples for good files, a clear error for each kind of bad one, and
for none of them more than the limits: real processes, real signals, real files."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
from faster_whisper import decode_audio

from shared.errors import (
    AudioTooLong,
    AudioTooShort,
    DecoderUnavailable,
    MediaError,
    NoAudioStream,
    TruncatedMedia,
    UnreadableMedia,
)
from tests.conftest import FOX, ROOT, alive, wait_until
from tests.model.media import CODECS, encode, samples_of, tone, video, wav_header
from worker.engine import ffmpeg
from worker.engine.decode import (
    Decoder,
    DecodeServerLost,
    Limits,
    _judged,
    _parsed,
    _Samples,
    _verdict,
)

LIMIT = 3600.0
QUICK = Limits(cpu_seconds=1, audio_seconds_per_cpu=10**6)


@pytest.fixture(scope="module")
def shared() -> Iterator[Decoder]:
    decoder = Decoder()
    yield decoder
    decoder.close()


@pytest.fixture
def decode(shared):
    """Most tests need no decoder of their own."""
    return shared.decode


@pytest.fixture
def made() -> Iterator:
    """Makes decoders of the test's own."""
    decoders: list[Decoder] = []

    def make(limits: Limits | None = None) -> Decoder:
        decoders.append(Decoder(limits or Limits()))
        decoders[-1].start()
        return decoders[-1]

    yield make
    for decoder in decoders:
        decoder.close()


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    """Three hours of silence in 1.6 MB: almost 3 s of CPU, most of them for the resampling."""
    path = tmp_path_factory.mktemp("long") / "endless.flac"
    return encode(path, np.zeros(3 * 3600 * 11_025, np.int16), 11_025)


def children(pid: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def server_of(decoder: Decoder) -> int:
    return decoder._server._process.pid


def child_of(decoder: Decoder) -> int:
    """A child that has begun to decode."""
    pid = wait_until(lambda: children(server_of(decoder)), 20, "a child lives")[0]
    wait_until(lambda: limits_of(pid)["Max cpu time"][0] != "unlimited", 30, "it has its limits")
    return pid


def limits_of(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    return {line[:26].strip(): line[26:].split()[:2] for line in lines}


class Stop(Exception):
    """What a checkpoint raises."""


@pytest.mark.parametrize("suffix", CODECS)
def test_every_format_gives_the_samples_that_the_library_would(decode, tmp_path, suffix):
    path = encode(tmp_path / f"a.{suffix}", samples_of(FOX))
    samples, is_partial = decode(path, max_seconds=LIMIT)
    assert np.array_equal(samples, decode_audio(str(path)))
    assert not is_partial
    assert len(samples) / 16_000 == pytest.approx(len(samples_of(FOX)) / 16_000, abs=0.15)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3"])
def test_another_rate_is_resampled_as_the_library_does(decode, tmp_path, suffix):
    path = encode(tmp_path / f"a.{suffix}", tone(2, 44_100), 44_100)
    samples, _ = decode(path, max_seconds=LIMIT)
    assert np.array_equal(samples, decode_audio(str(path)))


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "m4a", "webm", "aiff"])
def test_a_file_that_ends_early_is_refused_or_used_as_it_is(decode, tmp_path, suffix):
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


def test_a_wav_of_unknown_length_is_whole(decode, tmp_path):
    """Programs that write to a pipe leave the length open."""
    path = tmp_path / "pipe.wav"
    path.write_bytes(wav_header(16_000, 1, 0xFFFFFFFF) + tone(2).tobytes())
    samples, is_partial = decode(path, max_seconds=LIMIT)
    assert len(samples) == 32_000
    assert not is_partial


def test_an_mp3_of_varying_bitrate_without_a_length_is_whole(decode, tmp_path):
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


def test_a_video_gives_its_sound_and_a_silent_one_an_error(decode, tmp_path):
    samples, _ = decode(video(tmp_path / "b.mp4", tone(1)), max_seconds=LIMIT)
    assert len(samples) == pytest.approx(16_000, abs=2000)
    with pytest.raises(NoAudioStream):
        decode(video(tmp_path / "a.mp4"), max_seconds=LIMIT)
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "gone", max_seconds=LIMIT)


def test_longer_than_the_limit_is_refused_without_decoding_it_all(decode, tmp_path):
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
def test_what_is_no_recording_is_refused(decode, tmp_path, what):
    content, error = BAD[what]
    path = tmp_path / "audio"
    path.write_bytes(content)
    with pytest.raises(error):
        decode(path, max_seconds=LIMIT)


@pytest.mark.parametrize(
    "playlist", ["ffconcat version 1.0\nfile victim.wav\n", "#EXTM3U\n{path}\n"]
)
def test_a_playlist_does_not_read_another_file(decode, tmp_path, playlist):
    """A file that names its neighbour, or any path, gets nothing of it."""
    victim = encode(tmp_path / "victim.wav", tone(2))
    for name in ("audio", "audio.m3u8", "audio.ffconcat"):
        path = tmp_path / name
        path.write_text(playlist.format(path=victim))
        with pytest.raises(UnreadableMedia):
            decode(path, max_seconds=LIMIT)


# --- What the file may not do ---------------------------------------------------------------------

OUTWARD = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\n{url}/a.ts\n#EXT-X-ENDLIST\n",
    "hls key": (
        '#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="{url}/key"\n#EXTINF:9,\n{path}\n#EXT-X-ENDLIST\n'
    ),
    "hls of a file": "#EXTM3U\n#EXTINF:9,\nfile://{path}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{path}'\n",
    "concat of an address": "ffconcat version 1.0\nfile '{url}/a.wav'\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "m=audio {port} RTP/AVP 0\n",
    "smil": '<smil><body><audio src="{url}/a.wav"/></body></smil>',
    "pls": "[playlist]\nFile1={url}/a.wav\nNumberOfEntries=1\n",
}


@pytest.mark.parametrize("name", ["audio", "audio.m3u8"])
@pytest.mark.parametrize("what", OUTWARD)
def test_a_file_that_names_an_address_or_another_file_reaches_neither(
    decode, tmp_path, what, name, monkeypatch
):
    """No connection is made, and the victim is not read, though it is a recording."""
    victim = encode(tmp_path / "victim.wav", tone(2))
    os.utime(victim, (1, 1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        port = listener.getsockname()[1]
        path = tmp_path / name
        path.write_text(
            OUTWARD[what].format(url=f"http://127.0.0.1:{port}", port=port, path=victim)
        )
        began = time.monotonic()
        with pytest.raises(UnreadableMedia):
            decode(path, max_seconds=LIMIT)
        assert time.monotonic() - began < 30, "nothing was waited for"
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert victim.stat().st_atime == 1


def test_a_path_is_never_an_address(decode, tmp_path, monkeypatch):
    """FFmpeg takes http:..., concat:... and data:... for addresses; we open files."""
    monkeypatch.chdir(tmp_path)
    for name in ("http://127.0.0.1:9/a.wav", f"concat:{FOX}", f"file:{FOX}", f"subfile,,:{FOX}"):
        with pytest.raises(FileNotFoundError):
            decode(Path(name), max_seconds=LIMIT)


def test_a_container_outside_the_list_is_refused(decode, tmp_path):
    """Its codec is a known one; FFmpeg's code for rare containers is not to run."""
    path = tmp_path / "a.voc"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_u8", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.full((1, 16_000), 128, np.uint8), "u8", "mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
    assert len(decode_audio(str(path))) >= 16_000, "it is a sound file"
    with pytest.raises(UnreadableMedia):
        decode(path, max_seconds=LIMIT)


def test_a_video_decoder_does_not_run(tmp_path):
    """Opened without our list, FFmpeg decodes a picture to learn the format of its points."""
    path = video(tmp_path / "a.mp4", tone(1))
    with av.open(str(path)) as container:
        assert container.streams.video[0].pix_fmt == "yuv420p"
    with path.open("rb") as file, ffmpeg.open_file(file.fileno()) as container:
        assert container.streams.video[0].pix_fmt is None


def test_a_codec_outside_the_list_is_refused_by_its_name(decode, tmp_path):
    """A container that we take may hold what we don't."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("wavpack", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(2).reshape(1, -1), format="s16", layout="mono")
        frame.sample_rate = 16_000
        resampler = av.AudioResampler(
            format=stream.format.name, layout="mono", rate=16_000, frame_size=stream.frame_size
        )
        for ready in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(ready))
        container.mux(stream.encode(None))
    assert len(decode_audio(str(path))) == 32_000, "it is a sound file"
    with pytest.raises(UnreadableMedia, match="codec wavpack"):
        decode(path, max_seconds=LIMIT)


CONFINED = """
import json, os, resource, signal, socket, sys
from pathlib import Path
from worker.engine import decode_server

def errno_of(action):
    try:
        action()
    except OSError as exc:
        return exc.errno
    return 0

parent = os.getppid()
port, victim = int(sys.argv[1]), sys.argv[2]
ready = socket.socket()
decode_server.confine(parent)
print(json.dumps({
    "read": errno_of(lambda: open(victim).close()),
    "write": errno_of(lambda: open(victim + ".new", "w").close()),
    "connect": errno_of(lambda: ready.connect(("127.0.0.1", port))),
    "datagram": errno_of(lambda: socket.socket(type=socket.SOCK_DGRAM).close()),
    "run": errno_of(lambda: os.execv("/bin/true", ["true"])),
    "signal": errno_of(lambda: os.kill(parent, signal.SIGCONT)),
    "status": open(3).read(),
}))
"""


def landlock_version() -> int:
    from worker.engine.decode_server import LANDLOCK_CREATE_RULESET, LIBC

    return LIBC.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1) if LIBC else -1


@pytest.mark.skipif(landlock_version() < 6, reason="needs Landlock 6 (Linux 6.12)")
def test_a_child_that_is_taken_over_can_open_nothing_and_signal_nobody():
    """What our own code may do after confine() is all that a flaw in FFmpeg could do."""
    with socket.create_server(("127.0.0.1", 0)) as listener, open("/proc/self/status") as status:
        held = os.dup2(status.fileno(), 3) if status.fileno() != 3 else 3
        port = listener.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-c", CONFINED, str(port), str(FOX)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            pass_fds=[held],
        )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {told[what] for what in ("read", "write", "connect")} == {13}  # EACCES
    assert {told[what] for what in ("signal", "datagram", "run")} == {1}  # EPERM


# --- Limits ---------------------------------------------------------------------------------------


def test_a_child_has_its_limits_and_nothing_open_but_its_three_descriptors(made, endless):
    """Read from the kernel while it decodes."""
    decoder = made()
    with ThreadPoolExecutor(1) as pool:
        stop = threading.Event()
        running = pool.submit(
            decoder.decode, endless, max_seconds=4 * 3600, checkpoint=lambda: halt(stop)
        )
        pid = child_of(decoder)
        wait_until(lambda: limits_of(pid)["Max address space"][0] != "unlimited", 5)
        limits = limits_of(pid)
        assert limits["Max core file size"] == ["0", "0"]
        assert limits["Max file size"] == ["0", "0"]
        assert limits["Max open files"] == ["7", "7"]
        assert limits["Max processes"] == ["0", "0"]
        assert limits["Max address space"] == [str(512 * 1024**2)] * 2
        assert limits["Max cpu time"][1] == str(60 + 4 * 72 + 5)
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert status["NoNewPrivs"] == "1"
        assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "1000"
        wait_until(lambda: len(os.listdir(f"/proc/{pid}/fd")) >= 7, 30, "FFmpeg has opened it")
        open_files = {fd.name: os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
        kinds = [target.partition(":")[0] for _, target in sorted(open_files.items())]
        assert kinds == [*["/dev/null"] * 3, str(endless), "pipe", "socket", str(endless)]
        stop.set()
        with pytest.raises(Stop):
            running.result(10)


def halt(stop: threading.Event) -> None:
    if stop.is_set():
        raise Stop


def test_who_burns_cpu_is_stopped(made, tmp_path):
    """Far more than the second that it may take: Linux counts ticks, and a child that often waits
    for its reader is asleep at many of them."""
    path = encode(tmp_path / "burns.flac", np.zeros(5 * 3600 * 4_000, np.int16), 4_000)
    with pytest.raises(UnreadableMedia, match="more processor time"):
        made(QUICK).decode(path, max_seconds=6 * 3600)


def test_who_delivers_audio_may_go_on(made, endless):
    """The same file and the same second of CPU to begin with; each audio hour earns four."""
    decoder = made(Limits(cpu_seconds=1, audio_seconds_per_cpu=900))
    samples, _ = decoder.decode(endless, max_seconds=4 * 3600)
    assert len(samples) == 3 * 3600 * 16_000


def test_who_takes_too_much_memory_is_stopped(made, tmp_path):
    """A thousand seconds in one packet, which FFmpeg holds as a whole; others need far less."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        container.start_encoding()
        packet = av.Packet(bytes(32_000_000))
        packet.stream, packet.pts, packet.dts = stream, 0, 0
        container.mux(packet)
    assert len(made().decode(path, max_seconds=LIMIT)[0]) == 16_000_000
    small = made(Limits(memory_bytes=170 * 1024**2))
    with pytest.raises(UnreadableMedia, match="more memory"):
        small.decode(path, max_seconds=LIMIT)
    assert len(small.decode(FOX, max_seconds=LIMIT)[0]) == 52_206


def test_who_stands_still_is_stopped(made, endless):
    """SIGSTOP: no sample comes, and the child is gone afterwards."""
    decoder = made(Limits(silent_seconds=1))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(decoder.decode, endless, max_seconds=4 * 3600)
        pid = child_of(decoder)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(UnreadableMedia, match="stood still for 1 seconds"):
            running.result(20)
    wait_until(lambda: not alive(pid), 30, "it is killed")


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_decoder_that_crashes_is_the_file_s_fault(made, endless, number):
    """One clear sentence; and the next file is decoded."""
    decoder = made()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(decoder.decode, endless, max_seconds=4 * 3600)
        os.kill(child_of(decoder), number)
        with pytest.raises(UnreadableMedia, match=f"failed on this file .{number.name}.") as caught:
            running.result(20)
    assert caught.value.retryable is False
    assert len(decoder.decode(FOX, max_seconds=LIMIT)[0]) == 52_206


def test_a_decoder_that_is_killed_from_outside_is_tried_again(made, endless):
    """The kernel kills when others take the memory: not this file's fault, unless it goes on."""
    decoder = made()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(decoder.decode, endless, max_seconds=4 * 3600)
        os.kill(child_of(decoder), signal.SIGKILL)
        assert len(running.result(60)[0]) == 3 * 3600 * 16_000
        running = pool.submit(decoder.decode, endless, max_seconds=4 * 3600)
        seen: set[int] = set()
        while not running.done():
            for pid in set(children(server_of(decoder))) - seen:
                seen.add(pid)
                os.kill(pid, signal.SIGKILL)
        with pytest.raises(UnreadableMedia, match="SIGKILL"):
            running.result()
    assert len(seen) == 3


# --- Its life -------------------------------------------------------------------------------------


def test_a_cancelled_decode_kills_its_child_at_once(made, endless):
    decoder = made()
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            decoder.decode, endless, max_seconds=4 * 3600, checkpoint=lambda: halt(stop)
        )
        pid = child_of(decoder)
        stop.set()
        with pytest.raises(Stop):
            running.result(1)
    wait_until(lambda: not alive(pid), 1, "it is gone")
    wait_until(lambda: children(server_of(decoder)) == [], 1, "and waited for")


def test_a_checkpoint_is_heard_while_no_sample_comes(made, endless):
    decoder = made()
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            decoder.decode, endless, max_seconds=4 * 3600, checkpoint=lambda: halt(stop)
        )
        pid = child_of(decoder)
        os.kill(pid, signal.SIGSTOP)
        stop.set()
        with pytest.raises(Stop):
            running.result(2)
    wait_until(lambda: not alive(pid), 1, "a stopped child dies, too")


def test_a_killed_server_is_started_again(made, endless):
    """Before a file, and under one: the caller notices nothing, and its child does not linger."""
    decoder = made()
    first = server_of(decoder)
    os.kill(first, signal.SIGKILL)
    assert len(decoder.decode(FOX, max_seconds=LIMIT)[0]) == 52_206
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(decoder.decode, endless, max_seconds=4 * 3600)
        pid, second = child_of(decoder), server_of(decoder)
        os.kill(pid, signal.SIGSTOP)  # so that it can't end by itself
        os.kill(second, signal.SIGKILL)
        wait_until(lambda: not alive(pid), 30, "it dies with its server")
        assert len(running.result(60)[0]) == 3 * 3600 * 16_000
    assert len({first, second, server_of(decoder)}) == 3
    assert not alive(first)
    assert not alive(second)


def test_a_server_that_never_lives_is_not_the_file_s_fault(made, monkeypatch):
    """The worker may try such a file again; and it recovers by itself."""
    decoder = made()
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    os.kill(server_of(decoder), signal.SIGKILL)
    with pytest.raises(DecodeServerLost):
        decoder.decode(FOX, max_seconds=LIMIT)
    monkeypatch.undo()
    assert len(decoder.decode(FOX, max_seconds=LIMIT)[0]) == 52_206


WORKER = """
import sys
from pathlib import Path
from worker.engine.decode import Decoder
decoder = Decoder()
decoder.start()
print(decoder._server._process.pid, flush=True)
decoder.decode(Path(sys.argv[1]), max_seconds=4 * 3600)
"""


def test_nothing_outlives_a_worker_that_is_killed(endless):
    """kill -9 of the process that decodes: the server and its child are gone."""
    command = [sys.executable, "-c", WORKER, str(endless)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as worker:
        server = int(worker.stdout.readline())
        child = wait_until(lambda: children(server), 20, "a child decodes")[0]
        worker.kill()
    wait_until(lambda: not alive(server) and not alive(child), 30, "both are gone")


def test_an_interrupt_of_the_terminal_leaves_the_decoding_alone(made, endless, caplog):
    """Ctrl-C reaches the whole group; the worker drains, and still needs its decoders."""
    decoder = made()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(decoder.decode, endless, max_seconds=4 * 3600)
        for pid in (child_of(decoder), server_of(decoder)):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(pid, number)
        assert len(running.result(60)[0]) == 3 * 3600 * 16_000
    assert caplog.records == [], "nothing died, and nothing was tried again"


def test_the_server_knows_no_secret_of_the_worker(made, monkeypatch):
    monkeypatch.setenv("REDIS_PASSWORD", "hidden-away")
    monkeypatch.setenv("HF_TOKEN", "hidden-away")
    decoder = made()
    decoder.decode(FOX, max_seconds=LIMIT)
    environment = Path(f"/proc/{server_of(decoder)}/environ").read_bytes()
    assert b"PATH=" in environment
    assert b"hidden" not in environment
    loaded = Path(f"/proc/{server_of(decoder)}/maps").read_text()
    assert "libavcodec" in loaded
    assert not any(name in loaded for name in ("ctranslate2", "onnxruntime", "numpy"))
    assert len(list(Path(f"/proc/{server_of(decoder)}/task").iterdir())) == 1


def test_ten_files_at_a_time_are_ten_processes_and_the_same_samples(made, endless, tmp_path):
    decoder = made()
    paths = [encode(tmp_path / f"{n}.mp3", tone(30 + n)) for n in range(10)]
    expected = [decode_audio(str(path)) for path in paths]
    gate = threading.Barrier(10)

    def run(path: Path) -> np.ndarray:
        gate.wait(10)
        return decoder.decode(path, max_seconds=LIMIT)[0]

    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(run, paths))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_nothing_is_left_open_after_many_files(made, tmp_path):
    """Good, bad, too long and cancelled ones: descriptors on both sides, processes, memory."""
    decoder = made()
    bad = tmp_path / "bad"
    bad.write_bytes(bytes(1000))

    def cancel() -> None:
        raise Stop

    def one_of_each() -> None:
        decoder.decode(FOX, max_seconds=LIMIT)
        with pytest.raises(UnreadableMedia):
            decoder.decode(bad, max_seconds=LIMIT)
        with pytest.raises(AudioTooLong):
            decoder.decode(FOX, max_seconds=1)
        with pytest.raises(Stop):
            decoder.decode(FOX, max_seconds=LIMIT, checkpoint=cancel)

    def used() -> tuple[int, int, int]:
        server = server_of(decoder)
        wait_until(lambda: children(server) == [], 30, "all children are waited for")
        return (len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{server}/fd")), server)

    def resident_mib(pid: int | str) -> float:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 1024**2

    for _ in range(10):
        one_of_each()
    before, ours, its = used(), resident_mib("self"), resident_mib(server_of(decoder))
    for _ in range(50):
        one_of_each()
    wait_until(lambda: used() == before, 30, "what the last ones had open is closed")
    assert resident_mib("self") - ours < 16
    assert resident_mib(server_of(decoder)) - its < 4


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[" * 5000 + b"\n0 1000",
        b"[]\n0 1000",
        b'{"code"\n0 1000',
        b"\xff\n0 1000",
        b'{"stated_seconds": 1e999}\n0 1000',
        b'{"code": [1], "message": {"a": 1}}\n0 1000',
        b"{}\n-999 1000",
        b"{}\n0",
        b"{}\nx y",
    ],
)
def test_a_child_that_is_taken_over_can_say_what_it_likes(answer):
    """At the most it makes its own file fail."""
    end = _parsed(answer)
    if end.exit_code == 0:
        with pytest.raises(MediaError):
            _judged(_Samples(10), end.found, allow_partial=False)
    elif end.exit_code is not None:
        assert _verdict(end.exit_code)


# --- FFmpeg itself --------------------------------------------------------------------------------


def test_an_ffmpeg_with_known_flaws_is_refused():
    ffmpeg.require_version()
    ffmpeg.require_version({"libavformat": (62, 12, 101), "libavcodec": (62, 28, 101)})
    ffmpeg.require_version({"libavformat": (63, 0, 100), "libavcodec": (63, 0, 100)})
    for older in (
        {"libavformat": (62, 12, 100), "libavcodec": (62, 28, 101)},
        {"libavformat": (62, 12, 101), "libavcodec": (61, 99, 200)},
        {},
    ):
        with pytest.raises(DecoderUnavailable, match="with flaws that an upload can use") as caught:
            ffmpeg.require_version(older)
        assert "\n" not in caught.value.message


def test_a_machine_on_which_nothing_can_be_decoded_is_found_at_the_start(made):
    """Otherwise every upload would be called damaged."""
    made().check()
    decoder = made(Limits(silent_seconds=0.2))
    os.kill(server_of(decoder), signal.SIGSTOP)
    with pytest.raises(DecoderUnavailable, match="Not even silence"):
        decoder.check()
    os.kill(server_of(decoder), signal.SIGCONT)


def test_a_worker_with_an_old_ffmpeg_does_not_start():
    """One sentence, and the exit status of what would fail the same way again."""
    script = """
import sys
import av
av.library_versions["libavformat"] = (61, 7, 100)
from worker.__main__ import main
sys.exit(main())
"""
    environment = {**os.environ, "MODEL_SIZE": "demo", "REDIS_URL": "redis://127.0.0.1:1/0"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78, done.stderr
    assert "libavformat 61.7.100" in done.stderr
    assert "Traceback" not in done.stderr
