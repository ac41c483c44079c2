"""The page for everybody: without a mouse, with a screen reader, on a telephone, light or dark, without motion."""

from __future__ import annotations

import re

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]

from tests.support.browser.script import QUESTION
from tests.support.browser.visit import PHONE, Open, Site, Visit, expect

pytestmark = pytest.mark.slow  # starts a gateway of its own

SCHEMES = ("light", "dark")
_RING = """
() => {
  const shows = ({ outlineStyle, boxShadow }) => outlineStyle !== "none" || boxShadow !== "none";
  const node = document.activeElement;
  return [node, node.closest(".box")].some((one) => one && shows(getComputedStyle(one)));
}
"""
_NAME = """
() => {
  const node = document.activeElement;
  return node.ariaLabel ?? (node.labels?.[0] ?? node).textContent.trim();
}
"""


def _serious(opened: Visit) -> list[str]:
    """Return what axe finds that is serious or worse, in the view that is shown, light and dark."""
    found = []
    for scheme in SCHEMES:
        opened.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        for violation in Axe().run(opened.page).response["violations"]:
            if violation["impact"] in ("serious", "critical"):
                nodes = [node["html"][:160] for node in violation["nodes"][:4]]
                found.append(f"{scheme}: {violation['id']}: {nodes}")
    return found


def test_door_has_no_serious_violation(visit: Open, scripted: Site) -> None:
    opened = visit(scripted)
    opened.refusals.add(401)
    expect(opened.page.get_by_role("status").filter(has_text="Ready")).to_be_visible()
    opened.page.get_by_label("API key").fill("wrong")
    opened.page.keyboard.press("Enter")
    expect(opened.page.get_by_role("alert")).to_be_visible()

    assert _serious(opened) == []


def test_empty_chat_has_no_serious_violation(stage: Visit) -> None:
    stage.page.get_by_role("button", name="Settings").click()
    stage.page.get_by_text("Open by id").click()

    assert _serious(stage) == []


def test_chat_with_an_answer_events_and_sources_has_no_serious_violation(stage: Visit) -> None:
    stage.choose("shannon-quick-research")
    stage.ask(QUESTION)
    expect(stage.answer().locator(".footnotes")).to_be_visible()
    stage.call("local_search").locator("summary").click()

    assert _serious(stage) == []


def test_answers_of_every_kind_have_no_serious_violation(stage: Visit) -> None:
    stage.ask("Show me markdown.")
    stage.answer()
    stage.page.context.set_offline(True)
    stage.losses = True
    stage.ask("Are you there?")
    expect(stage.answer(1).get_by_role("alert")).to_be_visible()
    stage.page.context.set_offline(False)

    assert _serious(stage) == []


def test_inspector_has_no_serious_violation(page: Visit) -> None:
    page.view("Inspector")
    page.page.get_by_label("Tokens", exact=True).fill("12")
    page.page.get_by_role("button", name="Generate").click()
    show = page.page.get_by_role("button", name="Show attention")
    expect(show).to_be_visible(timeout=60_000)
    show.click()
    expect(page.page.locator(".heat output")).not_to_be_empty(timeout=60_000)

    assert _serious(page) == []


def test_admin_has_no_serious_violation(stage: Visit) -> None:
    stage.view("Admin")
    stage.page.get_by_text("As a table", exact=True).click()
    expect(stage.page.get_by_role("article").first).to_be_visible()
    assert _serious(stage) == []

    stage.page.get_by_role("button", name="New key").click()
    assert _serious(stage) == []


def test_telephone_has_no_serious_violation(visit: Open, scripted: Site) -> None:
    opened = visit(scripted, **PHONE)
    opened.sign_in()
    opened.ask("Show me markdown.")
    opened.answer()
    opened.page.get_by_role("button", name="Sessions").click()
    assert _serious(opened) == []

    opened.page.get_by_role("button", name="Close sessions").click()
    opened.talk.get_by_role("button", name="Timeline").first.click()
    assert _serious(opened) == []


def test_screen_reader_finds_the_chat_in_order(stage: Visit) -> None:
    stage.ask("Hello there.")
    stage.answer()

    expect(stage.page.locator("body")).to_match_aria_snapshot("""
      - link "Skip to the content"
      - banner:
        - navigation "Views":
          - list:
            - listitem:
              - link "Chat"
            - listitem:
              - link "Inspector"
            - listitem:
              - link "Admin"
        - 'button "Theme: auto. Switch to light"'
        - button "Sign out"
      - main:
        - heading "Chat" [level=1]
        - region "Sessions":
          - heading "Sessions" [level=2]
          - button "New"
          - list:
            - listitem:
              - button "Hello there. just now"
              - button "Forget Hello there."
        - region "Conversation":
          - combobox "Model"
          - meter "requests left this minute"
          - meter "tokens left this minute"
          - region "Messages":
            - heading "You said" [level=2]
            - text: Hello there.
            - article:
              - heading "shannon-chat" [level=2]
              - paragraph: "You said: Hello there."
              - button "Copy"
              - button "Retry"
              - button "Inspect"
              - button "Timeline"
          - textbox "Message"
          - button "Attach pictures"
          - button "Settings"
          - button "Send"
        - region "Timeline":
          - heading "Timeline" [level=2]
          - list "Agents":
            - listitem: /Ryogoku/
          - region "Events":
            - list:
              - listitem: /shannon-chat has started\\./
              - listitem: /Ryogoku is answering\\./
              - listitem:
                - group: /Ryogoku has answered\\./
              - listitem: /shannon-chat has finished\\./
    """)


def test_screen_reader_hears_sentences_and_not_tokens(stage: Visit) -> None:
    stage.page.evaluate(
        """() => {
          window.heard = [];
          const region = document.getElementById("announcer");
          new MutationObserver(() => window.heard.push(region.textContent)).observe(region, { childList: true });
        }"""
    )
    stage.ask("Show me markdown.")
    stage.answer()
    expect(stage.page.locator("#announcer")).to_contain_text("The answer is complete.")
    heard = stage.page.evaluate("window.heard")

    assert "A heading" in " ".join(heard)
    assert len(heard) < 10


def _tab_to(opened: Visit, name: str, key: str = "Tab") -> None:
    """Move the focus until it is on a control of that name; wherever it is, it can be seen."""
    for _ in range(80):
        opened.page.keyboard.press(key)
        now = opened.page.evaluate(_NAME)
        assert opened.page.evaluate(_RING), now
        if now == name:
            return
    raise AssertionError(f"{name} can't be reached")


def test_everything_can_be_done_with_the_keyboard(visit: Open, scripted: Site) -> None:
    opened = visit(scripted)
    opened.refusals.add(404)  # there is no inspector
    keyboard = opened.page.keyboard
    keyboard.type(scripted.key)
    keyboard.press("Enter")
    expect(opened.message).to_be_focused()

    _tab_to(opened, "Model", "Shift+Tab")
    keyboard.type("shannon-quick")
    _tab_to(opened, "Message")
    keyboard.type(QUESTION)
    keyboard.press("Shift+Enter")
    keyboard.type("In short.")
    keyboard.press("Enter")
    answer = opened.answer()
    expect(answer.locator(".name")).to_have_text("shannon-quick-research")
    expect(opened.page.locator(".question")).to_contain_text("\nIn short.")

    opened.call("local_search").locator("summary").focus()
    keyboard.press("Enter")
    expect(opened.call("local_search").locator("dl")).to_be_visible()
    _tab_to(opened, "Retry", "Shift+Tab")
    keyboard.press("Enter")
    opened.answer()

    _tab_to(opened, "Inspector", "Shift+Tab")
    keyboard.press("Enter")
    expect(opened.page.get_by_role("heading", name="Inspector")).to_be_focused()
    _tab_to(opened, "Admin", "Shift+Tab")
    keyboard.press("Enter")
    expect(opened.page.get_by_role("img", name="Tokens by key and day")).to_be_visible()
    _tab_to(opened, "New key")
    keyboard.press("Enter")
    expect(opened.page.get_by_role("dialog").get_by_label("Name", exact=True)).to_be_focused()
    keyboard.press("Escape")
    expect(opened.page.get_by_role("button", name="New key")).to_be_focused()
    _tab_to(opened, "Sign out", "Shift+Tab")
    keyboard.press("Enter")
    expect(opened.page.get_by_label("API key")).to_be_focused()


def test_skip_link_leads_past_the_bar(stage: Visit) -> None:
    stage.page.get_by_role("link", name="Skip to the content").focus()
    stage.page.keyboard.press("Enter")

    expect(stage.page.get_by_role("main")).to_be_focused()


def _paper(opened: Visit) -> str:
    return str(opened.page.evaluate("getComputedStyle(document.body).backgroundColor"))


def test_theme_follows_the_system_until_one_is_chosen(visit: Open, scripted: Site) -> None:
    opened = visit(scripted, color_scheme="light")
    light = _paper(opened)
    opened.page.emulate_media(color_scheme="dark")
    dark = _paper(opened)
    assert light != dark

    switch = opened.page.get_by_role("button", name=re.compile("^Theme: "))
    switch.click()
    assert _paper(opened) == light
    opened.page.reload()
    assert _paper(opened) == light
    switch.click()
    opened.page.emulate_media(color_scheme="light")
    assert _paper(opened) == dark
    switch.click()
    expect(switch).to_have_accessible_name("Theme: auto. Switch to light")
    assert _paper(opened) == light


@pytest.mark.parametrize(("wish", "moves"), [("no-preference", True), ("reduce", False)])
def test_motion_is_left_out_where_it_is_not_wanted(visit: Open, scripted: Site, wish: str, moves: bool) -> None:
    opened = visit(scripted, reduced_motion=wish)
    opened.sign_in()
    opened.ask("Take your time.")
    expect(opened.page.locator(".answer .prose")).not_to_be_empty()

    assert (opened.page.evaluate("document.getAnimations().length") > 0) is moves
    opened.page.get_by_role("button", name="Stop").click()
    opened.answer()


def test_telephone_goes_to_the_reply_of_the_inspector(visit: Open, demo: Site) -> None:
    opened = visit(demo, **PHONE)
    opened.sign_in()
    opened.view("Inspector")
    opened.page.get_by_role("button", name="Generate").click()
    expect(
        opened.page.get_by_role("toolbar", name="Tokens of the reply").get_by_role("button").first
    ).to_be_in_viewport()
    expect(opened.page.get_by_role("button", name="Show attention")).to_be_visible(timeout=60_000)

    assert opened.overflows() == []


def test_telephone_shows_one_thing_at_a_time(visit: Open, scripted: Site) -> None:
    opened = visit(scripted, **PHONE)
    assert opened.overflows() == []
    opened.sign_in()
    opened.choose("shannon-quick-research")
    opened.ask(QUESTION)
    answer = opened.answer()
    expect(opened.stops.first).to_be_hidden()
    assert opened.overflows() == []

    answer.get_by_role("button", name="Timeline").click()
    expect(opened.stops.first).to_be_visible()
    opened.page.get_by_role("button", name="Close timeline").click()
    opened.page.get_by_role("button", name="Sessions").click()
    expect(opened.page.get_by_role("button", name="Forget")).to_be_visible()
    opened.page.get_by_role("button", name="Close sessions").click()
    for view in ("Inspector", "Admin"):
        opened.refusals.add(404)
        opened.view(view)
        expect(opened.page.get_by_role("heading", name=view)).to_be_visible()
        assert opened.overflows() == []
    opened.page.get_by_text("As a table", exact=True).click()
    assert opened.overflows() == []
