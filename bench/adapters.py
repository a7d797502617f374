"""LoRA adapters against the same experts as full checkpoints, dropped into daemons of their own.

    python -m bench.adapters FOLDER --rank 16 --pairs 3

FOLDER/base as bench.llama_shapes writes it. The adapters are the real peft's, of every linear layer, with random
factors; the full checkpoints are what peft merges of them. Seconds from the drop to the version being visible over
HTTP, for a method that adds up and for OPCM with what it prepares ready; medians. One daemon sees adapters alone, one
full checkpoints alone, and one adapters after a full checkpoint: for OPCM it matters what was merged before. The first
expert of each is a warm-up.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from bench.live import Daemon, drop, make_home, per_expert, running, scratch, warm
from bench.record import checkpoints, parser, save

METHODS = ("mean", "opcm")
SPREAD = 0.002  # standard deviation of B's entries: a task vector about as long as a fine-tune's


@dataclass(frozen=True)
class Arrival:
    """Seconds from the drop to the version being visible, and what its phases took, summed over threads."""

    seconds: float
    phases: dict[str, float]


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("checkpoints", type=Path)
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--pairs", type=int, default=3, help="after the warm-up")
    options = made.parse_args()
    base, _ = checkpoints(options.checkpoints, 0)
    with scratch(base) as folder:
        both = [trained(base, folder, seed, options.rank) for seed in range(options.pairs + 1)]
        warm([base, *(path for pair in both for path in pair)])
        figures: dict[str, object] = {
            "model_bytes": _size(base),
            "adapter_bytes": _size(both[0][0]),
            "rank": options.rank,
            **{method: measured(base, both, method) for method in METHODS},
        }
    save("adapters", options, figures)


def trained(base: Path, folder: Path, seed: int, rank: int) -> tuple[Path, Path]:
    """An adapter with random factors as peft saves it, and merged into the base as transformers saves that."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=SPREAD)
    adapter, full = folder / f"adapter-{seed:03d}", folder / f"full-{seed:03d}"
    adapted.save_pretrained(adapter)
    adapted.merge_and_unload().save_pretrained(full)
    return adapter, full


def measured(base: Path, both: Sequence[tuple[Path, Path]], method: str) -> dict[str, object]:
    """Seconds, phases and peak memory of each kind, one after the other: three homes would not fit the page cache."""
    adapters, full = zip(*both, strict=True)
    kinds = {"adapter": adapters, "full": full, "adapter after full": (full[0], *adapters[1:])}
    return {kind: _fed(base, experts, method) for kind, experts in kinds.items()}


def _fed(base: Path, experts: Sequence[Path], method: str) -> dict[str, object]:
    with scratch(base) as folder, running(make_home(folder, base, method)) as daemon:
        arrivals = [arrival(daemon, expert, number) for number, expert in enumerate(experts, start=1)][1:]
        return {
            "seconds": [one.seconds for one in arrivals],
            "median": median(one.seconds for one in arrivals),
            "phases": {name: median(one.phases[name] for one in arrivals) for name in arrivals[0].phases},
            "peak_bytes": daemon.peak(),
        }


def arrival(daemon: Daemon, expert: Path, number: int) -> Arrival:
    """Drops one expert on an idle daemon that makes version `number` of it."""
    daemon.wait_prepared()
    before = daemon.spent()
    started = time.monotonic()
    drop(daemon.home, expert)
    daemon.wait_visible(number)
    took = time.monotonic() - started
    return Arrival(took, per_expert(before, daemon.wait_merged(number)))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
