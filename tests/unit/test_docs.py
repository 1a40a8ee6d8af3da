"""The documents say what the code does, word by word where a word can be checked."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

import pytest
import yaml
from dotenv import dotenv_values
from prometheus_client import CollectorRegistry
from pydantic import BaseModel

import example_client
from api import docs, formats, monitoring
from api.admission import Admission
from api.deliveries import KEPT_ATTEMPTS
from api.dependencies import State
from api.forms import options_of
from api.openai.answers import Transcription
from api.openai.envelope import ErrorEnvelope
from api.openai.fields import LISTS, OF_SPEAKERS, AudioForm, asked_of
from api.openai.models import ModelList
from api.sender import ATTEMPT_ERRORS
from api.signing import Signer, written
from api.snapshot import Snapshot
from shared import metrics, schemas
from shared.job_options import (
    MAX_METADATA_BYTES,
    MAX_METADATA_DEPTH,
    JobOptions,
    Priority,
)
from shared.metrics import ApiMetrics, WorkerMetrics
from shared.options import TranscriptionOptions, VadParameters
from shared.settings import Settings, parse_pauses
from shared.storage import Storage
from tests.conftest import FOX_WORDS, ROOT
from tests.unit.test_settings import compose_config, env_example, uncommented
from worker.engine import quality
from worker.health import serve

DOCUMENTS = (
    "README.md",
    "QUICKSTART.md",
    "API_DOCS.md",
    "DEPLOYMENT.md",
    "SECURITY.md",
    "CHANGELOG.md",
)
SOURCES = ("api", "worker", "shared", "local")
FOLDERS = (*SOURCES, "samples", "docs", "tests", "tools", "requirements", "bench", "deploy")
EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u27bf\u2b00-\u2bff\ufe0f]")


@cache
def text_of(name: str | Path) -> str:
    return (ROOT / name).read_text("utf-8")


def every_markdown_file() -> list[Path]:
    """Those of the project, not of what is installed or built."""
    return sorted(
        path
        for path in ROOT.rglob("*.md")
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    )


def ours() -> list[Path]:
    return [ROOT / name for name in DOCUMENTS] + sorted((ROOT / "docs").rglob("*.md"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, *languages: str) -> list[str]:
    """The fenced code blocks of a document in one of these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(path), re.MULTILINE | re.DOTALL)
    return [body for language, body in found if language in languages]


def prose(path: Path) -> str:
    return re.sub(r"^```.*?^```$", "", text_of(path), flags=re.MULTILINE | re.DOTALL)


def rows(name: str, heading: str) -> dict[str, list[str]]:
    """The table under a heading: first cell (unquoted) -> all cells."""
    _, found, rest = text_of(name).partition(f"\n{heading}\n")
    assert found, f"{name} has no heading {heading}"
    section = re.split(r"^#", rest, maxsplit=1, flags=re.MULTILINE)[0]
    return cells_of(section)


def cells_of(section: str) -> dict[str, list[str]]:
    table = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            table[cells[0].strip("`")] = cells
    return table


def shown(value: object) -> str:
    """A default as the documents write it."""
    if value is None:
        return "`none`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{','.join(str(part) for part in value)}`"
    return f"`{value}`"


def commands() -> Iterator[tuple[str, list[str]]]:
    """(document, words) of every command in the shell blocks, continuation lines joined."""
    for path in ours():
        for line in "\n".join(blocks(path, "bash")).replace("\\\n", " ").splitlines():
            for part in re.split(r"\s\|\s|\$\(", line):
                if words := shlex.split(part.rstrip(")"), comments=True):
                    yield name_of(path), words


# --- The API --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def routes() -> set[str]:
    """`GET /status/{job_id}` and so on. In a process of its own: an app registers its metrics."""
    script = """
import json
from api.app import create_app
from shared.settings import Settings

def endpoints(routes):
    for route in routes:
        if getattr(route, "methods", None):
            path = getattr(route, "path_format", route.path)
            yield from (f"{method} {path}" for method in route.methods - {"HEAD"})
        elif hasattr(route, "path") and hasattr(route, "app"):
            yield f"MOUNT {route.path}"
        else:
            yield from endpoints(getattr(route, "routes", None) or route.original_router.routes)

print(json.dumps(sorted(endpoints(create_app(Settings(_env_file=None)).routes))))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout))


def test_every_endpoint_is_in_api_docs_and_nothing_else(routes):
    text = text_of("API_DOCS.md")
    documented = {
        f"{method} {path.partition('?')[0]}"
        for method, path in re.findall(r"`(GET|POST|PUT|PATCH|DELETE) (/[^`\s]*)`", text)
    }
    mounts = {route.removeprefix("MOUNT ") for route in routes if route.startswith("MOUNT")}
    assert documented == {route for route in routes if not route.startswith("MOUNT")}
    assert all(f"`{mount}`" in text for mount in mounts)


TYPES = {
    str: "text",
    bool: "boolean",
    int: "integer",
    float: "number",
    VadParameters: "JSON object",
}


def shown_type(annotation: Any) -> str:
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] or [annotation]
    if get_origin(annotation) is tuple:
        return "number or comma list"
    if get_origin(annotation) is Literal:
        return "text"
    return TYPES[kinds[0]]


def shown_range(annotation: Any, metadata: list[Any]) -> str:
    limits = {
        name: str(getattr(item, name)).removesuffix(".0")
        for item in metadata
        for name in ("ge", "gt", "le", "min_length", "max_length")
        if getattr(item, name, None) is not None
    }
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"{limits['min_length']} to {limits['max_length']} of them, each 0 to 1"
    if "max_length" in limits:
        return f"up to {limits['max_length']} characters"
    if "gt" in limits:
        return f"above {limits['gt']}, up to {limits['le']}"
    return f"{limits['ge']} to {limits['le']}" if "ge" in limits else ""


@pytest.mark.parametrize(
    ("model", "first", "last"),
    [
        (TranscriptionOptions, "| Field | Type |", "Booleans are"),
        (VadParameters, "| Name | Type |", "```bash"),
        (formats.Writing, "| Parameter | Type |", "```bash"),
    ],
)
def test_every_field_is_documented_with_its_type_range_and_default(model, first, last):
    """Of forms, and of the query that formats take; `format` has a table of its own."""
    section = text_of("API_DOCS.md").partition(first)[2].partition(last)[0]
    documented = cells_of(section)
    fields = {name: field for name, field in model.model_fields.items() if name != "format"}
    assert list(documented) == list(fields)
    for name, field in fields.items():
        _, kind, limits, default, meaning = documented[name]
        assert kind == shown_type(field.annotation), name
        assert limits == shown_range(field.annotation, field.metadata), name
        assert default == shown(field.default), name
        assert meaning, name


def test_every_field_of_the_job_is_documented():
    documented = rows("API_DOCS.md", "### Fields of the job")
    assert list(documented) == list(JobOptions.model_fields)
    assert documented["priority"][1] == ", ".join(f"`{each}`" for each in Priority)
    for name, value in JobOptions().model_dump(mode="json").items():
        assert documented[name][2] == (f"`{value}`" if value != "" else "empty"), name
    assert str(MAX_METADATA_BYTES) in documented["metadata"][3]
    assert f"{MAX_METADATA_DEPTH} levels" in documented["metadata"][3]


def test_the_fields_of_every_answer_are_documented():
    for heading, model in [
        ("## Submit a file", schemas.JobAccepted),
        ("## Submit many files", schemas.BatchAccepted),
        ("## Ask how far it is", schemas.JobView),
    ]:
        words = {word for cell in rows("API_DOCS.md", heading) for word in re.findall(r"\w+", cell)}
        assert words == fields_of(model), heading
    words = {
        word
        for cells in rows("API_DOCS.md", "## Get the transcript").values()
        for word in re.findall(r"`(\w+)`", cells[0])
    }
    assert words == set(schemas.Transcript.model_fields)


def test_the_fields_of_a_segment_are_documented():
    cells = rows("API_DOCS.md", "### Segments").values()
    assert {word for row in cells for word in re.findall(r"`(\w+)`", row[0])} == set(
        schemas.Segment.model_fields
    )
    said = next(row[1] for row in cells if row[0] == "`words`")
    assert set(schemas.Word.model_fields) <= set(re.findall(r"`(\w+)`", said))


def test_every_warning_is_documented_with_its_threshold():
    documented = rows("API_DOCS.md", "### Warnings")
    assert set(documented) == set(get_args(schemas.WarningCode)) == set(quality.MESSAGES)
    for code, figures in {
        "low_language_confidence": [quality.MIN_LANGUAGE_PROBABILITY],
        "possible_repetition": [quality.MAX_COMPRESSION_RATIO],
        "possible_hallucination": [quality.MAX_NO_SPEECH_PROB, int(quality.MIN_AVG_LOGPROB)],
    }.items():
        assert all(str(figure) in documented[code][1] for figure in figures), code
    assert quality.REPEATS == 4, "in words: four segments in a row"


def test_the_fields_and_errors_of_webhooks_are_documented():
    section = text_of("API_DOCS.md").partition("\n## Webhooks\n")[2].partition("\n## ")[0]
    of_answer = cells_of(section.partition("| Field | Meaning |")[2].partition("| Error of")[0])
    assert list(of_answer) == list(schemas.JobWebhook.model_fields)
    assert str(KEPT_ATTEMPTS) in of_answer["attempts"][1]
    errors = cells_of(section.partition("| Error of an attempt |")[2])
    assert set(errors) == set(ATTEMPT_ERRORS)
    settings = Settings(_env_file=None)
    pauses = parse_pauses(settings.webhook_retry_seconds)
    assert f"within {settings.webhook_timeout_seconds:g} seconds" in section
    assert len(pauses) == 9
    assert "ten attempts in about 23 hours" in section
    assert 22.5 * 3600 < sum(pauses) < 23.5 * 3600
    assert max(pauses) == 12 * 3600


def test_the_verification_that_is_shown_verifies():
    """And refuses: it is copied."""
    (block,) = [b for b in blocks(ROOT / "API_DOCS.md", "python") if "def is_genuine" in b]
    names: dict[str, Any] = {}
    exec(block, names)  # noqa: S102 - it is our own
    is_genuine, body = names["is_genuine"], '{"a": "ü"}'.encode()
    made = Signer((b"k" * 32, b"o" * 32))

    def headers(at: float) -> dict[str, str]:
        return {
            "webhook-id": "msg_1",
            "webhook-timestamp": str(int(at)),
            "webhook-signature": made.signature("", "msg_1", int(at), body),
        }

    secret, good = made.secret_of(""), headers(time.time())
    assert is_genuine(secret, good, body)
    assert is_genuine(written(b"o" * 32), good, body)
    assert not is_genuine(secret, good, body + b" ")
    assert not is_genuine(secret, {**good, "webhook-id": "msg_2"}, body)
    assert not is_genuine(secret, headers(time.time() - 3600), body)
    assert not is_genuine(written(b"x" * 32), good, body)


def test_every_status_is_documented():
    assert list(rows("API_DOCS.md", "## Life of a job")) == list(schemas.JobStatus)


def test_every_format_is_documented_with_its_content_type():
    documented = rows("API_DOCS.md", "### Formats")
    assert {name: cells[1].strip("`") for name, cells in documented.items()} == {
        str(name): media for name, media in formats.MEDIA_TYPES.items()
    }


def test_every_field_of_openai_s_form_is_documented():
    """With what becomes of it."""
    documented = rows("API_DOCS.md", "### Fields of the form")
    fields = {f"{name}[]" if name in LISTS else name for name in AudioForm.model_fields}
    assert set(documented) == fields | {"file"} | {f"{name}[]" for name in OF_SPEAKERS}
    assert {row[1] for row in documented.values()} == {"honoured", "in part", "refused"}


def error_rows() -> dict[str, list[str]]:
    headings = ("### Refused requests", "### Refused for now", "### Failed jobs")
    return {code: row for heading in headings for code, row in rows("API_DOCS.md", heading).items()}


def test_every_error_code_is_documented_with_its_status():
    expected = {code: str(status) for code, status, _ in docs.catalogue()}
    expected["http_error"] = "as sent"
    assert {code: row[1] for code, row in error_rows().items()} == expected
    assert all(row[2].endswith(".") for row in error_rows().values()), "and says what to do"


def test_codes_of_failed_jobs_are_those_that_the_metrics_count():
    documented = rows("API_DOCS.md", "### Failed jobs")
    assert {*documented, "internal_error"} == set(metrics.JOB_ERRORS)


async def test_the_type_of_an_error_leads_to_its_explanation():
    """`/docs/errors#code`: the page has that anchor, for every code in the documents."""
    page = (await docs.error_codes()).body.decode()
    for code in set(error_rows()) - {"http_error"}:
        assert f'id="{code}"' in page, code
    for _, example in examples():
        if "type" in example and "data" not in example:
            assert example["type"] == f"/docs/errors#{example['code']}"


# --- Examples -------------------------------------------------------------------------------------


def examples() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in ours():
        for block in blocks(path, "json"):
            yield name_of(path), json.loads(block)


def fields_of(model: type[BaseModel]) -> set[str]:
    """What an answer shows."""
    return {name for name, field in model.model_fields.items() if not field.exclude}


def test_every_json_example_has_the_fields_of_a_real_answer():
    """A README may shorten the result; everything else is whole."""
    models: dict[str, type[BaseModel]] = {
        "message job_id links": schemas.JobAccepted,
        "batch_id accepted": schemas.BatchAccepted,
        "next_cursor": schemas.JobPage,
        "progress": schemas.JobView,
        "segments": schemas.JobResult,
        "type data": schemas.WebhookEvent,
        "webhook_id": schemas.JobWebhook,
        "usage": Transcription,
        "error": ErrorEnvelope,
        "data": ModelList,
        "type": schemas.Problem,
        "message job_id": schemas.JobEnded,
    }
    seen = set()
    for name, example in examples():
        if "text" in example and not {"segments", "usage"} & set(example):
            assert set(example) <= set(schemas.JobResult.model_fields), (name, example)
        marks = next((m for m in models if set(m.split()) <= set(example)), None)
        if marks is None:
            continue
        model = models[marks]
        parsed = model.model_validate(example)
        rare = {"errors", "warnings"}
        assert set(example) - rare == fields_of(model) - rare, (name, example)
        assert parsed.model_dump(mode="json", exclude_unset=True) == example, (name, example)
        seen.add(model)
    assert seen == set(models.values())


def test_every_transcript_shown_is_that_of_the_sample():
    said = [example["text"] for _, example in examples() if "text" in example]
    assert said
    assert set(said) == {FOX_WORDS}
    assert f"Text: {FOX_WORDS}" in text_of("README.md")


class StoreOfOne:
    """A job store with one worker and nothing to do."""

    def __init__(self, workers: tuple[dict[str, Any], ...]):
        self.workers = workers

    async def snapshot(self) -> Snapshot:
        return Snapshot(0, 0.0, 0, {}, self.workers, slots=1, slot_seconds=1.0)


async def test_the_examples_of_health_and_stats_have_the_real_shape(tmp_path):
    health, stats, healthz = (
        next(example for _, example in examples() if mark in example)
        for mark in ("redis", "cache", "seconds_since_tick")
    )
    store: Any = StoreOfOne(tuple(stats["workers"]))
    settings = Settings(_env_file=None, data_dir=tmp_path)
    storage = Storage(tmp_path)
    admission = Admission(settings, store, storage)
    parts: Any = dict.fromkeys(field.name for field in dataclasses.fields(State)) | {
        "settings": settings,
        "store": store,
        "storage": storage,
        "admission": admission,
        "metrics": ApiMetrics(CollectorRegistry()),
    }
    state = State(**parts)
    request: Any = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(service=state)))
    assert shape(await monitoring.stats(request)) == shape(stats)
    answer: Any = SimpleNamespace(headers={})
    assert shape(await monitoring.health(request, answer)) == shape(health)
    source = (ROOT / "worker" / "app.py").read_text()
    for name in (*healthz, *set(stats["workers"][0]) - {"heartbeat_at"}):
        assert f'"{name}":' in source, name


def shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: shape(inner) for name, inner in value.items()}
    return [shape(inner) for inner in value] if isinstance(value, list) else type(value).__name__


def test_every_curl_command_asks_an_endpoint_with_fields_that_exist(routes):
    """Of `make run` on its port, of nginx on its own."""
    ports = {Settings.model_fields["port"].default, None}
    known = {*TranscriptionOptions.model_fields, *JobOptions.model_fields, "file", "url"}
    asked = 0
    for name, words in commands():
        if words[0] != "curl":
            continue
        url = urlsplit(next(word for word in words if word.startswith("http")))
        form = [words[i + 1] for i, word in enumerate(words) if word == "-F"]
        method = words[words.index("-X") + 1] if "-X" in words else "POST" if form else "GET"
        path = re.sub(r"/(\$JOB|[0-9a-f-]{36})(?=/|$)", "/{job_id}", url.path)
        if url.port == 9101:
            assert f'"{path}"' in inspect.getsource(serve), (name, words)
            continue
        assert url.hostname == "localhost", (name, words)
        assert url.port in ports, (name, words)
        assert f"{method} {path}" in routes, (name, words)
        fields = dict(part.split("=", 1) for part in form)
        sent = [words[i + 1] for i, word in enumerate(words) if word == "-d"]
        if "Content-Type: application/json" in words:
            fields = json.loads(sent[0])
        elif path == "/transcribe/by-digest":
            fields = dict(part.split("=", 1) for part in sent)
            assert fields.pop("sha256")
        if path.startswith("/v1/"):
            sent = [field for field in fields.items() if field[0] != "file"]
            assert not asked_of(sent, "transcribe", "demo").ignored
            fields = {"file": fields["file"]}
        assert set(fields) <= known, (name, words)
        fields.pop("url", None)
        upload = fields.pop("file", "@README.md")
        assert upload.startswith("@")
        assert (ROOT / upload[1:]).is_file(), (name, words)
        options_of(fields)
        asked += 1
    assert asked > 10


def test_every_shell_block_is_shell():
    for path in ours():
        for block in blocks(path, "bash"):
            subprocess.run(["bash", "-n", "-c", block], check=True)


def test_every_python_example_uses_the_client_as_it_is():
    """Names, methods and options exist; the seed's own snippet is in the README."""
    known = {*TranscriptionOptions.model_fields, *JobOptions.model_fields}
    for path in ours():
        for block in blocks(path, "python"):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and node.module == "example_client":
                    assert {alias.name for alias in node.names} <= set(example_client.__all__)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    if getattr(node.func.value, "id", "") != "client":
                        continue
                    method = getattr(example_client.WhisperClient, node.func.attr)
                    accepted = known | set(inspect.signature(method).parameters)
                    assert {keyword.arg for keyword in node.keywords} <= accepted
    listed = set(re.findall(r"^\| `(\w+)\(", text_of("API_DOCS.md"), re.MULTILINE))
    real = {name for name in vars(example_client.WhisperClient) if not name.startswith("_")}
    assert listed == real


def test_the_client_s_command_line_is_as_documented():
    for name, words in commands():
        if "example_client.py" in words:
            place = words.index("example_client.py")
            arguments = example_client._arguments(words[place + 1 :])
            assert (ROOT / arguments.file).is_file(), name
            options_of(dict(arguments.options))


# --- Settings, metrics, commands ------------------------------------------------------------------


def test_the_readme_s_table_has_every_setting_with_its_default():
    documented = rows("README.md", "## Settings")
    assert list(documented) == [name.upper() for name in Settings.model_fields]
    for name, field in Settings.model_fields.items():
        default = field.default
        secret = getattr(default, "get_secret_value", None)
        value = secret() if secret else default
        assert documented[name.upper()][1] == ("empty" if value == "" else f"`{value}`"), name


def test_a_copy_of_env_example_changes_nothing(tmp_path):
    """And so does one with every line uncommented."""
    copy = tmp_path / ".env"
    copy.write_text(text_of(".env.example"))
    assert dotenv_values(copy) == {}
    settings, compose_only = env_example()
    assert len(settings) == len(Settings.model_fields)
    assert dotenv_values(uncommented(tmp_path)) == settings | compose_only
    assert Settings(_env_file=copy) == Settings(_env_file=None)


def test_every_name_in_capitals_is_a_setting():
    """A setting that is renamed must not live on in a document."""
    others = {"HF_HOME", "JOB", "PYTHON", "SSL_CERT_FILE", "VERBOSE_JSON", "WHISPER_API_KEY"}
    others |= set(env_example()[1])
    for path in ours():
        for name in re.findall(r"`([A-Z]+(?:_[A-Z]+)+)(?:=[^`]*)?`", text_of(path)):
            assert name.lower() in Settings.model_fields or name in others, (name_of(path), name)


def test_the_limits_of_nginx_are_documented_with_their_defaults():
    documented = rows("DEPLOYMENT.md", "## Limits, and another proxy in front")
    assert len(documented) == 6
    for name, cells in documented.items():
        assert cells[1] == f"`{env_example()[1][name]}`", name


# --- Docker Compose -------------------------------------------------------------------------------


def compose_commands() -> Iterator[tuple[str, list[str]]]:
    """(document, words after `docker compose`) of every such command, in blocks and sentences."""
    inline = [
        (name_of(path), shlex.split(code))
        for path in ours()
        for code in re.findall(r"`(docker[ -]compose [^`\n]*)`", prose(path))
    ]
    for name, words in [*commands(), *inline]:
        ends = [place for place, word in enumerate(words) if word in {"<", ">", "..."}]
        kept = words[: min(ends, default=len(words))]
        if kept[:2] == ["docker", "compose"]:
            yield name, kept[2:]
        elif kept[:1] == ["docker-compose"]:
            yield name, kept[1:]


def test_every_compose_command_names_files_and_services_that_exist():
    services = set(yaml.safe_load(text_of("docker-compose.yml"))["services"])
    verbs = set()
    values = {"--scale", "--entrypoint", "--tail"}
    for name, words in compose_commands():
        files = 0
        while words[files : files + 1] == ["-f"]:
            assert (ROOT / words[files + 1]).is_file(), (name, words)
            files += 2
        verb, *rest = words[files:]
        verbs.add(verb)
        scaled = [rest[i + 1].partition("=")[0] for i, word in enumerate(rest) if word == "--scale"]
        named = [
            word
            for before, word in pairwise(["", *rest])
            if not word.startswith("-") and before not in values
        ]
        if verb in {"exec", "run"}:
            named = named[:1]
        assert set(named) | set(scaled) <= services, (name, words)
    assert {"up", "stop", "down", "exec", "run", "logs"} <= verbs


def test_compose_accepts_every_file_that_deployment_shows(tmp_path):
    """As docker-compose.override.yml, beside the file that it changes."""
    (tmp_path / "empty.env").touch()
    shown = blocks(ROOT / "DEPLOYMENT.md", "yaml")
    assert shown
    for number, block in enumerate(shown):
        added = tmp_path / f"{number}.yml"
        added.write_text(block)
        merged = compose_config(tmp_path / "empty.env", "docker-compose.yml", added)
        for name, change in yaml.safe_load(block).get("services", {}).items():
            given = merged["services"][name]
            assert change.get("environment", {}).items() <= given.get("environment", {}).items()
            assert set(change.get("networks", [])) <= set(given["networks"])


def exported() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(name, type, labels) of every metric of the API and the worker."""
    of_worker = partial(WorkerMetrics, "model", "cpu")
    for make in (ApiMetrics, of_worker, metrics.build_info):
        registry = CollectorRegistry()
        make(registry=registry)
        for collector, names in registry._collector_to_names.items():
            parent = getattr(collector, "_name", names[0])
            suffix = "_total" if collector._type == "counter" else ""
            yield parent + suffix, collector._type, collector._labelnames
    now = datetime.now(UTC).timestamp()
    snapshot = Snapshot(1, now, 1, {}, ({"warm": True},), slots=1, slot_seconds=1.0)
    for family in monitoring._FromStore(snapshot, ROOT).collect():
        yield family.name, family.type, tuple(family.samples[0].labels)


def test_every_metric_is_in_deployment_with_its_type_and_labels():
    documented = {
        (name, kind, tuple(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in re.findall(
            r"^\| `(\w+)` \| (\w+)(?:: )?([^|]*) \|", text_of("DEPLOYMENT.md"), re.MULTILINE
        )
        if "_" in name
    }
    assert documented == set(exported())


def test_the_values_of_closed_labels_are_documented():
    text = rows("DEPLOYMENT.md", "## Metrics")
    for name, values in [
        ("whisper_jobs_rejected_total", metrics.REJECTIONS.values()),
        ("whisper_cache_requests_total", metrics.OUTCOMES.values()),
        ("whisper_fetches_total", metrics.FETCH_RESULTS),
        ("whisper_webhook_deliveries_total", metrics.WEBHOOK_RESULTS),
        ("whisper_job_stage_duration_seconds", metrics.STAGES),
        ("whisper_cleanup_removed_total", metrics.CLEANED),
    ]:
        assert set(re.findall(r"`(\w+)`", text[name][2])) == set(values), name


def test_every_log_action_that_is_mentioned_exists():
    section = text_of("DEPLOYMENT.md").partition("Worth an alert:")[2].partition("##")[0]
    mentioned = re.findall(r"`(\w+)`", section)
    assert mentioned
    for action in mentioned:
        assert f'"action": "{action}"' in sources(), action


@cache
def sources() -> str:
    """All our code, with strings that go over several lines joined."""
    files = [path for folder in SOURCES for path in sorted((ROOT / folder).rglob("*.py"))]
    text = "\n".join(path.read_text() for path in [*files, ROOT / "Makefile"])
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_every_make_target_that_is_mentioned_exists_and_every_one_is_mentioned():
    makefile = text_of("Makefile")
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    mentioned = set()
    for path in [*every_markdown_file(), ROOT / ".env.example"]:
        code = re.findall(r"`([^`\n]+)`", prose(path)) + blocks(path, "bash")
        for words in re.findall(r"\bmake((?: +[A-Z]+=\S+)* +[a-z-]+)", "\n".join(code)):
            mentioned.add(words.split()[-1])
    assert mentioned | {"help"} == targets


def test_every_message_that_quickstart_quotes_is_printed_by_the_code():
    headings = re.findall(r"^####.*", text_of("QUICKSTART.md"), re.MULTILINE)
    quoted = [message for heading in headings for message in re.findall(r'"([^"]+)"', heading)]
    assert quoted
    for message in quoted:
        assert message in sources() or message == "Address already in use", message


# --- Links and files ------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)", prose(path), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = 1
        unique = slug
        while unique in found:
            unique, number = f"{slug}-{number}", number + 1
        found.add(unique)
    return found


def test_every_relative_link_and_anchor_resolves():
    for path in every_markdown_file():
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            other = (path.parent / name).resolve() if name else path
            assert other.exists(), f"{name_of(path)} links to {target}"
            if anchor:
                assert anchor in anchors(other), f"{name_of(path)} links to {target}"


def test_the_contents_of_deployment_are_its_sections():
    text = prose(ROOT / "DEPLOYMENT.md")
    listed = re.findall(r"^- \[(.*)\]\(#.*\)$", text, re.MULTILINE)
    assert listed == re.findall(r"^## (.*)", text, re.MULTILINE)


def test_every_file_that_is_mentioned_exists():
    for path in every_markdown_file():
        if "static" in path.parts:
            continue
        for word in re.findall(r"`([\w./-]+\.(?:py|md|toml|txt|lua|wav))`", prose(path)):
            first = word.partition("/")[0]
            if first in FOLDERS or ("/" not in word and word.endswith((".py", ".md", ".toml"))):
                here = path.parent / word
                assert here.exists() or (ROOT / word).exists(), f"{name_of(path)}: {word}"


def test_no_document_has_an_emoji():
    for path in [*every_markdown_file(), ROOT / ".env.example"]:
        assert not EMOJI.search(text_of(path)), name_of(path)


def test_every_decision_record_is_short_and_numbered_in_order():
    """Under a page each."""
    records = sorted((ROOT / "docs" / "adr").glob("*.md"))
    for number, path in enumerate(records, 1):
        text = text_of(path)
        assert path.name.startswith(f"{number:04}-")
        assert text.startswith(f"# {number}. ")
        assert all(f"## {part}" in text for part in ("Context", "Decision", "Consequences")), path
        assert len(text.split()) < 450, path
