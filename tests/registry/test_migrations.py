"""Upgrades: the layout is that of the tables, older databases are backed up first, newer ones are refused."""

import logging
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

from registry import migrations
from registry.engine import connect, reading
from registry.errors import NotOurs, RegistryError, WrongRevision
from registry.store import Reader, Store
from registry.tables import Base
from tests.registry.samples import expert, make, versions

NEXT = '''
"""A layout of the future."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade():
    op.execute("ALTER TABLE heads ADD COLUMN note TEXT")
    op.execute("UPDATE heads SET note = 'was ' || name")
    {more}
'''


def newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str = "") -> None:
    """From here on this mainstem has one migration more, 0002."""
    scripts = tmp_path / "scripts of 100%"
    shutil.copytree(migrations.SCRIPTS, scripts, ignore=shutil.ignore_patterns("__pycache__"))
    (scripts / "versions" / "r0002_next.py").write_text(NEXT.format(more=more))
    monkeypatch.setattr(migrations, "SCRIPTS", scripts)


def layout(path: Path) -> dict[str, str]:
    with closing(sqlite3.connect(path)) as raw:
        rows = raw.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    return {name: re.sub(r"\s+", " ", sql).strip() for name, sql in rows if name != "alembic_version"}


def test_the_migrations_build_exactly_the_tables(tmp_path: Path) -> None:
    path = make(tmp_path / "registry.sqlite")
    engine = reading(path)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    engine.dispose()

    # alembic compares no CHECK and no partial index, the statements tell those too
    declared = create_engine(f"sqlite:///{tmp_path / 'declared.sqlite'}")
    Base.metadata.create_all(declared)
    declared.dispose()
    assert layout(path) == layout(tmp_path / "declared.sqlite")


def test_an_older_registry_is_backed_up_and_upgraded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "registry.sqlite", merged=2)
    backup = tmp_path / "registry.sqlite.before-0002"
    newer(tmp_path, monkeypatch)
    with Store.open(path) as store:
        assert len(store.lineage()) == 2
        store.commit(expert(3), versions(3))
    assert {entry.name for entry in tmp_path.iterdir() if entry.is_file()} == {path.name, backup.name}
    with closing(connect(path, "ro")) as raw:
        assert raw.execute("SELECT note FROM heads ORDER BY position").fetchall() == [("was main",), ("was init",)]

    made = backup.stat().st_mtime_ns
    with Store.open(path):
        assert backup.stat().st_mtime_ns == made  # nothing to upgrade, nothing to back up
    monkeypatch.undo()
    with Reader.open(backup) as old:
        assert [head.live for head in old.heads()] == [2, 2]
        old.check()


def test_the_backup_of_an_upgrade_that_was_cut_short_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "registry.sqlite", merged=1)
    first = migrations.back_up(path, "0002")
    with Store.open(path) as store:
        store.commit(expert(2), versions(2))
        assert migrations.back_up(path, "0002") == first  # while the newest commit is only in the log
    with Reader.open(first) as copy:
        assert len(copy.lineage()) == 2


def test_the_backup_and_its_folder_are_synced(tmp_path: Path) -> None:
    """By SQLite itself: its system calls are watched."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    path = make(tmp_path / "registry.sqlite")
    code = f"from pathlib import Path; from registry import migrations; migrations.back_up(Path({str(path)!r}), '0002')"
    command = ["strace", "-f", "-y", "-e", "trace=fsync,fdatasync", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    if "ptrace" in done.stderr and done.returncode:
        pytest.skip("this machine does not permit ptrace")
    assert done.returncode == 0, done.stderr
    synced = set(re.findall(r"sync\(\d+<([^>]+)>\) += 0", done.stderr))
    assert {str(path.with_name("registry.sqlite.before-0002")), str(tmp_path)} <= synced


def test_a_failed_upgrade_leaves_the_old_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "registry.sqlite", merged=1)
    before = layout(path)
    with monkeypatch.context() as patch:
        newer(tmp_path, patch, more='op.execute("INSERT INTO heads (name) VALUES (NULL)")')
        with pytest.raises(RegistryError):
            Store.open(path)
    assert layout(path) == before
    with Store.open(path) as store:
        store.commit(expert(2), versions(2))


def test_a_reader_asks_for_the_upgrade_and_does_not_do_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "registry.sqlite")
    newer(tmp_path, monkeypatch)
    with pytest.raises(WrongRevision) as caught:
        Reader.open(path)
    assert "mainstem run" in caught.value.hint
    assert not (tmp_path / "registry.sqlite.before-0002").exists()


@pytest.mark.parametrize("kind", [Reader, Store])
def test_a_registry_of_a_newer_mainstem_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Reader]
) -> None:
    with monkeypatch.context() as patch:
        newer(tmp_path, patch)
        path = make(tmp_path / "registry.sqlite")
    content = path.read_bytes()
    with pytest.raises(WrongRevision, match=r"its layout is 0002, this mainstem knows up to 0001"):
        kind.open(path)
    assert path.read_bytes() == content


def test_a_file_in_the_place_of_the_backup_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "registry.sqlite")
    (tmp_path / "registry.sqlite.before-0002").write_text("something else entirely")
    newer(tmp_path, monkeypatch)
    with pytest.raises(NotOurs, match="before-0002"):
        Store.open(path)
    assert (tmp_path / "registry.sqlite.before-0002").read_text() == "something else entirely"


def test_alembic_leaves_the_logging_alone(tmp_path: Path) -> None:
    root = logging.getLogger()
    mine = logging.getLogger("mainstem.before")
    before = root.level, list(root.handlers)
    make(tmp_path / "registry.sqlite")
    assert (root.level, list(root.handlers)) == before
    assert not mine.disabled
