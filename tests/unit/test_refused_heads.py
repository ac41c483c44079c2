"""What was refused before it was a request has a line in the log, but can't fill it."""

from __future__ import annotations

import logging

import pytest

from gateway.errors import BadRequest
from gateway.serving.refused_heads import LINES_PER_MINUTE, RefusedHeads
from gateway.telemetry.metrics import Metrics
from tests.support.waiting import FakeClock

ERROR = BadRequest("The request has no Host header.", code="invalid_http")


def test_lines_are_bounded_and_the_metrics_count_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock, metrics = FakeClock(), Metrics()
    refused = RefusedHeads(metrics, clock)
    for _ in range(LINES_PER_MINUTE + 500):
        refused.record(400, ERROR, "req_1", "192.0.2.1")
    assert len(caplog.records) == LINES_PER_MINUTE

    refused.record(400, ERROR, "req_2", "192.0.2.2")  # another address has lines of its own
    assert caplog.records[-1].getMessage() == "refused 400: The request has no Host header."
    assert caplog.records[-1].__dict__["fields"] == {
        "request_id": "req_2",
        "path": "unmatched",
        "status": 400,
        "error": "invalid_http",
        "client": "192.0.2.2",
        "left_out": 500,
    }
    clock.advance(60 / LINES_PER_MINUTE)
    refused.record(400, ERROR, "req_3", "192.0.2.1")
    assert "left_out" not in caplog.records[-1].__dict__["fields"]
    page = metrics.render().decode()
    assert f'shannon_requests_total{{route="unmatched",status="400"}} {LINES_PER_MINUTE + 502}.0' in page
    assert f'shannon_errors_total{{code="invalid_http"}} {LINES_PER_MINUTE + 502}.0' in page
