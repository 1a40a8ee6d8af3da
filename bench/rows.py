"""The rows of the table: what is compared with what, and the goal."""

from __future__ import annotations

from bench import backlog, long, memory, speed, waiting
from bench.stage import Row

ROWS = (
    Row(
        "a1",
        "5 s clips: the bare engine's time / the service's, same text",
        ">= 0.97",
        lambda ratio: ratio >= 0.97,
        speed.against_the_engine,
    ),
    Row(
        "a2",
        "5 s clips: faster-whisper's time / the service's, language detected, same text",
        ">= 2.0",
        lambda ratio: ratio >= 2.0,
        lambda stage: speed.against_the_library(stage, 5, 8, mode="sequential"),
    ),
    Row(
        "a2-30",
        "30 s clips: faster-whisper's time / the service's, VAD on, same text",
        ">= 1.4",
        lambda ratio: ratio >= 1.4,
        lambda stage: speed.against_the_library(stage, 30, 4, mode="sequential"),
    ),
    Row(
        "a3",
        "5 s clips: faster-whisper's time / the service's with fast=true, same text",
        ">= 5",
        lambda ratio: ratio >= 5,
        lambda stage: speed.against_the_library(stage, 5, 8, mode="batched", fast="true"),
    ),
    Row(
        "p1",
        "8 clips of 5 s at once: time on speaches' request path / the service's, same text",
        ">= 1",
        lambda ratio: ratio >= 1,
        lambda stage: speed.against_a_peer(stage, "pool", mode="batched"),
    ),
    Row(
        "p2",
        "8 clips of 5 s at once: time on whisper-asr-webservice's request path / the service's,"
        " same text",
        ">= 1",
        lambda ratio: ratio >= 1,
        lambda stage: speed.against_a_peer(stage, "loop", mode="sequential"),
    ),
    Row(
        "m",
        "5 s clips: time with the language detected / given",
        "<= 1.1",
        lambda ratio: ratio <= 1.1,
        speed.language_detection,
    ),
    Row(
        "o",
        "worst window / normal window",
        "<= 5",
        lambda ratio: ratio <= 5,
        speed.worst_window,
    ),
    Row(
        "h1",
        "before the model runs, 1 h with 1,600 pauses: faster-whisper's time / the engine's",
        ">= 5",
        lambda ratio: ratio >= 5,
        speed.preprocessing,
    ),
    Row(
        "h2",
        "30 min: time on 1 worker / on 2, a core each, same text",
        ">= 1.8",
        lambda ratio: ratio >= 1.8,
        long.two_workers,
    ),
    Row(
        "h3",
        "5 s clips, 95th percentile: beside a recording of 2 h / alone",
        "<= 1.5",
        lambda ratio: ratio <= 1.5,
        long.beside_a_long_one,
    ),
    Row(
        "i",
        "a worker loads a model of shape base to compute in int8: from float16 / from its copy",
        ">= 1.5",
        lambda ratio: ratio >= 1.5,
        speed.loading,
    ),
    Row(
        "j",
        "memory, shape base: 1 worker with 4 slots / 4 workers with 1",
        "<= 0.4",
        lambda ratio: ratio <= 0.4,
        memory.slots_against_workers,
    ),
    Row(
        "k",
        "the costliest endpoint's time: 100,000 jobs wait / 100",
        "<= 1.2",
        lambda ratio: ratio <= 1.2,
        backlog.endpoints,
    ),
    Row(
        "w1",
        "5,000 clients wait at one API process: memory of each / at a bare ASGI application",
        "<= 1.65",
        lambda ratio: ratio <= 1.65,
        waiting.memory,
    ),
    Row(
        "w2",
        "all of them hear of an end: time of the last / at a bare ASGI application",
        "<= 10",
        lambda ratio: ratio <= 10,
        waiting.notifying,
    ),
    Row(
        "mem",
        "memory of a worker, demo model: after 2,000 clips of 1 s / after 200",
        "<= 1.05",
        lambda ratio: ratio <= 1.05,
        memory.growth,
    ),
)
