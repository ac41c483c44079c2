"""The tenet: after a storm of disconnects, errors, limits and a drain, the ledger equals vLLM's own counters."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.demo import corpus
from engine.local.embedded import EmbeddedEngine
from engine.supervisor import SupervisedEngine
from gateway.access.keys import make_key
from gateway.app import create_app
from gateway.components import build_authenticator, build_store
from gateway.services import Services
from gateway.serving.server import Server
from gateway.settings.config import parse_config
from tests.support.engine.borrowed import Borrowed
from tests.support.engine.demo_requests import counter
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.vllm]

QUESTIONS = [
    list(exchange.messages) for conversation in corpus() for exchange in conversation.exchanges() if not exchange.tools
]
STORY = [{"role": "user", "content": "Tell me a story."}]


async def _client(client: httpx.AsyncClient, number: int, rng: random.Random) -> None:
    """Do what clients do: read to the end, hang up early, ask for what can't be, ask again and again."""
    body: dict[str, Any] = {"messages": rng.choice(QUESTIONS), "temperature": 0, "stream": rng.random() < 0.7}
    kind = rng.choice(["read", "leave", "leave", "whole", "invalid", "too long"])
    if kind == "leave":
        body |= {"messages": STORY, "ignore_eos": True, "max_tokens": 600, "stream": True}
    elif kind == "whole":
        body |= {"messages": STORY, "ignore_eos": True, "max_tokens": 300, "stream": False}
    elif kind == "invalid":
        body |= {"logit_bias": {"99999999": 1}}
    elif kind == "too long":
        body |= {"max_tokens": 100_000}
    timeout = rng.uniform(0.05, 0.8) if kind == "whole" else 30
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body, timeout=timeout) as response:
            leaves_after = rng.randint(0, 20) if kind == "leave" else 10**9
            async for _ in response.aiter_bytes():
                leaves_after -= 1
                if leaves_after < 0:
                    break
    except httpx.TransportError:
        pass


@pytest.mark.slow
async def test_ledger_equals_the_engines_counters_after_a_storm_and_a_drain(
    engine: EmbeddedEngine, store_url: str, tmp_path: Path
) -> None:
    config = parse_config(
        {
            "engines": {"main": {"kind": "embedded"}},
            "models": {
                "shannon-chat": {
                    "description": "General chat completion",
                    # Low enough that the storm runs into both.
                    "limits": {"requests_per_minute": 150, "tokens_per_minute": 60_000, "concurrent_requests": 15},
                }
            },
            "server": {"port": 0},
            "store": {"data_dir": str(tmp_path), "command_timeout_ms": 2000},
        }
    )
    key = make_key()
    variables = {"SHANNON_BOOTSTRAP_KEY": key, "SHANNON_REDIS_URL": store_url}
    store = build_store(config, variables)
    supervised = SupervisedEngine("main", lambda: Borrowed(engine))
    app = create_app(config, {"main": supervised}, store, build_authenticator(config, store, variables))
    services: Services = app.state.services
    ready = asyncio.Event()
    server = Server(app, host="127.0.0.1", port=0, on_ready=lambda url: ready.set())
    before = counter("prompt_tokens_total"), counter("generation_tokens_total")
    serving = asyncio.create_task(server.serve())
    await ready.wait()

    rng = random.Random(3)
    headers = {"Authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=server.url, headers=headers, limits=limits) as client:
        storm = [asyncio.create_task(_client(client, number, rng)) for number in range(200)]
        await until(lambda: supervised.unfinished_requests > 5, within_s=30)
        await asyncio.gather(*storm[:150])
        long = {"messages": STORY, "ignore_eos": True, "max_tokens": 1500, "stream": True}
        caught = [asyncio.create_task(client.post("/v1/chat/completions", json=long, timeout=60)) for _ in range(5)]
        await until(lambda: supervised.unfinished_requests > 0, within_s=30)
        await services.drain.run(timeout_s=0.5)
        await asyncio.gather(*storm, *caught, return_exceptions=True)

        await until(lambda: supervised.unfinished_requests == 0)
        rows = await services.ledger.totals(key.split("-")[2])

    spent = {name: sum(row[name] for row in rows) for name in rows[0] if name not in ("date", "model", "errors")}
    made = counter("prompt_tokens_total") - before[0], counter("generation_tokens_total") - before[1]
    print(spent, [row["errors"] for row in rows])
    assert (spent["prompt_tokens"], spent["completion_tokens"]) == made
    assert spent["aborted_requests"] > 0
    assert {"rate_limit_exceeded", "context_length_exceeded"} <= {code for row in rows for code in row["errors"]}
    server.should_exit = True
    await serving
