"""What a caller says of a job that changes nothing in its transcript: kept with the job, echoed,
and no part of the fingerprint, so that jobs which differ in it alone share one transcription.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

MAX_METADATA_BYTES = 4096
MAX_METADATA_DEPTH = 8
_NO_OBJECT = 'must be a JSON object, like {"order": 17}'
_TOO_LONG = f"must not be longer than {MAX_METADATA_BYTES} bytes of JSON"
_TOO_DEEP = f"must not be nested deeper than {MAX_METADATA_DEPTH} levels"


class Priority(StrEnum):
    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


def canonical(value: object) -> str:
    """The same JSON for equal values. Raises ValueError for NaN and infinities."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def _metadata(value: Any) -> Any:
    """A JSON object, from its text as well. Raises ValueError where it could not be echoed as it
    came, or is larger than a job should carry."""
    if isinstance(value, str):
        try:
            value = json.loads(value, object_pairs_hook=_without_repeats)
        except RecursionError as exc:
            raise ValueError(_TOO_DEEP) from exc
        except _SameName:
            raise
        except json.JSONDecodeError as exc:
            raise ValueError(_NO_OBJECT) from exc
        except ValueError as exc:  # a number of some thousand digits
            raise ValueError(_TOO_LONG) from exc
    if not isinstance(value, dict):
        raise ValueError(_NO_OBJECT)
    if _depth(value) > MAX_METADATA_DEPTH:
        raise ValueError(_TOO_DEEP)
    try:
        size_bytes = len(canonical(value).encode())
    except UnicodeEncodeError as exc:
        raise ValueError("must not contain half of a surrogate pair") from exc
    except ValueError as exc:
        raise ValueError("must not contain NaN or infinities") from exc
    if size_bytes > MAX_METADATA_BYTES:
        raise ValueError(_TOO_LONG)
    return value


class _SameName(ValueError):
    """must not have the same name twice in one object"""


def _without_repeats(items: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(items)
    if len(made) < len(items):
        raise _SameName(_SameName.__doc__)
    return made


def _depth(value: object) -> int:
    """Counted as far as it matters: one level beyond what is allowed."""
    level, depth = [value], 0
    while level and depth <= MAX_METADATA_DEPTH:
        inner = [list(v.values()) if isinstance(v, dict) else v for v in level]
        level = [item for each in inner if isinstance(each, list) for item in each]
        depth += any(isinstance(each, list) for each in inner)
    return depth


class JobOptions(BaseModel):
    """The form fields that belong to the job."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metadata: Annotated[dict[str, Any], BeforeValidator(_metadata)] = Field(
        {}, description="JSON object of yours that comes back wherever the job is shown."
    )
    priority: Priority = Field(
        Priority.NORMAL,
        description="`high` has a head start of 1,000 hours of speech, `low` is as much behind.",
    )

    webhook_url: str = Field(
        "", max_length=2048, description="Address that is told when the job has ended."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _empty_means_default(cls, value: Any, info: Any) -> Any:
        if isinstance(value, str) and not value.strip():
            return cls.model_fields[info.field_name].default
        return value

    @property
    def metadata_json(self) -> str:
        return canonical(self.metadata)

    def record(self) -> dict[str, str]:
        """Name -> text of what is not left to its default: what the job's record and the manifest
        keep."""
        given = self.model_dump(mode="json", exclude_defaults=True)
        return {
            name: value if isinstance(value, str) else canonical(value)
            for name, value in given.items()
        }

    @classmethod
    def of(cls, record: Mapping[str, str]) -> Self:
        """From a record that holds other names, too."""
        return cls.model_validate(
            {name: record[name] for name in cls.model_fields if name in record}
        )
