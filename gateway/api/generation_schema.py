"""Fields that the bodies of chat completions, completions and responses have in common.

Fields that only the server may set are refused by name. Raises BadRequest, which names the parameter.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from engine.sampling import MAX_INT32
from gateway.api.sampling import SamplingSchema
from gateway.api.schema import Schema
from gateway.api.structured_outputs import ResponseFormat, StructuredOutputs
from gateway.errors import BadRequest
from gateway.settings.config import DefaultSettings

_SERVER_OWNED = frozenset(
    {
        *("priority", "cache_salt", "request_id", "session_id", "kv_transfer_params", "ec_transfer_params"),
        *("chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "documents"),
        *("mm_processor_kwargs", "media_io_kwargs", "vllm_xargs", "truncate_prompt_tokens", "use_beam_search"),
        *("best_of", "prompt_logprobs", "logprob_token_ids"),
    }
)
_NOT_OFFERED = {
    "functions": "the old form of function calling; send 'tools'",
    "function_call": "the old form of function calling; send 'tool_choice'",
    "audio": "audio output",
    "web_search_options": "web search",
}

MaxTokens = Annotated[int, Field(ge=1, le=MAX_INT32)]
ModelId = Annotated[str, Field(max_length=256)]


class StreamOptions(Schema):
    include_usage: bool | None = None
    """Send one more frame with the usage before [DONE]."""


class GenerationFields(SamplingSchema):
    """Base of the three schemas."""

    model: ModelId | None = None
    """Model id; the server's default when left out."""
    stream: bool | None = None
    """Send server-sent events."""
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    """vLLM's constraint on the text: a JSON schema, a regular expression, a choice or a grammar."""
    user: Annotated[str, Field(max_length=512)] | None = None
    """Accepted for compatibility; the API key identifies the caller."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in data.keys() & _SERVER_OWNED:
                raise BadRequest(f"'{name}' is set by the server and can't be sent by clients. Leave it out.", name)
            refuse_not_offered(data, _NOT_OFFERED)
        return data

    @model_validator(mode="after")
    def _check_limits(self) -> GenerationFields:
        min_tokens = self.sampling().get("min_tokens", 0)
        if self.limit is not None and min_tokens > self.limit:
            raise BadRequest("'min_tokens' can't be greater than 'max_tokens'.", "min_tokens")
        if self.stream_options and not self.stream:
            raise BadRequest("'stream_options' is only allowed with 'stream': true.", "stream_options")
        return self

    @property
    def limit(self) -> int | None:
        """The client's own limit on completion tokens."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def generation(self, defaults: DefaultSettings) -> dict[str, Any]:
        """Return these fields as those of a GenerationRequest, with the model's defaults filled in."""
        return self.sampling(defaults) | {
            "stream": bool(self.stream),
            "max_tokens": self.limit,
            "default_max_tokens": defaults.max_tokens,
            "structured_outputs": self.structured_outputs.for_engine() if self.structured_outputs else None,
        }


class CompletionFields(GenerationFields):
    """What chat completions and completions have in common, but not responses."""

    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    """OpenAI's newer name for `max_tokens`; takes precedence if both are given."""
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _check_constraints(self) -> CompletionFields:
        if self.structured_outputs and self.response_format and self.response_format.type != "text":
            raise BadRequest("Send 'structured_outputs' or 'response_format', not both.", "structured_outputs")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def generation(self, defaults: DefaultSettings) -> dict[str, Any]:
        return super().generation(defaults) | {
            "max_tokens_param": "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens",
            "response_format": self.response_format.for_engine() if self.response_format else None,
        }


def refuse_not_offered(data: Any, not_offered: dict[str, str]) -> None:
    """Raise BadRequest for a field of `not_offered`, which has a description per name, unless its value is falsy."""
    for name, what in not_offered.items():
        if isinstance(data, dict) and data.get(name):
            raise BadRequest(f"This server does not offer {what}. Leave '{name}' out.", name)
