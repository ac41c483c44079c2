"""Signals from the terminal are for the gateway, which drains first; the processes of an engine don't act on them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest

from engine.process import vllm_plugin, without_terminal_signals

SURVIVED = 7


def wait_for(number: signal.Signals) -> None:
    """Run in the child: end with SURVIVED once the signal has arrived, which ends any other process."""
    vllm_plugin()
    assert os.getsid(0) == os.getpid(), "a signal to the gateway's group does not reach it"
    while number not in signal.sigpending():
        time.sleep(0.001)
    sys.exit(SURVIVED)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_engine_process_survives_signals_of_the_terminal_from_its_first_moment(number: signal.Signals) -> None:
    process = multiprocessing.get_context("spawn").Process(target=wait_for, args=(number,), daemon=True)
    blocked_after: list[set[signal.Signals | int]] = []

    def start() -> None:
        with without_terminal_signals():
            process.start()
        assert process.pid is not None
        os.kill(process.pid, number)  # it has not even imported anything
        blocked_after.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        process.join(30)  # the thread that started it must live as long: see die_with_parent

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    process.kill()
    process.join()

    assert process.exitcode == SURVIVED
    assert not blocked_after[0] & {signal.SIGINT, signal.SIGHUP}
