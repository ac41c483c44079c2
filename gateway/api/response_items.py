"""The input of the Responses API: items, and how they become the messages that chat templates know.

Reasoning is dropped: templates leave earlier thoughts out themselves. Does not handle items of tools that OpenAI runs
itself, files, and references to items by id. Raises BadRequest, which names the item.
"""

from __future__ import annotations

import secrets
from itertools import groupby
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field, model_validator

from engine.messages import FunctionCall, Message, ToolCall, texts_of
from engine.messages import Part as EnginePart
from gateway.api.content import misplaced_image
from gateway.api.function_calling import Arguments, FunctionName
from gateway.api.schema import Plain, Schema

MAX_ITEMS = 4096


class InputPart(Schema):
    type: Literal["input_text", "output_text", "text", "refusal", "input_image"]
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    """A data URL in base64 (`data:image/png;base64,...`), or an http(s) URL."""
    detail: Literal["auto", "low", "high", "original"] | None = None
    """Accepted for compatibility; the model decides how closely it looks."""

    @model_validator(mode="after")
    def _must_hold_what_it_says(self) -> InputPart:
        name = {"input_image": "image_url", "refusal": "refusal"}.get(self.type, "text")
        if getattr(self, name) is None:
            raise ValueError(f"{name} is required with type '{self.type}'")
        return self


Part = dict[str, Any]
"""With the fields of InputPart, as they were parsed."""
Content = str | Annotated[list[Part], Plain(InputPart, max_length=1024)]


class InputItem(Schema):
    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    id: Annotated[str, Field(max_length=256)] | None = None
    status: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Content | None = None
    call_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    name: FunctionName | None = None
    arguments: Arguments | None = None
    """A JSON object, as text."""
    output: Content | None = None
    """What a function returned."""

    @model_validator(mode="before")
    @classmethod
    def _reasoning_is_not_read(cls, data: Any) -> Any:
        return {"type": "reasoning"} if isinstance(data, dict) and data.get("type") == "reasoning" else data

    @model_validator(mode="after")
    def _must_be_whole(self) -> InputItem:
        needed: dict[str, tuple[str, ...]] = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
        }
        for name in needed.get(self.type, ()):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is required with type '{self.type}'")
        if self.type == "function_call" and not _is_object(self.arguments or "{}"):
            raise ValueError("arguments must be a JSON object, as text")
        return self

    @property
    def images(self) -> bool:
        """Whether a part is an image."""
        return any(_is_image(part) for content in (self.content, self.output) for part in _parts(content))

    def for_engine(self) -> Message | None:
        """Return the item as a message, or None for what no message is made of."""
        if self.type == "reasoning":
            return None
        if self.type == "function_call":
            function: FunctionCall = {"name": self.name or "", "arguments": self.arguments or "{}"}
            call: ToolCall = {"id": self.call_id or "", "type": "function", "function": function}
            return {"role": "assistant", "content": None, "tool_calls": [call]}
        if self.type == "function_call_output":
            return {"role": "tool", "tool_call_id": self.call_id or "", "content": _content(self.output)}
        role = "system" if self.role == "developer" else self.role
        return {"role": role or "", "content": _content(self.content)}

    def shown(self) -> dict[str, Any]:
        """Return the item as it is kept and listed: under an id, and without the data of its images."""
        prefix = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}.get(self.type, "rs")
        fields = self.model_dump(exclude_none=True, exclude={"content", "output"})
        fields |= {"id": self.id or f"{prefix}_{secrets.token_hex(24)}", "status": "completed"}
        if self.type == "message":
            fields["content"] = _shown(self.content, "output_text" if self.role == "assistant" else "input_text")
        if self.type == "function_call_output":
            fields["output"] = self.output if isinstance(self.output, str) else _shown(self.output, "input_text")
        if self.type == "reasoning":
            fields["summary"] = []
        return fields


Input = str | Annotated[list[InputItem], Field(fail_fast=True, min_length=1, max_length=MAX_ITEMS)]
"""Text of the user, or a list of items."""


def items_of(given: Input) -> list[InputItem]:
    """Return the input as items."""
    return [InputItem(role="user", content=given)] if isinstance(given, str) else given


def check_images(items: list[InputItem]) -> None:
    """Raise BadRequest for an image outside a user message."""
    for number, item in enumerate(items):
        if item.images and item.role != "user":
            if item.type == "message":
                raise misplaced_image(f"input[{number}].content", f"'{item.role}' message")
            raise misplaced_image(f"input[{number}].output", f"'{item.type}' item")


def messages_of(items: list[InputItem]) -> list[Message]:
    """Return items as messages. What an assistant says and calls in a row is one message, as templates expect."""
    made = (message for item in items if (message := item.for_engine()) is not None)
    messages: list[Message] = []
    for spoken, group in groupby(made, lambda message: bool(message["role"] == "assistant")):
        run = list(group)
        messages += [_joined(run)] if spoken else run
    return messages


def image_places(items: list[InputItem]) -> list[str]:
    """The client's path of each image, in the order of the messages."""
    return [
        f"input[{number}].content[{part_number}].image_url"
        for number, item in enumerate(items)
        for part_number, part in enumerate(_parts(item.content))
        if _is_image(part)
    ]


def _joined(run: list[Message]) -> Message:
    text = "".join(text for message in run for text in texts_of(message))
    calls = [call for message in run for call in message.get("tool_calls", ())]
    message: Message = {"role": "assistant", "content": text or (None if calls else "")}
    if calls:
        message["tool_calls"] = calls
    return message


def _parts(content: Content | None) -> list[Part]:
    return content if isinstance(content, list) else []


def _is_image(part: Part) -> bool:
    return bool(part["type"] == "input_image")


def _part_for_engine(part: Part) -> EnginePart:
    if _is_image(part):
        return {"type": "image_url", "image_url": {"url": part["image_url"]}}
    return {"type": "text", "text": _text(part)}


def _text(part: Part) -> str:
    return part.get("text") or part.get("refusal") or ""


def _content(content: Content | None) -> str | list[EnginePart]:
    """Return text joined to one string, which every chat template takes, and parts only where they hold an image."""
    if not isinstance(content, list):
        return content or ""
    if any(map(_is_image, content)):
        return [_part_for_engine(part) for part in content]
    return "".join(map(_text, content))


def _shown(content: Content | None, text_type: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [_shown_text(content, text_type)]
    shown: list[dict[str, Any]] = []
    for part in _parts(content):
        if _is_image(part):
            url = None if part["image_url"].startswith("data:") else part["image_url"]
            detail = part.get("detail") or "auto"
            shown.append({"type": "input_image", "detail": detail, "file_id": None, "image_url": url})
        elif part["type"] == "refusal":
            shown.append({"type": "refusal", "refusal": part["refusal"]})
        else:
            shown.append(_shown_text(part["text"], text_type))
    return shown


def _shown_text(text: str, text_type: str) -> dict[str, Any]:
    return {"type": text_type, "text": text} | ({"annotations": []} if text_type == "output_text" else {})


def _is_object(text: str) -> bool:
    try:
        return isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError:
        return False
