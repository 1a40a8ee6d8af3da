"""API keys: what they look like, what is kept of them, and what was asked with them.

A key is `fwa_<id>_<secret>`. Redis has its SHA-256: the secret is 256 random bits, which nobody
finds by trying, so a slow hash would only make requests slow. The id is no secret; it names the key
in lists and logs.

Its name says whose it is. Jobs belong to the name, and limits count by it, so that one key can be
replaced by another of the same name.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from math import ceil
from typing import cast

from redis.asyncio import Redis
from redis.exceptions import RedisError
from redis.typing import EncodableT, FieldT

from api.store import Limits, Scripts, given, unavailable
from shared import keys

SEEN_SECONDS = 1.0  # a revoked key is good for so long
ID_BYTES = 6
SECRET_BYTES = 32
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_KEY = re.compile(r"fwa_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
_NOBODYS_DIGEST = "0" * 64


class Scope(StrEnum):
    SUBMIT = "submit"  # submit files; cancel and erase jobs
    READ = "read"  # status and result of jobs
    PRIORITY = "priority"  # with submit: priority=high, which goes before what others have waiting
    METRICS = "metrics"  # /metrics and /stats
    ADMIN = "admin"  # all of these, and everybody's jobs


@dataclass(frozen=True)
class ApiKey:
    """What is kept of a key."""

    key_id: str
    name: str
    digest: str  # SHA-256 of the whole key, hex
    scopes: frozenset[Scope]
    limits: Limits
    created_at: datetime

    def allows(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes

    @property
    def record(self) -> dict[FieldT, EncodableT]:
        """The Redis hash."""
        return {
            "name": self.name,
            "digest": self.digest,
            "scopes": ",".join(sorted(self.scopes)),
            "created_at": self.created_at.isoformat(),
            "requests": given(self.limits.requests),
            "period_ms": self.limits.period_ms,
            "jobs": given(self.limits.jobs),
            "audio_minutes": given(self.limits.audio_minutes),
        }

    @classmethod
    def of(cls, key_id: str, record: Mapping[str, str]) -> ApiKey:
        def limit(name: str) -> int | None:
            return int(record[name]) if record[name] else None

        return cls(
            key_id=key_id,
            name=record["name"],
            digest=record["digest"],
            scopes=frozenset(map(Scope, record["scopes"].split(","))),
            limits=Limits(
                requests=limit("requests"),
                period_ms=int(record["period_ms"]),
                jobs=limit("jobs"),
                audio_minutes=limit("audio_minutes"),
            ),
            created_at=datetime.fromisoformat(record["created_at"]),
        )


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make(name: str, scopes: frozenset[Scope], limits: Limits) -> tuple[ApiKey, str]:
    """A new key, and its text, which is kept nowhere."""
    key_id = secrets.token_hex(ID_BYTES)
    text = f"fwa_{key_id}_{secrets.token_urlsafe(SECRET_BYTES)}"
    return ApiKey(key_id, name, digest_of(text), scopes, limits, datetime.now(UTC)), text


class KeyStore:
    """The keys in Redis. Every method may raise StoreUnavailable."""

    def __init__(self, redis: Redis):
        self._redis = redis
        self._run = Scripts(redis, ("meter",)).run
        self._seen: dict[str, tuple[ApiKey, float]] = {}

    async def close(self) -> None:
        await self._redis.aclose()

    async def holder(self, text: str) -> ApiKey | None:
        """The key that somebody shows. None: there is no such key, or not any more."""
        match = _KEY.fullmatch(text)
        if match is None:
            return None
        key = await self._find(match[1])
        known = key.digest if key else _NOBODYS_DIGEST
        return key if hmac.compare_digest(digest_of(text), known) else None

    async def meter(self, key: ApiKey, *, submits: bool) -> tuple[str, int | None]:
        """Counts a request. (none | rate | jobs | audio: the limit that it would exceed, after how
        many seconds it would not; None: when one of the caller's jobs ends)."""
        limits = key.limits
        limit, ms = await self._run(
            "meter",
            key.name,
            given(limits.requests),
            limits.period_ms,
            int(submits),
            given(limits.jobs),
            given(limits.audio_ms),
        )
        return limit, ceil(ms / 1000) or None

    async def add(self, key: ApiKey) -> None:
        try:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.hset(keys.api_key(key.key_id), mapping=key.record)
                pipe.sadd(keys.API_KEYS, key.key_id)
                await pipe.execute()
        except RedisError as exc:
            raise unavailable(exc) from exc

    async def revoke(self, key_id: str) -> ApiKey | None:
        """The key as it was; None where there is none."""
        key = await self._read(key_id)
        try:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.delete(keys.api_key(key_id))
                pipe.srem(keys.API_KEYS, key_id)
                await pipe.execute()
        except RedisError as exc:
            raise unavailable(exc) from exc
        return key

    async def all(self) -> list[ApiKey]:
        """By name, the oldest first."""
        try:
            ids = [str(key_id) for key_id in await self._redis.smembers(keys.API_KEYS)]
        except RedisError as exc:
            raise unavailable(exc) from exc
        found = [key for key_id in ids if (key := await self._read(key_id))]
        return sorted(found, key=lambda key: (key.name, key.created_at))

    async def _find(self, key_id: str) -> ApiKey | None:
        key, seen_at = self._seen.get(key_id, (None, 0.0))
        if key is None or time.monotonic() - seen_at > SEEN_SECONDS:
            key = await self._read(key_id)
            if key is None:
                self._seen.pop(key_id, None)
            else:
                self._seen[key_id] = key, time.monotonic()
        return key

    async def _read(self, key_id: str) -> ApiKey | None:
        try:
            record = await self._redis.hgetall(keys.api_key(key_id))
        except RedisError as exc:
            raise unavailable(exc) from exc
        return ApiKey.of(key_id, cast("dict[str, str]", record)) if record else None
