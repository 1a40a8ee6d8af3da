"""The API's composition root: builds what requests use, and lists middleware and routers."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.staticfiles import StaticFiles

from api import batches, digests, docs, errors, jobs, lists, monitoring, transcriptions, webhooks
from api.access import Access
from api.admission import Admission
from api.deliveries import DeliveryStore
from api.dependencies import State
from api.egress import Egress
from api.fetch import Fetcher
from api.key_store import KeyStore
from api.middleware import Linger, Observe
from api.sender import Sender
from api.signing import signer
from api.store import JobStore, connect
from shared import logs, metrics
from shared.broker import celery_app
from shared.destinations import Destinations
from shared.settings import Auth, Settings, load_settings, parse_origins
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
        storage = Storage(settings.data_dir)
        admission = Admission(settings, store, storage)
        keys = KeyStore(connect(settings))
        destinations = Destinations(settings.egress_allow)
        egress, egress_of_webhooks = Egress(destinations), Egress(destinations)
        fetcher = Fetcher(settings, egress, storage, admission, counted)
        deliveries = DeliveryStore(settings, connect(settings))
        app.state.service = State(
            settings, store, keys, storage, admission, egress, fetcher, deliveries, counted
        )
        sender = Sender(settings, deliveries, egress_of_webhooks, signer(settings), counted)
        sending = asyncio.create_task(sender.run())
        log.info("api started", extra={"action": "api_started", "auth": settings.auth})
        try:
            yield
        finally:
            sending.cancel()
            with suppress(asyncio.CancelledError):
                await sending
            await sender.stop()
            egress.close()
            egress_of_webhooks.close()
            await deliveries.close()
            await keys.close()
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
    document = functools.cache(lambda: docs.openapi(app, settings.auth))
    app.openapi = document  # type: ignore[method-assign]
    if settings.auth is Auth.KEYS:
        app.add_middleware(Access)
    if origins := parse_origins(settings.cors_origins):
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["Authorization", "Idempotency-Key", "X-API-Key", "X-Request-ID"],
            expose_headers=["Idempotent-Replayed", "Location", "Retry-After", "X-Request-ID"],
        )
    app.add_middleware(Observe, metrics=counted)
    app.add_middleware(Linger)
    errors.install(app)
    app.include_router(transcriptions.router)
    app.include_router(digests.router)
    app.include_router(batches.router)
    app.include_router(lists.router)
    app.include_router(jobs.router)
    app.include_router(webhooks.router)
    app.include_router(monitoring.router)
    app.include_router(docs.router)
    app.mount("/static", StaticFiles(directory=docs.STATIC), name="static")
    return app
