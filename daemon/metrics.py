"""Every Prometheus metric of mainstem.

Labels are closed sets: never an expert's, a file's or a tensor's name. Tasks are the evaluator's, at most MOST_TASKS.
"""

from collections.abc import Iterable
from threading import Lock

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Metric, ProcessCollector
from prometheus_client.registry import Collector

from daemon.compute.progress import PHASES
from daemon.errors import Reason
from daemon.release import software_version
from projector.errors import Reason as ProjectorReason
from registry.reader import Reader
from registry.records import Deed, Expert, Flag, Status, Version

UPLOADS = ("stored", "refused", "broken")
OUTCOMES = ("merged", "duplicate", "quarantined", "requeued", "abandoned")
NOT_OF_EXPERTS = {"unknown", "home", "config", "pull", "changed", "bad_parameter", "unknown_method", "over_budget"}
NOT_OF_EXPERTS |= {"device_lost", "evaluation"}
NOT_OF_EXPERTS |= {"convert"} | {reason for reason in Reason if reason.startswith("upload_")}
REASONS = tuple(dict.fromkeys(str(r) for r in (*Reason, *ProjectorReason) if r not in NOT_OF_EXPERTS))
DEEDS = tuple(deed for deed in Deed if deed not in (Deed.EVALUATE, Deed.COLLECT))  # that leave a row
JUDGED = ("live", "held", "rejected", "failed")
MOST_TASKS = 32
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)


class HeadMetrics:
    """What any process over a home can tell: of itself, and of the heads. In a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Info("mainstem_build", "The software.", registry=registry).info({"version": software_version()})
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
            "mainstem_head_frozen", "1 while no later version becomes live by itself: after a rollback.", ["head"],
            registry=registry,
        )  # fmt: skip
        self.head_held = Gauge(
            "mainstem_head_held",
            "Versions newer than the live one that were not let live.",
            ["head"],
            registry=registry,
        )
        self.head_score = Gauge(
            "mainstem_head_score",
            f"What the live version scores in a task; the first {MOST_TASKS} by name.",
            ["head", "task"],
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
        for deed in DEEDS:
            self.interventions.labels(str(deed))
        self._figures: set[tuple[str, str]] = set()
        self._scores: set[tuple[str, str]] = set()
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
                newest = reader.version(head.name, head.newest)
                if newest and newest.number and newest.created_at:
                    self.last_success.set(newest.created_at.timestamp())
                version = newest if head.live == head.newest else reader.version(head.name, head.live)
                for figure, value in (version.figures if version else {}).items():
                    self.head_figure.labels(head.name, figure).set(value)
                    figures.add((head.name, figure))
                for task, score in _scored(reader, version).items():
                    self.head_score.labels(head.name, task).set(score)
                    scores.add((head.name, task))
            for gone in self._figures - figures:  # a version in which no expert is left reports nothing
                self.head_figure.remove(*gone)
            for gone in self._scores - scores:  # a task that is no more
                self.head_score.remove(*gone)
            self._figures, self._scores = figures, scores
            self.open_cases.set(reader.count_open())
            self._count_interventions(reader)

    def _count_interventions(self, reader: Reader) -> None:
        done, self._intervened = reader.count_interventions(self._intervened)
        for deed, count in done.items():
            self.interventions.labels(str(deed)).inc(count)

    def follow(self, reader: Reader) -> None:
        """Reads the heads from the registry at every scrape: for a process that does not merge itself."""
        self.registry.register(_Heads(self, reader))
        # collectors are asked in the order they came
        heads = self.head_version, self.head_newest, self.head_frozen, self.head_held, self.head_score
        for metric in (*heads, self.head_figure, self.last_success, self.interventions, self.open_cases):
            self.registry.unregister(metric)
            self.registry.register(metric)


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
        self._evaluated: int | None = None  # the last evaluation that was counted
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


def _scored(reader: Reader, version: Version | None) -> dict[str, float]:
    """The scores of a version, of MOST_TASKS tasks at the most."""
    found = reader.evaluation(version.evaluation) if version and version.evaluation is not None else None
    return {task: found.scores[task].score for task in sorted(found.scores)[:MOST_TASKS]} if found else {}


class _Heads(Collector):
    def __init__(self, metrics: HeadMetrics, reader: Reader) -> None:
        self._metrics = metrics
        self._reader = reader

    def collect(self) -> Iterable[Metric]:
        self._metrics.show_heads(self._reader)
        return ()
