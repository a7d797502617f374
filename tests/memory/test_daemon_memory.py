"""I9, through the real daemon: peak memory does not grow with the number of experts."""

import re
from pathlib import Path
from statistics import median

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.daemon.homes import make_home
from tests.daemon.processes import Daemon, running

MANY, COMPARED = 24, 8
SLACK_MB = 8.0  # half a megabyte for each expert between the two medians: a twenty-fifth of the model


def base_model(path: Path) -> int:
    """3M parameters, of which the embedding alone has 2M; its size in bytes. Small, so that chance is small too."""
    draw = torch.Generator().manual_seed(1)
    tensors = {"embed.weight": torch.randn(8_000, 256, generator=draw)}
    for layer in range(5):
        tensors |= {
            f"layers.{layer}.attention.weight": torch.randn(256, 512, generator=draw),
            f"layers.{layer}.mlp.weight": torch.randn(512, 256, generator=draw),
        }
    save_file(tensors, path)
    return path.stat().st_size


def peaks_mb(daemon: Daemon, inbox: Path, base: Path) -> list[float]:
    """The peak of resident memory while each of the experts is merged, in MB: the kernel's own figure."""
    process = Path(f"/proc/{daemon.process.pid}")
    weights, peaks = load_file(base), []
    for number in range(1, MANY + 1):
        torch.manual_seed(number)
        (process / "clear_refs").write_text("5")  # the peak starts over
        expert = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in weights.items()}
        save_file(expert, inbox / f"{number:02d}.part")
        (inbox / f"{number:02d}.part").rename(inbox / f"{number:02d}.safetensors")
        daemon.wait_for(number, seconds=120)
        kilobytes = re.search(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())
        assert kilobytes is not None
        peaks.append(int(kilobytes[1]) * 1024 / 1e6)
    return peaks


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_later_experts_take_no_more_memory_than_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """How the blocks under way meet, and which lie free where, is chance: peaks scatter by 2 to 3 MB (with four times
    the model by 11 MB), so the medians of eight by 1.5 MB."""
    base = tmp_path / "base.safetensors"
    size = base_model(base)
    home = make_home(tmp_path / "home", base)
    more = {"COMPUTE__THREADS": "1", "COMPUTE__PREPARE": "false"}
    more |= {"RETENTION__GRACE_SECONDS": "0", "RETENTION__VERSIONS": "1", "HTTP__PORT": "0"}
    variables = {f"MAINSTEM_{key}": value for key, value in more.items()}
    with running("run", "--home", home.root, fresh=True, **variables) as daemon:
        peaks = peaks_mb(daemon, home.inbox, base)
    first = median(peaks[1 : 1 + COMPARED])  # the very first merge has no state to read
    last = median(peaks[-COMPARED:])
    with capsys.disabled():
        print(f"\nmodel {size / 1e6:.0f} MB: peaks {', '.join(f'{peak:.0f}' for peak in peaks)} MB")
    assert last - first < SLACK_MB
