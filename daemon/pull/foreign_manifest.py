"""A version's manifest as somebody who pulls it reads it: nothing in it is believed before it is checked."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from daemon.layout import MANIFEST
from daemon.manifest import FileEntry
from projector.text import shown

MOST_BYTES = (1 << 63) - 1  # of a file: no system has a larger one
NAME_BYTES = 255  # of one part of a name, which is what file systems take
PATH_BYTES = 1024


@dataclass(frozen=True)
class ForeignManifest:
    """A manifest.json: its bytes, their sha256 (hex), and what a pull needs of it."""

    text: bytes
    sha256: str
    head: str
    version: int
    files: Mapping[str, FileEntry]

    @staticmethod
    def read(text: bytes) -> "ForeignManifest":
        """ValueError where it is no manifest, or a name in it could lead out of the folder."""
        try:
            found: Any = json.loads(text)
            head, version = found["head"], found["version"]
            files = [FileEntry(file["name"], file["size"], file["sha256"]) for file in found["files"]]
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError("it lacks what every manifest has") from error
        if not isinstance(head, str) or type(version) is not int or not all(map(_is_sound, files)):
            raise ValueError("it has values that no manifest has")
        by_name = {file.name: file for file in files}
        if len(by_name) != len(files):
            raise ValueError("it lists a file twice")
        if not by_name.keys().isdisjoint(parent for name in by_name for parent in parents(name)):
            raise ValueError("a file of it is a folder of it too")
        return ForeignManifest(text, hashlib.sha256(text).hexdigest(), head, version, by_name)


def etag(sha256: str) -> str:
    """The entity tag under which a mainstem serves what has that sha256."""
    return f'"sha256:{sha256}"'


def _is_sound(file: FileEntry) -> bool:
    if not isinstance(file.name, str) or not is_plain(file.name):
        raise ValueError(f"{shown(str(file.name))} cannot be the name of a file")
    sha256 = file.sha256
    is_digest = isinstance(sha256, str) and len(sha256) == 64 and set(sha256) <= set("0123456789abcdef")
    return is_digest and type(file.size) is int and 0 <= file.size <= MOST_BYTES


def is_plain(name: str) -> bool:
    """True for what a file of a version may be called: a path of visible names that stays below its folder."""
    parts = name.split("/")
    visible = name.replace("/", "").isprintable() and not any(part.startswith(".") for part in parts)
    if not visible or not all(parts) or name == MANIFEST:
        return False
    return len(name.encode()) <= PATH_BYTES and all(len(part.encode()) <= NAME_BYTES for part in parts)


def parents(name: str) -> list[str]:
    """The folders that a file lies in, outermost first.

    >>> parents("a/b/config.json")
    ['a', 'a/b']
    """
    parts = name.split("/")[:-1]
    return ["/".join(parts[: n + 1]) for n in range(len(parts))]
