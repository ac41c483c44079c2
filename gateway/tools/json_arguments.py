"""A pydantic model out of somebody else's JSON schema, so that their tools' arguments are checked as ours are.

References within the schema are followed, others are not: a schema fetches nothing. Fails with ValueError on a schema
that is none.
"""

from __future__ import annotations

from typing import Any

from jsonschema import Draft202012Validator, SchemaError
from jsonschema.exceptions import best_match
from jsonschema.validators import validator_for
from pydantic import RootModel, model_validator
from referencing import Registry
from referencing.exceptions import Unresolvable

MAX_SCHEMA_CHARS = 20_000
"""Of a tool's schema; it goes into prompts."""
_MAX_MESSAGE_CHARS = 200


def arguments_model(schema: dict[str, Any]) -> type[RootModel[dict[str, Any]]]:
    """Return a model whose `root` is a mapping that `schema` allows. Raises ValueError."""
    if len(repr(schema)) > MAX_SCHEMA_CHARS:
        raise ValueError(f"its schema is longer than {MAX_SCHEMA_CHARS} characters")
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ValueError("its schema is not valid") from error
    validator = kind(schema, registry=Registry())

    class Arguments(RootModel[dict[str, Any]]):
        @model_validator(mode="after")
        def _must_fit_the_schema(self) -> Arguments:
            try:
                error = best_match(validator.iter_errors(self.root))
            except Unresolvable:
                raise ValueError("the schema refers to something outside itself") from None
            if error is not None:
                where = ".".join(map(str, error.absolute_path))
                raise ValueError(f"{where + ': ' if where else ''}{error.message[:_MAX_MESSAGE_CHARS]}")
            return self

        @classmethod
        def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
            """Return the schema as it was given."""
            return dict(schema)

    return Arguments
