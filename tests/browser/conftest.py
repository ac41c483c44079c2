"""A browser, and the gateways whose page it visits: the real one with the demo model, and one that follows a script.

What went wrong in a visit, as `Visit.check` has it, fails its test at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.browser import scripted_gateway
from tests.support.browser.visit import Open, Site, Visit, chromium, open_page
from tests.support.gateway_process import UNLIMITED, serve


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
        "store": scripted_gateway.PATIENT,
    }
    with serve(tmp_path_factory.mktemp("gateway"), tree) as running:
        running.wait_until_ready()
        yield Site(running.url, running.key)


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """`tests.support.browser.scripted_gateway`: agents, tools and sources without a model."""
    with scripted_gateway.run(tmp_path_factory.mktemp("scripted"), "--days", "5") as running:
        yield running.site


# One per module: while it runs there is an event loop in this thread, which other tests want for themselves.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture
def visit(browser: Any) -> Iterator[Open]:
    """Open a site's page, each time as a new visitor; what went wrong there fails the test at its end."""
    visits: list[Visit] = []

    def visit(site: Site, **options: Any) -> Visit:
        visits.append(open_page(browser, site, **options))
        return visits[-1]

    yield visit
    for opened in visits:
        opened.page.context.close()
    for opened in visits:
        opened.check()


@pytest.fixture
def page(visit: Open, demo: Site) -> Visit:
    """The chat of somebody who has signed in at the gateway with the demo model."""
    opened = visit(demo)
    opened.sign_in()
    return opened


@pytest.fixture
def stage(visit: Open, scripted: Site) -> Visit:
    """The chat of somebody who has signed in at the scripted gateway."""
    opened = visit(scripted)
    opened.sign_in()
    return opened
