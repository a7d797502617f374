"""Which version a tag or a digest means.

The registry knows no digest of an artifact or of a file. They are derived from the manifests of the versions that are
kept, which are remembered: of the live one, of those asked for by a tag lately, and of the newest MOST_SEARCHED. So a
question costs the same over any number of versions.
"""

import re
from collections import OrderedDict
from collections.abc import Iterator
from threading import Lock
from typing import TypeVar

from daemon.http.answers import Problem
from daemon.http.files import Published
from daemon.http.hub.repos import NAMESPACE, files_of, head_name, no_adapter
from daemon.http.oci.artifacts import Artifact
from registry.records import Head, Version

LATEST = "latest"
MOST_SEARCHED = 256  # versions that are listed as tags, and looked into for a digest
PAGE = 32  # so many are read at a time
MOST_ASKED = 64  # versions asked for by a tag that are looked into, however old

Found = tuple[Version, Artifact]
_K = TypeVar("_K")
_V = TypeVar("_V")


class Artifacts:
    """The artifacts of one home: `mainstem/HEAD`, and `mainstem/HEAD-adapter`; `repo` is the last part."""

    def __init__(self, published: Published) -> None:
        self._published = published
        self._made: OrderedDict[tuple[str, str], Artifact | None] = OrderedDict()  # the oldest use first
        self._asked: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._lock = Lock()

    def head(self, repo: str) -> Head:
        """The head behind it. Problem 404."""
        return self._published.head(head_name(repo))

    def tagged(self, repo: str, tag: str) -> Artifact:
        """The one with that tag. Problem 404, or 410 where retention removed it."""
        head = self.head(repo)
        number = re.fullmatch(r"v(0|[1-9][0-9]{0,11})", tag)
        if number is None and tag != LATEST:
            hint = f"{LATEST}, or v{head.live} for version {head.live}"
            raise Problem(404, "unknown_version", f"{NAMESPACE}/{repo} has no tag {tag!r}", hint)
        row = self._published.version(head, int(number[1]) if number else head.live)
        found = self._artifact(repo, row)
        if found is None:
            raise no_adapter(head, row)
        with self._lock:
            _note(self._asked, (repo, row.number), None, MOST_ASKED)
        return found

    def with_sha256(self, repo: str, sha256: str) -> Artifact | None:
        """The one whose manifest has that sha256."""
        return next((one for _, one in self._searched(repo) if one.sha256 == sha256), None)

    def holding(self, repo: str, sha256: str) -> Found | None:
        """One that has a blob with that sha256, with the row of its version."""
        return next((found for found in self._searched(repo) if found[1].has(sha256)), None)

    def tags(self, repo: str) -> list[str]:
        """Those of the newest versions, in lexical order, as OCI has it."""
        head = self.head(repo)
        live = {LATEST, f"v{head.live}"} if any(self._artifacts(repo, self._rows(head, [head.live]))) else set()
        return sorted(live | {f"v{row.number}" for row, _ in self._artifacts(repo, self._newest(head))})

    def _searched(self, repo: str) -> Iterator[Found]:
        head = self.head(repo)
        with self._lock:
            asked = [number for name, number in reversed(self._asked) if name == repo and number != head.live]
        yield from self._artifacts(repo, self._rows(head, [head.live, *asked]))
        yield from self._artifacts(repo, self._newest(head))

    def _rows(self, head: Head, numbers: list[int]) -> Iterator[Version]:
        for number in numbers:
            row = self._published.reader.version(head.name, number)
            if row and not row.collected:
                yield row

    def _newest(self, head: Head) -> Iterator[Version]:
        before = None
        for _ in range(MOST_SEARCHED // PAGE):
            rows = self._published.reader.versions(head.name, PAGE, include_collected=False, before=before)
            yield from rows
            if len(rows) < PAGE:
                return
            before = rows[-1].number

    def _artifacts(self, repo: str, rows: Iterator[Version]) -> Iterator[Found]:
        """Those that there are of these versions."""
        for row in rows:
            try:
                found = self._artifact(repo, row)
            except Problem as problem:
                if problem.status == 503:  # not that of this version alone
                    raise
                continue
            if found:
                yield row, found

    def _artifact(self, repo: str, row: Version) -> Artifact | None:
        """None where the version has no adapter, and that is asked for. Problem as of `Published.manifest`."""
        key = repo, row.manifest_sha256
        with self._lock:
            if key in self._made:
                self._made.move_to_end(key)
                return self._made[key]
        manifest = self._published.manifest(self.head(repo), row)
        files = files_of(repo, manifest)
        made = Artifact.of(f"{NAMESPACE}/{repo}", manifest, files) if files else None
        with self._lock:
            _note(self._made, key, made, 2 * MOST_SEARCHED)
        return made


def _note(what: OrderedDict[_K, _V], key: _K, value: _V, most: int) -> None:
    """Makes it the newest of `most`."""
    what[key] = value
    what.move_to_end(key)
    while len(what) > most:
        what.popitem(last=False)
