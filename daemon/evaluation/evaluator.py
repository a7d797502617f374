"""Runs the evaluator on a folder: the operator's command, in a process group of its own that ends with us."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon.config import Evaluate
from projector.watch import SILENT, Watch
from registry.records import Scores


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What a run gave: the scores, how long it took, and the end of what it wrote (both streams, as they came)."""

    scores: Scores
    seconds: float
    log: bytes


def command_sha256(settings: Evaluate) -> str:
    """What the scores depend on beside the weights: of the command and its environment."""
    raise NotImplementedError


class Evaluator:
    """The command of `[evaluate]`. It runs in the home, by which a relative path in it is meant."""

    def __init__(
        self, settings: Evaluate, home: Path, watch: Watch = SILENT, hear: Callable[[str], None] = lambda _: None
    ) -> None:
        """watch: its `advance(0)` is called some times a second, and what that raises (Abandoned) ends the command.
        hear: is told each line of its standard error, as it comes.
        """
        self._settings, self._home, self._watch, self._hear = settings, home, watch, hear

    def run(self, folder: Path, description: Mapping[str, Any]) -> Evaluated:
        """The scores of what lies in `folder`. description: goes to the command's standard input, as JSON.

        Raises NoScores (its `.log` is the end of what the command wrote) where it failed, took longer than
        timeout_seconds or gave no scores, and what the watch raises. However this returns, the command and its group
        are gone.
        """
        raise NotImplementedError
