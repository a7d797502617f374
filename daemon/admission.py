"""What an expert's numbers must be like to be merged. Its form was checked when it was opened."""

from daemon.config import Admission
from daemon.errors import Reason, Refused
from projector.fold import Folded


def check_norm(folded: Folded, mean_norm: float | None, limits: Admission) -> None:
    """Refuses a task vector that is nothing, longer than the base, or far longer than those before (Refused).

    mean_norm: of the experts merged so far, None where there is none.
    """
    if not folded.norm:
        raise Refused(
            Reason.EQUALS_BASE,
            "every weight equals the base's: there is nothing to merge",
            "drop the fine-tuned model, not the base",
        )
    if folded.norm >= limits.max_base_ratio * folded.base_norm:
        raise Refused(
            Reason.FOREIGN_BASE,
            f"its task vector is {folded.norm / folded.base_norm:.3g} times as long as the base itself"
            if folded.base_norm
            else "the base is zero everywhere",
            "fine-tune from this home's base; if that is what you did, raise admission.max_base_ratio and retry",
        )
    if mean_norm and folded.norm > limits.max_norm_ratio * mean_norm:
        raise Refused(
            Reason.NORM_OUTLIER,
            f"its task vector is {folded.norm / mean_norm:.3g} times as long as those merged so far",
            "look at its training; if it is sound, raise admission.max_norm_ratio and retry",
        )
