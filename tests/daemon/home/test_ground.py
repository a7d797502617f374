"""The base and the states are looked at with every expert: nothing is merged onto what was edited."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from daemon.arrivals.inbox import Inbox
from daemon.compute.progress import Abandoned, Progress
from daemon.config import Settings
from daemon.disk import durable
from daemon.doctor.examining import examine
from daemon.doctor.finding import Level
from daemon.errors import BadHome, NotYet
from daemon.home import ground
from daemon.home.recovery import recover
from daemon.layout import Home
from daemon.merge import merger
from daemon.merge.merger import Merger
from daemon.rebuild.replay import Console
from projector.files.tensorfile import RunningDigest
from projector.methods.mean import Mean
from registry.records import Expert
from registry.store import Store
from tests.daemon.following import follow
from tests.daemon.homes import drain, latest, live, make_home, put, quick
from tests.daemon.rebuilds import taken_out
from tests.models import read_weights, write_base, write_expert

Take = Callable[[int], Expert]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home over a folder with a configuration, with two heads."""
    return make_home(tmp_path / "home", write_base(tmp_path / "base", 1), [("main", "mean", {}), ("soup", "opcm", {})])


@pytest.fixture
def take(home: Home, tmp_path: Path) -> Iterator[Take]:
    """Merges the expert of a seed, in one process that goes on between two of them."""
    with Store.open(home.registry) as store:
        recover(home, store, lambda *_, **__: None)
        running = Merger(home, store, quick(), Console().progress())

        def taken(seed: int) -> Expert:
            if not (home.inbox / f"{seed}.safetensors").exists():
                put(home, write_expert(tmp_path / f"{seed}.safetensors", tmp_path / "base", seed))
            (drop,) = Inbox(home.inbox, 0, lambda: 0.0).scan().settled
            return running.take(drop)

        yield taken
        running.close()


def spoil(path: Path) -> None:
    """Writes other bytes over the last ones of a file, in place, and leaves its size and its mtime as they were."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\1" * 8)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def merged_mean(base: Path, seeds: list[int], tmp_path: Path, name: str) -> torch.Tensor:
    found = [write_expert(tmp_path / f"again-{seed}.safetensors", base, seed) for seed in seeds]
    return torch.stack([load_file(path)[name] for path in found]).double().mean(0)


def test_version_0_and_the_base_are_two_files(home: Home, take: Take, tmp_path: Path) -> None:
    """Whoever edits the published files changes no merge."""
    for head in ("main", "soup"):
        for path in home.version(head, 0).iterdir():
            assert path.stat().st_nlink == 1
            spoil(path)
    take(2)
    take(3)
    name = "layers.1.up.weight"
    merged = merged_mean(tmp_path / "base", [2, 3], tmp_path, name)
    assert torch.allclose(latest(home)[name].double(), merged, atol=1e-6)


@pytest.mark.parametrize("first", [True, False], ids=["before the first expert", "between two"])
def test_an_edited_base_is_refused_and_the_hint_mends_it(
    home: Home, take: Take, first: bool, request: pytest.FixtureRequest
) -> None:
    if not first:
        take(2)
    spoil(home.base / "model.safetensors")
    with pytest.raises(BadHome, match=r"base .* is damaged: model\.safetensors") as refused:
        take(3)
    assert live(home) == (0 if first else 1) and (home.inbox / "3.safetensors").exists()
    follow(refused.value.hint)
    assert take(3).version == live(home) == (1 if first else 2)


def test_where_no_copy_is_sound_a_backup_is_asked_for(home: Home, take: Take) -> None:
    take(2)
    for path in (home.base, home.version("main", 0), home.version("soup", 0)):
        spoil(path / "model.safetensors")
    with pytest.raises(BadHome) as refused:
        take(3)
    assert "from a backup" in refused.value.hint and "cp " not in refused.value.hint


def test_an_edited_configuration_of_the_base_is_refused(home: Home, take: Take) -> None:
    take(2)
    (home.base / "config.json").write_text("{}")
    with pytest.raises(BadHome, match=r"config\.json"):
        take(3)
    shutil.copy(home.version("main", 0) / "config.json", home.base / "config.json")
    assert take(3).version == 2


def test_a_base_that_was_put_back_under_the_daemon_is_read_by_the_next_start(home: Home, take: Take) -> None:
    take(2)
    again = shutil.copy(home.base / "model.safetensors", home.tmp / "again")
    Path(again).rename(home.base / "model.safetensors")
    with pytest.raises(BadHome, match="replaced") as refused:
        take(3)
    assert "start again" in refused.value.hint


def test_a_touched_base_is_hashed_again_and_no_more(home: Home, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    take(2)
    hashed: list[str] = []

    class Counting(RunningDigest):
        def finish(self, size: int) -> str:
            hashed.append(str(Path(f"/proc/self/fd/{self._fd}").readlink().name))
            return super().finish(size)

    monkeypatch.setattr(ground, "RunningDigest", Counting)
    take(3)
    assert hashed == []  # not a byte of what was not touched
    os.utime(home.base / "model.safetensors")
    take(4)
    assert hashed == ["model.safetensors"]
    take(5)
    assert hashed == ["model.safetensors"] and live(home) == 4


def test_a_base_that_is_touched_while_it_is_read_lets_the_expert_be_taken_again(
    home: Home, take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(2)

    def touch(point: str) -> None:
        if point == "fold.after":
            os.utime(home.base / "model.safetensors")

    monkeypatch.setattr(merger, "hit", touch)
    with pytest.raises(NotYet, match="touched"):
        take(3)
    monkeypatch.undo()
    assert live(home) == 1 and take(3).version == 2


@pytest.mark.parametrize("restart", [False, True], ids=["while it runs", "while it was stopped"])
def test_an_edited_state_is_refused(home: Home, tmp_path: Path, restart: bool, request: pytest.FixtureRequest) -> None:
    base = tmp_path / "base"
    for seed in (2, 3):
        put(home, write_expert(tmp_path / f"{seed}.safetensors", base, seed))
    if restart:
        drain(home)
    else:
        take: Take = request.getfixturevalue("take")
        path = home.inbox / "3.safetensors"
        path.rename(tmp_path / "3.safetensors")
        take(2)
        put(home, tmp_path / "3.safetensors")
        take(3)
    state = home.head_state("main", 2) / "state.safetensors"
    sound = state.read_bytes()
    spoil(state)
    put(home, write_expert(tmp_path / "4.safetensors", base, 4))
    with pytest.raises(BadHome, match=r"state/heads/main/000002/state\.safetensors is damaged"):
        drain(home) if restart else take(4)
    assert live(home) == 2 and (home.inbox / "4.safetensors").exists()
    state.write_bytes(sound)
    assert (drain(home) if restart else take(4)) and live(home) == 3


def test_a_state_of_another_rule_is_told_from_a_damaged_one(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an earlier mainstem wrote it: nothing is merged, and what is said to do about it helps."""
    base = tmp_path / "base"
    put(home, write_expert(tmp_path / "2.safetensors", base, 2))
    with monkeypatch.context() as earlier:
        earlier.setattr(Mean, "slots", lambda _, spec: {"S": replace(spec, dtype=torch.float64)})
        drain(home)
    put(home, write_expert(tmp_path / "3.safetensors", base, 3))
    with pytest.raises(BadHome, match=r"has no S/\S+ as mean keeps it now") as refused:
        drain(home)
    assert live(home) == 1 and (home.inbox / "3.safetensors").exists()
    (told,) = [one for one in examine(home.root) if one.check == "states"]
    assert (told.level, told.text, told.hint) == (Level.BAD, str(refused.value), refused.value.hint)
    follow(refused.value.hint.replace("NEWHOME", str(tmp_path / "again")))
    again = Home(tmp_path / "again")
    assert live(again) == 1
    assert [one.level for one in examine(again.root) if one.check == "states"] == [Level.OK]


def test_an_unfit_base_is_never_the_experts_fault(home: Home, take: Take) -> None:
    """Edited so that the delta is not finite: the expert is not put into quarantine for it."""
    take(2)
    path = home.base / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\xff" * 64)
    with pytest.raises(BadHome, match="base"):
        take(3)
    assert not list((home.root / "quarantine").iterdir())


def link_version_0(home: Home) -> None:
    """As homes were made once."""
    for name in ("model.safetensors", "config.json"):
        for head in ("main", "soup"):
            (home.version(head, 0) / name).unlink()
            (home.version(head, 0) / name).hardlink_to(home.base / name)


def test_a_home_of_before_gets_a_base_of_its_own_at_the_next_start(home: Home, tmp_path: Path) -> None:
    link_version_0(home)
    drain(home)
    for path in home.base.iterdir():
        assert path.stat().st_nlink == 1
    assert (home.version("main", 0) / "model.safetensors").stat().st_nlink == 2  # of the two heads
    assert torch.equal(
        read_weights(home.base)["embed_tokens.weight"], read_weights(tmp_path / "base")["embed_tokens.weight"]
    )
    put(home, write_expert(tmp_path / "2.safetensors", tmp_path / "base", 2))
    drain(home)
    assert live(home) == 1


def test_a_home_of_before_whose_published_file_was_edited_does_not_start(home: Home) -> None:
    link_version_0(home)
    home.clean.touch()
    spoil(home.version("main", 0) / "config.json")
    with pytest.raises(BadHome, match="base"):
        drain(home)


def test_a_home_of_before_starts_on_a_full_disk(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    link_version_0(home)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "copy_file", full)
    drain(home)
    assert (home.base / "model.safetensors").stat().st_nlink == 3


def test_init_asks_for_room_for_every_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base", 1)
    size = sum(path.stat().st_size for path in base.iterdir())

    def room(of: object) -> SimpleNamespace:
        return SimpleNamespace(free=2 * size)

    monkeypatch.setattr(shutil, "disk_usage", room)
    with pytest.raises(BadHome, match="3 copies"):
        make_home(tmp_path / "none", base, [("main", "mean", {}), ("soup", "mean", {})])
    assert make_home(tmp_path / "home", base).exists()


def test_what_was_prepared_is_not_used_once_it_was_edited(home: Home, tmp_path: Path) -> None:
    base = tmp_path / "base"
    put(home, write_expert(tmp_path / "2.safetensors", base, 2))
    drain(home)
    results = []
    for edited in (False, True):
        copy = Home(shutil.copytree(home.root, tmp_path / f"copy-{edited}", symlinks=True))
        with Store.open(copy.registry) as store:
            recover(copy, store, lambda *_, **__: None)
            running = Merger(copy, store, quick(), Console().progress())
            running.preparations.work(lambda: False)
            assert running.preparations.share("soup") == 1
            if edited:
                spoil(copy.prepared("soup", 1))
            put(copy, write_expert(tmp_path / "3.safetensors", base, 3))
            (drop,) = Inbox(copy.inbox, 0, lambda: 0.0).scan().settled
            running.take(drop)
            running.close()
        results.append(latest(copy, "soup"))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_subtraction_reads_a_sound_state_only(home: Home, tmp_path: Path) -> None:

    for seed in (2, 3):
        put(home, write_expert(tmp_path / f"{seed}.safetensors", tmp_path / "base", seed))
    drain(home)
    spoil(home.head_state("main", 2) / "state.safetensors")
    with pytest.raises(BadHome, match=r"state\.safetensors is damaged"):
        taken_out(home, Settings(), "1")
    assert live(home) == 2


def test_who_is_told_to_stop_separates_no_base_first(home: Home) -> None:
    link_version_0(home)
    stopping = Event()
    stopping.set()
    with Store.open(home.registry) as store, pytest.raises(Abandoned):
        ground.separate(home, store, Progress(stopping, lambda _: None))
    assert (home.base / "model.safetensors").stat().st_nlink == 3 and not os.listdir(home.tmp)


def test_a_copy_is_given_up_at_its_next_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "COPY_BYTES", 10)
    (tmp_path / "source").write_bytes(bytes(100))
    copied: list[int] = []

    def stop(nbytes: int) -> None:
        copied.append(nbytes)
        if len(copied) == 3:
            raise Abandoned

    with pytest.raises(Abandoned):
        durable.copy_file(tmp_path / "source", tmp_path / "target", stop)
    assert copied == [10, 10, 10]


def test_a_thread_that_hashes_a_state_hears_of_a_stop_and_says_so(tmp_path: Path) -> None:
    """An error that nobody takes from it would be told by the interpreter, which the suite takes for a failure."""
    path, stopping = tmp_path / "state", Event()
    path.write_bytes(bytes(100))
    with path.open("rb") as file, ground._Hashing(file.fileno(), 100, Progress(stopping, lambda _: None)) as hashing:
        assert hashing.finish() == hashlib.sha256(bytes(100)).hexdigest()
    stopping.set()
    with (
        path.open("rb") as file,
        pytest.raises(Abandoned),
        ground._Hashing(file.fileno(), 100, Progress(stopping, lambda _: None)) as hashing,
    ):
        hashing.finish()
