"""Function calling in a request: OpenAI's `tools`, `tool_choice` and the calls of earlier turns, bounded in size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from gateway.exchange.json_text import MAX_DEPTH, check_nesting, is_shallow

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 131_072
"""All tools of a request together: they stand in the prompt, and forced calls are compiled to a grammar."""
MAX_SCHEMA_BYTES = 32_768
"""A JSON schema is compiled to a grammar before it runs; larger ones take seconds of the engine's time."""
MAX_SCHEMA_DEPTH = 64
"""Compilers of grammars recurse; a deep schema must not be able to overflow the engine's stack."""

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Schema(BaseModel):
    """Base of everything in a request's body: strict types, unknown fields ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", use_attribute_docstrings=True)


@dataclass(frozen=True, slots=True)
class Plain:
    """Annotates a list whose items are checked as `model`, but kept as what `keep` makes of the list that was parsed.

    A model takes some 500 bytes, and a request may hold 100,000 calls. `keep` may change the list: nobody else has it.
    """

    model: type[BaseModel]
    keep: Callable[[list[dict[str, Any]]], Any] = lambda items: items
    min_length: int | None = None
    max_length: int | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        # Each item's model is forgotten at once. Python's own code in between lets other threads run.
        item = core_schema.no_info_wrap_validator_function(_check_alone, handler.generate_schema(self.model))
        items = core_schema.list_schema(
            item, strict=True, fail_fast=True, min_length=self.min_length, max_length=self.max_length
        )
        return core_schema.no_info_wrap_validator_function(self._kept, items)

    def _kept(self, items: Any, check: Callable[[Any], Any]) -> Any:
        check(items)
        return self.keep(items)


def _check_alone(item: Any, check: Callable[[Any], Any]) -> None:
    check(item)


def max_entries(most: int) -> BeforeValidator:
    """Return what refuses a dict of more than `most` entries before it looks into them, as pydantic does not."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            context = {"field_type": "Dictionary", "max_length": most, "actual_length": len(value)}
            raise PydanticKnownError("too_long", context)
        return value

    return BeforeValidator(check)


def check_json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Return `schema` if its size is bearable. Raises ValueError."""
    try:
        size = json_bytes(schema)
    except ValueError as error:
        raise ValueError(f"the schema must be nested at most {MAX_SCHEMA_DEPTH} levels deep") from error
    if size > MAX_SCHEMA_BYTES:
        raise ValueError(f"the schema must be at most {MAX_SCHEMA_BYTES} bytes long")
    if not is_shallow(schema, MAX_SCHEMA_DEPTH):
        raise ValueError(f"the schema must be nested at most {MAX_SCHEMA_DEPTH} levels deep")
    return schema


def json_bytes(value: Any) -> int:
    """Return the length of a parsed value as JSON. Raises ValueError where it is nested too deep to be written."""
    try:
        return len(orjson.dumps(value))
    except orjson.JSONEncodeError as error:  # nothing else of what orjson has read can't be written
        raise ValueError(f"must be nested at most {MAX_DEPTH} levels deep") from error


def check_depth(value: dict[str, Any]) -> dict[str, Any]:
    """Return a parsed object if everything can write it. Raises ValueError."""
    if not is_shallow(value):
        raise ValueError(f"must be nested at most {MAX_DEPTH} levels deep")
    return value


JsonSchemaObject = Annotated[dict[str, Any], AfterValidator(check_json_schema)]
JsonObject = Annotated[dict[str, Any], AfterValidator(check_depth)]
"""Any object, but for one that is nested too deep."""


class FunctionDefinition(Schema):
    name: FunctionName
    description: Annotated[str, Field(max_length=8192)] | None = None
    parameters: JsonSchemaObject | None = None
    """JSON schema of the arguments; left out, the function takes none."""
    strict: bool | None = None
    """Hold the arguments to the schema while they are generated."""


class Tool(Schema):
    type: Literal["function"]
    function: FunctionDefinition

    def for_engine(self) -> dict[str, Any]:
        """Return the tool as chat templates know it, with the schema of no arguments where it has none."""
        fields = self.model_dump(exclude_none=True)
        fields["function"].setdefault("parameters", {"type": "object", "properties": {}})
        return fields


def check_tools(tools: list[Tool]) -> list[Tool]:
    """Return `tools` if their size is bearable and their names differ. Raises ValueError."""
    check_together((tool.function.name, tool.for_engine()) for tool in tools)
    return tools


def check_together(tools: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Raise ValueError unless names and forms of tools are bearable together. They are made one by one."""
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
    """A JSON object, as text; or what a model wrote of one before it was cut short, which must not end the talk."""


class ToolCall(Schema):
    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: FunctionCall


def _calls_for_engine(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return calls as chat templates know them: in the place of what was parsed, so that both never exist at once."""
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
    """Raise ValueError unless `tool_choice` speaks of the tools on offer."""
    if tool_choice in (None, "none", "auto"):
        return
    if not tools:
        raise ValueError("is only allowed when 'tools' are given")
    if isinstance(tool_choice, NamedToolChoice):
        names = [tool.function.name for tool in tools]
        if tool_choice.function.name not in names:
            raise ValueError(f"names the function {tool_choice.function.name!r}, which is not among the tools")
