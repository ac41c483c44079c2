"""POST /v1/chat/completions: OpenAI's protocol on the one data path."""

from __future__ import annotations

import secrets
from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.responses import Response

from gateway.api.call import Call, call
from gateway.api.chat_schema import ChatCompletionRequest, parse_chat_request
from gateway.api.schema import JsonBody
from gateway.durable.resumable import Announced
from gateway.exchange.frames.chat import ChatFrames

router = APIRouter()

_STREAM_QUERY = {"name": "stream", "in": "query", "schema": {"type": "boolean"}}


@router.post(
    "/v1/chat/completions",
    response_class=Response,
    openapi_extra=JsonBody(ChatCompletionRequest, parameters=[_STREAM_QUERY]).openapi,
)
async def create_chat_completion(call: Annotated[Call, Depends(call)]) -> Response:
    """Create a chat completion, streamed or whole."""
    body = await call.read(lambda data: parse_chat_request(data, call.request.query_params.get("stream")))
    model = await call.admit(body.model)
    completion_id = f"chatcmpl-{secrets.token_hex(16)}"
    meter = call.meter(completion_id, model)
    resumable = body.stream and call.services.resumable.wants(call.principal, body.resumable)
    events, session = await call.converse(
        body.for_engine(completion_id, model.settings.defaults), meter, body.shannon_options
    )
    frames = ChatFrames(
        completion_id,
        int(call.services.clock()),
        model.id,
        meter.usage,
        include_usage=body.include_usage,
        events=call.wants_events,
    )
    if not resumable:
        return call.answer(events, frames, meter, streamed=bool(body.stream), session=session)
    completion = Announced(completion_id, asked=bool(body.resumable))
    chunks = call.encode(events, frames, streamed=True)
    return call.send(
        call.services.resumable.stream(call.principal, completion, chunks),
        meter,
        streamed=True,
        session=session,
        headers=completion.headers,
    )
