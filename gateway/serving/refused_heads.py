"""The access log's lines about what was refused before it was a request, and its place in the metrics.

Such bytes cost their sender little, so the lines are bounded for each address. Those that are left out are counted in
the next line; the metrics count all.
"""

from __future__ import annotations

import logging
import time

from gateway.access.address_limit import AddressLimit
from gateway.clock import Clock
from gateway.errors import GatewayError, RateLimitExceeded
from gateway.serving.middleware import UNMATCHED
from gateway.telemetry.metrics import Metrics

log = logging.getLogger("shannon.access")

LINES_PER_MINUTE = 60
"""Of one address; about 15 KB."""


class RefusedHeads:
    """The refusals of one server."""

    def __init__(self, metrics: Metrics, clock: Clock = time.monotonic) -> None:
        self._metrics = metrics
        self._lines = AddressLimit(LINES_PER_MINUTE, LINES_PER_MINUTE, clock)
        self._left_out = 0

    def record(self, status: int, error: GatewayError, request_id: str, client: str | None) -> None:
        """Count a refusal, and write its line if there is room for it. The error must not quote what was sent."""
        self._metrics.request(UNMATCHED, status, 0.0)
        self._metrics.error(error.code)
        try:
            self._lines.take(client or "")
        except RateLimitExceeded:
            self._left_out += 1
            return
        fields = {"request_id": request_id, "path": UNMATCHED, "status": status, "error": error.code, "client": client}
        if self._left_out:
            fields["left_out"] = self._left_out
            self._left_out = 0
        log.info("refused %d: %s", status, error, extra={"fields": fields})
