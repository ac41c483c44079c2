"""The input of the checks: the machine, the deployment and the environment, as values."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import psutil

from gateway.doctor.gpus import Driver, find_driver
from gateway.settings.config import Config, EmbeddedSettings

DISTRIBUTION = "shannon-gateway"
_KERNEL_OPEN_FILES = 2**20
"""What Linux allows a process that has no limit (`fs.nr_open`)."""
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to run on."""

    driver: Driver = field(default_factory=Driver)
    memory_bytes: int = 64 * 2**30
    """RAM, or what the container may use of it."""
    shm_bytes: int | None = 16 * 2**30
    """Size of /dev/shm; None where there is none."""
    open_files: int = 65_536
    """The hard limit on open files; the server raises its soft one."""
    python: tuple[int, ...] = sys.version_info[:3]
    packages: Mapping[str, str] = field(default_factory=dict)
    """Distribution -> version."""
    free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free


@dataclass(frozen=True, slots=True)
class Case:
    """One deployment on one machine. `source` is the file it was read from, as the user wrote it."""

    config: Config
    machine: Machine
    environment: Mapping[str, str] = field(default_factory=dict)
    source: str = "FILE"
    serving: bool = False
    """A gateway holds the port: what it uses is not missing."""

    @property
    def in_process(self) -> dict[str, EmbeddedSettings]:
        """The engines whose models run in this process."""
        return {name: engine for name, engine in self.config.engines.items() if isinstance(engine, EmbeddedSettings)}


def inspect_machine(environment: Mapping[str, str]) -> Machine:
    """Facts about this machine."""
    shm = Path("/dev/shm")
    return Machine(
        driver=find_driver(environment),
        memory_bytes=_memory_bytes(),
        shm_bytes=shutil.disk_usage(shm).total if shm.is_dir() else None,
        open_files=_most_open_files(),
        packages=_packages(),
    )


def _most_open_files() -> int:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return _KERNEL_OPEN_FILES if hard == resource.RLIM_INFINITY else hard


def _memory_bytes() -> int:
    total = int(psutil.virtual_memory().total)
    for path in _CGROUP_LIMITS:
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():  # "max" means no limit
            total = min(total, int(text))
    return total


def _packages() -> dict[str, str]:
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(name.lower().replace("_", "-"), distribution.version)
    return found


def existing_parent(path: Path) -> Path:
    """Return `path`, or else the nearest folder above it that exists, as far as this user may look."""
    path = Path(os.path.abspath(path.expanduser()))
    return next(folder for folder in (path, *path.parents) if os.path.exists(folder))
