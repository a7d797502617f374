"""One order of arrival: experts dropped into a home of its own, one after the other, and every version scored.

The home is the daemon's in every way; what is left of one that was cut short is made sound as the daemon does it.
"""

import os
import shlex
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Self
from uuid import uuid4

from daemon.arrivals.inbox import Drop, Inbox
from daemon.checkpoints.checkpoint import open_path
from daemon.compute.progress import Progress
from daemon.compute.resources import return_freed_memory
from daemon.config import Evaluate, Retention, Settings
from daemon.config import Inbox as InboxSettings
from daemon.disk import durable
from daemon.errors import BadHome, NoScores, NotYet
from daemon.evaluation.evaluator import FOLDER
from daemon.evaluation.scoring import Scoring, told, weights_sha256
from daemon.home.founding import found
from daemon.home.presence import lock
from daemon.home.recovery import mark_clean, recover
from daemon.layout import Home
from daemon.manifest import FileEntry, Manifest
from daemon.merge.merger import Again, Merger
from daemon.notation import called
from daemon.study.planning import Plan, Unfit
from projector.method import Method
from registry.records import Evaluation, Expert, NewEvaluation, Status
from registry.store import Store

NO_LIMIT = 1e30


class Shared:
    """What the courses of one study have in common: its plan, the settings, and what the evaluator said so far."""

    def __init__(self, plan: Plan, settings: Settings, config: bytes | None, stopping: Event) -> None:
        """config: the text of the study's mainstem.toml, where it has one. stopping: ends what is being done."""
        self.plan = plan
        self.settings = settings.model_copy(
            update={
                "evaluate": Evaluate(),  # it runs behind the merge: what it takes is no part of an arrival
                "inbox": InboxSettings(settle_seconds=0, patience_seconds=0, resume_seconds=0),
                "retention": Retention(versions=1, grace_seconds=0),
                "heads": {},
            }
        )
        self.config = config
        self.progress = Progress(stopping, lambda _: None)
        self.book: Store | None = None
        """Where every evaluation of the study is kept, so that equal weights are scored once."""
        self.scoring: Scoring | None = None
        self.alone: dict[str, Expert] = {}
        """The experts by name, as they were merged by themselves."""

    def keep_in(self, book: Store) -> None:
        """From here on, evaluations are kept there. The evaluator runs in the current folder, by which the person means
        a relative path.
        """
        self.book = book
        self.scoring = Scoring(Home(Path.cwd()), book, self.plan.evaluate, book.evaluate, self.progress)


class Course:
    """Heads over one home, and the experts that arrive there. Use it as a context manager; it makes the home where it
    is not there, and holds its lock."""

    def __init__(self, home: Home, heads: Mapping[str, Method], shared: Shared, *, anew: bool = False) -> None:
        """anew: these experts were merged before; the limit that goes by those before it is not asked again."""
        self.home, self._heads, self._shared, self._anew = home, heads, shared, anew

    def __enter__(self) -> Self:
        shared, settings = self._shared, self._shared.settings
        if self._anew:
            limits = settings.admission.model_copy(update={"max_norm_ratio": NO_LIMIT})
            settings = settings.model_copy(update={"admission": limits})
        if not self.home.exists():
            durable.make_folder(self.home.root.parent)
            heads = list(self._heads.items())
            found(self.home, shared.plan.base, heads, lambda _: None, settings.compute, config=shared.config)
        with ExitStack() as closing:
            closing.callback(os.close, lock(self.home))
            self.store = closing.enter_context(Store.open(self.home.registry))
            recover(self.home, self.store, lambda *_, **__: None, shared.progress)
            if shared.book and shared.book.base().sha256 != self.store.base().sha256:
                raise BadHome(
                    f"the base {shared.plan.base} is another than when the study began", "choose another --out"
                )
            self._merger = Merger(self.home, self.store, settings, shared.progress)
            closing.callback(self._merger.close)
            self._closing = closing.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            mark_clean(self.home)
        self._closing.close()

    @property
    def done(self) -> int:
        """How many experts were merged."""
        return self.store.counts()[Status.MERGED]

    def take(self, name: str) -> Expert:
        """Merges one. Raises DaemonError, which names it, where it is refused."""
        path = self._shared.plan.experts[name]
        linked = self._drop(path)
        drop = self._dropped(name)
        try:
            recorded = self._merger.take(drop, self._again(path))
        except NotYet as error:
            raise Unfit(name, str(error), error.hint) from error
        finally:
            return_freed_memory()
        if recorded.status is Status.DUPLICATE:
            twin = self.store.expert(recorded.duplicate_of or 0)
            raise Unfit(name, f"it is the same as {twin.name if twin else 'another one'}", "")
        if recorded.status is not Status.MERGED:
            raise Unfit(name, f"it is refused ({recorded.reason}): {recorded.detail}", self._mended(recorded, path))
        if not linked:
            durable.remove(self.home.archive(recorded.id))  # one copy at a time
        known = self._shared.alone.get(name)
        if known and known.sha256 != recorded.sha256:
            raise Unfit(name, "it is another than when the study began", "put back what it was")
        return recorded

    def scored(self, number: int) -> bool:
        """Whether every head's version of that number is."""
        return all((one := self.store.version(head, number)) and one.evaluation for head in self._heads)

    def arrived(self, number: int) -> Expert:
        """The expert that came with a version."""
        version = self.store.version(next(iter(self._heads)), number)
        expert = self.store.expert(version.expert_id) if version and version.expert_id else None
        assert expert
        return expert

    def score(self, number: int) -> dict[str, Evaluation]:
        """What every head's version of that number scores: asked where it is not known, and of equal weights once.

        Raises NoScores.
        """
        files = {
            head: self._files(head, number)
            for head in self._heads
            if (version := self.store.version(head, number)) and version.evaluation is None
        }
        first = {weights_sha256(files[head]): head for head in reversed(files)}
        with ThreadPoolExecutor(self._shared.plan.evaluate.concurrency) as pool:
            made = pool.map(lambda head: self._scored(head, number, files[head]), first.values())
            found = dict(zip(first, made, strict=True))
        for head, entries in files.items():
            self.store.judge_version(head, number, self._kept(found[weights_sha256(entries)]).id)
        versions = {head: self.store.version(head, number) for head in self._heads}
        known = {head: self.store.evaluation(one.evaluation) for head, one in versions.items() if one}
        return {head: evaluation for head, evaluation in known.items() if evaluation}

    def judge(self, expert: Expert, alone: Evaluation) -> None:
        """Notes what the expert scores by itself."""
        if expert.evaluation is None:
            self.store.judge_expert(expert.id, self._kept(alone).id)

    def kept_bytes(self, head: str) -> dict[str, int]:
        """What its newest version takes: the state, with what is kept of each expert, and what is published."""
        state, published = self.home.states(head), self.home.version(head, self.done)
        return {
            "state_bytes": sum(path.stat().st_size for path in _files_below(state)),
            "published_bytes": sum(path.stat().st_size for path in _files_below(published)),
        }

    def _scored(self, head: str, number: int, files: list[FileEntry]) -> Evaluation:
        expert = self.arrived(number) if number else None
        said = told(expert, head=head, version=number, parent=number - 1 if number else None)
        name = f"{called(head, number)} ({expert.name})" if expert else "the base"
        log = self.home.evaluation_log(head, number)
        folder, scoring = self.home.version(head, number), self._shared.scoring
        assert scoring
        try:
            return scoring.of(name, files, folder, said, log)
        except NoScores as error:
            words = shlex.join(self._shared.plan.evaluate.command).replace(FOLDER, str(folder))
            hint = f"what it wrote is in {log}; mend it, try `{words}` here, then give the same command: it goes on"
            raise NoScores(f"{name} was not scored: {error}", hint, error.log) from error

    def _kept(self, evaluation: Evaluation) -> Evaluation:
        """As this home's registry has it."""
        if self.store is self._shared.book:
            return evaluation
        same = self.store.evaluated(evaluation.weights_sha256, evaluation.command_sha256)
        return same or self.store.evaluate(
            NewEvaluation(evaluation.weights_sha256, evaluation.command_sha256, evaluation.scores, evaluation.seconds)
        )

    def _files(self, head: str, number: int) -> list[FileEntry]:
        return list(Manifest.read(self.home.manifest(head, number).read_bytes()).files.values())

    def _again(self, path: Path) -> Again | None:
        """An expert that was trained from a version of another home names none of this one."""
        naming = self._shared.settings.admission.naming
        with open_path(path, naming=naming) as expert:
            away = expert.about and expert.about.trained_from
            return Again(expert.naming) if away else None

    def _mended(self, refused: Expert, path: Path) -> str:
        """What to do about one that was refused: where it lies, and not in the home."""
        hint = (refused.hint or "").partition("; once mainstem.toml")[0].partition("; what is mended")[0]
        hint = hint.replace(str(self.home.quarantine(refused.id) / path.name), str(path))
        return f"{hint.replace(str(self.home.inbox), str(path.parent))} (settings: mainstem.toml in --out)"

    def _dropped(self, name: str) -> Drop:
        scan = Inbox(self.home.inbox, 0.0, time.monotonic).scan()
        for held in scan.held:
            raise Unfit(name, f"{held.waits_for} says that it is still being written", "let that finish")
        return scan.settled[0]

    def _drop(self, path: Path) -> bool:
        """Puts an expert into the inbox, whole at once; False where it is a copy, and no link."""
        dropped, new = self.home.inbox / path.name, self.home.tmp / uuid4().hex
        for left in self.home.inbox.iterdir():  # by a run that was cut short
            durable.remove(left)
        _link(path, new)
        durable.rename(new, dropped)
        return all(there.samefile(path / there.relative_to(dropped)) for there in _files_below(dropped))


def _files_below(path: Path) -> list[Path]:
    return [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]


def _link(source: Path, target: Path) -> None:
    """A file, or a folder and all in it. A link is followed: a hub's cache is made of them."""
    if not source.is_dir():
        durable.link_or_copy(source.resolve(), target)
        return
    durable.make_folder(target)
    for path in source.iterdir():
        _link(path, target / path.name)
    durable.sync_folder(target)
