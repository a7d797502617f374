"""Which method when, on real experts: makes them, runs every stream, writes bench/results/quality.json.

    python -m bench.quality --cache build/quality               everything; goes on if stopped
    python -m bench.quality --cache build/quality --only grid   one block: experts, readers, encoders, growth, ...
    python -m bench.quality --cache build/quality --collect     only the results file, from what is in the cache
    python -m bench.quality.report                              docs/quality.md from the results file

It needs `pip install 'mainstem[quality]'`, and no network. A process for each core, which share the cache: what one of
them is making, the others leave to it.
"""

import argparse
import json
import os
import resource
from pathlib import Path
from time import monotonic

from bench.quality.blocks import Maker
from bench.quality.measuring import blocks_over, collected, fill
from bench.record import RESULTS

CACHE = Path("build") / "quality"


def main() -> None:
    """The command."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--cache", type=Path, default=CACHE, help=f"where experts and cells are kept ({CACHE})")
    command.add_argument("--out", type=Path, default=RESULTS, help="folder for quality.json (bench/results)")
    known = list(blocks_over(CACHE, Maker(True, print)))
    command.add_argument(
        "--only",
        action="append",
        choices=known,
        metavar="BLOCK",
        help=f"one, or several times: {', '.join(known)}",
    )
    command.add_argument("--processes", type=int, default=os.cpu_count(), help="at once (a process for each core)")
    command.add_argument("--collect", action="store_true", help="make nothing, write what is there")
    asked = command.parse_args()
    if not asked.collect:
        begun = monotonic()
        fill(asked.cache, asked.only or known, asked.processes)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"{(monotonic() - begun) / 60:.0f} min, of CPU {(used.ru_utime + used.ru_stime) / 60:.0f} min")
    results = asked.out / "quality.json"
    found = collected(asked.cache, json.loads(results.read_text()) if results.exists() else {})
    results.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
