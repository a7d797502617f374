"""The scores of what is there already: of versions, and of experts by themselves."""

from collections.abc import Callable
from threading import Event
from uuid import uuid4

from daemon.arrivals.admission import naming_of
from daemon.checkpoints.checkpoint import open_path
from daemon.compute.progress import Progress
from daemon.compute.resources import driver
from daemon.config import Settings
from daemon.disk import durable
from daemon.errors import BadConfig, BadHome
from daemon.evaluation.scoring import Scoring, told
from daemon.home.ground import Base
from daemon.layout import BY_ITSELF, Home
from daemon.manifest import Manifest
from daemon.merge.folding import Folding
from daemon.notation import called
from daemon.versions.sealing import stage
from registry.reader import Reader
from registry.records import Evaluation, Expert, NewEvaluation, Version

Keep = Callable[[NewEvaluation, Version | Expert], None]
"""Keeps an evaluation in the registry, as that of a version or of an expert by itself."""


class Evaluating:
    """Asks the evaluator of a home, which may be in use. Raises BadConfig where none is set."""

    def __init__(self, home: Home, reader: Reader, settings: Settings, keep: Keep) -> None:
        if not settings.evaluate.command:
            raise BadConfig(
                "evaluate.command is not set: nobody knows how to score",
                'set it in mainstem.toml, for example command = ["python", "score.py", "{folder}"]',
            )
        self._home = home
        self._reader = reader
        self._settings = settings
        self._keep = keep

    def version(self, version: Version, *, again: bool = False) -> Evaluation:
        """The scores of a version; anew where they are asked for `again`. Raises BadHome where its files are gone, and
        NoScores.
        """
        name = called(version.head, version.number)
        path = self._home.manifest(version.head, version.number)
        if version.collected or not path.exists():
            raise BadHome(
                f"the files of {name} were removed by retention", "`mainstem log --versions` lists the others"
            )
        files = list(Manifest.read(path.read_bytes()).files.values())
        expert = self._reader.expert(version.expert_id) if version.expert_id else None
        said = told(expert, head=version.head, version=version.number, parent=version.parent)
        log = self._home.evaluation_log(version.head, version.number)
        found = self._scoring(version).of(name, files, path.parent, said, log, again=again)
        return self._noted(found, version)

    def expert(self, expert: Expert, *, again: bool = False) -> Evaluation:
        """The scores of an expert by itself, out of the archive. Raises BadHome where it is gone, and NoScores."""
        path = self._home.archived(expert.id)
        if path is None:
            raise BadHome(f"expert {expert.id} ({expert.name}) is not in the archive", "only what is there is scored")
        progress = Progress(Event(), lambda _: None)
        folder = self._home.tmp / uuid4().hex
        try:
            with (
                Base(self._home, self._reader, progress) as base,
                open_path(path, progress, follow=False, naming=naming_of(expert, self._settings.admission)) as read,
            ):
                read.check(base.tensors)
                base.check()
                folding = Folding(base, self._settings.publish, driver(self._settings.compute, progress))
                written = folding.alone(read, folder)
                base.confirm()
                stage(self._home, written, base.beside)
            log = self._home.evaluation_log(BY_ITSELF, expert.version or 0)
            scoring, name = self._scoring(expert), expert.name
            found = scoring.of(name, written.weights, written.published, told(expert), log, again=again)
            return self._noted(found, expert)
        finally:
            durable.remove(folder)

    def _noted(self, found: Evaluation, of: Version | Expert) -> Evaluation:
        """What was scored before, perhaps under another name, is noted as its own too."""
        if of.evaluation != found.id:
            known = NewEvaluation(found.weights_sha256, found.command_sha256, found.scores, found.seconds)
            self._keep(known, of)
        return found

    def _scoring(self, of: Version | Expert) -> Scoring:
        def keep(new: NewEvaluation) -> Evaluation:
            self._keep(new, of)
            kept = self._reader.evaluated(new.weights_sha256, new.command_sha256)
            assert kept
            return kept

        return Scoring(self._home, self._reader, self._settings.evaluate, keep)
