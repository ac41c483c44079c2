"""The tokenizers of a remote engine's replicas: vLLM's /tokenize and /detokenize.

Counting a prompt is optional: where a tokenizer is missing, fails, hangs, or says what can't be true, the count is
None, and the caller estimates. Nothing here is evidence against the replica. A tokenizer that has failed is not
asked for every request again, but checked with a short prompt of our own: at once where it has answered wrongly, which
may be the prompt's fault, else after a pause that doubles.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from engine.base import EngineUnavailable, InvalidRequest
from engine.remote.pool import AttemptFailed, Pool, Replica
from engine.remote.reply import read_count, read_tokens
from engine.remote.upstream import Answer, Upstream

log = logging.getLogger(__name__)

_TIMEOUT_S = 5.0  # a prompt of 100 000 tokens takes vLLM a fifth of a second
_PAUSE_S = 5.0
_MAX_PAUSE_S = 300.0
_MAX_FAILURES = 3
"""After this many failures in a row there is a pause even if the check succeeds: its prompt is a different one."""
_TEMPLATE_TOKENS = 16_384
"""Limit on what a chat template adds to a prompt. A count above one token per byte plus this is wrong."""
_REFUSED = (400, 413, 422)
_MISSING = (401, 403, 404, 405, 501)


class RemoteTokenizer:
    """Counts, tokenizes and detokenizes through the replicas of one remote engine."""

    def __init__(self, pool: Pool, upstream: Upstream) -> None:
        self._pool = pool
        self._upstream = upstream
        self._failures: dict[Replica, int] = {}
        self._checks: dict[Replica, asyncio.Task[None]] = {}

    async def count(self, body: dict[str, Any], affinity: str, prompt_bytes: int) -> int | None:
        """Return the number of tokens of a prompt of about `prompt_bytes`, or None if no replica can count."""
        if isinstance(body.get("prompt"), list):
            return len(body["prompt"])
        replica = self._choose(affinity, {"fails", "missing"})
        if replica is None:
            return None
        try:
            status, answer, _ = await self._ask(replica, "tokenize", body)
        except AttemptFailed as failure:
            self._suspect(replica, body, f"/tokenize: {failure}", pause_s=_PAUSE_S if failure.outcome == "slow" else 0)
            return None
        if status in _REFUSED:
            return None  # left for the generation to refuse: some servers take other fields here
        tokens = read_tokens(answer) if status == 200 else None
        if status in _MISSING or (status == 200 and tokens is None):
            self._suspect(replica, body, f"has no /tokenize ({status})", pause_s=_PAUSE_S, missing=True)
            return None
        if tokens is None or len(tokens) > prompt_bytes + _TEMPLATE_TOKENS or not (tokens or body.get("prompt") == ""):
            self._suspect(replica, body, f"answered {status} to /tokenize", pause_s=0)
            return None
        self._learn(replica, answer)
        return len(tokens)

    async def tokenize(self, body: dict[str, Any], affinity: str) -> list[int]:
        """Return the token ids of a prompt. Raises InvalidRequest, EngineUnavailable."""
        tried: list[Replica] = []
        while (replica := self._choose(affinity, {"missing"}, tried)) is not None:
            tried.append(replica)
            with contextlib.suppress(AttemptFailed):
                status, answer, _ = await self._ask(replica, "tokenize", body)
                if status in _REFUSED:
                    raise InvalidRequest("The model's server can't tokenize the prompt. Check it.", "prompt")
                tokens = read_tokens(answer) if status == 200 else None
                if tokens is not None:
                    self._learn(replica, answer)
                    return tokens
                if status in _MISSING or status == 200:
                    self._suspect(replica, body, f"has no /tokenize ({status})", pause_s=_PAUSE_S, missing=True)
        raise self._failed()

    async def detokenize(self, token_ids: list[int]) -> str:
        """Return the text of token ids. Raises InvalidRequest, EngineUnavailable."""
        body = {"model": self._upstream.model, "tokens": token_ids}
        tried: list[Replica] = []
        missing = 0
        while (replica := self._choose("", {"missing"}, tried)) is not None:
            tried.append(replica)
            with contextlib.suppress(AttemptFailed):
                status, answer, _ = await self._ask(replica, "detokenize", body)
                if status in _REFUSED:
                    raise InvalidRequest("A token id is not in the vocabulary.", "tokens")
                text = answer.get("prompt") if status == 200 and isinstance(answer, dict) else None
                if isinstance(text, str):
                    return text
                missing += status in _MISSING or status == 200
        raise _no_tokenizer() if tried and missing == len(tried) else self._failed()

    def forget(self, replica: Replica) -> None:
        """Reset the state of a replica that was unreachable: it may be a different server now."""
        replica.tokenizer = "answers"
        self._failures.pop(replica, None)
        check = self._checks.pop(replica, None)
        if check is not None:
            check.cancel()

    async def close(self) -> None:
        """End all checks. Idempotent."""
        checks = list(self._checks.values())
        for check in checks:
            check.cancel()
        await asyncio.gather(*checks, return_exceptions=True)

    def _choose(self, affinity: str, without: set[str], tried: list[Replica] | None = None) -> Replica | None:
        excluded = [replica for replica in self._pool.replicas if replica.tokenizer in without]
        return self._pool.choose(affinity, excluded + (tried or []))

    async def _ask(self, replica: Replica, route: str, body: dict[str, Any]) -> Answer:
        return await self._upstream.post(f"{replica.root}/{route}", body, _TIMEOUT_S)

    def _learn(self, replica: Replica, answer: dict[str, Any]) -> None:
        self._failures.pop(replica, None)
        replica.max_model_len = replica.max_model_len or read_count(answer, "max_model_len")

    def _suspect(
        self, replica: Replica, body: dict[str, Any], reason: str, *, pause_s: float, missing: bool = False
    ) -> None:
        """Estimate this replica's prompts until its tokenizer passes a check, which starts after `pause_s`."""
        self._failures[replica] = failures = self._failures.get(replica, 0) + 1
        if failures >= _MAX_FAILURES:
            pause_s = max(pause_s, _PAUSE_S)
        replica.tokenizer = "missing" if missing else "fails"
        if replica not in self._checks:
            self._checks[replica] = task = asyncio.create_task(self._check(replica, body, reason, pause_s))
            task.add_done_callback(lambda done: self._checked(replica, done))

    def _checked(self, replica: Replica, task: asyncio.Task[None]) -> None:
        if self._checks.get(replica) is task:
            del self._checks[replica]
            replica.tokenizer = "answers"

    async def _check(self, replica: Replica, body: dict[str, Any], reason: str, pause_s: float) -> None:
        """Repeat a short prompt of the same kind until the response is valid."""
        short = {name: value for name, value in body.items() if name in ("model", "add_generation_prompt")}
        short |= {"prompt": "a"} if "prompt" in body else {"messages": [{"role": "user", "content": "a"}]}
        logged = False
        while True:
            if pause_s:
                if not logged:
                    log.warning("replica %s %s: its prompts are estimated", replica.url, reason)
                    logged = True
                await asyncio.sleep(pause_s)
            with contextlib.suppress(AttemptFailed, EngineUnavailable):
                status, answer, _ = await self._ask(replica, "tokenize", short)
                if status == 200 and read_tokens(answer) is not None:
                    break
            pause_s = min(max(2 * pause_s, _PAUSE_S), _MAX_PAUSE_S)
        if logged:
            log.warning("replica %s counts prompts again", replica.url)

    def _failed(self) -> InvalidRequest | EngineUnavailable:
        self._pool.check()
        if all(replica.tokenizer == "missing" for replica in self._pool.replicas):
            return _no_tokenizer()
        return EngineUnavailable("The tokenizer of this model's server does not answer. Try again shortly.")


def _no_tokenizer() -> InvalidRequest:
    return InvalidRequest("The server of this model does not tokenize.", "model", "model_not_supported")
