"""The prefix cache as tenants see it, through the API: one's own prompts are cached, nobody else's are."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.local.embedded import EmbeddedEngine
from engine.supervisor import SupervisedEngine
from gateway.app import create_app
from gateway.components import build_authenticator, build_store
from gateway.services import Services
from gateway.settings.config import parse_config
from tests.support.engine.borrowed import Borrowed

pytestmark = [pytest.mark.anyio, pytest.mark.vllm]

KEYS = {
    "alice": "acme",
    "anna": "acme",
    "bob": "initech",
    "carol": "globex",
    "chris": "globex-labs",
}
"""Keys by name, and their tenants."""


@pytest.fixture
async def client(engine: EmbeddedEngine, store_url: str, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway in process before the engine of all tests, with a key of each of KEYS; globex and its labs share."""
    config = parse_config(
        {
            "engines": {"main": {"kind": "embedded"}},
            "models": {"shannon-chat": {"description": "General chat completion", "defaults": {"temperature": 0}}},
            "keys": [{"name": name, "key_env": name.upper(), "tenant": tenant} for name, tenant in KEYS.items()],
            "prefix_cache": {"shared": {"globex": ["globex", "globex-labs"]}},
            "store": {"data_dir": str(tmp_path), "command_timeout_ms": 2000},
        }
    )
    variables = {name.upper(): f"a-key-of-{name}-chosen-by-hand" for name in KEYS} | {"SHANNON_REDIS_URL": store_url}
    store = build_store(config, variables)
    supervised = SupervisedEngine("main", lambda: Borrowed(engine))
    app = create_app(config, {"main": supervised}, store, build_authenticator(config, store, variables))
    services: Services = app.state.services
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway.test") as client:
        await store.start()
        await services.cache_salts.start()
        await supervised.start()
        yield client
        await supervised.close()
        await services.ledger.close()
        await store.close()


async def post(client: httpx.AsyncClient, name: str, path: str, **fields: Any) -> dict[str, Any]:
    """Post as `name` and return the body."""
    headers = {"Authorization": f"Bearer a-key-of-{name}-chosen-by-hand"}
    response = await client.post(path, json=fields | {"max_tokens": 1}, headers=headers)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def cached(client: httpx.AsyncClient, name: str, text: str, **fields: Any) -> int:
    """Return how many tokens of a prompt were served from the cache."""
    body = await post(client, name, "/v1/chat/completions", messages=[{"role": "user", "content": text}], **fields)
    usage = body["usage"]
    assert usage["prompt_tokens"] > 64
    tokens: int = usage["prompt_tokens_details"]["cached_tokens"]
    return tokens


def fresh_text() -> str:
    """Return a text of more than one block that nobody has sent yet."""
    return f"{uuid.uuid4().hex} " + "What is vLLM? " * 15


async def test_no_tokens_are_cached_across_tenants_and_some_within_one(client: httpx.AsyncClient) -> None:
    text = fresh_text()

    assert await cached(client, "alice", text) == 0
    assert await cached(client, "alice", text) >= 32
    assert await cached(client, "anna", text) >= 32, "another key of the same tenant"
    assert await cached(client, "bob", text) == 0
    assert await cached(client, "carol", text) == 0
    assert await cached(client, "bob", text) >= 32


async def test_tenants_of_a_group_share(client: httpx.AsyncClient) -> None:
    text = fresh_text()

    assert await cached(client, "carol", text) == 0
    assert await cached(client, "chris", text) >= 32
    assert await cached(client, "alice", text) == 0


async def test_tools_and_history_are_no_way_round(client: httpx.AsyncClient) -> None:
    text = fresh_text()
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}

    assert await cached(client, "alice", text, tools=[tool]) == 0
    assert await cached(client, "bob", text, tools=[tool]) == 0
    assert await cached(client, "alice", text, tools=[tool]) >= 32


async def test_bare_prompts_are_kept_apart_as_well(client: httpx.AsyncClient) -> None:
    text = fresh_text()

    async def of(name: str) -> int:
        body = await post(client, name, "/v1/completions", prompt=text)
        tokens: int = body["usage"]["prompt_tokens_details"]["cached_tokens"]
        return tokens

    assert [await of(name) for name in ("alice", "bob")] == [0, 0]
    assert await of("anna") >= 32


async def test_client_cannot_choose_its_salt(client: httpx.AsyncClient) -> None:
    headers = {"Authorization": "Bearer a-key-of-bob-chosen-by-hand"}
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi"}),
    ):
        response = await client.post(path, json=body | {"cache_salt": "acme"}, headers=headers)

        assert response.status_code == 400
        assert response.json()["error"]["param"] == "cache_salt"
