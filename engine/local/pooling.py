"""Embeddings by vLLM's `AsyncLLM` in this process, built with `runner="pooling"`.

One prompt per input, run side by side in the engine's batch. Does not handle classification and scoring. Raises what
`engine.base` says.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar

from engine.base import (
    EmbeddingRequest,
    EngineError,
    EngineOverloaded,
    GenerationRequest,
    InvalidRequest,
    Prepared,
    Task,
    not_offered,
)
from engine.local.async_llm import AsyncLLMEngine
from engine.local.client_errors import client_errors
from engine.local.rendering import COUNTED_CONTEXTS, counted, detokenize

if TYPE_CHECKING:
    from vllm.pooling_params import PoolingParams
    from vllm.v1.engine.async_llm import AsyncLLM


class PoolingEngine(AsyncLLMEngine):
    """An `Engine` for embeddings."""

    tasks: ClassVar[tuple[Task, ...]] = ("embed",)

    def __init__(self, model: str, args: dict[str, Any] | None = None, **more: Any) -> None:
        """Accepts the arguments of AsyncLLMEngine."""
        super().__init__(model, {"runner": "pooling"} | (args or {}), **more)

    @property
    def takes_images(self) -> bool:
        return False

    async def _prepare(self, request: EmbeddingRequest) -> Prepared:
        from vllm.exceptions import VLLMValidationError
        from vllm.pooling_params import PoolingParams

        params = PoolingParams(task="embed", dimensions=request.dimensions)
        with self._while_running() as llm, client_errors("input"):
            prompts = await self._render(llm, request)
        try:
            params.verify(llm.model_config)
        except VLLMValidationError as error:
            raise InvalidRequest(_dimensions_text(llm, request.dimensions), "dimensions") from error
        tokens = sum(len(prompt["prompt_token_ids"]) for prompt in prompts)
        return Prepared(request_id=request.request_id, prompt_tokens=tokens, max_tokens=0, payload=(prompts, params))

    async def _render(self, llm: AsyncLLM, request: EmbeddingRequest, contexts: int = 1) -> list[Any]:
        from vllm.renderers import TokenizeParams
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        for number, text in enumerate(request.inputs):
            if isinstance(text, list):
                llm.renderer.validate_token_ids(text, parameter=f"input[{number}]")
        extras = {"cache_salt": request.cache_salt} if request.cache_salt else {}
        prompts = [parse_model_prompt(llm.model_config, text) for text in request.inputs]
        params = TokenizeParams(max_total_tokens=contexts * self.max_model_len)
        return list(await llm.renderer.render_cmpl_async(prompts, params, prompt_extras=extras))

    async def pool(self, prepared: Prepared) -> list[list[float]]:
        prompts, params = prepared.payload
        requests = [
            self._embed_one(f"{prepared.request_id}-{number}", prompt, params, prepared)
            for number, prompt in enumerate(prompts)
        ]
        tasks = [asyncio.ensure_future(request) for request in requests]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _embed_one(self, request_id: str, prompt: Any, params: PoolingParams, prepared: Prepared) -> list[float]:
        from vllm.exceptions import GracefulHTTPError

        llm = self._running()
        collector: Any = None
        finished = False
        try:
            trace_headers = self._trace_headers(prepared)
            with client_errors("input"):
                async with self._core_answer():
                    collector = await llm.add_request(request_id, prompt, params, trace_headers=trace_headers)
            self._collectors.add(collector)
            output: Any = collector.get_nowait() or await collector.get()
            finished = True
        except GracefulHTTPError as error:  # vLLM's own admission control
            raise EngineOverloaded(str(error)) from error
        except EngineError:
            raise
        except Exception as error:  # what the core died of arrives here, in any type
            raise self._failure(llm, error) from error
        finally:
            self._collectors.discard(collector)
            if not finished:
                rest = await self._abort(llm, request_id, collector)
                if rest is not None:
                    self._count(prepared, rest)
        self._count(prepared, output)
        vector: list[float] = output.outputs.data.tolist()
        return vector

    @staticmethod
    def _count(prepared: Prepared, output: Any) -> None:
        """Add the tokens of `output`, unless it has no vector because the input was aborted."""
        if not output.outputs.data.numel():
            return
        prepared.usage.prompt_tokens += len(output.prompt_token_ids)
        prepared.usage.cached_tokens += output.num_cached_tokens or 0

    async def tokenize(self, request: GenerationRequest) -> list[int]:
        if request.prompt is None:
            raise not_offered("generate")
        texts = EmbeddingRequest(request_id=request.request_id, inputs=[request.prompt])
        with self._while_running() as llm, counted("prompt", llm.model_config), client_errors("prompt"):
            (prompt,) = await self._render(llm, texts, COUNTED_CONTEXTS)
        return list(prompt["prompt_token_ids"])

    async def detokenize(self, token_ids: list[int]) -> str:
        with self._while_running() as llm:
            return await detokenize(llm.renderer, token_ids)


def _dimensions_text(llm: AsyncLLM, wanted: int | None) -> str:
    config = llm.model_config
    if not config.is_matryoshka:
        return f"This model's embeddings have {config.embedding_size} dimensions. Leave 'dimensions' out."
    return f"This model can't make embeddings of {wanted} dimensions; it has at most {config.embedding_size}."
