"""Merge a folder's experts with FusionBench's own functions, one method after the other.

Runs in FusionBench's environment, not in mainstem's (see README.md):

    python -m bench.fusionbench_methods FOLDER OUT

FOLDER as bench.clip_shapes writes it, and in each expert's folder fisher.safetensors and gram.safetensors. Every merged
model is written to OUT/NAME.safetensors. The functions take plain dicts of tensors; only OPCM wants a model pool, and
gets one. `exclude.json` in FOLDER lists the matrices that are no linear layers' weights.
"""

import argparse
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from fusion_bench.method.emr_merging.utils import emr_merge
from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
from fusion_bench.method.isotropic_merging.iso_utils import iso_c
from fusion_bench.method.magmax.magmax import _magmax_select
from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
from fusion_bench.method.simple_average import simple_average
from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
from fusion_bench.method.ties_merging.ties_merging_utils import (
    state_dict_to_vector,
    ties_merging,
    vector_to_state_dict,
)
from fusion_bench.method.wudi.wudi import wudi_merging
from safetensors.torch import load_file, save_file

from bench import fusionbench_opcm

Weights = dict[str, torch.Tensor]
DENSITY = 0.2
MAGMAX_SCALE = 0.5
OFF_DIAGONAL = 0.95


class Merges:
    """FusionBench's merged weights of one folder, by method."""

    def __init__(self, folder: Path) -> None:
        self.base = load_file(folder / "base" / "model.safetensors")
        self.folders = sorted(folder.glob("expert-*"))
        self.experts = [load_file(path / "model.safetensors") for path in self.folders]
        self.exclude = json.loads((folder / "exclude.json").read_text())
        self._base_folder = folder / "base"

    def simple_average(self) -> Weights:
        return dict(simple_average(self.experts))

    def ties(self, how: str) -> Weights:
        start = state_dict_to_vector(self.base)
        deltas = torch.stack([state_dict_to_vector(expert) - start for expert in self.experts])
        merged = start + ties_merging(deltas, reset_thresh=DENSITY, merge_func=how)
        return dict(vector_to_state_dict(merged, self.base))

    def fisher(self) -> Weights:
        brought = [load_file(path / "fisher.safetensors") for path in self.folders]
        return merging_with_fisher_weights(self._lists(), brought, torch.ones(len(self.experts)))

    def regmean(self) -> Weights:
        brought = [load_file(path / "gram.safetensors") for path in self.folders]
        excluded = [name.removesuffix(".weight") for name in self.exclude]
        grams = [{layer: gram for layer, gram in one.items() if layer not in excluded} for one in brought]
        return merging_with_regmean_weights(self._lists(), grams, reduce_non_diagonal_ratio=OFF_DIAGONAL)

    def magmax(self) -> Weights:
        return self._plus(_magmax_select(self._deltas()), MAGMAX_SCALE)

    def emr(self) -> Weights:
        return self._plus(emr_merge(self._deltas())[0])

    def iso_c(self) -> Weights:
        return self._plus(iso_c(self._deltas(), accelerator="cpu", exclude_keys=self.exclude))

    def wudi(self) -> Weights:
        with torch.enable_grad():
            return self._plus(wudi_merging(self._deltas(), accelerator="cpu", exclude_keys=self.exclude))

    def tsv_m(self) -> Weights:
        vector = compute_and_sum_svd_mem_reduction(self._deltas(), exclude_keys=self.exclude, accelerator="cpu")
        return self._plus(vector)

    def opcm(self) -> Weights:
        merged, _ = fusionbench_opcm.merge(self._base_folder, self.folders, 0.5, "float32")
        return {name: tensor for name, tensor in merged.state_dict().items() if name in self.base}

    def _deltas(self) -> list[Weights]:
        return [{name: expert[name] - start for name, start in self.base.items()} for expert in self.experts]

    def _lists(self) -> dict[str, list[torch.Tensor]]:
        return {name: [expert[name] for expert in self.experts] for name in self.base}

    def _plus(self, vector: Weights, scale: float = 1.0) -> Weights:
        return {name: start + scale * vector[name] for name, start in self.base.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    merges = Merges(options.folder)
    made: dict[str, Callable[[], Weights]] = {
        "simple_average": merges.simple_average,
        "ties_mean": lambda: merges.ties("mean"),
        "ties_sum": lambda: merges.ties("sum"),
        "ties_max": lambda: merges.ties("max"),
        "fisher": merges.fisher,
        "regmean": merges.regmean,
        "magmax": merges.magmax,
        "emr": merges.emr,
        "iso_c": merges.iso_c,
        "tsv_m": merges.tsv_m,
        "wudi": merges.wudi,
        "opcm": merges.opcm,
    }
    for name, merge in made.items():
        merged = merge()
        tensors = {key: tensor.detach().contiguous().clone() for key, tensor in merged.items()}
        save_file(tensors, options.out / f"{name}.safetensors")
    (options.out / "version").write_text(f"fusion-bench {version('fusion-bench')}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
