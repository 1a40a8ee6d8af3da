"""Endpoints that FastAPI documents and does not serve: those that very many requests wait in. What
it builds around an endpoint costs each open request more memory than all that we keep of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, cast

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import service_error
from shared.errors import ServiceError

Endpoint = Callable[[Request], Awaitable[ASGIApp]]


class Bare(APIRoute):
    """Its endpoint gets the request as it is, and returns a response. What FastAPI would read from
    a signature is said in `response_model`, `responses` and `openapi_extra`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return cast("Callable[[Request], Coroutine[Any, Any, Response]]", self.endpoint)


class Shortcut:
    """Middleware, the innermost one: serves bare routes, and leaves the rest to FastAPI."""

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]):
        self.app = app
        self.routes = [route for route in routes if isinstance(route, Bare)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for route in self.routes:
            match, found = route.matches(scope)
            if match is Match.FULL:
                scope.update(found)
                break
        else:
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await cast("Endpoint", route.endpoint)(request)
            await response(scope, receive, send)
        except ServiceError as exc:
            answer = await service_error(request, exc)
            await answer(scope, receive, send)
