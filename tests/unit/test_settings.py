"""Settings: one home, documented everywhere, and clear when they are wrong."""

from __future__ import annotations

import re

import pytest

from shared.errors import InvalidSettings
from shared.settings import Settings, load_settings, parse_cpus
from tests.conftest import ROOT


def test_every_setting_is_in_env_example_with_its_default():
    """A setting that nobody documents does not exist."""
    text = (ROOT / ".env.example").read_text()
    documented = dict(re.findall(r"^#?\s?([A-Z_]+)=(\S*)", text, re.MULTILINE))
    for name, field in Settings.model_fields.items():
        assert name.upper() in documented, name
        default = field.get_default()
        shown = default.get_secret_value() if hasattr(default, "get_secret_value") else default
        if name not in {"workers", "worker_http_host", "host", "redis_url"}:
            assert documented[name.upper()] == str(shown), name


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
