"""The mock engine: words as tokens, the same books as vLLM, faults on order."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from engine.base import (
    Delta,
    EngineDied,
    EngineOverloaded,
    EngineUnavailable,
    GenerationRequest,
    InvalidRequest,
    Prepared,
    Usage,
)
from engine.mock import Fault, MockEngine, _words
from tests.support.app import HELLO
from tests.support.waiting import until

pytestmark = pytest.mark.anyio


def request(**fields: Any) -> GenerationRequest:
    given: dict[str, Any] = {"request_id": "r1", "messages": HELLO, "stream": True} | fields
    return GenerationRequest(**given)


async def started(**settings: Any) -> MockEngine:
    engine = MockEngine(**settings)
    await engine.start()
    return engine


async def generate(engine: MockEngine, **fields: Any) -> tuple[Prepared, list[Delta]]:
    prepared = await engine.prepare(request(**fields))
    return prepared, [delta async for delta in engine.generate(prepared)]


async def test_reply_echoes_the_last_message() -> None:
    _, deltas = await generate(await started())

    assert [delta.text for delta in deltas] == ["You", " said:", " hello", " there"]
    assert [delta.finish_reason for delta in deltas] == [None, None, None, "stop"]


async def test_reply_is_a_function_of_the_request() -> None:
    engine = await started(reply=lambda request: f"{len(request.messages)} messages")
    _, deltas = await generate(engine, messages=HELLO * 3)

    assert "".join(delta.text for delta in deltas) == "3 messages"


async def test_same_request_has_the_same_answer() -> None:
    engine = await started()

    assert (await generate(engine))[1] == (await generate(engine))[1]


async def test_whole_reply_is_one_delta_per_choice() -> None:
    _, deltas = await generate(await started(reply="one two"), stream=False, n=2)

    assert deltas == [Delta("one two", 0, "stop"), Delta("one two", 1, "stop")]


async def test_text_parts_are_counted_as_one_text() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a b"}, {"type": "text", "text": "c"}]}]

    assert (await (await started()).prepare(request(messages=messages))).prompt_tokens == 4


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
async def test_every_word_is_one_token(stream: bool, n: int) -> None:
    engine = await started(reply="one two three four five")
    prepared, _ = await generate(engine, stream=stream, n=n)

    assert prepared.prompt_tokens == 3
    assert prepared.usage == Usage(prompt_tokens=3, completion_tokens=5 * n)
    assert engine.counters == prepared.usage


async def test_reply_stops_at_max_tokens() -> None:
    prepared, deltas = await generate(await started(reply="one two three"), max_tokens=2)

    assert [(delta.text, delta.finish_reason) for delta in deltas] == [("one", None), (" two", "length")]
    assert prepared.usage.completion_tokens == 2


async def test_reply_as_long_as_max_tokens_has_stopped_by_itself() -> None:
    _, deltas = await generate(await started(reply="one two three"), max_tokens=3)

    assert deltas[-1].finish_reason == "stop"


async def test_ignored_eos_fills_max_tokens() -> None:
    _, deltas = await generate(await started(reply="one two"), max_tokens=5, ignore_eos=True)

    assert "".join(delta.text for delta in deltas) == "one two one two one"
    assert deltas[-1].finish_reason == "length"


async def test_empty_reply_still_finishes() -> None:
    _, deltas = await generate(await started(reply=""))

    assert [(delta.text, delta.finish_reason) for delta in deltas] == [("", "stop")]


async def test_logprobs_cover_every_token() -> None:
    _, deltas = await generate(await started(reply="one two"), logprobs=True)

    tokens = [entry for delta in deltas for entry in delta.logprobs or []]
    assert [(entry.token, bytes(entry.bytes).decode()) for entry in tokens] == [("one", "one"), (" two", " two")]


async def test_requests_are_kept_for_inspection() -> None:
    engine = await started()
    await generate(engine, temperature=0.5)

    assert [kept.temperature for kept in engine.requests] == [0.5]


async def test_prompt_that_does_not_fit_is_refused() -> None:
    engine = await started(max_model_len=3)
    with pytest.raises(InvalidRequest, match="maximum context length is 3 tokens") as caught:
        await engine.prepare(request())

    assert caught.value.param == "messages"


async def test_unstarted_engine_is_unavailable() -> None:
    engine = MockEngine()
    with pytest.raises(EngineUnavailable):
        await engine.prepare(request())
    with pytest.raises(EngineUnavailable):
        await engine.check_health()


async def test_scripted_error_is_raised_before_its_token() -> None:
    engine = await started(reply="one two three")
    engine.faults.append(Fault(at_token=2, error=EngineOverloaded("full")))
    prepared = await engine.prepare(request())
    seen: list[str] = []

    async def read() -> None:
        async for delta in engine.generate(prepared):
            seen.append(delta.text)

    with pytest.raises(EngineOverloaded, match="full"):
        await read()

    assert seen == ["one", " two"]
    assert engine.counters == prepared.usage == Usage(3, 2)


async def test_error_before_the_first_token_costs_nothing() -> None:
    engine = await started()
    engine.faults.append(Fault(error=EngineOverloaded("full")))
    with pytest.raises(EngineOverloaded):
        await generate(engine)

    assert engine.counters == Usage()


async def test_faults_are_used_up_one_per_generation() -> None:
    engine = await started()
    engine.faults.extend([Fault(error=EngineOverloaded("first")), Fault(error=EngineOverloaded("second"))])
    for message in ("first", "second"):
        with pytest.raises(EngineOverloaded, match=message):
            await generate(engine)

    assert (await generate(engine))[1]


async def test_leaving_a_generation_frees_it() -> None:
    engine = await started(reply="one two three")
    prepared = await engine.prepare(request())
    async with contextlib.aclosing(engine.generate(prepared)) as deltas:
        await anext(deltas)
        assert engine.unfinished_requests == 1

    assert engine.unfinished_requests == 0
    assert engine.counters == prepared.usage == Usage(3, 1)


async def test_hanging_generation_ends_when_cancelled() -> None:
    engine = await started()
    engine.faults.append(Fault(at_token=1))
    task = asyncio.create_task(generate(engine))
    await until(lambda: engine.counters.completion_tokens == 1)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert engine.unfinished_requests == 0


async def test_killed_engine_ends_its_generations_and_refuses_new_ones() -> None:
    engine = await started()
    engine.faults.append(Fault(at_token=1))
    task = asyncio.create_task(generate(engine))
    await until(lambda: engine.counters.completion_tokens == 1)

    engine.kill()

    with pytest.raises(EngineDied):
        await task
    with pytest.raises(EngineUnavailable):
        await engine.prepare(request())
    with pytest.raises(EngineUnavailable):
        await engine.check_health()


async def test_killed_engine_can_be_started_again() -> None:
    engine = await started()
    engine.kill()
    await engine.start()

    await engine.check_health()
    assert (await generate(engine))[1]


async def test_restart_does_not_revive_the_generations_of_the_killed_engine() -> None:
    engine = await started(reply="one two three", token_s=0.01)
    task = asyncio.create_task(generate(engine))
    await until(lambda: engine.counters.completion_tokens == 1)

    engine.kill()
    await engine.start()

    with pytest.raises(EngineDied):
        await task


async def test_frozen_engine_answers_nothing_until_killed() -> None:
    engine = await started(reply="one two three", token_s=0.001)
    prepared = await engine.prepare(request())
    deltas = engine.generate(prepared)
    await anext(deltas)
    engine.freeze()
    generation, health = asyncio.ensure_future(anext(deltas)), asyncio.ensure_future(engine.check_health())
    done, _ = await asyncio.wait({generation, health}, timeout=0.03)
    assert not done

    engine.kill()

    with pytest.raises(EngineDied):
        await generation
    with pytest.raises(EngineUnavailable):
        await health


async def test_speed_is_seconds_per_token() -> None:
    engine = await started(reply="one two three", first_token_s=0.02, token_s=0.01)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await generate(engine)

    assert loop.time() - began >= 0.03  # 0.02 + 2 * 0.01, less the timer's grain


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True, database=None)
@hypothesis.given(text=st.text(alphabet="ab \n\t", max_size=40))
def test_words_of_a_long_text_are_those_of_split(text: str) -> None:
    """A text is read in pieces, so that its words never exist all at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.mock._PIECE_CHARS", 5)

        assert list(_words(text)) == text.split()


async def test_very_many_different_words_are_numbered_in_linear_time() -> None:
    engine = await started()
    times = []
    for count in (20_000, 80_000):
        prompt = " ".join(f"w{count}-{number}" for number in range(count))
        before = time.process_time()
        ids = await engine.tokenize(request(messages=[], prompt=prompt))
        times.append(time.process_time() - before)
        assert len(set(ids)) == count
        assert await engine.detokenize(ids) == prompt
    assert times[1] < 16 * times[0] + 0.05
