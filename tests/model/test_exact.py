"""What the engine does faster must not be seen: text, segments and times are those of
faster-whisper for the same options, alone and in company."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing

import numpy as np
import pytest
from faster_whisper import BatchedInferencePipeline
from faster_whisper.vad import collect_chunks

from shared.options import TranscriptionOptions
from tests.conftest import FOX, SAMPLES, wait_until
from worker.engine import batched, scheduler, speech
from worker.engine.engine import Engine
from worker.engine.scheduler import Answer, Decoding, Request, Scheduler
from worker.engine.transcript import Heard, segment_of

NAMES = ["quick-brown-fox.wav", "two-sentences.wav", "de.wav", "fr.wav", "es.wav", "long.ogg"]
OPTIONS = [
    {},
    {"vad_filter": False},
    {"language": "en", "beam_size": 1},
    {"word_timestamps": True},
    {"without_timestamps": True, "repetition_penalty": 1.1},
    {"initial_prompt": "please listen", "hotwords": "fox"},
    {"condition_on_previous_text": False, "word_timestamps": True, "language": "de"},
    {"vad_parameters": {"threshold": 0.3, "speech_pad_ms": 100}},
    {"task": "translate", "patience": 1.5, "no_repeat_ngram_size": 3},
]
Seen = list[tuple]


def seen(segments) -> Seen:
    """All that a reader of the transcript could notice."""
    return [
        (
            segment.text,
            segment.start,
            segment.end,
            segment.avg_logprob,
            segment.no_speech_prob,
            [(word.word, word.start, word.end) for word in segment.words or []],
        )
        for segment in segments
    ]


def ours(engine: Engine, name: str, **options) -> tuple[Seen, str]:
    chosen = TranscriptionOptions(**options)
    result = engine.transcribe(SAMPLES / name, chosen, lambda _: None, lambda *_: None)
    return seen(result.segments), result.language


def theirs(engine: Engine, name: str, mode: str, **options) -> tuple[Seen, str]:
    """faster-whisper itself, on the same model."""
    chosen = TranscriptionOptions(**options).model_dump(exclude={"mode", "fast", "allow_partial"})
    chosen["temperature"] = list(chosen["temperature"])
    model = engine.model.whisper
    pipeline = BatchedInferencePipeline(model) if mode == "batched" else model
    segments, info = pipeline.transcribe(str(SAMPLES / name), **chosen)
    return seen(segment_of(n, segment) for n, segment in enumerate(segments)), info.language


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in NAMES),
        *((name, options) for name in NAMES[:2] for options in OPTIONS[1:]),
        ("long.ogg", {"vad_filter": False, "word_timestamps": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_the_transcript_is_exactly_faster_whispers(engine, mode, name, options):
    if mode == "batched" and name == "long.ogg" and options:
        options = {**options, "vad_filter": True}  # without it, faster-whisper refuses long ones
    options = {"temperature": "0", **options}  # above 0 faster-whisper does not repeat itself
    assert ours(engine, name, mode=mode, **options) == theirs(engine, name, mode, **options)


@pytest.mark.parametrize("seed", range(20))
def test_windows_are_those_of_faster_whisper(seed):
    """Any list of stretches, up to the length of a window each."""
    draw = np.random.default_rng(seed)
    audio = draw.standard_normal(16_000 * 200).astype(np.float32)
    edges = np.sort(draw.choice(len(audio), 2 * draw.integers(1, 30), replace=False))
    stretches = [
        {"start": int(start), "end": int(min(end, start + 16_000 * 30))}
        for start, end in edges.reshape(-1, 2)
    ]
    chunks, about = collect_chunks(audio, stretches, max_duration=30)
    made = speech.windows(audio, stretches)
    assert [(w.offset, w.duration) for w in made] == [(a["offset"], a["duration"]) for a in about]
    assert all(np.array_equal(w.audio, c) for w, c in zip(made, chunks, strict=True))
    whole = collect_chunks(audio, stretches)[0]
    assert np.array_equal(speech.join(audio, stretches), np.concatenate(whole))


def test_a_phrase_that_the_window_cuts_off_is_not_lost(engine):
    """faster-whisper's batched pipeline drops what has no closing timestamp."""
    whisper = engine.model.whisper
    run = batched._Run(whisper, None, TranscriptionOptions(language="en"), Heard(0, 0))
    run._speak("en")
    time = run.tokenizer.timestamp_begin
    first, last = (run.tokenizer.encode(text) for text in (" the quick fox", " over the dog"))
    tokens = [time, *first, time + 100, time + 150, *last]
    window = speech.Window(np.zeros(16_000 * 5, np.float32), 10.0, 5.0, [])
    found = list(run._segments_of(window, Answer(tokens, -0.1, 0.0, None, 1.0)))
    assert [(s.text, s.start, s.end) for s in found] == [
        (" the quick fox", 10.0, 12.0),
        (" over the dog", 13.0, 15.0),
    ]


# --- In company


@pytest.fixture
def company(engine: Engine) -> Iterator[Scheduler]:
    """Calls of up to four windows, as on a GPU."""
    with closing(Scheduler(engine.model.whisper, replicas=2, max_batch=4)) as made:
        yield made


def test_ten_transcriptions_in_shared_calls_never_mix(engine, company):
    """Ten recordings in four languages at the same time, with options that may and that may not
    share a call: each gets the text that it gets alone."""
    work = [
        (name, options)
        for name in NAMES[:5]
        for options in (
            {"temperature": "0"},
            {"word_timestamps": True, "beam_size": 2, "temperature": "0"},
        )
    ]
    sizes: list[int] = []
    run = company._run
    company._run = lambda requests: sizes.append(len(requests)) or run(requests)

    def transcribe(name: str, options: dict) -> Seen:
        heard = Heard(0, 0)
        chosen = TranscriptionOptions(**options)
        whole = engine.prepare(SAMPLES / name, chosen, lambda _: None, lambda *_: None).whole
        return [
            row[:3] + row[5:]
            for row in seen(
                segment_of(0, segment)
                for segment in batched.transcribe(
                    engine.model.whisper, company, whole.windows, whole.stretches, chosen, heard
                )
            )
        ]

    alone = [[row[:3] + row[5:] for row in ours(engine, name, **o)[0]] for name, o in work]
    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(lambda job: transcribe(*job), work * 2))
    assert together == alone * 2
    assert max(sizes) > 1, "no call was shared"


def request_of(number: int, engine: Engine, **changes) -> Request:
    tokenizer = engine.model.whisper.hf_tokenizer
    prompt = [
        tokenizer.token_to_id(t) for t in ("<|startoftranscript|>", "<|en|>", "<|transcribe|>")
    ]
    decoding = Decoding(1, 1, 1.0, 1.0, 1.0, 0, 0.0, (), len(prompt), True)
    features = np.full((80, 3000), number, np.float32)
    return Request(features, prompt, decoding, None, False, **changes)


@pytest.fixture
def order(engine: Engine, monkeypatch) -> Iterator[tuple[Scheduler, list[int], threading.Event]]:
    """A scheduler that notes which window it runs, and waits at the first until told."""
    go, ran = threading.Event(), []

    def run(self, requests: list[Request]) -> list[Answer]:
        ran.extend(int(request.features[0, 0]) for request in requests)
        go.wait(30)
        return [Answer([], 0.0, 0.0, None, 1.0) for _ in requests]

    monkeypatch.setattr(scheduler.Scheduler, "_run", run)
    with closing(Scheduler(engine.model.whisper, replicas=1, max_batch=1)) as made:
        yield made, ran, go


def test_a_clip_does_not_wait_for_a_long_recording(engine, order):
    made, ran, go = order
    long = made.submit("long", [request_of(n, engine) for n in range(100)])
    wait_until(lambda: ran, 10, "the long one has begun")
    clip = made.submit("clip", [request_of(1000, engine)])
    go.set()
    wait([*long, *clip], timeout=30)
    assert ran.index(1000) <= 2


def test_clips_without_end_do_not_starve_a_long_recording(engine, order):
    made, ran, go = order
    long = made.submit("long", [request_of(n, engine) for n in range(20)])
    clips = [made.submit(f"clip-{n}", [request_of(1000 + n, engine)])[0] for n in range(100)]
    go.set()
    wait([*long, *clips], timeout=30)
    last = max(ran.index(n) for n in range(20))
    assert last < 100, "it was served before the last clips"


@pytest.fixture
def roomy(
    engine: Engine, monkeypatch
) -> Iterator[tuple[Scheduler, set[int], dict[int, threading.Event]]]:
    """A scheduler with two replicas, the windows that run, and what ends each."""
    running, ends = set(), {n: threading.Event() for n in (*range(10), 1000, 1001)}

    def run(self, requests: list[Request]) -> list[Answer]:
        number = int(requests[0].features[0, 0])
        running.add(number)
        assert ends[number].wait(30)
        running.remove(number)
        return [Answer([], 0.0, 0.0, None, 1.0)]

    monkeypatch.setattr(scheduler.Scheduler, "_run", run)
    made = Scheduler(engine.model.whisper, replicas=2, max_batch=1)
    yield made, running, ends
    for end in ends.values():
        end.set()
    made.close()


def test_while_clips_keep_coming_long_recordings_leave_them_a_replica(engine, roomy, monkeypatch):
    made, running, ends = roomy
    monkeypatch.setattr(scheduler, "YIELD_SECONDS", 3600)
    made.submit("clip", [request_of(1000, engine)], is_clip=True)
    made.submit("long", [request_of(n, engine) for n in range(10)])
    wait_until(lambda: running == {0, 1000}, 10, "the long one has what is left")
    ends[1000].set()
    made.leave("clip")
    ends[0].set()
    wait_until(lambda: running == {1}, 10, "the next clip is waited for")
    made.submit("next", [request_of(1001, engine)], is_clip=True)
    wait_until(lambda: running == {1, 1001}, 10, "it finds room")


def test_without_clips_a_long_recording_has_both_replicas_again(engine, roomy, monkeypatch):
    made, running, ends = roomy
    monkeypatch.setattr(scheduler, "YIELD_SECONDS", 0.1)
    made.submit("clip", [request_of(1000, engine)], is_clip=True)
    made.submit("long", [request_of(n, engine) for n in range(10)])
    wait_until(lambda: running == {0, 1000}, 10, "the long one has what is left")
    ends[1000].set()
    made.leave("clip")
    wait_until(lambda: running == {0, 1}, 10, "both are the long one's")


def test_who_leaves_is_not_waited_for(engine, order):
    made, ran, go = order
    made.submit("first", [request_of(1, engine)])
    wait_until(lambda: ran, 10, "the first runs")
    left = made.submit("cancelled", [request_of(n, engine) for n in (2, 3)])
    other = made.submit("other", [request_of(4, engine)])
    made.leave("cancelled")
    go.set()
    wait(other, timeout=30)
    assert ran == [1, 4]
    assert all(future.cancelled() for future in left)


class Stop(Exception):
    """What a caller raises who no longer wants the transcript."""


def test_a_stop_while_an_answer_is_waited_for_leaves_the_queue(engine, order, monkeypatch):
    """Nobody has to wait until the window that runs is done."""
    made, ran, go = order
    monkeypatch.setattr(batched, "CHECK_SECONDS", 0.01)
    windows = [speech.Window(np.zeros(16_000, np.float32), n, 1.0, []) for n in range(20)]
    checks: list[bool] = []

    def checkpoint() -> None:
        checks.append(bool(ran))
        if len(checks) > 3 and ran:
            raise Stop

    options = TranscriptionOptions(language="en")
    with pytest.raises(Stop):
        list(
            batched.transcribe(
                engine.model.whisper, made, windows, [], options, Heard(0, 0), checkpoint
            )
        )
    other = made.submit("other", [request_of(1000, engine)])
    go.set()
    wait(other, timeout=30)
    assert len(ran) == 2, "the window that ran already, and the other's"


@pytest.mark.parametrize(("replicas", "max_batch"), [(1, 1), (4, 1), (1, 16)])
def test_a_long_recording_keeps_every_replica_busy(engine, monkeypatch, replicas, max_batch):
    """Twice as many windows wait as can run, and no more: each is a megabyte."""
    asked: list[Request] = []
    with closing(Scheduler(engine.model.whisper, replicas=replicas, max_batch=max_batch)) as made:
        monkeypatch.setattr(made, "submit", lambda _, new, **_is: asked.extend(new) or [Future()])
        monkeypatch.setattr(batched, "CHECK_SECONDS", 0.01)

        def stop() -> None:
            raise Stop

        windows = [speech.Window(np.zeros(16_000, np.float32), n, 1.0, []) for n in range(100)]
        options = TranscriptionOptions(language="en")
        with pytest.raises(Stop):
            list(
                batched.transcribe(
                    engine.model.whisper, made, windows, [], options, Heard(0, 0), stop
                )
            )
    assert len(asked) == 2 * replicas * max_batch + 1


def test_a_call_that_fails_hurts_only_those_in_it(engine):
    with closing(Scheduler(engine.model.whisper, replicas=1, max_batch=1)) as made:
        bad = made.submit("bad", [Request(np.zeros((3, 3000), np.float32), *([None] * 4))])[0]
        assert bad.exception(30) is not None
        good = made.submit("good", [request_of(0, engine)])[0]
        assert isinstance(good.result(30).tokens, list)


def test_a_window_that_fails_every_test_costs_a_few_normal_ones(engine):
    """Retries are few, whatever list of temperatures is given."""
    calls: list[float] = []
    generate = scheduler.generate

    def counted(whisper, encoding, prompts, how):
        calls.append(how.temperature)
        return generate(whisper, encoding, prompts, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "generate", counted)
        ours(engine, FOX.name, log_prob_threshold=0.0, no_speech_threshold=None)
    assert calls == [0.0, 0.2, 0.4]
