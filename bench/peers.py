"""How two other servers take a request, over the same model:
`python -m bench.peers PATH MODEL PORT`.

Neither is on the package index, so these are their request paths alone, after their sources; all
else of theirs (other formats, model management) is left out, which can only make them faster.

- `pool`, speaches (https://github.com/speaches-ai/speaches): an endpoint in the server's pool of
  threads, one WhisperModel with one replica, a new BatchedInferencePipeline for each request.
- `loop`, whisper-asr-webservice (https://github.com/ahmetoner/whisper-asr-webservice): decodes and
  transcribes on the event loop, under a lock.
"""

from __future__ import annotations

import io
import os
import sys
from threading import Lock

import uvicorn
from fastapi import FastAPI, UploadFile
from faster_whisper import BatchedInferencePipeline, WhisperModel, decode_audio


def app(path: str, model: WhisperModel) -> FastAPI:
    made, lock = FastAPI(), Lock()

    def pool(file: UploadFile) -> dict[str, str]:
        audio = decode_audio(io.BytesIO(file.file.read()))
        segments, _ = BatchedInferencePipeline(model).transcribe(audio, vad_filter=True)
        return {"text": "".join(segment.text for segment in segments).strip()}

    async def loop(file: UploadFile) -> dict[str, str]:
        audio = decode_audio(io.BytesIO(await file.read()))
        with lock:
            segments, _ = model.transcribe(audio, vad_filter=True)
            return {"text": "".join(segment.text for segment in segments).strip()}

    made.post("/")({"pool": pool, "loop": loop}[path])
    made.get("/")(lambda: "ready")
    return made


def main(path: str, folder: str, port: str) -> None:
    model = WhisperModel(folder, compute_type="int8", cpu_threads=len(os.sched_getaffinity(0)))
    uvicorn.run(app(path, model), host="127.0.0.1", port=int(port), log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
