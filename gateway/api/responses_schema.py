"""The body of POST /v1/responses: OpenAI's fields, plus vLLM's fields that clients may safely set.

What only OpenAI has (its own tools, stored conversations, prompts) is refused by name, as is what the field is called
in the chat protocol. Raises BadRequest, which names the parameter.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from engine.base import GenerationRequest
from engine.messages import Message
from engine.sampling import max_entries
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
from gateway.api.generation_schema import GenerationFields, MaxTokens, refuse_not_offered
from gateway.api.response_items import Input, InputItem, check_images, items_of
from gateway.api.sampling import accepts_sampling
from gateway.api.schema import Schema
from gateway.api.shannon_options import ShannonOptions
from gateway.api.structured_outputs import JsonSchemaObject
from gateway.errors import BadRequest
from gateway.settings.config import DefaultSettings

_MOVED = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
}
_NOT_OFFERED = {
    "conversation": "stored conversations; send 'previous_response_id' or the header X-Session-ID",
    "prompt": "prompt templates",
    "context_management": "compaction; send 'truncation': \"auto\"",
    "moderation": "moderation",
}
_LOGPROBS = "message.output_text.logprobs"


class FunctionTool(FunctionDefinition):
    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _refuse_built_in_tools(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("type") not in (None, "function"):
            raise ValueError("this server runs no tools of its own here: only tools of type 'function' are offered")
        return data

    def tool(self) -> Tool:
        """Return the tool in the chat protocol's form."""
        return Tool(type="function", function=FunctionDefinition(**self.model_dump(exclude={"type"})))


class FunctionChoice(Schema):
    type: Literal["function"]
    name: FunctionName


class TextFormat(Schema):
    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] | None = None
    description: str | None = None
    schema_: JsonSchemaObject | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_must_fit(self) -> TextFormat:
        if self.type == "json_schema" and (self.schema_ is None or self.name is None):
            raise ValueError("name and schema are required with type 'json_schema'")
        return self

    def for_engine(self) -> dict[str, Any]:
        """Return the chat protocol's `response_format`."""
        fields = self.model_dump(by_alias=True, exclude_none=True, exclude={"type"})
        return {"type": self.type} | ({"json_schema": fields} if self.type == "json_schema" else {})


class TextConfig(Schema):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    """Accepted for compatibility; say in the instructions how long answers should be."""


class Reasoning(Schema):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    """How much a reasoning model should think, where its chat template knows."""
    summary: Literal["auto", "concise", "detailed"] | None = None
    """Accepted for compatibility; what the model thought is given whole."""


@accepts_sampling("responses")
class ResponseRequest(GenerationFields):
    input: Input
    instructions: Annotated[str, Field(max_length=1_048_576)] | None = None
    """The system prompt of this response alone: those of earlier ones are not carried over."""
    max_output_tokens: MaxTokens | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    """`auto` when left out: the model decides."""
    parallel_tool_calls: bool | None = None
    """False allows one call per answer at most."""
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    previous_response_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Continue the conversation that led to this response."""
    store: bool | None = None
    """Keep the response, so that it can be fetched and continued; true when left out."""
    background: bool | None = None
    """Return at once, and generate even if the client leaves."""
    truncation: Literal["auto", "disabled"] | None = None
    """`auto` drops the oldest turns of a conversation that is too long, which is otherwise refused."""
    include: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=16)] | None = None
    """`message.output_text.logprobs` is heeded."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=16),
            max_entries(16),
        ]
        | None
    ) = None
    """Given back as it came."""
    shannon_options: ShannonOptions | None = None
    """For models with agents."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_not_offered(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, moved in _MOVED.items():
            if data.get(name) is not None:
                raise BadRequest(
                    f"Unsupported parameter: '{name}'. In the Responses API, this parameter is '{moved}'.", name
                )
        n = data.get("n")
        if n is not None and (type(n) is not int or n != 1):
            raise BadRequest("A response has one choice. Leave 'n' out.", "n")
        refuse_not_offered(data, _NOT_OFFERED)
        return data

    @field_validator("tools")
    @classmethod
    def _check_tools(cls, tools: list[FunctionTool] | None) -> list[FunctionTool] | None:
        check_together((tool.name, tool.tool().for_engine()) for tool in tools or ())
        return tools

    @model_validator(mode="after")
    def _fields_must_agree(self) -> ResponseRequest:
        try:
            check_tool_choice(self._chat_tool_choice, [tool.tool() for tool in self.tools or ()])
        except ValueError as error:
            raise BadRequest(f"'tool_choice' {error}.", "tool_choice") from error
        if self.structured_outputs and self.text and self.text.format and self.text.format.type != "text":
            raise BadRequest("Send 'structured_outputs' or 'text.format', not both.", "structured_outputs")
        if self.background and self.stream:
            raise BadRequest("A response in the background can't be streamed. Poll GET /v1/responses/{id}.", "stream")
        if self.background and self.store is False:
            raise BadRequest("A response in the background must be stored. Leave 'store' out.", "store")
        check_images(self.items)
        return self

    @property
    def items(self) -> list[InputItem]:
        return items_of(self.input)

    @property
    def limit(self) -> int | None:
        return self.max_output_tokens

    def for_engine(self, request_id: str, messages: list[Message], defaults: DefaultSettings) -> GenerationRequest:
        """Return the generation that this body asks for behind `messages`, with the model's defaults filled in."""
        fields = self.generation(defaults) | {"max_tokens_param": "max_output_tokens"}
        if self.text is not None and self.text.format is not None:
            fields["response_format"] = self.text.format.for_engine()
        # The stream of a response in the background shows its progress.
        fields["stream"] = bool(self.stream or self.background)
        return GenerationRequest(
            request_id=request_id,
            messages=messages,
            logprobs=_LOGPROBS in (self.include or ()) or bool(self.top_logprobs),
            top_logprobs=self.top_logprobs or 0,
            tools=[tool.tool().for_engine() for tool in self.tools] if self.tools else None,
            tool_choice=self._tool_choice_for_engine(),
            parallel_tool_calls=self.parallel_tool_calls if self.tools else None,
            reasoning_effort=self.reasoning.effort if self.reasoning else None,
            **fields,
        )

    def echo(self, defaults: DefaultSettings) -> dict[str, Any]:
        """Return the fields of the response object that repeat the request."""
        sampling = self.sampling(defaults)
        text_format = self.text.format if self.text and self.text.format else TextFormat(type="text")
        choice = self.tool_choice or "auto"
        return {
            "background": bool(self.background),
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": None,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "reasoning": {"effort": self.reasoning.effort if self.reasoning else None, "summary": None},
            "service_tier": "default",
            "temperature": sampling.get("temperature"),
            "text": {"format": text_format.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [{"strict": None, "parameters": None} | tool.model_dump() for tool in self.tools or ()],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": sampling.get("top_p"),
            "truncation": self.truncation or "disabled",
            "user": self.user,
        }

    @property
    def _chat_tool_choice(self) -> ToolChoice | None:
        """The choice in the chat protocol's form."""
        if isinstance(self.tool_choice, FunctionChoice):
            return NamedToolChoice(type="function", function=NamedFunction(name=self.tool_choice.name))
        return self.tool_choice

    def _tool_choice_for_engine(self) -> str | dict[str, Any] | None:
        choice = self._chat_tool_choice if self.tools else None
        return choice.model_dump() if isinstance(choice, NamedToolChoice) else choice
