"""Parsers found from a model's type, chat template and vocabulary. The templates are what matters of real ones."""

from __future__ import annotations

import pytest

from engine.demo import WEIGHTS
from engine.local.parsers import find_reasoning_parser, find_tool_parser

THINKS = {"<think>", "</think>", "hello"}
STRIPS = """{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}"""
"""How templates of reasoning models leave out what was thought in earlier turns."""
TOOLS = "{%- if tools %}{%- for tool in tools %}{{ tool | tojson }}{%- endfor %}{%- endif %}"
QWEN_INSTRUCT = (
    TOOLS + r"{{- '<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>' }}"
)
QWEN_HYBRID = QWEN_INSTRUCT + STRIPS + "{%- if enable_thinking is defined and enable_thinking is false %}"
DEEPSEEK_CALLS = "<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>"
DEEPSEEK_HYBRID = (
    STRIPS + "{%- if not thinking -%}{{'</think>'}}{%- else -%}{{'<think>'}}{%- endif -%}"
    "{%- if tools %}" + DEEPSEEK_CALLS + "' + tool['function']['name'] + '<\uff5ctool\u2581sep\uff5c>"
)


@pytest.mark.parametrize(
    ("model_type", "template", "parser"),
    [
        ("qwen2", QWEN_INSTRUCT, "hermes"),
        ("qwen3", QWEN_HYBRID, "hermes"),
        ("llama", TOOLS + "<tool_call>", "hermes"),
        ("qwen3_moe", TOOLS + r"<tool_call>\n<function=example>\n<parameter=first>", "qwen3_coder"),
        ("qwen3_moe", TOOLS + "<tool_call>\n<function=example>\n<parameter=first>", "qwen3_coder"),
        ("seed_oss", TOOLS + r"<seed:tool_call>\n<function=example>\n<parameter=first>value</parameter>", "seed_oss"),
        ("minimax_m2", TOOLS + "{%- set begin = '<minimax:tool_call>' -%}", "minimax_m2"),
        ("kimi_k2", TOOLS + "<|tool_calls_section_begin|>", "kimi_k2"),
        ("glm4_moe", TOOLS + "<tool_call>{function-name}\n<arg_key>{arg-key}</arg_key>", "glm45"),
        ("deepseek_v3", TOOLS + DEEPSEEK_CALLS + "<\uff5ctool\u2581sep\uff5c>' + name + '```json'", "deepseek_v3"),
        ("deepseek_v3", TOOLS + DEEPSEEK_HYBRID, "deepseek_v31"),
        ("mistral", TOOLS + "[TOOL_CALLS] [", "mistral"),
        ("mistral3", TOOLS + "[TOOL_CALLS] [", "mistral"),
        ("llama", TOOLS + "<|python_tag|>", "llama3_json"),
        (
            "llama",
            TOOLS + 'Respond in the format {"name": function name, "parameters": dictionary of argument name and '
            "its value}.",
            "llama3_json",
        ),
        ("phi3", TOOLS + 'functools[{"name": "f", "arguments": {}}]', "phi4_mini_json"),
        ("lfm2", TOOLS + "List of tools: <|tool_list_start|>[", "lfm2"),
        ("gpt_oss", "", "openai"),
        ("llama4", TOOLS + "<|python_start|>", "llama4_pythonic"),
        ("granite", TOOLS, "granite"),
        ("jamba", TOOLS + "<tool_calls>", "jamba"),
    ],
)
def test_tool_parser_is_the_one_that_the_template_teaches(model_type: str, template: str, parser: str) -> None:
    assert find_tool_parser(model_type, template) == parser


@pytest.mark.parametrize(
    ("model_type", "template"),
    [
        ("llama", ""),
        ("qwen2", STRIPS),
        # It could write a call, but is never shown what it could call.
        ("qwen2", "{%- if message['tool_calls'] %}" + DEEPSEEK_CALLS),
        ("gemma3", TOOLS),
    ],
    ids=["no template", "no tools", "calls without tools", "no known form"],
)
def test_model_that_is_taught_no_calls_has_no_tool_parser(model_type: str, template: str) -> None:
    assert find_tool_parser(model_type, template) is None


@pytest.mark.parametrize(
    ("model_type", "template", "parser"),
    [
        ("qwen3", QWEN_HYBRID, "qwen3"),
        ("qwen3_moe", QWEN_INSTRUCT + STRIPS, "qwen3"),
        ("qwen3_5_moe", QWEN_HYBRID, "qwen3"),
        ("qwen2", STRIPS + r"{{'<think>\n'}}", "deepseek_r1"),
        ("deepseek_v3", STRIPS + r"{{'<think>\n'}}", "deepseek_r1"),
        ("deepseek_v3", DEEPSEEK_HYBRID, "deepseek_v3"),
        ("glm4_moe", STRIPS + "{{ '<think></think>' if not enable_thinking }}", "glm45"),
        ("kimi_k2", "<think></think>{{ content }}", "kimi_k2"),
        ("minimax_m2", STRIPS, "minimax_m2"),
        ("gpt_oss", "", "openai_gptoss"),
    ],
)
def test_reasoning_parser_is_the_models_own(model_type: str, template: str, parser: str) -> None:
    assert find_reasoning_parser(model_type, template, THINKS) == parser


@pytest.mark.parametrize(
    ("model_type", "template", "vocabulary"),
    [
        ("qwen3_moe", QWEN_INSTRUCT, THINKS),
        ("qwen2", QWEN_INSTRUCT, {"hello"}),
        ("qwen2", STRIPS, {"hello"}),
        ("llama", "", THINKS),
        ("kimi_k2", TOOLS + "<|tool_calls_section_begin|>", THINKS),
    ],
    ids=["tokens, but no word of them", "nothing", "template without tokens", "no template", "the one that does not"],
)
def test_model_that_does_not_reason_has_no_reasoning_parser(
    model_type: str, template: str, vocabulary: set[str]
) -> None:
    assert find_reasoning_parser(model_type, template, vocabulary) is None


def test_thinking_in_tokens_of_its_own_is_found() -> None:
    template = "{%- set think_begin_token = '<seed:think>' -%}{%- set think_end_token = '</seed:think>' -%}"

    assert find_reasoning_parser("seed_oss", template, {"<seed:think>", "</seed:think>"}) == "seed_oss"


def test_hybrid_that_thinks_in_plain_text_is_found() -> None:
    template = "{%- if enable_thinking is defined and not enable_thinking %}"

    assert find_reasoning_parser("hunyuan_v1_moe", template, {"hello"}) == "hunyuan_a13b"
    assert find_reasoning_parser("llama", template, {"hello"}) is None


def test_demo_model_calls_tools_and_does_not_reason() -> None:
    template = (WEIGHTS / "chat_template.jinja").read_text()

    assert find_tool_parser("llama", template) == "hermes"
    assert find_reasoning_parser("llama", template, {"<tool_call>", "</tool_call>"}) is None
