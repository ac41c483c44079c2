"""Takes the README's pictures: `python -m tests.browser.take_pictures`, or `make pictures`.

The gateway is the scripted one with the demo model, so that the pictures show agents, tokens and usage as they come.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from PIL import Image

from tests.support.browser import scripted_gateway
from tests.support.browser.script import QUESTION
from tests.support.browser.visit import Site, Visit, chromium, expect, open_page

FOLDER = Path(__file__).parent / "pictures"
_STREAMS = 6


def _keep(opened: Visit, name: str) -> None:
    opened.page.mouse.move(0, 0)
    opened.page.evaluate("document.fonts.ready")
    picture = Image.open(io.BytesIO(opened.page.screenshot(animations="disabled")))
    picture.convert("RGB").save(FOLDER / f"{name}.png", optimize=True)


def _scroll(opened: Visit, selector: str, top: int) -> None:
    opened.page.locator(selector).evaluate("(node, top) => (node.scrollTop = top)", top)


def _chat(opened: Visit) -> None:
    """Agents have read, and the answer with its sources is there."""
    opened.choose("shannon-deep-research")
    opened.ask(QUESTION)
    opened.answer()
    _scroll(opened, "#timeline-scroll", 330)
    _scroll(opened, "#scroll", 0)
    _keep(opened, "chat")


def _dark(opened: Visit) -> None:
    """What an agent has read stands open."""
    opened.choose("shannon-deep-research")
    opened.ask(QUESTION)
    opened.answer()
    opened.call("local_read").locator("summary").click()
    _scroll(opened, "#timeline-scroll", 700)
    _keep(opened, "dark")


def _inspector(opened: Visit) -> None:
    """A reply that the demo model could have given otherwise, made hot."""
    opened.view("Inspector")
    form = opened.page.get_by_label("What to generate")
    form.get_by_label("Message").fill("What is entropy?")
    form.get_by_label("Temperature").fill("1.8")
    form.get_by_role("button", name="Generate").click()
    show = opened.page.get_by_role("button", name="Show attention")
    expect(show).to_be_visible(timeout=120_000)
    tokens = opened.page.get_by_role("toolbar", name="Tokens of the reply").get_by_role("button")
    bits = tokens.evaluate_all("all => all.map((one) => parseFloat(one.ariaLabel.split(', ').at(-1)))")
    show.click()
    expect(opened.page.locator(".heat output")).not_to_be_empty(timeout=60_000)
    tokens.nth(bits.index(max(bits))).click()
    opened.page.locator(".heat canvas").hover(position={"x": 308, "y": 335})
    _keep(opened, "inspector")


def _admin(opened: Visit) -> None:
    """The engine is at work."""
    url, headers = f"{opened.site.url}/v1/chat/completions", opened.site.authorization
    body = {"model": "shannon-chat", "messages": [{"role": "user", "content": "Go on."}], "ignore_eos": True}
    opened.view("Admin")
    expect(opened.page.get_by_role("img", name="Tokens by key")).to_be_visible()
    with ThreadPoolExecutor(_STREAMS) as pool:
        for number in range(_STREAMS):
            pool.submit(httpx.post, url, json=body | {"max_tokens": 1200 + 200 * number}, headers=headers, timeout=300)
            opened.page.wait_for_event("response", lambda response: response.url.endswith("/metrics"))
        _keep(opened, "admin")


_PICTURES: tuple[tuple[Callable[[Visit], None], str, int], ...] = (
    (_chat, "light", 940),
    (_dark, "dark", 940),
    (_inspector, "light", 1120),
    (_admin, "light", 1000),
)


def take(site: Site) -> None:
    """Take all pictures of a site."""
    FOLDER.mkdir(exist_ok=True)
    with chromium() as browser:
        for picture, scheme, height in _PICTURES:
            opened = open_page(browser, site, color_scheme=scheme, viewport={"width": 1440, "height": height})
            opened.sign_in()
            picture(opened)
            opened.page.context.close()
            opened.check()


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        scripted_gateway.run(Path(folder), "--demo", "--days", "14") as running,
    ):
        take(running.site)
    for picture in sorted(FOLDER.glob("*.png")):
        print(f"{picture.relative_to(Path.cwd())}  {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
