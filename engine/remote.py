"""An engine elsewhere: generations are forwarded to OpenAI-compatible servers over HTTP.

Behind one `RemoteEngine` stand replicas of one model: bare `vllm serve`s, a router over them, another Shannon,
anything that speaks the protocol.

    pool.py       which replica, when to leave one alone, when to try another
    upstream.py   HTTP to them
    wire.py       what is said to them, and what their refusals mean
    reply.py      what they stream, as deltas and token counts

Every generation is streamed from the replica, whatever the client asked for: leaving it closes the connection, which
aborts it there, and tokens are counted as they come. Where the server tells the usage with each frame, as vLLM does,
the count after an abort is exact up to what it had sent by then: the few tokens that it makes until it notices are not
in it. Prompts are counted by the replica's /tokenize; where there is
none, `Usage.estimated` is set until the server tells.

A request is tried at another replica only before its first token. Afterwards every failure is EngineDied, with no word
of the server's own. Replicas that can't be reached are no failure of this engine: `start` returns without them and
`check_health` is content, because building this engine anew, or ending the process, mends nothing elsewhere. Requests
get EngineUnavailable meanwhile, and a replica takes part from the moment it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

import httpx

from engine.base import (
    Delta,
    EmbeddingRequest,
    EngineDied,
    EngineUnavailable,
    GenerationRequest,
    InvalidRequest,
    Prepared,
    resolve_max_tokens,
)
from engine.pool import AttemptFailed, Attempts, Breaker, Choice, Pool, Replica, blame
from engine.reply import Frames, Reply, is_tokens, merge, read_count, read_vectors
from engine.upstream import Upstream, read_some, transport_failures
from engine.wire import (
    Call,
    embedding_body,
    estimate_prompt_tokens,
    estimate_tokens,
    generation_body,
    refuse,
    tokenize_body,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

_TOKENIZE_TIMEOUT_S = 10.0  # a prompt of 100 000 tokens takes vLLM a fifth of a second
_TAIL_S = 5.0
"""For the usage that follows the last token. The answer is complete by then, so its absence is no failure."""
_LINGER_S = 0.25
"""For the end of a response after [DONE]; without it the connection could not be used again."""
_MAX_COUNTED_INPUTS = 32
"""More embedding inputs than this are estimated: each would be a request of its own."""
_NO_SUCH_ROUTE = {401, 403, 404, 405, 501}


class RemoteEngine:
    """An `Engine` over replicas elsewhere. See the module."""

    def __init__(
        self,
        urls: list[str],
        model: str,
        *,
        api_key: str = "",
        choice: Choice = "least_loaded",
        connect_timeout_s: float = 5.0,
        first_token_timeout_s: float = 120.0,
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
        clock: Callable[[], float] = time.monotonic,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`urls` end with /v1; `model` is the name there. `gateway.config.RemoteSettings` explains the others.

        `clock` is the breakers', `transport` stands in for the network. Raises EngineError when the file of
        certificates can't be read.
        """
        self.max_num_seqs: int | None = None
        self.takes_images = takes_images
        self.unfinished_requests = 0
        self._first_token_timeout_s = first_token_timeout_s
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
            transport=transport,
        )
        breakers = [Breaker(breaker_failures, breaker_open_s, breaker_max_open_s, clock) for _ in urls]
        self._pool = Pool([Replica(url, breaker) for url, breaker in zip(urls, breakers, strict=True)], choice)
        self._watches: list[asyncio.Task[None]] = []

    @property
    def replicas(self) -> list[Replica]:
        """The replicas, for whoever wants to see how they are."""
        return self._pool.replicas

    @property
    def max_model_len(self) -> int:
        """As set, or the least that a replica has told. Raises EngineUnavailable while none has."""
        told = [replica.max_model_len for replica in self._pool.replicas if replica.max_model_len]
        if self._max_model_len is None and not told:
            raise EngineUnavailable("No server of this model has answered yet. Try again shortly.")
        return self._max_model_len or min(told)

    async def start(self) -> None:
        """Ask every replica who it is. Those that don't answer are named in the log, and asked again for ever."""
        self._upstream.open()
        await asyncio.gather(*(self._probe(replica) for replica in self._pool.replicas))
        self._watches = [asyncio.create_task(self._watch(replica)) for replica in self._pool.replicas]

    async def _watch(self, replica: Replica) -> None:
        """Probe a replica whenever its breaker is open."""
        while True:
            await replica.breaker.opened.wait()
            log.warning("replica %s is left alone for %.1f s", replica.url, replica.breaker.wait_s)
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
                "replica %s does not tell the context length; unless /tokenize does, set max_model_len", replica.url
            )
        replica.breaker.half_open()

    async def prepare(self, request: GenerationRequest) -> Prepared:
        self._upstream.running()
        model = self._upstream.model
        prompt_tokens = await self._count(tokenize_body(request, model), request.affinity)
        estimated = prompt_tokens is None
        if prompt_tokens is None:
            prompt_tokens = estimate_prompt_tokens(request)
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
            payload=Call(request, body, estimated),
        )
        prepared.usage.estimated = estimated
        return prepared

    async def prepare_embedding(self, request: EmbeddingRequest) -> Prepared:
        self._upstream.running()
        model = self._upstream.model
        counts: list[int | None] = [None]
        if len(request.inputs) <= _MAX_COUNTED_INPUTS:
            bodies = [{"model": model, "prompt": text} for text in request.inputs]
            counts = await asyncio.gather(*(self._count(body, "") for body in bodies))
        known = [count for count in counts if count is not None]
        estimated = len(known) < len(request.inputs)
        prepared = Prepared(
            request_id=request.request_id,
            prompt_tokens=sum(map(estimate_tokens, request.inputs)) if estimated else sum(known),
            max_tokens=0,
            flow=request.flow,
            priority=request.priority,
            payload=Call(request, embedding_body(request, model), estimated),
        )
        prepared.usage.estimated = estimated
        return prepared

    async def _count(self, body: dict[str, Any], affinity: str) -> int | None:
        """Return how many tokens a prompt has, or None when the replica does not tell.

        A prompt that /tokenize refuses is left for the generation to refuse: some servers take other fields there.
        """
        if isinstance(body.get("prompt"), list):
            return len(body["prompt"])
        with contextlib.suppress(InvalidRequest):
            answer = await self._ask_tokenizer(body, affinity)
            return None if answer is None else int(answer["count"])
        return None

    async def _ask_tokenizer(self, body: dict[str, Any], affinity: str) -> dict[str, Any] | None:
        """Return the answer of vLLM's /tokenize, or None where there is no such thing. Raises EngineError."""

        async def ask(replica: Replica) -> dict[str, Any] | None:
            if not replica.tokenizes:
                return None
            status, answer = await self._upstream.post(f"{replica.root}/tokenize", body, _TOKENIZE_TIMEOUT_S)
            if status in (400, 413, 422):
                raise InvalidRequest("The model's server can't tokenize the prompt. Check it.", "prompt")
            if status in _NO_SUCH_ROUTE or (status == 200 and not is_tokens(answer)):
                replica.tokenizes = False
                log.warning("replica %s has no /tokenize: prompts are estimated", replica.url)
                return None
            if status != 200:
                refuse(status, answer, GenerationRequest(request_id=""))
            replica.max_model_len = replica.max_model_len or read_count(answer, "max_model_len")
            return dict(answer)

        return await self._anywhere(affinity, ask)

    async def tokenize(self, request: GenerationRequest) -> list[int]:
        if isinstance(request.prompt, list):
            return list(request.prompt)
        answer = await self._ask_tokenizer(tokenize_body(request, self._upstream.model), request.affinity)
        if answer is None:
            raise _no_tokenizer()
        return list(answer["tokens"])

    async def detokenize(self, token_ids: list[int]) -> str:
        body = {"model": self._upstream.model, "tokens": token_ids}

        async def ask(replica: Replica) -> str:
            url = f"{replica.root}/detokenize"
            status, answer = await self._upstream.post(url, body, _TOKENIZE_TIMEOUT_S)
            if status in _NO_SUCH_ROUTE:
                raise _no_tokenizer()
            if status in (400, 413, 422):
                raise InvalidRequest("A token id is not in the vocabulary.", "tokens")
            if status != 200 or not isinstance(answer, dict) or not isinstance(answer.get("prompt"), str):
                raise AttemptFailed(f"answered {status} to /detokenize")
            return str(answer["prompt"])

        return await self._anywhere("", ask)

    async def embed(self, prepared: Prepared) -> list[list[float]]:
        call: Call = prepared.payload

        async def ask(replica: Replica) -> list[list[float]]:
            body = call.body | self._upstream.vllm_fields(replica, call.request)
            url, timeout_s = f"{replica.url}/embeddings", self._first_token_timeout_s
            status, answer = await self._upstream.post(url, body, timeout_s, prepared)
            if status != 200:
                refuse(status, answer, call.request)
            vectors, told = read_vectors(answer, len(body["input"]))
            prepared.usage.prompt_tokens = prepared.prompt_tokens if told is None else told
            prepared.usage.estimated = call.estimated and told is None
            replica.breaker.succeed()
            return vectors

        self.unfinished_requests += 1
        try:
            return await self._anywhere(prepared.affinity, ask)
        finally:
            self.unfinished_requests -= 1

    async def _anywhere(self, affinity: str, ask: Callable[[Replica], Awaitable[T]]) -> T:
        """Return what the first replica answers that can. Raises what `ask` and `Attempts.next` raise."""
        self._upstream.running()
        attempts = Attempts(self._pool, affinity, self._retries)
        while True:
            replica = await attempts.next()
            try:
                with self._pool.occupy(replica):
                    return await ask(replica)
            except AttemptFailed as failure:
                attempts.fail(replica, failure)

    async def generate(self, prepared: Prepared) -> AsyncGenerator[Delta, None]:
        """Yield deltas. Before the first token a failure moves the generation to another replica."""
        self._upstream.running()
        call: Call = prepared.payload
        assert isinstance(call.request, GenerationRequest)
        attempts = Attempts(self._pool, prepared.affinity, self._retries)
        self.unfinished_requests += 1
        try:
            while True:
                replica = await attempts.next()
                reply = Reply(prepared, call.request, estimated=call.estimated)
                try:
                    async with contextlib.aclosing(self._attempt(replica, prepared, reply)) as deltas:
                        if call.request.stream:
                            async for delta in deltas:
                                yield delta
                            return
                        whole = merge([delta async for delta in deltas])
                except AttemptFailed as failure:
                    if reply.started or self._upstream.closed:
                        blame(replica, failure)
                        raise EngineDied("The engine failed during generation.") from failure
                    attempts.fail(replica, failure)
                else:
                    for delta in whole:
                        yield delta
                    return
        finally:
            self.unfinished_requests -= 1

    async def _attempt(self, replica: Replica, prepared: Prepared, reply: Reply) -> AsyncGenerator[Delta, None]:
        """Yield what one replica makes of a generation. Raises AttemptFailed, InvalidRequest."""
        now = asyncio.get_running_loop().time
        deadline = now() + self._first_token_timeout_s
        frames = Frames()
        answered = False
        with self._pool.occupy(replica), transport_failures():
            stream = self._upstream.stream(replica, prepared, deadline)
            async with stream as (chunks, arrived):
                ended = False
                try:
                    while not ended and not frames.done:
                        if answered:
                            deadline = now() + (_TAIL_S if reply.finished else self._idle_timeout_s)
                        chunk = await read_some(chunks, deadline, complete=reply.finished)
                        ended = not chunk
                        # The last line may lack its end.
                        deltas, failure = reply.read_all(frames.feed(chunk or b"\n"))
                        if reply.started and not answered:
                            answered = True
                            replica.breaker.answer()
                        for delta in deltas:
                            yield delta
                        if failure is not None:
                            raise AttemptFailed(f"broke a stream off: {failure}") if reply.started else failure
                except (GeneratorExit, asyncio.CancelledError):  # the reader has left; what was made for it counts
                    with contextlib.suppress(AttemptFailed):
                        reply.read_all(frames.feed(arrived()))
                    raise
                if not reply.finished:
                    raise AttemptFailed("ended a stream early")
                replica.breaker.succeed()
                if frames.done:
                    await read_some(chunks, now() + _LINGER_S, complete=True)

    async def check_health(self) -> None:
        """Raise EngineUnavailable only when not running; see the module."""
        self._upstream.running()

    def cpu_time_s(self) -> float | None:
        return None  # its processes are elsewhere

    async def close(self) -> None:
        for watch in self._watches:
            watch.cancel()
        await self._upstream.close()
        await asyncio.gather(*self._watches, return_exceptions=True)


def _no_tokenizer() -> InvalidRequest:
    return InvalidRequest("The server of this model does not tokenize.", "model", "model_not_supported")
