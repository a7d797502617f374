"""Does an arrival cost more, the more experts have come before it?

    python -m bench.growth_experts SCRATCH --experts 128

Makes a small CLIP-shaped model and that many experts in SCRATCH (removed afterwards, 5 MB each), and lets a daemon with
OPCM merge them all in one go. Time is the daemon's own for each arrival, memory its peak so far.
"""

from itertools import pairwise
from pathlib import Path
from statistics import median

from bench.clip_shapes import Shape
from bench.live import backlog, scratch
from bench.record import parser, save
from bench.shapes import write
from bench.trend import trend

MARKS = (2, 8, 32, 128)
SHAPE = Shape(hidden=256, mlp=1024, layers=1, heads=4, image=64, patch=16)


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("scratch", type=Path)
    made.add_argument("--experts", type=int, default=MARKS[-1])
    options = made.parse_args()
    marks = [mark for mark in MARKS if mark < options.experts] + [options.experts]
    with scratch(options.scratch / "models") as folder:
        base, *experts = write(folder, options.experts, 0, SHAPE.model())
        size = (base / "model.safetensors").stat().st_size
        merged = backlog(base, experts, "opcm")
    seconds = {commit.number: commit.seconds for commit in merged.commits}
    seconds.pop(1)  # taken whole
    peaks = {mark: next(spent.peak for spent in merged.seen if spent.merged >= mark) for mark in marks}
    figures = {
        "model_bytes": size,
        "marks": [
            {
                "experts": mark,
                "seconds": median(seconds[number] for number in range(before + 1, mark + 1)),
                "since": before + 1,
                "peak_bytes": peaks[mark],
            }
            for before, mark in pairwise([1, *marks])
        ],
        "seconds": list(seconds.values()),
        "time": trend(list(seconds), list(seconds.values())).figures(),
        "memory": trend(marks, [peaks[mark] for mark in marks]).figures(),
    }
    save("growth_experts", options, figures)


if __name__ == "__main__":
    main()
