"""Reads untrusted documents in processes that can be killed.

A page of a few megabytes keeps the best of HTML parsers busy for half a minute, and its regular expressions hold
Python's lock while they run: a thread could neither be stopped nor kept from stopping the event loop with it. So each
document goes to one of a few processes, which is killed when it takes too long or when no caller waits any more. They
are started at the first document and end when they have been idle. Raises Unreadable.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import AsyncIterator

from gateway.fair_slots import FairSlots
from gateway.tools.documents import Document, Kind, Unreadable
from gateway.tools.reader_process import LENGTH

log = logging.getLogger(__name__)

MAX_MEMORY_BYTES = 2**30
"""Address space of one process. Parsing a page of 1 MB takes about 200 MB."""
_START_S = 10.0
"""Time to start a process, added to the document's timeout."""
_MAX_DOCUMENTS = 200
"""Documents that one process reads before it is replaced: parsers leak memory."""

KINDS: dict[str, Kind] = {
    "text/html": "html",
    "application/xhtml+xml": "html",
    "application/pdf": "pdf",
    "application/x-pdf": "pdf",
    "text/markdown": "markdown",
    "text/x-markdown": "markdown",
    "application/json": "text",
    "application/xml": "text",
    "application/yaml": "text",
}


def kind_of(media_type: str, content: bytes) -> Kind | None:
    """Return the kind of document, or None if it can't be read."""
    head = content[:1024].lstrip().lower()
    if head.startswith(b"%pdf-"):
        return "pdf"
    if media_type in KINDS:
        return KINDS[media_type]
    if media_type in ("", "text/plain", "application/octet-stream") and head.startswith((b"<!doctype html", b"<html")):
        return "html"
    if media_type.startswith("text/") or media_type.endswith(("+json", "+xml")):
        return "text"
    return None


class _Process:
    """One process, idle or reading one document."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.documents = 0
        self.gone = asyncio.create_task(process.wait())
        """Ends when the process has ended and is reaped."""

    @property
    def usable(self) -> bool:
        return not self.gone.done() and self.documents < _MAX_DOCUMENTS

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def ask(self, request: dict[str, object], content: bytes) -> dict[str, str]:
        """Return its answer. Raises OSError and EOFError if it dies."""
        self.documents += 1
        writer, reader = self._process.stdin, self._process.stdout
        assert writer is not None
        assert reader is not None
        line = json.dumps(request).encode() + b"\n"
        writer.write(LENGTH.pack(len(line) + len(content)) + line)
        writer.write(content)
        await writer.drain()
        (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        answer: dict[str, str] = json.loads(await reader.readexactly(length))
        return answer


class Reader:
    """Pool of at most `processes` processes."""

    def __init__(self, *, processes: int = 2, timeout_s: float = 15.0, idle_s: float = 60.0) -> None:
        """`timeout_s` is per document. A process ends after `idle_s` without one."""
        self._timeout_s = timeout_s
        self._idle_s = idle_s
        self._slots = FairSlots(processes)
        self._idle: dict[_Process, asyncio.TimerHandle] = {}
        self._starting: set[asyncio.Task[_Process]] = set()
        self._all: set[_Process] = set()
        self._closed = False

    @property
    def processes(self) -> int:
        """Current number of processes."""
        return len(self._all)

    async def read(self, content: bytes, kind: Kind, *, charset: str = "", max_chars: int = 2**21) -> Document:
        """The text of a document. Raises Unreadable; cancelling kills the process that reads it.

        Waits for a process as long as one document may take. Keys share the processes fairly: of two, one key gets one.
        """
        request = {"kind": kind, "charset": charset, "max_chars": max_chars, "timeout_s": self._timeout_s + 1.0}
        async with self._slot():
            process = await self._take()
            whole = False
            try:
                async with asyncio.timeout(self._timeout_s):
                    answer = await process.ask(request, content)
                whole = True
            except TimeoutError:
                raise Unreadable(f"it took longer than {self._timeout_s:g} s to read") from None
            except (OSError, EOFError) as error:  # of memory, of its alarm, or of a parser's own fault
                log.warning("a process died while it read a document (%s, %d bytes)", kind, len(content))
                raise Unreadable("it can't be read") from error
            finally:
                self._give_back(process, whole)
        if "error" in answer:
            if "reason" in answer:
                log.info("a document (%s, %d bytes) can't be read: %s", kind, len(content), answer["reason"])
            raise Unreadable(answer["error"])
        return Document(answer["text"], answer["title"], answer["published"])

    @contextlib.asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._timeout_s):
                key_id = await self._slots.take()
        except TimeoutError:
            raise Unreadable("too many documents are being read at the moment") from None
        try:
            yield
        finally:
            self._slots.give_back(key_id)

    async def start(self) -> None:
        """Do nothing: processes start on demand."""

    async def close(self) -> None:
        """Kill all processes and wait for their end."""
        self._closed = True
        await asyncio.gather(*self._starting, return_exceptions=True)
        for process in list(self._all):
            self._end(process)
        await asyncio.gather(*(process.gone for process in list(self._all)), return_exceptions=True)

    async def _take(self) -> _Process:
        while self._idle:
            process, timer = self._idle.popitem()
            timer.cancel()
            if process.usable:
                return process
            self._end(process)
        # Shielded: to cancel it halfway would leave an unknown process behind.
        start = asyncio.ensure_future(self._start())
        self._starting.add(start)
        start.add_done_callback(self._starting.discard)
        try:
            async with asyncio.timeout(_START_S):
                return await asyncio.shield(start)
        except BaseException as error:
            start.add_done_callback(self._end_unwanted)
            if isinstance(error, OSError):  # TimeoutError is one
                log.error("can't start a process to read documents: %r", error)
                raise Unreadable("documents can't be read at the moment") from error
            raise

    async def _start(self) -> _Process:
        if self._closed:
            raise OSError("closed")
        # No secrets; and packages from where this process has them, because PYTHONPATH may name them.
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path if path),
            "LANG": "C.UTF-8",
        }
        command = (sys.executable, "-m", "gateway.tools.reader_process", str(MAX_MEMORY_BYTES))
        process = _Process(
            await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # a Ctrl-C is for the gateway, which drains first
            )
        )
        self._all.add(process)
        process.gone.add_done_callback(lambda _: self._all.discard(process))
        return process

    def _end_unwanted(self, start: asyncio.Task[_Process]) -> None:
        if not start.cancelled() and start.exception() is None:
            self._end(start.result())

    def _give_back(self, process: _Process, whole: bool) -> None:
        """Keep a process for the next document, unless it died or may still be busy."""
        if whole and process.usable and not self._closed:
            timer = asyncio.get_running_loop().call_later(self._idle_s, self._end, process)
            self._idle[process] = timer
        else:
            self._end(process)

    def _end(self, process: _Process) -> None:
        timer = self._idle.pop(process, None)
        if timer is not None:
            timer.cancel()
        process.kill()
