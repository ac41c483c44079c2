"""The body of POST /v1/chat/completions: OpenAI's fields, plus vLLM's that are safe in a client's hands.

Types are strict, ranges are the engine's, and every size is bounded. Fields that only the server may set are refused
by name. Other unknown fields are ignored, as vLLM does: SDKs add new ones faster than servers learn them.
Fails with BadRequest, which names the parameter.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from engine.base import GenerationRequest
from gateway.config import DefaultSettings
from gateway.errors import BadRequest, from_validation

MAX_CHOICES = 16
MAX_SCHEMA_BYTES = 32_768
"""A JSON schema is compiled to a grammar before it runs; larger ones take seconds of the engine's time."""
MAX_SCHEMA_DEPTH = 64
"""Compilers of grammars recurse; a deep schema must not be able to overflow the engine's stack."""

_SERVER_OWNED = frozenset(
    {
        *("priority", "cache_salt", "request_id", "session_id", "kv_transfer_params", "ec_transfer_params"),
        *("chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "documents"),
        *("mm_processor_kwargs", "media_io_kwargs", "vllm_xargs", "truncate_prompt_tokens", "use_beam_search"),
        *("best_of", "prompt_logprobs", "logprob_token_ids"),
    }
)
_NOT_OFFERED = {
    "tools": "function calling",
    "functions": "function calling",
    "audio": "audio output",
    "web_search_options": "web search",
}

Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]


class _Schema(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", use_attribute_docstrings=True)


class TextPart(_Schema):
    type: Literal["text"]
    text: str


class ChatMessage(_Schema):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=1024)]
    """Text, or a list of text parts."""
    name: Annotated[str, Field(max_length=256)] | None = None

    def for_engine(self) -> dict[str, Any]:
        """Return the message as chat templates know it; `developer` is OpenAI's newer word for `system`."""
        role = "system" if self.role == "developer" else self.role
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": role, "content": content} | ({"name": self.name} if self.name else {})


class StreamOptions(_Schema):
    include_usage: bool | None = None
    """Send one more frame with the usage before [DONE]."""


class JsonSchema(_Schema):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Schema):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_must_fit(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is required with type 'json_schema'")
        if self.json_schema is not None:
            if not _is_shallow(self.json_schema.schema_, MAX_SCHEMA_DEPTH):
                raise ValueError(f"the schema must be nested at most {MAX_SCHEMA_DEPTH} levels deep")
            if len(orjson.dumps(self.json_schema.schema_)) > MAX_SCHEMA_BYTES:
                raise ValueError(f"the schema must be at most {MAX_SCHEMA_BYTES} bytes long")
        return self


def _is_shallow(value: Any, depth: int) -> bool:
    if not isinstance(value, (dict, list)):
        return True
    children = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_is_shallow(child, depth - 1) for child in children)


class ChatCompletionRequest(_Schema):
    model: Annotated[str, Field(max_length=256)] | None = None
    """Model id; `shannon-chat` when left out."""
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    stream: bool | None = None
    """Send server-sent events. `?stream=true` in the query means the same."""
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
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=1024),
        ]
        | None
    ) = None
    """Token id to bias."""
    response_format: ResponseFormat | None = None
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
    def _fields_must_agree(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
        if self.min_tokens and self.limit is not None and self.min_tokens > self.limit:
            raise BadRequest("'min_tokens' can't be greater than 'max_tokens'.", "min_tokens")
        return self

    @property
    def limit(self) -> int | None:
        """The client's own bound on completion tokens."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def for_engine(self, request_id: str, defaults: DefaultSettings) -> GenerationRequest:
        """Return the generation that this body asks for, with the model's defaults filled in."""
        response_format = None
        if self.response_format is not None:
            response_format = self.response_format.model_dump(by_alias=True, exclude_none=True)
        return GenerationRequest(
            request_id=request_id,
            messages=[message.for_engine() for message in self.messages],
            stream=bool(self.stream),
            max_tokens=self.limit,
            max_tokens_param="max_tokens" if self.max_completion_tokens is None else "max_completion_tokens",
            default_max_tokens=defaults.max_tokens,
            n=self.n or 1,
            temperature=self.temperature if self.temperature is not None else defaults.temperature,
            top_p=self.top_p if self.top_p is not None else defaults.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=list(self.stop or ()),
            stop_token_ids=self.stop_token_ids or [],
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
            logprobs=bool(self.logprobs),
            top_logprobs=self.top_logprobs or 0,
            logit_bias=self.logit_bias,
            response_format=response_format,
        )


def parse_chat_request(body: bytes, stream_query: str | None) -> ChatCompletionRequest:
    """Parse and check a request body. `stream_query` is the query's `stream`, which means the same as the body's."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"The request body is not valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise BadRequest("The request body must be a JSON object.")
    if stream_query is not None:
        if stream_query.lower() not in ("true", "false", "1", "0"):
            raise BadRequest(f"'stream' in the query must be true or false, not {stream_query[:32]!r}.", "stream")
        if stream_query.lower() in ("true", "1"):
            data["stream"] = True
    try:
        request = ChatCompletionRequest.model_validate(data)
    except ValidationError as error:
        raise from_validation(error, data) from error
    if request.stream_options and not request.stream:
        raise BadRequest("'stream_options' is only allowed with 'stream': true.", "stream_options")
    return request
