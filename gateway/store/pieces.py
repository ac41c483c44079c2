"""Large values of the store, written and read a piece at a time.

A command that carries several MiB holds up all callers of the server, so none carries more than about
PIECE_BYTES in either direction. A value of at most half of that is a string. A larger one is a hash of its pieces by
number, in one of two places beside its key, and the string under the key names it: "~<place>/<number of pieces>". The
string is written last, so readers see the value before or the value after.
"""

from __future__ import annotations

from gateway.store import layout
from gateway.store.client import Lane

PIECE_BYTES = 262_144
"""Most bytes of values in one command or its answer; 256 KiB take Valkey about 0.1 ms."""
_INLINE_BYTES = PIECE_BYTES // 2
"""Most bytes of a value that is a string, so that two fit into one command."""
_WRITING_S = 60
"""Lifetime of pieces that no value refers to: their writer is gone by then."""
_LOOKS = 5
"""Attempts to read a value that changes while it is read."""


def split(text: str, most_bytes: int = PIECE_BYTES) -> list[str]:
    """Return `text` in pieces of at most `most_bytes` bytes of UTF-8, cut between characters."""
    if len(text) * 4 <= most_bytes:
        return [text]
    data = text.encode()
    pieces: list[str] = []
    start = 0
    while start < len(data) or not pieces:
        end = min(start + most_bytes, len(data))
        while end < len(data) and data[end] & 0xC0 == 0x80:  # inside a character
            end -= 1
        pieces.append(data[start:end].decode())
        start = end
    return pieces


async def write(store: Lane, key: str, text: str, place: int = 0) -> str:
    """Write the pieces of a value that is too large for a string, and return the string to put under its key.

    Nothing but a string that names them keeps the pieces for longer than a minute: set their expiry with it. `place` is
    not that of the value before. Raises StoreUnavailable.
    """
    if len(text.encode()) <= _INLINE_BYTES:
        return text
    pieces = split(text)
    beside = layout.places(key)[place]
    await store.run("DEL", beside)
    for number, piece in enumerate(pieces):
        await store.run_in_order([("HSET", beside, number, piece), ("EXPIRE", beside, _WRITING_S)])
    return f"~{place}/{len(pieces)}"


async def read(store: Lane, key: str, text: str | None = None) -> str | None:
    """Return a value, or None if there is none. `text` is the string under its key if that is known already.

    Raises StoreUnavailable.
    """
    for _ in range(_LOOKS):
        text = await store.run("GET", key) if text is None else text
        if text is None or not text.startswith("~"):
            return text
        place, _, count = text[1:].partition("/")
        pieces = [await store.run("HGET", layout.places(key)[int(place)], number) for number in range(int(count))]
        if None not in pieces:
            return "".join(pieces)
        text = None  # it was replaced meanwhile
    return None
