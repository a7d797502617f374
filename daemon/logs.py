"""The log: coloured lines on a terminal, JSON lines otherwise, always on standard error."""

import logging
import sys
from contextlib import suppress
from typing import Any, TextIO, cast

import structlog

from daemon.config import Log


class Unfailing:
    """A stream whose every write succeeds: a terminal that is gone, a pipe that nobody reads or a full disk under the
    log is no reason to end a merge. What cannot be written is lost.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Takes the text, whatever becomes of it."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Writes what is held back, as far as that can be."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def standard_error() -> TextIO:
    """Standard error, as a stream that never fails."""
    return cast(TextIO, Unfailing(sys.stderr))


def _is_console(settings: Log) -> bool:
    return settings.format == "console" or (settings.format == "auto" and sys.stderr.isatty())


def is_json() -> bool:
    """True where the log was set up, as lines of JSON."""
    processors = structlog.get_config()["processors"] if structlog.is_configured() else []
    return any(isinstance(processor, structlog.processors.JSONRenderer) for processor in processors)


def configure(settings: Log) -> None:
    """Sets up structlog for this process."""
    logging.getLogger("watchdog").setLevel(logging.CRITICAL)  # it reports its own stopping as a warning
    console = _is_console(settings)
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()) if console else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if console else [structlog.processors.format_exc_info]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[settings.level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(standard_error()),
    )
