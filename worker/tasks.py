"""What a worker does when a bell rings: claim, transcribe, commit.

The bell's hint is ignored on purpose: the claim script hands out what should run next.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from shared.broker import short
from shared.errors import (
    EngineFailure,
    InputMissing,
    MediaError,
    ServiceError,
    StoreUnavailable,
)
from shared.jobs import Claim
from shared.logs import context
from shared.metrics import JOB_ERRORS, WorkerMetrics
from shared.options import TranscriptionOptions
from shared.schemas import Transcript
from shared.settings import Settings
from shared.storage import Storage
from worker.engine.engine import Engine
from worker.heartbeat import Heartbeat, Interrupted, Run
from worker.reaper import Reaper
from worker.store import WorkerStore

log = logging.getLogger(__name__)

COMMIT_RETRY_SECONDS = 600.0
COMMIT_PAUSE_SECONDS = 1.0
Reply = TypeVar("Reply")


@dataclass(frozen=True)
class Service:
    """What a task may use: built once by worker/app.py."""

    settings: Settings
    store: WorkerStore
    storage: Storage
    engine: Engine
    heartbeat: Heartbeat
    reaper: Reaper
    metrics: WorkerMetrics
    draining: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Ended:
    """What became of a claimed transcription; Flower shows its text as the task's result."""

    end: str  # see work
    transcription: str  # see shared.broker.short
    attempt: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.transcription} {self.end} in {self.seconds:.1f} s, attempt {self.attempt}"


def transcribe_next(service: Service) -> Ended | None:
    """Runs the transcription that should run next; returns at once when there is none."""
    if service.draining.is_set():
        return None
    try:
        claim = service.store.claim()
    except StoreUnavailable:
        log.warning("no claim: the store is away", extra={"action": "claim_failed"})
        return None
    if claim is None:
        return None
    context.set({"fingerprint": short(claim.fingerprint), "attempt": str(claim.attempt)})
    service.metrics.queue_wait.observe(max(0.0, time.time() - claim.queued_at.timestamp()))
    service.metrics.active.inc()
    began = time.perf_counter()
    try:
        with service.heartbeat.running(claim) as run:
            end = work(service, claim, run)
    finally:
        context.set({})
        service.metrics.active.dec()
        service.metrics.busy_seconds.inc(time.perf_counter() - began)
    service.metrics.jobs.labels(end, service.engine.model.name).inc()
    seconds = time.perf_counter() - began
    if end in {"completed", "failed"}:
        service.metrics.duration.observe(seconds)
    return Ended(end, short(claim.fingerprint), claim.attempt, seconds)


def work(service: Service, claim: Claim, run: Run) -> str:
    """One claimed transcription, to its end: completed | failed | cancelled | lost | released."""
    log.info("claimed", extra={"action": "claimed", "holders": len(claim.holders)})
    try:
        holder = find_holder(service, claim)
        spooled = service.storage.spooled(holder)
        transcript = (
            Transcript.model_validate_json(spooled)
            if spooled
            else transcribe(service, claim, run, service.storage.audio(holder))
        )
    except Interrupted as stop:
        return interrupted(service, claim, stop.reason)
    except (MediaError, InputMissing) as exc:
        return fail(service, claim, exc)
    except FileNotFoundError:  # the job whose upload it was is cancelled; others may hold it
        return hand_back(service, claim)
    except StoreUnavailable:
        return "lost"
    except Exception:
        log.exception("the engine failed", extra={"action": "engine_failed"})
        return retry(service, claim)
    return complete(service, claim, holder, transcript)


def find_holder(service: Service, claim: Claim) -> str:
    """The id of a job whose upload is there. Raises InputMissing, StoreUnavailable."""
    found = service.storage.holder_with_audio(claim.holders)
    found = found or service.storage.holder_with_audio(service.store.holders(claim))
    if found is None:
        raise InputMissing
    return found


def transcribe(service: Service, claim: Claim, run: Run, audio: Path) -> Transcript:
    metrics = service.metrics
    options = TranscriptionOptions.model_validate_json(claim.options)
    transcript = service.engine.transcribe(
        audio,
        options,
        run.checkpoint,
        lambda stage, seconds: metrics.stage.labels(stage).observe(seconds),
    )
    metrics.audio_seconds.inc(transcript.duration)
    metrics.processing_seconds.inc(transcript.processing_seconds)
    metrics.audio_duration.observe(transcript.duration)
    metrics.rtf.observe(transcript.processing_seconds / max(transcript.duration, 1e-9))
    metrics.language.labels(transcript.language).inc()
    return transcript


def complete(service: Service, claim: Claim, holder: str, transcript: Transcript) -> str:
    """Commits the transcript. While the store is away it is kept beside its input, so that whoever
    claims the transcription later finds it done."""
    content = transcript.model_dump_json(exclude_none=True).encode()
    began = time.perf_counter()
    jobs = commit(
        service,
        lambda: service.store.complete(
            claim, content, service.settings.model_key, transcript.duration
        ),
        on_outage=lambda: service.storage.spool([holder, *claim.holders], content),
    )
    if jobs is None:
        log.warning("not committed: the claim was lost", extra={"action": "commit_refused"})
        return "lost"
    service.metrics.stage.labels("store").observe(time.perf_counter() - began)
    log.info(
        "completed",
        extra={
            "action": "completed",
            "jobs": len(jobs),
            "audio_seconds": transcript.duration,
            "processing_seconds": transcript.processing_seconds,
        },
    )
    forget(service, jobs)
    return "completed"


def fail(service: Service, claim: Claim, error: ServiceError) -> str:
    jobs = commit(service, lambda: service.store.fail(claim, error))
    if jobs is None:
        return "lost"
    log.info("failed", extra={"action": "failed", "code": error.code})
    count_error(service, error)
    forget(service, jobs)
    return "failed"


def retry(service: Service, claim: Claim) -> str:
    """The engine failed: another attempt, here or elsewhere, unless they are used up."""
    error = EngineFailure()
    reply = commit(service, lambda: service.store.retry(claim, error))
    outcome, jobs = reply or ("lost", [])
    if outcome == "failed":
        count_error(service, error)
        forget(service, jobs)
    return "released" if outcome == "requeued" else outcome


def interrupted(service: Service, claim: Claim, reason: str) -> str:
    log.info("stopped", extra={"action": f"stopped_{reason}"})
    return hand_back(service, claim) if reason == "drain" else reason


def hand_back(service: Service, claim: Claim) -> str:
    """Gives the claim back without blame; with an outage it ends by its lease instead."""
    outcome, jobs = commit(service, lambda: service.store.hand_back(claim)) or ("lost", [])
    forget(service, jobs)
    return "released" if outcome == "requeued" else outcome


def commit(
    service: Service,
    write: Callable[[], Reply | None],
    on_outage: Callable[[], None] = lambda: None,
) -> Reply | None:
    """Writes the end of a run, again and again while the store is away. None: it was not written,
    because the claim was lost or the store stayed away."""
    deadline = time.monotonic() + COMMIT_RETRY_SECONDS
    is_saved = False
    while True:
        try:
            return write()
        except StoreUnavailable as exc:
            log.warning("not committed yet: %s", exc, extra={"action": "commit_retry"})
            is_saved = is_saved or save(on_outage)
            if time.monotonic() > deadline or service.draining.wait(COMMIT_PAUSE_SECONDS):
                return None


def save(on_outage: Callable[[], None]) -> bool:
    """A disk that is full, too, is no reason to stop trying."""
    try:
        on_outage()
    except OSError:
        log.exception("the work could not be saved", extra={"action": "spool_failed"})
        return False
    return True


def forget(service: Service, jobs: list[str]) -> None:
    """The jobs are over: their uploads go, as soon as the store has that on its disk."""
    service.reaper.remove_later(jobs)


def count_error(service: Service, error: ServiceError) -> None:
    service.metrics.errors.labels(
        error.code if error.code in JOB_ERRORS else "internal_error"
    ).inc()
