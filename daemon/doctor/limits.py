"""What the system lets a process have: file system events, open files, threads.

Where a daemon runs, its own limits are looked at, which a service may have others of than this shell.
"""

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from daemon.doctor.finding import Finding, ok, warn

INOTIFY = Path("/proc/sys/fs/inotify")
FEW_INSTANCES, FEW_WATCHES = 16, 1024
FEW_FILES = 1024  # of which HTTP takes a quarter, and a model in many shards some hundreds
FEW_THREADS = 256
CGROUP_PIDS = Path("/sys/fs/cgroup/pids.max")


def check(pid: int, inbox: Path | None, watch: str) -> Iterator[Finding]:
    """pid: of the daemon, 0 for this process. watch: what `inbox.watch` says."""
    yield _events(inbox, watch)
    yield _files(pid)
    yield _threads(pid)


def _events(inbox: Path | None, watch: str) -> Finding:
    if watch == "poll":
        return ok("inotify", "inbox.watch is poll: no events are asked for")
    instances, watches = _number("max_user_instances"), _number("max_user_watches")
    if instances is None or watches is None:
        return warn("inotify", "this system has none", "the inbox is listed every inbox.scan_seconds all the same")
    folders = sum(1 for _ in os.walk(inbox)) if inbox and inbox.is_dir() else 1
    text = f"{watches} watches and {instances} instances for each user; the inbox needs {folders} of them"
    if watches < max(FEW_WATCHES, 2 * folders) or instances < FEW_INSTANCES:
        hint = "sysctl fs.inotify.max_user_watches=65536 fs.inotify.max_user_instances=256; or inbox.watch = poll"
        return warn("inotify", text, hint)
    return ok("inotify", text)


def _files(pid: int) -> Finding:
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    text = f"{_said(soft)} at a time (at most {_said(hard)})"
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        return warn("open files", text, f"ulimit -n {FEW_FILES * 8}, LimitNOFILE={FEW_FILES * 8} in the unit")
    return ok("open files", text)


def _threads(pid: int) -> Finding:
    soft, _ = resource.prlimit(pid, resource.RLIMIT_NPROC)
    found = [soft] if soft != resource.RLIM_INFINITY else []
    with suppress(OSError, ValueError):
        found.append(int(CGROUP_PIDS.read_text()))  # "max" where there is no limit
    text = f"{min(found)} at a time" if found else "as many as one likes"
    if found and min(found) < FEW_THREADS:
        return warn("threads", text, f"ulimit -u, TasksMax= in the unit, --pids-limit: {FEW_THREADS} or more")
    return ok("threads", text)


def _number(name: str) -> int | None:
    with suppress(OSError, ValueError):
        return int((INOTIFY / name).read_text())
    return None


def _said(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
