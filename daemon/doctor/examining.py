"""All that is looked at, in order: for a home, or for a folder in which one is to be made."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from daemon.checkpoints.checkpoint import open_path
from daemon.config import Settings
from daemon.doctor import clocks, computing, disks, limits, lineage, owners
from daemon.doctor.finding import Finding, bad, ok
from daemon.errors import DaemonError
from daemon.home.presence import running
from daemon.home.presets import DEFAULT_METHOD
from daemon.layout import Home
from daemon.reports.sizing import Sizing, of_home, sizing
from projector.errors import ProjectorError
from projector.methods import make
from projector.text import size
from registry.errors import RegistryError
from registry.reader import Reader


def examine(folder: Path, base: Path | None = None) -> Iterator[Finding]:
    """Everything about the home in this folder, or about the folder where it is none.

    base: the model that a home is to be made with, for what its arrivals would take. Raises nothing but a fault.
    """
    home = Home(folder) if Home(folder).exists() else None
    settings, finding = lineage.settings_of(home.config if home else None)
    yield finding
    with ExitStack() as closing:
        reader = None
        if home:
            reader, finding = lineage.opened(home)
            yield finding
            if reader:
                closing.enter_context(reader)
                yield from _guarded("home", lineage.check(home, reader, settings))
        need, base_bytes, said = _sizing(home, reader, base, settings or Settings())
        if said:
            yield said
        yield from _guarded("disk", disks.check(folder, home, need, base_bytes))
        yield from _guarded("permissions", owners.check(folder, home, settings))
        daemon = running(home) if home else None
        watch = settings.inbox.watch if settings else "auto"
        yield from _guarded("limits", limits.check(daemon.pid if daemon else 0, home.inbox if home else None, watch))
        yield from _guarded("clock", clocks.check(reader))
        yield from _guarded("compute", computing.check(settings or Settings(), need))


def _sizing(
    home: Home | None, reader: Reader | None, base: Path | None, settings: Settings
) -> tuple[Sizing | None, int, Finding | None]:
    """What arrivals take, how large the base is, and what to say of both; None where nobody knows."""
    try:
        if home and reader:
            found, base_bytes = of_home(home, reader, settings), reader.base().size_bytes
        elif base and not base.exists():
            return None, 0, bad("base", f"{base} does not exist", "give --base a .safetensors file or a folder")
        elif base:
            with open_path(base) as checkpoint:
                found, base_bytes = sizing(checkpoint, 0, [make(DEFAULT_METHOD, {})], settings), checkpoint.size_bytes
        else:
            return None, 0, None
    except (DaemonError, ProjectorError, RegistryError) as error:
        return None, 0, bad("base", str(error), error.hint)
    except (OSError, ValueError) as error:
        return None, 0, bad("base", f"it cannot be looked at: {error}", "`mainstem verify` says what is damaged")
    by = "" if home else f" by {DEFAULT_METHOD}"
    text = f"{size(base_bytes)}; an arrival{by} reads {size(found.read_bytes)}, writes {size(found.arrival_bytes)}"
    return found, base_bytes, ok("sizing", f"{text} and takes about {max(1, round(found.seconds))} s")


def _guarded(check: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """What the disk does not let us see is a finding, too."""
    try:
        yield from findings
    except (OSError, RegistryError) as error:
        yield bad(check, f"it cannot be looked at: {error}", "run this as the user that the daemon runs as")
