"""What must stay inside does: passwords, tokens, the text of a transcript, the names of files. The
whole service and Flower run with seeded ones, at LOG_LEVEL=DEBUG; jobs succeed, fail and are
cancelled, and Redis goes away; then everything that others can see is searched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import httpx2
import pytest
import redis

from api.key_store import ApiKey, Scope, digest_of
from api.store import Limits
from local.ports import free_port
from local.redis_server import find_binary
from local.service import Service
from shared import keys
from tests.conftest import FOX, FOX_WORDS, ROOT, alive, wait_until
from tests.e2e.conftest import Client, variant
from tests.receiver import Receiver, Reply

PASSWORD = "canary-redis-Zq7/x+y=%"
LOGIN = "canary-flower-33"
TOKEN = "canary-hub-token-81"
NAME = "canary-file-name-42.wav"
PROMPT = "canary prompt 17"
SIGNING = "whsec_Y2FuYXJ5LXNpZ25pbmcta2V5LTAwMDAwMDAwMDA="
QUERY = "canary-query-99"
KEY = f"fwa_0123456789ab_canary-key-{'k' * 32}"
SECRETS = (
    *(PASSWORD, quote(PASSWORD, ""), "canary-redis", LOGIN, TOKEN, NAME, PROMPT, "brown fox"),
    *(KEY, "canary-key", digest_of(KEY)),
    *(SIGNING, SIGNING[6:30], "canary-signing-key", QUERY),
)


@pytest.fixture(scope="module")
def redis_process(tmp_path_factory) -> Iterator[tuple[str, subprocess.Popen]]:
    """A server with a password in its file, as deploy/redis/start.sh makes it."""
    folder, port = tmp_path_factory.mktemp("redis"), free_port()
    config = folder / "redis.conf"
    lines = [f"port {port}", "bind 127.0.0.1", 'save ""', f"dir {folder}"]
    config.write_text("\n".join([*lines, f'requirepass "{PASSWORD}"', ""]))
    command = [str(find_binary()), str(config)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        yield f"redis://127.0.0.1:{port}/0", server
        server.kill()


@pytest.fixture(scope="module")
def flower(redis_process, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """Started as in its image."""
    port, log = free_port(), tmp_path_factory.mktemp("flower") / "log"
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'deploy' / 'flower'}",
        "REDIS_URL": redis_process[0],
        "REDIS_PASSWORD": PASSWORD,
        "FLOWER_BASIC_AUTH": f"admin:{LOGIN}",
        "FLOWER_PORT": str(port),
        "FLOWER_ADDRESS": "127.0.0.1",
        "FLOWER_TASKS_COLUMNS": "name,args,state,result,exception,received,started,runtime,worker",
    }
    command = [sys.executable, "-m", "celery", "--app=tasks", "flower"]
    with (
        log.open("wb") as out,
        subprocess.Popen(
            command, env=environment, stdout=out, stderr=out, cwd=log.parent
        ) as process,
    ):
        yield port, log
        process.kill()


@pytest.fixture(scope="module")
def seen(redis_process, flower, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Everything that others can see, by where it was seen."""
    found: dict[str, str] = {}
    folder = tmp_path_factory.mktemp("service")
    environment = {
        "redis_url": redis_process[0],
        "redis_password": PASSWORD,
        "auth": "keys",
        "HF_TOKEN": TOKEN,
        "webhook_secret": SIGNING,
        "egress_allow": "127.0.0.1",
        "log_level": "DEBUG",
        "max_attempts": "1",
    }
    with Service.in_folder(folder, environment) as service:
        service.wait_ready(60)
        client = Client(service)
        client.http.headers["X-API-Key"] = KEY
        add_key(service)
        work(client, folder, found)
        found["flower"] = "".join(pages_of(flower[0]))
        pids = [*(service.popen(name).pid for name in ("API", "worker")), redis_process[1].pid]
        found["ps"] = "\n".join(command_line(pid) for pid in family(pids))
        found["metrics"] = client.http.get("/metrics").text
        found["metrics of the worker"] = httpx2.get(
            f"{service.worker_url}/metrics", trust_env=False
        ).text
        found["stats"] = client.http.get("/stats").text + client.http.get("/health").text
        redis_process[1].kill()
        wait_until(lambda: client.http.get("/health/ready").status_code == 503, 30, "it is missed")
        found["answers without Redis"] = client.http.get("/stats").text
        client.http.close()
        wait_until(
            lambda: b"Connection refused" in log_of(service), 30, "the worker misses it, too"
        )
    found["log"] = log_of(service).decode()
    found["log of Flower"] = flower[1].read_text()
    return found


def add_key(service: Service) -> None:
    limits = Limits(requests=10_000, jobs=100, audio_minutes=100)
    scopes = frozenset({Scope.ADMIN})
    key = ApiKey(KEY.split("_")[1], "canary", digest_of(KEY), scopes, limits, datetime.now(UTC))
    with redis.Redis.from_url(service.redis_url, password=PASSWORD) as raw:
        raw.hset(keys.api_key(key.key_id), mapping=key.record)


def work(client: Client, folder: Path, found: dict[str, str]) -> None:
    """A job of each end, and requests that are refused."""
    fox = folder / NAME
    variant(fox, 1)
    metadata = json.dumps({PROMPT: TOKEN})
    done = client.submit(fox, initial_prompt=PROMPT, metadata=metadata)["job_id"]
    client.wait(done)
    assert FOX_WORDS in client.text(done), "there is something to be kept"
    broken = folder / f"broken-{NAME}"
    broken.write_bytes(b"\0" * 5_000)
    failed = client.submit(broken, hotwords=PROMPT)["job_id"]
    client.wait(failed, "failed")
    cancelled = client.submit(variant(fox, 2), initial_prompt=PROMPT)["job_id"]
    client.http.delete(f"/jobs/{cancelled}")
    with Receiver() as receiver, Receiver(Reply(body=FOX.read_bytes())) as shop:
        told = {"webhook_url": receiver.url(f"/{QUERY}?{QUERY}")}
        fetched = {"url": shop.url(f"/{QUERY}?{QUERY}"), **told}
        away = Reply(302, {"Location": f"/{QUERY}"})
        shop.replies.insert(0, away)
        answer = client.http.post("/transcribe", json=fetched)
        assert answer.status_code == 202, answer.text
        client.submit(fox, **told)
        wait_until(lambda: len(receiver.received) >= 2, 30, "webhooks are told")
        found["webhook"] = client.http.get(f"/jobs/{answer.json()['job_id']}/webhook").text
    post = {"files": {"file": (NAME, FOX.read_bytes())}}
    refused = [
        client.http.get(f"/result/{failed}"),
        client.http.post("/transcribe", files={"file": (NAME, b"text only")}),
        client.http.post("/transcribe", **post, data={"beam_size": PASSWORD}),
        client.http.post("/transcribe", **post, data={"initial_prompt": PROMPT + "\0"}),
        client.http.post("/transcribe", **post, data={"metadata": PROMPT, "priority": TOKEN}),
        client.http.post("/transcribe", **post, headers={"Idempotency-Key": TOKEN * 20}),
        client.http.post("/batches", files=[("file", (NAME, b"text"))], data={"metadata": TOKEN}),
        client.http.post("/transcribe/by-digest", json={"sha256": TOKEN, "hotwords": PROMPT}),
        client.http.head(f"/transcribe?initial_prompt={quote(PROMPT)}"),
        client.http.get(f"/status/{done}", headers={"Authorization": f"Bearer {TOKEN}"}),
        client.http.get(f"/status/{done}", headers={"Authorization": f"Bearer {KEY}X"}),
        client.http.get(f"/nowhere?key={quote(TOKEN)}"),
        *(
            client.http.post("/transcribe", json={"url": f"{url}/{QUERY}?{QUERY}"})
            for url in ("http://10.0.0.1", "http://127.0.0.1:1", "http://a b", "http://a.invalid")
        ),
        client.http.post("/transcribe", **post, data={"webhook_url": f"http://10.1.1.1/{QUERY}"}),
    ]
    found["error answers"] = "\n".join(answer.text for answer in refused)


def pages_of(port: int) -> Iterator[str]:
    address = f"http://127.0.0.1:{port}"
    with httpx2.Client(base_url=address, auth=("admin", LOGIN), trust_env=False) as flower:

        def has_seen() -> bool:
            with suppress(httpx2.TransportError):
                return "SUCCESS" in flower.get("/api/tasks").text
            return False

        wait_until(has_seen, 60, "Flower shows a task")
        for path in ("/api/tasks", "/api/workers?refresh=1", "/workers", "/broker", "/metrics"):
            yield flower.get(path, follow_redirects=True).text
    yield httpx2.get(f"{address}/api/tasks", trust_env=False).text
    assert httpx2.get(f"{address}/api/tasks", trust_env=False).status_code == 401


def family(pids: list[int]) -> list[int]:
    """The processes and all below them."""
    found = list(pids)
    for pid in found:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return [pid for pid in found if alive(pid)]


def command_line(pid: int) -> str:
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def log_of(service: Service) -> bytes:
    return (service.settings.data_dir.parent / "service.log").read_bytes()


def test_nothing_that_others_see_holds_a_secret(seen):
    """In no log, list of processes, metric, error answer or page of Flower."""
    leaks = [
        f"{where}: {secret}: {text[max(0, text.index(secret) - 150) :][:300]}"
        for where, text in seen.items()
        for secret in SECRETS
        if secret in text
    ]
    assert leaks == []


def test_what_was_searched_was_there(seen):
    """Otherwise the search proves nothing."""
    assert "worker.engine.decode_server" in seen["ps"]
    assert "redis-server" in seen["ps"] or "valkey" in seen["ps"]
    assert "whisper_jobs_total" in seen["metrics of the worker"]
    assert '"action": "job_accepted"' in seen["log"]
    assert '"level": "DEBUG"' in seen["log"]
    assert "transcribe" in seen["flower"]
    assert "store_unavailable" in seen["answers without Redis"]
    assert "unsupported_media" in seen["error answers"]
    assert "unauthorized" in seen["error answers"]
    assert '"logger": "audit"' in seen["log"]
    assert "url_not_allowed" in seen["error answers"]
    assert "url_unreachable" in seen["error answers"]
    assert '"action": "fetched"' in seen["log"]
    assert '"action": "webhook_attempted"' in seen["log"]
    assert '"state":' in seen["webhook"]
