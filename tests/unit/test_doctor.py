"""`shannon doctor`: what it says of the installation, the place and the deployment, and how it ends."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.cli import main
from gateway.doctor.checkpoint import check_weights, find_checkpoint
from gateway.doctor.deployment import check_drain, check_exposure, check_keys, check_tools
from gateway.doctor.examination import check_all, conceal, secrets
from gateway.doctor.finding import Finding
from gateway.doctor.place import check_data_dir, check_open_files, check_port, check_shared_memory, filesystem
from tests.support.app import KEY
from tests.support.doctor_case import GIB, case, embedded

# The place.


def test_data_dir_that_can_not_be_written_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = check_data_dir(case({"store": {"data_dir": "/proc/shannon"}}))

    assert finding.verdict == "failed"
    assert "/proc/shannon" in finding.text
    assert "store.data_dir" in finding.next_step


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder that this user may not look into, as a service's is for whoever runs the doctor."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o700)
    if os.geteuid() == 0:
        tmp_path.chmod(0o755)
        os.seteuid(65534)
        yield folder
        os.seteuid(0)
    else:
        folder.chmod(0)
        yield folder
        folder.chmod(0o700)


@pytest.mark.anyio
async def test_folders_of_another_user_are_findings(locked: Path) -> None:
    tree = {"engines": {"main": {"kind": "embedded", "model": str(locked / "model")}}}
    tree |= {"tools": {"local_search": {"folder": str(locked / "docs")}}}
    data_dirs = [check_data_dir(case({"store": {"data_dir": str(path)}})) for path in (locked, locked / "data")]
    deployment = case(tree)
    (engine,) = deployment.in_process.values()
    weights = check_weights(deployment, "main", engine, find_checkpoint(deployment, engine))
    findings = [*data_dirs, *await check_tools(deployment), weights]

    assert [finding.verdict for finding in findings] == ["failed"] * 4
    assert all(str(locked) in finding.text for finding in findings)


def test_data_dir_needs_room(tmp_path: Path) -> None:
    tree = {"store": {"data_dir": str(tmp_path / "data")}}

    assert check_data_dir(case(tree, free_bytes=lambda path: 50 * 2**20)).verdict == "failed"
    assert check_data_dir(case(tree, free_bytes=lambda path: 500 * 2**20)).verdict == "warning"
    assert not (tmp_path / "data").exists()


def test_data_dir_in_memory_is_a_warning() -> None:
    shm = Path("/dev/shm")
    if filesystem(shm) != "tmpfs" or not os.access(shm, os.W_OK):
        pytest.skip("/dev/shm is not a tmpfs that can be written")
    finding = check_data_dir(case({"store": {"data_dir": str(shm / "shannon")}}, free_bytes=lambda path: 9 * GIB))

    assert finding.verdict == "warning"
    assert "gone with" in finding.text


@pytest.mark.parametrize(
    ("tree", "shm_bytes", "verdict"),
    [
        ({}, 0, "skipped"),
        (embedded(), 64 * 2**20, "ok"),
        (embedded(), None, "warning"),
        (embedded(tensor_parallel_size=8), 64 * 2**20, "failed"),
        (embedded(tensor_parallel_size=8), 512 * 2**20, "warning"),
        (embedded(tensor_parallel_size=4, data_parallel_size=2), 8 * GIB, "ok"),
    ],
)
def test_shared_memory_must_hold_the_workers(tree: dict[str, Any], shm_bytes: int | None, verdict: str) -> None:
    assert check_shared_memory(case(tree, shm_bytes=shm_bytes)).verdict == verdict


def test_few_open_files_are_a_warning() -> None:
    assert check_open_files(case(open_files=1024)).verdict == "warning"
    assert check_open_files(case(open_files=65536)).verdict == "ok"


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that this process listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_taken_port_names_who_holds_it(taken: int) -> None:
    finding = check_port(case({"server": {"port": taken}}))

    assert finding.verdict == "failed"
    assert f"127.0.0.1:{taken}" in finding.text
    assert str(os.getpid()) in finding.text
    assert "SHANNON_PORT" in finding.next_step


def test_port_of_a_running_gateway_is_fine(taken: int) -> None:
    assert check_port(case({"server": {"port": taken}}, serving=True)).verdict == "ok"


def test_address_of_another_machine_fails() -> None:
    finding = check_port(case({"server": {"host": "192.0.2.7", "port": 8080}}))

    assert finding.verdict == "failed"
    assert "SHANNON_HOST" in finding.next_step


# The deployment.


def test_every_key_that_is_not_there_is_told() -> None:
    keys = [{"name": "a", "key_env": "KEY_A"}, {"name": "b", "key_env": "KEY_B"}, {"name": "c", "key_env": "KEY_C"}]
    engine = {"kind": "remote", "model": "m", "urls": ["http://127.0.0.1:9/v1"], "api_key_env": "KEY_D"}
    findings = check_keys(case({"keys": keys, "engines": {"main": engine}}, {"KEY_B": KEY}))

    assert {finding.verdict for finding in findings} == {"failed"}
    assert [next(name for name in ("KEY_A", "KEY_C", "KEY_D") if name in f.text) for f in findings] == [
        "KEY_A",
        "KEY_C",
        "KEY_D",
    ]


def test_keys_that_are_there_are_counted() -> None:
    (finding,) = check_keys(case({"keys": [{"name": "a", "key_env": "KEY_A"}]}, {"KEY_A": KEY}))

    assert finding.verdict == "ok"
    assert "1 of 1" in finding.text
    assert KEY not in finding.text


@pytest.mark.anyio
async def test_each_tool_is_judged_alone(tmp_path: Path) -> None:
    tools = {
        "web_search": {"provider": "brave"},
        "serp_ads": {"provider": "serper"},
        "ga4": {"property_id": "1"},
        "local_search": {"folder": str(tmp_path / "gone")},
        "mcp": {"clock": {"command": ["no-such-program"]}, "there": {"url": "http://127.0.0.1:9/mcp"}},
    }
    findings = await check_tools(case({"tools": tools}, {"SERPER_API_KEY": "serper-secret", "PATH": "/usr/bin"}))
    by_subject = {finding.subject: finding for finding in findings}

    assert "BRAVE_API_KEY" in by_subject["tools.web_search"].text
    assert "GOOGLE_APPLICATION_CREDENTIALS" in by_subject["tools.ga4"].text
    assert "no-such-program" in by_subject["tools.mcp.clock"].text
    assert "gone" in by_subject["tools.local_search"].text
    assert by_subject["tools.serp_ads"].verdict == by_subject["tools.mcp.there"].verdict == "ok"


@pytest.mark.anyio
async def test_no_tools_are_no_failure() -> None:
    (finding,) = await check_tools(case())

    assert finding.verdict == "skipped"


def test_public_address_is_warned_of_what_is_open() -> None:
    open_to_all = {"host": "0.0.0.0", "metrics_public": True}
    tree = {"server": open_to_all, "inspector": {"enabled": True, "public": True}}
    findings = check_exposure(case(tree))

    assert {finding.verdict for finding in findings} == {"warning"}
    said = " ".join(finding.text + finding.next_step for finding in findings)
    for setting in ("server.allowed_hosts", "server.metrics_public", "inspector.public"):
        assert setting in said


@pytest.mark.parametrize(
    "server", [{"host": "127.0.0.1"}, {"host": "::1"}, {"host": "0.0.0.0", "allowed_hosts": ["a.b"]}]
)
def test_address_that_is_held_shut_is_fine(server: dict[str, Any]) -> None:
    assert [finding.verdict for finding in check_exposure(case({"server": server}))] == ["ok"]


def test_no_time_to_drain_is_a_warning() -> None:
    assert check_drain(case({"server": {"drain_timeout_s": 0}})).verdict == "warning"
    assert "45" in check_drain(case()).text


# The whole.


def test_secrets_are_concealed() -> None:
    environment = {"SHANNON_REDIS_URL": "redis://:hunter-22@store:6379", "KEY_A": KEY, "BRAVE_API_KEY": "brave-secret"}
    hidden = secrets(case({"keys": [{"name": "a", "key_env": "KEY_A"}]}).config, environment)
    finding = conceal(Finding("x", "failed", f"no {KEY} at hunter-22", "try brave-secret"), hidden)

    assert finding.text == "no *** at ***"
    assert finding.next_step == "try ***"


@pytest.mark.anyio
async def test_every_check_names_itself_and_failures_a_next_step(tmp_path: Path, taken: int) -> None:
    tree = {"store": {"data_dir": str(tmp_path)}, "server": {"host": "0.0.0.0", "port": taken, "drain_timeout_s": 0}}
    findings = await check_all(case(tree, open_files=256))

    assert {"python", "gpu_driver", "keys", "port", "drain", "data_dir", "store"} <= {f.check for f in findings}
    assert all(finding.text and "\n" not in finding.text for finding in findings)
    assert all(finding.next_step for finding in findings if finding.verdict in ("failed", "warning"))


def deployment(folder: Path, text: str = "") -> str:
    path = folder / "deployment.yaml"
    path.write_text(
        f"engines: {{main: {{kind: mock}}}}\nmodels: {{shannon-chat: {{description: '[red]x'}}}}\n"
        f"store: {{data_dir: {folder}}}\nserver: {{port: 0}}\n{text}"
    )
    return str(path)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SHANNON_CONFIG", "SHANNON_REDIS_URL", "CUDA_VISIBLE_DEVICES", "SHANNON_PORT", "SHANNON_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")


def test_command_ends_with_0_where_nothing_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--config", deployment(tmp_path), "--json"])
    findings = json.loads(capsys.readouterr().out)

    assert code == 0, [finding for finding in findings if finding["verdict"] == "failed"]
    assert set(findings[0]) == {"check", "verdict", "text", "next_step", "subject"}
    assert {finding["verdict"] for finding in findings} <= {"ok", "warning", "skipped"}


def test_command_shows_failures_and_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = deployment(tmp_path, "keys: [{name: '[bold]ci', key_env: NO_SUCH_KEY}]\n")

    assert main(["doctor", "--config", path]) == 1
    out = capsys.readouterr().out
    assert "NO_SUCH_KEY" in out
    assert "[bold]ci" in out
    assert "-> Set it where the gateway is started" in out
    assert "1 failed" in out


def test_configuration_that_does_not_parse_is_told_with_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = deployment(tmp_path, "sessions: {ttl: 5}\n")

    assert main(["doctor", "--config", path, "--json"]) == 1
    (refused,) = [f for f in json.loads(capsys.readouterr().out) if f["verdict"] == "failed"]
    assert refused["check"] == "config"
    assert refused["text"] == f"{path}: sessions.ttl: unknown setting"


def test_file_that_is_no_yaml_is_told_by_line_and_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deployment.yaml"
    path.write_text("engines: {main: {kind: mock}\nmodels: {}\n")

    assert main(["doctor", "--config", str(path), "--json"]) == 1
    refused = json.loads(capsys.readouterr().out)[-1]
    assert refused["text"].startswith(f"{path}: not valid YAML: ")
    assert refused["text"].endswith("in line 2, column 1")


def test_file_that_is_not_there_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--config", "/nowhere.yaml", "--json"]) == 1

    refused = json.loads(capsys.readouterr().out)[-1]
    assert (refused["verdict"], refused["next_step"]) == ("failed", "Name another with --config")


def test_password_is_in_no_log_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = deployment(tmp_path)
    for url in ("redis://:hunter/22@127.0.0.1:9", "redis://:hunter%2F22@127.0.0.1:9"):
        monkeypatch.setenv("SHANNON_REDIS_URL", url)
        assert main(["doctor", "--config", path]) == 1

    printed = "".join(capfd.readouterr())
    assert "failed   store" in printed
    assert "hunter" not in printed
    assert caplog.records == []


def test_without_a_deployment_the_machine_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0

    findings = json.loads(capsys.readouterr().out)
    assert findings[-1]["verdict"] == "skipped"
    assert "--config" in findings[-1]["next_step"]


def test_unknown_option_ends_with_2() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--verbose"])

    assert caught.value.code == 2
