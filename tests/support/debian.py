"""Finds programs that tests drive. Installs the Debian package where possible, otherwise skips the test.

Example:

    nginx = program("nginx", package="nginx")
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess

import pytest

_STEP_S = 300


def program(command: str, package: str) -> str:
    """Return a command's path. Root on a machine with apt installs the package; else the test is skipped."""
    if shutil.which(command) is None and os.geteuid() == 0 and shutil.which("apt-get"):
        for step in (["update"], ["install", "-y", "--no-install-recommends", package]):
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(["apt-get", *step], capture_output=True, timeout=_STEP_S)
    path = shutil.which(command)
    if path is None:
        pytest.skip(f"{command} is not installed and could not be: install Debian's package {package}")
    return path
