"""`make run`: the service in the foreground, until Ctrl-C."""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from pathlib import Path

from local.lock import DataLock
from local.ports import free_port, why_not
from local.processes import CannotRun
from local.redis_server import why_silent, without_password
from local.service import ROOT, START_SECONDS, Service
from local.supervisor import EXIT_CONFIG, StopRequested, StopSignals
from shared.errors import InvalidSettings
from shared.settings import DEMO_MODEL, Settings, load_settings

SAMPLE = ROOT / "samples" / "quick-brown-fox.wav"


def run() -> int:
    """Returns the exit status; everything that it started is gone by then."""
    stop_signals = StopSignals()
    stop_signals.install()
    try:
        settings = read_settings()
        with DataLock(settings.data_dir) as lock:
            settings = check_addresses(settings)
            with Service(settings, lock_fd=lock.fd, say=say, stop_signals=stop_signals) as service:
                serve(service)
        say("Stopped.")
    except StopRequested:
        say("Stopped.")
    except CannotRun as exc:
        print(exc.message, file=sys.stderr)
        return exc.exit_status
    except InvalidSettings as exc:
        print(exc.message, file=sys.stderr)
        return EXIT_CONFIG
    return 0


def serve(service: Service) -> None:
    model = service.settings.model_size
    fetched = "" if model == DEMO_MODEL else "; the first run may have to fetch it"
    say(f"Starting the API and a worker with the model {model}{fetched}.")
    service.wait_ready(START_SECONDS, "API", restart=True)
    service.wait_ready(math.inf, restart=True)
    say(welcome(service))
    service.supervisor.watch()
    say("Stopping; running transcriptions may finish. Ctrl-C again stops at once.")


def read_settings() -> Settings:
    """The settings of this folder; the demo model unless the user chose one."""
    settings = load_settings()
    if "model_size" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"model_size": DEMO_MODEL})


def check_addresses(settings: Settings) -> Settings:
    """Says what is in the way before anything is started; chooses ports where the user did not."""
    if settings.port == 0:
        settings = settings.model_copy(update={"port": free_port()})
    if why := why_not(settings.host, settings.port):
        raise CannotRun(
            f"PORT {settings.port} on {settings.host} can't be used: {why}. Stop what uses it, or "
            f"choose another: PORT={_another(settings.port)} make run"
        )
    if why := why_not(settings.worker_http_host, settings.worker_http_port):
        if "worker_http_port" in settings.model_fields_set and settings.worker_http_port != 0:
            raise CannotRun(f"WORKER_HTTP_PORT {settings.worker_http_port} can't be used: {why}.")
        settings = settings.model_copy(update={"worker_http_port": 0})
    if settings.worker_http_port == 0:
        settings = settings.model_copy(update={"worker_http_port": free_port()})
    url = settings.redis_url.get_secret_value()
    if "redis_url" in settings.model_fields_set and (why := why_silent(url)):
        raise CannotRun(
            f"REDIS_URL is set to {without_password(url)}, where no Redis answers: {why}. Start "
            "that Redis; or remove REDIS_URL (look in .env, too), and one is started for you."
        )
    return settings


def _another(port: int) -> int:
    return port + 1 if port < 65_535 else port - 1


def welcome(service: Service) -> str:
    settings, url = service.settings, service.base_url
    model = settings.model_size
    if model == DEMO_MODEL:
        model += " (knows only a synthetic voice; for real speech: MODEL_SIZE=base make run)"
    redis = without_password(service.redis_url)
    sample = SAMPLE.relative_to(ROOT) if Path.cwd() == ROOT else SAMPLE
    return f"""
The service is ready.

  API      {url}
  Try it   {url}/docs
  or       curl -F "file=@{sample}" {url}/transcribe
  Metrics  {url}/metrics  {service.worker_url}/metrics
  Model    {model}
  State    {settings.data_dir}  (Redis: {redis})

Ctrl-C stops it.
"""


def say(text: str) -> None:
    """Prints; a terminal that is gone is no reason to stop stopping."""
    with suppress(OSError):
        print(text, flush=True)
