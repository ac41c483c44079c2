"""The inspector protocol, and the values that cross it.

vLLM keeps its attention weights to itself, so the checkpoint that an engine serves is run a second time, elsewhere
(`engine.inspector.transformers_inspector`). Here is where that checkpoint lies and what it measures, which needs
nothing loaded. Does not handle images and tools. Raises EngineError.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson

from engine.base import InvalidRequest

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""Names of the same field in config.json, by model family."""


@dataclass(frozen=True, slots=True)
class Source:
    """The checkpoint of an engine and its context length, from the settings."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    max_model_len: int | None = None
    """None means the checkpoint's."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A checkpoint's dimensions, from its config.json."""

    path: str
    layers: int
    heads: int
    max_model_len: int
    trust_remote_code: bool = False

    def check(self, layer: int, head: int | None = None) -> None:
        """Raise InvalidRequest for a layer or head out of range."""
        for param, value, count, what in (
            ("trace_layer", layer, self.layers, "layers"),
            ("head", head, self.heads, "heads"),
        ):
            if value is not None and not 0 <= value < count:
                raise InvalidRequest(f"'{param}' must be from 0 to {count - 1}: the model has {count} {what}.", param)


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectionRequest:
    """The messages to run, text only, and the layer and head to show."""

    messages: list[dict[str, str]]
    trace_layer: int
    head: int | None = None
    """Head of the matrix."""
    max_new_tokens: int = 256
    temperature: float = 0.9
    """0 means greedy."""
    top_k: int | None = 50
    """Exactly this many tokens are candidates; None means all."""
    seed: int = 42


@dataclass(frozen=True, slots=True)
class InspectedToken:
    """One token as JSON documents, in the format for clients.

    `token` has step, token_id and token_text; `trace` has step, entropy (nats), topk (ten of token_id, token_text and
    prob) and attn (heads, tokens so far).
    """

    token: bytes
    trace: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """The generated text, without the tokens or tags that ended it."""

    text: str


class Inspector(Protocol):
    """Shows the attention and token distributions of a checkpoint, which is named by its engine."""

    def shape(self, engine: str) -> Shape:
        """Return the dimensions of an engine's checkpoint.

        Raises InvalidRequest if it can't be inspected, and EngineUnavailable while it is not on this machine.
        """

    def trace(self, engine: str, request: InspectionRequest) -> AsyncGenerator[InspectedToken | Reply, None]:
        """Yield a step for each generated token, then the reply.

        Closing or cancelling the generator ends the work within a step. Raises InvalidRequest, with the code
        "prompt_too_large" for a prompt that is too long, and EngineError.
        """

    async def attention(self, engine: str, request: InspectionRequest) -> bytes:
        """Return the weights of one head over the prompt: a JSON document of layer, head, tokens (t) and attn (t, t).

        Raises what `trace` raises.
        """

    async def close(self) -> None:
        """End the process. Pending calls raise EngineUnavailable. Idempotent."""


def find_checkpoint(source: Source) -> str | None:
    """Return the path of a checkpoint on this machine, None if it has not been downloaded."""
    from engine.local.async_llm import local_path

    found = local_path(source.model, source.revision)
    if found is None:  # perhaps vLLM has fetched it, which leaves no manifest
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        with contextlib.suppress(HFValidationError):
            config = try_to_load_from_cache(source.model, "config.json", revision=source.revision)
            found = str(Path(config).parent) if isinstance(config, str) else None
    return found


def read_shape(path: str, source: Source) -> Shape:
    """Return the measures of the checkpoint at `path`. Raises InvalidRequest if they are missing."""
    try:
        config = orjson.loads((Path(path) / "config.json").read_bytes())
        config = config.get("text_config") or config.get("llm_config") or config
        layers, heads, own = (int(_first(config, names) or 0) for names in (_LAYERS, _HEADS, _LENGTHS))
    except (OSError, ValueError, TypeError, AttributeError):
        layers = heads = own = 0
    length = min(filter(None, (own, source.max_model_len)), default=0)
    if not (layers and heads and length):
        raise InvalidRequest(
            "This model can't be inspected: its config.json does not have its layers, heads and context length.",
            "model",
            "model_not_supported",
        )
    return Shape(path, layers, heads, length, source.trust_remote_code)


def _first(config: dict[str, Any], names: Sequence[str]) -> Any:
    return next((config[name] for name in names if name in config), None)
