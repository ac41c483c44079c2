"""What is kept of responses, on every kind of store that the gateway speaks to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.access.auth import Principal
from gateway.conversations.stored_responses import StoredResponse, StoredResponses
from gateway.errors import BadRequest, NotFound
from gateway.settings.config import SessionSettings, StoreSettings
from gateway.store.client import Store
from gateway.telemetry.metrics import Metrics
from tests.support.store_server import opened_cluster, run_store

pytestmark = pytest.mark.anyio

OURS, THEIRS = Principal("KeyOne000001", tenant="ours"), Principal("KeyTwo000001", tenant="theirs")
TURN: list[Any] = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture(params=["valkey", "redis", "cluster"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    if request.param == "cluster":
        async with opened_cluster(request.getfixturevalue("cluster_port")) as store:
            yield store
        return
    with run_store(request.param, tmp_path / "s") as server:
        store = Store(StoreSettings(command_timeout_ms=2000), {"SHANNON_REDIS_URL": server.url}, Metrics())
        await store.start()
        yield store
        await store.close()


def record(response_id: str, status: str = "completed", path: list[tuple[str, int]] | None = None) -> StoredResponse:
    return StoredResponse("ours", {"id": response_id, "status": status}, [{"id": "msg_1"}], path or [])


async def test_responses_are_kept_continued_and_forgotten(store: Store) -> None:
    stored = StoredResponses(SessionSettings(max_turns=3), store, store.metrics)
    path: list[tuple[str, int]] = []
    for number in range(5):
        assert await stored.keep(record(f"resp_{number}", path=path), TURN)
        conversation = await stored.conversation(OURS, f"resp_{number}")
        path = conversation.path
    assert [response_id for response_id, _ in path] == ["resp_2", "resp_3", "resp_4"]
    assert conversation.turns == [TURN] * 3

    assert (await stored.find(OURS, "resp_4")).input == [{"id": "msg_1"}]
    for refused in (stored.find(THEIRS, "resp_4"), stored.delete(THEIRS, "resp_4"), stored.find(OURS, "resp_9")):
        with pytest.raises(NotFound):
            await refused
    with pytest.raises(BadRequest, match="not found"):
        await stored.conversation(THEIRS, "resp_4")
    await stored.delete(OURS, "resp_3")
    assert (await stored.conversation(OURS, "resp_4")).turns == [TURN]


async def test_response_that_is_made_holds_a_lease(store: Store) -> None:
    stored = StoredResponses(SessionSettings(), store, store.metrics)
    await stored.keep(record("resp_1", "in_progress"))
    assert (await stored.find(OURS, "resp_1")).status == "in_progress"
    with pytest.raises(BadRequest, match="still being made"):
        await stored.delete(OURS, "resp_1")

    await store.run("DEL", "sh:{r:resp_1}:l")
    assert (await stored.find(OURS, "resp_1")).status == "failed"
    assert await stored.renew(["resp_1"]) == set()
    assert (await stored.find(OURS, "resp_1")).status == "in_progress"
    await stored.ask_to_cancel("resp_1")
    assert await stored.renew([]) == {"resp_1"}


async def test_large_turn_is_kept_without_its_images(store: Store) -> None:
    stored = StoredResponses(SessionSettings(max_bytes=4096), store, store.metrics)
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 3000}}
    turn = [{"role": "user", "content": [{"type": "text", "text": "see"}, image]}, TURN[1]]
    await stored.keep(record("resp_1"), turn)

    (kept,) = (await stored.conversation(OURS, "resp_1")).turns
    assert kept[0]["content"] == [{"type": "text", "text": "see"}, {"type": "text", "text": "[image]"}]


async def test_deleted_response_is_not_brought_back_by_a_gateway_that_lost_its_lease(store: Store) -> None:
    stored = StoredResponses(SessionSettings(), store, store.metrics)
    for number, known in enumerate((True, False)):  # whether it knows that the store had it
        id_ = f"resp_{number}"
        await stored.keep(record(id_, "in_progress"))
        await store.run("DEL", f"sh:{{r:{id_}}}:l")
        await stored.delete(OURS, id_)
        late = record(id_)
        late.known = known
        await stored.keep(late, TURN)

        with pytest.raises(NotFound):
            await stored.find(OURS, id_)
        with pytest.raises(BadRequest, match="not found"):
            await stored.conversation(OURS, id_)


async def test_complete_response_that_was_deleted_is_not_brought_back(store: Store) -> None:
    stored = StoredResponses(SessionSettings(), store, store.metrics)
    await stored.keep(record("resp_1"), TURN)
    await stored.delete(OURS, "resp_1")
    again = record("resp_1")
    again.known = True
    await stored.keep(again, TURN)
    with pytest.raises(NotFound):
        await stored.find(OURS, "resp_1")


async def test_response_is_only_changed_by_the_gateway_that_makes_it(store: Store) -> None:
    one, other = (StoredResponses(SessionSettings(), store, store.metrics) for _ in range(2))
    await one.keep(record("resp_1", "in_progress"))
    await other.keep(record("resp_1"), TURN)
    assert (await other.find(OURS, "resp_1")).status == "in_progress"


async def test_cancellations_go_to_the_gateway_that_makes_the_response_and_expire(store: Store) -> None:
    one, other = (StoredResponses(SessionSettings(), store, store.metrics) for _ in range(2))
    await one.keep(record("resp_1", "in_progress"))
    await other.keep(record("resp_2", "in_progress"))
    for id_ in ("resp_1", "resp_2", "resp_3"):
        await one.ask_to_cancel(id_)
    keys = [f"sh:{{p:{each._process}}}:cancelled" for each in (one, other)]
    assert all([0 < await store.run("TTL", key) <= 60 for key in keys])

    assert await one.renew([]) == {"resp_1"}
    assert await other.renew([]) == {"resp_2"}
    assert [await store.run("EXISTS", key) for key in keys] == [0, 0]


async def test_response_larger_than_the_keys_room_is_not_kept(store: Store) -> None:
    stored = StoredResponses(SessionSettings(max_bytes=1024, max_bytes_per_key=2048), store, store.metrics)
    large = record("resp_1")
    large.response["output"] = "é" * 1024
    assert not await stored.keep(large)
    with pytest.raises(NotFound):
        await stored.find(OURS, "resp_1")
