"""Bring up two builders and a client, build a small graph, and say who built what."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from lab import Host, Lab, connect, engine, unavailable

HOOK = Path(__file__).resolve().parent.parent / "nix_build_remote.py"
MACHINES = """\
# host      systems       sshKey  maxJobs  speedFactor
builder-1   x86_64-linux  -       2        1
builder-2   x86_64-linux  -       2        2
"""
# Three libraries, two programs that use them, one collection of both.
GRAPH = """
let
  build = name: inputs: derivation {
    inherit name inputs;
    system = "x86_64-linux";
    PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    builder = "/bin/sh";
    args = [ "-c" "sleep 1; cat $inputs /dev/null > $out; echo $name: $(uname -n) >> $out" ];
  };
  library = name: build "lib${name}" [ ];
  server = build "server" (map library [ "net" "log" ]);
  client = build "client" (map library [ "ui" "log" "net" ]);
in build "suite" [ server client ]
"""


def main() -> int:
    reason = unavailable()
    if reason:
        print(reason, file=sys.stderr)
        return 1
    with Lab() as lab:
        names = ("builder-1", "builder-2", "client")
        *builders, client = (lab.host(name, engine("host")) for name in names)
        for builder in builders:
            connect(client, builder)
        print(f"Nix {client.engine.version} here and on two builders:\n\n{MACHINES}")
        return build(client)


def build(client: Host) -> int:
    """One nix-build that may build nothing itself; its last output names all builders."""
    client.copy(HOOK, "/usr/local/lib/nix_build_remote.py")
    client.write("/etc/nix/machines", MACHINES.replace("x86_64-linux", system(client)))
    client.write("/tmp/suite.nix", GRAPH.replace("x86_64-linux", system(client)))
    command = (
        "nix-build",
        "/tmp/suite.nix",
        "--no-out-link",
        "--max-jobs",
        "0",
        "--option",
        "build-hook",
        "/usr/local/lib/nix_build_remote.py",
    )
    print("$", *command, flush=True)
    start = time.monotonic()
    done = client.run(*command, check=False, timeout=120)
    seconds = time.monotonic() - start
    print(done.stderr)
    if done.returncode:
        return done.returncode
    built = dict(
        line.split(": ") for line in client.read(done.stdout.strip()).splitlines()
    )
    for name, host in built.items():
        print(f"{name:10} was built on {host}")
    print(f"\n{len(built)} derivations of 1 s each in {seconds:.1f} s")
    return 0


def system(client: Host) -> str:
    expression = "builtins.currentSystem"
    return client.run("nix-instantiate", "--eval", "-E", expression).stdout.strip(
        ' "\n'
    )


if __name__ == "__main__":
    sys.exit(main())
