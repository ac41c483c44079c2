"""Generation by vLLM's `AsyncLLM` in this process.

An exact count before admission, exact tokens after an abort, and tool calls and reasoning through vLLM's own parsers.
Does not handle embeddings (`engine.local.pooling`). Raises what `engine.base` describes.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from engine.base import (
    Delta,
    EngineError,
    EngineOverloaded,
    GenerationRequest,
    InvalidRequest,
    Prepared,
    Task,
    resolve_max_tokens,
)
from engine.local.async_llm import AsyncLLMEngine
from engine.local.choice_reader import ChoiceReader, Unreadable
from engine.local.grammar_trials import GrammarTrials
from engine.local.parsers import find_parsers
from engine.local.rendering import Rendered, Renderer, is_long, keep_images, naming_constraint
from engine.local.whole_choices import WholeChoices
from engine.messages import images_of
from engine.queue.fair_slots import FairSlots

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

# JSON between fields may hold any white space, and a small model can write nothing but that until its context ends.
# Of the two backends that can forbid it, only xgrammar binds forced tool calls to the model's own format.
_ARGS: dict[str, Any] = {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
_T = TypeVar("_T")
_IMAGE_PLACES = max(2, min(8, (os.cpu_count() or 2) // 4))
"""Prompts with images that are rendered at once: decoding takes a thread each, and holds the pixels meanwhile."""


_MAX_PREPARE_S = 60.0
"""Longest wait for a preparing thread: its work can't be stopped, but waiting for it can."""


@contextlib.asynccontextmanager
async def _in_time(what: str) -> AsyncIterator[None]:
    """Raise EngineOverloaded when what is in here takes too long."""
    try:
        async with asyncio.timeout(_MAX_PREPARE_S) as bound:
            yield
    except TimeoutError:
        if bound.expired():
            raise EngineOverloaded(f"{what} take too long to prepare now.") from None
        raise


def _check_lm_format_enforcer() -> None:
    """Raise EngineError if the package does not work with this vLLM: the first grammar would end the engine core."""
    try:
        importlib.import_module("lmformatenforcer.integrations.vllm")
    except ImportError as error:
        raise EngineError(
            "structured_outputs_config.backend: lm-format-enforcer does not work with this version of vLLM. Use auto, "
            "xgrammar, guidance or outlines"
        ) from error


@dataclass(slots=True)
class _Job:
    """The payload of a Prepared."""

    rendered: Rendered
    sampling_params: Any
    top_logprobs: int | None
    stream: bool


class EmbeddedEngine(AsyncLLMEngine):
    """An `Engine` for generation."""

    tasks: ClassVar[tuple[Task, ...]] = ("generate",)

    def __init__(
        self,
        model: str,
        args: dict[str, Any] | None = None,
        *,
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Check `args` as AsyncLLMEngine does.

        The parsers are vLLM's, by name; None finds them from the model, "" does without.
        """
        super().__init__(model, _ARGS | (args or {}), revision=revision, trust_remote_code=trust_remote_code)
        # Decoded images are large, and rendering keeps the event loop's threads busy.
        self._image_places = FairSlots(_IMAGE_PLACES, spare=False)
        self._long_places = FairSlots(1, spare=False)
        self._grammar_checks = ThreadPoolExecutor(2, "grammar")
        self._trials = GrammarTrials()
        self._image_cache_gb: float | None = self._args.pop("mm_processor_cache_gb", None)
        self._tool_parser = tool_parser
        self._reasoning_parser = reasoning_parser

    @property
    def takes_images(self) -> bool:
        return bool(self._running().model_config.is_multimodal_model)

    def _build(self) -> AsyncLLM:
        from vllm.config import StructuredOutputsConfig

        model_config = self._engine_args().create_model_config()
        tool_parser, reasoning_parser = find_parsers(model_config, self._tool_parser, self._reasoning_parser)
        if reasoning_parser:
            # The core needs it as well: a grammar must not bind what the model thinks.
            self._args["reasoning_parser"] = reasoning_parser
        config = self._args["structured_outputs_config"]
        if isinstance(config, dict):  # vLLM writes the parser's name into it
            config = self._args["structured_outputs_config"] = StructuredOutputsConfig(**config)
        if config.backend == "lm-format-enforcer":
            _check_lm_format_enforcer()
        self._args["mm_processor_cache_gb"] = 0  # see keep_images
        llm = super()._build()
        keep_images(llm, self._image_cache_gb)
        try:
            self._renderer = Renderer(llm, tool_parser, reasoning_parser)
        except BaseException:
            llm.shutdown()
            raise
        return llm

    async def start(self) -> None:
        """Start the engine and the process of grammar trials."""
        self._trials.begin()
        try:
            await super().start()
        except BaseException:
            self._trials.close()
            raise
        self._trials.configure(self._running().vllm_config)

    async def _prepare(self, request: GenerationRequest) -> Prepared:
        from vllm.sampling_params import RequestOutputKind

        with self._while_running():
            rendered = await self._in_turn(request, self._renderer.render)
        max_tokens = resolve_max_tokens(request, rendered.prompt_tokens, self.max_model_len)
        sampling_params = self._renderer.sampling_params(rendered, max_tokens)
        if request.n > 1:
            sampling_params.output_kind = RequestOutputKind.DELTA  # see whole_choices.py
        return Prepared(
            request_id=request.request_id,
            prompt_tokens=rendered.prompt_tokens,
            max_tokens=max_tokens,
            n=request.n,
            payload=_Job(rendered, sampling_params, request.top_logprobs if request.logprobs else None, request.stream),
        )

    async def _in_turn(
        self, request: GenerationRequest, render: Callable[[GenerationRequest], Coroutine[Any, Any, _T]]
    ) -> _T:
        """The result of `render` for a request.

        One that takes long, by its images or its length, waits for its turn among those of all keys, and keeps the
        place until it is done: nothing ends it. Raises InvalidRequest, EngineOverloaded.
        """
        images = list(images_of(request.messages))
        if not images:
            if not is_long(request):
                return await render(request)
            async with _in_time("Long prompts"):
                return await self._long_places.run_for(render(request), request.flow)
        if not self.takes_images:
            raise InvalidRequest("This model does not take images. Send text only.", images[0].place)
        for image in images:
            if not image.url.startswith("data:"):  # vLLM would fetch it, from any address
                raise InvalidRequest("Images must be data URLs here.", f"{image.place}.image_url.url")
        async with _in_time("Images"):
            return await self._image_places.run_for(render(request), request.flow)

    async def generate(self, prepared: Prepared) -> AsyncGenerator[Delta, None]:
        """Yield deltas. Tokens are counted by token ids, not by outputs: vLLM merges outputs that are read late."""
        from vllm.exceptions import GracefulHTTPError

        llm = self._running()
        job: _Job = prepared.payload
        collector: Any = None
        finished = False
        whole = WholeChoices() if prepared.n > 1 and not job.stream else None
        try:
            readers = self._readers(prepared)
            with naming_constraint(job.rendered.constraint):
                async with self._core_answer():
                    collector = await llm.add_request(
                        prepared.request_id,
                        await self._checked_input(llm, prepared),
                        job.sampling_params,
                        trace_headers=self._trace_headers(prepared),
                        **job.rendered.reasoning,
                    )
            self._collectors.add(collector)
            while not finished:
                output: Any = collector.get_nowait() or await collector.get()  # a RequestOutput: we never pool
                finished = output.finished
                self._count(prepared, output)
                for choice in output.outputs if whole is None else whole.add(output.outputs):
                    yield readers[choice.index].read(choice, output.prompt_token_ids, stream=job.stream)
        except GracefulHTTPError as error:  # vLLM's own admission control
            raise EngineOverloaded(str(error)) from error
        except Unreadable as error:
            raise EngineError("The model's output could not be parsed.") from error
        except EngineError:
            raise
        except Exception as error:  # what the core died of arrives here, in any type
            raise self._failure(llm, error) from error
        finally:
            self._collectors.discard(collector)
            if not finished:
                # By the id we chose, not the collector's: a cancellation inside add_request leaves no collector, and
                # the failure of one choice leaves its siblings.
                rest = await self._abort(llm, prepared.request_id, collector)
                if rest is not None:
                    self._count(prepared, rest)

    async def _checked_input(self, llm: AsyncLLM, prepared: Prepared) -> Any:
        """Return vLLM's input. If there is a grammar, the input is already checked, in a thread.

        Checking a grammar means compiling it, which takes up to half a second and would block the event loop. Grammars
        that take longer, here or in the core, have been rejected before.
        """
        job: _Job = prepared.payload
        if job.sampling_params.structured_outputs is None:
            return job.rendered.engine_input
        await self._trials.check(job.sampling_params.structured_outputs, prepared.flow)
        check = partial(
            llm.input_processor.process_inputs,
            prepared.request_id,
            job.rendered.engine_input,
            job.sampling_params,
            supported_tasks=await llm.get_supported_tasks(),
            trace_headers=self._trace_headers(prepared),
        )
        async with _in_time("Grammars"):
            return await asyncio.get_running_loop().run_in_executor(self._grammar_checks, check)

    def _readers(self, prepared: Prepared) -> list[ChoiceReader]:
        job: _Job = prepared.payload
        parsers = self._renderer.choice_parsers(job.rendered, prepared.n) or [None] * prepared.n
        return [ChoiceReader(job.rendered, job.top_logprobs, parser, prepared.usage) for parser in parsers]

    @staticmethod
    def _count(prepared: Prepared, output: Any) -> None:
        """Add the tokens of `output`: delta outputs have new tokens, final ones all of them."""
        usage = prepared.usage
        for choice in output.outputs:
            usage.completion_tokens += len(choice.token_ids)
        if not usage.prompt_tokens and usage.completion_tokens:
            usage.prompt_tokens = prepared.prompt_tokens
            usage.cached_tokens = output.num_cached_tokens or 0
            if output.metrics is not None:
                prepared.queue_s += max(0.0, output.metrics.scheduled_ts - output.metrics.queued_ts)

    async def close(self) -> None:
        self._grammar_checks.shutdown(wait=False)
        self._trials.close()
        await super().close()

    async def tokenize(self, request: GenerationRequest) -> list[int]:
        with self._while_running():
            return await self._in_turn(request, self._renderer.tokenize)

    async def detokenize(self, token_ids: list[int]) -> str:
        with self._while_running():
            return await self._renderer.detokenize(token_ids)
