#!/usr/bin/env python3
"""Relay to HOST:PORT with a round trip MILLISECONDS longer than the network's own.

    ssh -o ProxyCommand="delay.py %h %p 50" HOST

Each direction is late by half of it, connecting by the whole, as on a long line. Only
late, not slow: as much as comes in may be under way at once.
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


class Direction:
    """One way: what came from `source` goes to `sink` `late` seconds after."""

    def __init__(self, source: int, sink: int, late: float) -> None:
        self.source = source
        self.sink = sink
        self.late = late
        self.ended = False
        self.held = 0
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
        self.queue.append((time.monotonic() + self.late, memoryview(chunk)))

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
    if len(args) != 3:
        print("usage: delay.py HOST PORT MILLISECONDS", file=sys.stderr)
        return 2
    seconds = float(args[2]) / 1000
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
    relay([there, back])
    return 0


if __name__ == "__main__":
    sys.exit(main())
