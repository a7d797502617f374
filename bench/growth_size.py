"""Does an arrival cost more memory, and proportionally more time, the larger the model is?

    python -m bench.growth_size SCRATCH --layers 4 8 16 32

Makes CLIP-shaped models of so many layers in SCRATCH, one after the other (removed afterwards); all have the same
largest matrix. A daemon with OPCM merges EXPERTS experts in one go: its own time for each arrival from the third on,
and its peak memory.
"""

from dataclasses import replace
from pathlib import Path
from statistics import median

from bench.clip_shapes import Shape
from bench.live import backlog, scratch
from bench.record import parser, save
from bench.shapes import write
from bench.trend import trend

SHAPE = Shape(hidden=256, mlp=1024, heads=4, image=64, patch=16)


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("scratch", type=Path)
    made.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    made.add_argument("--experts", type=int, default=8)
    options = made.parse_args()
    sizes = [measured(options.scratch, layers, options.experts) for layers in options.layers]
    by = [size["layers"] for size in sizes]
    figures = {
        "sizes": sizes,
        "time": trend(by, [size["seconds"] for size in sizes]).figures(),
        "memory": trend(by, [size["peak_bytes"] for size in sizes]).figures(),
    }
    save("growth_size", options, figures)


def measured(parent: Path, layers: int, count: int) -> dict[str, float]:
    """One size: bytes of the model, seconds of an arrival, peak memory."""
    with scratch(parent / "models") as folder:
        base, *experts = write(folder, count, 0, replace(SHAPE, layers=layers).model())
        size = (base / "model.safetensors").stat().st_size
        merged = backlog(base, experts, "opcm")
    seconds = [commit.seconds for commit in merged.commits if commit.number > 2]
    return {"layers": layers, "model_bytes": size, "seconds": median(seconds), "peak_bytes": merged.peak}


if __name__ == "__main__":
    main()
