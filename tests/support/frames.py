"""Reads the server-sent events of a complete response.

Example:

    text = "".join(frame["choices"][0]["delta"].get("content", "") for frame in chunks(response.content))
"""

from __future__ import annotations

import json
from typing import Any


def data_lines(raw: bytes) -> list[bytes]:
    """Return what follows `data: ` in each frame of an event stream, comments left out; every frame is one line."""
    assert raw.endswith(b"\n\n"), raw[-80:]
    frames = [frame for frame in raw[:-2].split(b"\n\n") if not frame.startswith(b":")]
    assert all(frame.startswith(b"data: ") and b"\n" not in frame for frame in frames), frames
    return [frame.removeprefix(b"data: ") for frame in frames]


def chunks(raw: bytes) -> list[dict[str, Any]]:
    """Return the JSON objects of a complete event stream, whose last frame must be [DONE]."""
    *objects, done = data_lines(raw)
    assert done == b"[DONE]"
    return [json.loads(line) for line in objects]
