"""OpenAI's fields in our words, and our answers in OpenAI's."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.errors import status_of
from api.openai import fields, models
from api.openai.attendance import is_repeated, timeout_of
from api.openai.audio import shown
from api.openai.envelope import body_of, is_asked, told
from api.openai.fields import asked_of, judge, unbracketed, will_wait
from api.openai.stream import Telling
from shared import errors
from shared.errors import InvalidField, ModelNotFound
from shared.options import TranscriptionOptions
from shared.schemas import Segment, Transcript

MODEL = ("model", "whisper-1")
LADDER = TranscriptionOptions().temperature


def asked(*sent: tuple[str, str], task: Any = "transcribe") -> fields.Asked:
    return asked_of([MODEL, *sent], task, "demo")


def refused(*sent: tuple[str, str], task: Any = "transcribe") -> list[str]:
    """The names of the fields that are wrong."""
    with pytest.raises(InvalidField) as caught:
        asked(*sent, task=task)
    assert all(text for _, text in caught.value.errors)
    return [name for name, _ in caught.value.errors]


# --- Fields


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ({}, {}),
        ({"language": "en-US"}, {"language": "en"}),
        ({"language": "German"}, {"language": "de"}),
        ({"languages[]": "fr"}, {"language": "fr"}),
        ({"languages[]": "fr", "language": "en"}, {"language": "en"}),
        ({"prompt": "Ada, Lua"}, {"initial_prompt": "Ada, Lua"}),
        ({"keywords[]": "Ada"}, {"hotwords": "Ada"}),
        ({"temperature": "0"}, {}),
        ({"temperature": "0.0"}, {}),
        ({"temperature": ""}, {}),
        ({"temperature": "0.4"}, {"temperature": (0.4,)}),
        ({"temperature": "0,0.4"}, {"temperature": (0, 0.4)}),
        ({"temperature[]": "0"}, {"temperature": (0,)}),
        ({"chunking_strategy": "auto"}, {}),
        ({"chunking_strategy": '"auto"'}, {}),
        (
            {"chunking_strategy[type]": "server_vad"},
            {
                "vad_parameters": {
                    "threshold": 0.5,
                    "speech_pad_ms": 300,
                    "min_silence_duration_ms": 200,
                }
            },
        ),
        (
            {
                "chunking_strategy[type]": "server_vad",
                "chunking_strategy[threshold]": "0.7",
                "chunking_strategy[prefix_padding_ms]": "100",
                "chunking_strategy[silence_duration_ms]": "900",
            },
            {
                "vad_parameters": {
                    "threshold": 0.7,
                    "speech_pad_ms": 100,
                    "min_silence_duration_ms": 900,
                }
            },
        ),
        (
            {"chunking_strategy": '{"type": "server_vad", "silence_duration_ms": 900}'},
            {
                "vad_parameters": {
                    "threshold": 0.5,
                    "speech_pad_ms": 300,
                    "min_silence_duration_ms": 900,
                }
            },
        ),
        ({"vad_filter": "false", "beam_size": "2"}, {"vad_filter": False, "beam_size": 2}),
        ({"vad_parameters[threshold]": "0.7"}, {"vad_parameters": {"threshold": 0.7}}),
        ({"vad_parameters": '{"threshold": 0.7}'}, {"vad_parameters": {"threshold": 0.7}}),
        ({"task": "translate"}, {"task": "translate"}),
    ],
)
def test_openai_s_fields_become_options(sent, meant):
    """The same options, however they are said, are the same transcription."""
    assert asked(*sent.items()).options == TranscriptionOptions(**meant)


def test_a_list_comes_with_brackets_or_without():
    for name in ("keywords", "keywords[]"):
        assert asked((name, "Ada"), (name, "Lua")).options.hotwords == "Ada, Lua"
    for name in ("timestamp_granularities", "timestamp_granularities[]"):
        both = asked(("response_format", "verbose_json"), (name, "word"), (name, "segment"))
        assert (both.has_words, both.has_segments) == (True, True)


@pytest.mark.parametrize(
    ("listed", "words", "segments"),
    [((), False, True), (("segment",), False, True), (("word",), True, False)],
)
def test_verbose_json_lists_what_is_asked_for(listed, words, segments):
    names = [("timestamp_granularities[]", name) for name in listed]
    found = asked(("response_format", "verbose_json"), *names)
    assert (found.has_words, found.has_segments) == (words, segments)
    assert found.options.word_timestamps is words


def test_a_long_prompt_loses_its_beginning():
    """Whisper hears the last 224 tokens; OpenAI refuses none for its length."""
    found = asked(("prompt", "a" * 5000 + " the end")).options.initial_prompt
    assert found is not None
    assert found.endswith(" the end")


@pytest.mark.parametrize(
    ("sent", "wrong"),
    [
        ({"response_format": "diarized_json"}, "response_format"),
        ({"response_format": "tsv"}, "response_format"),
        ({"include[]": "logprobs"}, "include"),
        ({"language": "xx"}, "language"),
        ({"languages[]": "xx"}, "language"),
        ({"temperature": "2"}, "temperature"),
        ({"timestamp_granularities[]": "letter"}, "timestamp_granularities"),
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities"),
        ({"stream": "perhaps"}, "stream"),
        ({"stream": "true", "response_format": "srt"}, "response_format"),
        ({"chunking_strategy": "none of these"}, "chunking_strategy"),
        ({"chunking_strategy[threshold]": "0.5"}, "chunking_strategy.type"),
        ({"chunking_strategy[type]": "semantic_vad"}, "chunking_strategy.type"),
        (
            {"chunking_strategy[type]": "server_vad", "chunking_strategy[threshold]": "2"},
            "chunking_strategy.threshold",
        ),
        ({"chunking_strategy": "[" * 10_000}, "chunking_strategy"),
        ({"prompt": "a\0b"}, "prompt"),
        ({"keywords[]": "a" * 3000}, "keywords"),
        ({"prompt": "a", "initial_prompt": "b"}, "initial_prompt"),
        ({"keywords[]": "a", "hotwords": "b"}, "hotwords"),
        (
            {"chunking_strategy[type]": "server_vad", "vad_parameters": "{}"},
            "vad_parameters",
        ),
        ({"beam_size": "99"}, "beam_size"),
        ({"metadata": "no object"}, "metadata"),
        ({"model": "whisper-1", "model[a]": "b"}, "model[a]"),
        ({"language[]": "en"}, "language"),
    ],
)
def test_what_can_not_be_served_is_refused_by_name(sent, wrong):
    assert refused(*[(n, v) for n, v in sent.items() if n != "model"]) == [wrong]


def test_a_translation_is_one_whatever_is_said():
    assert asked(task="translate").options.task == "translate"
    assert refused(("task", "transcribe"), task="translate") == ["task"]


def test_unknown_fields_are_named_and_harm_nothing():
    found = asked(("user", "me"), ("a[b]", "c"), ("languages[]", "en"), ("languages[]", "de"))
    assert found.ignored == ("a", "languages", "user")
    assert found.options == TranscriptionOptions()


def test_what_belongs_to_the_job_is_taken_as_elsewhere():
    found = asked(("metadata[order]", "17"), ("priority", "high"))
    assert (found.job.metadata, found.job.priority) == ({"order": "17"}, "high")


def test_a_header_holds_their_names_whatever_they_are():
    names = shown(["a\r\nSet-Cookie: b", "ä" * 100, "c", *map(str, range(100))])
    assert names.startswith("a??Set-Cookie??b, ?????")
    assert names.isascii()
    assert len(names) < 200


@pytest.mark.parametrize("name", ["demo", *models.ALIASES])
def test_the_loaded_model_has_its_own_name_and_openai_s(name):
    assert asked_of([("model", name)], "transcribe", "demo")


def test_another_model_is_not_found_and_none_is_asked_for():
    with pytest.raises(ModelNotFound, match="'demo'"):
        asked_of([("model", "large-v9")], "transcribe", "demo")
    for sent in ([], [("model", "")], [("model", "gpt-4o-transcribe-diarize")]):
        with pytest.raises(InvalidField) as caught:
            asked_of(sent, "transcribe", "demo")
        assert caught.value.errors[0][0] == "model"


def test_a_form_is_refused_before_its_file_where_that_is_certain():
    at = judge("demo")
    at("file", [MODEL])
    at("file", [])
    at("keywords", [("keywords", "a")])
    at("keywords[]", [("keywords[]", "a")])
    for name, before, error in [
        ("file", [("model", "other")], ModelNotFound),
        ("file", [("model", "gpt-4o-transcribe-diarize")], InvalidField),
        ("known_speaker_names[]", [MODEL], InvalidField),
        ("known_speaker_references[]", [MODEL], InvalidField),
        ("prompt", [("prompt", "a")], InvalidField),
        ("url", [MODEL], InvalidField),
    ]:
        with pytest.raises(error):
            at(name, before)


def test_only_who_gets_no_stream_can_lose_patience():
    assert will_wait([MODEL])
    assert will_wait([MODEL, ("stream", "false")])
    for value in ("true", "True", "t", "yes", "1"):
        assert not will_wait([MODEL, ("stream", value)])
    assert not will_wait([]), "the fields may follow the file"


def test_brackets_are_objects_and_lists():
    sent = [("a", "1"), ("b[c]", "2"), ("b[d][e]", "3"), ("f[]", "4"), ("f[]", "5"), ("g[", "6")]
    assert unbracketed(sent) == {
        "a": "1",
        "b": {"c": "2", "d": {"e": "3"}},
        "f": ["4", "5"],
        "g[": "6",
    }
    for twice in ([("a", "1"), ("a[b]", "2")], [("a[b]", "1"), ("a", "2")], [("a", "1")] * 2):
        with pytest.raises(InvalidField):
            unbracketed(twice)


NAMES = st.one_of(
    st.sampled_from([*fields.AudioForm.model_fields, "vad_parameters", "metadata", "beam_size"]),
    st.text(alphabet="ab[]", max_size=12),
)
SUFFIXES = st.sampled_from(["", "[]", "[type]", "[a][b]", "[threshold]", "[" * 20, "[a]" * 20])


@given(st.lists(st.tuples(st.builds(str.__add__, NAMES, SUFFIXES), st.text(max_size=20))))
def test_no_form_breaks_the_reading(sent):
    """Whatever is sent, it is options or an error of ours."""
    try:
        found = asked(*sent)
    except (InvalidField, ModelNotFound):
        return
    assert TranscriptionOptions.model_validate_json(found.options.canonical()) == found.options


# --- Clients


class Asking:
    """As much of a request as is asked for."""

    def __init__(self, **headers: str):
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"x_stainless_read_timeout": "12.5"}, 12.5),
        ({"x_stainless_timeout": "600"}, 600),
        ({}, float("inf")),
        ({"x_stainless_read_timeout": "none"}, float("inf")),
        ({"x_stainless_read_timeout": "-1"}, float("inf")),
        ({"x_stainless_read_timeout": "nan"}, float("inf")),
    ],
)
def test_a_client_says_how_long_it_waits(headers, seconds):
    request: Any = Asking(**headers)
    assert timeout_of(request) == seconds


def test_a_client_says_that_it_comes_again():
    for value, expected in {"0": False, "1": True}.items():
        request: Any = Asking(x_stainless_retry_count=value)
        assert is_repeated(request) is expected
    first: Any = Asking()
    assert not is_repeated(first)


# --- Streams


def segments(*texts: str) -> list[Segment]:
    fixed = {"avg_logprob": 0.0, "compression_ratio": 1.0, "no_speech_prob": 0.0}
    return [
        Segment(id=n, start=n, end=n + 1, text=text, temperature=0.0, **fixed)
        for n, text in enumerate(texts)
    ]


def transcript(*texts: str) -> Transcript:
    return Transcript(
        text="".join(texts).strip(),
        language="en",
        language_probability=1.0,
        duration=3.2,
        duration_after_vad=3.0,
        segments=segments(*texts),
        task="transcribe",
        model="demo",
        processing_seconds=0.1,
    )


def told_by(events: Any) -> list[dict[str, Any]]:
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


@pytest.mark.parametrize("known", range(5))
@pytest.mark.parametrize(
    "texts",
    [
        (" one", " two ", " three", "  "),
        ("", "  ", " one", ""),
        (" ä", "日本", " x\n", " y"),
        ("", "", "", ""),
    ],
)
def test_the_pieces_are_the_text_wherever_they_are_cut(texts, known):
    telling = Telling()
    events = [event for text in texts[:known] for event in told_by(telling.more(text))]
    events += told_by(telling.rest(transcript(*texts)))
    *deltas, done = events
    assert {event["type"] for event in deltas} <= {"transcript.text.delta"}
    assert all(event["delta"] for event in deltas)
    assert done["type"] == "transcript.text.done"
    assert "".join(event["delta"] for event in deltas) == done["text"] == "".join(texts).strip()


def test_what_was_told_is_never_taken_back():
    telling = Telling()
    for text in (" one", " two"):
        told_by(telling.more(text))
    with pytest.raises(errors.TranscriptionError):
        told_by(telling.rest(transcript(" one", " three", " four")))


# --- Errors


def test_every_error_has_openai_s_four_keys_and_a_status_of_its_clients():
    for kind in errors.ServiceError.__subclasses__():
        status = status_of(kind.__new__(kind))
        body = body_of(status, kind.code, "text").model_dump()
        assert set(body) == {"message", "type", "param", "code"}
        assert told(status) != 422


@pytest.mark.parametrize(
    ("status", "code", "kind", "shown", "param"),
    [
        (401, "unauthorized", "authentication_error", "invalid_api_key", None),
        (404, "model_not_found", "invalid_request_error", "model_not_found", "model"),
        (413, "file_too_large", "invalid_request_error", "file_too_large", "file"),
        (422, "url_not_allowed", "invalid_request_error", "url_not_allowed", "webhook_url"),
        (429, "rate_limited", "rate_limit_exceeded", "rate_limit_exceeded", None),
        (429, "audio_minutes_used", "rate_limit_exceeded", "insufficient_quota", None),
        (500, "internal_error", "server_error", "internal_error", None),
        (503, "queue_full", "overloaded", "queue_full", None),
        (507, "storage_full", "server_error", "storage_full", None),
    ],
)
def test_errors_have_openai_s_names_where_it_has_one(status, code, kind, shown, param):
    body = body_of(status, code, "text")
    assert (body.type, body.code, body.param) == (kind, shown, param)


def test_a_failed_job_is_the_callers_fault_or_ours():
    assert told(status_of(errors.failure_of("truncated_media", ""))) == 400
    for code in ("worker_lost", "engine_failure", "internal_error", "something_new"):
        assert status_of(errors.failure_of(code, "")) == 500


def test_only_what_is_below_v1_has_the_envelope():
    assert [is_asked(path) for path in ("/v1", "/v1/", "/v1/audio/x")] == [True] * 3
    assert [is_asked(path) for path in ("/", "/v10", "/status/v1", "/V1/models")] == [False] * 4
