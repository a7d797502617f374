"""A head as it stands: what its next version continues from. A module of its own: `merge/`, `rebuild/` and `home/` all
begin with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from projector.method import Method, Totals
from registry.records import Head, Version
from registry.store import Reader


@dataclass(frozen=True)
class LiveHead:
    """One head: its row, its live version, its method and the method's totals."""

    head: Head
    version: Version
    method: Method
    totals: Totals


def live_heads(reader: Reader, methods: Mapping[str, Method]) -> list[LiveHead]:
    """Every head as the registry has it now; `methods` by head."""
    return [_live(reader, head, methods[head.name]) for head in reader.heads()]


def _live(reader: Reader, head: Head, method: Method) -> LiveHead:
    version = reader.version(head.name, head.live)
    if version is None:
        raise AssertionError(f"the registry has no version {head.live} of {head.name}")
    scalars = dict(version.totals)
    return LiveHead(head, version, method, Totals(int(scalars.pop("experts")), scalars))
