"""Reasoning models over vLLM's own parsers.

The model is the demo model with two tokens more, `<think>` and `</think>`, that it takes for "Hello" and " I": asked to
say hello, it says `<think>!</think> am the Shannon demo model.` Its template knows what was thought, and how to ask for
no thinking, so that the parser is found from the model's own files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engine.base import Usage
from engine.demo import WEIGHTS, load
from engine.local.choice_reader import ChoiceReader
from engine.local.embedded import EmbeddedEngine
from tests.support.engine.demo_requests import request
from tests.support.engine.whole_answers import both_ways, say

pytestmark = [pytest.mark.anyio, pytest.mark.vllm]

HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
THOUGHT, SAID = "!", " am the Shannon demo model."
LIKE = {"<think>": "Hello", "</think>": " I"}
"""The new tokens, and the one that each is taken for."""
CHANGES = {
    "{%- set text = text_of(message.content) -%}": (
        "{%- set text = text_of(message.content).split('</think>')[-1] -%}"
    ),
    "{%- if add_generation_prompt -%}": (
        "{%- set prefix = '<think></think>' if enable_thinking is defined and not enable_thinking else '' -%}"
        "{%- if add_generation_prompt -%}"
    ),
    '"<|im_start|>assistant\\n" -}}': '"<|im_start|>assistant\\n" + prefix -}}',
}
"""To the demo model's template: thoughts of earlier turns go, and thinking may be closed before it begins."""
WEATHER = load().tools["get_weather"]


def build_checkpoint(folder: Path) -> Path:
    """Write the checkpoint into `folder` and return it."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    shutil.copytree(WEIGHTS, folder)
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]  # (vocabulary, hidden), also the output's
    # A little longer than the token that it is like, it wins wherever that one would have been chosen.
    rows = [1.05 * embedding[tokenizer.encode(like)[0]] for like in LIKE.values()]
    weights["model.embed_tokens.weight"] = torch.cat([embedding, torch.stack(rows)])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.add_tokens(list(LIKE))
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": len(tokenizer)}))
    template = (WEIGHTS / "chat_template.jinja").read_text()
    for old, more in CHANGES.items():
        assert template.count(old) == 1
        template = template.replace(old, more)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
async def thinker(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedEngine]:
    checkpoint = build_checkpoint(tmp_path_factory.mktemp("thinker") / "checkpoint")
    engine = EmbeddedEngine(str(checkpoint), {"max_model_len": 1024, "max_num_seqs": 16})
    await engine.start()
    yield engine
    await engine.close()


@both_ways
async def test_thought_is_kept_apart_and_counted(thinker: EmbeddedEngine, stream: bool) -> None:
    choices, usage = await say(thinker, HELLO, stream=stream)

    assert (choices[0].reasoning, choices[0].text, choices[0].finish_reason) == (THOUGHT, SAID, "stop")
    assert (usage.completion_tokens, usage.reasoning_tokens) == (10, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 20])
async def test_thought_is_read_from_deltas_of_any_size(thinker: EmbeddedEngine, size: int) -> None:
    """vLLM merges what is read late."""
    from vllm.outputs import CompletionOutput

    ids = await thinker.tokenize(request([], prompt=f"<think>{THOUGHT}</think>{SAID}"))
    rendered = await thinker._renderer.render(request(HELLO, stream=True))
    parsers = thinker._renderer.choice_parsers(rendered, 1)
    assert parsers is not None
    reader = ChoiceReader(rendered, None, parsers[0], Usage())
    thought = said = ""
    for start in range(0, len(ids), size):
        piece = ids[start : start + size]
        last = start + size >= len(ids)
        output = CompletionOutput(
            index=0,
            text=await thinker.detokenize(piece),
            token_ids=piece,
            cumulative_logprob=None,
            logprobs=None,
            finish_reason="stop" if last else None,
        )
        delta = reader.read(output, rendered.engine_input["prompt_token_ids"], stream=True)
        thought += delta.reasoning
        said += delta.text

    assert (thought, said) == (THOUGHT, SAID)


@both_ways
async def test_each_choice_thinks_for_itself(thinker: EmbeddedEngine, stream: bool) -> None:
    choices, usage = await say(thinker, HELLO, n=2, temperature=0.01, seed=1, stream=stream)

    assert [(choice.reasoning, choice.text) for choice in choices.values()] == [(THOUGHT, SAID)] * 2
    assert usage.reasoning_tokens == 2


@both_ways
async def test_thought_cut_short_is_a_thought(thinker: EmbeddedEngine, stream: bool) -> None:
    choices, usage = await say(thinker, HELLO, max_tokens=2, stream=stream)

    assert (choices[0].reasoning, choices[0].text, choices[0].finish_reason) == (THOUGHT, "", "length")
    assert (usage.completion_tokens, usage.reasoning_tokens) == (2, 1)


@both_ways
async def test_logprobs_are_complete(thinker: EmbeddedEngine, stream: bool) -> None:
    choices, usage = await say(thinker, HELLO, logprobs=True, stream=stream)

    assert choices[0].logprobs == usage.completion_tokens


@both_ways
@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "strict": True, "schema": {"enum": ["yes", "no"]}},
            }
        },
    ],
    ids=["choice", "json_schema"],
)
async def test_grammar_binds_what_is_said_not_what_is_thought(
    thinker: EmbeddedEngine, fields: dict[str, Any], stream: bool
) -> None:
    choices, _ = await say(thinker, HELLO, stream=stream, **fields)

    assert choices[0].reasoning == THOUGHT
    assert choices[0].text.strip('"') in ("yes", "no")


@both_ways
@pytest.mark.parametrize(
    "tool_choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=str
)
async def test_forced_call_comes_after_the_thought(
    thinker: EmbeddedEngine, tool_choice: str | dict[str, Any], stream: bool
) -> None:
    choices, _ = await say(thinker, HELLO, tools=[WEATHER], tool_choice=tool_choice, stream=stream)

    assert (choices[0].reasoning, choices[0].text) == (THOUGHT, "")
    assert choices[0].names == ["get_weather"]
    assert "city" in choices[0].arguments()


@both_ways
async def test_tools_that_are_not_called_change_nothing(thinker: EmbeddedEngine, stream: bool) -> None:
    choices, _ = await say(thinker, HELLO, tools=[WEATHER], stream=stream)

    assert (choices[0].reasoning, choices[0].text, choices[0].calls) == (THOUGHT, SAID, {})


@both_ways
async def test_no_effort_is_no_thought(thinker: EmbeddedEngine, stream: bool) -> None:
    """The prompt closes the thinking, and everything that follows is said."""
    choices, usage = await say(thinker, HELLO, reasoning_effort="none", stream=stream)

    assert (choices[0].reasoning, choices[0].text) == ("", SAID)
    assert usage.reasoning_tokens == 0


@both_ways
async def test_no_effort_leaves_calls_and_grammars_alone(thinker: EmbeddedEngine, stream: bool) -> None:
    fields: dict[str, Any] = {"reasoning_effort": "none", "stream": stream}
    called, _ = await say(thinker, HELLO, tools=[WEATHER], tool_choice="required", **fields)
    chosen, _ = await say(thinker, HELLO, structured_outputs={"choice": ["yes", "no"]}, **fields)

    assert called[0].names == ["get_weather"]
    assert chosen[0].text in ("yes", "no")


async def test_effort_reaches_the_template(thinker: EmbeddedEngine) -> None:
    some, none = [
        (await thinker.prepare(request(HELLO, reasoning_effort=effort))).prompt_tokens for effort in ("low", "none")
    ]

    assert none == some + 2


async def test_what_was_thought_before_is_not_shown_again(thinker: EmbeddedEngine) -> None:
    def turns(said: str) -> list[dict[str, str]]:
        return [*HELLO, {"role": "assistant", "content": said}, *HELLO]

    silent, thoughtful = [
        await thinker.tokenize(request(turns(said))) for said in ("Good day.", "<think>Who is it?</think>Good day.")
    ]
    assert silent == thoughtful


async def test_bare_prompt_is_read_by_no_parser(thinker: EmbeddedEngine) -> None:
    prompt = "<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n"
    prepared = await thinker.prepare(request([], prompt=prompt))
    (delta,) = [delta async for delta in thinker.generate(prepared)]

    assert (delta.text, delta.reasoning) == (f"<think>{THOUGHT}</think>{SAID}", "")
