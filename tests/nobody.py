"""What an unprivileged process meets. The tests mostly run as root, whom no mode stops."""

import os
from collections.abc import Callable

NOBODY = 65534


def as_nobody(ask: Callable[[], str]) -> str:
    """What such a process is told, in a fork: it has everything imported, and the interpreter's own files may be closed
    to that user. Where it raises, what it raised.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            answer = ask()
        except BaseException as error:
            answer = repr(error)
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said
