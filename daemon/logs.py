"""The log: coloured lines on a terminal, JSON lines otherwise, always on standard error."""

import logging
import sys

import structlog

from daemon.config import Log


def configure(settings: Log) -> None:
    """Sets up structlog for this process."""
    logging.getLogger("watchdog").setLevel(logging.CRITICAL)  # it reports its own stopping as a warning
    console = settings.format == "console" or (settings.format == "auto" and sys.stderr.isatty())
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
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
