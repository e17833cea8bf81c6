"""Processes joined by gloo for the tests of what several do together, started once a session.

    results = processes.pool(2).run(function, argument)

calls the function, which has to be a module's own, in each process and gives what each returned, in the order of ranks.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT = 60.0  # seconds that a process waits for the others


class Pool:
    """`count` processes."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "deepclust.distributed", "deepclust.methods"])
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            self._ends.append(ours)
            process = context.Process(target=_serve, args=(theirs, rank, count, port), daemon=True)
            process.start()
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returned in each process. An exception in any of them fails the test."""
        for end in self._ends:
            end.send((function, arguments))
        answers = [end.recv() for end in self._ends]
        failed = [text for good, text in answers if not good]
        if failed:  # the others may wait for something that never comes
            self.close()
            raise AssertionError("\n".join(failed))
        return [value for _, value in answers]

    def close(self) -> None:
        """End the processes; the next `pool` starts new ones."""
        for process in self._processes:
            process.kill()
        pool.cache_clear()


@cache
def pool(count: int) -> Pool:
    """The session's pool of so many processes."""
    return Pool(count)


def _serve(end: Connection, rank: int, count: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    from deepclust import distributed

    torch.set_num_threads(1)
    with distributed.group(seconds=TIMEOUT):
        while True:
            try:
                function, arguments = end.recv()
            except EOFError:
                os._exit(0)
            try:
                end.send((True, function(*arguments)))
            except BaseException:
                end.send((False, f"process {rank}:\n{traceback.format_exc()}"))
