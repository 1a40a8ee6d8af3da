"""The OpenAI-compatible endpoints, as OpenAI's own SDK and curl meet them."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator

import httpx2
import openai
import pytest
import srt
import webvtt
from openai import AsyncOpenAI, OpenAI

from local.service import Service
from tests.conftest import FOX, FOX_WORDS, SAMPLES, wait_until
from tests.e2e.conftest import QUICK, leftovers, running, variant
from tests.e2e.sdk import WHISPER, details, early_answer, sdk_of
from tests.e2e.test_access import new_key
from tests.model.media import video

KNOWN = json.loads((SAMPLES / "transcripts.json").read_text())
NAMES = {"en": "english", "de": "german", "fr": "french", "es": "spanish"}


@pytest.fixture
def sdk(service: Service) -> Iterator[OpenAI]:
    with sdk_of(service) as made:
        yield made


# --- What the SDK gets


@pytest.mark.parametrize("name", ["quick-brown-fox.wav", "de.wav", "fr.wav", "es.wav"])
def test_a_transcription_is_the_text_in_its_language(sdk, name):
    """The language is detected; duration and usage are numbers, as OpenAI has them."""
    known = KNOWN[name]
    found = sdk.audio.transcriptions.create(file=SAMPLES / name, model=WHISPER)
    assert found.text == known["text"]
    assert [language.code for language in found.languages] == [known["language"]]
    verbose = sdk.audio.transcriptions.create(
        file=SAMPLES / name, model=WHISPER, response_format="verbose_json"
    )
    assert (verbose.text, verbose.language) == (known["text"], NAMES[known["language"]])
    assert verbose.task == "transcribe"
    assert isinstance(verbose.duration, float)
    assert found.usage.type == verbose.usage.type == "duration"
    assert found.usage.seconds == verbose.usage.seconds
    assert verbose.duration <= verbose.usage.seconds < verbose.duration + 1


def test_verbose_json_has_every_field_of_openai_s_segments(sdk):
    found = sdk.audio.transcriptions.create(
        file=SAMPLES / "two-sentences.wav", model=WHISPER, response_format="verbose_json"
    )
    assert found.words is None
    assert "".join(segment.text for segment in found.segments).strip() == found.text
    assert [segment.id for segment in found.segments] == list(range(len(found.segments)))
    for segment in found.segments:
        assert segment.text.startswith(" "), "as Whisper writes it"
        assert segment.tokens
        assert isinstance(segment.seek, int)
        assert 0 <= segment.start < segment.end <= found.duration
        for name in ("avg_logprob", "compression_ratio", "no_speech_prob", "temperature"):
            assert isinstance(getattr(segment, name), float), name


@pytest.mark.parametrize(
    ("asked", "has_words", "has_segments"),
    [(["word"], True, False), (["segment"], False, True), (["word", "segment"], True, True)],
)
def test_timestamps_come_in_the_granularities_that_were_asked_for(
    sdk, asked, has_words, has_segments
):
    found = sdk.audio.transcriptions.create(
        file=FOX, model=WHISPER, response_format="verbose_json", timestamp_granularities=asked
    )
    assert (found.words is not None, found.segments is not None) == (has_words, has_segments)
    if has_words:
        assert [word.word for word in found.words] == FOX_WORDS.split()
        times = [word.start for word in found.words]
        assert times == sorted(times)


def test_every_other_format_is_plain_text(sdk):
    """Not JSON with a text in it: the SDK returns what it gets."""
    create = sdk.audio.transcriptions.create
    file = SAMPLES / "two-sentences.wav"
    said = KNOWN["two-sentences.wav"]["text"]
    assert create(file=file, model=WHISPER, response_format="text") == f"{said}\n"
    captions = list(srt.parse(create(file=file, model=WHISPER, response_format="srt")))
    assert " ".join(caption.content for caption in captions) == said
    text = create(file=file, model=WHISPER, response_format="vtt")
    assert text.startswith("WEBVTT\n\n")
    assert " ".join(caption.text for caption in webvtt.from_string(text)) == said


def test_a_translation_is_english(sdk):
    """By its task; its language is that of the text."""
    with pytest.warns(DeprecationWarning, match="deprecated"):
        found = sdk.audio.translations.create(
            file=SAMPLES / "de.wav", model=WHISPER, response_format="verbose_json"
        )
    assert (found.task, found.language) == ("translate", "english")
    assert found.segments
    with pytest.warns(DeprecationWarning, match="deprecated"):
        plain = sdk.audio.translations.create(file=SAMPLES / "de.wav", model=WHISPER)
    assert plain.text == found.text


async def test_the_asynchronous_client_is_served_as_well(service):
    async with AsyncOpenAI(
        base_url=f"{service.base_url}/v1",
        api_key="any",
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    ) as sdk:
        create = sdk.audio.transcriptions.create
        assert (await create(file=FOX, model=WHISPER)).text == FOX_WORDS
        stream = await create(file=FOX, model=WHISPER, stream=True)
        events = [event async for event in stream]
        assert events[-1].text == FOX_WORDS
        assert len([model async for model in sdk.models.list()]) > 1


def test_bytes_without_a_name_are_taken_for_what_they_are(sdk):
    assert sdk.audio.transcriptions.create(file=FOX.read_bytes(), model=WHISPER).text == FOX_WORDS


def test_our_own_options_come_in_extra_body(service, sdk, client, tmp_path):
    """As values, lists and objects; so does what belongs to the job."""
    answer = sdk.audio.transcriptions.with_raw_response.create(
        file=variant(tmp_path / "a.wav", 1),
        model=WHISPER,
        response_format="verbose_json",
        language="de-AT",
        temperature=0.4,
        chunking_strategy={"type": "server_vad", "threshold": 0.4},
        extra_body={"word_timestamps": True, "metadata": {"order": "17"}, "priority": "high"},
    )
    found = answer.parse()
    assert (found.language, found.model_extra["language_probability"]) == ("german", 1.0)
    assert found.words
    assert found.segments
    assert {segment.temperature for segment in found.segments} == {0.4}
    job = client.status(answer.headers["x-job-id"])
    assert (job["status"], job["metadata"]) == ("completed", {"order": "17"})
    assert job["priority"] == "high"


def test_temperature_0_is_the_ladder_of_whisper(client, sdk, tmp_path):
    """So it is the same transcription as that of POST /transcribe without a temperature."""
    path = variant(tmp_path / "a.wav", 2)
    client.wait(client.submit(path)["job_id"])
    before = client.stats()["cache"]["hits"]
    assert sdk.audio.transcriptions.create(file=path, model=WHISPER, temperature=0).text
    assert client.stats()["cache"]["hits"] == before + 1


def test_unknown_fields_are_named_in_a_header(sdk):
    answer = sdk.audio.transcriptions.with_raw_response.create(
        file=FOX, model=WHISPER, languages=["en", "de"], extra_body={"user": "me", "tone": {"a": 1}}
    )
    assert answer.headers["x-ignored-fields"] == "languages, tone, user"
    assert answer.parse().text == FOX_WORDS


def test_a_silent_recording_is_an_empty_text_with_a_warning(sdk):
    found = sdk.audio.transcriptions.create(file=SAMPLES / "silence.wav", model=WHISPER)
    assert (found.text, found.languages) == ("", [])
    assert [warning["code"] for warning in found.model_extra["warnings"]] == ["no_speech"]
    events = list(
        sdk.audio.transcriptions.create(file=SAMPLES / "silence.wav", model=WHISPER, stream=True)
    )
    assert [(event.type, event.text) for event in events] == [("transcript.text.done", "")]


def test_the_models_are_the_loaded_one_by_all_its_names(sdk):
    listed = [model.id for model in sdk.models.list()]
    assert listed[0] == "demo"
    assert WHISPER in listed
    for name in listed:
        model = sdk.models.retrieve(name)
        assert (model.id, model.object) == (name, "model")
        assert sdk.audio.transcriptions.create(file=FOX, model=name).text == FOX_WORDS
    for name in ("large-v3", "Systran/faster-whisper-tiny", "gpt-4o-transcribe-diarize"):
        with pytest.raises(openai.NotFoundError) as caught:
            sdk.models.retrieve(name)
        assert details(caught.value)["code"] == "model_not_found"
        assert "'demo'" in caught.value.message


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("is_streamed", [False, True])
def test_curl_works_with_the_fields_in_any_order(service, is_streamed):
    curl = ["curl", "-sS", "-i", "--noproxy", "*", f"{service.base_url}/v1/audio/transcriptions"]
    form = [f"file=@{FOX}", f"model={WHISPER}", "language=en"]
    form += ["stream=true"] if is_streamed else ["response_format=verbose_json"]
    form += [] if is_streamed else ["timestamp_granularities=word"]
    for fields in (form, form[::-1]):
        words = [word for field in fields for word in ("-F", field)]
        head, _, body = subprocess.check_output([*curl, *words], text=True).partition("\n\n")
        assert "200 OK" in head
        assert "x-job-id: " in head.lower()
        if is_streamed:
            assert "x-accel-buffering: no" in head.lower()
            assert body.endswith("data: [DONE]\n\n")
            assert FOX_WORDS in body
        else:
            assert json.loads(body)["text"] == FOX_WORDS


# --- Errors


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "diarized_json"}, "response_format"),
        ({"model": "gpt-4o-transcribe-diarize"}, "model"),
        ({"known_speaker_names": ["Ada"]}, "known_speaker_names"),
        ({"known_speaker_references": ["data:audio/wav;base64," + "A" * 99_999]}, None),
        ({"include": ["logprobs"]}, "include"),
        ({"language": "xx"}, "language"),
        ({"temperature": 1.5}, "temperature"),
        ({"timestamp_granularities": ["word"]}, "timestamp_granularities"),
        ({"stream": True, "response_format": "vtt"}, "response_format"),
        ({"extra_body": {"beam_size": 99}}, "beam_size"),
        ({"extra_body": {"url": "https://example.org/a.mp3"}}, "url"),
        ({"extra_body": {"webhook_url": "https://10.0.0.1/"}}, "webhook_url"),
        ({"file": b""}, "file"),
        ({"file": b"text, not sound"}, "file"),
    ],
)
def test_what_can_not_be_served_is_a_bad_request_that_names_the_field(sdk, service, fields, param):
    """Never faked, and nothing of it stays."""
    with pytest.raises(openai.APIStatusError) as caught:
        sdk.audio.transcriptions.create(**{"file": FOX, "model": WHISPER, **fields})
    assert caught.value.status_code == (415 if fields.get("file") else 400)
    assert details(caught.value)["type"] == "invalid_request_error"
    assert caught.value.body["param"] == (param or "known_speaker_references")
    assert caught.value.request_id
    wait_until(lambda: leftovers(service) == [], 30, "nothing is left behind")


def test_a_file_that_can_not_be_transcribed_is_a_bad_request(sdk, client, tmp_path):
    """With the job's own code, and its id."""
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.audio.transcriptions.create(file=video(tmp_path / "silent.mp4"), model=WHISPER)
    assert (caught.value.code, caught.value.param) == ("no_audio_stream", "file")
    job = caught.value.response.headers["x-job-id"]
    assert client.status(job)["error"]["code"] == "no_audio_stream"


PART = b'--x\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
RECORDING = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n%b\r\n'
END = b"--x--\r\n"
NAMED = PART % (b"model", b"whisper-1")


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(
    ("part", "param"),
    [
        (PART % (b"prompt", b"\xff\xfe"), "prompt"),
        (PART % (b"prompt", b"a" * 20_000), "prompt"),
        (PART % (b"prompt", b"a") + PART % (b"prompt", b"b"), "prompt"),
        (NAMED, "model"),
        (PART % (b"language[a]", b"en"), "language"),
        (PART % (b"timestamp_granularities", b"\0"), "timestamp_granularities"),
        (PART % (b"chunking_strategy", b'{"type": "server_vad", "threshold": 1e999}'), None),
        (PART % (b"temperature", b"9" * 5000), "temperature"),
        (PART % (b"metadata", b"[" * 10_000), "metadata"),
        (RECORDING % FOX.read_bytes(), "file"),
        (PART % (b"file", b"text"), "file"),
        (PART % (b"a", b"b") * 41, None),
        (PART.replace(b"name", b"nam") % (b"a", b"b"), None),
        (b"--x\r\nContent-Disposition: form-data\r\n\r\n", None),
        (b"garbage", None),
    ],
)
def test_no_form_is_a_mistake_of_ours(service, client, part, param, is_first):
    """Whatever is sent, before the file or after it, is a bad request, and nothing of it stays."""
    rest = NAMED + RECORDING % FOX.read_bytes()
    body = part + rest if is_first else rest + part
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = client.http.post("/v1/audio/transcriptions", content=body + END, headers=kind)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert param in {error["param"], None}
    assert error["message"]
    wait_until(lambda: leftovers(service) == [], 30, "nothing is left behind")


def test_an_idempotency_key_names_one_job(service, tmp_path):
    """However its transcript is to be written; another request with it is refused, and not sent
    again."""
    path = variant(tmp_path / "a.wav", 3)
    with sdk_of(service, max_retries=2, default_headers={"Idempotency-Key": "order-17"}) as sdk:
        create = sdk.audio.transcriptions.with_raw_response.create
        first = create(file=path, model=WHISPER)
        again = create(file=path, model=WHISPER, response_format="text")
        assert "idempotent-replayed" not in first.headers
        assert again.headers["idempotent-replayed"] == "true"
        assert again.headers["x-job-id"] == first.headers["x-job-id"]
        assert again.parse() == FOX_WORDS + "\n"
        with pytest.raises(openai.ConflictError) as caught:
            create(file=FOX, model=WHISPER)
    assert details(caught.value)["code"] == "idempotency_conflict"
    assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"


def test_a_form_that_is_refused_for_certain_is_not_read_to_its_end(service):
    """OpenAI's clients send the fields first: an unknown model costs no upload."""
    head = (
        b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nother\r\n'
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nRIFF'
    )
    assert early_answer(service, head)[0] == 404


def test_every_error_below_v1_has_the_envelope(service, client):
    """Whoever refuses: the router, the parser, the limits."""
    http, path = client.http, "/v1/audio/transcriptions"
    file = {"file": ("a.wav", FOX.read_bytes())}
    answers = {
        "no address": (http.get("/v1/nothing"), 404, "not_found"),
        "only the beginning": (http.get("/v1"), 404, "not_found"),
        "no method": (http.get(path), 405, "method_not_allowed"),
        "no form": (http.post(path, json={"file": "x"}), 400, "malformed_upload"),
        "no file": (http.post(path, data={"model": WHISPER}, files={"a": b"b"}), 400, None),
        "no model": (http.post(path, files=file), 400, "invalid_field"),
        "no such model": (
            http.post(path, files=file, data={"model": "other"}),
            404,
            "model_not_found",
        ),
        "text": (
            http.post(path, files={"file": ("a.wav", b"text")}, data={"model": WHISPER}),
            415,
            "unsupported_media",
        ),
    }
    for what, (answer, status, code) in answers.items():
        assert answer.status_code == status, what
        assert answer.headers["content-type"] == "application/json", what
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, what
        assert error["code"] == code or code is None, what
        assert answer.headers["x-request-id"], what
    assert answers["no method"][0].headers["allow"] == "POST"


def test_a_file_over_the_limit_and_a_mistake_of_ours_have_it_too(service, sdk):
    status, headers, error = early_answer(service, b"", announced=10**9)
    assert (status, error["code"], error["param"]) == (413, "file_too_large", "file")
    assert headers["connection"] == "close"
    uploads = service.settings.data_dir / "uploads"
    away = uploads.rename(uploads.with_name("elsewhere"))
    with pytest.raises(openai.InternalServerError) as caught:
        sdk.audio.transcriptions.create(file=FOX, model=WHISPER)
    away.rename(uploads)
    assert (caught.value.status_code, caught.value.code) == (500, "internal_error")
    assert "uploads" not in str(caught.value.body)


# --- Keys


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("keys"), {**QUICK, "auth": "keys"}) as service:
        yield service


def test_keys_are_asked_for_in_openai_s_way(guarded):
    good = new_key(guarded, "app")
    with sdk_of(guarded, api_key=good) as sdk:
        assert sdk.audio.transcriptions.create(file=FOX, model=WHISPER).text == FOX_WORDS
        assert sdk.models.retrieve(WHISPER).id == WHISPER
    with sdk_of(guarded, api_key=good[:-1]) as sdk:
        for ask in (sdk.models.list, lambda: sdk.get("/nothing", cast_to=object)):
            with pytest.raises(openai.AuthenticationError) as caught:
                ask()
            assert details(caught.value)["code"] == "invalid_api_key"
            assert caught.value.type == "authentication_error"
    for scopes in ("read", "submit"):  # to submit there is to read
        with sdk_of(guarded, api_key=new_key(guarded, scopes, "--scopes", scopes)) as sdk:
            with pytest.raises(openai.PermissionDeniedError) as caught:
                sdk.audio.transcriptions.create(file=FOX, model=WHISPER)
            assert details(caught.value)["type"] == "permission_error"
    with sdk_of(guarded, api_key=new_key(guarded, "slow", "--rate", "1/hour")) as sdk:
        sdk.models.list()
        with pytest.raises(openai.RateLimitError) as caught:
            sdk.models.list()
        assert details(caught.value)["code"] == "rate_limit_exceeded"
        assert int(caught.value.response.headers["retry-after"]) > 120, "the SDK gives up at once"


def test_a_caller_s_jobs_are_its_own(guarded):
    mine, other = new_key(guarded, "mine"), new_key(guarded, "other")
    with sdk_of(guarded, api_key=mine) as sdk:
        answer = sdk.audio.transcriptions.with_raw_response.create(file=FOX, model=WHISPER)
    job = f"{guarded.base_url}/status/{answer.headers['x-job-id']}"
    for key, status in {mine: 200, other: 404}.items():
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx2.get(job, headers=headers, trust_env=False).status_code == status
