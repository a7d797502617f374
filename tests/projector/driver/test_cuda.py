"""The same code on a CUDA device: within 1e-5 of the CPU's results, and the same bits each time.

`pytest -m cuda` runs these alone: see tests/conftest.py.
"""

import gc
import os
import subprocess
import sys

import pytest
import torch

from daemon.compute.resources import device, exact_products
from daemon.config import Compute
from projector.driver.device import CPU, Cuda, Failure, failure
from projector.driver.fold import Driver
from projector.files.slabs import SLAB_BYTES, Slabs
from projector.laws.trial import merge, stream
from projector.methods import make, methods
from tests.oracles import rules
from tests.projector.cards import Listening

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="torch sees no CUDA device: `pytest -m cuda` on a machine with one"
    ),
]
GIB = 1 << 30


@pytest.fixture(scope="module")
def card() -> Cuda:
    exact_products()
    slabs = Slabs(torch.empty(64 * SLAB_BYTES, dtype=torch.uint8, pin_memory=True))
    return Cuda(torch.device("cuda", 0), 4 * GIB, slabs)


def matrices(count: int, side: int = 1024) -> list[dict[str, torch.Tensor]]:
    """A base and experts of one matrix."""
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(side, side, generator=draw)
    found = [{"layer.weight": base}]
    for _ in range(count):
        left, right = torch.randn(side, side, generator=draw), torch.randn(side, side, generator=draw)
        found.append({"layer.weight": base + 1e-3 * left @ right})
    return found


def of_low_rank(count: int, side: int, rank: int) -> list[dict[str, torch.Tensor]]:
    """A base of zeros and experts of this rank.

    Beside any other base a task vector is of full rank, by the rounding of base + tau; how that rounding lies to a
    decomposition's own is chance, and OPCM amplifies it, on the CPU too.
    """
    draw = torch.Generator().manual_seed(0)
    found = [{"layer.weight": torch.zeros(side, side)}]
    for _ in range(count):
        left, right = torch.randn(side, rank, generator=draw), torch.randn(rank, side, generator=draw)
        found.append({"layer.weight": 1e-3 * left @ right})
    return found


@pytest.mark.parametrize("name", list(methods()))
def test_the_devices_agree(name: str, card: Cuda) -> None:
    base, experts = stream(5)
    here = merge(make(name), base, experts, Driver())[0]
    there, again = (merge(make(name), base, experts, Driver(card))[0] for _ in range(2))
    apart = {key: there[key].double() - here[key].double() for key in base}
    whole = {key: here[key].double() - base[key].double() for key in base}
    assert rules.norm(apart) <= 1e-5 * rules.norm(whole)
    for key, tensor in there.items():
        assert torch.equal(tensor, again[key]), key


def test_workers_with_streams_of_their_own_give_the_same_bits(card: Cuda) -> None:
    base, experts = stream(5)
    one, four = (merge(make("opcm"), base, experts, Driver(card, workers=n))[1] for n in (1, 4))
    for key, tensor in one.items():
        assert torch.equal(tensor, four[key]), key


def test_what_does_not_fit_on_the_card_is_computed_on_the_cpu(card: Cuda) -> None:
    base, *experts = matrices(2, 2048)
    heard = Listening()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)  # some megabytes
    try:
        there = merge(make("opcm"), base, experts, Driver(card, watch=heard))[0]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    here = merge(make("opcm"), base, experts, Driver())[0]
    assert set(heard.names) == {"layer.weight"}
    assert torch.equal(there["layer.weight"], here["layer.weight"])


def test_what_is_beyond_the_budget_is_not_tried() -> None:
    base, *experts = matrices(2)
    heard = Listening()
    small = Cuda(torch.device("cuda"), 1 << 20)
    there = merge(make("opcm"), base, experts, Driver(small, watch=heard))[0]
    assert torch.equal(there["layer.weight"], merge(make("opcm"), base, experts, Driver())[0]["layer.weight"])
    assert "budget" in heard.whys[0]


def test_the_memory_of_the_card_stays_within_what_was_counted(card: Cuda) -> None:
    base, *experts = matrices(2, 2048)
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    needs: list[int] = []
    hold = card._gate.hold
    card._gate.hold = lambda need: (needs.append(need), hold(need))[1]  # type: ignore[method-assign]
    try:
        merge(make("opcm"), base, experts, Driver(card))
    finally:
        card._gate.hold = hold  # type: ignore[method-assign]
    libraries = 128 << 20
    assert torch.cuda.max_memory_allocated() - before <= max(needs) + libraries


@pytest.mark.parametrize("rank", [1, 64, 200], ids=["sketched 1", "sketched 64", "decomposed 200"])
def test_matrices_of_low_rank_come_out_on_whichever_side(rank: int, card: Cuda) -> None:
    """What cuSOLVER was seen to fail at. Where it does, the CPU does it, and the device is whole afterwards."""
    base, *experts = of_low_rank(3, 1024, rank)
    for name in ("opcm", "iso_c"):
        here, there = (merge(make(name), base, experts, driver)[0] for driver in (Driver(), Driver(card)))
        apart = rules.norm({"": there["layer.weight"].double() - here["layer.weight"].double()})
        assert apart <= 1e-5 * rules.norm(here), name
    card.probe()


def test_slabs_are_page_locked_and_come_back(card: Cuda) -> None:
    with card.reading():
        slabs = card._slabs
        assert slabs
        found = slabs.take(1 << 20)
        assert found is not None and found.is_pinned() and found[:4096].view(torch.float32).is_pinned()
        del found
    base, *experts = matrices(2)
    merge(make("opcm"), base, experts, Driver(card, workers=2))
    gc.collect()
    assert slabs.free_bytes == slabs.nbytes


def test_tf32_in_the_environment_changes_no_bit() -> None:
    script = (
        "import torch\nfrom daemon.compute.resources import exact_products\nexact_products()\n"
        "x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).cuda()\n"
        "print(hash((x @ x).cpu().numpy().tobytes()))"
    )
    found = set()
    for value in ("0", "1"):
        ran = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": "0", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": value},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        found.add(ran.stdout)
    assert len(found) == 1


def test_the_first_decompositions_may_come_from_several_threads() -> None:
    """In a process of its own: torch loads its solvers once, and not for two threads at once."""
    script = (
        "import torch\nfrom concurrent.futures import ThreadPoolExecutor\nfrom projector.driver.device import Cuda\n"
        "card = Cuda(torch.device('cuda', 0), 1 << 30)\nx = torch.eye(300).double().cuda()\n"
        "with ThreadPoolExecutor(8) as pool:\n"
        "    print(sum(float(found.eigenvalues.sum()) for found in pool.map(torch.linalg.eigh, [x] * 8)))\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.stdout == "2400.0\n", ran.stderr


def test_a_budget_bounds_what_torch_keeps() -> None:
    made = device(Compute(device="cuda", device_budget=GIB))
    try:
        assert isinstance(made, Cuda) and made.budget_bytes == GIB
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2 * GIB, dtype=torch.uint8, device=made.where)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_lost_context_is_seen_as_one() -> None:
    """In a process of its own, whose context is lost by an assertion on the device."""
    script = (
        "import torch\nfrom projector.driver.device import Cuda\nfrom projector.errors import DeviceLost\n"
        "from projector.watch import SILENT\ncard = Cuda(torch.device('cuda'), 1 << 30)\n"
        "def work(device):\n"
        "    return torch.ones(3, device=device)[torch.tensor([7], device=device)].cpu()\n"
        "try:\n    card.run(work, 1, 'w', SILENT)\nexcept DeviceLost as error:\n    print('lost:', error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.stdout.startswith("lost:"), ran.stderr


def test_the_messages_of_a_full_card_are_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    assert failure(caught.value) is Failure.MEMORY
    more_than_there_is = 4 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(more_than_there_is, dtype=torch.uint8, pin_memory=True)
    assert failure(caught.value) is Failure.MEMORY, caught.value
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 46, dtype=torch.uint8, pin_memory=True)  # more than there are addresses: an argument's error
    assert failure(caught.value) in (Failure.MEMORY, Failure.ARITHMETIC), caught.value


def test_auto_chooses_and_an_explicit_choice_is_obeyed() -> None:
    assert device(Compute(device="cuda")).where.type == "cuda"
    assert device(Compute(device="cpu")).where == CPU
    assert device(Compute(device="auto")).where.type in ("cuda", "cpu")
