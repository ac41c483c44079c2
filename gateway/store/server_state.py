"""What the gateway knows of its store's server: its clock, its memory, and whether it takes writes.

A server that is full, that can't write to its disk, or that has fewer replicas than it must have, still answers reads.
It is logged once when that begins and once when it ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any, Literal

from redis.exceptions import OutOfMemoryError

from gateway.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

Refusal = Literal["full", "disk", "replicas"]
REFUSALS: dict[Refusal, str] = {
    "full": "The store is full and takes no writes.",
    "disk": "The store can't write to its disk and takes no writes.",
    "replicas": "The store has too few replicas and takes no writes.",
}
"""Messages for clients, by the reason why the server takes no writes."""
_FREE = 0.98
"""A full store counts as full until less than this share of its maxmemory is in use, although small writes succeed
earlier."""


def refusal_of(error: BaseException) -> Refusal | None:
    """Return why the server refused a write, or None if this is another kind of error."""
    if isinstance(error, OutOfMemoryError):
        return "full"
    code = str(error).partition(" ")[0]
    return "disk" if code == "MISCONF" else "replicas" if code == "NOREPLICAS" else None


class StoreState:
    """State of the server. Lanes report refused writes, a poll the rest."""

    def __init__(self, metrics: Metrics) -> None:
        self.refusal: Refusal | None = None
        """Reason why the server takes no writes, or None."""
        self._metrics = metrics
        self._ahead_s = time.time() - time.monotonic()
        self._memory = ""
        self._crowded = False
        self.changed = asyncio.Event()
        """Set when the server stops taking writes, or takes them again."""

    def time_s(self) -> float:
        """Return the Unix time on the server's clock, or on this machine's until that is known."""
        return time.monotonic() + self._ahead_s

    def set_clock(self, unix_s: float) -> None:
        """Record the server's current time."""
        self._ahead_s = unix_s - time.monotonic()

    def refused(self, refusal: Refusal) -> None:
        """Note that the server refused a write."""
        if self.refusal == refusal:
            return
        self._set(refusal)
        if refusal == "full":
            log.error(
                "the store is full%s: it takes no writes but for limits, usage and changes to keys. Reads continue. "
                "Raise its maxmemory, or store.max_memory_mb of the bundled server",
                self._memory,
            )
        elif refusal == "disk":
            log.error(
                "the store can't write to its disk, and takes no writes; reads continue. See its log and its disk"
            )
        else:
            log.error(
                "the store has fewer replicas than its min-replicas-to-write, and takes no writes; reads continue. "
                "See its replicas"
            )

    def remember(self, info: Mapping[str, Any]) -> None:
        """Record the answer to INFO memory."""
        used = int(info.get("used_memory", 0)) - int(info.get("mem_not_counted_for_evict", 0) or 0)
        most = int(info.get("maxmemory", 0) or 0)
        self._metrics.store_memory_used.set(used)
        self._metrics.store_memory_max.set(most)
        self._memory = f" ({used / 2**20:.0f} of {most / 2**20:.0f} MiB)" if most else ""
        self._crowded = bool(most) and used >= _FREE * most

    def accepted(self) -> None:
        """Record that the server accepted a small write."""
        if self.refusal is not None and not (self.refusal == "full" and self._crowded):
            self._set(None)
            log.warning("the store takes writes again%s", self._memory)

    def _set(self, refusal: Refusal | None) -> None:
        self.refusal = refusal
        self.changed.set()
        for reason in REFUSALS:
            self._metrics.store_writes_refused.labels(reason).set(reason == refusal)
