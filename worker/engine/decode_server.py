"""Forks a child for each file to decode: `python -m worker.engine.decode_server DESCRIPTOR`.

This process has loaded PyAV and nothing else, has one thread, none of the worker's secrets in its
environment, and never looks at a file itself. The worker (worker/engine/decode.py) sends it a
request with three descriptors; the child that it forks

    reads the media file from          INPUT
    writes 16-bit mono samples to      PCM      (a pipe)
    writes one line of JSON to         RECORD   (a socket), before it ends: what it found

and this process adds the child's exit code and peak memory (KiB) to RECORD when it is gone.
Closing the other end of RECORD kills the child; closing the control socket, which the worker's
death does, too, ends all.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import wave
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from shared.errors import MediaError, UnreadableMedia
from worker.engine import ffmpeg

INPUT, PCM, RECORD = 3, 4, 5  # descriptors of a child; 0, 1 and 2 are /dev/null
DESCRIPTORS = 7  # those six, and FFmpeg's copy of INPUT: it can open nothing else
# CPU seconds at first, and as the very most; audio seconds that earn one more; bytes of memory
REQUEST = struct.Struct("!IIIQ")
BLOCK_BYTES = 64 * 1024
TOO_LARGE = UnreadableMedia(
    "Decoding the file takes more memory than any recording needs. It is damaged, or made to harm."
)

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
# The same numbers on every processor; linux/landlock.h for the rights.
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446
LANDLOCK_VERSION = 1
FILE_RIGHTS = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF, 5: 0xFFFF}  # by version, 5 and later
TCP_RIGHTS = 0x3  # since version 4: bind, connect
SCOPES = 0x3  # since version 6: abstract sockets, signals
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
# By machine: its number in audit.h; socket, execve, execveat, ptrace, io_uring_setup
FORBIDDEN_CALLS = {
    "x86_64": (0xC000003E, (41, 59, 322, 101, 425)),
    "aarch64": (0xC00000B7, (198, 221, 281, 117, 425)),
}
LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a worker that drains still decodes
    os.chdir("/")
    warm_up()
    gc.disable()
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))


def warm_up() -> None:
    """Decodes a WAV of our own: PyAV imports some parts late, and a child can open nothing."""
    read, write = os.pipe()
    with open(write, "wb") as file, wave.open(file) as silence:
        silence.setparams((1, 2, 8_000, 800, "NONE", ""))
        silence.writeframesraw(bytes(1600))
    with ffmpeg.open_file(read) as container:
        ffmpeg.check(container)
        list(ffmpeg.samples(container))
    os.close(read)


def serve(control: socket.socket) -> None:
    """Forks until the control socket is closed."""
    children: dict[int, socket.socket] = {}  # by process id
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(woken, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        for pid, record in children.items():
            if record.fileno() in ready:  # the worker never writes to it: this is its end
                poll.unregister(record)
                os.kill(pid, signal.SIGKILL)
        if woken.fileno() in ready:
            woken.recv(4096)
            reap(children, poll)
        if control.fileno() in ready:
            request, received, _, _ = socket.recv_fds(control, REQUEST.size, 3)
            if len(request) < REQUEST.size:
                break
            record = socket.socket(fileno=received[RECORD - INPUT])
            children[fork(request, received)] = record
            poll.register(record, select.POLLIN)
            for descriptor in received[: RECORD - INPUT]:
                os.close(descriptor)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def reap(children: dict[int, socket.socket], poll: select.poll) -> None:
    """Tells of each child that is gone how it ended."""
    while children:
        pid, status, usage = os.wait4(-1, os.WNOHANG)
        if not pid:
            return
        record = children.pop(pid)
        with suppress(KeyError):
            poll.unregister(record)
        with suppress(OSError), record:
            record.send(b"\n%d %d" % (os.waitstatus_to_exitcode(status), usage.ru_maxrss))


def fork(request: bytes, received: list[int]) -> int:
    """The process id of a child that decodes."""
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            keep(received)
            live(parent, *REQUEST.unpack(request))
        finally:
            os._exit(1)
    return pid


def keep(received: list[int]) -> None:
    """INPUT, PCM and RECORD are what was sent; everything else is closed."""
    nothing = os.open(os.devnull, os.O_RDWR)
    above = [fcntl.fcntl(fd, fcntl.F_DUPFD, 32) for fd in (nothing, nothing, nothing, *received)]
    for place, descriptor in enumerate(above):
        os.dup2(descriptor, place, inheritable=False)
    os.closerange(RECORD + 1, 4096)


def live(
    parent: int, cpu_seconds: int, most_cpu_seconds: int, audio_seconds_per_cpu: int, memory: int
) -> NoReturn:
    """A child's whole life."""
    confine(parent)
    limit(resource.RLIMIT_CORE, 0, 0)
    limit(resource.RLIMIT_FSIZE, 0, 0)
    limit(resource.RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS)
    limit(resource.RLIMIT_NPROC, 0, 0)
    limit(resource.RLIMIT_CPU, cpu_seconds, most_cpu_seconds)
    with suppress(OSError, ValueError):  # macOS knows no such limit
        limit(resource.RLIMIT_AS, memory, memory)

    def earn(audio_seconds: float) -> None:
        """Who delivers audio may go on; who only burns time may not."""
        earned = cpu_seconds + int(audio_seconds / audio_seconds_per_cpu)
        limit(resource.RLIMIT_CPU, earned, most_cpu_seconds)

    found = json.dumps(decode(earn))
    os.write(RECORD, found.encode())
    os._exit(0)


def limit(kind: int, soft: int, hard: int) -> None:
    """Sets a limit, or leaves a lower one that was there before."""
    _, present = resource.getrlimit(kind)
    hard = hard if present == resource.RLIM_INFINITY else min(hard, present)
    resource.setrlimit(kind, (min(soft, hard), hard))


def confine(parent: int) -> None:
    """Linux: dies with its parent; gains no rights; is the first to go when memory is short; may
    open no file, make no socket, run no program and signal nobody, even when it is taken over."""
    if LIBC is None:
        return
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    forbid_calls()
    version = LIBC.syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_VERSION)
    if version < 1:
        return  # an old kernel, or one that forbids it
    rights = (FILE_RIGHTS[min(version, 5)], TCP_RIGHTS, SCOPES)
    known = 1 + (version >= 4) + (version >= 6)
    rules = (ctypes.c_uint64 * known)(*rights[:known])
    ruleset = LIBC.syscall(LANDLOCK_CREATE_RULESET, rules, ctypes.sizeof(rules), 0)
    if ruleset >= 0:
        LIBC.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0)
        os.close(ruleset)


def forbid_calls() -> None:
    """Landlock knows no UDP, and a process can close a descriptor to make room for another. A
    classic BPF program (seccomp(2)) on the number of each system call: (code, true, false, value).
    """
    if LIBC is None or os.uname().machine not in FORBIDDEN_CALLS:
        return
    machine, calls = FORBIDDEN_CALLS[os.uname().machine]
    steps = [
        (0x20, 0, 0, 4),  # load the machine
        (0x15, 1, 0, machine),
        (0x06, 0, 0, 0x80000000),  # another one's numbers: kill
        (0x20, 0, 0, 0),  # load the call
        (0x35, len(calls) + 1, 0, 0x40000000),  # x32, the same calls under other numbers
        *((0x15, len(calls) - place, 0, call) for place, call in enumerate(calls)),
        (0x06, 0, 0, 0x7FFF0000),  # allow
        (0x06, 0, 0, 0x00050001),  # EPERM
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    pointer = struct.pack("HL", len(steps), ctypes.addressof(program))
    LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, pointer, 0, 0)


def decode(earn: Callable[[float], None]) -> dict[str, object]:
    """Sends the samples; what to tell of the file."""
    try:
        with ffmpeg.open_file(INPUT) as container:
            ffmpeg.check(container)
            sent, block = 0, bytearray()
            for piece in ffmpeg.samples(container):
                block += piece
                if len(block) >= BLOCK_BYTES:
                    sent += send(block)
                    earn(sent / ffmpeg.SAMPLE_BYTES / ffmpeg.SAMPLE_RATE)
            send(block)
            return {
                "stated_seconds": ffmpeg.stated_seconds(container, INPUT),
                "container": container.format.name,
                "codec": container.streams.audio[0].codec_context.codec.name,
            }
    except MediaError as exc:
        return {"code": exc.code, "message": exc.message}
    except MemoryError:
        return {"code": TOO_LARGE.code, "message": TOO_LARGE.message}
    except Exception as exc:  # FFmpegError, and what else PyAV raises on files without sense
        return {
            "code": UnreadableMedia.code,
            "message": UnreadableMedia().message,
            "why": f"{type(exc).__name__}: {exc}",
        }


def send(block: bytearray) -> int:
    """Writes all of it and empties it; how much it was."""
    size, done = len(block), 0
    with memoryview(block) as view:
        while done < size:
            done += os.write(PCM, view[done:])
    block.clear()
    return size


if __name__ == "__main__":
    main()
