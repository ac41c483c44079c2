"""/admin/keys: API keys, for admin keys. A key is shown once, in the answer that makes or rotates it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from gateway.access.auth import Principal
from gateway.access.keys import KeySpec
from gateway.api.call import Call
from gateway.api.dependencies import authenticate_admin, services
from gateway.api.schema import JsonBody
from gateway.errors import BadRequest
from gateway.services import Services

router = APIRouter(prefix="/admin/keys")

Admin = Annotated[Principal, Depends(authenticate_admin)]
AppServices = Annotated[Services, Depends(services)]

BODY = JsonBody(KeySpec)


@router.post("", status_code=201, openapi_extra=BODY.openapi)
async def create_key(request: Request, principal: Admin, services: AppServices) -> dict[str, Any]:
    """Make a key."""
    spec = await Call(principal, services, request).read(BODY)
    for field, model_ids in (("models", spec.models or ()), ("limits", spec.limits)):
        for model_id in model_ids:
            if model_id not in services.config.models:
                raise BadRequest(f"Invalid value for '{field}': there is no model {model_id[:256]!r}.", field)
    record, key = await services.keys.create(spec)
    return record.public() | {"key": key}


@router.get("")
async def list_keys(principal: Admin, services: AppServices) -> dict[str, Any]:
    """List all keys of the store."""
    return {"object": "list", "data": [record.public() for record in await services.keys.list()]}


@router.get("/{key_id}")
async def get_key(key_id: str, principal: Admin, services: AppServices) -> dict[str, Any]:
    """Show a key."""
    return (await services.keys.get(key_id)).public()


@router.post("/{key_id}/rotate")
async def rotate_key(key_id: str, principal: Admin, services: AppServices) -> dict[str, Any]:
    """Give a key a new secret; the old one is void within a second, on every gateway."""
    record, key = await services.keys.rotate(key_id)
    return record.public() | {"key": key}


@router.delete("/{key_id}")
async def revoke_key(key_id: str, principal: Admin, services: AppServices) -> dict[str, Any]:
    """Revoke a key; it is void within a second, on every gateway."""
    return (await services.keys.revoke(key_id)).public()
