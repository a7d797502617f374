"""A registry that was restored from a backup knows less than the home: nothing is removed, and each way out works."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from daemon import service
from daemon.config import Settings
from daemon.errors import BadHome
from daemon.home.verification import verify
from daemon.layout import Home
from daemon.rebuild.commands import add_head, into
from daemon.rebuild.replay import Console
from projector.methods import make
from registry.records import Status
from tests.daemon.homes import drain, experts, lineage, live, make_home, put, quick, tree
from tests.daemon.processes import forked
from tests.daemon.rebuilds import taken_out
from tests.models import write_base, write_expert

KEEP_ALL = quick(retention={"versions": 100})
KEEP_FEW = quick(retention={"versions": 1, "grace_seconds": 0})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base", 1)


def merge(home: Home, base: Path, tmp_path: Path, *seeds: int, settings: Settings = KEEP_ALL) -> None:
    for seed in seeds:
        put(home, write_expert(tmp_path / f"{seed}.safetensors", base, seed))
        drain(home, settings)


def back_up(home: Home, to: Path) -> Path:
    return Path(shutil.copy(home.registry, to))


def restore(backup: Path, home: Home) -> Path:
    """Puts the backup in place of the registry, and returns where the newer one went."""
    newer = Path(shutil.move(home.registry, backup.with_name("newer.sqlite")))
    for name in ("registry.sqlite-wal", "registry.sqlite-shm"):
        home.registry.with_name(name).unlink(missing_ok=True)
    shutil.copy(backup, home.registry)
    return newer


def published(home: Home) -> dict[str, bytes | str]:
    """All but what the registry and the locks are."""
    return {
        name: content
        for name, content in tree(home.root).items()
        if name.startswith(("published/", "archive/", "quarantine/", "state/heads/"))
    }


def one_that_is_older(
    base: Path, tmp_path: Path, behind: int, heads: Sequence[tuple[str, str, dict[str, object]]]
) -> tuple[Home, Path, list[str]]:
    """A home whose registry is older, where the newer one lies, and what of it is ahead."""
    home = make_home(tmp_path / "home", base, heads)
    merge(home, base, tmp_path, 2)
    backup = back_up(home, tmp_path / "backup.sqlite")
    merge(home, base, tmp_path, *range(3, 3 + behind))
    newer = restore(backup, home)
    names = [f"archive/{n:06d}" for n in range(2, 2 + behind)]
    names += [f"published/{head}/{1 + behind:06d}" for head, _, _ in heads]
    return home, newer, names


BEHIND = pytest.mark.parametrize("behind", [1, 2], ids=["one version behind", "two versions behind"])


@pytest.fixture(params=[1, 2], ids=["one version behind", "two versions behind"])
def older(request: pytest.FixtureRequest, base: Path, tmp_path: Path) -> tuple[Home, Path, list[str]]:
    return one_that_is_older(base, tmp_path, request.param, [("main", "mean", {}), ("soup", "emr", {})])


def test_it_does_not_start_and_removes_nothing(older: tuple[Home, Path, list[str]]) -> None:
    home, _, ahead = older
    before = published(home)
    with pytest.raises(BadHome, match="the registry is older") as refused:
        drain(home)
    assert "archive/000002" in str(refused.value) and published(home) == before
    for command in (
        lambda: add_head(home, Settings(), "third", make("mean", {}), Console()),
        lambda: taken_out(home, Settings(), "1"),
    ):
        with pytest.raises(BadHome, match="the registry is older"):
            command()
    assert published(home) == before
    with lineage(home) as reader:
        found = verify(home, reader, lambda what: None)[1]
    assert all(any(problem.startswith(f"{name}:") for problem in found) for name in ahead), found


def test_reading_commands_go_on(older: tuple[Home, Path, list[str]]) -> None:
    home, _, _ = older
    for command in ("status", "log", "verify"):
        ended = forked(command, "--home", home.root)
        assert "Traceback" not in ended.stdout + ended.stderr
        assert ended.returncode == (1 if command == "verify" else 0)


def test_the_newer_registry_put_back(older: tuple[Home, Path, list[str]], base: Path, tmp_path: Path) -> None:
    home, newer, ahead = older
    shutil.move(newer, home.registry)
    merge(home, base, tmp_path, 9)
    assert live(home) == 2 + len([name for name in ahead if name.startswith("archive")])


@BEHIND
def test_what_is_ahead_moved_away(base: Path, tmp_path: Path, behind: int) -> None:
    """Where the old state is still there, as of heads with views: its numbers are taken again, and its experts may be
    dropped again.
    """
    home, _, _ = one_that_is_older(base, tmp_path, behind, [("main", "emr", {}), ("soup", "emr", {})])
    with pytest.raises(BadHome, match="the registry is older") as refused:
        drain(home)
    assert "move them out" in refused.value.hint
    away = tmp_path / "away"
    away.mkdir()
    for turn in range(4):
        with lineage(home) as reader:
            found = [line.split(":")[0] for line in verify(home, reader, lambda what: None)[1] if "not know" in line]
        for name in found:
            shutil.move(home.root / name, away / f"{turn}-{name.replace('/', '-')}")
    for folder in sorted(away.glob("*archive-*")):
        for path in folder.iterdir():
            put(home, path)
    drain(home, KEEP_ALL)
    assert {expert.status for expert in experts(home)} == {Status.MERGED} and live(home) == len(experts(home)) > 1
    with lineage(home) as reader:
        assert verify(home, reader, lambda what: None)[1] == []


@pytest.mark.parametrize("settings", [KEEP_FEW, KEEP_ALL], ids=["its version is gone", "its state is gone"])
def test_where_nothing_can_be_gone_on_from_a_new_home_is_made_of_it(
    base: Path, tmp_path: Path, settings: Settings
) -> None:
    home = make_home(tmp_path / "home", base)
    merge(home, base, tmp_path, 2, settings=settings)
    backup = back_up(home, tmp_path / "backup.sqlite")
    merge(home, base, tmp_path, 3, 4, settings=settings)
    assert home.version("main", 1).exists() == (settings is KEEP_ALL)
    assert not home.head_state("main", 1).exists()
    restore(backup, home)
    with pytest.raises(BadHome, match="the registry is older") as refused:
        drain(home)
    assert "--into NEWHOME" in refused.value.hint and "move them out" not in refused.value.hint
    new = Home(tmp_path / "new")
    into(home, new, Settings(), None, [], Console())
    for n in (2, 3):
        put(new, next(home.archive(n).iterdir()))
        drain(new)
    assert live(new) == 3


def empty(path: Path) -> None:
    path.mkdir(parents=True)


def a_record(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


@pytest.mark.parametrize(
    ("name", "make_it"),
    [
        ("published/main/000777", empty),
        ("published/main/000002", empty),
        ("state/heads/main/000003", empty),
        ("state/heads/main/views/000003.safetensors", a_record),
        ("archive/000002", empty),
        ("quarantine/000002", empty),
    ],
)
def test_each_sign_and_what_a_person_may_have_put_there(
    base: Path, tmp_path: Path, name: str, make_it: Callable[[Path], None]
) -> None:
    home = make_home(tmp_path / "home", base)
    merge(home, base, tmp_path, 2)
    make_it(home.root / name)
    with pytest.raises(BadHome, match=name):
        drain(home)
    assert (home.root / name).exists()
    with lineage(home) as reader:
        assert any(problem.startswith(name) for problem in verify(home, reader, lambda what: None)[1])
    shutil.move(home.root / name, tmp_path / "away")
    drain(home)
    merge(home, base, tmp_path, 3)
    assert live(home) == 2


@pytest.mark.parametrize("name", ["000002", "state"])
def test_a_running_merge_never_removes_what_took_the_next_versions_place(
    base: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_home(tmp_path / "home", base)
    merge(home, base, tmp_path, 2)
    there = home.version("main", 2) if name == "000002" else home.head_state("main", 2)
    recover = service.recover

    def then(*given: object) -> None:
        recover(*given)  # type: ignore[arg-type]
        there.mkdir()
        (there / "thesis.tex").write_text("years of work")

    monkeypatch.setattr(service, "recover", then)
    put(home, write_expert(tmp_path / "3.safetensors", base, 3))
    with pytest.raises(BadHome, match="has the place of the next version"):
        drain(home)
    assert (there / "thesis.tex").exists() and live(home) == 1


def test_temporaries_of_other_names_stay(base: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", base)
    mine = [home.tmp / "mine", home.state / ".notes", home.versions("main") / ".best.tmp"]
    for path in mine:
        path.write_text("mine")
    drain(home)
    assert all(path.exists() for path in mine)
