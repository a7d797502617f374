"""A LoRA adapter against the same expert as a full checkpoint, dropped in turns into one daemon.

    python -m bench.adapters FOLDER --rank 16 --pairs 3

FOLDER/base as bench.llama_shapes writes it. The adapters are the real peft's, of every linear layer, with random
factors; the full checkpoints are what peft merges of other ones. Seconds from the drop to the version being visible
over HTTP, for a method that adds up and for OPCM with what it prepares ready; medians. The first pair is a warm-up.
"""

import time
from pathlib import Path
from statistics import median

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from bench.live import Daemon, drop, make_home, per_expert, running, scratch, warm
from bench.record import checkpoints, parser, save

METHODS = ("mean", "opcm")
SPREAD = 0.002  # standard deviation of B's entries: a task vector about as long as a fine-tune's


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("checkpoints", type=Path)
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--pairs", type=int, default=3, help="after the warm-up")
    options = made.parse_args()
    base, _ = checkpoints(options.checkpoints, 0)
    with scratch(base) as folder:
        both = [
            (train(base, folder, 2 * pair, options.rank), merged(base, folder, 2 * pair + 1, options.rank))
            for pair in range(options.pairs + 1)
        ]
        warm([base, *(path for pair in both for path in pair)])
        figures: dict[str, object] = {
            "model_bytes": _size(base),
            "adapter_bytes": _size(both[0][0]),
            "rank": options.rank,
            **{method: measured(base, both, method) for method in METHODS},
        }
    save("adapters", options, figures)


def train(base: Path, folder: Path, seed: int, rank: int) -> Path:
    """An adapter with random factors, as peft saves it."""
    path = folder / f"adapter-{seed:03d}"
    _adapted(base, seed, rank).save_pretrained(path)
    return path


def merged(base: Path, folder: Path, seed: int, rank: int) -> Path:
    """Such an adapter merged into the base by peft, as transformers saves it."""
    path = folder / f"full-{seed:03d}"
    _adapted(base, seed, rank).merge_and_unload().save_pretrained(path)
    return path


def measured(base: Path, both: list[tuple[Path, Path]], method: str) -> dict[str, object]:
    """Seconds and phases of either kind, in turns, by one daemon."""
    kinds = ("adapter", "full")
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    phases: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with scratch(base) as folder:
        home = make_home(folder, base, method)
        with running(home) as daemon:
            number = 0
            for pair in both:
                for kind, path in zip(kinds, pair, strict=True):
                    number += 1
                    took, spent = arrival(daemon, path, number)
                    if pair is not both[0]:
                        seconds[kind].append(took)
                        phases[kind].append(spent)
            peak = daemon.peak()
    return {
        "peak_bytes": peak,
        **{
            kind: {
                "seconds": seconds[kind],
                "median": median(seconds[kind]),
                "phases": {name: median(spent[name] for spent in phases[kind]) for name in phases[kind][0]},
            }
            for kind in kinds
        },
    }


def arrival(daemon: Daemon, expert: Path, number: int) -> tuple[float, dict[str, float]]:
    """Drops one expert on an idle daemon: seconds until version `number` is visible, and what its phases took."""
    daemon.wait_prepared()
    before = daemon.spent()
    started = time.monotonic()
    drop(daemon.home, expert)
    daemon.wait_visible(number)
    took = time.monotonic() - started
    return took, per_expert(before, daemon.wait_merged(number))


def _adapted(base: Path, seed: int, rank: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=SPREAD)
    return adapted


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
