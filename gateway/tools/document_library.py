"""Keeps the index of the operator's folder as the folder is, in the background.

The folder is looked through every so often; what is new or changed is read in a process of its own and indexed, what
is gone is taken out. A folder that can't be listed, a disk that is away, changes nothing. Several gateways may share
folder and index: one at a time looks through it. Until the first round is over, searches find what is in already.
Raises IndexFailed; what goes wrong in the background is logged, once for each document and reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gateway.fair_slots import FairThreads
from gateway.settings.config import LocalSearchSettings
from gateway.tools.document_folder import File, read, scan
from gateway.tools.document_index import DocumentIndex, Entry, Excerpt, IndexFailed, Match
from gateway.tools.documents import Unreadable
from gateway.tools.passages import passages
from gateway.tools.reader import Reader

log = logging.getLogger(__name__)
T = TypeVar("T")

_MAX_PASSAGES = 10_000
"""Per document. Two megabytes of text have about two thousand."""


@dataclass(slots=True)
class Changes:
    """Numbers of documents that one scan changed."""

    indexed: int = 0
    failed: int = 0
    removed: int = 0


class DocumentLibrary:
    """The index and the task that keeps it up to date. `start` before use, `close` after."""

    def __init__(self, settings: LocalSearchSettings, index_path: Path, reader: Reader) -> None:
        self._settings = settings
        self._index = DocumentIndex(index_path, settings.folder)
        self._lock_path = index_path.with_name(index_path.name + ".lock")
        self._reader = reader
        self._threads = FairThreads(3, "documents")
        self._refreshing: asyncio.Task[None] | None = None
        self._opened = False
        self._retry_failed = True
        self.complete = False
        """The first scan is over."""

    async def start(self) -> None:
        """Start scanning in the background."""
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._keep_fresh(), name="documents")

    async def close(self) -> None:
        """Stop scanning and end the threads."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        self._threads.close()
        await self._reader.close()

    async def search(self, query: str, limit: int) -> list[Match]:
        """Return the best passages. Raises IndexFailed."""
        return await self._in_thread(lambda: self._index.search(query, limit))

    async def excerpt(self, url: str, anchor: str, max_chars: int) -> Excerpt | None:
        """Return part of a document, or None if it does not exist. Raises IndexFailed."""
        return await self._in_thread(lambda: self._index.excerpt(url, anchor, max_chars))

    async def refresh(self) -> Changes | None:
        """Look through the folder once; None where another gateway is about it. Raises IndexFailed and OSError."""
        if not self._opened:
            await self._in_thread(self._index.open)
            self._opened = True
        with self._alone() as alone:
            if not alone:
                return None
            try:
                changes = await self._catch_up()
            except IndexFailed as error:
                if error.damaged:
                    log.warning("the index of documents is damaged and is rebuilt: %s", error)
                    await self._in_thread(self._index.discard)
                    self._opened = False
                raise
        self.complete, self._retry_failed = True, False
        return changes

    async def _keep_fresh(self) -> None:
        said = ""
        while True:
            try:
                changes = await self.refresh()
                if changes and (changes.indexed or changes.removed):
                    log.info("documents: %d indexed, %d removed", changes.indexed, changes.removed)
                said = ""
            except (IndexFailed, OSError) as error:
                if str(error) != said:
                    log.warning("the folder of documents can't be checked: %s", error)
                said = str(error)
            except Exception:  # the next round may succeed, and only this task starts one
                log.exception("the folder of documents can't be checked")
            await asyncio.sleep(self._settings.refresh_s)

    async def _catch_up(self) -> Changes:
        files = await self._in_thread(lambda: scan(self._settings.folder))
        known = await self._in_thread(self._index.entries)
        changes = Changes()
        if gone := known.keys() - files.keys():
            await self._in_thread(lambda: self._index.remove(gone))
            changes.removed = len(gone)
        for url, file in files.items():
            entry = known.get(url)
            changed = entry is None or entry.signature != file.signature
            if changed or (entry is not None and entry.failure and self._retry_failed):
                if await self._take_in(file, entry):
                    changes.indexed += 1
                else:
                    changes.failed += 1
        return changes

    async def _take_in(self, file: File, entry: Entry | None) -> bool:
        """Read and index one document. Returns whether it could be read."""
        most = self._settings.max_file_bytes
        digest = ""
        try:
            content, signature = await self._in_thread(lambda: read(file, most))
            if len(content) > most:
                raise Unreadable(f"it is larger than {most} bytes")
            digest = await self._in_thread(lambda: hashlib.sha256(content).hexdigest())
            if entry is not None and entry.digest == digest and not entry.failure:
                await self._in_thread(lambda: self._index.touch(file.url, signature))
                return True
            document = await self._reader.read(content, file.kind)
        except (Unreadable, OSError) as error:
            failure = str(error) if isinstance(error, Unreadable) else "it can't be opened"
            if entry is None or entry.failure != failure:
                log.warning("a document can't be indexed: %s: %s", file.url, failure)
            failed = Entry(file.url, file.signature, digest, failure=failure)
            await self._in_thread(lambda: self._index.put(failed))
            return False
        title = document.title or file.name
        new = Entry(file.url, signature, digest, title, document.published)
        await self._in_thread(lambda: self._index.put(new, passages(document.text)[:_MAX_PASSAGES]))
        return True

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """Return whether this gateway may scan, and lock out the others meanwhile."""
        descriptor = os.open(self._lock_path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            alone = False
        except OSError:
            alone = True  # locks are unknown here; two at once do the same work twice, and no harm
        try:
            yield alone
        finally:
            os.close(descriptor)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await self._threads.run(work)
