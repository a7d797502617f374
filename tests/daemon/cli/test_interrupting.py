"""Ctrl-C while something is imported ends the command, once the import is over."""

import importlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from daemon.cli import interrupting
from daemon.cli.interrupting import interruptible

# Where the signal comes while a weak reference is cleared, as that to a module's lock is after each import, Python says
# "Exception ignored", and goes on.
LOSES_IT = """
import os, signal, weakref
class Lock: pass
lock = Lock()
reference = weakref.ref(lock, lambda _: os.kill(os.getpid(), signal.SIGINT))
del lock
imported = True
"""
VERB = """
import sys, time
from daemon.cli import app
def verb():
    import loses_it
    print(loses_it.imported, flush=True)
    time.sleep(30)
app.app = verb
app.main()
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loses_it.py").write_text(LOSES_IT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "loses_it", raising=False)


def test_an_interrupt_during_an_import_comes_behind_it() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        assert importlib.import_module("loses_it").imported
        time.sleep(30)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_outside_of_imports_it_comes_at_once_and_who_ignores_it_does_so_still() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_import_that_never_ends_is_not_waited_for_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of somebody's method, from a disk that is gone: Ctrl-C ends the command all the same."""
    monkeypatch.setattr(interrupting, "MOST_SECONDS", 0.2, raising=False)
    monkeypatch.delitem(sys.modules, "hangs", raising=False)
    (tmp_path / "hangs.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\n"
        "end = time.monotonic() + 5\nwhile time.monotonic() < end: time.sleep(0.01)\n"
    )
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interruptible():
        importlib.import_module("hangs")
    assert 0.2 <= time.monotonic() - begun < 4


def test_a_verb_that_is_interrupted_while_it_imports_ends() -> None:
    done = subprocess.run([sys.executable, "-c", VERB], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "True\n")
    assert "Exception ignored" not in done.stderr
