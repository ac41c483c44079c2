"""Many clients at once, and many that hang up: every answer right, nothing left behind, books that agree."""

from __future__ import annotations

import asyncio
import random
import time

import httpx
import openai

from engine.demo import corpus
from tests.support.gateway_process import GatewayProcess

PLAIN = [exchange for conversation in corpus() for exchange in conversation.exchanges() if not exchange.tools]
STORY = {"messages": [{"role": "user", "content": "Tell me a story."}], "stream": True, "ignore_eos": True}


async def _ask(client: openai.AsyncOpenAI, number: int) -> tuple[str, str]:
    """Stream one known question. Returns (expected, received)."""
    exchange = PLAIN[number % len(PLAIN)]
    stream = await client.chat.completions.create(
        model="shannon-chat",
        messages=list(exchange.messages),  # type: ignore[arg-type]
        stream=True,
    )
    assert isinstance(stream, openai.AsyncStream)
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    return exchange.answer, "".join(pieces)


def test_200_concurrent_streams_all_get_the_right_text(gateway: GatewayProcess) -> None:
    async def storm() -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(
            base_url=f"{gateway.url}/v1", api_key=gateway.key, max_retries=0, timeout=120
        ) as client:
            return await asyncio.gather(*(_ask(client, number) for number in range(200)))

    wrong = [pair for pair in asyncio.run(storm()) if pair[0] != pair[1]]
    assert not wrong


async def _hang_up(client: httpx.AsyncClient, gateway: GatewayProcess, after: int) -> None:
    """Start a stream and leave after `after` pieces of it."""
    url = f"{gateway.url}/v1/chat/completions"
    async with client.stream("POST", url, json=STORY | {"max_tokens": 1500}, headers=gateway.authorization) as response:
        pieces = response.aiter_bytes()
        for _ in range(after):
            await anext(pieces)


def test_50_hang_ups_leave_nothing_in_the_engine_and_agree_with_its_counters(gateway: GatewayProcess) -> None:
    async def storm() -> None:
        random.seed(50)
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=50), timeout=60) as client:
            await asyncio.gather(*(_hang_up(client, gateway, random.randint(0, 12)) for _ in range(50)))

    asyncio.run(storm())
    left_at = time.monotonic()
    while gateway.metric("shannon_engine_unfinished_requests"):
        assert time.monotonic() - left_at < 1.0, "requests are still in the engine a second after their clients left"
    metrics = gateway.metrics()
    spent = {
        kind: sum(value for key, value in metrics.items() if key[0] == "shannon_tokens_total" and kind in key)
        for kind in ("prompt", "completion")
    }
    generated = sum(value for key, value in metrics.items() if key[0] == "vllm:generation_tokens_total")
    assert spent["completion"] == generated
    again = gateway.metrics()
    assert sum(value for key, value in again.items() if key[0] == "vllm:generation_tokens_total") == generated
    assert gateway.metric("shannon_streams_open") == 0


def test_whole_responses_are_aborted_too_when_the_client_leaves(gateway: GatewayProcess) -> None:
    before = gateway.metric("vllm:generation_tokens_total")
    body = STORY | {"stream": False, "max_tokens": 1500}
    try:
        httpx.post(f"{gateway.url}/v1/chat/completions", json=body, headers=gateway.authorization, timeout=0.3)
        raise AssertionError("1500 tokens came within 0.3 s")
    except httpx.ReadTimeout:
        left_at = time.monotonic()
    while gateway.metric("shannon_engine_unfinished_requests"):
        assert time.monotonic() - left_at < 1.0
    assert 0 < gateway.metric("vllm:generation_tokens_total") - before < 1500
