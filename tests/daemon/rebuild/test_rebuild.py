"""`mainstem rebuild`: a new home, a new head, and experts taken out again; against homes that never knew better."""

import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor

from daemon.config import Settings
from daemon.disk import durable
from daemon.errors import BadHome
from daemon.home.recovery import recover
from daemon.home.verification import verify
from daemon.layout import Home
from daemon.rebuild.commands import add_head
from daemon.rebuild.replay import Console
from projector.methods import make
from registry.records import Status
from registry.store import Store
from tests.daemon.homes import Heads, assert_close, drain, experts, latest, lineage, live, make_home, put, tree
from tests.daemon.processes import environment, forked, rebuild
from tests.models import read_weights, write_base, write_expert
from tests.oracles.pcb import pcb, pcb_on_arrival
from tests.oracles.rules import ema, opcm

HEADS: Heads = (("main", "opcm", {}), ("soup", "mean", {}))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base in a folder, and four experts of it: a file, and folders."""
    root = tmp_path_factory.mktemp("model")
    base = write_base(root / "base", seed=1)
    given = [write_expert(root / name, base, seed) for seed, name in enumerate(["a.safetensors", "b", "c", "d"], 2)]
    (given[2] / "expert.json").write_text(json.dumps({"weight": 2.5, "task": "poems"}))
    return base, given


@pytest.fixture(scope="module")
def merged_root(tmp_path_factory: pytest.TempPathFactory, model: tuple[Path, list[Path]]) -> Path:
    base, given = model
    home = make_home(tmp_path_factory.mktemp("merged") / "home", base, HEADS)
    for path in given:
        copy = tmp_path_factory.mktemp("drop") / path.name
        shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy)
        put(home, copy)
        drain(home)
    return home.root


@pytest.fixture
def merged(merged_root: Path, tmp_path: Path) -> Home:
    """A home with the heads main (opcm) and soup (mean), at version 4."""
    return Home(shutil.copytree(merged_root, tmp_path / "home", symlinks=True))


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


def refused(home: Home, *words: str | Path) -> str:
    """Runs the verb, which must be refused; what it complained of."""
    done = forked("rebuild", "--home", home.root, *words)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def killed(monkeypatch: pytest.MonkeyPatch, point: str, home: Home, *words: str | Path) -> None:
    """Runs the verb and has it killed at a failpoint."""
    with monkeypatch.context() as patch:
        patch.setenv("MAINSTEM_FAILPOINT", point)
        done = forked("rebuild", "--home", home.root, *words)
    assert done.returncode == -signal.SIGKILL, f"{point}: {done.returncode}\n{done.stderr}"


def check(home: Home) -> None:
    """Everything hashes, nothing is left over, and another recovery changes nothing."""
    with lineage(home) as reader:
        checked, problems = verify(home, reader, lambda what: None)
    assert checked.versions + checked.experts > 2 and not problems, problems
    assert not os.listdir(home.inbox) and not os.listdir(home.tmp)
    beside = {path.name for path in home.state.iterdir() if not path.name.startswith("registry.sqlite")}
    assert beside <= {"base", "heads", "tmp", "lock", "clean"}


def bytes_of(home: Home) -> dict[str, bytes | str]:
    """All of a home, less what SQLite and the lock keep for themselves."""
    return {name: found for name, found in tree(home.root).items() if "sqlite" not in name and "lock" not in name}


def weights(model: tuple[Path, list[Path]], *which: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    base, given = model
    return read_weights(base), [read_weights(given[i]) for i in which]


def soup(model: tuple[Path, list[Path]], which: Sequence[int]) -> dict[str, Tensor]:
    """The weighted mean of these experts: the third counts 2.5 times."""
    base, given = weights(model, *which)
    shares = [2.5 if i == 2 else 1.0 for i in which]
    total = {name: tensor.double() for name, tensor in base.items() if tensor.is_floating_point()}
    for name in total:
        for share, expert in zip(shares, given, strict=True):
            total[name] = total[name] + share / sum(shares) * (expert[name].double() - base[name].double())
    return base | total


# a new home


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
    assert_close(latest(target), soup(model, [0, 1, 2, 3]))


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


# a new head


def test_a_new_head_has_every_expert_and_takes_the_next_one(
    merged: Home, model: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    assert "4 experts" in rebuild(merged, "--head", "init", "--method", "ema", "--set", "weight=0.3")
    base, given = weights(model, 0, 1, 2, 3)
    assert live(merged, "init") == 4
    assert_close(latest(merged, "init"), ema(base, given, 0.3))
    check(merged)
    manifest = json.loads(merged.manifest("init", 4).read_bytes())
    assert (manifest["version"], manifest["experts"], manifest["method"]) == (4, 4, "ema")
    put(merged, write_expert(tmp_path / "e.safetensors", model[0], 9))
    extra = read_weights(merged.inbox / "e.safetensors")
    drain(merged)
    assert {head: live(merged, head) for head in ("main", "soup", "init")} == {"main": 5, "soup": 5, "init": 5}
    assert_close(latest(merged, "init"), ema(base, [*given, extra], 0.3))
    check(merged)


@pytest.mark.parametrize(
    "point", ["commit.after=kill:2", "publish.before=kill:5", "publish.after=kill:5", "commit.before=kill:5"]
)
def test_a_new_head_whose_making_is_killed(
    point: str, merged: Home, model: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--head", "init", "--method", "ema")
    killed(monkeypatch, point, merged, *words)
    with Store.open(merged.registry) as store:
        assert store.head("init") is None
        recover(merged, store, lambda *_, **__: None)
        assert not merged.versions("init").exists() and not merged.states("init").exists()
    with lineage(merged) as reader:
        assert verify(merged, reader, lambda what: None)[1] == []
    assert merged.rebuilding("init").exists()
    rebuild(merged, *words)
    assert_close(latest(merged, "init"), ema(*weights(model, 0, 1, 2, 3)))
    check(merged)


def test_a_new_head_that_is_killed_once_it_is_committed(
    merged: Home, model: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(monkeypatch, "commit.after=kill:5", merged, "--head", "init", "--method", "ema")
    assert merged.rebuilding("init").exists()
    drain(merged)
    check(merged)
    assert_close(latest(merged, "init"), ema(*weights(model, 0, 1, 2, 3)))


def test_a_head_that_is_there_a_folder_in_its_place_and_a_running_daemon(merged: Home) -> None:
    assert "there is a head 'soup' already" in refused(merged, "--head", "soup", "--method", "ema")
    (merged.published / "init").mkdir()
    (merged.published / "init" / "notes").touch()
    assert "belongs to no head" in refused(merged, "--head", "init", "--method", "ema")
    assert (merged.published / "init" / "notes").exists()
    assert "there is no method" in refused(merged, "--head", "mine", "--method", "none")
    fd = durable.lock(merged.lock)
    try:
        assert "another mainstem is running" in refused(merged, "--head", "new", "--method", "ema")
        assert "another mainstem is running" in refused(merged, "--without", "1")
    finally:
        os.close(fd)


# without


def test_taking_an_expert_out_subtracts_where_it_can_and_replays_where_it_must(
    merged: Home, model: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    before = {head: latest(merged, head) for head in ("main", "soup")}
    said = rebuild(merged, "--without", "3")
    assert said.splitlines() == ["main/5: replayed", "soup/5: subtracted"]
    assert live(merged) == live(merged, "soup") == 5
    assert_close(latest(merged), opcm(*weights(model, 0, 1, 3)))
    assert_close(latest(merged, "soup"), soup(model, [0, 1, 3]))
    gone = experts(merged)[2]
    assert (gone.status, gone.version, gone.withdrawn_in) == (Status.WITHDRAWN, 3, 5)
    manifest = json.loads(merged.manifest("soup", 5).read_bytes())
    assert manifest["withdrawn"] == {"experts": [{"sha256": gone.sha256, "name": "c"}], "how": "subtracted"}
    assert (manifest["experts"], manifest["expert"]) == (3, None)
    for head, weights_before in before.items():
        kept = read_weights(merged.version(head, 4))
        assert all(kept[name].equal(weights_before[name]) for name in kept)
    check(merged)

    put(merged, shutil.copytree(model[1][2], tmp_path / "c"))
    drain(merged)
    assert [e.status for e in experts(merged)][2:] == [Status.WITHDRAWN, Status.MERGED, Status.MERGED]
    assert live(merged) == 6
    assert_close(latest(merged), opcm(*weights(model, 0, 1, 3, 2)))
    assert_close(latest(merged, "soup"), soup(model, [0, 1, 2, 3]))
    check(merged)
    rebuild(merged, "--head", "init", "--method", "ema")
    assert_close(latest(merged, "init"), ema(*weights(model, 0, 1, 3, 2)))
    assert live(merged, "init") == 6
    check(merged)


def test_taking_several_out_and_then_all(merged: Home, model: tuple[Path, list[Path]]) -> None:
    rebuild(merged, "--without", "1", "--without", "c")
    assert live(merged) == 5
    assert_close(latest(merged), opcm(*weights(model, 1, 3)))
    assert_close(latest(merged, "soup"), soup(model, [1, 3]))
    check(merged)
    assert "expert 1 (a.safetensors) went with version 5 already" in refused(merged, "--without", "1")
    assert "no merged expert is called '99'" in refused(merged, "--without", "99")
    assert merged.clean.exists()  # what is refused leaves no mark of a crash
    assert rebuild(merged, "--without", "2", "--without", "4").splitlines() == ["main/6: replayed", "soup/6: replayed"]
    base = read_weights(model[0])
    assert live(merged) == 6
    assert_close(latest(merged), base, 0)
    assert_close(latest(merged, "soup"), base, 0)
    check(merged)


def test_a_subtraction_alone_needs_no_other_expert(
    merged: Home, model: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    target = Home(tmp_path / "sums")
    rebuild(merged, "--into", target.root, "--method", "mean")
    for expert_id in (1, 2, 3):
        shutil.rmtree(target.archive(expert_id))
    assert "to be subtracted" in rebuild(target, "--without", "4", "--dry-run")
    assert live(target) == 4
    rebuild(target, "--without", "4")
    assert_close(latest(target), soup(model, [0, 1, 2]))
    shutil.rmtree(merged.archive(1))
    assert "expert 1 (a.safetensors) is not in" in refused(merged, "--without", "2")


@pytest.mark.parametrize(
    "point",
    ["commit.before=kill:4", "publish.after=kill:4", "commit.after=kill:4", "commit.after=kill:2", "link.swap=kill:6"],
)
def test_a_withdrawal_that_is_killed(
    point: str, merged: Home, model: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(monkeypatch, point, merged, "--without", "3")
    with Store.open(merged.registry) as store:
        recover(merged, store, lambda *_, **__: None)
        committed = store.counts()[Status.WITHDRAWN] == 1
    with lineage(merged) as reader:
        assert verify(merged, reader, lambda what: None)[1] == []
    assert live(merged) == (5 if committed else 4)
    if not committed:
        rebuild(merged, "--without", "3")
    assert_close(latest(merged), opcm(*weights(model, 0, 1, 3)))
    assert_close(latest(merged, "soup"), soup(model, [0, 1, 3]))
    check(merged)


@pytest.mark.parametrize("damaged", [3, 4])
def test_an_archived_expert_that_is_no_longer_what_was_merged(
    damaged: int, merged: Home, model: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """One that is to be subtracted, and one that is to be replayed."""
    (weights_file,) = merged.archive(damaged).glob("*/model.safetensors")
    sound = weights_file.read_bytes()
    weights_file.unlink()  # a link to the model's file
    write_expert(tmp_path / "e.safetensors", model[0], 9)
    shutil.copy(tmp_path / "e.safetensors", weights_file)
    before = merged_files(merged)
    assert "is not what was merged" in refused(merged, "--without", "3")
    assert live(merged) == 4 and merged_files(merged) == before
    weights_file.write_bytes(sound)
    rebuild(merged, "--without", "3")
    assert_close(latest(merged), opcm(*weights(model, 0, 1, 3)))
    check(merged)


def merged_files(home: Home) -> dict[str, bytes | str]:
    return tree(home.published) | tree(home.state / "heads")


# two passes


def test_a_new_head_of_pcb_is_the_offline_method_and_the_next_expert_makes_it_approximate(
    merged: Home, model: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    rebuild(merged, "--head", "best", "--method", "pcb", "--set", "ratio=0.3")
    assert_merged_like(latest(merged, "best"), pcb(*weights(model, 0, 1, 2, 3), 0.3), model)
    assert json.loads(merged.manifest("best", 4).read_bytes())["approximate"] is False
    put(merged, write_expert(tmp_path / "e.safetensors", model[0], 9))
    drain(merged)
    assert live(merged, "best") == 5
    assert json.loads(merged.manifest("best", 5).read_bytes())["approximate"] is True
    rebuild(merged, "--without", "5")
    assert json.loads(merged.manifest("best", 6).read_bytes())["approximate"] is False
    assert_merged_like(latest(merged, "best"), pcb(*weights(model, 0, 1, 2, 3), 0.3), model)
    check(merged)


def test_a_new_home_with_pcb_has_one_version_more_for_its_second_pass(
    merged: Home, model: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Home(tmp_path / "new")
    words = ("--into", target.root, "--method", "pcb", "--head", "soup=mean")
    killed(monkeypatch, "commit.before=kill:5", merged, *words)
    assert live(target) == 4
    for _ in range(2):  # the second time there is nothing left to do
        rebuild(merged, *words)
        assert live(target) == live(target, "soup") == 5
        assert_merged_like(latest(target), pcb(*weights(model, 0, 1, 2, 3)), model)
        assert_close(latest(target, "soup"), soup(model, [0, 1, 2, 3]))
        check(target)
    assert_merged_like(read_weights(target.version("main", 4)), pcb_on_arrival(*weights(model, 0, 1, 2, 3)), model)


def assert_merged_like(found: dict[str, Tensor], truth: dict[str, Tensor], model: tuple[Path, list[Path]]) -> None:
    """The merged task vector as a whole, to 1e-4: float32 weights hold no more of changes of a hundredth."""
    base = read_weights(model[0])
    names = [name for name, tensor in base.items() if tensor.is_floating_point()]
    error = sum(float((found[n].double() - truth[n]).square().sum()) for n in names) ** 0.5
    length = sum(float((truth[n] - base[n].double()).square().sum()) for n in names) ** 0.5
    assert length > 0.01 and error < 1e-4 * length, (error, length)


def test_a_new_head_that_keeps_records_has_one_of_each_expert(merged: Home) -> None:
    rebuild(merged, "--without", "2")
    rebuild(merged, "--head", "views", "--method", "emr")
    assert sorted(path.stem for path in merged.views("views").iterdir()) == ["000001", "000003", "000004"]
    check(merged)


def test_an_expert_that_is_no_longer_in_the_archive_is_taken_out_by_a_replay(
    merged: Home, model: tuple[Path, list[Path]]
) -> None:
    shutil.rmtree(merged.archive(3))
    assert rebuild(merged, "--without", "3").splitlines() == ["main/5: replayed", "soup/5: replayed"]
    assert_close(latest(merged, "soup"), soup(model, [0, 1, 3]))
    assert rebuild(merged, "--without", "1", "--replay").splitlines() == ["main/6: replayed", "soup/6: replayed"]
    assert_close(latest(merged, "soup"), soup(model, [1, 3]))
    check(merged)


def test_an_expert_that_outweighs_the_others_is_taken_out_by_a_replay(
    base: Path, model: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """float32 would keep only the first digits of the others."""
    home = make_home(tmp_path / "sums", base, (("main", "mean", {}),))
    for path, weight in zip(model[1][1:3], (1.0, 1000.0), strict=True):
        copy = shutil.copytree(path, tmp_path / path.name)
        (copy / "expert.json").write_text(json.dumps({"weight": weight}))
        put(home, copy)
        drain(home)
    assert rebuild(home, "--without", "2").splitlines() == ["main/3: replayed"]
    assert_close(latest(home), soup(model, [1]))


@pytest.mark.parametrize("left", ["folder", "registry"])
def test_what_is_left_of_another_rebuild_is_begun_anew(merged: Home, model: tuple[Path, list[Path]], left: str) -> None:
    inner = Home(merged.rebuilding("init"))
    inner.state.mkdir(parents=True)
    inner.inner_mark.touch()
    if left == "registry":
        inner.registry.write_bytes(b"SQLite format 3" + bytes(200))
    rebuild(merged, "--head", "init", "--method", "ema")
    assert_close(latest(merged, "init"), ema(*weights(model, 0, 1, 2, 3)))
    check(merged)


def test_recovery_touches_no_folder_that_only_looks_like_a_rebuild(merged: Home) -> None:
    for name in (
        "rebuild-",
        "rebuild-..",
        "rebuild-a.b",
        "rebuild-main",
        "rebuild-notes",
        "without-000001",
        "without-x",
    ):
        (merged.state / name).mkdir()
        (merged.state / name / "mine").write_text("years of work")
    (merged.published / "notes").mkdir()
    before = tree(merged.published)
    drain(merged)
    assert tree(merged.published) == before and len(list(merged.state.glob("*/mine"))) == 7
    with pytest.raises(BadHome, match="rebuild-notes is in the way"):
        add_head(merged, Settings(), "notes", make("mean", {}), Console())
    assert (merged.state / "rebuild-notes" / "mine").exists()


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
