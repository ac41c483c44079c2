"""`python -m tests.bench`: the same load on three servers, interleaved, and the ratios between them.

- bare: vLLM's own OpenAI server (`python -m vllm.entrypoints.openai.api_server`), in the processes it makes by itself
- litellm: LiteLLM's proxy in front of bare, with its master key and nothing else switched on; in an environment of its
  own, if `--litellm` names its Python
- tuned: the same in the environment that this gateway sets, one process fewer
- shannon: this gateway
- unmetered: this gateway with limits and sessions off
- ceiling: AsyncLLM alone in a loop, no HTTP

All run the demo model with the same engine arguments. Each round runs every scenario on every server; a figure is the
median over rounds. A second part drives the gateway with the mock engine and counts frames
per CPU second of the server process. Times are never asserted; the ratios are for people to read.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

import httpx
import psutil
import yaml
from rich.console import Console
from rich.table import Table

from engine.demo import WEIGHTS
from gateway.access.keys import make_key
from tests.bench.load import Result, Scenario, run_load
from tests.support.gateway_process import UNLIMITED

ROOT = Path(__file__).resolve().parents[2]
ENGINE_ARGS = {"max_model_len": 1024, "max_num_seqs": 64}
SCENARIOS = [
    Scenario("plain 16 tokens, 1 at a time", False, 16, 1, 24),
    Scenario("plain 16 tokens, 32 at a time", False, 16, 32, 256),
    Scenario("stream 128 tokens, 1 at a time", True, 128, 1, 6),
    Scenario("stream 128 tokens, 32 at a time", True, 128, 32, 96),
]
FRAMES = Scenario("stream 512 tokens from the mock engine, 16 at a time", True, 512, 16, 320)
REQUESTS = Scenario("plain 1 token from the mock engine, 32 at a time", False, 1, 32, 4000)
START_TIMEOUT_S = 120
_NEEDED = ("VLLM_CPU_KVCACHE_SPACE", "VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS")


class Target(Protocol):
    """A server under load."""

    async def run(self, scenario: Scenario) -> Result: ...


@dataclasses.dataclass
class HttpTarget:
    """A server that speaks HTTP on a port of 127.0.0.1, and the process it runs in."""

    port: int
    key: str
    model: str
    pid: int

    async def run(self, scenario: Scenario) -> Result:
        return await run_load(self.port, scenario, key=self.key, model=self.model)


@dataclasses.dataclass
class Ceiling:
    """`tests.bench.ceiling` as a child process."""

    process: asyncio.subprocess.Process

    async def run(self, scenario: Scenario) -> Result:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(dataclasses.asdict(scenario)).encode() + b"\n")
        answer = json.loads(await self.process.stdout.readline())
        tokens = scenario.requests * scenario.tokens
        return Result(answer["duration_s"], scenario.requests, tokens, 0, answer["first_byte_s"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def child(
    *command: str, python: str = sys.executable, **environment: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a Python module as a child process, and end it at the end."""
    process = await asyncio.create_subprocess_exec(
        python,
        "-m",
        *command,
        cwd=ROOT,
        env=os.environ | environment,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def wait_until_served(url: str, process: asyncio.subprocess.Process) -> None:
    async with httpx.AsyncClient() as client, asyncio.timeout(START_TIMEOUT_S):
        while process.returncode is None:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get(url)).status_code == 200:
                    return
            await asyncio.sleep(0.2)
    raise RuntimeError(f"the server for {url} ended with {process.returncode}")


@contextlib.asynccontextmanager
async def bare(*, tuned: bool) -> AsyncIterator[HttpTarget]:
    from engine.local.async_llm import build_defaults

    environment, args = build_defaults()
    if not tuned:
        environment = {name: value for name, value in environment.items() if name in _NEEDED}
    port = free_port()
    flags = [flag for name, value in (args | ENGINE_ARGS).items() for flag in _flag(name, value)]
    command = ["vllm.entrypoints.openai.api_server", "--model", str(WEIGHTS), "--served-model-name", "demo"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--uvicorn-log-level", "error", *flags]
    async with child(*command, **environment) as process:
        await wait_until_served(f"http://127.0.0.1:{port}/health", process)
        yield HttpTarget(port, "", "demo", process.pid)


def _flag(name: str, value: object) -> list[str]:
    flag = "--" + name.replace("_", "-")
    return [flag] if value is True else [flag, str(value)]


@contextlib.asynccontextmanager
async def litellm(python: Path, upstream: HttpTarget) -> AsyncIterator[HttpTarget]:
    port, key = free_port(), make_key()
    model = {"model": "hosted_vllm/demo", "api_base": f"http://127.0.0.1:{upstream.port}/v1", "api_key": "none"}
    tree = {"model_list": [{"model_name": "demo", "litellm_params": model}]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "litellm.yaml"
        path.write_text(yaml.safe_dump(tree))
        command = ["litellm.proxy.proxy_cli", "--config", str(path), "--host", "127.0.0.1", "--port", str(port)]
        environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "LITELLM_MASTER_KEY": key}
        async with child(*command, "--telemetry", "False", python=str(python), **environment) as process:
            await wait_until_served(f"http://127.0.0.1:{port}/health/liveliness", process)
            yield HttpTarget(port, key, "demo", process.pid)


@contextlib.asynccontextmanager
async def shannon(engine: dict[str, object], *, policies: bool = True) -> AsyncIterator[HttpTarget]:
    """The gateway; `policies` switches limits and sessions."""
    port, key = free_port(), make_key()
    tree: dict[str, object] = {"include": str(ROOT / "configs/models.yaml"), "engines": {"main": engine}}
    tree["models"] = {"shannon-chat": {"limits": UNLIMITED}}
    if not policies:
        tree |= {"limits": {"enabled": False}, "sessions": {"enabled": False}}
    with tempfile.TemporaryDirectory() as folder:
        tree["store"] = {"data_dir": folder}
        path = Path(folder) / "bench.yaml"
        path.write_text(yaml.safe_dump(tree))
        command = ["gateway.cli", "serve", "--config", str(path), "--port", str(port)]
        async with child(*command, SHANNON_BOOTSTRAP_KEY=key) as process:
            await wait_until_served(f"http://127.0.0.1:{port}/ready", process)
            yield HttpTarget(port, key, "shannon-chat", process.pid)


@contextlib.asynccontextmanager
async def ceiling() -> AsyncIterator[Ceiling]:
    async with child("tests.bench.ceiling", json.dumps(ENGINE_ARGS)) as process:
        assert process.stdout
        await process.stdout.readline()
        yield Ceiling(process)
        assert process.stdin
        process.stdin.close()  # at its end it closes the engine; terminated, it would leave the core behind
        await process.wait()


async def compare(rounds: int, console: Console, litellm_python: Path | None) -> dict[str, dict[str, dict[str, float]]]:
    """Return {scenario: {target: {requests_per_s, first_byte_s}}}, medians over `rounds`."""
    runs: dict[tuple[str, str], list[Result]] = {}
    async with contextlib.AsyncExitStack() as stack:
        targets: dict[str, Target] = {}
        embedded: dict[str, object] = {"kind": "embedded", "model": "demo", "args": ENGINE_ARGS}
        servers: dict[str, AbstractAsyncContextManager[Target]] = {
            "bare": bare(tuned=False),
            "tuned": bare(tuned=True),
            "shannon": shannon(embedded),
            "unmetered": shannon(embedded, policies=False),
            "ceiling": ceiling(),
        }
        for name, opened in servers.items():
            console.print(f"starting {name} ...")
            targets[name] = await stack.enter_async_context(opened)
            if name == "bare" and litellm_python is not None:
                upstream = targets["bare"]
                assert isinstance(upstream, HttpTarget)
                targets["litellm"] = await stack.enter_async_context(litellm(litellm_python, upstream))
        for target in targets.values():
            await target.run(dataclasses.replace(SCENARIOS[-1], requests=32))  # warm up
        for number in range(rounds):
            console.print(f"round {number + 1} of {rounds}")
            for scenario in SCENARIOS:
                for name, target in targets.items():
                    runs.setdefault((scenario.name, name), []).append(await target.run(scenario))
    return {
        scenario.name: {
            name: {
                "requests_per_s": statistics.median(r.requests_per_s for r in runs[scenario.name, name]),
                "first_byte_s": statistics.median(r.first_byte_s for r in runs[scenario.name, name]),
            }
            for name in targets
        }
        for scenario in SCENARIOS
    }


async def front_end(rounds: int) -> dict[str, float]:
    """Return frames and requests per CPU second of a gateway whose engine costs next to nothing."""
    frames: list[float] = []
    requests: list[float] = []
    unmetered: list[float] = []
    async with shannon({"kind": "mock"}) as metered, shannon({"kind": "mock"}, policies=False) as plain:
        for _ in range(rounds):
            for target, scenario, figures in (
                (metered, FRAMES, frames),
                (metered, REQUESTS, requests),
                (plain, REQUESTS, unmetered),
            ):
                process = psutil.Process(target.pid)
                before = process.cpu_times()
                result = await target.run(scenario)
                after = process.cpu_times()
                spent_s = after.user + after.system - before.user - before.system
                figures.append((result.frames or result.requests) / spent_s)
    return {
        "frames_per_core_s": statistics.median(frames),
        "requests_per_core_s": statistics.median(requests),
        "unmetered_requests_per_core_s": statistics.median(unmetered),
    }


def show(comparison: dict[str, dict[str, dict[str, float]]], front: dict[str, float], console: Console) -> None:
    others = [name for name in next(iter(comparison.values())) if name != "shannon"]
    table = Table("load", "shannon req/s", *(f"x {other}" for other in others), "first byte x bare")
    for name, by_target in comparison.items():
        ours = by_target["shannon"]
        ratios = [f"{ours['requests_per_s'] / by_target[other]['requests_per_s']:.2f}" for other in others]
        first = ours["first_byte_s"] / by_target["bare"]["first_byte_s"]
        table.add_row(name, f"{ours['requests_per_s']:.1f}", *ratios, f"{first:.2f}")
    console.print(table)
    console.print(f"With the mock engine, per core: {front['frames_per_core_s']:,.0f} frames/s", end=", ")
    console.print(f"{front['requests_per_core_s']:,.0f} requests/s", end=" ")
    console.print(f"({front['unmetered_requests_per_core_s']:,.0f} with limits and sessions off)")


async def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.bench")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("compare", "front-end"))
    parser.add_argument("--litellm", type=Path, metavar="PYTHON", help="a Python that has litellm[proxy]")
    args = parser.parse_args()
    console = Console()
    comparison = await compare(args.rounds, console, args.litellm) if args.only != "front-end" else {}
    front = await front_end(args.rounds) if args.only != "compare" else {}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"compare": comparison, "front_end": front}, indent=2))
    if comparison and front:
        show(comparison, front, console)
    else:
        console.print_json(data=comparison or front)


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
