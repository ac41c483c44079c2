"""The X-RateLimit headers of a response.

Example:

    assert_six(response)
    requests, tokens = remaining(response)
"""

from __future__ import annotations

import re
from datetime import UTC, datetime

import httpx

SIX = [f"x-ratelimit-{kind}-{of}" for kind in ("limit", "remaining", "reset") for of in ("requests", "tokens")]


def remaining(response: httpx.Response) -> tuple[int, int]:
    return tuple(int(response.headers[f"x-ratelimit-remaining-{of}"]) for of in ("requests", "tokens"))  # type: ignore[return-value]


def assert_six(response: httpx.Response) -> None:
    assert [name for name in SIX if name not in response.headers] == []
    assert all(response.headers.get_list(name) == [response.headers[name]] for name in SIX), "each only once"
    for of in ("requests", "tokens"):
        reset = response.headers[f"x-ratelimit-reset-{of}"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", reset)
        away_s = datetime.fromisoformat(reset).timestamp() - datetime.now(UTC).timestamp()
        assert -2 < away_s < 63
