"""What the registry says and is told: plain frozen records, no SQLAlchemy and no tensor in sight."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

Figures = Mapping[str, float]
UNKNOWN_KIND = "unknown"  # of what was refused before its kind was known


@dataclass(frozen=True, slots=True)
class Score:
    """What an evaluator says of one task, in the task's own units.

    n: over how many items. stderr: its standard error. held_out: no expert was trained on it.
    """

    score: float
    higher_is_better: bool = True
    n: int | None = None
    stderr: float | None = None
    held_out: bool = False


Scores = Mapping[str, Score]
"""By task."""


def plain_scores(scores: Scores) -> dict[str, dict[str, Any]]:
    """Scores as JSON has them."""
    return {task: asdict(score) for task, score in scores.items()}


class Status(StrEnum):
    """What became of an expert."""

    MERGED = "merged"
    DUPLICATE = "duplicate"
    QUARANTINED = "quarantined"
    WITHDRAWN = "withdrawn"  # merged once, and taken out of the merged models again


class Flag(StrEnum):
    """What is odd about an expert that was merged all the same. Usual is the median norm of those merged before it."""

    LONG = "long"  # its task vector is longer than the usual one times admission.warn_norm_ratio
    SHORT = "short"  # the usual one is longer than its task vector times admission.warn_norm_ratio
    RESIZED = "resized"  # its vocabulary has more or fewer rows than the base's; those that both have are merged
    BUFFER = "buffer"  # a buffer that nobody trains is another than the base's, which stays


class RelativeTo(StrEnum):
    """What a head's task vectors are taken against."""

    BASE = "base"
    TRAINED_FROM = "trained_from"  # the version that the expert's training began with, where it names one


class Deed(StrEnum):
    """What a person can do to a home."""

    ROLLBACK = "rollback"
    PROMOTE = "promote"
    WITHDRAW = "withdraw"
    BLOCK = "block"
    UNBLOCK = "unblock"
    PIN = "pin"
    UNPIN = "unpin"
    RETRY = "retry"
    DISCARD = "discard"
    EVALUATE = "evaluate"  # leaves a row of its own kind
    PAUSE = "pause"
    RESUME = "resume"
    DRAIN = "drain"
    PRUNE = "prune"
    COLLECT = "collect"  # what retention says: no row tells of that
    REDELIVER = "redeliver"  # what others were not told: the outbox tells of that
    RELOAD = "reload"  # the settings are read again: no row tells of that


class Event(StrEnum):
    """What others may be told of."""

    PUBLISHED = "published"  # a new version is live
    HELD = "held"  # a new version is not
    REJECTED = "rejected"  # an expert by the rules of evaluate.require
    REFUSED = "refused"  # an expert for anything else
    ROLLED_BACK = "rolled_back"  # an older version is live
    PROMOTED = "promoted"  # a held or newer version is live
    STALLED = "stalled"  # nothing goes on
    RECOVERED = "recovered"  # it goes on again


class EndpointKind(StrEnum):
    """How an endpoint is told."""

    WEBHOOK = "webhook"  # a URL that is sent a request
    HOOK = "hook"  # a command that is run


class Outcome(StrEnum):
    """What became of a delivery."""

    PENDING = "pending"
    DELIVERED = "delivered"
    OVERTAKEN = "overtaken"  # a hook need not run for it: a later version is live
    DEAD = "dead"  # given up after some attempts


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The base every expert was fine-tuned from."""

    name: str
    sha256: str
    parameters: int
    size_bytes: int
    created_at: datetime


LEARNED = "the live version's coefficients were learned without it"
"""Why a head is frozen, and what is folded next held, once the coefficients of a version of it were learned."""


@dataclass(frozen=True, slots=True)
class Head:
    """One line of merged models. `live` is the version that `latest` names, `newest` the highest ever committed, which
    the next one continues from.

    frozen: why no later version becomes live by itself, after a rollback, or LEARNED; else None. previous: the version
    that was live before the last turn to one that does not follow it, as after a rollback. relative_to: what its task
    vectors are taken against.
    """

    name: str
    method: str
    params: Mapping[str, object]
    live: int
    newest: int
    frozen: str | None = None
    relative_to: RelativeTo = RelativeTo.BASE
    previous: int | None = None


@dataclass(frozen=True, slots=True)
class NewExpert:
    """An expert as it is reported to the registry. `sha256` is that of its weights alone, by which it is known again.

    `name` is the drop name, printable (escaped where it was not). `entry` identifies the file system object in the
    inbox ("device:inode:mtime"), so that a move interrupted by a crash can be finished after it.
    """

    name: str
    kind: str  # "file", "folder", "sharded", "adapter", or UNKNOWN_KIND
    sha256: str | None
    size_bytes: int
    status: Status
    received_at: datetime
    entry: str
    norm: float | None = None
    duplicate_of: int | None = None
    reason: str | None = None
    detail: str | None = None  # why it was refused, or flagged
    hint: str | None = None  # and what to do
    about: Mapping[str, Any] | None = None  # the fields of its expert.json; None where it brought none
    sidecars: Mapping[str, str] | None = None  # the sha256 of each sidecar that was read, by kind; None where none was
    naming: Mapping[str, Any] | None = None  # `prefixes` and `ignore` as it was read by; None where nobody noted them
    flags: tuple[Flag, ...] = ()
    content_sha256: str | None = None  # of what it does to the base, in whatever files; None where nobody worked it out
    trained_head: str | None = None  # the version that its training began with, where its expert.json names one
    trained_version: int | None = None
    verdict: Mapping[str, Any] | None = None  # the gate's, with the scores, where it was rejected

    @property
    def weight(self) -> float:
        """How much it counts beside others: what its expert.json says, else 1."""
        return float(self.about.get("weight", 1.0)) if self.about else 1.0

    @property
    def trained_from(self) -> str | None:
        """The version that its training began with, as main/12."""
        return None if self.trained_head is None else f"{self.trained_head}/{self.trained_version}"

    @property
    def given_name(self) -> str | None:
        """What its expert.json calls it."""
        return self.about.get("name") if self.about else None


@dataclass(frozen=True, slots=True)
class Expert(NewExpert):
    """An expert as the registry keeps it. `place` is relative to HOME, None until it left the inbox.

    version: the first that has it. withdrawn_in: the first after that which has it no more. blocked: it does not come
    back when the same weights arrive again. closed_at: since when nobody has to look after one that was refused.
    evaluation: the one of the expert by itself.
    """

    id: int = 0
    version: int | None = None
    finished_at: datetime | None = None
    place: str | None = None
    withdrawn_in: int | None = None
    blocked: bool = False
    closed_at: datetime | None = None
    evaluation: int | None = None


@dataclass(frozen=True, slots=True)
class NewVersion:
    """One head's new version, to be committed together with its expert.

    held: why it does not become live; else None. verdict: the gate's. evaluation: the one that it rests on.
    """

    head: str
    number: int
    parent: int | None
    manifest_sha256: str
    size_bytes: int
    totals: Figures  # the method's scalars: part of the state
    figures: Figures  # what to report: lambda, norms, ...
    seconds: float | None = None
    held: str | None = None
    verdict: Mapping[str, Any] | None = None
    evaluation: int | None = None


@dataclass(frozen=True, slots=True)
class Version(NewVersion):
    """One head's version. `collected`: its files were removed by retention; the row stays.

    They stay where it is `pinned`, and where the training of so many merged experts began with it: `trained`.
    """

    expert_id: int | None = None
    created_at: datetime | None = None
    collected: bool = False
    pinned: bool = False
    trained: int = 0


@dataclass(frozen=True, slots=True)
class NewEvaluation:
    """What a command said of some weights. Both are known by their sha256: the same ones need no second evaluation."""

    weights_sha256: str
    command_sha256: str
    scores: Scores
    seconds: float


@dataclass(frozen=True, slots=True)
class Evaluation(NewEvaluation):
    """An evaluation as the registry keeps it."""

    id: int = 0
    created_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class NewIntervention:
    """What a person did to a home: to which head, version or experts, by whom (a user's name), and why, if said.

    previous: the version that was live before.
    """

    deed: Deed
    who: str
    why: str | None = None
    head: str | None = None
    version: int | None = None
    previous: int | None = None
    experts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Intervention(NewIntervention):
    """An intervention as the registry keeps it."""

    id: int = 0
    at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Happening:
    """An event, and what is to be told of it, ready for JSON."""

    event: Event
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class NewEndpoint:
    """Somebody who is told of events. target: its URL, or its command as a JSON list. It is known again by these two,
    whatever else is set of it; no secret is kept here.
    """

    kind: EndpointKind
    target: str
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Endpoint(NewEndpoint):
    """An endpoint as the registry keeps it. since: it hears of what happened after that. dropped: how many deliveries
    were never made, and went for later ones.
    """

    id: int = 0
    since: datetime | None = None
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event for one endpoint, which has its deliveries in the order of their ids.

    message: what the event is called in all its deliveries and attempts. next_at: not to be tried before. answer: what
    the last attempt came to.
    """

    id: int
    endpoint: int
    message: str
    event: Event
    data: Mapping[str, Any]
    at: datetime
    outcome: Outcome = Outcome.PENDING
    attempts: int = 0
    next_at: datetime | None = None
    tried_at: datetime | None = None
    answer: str | None = None
