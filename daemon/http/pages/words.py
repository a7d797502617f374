"""What the pages say instead of bare figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from projector.text import plain
from registry.records import Head

_EXCLUDE = ["*embed*", "*wte*", "*wpe*", "shared.weight", "*relative_attention_bias*"]
DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "ace": {
        "eps": 0.01,
        "normalise": "auto",
        "heterogeneity": 0.3,
        "share": 0.3,
        "scale": 1.0,
        "exclude": _EXCLUDE,
    },
    "breadcrumbs": {"gamma": 0.01, "density": 0.9, "scale": 0.3},
    "breadcrumbs_ties": {"gamma": 0.01, "density": 0.9, "combine": "mean", "scale": 0.3},
    "confluence": {"scale": 1.0, "ridge": 0.1, "knee": 0.1, "exclude": _EXCLUDE},
    "continual_ties": {"density": 0.2, "scale": 0.5},
    "dare": {"drop": 0.9, "then": "linear", "scale": 0.3, "density": 1.0, "combine": "mean", "seed": 0},
    "ema": {"weight": 0.5, "start": "base"},
    "fisher": {"floor": 1e-06, "normalise": True},
    "iso_c": {"scale": 1.0, "tol": 1e-06, "exclude": _EXCLUDE},
    "magmax": {"scale": 0.5},
    "mats": {"curvature": "gram", "iterations": 100, "exclude": _EXCLUDE},
    "opcm": {
        "alpha": 0.5,
        "projection": "code",
        "tol": 1e-06,
        "accumulator": "auto",
        "readout": "norm",
        "scale": 2.0,
        "exclude": _EXCLUDE,
    },
    "pcb": {"ratio": 0.1, "scale": 1.0},
    "recency": {"scheme": "linear"},
    "regmean": {"off_diagonal": 0.95, "ridge": 1e-06, "exclude": _EXCLUDE},
    "slerp": {"dot_threshold": 0.9995},
    "smile": {"cap": 8, "rank": 32, "gate_rank": 16, "top_k": 1, "exclude": _EXCLUDE},
    "task_arithmetic": {"scale": 0.3, "c": 1.0},
    "ties": {"density": 0.2, "scope": "model", "combine": "mean", "scale": 1.0},
    "tsv_m": {"scale": 1.0, "exclude": _EXCLUDE},
    "wudi": {"solver": "ridge", "steps": 300, "lr": 1e-05, "ridge": 0.01, "exclude": _EXCLUDE},
}
"""Each method's parameters where nobody set them: here once more, as whoever serves need not load the methods."""

FIGURES = {
    "mean_norm": ("usual length of an expert", "the mean norm of the experts' task vectors"),
    "merged_norm": ("length of all summed up", "the norm of what the experts add up to"),
    "lambda": ("shortened by", "what the experts add up to is divided by this, to be as long as one of them"),
    "weight": ("weight of all experts", "the sum of their weights"),
}
"""By the name of a figure: what it is called here, and what it is."""


@dataclass(frozen=True, slots=True)
class Said:
    """One figure: in words, its value as text, and what it is, with its own name."""

    words: str
    value: str
    title: str


def said(figures: Mapping[str, float]) -> Sequence[Said]:
    """A version's figures."""
    found = []
    for name, value in figures.items():
        words, meaning = FIGURES.get(name, (name.replace("_", " "), name))
        found.append(Said(words, plain(value), f"{name} = {value!r}: {meaning}"))
    return found


def set_params(head: Head) -> str:
    """The parameters that are not the method's own; of a list, that it was set."""
    usual = DEFAULTS.get(head.method, {})
    changed = {name: value for name, value in head.params.items() if name not in usual or usual[name] != value}
    return ", ".join(f"{name} {'set' if isinstance(value, list) else value}" for name, value in changed.items())


def human_count(count: int) -> str:
    """22_713_216 -> "22.7 million"."""
    for unit, name in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return str(count)


def human_ago(moment: datetime, now: datetime) -> str:
    """How long ago: "just now", "5 min ago", "3 h ago", "2 days ago"."""
    seconds = (now - moment).total_seconds()
    if seconds < 10:
        return "just now"
    if seconds < 60:
        return f"{seconds:.0f} s ago"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min ago"
    if seconds < 48 * 3600:
        return f"{seconds // 3600:.0f} h ago"
    return f"{seconds // 86400:.0f} days ago"
