"""Keys of the store are made in one module."""

from __future__ import annotations

import re
from pathlib import Path

import gateway
from gateway.store import layout

SOURCES = Path(gateway.__file__).parent
KEY = re.compile(r"""["']sh:""")


def test_no_other_module_makes_a_key() -> None:
    found = [str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*.py") if KEY.search(path.read_text())]

    assert found == ["store/layout.py"], "make keys of the store in gateway/store/layout.py, and call it"


def test_keys_of_one_script_are_in_one_cluster_slot() -> None:
    for keys in (
        [*layout.limits("k", "m", ["2026-02-03"]), *layout.ledger("k", "2026-02-03:m")],
        layout.derived_sessions("k"),
        layout.stored_bytes("k", "kept"),
        [*layout.session("s"), layout.deleted_session("s")],
        layout.response("r"),
        layout.log("l"),
    ):
        assert len({key[key.index("{") : key.index("}")] for key in keys}) == 1, keys
