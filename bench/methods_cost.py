"""What the spectral methods cost beside OPCM, and how far each is from its formula in float64.

    python -m bench.methods_cost --width 384 --experts 6

The experts are merged one after the other, from real files to real files, by the driver with one worker: two blocks of
a transformer of that width, float32, random. Seconds are of an arrival, from its reading to the written state, where
what is prepared is worked out then, and of the read-out at the end; bytes are of the state, for each parameter of the
model. The error is that of the published weights, as a task vector, against tests/oracles with every expert in memory.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.details import methods_cost
from bench.record import parser, save
from bench.side_by_side import Case
from projector.laws.trial import merge
from projector.methods import make
from tests.oracles import rules, smile, spectral

Weights = Mapping[str, Tensor]
Oracle = Callable[[Weights, Sequence[Weights]], Mapping[str, Tensor]]
LAYERED = {"layer_alpha": 0.5, "layer_beta": 0.5}


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--width", type=int, default=384)
    made.add_argument("--experts", type=int, default=6)
    options = made.parse_args()
    base, experts = _drawn(options.width, options.experts)
    torch.set_num_threads(1)
    rows = [_row(case, oracle, base, experts) for case, oracle in CASES]
    figures = {"methods": rows}
    print("\n".join(methods_cost(figures)))
    save("methods_cost", options, figures, quiet=True)


def _opcm(base: Weights, experts: Sequence[Weights]) -> dict[str, Tensor]:
    """The merged task vector."""
    return rules.task_vector(base, rules.opcm(base, experts))


def _layered(oracle: Oracle, base: Weights, experts: Sequence[Weights]) -> Mapping[str, Tensor]:
    """The same over experts that moved half as far in the first of two layers, and outside of them."""
    share = {name: 1.0 if name.startswith("layers.1.") else 0.5 for name in base}
    less = [{name: base[name] + share[name] * (x.double() - base[name]) for name, x in one.items()} for one in experts]
    return oracle({name: x.double() for name, x in base.items()}, less)


CASES: Sequence[tuple[Case, Oracle]] = (
    (Case("opcm", {}, ""), _opcm),
    (Case("iso_c", {}, ""), spectral.iso_c),
    (Case("tsv_m", {}, ""), spectral.tsv_m),
    (Case("confluence", {}, ""), spectral.confluence),
    (Case("smile", {}, ""), smile.smile),
    (Case("wudi", {}, ""), spectral.wudi_ridge),
    (Case("ace", {}, ""), spectral.ace),
    (Case("ace", {"normalise": "always"}, ""), partial(spectral.ace, normalise="always")),
    (Case("ace", {"normalise": "never"}, ""), partial(spectral.ace, normalise="never")),
    (Case("opcm", LAYERED, ""), partial(_layered, _opcm)),
    (Case("iso_c", LAYERED, ""), partial(_layered, spectral.iso_c)),
)


def _row(case: Case, oracle: Oracle, base: Weights, experts: Sequence[Weights]) -> dict[str, Any]:
    begun: list[float] = []

    def arriving() -> Iterator[Weights]:
        for expert in experts:
            begun.append(time.perf_counter())
            yield expert
        begun.append(time.perf_counter())

    weights, state, _ = merge(make(case.method, case.params), base, arriving())
    ended = time.perf_counter()
    took = [after - before for before, after in pairwise(begun)]
    truth = oracle(base, experts)
    apart = {name: weights[name].double() - base[name].double() - tau for name, tau in truth.items()}
    return {
        "method": case.title,
        "arrival": median(took[2:]),  # the first is taken whole, the second a warm-up
        "read_out": ended - begun[-1],
        "state_bytes": sum(x.nbytes for x in state.values()) / sum(x.numel() for x in base.values()),
        "error": rules.norm(apart) / rules.norm(truth),
    }


def _drawn(width: int, count: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A base and its experts, which share a part of what they learnt."""
    draw = torch.Generator().manual_seed(0)
    shapes = {
        f"layers.{layer}.{name}.weight": shape
        for layer in (0, 1)
        for name, shape in {"q": (width, width), "up": (4 * width, width), "down": (width, 4 * width)}.items()
    }
    base, common = ({name: torch.randn(shape, generator=draw) for name, shape in shapes.items()} for _ in range(2))
    return {name: x / width**0.5 for name, x in base.items()}, [
        {
            name: x / width**0.5 + 1e-3 * (torch.randn(x.shape, generator=draw) + 0.5 * common[name])
            for name, x in base.items()
        }
        for _ in range(count)
    ]


if __name__ == "__main__":
    main()
