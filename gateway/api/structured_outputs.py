"""Constraints on the generated text: OpenAI's `response_format` and vLLM's `structured_outputs`, bounded in size."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from gateway.api.schema import Schema, json_bytes
from gateway.exchange.json_text import is_shallow

MAX_SCHEMA_BYTES = 32_768
"""A JSON schema is compiled to a grammar before generation; a larger one takes seconds of the engine's time."""
MAX_SCHEMA_DEPTH = 64
"""Grammar compilers are recursive; a deep schema must not overflow the engine's stack."""
MAX_REGEX_LENGTH = 4096
"""Characters. A regular expression is compiled to an automaton before generation."""


def check_json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON schema. Raises ValueError if it is too large or too deep."""
    try:
        size = json_bytes(schema)
    except ValueError as error:
        raise ValueError(f"the schema must be nested at most {MAX_SCHEMA_DEPTH} levels deep") from error
    if size > MAX_SCHEMA_BYTES:
        raise ValueError(f"the schema must be at most {MAX_SCHEMA_BYTES} bytes long")
    if not is_shallow(schema, MAX_SCHEMA_DEPTH):
        raise ValueError(f"the schema must be nested at most {MAX_SCHEMA_DEPTH} levels deep")
    return schema


JsonSchemaObject = Annotated[dict[str, Any], AfterValidator(check_json_schema)]


class JsonSchema(Schema):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: JsonSchemaObject = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Schema):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is required with type 'json_schema'")
        return self

    def for_engine(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True, exclude_none=True)


class StructuredOutputs(Schema):
    """vLLM's constraints on the text; exactly one."""

    # The rule of `_check_count`, for the OpenAPI document.
    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"properties": {name: {"not": {"type": "null"}}}, "required": [name]}
                for name in ("json", "regex", "choice", "grammar")
            ]
        }
    )
    json_: JsonSchemaObject | None = Field(None, alias="json")
    regex: Annotated[str, Field(min_length=1, max_length=MAX_REGEX_LENGTH)] | None = None
    choice: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=4096)]],
            Field(fail_fast=True, min_length=1, max_length=512),
        ]
        | None
    ) = None
    grammar: Annotated[str, Field(min_length=1, max_length=16_384)] | None = None
    """In EBNF."""

    @model_validator(mode="after")
    def _check_count(self) -> StructuredOutputs:
        if len(self.for_engine()) != 1:
            raise ValueError("exactly one of json, regex, choice and grammar is required")
        return self

    def for_engine(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True, exclude_none=True)
