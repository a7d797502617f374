"""What the results say, in sentences made from them."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from bench.quality.tables import item, percent, points, spread
from projector.text import plain, size

BLOCKS = {
    "readers": "digit readers, every method",
    "encoders": "sentence encoders, every method, one order",
    "encoder_orders": "sentence encoders, five orders",
    "light": "sentence encoders, trained lightly",
    "adapters": "LoRA experts, digit readers",
    "encoder_adapters": "LoRA experts, sentence encoders",
    "halves": "32 sentence encoders, two for each task",
    "growth": "more and more experts, digit readers",
    "encoder_growth": "more and more experts, sentence encoders",
    "sensitivity": "other parameters, digit readers",
    "encoder_sensitivity": "other parameters, sentence encoders",
    "routed": "smile with its router, digit readers",
    "encoder_routed": "smile with its router, sentence encoders",
    "learned": "learned coefficients, digit readers",
    "demo_learned": "learned coefficients, the demo's network",
    "encoder_learned": "learned coefficients, sentence encoders",
    "grid": "over time, without replay",
    "grid_replay": "over time, with replay",
}
LEAST = 3  # methods, to be compared
STARTING = "task_arithmetic"  # with its own scale: where learned coefficients begin
NO_MERGE = ("zero_shot", "latest")
Part = Mapping[str, Any]


def findings(results: Part) -> list[str]:
    """One item each."""
    found = [
        *_best(results, "readers", "digit readers"),
        *_best(results, "encoders", "sentence encoders"),
        *_best(results, "light", "sentence encoders, trained lightly"),
        *_best(results, "adapters", "digit readers with LoRA"),
        *_best(results, "encoder_adapters", "sentence encoders with LoRA"),
        *_orders(results),
        *_composed(results),
        *_unlearned(results, "encoders", "sentence encoders"),
        *_unlearned(results, "light", "sentence encoders, trained lightly"),
        *_scaled(results, "sensitivity", "readers", "digit readers"),
        *_scaled(results, "encoder_sensitivity", "encoders", "sentence encoders"),
        *_costly(results),
        *_failing(results),
        *_grown(results),
        *_routed(results, "routed", "digit readers"),
        *_routed(results, "encoder_routed", "sentence encoders"),
        *_learned(results, "learned", "digit readers"),
        *_learned(results, "demo_learned", "the demo's network"),
        *_learned(results, "encoder_learned", "sentence encoders"),
        *_started(results),
        *_summed(results),
    ]
    lines = [line for one in found for line in item(one)]
    return lines or ["Nothing yet."]


def _best(results: Part, name: str, title: str) -> list[str]:
    part = results.get(name)
    if not part or len(part["methods"]) < LEAST:
        return []
    ranked = sorted(part["methods"].items(), key=lambda item: -item[1]["acc"]["mean"])
    (first, best), (second, next_best), (third, last_best) = ranked[:3]
    worst = next((label, row) for label, row in reversed(ranked) if label not in NO_MERGE)
    words = (
        f"**{title}**: `{first}` has the best ACC, {spread(best['acc'])} ({percent(best['share']['mean'])} % of the "
        f"experts' own), before `{second}` {spread(next_best['acc'])} and `{third}` {spread(last_best['acc'])}; "
        f"the base has {percent(part['base']['acc'])}, the worst merge, `{worst[0]}`, {spread(worst[1]['acc'])}."
    )
    if "opcm" in part["methods"] and "opcm" not in (first, second, third):
        words += f" `opcm` has {spread(part['methods']['opcm']['acc'])}."
    return [words]


def _orders(results: Part) -> list[str]:
    part = results.get("readers")
    spreads = {
        label: row["acc"]
        for label, row in (part["methods"].items() if part else ())
        if row["orders"] > 2 and label not in NO_MERGE
    }
    if not spreads:
        return []
    told = sorted(spreads.items(), key=lambda item: -(item[1]["most"] - item[1]["least"]))
    worst, best = told[0], told[-1]
    return [
        f"**What the order costs**: between its worst and its best order `{worst[0]}` moves by "
        f"{percent(worst[1]['most'] - worst[1]['least'])} points of ACC, `{best[0]}` by "
        f"{percent(best[1]['most'] - best[1]['least'])}; where experts come as they come, take a method that does not "
        "depend on it."
    ]


def _composed(results: Part) -> list[str]:
    part = results.get("readers")
    if not part or not part["methods"]:
        return []
    rows = {label: row for label, row in part["methods"].items() if "held_out" in row and label not in NO_MERGE}
    label = max(rows, key=lambda one: rows[one]["held_out"]["mean"])
    base, best = part["base"]["held_out"], rows[label]["held_out"]
    if best["mean"] <= base:
        return [f"**What nobody trained**: no method is better than the base ({percent(base)}) in what is held out."]
    return [
        f"**What nobody trained**: in combinations of place and style that no expert had, and the base's own tasks, "
        f"the best is `{label}` with {spread(best)}, {points(best['mean'] - base)} against the base: experts of other "
        "combinations add up to skills that none of them has."
    ]


def _unlearned(results: Part, name: str, title: str) -> list[str]:
    part = results.get(name)
    if not part or len(part["methods"]) < LEAST or part["base"]["held_out"] is None:
        return []
    rows = {label: row for label, row in part["methods"].items() if label not in NO_MERGE}
    learned, kept = (max(rows, key=lambda label: rows[label][what]["mean"]) for what in ("acc", "held_out"))
    some = [label for label in dict.fromkeys((kept, learned, "opcm")) if label in rows]
    told = ", ".join(f"`{label}` {spread(rows[label]['held_out'])}" for label in some)
    base = percent(part["base"]["held_out"])
    return [f"**What nobody trained**, {title}: in tasks held out the base has {base}; {told}."]


def _scaled(results: Part, name: str, streams: str, title: str) -> list[str]:
    grid, part = results.get(name), results.get(streams)
    if not grid or not part:
        return []
    told = []
    for method in dict.fromkeys(label.split()[0] for label in grid):
        default = part["methods"].get(method)
        if not default:
            continue
        tried = {label: row["acc"] for label, row in grid.items() if label.split()[0] == method}
        best = max(tried, key=lambda label: tried[label])
        won = tried[best] - default["first_acc"]
        told.append(f"`{best}` {points(won)}" if won > 0 else f"`{method}`'s defaults are its best")
    return [f"**What scale**, {title}, best point of each small grid against the defaults, ACC: {'; '.join(told)}."]


def _costly(results: Part) -> list[str]:
    part = results.get("encoders")
    if not part or len(part["methods"]) < LEAST:
        return []
    rows = {label: row for label, row in part["methods"].items() if label not in NO_MERGE}
    ranked = sorted(rows, key=lambda label: rows[label]["seconds"]["mean"])
    told = [ranked[0], *(name for name in ("opcm", "tsv_m", "iso_c") if name in rows), ranked[-1]]
    words = ", ".join(
        f"`{name}` {plain(rows[name]['seconds']['mean'], 2)} s and {size(rows[name]['state_bytes'])}"
        for name in dict.fromkeys(told)
    )
    return [f"**What it costs**, an arrival of a 91 MB encoder on one thread, and the state that is kept: {words}."]


def _failing(results: Part) -> list[str]:
    part = results.get("encoders")
    if not part or len(part["methods"]) < LEAST:
        return []
    label, row = max(part["methods"].items(), key=lambda item: item[1]["acc"]["mean"])
    worse = {
        one["task"]: row["by_task"][one["task"]] - one["base"]
        for one in part["experts"].values()
        if row["by_task"][one["task"]] < one["base"]
    }
    least = sorted(
        part["experts"].values(),
        key=lambda one: (row["by_task"][one["task"]] - one["base"]) / max(one["own"] - one["base"], 0.01),
    )[:3]
    told = ", ".join(
        f"{one['task'].replace('_', ' ')} ({percent(one['base'])} base, {percent(row['by_task'][one['task']])} merged, "
        f"{percent(one['own'])} expert)"
        for one in least
    )
    below = (
        f"{len(worse)} of {len(part['experts'])} tasks end below the base" if worse else "no task ends below the base"
    )
    return [f"**Where merging fails**, sentence encoders by `{label}`: {below}; least is kept of {told}."]


def _grown(results: Part) -> list[str]:
    part = results.get("growth")
    if not part:
        return []
    sizes = sorted({int(size) for row in part.values() for size in row})
    few, many = str(sizes[0]), str(sizes[-1])
    whole = {label: row for label, row in part.items() if few in row and many in row}
    if not whole or few == many:
        return []
    kept = max(whole, key=lambda one: whole[one][many]["share"])
    lost = min(whole, key=lambda one: whole[one][many]["share"])
    return [
        f"**How many**: from {few} to {many} experts `{kept}` goes from {percent(whole[kept][few]['share'])} to "
        f"{percent(whole[kept][many]['share'])} % of the experts' own accuracy, `{lost}` from "
        f"{percent(whole[lost][few]['share'])} to {percent(whole[lost][many]['share'])}."
    ]


def _routed(results: Part, name: str, title: str) -> list[str]:
    part = results.get(name)
    told = []
    for count, row in sorted((part or {}).items(), key=lambda item: int(item[0])):
        if "cap" not in row:
            continue
        merged = row["merged"]
        best = max(merged, key=merged.__getitem__, default=None)
        beside = f", `{best}` without a router {percent(merged[best])}" if best else ""
        told.append(f"{count} experts {percent(row['cap']['1'])}, published {percent(row['cap']['published'])}{beside}")
    return (
        [f"**A router**, `smile`, {title}, per cent of the experts' own accuracy: {'; '.join(told)}."] if told else []
    )


def _learned(results: Part, name: str, title: str) -> list[str]:
    part = results.get(name)
    whole = {label: row for label, row in (part or {}).get("learned", {}).items() if row["of"] is None}
    if not part or not whole:
        return []
    tasks, others = part["tasks"], part["plain"]
    label = max(whole, key=lambda one: mean(whole[one]["scores"], tasks))
    best = whole[label]
    words = f"**Learned coefficients**, {title}: {percent(mean(best['scores'], tasks))} ACC at best (`{label}`)"
    if start := others.get(STARTING):
        worse = sum(best["scores"][task] < start[task] for task in tasks)
        fell = " to ".join(plain(nats, 2) for nats in best["entropy"])
        words += f" from {percent(mean(start, tasks))} at the start, while the entropy went from {fell} nats; "
        words += f"{worse} of {len(tasks)} tasks got worse"
    if others:
        other = max(others, key=lambda one: mean(others[one], tasks))
        words += f". Without data `{other}` has {percent(mean(others[other], tasks))}"
    return [f"{words}."]


def mean(scores: Mapping[str, float], tasks: Sequence[str]) -> float:
    """Over these tasks."""
    return fmean(scores[task] for task in tasks)


def balance(pair: Part) -> float:
    """Of what was learned and what was kept in the end, the geometric mean."""
    return float((pair["accumulation"][-1] * pair["retention"][-1]) ** 0.5)


def _by_way(pairs: Sequence[Part]) -> Mapping[tuple[str, str, str], Part]:
    return {(pair["init"], pair["deploy"], pair["relative_to"]): pair for pair in pairs}


def _both(pair: Part) -> str:
    return f"{percent(pair['accumulation'][-1])} and {percent(pair['retention'][-1])}"


def _started(results: Part) -> list[str]:
    pairs = results.get("grid")
    if not pairs:
        return []
    best = max(pairs, key=balance)
    words = [
        f"**What to start from**: after eight rounds the best balance of what was learned and what was kept has "
        f"`{best['init']}` as init with `{best['deploy']}` served"
        + (" relative to what each was trained from" if best["relative_to"] == "trained_from" else "")
        + f": {_both(best)}."
    ]
    known = _by_way(pairs)
    compared = [known.get(key) for key in (("latest", "latest", "base"), ("zero_shot", "mean", "base"))]
    for one, name in zip(
        compared, ("plain fine-tuning", "the mean of experts that all start from the base"), strict=True
    ):
        if one:
            words.append(f"{name[0].upper()}{name[1:]}: {_both(one)}.")
    if fused := known.get(("mean", "mean", "base")):
        words.append(
            "The mean as what the next one starts from (fusing for a better initialisation, Choshen et al., arXiv "
            f"2204.03044) and as what is served: {_both(fused)}."
        )
    return [" ".join(words)]


def _summed(results: Part) -> list[str]:
    pairs = results.get("grid")
    if not pairs:
        return []
    known = _by_way(pairs)
    told = []
    for init, deploy in (("ema", "opcm"), ("ema", "task_arithmetic"), ("latest", "opcm"), ("ema", "iso_c")):
        one, other = (known.get((init, deploy, way)) for way in ("base", "trained_from"))
        if one and other:
            told.append(f"`{deploy}` after `{init}`: {percent(balance(one))} and {percent(balance(other))}")
    if not told:
        return []
    return ["**`relative_to`** for sums, balance with `base` and with `trained_from`: " + "; ".join(told) + "."]
