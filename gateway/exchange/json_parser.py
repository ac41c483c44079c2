"""The JSON of a request's body into values.

A parser holds the GIL until it is done: 100 ms for 8 MiB of tool calls, during which the event loop stands still, in
whatever thread it runs. So a large body is cut at commas, and its pieces are parsed one by one and put together. Raises
 BadRequest.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import orjson

from gateway.errors import BadRequest
from gateway.exchange.json_text import MAX_DEPTH, check_size, pieces_of

LARGE_BYTES = 262_144
"""Longer bodies are looked at before they are parsed, and worked on beside the event loop: up to here everything takes
some milliseconds."""
_CUT_BYTES = 262_144

_BRACKETS = b"{}[]"
_OTHERS = bytes(byte for byte in range(256) if byte not in _BRACKETS)
_CLOSING = bytes.maketrans(b"{[", b"}]")


def load(body: bytes) -> Any:
    """The value of a body. Raises BadRequest where it is not JSON, or would take too much memory."""
    try:
        if len(body) <= LARGE_BYTES:
            return orjson.loads(body)
        check_size(body)
        try:
            return _load_pieces(body)
        except (_NotCut, orjson.JSONDecodeError):
            return orjson.loads(body)  # its message is the best
    except orjson.JSONDecodeError as error:
        # Without its cause, which holds the body once more.
        raise BadRequest(f"The request body is not valid JSON: {error}.") from None


class _NotCut(Exception):
    """The text can't be cut, or its pieces not be put together."""


def _load_pieces(body: bytes) -> Any:
    """The value of a body, parsed in pieces. Raises _NotCut, and JSONDecodeError where a piece is not JSON."""
    # Names that no body has: of what continues the piece before, and at the end of what continues in the next one.
    first, last = secrets.token_hex(8), secrets.token_hex(8)
    opening = {"{": b'{"%b":' % first.encode(), "[": b"["}
    whole: Any = None
    start, stack = 0, ""
    for end, next_stack in _cuts(body):
        head = b"".join([*(opening[kind] for kind in stack[:-1]), stack[-1:].encode()])
        tail = b""
        if next_stack:
            tail = b',"%b"' % last.encode() + (b":0" if next_stack[-1] == "{" else b"")
            tail += next_stack[::-1].encode().translate(_CLOSING)
        text = body[start:end]
        if start and text.lstrip()[:1] in (b"]", b"}"):
            raise _NotCut  # the comma before it should not be there
        part = orjson.loads(b"".join([head, text, tail]))
        if start:
            _add(part, _open_containers(whole, stack, last), first)
        else:
            whole = part
        start, stack = end + 1, next_stack
    return whole


def _cuts(body: bytes) -> Iterator[tuple[int, str]]:
    """Yield the places of commas to cut at, each with the brackets that are open there, and the end of the body."""
    stack, last = b"", 0
    for piece in pieces_of(body):
        if piece.start - last >= _CUT_BYTES:
            numbers = range(piece.inside, len(piece.parts), 2)
            number = next((number for number in reversed(numbers) if b"," in piece.parts[number]), None)
            if number is not None:
                before, part = piece.parts[:number], piece.parts[number]
                at = part.rindex(b",")
                opened = _open(stack + b"".join([*before[piece.inside :: 2], part[:at]]))
                last = piece.start + sum(map(len, before)) + number + at
                yield last, opened.decode()
        stack = _open(stack + b"".join(piece.outside))
    yield len(body), ""


def _open(outside: bytes) -> bytes:
    """Return the brackets that are open behind text. Raises _NotCut where they don't match, or nest deep."""
    brackets = outside.translate(None, _OTHERS)
    for _ in range(MAX_DEPTH + 2):
        shorter = brackets.replace(b"[]", b"").replace(b"{}", b"")
        if len(shorter) == len(brackets):
            if len(brackets) > MAX_DEPTH or b"]" in brackets or b"}" in brackets:
                raise _NotCut
            return brackets
        brackets = shorter
    raise _NotCut


def _open_containers(whole: Any, stack: str, last: str) -> list[Any]:
    """Return the containers that are to be added to, the outermost first, without their mark. Raises _NotCut."""
    containers = [whole]
    for _ in stack[1:]:
        values = containers[-1]
        if not values or not isinstance(values, (dict, list)):
            raise _NotCut
        containers.append(values[next(reversed(values))] if isinstance(values, dict) else values[-1])
    innermost = containers[-1]
    # What was read last is not what stands last where a name comes twice.
    if isinstance(innermost, dict) and last in innermost:
        del innermost[last]
    elif isinstance(innermost, list) and innermost and innermost[-1] == last:
        innermost.pop()
    else:
        raise _NotCut
    return containers


def _add(part: Any, containers: list[Any], first: str) -> None:
    """Add what is in a piece to the containers that it continues."""
    for number, container in enumerate(containers):
        inner = None
        if number < len(containers) - 1:
            inner = part.pop(first) if isinstance(part, dict) else part.pop(0)
        if isinstance(container, dict):
            container.update(part)
        else:
            container.extend(part)
        part = inner
