"""A head as it stands: what its next version continues from. A module of its own: `merge/`, `rebuild/` and `home/` all
begin with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from projector.method import Method, Totals
from registry.reader import Reader
from registry.records import Head, RelativeTo, Version


@dataclass(frozen=True)
class HeadTip:
    """One head: its row, its newest version, its method and the method's totals."""

    head: Head
    version: Version
    method: Method
    totals: Totals


def head_tips(reader: Reader, methods: Mapping[str, Method]) -> list[HeadTip]:
    """Every head as the registry has it now; `methods` by head."""
    return [_tip(reader, head, methods[head.name]) for head in reader.heads()]


def relative_heads(reader: Reader) -> frozenset[str]:
    """The heads whose task vectors are what was trained since the version that an expert names."""
    return frozenset(head.name for head in reader.heads() if head.relative_to is RelativeTo.TRAINED_FROM)


def _tip(reader: Reader, head: Head, method: Method) -> HeadTip:
    version = reader.version(head.name, head.newest)
    if version is None:
        raise AssertionError(f"the registry has no version {head.newest} of {head.name}")
    return HeadTip(head, version, method, totals_of(version))


def totals_of(version: Version) -> Totals:
    """A method's totals after that version."""
    scalars = dict(version.totals)
    return Totals(int(scalars.pop("experts")), scalars)
