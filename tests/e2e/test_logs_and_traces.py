"""vLLM in the log and in the traces: its core is a process of its own, with loggers and spans of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx

from tests.support.gateway_process import serve
from tests.support.otlp_receiver import run_receiver

TRACE = "0af7651916cd43dd8448eb211c80319c"
OWN_FORM = re.compile(r"(\(\S+ pid=\d+\) )?(DEBUG|INFO|WARNING|ERROR) \d\d-\d\d ")
"""Of vLLM's lines."""
ENGINE = {"kind": "embedded", "model": "demo", "args": {"max_model_len": 512}, "engine_stall_s": 60}


def test_vllm_logs_json_and_goes_on_with_the_trace(tmp_path: Path) -> None:
    with run_receiver() as receiver:
        environment = {
            "SHANNON_LOG_FORMAT": "json",
            "VLLM_LOGGING_LEVEL": "INFO",
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
        }
        with serve(tmp_path, {"engines": {"main": ENGINE}}, **environment) as gateway:
            gateway.wait_until_ready()
            body = {"messages": [{"role": "user", "content": "What are you?"}], "stream": True}
            headers = gateway.authorization | {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
            httpx.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers, timeout=60).raise_for_status()
        assert gateway.process.returncode == 0

        (chat,) = receiver.named("chat shannon-chat")
        (of_vllm,) = receiver.named("llm_request")
        assert (chat["trace_id"], of_vllm["trace_id"], of_vllm["parent_id"]) == (TRACE, TRACE, chat["span_id"])
        assert of_vllm["gen_ai.request.id"] == chat["gen_ai.response.id"]
        assert of_vllm["service"] == chat["service"] == "shannon-gateway"

    text = gateway.log.read_text().splitlines()
    lines = [json.loads(line) for line in text if line.startswith("{")]
    # The rest is no logger's (C++, Python's own warnings), or came before the core had read how to log.
    assert not [line for line in text if OWN_FORM.match(line)]
    of_the_core = [line for line in lines if line.get("process", "").startswith("EngineCore")]
    assert any(line["logger"].startswith("vllm.") for line in of_the_core)
    assert any(line["logger"].startswith("vllm.") for line in lines if "process" not in line)
