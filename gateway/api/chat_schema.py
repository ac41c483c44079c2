"""The body of POST /v1/chat/completions: OpenAI's fields, plus vLLM's that are safe in a client's hands.

Fails with BadRequest, which names the parameter.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from engine.base import GenerationRequest
from gateway.api.content import Content, check_images
from gateway.api.function_calling import NamedToolChoice, Schema, ToolCalls, ToolChoice, Tools, check_tool_choice
from gateway.api.sampling import SamplingFields, parse_body
from gateway.api.shannon_options import ShannonOptions
from gateway.errors import BadRequest
from gateway.settings.config import DefaultSettings

_NULL: dict[str, Any] = {"type": "null"}
_TEXT: dict[str, Any] = {"items": {"properties": {"type": {"const": "text"}}}}


def _of_role(*roles: str, required: tuple[str, ...] = ("content",), **fields: Any) -> dict[str, Any]:
    """Return what a message of such a role must be, in JSON schema."""
    properties = {
        "role": {"enum": roles},
        "content": _TEXT | {"not": _NULL},
        "tool_calls": _NULL,
        "tool_call_id": _NULL,
    }
    return {"properties": properties | fields, "required": required}


class ChatMessage(Schema):
    # What `check_role` asks for, in the words of the OpenAPI document.
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
    """Text, or a list of parts. Only an assistant's message with tool calls may go without."""
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: ToolCalls | None = None
    """What an assistant called."""
    tool_call_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """The call that a tool's message answers."""

    def for_engine(self) -> dict[str, Any]:
        """Return the message as chat templates know it; `developer` is OpenAI's newer word for `system`."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.content or ""}
        if self.name:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        return message


Messages = Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=4096)]


class ChatCompletionRequest(SamplingFields):
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
    """False allows one call per answer at most."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    """How much a reasoning model should think, where its chat template knows."""
    resumable: bool | None = None
    """Keep the stream for a while, so that it can be taken up again after it was cut; the completion is then made to
    its end even while nobody is there. The server's setting for the key when left out."""

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
        """Refuse results of calls that were never made. A request without assistant turns may rely on its session."""
        made: set[str] = set()
        assistant_spoke = False
        for number, message in enumerate(self.messages):
            if message.role == "assistant":
                assistant_spoke = True
                made.update(call["id"] for call in message.tool_calls or ())
            elif message.role == "tool" and assistant_spoke and message.tool_call_id not in made:
                raise BadRequest(
                    "A message of role 'tool' must answer one of the tool_calls of an assistant's message before it; "
                    f"none has the id {message.tool_call_id!r}.",
                    f"messages[{number}].tool_call_id",
                )

    def for_engine(self, request_id: str, defaults: DefaultSettings) -> GenerationRequest:
        """Return the generation that this body asks for, with the model's defaults filled in."""
        return GenerationRequest(
            request_id=request_id,
            messages=[message.for_engine() for message in self.messages],
            logprobs=bool(self.logprobs),
            top_logprobs=self.top_logprobs or 0,
            tools=[tool.for_engine() for tool in self.tools] if self.tools else None,
            tool_choice=self._tool_choice_for_engine(),
            parallel_tool_calls=self.parallel_tool_calls if self.tools else None,
            reasoning_effort=self.reasoning_effort,
            **self.sampling(defaults),
        )

    def _tool_choice_for_engine(self) -> str | dict[str, Any] | None:
        if not self.tools:
            return None
        return self.tool_choice.model_dump() if isinstance(self.tool_choice, NamedToolChoice) else self.tool_choice


def check_role(message: ChatMessage, where: str) -> None:
    """Raise BadRequest where a message has what its role may not have, or lacks what it must."""
    if message.tool_calls and message.role != "assistant":
        raise BadRequest(f"Only a message of role 'assistant' may have '{where}.tool_calls'.", f"{where}.tool_calls")
    if message.role == "tool" and message.tool_call_id is None:
        raise BadRequest(f"A message of role 'tool' needs '{where}.tool_call_id'.", f"{where}.tool_call_id")
    if message.tool_call_id is not None and message.role != "tool":
        raise BadRequest(f"Only a message of role 'tool' may have '{where}.tool_call_id'.", f"{where}.tool_call_id")
    check_images(message.content, message.role, f"{where}.content")
    if message.content is None and not message.tool_calls:
        raise BadRequest(f"Missing required parameter: '{where}.content'.", f"{where}.content")


def parse_chat_request(body: bytes, stream_query: str | None) -> ChatCompletionRequest:
    """Parse and check a request body. `stream_query` is the query's `stream`, which means the same as the body's."""
    if stream_query is not None and stream_query.lower() not in ("true", "false", "1", "0"):
        raise BadRequest(f"'stream' in the query must be true or false, not {stream_query[:32]!r}.", "stream")
    streamed = stream_query is not None and stream_query.lower() in ("true", "1")
    return parse_body(ChatCompletionRequest, body, **({"stream": True} if streamed else {}))
