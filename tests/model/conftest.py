"""The engine on the bundled model, loaded once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shared.settings import Settings
from worker.engine import model
from worker.engine.engine import Engine


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    settings = Settings(_env_file=None, model_size="demo")
    engine = Engine(model.load(settings, threads=2), replicas=1, max_audio_seconds=3600)
    yield engine
    engine.close()
