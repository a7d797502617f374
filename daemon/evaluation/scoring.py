"""Scores of weights, taken once: they are kept by the sha256 of the weights and of the command.

Hence what was scored before a crash is not scored again after it, and a version that is restored has its scores.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from stat import S_ISREG
from threading import Lock
from typing import Any

import structlog

from daemon.checkpoints.opening import stamp
from daemon.config import Evaluate
from daemon.disk import durable
from daemon.errors import BadHome, NoScores
from daemon.evaluation.evaluator import Evaluator, command_sha256
from daemon.layout import Home, is_weights
from daemon.manifest import FileEntry
from projector.text import listed, shown
from projector.watch import SILENT, Watch
from registry.reader import Reader
from registry.records import Evaluation, NewEvaluation, NewExpert, Scores, plain_scores

Keep = Callable[[NewEvaluation], Evaluation]
"""Keeps an evaluation in the registry: the store's own, or by way of the daemon that holds the home."""


def weights_sha256(files: Iterable[FileEntry]) -> str:
    """Of the weights among these files, by their names and digests."""
    weights = sorted((file.name, file.sha256) for file in files if is_weights(file.name))
    return hashlib.sha256(json.dumps(weights).encode()).hexdigest()


def told(
    expert: NewExpert | None = None,
    *,
    head: str | None = None,
    version: int | None = None,
    parent: int | None = None,
    scores: Mapping[str, Scores] = {},
) -> dict[str, Any]:
    """What the evaluator is told of a version, or of an expert by itself: that has no head and no number. scores: those
    that are known by then, by whose they are.
    """
    return {
        "head": head,
        "version": version,
        "parent": parent,
        "expert": _described(expert) if expert else None,
        "scores": {whose: plain_scores(found) for whose, found in scores.items()},
    }


def _described(expert: NewExpert) -> dict[str, Any]:
    return {
        "name": expert.name,
        "sha256": expert.sha256,
        "kind": expert.kind,
        "norm": expert.norm,
        "expert.json": dict(expert.about) if expert.about else None,
    }


class Scoring:
    """The evaluator of one home, and what it said before."""

    def __init__(self, home: Home, reader: Reader, settings: Evaluate, keep: Keep, watch: Watch = SILENT) -> None:
        self._home = home
        self._reader = reader
        self._keep = keep
        self._settings = settings
        self._watch = watch
        self._command = command_sha256(settings)
        self._log = structlog.get_logger()
        self._keeping = Lock()

    def known(self, files: Sequence[FileEntry]) -> Evaluation | None:
        """What the evaluator said of these weights before, if it was asked in the same way."""
        return self._reader.evaluated(weights_sha256(files), self._command)

    def of(
        self,
        called: str,
        files: Sequence[FileEntry],
        folder: Path,
        description: Mapping[str, Any],
        log: Path,
        *,
        again: bool = False,
    ) -> Evaluation:
        """The scores of the version in `folder`, whose files these are; from before, where there are any and they are
        not asked for `again`.

        called: in the log. log: the file for what the evaluator writes. Raises NoScores where it gives none, BadHome
        where it changed what it was to score, and what the watch raises.
        """
        if not again and (found := self.known(files)):
            return found
        said = self._log.bind(of=called)
        said.info("evaluating", command=list(self._settings.command))
        before = _stamps(folder)
        evaluator = Evaluator(
            self._settings, self._home.root, self._watch, lambda line: said.info("evaluator", said=line)
        )
        try:
            given = evaluator.run(folder, {"folder": str(folder), **description})
        except NoScores as error:
            _write(log, error.log)
            raise
        finally:
            _check_untouched(folder, before)
        _write(log, given.log)
        with self._keeping:
            made = self._keep(NewEvaluation(weights_sha256(files), self._command, given.scores, given.seconds))
        for task, score in given.scores.items():
            said.info("scored", task=shown(task), score=score.score, n=score.n, stderr=score.stderr)
        return made


def _write(log: Path, text: bytes) -> None:
    durable.make_folder(log.parent)
    durable.note(log, text)


def _stamps(folder: Path) -> dict[str, tuple[int, ...]]:
    """Everything in a folder and in those below it; of files what changes when they are written to. Not the time of
    the inode: somebody may make a link.
    """
    found = {path.relative_to(folder).as_posix(): path.lstat() for path in folder.rglob("*")}
    return {name: stamp(status)[: 4 if S_ISREG(status.st_mode) else 2] for name, status in found.items()}


def _check_untouched(folder: Path, before: Mapping[str, tuple[int, ...]]) -> None:
    """The evaluator runs as we do, and could write into what is about to be published. What it left there goes."""
    after = _stamps(folder)
    for name in sorted(after.keys() - before.keys()):
        durable.remove(folder / name)
    if changed := [name for name, was in before.items() if after.get(name) != was]:
        raise BadHome(
            f"the evaluator changed what it was to score: {listed(changed)}",
            "nothing was published, and no expert is to blame: let evaluate.command write elsewhere, as into {output}",
        )
