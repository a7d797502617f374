"""The same code on a CUDA device: within 1e-5 of the CPU's results, and the same bits each time."""

import pytest
import torch

from projector.fold import Driver
from projector.methods import make, methods
from projector.trial import merge, stream
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
