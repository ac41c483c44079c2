"""What the tests of the image and of the chart's pods share: the `gateway` image, built once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.deploy.containers import Podman


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    podman = Podman(tmp_path_factory.mktemp("podman"))
    try:
        yield podman
    finally:
        podman.close()


@pytest.fixture(scope="session")
def image(podman: Podman) -> str:
    """The `gateway` target."""
    return podman.build("gateway", podman.make_base())
