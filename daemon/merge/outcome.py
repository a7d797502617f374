"""What became of an expert, told to the log and to the metrics. A module of its own, so that the publish protocol knows
neither.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from daemon.arrivals.admission import added
from daemon.arrivals.inbox import Drop
from daemon.compute.progress import Progress
from daemon.metrics import Metrics
from projector.methods import methods
from projector.names.naming import Naming
from projector.text import shown
from registry.records import Expert, Status
from registry.store import Store

LOG_EVERY_SHARE = 0.25
LOG_AFTER_SECONDS = 2.0


@contextmanager
def logged_progress(drop: Drop) -> Iterator[Callable[[float], None]]:
    """Hears the share of a merge that is done; a line in the log at every quarter of a long one."""
    said, started = 0.0, time.monotonic()

    def show(share: float) -> None:
        nonlocal said
        if share >= said + LOG_EVERY_SHARE and time.monotonic() - started > LOG_AFTER_SECONDS:
            said = share
            structlog.get_logger().info("merging", drop=shown(drop.name), share=round(share, 2))

    yield show


def timed(drop: Drop, progress: Progress, seconds: float, metrics: Metrics) -> None:
    """Tells the metrics how long an expert took that was merged."""
    metrics.merge_seconds.observe(seconds)
    metrics.arrival_seconds.observe(drop.waited_seconds)
    for phase, spent in progress.seconds.items():
        metrics.phase_seconds.labels(phase).inc(spent)


def tell(
    expert: Expert, store: Store, naming: Naming, metrics: Metrics, log: structlog.typing.FilteringBoundLogger
) -> None:
    """naming: how the settings have names read, beyond which an expert's own may go."""
    metrics.experts.labels(str(expert.status)).inc()
    if expert.reason:
        metrics.refused.labels(expert.reason).inc()
    metrics.judged(expert, store)
    metrics.show_heads(store)
    if expert.status is Status.MERGED:
        for flag in expert.flags:
            metrics.flagged.labels(str(flag)).inc()
        log.info("merged", id=expert.id, version=expert.version, norm=expert.norm, sha256=expert.sha256)
        if expert.naming and (made := added(expert.naming, naming)):
            say = log.warning if made.keys() & {"ignore", "unchanged"} else log.info
            say("its names were made to fit", id=expert.id, **made)
        if expert.flags:
            log.warning(
                "merged, but look at it", id=expert.id, flags=expert.flags, detail=expert.detail, hint=expert.hint
            )
        even = [head.name for head in store.heads() if not methods()[head.method].weighted]
        if expert.weight != 1 and even:
            log.info("it counts as any other in heads whose method has no weights", weight=expert.weight, heads=even)
    elif expert.status is Status.DUPLICATE:
        if expert.detail:
            log.warning("it does not come back", id=expert.id, detail=expert.detail, hint=expert.hint)
        else:
            log.info("a duplicate: merged before", id=expert.id, of=expert.duplicate_of)
    else:
        log.warning("refused", id=expert.id, reason=expert.reason, detail=expert.detail, hint=expert.hint)
