"""Writes the generated part of docs/methods.md: `python -m docs.generate` from the root of the repository."""

import re
from pathlib import Path

from projector.listing import listing, markdown
from projector.methods import methods

METHODS = Path(__file__).parent / "methods.md"
GENERATED = re.compile(r"(<!-- methods: [^\n]*-->\n).*(<!-- /methods -->)", re.DOTALL)


def methods_part() -> str:
    """Every method, from the code: those of this repository only, whatever else is installed."""
    return markdown(listing(cls) for cls in methods().values() if cls.__module__.startswith("projector."))


def main() -> None:
    text = METHODS.read_text()
    METHODS.write_text(GENERATED.sub(lambda found: found[1] + methods_part() + found[2], text))
    print("wrote docs/methods.md")


if __name__ == "__main__":
    main()
