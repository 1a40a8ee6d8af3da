"""Every knob of the service, read from the environment and .env. The only place that reads them.

Built once by each composition root and passed down. A test holds .env.example and the README's
table to this list.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import re
from enum import StrEnum
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from dotenv import dotenv_values
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.destinations import Destinations
from shared.errors import InvalidSettings

DEMO_MODEL = "demo"
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:\d+)?|https?://\[[0-9a-f:]+\](:\d+)?")
SECRETS = Path("/run/secrets")


class Device(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"
    AUTO = "auto"


class Auth(StrEnum):
    NONE = "none"
    KEYS = "keys"


class ComputeType(StrEnum):
    """The number formats that CTranslate2 computes in (its documentation: quantization)."""

    DEFAULT = "default"
    AUTO = "auto"
    INT8 = "int8"
    INT8_FLOAT32 = "int8_float32"
    INT8_FLOAT16 = "int8_float16"
    INT8_BFLOAT16 = "int8_bfloat16"
    INT16 = "int16"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class Settings(BaseSettings):
    """Both sides read the same settings, so that API and worker agree on model and limits."""

    model_config = SettingsConfigDict(
        env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True
    )

    # --- model
    model_size: str = Field(
        "base",
        description="tiny, base, small, medium, large-v3, large-v3-turbo"
        "..., a Hub id, a folder, or `demo` (the bundled one).",
    )
    model_revision: str = Field("", description="Commit or tag of a Hub model; empty: its newest.")
    device: Device = Field(Device.AUTO, description="cpu, cuda or auto.")
    device_index: int = Field(0, ge=0, description="Which GPU.")
    compute_type: ComputeType = Field(
        ComputeType.DEFAULT,
        description="int8, float16, float32...; default: as the model is stored.",
    )
    cpu_threads: int = Field(
        0, ge=0, description="Threads of one transcription; 0: by the cores and slots."
    )

    # --- limits
    max_file_size_mb: int = Field(100, ge=1, description="Largest upload, in MiB.")
    max_audio_seconds: int = Field(14_400, ge=1, description="Longest audio.")
    upload_patience_seconds: float = Field(
        30, gt=0, description="An upload of less than 1 KiB a second is cut off after so long."
    )
    min_free_disk_mb: int = Field(256, ge=0, description="Uploads are refused below this, in MiB.")
    max_queue_seconds: int = Field(
        86_400, ge=0, description="A new job waits so long at most, or is refused; 0: any time."
    )
    max_wait_seconds: int = Field(
        3000, ge=1, description="Longest that one request waits for its transcript (/v1/audio)."
    )

    # --- access
    auth: Auth = Field(Auth.NONE, description="none: whoever reaches the API; keys: API keys.")
    share_results: bool = Field(
        False, description="Callers with different keys share the transcript of the same file."
    )
    list_jobs: bool = Field(
        False, description="Without API keys: GET /jobs lists all jobs to whoever asks."
    )
    cors_origins: str = Field(
        "", description="Origins whose pages may read answers, comma-separated, or *."
    )

    # --- other servers
    egress_allow: str = Field(
        "",
        description="Names, addresses and networks that are asked though they are not public.",
    )
    fetch_seconds: float = Field(
        60, gt=0, description="A recording that is fetched from a url= must be here by then."
    )
    webhook_secret: SecretStr = Field(
        SecretStr(""), description="Signs webhooks; empty: one is made and kept in DATA_DIR."
    )
    webhook_secret_old: SecretStr = Field(
        SecretStr(""), description="Signs them, too, while receivers change to the new one."
    )
    webhook_timeout_seconds: float = Field(
        10, gt=0, le=60, description="A receiver must have answered by then."
    )
    webhook_retry_seconds: str = Field(
        "5,30,120,600,1800,3600,10800,21600,43200",
        description="Pauses before a webhook is sent again, one after the other.",
    )

    # --- processes
    host: str = Field("127.0.0.1", description="Address that the API listens on.")
    port: int = Field(8000, ge=0, le=65_535, description="Port that the API listens on.")
    workers: int = Field(1, ge=1, le=64, description="API processes in one replica.")
    max_waiters: int = Field(
        10_000, ge=1, description="Requests that one API process lets wait for a job at a time."
    )
    worker_slots: int = Field(
        0,
        ge=0,
        le=64,
        description="Transcriptions that one worker runs at a time; 0: by the machine.",
    )
    worker_cpus: str = Field("", description="Cores a worker is pinned to, like 0-3,8; empty: all.")
    worker_http_host: str = Field("127.0.0.1", description="Address of the worker's own endpoint.")
    worker_http_port: int = Field(
        9101, ge=0, le=65_535, description="Port of the worker's /healthz and /metrics."
    )

    part_seconds: int = Field(
        300, ge=30, description="Recordings with twice as much speech run in parts of this length."
    )

    # --- storage
    redis_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"), description="Job store, broker and cache."
    )
    redis_password: SecretStr = Field(
        SecretStr(""), description="Goes into a REDIS_URL that has none; any characters."
    )
    data_dir: Path = Field(
        Path(".data"), description="Uploads rest here; API and workers share it."
    )
    result_ttl_seconds: int = Field(86_400, ge=1, description="How long results are kept.")
    result_cache_max_mb: int = Field(256, ge=1, description="Most memory for transcripts, in MiB.")

    # --- job life
    lease_seconds: int = Field(45, ge=3, description="A silent worker loses its job after this.")
    max_attempts: int = Field(
        3, ge=1, description="A file that killed so many workers is given up."
    )
    max_run_seconds: int = Field(
        21_600, ge=1, description="A run of a recording, or of a part of one, is ended after this."
    )
    max_call_seconds: int = Field(
        600, ge=1, description="A worker whose model does not answer for so long ends itself."
    )
    max_handbacks: int = Field(10, ge=1, description="So many drains are too many for one job.")
    reap_interval_seconds: float = Field(
        5, gt=0, description="How often dead leases are looked for."
    )
    drain_seconds: int = Field(
        30, ge=0, description="A stopping worker finishes for so long, then hands its work back."
    )

    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR.")

    @field_validator("log_level")
    @classmethod
    def _known_level(cls, value: str) -> str:
        if value.upper() not in {"DEBUG", "INFO", "WARNING", "ERROR"}:
            raise ValueError("must be DEBUG, INFO, WARNING or ERROR")
        return value.upper()

    @field_validator("model_size")
    @classmethod
    def _some_model(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must name a model, a Hub id or a folder")
        return value.strip()

    @field_validator("worker_cpus")
    @classmethod
    def _cpu_list(cls, value: str) -> str:
        parse_cpus(value)
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: str) -> str:
        origins = parse_origins(value)
        for origin in origins:
            if not _ORIGIN.fullmatch(origin) and origins != ("*",):
                raise ValueError(
                    f"{origin!r} is no origin like https://example.org; or give * alone"
                )
        return value

    @field_validator("egress_allow")
    @classmethod
    def _destinations(cls, value: str) -> str:
        Destinations(value)
        return value

    @field_validator("webhook_secret", "webhook_secret_old")
    @classmethod
    def _signing_key(cls, value: SecretStr) -> SecretStr:
        if value.get_secret_value():
            parse_webhook_secret(value.get_secret_value())
        return value

    @field_validator("webhook_retry_seconds")
    @classmethod
    def _pauses(cls, value: str) -> str:
        parse_pauses(value)
        return value

    @field_validator("redis_url")
    @classmethod
    def _single_redis(cls, value: SecretStr) -> SecretStr:
        if not value.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
            raise ValueError(
                "must begin with redis://, rediss:// or unix:// (no cluster or sentinel)"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _one_redis_address(cls, data: dict[str, Any]) -> dict[str, Any]:
        """What connects reads the URL alone. A password without a URL belongs to another Redis than
        the default one: Compose and `make run` may share a .env."""
        url, password = _plain(data.get("redis_url")), _plain(data.get("redis_password"))
        if not (url and password):
            return data
        return {**data, "redis_url": SecretStr(_with_password(url, password))}

    @model_validator(mode="after")
    def _reaper_sees_leases(self) -> Self:
        if self.reap_interval_seconds > self.lease_seconds:
            raise ValueError("REAP_INTERVAL_SECONDS must not exceed LEASE_SECONDS")
        return self

    @property
    def max_file_size_bytes(self) -> int:
        return self.max_file_size_mb * 1024 * 1024

    @property
    def min_free_disk_bytes(self) -> int:
        return self.min_free_disk_mb * 1024 * 1024

    @property
    def retention_ms(self) -> int:
        return self.result_ttl_seconds * 1000

    @property
    def grace_ms(self) -> int:
        """How long an expired job is still known as expired, so that 410 and not 404 answers."""
        return max(86_400_000, self.retention_ms)

    @property
    def lease_ms(self) -> int:
        return self.lease_seconds * 1000

    @property
    def heartbeat_seconds(self) -> float:
        """A lease survives two lost heartbeats; progress is at most this old."""
        return min(2.0, self.lease_seconds / 3)

    @property
    def model_key(self) -> str:
        """What makes two models give different text, as one string, part of every fingerprint."""
        return f"{self.model_size}@{self.model_revision or 'latest'}/{self.compute_type}"


def load_settings(**overrides: object) -> Settings:
    """Reads the settings; raises InvalidSettings with a sentence that names what to mend.

    A file in /run/secrets that is named like a setting is read, too (Docker's secrets).
    """
    _reject_typos()
    if SECRETS.is_dir():
        overrides = {"_secrets_dir": SECRETS, **overrides}
    try:
        return Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as exc:
        problems = "; ".join(
            f"{'_'.join(map(str, error['loc'])).upper() or 'settings'}: "
            f"{error['msg'].removeprefix('Value error, ')}"
            for error in exc.errors(include_input=False)
        )
        raise InvalidSettings(f"Invalid settings: {problems}") from exc


def _reject_typos() -> None:
    """A name in .env that is almost one of ours is a mistake, not somebody else's variable."""
    names = {name.upper() for name in Settings.model_fields}
    for name in dotenv_values(".env"):
        close = difflib.get_close_matches(name.upper(), names, n=1, cutoff=0.85)
        if close and name.upper() not in names:
            raise InvalidSettings(f"Unknown name {name} in .env: did you mean {close[0]}?")


def _plain(value: object) -> str:
    return str(value.get_secret_value() if isinstance(value, SecretStr) else value or "")


def _with_password(url: str, password: str) -> str:
    scheme, _, rest = url.partition("://")
    if "@" in rest.partition("/")[0] or scheme == "unix":
        return url
    return f"{scheme}://:{quote(password, safe='')}@{rest}"


def parse_origins(text: str) -> tuple[str, ...]:
    return tuple(origin.strip() for origin in text.split(",") if origin.strip())


def parse_webhook_secret(text: str) -> bytes:
    """The key of a `whsec_...`; raises ValueError."""
    encoded = text.strip().removeprefix("whsec_").rstrip("=")
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except binascii.Error:
        key = b""
    if not text.strip().startswith("whsec_") or not 24 <= len(key) <= 64:
        raise ValueError(
            "must be whsec_ and 24 to 64 random bytes in base64; "
            "`python -m api.webhook_secret --new` prints one"
        )
    return key


def parse_pauses(text: str) -> tuple[float, ...]:
    """`5,30,120` -> (5.0, 30.0, 120.0), seconds; raises ValueError."""
    pauses = tuple(float(part) for part in text.split(",") if part.strip())
    if len(pauses) > 20 or not all(0 < pause <= 86_400 for pause in pauses):
        raise ValueError("must be up to 20 numbers above 0, each of a day (86400) at most")
    return pauses


def parse_cpus(text: str) -> frozenset[int]:
    """`0-3,8` -> {0, 1, 2, 3, 8}; raises ValueError."""
    cpus: set[int] = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ValueError(f"{text!r} is not a list of cores like 0-3,8")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)
