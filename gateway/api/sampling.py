"""Sampling parameters in request bodies, built from the declaration in `engine.sampling`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from pydantic import Field, create_model

from engine.sampling import PARAMETERS, WireField, WireProtocol, wire_fields
from gateway.api.schema import Schema
from gateway.settings.config import DefaultSettings

_WITH_DEFAULTS = tuple(name for name in PARAMETERS if name in DefaultSettings.model_fields)


class SamplingSchema(Schema):
    """Base of bodies with sampling parameters; `accepts_sampling` adds the fields."""

    wire_fields: ClassVar[tuple[WireField, ...]] = ()

    def sampling(self, defaults: DefaultSettings | None = None) -> dict[str, Any]:
        """Return the parameters that are given, by name, or else set by the model's `defaults`."""
        sampling = {}
        if defaults is not None:
            sampling = {name: value for name in _WITH_DEFAULTS if (value := getattr(defaults, name)) is not None}
        for field in self.wire_fields:
            if (value := getattr(self, field.name)) is not None:
                sampling[field.parameter] = value
        return sampling


Model = TypeVar("Model", bound=SamplingSchema)


def accepts_sampling(protocol: WireProtocol) -> Callable[[type[Model]], type[Model]]:
    """Return a class decorator that adds the sampling parameters of `protocol` to a schema."""
    declared = wire_fields(protocol)
    fields: dict[str, Any] = {
        field.name: (field.accepts | None, Field(None, description=field.description)) for field in declared
    }

    def add(schema: type[Model]) -> type[Model]:
        schema.wire_fields = declared
        return create_model(
            schema.__name__, __base__=schema, __module__=schema.__module__, __doc__=schema.__doc__, **fields
        )

    return add
