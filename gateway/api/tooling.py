"""Function calling in a request: OpenAI's `tools`, `tool_choice` and the calls of earlier turns, bounded in size."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

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


def check_json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Return `schema` if its size is bearable. Raises ValueError."""
    if not _is_shallow(schema, MAX_SCHEMA_DEPTH):
        raise ValueError(f"the schema must be nested at most {MAX_SCHEMA_DEPTH} levels deep")
    if len(orjson.dumps(schema)) > MAX_SCHEMA_BYTES:
        raise ValueError(f"the schema must be at most {MAX_SCHEMA_BYTES} bytes long")
    return schema


def _is_shallow(value: Any, depth: int) -> bool:
    if not isinstance(value, (dict, list)):
        return True
    children = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_is_shallow(child, depth - 1) for child in children)


JsonSchemaObject = Annotated[dict[str, Any], AfterValidator(check_json_schema)]


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
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise ValueError("the functions must have different names")
    if len(orjson.dumps([tool.for_engine() for tool in tools])) > MAX_TOOLS_BYTES:
        raise ValueError(f"the tools must be at most {MAX_TOOLS_BYTES} bytes long together")
    return tools


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS), AfterValidator(check_tools)]


class NamedFunction(Schema):
    name: FunctionName


class NamedToolChoice(Schema):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


class FunctionCall(Schema):
    name: FunctionName
    arguments: Annotated[str, Field(max_length=262_144)]
    """A JSON object, as text; or what a model wrote of one before it was cut short, which must not end the talk."""


class ToolCall(Schema):
    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: FunctionCall


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
