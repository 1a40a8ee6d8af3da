"""docker-compose up, scale, break, down: the whole stack on a real engine (`make compose-test`).

Needs the images that the Compose file names, or the network to fetch them. Port 80 unless
COMPOSE_TEST_PORT says otherwise.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from local.ports import free_port
from tests.compose.stack import Load, Stack, docker, engine
from tests.conftest import FOX, FOX_WORDS, ROOT, wait_until
from tests.deploy.monitored import queries, rules
from tests.deploy.test_grafana import replaced
from tests.e2e.conftest import variant

pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]

# Quick to notice a dead worker; everything else is what a fresh clone has.
SETTINGS = {
    "MODEL_SIZE": "demo",
    "LEASE_SECONDS": "10",
    "REAP_INTERVAL_SECONDS": "1",
    "NGINX_OPEN_FILES": str(min(65_536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])),
}
RECOVERY_SECONDS = 10 + 60
LOGS = ROOT / "build" / "compose-test.log"  # of every container, to look into afterwards


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    if why := engine():
        pytest.fail(f"this suite needs a Docker engine: {why}")
    port = os.environ.get("COMPOSE_TEST_PORT", "80")
    folder = tmp_path_factory.mktemp("compose")
    stack = Stack(folder, f"compose-test-{os.getpid()}", HTTP_PORT=port, **SETTINGS)
    stack.compose("build")
    try:
        stack.up()
        yield stack
    finally:
        LOGS.parent.mkdir(exist_ok=True)
        LOGS.write_text(stack.compose("logs", "--no-color", "--timestamps"))
        stack.remove()


@pytest.fixture
def load(stack: Stack, tmp_path: Path) -> Iterator[Load]:
    with Load(stack, tmp_path) as load:
        load.wait_for(1)
        yield load


def test_a_fresh_install_is_well_and_no_alert_begins(stack):
    health = stack.http.get("/health").json()
    assert (health["status"], health["model"]) == ("ok", "demo")
    wait_until(lambda: len(stack.query('up{job=~"api|worker|flower"} == 1')) == 4, 60, "scrapes")
    for name, rule in rules("alert").items():
        if name != "WhisperDiskFilling":  # the machine's disk is not ours
            assert stack.query(rule["expr"]) == [], name


def test_the_commands_of_the_readme_work_on_its_port(stack):
    """curl POST /transcribe, /status, /result, as in the seed."""
    base = f"http://localhost:{stack.port}"

    def curl(*arguments: str) -> dict:
        done = subprocess.run(["curl", "-sS", *arguments], capture_output=True, check=True)
        return json.loads(done.stdout)

    fields = ["-F", f"file=@{FOX}", "-F", "vad_filter=true", "-F", "language=en"]
    job = curl("-X", "POST", f"{base}/transcribe", *fields)
    assert job["message"] == "Transcription job submitted successfully"
    wait_until(
        lambda: curl(f"{base}/status/{job['job_id']}")["status"] == "completed", 60, "it completes"
    )
    assert curl(f"{base}/result/{job['job_id']}")["text"].strip() == FOX_WORDS
    assert curl(f"{base}/stats")["jobs"]["completed"] == 1


def test_nothing_runs_as_root_or_has_a_capability(stack):
    for container in stack.containers():
        about = stack.inspect(container)
        host = about["HostConfig"]
        name = about["Name"]
        assert host["CapDrop"] == ["ALL"], name
        assert not host["CapAdd"], name
        assert host["ReadonlyRootfs"], name
        assert "no-new-privileges:true" in host["SecurityOpt"], name
        status = docker("exec", container, "cat", "/proc/1/status")
        users = re.search(r"^Uid:\s+(.*)$", status, re.MULTILINE)[1].split()
        effective = re.search(r"^CapEff:\s+(\w+)$", status, re.MULTILINE)[1]
        assert "0" not in users, name
        assert int(effective, 16) == 0, name


def test_only_nginx_is_open_to_the_network(stack):
    open_to = {}
    for container in stack.containers():
        about = stack.inspect(container)
        service = about["Config"]["Labels"]["com.docker.compose.service"]
        bound = about["HostConfig"]["PortBindings"] or {}
        open_to[service] = {b["HostIp"] or "any" for each in bound.values() for b in each}
    assert open_to.pop("nginx") == {"any"}
    assert open_to.pop("api") == open_to.pop("worker") == open_to.pop("redis") == set()
    assert set().union(*open_to.values()) == {"127.0.0.1"}
    answer = stack.http.get("/metrics")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_flower_shows_tasks_to_who_may_see_them(stack, tmp_path):
    stack.wait_completed(stack.submit(variant(tmp_path / "secret name.wav", 1)))
    broken = tmp_path / "broken.wav"
    broken.write_bytes(FOX.read_bytes()[:44] + b"\0" * 40)
    failed = stack.submit(broken)
    wait_until(lambda: stack.http.get(f"/status/{failed}").json()["status"] == "failed", 60)
    url = "http://127.0.0.1:5555/api/tasks"
    assert httpx2.get(url, trust_env=False).status_code == 401

    def tasks() -> list[dict] | None:
        page = httpx2.get(url, auth=("admin", "admin"), trust_env=False)
        found = [task for task in page.json().values() if task["state"] in {"SUCCESS", "FAILURE"}]
        return found if {task["state"] for task in found} == {"SUCCESS", "FAILURE"} else None

    seen = wait_until(tasks, 30, "Flower has seen both")
    assert {task["name"] for task in seen} == {"transcribe"}
    done = next(
        task for task in seen if task["state"] == "SUCCESS" and "completed" in task["result"]
    )
    identity = re.fullmatch(r"\('(\w{12})',\)", done["args"])[1]
    assert done["result"].startswith(f"'{identity} completed in ")
    assert "failed" in next(task for task in seen if task["state"] == "FAILURE")["exception"]
    assert not re.search("fox|secret name", json.dumps(seen))


def test_scaling_under_load_fails_no_request_and_loses_no_job(stack, load):
    """api 1 -> 3 -> 2 and worker 1 -> 3 -> 1 while users work; everyone who is there serves."""
    stack.up(api=1, worker=1)
    load.wait_for(5)
    stack.up(api=3, worker=3)
    wait_until(lambda: len(stack.query('up{job="api"} == 1')) == 3, 60, "Prometheus sees all APIs")
    wait_until(lambda: len(stack.query('up{job="worker"} == 1')) == 3, 60, "and all workers")
    served = "count(sum by (instance) (rate(http_requests_total[1m])) > 0)"
    worked = 'count(sum by (instance) (whisper_jobs_total{status="completed"}) > 0)'
    for what in (served, worked):
        wait_until(
            lambda w=what: stack.query(w) and stack.query(w)[0]["value"][1] == "3", 120, what
        )
    stack.up(api=2, worker=1)
    load.wait_for(5)
    left = "up{job=~'api|worker'} == 1"
    wait_until(lambda: len(stack.query(left)) == 3, 60, "the rest is gone")
    assert load.failures == []
    print(
        f"\nscaling: {load.requests} requests, {load.completed} jobs, {len(load.failures)} failed"
    )


def test_every_panel_has_data_after_a_run(stack, load):
    load.wait_for(5)
    wanted = [e for _, panel, e in queries() if "GPU" not in panel["title"] and "DCGM" not in e]

    def empty() -> list[str]:
        return [e for e in wanted if not stack.query(replaced(e, "2m", "1h"))]

    wait_until(lambda: not empty(), 120, f"panels without data: {empty()}")


@pytest.mark.parametrize("service", ["api", "worker", "redis"])
def test_what_crashes_comes_back_and_nothing_is_lost(stack, tmp_path, service):
    jobs = [stack.submit(variant(tmp_path / f"{n}.wav", 7_000_000 + n)) for n in range(6)]
    victim = stack.containers(service)[0]
    before = stack.inspect(victim)["RestartCount"]
    stack.crash(victim)
    wait_until(lambda: stack.inspect(victim)["RestartCount"] > before, 30, "it is restarted")
    wait_until(lambda: ready(stack), RECOVERY_SECONDS, "the service is there again")
    for job in jobs:
        assert stack.wait_completed(job).strip() == FOX_WORDS
    stack.wait_healthy()


@pytest.mark.parametrize("service", ["api", "worker", "redis"])
def test_what_docker_kills_is_missed_but_costs_nothing(stack, tmp_path, service):
    """Docker restarts nothing that was killed by command. With a second replica the service stays;
    a killed Redis waits for the next `up`."""
    stack.up(api=2, worker=2)
    jobs = [stack.submit(variant(tmp_path / f"{n}.wav", 8_000_000 + n)) for n in range(6)]
    docker("kill", stack.containers(service)[0])
    if service == "redis":
        answer = stack.http.get("/health")
        assert (answer.status_code, answer.json()["redis"]) == (503, "unreachable")
    else:
        assert ready(stack)
        for job in jobs:
            assert stack.wait_completed(job).strip() == FOX_WORDS
    stack.up(api=2, worker=2)
    for job in jobs:
        assert stack.wait_completed(job).strip() == FOX_WORDS


def test_a_job_that_waits_outlives_down_and_up(stack, tmp_path):
    done = stack.submit(variant(tmp_path / "done.wav", 9_000_000))
    stack.wait_completed(done)
    stack.compose("stop", "worker")
    waiting = [stack.submit(variant(tmp_path / f"{n}.wav", 9_000_001 + n)) for n in range(5)]
    assert {stack.http.get(f"/status/{job}").json()["status"] for job in waiting} == {"queued"}
    stack.compose("down")
    assert stack.containers() == []
    stack.up()
    for job in [done, *waiting]:
        assert stack.wait_completed(job).strip() == FOX_WORDS


def test_a_backup_brings_back_results_and_waiting_jobs(stack, tmp_path):
    """The commands of DEPLOYMENT.md, on volumes that are deleted in between."""
    done = stack.submit(variant(tmp_path / "done.wav", 9_100_000))
    stack.wait_completed(done)
    stack.compose("stop", "worker")
    waiting = stack.submit(variant(tmp_path / "waiting.wav", 9_100_001))
    stack.compose("stop", "nginx", "api", "worker")
    stack.compose("stop", "redis")
    once = ["run", "--rm", "--no-deps", "-T", "--entrypoint"]
    pack = ["-C", "/data", "-czf", "-", "."]
    copies = {name: stack.piped(b"", *once, "tar", name, *pack) for name in ("redis", "api")}
    stack.compose("down", "--volumes")
    for name, copy in copies.items():
        stack.piped(copy, *once, "sh", name, "-c", "rm -rf /data/* && tar -C /data -xzf -")
    stack.up()
    for job in (done, waiting):
        assert stack.wait_completed(job).strip() == FOX_WORDS


def test_the_api_is_replaced_without_a_failed_request(stack, load):
    """New replicas first, then the old ones go, as DEPLOYMENT.md says. Nobody notices."""
    old = stack.containers("api")
    stack.compose("up", "-d", "--no-deps", "--no-recreate", "--scale=api=4", "api")
    stack.wait_healthy()
    docker("stop", "-t", "45", *old)
    docker("rm", *old)
    stack.compose("up", "-d", *stack.services)
    stack.wait_healthy()
    load.wait_for(5)
    assert load.failures == []


def test_https_with_the_tls_file(tmp_path):
    """The trial certificate of DEPLOYMENT.md; HTTP leads to HTTPS."""
    folder = tmp_path / "tls"
    folder.mkdir(mode=0o755)
    tmp_path.chmod(0o755)
    make = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    files = ["-keyout", folder / "privkey.pem", "-out", folder / "fullchain.pem"]
    subprocess.run(["openssl", *make, *files], check=True, capture_output=True)
    for file in folder.iterdir():
        file.chmod(0o644)  # the engine may run as another user; what is tested is no secret
    ports = {"HTTP_PORT": str(free_port()), "NGINX_TLS_PORT": str(free_port())}
    stack = Stack(
        tmp_path,
        f"compose-tls-{os.getpid()}",
        ("docker-compose.yml", "docker-compose.tls.yml"),
        **SETTINGS,
        **ports,
        NGINX_TLS_DIR=str(folder),
        API_REPLICAS="1",
    )
    try:
        stack.up("redis", "api", "nginx")
        secure = f"https://localhost:{ports['NGINX_TLS_PORT']}/health"
        answer = httpx2.get(secure, verify=False, trust_env=False)
        assert (answer.status_code, answer.json()["redis"]) == (200, "ok")
        assert "max-age=" in answer.headers["strict-transport-security"]
        plain = stack.http.get("/health")
        assert plain.status_code == 308
        assert plain.headers["location"].startswith("https://")
    finally:
        stack.remove()


def test_logs_are_json_lines_without_names_or_text(stack):
    for service in ("api", "worker", "nginx"):
        lines = stack.compose("logs", "--no-color", service).splitlines()
        texts = [line.partition("|")[2].strip() for line in lines if " | " in line]
        # nginx's error log has a form of its own, and a line for each refused connection.
        broken = [t for t in texts if t and not re.match(r"\{|\d{4}/\d\d/\d\d .*\[error\]", t)]
        assert broken == [], service
        assert not re.search("brown fox|secret name", "".join(texts))


def test_a_redis_password_of_any_characters_works(tmp_path):
    """And stays out of every command line."""
    password = 'p@ss:/w"ör\\d#1'
    settings = {**SETTINGS, "REDIS_PASSWORD": f"'{password}'", "API_REPLICAS": "1"}
    settings["FLOWER_PORT"] = str(free_port())
    stack = Stack(tmp_path, f"compose-password-{os.getpid()}", **settings)
    try:
        stack.up("redis", "api", "worker", "flower")
        worker = stack.containers("worker")[0]
        health = "http://127.0.0.1:9101/healthz"
        probe = f"import urllib.request as u; print(u.urlopen('{health}').status)"
        assert docker("exec", worker, "python", "-c", probe) == "200"
        for container in stack.containers():
            about = stack.inspect(container)
            assert "p@ss" not in json.dumps([about["Path"], about["Args"], about["Config"]["Cmd"]])
            assert "p@ss" not in docker("top", container)
        redis = stack.containers("redis")[0]
        assert "NOAUTH" in docker("exec", redis, "redis-cli", "ping")
    finally:
        stack.remove()


def test_sizes_of_the_images(capsys):
    """Printed for the record; the API's must stay free of the model library."""
    listed = docker("images", "--format", "{{.Repository}} {{.Size}}", "faster-whisper-api/*")
    print("\n" + listed)
    assert "faster-whisper-api/api" in listed
    command = ["run", "--rm", "--entrypoint", "python", "faster-whisper-api/api", "-c"]
    missing = "import importlib.util as u; print(u.find_spec('ctranslate2'), u.find_spec('av'))"
    assert docker(*command, missing) == "None None"


def ready(stack: Stack) -> bool:
    try:
        return bool(stack.http.get("/health/ready").status_code == 200)
    except httpx2.TransportError:
        return False
