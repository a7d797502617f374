"""The same files merged by FusionBench's functions and by mainstem: how far the merged task vectors are apart.

    FUSIONBENCH_PYTHON=fb/bin/python python -m bench.methods_fusionbench

The files are a narrow CLIP vision tower of bench.clip_shapes in float32. Fisher and Gram sidecars are drawn at random,
positive as real ones are: what is compared is what a tool makes of them. The matrices that mainstem's default `exclude`
leaves out are given to FusionBench as excluded too. The experts leave the class embedding as it is in the base: its
OPCM never merges that one (bench/README.md).
"""

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors.torch import load_file, save_file

from bench.clip_shapes import SMALL
from bench.live import scratch
from bench.record import parser, peer, run, save
from bench.shapes import write
from bench.side_by_side import Case, apart, ours, weights
from projector.algebra.linalg import EXCLUDED
from projector.laws.trial import sidecar

EXPERTS = 4
CASES: Sequence[tuple[Case, str]] = (
    (Case("mean", {}, "simple_average"), "simple_average"),
    (Case("ties", {"combine": "mean"}, "ties_merging, mean"), "ties_mean"),
    (Case("ties", {"combine": "sum"}, "ties_merging, sum"), "ties_sum"),
    (Case("ties", {"combine": "max"}, "ties_merging, max"), "ties_max"),
    (Case("magmax", {}, "magmax, scale 0.5"), "magmax"),
    (Case("emr", {}, "emr_merge, the unified vector"), "emr"),
    (Case("fisher", {}, "merging_with_fisher_weights"), "fisher"),
    (Case("regmean", {}, "merging_with_regmean_weights, 0.95"), "regmean"),
    (Case("iso_c", {}, "iso_c"), "iso_c"),
    (Case("tsv_m", {}, "compute_and_sum_svd_mem_reduction"), "tsv_m"),
    (Case("wudi", {"solver": "adam"}, "wudi_merging"), "wudi"),
    (Case("opcm", {}, "OPCMForCLIP, alpha 0.5"), "opcm"),
)
UNMERGED = "class_embedding"


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    python = peer("FUSIONBENCH_PYTHON")
    if python is None:
        raise SystemExit("FUSIONBENCH_PYTHON is not given: this compares with FusionBench (bench/README.md)")
    options.out.mkdir(parents=True, exist_ok=True)
    with scratch(options.out) as folder:
        base, *experts = _made(folder / "clip")
        run([python, "-m", "bench.fusionbench_methods", base.parent, folder / "theirs"], folder / "log")
        start, every = weights(base), [weights(path) for path in experts]
        found = [
            {
                "title": case.title,
                "theirs": case.theirs,
                **apart(start, load_file(folder / "theirs" / f"{name}.safetensors"), ours(case, start, every)),
            }
            for case, name in CASES
            if case.built
        ]
        version = (folder / "theirs" / "version").read_text()
    save("methods_fusionbench", options, {"version": version, "methods": found})


def _made(folder: Path) -> list[Path]:
    """The base and the experts, with a sidecar of each kind beside each expert, as mainstem's own trial makes them."""
    made = write(folder, EXPERTS, 0, SMALL.model())
    start = weights(made[0])
    for expert in made[1:]:
        tensors = {name: start[name] if name.endswith(UNMERGED) else x for name, x in weights(expert).items()}
        save_file(tensors, expert / "model.safetensors")
        for kind in ("fisher", "gram"):
            save_file(sidecar(kind, tensors), expert / f"{kind}.safetensors")
    matrices = [name for name, tensor in start.items() if tensor.ndim == 2]
    excluded = [name for name in matrices if any(fnmatchcase(name, glob) for glob in EXCLUDED)]
    (folder / "exclude.json").write_text(json.dumps(excluded))
    return made


if __name__ == "__main__":
    main()
