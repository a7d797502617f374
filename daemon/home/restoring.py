"""How a person puts back what was edited or lost of a published version."""

import json
from collections.abc import Callable, Sequence
from shlex import quote

from daemon.layout import Home
from daemon.notation import called
from daemon.versions.manifest import entry, names_below
from registry.records import Version


def restoring(
    home: Home, version: Version, problems: Sequence[str], read: Callable[[int], object] = lambda _: None
) -> str:
    """The hint for what `manifest.problems` found: the very commands for files of version 0 that state/base has too,
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
    if len(problems) > len(copied) + len(extra):
        commands.append(
            f"put {'the others' if commands else 'them'} back from a backup, or from what `mainstem pull` made of "
            f"{called(version.head, version.number)}; weights and state also from `{again(home)}`, which makes the "
            "same ones (docs/operating.md)"
        )
    return "; ".join(commands)


def again(home: Home) -> str:
    """The command that merges the archive again, into a home that is still to be named."""
    return f"mainstem rebuild --home {quote(str(home.root))} --into NEWHOME"


def _is_copy(home: Home, version: Version, name: str, read: Callable[[int], object]) -> bool:
    """Whether the base's file is what the version's manifest, which was found sound, says of its own."""
    files = json.loads(home.manifest(version.head, version.number).read_bytes())["files"]
    wanted = next((file["sha256"] for file in files if file["name"] == name), None)
    try:
        return wanted == entry(home.base / name, read=read).sha256
    except OSError:
        return False
