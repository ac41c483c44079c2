"""A gateway goes on whatever becomes of its output, and a command whose output is gone ends in one line or none."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.cli import main
from gateway.telemetry.standard_streams import LossyStream
from tests.support.app import ROOT
from tests.support.gateway_process import wait_until

TREE = "engines: {main: {kind: mock}}\nmodels: {shannon-chat: {description: x}}\n"
PIPE_BYTES = 16_384


def small_pipe() -> tuple[int, int]:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return reader, writer


def read_all(reader: int) -> str:
    os.set_blocking(reader, False)
    with contextlib.suppress(BlockingIOError):
        return os.read(reader, 1 << 20).decode()
    return ""


@pytest.fixture
def pipe() -> Iterator[tuple[int, LossyStream]]:
    reader, writer = small_pipe()
    with open(writer, "w") as stream:
        yield reader, LossyStream(stream)
    os.close(reader)


def test_lines_that_nobody_reads_are_lost_and_counted(pipe: tuple[int, LossyStream]) -> None:
    reader, stream = pipe
    for number in range(10_000):
        assert stream.write(f"line {number}\n") > 0
    assert stream.take_lost_lines() == 0, "it can't be said yet"

    kept = read_all(reader).splitlines()

    assert kept == [f"line {number}" for number in range(len(kept))]
    assert stream.take_lost_lines() == 10_000 - len(kept)
    assert stream.take_lost_lines() == 0
    stream.write("on\n")
    assert read_all(reader) == "on\n"


def test_long_text_is_cut_where_it_is_not_read_and_the_next_begins_a_line(pipe: tuple[int, LossyStream]) -> None:
    reader, stream = pipe
    stream.write("x" * (9 * PIPE_BYTES) + "\n")

    assert set(read_all(reader)) == {"x"}
    stream.write("on\n")
    assert read_all(reader) == "\non\n"
    assert stream.take_lost_lines() == 1


def test_waits_are_rare(pipe: tuple[int, LossyStream], monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that is always a little late must not make each line wait."""
    _, stream = pipe
    waits: list[float] = []

    class Poll:
        def poll(self, wait_ms: float) -> list[Any]:
            waits.extend([wait_ms] if wait_ms else [])
            return []

    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    stream._poll = Poll()  # type: ignore[assignment]
    for _ in range(100):
        stream.write("x\n")

    assert len(waits) == 1


def test_full_disk_and_departed_reader_are_no_errors(pipe: tuple[int, LossyStream]) -> None:
    with open("/dev/full", "w") as full:
        stream = LossyStream(full)
        print("x", file=stream, flush=True)
        assert stream.take_lost_lines() == 1
    reader, writer = os.pipe()
    with open(writer, "w") as broken:
        os.close(reader)
        print("x", file=LossyStream(broken), flush=True)


@pytest.fixture
def deployment(tmp_path: Path) -> Path:
    path = tmp_path / "deployment.yaml"
    path.write_text(f"{TREE}server: {{port: 0}}\nstore: {{data_dir: {tmp_path / 'data'}}}\n")
    return path


def test_output_that_nobody_reads_stops_no_request(deployment: Path, store_url: str) -> None:
    reader, writer = small_pipe()
    command = [sys.executable, "-m", "gateway.cli", "serve", "--config", str(deployment)]
    environment = os.environ | {"SHANNON_REDIS_URL": store_url}
    with subprocess.Popen(command, cwd=ROOT, stdout=writer, stderr=writer, env=environment) as process:
        try:
            os.close(writer)
            os.set_blocking(reader, False)
            log = ""

            def url() -> str:
                nonlocal log
                with contextlib.suppress(BlockingIOError):
                    log += os.read(reader, 1 << 16).decode()
                return log.partition("Uvicorn running on ")[2].partition(" ")[0]

            wait_until(lambda: bool(url()), "it does not listen", within_s=60)
            with httpx.Client(base_url=url(), timeout=10) as client:
                for _ in range(200):  # each is a line of more than a hundredth of the pipe
                    assert client.get("/nowhere").status_code == 404
                read_all(reader)
                client.get("/nowhere")
            assert "lines of this log were lost" in read_all(reader)
        finally:
            process.terminate()
        assert process.wait(timeout=30) == 0
    os.close(reader)


def test_gateway_without_standard_streams_serves_and_ends(deployment: Path, store_url: str, tmp_path: Path) -> None:
    """Its sockets would have their numbers, and the event loop ends the process when it closes one of these."""
    deployment.write_text(deployment.read_text().replace("port: 0", "port: 0, host: 127.0.0.9"))
    shell = 'exec "$@" <&- >&- 2>&-'
    command = ["sh", "-c", shell, "sh", sys.executable, "-m", "gateway.cli", "serve", "--config", str(deployment)]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"SHANNON_REDIS_URL": store_url}) as process:
        try:
            wait_until(lambda: process.poll() is not None or ready(process.pid), "it does not serve", within_s=60)
        finally:
            process.terminate()
        assert process.wait(timeout=30) == 0


def ready(pid: int) -> bool:
    import psutil

    ports = [c.laddr.port for c in psutil.Process(pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    with contextlib.suppress(httpx.TransportError, IndexError):
        return httpx.get(f"http://127.0.0.9:{ports[0]}/ready").status_code == 200
    return False


@pytest.mark.parametrize("command", [("models",), ("models", "--json")])
def test_command_ends_quietly_where_its_reader_is_gone(
    deployment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with contextlib.suppress(SystemExit):  # rich's way
            assert main([*command, "--config", str(deployment)]) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", [("models",), ("models", "--json"), ("keys", "create", "x")])
def test_command_whose_output_can_not_be_written_is_one_line(
    deployment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], store_url: str, command: Any
) -> None:
    monkeypatch.setenv("SHANNON_REDIS_URL", store_url)
    with open("/dev/full", "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main([*command, "--config", str(deployment)]) == 2
    assert capsys.readouterr().err == "shannon: can't continue: No space left on device\n"


def test_encoding_without_a_character_has_it_escaped(deployment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment.write_text(deployment.read_text().replace("description: x", "description: caf\u00e9"))
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))

    assert main(["models", "--config", str(deployment)]) == 0

    sys.stdout.flush()
    assert b"caf\\xe9" in raw.getvalue()
