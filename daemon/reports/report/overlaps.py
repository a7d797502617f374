"""The cosines between experts' task vectors, read from the archive: nothing that a head keeps has them.

Each of k experts is read once, k at a time, and of each at most MOST_BYTES.
"""

from collections.abc import Callable
from contextlib import ExitStack
from math import sqrt
from threading import Event

from daemon.arrivals.admission import naming_of
from daemon.checkpoints.checkpoint import open_path
from daemon.compute.progress import Progress
from daemon.config import load
from daemon.errors import DaemonError
from daemon.layout import Home
from daemon.reports.report.gathering import Overlap
from projector.driver.measure import products
from projector.errors import ProjectorError
from projector.files.source import Checkpoint
from registry.reader import Reader
from registry.records import Status

MOST_BYTES = 256 << 20  # of one expert
MOST_FILES = 400  # held open at once


def overlap(
    home: Home,
    reader: Reader,
    most: int,
    most_bytes: int = MOST_BYTES,
    report: Callable[[float], None] = lambda _: None,
) -> Overlap:
    """The newest `most` experts that are merged, or fewer where they have many files. report: hears the share done."""
    naming = load(home.config).admission
    names: list[str] = []
    left_out: list[str] = []
    opened: list[Checkpoint] = []
    files = 0
    try:
        with ExitStack() as closing:
            base = closing.enter_context(open_path(home.base))
            for expert in reader.experts(Status.MERGED, most):
                path = home.archived(expert.id)
                try:
                    if path is None or files > MOST_FILES:
                        raise FileNotFoundError
                    one = closing.enter_context(open_path(path, follow=False, naming=naming_of(expert, naming)))
                    one.check(base.tensors)
                except (DaemonError, ProjectorError, OSError):
                    left_out.append(expert.name)
                    continue
                files += len(one.files)
                names.append(expert.given_name or expert.name)
                opened.append(one.tensors)
            if len(opened) < 2:
                return Overlap(left_out=left_out)
            watch = Progress(Event(), report)
            watch.begin(base.size_bytes)
            found, share = products(base.tensors, opened[::-1], most_bytes, watch)
    except (DaemonError, ProjectorError, OSError) as error:
        return Overlap(failed=str(error))
    norms = [sqrt(value) for value in found.diagonal().tolist()]
    cosines = [
        [max(-1.0, min(1.0, value / (a * b))) if a and b else None for value, b in zip(row, norms, strict=True)]
        for row, a in zip(found.tolist(), norms, strict=True)
    ]
    return Overlap(names[::-1], cosines, share, left_out[::-1])
