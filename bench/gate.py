"""What the gate adds to an arrival, and how soon a rollback shows.

    python -m bench.gate SCRATCH --experts 16 --layers 16

Makes a small CLIP-shaped model and the experts in SCRATCH (removed afterwards). Two daemons run over homes that are
alike but for `[evaluate]`, whose command only prints a score; each expert is dropped into one, then the other. Seconds
are from the drop to the version being visible over HTTP, bytes those of a version beside weights and state (manifest,
card, the evaluator's log). Then `mainstem rollback` and `promote` are typed: seconds until another version is live over
HTTP, first while nothing is merged, then while an expert is.
"""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from bench.growth_size import SHAPE
from bench.live import Daemon, drop, make_home, running, scratch, warm
from bench.record import parser, save
from bench.shapes import write
from daemon.layout import Home, is_weights

METHOD = "mean"
WAITING = 4  # experts that are merged while a rollback is typed
KEEPING = "[retention]\nversions = 100\n"
GATE = """
[evaluate]
command = ["sh", "-c", 'cat >&2; echo "{\\"task\\": 0.5}"', "{folder}"]
require = ["each >= live - 0.01"]
"""
LOOK_SECONDS = 0.005
TURNS = 5


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("scratch", type=Path)
    made.add_argument("--experts", type=int, default=16)
    made.add_argument("--layers", type=int, default=16)
    options = made.parse_args()
    with scratch(options.scratch / "models") as folder:
        base, *experts = write(folder, options.experts, 0, replace(SHAPE, layers=options.layers).model())
        warm([base, *experts])
        figures = {"model_bytes": (base / "model.safetensors").stat().st_size, **measured(folder, base, experts)}
    save("gate", options, figures)


def measured(folder: Path, base: Path, experts: list[Path]) -> dict[str, object]:
    """Arrivals without and with a gate, in turn; then rollbacks with the latter, also while the last are merged."""
    experts, waiting = experts[:-WAITING], experts[-WAITING:]
    newest = len(experts)
    homes = {}
    for name in ("without", "trivial"):
        (folder / name).mkdir()
        homes[name] = make_home(folder / name, base, METHOD)
        homes[name].config.write_text(KEEPING + GATE * (name == "trivial"))
    seconds: dict[str, list[float]] = {name: [] for name in homes}
    with running(homes["without"]) as without, running(homes["trivial"]) as trivial:
        for number, expert in enumerate(experts, start=1):
            for name, daemon in (("without", without), ("trivial", trivial)):
                started = time.monotonic()
                drop(homes[name], expert)
                daemon.wait_visible(number)
                seconds[name].append(time.monotonic() - started)
                daemon.wait_merged(number)
        beside = {name: _beside(home, newest) for name, home in homes.items()}
        idle = []
        for _ in range(TURNS):
            idle.append(typed(trivial, "rollback", newest - 1))
            typed(trivial, "promote", newest)
        for expert in waiting:
            drop(trivial.home, expert)
        while not trivial.home.in_hand.exists():
            time.sleep(LOOK_SECONDS)
        merging = typed(trivial, "rollback", newest - 1)
        still = trivial.home.in_hand.exists()
    after = {name: all_[1:] for name, all_ in seconds.items()}  # the first expert is a warm-up
    return {
        "seconds": after,
        "median": {name: median(all_) for name, all_ in after.items()},
        "bytes": beside,
        "rollback": {"idle": idle, "merging": merging, "still_merging": still},
    }


def typed(daemon: Daemon, verb: str, version: int) -> float:
    """Seconds from `mainstem VERB` being typed until the version is live over HTTP."""
    command = [sys.executable, "-m", "daemon", verb, f"main/{version}", "--home", str(daemon.home.root)]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while daemon.live.live() != version:
            if process.poll():
                raise SystemExit(f"{verb} failed")
            time.sleep(LOOK_SECONDS)
        return time.monotonic() - started


def _beside(home: Home, version: int) -> int:
    """Bytes of a version's small files."""
    files = [path for path in home.version("main", version).iterdir() if path.is_file() and not is_weights(path.name)]
    log = home.evaluation_log("main", version)
    return sum(path.stat().st_size for path in [*files, *([log] if log.exists() else [])])


if __name__ == "__main__":
    main()
