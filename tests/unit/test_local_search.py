"""Searching a folder of documents: real files, a real index, and an index that follows the folder."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.settings.config import LocalSearchSettings
from gateway.tools.base import Observation, Source, Toolbox
from gateway.tools.document_folder import scan, split_url, url_of
from gateway.tools.document_index import DocumentIndex, Entry, IndexFailed
from gateway.tools.document_library import Changes, DocumentLibrary
from gateway.tools.local_search import READ_CHARS, LocalRead, LocalSearch
from gateway.tools.passages import PASSAGE_CHARS, Passage, passages
from gateway.tools.reader import Reader
from gateway.tools.search_terms import MAX_TERMS, match_expression
from tests.support.documents import pdf
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

REPORT = """# Annual report 2024

Acme sells heat pumps.

## Results

Revenue grew to twelve million euro in 2024, three million more than the year before.

## Risks

Copper has become expensive, and the northern warehouse burnt down.
"""
PAGE = """<html><head><title>Staff handbook</title></head><body><nav>Home</nav><article><h1>Handbook</h1>
<p>Everybody has thirty days of holiday in a year, and may carry five of them over into the next one.</p>
<p>Expenses are paid back within a month, if the receipts are handed in with the form for them.</p></article></body>
</html>"""


class Desk:
    """A folder, its library, and the tools over both."""

    def __init__(self, folder: Path, index: Path, **settings: Any) -> None:
        self.folder = folder
        made = LocalSearchSettings.model_validate({"folder": folder, "refresh_s": 3600} | settings)
        self.library = DocumentLibrary(made, index, Reader(processes=1))
        self.tools = Toolbox([LocalSearch(made, self.library), LocalRead(self.library)], resources=[self.library])

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    async def search(self, query: str, **arguments: Any) -> Observation:
        return await self.tools.call("local_search", {"query": query} | arguments)

    async def urls(self, query: str, **arguments: Any) -> list[str]:
        return [source.url for source in (await self.search(query, **arguments)).sources]

    async def read(self, url: str) -> Observation:
        return await self.tools.call("local_read", {"url": url})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    return folder


@pytest.fixture
async def desk(folder: Path, tmp_path: Path) -> AsyncIterator[Desk]:
    desk = Desk(folder, tmp_path / "data" / "index.sqlite3")
    yield desk
    await desk.tools.close()


async def test_documents_of_every_kind_are_found(desk: Desk) -> None:
    desk.write("reports/2024.md", REPORT)
    desk.write("staff/handbook.html", PAGE)
    desk.write("trial.pdf", pdf("The trial", ["Nothing here.", "The pumps ran at minus thirty degrees."]))
    desk.write("notes.txt", "Call the plumber about the leak.")

    assert await desk.library.refresh() == Changes(indexed=4)

    assert (await desk.search("how much revenue was there in 2024?")).sources[0] == Source(
        "local:reports/2024.md#results",
        "Annual report 2024",
        "## Results Revenue grew to twelve million euro in 2024, three million more than the year before.",
    )
    assert await desk.urls("holidays") == ["local:staff/handbook.html#handbook"]
    (trial,) = (await desk.search("degrees")).sources
    assert (trial.url, trial.title, trial.published) == ("local:trial.pdf#page=2", "The trial", "2024-03-05")
    (notes,) = (await desk.search("plumber")).sources
    assert (notes.url, notes.title) == ("local:notes.txt", "notes.txt")


async def test_search_says_what_it_found_in_words(desk: Desk) -> None:
    desk.write("notes.txt", "Call the plumber.")
    desk.write("more.txt", "The plumber, the plumber!")
    await desk.library.refresh()

    assert (await desk.search("plumber")).text == (
        "1. more.txt (local:more.txt)\nThe plumber, the plumber!\n\n2. notes.txt (local:notes.txt)\nCall the plumber."
    )
    nothing = await desk.search("zebra")
    assert (nothing.ok, nothing.text) == (True, "No document matches. Try other words.")


async def test_reading_goes_on_from_the_passage(desk: Desk) -> None:
    desk.write("reports/2024.md", REPORT)
    await desk.library.refresh()

    whole = await desk.read("local:reports/2024.md#risks")

    assert whole.text == REPORT.strip(), "a short document is read whole"
    (source,) = whole.sources
    assert (source.url, source.title, source.fetched) == ("local:reports/2024.md#risks", "Annual report 2024", True)
    assert source.snippet.startswith("# Annual report 2024 Acme sells heat pumps.")


async def test_long_document_is_read_around_the_passage(desk: Desk) -> None:
    chapters = [f"## Chapter {number}\n\n" + f"Word{number} and more. " * 60 for number in range(60)]
    desk.write("book.md", "# Book\n\n" + "\n\n".join(chapters))
    await desk.library.refresh()

    (found,) = await desk.urls("Word40", max_results=1)
    text = (await desk.read(found)).text

    assert found == "local:book.md#chapter-40"
    assert text.startswith("[...]\n\n## Chapter 39\n")
    assert "## Chapter 45" in text
    assert text.endswith("[...]")
    assert len(text) <= READ_CHARS + 100
    end = (await desk.read("local:book.md#chapter-59")).text
    assert end.startswith("[...]")
    assert end.endswith("Word59 and more.")
    assert len(end) > READ_CHARS - PASSAGE_CHARS
    assert (await desk.read("local:book.md#nowhere")).text.startswith("# Book")


async def test_pages_are_named(desk: Desk) -> None:
    desk.write("trial.pdf", pdf("The trial", ["First.", "Second."]))
    await desk.library.refresh()

    assert (await desk.read("local:trial.pdf#page=2")).text == "[page 1]\n\nFirst.\n\n[page 2]\n\nSecond."


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("local:nothing.md", "there is no such document; take an address that local_search gave."),
        ("local:../secret.txt", "there is no such document; take an address that local_search gave."),
        ("local:/etc/passwd", "there is no such document; take an address that local_search gave."),
        ("local:", "there is no such document; take an address that local_search gave."),
        ("local:\x00", "there is no such document; take an address that local_search gave."),
        ("local:%ff%fe", "there is no such document; take an address that local_search gave."),
        ("file:///etc/passwd", "an address of a document begins with local:; take one that local_search gave."),
        ("https://a.test/", "an address of a document begins with local:; take one that local_search gave."),
    ],
)
async def test_only_what_is_indexed_can_be_read(desk: Desk, url: str, says: str) -> None:
    (desk.folder.parent / "secret.txt").write_text("secret")
    desk.write("a.md", "A.")
    await desk.library.refresh()

    found = await desk.read(url)

    assert (found.ok, found.text) == (False, f"local_read: {says}")


async def test_best_passage_of_each_document_comes_first(desk: Desk) -> None:
    desk.write("a.md", "## One\n\npump pump pump\n\n## Two\n\npump pump\n\n## Three\n\npump")
    desk.write("b.md", "A pump, once, in a document that is about rather many other things than this one word.")
    await desk.library.refresh()

    assert await desk.urls("pump") == ["local:a.md#one", "local:b.md", "local:a.md#two", "local:a.md#three"]
    assert await desk.urls("pump", max_results=2) == ["local:a.md#one", "local:b.md"]


async def test_name_and_heading_count_for_more_than_text(desk: Desk) -> None:
    filler = "Of other things there is much to say, and it is said here at some length. "
    desk.write("a.txt", filler + "The budget is mentioned.")
    desk.write("b.md", "# Notes\n\n## Budget\n\n" + filler)
    desk.write("plans/budget.txt", filler)
    await desk.library.refresh()

    assert await desk.urls("budget") == ["local:plans/budget.txt", "local:b.md#budget", "local:a.txt"]


@pytest.mark.parametrize(
    ("text", "queries", "misses"),
    [
        ("The reports were reviewed.", ["report", "REPORTS", "review"], ["rep"]),
        ("Straßenbahn für Ärzte", ["straßenbahn", "fur", "arzte", "ÄRZTE"], ["bahn"]),
        ("東京都の人口は約1400万人です。", ["東京", "人口", "東京の人口", "1400", "都"], ["京東", "大阪"]),
        ("人工智能改变世界", ["智能", "人工智能"], ["界世"]),
        ("대한민국의 수도는 서울입니다", ["수도는"], ["부산"]),
        ("ภาษาไทยง่าย", ["ภาษาไทย"], ["สบ"]),
        ("हिन्दी भाषा", ["हिन्दी"], ["हिन"]),
        ("Ежегодный отчёт", ["отчёт", "ОТЧЁТ"], ["от"]),
        ("Version 3.5 is state-of-the-art; see x86_64 and C++.", ["3.5", "state-of-the-art", "x86_64"], ["4.6"]),
        ("e\u0301cole", ["\u00e9cole", "e\u0301cole", "ecole"], ["col"]),
        ("\U0001d11e \U00020bb7\u91ce\u5bb6", ["\U00020bb7\u91ce"], ["\u91ce\U00020bb7"]),
    ],
    ids=lambda value: ascii(value)[:20] if isinstance(value, str) else "",
)  # fmt: skip
async def test_words_of_every_script_are_found(desk: Desk, text: str, queries: list[str], misses: list[str]) -> None:
    desk.write("a.txt", text)
    await desk.library.refresh()

    assert [query for query in queries if await desk.urls(query) != ["local:a.txt"]] == []
    assert [query for query in misses if await desk.urls(query)] == []
    (source,) = (await desk.search(queries[0])).sources
    assert "\u200b" not in source.snippet
    assert "\u200b" not in (await desk.read("local:a.txt")).text


async def test_index_follows_the_folder(desk: Desk) -> None:
    kept = desk.write("kept.md", "pump one")
    changed = desk.write("changed.md", "pump two")
    gone = desk.write("gone.md", "pump three")
    assert await desk.library.refresh() == Changes(indexed=3)
    assert await desk.library.refresh() == Changes()

    changed.write_text("valve")
    gone.unlink()
    desk.write("deep/er/new.md", "pump four")
    os.utime(kept)

    assert await desk.library.refresh() == Changes(indexed=3, removed=1), "the touched one is looked at as well"
    assert sorted(await desk.urls("pump")) == ["local:deep/er/new.md", "local:kept.md"]
    assert await desk.urls("valve") == ["local:changed.md"]
    assert not (await desk.read("local:gone.md")).ok
    assert await desk.library.refresh() == Changes()


async def test_file_that_is_only_touched_is_not_read_again(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    path = desk.write("a.md", "pump")
    await desk.library.refresh()
    os.utime(path)
    monkeypatch.setattr(DocumentIndex, "put", None)

    assert await desk.library.refresh() == Changes(indexed=1)
    assert await desk.library.refresh() == Changes()


async def test_content_that_changes_under_the_same_size_and_time_is_seen(desk: Desk) -> None:
    path = desk.write("a.md", "pump")
    await desk.library.refresh()
    status = path.stat()
    path.write_text("fans")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    await desk.library.refresh()

    assert await desk.urls("fans") == ["local:a.md"]


async def test_folder_that_is_away_changes_nothing(desk: Desk, folder: Path) -> None:
    desk.write("a.md", "pump")
    await desk.library.refresh()
    folder.rename(folder.with_name("away"))

    with pytest.raises(OSError, match="No such file"):
        await desk.library.refresh()
    assert await desk.urls("pump") == ["local:a.md"]


async def test_document_that_can_not_be_read_is_logged_once(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.write("bad.pdf", b"%PDF-1.4 and no more")
    desk.write("locked.pdf", pdf("t", ["secret"], password="pw"))
    desk.write("empty.md", "")
    good = desk.write("good.md", "pump")

    assert await desk.library.refresh() == Changes(indexed=1, failed=3)
    assert await desk.library.refresh() == Changes(), "not tried again while they stay as they are"

    assert sorted(record.getMessage() for record in caplog.records) == [
        "a document can't be indexed: local:bad.pdf: it is not a whole PDF",
        "a document can't be indexed: local:empty.md: it holds no text",
        "a document can't be indexed: local:locked.pdf: it is protected by a password",
    ]
    assert str(desk.folder) not in caplog.text
    assert not (await desk.read("local:bad.pdf")).ok
    good.write_bytes(b"")
    assert await desk.library.refresh() == Changes(failed=1)
    assert await desk.urls("pump") == [], "what it said before is not kept"


async def test_failed_document_is_tried_again_by_the_next_process(folder: Path, tmp_path: Path) -> None:
    index = tmp_path / "index.sqlite3"
    for _ in range(2):
        desk = Desk(folder, index)
        desk.write("bad.pdf", b"%PDF-1.4") if not (folder / "bad.pdf").exists() else None
        assert await desk.library.refresh() == Changes(failed=1)
        assert await desk.library.refresh() == Changes()
        await desk.tools.close()


async def test_large_document_is_left_out(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk(folder, tmp_path / "index.sqlite3", max_file_bytes=1024)
    desk.write("large.txt", "pump " * 1000)
    desk.write("small.txt", "pump " * 10)

    assert await desk.library.refresh() == Changes(indexed=1, failed=1)
    assert await desk.urls("pump") == ["local:small.txt"]
    assert "local:large.txt: it is larger than 1024 bytes" in caplog.text
    await desk.tools.close()


async def test_folder_is_not_left_by_links_and_hidden_files_stay_hidden(desk: Desk, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.md").write_text("pump secret")
    desk.write(".hidden.md", "pump")
    desk.write(".git/config.md", "pump")
    desk.write("picture.png", "pump")
    os.mkfifo(desk.folder / "pipe.txt")
    (desk.folder / "out.md").symlink_to(outside / "secret.md")
    (desk.folder / "up.md").symlink_to("../outside/secret.md")
    (desk.folder / "elsewhere").symlink_to(outside)
    (desk.folder / "circle").symlink_to(desk.folder)
    (desk.folder / "loop.md").symlink_to("loop.md")
    (desk.folder / "dangling.md").symlink_to("nothing.md")
    desk.write("..2024/mounted.md", "pump")  # as Kubernetes mounts a ConfigMap
    (desk.folder / "..data").symlink_to("..2024")
    (desk.folder / "mounted.md").symlink_to("..data/mounted.md")

    await desk.library.refresh()

    assert await desk.urls("pump") == ["local:mounted.md"]


def test_folder_may_be_a_link_itself(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.md").write_text("a")
    (tmp_path / "link").symlink_to("real")

    assert list(scan(tmp_path / "link")) == ["local:a.md"]


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("reports/2024.md", "local:reports/2024.md"),
        ("a b#c?d%e.md", "local:a%20b%23c%3Fd%25e.md"),
        ('say "hi"\n<b>.md', "local:say%20%22hi%22%0A%3Cb%3E.md"),
        ("\u5831\u544a/\u00e4.md", "local:\u5831\u544a/\u00e4.md"),
        ("bad\udcff.md", "local:bad%FF.md"),
    ],
)
async def test_every_file_name_has_an_address_that_leads_back(desk: Desk, path: str, url: str) -> None:
    assert url_of(path) == url
    assert split_url(f"{url}#x") == (url, "x")
    assert split_url(url.replace("\u00e4", "%C3%A4")) == (url, "")
    desk.write(path, "pump")
    await desk.library.refresh()
    (found,) = await desk.urls("pump")
    assert found == url
    assert (await desk.read(found)).text == "pump"


async def test_search_before_the_first_round_says_so(desk: Desk) -> None:
    assert (await desk.search("pump")).text == "local_search: the documents are not indexed yet."
    desk.write("a.md", "pump")
    await desk.library.refresh()
    desk.library.complete = False

    assert "still being indexed" in (await desk.search("pump")).text


async def test_background_keeps_the_index_fresh(folder: Path, tmp_path: Path) -> None:
    desk = Desk(folder, tmp_path / "index.sqlite3", refresh_s=0.01)
    await desk.tools.start()
    await until(lambda: desk.library.complete)
    desk.write("a.md", "pump")

    async with asyncio.timeout(10):
        while not await desk.urls("pump"):
            await asyncio.sleep(0.01)
    await desk.tools.close()
    await desk.tools.close()


async def test_background_goes_on_after_trouble(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.rmdir()
    desk = Desk(folder, tmp_path / "index.sqlite3", refresh_s=0.01)
    await desk.tools.start()
    await until(lambda: "the folder of documents can't be checked" in caplog.text)
    folder.mkdir()

    await until(lambda: desk.library.complete)
    assert caplog.text.count("the folder of documents can't be checked") == 1
    await desk.tools.close()


async def test_gateways_share_an_index(folder: Path, tmp_path: Path) -> None:
    desks = [Desk(folder, tmp_path / "index.sqlite3") for _ in range(3)]
    for number in range(20):
        desks[0].write(f"{number}.md", f"pump number{number}")

    rounds = await asyncio.gather(*(desk.library.refresh() for desk in desks))

    done = [changes for changes in rounds if changes is not None]
    assert sum(changes.indexed for changes in done) == 20
    for desk in desks:
        assert len(await desk.urls("pump", max_results=20)) == 20
        await desk.tools.close()


async def test_index_is_used_while_it_is_written(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite3"
    DocumentIndex(path, folder).open()
    failures: list[Exception] = []
    done = threading.Event()

    def write(name: str) -> None:
        index = DocumentIndex(path, folder)
        try:
            for number in range(60):
                index.put(Entry(f"local:{name}", str(number), ""), [Passage("", "", f"pump {number}")] * 5)
        except IndexFailed as error:
            failures.append(error)

    def search() -> None:
        index = DocumentIndex(path, folder)
        try:
            while not done.is_set():
                assert len(index.search("pump", 50)) in (0, 5, 10, 15), "a document is there as a whole or not"
                index.excerpt("local:a", "", 1000)
        except Exception as error:  # whatever it is, the test must hear of it
            failures.append(error)

    writers = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    searchers = [threading.Thread(target=search) for _ in range(2)]
    for thread in writers + searchers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in searchers:
        thread.join()

    assert failures == []
    assert len(DocumentIndex(path, folder).search("pump", 50)) == 15


def _overwrite(path: Path) -> None:
    path.write_bytes(b"no database " * 1000)


def _of_another_version(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()


@pytest.mark.parametrize("spoil", [_overwrite, _of_another_version])
async def test_index_that_can_not_be_used_is_made_anew(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    path = tmp_path / "index.sqlite3"
    for _ in range(2):
        desk = Desk(folder, path)
        desk.write("a.md", "pump")
        assert await desk.library.refresh() == Changes(indexed=1)
        assert await desk.urls("pump") == ["local:a.md"]
        await desk.tools.close()
        for suffix in ("-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        spoil(path)


async def test_index_damaged_while_in_use_is_made_anew(desk: Desk, tmp_path: Path) -> None:
    desk.write("a.md", "pump")
    await desk.library.refresh()
    _overwrite(tmp_path / "data" / "index.sqlite3")

    found = await desk.search("pump")
    assert (found.ok, found.text) == (False, "local_search: the documents can't be searched at the moment.")
    with pytest.raises(IndexFailed):
        await desk.library.refresh()
    assert await desk.library.refresh() == Changes(indexed=1)
    assert await desk.urls("pump") == ["local:a.md"]


async def test_index_of_another_folder_is_not_searched(desk: Desk, folder: Path, tmp_path: Path) -> None:
    desk.write("a.md", "pump")
    await desk.library.refresh()
    other = tmp_path / "other"
    other.mkdir()

    index = DocumentIndex(tmp_path / "data" / "index.sqlite3", other)
    index.open()

    assert index.search("pump", 5) == []


async def test_index_is_readable_to_nobody_else(desk: Desk, tmp_path: Path) -> None:
    await desk.library.refresh()

    for path in (tmp_path / "data").iterdir():
        assert path.stat().st_mode & 0o077 == 0, path.name


async def test_closing_in_the_middle_leaves_whole_documents(folder: Path, tmp_path: Path) -> None:
    desk = Desk(folder, tmp_path / "index.sqlite3")
    for number in range(50):
        desk.write(f"{number}.md", "pump")
    await desk.tools.start()
    await until(lambda: (tmp_path / "index.sqlite3").exists())
    await desk.tools.close()

    again = Desk(folder, tmp_path / "index.sqlite3")
    await again.library.refresh()
    assert len(await again.urls("pump", max_results=20)) == 20
    await again.tools.close()


@pytest.fixture(scope="module")
def one_document(tmp_path_factory: pytest.TempPathFactory) -> DocumentIndex:
    folder = tmp_path_factory.mktemp("one")
    index = DocumentIndex(folder / "index.sqlite3", folder)
    index.open()
    index.put(Entry("local:a", "1", ""), [Passage("", "", "pump NEAR AND OR NOT text")])
    return index


@pytest.mark.parametrize(
    "query",
    [
        *('"', '""', "'", "*", "a*", "text:pump", "{text} : pump", "NEAR(a b, 2)", "AND", "OR OR", "NOT pump", "-pump"),
        *("^pump", "(pump", "pump)", "pump + pump", "a\x00b", "\x00", "; DROP TABLE words", "%", "\\", "\ufffe", "_"),
        *("\u0301", "\u200b", "\u3000", "\U0001f600", "\u0e31", "x" * 400, "\ud800"),
    ],
    ids=ascii,
)
def test_nothing_in_a_query_is_syntax(one_document: DocumentIndex, query: str) -> None:
    one_document.search(query, 5)
    one_document.search(f"pump {query}", 5)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(max_size=60))
def test_any_query_may_stand_beside_a_word(one_document: DocumentIndex, query: str) -> None:
    one_document.search(query, 5)
    assert one_document.search(f"{query} pump", 5), query


def test_query_is_made_of_its_telling_words() -> None:
    assert match_expression("What is the Revenue of 2024, and the revenue?") == '"revenue" OR "2024"'
    assert match_expression("who is it") == '"who" OR "is" OR "it"'
    assert match_expression("3.5-beta") == '"3 5 beta" OR "3" OR "5" OR "beta"'
    assert match_expression("!!! --- ") == ""
    assert match_expression(" ".join(f"w{n}" for n in range(200))).count(" OR ") == MAX_TERMS - 1


def test_passages_follow_the_structure() -> None:
    assert passages(REPORT) == [
        Passage("annual-report-2024", "Annual report 2024", "# Annual report 2024\n\nAcme sells heat pumps."),
        Passage(
            "results",
            "Results",
            "## Results\n\nRevenue grew to twelve million euro in 2024, three million more than the year before.",
        ),
        Passage(
            "risks",
            "Risks",
            "## Risks\n\nCopper has become expensive, and the northern warehouse burnt down.",
        ),
    ]


@pytest.mark.parametrize(
    ("text", "anchors"),
    [
        ("No headings.", [""]),
        ("# A\n## B\ntext\n# A\nmore\n\n# A\nand more", ["b", "a", "a-2"]),
        ("# A\n\n## A-2\n\nx\n\n# A\n\ny\n\n# A\n\nz", ["a-2", "a", "a-3"]),
        ("Title\n=====\nx\n\nPart\n----\ny", ["title", "part"]),
        ("=====\nTitle\n=====\n\nx\ny\n---\nz\n\n---\n", ["title"]),
        ("# \u00dcber uns!\n\nx", ["\u00fcber-uns"]),
        ("# ???\n\nx\n\n# !!!\n\ny", ["", "part-2"]),
        ("```\n# no heading\n\n# nor this\n```\n\n# A\n\nx", ["", "a"]),
        ("one\ftwo\f\ffour", ["page=1", "page=2", "page=4"]),
        ("x" * PASSAGE_CHARS + "\f" + "y " * PASSAGE_CHARS, ["page=1", "page=2", "page=2-2"]),
    ],
)
def test_anchors_are_headings_and_pages_and_none_comes_twice(text: str, anchors: list[str]) -> None:
    assert [passage.anchor for passage in passages(text)] == anchors


def test_long_text_is_cut_between_sentences() -> None:
    sentence = "This is one of very many sentences that say very little. "

    found = passages(sentence * 200)

    assert all(len(passage.text) <= PASSAGE_CHARS and passage.text.endswith("little.") for passage in found)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_no_word_is_lost_or_said_twice(seed: int) -> None:
    chance = random.Random(seed)
    pieces = ["word", "# Head", "\n", "\n\n", " ", "```\n", "x" * 700, "\u3002\u6771", "\f", "====\n", ". ", "- item\n"]
    text = "".join(chance.choice(pieces) for _ in range(chance.randrange(200)))

    found = passages(text)

    assert "".join("".join(passage.text.split()) for passage in found) == "".join(text.split())
    assert all(len(passage.text) <= 2 * PASSAGE_CHARS for passage in found)
    anchors = [passage.anchor for passage in found]
    assert len(set(anchors)) == len(anchors)
