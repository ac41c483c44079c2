"""Runs `shannon` commands in forks of one process that has `gateway.cli` imported already.

Example:

    with command_line() as runs:
        outcome = runs.run("serve", "--config", "missing.yaml")
    assert outcome.code != 0

Every run is `gateway.cli.main` in a process of its own, with its own environment, working directory and user. Run as a
module this serves such requests, one JSON object per line.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534
_KEPT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `code` is None where it did not, and was stopped: it serves."""

    code: int | None
    out: str
    err: str


class CommandLine:
    """Runs commands. See the module."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(
        self,
        *argv: str,
        environment: dict[str, str] | None = None,
        folder: Path | None = None,
        user: int | None = None,
        open_files: int | None = None,
        until: str = "Uvicorn running on",
        timeout_s: float = 60.0,
    ) -> Outcome:
        """Run `shannon ARGV`, until it ends or has printed `until`. `user` needs root."""
        fields = {
            "argv": argv,
            "environment": environment or {},
            "folder": str(folder or ROOT),
            "user": user,
            "open_files": open_files,
            "until": until,
            "timeout_s": timeout_s,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(fields), file=self._process.stdin, flush=True)
        return Outcome(**json.loads(self._process.stdout.readline()))


@contextlib.contextmanager
def command_line() -> Iterator[CommandLine]:
    """Start the process that forks."""
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.command_line"],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield CommandLine(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=30)


def _run(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            _become(request, out.fileno(), err.fileno())
        code = _wait(child, request, err)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return {"code": code, "out": texts[0], "err": texts[1]}


def _wait(child: int, request: dict[str, Any], err: Any) -> int | None:
    deadline = time.monotonic() + request["timeout_s"]
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        err.seek(0)
        if request["until"] in err.read() or time.monotonic() > deadline:
            # All that it started is in its group; a server that is told to end waits for nothing here.
            os.kill(child, signal.SIGTERM)
            for _ in range(500):
                if os.waitpid(child, os.WNOHANG)[0]:
                    return None
                time.sleep(0.02)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.01)


def _become(request: dict[str, Any], out: int, err: int) -> None:
    """Be the command line, in a child. Does not return."""
    import resource

    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.setsid()
        os.chdir(request["folder"])
        for name in set(os.environ) - {*_KEPT, "PYTHONPATH"}:
            del os.environ[name]
        os.environ.update(request["environment"])
        if request["open_files"] is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (request["open_files"],) * 2)
        if request["user"] is not None:
            os.setgroups([])
            os.setgid(request["user"])
            os.setuid(request["user"])
        from gateway.cli import main

        code = main(request["argv"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    import uvloop  # noqa: F401 - what `serve` imports, once for all runs

    import gateway.cli
    import gateway.serving.reload
    import gateway.serving.server  # noqa: F401

    assert threading.active_count() == 1, "a fork has only one thread"
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)
