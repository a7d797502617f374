"""Every Prometheus metric of mainstem. Labels are closed sets: never an expert's, a file's or a tensor's name."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Metric, ProcessCollector
from prometheus_client.registry import Collector

from daemon.compute.progress import PHASES
from daemon.errors import Reason
from daemon.release import software_version
from projector.errors import Reason as ProjectorReason
from registry.reader import Reader
from registry.records import Flag

UPLOADS = ("stored", "refused", "broken")
OUTCOMES = ("merged", "duplicate", "quarantined", "requeued", "abandoned")
NOT_OF_EXPERTS = {"unknown", "home", "config", "pull", "changed", "bad_parameter", "unknown_method", "over_budget"}
NOT_OF_EXPERTS |= {"device_lost", "evaluation"}
NOT_OF_EXPERTS |= {"convert"} | {reason for reason in Reason if reason.startswith("upload_")}
REASONS = tuple(dict.fromkeys(str(r) for r in (*Reason, *ProjectorReason) if r not in NOT_OF_EXPERTS))
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
        self.head_figure = Gauge(
            "mainstem_head_figure",
            "What a head's method reports (lambda, norms, ...).",
            ["head", "figure"],
            registry=registry,
        )
        self.last_success = Gauge(
            "mainstem_last_success_timestamp_seconds", "When the last version was committed.", registry=registry
        )
        self._figures: set[tuple[str, str]] = set()

    def show_heads(self, reader: Reader) -> None:
        """Sets what the registry says of the heads."""
        told = set()
        for head in reader.heads():
            self.head_version.labels(head.name).set(head.live)
            version = reader.version(head.name, head.live)
            if version and version.number and version.created_at:
                self.last_success.set(version.created_at.timestamp())
            for figure, value in (version.figures if version else {}).items():
                self.head_figure.labels(head.name, figure).set(value)
                told.add((head.name, figure))
        for gone in self._figures - told:  # a version in which no expert is left reports nothing
            self.head_figure.remove(*gone)
        self._figures = told

    def follow(self, reader: Reader) -> None:
        """Reads the heads from the registry at every scrape: for a process that does not merge itself."""
        self.registry.register(_Heads(self, reader))
        # collectors are asked in the order they came
        for gauge in (self.head_version, self.head_figure, self.last_success):
            self.registry.unregister(gauge)
            self.registry.register(gauge)


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

    def uploaded(self, outcome: str, size_bytes: int) -> None:
        """Counts a file that was sent over HTTP."""
        self.uploads.labels(outcome).inc()
        self.upload_bytes.inc(size_bytes)

    def reloaded(self, successful: bool) -> None:
        """Notes that the settings were read, and whether they could be."""
        self.reload_succeeded.set(successful)
        if successful:
            self.reload_seconds.set_to_current_time()


class _Heads(Collector):
    def __init__(self, metrics: HeadMetrics, reader: Reader) -> None:
        self._metrics = metrics
        self._reader = reader

    def collect(self) -> Iterable[Metric]:
        self._metrics.show_heads(self._reader)
        return ()
