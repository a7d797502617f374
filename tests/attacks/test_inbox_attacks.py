"""Everything hostile that can lie in an inbox, in one run of the daemon: each is refused, nothing else moves.

I8: a refused file changes a registry row, a counter and its place, nothing else.
"""

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry
from safetensors.torch import save_file

from daemon.arrivals.inbox import entry_id
from daemon.home.verification import verify
from daemon.layout import Home
from registry.records import Expert, Status
from tests.attacks import content_drops  # noqa: F401 - importing it registers its drops
from tests.attacks.drops import DROPS, Payload
from tests.daemon.homes import count, drain, experts, lineage, live, make_home, put, quick, reason_of, tree
from tests.daemon.processes import forked
from tests.models import write_base, write_expert

FIRST = 0.0005  # how far the expert that is merged before the attacks lies from the base
Content = dict[str, bytes | str] | bytes | str


@dataclass(frozen=True)
class Raid:
    """What one run of the daemon made of all the attacks together."""

    home: Home
    base: Path
    content: dict[str, Content]  # of each drop, as it was laid
    expert: dict[str, Expert]  # its row
    impossible: dict[str, str]  # attacks that this machine does not allow, and why
    metrics: CollectorRegistry
    before: dict[str, bytes | str]  # the rest of the home
    after: dict[str, bytes | str]
    proof: Path  # exists if any payload ran


@pytest.fixture(scope="module")
def raid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Raid]:
    root = tmp_path_factory.mktemp("raid")
    base = write_base(root / "base.safetensors", seed=1)
    home = make_home(root / "home", base)
    for seed in (2, 12, 22):  # as many as it takes for a usual norm to exist
        put(home, write_expert(root / f"{seed}.safetensors", base, seed, FIRST))
    drain(home)
    (root / "secret").mkdir()
    good = write_expert(root / "secret" / "model.safetensors", base, 3, FIRST)
    Payload.proof = root / "it-ran"
    entries, content, impossible = {}, {}, {}
    before = _rest(home)
    for title, drop in DROPS.items():
        path = home.inbox / drop.name
        try:
            drop.lay(path, good)
        except PermissionError as error:
            impossible[title] = str(error)
            continue
        content[title] = _content(path)
        entries[entry_id(path)] = title
    metrics = drain(home)
    rows = {entries[row.entry]: row for row in experts(home) if row.entry in entries}
    yield Raid(home, base, content, rows, impossible, metrics, before, _rest(home), Payload.proof)
    shutil.rmtree(root)


def _rest(home: Home) -> dict[str, bytes | str]:
    """The home without what a refusal may change."""
    mine = ("inbox", "quarantine", "state/registry.sqlite", "state/lock", "state/clean")
    return {name: content for name, content in tree(home.root).items() if not name.startswith(mine)}


def _content(path: Path) -> Content:
    """What lies at `path`, of whatever kind; nothing is followed and nothing is opened that could block."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return f"-> {path.readlink()}"
    if stat.S_ISDIR(mode):
        return tree(path)
    return path.read_bytes() if stat.S_ISREG(mode) else f"{stat.S_IFMT(mode):o} {path.lstat().st_rdev}"


@pytest.mark.parametrize("title", DROPS)
def test_an_attack_is_refused_and_kept_as_it_was(raid: Raid, title: str) -> None:
    if title in raid.impossible:
        pytest.skip(f"cannot be laid here: {raid.impossible[title]}")
    drop, expert = DROPS[title], raid.expert[title]
    assert (expert.status, expert.version) == (Status.QUARANTINED, None)
    assert expert.reason in drop.reasons
    said = reason_of(raid.home, expert)
    assert said["reason"] == expert.reason and said["detail"] == expert.detail and said["hint"] == expert.hint
    assert said["detail"] and said["hint"]
    for word in (expert.name, said["detail"], said["hint"]):
        assert word.isprintable() and len(word) < 1000
    name = f"{drop.name}.dropped" if drop.name == "reason.json" else drop.name
    folder = raid.home.quarantine(expert.id)
    assert set(os.listdir(folder)) == {"reason.json", name}
    assert _content(folder / name) == raid.content[title]
    assert expert.place == f"quarantine/{expert.id:06d}"


def test_nothing_else_has_changed(raid: Raid) -> None:
    assert raid.before == raid.after
    assert os.listdir(raid.home.inbox) == []
    assert live(raid.home) >= 1
    assert len(raid.expert) == len(DROPS) - len(raid.impossible)


def test_no_payload_ran(raid: Raid) -> None:
    assert not raid.proof.exists()
    os.system(Payload().__reduce__()[1][0])  # the payload itself works
    assert raid.proof.exists()


def test_the_counters_say_how_many_and_why(raid: Raid) -> None:
    reasons = [expert.reason for expert in raid.expert.values()]
    for reason in set(reasons):
        assert reason is not None
        assert count(raid.metrics, "mainstem_refused_total", reason=reason) == reasons.count(reason)
    assert count(raid.metrics, "mainstem_experts_total", outcome="quarantined") == len(reasons)
    assert count(raid.metrics, "mainstem_experts_total", outcome="merged") == 0


def test_the_next_good_expert_merges_and_the_home_verifies(raid: Raid, tmp_path: Path) -> None:
    put(raid.home, write_expert(tmp_path / "next.safetensors", raid.base, 4, FIRST))
    version = live(raid.home)
    drain(raid.home)
    assert live(raid.home) == version + 1
    with lineage(raid.home) as reader:
        assert verify(raid.home, reader, lambda what: None)[1] == []


def test_a_good_expert_among_attacks_merges_in_the_same_run(raid: Raid, tmp_path: Path) -> None:
    version = live(raid.home)
    good = write_expert(tmp_path / "good.safetensors", raid.base, 5, FIRST)
    titles = ("fifo", "link_to_a_file", "index_that_is_a_folder", "nan_in_the_last_value", "empty_folder")
    for n, title in enumerate(titles):
        DROPS[title].lay(raid.home.inbox / f"{n}-{DROPS[title].name}", good)
        if n == 2:
            shutil.copy(good, raid.home.inbox / "2-good.safetensors")
    drain(raid.home)
    assert live(raid.home) == version + 1
    assert os.listdir(raid.home.inbox) == []


def test_a_norm_far_above_the_others_is_refused(raid: Raid, tmp_path: Path) -> None:
    put(raid.home, write_expert(tmp_path / "loud.safetensors", raid.base, 6, 1000 * FIRST))
    version = live(raid.home)
    metrics = drain(raid.home)
    assert count(metrics, "mainstem_refused_total", reason="norm_outlier") == 1
    assert live(raid.home) == version


def test_the_base_itself_is_nothing_to_merge(raid: Raid) -> None:
    shutil.copy(raid.base, raid.home.inbox / "base.safetensors")
    metrics = drain(raid.home)
    assert count(metrics, "mainstem_refused_total", reason="equals_base") == 1


def test_the_same_bytes_count_once_whatever_they_are_called(raid: Raid, tmp_path: Path) -> None:
    good = write_expert(tmp_path / "again.safetensors", raid.base, 7, FIRST)
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(good, raid.home.inbox / name)
    (raid.home.inbox / "c.safetensors").hardlink_to(raid.home.inbox / "a.safetensors")
    version = live(raid.home)
    drain(raid.home)
    assert live(raid.home) == version + 1
    *_, first, second, third = experts(raid.home)
    assert [first.status, second.status, third.status] == [Status.MERGED, Status.DUPLICATE, Status.DUPLICATE]
    assert second.duplicate_of == third.duplicate_of == first.id
    (kept,) = raid.home.archive(first.id).iterdir()
    assert kept.read_bytes() == good.read_bytes()  # and no second time
    assert not any(list(raid.home.archive(expert.id).iterdir()) for expert in (second, third))


def test_good_experts_merge_under_the_oddest_names(raid: Raid, tmp_path: Path) -> None:
    names = ["a\nb", "'\"; --", os.fsdecode(b"\xff\xfe"), "\u202esrotsnet", "[red]", "-rf", "~x", "%s", " ", "ü" * 100]
    version = live(raid.home)
    for seed, name in enumerate(names):
        put(raid.home, write_expert(tmp_path / "e.safetensors", raid.base, 100 + seed, FIRST), f"{name}.safetensors")
    drain(raid.home)
    assert live(raid.home) == version + len(names)
    kept = {path.name for expert in experts(raid.home) for path in raid.home.archive(expert.id).glob("*")}
    assert kept >= {f"{name}.safetensors" for name in names}


def test_weights_that_do_not_fit_into_the_published_dtype_are_refused(tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    save_file({"w": torch.full((4,), 60000.0, dtype=torch.float16)}, base)
    home = make_home(tmp_path / "home", base, [("main", "task_arithmetic", {"scale": 2.0})])
    save_file({"w": torch.full((4,), 65504.0, dtype=torch.float16)}, home.inbox / "over.safetensors")
    metrics = drain(home)
    assert count(metrics, "mainstem_refused_total", reason="not_finite") == 1
    assert live(home) == 0 and os.listdir(home.tmp) == []
    save_file({"w": torch.full((4,), 60032.0, dtype=torch.float16)}, home.inbox / "under.safetensors")
    drain(home)
    assert live(home) == 1


def _storm(home: Home, base: Path, tmp_path: Path, number: int) -> None:
    for n in range(number):
        (home.inbox / f"{n}.safetensors").write_bytes(b"%d" % n)
    put(home, write_expert(tmp_path / "good.safetensors", base, 2))
    metrics = drain(home)
    assert count(metrics, "mainstem_refused_total", reason="truncated") == number
    assert live(home) == 1 and os.listdir(home.inbox) == []
    assert len(os.listdir(home.root / "quarantine")) == number


@pytest.mark.parametrize("number", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_very_many_bad_files_at_once(tmp_path: Path, number: int) -> None:
    base = write_base(tmp_path / "base.safetensors", seed=1)
    _storm(make_home(tmp_path / "home", base), base, tmp_path, number)


def test_what_cannot_be_read_or_moved_is_refused_and_does_not_stop_the_daemon() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to make files that belong to somebody else")
    nobody = 65534
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        root = Path(name)
        root.chmod(0o755)
        base = write_base(root / "base.safetensors", seed=1)
        home = make_home(root / "home", base)
        secret = write_expert(home.inbox / "closed.safetensors", base, 2)
        closed = write_expert(home.inbox / "closed", base, 3)
        for path in (home.root, *home.root.rglob("*")):
            os.chown(path, nobody, nobody)
        secret.chmod(0)
        closed.chmod(0)
        others = write_expert(home.inbox / "others", base, 4)  # root's own: can be read, but not be moved
        for path in (others / "model.safetensors", write_expert(home.inbox / "good.safetensors", base, 5)):
            path.chmod(0o644)
        first = _run_as(nobody, home)
        assert first.returncode == 0, first.stderr
        assert first.stderr.count("it cannot be moved out of the inbox") == 2
        assert "the archive has a copy" in first.stderr and "mend it where it lies" in first.stderr
        (merged,) = [expert for expert in experts(home) if expert.name == "others"]
        copied = home.archive(merged.id) / "others" / "model.safetensors"
        assert copied.read_bytes() == (others / "model.safetensors").read_bytes()
        with lineage(home) as reader:
            assert verify(home, reader, lambda what: None)[1] == []
        second = _run_as(nobody, home)  # meets what the first could not move
        assert second.returncode == 0, second.stderr
        assert second.stderr.count("it cannot be moved out of the inbox") == 2  # it is told at the start
        rows = {expert.name: expert for expert in experts(home)}
        assert len(rows) == len(experts(home)) == 4
        assert rows["closed.safetensors"].reason == rows["closed"].reason == "unreadable"
        assert rows["others"].status is rows["good.safetensors"].status is Status.MERGED
        assert set(os.listdir(home.inbox)) == {"closed", "others"}
        assert reason_of(home, rows["closed"])["reason"] == "unreadable"


def _run_as(uid: int, home: Home) -> subprocess.CompletedProcess[str]:
    """`mainstem run --once` as another user, in a fork: that user may not be allowed to read where Python lies."""

    def become() -> None:
        os.environ.update({f"MAINSTEM_INBOX__{name}_SECONDS": "0" for name in ("SETTLE", "PATIENCE", "RESUME")})
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)

    return forked("run", "--once", "--no-http", "--home", home.root, first=become)


def test_patience_is_kept_with_what_may_only_be_unfinished(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.safetensors", seed=1)
    home = make_home(tmp_path / "home", base)
    (home.inbox / "slow.safetensors").write_bytes(b"1234567")
    metrics = drain(home, quick(inbox={"patience_seconds": 0.5}))
    (expert,) = experts(home)
    assert expert.finished_at and (expert.finished_at - expert.received_at).total_seconds() >= 0.5
    assert count(metrics, "mainstem_refused_total", reason="truncated") == 1
