"""The bodies of POST /v1/messages and its count_tokens: Anthropic's fields, and how they become a generation.

Earlier thoughts are dropped: chat templates leave them out themselves. System texts, also those between the messages,
lead the conversation as one. Does not handle files, citations, and tools that Anthropic runs itself. Raises
BadRequest, which names the parameter.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import Field, model_validator

from engine.base import GenerationRequest
from engine.messages import Message, Part, ToolCall, images_of, texts_of
from gateway.api.function_calling import (
    MAX_TOOLS,
    FunctionDefinition,
    FunctionName,
    NamedFunction,
    NamedToolChoice,
    Tool,
    ToolChoice,
    check_together,
    check_tool_choice,
)
from gateway.api.generation_schema import MaxTokens, refuse_not_offered
from gateway.api.sampling import SamplingSchema, accepts_sampling
from gateway.api.schema import JsonObject, Plain, Schema
from gateway.api.shannon_options import ShannonOptions
from gateway.api.structured_outputs import JsonSchemaObject
from gateway.errors import BadRequest
from gateway.settings.config import DefaultSettings

_NOT_OFFERED = {
    "mcp_servers": "MCP servers",
    "container": "containers",
    "context_management": "context management",
}
_CHANGING_HEADER = "x-anthropic-billing-header"
"""A system block of Claude Code's that differs from request to request: at the head of a prompt, it would keep every
cached prefix from being found again."""


class ImageSource(Schema):
    type: Literal["base64", "url"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"] | None = None
    data: str | None = None
    url: str | None = None

    @model_validator(mode="after")
    def _must_hold_what_it_says(self) -> ImageSource:
        if self.type == "base64" and (self.media_type is None or self.data is None):
            raise ValueError("media_type and data are required with type 'base64'")
        if self.type == "url" and self.url is None:
            raise ValueError("url is required with type 'url'")
        return self


class ResultBlock(Schema):
    """What a tool's result may hold."""

    type: Literal["text", "image"]
    text: str | None = None
    source: ImageSource | None = None

    @model_validator(mode="after")
    def _must_be_whole(self) -> ResultBlock:
        name = "source" if self.type == "image" else "text"
        if getattr(self, name) is None:
            raise ValueError(f"{name} is required with type '{self.type}'")
        return self


class Block(Schema):
    type: Literal["text", "image", "tool_use", "tool_result", "thinking", "redacted_thinking"]
    text: str | None = None
    source: ImageSource | None = None
    id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    name: FunctionName | None = None
    input: JsonObject | None = None
    tool_use_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    content: str | Annotated[list[dict[str, Any]], Plain(ResultBlock, max_length=1024)] | None = None
    """What a tool returned."""
    is_error: bool | None = None

    @model_validator(mode="after")
    def _must_be_whole(self) -> Block:
        needed = {
            "text": ("text",),
            "image": ("source",),
            "tool_use": ("id", "name", "input"),
            "tool_result": ("tool_use_id",),
        }
        for name in needed.get(self.type, ()):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is required with type '{self.type}'")
        return self


ParsedBlock = dict[str, Any]
"""With the fields of Block or ResultBlock, as they were parsed."""


class InputMessage(Schema):
    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[ParsedBlock], Plain(Block, max_length=1024)]

    @property
    def blocks(self) -> list[ParsedBlock]:
        return [{"type": "text", "text": self.content}] if isinstance(self.content, str) else self.content

    @property
    def text(self) -> str:
        return "".join(block.get("text") or "" for block in self.blocks)

    def check(self, where: str) -> None:
        """Raise BadRequest on a block that this role may not have."""
        allowed: dict[str, tuple[str, ...]] = {
            "user": ("text", "image", "tool_result"),
            "assistant": ("text", "tool_use", "thinking", "redacted_thinking"),
            "system": ("text",),
        }
        for number, block in enumerate(self.blocks):
            if block["type"] not in allowed[self.role]:
                place = f"{where}.content[{number}].type"
                raise BadRequest(
                    f"A message of role '{self.role}' can't have a block of type '{block['type']}'.", place
                )

    def for_engine(self) -> list[Message]:
        """Return the message as those that chat templates know."""
        return self._said() if self.role == "assistant" else self._asked()

    def _said(self) -> list[Message]:
        calls = [_call(block) for block in self.blocks if block["type"] == "tool_use"]
        message: Message = {"role": "assistant", "content": self.text or (None if calls else "")}
        if calls:
            message["tool_calls"] = calls
        return [message]

    def _asked(self) -> list[Message]:
        """Return results of tools first, then what the user says. Images in results go with the latter: templates
        know them in no other place."""
        results: list[Message] = []
        parts: list[Part] = []
        for block in self.blocks:
            if block["type"] != "tool_result":
                parts.append(_part(block))
                continue
            content, returned = block.get("content"), _returned(block)
            text = content if isinstance(content, str) else "".join(one.get("text") or "" for one in returned)
            results.append({"role": "tool", "tool_call_id": block["tool_use_id"], "content": text})
            parts += [_part(one) for one in returned if one["type"] == "image"]
        if not parts:
            return results
        said: Message = {"role": "user", "content": parts}
        if next(images_of([said]), None) is None:
            said = {"role": "user", "content": "".join(texts_of(said))}
        return [*results, said]


class SystemBlock(Schema):
    type: Literal["text"]
    text: str


class MessagesTool(Schema):
    type: Literal["custom"] | None = None
    """Tools that Anthropic runs itself are not offered."""
    name: FunctionName
    description: Annotated[str, Field(max_length=8192)] | None = None
    input_schema: JsonSchemaObject
    strict: bool | None = None

    def tool(self) -> Tool:
        """Return the tool in the chat protocol's form."""
        function = FunctionDefinition(
            name=self.name, description=self.description, parameters=self.input_schema, strict=self.strict
        )
        return Tool(type="function", function=function)


class MessagesToolChoice(Schema):
    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Schema):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    """Accepted for compatibility; models without a notion of a budget can't keep to one."""


class OutputFormat(Schema):
    type: Literal["json_schema"]
    schema_: JsonSchemaObject = Field(alias="schema")


class OutputConfig(Schema):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountTokensRequest(Schema):
    model: Annotated[str, Field(max_length=256)] | None = None
    """Model id; the server's default when left out."""
    messages: Annotated[list[InputMessage], Field(fail_fast=True, min_length=1, max_length=4096)]
    system: str | Annotated[list[ParsedBlock], Plain(SystemBlock)] | None = None
    tools: Annotated[list[MessagesTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    @model_validator(mode="after")
    def _messages_must_be_whole(self) -> CountTokensRequest:
        for number, message in enumerate(self.messages):
            message.check(f"messages[{number}]")
        try:
            check_together((tool.name, tool.tool().for_engine()) for tool in self.tools or ())
            check_tool_choice(self._tool_choice, self._tools)
        except ValueError as error:
            raise BadRequest(f"Invalid value for 'tools' or 'tool_choice': {error}.", "tools") from error
        if self.messages[-1].role == "assistant":
            raise BadRequest("The conversation must end with a message of role 'user'.", "messages")
        return self

    @property
    def image_places(self) -> list[str]:
        """Where each image stands, in the client's words and in the order in which messages hold them."""
        places: list[str] = []
        for number, message in enumerate(self.messages):
            for block_number, block in enumerate(message.blocks):
                where = f"messages[{number}].content[{block_number}]"
                if block["type"] == "image":
                    places.append(f"{where}.source")
                for n, one in enumerate(_returned(block)):
                    if one["type"] == "image":
                        places.append(f"{where}.content[{n}].source")
        return places

    @property
    def _tools(self) -> list[Tool]:
        return [tool.tool() for tool in self.tools or ()]

    @property
    def _tool_choice(self) -> ToolChoice | None:
        choice = self.tool_choice
        if choice is None or choice.type in ("auto", "none"):
            return "none" if choice is not None and choice.type == "none" else None
        if choice.type == "any":
            return "required"
        if choice.name is None:
            raise ValueError("tool_choice.name is required with type 'tool'")
        return NamedToolChoice(type="function", function=NamedFunction(name=choice.name))

    def for_engine(self, request_id: str) -> GenerationRequest:
        """Return the conversation as a generation without sampling parameters.

        It takes the messages apart: what was parsed and what is made of it never exist both as a whole.
        """
        choice = self._tool_choice if self.tools else None
        return GenerationRequest(
            request_id=request_id,
            messages=self._conversation(),
            tools=[tool.for_engine() for tool in self._tools] or None,
            tool_choice=choice.model_dump() if isinstance(choice, NamedToolChoice) else choice,
            parallel_tool_calls=False if self.tools and self._wants_one_call else None,
            reasoning_effort=self._reasoning_effort,
        )

    @property
    def _reasoning_effort(self) -> str | None:
        if self.thinking is not None and self.thinking.type == "disabled":
            return "none"
        effort = self.output_config.effort if self.output_config else None
        return "xhigh" if effort == "max" else effort

    @property
    def _wants_one_call(self) -> bool:
        return bool(self.tool_choice and self.tool_choice.disable_parallel_tool_use)

    def _conversation(self) -> list[Message]:
        blocks = [self.system] if isinstance(self.system, str) else [block["text"] for block in self.system or ()]
        texts = [text for text in blocks if text and not text.startswith(_CHANGING_HEADER)]
        texts += [message.text for message in self.messages if message.role == "system"]
        system: list[Message] = [{"role": "system", "content": "\n\n".join(texts)}] if texts else []
        made: list[Message] = []
        for message in self.messages:
            if message.role != "system":
                made += message.for_engine()
            message.content = ""
        return system + made


@accepts_sampling("messages")
class MessagesRequest(CountTokensRequest, SamplingSchema):
    max_tokens: MaxTokens
    """An upper bound, reduced to what the context leaves: this protocol requires it of every request."""
    stream: bool | None = None
    """Send server-sent events."""
    metadata: JsonObject | None = None
    """Accepted for compatibility; the API key identifies the caller."""
    shannon_options: ShannonOptions | None = None
    """For models with agents."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_not_offered(cls, data: Any) -> Any:
        refuse_not_offered(data, _NOT_OFFERED)
        return data

    def generation(self, defaults: DefaultSettings) -> dict[str, Any]:
        """Return everything but the prompt as fields of a GenerationRequest, with the model's defaults filled in."""
        fields = self.sampling(defaults) | {"stream": bool(self.stream), "default_max_tokens": self.max_tokens}
        if self.output_config is not None and self.output_config.format is not None:
            schema = {"name": "output", "schema": self.output_config.format.schema_}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return fields


def _part(block: ParsedBlock) -> Part:
    if block["type"] != "image":
        return {"type": "text", "text": block.get("text") or ""}
    source = block["source"]
    url = source["url"] if source["type"] == "url" else f"data:{source['media_type']};base64,{source['data']}"
    return {"type": "image_url", "image_url": {"url": url}}


def _call(block: ParsedBlock) -> ToolCall:
    arguments = orjson.dumps(block["input"]).decode()
    return {"id": block["id"], "type": "function", "function": {"name": block["name"], "arguments": arguments}}


def _returned(block: ParsedBlock) -> list[ParsedBlock]:
    content = block.get("content") if block["type"] == "tool_result" else None
    return content if isinstance(content, list) else []
