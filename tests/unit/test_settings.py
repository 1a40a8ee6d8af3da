"""Settings: one home, documented everywhere, and clear when they are wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.errors import InvalidSettings
from shared.settings import Settings, load_settings, parse_cpus
from tests.conftest import ROOT

SETTINGS = {name.upper() for name in Settings.model_fields}
FIXED_BY_IMAGES = {"HOST", "PORT", "WORKER_HTTP_HOST", "WORKER_HTTP_PORT", "DATA_DIR"}
COMPOSE_FILES = ("docker-compose.yml", "docker-compose.tls.yml")


@cache
def env_example() -> tuple[dict[str, str], dict[str, str]]:
    """Names with their defaults: the settings, and what only Docker Compose reads."""
    text = (ROOT / ".env.example").read_text()
    first, mark, second = text.partition("\n# === Docker Compose only ")
    assert mark
    lines = re.compile(r"^# ([A-Z_]+)=(.*)$", re.MULTILINE)
    return dict(lines.findall(first)), dict(lines.findall(second))


def uncommented(folder: Path) -> Path:
    """A .env in that folder: .env.example with every line in force."""
    text = (ROOT / ".env.example").read_text()
    copy = folder / ".env"
    copy.write_text(re.sub(r"^# ([A-Z_]+=)", r"\1", text, flags=re.MULTILINE))
    return copy


def test_every_setting_is_in_env_example_with_its_default():
    """A setting that nobody documents does not exist."""
    documented, _ = env_example()
    assert set(documented) == SETTINGS
    for name, field in Settings.model_fields.items():
        default = field.get_default()
        shown = default.get_secret_value() if hasattr(default, "get_secret_value") else default
        assert documented[name.upper()] == str(shown), name


def test_every_line_of_env_example_has_a_comment_before_it():
    lines = (ROOT / ".env.example").read_text().splitlines()
    for before, line in pairwise(lines):
        if re.match(r"# [A-Z_]+=", line):
            assert re.match(r"# (?![A-Z_]+=)", before), line


def test_a_full_copy_of_env_example_has_no_name_that_looks_like_a_mistake(monkeypatch, tmp_path):
    """What is meant for Compose must not stop `make run`, which reads the same .env."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    uncommented(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load_settings() == Settings(_env_file=None)


# --- Docker Compose -------------------------------------------------------------------------------


def compose_file(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def taken_over() -> set[str]:
    """What the Compose files pass on without a default of their own."""
    services = [s for name in COMPOSE_FILES for s in compose_file(name)["services"].values()]
    environments = [service.get("environment", {}) for service in services]
    return {name for given in environments for name, value in given.items() if value is None}


def test_every_variable_of_the_compose_files_is_in_env_example_with_their_default_and_no_other():
    settings, compose_only = env_example()
    known = settings | compose_only
    text = "".join((ROOT / name).read_text() for name in COMPOSE_FILES)
    variables = re.findall(r"\$\{([A-Z_]+)(?::-)?([^}]*)\}", text)
    assert variables
    for name, default in variables:
        assert known.get(name) == default, name
    assert set(compose_only) == ({name for name, _ in variables} | taken_over()) - SETTINGS


def test_the_gpu_file_has_no_variables_of_its_own():
    text = (ROOT / "docker-compose.gpu.yml").read_text()
    assert set(re.findall(r"\$\{(\w+)", text)) <= SETTINGS


def test_docker_compose_passes_every_setting_to_api_and_worker():
    """Those that the images fix go by their Dockerfile; where Redis is, the file itself says."""
    passed = compose_file("docker-compose.yml")["x-settings"]
    assert set(passed) == SETTINGS - FIXED_BY_IMAGES
    assert {name for name, value in passed.items() if value is not None} == {"REDIS_URL"}
    services = compose_file("docker-compose.yml")["services"]
    for service in ("api", "worker"):
        assert passed.items() <= services[service]["environment"].items()
        assert not FIXED_BY_IMAGES & set(services[service]["environment"])
    recipes = (ROOT / "Dockerfile.api").read_text() + (ROOT / "Dockerfile.worker").read_text()
    for name in FIXED_BY_IMAGES:
        assert re.search(rf"\s{name}=", recipes), name


def compose_command() -> list[str]:
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            asked = subprocess.run([*command, "version"], capture_output=True, check=False)
            if asked.returncode == 0:
                return command
    pytest.skip("neither `docker compose` nor docker-compose is installed")


def compose_config(env_file: Path, *files: str | Path) -> dict[str, Any]:
    """The project as Compose understands it. Needs no Docker engine."""
    named = [word for file in files for word in ("--file", str(file))]
    done = subprocess.run(
        [*compose_command(), "--env-file", str(env_file), *named, "config"],
        cwd=ROOT,
        env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def test_a_full_copy_of_env_example_changes_nothing_for_docker_compose(tmp_path):
    """A setting that is passed on with its default is as good as one that is not passed on."""
    empty = tmp_path / "empty.env"
    empty.touch()
    known = {name: value for part in env_example() for name, value in part.items()}
    configs = [compose_config(file, *COMPOSE_FILES) for file in (empty, uncommented(tmp_path))]
    for config in configs:
        for service in config["services"].values():
            service["environment"] = {
                name: value
                for name, value in service.get("environment", {}).items()
                if value is not None and str(value) != known.get(name)
            }
    assert configs[0] == configs[1]


# --- Reading them ---------------------------------------------------------------------------------


def test_every_setting_is_in_the_readme():
    table = (ROOT / "README.md").read_text()
    for name in Settings.model_fields:
        assert f"`{name.upper()}`" in table, name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DEVICE", "tpu"),
        ("COMPUTE_TYPE", "int4"),
        ("MAX_FILE_SIZE_MB", "0"),
        ("MODEL_SIZE", " "),
        ("REDIS_URL", "redis+cluster://a"),
        ("WORKER_CPUS", "1-x"),
        ("LOG_LEVEL", "loud"),
        ("PORT", "70000"),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_the_setting(monkeypatch, tmp_path, name, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidSettings) as caught:
        load_settings()
    assert name in caught.value.message
    assert "\n" not in caught.value.message


def test_a_typo_in_the_env_file_is_reported(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("MODEL_SIZ=tiny\nGRAFANA_ADMIN_PASSWORD=x\n")
    with pytest.raises(InvalidSettings, match="did you mean MODEL_SIZE"):
        load_settings()


def test_the_env_file_is_read_and_the_environment_wins(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("MODEL_SIZE=tiny\nWORKERS=4\nSOMETHING_ELSE=x\n")
    monkeypatch.setenv("MODEL_SIZE", "small")
    settings = load_settings()
    assert (settings.model_size, settings.workers) == ("small", 4)


def test_the_password_of_redis_is_not_shown():
    settings = Settings(_env_file=None, redis_url="redis://:hunter2@localhost/0")
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in settings.model_dump_json()


def test_core_lists():
    assert parse_cpus("0-2, 5") == {0, 1, 2, 5}
    assert parse_cpus("") == frozenset()


def test_a_lease_outlives_lost_heartbeats():
    """Two heartbeats may fail before the lease ends."""
    for lease in (3, 10, 45, 600):
        assert Settings(_env_file=None, lease_seconds=lease, reap_interval_seconds=1)
        settings = Settings(_env_file=None, lease_seconds=lease, reap_interval_seconds=1)
        assert settings.heartbeat_seconds * 3 <= lease


@pytest.mark.parametrize(
    ("url", "password", "wanted"),
    [
        ("redis://redis:6379/0", 'p@s/"', "redis://:p%40s%2F%22@redis:6379/0"),
        ("redis://:own@redis:6379/0", "other", "redis://:own@redis:6379/0"),
        ("redis://redis:6379/0", "", "redis://redis:6379/0"),
        ("unix:///run/redis.sock", "secret", "unix:///run/redis.sock"),
    ],
)
def test_the_redis_password_goes_into_a_url_that_has_none(
    monkeypatch, tmp_path, url, password, wanted
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REDIS_URL", url)
    monkeypatch.setenv("REDIS_PASSWORD", password)
    settings = load_settings()
    assert settings.redis_url.get_secret_value() == wanted
    assert "p@s" not in repr(settings)


def test_a_password_without_a_url_changes_nothing(monkeypatch, tmp_path):
    """It is that of Compose's Redis; `make run` in the same folder starts one of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REDIS_PASSWORD", "secret")
    assert "redis_url" not in load_settings().model_fields_set


def test_a_file_among_the_secrets_is_a_setting(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shared.settings.SECRETS", tmp_path)
    (tmp_path / "redis_password").write_text("from the file\n")
    monkeypatch.setenv("REDIS_URL", "redis://redis")
    assert load_settings().redis_url.get_secret_value() == "redis://:from%20the%20file@redis"


def test_an_empty_value_means_the_default(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CPU_THREADS", "")
    assert load_settings().cpu_threads == Settings.model_fields["cpu_threads"].default
