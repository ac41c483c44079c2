"""SIGHUP: new requests go by the file as it is now, running ones end as they began, whatever is in it."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from engine.mock import MockEngine
from gateway.access.keys import make_key
from gateway.serving.reload import Reload
from tests.support.app import KEY, Gateway, Start
from tests.support.frames import chunks
from tests.support.job_client import JobClient
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

CHAT = {"description": "General chat completion"}
LONG = {"ignore_eos": True, "max_tokens": 100}
"""Half a second at the speed below: longer than a reload takes."""
LIMIT = "x-ratelimit-limit-requests"


def unhurried() -> MockEngine:
    return MockEngine(token_s=0.005)


async def reload(gateway: Gateway, path: Path, **over: Any) -> None:
    """Reload the settings that the gateway runs on, with top-level ones replaced by `over`."""
    tree = gateway.services.config.model_dump(mode="json") | over
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    await Reload(gateway.app, path, {"SHANNON_BOOTSTRAP_KEY": KEY})()
    assert "shannon_config_last_reload_successful 1.0" in gateway.services.metrics.render().decode()


def limited(requests_per_minute: int) -> dict[str, Any]:
    return {"shannon-chat": CHAT | {"limits": {"requests_per_minute": requests_per_minute}}}


async def test_new_limits_hold_for_the_next_request(gateway: Gateway, tmp_path: Path) -> None:
    assert (await gateway.chat()).headers[LIMIT] == "60"

    await reload(gateway, tmp_path / "g.yaml", models=limited(2))
    response = await gateway.chat()
    assert (response.status_code, response.headers[LIMIT]) == (200, "2")
    assert response.headers["x-ratelimit-remaining-requests"] == "0", "what was spent before counts on"
    assert (await gateway.chat()).status_code == 429

    await reload(gateway, tmp_path / "g.yaml", models=limited(3))
    assert (await gateway.chat()).status_code == 200


async def test_limits_can_be_turned_off_and_on(gateway: Gateway, tmp_path: Path) -> None:
    await reload(gateway, tmp_path / "g.yaml", models=limited(1))
    assert [(await gateway.chat()).status_code for _ in range(2)] == [200, 429]

    await reload(gateway, tmp_path / "g.yaml", limits={"enabled": False})
    assert (await gateway.chat()).status_code == 200

    await reload(gateway, tmp_path / "g.yaml", limits={"enabled": True})
    assert (await gateway.chat()).status_code == 429


async def test_removed_model_is_gone_for_new_requests_and_finishes_running_ones(serve: Start, tmp_path: Path) -> None:
    gateway = await serve(mock=unhurried)
    async with gateway.stream(model="shannon-complex", **LONG) as response:
        pieces = response.aiter_raw()
        raw = await anext(pieces)
        await reload(gateway, tmp_path / "g.yaml", models={"shannon-chat": CHAT})

        gone = await gateway.chat(model="shannon-complex")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
        raw += b"".join([piece async for piece in pieces])

    assert chunks(raw)[-1]["usage"]["completion_tokens"] == 100
    assert (await gateway.metered()).completion_tokens == 100
    listed = (await gateway.client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["shannon-chat"]


async def test_running_request_keeps_the_limits_that_it_started_with(serve: Start, tmp_path: Path) -> None:
    gateway = await serve(mock=unhurried)
    whole = asyncio.create_task(gateway.chat(**LONG))
    await until(lambda: gateway.mock.counters.completion_tokens > 0)
    await reload(gateway, tmp_path / "g.yaml", models=limited(1))

    response = await whole
    assert (response.status_code, response.headers[LIMIT]) == (200, "60")
    assert response.headers["x-ratelimit-remaining-requests"] == "59"
    assert (await gateway.chat()).status_code == 429


async def test_added_model_serves(gateway: Gateway, tmp_path: Path) -> None:
    assert (await gateway.chat(model="shannon-new")).status_code == 404

    models = {"shannon-new": {"description": "New", "defaults": {"max_tokens": 2}}}
    await reload(gateway, tmp_path / "g.yaml", models=models, default_model="shannon-new")

    body = (await gateway.chat(model="shannon-new")).json()
    assert body["usage"]["completion_tokens"] == 2
    assert (await gateway.chat()).json()["model"] == "shannon-new"
    made = await gateway.client.post("/admin/keys", json={"name": "ci", "models": ["shannon-new"]})
    assert made.status_code == 201
    assert (await gateway.samples("shannon_tokens_total"))[("completion", "shannon-new")] == 4


async def test_key_that_was_removed_is_refused_and_its_stream_finishes(serve: Start, tmp_path: Path) -> None:
    key, other = tmp_path / "key", tmp_path / "other"
    key.write_text(make_key())
    other.write_text(make_key())
    gateway = await serve(mock=unhurried, config={"keys": [{"name": "ci", "key_file": str(key)}]})
    gateway.client.headers["Authorization"] = f"Bearer {key.read_text()}"
    async with gateway.stream(**LONG) as response:
        pieces = response.aiter_raw()
        raw = await anext(pieces)
        await reload(gateway, tmp_path / "g.yaml", keys=[{"name": "cd", "key_file": str(other)}])

        assert (await gateway.chat()).status_code == 401
        raw += b"".join([piece async for piece in pieces])

    assert chunks(raw)[-1]["usage"]["completion_tokens"] == 100
    gateway.client.headers["Authorization"] = f"Bearer {other.read_text()}"
    assert (await gateway.chat()).status_code == 200


async def test_mounted_key_is_rotated(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(old := make_key())
    keys = [{"name": "ci", "key_file": str(file)}]
    gateway = await start(config={"keys": keys})

    async def statuses(*candidates: str) -> list[int]:
        headers = ({"Authorization": f"Bearer {key}"} for key in candidates)
        return [(await gateway.client.get("/v1/models", headers=each)).status_code for each in headers]

    file.write_text(new := make_key())
    assert await statuses(old, new, KEY) == [200, 401, 200]
    await reload(gateway, tmp_path / "g.yaml")

    assert await statuses(old, new, KEY) == [401, 200, 200]


async def test_job_goes_by_the_settings_of_its_own_time(serve: Start, tmp_path: Path) -> None:
    """Its stream may have been open for hours."""
    gateway = await serve()
    client = JobClient("phone")
    async with client.connected(gateway):
        await reload(gateway, tmp_path / "g.yaml", models={"shannon-chat": CHAT | {"defaults": {"max_tokens": 1}}})
        job = {"client_id": "phone", "prompt": "hello there"}
        assert (await gateway.client.post("/api/v1/chat/submit", json=job)).status_code == 202
        await until(lambda: any(name == "done" for name, _ in client.events))

    (done,) = (fields for name, fields in client.events if name == "done")
    assert done["usage"]["completion_tokens"] == 1


class Gate:
    """A reload that takes until it is let through, and counts."""

    def __init__(self) -> None:
        self.begun = self.ended = 0
        self.let_through = asyncio.Event()

    async def __call__(self) -> None:
        assert self.begun == self.ended, "one at a time"
        self.begun += 1
        await self.let_through.wait()
        self.ended += 1


def hang_up() -> None:
    signal.raise_signal(signal.SIGHUP)


async def test_signals_during_a_reload_make_one_more(serve: Start) -> None:
    gate = Gate()
    gateway = await serve(reload=gate)
    hang_up()
    await until(lambda: gate.begun == 1)
    for _ in range(5):
        hang_up()
        await gateway.client.get("/health")
    gate.let_through.set()
    await until(lambda: gate.ended == 2)
    await gateway.client.get("/health")

    assert gate.begun == gate.ended == 2


async def test_signal_while_draining_is_ignored(serve: Start) -> None:
    gate = Gate()
    gateway = await serve(mock=unhurried, reload=gate)
    async with gateway.stream(**LONG) as response:
        pieces = response.aiter_raw()
        raw = await anext(pieces)
        signal.raise_signal(signal.SIGTERM)
        await until(lambda: gateway.services.drain.draining)
        hang_up()
        raw += b"".join([piece async for piece in pieces])

    assert chunks(raw)[-1]["usage"]["completion_tokens"] == 100
    assert gateway.serving is not None
    await gateway.serving
    assert gate.begun == 0


async def test_requests_never_see_half_of_a_reload(gateway: Gateway, tmp_path: Path) -> None:
    """Two catalogs, each with a model, a default and a limit of its own; every answer is of one of them."""
    sides = [
        {"models": {name: CHAT | {"limits": {"requests_per_minute": limit}}}, "default_model": name}
        for name, limit in (("shannon-even", 10_000), ("shannon-odd", 20_000))
    ]
    await reload(gateway, tmp_path / "g.yaml", **sides[0])
    answers: list[httpx.Response] = []

    async def answered(enough: int) -> None:
        await until(lambda: len(answers) >= enough)

    async def reload_in_turn() -> None:
        for number in range(1, 11):
            await reload(gateway, tmp_path / "g.yaml", **sides[number % 2])
            await answered(len(answers) + 5)  # four are on their way already

    reloads = asyncio.create_task(reload_in_turn())

    async def ask() -> None:
        while not reloads.done():
            answers.append(await gateway.chat(max_tokens=1))

    await asyncio.gather(reloads, *(ask() for _ in range(4)))

    seen = {(answer.status_code, answer.json()["model"], answer.headers[LIMIT]) for answer in answers}
    assert seen == {(200, "shannon-even", "10000"), (200, "shannon-odd", "20000")}
