"""`mainstem` and `python`, each run in a fork of one process that has the libraries in it already and never computes.

    python -m tests.shims SOCKET [MODULE ...]    serves until it is ended; MODULEs are imported beside torch
    shims.write(FOLDER, SOCKET)                  puts the two commands into a folder, for PATH of a shell script
    shims.Process(SOCKET, WORDS, ...)            `mainstem WORDS` as a process to wait for and to send signals to

Importing torch and transformers takes seconds, once for each command otherwise. The commands are the real ones: a fork
gets the caller's arguments, folder, environment and streams, and signals are passed on to it.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

MESSAGE_BYTES = 1 << 20
LAZY = {  # what these import only once it is asked for
    "transformers": ("AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM"),
    "peft": ("LoraConfig",),
}
CLIENT = """#!{python} -SEs
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({socket!r})
asked = dict(command={command!r}, words=sys.argv[1:], folder=os.getcwd(), environment=dict(os.environ))
socket.send_fds(server, [json.dumps(asked).encode()], [0, 1, 2])
child = int(server.recv(20))
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, frame: os.kill(child, number))
sys.exit(int(server.recv(20)) % 256)
"""


def write(folder: Path, address: Path) -> None:
    """Makes the executables `mainstem` and `python` in `folder`, which ask the server at `address`."""
    folder.mkdir()
    for command in ("mainstem", "python"):
        path = folder / command
        path.write_text(CLIENT.format(python=sys.executable, socket=str(address), command=command))
        path.chmod(0o755)


class Process:
    """`mainstem WORDS`, with what the tests ask of a subprocess.Popen; `out` and `err` are descriptors."""

    def __init__(
        self, address: Path, words: Sequence[str], environment: Mapping[str, str], folder: Path, out: int, err: int
    ) -> None:
        self.args = ["mainstem", *words]
        self.returncode: int | None = None
        asked = {"command": "mainstem", "words": words, "folder": str(folder), "environment": dict(environment)}
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.connect(str(address))
        with Path(os.devnull).open() as nothing:
            socket.send_fds(self._server, [json.dumps(asked).encode()], [nothing.fileno(), out, err])
        self.pid = int(self._server.recv(20))

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._heard(0)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, once it has ended; raises subprocess.TimeoutExpired."""
        status = self._heard(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        """Sends it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _heard(self, seconds: float | None) -> int | None:
        if self.returncode is None:
            self._server.settimeout(seconds)
            try:
                self.returncode = int(self._server.recv(20))
                self._server.close()
            except (BlockingIOError, TimeoutError):
                return None
        return self.returncode


def started(address: Path, *modules: str) -> subprocess.Popen[bytes]:
    """The server, listening."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    server = subprocess.Popen([sys.executable, "-m", "tests.shims", address, *modules], env=environment, cwd=root)
    while not address.exists():
        assert server.poll() is None, "the server has ended"
        time.sleep(0.02)
    return server


def serve(address: str, *modules: str) -> NoReturn:
    """Answers callers, each in a process of its own, until it is ended."""
    gc.disable()  # it would look through all that is imported again and again
    import alembic.command  # noqa: F401

    import daemon.cli.app
    import daemon.http
    import daemon.service  # noqa: F401
    from projector.methods import methods

    methods()
    for module in map(importlib.import_module, modules):
        for name in LAZY.get(module.__name__, ()):
            getattr(module, name)
    gc.freeze()  # the forks share its pages for longer
    gc.enable()
    signal.signal(signal.SIGCHLD, _reap)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{address}.new")
    listener.listen(16)
    Path(f"{address}.new").rename(address)  # whoever sees it can connect
    while True:
        caller, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _answer(caller)
        caller.close()


def _reap(*_: object) -> None:
    """Those who answer, once they are done."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _answer(caller: socket.socket) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams, _, _ = socket.recv_fds(caller, MESSAGE_BYTES, 3)
    child = os.fork()
    if child == 0:
        _become(json.loads(message), streams, caller)
    caller.send(str(child).encode())
    caller.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
    os._exit(0)


def _become(asked: dict[str, object], streams: list[int], caller: socket.socket) -> NoReturn:
    status = 99
    try:
        caller.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(str(asked["folder"]))
        os.environ.clear()
        os.environ.update(asked["environment"])  # type: ignore[call-overload]
        if "PYTHONUNBUFFERED" in os.environ:
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        words = [str(word) for word in asked["words"]]  # type: ignore[attr-defined]
        _run(str(asked["command"]), words)
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run(command: str, words: list[str]) -> None:
    if command == "mainstem":
        sys.argv = ["mainstem", *words]
        from daemon.cli import main

        main()
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    serve(*sys.argv[1:])
