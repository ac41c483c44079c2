"""One file over HTTP into a cache, continuing where an earlier attempt, or an earlier process, stopped.

The bytes grow in a partial file that is locked while it is written, and become the blob once their checksum is
right. `engine.weights.cache` knows the hub. Raises Damaged, and what httpx2,
huggingface_hub and the file system raise.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from httpx2 import AsyncClient

MAX_TRIES = 8
"""Limit on successive connections without data."""
MAX_WAIT_S = 30.0
STALL_S = 30.0
"""Silence after which a connection is closed."""
_LOCK_POLL_S = 1.0

OnBytes = Callable[[int], None]
"""Called with the number of new bytes; a negative number means that bytes were discarded."""


class Damaged(Exception):
    """The downloaded file had a wrong checksum twice."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """A file to download. `checksum` is a SHA-256, or git's SHA-1 of a blob, in hexadecimal."""

    name: str
    url: str
    headers: dict[str, str]
    partial: Path
    blob: Path
    size_bytes: int
    checksum: str
    retry_s: float = 1.0
    """The wait after the first failure; doubles after each further one."""


def size_of(path: Path) -> int | None:
    """Return a file's size in bytes, or None if there is no file."""
    try:
        return path.stat().st_size
    except OSError:
        return None


async def fetch(client: AsyncClient, transfer: Transfer, on_bytes: OnBytes) -> None:
    """Complete the partial file, verify it, and rename it to the blob. After cancellation the partial file remains."""
    transfer.partial.parent.mkdir(parents=True, exist_ok=True)
    async with _locked(transfer) as out:
        if out is None:  # another process has brought it meanwhile
            on_bytes(transfer.size_bytes)
            return
        on_bytes(out.seek(0, os.SEEK_END))
        for _ in range(2):
            await _complete(client, transfer, out, on_bytes)
            if await asyncio.to_thread(_is_right, transfer):
                await asyncio.to_thread(os.fsync, out.fileno())  # no blob may be shorter after a power cut
                transfer.partial.replace(transfer.blob)
                return
            out.truncate(0)
            on_bytes(-transfer.size_bytes)
    raise Damaged(transfer.name)


@contextlib.asynccontextmanager
async def _locked(transfer: Transfer) -> AsyncIterator[BinaryIO | None]:
    """Open the partial file exclusively, or yield None if the blob exists."""
    while True:
        with transfer.partial.open("a+b") as out:
            mine = True
            try:
                fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                mine = False
            except OSError:
                pass  # no locks on this file system: two writers would only spoil the checksum
            if mine and size_of(transfer.blob) == transfer.size_bytes:
                transfer.partial.unlink(missing_ok=True)
                yield None
                return
            # The former holder of the lock may have made the file the blob, and freed its name.
            if mine and _is_named(out, transfer.partial):
                yield out
                return
        await asyncio.sleep(_LOCK_POLL_S)


def _is_named(file: BinaryIO, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


async def _complete(client: AsyncClient, transfer: Transfer, out: BinaryIO, on_bytes: OnBytes) -> None:
    """Append to `out` until it has the file's size, over as many connections as it takes."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    tries = 0
    while (have := out.seek(0, os.SEEK_END)) != transfer.size_bytes:
        wait_s = min(MAX_WAIT_S, transfer.retry_s * 2**tries)
        tries += 1
        try:
            await _append(client, transfer, out, on_bytes)
        except HfHubHTTPError as error:
            passing = error.response.status_code in (408, 429) or error.response.status_code >= 500
            if not passing or tries == MAX_TRIES:
                raise
            with contextlib.suppress(KeyError, ValueError):
                wait_s = min(MAX_WAIT_S, float(error.response.headers["Retry-After"]))
        except httpx2.TransportError:
            if tries == MAX_TRIES:
                raise
        now = out.seek(0, os.SEEK_END)
        if now > have:
            tries = 0
        elif tries == MAX_TRIES:
            raise httpx2.ReadError("nothing comes any more")
        if now != transfer.size_bytes:
            await asyncio.sleep(wait_s)


async def _append(client: AsyncClient, transfer: Transfer, out: BinaryIO, on_bytes: OnBytes) -> None:
    """Append the data of one connection."""
    import httpx2
    from huggingface_hub import hf_raise_for_status

    have = out.seek(0, os.SEEK_END)
    if have > transfer.size_bytes:
        have = _restart(out, have, on_bytes)
    # In a compressed body the place to continue is unknown.
    headers = transfer.headers | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    timeout = httpx2.Timeout(STALL_S)
    async with client.stream("GET", transfer.url, headers=headers, timeout=timeout) as response:
        hf_raise_for_status(response)
        if have and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = _restart(out, have, on_bytes)  # it sends all of it
        async for piece in response.aiter_raw():
            out.write(piece)
            out.flush()  # after a kill the file has everything that was reported
            on_bytes(len(piece))


def _restart(out: BinaryIO, have: int, on_bytes: OnBytes) -> int:
    out.truncate(0)
    on_bytes(-have)
    return 0


def _is_right(transfer: Transfer) -> bool:
    digest = hashlib.sha256() if len(transfer.checksum) == 64 else hashlib.sha1(b"blob %d\0" % transfer.size_bytes)
    with transfer.partial.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest() == transfer.checksum
