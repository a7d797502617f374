"""Sets of heads that have a name, each no more than methods with parameters: what `mainstem init --preset` takes.

A table of its own: who adds a protocol adds a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from projector.method import Method

RELATIVE = "relative_to"  # what is set of a head whatever its method, and is no parameter of it
INIT = "init"
"""The head that trainers start from, where a home has one."""


DEFAULT_METHOD = "confluence"
"""Of main, where nobody named one: of those on weights alone, the first in every table of docs/quality.md."""

LEANER = "opcm"
"""The preset, and its method, that is near the default in quality with a fraction of its state and its time."""


@dataclass(frozen=True)
class Preset:
    """What it is for, in a line, and each head's method with the parameters that are given to it."""

    meaning: str
    heads: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)


_EMA = ("ema", {"weight": 0.5, "start": "base"})

PRESETS: Mapping[str, Preset] = {
    "best-in-time": Preset(
        "trainers start from the moving average of the experts, which is served too", {"main": _EMA, "init": _EMA}
    ),
    "offline": Preset(
        "trainers start from the base, and the mean of all experts is served",
        {"main": ("mean", {}), "init": ("zero_shot", {})},
    ),
    "opcm": Preset("trainers start from the base, and the orthogonal merge is served", {"main": ("opcm", {})}),
    "continual": Preset(
        "trainers start from the last expert, which is served too", {"main": ("latest", {}), "init": ("latest", {})}
    ),
}
"""By name. `best-in-time`, `offline` and `continual` are protocols of TIME (arXiv 2412.06712), `opcm` is OPCM's own."""


def growing(head: str, method: "Method", relative: bool) -> tuple[str, str] | None:
    """What to say, and what to do, where trainers are to start from a head that then grows without end. relative: its
    task vectors are taken against what an expert was trained from."""
    if head != INIT or relative or not method.grows:
        return None
    return (
        f"the head {INIT} adds task vectors up ({method.name}): where trainers start from it, what is merged is merged"
        " again with every expert, and it gets ever further from the base",
        f"take an average for it, as ema, mean, recency or latest, or {INIT}.{RELATIVE}=trained_from: docs/time.md",
    )
