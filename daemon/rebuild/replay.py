"""Merges the archived experts of one home into another, in their order and by the ordinary publish protocol.

A replay may be cut short at any point: the next one goes on behind the last expert that was committed.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from uuid import uuid4

from daemon.arrivals.admission import naming_of
from daemon.arrivals.inbox import Drop, entry_id
from daemon.arrivals.trained_from import Start, noted_version
from daemon.checkpoints.checkpoint import OpenCheckpoint, identity_at, open_path
from daemon.checkpoints.expert_json import ABOUT
from daemon.checkpoints.hints import hinting
from daemon.compute.progress import Progress
from daemon.compute.resources import return_freed_memory
from daemon.config import Evaluate, Retention, Settings
from daemon.disk import durable
from daemon.errors import BadHome, DaemonError, NotYet, Refused
from daemon.home.founding import found
from daemon.home.presence import lock
from daemon.home.recovery import mark_clean, recover
from daemon.layout import Home
from daemon.merge.merger import Again, Merger
from daemon.notation import told_apart
from daemon.rebuild.restating import unlike
from daemon.versions.heads import relative_heads
from projector.errors import ProjectorError
from projector.method import Method
from projector.methods import make
from projector.text import listed, shown
from projector.watch import SILENT
from registry.reader import Reader
from registry.records import Expert, Status
from registry.store import Store

Heads = Mapping[str, Method]
NO_LIMIT = 1e30
PAGE = 1000
MOST_MISSING = 100  # of the archive, that are named


def methods_of(reader: Reader) -> Heads:
    """The heads of a home by name."""
    return {head.name: make(head.method, head.params) for head in reader.heads()}


class Console:
    """Hears what a rebuild does: what it begins (`say`), and the share of an expert that is done (`show`)."""

    def say(self, text: str) -> None:
        """One line, for whoever waits."""

    def show(self, share: float) -> None:
        """From 0 to 1."""

    def progress(self) -> Progress:
        """A watch for the driver that reports here."""
        return Progress(Event(), self.show)


def archived(home: Home, expert: Expert) -> Path:
    """Where a merged expert's file or folder is. Raises BadHome where it is gone."""
    path = home.archived(expert.id)
    if path is None and expert.place is None:
        raise BadHome(
            f"expert {expert.id} ({expert.name}) is merged, but the daemon has not archived it yet",
            f"try again in a moment; if the inbox was replaced meanwhile, put its file into {home.archive(expert.id)}",
        )
    if path is None:
        raise BadHome(
            f"expert {expert.id} ({expert.name}) is not in {home.archive(expert.id)}: pruned, or taken away",
            "put its file back there, or leave the expert out with --without",
        )
    return path


def check_archive(
    home: Home, reader: Reader, experts: Sequence[Expert], heads: Heads, relative: Collection[str] = ()
) -> None:
    """Raises BadHome where an expert, or a sidecar that a method needs, is not in the archive, or where the files of a
    version that it was trained from are gone and one of the heads is `relative` to that: before the long work.
    """
    gone = [one for one in experts if one.place and home.archived(one.id) is None][:MOST_MISSING]
    if len(gone) > 1:
        named = listed((f"{one.id} ({shown(one.name)})" for one in gone), most=5)
        without = "".join(f" --without {one.id}" for one in gone)
        more = ", and so on" if len(gone) == MOST_MISSING else ""
        raise BadHome(
            f"not in archive/ any more, pruned or taken away, and so not to be merged again: {named}",
            f"put them back from a backup; or leave them out of the model for good:{without}{more}",
        )
    for expert in experts:
        with _open(home, expert, needed(heads)) as again, ExitStack() as files:
            if start := started(home, reader, expert, heads.keys() & set(relative)):
                try:
                    start.opened(again, files, SILENT)
                except Refused as error:
                    raise _not_again(expert, str(error), error.hint) from error


def started(home: Home, reader: Reader, expert: Expert, relative: Collection[str]) -> Start | None:
    """What a merged expert was trained from, where a head goes by it. Raises BadHome where that is not known."""
    version = noted_version(reader, expert) if relative else None
    return Start(home, version) if version else None


def _open(home: Home, expert: Expert, needs: Sequence[str] = ()) -> OpenCheckpoint:
    path = archived(home, expert)
    try:
        with hinting(path):
            return open_path(path, follow=False, needs=needs)
    except (DaemonError, ProjectorError) as error:
        raise _not_again(expert, str(error), error.hint) from error


def needed(heads: Heads) -> list[str]:
    """The sidecars that these heads need."""
    return sorted({need for method in heads.values() for need in method.needs})


def misfit(
    target: Home, source: Reader, heads: Heads, relative: Collection[str], experts: Sequence[Expert]
) -> str | None:
    """Why a replay cannot go on in this home, in words; None where it can."""
    with Reader.open(target.registry) as there:
        if there.base().sha256 != source.base().sha256:
            return "it has another base"
        if methods_of(there) != heads or relative_heads(there) != set(relative):
            return "its heads are others"
        done = there.counts()[Status.MERGED]
        if done > len(experts) or not all(map(_same, pages(there), experts)):
            return "other experts were merged there"
    return None


def replay(
    source: Home,
    reader: Reader,
    experts: Sequence[Expert],
    target: Home,
    heads: Heads,
    settings: Settings,
    to: Console,
    *,
    relative: Collection[str] = (),
) -> None:
    """Makes the home `target` where it is not there, and merges into it those of `experts` that it does not have yet.

    settings: those of the new home; what limits an arrival is not asked again of experts that were merged once, and
    only the newest versions stay, for nobody reads the others. Raises BadHome where an expert cannot be merged again,
    and OSError where the disk fails.
    """
    settings = settings.model_copy(
        update={
            "admission": settings.admission.model_copy(update={"max_base_ratio": NO_LIMIT, "max_norm_ratio": NO_LIMIT}),
            "evaluate": Evaluate(),
            "retention": Retention(versions=settings.retention.versions, grace_seconds=0),
        }
    )
    for expert in experts:
        with _open(source, expert) as again:
            _check_weight(expert, again.weight, archived(source, expert))
    if not target.exists():
        fresh = not target.root.exists() or os.listdir(target.root) == [target.inner_mark.name]
        config = source.config.read_bytes() if source.config.exists() else None
        name = reader.base().name
        base = found(
            target,
            source.base,
            list(heads.items()),
            to.say,
            settings.compute,
            name=name,
            config=config,
            relative=relative,
        )
        if base.sha256 != reader.base().sha256:
            _unfound(target, wholly=fresh)
            raise BadHome("the base in state/base is damaged", "restore it from a backup; nothing was made")
    with ExitStack() as closing:
        closing.callback(os.close, lock(target))
        store = closing.enter_context(Store.open(target.registry))
        recover(target, store, lambda *_, **__: None)
        merger = Merger(target, store, settings, to.progress())
        closing.callback(merger.close)
        done = store.counts()[Status.MERGED]
        for place, expert in enumerate(experts[done:], start=done + 1):
            to.say(f"merging {expert.name} ({place} of {len(experts)})")
            naming, start = naming_of(expert, settings.admission), started(source, reader, expert, relative)
            _merge(merger, target, expert, archived(source, expert), Again(naming, start))
            return_freed_memory()
        mark_clean(target)


def _merge(merger: Merger, target: Home, expert: Expert, source: Path, again: Again) -> None:
    dropped = target.inbox / source.name
    if not os.path.lexists(dropped):
        _drop(source, target)
    elif _identity(dropped) != _identity(source):
        raise BadHome(f"{dropped} is in the way", "take it out of the inbox until the rebuild is done")
    drop = Drop(source.name, entry_id(dropped), dropped.lstat().st_mtime_ns, expert.size_bytes, 0.0)
    try:
        with hinting(source):
            recorded = merger.take(drop, again)
    except NotYet as error:
        raise _not_again(expert, str(error), error.hint) from error
    if recorded.status is not Status.MERGED:
        raise _not_again(expert, f"{recorded.status}: {recorded.detail}", recorded.hint or "")
    _check_weight(expert, recorded.weight, source)
    if why := unlike(expert, recorded.sha256, recorded.sidecars or {}):
        raise _not_again(expert, f"{source} is not what was merged: {why}", "restore it from a backup, and begin anew")


def _check_weight(expert: Expert, weight: float, path: Path) -> None:
    """Its expert.json may have been edited, or be older than the daemon's interest in it."""
    if weight != expert.weight:
        raise _not_again(
            expert,
            f"it was merged with the weight {expert.weight}, by {path / ABOUT} it has {weight}",
            f"let that file say {expert.weight}, or leave it out where that is 1",
        )


def _unfound(target: Home, *, wholly: bool) -> None:
    """Makes a new home one that was never finished; `wholly` leaves nothing of it."""
    durable.replace_file(target.founding, b"")
    durable.remove(target.registry)
    if wholly:
        durable.remove(target.root)


def _drop(source: Path, target: Home) -> None:
    """Puts an expert into the inbox, whole at once: as links where the file system allows it."""
    new = target.tmp / uuid4().hex
    _link(source, new)
    durable.rename(new, target.inbox / source.name)


def _link(source: Path, target: Path) -> None:
    """A file, or a folder and all in it: its checkpoint may lie further down. No link is followed."""
    if not source.is_dir():
        durable.link_or_copy(source, target)
        return
    durable.make_folder(target)
    for path in source.iterdir():
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            _link(path, target / path.name)
    durable.sync_folder(target)


def _identity(path: Path) -> str | None:
    try:
        return identity_at(path)
    except OSError:
        return None


def pages(reader: Reader) -> Iterator[Expert]:
    """The lineage of a home, PAGE experts in memory at a time."""
    page = reader.lineage(limit=PAGE)
    while page:
        yield from page
        page = reader.lineage(after=page[-1].version or 0, limit=PAGE)


def _same(there: Expert, here: Expert) -> bool:
    named_alike = None in (there.naming, here.naming) or there.naming == here.naming
    return named_alike and there.weight == here.weight and not unlike(here, there.sha256, there.sidecars or {})


def _not_again(expert: Expert, why: str, hint: str) -> BadHome:
    return BadHome(f"expert {expert.id} ({shown(expert.name)}) cannot be merged again: {why}", hint)


def merged_experts(reader: Reader, words: Sequence[str]) -> list[Expert]:
    """The merged experts that these words name: an id, a sha256 or enough of one, a name. Raises BadHome."""
    found: dict[int, Expert] = {}
    for word in words:
        called = reader.find_experts(word)
        named = [expert for expert in called if expert.status is Status.MERGED]
        gone = [expert for expert in called if expert.status is Status.WITHDRAWN]
        if gone and not named:
            raise BadHome(
                f"expert {gone[0].id} ({gone[0].name}) went with version {gone[0].withdrawn_in} already",
                "nothing is to be done",
            )
        refused = [expert for expert in called if expert.status is Status.QUARANTINED]
        if refused and not named:
            raise BadHome(
                f"expert {refused[0].id} ({refused[0].name}) was refused ({refused[0].reason}): it is in no merge",
                "nothing is to be done",
            )
        if len(named) != 1:
            which = f"{len(named)} merged experts are called {word!r}: {told_apart(named)}"
            raise BadHome(
                which if named else f"no merged expert is called {word!r}",
                "give the id; `mainstem log --status merged` lists them, --name GLOB finds them",
            )
        found[named[0].id] = named[0]
    return sorted(found.values(), key=lambda expert: expert.version or 0)
