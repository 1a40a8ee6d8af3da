"""The speech model: where its files are, and how it is loaded. Knows faster-whisper's loader."""

from __future__ import annotations

import gc
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import ctranslate2
import numpy as np
from faster_whisper import WhisperModel
from faster_whisper.utils import available_models, download_model

from shared.errors import ModelUnavailable
from shared.settings import DEMO_MODEL, Device, Settings
from worker.engine import quantised
from worker.engine.watched import WatchedModel

log = logging.getLogger(__name__)

DEMO_FOLDER = Path(__file__).parent.parent / "demo_model"
MODEL_FILES = ("model.bin", "config.json")


@dataclass(frozen=True)
class LoadedModel:
    """A model that is in memory and has run once."""

    whisper: WhisperModel
    name: str  # Settings.model_size
    device: str  # cpu | cuda, never auto
    compute_type: str  # what CTranslate2 chose
    load_seconds: float  # load and first run


def device_of(settings: Settings) -> str:
    """cpu | cuda: what `auto` means on this machine."""
    if settings.device != Device.AUTO:
        return settings.device.value
    return "cuda" if ctranslate2.get_cuda_device_count() else "cpu"


def load(settings: Settings, *, replicas: int = 1, threads: int = 1) -> LoadedModel:
    """Loads and warms the model. Raises ModelUnavailable with a sentence that says what to do."""
    began = time.perf_counter()
    folder = locate(settings)
    try:
        whisper = open_fastest(folder, settings, replicas=replicas, threads=threads)
        whisper.model = WatchedModel(whisper.model)
        warm_up(whisper)
        # What is loaded now stays. faster-whisper and others collect garbage while they serve,
        # and would look through all of it each time.
        gc.collect()
        gc.freeze()
    except (RuntimeError, ValueError, OSError) as exc:
        raise ModelUnavailable(
            f"The model {settings.model_size!r} does not load on {settings.device} with "
            f"COMPUTE_TYPE={settings.compute_type}: {one_line(exc)}"
        ) from exc
    return LoadedModel(
        whisper=whisper,
        name=settings.model_size,
        device=whisper.model.device,
        compute_type=whisper.model.compute_type,
        load_seconds=time.perf_counter() - began,
    )


def open_fastest(folder: Path, settings: Settings, *, replicas: int, threads: int) -> WhisperModel:
    """From an int8 copy of the model where that loads faster. Raises what `open_in` raises."""
    if copy := quantised.copy_of(folder, settings, device_of(settings)):
        try:
            with quantised.standing_in(copy, folder) as place:
                return open_in(place, settings, replicas=replicas, threads=threads)
        except (RuntimeError, OSError) as exc:
            log.warning(
                "the model's copy does not load: it loads as it is stored",
                extra={"action": "model_copy_unreadable", "reason": one_line(exc)},
            )
            if isinstance(exc, RuntimeError):  # CTranslate2's word on the file
                quantised.discard(copy)
    return open_in(folder, settings, replicas=replicas, threads=threads)


def open_in(folder: Path, settings: Settings, *, replicas: int, threads: int) -> WhisperModel:
    """Raises RuntimeError, ValueError, OSError."""
    return WhisperModel(
        str(folder),
        device=device_of(settings),
        device_index=settings.device_index,
        compute_type=settings.compute_type,
        cpu_threads=threads,
        num_workers=replicas,
    )


def warm_up(whisper: WhisperModel) -> None:
    """A model that has never run is not warm: the first run allocates and, on a GPU, compiles."""
    segments, _ = whisper.transcribe(np.zeros(16_000, np.float32), language="en", beam_size=1)
    list(segments)


def locate(settings: Settings) -> Path:
    """The model's folder, fetched from the Hub if need be."""
    name = settings.model_size
    if name == DEMO_MODEL:
        return _checked(DEMO_FOLDER, name)
    if Path(name).is_dir():
        return _checked(Path(name), name)
    if "/" not in name and name not in available_models():
        raise ModelUnavailable(
            f"There is no model named {name!r}. MODEL_SIZE takes demo, a folder, a Hub id "
            f"(owner/name), or one of: {', '.join(available_models())}."
        )
    try:
        log.info("fetching the model", extra={"action": "model_fetch", "model": name})
        return Path(download_model(name, revision=settings.model_revision or None))
    except Exception as exc:  # whatever the Hub's client raises: no network, no such id, no access
        raise ModelUnavailable(
            f"The model {name!r} is not on this machine and can't be fetched from the Hub "
            f"({one_line(root_of(exc))[:200]}). Check the network and the name, or "
            "set MODEL_SIZE to a folder that holds the model, or to demo."
        ) from exc


def _checked(folder: Path, name: str) -> Path:
    missing = [file for file in MODEL_FILES if not (folder / file).is_file()]
    if missing:
        raise ModelUnavailable(
            f"The folder of the model {name!r} lacks {' and '.join(missing)}; MODEL_SIZE must name "
            "a model in CTranslate2 form."
        )
    return folder


def root_of(exc: BaseException) -> BaseException:
    """What happened first: the Hub's client wraps it many times."""
    while inner := exc.__cause__ or exc.__context__:
        exc = inner
    return exc


def one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split())
