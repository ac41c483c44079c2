"""Answers as markdown: rendered well, and never more than text, whatever a model writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.browser.scripted_gateway import FAST
from tests.support.browser.visit import Site, Visit, expect, open_page

pytestmark = pytest.mark.slow  # starts a gateway of its own

# What an answer may consist of; svg and button are those of listings.
_ALLOWED = {
    *("p", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "hr", "br", "div", "span", "a", "sup"),
    *("table", "thead", "tbody", "tr", "th", "td", "em", "strong", "s", "code", "pre"),
    *("header", "button", "svg", "path"),
}
_WATCH = """
window.seen = [];
new MutationObserver((records) => {
  for (const { addedNodes, target } of records) {
    if (!target.closest?.(".prose")) continue;
    for (const node of addedNodes) {
      if (node.nodeType === Node.ELEMENT_NODE) window.seen.push(...[node, ...node.querySelectorAll("*")]);
    }
  }
}).observe(document, { childList: true, subtree: true });
"""
_SEEN = """
() => window.seen.map((node) => ({
  tag: node.localName,
  attributes: Object.fromEntries([...node.attributes].map(({ name, value }) => [name, value])),
}))
"""


@pytest.fixture(scope="module")
def attacked(browser: Any, scripted: Site) -> Iterator[Visit]:
    """A chat with an answer that attacks the page; all elements that it ever had in it are noted."""
    opened = open_page(browser, scripted)
    opened.page.evaluate(_WATCH)
    opened.sign_in()
    opened.choose("shannon-chat")
    opened.ask("Attack the page.")
    opened.answer()
    yield opened
    opened.page.context.close()
    opened.check()


def _seen(opened: Visit) -> list[dict[str, Any]]:
    return opened.page.evaluate(_SEEN)  # type: ignore[no-any-return]


def test_hostile_answer_becomes_text_and_known_elements(attacked: Visit) -> None:
    seen = _seen(attacked)

    assert {node["tag"] for node in seen} <= _ALLOWED
    assert not [name for node in seen for name in node["attributes"] if name.startswith("on") or name == "style"]
    assert attacked.page.evaluate("window.taken") is None
    for text in ('<script>window.taken = "script"</script>', "<img src=", "<iframe srcdoc=", "[script](javascript:"):
        expect(attacked.page.locator(".answer .prose")).to_contain_text(text)


def test_hostile_links_lead_to_the_web_or_nowhere(attacked: Visit) -> None:
    links = [node["attributes"] for node in _seen(attacked) if node["tag"] == "a"]

    assert {link["href"].partition(":")[0] for link in links} == {"https"}
    assert {link["target"] for link in links} == {"_blank"}
    assert all({"noopener", "noreferrer"} <= set(link["rel"].split()) for link in links)


def test_pictures_of_an_answer_are_links_so_that_no_host_hears_of_it(attacked: Visit) -> None:
    expect(attacked.page.locator(".answer").get_by_role("link", name="image: pixel")).to_be_visible()
    expect(attacked.page.locator(".answer img")).to_have_count(0)


def test_hostile_question_is_text(stage: Visit) -> None:
    text = '<img src=x onerror="window.taken = 1"><script>window.taken = 1</script>'
    stage.choose(FAST)
    stage.ask(text)
    stage.answer()

    expect(stage.page.locator(".question")).to_contain_text(text)
    expect(stage.page.locator(".answer .prose")).to_contain_text(text)
    assert stage.page.evaluate("window.taken") is None
    expect(stage.page.get_by_label("Sessions").get_by_text(text)).to_be_visible()


def test_markdown_is_rendered(stage: Visit) -> None:
    stage.choose("shannon-chat")
    stage.ask("Show me markdown.")
    prose = stage.answer().locator(".prose")

    expect(prose).to_match_aria_snapshot("""
      - heading "A heading" [level=3]
      - paragraph:
        - text: Text that is
        - strong: strong
        - text: ","
        - emphasis: stressed
        - text: ", struck and"
        - code: code
        - text: ", with a"
        - link "link":
          - /url: https://shannon.example/a
        - text: and
        - link "https://shannon.example/b"
        - text: in it.
      - list:
        - listitem:
          - text: One
          - list:
            - listitem:
              - text: deep
              - list:
                - listitem: deeper
        - listitem: Two
      - blockquote:
        - paragraph: Said by somebody
        - blockquote:
          - paragraph: who quotes.
      - text: python
      - button "Copy the code"
      - region "Code in python":
        - code: /def entropy/
      - region "Table":
        - table:
          - rowgroup:
            - row "Left Right"
          - rowgroup:
            - row "a 1"
    """)
    expect(prose.locator("td").last).to_have_css("text-align", "right")
