"""Writes docs/quality.md and its pictures from bench/results/quality.json.

    python -m bench.quality.report

Figures in sentences are worked out here too, so that the page cannot say what the results do not. What was not run is
named as that.
"""

import json
from collections.abc import Mapping
from typing import Any

from bench.details import table
from bench.quality import findings, pictures
from bench.quality.tables import item, percent, points, spread
from bench.record import RESULTS, ROOT
from projector.text import plain, size

DOCUMENT = ROOT / "docs" / "quality.md"
SOURCE = RESULTS / "quality.json"
Part = Mapping[str, Any]

HEAD = (
    "For whoever asks which method to take: all of them on the same real experts, with their defaults, arrival by",
    "arrival. Your own experts decide better: [`mainstem study`](study.md). This page is written by",
    "`python -m bench.quality.report` from `bench/results/quality.json`; `make quality` measures again.",
)
TERMS = (
    "ACC is the mean accuracy over the tasks that were learned, share the mean part of what each expert has alone;",
    "BWT what became of a task after its own expert had come, forgetting what was lost of the best ever had",
    "([formulas](evaluation.md#the-figures)); ± one standard deviation over the orders. Held out are tasks that no",
    "expert learned. Seconds are CPU seconds of one arrival on one thread, with the read-out, beside other work.",
    "Encoders are scored on 150 texts of each task, readers on 200 digits: a point of ACC or less tells nothing apart.",
    "State is what is kept between arrivals, beside the published model. Orders: over how many, where it matters.",
)


def page(results: Part) -> str:
    """The whole of docs/quality.md."""
    sections = [
        ["# Quality", "", *HEAD],
        ["## What came out", "", *findings.findings(results)],
        _models(results),
        ["## How to read the tables", "", *TERMS],
        _streams(results, "readers", "Digit readers: sixteen experts, ten orders"),
        _streams(results, "encoders", "Sentence encoders: sixteen experts, one order"),
        _orders(results),
        _streams(results, "light", "Sentence encoders, trained lightly: eight experts, one order"),
        _streams(results, "adapters", "LoRA experts: eight digit readers, three orders"),
        _streams(results, "encoder_adapters", "LoRA experts: eight sentence encoders, one order"),
        _growth(results),
        _sensitivity(results),
        _routed(results),
        _learned(results),
        _grid(results),
        _missing(results),
    ]
    return "\n".join(line for section in sections if section for line in (*section, "")).rstrip() + "\n"


def main() -> None:
    """The command."""
    results = json.loads(SOURCE.read_text())
    pictures.draw(results, DOCUMENT.parent / "pictures")
    DOCUMENT.write_text(page(results))


def _models(results: Part) -> list[str]:
    lines = [
        "## The experts",
        "",
        "Encoders: all-MiniLM-L6-v2 (22.7M parameters), fine-tuned whole on each of these tasks, whose texts come from",
        "data that packages ship. Heads are the directions of the classes' mean features under the base; fitted once,",
        "then frozen, as CLIP's are; eight of them once more, trained lightly: at a quarter of the rate, in 100 steps",
        "instead of 160. Readers: a vision transformer (0.15M) that reads scikit-learn's digits; a task is one of 8",
        "places and one of 4 styles; the base knows the centre only.",
        "",
    ]
    found = results.get("experts") or {}
    order = sorted(found, key=lambda name: found[name]["base"] - found[name]["expert"])
    rows = [
        [
            name.replace("_", " "),
            str(found[name]["classes"]),
            str(found[name]["train"]),
            percent(found[name]["base"]),
            percent(found[name]["expert"]),
        ]
        for name in order
    ]
    return lines + table(["task", "classes", "texts", "base", "expert"], rows)


def _streams(results: Part, name: str, title: str) -> list[str]:
    part = results.get(name)
    if not part or not part["methods"]:
        return []
    base = part["base"]
    held = "" if base["held_out"] is None else f", {percent(base['held_out'])} in those held out"
    lines = [
        f"## {title}",
        "",
        f"The base has {percent(base['acc'])} in the learned tasks{held}; the experts, each in its own,",
        f"{percent(part['own']['acc'])}. Held out: {len(part['held_out'])} tasks.",
        "",
    ]
    if name == "readers":
        lines[3] += " They are combinations of place and style that no expert had, and the base's own."
    rows = []
    for label, row in sorted(part["methods"].items(), key=lambda item: -item[1]["acc"]["mean"]):
        rows.append(
            [
                f"`{label}`",
                spread(row["acc"]),
                percent(row["share"]["mean"]),
                points(row["bwt"]["mean"]),
                points(row["forgetting"]["mean"]),
                spread(row["held_out"]) if "held_out" in row else "-",
                plain(row["seconds"]["mean"], 2),
                size(row["state_bytes"]),
                "free" if row["order_independent"] else str(row["orders"]),
            ]
        )
    columns = ["method", "ACC", "share", "BWT", "forgetting", "held out", "seconds", "state", "orders"]
    return [*lines, *table(columns, rows), "", *pictures.shown(results, name)]


def _orders(results: Part) -> list[str]:
    part = results.get("encoder_orders")
    rows = [
        [f"`{label}`", str(row["orders"]), spread(row["acc"])]
        for label, row in (part["methods"].items() if part else ())
        if row["orders"] > 1
    ]
    if not rows:
        return []
    return ["### Over more orders", "", *table(["method", "orders", "ACC"], rows)]


def _there(results: Part, **titles: str) -> list[tuple[Any, str]]:
    """Those of these parts that were run, and their titles."""
    return [(results[name], title) for name, title in titles.items() if results.get(name)]


def _growth(results: Part) -> list[str]:
    lines: list[str] = []
    for part, title in _there(
        results,
        growth="digit readers",
        encoder_growth="sentence encoders",
        halves="two encoders for each of the tasks, each trained on half of its texts",
    ):
        sizes = sorted({int(size) for row in part.values() for size in row})
        rows = [
            [f"`{label}`", *(percent(row[str(size)]["share"]) if str(size) in row else "-" for size in sizes)]
            for label, row in part.items()
        ]
        lines += ["", f"Share of the experts' own accuracy, {title}:", ""]
        lines += table(["method", *(f"{size} experts" for size in sizes)], rows)
    return ["## More and more experts", *lines, "", *pictures.shown(results, "growth")] if lines else []


def _sensitivity(results: Part) -> list[str]:
    lines: list[str] = []
    for name, streams, title in (
        ("sensitivity", "readers", "digit readers"),
        ("encoder_sensitivity", "encoders", "sentence encoders"),
    ):
        part, known = results.get(name), results.get(streams)
        if not part:
            continue
        rows = []
        for label, row in part.items():
            default = ((known or {}).get("methods") or {}).get(label.split()[0])
            against = points(row["acc"] - default["first_acc"]) if default else "-"
            rows.append([f"`{label}`", percent(row["acc"]), against, percent(row["share"])])
        lines += ["", f"The first order, {title}:", ""]
        lines += table(["method", "ACC", "against its default", "share"], rows)
    return ["## Other parameters", *lines] if lines else []


def _routed(results: Part) -> list[str]:
    lines: list[str] = []
    for part, title in _there(results, routed="digit readers", encoder_routed="sentence encoders"):
        merged = list(dict.fromkeys(label for row in part.values() for label in row["merged"]))
        rows = []
        for count, row in sorted(part.items(), key=lambda item: int(item[0])):
            figures = [row["merged"].get(label) for label in merged]
            figures += [row.get("cap", {}).get(form) for form in ("published", "1", "2")]
            figures.append(row.get("half", {}).get("1"))
            rows.append([count, *("-" if one is None else percent(one) for one in figures)])
        columns = ["experts", *(f"`{label}`" for label in merged), "`smile`, published", "routed", "`top_k=2`"]
        lines += ["", f"Share of the experts' own accuracy, {title}:", ""]
        lines += table([*columns, "`cap` half the experts, routed"], rows)
    if not lines:
        return []
    return [
        "## `smile` with its router",
        "",
        "The experts of [more and more experts](#more-and-more-experts), `cap` their number: published, `smile` is a",
        "merged model as any other, routed it is what [`mainstem export`](methods.md#a-model-that-routes) writes. In",
        "the last column half of them are kept apart. Blocks `routed` and `encoder_routed`.",
        *lines,
    ]


def _learned(results: Part) -> list[str]:
    lines: list[str] = []
    for part, title in _there(
        results,
        learned="digit readers",
        demo_learned="the demo's network, digits in eight places",
        encoder_learned="sentence encoders",
    ):
        tasks = part["tasks"]
        rows = [["the base", percent(part["base"])]]
        for label, scores in sorted(part["plain"].items(), key=lambda item: findings.mean(item[1], tasks)):
            rows.append([f"`{label}`", percent(findings.mean(scores, tasks))])
        for label, row in part["learned"].items():
            acc = percent(findings.mean(row["scores"], tasks))
            if row["of"]:
                seen, others = (findings.mean(row["scores"], some) for some in (tasks[: row["of"]], tasks[row["of"] :]))
                acc += f": {percent(seen)} in these, {percent(others)} in the others"
            fell = " to ".join(plain(value, 2) for value in row["entropy"])
            rows.append([f"learned, {label}", acc, fell, plain(row["seconds"], 2)])
        rows.append(["experts, each by itself", percent(part["own"])])
        columns = ["", "ACC", "entropy, nats", "seconds a step"]
        lines += ["", f"{title[0].upper()}{title[1:]}, {len(tasks)} experts:", ""]
        lines += table(columns, [[*row, *["-"] * (len(columns) - len(row))] for row in rows])
    if not lines:
        return []
    return [
        "## Learned coefficients",
        "",
        "[AdaMerging](adamerging.md) over the first experts of [more and more experts](#more-and-more-experts), from",
        "batches of 16 of each task's training data without labels; all coefficients start at `task_arithmetic`'s own",
        "scale, and the other rows have no data. The entropy is the sum over the tasks, of the first and the last ten",
        "steps. A step's CPU seconds are with the model's forward and backward passes. Blocks `learned`,",
        "`demo_learned` and `encoder_learned`.",
        *lines,
    ]


def _grid(results: Part) -> list[str]:
    lines: list[str] = []
    for pairs, title in _there(
        results, grid="without replay", grid_replay="with replay: half of every batch is of earlier tasks"
    ):
        rows = []
        for pair in pairs:
            label = pair["deploy"] + (", from `trained_from`" if pair["relative_to"] == "trained_from" else "")
            figures = pair["accumulation"][-1], pair["retention"][-1], findings.balance(pair)
            rows.append([f"`{pair['init']}`", label, *map(percent, figures)])
        lines += ["", f"After eight rounds, {title}:", ""]
        lines += table(["start from", "serve", "accumulation", "retention", "balance"], rows)
    if not lines:
        return []
    return [
        "## Over time: what to start from, what to serve",
        "",
        "Digit readers trained one after the other, each from the newest version of an `init` head, and folded by a",
        "`main` head ([time.md](time.md)). Accumulation is the mean over the eight tasks, retention that over tasks",
        "nobody trained, the base's own four among them, balance their geometric mean, as TIME has it.",
        *lines,
        "",
        *pictures.shown(results, "grid"),
    ]


def _missing(results: Part) -> list[str]:
    gone = []
    for name, words in findings.BLOCKS.items():
        count = results["missing"].get(name, 0)
        if not results.get(name):
            gone.append(f"- {words}: not run yet")
        elif count:
            what = "pair" if name.startswith("grid") else "run" if name.endswith("learned") else "stream"
            gone.append(f"- {words}: {count} {what}{'s' * (count > 1)} not run yet")
    if earlier := results.get("earlier"):
        words = ", ".join(findings.BLOCKS[name] for name in earlier)
        gone += item(f"from an earlier run, whose experts were trained apart from the others' here: {words}")
    needs = "methods that need sidecars (`fisher`, `regmean`, `mats`) are not tried here"
    return ["## Not run, or run apart", "", *gone, f"- {needs}"]


if __name__ == "__main__":
    main()
