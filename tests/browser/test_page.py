"""The page in a real browser, in front of the real gateway and the demo model."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from tests.support.browser.visit import Open, Site, Visit, expect
from tests.support.gateway_process import UNLIMITED, wait_until

pytestmark = pytest.mark.slow  # the first test starts an engine

WHO = "I am the Shannon demo model, a tiny Llama that ships with the gateway."
HAIKU = ["Requests fall like rain,", "one gate counts each passing drop.", "Tokens flow away."]


def _session(site: Site, session_id: str) -> httpx.Response:
    return httpx.get(f"{site.url}/v1/sessions/{session_id}", headers=site.authorization)


def _session_ids(page: Any) -> list[str]:
    stored = page.evaluate("Object.entries(localStorage).filter(([name]) => name.startsWith('shannon.sessions.'))")
    return [entry["id"] for _, value in stored for entry in json.loads(value)]


def _unfinished(site: Site) -> float:
    text = httpx.get(f"{site.url}/metrics", headers=site.authorization).text
    return float(re.findall(r'^shannon_engine_unfinished_requests\{engine="main"\} (\S+)', text, re.M)[0])


def _without_end(route: Any) -> None:
    """Send a completion on its way as one that goes on to its last token: the demo model's answers are short."""
    route.continue_(post_data=json.dumps(route.request.post_data_json | {"ignore_eos": True}))


def test_door_tells_how_the_gateway_is(visit: Open, demo: Site) -> None:
    page = visit(demo).page

    expect(page.get_by_role("status").filter(has_text="Ready · version")).to_be_visible()
    expect(page.get_by_label("API key")).to_be_focused()


def test_wrong_key_is_told_so(visit: Open, demo: Site) -> None:
    opened = visit(demo)
    opened.refusals.add(401)
    opened.page.get_by_label("API key").fill("sk-shannon-wrong")
    opened.page.keyboard.press("Enter")

    expect(opened.page.get_by_role("alert").filter(has_text="API key")).to_be_visible()
    expect(opened.page.locator("#chat")).to_be_hidden()


def test_key_is_kept_in_memory_only(page: Visit) -> None:
    page.ask("What are you?")
    page.answer()

    kept = page.page.evaluate(
        "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
    )
    secret = page.site.key.rsplit("-", 1)[-1]
    assert secret not in kept
    assert secret not in page.page.content()
    assert page.page.get_by_label("API key").input_value() == ""
    assert page.page.context.cookies() == []
    page.page.reload()
    expect(page.page.get_by_label("API key")).to_be_visible()


def test_signing_out_leaves_nothing_on_the_screen(page: Visit) -> None:
    page.ask("What are you?")
    page.answer()
    expect(page.page.locator("#announcer")).to_contain_text(WHO)
    page.page.get_by_role("button", name="Sign out").click()

    expect(page.page.get_by_label("API key")).to_be_focused()
    assert WHO not in page.page.content()


def test_chat_streams_an_answer(page: Visit) -> None:
    page.ask("What are you?")
    answer = page.answer()

    expect(answer.locator(".prose")).to_have_text(WHO)
    expect(answer.locator(".spent")).to_have_text(re.compile(r"^\d+( \(\d+ cached\))? in · \d+ out · first after "))


def test_line_breaks_are_kept(page: Visit) -> None:
    page.page.get_by_role("button", name="Write a haiku about a gateway.").click()
    answer = page.answer()

    assert answer.locator(".prose p").inner_text().split("\n") == HAIKU


def test_conversation_goes_on(page: Visit) -> None:
    page.ask("What are you?")
    page.answer(0)
    page.ask("Write a haiku.")
    page.answer(1)

    (session_id,) = _session_ids(page.page)
    stored = _session(page.site, session_id).json()["messages"]
    assert [message["role"] for message in stored] == ["user", "assistant", "user", "assistant"]
    assert stored[1]["content"] == WHO


def test_events_of_the_agent_are_seen(page: Visit) -> None:
    page.ask("What are you?")
    page.answer()

    expect(page.stops).to_contain_text(
        ["shannon-chat has started.", "Ryogoku is answering.", "Ryogoku has answered.", "shannon-chat has finished."]
    )
    expect(page.page.get_by_role("list", name="Agents")).to_contain_text("Ryogoku")
    page.stops.nth(2).locator("summary").click()
    expect(page.stops.nth(2)).to_contain_text(re.compile(r"\d+ in, \d+ out"))


def test_stop_ends_the_generation_in_the_engine(page: Visit) -> None:
    page.page.route("**/v1/chat/completions", _without_end)
    page.settings(Most_tokens="1900")
    page.ask("Tell me a story.")
    expect(page.page.locator(".answer .prose")).not_to_be_empty()
    page.page.get_by_role("button", name="Stop").click()
    answer = page.answer()

    expect(answer.get_by_role("status")).to_have_text("stopped")
    expect(page.message).to_be_focused()
    expect(page.page.get_by_role("button", name="Send")).to_be_visible()
    wait_until(lambda: _unfinished(page.site) == 0, "the engine still works on it")


def test_retry_asks_the_first_question_anew(page: Visit) -> None:
    page.ask("What are you?")
    page.answer().get_by_role("button", name="Retry").click()
    expect(page.page.locator(".answer")).to_have_count(1)
    expect(page.answer().locator(".prose")).to_have_text(WHO)

    (session_id,) = _session_ids(page.page)
    assert len(_session(page.site, session_id).json()["messages"]) == 2


def test_session_is_found_again_after_a_reload(page: Visit) -> None:
    page.ask("Write a haiku.")
    page.answer()
    page.page.reload()
    page.sign_in()
    page.page.get_by_label("Sessions").get_by_text("Write a haiku.").click()

    expect(page.page.locator(".answer .prose")).to_contain_text(HAIKU[0])
    page.ask("What are you?")
    expect(page.answer(1).locator(".prose")).to_have_text(WHO)


def test_session_can_be_forgotten(page: Visit) -> None:
    page.ask("What are you?")
    page.answer()
    (session_id,) = _session_ids(page.page)
    page.page.get_by_role("button", name="Forget What are you?").click()

    expect(page.page.get_by_text("Conversations of this key appear here.")).to_be_visible()
    assert _session(page.site, session_id).status_code == 404
    assert _session_ids(page.page) == []


def test_rate_limit_is_seen_coming_and_told(page: Visit) -> None:
    page.refusals.add(429)
    page.choose("shannon-twice")
    gauge = page.page.get_by_role("meter", name="requests left this minute")
    for left in ("1", "0"):
        page.ask("What are you?")
        page.answer(1 - int(left))
        expect(gauge).to_have_attribute("aria-valuenow", left)
    page.ask("What are you?")
    refused = page.answer(2)

    expect(refused.get_by_role("alert")).to_contain_text("requests per minute")
    expect(refused.get_by_role("button", name=re.compile(r"^Try again in \d+ s$"))).to_be_disabled()
    expect(gauge).to_have_attribute("aria-valuetext", "0 of 2 requests left")
    expect(gauge).to_contain_text(re.compile(r"0 / 2requests, full in \d+ s"))


def test_tokens_that_are_left_are_seen(page: Visit) -> None:
    gauge = page.page.get_by_role("meter", name="tokens left this minute")
    expect(gauge).to_be_hidden()  # nothing is known yet
    page.ask("What are you?")
    page.answer()

    most = UNLIMITED["tokens_per_minute"]
    expect(gauge).to_have_attribute("aria-valuemax", str(most))
    assert 0 < int(gauge.get_attribute("aria-valuenow")) < most
    page.choose("shannon-twice")
    expect(gauge).to_be_hidden()


def test_model_without_eyes_is_offered_no_pictures(page: Visit) -> None:
    expect(page.page.get_by_role("button", name="Attach pictures")).to_be_hidden()


def test_gateway_that_is_away_is_told(page: Visit) -> None:
    page.losses = True
    page.page.context.set_offline(True)
    page.ask("What are you?")
    answer = page.answer()

    expect(answer.get_by_role("alert")).to_contain_text("The gateway does not answer.")
    page.page.context.set_offline(False)
    answer.get_by_role("button", name="Try again").click()
    expect(page.page.locator(".answer .prose")).to_have_text(WHO)


def test_token_inspector_shows_what_the_model_weighed(page: Visit) -> None:
    page.ask("What are you?")
    page.answer().get_by_role("button", name="Inspect").click()
    expect(page.page.get_by_label("What to generate").get_by_label("Message")).to_have_value("What are you?")
    page.page.get_by_label("What to generate").get_by_label("Temperature").fill("0")
    page.page.get_by_role("button", name="Generate").click()
    tokens = page.page.get_by_role("toolbar", name="Tokens of the reply").get_by_role("button")
    attention = page.page.get_by_role("button", name="Show attention")
    expect(attention).to_be_visible(timeout=60_000)

    assert "".join(tokens.all_inner_texts()).startswith(WHO)
    expect(tokens.first).to_have_accessible_name(re.compile(r"^I, \d\.\d\d bits$"))
    tokens.nth(3).hover()
    likeliest = page.page.get_by_role("list", name="Likeliest tokens at this step").get_by_role("listitem")
    expect(likeliest).to_have_count(10)
    expect(likeliest.first).to_contain_text("%")
    tokens.nth(3).click()
    tokens.first.hover()
    expect(tokens.nth(3)).to_have_attribute("aria-pressed", "true")
    page.page.keyboard.press("ArrowRight")
    expect(tokens.nth(4)).to_be_focused()

    attention.click()
    heatmap = page.page.get_by_role("application", name=re.compile("^Attention. "))
    expect(heatmap).to_be_visible(timeout=60_000)
    heatmap.press("ArrowUp")
    heatmap.press("ArrowRight")
    expect(page.page.locator(".heat output")).to_have_text(
        re.compile(r"^\d+ “.*” (attends to|can't see) \d+ “.*”: .*$")
    )
    assert heatmap.evaluate(
        "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some((value) => value)"
    )
    before = heatmap.evaluate("canvas => canvas.toDataURL()")
    with page.page.expect_response("**/v1/inspect/attention"):
        page.page.get_by_label("Head", exact=True).select_option("1")
    expect(page.page.get_by_role("button", name="Show attention")).to_be_hidden()
    assert heatmap.evaluate("canvas => canvas.toDataURL()") != before


def test_tokens_are_tinted_the_deeper_the_less_sure_the_model_was(page: Visit) -> None:
    page.view("Inspector")
    form = page.page.get_by_label("What to generate")
    form.get_by_label("Message").fill("Xylophone quartz?")
    form.get_by_label("Temperature").fill("2")
    form.get_by_label("Tokens").fill("40")
    form.get_by_role("button", name="Generate").click()
    expect(page.page.get_by_role("button", name="Show attention")).to_be_visible(timeout=60_000)
    tokens = page.page.get_by_role("toolbar", name="Tokens of the reply").get_by_role("button")
    names = tokens.evaluate_all("all => all.map((one) => one.getAttribute('aria-label'))")
    tints = tokens.evaluate_all("all => all.map((one) => getComputedStyle(one).backgroundColor)")
    bits = [float(re.findall(r"([\d.]+) bits$", name)[0]) for name in names]
    depths = [float(re.findall(r"/ ([\d.]+)\)$", tint)[0]) for tint in tints]

    assert max(bits) > 1
    assert depths == pytest.approx([min(1, one / 4) * 0.62 for one in bits], abs=0.01)


def test_admin_sees_engines_and_usage(page: Visit) -> None:
    page.ask("What are you?")
    page.answer()
    page.view("Admin")
    engine = page.page.get_by_role("article").filter(has_text="main")

    for figure in ("Running", "Waiting", "KV cache in use", "Tokens per second"):
        expect(engine.get_by_text(figure)).to_be_visible()
    chart = page.page.get_by_role("img", name=re.compile("^Tokens by key and day: "))
    expect(chart).to_be_visible()
    page.page.get_by_label("by", exact=True).select_option("model")
    expect(page.page.get_by_role("img", name=re.compile("^Tokens by model and day: "))).to_be_visible()
    page.page.get_by_text("As a table", exact=True).click()
    expect(page.page.get_by_role("columnheader", name="shannon-chat")).to_be_visible()


def test_admin_makes_rotates_and_revokes_a_key(page: Visit) -> None:
    page.view("Admin")
    page.page.get_by_role("button", name="New key").click()
    page.page.get_by_label("Name").fill("browser test")
    page.page.get_by_role("button", name="Make the key").click()
    secret = page.page.get_by_role("dialog").locator("code")
    expect(secret).to_have_text(re.compile("^sk-shannon-"))
    first = secret.inner_text()
    page.page.get_by_role("button", name="Done").click()
    assert _models(page.site, first) == 200

    page.page.get_by_role("button", name="Rotate browser test").click()
    page.page.get_by_role("dialog").get_by_role("button", name="Rotate").click()
    expect(secret).not_to_have_text(first)
    second = secret.inner_text()
    page.page.get_by_role("button", name="Done").click()

    page.page.get_by_role("button", name="Revoke browser test").click()
    page.page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
    row = page.page.get_by_role("row").filter(has_text="browser test")
    expect(row).to_contain_text("revoked")
    expect(row.get_by_role("button")).to_have_count(0)
    assert second not in page.page.content()


def _models(site: Site, key: str) -> int:
    return httpx.get(f"{site.url}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code


def test_other_keys_are_told_that_they_may_not_administer(visit: Open, demo: Site) -> None:
    made = httpx.post(f"{demo.url}/admin/keys", headers=demo.authorization, json={"name": "plain"}).json()
    opened = visit(demo)
    opened.refusals.add(403)
    opened.sign_in(made["key"])
    opened.view("Admin")

    expect(opened.page.get_by_text("This needs an admin key.")).to_be_visible()
    expect(opened.page.get_by_role("heading", name="Keys")).to_be_hidden()


def test_key_that_is_revoked_meanwhile_leads_back_to_the_door(visit: Open, demo: Site) -> None:
    made = httpx.post(f"{demo.url}/admin/keys", headers=demo.authorization, json={"name": "short-lived"}).json()
    opened = visit(demo)
    opened.refusals.add(401)
    opened.sign_in(made["key"])
    httpx.delete(f"{demo.url}/admin/keys/{made['id']}", headers=demo.authorization).raise_for_status()
    wait_until(lambda: _models(demo, made["key"]) == 401, "the key still works")
    opened.ask("What are you?")

    expect(opened.page.get_by_role("alert")).to_contain_text("does not accept the key any more")
    expect(opened.page.get_by_label("API key")).to_be_focused()
