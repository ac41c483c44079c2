"""`shannon_options`: what a request may change about the workflow behind its model, within what the server allows."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from gateway.access.catalog import ModelSpec
from gateway.api.schema import Schema, check_depth, json_bytes
from gateway.errors import BadRequest
from gateway.tools.base import Toolbox

MAX_CONTEXT_BYTES = 16_384
_STRATEGIES = ("quick", "standard", "deep", "academic")
"""Lightest first."""


def _check_size(context: dict[str, Any]) -> dict[str, Any]:
    if json_bytes(context) > MAX_CONTEXT_BYTES:
        raise ValueError(f"must be at most {MAX_CONTEXT_BYTES} bytes long")
    return check_depth(context)


class ShannonOptions(Schema):
    research_strategy: Literal["quick", "standard", "deep", "academic"] | None = None
    """For research models: a lighter strategy than the model's own."""
    max_iterations: Annotated[int, Field(ge=0, le=3)] | None = None
    """For research models: rounds of gap filling at most."""
    tools: Annotated[list[Annotated[str, Field(max_length=128)]], Field(max_length=64)] | None = None
    """Tools that agents may call, out of those of the model; all of them when left out, none when empty."""
    context: (
        Annotated[str, Field(max_length=MAX_CONTEXT_BYTES)]
        | Annotated[dict[str, Any], AfterValidator(_check_size)]
        | None
    ) = None
    """More to go by, for the agents as well as for the answer: text, or any JSON object."""

    def check(self, model: ModelSpec, tools: Toolbox) -> None:
        """Raise BadRequest unless `model` can do what is asked for."""
        workflow = model.settings.workflow
        given = self.model_dump(exclude_none=True)
        if workflow == "chat" and given:
            raise BadRequest(f"'shannon_options' is for models with agents; {model.id!r} has none.", "shannon_options")
        own = workflow.removesuffix("_research")
        for name in ("research_strategy", "max_iterations"):
            if name in given and own not in _STRATEGIES:
                raise BadRequest(f"'{name}' is for research models.", f"shannon_options.{name}")
        if self.research_strategy and _STRATEGIES.index(self.research_strategy) > _STRATEGIES.index(own):
            raise BadRequest(
                f"{model.id!r} allows strategies up to {own!r}. Ask a more thorough model for "
                f"{self.research_strategy!r}.",
                "shannon_options.research_strategy",
            )
        for name in self.tools or ():
            if name not in tools:
                known = ", ".join(tools.names) or "none"
                raise BadRequest(f"There is no tool {name!r}. The tools are: {known}.", "shannon_options.tools")
