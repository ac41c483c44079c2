"""An `Inspector` that runs the checkpoint through transformers, in a process of its own.

The process (`engine.inspector.inspector_process`) is started at the first request, serves one at a time, and ends when
it has been idle. It is asked for each step, so a client that leaves has stopped it within one; one that hangs is
killed, and the next request gets another. This module does not import torch. Raises InvalidRequest,
EngineOverloaded when too many wait, with EngineUnavailable when there is nothing to load or a request takes too long,
and with EngineDied.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import orjson

from engine.base import EngineDied, EngineOverloaded, EngineUnavailable, InvalidRequest
from engine.inspector.base import InspectedToken, InspectionRequest, Reply, Shape, Source, find_checkpoint, read_shape
from engine.inspector.inspector_process import LENGTH

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_BUFFER_BYTES = 2**20  # of the pipe's reader: a matrix takes megabytes
_ENVIRONMENT = (
    *("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_MODULES_CACHE", "XDG_CACHE_HOME"),
)
"""Environment variables that the process inherits: paths, no secrets."""


class _Process:
    """The process and its checkpoint."""

    def __init__(self, process: asyncio.subprocess.Process, path: str) -> None:
        self.path = path
        self._process = process
        self.gone = asyncio.create_task(process.wait())
        """Done when the process has ended and is reaped."""
        self._killed = False

    @property
    def usable(self) -> bool:
        return not self._killed and not self.gone.done()

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._killed = True
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def ask(self, request: dict[str, Any], timeout_s: float) -> tuple[dict[str, Any], list[bytes]]:
        """Return the head of the answer and its documents. Raises InvalidRequest and EngineDied."""
        try:
            async with asyncio.timeout(timeout_s):
                head, *documents = (await self._exchange(orjson.dumps(request))).split(b"\n")
        except TimeoutError:
            self.kill()
            log.error("the inspector has not answered %r for %g s", request["op"], timeout_s)
            raise EngineDied("The inspector took too long. Try again.") from None
        except (OSError, EOFError) as error:
            self.kill()
            log.error("the inspector died during %r: %r", request["op"], error)
            raise EngineDied("The inspector failed. Try again.") from error
        answer: dict[str, Any] = orjson.loads(head)
        if answer["kind"] == "refused":
            raise InvalidRequest(answer["message"], answer["param"], answer["code"])
        if answer["kind"] == "failed":
            self.kill()  # whatever state it is in now
            log.error("the inspector failed at %r: %s", request["op"], answer["reason"])
            raise EngineDied("The inspector failed. Try again.")
        return answer, documents

    async def _exchange(self, message: bytes) -> bytes:
        writer, reader = self._process.stdin, self._process.stdout
        assert writer is not None
        assert reader is not None
        writer.write(LENGTH.pack(len(message)) + message)
        await writer.drain()
        (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        return await reader.readexactly(length)


class _Turn:
    """One request's exclusive use of the process, until `_end`, which a timer may call too."""

    def __init__(self) -> None:
        self.ended = False
        self.work: asyncio.Future[Any] | None = None
        """The current message exchange. It survives cancellation, because an answer must be read before the next
        message."""


class TransformersInspector:
    """Runs inspections in one process, one at a time."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        *,
        device: str = "cpu",
        threads: int = 1,
        max_prompt_bytes: int = 16_384,
        max_attention_tokens: int = 1024,
        max_queued_requests: int = 4,
        idle_s: float = 300.0,
        load_timeout_s: float = 300.0,
        stall_s: float = 60.0,
        max_request_s: float = 120.0,
        command: Sequence[str] = (sys.executable, "-m", "engine.inspector.inspector_process"),
    ) -> None:
        """`sources` are by engine. `stall_s` limits one step, `max_request_s` a whole request after the model is
        loaded. The device and the threads are appended to `command`."""
        self._sources = sources
        self._device = device
        self._command = (*command, device, str(threads))
        self._threads = threads
        self._bounds = {"max_prompt_bytes": max_prompt_bytes, "max_attention_tokens": max_attention_tokens}
        self._max_queued_requests = max_queued_requests
        self._idle_s = idle_s
        self._load_timeout_s = load_timeout_s
        self._stall_s = stall_s
        self._max_request_s = max_request_s
        self._shapes: dict[str, Shape] = {}
        self._free = asyncio.Lock()
        self._requests = 0  # running and waiting
        self._process: _Process | None = None
        self._turn: _Turn | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Id of the process, None if there is none."""
        process = self._process
        return None if process is None or process.gone.done() else process.pid

    def shape(self, engine: str) -> Shape:
        shape = self._shapes.get(engine)
        if shape is None:
            source = self._sources.get(engine)
            if source is None:
                raise InvalidRequest(
                    "This model can't be inspected: its weights are not in this gateway.",
                    "model",
                    "model_not_supported",
                )
            path = find_checkpoint(source)
            if path is None:
                raise EngineUnavailable("The model's weights are not on this machine yet. Try again later.")
            shape = self._shapes[engine] = read_shape(path, source)
        return shape

    async def trace(self, engine: str, request: InspectionRequest) -> AsyncGenerator[InspectedToken | Reply, None]:
        async with contextlib.aclosing(self._perform("trace", engine, request)) as answers:
            async for answer, documents in answers:
                if answer["kind"] == "step":
                    yield InspectedToken(*documents)
                else:
                    yield Reply(answer["reply"])

    async def attention(self, engine: str, request: InspectionRequest) -> bytes:
        async with contextlib.aclosing(self._perform("attention", engine, request)) as answers:
            _, (matrix,) = await anext(answers)
            return matrix

    async def _perform(
        self, op: str, engine: str, request: InspectionRequest
    ) -> AsyncGenerator[tuple[dict[str, Any], list[bytes]], None]:
        """Yield the answers with a result, until the last."""
        shape = self.shape(engine)
        shape.check(request.trace_layer, request.head)
        async with self._in_turn() as turn:
            process = await self._run(turn, self._load(shape))
            deadline = asyncio.get_running_loop().call_later(self._max_request_s, self._end, turn)
            try:
                fields = asdict(request) | self._bounds | {"max_model_len": shape.max_model_len}
                question = {"op": op} | fields
                while True:
                    answer, documents = await self._run(turn, process.ask(question, self._stall_s))
                    question = {"op": "next"}
                    if answer["kind"] != "busy":
                        yield answer, documents
                    if answer["kind"] in ("reply", "attention"):
                        return
            finally:
                deadline.cancel()

    @contextlib.asynccontextmanager
    async def _in_turn(self) -> AsyncIterator[_Turn]:
        """Wait for the process to be free. Raises EngineOverloaded and EngineUnavailable."""
        if self._requests > self._max_queued_requests:
            raise EngineOverloaded("Too many inspections wait.", reason="inspector")
        self._requests += 1
        try:
            await self._free.acquire()
        except BaseException:
            self._requests -= 1
            raise
        if self._idle is not None:
            self._idle.cancel()
        turn = self._turn = _Turn()
        try:
            if self._closed:
                raise EngineUnavailable("The inspector has been shut down.")
            yield turn
        finally:
            self._end(turn)

    def _end(self, turn: _Turn) -> None:
        """Admit the next request once the process has answered the last message."""
        if turn.ended:
            return
        turn.ended = True
        if turn.work is None or turn.work.done():
            self._release()
        else:
            turn.work.add_done_callback(self._after_work)

    def _after_work(self, work: asyncio.Future[Any]) -> None:
        if not work.cancelled():
            work.exception()  # no caller is left to report it to
        self._release()

    def _release(self) -> None:
        self._turn = None
        self._requests -= 1
        self._free.release()
        if not self._requests and not self._closed:
            self._idle = asyncio.get_running_loop().call_later(self._idle_s, self._unload)

    def _unload(self) -> None:
        if self._process is not None:
            log.info("the inspector has been idle for %g s and ends", self._idle_s)
            self._process.kill()

    async def _run(self, turn: _Turn, work: Coroutine[Any, Any, _T]) -> _T:
        """The result of `work` with the process. Raises EngineUnavailable when the turn is over."""
        if turn.ended:
            work.close()
        else:
            turn.work = asyncio.ensure_future(work)
            result: _T = await asyncio.shield(turn.work)
            if not turn.ended:
                return result
        raise EngineUnavailable(
            f"The inspection was ended after {self._max_request_s:g} s, so that others get their turn. "
            "Ask for fewer tokens."
        )

    async def _load(self, shape: Shape) -> _Process:
        """Return the process with this checkpoint loaded. Raises EngineUnavailable and EngineDied."""
        process = self._process
        if process is not None:
            if process.path == shape.path and process.usable:
                return process
            process.kill()
            await process.gone
        log.info("loading %s to inspect it", shape.path)
        try:
            process = self._process = await self._start(shape.path)
            if self._closed:  # meanwhile
                process.kill()
            fields = {"path": shape.path, "trust_remote_code": shape.trust_remote_code}
            await process.ask({"op": "load"} | fields, self._load_timeout_s)
        except (OSError, EngineDied) as error:
            log.error("%s can't be loaded to inspect it: %r", shape.path, error)
            raise EngineUnavailable("The model could not be loaded for inspection.") from error
        return process

    async def _start(self, path: str) -> _Process:
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | {
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path if path),
            "LANG": "C.UTF-8",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(self._threads),
        }
        if self._device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""  # to look at a GPU takes memory on it
        return _Process(
            await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                env=environment,
                limit=_BUFFER_BYTES,
                start_new_session=True,  # a Ctrl-C is for the gateway, which drains first
            ),
            path,
        )

    async def close(self) -> None:
        self._closed = True
        if self._idle is not None:
            self._idle.cancel()
        if self._process is not None:
            self._process.kill()
        if self._turn is not None and self._turn.work is not None:
            await asyncio.gather(self._turn.work, return_exceptions=True)
        if self._process is not None:
            self._process.kill()
            await self._process.gone
