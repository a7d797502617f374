"""The body of a commit, a JSON object on each line, read as it comes: a file in it may be larger than the memory.

{"key": "header", "value": {"summary": ..., "description": ..., "parentCommit": ...}}
{"key": "file", "value": {"content": BASE64, "path": ..., "encoding": "base64"}}
{"key": "lfsFile", "value": {"path": ..., "algo": "sha256", "oid": SHA256, "size": ...}}
{"key": "deletedFile", "value": {"path": ...}}
{"key": "deletedFolder", "value": {"path": ...}}
"""

import binascii
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from daemon.http.answers import Problem
from daemon.http.upload_routes import Pieces

LINE_BYTES = 1 << 20  # of a line, less the content of a file
OPENING_BYTES = 256  # what is before a file's content, at the most
MOST_LINES = 10_000
_FILE = re.compile(rb'\s*\{\s*"key"\s*:\s*"file"\s*,\s*"value"\s*:\s*\{\s*"content"\s*:\s*"')


@dataclass
class Commit:
    """What a commit says: the sha256 of files sent before, and what files in it are called where they were put, by
    path; the paths that it removes, a folder's with a slash behind it; the commit that it is to follow, if it says so.
    """

    summary: str = ""
    parent: str | None = None
    added: dict[str, str] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)


async def read_commit(body: Pieces, take: Callable[[Pieces], Awaitable[str]]) -> Commit:
    """Reads it to its end. `take` puts the content of a file somewhere, and returns what it is called there. Problem
    400 or 413.
    """
    commit, reader = Commit(), _Reader(body)
    for _ in range(MOST_LINES):
        if match := _FILE.match(await reader.ahead(OPENING_BYTES)):
            reader.skip(match.end())
            file = await take(_Content(reader))
            _note(commit, _parsed(b'{"key": "file", "value": {"content": "' + await reader.line()), file)
            continue
        line = await reader.line()
        if line.strip():
            item = _parsed(line)
            content = item["value"].get("content") if item["key"] == "file" else None
            _note(commit, item, None if content is None else await take(_Whole(_decoded(str(content).encode()))))
        elif reader.over:
            return commit
    raise Problem(413, "too_long", f"a commit may have {MOST_LINES} lines", "commit fewer files at a time")


def _note(commit: Commit, item: dict[str, Any], file: str | None) -> None:
    value = item["value"]
    try:
        match item["key"]:
            case "header":
                commit.summary = str(value.get("summary", ""))[:500]
                commit.parent = str(value["parentCommit"]) if value.get("parentCommit") else None
            case "file" if file is not None and value.get("encoding", "base64") == "base64":
                commit.added[str(value["path"])] = file
            case "lfsFile" if value.get("algo", "sha256") == "sha256":
                commit.added[str(value["path"])] = str(value["oid"]).lower()
            case "deletedFile":
                commit.removed.append(str(value["path"]))
            case "deletedFolder":
                commit.removed.append(f"{str(value['path']).rstrip('/')}/")
            case _:
                raise _bad()
    except KeyError:
        raise _bad() from None


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError):
        raise _bad() from None
    if not isinstance(item, dict) or not isinstance(item.get("value"), dict) or not isinstance(item.get("key"), str):
        raise _bad()
    return item


def _decoded(data: bytes) -> bytes:
    try:
        return binascii.a2b_base64(data, strict_mode=True)
    except ValueError:
        raise _bad() from None


def _bad() -> Problem:
    hint = 'a JSON object on each line, as create_commit of huggingface_hub sends it: {"key": ..., "value": {...}}'
    return Problem(400, "bad_list", "that is no commit", hint)


class _Reader:
    """A body with a place in it."""

    def __init__(self, body: Pieces) -> None:
        self._body = body
        self._ended = False
        self.held = bytearray()

    @property
    def over(self) -> bool:
        return self._ended and not self.held

    async def more(self) -> bool:
        """Holds more of it; False at its end."""
        if not self._ended:
            piece = await self._body.next()
            self._ended = not piece
            self.held += piece
        return not self._ended

    async def ahead(self, size: int) -> bytes:
        """What comes next, so much of it as there is."""
        while len(self.held) < size and await self.more():
            pass
        return bytes(self.held[:size])

    def skip(self, size: int) -> None:
        del self.held[:size]

    async def line(self) -> bytes:
        """What is left of this line."""
        seen = 0
        while (end := self.held.find(b"\n", seen)) < 0:
            seen = len(self.held)
            if seen > LINE_BYTES:
                raise Problem(413, "too_long", f"a line may have {LINE_BYTES} bytes", "send large files by LFS")
            if not await self.more():
                end = len(self.held)
                break
        line = bytes(self.held[:end])
        self.skip(end + 1)
        return line


class _Content:
    """The content of a file, decoded, up to the quote that ends it, which stays."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader

    async def next(self) -> bytes:
        held = self._reader.held
        while True:
            end = held.find(b'"')
            size = end if end >= 0 else len(held) // 4 * 4
            if size > 0:
                piece = _decoded(bytes(held[:size]))
                self._reader.skip(size)
                return piece
            if end == 0:
                return b""
            if not await self._reader.more():
                raise _bad()


class _Whole:
    """Bytes that are all there."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def next(self) -> bytes:
        content, self._content = self._content, b""
        return content
