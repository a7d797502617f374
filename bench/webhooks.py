"""How soon a webhook hears of a commit, and what one that never answers costs.

    python -m bench.webhooks SCRATCH --events 10000

A registry alone, in a folder made in SCRATCH (removed afterwards): no model is merged, so that what an event costs is
seen beside a commit and not beside a merge. Latency: from the commit's return to the request's arrival at a receiver on
this machine, one after the other. Dead: so many refusals are recorded for an endpoint that refuses every connection,
while a sender tries it; what each takes, in wall seconds and in CPU seconds of the thread that records it, is compared
with a registry in which nobody wants to hear, in turn, block by block. Rows and bytes are the database's, with the
endpoint and without.
"""

import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median

from bench.live import scratch
from bench.record import parser, save
from daemon.config import Settings
from daemon.layout import Home
from daemon.metrics import Metrics
from daemon.outbox.sending import Sender
from registry.records import BaseModel, Head, NewExpert, NewVersion, Status
from registry.store import Store

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
COMMITS = 200
BLOCK = 500  # events of one registry before it is the other's turn
NOW = datetime(2026, 3, 1, tzinfo=UTC)


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("scratch", type=Path)
    made.add_argument("--events", type=int, default=10_000)
    options = made.parse_args()
    with scratch(options.scratch / "webhooks") as folder:
        figures = {"commits": COMMITS, **latency(folder), **dead(folder, options.events)}
    save("webhooks", options, figures)


def home(root: Path) -> Home:
    """A home of which there is no more than the registry."""
    made = Home(root)
    made.state.mkdir(parents=True)
    base = BaseModel("base", "ab" * 32, 1, 4, NOW)
    Store.create(made.registry, base, [Head("main", "mean", {}, 0, 0)], [version(0)])
    return made


def version(number: int) -> NewVersion:
    return NewVersion("main", number, number - 1 if number else None, f"{number:064x}", 500, {"n": number}, {})


def expert(number: int, status: Status) -> NewExpert:
    reason = None if status is Status.MERGED else "pickle"
    name, digest = f"expert-{number}", f"{number:064x}"
    return NewExpert(name, "file", digest, 1000, status, NOW, f"1:{number}:1", norm=1.0, reason=reason)


def webhooks(url: str) -> Settings:
    hook = {"url": url, "secret": SECRET, "allow_private": True, "timeout_seconds": 5}
    return Settings.model_validate({"webhooks": [hook]})


@contextmanager
def receiving(came: list[float]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came.append(time.perf_counter())
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def latency(folder: Path) -> dict[str, float]:
    """From a commit's return to the request's arrival, in seconds."""
    at, came, waited = home(folder / "latency"), [], []
    with receiving(came) as url, Store.open(at.registry) as store, Sender(at, store, webhooks(url), Metrics()):
        for number in range(1, COMMITS + 1):
            store.commit(expert(number, Status.MERGED), [version(number)])
            committed = time.perf_counter()
            while len(came) < number:
                time.sleep(0.0002)
            waited.append(came[-1] - committed)
            time.sleep(0.01)
    return {"latency_seconds": median(waited), "latency_worst_seconds": max(waited)}


def dead(folder: Path, events: int) -> dict[str, float | int]:
    """What so many events cost that nobody takes."""
    heard, quiet = home(folder / "heard"), home(folder / "quiet")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        settings = webhooks(f"http://127.0.0.1:{nobody.getsockname()[1]}/")
        seconds: dict[str, list[float]] = {"heard": [], "quiet": []}
        worked: dict[str, float] = {"heard": 0.0, "quiet": 0.0}
        with (
            Store.open(heard.registry) as told,
            Sender(heard, told, settings, Metrics()),
            Store.open(quiet.registry) as untold,
        ):
            for first in range(0, events, BLOCK):
                for name, store in (("heard", told), ("quiet", untold)):
                    for number in range(first, min(first + BLOCK, events)):
                        started, working = time.perf_counter(), time.thread_time()
                        store.record(expert(number, Status.QUARANTINED))
                        seconds[name].append(time.perf_counter() - started)
                        worked[name] += time.thread_time() - working
            dropped = told.endpoints()[0].dropped
    rows, size = _size(heard), _size(quiet)
    return {
        "events": events,
        "event_cpu_seconds": worked["heard"] / events,
        "event_cpu_seconds_without": worked["quiet"] / events,
        "event_seconds": median(seconds["heard"]),
        "event_seconds_without": median(seconds["quiet"]),
        "event_seconds_worst": max(seconds["heard"]),
        "event_seconds_worst_without": max(seconds["quiet"]),
        "rows": rows[0],
        "dropped": dropped,
        "bytes": rows[1] - size[1],
    }


def _size(at: Home) -> tuple[int, int]:
    """The deliveries that are kept, and the bytes of the database."""
    with closing(sqlite3.connect(at.registry)) as raw:
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        rows: int = raw.execute("SELECT count(*) FROM deliveries").fetchone()[0]
    return rows, at.registry.stat().st_size


if __name__ == "__main__":
    main()
