"""Salts of the prefix cache: one per tenant, the same for a group by configuration, on every gateway of a store."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from gateway.access.cache_salts import CacheSalts
from gateway.components import build_store
from gateway.settings.config import ConfigError, PrefixCacheSettings, parse_config
from tests.support.store_server import StoreServer

pytestmark = pytest.mark.anyio

TREE = {
    "engines": {"main": {"kind": "mock"}},
    "models": {"shannon-chat": {"description": "General chat completion"}},
}
SHARED = {"sisters": ["acme", "acme-labs"], "others": ["initech"]}

Salts = Callable[..., Awaitable[CacheSalts]]


@pytest.fixture
async def salts(store_url: str, tmp_path: Path) -> AsyncIterator[Salts]:
    """Make the salts of another gateway in front of the same store."""
    async with AsyncExitStack() as stack:

        async def make(url: str = store_url, **shared: list[str]) -> CacheSalts:
            config = parse_config(TREE | {"store": {"data_dir": str(tmp_path), "command_timeout_ms": 2000}})
            store = build_store(config, {"SHANNON_REDIS_URL": url})
            await store.start()
            stack.push_async_callback(store.close)
            made = CacheSalts(PrefixCacheSettings(shared=shared), store)
            await made.start()
            return made

        yield make


async def test_every_tenant_has_its_own(salts: Salts) -> None:
    made = await salts()
    tenants = ["default", "acme", "acme-labs", "", "tenant:acme", "group:sisters", "Acme"]

    assert len({made.salt_of(tenant) for tenant in tenants}) == len(tenants)


async def test_salt_tells_nothing_of_the_tenant_and_stays_the_same(salts: Salts) -> None:
    made = await salts()

    assert made.salt_of("acme") == made.salt_of("acme")
    assert re.fullmatch("[0-9a-f]{32}", made.salt_of("acme"))


async def test_tenants_of_a_group_share_one(salts: Salts) -> None:
    made = await salts(**SHARED)

    assert made.salt_of("acme") == made.salt_of("acme-labs")
    assert len({made.salt_of(tenant) for tenant in ("acme", "initech", "hooli", "sisters", "group:sisters")}) == 5


async def test_gateways_of_one_store_agree(salts: Salts) -> None:
    first, second = await salts(), await salts()

    assert first.salt_of("acme") == second.salt_of("acme")


async def test_gateways_of_different_stores_do_not(salts: Salts, store_server: StoreServer) -> None:
    first = await salts()
    store_server.client().flushall()
    second = await salts()

    assert first.salt_of("acme") != second.salt_of("acme"), "nobody outside can know a salt"


async def test_without_the_store_a_process_still_keeps_tenants_apart(salts: Salts) -> None:
    made = await salts("unix:///nowhere.sock")

    assert made.salt_of("acme") == made.salt_of("acme")
    assert made.salt_of("acme") != made.salt_of("initech")
    assert made.salt_of("acme") != (await salts("unix:///nowhere.sock")).salt_of("acme")


def test_tenant_in_two_groups_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"prefix_cache: .*'acme' is in more than one group"):
        parse_config(TREE | {"prefix_cache": {"shared": {"a": ["acme"], "b": ["acme"]}}})
