"""What every measurement writes down: the machine, the command, and the figures, as one JSON file."""

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
KTHREADD = "2"  # the parent of the kernel's threads


def _busy() -> float:
    """CPU seconds that the whole machine has worked or was kept from working by its host (steal), since it started."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    """CPU seconds of this process, of its children that have ended, and of the kernel's threads, which write back."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent) + sum(_kernel_threads())


def _kernel_threads() -> Iterator[float]:
    """CPU seconds of each thread of the kernel, Linux."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[1] == KTHREADD:
                yield (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


START = time.monotonic(), _busy(), _own()


def others() -> float:
    """The share of the machine's CPU time that went elsewhere since this module was imported, 0 to 1.

    A measurement beside other work is worth nothing: two threads that wait for each other on busy cores take ten times
    as long. Ask once every child has ended.
    """
    elapsed, busy, own = (now - then for now, then in zip((time.monotonic(), _busy(), _own()), START, strict=True))
    return max(0.0, busy - own) / (elapsed * (os.cpu_count() or 1))


@dataclass(frozen=True)
class Finished:
    """A process that ended: its wall seconds and its peak resident bytes."""

    seconds: float
    peak: int


def parser(description: str) -> argparse.ArgumentParser:
    """A command line with what all measurements take."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=RESULTS, help="folder for the result (default: bench/results)")
    return made


def checkpoints(folder: Path, experts: int) -> tuple[Path, list[Path]]:
    """The base and the first `experts` experts under a folder, as the *_shapes scripts write them."""
    found = sorted(folder.glob("expert-*"))[:experts]
    if not (folder / "base").is_dir() or len(found) < experts:
        raise SystemExit(f"{folder} does not hold a base and {experts} experts: make them first (bench/README.md)")
    return folder / "base", found


def peer(variable: str) -> Path | None:
    """Another tool's python, from the environment; None where it was not given.

    Made absolute but not resolved: a virtual environment is known by the path of its link.
    """
    given = os.environ.get(variable)
    return Path(given).absolute() if given else None


def run(command: Sequence[str | Path], log: Path, **variables: str) -> Finished:
    """Runs a process to its end, in the repository's root, its output in `log`; ends the program where it fails."""
    with log.open("wb") as file:
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command], stdout=file, stderr=file, cwd=ROOT, env={**os.environ, **variables}
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed:\n{log.read_text()[-2000:]}")
    return Finished(seconds, _bytes(usage))


def save(name: str, options: argparse.Namespace, figures: dict[str, Any], quiet: bool = False) -> None:
    """Writes OUT/name.json and prints it, unless `quiet`."""
    result = {"machine": machine(), "command": _command(name, options), "figures": _rounded(figures)}
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2) + "\n"
    (options.out / f"{name}.json").write_text(text)
    if not quiet:
        print(text, end="")


def machine() -> dict[str, object]:
    """The facts without which a time means nothing."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    facts: dict[str, object] = {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.system() + " " + platform.release().split("-")[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "others": round(others(), 4),
        "date": datetime.now(UTC).date().isoformat(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _command(name: str, options: argparse.Namespace) -> str:
    """The command as anybody would type it: folders by their role instead of where they happened to be."""
    words = [f"python -m bench.{name}"]
    for key, value in vars(options).items():
        if isinstance(value, Path):
            words += [] if key == "out" else [key.upper()]
        elif isinstance(value, bool):
            words += [f"--{key}"] if value else []
        else:
            words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return " ".join(words)


def _rounded(value: Any) -> Any:
    """Fractions to six significant digits: more is noise."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _bytes(usage: resource.struct_rusage) -> int:
    """The peak resident size; Linux reports it in KiB."""
    return usage.ru_maxrss * 1024 if sys.platform == "linux" else usage.ru_maxrss
