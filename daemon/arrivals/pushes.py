"""Experts that are pushed in commits, as to a Hub: which file each path is, and when they are an expert.

    state/uploads/NAME/FILE            a file that came, called after its sha256 or after nothing
    state/uploads/NAME/push.json       what the last commit made of them: a file for each path
    state/uploads/NAME/NAME/           the expert, laid out, just before it enters the inbox
    state/uploads/NAME/laid-out.json   push.json, once that is all there

A commit is answered once push.json is durable, so what was committed outlives the process, and nothing else does. A
push becomes an expert when a time has passed without another commit, or at once with a commit that brings _READY.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from daemon.arrivals.receiving import Stored, check_name
from daemon.checkpoints.opening import READY_MARKER
from daemon.checkpoints.unfinished import TEMPORARY
from daemon.checkpoints.weight_names import NOT_OF_A_MODEL, OF_A_MODEL
from daemon.disk import durable
from daemon.errors import NotUploaded, Reason
from projector.text import listed, shown

COMMITTED = "push.json"
LAID_OUT = "laid-out.json"
MOST_PATHS = 1000
DEEPEST = 8  # folders, one in the other
TRAINING = "Training in progress"  # how the Trainer of transformers begins the message of a save that is not the last
MORE_SECONDS = 3600.0  # without another commit, where others should follow: then it is what it is
SHARD = re.compile(r"(?P<model>.+)-\d{5}-of-(?P<of>\d{5})(?P<suffix>\.\w+)")


@dataclass(frozen=True)
class Push:
    """What the commits so far made of an expert: the file, as it came, of each path. summary: of the last one."""

    paths: Mapping[str, Stored] = field(default_factory=dict)
    summary: str = ""

    @property
    def commit(self) -> str:
        """40 digits that are the same for the same files."""
        lines = [f"{stored.sha256} {path}\n" for path, stored in sorted(self.paths.items())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:40]

    @property
    def is_expert(self) -> bool:
        """Whether there are weights: a model card alone is none."""
        return any(path.endswith(OF_A_MODEL) and Path(path).name not in NOT_OF_A_MODEL for path in self.paths)

    @property
    def is_ready(self) -> bool:
        return READY_MARKER in self.paths

    def quiet_seconds(self, usual: float) -> float:
        """How long no other commit may follow before it is an expert."""
        more = self.summary.startswith(TRAINING) or self._lacks_shards()
        return max(usual, MORE_SECONDS) if more else usual

    def _lacks_shards(self) -> bool:
        """Whether some shards of a model have come, and others not: clients send a large one in several commits."""
        shards = [found for path in self.paths if path.endswith(OF_A_MODEL) and (found := SHARD.fullmatch(path))]
        came = Counter((found["model"], found["of"], found["suffix"]) for found in shards)
        return any(count < int(of) for (_, of, _), count in came.items())

    def changed(self, added: Mapping[str, Stored], removed: Collection[str], summary: str) -> Self:
        """After one commit more; what is removed and ends in a slash is a folder. Raises NotUploaded."""
        gone = [path for path in self.paths if any(path == one or _is_below(path, one) for one in removed)]
        paths = {path: stored for path, stored in self.paths.items() if path not in gone} | dict(added)
        if len(paths) > MOST_PATHS:
            raise NotUploaded(Reason.UPLOAD_LIMIT, f"an expert may have {MOST_PATHS} files", "push fewer")
        if both := [path for path in paths if any(_is_below(other, f"{path}/") for other in paths)]:
            hint = "delete one of them in the same commit"
            raise NotUploaded(Reason.UPLOAD_NAME, f"these would be files and folders: {listed(both)}", hint)
        return type(self)(paths, summary)

    def to_json(self) -> bytes:
        files = {path: asdict(stored) for path, stored in self.paths.items()}
        return json.dumps({"summary": self.summary, "paths": files}).encode()

    @classmethod
    def from_json(cls, raw: bytes) -> Self:
        content = json.loads(raw)
        return cls({path: Stored(**stored) for path, stored in content["paths"].items()}, content["summary"])


def check_expert(name: str) -> None:
    """Raises NotUploaded where no expert that is pushed can be called so; files that come have names of their own."""
    check_name(name)
    if name in (COMMITTED, LAID_OUT) or re.fullmatch(r"[0-9a-f]{32,}", name):
        raise NotUploaded(Reason.UPLOAD_NAME, f"{shown(name)} is no name for an expert", "for example legal-german")


def counts(path: str) -> bool:
    """Whether a file of that path is kept; what is hidden or unfinished by its name is not. Raises NotUploaded where
    nothing can be called so.
    """
    parts = path.split("/")
    if any(TEMPORARY.fullmatch(part) for part in parts):
        return False
    if len(parts) > DEEPEST + 1:
        raise NotUploaded(Reason.UPLOAD_NAME, f"{shown(path)} is too deep", f"{DEEPEST} folders at the most")
    for part in parts:
        check_name(part)
    return True


def lay_out(folder: Path, name: str, push: Push) -> None:
    """Makes of what came into `folder` the expert `name` in it, durably; nothing else is left there but a note."""
    target = folder / name
    durable.remove(target)
    folders = {target, *(target / above for path in push.paths for above in Path(path).parents)}
    for one in sorted(folders):
        durable.make_folder(one)
    for path, stored in push.paths.items():
        durable.link_or_copy(folder / stored.name, target / path)
    for one in sorted(folders, reverse=True):
        durable.sync_folder(one)
    durable.rename(folder / COMMITTED, folder / LAID_OUT)
    for one in folder.iterdir():  # before it enters: what is unlinked in the inbox has changed there
        if one.name not in (name, LAID_OUT):
            durable.remove(one)


def _is_below(path: str, folder: str) -> bool:
    return folder.endswith("/") and path.startswith(folder)
