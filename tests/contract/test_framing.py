"""Where a request ends is never in doubt: it is served as HTTP says, or refused once and the connection closed."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

from engine.mock import MockEngine
from tests.support.app import HELLO, KEY, Gateway, Start
from tests.support.hostile_framings import generate, split
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

AUTHORIZED = f"Host: x\r\nAuthorization: Bearer {KEY}\r\n".encode()
UNLIMITED = {"limits": {"enabled": False, "failed_auth_per_minute": 100_000}}


async def connect(gateway: Gateway) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = gateway.url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def exchange(gateway: Gateway, raw: bytes) -> bytes:
    """Send bytes on a new connection, and return what comes until the server closes."""
    reader, writer = await connect(gateway)
    writer.write(raw)
    try:
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


def chat(*lines: bytes, **fields: object) -> bytes:
    body = json.dumps({"messages": HELLO} | fields).encode()
    head = [b"POST /v1/chat/completions HTTP/1.1\r\n" + AUTHORIZED[:-2], *lines, b"Content-Length: %d" % len(body)]
    return b"\r\n".join([*head, b"", body])


def asked(caplog: pytest.LogCaptureFixture) -> set[str]:
    """Return the paths without a route that were asked for."""
    records = [record for record in caplog.records if record.name == "shannon.access"]
    return {record.getMessage().split()[1] for record in records}


async def test_framings_are_served_or_refused_and_never_smuggle(serve: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    gateway = await serve(config=UNLIMITED)
    framings = list(generate(KEY))
    assert len(framings) >= 300
    wrong = []
    for framing in framings:
        answers = split(await exchange(gateway, framing.raw))
        if tuple(status for status, _ in answers) != framing.statuses:
            wrong.append((framing.raw[:300], framing.statuses, answers))
        for status, body in answers:
            error = json.loads(body).get("error")
            assert status == 200 or error["message"], framing
    assert wrong == []

    paths = asked(caplog)
    assert not [path for path in paths if path.startswith("/smuggled")]
    assert {framing.after for framing in framings if framing.statuses[-1] == 404} == {
        path for path in paths if path.startswith("/after")
    }
    assert "Traceback" not in caplog.text


async def test_client_that_offers_h2c_keeps_its_body(serve: Start) -> None:
    gateway = await serve()
    raw = chat(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__")
    head, _, body = raw.partition(b"\r\n\r\n")
    reader, writer = await connect(gateway)
    writer.write(head + b"\r\n\r\n")
    await until(lambda: gateway.requests_in_progress() == 1)
    writer.write(body + b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    (first, answer), (second, _) = split(await asyncio.wait_for(reader.read(), 10))
    writer.close()

    assert (first, second) == (200, 200)
    assert json.loads(answer)["choices"][0]["message"]["content"] == "You said: hello there"


async def test_pipelined_requests_are_answered_in_order_behind_a_stream(serve: Start) -> None:
    gateway = await serve()
    behind = b"".join(b"GET /v1/models/m%d HTTP/1.1\r\n" % number + AUTHORIZED + b"\r\n" for number in range(20))
    last = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    stream, _, rest = (await exchange(gateway, chat(stream=True) + behind + last)).partition(b"\r\n0\r\n\r\n")

    assert stream.rstrip().endswith(b"data: [DONE]")
    *found, health = split(rest)
    assert [b"'m%d'" % number in body or b"m%d" % number in body for number, (_, body) in enumerate(found)] == [
        True
    ] * 20
    assert health[0] == 200


async def test_nothing_is_parsed_behind_an_answer_that_broke_off(
    serve: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    gateway = await serve(mock=lambda: MockEngine(token_s=0.002, max_model_len=4096))
    _, writer = await connect(gateway)
    writer.write(chat(stream=True, ignore_eos=True, max_tokens=1000) + b"GET /after HTTP/1.1\r\nHost: x\r\n\r\n")
    await until(lambda: gateway.mock.counters.completion_tokens > 2)
    writer.close()
    await until(lambda: gateway.requests_in_progress() == 0)

    assert asked(caplog) == {"/v1/chat/completions"}
    assert "Traceback" not in caplog.text


async def test_flood_behind_a_running_request_is_dropped(serve: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    gateway = await serve(mock=lambda: MockEngine(token_s=0.01))
    behind = b"GET /after HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 1000 + b"\r\n\r\n"
    (answer,) = split(await exchange(gateway, chat() + behind * 500))

    assert answer[0] == 200
    assert asked(caplog) == {"/v1/chat/completions"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "behind",
    [
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /hea",
        b"\r\n",
        b"junk",
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 10_000,
    ],
    ids=["request", "half", "blank", "junk", "flood"],
)
async def test_bytes_behind_a_request_do_not_hide_that_its_client_left(
    serve: Start, caplog: pytest.LogCaptureFixture, stream: bool, behind: bytes
) -> None:
    gateway = await serve(mock=lambda: MockEngine(token_s=0.002, max_model_len=4096))
    _, writer = await connect(gateway)
    writer.write(chat(stream=stream, ignore_eos=True, max_tokens=4000) + behind)
    await until(lambda: gateway.mock.counters.completion_tokens > 2)
    writer.close()

    await until(lambda: gateway.mock.unfinished_requests == 0, within_s=2)
    await until(lambda: gateway.requests_in_progress() == 0)
    assert gateway.mock.counters.completion_tokens < 4000
    assert await gateway.metered() == gateway.spent()
    assert "Traceback" not in caplog.text
    assert "internal_error" not in caplog.text


@pytest.mark.parametrize(
    "body",
    [
        b"Content-Length: 5000\r\n\r\n" + b"x" * 5000,
        b"Content-Length: 5000000\r\n\r\n" + b"x" * 3_000_000,
        b"Content-Length: 100\r\n\r\nx",
        b"Transfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + b"x" * 4096 + b"\r\n1000\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"Expect: 100-continue\r\nContent-Length: 100\r\n\r\n",
    ],
    ids=["oversized", "flood", "half", "oversized chunks", "broken chunks", "expecting"],
)
async def test_stream_with_a_body_that_nobody_reads_notices_that_its_client_left(
    serve: Start, caplog: pytest.LogCaptureFixture, body: bytes
) -> None:
    gateway = await serve(server={"max_body_bytes": 1024, "body_timeout_s": 0.05})
    reader, writer = await connect(gateway)
    writer.write(b"GET /api/v1/chat/stream/client-1 HTTP/1.1\r\n" + AUTHORIZED + body)
    answer = await asyncio.wait_for(reader.readuntil(b"event: open"), 5)
    assert b" 200 OK\r\n" in answer
    assert b"connection: close\r\n" in answer or b"x" * 5000 in body
    writer.close()

    await until(lambda: gateway.requests_in_progress() == 0)
    assert await gateway.samples("shannon_streams_open") == {(): 0}
    assert "Traceback" not in caplog.text


async def test_refusal_before_the_body_is_delivered_while_the_client_still_sends(serve: Start) -> None:
    gateway = await serve(config=UNLIMITED)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 8000000\r\n\r\n"
    for _ in range(10):
        ((status, _),) = split(await exchange(gateway, head + b"x" * 1_000_000))
        assert status == 401


async def test_expectation_is_met_only_for_a_body_that_is_read(serve: Start) -> None:
    gateway = await serve()
    head, _, body = chat(b"Expect: 100-continue", b"Connection: close").partition(b"\r\n\r\n")
    reader, writer = await connect(gateway)
    writer.write(head + b"\r\n\r\n")
    assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5) == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(body)
    assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    writer.close()

    raw = await exchange(gateway, head.replace(KEY.encode(), b"wrong") + b"\r\n\r\n")
    assert raw.startswith(b"HTTP/1.1 401 ")
    assert b"connection: close\r\n" in raw.lower()


@pytest.mark.parametrize("stream", [False, True])
async def test_http_1_0_is_answered_without_chunks(serve: Start, stream: bool) -> None:
    gateway = await serve()
    raw = await exchange(gateway, chat(stream=stream).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
    head, _, body = raw.partition(b"\r\n\r\n")

    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    if stream:
        assert body.startswith(b"data: {")
        assert body.endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(body)["choices"]


async def test_client_that_closed_its_sending_half_is_answered(serve: Start) -> None:
    gateway = await serve()
    reader, writer = await connect(gateway)
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
    writer.write_eof()
    answers = split(await asyncio.wait_for(reader.read(), 5))
    writer.close()

    assert [status for status, _ in answers] == [200, 200, 200]


@pytest.mark.parametrize("path", ["/health", "/ready", "/", "/nowhere"])
async def test_head_is_answered_as_get_is_without_the_body(serve: Start, path: str) -> None:
    gateway = await serve()
    get = await gateway.client.get(path)
    raw = await exchange(gateway, f"HEAD {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    head, _, body = raw.partition(b"\r\n\r\n")

    assert body == b""
    if path != "/nowhere":
        assert head.startswith(b"HTTP/1.1 %d " % get.status_code)
        assert f"content-length: {len(get.content)}".encode() in head.lower()


async def test_head_of_metrics_is_answered_where_they_are_public(serve: Start) -> None:
    gateway = await serve(server={"metrics_public": True})
    assert (await gateway.client.head("/metrics", headers={"Authorization": ""})).status_code == 200


async def test_encoded_slash_makes_no_other_route(serve: Start) -> None:
    gateway = await serve()
    raw = await exchange(gateway, b"GET /v1%2Fmodels HTTP/1.1\r\n" + AUTHORIZED + b"Connection: close\r\n\r\n")
    assert raw.startswith(b"HTTP/1.1 404 ")
    raw = await exchange(gateway, b"GET /v1/models/org%2Fname HTTP/1.1\r\n" + AUTHORIZED + b"Connection: close\r\n\r\n")
    assert b"org/name" in raw
