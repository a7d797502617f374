"""Which methods grow without end where every expert is trained from what is merged, as they declare."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import pytest
import torch

from projector.algebra.linalg import energy
from projector.laws.checks import _ready, _surveyed, _zeros
from projector.method import Method, Totals
from projector.methods import make, methods
from projector.spec import TensorSpec

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDS = 24
OTHERS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("task_arithmetic", {"scale": "norm"}),
    ("task_arithmetic", {"scale": "per_sqrt"}),
    ("ties", {"combine": "sum"}),
    ("ties", {"combine": "max"}),
    ("breadcrumbs_ties", {"combine": "sum"}),
    ("opcm", {"readout": "isotropic"}),
    ("wudi", {"solver": "adam"}),
    ("ace", {"normalise": "always"}),
)
CASES = [*((name, {}) for name in methods() if not make(name).needs), *OTHERS]


def walked(method: Method) -> float:
    """How far the head is from the base after some rounds, each expert being one random step further than the head: of
    a model of one matrix, without files."""
    spec = TensorSpec("h.0.weight", (32, 32), torch.float32)
    generator = torch.Generator().manual_seed(0)
    base = now = torch.randn(spec.shape, generator=generator)
    state, totals = _zeros(method, spec), Totals()
    for number in range(1, ROUNDS + 1):
        delta = now + 0.01 * torch.randn(spec.shape, generator=generator) - base
        expert = _surveyed(method, state, spec, delta, number)
        state, sums = method.update(_ready(method, state, spec, base), delta, spec, expert)
        totals = method.tally(totals, {"task_vector": energy(delta), **sums}, expert)
        now = method.read(base, state, totals, spec).float()
    return float((now - base).norm())


@lru_cache(maxsize=1)
def trained_on() -> float:
    """Plain fine-tuning, on and on."""
    return walked(make("latest"))


@pytest.mark.parametrize(("name", "params"), CASES, ids=str)
def test_it_declares_whether_it_grows(name: str, params: Mapping[str, Any]) -> None:
    method = make(name, params)
    far = walked(method)
    print(f"{name} {params}: {far / trained_on():.3g}")
    assert (far > trained_on()) == method.grows
