"""GET /health, /stats, /metrics: what the service says of itself. Cheap, and never a broadcast to
workers: they report to the job store, and a dead one's report disappears by itself."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    generate_latest,
    multiprocess,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from api.dependencies import State, state_of
from api.errors import answers
from api.snapshot import Snapshot
from shared.broker import QUEUE_NAME
from shared.errors import StorageFull, StoreFull, StoreUnavailable
from shared.metrics import VERSION

router = APIRouter(tags=["monitoring"])

MULTIPROCESS_DIR = "PROMETHEUS_MULTIPROC_DIR"


@router.head("/health", include_in_schema=False)
@router.get(
    "/health",
    summary="Is the service well?",
    responses={503: {"description": "It is unavailable", "content": {"application/json": {}}}},
)
async def health(request: Request, response: Response) -> dict[str, Any]:
    """`ok`: jobs are accepted and a warm worker is there. `degraded`: jobs are accepted and safe,
    but no worker is warm. `unavailable` (503): the job store does not answer."""
    state = state_of(request)
    base = {"version": VERSION, "model": state.settings.model_size}
    try:
        snapshot = await state.store.snapshot()
    except StoreUnavailable:
        response.status_code = 503
        response.headers["Retry-After"] = "5"
        return {"status": "unavailable", **base, "redis": "unreachable"}
    return {
        "status": "ok" if snapshot.warm_workers else "degraded",
        **base,
        "redis": "ok",
        "workers": {
            "alive": len(snapshot.workers),
            "warm": snapshot.warm_workers,
            "slots": sum(int(worker["slots"]) for worker in snapshot.workers),
        },
        "queue": {"queued": snapshot.queued, "processing": snapshot.processing},
    }


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live", summary="Does the process answer?")
async def live() -> dict[str, str]:
    return {"status": "ok"}


@router.head("/health/ready", include_in_schema=False)
@router.get(
    "/health/ready",
    summary="Can this replica accept a job?",
    responses=answers(StoreUnavailable, StoreFull, StorageFull),
)
async def ready(request: Request) -> dict[str, str]:
    state = state_of(request)
    await state.store.admit()
    if state.storage.free_bytes() < state.settings.min_free_disk_bytes:
        raise StorageFull
    return {"status": "ok"}


@router.get(
    "/stats",
    summary="What happened, and what is under way",
    responses=answers(StoreUnavailable),
)
async def stats(request: Request) -> dict[str, Any]:
    """Counts run since the job store began; they outlive restarts of every process."""
    state = state_of(request)
    snapshot = await state.store.snapshot()
    count = snapshot.counters.get
    return {
        "queue": {
            "queued": snapshot.queued,
            "parts": snapshot.parts,
            "oldest_seconds": round(snapshot.oldest_queued_seconds, 3),
            "backlog_seconds": rounded(snapshot.backlog_seconds),
            "wait_seconds": rounded(snapshot.wait_seconds),
            "processing": snapshot.processing,
        },
        "jobs": {
            name: count(f"jobs_{name}", 0)
            for name in ("submitted", "completed", "failed", "cancelled")
        },
        "cache": {
            "misses": count("submit_new", 0),
            "joined": count("submit_joined", 0),
            "hits": count("submit_hit", 0),
            "transcript_bytes": count("transcript_bytes", 0),
            "evicted": count("transcripts_evicted", 0),
        },
        "transcriptions": {
            "completed": count("transcriptions_completed", 0),
            "failed": count("transcriptions_failed", 0),
            "handed_back": count("transcriptions_released", 0),
            "leases_expired": count("leases_expired", 0),
        },
        "workers": list(snapshot.workers),
        "model": state.settings.model_size,
    }


def rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


@router.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    state = state_of(request)
    try:
        snapshot = await state.store.snapshot()
    except StoreUnavailable:
        snapshot = None
    body = generate_latest(_registry()) + generate_latest(_store_registry(state, snapshot))
    return Response(body, media_type=CONTENT_TYPE_LATEST)


def _registry() -> CollectorRegistry:
    """This process's metrics; with several API processes, those of all of them together."""
    folder = os.environ.get(MULTIPROCESS_DIR)
    if not folder:
        return REGISTRY
    sweep_dead(Path(folder))
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return registry


def sweep_dead(folder: Path) -> None:
    """A killed process leaves its live gauges behind; uvicorn has no hook to clear them."""
    for path in folder.glob("gauge_live*_*.db"):
        match = re.search(r"_(\d+)\.db$", path.name)
        if match and not Path(f"/proc/{match[1]}").exists() and Path("/proc/self").exists():
            multiprocess.mark_process_dead(int(match[1]), str(folder))  # type: ignore[no-untyped-call]


class _FromStore:
    """Gauges that are read, not counted: every replica reports the same, so take max, not sum."""

    def __init__(self, snapshot: Snapshot | None, folder: Path):
        self.snapshot = snapshot
        self.folder = folder

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("whisper_store_up", "1 when the job store answered this scrape")
        up.add_metric([], 0 if self.snapshot is None else 1)
        yield up
        with suppress(OSError):  # a volume that is gone must not take the other metrics with it
            usage = shutil.disk_usage(self.folder)
            disk = GaugeMetricFamily(
                "whisper_storage_bytes", "The file system that uploads rest on", labels=["kind"]
            )
            disk.add_metric(["used"], usage.used)
            disk.add_metric(["free"], usage.free)
            yield disk
        if self.snapshot is None:
            return
        for name, text, value in (
            ("whisper_queue_depth", "Transcriptions that wait", self.snapshot.queued),
            (
                "whisper_queue_oldest_age_seconds",
                "Age of the transcription that has waited longest",
                self.snapshot.oldest_queued_seconds,
            ),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["queue"])
            gauge.add_metric([QUEUE_NAME], value)
            yield gauge
        yield GaugeMetricFamily(
            "whisper_queue_parts", "Parts of long recordings that wait", self.snapshot.parts
        )
        for name, text, seconds in (
            (
                "whisper_queue_backlog_seconds",
                "How long one slot would need for all that waits; absent while nobody knows",
                self.snapshot.backlog_seconds,
            ),
            (
                "whisper_queue_wait_seconds",
                "How long a job that comes now would wait at most; absent while nobody knows",
                self.snapshot.wait_seconds,
            ),
        ):
            if seconds is not None:
                yield GaugeMetricFamily(name, text, seconds)
        for name, text, value in (
            ("whisper_webhooks_pending", "Webhooks to be told", self.snapshot.webhooks),
            (
                "whisper_webhooks_oldest_age_seconds",
                "Since the end of the job whose webhook has waited longest",
                self.snapshot.oldest_webhook_seconds,
            ),
            (
                "whisper_webhooks_overdue_seconds",
                "How late the next attempt is",
                self.snapshot.overdue_webhook_seconds,
            ),
        ):
            yield GaugeMetricFamily(name, text, value)
        workers = GaugeMetricFamily(
            "whisper_workers", "Workers with a fresh heartbeat", labels=["state"]
        )
        workers.add_metric(["warm"], self.snapshot.warm_workers)
        workers.add_metric(["cold"], len(self.snapshot.workers) - self.snapshot.warm_workers)
        yield workers
        leased = GaugeMetricFamily("whisper_leases", "Transcriptions under a lease")
        leased.add_metric([], self.snapshot.processing)
        yield leased
        size = GaugeMetricFamily("whisper_transcript_bytes", "Transcripts kept in the job store")
        size.add_metric([], self.snapshot.counters.get("transcript_bytes", 0))
        yield size
        memory = GaugeMetricFamily(
            "whisper_store_memory_bytes",
            "Memory of the job store's server; max is 0 when it has no limit",
            labels=["kind"],
        )
        memory.add_metric(["used"], self.snapshot.memory_used_bytes)
        memory.add_metric(["max"], self.snapshot.memory_max_bytes)
        yield memory


def _store_registry(state: State, snapshot: Snapshot | None) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(_FromStore(snapshot, state.storage.root))
    return registry
