"""What a job carries for its caller: bounded, canonical, and read back as it was sent."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from api.forms import options_of
from shared.errors import InvalidField
from shared.job_options import MAX_METADATA_BYTES, MAX_METADATA_DEPTH, JobOptions, Priority

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
LEAVES = st.none() | st.booleans() | st.integers() | TEXT
LEAVES |= st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


@given(st.dictionaries(TEXT, VALUES))
def test_metadata_that_is_accepted_comes_back_as_it_was_sent(sent):
    """Through the form, the job's record and back."""
    try:
        made = JobOptions.model_validate({"metadata": json.dumps(sent)})
    except ValidationError:
        return
    assert JobOptions.of(made.record()).metadata == sent
    assert json.loads(made.metadata_json) == sent


def test_a_record_keeps_only_what_is_not_left_to_its_default():
    """And a record of before these fields is one of a job without them."""
    assert JobOptions().record() == {}
    assert JobOptions(metadata={"b": 1, "a": "ü"}, priority="high").record() == {
        "metadata": '{"a":"ü","b":1}',
        "priority": "high",
    }
    assert JobOptions.of({"fingerprint": "f", "outcome": "new"}) == JobOptions()


def test_fields_of_the_job_and_of_the_transcription_stand_in_one_form():
    """A field that is left empty means its default."""
    options, job = options_of({"language": "en", "metadata": "", "priority": "low"})
    assert (options.language, job.metadata, job.priority) == ("en", {}, Priority.LOW)


def test_every_wrong_field_is_named_at_once():
    with pytest.raises(InvalidField) as caught:
        options_of({"beam_size": "99", "metadata": "[]", "priority": "urgent", "colour": "red"})
    assert {name for name, _ in caught.value.errors} == {
        "beam_size",
        "metadata",
        "priority",
        "colour",
    }


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("17", "must be a JSON object"),
        ('"a"', "must be a JSON object"),
        ("[]", "must be a JSON object"),
        ("{", "must be a JSON object"),
        ('{"a": NaN}', "must not contain NaN"),
        ('{"a": 1e999}', "must not contain NaN"),
        ('{"a": 1, "a": 2}', "the same name twice"),
        ('{"a": {"b": 1, "b": 2}}', "the same name twice"),
        (r'{"a": "\ud800"}', "surrogate"),
        (r'{"\udfff": 1}', "surrogate"),
        (nested(MAX_METADATA_DEPTH + 1), "deeper than 8 levels"),
        ('{"a":' + "[" * 100_000, "deeper than 8 levels"),
        ('{"a": "' + "x" * MAX_METADATA_BYTES + '"}', "longer than 4096 bytes"),
        ('{"a": "' + "ü" * (MAX_METADATA_BYTES // 2) + '"}', "longer than 4096 bytes"),
        ('{"a": ' + "9" * 5000 + "}", "longer than 4096 bytes"),
    ],
)
def test_metadata_that_could_not_be_kept_is_refused_with_a_reason(value, problem):
    """Nothing of it breaks the parser, the record or an answer."""
    with pytest.raises(InvalidField) as caught:
        options_of({"metadata": value})
    assert [name for name, _ in caught.value.errors] == ["metadata"]
    assert problem in caught.value.message


def test_the_limits_of_metadata_are_reached_exactly():
    text = '{"a":"' + "x" * (MAX_METADATA_BYTES - 8) + '"}'
    assert len(options_of({"metadata": text})[1].metadata_json) == MAX_METADATA_BYTES
    assert options_of({"metadata": nested(MAX_METADATA_DEPTH)})[1].metadata


def test_control_characters_stay_escaped():
    """No answer, header or log line has them bare."""
    made = options_of({"metadata": r'{"a": "\u0000\r\n\u001b"}'})[1]
    assert made.metadata == {"a": "\0\r\n\x1b"}
    assert made.metadata_json.isprintable()
