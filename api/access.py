"""Who asks, and may they? Decided for every request before anything of its body is read.

With AUTH=keys every address needs a key but those in OPEN, so what is added later is guarded, too:
what reads asks for the scope `read`, everything else for `submit`.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from api.dependencies import State, state_of
from api.errors import service_error
from api.key_store import ApiKey, Scope
from api.store import NO_LIMITS, Limits
from shared.errors import (
    AudioMinutesUsed,
    Forbidden,
    LimitReached,
    RateLimited,
    ServiceError,
    StoreUnavailable,
    TooManyJobs,
    Unauthorized,
)
from shared.logs import context
from shared.metrics import REJECTIONS
from shared.settings import Auth

log = logging.getLogger("audit")

OPEN = frozenset(
    {
        "/",
        "/docs",
        "/docs/errors",
        "/openapi.json",
        "/health",
        "/health/live",
        "/health/ready",
    }
)
OPEN_FOLDER = "/static/"
METRICS = ("/metrics", "/stats")  # and what begins so
SPOKEN = "/v1/audio/"  # below it what is submitted is read at once
NO_SUBMISSION = ("/webhook/redeliver", "/cancel")  # how a POST ends that makes no job
LIMITS: dict[str, type[LimitReached]] = {
    "rate": RateLimited,
    "jobs": TooManyJobs,
    "audio": AudioMinutesUsed,
}
LONGEST_RETRY_SECONDS = 60  # for a job's end, which is a guess


@dataclass(frozen=True)
class Caller:
    """Who sent a request."""

    name: str  # owns what it submits; '' without keys
    sees: str  # JobStore's `seen_by`
    limits: Limits
    may_hurry: bool  # may send priority=high


ANYBODY = Caller("", "", NO_LIMITS, may_hurry=True)


def caller_of(request: Request) -> Caller:
    if state_of(request).settings.auth is Auth.NONE:
        return ANYBODY
    caller: Caller = request.state.caller
    return caller


def audit(request: Request, action: str, job_id: str) -> None:
    """A log line: who did what to which job. The caller's name is in the line's context."""
    if caller_of(request).name:
        log.info(action.replace("_", " "), extra={"action": action, "job_id": job_id})


def needed(method: str, path: str) -> Scope | None:
    """None: no key is needed."""
    if path in OPEN or path.startswith(OPEN_FOLDER):
        return None
    if path.startswith(METRICS):
        return Scope.METRICS
    return Scope.READ if method in {"GET", "HEAD"} else Scope.SUBMIT


def shown_key(request: Request) -> str:
    """The key that the headers hold; '' for none. Never the query string: addresses get logged."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return request.headers.get("x-api-key", "").strip()


class Access:
    """Middleware: refuses, or says to the rest who the caller is."""

    def __init__(self, app: ASGIApp):
        self.app = app
        self._refusals = Refusals()

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        need = needed(scope["method"], scope["path"]) if scope["type"] == "http" else None
        if need is None:
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        try:
            key = await self._admit(state_of(request), request, need)
        except ServiceError as exc:
            self._refusals.add(exc)
            if scope["method"] == "POST":
                rejected = state_of(request).metrics.rejected
                rejected.labels(REJECTIONS.get(exc.code, "invalid")).inc()
            answer = await service_error(request, exc)
            await answer(scope, receive, send)
            return
        sees = "" if Scope.ADMIN in key.scopes else key.name
        may_hurry = key.allows(Scope.PRIORITY)
        request.state.caller = Caller(key.name, sees, key.limits, may_hurry)
        await self.app(scope, receive, send)

    async def _admit(self, state: State, request: Request, need: Scope) -> ApiKey:
        """Raises Unauthorized, Forbidden, LimitReached, StoreUnavailable."""
        key = await state.keys.holder(shown_key(request))
        if key is None:
            raise Unauthorized
        context.set({**context.get(), "caller": key.name, "key": key.key_id})
        for scope in (need, Scope.READ) if request.scope["path"].startswith(SPOKEN) else (need,):
            if not key.allows(scope):
                raise Forbidden(f"This API key may not do that: it needs the scope `{scope}`.")
        limits = key.limits
        if limits == NO_LIMITS:
            return key
        submits = request.method == "POST" and not request.url.path.endswith(NO_SUBMISSION)
        limit, seconds = await state.keys.meter(key, submits=submits)
        if limit != "none":
            seconds = seconds or await seconds_to_an_end(state, limits)
            raise LIMITS[limit](retry_after_seconds=seconds)
        return key


async def is_still_admitted(request: Request) -> bool:
    """May who opened a long answer go on reading it? Its key may be revoked meanwhile. While nobody
    can say, yes."""
    state = state_of(request)
    if state.settings.auth is Auth.NONE:
        return True
    try:
        key = await state.keys.holder(shown_key(request))
    except StoreUnavailable:
        return True
    return key is not None and key.allows(Scope.READ)


async def seconds_to_an_end(state: State, limits: Limits) -> int:
    """When will one of the caller's jobs end, roughly? They lie evenly in the queue, as if all were
    of one size."""
    wait_seconds = (await state.admission.look()).wait_seconds or 0
    return round(min(max(1, wait_seconds / max(1, limits.jobs or 1)), LONGEST_RETRY_SECONDS))


class Refusals:
    """Log lines of refusals: one a second at most, which counts those that had none. Whoever can be
    refused can be refused very often."""

    def __init__(self) -> None:
        self._logged_at = float("-inf")
        self._unlogged = 0

    def add(self, error: ServiceError) -> None:
        if time.monotonic() - self._logged_at < 1:
            self._unlogged += 1
            return
        log.warning(
            "refused",
            extra={"action": "refused", "code": error.code, "unlogged_before": self._unlogged},
        )
        self._logged_at, self._unlogged = time.monotonic(), 0
