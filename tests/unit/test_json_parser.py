"""JSON in pieces: the same values and the same errors as in one go, and no more memory than a body may take."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import hypothesis
import orjson
import pytest
from hypothesis import strategies as st

from gateway.errors import BadRequest
from gateway.exchange import json_parser, json_text
from gateway.exchange.json_text import check_nesting, check_size, is_shallow

_TEXTS = st.text(alphabet='ab,:"\\[]{} é😀\n', max_size=12)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, width=32) | _TEXTS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(_TEXTS, inner, max_size=5),
    max_leaves=40,
)
SIZE = 2**20


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut bodies of some bytes, and allow any size."""
    monkeypatch.setattr(json_text, "_PIECE_BYTES", 13)
    monkeypatch.setattr(json_text, "_FREE_BYTES", 10**9)
    monkeypatch.setattr(json_parser, "_CUT_BYTES", 17)
    monkeypatch.setattr(json_parser, "LARGE_BYTES", 0)


_settings = hypothesis.settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


@pytest.mark.usefixtures("small_pieces")
@_settings
@hypothesis.given(value=_VALUES, indented=st.booleans())
def test_pieces_make_the_same_value(value: Any, indented: bool) -> None:
    body = orjson.dumps(value, option=orjson.OPT_INDENT_2 if indented else 0)

    assert json_parser.load(body) == orjson.loads(body)


def outcome(load: Callable[[bytes], Any], body: bytes) -> Any:
    """Return a value, or what is wrong."""
    try:
        return load(body)
    except orjson.JSONDecodeError as error:
        return str(error)
    except BadRequest as error:
        return str(error).removeprefix("The request body is not valid JSON: ").removesuffix(".")


@pytest.mark.usefixtures("small_pieces")
@_settings
@hypothesis.given(value=_VALUES, seed=st.integers(0, 2**32))
def test_pieces_of_broken_json_are_refused_in_the_same_words(value: Any, seed: int) -> None:
    rng = random.Random(seed)
    body = bytearray(orjson.dumps(value))
    at = rng.randrange(len(body))
    body[at : at + rng.randrange(2)] = rng.choice([b'"', b"[", b"]", b"{", b"}", b",", b":", b"\\", b"1", b""])

    assert outcome(json_parser.load, bytes(body)) == outcome(orjson.loads, bytes(body))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    "body",
    [
        b'{"a":[1,2,3,4,5,6,7,8,9],"b":1,"a":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19]}',
        b'{"a":1,"b":2,"a":{"c":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15]},"b":[1,2,3,4,5,6,7,8,9,10,11,12]}',
        b'{"a":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24],"a":null}',
    ],
)
def test_last_of_two_equal_names_counts(body: bytes) -> None:
    assert json_parser.load(body) == orjson.loads(body)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("body", [b"[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,]", b'{"a":[1,2,3,4,5,6,7,8,9,10,11],}'])
def test_comma_at_the_end_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest, match="trailing comma"):
        json_parser.load(body)


def of(head: bytes, item: bytes, tail: bytes = b"]}") -> bytes:
    return head + b",".join([item] * (SIZE // (len(item) + 1))) + tail


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (of(b'{"model":"x","messages":[', b"[]"), "messages"),
        (of(b'{"messages":[{"content":[', b"{}", b"]}]}"), "messages"),
        (of(b'{"a":[1],"junk":[', b'{"a":1}'), "junk"),
        (of(b'{"a":{"b":{"c":1}},"junk":[', b'"ab"'), "junk"),
        (of(b'{"a":"\\"},{[","junk":[', b"[[[[]]]]"), "junk"),
        (b'{"wide":{' + b",".join(b'"%06x":1' % number for number in range(SIZE // 11)) + b"}}", "wide"),
        (b'{"a":[' + b",".join(b'{"%06x":"ab"}' % number for number in range(SIZE // 16)) + b"]}", "a"),
        (of(b"[", b"[]", b"]"), None),
    ],
    ids=["lists", "objects", "small objects", "strings", "deep", "wide", "names", "no field"],
)
def test_body_of_too_many_values_is_refused_by_the_name_of_the_field(body: bytes, name: str | None) -> None:
    with pytest.raises(BadRequest, match="too many values") as caught:
        check_size(body)

    assert caught.value.param == name
    assert caught.value.code == "too_many_values"


CALL = b'{"id":"call_00012_03","type":"function","function":{"name":"f","arguments":"{}"}}'


@pytest.mark.parametrize(
    "body",
    [
        of(b'{"messages":[{"role":"assistant","tool_calls":[', CALL, b"]}]}"),
        of(b'{"prompt":[', b"12345"),
        of(b'{"prompt":[', b"1, 2"),
        b'{"prompt":"' + b"\\u00e9" * (SIZE // 6) + b'"}',
        '{"prompt":"😀'.encode() + b"x" * SIZE + b'"}',
        orjson.dumps({"prompt": orjson.dumps([{"a": []}] * 50_000).decode()}),
        of(b'{"messages":[', b'{"role":"user","content":"Good morning. Is there any news?"}'),
    ],
    ids=["calls", "ids", "small ids", "escapes", "emoji", "JSON as text", "messages"],
)
def test_body_that_somebody_may_send_is_not_refused(body: bytes) -> None:
    check_size(body)


def test_brackets_that_do_not_match_are_no_json() -> None:
    with pytest.raises(BadRequest, match="not valid JSON"):
        json_parser.load(b'{"a":' * 100_000)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"a": "' + "[" * 1000 + '"}',
        "[" * 128 + "]" * 128,
        "[" * 128,
        "9" * 4300,
        '"' + "9" * 9000 + '"',
        "[[]" * 50,
    ],
)
def test_text_that_parsers_can_take_is_returned(text: str) -> None:
    assert check_nesting(text) is text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 129 + "]" * 129, "nested"),
        ("[" * 129, "nested"),
        ('{"\\"":' * 129 + "1" + "}" * 129, "nested"),
        ("[" * 200_000, "nested"),
        ('{"a":' + "9" * 4301 + "}", "digits"),
    ],
    ids=["deep", "cut short", "objects", "very deep", "digits"],
)
def test_text_that_would_overflow_a_parser_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_nesting(text)


@pytest.mark.parametrize("depth", [0, 1, 2, 63, 64, 65, 200])
def test_depth_counts_arrays_and_objects(depth: int) -> None:
    value: Any = 1
    for number in range(depth):
        value = [value] if number % 2 else {"a": value, "b": 2}

    assert is_shallow(value, 64) == (depth <= 64)
