"""OpenAI's Responses API on the one data path: create, fetch, list the input, cancel and delete responses.

A response is made as a chat completion is, of messages converted from its items and from those of the responses
before it. It belongs to no session unless X-Session-ID names one. Does not handle fetching a response as a stream.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Depends, Query
from starlette.responses import Response

from engine.base import GenerationRequest
from engine.messages import Message
from gateway.access.auth import Principal
from gateway.api.call import Call, call
from gateway.api.dependencies import authenticate, services
from gateway.api.error_params import reword
from gateway.api.response_items import InputItem, image_places, messages_of
from gateway.api.responses_schema import ResponseRequest
from gateway.api.schema import JsonBody, parse_body
from gateway.conversations.fitting import split_turns
from gateway.conversations.live_responses import LiveResponse
from gateway.conversations.sessions import Session, derive_id, text_of
from gateway.conversations.stored_responses import Conversation, Path
from gateway.errors import BadRequest, GatewayError
from gateway.exchange.frames.responses import ResponseFrames
from gateway.exchange.response import GenerationResponse
from gateway.meter import Meter
from gateway.services import Services

router = APIRouter()

Caller = Annotated[Principal, Depends(authenticate)]
AppServices = Annotated[Services, Depends(services)]


@router.post(
    "/v1/responses",
    response_class=Response,
    openapi_extra=JsonBody(ResponseRequest).openapi,
)
async def create_response(call: Annotated[Call, Depends(call)]) -> Response:
    """Create a response: whole, streamed, or in the background."""
    most_bytes = call.services.config.sessions.max_bytes
    body, given = await call.read(lambda data: _parse(data, most_bytes))
    model = await call.admit(body.model)
    meter = call.meter(f"resp_{secrets.token_hex(24)}", model)
    async with call.telling_standing(model):
        if body.shannon_options is not None:
            body.shannon_options.check(model, call.services.tools_of(model))
        asked = await _read(call, body, given)
        live = _live_response(call, body, asked, meter)
        generation = body.for_engine(meter.request_id, asked.messages, model.settings.defaults)
        events = call.work(generation, meter, asked.session, _ready(live, asked), body.shannon_options)
    chunks = call.encode(events, live.frames, streamed=bool(body.stream or body.background))
    if body.background:
        return await _detach(call, live, chunks, meter)
    response = call.send(
        call.services.responses.run(live, chunks),
        meter,
        streamed=bool(body.stream),
        session=asked.session,
        render_error=live.frames.render_error,
    )
    assert isinstance(response, GenerationResponse)
    live.exchange = response
    return response


@router.get("/v1/responses/{response_id}")
async def get_response(
    response_id: str,
    principal: Caller,
    services: AppServices,
    stream: Annotated[bool, Query(description="Not offered; true is refused.")] = False,
) -> Response:
    """Show a response, finished or not."""
    if stream:
        raise BadRequest("A response that exists can't be streamed. Fetch it without 'stream'.", "stream")
    record = await services.responses.stored.find(principal, response_id)
    return Response(orjson.dumps(record.response), media_type="application/json")


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(
    response_id: str,
    principal: Caller,
    services: AppServices,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> dict[str, Any]:
    """List the items that a response was made of, without those of the responses before it."""
    record = await services.responses.stored.find(principal, response_id)
    items = record.input if order == "asc" else record.input[::-1]
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise BadRequest(f"The response has no input item {after[:64]!r}.", "after")
    start = 0 if after is None else ids.index(after) + 1
    page = items[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + limit < len(items),
    }


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, principal: Caller, services: AppServices) -> dict[str, Any]:
    """Forget a response, and what was said in it."""
    await services.responses.stored.delete(principal, response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(response_id: str, principal: Caller, services: AppServices) -> Response:
    """End a response that is being made, in the background or streamed, and show what there is of it."""
    fields = await services.responses.cancel(principal, response_id)
    return Response(orjson.dumps(fields), media_type="application/json")


@dataclass(frozen=True, slots=True)
class _Input:
    """What a request brought: messages, what is kept of its items, and where its images stand."""

    messages: list[Message]
    shown: list[dict[str, Any]] | None
    """None where there is more than is ever kept."""
    image_places: list[str]


def _parse(data: bytes, most_bytes: int) -> tuple[ResponseRequest, _Input]:
    """Return the body, without the input, and what was made of that. Raises BadRequest."""
    body = parse_body(ResponseRequest, data)
    items = body.items
    body.input = ""
    return body, _Input(messages_of(items), _shown(items, most_bytes), image_places(items))


def _shown(items: list[InputItem], most_bytes: int) -> list[dict[str, Any]] | None:
    shown = []
    size = 1
    for item in items:
        shown.append(item.shown())
        size += len(orjson.dumps(shown[-1])) + 1
        if size > most_bytes:
            return None
    return shown


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request's input, read: everything that the engine is to see, and which part of it is new."""

    given: _Input
    messages: list[Message]
    path: Path
    session: Session
    cut: bool
    """The oldest turns may be left out."""


async def _read(call: Call, body: ResponseRequest, given: _Input) -> _Asked:
    """Return the input behind what it continues. Raises BadRequest."""
    given_id = call.request.headers.get("x-session-id")
    if given_id is not None and body.previous_response_id is not None:
        raise BadRequest("Send either 'previous_response_id' or the header X-Session-ID.", "previous_response_id")
    conversation = Conversation()
    if body.previous_response_id is not None:
        stored = call.services.responses.stored
        conversation = await stored.conversation(call.principal, body.previous_response_id)
    messages = assemble(body.instructions, conversation.turns, given.messages)
    if given_id is None:
        _check_outputs(messages)
        session = Session(tenant=call.principal.tenant, affinity=derive_id(call.principal.tenant, messages))
    else:
        session = await call.services.sessions.open(call.principal, given_id, messages)
    cut = body.truncation == "auto" and given_id is None  # a session's turns are cut by its own rules
    return _Asked(given, messages, conversation.path, session, cut)


def _ready(live: LiveResponse, asked: _Asked) -> Callable[[GenerationRequest], GenerationRequest]:
    """A callback that records the new messages and, for truncation='auto', splits the history into turns."""

    def ready(generation: GenerationRequest) -> GenerationRequest:
        own = asked.given.messages
        live.turn = [message for message in own if message["role"] == "system"]
        if said := len(own) - len(live.turn):
            live.turn += generation.messages[-said:]
        if not asked.cut:
            return generation
        *asked.session.history, last = split_turns(generation.messages)
        return replace(generation, messages=last)

    return ready


def _live_response(call: Call, body: ResponseRequest, asked: _Asked, meter: Meter) -> LiveResponse:
    app, model = call.services, meter.model
    stored = app.responses.stored
    shown = asked.given.shown
    fields = {
        "id": meter.request_id,
        "object": "response",
        "created_at": int(app.clock()),
        "model": model.id,
        "store": body.store is not False and stored.enabled and shown is not None,
        **body.echo(model.settings.defaults),
    }
    return LiveResponse(
        id=meter.request_id,
        principal=call.principal,
        frames=ResponseFrames(fields, meter.usage, app.clock, events=call.wants_events),
        session=asked.session,
        store=bool(fields["store"]),
        known=bool(body.stream or body.background),
        input=shown or [],
        path=asked.path,
        refine=lambda error: reword(error, asked.messages, asked.given.image_places, "input"),
    )


async def _detach(call: Call, live: LiveResponse, chunks: AsyncGenerator[bytes, None], meter: Meter) -> Response:
    if not live.store:
        raise BadRequest("A response in the background must be stored, and this server can't store it.", "background")
    try:
        fields = await call.services.responses.detach(live, chunks)
    except GatewayError as error:
        error.extra_headers = meter.headers() | error.extra_headers
        raise
    return Response(orjson.dumps(fields), headers=meter.headers(), media_type="application/json")


def assemble(instructions: str | None, turns: list[list[Message]], own: list[Message]) -> list[Message]:
    """Return the whole conversation for the engine: `own` are those of its messages that the request brought.

    System texts, whichever turn they came in, become one message that leads: chat templates commonly refuse one in
    any other place. Those of earlier responses' `instructions` are not among them.
    """
    everything = [message for turn in (*turns, own) for message in turn]
    texts = [instructions] if instructions else []
    texts += [text_of(message) for message in everything if message["role"] == "system"]
    system: list[Message] = [{"role": "system", "content": "\n\n".join(dict.fromkeys(texts))}] if texts else []
    return system + [message for message in everything if message["role"] != "system"]


def _check_outputs(messages: list[Message]) -> None:
    """Refuse an input without messages, and outputs of calls that were never made, in OpenAI's words."""
    if not messages:
        raise BadRequest("Invalid value for 'input': it has no message.", "input")
    made: set[str] = set()
    for message in messages:
        made.update(call["id"] for call in message.get("tool_calls", ()))
        if message["role"] == "tool" and message["tool_call_id"] not in made:
            raise BadRequest(
                f"No tool call found for function call output with call_id {message['tool_call_id']}.", "input"
            )
