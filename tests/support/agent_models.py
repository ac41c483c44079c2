"""A gateway with a model of agents whose tools and whose own model are scripted.

Example:

    here = await place(start, "deep_research")
    assert (await here.gateway.chat()).status_code == 200
"""

from __future__ import annotations

from typing import Any

from engine.mock import MockEngine
from gateway.tools.base import Toolbox
from tests.support.app import Gateway, Start
from tests.support.scripted_model import FakeFetch, FakeSearch, FakeTool, ScriptedModel
from tests.support.waiting import until

AGENTS = ("quick_research", "standard_research", "deep_research", "academic_research", "complex")


class Place:
    """A gateway with a model of agents, and what they work with."""

    def __init__(self, gateway: Gateway, model: ScriptedModel, search: FakeSearch, fetch: FakeFetch) -> None:
        self.gateway = gateway
        self.model = model
        self.search = search
        self.fetch = fetch

    async def settled(self) -> None:
        """Wait until nothing runs; then the books must equal the engine's counters."""
        gateway = self.gateway
        await until(lambda: gateway.mock.unfinished_requests == 0, within_s=1.0)
        if gateway.server is not None:
            await until(lambda: gateway.requests_in_progress() == 0, within_s=1.0)
        spent = gateway.spent()
        assert await gateway.metered() == spent
        rows = (await gateway.client.get("/v1/usage")).json()["data"]
        assert sum(row["prompt_tokens"] for row in rows) == spent.prompt_tokens
        assert sum(row["completion_tokens"] for row in rows) == spent.completion_tokens
        for tool in (self.search, self.fetch):
            assert tool.running == 0

    async def ledger(self) -> dict[str, Any]:
        (row,) = (await self.gateway.client.get("/v1/usage")).json()["data"]
        return dict(row)


async def place(
    open_gateway: Start, workflow: str, *, scripts: dict[str, Any] | None = None, token_s: float = 0.0,
    settings: dict[str, Any] | None = None, tools: tuple[FakeTool, ...] = (), **options: Any,
) -> Place:  # fmt: skip
    model, search, fetch = ScriptedModel(**(scripts or {})), FakeSearch(), FakeFetch()
    spec = {"description": "The one under test", "workflow": workflow} | (settings or {})
    gateway = await open_gateway(
        mock=lambda: MockEngine(reply=model, max_model_len=16_384, token_s=token_s),
        config={"models": {"shannon-chat": spec}},
        **options,
    )
    object.__setattr__(gateway.services, "tools", Toolbox((search, fetch, *tools), backoff_s=0.0))
    return Place(gateway, model, search, fetch)


def content(frames: list[dict[str, Any]]) -> str:
    return "".join(frame["choices"][0]["delta"].get("content") or "" for frame in frames)
