"""How far FusionBench's merged model is from ours, as relative errors of the merged task vectors (merged - base).

    python -m bench.compare_opcm --base BASE --theirs merged.safetensors --ours published/main/latest
    python -m bench.compare_opcm --base BASE --theirs merged.safetensors --oracle EXPERT_DIR ...

The second form holds FusionBench against the float64 formula in tests/oracles/rules.py instead (every expert in
memory). A model is a .safetensors file or a folder that holds model.safetensors. The exit status is 1 where a compared
group differs by more than --within.

Three groups, because the tools' rules differ for one of them:

    matrices         both project them
    other            both add them up: biases, norms, the position embedding, the 4-D patch embedding
    class_embedding  a parameter that sits directly on a module with children. FusionBench walks over leaf modules, so
                     it never merges this one: its value is the first expert's, scaled down at every step, whereas ours
                     is the sum over all experts. Reported, and left out of what must agree

Through the norm of the merged vector, which sets the one global scale, the class embedding still reaches the other
groups: by about 2e-5 at the real size (768 of 87 million elements), by 1e-3 on the small shapes. The column "direction"
is the error that is left after the best common scale, so it shows the projection alone (rounding floor: 1e-8).
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.oracles import rules

UNMERGED = "embeddings.class_embedding"
GROUPS = ("matrices", "other", "class_embedding")
Lookup = Callable[[str], torch.Tensor]


@dataclass
class Distance:
    """Running sums of one group: squares of the difference and of both task vectors, and their inner product."""

    tensors: int = 0
    difference: float = 0.0
    theirs: float = 0.0
    ours: float = 0.0
    product: float = 0.0
    worst: float = 0.0
    worst_name: str = "-"

    def add(self, name: str, theirs: torch.Tensor, ours: torch.Tensor) -> None:
        """Take in one tensor's two task vectors, float64."""
        difference = float((theirs - ours).square().sum())
        reference = float(ours.square().sum())
        error = _relative(difference, reference)
        if error > self.worst or self.tensors == 0:
            self.worst, self.worst_name = error, name
        self.tensors += 1
        self.difference += difference
        self.theirs += float(theirs.square().sum())
        self.ours += reference
        self.product += float((theirs * ours).sum())

    def join(self, other: "Distance") -> "Distance":
        """Both groups as one."""
        worst = max(self, other, key=lambda distance: distance.worst)
        return Distance(
            self.tensors + other.tensors,
            self.difference + other.difference,
            self.theirs + other.theirs,
            self.ours + other.ours,
            self.product + other.product,
            worst.worst,
            worst.worst_name,
        )

    @property
    def relative(self) -> float:
        """norm(theirs - ours) / norm(ours)."""
        return _relative(self.difference, self.ours)

    @property
    def direction(self) -> float:
        """The sine of the angle between the two task vectors: what no common scale can mend."""
        squares = self.theirs * self.ours
        return _relative(max(0.0, squares - self.product**2), squares)


def group_of(name: str, tensor: torch.Tensor) -> str:
    """Which of GROUPS a tensor belongs to."""
    if name.endswith(UNMERGED):
        return "class_embedding"
    return "matrices" if rules.is_projected(name, tensor, rules.DEFAULT_EXCLUDE) else "other"


def measure(base: Path, theirs: Lookup, ours: Lookup) -> dict[str, Distance]:
    """The distance of each group, one tensor in memory at a time on the base's side."""
    distances = {group: Distance() for group in GROUPS}
    with safe_open(weights_file(base), "pt") as file:
        for name in sorted(file.keys()):
            weight = file.get_tensor(name)
            if weight.is_floating_point():
                start = weight.double()
                distances[group_of(name, weight)].add(name, theirs(name).double() - start, ours(name).double() - start)
    return distances


def report(distances: dict[str, Distance]) -> Distance:
    """Print the table; return the distance over everything that both tools merge by the same rule."""
    compared = distances["matrices"].join(distances["other"])
    rows = {**distances, "compared": compared, "everything": compared.join(distances["class_embedding"])}
    print(f"{'group':<16}{'tensors':>8}{'norm theirs':>13}{'norm ours':>13}", end="")
    print(f"{'rel. error':>12}{'direction':>11}{'worst':>10}  worst tensor")
    for group, row in rows.items():
        norms = f"{math.sqrt(row.theirs):>13.6g}{math.sqrt(row.ours):>13.6g}"
        errors = f"{row.relative:>12.2e}{row.direction:>11.1e}{row.worst:>10.1e}"
        print(f"{group:<16}{row.tensors:>8}{norms}{errors}  {row.worst_name}")
    print("class_embedding is not merged by FusionBench (see this file's head): 'compared' leaves it out")
    return compared


def weights_file(path: Path) -> Path:
    """The .safetensors file behind a file or a model folder."""
    return path / "model.safetensors" if path.is_dir() else path


def _relative(difference: float, reference: float) -> float:
    if difference == 0:
        return 0.0
    return math.sqrt(difference / reference) if reference else math.inf


def main() -> int:
    """Compare the two files named on the command line; 0 where they agree."""
    parser = argparse.ArgumentParser(description="Compare FusionBench's OPCM with mainstem's, or with the formula.")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--theirs", type=Path, required=True, help="FusionBench's merged weights")
    side = parser.add_mutually_exclusive_group(required=True)
    side.add_argument("--ours", type=Path, help="our published weights")
    side.add_argument("--oracle", type=Path, nargs="+", metavar="EXPERT", help="compare with the float64 formula")
    parser.add_argument("--alpha", type=float, default=0.5, help="for --oracle; must be what FusionBench ran with")
    parser.add_argument("--within", type=float, default=1e-3, help="relative error that still counts as agreement")
    options = parser.parse_args()
    with safe_open(weights_file(options.theirs), "pt") as theirs:
        if options.oracle:
            experts = [load_file(weights_file(path)) for path in options.oracle]
            merged = rules.opcm(load_file(weights_file(options.base)), experts, alpha=options.alpha)
            compared = report(measure(options.base, theirs.get_tensor, merged.__getitem__))
        else:
            with safe_open(weights_file(options.ours), "pt") as ours:
                compared = report(measure(options.base, theirs.get_tensor, ours.get_tensor))
    agree = compared.relative <= options.within
    print(f"relative error {compared.relative:.2e}, {'within' if agree else 'NOT within'} {options.within:.0e}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
