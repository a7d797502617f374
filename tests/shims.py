"""`mainstem` and `python` for shell scripts, each run in a fork of one process that has the libraries in it already.

    python -m tests.shims SOCKET         serves until it is ended
    shims.write(FOLDER, SOCKET)          puts the two commands into a folder, for PATH

Importing torch and transformers takes seconds, once for each command otherwise. The commands are the real ones: a fork
gets the caller's arguments, folder, environment and streams, and signals are passed on to it.
"""

import json
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import NoReturn

MESSAGE_BYTES = 1 << 20
CLIENT = """#!{python} -SEs
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({socket!r})
asked = dict(command={command!r}, words=sys.argv[1:], folder=os.getcwd(), environment=dict(os.environ))
socket.send_fds(server, [json.dumps(asked).encode()], [0, 1, 2])
child = int(server.recv(20))
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, frame: os.kill(child, number))
sys.exit(int(server.recv(20)))
"""


def write(folder: Path, address: Path) -> None:
    """Makes the executables `mainstem` and `python` in `folder`, which ask the server at `address`."""
    folder.mkdir()
    for command in ("mainstem", "python"):
        path = folder / command
        path.write_text(CLIENT.format(python=sys.executable, socket=str(address), command=command))
        path.chmod(0o755)


def serve(address: str) -> NoReturn:
    """Answers callers, each in a process of its own, until it is ended."""
    import peft
    import transformers

    import daemon.cli
    import daemon.service  # noqa: F401

    for name in ("AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM"):
        getattr(transformers, name)
    assert peft.LoraConfig
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who answer
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen(16)
    while True:
        caller, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _answer(caller)
        caller.close()


def _answer(caller: socket.socket) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams, _, _ = socket.recv_fds(caller, MESSAGE_BYTES, 3)
    child = os.fork()
    if child == 0:
        _become(json.loads(message), streams, caller)
    caller.send(str(child).encode())
    caller.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256).encode())
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
    serve(sys.argv[1])
