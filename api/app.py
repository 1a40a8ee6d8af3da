"""The API's composition root: builds what requests use, and lists middleware and routers."""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from fastapi.middleware.cors import CORSMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from api import (
    batches,
    digests,
    docs,
    errors,
    events,
    jobs,
    lists,
    monitoring,
    retry,
    status,
    transcriptions,
    webhooks,
)
from api.access import Access
from api.admission import Admission
from api.bare import Shortcut
from api.deliveries import DeliveryStore
from api.dependencies import State
from api.egress import Egress
from api.fetch import Fetcher
from api.hub import Hub
from api.key_store import KeyStore
from api.middleware import Linger, Observe
from api.notices import lone_connection
from api.openai import audio, models
from api.segments import Pages
from api.sender import Sender
from api.serve import DRAIN
from api.signing import signer
from api.store import JobStore, connect
from shared import logs, metrics
from shared.broker import celery_app
from shared.destinations import Destinations
from shared.settings import Auth, Settings, load_settings, parse_origins
from shared.storage import Storage

log = logging.getLogger(__name__)

# How seldom Python looks for garbage. A look at all that lives takes 0.2 s when 5,000 clients wait,
# and would come several times while they are told of an end.
GC_THRESHOLD = (10_000, 10, 10)

DESCRIPTION = """Transcribes audio on your own machines: submit a recording, ask for its status, \
get its transcript. Every error is `application/problem+json` with a stable `code`."""


class Api(FastAPI):
    """Without the layers that FastAPI puts around all middleware: Observe answers whatever goes
    wrong, and each layer costs every open request memory."""

    def build_middleware_stack(self) -> ASGIApp:
        app: ASGIApp = AsyncExitStackMiddleware(self.router)
        app = ExceptionMiddleware(app, handlers=self.exception_handlers)
        for middleware, args, options in reversed(self.user_middleware):
            app = middleware(app, *args, **options)
        return app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        if self.middleware_stack is None:
            self.middleware_stack = self.build_middleware_stack()
        await self.middleware_stack(scope, receive, send)


def create_app(settings: Settings | None = None) -> FastAPI:
    """The ASGI application; `uvicorn --factory api.app:create_app` calls it without arguments."""
    settings = settings or load_settings()
    logs.configure(settings.log_level)
    counted = metrics.ApiMetrics()
    metrics.build_info()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        gc.set_threshold(*GC_THRESHOLD)
        celery = celery_app(settings.redis_url.get_secret_value())
        store = JobStore(settings, celery)
        storage = Storage(settings.data_dir)
        admission = Admission(settings, store, storage)
        keys = KeyStore(connect(settings))
        hub = Hub(store, lambda: lone_connection(settings), settings.max_waiters, counted.waiters)
        hub.start()
        destinations = Destinations(settings.egress_allow)
        egress, egress_of_webhooks = Egress(destinations), Egress(destinations)
        fetcher = Fetcher(settings, egress, storage, admission, counted)
        deliveries = DeliveryStore(settings, connect(settings))
        app.state.service = State(
            settings,
            store,
            hub,
            Pages(store),
            keys,
            storage,
            admission,
            egress,
            fetcher,
            deliveries,
            counted,
        )
        sender = Sender(settings, deliveries, egress_of_webhooks, signer(settings), counted)
        sender.start()
        log.info("api started", extra={"action": "api_started", "auth": settings.auth})
        try:
            yield {DRAIN: hub.drain}
        finally:
            await hub.close()
            await sender.stop()
            egress.close()
            egress_of_webhooks.close()
            await deliveries.close()
            await keys.close()
            await store.close()
            log.info("api stopped", extra={"action": "api_stopped"})

    app = Api(
        title="Faster Whisper API",
        version=metrics.VERSION,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    document = functools.cache(lambda: docs.openapi(app, settings.auth))
    app.openapi = document  # type: ignore[method-assign]
    app.add_middleware(
        Shortcut, routes=[*status.router.routes, *events.router.routes, *audio.router.routes]
    )
    if settings.auth is Auth.KEYS:
        app.add_middleware(Access)
    if origins := parse_origins(settings.cors_origins):
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=[
                "Authorization",
                "Idempotency-Key",
                "If-None-Match",
                "Last-Event-ID",
                "X-API-Key",
                "X-Request-ID",
                *audio.CLIENTS_HEADERS,
            ],
            expose_headers=[
                "ETag",
                "Idempotent-Replayed",
                "Location",
                "Retry-After",
                "X-Request-ID",
                *audio.HEADERS,
            ],
        )
    app.add_middleware(Observe, metrics=counted)
    app.add_middleware(Linger)
    errors.install(app)
    app.include_router(transcriptions.router)
    app.include_router(digests.router)
    app.include_router(batches.router)
    app.include_router(lists.router)
    app.include_router(status.router)
    app.include_router(events.router)
    app.include_router(jobs.router)
    app.include_router(retry.router)
    app.include_router(audio.router)
    app.include_router(models.router)
    app.include_router(webhooks.router)
    app.include_router(monitoring.router)
    app.include_router(docs.router)
    app.mount("/static", docs.WholeFiles(directory=docs.STATIC), name="static")
    return app
