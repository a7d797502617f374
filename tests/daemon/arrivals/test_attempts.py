"""An expert that fails is tried again, others first, and refused at last; what fails for all is no expert's fault."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from daemon import service
from daemon.arrivals import attempts
from daemon.arrivals.attempts import DEATHS, FORGIVEN, Attempts
from daemon.arrivals.inbox import Drop
from daemon.compute.progress import Progress
from daemon.errors import BadHome
from daemon.layout import ADAPTER_FOLDER, STATE_FILE, Home
from daemon.merge.merger import Merger
from daemon.service import Service
from daemon.versions import adapter
from projector.driver import fold
from projector.files.source import Checkpoint
from projector.methods import methods
from registry.records import Status
from registry.store import Store
from tests.daemon.arrivals.test_queue import scan
from tests.daemon.homes import count, drain, experts, live, make_home, put, quick, reason_of
from tests.models import write_base, write_expert

ADAPTER = quick(heads={"main": {"adapter": {"rank": 2}}})


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "AGAIN_SECONDS", 0.05)


@pytest.fixture
def waiting(home: Home, base: Path, tmp_path: Path) -> Home:
    """A home with two experts in its inbox: bad, and behind it good."""
    for seed, name in ((2, "bad"), (3, "good")):
        path = put(home, write_expert(tmp_path / f"{name}.safetensors", base, seed))
        os.utime(path, (seed, seed))
    return home


def merged_without(home: Home, name: str, aside: Path) -> None:
    """Merges what is in the inbox but for that one, which is there again afterwards."""
    (home.inbox / name).rename(aside / name)
    drain(home)
    put(home, aside / name)


def fail_reading(patch: pytest.MonkeyPatch, error: int, ends: str, times: int = 10**6) -> None:
    """Lets reads of a file whose path ends so fail, beyond its header."""
    real, left = os.preadv, [times]

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(ends) and offset > 2000 and left[0]:
            left[0] -= 1
            raise OSError(error, os.strerror(error))
        return real(fd, buffers, offset)

    patch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.ENXIO])
def test_what_cannot_be_read_lets_others_by_and_is_refused(
    error: int, waiting: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_reading(monkeypatch, error, "bad.safetensors")
    metrics = drain(waiting)
    good, bad = experts(waiting)
    assert (good.name, good.status) == ("good.safetensors", Status.MERGED)
    assert (bad.status, bad.reason) == (Status.QUARANTINED, "unreadable")
    assert os.strerror(error) in reason_of(waiting, bad)["detail"]
    assert count(metrics, "mainstem_experts_total", outcome="requeued") == attempts.TRIES - 1
    assert not waiting.attempts.exists() and not waiting.in_hand.exists()


def test_what_can_be_read_after_all_is_merged(waiting: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_reading(monkeypatch, errno.EIO, "bad.safetensors", times=1)
    drain(waiting)
    assert [(one.name, one.status) for one in experts(waiting)] == [
        ("good.safetensors", Status.MERGED),
        ("bad.safetensors", Status.MERGED),
    ]


@pytest.mark.parametrize("ours", ["base/model.safetensors", STATE_FILE])
def test_what_cannot_be_read_of_ours_ends_the_daemon(
    ours: str, waiting: Home, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged_without(waiting, "good.safetensors", tmp_path)
    fail_reading(monkeypatch, errno.EIO, ours)
    for _ in range(2 * attempts.TRIES):
        with pytest.raises(OSError, match=ours):
            drain(waiting)
    assert live(waiting) == 1 and os.listdir(waiting.inbox) == ["good.safetensors"]
    assert not waiting.attempts.exists() and not waiting.in_hand.exists()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("unable to mmap 1024 bytes: Cannot allocate memory (12)"),
        MemoryError("no more"),
        OverflowError("too large"),
        torch.linalg.LinAlgError("it did not converge"),  # type: ignore[attr-defined]
        RecursionError("too deep"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_one_expert_raises_is_its_fault_alone(
    error: Exception, waiting: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, bad = fold._deltas, [(waiting.inbox / "bad.safetensors").stat().st_ino]

    def deltas(source: Checkpoint, *others: Any, **more: Any) -> object:
        files = source._places.values()
        if any(os.fstat(place.file._fd).st_ino in bad for place in files):
            raise error
        return real(source, *others, **more)

    monkeypatch.setattr(fold, "_deltas", deltas)
    drain(waiting)
    assert [(one.name, one.status, one.reason) for one in experts(waiting)] == [
        ("good.safetensors", Status.MERGED, None),
        ("bad.safetensors", Status.QUARANTINED, "fault"),
    ]


@pytest.mark.parametrize(
    "error",
    [
        torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge"),  # type: ignore[attr-defined]
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    ],
    ids=["arithmetic", "device"],
)
def test_what_fails_for_the_base_too_is_no_experts_fault(
    error: Exception, waiting: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged_without(waiting, "good.safetensors", tmp_path)

    def eigh(*_: object) -> None:
        raise error

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    with pytest.raises(BadHome, match=re.escape(str(error))) as stopped:
        drain(waiting)
    assert "mainstem verify" in stopped.value.hint
    assert live(waiting) == 1 and os.listdir(waiting.inbox) == ["good.safetensors"]


def fail_adapters(patch: pytest.MonkeyPatch, only_over: float) -> None:
    """Lets torch fail to cut a task vector to a rank, where a value in it is larger."""
    real = adapter.low_rank

    def low_rank(delta_MN: torch.Tensor, rank: int) -> object:
        if delta_MN.abs().max() > only_over:
            raise RuntimeError("linalg.svd: the algorithm failed to converge")
        return real(delta_MN, rank)

    patch.setattr(adapter, "low_rank", low_rank)


def test_what_torch_cannot_seal_is_its_experts_fault_alone(
    home: Home, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are merged and written by then, but no adapter can be made of them."""
    put(home, write_expert(tmp_path / "first.safetensors", base, 2))
    drain(home, ADAPTER)
    for seed, name, scale in ((3, "bad", 1.0), (4, "good", 0.01)):
        path = put(home, write_expert(tmp_path / f"{name}.safetensors", base, seed, scale))
        os.utime(path, (seed, seed))
    fail_adapters(monkeypatch, only_over=0.5)
    metrics = drain(home, ADAPTER)
    _, good, bad = experts(home)
    assert (good.name, good.status, live(home)) == ("good.safetensors", Status.MERGED, 2)
    assert (bad.name, bad.status, bad.reason) == ("bad.safetensors", Status.QUARANTINED, "fault")
    assert "RuntimeError: linalg.svd" in (bad.detail or "")
    assert count(metrics, "mainstem_experts_total", outcome="requeued") == attempts.TRIES - 1
    assert (home.latest("main") / ADAPTER_FOLDER).exists()
    assert not home.attempts.exists() and not home.in_hand.exists() and not os.listdir(home.tmp)


def test_where_nothing_can_be_sealed_no_expert_is_to_blame(
    waiting: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged_without(waiting, "good.safetensors", tmp_path)
    fail_adapters(monkeypatch, only_over=0.0)
    with pytest.raises(BadHome, match=r"not even the base itself.*linalg\.svd"):
        drain(waiting, ADAPTER)
    assert live(waiting) == 1 and os.listdir(waiting.inbox) == ["good.safetensors"]


class UntilEmpty(Service):
    """A daemon that stops once its inbox is empty, and whose disk has room again when it has waited twice."""

    waits = 0

    def __init__(self, home: Home, full: Path) -> None:
        super().__init__(home, quick())
        self._full = full

    def _show_disk(self, *, full: bool) -> None:
        super()._show_disk(full=full)
        self.waits += full
        if self.waits == 2:
            self._full.unlink(missing_ok=True)

    def _tell(self, *args: Any) -> None:
        super()._tell(*args)
        if not os.listdir(self._home.inbox):
            self._stopping.ask()


def fill_up(note: Path) -> Path:
    """The kernel says that the disk is full whenever this note is written, until what is returned is removed."""
    new = note.with_name(f".{note.name}.tmp")
    new.symlink_to("/dev/full")
    return new


def test_a_full_disk_under_the_note_of_what_is_in_hand_is_waited_for(
    waiting: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "DISK_FULL_WAIT_SECONDS", 0.01)
    full = fill_up(waiting.in_hand)
    with pytest.raises(OSError, match="No space left"):
        drain(waiting)
    assert sorted(os.listdir(waiting.inbox)) == ["bad.safetensors", "good.safetensors"] and not experts(waiting)
    daemon = UntilEmpty(waiting, full)
    daemon.run(http=False)
    assert daemon.waits == 2
    assert [(one.name, one.status) for one in experts(waiting)] == [
        ("bad.safetensors", Status.MERGED),
        ("good.safetensors", Status.MERGED),
    ]


def test_tries_are_counted_on_a_full_disk_too(waiting: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, _ = scan(waiting).settled
    full = fill_up(waiting.attempts)
    killed_with(waiting, bad)
    fail_reading(monkeypatch, errno.EIO, "bad.safetensors")
    drain(waiting)
    assert [(one.name, one.reason) for one in experts(waiting)] == [
        ("good.safetensors", None),
        ("bad.safetensors", "unreadable"),
    ]
    assert full.is_symlink() and not waiting.attempts.exists()


def spoilt(data: bytearray) -> None:
    data[-4:] = b"\xff\xff\xff\x7f"  # NaN


def cut(data: bytearray) -> None:
    del data[-100:]


def beheaded(data: bytearray) -> None:
    data[:8] = bytes(8)


@pytest.mark.parametrize("damage", [spoilt, cut, beheaded], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("method", ["mean", "ema"])
def test_a_damaged_state_is_no_experts_fault(damage: Callable[[bytearray], None], method: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.safetensors", 1)
    home = make_home(tmp_path / "home", base, (("main", method, {}),))
    put(home, write_expert(tmp_path / "first.safetensors", base, 2))
    drain(home)
    state = home.head_state("main", 1) / STATE_FILE
    data = bytearray(state.read_bytes())
    damage(data)
    put(home, write_expert(tmp_path / "next.safetensors", base, 3))

    class Damaging(Service):
        """The state is damaged after the start has looked at it."""

        def _take(self, *args: object) -> bool:
            state.write_bytes(data)
            return super()._take(*args)  # type: ignore[arg-type]

    with pytest.raises(BadHome):
        Damaging(home, quick()).run(once=True, http=False)
    assert live(home) == 1 and os.listdir(home.inbox) == ["next.safetensors"]


def killed_with(home: Home, drop: Drop) -> Attempts:
    """What the next process knows, once one was killed with this drop in hand."""
    Attempts(home).begin(drop)
    return Attempts(home)


def test_who_is_in_hand_whenever_the_process_dies_is_refused_at_last(waiting: Home, base: Path, tmp_path: Path) -> None:
    bad, good = scan(waiting).settled
    for deaths in range(1, DEATHS):
        tries = killed_with(waiting, bad)
        assert tries.order([bad, good]) == ([bad, good] if deaths <= FORGIVEN else [good, bad])
        assert tries.killed(bad) is None
    killed_with(waiting, bad)
    drain(waiting)
    assert [(one.name, one.reason) for one in experts(waiting)] == [
        ("good.safetensors", None),
        ("bad.safetensors", "fault"),
    ]
    assert "killed 5 times" in (experts(waiting)[1].detail or "")
    assert json.loads(waiting.attempts.read_text()) == {"tries": {}, "blamed": "bad.safetensors"}
    put(waiting, write_expert(tmp_path / "next.safetensors", base, 4))
    drain(waiting)
    assert experts(waiting)[2].status is Status.MERGED and not waiting.attempts.exists()


def test_of_two_in_a_row_the_home_is_to_blame_until_something_is_merged(waiting: Home) -> None:
    bad, good = scan(waiting).settled
    (waiting.root / "aside").mkdir()
    aside = (waiting.inbox / "good.safetensors").rename(waiting.root / "aside" / "good.safetensors")
    for _ in range(DEATHS):
        killed_with(waiting, bad)
    drain(waiting)
    aside.rename(waiting.inbox / "good.safetensors")
    for _ in range(2):
        for _ in range(DEATHS):
            killed_with(waiting, good)
        with pytest.raises(BadHome, match=r"while it merged good\.safetensors, and before .* merged bad\.safetensors"):
            drain(waiting)
        assert [one.name for one in experts(waiting)] == ["bad.safetensors"]
    drain(waiting)  # the machine was mended: what the hint says is enough
    shutil.move(waiting.quarantine(1) / "bad.safetensors", waiting.inbox)
    drain(waiting)
    assert [one.status for one in experts(waiting)[1:]] == [Status.MERGED] * 2 and not waiting.attempts.exists()


def test_where_the_process_dies_of_every_expert_none_is_to_blame(waiting: Home) -> None:
    bad, good = scan(waiting).settled
    for _ in range(DEATHS):
        killed_with(waiting, good)
        tries = killed_with(waiting, bad)
    assert tries.killed(bad) is None and tries.killed(good) is None


def test_a_power_failure_and_a_stop_are_nobodys_fault(waiting: Home) -> None:
    bad, _ = scan(waiting).settled
    tries = Attempts(waiting)
    tries.begin(bad)
    waiting.in_hand.write_text(json.dumps({**json.loads(waiting.in_hand.read_text()), "boot": "another"}))
    Attempts(waiting)
    tries.begin(bad)
    tries.let_go()
    Attempts(waiting)
    for torn in (b"", b"{", b"[]", b'{"boot": 1}'):
        waiting.in_hand.write_bytes(torn)
        waiting.attempts.write_bytes(torn)
        Attempts(waiting)
    waiting.attempts.unlink()
    assert Attempts(waiting).order([bad]) == [bad]
    assert not waiting.attempts.exists() and not waiting.in_hand.exists()


def test_the_base_itself_can_be_folded_into_every_method(base: Path, tmp_path: Path) -> None:
    """Else an expert's fault would be taken for the state's."""
    kinds = {name: cls for name, cls in methods().items() if not cls().needs}
    heads = [(name, name, dict[str, Any]()) for name in kinds]
    home = make_home(tmp_path / "home", base, heads)
    put(home, write_expert(tmp_path / "first.safetensors", base, 2))
    drain(home)
    with Store.open(home.registry) as store:
        merger = Merger(home, store, quick(), Progress(Event(), lambda share: None))
        try:
            merger._check_folds()
        finally:
            merger.close()
    assert len(kinds) > 10 and not os.listdir(home.tmp)
