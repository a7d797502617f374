"""What is prepared between experts: it changes no bit, it can be lost, and an arrival does not wait for it."""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from torch import equal

from daemon.compute.progress import Progress
from daemon.disk import durable
from daemon.errors import BadHome
from daemon.home.verification import verify
from daemon.layout import STATE_FILE, Home
from daemon.manifest import FileEntry
from daemon.merge import preparing
from daemon.merge.merger import Merger
from daemon.service import Service
from registry.store import Store
from tests.daemon.arrivals.test_queue import scan
from tests.daemon.homes import MAIN, count, drain, latest, lineage, live, make_home, put, quick, tree
from tests.models import write_base, write_expert
from tests.projector.driver.test_many_tensors import steps_of


def never() -> bool:
    return False


@contextmanager
def merging(home: Home) -> Iterator[Callable[[Path], Merger]]:
    """A merger over the home; called with an expert it merges it, and gives itself."""
    with ExitStack() as stack:
        store = stack.enter_context(Store.open(home.registry))
        merger = Merger(home, store, quick(), Progress(Event(), lambda share: None))
        stack.callback(merger.close)

        def take(path: Path) -> Merger:
            put(home, path)
            (drop,) = scan(home).settled
            merger.take(drop)
            return merger

        yield take


def write(tmp_path: Path, base: Path, seed: int) -> Path:
    return write_expert(tmp_path / f"{seed}.safetensors", base, seed)


def same_weights(first: Home, second: Home) -> bool:
    ours, theirs = latest(first), latest(second)
    return ours.keys() == theirs.keys() and all(equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_prepared_half_prepared_and_unprepared_give_the_same_bits(home: Home, base: Path, tmp_path: Path) -> None:
    homes = {"none": home} | {
        name: Home(shutil.copytree(home.root, tmp_path / name, symlinks=True)) for name in ("half", "all")
    }
    for name, one in homes.items():
        with merging(one) as take:
            for seed in (2, 3, 4):
                merger = take(write(tmp_path, base, seed))
                share = merger.preparations.share("main")
                assert share == 0
                if name == "all":
                    merger.preparations.work(never)
                    assert merger.preparations.share("main") == 1
                if name == "half":
                    asked = iter([False, False, False])
                    merger.preparations.work(lambda asked=asked: next(asked, True))  # type: ignore[misc]
                    assert 0 < merger.preparations.share("main") < 1
    assert same_weights(homes["none"], homes["all"]) and same_weights(homes["none"], homes["half"])


def test_what_is_finished_is_kept_with_its_version_and_taken_up_at_the_next_start(
    home: Home, base: Path, tmp_path: Path
) -> None:
    with merging(home) as take:
        take(write(tmp_path, base, 2)).preparations.work(never)
    assert home.prepared("main", 1).exists()
    with merging(home) as take:
        merger = take(write(tmp_path, base, 3))  # it was ready for this one
        assert not home.prepared("main", 1).exists()
        merger.preparations.work(never)
        assert merger.preparations.share("main") == 1
    written = home.prepared("main", 2).read_bytes()
    with Store.open(home.registry) as store:
        again = Merger(home, store, quick(), Progress(Event(), lambda share: None))
        assert again.preparations.share("main") == 1
        again.close()
    assert home.prepared("main", 2).read_bytes() == written
    assert not list(home.tmp.iterdir())


SPOILS: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda data: data[:-1],
    "made elsewhere": lambda data: data.replace(b"torch ", b"Torch ", 1),
    "rotten": lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_file_that_is_not_what_was_finished_is_thrown_away(
    home: Home, base: Path, tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    with merging(home) as take:
        take(write(tmp_path, base, 2)).preparations.work(never)
    path = home.prepared("main", 1)
    path.write_bytes(spoil(path.read_bytes()))
    with Store.open(home.registry) as store:
        again = Merger(home, store, quick(), Progress(Event(), lambda share: None))
        assert again.preparations.share("main") == 0 and not path.exists()
        again.close()


def unreadable(path: Path, where: str) -> pytest.MonkeyPatch:
    """The disk fails under this file from here on: when it is opened, in its header, or when it is hashed."""
    patch, opened, preadv, hashed = pytest.MonkeyPatch(), os.open, os.preadv, preparing.entry
    failed = OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    def at_open(name: Any, *args: Any, **more: Any) -> int:
        if name == path:
            raise failed
        return opened(name, *args, **more)

    def at_reading(fd: int, *args: Any) -> int:
        if os.readlink(f"/proc/self/fd/{fd}") == str(path):
            raise failed
        return preadv(fd, *args)

    def at_hashing(name: Path, *args: Any, **more: Any) -> FileEntry:
        if name == path:
            raise failed
        return hashed(name, *args, **more)

    if where == "opened":
        patch.setattr(os, "open", at_open)
    elif where == "its header":
        patch.setattr(os, "preadv", at_reading)
    else:
        patch.setattr(preparing, "entry", at_hashing)
    return patch


@pytest.mark.parametrize("where", ["opened", "its header", "hashed"])
def test_a_file_that_cannot_be_read_is_made_anew(home: Home, base: Path, tmp_path: Path, where: str) -> None:
    with merging(home) as take:
        take(write(tmp_path, base, 2)).preparations.work(never)
    path = home.prepared("main", 1)
    before = path.read_bytes()
    with Store.open(home.registry) as store:
        patch = unreadable(path, where)
        try:
            again = Merger(home, store, quick(), Progress(Event(), lambda share: None))
        finally:
            patch.undo()
        assert again.preparations.share("main") == 0 and again.preparations.missing and not path.exists()
        again.preparations.work(never)
        assert again.preparations.share("main") == 1 and path.read_bytes() == before
        again.close()


def test_a_full_disk_ends_preparing_and_nothing_else(
    home: Home, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = durable.create

    def full(path: Path, size: int | None = None) -> int:
        if path.name.startswith("prepared"):
            raise OSError(28, "No space left on device")
        return create(path, size)

    monkeypatch.setattr(durable, "create", full)
    with merging(home) as take:
        merger = take(write(tmp_path, base, 2))
        merger.preparations.work(never)
        assert merger.preparations.share("main") == 0
        take(write(tmp_path, base, 3))
    assert live(home) == 2


def test_a_head_that_prepares_nothing_is_always_ready(base: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", base, [("main", "mean", {})])
    with merging(home) as take:
        merger = take(write(tmp_path, base, 2))
        assert merger.preparations.share("main") == 1
        merger.preparations.work(never)
    assert not home.prepared("main", 1).exists()


def test_the_daemon_prepares_while_idle_and_says_how_far_it_is(home: Home, base: Path, tmp_path: Path) -> None:
    service = Service(home, quick())
    thread = Thread(target=service.run, kwargs={"http": False})

    def ready() -> float:
        return count(service._metrics.registry, "mainstem_prepared_ratio", head="main")

    # signals can only be handled in the main thread: here the service is told to stop by its own event
    service._signals = lambda: ExitStack()  # type: ignore[method-assign, assignment]
    thread.start()
    try:
        put(home, write(tmp_path, base, 2))
        wait(lambda: live(home) == 1 and ready() == 1 and home.prepared("main", 1).exists())
        put(home, write(tmp_path, base, 3))
        wait(lambda: live(home) == 2 and home.prepared("main", 2).exists())
    finally:
        service._stopping.set()
        service._wake.set()
        thread.join(60)
    assert count(service._metrics.registry, "mainstem_memory_budget_bytes") > 0


def test_an_arrival_stops_the_preparation_at_the_next_tensor(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.safetensors", seed=1, hidden=32)
    home = make_home(tmp_path / "home", base, MAIN)
    asked: list[float] = []
    with merging(home) as take:
        merger = take(write(tmp_path, base, 2))

        def stop() -> bool:
            asked.append(merger.preparations.share("main"))
            return len(asked) > 3

        merger.preparations.work(stop)
        assert merger.preparations.share("main") < 1
        take(write(tmp_path, base, 3))
    assert live(home) == 2


def test_once_prepares_nothing(home: Home, base: Path, tmp_path: Path) -> None:
    put(home, write(tmp_path, base, 2))
    drain(home)
    assert not any("prepared" in name for name in tree(home.state))


def wait(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)


def test_how_far_it_is_costs_nothing_to_say(home: Home, base: Path, tmp_path: Path) -> None:
    """A scrape may come at any moment, and a model may have tens of thousands of tensors."""
    shares = []
    with merging(home) as take:
        preparations = take(write(tmp_path, base, 2)).preparations
        sizes = preparations._heads["main"]._bytes
        assert len(sizes) > 1
        cost = steps_of(lambda: preparations.share("main"))
        preparations.work(lambda: shares.append(preparations.share("main")) or False)  # type: ignore[func-returns-value]
        assert steps_of(lambda: preparations.share("main")) == cost < 6
    ready = [round(share * sum(sizes.values())) for share in dict.fromkeys([*shares, 1.0])]
    assert [after - before for before, after in pairwise(ready)] == list(sizes.values())


def test_a_state_that_is_cut_short_while_it_is_prepared_from_ends_the_daemon_with_a_hint(
    home: Home, base: Path, tmp_path: Path
) -> None:
    with merging(home) as take:
        preparations = take(write(tmp_path, base, 2)).preparations
        os.truncate(home.head_state("main", 1) / STATE_FILE, 100)
        with pytest.raises(BadHome, match="head's state is damaged") as ended:
            preparations.work(never)
    assert "mainstem verify" in ended.value.hint
    with lineage(home) as reader:
        assert any("state/heads/main/000001" in found for found in verify(home, reader, lambda _: None)[1])
