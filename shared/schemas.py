"""What travels: the transcript that a worker writes, and the answers that the API gives."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from shared.job_options import Priority
from shared.jobs import JobStatus

Metadata = Annotated[
    dict[str, Any], Field(description="The caller's own, as it was submitted; `{}` if it was not.")
]


class Word(BaseModel):
    start: float = Field(description="Seconds from the beginning of the recording.")
    end: float
    word: str = Field(description="With the space that precedes it, as Whisper writes it.")
    probability: float = Field(description="0 to 1.")


WarningCode = Literal[
    "no_speech",
    "truncated_media",
    "low_language_confidence",
    "possible_repetition",
    "possible_hallucination",
]


class Segment(BaseModel):
    id: int = Field(description="Counted from 0.")
    seek: int = Field(
        0,
        description="Where its window begins: hundredths of a second of what the model was given.",
    )
    start: float = Field(description="Seconds from the beginning of the recording.")
    end: float
    text: str
    tokens: list[int] = Field(default=[], description="What the model wrote, times included.")
    avg_logprob: float = Field(description="Mean log probability of the tokens.")
    compression_ratio: float = Field(description="High values mean repeated text.")
    no_speech_prob: float = Field(description="0 to 1.")
    temperature: float = Field(description="The temperature that gave this text.")
    words: list[Word] | None = Field(None, description="Only with word_timestamps.")
    warnings: list[WarningCode] = Field(default=[], description="Codes of what makes it doubtful.")


class TranscriptWarning(BaseModel):
    code: WarningCode
    message: str


class Transcript(BaseModel):
    """The result of a transcription, stored as rendered JSON and returned untouched."""

    text: str
    language: str = Field(description="Code, as `en`.")
    language_probability: float = Field(description="0 to 1; 1 when the caller gave the language.")
    duration: float = Field(description="Seconds of audio.")
    duration_after_vad: float = Field(description="Seconds of audio that the model was given.")
    segments: list[Segment]
    task: str
    model: str
    processing_seconds: float = Field(description="What the worker spent on it.")
    warnings: list[TranscriptWarning] = []


class Links(BaseModel):
    status: str
    result: str
    events: str
    cancel: str


class BatchLinks(BaseModel):
    status: str
    jobs: str
    cancel: str


class JobAccepted(BaseModel):
    """202 of POST /transcribe."""

    job_id: str
    status: JobStatus
    message: str
    deduplicated: bool = Field(
        description="True when the same file with the same options was already done or under way."
    )
    metadata: Metadata
    priority: Priority
    links: Links
    is_replayed: bool = Field(default=False, exclude=True)  # shown as a header


class Failure(BaseModel):
    code: str
    message: str


class JobView(BaseModel):
    """GET /status/{job_id}."""

    model_config = ConfigDict(extra="forbid")

    job_id: str
    status: JobStatus
    progress: float = Field(description="Share of the audio that is transcribed, 0 to 1.")
    queue_position: int | None = Field(None, description="1 is next; only while queued.")
    estimated_wait_seconds: float | None = Field(
        None, description="Until it starts, roughly; only while queued, and once it can be known."
    )
    deduplicated: bool
    metadata: Metadata
    priority: Priority
    attempts: int = Field(description="How often a worker began it.")
    duration: float | None = Field(None, description="Seconds of audio, once known.")
    batch_id: str | None = Field(None, description="The batch that it came with.")
    submitted_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    expires_at: datetime | None = Field(None, description="When the result goes.")
    queue_seconds: float | None = Field(None, description="From submission to its start.")
    processing_seconds: float | None = Field(None, description="From its start to its end.")
    error: Failure | None = None
    links: Links


class JobPage(BaseModel):
    """GET /jobs."""

    jobs: list[JobView] = Field(description="The newest first; may be fewer than asked for.")
    next_cursor: str | None = Field(
        description="Send it as `cursor` for the next page; null after the last."
    )


class JobResult(Transcript):
    """GET /result/{job_id}, format json."""

    job_id: str
    status: JobStatus
    metadata: Metadata


class VerboseWord(Word):
    word: str = Field(description="Without spaces around it.")


class DurationUsage(BaseModel):
    type: Literal["duration"] = "duration"
    seconds: int = Field(description="Duration, rounded up.")


class VerboseTranscript(Transcript):
    """GET /result/{job_id}, format verbose_json: as OpenAI has it, with our own fields besides."""

    language: str = Field(description="Name, as `english`.")
    words: list[VerboseWord] | None = Field(None, description="Only with word_timestamps.")
    usage: DurationUsage


class JobPartial(BaseModel):
    """GET /jobs/{job_id}/partial."""

    job_id: str
    status: JobStatus
    metadata: Metadata
    progress: float = Field(description="Share of the audio that is transcribed, 0 to 1.")
    text: str = Field(description="The beginning, as far as it is done without a gap.")
    segments: list[Segment]


class JobEnded(BaseModel):
    """DELETE /jobs/{job_id}, POST /jobs/{job_id}/cancel."""

    job_id: str
    status: str = Field(description="cancelled: it was unfinished; deleted: its result is erased.")
    message: str
    metadata: Metadata


class BatchEntry(BaseModel):
    """What became of one file: a job, or an error."""

    file: int = Field(description="Which of the files that were sent, counted from 0.")
    job: JobAccepted | None = None
    error: Failure | None = None


class BatchAccepted(BaseModel):
    """202 of POST /batches."""

    batch_id: str
    accepted: int = Field(description="How many of the files have a job.")
    refused: int = Field(description="How many have an error.")
    jobs: list[BatchEntry] = Field(description="In the order of the files.")
    links: BatchLinks


class BatchView(BaseModel):
    """GET /batches/{batch_id}."""

    batch_id: str
    is_done: bool = Field(description="All of its jobs have ended.")
    counts: dict[JobStatus, int] = Field(description="How many of its jobs have each status.")
    jobs: list[JobView] = Field(
        description="In the order of the files; expired and erased ones are not in it."
    )


class BatchEnded(BaseModel):
    """DELETE /batches/{batch_id}."""

    batch_id: str
    jobs: list[JobEnded] = Field(description="In the order of the files.")


class WebhookAttempt(BaseModel):
    number: int = Field(description="Counted from 1.")
    at: datetime
    status_code: int | None = Field(None, description="What the receiver answered, if it did.")
    error: str | None = Field(None, description="Why it was not delivered; null where it was.")
    seconds: float | None = Field(None, description="How long it took.")


class JobWebhook(BaseModel):
    """GET /jobs/{job_id}/webhook."""

    job_id: str
    webhook_id: str = Field(description="The header `webhook-id` of every attempt.")
    receiver: str = Field(description="Scheme and host of the webhook_url.")
    state: str = Field(description="pending, delivered or failed.")
    attempts: list[WebhookAttempt] = Field(description="The latest, the oldest of them first.")
    next_attempt_at: datetime | None = Field(
        None, description="While pending, and once the job has ended."
    )


class EndedJob(BaseModel):
    """What a webhook tells of a job. The transcript is fetched."""

    job_id: str
    status: JobStatus
    metadata: Metadata
    duration: float | None = Field(description="Seconds of audio; null where it is not known.")
    error: Failure | None = Field(description="Of a failed job.")
    submitted_at: datetime
    finished_at: datetime | None
    expires_at: datetime | None = Field(description="When the result goes.")
    links: Links


class WebhookEvent(BaseModel):
    """The body of a webhook; the same for every attempt."""

    type: str = Field(description="transcription.completed, .failed or .cancelled.")
    timestamp: datetime | None = Field(description="When the job ended.")
    data: EndedJob


class FieldProblem(BaseModel):
    field: str
    message: str


class Problem(BaseModel):
    """Every error, as application/problem+json (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str = Field(description="One sentence that says what to do.")
    code: str = Field(description="Stable; switch on this.")
    request_id: str
    errors: list[FieldProblem] = []
