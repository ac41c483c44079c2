"""The command line: its errors are one line on stderr and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway import __version__
from gateway.cli import main


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])

    assert caught.value.code == 0
    assert capsys.readouterr().out == f"shannon {__version__}\n"


def test_serve_asks_for_a_configuration(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("SHANNON_CONFIG", raising=False)

    assert main(["serve"]) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert "--config" in line
    assert "SHANNON_CONFIG" in line


def test_missing_configuration_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gone.yaml"

    assert main(["serve", "--config", str(path)]) == 2

    assert capsys.readouterr().err.splitlines() == [f"shannon: {path}: No such file or directory"]


def test_error_is_printed_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "[red]" / "[/blue].yaml"

    assert main(["serve", "--config", str(path)]) == 2

    assert capsys.readouterr().err.splitlines() == [f"shannon: {path}: No such file or directory"]


def test_key_too_short_is_refused_without_being_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text(
        "engines: {main: {kind: mock}}\n"
        "models: {shannon-chat: {description: x}}\n"
        f"store: {{data_dir: {tmp_path}}}\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("SHANNON_BOOTSTRAP_KEY", "hunter2")

    assert main(["serve", "--config", str(path)]) == 2

    err = capsys.readouterr().err
    assert "SHANNON_BOOTSTRAP_KEY" in err
    assert "hunter2" not in err
