"""Inspection of a model: token probabilities and attention weights, step by step.

    POST /v1/inspect              events: `token` and `trace` for each step, `done` at the end
    POST /v1/inspect/attention    the whole attention matrix of one layer and head
    GET  /v1/inspect              the models that can be inspected, and their layers and heads
    POST /chat/stream             as /v1/inspect, of the default model
    POST /inspect/full_attn       as /v1/inspect/attention, of the default model

The last two have plain errors, `{"error": text, "code": word}`, 422 for an invalid body, and a limit
per address; `inspector.public` opens them to callers without a key. A request counts as one for the key's limits but
costs no tokens: the inspector runs the checkpoint itself, and the ledger holds what vLLM has counted, nothing else.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Depends, Request
from fastapi.routing import APIRoute
from pydantic import Field
from starlette.responses import Response

from engine.base import EngineError
from engine.inspector.base import InspectedToken, InspectionRequest, Inspector, Reply
from engine.sampling import Int64
from gateway.access.auth import Principal
from gateway.access.catalog import ModelSpec
from gateway.api.call import Call, call
from gateway.api.dependencies import authenticate, services
from gateway.api.schema import JsonBody, Schema, parse_body
from gateway.errors import (
    BadRequest,
    GatewayError,
    NotFound,
    RateLimitExceeded,
    RequestTooLarge,
    Unprocessable,
    from_engine,
)
from gateway.exchange.error_response import ErrorResponse
from gateway.exchange.response import GenerationResponse
from gateway.meter import Meter
from gateway.services import Services
from gateway.settings.config import InspectorSettings

DEFAULT_NEW_TOKENS = 256
PROMPT_TOO_LARGE = "prompt_too_large"


class InspectedMessage(Schema):
    role: Literal["system", "user", "assistant"]
    content: str


class _Inspected(Schema):
    messages: Annotated[list[InspectedMessage], Field(fail_fast=True, min_length=1, max_length=4096)]
    trace_layer: int
    """Layer whose attention is shown; the first is 0."""
    seed: Int64 = 42
    """Equal requests with equal seeds draw equal tokens."""

    def request(self, settings: InspectorSettings, max_new_tokens: int, **more: Any) -> InspectionRequest:
        """The request to the inspector. Raises BadRequest, and RequestTooLarge on a prompt that is sure to be
        too long: the chat template only adds to it."""
        if max_new_tokens > settings.max_new_tokens:
            raise BadRequest(f"'max_new_tokens' must be at most {settings.max_new_tokens}.", "max_new_tokens")
        size = sum(len(message.content.encode()) for message in self.messages)
        if size > settings.max_prompt_bytes:
            raise _too_large(f"The prompt is more than {settings.max_prompt_bytes} bytes long. Shorten 'messages'.")
        return InspectionRequest(
            messages=[message.model_dump() for message in self.messages],
            trace_layer=self.trace_layer,
            seed=self.seed,
            max_new_tokens=max_new_tokens,
            **more,
        )


class ChatStreamRequest(_Inspected):
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """256 when left out, or the server's own maximum if that is less."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.9
    """0 takes the best token."""
    top_k: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = 50
    """Tokens that may be drawn, exactly; null means all."""

    def for_inspector(self, settings: InspectorSettings) -> InspectionRequest:
        """The request to the inspector. Raises what `request` raises."""
        tokens = self.max_new_tokens or min(DEFAULT_NEW_TOKENS, settings.max_new_tokens)
        return self.request(settings, tokens, temperature=self.temperature, top_k=self.top_k)


class FullAttentionRequest(_Inspected):
    head: int
    """Head whose matrix is shown; the first is 0."""
    max_new_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens to generate first, which the matrix then covers as well."""

    def for_inspector(self, settings: InspectorSettings) -> InspectionRequest:
        """The request to the inspector. Raises what `request` raises."""
        return self.request(settings, self.max_new_tokens, head=self.head)


class InspectRequest(ChatStreamRequest):
    model: Annotated[str, Field(max_length=256)] | None = None
    """Model id; the server's default when left out."""


class InspectAttentionRequest(FullAttentionRequest):
    model: Annotated[str, Field(max_length=256)] | None = None
    """Model id; the server's default when left out."""


class _PlainErrors(APIRoute):
    """A route whose errors are `{"error": text, "code": word}`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_plainly(request: Request) -> Response:
            try:
                return await handle(request)
            except GatewayError as error:
                plain = _plain(error)
                return ErrorResponse(plain, _render_plainly(plain, False))

        return handle_plainly


router = APIRouter()
plain_router = APIRouter(route_class=_PlainErrors)


@router.get("/v1/inspect")
async def list_inspectable(call: Annotated[Call, Depends(call)]) -> dict[str, Any]:
    """List the models that the key may inspect. Those whose weights are yet to come are left out."""
    inspector = _inspector(call.services)
    models = []
    for model in call.services.catalog.visible_to(call.principal):
        try:
            shape = inspector.shape(model.settings.engine)
        except EngineError:
            continue
        measures = {"layers": shape.layers, "heads": shape.heads, "max_model_len": shape.max_model_len}
        models.append({"id": model.id} | measures)
    return {"models": models}


@router.post("/v1/inspect", response_class=Response, openapi_extra=JsonBody(InspectRequest).openapi)
async def inspect(call: Annotated[Call, Depends(call)]) -> Response:
    """Generate, and show the distribution and the attention of every step."""
    return await _inspect(call, InspectRequest)


@router.post("/v1/inspect/attention", response_class=Response, openapi_extra=JsonBody(InspectAttentionRequest).openapi)
async def inspect_attention(call: Annotated[Call, Depends(call)]) -> Response:
    """Show the whole attention matrix of one layer and head."""
    return await _inspect(call, InspectAttentionRequest)


@dataclass(frozen=True, slots=True)
class _PublicCall(Call):
    """A call without a key: only the address is limited."""

    @contextlib.asynccontextmanager
    async def telling_standing(self, model: ModelSpec | None) -> AsyncIterator[None]:
        yield

    async def _charge(self, error: GatewayError, model: ModelSpec | None) -> GatewayError:
        return error

    async def _authenticate_again(self) -> None:
        pass


async def _visitor(request: Request, services: Annotated[Services, Depends(services)]) -> Call:
    """Return the call of a plain route. Raises what `authenticate` and `AddressLimit.take` raise, and NotFound."""
    if services.config.inspector.public:
        visit: Call = _PublicCall(Principal("public"), services, request)
    else:
        visit = Call(await authenticate(request, services), services, request)
    _inspector(services)
    services.address_limit.take(request.client.host if request.client else "")
    return visit


@plain_router.post("/chat/stream", response_class=Response, openapi_extra=JsonBody(ChatStreamRequest).openapi)
async def chat_stream(call: Annotated[Call, Depends(_visitor)]) -> Response:
    """Generate with the default model, and show the distribution and the attention of every step."""
    return await _inspect(call, ChatStreamRequest, plain=True)


@plain_router.post("/inspect/full_attn", response_class=Response, openapi_extra=JsonBody(FullAttentionRequest).openapi)
async def full_attention(call: Annotated[Call, Depends(_visitor)]) -> Response:
    """Show the whole attention matrix of one layer and head of the default model."""
    return await _inspect(call, FullAttentionRequest, plain=True)


async def _inspect(
    call: Call, schema: type[ChatStreamRequest] | type[FullAttentionRequest], *, plain: bool = False
) -> Response:
    inspector = _inspector(call.services)
    body: ChatStreamRequest | FullAttentionRequest = await call.read(lambda data: parse_body(schema, data))
    model = await call.admit(body.model if isinstance(body, InspectRequest | InspectAttentionRequest) else None)
    engine = model.settings.engine
    async with call.telling_standing(model):
        request = body.for_inspector(call.services.config.inspector)
        try:
            inspector.shape(engine).check(request.trace_layer, request.head)
        except EngineError as error:
            raise from_engine(error) from error
    if request.head is None:
        return _send(call, model, _frames(inspector.trace(engine, request)), streamed=True, plain=plain)
    return _send(call, model, _matrix(inspector, engine, request), streamed=False, plain=plain)


def _inspector(services: Services) -> Inspector:
    if services.inspector is None:
        raise NotFound("Inspection is turned off on this server.")
    return services.inspector


async def _frames(steps: AsyncGenerator[InspectedToken | Reply, None]) -> AsyncGenerator[bytes, None]:
    """Yield the frames of a stream, those of a step together."""
    async with contextlib.aclosing(steps):
        async for step in steps:
            if isinstance(step, InspectedToken):
                yield b"event: token\ndata: %b\n\nevent: trace\ndata: %b\n\n" % (step.token, step.trace)
            else:
                yield b"event: done\ndata: %b\n\n" % orjson.dumps({"reply": step.text})


async def _matrix(inspector: Inspector, engine: str, request: InspectionRequest) -> AsyncGenerator[bytes, None]:
    yield await inspector.attention(engine, request)


def _send(
    call: Call, model: ModelSpec, chunks: AsyncGenerator[bytes, None], *, streamed: bool, plain: bool
) -> Response:
    """Return the response. With a key it counts as a request."""
    chunks = _for_clients(chunks)
    if isinstance(call, _PublicCall):
        return GenerationResponse(
            _plainly(chunks),
            stream=streamed,
            drain=call.services.drain,
            metrics=call.services.metrics,
            keepalive_s=call.services.config.server.keepalive_s,
            render_error=_render_plainly,
        )
    meter = call.meter(f"insp-{secrets.token_hex(16)}", model)
    chunks = _counted(chunks, meter)
    if plain:
        return call.send(_plainly(chunks), meter, streamed=streamed, render_error=_render_plainly)
    return call.send(chunks, meter, streamed=streamed, render_error=_render)


async def _for_clients(chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Pass `chunks` on. Raises for clients what the inspector raises."""
    try:
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                yield chunk
    except EngineError as error:
        failure = from_engine(error)
        raise (_too_large(str(error)) if failure.code == PROMPT_TOO_LARGE else failure) from error


async def _counted(chunks: AsyncGenerator[bytes, None], meter: Meter) -> AsyncGenerator[bytes, None]:
    """Pass `chunks` on as a request that costs no tokens. Raises what `Limits.reserve` raises."""
    async with meter.counted(), contextlib.aclosing(chunks):
        await meter.count()
        async for chunk in chunks:
            yield chunk


async def _plainly(chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Pass `chunks` on. Raises plain errors."""
    try:
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                yield chunk
    except GatewayError as error:
        raise _plain(error) from error


def _too_large(message: str) -> RequestTooLarge:
    return RequestTooLarge(message, "messages", PROMPT_TOO_LARGE)


def _plain(error: GatewayError) -> GatewayError:
    """Return an error with the status and the code that it has on plain routes."""
    if type(error) is BadRequest and error.code == BadRequest.code:
        unprocessable = Unprocessable(str(error), error.param)
        unprocessable.extra_headers = error.extra_headers
        return unprocessable
    if isinstance(error, RateLimitExceeded):
        error.code = "rate_limited"
    return error


def _render(error: GatewayError, in_stream: bool) -> bytes:
    return b"event: error\ndata: %b\n\n" % error.body() if in_stream else error.body()


def _render_plainly(error: GatewayError, in_stream: bool) -> bytes:
    body = orjson.dumps({"error": str(error), "code": error.code})
    return b"event: error\ndata: %b\n\n" % body if in_stream else body
