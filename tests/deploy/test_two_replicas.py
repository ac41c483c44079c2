"""Two replicas behind nginx as the chart's Ingress sets it up: sessions stay, and what one began the other knows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.deploy.cluster import Cluster, run_cluster
from tests.support.gateway_process import UNLIMITED
from tests.support.taken import Taken

pytestmark = pytest.mark.slow

TREE: dict[str, Any] = {
    "engines": {"main": {"kind": "mock", "args": {"token_s": 0.02}}},
    "models": {"shannon-chat": {"limits": UNLIMITED}},
    "store": {"command_timeout_ms": 2000},
}
SESSIONS = [f"conversation-{number}" for number in range(20)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with run_cluster(tmp_path_factory.mktemp("cluster"), TREE) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: Cluster) -> Iterator[httpx.Client]:
    # A connection that stays open stays with the nginx worker that knew the old endpoints.
    limits = httpx.Limits(max_keepalive_connections=0)
    with (
        cluster.clients.inside(),
        httpx.Client(base_url=cluster.url, headers=cluster.authorization, limits=limits, timeout=30) as client,
    ):
        yield client


def say(client: httpx.Client, said: str, session: str = "") -> httpx.Response:
    body = {"messages": [{"role": "user", "content": said}]}
    headers = {"X-Session-ID": session} if session else {}
    return client.post("/v1/chat/completions", json=body, headers=headers).raise_for_status()


def homes(client: httpx.Client) -> dict[str, set[str]]:
    """Say hello in every session. Return which replicas answered, by session; "" is requests without one."""
    went: dict[str, set[str]] = {}
    for session in [name for each in SESSIONS for name in (each, "")]:
        went.setdefault(session, set()).add(say(client, "hello", session).headers["x-replicas"])
    return went


def test_session_stays_with_its_replica_and_others_are_spread(cluster: Cluster, client: httpx.Client) -> None:
    both = {replica.endpoint for replica in cluster.replicas}
    first = homes(client)
    assert first[""] == both
    assert all(len(first[session]) == 1 for session in SESSIONS)
    assert set.union(*(first[session] for session in SESSIONS)) == both
    assert homes(client) == first


def test_stream_that_was_cut_is_taken_up_at_the_other_replica(cluster: Cluster, client: httpx.Client) -> None:
    went = homes(client)
    here = SESSIONS[0]
    there = next(session for session in SESSIONS if went[session] != went[here])
    said = " ".join(map(str, range(100)))
    body = {"messages": [{"role": "user", "content": said}], "stream": True, "resumable": True}

    async def cut_and_take_up() -> tuple[str, str, str]:
        taken = Taken()
        async with httpx.AsyncClient(base_url=cluster.url, headers=cluster.authorization, timeout=30) as client:
            async with client.stream(
                "POST", "/v1/chat/completions", json=body, headers={"X-Session-ID": here}
            ) as response:
                path = response.headers["x-shannon-resume"]
                await taken.take(response, 30)
            async with client.stream(
                "GET", path, params={"starting_after": taken.last}, headers={"X-Session-ID": there}
            ) as rest:
                await taken.take(rest)
        return taken.text, response.headers["x-replicas"], rest.headers["x-replicas"]

    text, one, other = asyncio.run(cut_and_take_up())
    assert text == f"You said: {said}"
    assert ({one}, {other}) == (went[here], went[there])


def test_session_goes_on_at_the_other_replica_when_its_own_is_gone(cluster: Cluster, client: httpx.Client) -> None:
    """Must stay the last of this file."""
    first = say(client, "one two three", "moving")
    stays = next(replica for replica in cluster.replicas if replica.endpoint != first.headers["x-replicas"])
    cluster.ingress.route([stays.endpoint])

    second = say(client, "four", "moving")

    assert second.headers["x-replicas"] == stays.endpoint
    # The mock engine counts words and messages: the first turn, its answer, and this one.
    turn, answer, this = 4, 1 + first.json()["usage"]["completion_tokens"], 2
    assert second.json()["usage"]["prompt_tokens"] == turn + answer + this
    stored = client.get("/v1/sessions/moving").raise_for_status().json()
    assert [message["content"] for message in stored["messages"]] == [
        "one two three",
        "You said: one two three",
        "four",
        "You said: four",
    ]
