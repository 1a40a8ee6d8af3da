"""Every metric: name, labels, buckets. Base units, closed label sets, never an id.

A process that runs under several API processes (WORKERS > 1) counts in files below
PROMETHEUS_MULTIPROC_DIR, which api/monitoring.py adds up at each scrape.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

_HTTP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_LONG_BUCKETS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_SIZE_BUCKETS = tuple(
    kib * 1024 for kib in (64, 256, 1024, 5120, 10_240, 25_600, 51_200, 102_400, 256_000, 512_000)
)
_AUDIO_BUCKETS = (5, 15, 30, 60, 180, 300, 600, 1800, 3600, 7200, 14_400)
_RTF_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 5)

REJECTIONS = {
    # code of the error -> reason
    "file_too_large": "too_large",
    "unsupported_media": "unsupported_media",
    "empty_file": "empty",
    "missing_file": "invalid",
    "malformed_upload": "invalid",
    "malformed_body": "invalid",
    "upload_too_slow": "invalid",
    "batch_too_large": "too_large",
    "idempotency_conflict": "invalid",
    "invalid_field": "invalid",
    "url_not_allowed": "url",
    "url_unreachable": "url",
    "url_status": "url",
    "url_too_slow": "url",
    "store_unavailable": "unavailable",
    "store_full": "unavailable",
    "storage_full": "unavailable",
    "unavailable": "unavailable",
    "queue_full": "queue_full",
    "too_many_fetches": "unavailable",
    "unauthorized": "unauthorized",
    "forbidden": "unauthorized",
    "rate_limited": "limit",
    "too_many_jobs": "limit",
    "audio_minutes_used": "limit",
}
FETCH_RESULTS = (
    "fetched",
    "url_not_allowed",
    "url_unreachable",
    "url_status",
    "url_too_slow",
    "other",
)
WEBHOOK_RESULTS = ("delivered", "retried", "failed")
OUTCOMES = {"new": "miss", "joined": "joined", "hit": "hit"}
JOB_ERRORS = (
    "unreadable_media",
    "no_audio_stream",
    "truncated_media",
    "audio_too_long",
    "no_audio_samples",
    "worker_lost",
    "input_missing",
    "engine_failure",
    "time_limit",
    "handed_back_too_often",
    "internal_error",
)
WAITER_KINDS = ("status", "events", "openai")
STAGES = ("decode", "vad", "transcribe", "store")
CLEANED = ("upload", "abandoned_upload", "transcript", "part")


def build_info(registry: CollectorRegistry = REGISTRY) -> None:
    """whisper_build_info: 1, with what runs here in its labels."""
    labels = {"version": installed("faster-whisper-api"), "python": platform.python_version()}
    labels["ctranslate2"] = installed("ctranslate2")
    Gauge(
        "whisper_build_info",
        "What this process runs; always 1",
        list(labels),
        registry=registry,
        multiprocess_mode="mostrecent",
    ).labels(**labels).set(1)


def installed(package: str) -> str:
    """The version of an installed package; this project's own when it is run from its folder."""
    try:
        return version(package)
    except PackageNotFoundError:
        return VERSION if package == "faster-whisper-api" else "none"


VERSION = "0.1.0"


class ApiMetrics:
    """What an API process counts. What it reads from Redis is in api/monitoring.py."""

    def __init__(self, registry: CollectorRegistry = REGISTRY):
        self.http_requests = Counter(
            "http_requests",
            "Requests answered",
            ["method", "route", "status"],
            registry=registry,
        )
        self.http_duration = Histogram(
            "http_request_duration_seconds",
            "From the request's first byte to the end of its answer",
            ["method", "route"],
            buckets=_HTTP_BUCKETS,
            registry=registry,
        )
        self.http_in_progress = Gauge(
            "http_requests_in_progress",
            "Requests being answered",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.submitted = Counter(
            "whisper_jobs_submitted",
            "Jobs accepted",
            ["endpoint", "model"],
            registry=registry,
        )
        self.rejected = Counter(
            "whisper_jobs_rejected", "Submissions refused", ["reason"], registry=registry
        )
        self.cache = Counter(
            "whisper_cache_requests",
            "Accepted jobs by what was found: hit (done before), joined (under way), miss",
            ["result"],
            registry=registry,
        )
        self.upload_size = Histogram(
            "whisper_upload_size_bytes",
            "Accepted uploads",
            buckets=_SIZE_BUCKETS,
            registry=registry,
        )
        self.waiters = Gauge(
            "whisper_waiters",
            "Requests that wait for a job: status (GET /status?wait=), events (event streams), "
            "openai (/v1/audio)",
            ["kind"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        for kind in WAITER_KINDS:
            self.waiters.labels(kind)
        self.webhooks = Counter(
            "whisper_webhook_deliveries",
            "Attempts to tell a webhook: delivered, to be tried again (retried), given up (failed)",
            ["result"],
            registry=registry,
        )
        self.fetches = Counter(
            "whisper_fetches",
            "Recordings fetched from a url=, and why others were not",
            ["result"],
            registry=registry,
        )
        for result in FETCH_RESULTS:
            self.fetches.labels(result)
        for result in WEBHOOK_RESULTS:
            self.webhooks.labels(result)
        for reason in set(REJECTIONS.values()):
            self.rejected.labels(reason)
        for result in OUTCOMES.values():
            self.cache.labels(result)


class WorkerMetrics:
    """What a worker process counts."""

    def __init__(self, model: str, device: str, registry: CollectorRegistry = REGISTRY):
        labels = {"model": model, "device": device}
        self.jobs = Counter(
            "whisper_jobs",
            "Transcriptions that ended here",
            ["status", "model"],
            registry=registry,
        )
        self.errors = Counter(
            "whisper_job_errors", "Transcriptions that failed here", ["code"], registry=registry
        )
        self.active = Gauge("whisper_jobs_active", "Transcriptions running now", registry=registry)
        self.queue_wait = Histogram(
            "whisper_job_queue_wait_seconds",
            "From submission to its claim",
            buckets=_LONG_BUCKETS,
            registry=registry,
        )
        self.duration = Histogram(
            "whisper_job_duration_seconds",
            "From claim to commit",
            list(labels),
            buckets=_LONG_BUCKETS,
            registry=registry,
        ).labels(**labels)
        self.stage = Histogram(
            "whisper_job_stage_duration_seconds",
            "Time in one stage of a transcription",
            ["stage"],
            buckets=_LONG_BUCKETS,
            registry=registry,
        )
        self.audio_seconds = Counter(
            "whisper_audio_seconds", "Audio transcribed", list(labels), registry=registry
        ).labels(**labels)
        self.processing_seconds = Counter(
            "whisper_processing_seconds",
            "Time spent on that audio; over whisper_audio_seconds this is the real-time factor",
            list(labels),
            registry=registry,
        ).labels(**labels)
        self.rtf = Histogram(
            "whisper_job_rtf",
            "Processing time / audio duration; below 1 is faster than real time",
            ["model"],
            buckets=_RTF_BUCKETS,
            registry=registry,
        ).labels(model)
        self.audio_duration = Histogram(
            "whisper_audio_duration_seconds",
            "Length of recordings",
            buckets=_AUDIO_BUCKETS,
            registry=registry,
        )
        self.language = Counter(
            "whisper_detected_language", "Recordings by language", ["language"], registry=registry
        )
        self.slots = Gauge(
            "whisper_worker_slots", "Transcriptions this worker runs at a time", registry=registry
        )
        self.busy_seconds = Counter(
            "whisper_worker_busy_seconds", "Time that slots were busy, summed", registry=registry
        )
        self.model_load_seconds = Gauge(
            "whisper_model_load_seconds",
            "Load and warm-up of the model",
            list(labels),
            registry=registry,
        ).labels(**labels)
        self.model_loaded = Gauge(
            "whisper_model_loaded",
            "1 once the model is warm",
            [*labels, "compute_type"],
            registry=registry,
        )
        self.heartbeat = Gauge(
            "whisper_worker_heartbeat_timestamp_seconds",
            "When this worker last renewed its heartbeat in the job store",
            registry=registry,
        )
        self.cleaned = Counter(
            "whisper_cleanup_removed", "What the reaper took away", ["kind"], registry=registry
        )
        for status in ("completed", "failed", "cancelled", "lost", "released"):
            self.jobs.labels(status, model)
        for code in JOB_ERRORS:
            self.errors.labels(code)
        for stage in STAGES:
            self.stage.labels(stage)
        for kind in CLEANED:
            self.cleaned.labels(kind)
