"""Both sides of the job store, on the server of the test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from api.store import JobStore
from shared.broker import celery_app
from shared.settings import Settings
from worker.store import WorkerStore


@pytest_asyncio.fixture
async def store(settings: Settings) -> AsyncIterator[JobStore]:
    store = JobStore(settings, celery_app(settings.redis_url.get_secret_value()))
    yield store
    await store.close()


@pytest.fixture
def worker(settings: Settings) -> Iterator[WorkerStore]:
    store = WorkerStore(settings, celery_app(settings.redis_url.get_secret_value()), "worker-1")
    yield store
    store.close()
