"""What was refused is an open case until somebody looked after it; blocks and pins."""

import json
import os
from pathlib import Path

import pytest

from daemon.arrivals import filing
from daemon.interventions.deeds import Request, carry_out
from daemon.layout import Home
from daemon.versions.retention import collect
from registry.records import Deed, NewIntervention, Status
from registry.store import Store
from tests.daemon.homes import drain, experts, lineage, live, put, quick
from tests.daemon.interventions.test_rollback import did, refused, sound
from tests.daemon.processes import running
from tests.models import write_expert
from tests.nobody import NOBODY, as_nobody


@pytest.fixture
def refusing(merged: Home, model: tuple[Path, list[Path]]) -> Home:
    """With two refused drops: experts 5 and 6."""
    for name in ("bad.safetensors", "worse.safetensors"):
        (merged.inbox / name).write_bytes(b"no safetensors at all")
        drain(merged)
    return merged


def open_cases(home: Home) -> list[int]:
    with lineage(home) as reader:
        return [expert.id for expert in reader.quarantined()]


def test_a_retried_drop_is_taken_anew_and_a_discarded_one_is_gone(
    refusing: Home, model: tuple[Path, list[Path]]
) -> None:
    assert open_cases(refusing) == [6, 5]
    listed = json.loads(did(refusing, "quarantine", "list", "--json"))
    assert [(one["id"], one["name"]) for one in listed] == [(6, "worse.safetensors"), (5, "bad.safetensors")]
    assert "hint: " in did(refusing, "quarantine", "show", "5")
    write_expert(refusing.quarantine(5) / "bad.safetensors", model[0], 30)  # mended where it lies
    did(refusing, "quarantine", "retry", "bad.safetensors", "--reason", "header mended")
    assert not refusing.quarantine(5).exists() and (refusing.inbox / "bad.safetensors").exists()
    assert open_cases(refusing) == [6]
    drain(refusing)
    assert live(refusing) == 5 and open_cases(refusing) == [6]
    assert "removed for good" in did(refusing, "quarantine", "discard", "6")
    assert not refusing.quarantine(6).exists() and open_cases(refusing) == []
    assert "was looked after already" in refused(refusing, "quarantine", "discard", "6")
    assert "is merged, not refused" in refused(refusing, "quarantine", "retry", "1")
    with lineage(refusing) as reader:
        assert [(one.deed, one.experts, one.why) for one in reader.interventions()] == [
            ("discard", (6,), None),
            ("retry", (5,), "header mended"),
        ]
    assert sound(refusing)


def test_another_drop_of_that_name_closes_the_case(refusing: Home, model: tuple[Path, list[Path]]) -> None:
    put(refusing, write_expert(refusing.root.parent / "worse.safetensors", model[0], 31))
    drain(refusing)
    assert live(refusing) == 5 and open_cases(refusing) == [5]


def test_nothing_is_overwritten_in_the_inbox(refusing: Home) -> None:
    (refusing.inbox / "bad.safetensors").write_bytes(b"the next one")
    assert "the inbox has a bad.safetensors" in refused(refusing, "quarantine", "retry", "5")
    assert open_cases(refusing) == [6, 5]


def test_a_case_without_files_can_only_be_closed(refusing: Home) -> None:
    (refusing.quarantine(5) / "bad.safetensors").unlink()
    assert "nothing is left of it" in refused(refusing, "quarantine", "retry", "5")
    did(refusing, "quarantine", "discard", "5")
    assert open_cases(refusing) == [6]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for another user")
@pytest.mark.parametrize(("mode", "said"), [(0o700, "belongs to another user"), (0o1777, "cannot be removed")])
def test_what_another_user_put_into_a_case_stops_its_discarding(refusing: Home, mode: int, said: str) -> None:
    """It would be left where every start fails on it, and a daemon that is asked would end by that."""
    theirs = refusing.quarantine(5) / "theirs"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("notes")
    for path in [refusing.root, *refusing.root.rglob("*")]:
        os.lchown(path, NOBODY, NOBODY)
    for folder in [refusing.root, *refusing.root.parents]:
        folder.chmod(folder.stat().st_mode | 0o755)
    for path in (theirs, theirs / "notes.txt"):
        os.chown(path, 0, 0)
    theirs.chmod(mode)

    def asked() -> str:
        with Store.open(refusing.registry) as store:
            return str(carry_out(refusing, store, Request(Deed.DISCARD, "ada", experts=(5,))))

    answer = as_nobody(asked)
    assert said in answer and "BadHome" in answer
    assert open_cases(refusing) == [6, 5] and (theirs / "notes.txt").exists() and not list(refusing.tmp.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for another user")
def test_what_cannot_be_removed_from_the_inbox_is_not_left_where_every_start_fails_on_it(merged: Home) -> None:
    """Its owner let it be moved, but not what is in it: a copy of it is in the archive."""
    theirs = merged.inbox / "theirs"
    theirs.mkdir()
    for path in [merged.root, *merged.root.rglob("*")]:
        os.lchown(path, NOBODY, NOBODY)
    for folder in [merged.root, *merged.root.parents]:
        folder.chmod(folder.stat().st_mode | 0o755)
    (theirs / "notes.txt").write_text("notes")
    os.chown(theirs, 0, 0)
    theirs.chmod(0o1777)
    said = as_nobody(lambda: str(filing._move(merged, theirs, merged.archive(1))))
    assert said.startswith("PermissionError") and (theirs / "notes.txt").exists()
    assert not list(merged.tmp.iterdir())
    theirs.chmod(0o755)


def test_a_retry_beside_the_daemon(refusing: Home, model: tuple[Path, list[Path]]) -> None:
    write_expert(refusing.quarantine(5) / "bad.safetensors", model[0], 30)
    with running("run", "--home", refusing.root, MAINSTEM_HTTP__PORT="0") as daemon:
        daemon.wait_for(4)
        assert did(refusing, "quarantine", "retry", "5").startswith("expert 5 (bad.safetensors) goes back")
        daemon.wait_for(5)
        assert daemon.stop() == 0
    assert sound(refusing)


def test_blocks_and_pins_are_said_and_can_be_taken_back(refusing: Home) -> None:
    assert "cannot come twice in any case" in refused(refusing, "block", "1")
    assert "was never read" in refused(refusing, "block", "5")
    did(refusing, "rollback", "3", "--withdraw")
    there = "beware: main/4 has what was taken out since: 4 (d)\n"
    assert there in did(refusing, "rollback", "main/4", "--dry-run")
    assert "beware" not in did(refusing, "rollback", "main/3", "--dry-run")
    assert "`mainstem promote main/5` the newest" in refused(refusing, "rollback", "5", "--withdraw")
    assert did(refusing, "block", "4") == "nothing is to be done: it is so already\n"
    assert "4 (d) may come back" in did(refusing, "unblock", "d")
    assert "4 (d) do not come back" in did(refusing, "block", "d", "--reason", "known bad")
    assert experts(refusing)[3].blocked and experts(refusing)[3].status is Status.WITHDRAWN
    assert did(refusing, "pin", "main/4") == "main/4 is kept, whatever retention says\n"
    assert "its state is gone already" in did(refusing, "pin", "main/2")
    assert did(refusing, "pin", "2", "--head", "main") == "nothing is to be done: it is so already\n"
    assert did(refusing, "unpin", "main/2") == "main/2 goes when retention says so\n"
    assert "no expert is called 'nobody'" in refused(refusing, "unblock", "nobody")


def test_a_pinned_version_can_be_gone_back_to_at_once(merged: Home, model: tuple[Path, list[Path]]) -> None:
    """Its state stays too: what came after it is taken out without reading an expert."""
    did(merged, "pin", "main/4")
    did(merged, "pin", "soup/4")
    for seed in (40, 41, 42):
        put(merged, write_expert(merged.root.parent / f"{seed}.safetensors", model[0], seed))
        drain(merged)
    said = did(merged, "rollback", "4", "--withdraw")
    assert said.splitlines()[-2:] == ["main/8: restored", "soup/8: restored"]
    assert sound(merged)


def test_two_of_one_name_are_retried_one_after_the_other_and_one_given_twice_once(merged: Home) -> None:
    for _ in range(2):
        (merged.inbox / "bad.safetensors").write_bytes(b"no safetensors at all")
        drain(merged)
    assert "several of them are called bad.safetensors" in refused(merged, "quarantine", "retry", "5", "6")
    did(merged, "quarantine", "retry", "5", "5")
    assert open_cases(merged) == [6]


def test_a_blocked_one_is_not_retried_before_it_is_unblocked(refusing: Home) -> None:
    with Store.open(refusing.registry) as store:
        store.block([5], True, NewIntervention(Deed.BLOCK, "ann", experts=(5,)))
    assert "`mainstem unblock 5`, then ask again" in refused(refusing, "quarantine", "retry", "5")
    assert open_cases(refusing) == [6, 5]


def test_a_damaged_version_is_not_made_live(merged: Home) -> None:
    weights = merged.version("main", 2) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "main/2 is damaged" in refused(merged, "rollback", "2")


def test_a_rollback_while_versions_are_collected_ends_the_collecting(
    merged: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a version that was about to go: it stays, and its state."""
    with Store.open(merged.registry) as store:
        collected = store.collected

        def turned_first(head: str, number: int) -> None:
            if (head, number) == ("main", 1):
                store.turn("main", 1, NewIntervention(Deed.ROLLBACK, "ann"), "rolled back")
            collected(head, number)

        monkeypatch.setattr(store, "collected", turned_first)
        gone = collect(merged, store, quick(retention={"versions": 1, "grace_seconds": 0}).retention)
    assert ("main", 1) not in {(version.head, version.number) for version in gone}
    assert merged.version("main", 1).is_dir()
