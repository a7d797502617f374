"""The Hub's own clients, read: what `from_pretrained` costs, cold and after a new version, and `hf download`.

    python -m bench.hub FOLDER

Made under FOLDER, and removed: a Llama of 336 MB with random weights, and two experts that differ in one layer of four.
A process per load, as a consumer is one; its seconds are those of `from_pretrained`, its bytes those that came into an
empty cache, or into that of the version before. The download, `mainstem pull` and `cp -r` copy one version each, from
the page cache to the same file system, and take turns: seconds of the whole process.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.live import drop, make_home, running, scratch
from bench.record import ROOT, parser, run, save
from daemon.layout import Home

SHARD = "60MB"
LOAD = """
import json, os, pathlib, time
from transformers import AutoModelForCausalLM, LlamaForCausalLM
began = time.perf_counter()
AutoModelForCausalLM.from_pretrained("mainstem/main")
seconds = time.perf_counter() - began
blobs = pathlib.Path(os.environ["HF_HOME"], "hub", "models--mainstem--main", "blobs")
print(json.dumps({"seconds": seconds, "bytes": sum(path.stat().st_size for path in blobs.iterdir())}))
"""


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("folder", type=Path)
    made.add_argument("--hidden", type=int, default=1024)
    made.add_argument("--repeats", type=int, default=3)
    options = made.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with scratch(options.folder / "base") as folder:
        base, experts = write(folder, options.hidden)
        home = make_home(folder, base, "mean")
        with home.config.open("a") as settings:
            settings.write(f'\n[publish]\nshard_bytes = "{SHARD}"\n')
        figures = measured(home, folder, experts, options.repeats)
    save("hub", options, figures)


def write(folder: Path, hidden: int) -> tuple[Path, list[Path]]:
    """The base, and two experts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 11 * hidden // 4, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32 * hidden, tie_word_embeddings=True, **sizes))
    model.save_pretrained(folder / "base")
    weights = load_file(folder / "base" / "model.safetensors")
    experts = []
    tuned = moved(weights, 0.001)
    for n, more in enumerate(({}, moved({name: weights[name] for name in weights if ".layers.2." in name}, 0.002))):
        experts.append(folder / f"expert-{n}")
        shutil.copytree(folder / "base", experts[n])
        save_file({**tuned, **more}, experts[n] / "model.safetensors", metadata={"format": "pt"})
    return folder / "base", experts


def moved(weights: dict[str, Tensor], by: float) -> dict[str, Tensor]:
    return {name: tensor + by * torch.randn_like(tensor).sign() for name, tensor in weights.items()}


def measured(home: Home, folder: Path, experts: list[Path], repeats: int) -> dict[str, Any]:
    """Loads of version 1 and of version 2, and downloads of that."""
    with running(home) as daemon:
        drop(home, experts[0])
        daemon.wait_visible(1)
        loads = {"cold": load(daemon.live.url, folder / "hf"), "again": load(daemon.live.url, folder / "hf")}
        drop(home, experts[1])
        daemon.wait_visible(2)
        loads["new_version"] = load(daemon.live.url, folder / "hf")
        published = home.version("main", 2)
        size = sum(path.stat().st_size for path in published.iterdir())
        seconds = downloads(daemon.live.url, published, folder, repeats)
    held = 0
    for one in loads.values():
        one["bytes"], held = one["bytes"] - held, one["bytes"]
    return {"model_bytes": size, **loads, **seconds}


def load(url: str, cache: Path) -> dict[str, Any]:
    """One `from_pretrained`, and all that is in its cache then."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD], env=environment(url, cache), stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def downloads(url: str, published: Path, folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds of each copy, by who made it, and their medians."""
    target, cache = folder / "copy", folder / "fresh"
    hf = [sys.executable, "-m", "huggingface_hub.cli.hf", "download", "mainstem/main", "--local-dir", target]
    makers: dict[str, list[str | Path]] = {
        "hf": hf,
        "pull": [sys.executable, "-m", "daemon", "pull", url, target],
        "cp": ["cp", "-r", published, target],
    }
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for turn in range(repeats + 1):
        for name, command in makers.items():
            finished = run(command, folder / "log", **environment(url, cache))
            if turn:  # the first is a warm-up
                seconds[name].append(finished.seconds)
            for path in (target, cache):
                shutil.rmtree(path, ignore_errors=True)
    return {**seconds, **{f"{name}_median": median(found) for name, found in seconds.items()}}


def environment(url: str, cache: Path) -> dict[str, str]:
    ours = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return {
        **ours,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }


if __name__ == "__main__":
    main()
