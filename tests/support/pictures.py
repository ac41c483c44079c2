"""Small images in every format, and the messages that have them.

Example:

    messages = asking(data_url(picture("red", "PNG")), text="Which colour?")
"""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image


def picture(color: str = "red", image_format: str = "PNG", size: tuple[int, int] = (8, 6), **options: Any) -> bytes:
    """Return an image file."""
    file = io.BytesIO()
    mode = options.pop("mode", "RGB")
    Image.new(mode, size, color if mode == "RGB" else 0).save(file, image_format, **options)
    return file.getvalue()


def data_url(content: bytes, media_type: str = "image/png") -> str:
    """Return a file as a data URL."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def image_part(url: str, **fields: Any) -> dict[str, Any]:
    """Return an image part in OpenAI's form."""
    return {"type": "image_url", "image_url": {"url": url} | fields}


def asking(*urls: str, text: str = "what is this?") -> list[Any]:
    """The messages of a question about images, which come after the text."""
    return [{"role": "user", "content": [{"type": "text", "text": text}, *(image_part(url) for url in urls)]}]
