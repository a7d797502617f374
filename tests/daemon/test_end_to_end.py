"""The whole of it through the real command line: make a home, run the daemon, drop experts, load what it publishes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from daemon.layout import Home
from tests.daemon.homes import assert_close
from tests.daemon.processes import environment, forked, mainstem, running, until
from tests.models import CONFIG, WEIGHTS, read_weights, write_base, write_expert
from tests.oracles.rules import ema, mean, opcm

INDEX = "model.safetensors.index.json"


def ok(*words: str | Path, **variables: str) -> str:
    """Runs a command that must succeed; what it printed."""
    done = mainstem(*words, cwd=None, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def asked(*words: str | Path) -> str:
    """Runs a command that only asks, in a fork; what it printed."""
    done = forked(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shard(source: Path, target: Path) -> Path:
    """Rewrites a folder's weights as two shards with their index."""
    weights = load_file(source / WEIGHTS)
    target.mkdir()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for part, mine in parts.items():
        save_file({name: weights[name] for name in mine}, target / part)
    weight_map = {name: part for part, mine in parts.items() for name in mine}
    (target / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(source / CONFIG, target)
    return target


def load_sharded(folder: Path) -> dict[str, Tensor]:
    """Loads a published folder by its index alone."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    weights: dict[str, Tensor] = {}
    for part in set(weight_map.values()):
        weights |= load_file(folder / part)
    assert weights.keys() == weight_map.keys()
    return weights


def test_a_daemon_from_the_first_drop_to_the_last_reader(tmp_path: Path) -> None:
    """File, folder and shards arrive and feed three heads; everything is asked for in every way."""
    base = write_base(tmp_path / "base", seed=1)
    home = Home(tmp_path / "home")
    made = ok(
        *("init", home.root, "--base", base, "--preset", "opcm"),
        *("--head", "init=ema", "--set", "init.weight=0.3", "--head", "soup=mean"),
    )
    assert str(home.root) in made and "mainstem run" in made
    given = [
        write_expert(tmp_path / "one.safetensors", base, 2),
        write_expert(tmp_path / "two", base, 3),
        shard(write_expert(tmp_path / "plain", base, 4), tmp_path / "three"),
    ]
    weights = [read_weights(given[0]), read_weights(given[1]), read_weights(tmp_path / "plain")]
    with running("run", "--home", home.root, "--port", "0", fresh=True) as daemon:
        assert daemon.live() == 0
        for n, path in enumerate(given, start=1):
            shutil.move(path, home.inbox / path.name)
            daemon.wait_for(n)
        assert_heads(home, base, weights)
        assert home.latest("main").readlink() == Path("000003")
        assert (home.versions("main") / "LATEST").read_text() == "000003\n"
        assert (home.latest("main") / CONFIG).read_bytes() == (base / CONFIG).read_bytes()
        body = daemon.get(f"/v1/heads/soup/versions/3/files/{WEIGHTS}")
        assert body.content == (home.latest("soup") / WEIGHTS).read_bytes()
        # told once the expert is in the archive, which is after its version can be read
        assert until(lambda: 'mainstem_head_version{head="main"} 3.0' in daemon.get("/metrics").text, 20)
        assert 'mainstem_experts_total{outcome="merged"} 3.0' in daemon.get("/metrics").text
        again = tmp_path / "again.safetensors"
        save_file(weights[0], again)
        shutil.copy(home.archive(1) / "one.safetensors", again)
        shutil.move(again, home.inbox / "again.safetensors")
        assert until(lambda: 'mainstem_experts_total{outcome="duplicate"} 1.0' in daemon.get("/metrics").text, 20)
        assert daemon.live() == 3
        assert daemon.get("/readyz").status_code == 200
        second = forked("run", "--home", home.root, "--no-http")
        assert second.returncode == 1 and "another mainstem is running" in second.stderr and '"hint"' in second.stderr
        check_listings(home, tmp_path, base)
        assert daemon.stop() == 0
    lines = [json.loads(line) for line in daemon.lines]
    assert [line["event"] for line in lines if line["event"] in ("ready", "merged", "stopped")] == [
        *("ready", "merged", "merged", "merged", "stopped")
    ]


def assert_heads(home: Home, base: Path, experts: list[dict[str, Tensor]]) -> None:
    """Every head's published weights equal its formula's, in float64 with everything in memory."""
    origin = read_weights(base)
    for head, wanted in (
        ("main", opcm(origin, experts)),
        ("init", ema(origin, experts, 0.3)),
        ("soup", mean(origin, experts)),
    ):
        assert_close(read_weights(home.latest(head)), wanted)


def check_listings(home: Home, tmp_path: Path, base: Path) -> None:
    """status, log, show, inspect and verify, for people and for programs, while the daemon runs."""
    at = ("--home", home.root)
    status = json.loads(asked("status", *at, "--json"))
    assert {head["name"]: head["live"] for head in status["heads"]} == {"main": 3, "init": 3, "soup": 3}
    assert status["experts"] == {"merged": 3, "duplicate": 1, "quarantined": 0, "withdrawn": 0}
    assert status["inbox"] == []
    assert "3 merged, 1 duplicate" in asked("status", *at)
    log = json.loads(asked("log", *at, "--json"))
    assert [(row["name"], row["status"], row["version"]) for row in log] == [
        ("again.safetensors", "duplicate", None),
        ("three", "merged", 3),
        ("two", "merged", 2),
        ("one.safetensors", "merged", 1),
    ]
    assert "one.safetensors" in asked("log", *at, "--status", "merged")
    assert asked("log", *at, "--limit", "1").endswith(f"the newest 1 of {len(log)}: --limit N lists more\n")
    assert "--limit" not in asked("log", *at, "--limit", str(len(log)))
    shown = json.loads(asked("show", log[3]["sha256"][:12], "--json", *at))
    assert shown["id"] if isinstance(shown, dict) else {row["id"] for row in shown} == {1, 4}
    assert json.loads(asked("show", "init/2", "--json", *at))["manifest"]["params"] == {"weight": 0.3, "start": "base"}
    assert "manifest" in asked("show", "v3", *at)
    new = write_expert(tmp_path / "new.safetensors", base, 9)
    found = json.loads(asked("inspect", new, "--json", *at))
    assert found["accepted"] and found["duplicate_of"] is None and -1 <= found["overlap"] <= 1
    assert found["reads_bytes"] > new.stat().st_size
    twin = json.loads(asked("inspect", home.archive(2) / "two", "--json", *at))
    assert twin["duplicate_of"] == 2
    assert "accepted" in asked("inspect", new, *at)
    read = files_read_by_verify(home)
    assert json.loads(asked("verify", "--json", *at)) == {
        "versions": 12,
        "experts": 3,  # what came a second time is kept once
        "files": len(read),
        "size_bytes": sum(path.stat().st_size for path in read),
        "hints": [],
        "problems": [],
    }
    verified = forked("verify", *at)
    (line,) = (verified.stdout + verified.stderr).splitlines()
    assert line.startswith(f"the base, 12 versions and 3 archived experts: {len(read)} files, ")
    assert line.endswith(" kB read, no problems")


def files_read_by_verify(home: Home) -> list[Path]:
    """The base's weights, all that is published but for LATEST and the links, every state, the archived weights."""
    found = [path for pattern in ("*/0*/*", "*/0*/*/*") for path in home.published.glob(pattern) if path.is_file()]
    found += (home.state / "heads").rglob("state.safetensors")
    return [*found, *home.base.rglob("*.safetensors"), *(home.root / "archive").rglob("*.safetensors")]


def test_once_drains_the_inbox_and_exits(tmp_path: Path) -> None:
    """`--once` through a sharded base, small published shards and another dtype; then `serve`, without torch."""
    plain = write_base(tmp_path / "plain", seed=1)
    base = shard(plain, tmp_path / "base")
    home = Home(tmp_path / "home")
    asked("init", home.root, "--base", base, "--method", "mean")
    assert load_sharded(home.latest("main")).keys() == load_file(plain / WEIGHTS).keys()
    weights = []
    for seed in (2, 3):
        expert = write_expert(home.inbox / f"{seed}.safetensors", plain, seed)
        weights.append(read_weights(expert))
    out = {"MAINSTEM_PUBLISH__SHARD_BYTES": "2kB", "MAINSTEM_PUBLISH__DTYPE": "float16"}
    ok("run", "--once", "--no-http", "--home", home.root, **out)
    assert home.latest("main").readlink() == Path("000002") and os.listdir(home.inbox) == []
    merged = load_sharded(home.latest("main"))
    assert {str(tensor.dtype) for tensor in merged.values()} == {"torch.float16", "torch.int64"}
    assert_close(merged, mean(load_file(plain / WEIGHTS), weights), tolerance=1e-3)
    assert len(list(home.latest("main").glob("*.safetensors"))) > 2
    asked("verify", "--home", home.root)
    with running("serve", "--home", home.root, "--port", "0", fresh=True) as server:
        assert server.live() == 2
        assert 'mainstem_head_version{head="main"} 2.0' in server.get("/metrics").text
        maps = Path(f"/proc/{server.process.pid}/maps")
        if maps.exists():
            assert "libtorch" not in maps.read_text()
        assert server.stop() == 0


def test_a_home_can_be_named_in_three_ways(someone: Path) -> None:
    assert json.loads(asked("config", "show", "--json", "--home", someone / "home"))["http.port"] == 8765
    changed = ok("config", "show", "--json", MAINSTEM_HOME=str(someone / "home"), MAINSTEM_HTTP__PORT="99")
    assert json.loads(changed)["http.port"] == 99
    here = forked("status", "--json", cwd=someone / "home")
    assert json.loads(here.stdout)["heads"][0]["params"]["alpha"] == 0.7
    assert "http.port" in asked("config", "show", "--home", someone / "home")
    assert "is fine" in asked("config", "check", "--home", someone / "home")


@pytest.mark.parametrize("there", ["nothing", "file"])
def test_status_is_shown_without_an_inbox(someone: Path, tmp_path: Path, there: str) -> None:
    home = Home(shutil.copytree(someone / "home", tmp_path / "home", symlinks=True))
    home.inbox.rmdir()
    if there == "file":
        home.inbox.touch()
    status = json.loads(asked("status", "--json", "--home", home.root))
    assert status["inbox"] == [] and [head["name"] for head in status["heads"]] == ["main"]
    assert "inbox    0 waiting" in asked("status", "--home", home.root)


def test_methods_are_listed_with_what_can_be_set() -> None:
    listed = {method["name"]: method for method in json.loads(asked("methods", "--json"))}
    assert {"opcm", "ema", "mean", "task_arithmetic"} <= listed.keys()
    assert listed["opcm"]["parameters"]["alpha"]["default"] == 0.5
    assert "alpha = 0.5" in asked("methods")


def test_the_version_is_told() -> None:
    assert asked("--version").startswith("mainstem ")


@pytest.fixture(scope="module")
def someone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an expert, a home, and things that are neither."""
    root = tmp_path_factory.mktemp("wrong")
    base = write_base(root / "base.safetensors", seed=1)
    write_expert(root / "expert.safetensors", base, 2)
    (root / "text.safetensors").write_text("hello, this is not a checkpoint")
    (root / "empty").mkdir()
    (root / "full").mkdir()
    (root / "full" / "thesis.tex").write_text("years of work")
    asked("init", root / "home", "--base", base, "--preset", "opcm", "--set", "alpha=0.7")
    shutil.copytree(root / "home", root / "ill", symlinks=True)
    (root / "ill" / "mainstem.toml").write_text("[http]\nprot = 1\n")
    shutil.copytree(root / "home", root / "guessable", symlinks=True)
    (root / "guessable" / "mainstem.toml").write_text('[http]\nwrite_token = "short"\n')
    return root


WRONG = {
    "no home": ["status", "--home", "empty"],
    "no such home": ["run", "--home", "nowhere"],
    "base missing": ["init", "new", "--base", "nowhere.safetensors"],
    "base in no folder": ["init", "new", "--base", "nowhere/base.safetensors"],
    "base is text": ["init", "new", "--base", "text.safetensors"],
    "base is empty": ["init", "new", "--base", "empty"],
    "no base given": ["init", "new"],
    "home is full": ["init", "full", "--base", "base.safetensors"],
    "home is a home": ["init", "home", "--base", "base.safetensors"],
    "home is a file": ["init", "base.safetensors", "--base", "base.safetensors"],
    "unknown method": ["init", "new", "--base", "base.safetensors", "--method", "magic"],
    "unknown parameter": ["init", "new", "--base", "base.safetensors", "--set", "beta=1"],
    "parameter out of range": ["init", "new", "--base", "base.safetensors", "--set", "scale=70"],
    "parameter is no number": ["init", "new", "--base", "base.safetensors", "--set", "scale=much"],
    "set without value": ["init", "new", "--base", "base.safetensors", "--set", "scale"],
    "set twice": ["init", "new", "--base", "base.safetensors", "--set", "scale=0.5", "--set", "main.scale=0.4"],
    "set for no head": ["init", "new", "--base", "base.safetensors", "--set", "other.weight=1"],
    "head without method": ["init", "new", "--base", "base.safetensors", "--head", "other"],
    "head with a path": ["init", "new", "--base", "base.safetensors", "--head", "../x=mean"],
    "head twice": ["init", "new", "--base", "base.safetensors", "--head", "a=mean", "--head", "a=ema"],
    "unknown setting": ["config", "check", "--home", "ill"],
    "short token": ["config", "check", "--home", "guessable"],
    "unknown setting at start": ["run", "--once", "--home", "ill"],
    "unknown expert": ["show", "nobody", "--home", "home"],
    "unknown version": ["show", "v7", "--home", "home"],
    "huge version": ["show", "v" + "9" * 40, "--home", "home"],
    "odd digits": ["show", "v²", "--home", "home"],
    "huge id": ["show", "9" * 40, "--home", "home"],
    "unknown head": ["inspect", "expert.safetensors", "--head", "nobody", "--home", "home"],
    "inspect nothing": ["inspect", "nowhere.safetensors", "--home", "home"],
    "inspect text": ["inspect", "text.safetensors", "--home", "home"],
    "port too high": ["serve", "--port", "70000", "--home", "home"],
    "host unknown": ["serve", "--host", "256.0.0.1", "--home", "home"],
    "limit of nothing": ["log", "--limit", "0", "--home", "home"],
    "limit beyond integers": ["log", "--limit", "9" * 30, "--home", "home"],
    "status unknown": ["log", "--status", "lost", "--home", "home"],
    "device unknown": ["run", "--once", "--device", "abacus", "--home", "home"],
    "method twice": ["rebuild", "--head", "new=ties", "--method", "mean", "--home", "home"],
    "replay of nothing": ["rebuild", "--replay", "--into", "new", "--home", "home"],
    "unknown verb": ["merge"],
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_use_ends_with_a_hint(someone: Path, what: str) -> None:
    done = forked(*WRONG[what], cwd=someone)
    assert done.returncode in (1, 2), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "hint" in done.stdout + done.stderr if done.returncode == 1 else "Try" in done.stderr
    assert not Home(someone / "new").exists()


def test_settings_from_the_environment_are_checked(someone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAINSTEM_HTPP__PORT", "1")
    done = forked("config", "check", "--home", someone / "home")
    assert done.returncode == 1 and "MAINSTEM_HTPP__PORT" in done.stderr and "hint:" in done.stderr
    assert "Traceback" not in done.stderr


def test_damage_is_named_and_stops_the_start(someone: Path, tmp_path: Path) -> None:
    home = Home(shutil.copytree(someone / "home", tmp_path / "home", symlinks=True))
    weights = home.version("main", 0) / WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.unlink()
    weights.write_bytes(data)
    home.clean.unlink()
    verified = forked("verify", "--home", home.root)
    assert verified.returncode == 1
    problem, hint, line = (verified.stdout + verified.stderr).splitlines()
    assert f"cp {home.base / WEIGHTS} {weights}" in hint
    assert problem.startswith("published/main/000000/model.safetensors: ") and line.endswith(" read, 1 problem")
    started = forked("run", "--once", "--no-http", "--home", home.root)
    assert started.returncode == 1 and "damaged" in started.stderr and '"hint"' in started.stderr


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_three_heads_read_an_expert_once(tmp_path: Path) -> None:
    """Counted by the kernel: the bytes that the daemon reads of the expert are the bytes it has."""
    base = write_base(tmp_path / "base.safetensors", seed=1, hidden=64)
    home = tmp_path / "home"
    asked("init", home, "--base", base, "--head", "init=ema", "--head", "soup=mean")
    expert = write_expert(home / "inbox" / "e.safetensors", base, 2)
    size = expert.stat().st_size
    log = tmp_path / "strace"
    trace = ["strace", "-ff", "-y", "-s", "0", "-e", "trace=pread64,preadv,preadv2,read,mmap", "-o", str(log)]
    run = [sys.executable, "-m", "daemon", "run", "--once", "--no-http", "--home", str(home)]
    done = subprocess.run([*trace, *run], env=environment(), capture_output=True, text=True, timeout=240)
    if "ptrace" in done.stderr.lower():
        pytest.skip(f"strace may not trace here: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    lines = [
        line for path in tmp_path.glob("strace.*") for line in path.read_text().splitlines()
    ]  # one for each thread
    mine = [line for line in lines if "/inbox/e.safetensors>" in line]
    assert not [line for line in mine if "mmap(" in line]
    read = sum(int(line.rpartition("= ")[2].split()[0]) for line in mine)
    assert size <= read <= size + 64  # the opening is looked at for pickles and git-lfs pointers
