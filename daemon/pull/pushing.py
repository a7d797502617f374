"""Sends an expert to a running mainstem: a file, or a folder file by file, and hears what becomes of it.

Each file goes whole, with its sha256; what of a folder the server has by then is not sent again, until the daemon
restarts or six hours are over. A file that is cut off is sent again from its beginning, as the server keeps no part.
"""

import base64
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from daemon.errors import DaemonError, Reason
from daemon.pull.client import CHUNK_BYTES, Connection, Origin, Passing
from projector.text import shown

PUT_TIMEOUT_SECONDS = 600.0  # without a byte: the server syncs a large file before it answers
ANSWER_BYTES = 16 << 20
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)  # seconds before each further try
ASK_SECONDS = 1.0  # between two questions what became of it
TOKEN_HINT = "give the daemon's write token: --token, or MAINSTEM_TOKEN"
HEADER_BYTES = 16 << 20  # of a safetensors file: a longer one is none
ROUNDS = 3  # in which a folder is sent: the daemon may be restarted meanwhile
MISSES = 5  # answers in a row that nobody knows it

Answer = TypeVar("Answer")

Report = Callable[[int, int], None]
"""Hears how many bytes are there, and of how many."""


@dataclass(frozen=True, slots=True)
class Part:
    """A file to be sent, by the name it has there."""

    name: str
    path: Path
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Pushed:
    """What is there now. `sent_bytes` went over the network just now. after: the newest id under that name before."""

    name: str
    files: int
    size_bytes: int
    sent_bytes: int
    after: int


def push(path: Path, origin: Origin, name: str | None = None, report: Report = lambda *_: None) -> Pushed:
    """Puts the checkpoint at `path` into the inbox of the daemon at `origin`, under `name`, or under its own.

    Raises DaemonError where it cannot be sent, or the server does not take it.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 - a link keeps its own name
    name = name or path.name
    pushing = _Pushing(origin, name, report)
    known = pushing.asked()
    if known.get("state") not in (None, "decided", "uploading"):
        raise DaemonError(
            Reason.PULL,
            f"{shown(name)} lies in the inbox of {origin} already: {shown(str(known.get('why')))}",
            "wait until it is taken, or send this one with another --name",
        )
    after = int(known.get("id") or known.get("before") or 0)
    parts = parts_of(path)
    pushing.total = sum(part.size_bytes for part in parts)
    sent = pushing.folder(parts, known.get("files") or []) if path.is_dir() else pushing.file(parts[0], after)
    return Pushed(name, len(parts), pushing.total, sent, after)


def parts_of(path: Path) -> list[Part]:
    """The files to be sent, hashed. Raises DaemonError where there is something that cannot be sent."""
    if not path.exists():
        raise DaemonError(Reason.PULL, f"{path} does not exist", "give the path of a checkpoint")
    if not path.is_dir():
        return [_part(path)]
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    if below := [entry.name for entry in entries if entry.is_dir()]:
        raise DaemonError(
            Reason.PULL,
            f"{path}: a folder in it cannot be sent: {shown(below[0])}",
            "move the checkpoint's own files into a folder by themselves; or copy all of it into the inbox",
        )
    if not entries:
        raise DaemonError(Reason.PULL, f"{path} is empty", "give the folder that the checkpoint is in")
    return [_part(entry) for entry in entries]


def verdict(
    origin: Origin, pushed: Pushed, told: Callable[[str], None], patience: float | None = None
) -> Mapping[str, Any] | None:
    """What became of it, as the server says it (docs/http.md); None where that takes longer than `patience` seconds.

    told: hears what it waits for, each time that this is something else. Raises DaemonError where nobody knows it.
    """
    end = None if patience is None else time.monotonic() + patience
    pushing, said, missed = _Pushing(origin, pushed.name, lambda *_: None), "", 0
    while True:
        found = pushing.asked()
        if found.get("state") == "decided" and int(found.get("id") or 0) > pushed.after:
            return found
        waits = found.get("state") not in (None, "decided")
        missed = 0 if waits else missed + 1
        if missed >= MISSES:
            raise DaemonError(
                Reason.PULL,
                f"{shown(pushed.name)} is not in the inbox of {origin} any more, and nothing is known of it",
                "somebody took it away: send it again",
            )
        if waits and found.get("why") != said:
            said = str(found.get("why"))
            told(said)
        if end is not None and time.monotonic() >= end:
            return None
        time.sleep(ASK_SECONDS)


class _Pushing:
    """One expert on its way."""

    def __init__(self, origin: Origin, name: str, report: Report) -> None:
        self._origin = origin
        self._address = f"{origin.root}/v1/experts/{quote(name, safe='')}"
        self._report = report
        self._done = 0
        self.total = 0

    def asked(self) -> dict[str, Any]:
        """What the server says of the name; nothing where it knows none."""
        return _patiently(self._asked)

    def file(self, part: Part, after: int) -> int:
        """Sends an expert of one file; the bytes that went."""

        def put() -> int:
            if tries and self._arrived(part, after):
                return 0  # and the answer was lost
            tries.append(part)
            return self._put(self._address, part)

        tries: list[Part] = []
        return _patiently(put)

    def folder(self, parts: Sequence[Part], there: Sequence[Mapping[str, Any]]) -> int:
        """Sends a folder, but for what is there; the bytes that went."""
        sent = 0
        for _ in range(ROUNDS):
            known = {str(file["name"]): str(file["sha256"]) for file in there}
            missing = [part for part in parts if known.get(part.name) != part.sha256]
            self._done = self.total - sum(part.size_bytes for part in missing)
            for part in missing:
                sent += _patiently(partial(self._put, f"{self._address}/files/{quote(part.name, safe='')}", part))
            problem = self._committed(parts)
            if problem is None:
                return sent
            there = self.asked().get("files") or []  # the daemon was restarted meanwhile, and has forgotten some
        assert problem
        raise problem

    def _asked(self) -> dict[str, Any]:
        with Connection(self._origin) as connection, connection.get(self._address) as answer:
            if answer.status == 404:
                return {}
            if answer.status not in (200, 202):
                raise connection.problem(self._address, answer)
            try:
                found = json.loads(connection.text(self._address, answer, ANSWER_BYTES))
                return dict(found)
            except (ValueError, TypeError) as error:
                raise connection.refusal(self._address, f"what is there is no answer: {error}") from error

    def _arrived(self, part: Part, after: int) -> bool:
        """Whether a file whose sending broke off came whole all the same."""
        found = self._asked()
        if found.get("state") == "decided":
            return int(found.get("id") or 0) > after and found.get("sha256") == part.sha256
        return found.get("state") not in (None, "uploading")

    def _put(self, address: str, part: Part) -> int:
        digest = base64.b64encode(bytes.fromhex(part.sha256)).decode()
        headers = {"Content-Length": str(part.size_bytes), "Content-Digest": f"sha-256=:{digest}:"}
        before = self._done
        with Connection(self._origin, PUT_TIMEOUT_SECONDS) as connection:
            try:
                with connection.ask("PUT", address, headers, self._pieces(part)) as answer:
                    if answer.status == 401:
                        raise DaemonError(Reason.PULL, str(connection.problem(address, answer)), TOKEN_HINT)
                    if answer.status != 201:
                        raise connection.problem(address, answer)
                    connection.text(address, answer, ANSWER_BYTES)
            except BaseException:
                self._done = before
                raise
        return part.size_bytes

    def _pieces(self, part: Part) -> Iterator[bytes]:
        left = part.size_bytes
        with part.path.open("rb") as file:
            while left and (piece := file.read(min(left, CHUNK_BYTES))):
                left -= len(piece)
                yield piece
                self._done += len(piece)
                self._report(self._done, self.total)
        if left:
            raise DaemonError(
                Reason.PULL,
                f"{part.path} became {left} bytes shorter while it was sent",
                "push it again once nothing writes it any more",
            )

    def _committed(self, parts: Sequence[Part]) -> DaemonError | None:
        """Says that the folder is complete; why the server does not find it so, where files are missing."""
        address, tries = f"{self._address}/commit", 0
        listed = [{"name": part.name, "sha256": part.sha256} for part in parts]
        body = json.dumps({"files": listed}).encode()

        def commit() -> DaemonError | None:
            nonlocal tries
            tries += 1
            with (
                Connection(self._origin, PUT_TIMEOUT_SECONDS) as connection,
                connection.ask("POST", address, {"Content-Type": "application/json"}, body) as answer,
            ):
                if answer.status == 201:
                    return None
                problem = connection.problem(address, answer)
                if answer.status not in (404, 409):
                    raise problem
            lost = tries > 1 and self._asked().get("state") not in (None, "uploading", "decided")  # its answer was
            return None if lost else problem

        return _patiently(commit)


def _part(path: Path) -> Part:
    """One file, hashed. Raises DaemonError where it is a safetensors file that was cut off: what is sent that way would
    lie in the inbox for as long as a copy may take to go on."""
    if path.suffix == ".safetensors" and (what := _cut_off(path)):
        raise DaemonError(Reason.PULL, f"{path}: {what}", "it was cut off: take it from where it was saved, whole")
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            digest.update(piece)
            size += len(piece)
    return Part(path.name, path, size, digest.hexdigest())


def _cut_off(path: Path) -> str | None:
    """What a safetensors file lacks at its end; None where nothing, or where it is for the server to say what it is.

    The strict reader (projector/files/header.py) needs torch, which takes seconds to load.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not length:
            return f"with {size} bytes, it has no header"
        if length > HEADER_BYTES:
            return None
        text = file.read(length)
    end = 8 + length
    if len(text) == length:
        try:
            entries = json.loads(text)
            end += max((one["data_offsets"][1] for name, one in entries.items() if name != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return None
    return f"it ends at byte {size}, by its header at {end}" if end > size else None


def _patiently(ask: Callable[[], Answer]) -> Answer:
    """Asks again, where the network broke or the server was busy."""
    for pause in PAUSES:
        try:
            return ask()
        except Passing:
            time.sleep(pause)
    return ask()
