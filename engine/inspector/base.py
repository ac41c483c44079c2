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
"""Names that families of models have for the same thing in config.json."""


@dataclass(frozen=True, slots=True)
class Source:
    """What an engine serves: the settings that say which checkpoint, and with how long a context."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    max_model_len: int | None = None
    """None takes the checkpoint's own."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A checkpoint's measures, out of its config.json: nothing is loaded for them."""

    path: str
    layers: int
    heads: int
    max_model_len: int
    trust_remote_code: bool = False

    def check(self, layer: int, head: int | None = None) -> None:
        """Raise InvalidRequest on a layer or head that is not there."""
        for param, value, count, what in (
            ("trace_layer", layer, self.layers, "layers"),
            ("head", head, self.heads, "heads"),
        ):
            if value is not None and not 0 <= value < count:
                raise InvalidRequest(f"'{param}' must be from 0 to {count - 1}: the model has {count} {what}.", param)


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectionRequest:
    """What to run and what to show of it. `messages` are in OpenAI's form, text only."""

    messages: list[dict[str, str]]
    trace_layer: int
    head: int | None = None
    """For the matrix."""
    max_new_tokens: int = 256
    temperature: float = 0.9
    """0 takes the best token."""
    top_k: int | None = 50
    """Exactly so many tokens may be drawn; None means all."""
    seed: int = 42


@dataclass(frozen=True, slots=True)
class InspectedToken:
    """One token: JSON documents, as they are sent.

    `token` has step, token_id and token_text; `trace` has step, entropy (nats), topk (ten of token_id, token_text and
    prob) and attn (heads, tokens so far).
    """

    token: bytes
    trace: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """What was generated, without the tokens or tags that ended it."""

    text: str


class Inspector(Protocol):
    """Shows how a checkpoint comes to its tokens. Checkpoints go by the names of the engines that serve them."""

    def shape(self, engine: str) -> Shape:
        """Return the measures of an engine's checkpoint. Raises InvalidRequest where it can't be inspected, and
        EngineUnavailable while it is not on this machine."""

    def trace(self, engine: str, request: InspectionRequest) -> AsyncGenerator[InspectedToken | Reply, None]:
        """Yield a step for each generated token, and the reply at last.

        Closing or cancelling the generator ends the work within a step. Raises InvalidRequest, with the code
        "prompt_too_large" for one that is longer than may be, and EngineError.
        """

    async def attention(self, engine: str, request: InspectionRequest) -> bytes:
        """Return the weights of one head over the prompt: a JSON document of layer, head, tokens (t) and attn (t, t).

        Raises what `trace` raises.
        """

    async def close(self) -> None:
        """End the process. Callers that wait for it get EngineUnavailable. Idempotent."""


def find_checkpoint(source: Source) -> str | None:
    """The path of a checkpoint on this machine, None if it has to be fetched."""
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
