"""A next version of a home's heads that folds no new expert: experts are taken out, or a head is refined.

It is published as any other: files first, all durable, then renamed into place, then ONE transaction.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import isclose
from pathlib import Path
from typing import Any
from uuid import uuid4

from daemon.arrivals.admission import naming_of
from daemon.arrivals.identity import SAME_NORM
from daemon.arrivals.trained_from import Start
from daemon.checkpoints.checkpoint import OpenCheckpoint, open_path
from daemon.compute.open_files import allow_open_files
from daemon.compute.progress import Progress
from daemon.compute.resources import driver
from daemon.config import Settings
from daemon.disk import durable
from daemon.disk.failpoints import hit
from daemon.errors import BadHome, Reason, Refused
from daemon.evaluation.evaluator import command_sha256
from daemon.evaluation.rules import unjudged
from daemon.evaluation.scoring import weights_sha256
from daemon.home.ground import Base, States, sound_ground
from daemon.layout import CARD, STATE_FILE, Home, is_adapter
from daemon.manifest import Manifest
from daemon.merge.folding import Folding
from daemon.merge.gate import REJECTED, Gate, Judged, judges
from daemon.notation import called
from daemon.versions.adapter import Adapting
from daemon.versions.heads import HeadTip
from daemon.versions.latest import follow_live
from daemon.versions.retention import collect, remove_whole
from daemon.versions.sealing import Origin, origin, publish, seal, stage
from daemon.versions.writing import Outputs, Written
from projector.files.source import Checkpoint
from projector.files.tensorfile import TensorReader
from projector.method import Contribution, Method, Totals
from projector.methods import make
from registry.reader import Reader
from registry.records import Expert, NewIntervention, NewVersion
from registry.store import Store

Weigh = Callable[[Checkpoint, Sequence[Checkpoint], Outputs, Path], Mapping[str, Any]]
"""Writes a version's weights out of the base and its experts; a folder for what is gone afterwards. It says what the
manifest is to say."""


@dataclass(frozen=True)
class Arrival:
    """An expert in the archive: its file or folder, how it counts, as what it was merged, and what it was trained from,
    where the head goes by that."""

    path: Path
    contribution: Contribution
    expert: Expert
    start: Start | None = None


class Restating:
    """One such version in the making. The caller holds the home's lock. Use it as a context manager."""

    def __init__(self, home: Home, reader: Reader, settings: Settings, progress: Progress) -> None:
        self._home = home
        self._reader = reader
        self._settings = settings
        self._progress = progress
        self._closing = ExitStack()
        self._base = self._closing.enter_context(Base(home, reader, progress))
        self._folding = Folding(self._base, settings.publish, driver(settings.compute, progress))
        self._adapting = Adapting(home, self._base.tensors, settings, progress)
        self._folder = home.tmp / uuid4().hex
        self._closing.callback(durable.remove, self._folder)

    def __enter__(self) -> "Restating":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def folded(
        self, source: Home, tip: HeadTip, method: Method, totals: Totals, arrivals: Sequence[Arrival]
    ) -> Written:
        """Folds these experts, one or more, onto the state of a live version of `source`, and reads out the weights.

        method, totals: by which, and counted from there.
        """
        states, written = States(source, self._progress), None
        for place, one in enumerate(arrivals, start=1):
            last = place == len(arrivals)
            self._progress.begin(self._folding.work_bytes([method], weights=last))
            with ExitStack() as files:
                before = _state(written, files) if written else states.open(tip, self._base.tensors.schema, files)
                output = self._folding.outputs(self._folder / tip.head.name / str(place), method, files, weights=last)
                read = files.enter_context(self._opened(one.path, one.expert, method))
                read.check(self._base.tensors)
                begun = one.start.opened(read, files, self._progress) if one.start else None
                with sound_ground(self._base, states, begun.confirm if begun else lambda: None):
                    origin = begun.tensors if begun else None
                    head = self._folding.head(read, method, totals, one.contribution, before, output, origin=origin)
                    folded = self._folding.fold(read, [head])
                (totals,) = folded.totals
                _check(one.path, read, one.expert, folded.task_vector.whole)
                with sound_ground(self._base, states):
                    now = self._folding.read_out(method, totals, output)
            if written:
                durable.remove(written.state_folder)  # which only this one needed
            written = now
        assert written
        return replace(written, record_file=None, record=None)  # kept of each expert since it was merged

    def _opened(self, path: Path, expert: Expert, method: Method) -> OpenCheckpoint:
        """An expert in the archive, as it was taken when it was merged."""
        naming = naming_of(expert, self._settings.admission)
        return open_path(path, self._progress, follow=False, needs=method.needs, naming=naming)

    def linked(self, head: str, source: Home, number: int, totals: Totals) -> Written:
        """Version `number` of the head in `source`, this home or another on the same disk, under further names."""
        self._base.check()
        self._base.confirm()  # nothing may have been folded
        folder = self._folder / head
        manifest = Manifest.read(source.manifest(head, number).read_bytes())
        published = folder / "published"
        state_folder = self._linked_state(head, source, number, manifest)
        durable.make_folder(published, public=True)
        weights = [file for name, file in manifest.files.items() if name != CARD and not is_adapter(name)]
        for file in weights:
            durable.make_folder((published / file.name).parent, public=True)
            durable.link_or_copy(source.version(head, number) / file.name, published / file.name)
        said = manifest.content
        return Written(
            published,
            weights,
            state_folder,
            manifest.state,
            totals,
            said["dtype"],
            said["approximate"],
            adamerging=said.get("adamerging"),
        )

    def _linked_state(self, head: str, source: Home, number: int, manifest: Manifest) -> Path:
        state_folder = self._folder / head / "state"
        if manifest.state:
            durable.make_folder(state_folder)
            durable.link_or_copy(source.head_state(head, number) / STATE_FILE, state_folder / STATE_FILE)
        return state_folder

    def reweighted(self, source: Home, tip: HeadTip, number: int, arrivals: Sequence[Arrival], weigh: Weigh) -> Written:
        """Version `number` of a head in `source` with other weights, which `weigh` writes; it folds on as it would.

        Raises BadHome where these experts are not what was merged, or change meanwhile, and what `weigh` raises.
        """
        head, folder = tip.head.name, self._folder / tip.head.name
        manifest = Manifest.read(source.manifest(head, number).read_bytes())
        state_folder = self._linked_state(head, source, number, manifest)
        work = folder / "work"
        durable.make_folder(work)
        allow_open_files()  # all experts are open at a time, an adapter as three files
        with ExitStack() as files:
            experts = [files.enter_context(self._opened(one.path, one.expert, tip.method)) for one in arrivals]
            output = self._folding.outputs(folder / "weights", make("zero_shot"), files)  # no state of its own
            self._base.check()
            self._base.confirm()
            for one, read in zip(arrivals, experts, strict=True):
                read.check(self._base.tensors)
                _check(one.path, read, one.expert)
            said = weigh(self._base.tensors, [read.tensors for read in experts], output, work)
            self._base.check()
            if changed := next(
                (one for one, read in zip(arrivals, experts, strict=True) if not read.unchanged()), None
            ):
                raise BadHome(f"{changed.path} changed while it was read", "leave it alone; the same command goes on")
            written = output.finish(tip.totals, self._settings.publish.dtype)
        durable.remove(work)
        return replace(
            written, state_folder=state_folder, state=manifest.state, record_file=None, record=None, adamerging=said
        )

    def place(
        self,
        store: Store,
        heads: Sequence[HeadTip],
        number: int,
        written: Mapping[str, Written],
        origin: Origin,
        weighed: Collection[str] = (),
    ) -> list[NewVersion]:
        """Seals a version of each of these heads, and renames it into place; nothing names it yet.

        weighed: the heads whose weights are new; the gate judges them as it does an arrival's. Raises Refused where it
        rejects one, and then nothing is in place.
        """
        for tip in heads:
            stage(self._home, written[tip.head.name], self._base.beside)
        judged = self._judge(store, [tip for tip in heads if tip.head.name in weighed], number, written)
        sealed = []
        for tip in heads:
            one = written[tip.head.name]
            sealed.append(self._seal(tip, number, one, origin, judged.get(tip.head.name) or self._as_before(tip, one)))
        hit("publish.before")
        for name in (tip.head.name for tip in heads):
            for left in (self._home.version(name, number), self._home.head_state(name, number)):
                remove_whole(self._home, left)  # by one that was cut short
            publish(self._home, name, number, written[name])
        hit("publish.after")
        return sealed

    def _judge(
        self, store: Store, heads: Sequence[HeadTip], number: int, written: Mapping[str, Written]
    ) -> dict[str, Judged]:
        """What the gate says of these heads' versions, by head. Raises Refused where it rejects one."""
        gate = Gate(self._home, store, self._settings.evaluate, self._progress)
        if gate.open or not heads:
            return {}
        hit("evaluate.before")
        said = gate.judge(heads, number, [written[tip.head.name] for tip in heads])
        hit("evaluate.after")
        judged = {tip.head.name: one for tip, one in zip(heads, said, strict=True)}
        if rejected := next((name for name, one in judged.items() if one.outcome == REJECTED), None):
            raise Refused(
                Reason.SCORES,
                f"{called(rejected, number)} breaks a rule: {judged[rejected].why}",
                "nothing of it was published; make it otherwise, or, where it is wanted all the same, loosen"
                " evaluate.require: the same command goes on",
            )
        return judged

    def _as_before(self, tip: HeadTip, written: Written) -> Judged:
        """What was said of the version before, where this one has its weights."""
        last = tip.version
        if last.verdict is None:
            return Judged()
        before = Manifest.read(self._home.manifest(last.head, last.number).read_bytes()).files.values()
        if weights_sha256(before) != weights_sha256(written.weights):
            return Judged()
        return Judged(verdict=last.verdict, evaluation=self._reader.evaluation(last.evaluation))

    def _seal(self, tip: HeadTip, number: int, written: Written, origin: Origin, judged: Judged) -> NewVersion:
        """Where experts were taken out nobody evaluates it: to hold it would leave live what a person takes out. The
        gate's heads have that as their verdict, and the scores of the same weights, where these are known."""
        name, gate = tip.head.name, self._settings.evaluate
        adapter = self._adapting.write(name, written.published, written.weights, origin.base.name)
        if written.withdrawal and judges(gate, name):
            known = self._reader.evaluated(weights_sha256(written.weights), command_sha256(gate))
            why = f"experts were taken out; `{judging(name, number)}` scores and judges it"
            judged = Judged(verdict=unjudged(why), evaluation=known)
        scores, verdict, found = judged.scores, judged.verdict, judged.evaluation
        sealed = seal(self._home, tip, number, written, origin=origin, adapter=adapter, scores=scores, verdict=verdict)
        return replace(sealed, held=judged.held, evaluation=found.id if found else None)

    def commit(
        self,
        store: Store,
        heads: Sequence[HeadTip],
        written: Mapping[str, Written],
        gone: Sequence[Expert] = (),
        deed: NewIntervention | None = None,
        waiting: Collection[str] = (),
        weighed: Collection[str] = (),
    ) -> int:
        """Publishes a version of every head, in which the experts `gone` are no more by that deed; says its number.

        waiting: heads to which nothing was done and whose newest version is not live: nor is this one, for the same
        reason. weighed: as in `place`.
        """
        number = next_number(heads)
        versions = self.place(store, heads, number, written, origin(store, gone=gone), weighed)
        why = {tip.head.name: tip.version.held for tip in heads if tip.head.name in waiting}
        versions = [replace(one, held=why.get(one.head, one.held)) for one in versions]
        hit("commit.before")
        learned = [head for head, one in written.items() if one.adamerging]
        passed = [one.head for one in versions if one.head in weighed and one.verdict and not one.held]
        store.restate(versions, [expert.id for expert in gone], deed, learned, waiting, passed)
        hit("commit.after")
        follow_live(self._home, store)
        collect(self._home, store, self._settings.retention)
        return number


def unlike(expert: Expert, sha256: str | None, sidecars: Mapping[str, str]) -> str | None:
    """How what was read now differs from what was merged, in words; None where it does not.

    sidecars: the sha256 of each that was read now. One that nobody read when the expert was merged can be any.
    """
    if sha256 != expert.sha256:
        return "its weights are others"
    known = expert.sidecars or {}
    others = [kind for kind, digest in sidecars.items() if known.get(kind, digest) != digest]
    return f"its {others[0]}.safetensors is another" if others else None


def _check(path: Path, source: OpenCheckpoint, expert: Expert, norm: float | None = None) -> None:
    """What was read must be what was merged. norm: that of its task vector, once it has been folded."""
    why = unlike(expert, source.identity(), source.sidecar_digests())
    if not why and norm is not None and expert.norm is not None and not isclose(norm, expert.norm, rel_tol=SAME_NORM):
        why = f"its task vector has norm {norm:.6g}, it had {expert.norm:.6g}"
    if why:
        raise BadHome(f"{path} is not what was merged: {why}", "restore it from a backup; nothing was published")


def judging(head: str, number: int) -> str:
    """The command that scores and judges a version that nobody judged."""
    return f"mainstem evaluate {called(head, number)}"


def next_number(heads: Sequence[HeadTip]) -> int:
    """The number of the next version, which is the same for every head."""
    return max(tip.head.newest for tip in heads) + 1


def _state(written: Written, files: ExitStack) -> TensorReader:
    fd = os.open(written.state_folder / STATE_FILE, os.O_RDONLY | os.O_CLOEXEC)
    files.callback(os.close, fd)
    return TensorReader(fd)
