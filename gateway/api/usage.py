"""GET /v1/usage: what the caller's key spent, per model and day (UTC). Admin keys may ask for others, or for all."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends

from gateway.access.auth import Principal
from gateway.api.dependencies import authenticate, services
from gateway.errors import AdminOnly
from gateway.services import Services

router = APIRouter()


@router.get("/v1/usage")
async def get_usage(
    principal: Annotated[Principal, Depends(authenticate)],
    services: Annotated[Services, Depends(services)],
    key_id: str | None = None,
) -> dict[str, Any]:
    """Return usage of the caller's own key, of `key_id`, or of every key with `key_id=all`."""
    if key_id not in (None, principal.key_id) and not principal.admin:
        raise AdminOnly("Only an admin key may see the usage of other keys.", "key_id")
    wanted = [key_id or principal.key_id]
    if key_id == "all":
        wanted = await services.ledger.key_ids()
    rows = await asyncio.gather(*(services.ledger.totals(key_id) for key_id in wanted))
    data = [{"key_id": key_id} | row for key_id, own in zip(wanted, rows, strict=True) for row in own]
    return {"object": "list", "data": data}
