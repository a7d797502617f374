"""Writes the generated parts of docs/: `python -m docs.generate` from the root of the repository."""

import re
from collections.abc import Callable
from pathlib import Path

from prometheus_client.metrics_core import Metric

from daemon.config import described
from daemon.metrics import Metrics
from projector.laws.listing import listing, markdown
from projector.methods import methods

DOCS = Path(__file__).parent


def methods_part() -> str:
    """Every method, from the code: those of this repository only, whatever else is installed."""
    return markdown(listing(cls) for cls in methods().values() if cls.__module__.startswith("projector."))


def settings_part() -> str:
    """Every setting, with its default."""
    return "".join(f"- `{name}` (`{default}`): {text}\n" for name, default, text in described())


def metrics_part() -> str:
    """Every metric of ours, with its type."""

    def line(metric: Metric) -> str:
        name = metric.name + ("_total" if metric.type == "counter" else "_info" if metric.type == "info" else "")
        return f"- `{name}` ({metric.type}): {metric.documentation}\n"

    return "".join(line(metric) for metric in Metrics().registry.collect() if metric.name.startswith("mainstem_"))


PARTS: dict[str, Callable[[], str]] = {"methods": methods_part, "settings": settings_part, "metrics": metrics_part}
"""By the name of the page, which is that of its generated part."""


def generated(name: str, text: str) -> str:
    """`text`, a page, with its generated part as the code has it. ValueError where it has no such part."""
    part = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*(<!-- /{name} -->)", re.DOTALL)
    made, found = part.subn(lambda found: found[1] + PARTS[name]() + found[2], text)
    if found != 1:
        raise ValueError(f"no part {name}")
    return made


def main() -> None:
    for name in PARTS:
        page = DOCS / f"{name}.md"
        page.write_text(generated(name, page.read_text()))
        print(f"wrote docs/{name}.md")


if __name__ == "__main__":
    main()
