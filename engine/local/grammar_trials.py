"""Tries grammars in a process of their own, before the engine core gets them.

A constraint of 28 characters can make the core search for seconds for the tokens that may come next, once per token and
for all of its requests, and one of 40 take all the threads that compile grammars. Neither shows in a constraint's size,
nor can either be stopped once begun. So each constraint is first compiled and walked through where it can be stopped
(`engine.local.grammar_process`), and what came of it is remembered. Raises InvalidRequest, which says what is too
much, and EngineOverloaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from engine.base import EngineOverloaded, InvalidRequest
from engine.local.grammar_process import LENGTH

if TYPE_CHECKING:
    from vllm.sampling_params import StructuredOutputsParams

log = logging.getLogger(__name__)

_MAX_REMEMBERED = 10_000
_MAX_WAIT_S = 120.0
"""Longest wait for a trial, including the trials ahead of it."""
_MAX_TRIAL_S = 120.0
"""Longest duration of a trial, including the start of the process on busy CPUs."""
_REASONS = {
    "compile": "it takes too long to be compiled to a grammar. Make it smaller: fewer properties, alternatives and "
    "repetitions, lower bounds of lengths",
    "tokens": "it leaves too many ways to continue, and takes too long for each token. Use fewer repetitions within "
    "repetitions, and fewer alternatives that begin alike",
}


class GrammarTrials:
    """Runs the trials of one engine, one at a time, and caches their results."""

    def __init__(self) -> None:
        self._config = b""
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = ThreadPoolExecutor(1, "grammar-trials")
        self._remembered: OrderedDict[bytes, str] = OrderedDict()
        self._turn = asyncio.Lock()
        self._turns_of_flow: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._trial: asyncio.Task[None] | None = None
        self._closed = False

    def begin(self) -> None:
        """Start the process. Importing vLLM takes it as long as the engine core, so both should start together."""
        with contextlib.suppress(OSError):
            self._started()

    def configure(self, vllm_config: Any) -> None:
        """Send the engine's configuration to the process. Trials need it."""
        import cloudpickle

        self._config = cloudpickle.dumps(vllm_config)  # which may hold classes of the model's own
        if self._process is not None:
            self._thread.submit(_send, self._process, self._config)

    async def check(self, constraint: StructuredOutputsParams, flow: str) -> None:
        """Raise InvalidRequest where a constraint would take too much. Of each flow one at a time has its turn."""
        from vllm.v1.structured_output.request import get_structured_output_key

        kind, text = get_structured_output_key(constraint)
        digest = hashlib.sha256(f"{kind.name} {text}".encode()).digest()
        if digest not in self._remembered:
            turn = self._turns_of_flow.get(flow)
            if turn is None:
                turn = self._turns_of_flow[flow] = asyncio.Lock()
            try:
                async with asyncio.timeout(_MAX_WAIT_S), turn:
                    await self._turn.acquire()
                    # A caller that leaves does not stop a trial: the process would have to begin again.
                    self._trial = asyncio.create_task(self._try(digest, pickle.dumps(constraint)))
                    self._trial.add_done_callback(lambda done: done.cancelled() or done.exception())
                    await asyncio.shield(self._trial)
            except TimeoutError:
                raise EngineOverloaded("Grammars take too long to prepare now.") from None
        if digest not in self._remembered:
            raise EngineOverloaded("Grammars take too long to prepare now.")
        self._remembered.move_to_end(digest)
        if (reason := _REASONS.get(self._remembered[digest])) is not None:
            raise InvalidRequest(f"{reason}.")

    async def _try(self, digest: bytes, message: bytes) -> None:
        """Remember what comes of a trial, and let the next one have its turn. Raises EngineOverloaded."""
        try:
            if digest not in self._remembered:
                judge = partial(_judged, self._started(), message)
                async with asyncio.timeout(_MAX_TRIAL_S):
                    word = await asyncio.get_running_loop().run_in_executor(self._thread, judge)
                if word != "late":
                    self._remembered[digest] = word
            if len(self._remembered) > _MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        except (TimeoutError, OSError) as error:
            self._end()
            if not self._closed:
                log.error("the process that tries grammars has ended, or does not answer")
            raise EngineOverloaded("Grammars can't be prepared now.") from error
        finally:
            self._turn.release()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise EngineOverloaded("Grammars can't be prepared now.")
        if self._process is None or self._process.poll() is not None:
            self._end()
            # From this thread, which lives as long as the gateway: the process dies with the thread that began it.
            self._process = subprocess.Popen(
                (sys.executable, "-m", "engine.local.grammar_process"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
            )
            if self._config:
                self._thread.submit(_send, self._process, self._config)
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # what is still in its buffer
                        pipe.close()

    def close(self) -> None:
        """End the process. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._process is not None:
            self._process.kill()
        # Whatever its thread waits for ends now, and so does the thread.
        self._thread.submit(self._end)
        self._thread.shutdown(wait=False)


def _send(process: subprocess.Popen[bytes], message: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(LENGTH.pack(len(message)) + message)
    process.stdin.flush()


def _judged(process: subprocess.Popen[bytes], message: bytes) -> str:
    """Return the process's answer to a constraint. Runs in a thread. Raises OSError if the process has ended."""
    _send(process, message)
    assert process.stdout is not None
    head = process.stdout.read(LENGTH.size)
    if len(head) < LENGTH.size:
        raise BrokenPipeError("it has ended")
    return process.stdout.read(LENGTH.unpack(head)[0]).decode()
