"""The publish protocol, top to bottom: from a settled drop to a version that everyone sees.

1 take        open the expert; from here on its descriptors count, not its name
2 reserve     check it against the base; reserve space for all that will be written
3 fold        read each tensor once, hash it on the way, write every head's new state
4 identify    its weights' digest is its identity, and that of its tensors: a duplicate is set aside, one that changed
              is tried again
5 read out    write every head's published weights
6 judge       evaluate each head's version where that is set up: it may be held, or the expert rejected
7 seal        sync every file; write the manifests; sync the folders
8 publish     rename everything into place
9 commit      ONE transaction in the registry: before it nothing happened, after it everything did
10 tidy       latest, archive, retention: derived, repeatable, finished by recovery after a crash
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from daemon.arrivals.admission import ENOUGH_TO_FLAG, USUAL_EXPERTS, check_norm, flagged, oddities, usual_norm
from daemon.arrivals.arrival import check_arrival
from daemon.arrivals.blame import blaming
from daemon.arrivals.filing import note_place, place
from daemon.arrivals.identity import twin_of
from daemon.arrivals.inbox import Drop, entry_id
from daemon.arrivals.recording import arrived, changed, once_blocked, refused
from daemon.arrivals.trained_from import Start, TrainedFrom, named_version
from daemon.checkpoints.adapter_modules import read_config
from daemon.checkpoints.checkpoint import OpenCheckpoint, open_checkpoint
from daemon.compute.progress import Abandoned, Progress
from daemon.compute.resources import check_budget, driver, longest_seconds
from daemon.config import Settings
from daemon.disk import durable
from daemon.disk.failpoints import hit
from daemon.errors import BadHome, DaemonError, Failed, NotYet, Reason, Refused
from daemon.home.ground import Base, States, damaged, sound_ground, touched_meanwhile
from daemon.home.standing import back
from daemon.home.uncommitted import clear, remove_temporary, temporaries
from daemon.layout import Home
from daemon.merge.folding import Folding
from daemon.merge.gate import REJECTED, Gate, Judged
from daemon.merge.preparing import Preparations
from daemon.versions.adapter import Adapting
from daemon.versions.heads import HeadTip, head_tips, relative_heads
from daemon.versions.latest import follow_live
from daemon.versions.modules import check_modules
from daemon.versions.retention import collect
from daemon.versions.sealing import origin, publish, seal, stage
from daemon.versions.writing import Outputs, Written
from projector.driver.head import Folded
from projector.errors import BadFile, BadMerged, DeviceLost, ProjectorError
from projector.files.tensorfile import TensorReader
from projector.method import Contribution, Totals
from projector.methods import make
from projector.names.naming import Naming
from registry.errors import RegistryError
from registry.records import Evaluation, Expert, NewExpert, NewVersion, Status
from registry.store import Store


@dataclass(frozen=True)
class Again:
    """What is known of an expert that was merged before: how its names became the base's, and what it was trained from,
    where that counts."""

    naming: Naming
    start: Start | None = None


class Merger:
    """Merges one drop after another into every head of a home. The caller holds the home's lock."""

    def __init__(
        self,
        home: Home,
        store: Store,
        settings: Settings,
        progress: Progress,
        judging: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """judging: is entered while an evaluator runs, whose end, or ours meanwhile, is no expert's doing."""
        self._home = home
        self._judging = judging
        self._store = store
        self._settings = settings
        self._progress = progress
        self._driver = driver(settings.compute, progress)
        self._methods = {head.name: make(head.method, head.params) for head in store.heads()}
        self._needs = sorted({need for method in self._methods.values() for need in method.needs})
        self._base = Base(home, store, progress)
        self._states = States(home, progress)
        self._states.check(head_tips(store, self._methods), self._base.tensors.schema)
        self._base_config = read_config(home.base)
        self._folding = Folding(self._base, settings.publish, self._driver)
        self._adapting = Adapting(home, self._base.tensors, settings, progress)
        reserved = self._driver.device.slab_bytes
        methods, self._relative = list(self._methods.values()), relative_heads(store)
        check_budget(self._base.tensors.schema, methods, settings.compute, reserved, origin=bool(self._relative))
        self.longest_seconds = longest_seconds(self._base.tensors.schema, list(self._methods.values()))
        self.preparations = Preparations(home, self._driver, self._base.tensors)
        self.preparations.follow(head_tips(store, self._methods))

    @property
    def device(self) -> str:
        """Where it computes: a card by its name."""
        device = self._driver.device
        return "cpu" if device.where.type == "cpu" else f"{device.where}, {device.name}"

    def close(self) -> None:
        """Lets go of the base and of what is being prepared."""
        self.preparations.close()
        self._base.close()

    def adopt(self, settings: Settings) -> None:
        """Takes the next expert by these settings; how versions look and are computed stays as it is.

        Raises BadConfig, and then nothing has changed.
        """
        self._adapting = Adapting(self._home, self._base.tensors, settings, self._progress)
        self._settings = settings

    def take(self, drop: Drop, again: Again | None = None) -> Expert:
        """Merges, recognises or refuses one drop, and tidies up after it; see `decide`."""
        recorded = self.decide(drop, again)
        self.tidy(recorded)
        return recorded

    def decide(self, drop: Drop, again: Again | None = None) -> Expert:
        """Merges, recognises or refuses one drop; returns what the registry says of it. `tidy` is to follow.

        again: of an expert that was merged before; what was taken once is taken again.

        Raises NotYet where it must be looked at again later, Failed where it should be tried again a few times, OSError
        where the disk fails (see durable.is_full), BadHome where the home itself is at fault, and Abandoned where the
        daemon is stopping; the drop is then still in the inbox and nothing else has changed.
        """
        try:
            start = again.start if again else None
            with self._opened(drop, again.naming if again else self._settings.admission.naming) as expert:
                hit("take.opened")
                self._check_entry(drop)
                try:
                    with blaming(expert):
                        if not again:
                            check_arrival(expert, self._base.tensors.schema)
                            named = named_version(self._store, expert.about)
                            start = Start(self._home, named) if named else None
                        expert.check(self._base.tensors, None if again else self._base_config)
                        if not again:
                            check_modules(expert.folder, self._home.base)
                        expert.digest_tensors()
                    return self._merge(drop, expert, start, again=again is not None)
                except (ProjectorError, Refused) as error:
                    self._check_ours(error, expert)
                    if expert.unchanged():
                        raise
                    raise changed(drop) from None  # what it found may be half of the old and half of the new
                except Failed:
                    if not expert.unchanged():
                        raise changed(drop) from None
                    raise
        except Failed as error:
            if error.reason is Reason.FAULT:
                self._check_folds()
            raise
        except NotYet as error:
            if error.reason is Reason.CHANGED or drop.rest_seconds < self._settings.inbox.patience_with(error.reason):
                raise
            return self.refuse(drop, error)
        except (Refused, ProjectorError) as error:
            return self.refuse(drop, error)

    def refuse(self, drop: Drop, error: DaemonError | ProjectorError) -> Expert:
        """Notes that the drop is refused, and why. `tidy` is to follow."""
        recorded = self._store.record(self._refused(drop, arrived(drop, Status.QUARANTINED), error))
        hit("refuse.recorded")
        return recorded

    def _refused(self, drop: Drop, expert: NewExpert, error: DaemonError | ProjectorError) -> NewExpert:
        return refused(expert, error, self._store.last_expert_id() + 1, drop, self._home)  # nobody else records any

    def tidy(self, expert: Expert) -> bool:
        """Finishes an expert whose fate is recorded; False where it cannot be moved out of the inbox.

        Raises OSError or DiskFull: `finish` is then to be asked, once there is room.
        """
        placed = self._tidy(expert)
        if expert.status is Status.MERGED:
            self.preparations.follow(head_tips(self._store, self._methods))
        return placed

    def again(self, expert: Expert, *, there: bool) -> None:
        """Looks once more at an expert whose fate is recorded and which could not be moved, now that it has changed, or
        is not `there` any more. One that was refused is let go: it is taken anew. Raises as `tidy`, and Abandoned.
        """
        if there and expert.status is Status.QUARANTINED:
            note_place(self._store, expert)
        else:
            place(self._home, self._store, expert, self._progress)

    def finish(self) -> list[Expert]:
        """Tidies up after the recorded experts that are still in the inbox, where something was in the way; returns
        them. Raises OSError or DiskFull where it still is.
        """
        self.preparations.discard()
        for path in temporaries(self._home):  # to remove it may have been what failed
            remove_temporary(path)
        unplaced = self._store.unplaced()
        for expert in unplaced:
            self._tidy(expert)
        collect(self._home, self._store, self._settings.retention, self._progress.goes_on)  # time may have made room
        self.preparations.follow(head_tips(self._store, self._methods))
        return unplaced

    def follow(self) -> None:
        """Turns to the heads as they are now: somebody else published a version of them."""
        self.preparations.follow(head_tips(self._store, self._methods))

    def _opened(self, drop: Drop, naming: Naming) -> OpenCheckpoint:
        with ExitStack() as closing:
            try:  # anew for each: another folder may have taken the inbox's place
                inbox = os.open(self._home.inbox, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                raise changed(drop) from None
            closing.callback(os.close, inbox)
            with blaming():
                return open_checkpoint(inbox, drop.name, needs=self._needs, watch=self._progress, naming=naming)

    def _merge(self, drop: Drop, expert: OpenCheckpoint, start: Start | None, *, again: bool) -> Expert:
        started = time.monotonic()
        heads = head_tips(self._store, self._methods)
        number = max(tip.head.newest for tip in heads) + 1
        clear(self._home, self._store)  # left by a commit that failed: its space may be what is missing
        self._progress.begin(self._work_bytes())
        folder = self._home.tmp / uuid4().hex
        try:
            with ExitStack() as files:
                outputs = [self._outputs(tip, folder, files) for tip in heads]
                descriptors = [fd for output in outputs for fd in output.descriptors]
                with durable.flushing(descriptors), blaming(expert):
                    begun = start.opened(expert, files, self._progress) if start and self._relative else None
                    with self._sound_ground(heads, begun):
                        folded = self._fold(expert, heads, outputs, files, begun)
                    new = self._identify(drop, expert, folded, start, again=again)
                    if new.status is not Status.MERGED:
                        return self._store.record(new)
                    with self._sound_ground(heads):
                        written = self._read_out(heads, folded.totals, outputs)
                with self._progress.phase("fsync"):
                    files.close()
            for one in written:
                stage(self._home, one, self._base.beside)
            judged, alone = self._judge(heads, number, written, new, expert, again)
            if rejected := [one for one in judged if one.outcome == REJECTED]:
                return self._store.record(self._rejected(drop, new, rejected[0]))
            with blaming(expert):
                versions = [
                    self._seal(tip, number, one, new, verdict)
                    for tip, one, verdict in zip(heads, written, judged, strict=True)
                ]
            self._publish(heads, number, written)
            with self._progress.phase("fsync"), blaming(expert):
                expert.sync()
            hit("commit.before")
            seconds = time.monotonic() - started
            merged = self._store.commit(new, [replace(version, seconds=seconds) for version in versions])
            hit("commit.after")
            if alone:
                self._store.judge_expert(merged.id, alone.id)
            self._states.written([(version.head, number, version.manifest_sha256) for version in versions])
            return merged
        finally:
            durable.remove(folder)

    def _work_bytes(self) -> int:
        return self._folding.work_bytes(self._methods.values()) + self._adapting.work_bytes(self._methods)

    def _outputs(self, tip: HeadTip, folder: Path, files: ExitStack) -> Outputs:
        return self._folding.outputs(folder / tip.head.name, tip.method, files)

    def _fold(
        self,
        expert: OpenCheckpoint,
        heads: Sequence[HeadTip],
        outputs: Sequence[Outputs],
        files: ExitStack,
        begun: TrainedFrom | None = None,
    ) -> Folded:
        hit("fold.before")
        folds = [
            self._folding.head(
                expert,
                tip.method,
                tip.totals,
                Contribution(tip.totals.experts + 1, weight=expert.weight),
                self._state(tip, files),
                output,
                self.preparations.ready(tip),
                begun.tensors if begun and tip.head.name in self._relative else None,
            )
            for tip, output in zip(heads, outputs, strict=True)
        ]
        folded = self._folding.fold(expert, folds)
        hit("fold.after")
        return folded

    def _sound_ground(self, heads: Sequence[HeadTip], begun: TrainedFrom | None = None) -> AbstractContextManager[None]:
        """What is read in the block is the base, each head's own state, what was prepared from it and what the expert
        was trained from, or it raises."""

        def confirm_others() -> None:
            if begun:
                begun.confirm()
            for tip in heads:
                if self.preparations.touched(tip):
                    raise touched_meanwhile(f"what was prepared for {tip.head.name}")

        return sound_ground(self._base, self._states, confirm_others)

    def _state(self, tip: HeadTip, files: ExitStack) -> TensorReader | None:
        return self._states.open(tip, self._base.tensors.schema, files) if tip.totals.experts else None

    def _identify(
        self, drop: Drop, expert: OpenCheckpoint, folded: Folded, start: Start | None, *, again: bool
    ) -> NewExpert:
        sha256, content, sidecars = expert.identity(), expert.content(), expert.sidecar_digests()
        altered = expert.tensors.altered
        if not expert.unchanged():
            raise changed(drop)
        trained_head, trained_version = start.noted(self._home, self._store) if start else (None, None)
        new = replace(
            arrived(drop, Status.MERGED),
            kind=expert.kind,
            sha256=sha256,
            content_sha256=content,
            norm=folded.task_vector.whole,
            about=expert.about.given() if expert.about else None,
            sidecars=sidecars or None,
            naming=expert.naming.noted(),
            trained_head=trained_head,
            trained_version=trained_version,
        )
        if twin := twin_of(
            self._home,
            self._store,
            expert,
            folded.task_vector.whole,
            self._base.tensors,
            self._settings,
            again=again,
            watch=self._progress,
        ):
            return replace(new, status=Status.DUPLICATE, duplicate_of=twin.id)
        if not again and (blocked := self._store.blocked(sha256, content)):
            return once_blocked(new, blocked)
        if again and self._store.merged_content(content):  # merged twice, when only the same files were the same expert
            new = replace(new, content_sha256=None)
        norms, limits = self._store.merged_norms(limit=USUAL_EXPERTS), self._settings.admission
        try:
            check_norm(folded, usual_norm(norms), limits)
        except Refused as error:
            return self._refused(drop, new, error)
        usual = usual_norm(norms, ENOUGH_TO_FLAG)
        return flagged(new, oddities(folded.task_vector.whole, usual, limits, expert.tensors.resized, altered))

    def _read_out(
        self, heads: Sequence[HeadTip], totals: Sequence[Totals], outputs: Sequence[Outputs]
    ) -> list[Written]:
        written = [
            self._folding.read_out(tip.method, after, output)
            for tip, after, output in zip(heads, totals, outputs, strict=True)
        ]
        hit("read_out.after")
        return written

    def _judge(
        self,
        heads: Sequence[HeadTip],
        number: int,
        written: Sequence[Written],
        new: NewExpert,
        expert: OpenCheckpoint,
        again: bool,
    ) -> tuple[list[Judged], Evaluation | None]:
        """What the gate says of each head's version, which can be loaded by now, and the evaluation of the expert by
        itself, if there is one. What was merged once is not judged.
        """
        gate = Gate(self._home, self._store, self._settings.evaluate, self._progress)
        if again or gate.open:
            return [Judged() for _ in heads], None
        hit("evaluate.before")
        with self._judging(), self._progress.phase("evaluate"), ExitStack() as closing:
            folder = self._home.tmp / uuid4().hex
            closing.callback(durable.remove, folder)
            found = gate.judge(heads, number, written, new, lambda: self._by_itself(expert, folder))
        hit("evaluate.after")
        return found, gate.alone

    def _by_itself(self, expert: OpenCheckpoint, folder: Path) -> Written:
        """The expert alone, as a version would be."""
        with self._sound_ground(()):
            written = self._folding.alone(expert, folder)
        stage(self._home, written, self._base.beside)
        return written

    def _rejected(self, drop: Drop, new: NewExpert, judged: Judged) -> NewExpert:
        number = self._store.last_expert_id() + 1
        commands = " and ".join(f"`{command}`" for command in back(number, blocked=True))
        hint = (
            "nothing of it was merged; train it anew, or, where it is wanted all the same, loosen evaluate.require,"
            f" `mainstem reload`, then {commands}"
        )
        error = Refused(Reason.SCORES, f"a merged model with it breaks a rule: {judged.why}", hint)
        return replace(self._refused(drop, new, error), verdict=judged.verdict)

    def _seal(self, tip: HeadTip, number: int, written: Written, expert: NewExpert, judged: Judged) -> NewVersion:
        """Puts an adapter, where one is wanted, card and manifest beside the weights, all durable."""
        base_name = self._store.base().name
        adapter = self._adapting.write(tip.head.name, written.published, written.weights, base_name)
        of, evaluation = origin(self._store, expert), judged.evaluation
        with self._progress.phase("fsync"):
            sealed = seal(
                self._home,
                tip,
                number,
                written,
                origin=of,
                adapter=adapter,
                scores=judged.scores,
                verdict=judged.verdict,
            )
        return replace(sealed, held=judged.held, evaluation=evaluation.id if evaluation else None)

    def _publish(self, heads: Sequence[HeadTip], number: int, written: Sequence[Written]) -> None:
        hit("publish.before")
        for tip, one in zip(heads, written, strict=True):
            publish(self._home, tip.head.name, number, one)
        hit("publish.after")

    def _check_ours(self, error: ProjectorError | Refused, expert: OpenCheckpoint) -> None:
        """Raises BadHome where it was our own state or base that made an expert look bad."""
        if isinstance(error, BadFile) and error.fd is not None and not expert.holds(error.fd):
            raise damaged(error) from error
        if isinstance(error, BadMerged):
            self._check_folds()

    def _check_folds(self) -> None:
        """Raises BadHome where not even the base itself, a task vector of zeros, can be folded: then what went wrong
        depends on the heads' state or on this machine, and no expert is to blame. Nothing is kept of it.
        """
        heads = [tip for tip in head_tips(self._store, self._methods) if not tip.method.needs]
        folder = self._home.tmp / uuid4().hex
        try:
            with ExitStack() as files:
                outputs = [self._outputs(tip, folder, files) for tip in heads]
                folded = self._fold(self._base.checkpoint, heads, outputs, files)
                written = self._read_out(heads, folded.totals, outputs)
            for tip, one in zip(heads, written, strict=True):
                if tip.totals.experts:
                    self._adapting.write(tip.head.name, one.published, one.weights, self._store.base().name)
        except (OSError, RegistryError, DeviceLost, Abandoned):
            raise
        except Exception as error:
            raise BadHome(
                f"nothing can be merged, not even the base itself: {type(error).__name__}: {error}",
                "the experts are still in the inbox; `mainstem verify` tells whether the state is damaged; if it is "
                "not, look at this machine's memory and device (compute.memory_budget, compute.device)",
            ) from error
        finally:
            durable.remove(folder)

    def _check_entry(self, drop: Drop) -> None:
        """What was opened is what was seen at rest: it may have been replaced while it waited for its turn."""
        try:
            same = entry_id(self._home.inbox / drop.name) == drop.entry
        except OSError:
            same = False
        if not same:
            raise changed(drop)

    def _tidy(self, expert: Expert) -> bool:
        """Finishes an expert whose fate is recorded; False where it cannot be moved out of the inbox."""
        if expert.status is Status.MERGED:
            follow_live(self._home, self._store)
            hit("latest.after")
        placed = place(self._home, self._store, expert, self._progress)
        collect(self._home, self._store, self._settings.retention, self._progress.goes_on)
        return placed
