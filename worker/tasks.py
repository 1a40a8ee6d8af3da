"""What a worker does when a bell rings: claim, transcribe, commit.

The bell's hint is ignored on purpose: the claim script hands out what should run next.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
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
    TimeLimit,
)
from shared.jobs import Claim
from shared.logs import context
from shared.metrics import JOB_ERRORS, WorkerMetrics
from shared.options import TranscriptionOptions
from shared.schemas import Transcript
from shared.settings import Settings
from shared.storage import Storage
from worker.engine.engine import Engine, StageTimer
from worker.engine.parts import Part, Plan, Result, join
from worker.heartbeat import Heartbeat, Interrupted, Run
from worker.reaper import MAX_BELLS, Reaper
from worker.store import WorkerStore

log = logging.getLogger(__name__)

COMMIT_RETRY_SECONDS = 600.0
COMMIT_PAUSE_SECONDS = 1.0
Reply = TypeVar("Reply")


ENDS_OF_JOBS = {"completed", "failed", "cancelled", "lost", "released"}


class PartMissing(Exception):
    """The file of a part, or what became of one, is not there."""


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
    parts: threading.Semaphore  # how many parts of long recordings may run here at a time
    last_attempts: threading.Semaphore = field(default_factory=threading.Semaphore)  # see claim.lua
    draining: threading.Event = field(default_factory=threading.Event)
    is_broken: threading.Event = field(default_factory=threading.Event)  # the model of this worker


@dataclass(frozen=True)
class Ended:
    """What became of a claimed transcription; Flower shows its text as the task's result."""

    end: str  # see `work`
    transcription: str  # see shared.broker.short
    attempt: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.transcription} {self.end} in {self.seconds:.1f} s, attempt {self.attempt}"


def transcribe_next(service: Service) -> Ended | None:
    """Runs what should run next; returns at once when there is nothing."""
    if service.draining.is_set() or service.is_broken.is_set():
        return None
    takes_parts = service.parts.acquire(blocking=False)
    takes_last = service.last_attempts.acquire(blocking=False)
    try:
        claim = service.store.claim(takes_parts=takes_parts, takes_last=takes_last)
        if takes_last and not (claim and is_last(service, claim)):
            service.last_attempts.release()
            takes_last = False
        return run_claimed(service, claim) if claim else None
    except StoreUnavailable:
        log.warning("no claim: the store is away", extra={"action": "claim_failed"})
        return None
    finally:
        if takes_parts:
            service.parts.release()
        if takes_last:
            service.last_attempts.release()
            ring(service, 1)  # for another one that was passed over


def is_last(service: Service, claim: Claim) -> bool:
    """It has failed before, and will not be tried again."""
    return 1 < claim.attempt >= service.settings.max_attempts


def run_claimed(service: Service, claim: Claim) -> Ended:
    context.set({"fingerprint": short(claim.fingerprint), "attempt": str(claim.attempt)})
    if claim.part is None and not claim.is_join:
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
    seconds = time.perf_counter() - began
    if end in ENDS_OF_JOBS:
        service.metrics.jobs.labels(end, service.engine.model.name).inc()
    if end in {"completed", "failed"}:
        service.metrics.duration.observe(seconds)
    return Ended(end, short(claim.fingerprint), claim.attempt, seconds)


def work(service: Service, claim: Claim, run: Run) -> str:
    """One claimed unit of work, to its end: one of ENDS_OF_JOBS; split, a long recording that goes
    on in parts; part, one of these is done."""
    log.info(
        "claimed",
        extra={"action": "claimed", "holders": len(claim.holders), "part": claim.part},
    )
    try:
        if claim.part is not None:
            return transcribe_part(service, claim, run)
        if claim.is_join:
            return complete(service, claim, joined(service, claim))
        holder = find_holder(service, claim)
        spooled = service.storage.spooled(holder)
        transcript = (
            Transcript.model_validate_json(spooled)
            if spooled
            else transcribe(service, claim, run, service.storage.audio(holder))
        )
        if transcript is None:
            return "split"
    except Interrupted as stop:
        return interrupted(service, claim, stop.reason)
    except (MediaError, InputMissing, TimeLimit) as exc:
        return fail(service, claim, exc)
    except FileNotFoundError:  # the job whose upload it was is cancelled; others may hold it
        return hand_back(service, claim)
    except PartMissing:
        return replan(service, claim)
    except StoreUnavailable:
        return "lost"
    except Exception:
        log.exception("the engine failed", extra={"action": "engine_failed"})
        if not is_model_well(service):
            return hand_back(service, claim)
        return retry(service, claim)
    return complete(service, claim, transcript, holder)


def is_model_well(service: Service) -> bool:
    """Else this worker takes no more, and ends: a new process gets a new model."""
    try:
        service.engine.check()
    except Exception:
        if not service.is_broken.is_set():
            service.is_broken.set()
            log.exception("the model is broken: exiting", extra={"action": "model_broken"})
            os.kill(os.getpid(), signal.SIGTERM)
        return False
    return True


def find_holder(service: Service, claim: Claim) -> str:
    """The id of a job whose upload is there. Raises InputMissing, StoreUnavailable."""
    found = service.storage.holder_with_audio(claim.holders)
    found = found or service.storage.holder_with_audio(service.store.holders(claim))
    if found is None:
        raise InputMissing
    return found


def transcribe(service: Service, claim: Claim, run: Run, audio: Path) -> Transcript | None:
    """None: the recording is long, and goes on in parts."""
    engine, options = service.engine, options_of(claim)
    stage = stage_of(service)
    recording = engine.prepare(audio, options, run.checkpoint, stage)
    planned = engine.plan(recording, options)
    if planned and split(service, claim, *planned):
        return None
    transcript = engine.hear(recording, options, run.checkpoint, stage)
    count_transcript(service, transcript)
    return transcript


def options_of(claim: Claim) -> TranscriptionOptions:
    return TranscriptionOptions.model_validate_json(claim.options)


def stage_of(service: Service) -> StageTimer:
    return lambda stage, seconds: service.metrics.stage.labels(stage).observe(seconds)


def split(service: Service, claim: Claim, plan: Plan, parts: list[Part]) -> bool:
    """Saves the parts for whichever workers will claim them. False: there is no room for them, so
    the recording is transcribed here. Raises StoreUnavailable when the claim is lost."""
    total = sum(part.seconds for part in parts)
    try:
        for number, part in enumerate(parts):
            service.storage.save_part(claim.fingerprint, number, part.pack())
    except OSError:
        log.exception("the parts could not be saved", extra={"action": "split_failed"})
        service.storage.remove_parts(claim.fingerprint)
        return False
    shares = [part.seconds / total for part in parts]
    reply = commit(service, lambda: service.store.split(claim, plan.model_dump_json(), shares))
    if reply != "ok":
        raise StoreUnavailable("The claim was lost before the recording was split")
    log.info("split", extra={"action": "split", "parts": len(parts)})
    ring(service, len(parts))
    return True


def transcribe_part(service: Service, claim: Claim, run: Run) -> str:
    assert claim.part is not None
    try:
        content = service.storage.part(claim.fingerprint, claim.part).read_bytes()
        part = Part.unpack(content)
    except (OSError, ValueError) as exc:
        raise PartMissing from exc
    plan = Plan.model_validate_json(claim.plan)
    result = service.engine.hear_part(
        part, plan, options_of(claim), run.checkpoint, stage_of(service)
    )
    content_of_result = result.model_dump_json(exclude_none=True)
    if commit(service, lambda: service.store.finish_part(claim, content_of_result)) != "ok":
        log.warning("not committed: the claim was lost", extra={"action": "commit_refused"})
        return "lost"
    log.info("part done", extra={"action": "part_done", "seconds": round(result.spent, 3)})
    ring(service, 1)  # for the next part, or for the join
    return "part"


def joined(service: Service, claim: Claim) -> Transcript:
    """What the parts gave, as one transcript."""
    results = service.store.part_results(claim)
    if not all(results):
        raise PartMissing
    transcript = join(
        Plan.model_validate_json(claim.plan),
        [Result.model_validate_json(result) for result in results if result],
        options_of(claim),
        service.engine.model.name,
    )
    count_transcript(service, transcript)
    return transcript


def ring(service: Service, times: int) -> None:
    """A bell that fails is no error: a reaper rings the missing ones."""
    with suppress(StoreUnavailable):
        service.store.ring(min(times, MAX_BELLS))


def count_transcript(service: Service, transcript: Transcript) -> None:
    metrics = service.metrics
    metrics.audio_seconds.inc(transcript.duration)
    metrics.processing_seconds.inc(transcript.processing_seconds)
    metrics.audio_duration.observe(transcript.duration)
    metrics.rtf.observe(transcript.processing_seconds / max(transcript.duration, 1e-9))
    metrics.language.labels(transcript.language).inc()


def complete(service: Service, claim: Claim, transcript: Transcript, *holder: str) -> str:
    """Commits the transcript. While the store is away it is kept beside its input (the upload of
    `holder`), so that whoever claims the transcription later finds it done."""
    content = transcript.model_dump_json(exclude_none=True).encode()
    began = time.perf_counter()
    jobs = commit(
        service,
        lambda: service.store.complete(
            claim, content, service.settings.model_key, transcript.duration
        ),
        on_outage=lambda: service.storage.spool([*holder, *claim.holders], content),
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
    if claim.parts:
        service.storage.remove_parts(claim.fingerprint)
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


def replan(service: Service, claim: Claim) -> str:
    """What the parts need is not there: the recording is decoded and cut again."""
    log.warning("a part is missing", extra={"action": "replanned", "part": claim.part})
    outcome, jobs = commit(service, lambda: service.store.replan(claim)) or ("lost", [])
    forget(service, jobs)
    ring(service, 1)
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
