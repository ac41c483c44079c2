"""/admin/keys: keys are made, shown, rotated and revoked by admin keys alone, and changes reach every gateway."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from tests.support.app import HELLO, KEY_ID, Gateway, Start
from tests.support.store_server import StoreServer, run_store
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

VOID_WITHIN_S = 1.0


async def create(gateway: Gateway, **fields: Any) -> dict[str, Any]:
    response = await gateway.client.post("/admin/keys", json={"name": "ci"} | fields)
    assert response.status_code == 201, response.text
    record: dict[str, Any] = response.json()
    return record


async def chat_with(gateway: Gateway, key: str, **fields: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return await gateway.client.post("/v1/chat/completions", json={"messages": HELLO} | fields, headers=headers)


async def get_models(gateway: Gateway, key: str) -> httpx.Response:
    return await gateway.client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})


def dump(raw: redis.Redis) -> str:
    """Return everything in the store, names and values."""
    readers: dict[str, Any] = {
        "string": raw.get,
        "hash": raw.hgetall,
        "set": raw.smembers,
        "zset": lambda name: raw.zrange(name, 0, -1, withscores=True),
    }
    return repr([(name, readers[str(raw.type(name))](name)) for name in raw.scan_iter()])


async def refused_after_s(gateway: Gateway, key: str) -> float:
    """Return how long a key was still good."""
    started = time.monotonic()
    while (await gateway.client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})).status_code != 401:
        assert time.monotonic() - started < 5, "still good"
        await asyncio.sleep(0.02)
    return time.monotonic() - started


async def test_new_key_works_and_is_shown_once(gateway: Gateway) -> None:
    made = await create(gateway, tenant="acme")
    assert re.fullmatch(rf"sk-shannon-{made['id']}-[A-Za-z0-9_-]{{43}}", made["key"])
    assert (await chat_with(gateway, made["key"])).status_code == 200

    shown = (await gateway.client.get(f"/admin/keys/{made['id']}")).json()
    listed = (await gateway.client.get("/admin/keys")).json()
    assert shown == {name: value for name, value in made.items() if name != "key"}
    assert (shown["name"], shown["tenant"], shown["admin"], shown["revoked_at"]) == ("ci", "acme", False, None)
    assert listed == {"object": "list", "data": [shown]}


async def test_only_the_hash_of_a_secret_is_stored(gateway: Gateway, store_server: StoreServer) -> None:
    made = await create(gateway)
    await chat_with(gateway, made["key"])
    rotated = (await gateway.client.post(f"/admin/keys/{made['id']}/rotate")).json()
    await chat_with(gateway, rotated["key"])
    with store_server.client() as raw:
        kept = dump(raw)

    secrets = [key.removeprefix(f"sk-shannon-{made['id']}-") for key in (made["key"], rotated["key"])]
    assert all(secret not in kept for secret in secrets)
    assert hashlib.sha256(secrets[1].encode()).hexdigest() in kept
    for path in ("/admin/keys", f"/admin/keys/{made['id']}"):
        text = (await gateway.client.get(path)).text
        assert "sha256" not in text
        assert all(secret not in text for secret in secrets)


ROUTES = [
    ("POST", "/admin/keys"),
    ("GET", "/admin/keys"),
    ("GET", f"/admin/keys/{KEY_ID}"),
    ("POST", f"/admin/keys/{KEY_ID}/rotate"),
    ("DELETE", f"/admin/keys/{KEY_ID}"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_plain_key_is_told_that_this_needs_an_admin_key(gateway: Gateway, method: str, path: str) -> None:
    made = await create(gateway)
    headers = {"Authorization": f"Bearer {made['key']}"}
    response = await gateway.client.request(method, path, json={"name": "mine", "admin": True}, headers=headers)

    assert response.status_code == 403
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("permission_error", "admin_only")
    assert len((await gateway.client.get("/admin/keys")).json()["data"]) == 1


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_no_key_is_refused(gateway: Gateway, method: str, path: str) -> None:
    response = await gateway.client.request(method, path, json={"name": "x"}, headers={"Authorization": ""})

    assert response.status_code == 401


async def test_admin_key_of_the_store_may_make_others(gateway: Gateway) -> None:
    admin = await create(gateway, admin=True)
    headers = {"Authorization": f"Bearer {admin['key']}"}
    response = await gateway.client.post("/admin/keys", json={"name": "child"}, headers=headers)

    assert response.status_code == 201


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"name": ""}, "name"),
        ({"name": None}, "name"),
        ({"name": "x" * 129}, "name"),
        ({"tenant": "a b"}, "tenant"),
        ({"tenant": "{x}"}, "tenant"),
        ({"models": "shannon-chat"}, "models"),
        ({"models": ["no-such-model"]}, "models"),
        ({"limits": {"shannon-chat": {"requests_per_minute": 0}}}, "limits.shannon-chat.requests_per_minute"),
        ({"limits": {"shannon-chat": {"rpm": 5}}}, "limits.shannon-chat.rpm"),
        ({"limits": {"no-such-model": {"requests_per_minute": 1}}}, "limits"),
        ({"max_concurrent_requests": 0}, "max_concurrent_requests"),
        ({"tokens_per_day": "many"}, "tokens_per_day"),
        ({"admin": "yes"}, "admin"),
        ({"expires_at": "2027-01-01"}, "expires_at"),
        ({"colour": "red"}, "colour"),
        ({"id": "ChosenByMe01"}, "id"),
    ],
)
async def test_invalid_field_is_refused_by_name(gateway: Gateway, fields: dict[str, Any], param: str) -> None:
    response = await gateway.client.post("/admin/keys", json={"name": "ci"} | fields)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert (await gateway.client.get("/admin/keys")).json()["data"] == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"'])
async def test_body_that_is_no_object_is_a_bad_request(gateway: Gateway, body: bytes) -> None:
    response = await gateway.client.post("/admin/keys", content=body)

    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("method", "path"), [r for r in ROUTES if KEY_ID in r[1]])
async def test_unknown_id_is_not_found(gateway: Gateway, method: str, path: str) -> None:
    response = await gateway.client.request(method, path)

    assert response.status_code == 404
    assert response.json()["error"]["param"] == "key_id"


async def test_expired_key_is_refused(gateway: Gateway) -> None:
    made = await create(gateway, expires_at=int(time.time()) - 1)
    assert (await chat_with(gateway, made["key"])).status_code == 401


async def test_key_expires_while_it_is_cached(gateway: Gateway) -> None:
    made = await create(gateway, expires_at=int(time.time()) + 2)
    assert (await chat_with(gateway, made["key"])).status_code == 200

    assert await refused_after_s(gateway, made["key"]) < 2.5


async def test_key_may_use_its_own_models_only(gateway: Gateway) -> None:
    made = await create(gateway, models=["shannon-complex"])
    allowed = await chat_with(gateway, made["key"], model="shannon-complex")
    refused = await chat_with(gateway, made["key"], model="shannon-chat")

    assert allowed.status_code == 200
    assert refused.status_code == 403
    error = refused.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("permission_error", "model_not_allowed", "model")
    listed = await gateway.client.get("/v1/models", headers={"Authorization": f"Bearer {made['key']}"})
    assert [model["id"] for model in listed.json()["data"]] == ["shannon-complex"]


async def test_own_limits_of_a_key_take_effect(gateway: Gateway) -> None:
    made = await create(gateway, limits={"shannon-chat": {"requests_per_minute": 1, "tokens_per_minute": 77}})
    response = await chat_with(gateway, made["key"])
    assert response.headers["x-ratelimit-limit-requests"] == "1"
    assert response.headers["x-ratelimit-limit-tokens"] == "77"
    assert (await chat_with(gateway, made["key"])).status_code == 429

    other = await chat_with(gateway, made["key"], model="shannon-complex")
    assert other.headers["x-ratelimit-limit-requests"] == "60"


async def test_daily_budget_of_a_key_takes_effect(gateway: Gateway) -> None:
    made = await create(gateway, tokens_per_day=20)
    statuses = [(await chat_with(gateway, made["key"], max_tokens=10)).status_code for _ in range(4)]

    assert statuses == [200, 200, 429, 429], "7 tokens each are spent of 20, and 13 must be free"


async def test_revoked_and_rotated_keys_are_void_within_a_second_on_every_gateway(serve: Start) -> None:
    here, there = await serve(), await serve()
    revoked, rotated, kept = await create(here), await create(here), await create(here)
    for made in (revoked, rotated, kept):
        for gateway in (here, there):
            assert (await chat_with(gateway, made["key"])).status_code == 200

    await here.client.delete(f"/admin/keys/{revoked['id']}")
    new = (await here.client.post(f"/admin/keys/{rotated['id']}/rotate")).json()
    took_s = await asyncio.gather(
        *(refused_after_s(gateway, made["key"]) for gateway in (here, there) for made in (revoked, rotated))
    )

    assert max(took_s) < VOID_WITHIN_S
    for gateway in (here, there):
        assert (await chat_with(gateway, new["key"])).status_code == 200
        assert (await chat_with(gateway, kept["key"])).status_code == 200
    shown = (await there.client.get(f"/admin/keys/{revoked['id']}")).json()
    assert shown["revoked_at"] is not None


async def test_rotating_a_revoked_key_does_not_revive_it(gateway: Gateway) -> None:
    made = await create(gateway)
    await gateway.client.delete(f"/admin/keys/{made['id']}")
    rotated = await gateway.client.post(f"/admin/keys/{made['id']}/rotate")

    assert rotated.status_code == 409
    error = rotated.json()["error"]
    assert (error["code"], error["param"]) == ("key_revoked", "key_id")
    assert rotated.headers["x-should-retry"] == "false"
    assert (await chat_with(gateway, made["key"])).status_code == 401


async def test_administration_waits_longer_than_a_request_would(start: Start) -> None:
    """On a small busy machine the store now and then takes longer than a request waits for it."""
    gateway = await start(config={"store": {"command_timeout_ms": 1, "bulk_timeout_ms": 5000}})
    lane = gateway.services.store.patient
    send = lane._send

    async def slowly(commands: list[Any]) -> Any:
        await asyncio.sleep(0.05)
        return await send(commands)

    lane._send = slowly  # type: ignore[method-assign]
    made = await create(gateway)
    for method, path in (("GET", ""), ("GET", f"/{made['id']}"), ("POST", f"/{made['id']}/rotate")):
        response = await gateway.client.request(method, f"/admin/keys{path}")
        assert response.status_code == 200, response.text


async def test_revoking_twice_keeps_the_first_time(gateway: Gateway) -> None:
    made = await create(gateway)
    first = (await gateway.client.delete(f"/admin/keys/{made['id']}")).json()
    second = (await gateway.client.delete(f"/admin/keys/{made['id']}")).json()

    assert first["revoked_at"] == second["revoked_at"] is not None


async def test_cached_key_outlives_its_store_and_unknown_ones_are_asked_to_wait(serve: Start, tmp_path: Path) -> None:
    with run_store("valkey", tmp_path / "own") as own:
        store = {"data_dir": str(tmp_path / "data"), "auth_cache_ttl_s": 1.0, "breaker_s": 0.02}
        gateway = await serve(environment={"SHANNON_REDIS_URL": own.url}, config={"store": store})
        seen, unseen = await create(gateway), await create(gateway)
        assert (await chat_with(gateway, seen["key"])).status_code == 200
        # Once the gateway has seen that keys were made, nothing voids its cache any more.
        await until(lambda: gateway.services.authenticator._version == "2")
        assert (await chat_with(gateway, seen["key"])).status_code == 200
        own.stop()

        assert (await chat_with(gateway, seen["key"])).status_code == 200
        unknown = await chat_with(gateway, unseen["key"])
        assert unknown.status_code == 503
        assert "retry-after" in unknown.headers
        assert (await gateway.chat()).status_code == 200, "keys from the environment need no store"
        admin = await gateway.client.post("/admin/keys", json={"name": "x"})
        assert (admin.status_code, admin.json()["error"]["code"]) == (503, "store_unavailable")
        started = time.monotonic()
        while (await chat_with(gateway, seen["key"])).status_code == 200:
            assert time.monotonic() - started < 3
            await asyncio.sleep(0.05)
        assert (await chat_with(gateway, seen["key"])).status_code == 503

        own.start()
        await until(lambda: gateway.services.store.available)
        assert (await chat_with(gateway, seen["key"])).status_code == 200


async def test_guessing_is_slowed_down_but_not_for_keys_used_from_there_before(start: Start) -> None:
    gateway = await start(config={"limits": {"failed_auth_per_minute": 5}})
    used, late = await create(gateway), await create(gateway)
    assert (await chat_with(gateway, used["key"])).status_code == 200
    guesses = [await chat_with(gateway, f"wrong-wrong-wrong-{number}") for number in range(8)]

    assert [guess.status_code for guess in guesses] == [401] * 5 + [429] * 3
    assert 0 < int(guesses[-1].headers["retry-after-ms"]) <= 12_000
    assert guesses[-1].headers["x-should-retry"] == "true"
    assert (await chat_with(gateway, late["key"])).status_code == 429
    assert (await chat_with(gateway, used["key"])).status_code == 200


async def test_key_that_is_used_between_guesses_works_on(start: Start) -> None:
    gateway = await start(config={"limits": {"failed_auth_per_minute": 5}})
    used = await create(gateway)
    for number in range(8):
        await chat_with(gateway, f"wrong-wrong-wrong-{number}")
        assert (await chat_with(gateway, used["key"])).status_code == 200


async def test_key_that_was_revoked_and_is_sent_on_locks_nobody_out(serve: Start) -> None:
    """It was known to be good at its address, so its requests are looked up."""
    gateway = await serve(config={"limits": {"failed_auth_per_minute": 60, "enabled": False}})
    lost, fresh = await create(gateway), await create(gateway)
    assert (await get_models(gateway, lost["key"])).status_code == 200
    await gateway.client.delete(f"/admin/keys/{lost['id']}")
    async with asyncio.timeout(5):
        while (await get_models(gateway, lost["key"])).status_code == 200:
            pass
    statuses = [(await get_models(gateway, lost["key"])).status_code for _ in range(300)]

    assert statuses[-1] == 429
    refused = await get_models(gateway, fresh["key"])
    assert refused.status_code == 200 or int(refused.headers["retry-after-ms"]) <= 1000, "one guess more is due"


async def test_guesses_at_once_lock_an_address_out_for_two_minutes_at_most(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await start(config={"limits": {"failed_auth_per_minute": 5}})
    fresh = await create(gateway)
    keys = gateway.services.authenticator._keys
    find, waiting = keys.find, 0

    async def find_together(key_id: str) -> Any:
        nonlocal waiting
        waiting += 1
        await until(lambda: waiting == 60)
        return await find(key_id)

    monkeypatch.setattr(keys, "find", find_together)
    await asyncio.gather(*(get_models(gateway, f"wrong-wrong-wrong-{number}") for number in range(60)))

    assert int((await get_models(gateway, fresh["key"])).headers["retry-after"]) <= 120


async def test_address_of_many_clients_remembers_all_their_keys(start: Start) -> None:
    gateway = await start(config={"limits": {"failed_auth_per_minute": 5}})
    keys = [(await create(gateway))["key"] for _ in range(100)]
    assert {(await get_models(gateway, key)).status_code for key in keys} == {200}
    for number in range(8):
        await get_models(gateway, f"wrong-wrong-wrong-{number}")

    assert {(await get_models(gateway, key)).status_code for key in keys} == {200}
