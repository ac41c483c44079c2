"""vLLM's outputs to deltas: texts, thoughts, tool calls, log probabilities and finish reasons of one choice.

Raises InvalidRequest for a grammar that the core could not compile, EngineDied where the core gave up, and Unreadable.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from engine.base import Delta, EngineDied, FinishReason, InvalidRequest, TokenLogprob, ToolCallDelta, Usage
from engine.local.rendering import Rendered

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput

log = logging.getLogger(__name__)

_FINISH_REASONS: dict[str | None, FinishReason | None] = {
    None: None,
    "stop": "stop",
    "length": "length",
    "repetition": "stop",  # vLLM's own; OpenAI's clients know no such reason
}


class Unreadable(Exception):
    """A parser failed on the model's output. The engine is not affected."""


class ChoiceReader:
    """Converts the outputs of one choice to deltas, through its parser if it has one."""

    def __init__(self, rendered: Rendered, top_logprobs: int | None, parser: Any, usage: Usage) -> None:
        self._chat = rendered.request
        self._constraint = rendered.constraint
        self._thoughtless_parser = rendered.thoughtless_parser
        self._top_logprobs = top_logprobs
        self._parser = parser
        self._usage = usage
        self._token_ids: list[int] = []
        self._called = False
        self._thought = False

    def read(self, choice: CompletionOutput, prompt_token_ids: list[int] | None, *, stream: bool) -> Delta:
        """The delta of one output. It may be empty, because parsers hold back what may become a call."""
        logprobs = _logprobs(choice, self._top_logprobs) if self._top_logprobs is not None else None
        try:
            finish_reason = _FINISH_REASONS[choice.finish_reason]
        except KeyError:  # "abort" and "error": the core gave up on the request by itself
            if self._constraint is not None and choice.finish_reason == "error":
                what = f"Invalid value for '{self._constraint}': it is too complex to be compiled to a grammar."
                raise InvalidRequest(what, self._constraint) from None
            raise EngineDied() from None
        if self._parser is None:
            return Delta(choice.text, choice.index, finish_reason, logprobs, stop_reason=_stop_string(choice))
        delta = Delta("", choice.index, finish_reason, logprobs, stop_reason=_stop_string(choice))
        self._token_ids += choice.token_ids
        try:
            if stream:
                self._parse_delta(delta, choice, prompt_token_ids)
            else:
                self._parse_whole(delta, choice, prompt_token_ids)
        except Exception as error:  # models may write anything, and parsers may raise anything
            log.exception("the parser failed on the model's output")
            raise Unreadable from error
        if self._chat.parallel_tool_calls is False:
            delta.tool_calls = [call for call in delta.tool_calls if call.index == 0]
        self._called = self._called or bool(delta.tool_calls)
        if finish_reason is not None:
            self._usage.reasoning_tokens += self._parser.count_reasoning_tokens(self._token_ids)
            # OpenAI ends a forced call of one function with "stop".
            if self._called and finish_reason == "stop" and isinstance(self._chat.tool_choice, (str, type(None))):
                delta.finish_reason = "tool_calls"
        return delta

    def _parse_delta(self, delta: Delta, choice: CompletionOutput, prompt_token_ids: list[int] | None) -> None:
        message = self._parser.parse_delta(
            delta_text=choice.text,
            delta_token_ids=list(choice.token_ids),
            request=self._chat,
            prompt_token_ids=prompt_token_ids,
            finished=choice.finish_reason is not None,
        )
        if message is None:
            return
        delta.text = message.content or ""
        delta.reasoning = message.reasoning or ""
        if delta.reasoning and not self._thought:
            # Where vLLM merged deltas, some of its parsers leave in what opens the thought.
            self._thought = True
            if (reasoning_parser := self._parser.reasoning_parser) is not None:
                delta.reasoning = delta.reasoning.removeprefix(reasoning_parser.reasoning_start_str or "")
        delta.tool_calls = [
            ToolCallDelta(
                call.index,
                call.id,
                call.function.name if call.function else None,
                (call.function.arguments if call.function else None) or "",
            )
            for call in message.tool_calls
        ]

    def _parse_whole(self, delta: Delta, choice: CompletionOutput, prompt_token_ids: list[int] | None) -> None:
        from vllm.renderers.chat_utils import make_tool_call_id

        parser = self._parser
        if (
            self._thoughtless_parser is not None
            and (parser.reasoning_parser.reasoning_end_str or "") not in choice.text
        ):
            # Streamed, vLLM sees this by itself; whole, some of its parsers call all of it a thought.
            parser = self._thoughtless_parser()
        if prompt_token_ids is not None:
            parser.set_prompt_token_ids(prompt_token_ids)
        reasoning, content, calls = parser.parse(
            choice.text, self._chat, enable_auto_tools=True, model_output_token_ids=choice.token_ids
        )
        delta.text = content or ""
        delta.reasoning = reasoning or ""
        delta.tool_calls = [
            ToolCallDelta(index, call.id or make_tool_call_id(), call.name, call.arguments)
            for index, call in enumerate(calls or ())
        ]


def _stop_string(choice: CompletionOutput) -> str | None:
    return choice.stop_reason if isinstance(choice.stop_reason, str) else None  # else a token's id


def _logprobs(choice: CompletionOutput, top: int) -> list[TokenLogprob]:
    """Convert vLLM's per-step {token id: Logprob} maps, which have the sampled token and the most likely ones."""
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
