"""A client of `/api/v1/chat`: submits jobs and reads their events from its stream.

Example:

    client = JobClient("c1")
    async with client.connected(gateway):
        job_id = await submitted(gateway, client.id, "hello")
        await until(lambda: client.ended(job_id))
    assert client.names(job_id)[-1] == "done"
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx

from tests.support.app import KEY
from tests.support.waiting import until


class Reachable(Protocol):
    """A gateway, in this process or in another."""

    @property
    def client(self) -> httpx.AsyncClient: ...


@dataclass
class JobClient:
    """A client, and everything that came on its stream."""

    id: str
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """In order, without `open` and `end`, each once."""
    opened: list[dict[str, Any]] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    """Reasons, and codes of the stream's own errors."""
    last: int | None = None
    response: httpx.Response | None = None

    @contextlib.asynccontextmanager
    async def connected(self, gateway: Reachable, key: str = KEY) -> AsyncIterator[None]:
        """Follow the stream inside the block, from where it was cut."""
        reading = asyncio.create_task(self.follow(gateway, key))
        before = len(self.opened)
        try:
            await until(lambda: len(self.opened) > before or reading.done())
            yield
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        if reading.done() and not reading.cancelled() and (error := reading.exception()):
            raise error

    async def follow(self, gateway: Reachable, key: str = KEY, most: int | None = None) -> None:
        """Read the stream, or the next `most` of its events."""
        headers = {"Authorization": f"Bearer {key}"}
        if self.last is not None:
            headers["Last-Event-ID"] = str(self.last)
        path = f"/api/v1/chat/stream/{self.id}"
        async with gateway.client.stream("GET", path, headers=headers) as response:
            self.response = response
            if response.status_code != 200:
                await response.aread()
                return
            async for name, number, fields in events_of(response):
                if name == "open":
                    self.opened.append(fields)
                    assert self.last is None or not fields["resumed"] or number == self.last
                elif name == "end" or number is None:
                    self.ends.append(fields["reason"] if name == "end" else fields["error"]["code"])
                    continue
                else:
                    assert number == (self.last or 0) + 1, "no event twice, none left out"
                    self.events.append((name, fields))
                self.last = number
                most = most if most is None or name == "open" else most - 1
                if most == 0:
                    return

    def of(self, job_id: str) -> list[tuple[str, dict[str, Any]]]:
        return [(name, fields) for name, fields in self.events if fields["job_id"] == job_id]

    def names(self, job_id: str) -> list[str]:
        """Return the names of a job's events, its tokens as one."""
        names = [name for name, _ in self.of(job_id)]
        return [name for number, name in enumerate(names) if name != "token" or names[number - 1] != "token"]

    def text(self, job_id: str) -> str:
        return "".join(fields["text"] for name, fields in self.of(job_id) if name == "token")

    def ended(self, job_id: str) -> bool:
        return any(name in ("done", "error") for name, _ in self.of(job_id))

    def in_order(self) -> list[str]:
        """Return the ids of the jobs that ended, in the order in which they did."""
        return [fields["job_id"] for name, fields in self.events if name in ("done", "error")]

    def check_turns(self) -> None:
        """Check that jobs were run one after the other."""
        running = None
        for name, fields in self.events:
            if name == "started":
                assert running is None
                running = fields["job_id"]
            elif name in ("token", "done"):
                assert fields["job_id"] == running
            if name in ("done", "error"):
                running = None


async def events_of(response: httpx.Response) -> AsyncIterator[tuple[str, int | None, dict[str, Any]]]:
    number, name = None, ""
    async for line in response.aiter_lines():
        if line.startswith("id: "):
            number = int(line.removeprefix("id: "))
        elif line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, number, json.loads(line.removeprefix("data: "))
            number, name = None, ""


async def submit(gateway: Reachable, client_id: str, prompt: str = "hello there", **fields: Any) -> httpx.Response:
    key = fields.pop("key", KEY)
    body = {"client_id": client_id, "prompt": prompt} | fields
    return await gateway.client.post("/api/v1/chat/submit", json=body, headers={"Authorization": f"Bearer {key}"})


async def submitted(gateway: Reachable, client_id: str, prompt: str = "hello there", **fields: Any) -> str:
    response = await submit(gateway, client_id, prompt, **fields)
    assert response.status_code == 202, response.text
    job_id: str = response.json()["job_id"]
    return job_id
