"""`python -m api.failed`: lists the jobs that failed and can be retried, whoever owns them.

It needs Redis and DATA_DIR, not the API. The retries themselves are requests (api/retry.py), so its
log has them, with who asked for them.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from itertools import islice

from api.__main__ import EXIT_CONFIG
from api.retry import check, kept_manifest
from api.store import JOBS_AT_ONCE, JobStore
from shared.broker import celery_app
from shared.errors import InvalidSettings, RequestError, StoreUnavailable
from shared.jobs import Job
from shared.settings import Settings, load_settings
from shared.storage import Manifest, Storage


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status. Jobs go to stdout, a line each, their ids first."""
    parser = argparse.ArgumentParser(
        prog="python -m api.failed", description="Jobs that failed and can be retried."
    )
    parser.add_argument("--code", help="only those that failed with it, as worker_lost")
    arguments = parser.parse_args(argv)
    try:
        return asyncio.run(run(arguments.code, load_settings()))
    except InvalidSettings as exc:
        print(exc.message, file=sys.stderr)
        return EXIT_CONFIG
    except StoreUnavailable as exc:
        print(f"{exc.message} Is REDIS_URL right ({exc.__cause__})?", file=sys.stderr)
        return 1


async def run(code: str | None, settings: Settings) -> int:
    store = JobStore(settings, celery_app(settings.redis_url.get_secret_value()))
    number, size_bytes = 0, 0
    try:
        async for job, manifest in retryable(store, Storage(settings.data_dir)):
            if code in {None, job.error_code}:
                until = f"{job.expires_at:%Y-%m-%dT%H:%MZ}"
                print(job.job_id, job.error_code, until, manifest.owner)
                number += 1
                size_bytes += manifest.size_bytes
    finally:
        await store.close()
    print(f"{number} jobs, of {size_bytes / 1024 / 1024:.1f} MiB", file=sys.stderr)
    return 0


async def retryable(store: JobStore, storage: Storage) -> AsyncIterator[tuple[Job, Manifest]]:
    """Raises StoreUnavailable."""

    async def look(job_id: str) -> tuple[Job, Manifest] | None:
        try:
            job = await store.read(job_id, seen_by="")
            check(job)
            return job, kept_manifest(storage, job)
        except RequestError:
            return None

    ids = storage.job_ids()
    while some := list(islice(ids, JOBS_AT_ONCE)):
        for found in await asyncio.gather(*map(look, some)):
            if found:
                yield found


if __name__ == "__main__":
    sys.exit(main())
