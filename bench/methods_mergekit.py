"""The same files merged by mergekit and by mainstem, method by method: how far the merged task vectors are apart.

    MERGEKIT_PYTHON=mk/bin/python python -m bench.methods_mergekit

The files are a narrow Llama of bench.llama_shapes, once in float32 and once in bfloat16. The float32 files show the
rules. Of the bfloat16 files each tool's result is held against the exact one, which is mainstem's of the same values
written as float32: the nearest bfloat16 to it is the best that can be published. Where values are dropped at random the
bits cannot agree: there the share that is kept and its scale are compared. Slerp takes two unrelated models, because
fine-tunes of one base lie so close together that both tools take the straight line.
"""

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.live import scratch
from bench.llama_shapes import SMALL
from bench.record import parser, peer, run, save
from bench.shapes import write
from bench.side_by_side import Case, Weights, apart, misrounded, ours, structure, weights

WEIGHT = 0.3
DENSITY = 0.2
DROP = 0.9
CASES: Sequence[tuple[Case, Mapping[str, object]]] = (
    (Case("mean", {}, "linear, weight 1"), {"merge_method": "linear", "parameters": {"weight": 1.0}}),
    (Case("slerp", {}, "slerp, t 0.5", experts=2, unrelated=True), {"merge_method": "slerp", "parameters": {"t": 0.5}}),
    (
        Case("task_arithmetic", {"scale": WEIGHT}, f"task_arithmetic, weight {WEIGHT}"),
        {"merge_method": "task_arithmetic", "parameters": {"weight": WEIGHT}},
    ),
    (
        Case("ties", {"scope": "tensor", "density": DENSITY}, f"ties, density {DENSITY}, weight 1"),
        {"merge_method": "ties", "parameters": {"weight": 1.0, "density": DENSITY}},
    ),
    (
        Case("ties", {"scope": "model", "density": DENSITY}, f"ties, density {DENSITY}, weight 1"),
        {"merge_method": "ties", "parameters": {"weight": 1.0, "density": DENSITY}},
    ),
    (
        Case(
            "breadcrumbs",
            {"gamma": 0.01, "density": 0.9, "scale": WEIGHT},
            f"breadcrumbs, density 0.9, weight {WEIGHT}",
        ),
        {"merge_method": "breadcrumbs", "parameters": {"weight": WEIGHT, "density": 0.9, "gamma": 0.01}},
    ),
    (
        Case(
            "breadcrumbs",
            {"gamma": 0.01, "density": 0.9 / 0.99, "scale": WEIGHT},
            f"breadcrumbs, density 0.9, weight {WEIGHT}",
        ),
        {"merge_method": "breadcrumbs", "parameters": {"weight": WEIGHT, "density": 0.9, "gamma": 0.01}},
    ),
)
RANDOM = (
    Case("dare", {"drop": DROP, "scale": WEIGHT}, f"dare_linear, density {1 - DROP:.1f}, weight {WEIGHT}", experts=1),
    {"merge_method": "dare_linear", "parameters": {"weight": WEIGHT, "density": 1 - DROP}},
)


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    python = peer("MERGEKIT_PYTHON")
    if python is None:
        raise SystemExit("MERGEKIT_PYTHON is not given: this compares with mergekit (bench/README.md)")
    options.out.mkdir(parents=True, exist_ok=True)
    with scratch(options.out) as folder:
        found = [compared(python, folder, case, config) for case, config in CASES if case.built]
        case, config = RANDOM
        random = [dropped(python, folder, case, config)] if case.built else []
    save("methods_mergekit", options, {"version": _version(python), "methods": found, "random": random})


def compared(python: Path, folder: Path, case: Case, config: Mapping[str, object]) -> dict[str, Any]:
    """One row: both tools on the float32 files, and each of them on the bfloat16 files against the exact result."""
    base, *experts = _made(folder, torch.float32, case)
    full, fulls = weights(base), [weights(path) for path in experts]
    theirs = mergekit(python, folder, base, experts, config)
    row: dict[str, Any] = {"title": case.title, "theirs": case.theirs}
    row["float32"] = apart(full, theirs, ours(case, full, fulls))

    base, *experts = _made(folder, torch.bfloat16, case)
    half, halves = weights(base), [weights(path) for path in experts]
    exact = ours(case, _cast(half, torch.float32), [_cast(expert, torch.float32) for expert in halves])
    nearest = _cast(exact, torch.bfloat16)
    row["bfloat16"] = {
        "floor": apart(half, nearest, exact)["relative"],
        "ours": misrounded(ours(case, half, halves), nearest),
        "theirs": misrounded(mergekit(python, folder, base, experts, config), nearest),
    }
    return row


def dropped(python: Path, folder: Path, case: Case, config: Mapping[str, object]) -> dict[str, Any]:
    """What each tool keeps of one expert when it drops values at random."""
    base, first = _made(folder, torch.float32, case)
    start, expert = weights(base), weights(first)
    return {
        "title": case.title,
        "theirs": case.theirs,
        "mainstem": structure(start, expert, ours(case, start, [expert]), WEIGHT),
        "mergekit": structure(start, expert, mergekit(python, folder, base, [first], config), WEIGHT),
    }


def mergekit(
    python: Path, folder: Path, base: Path, experts: Sequence[Path], config: Mapping[str, object]
) -> dict[str, torch.Tensor]:
    """mergekit's merged weights, from its own command on the same folders. Its slerp calls the first model the base."""
    given: dict[str, object] = {"models": [{"model": str(path)} for path in experts]}
    if config["merge_method"] != "linear":
        given["base_model"] = str(experts[0] if config["merge_method"] == "slerp" else base)
    dtype = next(iter(weights(base).values())).dtype
    out = folder / "merged"
    (folder / "config.yaml").write_text(json.dumps({**config, **given, "dtype": str(dtype).removeprefix("torch.")}))
    command = [python.parent / "mergekit-yaml", folder / "config.yaml", out, "--no-copy-tokenizer", "--quiet"]
    run(command, folder / "log", HF_HUB_OFFLINE="1")
    found = weights(out)
    shutil.rmtree(out)
    return found


def _made(folder: Path, dtype: torch.dtype, case: Case) -> list[Path]:
    """The base and the experts in this dtype; the values of the float32 ones are not rounded."""
    model = replace(SMALL.model(), dtype=dtype)
    made = write(folder / str(dtype), case.experts, 0, model)
    return [*made[:-1], write(folder / f"other-{dtype}", 1, 1, model)[1]] if case.unrelated else made


def _cast(tensors: Weights, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _version(python: Path) -> str:
    asked = "import importlib.metadata as m; print('mergekit', m.version('mergekit'))"
    return subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
