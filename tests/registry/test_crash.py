"""A commit is wholly there or not at all: for a reader beside it, and after a kill at any moment."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import NoReturn

import pytest
from sqlalchemy import event

from registry.errors import DiskFull
from registry.reader import Reader
from registry.store import Store
from tests.registry.samples import expert, make, versions

# Children are forked, and only use what this thread holds: other tests' threads (torch, a server) do not matter.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def forked(work: Callable[[], None]) -> int:
    """Runs `work` in a child and returns the child's id. The child never comes back into pytest."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def assert_sound(path: Path) -> int:
    """The live version, after a check that heads, versions and experts tell the same story."""
    with Store.open(path) as store:
        store.check()
        lineage = store.lineage()
        live = len(lineage)
        assert [merged.version for merged in lineage] == list(range(1, live + 1))
        for head in store.heads():
            assert (head.live, head.newest) == (live, live)
            found = store.versions(head.name, newest_first=False)
            assert [version.expert_id for version in found] == [None, *(merged.id for merged in lineage)]
        store.commit(expert(live + 1), versions(live + 1))  # and it goes on
    return live


def test_killed_before_each_statement_of_a_commit_it_is_as_if_it_never_began(tmp_path: Path) -> None:
    steps = 0
    for last in count(1):
        path = make(tmp_path / f"{last}.sqlite", merged=1)

        def work(path: Path = path, last: int = last) -> None:
            store = Store.open(path)
            passed = iter(range(1, last))

            def step(*_: object) -> None:
                if next(passed, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)

            event.listen(store._engine, "before_cursor_execute", step)
            event.listen(store._engine, "commit", step)
            store.commit(expert(2), versions(2))

        _, status = os.waitpid(forked(work), 0)
        if not os.WIFSIGNALED(status):
            break
        steps += 1
        assert assert_sound(path) == 1
    assert os.WEXITSTATUS(status) == 0
    assert assert_sound(path) == 2  # `work` left without closing anything
    assert steps >= 9  # BEGIN, two reads, two heads, an expert, two versions, COMMIT


def test_killed_at_a_random_moment_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    pauses = random.Random(seed)
    path = make(tmp_path / "registry.sqlite")
    live = 0
    for _ in range(8):
        read, write = os.pipe()

        def work(start: int = live + 1, write: int = write) -> None:
            with Store.open(path) as store:
                for number in count(start):
                    store.commit(expert(number), versions(number))
                    os.write(write, b"%d\n" % number)

        child = forked(work)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            said = pipe.readline()  # at work
            time.sleep(pauses.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            said += pipe.read()
        os.waitpid(child, 0)
        acknowledged = int(said.split()[-1])
        found = assert_sound(path)
        assert found - acknowledged in (0, 1)  # a commit may be done and not yet told
        live = found + 1  # `assert_sound` merged one more


def test_a_reader_sees_the_old_version_or_the_new_one_and_never_a_mix(tmp_path: Path) -> None:
    path = make(tmp_path / "registry.sqlite")
    stop = threading.Event()
    seen: list[set[int]] = [set(), set(), set()]
    wrong: list[object] = []

    def watch(numbers: set[int], reader: Reader) -> None:
        try:
            while not stop.is_set():
                main, init = reader.heads()
                if not main.live == main.newest == init.live == init.newest:
                    wrong.append((main, init))
                if numbers and main.live < max(numbers):
                    wrong.append(f"from {max(numbers)} back to {main.live}")
                version = reader.version("init", main.live)
                if version is None or version.totals != {"n": main.live} or len(reader.lineage()) < main.live:
                    wrong.append(version)
                numbers.add(main.live)
        except BaseException as error:
            wrong.append(error)

    with Store.open(path) as store, Reader.open(path) as reader:
        threads = [threading.Thread(target=watch, args=(numbers, reader)) for numbers in seen]
        for thread in threads:
            thread.start()
        for number in range(1, 61):
            store.commit(expert(number), versions(number))
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert all(len(numbers) > 3 for numbers in seen)


def test_a_reader_in_another_process_follows_the_writer(tmp_path: Path) -> None:
    path = make(tmp_path / "registry.sqlite")

    def follow() -> NoReturn:
        with Reader.open(path) as reader:
            while reader.heads()[1].live < 5:
                time.sleep(0.002)
            os._exit(5 if len(reader.lineage()) == 5 else 1)

    with Store.open(path) as store:
        for number in range(1, 5):
            store.commit(expert(number), versions(number))
    child = forked(follow)
    with Store.open(path) as store:
        store.commit(expert(5), versions(5))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5


def test_without_room_nothing_changes_and_with_room_it_goes_on(tmp_path: Path) -> None:
    with Store.open(make(tmp_path / "registry.sqlite")) as store:
        with store._engine.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        before = store.heads(), store.experts()
        with pytest.raises(DiskFull):
            store.commit(expert(1, detail="x" * 100_000), versions(1))
        assert (store.heads(), store.experts()) == before
        with store._engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
        store.commit(expert(1), versions(1))
