"""Ties the lifetime of child processes to the gateway's.

vLLM's EngineCore keeps running, and keeps its GPU memory, when its parent is killed. `die_with_parent` runs inside it
as a vLLM plugin (see the entry point in pyproject.toml). Linux only; no effect elsewhere.

Conversely, a signal to the gateway's process group would end a core while the gateway drains requests. The plugin
therefore also moves the core out of the group. The plugin only runs after vLLM is imported;
`without_terminal_signals` protects the process from Ctrl-C until then.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Ask the kernel to send `number` to this process when the thread that created it ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def vllm_plugin() -> None:
    """Entry point that vLLM calls in each of its processes; child processes die with their parent, in a new session."""
    if multiprocessing.parent_process() is not None:
        die_with_parent(signal.SIGKILL)
        with contextlib.suppress(OSError):  # it is a group leader already
            os.setsid()


@contextlib.contextmanager
def without_terminal_signals() -> Iterator[None]:
    """Block SIGINT and SIGHUP in this thread and in every process started inside the context.

    Must not run in the event loop's thread, where it would block the signals for the gateway.
    """
    _start_resource_tracker()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_resource_tracker() -> None:
    """Start Python's resource tracker unless it runs.

    It must be running before the signals are blocked, because its start unblocks SIGINT. Its warning is suppressed,
    because a core that is frozen or still starting is killed on purpose; the tracker removes its semaphores anyway.
    """
    sys.warnoptions.append("ignore:resource_tracker")
    try:
        resource_tracker.ensure_running()  # the tracker inherits the options
    finally:
        sys.warnoptions.remove("ignore:resource_tracker")
