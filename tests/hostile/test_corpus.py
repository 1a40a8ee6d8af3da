"""Every hostile file ends with a clear answer within its limits, in the decoder and in the whole
service, and has read nothing, reached nobody and stopped nothing."""

from __future__ import annotations

import json
import os
import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import av
import pytest

from local.service import Service
from tests.conftest import FOX, wait_until
from tests.hostile import decoded, served
from tests.hostile.canary import Canary
from tests.hostile.corpus import DECODED, Hostile, corpus
from worker.engine.decode import Decoder, Limits

WITHIN_SECONDS = 30
MEMORY_MIB = Limits().memory_bytes / 1024**2


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Canary]:
    with Canary(tmp_path_factory.mktemp("canary")) as canary:
        yield canary


@pytest.fixture(scope="module")
def files(canary: Canary, tmp_path_factory: pytest.TempPathFactory) -> list[Hostile]:
    return corpus(canary, tmp_path_factory.mktemp("encoded"))


def test_the_canaries_sing(canary, files):
    """PyAV as it is reads what playlists and references name: what follows would notice."""
    stock = {
        "concat, a neighbour": {},
        "concat, with a byte that is no text": {},
        "hls, a path": {},
        "mov, an alias": {"enable_drefs": "1", "use_absolute_path": "1"},
        "mov, an alias beside it": {"enable_drefs": "1"},
    }
    for name, options in stock.items():
        content = next(hostile.content for hostile in files if hostile.name == name)
        path = canary.folder / "upload.m3u8"
        path.write_bytes(content)
        with suppress(av.FFmpegError), av.open(str(path), options=options) as container:
            next(container.decode(audio=0))
        assert any("read canary" in touch for touch in canary.touched()), name
    with suppress(av.FFmpegError):  # nobody answers
        av.open(f"http://127.0.0.1:{canary.port}/a.wav", timeout=0.5)
    assert canary.touched() == ["connected"]


def test_the_corpus_is_large_and_names_each_file_once(files):
    assert len({(hostile.kind, hostile.name) for hostile in files}) == len(files)
    kinds = Counter(hostile.kind for hostile in files)
    assert kinds.pop("truncated") == 6 * 15
    assert kinds.pop("name") >= 20
    assert sum(kinds.values()) >= 100


def test_the_decoder_answers_each_within_its_limits(canary, files):
    """In time and memory; one server and its worker outlive them all."""
    decoder = Decoder()
    decoder.start()
    server = decoder._server._process.pid
    before = resident_mib()
    problems = []
    for hostile in files:
        answer = decoded.answer_of(decoder, hostile.content, canary.folder / "upload")
        found = [decoded.check(hostile, answer), *canary.touched()]
        found += ["took too long"] * (answer.seconds > WITHIN_SECONDS)
        found += ["took too much memory"] * (answer.peak_mib > MEMORY_MIB)
        problems += [f"{hostile.kind}: {hostile.name}: {why}" for why in found if why]
    assert problems == []
    assert decoder._server._process.pid == server
    assert resident_mib() - before < 50
    decoder.close()


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1024**2


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with Service.in_folder(folder, {"max_audio_seconds": "3600"}) as service:
        service.wait_ready(60)
        yield service


def test_the_service_answers_each_and_goes_on(service, canary, files):
    """Through HTTP, the queue and a worker: an error that says why, or a transcript."""
    plain = Hostile("plain", "fox", "nothing", FOX.read_bytes(), (DECODED,))
    assert served.serve(service, [plain], 60)[0].code == DECODED
    processes = {name: service.popen(name).pid for name in ("API", "worker")}
    before = {name: served.resident_mib(service, name) for name in processes}
    answers = served.serve(service, files, 150)
    problems = [
        f"{hostile.kind}: {hostile.name}: {why}"
        for hostile, answer in zip(files, answers, strict=True)
        if (why := served.check(hostile, answer))
    ]
    assert problems == []
    assert canary.touched() == []
    assert {name: service.popen(name).pid for name in processes} == processes
    assert all(service.popen(name).poll() is None for name in processes)
    assert served.resident_mib(service, "API") - before["API"] < 64
    assert served.resident_mib(service, "worker") - before["worker"] < 400  # an hour of samples
    uploads = service.settings.data_dir / "uploads"
    wait_until(lambda: os.listdir(uploads) == [], 60, "uploads are gone")


def test_names_of_files_reach_neither_the_disk_nor_the_log(service, files):
    """After the test above: nothing was made beside the service's own files."""
    log = (service.settings.data_dir.parent / "service.log").read_text()
    folder = service.settings.data_dir.parent
    assert {path.name for path in folder.iterdir()} == {"data", "service.log"}
    assert {path.name for path in service.settings.data_dir.iterdir()} <= {
        "redis",
        "uploads",
        "webhook_secret",
    }
    actions = [json.loads(line)["action"] for line in log.splitlines() if '"action"' in line]
    assert actions.count("job_accepted") > 100
    for trace in ("cron.d", "pwned", "X-Injected", "system32", "subfile", "\x1b[2J", "\u202e"):
        assert trace not in log
