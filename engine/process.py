"""Child processes that end when the gateway does: not later, and not before.

vLLM's EngineCore keeps running when its parent is killed, and keeps its GPU memory. `die_with_parent` runs inside it,
as a vLLM plugin (see the entry point in pyproject.toml). Linux only; elsewhere nothing happens.

The other way round, a signal that is sent to the gateway's whole process group would end a core under the requests
that the gateway still drains. So the core leaves the group, also in the plugin. The plugin runs only after vLLM was
imported: `without_terminal_signals` protects the process from Ctrl-C before that.
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
    """Ask the kernel to send `number` to this process when the thread that made it is gone."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def vllm_plugin() -> None:
    """Called by vLLM in each of its processes; those it spawned die with their parent, in a session of their own."""
    if multiprocessing.parent_process() is not None:
        die_with_parent(signal.SIGKILL)
        with contextlib.suppress(OSError):  # it leads a group already
            os.setsid()


@contextlib.contextmanager
def without_terminal_signals() -> Iterator[None]:
    """Block SIGINT and SIGHUP in this thread, and so in every process that is started in here.

    For a thread of its own: where the event loop runs they would be blocked for the gateway.
    """
    _start_resource_tracker()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_resource_tracker() -> None:
    """Start Python's process that removes what others leave behind, unless it runs.

    Here, because its start unblocks SIGINT. Without its warning, because a core that is frozen or not yet up is killed
    on purpose: the tracker removes the core's semaphores at the end all the same.
    """
    sys.warnoptions.append("ignore:resource_tracker")
    try:
        resource_tracker.ensure_running()  # hands the options on
    finally:
        sys.warnoptions.remove("ignore:resource_tracker")
