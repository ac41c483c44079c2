"""The page under failures and at large sizes: slow networks, cut streams, restarts, long answers, many sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.browser import scripted_gateway
from tests.support.browser.script import LONG_TOKENS, PARAGRAPH
from tests.support.browser.scripted_gateway import FAST
from tests.support.browser.visit import PHONE, Open, Site, Visit, expect

pytestmark = pytest.mark.slow  # starts gateways of its own

SESSIONS = 500
# Counts what is parsed as markdown from here on, by the page's own copy of the parser.
_COUNT_PARSING = """
async () => {
  const base = document.querySelector('script[type="module"]').src.replace("main.js", "");
  const { default: MarkdownIt } = await import(`${base}vendor/markdown-it/markdown-it.js`);
  const parse = MarkdownIt.prototype.parse;
  window.parsed = [];
  MarkdownIt.prototype.parse = function (text, env) {
    window.parsed.push(text.length);
    return parse.call(this, text, env);
  };
}
"""


def _slow_down(opened: Visit, **conditions: int) -> None:
    session = opened.page.context.new_cdp_session(opened.page)
    limits = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1} | conditions
    session.send("Network.emulateNetworkConditions", limits)


def test_key_that_is_typed_before_the_scripts_are_there_goes_nowhere(visit: Open, scripted: Site) -> None:
    opened = visit(scripted)
    held: list[Any] = []
    opened.page.route("**/main.js", lambda route: held.append(route))
    opened.page.goto(f"{scripted.url}/?again", wait_until="commit")
    opened.page.get_by_label("API key").fill(scripted.key)
    opened.page.keyboard.press("Enter")
    expect(opened.page.get_by_role("button", name="Sign in")).to_be_disabled()
    assert urlsplit(opened.page.url).query == "again"

    held[0].continue_()
    opened.page.get_by_role("button", name="Sign in").click()
    expect(opened.message).to_be_focused()


def test_slow_network_is_waited_for(visit: Open, scripted: Site) -> None:
    opened = visit(scripted)
    _slow_down(opened, latency=400, downloadThroughput=20_000, uploadThroughput=20_000)
    opened.page.get_by_label("API key").fill(scripted.key)
    opened.page.keyboard.press("Enter")
    expect(opened.page.get_by_role("button", name="Signing in …")).to_be_disabled()
    expect(opened.message).to_be_focused()

    opened.ask("Hello.")
    expect(opened.page.locator(".answer").get_by_role("status")).to_have_text("waiting for the gateway")
    expect(opened.answer().locator(".prose")).to_have_text("You said: Hello.")


def test_gateway_that_dies_in_mid_stream_is_told_and_asked_again(visit: Open, tmp_path: Path) -> None:
    with scripted_gateway.run(tmp_path) as running:
        opened = visit(running.site)
        opened.losses = True
        opened.sign_in()
        opened.ask("Take your time.")
        prose = opened.page.locator(".answer .prose")
        expect(prose).to_contain_text("1 2 3")
        running.kill()
        answer = opened.answer()
    expect(answer.get_by_role("alert")).to_contain_text("The answer broke off: the connection was lost.")
    expect(prose).to_contain_text("1 2 3")
    answer.get_by_role("button", name="Try again").click()
    expect(opened.answer().get_by_role("alert")).to_contain_text("The gateway does not answer.")

    with scripted_gateway.run(tmp_path, "--port", str(urlsplit(running.site.url).port)):
        opened.answer().get_by_role("button", name="Try again").click()
        expect(prose).to_contain_text("1 2 3")
        expect(opened.page.get_by_role("alert")).to_be_hidden()
        opened.page.get_by_role("button", name="Stop").click()
        opened.answer()


def test_long_answer_is_rendered_block_by_block(stage: Visit) -> None:
    stage.page.evaluate(_COUNT_PARSING)
    stage.choose(FAST)
    stage.ask("Go on and on.")
    answer = stage.answer()
    parsed: list[int] = stage.page.evaluate("window.parsed")
    length = answer.locator(".prose").evaluate("(node) => node.textContent.length")

    expect(answer.locator(".spent")).to_contain_text(f"{LONG_TOKENS:,} out")
    expect(answer.locator(".prose p").last).to_be_in_viewport()
    # Rendering from the start each time would parse half the text per rendering; this parses each part a few times,
    # and the block that is still growing once or twice more each time.
    assert length > LONG_TOKENS * 4
    assert sum(parsed) < 4 * length + 3 * len(PARAGRAPH) * len(parsed)


def test_long_answer_can_be_stopped_while_it_pours_in(stage: Visit) -> None:
    stage.choose(FAST)
    _slow_down(stage, downloadThroughput=200_000)
    stage.ask("Go on and on.")
    expect(stage.page.locator(".answer .prose p").nth(2)).to_be_visible()
    stage.page.get_by_role("button", name="Stop").click()

    expect(stage.answer().get_by_role("status")).to_have_text("stopped")


def test_reader_who_scrolls_back_is_left_there(stage: Visit) -> None:
    scroll = stage.page.get_by_role("region", name="Messages")
    stage.choose(FAST)
    stage.ask("Go on and on.")
    stage.answer()
    stage.choose("shannon-chat")
    stage.ask("Take your time.")
    prose = stage.page.locator(".answer").last.locator(".prose")
    expect(prose).to_contain_text("1 2 3")
    expect(prose).to_be_in_viewport()
    scroll.hover()
    stage.page.mouse.wheel(0, -500)
    expect(prose).to_contain_text("98 99 100")

    assert scroll.evaluate("(node) => node.scrollHeight - node.scrollTop - node.clientHeight") > 400
    stage.page.get_by_role("button", name="Stop").click()
    stage.answer()


@pytest.fixture
def stored(scripted: Site) -> list[str]:
    """Ids of many sessions that the gateway keeps."""
    ids = [f"web-{number:016x}" for number in range(SESSIONS)]
    with httpx.Client(base_url=scripted.url, headers=scripted.authorization) as client:
        for number, id_ in enumerate(ids):
            body = {"model": FAST, "messages": [{"role": "user", "content": f"Question {number}"}]}
            client.post("/v1/chat/completions", json=body, headers={"X-Session-ID": id_}).raise_for_status()
    return ids


def test_many_sessions_are_listed_and_titled_when_they_are_seen(visit: Open, scripted: Site, stored: list[str]) -> None:
    opened = visit(scripted)
    place = f"shannon.sessions.{scripted.key.split('-')[2]}"
    kept = [{"id": id_, "at": 1_700_000_000_000} for id_ in stored]
    opened.page.evaluate("([place, kept]) => localStorage.setItem(place, JSON.stringify(kept))", [place, kept])
    asked: list[str] = []
    opened.page.on("request", lambda request: asked.append(request.url) if "/v1/sessions/" in request.url else None)
    opened.sign_in()
    entries = opened.page.locator("#session-list .open")

    expect(entries).to_have_count(SESSIONS)
    expect(entries.nth(5)).to_contain_text("Question 5")
    entries.last.scroll_into_view_if_needed()
    expect(entries.last).to_contain_text(f"Question {SESSIONS - 1}")
    assert len(asked) < SESSIONS / 4
    entries.last.click()
    expect(opened.page.locator(".answer .prose")).to_have_text(f"You said: Question {SESSIONS - 1}")
    opened.choose(FAST)
    opened.ask("One more.")
    opened.answer(1)
    expect(entries.first).to_contain_text(f"Question {SESSIONS - 1}")
    opened.page.get_by_role("button", name=f"Forget Question {SESSIONS - 1}").click()
    expect(entries).to_have_count(SESSIONS - 1)
    expect(opened.page.get_by_role("button", name="Forget Question 0")).to_be_focused()


@pytest.mark.parametrize("options", [{}, PHONE], ids=["desk", "telephone"])
def test_long_names_and_words_stay_in_their_places(visit: Open, scripted: Site, options: dict[str, Any]) -> None:
    opened = visit(scripted, **options)
    opened.sign_in()
    opened.choose(FAST)
    opened.ask("Donaudampfschifffahrtsgesellschaftskapitän" * 12)

    expect(opened.answer().locator(".name")).to_have_text(FAST)
    assert opened.overflows() == []
    gauges = opened.page.locator("#gauges").bounding_box()
    talk = opened.page.locator(".talk").bounding_box()
    assert gauges["x"] + gauges["width"] <= talk["x"] + talk["width"]


def test_server_that_answers_nonsense_is_told(stage: Visit) -> None:
    stage.refusals.add(502)
    page = "<html>Bad gateway</html>"
    stage.page.route("**/v1/chat/completions", lambda route: route.fulfill(status=502, body=page))
    stage.ask("Hello.")

    expect(stage.answer().get_by_role("alert")).to_contain_text("The gateway answered with status 502.")
