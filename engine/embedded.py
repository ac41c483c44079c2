"""vLLM's `AsyncLLM` in this process: the only module that imports vllm.

Uses the engine level only (AsyncLLM, its renderer, SamplingParams), never vLLM's own server. The parts that move
between vLLM releases (`OnlineRenderer`, `ChatCompletionRequest`, the output collector that `add_request` returns)
are touched here and nowhere else. Leaves out parsers for tools and reasoning, and pooling models.

Fails as `engine.base` says. A dead EngineCore turns every generation into EngineDied within a step; a frozen one
only shows in `check_health`, which waits for the core's own answer and so hangs with it: callers bound it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import difflib
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.base import (
    Delta,
    EngineDied,
    EngineError,
    EngineOverloaded,
    EngineUnavailable,
    FinishReason,
    GenerationRequest,
    InvalidRequest,
    Prepared,
    TokenLogprob,
    resolve_max_tokens,
)
from engine.demo import WEIGHTS as DEMO_WEIGHTS

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector

# Set before vllm is imported; what the operator has set stays.
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
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
# JSON between fields may hold any white space, and a small model can write nothing but that until its context ends.
# Of the two backends that can forbid it, guidance takes more of JSON Schema and compiles lazily.
_ARGS: dict[str, Any] = {"structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True}}
_SHUTDOWN_S = 1.0  # a healthy core leaves at once

_FINISH_REASONS: dict[str | None, FinishReason | None] = {
    None: None,
    "stop": "stop",
    "length": "length",
    "repetition": "stop",  # vLLM's own; OpenAI's clients know no such reason
}


@cache
def _runtime_dir() -> str:
    """Return a private directory for vLLM's sockets, which it otherwise leaves behind in the temp directory."""
    path = tempfile.mkdtemp(prefix="shannon-vllm-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def _set_environment(wanted: dict[str, str], offline: bool) -> None:
    for name, value in (wanted | ({"HF_HUB_OFFLINE": "1"} if offline else {})).items():
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


class EmbeddedEngine:
    """An `Engine` over vLLM's AsyncLLM, built when started and free of any restart logic."""

    def __init__(self, model: str, args: dict[str, Any] | None = None) -> None:
        """Check `args` (any field of vLLM's AsyncEngineArgs) against vLLM itself.

        `model` is a Hugging Face id, a local path, or "demo" for the model that ships with this package.
        Raises InvalidRequest naming the field that vLLM does not know.
        """
        self._model = str(DEMO_WEIGHTS) if model == "demo" else model
        environment, default_args = build_defaults()
        _set_environment(environment, offline=Path(self._model).is_dir())
        # The name on vLLM's metrics; by default it is the path.
        self._args = {"served_model_name": [model]} | _ARGS | default_args | (args or {})
        _refuse_unknown_args(self._args)
        self._llm: AsyncLLM | None = None
        self._processes: list[Any] = []
        self._collectors: set[RequestOutputCollector] = set()

    @property
    def max_model_len(self) -> int:
        return int(self._running().model_config.max_model_len)

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
            await self._llm.is_sleeping()  # the first word from the core itself
        except asyncio.CancelledError:
            # The thread can't be cancelled; without its core it ends by itself.
            for process in _children_since(before):
                process.kill()
            await asyncio.gather(build, return_exceptions=True)
            raise
        except Exception as error:  # vLLM raises all sorts here; the operator needs its words, not its type
            raise EngineError(f"vLLM could not start {self._model}: {error}") from error
        finally:
            self._processes = _children_since(before)

    def _build(self) -> AsyncLLM:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.renderers.online_renderer import OnlineRenderer
        from vllm.v1.engine.async_llm import AsyncLLM

        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=self._model, **self._args))
        self._renderer = OnlineRenderer(
            llm.model_config,
            llm.renderer,
            request_logger=None,
            chat_template=None,
            chat_template_content_format="auto",
        )
        self._renderer.warmup()
        self._default_sampling_params = llm.model_config.get_diff_sampling_param()
        return llm

    async def prepare(self, request: GenerationRequest) -> Prepared:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.renderers.inputs.preprocess import extract_prompt_len

        llm = self._running()
        with _invalid_request():
            chat = ChatCompletionRequest(**_chat_fields(request))
            rendered = await self._renderer.render_chat(chat)
            if isinstance(rendered, ErrorResponse):
                raise InvalidRequest(rendered.error.message, rendered.error.param or "messages")
            (engine_input,) = rendered[1]
            prompt_tokens = extract_prompt_len(llm.model_config, engine_input)
            max_tokens = resolve_max_tokens(request, prompt_tokens, self.max_model_len)
            # Only after rendering: vLLM's parsers may change the request there.
            sampling_params = chat.to_sampling_params(max_tokens, self._default_sampling_params)
        return Prepared(
            request_id=request.request_id,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            n=request.n,
            payload=(engine_input, sampling_params, request.top_logprobs if request.logprobs else None),
        )

    async def generate(self, prepared: Prepared) -> AsyncGenerator[Delta, None]:
        """Yield deltas. Tokens are counted as the core made them, never by frames: vLLM merges what we read late."""
        from vllm.exceptions import GracefulHTTPError

        llm = self._running()
        engine_input, sampling_params, top_logprobs = prepared.payload
        collector = None
        finished = False
        try:
            with _invalid_request():
                collector = await llm.add_request(prepared.request_id, engine_input, sampling_params)
            self._collectors.add(collector)
            while not finished:
                output: Any = collector.get_nowait() or await collector.get()  # a RequestOutput: we never pool
                finished = output.finished
                self._count(prepared, output)
                for choice in output.outputs:
                    yield _delta(choice, top_logprobs)
        except GracefulHTTPError as error:  # vLLM's own admission control
            finished = True
            raise EngineOverloaded(str(error)) from error
        except EngineError:
            finished = True
            raise
        except Exception as error:  # what the core died of arrives here, in any type
            finished = True
            raise EngineDied("The engine failed during generation.") from error
        finally:
            if collector is not None:
                self._collectors.discard(collector)
            if not finished and not llm.errored:
                # By the id we chose, not the collector's: a cancellation inside add_request leaves no collector.
                await llm.abort(prepared.request_id)
                if collector is not None and (rest := collector.get_nowait()) is not None:
                    self._count(prepared, rest)

    @staticmethod
    def _count(prepared: Prepared, output: Any) -> None:
        """Add the tokens of `output`: delta outputs carry new tokens, final ones all of them, each exactly once."""
        usage = prepared.usage
        for choice in output.outputs:
            usage.completion_tokens += len(choice.token_ids)
        if not usage.prompt_tokens and usage.completion_tokens:
            usage.prompt_tokens = prepared.prompt_tokens
            usage.cached_tokens = output.num_cached_tokens or 0
            if output.metrics is not None:
                prepared.queue_s = max(0.0, output.metrics.scheduled_ts - output.metrics.queued_ts)

    async def check_health(self) -> None:
        """Ask the core whether it sleeps: `AsyncLLM.check_health` reads a flag that a frozen core leaves green."""
        llm = self._running()
        try:
            await llm.check_health()
            await llm.is_sleeping()
        except Exception as error:
            raise EngineUnavailable("The engine does not answer.") from error

    async def close(self) -> None:
        """End the generations, ask the core to stop, and kill it if it does not: a frozen one acts on no SIGTERM."""
        llm, self._llm = self._llm, None
        for collector in self._collectors:  # vLLM tells them of a core that died, not of one that was shut down
            collector.put(EngineDied("The engine failed during generation."))
        if llm is not None:
            await asyncio.to_thread(llm.shutdown, _SHUTDOWN_S)
        for process in self._processes:
            process.kill()
        self._processes = []


def _children_since(before: set[Any]) -> list[Any]:
    return [process for process in multiprocessing.active_children() if process not in before]


def _refuse_unknown_args(args: dict[str, Any]) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = [field.name for field in dataclasses.fields(AsyncEngineArgs) if field.name != "model"]
    for name in args:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise InvalidRequest(f"args.{name} is not a field of vLLM's AsyncEngineArgs.{hint}", f"args.{name}")


def _chat_fields(request: GenerationRequest) -> dict[str, Any]:
    """Return the fields of vLLM's ChatCompletionRequest; what was not given is left out, so its defaults hold."""
    fields = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    del fields["default_max_tokens"], fields["max_total_tokens"], fields["max_tokens_param"]
    # Checked by resolve_max_tokens after rendering; given here, vLLM would refuse in its own words first.
    del fields["max_tokens"]
    return {name: value for name, value in fields.items() if value is not None}


@contextlib.contextmanager
def _invalid_request() -> Any:
    """Turn what vLLM raises about a request into InvalidRequest; leave what it raises about itself alone."""
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except VLLMClientError as error:
        # args[0] is the plain sentence; str() appends the parameter, which we send in a field of its own.
        parameter = getattr(error, "parameter", None)
        if parameter in ("input_tokens", "input_text"):  # the rendered prompt, which clients send as messages
            raise InvalidRequest(str(error.args[0]), "messages", "context_length_exceeded") from error
        raise InvalidRequest(str(error.args[0]), parameter) from error
    except EngineDeadError as error:
        raise EngineUnavailable("The engine is not running.") from error
    except (ValueError, TypeError) as error:  # pydantic's ValidationError is a ValueError
        raise InvalidRequest(str(error)) from error


def _delta(choice: CompletionOutput, top_logprobs: int | None) -> Delta:
    logprobs = _logprobs(choice, top_logprobs) if top_logprobs is not None else None
    try:
        return Delta(choice.text, choice.index, _FINISH_REASONS[choice.finish_reason], logprobs)
    except KeyError:  # "abort" and "error": the core gave up on the request by itself
        raise EngineDied("The engine failed during generation.") from None


def _logprobs(choice: CompletionOutput, top: int) -> list[TokenLogprob]:
    """Convert vLLM's per-step {token id: Logprob} maps, in which the sampled token stands beside the best ones."""
    converted = []
    for token_id, step in zip(choice.token_ids, choice.logprobs or (), strict=False):
        assert step is not None  # None stands only for a prompt's first token
        ranked = sorted(step.values(), key=lambda entry: entry.rank or 0)[:top]
        converted.append(_token_logprob(step[token_id], tuple(_token_logprob(entry) for entry in ranked)))
    return converted


def _token_logprob(entry: Any, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
    text = entry.decoded_token or ""
    # JSON has no -inf; OpenAI's documentation gives -9999.0 for "very unlikely".
    return TokenLogprob(text, max(entry.logprob, -9999.0), list(text.encode()), top)
