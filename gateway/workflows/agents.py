"""An agent: a role that thinks, calls tools and writes, within one run.

Each generation goes through the run's meter, which limits and counts it; where the key's tokens-per-minute are used
up it waits for the window as long as the run's time allows, and says so. Decisions are JSON held to a schema, so any
model, however small, decides something that parses. Results of tools are in the prompt between `<source>` tags,
as data. Raises GatewayError and OutOfBudget.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from engine.base import Delta, FinishReason, GenerationRequest, Prepared, Usage
from gateway.errors import BadRequest, GatewayError, InternalError, Overloaded, RateLimitExceeded
from gateway.tools.base import Observation
from gateway.workflows.filtering import filtered
from gateway.workflows.links import LinkFilter
from gateway.workflows.prompting import Outside, Prompt, fenced, quoted
from gateway.workflows.run import OutOfBudget, Run

__all__ = ["AGENT_FAILURES", "Agent", "Decision", "Outside", "Prompt", "fenced", "quoted"]

M = TypeVar("M", bound=BaseModel)

AGENT_FAILURES = (BadRequest, InternalError, OutOfBudget)
"""What one agent may fail of without failing the run; a dead engine, or a key without rights, ends it."""
FETCH = "web_fetch"
PUBLIC_TOOLS = frozenset({FETCH, "web_search", "serp_ads"})
"""Tools whose results are public. Results of all other tools must not get into an address that a model makes up.

What is asked of a search goes to the service that the operator chose, and a redirect from a given address carries
nothing of the model's. Calls of MCP servers are not restricted by what others have said: `models.*.tools` is for that.
"""
_NOT_GIVEN = (
    "web_fetch: documents, files or other private text are part of this work, so only addresses that a search found or "
    "that the user gave can be fetched. Search for the page first."
)
MAX_OBSERVATION_EVENT_CHARS = 2000
"""Longest text of a tool's result that events carry; the agent reads more."""
_SHARES = (1.0, 0.5, 0.25, 0.12, 0.05, 0.0)
"""How much of the material is tried, until the prompt fits and leaves room for the answer."""
_FIELD_SHARES = (0.5, 0.2, 0.05)
"""Then, without material, how much of the fields."""
_SCHEMA_FIELDS = ("response_format", "structured_outputs")
_THOUGHT_TOKENS = 2000
"""Of a model that thinks before every decision, although it is asked not to."""


class Decision(BaseModel):
    """Base of what agents decide. Strings and lists are bounded, so that a small model can't fill its context."""

    model_config = ConfigDict(extra="forbid")


class Agent:
    """One agent of a run. Use as a context: it reports when it begins and ends, and what it spent."""

    def __init__(self, run: Run, agent_id: str, role: str) -> None:
        self.run = run
        self.id = agent_id
        self.role = role
        self.usage = Usage()
        self.stop_reason: str | None = None
        """The stop string that ended what it said last."""
        self._traced = run.meter.tracing.agent(agent_id, role)

    async def __aenter__(self) -> Agent:
        self._span = self._traced.__enter__()
        self.run.emit("AGENT_STARTED", self.id, f"{self.id} has started.", role=self.role)
        return self

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        spent: dict[str, Any] = {
            "prompt_tokens": self.usage.prompt_tokens,
            "completion_tokens": self.usage.completion_tokens,
        }
        self._span.spent(self.usage)
        self._traced.__exit__(kind, error, trace)
        if error is None:
            self.run.emit("AGENT_COMPLETED", self.id, f"{self.id} has finished.", role=self.role, **spent)
        else:
            self.run.emit("ERROR_OCCURRED", self.id, f"{self.id} {self._end(error)}", role=self.role, **spent)

    def _end(self, error: BaseException) -> str:
        """How the agent ended, without details that clients must not see."""
        if isinstance(error, (GatewayError, OutOfBudget)):
            return f"has failed: {error}"
        if isinstance(error, asyncio.CancelledError):
            return "was stopped: the time is used up." if self.run.left_s() <= 0 else "was stopped."
        return "has failed."

    def think(self, message: str, **payload: Any) -> None:
        """Tell the client what the agent is thinking."""
        self.run.emit("AGENT_THINKING", self.id, message, role=self.role, **payload)

    async def use(self, tool: str, /, **arguments: Any) -> Observation:
        """Call a tool. Raises OutOfBudget, and a GatewayError where the key may make no request.

        A failed call is an observation like any other.
        """
        run = self.run
        self._check_time()
        run.budget.take_tool_call()
        await run.meter.count()
        run.begun = True
        call: dict[str, Any] = {"role": self.role, "tool": tool, "call": next(run.numbers)}
        run.emit("TOOL_INVOKED", self.id, f"Calling {tool}.", **call, params=arguments)
        with run.meter.tracing.tool(tool if tool in run.tools else "unknown", call["call"]) as span:
            found = await self._call(tool, arguments)
            if not found.ok:
                span.fail("tool_error")
        run.addresses.add(found.sources)
        run.emit(
            "TOOL_OBSERVATION",
            self.id,
            found.text[:MAX_OBSERVATION_EVENT_CHARS] or "(nothing)",
            **call,
            success=found.ok,
            sources=[source.url for source in found.sources],
        )
        return found

    async def _call(self, tool: str, arguments: dict[str, Any]) -> Observation:
        run = self.run
        if tool == FETCH:
            given = run.addresses.given(str(arguments.get("url", "")))
            if given is not None:
                arguments = arguments | {"url": given}  # without what the model may have added to it
            elif run.private:
                return Observation(_NOT_GIVEN, ok=False)
        try:
            async with asyncio.timeout(run.left_s()):
                return _sound(await run.tools.call(tool, arguments))
        except TimeoutError:
            return Observation(f"{tool}: the time of this run is used up.", ok=False)
        finally:
            run.has_outside = True
            run.private = run.private or tool not in PUBLIC_TOOLS

    async def use_all(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Observation]:
        """Call tools side by side and return what those brought that the budget allowed.

        Raises OutOfBudget where it allowed none, and what `use` raises.
        """
        outcomes = await asyncio.gather(
            *(self.use(tool, **arguments) for tool, arguments in calls), return_exceptions=True
        )
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        found = [outcome for outcome in outcomes if isinstance(outcome, Observation)]
        for failure in failures:
            if not isinstance(failure, OutOfBudget) or not found:
                raise failure
        return found

    async def write(self, prompt: Prompt, max_tokens: int) -> str:
        """The model's answer to `prompt`."""
        return (await self._collect(prompt, max_tokens)).strip()

    async def decide(
        self, prompt: Prompt, schema: type[M], max_tokens: int, *, schema_is_outside: bool = False
    ) -> M | None:
        """Return the model's decision, held to `schema` while it is generated; None when it was cut short.

        A server that can't hold its model to a schema is asked in words. `schema_is_outside` says that names in it
        come from a tool.
        """
        text = await self._decided(prompt, schema.model_json_schema(), max_tokens, schema_is_outside)
        try:
            # Asked in words, a model may put others or a fence around the object.
            return schema.model_validate_json(text[text.find("{") : text.rfind("}") + 1])
        except ValidationError:
            self.think("The decision was cut short; going on without it.")
            return None

    async def _decided(self, prompt: Prompt, schema: dict[str, Any], max_tokens: int, is_outside: bool) -> str:
        if self.run.holds_to_schemas:
            try:
                return await self._collect(prompt, max_tokens, structured_outputs={"json": schema})
            except BadRequest as error:
                if (error.param or "").partition(".")[0] not in _SCHEMA_FIELDS:
                    raise
                self.run.holds_to_schemas = False
        described = json.dumps(schema, ensure_ascii=False)
        described = fenced("schema", described) if is_outside else described
        form = f"The JSON object must be valid against this schema:\n{described}"
        return await self._collect(replace(prompt, form=form), max_tokens)

    async def speak(
        self, prompt: Prompt, through: Callable[[str], str] = str, opening: str = ""
    ) -> tuple[str, FinishReason]:
        """Send what the model says to `prompt` to the client as the answer, token by token, behind `opening`.

        Each piece goes `through` a filter first. The client's own sampling parameters and max_tokens hold here, and
        only here. Returns the answer, and why it ended: that has not been sent, so that more may follow.
        """
        text: list[str] = []
        finish_reason: FinishReason = "stop"
        thoughts = LinkFilter(self.run.addresses, image_hosts=self.run.image_hosts)
        async with contextlib.aclosing(self._generate(prompt, None)) as deltas:
            async for delta in deltas:
                if opening:
                    self.run.send(Delta(opening))
                    opening = ""
                finish_reason = delta.finish_reason or finish_reason
                self.stop_reason = delta.stop_reason or self.stop_reason
                piece = await filtered(delta.text, through)
                thought = await filtered(delta.reasoning, thoughts) if delta.reasoning else ""
                if delta.text or delta.finish_reason:
                    thought += thoughts.flush()  # it has ended thinking
                if piece or thought:
                    text.append(piece)
                    self.run.send(Delta(piece, reasoning=thought))
        if thought := thoughts.flush():
            self.run.send(Delta("", reasoning=thought))
        return "".join(text), finish_reason

    async def _collect(self, prompt: Prompt, max_tokens: int, **more: Any) -> str:
        """Return the whole of a generation that is for agents only, with as little thinking as the model allows."""
        run = self.run
        while True:
            effort, thought = run.effort, False
            text: list[str] = []
            self._check_time()
            try:
                async with (
                    asyncio.timeout(run.left_s()),
                    contextlib.aclosing(self._generate(prompt, max_tokens + run.thought_tokens, **more)) as deltas,
                ):
                    async for delta in deltas:
                        text.append(delta.text)
                        thought = thought or bool(delta.reasoning)
            except TimeoutError:
                raise OutOfBudget("the time of this run is used up") from None
            except BadRequest as error:
                if effort != "none" or effort == run.request.reasoning_effort or error.code != "invalid_request":
                    raise
                run.effort = "low"  # the model can't do without
                run.thought_tokens = _THOUGHT_TOKENS
                continue
            if not thought or run.thought_tokens:
                return "".join(text)
            if effort in ("none", "minimal", "low"):
                run.thought_tokens = _THOUGHT_TOKENS
            elif run.effort == effort:
                run.effort = "none"

    def _check_time(self) -> None:
        if self.run.left_s() <= 0:
            raise OutOfBudget("the time of this run is used up")

    async def _generate(self, prompt: Prompt, max_tokens: int | None, **more: Any) -> AsyncGenerator[Delta, None]:
        """Yield a generation's deltas, once the limits have room for it. `max_tokens` None makes it the answer."""
        run, final, waited = self.run, max_tokens is None, False
        while True:
            # Until something has run, refusals are sent as a status, so the first token is waited for.
            stream = run.request.stream and (final or not run.begun)
            prepared = await run.meter.prepare_first(self._requests(prompt, max_tokens, stream, more))
            most = prepared.prompt_tokens + prepared.max_tokens
            if not final:
                run.budget.take_tokens(most)
            settlements = run.settlements
            try:
                async with (
                    run.meter.reserved([prepared]),
                    contextlib.aclosing(self._admitted(prepared)) as deltas,
                ):
                    async for delta in deltas:
                        run.begun = True
                        yield delta
                return
            except (RateLimitExceeded, Overloaded) as error:
                if not run.begun:
                    raise  # the client can wait as well as we
                if run.settlements != settlements:
                    continue  # room was made while the refusal was on its way
                wait_s = self._wait_s(error, run.budget.left_s() if final else run.left_s())
                if not waited:
                    why = "token limit" if isinstance(error, RateLimitExceeded) else "turn at the engine"
                    message = f"Waiting for the key's {why}, {math.ceil(wait_s)} s at most."
                    run.emit("PROGRESS", self.id, message, role=self.role, wait_s=round(wait_s, 1))
                waited = True
            finally:
                if not final:
                    run.budget.give_back_tokens(most - prepared.usage.prompt_tokens - prepared.usage.completion_tokens)
                self.usage.add(prepared.usage)
            await run.wait_for_room(wait_s)

    async def _admitted(self, prepared: Prepared) -> AsyncGenerator[Delta, None]:
        with self.run.generating():
            async with contextlib.aclosing(self.run.meter.generate(prepared)) as deltas:
                async for delta in deltas:
                    yield delta

    def _wait_s(self, error: GatewayError, left_s: float) -> float:
        """The most seconds to wait. Raises OutOfBudget if neither time nor other agents will make room."""
        wait_s = error.retry_after_s or 1.0
        if wait_s < left_s:
            return wait_s
        if left_s > 0 and self.run.running:
            return left_s
        raise OutOfBudget(f"no room for {wait_s:.0f} s, which is longer than this run may take") from error

    def _requests(
        self, prompt: Prompt, max_tokens: int | None, stream: bool, more: Mapping[str, Any]
    ) -> Iterator[GenerationRequest]:
        """Yield the request with its prompt in several lengths, longest first."""
        lengths = [(share, 1.0) for share in _SHARES] + [(0.0, share) for share in _FIELD_SHARES]
        request = self._answer_request() if max_tokens is None else self._own_request(max_tokens, stream, more)
        context = self.run.context
        return (replace(request, messages=prompt.messages(*length, context=context)) for length in lengths)

    def _answer_request(self) -> GenerationRequest:
        client = self.run.request
        most = client.max_tokens or client.default_max_tokens
        return replace(
            client,
            request_id=self._next_id(),
            # As much as fits: behind a prompt that the client does not see, it can't know how much that is.
            max_tokens=None,
            default_max_tokens=most,
            min_tokens=min(client.min_tokens, self.run.meter.model.engine.max_model_len // 4),
            tool_choice=None,
        )

    def _own_request(self, max_tokens: int, stream: bool, more: Mapping[str, Any]) -> GenerationRequest:
        client = self.run.request
        return GenerationRequest(
            request_id=self._next_id(),
            stream=stream,
            default_max_tokens=max_tokens,
            temperature=client.temperature,
            top_p=client.top_p,
            seed=client.seed,
            affinity=client.affinity,
            reasoning_effort=self.run.effort,
            **more,
        )

    def _next_id(self) -> str:
        return f"{self.run.request.request_id}-{self.id.lower()}-{next(self.run.numbers)}"


def _sound(found: Observation) -> Observation:
    """Return the observation without what can't be encoded: lone surrogates, which neither events nor models take."""
    sources = [
        replace(source, url=_encodable(source.url), title=_encodable(source.title), snippet=_encodable(source.snippet))
        for source in found.sources
    ]
    return replace(found, text=_encodable(found.text), sources=sources)


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
