"""The rules, their unit tests, and every query and alert against a Prometheus that scraped a run of
the real service."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from api.store import ADMIT_BELOW
from local.ports import free_port
from local.service import Service, as_environment
from shared.settings import Settings
from tests.conftest import FOX, ROOT, wait_until
from tests.deploy.monitored import (
    PROMETHEUS,
    known,
    limit,
    parsed,
    queries,
    rule_tests,
    rules,
    selectors,
)
from tests.deploy.test_grafana import replaced
from tests.e2e.conftest import QUICK, Client, running, variant

QUIET_WITHOUT_TRAFFIC = "a fresh install that nobody uses yet"
QUIET_UNDER_LOAD = "a busy service, just below every threshold"
WITHOUT_DATA = "nothing was ever scraped"
KEY_FILE = "/tmp/api_key"  # noqa: S108 - in the container, whose /tmp is its own
SECRET_FILE = "/run/secrets/prometheus_api_key"
MISSED = {"WhisperApiDown", "WhisperNoWorkers"}  # they say that something is missing

# What dcgm-exporter would say, from its documentation: no GPU is needed to run the tests.
GPU_PAGE = """\
DCGM_FI_DEV_GPU_UTIL{gpu="0",UUID="GPU-1",device="nvidia0",modelName="L4",Hostname="host"} 61
DCGM_FI_DEV_GPU_TEMP{gpu="0",UUID="GPU-1",device="nvidia0",modelName="L4",Hostname="host"} 54
DCGM_FI_DEV_FB_USED{gpu="0",UUID="GPU-1",device="nvidia0",modelName="L4",Hostname="host"} 5120
DCGM_FI_DEV_FB_FREE{gpu="0",UUID="GPU-1",device="nvidia0",modelName="L4",Hostname="host"} 17408
"""


def program(name: str) -> str:
    found = shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed (Debian package: prometheus)")
    return found


def promtool(*arguments: str | Path) -> str:
    """Its output. Fails the test when it finds something."""
    command = [program("promtool"), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- The files ------------------------------------------------------------------------------------


def with_key(folder: Path, key: str) -> None:
    """Does as deploy/prometheus/start.sh, for the configuration in that folder."""
    path = folder / "prometheus.yml"
    text = path.read_text()
    assert text.count(KEY_FILE) == 1
    path.write_text(text.replace(KEY_FILE, str(folder / "api_key")))
    (folder / "api_key").write_text(key)


def test_the_start_puts_the_key_where_the_configuration_looks_for_it(tmp_path):
    """The script as it is, with another /tmp and another program to start."""
    script = (PROMETHEUS / "start.sh").read_text()
    assert KEY_FILE in script
    assert SECRET_FILE in script
    script = script.replace(KEY_FILE, str(tmp_path / "api_key"))
    script = script.replace(SECRET_FILE, str(tmp_path / "secret")).replace("/bin/prometheus", "env")
    for environment, secret, wanted in [
        ({}, None, ""),
        ({"PROMETHEUS_API_KEY": "of the environment"}, None, "of the environment"),
        ({"PROMETHEUS_API_KEY": "of the environment"}, "of a file\n", "of a file"),
    ]:
        if secret:
            (tmp_path / "secret").write_text(secret)
        done = subprocess.run(
            ["/bin/sh", "-c", script, "start.sh"],
            env={"PATH": os.environ["PATH"], **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        assert (tmp_path / "api_key").read_text() == wanted
        assert (tmp_path / "api_key").stat().st_mode & 0o077 == 0
        assert "PROMETHEUS_API_KEY" not in done.stdout, "Prometheus itself does not see it"


def test_the_configuration_and_the_rules_are_valid(tmp_path):
    shutil.copytree(PROMETHEUS, tmp_path, dirs_exist_ok=True)
    with_key(tmp_path, "")
    said = promtool("check", "config", tmp_path / "prometheus.yml")
    assert f"{len(rules('alert'))} rules found" in said
    assert f"{len(rules('record'))} rules found" in said


@pytest.mark.parametrize("name", sorted(path.name for path in (PROMETHEUS / "tests").iterdir()))
def test_the_rules_pass_their_unit_tests(name):
    promtool("test", "rules", PROMETHEUS / "tests" / name)


def test_replicas_are_found_by_dns_at_the_ports_they_listen_on():
    jobs = {job["job_name"]: job for job in parsed(PROMETHEUS / "prometheus.yml")["scrape_configs"]}
    assert set(jobs) == {"api", "worker", "flower", "prometheus", "gpu"}
    ports = {name: Settings.model_fields[field].default for name, field in PORTS.items()}
    for name, service, port in [
        ("api", "api", ports["api"]),
        ("worker", "worker", ports["worker"]),
        ("gpu", "dcgm-exporter", 9400),
    ]:
        (found,) = jobs[name]["dns_sd_configs"]
        assert (found["names"], found["type"], found["port"]) == ([service], "A", port)
    assert jobs["flower"]["static_configs"] == [{"targets": ["flower:5555"]}]


PORTS = {"api": "port", "worker": "worker_http_port"}


def test_every_metric_that_a_rule_or_its_test_names_exists():
    read = {
        found.name
        for rule in [*rules("alert").values(), *rules("record").values()]
        for found in selectors(rule["expr"])
    }
    given = {
        selectors(line["series"])[0].name for test in rule_tests() for line in test["input_series"]
    }
    assert read <= known()
    assert given <= read, "a test feeds what no rule reads"


def test_every_alert_says_what_to_do():
    """Severity, what happened, and a heading of its name in the runbooks."""
    runbooks = (ROOT / "DEPLOYMENT.md").read_text("utf-8").partition("\n## Runbooks\n")[2]
    headings = re.findall(r"^### (\w+)$", re.split(r"\n## ", runbooks)[0], re.MULTILINE)
    assert headings == list(rules("alert")), "one heading for each alert, in the same order"
    for name, alert in rules("alert").items():
        assert name.startswith("Whisper")
        assert alert["labels"] == {"severity": alert["labels"]["severity"]}
        assert alert["labels"]["severity"] in {"critical", "warning"}
        assert alert["annotations"]["runbook_url"] == f"DEPLOYMENT.md#{name.lower()}"
        assert not alert["annotations"]["summary"].endswith(".")
        assert alert["annotations"]["description"].endswith((".", "{{ end }}"))
        is_compared = ">" in alert["expr"]
        has_value = "$value | humanize" in alert["annotations"]["description"]
        assert is_compared == has_value, name


def test_redis_is_reported_full_before_jobs_are_refused():
    assert limit("WhisperRedisMemoryHigh") < ADMIT_BELOW
    said = rules("alert")["WhisperRedisMemoryHigh"]["annotations"]["description"]
    assert f"From {ADMIT_BELOW:.0%} on" in said


def test_every_alert_is_tested_both_ways():
    """It fires in a case of its own, and not before its time; it is quiet on a fresh install, on a
    busy service and without data."""
    cases: dict[str, list[tuple[str, bool]]] = {name: [] for name in rules("alert")}
    for test in rule_tests():
        for check in test.get("alert_rule_test", []):
            cases[check["alertname"]].append((test["name"], bool(check["exp_alerts"])))
    for name, seen in cases.items():
        assert (QUIET_WITHOUT_TRAFFIC, False) in seen, name
        assert (QUIET_UNDER_LOAD, False) in seen, name
        assert (WITHOUT_DATA, name in MISSED) in seen, name
        own = {case for case, fires in seen if fires} - {WITHOUT_DATA}
        assert own, name
        assert own & {case for case, fires in seen if not fires}, f"{name}: too early is no case"


def test_every_recording_rule_has_a_value_in_a_test():
    tested = {
        found.name
        for test in rule_tests()
        for check in test.get("promql_expr_test", [])
        for found in selectors(check["expr"])
        if check["exp_samples"]
    }
    assert set(rules("record")) <= tested


# --- A real run -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Monitored:
    """A service with two API replicas, and the Prometheus that scrapes it every second."""

    service: Service
    replicas: tuple[Client, Client]
    prometheus: httpx2.Client
    when_fresh: dict[str, list[float]] = field(default_factory=dict, repr=False)
    """What tiles and alerts said before the first job, by expression."""

    def query(self, expression: str) -> list[float]:
        answer = self.prometheus.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", (expression, answer)
        return [float(sample["value"][1]) for sample in answer["data"]["result"]]

    def has_scraped_since(self, moment: float) -> bool:
        """Every target, twice."""
        seen = self.query('timestamp(up{job=~"api|worker|gpu"} == 1)')
        return len(seen) == 4 and min(seen) > moment + 2

    def wait_for_scrapes(self) -> None:
        now = time.time()
        wait_until(lambda: self.has_scraped_since(now), 30, "every target was scraped twice")

    def use(self, folder: Path, number: int) -> None:
        """What users do: a new job, the same again, a file that fails, one that is refused."""
        one, two = self.replicas
        fox = variant(folder / f"fox-{number}.wav", number)
        first = one.submit(fox)
        one.wait(first["job_id"])
        again = two.submit(fox)
        assert two.text(again["job_id"]) == one.text(first["job_id"])
        broken = folder / f"broken-{number}.wav"
        broken.write_bytes(FOX.read_bytes()[:44] + bytes([number]))
        one.wait(one.submit(broken)["job_id"], "failed")
        refused = two.http.post("/transcribe", files={"file": ("empty.wav", b"")})
        assert refused.json()["code"] == "empty_file", refused.text


@contextmanager
def gpu_exporter() -> Iterator[int]:
    """Serves GPU_PAGE; yields the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(GPU_PAGE.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@contextmanager
def process(command: list[str], log: Path, **options: Any) -> Iterator[None]:
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, **options) as own:
        try:
            yield
        finally:
            own.terminate()


def answers(client: httpx2.Client, path: str) -> bool:
    try:
        return client.get(path).status_code == 200
    except httpx2.TransportError:
        return False


@contextmanager
def prometheus_of(folder: Path, api_key: str = "", **targets: list[str]) -> Iterator[httpx2.Client]:
    """A real Prometheus with the committed configuration, but for two things: it scrapes each
    second, and it is told the addresses that DNS would find (of Flower none: it is not started)."""
    port = free_port()
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / name) for name in config["rule_files"]]
    for job in config["scrape_configs"]:
        job.pop("dns_sd_configs", None)
        job["static_configs"] = [{"targets": targets.get(job["job_name"], [])}]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    with_key(folder, api_key)
    command = [
        program("prometheus"),
        f"--config.file={path}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (
        process(command, folder / "prometheus.log"),
        httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client,
    ):
        wait_until(lambda: answers(client, "/-/ready"), 30, "Prometheus is ready")
        yield client


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    """The service, watched from before its first job to after its last."""
    program("prometheus")
    folder = tmp_path_factory.mktemp("monitored")
    with ExitStack() as stack:
        service = stack.enter_context(Service.in_folder(folder / "service", QUICK))
        clients = Client(service), Client(service)
        other = free_port()
        clients[1].http = httpx2.Client(base_url=f"http://127.0.0.1:{other}", trust_env=False)
        for client in clients:
            stack.enter_context(client.http)
        own = {"PYTHONPATH": str(ROOT), **as_environment(service.settings), "PORT": str(other)}
        replica = [sys.executable, "-m", "api"]
        environment = {**os.environ, **own}
        stack.enter_context(
            process(replica, folder / "replica.log", env=environment, cwd=service.settings.data_dir)
        )
        gpu = stack.enter_context(gpu_exporter())
        prometheus = stack.enter_context(
            prometheus_of(
                folder,
                api=[service.base_url.removeprefix("http://"), f"127.0.0.1:{other}"],
                worker=[service.worker_url.removeprefix("http://")],
                gpu=[f"127.0.0.1:{gpu}"],
            )
        )
        service.wait_ready(60)
        wait_until(lambda: answers(clients[1].http, "/health/ready"), 30, "the second replica")
        watched = Monitored(service, clients, prometheus)
        watched.wait_for_scrapes()
        for _, panel, expression in queries():
            if panel["type"] != "timeseries":
                watched.when_fresh[expression] = watched.query(replaced(expression))
        for alert in rules("alert").values():
            watched.when_fresh[alert["expr"]] = watched.query(alert["expr"])
        # Twice, with scrapes between: a label that is new begins above 0, and has no rate yet.
        watched.use(folder, 1)
        watched.wait_for_scrapes()
        watched.use(folder, 2)
        watched.wait_for_scrapes()
        yield watched


def is_shown(values: list[float]) -> bool:
    return bool(values) and not any(math.isnan(value) or math.isinf(value) for value in values)


def test_every_panel_has_data_after_the_run(monitored):
    empty = [
        f"{name}: {panel['title']}: {expression}"
        for name, panel, expression in queries()
        if not is_shown(monitored.query(replaced(expression)))
    ]
    assert empty == []


def test_every_tile_of_a_fresh_install_shows_a_number(monitored):
    """Before the first job: 0, not 'No data' and not NaN."""
    tiles = [e for _, panel, e in queries() if panel["type"] != "timeseries"]
    assert len(tiles) > 20
    assert [tile for tile in tiles if not is_shown(monitored.when_fresh[tile])] == []


@pytest.mark.parametrize("name", rules("alert"))
def test_no_alert_is_near_on_a_service_that_is_well(monitored, name):
    """Neither fresh nor after some use would its clock begin to run."""
    usage = shutil.disk_usage(monitored.service.settings.data_dir)
    if name == "WhisperDiskFilling" and usage.used / (usage.used + usage.free) > limit(name):
        pytest.skip("this machine's disk is full enough for the alert")
    expression = rules("alert")[name]["expr"]
    assert monitored.when_fresh[expression] == []
    assert monitored.query(expression) == []


def test_every_recording_rule_has_a_value(monitored):
    for name in rules("record"):
        assert is_shown(monitored.query(name)), name


def test_prometheus_evaluates_every_rule_without_error(monitored):
    groups = monitored.prometheus.get("/api/v1/rules").json()["data"]["groups"]
    health = {
        rule["name"]: (rule["health"], rule.get("lastError")) for g in groups for rule in g["rules"]
    }
    assert set(health) == {*rules("alert"), *rules("record")}
    assert set(health.values()) == {("ok", None)}


@pytest.mark.parametrize(
    ("dashboard", "title", "wanted"),
    [
        ("overview", "API replicas", 2),
        ("overview", "Warm workers", 1),  # each replica reports it: max, not sum
        ("overview", "Redis", 1),
        ("overview", "Failed", 0.5),  # 2 of 4 transcriptions
        ("overview", "Server errors", 0),
        ("overview", "Waiting now", 0),
        ("overview", "Firing alerts", 0),
        ("workers", "Slots", len(os.sched_getaffinity(0))),
        ("workers", "Models", 1),
    ],
)
def test_a_tile_says_what_happened(monitored, dashboard, title, wanted):
    (expression,) = [
        e for name, panel, e in queries() if (name, panel["title"]) == (dashboard, title)
    ]
    assert monitored.query(replaced(expression)) == [pytest.approx(wanted, abs=0.01)]


def test_the_counters_say_what_happened(monitored):
    """Both replicas together, as Prometheus adds them up."""
    by_result = {
        result: sum(monitored.query(f'whisper_cache_requests_total{{result="{result}"}}'))
        for result in ("miss", "hit", "joined")
    }
    assert by_result == {"miss": 4, "hit": 2, "joined": 0}
    assert sum(monitored.query('whisper_jobs_rejected_total{reason="empty"}')) == 2
    assert sum(monitored.query("whisper_job_errors_total")) == 2


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("guarded")
    with running(folder, {**QUICK, "auth": "keys"}) as service:
        yield service


@pytest.mark.parametrize("is_known", [True, False])
def test_the_api_is_scraped_with_a_key_where_it_asks_for_one(guarded, tmp_path, is_known):
    key = "fwa_unknown"
    if is_known:
        words = ["create", "--name", "prometheus", "--scopes", "metrics"]
        made = subprocess.run(
            [sys.executable, "-m", "api.keys", *words],
            env={**os.environ, "PYTHONPATH": str(ROOT), "REDIS_URL": guarded.redis_url},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        key = made.stdout
    target = guarded.base_url.removeprefix("http://")
    with prometheus_of(tmp_path, key, api=[target]) as prometheus:
        asked = {"query": 'up{job="api"}'}

        def scraped() -> list[Any]:
            answer = prometheus.get("/api/v1/query", params=asked).json()
            return list(answer["data"]["result"])

        (up,) = wait_until(scraped, 30, "it was scraped")
        assert up["value"][1] == ("1" if is_known else "0")


def test_redis_memory_is_that_of_the_server(monitored):
    """`make run` gives it 512 MiB."""
    (most,) = set(monitored.query('whisper_store_memory_bytes{kind="max"}'))
    assert most == 512 * 1024 * 1024
    assert all(
        0 < used < most for used in monitored.query('whisper_store_memory_bytes{kind="used"}')
    )
