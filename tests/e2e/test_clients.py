"""The official clients get the demo model's known answers: the very files that the README shows, run as processes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from engine.demo import corpus
from tests.support.client_scripts import CLIENTS, run_client
from tests.support.gateway_process import ROOT, GatewayProcess

(ANSWER,) = {
    exchange.answer
    for conversation in corpus()
    for turn in conversation.turns
    for exchange in conversation.exchanges()
    if "What are you?" in turn.also
}


@pytest.mark.parametrize("script", ["chat.py", "chat_langchain.py"])
def test_python_clients_get_the_answer_whole_and_streamed(gateway: GatewayProcess, script: str) -> None:
    output = run_client(gateway, sys.executable, str(CLIENTS / script), LANGSMITH_TRACING="false")
    assert output.splitlines() == [ANSWER, ANSWER]


def test_node_client_gets_the_answer_whole_and_streamed(gateway: GatewayProcess, node_client: tuple[str, Path]) -> None:
    node, folder = node_client
    assert run_client(gateway, node, "chat.mjs", cwd=folder).splitlines() == [ANSWER, ANSWER]


def test_printed_curl_line_works_when_pasted(gateway: GatewayProcess) -> None:
    lines = gateway.log.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.strip().startswith("curl "))
    output = run_client(gateway, "bash", "-c", "\n".join(lines[start : start + 3]))
    assert ANSWER in output


def test_cut_stream_is_taken_up_by_the_printed_lines(gateway: GatewayProcess, tmp_path: Path) -> None:
    output = run_client(gateway, "bash", str(CLIENTS / "resume.sh"), cwd=tmp_path)
    numbers = [int(line.removeprefix("id: ")) for line in output.splitlines() if line.startswith("id: ")]
    assert numbers == list(range(1, len(numbers) + 1)), "every event once"
    frames = [json.loads(line.removeprefix("data: ")) for line in output.splitlines() if line.startswith("data: {")]
    assert "".join(frame["choices"][0]["delta"].get("content") or "" for frame in frames) == ANSWER
    assert "data: [DONE]" in output


def test_jobs_are_answered_in_order_by_the_printed_lines(gateway: GatewayProcess, tmp_path: Path) -> None:
    output = run_client(gateway, "bash", str(CLIENTS / "jobs.sh"), cwd=tmp_path)
    events = re.findall(r"event: (\w+)\ndata: (\{.*\})$", output, re.M)
    names = [name for name, _ in events if name not in ("token", "queued")]
    assert names == ["open", "started", "done", "started", "done", "end"], output
    jobs = [json.loads(data) for name, data in events if name == "token"]
    first = jobs[0]["job_id"]
    assert "".join(job["text"] for job in jobs if job["job_id"] == first) == ANSWER


def test_tokens_are_looked_into_by_the_printed_lines(gateway: GatewayProcess, tmp_path: Path) -> None:
    output = run_client(gateway, "bash", str(CLIENTS / "inspect.sh"), cwd=tmp_path)
    events = re.findall(r"event: (\w+)\ndata: (\{.*\})$", output, re.M)
    assert [name for name, _ in events] == ["token", "trace", "token", "trace", "done"], output
    assert ANSWER.startswith(json.loads(events[0][1])["token_text"])


@pytest.mark.parametrize("client", ["chat.py", "chat.mjs", "chat_langchain.py", "resume.sh", "jobs.sh", "inspect.sh"])
def test_documentation_shows_the_tested_client(client: str) -> None:
    assert (CLIENTS / client).read_text() in (ROOT / "README.md").read_text() + (ROOT / "docs/api.md").read_text()
