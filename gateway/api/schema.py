"""Base of the schemas of request bodies, and how a body is parsed and checked.

Types are strict and every size is bounded. Unknown fields are ignored, as in vLLM: SDKs add new ones faster than
servers learn them. Raises BadRequest, which names the parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from gateway.errors import BadRequest, from_validation
from gateway.exchange.json_parser import load
from gateway.exchange.json_text import MAX_DEPTH, is_shallow


class Schema(BaseModel):
    """Base of every object in a request body: strict types, unknown fields ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", use_attribute_docstrings=True)


@dataclass(frozen=True, slots=True)
class Plain:
    """Annotates a list whose items are validated as `model` but kept as dicts; `keep` converts the parsed list.

    An instance of a model takes about 500 bytes, and a request may hold 100,000 calls. `keep` may change the list in
    place: nothing else refers to it.
    """

    model: type[BaseModel]
    keep: Callable[[list[dict[str, Any]]], Any] = lambda items: items
    min_length: int | None = None
    max_length: int | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        # Each item's instance is freed at once. The Python function between two items lets other threads run.
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


def json_bytes(value: Any) -> int:
    """Return the length of a parsed value as JSON. Raises ValueError if it is nested too deep to be serialized."""
    try:
        return len(orjson.dumps(value))
    except orjson.JSONEncodeError as error:  # depth is the only reason: orjson has parsed the value
        raise ValueError(f"must be nested at most {MAX_DEPTH} levels deep") from error


def check_depth(value: dict[str, Any]) -> dict[str, Any]:
    """Return a parsed object. Raises ValueError if it is nested too deep for one of the JSON writers."""
    if not is_shallow(value):
        raise ValueError(f"must be nested at most {MAX_DEPTH} levels deep")
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(check_depth)]
"""Any JSON object of bounded depth."""

Body = TypeVar("Body", bound=BaseModel)


def parse_body(schema: type[Body], body: bytes, **overrides: Any) -> Body:
    """Parse and validate a request body; `overrides` replace its fields. Raises BadRequest.

    Time is linear in the length of the body, and memory at most ten times that. Only the first error is reported:
    lists are read up to their first error, and the number of entries of a dict is bounded.
    """
    data = load(body)
    if not isinstance(data, dict):
        raise BadRequest("The request body must be a JSON object.")
    data |= overrides
    try:
        return schema.model_validate(data, strict=True)
    except ValidationError as error:
        raise from_validation(error, data) from error


_declared: dict[str, type[BaseModel]] = {}
"""The schemas of all bodies, by name: for the OpenAPI document."""


class JsonBody(Generic[Body]):
    """The JSON body of a route: `openapi` declares it, and calling it parses the bytes.

    BODY = JsonBody(TokenizeRequest)

    @router.post("/tokenize", openapi_extra=BODY.openapi)
    async def tokenize(call: Annotated[Call, Depends(call)]) -> Response:
        body = await call.read(BODY)
    """

    def __init__(self, schema: type[Body], **operation: Any) -> None:
        """`operation` has more fields of the operation in the OpenAPI document, such as its `parameters`."""
        self._schema = schema
        _declared[schema.__name__] = schema
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}}}
        self.openapi: dict[str, Any] = {"requestBody": {"required": True, "content": content}, **operation}

    def __call__(self, body: bytes) -> Body:
        """Parse and validate a body. Raises BadRequest."""
        return parse_body(self._schema, body)


def declare_bodies(document: dict[str, Any]) -> None:
    """Put the schemas of all bodies into the components of an OpenAPI document."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name, model in _declared.items():
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[name] = schema
