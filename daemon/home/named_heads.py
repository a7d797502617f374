"""The heads that the settings name, held against those that a home has."""

from collections.abc import Sequence

from daemon.config import Settings
from daemon.errors import BadConfig
from projector.text import listed, shown

MOST = 20  # heads that are named


def check_heads(settings: Settings, heads: Sequence[str]) -> tuple[str, str] | None:
    """What to say, and what to do, where `evaluate.heads` names a head beside others that the home does not have yet:
    the gate judges it from its first version on, which it must know of before. None where there is nothing to say.

    heads: the home's. Raises BadConfig where any other setting names a head that it does not have, and where it has
    none of those that are to be judged: a slip of the pen would open the gate.
    """
    has = f"its heads are {listed(heads, most=MOST)}"
    for name in sorted(settings.heads):
        if name not in heads:
            raise BadConfig(
                f"heads.{shown(name)} is set, but this home has no such head",
                f"{has}; leave it out, or {_adding(name)}",
            )
    wanted = settings.evaluate.heads if settings.evaluate.command else ()
    missing = [name for name in wanted if name not in heads]
    if not missing:
        return None
    named, adding = listed([shown(name) for name in missing], most=MOST), _adding(missing[0])
    if len(missing) == len(wanted):
        raise BadConfig(
            f"evaluate.heads names {named} alone, which this home does not have: nothing would be judged",
            f"{has}; name one of them, too, or {adding}",
        )
    return (
        f"evaluate.heads names {named}, which this home does not have: once added, it is judged from its first version",
        f"{has}; {adding}; if it is misspelt, mend it",
    )


def _adding(name: str) -> str:
    return f"`mainstem rebuild --head {shown(name)}=ema` adds it, by ema or another of `mainstem methods`"
