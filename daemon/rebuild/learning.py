"""AdaMerging over the archive: the coefficients of the experts, learned by what the operator's command says.

The command runs the model, and stays: at each step it is told where the merged weights lie, and answers with the
entropy of its predictions on unlabelled data, having written the gradient by each weight. All else is arithmetic (see
projector/driver/adamerging.py). After each step the coefficients are kept: cut short, the same command goes on.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from daemon.compute.commands import TookTooLong, check_program
from daemon.compute.conversing import Conversation, HungUp
from daemon.compute.resources import memory_budget
from daemon.config import Evaluate, Settings
from daemon.disk import durable
from daemon.errors import BadConfig, BadHome, NoAnswer
from daemon.evaluation.evaluator import environment_of
from daemon.layout import COEFFICIENTS, Home
from daemon.manifest import Manifest
from daemon.rebuild.replay import Console
from daemon.rebuild.restating import Arrival, Restating
from daemon.versions.heads import HeadTip
from daemon.versions.writing import Outputs, Written
from projector.driver.adamerging import HIGH, LEARNING_RATE, LOW, Adamerging, Coefficients
from projector.errors import BadFile, BadSchema, BadValues
from projector.files.header import build_header
from projector.files.source import Checkpoint
from projector.files.tensorfile import TensorReader, TensorWriter
from projector.method import Method
from projector.methods import is_layered
from projector.text import shown, size
from registry.records import BaseModel, Expert

FOLDER, KEY = "{folder}", "entropy"
METHOD = "task_arithmetic"  # whose scale every coefficient starts at
STEPS = 500  # the authors'
KEPT = {"values", "first", "second", "entropies"}
FLOAT32_BYTES = 4  # weights and gradients are exchanged so
OFTEN = 10  # steps from one line that says how it goes to the next
LOOK = "read what it printed; it runs in the current folder, and docs/adamerging.md has the lines that it is asked"


@dataclass(frozen=True)
class Learning:
    """How coefficients are to be learned: the command with its environment and its time for a step, and Adam's."""

    evaluate: Evaluate
    steps: int = STEPS
    lr: float = LEARNING_RATE

    def sha256(self, experts: Sequence[Expert], start: float) -> str:
        """Of what the coefficients come from, but for the number of steps and what the command reads."""
        counted = [(one.sha256, float(one.weight)) for one in experts]
        said = json.dumps([self.evaluate.command, self.lr, start, counted])
        return hashlib.sha256(said.encode()).hexdigest()


def learning(words: str, settings: Evaluate, steps: int = STEPS, lr: float = LEARNING_RATE) -> Learning:
    """The command is split as a shell splits it. Raises BadConfig."""
    try:
        command = tuple(shlex.split(words))
    except ValueError as error:
        raise BadConfig(f"--adamerging {words}: {error}", "quote it as for a shell") from None
    if not command:
        raise BadConfig("--adamerging names no command", f"for example --adamerging 'python batches.py {FOLDER}'")
    return Learning(settings.model_copy(update={"command": command}), steps, lr)


def check_learnable(name: str, method: Method, how: Learning, experts: int, *, relative: bool) -> None:
    """Raises BadConfig where no coefficients can be learned for such a head, or the command is not there, and BadHome
    where there is no expert."""
    anew = f"leave --method and --set out, and give --head a new name: that makes a head of {METHOD}"
    scale = getattr(method, "scale", None)
    if method.name != METHOD:
        raise BadConfig(f"the head {name!r} is of {method.name}, coefficients are learned for one of {METHOD}", anew)
    if is_layered(method.params()):
        raise BadConfig(f"the head {name!r} has scales by layer, which are what is learned", anew)
    if not isinstance(scale, float) or not LOW <= scale <= HIGH:
        raise BadConfig(
            f"the scale of the head {name!r} is {scale}; coefficients start there, and stay in {LOW:g} to {HIGH:g}",
            f"{anew}, at 0.3",
        )
    if relative:
        raise BadConfig(f"the head {name!r} is relative to what experts were trained from, not to the base", anew)
    if not experts:
        raise BadHome("no expert is merged: there is nothing to learn a coefficient for", "merge some first")
    check_program("--adamerging", how.evaluate.command[0], Path.cwd(), environment_of(how.evaluate))


def is_learned(manifest: Manifest, experts: Sequence[Expert], method: Method, how: Learning) -> bool:
    """True where a version's coefficients were learned of these experts in this way."""
    said = manifest.content.get("adamerging") or {}
    return (said.get("of"), said.get("steps")) == (how.sha256(experts, _start(method)), how.steps)


def planned(home: Home, name: str, method: Method, how: Learning, experts: Sequence[Expert], base: BaseModel) -> str:
    """How many steps are left to learn the coefficients of that head, and what they take, in words."""
    kept = _kept(home.learning(name), how.sha256(experts, _start(method)), how.steps)
    done = len(kept["entropies"]) if kept else 0
    left = how.steps - done
    read, moved = sum(one.size_bytes for one in experts) + base.size_bytes, 2 * FLOAT32_BYTES * base.parameters
    every = size(left * (read + 2 * moved))
    behind = f" of {how.steps}, behind the {done} that are kept" if done else ""
    return (
        f"{left} steps{behind}: each runs the command on its batches, as a rule one of each task, reads {size(read)} of"
        f" experts and base, and writes and reads {size(moved)} of weights and gradients; {every} in"
        f" all. How long the command takes for one, its first step shows"
    )


def learned(
    restating: Restating,
    home: Home,
    source: Home,
    tip: HeadTip,
    arrivals: Sequence[Arrival],
    how: Learning,
    settings: Settings,
    to: Console,
) -> Written:
    """A head's newest version in `source`, with weights whose coefficients were learned. home: which is locked.

    Raises BadHome, NoAnswer, and what the projector raises.
    """

    def weigh(base: Checkpoint, experts: Sequence[Checkpoint], output: Outputs, work: Path) -> dict[str, Any]:
        model = Adamerging(
            base,
            experts,
            [one.contribution.weight for one in arrivals],
            _start(tip.method),
            lr=how.lr,
            block_bytes=settings.compute.block_bytes,
            budget_bytes=memory_budget(settings.compute),
            watch=to.progress(),
        )
        course = _Course(home, tip.head.name, model, arrivals, how, work, to)
        course.run()
        model.sweep(output.weights)
        durable.write_file(output.published / COEFFICIENTS, course.record())
        return course.summary()

    return restating.reweighted(source, tip, tip.version.number, arrivals, weigh)


class _Course:
    """From the coefficients that are known to the last step, and what is to be said of it."""

    def __init__(
        self,
        home: Home,
        head: str,
        model: Adamerging,
        arrivals: Sequence[Arrival],
        how: Learning,
        work: Path,
        to: Console,
    ) -> None:
        self._home, self._model, self._arrivals, self._how = home, model, arrivals, how
        self._kept, self._work, self._to = home.learning(head), work, to
        self._what = how.sha256([one.expert for one in arrivals], model.start)
        self._entropies: list[float] = []

    def run(self) -> None:
        """Learns, from where an earlier run was cut short on."""
        self._resume()
        steps, folder = self._how.steps, str(self._home.base.absolute())
        if self._model.coefficients.steps >= steps:
            return
        command = [word.replace(FOLDER, folder) for word in self._how.evaluate.command]
        environment = environment_of(self._how.evaluate)
        specs = self._model.specs
        path = self._work / "weights.safetensors"
        with ExitStack() as closing:
            fd = durable.create(path, build_header(specs, {})[1].size)
            closing.callback(os.close, fd)
            writer = TensorWriter(fd, specs, {})
            self._model.sweep([writer], hashed=False)
            asked = Conversation(
                command, Path.cwd(), KEY, lambda line: self._to.say(f"the command: {line}"), environment
            )
            try:
                conversation = closing.enter_context(asked)
            except OSError as error:
                raise NoAnswer(f"the command of --adamerging cannot be started: {error.strerror}", LOOK) from error
            for step in range(self._model.coefficients.steps, steps):
                gradients = self._work / f"gradients-{step}.safetensors"
                entropy = self._ask(conversation, step, path, gradients)
                self._learn(step, gradients, writer)
                self._entropies.append(entropy)
                durable.remove(gradients)
                self._keep()
                if step % OFTEN == 0 or step + 1 == steps:
                    self._to.say(f"{self._at(step)}: entropy {entropy:.5g}")
                self._to.show((step + 1) / steps)
            means = zip(self._arrivals, self.summary()["mean"], strict=True)
            self._to.say(
                f"mean coefficients: {', '.join(f'{shown(one.expert.name)} {mean:.3f}' for one, mean in means)}"
            )

    def record(self) -> bytes:
        """The bytes of COEFFICIENTS: all coefficients as they count, by tensor, in the order of `experts`."""
        said = {
            **self.summary(),
            "experts": [
                {"sha256": one.expert.sha256, "name": one.expert.name, "weight": one.contribution.weight}
                for one in self._arrivals
            ],
            "entropies": self._entropies,
            "coefficients": self._model.described(),
        }
        return json.dumps(said).encode() + b"\n"

    def summary(self) -> dict[str, Any]:
        """What the manifest says."""
        clamped = self._model.coefficients.clamped
        return {
            "steps": self._model.coefficients.steps,
            "lr": self._how.lr,
            "start": self._model.start,
            "entropy": fallen(self._entropies),
            "mean": clamped.mean(dim=0).tolist(),
            "file": COEFFICIENTS,
            "of": self._what,
        }

    def _at(self, step: int) -> str:
        return f"step {step + 1} of {self._how.steps}"

    def _ask(self, conversation: Conversation, step: int, weights: Path, gradients: Path) -> float:
        asked = {"step": step, "weights": str(weights), "gradients": str(gradients)}
        at, seconds = self._at(step), self._how.evaluate.timeout_seconds
        try:
            said = conversation.ask(asked, seconds)[KEY]
        except HungUp as error:
            raise NoAnswer(f"{at}: the command of --adamerging {error}", LOOK) from None
        except TookTooLong:
            raise NoAnswer(
                f"{at}: the command of --adamerging took longer than {seconds:.6g} s and was stopped"
                f"{conversation.last()}",
                "give a step more in evaluate.timeout_seconds, or let it run fewer items",
            ) from None
        if isinstance(said, bool) or not isinstance(said, int | float) or not isfinite(said):
            raise NoAnswer(
                f"{at}: the command of --adamerging answered an entropy of {shown(json.dumps(said))}",
                f'let it answer a finite number, as {{"{KEY}": 1.5}}; a loss of NaN comes from the logits',
            )
        return float(said)

    def _learn(self, step: int, path: Path, writer: TensorWriter) -> None:
        """One step by the gradients that lie there."""
        try:
            with ExitStack() as closing:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                closing.callback(os.close, fd)
                gradients = Checkpoint([TensorReader(fd)])
                self._model.sweep([writer], gradients, hashed=False)
            layers = self._model.layers
            if not self._entropies and (without := sum(gradients.schema.keys().isdisjoint(one) for one in layers)):
                self._to.say(
                    f"{without} of {len(layers)} tensors get no gradient: their coefficients stay what they are"
                )
        except FileNotFoundError:
            raise NoAnswer(f"{self._at(step)}: the command answered, and did not write {path}", LOOK) from None
        except (BadFile, BadSchema, BadValues) as error:
            raise NoAnswer(f"{self._at(step)}: what the command of --adamerging wrote: {error}", error.hint) from error

    def _keep(self) -> None:
        found = self._model.coefficients
        tensors = {"values": found.values, "first": found.first, "second": found.second}
        tensors["entropies"] = torch.tensor(self._entropies, dtype=torch.float64)  # (steps,)
        tensors["of"] = _bytes(self._what)
        durable.replace_file(self._kept, save(tensors))

    def _resume(self) -> None:
        """Goes on where the same was cut short; anything else that was kept is begun anew."""
        if kept := _kept(self._kept, self._what, self._how.steps):
            steps = len(kept["entropies"])
            self._model.coefficients = Coefficients(kept["values"], kept["first"], kept["second"], steps)
            self._entropies = kept["entropies"].tolist()
            self._to.say(f"going on behind step {steps}")


def _kept(path: Path, what: str, steps: int) -> dict[str, torch.Tensor] | None:
    """What `_Course._keep` kept there of the same; None where that is nothing, or more than these steps."""
    with suppress(FileNotFoundError, SafetensorError, KeyError):
        kept = load(path.read_bytes())
        if torch.equal(kept["of"], _bytes(what)) and kept.keys() >= KEPT and len(kept["entropies"]) <= steps:
            return kept
    return None


def _start(method: Method) -> float:
    return float(method.params()["scale"])


def _bytes(sha256: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(sha256)), dtype=torch.uint8)


def fallen(entropies: Sequence[float]) -> list[float]:
    """[the mean of the first steps, that of the last], of ten at most, and of no step in both where there are two."""
    several = max(1, min(OFTEN, len(entropies) // 2))
    return [fmean(entropies[:several]), fmean(entropies[-several:])]
