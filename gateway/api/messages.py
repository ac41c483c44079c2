"""Anthropic's Messages API on the one data path, for clients that speak nothing else: create and count tokens.

Keys come in X-API-Key or as a bearer, sessions as for chat. Errors have that protocol's shape and the same statuses.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import APIRouter, Depends, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from engine.base import GenerationRequest
from engine.messages import Message
from gateway.api.call import Call, call
from gateway.api.error_params import reword
from gateway.api.messages_schema import CountTokensRequest, MessagesRequest
from gateway.api.schema import JsonBody, parse_body
from gateway.errors import GatewayError, StoreUnavailable, from_store
from gateway.exchange.error_response import ErrorResponse
from gateway.exchange.frames.messages import MessageFrames, error_body, render_error
from gateway.exchange.response import RenderError
from gateway.images import inlined

Body = TypeVar("Body", bound=CountTokensRequest)


class _Route(APIRoute):
    """Renders errors before the first byte in Anthropic's format, and adds the request-id header to every response."""

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


@router.post("/v1/messages", response_class=Response, openapi_extra=JsonBody(MessagesRequest).openapi)
async def create_message(call: Annotated[Call, Depends(call)]) -> Response:
    """Create a message, streamed or whole."""
    message_id = f"msg_{secrets.token_hex(12)}"
    body, request, places = await call.read(lambda data: _parse(MessagesRequest, data, message_id))
    model = await call.admit(body.model)
    meter = call.meter(message_id, model)
    generation = dataclasses.replace(request, **body.generation(model.settings.defaults))
    events, session = await call.converse(generation, meter, body.shannon_options)
    frames = MessageFrames(message_id, model.id, meter.spent, events=call.wants_events)
    return call.answer(
        events,
        frames,
        meter,
        streamed=bool(body.stream),
        session=session,
        render_error=_renderer(places, generation.messages),
    )


@router.post("/v1/messages/count_tokens", response_class=Response, openapi_extra=JsonBody(CountTokensRequest).openapi)
async def count_tokens(call: Annotated[Call, Depends(call)]) -> Response:
    """Count the input tokens of a message, exactly. A request that costs no tokens."""
    request_id = f"tok-{secrets.token_hex(16)}"
    body, request, places = await call.read(lambda data: _parse(CountTokensRequest, data, request_id))
    meter = call.meter(request_id, await call.admit(body.model))

    async def chunks() -> AsyncGenerator[bytes, None]:
        tokens = await meter.tokenize(await inlined(request, meter, call.services.images))
        yield orjson.dumps({"input_tokens": len(tokens)})

    return call.send(chunks(), meter, streamed=False, render_error=_renderer(places, request.messages))


def _parse(schema: type[Body], data: bytes, request_id: str) -> tuple[Body, GenerationRequest, list[str]]:
    """Return the body, the generation made of its messages, and where its images stand. Raises BadRequest."""
    body = parse_body(schema, data)
    places = body.image_places
    return body, body.for_engine(request_id), places


def _renderer(places: list[str], messages: list[Message]) -> RenderError:
    """A renderer of errors about `messages` that names the body's fields. Its images are at `places`."""
    return lambda error, in_stream: render_error(reword(error, messages, places, "messages"), in_stream)


def _failure(request: Request, error: GatewayError) -> Response:
    return ErrorResponse(error, error_body(error))
