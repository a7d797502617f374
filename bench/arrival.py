"""What one arrival costs a real daemon: seconds, where they go, and peak memory, expert after expert.

    python -m bench.clip_shapes W --experts 12
    python -m bench.arrival --base W/base W/expert-0*

Each expert is hard-linked into the inbox (whole at once) and waited for over HTTP. `arrival` runs from that moment to
the version being visible, `settle` of which the daemon only waits to see the upload at rest; the phases are its own
metric, summed over threads, so that `project` may exceed the time that passed.
"""

import argparse
import os
import platform
import re
import shutil
import tempfile
import time
from pathlib import Path

import torch

from daemon.demo.live import ENVIRONMENT, Live, daemon
from daemon.founding import found
from daemon.home import Home
from daemon.progress import PHASES
from projector.methods import make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experts", type=Path, nargs="+")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--method", default="opcm")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"{'expert':>6} {'arrival':>8} {'settle':>7} " + " ".join(f"{phase:>8}" for phase in PHASES) + "  peak MB")
    parent = arguments.base.resolve().parent  # the same file system, so that the experts can be linked
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        home = Home(Path(folder) / "home")
        found(home, arguments.base, [("main", make(arguments.method))], lambda _: None)
        with daemon(home.root, port=0) as live:
            before = dict.fromkeys(PHASES, 0.0)
            for number, expert in enumerate(arguments.experts, start=1):
                started = time.monotonic()
                _link(expert, home.inbox / expert.name)
                live.wait_for(number)
                seconds = time.monotonic() - started
                after = _phases(live)
                spent = " ".join(f"{after[phase] - before[phase]:8.2f}" for phase in PHASES)
                settle = float(ENVIRONMENT["MAINSTEM_INBOX__SETTLE_SECONDS"])
                print(f"{number:>6} {seconds:8.2f} {settle:7.2f} {spent}  {_peak_megabytes():7.0f}", flush=True)
                before = after


def _link(source: Path, target: Path) -> None:
    """A whole expert at once: copied beside the inbox by links, then renamed into it."""
    if source.is_file():
        os.link(source, target)
        return
    beside = target.with_name(f".{target.name}")
    shutil.copytree(source, beside, copy_function=os.link)
    beside.rename(target)


def _phases(live: Live) -> dict[str, float]:
    lines = live.metric("mainstem_merge_phase_seconds_total")
    return {found[1]: float(found[2]) for line in lines if (found := re.match(r'.*phase="(\w+)"} (\S+)', line))}


def _peak_megabytes() -> float:
    """The daemon's peak resident size: it is this process's only child."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    status = Path(f"/proc/{children[0]}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found, "the kernel reports no VmHWM"
    return int(found[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
