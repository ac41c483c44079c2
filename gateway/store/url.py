"""From a store's URL to a client: single servers, clusters, and primaries found through Sentinel.

Connections are made on first use. Raises StoreError for a URL that can't be used.
"""

from __future__ import annotations

from typing import Any, Protocol
from urllib.parse import parse_qsl, urlencode, urlsplit

import redis.asyncio as redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisClusterException, RedisError

from gateway.errors import StoreError, unknown_argument

_SENTINEL_PORT = 26379
_SENTINEL_TIMEOUT_S = 1.0  # then the next Sentinel is asked
_SENTINEL_TLS = "sentinel_tls"
_TEXT: dict[str, Any] = {"decode_responses": True, "encoding_errors": "replace"}
"""Invalid UTF-8 damages its own value only, not the other answers of the pipeline."""


class Client(Protocol):
    def pipeline(self, transaction: bool = ...) -> Any: ...
    async def aclose(self) -> None: ...


def connect(url: str) -> Client:
    """Return a client for `url`. Raises StoreError."""
    scheme, _, rest = url.partition("://")
    try:
        if scheme.startswith(("redis+cluster", "rediss+cluster")):
            cluster: Client = redis.RedisCluster.from_url(f"{scheme.partition('+')[0]}://{rest}", **_TEXT)
            return cluster
        if scheme in ("redis+sentinel", "rediss+sentinel"):
            return _sentinel_primary(url)
        client = redis.Redis.from_url(url, **_TEXT, retry=_no_retry())
        _check(client)
    except TypeError as error:
        name = unknown_argument(error)
        reason = f"connections have no option {name!r}" if name else str(error)
        raise StoreError(f"the store's URL can't be used: {reason}") from error
    except RedisClusterException as error:  # no RedisError, and several lines
        raise StoreError("the URL names no node of a cluster") from error
    except (ValueError, RedisError) as error:
        raise StoreError(f"the store's URL can't be used: {error}") from error
    return client


async def reconnect(client: Client) -> None:
    """Close idle connections: the host name may resolve to another server by now."""
    pool = getattr(client, "connection_pool", None)
    if pool is not None:
        await pool.disconnect(inuse_connections=False)


async def close(client: Client) -> None:
    """Close a client, and its connections to Sentinels."""
    await client.aclose()
    manager = getattr(getattr(client, "connection_pool", None), "sentinel_manager", None)
    if manager is not None:
        await manager.aclose()


def _no_retry() -> Retry:
    return Retry(NoBackoff(), 0)


def _sentinel_primary(url: str) -> Client:
    """Return a client of the primary that the Sentinels report.

    The URL is redis+sentinel://user:password@host:port,host:port/service/db?options. User and password are those of the
    primary. Options with the prefix `sentinel_` are for the Sentinels: `sentinel_username`, `sentinel_password`,
    `sentinel_tls` (true or false; default: as in the scheme), `sentinel_ssl_ca_certs` and redis-py's
    other TLS options. TLS options without the prefix are for both.
    """
    parts = urlsplit(url)
    credentials, _, location = parts.netloc.rpartition("@")
    hosts = [_host(entry) for entry in location.split(",")]
    service, _, database = parts.path.strip("/").partition("/")
    if not service:
        raise StoreError("the store's URL names no sentinel service: redis+sentinel://host:port,host:port/SERVICE")
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    tls = parts.scheme == "rediss+sentinel"
    sentinel_tls = given.pop(_SENTINEL_TLS, str(tls)).lower()
    if sentinel_tls not in ("true", "false"):
        raise StoreError(f"the store's URL can't be used: {_SENTINEL_TLS} must be true or false")
    common = {name: value for name, value in given.items() if name.startswith("ssl_")}
    of_sentinels = {
        name.removeprefix("sentinel_"): value for name, value in given.items() if name.startswith("sentinel_")
    }
    own = {name: value for name, value in given.items() if not name.startswith("sentinel_")}
    asking = _options(sentinel_tls == "true", "", (common if sentinel_tls == "true" else {}) | of_sentinels)
    asking |= {"socket_connect_timeout": _SENTINEL_TIMEOUT_S, "socket_timeout": _SENTINEL_TIMEOUT_S}
    serving = _options(tls, credentials, own) | {"db": int(database or 0)}
    sentinel = _Sentinel(hosts, sentinel_kwargs=asking)  # type: ignore[no-untyped-call]
    primary = sentinel.master_for(service, **_TEXT, **serving)
    _check(primary, sentinel.sentinels[0])
    client: Client = primary
    return client


def _check(*clients: redis.Redis) -> None:
    """Raise TypeError for an option that connections don't have. Nothing is connected."""
    for pool in (client.connection_pool for client in clients):
        pool.connection_class(**pool.connection_kwargs)


def _host(entry: str) -> tuple[str, int]:
    parts = urlsplit(f"//{entry}")
    if not parts.hostname:
        raise ValueError(f"{entry!r} is not HOST:PORT")
    return parts.hostname, parts.port or _SENTINEL_PORT


def _options(tls: bool, credentials: str, query: dict[str, str]) -> dict[str, Any]:
    """Return redis-py's options, read as it reads them from the URL of a single server."""
    at = f"{credentials}@" if credentials else ""
    options: dict[str, Any] = dict(parse_url(f"{'rediss' if tls else 'redis'}://{at}host?{urlencode(query)}"))
    for name in ("host", "connection_class"):
        options.pop(name, None)
    if not tls and (odd := [name for name in options if name.startswith("ssl_")]):
        raise ValueError(f"{odd[0]} is set, but TLS is not: write rediss+sentinel://, or sentinel_tls=true")
    return options | ({"ssl": True} if tls else {}) | {"retry": _no_retry()}


class _Sentinel(Sentinel):
    """Reports why no Sentinel returned a primary, and tries the next one if one does not answer."""

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        reasons = []
        for number, sentinel in enumerate(self.sentinels):
            kwargs = sentinel.connection_pool.connection_kwargs
            where = f"the sentinel {kwargs['host']}:{kwargs['port']}"
            try:
                known: Any = await sentinel.sentinel_masters()
            except AuthenticationError as error:
                reasons.append(f"{where} refused the password, sentinel_password in the URL: {error}")
            except NoPermissionError as error:
                reasons.append(f"{where} refused the user, sentinel_username in the URL: {error}")
            except (RedisError, OSError) as error:
                reasons.append(f"{where} can't be asked: {str(error) or type(error).__name__}")
            else:
                state = known.get(service_name)
                if state and self.check_master_state(state, service_name):
                    self.sentinels[0], self.sentinels[number] = sentinel, self.sentinels[0]
                    return state["ip"], state["port"]
                reasons.append(f"{where} knows no service {service_name!r}" if not state else f"{where} sees it down")
        raise MasterNotFoundError("; ".join(reasons))
