"""Requests to an engine with the demo model, and vLLM's own counters.

Example:

    text, prepared = await answer(engine, STORY, max_tokens=20)
    assert counter("generation_tokens_total") > 0
"""

from __future__ import annotations

import uuid
from typing import Any

from prometheus_client import REGISTRY

from engine.base import (
    GenerationRequest,
    Prepared,
)
from engine.demo import corpus
from engine.local.embedded import EmbeddedEngine

EXCHANGES = [exchange for conversation in corpus() for exchange in conversation.exchanges()]


PLAIN = [exchange for exchange in EXCHANGES if not exchange.tools]


SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


STORY = [{"role": "user", "content": "Tell me a story."}]


def request(messages: Any, **fields: Any) -> GenerationRequest:
    return GenerationRequest(request_id=uuid.uuid4().hex, messages=list(messages), **({"temperature": 0.0} | fields))


async def answer(engine: EmbeddedEngine, messages: Any, **fields: Any) -> tuple[str, Prepared]:
    prepared = await engine.prepare(request(messages, **fields))
    text = "".join([delta.text async for delta in engine.generate(prepared)])
    return text, prepared


def counter(name: str) -> float:
    """Return the sum of one of vLLM's own counters."""
    return sum(
        sample.value for family in REGISTRY.collect() for sample in family.samples if sample.name == f"vllm:{name}"
    )
