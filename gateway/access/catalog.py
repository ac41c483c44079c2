"""The configured models: model id -> ModelSpec, and the list of GET /v1/models.

Not handled: what an engine knows about its checkpoint. Raises ModelNotFound and ModelNotAllowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.base import Engine, EngineError
from gateway.access.auth import Principal
from gateway.errors import ModelNotAllowed, ModelNotFound
from gateway.settings.config import Config, ModelSettings

# OpenAI's field is the creation time of the model. All models here have the date of the API reference.
_CREATED = 1703318400


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model id, its settings, and the engine behind it."""

    id: str
    settings: ModelSettings
    engine: Engine

    def describe(self) -> dict[str, Any]:
        """Return OpenAI's model object with a description and `takes_images` (null until the engine is ready)."""
        try:
            takes_images = self.engine.takes_images
        except EngineError:
            takes_images = None
        return {
            "id": self.id,
            "object": "model",
            "created": _CREATED,
            "owned_by": "shannon",
            "description": self.settings.description,
            "takes_images": takes_images,
        }


class Catalog:
    """All configured models."""

    def __init__(self, config: Config, engines: Mapping[str, Engine]) -> None:
        self._default = config.default_model
        self._specs = {
            model_id: ModelSpec(model_id, settings, engines[settings.engine])
            for model_id, settings in config.models.items()
        }

    def resolve(self, model_id: str | None, principal: Principal) -> ModelSpec:
        """Return the spec of `model_id` (the default model for None). Raises ModelNotFound, ModelNotAllowed."""
        spec = self._specs.get(self._default if model_id is None else model_id)
        if spec is None:
            known = ", ".join(spec.id for spec in self.visible_to(principal))
            raise ModelNotFound(
                f"The model {str(model_id)[:256]!r} does not exist. Available models: {known}.", "model"
            )
        if not principal.may_use(spec.id):
            raise ModelNotAllowed(f"This API key may not use the model {spec.id!r}.", "model")
        return spec

    def default_for(self, principal: Principal) -> ModelSpec | None:
        """Return the default model, or the first that the caller may use, or None."""
        visible = self.visible_to(principal)
        return next((spec for spec in visible if spec.id == self._default), visible[0] if visible else None)

    def visible_to(self, principal: Principal) -> list[ModelSpec]:
        """Return the models that the caller may use, in configured order."""
        return [spec for spec in self._specs.values() if principal.may_use(spec.id)]
