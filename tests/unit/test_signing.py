"""Webhooks are signed so that others' libraries verify them, and nobody else can sign."""

from __future__ import annotations

import json
import multiprocessing
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from openai import InvalidWebhookSignatureError, OpenAI
from standardwebhooks import Webhook, WebhookVerificationError

from api.signing import FILE, Signer, new_secret, signer
from shared.errors import InvalidSettings
from shared.settings import Settings, load_settings
from tests.conftest import ROOT

BODY = json.dumps({"type": "transcription.completed", "data": {"text": "Grüße, 世界"}}).encode()


def settings_of(folder: Path, **given: str) -> Settings:
    return Settings(_env_file=None, data_dir=folder, **given)


def headers_of(made: Signer, owner: str = "", at: float | None = None) -> dict[str, str]:
    timestamp = int(at or time.time())
    return {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(timestamp),
        "webhook-signature": made.signature(owner, "msg_1", timestamp, BODY),
    }


def verifies(secret: str, body: bytes, headers: dict[str, str]) -> bool:
    """By two libraries, which must agree."""
    answers = []
    for verify, refusal in [
        (lambda: Webhook(secret).verify(body, headers), WebhookVerificationError),
        (
            lambda: OpenAI(api_key="-", webhook_secret=secret).webhooks.verify_signature(
                body, headers
            ),
            InvalidWebhookSignatureError,
        ),
    ]:
        try:
            verify()
            answers.append(True)
        except refusal:
            answers.append(False)
    assert len(set(answers)) == 1, answers
    return answers[0]


@pytest.mark.parametrize("owner", ["", "acme"])
def test_two_libraries_verify_what_is_signed(tmp_path, owner):
    made = signer(settings_of(tmp_path))
    assert verifies(made.secret_of(owner), BODY, headers_of(made, owner))


def test_what_was_changed_on_the_way_is_refused(tmp_path):
    made = signer(settings_of(tmp_path))
    secret, headers = made.secret_of(""), headers_of(made)
    now = int(time.time())
    assert not verifies(secret, BODY + b" ", headers)
    assert not verifies(secret, BODY, {**headers, "webhook-id": "msg_2"})
    assert not verifies(secret, BODY, {**headers, "webhook-timestamp": str(now + 1)})
    assert not verifies(secret, BODY, headers_of(made, at=now - 3600)), "a replay"
    assert not verifies(new_secret(), BODY, headers)


def test_a_caller_s_secret_signs_for_no_other_caller(tmp_path):
    made = signer(settings_of(tmp_path))
    names = ["", "acme", "globex"]
    for name in names:
        for other in names:
            assert verifies(made.secret_of(other), BODY, headers_of(made, name)) == (name == other)


def test_while_it_changes_the_old_secret_and_the_new_one_both_verify(tmp_path):
    old, new = new_secret(), new_secret()
    made = signer(settings_of(tmp_path, webhook_secret=new, webhook_secret_old=old))
    assert made.secret_of("") == new
    for owner in ("", "acme"):
        headers = headers_of(made, owner)
        for secret in (old, new):
            only = signer(settings_of(tmp_path, webhook_secret=secret))
            assert verifies(only.secret_of(owner), BODY, headers)


def test_a_secret_is_made_once_and_kept_for_its_owner_alone(tmp_path):
    first = signer(settings_of(tmp_path)).secret_of("")
    assert signer(settings_of(tmp_path)).secret_of("") == first
    assert signer(settings_of(tmp_path / "other")).secret_of("") != first
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600
    assert first not in repr(signer(settings_of(tmp_path)))


def kept(folder: Path) -> str:
    return signer(settings_of(folder)).secret_of("")


def test_processes_that_start_together_have_one_secret(tmp_path):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert len(set(pool.map(kept, [tmp_path] * 16))) == 1


def test_a_file_that_is_no_secret_is_an_error_that_names_the_setting(tmp_path):
    (tmp_path / FILE).write_text("hunter2")
    with pytest.raises(InvalidSettings, match="Set WEBHOOK_SECRET") as caught:
        signer(settings_of(tmp_path))
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize("value", ["hunter2", "whsec_", "whsec_c2hvcnQ=", "whsec_!", "aGk=" * 9])
def test_a_setting_that_is_no_secret_is_refused_and_not_shown(monkeypatch, tmp_path, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEBHOOK_SECRET", value)
    with pytest.raises(InvalidSettings, match=r"WEBHOOK_SECRET: must be whsec_.*--new") as caught:
        load_settings()
    assert value not in caught.value.message.replace("whsec_ and", "")


def test_a_command_shows_the_secret_and_makes_new_ones(tmp_path):
    def run(*words: str) -> str:
        command = [sys.executable, "-m", "api.webhook_secret", *words]
        environment = {"PYTHONPATH": str(ROOT), "DATA_DIR": str(tmp_path)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        return done.stdout.strip()

    made = signer(settings_of(tmp_path))
    assert run() == made.secret_of("")
    assert run("acme") == made.secret_of("acme")
    new = run("--new")
    assert signer(settings_of(tmp_path, webhook_secret=new)).secret_of("") == new
