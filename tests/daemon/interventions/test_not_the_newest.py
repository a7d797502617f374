"""What took the live version for the newest: verify, inspect, and the same rollback once more, after a rollback."""

import json
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from daemon.disk import durable
from daemon.home.verification import verify
from daemon.interventions.deeds import Request, carry_out
from daemon.layout import Home
from daemon.versions import checking
from daemon.versions.latest import follow_live
from registry.records import Deed, NewIntervention
from registry.store import Store
from tests.daemon.homes import lineage
from tests.daemon.interventions.test_rollback import did
from tests.daemon.processes import forked_each
from tests.models import write_expert

BACK = Request(Deed.ROLLBACK, "ada", head="main", version=2)


def test_verify_beside_a_rollback_waits_for_latest(merged: Home) -> None:
    with Store.open(merged.registry) as store, lineage(merged) as reader:
        store.turn("main", 2, NewIntervention(Deed.ROLLBACK, "ada", head="main", version=2), "rolled back to main/2")
        turning = Timer(0.1, follow_live, (merged, store))
        turning.start()
        assert verify(merged, reader, lambda _: None)[1] == []
        turning.join()


def test_a_rollback_that_was_stopped_half_way_is_finished_by_the_same_command(merged: Home) -> None:
    with Store.open(merged.registry) as store, lineage(merged) as reader:
        store.turn("main", 2, NewIntervention(Deed.ROLLBACK, "ada", head="main", version=2), "rolled back to main/2")
        found = verify(merged, reader, lambda _: None)[1]
        assert [problem.split(" ")[0] for problem in found] == ["published/main/latest", "published/main/LATEST"]
        assert carry_out(merged, store, BACK) == []
        assert verify(merged, reader, lambda _: None)[1] == []


def test_an_old_state_may_go_while_it_is_looked_at(merged: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `mainstem gc` removes it: no head moves."""
    state = merged.head_state("main", 3)
    assert state.is_dir()
    look = checking._problem

    def late(home: Home, path: Path, *more: Any) -> str | None:
        if path.parent == state:
            durable.remove(state)
        return look(home, path, *more)

    monkeypatch.setattr(checking, "_problem", late)
    with lineage(merged) as reader:
        assert verify(merged, reader, lambda _: None)[1] == []
    assert not state.exists()


def test_inspect_says_what_it_compares_with_what_is_folded_onto_and_what_is_blocked(
    merged: Home, model: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    did(merged, "rollback", "3", "--withdraw")
    did(merged, "rollback", "main/2")
    new = write_expert(tmp_path / "new.safetensors", model[0], 9)
    words: list[str | Path] = ["--json", "--home", merged.root]
    done, again = forked_each([["inspect", new, *words], ["inspect", model[1][3], *words]])
    found = json.loads(done.stdout)
    stands = found["compared_with"], found["folded_onto"], found["held"]
    assert stands == ("main/2", "main/5", "rolled back to main/2") and found["warning"] is None
    found = json.loads(again.stdout)
    assert found["duplicate_of"] == 4 and "taken out of the merge: it does not come back" in found["warning"]
    assert "`mainstem unblock 4`" in found["hint"]
