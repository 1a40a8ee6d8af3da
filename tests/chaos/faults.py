"""What can go wrong. Each fault breaks the running service, mends what does not mend itself, and
returns the moment (time.monotonic()) from which the service had all it needs to recover."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from local.service import answers
from shared import keys
from shared.broker import QUEUE_NAME
from tests.chaos.ledger import Ledger, Source, User
from tests.chaos.world import (
    LEASE_SECONDS,
    REMOTE_WORKER,
    REPLICAS,
    WORKERS,
    World,
    limit_files,
    open_files,
)
from tests.conftest import wait_until

REDIS = "Redis"
MOST_PREFETCHED = 2  # bells that a worker has taken and not begun: as many as it has slots
CLAIM_SECONDS = 60  # after its network is back: then a worker has stopped without a word
MOST_LOG_LINES = 1000  # what running out of something may write


@dataclass
class Chaos:
    """What a fault may use."""

    world: World
    chance: random.Random  # nothing else decides what happens
    ledger: Ledger
    recording: Source
    rollbacks: list[tuple[float, float]]  # between these (time.time()) Redis lost what it wrote


@dataclass(frozen=True)
class Fault:
    inflict: Callable[[Chaos], float]
    needs: str = ""  # a key of World.missing

    @property
    def name(self) -> str:
        return self.inflict.__name__.replace("_", " ")


FAULTS: list[Fault] = []


def fault(needs: str = "") -> Callable[[Callable[[Chaos], float]], Callable[[Chaos], float]]:
    def register(inflict: Callable[[Chaos], float]) -> Callable[[Chaos], float]:
        FAULTS.append(Fault(inflict, needs))
        return inflict

    return register


def wait(seconds: float) -> None:
    """How long a fault lasts is part of it."""
    time.sleep(seconds)


# --- workers


@fault()
def worker_killed(chaos: Chaos) -> float:
    """kill -9 in the middle of a job."""
    name = chaos.world.busy_worker(chaos.chance)
    since = chaos.world.kill(name)
    chaos.world.revive(name)
    return since


@fault()
def all_workers_killed(chaos: Chaos) -> float:
    chaos.world.busy_worker(chaos.chance)
    since = max([chaos.world.kill(name) for name in WORKERS])
    chaos.world.revive(*WORKERS)
    return since


@fault()
def worker_stopped(chaos: Chaos) -> float:
    """SIGTERM in the middle of a job."""
    world = chaos.world
    name = world.busy_worker(chaos.chance)
    since = time.monotonic()
    world.service.kill(name, signal.SIGTERM)
    if (status := world.service.popen(name).wait(30)) != 0:
        world.violations.append(f"{name} answered SIGTERM with exit status {status}")
    world.revive(name)
    return since


@fault()
def worker_frozen(chaos: Chaos) -> float:
    """SIGSTOP until another worker has its work, then SIGCONT: what it writes then is refused."""
    world = chaos.world
    name = world.busy_worker(chaos.chance)
    world.service.kill(name, signal.SIGSTOP)
    since = time.monotonic()
    wait_until(lambda: not world.units_of(name), LEASE_SECONDS + 10, "its leases end")
    wait(chaos.chance.uniform(0, 2))
    world.service.kill(name, signal.SIGCONT)
    return since


@fault()
def worker_frozen_while_idle(chaos: Chaos) -> float:
    """What an idle worker has taken from the broker, and never heard, is not lost with it."""
    world = chaos.world
    name = chaos.chance.choice(WORKERS)
    world.service.kill(name, signal.SIGSTOP)
    since = time.monotonic()
    wait(chaos.chance.uniform(0.5, 2))
    world.kill(name)
    world.revive(name)
    return since


@fault()
def file_that_kills_its_worker(chaos: Chaos) -> float:
    """Whoever begins it dies, each time. It is quarantined, and what ran beside it is not."""
    world, ledger = chaos.world, chaos.ledger
    job = ledger.begin(chaos.recording, vad_filter=False, is_poison=True)
    user = User(ledger, world.url)
    wait_until(lambda: user.send(job), 20, "it is accepted")
    unit = world.raw.hget(keys.job(job.job_id), "fingerprint")
    deaths, since = 0, time.monotonic()

    def is_over() -> bool:
        nonlocal deaths, since
        if name := world.worker_at(unit):
            since = world.kill(name)
            deaths += 1
            world.revive(name)
        return world.raw.hget(keys.transcription(unit), "status") == "failed"

    wait_until(is_over, 6 * LEASE_SECONDS + 30, "it is given up")
    user.follow(job)
    user.close()
    if deaths != world.service.settings.max_attempts:
        world.violations.append(f"a file was given up after {deaths} deaths")
    return since


@fault(needs="memory groups")
def worker_out_of_memory(chaos: Chaos) -> float:
    """The kernel kills it in the middle of a job."""
    world = chaos.world
    name = world.busy_worker(chaos.chance)
    with world.little_memory(name, 4 << 20):
        wait_until(lambda: world.service.popen(name).poll() is not None, 40, "it is killed")
    since = time.monotonic()
    world.revive(name)
    return since


# --- API


@fault()
def API_process_killed(chaos: Chaos) -> float:  # noqa: N802
    """kill -9 of one that takes an upload at this moment; the replica starts another."""
    world = chaos.world
    with ExitStack() as uploads:
        for number in range(len(REPLICAS)):
            uploads.enter_context(half_an_upload(world.replica_url(number)))
        name = chaos.chance.choice(REPLICAS)
        victim = chaos.chance.choice(world.api_pids(name))
        os.kill(victim, signal.SIGKILL)
    return time.monotonic()


@fault()
def API_replica_killed(chaos: Chaos) -> float:  # noqa: N802
    name = chaos.chance.choice(REPLICAS)
    with half_an_upload(chaos.world.replica_url(REPLICAS.index(name))):
        chaos.world.service.supervisor.processes[name].end_group()
    chaos.world.revive(name)
    return time.monotonic()


@fault()
def API_replica_stopped(chaos: Chaos) -> float:  # noqa: N802
    """SIGTERM while uploads come in."""
    world = chaos.world
    name = chaos.chance.choice(REPLICAS)
    world.service.kill(name, signal.SIGTERM)
    world.service.popen(name).wait(40)
    world.revive(name)
    return time.monotonic()


@fault()
def slow_and_vanishing_clients(chaos: Chaos) -> float:
    """Half a head, half a body, a body in drips, and gone; the others are served meanwhile."""
    world = chaos.world
    with ExitStack() as gone:
        for number in range(40):
            url = world.replica_url(number % 2) if number % 4 else world.url()
            gone.enter_context(half_an_upload(url, chaos.chance.randrange(60, 3000)))
        wait(chaos.chance.uniform(3, 8))  # some are cut off, the others leave
    return time.monotonic()


@fault()
def descriptors_exhausted(chaos: Chaos) -> float:
    """An API process may open no more files, and clients keep connecting."""
    world = chaos.world
    number = chaos.chance.randrange(len(REPLICAS))
    lines = count_lines(world)
    pids = world.api_pids(REPLICAS[number])
    before = {pid: limit_files(pid, open_files(pid) + 4) for pid in pids}
    address = urlsplit(world.replica_url(number))
    with ExitStack() as opened:
        for _ in range(200):
            with suppress(OSError):
                opened.enter_context(
                    socket.create_connection((address.hostname, address.port), 0.2)
                )
        wait(chaos.chance.uniform(2, 4))
    for pid, most in before.items():
        with suppress(ProcessLookupError):
            limit_files(pid, most)
    since = time.monotonic()
    if (written := count_lines(world) - lines) > MOST_LOG_LINES:
        world.violations.append(f"{written} log lines while descriptors were out")
    wait_until(lambda: answers(world.replica_url(number) + "/health/live"), 15, "it serves again")
    return since


# --- Redis


@fault()
def redis_killed(chaos: Chaos) -> float:
    chaos.world.busy_worker(chaos.chance)
    began = time.time()
    chaos.world.kill(REDIS)
    chaos.rollbacks.append((began - 2, time.time()))  # at most what it had not written yet
    wait(chaos.chance.uniform(0.2, 4))
    chaos.world.revive(REDIS)
    return time.monotonic()


@fault()
def redis_away_past_the_lease(chaos: Chaos) -> float:
    chaos.world.busy_worker(chaos.chance)
    began = time.time()
    chaos.world.kill(REDIS)
    chaos.rollbacks.append((began - 2, time.time()))
    wait(LEASE_SECONDS + chaos.chance.uniform(1, 4))
    chaos.world.revive(REDIS)
    return time.monotonic()


@fault()
def redis_stalled(chaos: Chaos) -> float:
    """SIGSTOP: it takes connections, and answers nothing."""
    world = chaos.world
    world.busy_worker(chaos.chance)
    world.service.kill(REDIS, signal.SIGSTOP)
    wait(chaos.chance.uniform(1, LEASE_SECONDS + 3))
    live = [answers(world.replica_url(n) + "/health/live") for n in range(len(REPLICAS))]
    if not all(live):
        world.violations.append("an API was not alive while Redis was stalled")
    world.service.kill(REDIS, signal.SIGCONT)
    return time.monotonic()


@fault()
def redis_loses_its_last_second(chaos: Chaos) -> float:
    """Its machine dies: the append-only file ends earlier, in the middle of a command."""
    world = chaos.world
    files = sorted((world.data / "redis").rglob("*.incr.aof"))
    assert files, "Redis writes an append-only file"
    began, size = time.time(), files[-1].stat().st_size
    wait(chaos.chance.uniform(1, 1.8))
    world.kill(REDIS)
    with files[-1].open("r+b") as file:
        file.truncate(max(0, size - chaos.chance.randrange(1, 60)))
    chaos.rollbacks.append((began - 2, time.time()))
    world.revive(REDIS)
    return time.monotonic()


@fault()
def redis_emptied(chaos: Chaos) -> float:
    chaos.world.busy_worker(chaos.chance)
    chaos.rollbacks.append((0.0, time.time()))
    chaos.world.raw.flushall()
    return time.monotonic() + 10  # a reaper leaves an upload alone for so long


@fault()
def redis_memory_full(chaos: Chaos) -> float:
    """Nothing new fits: no upload is taken; what runs is finished all the same."""
    raw = chaos.world.raw
    chaos.world.busy_worker(chaos.chance)
    before = raw.config_get("maxmemory")["maxmemory"]
    raw.config_set("maxmemory", 1)
    wait(chaos.chance.uniform(3, LEASE_SECONDS + 3))
    raw.config_set("maxmemory", before)
    return time.monotonic()


@fault(needs="disk")
def redis_disk_full(chaos: Chaos) -> float:
    ballast = chaos.world.fill("redis")
    wait(chaos.chance.uniform(3, 5))
    ballast.unlink()
    return time.monotonic()


@fault(needs="disk")
def redis_killed_after_its_disk_was_full(chaos: Chaos) -> float:
    """What it writes then stands behind a hole, in a file that a rewrite has begun."""
    world = chaos.world
    world.raw.bgrewriteaof()
    wait(1)
    began = time.time()
    ballast = world.fill("redis")
    wait(chaos.chance.uniform(1, 4))
    ballast.unlink()
    wait(chaos.chance.uniform(0.5, 3))
    world.kill(REDIS)
    chaos.rollbacks.append((began - 2, time.time()))
    world.revive(REDIS)
    return time.monotonic()


# --- the broker


@fault()
def bells_lost(chaos: Chaos) -> float:
    """Messages vanish for some seconds."""
    until = time.monotonic() + chaos.chance.uniform(2, 4)
    while time.monotonic() < until:
        chaos.world.raw.delete(QUEUE_NAME)
    return time.monotonic()


@fault()
def bells_repeated(chaos: Chaos) -> float:
    """Each message arrives five times more."""
    until = time.monotonic() + chaos.chance.uniform(2, 4)
    while time.monotonic() < until:
        for bell in chaos.world.raw.lrange(QUEUE_NAME, 0, 3):
            chaos.world.raw.lpush(QUEUE_NAME, *[bell] * 5)
    return time.monotonic()


@fault()
def connections_cut(chaos: Chaos) -> float:
    """Redis closes every connection, again and again."""
    for _ in range(chaos.chance.randrange(3, 8)):
        for kind in ("normal", "pubsub"):
            chaos.world.raw.client_kill_filter(_type=kind, skipme=True)
        wait(chaos.chance.uniform(0.2, 0.8))
    return time.monotonic()


@fault(needs="network")
def network_cut(chaos: Chaos) -> float:
    """One worker and Redis hear nothing of each other for longer than a lease, and no error."""
    chaos.world.network.cut()
    wait(LEASE_SECONDS + chaos.chance.uniform(1, 8))
    chaos.world.network.heal()
    return claims_again(chaos.world)


@fault(needs="network")
def network_cut_for_long(chaos: Chaos) -> float:
    """The same, until TCP's own pauses are long, and every connection was given up."""
    chaos.world.network.cut()
    wait(40)
    chaos.world.network.heal()
    return claims_again(chaos.world)


@fault(needs="network")
def network_unplugged(chaos: Chaos) -> float:
    """The same, and the worker's kernel sees that the link is down."""
    chaos.world.network.unplug()
    wait(LEASE_SECONDS + chaos.chance.uniform(1, 8))
    chaos.world.network.plug()
    return claims_again(chaos.world)


@fault(needs="network")
def network_forgets(chaos: Chaos) -> float:
    """Connections of one worker that are open for ever, and dead; new ones work."""
    chaos.world.network.cut()
    wait(chaos.chance.uniform(0.5, 2))
    chaos.world.network.heal(forgets=True)
    return claims_again(chaos.world)


def claims_again(world: World) -> float:
    """Returns now, and waits until the worker behind the network claims work of which it can't have
    heard before."""
    since, before = time.monotonic(), world.claims_of_the_remote_worker()

    def has_heard() -> bool:
        return world.claims_of_the_remote_worker() > before + MOST_PREFETCHED

    wait_until(has_heard, CLAIM_SECONDS, f"{REMOTE_WORKER} claims again")
    print(f"{REMOTE_WORKER} claims again after {time.monotonic() - since:.1f} s")
    return since


# --- disks and clocks


@fault(needs="disk")
def uploads_disk_full(chaos: Chaos) -> float:
    ballast = chaos.world.fill("uploads")
    wait(chaos.chance.uniform(2, 4))
    ballast.unlink()
    return time.monotonic()


@fault(needs="faketime")
def worker_clock_stepped(chaos: Chaos) -> float:
    """Two hours forth or back, while it works."""
    world = chaos.world
    name = chaos.chance.choice(WORKERS)
    clock = world.clock(name)
    world.service.wait_ready(60, name)
    clock.write_text(chaos.chance.choice(["+2h", "-2h"]))
    since = time.monotonic()
    wait(chaos.chance.uniform(4, 8))
    world.true_clock(name)
    world.service.wait_ready(60, name)
    return since


@fault(needs="faketime")
def redis_clock_stepped(chaos: Chaos) -> float:
    """An hour forth, or back: with it go all leases. A worker dies in that hour, too."""
    world = chaos.world
    clock = world.clock(REDIS)
    world.service.wait_ready(60, REDIS)
    world.busy_worker(chaos.chance, 40)
    clock.write_text(chaos.chance.choice(["+1h", "-1h"]))
    wait(1.5)
    name = world.busy_worker(chaos.chance)
    world.kill(name)
    world.revive(name)
    world.true_clock(REDIS)
    world.service.wait_ready(60, REDIS)
    return time.monotonic()


@contextmanager
def half_an_upload(url: str, size: int = 2000) -> Iterator[None]:
    """A client that begins an upload, and is gone when the block ends."""
    address = urlsplit(url)
    head = (
        f"POST /transcribe HTTP/1.1\r\nHost: {address.hostname}\r\nContent-Length: 400000\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    )
    with ExitStack() as stack:
        with suppress(OSError):
            client = socket.create_connection((address.hostname, address.port), 2)
            stack.enter_context(client)
            client.sendall((head.encode() + bytes(3000))[:size])
        yield


def count_lines(world: World) -> int:
    return world.log.read_bytes().count(b"\n")
