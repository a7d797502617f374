"""The version that an expert was trained from: named in its expert.json, and read where a head goes by it."""

from contextlib import ExitStack
from dataclasses import dataclass

from daemon.checkpoints.checkpoint import OpenCheckpoint, open_path
from daemon.checkpoints.expert_json import ABOUT, About
from daemon.errors import BadHome, DaemonError, Reason, Refused
from daemon.layout import Home, is_weights
from daemon.manifest import FileEntry, Manifest
from daemon.notation import called
from daemon.versions.checking import problems
from projector.errors import ProjectorError
from projector.files.source import Checkpoint
from projector.watch import Watch
from registry.reader import Reader
from registry.records import Expert, Version

ADAPTER_KIND = "adapter"


def named_version(reader: Reader, about: About | None) -> Version | None:
    """The version that an expert.json names, also one whose files were collected; None where it names none. The base's
    sha256 is version 0 of the first head. Raises Refused where there is no such version.
    """
    words = about.trained_from if about else None
    if words is None:
        return None
    heads = {head.name: head for head in reader.heads()}
    first = next(iter(heads))
    head, slash, number = words.partition("/")
    if not slash:
        if words != reader.base().sha256:
            raise _unknown(f"no version is called {words}", called(first, heads[first].live))
        head, number = first, "0"
    if head not in heads:
        raise _unknown(f"there is no head {head}", called(first, heads[first].live))
    version = reader.version(head, int(number)) if int(number) <= heads[head].newest else None
    if version is None:
        raise _unknown(f"there is no version {called(head, int(number))}", called(head, heads[head].live))
    return version


def noted_version(reader: Reader, expert: Expert) -> Version | None:
    """The version that an expert of the registry was trained from, as was noted when it was merged; None where it named
    none. Raises BadHome where nobody noted what it names, and its task vector depends on that.
    """
    if expert.trained_head is not None and expert.trained_version is not None:
        return reader.version(expert.trained_head, expert.trained_version)
    named = (expert.about or {}).get("trained_from")
    if named and expert.kind != ADAPTER_KIND:
        raise BadHome(
            f"expert {expert.id} ({expert.name}) was trained from {named}, which is no version of this home",
            "leave it out with --without, or take a head with relative_to=base",
        )
    return None


@dataclass(frozen=True)
class Start:
    """A version that an expert was trained from, and the home that has its files."""

    home: Home
    version: Version

    def opened(self, expert: OpenCheckpoint, files: ExitStack, watch: Watch) -> "TrainedFrom | None":
        """Its weights, for a head whose task vectors are what was trained since; None where these are what they are
        from the base on: an adapter is what it adds, wherever it was trained, and version 0 is the base.
        """
        if expert.kind == ADAPTER_KIND or not self.version.number:
            return None
        return TrainedFrom(self.home, self.version, files, watch)

    def noted(self, home: Home, reader: Reader) -> tuple[str, int] | tuple[None, None]:
        """How the registry of a home says it: by head and number, where that home has the same version."""
        if home.root == self.home.root:
            return self.version.head, self.version.number
        version = reader.version(self.version.head, self.version.number)
        if version is None or _weights(home, version) != _weights(self.home, self.version):
            return None, None
        return version.head, version.number


class TrainedFrom:
    """The published weights of that version, open until `files` closes.

    `confirm` once they are read: it says that they are what was published. Both raise Refused, for the expert can wait
    in quarantine until the version is mended.
    """

    def __init__(self, home: Home, version: Version, files: ExitStack, watch: Watch) -> None:
        self._called = called(version.head, version.number)
        wrong = problems(home, version, hashes=False, extras=False, state=False)
        if version.collected or wrong:
            raise self._refused(wrong[0] if wrong else "retention removed its files")
        try:
            self._opened = files.enter_context(open_path(home.version(version.head, version.number), watch))
        except (DaemonError, ProjectorError) as error:
            raise self._refused(str(error)) from error
        self._listed = Manifest.read(home.manifest(version.head, version.number).read_bytes()).files

    @property
    def tensors(self) -> Checkpoint:
        return self._opened.tensors

    def confirm(self) -> None:
        """Hashes what was not read; nearly all of it was."""
        for file in self._opened.files:
            if file.reader.sha256() != self._listed[file.name].sha256:
                raise self._refused(f"the sha256 of {file.name} is not its manifest's")
        if not self._opened.unchanged():
            raise self._refused("its files were touched while they were read")

    def _refused(self, why: str) -> Refused:
        return Refused(
            Reason.TRAINED_FROM,
            f"a head takes it as what was trained since {self._called}, which cannot be read: {why}",
            f"mend that version (`mainstem verify` has how), or let trained_from in {ABOUT} name one whose files are"
            " kept and train from there; retention.versions says how many are",
        )


def _weights(home: Home, version: Version) -> list[FileEntry] | None:
    """The weights' files of a version by its manifest; None where that is gone."""
    try:
        manifest = Manifest.read(home.manifest(version.head, version.number).read_bytes(), version.manifest_sha256)
    except (OSError, ValueError):
        return None
    return [file for name, file in sorted(manifest.files.items()) if is_weights(name)]


def _unknown(what: str, example: str) -> Refused:
    return Refused(
        Reason.TRAINED_FROM,
        f"{ABOUT}: trained_from: {what}",
        f"let it name the version that the training started from, as {example}: its manifest.json has head and number;"
        " or leave trained_from out",
    )
