"""Untrusted documents are read in processes that can be killed, whatever the documents contain."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.fair_slots import working_for
from gateway.tools.documents import Document, Kind, Unreadable
from gateway.tools.reader import Reader, kind_of
from tests.support.documents import pdf
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

ARTICLE = """<!doctype html><html lang=en><head><title>Heat pumps | The Daily</title>
<meta property="article:published_time" content="2024-03-05T10:00:00Z"></head><body>
<nav><a href=/>Home</a> <a href=/buy>Buy now</a></nav><article><h1>Heat pumps in cold places</h1>
<p>A heat pump moves heat from the cold air outside into the warm house, and does so at minus thirty degrees.</p>
<h2>Results</h2><p>In the trial of 2023 the pumps gave <b>three times</b> the heat that mere electricity would.</p>
<table><tr><th>Year</th><th>Pumps</th></tr><tr><td>2023</td><td>1200</td></tr></table>
</article><script>alert("x")</script><footer>Imprint</footer></body></html>"""
HOSTILE = "<table>" + "<tr><td>x" * 150_000
"""A megabyte and a half that keeps the parser busy for ten seconds."""


@pytest.fixture
async def reader() -> AsyncIterator[Reader]:
    reader = Reader(processes=1)
    yield reader
    await reader.close()


async def unreadable(reader: Reader, content: bytes, kind: Kind = "html") -> str:
    with pytest.raises(Unreadable) as caught:
        await reader.read(content, kind)
    return str(caught.value)


async def test_page_becomes_text_with_its_structure(reader: Reader) -> None:
    page = await reader.read(ARTICLE.encode(), "html")

    assert page.title == "Heat pumps in cold places"
    assert page.published == "2024-03-05"
    assert page.text.startswith("# Heat pumps in cold places\n\nA heat pump moves heat")
    assert "\n\n## Results\n\nIn the trial of 2023 the pumps gave **three times** the heat" in page.text
    assert "| 2023 | 1200 |" in page.text
    assert not any(word in page.text for word in ("Buy now", "alert", "Imprint", "<"))


async def test_short_page_is_read_whole(reader: Reader) -> None:
    page = await reader.read(b"<html><title>T</title><body><p>Hi there.</p></body>", "html")

    assert page == Document("Hi there.", "T")


@pytest.mark.parametrize(
    "content", [b"<title>Pumps</title><p>They move heat.", b"<p>They move heat.", b"They move heat."]
)
async def test_page_may_leave_out_its_outer_tags(reader: Reader, content: bytes) -> None:
    document = await reader.read(content, "html")

    assert document == Document("They move heat.", "Pumps" if b"title" in content else "")


async def test_pdf_becomes_text_page_by_page(reader: Reader) -> None:
    content = pdf("Heat pumps", ["The first page tells of air.", "The second page tells of water."])

    assert await reader.read(content, "pdf") == Document(
        "The first page tells of air.\fThe second page tells of water.", "Heat pumps", "2024-03-05"
    )
    assert (await reader.read(content, "pdf", max_chars=10)).text == "The first "


async def test_markdown_keeps_its_text_and_gives_its_title(reader: Reader) -> None:
    content = b"---\ntitle: 'Pumps'\ndate: 2024-03-05\ntags: [a]\n---\n# Other\n\r\nText.\r\n\n\n\n\n\n## More\n"

    assert await reader.read(content, "markdown") == Document("# Other\n\nText.\n\n\n## More\n", "Pumps", "2024-03-05")
    assert (await reader.read(b"Intro.\n\n## The *pump*  ##\n", "markdown")).title == "The *pump*"
    assert (await reader.read(b"The pump\n========\n", "markdown")).title == "The pump"
    assert (await reader.read(b"# The pump\n", "text")) == Document("# The pump\n")


@pytest.mark.parametrize(
    ("content", "charset"),
    [
        ("Gr\u00fc\u00dfe".encode(), ""),
        ("Gr\u00fc\u00dfe".encode("utf-8-sig"), "latin-1"),
        ("Gr\u00fc\u00dfe".encode("utf-16"), ""),
        ("Gr\u00fc\u00dfe".encode("utf-16-be"), "utf-16-be"),
        ("Gr\u00fc\u00dfe".encode("latin-1"), "iso-8859-1"),
        ("Gr\u00fc\u00dfe".encode(), "no-such-charset"),
        ("Gru\u0308\u00dfe\u200b\ufeff\x07\u202e\U000e0041".encode(), "utf-8"),
    ],
)
async def test_bytes_become_the_characters_that_were_meant(reader: Reader, content: bytes, charset: str) -> None:
    assert (await reader.read(content, "text", charset=charset)).text == "Gr\u00fc\u00dfe"


async def test_encoding_that_a_page_declares_is_used(reader: Reader) -> None:
    page = '<html><head><meta charset="shift_jis"></head><body><p>\u6771\u4eac\u306e\u4eba\u53e3</p></body></html>'

    assert (await reader.read(page.encode("shift_jis"), "html")).text == "\u6771\u4eac\u306e\u4eba\u53e3"


@pytest.mark.parametrize(
    ("content", "kind", "why"),
    [
        (b"", "html", "it is not HTML"),
        (b"<html><body></body></html>", "html", "it holds no text"),
        (b" \n\t ", "text", "it holds no text"),
        (b"%PDF-1.7 and nothing more", "pdf", "it is not a whole PDF"),
        (b"\x00" * 1000, "pdf", "it is not a whole PDF"),
        (pdf("", [""]), "pdf", "it holds no text, perhaps only pictures of it"),
        (pdf("t", ["secret"], password="pw"), "pdf", "it is protected by a password"),
    ],
)
async def test_what_can_not_be_read_says_why(reader: Reader, content: bytes, kind: Kind, why: str) -> None:
    assert await unreadable(reader, content, kind) == why
    assert reader.processes == 1, "the process lives on"


async def test_locked_pdf_that_anyone_may_open_is_read(reader: Reader) -> None:
    assert (await reader.read(pdf("t", ["open"], password=""), "pdf")).text == "open"


async def test_hostile_page_costs_its_process_and_nothing_else() -> None:
    reader = Reader(processes=1, timeout_s=0.5)
    steps = 0

    async def watch() -> None:
        nonlocal steps
        while True:
            await asyncio.sleep(0.001)
            steps += 1

    watching = asyncio.create_task(watch())
    why = await unreadable(reader, HOSTILE.encode())
    watching.cancel()

    assert why == "it took longer than 0.5 s to read"
    assert steps > 10, "the event loop went on"
    await until(lambda: reader.processes == 0)
    assert (await reader.read(b"# Next\n", "markdown")).title == "Next"
    await reader.close()


async def test_page_without_bottom_takes_no_more_memory_than_it_may(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.tools.reader.MAX_MEMORY_BYTES", 100 * 2**20)

    await unreadable(reader, ("<p>" + "<span>a</span>" * 200_000).encode())
    assert (await reader.read(b"# Next\n", "markdown")).title == "Next"


async def test_process_that_died_is_replaced(reader: Reader) -> None:
    await reader.read(b"one", "text")
    (process,) = reader._all
    process.kill()
    await process.gone

    assert (await reader.read(b"two", "text")).text == "two"


async def test_process_that_dies_of_a_document_is_reported_and_replaced(reader: Reader) -> None:
    await reader.read(b"one", "text")
    (process,) = reader._all
    reading = asyncio.create_task(unreadable(reader, HOSTILE.encode()))
    await until(lambda: not reader._idle)
    process.kill()

    assert await reading == "it can't be read"
    assert (await reader.read(b"two", "text")).text == "two"


async def test_cancelling_kills_the_process(reader: Reader) -> None:
    await reader.read(b"one", "text")
    (process,) = reader._all
    reading = asyncio.create_task(reader.read(HOSTILE.encode(), "html"))
    await until(lambda: not reader._idle)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading

    await process.gone
    assert (await reader.read(b"two", "text")).text == "two"


async def test_cancelling_while_a_process_starts_leaves_none(reader: Reader) -> None:
    reading = asyncio.create_task(reader.read(b"one", "text"))
    await until(lambda: bool(reader._starting))
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading

    await until(lambda: not reader._starting and reader.processes == 0)


async def test_processes_are_few_and_serve_in_turn() -> None:
    """One stays free for other keys."""
    reader = Reader(processes=3)
    texts = [str(number) for number in range(20)]

    found = await asyncio.gather(*(reader.read(text.encode(), "text") for text in texts))

    assert [document.text for document in found] == texts
    assert reader.processes == 2
    await reader.close()
    assert reader.processes == 0


async def test_one_keys_hostile_documents_leave_a_process_to_others() -> None:
    reader = Reader(processes=2)
    with working_for("greedy"):
        greedy = [asyncio.create_task(reader.read(HOSTILE.encode(), "html")) for _ in range(5)]
    await until(lambda: reader.processes == 1)
    try:
        with working_for("other"):
            page = await reader.read(b"hello", "text")
        assert page.text == "hello"
        assert not any(task.done() for task in greedy)
    finally:
        for task in greedy:
            task.cancel()
        await asyncio.gather(*greedy, return_exceptions=True)
        await reader.close()


async def test_document_that_finds_no_process_in_time_is_given_up() -> None:
    """By the reader, so that the tool that asked is not taken to be out of order, for all keys."""
    reader = Reader(processes=1, timeout_s=0.5)
    slow = asyncio.create_task(reader.read(HOSTILE.encode(), "html"))
    await until(lambda: reader.processes == 1)
    slower = asyncio.create_task(reader.read(HOSTILE.encode(), "html"))

    reasons = await asyncio.gather(slow, slower, reader.read(b"", "text"), return_exceptions=True)

    assert all(isinstance(reason, Unreadable) for reason in reasons)
    assert "too many documents" in str(reasons[2])
    await reader.close()


async def test_idle_process_ends() -> None:
    reader = Reader(processes=1, idle_s=0.01)
    await reader.read(b"one", "text")

    await until(lambda: reader.processes == 0)
    assert (await reader.read(b"two", "text")).text == "two"
    await reader.close()


async def test_closed_reader_reads_nothing(reader: Reader) -> None:
    await reader.close()

    assert await unreadable(reader, b"x") == "documents can't be read at the moment"


async def test_process_knows_no_secrets(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAVE_API_KEY", "secret")
    await reader.read(b"one", "text")
    (process,) = reader._all

    environment = Path(f"/proc/{process._process.pid}/environ").read_bytes()
    names = {entry.partition(b"=")[0].decode() for entry in environment.split(b"\0") if entry}
    assert names <= {"PATH", "PYTHONPATH", "LANG", "LC_CTYPE"}
    assert os.getpriority(os.PRIO_PROCESS, process._process.pid) > os.getpriority(os.PRIO_PROCESS, 0)


@pytest.mark.parametrize(
    ("media_type", "content", "kind"),
    [
        ("text/html", b"", "html"),
        ("", b"\n <!DOCTYPE html>", "html"),
        ("text/plain", b"<html>", "html"),
        ("application/octet-stream", b"%PDF-1.4", "pdf"),
        ("text/html", b"%PDF-1.4", "pdf"),
        ("text/csv", b"a,b", "text"),
        ("text/plain", b"a", "text"),
        ("text/markdown", b"# a", "markdown"),
        ("application/ld+json", b"{}", "text"),
        ("application/rss+xml", b"<rss/>", "text"),
        ("", b"a", None),
        ("application/octet-stream", b"\x00", None),
        ("image/png", b"\x89PNG", None),
        ("application/zip", b"PK", None),
    ],
)
def test_kind_is_told_by_type_and_content(media_type: str, content: bytes, kind: Kind | None) -> None:
    assert kind_of(media_type, content) == kind
