"""The tests' own structure: no test module imports another, and every scaffold shows its use."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.app import ROOT

SCAFFOLDS = sorted((ROOT / "tests/support").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The names of all modules that a module imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_no_test_module_imports_another() -> None:
    found = {
        str(path.relative_to(ROOT)): name
        for path in (ROOT / "tests").rglob("*.py")
        for name in imported(path)
        if name.startswith("tests.") and name.rpartition(".")[2].startswith("test_")
    }
    assert found == {}, "move what they share to tests/support"


@pytest.mark.parametrize("path", SCAFFOLDS, ids=lambda path: str(path.relative_to(ROOT / "tests/support")))
def test_scaffold_shows_its_use(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert any(line.startswith("    ") for line in docstring.splitlines()), "add an example, indented by four spaces"
