"""Every Prometheus metric of mainstem.

Labels are closed sets: never an expert's, a file's or a tensor's name. Tasks are the evaluator's and
figures the method's, at most MOST_TASKS and MOST_FIGURES of a head.
What only costs something to know is asked for at a scrape, by looks.
"""

import resource
import shutil
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path
from threading import Lock

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    Metric,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.registry import Collector

from daemon.compute.progress import PHASES
from daemon.errors import Reason
from daemon.release import software_version
from projector.errors import Reason as ProjectorReason
from registry.reader import Reader
from registry.records import Deed, Expert, Flag, Score, Status, Version

UPLOADS = ("stored", "refused", "broken")
OUTCOMES = ("merged", "duplicate", "quarantined", "requeued", "abandoned")
NOT_OF_EXPERTS = {"unknown", "home", "config", "pull", "changed", "bad_parameter", "unknown_method", "over_budget"}
NOT_OF_EXPERTS |= {"device_lost", "evaluation"}
NOT_OF_EXPERTS |= {"convert", "zipit"} | {reason for reason in Reason if reason.startswith("upload_")}
REASONS = tuple(dict.fromkeys(str(r) for r in (*Reason, *ProjectorReason) if r not in NOT_OF_EXPERTS))
DEEDS = tuple(deed for deed in Deed if deed not in (Deed.EVALUATE, Deed.COLLECT, Deed.REDELIVER))  # that leave a row
JUDGED = ("live", "held", "rejected", "failed")
TELLINGS = ("delivered", "failed", "dead")
TROUBLES = ("not_ready", "disk_full", "damaged", "stuck", "no_inbox", "registry", "uploads", "no_daemon", "hung")
TRANSACTIONS = ("read", "write")
MOST_TASKS = 32
MOST_FIGURES = 16  # of a head: a method may come from elsewhere
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)
BRIEF = (0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10)  # of what should take milliseconds
OTHER = "other"  # an address that is none of ours

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series beside every counter and histogram, which nobody reads


class HeadMetrics:
    """What any process over a home can tell: of itself, and of the heads. In a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._looks: list[Callable[[], None]] = []
        registry.register(_Looks(self._looks))  # collectors are asked in the order they came
        ProcessCollector(registry=registry)
        self._build = Info("mainstem_build", "The software, and what it computes on.", registry=registry)
        self._build.info({"version": software_version()})
        self.head_version = Gauge(
            "mainstem_head_version", "The version that a head's latest names.", ["head"], registry=registry
        )
        self.head_newest = Gauge(
            "mainstem_head_newest_version",
            "The newest version of a head, live or not: the next one continues from it.",
            ["head"],
            registry=registry,
        )
        self.head_frozen = Gauge(
            "mainstem_head_frozen",
            "1 while no later version becomes live by itself: after a rollback, or once coefficients were learned.",
            ["head"],
            registry=registry,
        )
        self.head_held = Gauge(
            "mainstem_head_held",
            "Versions newer than the live one that were not let live.",
            ["head"],
            registry=registry,
        )
        self.head_score = Gauge(
            "mainstem_head_score",
            f"What the live version scores in a task; the first {MOST_TASKS} by name. better: higher or lower.",
            ["head", "task", "better"],
            registry=registry,
        )
        self.head_kept_versions = Gauge(
            "mainstem_head_kept_versions", "Versions of a head whose files are kept.", ["head"], registry=registry
        )
        self.head_kept_bytes = Gauge(
            "mainstem_head_kept_bytes", "What those take, without the state behind them.", ["head"], registry=registry
        )
        self.home_experts = Gauge(
            "mainstem_home_experts",
            "Experts since the home was made, by what they are now.",
            ["status"],
            registry=registry,
        )
        self.interventions = Counter(
            "mainstem_interventions",
            "What people did to the home since it was made, by what: rollback, promote, ...",
            ["deed"],
            registry=registry,
        )
        self.open_cases = Gauge(
            "mainstem_quarantine_open", "Refused experts that nobody has looked after yet.", registry=registry
        )
        self.head_figure = Gauge(
            "mainstem_head_figure",
            "What a head's method reports (lambda, norms, ...).",
            ["head", "figure"],
            registry=registry,
        )
        self.last_success = Gauge(
            "mainstem_last_success_timestamp_seconds", "When the last version was committed.", registry=registry
        )
        self.condition = Gauge(
            "mainstem_condition", "1 for what is going on, as `mainstem status` has it.", ["doing"], registry=registry
        )
        self.troubles = Gauge(
            "mainstem_trouble",
            "1 while this is wrong, as /readyz has it; other: a word that is not in its table.",
            ["reason"],
            registry=registry,
        )
        self.transaction_seconds = Histogram(
            "mainstem_registry_transaction_seconds",
            "How long transactions of the registry took, waiting included.",
            ["kind"],
            buckets=BRIEF,
            registry=registry,
        )
        self.http = HttpMetrics(registry)
        for deed in DEEDS:
            self.interventions.labels(str(deed))
        for status in Status:
            self.home_experts.labels(str(status))
        for kind in TRANSACTIONS:
            self.transaction_seconds.labels(kind)
        for reason in (*TROUBLES, OTHER):
            self.troubles.labels(reason)
        self._figures: set[tuple[str, str]] = set()
        self._scores: set[tuple[str, str, str]] = set()
        self._intervened = 0  # the last that was counted
        self._showing = Lock()

    def show_heads(self, reader: Reader) -> None:
        """Sets what the registry says of the heads, and of what people did. From any thread."""
        with self._showing:
            figures, scores = set(), set()
            for head in reader.heads():
                self.head_version.labels(head.name).set(head.live)
                self.head_newest.labels(head.name).set(head.newest)
                self.head_frozen.labels(head.name).set(head.frozen is not None)
                self.head_held.labels(head.name).set(reader.count_held(head))
                versions, size_bytes = reader.kept(head.name)
                self.head_kept_versions.labels(head.name).set(versions)
                self.head_kept_bytes.labels(head.name).set(size_bytes)
                newest = reader.version(head.name, head.newest)
                if newest and newest.number and newest.created_at:
                    self.last_success.set(newest.created_at.timestamp())
                version = newest if head.live == head.newest else reader.version(head.name, head.live)
                reported = version.figures if version else {}
                for figure in sorted(reported)[:MOST_FIGURES]:
                    self.head_figure.labels(head.name, figure).set(reported[figure])
                    figures.add((head.name, figure))
                for task, score in _scored(reader, version).items():
                    labels = head.name, task, "higher" if score.higher_is_better else "lower"
                    self.head_score.labels(*labels).set(score.score)
                    scores.add(labels)
            for gone in self._figures - figures:  # a version in which no expert is left reports nothing
                self.head_figure.remove(*gone)
            for lost in self._scores - scores:  # a task that is no more
                self.head_score.remove(*lost)
            self._figures, self._scores = figures, scores
            for status, experts in reader.counts().items():
                self.home_experts.labels(str(status)).set(experts)
            self.open_cases.set(reader.count_open())
            self._count_interventions(reader)

    def _count_interventions(self, reader: Reader) -> None:
        done, self._intervened = reader.count_interventions(self._intervened)
        for deed, count in done.items():
            self.interventions.labels(str(deed)).inc(count)

    def follow(self, reader: Reader) -> None:
        """Reads the heads from the registry at every scrape: for a process that does not merge itself."""
        self._looks.append(lambda: self.show_heads(reader))

    def watch(self, words: Collection[str], look: Callable[[], tuple[str, Collection[str]]]) -> None:
        """Asks at every scrape for what is going on, one of `words`, and for the reasons of what is wrong."""

        def show() -> None:
            doing, reasons = look()
            for word in words:
                self.condition.labels(str(word)).set(word == doing)
            for reason in TROUBLES:
                self.troubles.labels(reason).set(reason in reasons)
            self.troubles.labels(OTHER).set(any(reason not in TROUBLES for reason in reasons))

        self._looks.append(show)

    def transaction(self, kind: str, seconds: float) -> None:
        """Counts a transaction of the registry. From any thread."""
        self.transaction_seconds.labels(kind).observe(seconds)


class HttpMetrics:
    """What is asked over HTTP. route: the address as the routing table has it, or OTHER."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "mainstem_http_requests",
            "Requests that were answered; status none: the client had gone before it came to that.",
            ["route", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "mainstem_http_request_seconds",
            "From a request to the head of its answer; of uploads that is when they have come.",
            ["route"],
            buckets=(0.005, 0.025, 0.1, 0.5, 2.5, 10, 60),
            registry=registry,
        )
        self.sent_bytes = Counter("mainstem_http_sent_bytes", "Bytes of answers.", ["route"], registry=registry)
        self.in_progress = Gauge(
            "mainstem_http_requests_in_progress", "Requests that are being answered.", registry=registry
        )


class Metrics(HeadMetrics):
    """The metrics of a daemon."""

    def __init__(self) -> None:
        super().__init__()
        registry = self.registry
        self.experts = Counter(
            "mainstem_experts", "Experts taken from the inbox, by what became of them.", ["outcome"], registry=registry
        )
        self.refused = Counter(
            "mainstem_refused", "Experts put into quarantine, by reason.", ["reason"], registry=registry
        )
        self.flagged = Counter(
            "mainstem_experts_flagged",
            "Experts merged although something about them is odd, by what it is.",
            ["flag"],
            registry=registry,
        )
        self.inbox_settled = Gauge(
            "mainstem_inbox_settled",
            "Entries at rest in the inbox: waiting for their turn or incomplete.",
            registry=registry,
        )
        self.inbox_bytes = Gauge("mainstem_inbox_settled_bytes", "What those at rest take.", registry=registry)
        self.inbox_scanned = Gauge(
            "mainstem_inbox_scan_timestamp_seconds", "When the inbox was last listed.", registry=registry
        )
        self.inbox_moving = Gauge(
            "mainstem_inbox_moving", "Entries of the inbox still being written.", registry=registry
        )
        self.uploads = Counter(
            "mainstem_uploads", "Files sent over HTTP, by what became of them.", ["outcome"], registry=registry
        )
        self.upload_bytes = Counter(
            "mainstem_upload_bytes", "Bytes of the files that were sent over HTTP and stored.", registry=registry
        )
        self.oldest_seconds = Gauge(
            "mainstem_inbox_oldest_seconds",
            "How long the settled entry that came to rest first has been at rest.",
            registry=registry,
        )
        self.progress = Gauge(
            "mainstem_merge_progress_ratio", "How far the expert in hand is, 0 to 1.", registry=registry
        )
        self.progressed_at = Gauge(
            "mainstem_merge_progress_timestamp_seconds",
            "When the expert in hand was last worked on, by an evaluator too.",
            registry=registry,
        )
        self.merge_seconds = Histogram(
            "mainstem_merge_seconds",
            "From taking an expert to its version being out and the expert in the archive.",
            buckets=SECONDS,
            registry=registry,
        )
        self.arrival_seconds = Histogram(
            "mainstem_arrival_seconds",
            "From an upload's last change to its version being out and the expert in the archive.",
            buckets=SECONDS,
            registry=registry,
        )
        self.phase_seconds = Counter(
            "mainstem_merge_phase_seconds",
            "Where merging spent its time, over all threads.",
            ["phase"],
            registry=registry,
        )
        self.disk_free = Gauge("mainstem_disk_free_bytes", "Free bytes on the file system of HOME.", registry=registry)
        self.disk_size = Gauge("mainstem_disk_size_bytes", "The size of that file system.", registry=registry)
        self.fsync_seconds = Histogram(
            "mainstem_fsync_seconds", "How long each fsync of a file or folder took.", buckets=BRIEF, registry=registry
        )
        self.disk_full = Gauge("mainstem_disk_full", "1 while merging waits for disk space.", registry=registry)
        self.registry_busy = Gauge(
            "mainstem_registry_busy", "1 while merging waits for another program to let go of the registry.",
            registry=registry,
        )  # fmt: skip
        self.block_bytes = Gauge(
            "mainstem_block_bytes", "How much of a large tensor is in memory at a time.", registry=registry
        )
        self.memory_budget = Gauge(
            "mainstem_memory_budget_bytes", "What all tensors in hand may take together.", registry=registry
        )
        self.memory_ready = Gauge(
            "mainstem_memory_ready_bytes",
            "Resident memory when it became ready: of Python, torch and the device's libraries.",
            registry=registry,
        )
        self.fallbacks = Counter(
            "mainstem_device_fallbacks",
            "Tensors computed on the CPU because the device could not take them.",
            registry=registry,
        )
        self.prepared = Gauge(
            "mainstem_prepared_ratio",
            "How much of what the next expert needs of a head's state is ready, 0 to 1.",
            ["head"],
            registry=registry,
        )
        self.reload_succeeded = Gauge(
            "mainstem_config_last_reload_successful",
            "1 where the settings could be read when they were last read.",
            registry=registry,
        )
        self.reload_seconds = Gauge(
            "mainstem_config_last_reload_success_timestamp_seconds",
            "When the settings were last read and could be.",
            registry=registry,
        )
        self.evaluations = Counter(
            "mainstem_evaluations",
            "Versions that were evaluated as their expert arrived, by what followed. failed: the evaluator did.",
            ["outcome"],
            registry=registry,
        )
        self.evaluation_seconds = Histogram(
            "mainstem_evaluation_seconds",
            "How long the evaluator took, each time that it gave scores.",
            buckets=SECONDS,
            registry=registry,
        )
        self.webhook_deliveries = Counter(
            "mainstem_webhook_deliveries",
            "Attempts to tell webhooks and hooks, by what came of them. dead: given up with this one.",
            ["outcome"],
            registry=registry,
        )
        self.webhook_pending = Gauge(
            "mainstem_webhook_pending", "Deliveries to webhooks and hooks that are still to be made.", registry=registry
        )
        self.webhook_dead_letters = Gauge(
            "mainstem_webhook_dead_letters", "Deliveries to webhooks and hooks that were given up.", registry=registry
        )
        self._evaluated: int | None = None  # the last evaluation that was counted
        for outcome in TELLINGS:
            self.webhook_deliveries.labels(outcome)
        for outcome in JUDGED:
            self.evaluations.labels(outcome)
        for outcome in OUTCOMES:
            self.experts.labels(outcome)
        for outcome in UPLOADS:
            self.uploads.labels(outcome)
        for reason in REASONS:
            self.refused.labels(reason)
        for flag in Flag:
            self.flagged.labels(str(flag))
        for phase in PHASES:
            self.phase_seconds.labels(phase)

    def computes_on(self, device: str) -> None:
        """Names what it computes on, and notes how much memory that takes before anything is merged."""
        self._build.info({"version": software_version(), "device": device})
        with suppress(OSError):  # another system than Linux
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.memory_ready.set(pages * resource.getpagesize())

    def watch_disk(self, home: Path) -> None:
        """Looks at the file system of that folder at every scrape."""

        def look() -> None:
            with suppress(OSError):  # what is wrong with it is told as a trouble
                usage = shutil.disk_usage(home)
                self.disk_free.set(usage.free)
                self.disk_size.set(usage.total)

        self._looks.append(look)

    def progressed(self, share: float) -> None:
        """The expert in hand is so far, 0 to 1."""
        self.progress.set(share)
        self.progressed_at.set_to_current_time()

    def show_inbox(self, settled: int, size_bytes: int, others: int, oldest_seconds: float) -> None:
        """Shows what was found in the inbox, just now: how much of it is at rest, and how many are not."""
        self.inbox_settled.set(settled)
        self.inbox_bytes.set(size_bytes)
        self.inbox_moving.set(others)
        self.oldest_seconds.set(oldest_seconds)
        self.inbox_scanned.set_to_current_time()

    def show_heads(self, reader: Reader) -> None:
        super().show_heads(reader)
        with self._showing:
            last = reader.last_evaluation_id()
            new = range((last if self._evaluated is None else self._evaluated) + 1, last + 1)
            for one in reader.evaluations(new).values():
                self.evaluation_seconds.observe(one.seconds)
            self._evaluated = last

    def judged(self, expert: Expert, reader: Reader) -> None:
        """Counts what the gate said of an expert that has just been decided; nothing where it was not asked."""
        if expert.status is Status.QUARANTINED and expert.verdict is not None:
            self.evaluations.labels("rejected").inc()
        elif expert.status is Status.MERGED and expert.version is not None:
            for head in reader.heads():
                version = reader.version(head.name, expert.version)
                if version and version.verdict is not None:
                    failed = version.verdict.get("error") is not None
                    self.evaluations.labels("failed" if failed else version.verdict["outcome"]).inc()

    def uploaded(self, outcome: str, size_bytes: int) -> None:
        """Counts a file that was sent over HTTP."""
        self.uploads.labels(outcome).inc()
        self.upload_bytes.inc(size_bytes)

    def reloaded(self, successful: bool) -> None:
        """Notes that the settings were read, and whether they could be."""
        self.reload_succeeded.set(successful)
        if successful:
            self.reload_seconds.set_to_current_time()


def _scored(reader: Reader, version: Version | None) -> dict[str, Score]:
    """The scores of a version, of MOST_TASKS tasks at the most."""
    found = reader.evaluation(version.evaluation) if version and version.evaluation is not None else None
    return {task: found.scores[task] for task in sorted(found.scores)[:MOST_TASKS]} if found else {}


class _Looks(Collector):
    """Has no metric of its own: it has the others brought up to date before they are read."""

    def __init__(self, looks: Iterable[Callable[[], None]]) -> None:
        self._looks = looks

    def collect(self) -> Iterable[Metric]:
        for look in self._looks:
            look()
        return ()
