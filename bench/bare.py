"""`python -m bench.bare PORT`: the least that keeps clients waiting, on the same server program: an
ASGI application without a framework. `/events` and `/status` are the two kinds of wait, `/count`
says how many there are, and `/end` ends them."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import uvicorn

from api.__main__ import raise_file_limit

waiting: set[asyncio.Future[None]] = set()


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": message["type"] + ".complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    body = b"event: completed\ndata: {}\n\n"
    start = {"type": "http.response.start", "status": 200, "headers": []}
    if scope["path"] == "/count":
        body = str(len(waiting)).encode()
    elif scope["path"] == "/end":
        for each in waiting:
            each.set_result(None)
        waiting.clear()
    else:
        if scope["path"] == "/events":
            await send(start)
            await send({"type": "http.response.body", "body": b":\n\n", "more_body": True})
        waiting.add(mine := asyncio.get_running_loop().create_future())
        await mine
    if scope["path"] != "/events":
        await send(start)
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    raise_file_limit()
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", backlog=4096)
