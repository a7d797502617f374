"""The fourth expert of a small Llama in bfloat16, against mergekit merging all four again.

    MERGEKIT_PYTHON=mk/bin/python python -m bench.llama FOLDER --repeats 3

FOLDER as bench.llama_shapes writes it. mainstem: a daemon that holds three experts and has prepared for a fourth;
seconds from the drop to the version being visible over HTTP. mergekit: the command `mergekit-yaml` on the base and all
four, which is what a person without a daemon runs again; how much of it is Python starting and importing is found out
on a tiny model and said beside it. Each is done REPEATS times, from nothing; medians.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from bench.live import drop, make_home, per_expert, running, scratch, warm
from bench.llama_shapes import SMALL
from bench.record import Finished, checkpoints, parser, peer, run, save
from bench.shapes import write
from projector.methods import methods

EXPERTS = 4
WEIGHT = 0.3
CONFIGS: dict[str, dict[str, object]] = {
    "task_arithmetic": {"merge_method": "task_arithmetic", "parameters": {"weight": WEIGHT}},
    "ties": {"merge_method": "ties", "parameters": {"weight": WEIGHT, "density": 0.2}},
}


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("checkpoints", type=Path)
    made.add_argument("--repeats", type=int, default=3)
    options = made.parse_args()
    base, experts = checkpoints(options.checkpoints, EXPERTS)
    warm([base, *experts])
    figures: dict[str, object] = {"model_bytes": (base / "model.safetensors").stat().st_size}
    for method in CONFIGS:
        ours = mainstem(base, experts, method, options.repeats) if method in methods() else None
        figures[method] = {"mainstem": ours, "mergekit": mergekit(base, experts, method, options.repeats)}
    save("llama", options, figures)


def mainstem(base: Path, experts: Sequence[Path], method: str, repeats: int) -> dict[str, object]:
    """Seconds from the drop of the last expert to its version, its phases, and the daemon's peak memory."""
    seconds, phases, peaks = [], [], []
    for _ in range(repeats):
        with scratch(base) as folder:
            home = make_home(folder, base, method)
            with running(home) as daemon:
                for number, expert in enumerate(experts[:-1], start=1):
                    drop(home, expert)
                    before = daemon.wait_merged(number)
                daemon.wait_prepared()
                started = time.monotonic()
                drop(home, experts[-1])
                daemon.wait_visible(len(experts))
                seconds.append(time.monotonic() - started)
                phases.append(per_expert(before, daemon.wait_merged(len(experts))))
                daemon.download()
                peaks.append(daemon.peak())
    return {
        "seconds": seconds,
        "median": median(seconds),
        "phases": {phase: median(spent[phase] for spent in phases) for phase in phases[0]},
        "peak_bytes": max(peaks),
    }


def mergekit(base: Path, experts: Sequence[Path], method: str, repeats: int) -> dict[str, object] | None:
    """The same for mergekit; None where its python was not given."""
    python = peer("MERGEKIT_PYTHON")
    if python is None:
        return None
    with scratch(base) as folder:
        tiny = write(folder / "tiny", len(experts), 0, SMALL.model())
        starts = [_merge(python, tiny[0], tiny[1:], method, folder).seconds for _ in range(repeats)]
        merges = [_merge(python, base, experts, method, folder) for _ in range(repeats)]
    seconds = [merge.seconds for merge in merges]
    return {
        "seconds": seconds,
        "median": median(seconds),
        "start": median(starts),
        "peak_bytes": max(merge.peak for merge in merges),
        "version": _version(python),
    }


def _merge(python: Path, base: Path, experts: Sequence[Path], method: str, folder: Path) -> Finished:
    """One merge of all experts; what it wrote is removed again."""
    config, out = folder / "config.yaml", folder / "merged"
    given = {"models": [{"model": str(path)} for path in experts], "base_model": str(base), "dtype": "bfloat16"}
    config.write_text(json.dumps({**CONFIGS[method], **given}))  # JSON is YAML
    command: list[str | Path] = [python.parent / "mergekit-yaml", config, out, "--no-copy-tokenizer", "--quiet"]
    finished = run(command, folder / "log", HF_HUB_OFFLINE="1")
    if not list(out.glob("*.safetensors")):
        raise SystemExit(f"mergekit wrote nothing:\n{(folder / 'log').read_text()[-2000:]}")
    shutil.rmtree(out)
    return finished


def _version(python: Path) -> str:
    asked = "import importlib.metadata as m; print(m.version('mergekit'))"
    return subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
