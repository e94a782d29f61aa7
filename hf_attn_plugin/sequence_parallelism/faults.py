"""A process that dies ends the whole job at once, with an error that names it.

The processes of a ring wait for each other in every layer. When one dies, launchers end those on
its own machine; the others may wait in a collective until the process group's timeout, ten minutes
or never. Here every process keeps a connection to process 0 open. The operating system closes the
connections of a process that is gone, whatever its state was, and notices unreachable machines
(TCP keepalive), so neither a long kernel nor a busy interpreter is taken for a death.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

# Of connections: seconds until the first probe of a silent peer, between probes, and how many.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
HELLO_S = 10.0
LINE = 4096
LEFT = "left"
GONE = "is gone: it was killed, has crashed or cannot be reached"


@contextlib.contextmanager
def watch_processes(grace_s: float = 5.0) -> Iterator[None]:
    """End this process when another process of the job is gone, naming it.

    Within the block, if another process dies or leaves by an exception, this process logs which,
    with its machine and process id. Usually a collective then fails here too: the exception gets
    the same words as a note. Where the block is not left within `grace_s`, since it waits for the
    dead, the process ends with exit status 1.

    All processes enter together (three small collectives). In a job of one process it does nothing.

    Args:
        grace_s: Seconds that the block has to end by itself.

    Yields:
        Nothing.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    watch = _Watch(grace_s)
    try:
        yield
    except BaseException as error:
        # What failed here may well be how another's death shows; its connection ends soon after.
        if watch.lost.wait(min(grace_s, 2.0)):
            error.add_note(watch.reason)
        else:
            watch.leave(f"failed with {type(error).__name__}: {error!s:.300}")
        raise
    finally:
        watch.leave(LEFT)


class _Watch:
    """One process's end of the connections; a thread listens until `leave`."""

    def __init__(self, grace_s: float) -> None:
        import torch.distributed as dist

        self.grace_s = grace_s
        self.lost = threading.Event()
        self.reason = ""
        self._left = threading.Event()
        self._lock = threading.Lock()
        self._rank = dist.get_rank()
        names: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(names, (socket.gethostname(), os.getpid()))
        self._names = [f"process {i} ({host}, pid {pid})" for i, (host, pid) in enumerate(names)]
        one_machine = len({host for host, _ in names}) == 1
        # Process 0 listens, on the machine's own interface alone where nobody else needs more.
        meeting: list[Any] = [None]
        if self._rank == 0:
            self._server = socket.create_server(("127.0.0.1" if one_machine else "", 0))
            meeting = [(self._server.getsockname()[1], secrets.token_hex(16))]
        dist.broadcast_object_list(meeting, src=0)
        port, self._token = meeting[0]
        self._peers: dict[int, socket.socket] = {}
        if self._rank != 0:
            hosts = ["127.0.0.1"] if names[0][0] == names[self._rank][0] else []
            hosts += [os.environ["MASTER_ADDR"]] if "MASTER_ADDR" in os.environ else []
            self._peers = self._connect([*hosts, names[0][0]], port)
        listen = self._listen_to_all if self._rank == 0 else self._listen_to_first
        self._thread = threading.Thread(target=listen, name="watch_processes", daemon=True)
        self._thread.start()
        # Process 0 must not leave before all have come.
        dist.all_gather_object(names, None)

    def leave(self, word: str) -> None:
        """Say goodbye and stop listening; the second time, nothing."""
        with self._lock:
            if self._left.is_set():
                return
            self._left.set()
            self._tell(word if self._rank or word == LEFT else f"{self._names[0]} {word}")
            for peer in self._peers.values():
                with contextlib.suppress(OSError):
                    peer.shutdown(socket.SHUT_RDWR)
        if self._rank == 0:
            self._server.close()
        self._thread.join(self.grace_s)
        for peer in self._peers.values():
            peer.close()

    def _tell(self, word: str) -> None:
        line = " ".join(word.split())[: LINE - 2] + "\n"
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(line.encode())

    def _connect(self, hosts: list[str], port: int) -> dict[int, socket.socket]:
        for host in hosts:
            try:
                peer = socket.create_connection((host, port), timeout=HELLO_S)
                peer.sendall(f"{self._token} {self._rank}\n".encode())
                if _line(peer) == self._token:
                    peer.settimeout(None)
                    _keep_alive(peer)
                    return {0: peer}
            except OSError:
                continue
        logger.warning(
            "%s cannot reach %s at %s: if either dies, the other ends no sooner than the process "
            "group's timeout",
            *(self._names[self._rank], self._names[0], f"{'/'.join(hosts)}:{port}"),
        )
        return {}

    def _listen_to_first(self) -> None:
        for peer in self._peers.values():
            word = _line(peer)
            if word != LEFT:
                self._report(word or f"{self._names[0]} {GONE}")

    def _listen_to_all(self) -> None:
        with selectors.DefaultSelector() as ready:
            ready.register(self._server, selectors.EVENT_READ)
            while not self._left.is_set():
                for key, _ in ready.select(timeout=0.5):
                    if key.fileobj is self._server:
                        with contextlib.suppress(OSError):
                            self._accept(ready)
                    else:
                        ready.unregister(key.fileobj)
                        self._gone(key.data, _line(self._peers[key.data]))

    def _accept(self, ready: selectors.BaseSelector) -> None:
        peer, _ = self._server.accept()
        peer.settimeout(HELLO_S)
        token, _, rank = _line(peer).partition(" ")
        if token != self._token:
            peer.close()
            return
        peer.sendall(f"{self._token}\n".encode())
        peer.settimeout(None)
        _keep_alive(peer)
        with self._lock:
            self._peers[int(rank)] = peer
        ready.register(peer, selectors.EVENT_READ, int(rank))

    def _gone(self, rank: int, word: str) -> None:
        with self._lock:
            self._peers.pop(rank).close()
        if word == LEFT or self._left.is_set():
            return
        reason = f"{self._names[rank]} {word or GONE}"
        with self._lock:
            self._tell(reason)
        self._report(reason)

    def _report(self, reason: str) -> None:
        if self._left.is_set():
            return
        self.reason = (
            f"{reason.rstrip('.')}. The job ends; start it again to go on from the last checkpoint"
        )
        self.lost.set()
        logger.error("%s: %s", self._names[self._rank], self.reason)
        if not self._left.wait(self.grace_s):
            # The main thread waits in a collective that nobody will join.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)


def _line(peer: socket.socket) -> str:
    """The next line; what came of it, or nothing, where the connection ends."""
    received = b""
    with contextlib.suppress(OSError):
        while not received.endswith(b"\n") and len(received) < LINE:
            more = peer.recv(1)
            if not more:
                break
            received += more
    return received.decode(errors="replace").strip()


def _keep_alive(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # not on every operating system
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
