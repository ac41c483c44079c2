"""A meter over a mock engine, with a ledger that keeps every entry and limits that are off.

Example:

    over = await metered(MockEngine(reply="one two"))
    prepared = await over.meter.prepare(request)
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from engine.mock import MockEngine
from gateway.access.allowance import Standing
from gateway.access.auth import Principal
from gateway.access.catalog import ModelSpec
from gateway.access.ledger import Entry, Ledger
from gateway.access.limits import Limits
from gateway.components import build_store
from gateway.meter import Meter
from gateway.settings.config import LimiterSettings, ModelSettings, parse_config
from gateway.telemetry.metrics import Metrics


class Books(Ledger):
    """Keeps what was settled."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def settle(self, entry: Entry) -> asyncio.Future[Standing | None]:
        self.entries.append(entry)
        settled: asyncio.Future[Standing | None] = asyncio.get_running_loop().create_future()
        settled.set_result(None)
        return settled


class Stopwatch(Metrics):
    """Keeps whose first tokens were timed."""

    def __init__(self) -> None:
        super().__init__()
        self.first_tokens: list[str] = []

    def first_token(self, model_id: str, seconds: float) -> None:
        assert seconds >= 0
        self.first_tokens.append(model_id)


@dataclass
class Metered:
    """A meter, and everything around it that a test wants to look at."""

    engine: MockEngine
    meter: Meter
    books: Books
    metrics: Stopwatch


async def metered(engine: MockEngine) -> Metered:
    """Start `engine` and return it under a meter. With limits off, the meter never speaks to its store."""
    await engine.start()
    config = parse_config(
        {"engines": {"main": {"kind": "mock"}}, "models": {"shannon-chat": {"description": "General chat completion"}}}
    )
    metrics = Stopwatch()
    store = build_store(config, {"SHANNON_REDIS_URL": "unix:///nowhere.sock"})
    limits = Limits(LimiterSettings(enabled=False), store, metrics)
    books = Books()
    model = ModelSpec("shannon-chat", ModelSettings(description="General chat completion"), engine)
    meter = Meter("request-1", Principal("TestKey00001"), model, limits, books, metrics)
    return Metered(engine, meter, books, metrics)
