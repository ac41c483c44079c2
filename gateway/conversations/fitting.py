"""Fitting a request to its model: caps on prompt and completion, and as much of the conversation as the context holds.

Raises InvalidRequest where the rest does not fit, and what `Engine.prepare` raises.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

from engine.base import Engine, GenerationRequest, InvalidRequest, PoolingRequest, Prepared, Request
from engine.messages import Message
from gateway.access.catalog import ModelSpec
from gateway.conversations.sessions import Session

TOO_LONG = "context_length_exceeded"


async def fit(model: ModelSpec, request: Request, session: Session | None = None) -> Prepared:
    """Prepare `request` within the model's caps, behind the session's history if there is one."""
    if isinstance(request, PoolingRequest):
        prepared = await model.engine.prepare(request)
    else:
        request = _capped(request, model.settings.max_output_tokens)
        max_input_tokens = model.settings.max_input_tokens
        if max_input_tokens is None and (session is None or not session.history):
            prepared = await model.engine.prepare(request)
        else:
            prepared = await fit_history(model.engine, request, session or Session(), max_input_tokens)
    prepared.request = request
    return prepared


async def fit_first(model: ModelSpec, requests: Iterable[GenerationRequest]) -> Prepared:
    """Prepare the first of `requests` that fits and leaves room for its answer.

    For prompts that exist in several lengths, longest first. Raises what `fit` raises for the last one.
    """
    max_input_tokens = model.settings.max_input_tokens
    failure = None
    for request in requests:
        request = _capped(request, model.settings.max_output_tokens)
        try:
            prepared = await model.engine.prepare(request)
        except InvalidRequest as error:
            if error.code != TOO_LONG:
                raise
            failure = error
            continue
        within = max_input_tokens is None or prepared.prompt_tokens <= max_input_tokens
        if within and _leaves_room(prepared, request, model.engine.max_model_len):
            prepared.request = request
            return prepared
        failure = InvalidRequest("The conversation leaves no room for an answer.", "messages", TOO_LONG)
    assert failure is not None
    raise failure


async def fit_history(
    engine: Engine, request: GenerationRequest, session: Session, max_input_tokens: int | None = None
) -> Prepared:
    """Prepare `request` behind as many of the newest stored turns as fit and leave room for an answer.

    `max_input_tokens` caps the prompt. The request's own oldest turns are then left out as well, where necessary.
    System prompts and the last turn stay, and the result of a tool is never separated from its call. Raises what
    `Engine.prepare` raises for the part that can't be left out; a long history is never the reason.
    """
    cuts = _cuts(request.messages, session.history, drops_own=max_input_tokens is not None)
    least, most = 0, len(cuts) - 1
    best: Prepared | None = None
    at = most
    while best is None or least < most:
        start, turns = cuts[at]
        own = [message for i, message in enumerate(request.messages) if i >= start or message["role"] == "system"]
        shortened = replace(request, messages=session.messages(own, turns))
        try:
            prepared: Prepared | None = await _prepare_within(
                engine, shortened, max_input_tokens, alone=at == 0 and len(cuts) > 1
            )
        except InvalidRequest as error:
            if turns and session.drop_images():
                continue  # they are too long, too many, or not taken by the model, and not part of the request
            if at == 0 or error.code != TOO_LONG or (turns == 0 and error.param != "messages"):
                raise
            prepared = None
        if prepared is not None and (at == 0 or turns == 0 or _leaves_room(prepared, request, engine.max_model_len)):
            best, least = prepared, at
        else:
            most = at - 1
        # All turns first, then the fewest, then bisection: most histories fit, and the search needs one that does.
        at = 0 if best is None else (least + most + 1) // 2
    return best


def split_turns(messages: list[Message]) -> list[list[Message]]:
    """The conversation as turns, each from a user's message on. The last turn also has the system messages."""
    starts = [*_starts(messages), len(messages)]
    parts = [messages[start:end] for start, end in pairwise(starts)]
    turns = [[message for message in part if message["role"] != "system"] for part in parts]
    system = [message for message in messages if message["role"] == "system"]
    return [*turns[:-1], system + turns[-1]] if turns else [system]


def _starts(messages: list[Message]) -> list[int]:
    """Indices at which turns begin. Several messages of the user in a row begin one turn."""
    starts: list[int] = []
    before = ""
    for index, message in enumerate(messages):
        if message["role"] != "system":
            if not starts or (message["role"] == "user" and before != "user"):
                starts.append(index)
            before = message["role"]
    return starts


def _cuts(request: list[Message], history: list[list[Message]], *, drops_own: bool) -> list[tuple[int, int]]:
    """What may be sent, from least to most, as (first of the request's messages, number of stored turns).

    Nothing begins with the result of a tool, because its call would be missing.
    """
    starts = _starts(request)
    if not starts:
        return [(0, 0)]
    cuts = [(start, 0) for start in (reversed(starts) if drops_own else starts[:1])]
    cuts += [(starts[0], turns) for turns in range(1, len(history) + 1)]
    first = {
        turns: next((m["role"] for m in history[-turns] if m["role"] != "system"), "") for _, turns in cuts if turns
    }
    whole = [(start, turns) for start, turns in cuts if (first[turns] if turns else request[start]["role"]) != "tool"]
    return whole or cuts[-1:]


async def _prepare_within(
    engine: Engine, request: GenerationRequest, max_input_tokens: int | None, *, alone: bool
) -> Prepared:
    """Prepare `request` if its prompt is within the cap. `alone`: nothing more can be left out of it."""
    try:
        prepared = await engine.prepare(request)
    except InvalidRequest as error:
        if max_input_tokens is None or error.param != request.max_tokens_param or request.max_tokens is None:
            raise
        # The requested completion is too long. Whether the prompt is too long as well is only known without it.
        prepared = await engine.prepare(replace(request, max_tokens=None))
        if prepared.prompt_tokens <= max_input_tokens:
            raise
    if max_input_tokens is None or prepared.prompt_tokens <= max_input_tokens:
        return prepared
    param = request.prompt_param
    what = "system prompt and last turn alone are" if alone else "messages are" if request.messages else "prompt is"
    raise InvalidRequest(
        f"This model takes prompts of at most {max_input_tokens} tokens, but the {what} {prepared.prompt_tokens} "
        f"tokens long. Shorten the {param}.",
        param,
        TOO_LONG,
    )


def _capped(request: GenerationRequest, max_output_tokens: int | None) -> GenerationRequest:
    """The request with its completion capped. Raises InvalidRequest if it asks for more."""
    most = max_output_tokens
    if most is None:
        return request
    if request.max_tokens is not None and request.max_tokens > most:
        raise InvalidRequest(
            f"{request.max_tokens_param} is too large: {request.max_tokens}. This model supports at most {most} "
            f"completion tokens, whereas you provided {request.max_tokens}.",
            request.max_tokens_param,
            "invalid_value",
        )
    return replace(request, default_max_tokens=min(request.default_max_tokens or most, most))


def _leaves_room(prepared: Prepared, request: GenerationRequest, max_model_len: int) -> bool:
    wanted = request.max_tokens or request.default_max_tokens or max_model_len
    return prepared.max_tokens >= min(wanted, max_model_len // 4)
