"""Hosts on a network of their own: network namespaces, joined by a bridge that can come between any two of them.

    with Network() as network:
        store, gateway = network.add_host("store"), network.add_host("gateway")
        with store.inside():            # sockets that this thread opens, and processes it starts, are on that host
            ...
        network.cut(gateway, store)     # not a packet passes between the two; the others reach both as before

The machine's own namespace gets nothing, no address and no route, so the addresses clash with nobody's. What is on the
network is there on no other one. Linux and root only: `Network` skips the test with the reason where it can't be.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import pytest

from tests.support.debian import program

_NAMED = Path("/run/netns")
_PREFIX = "shannon-"
_SUBNET = "10.213.77"  # seen inside only
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Host:
    """A namespace with one address."""

    namespace: str
    address: str
    port: str
    """Its end of the cable, in the bridge."""

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Put this thread on the host: what it opens and starts is there. Nothing may be awaited inside the block."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        here = os.open(_NAMED / self.namespace, os.O_RDONLY)
        try:
            _enter(here)
            yield
        finally:
            _enter(before)
            os.close(here)
            os.close(before)


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, _CLONE_NEWNET) != 0:  # os.setns is there from Python 3.12 on
        raise OSError(ctypes.get_errno(), "setns")


class Network:
    """A bridge and the hosts on it; gone with the block, or with this process."""

    def __init__(self) -> None:
        self._names = f"{_PREFIX}{os.getpid()}-"
        self._bridge = f"{self._names}bridge"
        self._hosts = 0

    def __enter__(self) -> Network:
        _need_tools()
        _remove(name for name in _named() if not _is_running(name))
        atexit.register(self._close)
        self._add_namespace(self._bridge)
        _ip("-n", self._bridge, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._bridge, "link", "set", "bridge", "up")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def _close(self) -> None:
        """Remove the namespaces, and with them the cables."""
        atexit.unregister(self._close)
        _remove(name for name in _named() if name.startswith(self._names))

    def add_host(self, name: str) -> Host:
        """Put a host with the next free address on the network."""
        self._hosts += 1
        host = Host(f"{self._names}{name}", f"{_SUBNET}.{self._hosts}", f"port{self._hosts}")
        self._add_namespace(host.namespace)
        cable = ["link", "add", host.port, "netns", self._bridge, "type", "veth", "peer", "name", "eth0"]
        _ip(*cable, "netns", host.namespace)
        _ip("-n", self._bridge, "link", "set", host.port, "master", "bridge", "up")
        _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
        _ip("-n", host.namespace, "link", "set", "eth0", "up")
        _ip("-n", host.namespace, "link", "set", "lo", "up")
        return host

    def cut(self, one: Host, other: Host) -> None:
        """Let no packet pass between two hosts, in either direction, connected or not. One such pair at a time.

        Nobody is told: to each of them the other has fallen silent.
        """
        self._isolate((one, other), "on")

    def heal(self, one: Host, other: Host) -> None:
        """Undo `cut`."""
        self._isolate((one, other), "off")

    def _isolate(self, hosts: Iterable[Host], state: str) -> None:
        for host in hosts:  # a bridge forwards nothing between isolated ports, and everything between others
            _ip("-n", self._bridge, "link", "set", host.port, "type", "bridge_slave", "isolated", state)

    def _add_namespace(self, name: str) -> None:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
        if made.returncode != 0:
            pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def _named() -> list[str]:
    return [path.name for path in _NAMED.glob(f"{_PREFIX}*")]


def _remove(names: Iterable[str]) -> None:
    """Delete namespaces, with what still runs in them."""
    for name in names:
        running = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
        for process in map(int, running.stdout.split()):
            with contextlib.suppress(ProcessLookupError):
                if process != os.getpid():
                    os.kill(process, signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _is_running(name: str) -> bool:
    """Tell whether the process that made a namespace is still there; a killed one leaves its behind."""
    return Path("/proc", name.removeprefix(_PREFIX).partition("-")[0]).exists()


def _need_tools() -> None:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    program("ip", "iproute2")
