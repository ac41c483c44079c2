"""Requests to vLLM's prompts: the parts of vLLM that change between releases.

Only this module uses `OnlineRenderer`, `ChatCompletionRequest` and `CompletionRequest`. It also makes vLLM's parsers of
tool calls and reasoning, one per choice, where a request needs them. Raises InvalidRequest.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import orjson
from pydantic import ValidationError

from engine.base import (
    GenerationRequest,
    InvalidRequest,
)
from engine.local.client_errors import client_errors
from engine.local.surrogates import with_whole_characters
from engine.messages import texts_of
from engine.sampling import PARAMETERS

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

_FIELDS = (*PARAMETERS, "request_id", "cache_salt", "priority", "stream", "structured_outputs", "response_format")
"""Fields that GenerationRequest and both request classes of vLLM have."""
_CHAT_FIELDS = ("tools", "tool_choice", "parallel_tool_calls", "reasoning_effort", "logprobs", "top_logprobs")
COUNTED_CONTEXTS = 4
"""Limit on prompts of `tokenize`, in context lengths: one thread tokenizes for all clients."""
_LONG_CHARS = 131_072
_CALL_CHARS = 200
"""Rendering cost of a tool call without its arguments, in characters of text."""
_MAX_WHITE_SPACE = 20
"""Limit on consecutive white space: a new line and an indentation."""
_SOURCE = re.compile(r"\[[\d:]+\] \S+:\d+: ")
"""Source location in the message of a grammar compiler."""


def keep_images(llm: AsyncLLM, cache_gb: float | None) -> None:
    """Give the renderer its own cache of processed images; `cache_gb` None means vLLM's default size.

    vLLM's cache has two halves, here and in the core, and sends each image to the core once. That requires that every
    rendered image reaches the core, in order. Here a rendered request may be rejected, cancelled, reordered or only
    counted, and then the core would lack the image for every later request. So the engine is built without that cache,
    and processed images are kept in this process only, as vLLM does with several front ends.
    """
    from vllm.config.multimodal import MultiModalConfig
    from vllm.multimodal.cache.factories import processor_only_cache_from_config

    config = llm.model_config.multimodal_config
    if config is None:
        return
    config.mm_processor_cache_gb = MultiModalConfig.mm_processor_cache_gb if cache_gb is None else cache_gb
    llm.renderer._mm_processor_only_cache = processor_only_cache_from_config(llm.vllm_config)


@dataclass(slots=True)
class Rendered:
    """A rendered prompt, and the data of its request for the engine and the parsers."""

    engine_input: Any
    prompt_tokens: int
    request: Any
    chat: bool
    """Whether the chat template was applied."""
    reasoning: dict[str, Any]
    """`reasoning_ended` and `reasoning_parser_kwargs` of AsyncLLM.add_request."""
    constraint: str | None
    """The request's field that constrains the text to a grammar."""
    thoughtless_parser: Callable[[], Any] | None = None
    """Makes a parser that takes all text for said; set where the prompt has closed the model's thinking already."""


class Renderer:
    """vLLM's renderer and parsers for one engine."""

    def __init__(self, llm: AsyncLLM, tool_parser: str | None, reasoning_parser: str | None) -> None:
        """Raises TypeError if vLLM does not know a parser, or if the tokenizer lacks tokens that it needs."""
        from vllm.renderers.online_renderer import OnlineRenderer

        self._config = llm.model_config
        self._long_requests = ThreadPoolExecutor(1, thread_name_prefix="render")
        self._renderer = OnlineRenderer(
            llm.model_config,
            llm.renderer,
            request_logger=None,
            chat_template=None,
            chat_template_content_format="auto",
            enable_auto_tools=bool(tool_parser),
            # A model that may not call tools should not see them.
            exclude_tools_when_tool_choice_none=True,
            tool_parser=tool_parser or None,
            reasoning_parser=reasoning_parser or None,
        )
        self._renderer.warmup()
        self._parser_cls = self._renderer.parser
        self._reasons = bool(reasoning_parser)
        self._default_sampling_params = llm.model_config.get_diff_sampling_param()

    async def render(self, request: GenerationRequest) -> Rendered:
        """Apply the chat template, or use the bare prompt, and count the tokens. Raises InvalidRequest."""
        return await self._render(request, contexts=1)

    async def tokenize(self, request: GenerationRequest) -> list[int]:
        """Return the prompt's token ids, even if they exceed the context length. Raises InvalidRequest."""
        with counted(request.prompt_param, self._config):
            rendered = await self._render(request, contexts=COUNTED_CONTEXTS)
        return list(rendered.engine_input["prompt_token_ids"])

    async def _render(self, request: GenerationRequest, *, contexts: int) -> Rendered:
        self._refuse_what_can_not_fit(request, contexts)
        if not is_long(request):
            return await self._render_here(request, contexts)
        # vLLM checks and converts every message on the event loop: 100 ms per MiB of tool calls. Its renderer keeps
        # nothing that belongs to a loop.
        render = partial(asyncio.run, self._render_here(request, contexts))
        return await asyncio.get_running_loop().run_in_executor(self._long_requests, render)

    def _refuse_what_can_not_fit(self, request: GenerationRequest, contexts: int) -> None:
        """Raise InvalidRequest on many more messages and calls than there may be tokens: vLLM checks each call, and
        holds the GIL meanwhile, before it counts."""
        most = contexts * self._config.max_model_len
        if 2 * most < len(request.messages) + sum(len(m.get("tool_calls") or ()) for m in request.messages):
            raise InvalidRequest(
                f"This model's maximum context length is {self._config.max_model_len} tokens, but the messages have "
                "many more than that. Shorten the messages.",
                request.prompt_param,
                "context_length_exceeded",
            )

    async def _render_here(self, request: GenerationRequest, contexts: int) -> Rendered:
        with client_errors(request.prompt_param):
            if request.prompt is None:
                return await self._render_chat(request, contexts)
            return await self._render_prompt(request, contexts)

    async def _render_chat(self, request: GenerationRequest, contexts: int) -> Rendered:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.renderers.inputs.preprocess import extract_prompt_len

        if request.tools and not self._takes_tools:
            raise InvalidRequest("This model can't call tools. Leave 'tools' out.", "tools")
        fields = _given(request, (*_FIELDS, *_CHAT_FIELDS))
        messages = with_whole_characters(request.messages)
        chat = _vllm_request(ChatCompletionRequest, contexts, messages=messages, **fields)
        # Into the cache of this process alone, see keep_images.
        rendered = await self._renderer.render_chat(chat, skip_mm_cache=True)
        if isinstance(rendered, ErrorResponse):
            raise InvalidRequest(rendered.error.message, rendered.error.param or "messages")
        (engine_input,) = rendered[1]
        parser = self._make_parser(chat) if self._reasons else None
        prompt_token_ids: Any = engine_input.get("prompt_token_ids") or []
        kwargs = self._renderer.effective_chat_template_kwargs(chat)
        reasoning = {
            "reasoning_ended": chat.resolve_reasoning_ended(parser, prompt_token_ids),
            "reasoning_parser_kwargs": {"chat_template_kwargs": kwargs} if parser is not None else None,
        }
        prompt_tokens = extract_prompt_len(self._config, engine_input)
        # The grammar of Mistral's parser covers the thought too: it says "ended" though the prompt closed nothing.
        closed = parser is not None and reasoning["reasoning_ended"] and not chat._grammar_from_parser
        thoughtless = partial(self._make_parser, chat, reasons=False) if closed else None
        return Rendered(engine_input, prompt_tokens, chat, True, reasoning, _constraint(request), thoughtless)

    async def _render_prompt(self, request: GenerationRequest, contexts: int) -> Rendered:
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.renderers.inputs.preprocess import extract_prompt_len

        logprobs = request.top_logprobs if request.logprobs else None
        fields = _given(request, _FIELDS)
        completion = _vllm_request(CompletionRequest, contexts, prompt=request.prompt, logprobs=logprobs, **fields)
        if isinstance(request.prompt, list):
            self._renderer.renderer.validate_token_ids(request.prompt, parameter="prompt")
        rendered = await self._renderer.render_completion(completion)
        if isinstance(rendered, ErrorResponse):
            raise InvalidRequest(rendered.error.message, rendered.error.param or "prompt")
        (engine_input,) = rendered
        prompt_tokens = extract_prompt_len(self._config, engine_input)
        return Rendered(engine_input, prompt_tokens, completion, False, {}, _constraint(request))

    def sampling_params(self, rendered: Rendered, max_tokens: int) -> SamplingParams:
        """Return vLLM's sampling parameters. Call after rendering, in which vLLM's parsers may change the request."""
        _bound_white_space(rendered.request)
        try:
            with client_errors():
                params: SamplingParams = rendered.request.to_sampling_params(max_tokens, self._default_sampling_params)
        except InvalidRequest as error:
            if str(error).startswith("n must be 1"):
                raise InvalidRequest("n must be 1 with temperature 0: all choices would be the same.", "n") from error
            raise
        return params

    async def detokenize(self, token_ids: list[int]) -> str:
        """Return the text of token ids. Raises InvalidRequest for ids outside the vocabulary."""
        return await detokenize(self._renderer.renderer, token_ids)

    @property
    def _takes_tools(self) -> bool:
        return self._renderer.use_harmony or (
            self._parser_cls is not None and self._parser_cls.tool_parser_cls is not None
        )

    def choice_parsers(self, rendered: Rendered, n: int) -> list[Any] | None:
        """Return one parser per choice, or None if the text needs no parsing."""
        if self._parser_cls is None or not rendered.chat:
            return None
        request = rendered.request
        if not (self._reasons or self._renderer.use_harmony or (request.tools and request.tool_choice != "none")):
            return None
        return [self._make_parser(request) for _ in range(n)]

    def _make_parser(self, chat: Any, *, reasons: bool = True) -> Any:
        parser_cls: Any = self._parser_cls
        if not reasons:
            parser_cls = type("Thoughtless", (parser_cls,), {"reasoning_parser_cls": None})
        return parser_cls(
            self._renderer.renderer.get_tokenizer(),
            chat.tools,
            chat_template_kwargs=self._renderer.effective_chat_template_kwargs(chat),
            model_config=self._config,
        )


@contextlib.contextmanager
def counted(param: str, config: ModelConfig) -> Iterator[None]:
    """Say in our words that a prompt is too long even to be counted."""
    try:
        yield
    except InvalidRequest as error:
        if error.code != "context_length_exceeded":
            raise
        most = COUNTED_CONTEXTS * config.max_model_len
        raise InvalidRequest(f"At most {most} tokens are counted. Shorten the {param}.", param, error.code) from error


async def detokenize(renderer: Any, token_ids: list[int]) -> str:
    """Return the text of token ids, in a thread: a million ids take half a second. Raises InvalidRequest."""
    from vllm.inputs import TokensPrompt
    from vllm.renderers import TokenizeParams

    with client_errors():
        renderer.validate_token_ids(token_ids, parameter="tokens")
        params = TokenizeParams(max_total_tokens=None, needs_detokenization=True)
        prompt = await renderer.tokenize_prompt_async(TokensPrompt(prompt_token_ids=token_ids), params)
    return str(prompt["prompt"])


@contextlib.contextmanager
def naming_constraint(param: str | None) -> Iterator[None]:
    """Name `param` in vLLM's error about a grammar, and remove vLLM's source locations from the message."""
    try:
        with client_errors():
            yield
    except InvalidRequest as error:
        if error.param is not None or param is None:
            raise
        reason = _SOURCE.sub("", str(error)).strip().rstrip(".")
        raise InvalidRequest(f"Invalid value for '{param}': {reason}.", param, error.code) from error


def is_long(request: GenerationRequest) -> bool:
    """Whether rendering takes too long for the event loop, even without the images."""
    if request.prompt is not None:
        return len(request.prompt) > _LONG_CHARS
    left = _LONG_CHARS
    for message in request.messages:
        calls = message.get("tool_calls") or ()
        left -= sum(map(len, texts_of(message)))
        left -= sum(_CALL_CHARS + len(call["function"].get("arguments") or "") for call in calls)
    return left < 0


def _constraint(request: GenerationRequest) -> str | None:
    if request.tools and request.tool_choice not in (None, "none", "auto"):
        return "tools"
    if request.structured_outputs:
        return f"structured_outputs.{next(iter(request.structured_outputs))}"
    if request.response_format is not None and request.response_format["type"] == "json_schema":
        return "response_format.json_schema.schema"
    return "tools" if request.tools else None


def _bound_white_space(request: Any) -> None:
    """Limit white space in the arguments of tool calls with a schema, as the engine's settings do for other JSON.

    vLLM's grammar for such calls ignores `disable_any_whitespace`.
    """
    bound = request.structured_outputs
    if bound is None or bound.structural_tag is None:
        return

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if node.get("type") == "json_schema" and node.get("style") == "json":
                node["max_whitespace_cnt"] = _MAX_WHITE_SPACE
                return  # what is below is the client's schema
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    tag = orjson.loads(bound.structural_tag)
    walk(tag)
    request.structured_outputs = dataclasses.replace(bound, structural_tag=orjson.dumps(tag).decode())


def _vllm_request(request_class: Any, contexts: int, **fields: Any) -> Any:
    """Build a request of vLLM. Raises InvalidRequest for a field that vLLM's schema rejects."""
    try:
        return _of_contexts(request_class, contexts)(**fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = str(first["loc"][0]) if first["loc"] else None
        what = str(first["msg"]).removeprefix("Value error, ").rstrip(".")
        raise InvalidRequest(f"Invalid value for '{param}': {what}." if param else f"{what}.", param) from error


@cache
def _of_contexts(request_class: Any, contexts: int) -> Any:
    """Return a request class of vLLM that accepts prompts of up to `contexts` context lengths."""
    if contexts == 1:
        return request_class

    class Longer(request_class):  # type: ignore[misc]
        def build_tok_params(self, model_config: Any) -> Any:
            params = super().build_tok_params(model_config)
            return dataclasses.replace(params, max_total_tokens=contexts * model_config.max_model_len)

    return Longer


def _given(request: GenerationRequest, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the named fields that are not None; vLLM's defaults apply to the others."""
    return {name: value for name in names if (value := getattr(request, name)) is not None}
