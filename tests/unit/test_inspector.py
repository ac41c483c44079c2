"""The inspector's process as the gateway sees it: started, asked, left, killed, replaced and ended.

The process here is a script that speaks the protocol and does what the message's text says; no model is loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.base import EngineDied, EngineError, EngineOverloaded, EngineUnavailable, InvalidRequest
from engine.demo import WEIGHTS
from engine.inspector.base import InspectedToken, InspectionRequest, Reply, Shape, Source, read_shape
from engine.inspector.transformers_inspector import TransformersInspector
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

SCRIPT = """\
import json, os, struct, sys, time

folder = sys.argv[1]
read, write = sys.stdin.buffer.read, sys.stdout.buffer.write


def perform(text, number, request):
    if text == "hang":
        time.sleep(3600)
    if text == "die":
        os._exit(1)
    if text == "fail":
        return [{"kind": "failed", "reason": "RuntimeError: out of memory at /secret"}]
    if text == "refuse":
        return [{"kind": "refused", "message": "Too long.", "param": "messages", "code": "prompt_too_large"}]
    if text == "environment":
        return [{"kind": "reply", "reply": json.dumps(dict(os.environ))}]
    while text == "wait" and not os.path.exists(folder + "/go"):
        time.sleep(0.002)
    if request["op"] == "attention":
        return [{"kind": "attention"}, {"head": request["head"]}]
    if number % 2 == 0:
        return [{"kind": "busy"}]
    if number < 2 * request["max_new_tokens"]:
        return [{"kind": "step"}, {"step": number // 2, "token_text": text}, {"entropy": 0.5}]
    return [{"kind": "reply", "reply": text}]


request, number = {}, 0
while head := read(4):
    message = json.loads(read(struct.unpack(">I", head)[0]))
    op = message["op"]
    with open(folder + "/log", "a") as log:
        log.write(op + " " + message.get("path", "") + "\\n")
    if op == "load":
        broken = os.path.exists(folder + "/broken")
        answer = [{"kind": "failed", "reason": "OSError: no weights"}] if broken else [{"kind": "loaded"}]
    else:
        request, number = (request, number + 1) if op == "next" else (message, 0)
        answer = perform(request["messages"][0]["content"], number, request)
    body = b"\\n".join(json.dumps(part).encode() for part in answer)
    write(struct.pack(">I", len(body)) + body)
    sys.stdout.buffer.flush()
"""


def ask(text: str, tokens: int = 3, head: int | None = None) -> InspectionRequest:
    messages = [{"role": "user", "content": text}]
    return InspectionRequest(messages=messages, trace_layer=0, head=head, max_new_tokens=tokens)


@dataclass
class Bench:
    """A folder with the script in it, and the inspectors made there."""

    folder: Path
    stack: contextlib.AsyncExitStack

    def inspector(self, **options: Any) -> TransformersInspector:
        script = self.folder / "child.py"
        script.write_text(SCRIPT)
        command = (sys.executable, str(script), str(self.folder))
        sources = options.pop("sources", {"main": Source("demo", max_model_len=64)})
        inspector = TransformersInspector(sources, command=command, **options)
        self.stack.push_async_callback(inspector.close)
        return inspector

    def ops(self) -> list[str]:
        """What the processes were asked so far."""
        log = self.folder / "log"
        return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with contextlib.AsyncExitStack() as stack:
        yield Bench(tmp_path, stack)


async def collect(inspector: TransformersInspector, request: InspectionRequest) -> list[InspectedToken | Reply]:
    return [item async for item in inspector.trace("main", request)]


async def test_nothing_runs_before_the_first_request(bench: Bench) -> None:
    inspector = bench.inspector()

    shape = inspector.shape("main")

    assert shape == Shape(str(WEIGHTS), layers=4, heads=4, max_model_len=64)
    assert inspector.pid is None


async def test_steps_come_in_order_and_the_reply_last(bench: Bench) -> None:
    *steps, reply = await collect(bench.inspector(), ask("hello"))

    assert reply == Reply("hello")
    assert all(isinstance(step, InspectedToken) for step in steps)
    assert [json.loads(step.token)["step"] for step in steps if isinstance(step, InspectedToken)] == [0, 1, 2]


async def test_matrix_comes_as_it_is_sent(bench: Bench) -> None:
    assert json.loads(await bench.inspector().attention("main", ask("hello", head=3))) == {"head": 3}


async def test_process_is_loaded_once(bench: Bench) -> None:
    inspector = bench.inspector()
    await collect(inspector, ask("one"))
    pid = inspector.pid
    await collect(inspector, ask("two"))

    assert inspector.pid == pid
    assert bench.ops().count("load") == 1


async def test_idle_process_ends_and_the_next_request_gets_another(bench: Bench) -> None:
    inspector = bench.inspector(idle_s=0.02)
    await collect(inspector, ask("one"))
    first = inspector.pid
    await until(lambda: inspector.pid is None)
    assert first is None or not psutil.pid_exists(first)

    assert (await collect(inspector, ask("two")))[-1] == Reply("two")


async def test_engine_with_another_checkpoint_gets_another_process(bench: Bench) -> None:
    (bench.folder / "config.json").write_text('{"num_hidden_layers": 1, "num_attention_heads": 1}')
    other = Source(str(bench.folder), max_model_len=8)
    inspector = bench.inspector(sources={"main": Source("demo"), "other": other})
    await collect(inspector, ask("one"))
    first = inspector.pid
    assert first is not None

    assert [item async for item in inspector.trace("other", ask("two"))][-1] == Reply("two")
    assert inspector.pid != first
    assert not psutil.pid_exists(first)


async def test_engines_with_the_same_checkpoint_share_the_process(bench: Bench) -> None:
    inspector = bench.inspector(sources={"main": Source("demo"), "short": Source("demo", max_model_len=8)})
    await collect(inspector, ask("one"))
    await inspector.attention("short", ask("two"))

    assert bench.ops().count("load") == 1


async def test_leaving_between_steps_stops_the_work(bench: Bench) -> None:
    inspector = bench.inspector()
    steps = inspector.trace("main", ask("long", tokens=1000))
    await anext(steps)
    await anext(steps)
    await steps.aclose()

    asked = len(bench.ops())
    assert (await collect(inspector, ask("next", tokens=1)))[-1] == Reply("next")
    assert len(bench.ops()) == asked + 4, "trace and three times next, for the second request alone"


async def test_leaving_within_a_step_keeps_the_process_for_others(bench: Bench) -> None:
    inspector = bench.inspector()
    leaving = asyncio.create_task(collect(inspector, ask("wait")))
    await until(lambda: "trace" in bench.ops())
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    pid = inspector.pid
    following = asyncio.create_task(collect(inspector, ask("mine")))
    (bench.folder / "go").touch()

    assert (await following)[-1] == Reply("mine"), "not the answer that the other one did not wait for"
    assert inspector.pid == pid


async def test_leaving_while_it_loads_lets_it_load(bench: Bench) -> None:
    inspector = bench.inspector()
    leaving = asyncio.create_task(collect(inspector, ask("one")))
    await until(lambda: inspector.pid is not None)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)

    assert (await collect(inspector, ask("two")))[-1] == Reply("two")
    assert bench.ops().count("load") == 1


@pytest.mark.parametrize("text", ["hang", "die", "fail"])
async def test_broken_process_is_replaced(bench: Bench, text: str, caplog: pytest.LogCaptureFixture) -> None:
    inspector = bench.inspector(stall_s=0.5 if text == "hang" else 60.0)
    await collect(inspector, ask("first"))
    pid = inspector.pid

    with pytest.raises(EngineDied) as caught:
        await collect(inspector, ask(text))

    assert "secret" not in str(caught.value)
    assert caplog.text
    assert (await collect(inspector, ask("second")))[-1] == Reply("second")
    assert inspector.pid not in (None, pid)


async def test_process_that_was_killed_in_mid_stream_is_replaced(bench: Bench) -> None:
    inspector = bench.inspector()
    steps = inspector.trace("main", ask("long", tokens=1000))
    await anext(steps)
    assert inspector.pid is not None
    psutil.Process(inspector.pid).kill()
    with pytest.raises(EngineDied):
        async for _ in steps:
            pass

    assert (await collect(inspector, ask("next")))[-1] == Reply("next")


async def test_refused_request_leaves_the_process_alone(bench: Bench) -> None:
    inspector = bench.inspector()
    with pytest.raises(InvalidRequest, match="Too long") as caught:
        await collect(inspector, ask("refuse"))
    assert (caught.value.param, caught.value.code) == ("messages", "prompt_too_large")
    pid = inspector.pid

    await collect(inspector, ask("fine"))
    assert inspector.pid == pid


async def test_failed_load_is_unavailable_and_tried_again(bench: Bench) -> None:
    inspector = bench.inspector()
    (bench.folder / "broken").touch()
    with pytest.raises(EngineUnavailable, match="could not be loaded"):
        await collect(inspector, ask("one"))
    (bench.folder / "broken").unlink()

    assert (await collect(inspector, ask("two")))[-1] == Reply("two")


async def test_requests_wait_in_order_and_too_many_are_refused(bench: Bench) -> None:
    inspector = bench.inspector(max_queued_requests=2)
    finished: list[str] = []

    async def run(text: str) -> None:
        await collect(inspector, ask(text))
        finished.append(text)

    running = asyncio.create_task(run("wait"))
    await until(lambda: "trace" in bench.ops())
    waiting = [asyncio.create_task(run(text)) for text in ("a", "b")]
    await asyncio.sleep(0)
    with pytest.raises(EngineOverloaded):
        await collect(inspector, ask("c"))

    (bench.folder / "go").touch()
    await asyncio.gather(running, *waiting)
    assert finished == ["wait", "a", "b"]
    await collect(inspector, ask("d"))


async def test_leaving_the_queue_gives_the_place_back(bench: Bench) -> None:
    inspector = bench.inspector(max_queued_requests=1)
    running = asyncio.create_task(collect(inspector, ask("wait")))
    await until(lambda: "trace" in bench.ops())
    for _ in range(3):
        waiting = asyncio.create_task(collect(inspector, ask("a")))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    last = asyncio.create_task(collect(inspector, ask("b")))
    (bench.folder / "go").touch()
    assert (await last)[-1] == Reply("b")
    await running


async def test_request_that_keeps_the_process_too_long_makes_room(bench: Bench) -> None:
    inspector = bench.inspector(max_request_s=0.1)
    steps = inspector.trace("main", ask("slow reader", tokens=1000))
    await anext(steps)

    assert (await collect(inspector, ask("next", tokens=1)))[-1] == Reply("next")
    with pytest.raises(EngineUnavailable, match="so that others get their turn"):
        await anext(steps)


async def test_closing_ends_the_process_and_whoever_uses_it(bench: Bench) -> None:
    inspector = bench.inspector()
    running = asyncio.create_task(collect(inspector, ask("hang")))
    await until(lambda: "trace" in bench.ops())
    waiting = asyncio.create_task(collect(inspector, ask("a")))
    await asyncio.sleep(0)
    pid = inspector.pid
    assert pid is not None

    await inspector.close()

    assert not psutil.pid_exists(pid)
    assert all(isinstance(end, EngineError) for end in await asyncio.gather(running, waiting, return_exceptions=True))
    with pytest.raises(EngineUnavailable):
        await collect(inspector, ask("b"))
    assert bench.ops().count("load") == 1


async def test_process_is_told_no_secrets(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHANNON_BOOTSTRAP_KEY", "sk-secret")
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "hf-secret")
    reply = (await collect(bench.inspector(threads=3), ask("environment")))[-1]
    assert isinstance(reply, Reply)
    environment = json.loads(reply.text)

    assert "secret" not in reply.text
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("layer", "head", "message"),
    [
        (-1, None, "'trace_layer' must be from 0 to 3: the model has 4 layers."),
        (4, None, "'trace_layer' must be from 0 to 3: the model has 4 layers."),
        (0, -1, "'head' must be from 0 to 7: the model has 8 heads."),
        (0, 8, "'head' must be from 0 to 7: the model has 8 heads."),
    ],
)
def test_layer_or_head_that_is_not_there_is_refused(layer: int, head: int | None, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Shape("", layers=4, heads=8, max_model_len=1).check(layer, head)

    assert str(caught.value) == message
    assert f"'{caught.value.param}'" in message


async def test_engine_without_a_checkpoint_here_is_refused(bench: Bench) -> None:
    with pytest.raises(InvalidRequest, match="its weights are not in this gateway") as caught:
        bench.inspector().shape("remote")
    assert caught.value.code == "model_not_supported"


async def test_checkpoint_that_is_yet_to_come_is_unavailable(bench: Bench) -> None:
    sources = {"main": Source("an-organisation/a-model-that-nobody-has")}
    with pytest.raises(EngineUnavailable, match="not on this machine yet"):
        bench.inspector(sources=sources).shape("main")


@pytest.mark.parametrize(
    ("config", "bound", "expected"),
    [
        ({"num_hidden_layers": 32, "num_attention_heads": 16, "max_position_embeddings": 4096}, None, (32, 16, 4096)),
        ({"num_hidden_layers": 32, "num_attention_heads": 16, "max_position_embeddings": 4096}, 512, (32, 16, 512)),
        ({"num_hidden_layers": 32, "num_attention_heads": 16}, 512, (32, 16, 512)),
        ({"n_layer": 12, "n_head": 6, "n_positions": 1024}, 2048, (12, 6, 1024)),
        (
            {
                "num_hidden_layers": 1,
                "text_config": {"num_hidden_layers": 34, "num_attention_heads": 8, "max_position_embeddings": 99},
            },
            None,
            (34, 8, 99),
        ),
    ],
)
def test_shape_is_read_of_families_with_other_words(
    tmp_path: Path, config: dict[str, Any], bound: int | None, expected: tuple[int, int, int]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))

    shape = read_shape(str(tmp_path), Source("x", max_model_len=bound))

    assert (shape.layers, shape.heads, shape.max_model_len) == expected


@pytest.mark.parametrize(
    "text", [None, "{", "[]", "{}", '{"n_layer": null, "n_head": 1, "n_positions": 1}', '"n_layer"']
)
def test_checkpoint_that_does_not_tell_its_shape_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidRequest, match="can't be inspected"):
        read_shape(str(tmp_path), Source("x", max_model_len=10))
