"""Where, how wide and in how much memory to compute: what the settings of [compute] mean on this machine.

And how the resident size stays near what is in use, without paying for fresh pages again and again.
"""

import ctypes
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import structlog
import torch

from daemon.config import Compute
from daemon.errors import BadConfig
from projector.driver.averages import rule_of
from projector.driver.device import CPU, Cuda, Device, Failure, failure, threads
from projector.driver.fold import Driver
from projector.driver.steps import largest_step
from projector.files.slabs import SLAB_BYTES, Slabs
from projector.method import Method
from projector.spec import Schema, TensorSpec
from projector.text import shown
from projector.watch import SILENT, Watch

MY_CGROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
SIDE = 1024
DEVICE_SHARE = 0.8  # of its free memory
LIBRARY_BYTES = 64 << 20  # of a thread's handles and their workspace, which torch counts as its own
SLAB_SHARE = 4  # the memory budget over this
MOST_SLAB_BYTES = 4 << 30
# A slow core that others use too: no merge that goes on may be taken for one that hangs.
PRODUCTS_PER_SECOND = 5e9
DECOMPOSITION_PER_SECOND = 1e9
SYNCED_PER_SECOND = 10e6  # bytes
CGROUP_LIMITS = ("memory.max", "memory.limit_in_bytes")  # of version 2, and of version 1

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # <malloc.h>
MMAP_BYTES = 10_000_000  # above most matrices of 100M parameters; what is larger comes and goes
KEEP_BYTES = 1 << 30


_library = ctypes.CDLL(None)


def driver(settings: Compute, watch: Watch = SILENT) -> Driver:
    """The driver that the settings ask for. Raises BadConfig where the device is not there, or does not work."""
    where = device(settings)
    budget = memory_budget(settings) - where.slab_bytes
    return Driver(where, settings.block_bytes, workers(settings.threads), budget, watch)


def device(settings: Compute) -> Device:
    """The device that the settings ask for, the same one each time. Raises BadConfig where it is not there, or does not
    work."""
    exact_products()
    if settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available()):
        return Device()
    return _card(settings)


def device_name(settings: Compute) -> str:
    """What that device is, in words. Raises as `device` does."""
    found = device(settings)
    return f"{found.where} {found.name}"


def exact_products() -> None:
    """Products of float32 in float32, whatever the environment says (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE), and the same
    bits each time. To be called before the first product.

    Of torch's ways to say so this is the one that sets both of its flags: of the other it refuses to multiply where
    the environment had set the one.
    """
    torch.set_float32_matmul_precision("highest")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # several streams; read at cuBLAS's first use


def eigh_seconds(where: torch.device, side: int = SIDE) -> float:
    """Seconds of one decomposition of a float64 matrix, the work that costs most, after one that is not timed."""
    x = torch.randn(side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram, taken = (x.T @ x).to(where), 0.0
    for _ in range(2):
        started = time.perf_counter()
        torch.linalg.eigh(gram).eigenvalues.sum().item()  # waits for the device
        taken = time.perf_counter() - started
    return taken


def faster_on_card(cpu_seconds: float, card_seconds: float, workers: int) -> bool:
    """Workers decompose one matrix each at the same time on the CPU; on the card each waits for the others."""
    return card_seconds < cpu_seconds / workers


def cuda_device(name: str) -> torch.device:
    """The CUDA device of that name, which has an index: some of torch's functions take none without. Raises BadConfig
    where torch sees none."""
    where = torch.device("cuda", torch.device(name).index or 0)
    if where.index >= torch.cuda.device_count():
        raise BadConfig(
            f"compute.device is {name}, but torch sees {torch.cuda.device_count()} CUDA devices",
            "set it to auto or cpu, or install a torch built for this machine's GPU",
        )
    return where


@cache
def _card(settings: Compute) -> Device:
    """The CUDA device; with "auto" the CPU, where that is faster or the device does not work."""
    name, log = "cuda" if settings.device == "auto" else settings.device, structlog.get_logger()
    where = cuda_device(name)
    try:
        made = Cuda(where, _device_budget(where, settings), _slabs(settings))
        made.probe()
        why = "compute.device says so"
        if settings.device == "auto":
            with threads(1) as pool:
                cpu, card = (pool.submit(eigh_seconds, place).result() for place in (CPU, where))
            at_once = workers(settings.threads)
            why = f"eigh of {SIDE} x {SIDE} in float64: {cpu:.3f} s on the CPU, {at_once} at once, {card:.3f} s there"
            if not faster_on_card(cpu, card, at_once):
                log.info("computing on the CPU", card=made.name, why=why)
                return Device()
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        if settings.device == "auto":
            log.warning("computing on the CPU: the CUDA device does not work", error=said)
            return Device()
        raise BadConfig(
            f"compute.device is {name}, which does not work: {said}", "look at nvidia-smi, or set it to auto or cpu"
        ) from None
    log.info("computing on a CUDA device", card=made.name, budget=made.budget_bytes, why=why)
    return made


def _device_budget(where: torch.device, settings: Compute) -> int:
    """Bytes of the device that steps may take together. Beside them are what its libraries keep, and fragments."""
    free, total = torch.cuda.mem_get_info(where)
    if settings.device_budget:  # what torch caches stays within it, too: the card is shared
        libraries = LIBRARY_BYTES * (workers(settings.threads) + 1)
        torch.cuda.set_per_process_memory_fraction(min(1.0, (settings.device_budget + libraries) / total), where)
    return settings.device_budget or int(DEVICE_SHARE * free)


def _slabs(settings: Compute) -> Slabs | None:
    """Page-locked memory, a part of the memory budget; none where the system locks no more."""
    most = min(MOST_SLAB_BYTES, memory_budget(settings) // SLAB_SHARE)
    if most < SLAB_BYTES:
        return None
    try:
        return Slabs(torch.empty(1 << (most.bit_length() - 1), dtype=torch.uint8, pin_memory=True))
    except RuntimeError as error:
        if failure(error) in (None, Failure.LOST):
            raise
        structlog.get_logger().warning("no page-locked memory: tensors go to the device more slowly", error=str(error))
        return None


def workers(threads: int) -> int:
    """How many workers a setting means. Each holds a tensor or two in memory, hence not one for each of many cores."""
    return threads or min(4, os.cpu_count() or 1)


def memory_budget(settings: Compute) -> int:
    """The bytes that all tensors in hand may take; by default half of the memory that this process may use."""
    return settings.memory_budget or _usable_memory() // 2


def budget_for(need: int, reserved: int) -> int:
    """The memory budget in which a step that needs so much fits, beside page-locked memory where some is reserved."""
    return -(-need * SLAB_SHARE // (SLAB_SHARE - 1)) if reserved else need


def check_budget(
    schema: Schema, methods: Sequence[Method], settings: Compute, reserved: int = 0, *, origin: bool = False
) -> None:
    """Raises BadConfig where one tensor alone does not fit into the memory budget, with both numbers.

    reserved: bytes of it that are taken otherwise. origin: what experts were trained from is read beside the base.
    """
    budget = memory_budget(settings) - reserved
    step, need = largest_step(schema, methods, settings.block_bytes, origin=origin)
    if need > budget:
        enough = budget_for(need, reserved)
        raise BadConfig(
            f"{shown(step.spec.name)} {list(step.spec.shape)} needs {need} bytes of memory to be merged, "
            f"the memory budget is {budget}",
            f"set compute.memory_budget to {enough} or more (MAINSTEM_COMPUTE__MEMORY_BUDGET={enough}), "
            "or use a machine with more memory",
        )


def longest_seconds(schema: Schema, methods: Sequence[Method]) -> float:
    """What one piece of work may take on a slow machine, in seconds: the tensor that takes longest, which is merged
    without a look left or right, and a sync of all that is written.
    """
    merged = [spec for spec in schema.values() if spec.merged]
    rules = [(spec, rule_of(method, spec)) for spec in merged for method in methods]
    longest = max((_matrix_seconds(spec, rule) for spec, rule in rules if not rule.elementwise(spec)), default=0.0)
    return longest + len(methods) * sum(spec.nbytes for spec in merged) / SYNCED_PER_SECOND


def _matrix_seconds(spec: TensorSpec, method: Method) -> float:
    """Of a matrix, or of all of a stack (k, m, n)."""
    count, _, side = matrix_sides(spec, method)
    products = 2 * method.products * spec.numel * side / PRODUCTS_PER_SECOND
    return products + count * 10 * side**3 / DECOMPOSITION_PER_SECOND


def matrix_sides(spec: TensorSpec, method: Method) -> tuple[int, int, int]:
    """How many matrices a tensor is, their shorter side, and the side of the squares that a method multiplies them
    with: of the largest that it keeps, else the shorter side.
    """
    count = spec.shape[0] if len(spec.shape) == 3 else 1
    rows = spec.shape[-2] if len(spec.shape) == 3 else next(iter(spec.shape), 1)
    shorter = min(rows, spec.numel // max(1, count * rows)) if len(spec.shape) > 1 else 1
    kept = [slot.shape[-2:] for slot in method.slots(spec).values()]
    return count, shorter, max([shorter, *(sides[0] for sides in kept if len(sides) == 2 and sides[0] == sides[1])])


def _usable_memory() -> int:
    """Bytes of physical memory, or of the control group's limit where that is lower."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in _cgroup_folders():
        for name in CGROUP_LIMITS:
            with suppress(OSError):
                text = (path / name).read_text().strip()
                if text.isdecimal():  # "max" where there is none
                    limits.append(int(text))
    return min(limits)


def _cgroup_folders() -> list[Path]:
    """This process's control groups and all above them, each of which may set a limit."""
    folders = [CGROUPS, CGROUPS / "memory"]
    with suppress(OSError):
        for line in MY_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root = CGROUPS / "memory" if "memory" in controllers.split(",") else CGROUPS
            below = root / path.strip("/")
            folders += [below, *(above for above in below.parents if above.is_relative_to(root))]
    return folders


def reuse_freed_memory() -> None:
    """Lets all threads share one pool of freed blocks that stays resident, where the C library is glibc.

    By default each thread has a pool of its own, which on an 87M-parameter model holds 60 MB more at the peak; and what
    goes back to the system comes back as fresh pages, whose zeroing cost a fifth of an arrival's time.
    """
    if hasattr(_library, "mallopt"):
        _library.mallopt(M_ARENA_MAX, 1)
        _library.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
        _library.mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)


def return_freed_memory() -> None:
    """Gives the pool back to the system: nothing is in hand."""
    if hasattr(_library, "malloc_trim"):
        _library.malloc_trim(0)
