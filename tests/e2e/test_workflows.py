"""Every one of the eight models, with the real engine and the demo model, over a folder of real documents.

The demo model writes word salad here, and must: whatever a small model plans, decides and says, the run completes, its
events follow the grammar, and its usage is what vLLM counted. What is found and read is real; Google, and the seller
of results pages with ads, are played by a server on loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.support.client_scripts import CLIENTS, run_client
from tests.support.documents import pdf
from tests.support.event_grammar import check_events
from tests.support.ga4 import METADATA, REPORT, account
from tests.support.gateway_process import ROOT, UNLIMITED, GatewayProcess, serve, wait_until
from tests.support.mcp_stub import MCP_STUB
from tests.support.upstream_server import Connection, UpstreamServer, run_upstream_beside

pytestmark = pytest.mark.slow

MODELS = [
    *("shannon-chat", "shannon-quick-research", "shannon-standard-research", "shannon-deep-research"),
    *("shannon-academic-research", "shannon-ads-research", "shannon-analytics", "shannon-complex"),
]
RESEARCH = [model for model in MODELS if model.endswith("research") and "ads" not in model]
QUESTION = "When did the harbour of Yokohama open, and what was traded there?"
ASK: Any = [{"role": "user", "content": QUESTION}]


def saying(body: Any) -> Callable[[Connection], Awaitable[None]]:
    return lambda connection: connection.reply(200, body)


@pytest.fixture(scope="module")
def outside() -> Iterator[UpstreamServer]:
    """Google Analytics, and a seller of results pages, with one advertiser whose page can't be reached."""
    with run_upstream_beside(saying({})) as server:
        ad = {"title": "Acme Planner", "link": "https://acme.test/plans", "snippet": "Plan your week."}
        server.routes |= {
            "/search": saying({"ads": [ad]}),
            "/token": saying({"access_token": "t-1", "expires_in": 3600}),
            "/v1beta/properties/123/metadata": saying(METADATA),
            "/v1beta/properties/123:runReport": saying(REPORT),
        }
        yield server


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, outside: UpstreamServer) -> Iterator[GatewayProcess]:
    """A gateway with the demo model, a folder of documents, and tools for ads and analytics."""
    folder = tmp_path_factory.mktemp("documents")
    filler = "The weather was mild that year, and the roads were dry. " * 60
    (folder / "harbour.md").write_text(f"# Harbour of Yokohama\n\nThe harbour opened in 1859.\n\n{filler}")
    (folder / "trade.txt").write_text("Silk and tea were traded in the harbour of Yokohama; silk came first.")
    (folder / "railway.html").write_text("<title>Railway</title><p>The railway from Shimbashi opened in 1872.</p>" * 9)
    (folder / "report.pdf").write_bytes(pdf("Customs report", ["", "In 1860 the harbour took in much silver."]))
    root = f"http://127.0.0.1:{outside.port}"
    key_file = tmp_path_factory.mktemp("google") / "account.json"
    key_file.write_text(account(rsa.generate_private_key(65537, 2048), f"{root}/token"))
    tree = {
        "engines": {"main": {"kind": "embedded", "model": "demo", "args": {"max_model_len": 2048}}},
        "models": {model: {"limits": UNLIMITED} for model in MODELS},
        "store": {"command_timeout_ms": 2000},  # what is asked of it here has no journal to fall back on
        "tools": {
            "web_fetch": {"robots": False},
            "local_search": {"folder": str(folder)},
            "serp_ads": {"provider": "serper", "url": root},
            "ga4": {"property_id": "123", "url": root},
            "mcp": {"ptengine": {"command": MCP_STUB, "tools": ["traffic"]}},
        },
    }
    environment = {"SERPER_API_KEY": "k-1", "GOOGLE_APPLICATION_CREDENTIALS": str(key_file)}
    with serve(tmp_path_factory.mktemp("agents"), tree, **environment) as running:
        running.wait_until_ready()
        yield running


def events_of(answer: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (answer.model_extra or {}).get("shannon_events", [])
    return found


def orphans(gateway: GatewayProcess) -> float:
    return gateway.metric("vllm:num_requests_running") + gateway.metric("vllm:num_requests_waiting")


def wait_for_quiet(gateway: GatewayProcess) -> None:
    wait_until(lambda: not orphans(gateway), "requests were left in the engine")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("model", MODELS)
def test_every_model_completes(gateway: GatewayProcess, model: str, stream: bool) -> None:
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key, max_retries=0)
    before = gateway.counted()
    events: list[dict[str, Any]] = []
    text, usage, finish_reason = "", None, None
    if stream:
        for chunk in client.chat.completions.create(model=model, messages=ASK, max_tokens=120, stream=True):
            events += events_of(chunk)
            text += chunk.choices[0].delta.content or ""
            usage = chunk.usage or usage
            finish_reason = chunk.choices[0].finish_reason or finish_reason
    else:
        whole = client.chat.completions.create(model=model, messages=ASK, max_tokens=120)
        events, text, usage = events_of(whole), whole.choices[0].message.content or "", whole.usage
        finish_reason = whole.choices[0].finish_reason

    check_events(events)
    assert text
    assert finish_reason in ("stop", "length")
    assert usage is not None
    after = gateway.counted()
    assert (usage.prompt_tokens, usage.completion_tokens) == (after[0] - before[0], after[1] - before[1])
    assert usage.completion_tokens > 0
    if model in RESEARCH:
        sources = events[-1]["payload"]["sources"]
        assert sources, "documents were found and read"
        assert all(source["url"].startswith("local:") for source in sources)
        assert f"## Sources\n\n[{sources[0]['number']}] {sources[0]['title']}" in text
        named = {int(number) for number in re.findall(r"\[(\d+)\] .* \(local:", text)}
        assert named == {source["number"] for source in sources}
    if model == "shannon-ads-research":
        assert [one["domain"] for one in events[-1]["payload"]["ads"]], "an advertiser was found"
    if model == "shannon-analytics":
        assert events[-1]["payload"]["reports"], "a report was had"
        assert "1,204" in text
    wait_for_quiet(gateway)


def test_deep_research_over_documents_reads_what_bears_on_the_question(gateway: GatewayProcess) -> None:
    # Greedy: of word salad drawn at random, now and then no word bears on anything.
    body = gateway.chat(model="shannon-deep-research", messages=ASK, max_tokens=60, temperature=0).json()
    events = body["shannon_events"]
    read = [e for e in events if e["type"] == "TOOL_OBSERVATION" and e["payload"]["tool"] == "local_read"]

    assert any("The harbour opened in 1859." in event["message"] for event in read)
    assert {"planner", "coverage", "synthesis", "citation"} <= {event["agent_id"] for event in events}
    started = [e["agent_id"] for e in events if e["type"] == "AGENT_STARTED" and e["payload"]["role"] == "researcher"]
    assert len(started) >= 5, "any model yields a plan that parses"
    assert not [event for event in events if event["type"] == "ERROR_OCCURRED"]


def test_agents_of_a_run_share_the_prefix_of_their_prompts(gateway: GatewayProcess) -> None:
    """A question that nobody has asked before is computed once, however many agents are told it."""
    question = f"In the year {time.time_ns()}: " + " ".join(f"what of number {n * 7919 % 1000}?" for n in range(60))
    ask = [{"role": "user", "content": question}]
    tokens = gateway.chat(model="shannon-chat", messages=ask, max_tokens=1).json()["usage"]["prompt_tokens"]
    usage = gateway.chat(model="shannon-deep-research", messages=ask, max_tokens=30).json()["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    print(f"cached: {cached} of {usage['prompt_tokens']}, the question has {tokens}")
    assert tokens > 300
    assert cached > 2 * tokens


@pytest.mark.usefixtures("books")
@pytest.mark.parametrize("model", MODELS[1:])
def test_leaving_in_the_middle_leaves_nothing_in_the_engine(gateway: GatewayProcess, model: str) -> None:
    before = gateway.counted()
    body = {"model": model, "messages": ASK, "stream": True}
    for frames in (2, 8, 20):
        url = f"{gateway.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, headers=gateway.authorization, timeout=60) as response:
            lines = (line for line in response.iter_lines() if line.startswith("data: {"))
            for _ in zip(range(frames), lines, strict=False):
                pass
    wait_for_quiet(gateway)
    assert gateway.counted() > before


@pytest.mark.usefixtures("books")
def test_many_at_once_complete_and_balance(gateway: GatewayProcess) -> None:
    async def crowd() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=gateway.url, headers=gateway.authorization, timeout=200) as client:

            async def visit(number: int) -> httpx.Response | None:
                body = {"model": MODELS[number % 8], "messages": ASK, "max_tokens": 40}
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.3 if number % 5 == 4 else 200):
                        return await client.post("/v1/chat/completions", json=body)
                return None

            return [response for response in await asyncio.gather(*map(visit, range(16))) if response is not None]

    responses = asyncio.run(crowd())
    assert {response.status_code for response in responses} == {200}
    for response in responses:
        check_events(response.json()["shannon_events"])
    wait_for_quiet(gateway)


def test_json_answers_stay_json(gateway: GatewayProcess) -> None:
    schema = {
        "type": "object",
        "properties": {"year": {"type": "integer"}, "open": {"type": "boolean"}},
        "required": ["year", "open"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "harbour", "schema": schema}}
    for model in ("shannon-quick-research", "shannon-complex"):
        body = gateway.chat(model=model, messages=ASK, response_format=wanted).json()
        assert json.loads(body["choices"][0]["message"]["content"]).keys() == {"year", "open"}


def test_live_view_shows_agents_answer_and_sources(gateway: GatewayProcess) -> None:
    script = CLIENTS / "live_research.py"
    output = run_client(gateway, sys.executable, str(script), QUESTION, COLUMNS="120")
    assert "Ryogoku" in output
    assert "synthesis" in output
    assert "harbour.md" in output
    assert re.search(r"\d+ sources, \d+ tokens", output)


def test_readme_shows_the_live_view() -> None:
    readme = (ROOT / "docs/agents.md").read_text()
    assert (CLIENTS / "live_research.py").read_text() in readme
