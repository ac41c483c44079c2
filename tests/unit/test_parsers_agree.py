"""What this server and another parser both take for requests is the same for both, byte for byte.

The other one is h11. Each refuses something that the other accepts; neither may read the same bytes differently.
"""

from __future__ import annotations

import h11
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.serving.request_body import body_of
from gateway.serving.request_head import HeadReader, Refusal
from tests.support.hostile_framings import Framing, generate

Requests = list[tuple[str, bytes, bytes]]
"""Method, target and content of each."""

FRAMINGS = [framing for framing in generate("key") if len(framing.raw) < 4_000]
SPLICES = [b"", b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b",", b"0", b"1", b"\x00", b"\x0b", b";", b"chunked", b"\xa0"]
LINES = [b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Upgrade: h2c\r\n", b"Host: y\r\n", b" x: y\r\n"]


def ours(raw: bytes) -> Requests:
    buffer = bytearray(raw)
    found: Requests = []
    try:
        while (head := HeadReader().take(buffer)) is not None:
            body, content = body_of(head), b""
            if not body.complete:
                content = body.take(buffer)
            if not body.complete:
                break
            found.append((head.method, head.target, content))
            if not head.persistent:
                break
    except Refusal:
        pass
    return found


def theirs(raw: bytes) -> tuple[Requests, bool]:
    """Return the requests, and whether it was something refused that ended them."""
    found: Requests = []
    try:
        while (request := _theirs_first(raw.removeprefix(b"\r\n"))) is not None:
            method, target, content, raw, goes_on = request
            found.append((method, target, content))
            if not goes_on:
                break
    except h11.ProtocolError:
        return found, True
    return found, False


def _theirs_first(raw: bytes) -> tuple[str, bytes, bytes, bytes, bool] | None:
    """Return the first request, what is behind it, and whether that may be another."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=2**20)
    connection.receive_data(raw)
    method, target, content = "", b"", b""
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Request):
            method, target = event.method.decode(), event.target
        elif isinstance(event, h11.Data):
            content += event.data
        elif isinstance(event, h11.EndOfMessage):
            connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            connection.send(h11.EndOfMessage())
            return method, target, content, connection.trailing_data[0], connection.our_state is h11.DONE
        else:
            return None


def assert_agreed(raw: bytes) -> None:
    mine, (other, refused) = ours(raw), theirs(raw)
    both = min(len(mine), len(other))
    assert mine[:both] == other[:both], raw
    assert both == len(mine) or refused, raw


def test_hostile_framings_are_read_alike_or_refused() -> None:
    for framing in FRAMINGS:
        assert_agreed(framing.raw)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(FRAMINGS), st.data())
def test_mutations_are_read_alike_or_refused(framing: Framing, data: st.DataObject) -> None:
    raw = framing.raw
    for _ in range(data.draw(st.integers(1, 3))):
        lines = raw.split(b"\r\n")
        if data.draw(st.booleans()):
            at = data.draw(st.integers(0, len(lines)))
            added = data.draw(st.sampled_from([*LINES, *(line + b"\r\n" for line in lines)]))
            raw = b"\r\n".join([*lines[:at], added[:-2], *lines[at:]])
        else:
            at = data.draw(st.integers(0, len(raw)))
            splice = data.draw(st.sampled_from(SPLICES) | st.binary(max_size=2))
            raw = raw[:at] + splice + raw[at + data.draw(st.integers(0, 3)) :]
    assert_agreed(raw)
