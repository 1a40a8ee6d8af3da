"""Options: what is accepted, what is refused, and when two requests are the same."""

from __future__ import annotations

import inspect

import pytest
from faster_whisper import WhisperModel
from faster_whisper.tokenizer import _LANGUAGE_CODES
from faster_whisper.vad import VadOptions
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shared.languages import LANGUAGES, OTHER_NAMES, code_of
from shared.options import TranscriptionOptions, VadParameters, fingerprint

CHECKSUM = "0" * 64
OURS = {"allow_partial", "fast", "mode", "vad_filter"}


def same(left: dict, right: dict) -> bool:
    made = [fingerprint(CHECKSUM, TranscriptionOptions(**fields), "m") for fields in (left, right)]
    return made[0] == made[1]


def test_form_text_becomes_typed_values():
    """A form knows only text."""
    options = TranscriptionOptions(
        language="EN", vad_filter="false", beam_size="3", temperature="0, 0.4", hotwords="Lua"
    )
    assert (options.language, options.vad_filter, options.beam_size) == ("en", False, 3)
    assert options.temperature == (0.0, 0.4)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ({}, {"language": "auto", "beam_size": "5"}),
        ({}, {"language": "", "initial_prompt": " "}),
        ({"language": "english"}, {"language": "en"}),
        ({"language": "en-US"}, {"language": "en"}),
        ({"temperature": "0"}, {"temperature": "0.0"}),
        ({"vad_parameters": '{"threshold":0.5}'}, {"vad_parameters": "{}"}),
    ],
)
def test_requests_that_mean_the_same_have_one_fingerprint(left, right):
    """Defaults spelled out, other spellings and empty fields cost no second run."""
    assert same(left, right)


@pytest.mark.parametrize(
    "changed",
    [
        {"language": "de"},
        {"vad_filter": "false"},
        {"word_timestamps": "true"},
        {"initial_prompt": "names"},
        {"task": "translate"},
        {"vad_parameters": '{"threshold": 0.4}'},
        {"log_prob_threshold": "none"},
        {"fast": "true"},
    ],
)
def test_requests_that_differ_have_another_fingerprint(changed):
    assert not same({}, changed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("language", "xx"),
        ("language", "english or german"),
        ("language", "en-"),
        ("language", "en US"),
        ("task", "summarise"),
        ("beam_size", "0"),
        ("beam_size", "99"),
        ("beam_size", "five"),
        ("temperature", "1.5"),
        ("temperature", "nan"),
        ("temperature", "0,0,0,0,0,0,0"),
        ("vad_filter", "perhaps"),
        ("vad_parameters", "[1]"),
        ("vad_parameters", '{"speed": 1}'),
        ("patience", "inf"),
        ("initial_prompt", "a" * 2001),
        ("hotwords", "a\x00b"),
        ("no_such_option", "1"),
        ("fast", "perhaps"),
    ],
)
def test_a_wrong_value_is_refused_by_name(field, value):
    with pytest.raises(ValidationError) as caught:
        TranscriptionOptions(**{field: value})
    assert caught.value.errors()[0]["loc"][0] == field


def test_fast_is_refused_where_it_could_do_nothing():
    """In mode sequential; the sentence says what to change."""
    with pytest.raises(ValidationError) as caught:
        TranscriptionOptions(fast="true", mode="sequential")
    (error,) = caught.value.errors()
    assert error["loc"] == ("fast",)
    assert error["msg"] == "Value error, fast needs mode=batched"
    assert TranscriptionOptions(fast="false", mode="sequential").mode == "sequential"


@given(st.dictionaries(st.sampled_from(sorted(TranscriptionOptions.model_fields)), st.text()))
def test_no_text_breaks_the_validation(fields):
    """Whatever is sent, the answer is options or a ValidationError."""
    try:
        options = TranscriptionOptions(**fields)
    except ValidationError:
        return
    assert TranscriptionOptions.model_validate_json(options.canonical()) == options


def test_every_option_is_one_of_faster_whispers():
    """Names and defaults are the library's, so its documentation holds for us too."""
    theirs = inspect.signature(WhisperModel.transcribe).parameters
    ours = TranscriptionOptions()
    for name in set(TranscriptionOptions.model_fields) - OURS:
        default = theirs[name].default
        value = getattr(ours, name)
        assert list(value) == list(default) if isinstance(value, tuple) else value == default, name


def test_vad_defaults_are_faster_whispers():
    theirs = VadOptions()
    for name, field in VadParameters.model_fields.items():
        default = getattr(theirs, name)
        if name != "max_speech_duration_s":  # theirs is infinite, which JSON can't say
            assert field.default == default, name


def test_the_languages_are_the_models():
    assert set(LANGUAGES) == set(_LANGUAGE_CODES)


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("EN", "en"),
        (" German ", "de"),
        ("haitian creole", "ht"),
        ("pt-BR", "pt"),
        ("zh_Hant_TW", "zh"),
        ("yue-Hant-HK", "yue"),
        ("cmn-Hans", "zh"),
        ("nb-NO", "no"),
        ("fil", "tl"),
        ("jv", "jw"),
        ("iw", "he"),
        ("Flemish", "nl"),
        ("xx-US", None),
        ("german-DE", None),
        ("", None),
    ],
)
def test_a_language_is_known_by_code_name_and_tag(said, code):
    assert code_of(said) == code


def test_other_names_of_languages_lead_to_codes_and_hide_none():
    assert set(OTHER_NAMES.values()) <= set(LANGUAGES)
    assert not set(OTHER_NAMES) & {*LANGUAGES, *LANGUAGES.values()}
