"""I9, through the real command: peak memory does not grow with the number of experts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from daemon.home import Home
from tests.daemon.homes import live, make_home
from tests.daemon.processes import environment

FEW, MANY = 3, 12
SLACK_MB = 20.0

# The peak is the kernel's own figure, read by the process itself just before it ends.
RUN = """
import sys
from daemon.cli import main
try:
    main()
finally:
    print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


def base_model(path: Path) -> int:
    """12M parameters, of which the embedding alone has 8M; its size in bytes."""
    draw = torch.Generator().manual_seed(1)
    tensors = {"embed.weight": torch.randn(32_000, 256, generator=draw)}
    for layer in range(5):
        tensors |= {
            f"layers.{layer}.attention.weight": torch.randn(256, 1024, generator=draw),
            f"layers.{layer}.mlp.weight": torch.randn(2048, 256, generator=draw),
        }
    save_file(tensors, path)
    return path.stat().st_size


def expert(home: Home, base: Path, seed: int) -> None:
    torch.manual_seed(seed)
    weights = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in load_file(base).items()}
    save_file(weights, home.inbox / f"{seed:02d}.safetensors")


def peak_mb(home: Home) -> float:
    """Peak resident memory of one `run --once`, in MB."""
    command = [sys.executable, "-c", RUN, "run", "--once", "--no-http", "--home", str(home.root)]
    # one thread: each of torch's has a heap of its own, and the peaks of two runs then differ by chance
    more = {"COMPUTE__THREADS": "1", "RETENTION__GRACE_SECONDS": "0", "RETENTION__VERSIONS": "1"}
    more = {f"MAINSTEM_{key}": value for key, value in more.items()}
    done = subprocess.run(command, env=environment(more), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    kilobytes = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert kilobytes is not None
    return int(kilobytes[1]) * 1024 / 1e6


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_twelve_experts_take_no_more_memory_than_three(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base.safetensors"
    size = base_model(base)
    peaks = {}
    idle = peak_mb(make_home(tmp_path / "home0", base))
    for number in (FEW, MANY):
        home = make_home(tmp_path / f"home{number}", base)
        for seed in range(number):
            expert(home, base, seed)
        peaks[number] = peak_mb(home)
        assert live(home) == number
        for kept in home.root.rglob("*.safetensors"):
            kept.unlink()  # a gigabyte, otherwise
    with capsys.disabled():
        print(
            f"\nmodel {size / 1e6:.0f} MB: peak {peaks[FEW]:.0f} MB after {FEW} experts, "
            f"{peaks[MANY]:.0f} MB after {MANY}, {idle:.0f} MB with an empty inbox"
        )
    assert abs(peaks[MANY] - peaks[FEW]) < SLACK_MB
