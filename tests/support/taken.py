"""The events of a resumable stream, over all the connections that it took.

Example:

    taken = Taken()
    await taken.take(response, 3)
    assert taken.last == 3
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx


class Taken:
    """What was received of one stream: the data of its events by number, over all the pieces it came in."""

    def __init__(self) -> None:
        self.events: dict[int, str] = {}
        self.last = 0

    async def take(self, response: httpx.Response, most: int | None = None) -> None:
        """Read up to `most` more events, which must be the next ones."""
        async for number, data in events_of(response):
            assert number == self.last + 1, "no event twice, none left out"
            self.last = number
            self.events[number] = data
            if most is not None and (most := most - 1) <= 0:
                return

    @property
    def frames(self) -> list[dict[str, Any]]:
        *frames, done = self.events.values()
        assert done == "[DONE]"
        return [json.loads(frame) for frame in frames]

    @property
    def text(self) -> str:
        return "".join(frame["choices"][0]["delta"].get("content", "") for frame in self.frames if frame["choices"])


async def events_of(response: httpx.Response) -> AsyncIterator[tuple[int, str]]:
    number = None
    async for line in response.aiter_lines():
        if line.startswith("id: "):
            number = int(line.removeprefix("id: "))
        elif line.startswith("data: "):
            assert number is not None, "every event has a number"
            yield number, line.removeprefix("data: ")
            number = None
