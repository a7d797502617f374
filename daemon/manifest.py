"""A version's manifest.json: what it is, what it came from, and the sha256 of all that it consists of.

Here are its bytes, and what they say when they are read again. What comes from another machine is read elsewhere (see
daemon/pull/foreign_manifest.py): of ours nothing needs to be doubted that has the sha256 of its row. Loads no tensor.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from typing import Any, Self

from daemon.release import software_version
from registry.records import Expert, Head, NewExpert, Scores, Version, plain_scores


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of a version as its manifest lists it: `size` in bytes, `sha256` in hex. `name` may lead into a
    folder below the version's.
    """

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Withdrawal:
    """The experts that a version no longer has, and how they were taken out: "subtracted" or "replayed"."""

    experts: Sequence[Expert]
    how: str

    def described(self) -> dict[str, Any]:
        """As the manifest says it."""
        gone = [{"sha256": expert.sha256, "name": expert.name} for expert in self.experts]
        return {"experts": gone, "how": self.how}


def manifest(
    *,
    head: Head,
    number: int,
    base_sha256: str,
    parent: Version | None,
    experts: int,
    expert: NewExpert | None,
    figures: Mapping[str, float],
    dtype: str,
    created_at: datetime,
    files: Sequence[FileEntry],
    state: FileEntry | None,
    record: FileEntry | None = None,
    approximate: bool = False,
    withdrawal: Withdrawal | None = None,
    adapter: Mapping[str, Any] | None = None,
    adamerging: Mapping[str, Any] | None = None,
    scores: Scores | None = None,
    verdict: Mapping[str, Any] | None = None,
) -> bytes:
    """The bytes of a version's manifest.json: what it is, what it came from, and the sha256 of all it consists of.

    approximate: its method folded this expert with sums that the later ones still change. adamerging: how
    the coefficients of its weights were learned, where they were. scores, verdict: as they were
    when it was published.
    """
    content = {
        "format": 1,
        "head": head.name,
        "version": number,
        "method": head.method,
        "params": head.params,
        "relative_to": head.relative_to,
        "base_sha256": base_sha256,
        "parent": {"version": parent.number, "manifest_sha256": parent.manifest_sha256} if parent else None,
        "experts": experts,
        "expert": _expert(expert) if expert else None,
        "withdrawn": withdrawal.described() if withdrawal else None,
        "approximate": approximate,
        "figures": figures,
        "dtype": dtype,
        "created_at": created_at.isoformat(),
        "software": {"mainstem": software_version(), "torch": version("torch")},
        "files": [asdict(file) for file in files],
        "state": asdict(state) if state else None,
        "record": asdict(record) if record else None,
        "adapter": adapter,
        "adamerging": adamerging,
        "scores": plain_scores(scores) if scores else None,
        "verdict": verdict,
    }
    return json.dumps(content, indent=2).encode() + b"\n"


def _expert(expert: NewExpert) -> dict[str, Any]:
    task = expert.about.get("task") if expert.about else None
    return {"sha256": expert.sha256, "name": expert.name, "task": task, "weight": expert.weight}


@dataclass(frozen=True, slots=True)
class Manifest:
    """One that is read again: its bytes, all that they say, and the files that it lists by name."""

    raw: bytes
    content: Mapping[str, Any]
    files: Mapping[str, FileEntry]

    @classmethod
    def read(cls, raw: bytes, sha256: str | None = None) -> Self:
        """ValueError where it is not the one of that sha256 (hex), or no manifest at all."""
        if sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256:
            raise ValueError("the manifest is not the one that was committed")
        try:
            content = json.loads(raw)
            return cls(raw, content, {file["name"]: _entry(file) for file in content["files"]})
        except (KeyError, TypeError) as error:
            raise ValueError("it is no manifest") from error

    @property
    def state(self) -> FileEntry | None:
        """The accumulators, where the version has any."""
        return self._one("state")

    @property
    def record(self) -> FileEntry | None:
        """What is kept of the expert, where something is."""
        return self._one("record")

    def _one(self, key: str) -> FileEntry | None:
        found = self.content.get(key)
        return _entry(found) if found else None


def _entry(file: Mapping[str, Any]) -> FileEntry:
    return FileEntry(file["name"], file["size"], file["sha256"])
