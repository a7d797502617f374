"""The pictures of docs/quality.md: small SVGs, light, with the same bytes for the same results."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

DRAWN = {
    "readers": ("quality-readers.svg", "Share of the experts' accuracy after each arrival, digit readers"),
    "encoders": ("quality-encoders.svg", "Accuracy in what was learned and in what is held out, sentence encoders"),
    "growth": ("quality-growth.svg", "Share of the experts' accuracy against how many were merged, digit readers"),
    "grid": ("quality-grid.svg", "Accumulation against retention, round by round, per init and deploy head"),
}
MOST_LINES = 8


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """Those for which there are results."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (file, _) in DRAWN.items():
        if _there(results, name):
            _save(folder / file, PAINTERS[name], results[name])


def shown(results: Mapping[str, Any], name: str) -> list[str]:
    """The line that shows one, where there is something to draw."""
    if not _there(results, name):
        return []
    file, caption = DRAWN[name]
    return [f"![{caption}](pictures/{file})"]


def _there(results: Mapping[str, Any], name: str) -> bool:
    part = results.get(name) if name in DRAWN else None
    return bool(part and (name not in ("readers", "encoders") or part["methods"]))


def _save(path: Path, paint: Callable[[Any, Any], None], part: Any) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "mainstem", "font.size": 8, "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        paint(axes, part)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def _curves(axes: Any, part: Mapping[str, Any]) -> None:
    best = sorted(part["methods"].items(), key=lambda item: -item[1]["share"]["mean"])[:MOST_LINES]
    for label, row in best:
        curve = [100 * value for value in row["curve"]]
        axes.plot(range(1, len(curve) + 1), curve, label=label, linewidth=1.3)
    axes.set_xlabel("experts that have arrived")
    axes.set_ylabel("share of their own accuracy, %")
    axes.legend(fontsize=7, ncols=2, frameon=False)


def _bars(axes: Any, part: Mapping[str, Any]) -> None:
    rows = sorted(part["methods"].items(), key=lambda item: item[1]["acc"]["mean"])
    names = [label for label, _ in rows]
    axes.barh(names, [100 * row["acc"]["mean"] for _, row in rows], height=0.6, label="learned (ACC)")
    axes.plot([100 * row["held_out"]["mean"] for _, row in rows], names, "k|", label="held out")
    axes.axvline(100 * part["base"]["acc"], color="grey", linewidth=0.8, linestyle="--", label="base, learned")
    axes.axvline(100 * part["own"]["acc"], color="green", linewidth=0.8, linestyle="--", label="the experts' own")
    axes.set_xlabel("accuracy, %")
    axes.legend(fontsize=7, frameon=False, loc="lower right")


def _growth(axes: Any, part: Mapping[str, Any]) -> None:
    for label, row in part.items():
        sizes = sorted(map(int, row))
        axes.plot(sizes, [100 * row[str(size)]["share"] for size in sizes], label=label, marker="o", markersize=3)
    axes.set_xscale("log", base=2)
    sizes = sorted({int(size) for row in part.values() for size in row})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("experts")
    axes.set_ylabel("share of their own accuracy, %")
    axes.legend(fontsize=7, ncols=2, frameon=False)


def _grid(axes: Any, part: Sequence[Mapping[str, Any]]) -> None:
    chosen = [
        pair
        for pair in part
        if (pair["init"], pair["deploy"])
        in {
            ("ema", "ema"),
            ("latest", "latest"),
            ("zero_shot", "mean"),
            ("mean", "mean"),
            ("latest", "ema"),
            ("zero_shot", "opcm"),
            ("ema", "opcm"),
        }
        and (pair["relative_to"] == "base") == (pair["init"] == "zero_shot" or pair["deploy"] != "opcm")
    ]
    for pair in chosen:
        along = [100 * value for value in pair["retention"]], [100 * value for value in pair["accumulation"]]
        line = axes.plot(*along, label=f"{pair['init']} / {pair['deploy']}", linewidth=1, marker=".", markersize=3)[0]
        axes.plot(along[0][-1], along[1][-1], marker="o", markersize=6, color=line.get_color())
    axes.set_xlabel("retention: tasks that nobody trained, %")
    axes.set_ylabel("accumulation: the eight tasks, %")
    axes.legend(title="start from / serve", fontsize=7, title_fontsize=7, frameon=False)


PAINTERS: Mapping[str, Callable[[Any, Any], None]] = {
    "readers": _curves,
    "encoders": _bars,
    "growth": _growth,
    "grid": _grid,
}
