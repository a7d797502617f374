"""OPCM on single layers on a CUDA device: mainstem's prepare and update beside FusionBench's merge_linear_weights.

    FUSIONBENCH_PYTHON=fb/bin/python python -m bench.gpu --shapes 4096x4096 4096x14336

All operands lie on the device already, on both sides. FusionBench decomposes the merged layer at every arrival, so
what stands beside it is prepare + update; the update alone is what an arrival costs when its basis is ready. Its floor
is the larger of the bytes of its operands and results over the card's bandwidth, and its products over the card's
rate, both measured here. Without a CUDA device nothing is measured and no result is written.
"""

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.record import ROOT, parser, peer, save
from bench.shapes import direction
from projector.method import Expert
from projector.methods import make
from projector.spec import TensorSpec

PRODUCTS = ("aten.mm.default", "aten.addmm.default", "aten.addmm_.default", "aten.addmm.out", "aten.mm.out")
SIZE = 0.02 * 0.015  # of an element of a task vector: see bench/shapes.py
PEAK_SIDE = 8192
PEAK_NUMEL = 1 << 28


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the floating point operations of matrix products, by dtype."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: dict[torch.dtype, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if str(func) in PRODUCTS:
            left, right = args[-2:]
            self.flops[left.dtype] = self.flops.get(left.dtype, 0) + 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x14336"])
    made.add_argument("--repeats", type=int, default=10)
    options = made.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device is at hand: nothing was measured")
        return
    device = torch.device("cuda")
    shapes = [(int(rows), int(columns)) for rows, columns in (shape.split("x") for shape in options.shapes)]
    bandwidth = copied_bytes_per_second(device)
    layers = [measured(shape, device, bandwidth, options.repeats) for shape in shapes]
    theirs = fusionbench(options.shapes, str(device))
    save("gpu", options, {"bytes_per_second": bandwidth, "layers": layers, "fusionbench": theirs})


def measured(shape: tuple[int, int], device: torch.device, bandwidth: float, repeats: int) -> dict[str, object]:
    """Seconds of preparing and of updating one layer, and the floor of the update."""
    method, spec = make("opcm"), TensorSpec("layer.weight", shape, torch.float32)
    dtype = method.slots(spec)["A"].dtype
    merged, delta = (SIZE * direction(torch.Size(shape), 0, who, "layer").to(device) for who in ("merged", "delta"))
    state = {"A": merged.to(dtype)}
    prepared = method.prepare(state, spec)

    def update() -> Mapping[str, torch.Tensor]:
        return method.update({**state, **prepared}, delta, spec, Expert(2))[0]

    with Products() as products:
        after = update()
    moved = sum(x.nbytes for x in (*state.values(), *prepared.values(), delta, *after.values()))
    rates = {str(kind): product_flops_per_second(kind, device) for kind in products.flops}
    return {
        "shape": list(shape),
        "prepare": seconds(lambda: method.prepare(state, spec), device, repeats),
        "update": seconds(update, device, repeats),
        "bytes": moved,
        "flops": {str(kind): count for kind, count in products.flops.items()},
        "flops_per_second": rates,
        "floor_bytes": moved / bandwidth,
        "floor_flops": sum(count / rates[str(kind)] for kind, count in products.flops.items()),
    }


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median of so many runs, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - started)
    return median(times[1:])


def copied_bytes_per_second(device: torch.device) -> float:
    """Bytes read and written per second by a large copy on the device."""
    source = torch.zeros(PEAK_NUMEL, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device, 10)


def product_flops_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of a large square product in that dtype, as torch does it by default."""
    left = torch.ones(PEAK_SIDE, PEAK_SIDE, dtype=dtype, device=device)
    out = torch.empty_like(left)
    return 2 * PEAK_SIDE**3 / seconds(lambda: torch.mm(left, left, out=out), device, 3)


def fusionbench(shapes: Sequence[str], device: str) -> list[dict[str, object]] | None:
    """FusionBench's seconds for the same layers; None where its python was not given."""
    python = peer("FUSIONBENCH_PYTHON")
    if python is None:
        return None
    command = [str(python), "-m", "bench.fusionbench_linear", "--device", device, *shapes]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    found: list[dict[str, object]] = json.loads(out.splitlines()[-1])
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
