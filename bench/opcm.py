"""OPCM, expert after expert: mainstem's daemon beside FusionBench's merge, in one run.

    FUSIONBENCH_PYTHON=fb/bin/python python -m bench.opcm FOLDER --experts 6

FOLDER as bench.clip_shapes writes it. Three parts, one after the other, on the same experts:

    backlog      every expert lies in the inbox from the start, so that each one waits for its own basis; seconds from
                 one commit to the next
    FusionBench  its own profiler's seconds for one merge and one load (bench/fusionbench_opcm.py)
    ready        one expert at a time, each dropped once the daemon says that everything is prepared; seconds from the
                 drop to the version being visible over HTTP

mainstem's seconds include reading, hashing, writing and syncing the model and its state; FusionBench's include neither
saving nor, as its loading is mapped lazily, most of the reading.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from bench.live import backlog, drop, make_home, per_expert, running, scratch, warm
from bench.record import checkpoints, parser, peer, run, save


def main() -> None:
    options = _options()
    base, experts = checkpoints(options.checkpoints, options.experts)
    warm([base, *experts])
    waiting = backlog(base, experts, "opcm")
    theirs = fusionbench(base, experts)
    ready = prepared(base, experts)
    save(
        "opcm",
        options,
        {
            "model_bytes": (base / "model.safetensors").stat().st_size,
            "backlog": {
                "seconds": waiting.intervals(),
                "median": median(waiting.intervals()),
                "phases": waiting.phases(),
                "peak_bytes": waiting.peak,
            },
            "ready": ready,
            "fusionbench": theirs,
        },
    )


def prepared(base: Path, experts: Sequence[Path]) -> dict[str, object]:
    """Drop to published with everything ready, for each expert after the second; and how long getting ready took."""
    seconds, preparing = [], []
    with scratch(base) as folder:
        home = make_home(folder, base, "opcm")
        with running(home) as daemon:
            for number, expert in enumerate(experts, start=1):
                before = daemon.wait_merged(number - 1)
                if number == 3:  # the first is taken whole, the second is a warm-up
                    start = before
                if number >= 3:
                    preparing.append(daemon.wait_prepared())
                started = time.monotonic()
                drop(home, expert)
                daemon.wait_visible(number)
                seconds.append(time.monotonic() - started)
            phases = per_expert(start, daemon.wait_merged(len(experts)))
            daemon.download()
            peak = daemon.peak()
    return {
        "seconds": seconds[2:],
        "median": median(seconds[2:]),
        "preparing": preparing,
        "phases": phases,
        "peak_bytes": peak,
    }


def fusionbench(base: Path, experts: Sequence[Path]) -> dict[str, object] | None:
    """FusionBench's figures for the same experts; None where its python was not given."""
    python = peer("FUSIONBENCH_PYTHON")
    if python is None:
        return None
    with scratch(base) as folder:
        figures = folder / "figures.json"
        command: list[str | Path] = [python, "-m", "bench.fusionbench_opcm"]
        command += ["--base", base, "--out", folder / "merged.safetensors", "--report", figures, *experts]
        run(command, folder / "log")
        found = json.loads(figures.read_text())
    return {
        "merge": found["seconds_merge"],
        "load": found["seconds_load"],
        "median": median(found["seconds_merge"]) + median(found["seconds_load"]),
        "peak_bytes": found["peak_rss_mb"] * 1e6,
        "threads": found["threads"],
        "versions": found["versions"],
    }


def _options() -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.add_argument("checkpoints", type=Path)
    made.add_argument("--experts", type=int, default=6)
    options = made.parse_args()
    if options.experts < 4:
        made.error("the first two experts are not counted: take at least four")
    return options


if __name__ == "__main__":
    main()
