"""Behind a proxy that keeps connections open, nobody reads what another asked, and no request is made inside another.

The proxy is nginx with the WebSocket recipe of its documentation, which forwards Upgrade. Its access log says which
requests it has read itself: the gateway must process no others.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import httpx
import pytest

from engine.mock import MockEngine
from tests.support.app import KEY, Gateway, Start
from tests.support.hostile_framings import generate
from tests.support.nginx import Nginx, run_nginx

pytestmark = pytest.mark.anyio

VICTIMS = 500
UNLIMITED = {"limits": {"enabled": False, "failed_auth_per_minute": 100_000}}


@contextlib.contextmanager
def nginx_before(gateway: Gateway, folder: Path) -> Iterator[Nginx]:
    with run_nginx(gateway.url.removeprefix("http://"), folder / "nginx") as nginx:
        yield nginx


async def send(port: int, raw: bytes, most_bytes: int = -1) -> bytes:
    """Send bytes on a new connection, and return what comes until it is closed, or the first that comes if there is a
    bound."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(raw)
        return await asyncio.wait_for(reader.read(most_bytes), 10)
    except ConnectionError:
        return b""
    finally:
        writer.close()


def request(path: str, key: str, fields: object, *lines: str, padding: bytes = b"", inner: bytes = b"") -> bytes:
    body = padding + (inner or json.dumps(fields).encode())
    head = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", f"Content-Length: {len(body)}", *lines]
    return "\r\n".join([*head, "", ""]).encode() + body


@pytest.mark.parametrize("door", ["buffered_port", "unbuffered_port"])
async def test_upgrade_smuggles_nothing_to_other_users(serve: Start, tmp_path: Path, door: str) -> None:
    gateway = await serve(config=UNLIMITED, mock=lambda: MockEngine(max_model_len=100_000))
    attack_ended = asyncio.Event()
    attacks = 0

    def chat(text: str) -> dict[str, object]:
        return {"messages": [{"role": "user", "content": text}]}

    with nginx_before(gateway, tmp_path) as nginx:
        port: int = getattr(nginx, door)
        assert (await gateway.client.post(f"http://127.0.0.1:{port}/admin/keys", json={"name": "a"})).status_code == 403

        async def attack(padding_lines: int) -> None:
            nonlocal attacks
            inner = request("/v1/chat/completions", KEY, chat("ATTACKER " + "w " * 900))
            make_key = request("/admin/keys", KEY, {"name": "smuggled"})
            upgrade = ("Connection: Upgrade", "Upgrade: h2c")
            while not attack_ended.is_set():
                for hidden in (inner, make_key):
                    padding = b"\r\n" * padding_lines  # where the reads fall decides what a careless parser drops
                    raw = request("/v1/chat/completions", KEY, None, *upgrade, padding=padding, inner=hidden)
                    await send(port, raw, 300)
                    attacks += 1

        wrong = []
        numbers = count()

        async def ask(client: httpx.AsyncClient) -> None:
            while (number := next(numbers)) < VICTIMS:
                answer = await client.post(
                    "/v1/chat/completions", json=chat(f"victim-{number} " + "z " * 40), timeout=20
                )
                if f"You said: victim-{number} " not in answer.text:
                    wrong.append((number, answer.text[:200]))

        attackers = [asyncio.create_task(attack(padding)) for padding in (0, 8_000, 30_000)]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=gateway.client.headers) as client:
            await asyncio.gather(*(ask(client) for _ in range(4)))
        attack_ended.set()
        await asyncio.gather(*attackers)

    assert wrong == []
    assert attacks > 10
    keys = (await gateway.client.get("/admin/keys")).json()["data"]
    assert [key["name"] for key in keys if key["name"] == "smuggled"] == []


@pytest.mark.parametrize("door", ["buffered_port", "unbuffered_port"])
async def test_gateway_processes_what_nginx_has_read_and_nothing_else(
    serve: Start, tmp_path: Path, door: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    gateway = await serve(config=UNLIMITED)
    framings = list(generate(KEY))
    wrong = []
    with nginx_before(gateway, tmp_path) as nginx:
        port: int = getattr(nginx, door)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=gateway.client.headers) as client:
            for framing in framings:
                await send(port, framing.raw)
                victim = await client.get(f"/v1/models/{framing.name}")  # by the same connections of the proxy
                if framing.name not in victim.text or victim.status_code != 404:
                    wrong.append((framing.raw[:300], victim.text[:300]))
        seen_by_nginx = {line.partition("?")[0] for line in nginx.requests()}
    records = [record for record in caplog.records if record.name == "shannon.access"]
    markers = {
        path for record in records if (path := record.getMessage().split()[1]).startswith(("/smuggled", "/after"))
    }

    assert wrong == []
    assert markers <= seen_by_nginx
    assert len(markers) > 100, "those behind a sound framing are served"
