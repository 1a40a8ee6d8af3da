"""The Compose project as an operator drives it, and users who work with it all the while."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx2

from shared.settings import Settings
from tests.conftest import FOX_WORDS, ROOT, wait_until
from tests.e2e.conftest import variant

GRAFANA = "grafana/grafana:12.4.5"
PAUSE_SECONDS = 0.3  # of each of three users: nginx takes 10 submissions a second


def engine() -> str | None:
    """Why there is no Docker engine to test with; None when there is one."""
    if not shutil.which("docker"):
        return "docker is not installed"
    seen = subprocess.run(["docker", "version"], capture_output=True, text=True, check=False)
    return seen.stderr.strip() if seen.returncode else None


def compose_command() -> list[str]:
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    return ["docker-compose"] if plugin.returncode else ["docker", "compose"]


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stderr}"
    return done.stdout.strip()


class Stack:
    """A project of its own name, with settings of its own instead of those of .env."""

    def __init__(self, folder: Path, project: str, files: tuple[str, ...] = (), **environment: str):
        """`files`: Compose files, where it is not docker-compose.yml alone."""
        names = {name.upper() for name in Settings.model_fields}
        self.project = project
        self._environment = {n: v for n, v in os.environ.items() if n not in names}
        env_file = folder / "compose.env"
        env_file.write_text("".join(f"{name}={value}\n" for name, value in environment.items()))
        named = [part for file in files for part in ("-f", file)]
        self._command = [*compose_command(), *named, "-p", project, "--env-file", str(env_file)]
        self.port = int(environment.get("HTTP_PORT", 80))
        self.http = httpx2.Client(
            base_url=f"http://127.0.0.1:{self.port}", timeout=60, trust_env=False
        )

    def compose(self, *arguments: str) -> str:
        return self.piped(b"", *arguments).decode()

    def piped(self, data: bytes, *arguments: str) -> bytes:
        """What a command that reads `data` writes."""
        done = subprocess.run(
            [*self._command, *arguments],
            cwd=ROOT,
            env=self._environment,
            input=data,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, (done.stdout[-2000:] + done.stderr[-2000:]).decode()
        return done.stdout

    @property
    def services(self) -> list[str]:
        """All of them; without Grafana where its image can't be had."""
        names = self.compose("config", "--services").split()
        have = subprocess.run(["docker", "image", "inspect", GRAFANA], capture_output=True)  # noqa: PLW1510
        if have.returncode:
            have = subprocess.run(["docker", "pull", GRAFANA], capture_output=True)  # noqa: PLW1510
        return [name for name in names if name != "grafana" or have.returncode == 0]

    def up(self, *names: str, **scales: int) -> None:
        """Returns when all that was started says that it is healthy."""
        wanted = [f"--scale={name}={number}" for name, number in scales.items()]
        self.compose("up", "-d", *wanted, *(names or self.services))
        self.wait_healthy()

    def remove(self) -> None:
        self.http.close()
        self.compose("down", "--volumes", "--timeout", "5")

    def wait_healthy(self) -> None:
        def ask() -> bool:
            states = [self.inspect(c)["State"] for c in self.containers()]
            return all(state.get("Health", {}).get("Status") == "healthy" for state in states)

        wait_until(ask, 180, f"all is healthy: {self.compose('ps')}")

    def containers(self, service: str | None = None, *, also_ended: bool = True) -> list[str]:
        label = f"label=com.docker.compose.project={self.project}"
        filters = ["--filter", label]
        if service:
            filters += ["--filter", f"label=com.docker.compose.service={service}"]
        every = ["--all"] if also_ended else []
        return docker("ps", "--quiet", "--no-trunc", *every, *filters).split()

    def inspect(self, container: str) -> dict[str, Any]:
        return json.loads(docker("inspect", container))[0]

    def crash(self, container: str) -> None:
        """Kills what runs in a container, as a fault or the lack of memory would. `docker kill` is
        something else: Docker takes it for an operator's stop and restarts nothing."""
        subprocess.run(["docker", "exec", container, "sh", "-c", "kill -9 -1"], check=False)

    def query(self, expression: str) -> list[dict[str, Any]]:
        answer = httpx2.get(
            "http://127.0.0.1:9090/api/v1/query", params={"query": expression}, trust_env=False
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]["result"]

    def submit(self, path: Path, **fields: str) -> str:
        with path.open("rb") as file:
            answer = self.http.post("/transcribe", files={"file": file}, data=fields)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["job_id"])

    def wait_completed(self, job_id: str, within: float = 120) -> str:
        """The text of a job that must not fail."""

        def ask() -> bool:
            seen = self.http.get(f"/status/{job_id}").json()
            assert seen["status"] in {"queued", "processing", "completed"}, seen
            return bool(seen["status"] == "completed")

        wait_until(ask, within, f"job {job_id} completes")
        return str(self.http.get(f"/result/{job_id}").json()["text"])


@dataclass
class Load:
    """Users who submit, poll and read, each with files of its own, until told to stop; together not
    more than nginx allows one address. `failures`: every answer that was not as it should be."""

    stack: Stack
    folder: Path
    users: int = 3
    requests: int = 0
    completed: int = 0
    failures: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._use, args=(n,)) for n in range(self.users)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, more: int) -> None:
        """Until so many more jobs are done."""
        goal = self.completed + more
        wait_until(lambda: self.completed >= goal, 180, f"{more} more jobs: {self.failures}")

    def _use(self, user: int) -> None:
        number = 0
        with httpx2.Client(base_url=self.stack.http.base_url, timeout=60, trust_env=False) as http:
            while not self._stopping.is_set():
                number += 1
                path = variant(self.folder / f"user-{user}.wav", user * 1_000_000 + number)
                self._one_job(http, path)
                self._stopping.wait(PAUSE_SECONDS)

    def _one_job(self, http: httpx2.Client, path: Path) -> None:
        with path.open("rb") as file:
            answer = self._ask(http, "POST", "/transcribe", files={"file": file})
        if answer is None:
            return
        job_id = answer["job_id"]
        for _ in range(2_000):
            seen = self._ask(http, "GET", f"/status/{job_id}")
            if seen and seen["status"] not in {"queued", "processing"}:
                break
            self._stopping.wait(0.05)
        result = self._ask(http, "GET", f"/result/{job_id}")
        with self._lock:
            if result is None or result["text"].strip() != FOX_WORDS:
                self.failures.append(f"job {job_id}: {result}")
            else:
                self.completed += 1

    def _ask(
        self, http: httpx2.Client, method: str, path: str, **options: Any
    ) -> dict[str, Any] | None:
        try:
            answer = http.request(method, path, **options)
            problem = None if answer.is_success else f"{answer.status_code} {answer.text}"
        except httpx2.TransportError as exc:
            problem = repr(exc)
        with self._lock:
            self.requests += 1
            if problem:
                self.failures.append(f"{method} {path}: {problem}")
        return None if problem else answer.json()
