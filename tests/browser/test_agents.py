"""Agents on the page: lanes, tool calls that open, and sources as footnotes, as a research model sends them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.browser.script import QUESTION
from tests.support.browser.visit import Site, Visit, expect, open_page

pytestmark = pytest.mark.slow  # starts a gateway of its own


@pytest.fixture(scope="module")
def research(browser: Any, scripted: Site) -> Iterator[Visit]:
    """A chat in which a research model has answered."""
    opened = open_page(browser, scripted)
    opened.sign_in()
    opened.choose("shannon-standard-research")
    opened.ask(QUESTION)
    opened.answer()
    yield opened
    opened.page.context.close()
    opened.check()


def _path(ride: str) -> list[float]:
    """Return the x positions of a line's path."""
    return [float(x) for x in re.findall(r"[MC ]([\d.]+) [\d.-]+", ride)]


def test_every_agent_has_a_line_of_its_own(research: Visit) -> None:
    agents = research.page.get_by_role("list", name="Agents").get_by_role("listitem")
    names = agents.locator(".name").all_inner_texts()

    assert {"planner", "synthesis", "citation"} < set(names)
    assert len(names) > 5
    colours = agents.locator(".swatch").evaluate_all("all => all.map((one) => getComputedStyle(one).color)")
    assert len(set(colours)) == len(names)
    expect(research.page.locator("#timeline-summary")).to_have_text(re.compile(rf"^{len(names)} agents · \d+ calls$"))


def test_agents_at_work_at_once_ride_side_by_side(research: Visit) -> None:
    lines = research.page.locator("#timeline-map path").evaluate_all("all => all.map((one) => one.getAttribute('d'))")
    main, *rides = map(_path, lines)

    assert set(main) == {18}
    assert all(ride[0] == 18 for ride in rides)  # each leaves the orchestrator's line
    assert len({max(ride) for ride in rides}) >= 3


def test_researcher_is_told_apart_and_its_calls_stand_on_its_line(research: Visit) -> None:
    call = research.call("local_search")
    name = call.locator(".who").inner_text()
    start = research.stops.filter(has_text=f"{name} has started.")
    squares = research.page.locator("#timeline-map rect")

    assert squares.count() == research.stops.locator("code").count()
    expect(start).to_be_visible()
    row, square = call.bounding_box(), squares.first.bounding_box()
    assert abs(square["y"] + square["height"] / 2 - row["y"] - 14) < 8


def test_tool_call_opens_and_tells_what_came_back(research: Visit) -> None:
    call = research.call("local_search")
    details = call.locator("dl")
    expect(details).to_be_hidden()
    call.locator("summary").click()

    expect(details.locator("dt")).to_have_text(["query", "sources", "result"])
    expect(details).to_contain_text("local:")
    expect(call).to_contain_text(re.compile(r"took \d+ ms|took [\d.]+ s"))
    call.locator("summary").press("Enter")
    expect(details).to_be_hidden()


def test_open_call_stays_open_while_more_happens(stage: Visit) -> None:
    stage.choose("shannon-deep-research")
    stage.ask(QUESTION)
    call = stage.call("local_search")
    call.locator("summary").click()
    stage.answer()

    expect(call.locator("dl")).to_contain_text("result")


def test_sources_are_footnotes_of_the_answer(research: Visit) -> None:
    answer = research.answer()
    notes = answer.locator(".footnotes li")
    numbers = notes.evaluate_all("all => all.map((one) => one.dataset.number)")
    markers = answer.locator(".prose sup a")

    assert numbers
    assert set(markers.all_inner_texts()) == set(numbers)
    expect(answer.locator(".prose")).not_to_contain_text(re.compile(r"\[\d+\]|Sources"))
    first = markers.first
    expect(first).to_have_accessible_name(re.compile(rf"^Source {first.inner_text()}: \w"))
    first.press("Enter")
    expect(answer.locator(f'.footnotes [data-number="{first.inner_text()}"]')).to_be_focused()


def test_timeline_of_an_earlier_answer_comes_back(research: Visit) -> None:
    before = research.stops.count()
    research.choose("shannon-chat")
    research.ask("And then?")
    research.answer(1)
    expect(research.stops).to_have_count(4)
    research.answer(0).get_by_role("button", name="Timeline").click()

    expect(research.stops).to_have_count(before)
    expect(research.page.get_by_role("region", name="Events")).to_be_focused()


def test_stopped_research_leaves_no_agent_running(stage: Visit) -> None:
    stage.choose("shannon-deep-research")
    stage.ask(QUESTION)
    expect(stage.call("local_search")).to_be_visible()
    stage.page.get_by_role("button", name="Stop").click()
    answer = stage.answer()

    expect(answer.get_by_role("status")).to_have_text("stopped")
    expect(stage.page.locator(".map .running")).to_have_count(0)
