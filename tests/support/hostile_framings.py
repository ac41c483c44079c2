"""HTTP requests with doubtful framing, each with the statuses that a server may answer, and a reader of the answers.

Example:

    for framing in generate(key):
        answers = split(await exchange(gateway, framing.raw))

Each request is followed, in the same bytes, by one for `/after/<name>`, and has one for `/smuggled/<name>` hidden in
its body. The hidden request must never be processed, the following one only if the framing is beyond doubt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Framing:
    """Bytes on a new connection, and the statuses that must come before it closes."""

    name: str
    raw: bytes
    statuses: tuple[int, ...]
    """Of all answers: `/after/` is answered by 404."""

    @property
    def smuggled(self) -> str:
        return f"/smuggled/{self.name}"

    @property
    def after(self) -> str:
        return f"/after/{self.name}"


_PATH = b"/v1/chat/completions"
_REFUSED = (400,)
_SERVED = (200, 404)


def generate(key: str) -> Iterator[Framing]:
    """Yield every framing, each with a name of its own. `key` may complete chats."""
    for number, (raw, statuses) in enumerate(_all(key.encode())):
        name = f"f{number:03}"  # as long as what it replaces
        yield Framing(name, raw.replace(b"NAME", name.encode()), statuses)


def _all(key: bytes) -> Iterator[tuple[bytes, tuple[int, ...]]]:
    hidden = b"GET /smuggled/NAME HTTP/1.1\r\nHost: x\r\n\r\n"
    after = b"GET /after/NAME HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    chat = json.dumps({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}).encode()
    bearer = b"Authorization: Bearer " + key

    def request(*lines: bytes, body: bytes = b"", line: bytes = b"POST " + _PATH + b" HTTP/1.1") -> bytes:
        return b"\r\n".join([line, b"Host: x", bearer, *lines, b"", body]) + after

    def chunks(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
        return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + end

    chunked = b"Transfer-Encoding: chunked"

    # Upgrades that are not offered are ignored, and the body is read as the body.
    for upgrade in (
        b"h2c",
        b"H2C",
        b"websocket",
        b"TLS/1.0",
        b"h2c, websocket",
        b"foo/2",
        b"HTTP/3.0",
        b"",
        b"h2c\r\nUpgrade: x",
    ):
        for connection in (
            b"Upgrade",
            b"upgrade",
            b"keep-alive, Upgrade",
            b"Upgrade, HTTP2-Settings",
            b"upgrade\r\nConnection: x",
        ):
            offer = [b"Connection: " + connection, b"Upgrade: " + upgrade, b"HTTP2-Settings: AAMAAABkAAQAAP__"]
            yield request(*offer, b"Content-Length: %d" % len(chat), body=chat), _SERVED
            yield request(*offer, chunked, body=chunks(chat)), _SERVED
            blank = b"\r\n" * 40  # what a parser skips in front of a request
            yield request(*offer, chunked, body=chunks(blank, hidden)), (400, 404)
            yield request(*offer, body=b"", line=b"GET /health HTTP/1.1"), _SERVED
    for blank_lines in (100, 70_000):
        text = b"\r\n" * blank_lines + chat
        yield request(b"Connection: Upgrade", b"Upgrade: h2c", b"Content-Length: %d" % len(text), body=text), _SERVED

    # Two lengths, odd lengths, two ways to find the end.
    size = b"%d" % len(chat)
    for value in (
        b"+" + size,
        b"-" + size,
        b"0x" + size,
        size + b"," + size,
        size + b", " + size,
        size + b" 0",
        b"",
        b"a",
    ):
        yield request(b"Content-Length: " + value, body=hidden), _REFUSED
    for lines in (
        [b"Content-Length: " + size, b"Content-Length: " + size],
        [b"Content-Length: 0", b"Content-Length: " + size],
        [b"Content-Length: " + size, chunked],
        [chunked, b"Content-Length: " + size],
        [chunked, b"Content-Length: 0"],
        [b"Content-Length: 0", b"transfer-encoding: Chunked"],
        [b"Content-Length: " + b"9" * 30],
        [b"Content-Length : " + size],
        [b"Content-Length\t:" + size],
        [b" Content-Length: " + size],
        [b"X: y", b" Content-Length: " + size],
        [b"X: y", b"\tContent-Length: " + size],
        [b"Content-Length: 0\r\n " + size],
        [b"Content-Length: " + size + b"\x00"],
        [b"Content-Length: " + size + b"\x0b"],
        [b"Content-Length:\x0c" + size],
        [b"Content-Length: " + size + b"\xa0"],
        [b"Content-Length\x00: " + size],
        [b"Content\x00-Length: " + size],
        [b"X: y\nContent-Length: " + size],
        [b"X: y\rContent-Length: " + size],
        [b"Content-Length: 0\n" + chunked],
        [b": x"],
        [b"NoColon"],
        [b"\x00: x"],
        [b"Host: y"],
        [bearer],
    ):
        yield request(*lines, body=hidden), _REFUSED
    yield request(b"Content-Length: 00" + size, body=chat), _SERVED
    yield request(b"Content-Length: \t" + size + b" \t", body=chat), _SERVED
    yield request(b"content-LENGTH:" + size, body=chat), _SERVED
    yield request(b"Content_Length: 5", b"Content-Length: " + size, body=chat), _SERVED

    # Transfer codings.
    for value in (b"identity", b"gzip", b"gzip, chunked", b"chunked, gzip", b"chunked, chunked", b"chunked, identity"):
        yield request(b"Transfer-Encoding: " + value, body=chunks(hidden)), (501,)
    for value in (
        b"",
        b"x",
        b"xchunked",
        b"chunkedx",
        b"chunked;q=1",
        b'"chunked"',
        b"'chunked'",
        b"chunked,",
        b",chunked",
    ):
        yield request(b"Transfer-Encoding: " + value, body=chunks(hidden)), (501,)
    for lines in (
        [chunked, chunked],
        [chunked, b"Transfer-Encoding: identity"],
        [b"Transfer-Encoding: identity", chunked],
        [b"Transfer-Encoding : chunked"],
        [b"Transfer-Encoding\t: chunked"],
        [b" Transfer-Encoding: chunked"],
        [b"Transfer-Encoding:\x0bchunked"],
        [b"Transfer-Encoding: chunked\x00"],
        [b"Transfer-Encoding:\r\n chunked"],
        [b"Transfer-Encoding: chunked\r\n\t"],
        [b"Transfer-Encoding: chunked\n"],
        [b"X: y\nTransfer-Encoding: chunked"],
        [b"X: y\rTransfer-Encoding: chunked"],
    ):
        yield request(*lines, body=chunks(hidden)), _REFUSED
    yield request(b"TRANSFER-encoding: \tCHUNKed ", body=chunks(chat)), _SERVED
    yield request(b"Transfer_Encoding: chunked", b"Content-Length: " + size, body=chat), _SERVED
    yield request(b"TE: trailers, gzip", b"Trailer: X", chunked, body=chunks(chat, end=b"0\r\nX: y\r\n\r\n")), _SERVED

    # Chunks.
    for body in (
        chunks(*(bytes([byte]) for byte in chat)),
        b"%04x\r\n%b\r\n0000\r\n\r\n" % (len(chat), chat),
        b"%X\r\n%b\r\n0\r\n\r\n" % (len(chat), chat),
        b"%x;a=b\r\n%b\r\n0;c\r\n\r\n" % (len(chat), chat),
        b'%x ; a="b;c"\r\n%b\r\n0\r\n\r\n' % (len(chat), chat),
        chunks(chat, end=b"0\r\nX-Sum: 1\r\n\r\n"),
        chunks(b" " * 70_000, chat),
    ):
        yield request(chunked, body=body), _SERVED
    for size_line in (
        b"",
        b" ",
        b"-1",
        b"+1",
        b"0x1",
        b"g",
        b"1g",
        b" 1",
        b"1 ",
        b"1,",
        b"1 a",
        b"\x00",
        b"1\x00",
        b"f" * 17,
    ):
        yield request(chunked, body=size_line + b"\r\n" + hidden), _REFUSED
    for body in (
        b"1\na\n0\n\n",
        b"1\r\na\n0\r\n\r\n",
        b"1\r\na\r0\r\n\r\n",
        b"1\ra\r\n0\r\n\r\n",
        b"1\r\naa\r\n0\r\n\r\n",
        b"2\r\na\r\n0\r\n\r\n",
        b"1;\n\r\na\r\n0\r\n\r\n",
        b"1;a\rb\r\na\r\n0\r\n\r\n",
        b"1;a\x00\r\na\r\n0\r\n\r\n",
        b"1;" + b"a" * 300 + b"\r\na\r\n0\r\n\r\n",
        b"0\n\n",
        b"0\r\n\n",
        b"0\r\nX: y\n\r\n",
        b"0\r\nX : y\r\n\r\n",
        b"0\r\n X: y\r\n\r\n",
        b"0\r\nNoColon\r\n\r\n",
        b"0\r\nX: \x00\r\n\r\n",
        b"0\r\nContent-Length: 5\r\n\r\n",
        b"0\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"0\r\nHost: y\r\n\r\n",
        b"0\r\nX: " + b"y" * 9_000 + b"\r\n\r\n",
        b"0\r\n" + b"X: y\r\n" * 300 + b"\r\n",
        b"0\r\nAuthorization: Bearer x\r\n\r\n",
        b"0\r\n" + hidden,
    ):
        yield request(chunked, body=body + hidden), _REFUSED

    # Request lines and targets.
    for line in (
        b"POST  " + _PATH + b" HTTP/1.1",
        b"POST " + _PATH + b"  HTTP/1.1",
        b"POST\t" + _PATH + b" HTTP/1.1",
        b" POST " + _PATH + b" HTTP/1.1",
        b"POST " + _PATH + b" HTTP/1.1 ",
        b"POST " + _PATH + b" HTTP/0.9",
        b"POST " + _PATH + b" HTTP/1.10",
        b"POST " + _PATH + b" HTTP/1",
        b"POST " + _PATH + b" http/1.1",
        b"POST " + _PATH + b" HTTP /1.1",
        b"POST " + _PATH,
        b"P\x00ST " + _PATH + b" HTTP/1.1",
        b"P(ST " + _PATH + b" HTTP/1.1",
        b"POST " + _PATH + b"\x00 HTTP/1.1",
        b"POST " + _PATH + b"\x7f HTTP/1.1",
        b"POST " + _PATH + b"\xff HTTP/1.1",
        b"POST " + _PATH + b"%00 HTTP/1.1",
        b"POST " + _PATH + b"%0d%0aX:y HTTP/1.1",
        b"POST " + _PATH + b"#x HTTP/1.1",
        b"POST " + _PATH + b" HTTP/1.1\n",
        b"POST " + _PATH + b" HTTP/1.1\r",
        b"POST v1/chat/completions HTTP/1.1",
        b"POST * HTTP/1.1",
        b"CONNECT x:443 HTTP/1.1",
        b"CONNECT x HTTP/1.1",
        b"POST x:80 HTTP/1.1",
        b"POST http://u:p@x" + _PATH + b" HTTP/1.1",
        b"POST http:///v1 HTTP/1.1",
        b"POST ftp://x" + _PATH + b" HTTP/1.1",
        b"POST http://x:y" + _PATH + b" HTTP/1.1",
        b"\r\n\r\nPOST " + _PATH + b" HTTP/1.1",
        b"HTTP/1.1 200 OK",
    ):
        statuses = (505,) if line.endswith(b"HTTP/0.9") else _REFUSED
        yield request(b"Content-Length: %d" % len(hidden), body=hidden, line=line), statuses
    for version in (b"2.0", b"3.0", b"0.9", b"9.9"):
        yield request(body=hidden, line=b"POST " + _PATH + b" HTTP/" + version), (505,)
    yield b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + hidden + after, (505,)
    yield b"GET /smuggled/NAME\r\n" + after, _REFUSED
    yield b"GET /smuggled/NAME HTTP/1.1\r\n\r\n" + after, _REFUSED
    for host in (b"", b"x, y", b"x y", b"x/y", b"u@x", b"x:y", b"x:1234567", b"[::1", b"x\x00", b"x\xff"):
        yield b"GET /smuggled/NAME HTTP/1.1\r\nHost: " + host + b"\r\n\r\n" + after, _REFUSED
    length = b"Content-Length: " + size
    for line in (
        b"POST http://x" + _PATH + b" HTTP/1.1",
        b"POST HTTPS://other.test:8443" + _PATH + b"?a=b HTTP/1.1",
        b"POST " + _PATH + b"?a=http://x/%00 HTTP/1.1",
        b"POST /v1/chat%2dcompletions/../x HTTP/1.1",
        b"POST " + _PATH + b" HTTP/1.2",
        b"POST " + _PATH + b" HTTP/1.9",
        b"\r\nPOST " + _PATH + b" HTTP/1.1",
    ):
        yield request(length, body=chat, line=line), (404, 404) if b".." in line else _SERVED
    yield request(line=b"OPTIONS * HTTP/1.1"), (404, 404)

    # What ends the connection after an answer that is fine.
    yield request(length, body=chat, line=b"POST " + _PATH + b" HTTP/1.0"), (200,)
    yield request(length, b"Connection: keep-alive", body=chat, line=b"POST " + _PATH + b" HTTP/1.0"), (200,)
    yield request(chunked, body=chunks(chat), line=b"POST " + _PATH + b" HTTP/1.0"), _REFUSED
    yield b"GET /health HTTP/1.0\r\n\r\n" + after, (200,)
    for close in (b"close", b"Close", b"keep-alive, close", b"x ,\tclose ", b"keep-alive\r\nConnection: close"):
        yield request(length, b"Connection: " + close, body=chat), (200,)
    for expectation in (b"200-ok", b"", b"100-continue, x"):
        yield request(length, b"Expect: " + expectation, body=chat), (417,)
    yield request(length, b"Expect: 100-continue", body=chat), _SERVED
    wrong = b"Authorization: Bearer wrong"
    for method, path in ((b"POST", _PATH), (b"GET", b"/v1/models"), (b"POST", b"/admin/keys")):
        head = b"%b %b HTTP/1.1\r\nHost: x\r\n%b\r\n" % (method, path, wrong)
        # All of the body is there: the answer does not end the connection.
        yield head + b"Content-Length: %d\r\n\r\n%b" % (len(chat), chat) + after, (401, 404)
        # More than is read for a request that nobody reads: it does.
        flood = b" " * 1_000_000
        yield head + b"Content-Length: %d\r\n\r\n%b" % (len(flood), flood) + hidden + after, (401,)
        yield head + chunked + b"\r\n\r\n" + chunks(flood) + hidden + after, (401,)
        yield head + chunked + b"\r\n\r\nzz\r\n" + hidden + after, (401,)


def split(raw: bytes) -> list[tuple[int, bytes]]:
    """Return the answers, each with its body, that a server sent on one connection. Fails where a byte is no part of
    one, and where a status of its own, as 100, is not followed by another."""
    answers = []
    while raw:
        head, end, raw = raw.partition(b"\r\n\r\n")
        assert end, head
        first, *lines = head.split(b"\r\n")
        assert first.startswith(b"HTTP/1.1 "), first
        status = int(first[9:12])
        if status == 100:
            assert raw
            continue
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        body, raw = raw[: int(fields[b"content-length"])], raw[int(fields[b"content-length"]) :]
        assert len(body) == int(fields[b"content-length"])
        answers.append((status, body))
    return answers
