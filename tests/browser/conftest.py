"""A browser, and the gateways whose page it visits: the real one with the demo model, and one that follows a script.

Every visit is watched: at its end there must have been no error on the console, no script that failed, and no request
to any other host.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.conftest import KEY, ROOT
from tests.gateway_process import UNLIMITED, serve

playwright = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright; `make setup-dev` has it")

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_START_S = 120
_STATUS = re.compile(r"Failed to load resource: the server responded with a status of (\d+)")


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
    errors: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def sign_in(self, key: str | None = None) -> None:
        """Sign in, and wait for the chat."""
        self.page.get_by_label("API key").fill(key or self.site.key)
        self.page.get_by_role("button", name="Sign in").click()
        playwright.expect(self.message).to_be_focused()

    @property
    def talk(self) -> Any:
        """The part of the chat where messages are written and read."""
        return self.page.get_by_role("region", name="Conversation")

    @property
    def message(self) -> Any:
        """The field that a message is written in."""
        return self.talk.get_by_label("Message", exact=True)

    def ask(self, text: str) -> None:
        """Send a message, without waiting for the answer."""
        self.message.fill(text)
        self.page.keyboard.press("Enter")

    def answer(self, number: int = -1) -> Any:
        """Return an answer, once it has ended."""
        answers = self.page.locator(".answer")
        answer = answers.last if number < 0 else answers.nth(number)
        playwright.expect(answer).to_have_attribute("aria-busy", "false", timeout=60_000)
        return answer

    def settings(self, **values: str) -> None:
        """Fill in settings of the chat, by their labels."""
        self.page.get_by_role("button", name="Settings").click()
        for label, value in values.items():
            self.talk.get_by_label(label.replace("_", " ")).fill(value)

    def check(self) -> None:
        """Assert that nothing went wrong, and that no other host was asked."""
        assert self.errors == []
        assert self.hosts <= {urlsplit(self.site.url).netloc}

    def watch(self) -> None:
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._on_request)

    def _on_console(self, message: Any) -> None:
        if message.type not in ("error", "warning"):
            return
        refused = _STATUS.match(message.text)
        if refused is None or int(refused[1]) not in self.refusals:
            self.errors.append(message.text)

    def _on_request(self, request: Any) -> None:
        if not request.url.startswith(("data:", "blob:")):
            self.hosts.add(urlsplit(request.url).netloc)


Open = Callable[..., Visit]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The product as a user starts it, with the demo model."""
    pytest.importorskip("vllm", reason="the demo model needs vllm; `make setup` installs it")
    tree = {
        "engines": {"main": {"kind": "embedded", "model": "demo", "args": {"max_model_len": 2048}}},
        "models": {
            "shannon-chat": {"defaults": {"temperature": 0}, "limits": UNLIMITED},
            "shannon-twice": {"description": "Two requests a minute", "limits": {"requests_per_minute": 2}},
        },
        "inspector": {"enabled": True},
    }
    with serve(tmp_path_factory.mktemp("gateway"), tree) as running:
        running.wait_until_ready()
        yield Site(running.url, running.key)


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """`tests.browser.scripted_gateway`: agents, tools and sources without a model."""
    folder = tmp_path_factory.mktemp("scripted")
    log = folder / "gateway.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.browser.scripted_gateway", str(folder), "--days", "5"],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Site(_printed_url(process, log.read_text), KEY)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _printed_url(process: subprocess.Popen[bytes], read: Callable[[], str]) -> str:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"^http://\S+$", read(), re.M):
            return found[0]
        time.sleep(0.05)
    raise RuntimeError(f"not ready (exit code {process.poll()}):\n{read()[-4000:]}")


# One per module: while it runs there is an event loop in this thread, which other tests want for themselves.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip("browser tests need Chromium; on Debian: apt-get install chromium")
    # In containers there is neither the kernel's support for its sandbox nor much of /dev/shm.
    arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Open]:
    """Open a site's page, each time as a new visitor; what went wrong there fails the test at its end."""
    visits: list[Visit] = []

    def visit(site: Site, **options: Any) -> Visit:
        context = chromium.new_context(**{"viewport": {"width": 1440, "height": 900}} | options)
        opened = Visit(context.new_page(), site)
        opened.watch()
        opened.page.goto(site.url)
        visits.append(opened)
        return opened

    yield visit
    for opened in visits:
        opened.page.context.close()
    for opened in visits:
        opened.check()
