"""What a scrape of /metrics costs, by how many heads a home has.

    python -m bench.scrape SCRATCH --heads 1 5 20

Makes a small CLIP-shaped model and an expert in SCRATCH (removed afterwards). For each number of heads (`mean`) a
daemon merges the expert, with an evaluator that names as many tasks as are shown; then it is scraped, uncompressed,
over one connection. Seconds are from request to last byte; series are lines that are no comment.
"""

import json
import time
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from statistics import median

from bench.growth_size import SHAPE
from bench.live import drop, running, scratch
from bench.record import parser, save
from bench.shapes import write
from daemon.home.founding import found
from daemon.layout import Home
from daemon.metrics import MOST_TASKS
from projector.methods import make

SCRAPES = 50
SCORES = json.dumps({f"task-{n}": 0.5 for n in range(MOST_TASKS)})


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("scratch", type=Path)
    made.add_argument("--heads", type=int, nargs="+", default=[1, 5, 20])
    options = made.parse_args()
    with scratch(options.scratch / "models") as folder:
        base, expert = write(folder, 1, 0, replace(SHAPE, layers=1).model())
        scrapes = [measured(folder, base, expert, heads) for heads in options.heads]
    save("scrape", options, {"scrapes": scrapes})


def measured(folder: Path, base: Path, expert: Path, heads: int) -> dict[str, float]:
    """One home: how long a scrape takes, and how much comes."""
    home = Home(folder / f"home-{heads}")
    names = ["main", *(f"head{n}" for n in range(1, heads))]
    found(home, base, [(name, make("mean")) for name in names], lambda _: None)
    command = json.dumps(["sh", "-c", f"cat > /dev/null; echo '{SCORES}'", "{folder}"])
    home.config.write_text(f"[evaluate]\ncommand = {command}\nheads = {json.dumps(names)}\n")
    with running(home) as daemon:
        drop(home, expert)
        daemon.wait_merged(1)
        address = daemon.live.url.removeprefix("http://")
        connection = HTTPConnection(address)
        seconds, text = [], b""
        for _ in range(SCRAPES):
            started = time.monotonic()
            connection.request("GET", "/metrics")
            text = connection.getresponse().read()
            seconds.append(time.monotonic() - started)
        connection.close()
    series = [line for line in text.splitlines() if not line.startswith(b"#")]
    return {"heads": heads, "seconds": median(seconds), "bytes": len(text), "series": len(series)}


if __name__ == "__main__":
    main()
