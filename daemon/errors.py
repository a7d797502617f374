"""The daemon's error tree.

    DaemonError
    ├── Refused       an expert that goes to quarantine
    ├── NotYet        an expert that is not complete, or changed while it was read: it stays in the inbox
    ├── Failed        an expert that could not be worked on, for now: it is tried again, and refused after some tries
    ├── NotUploaded   an upload over HTTP that is not taken, or not to its end: nothing of it is left
    ├── NoScores      the evaluator failed: nobody knows how good a version is, which is no fault of its expert
    ├── NoAnswer      the command of `rebuild --adamerging` failed, or answered what is none
    ├── BadHome       HOME is missing, in use, damaged or from another version
    │   └── Unanswered  another process has it, and did not answer: the same may be asked again
    └── BadConfig     a setting is unknown or outside its range

Each carries `.reason` (a closed list: metric label and registry value) and `.hint`. The reasons of the projector
(`projector.errors.Reason`) and these together are everything that `reason` can say.
"""

from enum import StrEnum

from projector.errors import Reason as ProjectorReason


class Reason(StrEnum):
    """Why the daemon refused something, beside the projector's reasons."""

    PICKLE = "pickle"
    LFS_POINTER = "lfs_pointer"
    UNREADABLE = "unreadable"
    SYMLINK = "symlink"
    NOT_A_FILE = "not_a_file"
    NO_WEIGHTS = "no_weights"
    BAD_INDEX = "bad_index"
    ADAPTER = "adapter"
    MODULE = "module"
    MISSING_SIDECAR = "missing_sidecar"
    BAD_ABOUT = "bad_about"
    TRAINED_FROM = "trained_from"
    EQUALS_BASE = "equals_base"
    FOREIGN_BASE = "foreign_base"
    NORM_OUTLIER = "norm_outlier"
    SCORES = "scores"
    FAULT = "fault"
    INCOMPLETE = "incomplete"
    AMBIGUOUS = "ambiguous"
    CHANGED = "changed"
    UNKNOWN = "unknown"
    HOME = "home"
    CONFIG = "config"
    PULL = "pull"
    CONVERT = "convert"
    ZIPIT = "zipit"
    EVALUATION = "evaluation"
    UPLOAD_NAME = "upload_name"
    UPLOAD_TAKEN = "upload_taken"
    UPLOAD_MISSING = "upload_missing"
    UPLOAD_UNFINISHED = "upload_unfinished"
    UPLOAD_DIGEST = "upload_digest"
    UPLOAD_SIZE = "upload_size"
    UPLOAD_SPACE = "upload_space"
    UPLOAD_LIMIT = "upload_limit"


RESUMABLE = (ProjectorReason.TRUNCATED, Reason.INCOMPLETE, Reason.UNREADABLE)
"""What whoever drops it may still be busy with, however long nothing happens."""


class DaemonError(Exception):
    """What went wrong (`str`), as one word (`reason`), and what to do (`hint`)."""

    def __init__(self, reason: Reason | ProjectorReason, detail: str, hint: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.hint = hint


class Refused(DaemonError):
    """The expert can never be merged as it is: quarantine."""


class NotYet(DaemonError):
    """The expert may become good: leave it in the inbox and look again."""


class Failed(DaemonError):
    """Something went wrong with the expert in hand that nobody foresaw: it is tried again, a few times."""


class NotUploaded(DaemonError):
    """An upload over HTTP is not taken, or not to its end."""


class UploadsBusy(NotUploaded):
    """As many files come as may at the same time: it passes."""


class NoScores(DaemonError):
    """The evaluator failed, took too long or gave no scores; `log` is the end of what it wrote."""

    def __init__(self, detail: str, hint: str, log: bytes = b"") -> None:
        super().__init__(Reason.EVALUATION, detail, hint)
        self.log = log


class NoAnswer(DaemonError):
    """What runs the model while coefficients are learned failed, took too long or answered what is no answer."""

    def __init__(self, detail: str, hint: str) -> None:
        super().__init__(Reason.EVALUATION, detail, hint)


class BadHome(DaemonError):
    """HOME cannot be used as it is."""

    def __init__(self, detail: str, hint: str) -> None:
        super().__init__(Reason.HOME, detail, hint)


class Unanswered(BadHome):
    """Another process has HOME, and did not answer what it was asked."""


class BadConfig(DaemonError):
    """A setting is unknown or outside its range."""

    def __init__(self, detail: str, hint: str) -> None:
        super().__init__(Reason.CONFIG, detail, hint)
