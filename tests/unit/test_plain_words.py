"""The product's text uses the usual terms: words that a reader has to decode are named with the term to use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.app import ROOT

TERMS = {
    r"anew": "again, or re- (rebuild, restart)",
    r"bearable": "within limits",
    r"somebody|anybody|everybody|nobody|whoever": "the party: the client, the caller, no other gateway, every key",
    r"mend(?:s|ed)?": "fix, repair",
    r"strangers?'?": "untrusted",
    r"take[ns]? up again": "resume",
    r"Leaves out": "Does not handle",
    r"Fails with": "Raises",
    r"See the module\.": "what the class is for",
    r"for good": "permanently",
    r"of old": "earlier",
    r"goes on|went on": "continues",
    r"time and again": "repeatedly",
    r"is told|are told|was told": "gets, receives, sees",
}
FOLDERS = ("gateway", "engine", "docs", "configs", "helm/shannon")
SUFFIXES = {".py", ".lua", ".md", ".js", ".yaml", ".tpl"}
SKIPPED = ("engine/demo/corpus.yaml", "gateway/web/vendor", "gateway/workflows/prompts", "helm/shannon/ci")
"""Texts that are data or not ours: training text, other people's code, prompts, recorded manifests."""


def texts() -> list[Path]:
    """Every file of the product that people read."""
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES]
    found += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "compose.yaml", "Makefile")]
    return [path for path in found if not str(path.relative_to(ROOT)).startswith(SKIPPED)]


@pytest.mark.parametrize(("term", "instead"), TERMS.items(), ids=str)
def test_text_uses_the_usual_term(term: str, instead: str) -> None:
    pattern = re.compile(rf"(?<!\w)(?:{term})(?!\w)")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == [], f"write instead: {instead}"
