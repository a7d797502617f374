"""Brings a version from a running mainstem into a folder: all of it, each file checked, or nothing.

`pull` is the whole story, and `follow` the same again for each new version. Beside it: client.py asks,
foreign_manifest.py reads what is announced, fetching.py brings the bytes, target.py puts them in place.
"""

import json
import re
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from daemon.checkpoints.weight_names import weight_names
from daemon.disk import durable
from daemon.errors import DaemonError, Reason
from daemon.layout import CARD, is_adapter, is_weights
from daemon.manifest import FileEntry
from daemon.notation import called
from daemon.pull.client import TIMEOUT_SECONDS, Connection, Damaged, Gone, Origin, Passing
from daemon.pull.fetching import PIECE_BYTES, Fetching, Report
from daemon.pull.foreign_manifest import MOST_BYTES, ForeignManifest, etag
from daemon.pull.target import MANIFEST_BYTES, Target
from projector.text import shown

CONNECTIONS = 4
LATEST = "latest"
VIEW_SECONDS = 300.0  # without a byte: a view may take a sweep over a large model before its first
ASK_PAUSES = (0.2, 0.5)  # seconds before each further try of a small request
RESTARTS = 5  # versions in a row that the server may remove under our hands
WAIT_SECONDS = 30  # how long the server is to wait for a new version
POLL_SECONDS = 5.0  # between two questions, where the server did not wait
AWAY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)  # while following: pauses while the server is away, the last for good
DAMAGED_SECONDS = 60.0  # while following: before a damaged version is tried again

Answer = TypeVar("Answer")

Trouble = Callable[[DaemonError, float], None]
"""Hears of each fault that may pass, and for how many seconds nothing will be tried."""


@dataclass(frozen=True)
class Pulled:
    """What is in place now. `fetched_bytes` came over the network, the rest was there already."""

    head: str
    version: int
    files: int
    size_bytes: int
    fetched_bytes: int
    up_to_date: bool


@dataclass(frozen=True)
class Source:
    """What to pull from where: a head's `version` (a number or "latest"), or an expert's `view` of it, or its `adapter`
    alone."""

    origin: Origin
    head: str
    version: str = LATEST
    view: str | None = None
    connections: int = CONNECTIONS
    adapter: bool = False


def pull(
    url: str,
    dest: Path,
    head: str = "main",
    version: str = LATEST,
    view: str | None = None,
    report: Report | None = None,
    connections: int = CONNECTIONS,
    *,
    adapter: bool = False,
    token: str | None = None,
) -> Pulled:
    """Makes the folder `dest` what a version is, at once and durably, also where an earlier pull made it.

    Every file is held against the manifest's sha256, and the manifest against the server's; a view's weights have
    none and are held against their own header. What is missing of an interrupted pull is all that is fetched. `token`
    goes to the server, or what stands before it, with every request.
    Raises DaemonError where the server has it not, cannot be reached or sent something else.
    """
    if re.fullmatch(r"[0-9]{1,12}", version):
        version = str(int(version))  # it may be given as its folder is called
    source = Source(Origin.of(url, token), head, version, view, connections, adapter)
    with Target(dest) as target:
        return _fill(target, source, report or (lambda *_: None))


def follow(
    url: str,
    dest: Path,
    head: str = "main",
    report: Report | None = None,
    trouble: Trouble | None = None,
    connections: int = CONNECTIONS,
    *,
    adapter: bool = False,
    token: str | None = None,
    answered: Callable[[], None] = lambda: None,
) -> Generator[Pulled, None, None]:
    """Pulls each new live version into `dest`, while it is iterated over. `answered` hears of the end of troubles.

    Raises DaemonError where no patience helps: no such head, no mainstem at the address, a destination that must not
    be touched.
    """
    source = Source(Origin.of(url, token), head, connections=connections, adapter=adapter)
    in_place: int | None = None
    faults = 0
    with Target(dest) as target:
        while True:
            try:
                asked = time.monotonic()
                live = _live(source, in_place)
                if live is None:  # it waited in vain; of an older server a head that was rolled back shows only now
                    live = _live(source)
                pulled = _fill(target, source, report or (lambda *_: None)) if live != in_place else None
                if faults:
                    answered()
                faults = 0
                if pulled is not None:
                    in_place = pulled.version
                    yield pulled
                else:
                    time.sleep(max(0.0, asked + POLL_SECONDS - time.monotonic()))
            except (Passing, Damaged) as error:
                away = AWAY_SECONDS[min(faults, len(AWAY_SECONDS) - 1)]
                pause = DAMAGED_SECONDS if isinstance(error, Damaged) else away
                faults += 1
                if trouble is not None:
                    trouble(error, pause)
                time.sleep(pause)


def _fill(target: Target, source: Source, report: Report) -> Pulled:
    """Brings the version into the target, a newer one where the latest was removed meanwhile."""
    for _ in range(RESTARTS):
        number = str(_patiently(lambda: _live(source))) if source.version == LATEST else source.version
        try:
            return _fill_with(target, source, _patiently(lambda: _manifest(source, number)), report)  # noqa: B023
        except Gone:
            if source.version != LATEST:
                raise
    from daemon.config import taking_effect  # imported here: every command imports this file

    raise Passing(
        Reason.PULL,
        f"{RESTARTS} versions in a row were removed while they were pulled",
        taking_effect("let the server keep them for longer: raise retention.versions or retention.grace_bytes"),
    )


def _fill_with(target: Target, source: Source, manifest: ForeignManifest, report: Report) -> Pulled:
    current, view = target.current(), source.view
    if view is not None and current is not None:
        raise DaemonError(Reason.PULL, f"{target.dest} is there already", "a view needs a folder of its own")
    files = adapter_of(manifest) if source.adapter else wanted(manifest, view)
    size = sum(file.size for file in files)
    if view is None and target.is_whole(manifest, files):
        target.keep = False
        return Pulled(manifest.head, manifest.version, len(files), size, 0, up_to_date=True)
    there = target.begin(json.dumps([manifest.sha256, PIECE_BYTES, view, [file.name for file in files]]), manifest)
    version = f"{source.origin.head(source.head)}/versions/{manifest.version}"
    fetching = Fetching(source.origin, f"{version}/files", target, current, source.connections, report)
    try:
        fetching.fetch(files, there)
    except (Passing, KeyboardInterrupt):
        target.keep = view is None
        raise
    if view is not None:
        name = weight_names(manifest.files).whole
        weights = _fetch_view(source.origin, f"{version}/views/{quote(view, safe='')}/files", name, target, report)
        target.put_in_place(None)
        fetched = fetching.fetched_bytes + weights
        return Pulled(manifest.head, manifest.version, len(files) + 1, size + weights, fetched, up_to_date=False)
    target.put_in_place(manifest)
    return Pulled(manifest.head, manifest.version, len(files), size, fetching.fetched_bytes, up_to_date=False)


def adapter_of(manifest: ForeignManifest) -> list[FileEntry]:
    """The files of a version's LoRA adapter. Raises DaemonError where it has none."""
    found = [file for file in manifest.files.values() if is_adapter(file.name)]
    if not found:
        raise DaemonError(
            Reason.PULL,
            f"{called(manifest.head, manifest.version)} has no adapter",
            f"set heads.{manifest.head}.adapter.rank on the server: versions from then on have one",
        )
    return found


def wanted(manifest: ForeignManifest, view: str | None) -> list[FileEntry]:
    """The files of a version to fetch: all, or those that stand beside an expert's view of the weights."""
    files = list(manifest.files.values())
    if view is None:
        return files
    return [file for file in files if not (is_weights(file.name) or is_adapter(file.name) or file.name == CARD)]


def _live(source: Source, have: int | None = None) -> int | None:
    """The number of the live version.

    With `have` the server may wait for another; None where it says, after its time, that there is none. An older server
    knows `wait_for` alone.
    """
    origin, path = source.origin, f"{source.origin.head(source.head)}/{LATEST}"
    asked = path if have is None else f"{path}?wait_for={have + 1}&have={have}&timeout={WAIT_SECONDS}"
    with Connection(origin, TIMEOUT_SECONDS + WAIT_SECONDS) as connection, connection.get(asked) as answer:
        if have is not None and answer.status in (200, 204, 304):
            return None
        there = origin.path_of(answer.headers["Location"] or "", path) if answer.status == 307 else None
        found = re.fullmatch(rf"{re.escape(path.removesuffix(LATEST))}versions/([0-9]{{1,12}})", there or "")
        if found is None:
            raise connection.problem(asked, answer)
        return int(found[1])


def _manifest(source: Source, version: str) -> ForeignManifest:
    """A version's manifest, with the digest that the server names, and of what was asked for."""
    path = f"{source.origin.head(source.head)}/versions/{quote(version, safe='')}"
    with Connection(source.origin) as connection, connection.get(path) as answer:
        if answer.status != 200:
            raise connection.problem(path, answer)
        text = connection.text(path, answer, MANIFEST_BYTES)
        try:
            manifest = ForeignManifest.read(text)
        except ValueError as error:
            raise connection.refusal(path, f"what is there is no manifest: {error}") from error
    tag = answer.headers["ETag"] or "none"
    if tag != etag(manifest.sha256):
        what = f"{path}: the manifest came with the sha256 {manifest.sha256}, its ETag is {shown(tag)}"
        raise Passing(Reason.PULL, what, "something between here and the server changes what it sends")
    if (manifest.head, str(manifest.version)) != (source.head, version):
        raise connection.refusal(path, f"this is the manifest of {shown(called(manifest.head, manifest.version))}")
    return manifest


def _fetch_view(origin: Origin, folder: str, name: str, target: Target, report: Report) -> int:
    """An expert's weights, computed by the server while they are sent. Returns their size in bytes."""
    done, path = 0, f"{folder}/{quote(name)}"
    with Connection(origin, VIEW_SECONDS) as connection, connection.get(path) as answer:
        if answer.status != 200:
            raise connection.problem(path, answer)
        size = answer.length
        if size is None or size > MOST_BYTES:
            raise connection.refusal(path, "the answer does not say how long it is")
        durable.remove(target.new / name)
        with durable.new_file(target.new / name, size) as fd:
            for chunk in connection.body(path, answer, size):
                durable.write_at(fd, chunk, done)
                done += len(chunk)
                report(done, size)
    from projector.files.tensorfile import TensorReader  # it brings torch

    with (target.new / name).open("rb") as file:
        TensorReader(file.fileno())  # BadFile where it is not what its own header says
    return done


def _patiently(ask: Callable[[], Answer]) -> Answer:
    """Asks again, a few times, where the network broke."""
    for pause in ASK_PAUSES:
        try:
            return ask()
        except Passing:
            time.sleep(pause)
    return ask()
