"""POST /v1/chat/completions: OpenAI's protocol on the one data path."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from gateway.api.dependencies import Services, authenticate, services
from gateway.api.schema import ChatCompletionRequest, parse_chat_request
from gateway.auth import Principal
from gateway.catalog import ModelSpec
from gateway.errors import BadRequest, RequestTimeout
from gateway.meter import Meter
from gateway.response import GenerationResponse
from gateway.sse import ChatFrames, collect_chat, stream_chat
from gateway.workflows.chat import chat

router = APIRouter()

_BODY = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/ChatCompletionRequest"}}}}
_STREAM_QUERY = {"name": "stream", "in": "query", "schema": {"type": "boolean"}}


@router.post(
    "/v1/chat/completions",
    response_class=Response,
    openapi_extra={"requestBody": {"required": True, **_BODY}, "parameters": [_STREAM_QUERY]},
)
async def create_chat_completion(
    request: Request,
    principal: Annotated[Principal, Depends(authenticate)],
    services: Annotated[Services, Depends(services)],
) -> Response:
    """Create a chat completion, streamed or whole."""
    body = await _read_chat_request(request, principal, services)
    services.drain.admit()
    model = services.catalog.resolve(body.model, principal)
    completion_id = f"chatcmpl-{secrets.token_hex(16)}"
    generation = body.for_engine(completion_id, model.settings.defaults)
    given_id = request.headers.get("x-session-id")
    async with _telling_standing(services, principal, model):
        session = await services.sessions.open(principal, given_id, generation.messages)
    meter = Meter(completion_id, principal, model, services.limits, services.ledger, services.metrics)
    events = services.sessions.record(chat(generation, meter, session, services.clock), session, generation.messages)
    created = int(services.clock())
    with_events = request.headers.get("x-shannon-events", "").lower() != "off"
    if body.stream:
        frames = ChatFrames(
            completion_id, created, model.id, meter.usage, include_usage=body.include_usage, events=with_events
        )
        chunks = stream_chat(events, frames)
    else:
        chunks = collect_chat(events, completion_id, created, model.id, meter.usage, with_events=with_events)
    return GenerationResponse(
        chunks,
        stream=bool(body.stream),
        drain=services.drain,
        metrics=services.metrics,
        keepalive_s=services.config.server.keepalive_s,
        headers=lambda: session.headers() | meter.headers(),
    )


async def _read_chat_request(request: Request, principal: Principal, services: Services) -> ChatCompletionRequest:
    """Read and check the body."""
    timeout_s = services.config.server.body_timeout_s
    try:
        async with asyncio.timeout(timeout_s):
            body = await request.body()
    except TimeoutError:
        raise RequestTimeout(f"The request body did not arrive within {timeout_s:g} seconds.") from None
    # Which model a bad body means can't be relied on; the default's limits are the best answer there is.
    async with _telling_standing(services, principal, services.catalog.default_for(principal)):
        return parse_chat_request(body, request.query_params.get("stream"))


@contextlib.asynccontextmanager
async def _telling_standing(services: Services, principal: Principal, model: ModelSpec | None) -> AsyncIterator[None]:
    """Send with a BadRequest where the caller's limits stand: every metered request is told, refused ones as well."""
    try:
        yield
    except BadRequest as error:
        standing = None if model is None else await services.limits.peek(principal, model)
        if standing is not None:
            error.extra_headers = standing.headers()
        raise
