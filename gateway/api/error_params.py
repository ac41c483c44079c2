"""Errors about the messages that an engine was given, put into the words of the request that they were made of."""

from __future__ import annotations

import re
from typing import Any

from gateway.errors import GatewayError

_IMAGE = re.compile(r"messages\[(\d+)\]\.content\[(\d+)\]")


def reword(
    error: GatewayError, messages: list[dict[str, Any]], image_places: list[str], prompt_param: str
) -> GatewayError:
    """Let `error` name the client's own fields, where it names one of `messages`.

    `image_places` tell where the request's own images stand, in order; `messages` may hold earlier ones before them.
    """
    param = error.param or ""
    if not param.startswith("messages"):
        return error
    error.param = prompt_param
    if found := _IMAGE.match(param):
        number, part = map(int, found.groups())
        images = [(n, p) for n, message in enumerate(messages) for p in _image_parts(message)]
        own = images[len(images) - len(image_places) :]
        if (number, part) in own:
            error.param = image_places[own.index((number, part))]
    error.args = (str(error).replace(f"'{param}'", f"'{error.param}'"),)
    return error


def _image_parts(message: dict[str, Any]) -> list[int]:
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    return [number for number, part in enumerate(parts) if part["type"] == "image_url"]
