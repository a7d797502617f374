"""What `mainstem report` shows of a home, gathered from its registry: the same for the page and for --json.

What is read does not grow with the number of experts: of each head the newest `window` versions, and version 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from daemon.evaluation.figures import Field, Spread, Step, figures
from daemon.release import software_version
from registry.reader import Reader
from registry.records import BaseModel, Expert, Flag, Head, Score, Scores, Status, Version

WINDOW = 1000  # versions of each head
REJECTED = 50  # experts


@dataclass(frozen=True, slots=True)
class Arrival:
    """One version of one head, and the expert that came with it: None for the base, and for what was rebuilt.

    held: why it is not live, None where nothing is held against it. bytes: of what was read, and of what was published.
    """

    number: int
    created_at: datetime | None = None
    expert_id: int | None = None
    expert: str | None = None
    task: str | None = None
    withdrawn: bool = False
    norm: float | None = None
    flags: Sequence[Flag] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    expert_bytes: int | None = None
    published_bytes: int | None = None
    held: str | None = None
    verdict: Mapping[str, Any] | None = None
    scores: Scores = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HeadReport:
    """One head: its newest arrivals, oldest first, of `newest` in all, and `found`, the field's figures of them."""

    name: str
    method: str
    params: Mapping[str, Any]
    live: int
    newest: int
    arrivals: Sequence[Arrival]
    base: Scores = field(default_factory=dict)
    found: Field | None = None

    @property
    def versions(self) -> Sequence[Arrival]:
        """Those and, before them, the base where they do not begin with it."""
        if self.arrivals and self.arrivals[0].number == 0:
            return [replace(self.arrivals[0], scores=self.base), *self.arrivals[1:]]
        return [Arrival(0, scores=self.base), *self.arrivals]

    @property
    def whole(self) -> bool:
        """True where every version is in it."""
        return bool(self.arrivals) and self.arrivals[0].number == 0

    def figured(self, own: Scores) -> "HeadReport":
        """With the field's figures. own: by task, what its expert scores by itself."""
        steps = [Step(one.number, one.scores, None if one.withdrawn else one.task) for one in self.versions]
        return replace(self, found=figures(steps, own, self.base))


@dataclass(frozen=True, slots=True)
class Rejected:
    """An expert that a rule kept out, and by what scores."""

    expert_id: int
    expert: str
    received_at: datetime
    why: str


@dataclass(frozen=True, slots=True)
class Overlap:
    """The cosines between experts' task vectors, (k, k), and of which share of the values they are; oldest first.

    left_out: experts that could not be opened. failed: what was wrong with one that was; there are no cosines then.
    """

    experts: Sequence[str] = ()
    cosines: Sequence[Sequence[float | None]] = ()
    share: float = 1.0
    left_out: Sequence[str] = ()
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """All that a report says. own: by task, what its newest expert scores by itself. orders: by figure, over several
    orders of arrival, where those are known. window: how many versions of each head were looked at.
    """

    base: BaseModel
    heads: Sequence[HeadReport]
    counts: Mapping[Status, int]
    made_at: datetime
    software: str = field(default_factory=software_version)
    own: Scores = field(default_factory=dict)
    rejected: Sequence[Rejected] = ()
    overlap: Overlap | None = None
    orders: Mapping[str, Spread] = field(default_factory=dict)
    window: int = WINDOW


def gather(reader: Reader, made_at: datetime, overlap: Overlap | None = None, window: int = WINDOW) -> Report:
    """What a home's registry says, as of `made_at`."""
    experts: dict[int, Expert] = {}
    heads = [_head(reader, head, experts, window) for head in reader.heads()]
    base = next((head.base for head in heads if head.base), {})  # version 0 of every head is the same model
    own: dict[str, Score] = {}
    for expert in sorted(experts.values(), key=lambda one: one.id):  # of two for a task the newest counts
        task = _task(expert)
        if task is not None and (alone := _scores(reader, expert.evaluation).get(task)):
            own[task] = alone
    return Report(
        base=reader.base(),
        heads=[replace(head, base=base).figured(own) for head in heads],
        counts=reader.counts(),
        made_at=made_at,
        own=own,
        rejected=[_rejected(one) for one in reader.experts(Status.QUARANTINED, REJECTED) if one.verdict],
        overlap=overlap,
        window=window,
    )


def _head(reader: Reader, head: Head, experts: dict[int, Expert], window: int) -> HeadReport:
    """experts: those that were read before, by id; what is read is added."""
    arrivals = []
    for version in reversed(reader.versions(head.name, limit=window)):
        key = version.expert_id
        if key is not None and key not in experts and (found := reader.expert(key)):
            experts[key] = found
        arrivals.append(_arrival(version, experts.get(key) if key is not None else None, reader))
    first = reader.version(head.name, 0)
    base = _scores(reader, first.evaluation) if first else {}
    return HeadReport(head.name, head.method, head.params, head.live, head.newest, arrivals, base)


def _arrival(version: Version, expert: Expert | None, reader: Reader) -> Arrival:
    arrival = Arrival(
        number=version.number,
        created_at=version.created_at,
        figures=version.figures,
        seconds=version.seconds,
        published_bytes=version.size_bytes,
        held=version.held,
        verdict=version.verdict,
        scores=_scores(reader, version.evaluation),
    )
    if expert is None:
        return arrival
    return replace(
        arrival,
        expert_id=expert.id,
        expert=expert.given_name or expert.name,
        task=_task(expert),
        withdrawn=expert.withdrawn_in is not None,
        norm=expert.norm,
        flags=expert.flags,
        expert_bytes=expert.size_bytes,
    )


def _scores(reader: Reader, evaluation: int | None) -> Scores:
    found = reader.evaluation(evaluation) if evaluation is not None else None
    return found.scores if found else {}


def _task(expert: Expert) -> str | None:
    return expert.about.get("task") if expert.about else None


def _rejected(expert: Expert) -> Rejected:
    return Rejected(expert.id, expert.given_name or expert.name, expert.received_at, expert.detail or "")
