"""The head `mean` against a floor: one plain pass that moves and hashes the same bytes.

    python -m bench.mean FOLDER --experts 7

Before each drop the floor runs in this process: Python's own file calls read the base, the expert and the state, write
a state and a model of the same sizes and sync them, and hash the expert, the new state and the new model. The seconds
beside it are the daemon's own, from taking the expert to the end of its merge; those from drop to visible are reported
too. The files are in the page cache on both sides.
"""

import hashlib
import os
import time
from pathlib import Path
from statistics import median

from bench.live import drop, make_home, per_expert, running, scratch, warm
from bench.record import checkpoints, parser, save
from daemon.layout import STATE_FILE, Home

WEIGHTS = "model.safetensors"
BLOCK = 1 << 20


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("checkpoints", type=Path)
    made.add_argument("--experts", type=int, default=7)
    options = made.parse_args()
    base, experts = checkpoints(options.checkpoints, options.experts)
    warm([base, *experts])
    floors, merges, arrivals = [], [], []
    with scratch(base) as folder:
        home = make_home(folder, base, "mean")
        with running(home) as daemon:
            drop(home, experts[0])
            start = before = daemon.wait_merged(1)  # the first expert reads no state: not counted
            for number, expert in enumerate(experts[1:], start=2):
                floors.append(floor(base, expert, state(home, number - 1), folder))
                started = time.monotonic()
                drop(home, expert)
                daemon.wait_visible(number)
                arrivals.append(time.monotonic() - started)
                after = daemon.wait_merged(number)
                merges.append(after.merging - before.merging)
                before = after
            figures = {
                "model_bytes": (base / WEIGHTS).stat().st_size,
                "state_bytes": state(home, len(experts)).stat().st_size,
                "floor": floors,
                "merge": merges,
                "arrival": arrivals,
                "floor_median": median(floors),
                "merge_median": median(merges),
                "arrival_median": median(arrivals),
                "phases": per_expert(start, before),
                "peak_bytes": daemon.peak(),
            }
    save("mean", options, figures)


def state(home: Home, version: int) -> Path:
    """The state file of one version of the head main."""
    return home.head_state("main", version) / STATE_FILE


def floor(base: Path, expert: Path, state: Path, folder: Path) -> float:
    """Seconds for one pass over the bytes of an arrival; what it writes is removed, outside the time."""
    started = time.perf_counter()
    _read(base / WEIGHTS)
    _copy(expert / WEIGHTS, folder / "published", hash_source=True)
    _copy(state, folder / "state", hash_source=False)
    seconds = time.perf_counter() - started
    (folder / "published").unlink()
    (folder / "state").unlink()
    return seconds


def _read(source: Path) -> None:
    block = bytearray(BLOCK)
    with source.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def _copy(source: Path, target: Path, *, hash_source: bool) -> None:
    """Reads, writes and syncs; what is written is hashed, what is read only where asked."""
    block = memoryview(bytearray(BLOCK))
    read, written = hashlib.sha256(), hashlib.sha256()
    with source.open("rb", buffering=0) as file, target.open("wb", buffering=0) as out:
        while count := file.readinto(block):
            if hash_source:
                read.update(block[:count])
            out.write(block[:count])
            written.update(block[:count])
        os.fsync(out.fileno())


if __name__ == "__main__":
    main()
