"""Builds while everything goes wrong: nothing may be lost.

    tests/chaos [--seed 1] [--derivations 400] [--engine host] [--builders host] [--stock]

Three nix-build processes build a graph of derivations each on four builders of two
slots. Meanwhile builders lose power and come back, cables are pulled, sshds restart,
disks fill up, hooks are killed, and garbage is collected all the time; one sshd allows
one session for each connection, and the machines file also lists an address where
nobody is and one that refuses. A nix-build one of whose hooks was killed may fail, and
is run again, as one does; no other may. At the end everything is checked, and a table
is printed. With --stock, Nix's own hook must go through the same, without the killing
of hooks, for at most ten minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from lab import Host, Inside, Lab, connect, engine, is_taken, poll

HOOK = Path(__file__).resolve().parent.parent / "nix_build_remote.py"
INSTALLED = "/usr/local/bin/nix_build_remote.py"
CLIENTS, BUILDERS, SLOTS = 3, 4, 2
TOLERANCE_S = 30  # for a build that lost its session to end
GIVE_UP_S = 600

# Every derivation reads two earlier ones, and notes down what else runs on its machine.
GRAPH = """
let
  make = n: derivation {
    name = "d-%(tag)s-${toString n}"; system = builtins.currentSystem;
    builder = "/bin/sh"; PATH = "/usr/bin:/bin"; inherit tag;
    inputs = if n < 6 then [ ] else [ (at (n - 1 - mod (n * 31) 5)) (at (mod (n * 17) n)) ];
    args = [ "-ec" ''
      mkdir -p /tmp/running
      echo $$ > /tmp/running/$name
      alive=0
      for file in /tmp/running/*; do
        read -r pid < $file && kill -0 $pid 2> /dev/null && alive=$((alive + 1)) || :
      done
      echo "$(date +%%s) $alive" >> /tmp/counts
      sleep 0.$((${toString n} * 37 %% 5))
      cksum $inputs > $out < /dev/null
      echo ${toString n} >> $out
      rm -f /tmp/running/$name
    '' ];
  };
  mod = a: b: a - a / b * b;
  tag = "%(tag)s";
  all = builtins.genList make %(count)s;
  at = builtins.elemAt all;
in all
"""


class Trouble(NamedTuple):
    """Something that went wrong on a machine, for some time."""

    what: str
    host: str
    begin: float
    end: float


class Client:
    """One nix-build, run again if a hook of it was killed."""

    def __init__(self, chaos: Chaos, tag: str) -> None:
        self.chaos, self.tag = chaos, tag
        self.runs = 0
        self.log = ""
        self.process: Inside | None = None
        self.outputs: list[str] = []
        self.failed = False

    def start(self) -> None:
        self.runs += 1
        client = self.chaos.client
        path = f"/tmp/{self.tag}.nix"
        client.write(path, GRAPH % {"tag": self.tag, "count": self.chaos.count})
        command = ["nix-build", path, "--no-out-link", "--max-jobs", "0"]
        command += ["--option", "build-poll-interval", "1"]
        if self.chaos.ours:
            command += ["--option", "build-hook", INSTALLED]
        self.file = client.path(f"/tmp/{self.tag}-{self.runs}.log")
        with self.file.open("w") as log:
            self.process = client.popen(*command, stdout=subprocess.PIPE, stderr=log)

    def look(self) -> bool:
        """Whether it is still at work."""
        if not self.process or self.process.poll() is None:
            return self.process is not None
        out, _ = self.process.communicate()
        self.log += self.file.read_text(errors="replace")
        self.outputs = out.decode().split()
        killed = self.tag in self.chaos.killed
        self.chaos.killed.discard(self.tag)
        if self.process.returncode == 0:
            self.process = None
        elif killed and self.runs < 50:
            self.start()
        else:
            self.failed, self.process = True, None
        return self.process is not None


class Chaos:
    """A client, its builders, and what happens to them."""

    def __init__(self, lab: Lab, options: argparse.Namespace, ours: bool) -> None:
        self.ours, self.count = ours, options.derivations
        self.random = random.Random(options.seed)
        self.troubles: list[Trouble] = []
        self.killed: set[str] = set()
        self.kills = 0
        self.over = threading.Event()
        self.builders = [
            lab.host(f"b{number}", engine(options.builders))
            for number in range(BUILDERS)
        ]
        self.client = lab.host("client", engine(options.engine))
        self.local = lab.host("local", engine(options.engine))
        refusing = lab.host("refusing", engine(options.builders))
        self.client.copy(HOOK, INSTALLED)
        for builder in self.builders:
            builder.run("mkdir", "-p", "/nix")
            builder.run("mount", "-t", "tmpfs", "-o", "size=96m", "nix", "/nix")
            connect(self.client, builder)
        connect(self.client, refusing)
        refusing.stop_sshd()
        for host in (self.client, self.local, *self.builders):
            host.run("nix-store", "--init")
        self.one_session_only(self.builders[-1])
        lines = [f"{builder.name} - - {SLOTS}\n" for builder in self.builders]
        lines += ["refusing - - 2\n", "10.77.200.200 - - 2\n"]
        self.client.write("/etc/nix/machines", "".join(lines))
        self.clients = [Client(self, f"c{number}") for number in range(CLIENTS)]

    def one_session_only(self, builder: Host) -> None:
        plain = builder.read("/etc/ssh/sshd_config")
        builder.write("/etc/ssh/sshd_config", f"MaxSessions 1\n{plain}")
        builder.restart_sshd()

    # what goes wrong

    @contextlib.contextmanager
    def trouble(self, what: str, builder: Host) -> Iterator[None]:
        begin = time.time()
        try:
            yield
        finally:
            found = Trouble(what, builder.name, begin, time.time())
            self.troubles.append(found)

    def lose_power(self, builder: Host) -> None:
        """Nobody is told; and all that ran there is gone when it is back."""
        with self.trouble("power lost", builder):
            builder.link(False)
            pids = [process.pid for process in builder.processes() if process.pid > 1]
            builder.signal(signal.SIGKILL, *pids)
            builder.path("/run/sshd.pid").unlink(missing_ok=True)
            self.over.wait(self.random.uniform(1, 5))
            builder.link(True)
            builder.start_sshd()

    def pull_cable(self, builder: Host) -> None:
        with self.trouble("cable pulled", builder):
            builder.link(False)
            self.over.wait(self.random.choice([1, 3, 60]))
            builder.link(True)

    def restart_sshd(self, builder: Host) -> None:
        with self.trouble("sshd restarted", builder):
            builder.stop_sshd(sessions=True)
            self.over.wait(self.random.uniform(0, 2))
            builder.start_sshd()

    def fill_disk(self, builder: Host) -> None:
        with self.trouble("disk full", builder):
            fill = "dd if=/dev/zero of=/nix/full bs=64k 2> /dev/null"
            builder.run("sh", "-c", fill, check=False)
            self.over.wait(self.random.uniform(2, 6))
            builder.run("rm", "-f", "/nix/full")

    def kill_hook(self, builder: Host) -> None:
        """Any one, whatever it does; its nix-build may fail then."""
        with self.trouble("hook killed", builder):
            hooks = [
                process.pid
                for process in self.client.processes()
                if re.fullmatch(rf"(?s)\S*python.* {INSTALLED} \d+", process.cmdline)
            ]
            if hooks:
                victim = self.random.choice(hooks)
                with contextlib.suppress(OSError):
                    parent = re.findall(
                        r"PPid:\s*(\d+)", self.client.read(f"/proc/{victim}/status")
                    )[0]
                    line = self.client.read(f"/proc/{parent}/cmdline").split("\0")
                    self.killed.add(Path(line[1]).stem)
                    self.client.signal(signal.SIGKILL, victim)
                    self.kills += 1

    def go_wrong(self) -> None:
        """One thing after another on each builder, until it is over."""
        kinds: list[Callable[[Host], None]] = [
            self.lose_power,
            self.pull_cable,
            self.restart_sshd,
            self.fill_disk,
        ]
        if self.ours:
            kinds.append(self.kill_hook)
        while not self.over.wait(self.random.uniform(0.5, 2)):
            # The last machine is spared, or all might be away all the time.
            builder = self.random.choice(self.builders[:-1])
            self.random.choice(kinds)(builder)

    def collect_garbage(self, builder: Host) -> None:
        while not self.over.wait(1):
            builder.run("nix-store", "--gc", check=False)

    # the run

    def run(self) -> float:
        start = time.monotonic()
        threads = [threading.Thread(target=self.go_wrong) for _ in range(2)]
        threads += [
            threading.Thread(target=self.collect_garbage, args=(builder,))
            for builder in self.builders
        ]
        for client in self.clients:
            client.start()
        for thread in threads:
            thread.start()
        try:
            while sum(client.look() for client in self.clients):
                time.sleep(0.2)
                if time.monotonic() > start + GIVE_UP_S:
                    break
            return time.monotonic() - start
        finally:
            self.over.set()
            for thread in threads:
                thread.join()
            for client in self.clients:
                if client.process:
                    client.process.kill()

    # what must be true afterwards

    def verdict(self) -> dict[str, str]:
        good = [client for client in self.clients if client.outputs]
        return {
            "clients that succeeded": f"{len(good)} of {CLIENTS}",
            "the last words of others": " ".join(
                client.log[-1000:] for client in self.clients if client not in good
            ),
            "runs of nix-build": str(sum(client.runs for client in self.clients)),
            "hooks killed": str(self.kills),
            "outputs that are wrong": str(sum(map(self.wrong, good))),
            "stores that are damaged": str(
                sum(map(damaged, (self.client, *self.builders)))
            ),
            "machines with more builds than slots": str(
                sum(map(self.too_many, self.builders))
            ),
            "locks and processes left": " ".join(self.left()) or "none",
        }

    def wrong(self, client: Client) -> int:
        path = f"/tmp/{client.tag}.nix"
        self.local.write(path, GRAPH % {"tag": client.tag, "count": self.count})
        command = ["nix-build", path, "--no-out-link", "--max-jobs", "8"]
        done = self.local.run(*command, timeout=GIVE_UP_S)
        expected = done.stdout.split()
        if expected != client.outputs:
            return len(expected)
        return sum(digest(self.local, p) != digest(self.client, p) for p in expected)

    def too_many(self, builder: Host) -> bool:
        """Not counting what ran on when its session had just been lost."""
        path = builder.path("/tmp/counts")
        text = path.read_text() if path.exists() else ""
        samples = (line.split() for line in text.splitlines())
        return any(
            int(count) > SLOTS
            and not any(
                trouble.host == builder.name or trouble.what == "hook killed"
                for trouble in self.troubles
                if trouble.begin - 1 <= int(when) <= trouble.end + TOLERANCE_S
            )
            for when, count in samples
        )

    def left(self) -> list[str]:
        with contextlib.suppress(Exception):
            poll(lambda: not self.busy(), "the end")
        directory = self.client.path("/nix/var/nix/current-load")
        locks = [path for path in directory.rglob("*") if path.is_file()]
        return [*self.busy(), *(path.name for path in locks if is_taken(path))]

    def busy(self) -> list[str]:
        may_stay = re.compile(r"sshd|-oControlPersist=|\[mux\]|sleep|/bin/sh -ec")
        return [
            f"{host.name}: {process.cmdline[:40]}"
            for host in (self.client, *self.builders)
            for process in host.processes()
            if not may_stay.search(process.cmdline)
        ]


def digest(host: Host, path: str) -> str:
    return host.run("nix-hash", "--type", "sha256", path).stdout


def damaged(host: Host) -> bool:
    done = host.run("nix-store", "--verify", "--check-contents", check=False)
    return bool(done.returncode or "error" in done.stderr)


def report(options: argparse.Namespace, ours: bool) -> tuple[bool, dict[str, str]]:
    with Lab() as lab:
        chaos = Chaos(lab, options, ours)
        seconds = chaos.run()
        verdict = chaos.verdict()
        kinds = sorted({trouble.what for trouble in chaos.troubles})
        counts = {
            kind: str(sum(trouble.what == kind for trouble in chaos.troubles))
            for kind in kinds
        }
        if options.logs:
            for client in chaos.clients:
                Path(options.logs).mkdir(parents=True, exist_ok=True)
                Path(options.logs, f"{client.tag}-{ours}.log").write_text(client.log)
    good = {
        "clients that succeeded": f"{CLIENTS} of {CLIENTS}",
        "outputs that are wrong": "0",
        "stores that are damaged": "0",
        "machines with more builds than slots": "0",
        "locks and processes left": "none",
    }
    passed = all(verdict[name] == value for name, value in good.items())
    return passed, {"seconds": f"{seconds:.0f}", **counts, **verdict}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--derivations", type=int, default=400)
    parser.add_argument("--engine", default="host", help="the client's Nix")
    parser.add_argument("--builders", default="host", help="the builders' Nix")
    parser.add_argument("--stock", action="store_true", help="Nix's own hook too")
    parser.add_argument("--logs", default="", help="directory for the clients' logs")
    options = parser.parse_args()
    passed, ours = report(options, True)
    stock = report(options, False)[1] if options.stock else {}
    print(
        f"| seed {options.seed}, {options.derivations} derivations each | ours | Nix's own |"
    )
    print("|---|--:|--:|")
    for name in {**ours, **stock}:
        print(f"| {name} | {ours.get(name, '-')} | {stock.get(name, '-')} |")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
