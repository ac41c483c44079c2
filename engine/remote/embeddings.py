"""Embeddings by replicas. Raises what `engine.remote.engine` raises."""

from __future__ import annotations

import asyncio

from engine.base import EmbeddingRequest, EngineDied, Prepared
from engine.remote.pool import AttemptFailed, Attempts, Pool, Replica
from engine.remote.reply import read_vectors
from engine.remote.tokenizer import RemoteTokenizer
from engine.remote.upstream import MAX_EMBEDDINGS_BYTES, Upstream
from engine.remote.wire import BYTES_PER_TOKEN, PreparedCall, embedding_body, estimate_tokens, is_error, refuse

_MAX_COUNTED_INPUTS = 32
"""If there are more inputs, their tokens are estimated: counting takes one request per input."""


class RemoteEmbeddings:
    """Prepares embedding requests, and has a replica answer them."""

    def __init__(
        self, pool: Pool, upstream: Upstream, tokenizer: RemoteTokenizer, retries: int, timeout_s: float
    ) -> None:
        self._pool = pool
        self._upstream = upstream
        self._tokenizer = tokenizer
        self._retries = retries
        self._timeout_s = timeout_s

    async def prepare(self, request: EmbeddingRequest) -> Prepared:
        """Count the inputs at a replica, or estimate them."""
        model = self._upstream.model
        counts: list[int | None] = [None]
        if len(request.inputs) <= _MAX_COUNTED_INPUTS:
            counts = await asyncio.gather(*map(self._count_input, request.inputs))
        known = [count for count in counts if count is not None]
        estimated = len(known) < len(request.inputs)
        prepared = Prepared(
            request_id=request.request_id,
            prompt_tokens=sum(map(estimate_tokens, request.inputs)) if estimated else sum(known),
            max_tokens=0,
            flow=request.flow,
            priority=request.priority,
            payload=PreparedCall(request, embedding_body(request, model), estimated),
        )
        prepared.usage.estimated = estimated
        return prepared

    async def _count_input(self, text: str | list[int]) -> int | None:
        body = {"model": self._upstream.model, "prompt": text}
        return await self._tokenizer.count(body, "", BYTES_PER_TOKEN * estimate_tokens(text))

    async def pool(self, prepared: Prepared) -> list[list[float]]:
        """The vectors, from any replica. Raises what `Engine.embed` raises."""
        attempts = Attempts(self._pool, prepared.affinity, self._retries)
        while True:
            replica = await attempts.next()
            try:
                with self._pool.occupy(replica):
                    vectors = await self._embed_at(replica, prepared)
            except AttemptFailed as failure:
                if self._upstream.closed:
                    raise EngineDied() from failure
                attempts.fail(replica, failure)
            else:
                attempts.succeed(replica)
                replica.breaker.succeed()
                return vectors

    async def _embed_at(self, replica: Replica, prepared: Prepared) -> list[list[float]]:
        """The vectors from one replica. Raises AttemptFailed, InvalidRequest."""
        call: PreparedCall = prepared.payload
        body = call.body | self._upstream.vllm_fields(replica, call.request)
        status, answer, retry_after_s = await self._upstream.post(
            f"{replica.url}/embeddings",
            body,
            self._timeout_s,
            prepared,
            max_bytes=MAX_EMBEDDINGS_BYTES,
        )
        if status != 200 or answer is None or is_error(answer):
            refuse(status, answer, call.request, retry_after_s)
        vectors, tokens = await asyncio.to_thread(read_vectors, answer, body["input"])
        prepared.usage.prompt_tokens = tokens or prepared.prompt_tokens
        prepared.usage.estimated = call.estimated and not tokens
        return vectors
