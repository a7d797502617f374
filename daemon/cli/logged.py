"""What ends a long-running command: a line of its log, where the log is JSON lines."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from daemon.errors import DaemonError
from projector.errors import DeviceLost, ProjectorError
from registry.errors import RegistryError

KNOWN = (DaemonError, ProjectorError, RegistryError, DeviceLost)
SAFE = "see the message; what was already published is safe"


@contextmanager
def logged(config: Path | None) -> Iterator[None]:
    """Sets the log up by what that mainstem.toml and the environment say of it, as far as they can be read. Where it is
    JSON lines, whatever is raised inside is the last of them, and exit status 1.
    """
    from daemon.config import log_of
    from daemon.logs import configure, is_json

    configure(log_of(config))
    try:
        yield
    except Exception as error:
        if not is_json():
            raise
        import structlog

        log = structlog.get_logger()
        if isinstance(error, KNOWN):
            log.critical("ended by an error", error=str(error), reason=str(error.reason), hint=error.hint)
        elif isinstance(error, OSError):
            log.critical("ended by an error", error=str(error), hint=SAFE)
        else:
            log.critical("ended by a fault of the program", error=repr(error), exc_info=True, hint=SAFE)
        sys.exit(1)
