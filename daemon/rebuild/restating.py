"""A next version of a home's heads that folds no new expert: experts are taken out, or a head is refined.

It is published as any other: files first, all durable, then renamed into place, then ONE transaction.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import isclose
from pathlib import Path
from uuid import uuid4

from daemon.arrivals.admission import naming_of
from daemon.arrivals.identity import SAME_NORM
from daemon.checkpoints.checkpoint import OpenCheckpoint, open_path
from daemon.compute.progress import Progress
from daemon.compute.resources import driver
from daemon.config import Settings
from daemon.disk import durable
from daemon.disk.failpoints import hit
from daemon.errors import BadHome
from daemon.home.ground import Base, States
from daemon.layout import CARD, STATE_FILE, Home, is_adapter
from daemon.versions.adapter import Adapting
from daemon.versions.heads import LiveHead
from daemon.versions.latest import point_latest
from daemon.versions.manifest import FileEntry, WeightsPlan, Withdrawal
from daemon.versions.retention import collect, remove_whole
from daemon.versions.sealing import Origin, origin, seal
from daemon.versions.writing import Outputs, weights_plan
from projector.driver.head import HeadFold
from projector.files.tensorfile import TensorReader
from projector.method import Contribution, Method, Totals
from registry.reader import Reader
from registry.records import Expert, NewVersion
from registry.store import Store

STATE_ONLY: WeightsPlan = ((), None)
Arrival = tuple[Path, Contribution, Expert]  # a file or folder, how it counts, and as what it was merged


@dataclass(frozen=True)
class Made:
    """A version of one head, written but not published; its state's folder is missing where it has none."""

    published: Path
    weights: Sequence[FileEntry]
    state_folder: Path
    state: FileEntry | None
    totals: Totals
    dtype: str
    approximate: bool = False
    withdrawal: Withdrawal | None = None


class Restating:
    """One such version in the making. The caller holds the home's lock. Use it as a context manager."""

    def __init__(self, home: Home, reader: Reader, settings: Settings, progress: Progress) -> None:
        self._home = home
        self._settings = settings
        self._progress = progress
        self._driver = driver(settings.compute, progress)
        self._closing = ExitStack()
        self._base = self._closing.enter_context(Base(home, reader, progress))
        self._plan = weights_plan(self._base.checkpoint, settings.publish)
        self._adapting = Adapting(home, self._base.tensors, settings, progress)
        self._folder = home.tmp / uuid4().hex
        self._closing.callback(durable.remove, self._folder)

    def __enter__(self) -> "Restating":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def folded(self, source: Home, live: LiveHead, method: Method, totals: Totals, arrivals: Sequence[Arrival]) -> Made:
        """Folds these experts, one or more, onto the state of a live version of `source`, and reads out the weights.

        method, totals: by which, and counted from there.
        """
        head, states, state = live.head.name, States(source, self._progress), None
        self._base.check()
        for place, (path, contribution, expert) in enumerate(arrivals, start=1):
            folder = self._folder / head / str(place)
            last = place == len(arrivals)
            self._progress.begin(self._sweep_bytes() * (1 + method.rounds + last))
            with ExitStack() as files:
                before = _state(state, files) if state else states.open(live, self._base.tensors.schema, files)
                output = Outputs(
                    folder, self._base.tensors.schema, method, self._plan if last else STATE_ONLY, files, self._progress
                )
                naming = naming_of(expert, self._settings.admission)
                expert_files = files.enter_context(
                    open_path(path, self._progress, follow=False, needs=method.needs, naming=naming)
                )
                expert_files.check(self._base.tensors)
                if method.keyed:
                    contribution = replace(contribution, sha256=expert_files.identity())
                contribution = self._driver.survey(
                    self._base.tensors, expert_files.tensors, method, contribution, before
                )
                head_fold = HeadFold(method, totals, contribution, before, output.state, record=output.record)
                folded = self._driver.fold(self._base.tensors, expert_files.tensors, [head_fold])
                (totals,) = folded.totals
                self._base.confirm()
                states.confirm()
                _check(path, expert_files, folded.task_vector.whole, expert)
                self._driver.read_out(self._base.tensors, method, totals, output.state.reader(), output.weights)
                self._base.confirm()
                output.finish()
            if state:
                durable.remove(state)  # the one before, which only this one needed
            state = output.state_folder
        return Made(
            output.published,
            output.entries,
            output.state_folder,
            output.state_entry,
            totals,
            self._settings.publish.dtype,
        )

    def linked(self, head: str, source: Home, number: int, totals: Totals) -> Made:
        """Version `number` of the head in `source`, this home or another on the same disk, under further names."""
        self._base.check()
        self._base.confirm()  # nothing may have been folded
        folder = self._folder / head
        content = json.loads(source.manifest(head, number).read_bytes())
        published, state_folder = folder / "published", folder / "state"
        durable.make_folder(published, public=True)
        made_anew = [name for name in (file["name"] for file in content["files"]) if name == CARD or is_adapter(name)]
        weights = [FileEntry(**file) for file in content["files"] if file["name"] not in made_anew]
        for file in weights:
            durable.make_folder((published / file.name).parent, public=True)
            durable.link_or_copy(source.version(head, number) / file.name, published / file.name)
        state = None
        if content["state"]:
            state = FileEntry(**content["state"])
            durable.make_folder(state_folder)
            durable.link_or_copy(source.head_state(head, number) / STATE_FILE, state_folder / STATE_FILE)
        return Made(published, weights, state_folder, state, totals, content["dtype"], content["approximate"])

    def place(self, live: LiveHead, number: int, made: Made, origin: Origin) -> NewVersion:
        """Seals a version and renames it into place; nothing names it yet."""
        adapter = self._adapting.write(live.head.name, made.published, made.weights, origin.base.name)
        sealed = seal(
            self._home,
            live,
            number,
            made.published,
            made.weights,
            made.state,
            made.totals,
            origin=origin,
            beside=self._base.beside,
            dtype=made.dtype,
            approximate=made.approximate,
            withdrawal=made.withdrawal,
            adapter=adapter,
        )
        targets = [(made.published, self._home.version(live.head.name, number))]
        if made.state:
            durable.sync_folder(made.state_folder)
            targets.append((made.state_folder, self._home.head_state(live.head.name, number)))
        for source, target in targets:
            remove_whole(self._home, target)  # left by one that was cut short
            durable.rename(source, target)
        return sealed

    def commit(
        self, store: Store, heads: Sequence[LiveHead], made: Mapping[str, Made], gone: Sequence[Expert] = ()
    ) -> int:
        """Publishes a version of every head, in which the experts `gone` are no more; returns its number."""
        number = next_number(heads)
        hit("publish.before")
        of = origin(store, gone=gone)
        versions = [self.place(live, number, made[live.head.name], of) for live in heads]
        hit("publish.after")
        hit("commit.before")
        store.restate(versions, [expert.id for expert in gone])
        hit("commit.after")
        for head in store.heads():
            point_latest(self._home, head)
        collect(self._home, store, self._settings.retention)
        return number

    def _sweep_bytes(self) -> int:
        return sum(spec.nbytes for spec in self._base.tensors.schema.values() if spec.merged)


def unlike(expert: Expert, sha256: str | None, sidecars: Mapping[str, str]) -> str | None:
    """How what was read now differs from what was merged, in words; None where it does not.

    sidecars: the sha256 of each that was read now. One that nobody read when the expert was merged can be any.
    """
    if sha256 != expert.sha256:
        return "its weights are others"
    known = expert.sidecars or {}
    others = [kind for kind, digest in sidecars.items() if known.get(kind, digest) != digest]
    return f"its {others[0]}.safetensors is another" if others else None


def _check(path: Path, source: OpenCheckpoint, norm: float, expert: Expert) -> None:
    """Once it has been folded: what was read must be what was merged."""
    why = unlike(expert, source.identity(), source.sidecar_digests())
    if not why and expert.norm is not None and not isclose(norm, expert.norm, rel_tol=SAME_NORM):
        why = f"its task vector has norm {norm:.6g}, it had {expert.norm:.6g}"
    if why:
        raise BadHome(f"{path} is not what was merged: {why}", "restore it from a backup; nothing was published")


def next_number(heads: Sequence[LiveHead]) -> int:
    """The number of the next version, which is the same for every head."""
    return max(live.head.newest for live in heads) + 1


def _state(folder: Path, files: ExitStack) -> TensorReader:
    fd = os.open(folder / STATE_FILE, os.O_RDONLY | os.O_CLOEXEC)
    files.callback(os.close, fd)
    return TensorReader(fd)
