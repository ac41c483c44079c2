"""Research with nothing played in this process: the model is a server's, the search a SearXNG's, the pages a website's.

Both servers are on loopback, and scripted; the remote engine, the adapters, robots, reading processes and citations
are the product's own.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, cast

import pytest

from engine.base import GenerationRequest
from engine.remote.engine import RemoteEngine
from tests.support.app import Start
from tests.support.event_grammar import check_events
from tests.support.frames import chunks
from tests.support.scripted_model import ScriptedModel
from tests.support.upstream_server import Connection, UpstreamServer, chunk, error, run_upstream, summary
from tests.support.waiting import until
from tests.support.website import Website, page, run_website

pytestmark = pytest.mark.anyio

PROMPT_TOKENS = 7


class Upstream(ScriptedModel):
    """A capable model at an OpenAI-compatible server, which counts what it says.

    Where it does not take schemas it refuses them as DeepSeek does, and reads what it is asked in words.
    """

    def __init__(self, *, takes_schemas: bool = True, **scripts: Any) -> None:
        super().__init__(**scripts)
        self.completion_tokens = 0
        self.refused = 0
        self._takes_schemas = takes_schemas

    async def answer(self, connection: Connection) -> None:
        body = connection.request.body
        form = body.get("response_format")
        if form and not self._takes_schemas:
            self.refused += 1
            words = "This response_format type is unavailable now"
            await connection.reply(400, error(words, type="invalid_request_error", code="invalid_request_error"))
            return
        schema = form["json_schema"]["schema"] if form else _schema_in_words(body)
        constraint = {"json": schema} if schema else None
        said = self(GenerationRequest(request_id="", messages=body["messages"], structured_outputs=constraint))
        self.completion_tokens += len(said)
        frames = [chunk(delta.text) for delta in said]
        await connection.stream(*frames, chunk("", "stop"), summary(PROMPT_TOKENS, len(said)))


def _schema_in_words(body: dict[str, Any]) -> Any:
    _, asked, schema = body["messages"][-1]["content"].partition("must be valid against this schema:\n")
    return json.loads(schema) if asked else None


def judgements() -> Any:
    """Return a reviewer that finds one gap, and then none."""
    gap = {"question": "What is missing?", "queries": ["query 6"]}
    verdicts: list[Mapping[str, Any]] = [{"covered": 90, "gaps": []}, {"covered": 40, "gaps": [gap]}]
    return lambda request: verdicts.pop()


@pytest.fixture
async def site() -> AsyncIterator[Website]:
    """A SearXNG, and the pages that it finds: 2 is gone, 3 is not for robots, all else can be read."""
    async with run_website() as site:
        root = f"http://127.0.0.1:{site.port}"
        for number in range(1, 7):
            urls = [f"{root}/{'private/' if number == 3 else ''}{number}", f"{root}/common"]
            found = {"results": [{"url": url, "title": "A page", "content": "A snippet."} for url in urls]}
            site.pages[f"/search?q=query+{number}&format=json"] = page(json.dumps(found).encode())
            site.pages[f"/{number}"] = html(f"Page {number}")
        site.pages |= {"/2": page(status="404 Not Found"), "/common": html("Common")}
        site.pages["/robots.txt"] = page(b"User-agent: *\nDisallow: /private/")
        yield site


def html(title: str) -> bytes:
    article = f"<article><h1>{title}</h1><p>What {title} says of it, at some length.</p></article>"
    return page(f"<!doctype html><title>{title}</title>{article}".encode(), headers={"Content-Type": "text/html"})


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("takes_schemas", [True, False], ids=["schemas", "words"])
async def test_academic_research_goes_its_whole_way(
    start: Start, site: Website, stream: bool, takes_schemas: bool
) -> None:
    model = Upstream(takes_schemas=takes_schemas, coverage=judgements())
    async with run_upstream(model.answer, max_model_len=16_384, prompt_tokens=PROMPT_TOKENS) as server:
        gateway = await start(
            mock=lambda: cast(Any, RemoteEngine([server.url], "demo")),
            config={
                "models": {"shannon-chat": {"description": "The one under test", "workflow": "academic_research"}},
                "tools": {"web_search": {"provider": "searxng", "url": f"http://127.0.0.1:{site.port}"}},
                "fetch": {"ports": [], "allowed_networks": ["127.0.0.0/8"]},
            },
        )
        response = await gateway.chat(stream=stream)
        assert response.status_code == 200, response.text
        text, events, usage = read(response.content, stream=stream)
        (row,) = (await gateway.client.get("/v1/usage")).json()["data"]

    check_events(events)
    await until(lambda: site.connections == 0)
    assert {path for path in site.paths if "search" not in path} == {
        *("/robots.txt", "/1", "/2", "/4", "/5", "/6", "/common")
    }
    assert any("query+6" in path for path in site.paths), "the gap was filled"
    _check_sources(text, events, site)
    _check_usage(usage, row, model, server)
    assert model.refused == (0 if takes_schemas else 1), "what was learnt is kept"


def read(content: bytes, *, stream: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """Return what was said, the events, and the usage."""
    if not stream:
        body = json.loads(content)
        return body["choices"][0]["message"]["content"], body["shannon_events"], body["usage"]
    frames = chunks(content)
    text = "".join(frame["choices"][0]["delta"].get("content") or "" for frame in frames)
    return text, [event for frame in frames for event in frame.get("shannon_events", [])], frames[-1]["usage"]


def _check_sources(text: str, events: list[dict[str, Any]], site: Website) -> None:
    sources = events[-1]["payload"]["sources"]
    assert [source["number"] for source in sources] == [1, 2], "the model names 1, 2 and 99"
    assert "[99]" not in text
    for source in sources:
        path = source["url"].removeprefix(f"http://127.0.0.1:{site.port}")
        assert path in site.paths
        assert source["title"] == ("Common" if path == "/common" else f"Page {path[1:]}"), "as the page itself has it"
        assert f"[{source['number']}] {source['title']}" in text
    assert "## Limitations" in text
    failed = [e["message"] for e in events if e["type"] == "TOOL_OBSERVATION" and not e["payload"]["success"]]
    assert len(failed) == 2, failed
    assert any(event["type"] == "DATA_PROCESSING" and event["payload"].get("claims") for event in events)


def _check_usage(usage: dict[str, Any], row: dict[str, Any], model: Upstream, server: UpstreamServer) -> None:
    spent = PROMPT_TOKENS * (len(server.generations) - model.refused), model.completion_tokens
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == spent
    assert (row["prompt_tokens"], row["completion_tokens"]) == spent
    assert (row["requests"], row["errors"]) == (1, {})
