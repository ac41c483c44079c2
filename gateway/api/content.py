"""Content of chat messages: text, or a list of text and image parts in OpenAI's form.

Only the form is checked here; `gateway.images` validates the images themselves.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from gateway.api.schema import Plain, Schema
from gateway.errors import BadRequest


class ImageUrl(Schema):
    url: Annotated[str, Field(min_length=1)]
    """A data URL in base64 (`data:image/png;base64,...`), or an http(s) URL."""
    detail: Literal["auto", "low", "high"] | None = None
    """Accepted for compatibility; the model decides on the resolution."""


class ContentPart(Schema):
    # The rule of `_check_presence`, for the OpenAPI document.
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
    """PNG, JPEG, WebP or GIF (first frame). Only in messages of role `user`."""

    @field_validator("text", "image_url")
    @classmethod
    def _check_presence(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.data.get("type") == info.field_name:
            raise PydanticCustomError("missing", "Field required")
        return value


def _for_engine(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Return a list of parts if one is an image, else the text as one string, which every chat template accepts."""
    if any(part["type"] == "image_url" for part in parts):
        kept: str | list[dict[str, Any]] = [_part_for_engine(part) for part in parts]
    else:
        kept = "".join(part["text"] for part in parts)
    parts.clear()  # the parsed parts and the converted ones must not both stay in memory
    return kept


def _part_for_engine(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    image = part["image_url"]
    detail = {"detail": image["detail"]} if image.get("detail") is not None else {}
    return {"type": "image_url", "image_url": {"url": image["url"], **detail}}


Content = str | Annotated[list[dict[str, Any]], Plain(ContentPart, _for_engine, min_length=1, max_length=1024)]
"""Text, or a list of parts. A list without images is kept as one string."""


def check_images(content: Content | None, role: str, where: str) -> None:
    """Raise BadRequest for an image outside a user message. `where` is the path of the content in the body."""
    for number, part in enumerate(content if isinstance(content, list) else ()):
        if part["type"] == "image_url" and role != "user":
            raise misplaced_image(f"{where}[{number}]", f"'{role}' message")


def misplaced_image(place: str, container: str) -> BadRequest:
    """Return the error for an image at `place`, in a container that must not have images."""
    return BadRequest(f"Images are only allowed in 'user' messages; '{place}' is in a {container}.", place)
