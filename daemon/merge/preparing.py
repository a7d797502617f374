"""What each head's method prepares from its state while nothing arrives, kept on disk beside the state.

It is derived: it may be thrown away at any time, and the next expert comes to the same bits with it or without it. A
file is only taken up where it says that it was made from the live version, by this software on this kind of device, and
where its sha256 is the one that was noted when it was finished.
"""

import errno
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from uuid import uuid4

import torch

from daemon.checkpoints.opening import Stamp, stamp
from daemon.disk import durable
from daemon.disk.failpoints import hit
from daemon.home.ground import damaged
from daemon.layout import PREPARED_DIGEST, PREPARED_FILE, STATE_FILE, Home
from daemon.release import software_version
from daemon.versions.checking import entry
from daemon.versions.heads import HeadTip
from daemon.versions.retention import numbered
from projector.driver.averages import rule_of
from projector.driver.device import Device
from projector.driver.fold import Driver
from projector.driver.head import Prepared
from projector.driver.steps import prepared_specs, record_specs, state_specs
from projector.errors import BadFile
from projector.files.header import build_header
from projector.files.source import Checkpoint
from projector.files.tensorfile import TensorReader, TensorWriter


class Preparations:
    """Every head's preparation for the next expert."""

    def __init__(self, home: Home, driver: Driver, base: Checkpoint) -> None:
        self._home = home
        self._driver = driver
        self._base = base
        self._heads: dict[str, _Preparation] = {}

    def follow(self, heads: Sequence[HeadTip]) -> None:
        """Turns to these live versions: forgets what was prepared from others, takes up what is on disk."""
        self.close()
        for tip in heads:
            current = self._home.head_state(tip.head.name, tip.version.number)
            for path in numbered(self._home.states(tip.head.name)).values():
                if path != current:
                    durable.remove(path / PREPARED_FILE)
                    durable.remove(path / PREPARED_DIGEST)
        reserve = _next_version_bytes(heads, self._base)
        self._heads = {tip.head.name: _Preparation(self._home, self._driver, self._base, tip, reserve) for tip in heads}

    def ready(self, tip: HeadTip) -> Prepared | None:
        """What the next expert finds ready; nothing where another version is live than the one prepared from."""
        found = self._heads.get(tip.head.name)
        if found is None or not found.made_from(tip) or found.drop_touched():
            return None
        return found.view()

    def touched(self, tip: HeadTip) -> bool:
        """True where the file behind `ready` was written to since by somebody else; it is then given up."""
        found = self._heads.get(tip.head.name)
        return bool(found and found.made_from(tip) and found.drop_touched())

    def share(self, head: str) -> float:
        """How much of a head's preparation is ready, by bytes, 0 to 1; 1 where there is nothing to prepare."""
        found = self._heads.get(head)
        return found.share if found else 0.0

    def work(self, stop: Callable[[], bool]) -> str | None:
        """Prepares until all is ready or `stop` says so; returns why it gave up, if it did.

        A full disk or arithmetic that fails do no harm: the next expert works out what it needs. Raises BadHome where a
        file that it reads is damaged.
        """
        gave_up = None
        for preparation in self._heads.values():
            try:
                preparation.work(stop)
            except BadFile as error:
                raise damaged(error) from error
            except OSError as error:
                if durable.failed_sync(error) or not (durable.is_full(error) or error.errno == errno.EFBIG):
                    raise
                gave_up = str(error)
                preparation.give_up()
            except (RuntimeError, MemoryError) as error:  # the eigensolver, or no memory on the device or off it
                if failed := durable.failed_sync(error):
                    raise failed from None
                gave_up = str(error)
                preparation.give_up()
        return gave_up

    @property
    def missing(self) -> bool:
        """True where there is something left to prepare."""
        return any(preparation.missing for preparation in self._heads.values())

    def discard(self) -> bool:
        """Gives its disk space back, and says whether it had any; nothing is prepared again before the next version."""
        had = any(preparation.has_file for preparation in self._heads.values())
        for preparation in self._heads.values():
            preparation.give_up()
        return had

    def close(self) -> None:
        """Lets go of the files; an unfinished one is removed."""
        for preparation in self._heads.values():
            preparation.close()
        self._heads = {}


class _Preparation:
    """One head's, for one version."""

    def __init__(self, home: Home, driver: Driver, base: Checkpoint, tip: HeadTip, reserve: int) -> None:
        self._driver = driver
        self._base = base
        self._method = tip.method
        self._state = home.head_state(tip.head.name, tip.version.number) / STATE_FILE
        self._path = home.prepared(tip.head.name, tip.version.number)
        self._digest = self._path.with_name(PREPARED_DIGEST)
        self._unfinished = home.tmp / f"prepared-{uuid4().hex}"
        specs = prepared_specs(tip.method, base.schema) if tip.totals.experts else []
        self._specs = {spec.name: spec for spec in specs}
        self._bytes = _bytes_by_tensor(tip, base) if specs else {}
        self._key = {"version": tip.version.manifest_sha256, "made_by": _maker(driver.device)}
        self._reserve = reserve
        self._files: list[int] = []
        self._stamp: Stamp | None = None  # of the first file, since nothing was written to it
        self._writer: TensorWriter | None = None
        self._reader: TensorReader | None = None
        self._ready: set[str] = set()
        self._ready_bytes = 0
        self._all_bytes = sum(self._bytes.values())
        self._given_up = False
        self._take_up()

    @property
    def share(self) -> float:
        return self._ready_bytes / self._all_bytes if self._all_bytes else 1.0

    def made_from(self, tip: HeadTip) -> bool:
        return self._key["version"] == tip.version.manifest_sha256

    def view(self) -> Prepared | None:
        reader = self._writer.reader() if self._writer else self._reader
        return Prepared(reader, frozenset(self._ready)) if reader else None

    def drop_touched(self) -> bool:
        """Gives up what somebody else wrote to, and says whether that was so: it is derived, and worked out anew."""
        touched = bool(self._files) and self._stamp is not None and stamp(os.fstat(self._files[0])) != self._stamp
        if touched:
            self.give_up()
        return touched

    @property
    def missing(self) -> bool:
        return not self._given_up and len(self._ready) < len(self._bytes)

    @property
    def has_file(self) -> bool:
        return bool(self._writer or self._reader)

    def work(self, stop: Callable[[], bool]) -> None:
        if not self.missing or stop():
            return
        missing = [name for name in self._bytes if name not in self._ready]
        writer = self._writer = self._writer or self._begin()
        state = TensorReader(self._open(os.open(self._state, os.O_RDONLY | os.O_CLOEXEC)), watch=self._driver.watch)
        for name in self._driver.prepare(self._base, self._method, state, writer, missing, stop):
            self._ready.add(name)
            self._ready_bytes += self._bytes[name]
        os.close(self._files.pop())
        if len(self._ready) == len(self._bytes):
            self._keep()
        self._stamp = stamp(os.fstat(self._files[0]))

    def give_up(self) -> None:
        self.close()
        self._remove()
        self._ready, self._ready_bytes, self._reader, self._given_up = set(), 0, None, True

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())
        self._writer, self._stamp = None, None
        if self._unfinished.exists():
            durable.remove(self._unfinished)

    def _take_up(self) -> None:
        """Takes what an earlier run finished, if it is what this one would make."""
        if not self._specs or not self._path.exists():
            return
        try:
            reader = TensorReader(self._open(os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)), watch=self._driver.watch)
            made_here = reader.header.metadata == self._key and dict(reader.specs) == self._specs
            sound = made_here and self._digest.exists() and self._hashed() == self._digest.read_text()
        except BadFile:
            sound = False
        except OSError as error:
            if durable.is_short(error):
                raise
            sound = False  # a disk that fails under what is derived is no reason to stop
        if sound:
            self._reader, self._ready, self._ready_bytes = reader, set(self._bytes), self._all_bytes
            self._stamp = stamp(os.fstat(self._files[0]))
        else:
            self.close()
            self._remove()

    def _hashed(self) -> str:
        return entry(self._path, read=self._driver.watch.advance).sha256

    def _begin(self) -> TensorWriter:
        """Raises OSError where the disk would be left without room for the next version."""
        specs = list(self._specs.values())
        size = build_header(specs, self._key)[1].size
        if shutil.disk_usage(self._unfinished.parent).free < size + self._reserve:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fd = self._open(durable.create(self._unfinished, size))
        return TensorWriter(fd, specs, self._key, self._driver.watch)

    def _keep(self) -> None:
        """Gives the finished file its name; it stays open."""
        assert self._writer
        hit("prepared.before")
        durable.sync(self._files[0])
        durable.replace_file(self._digest, self._writer.finish().encode())
        durable.rename(self._unfinished, self._path)
        hit("prepared.after")

    def _remove(self) -> None:
        durable.remove(self._path)
        durable.remove(self._digest)

    def _open(self, fd: int) -> int:
        self._files.append(fd)
        return fd


def _next_version_bytes(heads: Sequence[HeadTip], base: Checkpoint) -> int:
    """What the next version of every head will take on the disk: its state, its record and its weights."""
    schema = base.schema
    weights = sum(spec.nbytes for spec in schema.values())
    kept = (spec for tip in heads for of in (state_specs, record_specs) for spec in of(tip.method, schema))
    return len(heads) * weights + sum(spec.nbytes for spec in kept)


def _bytes_by_tensor(tip: HeadTip, base: Checkpoint) -> Mapping[str, int]:
    """What is prepared for each of the base's tensors, in bytes; without those for which nothing is."""
    schema = base.schema
    sizes = {
        name: sum(spec.nbytes for spec in rule_of(tip.method, schema[name]).prepares(schema[name]).values())
        for name in base.order
    }
    return {name: size for name, size in sizes.items() if size}


def _maker(device: Device) -> str:
    """What the bits depend on beside the state."""
    products = torch.get_float32_matmul_precision()
    return f"mainstem {software_version()}, torch {torch.__version__}, {device.name}, products {products}"
