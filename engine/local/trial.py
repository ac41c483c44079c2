"""Checks engines' settings with vLLM, without loading a model. Run by `gateway.doctor.engine_settings`.

A separate process, because importing vLLM takes seconds, and ends with a signal if vLLM was built for another CPU. It
reads a JSON list of arguments of `judge` from standard input; the last line of standard output is a JSON list of
errors, null where there is none. Not handled: checkpoints that are not on this machine; the hub is not queried.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from engine.base import EngineError
from engine.local.async_llm import AsyncLLMEngine, go_offline, local_path


class _Trial(AsyncLLMEngine):
    def check_model(self) -> None:
        """Read the checkpoint's configuration with these settings. Raises ValueError, OSError and others."""
        self._engine_args().create_model_config()


def judge(model: str, args: dict[str, Any], revision: str | None, trust_remote_code: bool) -> str | None:
    """Return vLLM's error about an engine's settings in one line, None if there is none."""
    try:
        trial = _Trial(model, args, revision=revision, trust_remote_code=trust_remote_code)
        if local_path(model, revision) and not trust_remote_code:  # `shannon serve` runs that code, this does not
            trial.check_model()
    except EngineError as error:
        return str(error)
    except Exception as error:  # vLLM raises any type here, as at its start
        return _one_line(error)
    return None


def _one_line(error: Exception) -> str:
    errors = getattr(error, "errors", None)  # pydantic's
    if callable(errors):
        first = errors()[0]
        where = f"args.{first['loc'][0]}: " if first["loc"] else ""
        return where + str(first["msg"]).removeprefix("Value error, ").partition("\n")[0]
    return str(error).strip().partition("\n")[0] or type(error).__name__


if __name__ == "__main__":
    go_offline()
    print("\n" + json.dumps([judge(**arguments) for arguments in json.load(sys.stdin)]))
