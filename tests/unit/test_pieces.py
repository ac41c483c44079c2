"""Large values in pieces: cut between characters, whole or not at all."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import hypothesis
import orjson
import pytest
from hypothesis import strategies as st

from gateway.conversations.turns import pieces_of, turns_of
from gateway.settings.config import StoreSettings
from gateway.store import pieces
from gateway.store.client import Store
from gateway.store.layout import places
from gateway.store.pieces import PIECE_BYTES, split
from gateway.telemetry.metrics import Metrics
from tests.support.store_server import StoreServer

pytestmark = pytest.mark.anyio


@pytest.fixture
async def store(store_server: StoreServer) -> AsyncIterator[Store]:
    store_server.client().flushall()
    store = Store(StoreSettings(command_timeout_ms=2000), {"SHANNON_REDIS_URL": store_server.url}, Metrics())
    await store.start()
    yield store
    await store.close()


@hypothesis.given(st.text(alphabet="aé中😀\n", max_size=60), st.integers(4, 20))
def test_pieces_are_the_text_within_the_bound(text: str, most: int) -> None:
    parts = split(text, most)
    assert "".join(parts) == text
    assert all(len(part.encode()) <= most for part in parts)
    assert all(len(part.encode()) > most - 4 for part in parts[:-1])


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES // 2, PIECE_BYTES // 2 + 1, PIECE_BYTES + 1, 3_000_000])
@pytest.mark.parametrize("letter", ["x", "中"])
async def test_value_is_read_as_it_was_written(store: Store, size: int, letter: str) -> None:
    text = letter * (size // len(letter.encode()))
    await store.run("SET", "sh:v", await pieces.write(store, "sh:v", text))
    assert await pieces.read(store, "sh:v") == text
    if size > PIECE_BYTES:
        assert 0 < await store.run("TTL", places("sh:v")[0]) <= 60, "until its expiry is set with the value's own"


async def test_value_whose_pieces_are_gone_is_none(store: Store) -> None:
    await store.run("SET", "sh:v", await pieces.write(store, "sh:v", "x" * 500_000))
    await store.run("HDEL", places("sh:v")[0], 1)
    assert await pieces.read(store, "sh:v") is None
    assert await pieces.read(store, "sh:none") is None


async def test_readers_see_the_value_before_or_after(store: Store) -> None:
    texts = ["a" * 600_000, "中" * 200_000, "b" * 700_000]

    async def write() -> None:
        for number in range(30):
            text = await pieces.write(store, "sh:v", texts[number % 3], number % 2)
            await store.run("SET", "sh:v", text)

    writing = asyncio.create_task(write())
    seen: set[Any] = set()
    while not writing.done():
        seen.add(await pieces.read(store, "sh:v"))
    await writing
    assert seen - {None} <= set(texts)


@pytest.mark.parametrize("seed", range(5))
def test_turns_are_put_together_from_their_pieces(seed: int) -> None:
    chosen = random.Random(seed)
    turns = [
        (number, [{"role": "user", "content": chosen.choice("xé中") * chosen.randint(0, 200_000)}])
        for number in range(6)
    ]
    found = []
    for number, turn in turns:
        members = pieces_of(number, orjson.dumps([number, turn]).decode())
        assert all(len(member.encode()) <= PIECE_BYTES for member in members)
        found += [(member, str(number)) for member in sorted(members)]
    assert turns_of(found[::-1]) == turns
    several = next((number for number, _ in turns if sum(score == str(number) for _, score in found) > 1), None)
    if several is not None:
        found.remove(next(piece for piece in found if piece[1] == str(several)))
        assert [number for number, _ in turns_of(found[::-1])] == [number for number, _ in turns if number != several]
