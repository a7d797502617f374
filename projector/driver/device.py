"""Where workers compute: on the CPU, or on a CUDA device that may fail.

What a device cannot do is done on the CPU. Its failures are told apart in one place (`failure`): out of memory, or of
what its libraries keep in it: again, alone on the device, then on the CPU. An eigensolver that does not converge: on
the CPU. A context that is lost (an illegal access, a failed launch, an ECC error): DeviceLost, since nothing that this
process asks of the device succeeds any more. cuSOLVER is known to leave such a context behind without saying so, hence
a tiny computation after every failure.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from typing import TypeVar

import torch
from torch import Tensor

from projector.errors import BadValues, DeviceLost
from projector.files.slabs import Slabs, empty
from projector.watch import Watch

CPU = torch.device("cpu")
Out = TypeVar("Out")

MEMORY_CODE = 2  # cudaErrorMemoryAllocation
MEMORY = (
    "out of memory",
    "cudaHostAlloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # what cublasCreate says where there is no room for its workspace
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_NOT_INITIALIZED",
    "cusolverDnCreate",
)
LOST_CODES = {
    4,  # cudaErrorCudartUnloading
    46,  # cudaErrorDevicesUnavailable
    *(214, 220, 226),  # uncorrectable ECC, NVLink, contained errors
    *(700, 702, 709, 710, 714, 715, 716, 717, 718, 719),  # illegal address to launch failure
}
LOST = (
    "illegal memory access",
    "unspecified launch failure",
    "device-side assert triggered",  # every error's text speaks of device-side assertions
    "launch timed out",
    "misaligned address",
    "illegal instruction",
    "invalid program counter",
    "hardware stack error",
    "on global/shared address space",
    "context is destroyed",
    "uncorrectable",
    "driver shutting down",
    "CUDA-capable device(s) is/are busy or unavailable",
)
DEVICE = ("CUDA", "CUBLAS", "cublas", "cusolver", "CUSOLVER", "cudaError", "NVIDIA")


_here = threading.local()


class Failure(Enum):
    """How a device failed."""

    MEMORY = "out of memory on the device"
    ARITHMETIC = "the device's arithmetic failed"
    LOST = "the device is lost"


def failure(error: RuntimeError) -> Failure | None:
    """What an error says of the device; None where it is not the device's."""
    text, code = str(error), getattr(error, "error_code", None)
    if code in LOST_CODES or any(part in text for part in LOST):
        return Failure.LOST
    if isinstance(error, torch.OutOfMemoryError) or code == MEMORY_CODE or any(part in text for part in MEMORY):
        return Failure.MEMORY
    known = isinstance(error, torch.linalg.LinAlgError | torch.AcceleratorError)  # type: ignore[attr-defined]
    return Failure.ARITHMETIC if known or any(part in text for part in DEVICE) else None


@contextmanager
def threads(workers: int) -> Iterator[Executor]:
    """Worker threads, which are gone at the end, of single-threaded linear algebra."""
    with ThreadPoolExecutor(workers, "work", torch.set_num_threads, (1,)) as pool:
        yield pool


class Device:
    """The CPU: nothing is moved, nothing has to be fallen back from."""

    where = CPU
    slab_bytes = 0
    """What of the memory budget is taken before there is a step."""

    @property
    def name(self) -> str:
        """What the bits depend on."""
        return torch.backends.cpu.get_cpu_capability()

    def run(self, work: Callable[[torch.device], Out], need: int, name: str, watch: Watch) -> Out:
        """work(device), in a worker. need: what it takes there at the most, in bytes. Where a device cannot do it,
        work(CPU): `watch` hears of it with the tensor's name. Raises DeviceLost, and what `work` raises."""
        return work(CPU)

    def reading(self) -> AbstractContextManager[None]:
        """Entered where tensors are read that will be moved to the device."""
        return nullcontext()

    def threads(self, workers: int) -> AbstractContextManager[Executor]:
        """Worker threads for one run of a pipeline."""
        return threads(workers)


class Accelerator(Device):
    """A device of its own memory. What its steps need at a time stays within its budget."""

    def __init__(self, where: torch.device, budget_bytes: int, slabs: Slabs | None = None) -> None:
        self.where = where
        self.budget_bytes = budget_bytes
        self.slab_bytes = slabs.nbytes if slabs else 0
        self._slabs = slabs
        self._gate = Gate(budget_bytes)
        self._lost: str | None = None  # why
        self._pools: dict[int, Executor] = {}

    def run(self, work: Callable[[torch.device], Out], need: int, name: str, watch: Watch) -> Out:
        if need > self.budget_bytes:
            watch.fell_back(name, f"it needs {need} bytes on the device, whose budget is {self.budget_bytes}")
            return work(CPU)
        failed: Failure | None = None
        for share in (need, self.budget_bytes):  # beside others, and once more alone
            with self._gate.hold(share):
                if failed:
                    self._checked(self.clear)  # alone: all that is cached can go
                try:
                    return self._tried(work)
                except BadValues:
                    failed = Failure.ARITHMETIC  # an expert is refused for what the CPU finds in it
                except RuntimeError as error:
                    failed = failure(error)
                    if not failed:
                        raise
                    if failed is Failure.LOST:
                        raise self._gone(error) from error
                # outside of the handler: the traceback no longer holds on to what was allocated
                self._checked(self.probe)
            if failed is not Failure.MEMORY:
                break
        assert failed
        watch.fell_back(name, failed.value)
        return work(CPU)

    def reading(self) -> AbstractContextManager[None]:
        return self._slabs.lent() if self._slabs else nullcontext()

    @contextmanager
    def threads(self, workers: int) -> Iterator[Executor]:
        """The same ones every time: a library's handle and its workspace belong to a thread and its stream."""
        if workers not in self._pools:
            self._pools[workers] = ThreadPoolExecutor(workers, "device", torch.set_num_threads, (1,))
        yield self._pools[workers]

    def lane(self) -> AbstractContextManager[None]:
        """Entered around a thread's work on the device: when it is left, all of it is done."""
        raise NotImplementedError

    def probe(self) -> None:
        """A tiny computation, to its end. Raises RuntimeError where the device fails."""
        raise NotImplementedError

    def clear(self) -> None:
        """Gives back what is kept for later."""
        raise NotImplementedError

    def _tried(self, work: Callable[[torch.device], Out]) -> Out:
        if self._lost:
            raise self._gone()
        with self.reading(), _holding(), self.lane():
            return work(self.where)

    def _checked(self, ask: Callable[[], None]) -> None:
        """Raises DeviceLost where the device fails at this for want of anything but memory."""
        try:
            ask()
        except RuntimeError as error:
            if failure(error) is not Failure.MEMORY:
                raise self._gone(error) from error

    def _gone(self, error: RuntimeError | None = None) -> DeviceLost:
        """The first error is what every thread says: which of them is heard is chance."""
        self._lost = self._lost or str(error).partition("\n")[0]
        return DeviceLost(
            f"the device {self.where} is lost: {self._lost}",
            "start the daemon again, as a supervisor does; if that goes on, look at nvidia-smi and the kernel's log,"
            " or set compute.device = cpu. Nothing is lost: the expert in hand is still in the inbox",
        )


class Cuda(Accelerator):
    """A CUDA device, with a stream for each of the threads that last."""

    def __init__(self, where: torch.device, budget_bytes: int, slabs: Slabs | None = None) -> None:
        super().__init__(where, budget_bytes, slabs)
        self._mine = threading.local()
        # torch loads its solvers at their first use, and fails where two threads come to that at once (pytorch 90613).
        torch.linalg.eigh(torch.eye(2, device=where))

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.where)

    @contextmanager
    def lane(self) -> Iterator[None]:
        with torch.cuda.device(self.where):
            stream = getattr(self._mine, "stream", None)
            if stream is None:
                stream = self._mine.stream = torch.cuda.Stream(self.where)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                try:
                    yield
                finally:
                    stream.synchronize()  # what was read may be read over from here on

    def probe(self) -> None:
        with self.lane():
            ones = torch.ones(8, 8, device=self.where)
            if (ones @ ones).sum().item() != 8**3:
                raise RuntimeError("CUDA: a product of ones came out wrong")

    def clear(self) -> None:
        torch.cuda.empty_cache()


class Gate:
    """Bytes shared out among threads, to each what it asks for, in the order of asking."""

    def __init__(self, total: int) -> None:
        self._free = total
        self._turn = threading.Condition()
        self._waiting: deque[object] = deque()

    @contextmanager
    def hold(self, need: int) -> Iterator[None]:
        """Waits until so many are free. A thread holds one share at a time."""
        ticket = object()
        with self._turn:
            self._waiting.append(ticket)
            self._turn.wait_for(lambda: self._waiting[0] is ticket and self._free >= need)
            self._waiting.popleft()
            self._free -= need
            self._turn.notify_all()
        try:
            yield
        finally:
            with self._turn:
                self._free += need
                self._turn.notify_all()


def load(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device, in this thread's stream; from page-locked memory nobody waits for it.

    On a device it is a copy always: what was read stays as it was, should the work have to be done again. It is copied
    when the device comes to it, so that its memory is nobody else's before the lane is left.
    """
    if device == CPU:
        return x
    _here.held.append(x)
    return x.to(device, non_blocking=True, copy=True)


@contextmanager
def _holding() -> Iterator[None]:
    """Keeps what this thread loads: entered around a lane, for nothing is certain to be copied before that is left."""
    _here.held = []
    try:
        yield
    finally:
        del _here.held


def load_each(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors by key, loaded."""
    return {key: load(tensor, device) for key, tensor in tensors.items()}


def unload(x: Tensor) -> Tensor:
    """A tensor on the CPU, complete."""
    if x.device.type == "cpu":
        return x
    host = empty(x.nbytes).view(x.dtype).reshape(x.shape)
    host.copy_(x, non_blocking=True)
    torch.cuda.current_stream(x.device).synchronize()
    return host
