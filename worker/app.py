"""The worker's composition root: model first, then store, threads and Celery; and how it drains."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from contextlib import suppress
from typing import Any
from uuid import uuid4

from celery import Celery
from celery.signals import worker_shutting_down

from shared import metrics
from shared.broker import QUEUE_NAME, TASK_NAME, celery_app
from shared.errors import InvalidSettings, StoreUnavailable
from shared.settings import Settings, parse_cpus
from shared.storage import Storage
from worker import bells, health, tuning
from worker.engine import ffmpeg, model
from worker.engine.decode import Decoder
from worker.engine.engine import Engine
from worker.heartbeat import Heartbeat
from worker.reaper import Reaper
from worker.store import WorkerStore
from worker.tasks import Service, transcribe_next

log = logging.getLogger(__name__)

HANDBACK_SECONDS = 15  # after the drain: what a segment may take until it sees the stop


class TranscriptionFailed(Exception):
    """Makes Celery count the task as failed. The store knows why already."""


def run(settings: Settings) -> int:
    """Serves until told to stop. Returns the exit status. Raises ModelUnavailable,
    DecoderUnavailable, InvalidSettings."""
    if settings.worker_cpus:
        pin(parse_cpus(settings.worker_cpus))
    ffmpeg.require_version()
    decoder = Decoder()
    decoder.start()  # it is ready when the model is
    device = model.device_of(settings)
    room = tuning.capacity(settings, device, tuning.usable_cores())
    settings = settings.model_copy(update={"worker_slots": room.slots})
    loaded = model.load(settings, replicas=room.replicas, threads=room.threads)
    log.info(
        "model is warm",
        extra={
            "action": "model_warm",
            "model": loaded.name,
            "device": loaded.device,
            "compute_type": loaded.compute_type,
            "slots": room.slots,
            "replicas": room.replicas,
            "threads": room.threads,
            "seconds": round(loaded.load_seconds, 3),
        },
    )
    decoder.check()
    counted = metrics.WorkerMetrics(loaded.name, loaded.device)
    metrics.build_info()
    counted.slots.set(settings.worker_slots)
    counted.model_load_seconds.set(loaded.load_seconds)
    counted.model_loaded.labels(loaded.name, loaded.device, loaded.compute_type).set(1)

    worker_id = f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
    celery = celery_app(settings.redis_url.get_secret_value(), lease_seconds=settings.lease_seconds)
    store = WorkerStore(settings, celery, worker_id)
    storage = Storage(settings.data_dir)
    about = {
        "id": worker_id,
        "model": loaded.name,
        "device": loaded.device,
        "compute_type": loaded.compute_type,
        "slots": settings.worker_slots,
        "warm": True,
        "started_at": time.time(),
    }
    engine = Engine(
        loaded,
        replicas=room.replicas,
        max_audio_seconds=settings.max_audio_seconds,
        part_seconds=settings.part_seconds,
        voice_threads=room.replicas * room.threads,
        decoder=decoder,
    )
    heartbeat = Heartbeat(
        store,
        settings.heartbeat_seconds,
        settings.max_run_seconds,
        lambda busy: {**about, "busy": busy},
        lambda: engine.longest_call_seconds > settings.max_call_seconds,
        counted.heartbeat.set,
    )
    reaper = Reaper(store, storage, settings, lambda kind, n: counted.cleaned.labels(kind).inc(n))
    # One slot stays free for short recordings, where there is more than one.
    parts = threading.Semaphore(max(1, room.slots - 1))
    service = Service(settings, store, storage, engine, heartbeat, reaper, counted, parts)
    endpoint = health.serve(
        settings.worker_http_host,
        settings.worker_http_port,
        lambda: well(heartbeat, settings, about),
    )
    port = endpoint.server_address[1]
    log.info("endpoint", extra={"action": "endpoint_open", "port": port})

    heartbeat.start()
    reaper.start()
    try:
        return serve(celery, service)
    finally:
        # Leases are renewed until the last task is done.
        reaper.stop()
        heartbeat.stop()
        engine.close()
        endpoint.shutdown()
        with suppress(StoreUnavailable):  # then its report ends by itself
            store.retire()
        store.close()


def pin(cpus: frozenset[int]) -> None:
    """Keeps this process on some cores, with the threads that libraries have started on import.
    Raises InvalidSettings where that can't be."""
    try:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), cpus)
    except (AttributeError, OSError, ValueError) as exc:
        raise InvalidSettings(
            f"WORKER_CPUS={','.join(map(str, sorted(cpus)))} can't be had on this machine: {exc}"
        ) from exc


def serve(celery: Celery, service: Service) -> int:
    """Listens for bells until a signal says stop, then drains."""
    bells.install()

    @celery.task(name=TASK_NAME, ignore_result=True, throws=(TranscriptionFailed,))
    def transcribe(_hint: str) -> str:
        """The answer is for Flower's eyes: nothing else reads it."""
        ended = transcribe_next(service)
        if ended and ended.end == "failed":
            raise TranscriptionFailed(str(ended))
        return str(ended or "nothing to do")

    @worker_shutting_down.connect(weak=False)
    def drain(**_: Any) -> None:
        begin_drain(service)

    worker = celery.Worker(
        hostname=service.store.worker_id,
        pool="threads",
        concurrency=service.settings.worker_slots,
        queues=[QUEUE_NAME],
        loglevel=service.settings.log_level,
        without_gossip=True,
        without_mingle=True,
        quiet=True,
    )
    worker.start()
    return int(worker.exitcode or service.is_broken.is_set())


def begin_drain(service: Service) -> None:
    """No new claims from here on. What does not end in time is handed back; what does not even
    stop is left to its lease."""
    if service.draining.is_set():
        return
    service.draining.set()
    log.info("draining", extra={"action": "drain", "busy": service.heartbeat.busy})

    def expire() -> None:
        deadline = time.monotonic() + service.settings.drain_seconds
        while service.heartbeat.busy and time.monotonic() < deadline:
            time.sleep(0.1)
        service.heartbeat.interrupt_all("drain")
        time.sleep(HANDBACK_SECONDS)
        log.error("still busy after the drain: exiting", extra={"action": "drain_exceeded"})
        os._exit(1)

    threading.Thread(target=expire, name="drain", daemon=True).start()


def well(
    heartbeat: Heartbeat, settings: Settings, about: dict[str, Any]
) -> tuple[bool, dict[str, Any]]:
    """Well: the model is warm (it is loaded before this answers) and the heartbeat thread ticks. An
    absent store is no reason to restart a worker."""
    silence = time.monotonic() - heartbeat.last_tick
    is_well = heartbeat.is_alive() and silence < settings.lease_seconds
    words = {
        "status": "ok" if is_well else "stalled",
        "worker": about["id"],
        "model": about["model"],
        "busy": heartbeat.busy,
        "slots": settings.worker_slots,
        "seconds_since_tick": round(silence, 1),
    }
    return is_well, words
