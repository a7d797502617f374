"""What a rebuild would do, and how much of it there is to do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from daemon.rebuild.replay import Heads
from registry.reader import Reader
from registry.records import Expert


@dataclass(frozen=True)
class Plan:
    """What a rebuild would do: per head how it comes about, the experts it reads, how often it reads one in all, and
    the usual seconds for one. number: of the version that it has made, once it has.
    """

    how: Mapping[str, str]
    reads: Sequence[Expert]
    readings: int
    usual_seconds: float | None
    number: int | None = None


def readings(replayed: Heads, experts: Sequence[Expert]) -> int:
    """How often a replay reads an expert: all heads read each once together, a second pass reads them for its head."""
    second = [method for method in replayed.values() if experts and method.second_pass(len(experts))]
    return len(experts) * (1 + len(second))


def usual_seconds(reader: Reader) -> float | None:
    """What a merge took lately; None where there was none."""
    seconds = [v.seconds for v in reader.versions(reader.heads()[0].name, limit=5) if v.seconds is not None]
    return median(seconds) if seconds else None
