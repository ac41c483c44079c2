"""Assembles the tool calls of one choice from pieces in any server's dialect. No I/O.

In OpenAI's format the first piece of a call has an index, an id and the complete name; later ones have the index and
more of the arguments. Servers deviate: the index is missing, null, or 0 for every call; the id is missing, empty,
repeated, shared by several calls, or different in each piece; the name is split or repeated; arguments are an object or
null. `CallPieces` decides which call each piece continues, and returns OpenAI's format: indices from 0, a unique id for
each call, the complete name in the first piece.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from engine.base import ToolCallDelta


@dataclass(slots=True, eq=False)
class _Call:
    number: int
    id: str = ""
    """The server's id."""
    name: str = ""
    arguments: list[str] = field(default_factory=list)
    chars: int = 0
    """Length of the arguments."""
    announced: bool = False
    """Its first piece has been returned, so its name is final."""
    repeated: bool = False
    """Its name was repeated without arguments when it was complete: this may start a second call of the function."""

    def is_whole(self) -> bool:
        """Return whether the arguments are a complete JSON object."""
        if not self.arguments or not self.arguments[-1].rstrip().endswith("}"):
            return False
        try:
            return isinstance(orjson.loads("".join(self.arguments)), dict)
        except orjson.JSONDecodeError:
            return False


@dataclass(frozen=True, slots=True)
class _Piece:
    """One entry of `tool_calls`. Missing fields are empty strings."""

    index: int | None
    id: str
    name: str
    arguments: str
    position: int | None
    """Its index in the list; None if it is the only entry."""


class CallPieces:
    """The tool calls of one choice. `names` are the names of the request's tools, if known."""

    def __init__(self, names: Collection[str] = ()) -> None:
        self._names = frozenset(names)
        self._calls: list[_Call] = []
        self._by_index: dict[int, _Call] = {}
        self._by_id: dict[str, _Call] = {}
        """The latest call with each id of the server."""
        self._waiting: dict[int, _Call] = {}
        """Calls that are not announced, by number."""
        self._ids: set[str] = set()

    def __bool__(self) -> bool:
        """Return whether there are calls."""
        return bool(self._calls)

    def add(self, given: Any) -> list[ToolCallDelta]:
        """Add the `tool_calls` of a frame; return new deltas. Raises TypeError, AttributeError if they are invalid."""
        entries = [entry for entry in (given if isinstance(given, list) else [given]) if entry is not None]
        added: list[ToolCallDelta] = []
        for position, entry in enumerate(entries):
            piece = _read(entry, position if len(entries) > 1 else None)
            call = self._find(piece)
            if call is not None and piece.arguments and call.repeated and not piece.name:
                call = self._begin(call.name)
            elif call is None:
                added += self._announce_all()
                call = self._begin()
            if piece.index is not None:
                self._by_index[piece.index] = call
            added += self._extend(call, piece)
        return added

    def are_whole(self) -> bool:
        """Return whether the arguments of every call are complete JSON."""
        return all(call.is_whole() for call in self._calls)

    def finish(self, *, cut: bool) -> list[ToolCallDelta]:
        """Return the remaining deltas at the end. `cut` means that the length limit ended the last call."""
        added = self._announce_all()
        for call in self._calls:
            if not call.arguments and not cut:
                added.append(self._hand_over(call, "{}"))
        return added

    def _begin(self, name: str = "") -> _Call:
        call = _Call(len(self._calls), name=name)
        self._calls.append(call)
        self._waiting[call.number] = call
        return call

    def _find(self, piece: _Piece) -> _Call | None:
        """Return the call that a piece continues, or None if it starts a new one."""
        call = self._candidate(piece)
        if call is None:
            return None
        continues = self._continues_by_name(call, piece) if piece.name else self._continues_by_id(call, piece)
        return call if continues else None

    def _candidate(self, piece: _Piece) -> _Call | None:
        """Return the call that a piece may continue."""
        last = self._calls[-1] if self._calls else None
        if piece.index is not None:
            found = self._by_index.get(piece.index)
            # Neither id nor name: some servers count pieces in the index.
            return last if found is None and not piece.id and not piece.name else found
        if piece.id:
            return self._by_id.get(piece.id, last)
        if not piece.name and piece.position is not None and piece.position < len(self._calls):
            return self._calls[piece.position]
        return last

    def _continues_by_id(self, call: _Call, piece: _Piece) -> bool:
        """Decide on a piece that has no name."""
        if not piece.id or piece.id == call.id:
            return True
        if call.is_whole():
            return False  # the name follows
        if piece.index is not None or not call.id:
            return True
        return bool(call.name and piece.arguments)  # another id in each piece

    def _continues_by_name(self, call: _Call, piece: _Piece) -> bool:
        """Decide on a piece that has a name."""
        other_id = bool(piece.id and call.id and piece.id != call.id)
        if call.is_whole():
            if piece.name != call.name or other_id:
                return False
            return not piece.arguments or piece.arguments == "".join(call.arguments)  # a repetition
        if piece.name == call.name:
            return not other_id or bool(piece.arguments or call.arguments)
        if call.arguments:
            return False
        if not call.name:
            return not other_id or piece.index is not None
        if other_id or (call.name in self._names and piece.name in self._names):
            return False
        # The name is split, unless it is already the name of a tool.
        return call.name not in self._names or call.name + piece.name in self._names

    def _extend(self, call: _Call, piece: _Piece) -> list[ToolCallDelta]:
        name, arguments = piece.name, piece.arguments
        if piece.id and not call.id:
            call.id = piece.id
            self._by_id[piece.id] = call
        if name and not call.announced and name != call.name:
            call.name = name if name.startswith(call.name) else call.name + name  # the name so far, or the next part
        if name and call.announced and not arguments:
            call.repeated = call.is_whole()
        if call.chars and arguments.startswith("{") and len(arguments) >= call.chars:
            # An object can't continue with its first brace: all arguments so far have been repeated.
            arguments = arguments.removeprefix("".join(call.arguments))
        if call.announced:
            return [self._hand_over(call, arguments)] if arguments else []
        if not arguments and not self._is_final(call.name):
            return []
        return [self._announce(call, arguments)]

    def _is_final(self, name: str) -> bool:
        """Return whether a name is complete: it is a tool's name, and no prefix of another tool's."""
        return name in self._names and not any(other != name and other.startswith(name) for other in self._names)

    def _announce_all(self) -> list[ToolCallDelta]:
        return [self._announce(call, "") for call in list(self._waiting.values())]

    def _announce(self, call: _Call, arguments: str) -> ToolCallDelta:
        call.announced = True
        self._waiting.pop(call.number, None)
        call_id = call.id
        if not call_id or call_id in self._ids:
            call_id = f"call_{secrets.token_hex(12)}"
        self._ids.add(call_id)
        delta = self._hand_over(call, arguments)
        return ToolCallDelta(delta.index, call_id, call.name, arguments)

    def _hand_over(self, call: _Call, arguments: str) -> ToolCallDelta:
        if arguments:
            call.arguments.append(arguments)
            call.chars += len(arguments)
        return ToolCallDelta(call.number, arguments=arguments)


def tool_names(tools: Sequence[dict[str, Any]] | None) -> set[str]:
    """Return the names of a request's tools."""
    return {str(tool["function"]["name"]) for tool in tools or () if isinstance(tool.get("function"), dict)}


def _read(entry: dict[str, Any], position: int | None) -> _Piece:
    function = entry.get("function") or entry  # some have no `function` around the two
    name, arguments = _text(function.get("name")), _arguments(function.get("arguments"))
    return _Piece(_index(entry.get("index")), _text(entry.get("id")), name, arguments, position)


def _index(value: Any) -> int | None:
    if isinstance(value, str) and value.isdecimal():
        value = int(value[:9])
    return value if type(value) is int and value >= 0 else None


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else "" if value is None else str(value)
    return text if text.isascii() else text.encode(errors="replace").decode()


def _arguments(value: Any) -> str:
    return _text(value) if value is None or isinstance(value, str) else orjson.dumps(value).decode()
