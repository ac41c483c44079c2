"""The addresses that the server listens on: several, names, both families; and one line where one can't be had."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.cli import main
from gateway.doctor.place import check_port
from gateway.serving import listeners
from gateway.serving.server import Server
from gateway.settings.config import ConfigError, parse_config
from tests.support.app import build_app
from tests.support.doctor_case import case
from tests.support.waiting import until

ABSENT = "192.0.2.7"


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as trial:
        trial.bind(("::1", 0))
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@contextlib.contextmanager
def bound(hosts: list[str], port: int = 0) -> Iterator[list[tuple[Any, ...]]]:
    sockets = listeners.bind(hosts, port)
    try:
        yield [one.getsockname()[:2] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def settings(host: object) -> Any:
    tree = {"engines": {"main": {"kind": "mock"}}, "models": {"shannon-chat": {"description": "a"}}}
    return parse_config(tree | {"server": {"host": host}}).server


@pytest.mark.parametrize(
    ("host", "hosts"),
    [
        ("0.0.0.0", ["0.0.0.0"]),
        ("::", ["::"]),
        ("127.0.0.1, ::1", ["127.0.0.1", "::1"]),
        (["127.0.0.1", "localhost"], ["127.0.0.1", "localhost"]),
        (["fe80::1%eth0"], ["fe80::1%eth0"]),
    ],
)
def test_host_is_an_address_or_several(host: object, hosts: list[str]) -> None:
    assert settings(host).hosts == hosts


@pytest.mark.parametrize("host", ["", [], [""], "a,,b", "http://a", "a:80", "[::1]", "a b", "a/b", ["a", 1], 1])
def test_host_of_another_form_is_refused_with_its_name(host: object) -> None:
    with pytest.raises(ConfigError, match=r"server\.host"):
        settings(host)


def test_several_addresses_share_a_port() -> None:
    with bound(["127.0.0.1", "127.0.0.2", "127.0.0.1"]) as names:
        assert [name[0] for name in names] == ["127.0.0.1", "127.0.0.2"]
        assert len({name[1] for name in names}) == 1


@needs_ipv6
def test_any_of_ipv6_means_both_families() -> None:
    with bound(["::"]) as names:
        assert {name[0] for name in names} == {"::", "0.0.0.0"}
    with bound(["127.0.0.1", "0.0.0.0", "::", "0::0", "localhost"]) as names:
        assert {name[0] for name in names} == {"::", "0.0.0.0"}


def test_any_of_ipv6_is_ipv4_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    real = listeners._bound

    def without_ipv6(family: int, address: tuple[str | int, ...]) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return real(family, address)

    monkeypatch.setattr(listeners, "_bound", without_ipv6)
    with bound(["::"]) as names:
        assert [name[0] for name in names] == ["0.0.0.0"]
    with pytest.raises(ConfigError, match=r"can't listen on \[::1\]:0: Address family not supported"):
        listeners.bind(["::1"], 0)


@pytest.mark.parametrize("hosts", [[ABSENT], ["127.0.0.1", ABSENT]])
def test_address_of_another_machine_is_named(hosts: list[str]) -> None:
    with pytest.raises(
        ConfigError, match=rf"server\.host: can't listen on {ABSENT}:\d+: Cannot assign requested address"
    ):
        listeners.bind(hosts, 0)


@pytest.mark.parametrize("name", ["nowhere.invalid", "a" * 64])
def test_name_without_an_address_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"server.host: can't find the address of '{name}'"):
        listeners.bind([name], 0)


def test_command_ends_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHANNON_HOST", f"127.0.0.1,{ABSENT}")
    path = tmp_path / "deploy.yaml"
    path.write_text(
        "engines: {main: {kind: mock}}\nmodels: {shannon-chat: {description: a}}\n"
        f"server: {{port: 0}}\nlogging: {{format: json}}\nstore: {{data_dir: {tmp_path / 'data'}}}\n"
    )
    assert main(["serve", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"can't listen on {ABSENT}:" in error
    assert "Traceback" not in error
    assert not (tmp_path / "data").exists(), "nothing was started"


def test_doctor_looks_at_every_address() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.2", 0))
        listener.listen()
        port = listener.getsockname()[1]
        finding = check_port(case({"server": {"host": ["127.0.0.1", "127.0.0.2"], "port": port}}))

    assert finding.verdict == "failed"
    assert f"127.0.0.2:{port}" in finding.text


@needs_ipv6
@pytest.mark.anyio
async def test_server_answers_at_every_address(store_url: str, tmp_path: Path) -> None:
    config = {"store": {"data_dir": str(tmp_path / "data")}}
    app, _, _ = build_app(config=config, environment={"SHANNON_REDIS_URL": store_url})
    announced: list[str] = []
    server = Server(app, host=["::", "127.0.0.1"], port=0, on_ready=announced.append)
    serving = asyncio.create_task(server.serve())
    try:
        await until(lambda: bool(announced))
        port = announced[0].rpartition(":")[2]
        async with httpx.AsyncClient() as client:
            for host in ("127.0.0.1", "[::1]"):
                assert (await client.get(f"http://{host}:{port}/health")).json()["ok"] is True
            assert (await client.get(f"{announced[0]}/health")).status_code == 200
        assert announced == [f"http://[::1]:{port}"]
    finally:
        server.should_exit = True
        await serving
