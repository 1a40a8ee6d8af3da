"""What the reaper removes, and what it must leave, when the store is not what it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import redis

from api.store import JobStore
from shared.broker import celery_app
from shared.settings import Settings
from shared.storage import Manifest, Storage
from tests.integration.test_job_store import complete, manifest
from worker import reaper as reaping
from worker.reaper import Reaper
from worker.store import WorkerStore


@pytest.fixture
def storage(settings: Settings) -> Storage:
    return Storage(settings.data_dir)


@pytest.fixture
def reaper(
    worker: WorkerStore, storage: Storage, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> Reaper:
    """One for which all is settled at once."""
    monkeypatch.setattr(reaping, "DURABLE_SECONDS", 0)
    monkeypatch.setattr(reaping, "UNSUBMITTED_SECONDS", -1)
    return Reaper(worker, storage, settings, lambda *_: None)


@pytest.fixture
def ended(
    settings: Settings, storage: Storage, worker: WorkerStore, reaper: Reaper
) -> Callable[[], object]:
    """An upload whose job was completed a moment ago."""

    async def make() -> Manifest:
        job = replace(manifest(settings), size_bytes=4)
        storage.begin(job.job_id).write_bytes(b"RIFF")
        storage.keep(job)
        store = JobStore(settings, celery_app(settings.redis_url.get_secret_value()))
        await store.submit(job)
        await store.close()
        done = complete(worker, settings, worker.claim())
        reaper.remove_later(done)
        return job

    return make


async def test_the_upload_of_a_completed_job_goes(ended, reaper, storage):
    job = await ended()
    reaper.remove_ended()
    assert not storage.folder(job.job_id).exists()


async def test_a_job_whose_end_the_store_has_lost_keeps_its_upload_and_runs_again(
    ended, reaper, storage, worker, raw
):
    """An emptied Redis, or one that lost its last second, right after the end."""
    job = await ended()
    raw.flushall()
    reaper.sweep()
    assert storage.audio(job.job_id).exists()
    assert worker.claim().holders == (job.job_id,)


async def test_while_the_store_is_away_no_upload_goes(ended, reaper, storage, raw, monkeypatch):
    job = await ended()

    def away(_: object) -> list[str]:
        raise redis.ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(reaper._store, "job_states", away)
        with pytest.raises(redis.ConnectionError):
            reaper.remove_ended()
    assert storage.folder(job.job_id).exists()
    reaper.remove_ended()
    assert not storage.folder(job.job_id).exists()
