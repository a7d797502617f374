"""Everything that needs a CUDA card, step by step, each in a process of its own with a time limit of its own.

    bench/gpu.sh --out FOLDER         # FOLDER/gpu.json, written anew after every step
    bench/gpu.sh --rehearse           # the same steps on the CPU with tiny sizes, into bench-work/rehearsal

A step that fails or takes too long stops no other, and keeps what it had found: it prints a JSON object a line, which
are put together. Without a CUDA device nothing is run, but for the rehearsal. The steps are in gpu_checks.py and
gpu_layers.py; FusionBench's in fusionbench_linear.py.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.record import ROOT, parser, peer, save

ALL_SECONDS = 480.0
TAIL = 1500
SHAPES = ("4096x4096", "4096x14336")
TINY = ("48x48", "48x80")
CUDA_TESTS = ("tests/projector/driver/test_cuda.py", "tests/projector/algebra/test_low_rank.py")
Found = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Where and how large."""

    device: str
    shapes: Sequence[str]
    small: bool

    @property
    def words(self) -> list[str]:
        return ["--device", self.device, *(["--small"] if self.small else [])]


@dataclass(frozen=True)
class Step:
    """One step: how long it may take, and its command; a word instead of it where it cannot be run here."""

    name: str
    limit: float
    command: Callable[[Plan], list[str] | str]
    read: Callable[[str], Found] | None = None
    """What its output says, where that is not JSON."""


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    made.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS], help="only these")
    made.add_argument("--seconds", type=float, default=ALL_SECONDS, help="for all steps together")
    options = made.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        print("no CUDA device is at hand: nothing was measured (--rehearse runs the steps on the CPU)")
        return
    if options.rehearse and options.out == made.get_default("out"):
        options.out = ROOT / "bench-work" / "rehearsal"  # never among the results of a real card
    plan = Plan("cpu", TINY, True) if options.rehearse else Plan("cuda", SHAPES, False)
    wanted = [step for step in STEPS if not options.steps or step.name in options.steps]
    del options.steps
    figures: dict[str, Any] = {"rehearsal": options.rehearse, "shapes": list(plan.shapes), "steps": {}}
    until = time.monotonic() + options.seconds
    for step in wanted:
        found = run(step, plan, until - time.monotonic())
        figures["steps"][step.name] = found
        save("gpu", options, figures, quiet=True)
        print(f"{step.name}: {found['status']} in {found['seconds']:.1f} s {found['why']}".rstrip(), flush=True)
    print(f"wrote {options.out / 'gpu.json'}")


def run(step: Step, plan: Plan, left: float) -> Found:
    """Runs one step: its status (done, failed, skipped), why, its seconds, and what it found."""
    command = step.command(plan)
    if isinstance(command, str):
        return {"status": "skipped", "why": command, "seconds": 0.0, "found": {}}
    limit = min(step.limit, left)
    if limit <= 0:
        return {"status": "skipped", "why": "no time was left", "seconds": 0.0, "found": {}}
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, stdout=out, stderr=err, text=True, cwd=ROOT, env=environment(step), start_new_session=True
        )
        try:
            why = "" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            why = f"it took longer than {limit:.0f} s"
        finally:
            _end(process)
        out.seek(0)
        err.seek(0)
        said, complaint = out.read(), err.read()
    found = step.read(said + complaint) if step.read else merged(said)
    if why == "failed":
        why = (complaint.strip() or said.strip())[-TAIL:]
    return {
        "status": "failed" if why else "done",
        "why": why.replace(str(ROOT), "."),
        "seconds": time.monotonic() - started,
        "found": found,
    }


def merged(said: str) -> Found:
    """The JSON objects in a step's output, a line each, put together."""
    found: Found = {}
    for line in said.splitlines():
        if line.startswith("{"):
            found.update(json.loads(line))
    return found


def environment(step: Step) -> dict[str, str]:
    """A step's environment: with the other tool's own packages where it is the other tool's."""
    given = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if step.name == "fusionbench" and (path := os.environ.get("FUSIONBENCH_PATH")):
        given["PYTHONPATH"] = path
    return given


def _end(process: "subprocess.Popen[str]") -> None:
    """Ends the step with all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tests(_: Plan) -> list[str]:
    """Warnings are no errors there: that machine's torch may be another."""
    words = ["-q", "-m", "cuda", "-W", "default", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", *words, *CUDA_TESTS]


def _counts(said: str) -> Found:
    """What pytest's last line counts, and the names of those that failed."""
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", said)}
    return {**counts, "names": re.findall(r"^(?:FAILED|ERROR) \S+::(\S+)", said, re.MULTILINE)}


def _ours(module: str, step: str) -> Callable[[Plan], list[str]]:
    def command(plan: Plan) -> list[str]:
        return [sys.executable, "-m", f"bench.{module}", step, *plan.words, "--shapes", *plan.shapes]

    return command


def _fusionbench(plan: Plan) -> list[str] | str:
    python = peer("FUSIONBENCH_PYTHON")
    if python is None:
        return "FUSIONBENCH_PYTHON was not given"
    return [str(python), "-m", "bench.fusionbench_linear", "--device", plan.device, *plan.shapes]


def _sanitizer(plan: Plan) -> list[str] | str:
    fold = [sys.executable, "-m", "bench.gpu_checks", "fold", *plan.words]
    if plan.device == "cpu":
        return fold
    binary = shutil.which("compute-sanitizer") or next(
        (str(path) for path in sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))), None
    )
    if binary is None:
        return "compute-sanitizer is not on this machine"
    return [binary, "--tool", "memcheck", "--error-exitcode", "9", *fold]


def _sanitized(said: str) -> Found:
    errors = re.search(r"ERROR SUMMARY: (\d+) error", said)
    return {**merged(said), "errors": int(errors[1]) if errors else None}


STEPS: Sequence[Step] = (
    Step("tests", 120, _tests, _counts),
    Step("exact", 60, _ours("gpu_checks", "exact")),
    Step("layers", 90, _ours("gpu_layers", "layers")),
    Step("eigh", 90, _ours("gpu_layers", "eigh")),
    Step("daemon", 90, _ours("gpu_checks", "daemon")),
    Step("memory", 40, _ours("gpu_checks", "memory")),
    Step("ways", 40, _ours("gpu_layers", "ways")),
    Step("fusionbench", 150, _fusionbench),
    Step("sanitizer", 90, _sanitizer, _sanitized),
)
"""What matters most comes first: the last ones may find no time left."""


if __name__ == "__main__":
    main()
