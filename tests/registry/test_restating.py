"""Versions that fold no new expert, experts that are withdrawn, heads that come later."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.errors import BadRecord, StaleHead
from registry.records import LEARNED, Deed, Head, NewIntervention, Status
from registry.store import Store
from tests.registry.samples import digest, expert, make, versions

LATER = Head("later", "mean", {}, 2, 2)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """At version 2."""
    with Store.open(make(tmp_path / "registry.sqlite", merged=2)) as store:
        yield store


def everything(store: Store) -> object:
    return store.heads(), store.experts(limit=-1), [store.versions(head.name) for head in store.heads()]


def test_a_withdrawn_expert_is_in_no_new_version_and_may_come_again(store: Store) -> None:
    store.restate(versions(3), [1])
    gone = store.expert(1)
    assert gone and (gone.status, gone.version, gone.withdrawn_in) == (Status.WITHDRAWN, 1, 3)
    assert [one.id for one in store.lineage()] == [2]
    assert store.merged(digest(1)) is None and store.merged_norms() == [2.0]
    newest = store.version("main", 3)
    assert newest and (newest.expert_id, newest.parent) == (None, 2)
    assert store.commit(expert(1), versions(4)).id == 3
    assert [one.id for one in store.lineage()] == [2, 3]
    assert store.counts()[Status.WITHDRAWN] == 1
    store.check()


def test_a_version_may_follow_without_anything_new(store: Store) -> None:
    store.restate(versions(3))
    assert [head.live for head in store.heads()] == [3, 3]
    assert len(store.lineage()) == 2


def test_a_version_that_is_held_leaves_its_head_as_it_stands(store: Store) -> None:
    held, other = versions(3)
    store.restate([dataclasses.replace(held, held="a rule"), other], learned=["main", "init"])
    main, init = store.heads()
    assert (main.live, main.newest, main.frozen) == (2, 3, None)
    assert (init.live, init.newest, init.frozen) == (3, 3, LEARNED)
    held, other = versions(4)
    store.restate([dataclasses.replace(held, held="a rule"), other], waiting=["main"])
    assert [head.live for head in store.heads()] == [2, 4]


def test_what_was_judged_is_live_whatever_was_held_before_it_unless_a_person_rolled_back(store: Store) -> None:
    store.commit(expert(3), [dataclasses.replace(one, held="a rule") for one in versions(3)])
    store.restate(versions(4), passed=["main"])
    assert [head.live for head in store.heads()] == [4, 2]
    store.turn("main", 2, NewIntervention(Deed.ROLLBACK, "ann"), "rolled back")
    store.restate(versions(5), passed=["main", "init"])
    assert [head.live for head in store.heads()] == [2, 5]


def test_what_a_person_rolled_back_stays_so_until_it_is_promoted_or_an_expert_taken_out(store: Store) -> None:
    """Also where the newest version has no other experts than the live one: it was learned anew."""
    store.restate(versions(3), learned=["main"])
    store.turn("main", 2, NewIntervention(Deed.ROLLBACK, "ann"), "rolled back")
    store.restate(versions(4), learned=["main"], passed=["main"])
    main, init = store.heads()
    assert (main.live, main.newest, main.frozen, init.live) == (2, 4, "rolled back", 4)
    newest = store.version("main", 4)
    assert newest and newest.held == "rolled back"
    store.restate(versions(5), [1])  # which is to be in nothing that is live
    assert [(head.live, head.frozen) for head in store.heads()] == [(5, None), (5, None)]


@pytest.mark.parametrize("wrong", [[9], [1, 9], [3]])
def test_only_merged_experts_are_withdrawn(store: Store, wrong: list[int]) -> None:
    store.record(expert(5, Status.QUARANTINED))
    before = everything(store)
    with pytest.raises(BadRecord):
        store.restate(versions(3), wrong)
    assert everything(store) == before


def test_a_stale_head_holds_a_withdrawal_back(store: Store) -> None:
    before = everything(store)
    with pytest.raises(StaleHead):
        store.restate(versions(3, parent=1), [1])
    with pytest.raises(BadRecord):
        store.restate(versions(3)[:1], [1])
    assert everything(store) == before


def test_a_later_head_goes_on_with_the_others(store: Store) -> None:
    first, second = (dataclasses.replace(versions(n, parent=0)[0], head="later") for n in (0, 2))
    store.adopt(LATER, [first, second])
    assert [head.name for head in store.heads()] == ["main", "init", "later"]
    assert [version.number for version in store.versions("later")] == [2, 0]
    store.commit(expert(3), [*versions(3), dataclasses.replace(versions(3)[0], head="later")])
    assert {head.live for head in store.heads()} == {3}
    store.check()


@pytest.mark.parametrize("at", [1, 3])
def test_a_later_head_must_stand_where_the_others_do(store: Store, at: int) -> None:
    before = everything(store)
    made = [dataclasses.replace(versions(n, parent=0)[0], head="later") for n in (0, at)]
    with pytest.raises(BadRecord):
        store.adopt(Head("later", "mean", {}, at, at), made)
    assert everything(store) == before
