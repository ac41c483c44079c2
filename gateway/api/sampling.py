"""What all requests that generate have in common: sampling parameters, constraints on the text, streaming.

Types are strict, ranges are the engine's, and every size is bounded. Fields that only the server may set are refused
by name. Other unknown fields are ignored, as vLLM does: SDKs add new ones faster than servers learn them.
Fails with BadRequest, which names the parameter.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gateway.api.function_calling import JsonSchemaObject, Schema, max_entries
from gateway.errors import BadRequest, from_validation
from gateway.exchange.json_parser import load
from gateway.settings.config import DefaultSettings

MAX_CHOICES = 16
MAX_BIASES = 1024
MAX_REGEX_LENGTH = 4096
"""Characters. A regular expression is compiled to an automaton before it runs."""

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

Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(Schema):
    include_usage: bool | None = None
    """Send one more frame with the usage before [DONE]."""


class JsonSchema(Schema):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: JsonSchemaObject = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Schema):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_must_fit(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is required with type 'json_schema'")
        return self


class StructuredOutputs(Schema):
    """vLLM's constraints on the text; exactly one."""

    # The same in the words of the OpenAPI document.
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
    def _must_be_one(self) -> StructuredOutputs:
        if len(self.for_engine()) != 1:
            raise ValueError("exactly one of json, regex, choice and grammar is required")
        return self

    def for_engine(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True, exclude_none=True)


class SamplingFields(Schema):
    model: Annotated[str, Field(max_length=256)] | None = None
    """Model id; the server's default when left out."""
    stream: bool | None = None
    """Send server-sent events."""
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """OpenAI's newer name for `max_tokens`; wins where both are given."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    """-1 and 0 mean all tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Int64 | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_BIASES),
            max_entries(MAX_BIASES),
        ]
        | None
    ) = None
    """Token id to bias."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    """vLLM's way to constrain the text: a JSON schema, a regular expression, a choice or a grammar."""
    user: Annotated[str, Field(max_length=512)] | None = None
    """Accepted for compatibility; the API key identifies the caller."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in data.keys() & _SERVER_OWNED:
                raise BadRequest(f"'{name}' is set by the server and can't be sent by clients. Leave it out.", name)
            for name in data.keys() & _NOT_OFFERED.keys():
                if data[name]:
                    raise BadRequest(f"This server does not offer {_NOT_OFFERED[name]}. Leave '{name}' out.", name)
        return data

    @field_validator("stop")
    @classmethod
    def _stop_as_list(cls, stop: str | list[str] | None) -> list[str] | None:
        return [stop] if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _sampling_must_agree(self) -> SamplingFields:
        if self.min_tokens and self.limit is not None and self.min_tokens > self.limit:
            raise BadRequest("'min_tokens' can't be greater than 'max_tokens'.", "min_tokens")
        if self.structured_outputs and self.response_format and self.response_format.type != "text":
            raise BadRequest("Send 'structured_outputs' or 'response_format', not both.", "structured_outputs")
        if self.stream_options and not self.stream:
            raise BadRequest("'stream_options' is only allowed with 'stream': true.", "stream_options")
        return self

    @property
    def limit(self) -> int | None:
        """The client's own bound on completion tokens."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, defaults: DefaultSettings) -> dict[str, Any]:
        """Return these fields as those of a GenerationRequest, with the model's defaults filled in."""
        response_format = None
        if self.response_format is not None:
            response_format = self.response_format.model_dump(by_alias=True, exclude_none=True)
        return {
            "stream": bool(self.stream),
            "max_tokens": self.limit,
            "max_tokens_param": "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens",
            "default_max_tokens": defaults.max_tokens,
            "n": self.n or 1,
            "temperature": self.temperature if self.temperature is not None else defaults.temperature,
            "top_p": self.top_p if self.top_p is not None else defaults.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "stop": list(self.stop or ()),
            "stop_token_ids": self.stop_token_ids or [],
            "ignore_eos": bool(self.ignore_eos),
            "min_tokens": self.min_tokens or 0,
            "logit_bias": self.logit_bias,
            "response_format": response_format,
            "structured_outputs": self.structured_outputs.for_engine() if self.structured_outputs else None,
        }


Body = TypeVar("Body", bound=BaseModel)


def parse_body(schema: type[Body], body: bytes, **more: Any) -> Body:
    """Parse and check a request's body; `more` stands over its fields. Raises BadRequest.

    The time is linear in the body's length, and the memory at most ten times of it. Of several faults the first is
    told: lists are read to the first, and dicts have few entries.
    """
    data = load(body)
    if not isinstance(data, dict):
        raise BadRequest("The request body must be a JSON object.")
    data |= more
    try:
        return schema.model_validate(data, strict=True)
    except ValidationError as error:
        raise from_validation(error, data) from error
