"""GET /v1/chat/completions/{id}/stream: resume the stream of a resumable chat completion where it was cut."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request
from starlette.responses import Response

from gateway.access.auth import Principal
from gateway.api.dependencies import authenticate, services, while_authenticated
from gateway.durable.event_log import MAX_NUMBER
from gateway.errors import BadRequest
from gateway.exchange.response import GenerationResponse
from gateway.services import Services

router = APIRouter()

_NUMBER = re.compile(r"[0-9]{1,16}")


def number_of(text: str | None, param: str) -> int | None:
    """Return the number of an event as a client gives it, None where it gives none. Raises BadRequest."""
    if text is None or text == "":
        return None
    if not _NUMBER.fullmatch(text) or int(text) >= MAX_NUMBER:
        raise BadRequest(f"{param!r} must be the number of an event, as its 'id' has it, not {text[:32]!r}.", param)
    return int(text)


@router.get("/v1/chat/completions/{completion_id}/stream", response_class=Response)
async def resume_chat_completion(
    request: Request,
    completion_id: str,
    principal: Annotated[Principal, Depends(authenticate)],
    services: Annotated[Services, Depends(services)],
    starting_after: Annotated[str | None, Query(description="Number of the last event that was received.")] = None,
    last_event_id: Annotated[str | None, Header(description="The same, from an EventSource; wins over it.")] = None,
) -> Response:
    """Stream the events of a resumable chat completion from a number on, those to come included."""
    given = number_of(last_event_id, "Last-Event-ID")
    if given is None:
        given = number_of(starting_after, "starting_after") or 0
    frames = await services.resumable.resume(principal, completion_id, given)
    return GenerationResponse(
        while_authenticated(frames, request, services),
        stream=True,
        drain=services.drain,
        metrics=services.metrics,
        keepalive_s=services.config.server.keepalive_s,
    )
