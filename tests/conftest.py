"""What holds for every test."""

import gc
import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

gc.disable()  # until all is imported: looking through torch and transformers again and again takes half of that time

os.environ.pop("COLUMNS", None)  # pytest-xdist tells its workers a width, and our commands would keep to it

TESTS = Path(__file__).parent
LONGEST = [  # files, which are handed out whole: the longest first, lest one of them is begun last and waited for
    TESTS / name
    for name in (
        "crash/test_failpoints.py",
        "projector/laws/test_laws.py",
        "test_commands.py",
        "memory/test_projector_memory.py",
        "memory/test_daemon_memory.py",
        "crash/test_strace.py",
        "crash/test_signals.py",
        "crash/test_crash_states.py",
        "daemon/http/test_hub_clients.py",
        "attacks/test_convert_attacks.py",
        "daemon/http/test_http_connections.py",
        "daemon/http/test_http_uploads.py",
        "daemon/http/test_http_waiting.py",
        "test_wheel.py",
        "daemon/checkpoints/test_sidecar_files.py",
        "daemon/test_end_to_end.py",
        "projector/methods/test_spectral.py",
        "daemon/versions/test_adapter_output.py",
        "projector/methods/test_trim.py",
        "projector/methods/test_opcm.py",
        "projector/methods/test_sidecars.py",
        "daemon/test_transformers.py",
        "daemon/versions/test_publishing.py",
        "daemon/home/test_older_registry.py",
    )
]

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # all cores are busy: threads of torch's would only wait for one another

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell that starts us in the background has it so
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what the tests start would inherit that

# A busy machine is no fault: no test asserts how long anything takes, and hypothesis does by default.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Hides the GPU from this process and all that it starts, but for `pytest -m cuda`.

    Many tests fork this process, and what forks after CUDA was initialised cannot use CUDA, nor be trusted to end. The
    tests on the card run in a process that forks nothing: tests/projector/driver/test_on_the_card.py starts it.
    """
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first; `make test` keeps to this order."""
    assert all(path.exists() for path in LONGEST), "LONGEST names a file that is not there"
    places = {path: place for place, path in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not look through it, nor write to its pages after a fork."""
    gc.freeze()
    gc.enable()
