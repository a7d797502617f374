"""The same code on a CUDA device: within 1e-5 of the CPU's results, and the same bits each time."""

import pytest
import torch

from projector.fold import Driver
from projector.methods import make, methods
from projector.trial import merge, stream
from projector.watch import Watch
from tests import oracles

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("name", list(methods()))
def test_the_devices_agree(name: str) -> None:
    base, experts = stream(5)
    here = merge(make(name), base, experts, Driver())[0]
    there, again = (merge(make(name), base, experts, Driver(torch.device("cuda")))[0] for _ in range(2))
    apart = {key: there[key].double() - here[key].double() for key in base}
    whole = {key: here[key].double() - base[key].double() for key in base}
    assert oracles.norm(apart) <= 1e-5 * oracles.norm(whole)
    for key, tensor in there.items():
        assert torch.equal(tensor, again[key]), key


def test_workers_with_streams_of_their_own_give_the_same_bits() -> None:
    base, experts = stream(5)
    one, four = (merge(make("opcm"), base, experts, Driver(torch.device("cuda"), workers=n))[1] for n in (1, 4))
    for key, tensor in one.items():
        assert torch.equal(tensor, four[key]), key


def test_what_does_not_fit_on_the_card_is_computed_on_the_cpu() -> None:
    class Listening(Watch):
        def __init__(self) -> None:
            self.names: list[str] = []

        def fell_back(self, name: str) -> None:
            self.names.append(name)

    draw = torch.Generator().manual_seed(0)
    base, *experts = ({"layer.weight": torch.randn(2048, 2048, generator=draw)} for _ in range(3))
    listening = Listening()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)  # some megabytes
    try:
        there = merge(make("opcm"), base, experts, Driver(torch.device("cuda"), watch=listening))[0]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    here = merge(make("opcm"), base, experts, Driver())[0]
    assert set(listening.names) == {"layer.weight"}
    assert torch.equal(there["layer.weight"], here["layer.weight"])
