"""Anthropic's Messages API on the one data path, for clients that speak nothing else: create and count tokens.

Keys come in X-API-Key or as a bearer, sessions as for chat. Errors have that protocol's shape and the same statuses.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from gateway.api.generation import Call, call
from gateway.api.messages_schema import CountTokensRequest, MessagesRequest
from gateway.api.places import reword
from gateway.api.sampling import parse_body
from gateway.errors import GatewayError, StoreUnavailable, from_store
from gateway.frames.messages import MessageFrames, error_body, render_error
from gateway.images import inlined
from gateway.middleware import ErrorResponse
from gateway.response import RenderError


class _Route(APIRoute):
    """Gives errors from before the first byte Anthropic's shape, and every response the header that its SDKs log."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_in_its_words(request: Request) -> Response:
            try:
                response = await handle(request)
            except GatewayError as error:
                response = _failure(request, error)
            except StoreUnavailable as error:
                response = _failure(request, from_store(error))
            response.headers["request-id"] = request.state.request_id
            return response

        return handle_in_its_words


router = APIRouter(route_class=_Route)


def _body(name: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


@router.post("/v1/messages", response_class=Response, openapi_extra=_body("MessagesRequest"))
async def create_message(call: Annotated[Call, Depends(call)]) -> Response:
    """Create a message, streamed or whole."""
    body = await call.read(lambda data: parse_body(MessagesRequest, data))
    model = await call.admit(body.model)
    message_id = f"msg_{secrets.token_hex(12)}"
    meter = call.meter(message_id, model)
    generation = dataclasses.replace(body.for_engine(message_id), **body.sampling(model.settings.defaults))
    events, session = await call.converse(generation, meter, body.shannon_options)
    frames = MessageFrames(message_id, model.id, meter.spent, events=call.wants_events)
    return call.answer(
        events,
        frames,
        meter,
        streamed=bool(body.stream),
        session=session,
        render_error=_renderer(body, generation.messages),
    )


@router.post("/v1/messages/count_tokens", response_class=Response, openapi_extra=_body("CountTokensRequest"))
async def count_tokens(call: Annotated[Call, Depends(call)]) -> Response:
    """Count the input tokens of a message, exactly. A request that costs no tokens."""
    body = await call.read(lambda data: parse_body(CountTokensRequest, data))
    meter = call.meter(f"tok-{secrets.token_hex(16)}", await call.admit(body.model))
    request = body.for_engine(meter.request_id)

    async def chunks() -> AsyncGenerator[bytes, None]:
        tokens = await meter.tokenize(await inlined(request, meter, call.services.images))
        yield orjson.dumps({"input_tokens": len(tokens)})

    return call.send(chunks(), meter, streamed=False, render_error=_renderer(body, request.messages))


def _renderer(body: CountTokensRequest, messages: list[dict[str, Any]]) -> RenderError:
    """Return what renders errors about `messages` in the words of `body`."""
    return lambda error, in_stream: render_error(reword(error, messages, body.image_places, "messages"), in_stream)


def _failure(request: Request, error: GatewayError) -> Response:
    return ErrorResponse(error, error_body(error))
