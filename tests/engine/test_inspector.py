"""The real inspector on the demo model: its figures against a float64 reference, its tokens against vLLM's.

The reference is a Llama in NumPy, written out below: it shares no code with what it checks.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

from engine.base import EngineDied, InvalidRequest
from engine.demo import WEIGHTS
from engine.inspector.base import InspectedToken, InspectionRequest, Source
from engine.inspector.inspection import Job, Subject, distribution, draw, entropy, rounded
from engine.inspector.transformers_inspector import TransformersInspector
from engine.local.embedded import EmbeddedEngine
from tests.support.engine.demo_requests import PLAIN, STORY, SYSTEM, request
from tests.support.gateway_process import serve
from tests.support.waiting import until

pytestmark = [pytest.mark.anyio, pytest.mark.vllm]

QUESTION = [{"role": "user", "content": "What are you?"}]
LONG = [{"role": "user", "content": "Tell me more about the gateway, please. " * 20}]
Array = NDArray[np.float64]


class Reference:
    """The demo model in float64: all of a text at once, no cache."""

    def __init__(self) -> None:
        self.config = json.loads((WEIGHTS / "config.json").read_text())
        weights = load_file(WEIGHTS / "model.safetensors")
        self._weights = {name: array.astype(np.float64) for name, array in weights.items()}

    def run(self, ids: list[int]) -> tuple[Array, Array]:
        """Return the logits (t, V) and the attention weights (layers, heads, t, t)."""
        hidden = self._weights["model.embed_tokens.weight"][ids]
        attention = []
        for layer in range(self.config["num_hidden_layers"]):
            mixed, weights = self._attend(self._norm(hidden, layer, "input_layernorm"), layer)
            hidden = hidden + mixed
            hidden = hidden + self._mlp(self._norm(hidden, layer, "post_attention_layernorm"), layer)
            attention.append(weights)
        scaled = self._rms(hidden) * self._weights["model.norm.weight"]
        return scaled @ self._weights["model.embed_tokens.weight"].T, np.stack(attention)

    def _linear(self, values: Array, layer: int, name: str) -> Array:
        return values @ self._weights[f"model.layers.{layer}.{name}.weight"].T

    def _rms(self, hidden: Array) -> Array:
        scaled: Array = hidden / np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True) + self.config["rms_norm_eps"])
        return scaled

    def _norm(self, hidden: Array, layer: int, name: str) -> Array:
        return self._rms(hidden) * self._weights[f"model.layers.{layer}.{name}.weight"]

    def _mlp(self, hidden: Array, layer: int) -> Array:
        gate = self._linear(hidden, layer, "mlp.gate_proj")
        return self._linear(
            gate / (1 + np.exp(-gate)) * self._linear(hidden, layer, "mlp.up_proj"), layer, "mlp.down_proj"
        )

    def _attend(self, hidden: Array, layer: int) -> tuple[Array, Array]:
        length, size = len(hidden), self.config["head_dim"]
        heads, shared = self.config["num_attention_heads"], self.config["num_key_value_heads"]

        def split(name: str, count: int) -> Array:
            return self._linear(hidden, layer, f"self_attn.{name}").reshape(length, count, size).swapaxes(0, 1)

        query = self._turn(split("q_proj", heads))
        key, value = (
            np.repeat(part, heads // shared, 0)
            for part in (self._turn(split("k_proj", shared)), split("v_proj", shared))
        )
        scores = query @ key.swapaxes(1, 2) / np.sqrt(size)
        scores[:, np.triu(np.ones((length, length), dtype=bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = (weights @ value).swapaxes(0, 1).reshape(length, heads * size)
        return self._linear(mixed, layer, "self_attn.o_proj"), weights

    def _turn(self, values: Array) -> Array:
        """Apply rotary positions: halves, not pairs, as Hugging Face stores them."""
        size = values.shape[-1]
        frequencies = self.config["rope_parameters"]["rope_theta"] ** (-np.arange(0, size, 2) / size)
        angles = np.tile(np.outer(np.arange(values.shape[1]), frequencies), 2)
        low, high = np.split(values, 2, axis=-1)
        turned: Array = values * np.cos(angles) + np.concatenate([-high, low], axis=-1) * np.sin(angles)
        return turned


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(WEIGHTS)


@pytest.fixture(scope="module")
async def inspector(anyio_backend: str) -> AsyncIterator[TransformersInspector]:
    sources = {"main": Source("demo", max_model_len=2048), "short": Source("demo", max_model_len=96)}
    inspector = TransformersInspector(sources, max_attention_tokens=200, max_prompt_bytes=2000)
    yield inspector
    await inspector.close()


def ask(messages: Any, **fields: Any) -> InspectionRequest:
    return InspectionRequest(messages=list(messages), **({"trace_layer": 0, "temperature": 0.0} | fields))


async def collect(
    inspector: TransformersInspector, request: InspectionRequest, engine: str = "main"
) -> tuple[list[tuple[dict[str, Any], dict[str, Any]]], str]:
    """Return (token, trace) of each step, and the reply."""
    steps, reply = [], ""
    async for item in inspector.trace(engine, request):
        if isinstance(item, InspectedToken):
            steps.append((json.loads(item.token), json.loads(item.trace)))
        else:
            reply = item.text
    return steps, reply


def prompt_ids(tokenizer: Any, messages: Any) -> list[int]:
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def softmax(logits: Array) -> Array:
    weights: Array = np.exp(logits - logits.max())
    weights /= weights.sum()
    return weights


@pytest.mark.parametrize("messages", [QUESTION, LONG], ids=["one chunk", "several chunks"])
@pytest.mark.parametrize("layer", [0, 3])
async def test_trace_agrees_with_the_reference(
    inspector: TransformersInspector, reference: Reference, tokenizer: Any, messages: Any, layer: int
) -> None:
    steps, _ = await collect(inspector, ask(messages, trace_layer=layer, max_new_tokens=6))

    ids = prompt_ids(tokenizer, messages)
    for token, trace in steps:
        logits, attention = reference.run(ids)
        probs = softmax(logits[-1])
        assert trace["entropy"] == pytest.approx(-np.sum(probs * np.log(probs + 1e-12)), rel=1e-3, abs=1e-5)
        best = np.argsort(-probs)[:10]
        assert [entry["token_id"] for entry in trace["topk"]] == best.tolist()
        np.testing.assert_allclose([entry["prob"] for entry in trace["topk"]], probs[best], rtol=1e-3, atol=1e-7)
        assert [entry["token_text"] for entry in trace["topk"]] == [tokenizer.decode([i]) for i in best]
        assert np.shape(trace["attn"]) == (4, len(ids))
        np.testing.assert_allclose(trace["attn"], attention[layer, :, -1], rtol=1e-3, atol=1e-6)
        assert token["token_id"] == best[0]
        assert token["token_text"] == tokenizer.decode([token["token_id"]])
        ids.append(token["token_id"])


@pytest.mark.parametrize(("temperature", "top_k"), [(0.7, None), (1.5, 3)])
async def test_distribution_that_is_drawn_from_agrees_with_the_reference(
    inspector: TransformersInspector, reference: Reference, tokenizer: Any, temperature: float, top_k: int | None
) -> None:
    asked = ask(STORY, temperature=temperature, top_k=top_k, max_new_tokens=5)
    steps, _ = await collect(inspector, asked)

    ids = prompt_ids(tokenizer, STORY)
    for token, trace in steps:
        logits = reference.run(ids)[0][-1] / temperature
        if top_k is not None:
            logits[np.argsort(-logits)[top_k:]] = -np.inf
        probs = softmax(logits)
        assert trace["entropy"] == pytest.approx(-np.sum(probs * np.log(probs + 1e-12)), rel=1e-3, abs=1e-5)
        shown = {entry["token_id"]: entry["prob"] for entry in trace["topk"]}
        assert len(shown) == 10
        np.testing.assert_allclose(list(shown.values()), probs[list(shown)], rtol=1e-3, atol=1e-7)
        assert probs[token["token_id"]] > 0
        ids.append(token["token_id"])


@pytest.mark.parametrize(("layer", "head"), [(0, 0), (2, 3)])
@pytest.mark.parametrize("messages", [QUESTION, LONG], ids=["whole", "its last tokens"])
async def test_matrix_agrees_with_the_reference(
    inspector: TransformersInspector, reference: Reference, tokenizer: Any, messages: Any, layer: int, head: int
) -> None:
    asked = ask(messages, trace_layer=layer, head=head, max_new_tokens=0)
    matrix = json.loads(await inspector.attention("main", asked))

    ids = prompt_ids(tokenizer, messages)[-200:]
    assert matrix.keys() == {"layer", "head", "tokens", "attn"}
    assert (matrix["layer"], matrix["head"]) == (layer, head)
    assert matrix["tokens"] == [tokenizer.decode([token_id]) for token_id in ids]
    np.testing.assert_allclose(matrix["attn"], reference.run(ids)[1][layer, head], rtol=1e-3, atol=1e-6)


async def test_matrix_may_cover_generated_tokens(inspector: TransformersInspector, tokenizer: Any) -> None:
    matrix = json.loads(await inspector.attention("main", ask(QUESTION, head=0, max_new_tokens=4)))

    assert len(matrix["tokens"]) == len(prompt_ids(tokenizer, QUESTION)) + 4
    assert "".join(matrix["tokens"]).endswith("I am the Shannon")


async def test_text_longer_than_the_context_moves_through_it(
    inspector: TransformersInspector, reference: Reference, tokenizer: Any
) -> None:
    steps, _ = await collect(inspector, ask(LONG, max_new_tokens=4), engine="short")

    ids = prompt_ids(tokenizer, LONG)
    for token, trace in steps:
        logits, attention = reference.run(ids[-96:])
        assert token["token_id"] == logits[-1].argmax()
        assert np.shape(trace["attn"]) == (4, 96)
        np.testing.assert_allclose(trace["attn"], attention[0, :, -1], rtol=1e-3, atol=1e-6)
        ids.append(token["token_id"])


async def test_greedy_tokens_are_vllms(inspector: TransformersInspector, engine: EmbeddedEngine) -> None:
    conversations = [[*system, *exchange.messages] for exchange in PLAIN[:12] for system in ([], [SYSTEM])]
    conversations.append(STORY)
    params = SamplingParams(temperature=0, max_tokens=64)
    for messages in conversations:
        ids = await engine.tokenize(request(messages))
        prompt = TokensPrompt(prompt_token_ids=ids)
        outputs = [output async for output in engine._running().generate(prompt, params, uuid.uuid4().hex)]
        vllms = outputs[-1].outputs[0]
        steps, reply = await collect(inspector, ask(messages, max_new_tokens=64))

        assert [token["token_id"] for token, _ in steps] == list(vllms.token_ids)
        assert reply == vllms.text


async def test_equal_seeds_draw_equal_tokens(inspector: TransformersInspector) -> None:
    async def draw_with(seed: int) -> list[int]:
        asked = ask(STORY, temperature=1.5, top_k=None, seed=seed, max_new_tokens=24)
        return [token["token_id"] for token, _ in (await collect(inspector, asked))[0]]

    assert await draw_with(1) == await draw_with(1)
    assert await draw_with(1) != await draw_with(2)


@pytest.mark.parametrize(
    ("written", "reply"),
    [
        ("Hello.\nuser: And then?\nassistant: Nothing", "Hello."),
        ("Hello.\nsystem: Be brief. Hello again", "Hello."),
        ("\nuser: Who goes first", ""),
        ("Ask a user: they know.\nusers: some", "Ask a user: they know.\nusers: some"),
    ],
    ids=["user", "system", "at the boundary", "no tag"],
)
def test_model_that_writes_the_next_turn_itself_is_stopped_before_it(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, written: str, reply: str
) -> None:
    ids: list[int] = tokenizer.encode(written, add_special_tokens=False)
    script = iter(ids)
    monkeypatch.setattr("engine.inspector.inspection.draw", lambda *_: next(script))
    asked = asdict(ask(QUESTION, max_new_tokens=len(ids)))
    job = Job(**asked, max_model_len=2048, max_prompt_bytes=2000, max_attention_tokens=200)
    answers = [answer for answer in Subject(str(WEIGHTS), "cpu", False).trace(job) if answer[0]["kind"] != "busy"]

    *steps, (last,) = answers
    assert last == {"kind": "reply", "reply": reply}
    said = "".join(token["token_text"] for _, token, _ in steps)
    assert written.startswith(said)
    assert said == written if reply == written else len(steps) < len(ids)


async def test_prompt_over_the_bound_is_refused(inspector: TransformersInspector) -> None:
    messages = [{"role": "user", "content": "x" * 1990}]
    with pytest.raises(InvalidRequest, match="bytes long") as caught:
        await collect(inspector, ask(messages))
    assert caught.value.code == "prompt_too_large"
    messages[0]["content"] = "x" * 1900
    await collect(inspector, ask(messages, max_new_tokens=1))


@pytest.mark.slow
async def test_process_that_is_killed_in_mid_stream_is_replaced() -> None:
    inspector = TransformersInspector({"main": Source("demo", max_model_len=2048)}, idle_s=0.05)
    try:
        steps = inspector.trace("main", ask(STORY, temperature=1.0, max_new_tokens=500))
        await anext(steps)
        assert inspector.pid is not None
        psutil.Process(inspector.pid).kill()
        with pytest.raises(EngineDied):
            async for _ in steps:
                pass

        _, reply = await collect(inspector, ask(QUESTION))
        assert reply.startswith("I am the Shannon demo model")
        await until(lambda: inspector.pid is None)  # idle
    finally:
        await inspector.close()


@pytest.mark.slow
def test_process_dies_with_a_killed_gateway(tmp_path: Path) -> None:
    tree = {"engines": {"main": {"kind": "embedded", "model": "demo", "lazy": True}}, "inspector": {"enabled": True}}
    with serve(tmp_path, tree) as gateway:
        body = {"messages": QUESTION, "trace_layer": 1, "temperature": 0}
        answer = httpx.post(f"{gateway.url}/v1/inspect", json=body, headers=gateway.authorization, timeout=60)
        assert answer.status_code == 200
        assert "event: done" in answer.text
        (child,) = [
            child
            for child in psutil.Process(gateway.process.pid).children(recursive=True)
            if "engine.inspector.inspector_process" in child.cmdline()
        ]
        gateway.process.kill()
        child.wait(timeout=5)


# The arithmetic


def test_exactly_top_k_tokens_keep_a_probability_even_among_equals() -> None:
    probs = distribution(torch.zeros(8), temperature=1.0, top_k=3)

    assert int((probs > 0).sum()) == 3
    assert float(probs.sum()) == pytest.approx(1)
    assert int((distribution(torch.zeros(8), 1.0, 100) > 0).sum()) == 8


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 0.01])
def test_low_temperature_does_not_overflow(temperature: float) -> None:
    probs = distribution(torch.tensor([1e4, 1e4 - 1, -1e4]), temperature, None)

    assert probs.tolist() == pytest.approx([1, 0, 0])
    assert entropy(probs) == pytest.approx(0, abs=1e-6)


def test_entropy_of_equal_tokens_is_the_logarithm_of_their_number() -> None:
    assert entropy(distribution(torch.zeros(16), 1.0, None)) == pytest.approx(np.log(16), rel=1e-5)


def test_temperature_0_takes_the_best_token_and_shows_the_models_own_distribution() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0])
    probs = distribution(logits, 0.0, top_k=1)

    assert draw(probs, 0.0, torch.Generator()) == 1
    assert probs.tolist() == pytest.approx(torch.softmax(logits, -1).tolist())


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    probs = torch.tensor([0.5, 0.3, 0.2])
    generator = torch.Generator().manual_seed(7)
    counts = np.bincount([draw(probs, 1.0, generator) for _ in range(4000)], minlength=3)

    np.testing.assert_allclose(counts / 4000, probs, atol=0.03)


def test_rounded_values_have_six_digits_and_print_as_such() -> None:
    values = np.concatenate([[0.0, 1.0, 1e-13, 0.123456789, 1.98765432e-7], np.random.default_rng(1).random(1000) ** 9])
    shown = rounded(values)

    np.testing.assert_allclose(shown, values, rtol=5.1e-6, atol=1e-12)
    for value in shown[3:]:
        assert repr(float(value)) == repr(float(f"{value:.6g}"))
