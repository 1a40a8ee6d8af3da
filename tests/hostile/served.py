"""Sends files to a running service as a stranger would, and waits for what becomes of them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import httpx2

from local.service import Service
from shared.errors import NotAudio
from tests.conftest import wait_until
from tests.hostile.corpus import DECODED, Hostile

BOUNDARY = b"----hostile"


@dataclass(frozen=True)
class Served:
    code: str  # the error's, or `samples`: there is a transcript
    message: str
    seconds: float


def body_of(hostile: Hostile) -> bytes:
    """The form, with the file's name in it as it is: no client would send such names."""
    name = hostile.filename.encode("utf-8", "surrogateescape")
    head = b'\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n' % name
    return b"--" + BOUNDARY + head + hostile.content + b"\r\n--" + BOUNDARY + b"--\r\n"


def serve(service: Service, files: list[Hostile], deadline_seconds: float) -> list[Served]:
    """All of them, one behind the other into the queue; then each one's end."""
    kind = {"content-type": f"multipart/form-data; boundary={BOUNDARY.decode()}"}
    with httpx2.Client(base_url=service.base_url, timeout=60, trust_env=False) as client:
        began, sent = time.monotonic(), []
        for hostile in files:
            answer = client.post("/transcribe", content=body_of(hostile), headers=kind)
            sent.append((answer, time.monotonic()))

        def end_of(answer: httpx2.Response, since: float) -> Served:
            body = answer.json()
            if answer.status_code != 202:
                assert answer.headers["content-type"] == "application/problem+json", body
                return Served(body["code"], body["detail"], 0.0)
            status = wait_until(
                lambda: ended(client.get(body["links"]["status"])),
                deadline_seconds - (time.monotonic() - began),
                f"job {body['job_id']} ends",
            )
            error = status["error"] or {"code": DECODED, "message": ""}
            return Served(error["code"], error["message"], status["processing_seconds"] or 0.0)

        return [end_of(*each) for each in sent]


def ended(answer: httpx2.Response) -> dict | None:
    assert answer.status_code == 200, answer.text
    status = answer.json()
    return status if status["status"] in {"completed", "failed", "cancelled"} else None


def check(hostile: Hostile, served: Served) -> str:
    """What is wrong with it; empty if nothing is."""
    if served.code not in {*hostile.answers, NotAudio.code}:
        return f"answer {served.code}, not {' or '.join(hostile.answers)}"
    if served.code != DECODED and not served.message:
        return "no message"
    return ""


def resident_mib(service: Service, name: str, field: str = "VmHWM") -> float:
    """Memory that a process of the service has had at most; VmRSS: has now."""
    lines = Path(f"/proc/{service.popen(name).pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024
