"""The same tool calls as different servers stream them. Each dialect is the deltas of a stream, in order.

Example:

    frames = [chunk(**delta) for delta in DIALECTS[dialect]]
    expected = calls_of(dialect)
"""

from __future__ import annotations

from typing import Any

CALLS: list[tuple[str, Any]] = [
    ("get_weather", {"city": "Kyoto"}),
    ("add", {"a": 1, "b": 2}),
    ("get_weather", {"n": {}}),
]
"""What all dialects but those in OTHERS say."""
NAMES = ["get_weather", "add", "now"]
_TEXTS = ['{"city": "Kyoto"}', '{"a": 1, "b": 2}', '{"n": {}}']


def _call(number: int, *, text: str | None = None, **fields: Any) -> dict[str, Any]:
    """Return a whole call; `fields` are set beside `function`, None leaves them out."""
    function = {"name": CALLS[number][0], "arguments": _TEXTS[number] if text is None else text}
    given = {"index": number, "id": f"c{number}", "type": "function", "function": function} | fields
    return {name: value for name, value in given.items() if value is not None}


def _more(text: str, **fields: Any) -> dict[str, Any]:
    """Return a later piece of a call."""
    return {"function": {"arguments": text}} | fields


def _halves(number: int) -> tuple[str, str]:
    text = _TEXTS[number]
    return text[: len(text) // 2], text[len(text) // 2 :]


def _pieces(first: Any, *rest: Any) -> list[dict[str, Any]]:
    """Return the frames of a stream in which each piece has one of its own; functions of the call's number."""
    return [{"tool_calls": [piece(number)]} for number in range(3) for piece in (first, *rest)]


def _first(number: int, **fields: Any) -> dict[str, Any]:
    return _call(number, text="", **fields)


def _named(name: str, text: str, **fields: Any) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": text}} | fields


DIALECTS: dict[str, list[dict[str, Any]]] = {
    "openai": _pieces(_first, lambda n: _more(_halves(n)[0], index=n), lambda n: _more(_halves(n)[1], index=n)),
    "whole calls in frames of their own": _pieces(_call),
    "all in one frame": [{"role": "assistant", "content": None, "tool_calls": [_call(n) for n in range(3)]}],
    "mingled": [
        {"tool_calls": [_first(n) for n in range(3)]},
        {"tool_calls": [_more(_halves(n)[0], index=n) for n in range(3)]},
        {"tool_calls": [_more(_halves(n)[1], index=n) for n in range(3)]},
    ],
    "no index, frames of their own": _pieces(lambda n: _call(n) | {"index": None}),
    "index left out, frames of their own": [
        {"tool_calls": [{k: v for k, v in _call(n).items() if k != "index"}]} for n in range(3)
    ],
    "no index, one frame": [{"tool_calls": [_call(n, index=None) for n in range(3)]}],
    "no index, pieces": _pieces(
        lambda n: _first(n, index=None), lambda n: _more(_halves(n)[0]), lambda n: _more(_halves(n)[1])
    ),
    "no index, pieces by id": _pieces(
        lambda n: _first(n, index=None),
        lambda n: _more(_halves(n)[0], id=f"c{n}"),
        lambda n: _more(_halves(n)[1], id=f"c{n}"),
    ),
    "no index, pieces by position": [
        {"tool_calls": [_first(n, index=None) for n in range(3)]},
        {"tool_calls": [_more(_halves(n)[0]) for n in range(3)]},
        {"tool_calls": [_more(_halves(n)[1]) for n in range(3)]},
    ],
    "no index, no id": _pieces(lambda n: _call(n, index=None, id=None)),
    "no index, no id, one frame": [{"tool_calls": [_call(n, index=None, id=None) for n in range(3)]}],
    "no index, no id, pieces": _pieces(
        lambda n: _first(n, index=None, id=None), lambda n: _more(_halves(n)[0]), lambda n: _more(_halves(n)[1])
    ),
    "no id": _pieces(lambda n: _call(n, id=None)),
    "null id": _pieces(lambda n: _call(n) | {"id": None}),
    "empty id": _pieces(lambda n: _call(n, id="")),
    "one id for all": _pieces(lambda n: _call(n, id="call_0")),
    "one id for all, no index": _pieces(lambda n: _call(n, id="call_0", index=None)),
    "index 0 for all": _pieces(lambda n: _call(n, index=0)),
    "index 0 for all, no id": _pieces(lambda n: _call(n, index=0, id=None)),
    "index 0 for all, pieces": _pieces(
        lambda n: _first(n, index=0), lambda n: _more(_halves(n)[0], index=0), lambda n: _more(_halves(n)[1], index=0)
    ),
    "index 0 for all, no id, pieces": _pieces(
        lambda n: _first(n, index=0, id=None),
        lambda n: _more(_halves(n)[0], index=0),
        lambda n: _more(_halves(n)[1], index=0),
    ),
    "index from 1": _pieces(lambda n: _call(n, index=n + 1)),
    "index as text": _pieces(lambda n: _call(n, index=str(n))),
    "index counts pieces": _pieces(
        lambda n: _first(n, index=3 * n),
        lambda n: _more(_halves(n)[0], index=3 * n + 1),
        lambda n: _more(_halves(n)[1], index=3 * n + 2),
    ),
    "arguments as objects": _pieces(lambda n: _call(n) | {"function": {"name": CALLS[n][0], "arguments": CALLS[n][1]}}),
    "arguments null first": _pieces(
        lambda n: _call(n) | {"function": {"name": CALLS[n][0], "arguments": None}},
        lambda n: _more(_TEXTS[n], index=n),
    ),
    "arguments whole again at the end": _pieces(
        _first,
        lambda n: _more(_halves(n)[0], index=n),
        lambda n: _more(_halves(n)[1], index=n),
        lambda n: _call(n),
    ),
    "arguments so far in each piece": _pieces(
        _first, lambda n: _more(_halves(n)[0], index=n), lambda n: _more(_TEXTS[n], index=n)
    ),
    "id and name in each piece": _pieces(
        lambda n: _call(n, text=_halves(n)[0]), lambda n: _call(n, text=_halves(n)[1])
    ),
    "empty id and name in each piece": _pieces(
        lambda n: _call(n, text=_halves(n)[0]), lambda n: _named("", _halves(n)[1], index=n, id="")
    ),
    "null id and name in each piece": _pieces(
        lambda n: _call(n, text=_halves(n)[0]),
        lambda n: {"index": n, "id": None, "type": None, "function": {"name": None, "arguments": _halves(n)[1]}},
    ),
    "name repeated without id": _pieces(
        lambda n: _call(n, text=_halves(n)[0]), lambda n: _named(CALLS[n][0], _halves(n)[1], index=n)
    ),
    "name repeated behind the end": _pieces(_call, lambda n: _named(CALLS[n][0], "", index=n, id="")),
    "name in parts": _pieces(
        lambda n: {"index": n, "id": f"c{n}", "function": {"name": CALLS[n][0][:2]}},
        lambda n: _named(CALLS[n][0][2:], "", index=n),
        lambda n: _more(_TEXTS[n], index=n),
    ),
    "name in parts, no id, no index": _pieces(
        lambda n: {"function": {"name": CALLS[n][0][:2]}},
        lambda n: _named(CALLS[n][0][2:], ""),
        lambda n: _more(_TEXTS[n]),
    ),
    "name so far": _pieces(
        lambda n: {"index": n, "id": f"c{n}", "function": {"name": CALLS[n][0][:2]}},
        lambda n: _named(CALLS[n][0], "", index=n),
        lambda n: _more(_TEXTS[n], index=n),
    ),
    "name behind the id": _pieces(
        lambda n: {"index": n, "id": f"c{n}", "type": "function"}, lambda n: _named(CALLS[n][0], _TEXTS[n], index=n)
    ),
    "id behind the name": _pieces(
        lambda n: _named(CALLS[n][0], "", index=n), lambda n: _more(_TEXTS[n], index=n, id=f"c{n}")
    ),
    "another id in each piece": _pieces(
        lambda n: _call(n, text=_halves(n)[0]), lambda n: _more(_halves(n)[1], index=n, id=f"other{n}")
    ),
    "another id in each piece, no index": _pieces(
        lambda n: _call(n, text=_halves(n)[0], index=None), lambda n: _more(_halves(n)[1], id=f"other{n}")
    ),
    "no function around": _pieces(lambda n: {"index": n, "name": CALLS[n][0], "arguments": _TEXTS[n]}),
    "call that is no list": [{"tool_calls": _call(n)} for n in range(3)],
    "null in the list": [{"tool_calls": [None, _call(n)]} for n in range(3)],
    "role and empty content in each frame": [
        {"role": "assistant", "content": "", "tool_calls": [_call(n)]} for n in range(3)
    ],
    "function_call": [
        {"function_call": {"name": "add", "arguments": ""}},
        {"function_call": {"arguments": '{"a": 1,'}},
        {"function_call": {"arguments": ' "b": 2}'}},
    ],
    "function_call, name in each": [
        {"function_call": {"name": "add", "arguments": '{"a": 1,'}},
        {"function_call": {"name": "add", "arguments": ' "b": 2}'}},
    ],
    "no arguments": [{"tool_calls": [{"index": 0, "id": "c0", "function": {"name": "now"}}]}],
    "empty arguments, no id": [{"tool_calls": [{"index": 0, "function": {"name": "now", "arguments": ""}}]}],
    "two without arguments": [
        {"tool_calls": [{"id": f"c{n}", "function": {"name": "now", "arguments": ""}}]} for n in range(2)
    ],
}
_OTHERS: dict[str, list[tuple[str, Any]]] = {
    "function_call": CALLS[1:2],
    "function_call, name in each": CALLS[1:2],
    "no arguments": [("now", {})],
    "empty arguments, no id": [("now", {})],
    "two without arguments": [("now", {}), ("now", {})],
}


def calls_of(dialect: str) -> list[tuple[str, Any]]:
    """Return the calls that a dialect says: names and parsed arguments."""
    return _OTHERS.get(dialect, CALLS)
