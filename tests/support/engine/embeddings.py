"""Embeddings by a pooling engine.

Example:

    (vector, other), prepared = await embed(engine, "one text", "another")
"""

from __future__ import annotations

import uuid
from typing import Any

from engine.base import EmbeddingRequest, Prepared
from engine.local.pooling import PoolingEngine


async def embed(engine: PoolingEngine, *inputs: Any, **fields: Any) -> tuple[list[list[float]], Prepared]:
    asked = EmbeddingRequest(request_id=uuid.uuid4().hex, inputs=list(inputs), **fields)
    prepared = await engine.prepare(asked)
    vectors = await engine.pool(prepared)
    assert engine.unfinished_requests == 0
    return vectors, prepared
