"""A full-text index of documents in one SQLite file.

Each method opens a connection of its own, so any thread and any number of processes may use the index at once; a
document is replaced in one transaction. The index holds nothing that can't be made again: one that is damaged, of
another version or of another folder is thrown away. Does not handle ranking by meaning, and network file systems, which
SQLite's log does not work on. Raises IndexFailed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.tools.passages import Passage
from gateway.tools.search_terms import TOKENIZER, gapped, match_expression, ungapped

log = logging.getLogger(__name__)

_VERSION = 1
_BUSY_S = 10.0
"""How long a writer waits for another one, in this process or another gateway."""
_QUERY_S = 5.0
_CANDIDATES = 100
_SNIPPET_WORDS = 60  # SQLite allows 64
_WEIGHTS = "4.0, 2.0, 1.0"
"""Weights of a word in a document's name, in a heading and in the text."""
_SCHEMA = f"""
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE documents (
    id INTEGER PRIMARY KEY,
    url TEXT NOT NULL UNIQUE,
    signature TEXT NOT NULL,
    digest TEXT NOT NULL,
    title TEXT NOT NULL,
    published TEXT NOT NULL,
    failure TEXT NOT NULL
);
CREATE TABLE passages (
    id INTEGER PRIMARY KEY,
    document_id INTEGER NOT NULL REFERENCES documents(id),
    number INTEGER NOT NULL,
    anchor TEXT NOT NULL
);
CREATE INDEX passages_of ON passages(document_id, number);
CREATE VIRTUAL TABLE words USING fts5(
    name, heading, text, tokenize = "{TOKENIZER}"
);
"""
_SEARCH = f"""
SELECT documents.id, url, anchor, title, published, snippet(words, 2, '', '', ' ... ', {_SNIPPET_WORDS})
FROM words JOIN passages ON passages.id = words.rowid JOIN documents ON documents.id = document_id
WHERE words MATCH ? AND rank MATCH 'bm25({_WEIGHTS})' ORDER BY rank LIMIT {_CANDIDATES}
"""


class IndexFailed(Exception):
    """The index can't be used now, or ever if `damaged`. The message is for the log."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        # Its subclasses are about locks, full disks and the like.
        self.damaged = type(error) is sqlite3.DatabaseError


@dataclass(frozen=True, slots=True)
class Entry:
    """A document in the index, without its text. `failure` says why it could not be read."""

    url: str
    signature: str
    digest: str
    title: str = ""
    published: str = ""
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Match:
    """A passage found by a search."""

    url: str
    anchor: str
    title: str
    published: str
    snippet: str


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A document, or part of it."""

    url: str
    title: str
    published: str
    passages: Sequence[Passage]
    cut_before: bool
    cut_after: bool


class DocumentIndex:
    """The index of one folder."""

    def __init__(self, path: Path, folder: Path) -> None:
        """`path` is the index file, `folder` the folder of its documents."""
        self._path = path
        self._folder = os.path.realpath(folder)

    def open(self) -> None:
        """Make the index ready for writing, from nothing where what is there can't be used. Raises IndexFailed."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._touch()
            try:
                self._create()
            except sqlite3.DatabaseError as error:
                if type(error) is not sqlite3.DatabaseError:
                    raise
                log.warning("the index of documents is damaged and is rebuilt: %s", error)
                self.discard()
                self._touch()
                self._create()
        except (OSError, sqlite3.Error) as error:
            raise IndexFailed(error) from error

    def discard(self) -> None:
        """Delete the index. Raises OSError."""
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self._path}{suffix}").unlink(missing_ok=True)

    def entries(self) -> dict[str, Entry]:
        """Return all documents by name. Raises IndexFailed."""
        columns = "url, signature, digest, title, published, failure"
        with self._connection() as connection:
            return {row[0]: Entry(*row) for row in connection.execute(f"SELECT {columns} FROM documents")}

    def put(self, entry: Entry, passages: Iterable[Passage] = ()) -> None:
        """Insert or replace a document. Raises IndexFailed."""
        name = gapped(f"{entry.title} {entry.url}")
        with self._connection(write=True) as connection:
            _remove(connection, entry.url)
            cursor = connection.execute(
                "INSERT INTO documents (url, signature, digest, title, published, failure) VALUES (?, ?, ?, ?, ?, ?)",
                (entry.url, entry.signature, entry.digest, entry.title, entry.published, entry.failure),
            )
            document_id = cursor.lastrowid
            for number, passage in enumerate(passages):
                cursor = connection.execute(
                    "INSERT INTO passages (document_id, number, anchor) VALUES (?, ?, ?)",
                    (document_id, number, passage.anchor),
                )
                connection.execute(
                    "INSERT INTO words (rowid, name, heading, text) VALUES (?, ?, ?, ?)",
                    (cursor.lastrowid, name, gapped(passage.heading), gapped(passage.text)),
                )

    def touch(self, url: str, signature: str) -> None:
        """Record that a file changed but its content did not. Raises IndexFailed."""
        with self._connection(write=True) as connection:
            connection.execute("UPDATE documents SET signature = ? WHERE url = ?", (signature, url))

    def remove(self, urls: Iterable[str]) -> None:
        """Remove documents. Raises IndexFailed."""
        with self._connection(write=True) as connection:
            for url in urls:
                _remove(connection, url)

    def search(self, query: str, limit: int) -> list[Match]:
        """Return the best passages, first one of each document. Raises IndexFailed."""
        expression = match_expression(query)
        if not expression:
            return []
        with self._connection() as connection:
            rows = connection.execute(_SEARCH, (expression,)).fetchall()
        first: list[Match] = []
        more: list[Match] = []
        seen: set[int] = set()
        for document_id, url, anchor, title, published, snippet in rows:
            match = Match(url, anchor, title, published, " ".join(ungapped(snippet).split()))
            (more if document_id in seen else first).append(match)
            seen.add(document_id)
        return (first + more)[:limit]

    def excerpt(self, url: str, anchor: str, max_chars: int) -> Excerpt | None:
        """Return a document from shortly before `anchor`, or all of a short one. None if it does not exist.

        Raises IndexFailed.
        """
        with self._connection() as connection:
            found = connection.execute(
                "SELECT id, title, published FROM documents WHERE url = ? AND failure = ''", (url,)
            ).fetchone()
            if found is None:
                return None
            sizes = connection.execute(
                "SELECT passages.id, anchor, length(text) FROM passages JOIN words ON words.rowid = passages.id "
                "WHERE document_id = ? ORDER BY number",
                (found[0],),
            ).fetchall()
            first, last = _window([size for _, _, size in sizes], _place(sizes, anchor), max_chars)
            passages = []
            for passage_id, name, _ in sizes[first:last]:
                heading, text = connection.execute(
                    "SELECT heading, text FROM words WHERE rowid = ?", (passage_id,)
                ).fetchone()
                passages.append(Passage(name, ungapped(heading), ungapped(text)))
        return Excerpt(url, found[1], found[2], passages, first > 0, last < len(sizes))

    def _create(self) -> None:
        """Create the tables, unless they exist for this version and folder."""
        with contextlib.closing(sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")  # who searches does not wait for who writes
            connection.execute("BEGIN IMMEDIATE")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == _VERSION:
                folder = connection.execute("SELECT value FROM about WHERE name = 'folder'").fetchone()
                if folder == (self._folder,):
                    connection.execute("COMMIT")
                    return
            for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                if name in ("about", "documents", "passages", "words"):
                    connection.execute(f"DROP TABLE {name}")
            for statement in _SCHEMA.split(";\n"):
                connection.execute(statement)
            connection.execute("INSERT INTO about VALUES ('folder', ?)", (self._folder,))
            connection.execute(f"PRAGMA user_version = {_VERSION}")
            connection.execute("COMMIT")

    def _touch(self) -> None:
        """Create the file if it does not exist, readable by its owner only."""
        os.close(os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))

    @contextlib.contextmanager
    def _connection(self, *, write: bool = False) -> Iterator[sqlite3.Connection]:
        """Open the index for one transaction. Raises IndexFailed."""
        try:
            # Never made here; and always for writing, for who only reads can't restore the log of a writer that died.
            address = f"{self._path.absolute().as_uri()}?mode=rw"
            with contextlib.closing(
                sqlite3.connect(address, uri=True, timeout=_BUSY_S, isolation_level=None)
            ) as connection:
                if write:
                    connection.execute("PRAGMA synchronous = NORMAL")
                    connection.execute("BEGIN IMMEDIATE")
                else:
                    deadline = time.monotonic() + _QUERY_S
                    connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
                    connection.execute("PRAGMA query_only = ON")
                    connection.execute("BEGIN")
                yield connection
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise IndexFailed(error) from error


def _remove(connection: sqlite3.Connection, url: str) -> None:
    of_document = "SELECT passages.id FROM passages JOIN documents ON documents.id = document_id WHERE url = ?"
    connection.execute(f"DELETE FROM words WHERE rowid IN ({of_document})", (url,))
    connection.execute(f"DELETE FROM passages WHERE id IN ({of_document})", (url,))
    connection.execute("DELETE FROM documents WHERE url = ?", (url,))


def _place(sizes: Sequence[tuple[int, str, int]], anchor: str) -> int:
    return next((place for place, (_, name, _) in enumerate(sizes) if name == anchor), 0)


def _window(sizes: Sequence[int], place: int, max_chars: int) -> tuple[int, int]:
    """Return the range of passages to show around `place`, most of it after `place`."""
    first, last = place, place
    room = max_chars
    while last < len(sizes) and (sizes[last] <= room or last == place):
        room -= sizes[last]
        last += 1
        if last == place + 1 and first and sizes[first - 1] <= room // 4:
            first -= 1
            room -= sizes[first]
    while first and sizes[first - 1] <= room:
        first -= 1
        room -= sizes[first]
    return first, last
