"""What a caller may ask of a transcription, validated, and the fingerprint that follows from it.

Names, meanings and defaults are faster-whisper's (`WhisperModel.transcribe`), but for
`vad_filter`, which is on by default, as in the service that this one succeeds, and for `mode`,
`fast` and `allow_partial`, which are ours.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from shared.languages import code_of

# Raised whenever the same options and model begin to give another transcript.
ENGINE_REVISION = "3"

Mode = Literal["batched", "sequential"]
Task = Literal["transcribe", "translate"]


def _finite_list(value: Any) -> Any:
    """`0`, `0.0,0.4` and `[0.0, 0.4]` are all lists of temperatures."""
    if isinstance(value, str):
        return [part.strip() for part in value.strip("[] ").split(",") if part.strip()]
    return value if isinstance(value, list | tuple) else [value]


class VadParameters(BaseModel):
    """Fine tuning of the VAD filter (Silero VAD), sent as a JSON object."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    threshold: float = Field(0.5, ge=0.01, le=0.99, description="Speech probability, 0-1.")
    neg_threshold: float | None = Field(None, ge=0.0, le=0.99, description="End of speech below.")
    min_speech_duration_ms: int = Field(
        0, ge=0, le=60_000, description="Shorter speech is dropped."
    )
    max_speech_duration_s: float = Field(
        86_400.0, ge=1, le=86_400, description="Longer speech is split."
    )
    min_silence_duration_ms: int = Field(
        2000, ge=0, le=60_000, description="Silence that separates speech."
    )
    speech_pad_ms: int = Field(400, ge=0, le=10_000, description="Kept around speech.")


def _json_object(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as exc:  # the latter: [[[[...
        raise ValueError("must be a JSON object") from exc


class TranscriptionOptions(BaseModel):
    """The form fields of POST /transcribe, besides `file`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    language: str | None = Field(
        None,
        description="Code (`en`, `pt-BR`) or English name of the spoken language; detected when "
        "absent or auto.",
    )
    mode: Mode = Field(
        "batched",
        description="`batched` decodes windows independently, `sequential` with the text before "
        "them as context.",
    )
    task: Task = Field("transcribe", description="`translate` writes English.")
    vad_filter: bool = Field(True, description="Skip stretches without speech.")
    vad_parameters: Annotated[VadParameters | None, BeforeValidator(_json_object)] = Field(
        None, description="Fine tuning of the VAD filter, a JSON object."
    )
    word_timestamps: bool = Field(False, description="Give each word its start, end, probability.")
    initial_prompt: str | None = Field(
        None, max_length=2000, description="Text the model takes as said before: names, spelling."
    )
    hotwords: str | None = Field(
        None, max_length=2000, description="Words to expect in every window."
    )
    beam_size: int = Field(5, ge=1, le=10, description="Hypotheses searched at temperature 0.")
    best_of: int = Field(5, ge=1, le=10, description="Samples drawn above temperature 0.")
    patience: float = Field(1.0, gt=0, le=4, description="Beam search patience.")
    length_penalty: float = Field(1.0, ge=0, le=4, description="Above 1 favours longer text.")
    repetition_penalty: float = Field(1.0, ge=0.5, le=4, description="Above 1 punishes repetition.")
    no_repeat_ngram_size: int = Field(
        0, ge=0, le=20, description="N-grams that may occur once only."
    )
    temperature: Annotated[tuple[float, ...], BeforeValidator(_finite_list)] = Field(
        (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
        min_length=1,
        max_length=6,
        description="One number or a comma list; the next is tried when a window looks wrong.",
    )
    compression_ratio_threshold: float | None = Field(
        2.4, gt=0, le=100, description="A window whose text compresses better is tried again."
    )
    log_prob_threshold: float | None = Field(
        -1.0, ge=-100, le=0, description="A window less likely than this is tried again."
    )
    no_speech_threshold: float | None = Field(
        0.6, ge=0, le=1, description="An unlikely window with more no-speech probability is empty."
    )
    condition_on_previous_text: bool = Field(
        True, description="Give each window the text before it as context."
    )
    prompt_reset_on_temperature: float = Field(
        0.5, ge=0, le=1, description="Forget that context above this temperature."
    )
    hallucination_silence_threshold: float | None = Field(
        None,
        gt=0,
        le=60,
        description="Skip silences longer than this (seconds) in doubtful text; "
        "needs word_timestamps.",
    )
    without_timestamps: bool = Field(False, description="Text without times inside a window.")
    fast: bool = Field(
        False,
        description="Let the model hear up to 20 s of speech with less silence after it; "
        "needs mode=batched.",
    )
    allow_partial: bool = Field(
        False, description="Transcribe what can be decoded of a file that ends early."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _empty_means_default(cls, value: Any, info: Any) -> Any:
        """A form that leaves a field empty means its default; `none` switches a threshold off."""
        if isinstance(value, str) and not value.strip():
            return cls.model_fields[info.field_name].default
        if isinstance(value, str) and value.strip().lower() in {"none", "null"}:
            return None
        return value

    @field_validator("language")
    @classmethod
    def _known_language(cls, value: str | None) -> str | None:
        if value is None or value.strip().lower() == "auto":
            return None
        code = code_of(value)
        if code is None:
            raise ValueError(
                f"{value!r:.40} is no language that Whisper knows; use a code like 'en'"
            )
        return code

    @field_validator("temperature")
    @classmethod
    def _temperature_range(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= t <= 1 for t in value):
            raise ValueError("each temperature must lie between 0 and 1")
        return value

    @field_validator("fast")
    @classmethod
    def _fast_is_for_batched(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("mode") == "sequential":
            raise ValueError("fast needs mode=batched")
        return value

    @field_validator("initial_prompt", "hotwords")
    @classmethod
    def _no_control_characters(cls, value: str | None) -> str | None:
        if value is not None and "\x00" in value:
            raise ValueError("must not contain NUL characters")
        return value

    def canonical(self) -> str:
        """The same JSON for the same request, whatever was left to its default."""
        return json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":"))


def fingerprint(checksum: str, options: TranscriptionOptions, model: str, tenant: str = "") -> str:
    """The identity of a transcription: the same bytes, options and model give the same hex digest.

    `checksum`: SHA-256 of the upload, hex. `model`: Settings.model_key. `tenant`: who shares the
    transcription with nobody else; '' where all share.
    """
    identity = [checksum, options.canonical(), model, ENGINE_REVISION]
    text = json.dumps([*identity, tenant] if tenant else identity)
    return hashlib.sha256(text.encode()).hexdigest()
