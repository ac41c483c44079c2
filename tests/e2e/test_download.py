"""`shannon download` and `shannon serve` as an older deployment runs them: by environment names, from a model cache."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from engine.demo import WEIGHTS, corpus
from tests.support.gateway_process import ENVIRONMENT, ROOT, UNLIMITED, GatewayProcess, serve
from tests.support.hub_stub import Fault, HubStub, run_hub

MODEL = "shannon-ai/demo"
SAFETENSORS = (WEIGHTS / "model.safetensors").read_bytes()
HALF = len(SAFETENSORS) // 2
EXCHANGE = next(
    exchange
    for conversation in corpus()
    for exchange in conversation.exchanges()
    if len(exchange.messages) == 1 and not exchange.tools and 20 < len(exchange.answer) < 200
)


@pytest.fixture(scope="module")
def hub() -> Iterator[HubStub]:
    """A hub with the demo model behind a licence."""
    with run_hub() as stub:
        stub.add_folder(MODEL, WEIGHTS).gated = True
        yield stub


def environment(hub: HubStub, cache: Path, **more: str) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "SHANNON_MODEL_CACHE": str(cache),
        "HUGGINGFACE_TOKEN": "hf_reader",
    } | more


def start_download(hub: HubStub, cache: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gateway.cli", "download", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT | environment(hub, cache),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_interrupted_download_goes_on_in_the_next_process(
    hub: HubStub, tmp_path: Path, signal_number: int, code: int
) -> None:
    hub.asked.clear()
    hub.stalled.clear()
    hub.fault("model.safetensors", Fault(after_bytes=HALF, stall=True))
    with start_download(hub, tmp_path, MODEL) as first:
        assert hub.stalled.wait(30)
        partial = next((tmp_path / "models--shannon-ai--demo" / "blobs").glob("*.incomplete"))
        while partial.stat().st_size < HALF:  # what the hub has sent is still in the socket
            assert first.poll() is None
        first.send_signal(signal_number)
        _, said = first.communicate(timeout=30)

    assert first.returncode == code
    assert "Traceback" not in said
    if code == 130:
        assert "What has come stays; the same command continues from there." in said

    with start_download(hub, tmp_path, MODEL, "--json") as second:
        out, _ = second.communicate(timeout=30)
    (result,) = json.loads(out)
    assert hub.ranges(SAFETENSORS) == [None, f"bytes={HALF}-"]
    assert result["downloaded_bytes"] <= result["bytes"] - HALF
    assert (Path(result["path"]) / "model.safetensors").read_bytes() == SAFETENSORS


def test_failed_download_is_one_line_and_exit_code_2(hub: HubStub, tmp_path: Path) -> None:
    with start_download(hub, tmp_path, "shannon-ai/shannon-1.6-pro") as process:
        out, said = process.communicate(timeout=30)

    assert process.returncode == 2
    assert out == ""
    (line,) = said.splitlines()
    assert line.startswith(f"shannon: there is no model shannon-ai/shannon-1.6-pro at {hub.url}, or it is private;")


@pytest.fixture(scope="module")
def deployed(hub: HubStub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """The demo model, downloaded over a cut connection, and served from the cache by a gateway that has no hub."""
    cache = tmp_path_factory.mktemp("cache")
    hub.asked.clear()
    hub.fault("model.safetensors", Fault(after_bytes=HALF))
    with start_download(hub, cache, MODEL) as process:
        assert process.wait(30) == 0
    assert hub.ranges(SAFETENSORS) == [None, f"bytes={HALF}-"]
    hub.asked.clear()
    tree = {
        "engines": {"main": {"kind": "embedded", "model": "org/of-the-file", "args": {"max_model_len": 1024}}},
        "models": {"shannon-chat": {"limits": UNLIMITED}},
    }
    variables = environment(hub, cache, HF_HUB_OFFLINE="1") | {
        "SHANNON_MODEL_ID": MODEL,
        "SHANNON_TEMPERATURE": "0.0",
        "SHANNON_MAX_OUTPUT_TOKENS": "300",
        "SHANNON_MAX_INPUT_TOKENS": "100",
        "SHANNON_STREAM_CHUNK_SIZE": "16",
    }
    with serve(tmp_path_factory.mktemp("deployed"), tree, **variables) as running:
        running.wait_until_ready()
        yield running


@pytest.mark.slow
def test_model_is_served_from_the_cache_without_the_hub(hub: HubStub, deployed: GatewayProcess) -> None:
    answer = deployed.chat(messages=list(EXCHANGE.messages)).raise_for_status().json()

    assert answer["choices"][0]["message"]["content"] == EXCHANGE.answer
    assert hub.asked == []


@pytest.mark.slow
def test_names_of_the_older_deployment_hold_in_the_process(deployed: GatewayProcess) -> None:
    refused = deployed.chat(messages=list(EXCHANGE.messages), max_tokens=301)
    assert refused.status_code == 400
    assert "at most 300 completion tokens" in refused.json()["error"]["message"]

    filler = [message for _ in range(20) for message in (*EXCHANGE.messages, {"role": "assistant", "content": "Well."})]
    long = deployed.chat(messages=[*filler, *EXCHANGE.messages], max_tokens=1).raise_for_status().json()
    assert long["usage"]["prompt_tokens"] <= 100


@pytest.mark.slow
def test_frames_of_the_process_have_so_many_characters(deployed: GatewayProcess) -> None:
    body = {"messages": list(EXCHANGE.messages), "stream": True}
    response = httpx.post(f"{deployed.url}/v1/chat/completions", json=body, headers=deployed.authorization)
    objects = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    pieces = [piece for chunk in objects if (piece := chunk["choices"][0]["delta"].get("content"))]

    assert "".join(pieces) == EXCHANGE.answer
    assert {len(piece) for piece in pieces[:-1]} == {16}


def test_gemma3n_port_is_where_the_process_listens(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gateway.cli", "serve", "--config", str(ROOT / "configs/mock.yaml")]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=ENVIRONMENT | {"GEMMA3N_PORT": str(port), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert any(f"http://127.0.0.1:{port}/v1" in line for line in process.stdout)
            assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).json()["ok"] is True
        finally:
            process.terminate()
