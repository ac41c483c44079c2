"""One visit of the page in a browser context of its own, and the Chromium that it runs in.

Example:

    with chromium() as browser:
        visit = open_page(browser, site)
        visit.sign_in()
        visit.ask("Hello")
        visit.check()

`check` reports errors on the console (including violations of the page's policy), scripts that failed, dialogs, and
requests to any other host.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support.debian import program

playwright = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright; `make setup-dev` has it")
expect = playwright.expect
expect.set_options(timeout=15_000)  # a browser on a busy machine takes its time

_STATUS = re.compile(r"Failed to load resource: the server responded with a status of (\d+)")
# In containers there is neither the kernel's support for its sandbox nor much of /dev/shm.
_ARGUMENTS = ["--no-sandbox", "--disable-dev-shm-usage"]

PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
"""Options of a visit by telephone."""
_OVERFLOWS = """
() => [document.documentElement, ...document.querySelectorAll(".view, .talk, .talk-bar, .scroll, .answer, .question")]
  .filter((one) => one.scrollWidth > one.clientWidth)
  .map((one) => one.id || one.className || one.localName)
"""


@dataclass
class Site:
    """A gateway with a page, and an admin key for it."""

    url: str
    key: str

    @property
    def authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}


@dataclass
class Visit:
    """A page in a browser of its own, and what went wrong there."""

    page: Any
    site: Site
    refusals: set[int] = field(default_factory=set)
    """Statuses that the test means to get: browsers write each refused request to the console."""
    losses: bool = False
    """Whether the test means to lose connections: browsers write those as well."""
    errors: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def sign_in(self, key: str | None = None) -> None:
        """Sign in, and wait for the chat."""
        self.page.get_by_label("API key").fill(key or self.site.key)
        self.page.get_by_role("button", name="Sign in").click()
        expect(self.message).to_be_focused()

    @property
    def talk(self) -> Any:
        """The part of the chat where messages are written and read."""
        return self.page.get_by_role("region", name="Conversation")

    @property
    def message(self) -> Any:
        """The field that a message is written in."""
        return self.talk.get_by_label("Message", exact=True)

    @property
    def stops(self) -> Any:
        """The events of the timeline."""
        return self.page.get_by_role("region", name="Events").locator(".stops > li")

    def call(self, tool: str) -> Any:
        """Return the first event that is a call of a tool."""
        return self.stops.filter(has=self.page.locator("summary code", has_text=tool)).first

    def choose(self, model: str) -> None:
        self.talk.get_by_label("Model", exact=True).select_option(model)

    def view(self, name: str) -> None:
        self.page.get_by_role("navigation", name="Views").get_by_role("link", name=name).click()

    def ask(self, text: str) -> None:
        """Send a message, without waiting for the answer."""
        self.message.fill(text)
        self.page.keyboard.press("Enter")

    def answer(self, number: int = -1) -> Any:
        """Return an answer, once it has ended."""
        answers = self.page.locator(".answer")
        answer = answers.last if number < 0 else answers.nth(number)
        expect(answer).to_have_attribute("aria-busy", "false", timeout=60_000)
        return answer

    def overflows(self) -> list[str]:
        """Return the parts of the page that are wider than their place."""
        return self.page.evaluate(_OVERFLOWS)  # type: ignore[no-any-return]

    def settings(self, **values: str) -> None:
        """Fill in settings of the chat, by their labels."""
        self.page.get_by_role("button", name="Settings").click()
        for label, value in values.items():
            self.talk.get_by_label(label.replace("_", " ")).fill(value)

    def check(self) -> None:
        """Assert that nothing went wrong, and that no other host was asked."""
        assert not self.errors, self.errors
        assert self.hosts <= {urlsplit(self.site.url).netloc}

    def watch(self) -> None:
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", self._on_dialog)
        self.page.on("request", self._on_request)

    def _on_console(self, message: Any) -> None:
        if message.type not in ("error", "warning"):
            return
        if self.losses and "net::ERR_" in message.text:
            return
        refused = _STATUS.match(message.text)
        if refused is None or int(refused[1]) not in self.refusals:
            self.errors.append(f"{message.text} {message.location['url']}")

    def _on_dialog(self, dialog: Any) -> None:
        self.errors.append(f"a dialog: {dialog.message}")
        dialog.dismiss()

    def _on_request(self, request: Any) -> None:
        if not request.url.startswith(("data:", "blob:")):
            self.hosts.add(urlsplit(request.url).netloc)


Open = Callable[..., Visit]


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Run Debian's Chromium, which root installs where it is missing."""
    path = program("chromium", "chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=_ARGUMENTS)
        yield browser
        browser.close()


def open_page(browser: Any, site: Site, **options: Any) -> Visit:
    """Open a site's page as a new visitor; `options` are those of a browser context."""
    context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}} | options)
    opened = Visit(context.new_page(), site)
    opened.watch()
    opened.page.goto(site.url)
    return opened
