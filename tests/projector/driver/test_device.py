"""What a device cannot do is done on the CPU; what is lost ends the work; what is in flight stays within its budget."""

import gc
import os
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch

from daemon.compute.resources import exact_products
from projector.algebra.linalg import eigenvectors
from projector.driver.device import Device, Failure, Gate, failure, load
from projector.driver.fold import Driver
from projector.errors import BadValues, DeviceLost, Reason
from projector.files.slabs import empty
from projector.laws.trial import merge, stream
from projector.methods import make
from projector.watch import SILENT
from tests.projector.cards import MIB, Listening, PretendCard, accelerator_error, arena

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 9.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which"
SYEVD = (
    "cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling `cusolverDnXsyevd( handle, params, jobz, uplo, n,"
    " CUDA_R_32F, reinterpret_cast<void*>(A), lda, info)`. This error may appear if the input matrix contains NaN."
)
CONVERGE = (
    "linalg.eigh: The algorithm failed to converge because the input matrix is ill-conditioned or has too many"
    " repeated eigenvalues (error code: 511)."
)
ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"
ADVICE = (  # which torch puts below each error of CUDA's
    "\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html"
    "\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
MEMORY = [
    torch.OutOfMemoryError(OUT_OF_MEMORY),
    accelerator_error("CUDA error: out of memory\nCUDA kernel errors might be reported later", 2),
    RuntimeError("CUDA error: out of memory" + ADVICE),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnXsyevd_bufferSize(handle)`"),
]
ARITHMETIC = [
    torch.linalg.LinAlgError(SYEVD),  # type: ignore[attr-defined]
    torch.linalg.LinAlgError(CONVERGE),  # type: ignore[attr-defined]
    RuntimeError(SYEVD),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasDgemm( handle, opa, opb, m, n, k)`"),
    accelerator_error("CUDA error: no kernel image is available for execution on the device", 209),
    accelerator_error("CUDA error: invalid argument" + ADVICE, 1),
]
LOST = [
    accelerator_error(ILLEGAL, 700),
    RuntimeError(ILLEGAL),
    accelerator_error("CUDA error: unspecified launch failure", 719),
    accelerator_error("CUDA error: device-side assert triggered", 710),
    accelerator_error("CUDA error: uncorrectable ECC error encountered", 214),
    accelerator_error("CUDA error: misaligned address", 716),
    accelerator_error("CUDA error: the launch timed out and was terminated", 702),
    RuntimeError("CUDA error: an illegal instruction was encountered"),
]


def what(device: torch.device) -> str:
    """Work that is the same everywhere."""
    return device.type


@pytest.mark.parametrize(
    ("kind", "error"),
    [(kind, error) for kind, errors in zip(Failure, (MEMORY, ARITHMETIC, LOST), strict=True) for error in errors],
    ids=lambda value: str(value)[:70],
)
def test_each_failure_is_told_apart(kind: Failure, error: RuntimeError) -> None:
    assert failure(error) is kind


def test_an_error_of_ours_is_not_the_devices() -> None:
    error = RuntimeError("The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0")
    assert failure(error) is None
    card = PretendCard([error])
    with pytest.raises(RuntimeError, match="must match"):
        card.run(what, 1, "w", SILENT)
    assert card.lanes == 1


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: str(error)[:70])
def test_out_of_memory_is_tried_again_alone(error: RuntimeError) -> None:
    card, heard = PretendCard([error]), Listening()
    card.run(what, 1, "w", heard)
    assert (card.lanes, card.cleared, heard.names) == (2, 1, [])


def test_out_of_memory_alone_too_is_computed_on_the_cpu() -> None:
    card, heard = PretendCard(MEMORY[:2]), Listening()
    card.run(what, 1, "w", heard)
    assert (card.lanes, heard.names, heard.whys) == (2, ["w"], ["out of memory on the device"])


@pytest.mark.parametrize("error", ARITHMETIC, ids=lambda error: str(error)[:70])
def test_what_does_not_converge_there_is_computed_on_the_cpu_at_once(error: RuntimeError) -> None:
    card, heard = PretendCard([error]), Listening()
    card.run(what, 1, "w", heard)
    assert (card.lanes, card.probed, heard.names) == (1, 1, ["w"])
    card.run(what, 1, "x", heard)
    assert (card.lanes, heard.names) == (2, ["w"]), "the next one is tried there again"


@pytest.mark.parametrize("error", LOST, ids=lambda error: str(error)[:70])
def test_a_lost_device_ends_the_work(error: RuntimeError) -> None:
    card, heard = PretendCard([error]), Listening()
    with pytest.raises(DeviceLost) as caught:
        card.run(what, 1, "w", heard)
    assert caught.value.reason is Reason.DEVICE_LOST
    assert "start the daemon again" in caught.value.hint and "\n" not in str(caught.value)
    assert not isinstance(caught.value, RuntimeError | OSError), "nobody takes it for a fault of the expert"
    with pytest.raises(DeviceLost):
        card.run(what, 1, "w", heard)
    assert (card.lanes, heard.names) == (1, []), "it is asked for nothing more"


@pytest.mark.parametrize("error", [MEMORY[0], *ARITHMETIC[:2]], ids=lambda error: str(error)[:40])
def test_a_context_left_corrupt_is_found_by_the_probe(error: RuntimeError) -> None:
    def probe() -> None:
        raise RuntimeError(ILLEGAL)

    with pytest.raises(DeviceLost, match="illegal memory access"):
        PretendCard([error], probe=probe).run(what, 1, "w", SILENT)


def test_a_probe_without_room_says_nothing_of_the_context() -> None:
    def probe() -> None:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    card, heard = PretendCard([MEMORY[0], MEMORY[1]], probe=probe), Listening()
    card.run(what, 1, "w", heard)
    assert heard.names == ["w"]


def test_what_is_not_finite_there_is_asked_of_the_cpu() -> None:
    """A solver may give NaN without an error: no expert is refused for that."""
    bad = BadValues(Reason.NOT_FINITE, "w holds NaN", "drop another")
    card, heard = PretendCard([bad]), Listening()
    card.run(what, 1, "w", heard)
    assert (card.lanes, card.probed, heard.names) == (1, 1, ["w"])

    def never_finite(device: torch.device) -> None:
        raise bad

    with pytest.raises(BadValues):
        card.run(never_finite, 1, "w", heard)


def test_a_solver_that_gives_nan_says_so() -> None:
    with pytest.raises(torch.linalg.LinAlgError) as caught:  # type: ignore[attr-defined]
        eigenvectors(torch.full((3, 3), torch.nan, dtype=torch.float64))
    assert failure(caught.value) is Failure.ARITHMETIC


def test_what_alone_does_not_fit_is_not_tried() -> None:
    card, heard = PretendCard(budget_bytes=10), Listening()
    card.run(what, 11, "w", heard)
    assert (card.lanes, heard.names) == (0, ["w"])
    assert "11 bytes" in heard.whys[0] and "10" in heard.whys[0]
    card.run(what, 10, "w", heard)
    assert card.lanes == 1


def test_a_failed_try_holds_on_to_nothing_while_it_is_tried_again() -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def work(device: torch.device) -> int:
        alive = sum(ref() is not None for ref in made)
        x = torch.ones(4)
        made.append(weakref.ref(x))
        if len(made) < 3:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return alive

    gc.disable()
    try:
        assert PretendCard().run(work, 1, "w", SILENT) == 0
    finally:
        gc.enable()
    assert len(made) == 3


def test_what_is_in_flight_stays_within_the_budget() -> None:
    """Eight threads, sixty steps: what they hold together, and that nobody is overtaken for ever."""
    gate, counting, held, most = Gate(100), threading.Lock(), 0, 0

    def hold(need: int) -> None:
        nonlocal held, most
        with gate.hold(need):
            with counting:
                held += need
                most = max(most, held)
            time.sleep(0.001)
            with counting:
                held -= need

    needs = [100 if index % 20 == 7 else 10 + index % 50 for index in range(60)]
    workers = [threading.Thread(target=lambda part=part: [hold(n) for n in needs[part::8]]) for part in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
    assert (held, most) == (0, 100)


def test_who_asks_for_much_is_not_overtaken() -> None:
    gate, order = Gate(100), []
    much, little = threading.Event(), threading.Event()

    def hold(need: int, asked: threading.Event) -> None:
        asked.set()
        with gate.hold(need):
            order.append(need)

    with gate.hold(60):
        threads = []
        for need, asked in ((100, much), (40, little)):
            threads.append(threading.Thread(target=hold, args=(need, asked)))
            threads[-1].start()
            assert asked.wait(30)
            while len(gate._waiting) < len(threads):
                time.sleep(0.001)
        assert order == [], "40 are free, but somebody came before"
    for thread in threads:
        thread.join(30)
    assert order == [100, 40]


def test_trying_again_waits_until_the_others_are_done() -> None:
    card, began, go_on = PretendCard(budget_bytes=100), threading.Event(), threading.Event()
    order: list[str] = []

    def other(device: torch.device) -> None:
        began.set()
        assert go_on.wait(30)
        order.append("other")

    def failing(device: torch.device) -> None:
        if not order:
            go_on.set()  # the first try fails beside the other one
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        order.append("again")

    beside = threading.Thread(target=lambda: card.run(other, 60, "other", SILENT))
    beside.start()
    assert began.wait(30)
    card.run(failing, 40, "w", SILENT)
    beside.join(30)
    assert order == ["other", "again"]


@pytest.mark.usefixtures("two_threads")
def test_threads_and_so_streams_last_as_long_as_the_card() -> None:
    card, seen, together = PretendCard(), set(), threading.Barrier(2, timeout=30)

    def both() -> int:
        together.wait()
        return threading.get_ident()

    for _ in range(3):
        with card.threads(2) as pool:
            for future in [pool.submit(both) for _ in range(2)]:
                seen.add(future.result())
            assert pool.submit(torch.get_num_threads).result() == 1
    assert len(seen) == 2


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["opcm", "iso_c", "ties", "mean"])
def test_a_card_that_fails_now_and_then_gives_the_same_bits(name: str) -> None:
    base, experts = stream(4)
    here = merge(make(name), base, experts, Driver())
    errors = [None, MEMORY[0], None, ARITHMETIC[0], MEMORY[3], MEMORY[5], ARITHMETIC[1], None, *MEMORY] * 3
    card, heard = PretendCard(errors, slabs=arena(8)), Listening()
    there = merge(make(name), base, experts, Driver(card, workers=3, watch=heard))
    for mine, other in zip(here[:2], there[:2], strict=True):
        for key, tensor in mine.items():
            assert torch.equal(tensor, other[key]), key
    if name in ("ties", "mean"):
        assert card.lanes == 0, "what is taken elementwise stays on the CPU"
    else:
        assert card.lanes and heard.names
        assert len(card.threads_seen) <= 3, "the same threads in every sweep: a library's workspace belongs to one"


@pytest.mark.usefixtures("one_thread")
def test_a_lost_device_comes_out_of_the_driver_and_its_threads_serve_the_next_run() -> None:
    base, experts = stream(3)
    card = PretendCard([None, None, LOST[0]])
    with pytest.raises(DeviceLost):
        merge(make("opcm"), base, experts, Driver(card, workers=2))
    with pytest.raises(DeviceLost, match="an illegal memory access"):
        merge(make("opcm"), base, experts, Driver(card, workers=2))


@pytest.mark.usefixtures("one_thread")
def test_operands_are_read_straight_into_the_slabs() -> None:
    draw = torch.Generator().manual_seed(0)
    base, *experts = ({"layer.weight": torch.randn(512, 512, generator=draw)} for _ in range(3))
    slabs = arena(32, MIB // 4)
    taken: list[int] = []
    take = slabs.take

    def counting(nbytes: int) -> torch.Tensor | None:
        found = take(nbytes)
        if found is not None:
            taken.append(nbytes)
        return found

    slabs.take = counting  # type: ignore[method-assign]
    merge(make("opcm"), base, experts, Driver(PretendCard(slabs=slabs)))
    assert taken.count(512 * 512 * 4) >= 2 * len(experts) + 1, "base, expert and state of each fold"
    gc.collect()
    assert slabs.free_bytes == slabs.nbytes, "all of them have come back"


def test_what_is_loaded_stays_put_until_the_lane_is_left() -> None:
    """The device copies when it comes to it: no other read may take the slab before."""
    slabs = arena(1)

    def work(device: torch.device) -> int:
        load(empty(MIB), device)
        return slabs.free_bytes

    assert PretendCard(slabs=slabs).run(work, 1, "w", SILENT) == 0
    assert slabs.free_bytes == MIB


def test_the_cpu_has_no_slabs_and_no_pool_of_its_own() -> None:
    before = threading.active_count()
    with Device().threads(2) as pool:
        pool.submit(int).result()
    assert threading.active_count() == before
    assert Device().slab_bytes == 0


def test_products_are_exact_whatever_the_environment_says() -> None:
    """In a process of its own: the environment is read once. Both of torch's flags must agree, or it multiplies not."""
    script = (
        "import torch, warnings; warnings.simplefilter('error')\n"
        "before = torch.get_float32_matmul_precision()\n"
        "from daemon.compute.resources import exact_products; exact_products()\n"
        "print(before, torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.fp32_precision,"
        " torch._C._get_cublas_allow_tf32())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == ["high", "highest", "ieee", "False"]
    exact_products()
