"""Structured outputs by vLLM's own backend: text that keeps to a schema, a pattern, a choice or a grammar."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from typing import Any

import pytest

from engine.base import EngineDied, EngineError, EngineOverloaded, InvalidRequest, Usage
from engine.local.choice_reader import ChoiceReader
from engine.local.embedded import EmbeddedEngine
from engine.local.grammar_trials import GrammarTrials
from tests.support.engine.demo_requests import STORY, answer, request

pytestmark = [pytest.mark.anyio, pytest.mark.vllm]
pytest.importorskip("vllm")
from vllm.sampling_params import StructuredOutputsParams  # noqa: E402

ASK = [{"role": "user", "content": "Name a city."}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Tokyo"]}, "sunny": {"type": "boolean"}},
    "required": ["city", "sunny"],
    "additionalProperties": False,
}
both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def json_schema(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema} | fields}}


@both_ways
@pytest.mark.parametrize("messages", [ASK, STORY], ids=["a question", "a story"])
@pytest.mark.parametrize(
    "fields",
    [json_schema(SCHEMA, strict=True), json_schema(SCHEMA), {"structured_outputs": {"json": SCHEMA}}],
    ids=["strict", "not strict", "structured_outputs"],
)
async def test_json_schema_is_kept(engine: EmbeddedEngine, messages: Any, fields: dict[str, Any], stream: bool) -> None:
    text, _ = await answer(engine, messages, stream=stream, **fields)
    value = json.loads(text)

    assert value.keys() == {"city", "sunny"}
    assert value["city"] in ("Paris", "Tokyo")
    assert isinstance(value["sunny"], bool)
    assert " " not in text, "no white space between fields, which a small model would write for ever"


@both_ways
async def test_regular_expression_is_kept(engine: EmbeddedEngine, stream: bool) -> None:
    pattern = r"(call|text) [0-9]{3}-[0-9]{4}!"
    text, _ = await answer(engine, ASK, structured_outputs={"regex": pattern}, temperature=1.5, seed=4, stream=stream)

    assert re.fullmatch(pattern, text)


@both_ways
@pytest.mark.parametrize(
    "choice", [["positive", "negative"], ['with "quotes"\n', "back\\slash"], ["東京", "京都"]], ids=str
)
async def test_one_of_the_choices_is_said(engine: EmbeddedEngine, choice: list[str], stream: bool) -> None:
    text, _ = await answer(engine, ASK, structured_outputs={"choice": choice}, stream=stream)

    assert text in choice


async def test_grammar_is_kept(engine: EmbeddedEngine) -> None:
    grammar = 'root ::= "yes, " reason | "no"\nreason ::= "it " ("is" | "was")'
    text, _ = await answer(engine, ASK, structured_outputs={"grammar": grammar})

    assert text in ("yes, it is", "yes, it was", "no")


async def test_bare_prompt_is_bound_as_well(engine: EmbeddedEngine) -> None:
    prepared = await engine.prepare(request([], prompt="The city is", structured_outputs={"choice": ["Oslo", "Lima"]}))

    assert "".join([delta.text async for delta in engine.generate(prepared)]) in ("Oslo", "Lima")


async def test_choices_of_one_request_are_bound_alike(engine: EmbeddedEngine) -> None:
    prepared = await engine.prepare(request(ASK, n=3, temperature=1.5, seed=3, **json_schema(SCHEMA)))
    texts = [delta.text async for delta in engine.generate(prepared)]

    assert len(texts) == 3
    assert all(json.loads(text)["city"] in ("Paris", "Tokyo") for text in texts)


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "parenthesis"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs.regex", "Lookahead"),
        ({"structured_outputs": {"regex": "a\x00b"}}, "structured_outputs.regex", "NUL"),
        ({"structured_outputs": {"grammar": "root ::= nowhere"}}, "structured_outputs.grammar", "grammar"),
        ({"structured_outputs": {"json": {"type": 3}}}, "structured_outputs.json", "Type should be a string"),
        (
            {"structured_outputs": {"json": {"type": "string", "format": "phone"}}},
            "structured_outputs.json",
            "not supported",
        ),
        (json_schema({"type": 3}), "response_format.json_schema.schema", "Type should be a string"),
        (json_schema({"type": 3}, strict=True), "response_format.json_schema.schema", "Type should be a string"),
    ],
    ids=str,
)
@both_ways
async def test_what_cannot_be_compiled_is_refused_by_name(
    engine: EmbeddedEngine, fields: dict[str, Any], param: str, reason: str, stream: bool
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await answer(engine, ASK, stream=stream, **fields)

    assert refusal.value.param == param
    text = str(refusal.value)
    assert text.startswith(f"Invalid value for '{param}': ")
    assert reason in text
    assert ".cc" not in text, "where in its source a compiler gave up is nobody's business"
    assert engine.unfinished_requests == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        ({"regex": "a?" * 2000}, "too long to be compiled"),
        ({"regex": "((a|aa|aaa|aaaa|.){1,200}){1,20}"}, "too many ways to continue"),
        (
            {
                "json": {
                    "type": "object",
                    "properties": {f"p{n}": {"type": "string"} for n in range(300)},
                    "minProperties": 100,
                    "maxProperties": 200,
                }
            },
            "too long to be compiled",
        ),
    ],
    ids=["compiling", "tokens", "schema"],
)
async def test_grammar_that_takes_too_much_is_refused_and_holds_up_nobody_else(
    engine: EmbeddedEngine, constraint: dict[str, Any], reason: str
) -> None:
    """It is tried in a process of its own. The core, which nobody can stop, never gets it."""
    prepared = await engine.prepare(request(ASK, structured_outputs=constraint, stream=True, max_tokens=1))

    async def refused() -> InvalidRequest:
        with pytest.raises(InvalidRequest) as refusal:
            [delta async for delta in engine.generate(prepared)]
        return refusal.value

    trying = asyncio.create_task(refused())
    others = 0
    while not trying.done():
        text, _ = await answer(engine, [{"role": "user", "content": "Say hello."}])
        assert text == "Hello! I am the Shannon demo model."
        await engine.check_health()
        others += 1

    refusal = trying.result()
    assert refusal.param == f"structured_outputs.{next(iter(constraint))}"
    assert reason in str(refusal)
    assert others > 2
    assert prepared.usage.completion_tokens == 0
    assert engine.unfinished_requests == 0
    started = time.monotonic()
    assert reason in str(await refused()), "what came of it is remembered"
    assert time.monotonic() - started < 5


async def test_trial_goes_to_its_end_though_its_client_leaves(engine: EmbeddedEngine) -> None:
    trials = engine._trials
    await trials.check(StructuredOutputsParams(regex="x"), "")
    process = trials._process
    leaving = asyncio.create_task(trials.check(StructuredOutputsParams(regex="[a-y]{3,9}"), ""))
    while trials._trial is None or trials._trial.done():
        await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    await trials._trial

    await trials.check(StructuredOutputsParams(regex="[a-y]{3,9}"), "")
    assert trials._process is process


async def test_trials_continue_in_a_new_process_when_theirs_has_died(engine: EmbeddedEngine) -> None:
    trials = engine._trials
    await trials.check(StructuredOutputsParams(regex="x"), "")
    assert trials._process is not None
    trials._process.kill()
    with contextlib.suppress(EngineOverloaded):  # where its death was not yet seen
        await trials.check(StructuredOutputsParams(regex="xy"), "")
    text, _ = await answer(engine, ASK, structured_outputs={"regex": "xyz"})

    assert text == "xyz"


async def test_backend_that_does_not_work_with_vllm_is_refused_at_the_start() -> None:
    other = EmbeddedEngine("demo", {"structured_outputs_config": {"backend": "lm-format-enforcer"}})
    with pytest.raises(EngineError, match=r"lm-format-enforcer does not work .* Use auto, xgrammar"):
        await other.start()
    await other.close()


@pytest.mark.slow
async def test_schema_that_outlines_can_not_compile_in_time_is_refused() -> None:
    """Its check in this process would take minutes, in a thread that nobody can stop."""
    config = EmbeddedEngine("demo", {"structured_outputs_config": {"backend": "outlines"}})._engine_args()
    trials = GrammarTrials()
    trials.configure(config.create_engine_config())
    properties = {f"p{n}": {"type": "string"} for n in range(900)}
    try:
        with pytest.raises(InvalidRequest, match="too long to be compiled"):
            await trials.check(StructuredOutputsParams(json={"type": "object", "properties": properties}), "")
        await trials.check(StructuredOutputsParams(json=SCHEMA), "")
    finally:
        trials.close()


@pytest.mark.parametrize(
    ("fields", "refused"),
    [({"structured_outputs": {"regex": "a"}}, "structured_outputs.regex"), ({}, None)],
    ids=["with a grammar", "without"],
)
async def test_grammar_that_the_core_gives_up_is_the_clients_fault(
    engine: EmbeddedEngine, fields: dict[str, Any], refused: str | None
) -> None:
    from vllm.outputs import CompletionOutput

    rendered = await engine._renderer.render(request(ASK, **fields))
    output = CompletionOutput(0, "", [], cumulative_logprob=None, logprobs=None, finish_reason="error")
    reader = ChoiceReader(rendered, None, None, Usage())
    with pytest.raises(InvalidRequest if refused else EngineDied) as failure:
        reader.read(output, None, stream=True)

    assert getattr(failure.value, "param", None) == refused
    assert ("too complex" in str(failure.value)) == bool(refused)
