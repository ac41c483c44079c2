"""Finds vLLM's parsers of tool calls and reasoning for a model, from the model's own files.

The chat template decides first, because it defines the model's format and is kept by fine-tunes; the model type
second. The names are vLLM 0.32's. Not handled: models whose format neither shows; set their parsers in the
configuration. vLLM is imported only when one of its parsers is needed.
"""

from __future__ import annotations

from collections.abc import Container
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from engine.base import EngineError

if TYPE_CHECKING:
    from vllm.config import ModelConfig

# Marks in chat templates, most specific first, and the tool parser of their format.
_TOOL_MARKS = (
    ("<seed:tool_call>", "seed_oss"),
    ("<minimax:tool_call>", "minimax_m2"),
    ("<parameter=", "qwen3_coder"),
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("<\uff5ctool\u2581calls\u2581begin\uff5c>", "deepseek_v3"),
    ("<arg_key>", "glm45"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|python_tag|>", "llama3_json"),
    ('"parameters": dictionary of argument name', "llama3_json"),  # Llama 3.2's small ones
    ("functools[", "phi4_mini_json"),
    ("<|tool_list_start|>", "lfm2"),
    ("<tool_call>", "hermes"),
)
_TOOL_MODEL_TYPES = {
    "gpt_oss": "openai",
    "llama4": "llama4_pythonic",
    "gemma4": "gemma4",
    "granite": "granite",
    "granitemoe": "granite",
    "granitemoehybrid": "granite4",
    "hunyuan_v1_moe": "hunyuan_a13b",
    "jamba": "jamba",
    "internlm2": "internlm",
    "olmo3": "olmo3",
    "ernie4_5_moe": "ernie45",
}
_REASONING_MODEL_TYPES = {
    "gpt_oss": "openai_gptoss",
    "glm4_moe": "glm45",
    "minimax_m2": "minimax_m2",
    "kimi_k2": "kimi_k2",
    "gemma4": "gemma4",
    "olmo3": "olmo3",
    "hunyuan_v1_moe": "hunyuan_a13b",
    "ernie4_5_moe": "ernie45",
}


def find_tool_parser(model_type: str, chat_template: str) -> str | None:
    """Return the name of vLLM's tool parser for a model, or None if its template has no tool calls."""
    if model_type in _TOOL_MODEL_TYPES:
        return _TOOL_MODEL_TYPES[model_type]
    if "tools" not in chat_template:
        return None
    if "<\uff5ctool\u2581sep\uff5c>" in chat_template and "```json" not in chat_template:
        return "deepseek_v31"
    return next((parser for mark, parser in _TOOL_MARKS if mark in chat_template), None)


def find_reasoning_parser(model_type: str, chat_template: str, vocabulary: Container[str]) -> str | None:
    """Return the name of vLLM's reasoning parser for a model, or None if it does not reason.

    A reasoning parser would return all text of a model that never closes its reasoning as reasoning. So a model counts
    as reasoning only if its template mentions it and, for the `<think>` family, its vocabulary has the tokens.
    """
    if model_type == "gpt_oss":
        return _REASONING_MODEL_TYPES[model_type]
    if "<seed:think>" in chat_template:
        return "seed_oss"
    thinks = "<think>" in vocabulary and "</think>" in vocabulary and "</think>" in chat_template
    if not thinks:
        return _REASONING_MODEL_TYPES.get(model_type) if "enable_thinking" in chat_template else None
    if model_type.startswith("qwen3"):
        # Qwen3's instruct models share the type and the tokens of the reasoning ones, but not the template.
        return "qwen3"
    if "not thinking" in chat_template:
        # DeepSeek's hybrids: unless reasoning is requested, their prompt has closed it already.
        return "deepseek_v3"
    return _REASONING_MODEL_TYPES.get(model_type, "deepseek_r1")


def find_parsers(model_config: ModelConfig, tool: str | None, reasoning: str | None) -> tuple[str | None, str | None]:
    """Return the names of the tool parser and the reasoning parser of a model.

    None finds it from the model's files, "" means no parser. Raises EngineError for a parser that vLLM does not know or
    the model can't use, before the weights are loaded.
    """
    from vllm.parser import ParserManager
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer: Any = cached_tokenizer_from_config(model_config)
    found = _find_parsers(model_config, tokenizer)
    tool = found[0] if tool is None else tool or None
    reasoning = found[1] if reasoning is None else reasoning or None
    harmony = model_config.hf_config.model_type == "gpt_oss"
    try:
        parser_cls: Any = ParserManager.get_parser(
            tool, reasoning, enable_auto_tools=bool(tool), is_harmony=harmony, tokenizer=tokenizer
        )
        if parser_cls is not None:
            parser_cls(tokenizer, None, model_config=model_config)
            if tool:
                _try_tool(parser_cls, tokenizer, model_config)
    except Exception as error:  # parsers raise any type if the vocabulary lacks their tokens
        raise EngineError(f"tool_parser {tool!r} with reasoning_parser {reasoning!r}: {error}") from error
    return tool, reasoning


def _try_tool(parser_cls: Any, tokenizer: Any, model_config: ModelConfig) -> None:
    """Adjust one request with a tool, which fails if the parser's library does not fit vLLM (mistral-common 1.13)."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    tool = {"type": "function", "function": {"name": "try", "parameters": {"type": "object", "properties": {}}}}
    request = ChatCompletionRequest(messages=[{"role": "user", "content": "try"}], tools=[tool], tool_choice="auto")
    try:
        parser_cls(tokenizer, request.tools, model_config=model_config).adjust_request(request=request)
    except Exception as error:
        what = "the parser fails on a request with tools"
        if "mistral" in type(tokenizer).__module__:
            what += f", perhaps because mistral-common {version('mistral-common')} does not fit this vLLM"
        raise EngineError(f"{what}: {error}") from error


def _find_parsers(model_config: ModelConfig, tokenizer: Any) -> tuple[str | None, str | None]:
    template = getattr(tokenizer, "chat_template", None) or ""
    if isinstance(template, dict):  # several templates by name
        template = template.get("tool_use") or template.get("default") or ""
    model_type = str(model_config.hf_config.model_type)
    vocabulary = tokenizer.get_vocab()
    return find_tool_parser(model_type, template), find_reasoning_parser(model_type, template, vocabulary)
