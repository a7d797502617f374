"""What was kept of experts and is thinned out: the archive, and what was refused, by age, by size, or where nothing
reads it any more.

The merged models do not change by it, and nothing that a crash could ask for goes: what has not left the inbox for
certain stays, and so does all of the archive while a rebuild in this home has been begun. Rows stay too.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from daemon.errors import BadHome
from daemon.interventions import cases
from daemon.layout import Home, number
from daemon.versions.retention import check_removable, numbered, remove_dropped
from projector.text import shown, size
from registry.reader import Reader
from registry.records import Deed, Expert, NewIntervention, Status
from registry.store import Store

LONGEST_SECONDS = 1e10


@dataclass(frozen=True, slots=True)
class Prune:
    """What is to go. older_than in seconds since it was decided, larger_than in bytes: of those that are given, all
    must hold; where none is, only what nothing reads any more goes.
    """

    archive: bool
    quarantine: bool
    older_than: float | None = None
    larger_than: int | None = None

    def __post_init__(self) -> None:
        """ValueError where that is no age or no size: it may come from a file."""
        for value in (self.older_than, self.larger_than):
            if not (value is None or (isinstance(value, int | float) and 0 <= value < math.inf)):
                raise ValueError(f"{value!r} is no age and no size")
        if (self.older_than or 0) > LONGEST_SECONDS:
            raise ValueError(f"an age of more than {LONGEST_SECONDS:.0f} seconds")

    @property
    def chooses(self) -> bool:
        return self.older_than is not None or self.larger_than is not None


@dataclass(frozen=True, slots=True)
class Going:
    """One expert's folder."""

    expert: Expert
    folder: Path
    size_bytes: int

    @property
    def open_case(self) -> bool:
        return self.expert.status is Status.QUARANTINED and self.expert.closed_at is None


def going(home: Home, reader: Reader, wanted: Prune, goes_on: Callable[[], object] = lambda: None) -> list[Going]:
    """What would go, the oldest first. goes_on: is called for each folder. Raises BadHome where the archive is being
    read."""
    found = []
    if wanted.archive:
        found += list(_chosen(reader, home.root / "archive", wanted, goes_on))
        begun = [path.name for kind in ("without-*", "rebuild-*") for path in home.state.glob(kind)]
        if begun and any(one.expert.status is Status.MERGED for one in found):
            raise BadHome(
                f"a rebuild that needs the archive has been begun, in state/{begun[0]}",
                "finish it, with the same command again, or remove that folder where nobody wants it any more; then"
                " prune",
            )
    if wanted.quarantine:
        found += list(_chosen(reader, home.root / "quarantine", wanted, goes_on))
    return found


def _chosen(reader: Reader, folder: Path, wanted: Prune, goes_on: Callable[[], object]) -> Iterator[Going]:
    before = datetime.now(UTC) - timedelta(seconds=wanted.older_than or 0)
    for n, path in sorted(numbered(folder).items()):
        goes_on()
        expert = reader.expert(n)
        if expert is None or expert.place is None:  # not ours; or a move that a crash may have cut short
            continue
        unread = expert.status in (Status.DUPLICATE, Status.WITHDRAWN) or expert.closed_at is not None
        one = Going(expert, path, _size(path))
        old = expert.finished_at is not None and expert.finished_at <= before
        large = wanted.larger_than is None or one.size_bytes > wanted.larger_than
        if (old and large) if wanted.chooses else unread:
            yield one


def planned(home: Home, reader: Reader, wanted: Prune) -> list[str]:
    """What would go, in lines of words, and what is lost by it last; none where nothing goes."""
    return described(going(home, reader, wanted))


def described(found: Sequence[Going]) -> list[str]:
    """The same of what was looked up before."""
    if not found:
        return []
    lines = [
        f"{one.folder.parent.name}/{number(one.expert.id)}: {shown(one.expert.name)} ({_status(one)}),"
        f" {size(one.size_bytes)}"
        for one in found
    ]
    lines.append(f"{len(found)} in all, {size(sum(one.size_bytes for one in found))}")
    if merged := sum(one.expert.status is Status.MERGED for one in found):
        lines.append(
            f"lost: {merged} merged {_experts(merged)} stay in the models, but cannot be merged again: `mainstem"
            " rebuild`, a new head, taking out by replay, and scores of the expert by itself need the files"
        )
    if withdrawn := sum(one.expert.status is Status.WITHDRAWN for one in found):
        lines.append(f"lost: {withdrawn} withdrawn {_experts(withdrawn)}, for whoever wanted to drop them again")
    if refused := sum(one.open_case for one in found):
        lines.append(f"lost: {refused} refused {_experts(refused)}, for whoever wanted to mend them: the cases close")
    return lines


def remove(
    home: Home,
    store: Store,
    wanted: Prune,
    intervention: NewIntervention,
    goes_on: Callable[[], object] = lambda: None,
) -> list[str]:
    """Removes it, and says what it was as `planned` does. Cut short, the same again removes the rest. goes_on: is
    called again and again, for thousands take long; what it raises cuts it short.

    Raises BadHome, and then nothing has changed, where another user's folder is in it.
    """
    found = going(home, store, wanted, goes_on)
    for one in found:
        goes_on()
        check_removable(one.folder)
    lines = described(found)
    archived = [one for one in found if one.expert.status is not Status.QUARANTINED]
    if archived:
        store.intervened(replace(intervention, experts=tuple(one.expert.id for one in archived)))
    for one in found:
        goes_on()
        if one.open_case:
            cases.close(home, store, one.expert, replace(intervention, experts=(one.expert.id,)))
        else:
            remove_dropped(home, one.folder)
    return lines


def remove_alone(home: Home, held: int, wanted: Prune, intervention: NewIntervention) -> list[str]:
    """The same where no daemon runs; the descriptor that holds the home is let go of."""
    try:
        with Store.open(home.registry) as store:
            return remove(home, store, wanted, intervention)
    finally:
        os.close(held)


def pruned(reader: Reader) -> set[int]:
    """The experts whose files were pruned, as far as the newest interventions tell."""
    found = [one for one in reader.interventions(limit=1000) if one.deed is Deed.PRUNE]
    return {expert for one in found for expert in one.experts}


def _status(one: Going) -> str:
    return "refused" if one.open_case else "looked after" if one.expert.closed_at else str(one.expert.status)


def _experts(count: int) -> str:
    return "expert" if count == 1 else "experts"


def _size(folder: Path) -> int:
    """Of all files in it, in bytes."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum(path.lstat().st_size for path in files)
