"""A request that ends with an error counts once: in the metrics, in the access log, and in its key's usage.

The table goes over all kinds of errors on all kinds of routes. What the client was told is the measure.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.base import EngineDied, EngineOverloaded, EngineUnavailable, InvalidRequest
from engine.mock import Fault, MockEngine
from gateway.errors import StoreUnavailable
from tests.support.app import HELLO, KEY_ID, Gateway, Start
from tests.support.pictures import asking, data_url, picture
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
WORD = "hello"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO},
    "/v1/completions": {"prompt": WORD},
    "/v1/responses": {"input": WORD},
    "/v1/messages": {"messages": HELLO, "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": HELLO},
    "/tokenize": {"messages": HELLO},
    "/v1/embeddings": {"input": WORD},
}
"""A good body for each metered route, without its model."""
GENERATING = (CHAT, "/v1/completions", "/v1/responses", "/v1/messages")
STREAMING = [(path, stream) for path in GENERATING for stream in (False, True)]


class Books:
    """What the gateway has noted of errors so far: by code, in three places."""

    def __init__(self, gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
        self._gateway = gateway
        self._caplog = caplog

    def metric(self, name: str = "shannon_errors_total") -> Counter[str]:
        """Read a counter by its code, without a request of our own."""
        families = text_string_to_metric_families(self._gateway.services.metrics.render().decode())
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return Counter({sample.labels["code"]: int(sample.value) for sample in samples})

    def lines(self) -> list[dict[str, Any]]:
        return [record.__dict__["fields"] for record in self._caplog.records if record.name == "shannon.access"]

    def logged(self) -> Counter[str]:
        return Counter(line["error"] for line in self.lines() if "error" in line)

    async def booked(self) -> Counter[str]:
        rows = await self._gateway.services.ledger.totals(KEY_ID)
        total: Counter[str] = Counter()
        for row in rows:
            total.update(row["errors"])
        return total


def code_of(response: httpx.Response) -> str:
    """Return the code that a client was told, of whichever protocol."""
    error = response.json()["error"]
    if isinstance(error, str):  # the inspector's plain routes
        return str(response.json()["code"])
    return str(error.get("code") or error["type"])


ANTHROPIC = {
    "invalid_request_error": "invalid_request",
    "not_found_error": "model_not_found",
    "authentication_error": "invalid_api_key",
    "rate_limit_error": "rate_limit_exceeded",
    "overloaded_error": "server_overloaded",
}
"""Its errors have types alone. (code for each, as far as the table has them)"""


@pytest.fixture
def count(caplog: pytest.LogCaptureFixture) -> Callable[..., Awaitable[str]]:
    caplog.set_level(logging.INFO)

    async def count(gateway: Gateway, request: Awaitable[httpx.Response], *, in_books: bool | None = None) -> str:
        """Send a request that fails. Returns its code, once it is the only one that was noted, and once.

        `in_books` tells whether the key's usage has it as well; None where that is not looked at.
        """
        books = Books(gateway, caplog)
        before, logged = books.metric(), books.logged()
        booked = Counter[str]() if in_books is None else await books.booked()
        lines = len(books.lines())
        response = await request
        assert response.status_code >= 400, response.text
        await until(lambda: len(books.lines()) == lines + 1)
        line = books.lines()[-1]
        assert line["status"] == response.status_code
        code: str = line["error"]
        told = code_of(response)
        assert told in (code, response.json().get("error", {}).get("type")) or ANTHROPIC[told] == code
        assert books.metric() - before == Counter({code: 1})
        assert books.logged() - logged == Counter({code: 1})
        assert not books.metric("shannon_stream_failures_total"), "it was told by its status"
        if in_books is not None:
            assert await books.booked() - booked == Counter({code: 1} if in_books else {})
        return code

    return count


Count = Callable[..., Awaitable[str]]


def post(gateway: Gateway, path: str, **fields: Any) -> Awaitable[httpx.Response]:
    return gateway.client.post(path, json=BODIES[path] | {"model": "shannon-chat"} | fields)


@pytest.mark.parametrize("path", BODIES)
async def test_key_that_is_wrong(gateway: Gateway, count: Count, path: str) -> None:
    wrong = {"Authorization": "Bearer wrong"}

    assert await count(gateway, gateway.client.post(path, json=BODIES[path], headers=wrong)) == "invalid_api_key"


@pytest.mark.parametrize("path", BODIES)
async def test_body_that_is_wrong(gateway: Gateway, count: Count, path: str) -> None:
    for content in (b"{", b"[]", b"\xff"):
        sent = gateway.client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert await count(gateway, sent, in_books=False) == "invalid_request"
    assert await count(gateway, post(gateway, path, messages=5, input=5, prompt={})) == "invalid_request"


@pytest.mark.parametrize("path", BODIES)
async def test_model_that_is_unknown(gateway: Gateway, count: Count, path: str) -> None:
    assert await count(gateway, post(gateway, path, model="gpt-9"), in_books=False) == "model_not_found"


@pytest.mark.parametrize("path", BODIES)
async def test_body_that_is_too_large(start: Start, count: Count, path: str) -> None:
    gateway = await start(server={"max_body_bytes": 1024})

    assert await count(gateway, post(gateway, path, padding="x" * 2000), in_books=False) == "request_too_large"


@pytest.mark.parametrize("path", BODIES)
async def test_limit_that_is_used_up(start: Start, count: Count, path: str) -> None:
    limits = {"requests_per_minute": 1}
    gateway = await start(config={"models": {"shannon-chat": {"description": "a", "limits": limits}}})
    assert (await post(gateway, path)).status_code == 200

    assert await count(gateway, post(gateway, path), in_books=True) == "rate_limit_exceeded"


@pytest.mark.parametrize(("path", "stream"), STREAMING)
async def test_prompt_that_is_too_long(gateway: Gateway, count: Count, path: str, stream: bool) -> None:
    long = WORD + " x" * 2000
    texts: dict[str, Any] = {"messages": [{"role": "user", "content": long}], "input": long, "prompt": long}
    fields = {name: value for name, value in texts.items() if name in BODIES[path]}

    assert (
        await count(gateway, post(gateway, path, stream=stream, **fields), in_books=True) == "context_length_exceeded"
    )


@pytest.mark.parametrize(("path", "stream"), STREAMING)
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineOverloaded("full"), "server_overloaded"),
        (EngineDied("gone"), "engine_unavailable"),
        (InvalidRequest("no", "top_k"), "invalid_request"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_engine_that_fails(
    start: Start, count: Count, path: str, stream: bool, error: Exception, code: str
) -> None:
    gateway = await start(max_engine_restarts=9)
    gateway.mock.faults.append(Fault(error=error))  # type: ignore[arg-type]

    assert await count(gateway, post(gateway, path, stream=stream), in_books=True) == code


@pytest.mark.parametrize("path", BODIES)
async def test_engine_that_is_not_there(start: Start, count: Count, path: str) -> None:
    class Broken(MockEngine):
        async def start(self) -> None:
            raise EngineUnavailable("no")

    gateway = await start(mock=Broken, lazy=True)

    assert await count(gateway, post(gateway, path)) == "engine_unavailable"


@pytest.mark.parametrize("path", BODIES)
async def test_fault_of_our_own(gateway: Gateway, count: Count, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*args: Any, **options: Any) -> Any:
        raise KeyError("secret")

    for name in ("prepare", "tokenize"):
        monkeypatch.setattr(gateway.mock, name, broken)

    assert await count(gateway, post(gateway, path)) == "internal_error"


@pytest.mark.parametrize("drained", ["chat", "embeddings"])
async def test_server_that_drains(gateway: Gateway, count: Count, drained: str) -> None:
    await gateway.services.drain.run(0)

    path = CHAT if drained == "chat" else "/v1/embeddings"
    assert await count(gateway, post(gateway, path), in_books=False) == "engine_unavailable"


def seeing() -> MockEngine:
    return MockEngine(takes_images=True, max_model_len=4096)


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
@pytest.mark.parametrize(
    ("images", "code"),
    [
        ([data_url(b"hello")], "invalid_request"),
        ([data_url(picture(size=(200, 200)))], "invalid_request"),
        ([data_url(picture())] * 3, "invalid_request"),
        (["http://127.0.0.1:1/"], "invalid_request"),
        (["ftp://a.test/"], "invalid_request"),
        ([data_url(picture()), "http://127.0.0.1:1/"], "invalid_request"),
    ],
    ids=["no image", "pixels", "too many", "fetch", "scheme", "one of two"],
)
async def test_image_that_is_refused(start: Start, count: Count, path: str, images: list[str], code: str) -> None:
    gateway = await start(mock=seeing, config={"images": {"max_images": 2, "max_pixels": 1000}})

    assert await count(gateway, post(gateway, path, messages=asking(*images)), in_books=True) == code


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
async def test_image_of_a_model_that_takes_none(gateway: Gateway, count: Count, path: str) -> None:
    images = post(gateway, path, messages=asking(data_url(picture())))

    assert await count(gateway, images, in_books=True) == "invalid_request"


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
@pytest.mark.parametrize("url", ["http://127.0.0.1:1/", data_url(picture())], ids=["url", "data"])
async def test_image_of_a_key_that_is_over_its_limit(start: Start, count: Count, path: str, url: str) -> None:
    limits = {"requests_per_minute": 1}
    gateway = await start(mock=seeing, config={"models": {"shannon-chat": {"description": "a", "limits": limits}}})
    assert (await post(gateway, path)).status_code == 200

    assert await count(gateway, post(gateway, path, messages=asking(url)), in_books=True) == "rate_limit_exceeded"


@pytest.mark.parametrize("workflow", ["quick_research", "standard_research", "complex"])
@pytest.mark.parametrize("kind", ["limit", "overloaded", "tools", "too long"])
async def test_agents_that_fail(start: Start, count: Count, workflow: str, kind: str) -> None:
    model = {"description": "a", "workflow": workflow, "limits": {"requests_per_minute": 1}}
    gateway = await start(config={"models": {"shannon-chat": model, "other": {"description": "b"}}})
    fields: dict[str, Any] = {}
    if kind == "limit":
        await post(gateway, CHAT)
    elif kind == "overloaded":
        gateway.mock.faults.extend(Fault(error=EngineOverloaded("full")) for _ in range(50))
    elif kind == "tools":
        fields["tools"] = [{"type": "function", "function": {"name": "f"}}]
    else:
        fields["messages"] = [{"role": "user", "content": "x " * 5000}]

    await count(gateway, post(gateway, CHAT, **fields), in_books=True)


@pytest.mark.parametrize("path", ["/v1/sessions/x", "/v1/usage", "/admin/keys", "/v1/responses/resp_1"])
async def test_store_that_is_away(gateway: Gateway, count: Count, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*args: Any) -> Any:
        raise StoreUnavailable("gone")

    store = gateway.services.store
    lanes = [lane for lane in vars(store).values() if hasattr(lane, "run_in_order")]
    for lane in (store, *lanes):
        for name in ("run", "run_in_order", "try_in_order"):
            monkeypatch.setattr(lane, name, away)

    assert await count(gateway, gateway.client.get(path)) == "store_unavailable"


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/nowhere", "not_found"),
        ("GET", CHAT, "method_not_allowed"),
        ("DELETE", "/v1/models", "method_not_allowed"),
        ("GET", "/v1/models/gpt-9", "model_not_found"),
        ("GET", "/v1/responses/resp_1", "not_found"),
        ("GET", "/v1/sessions/none", "not_found"),
        ("GET", "/v1/chat/completions/chatcmpl-1/events", "not_found"),
    ],
)
async def test_route_that_refuses(gateway: Gateway, count: Count, method: str, path: str, code: str) -> None:
    found = await count(gateway, gateway.client.request(method, path), in_books=False)

    assert found == code or found.endswith("not_found")


async def test_host_that_is_not_served(start: Start, count: Count) -> None:
    gateway = await start(server={"allowed_hosts": ["gateway.test"]})

    refused = gateway.client.post(CHAT, json={"messages": HELLO}, headers={"Host": "evil.test"})
    assert await count(gateway, refused, in_books=False) == "invalid_request"


@pytest.mark.parametrize("path", GENERATING)
async def test_stream_that_fails_behind_its_status(serve: Start, caplog: pytest.LogCaptureFixture, path: str) -> None:
    caplog.set_level(logging.INFO)
    gateway = await serve(max_engine_restarts=9)
    books = Books(gateway, caplog)
    gateway.mock.faults.append(Fault(at_token=1, error=EngineDied("gone")))
    response = await post(gateway, path, stream=True)

    assert response.status_code == 200
    await until(lambda: len(books.lines()) == 1)
    once = Counter({"engine_unavailable": 1})
    assert books.metric() == books.logged() == books.metric("shannon_stream_failures_total") == once
    assert await books.booked() == once


async def test_resumable_stream_that_fails_behind_its_status(serve: Start, caplog: pytest.LogCaptureFixture) -> None:
    """It is made in the background; its readers are not counted."""
    caplog.set_level(logging.INFO)
    gateway = await serve(max_engine_restarts=9)
    books = Books(gateway, caplog)
    gateway.mock.faults.append(Fault(at_token=1, error=EngineDied("gone")))
    response = await post(gateway, CHAT, stream=True, resumable=True)

    assert b"engine_unavailable" in response.content
    await until(lambda: bool(books.metric()))
    once = Counter({"engine_unavailable": 1})
    assert books.metric() == books.metric("shannon_stream_failures_total") == await books.booked() == once


@pytest.mark.parametrize(("path", "stream"), STREAMING)
async def test_client_that_leaves_is_no_error(
    serve: Start, caplog: pytest.LogCaptureFixture, path: str, stream: bool
) -> None:
    caplog.set_level(logging.INFO)
    gateway = await serve()
    books = Books(gateway, caplog)
    gateway.mock.faults.append(Fault())  # hangs
    request = asyncio.ensure_future(post(gateway, path, stream=stream))
    await until(lambda: gateway.mock.unfinished_requests == 1)

    request.cancel()

    await until(lambda: len(books.lines()) == 1)
    assert books.logged() == Counter({"client_disconnected": 1}), "the log alone has it"
    assert not books.metric()
    assert not await books.booked()
