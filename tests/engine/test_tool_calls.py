"""Function calling over vLLM's own renderer and parsers: the demo model's calls, forced ones, and what may go wrong."""

from __future__ import annotations

from typing import Any

import pytest

from engine.base import EngineError, InvalidRequest, Usage
from engine.demo import Exchange, ToolCall, corpus, load
from engine.local import parsers
from engine.local.choice_reader import ChoiceReader
from engine.local.embedded import EmbeddedEngine
from tests.support.engine.demo_requests import counter, request
from tests.support.engine.whole_answers import Said, both_ways, say

pytestmark = [pytest.mark.anyio, pytest.mark.vllm]

WITH_TOOLS = [exchange for conversation in corpus() for exchange in conversation.exchanges() if exchange.tools]
CALLS = [exchange for exchange in WITH_TOOLS if exchange.call is not None]
WEATHER = load().tools["get_weather"]
TIME = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Get the time.",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"enum": ["UTC", "JST"]}},
            "required": ["zone"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
REPORT = {
    "type": "function",
    "function": {
        "name": "report",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Tokyo"]}, "sunny": {"type": "boolean"}},
            "required": ["city", "sunny"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
REPORT_BY_NAME = {"type": "function", "function": {"name": "report"}}
PARIS = [{"role": "user", "content": "What is the weather in Paris?"}]
HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
TWO_CALLS = {
    "structured_outputs": {
        "regex": "".join(
            rf'<tool_call>\n\{{"name": "get_weather", "arguments": \{{"city": "{city}"\}}\}}\n</tool_call>\n?'
            for city in ("Paris", "Tokyo")
        )
    }
}


@both_ways
@pytest.mark.parametrize("exchange", CALLS, ids=lambda exchange: exchange.conversation_id)
async def test_demo_model_calls_its_tool(engine: EmbeddedEngine, exchange: Exchange, stream: bool) -> None:
    before = counter("generation_tokens_total")
    choices, usage = await say(engine, exchange.messages, tools=list(exchange.tools), stream=stream)
    said = choices[0]

    assert exchange.call is not None
    assert said.names == [exchange.call.name]
    assert said.arguments() == exchange.call.arguments
    assert (said.text, said.finish_reason) == ("", "tool_calls")
    assert usage.completion_tokens == counter("generation_tokens_total") - before > 15
    assert said.deltas > 3 or not stream, "the arguments come as they are made"


@both_ways
@pytest.mark.parametrize(
    "exchange",
    [exchange for exchange in WITH_TOOLS if exchange.call is None],
    ids=lambda exchange: exchange.conversation_id,
)
async def test_demo_model_answers_word_for_word_with_its_tool_at_hand(
    engine: EmbeddedEngine, exchange: Exchange, stream: bool
) -> None:
    choices, _ = await say(engine, exchange.messages, tools=list(exchange.tools), stream=stream)

    assert (choices[0].text, choices[0].calls, choices[0].finish_reason) == (exchange.answer, {}, "stop")


@both_ways
async def test_model_that_may_not_call_is_not_shown_the_tools(engine: EmbeddedEngine, stream: bool) -> None:
    without = await engine.prepare(request(PARIS))
    choices, usage = await say(engine, PARIS, tools=[WEATHER], tool_choice="none", stream=stream)

    assert usage.prompt_tokens == without.prompt_tokens
    assert choices[0].calls == {}
    assert choices[0].text.startswith("I cannot see the weather.")


@both_ways
async def test_required_call_is_made_whatever_was_asked(engine: EmbeddedEngine, stream: bool) -> None:
    choices, _ = await say(engine, HELLO, tools=[WEATHER, TIME], tool_choice="required", stream=stream)

    assert set(choices[0].names) <= {"get_weather", "get_time"}
    assert isinstance(choices[0].arguments(), dict)
    assert (choices[0].text, choices[0].finish_reason) == ("", "tool_calls")


@both_ways
async def test_named_call_is_made_and_ends_with_stop(engine: EmbeddedEngine, stream: bool) -> None:
    named = {"type": "function", "function": {"name": "get_time"}}
    choices, _ = await say(engine, HELLO, tools=[WEATHER, TIME], tool_choice=named, stream=stream)

    assert choices[0].names == ["get_time"]
    assert choices[0].arguments()["zone"] in ("UTC", "JST"), "a strict tool's schema binds"
    assert (choices[0].text, choices[0].finish_reason) == ("", "stop")


@both_ways
@pytest.mark.parametrize("tool_choice", ["auto", "required", REPORT_BY_NAME], ids=["auto", "required", "named"])
async def test_strict_arguments_come_to_an_end(engine: EmbeddedEngine, tool_choice: Any, stream: bool) -> None:
    """JSON may hold any white space, and a small model can write nothing but that until its context ends."""
    choices, usage = await say(engine, PARIS, tools=[REPORT], tool_choice=tool_choice, stream=stream)

    assert choices[0].names == ["report"]
    assert choices[0].arguments().keys() == {"city", "sunny"}
    assert choices[0].arguments()["city"] in ("Paris", "Tokyo")
    assert usage.completion_tokens < 150


@both_ways
async def test_parallel_calls_keep_their_order(engine: EmbeddedEngine, stream: bool) -> None:
    choices, _ = await say(engine, PARIS, tools=[WEATHER], stream=stream, **TWO_CALLS)
    said = choices[0]

    assert said.names == ["get_weather", "get_weather"]
    assert [said.arguments(index)["city"] for index in (0, 1)] == ["Paris", "Tokyo"]
    assert said.calls[0]["id"] != said.calls[1]["id"]
    assert said.finish_reason == "tool_calls"


@both_ways
async def test_one_call_at_most_where_parallel_ones_are_off(engine: EmbeddedEngine, stream: bool) -> None:
    choices, _ = await say(engine, PARIS, tools=[WEATHER], parallel_tool_calls=False, stream=stream, **TWO_CALLS)

    assert choices[0].names == ["get_weather"]
    assert choices[0].arguments() == {"city": "Paris"}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 60])
async def test_calls_are_read_from_deltas_of_any_size(engine: EmbeddedEngine, size: int) -> None:
    """vLLM merges what is read late."""
    from vllm.outputs import CompletionOutput

    calls = [ToolCall("get_weather", {"city": city}).text for city in ("Paris", "Tokyo")]
    ids = await engine.tokenize(request([], prompt="Let me look.\n" + "\n".join(calls)))
    rendered = await engine._renderer.render(request(PARIS, tools=[WEATHER], stream=True))
    parsers = engine._renderer.choice_parsers(rendered, 1)
    assert parsers is not None
    reader = ChoiceReader(rendered, None, parsers[0], Usage())
    said = Said()
    for start in range(0, len(ids), size):
        piece = ids[start : start + size]
        reason = "stop" if start + size >= len(ids) else None
        text = await engine.detokenize(piece)
        output = CompletionOutput(0, text, piece, cumulative_logprob=None, logprobs=None, finish_reason=reason)
        said.add(reader.read(output, rendered.engine_input["prompt_token_ids"], stream=True))

    assert said.text.strip() == "Let me look."
    assert [said.arguments(index) for index in sorted(said.calls)] == [{"city": "Paris"}, {"city": "Tokyo"}]
    assert said.finish_reason == "tool_calls"


@both_ways
async def test_each_choice_has_a_parser_of_its_own(engine: EmbeddedEngine, stream: bool) -> None:
    fields = {"tools": [WEATHER], "n": 3, "temperature": 0.01, "seed": 1}
    choices, usage = await say(engine, PARIS, stream=stream, **fields)

    assert [choices[index].arguments() for index in range(3)] == [{"city": "Paris"}] * 3
    assert len({choices[index].calls[0]["id"] for index in range(3)}) == 3
    assert usage.completion_tokens > 45


@both_ways
@pytest.mark.parametrize("max_tokens", [1, 3, 12, 18])
async def test_call_cut_short_ends_with_length(engine: EmbeddedEngine, stream: bool, max_tokens: int) -> None:
    choices, usage = await say(engine, PARIS, tools=[WEATHER], max_tokens=max_tokens, stream=stream)

    assert choices[0].finish_reason == "length"
    assert usage.completion_tokens == max_tokens


@both_ways
async def test_logprobs_are_complete_though_the_parser_holds_text_back(engine: EmbeddedEngine, stream: bool) -> None:
    choices, usage = await say(engine, PARIS, tools=[WEATHER], logprobs=True, top_logprobs=2, stream=stream)

    assert choices[0].logprobs == usage.completion_tokens


@pytest.mark.parametrize("arguments", ["", '{"city": "Pa', "[1]", "sunny"])
async def test_call_of_the_past_that_was_cut_short_does_not_end_the_talk(
    engine: EmbeddedEngine, arguments: str
) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": "call_1", "content": '{"city": "Paris", "sky": "sunny"}'}
    messages = [*PARIS, {"role": "assistant", "content": "", "tool_calls": [call]}, result]

    choices, _ = await say(engine, messages, tools=[WEATHER])
    assert choices[0].finish_reason in ("stop", "tool_calls")


async def test_schema_that_cannot_be_compiled_is_refused_by_name(engine: EmbeddedEngine) -> None:
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": 3}}}
    with pytest.raises(InvalidRequest) as refusal:
        await say(engine, PARIS, tools=[tool])

    assert refusal.value.param == "tools"
    assert engine.unfinished_requests == 0


class Confused:
    """A parser that fails on what the model wrote, from its third delta on."""

    reasoning_parser = None

    def __init__(self) -> None:
        self.seen = 0

    def parse_delta(self, **arguments: Any) -> None:
        self.seen += 1
        if self.seen > 2:
            raise IndexError("string index out of range")

    def set_prompt_token_ids(self, token_ids: Any) -> None:
        pass

    def parse(self, *arguments: Any, **more: Any) -> Any:
        raise IndexError("string index out of range")


@both_ways
async def test_parser_that_fails_ends_the_request_and_not_the_engine(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(engine._renderer, "choice_parsers", lambda rendered, n: [Confused()])
    before = counter("generation_tokens_total")
    prepared = await engine.prepare(request(PARIS, tools=[WEATHER], stream=stream, max_tokens=1500, ignore_eos=stream))
    with pytest.raises(EngineError, match="could not be parsed") as failure:
        async for _ in engine.generate(prepared):
            pass

    assert type(failure.value) is EngineError, "it says nothing about the engine's health"
    assert engine.unfinished_requests == 0
    assert 0 < prepared.usage.completion_tokens < 1500
    assert counter("generation_tokens_total") - before == prepared.usage.completion_tokens


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tool_parser": "hermess"}, "'hermess'"),
        ({"reasoning_parser": "qwen33"}, "'qwen33'"),
        ({"reasoning_parser": "deepseek_r1"}, "could not locate think start/end tokens"),
    ],
    ids=["no such tool parser", "no such reasoning parser", "tokens missing"],
)
async def test_parser_that_cannot_be_is_told_before_anything_is_loaded(settings: dict[str, Any], reason: str) -> None:
    other = EmbeddedEngine("demo", {"max_model_len": 2048}, **settings)
    with pytest.raises(EngineError, match=r"tool_parser '\w+' with reasoning_parser") as failure:
        await other.start()

    assert reason in str(failure.value)
    assert other._llm is None
    await other.close()


def test_every_parser_that_can_be_found_is_one_of_vllms() -> None:
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    for name in {*dict(parsers._TOOL_MARKS).values(), *parsers._TOOL_MODEL_TYPES.values(), "deepseek_v31"}:
        ToolParserManager.get_tool_parser(name)
    for name in {*parsers._REASONING_MODEL_TYPES.values(), "seed_oss", "qwen3", "deepseek_r1", "deepseek_v3"}:
        ReasoningParserManager.get_reasoning_parser(name)
