"""The error tree of the projector.

    ProjectorError
    ├── BadFile            the bytes are not a safetensors file we trust
    ├── BadSchema          the tensors are not those of the base
    ├── BadValues          the numbers cannot be merged
    │   └── BadMerged      what was merged of them cannot be published: the expert's doing, or the state's
    ├── BadParameter       a method was asked for with a parameter outside its range
    ├── UnknownMethod      no method has that name
    └── OverBudget         one tensor alone needs more memory than the budget

    DeviceLost             no ProjectorError, since it says nothing of what was to be merged: only a new process helps

Every error carries `.reason`, a word from a closed list that serves as metric label and registry value, and `.hint`,
what the person should do next. `str(error)` says what is wrong and where.
"""

from enum import StrEnum


class Reason(StrEnum):
    """Why the projector refused something."""

    TRUNCATED = "truncated"
    BAD_HEADER = "bad_header"
    UNSUPPORTED_DTYPE = "unsupported_dtype"
    MISSING_TENSOR = "missing_tensor"
    UNEXPECTED_TENSOR = "unexpected_tensor"
    WRONG_SHAPE = "wrong_shape"
    WRONG_BASE = "wrong_base"
    NOT_FINITE = "not_finite"
    BAD_SIDECAR = "bad_sidecar"
    BAD_PARAMETER = "bad_parameter"
    UNKNOWN_METHOD = "unknown_method"
    OVER_BUDGET = "over_budget"
    DEVICE_LOST = "device_lost"


class ProjectorError(Exception):
    """Something the projector refuses, with the reason as one word and a hint for the person."""

    def __init__(self, reason: Reason, detail: str, hint: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.hint = hint


class BadFile(ProjectorError):
    """The bytes are not a well-formed safetensors file. fd: the descriptor they came from, where that is known."""

    fd: int | None = None


class BadSchema(ProjectorError):
    """Names, shapes or dtypes differ from the base's."""


class BadValues(ProjectorError):
    """A value is NaN or infinite, or becomes so in the arithmetic, or cannot be what it is given as."""


class BadMerged(BadValues):
    """A merged value is NaN or infinite, or does not fit: by what the expert brought, or by what the state held."""


class BadParameter(ProjectorError):
    """A method's parameter is outside its range, or unknown."""

    def __init__(self, detail: str, hint: str) -> None:
        super().__init__(Reason.BAD_PARAMETER, detail, hint)


class UnknownMethod(ProjectorError):
    """No installed method has that name."""

    def __init__(self, detail: str, hint: str) -> None:
        super().__init__(Reason.UNKNOWN_METHOD, detail, hint)


class OverBudget(ProjectorError):
    """One step of the work needs more memory than the budget allows for all of them."""

    def __init__(self, detail: str, hint: str) -> None:
        super().__init__(Reason.OVER_BUDGET, detail, hint)


class DeviceLost(Exception):
    """The CUDA context is gone: nothing that this process asks of the device succeeds any more."""

    reason = Reason.DEVICE_LOST

    def __init__(self, detail: str, hint: str) -> None:
        super().__init__(detail)
        self.hint = hint
