"""How long a daemon takes to be ready, and to end.

    python -m bench.restart CHECKPOINTS --turns 3

CHECKPOINTS holds a base and two experts, as clip_shapes writes them (350 MB each). The daemon is told of as systemd
would be, by a socket. Seconds from the start of the process to READY=1: after a clean stop, and after SIGKILL, when the
live version is hashed. Seconds from SIGTERM to the end of the process: idle, and while an expert is merged, which stays
in the inbox.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from bench.live import drop, make_home, scratch, warm
from bench.record import checkpoints, parser, save
from daemon.layout import Home

PATIENCE_SECONDS = 600.0
LOOK_SECONDS = 0.002


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("checkpoints", type=Path)
    made.add_argument("--turns", type=int, default=3)
    options = made.parse_args()
    base, experts = checkpoints(options.checkpoints, 2)
    warm([base, *experts])
    with scratch(base) as folder:
        home = make_home(folder, base, "opcm")
        subprocess.run([*_command(home), "--once"], stderr=subprocess.DEVNULL, check=True)
        figures = measured(home, folder / "notify", experts, options.turns)
    save("restart", options, {"model_bytes": (base / "model.safetensors").stat().st_size, **figures})


def measured(home: Home, address: Path, experts: list[Path], turns: int) -> dict[str, object]:
    """All turns, and the median of each."""
    seconds: dict[str, list[float]] = {"clean start": [], "idle stop": [], "unclean start": [], "merging stop": []}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(address))
        told.settimeout(PATIENCE_SECONDS)
        drop(home, experts[0])
        daemon, _ = _started(home, told)
        while (home.inbox / experts[0].name).exists():
            time.sleep(LOOK_SECONDS)
        _stopped(daemon)
        for _ in range(turns):
            daemon, start = _started(home, told)
            seconds["clean start"].append(start)
            seconds["idle stop"].append(_stopped(daemon))
            daemon, _ = _started(home, told)
            daemon.kill()
            daemon.wait()
            daemon, start = _started(home, told)
            seconds["unclean start"].append(start)
            drop(home, experts[1])
            _heard(told, "STATUS=merging")
            seconds["merging stop"].append(_stopped(daemon))
            for path in (home.inbox / experts[1].name).iterdir():
                path.unlink()
            (home.inbox / experts[1].name).rmdir()
    return {"seconds": seconds, "median": {name: median(all_) for name, all_ in seconds.items()}}


def _command(home: Home) -> list[str]:
    return [sys.executable, "-m", "daemon", "run", "--home", str(home.root), "--port", "0"]


def _started(home: Home, told: socket.socket) -> tuple[subprocess.Popen[bytes], float]:
    """A daemon that is ready, and the seconds that took."""
    began = time.monotonic()
    more = {"NOTIFY_SOCKET": str(told.getsockname())}
    daemon = subprocess.Popen(_command(home), env={**os.environ, **more}, stderr=subprocess.DEVNULL)
    _heard(told, "READY=1")
    return daemon, time.monotonic() - began


def _heard(told: socket.socket, word: str) -> None:
    while word not in told.recv(1 << 16).decode():
        pass


def _stopped(daemon: subprocess.Popen[bytes]) -> float:
    """Seconds from SIGTERM to the end."""
    began = time.monotonic()
    daemon.send_signal(signal.SIGTERM)
    daemon.wait(PATIENCE_SECONDS)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
