"""Turns of a conversation: messages in OpenAI's form, and how the store keeps those of a session.

A session's turns are members of a sorted set under their numbers, see lua/session_turns.lua.
"""

from __future__ import annotations

from itertools import groupby

import orjson

from engine.messages import Message, TextPart, texts_of
from gateway.store.pieces import PIECE_BYTES, split

_CALL_BYTES = 60
"""Of a tool call, its names of fields alone."""
Piece = tuple[str, str]
"""A member of a session's turns, and the turn's number as the store writes it. See lua/session_turns.lua."""


def pieces_of(number: int, text: str) -> list[str]:
    """Return a turn as members of a session's turns, each of at most PIECE_BYTES."""
    if len(text.encode()) <= PIECE_BYTES:
        return [text]
    pieces = split(text, PIECE_BYTES - 64)
    return [f"~{number}:{place:06d}/{len(pieces)}:{piece}" for place, piece in enumerate(pieces)]


def turns_of(found: list[Piece]) -> list[tuple[int, list[Message]]]:
    """Put turns together from their members, newest first. Returns them oldest first, without incomplete ones."""
    turns = []
    for _, group in groupby(reversed(found), key=lambda piece: piece[1]):
        texts = [text for text, _ in group]
        if texts[0].startswith("~"):
            heads, bodies = zip(*map(_parted, texts), strict=True)
            if len(texts) != int(heads[0].partition("/")[2]):
                continue
            texts = ["".join(bodies)]
        turns += [(number, turn) for number, turn in map(orjson.loads, texts)]
    return turns


def _parted(member: str) -> tuple[str, str]:
    end = member.index(":", member.index("/"))
    return member[:end], member[end + 1 :]


def text_of(message: Message) -> str:
    """The text of a message, without its images."""
    content = message.get("content")
    return content if isinstance(content, str) else "".join(texts_of(message))


def least_bytes(message: Message) -> int:
    """The least that a message takes when it is stored, without its images. Writing 8 MiB to find out takes 20 ms."""
    calls = message.get("tool_calls") or ()
    arguments = (call["function"].get("arguments") or "" for call in calls)
    return len(text_of(message)) + _CALL_BYTES * len(calls) + sum(map(len, arguments))


def without_images(message: Message) -> Message:
    """The message with the text "[image]" in place of each image."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    image: TextPart = {"type": "text", "text": "[image]"}
    return {**message, "content": [image if part["type"] == "image_url" else part for part in content]}
