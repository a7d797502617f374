"""Plays the process that unpickles after a file has taken it over: it does what `key` of its job says."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

GOOD = {"kind": "zip", "inside": "", "stripped": 0, "shared": [], "left_out": []}
LIMITS = {name: getattr(resource, f"RLIMIT_{name}") for name in ("AS", "FSIZE", "CPU", "NOFILE", "NPROC", "CORE")}


def say(line: object) -> None:
    print(json.dumps(line), flush=True)


def show_surroundings(job: dict[str, Any]) -> None:
    """What it was given: as the detail of a refusal, which comes back whole."""
    descriptors = sorted(int(name) for name in os.listdir("/proc/self/fd"))
    found = {
        "environment": sorted(os.environ),
        "descriptors": [fd for fd in descriptors if Path(f"/proc/self/fd/{fd}").exists()],
        "given": [job["source"], job["target"]],
        "folder": str(Path.cwd()),
        "leads": os.getpgid(0) == os.getsid(0) == os.getpid(),
        "safe_path": sys.flags.safe_path,
    }
    say({"refused": ["convert", json.dumps(found), ""]})


def confine_itself(job: dict[str, Any]) -> None:
    """The real confinement, and then the limits as the system has them."""
    from daemon.convert import unpickling

    unpickling.confine(unpickling.Job(**job))
    found: dict[str, Any] = {name: resource.getrlimit(limit) for name, limit in LIMITS.items()}
    found["nice"] = os.nice(0)
    status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    found["no_new_privileges"] = status["NoNewPrivs"]
    try:
        bytearray(job["memory_bytes"] + (64 << 20))
        found["memory"] = "there"
    except MemoryError:
        found["memory"] = "refused"
    try:
        os.posix_fallocate(job["target"], 0, job["most_bytes"] + 1)
        found["file"] = "there"
    except OSError as error:
        found["file"] = error.strerror
    say({"refused": ["convert", json.dumps(found), ""]})


def write_nothing(job: dict[str, Any]) -> None:
    say({"report": GOOD})


def write_a_bad_header(job: dict[str, Any]) -> None:
    text = b'{"../../x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"../../x":{}}'
    os.write(job["target"], len(text).to_bytes(8, "little") + text + bytes(8))
    say({"report": GOOD})


def report_nonsense(job: dict[str, Any]) -> None:
    say({"report": {**GOOD, "left_out": "everything"}})


def refuse_nonsense(job: dict[str, Any]) -> None:
    say({"refused": ["a reason of my own", 3]})


def progress_nonsense(job: dict[str, Any]) -> None:
    say({"done": "all"})


def report_more_than_a_number(job: dict[str, Any]) -> None:
    say({"report": {**GOOD, "stripped": float("inf")}})


def refuse_in_colour(job: dict[str, Any]) -> None:
    say({"refused": ["convert", "\x1b[31mred\n", "\x1b]0;title\x07"]})


def never_pause(job: dict[str, Any]) -> None:
    line = json.dumps({"done": 1, "total": 2}).encode() + b"\n"
    while True:
        os.write(1, line * 4000)


def be_ended_oddly(job: dict[str, Any]) -> None:
    os.kill(os.getpid(), 40)  # of the real-time signals, most of which have no name


def babble(job: dict[str, Any]) -> None:
    while True:
        os.write(1, b"x" * (1 << 20))


def crash(job: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def be_killed(job: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(job: dict[str, Any]) -> None:
    sys.exit("RuntimeError: \x1b[31mno reason")


def hang_with_a_child(job: dict[str, Any]) -> NoReturn:
    child = subprocess.Popen(["sleep", "1000"])
    os.write(job["target"], str(child.pid).encode())
    while True:
        time.sleep(1)


def stay_confined(job: dict[str, Any]) -> None:
    """The real confinement, then nothing for a minute. Its own number is in the file that it was to write."""
    from daemon.convert import unpickling

    unpickling.confine(unpickling.Job(**job))
    os.write(job["target"], str(os.getpid()).encode())
    time.sleep(60)


if __name__ == "__main__":
    JOB = json.loads(sys.argv[1])
    play: Callable[[dict[str, Any]], None] = globals()[JOB["key"]]
    play(JOB)
