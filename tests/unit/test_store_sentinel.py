"""Stores behind Sentinel: real servers, with passwords and TLS of their own, each told in the URL."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gateway.doctor.store_health import check_store
from gateway.errors import StoreError, StoreUnavailable
from gateway.settings.config import StoreSettings
from gateway.store.client import Store
from gateway.telemetry.metrics import Metrics
from tests.support.debian import program
from tests.support.doctor_case import case
from tests.support.store_server import opened
from tests.support.waiting import until

pytestmark = pytest.mark.anyio

SERVING, ASKING = "serving-pass/word", "asking-p@ss"
QUOTED_SERVING, QUOTED_ASKING = "serving-pass%2Fword", "asking-p%40ss"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def certificate(folder: Path) -> Path:
    """Write a self-signed certificate of 127.0.0.1 with its key, in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "certificate.pem"
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    return path


@dataclass
class Watched:
    """A primary, the Sentinel that watches it, and how to reach them."""

    port: int
    certificate: Path | None

    def url(self, *, scheme: str = "", user: str = f":{QUOTED_SERVING}@", hosts: str = "", query: str = "") -> str:
        scheme = scheme or ("rediss+sentinel" if self.certificate else "redis+sentinel")
        options = query if query or not self.certificate else f"ssl_ca_certs={self.certificate}"
        return f"{scheme}://{user}{hosts or f'127.0.0.1:{self.port}'}/main?{options}"


@contextlib.contextmanager
def watched(folder: Path, *, tls: bool) -> Iterator[Watched]:
    """Run Debian's Redis with a password, and a Sentinel with another one."""
    binary = program("redis-server", "redis-server")
    port, asked = free_port(), free_port()
    own = certificate(folder) if tls else None
    common = ["--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--logfile", str(folder / "log")]
    ports = ["--port", str(port)]
    lines = [f"port {asked}"]
    if own:
        tls_lines = [f"tls-cert-file {own}", f"tls-key-file {own}", f"tls-ca-cert-file {own}", "tls-auth-clients no"]
        ports = ["--port", "0", "--tls-port", str(port)]
        ports += [part for line in tls_lines for part in f"--{line}".split()]
        lines = ["port 0", f"tls-port {asked}", "tls-replication yes", *tls_lines]
    lines += [f"dir {folder}", "bind 127.0.0.1", f"logfile {folder / 'sentinel.log'}", f'requirepass "{ASKING}"']
    lines += [f"sentinel monitor main 127.0.0.1 {port} 1", f"sentinel auth-pass main {SERVING}"]
    lines += ["user asker on >asking-too ~* &* +@all", "user nobody on >nothing ~* &* +ping"]
    (folder / "sentinel.conf").write_text("\n".join(lines) + "\n")
    processes = [
        subprocess.Popen([binary, *ports, *common, "--requirepass", SERVING], stdin=subprocess.DEVNULL),
        subprocess.Popen([binary, str(folder / "sentinel.conf"), "--sentinel"], stdin=subprocess.DEVNULL),
    ]
    options: dict[str, Any] = {"ssl": True, "ssl_ca_certs": str(own)} if own else {}
    try:
        deadline = time.monotonic() + 15
        while True:
            with (
                contextlib.suppress(redis.RedisError),
                redis.Redis("127.0.0.1", asked, password=ASKING, **options) as client,
            ):
                master: Any = client.sentinel_master("main")
                if "s_down" not in str(master["flags"]) and not master["is_disconnected"]:
                    break
            assert time.monotonic() < deadline, (folder / "sentinel.log").read_text()
            time.sleep(0.05)
        yield Watched(asked, own)
    finally:
        for process in processes:
            process.terminate()
            process.wait(timeout=10)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with watched(tmp_path_factory.mktemp("plain"), tls=False) as servers:
        yield servers


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with watched(tmp_path_factory.mktemp("encrypted"), tls=True) as servers:
        yield servers


@pytest.mark.parametrize(
    "query",
    [
        f"sentinel_password={QUOTED_ASKING}",
        f"sentinel_username=default&sentinel_password={QUOTED_ASKING}",
        "sentinel_username=asker&sentinel_password=asking-too",
        f"sentinel_password={QUOTED_ASKING}&sentinel_tls=false",
    ],
)
async def test_sentinel_has_a_password_of_its_own(plain: Watched, query: str) -> None:
    async with opened(plain.url(query=query)) as store:
        assert store.available
        await store.run("SET", "x", "y")
        assert await store.bulk.run("GET", "x") == "y"


async def test_user_of_the_primary_and_its_database_are_read(plain: Watched) -> None:
    url = plain.url(user=f"default:{QUOTED_SERVING}@", query=f"sentinel_password={QUOTED_ASKING}")
    async with opened(url.replace("/main?", "/main/3?")) as store:
        await store.run("SET", "x", "in three")
        assert "db=3" in str(await store.run("CLIENT", "INFO")) or await store.run("GET", "x") == "in three"


async def test_next_sentinel_is_asked_where_one_is_gone(plain: Watched) -> None:
    hosts = f"127.0.0.1:{free_port()},127.0.0.1:{plain.port}"
    async with opened(plain.url(hosts=hosts, query=f"sentinel_password={QUOTED_ASKING}")) as store:
        assert store.available


@pytest.mark.parametrize(
    ("user", "query", "words"),
    [
        (f":{QUOTED_SERVING}@", "", "refused the password, sentinel_password in the URL"),
        (f":{QUOTED_SERVING}@", "sentinel_password=wrong", "refused the password, sentinel_password in the URL"),
        (f":{QUOTED_SERVING}@", "sentinel_username=nobody&sentinel_password=nothing", "refused the user"),
        (":wrong@", f"sentinel_password={QUOTED_ASKING}", "invalid username-password pair"),
    ],
    ids=["no password", "wrong password", "no right", "wrong password of the primary"],
)
async def test_refusal_is_told_by_its_reason(
    plain: Watched, user: str, query: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(plain.url(user=user, query=query)) as store:
        assert not store.available
        with pytest.raises(StoreUnavailable):
            await store.run("PING")
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("gateway")]

    assert words in said
    assert "no answer in time" not in said
    for secret in (SERVING, ASKING, "wrong", "nothing"):
        assert secret not in said.replace("wrong number", "")


async def test_service_that_no_sentinel_knows_is_told(plain: Watched, caplog: pytest.LogCaptureFixture) -> None:
    url = plain.url(query=f"sentinel_password={QUOTED_ASKING}").replace("/main?", "/other?")
    async with opened(url) as store:
        assert not store.available
    assert "knows no service 'other'" in caplog.text


async def test_sentinel_and_primary_speak_tls(encrypted: Watched) -> None:
    query = f"sentinel_password={QUOTED_ASKING}&ssl_ca_certs={encrypted.certificate}"
    async with opened(encrypted.url(query=query)) as store:
        assert store.available
        assert await store.run("ECHO", "x") == "x"


async def test_unknown_authority_is_refused(encrypted: Watched, caplog: pytest.LogCaptureFixture) -> None:
    async with opened(encrypted.url(query=f"sentinel_password={QUOTED_ASKING}")) as store:
        assert not store.available
    assert "certificate" in caplog.text.lower()


async def test_store_comes_back_when_the_sentinel_does(tmp_path: Path) -> None:
    with watched(tmp_path, tls=False) as servers:
        url = servers.url(query=f"sentinel_password={QUOTED_ASKING}")
        async with opened(url) as store:
            client: Any = store._client
            await client.connection_pool.disconnect()
            store._breaker.succeed()
            store._open_breaker(TimeoutError())
            await until(lambda: bool(store.available), 10)


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://h:1/main?sentinel_tls=perhaps",
        "redis+sentinel://h:1/main?colour=red",
        "redis+sentinel://h:1/main?sentinel_colour=red",
        "redis+sentinel://h:1/main?ssl_ca_certs=/x",
        "redis+sentinel://h:1/main/three",
        "redis+sentinel://h:x/main",
        "redis+sentinel://,/main",
        "redis://h:1/0?colour=red",
    ],
)
async def test_option_that_does_not_fit_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(StoreError) as caught:
        Store(StoreSettings(), {"SHANNON_REDIS_URL": url}, Metrics())

    assert "\n" not in str(caught.value)


async def test_ipv6_sentinels_are_understood() -> None:
    async with contextlib.AsyncExitStack() as stack:
        url = "redis+sentinel://[::1]:26380,[2001:db8::7]/main"
        store = Store(StoreSettings(), {"SHANNON_REDIS_URL": url}, Metrics())
        stack.push_async_callback(store.close)
        pool: Any = store._client.connection_pool  # type: ignore[attr-defined]
        hosts = [sentinel.connection_pool.connection_kwargs for sentinel in pool.sentinel_manager.sentinels]

        assert [(host["host"], host["port"]) for host in hosts] == [("::1", 26380), ("2001:db8::7", 26379)]


async def test_doctor_asks_through_the_sentinel(plain: Watched) -> None:
    url = plain.url(query=f"sentinel_password={QUOTED_ASKING}")
    findings = {finding.check: finding for finding in await check_store(case({}, {"SHANNON_REDIS_URL": url}))}

    assert findings["store"].verdict == "ok"
    assert QUOTED_ASKING not in str(findings)
