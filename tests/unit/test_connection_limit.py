"""Which connection makes room for a new one, and when there is none to make."""

from __future__ import annotations

import contextlib
import logging
import random
import resource
from collections import Counter

import pytest

from gateway.errors import Overloaded, RateLimitExceeded
from gateway.serving.connection_limit import ConnectionLimit, most_connections
from gateway.telemetry.metrics import Metrics
from tests.support.waiting import FakeClock


class Client:
    """A connection that knows whether it was closed."""

    def __init__(self, limit: ConnectionLimit) -> None:
        self._limit = limit
        self.closed = False
        limit.add(self)

    def abort(self) -> None:
        self.closed = True
        self._limit.discard(self)


def limit_of(most: int, clock: FakeClock | None = None) -> ConnectionLimit:
    return ConnectionLimit(most, Metrics(), clock or FakeClock())


def test_connection_that_waits_longest_makes_room() -> None:
    limit = limit_of(16)
    clients = [Client(limit) for _ in range(20)]

    assert [client.closed for client in clients] == [True] * 4 + [False] * 16
    assert limit.open == 16


def test_working_connection_is_not_closed() -> None:
    limit = limit_of(16)
    worker = Client(limit)
    limit.begin(worker, "a")
    later = [Client(limit) for _ in range(40)]

    assert not worker.closed
    assert sum(not client.closed for client in later) == 15


def test_connection_waits_from_the_end_of_its_request() -> None:
    limit = limit_of(16)
    worker, idle = Client(limit), Client(limit)
    limit.begin(worker, "a")
    limit.end(worker)
    for _ in range(15):
        Client(limit)

    assert (idle.closed, worker.closed) == (True, False)


def test_an_eighth_of_the_connections_never_works() -> None:
    limit = limit_of(16)
    clients = [Client(limit) for _ in range(16)]
    for number, client in enumerate(clients[:14]):
        limit.begin(client, f"key {number}")
    limit.begin(clients[0], "key 0")  # once more is nothing new
    with pytest.raises(Overloaded):
        limit.begin(clients[14], "another")
    limit.end(clients[3])
    limit.begin(clients[14], "another")

    assert limit.open == 16


@pytest.mark.parametrize(("keys", "share"), [(1, 3 / 4), (2, 3 / 7), (5, 3 / 16)])
def test_greedy_keys_leave_room_for_another(keys: int, share: float) -> None:
    limit = limit_of(1600)
    held = Counter[str]()
    for number in range(1400 * keys):
        key_id = f"key {number % keys}"
        with contextlib.suppress(RateLimitExceeded):
            limit.begin(Client(limit), key_id)
            held[key_id] += 1

    assert all(abs(count - share * 1400) <= 2 for count in held.values())
    for number in range(10):
        limit.begin(Client(limit), f"other {number}")


def test_connections_are_never_more_than_the_limit() -> None:
    limit = limit_of(16)
    choices = random.Random(7)
    clients: list[Client] = []
    for _ in range(5_000):
        clients = [client for client in clients if not client.closed]
        client = choices.choice(clients) if clients else None
        action = choices.randrange(5)
        if action < 2 or client is None:
            clients.append(Client(limit))
        elif action == 2:
            before = [other.closed for other in clients]
            try:
                limit.begin(client, choices.choice("abc"))
            except (Overloaded, RateLimitExceeded):
                assert len(clients) > 4
            assert [other.closed for other in clients] == before
        elif action == 3:
            limit.end(client)
        else:
            client.abort()
        assert limit.open == sum(not client.closed for client in clients) <= 16


def test_warning_is_one_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    limit = limit_of(16, clock)
    for _ in range(100):
        Client(limit)
    assert len(caplog.records) == 1
    clock.advance(61)
    Client(limit)
    assert len(caplog.records) == 2


def test_metrics_show_open_and_closed_connections() -> None:
    metrics = Metrics()
    limit = ConnectionLimit(16, metrics, FakeClock())
    clients = [Client(limit) for _ in range(19)]
    clients[-1].abort()
    page = metrics.render().decode()

    assert "shannon_connections 15.0" in page
    assert "shannon_connections_closed_total 3.0" in page


NONE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "raised", "most"),
    [
        (65_536, 65_536, 65_536, 8192),
        (NONE, NONE, NONE, 8192),
        (1024, 524_288, 16_384, 8192),
        (1024, NONE, 16_384, 8192),
        (1024, 4096, 4096, 2048),
        (1024, 1024, 1024, 512),
        (12, 12, 12, 8),
    ],
)
def test_clients_get_half_of_the_files(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, soft: int, hard: int, raised: int, most: int
) -> None:
    caplog.set_level(logging.INFO)
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: limits.append(both))

    assert most_connections(8192) == most
    assert limits[-1] == (raised, hard)
    assert bool(caplog.records) == (most < 8192)
