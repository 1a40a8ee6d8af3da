"""The forms of /v1/audio: which fields they have, and what these are in our words."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from api.formats import Writing
from api.forms import form_schema, options_of, validated
from api.openai.models import NO_SPEAKERS, usable
from api.uploads import Field as Sent
from api.uploads import Judge, once
from shared.errors import InvalidField
from shared.job_options import JobOptions
from shared.options import Task, TranscriptionOptions

RULES = frozenset(Writing.model_fields) - {"format"}  # for captions
LISTS = frozenset({"languages", "keywords", "timestamp_granularities", "include"})
OF_SPEAKERS = frozenset({"known_speaker_names", "known_speaker_references"})
NO_URL = "is not taken here; send the file, or the address to POST /transcribe"
HEARD_OF_PROMPT = 2000  # characters; Whisper hears its last 224 tokens
MAX_DEPTH = 8
_ITEM = re.compile(r"\.\d+$")  # of a list
_NAME = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")


AudioFormat = Literal["json", "text", "srt", "verbose_json", "vtt"]


class ServerVad(BaseModel):
    """Names, meanings and defaults are OpenAI's."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    type: Literal["server_vad"]
    threshold: float = Field(0.5, ge=0.01, le=0.99)
    prefix_padding_ms: int = Field(300, ge=0, le=10_000)
    silence_duration_ms: int = Field(200, ge=0, le=60_000)

    @property
    def vad_parameters(self) -> dict[str, float]:
        return {
            "threshold": self.threshold,
            "speech_pad_ms": self.prefix_padding_ms,
            "min_silence_duration_ms": self.silence_duration_ms,
        }


def _strategy(value: Any) -> Any:
    """`auto` is what happens anyway; an object comes as one, or as its JSON."""
    if isinstance(value, str) and value.strip('" ') == "auto":
        return None
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as exc:
        raise ValueError("must be auto, or a JSON object with the type server_vad") from exc


class AudioForm(BaseModel):
    """OpenAI's fields. What else is sent is kept, and may be ours."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    model: str = Field("", description="A name that GET /v1/models lists, like `whisper-1`.")
    language: str | None = Field(
        None, description="Code (`en`, `en-US`) or English name; detected when absent."
    )
    languages: list[str] = Field([], description="The language, where there is only one.")
    prompt: str | None = Field(None, description="Text taken as said before: names, spelling.")
    keywords: list[str] = Field([], description="Words to expect.")
    response_format: AudioFormat = Field("json", description="How to write it.")
    temperature: Any = Field(0, description="0: the next one is tried when a window looks wrong.")
    timestamp_granularities: list[Literal["word", "segment"]] = Field(
        [], description="What verbose_json lists; segments, unless something is said here."
    )
    stream: bool = Field(False, description="Server-sent events, each with a piece of the text.")
    chunking_strategy: Annotated[ServerVad | None, BeforeValidator(_strategy)] = Field(
        None, description="`auto`, or the fine tuning of the VAD filter: an object of type "
        "`server_vad`."
    )  # fmt: skip
    include: list[str] = Field([], description="Nothing can be included.")

    @field_validator("*", mode="before")
    @classmethod
    def _empty_means_default(cls, value: Any, info: Any) -> Any:
        if isinstance(value, str) and not value.strip():
            return cls.model_fields[info.field_name].default
        return value

    @field_validator("response_format", mode="before")
    @classmethod
    def _no_speakers(cls, value: Any) -> Any:
        if value == "diarized_json":
            raise ValueError(f"{NO_SPEAKERS}, so there is no diarized_json")
        return value

    @field_validator("include")
    @classmethod
    def _nothing_included(cls, value: list[str]) -> list[str]:
        if value:
            raise ValueError(
                "log probabilities of tokens are not kept here; verbose_json has those of segments"
            )
        return value

    @property
    def problems(self) -> list[tuple[str, str]]:
        """Fields that are right by themselves, and wrong together."""
        found = []
        if self.stream and self.response_format not in {"json", "text"}:
            found.append(("response_format", "must be json or text with stream=true"))
        if self.timestamp_granularities and self.response_format != "verbose_json":
            found.append(("timestamp_granularities", "needs response_format=verbose_json"))
        ours = self.model_extra or {}
        for field, name in SAME.items():
            if name in ours and field in self.model_fields_set:
                found.append((name, f"means the same as {field}; send one of them"))
        return found

    def options(self) -> dict[str, Any]:
        """Those of our names that these fields stand for."""
        made: dict[str, Any] = {"language": self.language}
        if not self.language and len(self.languages) == 1:
            made["language"] = self.languages[0]
        if self.prompt:
            made["initial_prompt"] = self.prompt[-HEARD_OF_PROMPT:]
        if self.keywords:
            made["hotwords"] = ", ".join(self.keywords)
        if self.chunking_strategy:
            made["vad_parameters"] = self.chunking_strategy.vad_parameters
        if not is_zero(self.temperature):
            made["temperature"] = self.temperature
        if "word" in self.timestamp_granularities:
            made["word_timestamps"] = True
        return {name: value for name, value in made.items() if value is not None}


SAME = {"prompt": "initial_prompt", "keywords": "hotwords", "chunking_strategy": "vad_parameters"}


@dataclass(frozen=True)
class Asked:
    """What a form asks for."""

    options: TranscriptionOptions
    job: JobOptions
    writing: Writing
    is_streamed: bool
    has_segments: bool  # verbose_json lists them
    has_words: bool
    ignored: tuple[str, ...]  # fields that nobody here knows


def asked_of(sent: Sequence[Sent], task: Task, loaded: str) -> Asked:
    """`task`: the endpoint's. `loaded`: the model's name. Raises InvalidField naming every field
    that is wrong, ModelNotFound."""
    problems: list[tuple[str, str]] = []
    form = validated(AudioForm, unbracketed(sent), problems)
    if form is None:
        raise InvalidField([(_ITEM.sub("", field), text) for field, text in problems])
    usable(form.model, loaded)
    extra = dict(form.model_extra or {})
    mine = {**TranscriptionOptions.model_fields, **JobOptions.model_fields}
    ours = {name: extra.pop(name) for name in [*extra] if name in mine}
    rules = {name: extra.pop(name) for name in [*extra] if name in RULES}
    problems += form.problems
    writing = validated(Writing, {"format": form.response_format, **rules}, problems)
    if task == "translate" and ours.setdefault("task", task) != task:
        problems.append(("task", "must be translate at /v1/audio/translations"))
    if problems or writing is None:
        raise InvalidField(problems)
    if writing.words:
        ours.setdefault("word_timestamps", True)
    try:
        options, job = options_of({**ours, **form.options()})
    except InvalidField as exc:
        raise InvalidField([(said_as(field, ours), text) for field, text in exc.errors]) from exc
    listed = set(form.timestamp_granularities) or {"segment"}
    if len(form.languages) > 1:
        extra["languages"] = form.languages
    return Asked(
        options=options,
        job=job,
        writing=writing,
        is_streamed=form.stream,
        has_segments="segment" in listed,
        has_words=options.word_timestamps,
        ignored=tuple(sorted(extra)),
    )


def judge(loaded: str) -> Judge:
    """What api.uploads.receive asks of each part, so that a form which is refused for certain is
    refused before its file is read: OpenAI's clients send the fields first."""

    def at(name: str, before: Sequence[Sent]) -> None:
        head = name.partition("[")[0]
        if head in OF_SPEAKERS:
            raise InvalidField([(head, NO_SPEAKERS)])
        if head == "url":
            raise InvalidField([(head, NO_URL)])
        if head not in LISTS and not name.endswith("[]"):
            once(name, before)
        if name == "file":
            for model in (value for field, value in before if field == "model"):
                usable(model, loaded)

    return at


def will_wait(before: Sequence[Sent]) -> bool:
    """Whether a form with these fields before its file is not for a stream, which has no timeout.
    False where that is to be seen only behind the file."""
    given = dict(before)
    return "model" in given and given.get("stream", "").lower() in {"", "false", "0", "no", "off"}


def said_as(name: str, ours: Mapping[str, Any]) -> str:
    """The field by which the caller sent an option."""
    head = name.partition(".")[0]
    theirs = (field for field, mine in SAME.items() if mine == head and head not in ours)
    return next(theirs, _ITEM.sub("", name))


def is_zero(temperature: Any) -> bool:
    """The one number 0; a list that has only 0 is meant as it is."""
    try:
        return not isinstance(temperature, list) and float(temperature) == 0
    except (TypeError, ValueError):
        return False


def unbracketed(sent: Sequence[Sent]) -> dict[str, Any]:
    """`a[b]=1` is {"a": {"b": "1"}} and `a[]=1` is {"a": ["1"]}: so do OpenAI's clients write
    objects and lists. Raises InvalidField where a field is sent in two ways."""
    tree: dict[str, Any] = {}
    for name, value in sent:
        match = _NAME.fullmatch(name)
        inner = re.findall(r"\[([^\[\]]*)\]", match[2]) if match else []
        if match is None or len(inner) > MAX_DEPTH:
            tree.setdefault(name, value)
            continue
        *way, last = [match[1], *inner]
        is_list = last == "" or name in LISTS
        if last == "":
            last = way.pop()
        node: Any = tree
        for key in way:
            node = node.setdefault(key, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or not isinstance(node.get(last, []), list):
            raise InvalidField([(name[:64], "was sent before, in another way")])
        if is_list:
            node.setdefault(last, []).extend([value] if value else [])
        elif last in node:
            raise InvalidField([(name[:64], "was sent twice")])
        else:
            node[last] = value
    return tree


def schema() -> dict[str, Any]:
    """The OpenAPI schema of the form: OpenAI's fields, and ours."""
    theirs = AudioForm.model_json_schema()
    made = theirs["properties"]
    for name in LISTS:
        made[f"{name}[]"] = made.pop(name)
    made["chunking_strategy"] = {
        "type": "string",
        "default": "auto",
        "description": made["chunking_strategy"]["description"],
    }
    made["temperature"] = {"type": "string", "default": "0"} | made["temperature"]
    ours = form_schema()["properties"]
    return {"type": "object", "required": ["file", "model"], "properties": {**ours, **made}}
