"""Images built and containers run by Podman, in a store of their own, from a base image made of Debian's packages.

Example:

    image = podman.build("gateway", podman.make_base())
    container = podman.start(image, {"SHANNON_CONFIG": "configs/mock.yaml"})

No registry is needed: the base is what `debootstrap` would make, with Python. It replaces the Dockerfile's BASE_IMAGE,
and trusts the authorities that this machine trusts. Linux and root only; skips the test if a program is missing or
containers are not permitted.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gateway import __version__
from tests.support.debian import program
from tests.support.gateway_process import ROOT

_AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")
_BUILD_S = 1200
_MEMORY = "/dev/shm"
_BASE_BYTES = 2**30
_HARDENED = [
    "--read-only",
    "--read-only-tmpfs=false",
    "--tmpfs=/tmp",
    "--cap-drop=all",
    "--security-opt=no-new-privileges",
]
"""As compose.yaml runs the gateway: nothing can be written but the image's volumes and /tmp."""


class Podman:
    """Podman with images and containers under one folder."""

    def __init__(self, folder: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("containers need root")
        if subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode != 0:
            pytest.skip("namespaces are not permitted here")
        self._run = tempfile.mkdtemp(prefix="podman-")  # it takes no path of more than 50 characters
        self._command = [program("podman", "podman"), "--root", str(folder / "root"), "--runroot", self._run]
        # Neither systemd nor control groups of version 2, which crun asks for, are everywhere.
        self._command += ["--cgroup-manager=cgroupfs", f"--runtime={program('runc', 'runc')}"]
        self._folder = folder

    def __call__(self, *arguments: str, timeout_s: float = 60, content: str | None = None) -> str:
        """Run a podman command and return what it printed. A failure fails the test with podman's own words."""
        done = self.try_to(*arguments, timeout_s=timeout_s, content=content)
        assert done.returncode == 0, f"podman {' '.join(arguments)}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        return done.stdout.strip()

    def try_to(
        self, *arguments: str, timeout_s: float = 60, content: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a podman command that may fail."""
        command = [*self._command, *arguments]
        return subprocess.run(command, input=content, capture_output=True, text=True, timeout=timeout_s)

    def make_base(self) -> str:
        """Make the base image and return its name."""
        archive = self._folder / "base.tar"
        trust = (
            f'cp {_AUTHORITIES} "$1{_AUTHORITIES}" && printf "[global]\\ncert = {_AUTHORITIES}\\n" > "$1/etc/pip.conf"'
        )
        options = ["--quiet", "--mode=root", "--variant=minbase", "--include=python3-venv,ca-certificates"]
        options += ["--dpkgopt=force-unsafe-io", f"--customize-hook={trust}"]
        # dpkg waits for the disk after every package; in memory there is nothing to wait for.
        roomy = shutil.disk_usage(_MEMORY).free > _BASE_BYTES
        made = subprocess.run(
            [program("mmdebstrap", "mmdebstrap"), *options, "trixie", str(archive)],
            env=os.environ | ({"TMPDIR": _MEMORY} if roomy else {}),
            capture_output=True,
            text=True,
            timeout=_BUILD_S,
        )
        assert made.returncode == 0, made.stderr[-4000:]
        self("import", "--quiet", str(archive), "localhost/base", timeout_s=300)
        archive.unlink()
        return "localhost/base"

    def build(self, target: str, base: str) -> str:
        """Build one target of the Dockerfile and return the image's name."""
        arguments = {"BASE_IMAGE": base, "VERSION": __version__}
        options = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        # Docker's own format, for an OCI image has no health check.
        options += ["--format=docker", "--isolation=chroot", "--layers=false"]
        options += [f"--target={target}", f"--tag=localhost/{target}"]
        self("build", *options, str(ROOT), timeout_s=_BUILD_S)
        return f"localhost/{target}"

    def inspect(self, name: str) -> dict[str, Any]:
        """Return what podman knows of an image or a container."""
        found: list[dict[str, Any]] = json.loads(self("inspect", name))
        return found[0]

    def start(self, image: str, environment: Mapping[str, str], *options: str) -> str:
        """Start a hardened container on this machine's loopback and return its id."""
        return self("run", "--detach", *self._options(environment), *options, image)

    def run(self, image: str, *arguments: str, environment: Mapping[str, str] | None = None, user: str) -> str:
        """Run a command of the image to its end, as another user, and return what it printed."""
        return self("run", "--rm", f"--user={user}", *self._options(environment or {}), image, *arguments)

    def _options(self, environment: Mapping[str, str]) -> list[str]:
        # Podman's own limits are higher than root within a container may set.
        ulimits = ["--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096"]
        variables = [f"--env={name}={value}" for name, value in environment.items()]
        return [*_HARDENED, "--network=host", *ulimits, *variables]

    def close(self) -> None:
        """End all containers, and remove them and the images, which take a gigabyte."""
        self.try_to("rm", "--all", "--force", "--time=0", timeout_s=120)
        self.try_to("image", "unmount", "--all", "--force")
        self.try_to("rmi", "--all", "--force", timeout_s=300)
        shutil.rmtree(self._run, ignore_errors=True)
