"""The tables of docs/comparison.md: how far another tool's merged model is from ours, method by method.

python -m bench.side_by_side        # writes the generated parts from bench/results/methods_*.json
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.record import RESULTS, ROOT
from projector.laws.trial import merge
from projector.methods import make, methods

DOCUMENT = ROOT / "docs" / "comparison.md"
TOOLS = ("mergekit", "fusionbench")
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One method by our name and with our parameters, and what the other tool calls the same."""

    method: str
    params: Mapping[str, Any]
    theirs: str
    experts: int = 4
    unrelated: bool = False  # the last of them is no fine-tune of the base

    @property
    def title(self) -> str:
        """As it is given on the command line."""
        return " ".join([self.method, *(f"{key}={shown(value)}" for key, value in self.params.items())])

    @property
    def built(self) -> bool:
        return self.method in methods()


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def ours(case: Case, base: Weights, experts: Sequence[Weights]) -> dict[str, Tensor]:
    """What mainstem's driver makes of them, from real files to real files."""
    return merge(make(case.method, case.params), base, experts)[0]


def weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model's folder, in one file or in shards."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= load_file(path)
    return found


def apart(base: Weights, theirs: Weights, reference: Weights) -> dict[str, Any]:
    """How far `theirs` is from the reference, by their task vectors: norm(theirs - ref) / norm(ref), float64.

    worst: the same for the tensor where it is largest, and its name. differ: the share of values that are further off
    than rounding can explain, 1e-4 of the task vector's root mean square.
    """
    difference = norm = 0.0
    worst, worst_name, differ, count = 0.0, "", 0, 0
    squares = {name: float((reference[name].double() - base[name].double()).square().sum()) for name in base}
    scale = (sum(squares.values()) / sum(tensor.numel() for tensor in base.values())) ** 0.5
    for name, square in squares.items():
        gap = (theirs[name].double() - reference[name].double()).abs()
        here = float(gap.square().sum())
        difference, norm = difference + here, norm + square
        differ, count = differ + int((gap > 1e-4 * scale).sum()), count + gap.numel()
        if square and (here / square) ** 0.5 > worst:
            worst, worst_name = (here / square) ** 0.5, name
    return {"relative": (difference / norm) ** 0.5, "worst": worst, "worst_name": worst_name, "differ": differ / count}


def misrounded(found: Weights, nearest: Weights) -> float:
    """The share of published values that are not the nearest to the exact ones."""
    wrong = sum(int((found[name] != tensor).sum()) for name, tensor in nearest.items())
    return wrong / sum(tensor.numel() for tensor in nearest.values())


def structure(base: Weights, expert: Weights, merged: Weights, weight: float) -> dict[str, float]:
    """Of one expert that was dropped at random: the share of its values that were kept, and by what they were scaled.

    factor: the median over all kept values; factor_low and factor_high: the lowest and highest median of a tensor.
    """
    factors, kept, count = [], 0, 0
    for name, start in base.items():
        tau, moved = expert[name].double() - start.double(), merged[name].double() - start.double()
        chosen = (moved != 0) & (tau.abs() > 1e-2 * tau.abs().mean())  # rounding hides what hardly moves
        kept, count = kept + int((moved != 0).sum()), count + int((tau != 0).sum())
        factors.append(moved[chosen] / (weight * tau[chosen]))
    medians = [float(factor.median()) for factor in factors if len(factor) >= 100]
    return {
        "kept": kept / count,
        "factor": float(torch.cat(factors).median()),
        "factor_low": min(medians),
        "factor_high": max(medians),
    }


def mergekit_part(figures: Mapping[str, Any]) -> list[str]:
    rows = [
        "| mainstem | mergekit | float32: apart | values that differ | bfloat16: mainstem misrounds | mergekit |",
        "|---|---|---|---|---|---|",
    ]
    for row in figures["methods"]:
        full, half = row["float32"], row["bfloat16"]
        rows.append(
            f"| `{row['title']}` | {row['theirs']} | {full['relative']:.1e} | {full['differ']:.2%} "
            f"| {half['ours']:.2%} | {half['theirs']:.2%} |"
        )
    rows += ["", "| one expert, dropped at random | kept | factor of what is kept | lowest and highest of a tensor |"]
    rows += ["|---|---|---|---|"]
    for row in figures["random"]:
        for tool in ("mainstem", "mergekit"):
            found = row[tool]
            rows.append(
                f"| {tool}: `{row['title'] if tool == 'mainstem' else row['theirs']}` | {found['kept']:.2%} "
                f"| {found['factor']:.4f} | {found['factor_low']:.4f} to {found['factor_high']:.4f} |"
            )
    return rows


def fusionbench_part(figures: Mapping[str, Any]) -> list[str]:
    rows = ["| mainstem | FusionBench | apart | values that differ | worst tensor |", "|---|---|---|---|---|"]
    rows += [
        f"| `{row['title']}` | {row['theirs']} | {row['relative']:.1e} | {row['differ']:.2%} "
        + (f"| {row['worst']:.1e} `{row['worst_name']}` |" if row["worst"] else "| - |")
        for row in figures["methods"]
    ]
    return rows


PARTS = {"mergekit": mergekit_part, "fusionbench": fusionbench_part}


def document(text: str, results: Path = RESULTS) -> str:
    """docs/comparison.md with its generated parts as the results say."""
    for tool in TOOLS:
        result = json.loads((results / f"methods_{tool}.json").read_text())
        figures, machine = result["figures"], result["machine"]
        told = f"{figures['version']}, torch {machine['torch']}, {machine['date']}: `{result['command']}`"
        part = "\n".join([told, "", *PARTS[tool](figures)])
        text = re.sub(
            rf"(<!-- {tool}: [^\n]*-->\n).*(<!-- /{tool} -->)", rf"\g<1>{_literal(part)}\n\g<2>", text, flags=re.S
        )
    return text


def _literal(text: str) -> str:
    return text.replace("\\", r"\\")


def main() -> None:
    DOCUMENT.write_text(document(DOCUMENT.read_text()))
    print(f"wrote {DOCUMENT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
