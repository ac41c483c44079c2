"""What a message may hold beside plain text: parts of text and images, in OpenAI's form.

Only their form is checked here; `gateway.images` looks into the images.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from gateway.api.function_calling import Plain, Schema
from gateway.errors import BadRequest


class ImageUrl(Schema):
    url: Annotated[str, Field(min_length=1)]
    """A data URL in base64 (`data:image/png;base64,...`), or an http(s) URL."""
    detail: Literal["auto", "low", "high"] | None = None
    """Accepted for compatibility; the model decides how closely it looks."""


class ContentPart(Schema):
    # What the validator below asks for, in the words of the OpenAPI document.
    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"properties": {"type": {"const": name}, name: {"not": {"type": "null"}}}, "required": [name]}
                for name in ("text", "image_url")
            ]
        }
    )
    type: Literal["text", "image_url"]
    text: str | None = Field(None, validate_default=True)
    image_url: ImageUrl | None = Field(None, validate_default=True)
    """PNG, JPEG, WebP or GIF, of which the first picture is taken. Only in messages of role `user`."""

    @field_validator("text", "image_url")
    @classmethod
    def _must_be_there_by_type(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.data.get("type") == info.field_name:
            raise PydanticCustomError("missing", "Field required")
        return value


def _for_engine(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Return text joined to one string, which every chat template takes, and parts only where they hold an image."""
    if any(part["type"] == "image_url" for part in parts):
        kept: str | list[dict[str, Any]] = [_part_for_engine(part) for part in parts]
    else:
        kept = "".join(part["text"] for part in parts)
    parts.clear()  # what was parsed and what is kept never exist both as a whole
    return kept


def _part_for_engine(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    image = part["image_url"]
    detail = {"detail": image["detail"]} if image.get("detail") is not None else {}
    return {"type": "image_url", "image_url": {"url": image["url"], **detail}}


Content = str | Annotated[list[dict[str, Any]], Plain(ContentPart, _for_engine, min_length=1, max_length=1024)]
"""Text, or a list of parts. Of a list only one with an image is kept as a list; the text of others is joined."""


def check_images(content: Content | None, role: str, where: str) -> None:
    """Raise BadRequest on an image outside a user's message. `where` is the content's path."""
    for number, part in enumerate(content if isinstance(content, list) else ()):
        if part["type"] == "image_url" and role != "user":
            place = f"{where}[{number}]"
            raise BadRequest(f"Only a message of role 'user' may hold an image, as '{place}' does.", place)
