"""Building, watching and closing vLLM's `AsyncLLM`: what engines of every kind in this process share.

Uses the engine level only, never vLLM's own server. Leaves out what is done with it: `engine.embedded` generates,
`engine.pooling` makes embeddings. A dead EngineCore fails every request within a step; a frozen one only shows in
`check_health`, which waits for the core's own answer and so hangs with it: callers bound it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import difflib
import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry

from engine.base import EngineDied, EngineError, EngineUnavailable, InvalidRequest, Prepared
from engine.demo import WEIGHTS as DEMO_WEIGHTS
from engine.vllm_metrics import drop_metrics, stat_logger
from engine.weights import find_snapshot, is_hub_id

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
_SHUTDOWN_S = 1.0  # a healthy core leaves at once
_claimed: weakref.WeakSet[Any] = weakref.WeakSet()
"""Core processes of engines that were built: another's failed start must not take them along."""


@cache
def _runtime_dir() -> str:
    """Return a private directory for vLLM's sockets, which it otherwise leaves behind in the temp directory."""
    path = tempfile.mkdtemp(prefix="shannon-vllm-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def _set_environment(wanted: dict[str, str]) -> None:
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("VLLM_RPC_BASE_PATH", _runtime_dir())


def _is_cpu_build() -> bool:
    """Tell the CPU wheel from the CUDA one without importing torch: it is installed under a name of its own."""
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
        return bool(metadata.version("vllm-cpu"))
    return False


def build_defaults() -> tuple[dict[str, str], dict[str, Any]]:
    """Return the environment and the engine arguments that this module sets for the installed vLLM build.

    For running vLLM's own server under the same conditions.
    """
    if not _is_cpu_build():
        return dict(_ENVIRONMENT), {}
    return _ENVIRONMENT | _CPU_ENVIRONMENT, dict(_CPU_ARGS)


def local_path(model: str, revision: str | None = None) -> str | None:
    """Return where a model's files are on this machine, or None where they must be fetched from the hub."""
    if model == "demo":
        return str(DEMO_WEIGHTS)
    if Path(model).is_dir():
        return model
    return str(find_snapshot(model, revision) or "") or None if is_hub_id(model) else None


def go_offline() -> None:
    """Keep the model libraries from asking the hub. Before they are imported, and only if no engine needs it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


class AsyncLLMEngine:
    """An AsyncLLM, built when started and free of any restart logic."""

    def __init__(
        self,
        model: str,
        args: dict[str, Any] | None = None,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Check `args` (any field of vLLM's AsyncEngineArgs) against vLLM itself.

        `model` is a Hugging Face id, a local path, or "demo" for the model that ships with this package. Of an id
        whose files are complete in the cache the hub is never asked. Raises InvalidRequest naming the field that
        vLLM does not know.
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
            raise EngineUnavailable("The engine is not running.")
        return self._llm

    async def start(self) -> None:
        """Build the AsyncLLM in a thread, so that the event loop goes on answering (10 s to minutes)."""
        before = set(multiprocessing.active_children())
        build = asyncio.ensure_future(asyncio.to_thread(self._build))
        try:
            self._llm = await asyncio.shield(build)
            _claimed.update(self._core_processes())
            await self._llm.is_sleeping()  # the first word from the core itself
        except asyncio.CancelledError:
            # The thread can't be cancelled; without its core it ends by itself.
            for process in set(multiprocessing.active_children()) - before - set(_claimed):
                process.kill()
            await asyncio.gather(build, return_exceptions=True)
            raise
        except Exception as error:  # vLLM raises all sorts here; the operator needs its words, not its type
            raise EngineError(f"vLLM could not start {self._model}: {error}") from error

    def _engine_args(self) -> AsyncEngineArgs:
        from vllm.engine.arg_utils import AsyncEngineArgs

        return AsyncEngineArgs(model=self._model, **self._args)

    def _build(self) -> AsyncLLM:
        """Build the engine, and whatever else is slow; runs in a thread. Subclasses extend it."""
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(
            self._engine_args(),
            usage_context=UsageContext.OPENAI_API_SERVER,  # defaults of the scheduler go by it: on an H100, four times
            stat_loggers=[stat_logger(self._metrics)],
        )

    def _trace_headers(self, prepared: Prepared) -> Mapping[str, str] | None:
        """Return the trace that vLLM is to tell of its work in, if it was told where: else it would warn."""
        return prepared.trace_headers if self._running().observability_config.otlp_traces_endpoint else None

    def _core_processes(self) -> list[Any]:
        manager = self._llm.engine_core.resources.engine_manager if self._llm else None
        return list(getattr(manager, "processes", ()))  # Ray's has none of ours

    async def check_health(self) -> None:
        """Ask the core whether it sleeps: `AsyncLLM.check_health` reads a flag that a frozen core leaves green.

        Of several cores (data parallel) a dead one never answers, and vLLM first takes 5 s to stop the others.
        """
        llm = self._running()
        # By their sentinels: `is_alive` says yes for a moment while a thread of vLLM's reaps the dead one.
        if multiprocessing.connection.wait([process.sentinel for process in self._core_processes()], timeout=0):
            raise EngineUnavailable("An engine core has died.")
        try:
            await llm.check_health()
            await llm.is_sleeping()
        except Exception as error:
            raise EngineUnavailable("The engine does not answer.") from error

    async def close(self) -> None:
        """End the generations, ask the core to stop, and kill it if it does not: a frozen one acts on no SIGTERM."""
        processes = self._core_processes()
        llm, self._llm = self._llm, None
        for collector in self._collectors:  # vLLM tells them of a core that died, not of one that was shut down
            collector.put(EngineDied("The engine failed during generation."))
        if llm is not None:
            await asyncio.to_thread(llm.shutdown, _SHUTDOWN_S)
        for process in processes:
            process.kill()
        drop_metrics(self._metrics)


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


@contextlib.contextmanager
def invalid_request(prompt_param: str = "messages") -> Iterator[None]:
    """Turn what vLLM raises about a request into InvalidRequest; leave what it raises about itself alone."""
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except VLLMClientError as error:
        # args[0] is the plain sentence; str() appends the parameter, which we send in a field of its own.
        parameter = getattr(error, "parameter", None)
        if parameter in ("input_tokens", "input_text"):  # the rendered prompt, which clients know by another name
            raise InvalidRequest(str(error.args[0]), prompt_param, "context_length_exceeded") from error
        raise InvalidRequest(str(error.args[0]), "messages" if parameter == "image" else parameter) from error
    except EngineDeadError as error:
        raise EngineUnavailable("The engine is not running.") from error
    except EngineError:
        raise
    except (ValueError, TypeError) as error:  # pydantic's ValidationError is a ValueError
        if " at 0x" in str(error) or "Failed to apply" in str(error):  # an image processor that prints its input
            raise InvalidRequest("The model can't process these images.", "messages") from error
        raise InvalidRequest(str(error)) from error
