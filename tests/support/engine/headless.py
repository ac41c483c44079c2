"""vLLM's renderer and parsers without a core: the prompt that a model gets, and what is read from chosen tokens.

Starts in two seconds, where an engine takes ten.

Example:

    headless = Headless(folder, args, tool_parser="mistral")
    rendered = await headless.render(request)
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from engine.base import Delta, GenerationRequest, Usage
from engine.local.choice_reader import ChoiceReader
from engine.local.embedded import EmbeddedEngine
from engine.local.parsers import find_parsers
from engine.local.rendering import Rendered, Renderer, naming_constraint


class Headless:
    """An engine's renderer, and tokens in place of its core."""

    def __init__(self, model: str | Path, args: dict[str, Any] | None = None, **parsers: Any) -> None:
        from vllm.renderers import renderer_from_config

        engine = EmbeddedEngine(str(model), args, **parsers)
        engine_args = engine._engine_args()
        names = find_parsers(engine_args.create_model_config(), engine._tool_parser, engine._reasoning_parser)
        config = engine_args.create_engine_config()
        renderer = renderer_from_config(config)
        self.config = config
        self.renderer = Renderer(
            cast(Any, SimpleNamespace(model_config=config.model_config, renderer=renderer)), *names
        )
        self.tokenizer: Any = renderer.get_tokenizer()

    async def render(self, request: GenerationRequest) -> tuple[Rendered, Any]:
        """Return a request as the core would get it: rendered, and its sampling parameters checked."""
        from vllm.v1.engine.input_processor import InputProcessor

        rendered = await self.renderer.render(request)
        params = self.renderer.sampling_params(rendered, request.max_tokens or 16)
        processor = InputProcessor(self.config, cast(Any, self.renderer._renderer.renderer))
        with naming_constraint(rendered.constraint):
            processor.process_inputs("r", rendered.engine_input, params, supported_tasks=("generate",))
        return rendered, params

    def read(self, rendered: Rendered, tokens: list[int], *, stream: bool) -> list[Delta]:
        """Return what is read from `tokens`, one at a time or whole, as if the model had said them and ended."""
        from vllm.outputs import CompletionOutput
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.engine.detokenizer import IncrementalDetokenizer

        params = self.renderer.sampling_params(rendered, 512)
        prompt_ids: Any = rendered.engine_input["prompt_token_ids"]
        request: Any = SimpleNamespace(
            prompt_token_ids=prompt_ids, prompt_embeds=None, sampling_params=params, request_id="r"
        )
        detokenizer = IncrementalDetokenizer.from_new_request(self.tokenizer, cast(EngineCoreRequest, request))
        parsers = self.renderer.choice_parsers(rendered, 1) or [None]
        reader = ChoiceReader(rendered, None, parsers[0], Usage())
        deltas = []
        pieces = [[token] for token in tokens] if stream else [tokens]
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            detokenizer.update(piece, False)
            text = detokenizer.get_next_output_text(last, delta=True)
            output = CompletionOutput(0, text, piece, None, None, finish_reason="stop" if last else None)
            deltas.append(reader.read(output, prompt_ids if number == 0 or not stream else None, stream=stream))
        return deltas
