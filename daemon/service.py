"""The daemon: recovers, watches the inbox, merges what has settled, serves HTTP, and stops when it is told to."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from threading import Event
from types import FrameType

import structlog

from daemon.arrivals.attempts import Attempts
from daemon.arrivals.filing import say_immovable
from daemon.arrivals.inbox import Drop, Inbox, Scan
from daemon.arrivals.inbox_folder import Watching
from daemon.arrivals.uploads import Uploads, write_token
from daemon.checkpoints.unfinished import said_by
from daemon.compute.progress import Abandoned, Progress
from daemon.compute.resources import device_name, memory_budget, return_freed_memory, reuse_freed_memory
from daemon.config import Settings
from daemon.disk import durable
from daemon.errors import BadHome, DaemonError, Failed, NotYet, Reason
from daemon.home.health import MAKE_ROOM, Health, Trouble
from daemon.home.named_heads import check_heads
from daemon.home.orders import Orders, fulfilled
from daemon.home.presence import Presence, lock
from daemon.home.recovery import mark_clean, recover
from daemon.home.supervision import Supervision
from daemon.http import HttpServer, base_url, create_app
from daemon.interventions.requests import Desk
from daemon.interventions.waiting import answer_waiting
from daemon.layout import Home
from daemon.logs import configure
from daemon.merge.lingering import Lingering
from daemon.merge.merger import Merger
from daemon.merge.outcome import logged_progress, tell, timed
from daemon.metrics import Metrics
from daemon.outbox.sending import Sender, endpoints
from daemon.reloading import Read, Reloading, Stop, hearing, wake
from daemon.versions.retention import collect
from projector.errors import ProjectorError
from projector.text import shown
from registry.errors import Busy, DiskFull
from registry.reader import Reader
from registry.records import Expert, Status
from registry.store import Store

Display = Callable[[Drop], AbstractContextManager[Callable[[float], None]]]

DISK_FULL_WAIT_SECONDS = 15.0
SHORTAGE_WAIT_SECONDS = 2.0
ONCE_WAITS_SECONDS = 60.0  # for a registry that another program holds: whoever drains once wants an answer
WAKE_SECONDS = 0.01


class Service:
    """One run of the daemon over one home."""

    def __init__(
        self, home: Home, settings: Settings, display: Display | None = None, read: Read | None = None
    ) -> None:
        """`read`: reads the settings again; without it they stay as they are."""
        if not home.exists():
            raise BadHome(
                f"{home.root} is not a mainstem home",
                f"make one, with the model that experts come from: mainstem init {home.root} --base PATH",
            )
        self._home = home
        self._settings = settings
        self._display = display or logged_progress
        self._log = structlog.get_logger()
        self._metrics = Metrics()
        self._supervision = Supervision()
        self._presence = Presence(home, self._supervision.hears)
        self._reloading = Reloading(read or (lambda: settings), self._metrics, self._presence.unread)
        self._health = Health(home, self._presence.wrong)
        self._wake = Event()
        self._uploads = Uploads(home, settings.http, self._metrics.uploaded, self._wake.set)
        self._stopping = Stop(self._supervision)
        self._signalled = Event()
        self._not_ready: str | None = "recovering"
        self._busy_since: float | None = None
        self._once = False
        self._interrupted = False
        self._told = 0  # the newest expert that the log has spoken of
        self._attempts: Attempts | None = None  # once the home's lock is held
        self._sender: Sender | None = None  # once it has recovered
        self._show: Callable[[float], None] = lambda _: None

    def run(self, *, once: bool = False, http: bool = True) -> None:
        """Runs until SIGTERM or SIGINT; with `once`, until the inbox is drained.

        Raises BadHome where the home is in use or damaged, SyncFailed where the disk failed and DeviceLost where
        the device did; then only a restart helps. With `once` also Busy, where another program holds the registry.
        """
        reuse_freed_memory()
        self._once = once
        self._metrics.block_bytes.set(self._settings.compute.block_bytes)
        self._metrics.memory_budget.set(memory_budget(self._settings.compute))
        self._metrics.watch_disk(self._home.root)
        with ExitStack() as closing:
            closing.enter_context(durable.syncs_heard(self._metrics.fsync_seconds.observe))
            closing.callback(os.close, lock(self._home))
            closing.callback(self._presence.ends)
            self._presence.starts()
            self._attempts = Attempts(self._home)
            closing.enter_context(self._signals())
            try:
                self._start(closing, once, http)
            except Abandoned:  # the next start does again what this one did not come to
                self._log.info("stopped before it was ready")

    def _start(self, closing: ExitStack, once: bool, http: bool) -> None:
        """Recovers, and drains the inbox until it is told to stop. Raises Abandoned where that came first."""
        store = closing.enter_context(Store.open(self._home.registry, self._wait_for_registry))
        store.timed = self._metrics.transaction
        if found := check_heads(self._settings, [head.name for head in store.heads()]):
            self._log.warning(found[0], hint=found[1])
        if http:
            self._serve(closing)
        crashed = not self._home.clean.exists()
        self._recover(store, once)
        who = self._home, store, self._settings, self._metrics, crashed, self._stopping if once else None
        self._sender = closing.enter_context(Sender(*who))
        progress = Progress(self._stopping, self._report, self._fell_back)
        try:
            merger = Merger(self._home, store, self._settings, progress, self._judging)
        except (DaemonError, ProjectorError, Abandoned):
            mark_clean(self._home)  # what this start found sound, the next one need not hash again
            raise
        closing.callback(merger.close)
        self._supervision.expects(merger.longest_seconds)
        self._presence.computes(merger.device, memory_budget(self._settings.compute))
        self._told = max((expert.id for expert in store.experts(limit=1)), default=0)
        self._metrics.show_heads(store)
        for head in store.heads():
            self._metrics.prepared.labels(head.name).set_function(partial(merger.preparations.share, head.name))
        rouse = partial(wake, self._signalled, self._wake)
        desk = Desk(self._home, store, rouse, lambda _: self._metrics.show_heads(store), self._reloading.ask)
        closing.callback(desk.close)
        watching = Watching(self._home, self._wake, events=self._settings.inbox.watch != "poll")
        closing.callback(watching.close)
        self._look(watching)
        self._uploads.resume()
        self._metrics.computes_on(device_name(self._settings.compute))
        self._not_ready = None
        self._presence.watches()
        self._log.info("ready", inbox=str(self._home.inbox), heads=[head.name for head in store.heads()])
        with suppress(Abandoned):  # what is recorded is finished by the next start
            self._drain_on(store, merger, desk, progress, watching, once)
        mark_clean(self._home)
        fulfilled(self._home)
        self._log.info("stopped")

    def _recover(self, store: Store, once: bool) -> None:
        """Makes the home sound; waits for space where that takes some. Raises Abandoned once the daemon is to stop."""
        watch = Progress(self._stopping, lambda _: None)
        while True:
            try:
                recover(self._home, store, self._log.info, watch)
                collect(self._home, store, self._settings.retention, partial(watch.advance, 0))
                return
            except (OSError, DiskFull) as error:
                self._wait_for_space(error, once)
                watch.advance(0)

    def _wait_for_space(self, error: OSError | DiskFull, once: bool) -> None:
        """Raises `error` itself where it means anything but a full disk, or where there is nobody to wait."""
        if once or not _is_full(error):
            raise error
        self._show_disk(full=True)
        hint = f"make room on the disk of {self._home.root}; nothing is lost"
        self._log.error("the disk is full: waiting for space", hint=hint)
        self._signalled.wait(DISK_FULL_WAIT_SECONDS)
        self._signalled.clear()

    def _drain_on(
        self, store: Store, merger: Merger, desk: Desk, progress: Progress, watching: Watching, once: bool
    ) -> None:
        """Drains, and goes on where descriptors or memory were short for a while."""
        while True:
            try:
                return self._drain(store, merger, desk, progress, watching, once)
            except OSError as error:
                if once or not durable.is_short(error):
                    raise
                hint = "raise the limit (ulimit -n, LimitNOFILE=), or give it more memory"
                self._log.error("too many open files, or no memory: waiting", error=str(error), hint=hint)
                self._stopping.wait(SHORTAGE_WAIT_SECONDS)
                self._interrupted = True  # perhaps in the middle of a move

    def _drain(
        self, store: Store, merger: Merger, desk: Desk, progress: Progress, watching: Watching, once: bool
    ) -> None:
        assert self._attempts and self._sender
        inbox = Inbox(self._home.inbox, self._settings.inbox.settle_seconds, time.monotonic)
        lingering = Lingering(self._home, store, merger)
        orders = Orders(self._home, self._presence, self._log, once=once)
        while not self._stopping.is_set():
            self._stopping.wait(WAKE_SECONDS)  # many events come at once
            self._wake.clear()
            if self._stopping.is_set():
                return
            self._reload(store, merger, inbox)
            self._uploads.tend()
            self._sender.tend()
            self._answer(store, merger, desk)
            if not self._inbox_is_there(watching, store, merger, inbox, desk, once):
                self._stopping.wait(self._pause(False))
                continue
            orders.lists()
            try:
                scan = inbox.scan(skip=lingering.decided())
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue  # to see what became of it
            self._show_inbox(scan)
            drops = orders.allowed(self._attempts.order(scan.settled), scan)
            waiting = scan.moving + len(scan.settled) - len(drops)
            lingering.held(scan, self._settings.inbox)
            for held in scan.held:
                self._presence.waits(held.name, said_by(held.waits_for))
            try:
                if self._interrupted:
                    self._finish(store, merger)
                    self._interrupted = False
                lingering.look(scan)
                if not scan.moving:
                    self._attempts.keep({drop.entry for drop in scan.settled})
                for drop in orders.until_paused(drops):
                    if self._stopping.is_set():
                        return
                    self._reload(store, merger, inbox)
                    self._answer(store, merger, desk)
                    waiting += not self._take(store, merger, progress, drop, lingering)
            except (OSError, DiskFull) as error:
                self._make_room(error, store, merger, inbox, desk, once)
                continue  # with the oldest drop again: the order of merging does not change
            self._show_disk(full=False)
            if (once or orders.draining) and lingering.patient(orders.queue(scan), self._settings.inbox):
                return
            if scan.settled and not waiting:
                continue
            if self._settings.compute.prepare and not (once or orders.paused) and merger.preparations.missing:
                if why := merger.preparations.work(self._newly_settled(store, inbox, scan)):
                    self._log.warning("gave up preparing for the next expert: it will take longer", error=why)
                return_freed_memory()
                continue  # with a new listing: what came meanwhile may have settled
            self._wake.wait(self._pause(not orders.paused and lingering.soon(scan, waiting, self._settings.inbox)))

    def _answer(self, store: Store, merger: Merger, desk: Desk) -> None:
        """Does what waits at the desk. Raises what ended it, and Abandoned at a stop: the same command then goes on."""
        desk.check()
        if desk.waiting:
            merger.preparations.discard()  # for the memory and the space
            answer_waiting(self._home, store, self._settings, desk, self._stopping)
            merger.follow()

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
                self._uploads.tend()
                try:
                    now = inbox.scan(skip)
                except (FileNotFoundError, NotADirectoryError, PermissionError):
                    self._wake.set()
                    return True
                self._show_inbox(now)
                again = time.monotonic() + self._pause(now.moving > 0)
                if now.settled:
                    self._wake.set()
            return self._wake.is_set()

        return stop

    def _take(self, store: Store, merger: Merger, progress: Progress, drop: Drop, lingering: Lingering) -> bool:
        """Takes one drop; False where it must be looked at again."""
        assert self._attempts
        lingering.begin(drop)
        log = self._log.bind(drop=shown(drop.name))
        started = time.monotonic()
        try:
            with self._presence.merging(drop.name), self._display(drop) as self._show:
                expert = self._attempts.decided(drop, merger.decide, merger.refuse)
        except NotYet as error:
            log.debug("not complete yet", reason=str(error.reason), detail=str(error))
            if error.reason is Reason.CHANGED:
                self._metrics.experts.labels("requeued").inc()
            else:
                lingering.incomplete(drop, error)
            self._presence.waits(drop.name, str(error))
            return False
        except Abandoned:
            self._metrics.experts.labels("abandoned").inc()
            log.info("abandoned: it will be taken again at the next start")
            return False
        except Failed as error:
            self._metrics.experts.labels("requeued").inc()
            log.warning("it failed and will be tried again", reason=str(error.reason), detail=str(error))
            self._presence.waits(drop.name, f"it failed, and is tried again: {error}")
            return False
        finally:
            self._metrics.progress.set(0)
            return_freed_memory()
        self._show_disk(full=False)
        moved = True
        try:
            self._attempts.let_go()
            moved = merger.tidy(expert)
        finally:  # whatever hinders the tidying, what was recorded counts
            if expert.status is Status.MERGED:
                timed(drop, progress, time.monotonic() - started, self._metrics)
            self._metrics.progress.set(0)  # it was looked at once more
            self._tell(expert, store, log)
        if not moved:
            say_immovable(self._home, expert)
        return True

    def _let_go(self) -> None:
        """From here on the end of this process is no expert's doing."""
        if self._attempts:
            self._attempts.let_go()

    def _judging(self) -> AbstractContextManager[None]:
        self._let_go()
        return self._presence.evaluating()

    def _report(self, share: float) -> None:
        self._metrics.progressed(share)
        self._presence.progresses(share)
        self._show(share)

    def _fell_back(self, name: str, why: str) -> None:
        self._metrics.fallbacks.inc()
        self._log.warning("computed on the CPU", tensor=shown(name), why=why)

    def _tell(self, expert: Expert, store: Store, log: structlog.typing.FilteringBoundLogger) -> None:
        self._told = expert.id
        tell(expert, store, self._settings.admission.naming, self._metrics, log)

    def _show_inbox(self, scan: Scan) -> None:
        drops = scan.settled
        oldest, size_bytes = max((drop.rest_seconds for drop in drops), default=0.0), sum(d.size_bytes for d in drops)
        self._metrics.show_inbox(len(drops), size_bytes, scan.moving + len(scan.held), oldest)

    def _show_disk(self, *, full: bool) -> None:
        self._metrics.disk_full.set(full)
        if full:
            self._health.note(Trouble("disk_full", "the disk is full: merging waits for space", MAKE_ROOM))
        else:
            self._health.clear("disk_full")

    def _pause(self, waiting: bool) -> float:
        settings = self._settings.inbox
        longest = min(settings.scan_seconds, self._supervision.longest_wait_seconds)
        return min(longest, max(0.05, settings.settle_seconds / 4)) if waiting else longest

    def _make_room(
        self, error: OSError | DiskFull, store: Store, merger: Merger, inbox: Inbox, desk: Desk, once: bool
    ) -> None:
        """Gives up what was prepared, and waits for room to finish what was cut short; at the desk, too: gc makes some.

        Raises `error` itself where it means anything but a full disk, or where there is nobody to wait.
        """
        if not _is_full(error):
            raise error
        wait = not merger.preparations.discard()  # that may be room enough
        while not self._stopping.is_set():
            if wait:
                self._wait_for_space(error, once)
                self._uploads.tend()
                self._reload(store, merger, inbox)  # fewer versions to keep may be room enough
            wait = True
            try:
                self._answer(store, merger, desk)
                self._finish(store, merger)
                return
            except (OSError, DiskFull) as again:
                if not _is_full(again):
                    raise
                error = again

    def _reload(self, store: Store, merger: Merger, inbox: Inbox) -> None:
        """Where it was asked for: the settings again, for whatever comes next."""

        def adopt(settings: Settings) -> None:
            token = write_token(self._home, settings.http)
            told = endpoints(self._home, settings)
            merger.adopt(settings)
            if self._sender:
                self._sender.adopt(settings, told)
            if token != self._uploads.token:
                self._log.info("the write token was changed", uploads="on" if token else "off")
            self._uploads.adopt(settings.http, token)
            inbox.settle_seconds = settings.inbox.settle_seconds
            configure(settings.log)

        if self._reloading.asked:
            heads = [head.name for head in store.heads()]
            self._settings = self._reloading.settings(self._settings, heads, adopt)

    def _finish(self, store: Store, merger: Merger) -> None:
        """Finishes what was cut short. An expert may have been recorded, and nothing said of it yet."""
        for expert in merger.finish():
            if expert.id > self._told:
                self._tell(expert, store, self._log.bind(drop=expert.name))

    def _wait_for_registry(self, busy: Busy | None) -> None:
        """Hears that another program holds the registry, and of the end of that. Raises Abandoned at a stop, and `busy`
        itself where it drains once and has waited for long."""
        if busy and self._busy_since is None:
            self._busy_since = time.monotonic()
            text = "another program holds the registry: merging waits for it"
            self._health.note(Trouble("registry", text, busy.hint))
            self._log.warning("another program holds the registry: waiting for it", hint=busy.hint)
        if not busy:
            self._health.clear("registry")
            self._log.info("the registry is free again")
            self._busy_since = None
        self._metrics.registry_busy.set(busy is not None)
        if self._stopping.is_set():
            raise Abandoned
        if busy and self._once and time.monotonic() - (self._busy_since or 0) >= ONCE_WAITS_SECONDS:
            raise busy

    def _look(self, watching: Watching) -> str | None:
        """Listens to the inbox that is there now; why there is none, if so, which is told to whoever asks."""
        if why := watching.look():
            self._health.note(Trouble("no_inbox", why, f"{watching.hint}: merging goes on by itself"))
        else:
            self._health.clear("no_inbox")
        return why

    def _inbox_is_there(
        self, watching: Watching, store: Store, merger: Merger, inbox: Inbox, desk: Desk, once: bool
    ) -> bool:
        """Finishes what lies in it, where it has come back."""
        why = self._look(watching)
        if why and once:
            raise BadHome(why, watching.hint)
        if watching.moved:
            try:
                self._finish(store, merger)
            except (OSError, DiskFull) as error:
                self._make_room(error, store, merger, inbox, desk, once)
        return why is None

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(*_: int | FrameType | None) -> None:
            self._stopping.ask()
            wake(self._signalled, self._wake)
            self._let_go()

        def reload() -> None:
            self._reloading.asked = True
            wake(self._signalled, self._wake)

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
        reader.timed = self._metrics.transaction
        metrics, hung = self._metrics, self._supervision.hung
        asked = metrics.registry, lambda: self._not_ready, self._uploads, self._health, hung
        app = create_app(self._home, reader, *asked, counting=metrics, settings=lambda: self._settings)
        server = HttpServer(app, http.host, http.port, http.stall_seconds)
        host, port = server.start()
        closing.callback(server.stop)
        self._presence.answers(base_url(host, port))
        self._log.info("listening", url=base_url(host, port))


def _is_full(error: OSError | DiskFull) -> bool:
    """True where waiting for space helps; anything else that the disk says must end the process."""
    return durable.failed_sync(error) is None and (isinstance(error, DiskFull) or durable.is_full(error))
