"""Whatever happens to jobs in whatever order, the store's books agree with its records: what is
kept in two places, because counting it anew would take too long, never drifts."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import replace
from uuid import uuid4

import pytest
import redis

from api.store import JobStore, Limits
from shared import keys
from shared.broker import celery_app
from shared.errors import EngineFailure, ServiceError, TimeLimit
from shared.storage import Manifest
from worker.store import WorkerStore

STEPS = 250
OWNERS = ("ann", "bob", "")
WEIGHTS = {  # how often each happens
    "submit": 6, "claim": 5, "finish": 2, "split": 2, "finish_part": 2, "fail": 1, "hand_back": 1,
    "blame": 1, "reap": 1, "cancel": 3, "erase": 2, "retry": 2, "evict": 1, "replan": 1, "renew": 1,
    "expire": 1,
}  # fmt: skip


class Life:
    """Does to the store what users, workers and time do, also with claims that are lost."""

    def __init__(self, store: JobStore, worker: WorkerStore, raw: redis.Redis, seed: int):
        self._store, self._worker, self._raw = store, worker, raw
        self._chance = random.Random(seed)
        self._claims: list = []
        self._sent: dict[str, Manifest] = {}

    async def step(self) -> str:
        (what,) = self._chance.choices([*WEIGHTS], [*WEIGHTS.values()])
        with suppress(ServiceError):  # a refusal changes nothing
            await getattr(self, f"_{what}")()
        return what

    def _claim_of_old(self):
        """One that is held, or was."""
        return self._chance.choice(self._claims) if self._claims else None

    def _some_job(self) -> str:
        return self._chance.choice([*self._sent]) if self._sent else str(uuid4())

    async def _submit(self) -> None:
        owner, content = self._chance.choice(OWNERS), self._chance.randrange(6)
        told = {"priority": self._chance.choice(["low", "normal", "normal", "high"])}
        if self._chance.random() < 0.3:
            told["webhook_url"] = f"https://receiver-{content % 2}.example.org/hook"
        if self._chance.random() < 0.4:
            content %= 3
            told |= {"idempotency": f"{owner}/{content}", "request": str(content)}
            told |= {"batch": str(uuid4()), "batch_number": str(self._chance.randrange(3))}
        sizes, models = [100, 10**6, 10**7], ["model", "model", "other"]
        made = Manifest(
            str(uuid4()),
            f"fp-{content}",
            "",
            "{}",
            self._chance.choice(models),
            self._chance.choice(sizes),
            owner,
            told,
        )
        self._sent[made.job_id] = made
        limits = self._chance.choice([Limits(), Limits(jobs=4, audio_minutes=60)])
        await self._store.submit(made, None, limits, self._chance.choice(["", "", "joined"]))

    async def _retry(self) -> None:
        job_id = self._some_job()
        retries = int(self._raw.hget(keys.job(job_id), "retries") or 0) + 1
        if made := self._sent.get(job_id):
            told = {**made.job_options, "retries": str(retries)}
            await self._store.submit(replace(made, job_options=told), least="failed")

    async def _claim(self) -> None:
        takes = {name: self._chance.random() < 0.8 for name in ("takes_parts", "takes_last")}
        if claim := self._worker.claim(**takes):
            self._claims.append(claim)

    async def _finish(self) -> None:
        if (claim := self._claim_of_old()) and claim.part is None:
            transcript = b"x" * self._chance.randrange(1, 20)
            self._worker.complete(claim, transcript, self._chance.choice(["model", "other"]), 2.0)

    async def _split(self) -> None:
        if (claim := self._claim_of_old()) and claim.part is None and not claim.is_join:
            self._worker.split(claim, '{"duration": 10}', [0.5, 0.3, 0.2])

    async def _finish_part(self) -> None:
        if (claim := self._claim_of_old()) and claim.part is not None:
            self._worker.finish_part(claim, '{"segments": []}')

    async def _replan(self) -> None:
        if (claim := self._claim_of_old()) and (claim.part is not None or claim.is_join):
            self._worker.replan(claim)

    async def _fail(self) -> None:
        if claim := self._claim_of_old():
            self._worker.fail(claim, TimeLimit())

    async def _hand_back(self) -> None:
        if claim := self._claim_of_old():
            self._worker.hand_back(claim)

    async def _blame(self) -> None:
        if claim := self._claim_of_old():
            self._worker.retry(claim, EngineFailure())

    async def _renew(self) -> None:
        if claim := self._claim_of_old():
            self._worker.renew(claim, self._chance.random())

    async def _reap(self) -> None:
        for unit in self._raw.zrange(keys.LEASES, 0, -1):
            if self._chance.random() < 0.3:
                self._raw.zadd(keys.LEASES, {unit: 1})
        self._worker.reap()

    async def _cancel(self) -> None:
        await self._store.cancel(self._some_job(), "")

    async def _erase(self) -> None:
        await self._store.erase(self._some_job(), "")

    async def _evict(self) -> None:
        self._worker.evict(self._chance.choice([0, 20, 10**6]))

    async def _expire(self) -> None:
        key = keys.job(self._some_job())
        if self._raw.hget(key, "status"):
            self._raw.hset(key, "expires_ms", 1)


def audit_queues(raw: redis.Redis) -> None:
    counters = raw.hgetall(keys.COUNTERS)
    queues = {"clock": keys.QUEUE, "parts_clock": keys.PARTS}
    queued = {name: raw.zrange(queue, 0, -1) for name, queue in queues.items()}
    leased = set(raw.zrange(keys.LEASES, 0, -1))
    backlog: Counter[str] = Counter()
    waiting: Counter[str] = Counter()
    for clock, units in queued.items():
        assert not leased & set(units)
        for unit in units:
            record = raw.hgetall(keys.transcription(unit))
            priority, _, owner = record["line"].partition("/")
            waiting[f"{clock}_{priority}_waiting"] += 1
            if record.get("stage") != "join":
                backlog[owner] += int(record["weight"])
    assert int(counters.get("backlog", 0)) == backlog.total()
    assert {owner: int(n) for owner, n in raw.zrange(keys.BACKLOGS, 0, -1, withscores=True)} == {
        owner: weight for owner, weight in backlog.items() if weight
    }
    for name in (name for name in counters if name.endswith("_waiting")):
        assert int(counters[name]) == waiting[name], name
    assert set(raw.zrange(keys.WAITING, 0, -1)) == set(queued["clock"])
    for key in raw.keys(keys.transcription("*")):
        unit, record = key.removeprefix(keys.transcription("")), raw.hgetall(key)
        if record["status"] == "queued":
            assert unit in queued["clock"] + queued["parts_clock"]
        elif record["status"] == "processing" and "claim_id" in record:
            assert unit in leased
        elif record["status"] == "processing" and record["stage"] == "join":
            assert unit in queued["clock"]
        elif record["status"] == "processing":
            parts = [keys.transcription(keys.part(unit, n)) for n in range(int(record["parts"]))]
            left = [part for part in parts if raw.hget(part, "status") != "completed"]
            assert len(left) == int(record["parts_left"]) > 0


def audit_transcripts(raw: redis.Redis) -> None:
    sizes = raw.hgetall(keys.TRANSCRIPT_SIZES)
    assert int(raw.hget(keys.COUNTERS, "transcript_bytes") or 0) == sum(map(int, sizes.values()))
    assert set(sizes) == set(raw.zrange(keys.TRANSCRIPTS, 0, -1))


def audit_jobs(raw: redis.Redis) -> None:
    unfinished: dict[str, set[str]] = defaultdict(set)
    of_key: Counter[str] = Counter()
    for key in raw.keys(keys.job("*")):
        job_id, record = key.rpartition(":")[2], raw.hgetall(key)
        if "status" in record:
            assert raw.pttl(key) > 0, "it goes by itself"
            continue
        unfinished[record.get("owner", "")].add(job_id)
        of_key[record.get("idempotency", "")] += 1
        fingerprint = record["fingerprint"]
        assert raw.sismember(keys.holders(fingerprint), job_id)
        work = keys.transcription(fingerprint)
        assert raw.hget(work, "status") in {"queued", "processing"}, "it is not stuck"
        assert {raw.pttl(each) for each in (key, work, keys.holders(fingerprint))} == {-1}
    for owner in filter(None, OWNERS):
        held = raw.hgetall(keys.unfinished(owner))
        assert set(held) == unfinished[owner]
        assert int(raw.get(keys.held(owner)) or 0) == sum(map(int, held.values()))
    for key in raw.keys(keys.idempotency("*")):
        number = of_key[key.removeprefix(keys.idempotency(""))]
        assert int(raw.hget(key, "unfinished") or 0) == number
        assert (raw.pttl(key) == -1) == (number > 0)


@pytest.mark.parametrize("seed", [1, 2])
async def test_the_books_agree_with_the_records(store, worker, settings, raw, seed):
    few = settings.model_copy(update={"max_attempts": 2, "max_handbacks": 3})
    strict = WorkerStore(few, celery_app(few.redis_url.get_secret_value()), "worker-2")
    life = Life(store, strict, raw, seed)
    for number in range(STEPS):
        what = await life.step()
        try:
            audit_queues(raw)
            audit_transcripts(raw)
            audit_jobs(raw)
        except AssertionError as exc:
            raise AssertionError(f"after step {number}, {what}: {exc}") from exc
    strict.close()
