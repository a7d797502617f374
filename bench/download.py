"""Downloads: one against `cp` and a bare file server, and many at once while versions change.

    python -m bench.download FOLDER --experts 4

One download: a client in this process fetches the base's weights, version 0, and writes them to a file on the
checkpoints' file system: from `mainstem serve`, and from a bare uvicorn with starlette's FileResponse over the same
file; `cp` copies it to the same place. The three take turns; nobody syncs, and the file is in the page cache.

Many: a real daemon merges one expert after the other and removes old versions at once, while so many clients fetch
whatever `latest` names, again and again, and hold every file against the manifest's sha256. The experts are spread
over two rounds of pulls, so that versions change under them, and a last round fetches the last version. A version that
is removed under a client is answered with 410, and counted; anything else that is not the right bytes ends the
measurement.
"""

import hashlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.live import Daemon, drop, make_home, running, scratch, warm
from bench.record import ROOT, checkpoints, parser, save
from daemon.layout import Home

WEIGHTS = "model.safetensors"
BLOCK = 1 << 20
START_SECONDS = 60.0
PAUSE_SECONDS = 0.05
ROUNDS = 2  # of pulls by every client, over which the experts are spread
GONE = 410
BARE = """
import sys, uvicorn
from starlette.applications import Starlette
from starlette.responses import FileResponse
from starlette.routing import Route
app = Starlette(routes=[Route("/file", lambda request: FileResponse(sys.argv[1]))])
uvicorn.run(app, port=int(sys.argv[2]), loop="asyncio", http="h11", log_level="critical")
"""
"""The same loop and parser as ours, so that only the sending of the file differs."""


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("checkpoints", type=Path)
    made.add_argument("--experts", type=int, default=4)
    made.add_argument("--repeats", type=int, default=7)
    made.add_argument("--pulls", type=int, default=32)
    options = made.parse_args()
    base, experts = checkpoints(options.checkpoints, options.experts)
    warm([base, *experts])
    with scratch(base) as folder:
        home = make_home(folder, base, "mean")
        figures = {"model_bytes": (base / WEIGHTS).stat().st_size, **single(home, folder, options.repeats)}
        figures["parallel"] = parallel(home, experts, options.pulls)
    save("download", options, figures)


def single(home: Home, folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds of every copy of version 0's weights, by who made it, and their medians."""
    source, target = home.version("main", 0) / WEIGHTS, folder / "copy"
    seconds: dict[str, list[float]] = {"mainstem": [], "bare": [], "cp": []}
    ports = free_port(), free_port()
    ours = [sys.executable, "-m", "daemon", "serve", "--home", str(home.root), "--port", str(ports[0])]
    with serving(ours, ports[0]), serving([sys.executable, "-c", BARE, str(source), str(ports[1])], ports[1]):
        makers: dict[str, Callable[[], object]] = {
            "mainstem": lambda: fetch(ports[0], f"/v1/heads/main/versions/0/files/{WEIGHTS}", target),
            "bare": lambda: fetch(ports[1], "/file", target),
            "cp": lambda: subprocess.run(["cp", source, target], check=True),
        }
        for turn in range(repeats + 1):
            for name, make in makers.items():
                started = time.perf_counter()
                make()
                if turn:  # the first is a warm-up
                    seconds[name].append(time.perf_counter() - started)
                if target.stat().st_size != source.stat().st_size:
                    raise SystemExit(f"{name} did not copy all of it")
                target.unlink()
    return {**seconds, **{f"{name}_median": median(found) for name, found in seconds.items()}}


@dataclass
class Seen:
    """What all clients together have fetched."""

    pulls: int = 0
    gone: int = 0
    nbytes: int = 0
    versions: set[int] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def parallel(home: Home, experts: list[Path], clients: int) -> dict[str, Any]:
    """What `clients` fetched while every expert was merged, and how long it took."""
    seen, over = Seen(), threading.Event()
    with running(home) as daemon:
        threads = [threading.Thread(target=pull, args=(daemon, seen, over)) for _ in range(clients)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        try:
            for number, expert in enumerate(experts, start=1):
                while seen.pulls < ROUNDS * clients * (number - 1) // len(experts) and not seen.wrong:
                    time.sleep(PAUSE_SECONDS)
                drop(home, expert)
                daemon.wait_visible(number)
        finally:
            over.set()
            for thread in threads:
                thread.join()
        seconds, peak = time.perf_counter() - started, daemon.peak()
    if seen.wrong:
        raise SystemExit("\n".join(seen.wrong))
    return {
        "clients": clients,
        "pulls": seen.pulls,
        "gone": seen.gone,
        "bytes": seen.nbytes,
        "versions": sorted(seen.versions),
        "wrong": len(seen.wrong),
        "seconds": seconds,
        "peak_bytes": peak,
    }


def pull(daemon: Daemon, seen: Seen, over: threading.Event) -> None:
    """Fetches what `latest` names until it is over, and once more then, and checks every file."""
    port = int(daemon.live.url.rpartition(":")[2])
    while True:
        last = over.is_set()
        try:
            manifest = json.loads(body(port, f"/v1/heads/main/versions/{live(port)}"))
            number, files = int(manifest["version"]), manifest["files"]
            for file in files:
                path = f"/v1/heads/main/versions/{number}/files/{file['name']}"
                digest, nbytes = hashed(port, path)
                if digest != file["sha256"]:
                    seen.wrong.append(f"{path} came as {nbytes} bytes with sha256 {digest}")
            with seen.lock:
                seen.pulls += 1
                seen.nbytes += sum(int(file["size"]) for file in files)
                seen.versions.add(number)
        except FileNotFoundError:
            with seen.lock:
                seen.gone += 1
            continue
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            seen.wrong.append(f"{type(error).__name__}: {error}")
        if last:
            return


def live(port: int) -> int:
    """The number that `latest` leads to."""
    with asked(port, "/v1/heads/main/latest", 307) as answer:
        return int((answer.headers["Location"] or "").rpartition("/")[2])


def body(port: int, path: str) -> bytes:
    """A short answer."""
    with asked(port, path) as answer:
        return answer.read()


def hashed(port: int, path: str) -> tuple[str, int]:
    """(sha256, size) of an answer that is kept nowhere."""
    digest, nbytes = hashlib.sha256(), 0
    with asked(port, path) as answer:
        block = memoryview(bytearray(BLOCK))
        while count := answer.readinto(block):
            digest.update(block[:count])
            nbytes += count
    return digest.hexdigest(), nbytes


def fetch(port: int, path: str, target: Path) -> None:
    """Writes an answer to a new file."""
    with asked(port, path) as answer, target.open("wb", buffering=0) as out:
        block = memoryview(bytearray(BLOCK))
        while count := answer.readinto(block):
            out.write(block[:count])


@contextmanager
def asked(port: int, path: str, status: int = 200) -> Iterator[http.client.HTTPResponse]:
    """The answer to a GET. Raises FileNotFoundError where the version is gone, ValueError for any other status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        if answer.status == GONE:
            raise FileNotFoundError(path)
        if answer.status != status:
            raise ValueError(f"{path}: {answer.status}")
        yield answer
    finally:
        connection.close()


@contextmanager
def serving(command: list[str], port: int) -> Iterator[None]:
    """A server in a process of its own, once it listens."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=dict(os.environ))
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{command[1:4]} did not start")
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main()
