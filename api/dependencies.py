"""What a request may use: the things that the lifespan of api/app.py opens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from fastapi import Request

from api.admission import Admission
from api.deliveries import DeliveryStore
from api.egress import Egress
from api.fetch import Fetcher
from api.hub import Hub
from api.key_store import KeyStore
from api.protocol import CONNECTION, Connection
from api.segments import Pages
from api.store import JobStore
from shared.metrics import ApiMetrics
from shared.settings import Settings
from shared.storage import Storage


@dataclass(frozen=True)
class State:
    settings: Settings
    store: JobStore
    hub: Hub
    pages: Pages
    keys: KeyStore
    storage: Storage
    admission: Admission
    egress: Egress
    fetcher: Fetcher
    deliveries: DeliveryStore
    metrics: ApiMetrics


def state_of(request: Request) -> State:
    return cast("State", request.app.state.service)


def connection_of(request: Request) -> Connection:
    return cast("Connection", request.scope[CONNECTION])
