"""Merge a sequence of experts with FusionBench's own OPCM, and write down what it cost.

Runs in FusionBench's environment, not in mainstem's (see README.md):

    python -m bench.fusionbench_opcm --base DIR --out merged.safetensors --report figures.json EXPERT_DIR ...

Nothing of FusionBench is patched: its `CLIPVisionModelPool` loads the folders, its `OPCMForCLIP` (the single-process
class behind the published table) merges them in the order given, and the seconds are those of its own profiler. Its
evaluation, its checkpoints after each step and its shuffling are switched off; with them off the task pool is read
for one attribute only, so an empty one is handed in.
"""

import argparse
import json
import os
import platform
import resource
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the imports that read it: every model is a local folder

import lightning
import torch
from fusion_bench.method.opcm.opcm import OPCMForCLIP
from fusion_bench.modelpool import CLIPVisionModelPool
from safetensors.torch import save_file

PACKAGES = ("fusion-bench", "torch", "transformers", "lightning", "numpy")


def peak_rss_mb() -> float:
    """Highest resident set of this process so far, in MB (1e6 bytes). Linux: ru_maxrss is in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def model_pool(base: Path, experts: list[Path], dtype: str) -> CLIPVisionModelPool:
    """FusionBench's pool over local folders; the base goes by the name that FusionBench reserves for it."""
    folders = {"_pretrained_": base} | {f"expert-{index:03d}": folder for index, folder in enumerate(experts)}
    return CLIPVisionModelPool(
        {
            name: {
                "_target_": "transformers.CLIPVisionModel.from_pretrained",
                "pretrained_model_name_or_path": str(folder.resolve()),
                "torch_dtype": dtype,
            }
            for name, folder in folders.items()
        }
    )


def merge(base: Path, experts: list[Path], alpha: float, dtype: str) -> tuple[torch.nn.Module, dict[str, object]]:
    """The merged model and the figures: seconds per load and per merge, peak resident memory, lambda.

    The first expert becomes the merged model as it is, so there is one merge less than there are experts.
    """
    algorithm = OPCMForCLIP(alpha=alpha, shuffle_order=False, save_on_every_step=False, evaluate_on_every_step=False)
    algorithm.fabric = lightning.Fabric(accelerator="cpu", devices=1)
    algorithm._program = SimpleNamespace(taskpool=SimpleNamespace(_test_datasets={}))
    rss_before = peak_rss_mb()
    started, cpu_before = time.perf_counter(), time.process_time()
    merged = algorithm.run(model_pool(base, experts, dtype))
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu_before
    seconds = algorithm.profiler.recorded_durations
    merges, loads = seconds["merging model"], seconds["loading model"]
    figures: dict[str, object] = {
        "alpha": alpha,
        "dtype": dtype,
        "experts": len(experts),
        "seconds_merge": merges,
        "seconds_merge_mean": sum(merges) / len(merges) if merges else None,
        "seconds_load": loads,
        "seconds_load_mean": sum(loads) / len(loads),
        "seconds_wall": wall,
        "seconds_cpu": cpu,
        "load_average_1min": os.getloadavg()[0],
        "peak_rss_mb": peak_rss_mb(),
        "peak_rss_mb_before_loading": rss_before,
        "lambda": float(algorithm.previous_lambda_t),
        "mean_task_vector_norm": float(algorithm.avg_task_vector_norm),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    return merged, figures


def main() -> None:
    """Merge, save the weights under the base's tensor names, and write and print the figures."""
    parser = argparse.ArgumentParser(description="Merge experts with FusionBench's OPCM and measure it.")
    parser.add_argument("experts", type=Path, nargs="+", help="Hugging Face folders, in the order to merge")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="merged weights (.safetensors)")
    parser.add_argument("--report", type=Path, required=True, help="figures (.json)")
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="float64 checks the formula")
    options = parser.parse_args()
    merged, figures = merge(options.base, options.experts, options.alpha, options.dtype)
    # The vision tower ties no weights; contiguous copies because a merged matrix may be a transposed view.
    weights = {name: tensor.detach().contiguous() for name, tensor in merged.state_dict().items()}
    save_file(weights, options.out, metadata={"format": "pt"})
    text = json.dumps(figures, indent=2)
    options.report.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
