"""Daemons are killed at random moments while experts keep arriving in every way that people have of copying files."""

import os
import random
import shutil
import signal
import time
from pathlib import Path
from threading import Timer

import pytest
import torch
from safetensors.torch import save_file

from daemon.layout import Home
from registry.reader import Reader
from registry.records import Status
from tests.crash.invariants import History, check, sha256
from tests.crash.worlds import VERSIONS_KEPT, World, drain, fill_inbox, outcome
from tests.models import read_weights, write_expert

ROUNDS = int(os.environ.get("MAINSTEM_KILL_ROUNDS", "8"))
LONGEST_SECONDS = 1.2  # from a start to its kill
SETTLE = "0.1"  # seconds; the slow writers are never still for so long


class Trainer:
    """Delivers experts, and remembers what it delivered."""

    def __init__(self, world: World, home: Home, elsewhere: Path, draw: random.Random) -> None:
        self._base = world.base
        self._inbox = home.inbox
        self._elsewhere = elsewhere
        self._draw = draw
        self._good: list[Path] = []
        self.dropped: list[str] = []
        self.refused = self.duplicates = 0
        elsewhere.mkdir()

    @property
    def merged(self) -> int:
        return len(self._good)

    def deliver(self) -> None:
        """One more drop: new, spoilt or seen before; a file or a folder; renamed into place or written slowly."""
        number = len(self.dropped)
        kind = self._draw.choices(["new", "spoilt", "again"], [8, 1, 1 if self._good else 0])[0]
        if kind == "again":
            path = self._draw.choice(self._good)
            self.duplicates += 1
        else:
            suffix = self._draw.choice(["", ".safetensors"])
            path = write_expert(self._elsewhere / f"expert-{number}{suffix}", self._base, seed=1000 + number)
        if kind == "new":
            self._good.append(path)
        if kind == "spoilt":
            self._spoil(path)
            self.refused += 1
        self.dropped.append(sha256(path))
        name = f"{number:04d}{path.suffix}"
        self._draw.choice([self._move, self._write_slowly])(path, self._inbox / name)

    def _spoil(self, path: Path) -> None:
        tensors = read_weights(path)
        tensors["layers.0.norm.weight"][0] = torch.inf
        save_file(tensors, path / "model.safetensors" if path.is_dir() else path)

    def _move(self, path: Path, target: Path) -> None:
        hidden = target.with_name(f".{target.name}.part")
        (shutil.copytree if path.is_dir() else shutil.copy)(path, hidden)
        hidden.rename(target)

    def _write_slowly(self, path: Path, target: Path) -> None:
        if path.is_dir():
            target.mkdir()
            for part in sorted(path.iterdir()):
                self._write_slowly(part, target / part.name)
            return
        data = path.read_bytes()
        with target.open("wb", buffering=0) as file:
            for start in range(0, len(data), 4096):
                file.write(data[start : start + 4096])
                time.sleep(self._draw.uniform(0, 0.03))


@pytest.mark.timeout(120 + 10 * ROUNDS)
def test_killed_at_random_moments_while_experts_arrive(world: World, tmp_path: Path) -> None:
    seed = int(os.environ.get("MAINSTEM_KILL_SEED", random.randrange(2**32)))
    print(f"MAINSTEM_KILL_SEED={seed}")
    draw = random.Random(seed)
    home = world.home(tmp_path / "home", fill=False)
    trainer = Trainer(world, home, tmp_path / "elsewhere", draw)
    history: History = {}
    for _ in range(ROUNDS):
        daemon = world.zygote.start("run", "--no-http", "--home", home.root, MAINSTEM_INBOX__SETTLE_SECONDS=SETTLE)
        killer = Timer(draw.uniform(0.1, LONGEST_SECONDS), os.kill, (daemon.pid, signal.SIGKILL))
        killer.start()
        while killer.is_alive():
            trainer.deliver()
            time.sleep(draw.uniform(0, 0.3))
        ended = daemon.wait()
        assert ended.code == -signal.SIGKILL, ended.log
        check(home, trainer.dropped, history)
    assert world.zygote.run(*drain(home), MAINSTEM_INBOX__SETTLE_SECONDS=SETTLE).code == 0
    check(home, trainer.dropped, history, VERSIONS_KEPT)
    assert not os.listdir(home.inbox)
    with Reader.open(home.registry) as reader:
        lineage = reader.lineage()
        assert reader.counts() == {
            Status.MERGED: trainer.merged,
            Status.DUPLICATE: trainer.duplicates,
            Status.QUARANTINED: trainer.refused,
            Status.WITHDRAWN: 0,
        }
    verified = world.zygote.run("verify", "--home", home.root)
    assert verified.code == 0 and "no problem" in verified.log, verified.log

    replayed = world.home(tmp_path / "replayed", fill=False)
    fill_inbox(replayed, [home.archive(expert.id) / expert.name for expert in lineage])
    assert world.zygote.run(*drain(replayed)).code == 0
    assert outcome(replayed) == outcome(home)
