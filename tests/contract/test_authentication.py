"""Every route outside a short public list demands a key, and no key is ever logged."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.routing import BaseRoute, Mount, Route

from tests.support.app import HELLO, KEY, KEY_ID, SECRET, Gateway, Start

pytestmark = pytest.mark.anyio

PUBLIC = {"/health", "/ready", "/", "/web/shannon-chat/shannon-chat"}
"""The last two are the page, and the files that it is made of."""


def routes(of: list[BaseRoute], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (method, path) of every route, with path parameters filled in."""
    for route in of:
        if isinstance(route, Mount):
            yield from routes(route.routes, prefix + route.path)
            continue
        assert isinstance(route, Route), f"{route!r}: how is it protected?"
        path = prefix + re.sub(r"\{[^}]+\}", "shannon-chat", route.path)
        for method in route.methods or ():
            yield method, path


async def test_walk_finds_the_routes(gateway: Gateway) -> None:
    assert {
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/shannon-chat"),
        ("GET", "/metrics"),
        ("GET", "/health"),
    } <= set(routes(gateway.app.routes))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer sk-shannon-wrong"},
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": f"Bearer sk-shannon-{KEY_ID}-{'A' * 43}"},
        {"X-API-Key": "wrong"},
        {"Cookie": f"key={KEY}"},
    ],
    ids=["none", "wrong", "no-scheme", "basic", "right-id", "wrong-x-api-key", "cookie"],
)
async def test_every_route_but_the_public_ones_demands_a_key(start: Start, headers: dict[str, str]) -> None:
    gateway = await start(config={"limits": {"failed_auth_per_minute": 1000}})  # there are more routes than guesses
    del gateway.client.headers["Authorization"]
    statuses = {
        (method, path): (await gateway.client.request(method, path, headers=headers)).status_code
        for method, path in routes(gateway.app.routes)
    }

    open_to_all = {path for (_, path), status in statuses.items() if status != 401}
    assert open_to_all == PUBLIC
    assert gateway.mock.requests == []


async def test_every_route_answers_to_a_key(start: Start) -> None:
    gateway = await start(config={"jobs": {"max_idle_s": 0.01}})  # a stream of jobs would not end by itself
    for method, path in routes(gateway.app.routes):
        response = await gateway.client.request(method, path, json={"messages": HELLO} if method == "POST" else None)

        # Some find nothing under the made-up path or name in the body, but all have let the key in.
        assert response.status_code in (200, 400, 404), (method, path)


async def test_metrics_are_public_by_switch(start: Start) -> None:
    gateway = await start(server={"metrics_public": True})
    del gateway.client.headers["Authorization"]

    assert (await gateway.client.get("/metrics")).status_code == 200
    assert (await gateway.client.get("/v1/models")).status_code == 401


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 403),
        ({"models": []}, 403),
        ({"metrics": True}, 200),
        ({"metrics": True, "models": []}, 200),
        ({"admin": True}, 200),
    ],
)
@pytest.mark.parametrize("origin", ["store", "configuration"])
async def test_metrics_are_for_admin_keys_and_keys_that_may_read_them(
    start: Start, fields: dict[str, Any], status: int, origin: str
) -> None:
    secret = "a-key-of-twenty-characters-or-more"
    keys = [{"name": "scraper", "key_env": "SCRAPER", **fields}] if origin == "configuration" else []
    gateway = await start(config={"keys": keys}, environment={"SCRAPER": secret})
    if origin == "store":
        answer = await gateway.client.post("/admin/keys", json={"name": "scraper", **fields})
        secret = answer.raise_for_status().json()["key"]
    gateway.client.headers["Authorization"] = f"Bearer {secret}"

    answer = await gateway.client.get("/metrics")
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]["code"] == "metrics_not_allowed"
    assert status == 200 or "shannon_" not in answer.text


async def test_key_is_checked_before_the_body_is_read(gateway: Gateway) -> None:
    del gateway.client.headers["Authorization"]

    async def untouched() -> Any:
        pytest.fail("the body was read")
        yield b""

    response = await gateway.client.post("/v1/chat/completions", content=untouched())

    assert response.status_code == 401


async def test_key_in_the_query_is_not_a_key(gateway: Gateway) -> None:
    del gateway.client.headers["Authorization"]

    assert (await gateway.client.get(f"/v1/models?api_key={KEY}&key={KEY}")).status_code == 401


@pytest.mark.parametrize(
    "headers", [{"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY}], ids=["bearer", "x-api-key"]
)
async def test_either_header_opens_the_api(gateway: Gateway, headers: dict[str, str]) -> None:
    del gateway.client.headers["Authorization"]

    assert (await gateway.client.get("/v1/models", headers=headers)).status_code == 200


async def test_configured_key_is_let_in_within_its_models(start: Start) -> None:
    key = "a-key-chosen-by-hand-1"
    gateway = await start(
        config={"keys": [{"name": "ci", "key_env": "CI_KEY", "models": ["shannon-complex"]}]},
        environment={"CI_KEY": key},
    )
    gateway.client.headers["Authorization"] = f"Bearer {key}"

    assert (await gateway.chat(model="shannon-complex")).status_code == 200
    assert (await gateway.chat(model="shannon-chat")).status_code == 403
    assert (await gateway.chat()).status_code == 403


async def test_keys_are_never_logged(serve: Start, caplog: pytest.LogCaptureFixture) -> None:
    # The test's own client would log the headers that it sends.
    for name in ("httpx", "httpcore"):
        caplog.set_level(logging.WARNING, name)
    caplog.set_level(logging.DEBUG)
    gateway = await serve()
    wrong = f"sk-shannon-{KEY_ID}-{'W' * 43}"

    await gateway.chat()
    await gateway.chat(stream=True)
    await gateway.chat(temperature=9)
    responses: list[httpx.Response] = []
    for headers in ({"Authorization": f"Bearer {wrong}"}, {"X-API-Key": wrong}, {"Authorization": f"Basic {wrong}"}):
        gateway.client.headers.pop("Authorization", None)
        responses.append(await gateway.client.get(f"/v1/models?key={wrong}", headers=headers))

    for path in (
        f"/{wrong}/v1/models",
        f"/v1/nothing/{wrong}",
        f"/v1/models/{wrong}",
        f"/%73{wrong[1:]}",
        "/" + "W" * 20,
    ):
        responses.append(await gateway.client.get(path))

    assert {response.status_code for response in responses} == {401, 404}
    assert all("WWWW" not in response.text for response in responses)
    lines = [record.__dict__["fields"] for record in caplog.records if record.name == "shannon.access"]
    assert [line.get("key_id") for line in lines] == [KEY_ID] * 3 + [None] * 8, "the id is logged"
    assert SECRET not in str(lines)
    assert "WWWW" not in str(lines)
    assert SECRET not in caplog.text
    assert "WWWW" not in caplog.text
