#!/usr/bin/env python3
"""Relay to HOST:PORT with a round trip MILLISECONDS longer than the network's own.

    ssh -o ProxyCommand="delay.py %h %p 50" HOST

Each direction is late by half of it, connecting by the whole, as on a long line. Only
late, not slow: as much as comes in may be under way at once.

    ssh -o ProxyCommand="delay.py %h %p turns FILE" HOST

counts round trips instead, while FILE exists: what the server says is held back until
both have been silent for a while, in which all processes here have slept, and then
arrives at once. If the client has said something since the last time, that was a round
trip, and FILE gets a line: the time, and how many bytes the client and the server have
said. So nothing depends on how fast they are, and what the client does not wait for
counts for nothing.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time
from collections import deque

CHUNK_BYTES = 256 * 1024
# More than a fast line holds in a quarter of a second; only a sink that is stuck
# fills it, and then the source has to wait, as TCP would make it.
UNDER_WAY_BYTES = 256 * 1024 * 1024
# For the client to say all that it can say without an answer. Longer only takes longer.
# In several looks, so that there are some also if we, as all others, stood still meanwhile.
LOOKS, LOOK_S = 10, 0.05


class Direction:
    """One way: what came from `source` goes to `sink` `late` seconds after."""

    def __init__(self, source: int, sink: int, late: float) -> None:
        self.source = source
        self.sink = sink
        self.late = late
        self.ended = False
        self.held = 0
        self.taken = 0  # bytes, in all
        self.last = 0.0  # when something came
        self.queue: deque[tuple[float, memoryview]] = deque()

    def accepts(self) -> bool:
        return not self.ended and self.held < UNDER_WAY_BYTES

    def due_in(self) -> float | None:
        """Seconds until the next chunk is due, 0 if it is; None if there is none."""
        if not self.queue:
            return None
        return max(0.0, self.queue[0][0] - time.monotonic())

    def take(self) -> None:
        """Read what the source has; a lost connection is an end like any other."""
        try:
            chunk = os.read(self.source, CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        self.ended = not chunk
        self.held += len(chunk)
        self.taken += len(chunk)
        self.last = time.monotonic()
        self.queue.append((self.last + self.late, memoryview(chunk)))

    def give(self) -> bool:
        """Write what is due; True when the end has arrived, or nobody wants it."""
        when, chunk = self.queue.popleft()
        if not chunk:
            return True
        try:
            sent = os.write(self.sink, chunk)
        except BlockingIOError:
            sent = 0
        except OSError:
            return True
        self.held -= sent
        if sent < len(chunk):
            self.queue.appendleft((when, chunk[sent:]))
        return False


class Answers(Direction):
    """The way back, while round trips are counted."""

    def __init__(self, source: int, sink: int, there: Direction, notes: str) -> None:
        super().__init__(source, sink, 0)
        self.there = there
        self.notes = notes
        self.known = (0, 0)  # bytes that had come there and back at the last turn
        self.free = 0  # bytes that may go: what was held when there was silence
        self.looks = 0  # that have found silence, one after another
        self.looked = 0.0  # when we last looked

    def due_in(self) -> float | None:
        if self.queue and not self.free:
            counts = os.path.exists(self.notes)
            if counts and not self.is_silent():
                return LOOK_S
            self.looks, self.free = 0, self.held
            self.turn(counts)
        return 0.0 if self.queue else None

    def is_silent(self) -> bool:
        """Whether enough looks, this being one if it is time for it, have found silence."""
        now = time.monotonic()
        if now >= self.looked + LOOK_S:
            is_new = max(self.last, self.there.last) > self.looked
            self.looks = 0 if is_new or somebody_works() else self.looks + 1
            self.looked = now
        return self.looks >= LOOKS

    def give(self) -> bool:
        before = self.held
        ended = super().give()
        self.free -= before - self.held
        return ended

    def turn(self, counts: bool) -> None:
        """Note a round trip, if what is held answers anything."""
        asked, answered = self.there.taken - self.known[0], self.taken - self.known[1]
        if asked:
            self.known = (self.there.taken, self.taken)
        if asked and counts:
            with open(self.notes, "a") as file:
                file.write(f"{time.time():.3f} {asked} {answered}\n")


def somebody_works() -> bool:
    """Whether another process here runs, or would if it could."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                state = file.read().rpartition(b")")[2].split()[0]
        except OSError:  # it has just ended
            continue
        if state in (b"R", b"D") and int(name) != os.getpid():
            return True
    return False


def relay(ways: list[Direction]) -> None:
    """Carry both ways until one has ended and delivered everything."""
    while True:
        readable = [way.source for way in ways if way.accepts()]
        dues = [(way.sink, due) for way in ways if (due := way.due_in()) is not None]
        writable = [sink for sink, due in dues if due == 0]
        wait = min((due for _, due in dues if due > 0), default=None)
        got, free, _ = select.select(readable, writable, [], wait)
        for way in ways:
            if way.source in got:
                way.take()
            if way.sink in free and way.give():
                return


def main(argv: list[str] | None = None) -> int:
    args = sys.argv[1:] if argv is None else argv
    notes = args[3] if len(args) == 4 and args[2] == "turns" else ""
    if len(args) != 3 and not notes:
        print("usage: delay.py HOST PORT MILLISECONDS|turns FILE", file=sys.stderr)
        return 2
    seconds = 0 if notes else float(args[2]) / 1000
    try:
        peer = socket.create_connection((args[0], int(args[1])))
    except OSError as error:
        print(f"delay.py: {args[0]} port {args[1]}: {error}", file=sys.stderr)
        return 1
    time.sleep(seconds)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for fd in (0, 1, peer.fileno()):
        os.set_blocking(fd, False)
    there = Direction(0, peer.fileno(), seconds / 2)
    back = Direction(peer.fileno(), 1, seconds / 2)
    if notes:
        back = Answers(peer.fileno(), 1, there, notes)
    relay([there, back])
    return 0


if __name__ == "__main__":
    sys.exit(main())
