"""What the tests of `mainstem rebuild` share: the verb, refused or killed, and what must hold of a home afterwards."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor

from daemon.config import Settings
from daemon.home.verification import verify
from daemon.layout import Home
from daemon.rebuild.commands import withdraw
from daemon.rebuild.replay import Console, merged_experts
from registry.records import Deed, NewIntervention
from tests.daemon.homes import lineage, tree
from tests.daemon.processes import forked
from tests.models import read_weights


def refused(home: Home, *words: str | Path) -> str:
    """Runs the verb, which must be refused; what it complained of."""
    done = forked("rebuild", "--home", home.root, *words)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def killed(monkeypatch: pytest.MonkeyPatch, point: str, home: Home, *words: str | Path) -> None:
    """Runs the verb and has it killed at a failpoint."""
    with monkeypatch.context() as patch:
        patch.setenv("MAINSTEM_FAILPOINT", point)
        done = forked("rebuild", "--home", home.root, *words)
    assert done.returncode == -signal.SIGKILL, f"{point}: {done.returncode}\n{done.stderr}"


def check(home: Home) -> None:
    """Everything hashes, nothing is left over, and another recovery changes nothing."""
    with lineage(home) as reader:
        checked, problems = verify(home, reader, lambda what: None)
    assert checked.versions + checked.experts > 2 and not problems, problems
    assert not os.listdir(home.inbox) and not os.listdir(home.tmp)
    beside = {path.name for path in home.state.iterdir() if not path.name.startswith("registry.sqlite")}
    assert beside <= {"base", "heads", "tmp", "lock", "clean", "evaluations"}


def bytes_of(home: Home) -> dict[str, bytes | str]:
    """All of a home, less what SQLite and the lock keep for themselves."""
    return {name: found for name, found in tree(home.root).items() if "sqlite" not in name and "lock" not in name}


def weights(model: tuple[Path, list[Path]], *which: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    base, given = model
    return read_weights(base), [read_weights(given[i]) for i in which]


def soup(model: tuple[Path, list[Path]], which: Sequence[int]) -> dict[str, Tensor]:
    """The weighted mean of these experts: the third counts 2.5 times."""
    base, given = weights(model, *which)
    shares = [2.5 if i == 2 else 1.0 for i in which]
    total = {name: tensor.double() for name, tensor in base.items() if tensor.is_floating_point()}
    for name in total:
        for share, expert in zip(shares, given, strict=True):
            total[name] = total[name] + share / sum(shares) * (expert[name].double() - base[name].double())
    return base | total


def assert_merged_like(found: dict[str, Tensor], truth: dict[str, Tensor], model: tuple[Path, list[Path]]) -> None:
    """The merged task vector as a whole, to 1e-4: float32 weights hold no more of changes of a hundredth."""
    base = read_weights(model[0])
    names = [name for name, tensor in base.items() if tensor.is_floating_point()]
    error = sum(float((found[n].double() - truth[n]).square().sum()) for n in names) ** 0.5
    length = sum(float((truth[n] - base[n].double()).square().sum()) for n in names) ** 0.5
    assert length > 0.01 and error < 1e-4 * length, (error, length)


def taken_out(home: Home, settings: Settings, *words: str) -> None:
    """Takes these experts out in this process, as `mainstem rebuild --without` does where no daemon runs."""
    with lineage(home) as reader:
        gone = merged_experts(reader, words)
    withdraw(home, settings, gone, Console(), NewIntervention(Deed.WITHDRAW, "somebody"))
