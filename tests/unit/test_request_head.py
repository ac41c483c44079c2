"""The head of a request: each form of it is read in one way, or refused, whatever the pieces it comes in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.serving.request_head import MAX_FIELDS, MAX_HEAD_BYTES, Head, HeadReader, Refusal


def read(raw: bytes) -> Head:
    head = HeadReader().take(bytearray(raw))
    assert head is not None
    return head


def head_with(*lines: bytes, version: bytes = b"1.1", target: bytes = b"/x", method: bytes = b"POST") -> bytes:
    return b"\r\n".join([method + b" " + target + b" HTTP/" + version, b"Host: a.test", *lines, b"", b""])


def refusal_of(raw: bytes) -> Refusal:
    with pytest.raises(Refusal) as caught:
        HeadReader().take(bytearray(raw))
    return caught.value


def test_head_is_read_with_names_in_lower_case_and_values_trimmed() -> None:
    head = read(head_with(b"X-One:\t a b \t", b"X-Empty:", b"x-one: \xe4", target=b"/a%20b?c=%20d"))

    assert (head.method, head.path, head.raw_path, head.query) == ("POST", "/a b", b"/a%20b", b"c=%20d")
    assert head.headers == [(b"host", b"a.test"), (b"x-one", b"a b"), (b"x-empty", b""), (b"x-one", b"\xe4")]
    assert (head.length, head.chunked, head.persistent) == (0, False, True)


@pytest.mark.parametrize(
    ("line", "length", "chunked"),
    [
        (b"Content-Length: 0", 0, False),
        (b"content-length:\t12 ", 12, False),
        (b"Content-Length: 007", 7, False),
        (b"Transfer-Encoding: chunked", 0, True),
        (b"TRANSFER-ENCODING: \tCHUNKED\t", 0, True),
        (
            b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk\r\nContent-Length: 9",
            9,
            False,
        ),
        (b"Content_Length: 9\r\nTransfer_Encoding: chunked", 0, False),
    ],
)
def test_framing_of_the_body_is_what_the_head_says(line: bytes, length: int, chunked: bool) -> None:
    head = read(head_with(line))
    assert (head.length, head.chunked) == (length, chunked)


@pytest.mark.parametrize(
    "line",
    [
        *(
            b"Content-Length: " + value
            for value in (b"", b"+5", b"-5", b"0x5", b"5,5", b"5, 5", b"5 5", b"5;", b"5.0", b"\xb2")
        ),
        b"Content-Length: " + b"9" * 19,
        b"Content-Length: 5\r\nContent-Length: 5",
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 0",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        *(
            b"Transfer-Encoding: " + value
            for value in (
                b"",
                b"identity",
                b"gzip",
                b"gzip, chunked",
                b"chunked, gzip",
                b"chunked, chunked",
                b"xchunked",
            )
        ),
        *(
            b"Transfer-Encoding: " + value
            for value in (b"chunked;q=1", b'"chunked"', b"chunked,", b",chunked", b"chun ked")
        ),
        b"Transfer-Encoding:\x0bchunked",
        b"Transfer-Encoding: chunked\r\n identity",
        b"Transfer-Encoding : chunked",
        b"Content-Length : 5",
        b"Content-Length\t: 5",
        b" Content-Length: 5",
        b"X: a\r\n\tb",
        b": empty",
        b"no colon",
        b"X(: a",
        b"X\xff: a",
        b"Host: b.test",
        b"Authorization: Bearer a\r\nAuthorization: Bearer b",
        b"Expect: 200-ok",
    ],
)
def test_field_that_two_parsers_could_read_differently_is_refused(line: bytes) -> None:
    assert refusal_of(head_with(line)).status in (400, 417, 501)


@pytest.mark.parametrize("byte", [*range(0x20), 0x7F])
@pytest.mark.parametrize("where", ["name", "value", "target"])
def test_control_character_is_refused(byte: int, where: str) -> None:
    odd = bytes([byte])
    if where == "target":
        raw = head_with(target=b"/a" + odd + b"b")
    else:
        raw = head_with(b"X-a" + odd + b"b: c" if where == "name" else b"X-A: a" + odd + b"b")
    if where == "value" and odd == b"\t":
        assert read(raw).headers[1] == (b"x-a", b"a\tb")
    else:
        assert refusal_of(raw).status == 400


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\nHost: a\n\n",
        b"GET / HTTP/1.1\r\nHost: a\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n\n",
        b"GET / HTTP/1.1\r\nHost: a\r\r\n\r\n",
        b"GET / HTTP/1.1\rHost: a\r\r",
        b"\n",
        b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET /\r\n",
        b"GET / HTTP/0.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET  / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1 \r\n\r\n",
        b" GET / HTTP/1.1\r\n\r\n",
        b"GET /\tHTTP/1.1\r\n\r\n",
        b"GET / http/1.1\r\n\r\n",
        b"GET / HTTP/1.10\r\n\r\n",
        b"GET / HTTP/11\r\n\r\n",
        b"GET / HTTPS/1.1\r\n\r\n",
        b"G@T / HTTP/1.1\r\n\r\n",
        b"A" * 33 + b" / HTTP/1.1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
    ],
)
def test_request_line_or_line_break_of_another_kind_is_refused(raw: bytes) -> None:
    assert refusal_of(raw).status in (400, 505)


def test_version_decides_what_may_follow() -> None:
    assert read(head_with(version=b"1.2")).persistent
    assert not read(head_with(b"Connection: keep-alive", version=b"1.0")).persistent
    assert not read(head_with(b"Connection: x , Close")).persistent
    assert not read(head_with(b"Connection: keep-alive", b"Connection: close")).persistent
    assert refusal_of(head_with(version=b"2.0")).status == 505
    assert refusal_of(head_with(b"Transfer-Encoding: chunked", version=b"1.0")).status == 400


@pytest.mark.parametrize(
    ("target", "path", "query", "host"),
    [
        (b"http://b.test/p?q", "/p", b"q", b"b.test"),
        (b"HTTPS://b.test:8443/p", "/p", b"", b"b.test:8443"),
        (b"http://b.test", "/", b"", b"b.test"),
        (b"http://b.test?q=/", "/", b"q=/", b"b.test"),
        (b"http://[::1]:80/p", "/p", b"", b"[::1]:80"),
    ],
)
def test_absolute_target_names_the_host(target: bytes, path: str, query: bytes, host: bytes) -> None:
    head = read(head_with(target=target))
    assert (head.path, head.query, head.headers) == (path, query, [(b"host", host)])


def test_absolute_target_names_the_host_where_no_header_does() -> None:
    raw = b"GET http://b.test/p HTTP/1.0\r\nX: y\r\n\r\n"
    assert read(raw).headers == [(b"host", b"b.test"), (b"x", b"y")]


@pytest.mark.parametrize(
    "target",
    [
        b"*",
        b"x",
        b"a.test:443",
        b"http:/p",
        b"http:///p",
        b"http://u@a.test/",
        b"http://a b/",
        b"ftp://a.test/",
        b"/a#b",
        b"http://a.test/#b",
        b"http://a.test:x/",
        b"/\xc3\xa4",
        b"/a%00b",
        b"/a%0d%0ab",
        b"/a%7F",
        b"?q",
        b"\\x",
    ],
)
def test_target_of_another_form_is_refused(target: bytes) -> None:
    assert refusal_of(head_with(target=target)).status == 400


def test_asterisk_is_for_options() -> None:
    assert read(head_with(target=b"*", method=b"OPTIONS")).path == "*"


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"/admin%2Fkeys", "/admin%2Fkeys"),
        (b"/admin%2fkeys", "/admin%2Fkeys"),
        (b"/%61dmin/../keys//x", "/admin/../keys//x"),
        (b"/%C3%A4", "/ä"),
        (b"/100%", "/100%"),
    ],
)
def test_path_is_decoded_without_making_another_route(target: bytes, path: str) -> None:
    assert read(head_with(target=target)).path == path


@pytest.mark.parametrize("host", [b"", b"a b", b"a,b", b"a/b", b"u@a", b"a:b", b"a:123456", b"[::1", b"::1", b"a\xe4"])
def test_odd_host_is_refused(host: bytes) -> None:
    assert refusal_of(b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n").status == 400


def test_host_is_needed_since_http_1_1() -> None:
    assert refusal_of(b"GET / HTTP/1.1\r\n\r\n").message == "The request has no Host header."
    assert read(b"GET / HTTP/1.0\r\n\r\n").path == "/"


def test_head_is_bounded_in_bytes_and_fields() -> None:
    assert refusal_of(b"GET / HTTP/1.1\r\nX: " + b"a" * MAX_HEAD_BYTES).status == 431
    assert refusal_of(head_with(*[b"X: a"] * MAX_FIELDS)).status == 431
    assert len(read(head_with(*[b"X: a"] * (MAX_FIELDS - 1))).headers) == MAX_FIELDS


def test_one_empty_line_in_front_is_ignored() -> None:
    buffer = bytearray(b"\r\n" + head_with() + b"rest")
    head = HeadReader().take(buffer)

    assert head is not None
    assert buffer == b"rest"


@given(st.binary(max_size=80), st.data())
def test_any_bytes_are_read_the_same_in_any_pieces(noise: bytes, data: st.DataObject) -> None:
    raw = head_with(b"Content-Length: 3", b"X: y")
    at = data.draw(st.integers(0, len(raw)))
    raw = raw[:at] + noise + raw[at:]

    def outcome(pieces: list[bytes]) -> object:
        reader, buffer = HeadReader(), bytearray()
        for number, piece in enumerate(pieces):
            buffer += piece
            try:
                head = reader.take(buffer)
            except Refusal as refusal:
                return refusal.status
            if head is not None:
                return head, bytes(buffer) + b"".join(pieces[number + 1 :])
        return None

    whole, single = outcome([raw]), outcome([raw[at : at + 1] for at in range(len(raw))])
    # A piece may show that the head is wrong before the rest shows that it is wrong in another way as well.
    assert whole == single or (isinstance(whole, int) and isinstance(single, int))
