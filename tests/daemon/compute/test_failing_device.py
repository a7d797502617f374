"""The daemon on a device that fails: good experts are merged all the same, or stay where they are."""

from pathlib import Path
from threading import Event

import pytest
import torch

from daemon.compute import resources
from daemon.compute.progress import Progress
from daemon.layout import Home
from daemon.merge.merger import Merger
from projector.driver.device import Device
from projector.errors import DeviceLost
from registry.records import Status
from registry.store import Store
from tests.daemon.homes import drain, experts, latest, live, make_home, put, quick
from tests.daemon.processes import forked
from tests.models import write_expert
from tests.projector.cards import PretendCard, accelerator_error

ILLEGAL = accelerator_error("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be", 700)
NOT_CONVERGED = torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge (error code: 511)")  # type: ignore[attr-defined]
NO_HANDLE = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def on(card: PretendCard, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon finds this card."""
    monkeypatch.setattr(resources, "device", lambda settings: card)


def test_what_the_device_cannot_do_quarantines_no_expert(
    base: Path, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (2, 3):
        put(home, write_expert(tmp_path / f"{seed}.safetensors", base, seed))
    undisturbed = make_home(tmp_path / "undisturbed", base)
    for seed in (2, 3):
        put(undisturbed, write_expert(tmp_path / f"{seed}.safetensors", base, seed))
    drain(undisturbed)
    on(PretendCard([None, NOT_CONVERGED, NO_HANDLE, NO_HANDLE, NOT_CONVERGED]), monkeypatch)
    metrics = drain(home, quick(compute={"threads": 1}))  # one worker: which of two met an error would be chance
    assert [expert.status for expert in experts(home)] == [Status.MERGED] * 2
    assert metrics.get_sample_value("mainstem_device_fallbacks_total") == 3
    for name, tensor in latest(undisturbed).items():
        assert torch.equal(latest(home)[name], tensor), name


def test_a_lost_device_ends_the_daemon_and_the_next_one_merges(
    base: Path, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped = put(home, write_expert(tmp_path / "2.safetensors", base, 2))
    with monkeypatch.context() as patch:
        on(PretendCard([ILLEGAL]), patch)
        ended = forked("run", "--home", home.root, "--once", "--no-http")
    assert ended.returncode == 1
    assert "is lost: CUDA error: an illegal memory access" in ended.stderr, ended.stderr
    assert "start the daemon again" in ended.stderr and "Traceback" not in ended.stderr
    assert dropped.exists() and not experts(home)
    drain(home)
    assert live(home) == 1 and experts(home)[0].status is Status.MERGED


def test_a_device_lost_while_it_prepares_ends_the_daemon_too(
    base: Path, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(home, write_expert(tmp_path / "2.safetensors", base, 2))
    drain(home)
    on(PretendCard([ILLEGAL]), monkeypatch)
    with Store.open(home.registry) as store:
        merger = Merger(home, store, quick(), Progress(Event(), lambda share: None))
        try:
            with pytest.raises(DeviceLost):
                merger.preparations.work(lambda: False)
        finally:
            merger.close()


def test_what_was_prepared_with_other_products_is_not_taken_up(
    base: Path, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(home, write_expert(tmp_path / "2.safetensors", base, 2))
    drain(home)
    monkeypatch.setattr(resources, "device", lambda settings: Device())  # which leaves the precision as it is here
    shares = []
    try:
        for precision in ("highest", "highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            with Store.open(home.registry) as store:
                merger = Merger(home, store, quick(), Progress(Event(), lambda share: None))
                shares.append(merger.preparations.share("main"))
                merger.preparations.work(lambda: False)
                merger.close()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert shares == [0.0, 1.0, 0.0, 0.0]
