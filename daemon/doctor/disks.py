"""What the home lies on: the kind of file system, free space against what an arrival needs, how long a sync takes."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from uuid import uuid4

from daemon.arrivals.receiving import RESERVE_BYTES
from daemon.disk import durable
from daemon.doctor.finding import Finding, bad, ok, warn
from daemon.layout import Home
from daemon.reports.sizing import Sizing
from projector.text import size

MOUNTS = Path("/proc/self/mountinfo")
NETWORK = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "glusterfs", "lustre", "fuse.sshfs", "fuse.s3", "fuse.gcs")
FLEETING = ("tmpfs", "ramfs", "overlay")
SYNCS, SYNC_BYTES = 5, 1 << 16
SLOW_SYNC_SECONDS = 0.1
COMFORT = 3  # times what one arrival needs
FEW_INODES = 10_000


def check(folder: Path, home: Home | None, need: Sizing | None, expert_bytes: int) -> Iterator[Finding]:
    """folder: where the home is, or will be. need: None where it is not known what arrivals take."""
    yield _kind(folder)
    if home:
        yield _one(home)
    yield _space(folder, need, expert_bytes)
    yield _inodes(folder)
    yield _sync(home.tmp if home and home.tmp.is_dir() else folder)


def kind_of(folder: Path, mounts: str) -> str:
    """The kind of the file system that a folder lies on. mounts: as /proc/self/mountinfo has them."""
    path, found = os.path.realpath(folder), ("", "unknown")
    for line in mounts.splitlines():
        mounted, _, source = line.partition(" - ")
        point = mounted.split()[4].encode().decode("unicode_escape")
        if len(point) >= len(found[0]) and (path == point or path.startswith(point.rstrip("/") + "/")):
            found = point, source.split()[0]
    return found[1]


def _kind(folder: Path) -> Finding:
    try:
        kind = kind_of(folder, MOUNTS.read_text())
    except (OSError, IndexError):
        return warn("file system", "its kind cannot be told", "a local one (ext4, xfs, btrfs, zfs) is what to use")
    if kind.startswith(NETWORK):
        text = f"{kind}: locks, renames and the registry's log do not hold over a network as on a local disk"
        return bad("file system", text, "keep HOME on a local disk; let others pull, or mount it read-only there")
    if kind in FLEETING:
        why = "it goes with the container" if kind == "overlay" else "it is gone after a restart of the machine"
        return warn("file system", f"{kind}: {why}", "keep HOME on a disk, or a volume")
    return ok("file system", kind)


def _one(home: Home) -> Finding:
    device = home.state.stat().st_dev
    parts = [home.inbox, home.root / "quarantine", home.root / "archive", home.published]
    others = [path.name for path in parts if path.exists() and path.stat().st_dev != device]
    if others:
        text = f"{', '.join(others)} on another file system than state: nothing can be renamed into place"
        return bad("one file system", text, "keep all of HOME on one")
    return ok("one file system", "inbox, archive, quarantine, published and state lie on the same one")


def _space(folder: Path, need: Sizing | None, expert_bytes: int) -> Finding:
    free = shutil.disk_usage(folder).free
    if need is None:
        text = f"{size(free)} free; give --base PATH to hear what arrivals need"
        return ok("free space", text) if free > RESERVE_BYTES else bad("free space", text, "make room")
    once = need.arrival_bytes + expert_bytes + RESERVE_BYTES
    text = f"{size(free)} free; an arrival needs {size(once)}, the home at rest {size(need.home_bytes)} and its archive"
    hint = "make room, lower retention.versions (`mainstem gc`), or `mainstem prune`"
    if free < once:
        return bad("free space", text, hint)
    return warn("free space", text, hint) if free < COMFORT * once else ok("free space", text)


def _inodes(folder: Path) -> Finding:
    found = os.statvfs(folder)
    if found.f_files and found.f_favail < FEW_INODES:
        return warn("inodes", f"{found.f_favail} free", "remove small files, or make a file system with more inodes")
    return ok("inodes", f"{found.f_favail} free" if found.f_files else "as many as one likes")


def _sync(folder: Path) -> Finding:
    taken = []
    try:
        for _ in range(SYNCS):
            path = folder / f".{uuid4().hex}.tmp"
            begun = time.monotonic()
            try:
                durable.write_file(path, bytes(SYNC_BYTES))
                taken.append(time.monotonic() - begun)
            finally:
                durable.remove(path)
    except OSError as error:
        return bad(
            "sync", f"nothing can be written in {folder}: {error.strerror}", "mend its permissions, mount or disk"
        )
    text = f"{SYNC_BYTES >> 10} KiB are on the disk within {median(taken) * 1000:.1f} ms"
    if median(taken) > SLOW_SYNC_SECONDS:
        return warn("sync", text, "an arrival syncs some dozen files: a faster disk, or one that fewer share")
    return ok("sync", text)
