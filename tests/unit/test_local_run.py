"""What `make run` decides and says before it starts anything, and the settings it hands down."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from local.lock import DataLock
from local.ports import free_port, reachable, why_not
from local.processes import CannotRun
from local.run import check_addresses, read_settings
from local.service import IsolatedSettings, Service, as_environment
from shared.settings import Settings
from tests.conftest import ROOT


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No .env but a test's own."""
    monkeypatch.chdir(tmp_path)


def test_the_model_is_the_demo_unless_the_user_chose_one():
    """So the first `make run` needs no download."""
    assert read_settings().model_size == "demo"


def test_a_model_in_the_environment_is_taken(monkeypatch):
    """Also when it is the service's own default."""
    monkeypatch.setenv("MODEL_SIZE", "base")
    assert read_settings().model_size == "base"


def test_a_model_in_dotenv_is_taken():
    """Where the README says settings go."""
    Path(".env").write_text("MODEL_SIZE=base\n")
    assert read_settings().model_size == "base"


def test_a_port_in_use_is_said_with_a_way_out(taken_port):
    """Nothing is started then."""
    with pytest.raises(CannotRun) as caught:
        check_addresses(IsolatedSettings(port=taken_port))
    assert caught.value.message == (
        f"PORT {taken_port} on 127.0.0.1 can't be used: Address already in use. Stop what uses "
        f"it, or choose another: PORT={taken_port + 1} make run"
    )


def test_port_0_means_any():
    """As everywhere; the address that is printed has the real one."""
    assert check_addresses(IsolatedSettings(port=0)).port > 0


def test_a_workers_port_that_nobody_chose_gives_way(taken_port):
    """Two services on one machine need no second setting."""
    settings = IsolatedSettings(port=free_port()).model_copy(
        update={"worker_http_port": taken_port}
    )
    settings.model_fields_set.discard("worker_http_port")
    assert check_addresses(settings).worker_http_port not in {0, taken_port}


def test_a_workers_port_that_the_user_chose_does_not(taken_port):
    """Somebody scrapes it."""
    with pytest.raises(CannotRun, match=f"WORKER_HTTP_PORT {taken_port} can't be used"):
        check_addresses(IsolatedSettings(port=free_port(), worker_http_port=taken_port))


def test_a_redis_url_without_a_redis_is_said_without_its_password():
    """And the way to a Redis of our own, because .env may hold one for containers."""
    url = f"redis://:hidden@127.0.0.1:{free_port()}/0"
    with pytest.raises(CannotRun) as caught:
        check_addresses(IsolatedSettings(port=free_port(), redis_url=url))
    assert "remove REDIS_URL" in caught.value.message
    assert "hidden" not in caught.value.message


def test_a_host_that_is_not_ours_is_said():
    """192.0.2.0/24 belongs to documentation."""
    assert why_not("192.0.2.1", 8000)


@pytest.mark.parametrize(
    ("host", "printed"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]")],
)
def test_a_server_on_all_addresses_is_reached_on_this_machines(host, printed):
    """A browser can't open 0.0.0.0."""
    assert reachable(host) == printed


def test_every_process_gets_exactly_the_settings_that_were_checked(monkeypatch, tmp_path):
    """They travel as variables; whatever comes back from there must be what went in."""
    given = IsolatedSettings(
        model_size="large-v3",
        device="cuda",
        compute_type="int8_float16",
        redis_url="redis://:secret@127.0.0.1:1/0",
        data_dir=tmp_path / "a folder",
        worker_cpus="0-1",
        reap_interval_seconds=0.5,
    )
    for name, value in as_environment(given).items():
        monkeypatch.setenv(name, value)
    assert Settings(_env_file=None).model_dump() == given.model_dump()


def test_a_service_apart_does_not_see_the_users_settings(monkeypatch, tmp_path):
    """The demo and the tests are the same on every machine."""
    monkeypatch.setenv("MODEL_SIZE", "large-v3")
    Path(".env").write_text("WORKERS=7\nREDIS_URL=redis://example.invalid/0\n")
    settings = Service.in_folder(tmp_path / "apart", {"LEASE_SECONDS": "9"}).settings
    assert (settings.model_size, settings.workers, settings.lease_seconds) == ("demo", 1, 9)
    assert settings.redis_url.get_secret_value().startswith("redis://:")
    assert settings.data_dir == tmp_path / "apart" / "data"


def test_a_second_run_on_one_folder_is_refused(tmp_path):
    """Two Redis servers would write one file; the sentence names who holds it."""
    with DataLock(tmp_path):
        with pytest.raises(CannotRun) as caught, DataLock(tmp_path):
            pass
        assert f"already runs on {tmp_path} (process {os.getpid()})" in caught.value.message


def test_a_folder_is_free_again_after_a_run(tmp_path):
    """Also after a crash: the lock is the kernel's, the file may stay."""
    with DataLock(tmp_path):
        pass
    with DataLock(tmp_path) as lock:
        assert lock.path.read_text() == f"{os.getpid()}\n"


def hold(folder: Path, seconds: str) -> subprocess.Popen[bytes]:
    """What a killed launcher leaves: its pid in the file, and the lock with its Redis."""
    launcher = subprocess.Popen(["true"])
    launcher.wait()
    (folder / "lock").write_text(str(launcher.pid))
    fd = os.open(folder / "lock", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    left = subprocess.Popen(["sleep", seconds], pass_fds=[fd])
    os.close(fd)
    return left


def test_what_a_killed_run_left_gets_time_to_end(tmp_path):
    """Its Redis still writes when the user starts again at once."""
    with hold(tmp_path, "0.5") as left, DataLock(tmp_path):
        assert left.poll() is not None or left.wait(1) == 0


def test_a_redis_that_a_killed_run_left_for_good_is_said(tmp_path, monkeypatch):
    """Where no kernel ends it for us (macOS), the user can."""
    monkeypatch.setattr("local.lock.LEFTOVER_SECONDS", 0.2)
    with hold(tmp_path, "600") as left:
        try:
            with pytest.raises(CannotRun, match=r"was killed.*kill \$\(cat"), DataLock(tmp_path):
                pass
        finally:
            left.kill()


def test_a_data_dir_that_can_not_be_made_is_said(tmp_path):
    """With the path, so that the user sees which one."""
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CannotRun, match=r"DATA_DIR can't be used: .*file"),
        DataLock(tmp_path / "file" / "data"),
    ):
        pass


def test_an_invalid_setting_ends_with_its_sentence_and_78(tmp_path):
    """Before anything is started, so no process has to say it."""
    ended = subprocess.run(
        [sys.executable, "-m", "local", "run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DEVICE": "tpu", "DATA_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (78, "")
    assert ended.stderr.startswith("Invalid settings: DEVICE: ")
    assert ended.stderr.count("\n") == 1
