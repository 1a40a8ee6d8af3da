#!/usr/bin/env python3
"""A client for Faster Whisper API in one file: copy it next to your code, `pip install httpx2`.

    from example_client import WhisperClient

    with WhisperClient("http://localhost") as client:
        result = client.transcribe_file("audio.mp3", vad_filter=True, language="en")
    print(result["text"], result["language"], result["duration"])

`AsyncWhisperClient` has the same methods, to be awaited. Options are the form fields of
POST /transcribe (the service lists them at /docs): booleans, numbers and text are sent as they are,
None is left out, a list of numbers (temperature=[0.0, 0.4]) becomes a comma list and a dict
(vad_parameters={"threshold": 0.6}) becomes JSON. All times are seconds.

What can go wrong, as one tree. A file that can't be read, or is empty, raises what `open` raises or
a ValueError, before anything is sent.

    WhisperError
    ├── ConnectionFailed        no usable answer: the service is away, or something else is there
    ├── RequestRejected         the service said no: status, code, detail, request_id, errors
    │   ├── RateLimited         429; retry_after
    │   ├── Unavailable         408 or 5xx; retry_after
    │   ├── NotFound            404: no such job
    │   └── Expired             410: the result was kept for its time and is gone
    ├── JobFailed               the file can't be transcribed: job_id, code
    ├── JobCancelled            somebody cancelled it: job_id
    └── JobTimeout              your deadline passed; the job goes on: wait(error.job_id) resumes

Connection errors and the statuses 408, 429, 500, 502, 503, 504 and 507 are tried again, at most
`max_retries` times, after the server's Retry-After or after 0.5, 1, 2... up to 8 s. A Retry-After
above 120 s is raised at once. Repeating an upload is safe: the service knows a file that it has, or
is at work on, by its content and options, and transcribes it once. A client that waits for a job
outlives a restart of the service: it asks on until the deadline, or for ten minutes without one.

Each upload is sent with an Idempotency-Key, so that one whose answer was lost makes no second job.
Yours, `idempotency_key="order-17"`, does so over restarts of your program, too. A file of 8 MiB or
more is asked for by its SHA-256 first (`ask_first`): one that the service knows is not sent at all.
`metadata={"order": 17}` comes back wherever the job is shown; `priority` is low, normal or high.

As a command: python example_client.py [--url URL] [--format srt] [-o language=en]... audio.mp3
The transcript goes to stdout. Exit status: 0 done, 1 the job failed or was cancelled, 2 wrong usage
or a request that the service refuses, 3 the service can't be reached or can't serve, 4 the deadline
passed. The environment's WHISPER_URL and WHISPER_API_KEY are the default address and the key.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import dataclasses
import email.utils
import functools
import hashlib
import io
import itertools
import json
import mimetypes
import numbers
import os
import queue
import random
import shutil
import sys
import tempfile
import threading
import time
import urllib.parse
import uuid
import weakref
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from typing import IO, Any, Literal, Self, TypeVar, overload

import httpx2

__all__ = [
    "AsyncWhisperClient",
    "ConnectionFailed",
    "Expired",
    "JobCancelled",
    "JobFailed",
    "JobTimeout",
    "NotFound",
    "RateLimited",
    "RequestRejected",
    "Unavailable",
    "WhisperClient",
    "WhisperError",
]

NOT_MODIFIED = 304
RETRIED_STATUSES = frozenset({408, 429, 500, 502, 503, 504, 507})
BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.5, 8.0
MAX_RETRY_AFTER_SECONDS = 120.0
POLL_SECONDS, MAX_POLL_SECONDS, POLL_GROWTH = 0.5, 5.0, 1.5
MAX_WAIT_SECONDS = 30.0  # that the service is asked to keep an answer back
TOO_MANY_WAITERS = "too_many_waiters"  # the service's code for: I can't do that now
OUTAGE_SECONDS = 600.0  # how long a job is asked after in vain when there is no deadline
CONNECT_SECONDS = 10.0
CHUNK_BYTES = 256 * 1024  # of the file, sent at once
MAX_KEY = 255
ASK_FIRST_BYTES = 8 * 1024 * 1024  # a file of this size is not sent before it is asked for

Source = str | os.PathLike[str] | IO[bytes]
Progress = Callable[[dict[str, Any]], None]
JsonFormat = Literal["json", "verbose_json"]
TextFormat = Literal["text", "srt", "vtt", "tsv"]
T = TypeVar("T")


# --- Errors. All arguments go to Exception, so that they survive pickling between processes. ------


class WhisperError(Exception):
    """Whatever a client raises on its own account."""


class ConnectionFailed(WhisperError):
    """No usable answer: nothing listens, the connection broke, or something else answered."""

    retry_after: float | None = None


class RequestRejected(WhisperError):
    """The service refused the request.

    status: HTTP status. code: stable, switch on this. detail: a sentence for people.
    errors: [{"field", "message"}] for wrong options. retry_after: seconds, where the service said.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        request_id: str = "",
        errors: Sequence[Mapping[str, str]] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(status, code, detail, request_id, errors, retry_after)
        self.status = status
        self.code = code
        self.detail = detail
        self.request_id = request_id
        self.errors = list(errors)
        self.retry_after = retry_after

    def __str__(self) -> str:
        request = f", request {self.request_id}" if self.request_id else ""
        return f"{self.detail} ({self.code}, HTTP {self.status}{request})"


class RateLimited(RequestRejected):
    """Too many requests; come back after `retry_after` seconds."""


class Unavailable(RequestRejected):
    """The service can't do it now; the same request may work after `retry_after` seconds."""


class NotFound(RequestRejected):
    """There is no such job (or no such address)."""


class Expired(RequestRejected):
    """The job's result is gone; submit the file again."""


class JobFailed(WhisperError):
    """The file could not be transcribed. code: stable, as `unreadable_media`."""

    def __init__(self, job_id: str, code: str, message: str = "") -> None:
        super().__init__(job_id, code, message)
        self.job_id = job_id
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"Job {self.job_id} failed: {self.message or self.code} ({self.code})"


class JobCancelled(WhisperError):
    """The job was cancelled, so it has no result."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return f"Job {self.job_id} was cancelled"


class JobTimeout(WhisperError):
    """The deadline passed. The job goes on and can be waited for again.

    job_id: None if the deadline passed before the upload had arrived.
    """

    def __init__(self, job_id: str | None) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        if self.job_id is None:
            return "The deadline passed before the upload had arrived"
        return f"Job {self.job_id} is still running after the deadline; it can be waited for again"


# --- The clients. The asynchronous one holds the logic, the other runs it in a thread. ------------


class WhisperClient:
    """Talks to the service. Safe to use from several threads, and inside a running event loop."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        timeout: float = 30.0,
        max_retries: int = 3,
    ) -> None:
        """`timeout`: how long one request may stand still, not how long a job may take.
        `max_retries`: after the first try. Raises ValueError for an address or key of no use."""
        self._make = functools.partial(AsyncWhisperClient, base_url, api_key, timeout, max_retries)
        self._lock = threading.Lock()
        self._start()

    def transcribe_file(
        self,
        file: Source,
        *,
        on_progress: Progress | None = None,
        deadline: float | None = None,
        poll_interval: float | None = None,
        idempotency_key: str | None = None,
        ask_first: bool | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Submits the file, waits for its job and returns the result: `text`, `language`,
        `duration`, `segments`...

        `file`: a path, or a file opened in binary mode, which is sent from its beginning.
        `on_progress`: called in this thread with each answer of `status`.
        `deadline`: for all of it; raises JobTimeout when it passes.
        `poll_interval`: between two questions. None: the service answers when there is something
        new; one that can't do that is asked as often as it advises.
        `idempotency_key`, `ask_first`: as in `submit`.
        Raises every error of the tree above. An error in `on_progress` ends the waiting, not the
        job.
        """
        return self._run(
            lambda client, report: client.transcribe_file(
                file,
                on_progress=report,
                deadline=deadline,
                poll_interval=poll_interval,
                idempotency_key=idempotency_key,
                ask_first=ask_first,
                **options,
            ),
            on_progress,
        )

    def submit(
        self,
        file: Source,
        *,
        idempotency_key: str | None = None,
        ask_first: bool | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Uploads the file and returns at once: `job_id`, `status`, `deduplicated`...

        `idempotency_key`: the same key with the same file and options is the same job; one of its
        own for each call when None. `ask_first`: ask by the file's SHA-256 whether the service
        knows it, and upload it only if not; None: if it has 8 MiB or more."""
        return self._run(
            lambda client, _: client.submit(
                file, idempotency_key=idempotency_key, ask_first=ask_first, **options
            )
        )

    def submit_batch(
        self, files: Sequence[Source], *, idempotency_key: str | None = None, **options: Any
    ) -> dict[str, Any]:
        """Uploads up to 100 files in one request, all with these options: `batch_id`, and `jobs`,
        which has a `job` or an `error` for each file, in their order."""
        return self._run(
            lambda client, _: client.submit_batch(files, idempotency_key=idempotency_key, **options)
        )

    def batch(self, batch_id: str) -> dict[str, Any]:
        """`is_done`, `counts` by status, and the status of each of its `jobs`."""
        return self._run(lambda client, _: client.batch(batch_id))

    def cancel_batch(self, batch_id: str) -> dict[str, Any]:
        """Cancels the batch's unfinished jobs; erases the finished ones."""
        return self._run(lambda client, _: client.cancel_batch(batch_id))

    def jobs(
        self, *, status: str | None = None, batch_id: str | None = None, most: int = 100
    ) -> list[dict[str, Any]]:
        """The status of your jobs, the newest first: `most` of them at most, from as many pages as
        that takes. Without API keys the service may refuse it, but for a batch."""
        return self._run(lambda client, _: client.jobs(status=status, batch_id=batch_id, most=most))

    def status(self, job_id: str) -> dict[str, Any]:
        """`status` (queued, processing, completed, failed, cancelled), `progress`,
        `queue_position`..."""
        return self._run(lambda client, _: client.status(job_id))

    def wait(
        self,
        job_id: str,
        *,
        on_progress: Progress | None = None,
        deadline: float | None = None,
        poll_interval: float | None = None,
    ) -> dict[str, Any]:
        """Waits until the job is completed and returns its status. Raises JobFailed, JobCancelled,
        JobTimeout; arguments as in `transcribe_file`."""
        return self._run(
            lambda client, report: client.wait(
                job_id, on_progress=report, deadline=deadline, poll_interval=poll_interval
            ),
            on_progress,
        )

    @overload
    def result(self, job_id: str, format: JsonFormat = "json") -> dict[str, Any]: ...
    @overload
    def result(self, job_id: str, format: TextFormat, **rules: Any) -> str: ...
    def result(
        self, job_id: str, format: JsonFormat | TextFormat = "json", **rules: Any
    ) -> dict[str, Any] | str:
        """The transcript of a completed job: a dict for json and verbose_json, else text.

        `rules`: of captions, for srt and vtt, as max_line_chars=42.
        Raises JobFailed, JobCancelled, Expired, NotFound, and RequestRejected with the code
        result_not_ready while the job is unfinished."""
        return self._run(lambda client, _: client.result(job_id, format, **rules))

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Cancels an unfinished job; erases a finished one."""
        return self._run(lambda client, _: client.cancel(job_id))

    def retry(self, job_id: str) -> dict[str, Any]:
        """Runs a job again that failed on the service's side, without a new upload; returns its
        status. Raises NotFound, Expired (so is its upload), and RequestRejected with the code
        job_not_failed or retry_in_vain."""
        return self._run(lambda client, _: client.retry(job_id))

    def health(self) -> dict[str, Any]:
        """What the service says of itself, asked once; `status`: ok, degraded or unavailable."""
        return self._run(lambda client, _: client.health())

    def close(self) -> None:
        """Closes connections; a call under way in another thread ends with a RuntimeError."""
        with self._lock:
            self._stop()
        if self._background.thread is not threading.current_thread():
            self._background.thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        self._background = _Background(self._make)
        # A client that was never closed must not keep its thread. At exit there is nothing to do:
        # the thread is a daemon, and Python 3.12 can't shut an event loop down that late.
        self._stop = weakref.finalize(self, self._background.stop)
        self._stop.atexit = False

    def _run(
        self,
        call: Callable[[AsyncWhisperClient, Progress], Coroutine[Any, Any, T]],
        on_progress: Progress | None = None,
    ) -> T:
        """Runs `call` on the event loop, and its progress reports here, in the caller's thread, so
        that they may take their time, raise, or use this client."""
        with self._lock:
            if not self._stop.alive:
                raise RuntimeError("This WhisperClient is closed")
            if not self._background.thread.is_alive():  # this process is a fork of its maker's
                self._stop.detach()
                self._start()
            background = self._background
        inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        future = asyncio.run_coroutine_threadsafe(
            call(background.client, inbox.put), background.loop
        )
        future.add_done_callback(lambda _: inbox.put(None))
        try:
            while (update := background.next(inbox)) is not None:
                if on_progress is not None:
                    on_progress(update)
            return future.result(timeout=0)
        except (concurrent.futures.CancelledError, TimeoutError) as exc:
            if future.done() and not future.cancelled():
                raise
            raise RuntimeError("This WhisperClient was closed during the call") from exc
        finally:
            future.cancel()  # on_progress raised, or Ctrl-C: nobody waits for the answer any more


class _Background:
    """An event loop in a daemon thread of its own, and the client that lives on it."""

    loop: asyncio.AbstractEventLoop
    _stopping: asyncio.Event

    def __init__(self, make: Callable[[], AsyncWhisperClient]) -> None:
        ready: concurrent.futures.Future[AsyncWhisperClient] = concurrent.futures.Future()
        self.thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(make, ready)),
            name="whisper-client",
            daemon=True,
        )
        self.thread.start()
        self.client = ready.result()

    async def _serve(
        self,
        make: Callable[[], AsyncWhisperClient],
        ready: concurrent.futures.Future[AsyncWhisperClient],
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        try:
            client = make()
        except BaseException as exc:
            ready.set_exception(exc)
            return
        ready.set_result(client)
        await self._stopping.wait()
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await client.close()

    def next(self, inbox: queue.SimpleQueue[dict[str, Any] | None]) -> dict[str, Any] | None:
        """The next thing in the inbox; None also when the loop has ended."""
        while True:
            try:
                return inbox.get(timeout=0.5)  # Windows sees a Ctrl-C only between two waits
            except queue.Empty:
                if not self.thread.is_alive():
                    return None

    def stop(self) -> None:
        """Asks the thread to end; returns at once, since a finalizer may run in any thread."""
        with contextlib.suppress(RuntimeError):  # it has ended already
            self.loop.call_soon_threadsafe(self._stopping.set)


class AsyncWhisperClient:
    """Talks to the service from asyncio: the methods of WhisperClient, to be awaited."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        timeout: float = 30.0,
        max_retries: int = 3,
        *,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        """As in WhisperClient; `sleep`: how it waits between two requests."""
        try:
            url = httpx2.URL(base_url.strip())
        except httpx2.InvalidURL as exc:
            raise ValueError(f"{base_url!r} is no address: {exc}") from exc
        if url.scheme not in {"http", "https"} or not url.host:
            raise ValueError(f"{base_url!r} is no address; it begins with http:// or https://")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("The API key holds characters that can't be sent")
        headers = {"Accept": "application/json", "User-Agent": "faster-whisper-api-client"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        self._max_retries = max_retries
        self._sleep = sleep
        self._wait_seconds = min(MAX_WAIT_SECONDS, timeout * 2 / 3)
        self._http = httpx2.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=httpx2.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
        )

    async def transcribe_file(
        self,
        file: Source,
        *,
        on_progress: Progress | None = None,
        deadline: float | None = None,
        poll_interval: float | None = None,
        idempotency_key: str | None = None,
        ask_first: bool | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """As WhisperClient.transcribe_file; `on_progress` is called on the event loop."""
        job_id: str | None = None
        try:
            async with asyncio.timeout(deadline) as limit:
                response = await self._upload(file, options, idempotency_key, ask_first)
                accepted = _answer_of(response, "job_id", "status")
                job_id = str(accepted["job_id"])
                if accepted["status"] != "completed":
                    can_wait = "events" in (accepted.get("links") or {})
                    delay = 0.0 if can_wait else _retry_after(response) or POLL_SECONDS
                    await self._poll(job_id, on_progress, poll_interval, delay)
                return _answer_of(
                    await self._result(job_id, {"format": "json"}, outlasts=True), "text"
                )
        except TimeoutError:
            if not limit.expired():
                raise
            raise JobTimeout(job_id) from None

    async def submit(
        self,
        file: Source,
        *,
        idempotency_key: str | None = None,
        ask_first: bool | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """As WhisperClient.submit."""
        response = await self._upload(file, options, idempotency_key, ask_first)
        return _answer_of(response, "job_id", "status")

    async def submit_batch(
        self, files: Sequence[Source], *, idempotency_key: str | None = None, **options: Any
    ) -> dict[str, Any]:
        """As WhisperClient.submit_batch."""
        if isinstance(files, str | bytes | os.PathLike):
            raise TypeError("A list of files is needed")
        fields = _fields(options)
        async with contextlib.AsyncExitStack() as stack:
            upload = [await _sized(await stack.enter_async_context(_opened(f))) for f in files]
            if not upload:
                raise ValueError("There are no files")
            form = _Form(fields, upload)
            headers = {**form.headers, **_key_header(idempotency_key)}
            response = await self._call("POST", "/batches", headers=headers, body=form.chunks)
        return _answer_of(response, "batch_id", "jobs")

    async def batch(self, batch_id: str) -> dict[str, Any]:
        """As WhisperClient.batch."""
        return _answer_of(await self._call("GET", _path("batches", batch_id)), "is_done", "jobs")

    async def cancel_batch(self, batch_id: str) -> dict[str, Any]:
        """As WhisperClient.cancel_batch."""
        return _answer_of(await self._call("DELETE", _path("batches", batch_id)), "jobs")

    async def jobs(
        self, *, status: str | None = None, batch_id: str | None = None, most: int = 100
    ) -> list[dict[str, Any]]:
        """As WhisperClient.jobs."""
        asked = {name: value for name, value in (("status", status), ("batch", batch_id)) if value}
        found: list[dict[str, Any]] = []
        cursor: str | None = ""
        while cursor is not None and len(found) < most:
            query = {**asked, "limit": str(min(100, most - len(found)))}
            response = await self._call("GET", "/jobs", params=query | {"cursor": cursor})
            page = _answer_of(response, "jobs", "next_cursor")
            found += page["jobs"]
            cursor = page["next_cursor"]
        return found

    async def status(self, job_id: str) -> dict[str, Any]:
        """As WhisperClient.status."""
        return _answer_of(await self._call("GET", _path("status", job_id)), "status")

    async def wait(
        self,
        job_id: str,
        *,
        on_progress: Progress | None = None,
        deadline: float | None = None,
        poll_interval: float | None = None,
    ) -> dict[str, Any]:
        """As WhisperClient.wait."""
        try:
            async with asyncio.timeout(deadline) as limit:
                return await self._poll(job_id, on_progress, poll_interval)
        except TimeoutError:
            if not limit.expired():
                raise
            raise JobTimeout(job_id) from None

    @overload
    async def result(self, job_id: str, format: JsonFormat = "json") -> dict[str, Any]: ...
    @overload
    async def result(self, job_id: str, format: TextFormat, **rules: Any) -> str: ...
    @overload
    async def result(
        self, job_id: str, format: JsonFormat | TextFormat, **rules: Any
    ) -> dict[str, Any] | str: ...
    async def result(
        self, job_id: str, format: JsonFormat | TextFormat = "json", **rules: Any
    ) -> dict[str, Any] | str:
        """As WhisperClient.result."""
        response = await self._result(job_id, {"format": format, **_fields(rules)})
        if format in {"json", "verbose_json"}:
            return _answer_of(response, "text")
        return response.content.decode("utf-8", "replace")

    async def cancel(self, job_id: str) -> dict[str, Any]:
        """As WhisperClient.cancel."""
        return _answer_of(await self._call("DELETE", _path("jobs", job_id)), "status")

    async def retry(self, job_id: str) -> dict[str, Any]:
        """As WhisperClient.retry."""
        return _answer_of(await self._call("POST", _path("jobs", job_id) + "/retry"), "status")

    async def health(self) -> dict[str, Any]:
        """As WhisperClient.health."""
        try:
            response = await self._http.get("/health")
        except httpx2.RequestError as exc:
            raise self._no_answer(exc) from exc
        # A service that is not well says so with 503 and a report like that of a healthy one.
        if isinstance(_json_object(response).get("status"), str) or response.is_success:
            return _answer_of(response, "status")
        raise _rejection(response)

    async def close(self) -> None:
        """Closes connections. The client can't be used after this."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _upload(
        self,
        file: Source,
        options: Mapping[str, Any],
        idempotency_key: str | None,
        ask_first: bool | None,
    ) -> httpx2.Response:
        fields = _fields(options)
        key = _key_header(idempotency_key)
        async with _opened(file) as opened:
            upload = await _sized(opened)
            if ask_first or (ask_first is None and upload.size_bytes >= ASK_FIRST_BYTES):
                with contextlib.suppress(NotFound):  # or the service is older than the question
                    return await self._ask(upload, fields, key)
            form = _Form(fields, [upload])
            headers = {**form.headers, **key}
            return await self._call("POST", "/transcribe", headers=headers, body=form.chunks)

    async def _ask(
        self, upload: _Upload, fields: Mapping[str, str], key: Mapping[str, str]
    ) -> httpx2.Response:
        """Submits the file by its digest. Raises NotFound where the service doesn't know it."""
        digest = await asyncio.to_thread(upload.digest)
        content = urllib.parse.urlencode({**fields, "sha256": digest}).encode()

        async def body() -> AsyncIterator[bytes]:
            yield content

        kind = {"Content-Type": "application/x-www-form-urlencoded"}
        headers = {**kind, "Content-Length": str(len(content)), **key}
        return await self._call("POST", "/transcribe/by-digest", headers=headers, body=body)

    async def _result(
        self, job_id: str, query: Mapping[str, str], outlasts: bool = False
    ) -> httpx2.Response:
        path = _path("result", job_id)
        try:
            return await self._call("GET", path, params=query, outlasts=outlasts)
        except RequestRejected as exc:
            if exc.code == "job_cancelled":
                raise JobCancelled(job_id) from exc
            if exc.status == 422 and exc.code != "invalid_field":  # the job's own code
                raise JobFailed(job_id, exc.code, exc.detail) from exc
            raise

    async def _poll(
        self,
        job_id: str,
        on_progress: Progress | None,
        poll_interval: float | None,
        first_delay: float = 0.0,
    ) -> dict[str, Any]:
        """Asks until the job is completed. A service whose answer has an ETag is then asked to
        answer when there is something new."""
        path = _path("status", job_id)
        delay = first_delay if poll_interval is None else min(first_delay, poll_interval)
        interval = POLL_SECONDS
        tag: str | None = None
        while True:
            if delay > 0:
                await self._sleep(delay)
            began = time.monotonic()
            params = {"wait": f"{self._wait_seconds:g}"} if tag else None
            headers = {"If-None-Match": tag} if tag and on_progress else None
            try:
                response = await self._call(
                    "GET", path, params=params, headers=headers, outlasts=True
                )
            except Unavailable as exc:
                if exc.code != TOO_MANY_WAITERS:
                    raise
                tag, delay = None, exc.retry_after or interval
                continue
            if response.status_code != NOT_MODIFIED:
                job = _answer_of(response, "status")
                if on_progress is not None:
                    on_progress(job)
                if _is_completed(job_id, job):
                    return job
            tag = response.headers.get("etag") if poll_interval is None else None
            advised = _retry_after(response)
            if tag is not None:
                was_kept = params is None or time.monotonic() - began >= POLL_SECONDS
                delay = 0.0 if was_kept else POLL_SECONDS
            elif poll_interval is not None:
                delay = poll_interval
            elif advised:
                delay = advised
            else:
                delay, interval = interval, min(interval * POLL_GROWTH, MAX_POLL_SECONDS)

    async def _call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Callable[[], AsyncIterator[bytes]] | None = None,
        outlasts: bool = False,
    ) -> httpx2.Response:
        """The answer, if it is a good one, after as many retries as the policy allows; where the
        request `outlasts` an outage, after as many as ten minutes allow."""
        lost_seconds = 0.0
        for attempt in itertools.count():
            failure: ConnectionFailed | RequestRejected
            began = time.monotonic()
            try:
                response = await self._http.request(
                    method, path, params=params, headers=headers, content=body and body()
                )
            except httpx2.RequestError as exc:
                failure = self._no_answer(exc)
                failure.__cause__ = exc
            else:
                if response.is_success or response.status_code == NOT_MODIFIED:
                    return response
                failure = _rejection(response)
                if failure.status not in RETRIED_STATUSES or failure.code == TOO_MANY_WAITERS:
                    raise failure
            pause = _pause_seconds(attempt, failure.retry_after)
            if pause is None:
                raise failure
            lost_seconds += time.monotonic() - began + pause
            if lost_seconds > OUTAGE_SECONDS if outlasts else attempt >= self._max_retries:
                raise failure
            await self._sleep(pause)
        raise AssertionError("itertools.count ended")

    def _no_answer(self, exc: httpx2.RequestError) -> ConnectionFailed:
        reason = str(exc) or type(exc).__name__
        return ConnectionFailed(f"No answer from {self._http.base_url}: {reason}")


def _is_completed(job_id: str, job: Mapping[str, Any]) -> bool:
    """False while it is unfinished. Raises JobCancelled, JobFailed."""
    if job["status"] == "cancelled":
        raise JobCancelled(job_id)
    if job["status"] == "failed":
        error = job.get("error") or {}
        raise JobFailed(job_id, error.get("code", "job_failed"), error.get("message", ""))
    return bool(job["status"] == "completed")


def _pause_seconds(attempt: int, retry_after: float | None) -> float | None:
    """How long to wait after try number `attempt` (from 0); None: too long to wait at all.

    A little chance keeps clients that failed together from coming back together."""
    if retry_after and retry_after > MAX_RETRY_AFTER_SECONDS:
        return None
    if retry_after:
        return retry_after * random.uniform(1.0, 1.1)
    backoff = min(BACKOFF_SECONDS * 2.0 ** min(attempt, 10), MAX_BACKOFF_SECONDS)
    return backoff * random.uniform(0.75, 1.0)


def _retry_after(response: httpx2.Response) -> float | None:
    """The seconds that Retry-After asks for, given as a number or as a date; None without."""
    value = response.headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        until = email.utils.parsedate_to_datetime(value).timestamp()
    except ValueError:
        return None
    try:  # by the server's clock, where it tells
        now = email.utils.parsedate_to_datetime(response.headers.get("date", "")).timestamp()
    except ValueError:
        now = time.time()
    return max(until - now, 0.0)


def _rejection(response: httpx2.Response) -> RequestRejected:
    """An error answer (application/problem+json, or a proxy's own page) as an exception."""
    status = response.status_code
    problem = _json_object(response)
    detail = problem.get("detail")
    if not isinstance(detail, str) or not detail:
        detail = f"The server answered {status} {response.reason_phrase}".strip()
    if response.has_redirect_location:
        detail = f"The server moved to {response.headers['location']}; use that as its address"
    kinds = {404: NotFound, 408: Unavailable, 410: Expired, 429: RateLimited}
    kind = kinds.get(status, Unavailable if status >= 500 else RequestRejected)
    errors = problem.get("errors")
    return kind(
        status,
        str(problem.get("code") or f"http_{status}"),
        detail,
        str(problem.get("request_id") or response.headers.get("x-request-id", "")),
        errors if isinstance(errors, list) else [],
        _retry_after(response),
    )


def _json_object(response: httpx2.Response) -> dict[str, Any]:
    """Empty unless the answer is a JSON object."""
    try:
        body = response.json()
    except ValueError:
        body = None
    return body if isinstance(body, dict) else {}


def _answer_of(response: httpx2.Response, *names: str) -> dict[str, Any]:
    """The answer's JSON, which has to hold these names."""
    answer = _json_object(response)
    if missing := [name for name in names if name not in answer]:
        raise ConnectionFailed(
            f"What answered at {response.url} is not this service: "
            f"there is no {missing[0]!r} in its answer"
        )
    return answer


def _path(collection: str, job_id: str) -> str:
    if not job_id:
        raise ValueError("The job id is empty")
    return f"/{collection}/{urllib.parse.quote(job_id, safe='')}"


# --- The upload -----------------------------------------------------------------------------------


def _fields(options: Mapping[str, object]) -> dict[str, str]:
    given = ((name, _form_value(name, value)) for name, value in options.items())
    return {name: value for name, value in given if value is not None}


def _form_value(name: str, value: object) -> str | None:
    """An option as the service's form takes it; None leaves it out."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, numbers.Real):
        return str(value)
    if isinstance(value, Mapping):
        return json.dumps(dict(value))
    if isinstance(value, list | tuple) and all(isinstance(item, numbers.Real) for item in value):
        return ",".join(str(item) for item in value)
    raise TypeError(f"The option {name} can't be a {type(value).__name__}: {value!r:.60}")


@contextlib.asynccontextmanager
async def _opened(source: Source) -> AsyncIterator[tuple[IO[bytes], str]]:
    """The source as a binary file that can be rewound, and its name. Closes only what it opened."""
    if isinstance(source, io.TextIOBase):
        raise TypeError("The file is opened in text mode; open it with mode 'rb'")
    with contextlib.ExitStack() as stack:
        if isinstance(source, str | os.PathLike):
            file: IO[bytes] = stack.enter_context(await asyncio.to_thread(open, source, "rb"))
        elif hasattr(source, "read"):
            file = source
        else:
            raise TypeError(
                f"A path or a file opened in binary mode is needed, not {type(source).__name__}; "
                "wrap bytes in io.BytesIO"
            )
        name = getattr(file, "name", None)
        if not file.seekable():  # a pipe: its bytes come once, but every attempt needs them
            pipe, file = file, stack.enter_context(tempfile.TemporaryFile())
            await asyncio.to_thread(shutil.copyfileobj, pipe, file)
        yield file, os.path.basename(name) if isinstance(name, str) else "audio"


@dataclasses.dataclass(frozen=True)
class _Upload:
    """A file as it was when it was opened: one that grows is sent without what came later."""

    file: IO[bytes]
    name: str
    size_bytes: int

    def chunks(self) -> Iterator[bytes]:
        """From its beginning."""
        self.file.seek(0)
        left = self.size_bytes
        while left:
            chunk = self.file.read(min(CHUNK_BYTES, left))
            if not chunk:
                raise OSError(f"{self.name} became shorter while it was being sent")
            left -= len(chunk)
            yield chunk

    def digest(self) -> str:
        """SHA-256, hex."""
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()


async def _sized(opened: tuple[IO[bytes], str]) -> _Upload:
    file, name = opened
    size_bytes = await asyncio.to_thread(file.seek, 0, os.SEEK_END)
    if size_bytes == 0:
        raise ValueError(f"{name} is empty (0 bytes)")
    return _Upload(file, name, size_bytes)


def _key_header(key: str | None) -> dict[str, str]:
    """One key for every attempt, so that a server may tell a repeat from a second request."""
    key = uuid.uuid4().hex if key is None else key
    if not (0 < len(key) <= MAX_KEY and key.isascii() and key.isprintable()):
        raise ValueError(f"An idempotency key is 1 to {MAX_KEY} printable ASCII characters")
    return {"Idempotency-Key": key}


class _Form:
    """A multipart/form-data body of known length that is read from the files while it is sent."""

    def __init__(self, fields: Mapping[str, str], uploads: Sequence[_Upload]) -> None:
        boundary = uuid.uuid4().hex
        head = "".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"\r\n\r\n{value}\r\n'
            for field, value in fields.items()
        )
        self._uploads = [(_file_head(boundary, each.name), each) for each in uploads]
        self._head = head.encode("utf-8", "replace")
        self._tail = f"--{boundary}--\r\n".encode()
        length = len(self._head) + len(self._tail)
        length += sum(len(each) + upload.size_bytes + 2 for each, upload in self._uploads)
        self.headers = {
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            "Content-Length": str(length),
        }

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body from its beginning, once for each attempt. Disks are read off the event loop."""
        yield self._head
        for head, upload in self._uploads:
            yield head
            chunks = upload.chunks()
            while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
                yield chunk
            yield b"\r\n"
        yield self._tail


def _file_head(boundary: str, name: str) -> bytes:
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    # Quoted as browsers do (WHATWG HTML, "multipart/form-data encoding algorithm").
    quoted = name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
    return (
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{quoted}"\r\n'
        f"Content-Type: {kind}\r\n\r\n"
    ).encode("utf-8", "replace")


# --- The command ----------------------------------------------------------------------------------

EXIT_OK, EXIT_JOB_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_TIMEOUT, EXIT_INTERRUPTED = (
    0, 1, 2, 3, 4, 130,
)  # fmt: skip
FORMATS = ("text", "json", "verbose_json", "srt", "vtt", "tsv")


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="example_client.py",
        description="Transcribe a recording with Faster Whisper API and print the transcript.",
        epilog="exit status: 0 done, 1 the job failed, 2 wrong usage or a refused request, "
        "3 the service can't be reached, 4 the deadline passed",
    )
    url = os.environ.get("WHISPER_URL", "http://localhost")
    parser.add_argument("file", help="audio or video file")
    parser.add_argument("--url", default=url, help="address of the service (%(default)s)")
    parser.add_argument("--format", default="text", choices=FORMATS, help="default: text")
    parser.add_argument(
        "-o",
        dest="options",
        metavar="NAME=VALUE",
        type=_option,
        action="append",
        default=[],
        help="an option of the transcription, as language=en; repeatable",
    )
    parser.add_argument(
        "--caption",
        dest="rules",
        metavar="NAME=VALUE",
        type=_option,
        action="append",
        default=[],
        help="a rule for the captions of srt and vtt, as max_lines=2; repeatable",
    )
    parser.add_argument(
        "--deadline", type=float, metavar="SECONDS", help="how long to wait for the job"
    )
    return parser.parse_args(argv)


def _show(job: Mapping[str, Any]) -> None:
    """One line on a terminal that each report writes over."""
    line = f"{job['status']} {job.get('progress') or 0:.0%}"
    if job.get("queue_position"):
        line = f"queued, number {job['queue_position']}"
    _write_over(line)


def _write_over(line: str) -> None:
    print(f"\r{line:<40}\r", end="", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = _arguments(argv)
    job_id = ""
    try:
        with WhisperClient(arguments.url, os.environ.get("WHISPER_API_KEY")) as client:
            try:
                job_id = client.submit(arguments.file, **dict(arguments.options))["job_id"]
                on_progress = _show if sys.stderr.isatty() else None
                client.wait(job_id, on_progress=on_progress, deadline=arguments.deadline)
                transcript = client.result(job_id, arguments.format, **dict(arguments.rules))
            except KeyboardInterrupt:
                if job_id:
                    with contextlib.suppress(WhisperError):
                        client.cancel(job_id)
                raise
            finally:
                if sys.stderr.isatty():
                    _write_over("")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (WhisperError, OSError, ValueError, TypeError) as exc:
        print(f"example_client.py: {exc}", file=sys.stderr)
        return _exit_status(exc)
    if not isinstance(transcript, str):
        transcript = json.dumps(transcript, ensure_ascii=False, indent=2)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    print(transcript.rstrip("\n"))
    return EXIT_OK


def _exit_status(exc: Exception) -> int:
    if isinstance(exc, JobFailed | JobCancelled | Expired):
        return EXIT_JOB_FAILED
    if isinstance(exc, JobTimeout):
        return EXIT_TIMEOUT
    if isinstance(exc, ConnectionFailed | RateLimited | Unavailable):
        return EXIT_UNREACHABLE
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
