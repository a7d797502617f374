"""The scores of what is there already: of versions, and of experts by themselves."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Event
from typing import Any
from uuid import uuid4

from daemon.arrivals.admission import naming_of
from daemon.checkpoints.checkpoint import open_path
from daemon.compute.progress import Progress
from daemon.compute.resources import driver
from daemon.config import Settings
from daemon.disk import durable
from daemon.errors import BadConfig, BadHome
from daemon.evaluation.rules import UNJUDGED, Question, judge, needs
from daemon.evaluation.scoring import Scoring, told
from daemon.home.ground import Base
from daemon.layout import BY_ITSELF, Home
from daemon.manifest import Manifest
from daemon.merge.folding import Folding
from daemon.merge.gate import HELD, LIVE, judges
from daemon.notation import called
from daemon.versions.sealing import stage
from registry.reader import Reader
from registry.records import Evaluation, Expert, Head, NewEvaluation, Scores, Version, plain_scores

Keep = Callable[[NewEvaluation, Version | Expert], None]
"""Keeps an evaluation in the registry, as that of a version or of an expert by itself."""

Rejudge = Callable[[Version, Mapping[str, Any], str | None], None]
"""Keeps another verdict on a version in the registry, and why it is held by that."""

NO_RULE = "it was scored by hand since, and breaks no rule"
BY_HAND = "scored and judged by hand, after it was published"


@dataclass(frozen=True, slots=True)
class Judged:
    """What the rules say of a version that is there already. standing: in words, with the command that changes it."""

    verdict: Mapping[str, Any]
    standing: str


class Evaluating:
    """Asks the evaluator of a home, which may be in use. Raises BadConfig where none is set."""

    def __init__(self, home: Home, reader: Reader, settings: Settings, keep: Keep, rejudge: Rejudge) -> None:
        if not settings.evaluate.command:
            raise BadConfig(
                "evaluate.command is not set: nobody knows how to score",
                'set it in mainstem.toml, for example command = ["python", "score.py", "{folder}"]',
            )
        self._home = home
        self._reader = reader
        self._settings = settings
        self._keep = keep
        self._rejudge = rejudge

    def version(self, version: Version, *, again: bool = False) -> Evaluation:
        """The scores of a version; anew where they are asked for `again`. Raises BadHome where its files are gone, and
        NoScores.
        """
        name = called(version.head, version.number)
        path = self._home.manifest(version.head, version.number)
        if version.collected or not path.exists():
            raise BadHome(
                f"the files of {name} were removed by retention", "`mainstem log --versions` lists the others"
            )
        files = list(Manifest.read(path.read_bytes()).files.values())
        expert = self._reader.expert(version.expert_id) if version.expert_id else None
        said = told(expert, head=version.head, version=version.number, parent=version.parent)
        log = self._home.evaluation_log(version.head, version.number)
        found = self._scoring(version).of(name, files, path.parent, said, log, again=again)
        return self._noted(found, version)

    def judged(self, version: Version, found: Evaluation, *, again: bool = False) -> Judged | None:
        """What the rules say of a version, by these scores, where the gate could not ask them, or held it and it was
        scored `again`; None of others: their verdict stands. It is kept, and nothing goes live or is held by it.

        The scores that the rules ask for beside its own are made first. Raises as `version` and `expert` do.
        """
        version = self._reader.version(version.head, version.number) or version  # scoring may have taken long
        head, before = self._reader.head(version.head), version.verdict or {}
        by_gate = version.held is not None and before.get("outcome") == HELD
        unasked = before.get("error") is not None or before.get("outcome") == UNJUDGED
        if head is None or not judges(self._settings.evaluate, head.name) or not (unasked or (again and by_gate)):
            return None
        against = head.live if head.live != version.number else version.parent or 0
        expert = self._reader.expert(version.expert_id) if version.expert_id else None
        wanted, rules = needs(self._settings.evaluate.rules), self._settings.evaluate.rules
        question = Question(
            found.scores,
            live=self._of(head.name, against) if "live" in wanted else None,
            base=self._of(head.name, 0) if "base" in wanted else None,
            expert=self.expert(expert).scores if expert and "expert" in wanted else None,
            own=expert.about.get("task") if expert and expert.about else None,
        )
        verdict = judge(rules, question)
        said = verdict.described()
        said |= {"outcome": LIVE if version.held is None else HELD, "notes": [*said["notes"], BY_HAND]}
        said |= {"against": called(head.name, against), "scores": plain_scores(found.scores)}
        self._rejudge(version, said, (verdict.why or NO_RULE) if by_gate else None)
        return Judged(said, _standing(head, version, verdict.why))

    def _of(self, head: str, number: int) -> Scores:
        version = self._reader.version(head, number)
        assert version
        return self.version(version).scores

    def expert(self, expert: Expert, *, again: bool = False) -> Evaluation:
        """The scores of an expert by itself, out of the archive. Raises BadHome where it is gone, and NoScores."""
        path = self._home.archived(expert.id)
        if path is None:
            raise BadHome(f"expert {expert.id} ({expert.name}) is not in the archive", "only what is there is scored")
        progress = Progress(Event(), lambda _: None)
        folder = self._home.tmp / uuid4().hex
        try:
            with (
                Base(self._home, self._reader, progress) as base,
                open_path(path, progress, follow=False, naming=naming_of(expert, self._settings.admission)) as read,
            ):
                read.check(base.tensors)
                base.check()
                folding = Folding(base, self._settings.publish, driver(self._settings.compute, progress))
                written = folding.alone(read, folder)
                base.confirm()
                stage(self._home, written, base.beside)
            log = self._home.evaluation_log(BY_ITSELF, expert.version or 0)
            scoring, name = self._scoring(expert), expert.name
            found = scoring.of(name, written.weights, written.published, told(expert), log, again=again)
            return self._noted(found, expert)
        finally:
            durable.remove(folder)

    def _noted(self, found: Evaluation, of: Version | Expert) -> Evaluation:
        """What was scored before, perhaps under another name, is noted as its own too."""
        if of.evaluation != found.id:
            known = NewEvaluation(found.weights_sha256, found.command_sha256, found.scores, found.seconds)
            self._keep(known, of)
        return found

    def _scoring(self, of: Version | Expert) -> Scoring:
        def keep(new: NewEvaluation) -> Evaluation:
            self._keep(new, of)
            kept = self._reader.evaluated(new.weights_sha256, new.command_sha256)
            assert kept
            return kept

        return Scoring(self._home, self._reader, self._settings.evaluate, keep)


def _standing(head: Head, version: Version, broken: str | None) -> str:
    """Where a version stands that was judged by hand, and how a person changes that."""
    name, newer = called(head.name, version.number), version.number > head.live
    state = "live" if version.number == head.live else "still held" if newer and version.held else "not live"
    if broken:
        return f"{name} breaks a rule: {broken}; it is {state}"
    ready = f": `mainstem {'promote' if newer else 'rollback'} {name}` makes it live" if state != "live" else ""
    return f"{name} breaks no rule; it is {state}{ready}"
