"""Runs a command for as long as somebody holds the other end of a pipe: a process of its own, `python leash.py FD`,
which processes.py starts as the leader of a session and process group.

Through the pipe comes what to run, in JSON: {"command", "folder", "environment"}. Once the other end is closed, and be
it because its process was killed, the whole group is killed, this process too. It ends as the command ended.

Nothing but the standard library is imported, so that it starts fast and in any environment.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from threading import Thread
from typing import BinaryIO

NOT_FOUND, NOT_RUN = 127, 126  # as shells have it


def main(pipe: BinaryIO) -> int:
    """Runs what comes through the pipe; the exit status."""
    job = json.loads(pipe.readline())
    Thread(target=_hold, args=(pipe,), daemon=True).start()
    try:
        status = subprocess.run(job["command"], cwd=job["folder"], env=job["environment"], check=False).returncode
    except OSError as error:
        print(f"{job['command'][0]} cannot be run: {error.strerror}", file=sys.stderr)
        return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_RUN
    if status < 0:  # ended by a signal: the same ends us, and leaves no second core
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError):  # SIGKILL is nobody's to handle
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def _hold(pipe: BinaryIO) -> None:
    pipe.read()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    status = main(os.fdopen(int(sys.argv[1]), "rb"))
    sys.stderr.flush()
    os._exit(status)  # a thread still reads
