"""Programs for scripts of a shell (`lolcats`, `torchrun`, `python`) that start without importing anything.

Each is a small client of a server, which is forked from a process that has imported what they use (`forked`). The
server forks a process for each, with the client's arguments, folder, variables and standard streams. Everything else is
real: the process ends when its client is killed, and the client ends with its exit code.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import forked

CLIENT = """#!{python} -SE
import json, os, socket, sys
name, words = os.path.basename(sys.argv[0]), [word for word in sys.argv[1:] if word != "-u"]
if name != "python":
    words = ["-m", {{"torchrun": "torch.distributed.run"}}.get(name, name), *words]
asked = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [len(asked).to_bytes(4, "little")], [0, 1, 2])
    server.sendall(asked)
    code = int(server.recv(8) or 1)
sys.exit(code)
"""


def start(folder: Path) -> tuple[ForkServerProcess, dict[str, str]]:
    """Make the programs in `folder`/bin, and start their server.

    Returns:
        The server, which whoever starts it ends (`kill`); and variables with which a shell finds the programs, and
        `torchrun` starts its processes with them.
    """
    programs, address = folder / "bin", str(folder / "server")
    programs.mkdir()
    for name in ("lolcats", "torchrun", "python"):
        (programs / name).write_text(CLIENT.format(python=sys.executable, address=address))
        (programs / name).chmod(0o755)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(64)
    server = forked.CONTEXT.Process(target=serve, args=(listening,), daemon=True)
    server.start()
    listening.close()
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return server, {**os.environ, "PATH": path, "PYTHON_EXEC": str(programs / "python")}


def serve(listening: socket.socket) -> None:
    """Fork a process for each client, until this one is killed."""
    gc.freeze()  # as in `forked.run`
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that look after a client
    while True:
        client = listening.accept()[0]
        if not os.fork():
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            look_after(client)
        client.close()


def look_after(client: socket.socket) -> None:
    """Start what a client asks for; end it if the client is gone; else tell the client its exit code."""
    head, streams, _, _ = socket.recv_fds(client, 4, 3)
    asked = b""
    while len(asked) < int.from_bytes(head, "little"):
        asked += client.recv(1 << 16)
    child = os.fork()
    if not child:
        client.close()
        words, folder, environment = json.loads(asked)
        perform(words, folder, environment, streams)
    for stream in streams:
        os.close(stream)
    pipe = os.pidfd_open(child)
    ready, _, _ = select.select([pipe, client], [], [])
    if pipe not in ready:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        client.sendall(str(code if code >= 0 else 128 - code).encode())
    finally:
        os._exit(0)


def perform(words: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> None:
    """Be what `python WORDS` is."""
    import torch

    code = 1
    try:
        for stream, descriptor in zip(streams, (0, 1, 2), strict=True):
            os.dup2(stream, descriptor)
            os.close(stream)
        # The old ones remember where in a file they were, and have other descriptors.
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", closefd=False) for descriptor in (1, 2))
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        assert words[0] == "-m", words
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
