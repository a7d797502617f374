"""What may not come back: taken over from another registry, or withdrawn before blocks were known."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from registry.engine import connect
from registry.records import Deed, Expert, NewIntervention, Status
from registry.store import Store
from tests.registry.samples import digest, expert, make, versions

BLOCK = NewIntervention(Deed.BLOCK, "ann", "blocked there")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(make(tmp_path / "registry.sqlite", merged=2)) as opened:
        yield opened


def blocked(store: Store) -> list[int]:
    return [one.id for one in store.kept_out()]


def test_what_is_blocked_elsewhere_is_kept_out_once_and_whatever_is_known_here_stays(store: Store) -> None:
    others = [expert(number, Status.DUPLICATE) for number in (2, 7, 8, 7)]
    assert [one.id for one in store.keep_out(others, BLOCK)] == [3, 4]
    assert blocked(store) == [3, 4] and [one.id for one in store.unplaced()] == [1, 2]
    assert (one := store.blocked(digest(7), None)) and one.id == 3
    store.block([3], False, NewIntervention(Deed.UNBLOCK, "ann", experts=(3,)))
    assert store.keep_out(others, BLOCK) == [] and blocked(store) == [4]
    assert [(done.deed, done.experts) for done in store.interventions()] == [("unblock", (3,)), ("block", (3, 4))]
    store.check()


def test_what_was_withdrawn_before_blocks_were_known_is_blocked_unless_somebody_unblocked_it(store: Store) -> None:
    store.restate(versions(3), [1, 2], NewIntervention(Deed.WITHDRAW, "ann", experts=(1, 2)))
    assert store.block_withdrawn() == 0
    with closing(connect(store.path, "rw")) as raw:
        raw.execute("UPDATE experts SET blocked = 0")
        raw.commit()
    store.record(expert(3, Status.DUPLICATE))
    assert store.block_withdrawn() == 2 and blocked(store) == [1, 2]
    store.block([1], False, NewIntervention(Deed.UNBLOCK, "ann", experts=(1,)))
    assert store.block_withdrawn() == 0 and blocked(store) == [2]
    assert isinstance(store.blocked(digest(2), None), Expert)


def test_interventions_are_counted_by_what_was_done_since_one_of_them(store: Store) -> None:
    assert store.count_interventions() == ({}, 0)
    for deed in (Deed.BLOCK, Deed.UNBLOCK, Deed.BLOCK):
        store.block([1], deed is Deed.BLOCK, NewIntervention(deed, "ann", experts=(1,)))
    assert store.count_interventions() == ({Deed.BLOCK: 2, Deed.UNBLOCK: 1}, 3)
    assert store.count_interventions(1) == ({Deed.BLOCK: 1, Deed.UNBLOCK: 1}, 3)
    assert store.count_interventions(3) == ({}, 3)
