"""A server with Keras loaded that forks a process for each script, because the import takes seconds."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parents[2]

# The fork leaves the loop and reaches the end of the program, so it ends as every interpreter does.
SERVER = """
import gc, json, os, signal, socket, sys
import keras, keras_ckpt
from support import iterators
iterators.end_at_once()
[getattr(keras_ckpt, name) for name in keras_ckpt.__all__ if name != "CheckpointManager"]
gc.freeze()  # the exit of a fork collects garbage among the other objects alone
server = socket.socket(fileno=int(sys.argv.pop()))
while True:
    request, descriptors, *_ = socket.recv_fds(server, 1 << 16, 2)
    if not request:
        sys.exit()
    if not (child := os.fork()):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background
        break
    for each in descriptors:
        os.close(each)
    server.send(b"%d" % child)
    server.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
server.close()
for number, each in enumerate(descriptors, 1):
    os.dup2(each, number)
    os.close(each)
script, directory, sys.argv[1:] = json.loads(request)
os.chdir(directory)
exec(compile(script, "<string>", "exec"))
"""


class Script:
    """A running script. Its server runs no other script meanwhile."""

    def __init__(self, server: socket.socket, script: str, arguments: Sequence[object]) -> None:
        self._server = server
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115 - `wait` closes them
        request = json.dumps([script, os.getcwd(), list(map(str, arguments))]).encode()
        socket.send_fds(server, [request], [file.fileno() for file in self._files])
        self.pid = int(server.recv(100))

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Waits for the end of the script, and gives its exit code and its output."""
        code = int(self._server.recv(100))
        texts = []
        for file in self._files:
            with file:
                file.seek(0)
                texts.append(file.read())
        return subprocess.CompletedProcess([], code, *texts)


class ForkServer:
    """Runs scripts, one at a time.

    Args:
        command: A command that runs the server, such as `unshare`. The server's own command line follows it.
    """

    def __init__(self, *command: str) -> None:
        self._server, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            number = theirs.fileno()
            self._process = subprocess.Popen(
                [*command, sys.executable, "-c", SERVER, str(number)],
                pass_fds=[number],
                env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def start(self, script: str, *arguments: object) -> Script:
        """Starts a script in the current directory, with arguments as in `sys.argv[1:]`."""
        return Script(self._server, script, arguments)

    def run(self, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Runs a script to its end."""
        return self.start(script, *arguments).wait()

    def close(self) -> None:
        self._server.close()
        self._process.wait()
