"""Re-hashes a whole home against its manifests and its registry; changes nothing."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from daemon.checkpoints.checkpoint import OpenCheckpoint, open_path
from daemon.errors import DaemonError, NotYet, Reason
from daemon.home.ground import Base
from daemon.home.restoring import again, restoring
from daemon.home.uncommitted import ahead
from daemon.layout import Home, number
from daemon.manifest import Manifest
from daemon.notation import called
from daemon.versions.checking import problems
from daemon.versions.latest import PLAIN, names_by_file, names_by_link
from daemon.versions.retention import needs_state
from projector.errors import ProjectorError
from registry.errors import Damaged
from registry.reader import Reader
from registry.records import Expert, Head, Status, Version

PAGE = 1000
TURNING_SECONDS = 0.3  # from a rollback's commit to `latest`, at the most
WITHOUT_WEIGHTS = (Reason.NO_WEIGHTS, Reason.INCOMPLETE, Reason.PICKLE)


@dataclass
class Checked:
    """What was read: the base, so many versions and archived experts, in so many files; and what to do about what is
    wrong with it."""

    versions: int = 0
    experts: int = 0
    files: int = 0
    size_bytes: int = 0
    hints: list[str] = field(default_factory=list)

    def read(self, size_bytes: int) -> None:
        """Counts one file."""
        self.files += 1
        self.size_bytes += size_bytes


def verify(home: Home, reader: Reader, say: Callable[[str], object]) -> tuple[Checked, list[str]]:
    """(what was checked, what is wrong with it in words); `say` hears what comes next."""
    checked = Checked()
    say("the registry")
    found = _registry(reader)
    say("the base")
    if _base(home.base, checked) != reader.base().sha256:
        found.append("state/base: its sha256 is not the registry's")
        checked.hints.append(f"the base: {_restoring_base(home, reader)}")
    for head in reader.heads():
        for version in reader.versions(head.name, newest_first=False, include_collected=False):
            say(called(head.name, version.number))
            state = needs_state(home, head, version.number)
            wrong = problems(home, version, hashes=True, state=state, read=checked.read)
            now = reader.head(head.name) if wrong else head
            gone = state is False and not home.head_state(head.name, version.number).exists()
            if wrong and now and (now != head or gone):  # beside a daemon: it has moved on, or removed an old state
                row = reader.version(head.name, version.number)
                if row is None or row.collected:
                    continue
                state = needs_state(home, now, version.number)
                wrong = problems(home, version, hashes=True, state=state, read=checked.read)
            if wrong:
                hint = restoring(home, reader, version, wrong)
                checked.hints.append(f"{called(head.name, version.number)}: {hint}")
            found += wrong or _chain(home, reader, version)
            checked.versions += 1
        plain = home.versions(head.name) / PLAIN
        for path, names in ((home.latest(head.name), names_by_link), (plain, names_by_file)):
            if (live := _left_behind(reader, head, path, names)) is not None:
                found.append(f"published/{head.name}/{path.name} does not name {called(head.name, live)}")
    found += [f"{path.relative_to(home.root)}: the registry does not know it" for path in ahead(home, reader)]
    damaged = []
    for expert in _every(reader):
        if expert.status is not Status.QUARANTINED and expert.place:
            say(expert.place)
            wrong = _archived(home, expert, checked)
            if wrong:
                damaged.append(expert)
            found += wrong
    checked.hints += _doing_without(home, damaged)
    return checked, found


def _doing_without(home: Home, damaged: Sequence[Expert]) -> list[str]:
    """What to do about experts whose files in the archive are not what arrived: all that are merged together, because
    each way reads the others; and those that no merge reads again.
    """
    hints = []
    if merged := [expert for expert in damaged if expert.status is Status.MERGED]:
        without = "".join(f" --without {expert.id}" for expert in merged)
        here = f"mainstem rebuild --home {quote(str(home.root))}{without} --replay"
        hints.append(
            f"{', '.join(expert.place or '' for expert in merged)}: put it back from a backup; or, with the daemon"
            f" stopped, take it out of the merge with `{here}` and of the archive with `{_away(home, merged)}`; or,"
            f" beside the daemon, make another home without it: `{again(home)}{without}`"
        )
    for expert in damaged:
        if expert.status is not Status.MERGED:
            what = "a duplicate" if expert.status is Status.DUPLICATE else "withdrawn"
            hints.append(
                f"{expert.place}: put it back from a backup; or, since it is {what} and no merge reads it, move it"
                f" away: `{_away(home, [expert])}`"
            )
    return hints


def _away(home: Home, experts: Sequence[Expert]) -> str:
    """The command that moves these experts' folders out of the home, to beside it."""
    moves = ((home.archive(expert.id), f"{home.root}-{number(expert.id)}") for expert in experts)
    return " && ".join(f"mv {quote(str(one))} {quote(other)}" for one, other in moves)


def _every(reader: Reader) -> Iterator[Expert]:
    """Everything that ever arrived, newest first, a page in memory at a time."""
    page = reader.experts(limit=PAGE)
    while page:
        yield from page
        page = reader.experts(limit=PAGE, before=page[-1].id)


def _registry(reader: Reader) -> list[str]:
    try:
        reader.check()
    except Damaged as error:
        return [str(error)]
    return []


def _left_behind(reader: Reader, head: Head, path: Path, names: Callable[[Path], str | None]) -> int | None:
    """The live version that `path` should name and does not. Not while the expert that made it is still in the inbox:
    the daemon turns `path` to it first, and then moves the expert. Nor in the moment of a rollback.
    """
    live = head.live
    for pause in (0.0, 0.0, TURNING_SECONDS):  # it may have been turned, and the expert moved, between two looks
        time.sleep(pause)
        live = (reader.head(head.name) or head).live
        if names(path) == number(live) or live in {expert.version for expert in reader.unplaced()}:
            return None
    return live


def _chain(home: Home, reader: Reader, version: Version) -> list[str]:
    """A version's manifest names the manifest of the version before it."""
    named = Manifest.read(home.manifest(version.head, version.number).read_bytes()).content["parent"]
    parent = reader.version(version.head, version.parent) if version.parent is not None else None
    expected = {"version": parent.number, "manifest_sha256": parent.manifest_sha256} if parent else None
    return [] if named == expected else [f"{called(version.head, version.number)}: its parent is not the registry's"]


def _archived(home: Home, expert: Expert, checked: Checked) -> list[str]:
    path = home.archived(expert.id)
    if path is None:
        return []  # pruned: the archive is the operator's to thin out
    checked.experts += 1
    recorded = expert.sidecars or {}
    try:
        with open_path(path, needs=list(recorded)) as checkpoint:
            weights, sidecars = _identity(checkpoint, checked), checkpoint.sidecar_digests()
    except NotYet as error:
        spared = expert.status is Status.DUPLICATE and error.reason in WITHOUT_WEIGHTS
        return [] if spared else [f"{expert.place}: {error}"]  # its twin's folder has its weights
    except (DaemonError, ProjectorError, OSError) as error:
        return [f"{expert.place}: {error}"]
    twin = home.archived(expert.duplicate_of) if expert.duplicate_of else None
    spared = expert.kind != "file" and twin is not None  # of a duplicate's folder whatever its twin has is gone
    found = ["its sha256"] if weights != expert.sha256 and not spared else []
    found += [f"the sha256 of its {kind}.safetensors" for kind in recorded if sidecars[kind] != recorded[kind]]
    return [f"{expert.place}: {what} is not the registry's" for what in found]


def _base(path: Path, checked: Checked) -> str | None:
    try:
        with open_path(path) as checkpoint:
            return _identity(checkpoint, checked)
    except (DaemonError, ProjectorError, OSError):
        return None


def _restoring_base(home: Home, reader: Reader) -> str:
    """What to do about a base that is not the registry's: as a merge would say it."""
    try:
        with Base(home, reader) as base:
            base.check()
            base.confirm()
    except DaemonError as error:
        return error.hint
    return "it has changed meanwhile: verify again"


def _identity(checkpoint: OpenCheckpoint, checked: Checked) -> str:
    sha256 = checkpoint.identity()
    for size_bytes in checkpoint.sizes:
        checked.read(size_bytes)
    return sha256
