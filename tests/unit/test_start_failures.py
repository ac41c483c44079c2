"""What an operator can get wrong is one line that names it, and exit code 2; the doctor says the same beforehand.

Each case goes through the real command line, in a process of its own.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import StoreError
from gateway.settings.config import ConfigError
from gateway.settings.data_dir import usable_data_dir
from gateway.store import valkey
from gateway.store.valkey import EmbeddedValkey
from tests.support.command_line import NOBODY, CommandLine, Outcome, command_line
from tests.support.doctor_case import case as doctor_case
from tests.support.store_server import StoreServer

MINIMAL = "engines: {main: {kind: mock}}\nmodels: {shannon-chat: {description: x}}\nserver: {port: 0}\n"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")


@pytest.fixture(scope="module")
def shannon() -> Iterator[CommandLine]:
    with command_line() as runs:
        yield runs


@dataclass
class Place:
    """A folder with a deployment in it, readable by all users."""

    folder: Path
    shannon: CommandLine
    options: dict[str, Any] = field(default_factory=dict)

    def write(self, text: str | bytes, name: str = "deployment.yaml") -> Path:
        path = self.folder / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def serve(self, text: str = MINIMAL, *argv: str, **options: Any) -> Outcome:
        """Run `shannon serve` on a deployment."""
        return self.shannon.run("serve", "--config", str(self.write(text)), *argv, **options)

    def serve_with_data_dir(self, path: str | Path, **options: Any) -> Outcome:
        return self.serve(MINIMAL + f"store: {{data_dir: {json.dumps(str(path))}}}\n", folder=self.folder, **options)


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory, shannon: CommandLine) -> Place:
    folder = tmp_path_factory.mktemp("s")
    shared = Path(tempfile.gettempdir()).resolve()
    for parent in (folder, *folder.parents):
        if parent != shared and parent.is_relative_to(shared):
            parent.chmod(0o755)
    return Place(folder, shannon)


def refusal(outcome: Outcome) -> str:
    """Return the one line of a start that was refused."""
    assert outcome.code == 2, outcome
    (line,) = outcome.err.splitlines()
    assert line.startswith("shannon: ")
    python = ("Traceback", "Error(", "[Errno", "__init__", "<class", "instance of", "dictionary", "Input should")
    assert not any(word in line for word in python)
    assert outcome.out == ""
    return line.removeprefix("shannon: ")


# The data directory. Each prepares a folder and returns the path to name.


def a_file(folder: Path) -> str:
    (folder / "file").write_text("")
    return "file"


def under_a_file(folder: Path) -> str:
    return f"{a_file(folder)}/data"


def a_loop(folder: Path) -> str:
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    return "a"


def under_a_loop(folder: Path) -> str:
    return f"{a_loop(folder)}/data"


def _in_the_way(name: str, *, a_folder: bool) -> Callable[[Path], str]:
    def prepare(folder: Path) -> str:
        path = folder / "data" / name
        path.parent.mkdir()
        if a_folder:
            path.mkdir()
        else:
            path.write_text("")
        return "data"

    return prepare


@dataclass(frozen=True)
class Wrong:
    """A data directory that can't be used, and a word of why."""

    name: str
    prepare: Callable[[Path], str]
    reason: str


WRONG = [
    Wrong("file", a_file, "it is a file, not a directory"),
    Wrong("under a file", under_a_file, "file is not a directory"),
    Wrong("loop", a_loop, "symbolic links"),
    Wrong("under a loop", under_a_loop, "symbolic links"),
    Wrong("too long for a socket", lambda folder: "x" * 110, "too long for a unix socket"),
    Wrong("too long a name", lambda folder: "x" * 300, "File name too long"),
    Wrong("too long a path", lambda folder: "/".join(["x" * 200] * 30), "too long"),
    Wrong("no file system to write to", lambda folder: "/proc/shannon", "can't be written"),
    Wrong("socket's place", _in_the_way("valkey.sock", a_folder=True), "valkey.sock is not a socket"),
    Wrong("file for a socket", _in_the_way("valkey.sock", a_folder=False), "valkey.sock is not a socket"),
    Wrong("lock's place", _in_the_way("valkey.lock", a_folder=True), "valkey.lock is not a file"),
    Wrong("log's place", _in_the_way("valkey.log", a_folder=True), "valkey.log is not a file"),
    Wrong("data's place", _in_the_way("appendonlydir", a_folder=False), "appendonlydir is not a directory"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_wrong_data_dir_is_one_line_and_the_doctors_finding(
    place: Place, wrong: Wrong, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = wrong.prepare(place.folder)
    monkeypatch.chdir(place.folder)

    line = refusal(place.serve_with_data_dir(path))

    assert line.startswith("store.data_dir: ")
    assert wrong.reason in line
    finding = check(path)
    assert (finding.verdict, f"store.data_dir: {finding.text}") == ("failed", line)


def check(path: str) -> Any:
    from gateway.doctor.place import check_data_dir

    return check_data_dir(doctor_case({"store": {"data_dir": path}}))


def not_ours(folder: Path) -> str:
    (folder / "data").mkdir(mode=0o700)
    return "data"


def under_not_ours(folder: Path) -> str:
    return f"{not_ours(folder)}/data"


def not_writable(folder: Path) -> str:
    (folder / "data").mkdir(mode=0o755)
    return "data"


def under_not_writable(folder: Path) -> str:
    return f"{not_writable(folder)}/data"


def _of_root(name: str, *, a_folder: bool = False) -> Callable[[Path], str]:
    """Return what makes a folder of the other user's that root has started a gateway in."""

    def prepare(folder: Path) -> str:
        data = folder / "data"
        data.mkdir()
        if a_folder:
            (data / name).mkdir(mode=0o700)
        else:
            (data / name).parent.mkdir(exist_ok=True)
            (data / name).touch(mode=0o600)
            (data / name).parent.chmod(0o755)
        os.chown(data, NOBODY, NOBODY)
        return "data"

    return prepare


FOREIGN = [
    Wrong("not ours", not_ours, "Permission denied"),
    Wrong("under not ours", under_not_ours, "Permission denied"),
    Wrong("not writable", not_writable, "can't be written: Permission denied"),
    Wrong("under not writable", under_not_writable, "can't be written: Permission denied"),
    Wrong("lock", _of_root("valkey.lock"), "valkey.lock belongs to another user"),
    Wrong("log", _of_root("valkey.log"), "valkey.log belongs to another user"),
    Wrong("data", _of_root("appendonlydir", a_folder=True), "appendonlydir belongs to another user"),
]


@needs_root
@pytest.mark.parametrize("wrong", FOREIGN, ids=lambda wrong: wrong.name)
def test_data_dir_of_another_user_is_one_line_and_the_doctors_finding(
    place: Place, wrong: Wrong, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = wrong.prepare(place.folder)
    monkeypatch.chdir(place.folder)

    line = refusal(place.serve_with_data_dir(path, user=NOBODY))

    assert line.startswith("store.data_dir: ")
    assert wrong.reason in line
    os.seteuid(NOBODY)
    try:
        finding = check(path)
    finally:
        os.seteuid(0)
    assert (finding.verdict, f"store.data_dir: {finding.text}") == ("failed", line)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_disk_that_takes_nothing_is_one_line_and_the_doctors_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(**options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)

    for bundled in (True, False):
        with pytest.raises(ConfigError, match=os.strerror(number)) as caught:
            usable_data_dir(tmp_path / "data", bundled=bundled)
    assert str(tmp_path / "data") in str(caught.value)
    assert os.strerror(number) in check(str(tmp_path / "data")).text


@pytest.mark.parametrize("path", ["made/with/its/parents", "mit Leerzeichen/d\u00e4t\u00e4 \u6570 'x' \"y\"", "link"])
def test_unusual_data_dir_works(place: Place, path: str) -> None:
    (place.folder / "link").symlink_to("there")

    outcome = place.serve_with_data_dir(path)

    assert outcome.code is None, outcome
    assert (place.folder / path / "appendonlydir").is_dir()


def test_data_dir_beside_another_store_need_not_hold_a_socket(place: Place, store_url: str) -> None:
    (place.folder / ("x" * 110)).mkdir()
    outcome = place.serve_with_data_dir("x" * 110, environment={"SHANNON_REDIS_URL": store_url})
    assert outcome.code is None, outcome

    line = refusal(place.serve_with_data_dir(a_file(place.folder), environment={"SHANNON_REDIS_URL": store_url}))
    assert "file, not a directory" in line


@pytest.mark.parametrize("command", [("keys", "list"), ("usage",), ("keys", "create", "x")])
def test_commands_that_need_the_store_say_the_same(place: Place, command: tuple[str, ...]) -> None:
    (place.folder / ".shannon").write_text("")

    line = refusal(place.shannon.run(*command, folder=place.folder))

    assert line.startswith(f"store.data_dir: {place.folder.resolve() / '.shannon'}: it is a file")


def test_bundled_server_that_does_not_start_says_why(place: Place) -> None:
    manifest = place.folder / "data" / "appendonlydir" / "appendonly.aof.manifest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("junk")

    outcome = place.serve_with_data_dir("data")

    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    last = outcome.err.splitlines()[-1]
    assert "the bundled Valkey did not start; see " in last
    assert "AOF" in last


@pytest.mark.anyio
@pytest.mark.parametrize("binary", ["/nowhere/valkey-server", "/etc/hostname", "/proc"])
async def test_bundled_server_that_is_not_there_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, binary: str
) -> None:
    monkeypatch.setattr(valkey, "_find_server", lambda: binary)

    with pytest.raises(StoreError, match=f"the bundled Valkey can't be started: {binary}"):
        await EmbeddedValkey(tmp_path).start()


@pytest.mark.anyio
async def test_lock_that_another_process_keeps_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts the server, and was frozen meanwhile: neither a gateway nor a command may wait for it for ever."""
    monkeypatch.setattr(valkey, "_LOCK_TIMEOUT_S", 0.05)
    with (tmp_path / "valkey.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        with pytest.raises(StoreError, match=r"another process holds .*valkey\.lock"):
            await asyncio.wait_for(EmbeddedValkey(tmp_path).start(), 10)


@pytest.mark.anyio
async def test_lock_is_taken_once_it_is_free(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path)
    with (tmp_path / "valkey.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        starting = asyncio.create_task(server.start())
        await asyncio.sleep(0)
    await starting
    await server.close()


def test_store_of_a_newer_layout_is_one_line(place: Place, store_server: StoreServer, store_url: str) -> None:
    store_server.client().set("sh:schema", 99)
    try:
        outcome = place.serve_with_data_dir("data", environment={"SHANNON_REDIS_URL": store_url})
    finally:
        store_server.client().flushall()

    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert "layout version 99" in outcome.err.splitlines()[-1]


# The configuration.


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "engines: Field required"),
        ("- a\n", "must be a mapping of settings"),
        ("{\n", "not valid YAML: "),
        (MINIMAL + "\tx: 1\n", "in line 4, column 1"),
        (b"\xff\xfe\x00", "not valid UTF-8"),
        (b"a: \x00\n", "not valid YAML: special characters"),
        (MINIMAL + "server: {port: 1}\n", "'server' is given twice in line 4, column 1"),
        (MINIMAL + "store:\n  data_dir: a\n  breaker_s: 2\n  data_dir: b\n", "'data_dir' is given twice in line 7"),
        (MINIMAL + "nonsense: 1\n", "nonsense: unknown setting"),
        (MINIMAL + "logging: {level: loud}\n", "logging.level: "),
        (MINIMAL + "logging: {format: xml}\n", "logging.format: "),
        (MINIMAL + "x: !!python/object/apply:os.system [id]\n", "could not determine a constructor"),
        (MINIMAL + "x: 2024-99-99\n", "month must be in 1..12"),
        (MINIMAL + "? {a: 1}\n: 2\n", "unhashable key in line 4"),
        (MINIMAL + "x: " + "[" * 2000 + "]" * 2000, "nested too deeply"),
        (MINIMAL + "x: *nowhere\n", "undefined alias"),
        (MINIMAL + "include: nowhere.yaml\n", "nowhere.yaml: No such file or directory"),
        (MINIMAL + "include: deployment.yaml\n", "includes itself"),
        (MINIMAL + "include: [a, b]\n", "include: must be the path of one file"),
        (MINIMAL + "include: .\n", "Is a directory"),
        (MINIMAL + 'store: {data_dir: "a\\0b"}\n', "store.data_dir: must not contain a null character"),
        (MINIMAL + "fetch: {allowed_networks: [x]}\n", "fetch.allowed_networks"),
        (MINIMAL + "keys: [{name: a, key_env: NO_SUCH_KEY}]\n", "NO_SUCH_KEY: the key 'a'"),
        (MINIMAL + "keys: [{name: a, key_file: /nowhere/key}]\n", "/nowhere/key: the key 'a' can't be read"),
        (MINIMAL + "keys: [{name: a, key_file: /}]\n", "/: the key 'a' can't be read: Is a directory"),
        (MINIMAL + "tools: {web_search: {provider: brave}}\n", "tools.web_search: BRAVE_API_KEY is not set"),
        (MINIMAL + "tools: {ga4: {property_id: '1'}}\n", "GOOGLE_APPLICATION_CREDENTIALS"),
        (MINIMAL + "store: {data_dir: null}\n", "store.data_dir: must be a path"),
        (MINIMAL + "store: {data_dir: ''}\n", "store.data_dir: must not be empty"),
        (MINIMAL + 'store: {data_dir: "\\ud800"}\n', "store.data_dir: must be valid Unicode"),
        (MINIMAL + "store: {breaker_s: .inf}\n", "store.breaker_s: must be a finite number"),
        (MINIMAL + "logging: [level]\n", "logging: must be a mapping of settings"),
        (MINIMAL + "2024-01-01: x\n", "a name in it is not text"),
        (MINIMAL.replace("port: 0", "host: 1"), "server.host: must be"),
        (MINIMAL + "default_model: gpt-9\n", "default_model: there is no model named 'gpt-9'"),
    ],
    ids=lambda value: str(value)[-30:],
)
def test_wrong_configuration_is_one_line(place: Place, text: str | bytes, reason: str) -> None:
    path = place.write(text)

    line = refusal(place.shannon.run("serve", "--config", str(path)))

    assert reason in line


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        ("{kind: embedded, model: /nowhere/model}", "engines.main.model: '/nowhere/model' is neither a directory"),
        ("{kind: pooling, model: ./nowhere}", "engines.main.model: './nowhere' is neither a directory"),
        ("{kind: embedded, model: /etc/hostname}", "engines.main.model: '/etc/hostname' is a file"),
        ("{kind: mock, args: {nonsense: 1}}", "engines.main: args: 'nonsense' is not an argument"),
        ("{kind: nonsense}", "engines.main.kind: must be one of"),
        ("{kind: remote, model: m, urls: ['https://a/v1'], api_key_env: NO_SUCH_KEY}", "NO_SUCH_KEY is not set"),
        (
            "{kind: remote, model: m, urls: ['https://a/v1'], tls_ca_file: /nowhere}",
            "engines.main: tls_ca_file: No such",
        ),
        ("{kind: remote, model: m, urls: ['https://a/v1'], tls_ca_file: /tmp}", "tls_ca_file: Is a directory"),
        ("{kind: remote, model: m, urls: ['https://a/v1'], tls_ca_file: /etc/hostname}", "tls_ca_file: "),
        ("{kind: remote, model: m, urls: ['a']}", "engines.main.urls"),
    ],
)
def test_wrong_engine_is_one_line(place: Place, engine: str, reason: str) -> None:
    text = f"engines: {{main: {engine}}}\nmodels: {{shannon-chat: {{description: x}}}}\n"

    assert reason in refusal(place.serve(text, folder=place.folder))


@pytest.mark.parametrize("key", ["ключ", "a\nb", "a\r\nX-Header: b"])
def test_key_of_a_remote_server_that_no_header_can_hold_is_one_line(place: Place, key: str) -> None:
    engine = "{kind: remote, model: m, urls: ['https://a/v1'], api_key_env: UPSTREAM_KEY}"
    text = f"engines: {{main: {engine}}}\nmodels: {{shannon-chat: {{description: x}}}}\n"

    line = refusal(place.serve(text, environment={"UPSTREAM_KEY": key}, folder=place.folder))

    assert "UPSTREAM_KEY must be ASCII in one line" in line
    assert key not in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("SHANNON_PORT", value) for value in ("x", "-1", "70000", "80.5", "8080 8081")),
        *(("SHANNON_LOG_LEVEL", "loud"), ("SHANNON_LOG_FORMAT", "xml"), ("SHANNON_MAX_OUTPUT_TOKENS", "many")),
        *(("SHANNON_TEMPERATURE", "hot"), ("SHANNON_STREAM_CHUNK_SIZE", "0")),
        *(("SHANNON_BOOTSTRAP_KEY", "short"), ("SHANNON_BOOTSTRAP_KEY_FILE", "/nowhere")),
        *(("SHANNON_REDIS_URL", value) for value in ("nonsense", "http://a", "redis://a:b", "redis+sentinel://a", " ")),
        *(("SHANNON_REDIS_URL", value) for value in ("redis://[::1", "redis+cluster://", "redis+sentinel://a:b/c")),
        *(("OTEL_EXPORTER_OTLP_ENDPOINT", "nonsense"), ("OTEL_EXPORTER_OTLP_ENDPOINT", "ftp://a")),
    ],
)
def test_wrong_variable_is_one_line_that_names_it(place: Place, name: str, value: str) -> None:
    line = refusal(place.serve(environment={name: value}, folder=place.folder))

    assert name in line or value in line


@pytest.mark.parametrize("url", ["redis://a?nonsense=1", "rediss://a?nonsense=1"])
def test_unknown_option_of_the_stores_url_is_one_line(place: Place, url: str) -> None:
    assert "SHANNON_REDIS_URL" in refusal(place.serve(environment={"SHANNON_REDIS_URL": url}, folder=place.folder))


@pytest.mark.parametrize("path", ["nowhere.yaml", ".", "x" * 300, "a", "deployment.yaml/x"])
def test_configuration_that_can_not_be_read_is_one_line(place: Place, path: str) -> None:
    a_loop(place.folder)
    place.write(MINIMAL)

    line = refusal(place.shannon.run("serve", "--config", path, folder=place.folder))

    assert line.startswith(f"{(place.folder / path).resolve() if path != 'a' else place.folder / 'a'}: ")


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL + "include: {file}\n",
        MINIMAL + "keys: [{name: a, key_file: {file}}]\n",
        "engines: {main: {kind: remote, model: m, urls: ['https://a/v1'], tls_ca_file: {file}}}\n"
        "models: {shannon-chat: {description: x}}\n",
    ],
)
@pytest.mark.parametrize("file", ["pipe", "/dev/zero"])
def test_pipe_or_device_for_a_file_is_one_line(place: Place, text: str, file: str) -> None:
    """The one would make the start wait for ever, the other take all memory."""
    os.mkfifo(place.folder / "pipe")

    for line in (
        refusal(place.serve(text.replace("{file}", str(place.folder / file)))),
        refusal(place.shannon.run("models", "--config", str(place.folder / file))),
    ):
        assert "not a plain file" in line


@needs_root
def test_configuration_of_another_user_is_one_line(place: Place) -> None:
    path = place.write(MINIMAL)
    path.chmod(0o600)

    line = refusal(place.shannon.run("serve", "--config", str(path), user=NOBODY))

    assert line.endswith("deployment.yaml: Permission denied")


# The address.


@pytest.mark.parametrize("host", ["nonsense host", "256.1.1.1", "192.0.2.7", "nowhere.invalid", ":::", "http://a"])
def test_address_that_can_not_be_had_is_one_line(place: Place, host: str) -> None:
    outcome = place.serve(MINIMAL, "--host", host, folder=place.folder)

    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert any(name in outcome.err.splitlines()[-1] for name in ("SHANNON_HOST", "server.host"))


def test_port_that_is_taken_is_one_line(place: Place) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        outcome = place.serve(MINIMAL, "--port", str(taken.getsockname()[1]), folder=place.folder)

    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert "ddress already in use" in outcome.err.splitlines()[-1]


def test_too_few_open_files_are_no_traceback(place: Place) -> None:
    outcome = place.serve(folder=place.folder, open_files=12)

    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert outcome.err.splitlines()[-1].startswith("shannon: ")
