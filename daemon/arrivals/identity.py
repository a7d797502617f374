"""Which merged expert an arrival is once more: by its files, or by its tensors in other files."""

from daemon.arrivals.admission import naming_of
from daemon.checkpoints.checkpoint import OpenCheckpoint, open_path
from daemon.config import Settings
from daemon.disk import durable
from daemon.errors import BadHome, DaemonError
from daemon.layout import Home
from projector.errors import ProjectorError
from projector.files.source import Checkpoint
from projector.watch import SILENT, Watch
from registry.reader import Reader
from registry.records import Expert
from registry.store import Store

SAME_NORM = 1e-9  # relative: float64 sums of the same numbers, in whatever order and on whatever device


def twin_of(
    home: Home,
    reader: Reader,
    expert: OpenCheckpoint,
    norm: float,
    base: Checkpoint,
    settings: Settings,
    *,
    again: bool,
    watch: Watch = SILENT,
) -> Expert | None:
    """The merged expert that this one is, if any. again: it was merged before, and only the same files are the same.

    Merged experts of which nobody noted what they do to the base (an earlier mainstem did not) are looked up in the
    archive where they have the same norm; a Store is told what was found.
    """
    if twin := reader.merged(expert.identity()):
        return twin
    if again:
        return None
    content = expert.content()
    for older in reader.without_content(norm * (1 - SAME_NORM), norm * (1 + SAME_NORM)):
        found = _archived_content(home, older, base, settings, watch)
        if found and isinstance(reader, Store):
            reader.note_content(older.id, found)
        if found == content:
            return older
    before = expert.older_content(base)
    return reader.merged_content(content) or (reader.merged_content(before) if before else None)


def _archived_content(home: Home, expert: Expert, base: Checkpoint, settings: Settings, watch: Watch) -> str | None:
    """What a merged expert does to the base; None where it is not in the archive any more, or not as it was."""
    path = home.archived(expert.id)
    if path is None:
        return None
    try:
        naming = naming_of(expert, settings.admission)
        with open_path(path, watch, follow=False, naming=naming) as archived:
            archived.check(base)
            archived.digest_tensors()
            return archived.content() if archived.identity() == expert.sha256 else None
    except (FileNotFoundError, NotADirectoryError, DaemonError, ProjectorError):
        return None
    except OSError as error:
        if durable.is_short(error):
            raise
        raise BadHome(
            f"{path} cannot be read ({error.strerror}), and an expert came that may be the same",
            "look for errors of the disk; put it back from a backup, or move it out of archive/, then start again",
        ) from error
