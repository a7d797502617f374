"""The command line: one verb per file."""

from daemon.cli.app import main

__all__ = ["main"]
