"""The whole service on this machine: Redis, the API and a worker, from one Settings.

`make run`, `make demo` and the end-to-end tests start the same thing here; they differ only in
where its state is, in what it prints to, and in whether somebody restarts what ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Mapping
from ctypes.util import find_library
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import SecretStr
from pydantic_settings import PydanticBaseSettingsSource

from local.ports import free_port, reachable
from local.processes import Spec
from local.redis_server import RedisServer, find_binary
from local.supervisor import StopSignals, Supervisor
from shared.settings import DEMO_MODEL, Settings

ROOT = Path(__file__).parent.parent
START_SECONDS = 30  # Redis and the API; a worker may have a model to fetch
API_STOP_SECONDS = 35  # uvicorn waits 30 s for open requests
HANDBACK_SECONDS = 20  # beyond DRAIN_SECONDS: to give work back, and to leave

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class IsolatedSettings(Settings):
    """Settings from what it is given alone, whatever the environment and .env say."""

    @classmethod
    def settings_customise_sources(  # type: ignore[override]  # it is called with these names
        cls, _: object, init_settings: PydanticBaseSettingsSource, **__: object
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


class Service:
    """A context manager: entering starts Redis and then everything else, leaving stops it all.

    Processes are named `Redis`, `API`, `worker`, and `worker-2`... for added ones.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
        cwd: Path | None = None,
        lock_fd: int | None = None,
        say: Callable[[str], None] = lambda _: None,
        stop_signals: StopSignals | None = None,
    ):
        """Starts a Redis of its own unless `settings` was given a redis_url.

        `environment`: variables that are no settings, for every process. `log`: a file for the
        output of API and workers; None: the terminal.
        """
        settings = settings.model_copy(update={"data_dir": settings.data_dir.absolute()})
        self._redis: RedisServer | None = None
        if "redis_url" not in settings.model_fields_set:
            self._redis = RedisServer(settings.data_dir, find_binary())
            settings = settings.model_copy(update={"redis_url": SecretStr(self._redis.url)})
        self.settings = settings
        self.supervisor = Supervisor(say=say, stop_signals=stop_signals)
        self._environment = environment or {}
        self._log = log
        self._cwd = cwd
        self._lock_fd = lock_fd
        self._worker_ports: dict[str, int] = {}

    @classmethod
    def in_folder(
        cls,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        stop_signals: StopSignals | None = None,
    ) -> Self:
        """A service apart: state in `folder`, free ports, the demo model, settings at their
        defaults except for those in `environment`; the output goes to <folder>/service.log."""
        folder.mkdir(parents=True, exist_ok=True)
        given = {name.lower(): value for name, value in (environment or {}).items()}
        ours = {name: value for name, value in given.items() if name in Settings.model_fields}
        defaults: dict[str, Any] = {
            "data_dir": folder / "data",
            "port": free_port(),
            "worker_http_port": free_port(),
            "model_size": DEMO_MODEL,
        }
        return cls(
            IsolatedSettings(**defaults | ours),
            environment={n: v for n, v in (environment or {}).items() if n.lower() not in ours},
            log=folder / "service.log",
            cwd=folder,  # no .env here
            stop_signals=stop_signals,
        )

    @property
    def base_url(self) -> str:
        return f"http://{reachable(self.settings.host)}:{self.settings.port}"

    @property
    def worker_url(self) -> str:
        return self.worker_url_of("worker")

    def worker_url_of(self, name: str) -> str:
        return f"http://{reachable(self.settings.worker_http_host)}:{self._worker_ports[name]}"

    @property
    def redis_url(self) -> str:
        return self.settings.redis_url.get_secret_value()

    def popen(self, name: str) -> subprocess.Popen[bytes]:
        """The process as it runs now; another one after a restart."""
        popen = self.supervisor.processes[name].popen
        assert popen is not None, f"{name} was never started"
        return popen

    def __enter__(self) -> Self:
        """Raises CannotRun when something does not start, and leaves nothing running then."""
        try:
            if self._redis:
                self.supervisor.add(self._redis.spec(self._lock_fd))
                self.supervisor.wait_ready(START_SECONDS)
            self.supervisor.add(self._api_spec())
            self._add_worker("worker", self.settings.worker_http_port)
        except BaseException:
            self.supervisor.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.supervisor.stop()

    def wait_ready(self, deadline_seconds: float, *names: str, restart: bool = False) -> None:
        """See Supervisor.wait_ready."""
        self.supervisor.wait_ready(deadline_seconds, *names, restart=restart)

    def restart(self, name: str) -> None:
        """Stops a process as a deployment would, and starts it again. Does not wait for it."""
        self.supervisor.restart(name)

    def kill(self, name: str, sign: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to the process alone, as the kernel would. It stays dead: see restart."""
        self.supervisor.processes[name].send(sign)

    def add_worker(self, environment: Mapping[str, str] | None = None) -> str:
        """Starts one more worker and returns its name. `environment`: for this worker only."""
        name = f"worker-{len(self._worker_ports) + 1}"
        own = {
            n.upper() if n.lower() in Settings.model_fields else n: v
            for n, v in (environment or {}).items()
        }
        self._add_worker(name, free_port(), own)
        return name

    def last_words(self) -> str:
        """The end of the log, to print after a failure."""
        return self.supervisor.processes["API"].last_words(40)

    def _api_spec(self) -> Spec:
        url = f"{self.base_url}/health/ready"
        return Spec(
            name="API",
            argv=(sys.executable, "-m", "api"),
            env=self._environment_of(),
            ready=lambda: answers(url),
            stop_seconds=API_STOP_SECONDS,
            death_signal=signal.SIGTERM,  # with WORKERS > 1 it has processes of its own to stop
            log=self._log,
            cwd=self._cwd,
        )

    def _add_worker(self, name: str, port: int, environment: Mapping[str, str] = {}) -> None:
        self._worker_ports[name] = port
        url = f"{self.worker_url_of(name)}/healthz"
        self.supervisor.add(
            Spec(
                name=name,
                argv=(sys.executable, "-m", "worker"),
                env={
                    **self._environment_of(),
                    **allocator(),
                    "WORKER_HTTP_PORT": str(port),
                    **environment,
                },
                ready=lambda: answers(url),
                stop_seconds=self.settings.drain_seconds + HANDBACK_SECONDS,
                death_signal=signal.SIGKILL,  # nobody is left to wait for a drain
                log=self._log,
                cwd=self._cwd,
            )
        )

    def _environment_of(self) -> dict[str, str]:
        inherited = {n: v for n, v in os.environ.items() if n.lower() not in Settings.model_fields}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return {
            **inherited,
            "PYTHONPATH": path,
            **self._environment,
            **as_environment(self.settings),
        }


def allocator() -> dict[str, str]:
    """jemalloc for a worker where it is installed, as in the image: glibc gives the encoder's large
    temporaries back to the kernel each time, and fetching them again costs a third of a window."""
    library = find_library("jemalloc") if sys.platform == "linux" else None
    if library is None or "LD_PRELOAD" in os.environ:
        return {}
    return {"LD_PRELOAD": library, "MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1"}


def as_environment(settings: Settings) -> dict[str, str]:
    """All settings as variables, so that every process has exactly those that were checked here."""
    variables = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            value = value.get_secret_value()
        if isinstance(value, list | tuple | dict):
            value = json.dumps(value)
        if value is not None:
            variables[name.upper()] = str(value)
    return variables


def answers(url: str) -> bool:
    """Does GET say 200? False for everything else, silence included."""
    try:
        with _direct.open(url, timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, ValueError):  # URLError is an OSError
        return False
