"""What an expert's numbers must be like to be merged. Its form was checked when it was opened."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from statistics import median
from typing import Any

from daemon.config import Admission
from daemon.errors import Reason, Refused
from projector.driver.head import Folded
from projector.names.naming import Naming
from projector.text import listed, plain, shown
from registry.records import Expert, Flag, NewExpert

UNDER = " under [admission] in mainstem.toml"
NEGLIGIBLE = 1e-6  # of the base's norm: below what float32 resolves
ENOUGH = 3  # experts, before there is such a thing as a usual norm
ENOUGH_TO_FLAG = 2  # a flag costs nothing where it is wrong
USUAL_EXPERTS = 1000  # so many of the newest tell what is usual: no arrival reads more rows the more there are


@dataclass(frozen=True)
class Oddity:
    """Something about an expert that is merged all the same: as one word, in words, and what to do."""

    flag: Flag
    detail: str
    hint: str


def flagged(expert: NewExpert, odd: Sequence[Oddity]) -> NewExpert:
    """The expert with these flags on it."""
    detail, hint = worded(odd)
    return replace(expert, flags=tuple(one.flag for one in odd), detail=detail, hint=hint) if odd else expert


def worded(odd: Sequence[Oddity]) -> tuple[str | None, str | None]:
    """Their details in one text, and their hints; None where nothing is odd."""
    return "; ".join(one.detail for one in odd) or None, "; ".join(one.hint for one in odd) or None


def naming_of(expert: Expert, settings: Admission) -> Naming:
    """How the names of a merged expert became the base's: as it was merged, else by the settings."""
    return Naming(**expert.naming) if expert.naming is not None else settings.naming


def added(naming: Mapping[str, Any], settings: Naming) -> dict[str, Any]:
    """What the settings do not say of how an expert's names were read: its expert.json does, or it was made to fit."""
    said = settings.noted()
    return {
        key: {old: new for old, new in value.items() if said.get(key, {}).get(old) != new}
        if isinstance(value, dict)
        else [glob for glob in value if glob not in said.get(key, ())]
        for key, value in naming.items()
        if value != said.get(key)
    }


def usual_norm(norms: Sequence[float], enough: int = ENOUGH) -> float | None:
    """The median of these norms, which no single expert can move; None while there are too few of them.

    norms: of the newest USUAL_EXPERTS that are merged.
    """
    return median(norms) if len(norms) >= enough else None


def check_norm(folded: Folded, usual: float | None, limits: Admission) -> None:
    """Refuses a task vector that is nothing, as long as the base, or far from the usual norm (Refused). The hint names
    every limit that is in its way: once they are raised, it is merged.
    """
    norm, base = folded.task_vector.whole, folded.base
    if norm <= NEGLIGIBLE * base.whole:
        raise Refused(
            Reason.EQUALS_BASE,
            f"its weights are the base's (the task vector has norm {norm:.3g}): there is nothing to merge",
            "drop the fine-tuned model, not the base; an adapter only once it is trained",
        )
    far = usual is not None and _beyond(norm, usual, limits.max_norm_ratio)
    ratio = f"max_norm_ratio = {_over(norm / usual)}" if usual and far else ""
    length, typical = norm / base.whole if base.whole else inf, folded.task_vector.over(base)
    if (times := max(length, typical)) >= limits.max_base_ratio:
        if not base.whole:
            raise Refused(
                Reason.FOREIGN_BASE,
                "its task vector is infinitely as long as the base itself, which is all zeros",
                "make a home over another base: nothing can be merged into this one",
            )
        where = "" if length >= limits.max_base_ratio else ", or longer, in the tensors with over half of the weights"
        raise Refused(
            Reason.FOREIGN_BASE,
            f"its task vector is {plain(times)} times as long as the base itself{where}",
            "it seems to come from another base: then it needs a home over that one, made by `mainstem init` with"
            f" --base, or to be fine-tuned from this home's; if it was, put max_base_ratio = {_over(times)}"
            + (f" and {ratio} (or it is refused for that next)" if ratio else "")
            + UNDER,
        )
    if usual and far:
        raise Refused(
            Reason.NORM_OUTLIER,
            _compared(norm, usual),
            f"look at its training; if it is sound, put {ratio}{UNDER}",
        )


def oddities(
    norm: float,
    usual: float | None,
    limits: Admission,
    resized: Mapping[str, tuple[int, int]],
    altered: Sequence[str],
) -> list[Oddity]:
    """What is odd about a task vector that is merged: of a norm that `check_norm` lets pass, with these tensors of
    other sizes (rows in the expert, rows in the base), and these buffers that are not the base's."""
    return [odd for odd in (oddity(norm, usual, limits), _odd_rows(resized), _odd_buffers(altered)) if odd]


def _odd_rows(resized: Mapping[str, tuple[int, int]]) -> Oddity | None:
    if not resized:
        return None
    name, (theirs, ours) = next(iter(resized.items()))
    lost = "what its further rows learnt is left out" if theirs > ours else "the other rows are the base's"
    return Oddity(
        Flag.RESIZED,
        f"{shown(name)} has {theirs} rows, the base {ours}: the first {min(theirs, ours)} are merged, {lost}",
        "nothing is to be done if its added tokens are not needed here; if they are, found a home on a base with them",
    )


def _odd_buffers(altered: Sequence[str]) -> Oddity | None:
    if not altered:
        return None
    return Oddity(
        Flag.BUFFER,
        f"not the base's, but called as buffers are that nobody trains, so that the base's stay: {listed(altered)}",
        "where the expert was trained with another configuration (a rotary base, a scale), train it with the base's, or"
        " found a home on a base with that one; where they were trained, what they learnt is left out: call them"
        " otherwise, in the base too",
    )


def _over(ratio: float) -> str:
    """A limit that lets this ratio, or its inverse, pass, in few digits: as mainstem.toml has it."""
    return plain(1.1 * max(ratio, 1 / ratio), digits=2)


def oddity(norm: float, usual: float | None, limits: Admission) -> Oddity | None:
    flag = None if usual is None else _beyond(norm, usual, limits.warn_norm_ratio)
    if usual is None or flag is None:
        return None
    look = {
        Flag.LONG: "a learning rate that is too high, or an expert of another kind than the others, looks like this;"
        " compare the version before it with its own, and if it harms, `mainstem rebuild --without` it",
        Flag.SHORT: "an expert that has hardly been trained looks like this, and so does an adapter of low rank among"
        " whole models; nothing is to be done if that is meant",
    }
    return Oddity(flag, _compared(norm, usual), look[flag])


def _beyond(norm: float, usual: float, ratio: float) -> Flag | None:
    """On which side it is over `ratio` times away from the usual norm, if on any."""
    if norm > ratio * usual:
        return Flag.LONG
    return Flag.SHORT if norm * ratio < usual else None


def _compared(norm: float, usual: float) -> str:
    return (
        f"its task vector is {plain(norm / usual)} times as long as is usual here:"
        f" its norm is {plain(norm, digits=4)}, the median of those merged before it {plain(usual, digits=4)}"
    )
