"""Engines' errors about messages, with the parameters of the request that the messages were made of."""

from __future__ import annotations

import re

from engine.messages import Message, images_of
from gateway.errors import GatewayError

_IMAGE = re.compile(r"messages\[(\d+)\]\.content\[(\d+)\]")


def reword(error: GatewayError, messages: list[Message], image_places: list[str], prompt_param: str) -> GatewayError:
    """Name the client's own field in an error about one of `messages`.

    `image_places` are the paths of the request's own images, in order. `messages` may have images of earlier turns in
    front of them.
    """
    param = error.param or ""
    if not param.startswith("messages"):
        return error
    error.param = prompt_param
    if found := _IMAGE.match(param):
        number, part = map(int, found.groups())
        images = [(image.message, image.part) for image in images_of(messages)]
        own = images[len(images) - len(image_places) :]
        if (number, part) in own:
            error.param = image_places[own.index((number, part))]
    error.args = (str(error).replace(f"'{param}'", f"'{error.param}'"),)
    return error
