"""Mistral with tekken vocabularies of every version that vLLM tells apart: tools, schemas and thoughts, both ways.

No weights and no core: what the model is shown is rendered, and what it might say is read by vLLM's parsers.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.base import EngineError, GenerationRequest, InvalidRequest
from tests.support.engine.headless import Headless
from tests.support.engine.tekken import VERSIONS, build_checkpoint

pytestmark = [pytest.mark.anyio, pytest.mark.vllm]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ARGUMENTS = '{"city": "Rome"}'
NAMED = {"type": "function", "function": {"name": "get_weather"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}


@pytest.fixture(scope="module")
def mistrals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Headless]:
    folder = tmp_path_factory.mktemp("mistral")
    args = {"max_model_len": 4096, "tokenizer_mode": "mistral"}
    return {
        version: Headless(
            build_checkpoint(folder / version, version),
            args,
            tool_parser="mistral",
            reasoning_parser="mistral" if version == "v13" else None,
        )
        for version in VERSIONS
    }


def tokens(mistral: Headless, *pieces: str) -> list[int]:
    """Return token ids: those of special tokens by name, those of other text by spelling."""
    vocabulary = mistral.tokenizer.get_vocab()
    ids: list[int] = []
    for piece in pieces:
        special = piece.startswith("[") and piece in vocabulary
        ids += [vocabulary[piece]] if special else mistral.tokenizer.encode(piece, add_special_tokens=False)
    return [*ids, 2]


def call(version: str, *names: str) -> list[str]:
    if version == "v3":
        return ["[TOOL_CALLS]", json.dumps([{"name": name, "arguments": json.loads(ARGUMENTS)} for name in names])]
    return [piece for name in names for piece in ("[TOOL_CALLS]", name, "[ARGS]", ARGUMENTS)]


def asking(**fields: Any) -> GenerationRequest:
    given: dict[str, Any] = {"request_id": "r", "messages": [{"role": "user", "content": "What is the weather?"}]}
    return GenerationRequest(**given | fields)


def said(deltas: list[Any]) -> tuple[str, str, list[tuple[str, str]], str | None]:
    """Return what deltas say, think and call, and why they end."""
    calls: dict[int, list[str]] = {}
    for one in (one for delta in deltas for one in delta.tool_calls):
        known = calls.setdefault(one.index, ["", ""])
        known[0] += one.name or ""
        known[1] += one.arguments
    text, thought = ("".join(getattr(delta, name) for delta in deltas) for name in ("text", "reasoning"))
    return text, thought, [(name, arguments) for name, arguments in calls.values()], deltas[-1].finish_reason


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("schema", [False, True], ids=["free", "schema"])
@pytest.mark.parametrize("choice", ["auto", "required", NAMED], ids=["auto", "required", "named"])
@pytest.mark.parametrize("version", VERSIONS)
async def test_call_is_read(
    mistrals: dict[str, Headless], version: str, choice: Any, schema: bool, stream: bool
) -> None:
    mistral = mistrals[version]
    request = asking(tools=[WEATHER], tool_choice=choice, response_format=SCHEMA if schema else None, stream=stream)
    rendered, params = await mistral.render(request)
    assert rendered.prompt_tokens > 20
    if version != "v3" or choice != "auto":
        assert params.structured_outputs is not None, "the call is held to a grammar"

    deltas = mistral.read(rendered, tokens(mistral, *call(version, "get_weather")), stream=stream)

    assert said(deltas) == ("", "", [("get_weather", ARGUMENTS)], "stop" if choice is NAMED else "tool_calls")


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("choice", ["auto", "none", None])
@pytest.mark.parametrize("version", VERSIONS)
async def test_text_is_read(mistrals: dict[str, Headless], version: str, choice: Any, stream: bool) -> None:
    mistral = mistrals[version]
    rendered, _ = await mistral.render(asking(tools=[WEATHER] if choice else None, tool_choice=choice, stream=stream))

    deltas = mistral.read(rendered, tokens(mistral, "It rains."), stream=stream)

    assert said(deltas) == ("It rains.", "", [], "stop")


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("tools", [[WEATHER], None], ids=["tools", "plain"])
@pytest.mark.parametrize("end", ["It rains.", "call", "cut"])
async def test_thought_is_kept_apart(mistrals: dict[str, Headless], end: str, tools: Any, stream: bool) -> None:
    if end == "call" and tools is None:
        pytest.skip("nothing to call")
    mistral = mistrals["v13"]
    rendered, _ = await mistral.render(asking(tools=tools, tool_choice="auto" if tools else None, stream=stream))
    pieces = ["[THINK]", "Let me see."]
    pieces += [] if end == "cut" else ["[/THINK]", *(call("v13", "get_weather") if end == "call" else [end])]

    text, thought, calls, _ = said(mistral.read(rendered, tokens(mistral, *pieces), stream=stream))

    assert thought == "Let me see."
    assert text == ("It rains." if end == "It rains." else "")
    assert calls == ([("get_weather", ARGUMENTS)] if end == "call" else [])


@pytest.mark.parametrize("version", ["v11", "v13"])
async def test_parallel_calls_are_read(mistrals: dict[str, Headless], version: str) -> None:
    mistral = mistrals[version]
    for stream in (True, False):
        rendered, _ = await mistral.render(asking(tools=[WEATHER], tool_choice="auto", stream=stream))
        deltas = mistral.read(rendered, tokens(mistral, *call(version, "get_weather", "get_weather")), stream=stream)
        assert said(deltas)[2] == [("get_weather", ARGUMENTS)] * 2


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "tool", "content": "a", "tool_call_id": "123456789"}],
        [{"role": "user", "content": "a"}, {"role": "tool", "content": "b", "tool_call_id": "1"}],
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "x"}}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
    ],
    ids=["assistant last", "tool first", "tool without a call", "call alone", "image"],
)
async def test_messages_that_mistral_refuses_are_the_clients_fault(
    mistrals: dict[str, Headless], version: str, messages: list[Any]
) -> None:
    words = ""
    try:
        await mistrals[version].render(asking(messages=messages))
    except InvalidRequest as error:
        words = str(error)
    assert "Error" not in words, "no Python in it"


async def test_library_that_does_not_fit_is_told_at_start(
    mistrals: dict[str, Headless], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As mistral-common 1.13 was: a method wants an argument that vLLM does not know."""
    from mistral_common.guidance.grammar_factory import GrammarFactory

    from engine.local.parsers import find_parsers

    def get_lark_from_jinja(self: Any, *, force_tool_names: Any, **more: Any) -> str:
        raise AssertionError("never gets here")

    mistral = mistrals["v11"]
    monkeypatch.setattr(GrammarFactory, "get_lark_from_jinja", get_lark_from_jinja)

    with pytest.raises(EngineError, match=r"^tool_parser 'mistral' .*mistral-common \d.*force_tool_names"):
        find_parsers(mistral.config.model_config, "mistral", None)
    with pytest.raises(EngineError) as failure:
        await mistral.render(asking(tools=[WEATHER], tool_choice="auto"))
    assert not isinstance(failure.value, InvalidRequest), "a defect is not the client's"
    assert "force_tool_names" not in str(failure.value)
