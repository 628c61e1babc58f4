"""The `darkroom` program, imported once: a process that forks itself for each command that somebody types.

To start Python and to import the program takes half a second of CPU time, and tests type hundreds of
commands. All else is as in a shell: each command is a process of its own, with the arguments, environment,
folder and files that it is given, and ends with an exit status.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_NAME = "darkroom"
_ROOT = Path(__file__).parents[2]
_REQUEST_BYTES = 1 << 17
_FILES = 4
"""Standard input, output and error, and where the exit status goes."""


def type_command(
    arguments: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    files: tuple[IO[str], IO[str], IO[str]],
    within_s: float,
) -> int:
    """Run `darkroom` with these arguments and standard files, and return its exit status.

    Raises TimeoutError where it has not ended by then; it goes on.
    """
    request = json.dumps({"arguments": [*arguments], "folder": str(folder), "environment": {**environment}})
    ended, ends = socket.socketpair()
    with ended:
        with ends:
            numbers = [*(file.fileno() for file in files), ends.fileno()]
            socket.send_fds(_program(), [request.encode()], numbers)
        ended.settimeout(within_s)
        return int(ended.recv(16))


@functools.cache
def _program() -> socket.socket:
    """Start the program, which ends with this process, and return where it takes commands."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(its.fileno())],
            cwd=_ROOT,
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
    # It ends when nobody can send it a command any more. The last that was registered is called first.
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours


def _take_commands(commands: socket.socket) -> None:
    """Fork for each command until nobody can send one any more."""
    # As `scheduler.client.cli` does.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from scheduler.client.commands import app

    # The first that runs imports more, such as what reads options.
    app(["config", "show"], prog_name=_NAME, standalone_mode=False)
    gc.freeze()  # else each would go through all of it when it ends
    # Nobody waits for those that send the exit statuses.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        request, files, _, _ = socket.recv_fds(commands, _REQUEST_BYTES, _FILES)
        if not request:
            return
        if os.fork() == 0:
            commands.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            command = os.fork()
            if command == 0:
                _become(json.loads(request), files)
                app(prog_name=_NAME)
            _, status = os.waitpid(command, 0)
            os.write(files[-1], str(os.waitstatus_to_exitcode(status)).encode())
            os._exit(0)
        for file in files:
            os.close(file)


def _become(command: dict[str, object], files: list[int]) -> None:
    """Be a process as a shell would start it for a command."""
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    assert isinstance(command["environment"], dict)
    assert isinstance(command["arguments"], list)
    os.environ.clear()
    os.environ.update(command["environment"])
    os.chdir(str(command["folder"]))
    sys.argv = [_NAME, *command["arguments"]]


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as taken:
        _take_commands(taken)
