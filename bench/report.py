"""Writes docs/performance.md from the checked-in results.

    python -m bench.report

The first table has a row for every promise, measured or not; the sections after it give the numbers behind the ratios.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.details import NEVER, SECTIONS, machine, origin, text
from bench.record import RESULTS, ROOT

DOCUMENT = ROOT / "docs" / "performance.md"
Figures = Mapping[str, Any]
DISTURBED = 0.05
"""Where other programs took more of the machine's time than this, nothing is judged."""
FLAT = 0.1
"""A fitted line that moves by no more than this share of the mean, from end to end, counts as flat."""
LINEAR = 0.98
"""The R squared from which on a growth counts as linear."""

HEAD = (
    "For whoever asks how fast it is, in how much memory. `make bench` ([what it needs](../bench/README.md)) measures",
    "again, `python -m bench.report` writes this page. Each ratio is between two things of one run.",
)
LEGEND = (
    "Below stand commands and the share of time that other programs took; medians per arrival, peaks of resident",
    "memory (ranges and phases: `bench/results`). Unless told otherwise, on",
)


@dataclass(frozen=True)
class Outcome:
    """What a row says: the measured ratio in words, and "met", "missed", or why there is none."""

    measured: str
    verdict: str


@dataclass(frozen=True)
class Row:
    """One promise: the work, the target, the result file behind it, and how to read it."""

    work: str
    target: str
    source: str
    read: Callable[[Figures], Outcome]
    absent: str = "not measured yet"

    def line(self, results: Mapping[str, Any]) -> str:
        outcome = self._outcome(results.get(self.source))
        return f"| {self.work} | {self.target} | {outcome.measured} | {outcome.verdict} |"

    def _outcome(self, result: Mapping[str, Any] | None) -> Outcome:
        if result is None:
            return Outcome("-", self.absent)
        if (others := result["machine"]["others"]) > DISTURBED:
            return Outcome("-", f"measure again: other programs took {others:.0%} of the machine")
        return self.read(result["figures"])


def at_least(target: float, ours: float, theirs: float) -> Outcome:
    """How many times faster we are."""
    return _judged(f"{theirs / ours:.1f}x", theirs / ours >= target)


def backlog(figures: Figures) -> Outcome:
    peer = figures["fusionbench"]
    return at_least(3, figures["backlog"]["median"], peer["median"]) if peer else _alone("FUSIONBENCH_PYTHON")


def ready(figures: Figures) -> Outcome:
    peer = figures["fusionbench"]
    return at_least(8, figures["ready"]["median"], peer["median"]) if peer else _alone("FUSIONBENCH_PYTHON")


def memory(figures: Figures) -> Outcome:
    if not figures["fusionbench"]:
        return _alone("FUSIONBENCH_PYTHON")
    ours = max(figures["backlog"]["peak_bytes"], figures["ready"]["peak_bytes"])
    share = ours / figures["fusionbench"]["peak_bytes"]
    return _judged(f"1/{1 / share:.1f}", share <= 1 / 5)


def mean(figures: Figures) -> Outcome:
    ratio = figures["merge_median"] / figures["floor_median"]
    return _judged(f"{ratio:.2f}x", ratio <= 1.5)


def llama(method: str, target: float) -> Callable[[Figures], Outcome]:
    def read(figures: Figures) -> Outcome:
        ours, theirs = figures[method]["mainstem"], figures[method]["mergekit"]
        if not theirs:
            return _alone("MERGEKIT_PYTHON")
        if not ours:
            return Outcome(f"mergekit: {theirs['median']:.1f} s", "not built yet")
        return at_least(target, ours["median"], theirs["median"])

    return read


def adapters(figures: Figures) -> Outcome:
    shares = []
    for method in ("mean", "opcm"):
        alone, after = (figures[method][f"adapter{kind}"]["median"] for kind in ("", " after full"))
        full = figures[method]["full"]["median"]
        shares.append(f"`{method}` {alone / full:.2f}x, after a full one {after / full:.2f}x")
    return Outcome("; ".join(shares), "no target")


def download(figures: Figures) -> Outcome:
    bare, copy = (figures[f"{name}_median"] / figures["mainstem_median"] for name in ("bare", "cp"))
    return _judged(f"{bare:.2f}x; {copy:.2f}x of cp", bare >= 1)


def pulls(figures: Figures) -> Outcome:
    found = figures["parallel"]
    seen = f"{found['pulls']} pulls of {len(found['versions'])} versions, {found['wrong']} wrong"
    return _judged(seen, found["wrong"] == 0 and len(found["versions"]) > 1)


def growth_experts(figures: Figures) -> Outcome:
    time, space = figures["time"]["moves"], figures["memory"]["moves"]
    flat = time <= FLAT and space <= FLAT  # a fall is no growth
    return _judged(f"time {time:+.1%}, memory {space:+.1%} over the range", flat)


def growth_size(figures: Figures) -> Outcome:
    fit, space = figures["time"]["fit"], figures["memory"]["moves"]
    return _judged(f"memory {space:+.1%} over the range, time's R² {fit:.3f}", space <= FLAT and fit >= LINEAR)


def rollback(figures: Figures) -> Outcome:
    idle, merging = median(figures["rollback"]["idle"]), figures["rollback"]["merging"]
    return _judged(f"{idle:.2f} s, while experts are merged {merging:.2f} s", max(idle, merging) <= 1)


def gpu(figures: Figures) -> Outcome:
    """Prepare + update, and the update of what is prepared, against merge_linear_weights, which decomposes at every
    arrival, on the layers that both did. The target is the backlog's."""
    if figures["rehearsal"]:
        return Outcome("-", "not measured: a rehearsal on the CPU")
    layers, peers = (figures["steps"].get(name, {}).get("found", {}) for name in ("layers", "fusionbench"))
    pairs = [(layers.get(f"opcm {shape}"), peers.get(shape)) for shape in figures["shapes"]]
    both = [(layer, theirs) for layer, theirs in pairs if layer and theirs]
    if not both:
        return Outcome("-", "not compared: see its steps below")
    backlogs = [theirs / (layer["prepare"] + layer["update"]) for layer, theirs in both]
    readies = [theirs / layer["update"] for layer, theirs in both]
    floors = [(layer["update"] + layer["read"]) / max(layer["floor_bytes"], layer["floor_flops"]) for layer, _ in both]
    behind, ahead, above = (" and ".join(f"{ratio:.3g}" for ratio in all_) for all_ in (backlogs, readies, floors))
    return _judged(
        f"backlog {behind}x; ready {ahead}x, at {above} times their floor",
        min(backlogs) >= 20 and len(both) == len(figures["shapes"]),
    )


ROWS = (
    Row("OPCM, ViT-B/32 (87M, float32), backlog, against FusionBench", ">= 3x faster", "opcm", backlog),
    Row("the same, basis ready", ">= 8x faster", "opcm", ready),
    Row("its peak memory", "<= 1/5 of FusionBench's", "opcm", memory),
    Row("`mean` against one plain pass over the bytes", "<= 1.5x", "mean", mean),
    Row(
        "`task_arithmetic`, Llama-shaped (254M, bfloat16), 4th expert, against mergekit merging 4",
        ">= 3x faster",
        "llama",
        llama("task_arithmetic", 3),
    ),
    Row("the same, `ties`", ">= 10x faster", "llama", llama("ties", 10)),
    Row(
        "LoRA adapters of rank 16 against the same as full checkpoints",
        "to be shown",
        "adapters",
        adapters,
    ),
    Row(
        "a download, against bare uvicorn with FileResponse",
        ">= 1x as fast",
        "download",
        download,
    ),
    Row("32 pulls while versions change", "every byte right", "download", pulls),
    Row("growth with experts, 2 to 128", f"flat: within {FLAT:.0%}", "growth_experts", growth_experts),
    Row(
        "growth with layers, 4 to 32",
        f"memory flat: within {FLAT:.0%}; time linear: R² >= {LINEAR}",
        "growth_size",
        growth_size,
    ),
    Row("`mainstem rollback`, typed to visible over HTTP", "<= 1 s", "gate", rollback),
    Row(
        "OPCM on a GPU, layers 4096x4096 and 4096x14336, against FusionBench",
        ">= 20x faster",
        "gpu",
        gpu,
        "not measured: never run on a GPU",
    ),
)


def results(folder: Path = RESULTS) -> dict[str, Any]:
    """Every result file by its name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def document(found: Mapping[str, Any]) -> str:
    """The whole of docs/performance.md."""
    places = Counter(machine(found[name]) for name in SECTIONS if name in found)
    usual = places.most_common(1)[0][0] if places else ""
    lines = [
        "# Performance",
        "",
        *text(*HEAD),
        "",
        "| work | target | measured | |",
        "|---|---|---|---|",
        *(row.line(found) for row in ROWS),
        "",
        *([*text(*LEGEND, f"{usual}."), ""] if usual else []),
    ]
    for name, (title, section) in SECTIONS.items():
        if name in found:
            result = found[name]
            lines += [f"## {title}", "", *origin(result, usual), "", *section(result["figures"]), ""]
        elif name in NEVER:
            lines += [f"## {title}", "", *text(NEVER[name]), ""]
    return "\n".join(lines)


def main() -> None:
    DOCUMENT.write_text(document(results()))
    print(f"wrote {DOCUMENT.relative_to(ROOT)}")


def _judged(measured: str, met: bool) -> Outcome:
    return Outcome(measured, "met" if met else "**missed**")


def _alone(variable: str) -> Outcome:
    return Outcome("-", f"not compared: {variable} was not given")


if __name__ == "__main__":
    main()
