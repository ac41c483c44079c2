"""Frames of a fixed size: the text of a stream, cut again into pieces of so many characters.

For clients that were written against servers with a frame size of their own. A piece goes out as soon as it is full;
the role frame goes out with the first token, so the time to first byte stays what it was. Characters are Unicode code
points. Reasoning and answer are cut separately. Does not handle deltas with logprobs, which belong to their tokens, and
the arguments of tool calls: both pass as they are, behind the text that came before them. Shannon events never wait,
so they may overtake less than one piece of text. Errors pass through, behind what was said until then.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass

from engine.base import Delta
from gateway.exchange.events import Event


@dataclass(slots=True)
class _Rest:
    """What a choice has said and not sent yet: reasoning, or text, or neither; less than one piece of it."""

    reasoning: str = ""
    text: str = ""

    def flush(self, index: int) -> Iterator[Delta]:
        """Yield the rest as it is."""
        if self.reasoning or self.text:
            yield Delta(self.text, index, reasoning=self.reasoning)
        self.reasoning = self.text = ""


async def rechunk(events: AsyncGenerator[Event, None], chunk_chars: int) -> AsyncGenerator[Event, None]:
    """Pass `events` on, with text in pieces of exactly `chunk_chars` characters, but for the last of a choice."""
    rests: dict[int, _Rest] = {}
    async with aclosing(events):
        try:
            async for event in events:
                if not isinstance(event, Delta):
                    yield event
                    continue
                rest = rests.get(event.index)
                if rest is None:
                    rest = rests[event.index] = _Rest()
                    yield Delta("", event.index)  # opens the choice: its role frame
                for delta in _cut(event, rest, chunk_chars):
                    yield delta
        except Exception:
            for delta in _flush(rests):
                yield delta
            raise
    for delta in _flush(rests):
        yield delta


def _flush(rests: dict[int, _Rest]) -> Iterator[Delta]:
    for index, rest in rests.items():
        yield from rest.flush(index)


def _cut(delta: Delta, rest: _Rest, chunk_chars: int) -> Iterator[Delta]:
    """Yield what can be sent now that `delta` has come; the remainder is left in `rest`."""
    if delta.logprobs is not None or delta.tool_calls:
        yield from rest.flush(delta.index)
        yield delta
        return
    if delta.reasoning:
        if rest.text:
            yield from rest.flush(delta.index)
        *pieces, rest.reasoning = _pieces(rest.reasoning + delta.reasoning, chunk_chars)
        yield from (Delta("", delta.index, reasoning=piece) for piece in pieces)
    if delta.text:
        if rest.reasoning:
            yield from rest.flush(delta.index)
        *pieces, rest.text = _pieces(rest.text + delta.text, chunk_chars)
        yield from (Delta(piece, delta.index) for piece in pieces)
    if delta.finish_reason is not None:
        stop = delta.stop_reason
        yield Delta(rest.text, delta.index, delta.finish_reason, reasoning=rest.reasoning, stop_reason=stop)
        rest.reasoning = rest.text = ""


def _pieces(text: str, chunk_chars: int) -> list[str]:
    """Return `text` in pieces; the last is shorter than the others, and may be empty."""
    whole = len(text) // chunk_chars * chunk_chars
    return [*(text[at : at + chunk_chars] for at in range(0, whole, chunk_chars)), text[whole:]]
