"""Hostile files for `mainstem convert`: nothing in them runs, each is refused by its name, and no limit is crossed."""

import argparse
import io
import json
import os
import pickle
import resource
import signal
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from daemon.convert import confining, unpickling
from daemon.convert.confining import Options
from daemon.convert.converting import convert
from daemon.errors import Refused
from projector.errors import BadFile
from tests.attacks.drops import LFS, Payload
from tests.daemon.processes import ended, until

LEGACY = {"_use_new_zipfile_serialization": False}
WEIGHTS = {"w": torch.arange(6.0)}


class Calls:
    """Pickled as a call of anything."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.fixture
def proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a payload makes where it runs."""
    monkeypatch.setattr(Payload, "proof", tmp_path / "it-ran", raising=False)
    return tmp_path / "it-ran"


def refused(path: Path, options: Options = Options()) -> Refused:  # noqa: B008
    """Converts through the real process; what it was refused for, once nothing but the file is left."""
    before = sorted(os.listdir(path.parent))
    with pytest.raises(Refused) as caught:
        convert(path, path.parent / "out.safetensors", options)
    assert sorted(os.listdir(path.parent)) == before
    return caught.value


# What would run


def test_the_payload_works(proof: Path) -> None:
    """Unpickled as usual it runs: else that it never ran would prove nothing."""
    pickle.loads(pickle.dumps(Payload()))
    assert proof.exists()


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_a_payload_never_runs_and_is_named(proof: Path, tmp_path: Path, options: dict[str, bool]) -> None:
    torch.save({**WEIGHTS, "x": Payload()}, tmp_path / "rce.pt", **options)  # type: ignore[arg-type]
    error = refused(tmp_path / "rce.pt")
    assert error.reason == "pickle" and "posix.system" in str(error) and "nothing ran" in str(error)
    assert "state_dict" in error.hint and "add_safe_globals" not in f"{error} {error.hint}"
    assert not proof.exists()


def test_a_payload_in_a_plain_pickle_or_a_folder_never_runs(proof: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/pytorch_model.bin").write_bytes(pickle.dumps({"x": Payload()}))
    error = refused(tmp_path / "plain")
    assert error.reason == "pickle" and "pytorch_model.bin: it is a plain pickle" in str(error)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (argparse.Namespace(lr=1e-3), "argparse.Namespace"),
        (Calls(eval, "1 + 1"), "eval"),
        (Calls(getattr, "x", "join"), "getattr"),
        (Calls(partial, print), "functools.partial"),
        (Calls(io.open, "/etc/passwd"), "io.open"),
        (Calls(torch.load, "other.pt"), "torch.serialization.load"),
    ],
    ids=["namespace", "eval", "getattr", "partial", "open", "load"],
)
def test_what_is_not_of_weights_is_refused_by_its_name(value: Any, named: str, tmp_path: Path) -> None:
    """In this process: torch's unpickler is the same."""
    torch.save({**WEIGHTS, "args": value}, tmp_path / "w.pt")
    error = here(tmp_path / "w.pt")
    assert error.reason == "pickle" and f"asks for {named}," in str(error)


def here(path: Path, most_bytes: int = 1 << 24) -> Refused:
    """Converts in this process; what it was refused for."""
    target = os.open(path.parent / "out", os.O_RDWR | os.O_CREAT)
    try:
        job = unpickling.Job(0, os.open(path, os.O_RDONLY), target, 1 << 30, most_bytes, 60, None, "")
        with pytest.raises(Refused) as caught:
            unpickling.convert(job, lambda *_: None)
    finally:
        os.close(target)
    return caught.value


# What is not what it seems


def rewritten(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Writes a torch archive anew, its entries changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(name, data))


def torch_zip(path: Path) -> None:
    torch.save(WEIGHTS, path)


def later_protocol(path: Path) -> None:
    torch.save(WEIGHTS, path, pickle_protocol=4)


def torchscript(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", b"\x80\x02}.")
        archive.writestr("net/constants.pkl", b"\x80\x02).")
        archive.writestr("net/code/__torch__.py", b"def forward(self): pass")


def plain_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "weights elsewhere")


def bomb(path: Path) -> None:
    """Zeros, a thousand times what they take."""
    torch_zip(path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, archive.open("bomb/data/1", "w") as entry:
        for _ in range(64):
            entry.write(bytes(1 << 20))


def overlapping(path: Path) -> None:
    """A directory in which many entries are the same bytes."""
    torch.save({"w": torch.zeros(50_000)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        data = archive.getinfo(f"{path.stem}/data/0")
        archive.filelist += [data] * 20
        archive._didModify = True


def cut(path: Path) -> None:
    torch_zip(path)
    path.write_bytes(path.read_bytes()[:-200])


def cut_legacy(path: Path) -> None:
    torch.save(WEIGHTS, path, **LEGACY)  # type: ignore[arg-type]
    path.write_bytes(path.read_bytes()[:-8])


def lying_size(path: Path) -> None:
    """Its pickle says 100,000 elements where the archive has six."""
    torch_zip(path)
    rewritten(path, lambda name, data: data.replace(b"K\x06", b"J\xa0\x86\x01\x00"))


def no_such_storage(path: Path) -> None:
    torch_zip(path)
    rewritten(path, lambda name, data: data.replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009"))


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))


def already_safe(path: Path) -> None:
    save_file(WEIGHTS, path)


def text_of_a_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"w": [1.0]}, protocol=0))


def endless(path: Path) -> None:
    """A terabyte that is one number, repeated."""
    torch.save({"w": torch.ones(1).expand(1 << 38)}, path)


def written(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


@pytest.mark.parametrize(
    ("make", "reason", "said"),
    [
        (later_protocol, "pickle", "no plain state dict"),
        (torchscript, "pickle", "a TorchScript archive, which is a program"),
        (plain_zip, "pickle", "a zip archive that torch.save did not write"),
        (bomb, "convert", "compressed, which torch.save never does"),
        (overlapping, "convert", "its entries overlap"),
        (cut, "truncated", "damaged or cut short"),
        (cut_legacy, "truncated", "damaged or cut short"),
        (lying_size, "truncated", "damaged or cut short"),
        (no_such_storage, "truncated", "damaged or cut short"),
        (tar, "pickle", "a tar archive"),
        (already_safe, "convert", "a safetensors file already"),
        (text_of_a_pickle, "pickle", "no file of torch.save"),
        (endless, "convert", "its tensors would take"),
        (written(b""), "truncated", "it is empty"),
        (written(bytes(4096)), "truncated", "begins with zeros"),
        (written(LFS), "lfs_pointer", "git-lfs pointer"),
        (written(b"GGUF\x03" + bytes(64)), "pickle", "no file of torch.save"),
        (written(b"PK\x03\x04" + b"\xff" * 600), "truncated", "damaged or cut short"),
        (written(b"\x80\x02" + unpickling.LEGACY + b"\xff" * 64), "pickle", "no plain state dict"),
    ],
)
def test_each_is_refused_by_its_name(make: Callable[[Path], None], reason: str, said: str, tmp_path: Path) -> None:
    make(tmp_path / "w.pt")
    error = here(tmp_path / "w.pt")
    assert (str(error.reason), said in str(error)) == (reason, True), error
    assert error.hint


def test_a_dict_that_holds_itself_comes_to_an_end(tmp_path: Path) -> None:
    loop: dict[str, Any] = {"w": torch.ones(2)}
    loop["model"] = loop
    loop["list"] = [loop]
    torch.save(loop, tmp_path / "loop.pt")
    assert "levels deep" in str(here(tmp_path / "loop.pt"))


# Limits


def test_memory_is_limited(tmp_path: Path) -> None:
    """A call on the list, bytearray(2**40), must not be able to take the machine's memory."""
    torch.save({**WEIGHTS, "x": Calls(bytearray, 1 << 40)}, tmp_path / "large.pt")
    error = refused(tmp_path / "large.pt")
    assert "needs more memory" in str(error) and "--memory" in error.hint


def test_the_least_limit_holds_for_the_smallest_file(tmp_path: Path) -> None:
    """What Python and torch have mapped and do not use is a small part of it; no smaller one can be asked for."""
    least = confining.LEAST_MEMORY_BYTES
    torch.save({**WEIGHTS, "x": Calls(bytearray, least + (4 << 20))}, tmp_path / "small.pt")
    assert "needs more memory" in str(refused(tmp_path / "small.pt", Options(memory_bytes=least)))
    torch.save(WEIGHTS, tmp_path / "small.pt")
    convert(tmp_path / "small.pt", tmp_path / "out.safetensors", Options(memory_bytes=least))
    with pytest.raises(Refused, match=f"{least - 1} bytes of memory cannot be held: {least} are the least") as caught:
        Options(memory_bytes=least - 1)
    assert "--memory" in caught.value.hint


def test_the_persons_limit_holds(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(16 << 20)}, tmp_path / "w.pt")
    assert "needs more memory" in str(refused(tmp_path / "w.pt", Options(memory_bytes=32 << 20)))
    convert(tmp_path / "w.pt", tmp_path / "out.safetensors", Options(memory_bytes=256 << 20))


# A process that has been taken over


@pytest.fixture
def taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confining, "PROCESS", "tests.attacks.hostile_process")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    torch_zip(tmp_path / "w.pt")
    return tmp_path / "w.pt"


def test_it_gets_no_more_than_it_needs(taken_over: None, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAINSTEM_HTTP__TOKEN", "secret")
    with plain.open("rb") as ours:
        os.set_inheritable(ours.fileno(), True)
        error = refused(plain, Options(key="show_surroundings"))
    found = json.loads(str(error).partition(": ")[2])
    assert found["descriptors"] == sorted([0, 1, 2, *found["given"]])
    assert not {"MAINSTEM_HTTP__TOKEN", "HOME", "PATH"} & set(found["environment"])
    assert found["folder"] == "/" and found["leads"] and found["safe_path"]


def test_its_limits_are_the_systems(taken_over: None, plain: Path) -> None:
    error = refused(plain, Options(memory_bytes=300 << 20, seconds=50, key="confine_itself"))
    found = json.loads(str(error).partition(": ")[2])
    most = confining.GROWTH * plain.stat().st_size + confining.GROWTH_ROOM_BYTES
    assert found["FSIZE"] == [most, most] and found["CPU"] == [55, 55]
    assert found["NPROC"] == found["CORE"] == [0, 0] and found["NOFILE"] == [unpickling.OPEN_FILES] * 2
    assert 300 << 20 < found["AS"][0] == found["AS"][1] != resource.RLIM_INFINITY
    assert (found["memory"], found["file"]) == ("refused", "File too large")
    assert found["nice"] >= unpickling.NICENESS and found["no_new_privileges"] == "1"


@pytest.mark.parametrize(
    ("play", "said"),
    [
        ("report_nonsense", "said what it cannot mean"),
        ("refuse_nonsense", "said what it cannot mean"),
        ("progress_nonsense", "said what it cannot mean"),
        ("report_more_than_a_number", "said what it cannot mean"),
        ("refuse_in_colour", r"\x1b[31mred\n"),
        ("babble", "said what it cannot mean"),
        ("crash", "ended by SIGSEGV"),
        ("be_killed", "was killed"),
        ("be_ended_oddly", "ended by signal 40"),
        ("fail", r"failed (exit status 1): RuntimeError: \x1b[31mno reason"),
    ],
)
def test_nothing_it_says_is_believed(taken_over: None, plain: Path, play: str, said: str) -> None:
    error = refused(plain, Options(key=play))
    assert error.reason == "convert" and said in str(error), error
    assert error.hint.isprintable()


def test_its_time_ends_while_it_talks(taken_over: None, plain: Path) -> None:
    started = monotonic()
    assert "took longer" in str(refused(plain, Options(key="never_pause", seconds=2)))
    assert monotonic() - started < 10


@pytest.mark.parametrize("play", ["write_nothing", "write_a_bad_header"])
def test_nothing_it_writes_is_believed(taken_over: None, plain: Path, play: str) -> None:
    with pytest.raises(BadFile):
        convert(plain, plain.parent / "out.safetensors", Options(key=play))
    assert os.listdir(plain.parent) == ["w.pt"]


def test_it_is_ended_with_its_children(taken_over: None, plain: Path) -> None:
    target = os.open(plain.parent / "child", os.O_RDWR | os.O_CREAT)
    source = os.open(plain, os.O_RDONLY)
    with pytest.raises(Refused, match="took longer"):
        confining.unpickle(source, target, Options(key="hang_with_a_child", seconds=3), lambda *_: None)
    child = int(os.pread(target, 20, 0))
    os.close(source)
    os.close(target)
    assert until(lambda: ended(child), 10)


def test_it_ends_with_whoever_asked_for_it(taken_over: None, plain: Path) -> None:
    """Killed, that one can end nothing any more."""
    target = os.open(plain.parent / "process", os.O_RDWR | os.O_CREAT)
    source = os.open(plain, os.O_RDONLY)
    asking = os.fork()
    if asking == 0:
        try:
            confining.unpickle(source, target, Options(key="stay_confined"), lambda *_: None)
        finally:
            os._exit(1)
    said = until(lambda: os.pread(target, 20, 0), 60)
    os.kill(asking, signal.SIGKILL)
    os.waitpid(asking, 0)
    os.close(source)
    os.close(target)
    process = int(said)
    try:
        assert until(lambda: ended(process), 10)
    finally:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def test_ordered_dicts_and_parameters_are_plain(tmp_path: Path) -> None:
    """The refusals above are no refusals of everything."""
    value = OrderedDict(w=torch.nn.Parameter(torch.ones(3)))
    torch.save(value, tmp_path / "w.pt")
    convert(tmp_path / "w.pt", tmp_path / "out.safetensors")
