"""The body of POST /v1/chat/completions: OpenAI's fields, and those of vLLM's that clients may safely set.

Raises BadRequest, which names the parameter.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from engine.base import GenerationRequest
from engine.messages import Message
from gateway.api.content import Content, check_images
from gateway.api.function_calling import NamedToolChoice, ToolCalls, ToolChoice, Tools, check_tool_choice
from gateway.api.generation_schema import CompletionFields
from gateway.api.sampling import accepts_sampling
from gateway.api.schema import Schema, parse_body
from gateway.api.shannon_options import ShannonOptions
from gateway.errors import BadRequest
from gateway.settings.config import DefaultSettings

_NULL: dict[str, Any] = {"type": "null"}
_TEXT: dict[str, Any] = {"items": {"properties": {"type": {"const": "text"}}}}


def _of_role(*roles: str, required: tuple[str, ...] = ("content",), **fields: Any) -> dict[str, Any]:
    """Return the JSON schema of messages of these roles."""
    properties = {
        "role": {"enum": roles},
        "content": _TEXT | {"not": _NULL},
        "tool_calls": _NULL,
        "tool_call_id": _NULL,
    }
    return {"properties": properties | fields, "required": required}


class ChatMessage(Schema):
    # The rules of `check_role`, for the OpenAPI document.
    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                _of_role("user", content={"not": _NULL}),
                _of_role("system", "developer"),
                _of_role("assistant", tool_calls={"maxItems": 0}),
                _of_role(
                    "assistant", required=("tool_calls",), content=_TEXT, tool_calls={"minItems": 1, "not": _NULL}
                ),
                _of_role("tool", required=("content", "tool_call_id"), tool_call_id={"type": "string"}),
            ]
        }
    )
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    """Text, or a list of parts. Optional only in an assistant message with tool calls."""
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: ToolCalls | None = None
    """Calls that the assistant made."""
    tool_call_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Id of the call whose result a tool message has."""

    def for_engine(self) -> Message:
        """Return the message as chat templates expect it; `developer` is OpenAI's newer name for `system`."""
        role = "system" if self.role == "developer" else self.role
        content: Any = self.content or ""  # checked by Content
        message: Message = {"role": role, "content": content}
        if self.name:
            message["name"] = self.name
        if self.tool_calls:
            calls: Any = self.tool_calls  # checked by ToolCalls
            message["tool_calls"] = calls
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        return message


Messages = Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=4096)]


@accepts_sampling("chat")
class ChatCompletionRequest(CompletionFields):
    shannon_options: ShannonOptions | None = None
    """For models with agents."""
    messages: Messages
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Tools | None = None
    """Functions that the model may call."""
    tool_choice: ToolChoice | None = None
    """`auto` when left out: the model decides."""
    parallel_tool_calls: bool | None = None
    """False limits an answer to one call."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    """How much a reasoning model should think, if its chat template supports it."""
    resumable: bool | None = None
    """Keep the stream for a while so that a client can resume it after a disconnect; the completion is then generated
    to its end without a client. The default is the server's setting for the key."""

    @model_validator(mode="after")
    def _fields_must_agree(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
        if self.resumable and not self.stream:
            raise BadRequest("'resumable' is only allowed with 'stream': true.", "resumable")
        try:
            check_tool_choice(self.tool_choice, self.tools)
        except ValueError as error:
            raise BadRequest(f"'tool_choice' {error}.", "tool_choice") from error
        for number, message in enumerate(self.messages):
            check_role(message, f"messages[{number}]")
        self._tool_messages_must_answer_calls()
        return self

    def _tool_messages_must_answer_calls(self) -> None:
        """Refuse results of unknown calls. Without assistant messages, the calls may be in the session's history."""
        made: set[str] = set()
        has_assistant = False
        for number, message in enumerate(self.messages):
            if message.role == "assistant":
                has_assistant = True
                made.update(call["id"] for call in message.tool_calls or ())
            elif message.role == "tool" and has_assistant and message.tool_call_id not in made:
                raise BadRequest(
                    "A 'tool' message must have the result of a tool call in an earlier 'assistant' message; "
                    f"no call has the id {message.tool_call_id!r}.",
                    f"messages[{number}].tool_call_id",
                )

    def for_engine(self, request_id: str, defaults: DefaultSettings) -> GenerationRequest:
        """Return the requested generation, with the model's defaults filled in."""
        return GenerationRequest(
            request_id=request_id,
            messages=[message.for_engine() for message in self.messages],
            logprobs=bool(self.logprobs),
            top_logprobs=self.top_logprobs or 0,
            tools=[tool.for_engine() for tool in self.tools] if self.tools else None,
            tool_choice=self._tool_choice_for_engine(),
            parallel_tool_calls=self.parallel_tool_calls if self.tools else None,
            reasoning_effort=self.reasoning_effort,
            **self.generation(defaults),
        )

    def _tool_choice_for_engine(self) -> str | dict[str, Any] | None:
        if not self.tools:
            return None
        return self.tool_choice.model_dump() if isinstance(self.tool_choice, NamedToolChoice) else self.tool_choice


def check_role(message: ChatMessage, where: str) -> None:
    """Raise BadRequest if a message has a field that its role does not allow, or lacks one that it requires."""
    if message.tool_calls and message.role != "assistant":
        raise BadRequest(f"'{where}.tool_calls' is only allowed in 'assistant' messages.", f"{where}.tool_calls")
    if message.role == "tool" and message.tool_call_id is None:
        raise BadRequest(f"A 'tool' message requires '{where}.tool_call_id'.", f"{where}.tool_call_id")
    if message.tool_call_id is not None and message.role != "tool":
        raise BadRequest(f"'{where}.tool_call_id' is only allowed in 'tool' messages.", f"{where}.tool_call_id")
    check_images(message.content, message.role, f"{where}.content")
    if message.content is None and not message.tool_calls:
        raise BadRequest(f"Missing required parameter: '{where}.content'.", f"{where}.content")


def parse_chat_request(body: bytes, stream_query: str | None) -> ChatCompletionRequest:
    """Parse and validate a body. `stream_query` is the query parameter `stream`, which is the same as the field."""
    if stream_query is not None and stream_query.lower() not in ("true", "false", "1", "0"):
        raise BadRequest(f"'stream' in the query must be true or false, not {stream_query[:32]!r}.", "stream")
    streamed = stream_query is not None and stream_query.lower() in ("true", "1")
    return parse_body(ChatCompletionRequest, body, **({"stream": True} if streamed else {}))
