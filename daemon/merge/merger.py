"""The publish protocol, top to bottom: from a settled drop to a version that everyone sees.

1 take        open the expert; from here on its descriptors count, not its name
2 reserve     check it against the base; reserve space for all that will be written
3 fold        read each tensor once, hash it on the way, write every head's new state
4 identify    its weights' digest is its identity, and that of its tensors: a duplicate is set aside, one that changed
              is tried again
5 read out    write every head's published weights
6 seal        sync every file; write the manifests; sync the folders
7 publish     rename everything into place
8 commit      ONE transaction in the registry: before it nothing happened, after it everything did
9 tidy        latest, archive, retention: derived, repeatable, finished by recovery after a crash
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from daemon.arrivals.admission import USUAL_EXPERTS, check_norm, flagged, oddities, usual_norm
from daemon.arrivals.arrival import check_arrival
from daemon.arrivals.blame import blaming
from daemon.arrivals.filing import note_place, place
from daemon.arrivals.identity import twin_of
from daemon.arrivals.inbox import Drop, entry_id
from daemon.arrivals.origin import origin_of
from daemon.arrivals.recording import arrived, changed, refused
from daemon.checkpoints.adapter_modules import read_config
from daemon.checkpoints.checkpoint import OpenCheckpoint, open_checkpoint
from daemon.compute.progress import Abandoned, Progress
from daemon.compute.resources import check_budget, driver
from daemon.config import Settings
from daemon.disk import durable
from daemon.disk.failpoints import hit
from daemon.errors import BadHome, DaemonError, Failed, NotYet, Reason, Refused
from daemon.home.ground import Base, States, damaged, touched_meanwhile
from daemon.home.uncommitted import clear, temporaries
from daemon.layout import Home
from daemon.merge.preparing import Preparations
from daemon.versions.adapter import Adapting
from daemon.versions.heads import LiveHead, live_heads
from daemon.versions.latest import point_latest
from daemon.versions.modules import check_modules
from daemon.versions.retention import collect
from daemon.versions.sealing import origin, seal
from daemon.versions.writing import Outputs, weights_plan
from projector.driver.head import Folded, HeadFold, Norms
from projector.errors import BadFile, BadMerged, DeviceLost, ProjectorError
from projector.files.tensorfile import TensorReader
from projector.method import Contribution, Totals
from projector.methods import make
from projector.names.naming import Naming
from registry.errors import RegistryError
from registry.records import Expert, NewExpert, NewVersion, Status
from registry.store import Store


class Merger:
    """Merges one drop after another into every head of a home. The caller holds the home's lock."""

    def __init__(self, home: Home, store: Store, settings: Settings, progress: Progress) -> None:
        self._home = home
        self._store = store
        self._settings = settings
        self._progress = progress
        self._driver = driver(settings.compute, progress)
        self._methods = {head.name: make(head.method, head.params) for head in store.heads()}
        self._needs = sorted({need for method in self._methods.values() for need in method.needs})
        self._base = Base(home, store, progress)
        self._states = States(home, progress)
        self._states.check(live_heads(store, self._methods), self._base.tensors.schema)
        self._base_config = read_config(home.base)
        self._plan = weights_plan(self._base.checkpoint, settings.publish)
        self._adapting = Adapting(home, self._base.tensors, settings, progress)
        self._base_norms: Norms | None = None
        reserved = self._driver.device.slab_bytes
        check_budget(self._base.tensors.schema, list(self._methods.values()), settings.compute, reserved)
        self.preparations = Preparations(home, self._driver, self._base.tensors)
        self.preparations.follow(live_heads(store, self._methods))

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

    def take(self, drop: Drop, naming: Naming | None = None) -> Expert:
        """Merges, recognises or refuses one drop, and tidies up after it; see `decide`."""
        recorded = self.decide(drop, naming)
        self.tidy(recorded)
        return recorded

    def decide(self, drop: Drop, naming: Naming | None = None) -> Expert:
        """Merges, recognises or refuses one drop; returns what the registry says of it. `tidy` is to follow.

        naming: how its names become the base's, of an expert that was merged before; by default as the settings say.

        Raises NotYet where it must be looked at again later, Failed where it should be tried again a few times, OSError
        where the disk fails (see durable.is_full), BadHome where the home itself is at fault, and Abandoned where the
        daemon is stopping; the drop is then still in the inbox and nothing else has changed.
        """
        try:
            again = naming is not None  # what was taken once is taken again
            base_config = None if again else self._base_config
            with self._opened(drop, naming or self._settings.admission.naming) as expert:
                hit("take.opened")
                self._check_entry(drop)
                try:
                    with blaming(expert):
                        if not again:
                            check_arrival(expert, self._base.tensors.schema)
                            origin_of(self._store, expert.about)
                        expert.check(self._base.tensors, base_config)
                        if not again:
                            check_modules(expert.folder, self._home.base)
                        expert.digest_tensors()
                    return self._merge(drop, expert, again)
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
            self.preparations.follow(live_heads(self._store, self._methods))
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
            durable.remove(path)
        unplaced = self._store.unplaced()
        for expert in unplaced:
            self._tidy(expert)
        collect(self._home, self._store, self._settings.retention)  # time may have made room
        self.preparations.follow(live_heads(self._store, self._methods))
        return unplaced

    def _opened(self, drop: Drop, naming: Naming) -> OpenCheckpoint:
        with ExitStack() as closing:
            try:  # anew for each: another folder may have taken the inbox's place
                inbox = os.open(self._home.inbox, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                raise changed(drop) from None
            closing.callback(os.close, inbox)
            with blaming():
                return open_checkpoint(inbox, drop.name, needs=self._needs, watch=self._progress, naming=naming)

    def _merge(self, drop: Drop, expert: OpenCheckpoint, again: bool) -> Expert:
        started = time.monotonic()
        heads = live_heads(self._store, self._methods)
        number = max(live.head.newest for live in heads) + 1
        clear(self._home, self._store)  # left by a commit that failed: its space may be what is missing
        self._progress.begin(self._work_bytes())
        folder = self._home.tmp / uuid4().hex
        try:
            with ExitStack() as files:
                outputs = [self._outputs(live, folder, files) for live in heads]
                descriptors = [fd for output in outputs for fd in output.descriptors]
                with durable.flushing(descriptors), blaming(expert):
                    with self._sound_ground(heads):
                        folded = self._fold(expert, heads, outputs, files)
                    new = self._identify(drop, expert, folded, again)
                    if new.status is not Status.MERGED:
                        return self._store.record(new)
                    with self._sound_ground(heads):
                        self._read_out(heads, folded.totals, outputs)
                with self._progress.phase("fsync"):
                    files.close()
            with blaming(expert):
                versions = [
                    self._seal(live, totals, output, number, new)
                    for live, totals, output in zip(heads, folded.totals, outputs, strict=True)
                ]
            self._publish(heads, outputs, number)
            with self._progress.phase("fsync"), blaming(expert):
                expert.sync()
            hit("commit.before")
            seconds = time.monotonic() - started
            merged = self._store.commit(new, [replace(version, seconds=seconds) for version in versions])
            hit("commit.after")
            self._states.written([(version.head, number, version.manifest_sha256) for version in versions])
            return merged
        finally:
            durable.remove(folder)

    def _work_bytes(self) -> int:
        """What the driver will have reported at the end: the tensors that are merged once for each sweep over them."""
        specs = self._base.tensors.schema.values()
        sweeps = 1 + sum(method.rounds + (not method.one_sweep) for method in self._methods.values())
        return sweeps * sum(spec.nbytes for spec in specs if spec.merged) + self._adapting.work_bytes(self._methods)

    def _outputs(self, live: LiveHead, folder: Path, files: ExitStack) -> Outputs:
        schema = self._base.tensors.schema
        return Outputs(folder / live.head.name, schema, live.method, self._plan, files, self._progress)

    def _fold(
        self, expert: OpenCheckpoint, heads: Sequence[LiveHead], outputs: Sequence[Outputs], files: ExitStack
    ) -> Folded:
        hit("fold.before")
        folds = []
        for live, output in zip(heads, outputs, strict=True):
            contribution = Contribution(index=live.totals.experts + 1, weight=expert.weight)
            if live.method.keyed:
                contribution = replace(contribution, sha256=expert.identity())
            state = self._state(live, files)
            contribution = self._driver.survey(self._base.tensors, expert.tensors, live.method, contribution, state)
            ready = self.preparations.ready(live)
            now = output.weights if live.method.one_sweep else ()
            folds.append(
                HeadFold(live.method, live.totals, contribution, state, output.state, ready, now, output.record)
            )
        folded = self._driver.fold(self._base.tensors, expert.tensors, folds, self._base_norms)
        self._base_norms = folded.base
        hit("fold.after")
        return folded

    @contextmanager
    def _sound_ground(self, heads: Sequence[LiveHead]) -> Iterator[None]:
        """What is read in the block is the base, each head's own state and what was prepared from it, or it raises.

        Whatever the block raises of an expert may be the fault of ours: that is looked at first.
        """
        self._base.check()
        try:
            yield
        except (ProjectorError, RuntimeError):  # torch's, where the arithmetic fails
            self._confirm(heads)
            raise
        self._confirm(heads)

    def _confirm(self, heads: Sequence[LiveHead]) -> None:
        self._base.confirm()
        self._states.confirm()
        for live in heads:
            if self.preparations.touched(live):
                raise touched_meanwhile(f"what was prepared for {live.head.name}")

    def _state(self, live: LiveHead, files: ExitStack) -> TensorReader | None:
        return self._states.open(live, self._base.tensors.schema, files) if live.totals.experts else None

    def _identify(self, drop: Drop, expert: OpenCheckpoint, folded: Folded, again: bool) -> NewExpert:
        sha256, content, sidecars = expert.identity(), expert.content(), expert.sidecar_digests()
        altered = expert.tensors.altered
        if not expert.unchanged():
            raise changed(drop)
        new = replace(
            arrived(drop, Status.MERGED),
            kind=expert.kind,
            sha256=sha256,
            content_sha256=content,
            norm=folded.task_vector.whole,
            about=expert.about.given() if expert.about else None,
            sidecars=sidecars or None,
            naming=expert.naming.noted(),
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
        if again and self._store.merged_content(content):  # merged twice, when only the same files were the same expert
            new = replace(new, content_sha256=None)
        usual, limits = usual_norm(self._store.merged_norms(limit=USUAL_EXPERTS)), self._settings.admission
        try:
            check_norm(folded, usual, limits)
        except Refused as error:
            return self._refused(drop, new, error)
        return flagged(new, oddities(folded.task_vector.whole, usual, limits, expert.tensors.resized, altered))

    def _read_out(self, heads: Sequence[LiveHead], totals: Sequence[Totals], outputs: Sequence[Outputs]) -> None:
        for live, after, output in zip(heads, totals, outputs, strict=True):
            if not live.method.one_sweep:
                self._driver.read_out(self._base.tensors, live.method, after, output.state.reader(), output.weights)
            output.finish()
        hit("read_out.after")

    def _seal(self, live: LiveHead, totals: Totals, output: Outputs, number: int, expert: NewExpert) -> NewVersion:
        """Puts companions, an adapter where one is wanted, and the manifest beside the weights, all durable."""
        base_name = self._store.base().name
        adapter = self._adapting.write(live.head.name, output.published, output.entries, base_name)
        with self._progress.phase("fsync"):
            sealed = seal(
                self._home,
                live,
                number,
                output.published,
                output.entries,
                output.state_entry,
                totals,
                origin=origin(self._store, expert),
                beside=self._base.beside,
                dtype=self._settings.publish.dtype,
                record=output.record_entry,
                approximate=live.method.approximate,
                adapter=adapter,
            )
            durable.sync_folder(output.state_folder)
        return sealed

    def _publish(self, heads: Sequence[LiveHead], outputs: Sequence[Outputs], number: int) -> None:
        hit("publish.before")
        for live, output in zip(heads, outputs, strict=True):
            if output.record:
                durable.make_folder(self._home.views(live.head.name))  # its name is durable with the state's
                durable.rename(output.record_file, self._home.view_record(live.head.name, number))
            for source, target in (
                (output.state_folder, self._home.head_state(live.head.name, number)),
                (output.published, self._home.version(live.head.name, number)),
            ):
                durable.rename(source, target)
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
        heads = [live for live in live_heads(self._store, self._methods) if not live.method.needs]
        folder = self._home.tmp / uuid4().hex
        try:
            with ExitStack() as files:
                outputs = [self._outputs(live, folder, files) for live in heads]
                folded = self._fold(self._base.checkpoint, heads, outputs, files)
                self._read_out(heads, folded.totals, outputs)
            for live, output in zip(heads, outputs, strict=True):
                if live.totals.experts:
                    self._adapting.write(live.head.name, output.published, output.entries, self._store.base().name)
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
            for head in self._store.heads():
                point_latest(self._home, head)
            hit("latest.after")
        placed = place(self._home, self._store, expert, self._progress)
        collect(self._home, self._store, self._settings.retention)
        return placed
