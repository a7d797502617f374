"""How a command reaches the daemon that holds a home, and how that answers: by files in state/requests.

    <id>.json          what is asked; taken away once it is answered
    <id>.answer.json   what became of it
    .room              space that the daemon sets aside, for whoever asks when the disk is full

The registry has one writer. Where no daemon runs, the command holds the home itself and does what it was asked. Nothing
here need outlive the machine: whoever asks waits, and what was done is told by the registry.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Event, Thread
from typing import Any
from uuid import uuid4

import structlog

from daemon.disk import durable
from daemon.errors import BadHome, DaemonError, Unanswered
from daemon.home.orders import ORDERS, leave
from daemon.home.presence import Doing, running
from daemon.interventions.deeds import Request, carry_out
from daemon.interventions.pruning import Prune
from daemon.layout import Home
from projector.errors import DeviceLost, ProjectorError
from registry.errors import RegistryError, StorageFailed
from registry.records import Deed, NewEvaluation, Score
from registry.store import Store

LOOK_SECONDS = 0.1
PATIENCE_SECONDS = 30.0  # for a daemon that says nothing: recovering, or stopped by a signal
INSISTING_SECONDS = 3600.0
AGAIN_SECONDS = 5.0
HEARING_SECONDS = 1.0  # for an answer to be fetched, where the daemon stops
MOST_BYTES = 1 << 20
ANSWER = ".answer.json"
ROOM = ".room"
ROOM_BYTES = 1 << 20  # for a request, its answer, the registry's rows and what a restored version has of its own

Say = Callable[[str], None]
"""Hears of what goes on, line by line."""


def ask(home: Home, request: Request, alone: Callable[[], list[str]] | None = None, say: Say = print) -> list[str]:
    """Has it done, by the daemon where one runs, and returns what was done in lines of words. Raises as `carry_out`.

    alone: does it where no daemon runs, and holds the home for itself; `carry_out` unless told otherwise.
    """
    try:
        lock = durable.lock(home.lock)
    except BlockingIOError:
        return _ask_daemon(home, request, say)
    try:
        if alone is None:
            with Store.open(home.registry) as store:
                return carry_out(home, store, request)
    finally:
        os.close(lock)
    return alone()


def insist(home: Home, request: Request, say: Say = print) -> list[str]:
    """As `ask`, again and again where nobody answers: while a daemon recovers, or another command has the home. For
    what took long to find out, and may be asked twice.
    """
    end = time.monotonic() + INSISTING_SECONDS
    while True:
        try:
            return ask(home, request, say=say)
        except Unanswered as error:
            if time.monotonic() >= end:
                raise
            say(f"{error}: asking again")
            time.sleep(AGAIN_SECONDS)


def _ask_daemon(home: Home, request: Request, say: Say) -> list[str]:
    there = running(home)
    if there and there.doing in (Doing.BUSY, Doing.RECOVERING) and request.deed in ORDERS:
        return leave(home, request.deed, request.who, request.why)
    if there and there.doing == Doing.BUSY:
        raise Unanswered(f"another command of mainstem works on {home.root}", "try again when it is done")
    asked = home.requests / f"{uuid4().hex}.json"
    answer = asked.with_suffix(ANSWER)
    try:
        _put(asked, request)
        return _wait(home, asked, request, say)
    except PermissionError as error:
        raise BadHome(
            f"{error.filename}: {error.strerror}", "run this as the user that the daemon runs as: it will then be asked"
        ) from error
    finally:
        for path in (asked, answer):
            with suppress(OSError):
                durable.remove(path)


def _put(asked: Path, request: Request) -> None:
    durable.make_folder(asked.parent)
    content = json.dumps(asdict(request)).encode()
    try:
        durable.note(asked, content)
    except OSError as error:
        if not durable.is_full(error):
            raise
        durable.remove(asked.with_name(ROOM))
        durable.note(asked, content)


def _wait(home: Home, asked: Path, request: Request, say: Say) -> list[str]:
    answer, heard, said = asked.with_suffix(ANSWER), time.monotonic(), ""
    while True:
        there = durable.is_locked(home.lock)  # before the look at the answer, which comes before the end
        with suppress(FileNotFoundError):
            content = json.loads(answer.read_bytes())
            if "error" in content:
                raise BadHome(content["error"], content["hint"])
            if "done" in content:
                return list(content["done"])
            if content["doing"] != said:
                said, heard = content["doing"], time.monotonic()
                say(said)
        if not there:
            raise Unanswered(
                "the daemon stopped before it answered",
                "start it again, which finishes what was done; `mainstem log --interventions` tells; else ask again",
            )
        if not asked.exists() and not answer.exists():  # a daemon that starts takes away what others were asked
            _put(asked, request)
        if not said and time.monotonic() - heard > PATIENCE_SECONDS:
            raise Unanswered(
                f"the daemon has not answered within {PATIENCE_SECONDS:.0f} seconds",
                "`mainstem status` tells whether it is recovering, `mainstem log --interventions` whether it was done",
            )
        time.sleep(LOOK_SECONDS)


class Asked:
    """One request in hand, and its answer."""

    def __init__(self, path: Path, request: Request) -> None:
        self.request = request
        self._path = path

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits."""
        return self._path.exists()

    def doing(self, text: str) -> None:
        """Tells whoever waits what goes on."""
        self._answer({"doing": text})

    def done(self, lines: list[str]) -> None:
        """It is done."""
        self._answer({"done": lines})

    def failed(self, error: DaemonError | RegistryError | ProjectorError | DeviceLost) -> None:
        """It is not done."""
        self._answer({"error": str(error), "hint": error.hint})

    def _answer(self, content: Mapping[str, Any]) -> None:
        with suppress(OSError):  # whoever waits gives up; the registry tells what was done
            if self._path.exists():
                durable.note(self._path.with_suffix(ANSWER), json.dumps(content).encode())
                if "doing" not in content:
                    durable.remove(self._path)


class Desk:
    """Answers what is asked of a running daemon, in a thread of its own: at once, whatever is being merged.

    What takes long is left to the merge loop, which fetches it from `waiting` between two experts.
    """

    def __init__(
        self,
        home: Home,
        store: Store,
        wake: Callable[[], None],
        changed: Callable[[Request], None],
        reload: Callable[[Asked], None],
    ) -> None:
        """`wake` is called when something waits or this thread has failed, `changed` after each thing that was done;
        `reload` is handed who wants the settings to be read again, and answers.
        """
        self.waiting: list[Asked] = []
        self._home = home
        self._store = store
        self._wake = wake
        self._changed = changed
        self._reload = reload
        self._seen: set[str] = set()
        self._closing = Event()
        self._failed: BaseException | None = None
        self._log = structlog.get_logger()
        durable.remove(home.requests)  # of whoever waited for another daemon
        durable.make_folder(home.requests)
        durable.set_aside(home.requests / ROOM, ROOM_BYTES)
        self._thread = Thread(target=self._work, name="desk", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises what ended the thread: only a restart helps then."""
        if self._failed:
            raise self._failed

    def close(self) -> None:
        """Answers nothing more; whoever waits is told that the daemon has stopped. What was answered is heard first."""
        self._closing.set()
        self._thread.join()
        end = time.monotonic() + HEARING_SECONDS
        while self._unheard() and time.monotonic() < end:
            time.sleep(LOOK_SECONDS / 4)
        with suppress(OSError):
            durable.remove(self._home.requests)

    def _unheard(self) -> bool:
        """Whether an answer lies there whose request was taken away, and which nobody has fetched."""
        try:
            names = set(os.listdir(self._home.requests))
        except OSError:
            return False
        return any(name.endswith(ANSWER) and name.replace(ANSWER, ".json") not in names for name in names)

    def _work(self) -> None:
        try:
            while not self._closing.wait(LOOK_SECONDS):
                try:
                    for name in self._new():
                        self._take(name)
                except OSError as error:
                    if not durable.is_short(error):  # of descriptors or memory, which passes: who asked still waits
                        raise
        except BaseException as error:  # it is raised again where it ends the process
            self._failed = error
            self._wake()

    def _new(self) -> list[str]:
        try:
            names = set(os.listdir(self._home.requests))
        except FileNotFoundError:
            return []
        asked = {name for name in names if name.endswith(".json") and not name.endswith(ANSWER) and name[0] != "."}
        self._seen &= asked
        if not asked and ROOM not in names:
            durable.set_aside(self._home.requests / ROOM, ROOM_BYTES)
        return sorted(asked - self._seen)

    def _take(self, name: str) -> None:
        path = self._home.requests / name
        try:
            asked = Asked(path, _read(path))
        except FileNotFoundError:  # nobody waits any more
            return
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            if durable.is_short(error):
                raise
            self._seen.add(name)
            self._log.warning("a request that cannot be read", file=name, error=str(error))
            return
        self._seen.add(name)
        if asked.request.deed is Deed.RELOAD:
            asked.doing("the daemon reads them between two experts")  # at once, where none is in hand
            self._log.info(f"asked for: {Deed.RELOAD}", who=asked.request.who)
            self._reload(asked)
            self._wake()
            return
        if asked.request.deed in (Deed.WITHDRAW, Deed.COLLECT, Deed.PRUNE):
            asked.doing("waiting for the expert that is being merged")
            self.waiting.append(asked)
            self._wake()
            return
        try:
            lines = carry_out(self._home, self._store, asked.request)
        except StorageFailed:
            raise
        except (DaemonError, RegistryError) as error:
            asked.failed(error)
            return
        except OSError as error:
            if not (durable.is_full(error) or durable.is_short(error)):
                raise
            asked.failed(BadHome(f"it was begun: {error}", "make room, or wait, then ask again: it goes on"))
            return
        self.tell(asked, lines)

    def tell(self, asked: Asked, lines: list[str]) -> None:
        """Says to whoever waits, to the log and to `changed` that it is done."""
        asked.done(lines)
        request = asked.request
        if lines:
            told = {"head": request.head, "version": request.version, "experts": list(request.experts) or None}
            named = {key: value for key, value in told.items() if value is not None}
            self._log.info(f"asked for: {request.deed}", who=request.who, why=request.why, **named)
        self._changed(request)
        self._wake()


def _read(path: Path) -> Request:
    with path.open("rb") as file:
        content = json.loads(file.read(MOST_BYTES))
    content["deed"] = Deed(content["deed"])
    for name in ("experts", "deliveries"):
        content[name] = tuple(int(number) for number in content.get(name, ()))
    if found := content["evaluation"]:
        scores = {task: Score(**score) for task, score in found.pop("scores").items()}
        content["evaluation"] = NewEvaluation(scores=scores, **found)
    if wanted := content.get("prune"):
        content["prune"] = Prune(**wanted)
    return Request(**content)
