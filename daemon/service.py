"""The daemon: recovers, watches the inbox, merges what has settled, serves HTTP, and stops when it is told to."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from threading import Event
from types import FrameType

import structlog

from daemon import durable
from daemon.compute import memory_budget
from daemon.config import Settings, check_heads
from daemon.errors import BadHome, DaemonError, NotYet, Reason
from daemon.health import Health, Trouble
from daemon.home import Home
from daemon.http import Hosts, HttpServer, base_url, create_app
from daemon.inbox import Drop, Inbox, Scan, Watcher
from daemon.logs import configure
from daemon.memory import return_freed_memory, reuse_freed_memory
from daemon.merger import Merger
from daemon.metrics import Metrics
from daemon.progress import Abandoned, Progress
from daemon.recovery import mark_clean, recover
from daemon.reloading import Read, Reloading, hearing
from daemon.retention import collect
from daemon.uploading import Uploads, write_token
from projector.errors import ProjectorError
from projector.methods import methods
from projector.text import shown
from registry.errors import DiskFull
from registry.records import Expert, Status
from registry.store import Reader, Store

Display = Callable[[Drop], AbstractContextManager[Callable[[float], None]]]

DISK_FULL_WAIT_SECONDS = 15.0
DESCRIPTORS_WAIT_SECONDS = 2.0
LOG_EVERY_SHARE = 0.25
WAKE_SECONDS = 0.01


class Service:
    """One run of the daemon over one home."""

    def __init__(
        self, home: Home, settings: Settings, display: Display | None = None, read: Read | None = None
    ) -> None:
        """`read`: reads the settings again; without it they stay as they are."""
        if not home.exists():
            raise BadHome(f"{home.root} is not a mainstem home", "make one: mainstem init HOME --base PATH")
        self._home = home
        self._settings = settings
        self._display = display or self._log_progress
        self._log = structlog.get_logger()
        self._metrics = Metrics()
        self._uploads = Uploads(home, settings.http, self._metrics.uploaded)
        self._reloading = Reloading(read or (lambda: settings), self._metrics)
        self._health = Health(home)
        self._wake = Event()
        self._stopping = Event()
        self._signalled = Event()
        self._not_ready: str | None = "recovering"
        self._show: Callable[[float], None] = lambda _: None

    def run(self, *, once: bool = False, http: bool = True) -> None:
        """Runs until SIGTERM or SIGINT; with `once`, until the inbox is drained.

        Raises BadHome where the home is in use or damaged, SyncFailed where the disk failed and DeviceLost where
        the device did; then only a restart helps.
        """
        reuse_freed_memory()
        self._metrics.block_bytes.set(self._settings.compute.block_bytes)
        self._metrics.memory_budget.set(memory_budget(self._settings.compute))
        with ExitStack() as closing:
            closing.callback(os.close, self._lock())
            closing.enter_context(self._signals())
            store = closing.enter_context(Store.open(self._home.registry))
            check_heads(self._settings.heads, [head.name for head in store.heads()])
            if http:
                self._serve(closing)
            recover(self._home, store, self._log.info)
            collect(self._home, store, self._settings.retention)
            progress = Progress(self._stopping, self._report, self._fell_back)
            try:
                merger = Merger(self._home, store, self._settings, progress)
            except (DaemonError, ProjectorError):
                mark_clean(self._home)  # what this start found sound, the next one need not hash again
                raise
            closing.callback(merger.close)
            self._metrics.show_heads(store)
            for head in store.heads():
                share = partial(merger.preparations.share, head.name)
                self._metrics.prepared.labels(head.name).set_function(share)
            self._watch(closing)
            self._not_ready = None
            self._log.info("ready", inbox=str(self._home.inbox), heads=[head.name for head in store.heads()])
            self._drain_on(store, merger, progress, once)
            mark_clean(self._home)
            self._log.info("stopped")

    def _drain_on(self, store: Store, merger: Merger, progress: Progress, once: bool) -> None:
        """Drains, and goes on where there were no descriptors left for a while."""
        while True:
            try:
                return self._drain(store, merger, progress, once)
            except OSError as error:
                if once or not durable.out_of_descriptors(error):
                    raise
                self._log.error(
                    "too many open files: waiting", error=str(error), hint="raise the limit (ulimit -n, LimitNOFILE=)"
                )
                self._stopping.wait(DESCRIPTORS_WAIT_SECONDS)

    def _drain(self, store: Store, merger: Merger, progress: Progress, once: bool) -> None:
        inbox = Inbox(self._home.inbox, self._settings.inbox.settle_seconds, time.monotonic)
        while not self._stopping.is_set():
            self._stopping.wait(WAKE_SECONDS)  # many events come at once
            self._wake.clear()
            if self._stopping.is_set():
                return
            self._reload(store, merger, inbox)
            self._uploads.tend()
            scan = inbox.scan(skip={expert.entry for expert in store.unplaced()})
            self._show_inbox(scan)
            waiting = scan.moving
            try:
                for drop in scan.settled:
                    if self._stopping.is_set():
                        return
                    self._reload(store, merger, inbox)
                    waiting += not self._take(store, merger, progress, drop)
            except (OSError, DiskFull) as error:
                if not _is_full(error):
                    raise
                if merger.preparations.discard():
                    continue  # that may be room enough
                if once:
                    raise
                self._wait_for_space(error, store, merger, inbox)
                continue  # with the oldest drop again: the order of merging does not change
            if once and not waiting and not scan.settled:
                return
            if scan.settled and not waiting:
                continue
            if self._settings.compute.prepare and not once and merger.preparations.missing:
                if why := merger.preparations.work(self._newly_settled(store, inbox, scan)):
                    self._log.warning("gave up preparing for the next expert: it will take longer", error=why)
                return_freed_memory()
                continue  # with a new listing: what came meanwhile may have settled
            self._wake.wait(self._pause(bool(waiting)))

    def _newly_settled(self, store: Store, inbox: Inbox, scan: Scan) -> Callable[[], bool]:
        """A question to be asked between two pieces of idle work: is there something else to do?

        What was settled already is incomplete: it is looked at again with the next listing.
        """
        skip = {expert.entry for expert in store.unplaced()}
        again = time.monotonic() + self._pause(scan.moving > 0)

        def stop() -> bool:
            nonlocal again
            if self._stopping.is_set() or self._reloading.asked:
                return True
            if self._wake.is_set() or time.monotonic() >= again:
                self._wake.clear()
                if self._stopping.is_set():
                    return True
                now = inbox.scan(skip)
                self._show_inbox(now)
                again = time.monotonic() + self._pause(now.moving > 0)
                if now.settled:
                    self._wake.set()
            return self._wake.is_set()

        return stop

    def _take(self, store: Store, merger: Merger, progress: Progress, drop: Drop) -> bool:
        """Takes one drop; False where it must be looked at again."""
        log = self._log.bind(drop=shown(drop.name))
        started = time.monotonic()
        try:
            with self._display(drop) as self._show:
                expert = merger.take(drop)
        except NotYet as error:
            log.debug("not complete yet", reason=str(error.reason), detail=str(error))
            if error.reason is Reason.CHANGED:
                self._metrics.experts.labels("requeued").inc()
            return False
        except Abandoned:
            self._metrics.experts.labels("abandoned").inc()
            log.info("abandoned: it will be taken again at the next start")
            return False
        finally:
            self._metrics.progress.set(0)
            return_freed_memory()
        self._metrics.disk_full.set(0)
        self._health.clear("disk_full")
        self._time(expert, drop, progress, started)
        self._tell(expert, store, log)
        return True

    def _report(self, share: float) -> None:
        self._metrics.progress.set(share)
        self._show(share)

    def _fell_back(self, name: str, why: str) -> None:
        self._metrics.fallbacks.inc()
        self._log.warning("computed on the CPU", tensor=shown(name), why=why)

    def _time(self, expert: Expert, drop: Drop, progress: Progress, started: float) -> None:
        metrics = self._metrics
        if expert.status is Status.MERGED:
            seconds = time.monotonic() - started
            metrics.merge_seconds.observe(seconds)
            metrics.arrival_seconds.observe(drop.waited_seconds)
            for phase, spent in progress.seconds.items():
                metrics.phase_seconds.labels(phase).inc(spent)

    def _tell(self, expert: Expert, store: Store, log: structlog.typing.FilteringBoundLogger) -> None:
        self._metrics.experts.labels(str(expert.status)).inc()
        if expert.reason:
            self._metrics.refused.labels(expert.reason).inc()
        if expert.status is Status.MERGED:
            self._metrics.show_heads(store)
            for flag in expert.flags:
                self._metrics.flagged.labels(str(flag)).inc()
            log.info("merged", id=expert.id, version=expert.version, norm=expert.norm, sha256=expert.sha256)
            if expert.flags:
                log.warning(
                    "merged, but look at it", id=expert.id, flags=expert.flags, detail=expert.detail, hint=expert.hint
                )
            even = [head.name for head in store.heads() if not methods()[head.method].weighted]
            if expert.weight != 1 and even:
                log.info(
                    "it counts as any other in heads whose method has no weights", weight=expert.weight, heads=even
                )
        elif expert.status is Status.DUPLICATE:
            log.info("a duplicate: merged before", id=expert.id, of=expert.duplicate_of)
        else:
            log.warning("refused", id=expert.id, reason=expert.reason, detail=expert.detail, hint=expert.hint)
        if (now := store.expert(expert.id)) and now.place is None:
            log.warning("it cannot be moved out of the inbox", id=expert.id, hint="look at its owner, then remove it")

    def _show_inbox(self, scan: Scan) -> None:
        self._metrics.inbox_settled.set(len(scan.settled))
        self._metrics.inbox_moving.set(scan.moving)
        self._metrics.oldest_seconds.set(max((drop.rest_seconds for drop in scan.settled), default=0.0))
        self._metrics.disk_free.set(shutil.disk_usage(self._home.root).free)

    def _pause(self, waiting: bool) -> float:
        settings = self._settings.inbox
        return min(settings.scan_seconds, max(0.05, settings.settle_seconds / 4)) if waiting else settings.scan_seconds

    def _wait_for_space(self, error: OSError | DiskFull, store: Store, merger: Merger, inbox: Inbox) -> None:
        """Waits, and goes on waiting while there is no room to finish what was cut short.

        Raises `error` itself where it means anything but a full disk.
        """
        while not self._stopping.is_set():
            if not _is_full(error):
                raise error
            self._metrics.disk_full.set(1)
            self._health.note(
                Trouble("disk_full", "the disk is full: merging waits for space", "make room for the home")
            )
            self._log.error("the disk is full: waiting for space", hint="make room for HOME; nothing is lost")
            self._signalled.wait(DISK_FULL_WAIT_SECONDS)
            self._signalled.clear()
            self._reload(store, merger, inbox)  # fewer versions to keep may be room enough
            try:
                for expert in merger.finish():
                    self._tell(expert, store, self._log.bind(drop=expert.name))
                return
            except (OSError, DiskFull) as again:
                error = again

    def _reload(self, store: Store, merger: Merger, inbox: Inbox) -> None:
        """Where it was asked for: the settings again, for whatever comes next."""

        def adopt(settings: Settings) -> None:
            token = write_token(self._home, settings.http)
            merger.adopt(settings)
            if token != self._uploads.token:
                self._log.info("the write token was changed", uploads="on" if token else "off")
            self._uploads.adopt(settings.http, token)
            inbox.settle_seconds = settings.inbox.settle_seconds
            configure(settings.log)

        if self._reloading.asked:
            heads = [head.name for head in store.heads()]
            self._settings = self._reloading.settings(self._settings, heads, adopt)

    def _lock(self) -> int:
        try:
            return durable.lock(self._home.lock)
        except BlockingIOError:
            raise BadHome(
                f"another mainstem is running on {self._home.root}", "stop it first; `mainstem serve` runs beside it"
            ) from None

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(*_: int | FrameType | None) -> None:
            self._stopping.set()
            self._signalled.set()
            self._wake.set()

        def reload() -> None:
            self._reloading.asked = True
            self._signalled.set()
            self._wake.set()

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with hearing(reload, stop):
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _serve(self, closing: ExitStack) -> None:
        reader = closing.enter_context(Reader.open(self._home.registry))
        http = self._settings.http
        hosts = Hosts(http.host, http.allowed_hosts)
        metrics = self._metrics.registry
        app = create_app(self._home, reader, metrics, lambda: self._not_ready, self._uploads, hosts, self._health)
        server = HttpServer(app, http.host, http.port, http.stall_seconds)
        host, port = server.start()
        closing.callback(server.stop)
        self._log.info("listening", url=base_url(host, port))

    def _watch(self, closing: ExitStack) -> None:
        if self._settings.inbox.watch == "poll":
            return
        watcher = Watcher(self._home.inbox, self._wake)
        try:
            watcher.start()
        except OSError as error:
            self._log.warning("no file system events: the inbox is only listed", error=str(error))
        else:
            closing.callback(watcher.stop)

    @contextmanager
    def _log_progress(self, drop: Drop) -> Iterator[Callable[[float], None]]:
        """Where there is no terminal: a line at every quarter of a long merge."""
        said = 0.0
        started = time.monotonic()

        def show(share: float) -> None:
            nonlocal said
            if share >= said + LOG_EVERY_SHARE and time.monotonic() - started > 2:
                said = share
                self._log.info("merging", drop=shown(drop.name), share=round(share, 2))

        yield show


def _is_full(error: OSError | DiskFull) -> bool:
    """True where waiting for space helps; anything else that the disk says must end the process."""
    return durable.failed_sync(error) is None and (isinstance(error, DiskFull) or durable.is_full(error))
