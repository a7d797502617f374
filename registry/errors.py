"""The registry's error tree.

    RegistryError
    ├── Missing           no registry is there
    ├── AlreadyThere      a new registry would overwrite a file
    ├── NotOurs           the file is no registry of mainstem
    ├── WrongRevision     written by another mainstem, newer than this one or not yet migrated
    ├── NoAccess          the file or its folder cannot be opened, or not be written
    ├── Damaged           the database contradicts itself
    ├── Busy              somebody else held the lock for too long
    ├── DiskFull          no room; nothing has changed
    ├── StorageFailed     the disk failed: what was last written is unknown until the next start
    ├── StaleHead         a head is not where the new version expects it; nothing has changed
    ├── AlreadyMerged     an expert with the same bytes is in the lineage; nothing has changed
    └── BadRecord         the caller's record makes no sense; nothing has changed

Every error carries `.reason`, a word from a closed list, and `.hint`, what the person should do next. `str(error)` says
what is wrong and where.
"""

from enum import StrEnum
from typing import ClassVar


class Reason(StrEnum):
    """Why the registry refused, or failed."""

    MISSING = "registry_missing"
    ALREADY_THERE = "registry_already_there"
    NOT_OURS = "registry_not_ours"
    WRONG_REVISION = "registry_wrong_revision"
    NO_ACCESS = "registry_no_access"
    DAMAGED = "registry_damaged"
    BUSY = "registry_busy"
    DISK_FULL = "registry_disk_full"
    STORAGE_FAILED = "registry_storage_failed"
    STALE_HEAD = "stale_head"
    ALREADY_MERGED = "already_merged"
    BAD_RECORD = "bad_record"


class RegistryError(Exception):
    """What went wrong (`str`), as one word (`reason`), and what to do (`hint`). Only its subclasses are raised."""

    reason: ClassVar[Reason]

    def __init__(self, detail: str, hint: str) -> None:
        super().__init__(detail)
        self.hint = hint


class Missing(RegistryError):
    """No registry is there."""

    reason = Reason.MISSING


class AlreadyThere(RegistryError):
    """A new registry would overwrite a file."""

    reason = Reason.ALREADY_THERE


class NotOurs(RegistryError):
    """The file is no registry of mainstem."""

    reason = Reason.NOT_OURS


class WrongRevision(RegistryError):
    """The registry was written by a newer mainstem, or an older one and is opened only for reading."""

    reason = Reason.WRONG_REVISION


class NoAccess(RegistryError):
    """The file or its folder cannot be opened, or not be written."""

    reason = Reason.NO_ACCESS


class Damaged(RegistryError):
    """The database contradicts itself."""

    reason = Reason.DAMAGED


class Busy(RegistryError):
    """Somebody else held the lock for too long."""

    reason = Reason.BUSY


class DiskFull(RegistryError):
    """No room on the disk; nothing has changed."""

    reason = Reason.DISK_FULL


class StorageFailed(RegistryError):
    """The disk failed. Whether the last write counts is known only after the next start: stop, do not retry."""

    reason = Reason.STORAGE_FAILED


class StaleHead(RegistryError):
    """A head is not where the new version expects it; nothing has changed."""

    reason = Reason.STALE_HEAD


class AlreadyMerged(RegistryError):
    """An expert with the same bytes is in the lineage; nothing has changed."""

    reason = Reason.ALREADY_MERGED


class BadRecord(RegistryError):
    """The caller's record makes no sense; nothing has changed."""

    reason = Reason.BAD_RECORD
