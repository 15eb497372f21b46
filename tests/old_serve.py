#!/usr/bin/env python3
"""Play `nix-store` of Nix 1.11 on a builder, over the real one that is there.

With --serve it speaks protocol 2.2, as 1.11.17 does: it knows ImportPaths but not
AddToStoreNar, tells no hashes of paths, and only the status and the message of a build.
What it is asked it asks the real one, in that one's dialect.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from typing import BinaryIO

REAL = "/usr/bin/nix-store"
VERSION = 0x202
EXPORT_MAGIC = 0x4558494E


def pack(*numbers: int) -> bytes:
    return b"".join(struct.pack("<Q", number) for number in numbers)


class Peer:
    """One of the two that we talk with."""

    def __init__(self, hears: BinaryIO, says: BinaryIO) -> None:
        self.hears, self.says = hears, says

    def read(self, count: int) -> bytes:
        data = self.hears.read(count)
        if len(data) < count:
            sys.exit(0)
        return data

    def number(self) -> int:
        return int(struct.unpack("<Q", self.read(8))[0])

    def string(self) -> bytes:
        """As it is on the wire."""
        head = self.read(8)
        length = int(struct.unpack("<Q", head)[0])
        return head + self.read(length + -length % 8)

    def strings(self, each: int = 1) -> bytes:
        count = self.number()
        return pack(count) + b"".join(self.string() for _ in range(each * count))

    def say(self, *data: bytes) -> None:
        self.says.write(b"".join(data))
        self.says.flush()

    def archive(self) -> bytes:
        """One NAR; what follows `contents`, `target` and `name` is data."""
        found, depth, word = [], 0, b""
        while depth or word != b")":
            found.append(self.string())
            if word in (b"contents", b"target", b"name"):
                word = b""
                continue
            length = struct.unpack("<Q", found[-1][:8])[0]
            word = found[-1][8 : 8 + length]
            depth += {b"(": 1, b")": -1}.get(word, 0)
        return b"".join(found)


class Builder:
    def __init__(self, client: Peer) -> None:
        command = [REAL, "--serve", "--write"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen(command, **pipes)  # type: ignore[call-overload]
        self.client, self.real = client, Peer(process.stdout, process.stdin)
        self.real.say(pack(0x390C9DEB, 0x207))
        self.real.number()
        self.spoken = min(0x207, self.real.number())
        self.client.read(16)
        self.client.say(pack(0x5452EECB, VERSION))

    def answer(self, command: int) -> None:
        client, real = self.client, self.real
        if command == 1:
            real.say(pack(command), client.read(16), client.strings())
            client.say(real.strings())
        elif command == 2:
            real.say(pack(command), client.strings())
            self.tell_infos()
        elif command == 3:
            path = client.string()[8:].rstrip(b"\0")
            real_dump = [REAL.encode(), b"--dump", path]
            client.say(subprocess.check_output(real_dump))
        elif command == 4:
            self.import_paths()
        elif command == 6:
            real.say(pack(command), client.strings(), self.options())
            status = real.number()
            client.say(pack(status), real.string() if status else b"")
        elif command == 7:
            real.say(pack(command), client.read(8), client.strings())
            client.say(real.strings())
        elif command == 8:
            self.build()
        else:
            sys.exit(f"error: unknown serve command {command}")

    def tell_infos(self) -> None:
        while (path := self.real.string()) != pack(0):
            known = self.real.string() + self.real.strings() + self.real.read(16)
            self.client.say(path, known)
            if self.spoken >= 0x204:
                self.real.string(), self.real.string(), self.real.strings()
        self.client.say(pack(0))

    def import_paths(self) -> None:
        data = []
        while self.client.number() == 1:
            data += [pack(1), self.client.archive(), self.client.read(8)]
            assert data[-1] == pack(EXPORT_MAGIC)
            data += [self.client.string(), self.client.strings(), self.client.string()]
            assert self.client.number() == 0
            data.append(pack(0))
        whole = b"".join(data) + pack(0)
        command = [REAL, "--import"]
        done = subprocess.run(command, check=False, input=whole, stdout=sys.stderr)
        if done.returncode:
            sys.exit(1)  # it has said why
        self.client.say(pack(1))

    def options(self) -> bytes:
        """Of 2.2: silence, timeout, size of the log."""
        given, new = self.client.read(24), [0, 0] if self.spoken >= 0x203 else []
        return given + pack(*new, *([0] if self.spoken >= 0x207 else []))

    def build(self) -> None:
        client, real = self.client, self.real
        asked = [client.string(), client.strings(4), client.strings()]
        asked += [client.string(), client.string(), client.strings(), client.strings(2)]
        real.say(pack(8), *asked, self.options())
        client.say(pack(real.number()), real.string())
        if self.spoken >= 0x203:
            real.read(32)
        if self.spoken >= 0x206:
            real.strings(2)


if __name__ == "__main__":
    if "--serve" not in sys.argv:
        os.execv(REAL, [REAL, *sys.argv[1:]])
    builder = Builder(Peer(sys.stdin.buffer, sys.stdout.buffer))
    while True:
        builder.answer(builder.client.number())
