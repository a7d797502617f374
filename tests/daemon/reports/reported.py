"""A report without a home: what the page can show, all of it, with hostile names in it."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from random import Random

from daemon.reports.report.gathering import Arrival, HeadReport, Overlap, Rejected, Report
from registry.records import BaseModel, Flag, Score, Scores, Status

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOSTILE = "<script>document.title='owned'</script>\"'><img src=x onerror=alert(1)>{{7*7}}$x^2$"
BASE = BaseModel("tiny-base", "ba5e" * 16, parameters=1_500_000, size_bytes=3_000_000, created_at=NOON)
TASKS = ("reading", "mathematics", "code-generation-in-many-languages", HOSTILE, "law", "medicine")


def made_up(versions: int = 12, window: int = 1000, scored: bool = True) -> Report:
    """A report of two heads with that many versions each, of which the newest `window` are in it."""
    own = {task: Score(0.9 - 0.02 * n) for n, task in enumerate(TASKS)}
    return Report(
        base=BASE,
        heads=[_head(name, method, versions, window, scored) for name, method in (("main", "opcm"), ("init", "ema"))],
        counts={**dict.fromkeys(Status, 0), Status.MERGED: versions, Status.QUARANTINED: 1},
        made_at=NOON,
        software="0.1.0",
        own=own if scored else {},
        rejected=[Rejected(99, HOSTILE, NOON, "mean >= live: 0.715 is less than 0.753")] if scored else [],
        overlap=_overlap() if scored else None,
        window=window,
    )


def _head(name: str, method: str, versions: int, window: int, scored: bool) -> HeadReport:
    draw = Random(name)
    arrivals = [
        _arrival(n, draw, _scores(n, draw, 0.0 if name == "main" else 0.03) if scored else {})
        for n in range(max(0, versions + 1 - window), versions + 1)
    ]
    base = _scores(0, draw, 0.0) if scored else {}
    head = HeadReport(name, method, {"alpha": 0.5}, versions - 1, versions, arrivals, base)
    return head.figured({task: Score(0.9) for task in TASKS} if scored else {})


def _arrival(n: int, draw: Random, scores: Scores) -> Arrival:
    if n == 0:
        return Arrival(0, NOON, scores=scores)
    held = n % 5 == 0
    verdict: Mapping[str, object] = {
        "outcome": "held" if held else "live",
        "broken": [{"rule": "mean >= live", "outcome": "held", "why": f"{HOSTILE} is too low"}] if held else [],
        "notes": [],
    }
    return Arrival(
        number=n,
        created_at=NOON + timedelta(hours=n),
        expert_id=n,
        expert=HOSTILE if n == 2 else f"expert-{n}.safetensors",
        task=TASKS[(n - 1) % len(TASKS)],
        norm=4.6 if n == 7 else 1 + 0.2 * draw.random(),
        flags=(Flag.LONG,) if n == 7 else (),
        figures={"lambda": 1 + n**0.5 / 3, "mean_norm": 1.1, "merged_norm": 1.1 + 0.05 * n},
        seconds=2 + draw.random(),
        expert_bytes=300_000_000 + draw.randrange(10**8),
        published_bytes=300_000_000,
        held="mean >= live" if held else None,
        verdict=verdict if scores else None,
        scores=scores,
    )


def _scores(n: int, draw: Random, more: float) -> Scores:
    found = {}
    for place, task in enumerate(TASKS):
        high = 0.35 + 0.03 * place + (0.35 - 0.012 * (n % 30 - place) + more if n > place else 0) + 0.02 * draw.random()
        found[task] = Score(round(high, 4), n=500, stderr=0.02)
    found["commonsense"] = Score(round(0.7 - 0.008 * (n % 40) - more / 2, 4), held_out=True)
    found["news"] = Score(round(20 + 0.3 * (n % 40), 2), higher_is_better=False)
    return found


def _overlap() -> Overlap:
    draw, k = Random(3), 8
    cosines = [[0.0] * k for _ in range(k)]
    for i in range(k):
        for j in range(i + 1):
            cosines[i][j] = cosines[j][i] = 1.0 if i == j else draw.uniform(-0.05, 0.2)
    return Overlap([HOSTILE, *(f"expert-{n}.safetensors" for n in range(1, k))], cosines, share=0.25)
