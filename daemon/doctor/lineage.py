"""The registry, the settings, and what a home itself says is wrong."""

from collections.abc import Iterator
from pathlib import Path

from daemon.checkpoints.checkpoint import open_path
from daemon.config import Settings, load, strangers
from daemon.doctor.finding import Finding, bad, ok, warn
from daemon.errors import BadConfig, DaemonError
from daemon.home.condition import condition
from daemon.home.ground import States
from daemon.home.named_heads import check_heads
from daemon.layout import Home
from daemon.rebuild.replay import methods_of
from daemon.versions.heads import head_tips
from projector.errors import ProjectorError
from projector.text import listed
from registry.errors import RegistryError
from registry.reader import Reader

TRIES = 3  # to read a state that a daemon replaces meanwhile
MILD = ("no_daemon", "uploads")  # troubles that hinder nobody from starting it


def settings_of(path: Path | None) -> tuple[Settings | None, Finding]:
    """The settings in force, None where they cannot be read, and what is to be said of them."""
    try:
        settings = load(path)
    except BadConfig as error:
        return None, bad("settings", str(error), error.hint)
    if unknown := strangers():
        return settings, warn("settings", f"in the environment, but no setting: {listed(unknown)}", "unset them")
    return settings, ok("settings", "as `mainstem config show` has them")


def opened(home: Home) -> tuple[Reader | None, Finding]:
    """The registry, None where it cannot be read, and whether it is sound."""
    try:
        reader = Reader.open(home.registry)
    except RegistryError as error:
        return None, bad("registry", str(error), error.hint)
    try:
        reader.check()
    except RegistryError as error:
        return reader, bad("registry", str(error), error.hint)
    return reader, ok("registry", f"sound, {home.registry.stat().st_size >> 10} KiB")


def check(home: Home, reader: Reader, settings: Settings | None) -> Iterator[Finding]:
    """What the home itself says."""
    if settings:
        try:
            if found := check_heads(settings, [head.name for head in reader.heads()]):
                yield warn("heads", *found)
        except BadConfig as error:
            yield bad("heads", str(error), error.hint)
    now = condition(home, reader)
    yield ok("daemon", now.text)
    for trouble in now.troubles:
        if trouble.reason != "no_daemon":
            level = warn if trouble.reason in MILD else bad
            yield level(trouble.reason, trouble.text, trouble.hint)
    yield from _states(home, reader)


def _states(home: Home, reader: Reader) -> Iterator[Finding]:
    """Whether every head can go on from what it has merged, as far as the headers of its state tell: not where an
    earlier release merged by another rule. Nothing where the base cannot be read, which is said elsewhere.
    """
    try:
        with open_path(home.base) as base:
            schema = base.tensors.schema
    except (DaemonError, ProjectorError):
        return
    found = ok("states", "every head can go on from its own")
    for _ in range(TRIES):
        before = [head.newest for head in reader.heads()]
        try:
            States(home).check(head_tips(reader, methods_of(reader)), schema)
        except (DaemonError, ProjectorError) as error:
            if before != [head.newest for head in reader.heads()]:
                continue
            found = bad("states", str(error), error.hint)
        break
    yield found
