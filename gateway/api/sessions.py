"""GET and DELETE /v1/sessions/{id}: a conversation, shown to or forgotten for the tenant that owns it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from gateway.access.auth import Principal
from gateway.api.dependencies import authenticate, services
from gateway.services import Services

router = APIRouter()

Caller = Annotated[Principal, Depends(authenticate)]
AppServices = Annotated[Services, Depends(services)]


@router.get("/v1/sessions/{session_id:path}")
async def get_session(session_id: str, principal: Caller, services: AppServices) -> dict[str, Any]:
    """Show the stored messages of a session."""
    return await services.sessions.show(principal, session_id)


@router.delete("/v1/sessions/{session_id:path}")
async def delete_session(session_id: str, principal: Caller, services: AppServices) -> dict[str, Any]:
    """Forget a session."""
    return await services.sessions.delete(principal, session_id)
