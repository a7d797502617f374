"""The one place that makes bytes durable: modes, atomic replacement, the lock, and what it never does."""

import errno
import fcntl
import os
import shutil
import stat
import sys
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE, Popen
from threading import Event

import pytest

from daemon.disk import durable


def test_a_new_file_is_whole_private_to_nobody_and_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "x"
    before = os.umask(0o077)
    try:
        durable.write_file(path, b"abc")
    finally:
        os.umask(before)
    assert path.read_bytes() == b"abc"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    with pytest.raises(FileExistsError):
        durable.write_file(path, b"other")
    assert path.read_bytes() == b"abc"


def test_a_new_file_does_not_go_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(FileExistsError):
        durable.write_file(tmp_path / "link", b"abc")
    assert not (tmp_path / "target").exists()


def test_space_is_reserved_before_anything_is_written(tmp_path: Path) -> None:
    with durable.new_file(tmp_path / "x", 1 << 20):
        assert (tmp_path / "x").stat().st_blocks * 512 >= 1 << 20
    with pytest.raises(OSError) as full, durable.new_file(tmp_path / "huge", 1 << 60):
        pass
    assert durable.is_full(full.value) or full.value.errno == errno.EFBIG


def test_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x"
    (tmp_path / ".x.tmp").write_bytes(b"left by a crash")
    durable.replace_file(path, b"one")
    durable.replace_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["x"]


def test_two_folders_change_places_in_one_step(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(name)
    inode = (tmp_path / "one").stat().st_ino
    durable.exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "other").stat().st_ino == inode
    assert [(tmp_path / name / "name").read_text() for name in ("one", "other")] == ["other", "one"]
    with pytest.raises(FileNotFoundError):
        durable.exchange(tmp_path / "one", tmp_path / "nothing")
    assert sorted(os.listdir(tmp_path)) == ["one", "other"]


def test_a_link_is_swapped_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = tmp_path / "latest"
    durable.point(link, "000001")
    seen = []
    rename = Path.rename

    def watching(source: Path, target: Path) -> Path:
        seen.append(os.readlink(target))
        moved = rename(source, target)
        seen.append(os.readlink(target))
        return moved

    monkeypatch.setattr(Path, "rename", watching)
    durable.point(link, "000002")
    assert seen == ["000001", "000002"]
    assert os.listdir(tmp_path) == ["latest"]


def test_a_second_name_shares_the_bytes_or_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"abc")
    durable.link_or_copy(source, tmp_path / "linked")
    assert (tmp_path / "linked").samefile(source)

    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    durable.link_or_copy(source, tmp_path / "copied")
    assert (tmp_path / "copied").read_bytes() == b"abc" and not (tmp_path / "copied").samefile(source)


def test_a_copy_is_exact_across_its_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "COPY_BYTES", 1000)
    data = os.urandom(12_345)
    (tmp_path / "a").write_bytes(data)
    durable.copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == data


def test_the_lock_is_held_once_and_dies_with_its_descriptor(tmp_path: Path) -> None:
    fd = durable.lock(tmp_path / "lock")
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    with pytest.raises(BlockingIOError):
        durable.lock(tmp_path / "lock")
    os.close(fd)
    os.close(durable.lock(tmp_path / "lock"))


def test_a_failed_sync_is_not_retried_and_a_full_disk_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def failing(number: int) -> None:
        def fsync(fd: int) -> None:
            calls.append(fd)
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)

    failing(errno.EIO)
    with pytest.raises(durable.SyncFailed):
        durable.sync_folder(tmp_path)
    assert len(calls) == 1
    for number in (errno.ENOSPC, errno.EDQUOT):
        failing(number)
        with pytest.raises(OSError) as full:
            durable.sync_folder(tmp_path)
        assert durable.is_full(full.value) and not isinstance(full.value, durable.SyncFailed)


@pytest.mark.parametrize("raised", [None, ValueError("a refusal"), OSError(errno.ENOSPC, "no space")])
def test_a_sync_that_failed_beside_the_work_outweighs_what_the_work_raised(
    raised: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = Event()

    def fdatasync(fd: int) -> None:
        failed.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    fd = durable.create(tmp_path / "x")
    with pytest.raises(durable.SyncFailed), durable.flushing([fd]):
        assert failed.wait(60)
        if raised:
            raise raised
    os.close(fd)


def test_a_file_that_cannot_be_closed_was_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.close

    def close(fd: int) -> None:
        real(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "close", close)
    with pytest.raises(durable.SyncFailed):
        durable.write_file(tmp_path / "x", b"abc")


def test_a_full_disk_after_a_failed_sync_is_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised:
        try:
            raise durable.SyncFailed(errno.EIO, "fsync failed")
        finally:
            raise OSError(errno.ENOSPC, "no space to tidy up either")
    assert isinstance(durable.failed_sync(raised.value), durable.SyncFailed)
    assert not durable.is_full(raised.value)
    assert durable.failed_sync(OSError(errno.EIO, "of another kind")) is None


def test_removing_takes_links_and_never_what_they_point_to(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x").touch()
    (tmp_path / "link").symlink_to("outside")
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "link").symlink_to("../outside")
    for name in ("link", "tree", "nothing"):
        durable.remove(tmp_path / name)
    assert os.listdir(tmp_path) == ["outside"] and os.listdir(tmp_path / "outside") == ["x"]


def test_renaming_between_folders_moves_at_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"new")
    (tmp_path / "b" / "x").write_bytes(b"old")
    durable.rename(tmp_path / "a" / "x", tmp_path / "b" / "x")
    assert (tmp_path / "b" / "x").read_bytes() == b"new" and os.listdir(tmp_path / "a") == []


def test_a_folder_that_was_opened_is_the_one_that_is_changed(tmp_path: Path) -> None:
    """Whatever takes the place of its path: also of what lies in it."""
    (tmp_path / "ours").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a").write_bytes(b"not ours")
    with durable.Folder(tmp_path / "ours") as ours, durable.Folder(tmp_path / "target") as target:
        (tmp_path / "ours").rename(tmp_path / "moved")
        (tmp_path / "ours").symlink_to(tmp_path / "precious")
        os.close(ours.create(".a.part"))
        ours.move(".a.part", "a")
        ours.make("below").close()
        (tmp_path / "moved" / "below" / "link").symlink_to(tmp_path / "precious")
        (tmp_path / "moved" / "link").symlink_to(tmp_path / "precious")
        with pytest.raises(NotADirectoryError):
            durable.Folder("link", below=ours)
        (tmp_path / "target" / "a").symlink_to(tmp_path / "nothing")
        with pytest.raises(FileExistsError):
            ours.move_new("a", target)
        (tmp_path / "target" / "a").unlink()
        ours.move_new("a", target)
        for name in ("below", "link", "nothing"):
            ours.remove(name)
    assert (os.listdir(tmp_path / "moved"), os.listdir(tmp_path / "target")) == ([], ["a"])
    assert (tmp_path / "precious" / "a").read_bytes() == b"not ours"


def test_removing_a_tree_cannot_be_led_astray() -> None:
    """What others may write to while it is removed: the library promises it where the system can do it."""
    assert shutil.rmtree.avoids_symlink_attacks


def test_folders_that_lie_too_deep_are_an_error_of_that_folder(tmp_path: Path) -> None:
    """Others made them: neither the interpreter's stack nor the process's descriptors may be spent on them."""
    (tmp_path / "/".join("d" * durable.MOST_LEVELS)).mkdir(parents=True)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        durable.sync_names(fd)
        (tmp_path / "/".join("d" * (durable.MOST_LEVELS + 1))).mkdir()
        with pytest.raises(OSError, match="deep") as raised:
            durable.sync_names(fd)
        assert raised.value.filename == fd
    finally:
        os.close(fd)


MAKER = """
import pathlib, sys
from daemon.disk import durable
with durable.appearing(pathlib.Path(sys.argv[1])) as folder:
    (folder / "half").touch()
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    other = tmp_path / f".out.1.{'0' * 32}.tmp"
    other.mkdir()
    (tmp_path / f".out.{'0' * 32}.tmp").symlink_to(other)  # which is none of ours
    with ExitStack() as closing:

        def maker() -> tuple[Popen[str], Path]:
            process = Popen([sys.executable, "-c", MAKER, str(out)], stdin=PIPE, stdout=PIPE, text=True)
            process = closing.enter_context(process)
            assert process.stdout
            return process, Path(process.stdout.readline().strip())

        (killed, left), (living, growing) = maker(), maker()
        killed.kill()
        killed.wait()
        assert (left / "half").exists()
        with durable.appearing(out):
            assert not left.exists() and (growing / "half").exists()
            living.communicate()
            assert living.returncode == 0 and os.listdir(out) == ["half"]
            out.rename(tmp_path / "theirs")
    assert sorted(os.listdir(tmp_path)) == sorted(["out", "theirs", other.name, f".out.{'0' * 32}.tmp"])


def test_a_folder_that_somebody_locked_is_no_reason_to_wait(tmp_path: Path) -> None:
    """`flock DIR mainstem convert MODEL DIR/OUT`: nobody would ever let go of it."""
    left = tmp_path / f".out.{'0' * 32}.tmp"
    left.mkdir()
    with durable.Folder(tmp_path) as held:
        fcntl.flock(held.fd, fcntl.LOCK_EX)
        with durable.appearing(tmp_path / "out"):
            pass
    assert sorted(os.listdir(tmp_path)) == [left.name, "out"]  # nor is it sure that the other one is abandoned
