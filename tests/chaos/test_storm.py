"""After a storm the ledger is exact, and every resource is released. `make storm` plays a larger one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.storm import prepared, run


@pytest.mark.slow
@pytest.mark.parametrize("freezes", [False, True], ids=["store well", "store freezing"])
def test_storm_leaves_exact_books_and_nothing_behind(tmp_path: Path, freezes: bool) -> None:
    with prepared(tmp_path, mock=True) as storm:
        run(storm, 2000 if freezes else 500, freezes=freezes)
        print(storm.table())

    assert storm.faults == []
    assert not storm.seen.lost, "clients that stayed were not answered"
    assert storm.seen.freezes >= (2 if freezes else 0)
    assert storm.seen.restarts >= (1 if freezes else 0)


@pytest.mark.slow
def test_storm_on_vllm_leaves_exact_books_and_nothing_behind(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    with prepared(tmp_path, mock=False) as storm:
        run(storm, 200)
        print(storm.table())

    assert storm.faults == []
    assert not storm.seen.lost
