#!/usr/bin/env python3
"""Play nix-copy-closure of Nix 1.x, a Perl script, with the real nix-store behind it.

    nix-copy-closure [--to] [--use-substitutes] HOST PATH...

It starts its ssh through a shell, asks once what is there, and sends the rest by the
command ImportPaths; it takes --version for a host. To fetch, it would ask for
ExportPaths, which builders from 2.32 on do not know: nobody is to call it so.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys

STORE = "/usr/bin/nix-store"


def integers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def strings(values: list[str]) -> bytes:
    encoded = [value.encode() for value in values]
    padded = [integers(len(e)) + e + bytes(-len(e) % 8) for e in encoded]
    return integers(len(values)) + b"".join(padded)


def main() -> None:
    substitute = "--use-substitutes" in sys.argv
    words = [w for w in sys.argv[1:] if w not in ("--to", "--use-substitutes")]
    if words[:1] == ["--version"] or "--from" in words:
        sys.exit(f"unable to connect to ‘{words[0]}’")
    host, *paths = words
    query = [STORE, "-qR", *paths]
    closure = list(dict.fromkeys(subprocess.check_output(query, text=True).split()))
    options = os.environ.get("NIX_SSHOPTS", "")
    command = f"exec ssh -x -a {host} {options} nix-store --serve --write "
    ssh = subprocess.Popen(  # as Perl does, with all that we have inherited
        command,
        shell=True,
        close_fds=False,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    assert ssh.stdin and ssh.stdout
    to, hears = ssh.stdin, ssh.stdout

    def number() -> int:
        data = b""
        while len(data) < 8:
            more = hears.read(8 - len(data))
            if not more:
                sys.exit("got EOF while expecting 8 bytes from remote side")
            data += more
        return int(struct.unpack("<Q", data)[0])

    def string() -> str:
        length, data = number(), b""
        while len(data) < length + -length % 8:
            data += hears.read(length + -length % 8 - len(data)) or sys.exit("got EOF")
        return data[:length].decode()

    to.write(integers(0x390C9DEB, 0x200))
    if number() != 0x5452EECB or not 0x200 <= number() < 0x300:
        sys.exit("did not get valid handshake from remote host")
    to.write(integers(1, 1, int(substitute)) + strings(closure))
    there = {string() for _ in range(number())}
    missing = [path for path in closure if path not in there]
    if not missing:
        return
    print(f"copying {len(missing)} missing paths to ‘{host}’...", file=sys.stderr)
    to.write(integers(4))
    subprocess.run([STORE, "--export", *missing], stdout=to, check=True)
    if number() != 1:
        sys.exit(f"remote machine ‘{host}’ failed to import closure")


if __name__ == "__main__":
    main()
