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
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from registry import migrations
from registry.engine import APPLICATION_ID, connect, reading, writing
from registry.errors import NotOurs, RegistryError, WrongRevision
from registry.reader import Reader
from registry.store import Store
from registry.tables import Base
from tests.registry.samples import expert, make, versions

NEXT = '''
"""A layout of the future."""

from alembic import op

revision = "9999"
down_revision = "{newest}"


def upgrade():
    op.execute("ALTER TABLE heads ADD COLUMN note TEXT")
    op.execute("UPDATE heads SET note = 'was ' || name")
    {more}
'''


FIRST_ROWS = f"""
PRAGMA application_id = {APPLICATION_ID};
INSERT INTO home (id, name, sha256, parameters, size_bytes, created_at)
    VALUES (1, 'encoder', 'ab', 10, 40, '2026-03-01 12:30:15.123456');
INSERT INTO heads (name, position, method, params, live, newest)
    VALUES ('main', 0, 'opcm', '{{}}', 1, 1), ('init', 1, 'ema', '{{}}', 1, 1);
INSERT INTO experts (id, name, kind, sha256, size_bytes, status, received_at, entry, norm, version, finished_at, place)
    VALUES (1, 'one', 'file', 'cd', 40, 'merged', '2026-03-01 12:30:15.123456', '1:2:3', 1.5, 1,
            '2026-03-01 12:30:16.123456', 'archive/000001');
INSERT INTO versions (head, number, parent, manifest_sha256, size_bytes, totals, figures, expert_id, created_at,
                      collected)
    VALUES ('main', 0, NULL, 'e0', 40, '{{}}', '{{}}', NULL, '2026-03-01 12:30:14.123456', 0),
           ('init', 0, NULL, 'e0', 40, '{{}}', '{{}}', NULL, '2026-03-01 12:30:14.123456', 0),
           ('main', 1, 0, 'e1', 40, '{{}}', '{{}}', 1, '2026-03-01 12:30:16.123456', 0),
           ('init', 1, 0, 'e1', 40, '{{}}', '{{}}', 1, '2026-03-01 12:30:16.123456', 0);
"""


def newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str = "") -> None:
    """From here on this mainstem has one migration more, 9999."""
    scripts = tmp_path / "scripts of 100%"
    shutil.copytree(migrations.SCRIPTS, scripts, ignore=shutil.ignore_patterns("__pycache__"))
    (scripts / "versions" / "r9999_next.py").write_text(NEXT.format(newest=migrations.newest(), more=more))
    monkeypatch.setattr(migrations, "SCRIPTS", scripts)


def layout(path: Path) -> dict[str, str]:
    with closing(sqlite3.connect(path)) as raw:
        rows = raw.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    plain = {name: re.sub(r"\s+", " ", sql).strip() for name, sql in rows if name != "alembic_version"}
    # a table that was renamed into its place is quoted
    return {name: re.sub(r'^CREATE TABLE "(\w+)"', r"CREATE TABLE \1", sql) for name, sql in plain.items()}


@pytest.mark.filterwarnings("ignore:.*expression-based index")  # `layout` compares those
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


def test_the_names_of_the_migrations_tell_their_revisions() -> None:
    scripts = ScriptDirectory(str(migrations.SCRIPTS))
    assert migrations.newest() == scripts.get_current_head()
    assert migrations._revisions() == {script.revision for script in scripts.walk_revisions()}


def test_an_older_registry_is_backed_up_and_upgraded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "registry.sqlite", merged=2)
    backup = tmp_path / "registry.sqlite.before-9999"
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


def test_a_registry_of_the_first_layout_is_upgraded_with_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = first_layout(tmp_path / "registry.sqlite", monkeypatch)
    with Store.open(path) as store:
        (old,) = store.lineage()
        assert (old.id, old.name, old.norm, old.place) == (1, "one", 1.5, "archive/000001")
        assert (old.about, old.sidecars, old.withdrawn_in, old.naming, old.flags) == (None, None, None, None, ())
        about, sidecars = {"task": "legal German", "weight": 2.5}, {"fisher": "cd" * 32}
        naming = {"prefixes": {"module.": ""}, "ignore": ["head.*"]}
        merged = store.commit(expert(2, about=about, sidecars=sidecars, naming=naming), versions(2))
        assert (merged.about, merged.sidecars, merged.naming) == (about, sidecars, naming)
        store.check()
    make(tmp_path / "new.sqlite")
    assert layout(path) == layout(tmp_path / "new.sqlite")


def first_layout(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry as the first mainstem left it, with one merged expert: its columns are named here, one by one."""
    scripts = path.with_name("first")
    shutil.copytree(migrations.SCRIPTS, scripts, ignore=shutil.ignore_patterns("__pycache__"))
    for script in (scripts / "versions").glob("r*.py"):
        if not script.name.startswith("r0001"):
            script.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "SCRIPTS", scripts)
        engine = writing(path, create=True)
        migrations.upgrade(engine)
        engine.dispose()
    with closing(sqlite3.connect(path)) as raw:
        raw.executescript(FIRST_ROWS)
    return path


def test_the_backup_of_an_upgrade_that_was_cut_short_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "registry.sqlite", merged=1)
    first = migrations.back_up(path, "9999")
    with Store.open(path) as store:
        store.commit(expert(2), versions(2))
        assert migrations.back_up(path, "9999") == first  # while the newest commit is only in the log
    with Reader.open(first) as copy:
        assert len(copy.lineage()) == 2


def test_the_backup_and_its_folder_are_synced(tmp_path: Path) -> None:
    """By SQLite itself: its system calls are watched."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    path = make(tmp_path / "registry.sqlite")
    code = f"from pathlib import Path; from registry import migrations; migrations.back_up(Path({str(path)!r}), '9999')"
    command = ["strace", "-f", "-y", "-e", "trace=fsync,fdatasync", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    if "ptrace" in done.stderr and done.returncode:
        pytest.skip("this machine does not permit ptrace")
    assert done.returncode == 0, done.stderr
    synced = set(re.findall(r"sync\(\d+<([^>]+)>\) += 0", done.stderr))
    assert {str(path.with_name("registry.sqlite.before-9999")), str(tmp_path)} <= synced


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
    assert not (tmp_path / "registry.sqlite.before-9999").exists()


@pytest.mark.parametrize("kind", [Reader, Store])
def test_a_registry_of_a_newer_mainstem_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Reader]
) -> None:
    with monkeypatch.context() as patch:
        newer(tmp_path, patch)
        path = make(tmp_path / "registry.sqlite")
    content = path.read_bytes()
    with pytest.raises(WrongRevision, match=f"its layout is 9999, this mainstem knows up to {migrations.newest()}"):
        kind.open(path)
    assert path.read_bytes() == content


def test_a_file_in_the_place_of_the_backup_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "registry.sqlite")
    (tmp_path / "registry.sqlite.before-9999").write_text("something else entirely")
    newer(tmp_path, monkeypatch)
    with pytest.raises(NotOurs, match="before-9999"):
        Store.open(path)
    assert (tmp_path / "registry.sqlite.before-9999").read_text() == "something else entirely"


def test_alembic_leaves_the_logging_alone(tmp_path: Path) -> None:
    root = logging.getLogger()
    mine = logging.getLogger("mainstem.before")
    before = root.level, list(root.handlers)
    make(tmp_path / "registry.sqlite")
    assert (root.level, list(root.handlers)) == before
    assert not mine.disabled
