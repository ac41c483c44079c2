"""Messages in OpenAI's form, as engines get them, and the walk over their images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Required, TypedDict


class TextPart(TypedDict):
    """Text in a list of parts."""

    type: Literal["text"]
    text: str


class ImageUrl(TypedDict, total=False):
    """Where an image is. Engines get data URLs only."""

    url: Required[str]
    detail: str


class ImagePart(TypedDict):
    """Image in a list of parts."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = TextPart | ImagePart


class FunctionCall(TypedDict, total=False):
    """The function that a model calls, and its arguments as JSON text."""

    name: Required[str]
    arguments: str


class ToolCall(TypedDict):
    """Call of a function by the model."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(TypedDict, total=False):
    """One message. `content` is a list only if it has an image."""

    role: Required[str]
    content: str | list[Part] | None
    name: str
    reasoning: str
    reasoning_content: str
    tool_calls: list[ToolCall]
    """Of an assistant's message."""
    tool_call_id: str
    """Of a tool's message."""


class PlacedImage(NamedTuple):
    """An image in a conversation: the indices of its message and of its part, and the part."""

    message: int
    part: int
    content: ImagePart

    @property
    def url(self) -> str:
        return self.content["image_url"]["url"]

    @property
    def place(self) -> str:
        """The image's path in a request of the chat protocol."""
        return f"messages[{self.message}].content[{self.part}]"


def texts_of(message: Message) -> list[str]:
    """The texts of a message, without its images."""
    content = message.get("content") or ""
    return [part["text"] for part in content if part["type"] == "text"] if isinstance(content, list) else [content]


def images_of(messages: Sequence[Message]) -> Iterator[PlacedImage]:
    """All images of a conversation, in order."""
    for number, message in enumerate(messages):
        content = message.get("content")
        for part_number, part in enumerate(content if isinstance(content, list) else ()):
            if part["type"] == "image_url":
                yield PlacedImage(number, part_number, part)
