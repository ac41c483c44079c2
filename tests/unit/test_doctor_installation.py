"""`shannon doctor` on Python, the packages, vLLM's build and the driver; NVML is scripted, nvidia-smi is a script."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from gateway.doctor.case import Machine, inspect_machine
from gateway.doctor.gpus import Driver, Gpu, find_driver
from gateway.doctor.installation import check_driver, check_packages, check_python, check_vllm, unmet
from tests.support.doctor_case import CPU, CUDA, GIB, H100


def test_python_too_old_fails() -> None:
    assert check_python(Machine(python=(3, 10, 1))).verdict == "failed"
    assert "3.11.7" in check_python(Machine(python=(3, 11, 7))).text


def test_missing_and_other_versions_are_unmet() -> None:
    asked = ["redis[hiredis]>=6", "rich>=14", 'vllm==0.32.0; extra == "cuda"', 'ruff; extra == "dev"']
    asked += ['winloop; sys_platform == "win32"']

    assert unmet(asked, {"redis": "5.0.1", "vllm": "0.31.0"}) == [
        "redis 5.0.1, not >=6",
        "rich is missing",
        "vllm 0.31.0, not ==0.32.0",
    ]
    assert unmet(asked, {"redis": "6.4.0", "rich": "15.0"}) == []


def test_packages_of_this_environment_are_read() -> None:
    machine = inspect_machine({})

    assert machine.packages["pydantic"]
    assert check_packages(machine).verdict in ("ok", "skipped")
    assert machine.memory_bytes > 0


@pytest.mark.parametrize(
    ("packages", "verdict", "words"),
    [
        (CPU, "ok", "the CPU build"),
        (CUDA, "ok", "the CUDA build"),
        ({}, "failed", "not installed"),
        (CUDA | CPU, "failed", "overwrite"),
        (CPU | {"torchvision": "0.28.0"}, "failed", "torchvision"),
    ],
)
def test_build_of_vllm_is_judged(packages: dict[str, str], verdict: str, words: str) -> None:
    finding = check_vllm(Machine(packages=packages), needed=True)

    assert finding.verdict == verdict
    assert words in finding.text
    assert bool(finding.next_step) == (verdict == "failed")


def test_vllm_is_not_missed_where_no_engine_needs_it() -> None:
    assert check_vllm(Machine(), needed=False).verdict == "skipped"


@pytest.mark.parametrize(
    ("driver", "packages", "verdict", "words"),
    [
        (H100, CUDA, "ok", "8 x NVIDIA H100 80GB HBM3 (79.0 GiB of 80.0 GiB free), driver 580.65.06"),
        (H100, CPU, "warning", "unused"),
        (Driver(), CPU, "ok", "run on the CPU"),
        (Driver(), CUDA, "failed", "no NVIDIA driver answers"),
        (Driver(failure="Driver/library version mismatch"), CUDA, "failed", "version mismatch"),
        (Driver("535.54", (12, 2), H100.gpus), CUDA, "failed", "runs CUDA 12.2"),
        (Driver("580.65.06", (13, 0), ()), CUDA, "failed", "shows no GPU"),
    ],
)
def test_driver_is_held_against_the_build(driver: Driver, packages: dict[str, str], verdict: str, words: str) -> None:
    finding = check_driver(Machine(driver=driver, packages=packages), needed=True)

    assert finding.verdict == verdict
    assert words in finding.text
    assert bool(finding.next_step) == (verdict != "ok")


def test_deployment_for_gpus_is_warned_of_the_cpu() -> None:
    finding = check_driver(Machine(packages=CPU), needed=True, wanted=True)

    assert finding.verdict == "warning"
    assert "PROFILE=cuda" in finding.next_step


class NvmlError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


def fake_nvml(*, init: int = 0, memory: bool = True) -> types.ModuleType:
    """Return what stands in for pynvml: two devices, or an error at its start."""

    def start() -> None:
        if init:
            raise NvmlError(init)

    def memory_info(handle: int) -> Any:
        if not memory:
            raise NvmlError(3)
        return types.SimpleNamespace(total=80 * GIB, free=(70 + handle) * GIB)

    module = types.ModuleType("pynvml")
    vars(module).update(
        NVMLError=NvmlError,
        NVML_ERROR_LIBRARY_NOT_FOUND=12,
        NVML_ERROR_DRIVER_NOT_LOADED=9,
        nvmlInit=start,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: b"580.65.06",
        nvmlSystemGetCudaDriverVersion_v2=lambda: 12040,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetName=lambda handle: "NVIDIA H100",
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}abc",
        nvmlDeviceGetMemoryInfo=memory_info,
    )
    return module


def test_nvml_tells_driver_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    driver = find_driver({})

    assert (driver.version, driver.cuda, driver.answers) == ("580.65.06", (12, 4), True)
    assert [gpu.free_bytes for gpu in driver.gpus] == [70 * GIB, 71 * GIB]


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        ("1", ["GPU-1abc"]),
        ("GPU-0", ["GPU-0abc"]),
        ("1,0", ["GPU-1abc", "GPU-0abc"]),
        ("", []),
        ("0,7,1", ["GPU-0abc"]),
    ],
)
def test_only_visible_devices_count(monkeypatch: pytest.MonkeyPatch, visible: str, found: list[str]) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())

    assert [gpu.uuid for gpu in find_driver({"CUDA_VISIBLE_DEVICES": visible}).gpus] == found


def test_device_that_shares_the_machines_memory_tells_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(memory=False))

    assert {gpu.total_bytes for gpu in find_driver({}).gpus} == {None}


def test_driver_that_nvml_can_not_use_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(init=18))

    assert find_driver({}).failure == "NVML error 18"


@pytest.mark.parametrize(
    ("script", "found"),
    [
        (
            "echo 'NVIDIA L4, 23034, 22000, 570.1, GPU-a'",
            Driver("570.1", None, (Gpu("NVIDIA L4", 23034 * 2**20, 22000 * 2**20, "GPU-a"),)),
        ),
        (
            "echo 'NVIDIA GB10, [N/A], [N/A], 580.1, GPU-b'",
            Driver("580.1", None, (Gpu("NVIDIA GB10", None, None, "GPU-b"),)),
        ),
        ("echo 'NVIDIA-SMI has failed'; exit 9", Driver(failure="NVIDIA-SMI has failed")),
    ],
)
def test_nvidia_smi_is_asked_without_nvml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, found: Driver
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(init=12))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    assert find_driver({}) == found
