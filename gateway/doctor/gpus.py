"""NVIDIA's driver and its devices, asked through NVML (nvidia-ml-py), else nvidia-smi.

Does not handle processes and their memory: containers don't see each other's. Devices with unified memory
(Jetson) report no memory of their own.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_TIMEOUT_S = 30.0  # a driver without its persistence daemon wakes up first
_QUERY = "name,memory.total,memory.free,driver_version,uuid"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device. Bytes are None where it has no memory of its own."""

    name: str
    total_bytes: int | None
    free_bytes: int | None
    uuid: str = ""


@dataclass(frozen=True, slots=True)
class Driver:
    """What answers. `cuda` is the newest CUDA version that it runs, `failure` why it can't be used."""

    version: str = ""
    cuda: tuple[int, int] | None = None
    gpus: tuple[Gpu, ...] = ()
    failure: str = ""

    @property
    def answers(self) -> bool:
        return bool(self.version) and not self.failure


def find_driver(environment: Mapping[str, str]) -> Driver:
    """Ask for the driver and the devices that `environment` leaves visible."""
    driver = _ask_nvml() or _ask_nvidia_smi() or Driver()
    return Driver(driver.version, driver.cuda, _visible(driver.gpus, environment), driver.failure)


def _ask_nvml() -> Driver | None:
    """The devices that NVML reports, or None without the package or the library."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        absent = (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED)
        return None if error.value in absent else Driver(failure=str(error))
    try:
        cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
        handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
        gpus = tuple(_device(nvml, handle) for handle in handles)
        return Driver(_text(nvml.nvmlSystemGetDriverVersion()), (cuda // 1000, cuda % 1000 // 10), gpus)
    except nvml.NVMLError as error:
        return Driver(failure=str(error))
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _device(nvml: Any, handle: Any) -> Gpu:
    name, uuid = _text(nvml.nvmlDeviceGetName(handle)), _text(nvml.nvmlDeviceGetUUID(handle))
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError:  # it shares the machine's
        return Gpu(name, None, None, uuid)
    return Gpu(name, int(memory.total), int(memory.free), uuid)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value  # older packages give bytes


def _ask_nvidia_smi() -> Driver | None:
    path = shutil.which("nvidia-smi")
    if path is None:
        return None
    command = [path, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Driver(failure=f"nvidia-smi did not answer within {_TIMEOUT_S:.0f} s")
    except OSError as error:
        return Driver(failure=f"nvidia-smi can't be run: {error.strerror}")
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    rows = [row for row in rows if len(row) == 5]
    if done.returncode or not rows:
        said = (done.stdout + done.stderr).strip().partition("\n")[0]
        return Driver(failure=said or f"nvidia-smi ends with code {done.returncode}")
    gpus = tuple(Gpu(name, _mebibytes(total), _mebibytes(free), uuid) for name, total, free, _, uuid in rows)
    return Driver(rows[0][3], None, gpus)


def _mebibytes(cell: str) -> int | None:
    return int(cell) * 2**20 if cell.isdecimal() else None  # "[N/A]" where the memory is the machine's


def _visible(gpus: tuple[Gpu, ...], environment: Mapping[str, str]) -> tuple[Gpu, ...]:
    """Return the devices that CUDA_VISIBLE_DEVICES names, by number or by the beginning of their id; unset, all."""
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return gpus
    found: list[Gpu] = []
    for name in filter(None, map(str.strip, wanted.split(","))):
        if name.isdecimal():
            matching = [gpus[int(name)]] if int(name) < len(gpus) else []
        else:
            matching = [gpu for gpu in gpus if gpu.uuid.startswith(name)]
        if not matching:  # CUDA ignores it and all that follow
            break
        found += matching
    return tuple(found)
