"""GET /v1/models and GET /v1/models/{model}: OpenAI's model list, as far as the caller's key may see it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from gateway.access.auth import Principal
from gateway.api.dependencies import authenticate, services
from gateway.services import Services

router = APIRouter()

Caller = Annotated[Principal, Depends(authenticate)]
AppServices = Annotated[Services, Depends(services)]


@router.get("/v1/models")
async def list_models(principal: Caller, services: AppServices) -> dict[str, Any]:
    """List the models that this key may use."""
    return {"object": "list", "data": [model.describe() for model in services.catalog.visible_to(principal)]}


@router.get("/v1/models/{model:path}")
async def get_model(model: str, principal: Caller, services: AppServices) -> dict[str, Any]:
    """Describe one model. The server leaves an encoded slash in paths; here it is part of the name."""
    return services.catalog.resolve(model.replace("%2F", "/"), principal).describe()
