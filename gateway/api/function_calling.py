"""Function calling in a request: OpenAI's `tools`, `tool_choice` and the calls of earlier turns, bounded in size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from gateway.api.schema import Plain, Schema, json_bytes
from gateway.api.structured_outputs import JsonSchemaObject
from gateway.exchange.json_text import check_nesting

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 131_072
"""All tools of a request together: they are part of the prompt, and forced calls are compiled to a grammar."""

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class FunctionDefinition(Schema):
    name: FunctionName
    description: Annotated[str, Field(max_length=8192)] | None = None
    parameters: JsonSchemaObject | None = None
    """JSON schema of the arguments; a function without it takes none."""
    strict: bool | None = None
    """Constrain the arguments to the schema while they are generated."""


class Tool(Schema):
    type: Literal["function"]
    function: FunctionDefinition

    def for_engine(self) -> dict[str, Any]:
        """Return the tool as chat templates expect it; without `parameters` it gets a schema of no arguments."""
        fields = self.model_dump(exclude_none=True)
        fields["function"].setdefault("parameters", {"type": "object", "properties": {}})
        return fields


def check_tools(tools: list[Tool]) -> list[Tool]:
    """Return `tools`. Raises ValueError if they are too large together or share a name."""
    check_together((tool.function.name, tool.for_engine()) for tool in tools)
    return tools


def check_together(tools: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Raise ValueError if tools, given by name and definition, are too large together or share a name.

    The iterable may build them one by one, so that only one exists at a time.
    """
    names: set[str] = set()
    size = 1
    for name, fields in tools:
        if name in names:
            raise ValueError("the functions must have different names")
        names.add(name)
        size += json_bytes(fields) + 1
        if size > MAX_TOOLS_BYTES:
            raise ValueError(f"the tools must be at most {MAX_TOOLS_BYTES} bytes long together")


Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS), AfterValidator(check_tools)]


class NamedFunction(Schema):
    name: FunctionName


class NamedToolChoice(Schema):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


Arguments = Annotated[str, Field(max_length=262_144), AfterValidator(check_nesting)]


class FunctionCall(Schema):
    name: FunctionName
    arguments: Arguments
    """A JSON object as text. It may be incomplete: a model may have been cut short, and clients send its call back."""


class ToolCall(Schema):
    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: FunctionCall


def _calls_for_engine(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return calls as chat templates expect them, in the parsed list itself, so that never two copies exist."""
    calls[:] = [
        {
            "id": call["id"],
            "type": "function",
            "function": {"name": call["function"]["name"], "arguments": call["function"]["arguments"]},
        }
        for call in calls
    ]
    return calls


ToolCalls = Annotated[list[dict[str, Any]], Plain(ToolCall, _calls_for_engine, max_length=128)]
"""Calls of an earlier turn, as dicts with the fields of ToolCall."""


def check_tool_choice(tool_choice: ToolChoice | None, tools: list[Tool] | None) -> None:
    """Raise ValueError if `tool_choice` requires a tool that is not among `tools`."""
    if tool_choice in (None, "none", "auto"):
        return
    if not tools:
        raise ValueError("is only allowed when 'tools' are given")
    if isinstance(tool_choice, NamedToolChoice):
        names = [tool.function.name for tool in tools]
        if tool_choice.function.name not in names:
            raise ValueError(f"names the function {tool_choice.function.name!r}, which is not among the tools")
