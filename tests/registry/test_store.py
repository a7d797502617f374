"""What goes in comes out, and what must not go in does not."""

import ast
import dataclasses
import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.engine import connect
from registry.errors import (
    AlreadyMerged,
    AlreadyThere,
    BadRecord,
    Busy,
    Damaged,
    RegistryError,
    StaleHead,
    StorageFailed,
)
from registry.reader import Reader
from registry.records import Deed, Head, NewEvaluation, NewIntervention, NewVersion, Score, Status
from registry.store import Store
from registry.tables import JsonObject
from tests.registry.samples import BASE, HEADS, WHEN, digest, expert, make, versions


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(make(tmp_path / "registry.sqlite")) as opened:
        yield opened


def everything(store: Reader) -> list[object]:
    """All that a failed write must leave as it was."""
    heads = store.heads()
    return [heads, store.experts(limit=1000), [store.versions(head.name) for head in heads], store.counts()]


def test_a_new_registry_is_one_file_with_version_0_of_every_head(tmp_path: Path) -> None:
    path = make(tmp_path / "registry.sqlite")
    assert [entry.name for entry in tmp_path.iterdir()] == ["registry.sqlite"]
    with Reader.open(path) as reader:
        assert reader.base() == BASE
        assert reader.heads() == HEADS
        assert reader.head("init") == HEADS[1]
        assert reader.head("nobody") is None
        assert reader.lineage() == []
        assert reader.merged_norms() == []
        zero = reader.version("main", 0)
        assert zero is not None
        assert (zero.parent, zero.expert_id, zero.collected) == (None, None, False)
        assert zero.created_at is not None
        assert abs(datetime.now(UTC) - zero.created_at) < timedelta(minutes=1)


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    path.write_text("precious")
    with pytest.raises(AlreadyThere):
        Store.create(path, BASE, HEADS, versions(0))
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    ("heads", "first"),
    [
        ([], []),
        (HEADS, versions(0)[:1]),
        (HEADS[:1], versions(0)),
        (HEADS, versions(1)),
        ([Head("main", "opcm", {}, 1, 1)], versions(0)[:1]),
    ],
)
def test_a_registry_cannot_begin_otherwise(tmp_path: Path, heads: list[Head], first: list[NewVersion]) -> None:
    with pytest.raises(BadRecord):
        Store.create(tmp_path / "registry.sqlite", BASE, heads, first)


def test_a_commit_moves_every_head_and_extends_the_lineage(store: Store) -> None:
    first = store.commit(expert(1), versions(1))
    second = store.commit(expert(2), versions(2))
    assert (first.id, first.version, first.place) == (1, 1, None)
    assert first.received_at == WHEN
    assert first.finished_at is not None
    assert first.finished_at.tzinfo is UTC
    assert store.lineage() == [first, second]
    assert store.merged(digest(2)) == second
    assert store.merged(digest(3)) is None
    assert [(head.live, head.newest) for head in store.heads()] == [(2, 2), (2, 2)]
    assert [version.number for version in store.versions("main")] == [2, 1, 0]
    assert [version.number for version in store.versions("init", limit=2, newest_first=False)] == [0, 1]
    newest = store.version("init", 2)
    assert newest is not None
    assert {f.name: getattr(newest, f.name) for f in dataclasses.fields(NewVersion)} == {
        f.name: getattr(versions(2)[1], f.name) for f in dataclasses.fields(NewVersion)
    }
    assert newest.expert_id == second.id
    assert sum(store.merged_norms()) / len(store.merged_norms()) == 1.5
    store.check()


@pytest.mark.parametrize(("number", "parent"), [(3, 2), (2, 0), (1, 0), (3, 1)])
def test_a_stale_head_changes_nothing(store: Store, number: int, parent: int) -> None:
    store.commit(expert(1), versions(1))
    before = everything(store)
    with pytest.raises(StaleHead) as caught:
        store.commit(expert(2), versions(number, parent))
    assert caught.value.reason == "stale_head"
    assert everything(store) == before


def test_one_stale_head_of_two_holds_both_back(store: Store) -> None:
    store.commit(expert(1), versions(1))
    before = everything(store)
    main, init = versions(2)
    with pytest.raises(StaleHead, match="init"):
        store.commit(expert(2), [main, dataclasses.replace(init, parent=0)])
    assert everything(store) == before


def test_the_same_bytes_are_merged_only_once(store: Store) -> None:
    store.commit(expert(1), versions(1))
    before = everything(store)
    with pytest.raises(AlreadyMerged, match=r"expert 1 \(expert-1"):
        store.commit(expert(2, sha256=digest(1)), versions(2))
    assert everything(store) == before
    again = store.record(expert(2, Status.DUPLICATE, sha256=digest(1), duplicate_of=1))
    assert (again.id, again.version, again.duplicate_of) == (2, None, 1)


def test_bytes_that_were_refused_can_be_merged_later(store: Store) -> None:
    store.record(expert(1, Status.QUARANTINED))
    assert store.merged(digest(1)) is None
    assert store.commit(expert(1), versions(1)).id == 2


@pytest.mark.parametrize(
    "following",
    [
        [],
        versions(1)[:1],
        [*versions(1), versions(1)[0]],
        [versions(1)[0], dataclasses.replace(versions(1)[1], head="other")],
        [versions(1)[0], dataclasses.replace(versions(1)[1], number=2)],
        [versions(1)[0], dataclasses.replace(versions(1)[1], totals={"n": math.nan})],
    ],
)
def test_a_commit_must_bring_one_sound_version_for_each_head(store: Store, following: list[NewVersion]) -> None:
    before = everything(store)
    with pytest.raises(BadRecord):
        store.commit(expert(1), following)
    assert everything(store) == before


@pytest.mark.parametrize(
    "changes", [{"sha256": None}, {"status": Status.QUARANTINED}, {"received_at": datetime(2026, 1, 1)}]
)
def test_a_commit_needs_a_merged_expert_with_digest_and_zone(store: Store, changes: dict[str, object]) -> None:
    before = everything(store)
    with pytest.raises(BadRecord):
        store.commit(expert(1, **changes), versions(1))
    assert everything(store) == before


def test_a_merged_expert_cannot_be_slipped_in_without_versions(store: Store) -> None:
    with pytest.raises(BadRecord):
        store.record(expert(1))
    with pytest.raises(BadRecord):
        store.record(expert(1, Status.DUPLICATE, duplicate_of=99))
    assert store.experts() == []


def test_times_come_back_in_utc(store: Store) -> None:
    east = datetime(2026, 3, 1, 14, 30, 15, 123456, tzinfo=timezone(timedelta(hours=2)))
    kept = store.record(expert(1, Status.QUARANTINED, received_at=east))
    assert kept.received_at == WHEN
    assert kept.received_at.tzinfo is UTC


def test_a_hostile_name_is_kept_and_kept_harmless(store: Store) -> None:
    name = "a'; DROP TABLE heads; --\n\x00\x1b[31m\ud800 %_"
    kept = store.record(expert(1, Status.QUARANTINED, name=name, detail=name))
    assert kept.name == kept.detail == name.replace("\ud800", "\\ud800")
    assert store.find_experts(kept.name) == [kept]
    assert store.heads() == HEADS


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=8))
def test_floats_in_json_come_back_bit_for_bit(numbers: list[float]) -> None:
    column = JsonObject()
    text = column.process_bind_param({str(i): x for i, x in enumerate(numbers)}, None)
    back = column.process_result_value(text, None)
    assert [x.hex() for x in back.values()] == [float(x).hex() for x in numbers]


def test_floats_in_the_database_come_back_bit_for_bit(store: Store) -> None:
    numbers = [0.1 + 0.2, 5e-324, 1.7976931348623157e308, 0.0, 1 / 3, 2.0**53 + 2, 1e22]
    totals = {f"x{i}": x for i, x in enumerate([*numbers, -0.0])}
    for i, norm in enumerate(numbers, start=1):
        following = [dataclasses.replace(v, totals=totals, figures=totals, seconds=norm) for v in versions(i)]
        merged = store.commit(expert(i, norm=norm), following)
        assert merged.norm is not None
        assert merged.norm.hex() == norm.hex()
        found = store.version("main", i)
        assert found is not None
        assert found.seconds is not None
        assert found.seconds.hex() == norm.hex()
        assert [x.hex() for x in found.totals.values()] == [x.hex() for x in totals.values()]
        assert [x.hex() for x in found.figures.values()] == [x.hex() for x in totals.values()]


def test_experts_come_newest_first_in_pages(store: Store) -> None:
    for number in range(1, 8):
        store.record(expert(number, Status.QUARANTINED if number % 2 else Status.DUPLICATE))
    assert [e.id for e in store.experts(limit=3)] == [7, 6, 5]
    assert [e.id for e in store.experts(limit=3, before=5)] == [4, 3, 2]
    assert [e.id for e in store.experts(Status.DUPLICATE, before=6)] == [4, 2]
    assert store.experts(Status.MERGED) == []
    assert store.counts() == {Status.MERGED: 0, Status.DUPLICATE: 3, Status.QUARANTINED: 4, Status.WITHDRAWN: 0}
    assert store.expert(4) == store.experts(limit=1, before=5)[0]
    assert store.expert(8) is None


def test_experts_are_found_by_id_prefix_or_name(store: Store) -> None:
    for number, sha256 in enumerate(["feed" + "0" * 60, "feed" + "1" * 60, None, "12" * 32], start=1):
        store.record(expert(number, Status.QUARANTINED, sha256=sha256, name="same" if number < 4 else "feed"))

    def ids(text: str) -> list[int]:
        return [e.id for e in store.find_experts(text)]

    assert ids("2") == [2]
    assert ids("feed") == [4, 2, 1]
    assert ids("FEED1") == [2]
    assert ids("same") == [3, 2, 1]
    assert ids("1212") == [4]  # no such id, so it is a prefix
    assert ids("fee") == ids("") == ids("sam") == ids("%") == ids("____") == ids("9" * 400) == ids("²") == []


def test_experts_are_found_by_the_name_in_their_expert_json(store: Store) -> None:
    abouts = ({"name": "legal German"}, {"name": "legal_[1]"}, {"task": "legal German"}, None)
    for number, about in enumerate(abouts, start=1):
        store.record(expert(number, Status.QUARANTINED, about=about, name=f"model-{number}"))
    merged = store.commit(expert(5, about={"name": "Français", "weight": 2.0}, name="legal.safetensors"), versions(1))

    def ids(name: str, **narrower: Any) -> list[int]:
        return [e.id for e in store.experts(name=name, **narrower)]

    assert [e.id for e in store.find_experts("legal German")] == [1]
    assert store.find_experts("Français") == [merged] and merged.given_name == "Français"
    assert store.find_experts("legal") == store.find_experts("LEGAL GERMAN") == store.find_experts("\udcff") == []
    assert ids("legal*") == [5, 2, 1]
    assert ids("legal*", before=5, limit=1) == [2]
    assert ids("legal*", status=Status.MERGED) == [5]
    assert ids("model-[13]") == [3, 1]
    assert ids("Fran?ais") == [5]
    assert ids("legal") == ids("") == ids("\udcff*") == []


def test_what_left_the_inbox_is_no_longer_unplaced(store: Store) -> None:
    merged = store.commit(expert(1), versions(1))
    refused = store.record(expert(2, Status.QUARANTINED))
    assert store.unplaced() == [merged, refused]
    store.placed(merged.id, "archive/000001")
    assert store.unplaced() == [refused]
    assert store.expert(1) == dataclasses.replace(merged, place="archive/000001")
    with pytest.raises(BadRecord):
        store.placed(3, "archive/000003")


def test_collected_versions_stay_on_record(store: Store) -> None:
    store.commit(expert(1), versions(1))
    store.collected("main", 0)
    assert [(v.number, v.collected) for v in store.versions("main")] == [(1, False), (0, True)]
    assert [v.number for v in store.versions("main", include_collected=False)] == [1]
    assert [v.number for v in store.versions("init", include_collected=False)] == [1, 0]
    for head, number in [("main", 1), ("main", 7), ("nobody", 0)]:
        with pytest.raises(BadRecord):
            store.collected(head, number)
    store.check()


def test_after_a_rollback_versions_follow_the_newest_and_are_held_until_one_is_promoted(store: Store) -> None:
    for number in (1, 2):
        store.commit(expert(number), versions(number))
    assert store.turn("main", 1, NewIntervention(Deed.ROLLBACK, "ann", "bad", "main", 1), "since Friday").live == 1
    for wrong in (versions(3, parent=1), versions(2, parent=1)):  # the number 2 is taken for ever
        with pytest.raises(StaleHead):
            store.commit(expert(3), wrong)
    store.commit(expert(3), versions(3))
    assert [(head.live, head.newest, head.frozen) for head in store.heads()] == [(1, 3, "since Friday"), (3, 3, None)]
    assert [(v.parent, v.held) for v in store.versions("main")] == [
        (2, "since Friday"),
        (1, None),
        (0, None),
        (None, None),
    ]
    store.turn("main", 3, NewIntervention(Deed.PROMOTE, "ann", None, "main", 3))
    store.commit(expert(4), versions(4))
    assert [(head.live, head.frozen) for head in store.heads()] == [(4, None), (4, None)]
    assert not any(v.held for v in store.versions("main"))
    done = [(one.deed, one.who, one.why, one.version, one.previous) for one in store.interventions()]
    assert done == [("promote", "ann", None, 3, 1), ("rollback", "ann", "bad", 1, 2)]
    store.check()


def test_a_version_that_is_held_is_not_live_and_the_next_one_follows_it(store: Store) -> None:
    verdict = {"outcome": "held"}
    held = [dataclasses.replace(v, held="it lost" if v.head == "main" else None, verdict=verdict) for v in versions(1)]
    store.commit(expert(1), held)
    assert [head.live for head in store.heads()] == [0, 1]
    assert (version := store.version("main", 1)) and (version.held, version.verdict) == ("it lost", verdict)
    anew = {"outcome": "held", "notes": ["scored later"]}
    store.rejudge("main", 1, anew, "it lost by less")
    store.rejudge("init", 1, anew, "it lost")  # which was promoted meanwhile: it stays live
    for name, why in (("main", "it lost by less"), ("init", None)):
        assert (version := store.version(name, 1)) and (version.held, version.verdict) == (why, anew)
    store.commit(expert(2), versions(2))
    assert [head.live for head in store.heads()] == [2, 2]


def test_only_a_version_whose_files_are_kept_becomes_live_again(store: Store) -> None:
    for number in (1, 2):
        store.commit(expert(number), versions(number))
    store.collected("main", 1)
    for head, number in (("main", 1), ("main", 3), ("nobody", 0)):
        with pytest.raises(BadRecord):
            store.turn(head, number, NewIntervention(Deed.ROLLBACK, "ann"), "why")
    assert store.interventions() == [] and [head.live for head in store.heads()] == [2, 2]


def test_what_is_live_newest_or_pinned_is_not_collected(store: Store) -> None:
    for number in (1, 2, 3):
        store.commit(expert(number), versions(number))
    store.turn("main", 1, NewIntervention(Deed.ROLLBACK, "ann"), "why")
    store.pin("main", 2, True, NewIntervention(Deed.PIN, "ann", head="main", version=2))
    for number in (1, 2, 3):
        with pytest.raises(BadRecord):
            store.collected("main", number)
    store.pin("main", 2, False, NewIntervention(Deed.UNPIN, "ann", head="main", version=2))
    store.collected("main", 2)


def test_evaluations_are_known_by_what_was_evaluated_and_how(store: Store) -> None:
    scores = {"sst2": Score(0.1 + 0.2, n=10, stderr=0.01), "loss": Score(-0.0, higher_is_better=False, held_out=True)}
    first = store.evaluate(NewEvaluation("ab", "cd", scores, 1.5))
    again = store.evaluate(NewEvaluation("ab", "cd", {}, 2.5))
    assert first.scores == scores and store.evaluation(first.id) == first
    assert store.evaluated("ab", "cd") == again and store.evaluated("ab", "ef") is None
    store.commit(expert(1), versions(1))
    store.judge_version("main", 1, first.id)
    store.judge_expert(1, again.id)
    assert (version := store.version("main", 1)) and version.evaluation == first.id
    assert (one := store.expert(1)) and one.evaluation == again.id


def test_a_rejected_expert_is_blocked_and_an_open_case_until_it_is_closed(store: Store) -> None:
    rejected = store.record(expert(1, Status.QUARANTINED, content_sha256="c0", verdict={"outcome": "rejected"}))
    refused = store.record(expert(2, Status.QUARANTINED))
    assert (rejected.blocked, refused.blocked) == (True, False)
    assert store.blocked(digest(1), None) == rejected == store.blocked("other", "c0")
    assert store.blocked(digest(2), None) is None
    assert [one.id for one in store.quarantined()] == [2, 1]
    store.close_case(2, NewIntervention(Deed.DISCARD, "ann", experts=(2,)))
    with pytest.raises(BadRecord):
        store.close_case(9, NewIntervention(Deed.DISCARD, "ann", experts=(9,)))
    store.block([1], False, NewIntervention(Deed.UNBLOCK, "ann", experts=(1,)))
    assert store.blocked(digest(1), "c0") is None
    store.commit(expert(7, name=rejected.name), versions(1))  # another file of that name was merged
    assert store.quarantined() == []
    assert [one.experts for one in store.interventions()] == [(1,), (2,)]


def test_a_blocked_case_stays_open_whatever_is_merged_under_its_name(store: Store) -> None:
    rejected = store.record(expert(1, Status.QUARANTINED, verdict={"outcome": "rejected"}))
    store.commit(expert(2, name=rejected.name), versions(1))
    assert [one.id for one in store.quarantined()] == [1]


def test_what_is_left_is_held_where_it_has_what_was_not_live(store: Store) -> None:
    for number in (1, 2, 3):
        store.commit(expert(number), versions(number))
    store.turn("main", 1, NewIntervention(Deed.ROLLBACK, "ann"), "rolled back")
    store.restate(versions(4), [1])
    assert [(head.live, head.frozen) for head in store.heads()] == [(1, "rolled back"), (4, None)]
    assert (version := store.version("main", 4)) and version.held == "it still has expert 3, which is not live"
    store.restate(versions(5), [2, 3])
    assert [(head.live, head.frozen, head.previous) for head in store.heads()] == [(5, None, 1), (5, None, None)]


def test_after_a_failed_disk_nothing_is_written_any_more(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise StorageFailed("the disk is broken", "replace it")

    with monkeypatch.context() as patch:
        patch.setattr("registry.store.insert_expert", fail)
        with pytest.raises(StorageFailed):
            store.commit(expert(1), versions(1))
    with pytest.raises(StorageFailed, match="the disk is broken"):
        store.commit(expert(1), versions(1))


def test_what_an_expert_was_trained_from_is_known_while_it_is_merged(store: Store) -> None:
    store.commit(expert(1), versions(1))
    store.commit(expert(2, trained_head="main", trained_version=1), versions(2))
    assert [version.trained for version in store.versions("main")] == [0, 1, 0]
    assert [version.number for version in store.unneeded(store.heads()[0], 9)] == []
    with pytest.raises(BadRecord):
        store.collected("main", 1)
    store.restate(versions(3), [2], NewIntervention(Deed.WITHDRAW, "ann", experts=(2,)))
    assert [version.number for version in store.unneeded(store.heads()[0], 9)] == [1, 2]
    assert (one := store.expert(2)) and one.blocked
    assert [(one.deed, one.version) for one in store.interventions()] == [("withdraw", 3)]


def test_the_newest_norms_come_first_and_pages_of_the_lineage_follow_each_other(store: Store) -> None:
    for number in range(1, 6):
        store.commit(expert(number, norm=None if number == 4 else float(number)), versions(number))
    store.record(expert(9, Status.QUARANTINED))
    assert store.merged_norms(limit=2) == [5.0, 3.0]
    assert store.merged_norms() == [5.0, 3.0, 2.0, 1.0]
    first = store.lineage(limit=2)
    second = store.lineage(after=first[-1].version or 0, limit=2)
    assert [*first, *second, *store.lineage(after=4)] == store.lineage()
    assert [v.number for v in store.versions("main", limit=2, before=4)] == [3, 2]


def test_experts_that_were_merged_come_first_where_many_have_one_name(store: Store) -> None:
    store.commit(expert(1, name="same"), versions(1))
    for number in range(2, 6):
        store.record(expert(number, Status.QUARANTINED, name="same"))
    assert [e.id for e in store.find_experts("same", limit=3)] == [5, 4, 1]
    assert [e.id for e in store.find_experts("same")] == [5, 4, 3, 2, 1]


def test_a_checkpoint_empties_the_log_or_says_that_it_could_not(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    log = store.path.with_name(store.path.name + "-wal")
    store.commit(expert(1), versions(1))
    assert log.stat().st_size > 0
    store.checkpoint()
    assert log.stat().st_size == 0
    monkeypatch.setattr("registry.engine.BUSY_TIMEOUT_S", 0.05)
    with Store.open(store.path) as impatient:
        reader = connect(store.path, "ro")
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM heads").fetchall()
        impatient.commit(expert(2), versions(2))
        with pytest.raises(Busy):
            impatient.checkpoint()
        reader.close()
        impatient.checkpoint()


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        ("DELETE FROM heads WHERE name = 'init'", "versions points to nothing in heads"),
        ("DELETE FROM experts", "versions points to nothing in experts"),
        ("UPDATE versions SET collected = 1 WHERE number = 1", "head main has lost its live version 1"),
        ("UPDATE heads SET newest = 9, live = 9", "head main has lost its live version 9"),
        ("UPDATE tallies SET experts = 7", "it counts the experts as"),
    ],
)
def test_check_names_what_is_broken(store: Store, damage: str, found: str) -> None:
    store.commit(expert(1), versions(1))
    store.check()
    other = connect(store.path, "rw")
    other.execute("PRAGMA foreign_keys = OFF")
    other.execute(damage)
    other.close()
    with pytest.raises(Damaged, match=found):
        store.check()


def test_every_error_has_a_reason_of_its_own_and_a_hint() -> None:
    reasons = [kind.reason for kind in RegistryError.__subclasses__()]
    assert len(set(reasons)) == len(reasons) > 0
    assert StaleHead("what", "do this").hint == "do this"


def test_the_registry_imports_no_other_room_of_the_house() -> None:
    for file in Path(__file__).parents[2].joinpath("registry").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"torch", "numpy", "daemon", "projector"}, file
