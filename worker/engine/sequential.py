"""Mode `sequential`: window after window, each with the text before it as context.

The loop is faster-whisper's own (`WhisperModel.generate_segments`); what comes before it is ours,
because the library runs the encoder once more to detect the language, and joins the stretches of
speech in quadratic time.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
from faster_whisper import WhisperModel
from faster_whisper.audio import pad_or_trim
from faster_whisper.tokenizer import Tokenizer
from faster_whisper.transcribe import Segment as WhisperSegment
from faster_whisper.transcribe import TranscriptionOptions as WhisperOptions
from faster_whisper.transcribe import get_suppressed_tokens, restore_speech_timestamps

from shared.options import TranscriptionOptions
from worker.engine.decode import SAMPLE_RATE
from worker.engine.speech import Stretch
from worker.engine.transcript import Heard
from worker.engine.vad import Audio

PREPEND = "\"'“¿([{-"
APPEND = "\"'.。,，!！?？:：”)]}、"  # noqa: RUF001 - faster-whisper's list
MAX_INITIAL_TIMESTAMP = 1.0  # seconds; faster-whisper's default


def transcribe(
    whisper: WhisperModel,
    audio: Audio,
    stretches: list[Stretch] | None,
    options: TranscriptionOptions,
    heard: Heard,
) -> Generator[WhisperSegment, None, None]:
    """Segments as they are found; the language of `heard` is filled in before the first.
    `stretches`: those of the recording that `audio` was joined from, if it was."""
    features = whisper.feature_extractor(audio)
    encoding, language = first_encoding(whisper, features, options, heard)
    tokenizer = Tokenizer(
        whisper.hf_tokenizer, whisper.model.is_multilingual, task=options.task, language=language
    )
    segments = whisper.generate_segments(
        features, tokenizer, whisper_options(options, tokenizer), False, encoding
    )
    if stretches:
        segments = restore_speech_timestamps(segments, stretches, SAMPLE_RATE)
    yield from segments


def first_encoding(
    whisper: WhisperModel, features: np.ndarray, options: TranscriptionOptions, heard: Heard
) -> tuple[Any, str]:
    """The encoding of the first window, and the language that it tells."""
    language = given_language(whisper, options)
    if language:
        heard.language = language
        return None, language
    frames = min(whisper.feature_extractor.nb_max_frames, features.shape[-1] - 1)
    encoding = whisper.encode(pad_or_trim(features[:, :frames]))
    token, probability = whisper.model.detect_language(encoding)[0][0]
    heard.language, heard.language_probability = token[2:-2], probability
    # Without a frame there is no first window, and nothing that the encoding could be reused for.
    return (encoding if frames else None), heard.language


def given_language(whisper: WhisperModel, options: TranscriptionOptions) -> str | None:
    """A model for English alone knows no other, whatever is asked of it."""
    return options.language if whisper.model.is_multilingual else "en"


def whisper_options(options: TranscriptionOptions, tokenizer: Tokenizer) -> WhisperOptions:
    return WhisperOptions(
        beam_size=options.beam_size,
        best_of=options.best_of,
        patience=options.patience,
        length_penalty=options.length_penalty,
        repetition_penalty=options.repetition_penalty,
        no_repeat_ngram_size=options.no_repeat_ngram_size,
        log_prob_threshold=options.log_prob_threshold,
        no_speech_threshold=options.no_speech_threshold,
        compression_ratio_threshold=options.compression_ratio_threshold,
        condition_on_previous_text=options.condition_on_previous_text,
        prompt_reset_on_temperature=options.prompt_reset_on_temperature,
        temperatures=list(options.temperature),
        initial_prompt=options.initial_prompt,
        prefix=None,
        suppress_blank=True,
        suppress_tokens=get_suppressed_tokens(tokenizer, [-1]),
        without_timestamps=options.without_timestamps,
        max_initial_timestamp=MAX_INITIAL_TIMESTAMP,
        word_timestamps=options.word_timestamps,
        prepend_punctuations=PREPEND,
        append_punctuations=APPEND,
        multilingual=False,
        max_new_tokens=None,
        clip_timestamps="0",
        hallucination_silence_threshold=options.hallucination_silence_threshold,
        hotwords=options.hotwords,
    )
