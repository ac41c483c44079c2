"""GET /v1/usage: a key sees its own spending, an admin key everybody's."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from engine.base import EngineDied
from engine.mock import Fault
from gateway.access.allowance import today
from gateway.access.keys import KeySpec
from tests.support.app import HELLO, KEY_ID, Gateway

pytestmark = pytest.mark.anyio


async def new_key(gateway: Gateway, **fields: Any) -> tuple[str, dict[str, str]]:
    """Return the id of a new key, and the header that sends it."""
    record, key = await gateway.services.keys.create(KeySpec(**({"name": "someone"} | fields)))
    return record.id, {"Authorization": f"Bearer {key}"}


async def chat_as(gateway: Gateway, headers: dict[str, str], **fields: Any) -> httpx.Response:
    return await gateway.client.post("/v1/chat/completions", json={"messages": HELLO} | fields, headers=headers)


async def test_key_sees_its_own_usage_per_model_and_day(gateway: Gateway) -> None:
    key_id, headers = await new_key(gateway)
    await gateway.chat()  # somebody else's
    await chat_as(gateway, headers)
    await chat_as(gateway, headers)
    await chat_as(gateway, headers, model="shannon-complex", stream=True)
    gateway.mock.faults.append(Fault(at_token=1, error=EngineDied("boom")))
    await chat_as(gateway, headers, model="shannon-complex")
    body = (await gateway.client.get("/v1/usage", headers=headers)).json()

    common = {"key_id": key_id, "date": today(), "cached_tokens": 0, "aborted_requests": 0, "prompt_tokens": 6}
    assert body == {
        "object": "list",
        "data": [
            common | {"model": "shannon-chat", "requests": 2, "completion_tokens": 8, "errors": {}},
            common
            | {
                "model": "shannon-complex",
                "requests": 2,
                "completion_tokens": 5,
                "errors": {"engine_unavailable": 1},
            },
        ],
    }


async def test_refused_requests_are_counted_by_code(gateway: Gateway) -> None:
    _, headers = await new_key(gateway, limits={"shannon-chat": {"requests_per_minute": 1}})
    for _ in range(3):
        await chat_as(gateway, headers)
    (row,) = (await gateway.client.get("/v1/usage", headers=headers)).json()["data"]

    assert row["errors"] == {"rate_limit_exceeded": 2}
    assert row["requests"] == 3
    assert (row["prompt_tokens"], row["completion_tokens"]) == (3, 4)


async def test_key_that_spent_nothing_has_no_rows(gateway: Gateway) -> None:
    _, headers = await new_key(gateway)

    assert (await gateway.client.get("/v1/usage", headers=headers)).json() == {"object": "list", "data": []}


@pytest.mark.parametrize("whose", [KEY_ID, "all", "UnknownKey01"])
async def test_usage_of_others_is_for_admin_keys_only(gateway: Gateway, whose: str) -> None:
    _, headers = await new_key(gateway)
    await gateway.chat()
    response = await gateway.client.get("/v1/usage", params={"key_id": whose}, headers=headers)

    assert response.status_code == 403
    assert response.json()["error"]["code"] == "admin_only"
    assert response.json()["error"]["type"] == "permission_error"


async def test_key_may_name_itself(gateway: Gateway) -> None:
    key_id, headers = await new_key(gateway)
    await chat_as(gateway, headers)
    response = await gateway.client.get("/v1/usage", params={"key_id": key_id}, headers=headers)

    assert [row["key_id"] for row in response.json()["data"]] == [key_id]


async def test_admin_sees_one_other_or_all(gateway: Gateway) -> None:
    key_id, headers = await new_key(gateway)
    await chat_as(gateway, headers)
    await gateway.chat()

    async def ids(**query: str) -> list[str]:
        data = (await gateway.client.get("/v1/usage", params=query)).raise_for_status().json()["data"]
        return [row["key_id"] for row in data]

    assert await ids() == [KEY_ID]
    assert await ids(key_id=key_id) == [key_id]
    assert await ids(key_id="all") == sorted([KEY_ID, key_id])
    assert await ids(key_id="UnknownKey01") == []


async def test_totals_over_all_keys_are_the_engines_own(gateway: Gateway) -> None:
    for _ in range(3):
        _, headers = await new_key(gateway)
        await chat_as(gateway, headers)
        await chat_as(gateway, headers, max_tokens=2, stream=True)
    data = (await gateway.client.get("/v1/usage", params={"key_id": "all"})).json()["data"]
    spent = gateway.spent()

    assert sum(row["prompt_tokens"] for row in data) == spent.prompt_tokens
    assert sum(row["completion_tokens"] for row in data) == spent.completion_tokens
