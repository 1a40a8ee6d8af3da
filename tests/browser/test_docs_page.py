"""/docs in a real browser that can reach this service and nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator

import httpx2
import pytest

from local.service import Service
from tests.e2e.conftest import running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("service"), {}) as service:
        yield service


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_docs_page_works_without_any_other_host(service, tmp_path):
    """Swagger UI draws every endpoint and a file picker, with all other names unresolvable."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "--virtual-time-budget=20000",
        "--dump-dom",
        f"{service.base_url}/docs#/transcription/transcribe_transcribe_post",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    for path in ("/transcribe", "/status/", "/result/", "/jobs/", "/health", "/stats", "/metrics"):
        assert path in done.stdout.replace("<wbr>", "").replace("\u200b", ""), path
    assert 'type="file"' in done.stdout, "an upload needs a file picker"


def test_no_page_names_another_host(service):
    """Neither the pages nor their policy let a browser load anything from elsewhere."""
    for path in ("/docs", "/docs/errors", "/static/docs.js"):
        answer = httpx2.get(service.base_url + path, trust_env=False)
        assert answer.status_code == 200
        assert not re.findall(r"""(?:src|href|url)\s*[=:(]\s*["']?(?:https?:)?//""", answer.text)
        assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_every_error_code_has_its_place_on_the_errors_page(service):
    """The `type` of an error leads to its meaning."""
    problem = httpx2.get(service.base_url + "/status/unknown", trust_env=False).json()
    page, _, anchor = problem["type"].partition("#")
    text = httpx2.get(service.base_url + page, trust_env=False).text
    assert f'id="{anchor}"' in text
    assert 'id="no_audio_stream"' in text
