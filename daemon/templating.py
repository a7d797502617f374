"""How HTML is made of templates: whatever is put in is text, and what a template misses is a fault.

A module of its own, for the pages that are served and the report that is a file alike.
"""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"


def html_environment() -> Environment:
    """The templates of this package. Filters may be added."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def asset(*names: str) -> Markup:
    """Our own styles or scripts, one behind the other, to stand in a page as they are."""
    return Markup("".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names))
