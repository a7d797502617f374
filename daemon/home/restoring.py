"""How a person puts back what was edited or lost of a published version."""

from collections.abc import Callable, Sequence
from shlex import quote

from daemon.layout import Home
from daemon.manifest import Manifest
from daemon.notation import called
from daemon.versions.checking import entry, names_below
from daemon.versions.retention import needs_state
from registry.reader import Reader
from registry.records import Status, Version


def restoring(
    home: Home,
    reader: Reader,
    version: Version,
    problems: Sequence[str],
    read: Callable[[int], object] = lambda _: None,
) -> str:
    """The hint for what `checking.problems` found: the very commands for files of version 0 that state/base has too,
    where those are sound; else where a copy may be had. `read` hears of the bytes that are hashed.
    """
    folder = home.version(version.head, version.number)
    extra = [problem for problem in problems if problem.endswith(": not in the manifest")]
    commands, copied = [], set[str]()
    for name in names_below(home.base) if version.number == 0 else []:
        path = folder / name
        told = [problem for problem in problems if problem.startswith(f"{path.relative_to(home.root)}: ")]
        if told and told[0] not in extra and _is_copy(home, version, name, read):
            commands.append(f"`cp {quote(str(home.base / name))} {quote(str(path))}`")
            copied.update(told)
    if extra:
        commands.append("remove what is not in the manifest")
    state = home.head_state(version.head, version.number).relative_to(home.root)
    spare = [] if _needs_state(home, reader, version) else [one for one in problems if one.startswith(f"{state}/")]
    if spare:
        commands.append(f"remove {state}, without which only taking experts out is slower")
    if len(problems) > len(copied) + len(extra) + len(spare):
        commands.append(
            f"put {'the others' if commands else 'them'} back from a backup, or from what `mainstem pull` made of "
            f"{called(version.head, version.number)}; {_remade(home, reader, version)}"
        )
    return "; ".join(commands)


def _needs_state(home: Home, reader: Reader, version: Version) -> bool:
    head = reader.head(version.head)
    return head is not None and needs_state(home, head, version.number)


def _remade(home: Home, reader: Reader, version: Version) -> str:
    """Whether merging the archive again makes the version once more, and how. A new home keeps the newest ones only."""
    before = [one.version for one in reader.lineage(limit=version.number)]
    if before != list(range(1, version.number + 1)):
        return "no rebuild makes it again, for experts were taken out since: one that nobody asks for goes by retention"
    kept = reader.counts()[Status.MERGED] - version.number + 1
    setting = f"MAINSTEM_RETENTION__VERSIONS={kept} " if kept > 1 else ""
    command = f"`{setting}{again(home)}`"
    return f"weights and state also from {command}, which makes the same ones in the same place (docs/operating.md)"


def again(home: Home) -> str:
    """The command that merges the archive again, into a home that is still to be named."""
    return f"mainstem rebuild --home {quote(str(home.root))} --into NEWHOME"


def _is_copy(home: Home, version: Version, name: str, read: Callable[[int], object]) -> bool:
    """Whether the base's file is what the version's manifest, which was found sound, says of its own."""
    wanted = Manifest.read(home.manifest(version.head, version.number).read_bytes()).files.get(name)
    try:
        return wanted is not None and wanted.sha256 == entry(home.base / name, read=read).sha256
    except OSError:
        return False
