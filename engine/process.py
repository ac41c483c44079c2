"""Child processes that don't outlive the gateway, however it ends.

vLLM's EngineCore goes on for ever when its parent is killed, and keeps its GPU memory. `die_with_parent` runs inside
it, as a vLLM plugin (see the entry point in pyproject.toml). Linux only; elsewhere nothing happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Ask the kernel to send `number` to this process when the thread that made it is gone."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def vllm_plugin() -> None:
    """Called by vLLM in each of its processes; the ones it spawned itself die with their parent."""
    if multiprocessing.parent_process() is not None:
        die_with_parent(signal.SIGKILL)
