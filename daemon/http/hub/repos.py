"""What a repository and a revision of it mean here, and the problems that the Hub's clients understand.

    mainstem/main            the versions of the head `main`
    mainstem/main-adapter    the LoRA adapter beside each

A revision is `main` (the live version), a version's number (`v12`, `12`), or a commit: the first 40 digits of the
sha256 of the version's manifest.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from daemon.http.answers import Problem
from daemon.http.files import Published
from daemon.layout import ADAPTER_FOLDER, is_adapter
from daemon.manifest import FileEntry, Manifest
from daemon.notation import LATEST, called
from registry.records import Head, Version

NAMESPACE = "mainstem"
LIVE = "main"  # the revision, whatever the head is called
ALIASES = (LIVE, LATEST)  # as the folder and OCI say it
COMMIT_DIGITS = 40
_ADAPTER = f"-{ADAPTER_FOLDER}"


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a repository at a commit, by their names in it. made: when."""

    repo: str
    commit: str
    files: Mapping[str, FileEntry]
    made: datetime | None


@dataclass(frozen=True, slots=True)
class Snapshot(Listing):
    """One revision of what is published: its files are entries of the version's manifest. moving: the same revision
    may mean another version the next time.
    """

    head: Head
    version: Version
    moving: bool


class Repos:
    """The repositories of one home that can be read."""

    def __init__(self, published: Published) -> None:
        self.published = published

    def head(self, repo: str) -> Head:
        """The head behind a repository of our namespace. Problem 404."""
        found = self.published.reader.head(head_name(repo))
        if found is None:
            raise no_repo(f"{NAMESPACE}/{repo}")
        return found

    def is_published(self, repo: str) -> bool:
        """Whether a repository is what a head published."""
        return self.published.reader.head(head_name(repo)) is not None

    def snapshot(self, repo: str, revision: str) -> Snapshot:
        """What a revision holds. Problem 404, or 410 where retention removed the version."""
        head = self.head(repo)
        row = self._version(head, revision)
        if row is None:
            hint = f"{LIVE}, v{head.live} (the live version), or the 40 digits of a commit"
            raise hub_problem(404, "RevisionNotFound", "unknown_version", f"{head.name} has no {revision!r}", hint)
        try:
            manifest = self.published.manifest(head, self.published.version(head, row.number))
        except Problem as problem:
            raise told(problem, "RevisionNotFound") if problem.status == 410 else problem from None
        files = files_of(repo, manifest)
        if not files:
            raise told(no_adapter(head, row), "RevisionNotFound")
        return Snapshot(repo, commit_of(row), files, row.created_at, head, row, revision in ALIASES)

    def _version(self, head: Head, revision: str) -> Version | None:
        if revision in ALIASES:
            return self.published.reader.version(head.name, head.live)
        if number := re.fullmatch(r"v?([0-9]{1,12})", revision):
            return self.published.reader.version(head.name, int(number[1]))
        if re.fullmatch(rf"[0-9a-f]{{{COMMIT_DIGITS}}}", revision):
            return self.published.reader.version_of(head.name, revision)
        return None


def head_name(repo: str) -> str:
    """The name of the head that a repository of our namespace would be of."""
    return repo.removesuffix(_ADAPTER)


def files_of(repo: str, manifest: Manifest) -> dict[str, FileEntry]:
    """What a repository has of a version's files, by their names in it; none where the version has no adapter."""
    if repo.endswith(_ADAPTER):
        return {name.partition("/")[2]: entry for name, entry in manifest.files.items() if is_adapter(name)}
    return {name: entry for name, entry in manifest.files.items() if not is_adapter(name)}


def commit_of(version: Version) -> str:
    """A version's commit, as the Hub's clients know one: 40 digits."""
    return version.manifest_sha256[:COMMIT_DIGITS]


def no_repo(repo: str) -> Problem:
    """404 of a repository that is not ours."""
    hint = f"GET /v1/heads lists the heads: {NAMESPACE}/HEAD is one; without HF_ENDPOINT the Hub itself is asked"
    return hub_problem(404, "RepoNotFound", "unknown_head", f"there is no {repo} here", hint)


def no_adapter(head: Head, version: Version) -> Problem:
    """404 of an adapter that a version has not."""
    hint = f"set heads.{head.name}.adapter.rank: later versions get one (docs/serving-adapters.md)"
    return Problem(404, "no_adapter", f"{called(head.name, version.number)} has no adapter", hint)


def hub_problem(status: int, code: str, reason: str, detail: str, hint: str) -> Problem:
    """A problem with the Hub's own word for it."""
    return told(Problem(status, reason, detail, hint), code)


def told(problem: Problem, code: str) -> Problem:
    """The problem with that word, and with its text where an answer to HEAD has it, too."""
    text = f"{problem}; {problem.hint}".encode("ascii", "replace").decode()
    headers = {**problem.headers, "X-Error-Code": code, "X-Error-Message": re.sub(r"[^ -~]", " ", text)}
    return Problem(problem.status, problem.reason, str(problem), problem.hint, headers)
