"""Which mainstem this is. A module of its own, which loads nothing, so that everything may ask."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def software_version() -> str:
    """The installed mainstem's version; "0" where it runs from a bare checkout."""
    try:
        return version("mainstem")
    except PackageNotFoundError:
        return "0"
