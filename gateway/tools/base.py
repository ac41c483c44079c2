"""The tool protocol, and the toolbox that calls tools for agents.

A tool does one thing in the outside world and says what it found in words that a model can read, with the sources it
came from. The box around it bounds the call: its arguments are checked, it has a time limit, failures that may pass
are tried again, and a tool that is out of order is left alone for a while. An agent never sees an exception: a failed
call is an observation that says what went wrong. The result of a tool is data; a prompt marks it
as such.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from engine.breaker import Breaker

log = logging.getLogger(__name__)

MAX_OBSERVATION_CHARS = 20_000
"""Longest text of one observation; agents cut it further to what their model's context holds."""
ATTEMPTS = 3
_BACKOFF_S = 0.5
_MAX_WAIT_S = 5.0
"""Longest wait between two attempts. If a service asks for a longer one, the call fails."""
_BREAKER_FAILURES = 5
_BREAKER_S = 30.0


class ToolError(Exception):
    """A call that failed. The message is for the agent: no secrets, no traceback."""

    def __init__(
        self,
        message: str,
        *,
        may_pass: bool = False,
        out_of_order: bool | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        """`may_pass`: the same call may succeed if it is retried, after `retry_after_s` if that is known.

        `out_of_order`: the tool would fail for any arguments, so the failure counts for its breaker; None means the
        value of `may_pass`. An address that does not exist is the caller's fault, not the tool's.
        """
        super().__init__(message)
        self.may_pass = may_pass
        self.out_of_order = may_pass if out_of_order is None else out_of_order
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Source:
    """A source of an observation. `fetched`: its text was read, not only its address found."""

    url: str
    """http(s), or `local:` and the path within the operator's folder."""
    title: str = ""
    snippet: str = ""
    fetched: bool = False
    published: str = ""
    """ISO date, or empty."""

    @property
    def domain(self) -> str:
        return (urlsplit(self.url).hostname or "").removeprefix("www.")


@dataclass(frozen=True, slots=True)
class Observation:
    """Result of a tool call. `data` is the same result for code."""

    text: str
    sources: Sequence[Source] = ()
    ok: bool = True
    data: Any = None


class Tool(Protocol):
    """One tool."""

    @property
    def name(self) -> str:
        """The name that models use."""

    @property
    def description(self) -> str:
        """One or two sentences for models."""

    @property
    def arguments(self) -> type[BaseModel]:
        """A pydantic model. Models get its JSON schema."""

    @property
    def timeout_s(self) -> float:
        """Timeout of one attempt."""

    async def run(self, arguments: Any) -> Observation:
        """Run the tool. Raises ToolError. Cancellation frees everything."""

    async def close(self) -> None:
        """Free connections and processes. Idempotent."""


class Resource(Protocol):
    """Something that tools share and the toolbox owns: started before the first call, closed after the last."""

    async def start(self) -> None:
        """Start. Returns at once; slow work continues in the background."""

    async def close(self) -> None:
        """Free everything. Idempotent."""


class Toolbox:
    """Tools by name. One instance serves all runs; `only` selects the tools of one run."""

    def __init__(
        self,
        tools: Iterable[Tool] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
        breakers: dict[str, Breaker] | None = None,
        resources: Sequence[Resource] = (),
        backoff_s: float = _BACKOFF_S,
    ) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._clock = clock
        self._breakers = breakers if breakers is not None else {}
        self._resources = resources
        self._backoff_s = backoff_s
        self._lent = False

    def __contains__(self, name: object) -> bool:
        return name in self._tools

    @property
    def names(self) -> list[str]:
        return list(self._tools)

    def only(self, names: Iterable[str]) -> Toolbox:
        """Return a toolbox with the existing tools among `names`. Closing it closes nothing."""
        wanted = set(names)
        kept = [tool for name, tool in self._tools.items() if name in wanted]
        share = Toolbox(kept, clock=self._clock, breakers=self._breakers, backoff_s=self._backoff_s)
        share._lent = True
        return share

    def describe(self) -> list[Mapping[str, Any]]:
        """Return name, description and argument schema of each tool, for prompts."""
        return [
            {"name": tool.name, "description": tool.description, "arguments": _compact(tool.arguments)}
            for tool in self._tools.values()
        ]

    async def start(self) -> None:
        """Start the shared resources."""
        for resource in self._resources:
            await resource.start()

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Observation:
        """Call a tool. Never raises but when cancelled: what goes wrong is the observation."""
        tool = self._tools.get(name)
        if tool is None:
            known = ", ".join(self._tools) or "none"
            return Observation(f"There is no tool {str(name)[:100]!r}. The tools are: {known}.", ok=False)
        try:
            checked = tool.arguments.model_validate(dict(arguments) if isinstance(arguments, Mapping) else arguments)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "arguments"
            return Observation(f"{name}: {where}: {first['msg'].removeprefix('Value error, ')}.", ok=False)
        breaker = self._breakers.setdefault(name, Breaker(_BREAKER_FAILURES, _BREAKER_S, clock=self._clock))
        if not breaker.admits():
            return Observation(f"{name} has failed repeatedly and is not available at the moment.", ok=False)
        return await self._attempt(tool, checked, breaker)

    async def _attempt(self, tool: Tool, arguments: BaseModel, breaker: Breaker) -> Observation:
        for attempt in range(ATTEMPTS):
            try:
                async with asyncio.timeout(tool.timeout_s):
                    found = await tool.run(arguments)
            except TimeoutError:
                message = f"{tool.name}: it did not answer within {tool.timeout_s:g} s."
                failure = ToolError(message, out_of_order=True)
            except ToolError as error:
                message, failure = f"{tool.name}: {error}", error
            except Exception:  # a tool's own fault must not end the run that called it
                log.exception("the tool %s failed", tool.name)
                message, failure = f"{tool.name}: it failed.", ToolError("", out_of_order=True)
            else:
                breaker.succeed()
                return replace(found, text=_bounded(found.text))
            wait_s = self._backoff_s * 2**attempt * random.uniform(0.5, 1.5)
            wait_s = max(wait_s, failure.retry_after_s or 0.0)
            if not failure.may_pass or attempt == ATTEMPTS - 1 or wait_s > _MAX_WAIT_S:
                break
            await asyncio.sleep(wait_s)
        if failure.out_of_order:
            breaker.fail()
        else:
            breaker.succeed()  # it worked well enough to report what was wrong with the call
        return Observation(_bounded(message), ok=False)

    async def close(self) -> None:
        """Close all tools, then the shared resources. Idempotent."""
        if self._lent:
            return
        await asyncio.gather(*(tool.close() for tool in self._tools.values()), return_exceptions=True)
        for resource in reversed(self._resources):
            await resource.close()


def nested_deeper(value: Any, most: int) -> bool:
    """Whether objects and lists are nested deeper than `most`."""
    level = [value]
    for _ in range(most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
        ]
        if not level:
            return False
    return True


def _bounded(text: str) -> str:
    if len(text) <= MAX_OBSERVATION_CHARS:
        return text
    mark = "\n[cut]"
    return text[: MAX_OBSERVATION_CHARS - len(mark)] + mark


def _compact(arguments: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of `arguments` without the parts that models don't need."""
    schema = arguments.model_json_schema()
    schema.pop("description", None)
    bare: dict[str, Any] = _without_titles(schema)
    return bare


def _without_titles(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_titles(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    # A schema's title is text; an argument that is called so has a schema of its own.
    return {
        name: _without_titles(value)
        for name, value in schema.items()
        if not (name == "title" and isinstance(value, str)) and not (name == "default" and value is None)
    }
