"""The line between rank 0 and the ranks that follow it: orders one way, small values both ways, and who has died.

Collectives cannot carry this. A rank that waits in one for the next order would run into its timeout while rank 0
plays episodes, and a rank that dies is noticed in the next collective only. So each follower holds one TCP connection
to rank 0: while it lives nothing times out, and the moment either end is gone the other one knows. Both ends prove that
they know a secret before anything is read; it lies in torchrun's store, where the ranks of this run look it up.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import secrets
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, Pipe, wait
from typing import Any, NoReturn

from torch.distributed import Store, TCPStore

from espl_envs.core.errors import EsplError
from espl_train.learner.ranks import Place, RankLost

ARRIVAL = 300.0         # seconds in which every rank has to come
CERTAINTY = 2.0         # seconds in which a death is known after a collective has failed of it
LATE = 30.0             # seconds that rank 0 waits with its end for ranks that are still starting
PATIENCE = 5.0          # seconds in which rank 0 has to react to a death; then the process ends
KEY = "espl/channel"
ALARM = signal.SIGUSR1


def store_of(place: Place) -> Store:
    """The key-value store that all ranks of the run see."""
    return TCPStore(
        place.host, place.port, place.size, is_master=place.rank == 0 and not place.hosted,
        timeout=timedelta(seconds=ARRIVAL), wait_for_workers=False, multi_tenant=True,
    )


class Leader:
    """Rank 0's end. `card` says who this process is; `cards` what the others said. Made in the main thread.

    From here on the death of a rank raises RankLost in the main thread, wherever that is; `abort` is called where it
    does not react because it waits in a collective that has no end.
    """

    def __init__(self, place: Place, store: Store, card: dict[str, Any]) -> None:
        self.cards = {0: card}
        self.lost: RankLost | None = None
        self.abort: Callable[[], None] = lambda: None
        self._size = place.size
        self._connections: dict[int, Connection] = {}
        self._values: dict[int, queue.Queue[Any]] = {rank: queue.Queue() for rank in range(1, place.size)}
        self._arrived, self._known, self._told = threading.Event(), threading.Event(), threading.Event()
        self._ending, self._end = Pipe(duplex=False)
        secret = secrets.token_bytes(32)
        self._listener = Listener(("127.0.0.1" if place.one_machine else "", 0), backlog=place.size, authkey=secret)
        self._before = signal.signal(ALARM, self._interrupted)
        host = "127.0.0.1" if place.one_machine else place.host
        store.set(KEY, json.dumps((host, self._listener.address[1], secret.hex())))
        self._thread = threading.Thread(target=self._watch, name="espl-ranks", daemon=True)
        self._thread.start()

    def arrived(self) -> dict[int, dict[str, Any]]:
        """The card of every rank, once all are there. Raises EsplError where some do not come."""
        if not self._arrived.wait(ARRIVAL):
            missing = sorted(set(range(self._size)) - set(self.cards))
            raise EsplError(f"of {self._size} ranks {missing} did not come within {ARRIVAL:g} s: look at their output")
        return self.cards

    def order(self, name: str, payloads: Sequence[Any] | None = None) -> None:
        """Tell every follower what to do, with its own entry of `payloads` (by rank)."""
        for rank, connection in sorted(self._connections.items()):
            self._send(rank, connection, (name, payloads[rank] if payloads else None))

    def exchange(self, value: Any, timeout: float | None = None) -> list[Any]:
        """The value of every rank, by rank, on every rank."""
        values = [value]
        for rank, inbox in self._values.items():
            try:
                values.append(inbox.get(timeout=timeout))
            except queue.Empty:
                raise EsplError(f"{self._name(rank)} did not answer within {timeout:g} s") from None
        for rank, connection in sorted(self._connections.items()):
            self._send(rank, connection, values)
        return values

    def explain(self, error: RuntimeError) -> None:
        """A collective failed: raises RankLost where that is because a rank died."""
        if self._known.wait(CERTAINTY):
            self._tell(error)

    def cause(self, stop: KeyboardInterrupt) -> KeyboardInterrupt:
        """What ended the run: torchrun stops rank 0 as soon as it sees that another rank has died."""
        if not isinstance(stop, RankLost):
            self._known.wait(CERTAINTY / 4)
        return self.lost or stop

    def close(self) -> None:
        """Hang up, which ends the followers; those still on their way are waited for, so that they see it."""
        self._told.set()
        if self._arrived.wait(LATE):
            self._end.close()
            self._thread.join()
            for connection in self._connections.values():
                connection.close()
        signal.signal(ALARM, self._before)

    def _send(self, rank: int, connection: Connection, message: Any) -> None:
        try:
            connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
        except OSError as error:
            self._known.wait(CERTAINTY)
            self._lose(rank, "its connection broke")
            self._tell(error)

    def _watch(self) -> None:
        """The thread: let the followers in, then hear what they say and when they fall silent."""
        with self._listener:
            while len(self._connections) < self._size - 1:
                self._admit()
        self._arrived.set()
        ranks = {connection: rank for rank, connection in self._connections.items()}
        while True:
            for end in wait([self._ending, *ranks]):
                if not isinstance(end, Connection) or end not in ranks:
                    return
                try:
                    kind, value = pickle.loads(end.recv_bytes())
                except (EOFError, OSError):
                    self._alarm(ranks[end], "died without a word (killed, or out of memory?)")
                    return
                if kind == "failed":
                    self._alarm(ranks[end], *value)
                    return
                self._values[ranks[end]].put(value)

    def _admit(self) -> None:
        """Let in the next that knows the secret."""
        try:
            connection = self._listener.accept()
            card = pickle.loads(connection.recv_bytes())
        except (AuthenticationError, EOFError, OSError):
            return                           # a stranger, or somebody who left again: no rank
        _tune(connection)
        self.cards[card["rank"]] = card
        self._connections[card["rank"]] = connection

    def _alarm(self, rank: int, why: str, details: str = "") -> None:
        """Wake the main thread with RankLost; end the process where it hangs in something without an end."""
        self._lose(rank, why, details)
        if self._told.is_set():
            return
        signal.pthread_kill(threading.main_thread().ident or 0, ALARM)
        if self._told.wait(PATIENCE):
            return
        self.abort()
        if not self._told.wait(PATIENCE):
            print(f"espl-train: {self.lost}", file=sys.stderr, flush=True)
            os._exit(1)

    def _lose(self, rank: int, why: str, details: str = "") -> None:
        if self.lost is None:
            self.lost = RankLost(f"{self._name(rank)} {why}", details)
        self._known.set()

    def _interrupted(self, *_: object) -> None:
        if not self._told.is_set():
            self._tell(None)

    def _tell(self, error: Exception | None) -> NoReturn:
        """Raise in the main thread, once; what follows must not be cut short by torchrun, which stops all ranks now."""
        self._told.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        assert self.lost is not None
        raise self.lost from error

    def _name(self, rank: int) -> str:
        card = self.cards.get(rank, {})
        return f"rank {rank} ({card.get('host', 'unknown machine')}, process {card.get('pid', '?')})"


class Follower:
    """Another rank's end. When rank 0 is gone this process ends, whatever it is doing."""

    def __init__(self, store: Store, card: dict[str, Any]) -> None:
        host, port, secret = json.loads(store.get(KEY))
        self._connection = Client((host, port), authkey=bytes.fromhex(secret))
        self._connection.send_bytes(pickle.dumps(card))
        _tune(self._connection)
        self._inbox: queue.Queue[Any] = queue.Queue()
        self._code = 0                           # that this process ends with when rank 0 is gone
        threading.Thread(target=self._watch, name="espl-ranks", daemon=True).start()

    def orders(self) -> Iterator[tuple[str, Any]]:
        """What rank 0 wants, one after another; there is no last one."""
        while True:
            yield self._inbox.get()

    def order(self, name: str, payloads: Sequence[Any] | None = None) -> None:
        """Followers give no orders: they come here because they follow one."""

    def exchange(self, value: Any, timeout: float | None = None) -> list[Any]:
        """The value of every rank, by rank, on every rank."""
        del timeout
        self._connection.send_bytes(pickle.dumps(("value", value), pickle.HIGHEST_PROTOCOL))
        values: list[Any] = self._inbox.get()
        return values

    def explain(self, error: RuntimeError) -> None:
        """A collective failed, most likely because another rank is gone: then rank 0 ends this process soon."""
        del error
        threading.Event().wait(CERTAINTY + PATIENCE)

    def failed(self, error: BaseException) -> None:
        """Tell rank 0 why this rank ends. What the user can put right needs no traceback."""
        said = (str(error).strip().splitlines() or [""])[0]
        expected = isinstance(error, EsplError)
        sentence = f"failed: {error}" if expected else f"failed: {type(error).__name__}: {said}".removesuffix(": ")
        details = "" if expected else "".join(traceback.format_exception(error))
        self._code = 1
        with contextlib.suppress(OSError):
            self._connection.send_bytes(pickle.dumps(("failed", (sentence, details))))

    def _watch(self) -> None:
        while True:
            try:
                self._inbox.put(pickle.loads(self._connection.recv_bytes()))
            except (EOFError, OSError):
                os._exit(self._code)         # rank 0 has ended, and it alone says why


def _tune(connection: Connection) -> None:
    """Small messages go at once; a machine that lost its power is noticed within a minute."""
    with socket.socket(fileno=os.dup(connection.fileno())) as line:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
