"""The version is in gateway/__init__.py; everything else that reports a version reports the same."""

from __future__ import annotations

import re
import tomllib

import pytest
import yaml

from gateway import __version__
from tests.support.app import ROOT

CHART = ROOT / "helm" / "shannon" / "Chart.yaml"
DOCKERFILE = ROOT / "Dockerfile"


def test_version_is_semantic() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def test_package_reads_the_version() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())

    assert "version" not in pyproject["project"]
    assert pyproject["project"]["dynamic"] == ["version"]
    assert pyproject["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "gateway.__version__"}


def test_changelog_begins_with_the_version() -> None:
    entries = re.findall(r"^## \[(.+?)\] - (\d{4}-\d{2}-\d{2})$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert entries[0][0] == __version__
    assert [date for _, date in entries] == sorted((date for _, date in entries), reverse=True)


@pytest.mark.skipif(not CHART.exists(), reason="there is no chart here")
def test_chart_installs_the_version() -> None:
    assert yaml.safe_load(CHART.read_text())["appVersion"] == __version__


@pytest.mark.skipif(not DOCKERFILE.exists(), reason="there is no image here")
def test_image_is_told_the_version() -> None:
    labels = re.findall(r"org\.opencontainers\.image\.version=(\S+)", DOCKERFILE.read_text())

    assert labels
    assert set(labels) == {"${VERSION}"}
