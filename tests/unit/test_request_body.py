"""The body of a request ends where its framing says, whatever the pieces it comes in, and nowhere else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.serving.request_body import MAX_CHUNK_LINE_BYTES, MAX_CHUNKS, MAX_TRAILER_BYTES, body_of
from gateway.serving.request_head import Head, Refusal

CHUNKED = Head("POST", b"/", 1, 1, [], {b"transfer-encoding": b"chunked"})
NEXT = b"GET /next HTTP/1.1\r\n"


def take(head: Head, raw: bytes, piece_bytes: int = 2**30) -> tuple[bytes, bytes, bool]:
    """Return the content, what was left, and whether the body was complete."""
    body, buffer, content = body_of(head), bytearray(), b""
    for at in range(0, len(raw), piece_bytes):
        buffer += raw[at : at + piece_bytes]
        if not body.complete:
            content += body.take(buffer)
    return content, bytes(buffer), body.complete


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 1000])
def test_measured_body_takes_its_length(piece_bytes: int) -> None:
    head = Head("POST", b"/", 1, 1, [], {b"content-length": b"5"})

    assert take(head, b"hello" + NEXT, piece_bytes) == (b"hello", NEXT, True)
    assert take(head, b"hell", piece_bytes) == (b"hell", b"", False)
    assert body_of(Head("GET", b"/", 1, 1, [])).complete


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 1000])
@pytest.mark.parametrize(
    "raw",
    [
        b"5\r\nhello\r\n0\r\n\r\n",
        b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
        b"0005\r\nhello\r\n000\r\n\r\n",
        b'5;a=b ; c="d;e"\r\nhello\r\n0;x\r\n\r\n',
        b"5 ;a\r\nhello\r\n0\r\nX-Sum: 1\r\nY:\r\n\r\n",
    ],
)
def test_chunks_are_put_together(raw: bytes, piece_bytes: int) -> None:
    assert take(CHUNKED, raw + NEXT, piece_bytes) == (b"hello", NEXT, True)


def test_size_is_hexadecimal_in_either_case() -> None:
    assert take(CHUNKED, b"A\r\n0123456789\r\na\r\n0123456789\r\n0\r\n\r\n")[0] == b"0123456789" * 2


@pytest.mark.parametrize("piece_bytes", [1, 1000])
@pytest.mark.parametrize(
    "raw",
    [
        *(
            line + b"\r\nhello\r\n0\r\n\r\n"
            for line in (b"", b"-5", b"+5", b"0x5", b"5h", b" 5", b"5 ", b"5\t", b"5,5", b"5\x00")
        ),
        b"1" * 17 + b"\r\n",
        b"5\nhello\r\n0\r\n\r\n",
        b"5\rhello\r\n0\r\n\r\n",
        b"5;a\nhello\r\n0\r\n\r\n",
        b"5;a\rb\r\nhello\r\n0\r\n\r\n",
        b"5;" + b"a" * MAX_CHUNK_LINE_BYTES,
        b"5\r\nhello0\r\n\r\n",
        b"5\r\nhello\n0\r\n\r\n",
        b"5\r\nhello\r0\r\n\r\n",
        b"5\r\nhelloo\r\n0\r\n\r\n",
        b"4\r\nhello\r\n0\r\n\r\n",
        b"0\r\n\n",
        b"0\r\nX: a\n\r\n",
        b"0\r\nX : a\r\n\r\n",
        b"0\r\nX\r\n\r\n",
        b"0\r\n X: a\r\n\r\n",
        b"0\r\nX: \x00\r\n\r\n",
        b"0\r\nContent-Length: 5\r\n\r\n",
        b"0\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"0\r\nHost: b\r\n\r\n",
        b"0\r\nAuthorization: Bearer x\r\n\r\n",
        b"0\r\nX: " + b"a" * MAX_TRAILER_BYTES,
        b"0\r\n" + b"X: a\r\n" * 257 + b"\r\n",
    ],
)
def test_broken_chunk_or_trailer_is_refused(raw: bytes, piece_bytes: int) -> None:
    with pytest.raises(Refusal):
        take(CHUNKED, raw, piece_bytes)


def test_number_of_chunks_is_bounded() -> None:
    with pytest.raises(Refusal, match="chunks"):
        take(CHUNKED, b"1\r\na\r\n" * (MAX_CHUNKS + 1))


@given(st.lists(st.binary(min_size=1, max_size=40)), st.binary(max_size=20), st.integers(1, 60))
def test_content_is_the_same_in_any_pieces(contents: list[bytes], behind: bytes, piece_bytes: int) -> None:
    raw = b"".join(b"%x\r\n%b\r\n" % (len(content), content) for content in contents) + b"0\r\n\r\n"

    assert take(CHUNKED, raw + behind, piece_bytes) == (b"".join(contents), behind, True)
