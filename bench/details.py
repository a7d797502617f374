"""The sections of docs/performance.md: the numbers behind each ratio, as lines of Markdown."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from textwrap import wrap
from typing import Any

Figures = Mapping[str, Any]


def text(*parts: str) -> list[str]:
    """A paragraph as lines of at most 120 characters."""
    return wrap(" ".join(parts), 120, break_long_words=False, break_on_hyphens=False)


def machine(result: Mapping[str, Any]) -> str:
    """Where and when a result came about."""
    facts = result["machine"]
    gpu = f"{facts['gpu']}, " if "gpu" in facts else ""
    where = f"{gpu}{facts['cpu']}, {facts['cores']} cores, {facts['memory_bytes'] / 1e9:.0f} GB, {facts['system']}"
    return f"{where}; torch {facts['torch']}, Python {facts['python']}, {facts['date']}"


def origin(result: Mapping[str, Any], usual: str) -> list[str]:
    """By which command a result came about, how quiet it was meanwhile, and where, if that is not the usual place."""
    where = machine(result)
    elsewhere = "" if where == usual else f", on {where}"
    return text(f"`{result['command']}`; others {result['machine']['others']:.1%}{elsewhere}.")


def opcm(figures: Figures) -> list[str]:
    ours, ready, peer = figures["backlog"], figures["ready"], figures["fusionbench"]
    rows = [
        ("mainstem, backlog: commit to commit", ours["median"], ours["peak_bytes"]),
        ("mainstem, ready: drop to visible", ready["median"], ready["peak_bytes"]),
    ]
    if peer:
        name = f"FusionBench {peer['versions']['fusion-bench']}, {peer['threads']} threads: merge + load"
        rows.append((name, peer["median"], peer["peak_bytes"]))
    preparing = sum(ready["preparing"]) / len(ready["preparing"])
    return [
        *text(
            f"A model of {_size(figures['model_bytes'])}. mainstem's times include hashing and syncing model and",
            f"state; FusionBench's no saving. Getting ready took {preparing:.1f} s of idle time per expert.",
        ),
        "",
        *table(
            ("per expert", "s", "peak"),
            ((name, _short(middle), _size(peak)) for name, middle, peak in rows),
        ),
    ]


def mean(figures: Figures) -> list[str]:
    rows = [
        ("the floor", figures["floor_median"]),
        ("the daemon: taken to merged", figures["merge_median"]),
        ("the daemon: drop to visible", figures["arrival_median"]),
    ]
    return [
        *text(
            f"A model of {_size(figures['model_bytes'])}, a state of {_size(figures['state_bytes'])}. The floor: plain",
            "file calls that read base, expert and state, write and sync state and model, and hash what is new.",
            f"The daemon's peak: {_size(figures['peak_bytes'])}.",
        ),
        "",
        *table(("", "s"), ((name, _short(middle)) for name, middle in rows)),
    ]


def llama(figures: Figures) -> list[str]:
    rows = []
    for method in ("task_arithmetic", "ties"):
        ours, theirs = figures[method]["mainstem"], figures[method]["mergekit"]
        if ours:
            row = (_short(ours["median"]), _size(ours["peak_bytes"]))
            rows.append((f"{method}: mainstem, the 4th expert", *row))
        if theirs:
            start = f"all four, of it {theirs['start']:.1f} s starting"
            row = (_short(theirs["median"]), _size(theirs["peak_bytes"]))
            rows.append((f"{method}: mergekit {theirs['version']}, {start}", *row))
    return [
        *text(
            f"Checkpoints of {_size(figures['model_bytes'])}. mainstem: drop to visible. mergekit: its whole command,",
            "which syncs and hashes nothing; its start, measured on a tiny model, is what a daemon pays once.",
        ),
        "",
        *table(("", "s", "peak"), rows),
    ]


def adapters(figures: Figures) -> list[str]:
    rows = []
    for method in ("mean", "opcm"):
        for kind in ("adapter", "adapter after full", "full"):
            found = figures[method][kind]
            rows.append((f"{method}: {kind}", _short(found["median"]), _size(found["peak_bytes"])))
    return [
        *text(
            f"A model of {_size(figures['model_bytes'])}; adapters of rank {figures['rank']} on every linear layer,",
            f"{_size(figures['adapter_bytes'])} each. Drop to visible, basis ready; after full: behind a full one.",
        ),
        "",
        *table(("", "s", "peak"), rows),
    ]


def download(figures: Figures) -> list[str]:
    who = {"mainstem": "mainstem serve", "bare": "bare uvicorn, FileResponse", "cp": "cp"}
    rows = [
        (
            name,
            f"{figures['model_bytes'] / 1e6 / figures[f'{key}_median']:.0f}",
            _short(figures[f"{key}_median"]),
        )
        for key, name in who.items()
    ]
    many = figures["parallel"]
    return [
        *text(
            f"One file of {_size(figures['model_bytes'])}, from the page cache to another file, nothing synced.",
        ),
        "",
        *table(("", "MB/s", "s"), rows),
        "",
        *text(
            f"{many['clients']} clients: {_size(many['bytes'])} in {_short(many['seconds'])} s, {many['gone']} times",
            f"the version was gone; the daemon's peak: {_size(many['peak_bytes'])}.",
        ),
    ]


def growth_experts(figures: Figures) -> list[str]:
    rows = (
        (f"{mark['since']} to {mark['experts']}", _short(mark["seconds"]), _size(mark["peak_bytes"]))
        for mark in figures["marks"]
    )
    return [
        *text(
            f"A model of {_size(figures['model_bytes'])}, OPCM, a backlog; the daemon's own time for one arrival.",
        ),
        "",
        *table(("arrivals", "s", "peak"), rows),
    ]


def growth_size(figures: Figures) -> list[str]:
    rows = (
        (
            f"{size['layers']}",
            _size(size["model_bytes"]),
            _short(size["seconds"]),
            f"{size['seconds'] / size['layers'] * 1e3:.1f}",
            _size(size["peak_bytes"]),
        )
        for size in figures["sizes"]
    )
    return [
        *table(("layers", "model", "s", "ms per layer", "peak"), rows),
    ]


def gate(figures: Figures) -> list[str]:
    middle, beside, turned = figures["median"], figures["bytes"], figures["rollback"]
    return [
        *text(
            f"A model of {_size(figures['model_bytes'])}, `mean`; drop to visible, and the bytes of a version beside",
            "its weights. The command only prints a score. From `mainstem rollback` typed to another version live over",
            f"HTTP: {median(turned['idle']):.2f} s, while experts are merged {turned['merging']:.2f} s.",
        ),
        "",
        *table(
            ("an arrival", "s", "bytes"),
            (
                ("without `[evaluate]`", _short(middle["without"]), str(beside["without"])),
                ("a trivial command", _short(middle["trivial"]), str(beside["trivial"])),
            ),
        ),
    ]


def restart(figures: Figures) -> list[str]:
    middle = figures["median"]
    return [
        *text(
            f"A model of {_size(figures['model_bytes'])}, `opcm`. Ready is what systemd is told; after a kill the live",
            "version is hashed. An expert that is being merged stays in the inbox.",
        ),
        "",
        *table(
            ("", "s"),
            (
                ("from start to ready", _short(middle["clean start"])),
                ("the same, after SIGKILL", _short(middle["unclean start"])),
                ("from SIGTERM to the end, idle", _short(middle["idle stop"])),
                ("the same, amid a merge", _short(middle["merging stop"])),
            ),
        ),
    ]


def scrape(figures: Figures) -> list[str]:
    rows = (
        (str(one["heads"]), f"{one['seconds'] * 1e3:.1f}", f"{one['bytes'] / 1e3:.0f} kB", str(one["series"]))
        for one in figures["scrapes"]
    )
    return [
        *text("One scrape of `/metrics`, uncompressed, with 32 tasks of each head; the median of 50."),
        "",
        *table(("heads", "ms", "size", "series"), rows),
    ]


def webhooks(figures: Figures) -> list[str]:
    def row(name: str, suffix: str) -> tuple[str, ...]:
        measured = [figures[f"event_{what}{suffix}"] for what in ("cpu_seconds", "seconds", "seconds_worst")]
        return name, *(f"{1e3 * value:.3g}" for value in measured)

    soon, worst = (f"{1e3 * figures[what]:.3g} ms" for what in ("latency_seconds", "latency_worst_seconds"))
    return [
        *text(
            f"From a commit's return to the request at a receiver here: {soon}, at worst {worst}. Then",
            f"{figures['events']} events for an endpoint that refuses every connection: {figures['rows']} rows and",
            f"{_size(figures['bytes'])} stay. An event comes with each arrival and costs whoever records it:",
        ),
        "",
        *table(("", "CPU ms", "ms", "at worst"), (row("nobody is told", "_without"), row("a dead endpoint", ""))),
    ]


def hub(figures: Figures) -> list[str]:
    loads = ("cold", "again", "new_version")
    names = ("`from_pretrained`, an empty cache", "the same again", "a version that differs in one layer of four")
    rows = [
        (name, _short(figures[x]["seconds"]), _size(figures[x]["bytes"])) for name, x in zip(names, loads, strict=True)
    ]
    copies = {"hf": "`hf download`", "pull": "`mainstem pull`", "cp": "`cp -r`"}
    whole = _size(figures["model_bytes"])
    rows += [(name, _short(figures[f"{x}_median"]), whole) for x, name in copies.items()]
    return [
        *text(
            f"A Llama of {whole}, read by the clients of the Hub on the same machine, from the page cache. A load is",
            "timed by itself, a copy with the start of its process.",
        ),
        "",
        *table(("", "s", "came"), rows),
    ]


def methods_cost(figures: Figures) -> list[str]:
    rows = (
        (
            f"`{one['method']}`",
            _short(one["arrival"]),
            _short(one["read_out"]),
            f"{one['state_bytes']:.3g}",
            f"{one['error']:.1e}",
        )
        for one in figures["methods"]
    )
    return [
        *text(
            "Two blocks of a transformer. Bytes are those of the state for each parameter; the error is that of the",
            "merged task vector against the formula in float64.",
        ),
        "",
        *table(("method", "s an arrival", "s a read-out", "bytes a parameter", "error"), rows),
    ]


def gpu(figures: Figures) -> list[str]:
    """Every step of bench/gpu.sh: how it ended, and the figures of those that found any."""
    steps: Mapping[str, Mapping[str, Any]] = figures["steps"]
    found = {name: step["found"] for name, step in steps.items()}
    lines = []
    for name, step in steps.items():
        words = GPU_SUMS[name](step["found"])
        if words or step["status"] != "done":
            ended = "" if step["status"] == "done" else f" {_ended(step)}"
            lines.append(f"- {name}, {_short(step['seconds'])} s:{ended} {words}".rstrip())
    if layers := found.get("layers"):
        lines += ["", *_gpu_layers(figures["shapes"], layers, found.get("fusionbench", {}))]
    if eigh := found.get("eigh"):
        each = ", ".join(f"{name} {taken * 1e3:.1f}" for name, taken in eigh.items() if MANY not in name)
        lines += ["", *text(f"Milliseconds of an eigendecomposition on the device: {each}.")]
    return lines


def _gpu_layers(shapes: Sequence[str], layers: Figures, peers: Figures) -> list[str]:
    def row(name: str, shape: str) -> list[str]:
        layer, peer = layers[f"{name} {shape}"], peers.get(shape) if name == "opcm" else None
        times = (layer["prepare"] + layer["update"], layer["update"], layer["read"])
        floor = max(layer["floor_bytes"], layer["floor_flops"])
        ms = [f"{value * 1e3:.2f}" for value in (*times, floor)]
        return [f"`{name}` {shape}", *ms, f"{peer * 1e3:.0f}" if peer else "-"]

    rows = [row(name, shape) for shape in shapes for name in GPU_METHODS if f"{name} {shape}" in layers]
    return [
        *text(
            "Milliseconds per layer in bfloat16. Backlog: prepare and update; ready: update; floor: of update and",
            "read-out, by measured bandwidth and rate.",
        ),
        "",
        *table(("layer", "backlog", "ready", "read-out", "floor", "merge_linear_weights"), rows),
    ]


def _ended(step: Figures) -> str:
    why = step["why"].strip().splitlines()
    return step["status"] + (f": {why[-1][:120].replace('|', '/')}" if why else "")


def _good(found: Figures) -> str:
    judged = {name: one for name, one in found.items() if isinstance(one, Mapping)}
    bad = [name for name, one in judged.items() if not one["good"]]
    worst = max((one["apart"] for one in judged.values() if "apart" in one), default=0.0)
    said = f"{len(judged) - len(bad)} of {len(judged)} methods within 1e-5 and the same bits again"
    return f"{said}, {worst:.1e} at most" + (f"; not {', '.join(bad)}" if bad else "")


MANY = " at a time"
"""In the names of decompositions that were measured several at a time: those stay in the results."""
GPU_METHODS = ("opcm", "iso_c")
"""Those whose times are told: what is elementwise stays on the CPU."""
GPU_SUMS: dict[str, Callable[[Figures], str]] = {
    "tests": lambda found: ", ".join(f"{count} {word}" for word, count in found.items() if word != "names"),
    "exact": _good,
    **dict.fromkeys(("layers", "eigh", "daemon", "memory", "ways", "fusionbench"), lambda _: ""),
    "sanitizer": lambda found: f"{found['errors']} errors" if found.get("errors") is not None else "-",
}
"""What a step found, in words; nothing where tables tell it, or the results alone."""
NEVER = {
    "gpu": "Never run: no GPU was at hand. `bench/gpu.sh` is ready for one, and rehearsed on the CPU by the tests."
}
"""What a section says until its result exists."""

SECTIONS: dict[str, tuple[str, Callable[[Figures], list[str]]]] = {
    "opcm": ("OPCM beside FusionBench", opcm),
    "mean": ("`mean` beside a plain pass", mean),
    "llama": ("Elementwise methods beside mergekit", llama),
    "adapters": ("Adapters beside full checkpoints", adapters),
    "download": ("Downloads", download),
    "growth_experts": ("Growth with the experts before", growth_experts),
    "growth_size": ("Growth with the model", growth_size),
    "gate": ("The gate, and back", gate),
    "restart": ("Start and stop", restart),
    "scrape": ("A scrape", scrape),
    "webhooks": ("Webhooks", webhooks),
    "hub": ("The Hub's clients", hub),
    "methods_cost": ("Spectral methods", methods_cost),
    "gpu": ("On a GPU", gpu),
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [_row(head), "|" + "---|" * len(head), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _short(seconds: float) -> str:
    return f"{seconds:.3g}"


def _size(count: float) -> str:
    return f"{count / 1e6:.3g} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
