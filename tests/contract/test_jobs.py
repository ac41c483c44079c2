"""Submit and stream: jobs are answered on their client's stream in turn, on any gateway, with every token once."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from typing import Any

import pytest

from engine.base import EngineError
from engine.mock import Fault, MockEngine
from gateway.access.auth import Principal
from tests.support.app import Gateway, Start
from tests.support.job_client import JobClient, submit, submitted
from tests.support.store_server import StoreServer
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

OTHER_KEY = "another-key-of-the-tenant"
UNLIMITED: dict[str, Any] = {"limits": {"enabled": False}}
TWO_KEYS: dict[str, Any] = {
    "config": UNLIMITED | {"keys": [{"name": "other", "key_env": "OTHER"}]},
    "environment": {"OTHER": OTHER_KEY},
}


def slow() -> MockEngine:
    return MockEngine(reply=" ".join(map(str, range(1000))), token_s=0.005, max_model_len=8192)


async def assert_settled(*gateways: Gateway) -> None:
    await until(lambda: all(gateway.mock.unfinished_requests == 0 for gateway in gateways))
    for gateway in gateways:
        assert await gateway.metered() == gateway.spent()


async def test_job_is_answered_on_the_stream(serve: Start) -> None:
    gateway = await serve()
    client = JobClient("some-unique-client-identifier")
    async with client.connected(gateway):
        assert client.response is not None
        assert client.response.headers["content-type"].startswith("text/event-stream")
        answer = await submit(gateway, client.id, "What is it?", context="It is a cat.")
        job_id = answer.json()["job_id"]
        await until(lambda: client.ended(job_id))

    assert client.opened == [{"client_id": client.id, "resumed": False}]
    assert answer.status_code == 202
    assert answer.json() == {"job_id": job_id, "client_id": client.id, "position": 0}
    assert "X-RateLimit-Remaining-Tokens" in answer.headers
    assert client.names(job_id) == ["queued", "started", "token", "done"]
    assert client.text(job_id) == "You said: Context: It is a cat. What is it?"
    assert gateway.mock.requests[0].messages == [
        {"role": "user", "content": "Context:\nIt is a cat.\n\nWhat is it?"},
    ]
    assert client.of(job_id)[0][1]["position"] == 0
    done = client.of(job_id)[-1][1]
    assert done["finish_reason"] == "stop"
    assert done["usage"]["completion_tokens"] == gateway.spent().completion_tokens
    await assert_settled(gateway)


@pytest.mark.parametrize("across", [False, True], ids=["one gateway", "two gateways"])
async def test_two_hundred_jobs_of_twenty_clients_run_in_order(serve: Start, across: bool) -> None:
    gateways = [await serve(mock=lambda: MockEngine(token_s=0.001), config=UNLIMITED)]
    if across:
        gateways.append(await serve(mock=lambda: MockEngine(token_s=0.001), config=UNLIMITED))
    clients = [JobClient(f"client-{number}") for number in range(20)]
    jobs: dict[str, list[tuple[str, str]]] = {client.id: [] for client in clients}

    async def work(number: int, client: JobClient) -> None:
        async with client.connected(gateways[number % len(gateways)]):
            for turn in range(10):
                prompt = f"job {turn} of {client.id}"
                gateway = gateways[(number + turn) % len(gateways)]
                jobs[client.id].append((await submitted(gateway, client.id, prompt), prompt))
            await until(lambda: len(client.in_order()) == 10, within_s=30)

    await asyncio.gather(*(work(number, client) for number, client in enumerate(clients)))

    for client in clients:
        assert client.in_order() == [job_id for job_id, _ in jobs[client.id]]
        for job_id, prompt in jobs[client.id]:
            assert client.names(job_id) == ["queued", "started", "token", "done"]
            assert client.text(job_id) == f"You said: {prompt}"
        client.check_turns()
    await assert_settled(*gateways)
    spent = [client.of(job_id)[-1][1]["usage"] for client in clients for job_id, _ in jobs[client.id]]
    for kind in ("prompt_tokens", "completion_tokens"):
        assert sum(usage[kind] for usage in spent) == sum(getattr(gateway.spent(), kind) for gateway in gateways)


async def test_streams_cut_at_random_lose_and_repeat_nothing(serve: Start) -> None:
    chosen = random.Random(11)
    config = UNLIMITED | {"jobs": {"resume_s": 5}}
    gateways = [await serve(mock=lambda: MockEngine(token_s=0.002), config=config) for _ in range(2)]

    async def follow(client: JobClient, most: int, jobs: int) -> None:
        """Read some events, but no more than there will be."""
        reading = asyncio.create_task(client.follow(chosen.choice(gateways), most=most))
        await until(lambda: reading.done() or len(client.in_order()) == jobs, within_s=10)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert reading.cancelled() or reading.exception() is None

    async def work(client: JobClient) -> None:
        jobs: list[tuple[str, str]] = []
        await follow(client, 0, 1)
        while len(client.in_order()) < 4:
            if len(jobs) < 4:
                prompt = " ".join(f"{client.id}-{len(jobs)}-{word}" for word in range(12))
                jobs.append((await submitted(chosen.choice(gateways), client.id, prompt), prompt))
            await follow(client, chosen.randint(1, 12), len(jobs))
        assert client.in_order() == [job_id for job_id, _ in jobs]
        for job_id, prompt in jobs:
            assert client.text(job_id) == f"You said: {prompt}"
        client.check_turns()
        assert all(opened["resumed"] for opened in client.opened[1:])

    await asyncio.gather(*(work(JobClient(f"c{number}")) for number in range(8)))
    await assert_settled(*gateways)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same gateway", "other gateway"])
async def test_leaving_cancels_what_runs_and_what_waits(serve: Start, elsewhere: bool) -> None:
    config = UNLIMITED | {"jobs": {"resume_s": 0.2}}
    gateway, other = await serve(mock=slow, config=config), await serve(mock=slow, config=config)
    client = JobClient("c")
    async with client.connected(gateway):
        first = await submitted(gateway, "c")
        for _ in range(3):
            await submitted(other, "c")
        await until(lambda: len(client.text(first)) > 10)
    if elsewhere:  # the stream moves on before it is dropped for good
        async with client.connected(other):
            assert client.opened[-1]["resumed"]
            seen = len(client.events)
            await until(lambda: len(client.events) > seen + 5)
    assert gateway.mock.unfinished_requests == 1, "for a moment it may come back"

    await until(lambda: gateway.mock.unfinished_requests == 0)
    await assert_settled(gateway, other)

    assert len(gateway.mock.requests) == 1, "those that waited never ran"
    assert 0 < gateway.spent().completion_tokens < 1000
    assert other.mock.requests == []
    late = await submit(other, "c")
    assert (late.status_code, late.json()["error"]["code"]) == (404, "client_not_connected")
    assert await gateway.samples("shannon_streams_open") == {(): 0}


async def test_without_time_to_resume_leaving_cancels_at_once(serve: Start) -> None:
    gateway = await serve(mock=slow, config={"jobs": {"resume_s": 0}})
    client = JobClient("c")
    async with client.connected(gateway):
        job_id = await submitted(gateway, "c")
        await until(lambda: client.text(job_id) != "")

    await until(lambda: gateway.mock.unfinished_requests == 0, within_s=1)
    await assert_settled(gateway)


@pytest.mark.parametrize("replica", [0, 1])
async def test_closing_the_stream_by_hand_cancels_at_once(serve: Start, replica: int) -> None:
    gateways = [await serve(mock=slow), await serve(mock=slow)]
    client = JobClient("c")
    async with client.connected(gateways[0]):
        job_id = await submitted(gateways[0], "c")
        await submitted(gateways[0], "c")
        await until(lambda: client.text(job_id) != "")

        closed = await gateways[replica].client.delete("/api/v1/chat/stream/c")

        assert closed.json() == {"client_id": "c", "closed": True}
        await until(lambda: client.ends == ["closed"])
        again = await gateways[replica].client.delete("/api/v1/chat/stream/c")
        assert again.status_code == 404
    await assert_settled(*gateways)
    assert len(gateways[0].mock.requests) == 1
    fresh = JobClient("c", last=client.last)
    async with fresh.connected(gateways[replica]):
        assert fresh.opened == [{"client_id": "c", "resumed": False}]
        job_id = await submitted(gateways[0], "c", max_tokens=3)
        await until(lambda: fresh.ended(job_id))


@pytest.mark.parametrize("replica", [0, 1])
async def test_newer_stream_takes_the_place_of_the_older(serve: Start, replica: int) -> None:
    gateways = [await serve(mock=slow), await serve()]
    older, newer = JobClient("c"), JobClient("c")
    async with older.connected(gateways[0]):
        job_id = await submitted(gateways[0], "c", max_tokens=100)
        await until(lambda: older.text(job_id) != "")
        async with newer.connected(gateways[replica]):
            await until(lambda: older.ends == ["replaced"])
            await until(lambda: newer.ended(job_id))

    assert newer.opened == [{"client_id": "c", "resumed": True}]
    assert newer.names(job_id) == ["queued", "started", "token", "done"], "unfinished jobs are shown whole"
    assert newer.text(job_id).split() == [str(number) for number in range(100)]
    await assert_settled(*gateways)


async def test_new_stream_shows_no_finished_jobs(serve: Start) -> None:
    gateway = await serve()
    older, newer = JobClient("c"), JobClient("c")
    async with older.connected(gateway):
        job_id = await submitted(gateway, "c")
        await until(lambda: older.ended(job_id))
    newer.last = None
    async with newer.connected(gateway):
        assert newer.opened == [{"client_id": "c", "resumed": True}]
        newer.last = older.last
        job_id = await submitted(gateway, "c")
        await until(lambda: newer.ended(job_id))
    assert newer.in_order() == [job_id]


async def test_client_belongs_to_its_key(serve: Start) -> None:
    gateway, other = await serve(**TWO_KEYS), await serve(**TWO_KEYS)
    ours, theirs = JobClient("c"), JobClient("c")
    async with ours.connected(gateway):
        for replica in (gateway, other):
            refused = await submit(replica, "c", key=OTHER_KEY)
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "client_not_connected")
            assert "GET /api/v1/chat/stream/c" in refused.json()["error"]["message"]
            closed = await replica.client.delete(
                "/api/v1/chat/stream/c", headers={"Authorization": f"Bearer {OTHER_KEY}"}
            )
            assert closed.status_code == 404
        async with theirs.connected(other, OTHER_KEY):
            job_id = await submitted(gateway, "c", "for us")
            other_id = await submitted(gateway, "c", "for them", key=OTHER_KEY)
            await until(lambda: ours.ended(job_id) and theirs.ended(other_id))
    assert ours.text(job_id) == "You said: for us"
    assert theirs.text(other_id) == "You said: for them"
    assert not ours.of(other_id)
    assert not theirs.of(job_id)


async def test_submitting_without_a_stream_is_refused(serve: Start) -> None:
    gateway = await serve()
    refused = await submit(gateway, "nobody")
    assert refused.status_code == 404
    assert refused.json()["error"]["param"] == "client_id"
    assert refused.headers["x-should-retry"] == "false"
    assert gateway.mock.requests == []


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": None}, 400, "prompt"),
        ({"client_id": "a b"}, 400, "client_id"),
        ({"client_id": "x" * 129}, 400, "client_id"),
        ({"client_id": 7}, 400, "client_id"),
        ({"context": 7}, 400, "context"),
        ({"temperature": 3}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"model": "nothing"}, 404, "model"),
        ({"context": "x" * 2000}, 413, "context"),
    ],
)
async def test_bad_jobs_are_refused_by_name(serve: Start, fields: dict[str, Any], status: int, param: str) -> None:
    gateway = await serve(config={"jobs": {"max_job_bytes": 2000}})
    client = JobClient("c")
    async with client.connected(gateway):
        response = await submit(gateway, **({"client_id": "c"} | fields))
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


@pytest.mark.parametrize("number", ["x", "-1", "1.5", "9" * 20])
async def test_bad_last_event_id_is_refused(serve: Start, number: str) -> None:
    gateway = await serve()
    response = await gateway.client.get("/api/v1/chat/stream/c", headers={"Last-Event-ID": number})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "Last-Event-ID")
    assert (await gateway.client.get("/api/v1/chat/stream/a%20b")).status_code == 400


async def test_failures_are_events_and_the_next_job_runs(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(max_model_len=64))
    gateway.mock.faults.append(Fault(at_token=2, error=EngineError("secret detail")))
    client = JobClient("c")
    async with client.connected(gateway):
        failed = await submitted(gateway, "c", "one two three")
        too_long = await submitted(gateway, "c", "word " * 100)
        well = await submitted(gateway, "c", "three")
        await until(lambda: client.ended(well))

    assert client.in_order() == [failed, too_long, well]
    assert client.names(failed) == ["queued", "started", "token", "error"]
    assert client.of(failed)[-1][1]["error"]["code"] == "internal_error"
    assert client.of(too_long)[-1][1]["error"]["code"] == "context_length_exceeded"
    assert client.names(well)[-1] == "done"
    assert "secret" not in json.dumps(client.events)
    errors = await gateway.samples("shannon_errors_total")
    assert (errors[("internal_error",)], errors[("context_length_exceeded",)]) == (1, 1)
    await assert_settled(gateway)


async def test_jobs_count_against_the_limits(serve: Start) -> None:
    models = {"shannon-chat": {"description": "Chat", "limits": {"requests_per_minute": 1}}}
    gateway = await serve(config={"models": models})
    client = JobClient("c")
    async with client.connected(gateway):
        first, second = await submitted(gateway, "c"), await submitted(gateway, "c")
        await until(lambda: client.ended(second))
    assert client.names(first)[-1] == "done"
    error = client.of(second)[-1][1]
    assert error["error"]["code"] == "rate_limit_exceeded"
    assert 0 < error["retry_after_s"] <= 62
    assert (await gateway.chat()).status_code == 429


async def test_queue_of_a_client_is_bounded(serve: Start) -> None:
    gateway = await serve(mock=slow, config={"jobs": {"max_queued_per_client": 2}})
    client = JobClient("c")
    async with client.connected(gateway):
        positions = [(await submit(gateway, "c")).json()["position"] for _ in range(2)]
        refused = await submit(gateway, "c")
    assert positions == [0, 1]
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "job_queue_full")
    assert refused.headers["Retry-After"] == "1"


async def test_streams_of_a_key_are_bounded(serve: Start) -> None:
    gateway = await serve(config={"jobs": {"max_streams_per_key": 1}})
    first, second = JobClient("one"), JobClient("two")
    async with first.connected(gateway):
        async with second.connected(gateway):
            assert second.response is not None
            assert (second.response.status_code, second.opened) == (429, [])
        async with first.connected(gateway):
            assert len(first.opened) == 2, "the same client may come again"
    async with second.connected(gateway):
        assert len(second.opened) == 1


async def test_streams_of_a_key_that_open_at_once_are_bounded(serve: Start) -> None:
    gateway = await serve(config={"jobs": {"max_streams_per_key": 3}})
    clients = [JobClient(f"client-{number}") for number in range(12)]
    reading = [asyncio.create_task(client.follow(gateway)) for client in clients]
    await until(lambda: all(task.done() or client.opened for task, client in zip(reading, clients, strict=True)))
    for task in reading:
        task.cancel()
    await asyncio.gather(*reading, return_exceptions=True)

    statuses = [client.response.status_code for client in clients if client.response is not None]
    assert sorted(statuses) == [200] * 3 + [429] * 9


async def test_job_that_can_not_be_read_disturbs_no_other_client(
    serve: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """One of a newer gateway, perhaps."""
    gateway = await serve()
    store = gateway.services.store
    bad, good = JobClient("bad"), JobClient("good")
    async with bad.connected(gateway), good.connected(gateway):
        await store.run("RPUSH", "sh:{l:TestKey00001:bad}:q", json.dumps({"id": "job_x", "from": "tomorrow"}))
        await submit(gateway, "bad")
        await until(lambda: "could not be checked" in caplog.text)
        for _ in range(3):
            await submitted(gateway, "good")
        await until(lambda: len([name for name, *_ in good.events if name == "done"]) == 3)


async def test_idle_stream_is_ended(serve: Start) -> None:
    gateway = await serve(config={"jobs": {"max_idle_s": 0.1}})
    client = JobClient("c")
    async with client.connected(gateway):
        await until(lambda: client.ends == ["idle"])
    async with client.connected(gateway):
        assert client.opened[-1]["resumed"] is False
        job_id = await submitted(gateway, "c")
        await until(lambda: client.ended(job_id))


async def test_stream_too_far_behind_is_told_what_it_lost(serve: Start) -> None:
    gateway = await serve(
        mock=lambda: MockEngine(reply=" ".join(["x" * 2000] * 400), token_s=0.002, max_model_len=8192),
        config={"jobs": {"max_log_bytes": 262_144}},
    )
    client = JobClient("c")
    async with client.connected(gateway):
        job_id = await submitted(gateway, "c")
        await until(lambda: client.ended(job_id))
        end = client.last
    client.last, client.events = 1, []
    async with client.connected(gateway):
        await until(lambda: len(client.opened) == 3)
        assert [opened["resumed"] for opened in client.opened] == [False, True, False]
        assert (client.last, client.events) == (end, [])
        job_id = await submitted(gateway, "c", max_tokens=10)  # few, so that the reader can't be too far behind again
        await until(lambda: client.ended(job_id))


async def test_number_of_another_time_is_not_taken_for_one_of_this_log(serve: Start) -> None:
    gateway = await serve()
    first, second = JobClient("c"), JobClient("c", last=5_000)
    async with first.connected(gateway):
        job_id = await submitted(gateway, "c")
        await until(lambda: first.ended(job_id))
    async with second.connected(gateway):
        assert second.opened == [{"client_id": "c", "resumed": False}]
        job_id = await submitted(gateway, "c")
        await until(lambda: second.ended(job_id))


async def test_store_that_forgot_a_client_ends_its_stream(
    serve: Start, store_server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.durable.job_clients.RENEW_S", 0.05)
    gateway = await serve(mock=slow)
    client = JobClient("c")
    async with client.connected(gateway):
        job_id = await submitted(gateway, "c")
        await until(lambda: client.text(job_id) != "")
        store_server.client().flushall()
        await until(lambda: client.ends == ["lost"])
    await assert_settled(gateway)
    async with client.connected(gateway):
        assert client.opened[-1]["resumed"] is False
        job_id = await submitted(gateway, "c", max_tokens=3)
        await until(lambda: client.ended(job_id))


async def test_silent_stream_is_kept_alive(serve: Start) -> None:
    gateway = await serve(server={"keepalive_s": 0.01})
    async with gateway.client.stream("GET", "/api/v1/chat/stream/c") as response:
        async for line in response.aiter_lines():
            if line == ": keepalive":
                break


async def test_session_of_a_job_is_continued(serve: Start) -> None:
    gateway = await serve()
    client = JobClient("c")

    async def ask(prompt: str) -> None:
        body = {"client_id": "c", "prompt": prompt}
        response = await gateway.client.post("/api/v1/chat/submit", json=body, headers={"X-Session-ID": "s"})
        job_id = response.json()["job_id"]
        await until(lambda: client.ended(job_id))

    async with client.connected(gateway):
        await ask("my name is Ann")
        await ask("who am I")
    assert [message["content"] for message in gateway.mock.requests[-1].messages] == [
        "my name is Ann",
        "You said: my name is Ann",
        "who am I",
    ]
    ended = [fields for name, fields in client.events if name == "done"]
    assert [fields.get("session_id") for fields in ended] == ["s", None], "told when it is new"


async def test_session_that_is_deleted_while_its_jobs_wait_stays_deleted(serve: Start) -> None:
    gateway = await serve(mock=lambda: MockEngine(token_s=0.02, max_model_len=4096), config=UNLIMITED)
    client = JobClient("c")
    async with client.connected(gateway):
        jobs = []
        for number in range(3):
            body = {"client_id": "c", "prompt": f"{number} " + "word " * 20}
            response = await gateway.client.post("/api/v1/chat/submit", json=body, headers={"X-Session-ID": "s"})
            jobs.append(response.json()["job_id"])
        await until(lambda: client.text(jobs[0]) != "")
        assert (await gateway.client.delete("/v1/sessions/s")).status_code == 200
        await until(lambda: all(client.ended(job_id) for job_id in jobs), within_s=20)

    assert [client.names(job_id)[-1] for job_id in jobs] == ["done"] * 3
    assert [len(request.messages) for request in gateway.mock.requests] == [1, 1, 1], "without history"
    assert (await gateway.client.get("/v1/sessions/s")).status_code == 404


async def test_job_with_an_odd_session_is_refused(serve: Start) -> None:
    gateway = await serve()
    client = JobClient("c")
    async with client.connected(gateway):
        body = {"client_id": "c", "prompt": "hello"}
        response = await gateway.client.post("/api/v1/chat/submit", json=body, headers={"X-Session-ID": "{s}"})

    assert (response.status_code, response.json()["error"]["param"]) == (400, "X-Session-ID")


async def test_draining_gateway_hands_its_clients_on(serve: Start) -> None:
    """The running job ends where it is, those that wait run where the stream comes to next."""
    gateway, other = await serve(mock=lambda: MockEngine(token_s=0.01)), await serve()
    client = JobClient("c")
    async with client.connected(gateway):
        jobs = [await submitted(gateway, "c", f"job {number} of three") for number in range(3)]
        await until(lambda: client.text(jobs[0]) != "")
        draining = asyncio.create_task(gateway.services.drain.run(timeout_s=30))
        assert await draining == 0
        await until(lambda: client.ends == ["shutdown"])
        refused = await gateway.client.get("/api/v1/chat/stream/c")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
        assert (await submit(gateway, "c")).status_code == 503
    async with client.connected(other):
        await until(lambda: len(client.in_order()) == 3)

    assert client.in_order() == jobs
    assert [client.text(job_id) for job_id in jobs] == [f"You said: job {number} of three" for number in range(3)]
    assert (len(gateway.mock.requests), len(other.mock.requests)) == (1, 2)
    await assert_settled(gateway, other)


async def test_job_that_starts_just_before_the_drain_is_answered(serve: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = await serve()
    renewed = gateway.services.authenticator.renewed

    async def drain_and_renew(principal: Principal) -> Principal:
        gateway.services.drain.draining = True
        return await renewed(principal)

    monkeypatch.setattr(gateway.services.authenticator, "renewed", drain_and_renew)
    client = JobClient("c")
    async with client.connected(gateway):
        job = await submitted(gateway, "c", "one")
        await until(lambda: client.ended(job))

    assert client.text(job) == "You said: one"


async def test_stream_elsewhere_takes_over_from_a_draining_gateway(serve: Start) -> None:
    """The stream is on another gateway than its jobs: it need not even be opened again."""
    gateway, other = await serve(mock=lambda: MockEngine(token_s=0.01)), await serve()
    client = JobClient("c")
    async with client.connected(gateway):
        jobs = [await submitted(gateway, "c", f"job {number} of three") for number in range(3)]
        await until(lambda: client.text(jobs[0]) != "")
    async with client.connected(other):
        assert await gateway.services.drain.run(timeout_s=30) == 0
        await until(lambda: len(client.in_order()) == 3)

    assert client.in_order() == jobs
    assert (client.ends, len(client.opened)) == ([], 2)
    assert [client.text(job_id) for job_id in jobs] == [f"You said: job {number} of three" for number in range(3)]
    await assert_settled(gateway, other)


async def test_shutdown_that_can_not_wait_tells_so_on_the_stream(serve: Start) -> None:
    gateway, other = await serve(mock=slow), await serve()
    client = JobClient("c")
    async with client.connected(gateway):
        job_id = await submitted(gateway, "c")
        await until(lambda: client.text(job_id) != "")
        await gateway.services.drain.run(timeout_s=0)
    assert client.ends == ["engine_unavailable"]
    async with client.connected(other):
        await until(lambda: client.ended(job_id))
    assert "shut down" in client.of(job_id)[-1][1]["error"]["message"]
    await assert_settled(gateway)


async def test_closing_leaves_clients_to_other_gateways(start: Start, serve: Start) -> None:
    gateway, other = await serve(mock=slow), await serve()
    client = JobClient("c")
    async with client.connected(gateway):
        jobs = [await submitted(gateway, "c"), await submitted(gateway, "c")]
        await until(lambda: client.text(jobs[0]) != "")
        await gateway.services.jobs.close()
        await until(lambda: client.ends == ["shutdown"])
    assert client.in_order() == jobs[:1]
    async with client.connected(other):
        await until(lambda: client.in_order() == jobs)
    await assert_settled(gateway, other)


async def test_client_that_leaves_while_the_store_is_silent_leaves_no_traceback(
    serve: Start, store_server: StoreServer, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = await serve(config={"store": {"command_timeout_ms": 300, "breaker_s": 0.05}})
    host, port = gateway.url.removeprefix("http://").split(":")
    store_server.send(signal.SIGSTOP)
    try:
        request = f"GET /api/v1/chat/stream/c HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.key}\r\n\r\n"
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(request.encode())
        await until(lambda: bool(gateway.services.jobs._clients._tasks))
        writer.close()
        await until(lambda: gateway.requests_in_progress() == 0 and not gateway.services.jobs._clients._tasks)
    finally:
        store_server.send(signal.SIGCONT)
    assert "Traceback" not in caplog.text


async def test_store_that_is_away_is_told(serve: Start, store_server: StoreServer) -> None:
    config = {"store": {"command_timeout_ms": 200, "breaker_s": 0.05}}
    gateway = await serve(mock=lambda: MockEngine(token_s=0.002), config=config)
    client = JobClient("c")
    async with client.connected(gateway):
        job_id = await submitted(gateway, "c", " ".join(map(str, range(300))))
        await until(lambda: client.text(job_id) != "")
        store_server.send(signal.SIGSTOP)
        try:
            await until(lambda: not gateway.services.store.available)
            for response in (await submit(gateway, "c"), await gateway.client.get("/api/v1/chat/stream/d")):
                assert (response.status_code, response.json()["error"]["code"]) == (503, "store_unavailable")
            assert (await gateway.chat(max_tokens=1)).status_code == 200
            seen = len(client.events)
            await until(lambda: len(client.events) > seen + 20)
        finally:
            store_server.send(signal.SIGCONT)
        await until(lambda: client.ended(job_id))
        assert client.text(job_id).split()[2:] == [str(number) for number in range(300)]
        await until(lambda: gateway.services.store.available)
        job_id = await submitted(gateway, "c")
        await until(lambda: client.ended(job_id))
    await assert_settled(gateway)
