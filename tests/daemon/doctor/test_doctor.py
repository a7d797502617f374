"""`mainstem doctor`: each thing that is wrong with a machine or a home is named, with what to do."""

import json
import os
import resource
import sqlite3
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from daemon.config import Settings
from daemon.doctor import clocks, computing, disks, limits, owners
from daemon.doctor.examining import examine
from daemon.doctor.finding import Finding, Level
from daemon.layout import Home
from daemon.reports.sizing import of_home
from tests.daemon.homes import lineage, quick
from tests.daemon.processes import forked
from tests.models import write_base
from tests.nobody import as_nobody


def levels(findings: Iterable[Finding]) -> dict[str, Level]:
    found = list(findings)
    assert all(one.hint for one in found if one.level is not Level.OK), found
    return {one.check: one.level for one in found}


def test_a_sound_home_and_a_plain_folder(home: Home, tmp_path: Path) -> None:
    done = forked("doctor", home.root, "--json")
    said = json.loads(done.stdout)
    assert done.returncode == 0 and said["good"] and said["folder"] == str(home.root)
    checks = [one["check"] for one in said["findings"]]
    assert {"settings", "registry", "daemon", "sizing", "sync", "owner", "open files", "clock", "torch"} <= {*checks}
    base = write_base(tmp_path / "base.safetensors", seed=1)
    done = forked("doctor", tmp_path / "not" / "yet", "--base", base)
    assert done.returncode == 0 and "arrival by confluence reads" in done.stdout and "registry" not in done.stdout
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["base.safetensors"]
    (missing,) = [one for one in examine(tmp_path / "not", tmp_path / "no") if one.check == "base"]
    assert missing.level is Level.BAD and missing.text.endswith("no does not exist") and "--base" in missing.hint


def test_a_head_that_cannot_go_on_is_bad_and_the_rest_is_looked_at(home: Home) -> None:
    """Its method is not installed any more, or has other parameters by now; a base that is gone is said once."""
    for change in ("method = 'gone'", "method = 'confluence', params = '{\"tol\": 0.1}'"):
        with sqlite3.connect(home.registry) as raw:
            raw.execute(f"UPDATE heads SET {change}")
        raw.close()
        found = levels(examine(home.root))
        assert found["states"] is Level.BAD and {"free space", "clock", "torch"} <= found.keys()
    (home.base / "model.safetensors").unlink()
    found = levels(examine(home.root))
    assert found["base"] is Level.BAD and "states" not in found


def test_what_is_damaged_is_bad(home: Home) -> None:
    (home.root / "mainstem.toml").write_text("[http]\nport = 'x'\n")
    (home.base / "model.safetensors").write_bytes(b"no more")
    with sqlite3.connect(home.registry) as raw:
        raw.execute("UPDATE tallies SET experts = 7")
        raw.execute("INSERT OR REPLACE INTO tallies VALUES ('merged', 7)")
    raw.close()
    found = levels(examine(home.root))
    assert {name for name, level in found.items() if level is Level.BAD} >= {"settings", "registry", "base"}
    done = forked("doctor", home.root)
    assert done.returncode == 1 and "bad   registry" in done.stdout and "hint: " in done.stdout
    home.registry.write_bytes(b"SQLite format 3\0" + bytes(4096))
    assert levels(examine(home.root))["registry"] is Level.BAD


@pytest.mark.parametrize(
    ("mounts", "kind"),
    [
        ("1 0 8:1 / / rw - ext4 /dev/sda rw", "ext4"),
        ("1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:40 / /data rw shared:1 - nfs4 server:/x rw", "nfs4"),
        ("1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:40 / /dat rw - nfs4 server:/x rw", "ext4"),
        ("1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:40 / /data/a\\040b rw - cifs x rw", "ext4"),
        ("2 1 0:40 / /data rw - xfs x rw\n3 2 0:41 / /data rw - tmpfs tmpfs rw", "tmpfs"),
    ],
)
def test_the_kind_of_a_file_system(mounts: str, kind: str) -> None:
    assert disks.kind_of(Path("/data/home"), mounts) == kind


def test_a_network_file_system_and_a_full_disk(home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    monkeypatch.setattr(disks, "MOUNTS", mounts)
    with lineage(home) as reader:
        need = of_home(home, reader, quick())
    for kind, level in (("nfs4", Level.BAD), ("tmpfs", Level.WARN), ("xfs", Level.OK)):
        mounts.write_text(f"1 0 8:1 / / rw - {kind} x rw\n")
        assert levels(disks.check(home.root, home, need, 0))["file system"] is level
    free = 10 * disks.RESERVE_BYTES
    monkeypatch.setattr(disks.shutil, "disk_usage", lambda _: type("U", (), {"free": free}))
    for times, level in ((1, Level.BAD), (4, Level.WARN), (20, Level.OK)):
        big = replace(need, arrival_bytes=free // times)
        assert levels(disks.check(home.root, home, big, 0))["free space"] is level


def test_limits(home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(limits, "INOTIFY", tmp_path)
    assert levels(limits.check(0, home.inbox, "auto"))["inotify"] is Level.WARN
    (tmp_path / "max_user_instances").write_text("128\n")
    (tmp_path / "max_user_watches").write_text("2000\n")
    monkeypatch.setattr(limits, "CGROUP_PIDS", tmp_path / "pids")
    assert set(levels(limits.check(0, home.inbox, "auto")).values()) == {Level.OK}
    monkeypatch.setattr(limits, "FEW_WATCHES", 4000)
    assert levels(limits.check(0, home.inbox, "auto"))["inotify"] is Level.WARN
    assert levels(limits.check(0, home.inbox, "poll"))["inotify"] is Level.OK
    (tmp_path / "pids").write_text("50\n")
    monkeypatch.setattr(resource, "prlimit", lambda pid, which: (256, 4096))
    found = levels(limits.check(os.getpid(), home.inbox, "poll"))
    assert found == {"inotify": Level.OK, "open files": Level.WARN, "threads": Level.WARN}


def test_owners(home: Home) -> None:
    assert set(levels(owners.check(home.root, home, None)).values()) == {Level.OK}
    token = home.root / "token"
    webhook = {"url": "https://example.com/", "secret_file": "token"}
    settings = Settings.model_validate({"http": {"write_token_file": "token"}, "webhooks": [webhook]})
    found = levels(owners.check(home.root, home, settings))
    assert found["write token"] is found["webhook secret"] is Level.BAD
    token.write_text("x" * 20)
    token.chmod(0o644)
    found = levels(owners.check(home.root, home, settings))
    assert found["write token"] is found["webhook secret"] is Level.WARN
    home.state.chmod(0o777)
    assert levels(owners.check(home.root, home, None))["private"] is Level.BAD
    home.state.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(home.clean if home.clean.exists() else home.registry, 65534, 65534)
        assert levels(owners.check(home.root, home, None))["owner"] is Level.WARN
        for folder in home.root.parents:
            folder.chmod(folder.stat().st_mode | 0o755)
        said = as_nobody(lambda: str(levels(owners.check(home.root, home, None))["permissions"]))
        assert said == "bad"


def test_a_clock_that_is_behind_the_registry(home: Home) -> None:
    with lineage(home) as reader:
        now = datetime.now(UTC)
        assert levels(clocks.check(reader)) == {"clock": Level.OK}
        assert levels(clocks.check(reader, now - timedelta(days=1))) == {"clock": Level.BAD}
    assert levels(clocks.check(None, datetime(1970, 1, 2, tzinfo=UTC))) == {"clock": Level.BAD}


def test_devices_and_memory(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with lineage(home) as reader:
        need = of_home(home, reader, quick())
    found = levels(computing.check(quick(compute={"device": "cuda:7", "threads": 99}), need))
    assert (found["device"], found["workers"]) == (Level.BAD, Level.WARN)
    small = quick(compute={"memory_budget": 1 << 20})
    assert levels(computing.check(small, replace(need, memory_bytes=1 << 40)))["memory"] is Level.BAD
    assert levels(computing.check(small, None))["memory"] is Level.WARN
