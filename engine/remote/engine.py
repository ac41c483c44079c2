"""A remote engine: generations are forwarded to OpenAI-compatible servers over HTTP.

Behind one `RemoteEngine` stand replicas of one model: bare `vllm serve`s, a router over them, another Shannon,
anything that speaks the protocol.

    pool.py              which replica, when to leave one alone, when to try another
    embeddings.py        texts as vectors
    upstream.py          HTTP to them
    wire.py              what is said to them, and what their refusals mean
    event_stream.py      the bytes of an answer as frames
    reply.py             the frames as deltas and token counts
    tokenizer.py         prompts counted by them

Every generation is streamed from the replica, whatever the client asked for: leaving it closes the connection, which
aborts it there, and tokens are counted as they come. If the server reports the usage with each frame, as vLLM does,
the count after an abort is exact up to what it had sent by then: the few tokens that it makes until it notices are not
in it. Prompts are counted by the replica's /tokenize; where that does not answer, `Usage.estimated` is set until the
server tells.

A request is tried at another replica for as long as its client has seen nothing: until the first token of a stream,
until the end of a whole answer. Afterwards every failure is EngineDied, with no word of the server's own. What failed
attempts spent is on no key's bill, but in `Replica.discarded_tokens`.

Replicas that can't be reached are no failure of this engine. `start` returns without them. `check_health` succeeds
anyway: restarting this engine or process would not repair a remote server. Requests get EngineUnavailable meanwhile,
and a replica is used from the moment it answers.

Every wait ends: connecting, a silence and a queue by the settings, tokenizing, probes and the ends of streams by fixed
times, all of them when the caller leaves or the engine is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import ClassVar

import httpx

from engine.base import (
    Delta,
    EmbeddingRequest,
    EngineDied,
    EngineUnavailable,
    GenerationRequest,
    InvalidRequest,
    Prepared,
    Request,
    Task,
    TaskEngine,
    resolve_max_tokens,
)
from engine.remote.embeddings import RemoteEmbeddings
from engine.remote.event_stream import Frames
from engine.remote.http1 import Resolve
from engine.remote.pool import AttemptFailed, Attempts, Choice, Pool, Replica, ReplicaBreaker, blame
from engine.remote.reply import Reply, merge
from engine.remote.tokenizer import RemoteTokenizer
from engine.remote.upstream import Patience, Upstream, read_some, transport_failures
from engine.remote.wire import (
    BYTES_PER_TOKEN,
    PreparedCall,
    estimate_prompt_tokens,
    generation_body,
    tokenize_body,
)

log = logging.getLogger(__name__)

_AFTER_DEFECT_S = 1.0
_LINGER_S = 0.25
"""Wait for the end of a response after [DONE], so that the connection can be reused."""


class RemoteEngine(TaskEngine):
    """An `Engine` over remote replicas. It declares all tasks, because a server's tasks only show in its responses."""

    tasks: ClassVar[tuple[Task, ...]] = ("generate", "embed")

    def __init__(
        self,
        urls: list[str],
        model: str,
        *,
        api_key: str = "",
        choice: Choice = "least_loaded",
        connect_timeout_s: float = 5.0,
        first_token_timeout_s: float = 120.0,
        queue_timeout_s: float = 600.0,
        idle_timeout_s: float = 60.0,
        retries: int = 2,
        breaker_failures: int = 3,
        breaker_open_s: float = 1.0,
        breaker_max_open_s: float = 10.0,
        max_model_len: int | None = None,
        takes_images: bool = True,
        cache_salt: bool | None = None,
        priority: bool = False,
        tls_verify: bool = True,
        tls_ca_file: str | None = None,
        resolve: Resolve | None = None,
        clock: Callable[[], float] = time.monotonic,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`urls` end with /v1; `model` is the name there. `gateway.settings.config.RemoteSettings` explains the others.

        `resolve` looks names up, `clock` is for the breakers, `transport` replaces the network. Raises EngineError.
        """
        self.max_num_seqs: int | None = None
        self.takes_images = takes_images
        self.unfinished_requests = 0
        self._first_token_timeout_s = first_token_timeout_s
        self._queue_timeout_s = queue_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._retries = retries
        self._max_model_len = max_model_len
        self._upstream = Upstream(
            model,
            api_key=api_key,
            connect_timeout_s=connect_timeout_s,
            cache_salt=cache_salt,
            priority=priority,
            tls=any(url.startswith("https:") for url in urls),
            tls_verify=tls_verify,
            tls_ca_file=tls_ca_file,
            resolve=resolve,
            transport=transport,
        )
        breakers = [ReplicaBreaker(breaker_failures, breaker_open_s, breaker_max_open_s, clock) for _ in urls]
        self._pool = Pool([Replica(url, breaker) for url, breaker in zip(urls, breakers, strict=True)], choice)
        self._tokenizer = RemoteTokenizer(self._pool, self._upstream)
        self._embeddings = RemoteEmbeddings(self._pool, self._upstream, self._tokenizer, retries, first_token_timeout_s)
        self._watches: list[asyncio.Task[None]] = []

    @property
    def replicas(self) -> list[Replica]:
        """The replicas and their state."""
        return self._pool.replicas

    @property
    def max_model_len(self) -> int:
        """As set, or the least that a replica has reported. Raises EngineUnavailable while none has."""
        told = [replica.max_model_len for replica in self._pool.replicas if replica.max_model_len]
        if self._max_model_len is None and not told:
            raise EngineUnavailable("No server of this model has answered yet. Try again shortly.")
        return self._max_model_len or min(told)

    async def start(self) -> None:
        """Probe every replica. Those that don't respond are logged, and probed until they do."""
        self._upstream.open()
        await asyncio.gather(*(self._probe(replica) for replica in self._pool.replicas))
        self._watches = [asyncio.create_task(self._watch(replica)) for replica in self._pool.replicas]

    async def _watch(self, replica: Replica) -> None:
        """Probe a replica whenever it is suspected, or its breaker open."""
        breaker = replica.breaker
        while True:
            await breaker.needs_probe.wait()
            try:
                if breaker.suspected:
                    await self._examine(replica)
                else:
                    await self._wait_for(replica)
            except Exception:  # a watch that ended would leave the replica alone for ever
                log.exception("the probe of replica %s failed by itself", replica.url)
                await asyncio.sleep(_AFTER_DEFECT_S)

    async def _examine(self, replica: Replica) -> None:
        """Probe a suspected replica, and open its breaker if the probe fails."""
        try:
            await self._upstream.probe(replica)
        except AttemptFailed as failure:
            if replica.breaker.suspected:  # else a request was served meanwhile
                log.warning("replica %s %s", replica.url, failure)
                replica.breaker.open()
        else:
            replica.breaker.clear()

    async def _wait_for(self, replica: Replica) -> None:
        """Return when a replica whose breaker is open answers again."""
        log.warning("replica %s is not used for %.1f s", replica.url, replica.breaker.wait_s)
        while replica.breaker.state == "open":
            await asyncio.sleep(replica.breaker.wait_s)
            await self._probe(replica)
        log.warning("replica %s answers again", replica.url)

    async def _probe(self, replica: Replica) -> None:
        """Open the breaker of a replica that does not answer well, and half open that of one that does again."""
        try:
            await self._upstream.probe(replica)
        except AttemptFailed as failure:
            if replica.breaker.state != "open":
                log.warning("replica %s %s", replica.url, failure)
            replica.breaker.open()
            return
        if self._max_model_len is None and replica.max_model_len is None:
            log.warning(
                "replica %s does not report the context length; unless /tokenize does, set max_model_len", replica.url
            )
        if replica.breaker.state == "open":  # it may be another server now
            replica.refused.clear()
            self._tokenizer.forget(replica)
        replica.breaker.half_open()

    async def _prepare(self, request: Request) -> Prepared:
        self._upstream.running()
        self._pool.check()
        if isinstance(request, EmbeddingRequest):
            return await self._embeddings.prepare(request)
        assert isinstance(request, GenerationRequest)
        return await self._prepare_generation(request)

    async def _prepare_generation(self, request: GenerationRequest) -> Prepared:
        model = self._upstream.model
        estimate = estimate_prompt_tokens(request)
        body = tokenize_body(request, model)
        prompt_tokens = await self._tokenizer.count(body, request.affinity, BYTES_PER_TOKEN * estimate)
        estimated = prompt_tokens is None
        if prompt_tokens is None:
            prompt_tokens = estimate
        max_model_len = self.max_model_len
        max_tokens = resolve_max_tokens(request, prompt_tokens, max_model_len)
        # An estimate that is a token too low would make "all the room there is" more than there is.
        all_there_is = request.max_tokens is None and max_tokens == max_model_len - prompt_tokens
        body = generation_body(request, model, None if estimated and all_there_is else max_tokens)
        prepared = Prepared(
            request_id=request.request_id,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            n=request.n,
            flow=request.flow,
            priority=request.priority,
            affinity=request.affinity,
            payload=PreparedCall(request, body, estimated),
        )
        prepared.usage.estimated = estimated
        return prepared

    async def tokenize(self, request: GenerationRequest) -> list[int]:
        if isinstance(request.prompt, list):
            return list(request.prompt)
        self._upstream.running()
        return await self._tokenizer.tokenize(tokenize_body(request, self._upstream.model), request.affinity)

    async def detokenize(self, token_ids: list[int]) -> str:
        self._upstream.running()
        return await self._tokenizer.detokenize(token_ids)

    async def pool(self, prepared: Prepared) -> list[list[float]]:
        self._upstream.running()
        self.unfinished_requests += 1
        try:
            return await self._embeddings.pool(prepared)
        finally:
            self.unfinished_requests -= 1

    async def generate(self, prepared: Prepared) -> AsyncGenerator[Delta, None]:
        """Yield deltas. As long as the client has seen nothing, a failure moves the generation to another replica."""
        self._upstream.running()
        call: PreparedCall = prepared.payload
        assert isinstance(call.request, GenerationRequest)
        attempts = Attempts(self._pool, prepared.affinity, self._retries)
        self.unfinished_requests += 1
        try:
            while True:
                replica = await attempts.next()
                reply = Reply(prepared, call.request, estimated=call.estimated, context_tokens=self.max_model_len)
                shown = False
                try:
                    async with contextlib.aclosing(self._attempt(replica, prepared, reply, attempts)) as deltas:
                        if call.request.stream:
                            async for delta in deltas:
                                shown = True
                                yield delta
                            return
                        whole = merge([delta async for delta in deltas])
                except (AttemptFailed, InvalidRequest) as failure:
                    if isinstance(failure, AttemptFailed) and not (shown or self._upstream.closed):
                        attempts.fail(replica, failure, late=reply.started)
                        replica.discarded_tokens += reply.forget_usage()
                        continue
                    if isinstance(failure, InvalidRequest) and not shown:
                        replica.discarded_tokens += reply.forget_usage()
                        raise
                    if isinstance(failure, AttemptFailed) and not self._upstream.closed:
                        blame(replica, failure)
                    raise EngineDied() from failure
                else:
                    for delta in whole:
                        yield delta
                    return
        finally:
            self.unfinished_requests -= 1

    async def _attempt(
        self, replica: Replica, prepared: Prepared, reply: Reply, attempts: Attempts
    ) -> AsyncGenerator[Delta, None]:
        """Yield the deltas of one replica. Raises AttemptFailed, InvalidRequest."""
        now = asyncio.get_running_loop().time
        patience = Patience(self._first_token_timeout_s, self._idle_timeout_s, self._queue_timeout_s, now)
        frames = Frames()
        answered = ended = False
        with self._pool.occupy(replica), transport_failures(lambda: reply.started):
            async with self._upstream.stream(replica, prepared, patience.deadline) as stream:
                try:
                    while not ended and not frames.done:
                        chunk = await read_some(stream.chunks, patience.deadline, complete=reply.finished)
                        ended = not chunk
                        received, broken = frames.read(chunk)
                        reply.is_whole = frames.is_document
                        deltas, failure = reply.read_all(received)
                        failure = failure or broken
                        if failure is not None and reply.finished:  # it is complete, whatever comes behind it
                            ended, failure = True, None
                        elif failure is None and (frames.done or (ended and frames.is_document)):
                            deltas += reply.end()
                        if reply.started and not answered:
                            answered = True
                            replica.refused |= stream.refused
                            replica.breaker.answer()
                            attempts.succeed(replica, begun_only=True)
                        for delta in deltas:
                            yield delta
                        if failure is not None:
                            raise failure
                        patience.note(got_token=bool(deltas), finished=reply.finished)
                except (GeneratorExit, asyncio.CancelledError):  # the reader has left; what was made for it counts
                    if arrived := stream.arrived():
                        reply.read_all(frames.read(arrived)[0])
                    raise
                if not reply.finished:
                    raise AttemptFailed("failed", "ended a stream early")
                replica.breaker.succeed()
                attempts.succeed(replica)
                if frames.done:
                    await read_some(stream.chunks, now() + _LINGER_S, complete=True)

    async def check_health(self) -> None:
        """Raise EngineUnavailable if not running. Unreachable replicas are no failure of this engine."""
        self._upstream.running()

    def cpu_time_s(self) -> float | None:
        return None  # its processes are elsewhere

    async def close(self) -> None:
        for watch in self._watches:
            watch.cancel()
        await self._tokenizer.close()
        await self._upstream.close()
        await asyncio.gather(*self._watches, return_exceptions=True)
