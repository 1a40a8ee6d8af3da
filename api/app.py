"""The API's composition root: builds what requests use, and lists middleware and routers."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from api import docs, errors, jobs, monitoring, transcriptions
from api.dependencies import State
from api.middleware import Linger, Observe
from api.store import JobStore
from shared import logs, metrics
from shared.broker import celery_app
from shared.settings import Settings, load_settings
from shared.storage import Storage

log = logging.getLogger(__name__)

DESCRIPTION = """Transcribes audio on your own machines: submit a recording, ask for its status, \
get its transcript. Every error is `application/problem+json` with a stable `code`."""


def create_app(settings: Settings | None = None) -> FastAPI:
    """The ASGI application; `uvicorn --factory api.app:create_app` calls it without arguments."""
    settings = settings or load_settings()
    logs.configure(settings.log_level)
    counted = metrics.ApiMetrics()
    metrics.build_info()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        celery = celery_app(settings.redis_url.get_secret_value())
        store = JobStore(settings, celery)
        app.state.service = State(settings, store, Storage(settings.data_dir), counted)
        log.info("api started", extra={"action": "api_started"})
        try:
            yield
        finally:
            await store.close()
            log.info("api stopped", extra={"action": "api_stopped"})

    app = FastAPI(
        title="Faster Whisper API",
        version=metrics.VERSION,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Observe, metrics=counted)
    app.add_middleware(Linger)
    errors.install(app)
    app.include_router(transcriptions.router)
    app.include_router(jobs.router)
    app.include_router(monitoring.router)
    app.include_router(docs.router)
    app.mount("/static", StaticFiles(directory=docs.STATIC), name="static")
    return app
