"""What single layers cost on a device: the steps `layers`, `eigh` and `ways` of gpu.sh.

    python -m bench.gpu_layers layers --device cuda --shapes 4096x4096 4096x14336

`layers`: OPCM, iso_c and task_arithmetic on layers in bfloat16 whose operands lie on the device already, as in
fusionbench_linear.py, which decomposes at every arrival. Backlog is prepare + update, ready the update alone. The floor
is the larger of the bytes of operands and results over the device's bandwidth and the products over its rate, both
measured here. `eigh`: decompositions by size and dtype, one and several at a time. `ways`: an elementwise arrival in
the driver's blocks on the CPU, beside the same in blocks of 64 MiB on the device and back. Prints a JSON object a line.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.shapes import INIT_STD, STRENGTH, direction
from daemon.compute.resources import exact_products
from projector.algebra.linalg import pieces
from projector.method import Contribution, Method, State, Totals
from projector.methods import make
from projector.spec import TensorSpec

PRODUCTS = ("aten.mm.default", "aten.addmm.default", "aten.addmm_.default", "aten.addmm.out", "aten.mm.out")
METHODS = ("opcm", "iso_c", "task_arithmetic")
SIDES = (1024, 2048, 4096, 8192)
TINY_SIDES = (16, 32)
BATCH = 4
BATCH_MOST = 4096
"""The largest side that is decomposed BATCH at a time."""
REPEATS = 3
PEAK_NUMEL = 1 << 28
PEAK_SIDE = 8192
WAYS_NUMEL = 1 << 26
WORKERS = 4
BLOCK_BYTES = {"cpu": 3 << 20, "cuda": 64 << 20}


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


def layers(device: torch.device, shapes: Sequence[tuple[int, int]], small: bool) -> Iterator[dict[str, Any]]:
    bandwidth = copied_bytes_per_second(device, 1 << 16 if small else PEAK_NUMEL)
    yield {"bytes_per_second": bandwidth}
    rates = {
        dtype: product_flops_per_second(dtype, device, 64 if small else PEAK_SIDE)
        for dtype in (torch.float32, torch.float64)
    }
    yield {"flops_per_second": {str(dtype): rate for dtype, rate in rates.items()}}
    for rows, columns in shapes:
        base, merged, expert = weights((rows, columns), device)
        for name in METHODS:
            found = layer(make(name), base, merged, expert, bandwidth, rates)
            yield {f"{name} {rows}x{columns}": found}


def weights(shape: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(theta_0, the merged weights so far, an expert) of one layer, bfloat16."""
    size = torch.Size(shape)
    base = INIT_STD * direction(size, 0, "base", "layer").to(device)
    moved = (base + INIT_STD * STRENGTH[1] * direction(size, 0, who, "layer").to(device) for who in ("merged", "delta"))
    merged, expert = (x.to(torch.bfloat16) for x in moved)
    return base.to(torch.bfloat16), merged, expert


def layer(
    method: Method,
    base: torch.Tensor,
    merged: torch.Tensor,
    expert: torch.Tensor,
    bandwidth: float,
    rates: Mapping[torch.dtype, float],
) -> dict[str, Any]:
    """Seconds of preparing, of updating and of reading out one layer, and the floor of an arrival that is ready."""
    spec, device = TensorSpec("layer.weight", tuple(base.shape), torch.bfloat16), base.device
    slots = method.slots(spec)
    state: State = {key: (merged.float() - base.float()).to(slot.dtype) for key, slot in slots.items()}
    delta = expert.float() - base.float()
    prepared = method.prepare(state, spec)
    sums: dict[str, float] = {}

    def update() -> State:
        after, found = method.update({**state, **prepared}, delta, spec, Contribution(2))
        sums.update(found)
        return after

    after = update()
    totals = method.tally(Totals(1, {"weight": 1.0, "mean_norm": 1.0}), {**sums, "task_vector": 1.0}, Contribution(2))

    def read() -> torch.Tensor:
        return method.read(base.float(), after, totals, spec).to(torch.bfloat16)

    with Products() as products:
        update()
        read()
    moved = sum(x.nbytes for x in (*state.values(), *prepared.values(), delta, *after.values(), base, merged))
    return {
        "prepare": seconds(lambda: method.prepare(state, spec), device) if prepared else 0.0,
        "update": seconds(update, device),
        "read": seconds(read, device),
        "bytes": moved,
        "flops": {str(dtype): count for dtype, count in products.flops.items()},
        "floor_bytes": moved / bandwidth,
        "floor_flops": sum(count / rates[dtype] for dtype, count in products.flops.items() if dtype in rates),
    }


def eigh(device: torch.device, _: Sequence[tuple[int, int]], small: bool) -> Iterator[dict[str, Any]]:
    """Seconds for each Gram matrix of full rank: one in a call, and BATCH in a call."""
    for side in TINY_SIDES if small else SIDES:
        x = torch.randn(side, side, generator=torch.Generator().manual_seed(side), dtype=torch.float64).to(device)
        gram = x.T @ x
        for dtype in (torch.float64, torch.float32):
            one = gram.to(dtype)
            repeats = 1 if side >= SIDES[-1] else REPEATS
            name = f"{side} {str(dtype).removeprefix('torch.')}"
            yield {name: seconds(lambda one=one: torch.linalg.eigh(one), device, repeats)}
            if side <= BATCH_MOST:
                many = one.expand(BATCH, side, side).contiguous()
                taken = seconds(lambda many=many: torch.linalg.eigh(many), device, 1)
                yield {f"{name}, {BATCH} at a time": taken / BATCH}


def ways(device: torch.device, _: Sequence[tuple[int, int]], small: bool) -> Iterator[dict[str, Any]]:
    """Seconds of an elementwise arrival of so many parameters in bfloat16 that lie in the page cache, both ways."""
    numel = 1 << 16 if small else WAYS_NUMEL
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(numel, generator=draw).to(torch.bfloat16)
    expert, state, out = base + 0.01, torch.zeros(numel), torch.empty_like(base)
    if device.type == "cuda":  # as in the driver's slabs
        base, expert, state, out = (x.pin_memory() for x in (base, expert, state, out))
    method = make("task_arithmetic")
    yield {"numel": numel}

    def block(part: slice, where: torch.device) -> None:
        theta0, theta, before = (x[part].to(where, non_blocking=True) for x in (base, expert, state))
        spec = TensorSpec("layer.bias", (len(theta0),), torch.bfloat16)
        (slot,) = method.slots(spec)
        after, _ = method.update({slot: before}, theta.float() - theta0.float(), spec, Contribution(2))
        merged = method.read(theta0.float(), after, Totals(2, {"weight": 2.0}), spec)
        out[part].copy_(merged.to(torch.bfloat16))
        state[part].copy_(after[slot])

    def through(where: torch.device) -> None:
        parts = list(pieces(base, BLOCK_BYTES[where.type] // 4))
        with ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(lambda part: block(part, where), parts))

    for name, where in (("cpu", torch.device("cpu")), ("device", device)):
        yield {name: seconds(lambda where=where: through(where), device)}


def seconds(work: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """The median of so many runs, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - started)
    return median(times[1:])


def copied_bytes_per_second(device: torch.device, numel: int = PEAK_NUMEL) -> float:
    """Bytes read and written per second by a large copy on the device."""
    source = torch.zeros(numel, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device, 10)


def product_flops_per_second(dtype: torch.dtype, device: torch.device, side: int = PEAK_SIDE) -> float:
    """Operations per second of a large square product in that dtype, as mainstem does it."""
    left = torch.randn(side, side, generator=torch.Generator().manual_seed(0), dtype=dtype).to(device)
    out = torch.empty_like(left)
    return 2 * side**3 / seconds(lambda: torch.mm(left, left, out=out), device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    steps = {"layers": layers, "eigh": eigh, "ways": ways}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=steps)
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x14336"])
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    exact_products()
    shapes = [(int(rows), int(columns)) for rows, columns in (shape.split("x") for shape in options.shapes)]
    for found in steps[options.step](options.device, shapes, options.small):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
