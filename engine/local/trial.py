"""Has vLLM validate the settings of engines, without loading a model. Run by `gateway.doctor.engine_settings`.

A process of its own, because importing vLLM takes seconds and ends in a signal where it was built for another CPU.
Takes a JSON list on standard input, of the arguments of `judge`; the last line of standard output is a JSON list of
what is wrong with each, null where nothing is. Files that are not here are not looked at, nor is the hub asked.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from engine.base import EngineError
from engine.local.async_llm import AsyncLLMEngine, go_offline, local_path


class _Trial(AsyncLLMEngine):
    def check_model(self) -> None:
        """Have vLLM read the checkpoint's configuration under these settings. Raises ValueError, OSError and more."""
        self._engine_args().create_model_config()


def judge(model: str, args: dict[str, Any], revision: str | None, trust_remote_code: bool) -> str | None:
    """vLLM's objection to an engine's settings, in one line."""
    try:
        trial = _Trial(model, args, revision=revision, trust_remote_code=trust_remote_code)
        if local_path(model, revision) and not trust_remote_code:  # `shannon serve` runs that code, this does not
            trial.check_model()
    except EngineError as error:
        return str(error)
    except Exception as error:  # vLLM raises all sorts here, as it does when it starts
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
