"""What a key looks like, what its command takes, and which address asks for which scope."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pytest

from api import keys
from api.access import METRICS, OPEN, needed
from api.docs import openapi
from api.key_store import ApiKey, Scope, make
from api.store import Limits
from shared.options import TranscriptionOptions, fingerprint
from shared.settings import Auth, Settings

CHECKSUM = "c" * 64


def test_two_keys_are_never_alike_and_are_kept_as_their_digests():
    made = [make("app", frozenset(Scope), Limits()) for _ in range(1000)]
    assert len({text for _, text in made}) == len({key.key_id for key, _ in made}) == 1000
    for key, text in made[:10]:
        assert len(text.split("_", 2)[2]) == 43, "256 bits"
        assert text not in str(key.record)
        assert text.split("_", 2)[2] not in str(key.record)


def test_a_key_is_read_as_it_was_written():
    for limits in (Limits(), Limits(5, 1000, 2, 9), Limits(jobs=1)):
        key, _ = make("a.b-c_1", frozenset({Scope.METRICS}), limits)
        assert ApiKey.of(key.key_id, {n: str(v) for n, v in key.record.items()}) == key


def test_what_is_new_is_guarded():
    for path in ("/anything", "/v1/audio/transcriptions", "/health/more", "/static", "/docs/"):
        assert needed("GET", path) is Scope.READ
        assert needed("POST", path) is Scope.SUBMIT
        assert needed("NONSENSE", path) is Scope.SUBMIT


def test_neither_a_spelling_nor_a_method_opens_what_is_guarded():
    """Those that the router takes for the same, and some that it does not."""
    for path in METRICS:
        for spelling in (path, f"{path}/", f"{path}\n", f"{path}//"):
            for method in ("GET", "HEAD", "POST"):
                assert needed(method, spelling) is Scope.METRICS
    for path in OPEN - {"/"}:
        assert needed("GET", path) is None
        for spelling in (f"{path}\n", f"{path}/", f"/{path}", path.upper(), f"{path}%2f"):
            assert needed("GET", spelling) is not None
    assert needed("GET", "/static/../metrics") is None, "StaticFiles leaves its folder for nobody"


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (keys.name, ""),
        (keys.name, "Upper"),
        (keys.name, "a b"),
        (keys.name, "a\n"),
        (keys.name, "-a"),
        (keys.name, "a" * 65),
        (keys.scopes, "submit,write"),
        (keys.scopes, ""),
        (keys.rate, "10"),
        (keys.rate, "0/minute"),
        (keys.rate, "10/week"),
        (keys.rate, "1.5/second"),
        (keys.positive, "0"),
        (keys.positive, "-1"),
        (keys.positive, "ten"),
        (keys.positive, "9999999999"),
    ],
)
def test_the_command_refuses_what_it_does_not_understand(read: Callable[[str], Any], text: str):
    with pytest.raises(argparse.ArgumentTypeError):
        read(text)


def test_the_command_understands_what_is_documented():
    assert keys.rate("600/minute") == (600, 60_000)
    assert keys.rate("1/day") == (1, 86_400_000)
    assert keys.scopes("submit, read") == {Scope.SUBMIT, Scope.READ}
    words = ["create", "--name", "shop", "--concurrent", "20", "--audio-minutes", "3000"]
    arguments = keys.parser().parse_args(words)
    assert (arguments.name, arguments.concurrent, arguments.audio_minutes) == ("shop", 20, 3000)
    assert arguments.scopes == {Scope.SUBMIT, Scope.READ}, "no more than most need"


def test_the_command_says_where_redis_should_be(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REDIS_URL", "redis://:hunter2@127.0.0.1:1/0")
    assert keys.main(["list"]) == 1
    said = capsys.readouterr().err
    assert "REDIS_URL" in said
    assert "hunter2" not in said


def test_tenants_have_fingerprints_of_their_own():
    """And what was known before there were tenants is known still."""
    options = TranscriptionOptions()
    made = {fingerprint(CHECKSUM, options, "m", tenant) for tenant in ("", "a", "b")}
    assert len(made) == 3
    assert fingerprint(CHECKSUM, options, "m") == fingerprint(CHECKSUM, options, "m", "")


@pytest.mark.parametrize(
    "origins",
    ["example.org", "https://a.org/path", "*,https://a.org", "https://*.a.org", "null", "ftp://a"],
)
def test_an_origin_is_a_scheme_and_a_host(origins):
    with pytest.raises(ValueError, match="origin"):
        Settings(_env_file=None, cors_origins=origins)


@pytest.mark.parametrize("origins", ["", "*", "https://a.org", "http://localhost:3000, https://b"])
def test_origins_are_taken_as_they_are(origins):
    assert Settings(_env_file=None, cors_origins=origins).cors_origins == origins


def test_the_document_asks_for_keys_only_where_the_service_does():
    from fastapi import FastAPI

    from api import monitoring, status, transcriptions

    app = FastAPI()
    for part in (monitoring, status, transcriptions):
        app.include_router(part.router)
    guarded = openapi(app, Auth.KEYS)
    assert set(guarded["components"]["securitySchemes"]) == {"bearer", "header"}
    assert "401" in guarded["paths"]["/status/{job_id}"]["get"]["responses"]
    assert "security" not in guarded["paths"]["/health"]["get"]
    free = openapi(app, Auth.NONE)
    assert "securitySchemes" not in free["components"]
    assert "401" not in free["paths"]["/status/{job_id}"]["get"]["responses"]
