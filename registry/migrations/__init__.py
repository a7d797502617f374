"""Brings a registry to the layout of `registry.tables`, by alembic and inside the daemon: there is no alembic.ini.

A new layout is one more file in `versions/`, r<revision>_<what>.py: which revisions there are is told by the names, and
alembic imported only where there is something to do. All steps of an upgrade run in ONE transaction, so a crash leaves
the old layout or the new one.
"""

import sqlite3
from contextlib import closing
from pathlib import Path

from sqlalchemy import Engine

from registry.engine import REBUILD_HINT, connect, translated
from registry.errors import Damaged, WrongRevision

SCRIPTS = Path(__file__).parent


def newest() -> str:
    """The revision that this mainstem writes."""
    return max(_revisions())


def _revisions() -> set[str]:
    """Every revision that this mainstem knows."""
    found = {path.name[1:5] for path in (SCRIPTS / "versions").glob("r[0-9][0-9][0-9][0-9]_*.py")}
    assert found, "a wheel without registry/migrations/versions"
    return found


def refuse_unknown(path: Path, revision: str) -> None:
    """Raises WrongRevision when no migration here leads to or from `revision`: a newer mainstem made it."""
    if revision not in _revisions():
        raise WrongRevision(
            f"{path}: its layout is {revision}, this mainstem knows up to {newest()}",
            "use the mainstem that wrote it, or a newer one",
        )


def upgrade(engine: Engine) -> None:
    """Runs what is missing up to `newest`, in one transaction. `engine` is the writer's.

    References are checked at the end, as a whole: a table that is made anew goes for a moment, and SQLite would take
    that for the loss of every row in it. Raises Damaged where one then points to nothing.
    """
    # imported here: it takes longer than all that a command line needs
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
    _check_references(engine, False)
    with engine.execution_options(write=True).begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        if lost := connection.exec_driver_sql("PRAGMA foreign_key_check").all():
            raise Damaged(f"rows that point to nothing after the upgrade: {lost[:5]}", REBUILD_HINT)
    _check_references(engine, True)


def _check_references(engine: Engine, wanted: bool) -> None:
    """Of the writer's one connection, and outside of a transaction: inside of one the PRAGMA does nothing."""
    with closing(engine.raw_connection()) as raw:
        raw.cursor().execute(f"PRAGMA foreign_keys = {'ON' if wanted else 'OFF'}")


def back_up(path: Path, revision: str) -> Path:
    """Copies the registry, before its upgrade to `revision`, to `<name>.before-<revision>` beside it.

    A copy left by an upgrade that was cut short is replaced. Raises RegistryError.
    """
    copy = path.with_name(f"{path.name}.before-{revision}")
    # Not `connect`: a copy that nobody opens again should be one file, without a write-ahead log. SQLite syncs it, and
    # its folder with the journal, by its own default (synchronous = FULL).
    with translated(copy), closing(connect(path, "ro")) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
        target.execute("PRAGMA journal_mode = DELETE")
    return copy
