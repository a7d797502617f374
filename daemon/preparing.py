"""What each head's method prepares from its state while nothing arrives, kept on disk beside the state.

It is derived: it may be thrown away at any time, and the next expert comes to the same bits with it or without it. A
file is only trusted where it says that it was made from the live version, by this software on this kind of device.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from uuid import uuid4

import torch

from daemon import durable
from daemon.failpoints import hit
from daemon.home import PREPARED_FILE, STATE_FILE, Home
from daemon.lines import Line
from projector.errors import BadFile
from projector.fold import Driver, Prepared
from projector.header import build_header
from projector.source import Checkpoint
from projector.steps import prepared_specs
from projector.tensorfile import TensorReader, TensorWriter


class Preparations:
    """Every head's preparation for the next expert."""

    def __init__(self, home: Home, driver: Driver, base: Checkpoint) -> None:
        self._home = home
        self._driver = driver
        self._base = base
        self._heads: dict[str, _Preparation] = {}

    def follow(self, lines: Sequence[Line]) -> None:
        """Turns to these live versions: forgets what was prepared from others, takes up what is on disk."""
        self.close()
        for line in lines:
            live = self._home.prepared(line.head.name, line.version.number)
            for path in self._home.states(line.head.name).glob(f"*/{PREPARED_FILE}"):
                if path != live:
                    durable.remove(path)
        self._heads = {line.head.name: _Preparation(self._home, self._driver, self._base, line) for line in lines}

    def ready(self, line: Line) -> Prepared | None:
        """What the next expert finds ready; nothing where another version is live than the one prepared from."""
        found = self._heads.get(line.head.name)
        return found.view() if found and found.made_from(line) else None

    def share(self, head: str) -> float:
        """How much of a head's preparation is ready, by bytes, 0 to 1; 1 where there is nothing to prepare."""
        found = self._heads.get(head)
        return found.share if found else 0.0

    def work(self, stop: Callable[[], bool]) -> None:
        """Prepares until all is ready or `stop` says so. A full disk or arithmetic that fails end it without an error:
        the next expert will work out what it needs."""
        for preparation in self._heads.values():
            try:
                preparation.work(stop)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                preparation.give_up()
            except OSError as error:
                if not durable.is_full(error):
                    raise
                preparation.give_up()

    def discard(self) -> None:
        """Gives its disk space back; nothing is prepared again before the next version."""
        for preparation in self._heads.values():
            preparation.give_up()

    def close(self) -> None:
        """Lets go of the files; an unfinished one is removed."""
        for preparation in self._heads.values():
            preparation.close()
        self._heads = {}


class _Preparation:
    """One head's, for one version."""

    def __init__(self, home: Home, driver: Driver, base: Checkpoint, line: Line) -> None:
        self._driver = driver
        self._base = base
        self._method = line.method
        self._state = home.head_state(line.head.name, line.version.number) / STATE_FILE
        self._path = home.prepared(line.head.name, line.version.number)
        self._unfinished = home.tmp / f"prepared-{uuid4().hex}"
        specs = prepared_specs(line.method, base.schema) if line.totals.experts else []
        self._specs = {spec.name: spec for spec in specs}
        self._bytes = _bytes_by_tensor(line, base) if specs else {}
        self._key = {"version": line.version.manifest_sha256, "made_by": _maker(driver.device)}
        self._files: list[int] = []
        self._writer: TensorWriter | None = None
        self._reader: TensorReader | None = None
        self._ready: set[str] = set()
        self._given_up = False
        self._take_up()

    @property
    def share(self) -> float:
        total = sum(self._bytes.values())
        return sum(self._bytes[name] for name in tuple(self._ready)) / total if total else 1.0

    def made_from(self, line: Line) -> bool:
        return self._key["version"] == line.version.manifest_sha256

    def view(self) -> Prepared | None:
        reader = self._writer.reader() if self._writer else self._reader
        return Prepared(reader, frozenset(self._ready)) if reader else None

    def work(self, stop: Callable[[], bool]) -> None:
        missing = [name for name in self._bytes if name not in self._ready]
        if not missing or self._given_up or stop():
            return
        writer = self._writer = self._writer or self._begin()
        state = TensorReader(self._open(os.open(self._state, os.O_RDONLY | os.O_CLOEXEC)), watch=self._driver.watch)
        for name in self._driver.prepare(self._base, self._method, state, writer, missing, stop):
            self._ready.add(name)
        os.close(self._files.pop())
        if len(self._ready) == len(self._bytes):
            self._keep()

    def give_up(self) -> None:
        self.close()
        durable.remove(self._path)
        self._ready, self._reader, self._given_up = set(), None, True

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())
        self._writer = None
        durable.remove(self._unfinished)

    def _take_up(self) -> None:
        """Takes what an earlier run finished, if it is what this one would make."""
        if not self._specs or not self._path.exists():
            return
        try:
            reader = TensorReader(self._open(os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)), watch=self._driver.watch)
        except BadFile:
            reader = None
        if reader and reader.header.metadata == self._key and dict(reader.specs) == self._specs:
            self._reader, self._ready = reader, set(self._bytes)
        else:
            self.close()
            durable.remove(self._path)

    def _begin(self) -> TensorWriter:
        specs = list(self._specs.values())
        size = build_header(specs, self._key)[1].size
        fd = self._open(durable.create(self._unfinished, size))
        return TensorWriter(fd, specs, self._key, self._driver.watch)

    def _keep(self) -> None:
        """Gives the finished file its name; it stays open."""
        hit("prepared.before")
        durable.sync(self._files[0])
        durable.rename(self._unfinished, self._path)
        hit("prepared.after")

    def _open(self, fd: int) -> int:
        self._files.append(fd)
        return fd


def _bytes_by_tensor(line: Line, base: Checkpoint) -> Mapping[str, int]:
    """What is prepared for each of the base's tensors, in bytes; without those for which nothing is."""
    schema = base.schema
    sizes = {name: sum(s.nbytes for s in line.method.prepares(schema[name]).values()) for name in base.order}
    return {name: size for name, size in sizes.items() if size}


def _maker(device: torch.device) -> str:
    """What the bits depend on beside the state."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {where}"
