"""Every error of the service, HTTP-free, so that the API and the worker raise the same classes.

ServiceError
├── RequestError              the caller can mend it by sending something else
│   ├── InvalidField          a form field has a wrong value (names the field)
│   ├── MalformedUpload       the body is not a multipart form we can read
│   ├── MalformedBody         nor JSON, nor a simple form
│   ├── MissingFile, EmptyFile, FileTooLarge, BatchTooLarge, NotAudio, UploadTooSlow
│   ├── UrlNotAllowed         an address that we do not ask
│   ├── UrlUnreachable, UrlStatus, UrlTooSlow   one that gave nothing
│   ├── Unauthorized, Forbidden   no valid API key, or one that may not do that
│   ├── IdempotencyConflict   the key was used for another request
│   ├── DigestUnknown         the file has to be uploaded
│   ├── ListingOff            no list of jobs without API keys
│   ├── JobNotFound, JobExpired, JobEndedAlready, BatchNotFound, WebhookNotFound
│   ├── JobNotFailed, RetryInVain, UploadGone   there is nothing to retry
│   ├── ModelNotFound         no model of that name is loaded
│   └── ResultNotReady, JobFailed, JobCancelled   the job has no result (yet)
├── Unavailable               our side can't serve now; the same request may work later
│   ├── StoreUnavailable      Redis does not answer
│   ├── StoreFull             Redis has no memory to spare
│   ├── QueueFull             too much waits already
│   ├── TooManyWaiters        too many requests wait for a job already
│   ├── WaitTooLong           so much that this caller would give up before its turn
│   ├── StillRunning          it takes longer than one request may wait
│   ├── TooManyFetches        too many recordings are being fetched
│   ├── LimitReached          the caller has used what its key allows
│   │   └── RateLimited, TooManyJobs, AudioMinutesUsed
│   └── StorageFull           no room for the upload
├── MediaError                the file can't be transcribed, however often it is tried
│   └── UnreadableMedia, NoAudioStream, TruncatedMedia, AudioTooLong, AudioTooShort
├── TranscriptionError        the work failed on our side
│   └── WorkerLost, InputMissing, EngineFailure, TimeLimit, HandbackLimit
└── ModelUnavailable, DecoderUnavailable, InvalidSettings   ends start-up with one sentence

The class docstring is the default message; `code` is the stable name that clients switch on;
`retryable`: the same again may succeed. The upload of a job that failed so is kept for its retry.
"""

from __future__ import annotations


class ServiceError(Exception):
    """Something went wrong."""

    code = "internal_error"
    retryable = False

    def __init__(self, message: str | None = None, *, retry_after_seconds: int | None = None):
        self.message = message or (type(self).__doc__ or "").strip()
        self.retry_after_seconds = retry_after_seconds
        super().__init__(self.message)


class RequestError(ServiceError):
    """The request can't be served as it is."""

    code = "invalid_request"


class InvalidField(RequestError):
    """A form field has a value that we can't use."""

    code = "invalid_field"

    def __init__(self, errors: list[tuple[str, str]]):
        """`errors`: (field name, what is wrong with it) pairs, at least one."""
        self.errors = errors
        super().__init__("; ".join(f"{field}: {problem}" for field, problem in errors))


class MalformedUpload(RequestError):
    """The body is not multipart/form-data. Send the audio as the form field `file`, \
for example: curl -F "file=@audio.mp3" ..."""

    code = "malformed_upload"


class MalformedBody(RequestError):
    """The body is neither a JSON object nor a form (application/x-www-form-urlencoded), or is \
larger than 64 KiB."""

    code = "malformed_body"


class MissingFile(RequestError):
    """No file was sent. Send the audio as the form field `file`, \
for example: curl -F "file=@audio.mp3" ..."""

    code = "missing_file"


class EmptyFile(RequestError):
    """The file is empty (0 bytes)."""

    code = "empty_file"


class FileTooLarge(RequestError):
    """The file is larger than this server accepts."""

    code = "file_too_large"


class BatchTooLarge(RequestError):
    """The files of the batch are larger together than this server accepts. Send them in several \
batches."""

    code = "batch_too_large"


class UploadTooSlow(RequestError):
    """The upload came too slowly, or not at all for a while. Send it again, over a better line."""

    code = "upload_too_slow"


class NotAudio(RequestError):
    """The file is text, not audio or video, whatever its name says."""

    code = "unsupported_media"


class UrlNotAllowed(RequestError):
    """The address is none that this server asks."""

    code = "url_not_allowed"


UNREACHABLE = {
    "name": "Its name does not resolve to an address.",
    "connection": "It takes no connection, or ended it.",
    "tls": "Its certificate is not valid, or it speaks no TLS.",
    "protocol": "What it answers is no HTTP.",
    "ended": "It ended its answer early.",
}


class UrlUnreachable(RequestError):
    """The server at this address can't be reached."""

    code = "url_unreachable"

    def __init__(self, reason: str = "connection"):
        """`reason`: one of UNREACHABLE."""
        self.reason = reason
        super().__init__(f"The server at this address can't be reached. {UNREACHABLE[reason]}")


class UrlStatus(RequestError):
    """The server at this address did not give the file."""

    code = "url_status"


class UrlTooSlow(RequestError):
    """The server at this address answered too slowly, or not at all."""

    code = "url_too_slow"


class Unauthorized(RequestError):
    """No valid API key came with the request. Send one in the header `Authorization: Bearer KEY` \
or `X-API-Key: KEY`; whoever runs this service makes them."""

    code = "unauthorized"


class Forbidden(RequestError):
    """The API key is valid, but was not made for this."""

    code = "forbidden"


class IdempotencyConflict(RequestError):
    """The Idempotency-Key was used before, for other bytes or other fields. Send a new key with \
each new request."""

    code = "idempotency_conflict"


class DigestUnknown(RequestError):
    """Nothing is known of a file with this digest and these options. Upload the file."""

    code = "digest_unknown"


class ListingOff(RequestError):
    """This service lists no jobs: without API keys, whoever knows a job's id can read it. Its \
settings AUTH=keys or LIST_JOBS=true change that."""

    code = "listing_off"


class BatchNotFound(RequestError):
    """There is no batch with this id, or all of its jobs are expired or erased."""

    code = "batch_not_found"


class JobNotFound(RequestError):
    """There is no job with this id. Ids are those that POST /transcribe returned."""

    code = "job_not_found"


class JobExpired(RequestError):
    """The job's result was kept for its retention time and is gone. Submit the file again."""

    code = "job_expired"


class ModelNotFound(RequestError):
    """No model of this name is loaded. GET /v1/models lists the names that it has."""

    code = "model_not_found"


class WebhookNotFound(RequestError):
    """The job was submitted without a webhook_url."""

    code = "webhook_not_found"


class ResultNotReady(RequestError):
    """The job is not finished. Ask again after the time that Retry-After names."""

    code = "result_not_ready"


class JobFailed(RequestError):
    """The job failed, so it has no result."""

    code = "job_failed"

    def __init__(self, code: str, message: str):
        """`code`, `message`: the failure's own."""
        super().__init__(message)
        self.code = code


class JobEndedAlready(RequestError):
    """The job has ended, so it can't be cancelled. DELETE erases it."""

    code = "job_ended"


class JobNotFailed(RequestError):
    """The job has not failed, so there is nothing to retry."""

    code = "job_not_failed"


class RetryInVain(RequestError):
    """The job failed because of its file, and would fail again. Submit another file."""

    code = "retry_in_vain"


class UploadGone(RequestError):
    """The job's upload is not kept any more, so it can't be retried. Submit the file again."""

    code = "upload_gone"


class JobCancelled(RequestError):
    """The job was cancelled, so it has no result. Submit the file again to transcribe it."""

    code = "job_cancelled"


class Unavailable(ServiceError):
    """The service can't do this right now. Try again after the time that Retry-After names."""

    code = "unavailable"
    retryable = True


class StoreUnavailable(Unavailable):
    """The job store does not answer; nothing was accepted or changed. Try again shortly."""

    code = "store_unavailable"


class StoreFull(Unavailable):
    """The job store has no memory left for new jobs; those it has are safe. Try again later."""

    code = "store_full"


class QueueFull(Unavailable):
    """More of yours waits than can be done in the time that this server promises; nothing was \
kept. Try again after the time that Retry-After names."""

    code = "queue_full"


class TooManyWaiters(Unavailable):
    """As many requests wait for a job here as this server allows. Ask without `wait`, or again \
after the time that Retry-After names."""

    code = "too_many_waiters"


class WaitTooLong(Unavailable):
    """The transcription would not even begin before this request's timeout; nothing was kept. Try \
again after the time that Retry-After names, with a longer timeout, or submit to POST /transcribe, \
where nobody has to wait."""

    code = "wait_too_long"


class StillRunning(Unavailable):
    """The transcription takes longer than one request may wait, and goes on. Send the same again \
to wait for the rest, or get its result by the job id in the header X-Job-Id."""

    code = "still_running"


class TooManyFetches(Unavailable):
    """As many recordings are being fetched from other servers as this one does at a time; nothing \
was kept. Try again after the time that Retry-After names."""

    code = "too_many_fetches"


class LimitReached(Unavailable):
    """The API key's limits are reached. Try again after the time that Retry-After names."""

    code = "limit_reached"


class RateLimited(LimitReached):
    """Too many requests, from one address or with one API key. Try again after the time that \
Retry-After names."""

    code = "rate_limited"


class TooManyJobs(LimitReached):
    """As many jobs of this API key are unfinished as it may have; nothing was kept. Try again \
after the time that Retry-After names."""

    code = "too_many_jobs"


class AudioMinutesUsed(LimitReached):
    """The API key's minutes of audio for this day (UTC) are used, or held by its unfinished jobs; \
nothing was kept. Try again after the time that Retry-After names."""

    code = "audio_minutes_used"


class StorageFull(Unavailable):
    """The server has no disk space left for uploads; nothing was kept. Try again later."""

    code = "storage_full"


class MediaError(ServiceError):
    """The file can't be transcribed."""

    code = "unreadable_media"


class UnreadableMedia(MediaError):
    """The file could not be decoded: it is damaged, or not in an audio or video format \
that we know (WAV, MP3, FLAC, Ogg, Opus, M4A, MP4, WebM, AAC and others)."""

    code = "unreadable_media"


class NoAudioStream(MediaError):
    """The file holds no audio stream (a video without sound, or a picture)."""

    code = "no_audio_stream"


class TruncatedMedia(MediaError):
    """The file ends early: less audio could be decoded than its header promises."""

    code = "truncated_media"


class AudioTooLong(MediaError):
    """The audio is longer than this server accepts."""

    code = "audio_too_long"


class AudioTooShort(MediaError):
    """The file decodes to no audio samples at all."""

    code = "no_audio_samples"


class TranscriptionError(ServiceError):
    """The transcription failed on our side."""

    code = "internal_error"
    retryable = True


class WorkerLost(TranscriptionError):
    """Every worker that tried this file died while working on it, so it was given up."""

    code = "worker_lost"


class InputMissing(TranscriptionError):
    """The uploaded file is no longer in storage. Submit it again."""

    code = "input_missing"
    retryable = False


class EngineFailure(TranscriptionError):
    """The speech model failed on this file more than once."""

    code = "engine_failure"


class TimeLimit(TranscriptionError):
    """The transcription took longer than this server gives one."""

    code = "time_limit"


class HandbackLimit(TranscriptionError):
    """Workers had to hand this file back too often (restarts or a failing machine)."""

    code = "handed_back_too_often"


class ModelUnavailable(ServiceError):
    """The speech model can't be loaded."""

    code = "model_unavailable"


class DecoderUnavailable(ServiceError):
    """The media decoder can't be used."""

    code = "decoder_unavailable"


class InvalidSettings(ServiceError):
    """A setting has a value that we can't use."""

    code = "invalid_settings"


def failure_of(code: str, message: str) -> ServiceError:
    """What a failed job shows, as the MediaError or TranscriptionError that its worker met."""
    kinds = (*MediaError.__subclasses__(), *TranscriptionError.__subclasses__())
    kind = next((kind for kind in kinds if kind.code == code), TranscriptionError)
    return kind(message)
