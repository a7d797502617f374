"""May a new version go live? It is evaluated before anything of it is committed, and held against the rules.

What comes of an arrival, or of a version that a rebuild made, is one of three: live; held, which is committed and not
live; or rejected, when nothing is committed at all. Where the evaluator fails, no expert is to blame:
`evaluate.on_error` says what happens.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import structlog

from daemon.config import Evaluate
from daemon.errors import NoScores
from daemon.evaluation.rules import Question, Verdict, judge, needs
from daemon.evaluation.scoring import Scoring, told
from daemon.layout import BY_ITSELF, Home
from daemon.manifest import Manifest
from daemon.notation import called
from daemon.versions.heads import HeadTip
from daemon.versions.writing import Written
from projector.text import listed
from projector.watch import Watch
from registry.records import Evaluation, NewExpert, Scores, plain_scores
from registry.store import Store

LIVE, HELD, REJECTED = "live", "held", "rejected"


def judges(settings: Evaluate, head: str) -> bool:
    """True where by these settings the versions of that head are judged."""
    return bool(settings.command) and head in settings.heads


def not_judging(settings: Evaluate, head: str) -> list[str]:
    """That there is a gate, and this head is none of those that it judges, in lines of words."""
    if not settings.command or judges(settings, head):
        return []
    names = f"{listed(settings.heads)}, and not {head}" if settings.heads else "none"
    return [f"{head} is not judged: evaluate.heads names {names}"]


@dataclass(frozen=True)
class Judged:
    """What the gate says of one head's version. verdict: ready for JSON, with the scores."""

    outcome: str = LIVE
    why: str | None = None
    verdict: Mapping[str, Any] | None = None
    evaluation: Evaluation | None = None

    @property
    def held(self) -> str | None:
        """Why the version does not become live; None where it does."""
        return self.why if self.outcome == HELD else None

    @property
    def scores(self) -> Scores | None:
        return self.evaluation.scores if self.evaluation else None


class Gate:
    """The gate of one home, by one set of settings."""

    def __init__(self, home: Home, store: Store, settings: Evaluate, watch: Watch) -> None:
        self._home = home
        self._store = store
        self._settings = settings
        self._scoring = Scoring(home, store, settings, store.evaluate, watch)
        self._log = structlog.get_logger()
        self.alone: Evaluation | None = None  # of the expert by itself, where a rule asks for it

    @property
    def open(self) -> bool:
        """True where nothing is evaluated."""
        return not self._settings.command

    def judge(
        self,
        heads: Sequence[HeadTip],
        number: int,
        written: Sequence[Written],
        expert: NewExpert | None = None,
        by_itself: Callable[[], Written] | None = None,
    ) -> list[Judged]:
        """What is said of each head's version, staged in `written`; heads that are not evaluated go live.

        expert: that it folds; without one, rules about it do not apply. by_itself: stages the expert alone. Raises
        BadHome where the evaluator changed what it scored, and what the watch raises.
        """
        if expert and by_itself and self._needs("expert"):
            try:
                self.alone = self._alone(expert, number, by_itself)
            except NoScores as error:  # a rule asks for it: nothing goes unjudged
                return [self._failed(tip.head.name, number, error) if self._judges(tip) else Judged() for tip in heads]
        alone = self.alone.scores if self.alone else None
        if len(heads) == 1:  # in this thread, where Ctrl-C ends the evaluator of a rebuild
            return [self._judge_head(heads[0], written[0], number, expert, alone)]
        with ThreadPoolExecutor(self._settings.concurrency) as pool:
            return list(pool.map(lambda tip, one: self._judge_head(tip, one, number, expert, alone), heads, written))

    def _judge_head(
        self, tip: HeadTip, written: Written, number: int, expert: NewExpert | None, alone: Scores | None
    ) -> Judged:
        head = tip.head
        if not self._judges(tip):
            return Judged()
        try:
            live = self._of_version(head.name, head.live) if self._needs("live") else None
            base = self._of_version(head.name, 0) if self._needs("base") else None
            known = {"live": live, "base": base, "expert": alone}
            scores = {whose: found for whose, found in known.items() if found}
            said = told(expert, head=head.name, version=number, parent=tip.version.number, scores=scores)
            log = self._home.evaluation_log(head.name, number)
            name = called(head.name, number)
            found = self._scoring.of(name, written.weights, written.published, {**said, "live": head.live}, log)
            own = expert.about.get("task") if expert and expert.about else None
            verdict = judge(self._settings.rules, Question(found.scores, live, base, alone, own))
        except NoScores as error:
            return self._failed(head.name, number, error)
        now = self._store.head(head.name)
        if now and now.live != head.live:  # somebody turned it meanwhile; what was scored is known
            return self._judge_head(replace(tip, head=now), written, number, expert, alone)
        return self._told(head.name, number, head.live, found, verdict)

    def _told(self, head: str, number: int, live: int, found: Evaluation, verdict: Verdict) -> Judged:
        why = verdict.why
        said = {**verdict.described(), "against": called(head, live), "scores": plain_scores(found.scores)}
        if why:
            self._log.warning("the version breaks a rule", version=called(head, number), then=verdict.outcome, why=why)
        return Judged(verdict.outcome, why, said, found)

    def _failed(self, head: str, number: int, error: NoScores) -> Judged:
        holds = self._settings.on_error == "hold"
        outcome, why = HELD if holds else LIVE, f"it was not evaluated: {error}"
        self._log.error(
            "the evaluator failed", version=called(head, number), then=outcome, error=str(error), hint=error.hint
        )
        return Judged(outcome, why, {"outcome": outcome, "broken": [], "notes": [], "error": str(error)})

    def _judges(self, tip: HeadTip) -> bool:
        return judges(self._settings, tip.head.name)

    def _needs(self, whose: str) -> bool:
        return whose in needs(self._settings.rules)

    def _of_version(self, head: str, number: int) -> Scores:
        """The scores of a version that is published; it is evaluated where it was not yet, or in another way."""
        manifest = Manifest.read(self._home.manifest(head, number).read_bytes())
        files, folder = list(manifest.files.values()), self._home.version(head, number)
        said = told(head=head, version=number)
        found = self._scoring.of(called(head, number), files, folder, said, self._home.evaluation_log(head, number))
        self._store.judge_version(head, number, found.id)
        return found.scores

    def _alone(self, expert: NewExpert, number: int, by_itself: Callable[[], Written]) -> Evaluation:
        """That of an expert by itself."""
        written = by_itself()
        log = self._home.evaluation_log(BY_ITSELF, number)
        return self._scoring.of(expert.name, written.weights, written.published, told(expert), log)
