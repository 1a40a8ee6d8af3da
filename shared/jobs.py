"""Jobs and transcriptions: the records, and the only table of the arrows between their states.

    submit            claim                    finish
  ---------> queued ---------> processing ---------------> completed
               ^  |              |  |  |
               |  | cancel       |  |  | finish (the file can't be transcribed), or attempts used up
               |  |              |  |  +-----------------> failed
               |  +-----------+  |  | cancel (by the last job that held it)
               |              |  |  +--------------------> cancelled
               |              +--|-----------------------> cancelled
               +-----------------+
                 release, replan (a worker hands it back), reap (its lease ended)

A long recording is split while it is processing: its parts go the same way (queued, processing,
completed), each by itself, and when the last one is done the transcription is claimed once more, to
be joined.

A transcription moves only in shared/lua/*.lua, whose scripts check the arrow and act in one step. A
job has no moves of its own: it shows its transcription's status until that ends, then keeps the
end for itself, so a later run of the same file can't change what a caller was told. One that failed
may be retried: submit forgets its end, and it enters again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from shared import keys
from shared.job_options import JobOptions


class JobStatus(StrEnum):
    QUEUED = "queued"  # accepted and durable, waits for a worker
    PROCESSING = "processing"  # claimed by a worker whose lease is alive
    COMPLETED = "completed"  # has a transcript
    FAILED = "failed"  # given up, with a code and a sentence
    CANCELLED = "cancelled"  # the caller gave it up

    @property
    def is_terminal(self) -> bool:
        return not ARROWS[self]


ARROWS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.PROCESSING, JobStatus.CANCELLED}),
    JobStatus.PROCESSING: frozenset(
        {JobStatus.QUEUED, JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED}
    ),
    JobStatus.COMPLETED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}


def instant(milliseconds: str | None) -> datetime | None:
    """The UTC time of a record's `_ms` field; None where the field is absent."""
    return datetime.fromtimestamp(int(milliseconds) / 1000, UTC) if milliseconds else None


@dataclass(frozen=True)
class Claim:
    """A worker's right to one unit of work (a transcription, or a part of a long one), for as long
    as its lease is renewed."""

    fingerprint: str  # of the transcription
    part: int | None  # its number; None: the whole transcription
    claim_id: str  # the fencing token: random, so that no other claim ever equals it
    checksum: str  # SHA-256 of the upload, hex
    options: str  # canonical JSON of TranscriptionOptions
    attempt: int  # at this unit, counted from 1
    queued_at: datetime
    holders: tuple[str, ...]  # ids of jobs whose folder may hold the upload
    plan: str = ""  # worker.engine.parts.Plan, JSON, once the recording runs in parts
    parts: int = 0

    @property
    def unit(self) -> str:
        """As the scripts name it: _common.lua."""
        return self.fingerprint if self.part is None else keys.part(self.fingerprint, self.part)

    @property
    def is_join(self) -> bool:
        """All its parts are done."""
        return self.part is None and self.parts > 0

    @classmethod
    def of(cls, claim_id: str, reply: list[Any]) -> Claim:
        """From the reply of claim.lua."""
        unit, fields, attempts, holders = reply
        fingerprint, _, number = unit.partition("#")
        record = pairs(fields)
        return cls(
            fingerprint=fingerprint,
            part=int(number) if number else None,
            claim_id=claim_id,
            checksum=record["checksum"],
            options=record["options"],
            attempt=int(attempts),
            queued_at=datetime.fromtimestamp(int(record["queued_us"]) / 1e6, UTC),
            holders=tuple(holders),
            plan=record.get("plan", ""),
            parts=int(record.get("parts", 0)),
        )


@dataclass(frozen=True, slots=True)
class Job:
    """One job as its caller sees it."""

    job_id: str
    fingerprint: str
    status: JobStatus
    outcome: str  # what submit did: new | joined | hit
    options: JobOptions
    batch_id: str | None
    batch_number: int  # which of the batch's files, counted from 0
    progress: float  # share of the audio that is transcribed, 0 to 1
    queue_position: int | None  # 1 is next; None unless queued
    attempts: int  # how often a worker began it
    parts: int  # of a long recording, while it runs in them
    parts_done: int
    duration: float | None  # seconds of audio, known once it has run
    submitted_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    expires_at: datetime | None  # when its result goes; None while it is unfinished
    is_expired: bool
    error_code: str
    error_message: str
    retries: int  # how often it failed and was retried

    @classmethod
    def of(cls, job_id: str, reply: list[Any]) -> Job:
        """From what seen_job() of _common.lua gives."""
        now_ms, job_fields, transcription_fields, rank, has_transcript = reply
        job = pairs(job_fields)
        # A job that has ended kept the facts of its own run.
        work = job if "status" in job else pairs(transcription_fields)
        status = JobStatus(work.get("status") or JobStatus.QUEUED)
        is_past = "expires_ms" in job and int(job["expires_ms"]) <= int(now_ms)
        is_gone = status is JobStatus.COMPLETED and not has_transcript
        parts = int(work.get("parts") or 0)
        return cls(
            job_id=job_id,
            fingerprint=job["fingerprint"],
            status=status,
            outcome=job["outcome"],
            options=JobOptions.of(job),
            batch_id=job.get("batch"),
            batch_number=int(job.get("batch_number", 0)),
            progress=1.0 if status is JobStatus.COMPLETED else _share(work.get("progress")),
            queue_position=int(rank) + 1 if status is JobStatus.QUEUED and int(rank) >= 0 else None,
            attempts=int(work.get("attempts") or 0),
            parts=parts,
            parts_done=parts - int(work.get("parts_left") or 0),
            duration=float(work["duration"]) if work.get("duration") else None,
            submitted_at=datetime.fromtimestamp(int(job["submitted_ms"]) / 1000, UTC),
            started_at=instant(work.get("started_ms")),
            finished_at=instant(job.get("finished_ms")),
            expires_at=instant(job.get("expires_ms")),
            is_expired=is_past or is_gone,
            error_code=job.get("error_code", ""),
            error_message=job.get("error_message", ""),
            retries=int(job.get("retries", 0)),
        )

    @property
    def facts(self) -> tuple[object, ...]:
        """What changes in the course of its life, but for its place in the queue: that changes with
        other jobs."""
        return (
            str(self.status),
            self.progress,
            self.attempts,
            self.parts_done,
            self.started_at,
            self.finished_at,
        )


def _share(progress: str | None) -> float:
    """0 to 1: sums of parts are not exact."""
    return min(1.0, max(0.0, round(float(progress or 0), 4)))


def pairs(flat: list[str]) -> Mapping[str, str]:
    """A Redis hash as a script returns it (name, value, name, value...), as a mapping."""
    return dict(zip(flat[::2], flat[1::2], strict=True))
