"""Copies what others may still write to, by descriptor: no link is followed, and nothing that is no file is opened."""

import os
import stat
from contextlib import ExitStack

from daemon.checkpoints.opening import open_entry
from daemon.disk import durable
from daemon.disk.durable import COPY_BYTES, MOST_LEVELS, Folder
from daemon.errors import NotYet, Reason, Refused
from projector.watch import SILENT, Watch


def copy_entry(source_fd: int, name: str, target: Folder, watch: Watch = SILENT, level: int = 0) -> None:
    """A durable copy of a file, or of a folder and all in it, under the same name in `target`.

    What may not be read, links, and what is neither file nor folder are left out. `watch` hears of each piece, and may
    put an end to it. Raises OSError, or NotYet where something went meanwhile.
    """
    if level > MOST_LEVELS:
        return
    with ExitStack() as closing:
        try:
            fd = open_entry(source_fd, name, False, closing)
        except (Refused, NotYet) as error:
            if error.reason is Reason.CHANGED:
                raise
            return
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            with target.make(name) as folder:
                for inside in sorted(os.listdir(fd)):
                    copy_entry(fd, inside, folder, watch, level + 1)
                folder.sync()
        else:
            _copy_file(fd, name, target, watch)


def _copy_file(fd: int, name: str, target: Folder, watch: Watch) -> None:
    copy, done = target.create(name, os.fstat(fd).st_size), 0
    try:
        while chunk := os.pread(fd, COPY_BYTES, done):
            durable.write_at(copy, chunk, done)
            done += len(chunk)
            watch.advance(0)  # of what is merged it is nothing
        durable.sync(copy)
    finally:
        durable.close(copy)
