"""GET /v1/models: the one model that is loaded, and the names that OpenAI's clients call it by."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from api.dependencies import state_of
from api.errors import answers
from shared.errors import InvalidField, ModelNotFound

router = APIRouter(tags=["openai"])

ALIASES = (
    "whisper-1",
    "gpt-transcribe",
    "gpt-4o-transcribe",
    "gpt-4o-mini-transcribe",
    "gpt-4o-mini-transcribe-2025-12-15",
)
NO_SPEAKERS = "this service can't tell speakers apart"


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: Annotated[int, Field(description="Not known here: always 0.")] = 0
    owned_by: str = "faster-whisper"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


def names(loaded: str) -> list[str]:
    """Every name of the loaded model, its own first."""
    return list(dict.fromkeys([loaded, *ALIASES]))


def known(name: str, loaded: str) -> str:
    """The name. Raises ModelNotFound unless it is one of the loaded model's."""
    if name in names(loaded):
        return name
    raise ModelNotFound(
        f"There is no model {name!r:.100} here. The model that is loaded is {loaded!r}; it also "
        f"answers to {', '.join(ALIASES)}."
    )


def usable(name: str, loaded: str) -> None:
    """Raises ModelNotFound; InvalidField where it is missing, or does what ours can't."""
    if not name:
        raise InvalidField([("model", f"is missing; the model that is loaded is {loaded!r}")])
    if name.endswith("-diarize"):
        raise InvalidField([("model", f"{NO_SPEAKERS}; take another model, like whisper-1")])
    known(name, loaded)


@router.get("/v1/models", summary="List the models", responses=answers())
async def list_models(request: Request) -> ModelList:
    """The loaded model by its own name, and by those of OpenAI's that mean it here."""
    return ModelList(data=[Model(id=name) for name in names(state_of(request).settings.model_size)])


@router.get(
    "/v1/models/{model:path}", summary="Ask for one model", responses=answers(ModelNotFound)
)
async def retrieve_model(model: str, request: Request) -> Model:
    return Model(id=known(model, state_of(request).settings.model_size))
