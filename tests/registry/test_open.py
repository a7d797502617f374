"""Opening: what is refused, and under what conditions a reader gets in."""

import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from registry import migrations
from registry.engine import _stamp, connect, translated
from registry.errors import Busy, Damaged, Missing, NoAccess, NotOurs, RegistryError
from registry.reader import Reader
from registry.records import Status
from registry.store import Store
from tests.nobody import as_nobody
from tests.registry.samples import BASE, HEADS, digest, expert, make, versions

# Children are forked, and only use what this thread holds: other tests' threads (torch, a server) do not matter.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

CLOSED = "this source tree is closed to other users"
both = pytest.mark.parametrize("kind", [Reader, Store])


@both
def test_nothing_there(tmp_path: Path, kind: type[Reader]) -> None:
    with pytest.raises(Missing) as caught:
        kind.open(tmp_path / "registry.sqlite")
    assert "mainstem init" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@both
@pytest.mark.parametrize("content", [b"", b"garbage" * 1000, b"SQLite format 3\0", b"SQLite format 3\0" + bytes(5000)])
def test_garbage_is_refused_and_left_alone(tmp_path: Path, kind: type[Reader], content: bytes) -> None:
    path = tmp_path / "registry.sqlite"
    path.write_bytes(content)
    with pytest.raises((NotOurs, Damaged)):
        kind.open(path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@both
def test_a_folder_is_refused(tmp_path: Path, kind: type[Reader]) -> None:
    with pytest.raises(NotOurs):
        kind.open(tmp_path)


@both
def test_a_database_of_somebody_else_is_refused_and_left_alone(tmp_path: Path, kind: type[Reader]) -> None:
    path = tmp_path / "registry.sqlite"
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE heads (name TEXT)")
    content = path.read_bytes()
    with pytest.raises(NotOurs, match="not a registry of mainstem"):
        kind.open(path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@both
def test_a_registry_whose_making_was_cut_short_is_refused(
    tmp_path: Path, kind: type[Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    path = tmp_path / "registry.sqlite"
    with monkeypatch.context() as patch, pytest.raises(RegistryError):
        patch.setattr("registry.store.insert_versions", fail)
        Store.create(path, BASE, HEADS, versions(0))
    with pytest.raises(NotOurs):
        kind.open(path)


def questions(reader: Reader) -> list[Callable[[], object]]:
    """Everything that a reader is ever asked."""
    return [
        reader.base,
        reader.heads,
        lambda: reader.head("main"),
        lambda: reader.version("main", 2),
        lambda: reader.versions("main"),
        lambda: reader.versions("main", include_collected=False),
        lambda: reader.expert(2),
        reader.experts,
        lambda: reader.experts(Status.MERGED, before=3),
        lambda: reader.find_experts(digest(2)),
        lambda: reader.find_experts("expert-2.safetensors"),
        lambda: reader.merged(digest(2)),
        reader.lineage,
        lambda: reader.unneeded(reader.heads()[0], 3),
        reader.unplaced,
        reader.counts,
        reader.merged_norms,
    ]


def pages(path: Path) -> tuple[int, dict[str, int]]:
    """The size of a page, and the first page of every table and index."""
    with closing(connect(path, "ro")) as raw:
        (size,) = raw.execute("PRAGMA page_size").fetchone()
        rows = raw.execute("SELECT name, rootpage FROM sqlite_master WHERE rootpage > 0").fetchall()
    return size, dict(rows)


@pytest.mark.parametrize("damage", [b"\xff" * 200, bytes(200), b"\x0d\x00\x00\x00\x01" + b"\x7f" * 195])
def test_a_damaged_page_is_named_by_the_question_that_needs_it_and_by_check(tmp_path: Path, damage: bytes) -> None:
    path = make(tmp_path / "registry.sqlite", merged=3)
    sound = path.read_bytes()
    with Reader.open(path) as reader:
        answers = [ask() for ask in questions(reader)]
    size, found = pages(path)
    assert {"experts", "versions", "heads", "home", "experts_lineage", "versions_kept", "tallies"} <= set(found)
    met = set()
    for name, page in found.items():
        start = (page - 1) * size
        path.write_bytes(sound[:start] + damage + sound[start + len(damage) :])
        try:
            with Reader.open(path) as reader:
                for ask, answer in zip(questions(reader), answers, strict=True):
                    try:
                        assert ask() == answer or damage[:1] != b"\xff", f"{name} is damaged, and nobody was told"
                    except Damaged:
                        met.add(name)
                with pytest.raises(RegistryError):
                    reader.check()
        except (Damaged, NotOurs):
            met.add(name)
    assert {"experts", "versions", "heads", "experts_lineage", "versions_kept"} <= met


def test_a_damaged_value_is_damage_too(tmp_path: Path) -> None:
    """SQLite keeps no checksums: a flipped bit in a row is for us to see."""
    path = make(tmp_path / "registry.sqlite", merged=1)
    broken = {
        "totals = '{'": lambda reader: reader.versions("main"),
        "created_at = 'never'": lambda reader: reader.version("main", 1),
        "figures = CAST(x'ff' AS TEXT)": lambda reader: reader.versions("main"),
    }
    for change, ask in broken.items():
        copy = path.with_name(f"{len(change)}.sqlite")
        copy.write_bytes(path.read_bytes())
        with closing(connect(copy, "rw")) as raw:
            raw.execute(f"UPDATE versions SET {change}")
        with Reader.open(copy) as reader, pytest.raises(Damaged) as caught:
            ask(reader)
        assert "backup" in caught.value.hint


def test_an_older_registry_that_is_damaged_is_not_upgraded(tmp_path: Path) -> None:
    path = make(tmp_path / "registry.sqlite", merged=3)
    with closing(connect(path, "rw")) as raw:
        raw.execute("UPDATE alembic_version SET version_num = '0004'")
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    size, found = pages(path)
    content = bytearray(path.read_bytes())
    content[(found["versions"] - 1) * size : (found["versions"] - 1) * size + 200] = b"\xff" * 200
    path.write_bytes(content)
    with pytest.raises(Damaged) as caught:
        Store.open(path)
    assert "backup" in caught.value.hint and path.read_bytes() == content


@both
def test_a_truncated_registry_is_refused(tmp_path: Path, kind: type[Reader]) -> None:
    path = make(tmp_path / "registry.sqlite")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(RegistryError):
        kind.open(path)


def test_a_lost_base_is_named(tmp_path: Path) -> None:
    path = make(tmp_path / "registry.sqlite")
    with closing(connect(path, "rw")) as raw:
        raw.execute("DELETE FROM home")
    with Reader.open(path) as reader, pytest.raises(Damaged):
        reader.base()


@pytest.mark.parametrize("folder", ["a b", "50% off?", "x#y&mode=rwc", "ü\u2028", os.fsdecode(b"\xff\xfe")])
def test_any_path_will_do(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    path = make(tmp_path / folder / "registry.sqlite", merged=1)
    with Reader.open(path) as reader:
        assert len(reader.lineage()) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == [folder]


def test_every_connection_of_the_writer_is_durable(tmp_path: Path) -> None:
    with Store.open(make(tmp_path / "registry.sqlite")) as store, store._engine.connect() as connection:
        settings = ["journal_mode", "synchronous", "foreign_keys", "busy_timeout"]
        found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in settings]
    assert found == ["wal", 2, 1, 5000]


def test_a_reader_cannot_write(tmp_path: Path) -> None:
    path = make(tmp_path / "registry.sqlite")
    with Reader.open(path) as reader, pytest.raises(NoAccess), translated(path), reader._engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM versions")


def test_a_reader_gets_in_beside_a_writer_and_without_one(tmp_path: Path) -> None:
    path = make(tmp_path / "registry.sqlite")
    with Reader.open(path) as before:
        with Store.open(path) as store:
            store.commit(expert(1), versions(1))
            with Reader.open(path) as beside:
                assert before.heads() == beside.heads() == store.heads()
        assert before.heads()[0].live == 1
    with Reader.open(path) as after:
        assert after.heads()[0].live == 1


def test_a_second_writer_is_told_to_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.engine.BUSY_TIMEOUT_S", 0.05)
    path = make(tmp_path / "registry.sqlite")
    with Store.open(path) as first, first._write():
        with pytest.raises(Busy):
            Store.open(path)
        with Reader.open(path) as reader:
            assert reader.heads() == HEADS


@pytest.fixture
def sealed() -> Iterator[Path]:
    """A cleanly closed registry that everybody may read, in a folder where only root may write."""
    with tempfile.TemporaryDirectory() as folder:
        path = make(Path(folder) / "registry.sqlite")
        path.chmod(0o444)
        Path(folder).chmod(0o555)
        yield path
        Path(folder).chmod(0o755)


def opened_by_nobody(path: Path, kind: type[Reader]) -> str:
    """What an unprivileged process gets when it opens `path`."""

    def ask() -> str:
        if not os.access(migrations.SCRIPTS, os.R_OK | os.X_OK):
            return CLOSED
        try:
            with kind.open(path) as opened:
                return f"live {opened.heads()[0].live}"
        except RegistryError as error:
            return f"{type(error).__name__}: {error.hint}"

    said = as_nobody(ask)
    if said == CLOSED:
        pytest.skip(CLOSED)
    return said


def test_a_folder_that_cannot_be_written_can_be_read_and_gives_a_writer_a_hint(sealed: Path) -> None:
    assert opened_by_nobody(sealed, Reader) == "live 0"
    said = opened_by_nobody(sealed, Store)
    assert said.startswith("NoAccess:")
    assert "must be writable" in said
    assert list(sealed.parent.iterdir()) == [sealed]


def test_where_a_killed_writer_left_a_log_nothing_older_is_read(sealed: Path) -> None:
    sealed.parent.chmod(0o755)
    sealed.chmod(0o644)
    if os.fork() == 0:
        store = Store.open(sealed)
        store.commit(expert(1), versions(1))
        os._exit(0)
    os.wait()
    assert sealed.with_name("registry.sqlite-wal").stat().st_size
    sealed.parent.chmod(0o555)
    assert opened_by_nobody(sealed, Reader) == "live 1"
    sealed.parent.chmod(0o755)
    sealed.with_name("registry.sqlite-shm").unlink()
    sealed.parent.chmod(0o555)
    assert opened_by_nobody(sealed, Reader).startswith("NoAccess:")
    sealed.parent.chmod(0o755)  # as the hint says
    Store.open(sealed).close()
    sealed.parent.chmod(0o555)
    assert opened_by_nobody(sealed, Reader) == "live 1"


def test_what_is_read_as_unchanging_is_read_anew_once_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "registry.sqlite")
    monkeypatch.setattr("registry.engine._out_of_reach", lambda _, path: _stamp(path))
    with Reader.open(path) as reader:
        assert reader.heads()[0].live == 0
        with Store.open(path) as store:
            store.commit(expert(1), versions(1))
        assert reader.heads()[0].live == 1


def test_beside_a_running_writer_such_a_folder_can_be_read(sealed: Path) -> None:
    sealed.parent.chmod(0o755)
    sealed.chmod(0o644)
    with Store.open(sealed) as store:
        store.commit(expert(1), versions(1))
        sealed.parent.chmod(0o555)
        assert opened_by_nobody(sealed, Reader) == "live 1"


def test_a_folder_that_cannot_be_entered_gives_a_hint(sealed: Path) -> None:
    sealed.parent.chmod(0o700 if os.geteuid() == 0 else 0o000)
    assert opened_by_nobody(sealed, Reader).startswith("NoAccess:")
