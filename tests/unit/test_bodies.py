"""Bodies: how many large ones are received at once, by whom, and who waits meanwhile."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from starlette.requests import Request

from gateway.errors import GatewayError, Overloaded, RateLimitExceeded
from gateway.exchange.bodies import Bodies, model_named_in
from gateway.exchange.json_parser import LARGE_BYTES
from gateway.settings.config import ServerSettings
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


class Upload:
    """A request whose body arrives as the test says."""

    def __init__(self) -> None:
        self._chunks: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.taken = 0
        self.request = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, self._receive)

    async def _receive(self) -> dict[str, Any]:
        chunk = await self._chunks.get()
        self.taken += len(chunk["body"])
        return chunk

    def send(self, size: int, *, more: bool = False) -> Upload:
        self._chunks.put_nowait({"type": "http.request", "body": b"x" * size, "more_body": more})
        return self


@pytest.fixture
async def bodies() -> AsyncIterator[Bodies]:
    bodies = Bodies(ServerSettings(max_large_bodies=3, max_large_bodies_per_key=2, body_timeout_s=60))
    yield bodies
    bodies.close()


async def test_body_in_tiny_pieces_takes_no_more_memory(bodies: Bodies) -> None:
    pieces = 100_000
    left = pieces

    async def receive() -> dict[str, Any]:
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": b"%02d" % (left % 100), "more_body": left > 0}

    request = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)
    tracemalloc.start()
    try:
        async with bodies.receive(request, "a") as body:
            assert len(body) == 2 * pieces
            assert tracemalloc.get_traced_memory()[1] < 5 * len(body)
    finally:
        tracemalloc.stop()


async def hold(bodies: Bodies, stack: AsyncExitStack, key_id: str) -> bytes:
    """Receive a large body, and keep its place until the stack is closed."""
    return await stack.enter_async_context(bodies.receive(Upload().send(LARGE_BYTES + 1).request, key_id))


async def test_key_waits_for_its_own_places_and_leaves_others_to_others(bodies: Bodies) -> None:
    async with AsyncExitStack() as held, AsyncExitStack() as later:
        for _ in range(2):
            await hold(bodies, held, "a")
        upload = Upload().send(LARGE_BYTES + 1, more=True).send(LARGE_BYTES)
        waiting = asyncio.create_task(later.enter_async_context(bodies.receive(upload.request, "a")))
        await until(lambda: upload.taken > LARGE_BYTES)

        async with asyncio.timeout(5):
            await hold(bodies, later, "b")
            assert len(await later.enter_async_context(bodies.receive(Upload().send(LARGE_BYTES).request, "a"))) > 0
        assert upload.taken == LARGE_BYTES + 1, "nothing is read from one that waits"
        assert not waiting.done()

        await held.aclose()
        assert len(await waiting) == 2 * LARGE_BYTES + 1


async def test_places_of_all_are_given_in_the_order_of_asking(bodies: Bodies) -> None:
    order = []
    async with AsyncExitStack() as held, AsyncExitStack() as later:
        for key_id in ("a", "a", "b"):
            await hold(bodies, held, key_id)

        async def ask(key_id: str) -> None:
            await hold(bodies, later, key_id)
            order.append(key_id)

        tasks = []
        for key_id in ("c", "b", "d"):
            tasks.append(asyncio.create_task(ask(key_id)))
            await asyncio.sleep(0)
        await held.aclose()
        await asyncio.gather(*tasks)
    assert order == ["c", "b", "d"]


@pytest.mark.parametrize(
    ("key_id", "kind", "code"),
    [("a", RateLimitExceeded, "too_many_large_requests"), ("c", Overloaded, "server_overloaded")],
)
async def test_wait_for_a_place_has_an_end(key_id: str, kind: type[GatewayError], code: str) -> None:
    bodies = Bodies(ServerSettings(max_large_bodies=3, max_large_bodies_per_key=2, body_timeout_s=0.05))
    async with AsyncExitStack() as held:
        for holder in ("a", "a", "b"):
            await hold(bodies, held, holder)
        with pytest.raises(kind) as caught:
            await hold(bodies, held, key_id)

        assert caught.value.code == code
        assert caught.value.retry_after_s
    async with AsyncExitStack() as again:  # everything has been given back
        for holder in ("a", "a", "b"):
            await hold(bodies, again, holder)
    bodies.close()


async def test_body_that_stalls_gives_its_place_back() -> None:
    bodies = Bodies(ServerSettings(max_large_bodies=1, max_large_bodies_per_key=1))
    for _ in range(2):
        with pytest.raises(TimeoutError):  # the middleware's, in the server
            async with asyncio.timeout(0.05), bodies.receive(Upload().send(LARGE_BYTES + 1, more=True).request, "a"):
                pass
    bodies.close()


async def test_work_runs_beside_the_loop_and_raises_here(bodies: Bodies) -> None:
    def fail() -> None:
        raise KeyError("x")

    assert await bodies.aside("a", lambda: 7) == 7
    with pytest.raises(KeyError):
        await bodies.aside("a", fail)


async def test_bar_is_of_one_key_and_one_model_and_ends(bodies: Bodies) -> None:
    bodies.bar("a", "m", 60)
    bodies.bar("b", "m", -1)

    with pytest.raises(RateLimitExceeded) as caught:
        bodies.check_bar("a", "m")
    assert 0 < (caught.value.retry_after_s or 0) <= 60
    bodies.check_bar("a", "n")
    bodies.check_bar("b", "m")


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b'{"messages": [], "model": "m"}', "m"),
        (b'{"model":"m","messages":["model"]}', "m"),
        (b'{"messages":["\\"model\\": \\"x\\""],"model" :\n"m"}', "m"),
        (b'{"messages":[]}', None),
        (b'{"model":5}', None),
        (b'{"model":"' + b"x" * 300 + b'"}', None),
        (b"\xff", None),
    ],
)
def test_model_is_guessed_from_an_unparsed_body(body: bytes, model: str | None) -> None:
    assert model_named_in(body) == model
