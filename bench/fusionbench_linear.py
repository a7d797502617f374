"""Seconds of FusionBench's own OPCM for single layers that lie on a device.

Runs in FusionBench's environment (see README.md); prints a JSON object for each shape, as soon as it is known:

    python -m bench.fusionbench_linear --device cuda 4096x4096 4096x14336

Each layer is merged once after a small one to warm up: a decomposition of this size takes long enough.
"""

import argparse
import json
import time
from importlib.metadata import version

import torch
from fusion_bench.method.opcm.opcm import OPCMForCLIP

from bench.shapes import INIT_STD, STRENGTH, direction


def merge_seconds(shape: tuple[int, int], device: torch.device) -> float:
    """One call of merge_linear_weights."""
    size = torch.Size(shape)
    base = INIT_STD * direction(size, 0, "base", "layer").to(device)
    merged, expert = (
        base + INIT_STD * STRENGTH[1] * direction(size, 0, who, "layer").to(device) for who in ("merged", "delta")
    )
    algorithm = OPCMForCLIP(alpha=0.5, shuffle_order=False, save_on_every_step=False)
    algorithm.previous_lambda_t = algorithm.lambda_t = 1
    _wait(device)
    started = time.perf_counter()
    algorithm.merge_linear_weights(merged, base, expert, "layer.weight", 0.5, accelerator=str(device))
    _wait(device)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", metavar="ROWSxCOLUMNS")
    parser.add_argument("--device", type=torch.device, default="cuda")
    options = parser.parse_args()
    merge_seconds((64, 64), options.device)
    for text in options.shapes:
        rows, columns = map(int, text.split("x"))
        taken = merge_seconds((rows, columns), options.device)
        print(json.dumps({text: taken, "version": version("fusion-bench")}), flush=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    with torch.no_grad():
        main()
