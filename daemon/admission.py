"""What an expert's numbers must be like to be merged. Its form was checked when it was opened."""

from collections.abc import Sequence
from statistics import median

from daemon.config import Admission
from daemon.errors import Reason, Refused
from projector.head import Folded
from projector.naming import Naming
from registry.records import Expert

NEGLIGIBLE = 1e-6  # of the base's norm: below what float32 resolves
ENOUGH = 3  # experts, before there is such a thing as a usual norm
USUAL_EXPERTS = 1000  # so many of the newest tell what is usual: no arrival reads more rows the more there are


def naming_of(expert: Expert, settings: Admission) -> Naming:
    """How the names of a merged expert became the base's: as it was merged, else by the settings."""
    return Naming(**expert.naming) if expert.naming is not None else settings.naming


def check_norm(folded: Folded, norms: Sequence[float], limits: Admission) -> None:
    """Refuses a task vector that is nothing, longer than the base, or far from the usual length (Refused).

    norms: of the newest USUAL_EXPERTS that are merged. Their median is the usual length, which no single expert can
    move.
    """
    if folded.norm <= NEGLIGIBLE * folded.base_norm:
        raise Refused(
            Reason.EQUALS_BASE,
            f"its weights are the base's (the task vector has norm {folded.norm:.3g}): there is nothing to merge",
            "drop the fine-tuned model, not the base; an adapter only once it is trained",
        )
    if folded.norm >= limits.max_base_ratio * folded.base_norm:
        times = f"{folded.norm / folded.base_norm:.3g} times" if folded.base_norm else "infinitely"
        raise Refused(
            Reason.FOREIGN_BASE,
            f"its task vector is {times} as long as the base itself",
            "fine-tune from this home's base; if you did, raise admission.max_base_ratio and drop it again",
        )
    if len(norms) < ENOUGH:
        return
    ratio = folded.norm / median(norms)
    if not 1 / limits.max_norm_ratio <= ratio <= limits.max_norm_ratio:
        raise Refused(
            Reason.NORM_OUTLIER,
            f"its task vector is {ratio:.3g} times as long as is usual here",
            "look at its training; if it is sound, raise admission.max_norm_ratio and drop it again",
        )
