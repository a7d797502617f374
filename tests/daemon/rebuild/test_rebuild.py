"""`mainstem rebuild --into`: a new home; and what a rebuild says without doing anything."""

import os
import shutil
from pathlib import Path

import pytest

from daemon.disk import durable
from daemon.home.presets import DEFAULT_METHOD
from daemon.layout import Home
from registry.records import Deed, NewIntervention, RelativeTo, Status
from registry.store import Store
from tests.daemon.homes import assert_close, drain, experts, latest, lineage, live, make_home, put, quick, tree
from tests.daemon.processes import forked, rebuild
from tests.daemon.rebuilds import bytes_of, check, killed, refused, soup, taken_out, weights
from tests.models import write_base, write_expert
from tests.oracles.rules import ema


def test_a_new_home_with_the_same_heads_has_the_same_bits(merged: Home, tmp_path: Path) -> None:
    before = bytes_of(merged)
    target = Home(tmp_path / "new")
    assert "4 experts" in rebuild(merged, "--into", target.root)
    for head in ("main", "soup"):
        assert live(target, head) == 4
        ours, theirs = latest(target, head), latest(merged, head)
        assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert [(e.name, e.sha256, e.weight) for e in experts(target)] == [
        (e.name, e.sha256, e.weight) for e in experts(merged)
    ]
    assert bytes_of(merged) == before
    check(target)
    with lineage(target) as reader, lineage(merged) as theirs_too:
        assert reader.base().name == theirs_too.base().name


def test_a_new_home_with_other_heads_and_without_an_expert(
    merged: Home, model: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    target = Home(tmp_path / "new")
    rebuild(
        merged,
        "--into",
        target.root,
        "--method",
        "mean",
        "--head",
        "init=ema",
        "--set",
        "init.weight=0.3",
        "--without",
        "2",
    )
    base, given = weights(model, 0, 2, 3)
    assert_close(latest(target, "main"), soup(model, [0, 2, 3]))
    assert_close(latest(target, "init"), ema(base, given, 0.3))
    assert live(target) == 3
    check(target)
    put(target, shutil.copytree(model[1][1], tmp_path / "b"))
    drain(target)
    refused_again = experts(target)[-1]
    assert (refused_again.status, live(target)) == (Status.DUPLICATE, 3), "what was left out does not come back"
    assert forked(*words_of(refused_again.hint), "--home", target.root).returncode == 0
    put(target, shutil.copytree(model[1][1], tmp_path / "b"))
    drain(target)
    assert_close(latest(target), soup(model, [0, 1, 2, 3]))


def test_a_new_home_keeps_the_method_of_main_where_none_is_named(merged: Home, tmp_path: Path) -> None:
    """With another head, or with another parameter of it: the default is for new homes."""
    with lineage(merged) as reader:
        ours = next(head for head in reader.heads() if head.name == "main")
    assert ours.method != DEFAULT_METHOD
    rebuild(merged, "--into", tmp_path / "more", "--head", "init=latest")
    rebuild(merged, "--into", tmp_path / "set", "--set", "relative_to=trained_from")
    for place, relative in (("more", RelativeTo.BASE), ("set", RelativeTo.TRAINED_FROM)):
        with lineage(Home(tmp_path / place)) as reader:
            main, *others = reader.heads()
        assert (main.method, main.params, main.relative_to) == (ours.method, ours.params, relative)
        assert [head.name for head in others] == (["init"] if place == "more" else [])
    rebuild(Home(tmp_path / "set"), "--into", tmp_path / "third", "--head", "init=latest")
    with lineage(Home(tmp_path / "third")) as reader:
        assert [head.relative_to for head in reader.heads()] == [RelativeTo.TRAINED_FROM, RelativeTo.BASE]


def test_what_is_blocked_stays_out_of_a_new_home_and_what_is_rolled_back_is_live_there(
    merged: Home, model: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    taken_out(merged, quick(), "4")
    target, words = Home(tmp_path / "new"), ("--into", tmp_path / "new", "--reason", "moved")
    with Store.open(merged.registry) as store:
        store.turn("soup", 3, NewIntervention(Deed.ROLLBACK, "ann"), "rolled back to soup/3")
    said = rebuild(merged, *words)
    assert f"soup/5 is not live (rolled back to soup/3) here; in {target.root} nothing is rolled back" in said
    kept_out = experts(target)[-1]
    assert (kept_out.sha256, kept_out.blocked) == (experts(merged)[3].sha256, True)
    assert kept_out.detail and "expert 4 of the home that this one was made of was taken out" in kept_out.detail
    assert rebuild(merged, *words) and len(experts(target)) == 4, "once"
    with lineage(target) as reader:
        assert [(done.deed, done.experts, done.why) for done in reader.interventions()] == [("block", (4,), "moved")]
    check(target)
    put(target, shutil.copytree(model[1][3], tmp_path / "d again"))
    drain(target)
    came = experts(target)[-1]
    assert (came.status, came.duplicate_of, live(target)) == (Status.DUPLICATE, 4, 3)
    assert words_of(kept_out.hint) == ["unblock", kept_out.sha256]
    assert words_of(came.hint) == ["unblock", "4"]


def words_of(hint: str | None) -> list[str]:
    """The command that a hint names."""
    assert hint
    return hint.split("`")[1].split()[1:]


@pytest.mark.parametrize(
    "point", ["commit.before=kill:2", "commit.after=kill:2", "rename=kill:20", "archive.before=kill:3"]
)
def test_a_replay_that_is_killed_goes_on(
    point: str, merged: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Home(tmp_path / "new")
    killed(monkeypatch, point, merged, "--into", target.root)
    done = live(target) if target.exists() else 0
    assert done < 4
    said = forked("rebuild", "--home", merged.root, "--into", target.root)
    assert said.returncode == 0, said.stderr
    assert said.stderr.count("merging ") == 4 - done
    ours, theirs = latest(target), latest(merged)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert len(experts(target)) == 4
    check(target)


def test_what_cannot_be_replayed_is_said_before_anything_is_made(merged: Home, tmp_path: Path) -> None:
    shutil.rmtree(merged.archive(3) / "c")
    said = refused(merged, "--into", tmp_path / "new")
    assert "expert 3 (c) is not in" in said and "--without" in said
    assert not (tmp_path / "new").exists()
    rebuild(merged, "--into", tmp_path / "new", "--without", "3")
    assert "fisher.safetensors is missing" in refused(
        merged, "--into", tmp_path / "other", "--method", "fisher", "--without", "3"
    )


def test_a_home_that_is_something_else_is_refused(merged: Home, base: Path, tmp_path: Path) -> None:
    other = make_home(tmp_path / "other", base)
    before = bytes_of(other)
    assert "another base" in refused(merged, "--into", other.root)
    assert bytes_of(other) == before
    rebuild(merged, "--into", tmp_path / "new")
    assert "its heads are others" in refused(merged, "--into", tmp_path / "new", "--method", "mean")
    assert "other experts were merged there" in refused(merged, "--into", tmp_path / "new", "--without", "1")
    assert "home to be replayed" in refused(merged, "--into", merged.root)
    assert "no merged expert is called '9'" in refused(merged, "--into", tmp_path / "third", "--without", "9")


def test_a_foreign_drop_in_the_new_inbox_is_left_alone(
    merged: Home, model: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Home(tmp_path / "new")
    killed(monkeypatch, "commit.after=kill:1", merged, "--into", target.root)
    foreign = Path(shutil.copy(model[1][0], target.inbox / "d"))
    assert "in the way" in refused(merged, "--into", target.root)
    assert foreign.exists()
    foreign.unlink()
    rebuild(merged, "--into", target.root)
    assert live(target) == 4


# and without doing anything


def test_a_dry_run_changes_nothing(merged: Home, tmp_path: Path) -> None:
    before = bytes_of(merged)
    said = rebuild(merged, "--without", "3", "--dry-run")
    assert "main: to be replayed" in said and "soup: to be subtracted" in said and "4 experts to be read" in said
    assert "4 experts to be read; a merge took" in rebuild(merged, "--into", tmp_path / "new", "--dry-run")
    assert "init: to be replayed" in rebuild(merged, "--head", "init", "--method", "ema", "--dry-run")
    assert bytes_of(merged) == before
    assert not (tmp_path / "new").exists()
    fd = durable.lock(merged.lock)
    try:
        assert "soup: to be subtracted" in rebuild(merged, "--without", "3", "--dry-run")  # beside the daemon
    finally:
        os.close(fd)


def test_a_dry_run_counts_every_reading(merged: Home, tmp_path: Path) -> None:
    """Two passes of each head whose method makes two; each expert that is subtracted, for each head that does so."""
    new = ("--into", tmp_path / "new", "--dry-run")
    assert "4 experts to be read, 8 readings in all; a merge took" in rebuild(merged, *new, "--method", "pcb")
    assert "12 readings in all" in rebuild(merged, *new, "--method", "pcb", "--head", "a=mean", "--head", "b=pcb")
    assert "6 readings in all" in rebuild(merged, *new, "--method", "pcb", "--without", "3")
    assert "8 readings in all" in rebuild(merged, "--head", "best=pcb", "--dry-run")
    rebuild(merged, "--head", "best=pcb")
    assert "4 experts to be read, 7 readings in all" in rebuild(merged, "--without", "3", "--dry-run")


def test_words_that_do_not_fit_together(merged: Home) -> None:
    assert "nothing to rebuild" in refused(merged)
    assert "nosuch" in refused(merged, "--into", merged.root / "new", "--method", "nosuch")
    assert "adds one head" in refused(merged, "--head", "a=ema", "--head", "b=ema")
    assert "keeps every head's method" in refused(merged, "--without", "1", "--method", "mean")
    assert "the method of the head 'init' is missing" in refused(merged, "--head", "init")


@pytest.mark.parametrize("within", ["checkpoint-500", "snapshots/0123abcd"])
def test_an_expert_that_lies_further_down_is_merged_again(within: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", 1)
    home = make_home(tmp_path / "home", base)
    folder = tmp_path / "run" / within
    folder.parent.mkdir(parents=True)
    write_expert(folder, base, 2)
    put(home, tmp_path / "run")
    put(home, write_expert(tmp_path / "other", base, 3))
    drain(home)
    assert [one.status for one in experts(home)] == [Status.MERGED] * 2
    rebuild(home, "--into", tmp_path / "new")
    assert tree(Home(tmp_path / "new").version("main", 2)).keys() == tree(home.version("main", 2)).keys()
    assert_close(latest(Home(tmp_path / "new")), latest(home), 0)
    rebuild(home, "--without", str(experts(home)[1].id))
    assert live(home) == 3
