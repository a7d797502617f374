"""Brings a home back to where its registry says it is. Runs at every start; running it twice equals running it once.

Whatever was not committed is removed, whatever was committed is finished. A version whose files are damaged stops the
start where it is live, or the newest: going back is the person's decision, never ours.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from daemon.arrivals.filing import place_all
from daemon.arrivals.pushes import COMMITTED, LAID_OUT
from daemon.disk import durable
from daemon.disk.failpoints import hit
from daemon.errors import BadHome
from daemon.home.ground import separate
from daemon.home.restoring import restoring
from daemon.home.uncommitted import leftovers, refuse_ahead, remove_temporary, temporaries
from daemon.layout import Home, is_head_name
from daemon.notation import called
from daemon.versions.checking import problems
from daemon.versions.latest import PLAIN, follow_live
from daemon.versions.retention import finish, remove_whole
from projector.watch import SILENT, Watch
from registry.errors import Busy
from registry.store import Store

UNFINISHED = (
    ".founding",
    "..founding.tmp",
    ".clean.tmp",
    ".daemon.json.tmp",
    ".order.json.tmp",
    "registry.new",
    "registry.new-wal",
    "registry.new-shm",
)


def recover(home: Home, store: Store, say: Callable[..., object], watch: Watch = SILENT) -> None:
    """Makes the home sound. `say(event, **fields)` hears what was done, `watch` of the bytes that are read: it may
    raise, to leave the rest to the next start. Raises BadHome where a version that is read is damaged.
    """
    hit("recover.begin")
    _check_file_system(home)
    store.check()
    try:
        store.checkpoint()
    except Busy:
        say("the registry's log was not shortened: something is reading it")
    unclean = not home.clean.exists()
    if unclean:
        say("the last stop was not clean: hashing the live versions")
    refuse_ahead(home, store)
    _check_read(home, store, hashes=unclean, read=watch.advance)
    durable.remove(home.clean)
    durable.sync_folder(home.state)
    for path in [*leftovers(home, store), *_strays(home, store)]:
        if path.parent != home.tmp:
            remove_whole(home, path)
        elif not remove_temporary(path):
            say("what another user made in state/tmp cannot be removed", path=str(path.relative_to(home.root)))
            continue
        say("removed what was never committed", path=str(path.relative_to(home.root)))
    if os.path.lexists(home.old_uploads):
        # Others may write there: what cannot be removed stays, and stops no start. A link is removed, not followed.
        with suppress(OSError, RecursionError):
            durable.remove(home.old_uploads)
    _separate_base(home, store, say, watch)
    finish(home, store)
    follow_live(home, store)
    if blocked := store.block_withdrawn():
        say("blocked what an earlier mainstem took out: it may come back by `mainstem unblock ID`", experts=blocked)
    hit("recover.swept")
    place_all(home, store, watch)
    hit("recover.end")


def mark_clean(home: Home) -> None:
    """Notes that this process stops with everything in its place."""
    durable.replace_file(home.clean, b"")


def _separate_base(home: Home, store: Store, say: Callable[..., object], watch: Watch) -> None:
    """A home that an earlier mainstem made shares the base's files with version 0."""
    try:
        if names := separate(home, store, watch):
            say("gave the base in state/base files of its own", files=len(names))
    except OSError as error:
        if not durable.is_full(error):
            raise
        say("no room to give the base in state/base files of its own: it still shares them with version 0")


def _check_file_system(home: Home) -> None:
    """Renames are only atomic within one file system."""
    for folder in (home.inbox, home.root / "quarantine", home.root / "archive", home.tmp):
        durable.make_folder(folder)
    device = home.state.stat().st_dev
    for folder in (home.inbox, home.root / "quarantine", home.root / "archive", home.published, home.tmp):
        if folder.stat().st_dev != device:
            raise BadHome(
                f"{folder} is on another file system than {home.state}", "keep all of HOME on one file system"
            )


def _check_read(home: Home, store: Store, *, hashes: bool, read: Callable[[int], object]) -> None:
    """What is read: each head's live version, and its newest, which the next one continues from."""
    for head, n in [(one, n) for one in store.heads() for n in sorted({one.live, one.newest})]:
        version = store.version(head.name, n)
        if version is None:
            found, hint = [f"{called(head.name, n)} is not in the registry"], "restore the home from a backup"
        elif found := problems(home, version, hashes=hashes, extras=False, state=n == head.newest, read=read):
            hint = restoring(home, store, version, found, read)
        if found:
            raise BadHome(
                f"{called(head.name, n)} is damaged: {'; '.join(found)}",
                f"{hint}; `mainstem verify` lists everything that differs",
            )


def _strays(home: Home, store: Store) -> list[Path]:
    """Temporary files and folders of ours, and the homes of rebuilds; nothing that has another name than we give."""
    strays = temporaries(home)
    strays += _unsent(home)
    strays += [home.requests]  # whoever asked has heard that the daemon ended
    strays += [home.state / name for name in UNFINISHED]
    strays += [home.versions(head.name) / name for head in store.heads() for name in (".latest.tmp", f".{PLAIN}.tmp")]
    return [path for path in [*strays, *_done_with(home, store)] if os.path.lexists(path)]


def _unsent(home: Home) -> list[Path]:
    """What had not come whole over HTTP; never what a link in its place leads to. What was committed goes on."""
    if home.uploads.is_symlink() or not home.uploads.is_dir():
        return [home.uploads]
    found = list(home.uploads.iterdir())
    kept = [
        path for path in found if not path.is_symlink() and any((path / n).is_file() for n in (COMMITTED, LAID_OUT))
    ]
    return [path for path in found if path not in kept] if kept else [home.uploads]


def _done_with(home: Home, store: Store) -> list[Path]:
    """The homes of rebuilds that were committed, and what one that was not had begun to publish."""
    heads = {head.name: head for head in store.heads()}
    next_number = max(head.newest for head in heads.values()) + 1
    inner = [Home(path) for kind in ("without-*", "rebuild-*") for path in home.state.glob(kind)]
    done = []
    for path in [one.root for one in inner if one.inner_mark.exists()]:  # any other a person made
        name = path.name.removeprefix("rebuild-")
        if path.name.startswith("without-"):
            done += [path] if path != home.withdrawing(next_number) else []
        elif is_head_name(name):
            begun = [one for one in (home.versions(name), home.states(name)) if one.exists() and _only_ours(one)]
            done += [path] if name in heads else begun
    return done


def _only_ours(folder: Path) -> bool:
    """True where a head's folder holds versions and what names them, and nothing else."""
    ours = {"latest", PLAIN, ".latest.tmp", f".{PLAIN}.tmp", "views"}
    return all(path.name in ours or path.name.isdecimal() for path in folder.iterdir())
