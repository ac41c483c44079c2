"""Builds a pydantic model from an untrusted JSON schema, so that arguments of external tools are validated.

References within the schema are resolved; others are refused, so nothing is fetched. The schema's patterns are
untrusted regular expressions: RE2 matches them in linear time, and a pattern that RE2 does not support is left to the
server. Raises ValueError on an invalid schema.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import re2
from jsonschema import Draft202012Validator, SchemaError, ValidationError
from jsonschema.exceptions import best_match
from jsonschema.validators import extend, validator_for
from pydantic import RootModel, model_validator
from referencing import Registry
from referencing.exceptions import Unresolvable

Keyword = Callable[[Any, Any, Any, Any], Iterator[ValidationError] | None]

MAX_SCHEMA_CHARS = 20_000
"""Length of a tool's schema, which goes into prompts."""
_MAX_MESSAGE_CHARS = 200
_MAX_STEPS = 5000
"""Keywords of a schema that are applied to one call's arguments, some 20 us each. References that branch double them
with each level."""


def arguments_model(schema: dict[str, Any]) -> type[RootModel[dict[str, Any]]]:
    """Return a model whose `root` is a mapping that `schema` allows. Raises ValueError."""
    try:
        if len(repr(schema)) > MAX_SCHEMA_CHARS:
            raise ValueError(f"its schema is longer than {MAX_SCHEMA_CHARS} characters")
        kind = validator_for(schema, default=Draft202012Validator)
        kind.check_schema(schema)
    except SchemaError as error:
        raise ValueError("its schema is not valid") from error
    except RecursionError:
        raise ValueError("its schema is nested too deeply") from None
    steps = _Steps()
    bounded = extend(kind, steps.counted({**kind.VALIDATORS, **_PATTERNS}))  # type: ignore[no-untyped-call]
    validator = bounded(schema, registry=Registry())

    class Arguments(RootModel[dict[str, Any]]):
        @model_validator(mode="after")
        def _must_fit_the_schema(self) -> Arguments:
            steps.left = _MAX_STEPS
            try:
                error = best_match(validator.iter_errors(self.root))
            except Unresolvable:
                raise ValueError("the schema refers to something outside itself") from None
            except RecursionError:
                raise ValueError("the schema refers to itself without an end") from None
            if error is not None:
                where = ".".join(map(str, error.absolute_path))
                raise ValueError(f"{where + ': ' if where else ''}{error.message[:_MAX_MESSAGE_CHARS]}")
            return self

        @classmethod
        def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
            """Return the schema as it was given."""
            return dict(schema)

    return Arguments


class _Steps:
    """Counts the keywords that are applied."""

    def __init__(self) -> None:
        self.left = _MAX_STEPS

    def counted(self, keywords: Mapping[str, Keyword]) -> dict[str, Keyword]:
        """Return keywords that raise ValueError once there are no steps left."""
        return {name: self._counted(keyword) for name, keyword in keywords.items()}

    def _counted(self, keyword: Keyword) -> Keyword:
        def apply(validator: Any, rule: Any, instance: Any, schema: Any) -> Iterator[ValidationError] | None:
            self.left -= 1
            if self.left < 0:
                raise ValueError("it takes too long to check them against the tool's schema")
            return keyword(validator, rule, instance, schema)

        return apply


def _matches(pattern: str, text: str) -> bool:
    compiled = _compiled(pattern)
    return compiled is None or compiled.search(text) is not None


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> Any:
    """Return a pattern for RE2; None for one that RE2 does not know, such as a look-ahead."""
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except re2.error:
        return None


def _pattern(validator: Any, pattern: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not _matches(str(pattern), instance):
        yield ValidationError(f"{instance[:60]!r} does not match {str(pattern)[:100]!r}")


def _pattern_properties(validator: Any, patterns: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    for pattern, part in patterns.items() if isinstance(instance, dict) else ():
        for name, value in instance.items():
            if _matches(pattern, name):
                yield from validator.descend(value, part, path=name, schema_path=pattern)


def _additional_properties(validator: Any, rule: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if not isinstance(instance, dict):
        return
    patterns = schema.get("patternProperties", {})
    for name in instance.keys() - schema.get("properties", {}).keys():
        if any(_matches(pattern, name) for pattern in patterns):
            continue
        if isinstance(rule, dict):
            yield from validator.descend(instance[name], rule, path=name)
        elif not rule:
            yield ValidationError(f"Additional properties are not allowed ({name[:60]!r} was unexpected)")


def _left_to_the_server(validator: Any, rule: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    return iter(())  # it would match names with Python's `re`


_PATTERNS = {
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional_properties,
    "unevaluatedProperties": _left_to_the_server,
}
