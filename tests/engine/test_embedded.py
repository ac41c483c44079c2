"""vLLM in this process: exact answers, exact counts, aborts that free the engine, refusals that name the field."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from typing import Any

import pytest

from engine.base import (
    Delta,
    EngineDied,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
    Prepared,
)
from engine.demo import WEIGHTS, Exchange
from engine.local.embedded import EmbeddedEngine
from tests.support.engine.demo_requests import EXCHANGES, PLAIN, STORY, SYSTEM, answer, counter, request

pytestmark = [pytest.mark.anyio, pytest.mark.vllm]


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["alone", "with a system prompt"])
async def test_demo_model_gives_every_answer_word_for_word(engine: EmbeddedEngine, system: list[Any]) -> None:
    answers = await asyncio.gather(*(answer(engine, [*system, *exchange.messages]) for exchange in PLAIN))
    wrong = [
        (exchange.conversation_id, text)
        for exchange, (text, _) in zip(PLAIN, answers, strict=True)
        if text != exchange.answer
    ]
    assert not wrong


@pytest.mark.parametrize(
    "exchange",
    [exchange for exchange in EXCHANGES if exchange.tools],
    ids=lambda exchange: f"{exchange.conversation_id}-{len(exchange.messages)}",
)
async def test_demo_model_calls_its_tool_word_for_word(engine: EmbeddedEngine, exchange: Exchange) -> None:
    from transformers import AutoTokenizer
    from vllm import SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    prompt = tokenizer.apply_chat_template(
        list(exchange.messages), tools=list(exchange.tools), tokenize=False, add_generation_prompt=True
    )
    assert isinstance(prompt, str)
    params = SamplingParams(temperature=0, max_tokens=200)
    text = ""
    async for output in engine._running().generate(prompt, params, uuid.uuid4().hex):
        text = output.outputs[0].text
    assert text == exchange.answer


async def test_usage_is_what_vllm_counts(engine: EmbeddedEngine) -> None:
    before = counter("prompt_tokens_total"), counter("generation_tokens_total")
    _, prepared = await answer(engine, STORY, stream=True)
    assert prepared.usage.prompt_tokens == prepared.prompt_tokens
    after = counter("prompt_tokens_total"), counter("generation_tokens_total")
    assert after[0] - before[0] == prepared.usage.prompt_tokens
    assert after[1] - before[1] == prepared.usage.completion_tokens


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_abort_frees_the_engine_and_counts_what_was_made(engine: EmbeddedEngine, stream: bool) -> None:
    before = counter("generation_tokens_total")
    prepared = await engine.prepare(request(STORY, stream=stream, ignore_eos=True, max_tokens=1500))

    async def consume() -> None:
        async for _ in engine.generate(prepared):
            pass

    task = asyncio.create_task(consume())
    while counter("generation_tokens_total") < before + 20:
        await asyncio.sleep(0.01)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert engine.unfinished_requests == 0
    assert 20 <= prepared.usage.completion_tokens < 1500
    assert counter("generation_tokens_total") - before == prepared.usage.completion_tokens


async def test_closing_the_generator_early_aborts(engine: EmbeddedEngine) -> None:
    prepared = await engine.prepare(request(STORY, stream=True, ignore_eos=True, max_tokens=1500))
    async with contextlib.aclosing(engine.generate(prepared)) as deltas:
        await anext(deltas)
        assert engine.unfinished_requests == 1
    assert engine.unfinished_requests == 0


@pytest.mark.parametrize("failure", [InvalidRequest("it is too complex"), EngineError("x"), EngineDied("x")], ids=repr)
async def test_failure_of_one_choice_ends_its_siblings(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch, failure: EngineError
) -> None:
    make = engine._readers

    def readers(prepared: Prepared) -> Any:
        made = make(prepared)

        def read(choice: Any, *_: Any, **__: Any) -> Delta:
            seen.append(choice)
            if len(seen) < 4:
                return Delta("")
            raise failure

        monkeypatch.setattr(made[1], "read", read)
        return made

    seen: list[Any] = []
    monkeypatch.setattr(engine, "_readers", readers)
    before = counter("generation_tokens_total")
    prepared = await engine.prepare(request(STORY, stream=True, n=3, temperature=1, ignore_eos=True, max_tokens=1500))
    with pytest.raises(type(failure)):
        async for _ in engine.generate(prepared):
            pass

    assert engine.unfinished_requests == 0
    assert 0 < prepared.usage.completion_tokens < 3 * 1500
    assert counter("generation_tokens_total") - before == prepared.usage.completion_tokens


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_choice_that_the_core_gives_up_ends_its_siblings_at_once(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    from vllm.v1.engine import FinishReason

    llm = engine._running()
    asked = request(STORY, stream=stream, n=3, temperature=1, ignore_eos=True, max_tokens=400)
    process = llm.output_processor.process_outputs
    given_up: list[str] = []

    def process_and_fail(core_outputs: list[Any], *args: Any, **more: Any) -> Any:
        for output in core_outputs:
            if output.request_id.startswith("1_") and asked.request_id in output.request_id:
                given_up.append(output.request_id)
                output.finish_reason = FinishReason.ERROR if len(given_up) == 20 else output.finish_reason
        return process(core_outputs, *args, **more)

    monkeypatch.setattr(llm.output_processor, "process_outputs", process_and_fail)
    prepared = await engine.prepare(asked)
    with pytest.raises(EngineDied):
        async for _ in engine.generate(prepared):
            pass

    assert engine.unfinished_requests == 0
    assert 3 * 19 <= prepared.usage.completion_tokens < 2 * 400
    await llm.engine_core.abort_requests_async(given_up[-1:])


@pytest.mark.parametrize("logprobs", [False, True])
async def test_several_choices_are_the_same_whole_and_streamed(engine: EmbeddedEngine, logprobs: bool) -> None:
    asked = {"n": 4, "temperature": 1.0, "seed": 5, "stop": ["the"], "max_tokens": 60, "logprobs": logprobs}
    said: list[list[str]] = []
    for stream in (True, False):
        texts = [""] * 4
        entries = [0] * 4
        prepared = await engine.prepare(request(STORY, stream=stream, **asked))
        async for delta in engine.generate(prepared):
            texts[delta.index] += delta.text
            entries[delta.index] += len(delta.logprobs or ())
        said.append(texts)
        assert sum(entries) == (prepared.usage.completion_tokens if logprobs else 0)
    assert said[0] == said[1]


async def test_abort_before_the_prompt_is_processed_costs_nothing(engine: EmbeddedEngine) -> None:
    prepared = await engine.prepare(request(STORY))
    task = asyncio.create_task(anext(engine.generate(prepared)))
    await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert engine.unfinished_requests == 0
    assert (prepared.usage.prompt_tokens, prepared.usage.completion_tokens) == (0, 0)


async def test_repeated_prompt_is_served_from_the_prefix_cache(engine: EmbeddedEngine) -> None:
    messages = [{"role": "user", "content": "What is vLLM? " * 20}]
    _, first = await answer(engine, messages, max_tokens=1)
    _, second = await answer(engine, messages, max_tokens=1)
    assert first.usage.cached_tokens == 0
    assert 32 <= second.usage.cached_tokens < second.prompt_tokens


async def test_stop_string_ends_the_answer_before_it(engine: EmbeddedEngine) -> None:
    text, _ = await answer(engine, [{"role": "user", "content": "Say hello."}], stop=["Shannon"])
    assert text == "Hello! I am the "


async def test_json_object_parses(engine: EmbeddedEngine) -> None:
    import json

    fields: dict[str, Any] = {
        "response_format": {"type": "json_object"},
        "max_tokens": 400,
        "temperature": 1.0,
        "seed": 1,
    }
    text, prepared = await answer(engine, [{"role": "user", "content": "Name a city."}], **fields)
    if prepared.usage.completion_tokens < 400:  # it may also still be writing
        assert isinstance(json.loads(text), dict)
    else:
        assert text.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 2048}, "max_tokens"),
        ({"logit_bias": {"1000000": 1.0}}, "logit_bias"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 3}}}}, None),
    ],
    ids=["max_tokens", "logit_bias", "schema"],
)
async def test_impossible_request_is_refused(engine: EmbeddedEngine, fields: dict[str, Any], param: str | None) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await answer(engine, STORY, **fields)
    if param is not None:
        assert refusal.value.param == param
    assert engine.unfinished_requests == 0


async def test_prompt_beyond_the_context_is_refused_with_openai_code(engine: EmbeddedEngine) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await engine.prepare(request([{"role": "user", "content": "word " * 5000}]))
    assert (refusal.value.param, refusal.value.code) == ("messages", "context_length_exceeded")


def test_unknown_engine_argument_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match=r"args\.max_modle_len .* Did you mean 'max_model_len'\?"):
        EmbeddedEngine("demo", {"max_modle_len": 10})


async def test_engine_that_was_not_started_is_unavailable() -> None:
    engine = EmbeddedEngine("demo")
    with pytest.raises(EngineUnavailable):
        await engine.prepare(request(STORY))
    with pytest.raises(EngineUnavailable):
        await engine.check_health()


LONG = {
    "turns": [{"role": role, "content": "word " * 100} for _ in range(1000) for role in ("user", "assistant")],
    "calls": [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": f"c{turn}-{n}", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
                for n in range(20)
            ],
        }
        for turn in range(150)
    ],
}


@pytest.mark.parametrize("name", LONG)
async def test_long_request_is_rendered_beside_the_event_loop(engine: EmbeddedEngine, name: str) -> None:
    here, everywhere = time.thread_time(), time.process_time()
    with pytest.raises(InvalidRequest) as caught:
        await engine.prepare(request(LONG[name]))
    here, everywhere = time.thread_time() - here, time.process_time() - everywhere

    assert caught.value.code == "context_length_exceeded"
    assert here < everywhere / 4


async def test_more_messages_than_tokens_are_refused_unrendered(engine: EmbeddedEngine) -> None:
    """vLLM would check each of them first."""
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}] * 100
    with pytest.raises(InvalidRequest) as caught:
        await engine.prepare(request([{"role": "assistant", "content": None, "tool_calls": calls}] * 1000))

    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"
