"""Long texts go through filters without holding up others, and come out as they would in one piece."""

from __future__ import annotations

import asyncio

import pytest

from gateway.workflows.addresses import Addresses
from gateway.workflows.citations import AnswerFilter, Sources
from gateway.workflows.excerpts import one_line
from gateway.workflows.figures import Figures
from gateway.workflows.filtering import filtered
from gateway.workflows.links import LinkFilter

pytestmark = pytest.mark.anyio

UNITS = ["*a", "[1] ", "`", "|a|b\n", "[a](http://a.io) ", "a.io ", "1 ", "\n", "<a href='x'>"]


@pytest.mark.parametrize("unit", UNITS)
async def test_others_run_while_a_long_text_is_filtered(unit: str) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    text = unit * (262_144 // len(unit))
    links = AnswerFilter(Sources(), Addresses())
    await filtered(text, links)
    counting.cancel()

    assert turns > 2


@pytest.mark.parametrize("unit", UNITS)
async def test_a_long_text_is_filtered_as_in_one_piece(unit: str) -> None:
    text = unit * 500
    whole, pieces = LinkFilter(Addresses()), LinkFilter(Addresses())

    assert await filtered(text, pieces) + pieces.flush() == whole(text) + whole.flush()


def test_addresses_of_a_text_are_bounded_in_number() -> None:
    count = 20_000
    hosts = Addresses(" ".join(f"host{n}.example.com" for n in range(count)))
    mails = Addresses(" ".join(f"name{n}@example.com" for n in range(count)))
    urls = Addresses(" ".join(f"https://example.com/{n}" for n in range(count)))
    dois = Addresses(" ".join(f"10.1234/{n}x" for n in range(count)))

    assert hosts.live("host0.example.com")
    assert not hosts.live(f"host{count - 1}.example.com")
    assert mails.has_email("name0@example.com")
    assert not mails.has_email(f"name{count - 1}@example.com")
    assert urls.live("https://example.com/0")
    assert not urls.live(f"https://example.com/{count - 1}")
    assert dois.has_doi("10.1234/0x")
    assert not dois.has_doi(f"10.1234/{count - 1}x")


def test_numbers_of_a_text_are_bounded() -> None:
    figures = Figures()
    figures.add_all(" ".join(f"{n}.5" for n in range(150_000)))

    assert figures.holds(0.5)
    assert len(figures.plain) <= 100_000


def test_a_line_is_made_of_the_beginning_of_a_text() -> None:
    assert one_line("  a\n b  " + "c " * 1000, 5) == "a b c"
    assert one_line(" \n ", 5) == ""
