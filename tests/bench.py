"""How fast the hook is, beside Nix's own hook in the same run.

    tests/bench [--engines 2.8,2.34] [--runs 3] [--delays 0,50,200] [ROW...]
    tests/bench --machines FILE [--runs 3]

The first form brings up a farm (as root; `tests/engines` makes the engines) and prints
one table; rows are chosen by the words they begin with. The second needs neither: it
builds trivial derivations with the Nix of this machine on the builders that FILE lists,
which must let you in. Runs alternate between the two hooks; a ratio is that of the
medians, above 1 where ours is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from lab import Host, Lab, connect, engine

HERE = Path(__file__).resolve().parent
HOOK = HERE.parent / "nix_build_remote.py"
INSIDE = "/usr/local/lib/nix_build_remote.py"
SYSTEM = "x86_64-linux"
DELAYS_MS = [0, 50, 200]

TRIVIAL = """
builtins.genList (n: derivation {
  name = "job-%(tag)s-${toString n}"; system = "%(system)s"; builder = "/bin/sh";
  PATH = "/usr/bin:/bin"; args = [ "-c" "sleep %(sleep)s; echo > $out" ];
}) %(count)s
"""
CHAIN = """
let make = n: derivation {
  name = "link-%(tag)s-${toString n}"; system = "%(system)s"; builder = "/bin/sh";
  PATH = "/usr/bin:/bin"; args = [ "-c" "echo > $out" ];
  before = if n == 0 then "" else make (n - 1);
};
in make (%(count)s - 1)
"""


# One derivation that reads so many small files, which no builder has.
INPUTS = """
derivation {
  name = "reader-%(tag)s"; system = "%(system)s"; builder = "/bin/sh";
  PATH = "/usr/bin:/bin"; args = [ "-c" "echo > $out" ];
  inputs = builtins.genList
    (n: builtins.toFile "input-%(tag)s-${toString n}" (toString n)) %(count)s;
}
"""
# Derivations of 0.3 s, each of which reads up to six of the eight before it, and whose
# outputs of 200 KiB refer to those.
GRAPH = """
let
  modulo = a: b: a - a / b * b;
  pick = n: i: n - 1 - modulo (n * (7 + 4 * i) + 3 * i) (if n < 8 then n else 8);
  make = n: derivation {
    name = "node-%(tag)s-${toString n}"; system = "%(system)s"; builder = "/bin/sh";
    PATH = "/usr/bin:/bin";
    args = [ "-c" "sleep 0.3; { echo $before; head -c 204800 /dev/urandom; } > $out" ];
    before = if n == 0 then [] else
      map (i: builtins.elemAt nodes (pick n i)) (builtins.genList (i: i) (modulo n 7));
  };
  nodes = builtins.genList make %(count)s;
in nodes
"""


class Row(NamedTuple):
    name: str
    ours: float
    stock: float
    note: str = ""

    def text(self) -> str:
        ratio = f"{self.stock / self.ours:5.2f}" if self.stock else "    -"
        stock = f"{self.stock:8.3f}" if self.stock else "       -"
        return (
            f"| {self.name:58} | {self.ours:8.3f} | {stock} | {ratio} | {self.note} |"
        )


class Site:
    """A client and its builders on the farm, with one engine."""

    def __init__(self, lab: Lab, name: str, builders: int, delay_ms: int) -> None:
        self.count = 0
        self.name, self.delay_ms = name, delay_ms
        self.builders = [lab.host(f"b{n}", engine(name)) for n in range(builders)]
        self.client = lab.host("client", engine(name))
        for builder in self.builders:
            connect(self.client, builder)
        self.client.copy(HOOK, INSIDE)
        if delay_ms:
            self.client.copy(HERE / "delay.py", "/usr/local/lib/delay.py")
            command = f"/usr/bin/python3 /usr/local/lib/delay.py %h %p {delay_ms}"
            config = f"Host b*\n  ProxyCommand {command}\n"
            self.client.write("/root/.ssh/config", config, mode=0o600)

    def machines(self, slots: int, scheme: str = "") -> None:
        names = [f"{scheme}b{n}" for n in range(len(self.builders))]
        lines = [f"{name} {SYSTEM} - {slots}\n" for name in names]
        self.client.write("/etc/nix/machines", "".join(lines))

    def build(self, expression: str, ours: bool, **values: object) -> float:
        """Seconds that one nix-build takes, of something that was never built."""
        self.count += 1
        whole = {"system": SYSTEM, "tag": self.count, "sleep": 0, **values}
        self.client.write("/tmp/bench.nix", expression % whole)
        jobs = str(values.get("jobs", 0))
        command = ["nix-build", "/tmp/bench.nix", "--no-out-link", "--max-jobs", jobs]
        if ours:
            command += ["--option", "build-hook", INSIDE]
        start = time.monotonic()
        self.client.run(*command, timeout=600)
        return time.monotonic() - start

    def forget_connections(self) -> None:
        """End all masters, so that the next build starts cold."""
        for process in self.client.processes():
            if "[mux]" in process.cmdline or "ControlMaster=yes" in process.cmdline:
                self.client.signal(15, process.pid)

    def compare(
        self, runs: int, measure: Callable[[bool], float]
    ) -> tuple[float, float]:
        """Medians of ours and stock, in turn."""
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(runs):
            for ours in (True, False):
                times[ours].append(measure(ours))
        return statistics.median(times[True]), statistics.median(times[False])


@contextlib.contextmanager
def site(name: str, builders: int, delay_ms: int = 0) -> Iterator[Site]:
    with Lab() as lab:
        yield Site(lab, name, builders, delay_ms)


# -- Rows -----------------------------------------------------------------------------


def trivial(name: str, runs: int) -> Iterator[Row]:
    for delay_ms in DELAYS_MS:
        with site(name, 4, delay_ms) as where:
            where.machines(2)
            what = f"24 trivial, 4 builders x 2 slots, {delay_ms} ms"

            def measure(ours: bool, cold: bool = False) -> float:
                if cold and ours:  # so they are live when the warm runs begin
                    where.forget_connections()
                return where.build(TRIVIAL, ours, count=24)

            cold = where.compare(runs, lambda ours: measure(ours, cold=True))
            yield Row(f"{what}, cold", *cold)
            yield Row(f"{what}, warm", *where.compare(runs, measure))


def chain(name: str, runs: int) -> Iterator[Row]:
    with site(name, 4, 50) as where:
        where.machines(2)
        times = where.compare(runs, lambda ours: where.build(CHAIN, ours, count=10))
        yield Row("chain of 10, 50 ms", *times)


def inputs(name: str, runs: int) -> Iterator[Row]:
    """The connection is live, and the builder has none of the inputs; noted beside: Nix's
    own hook over ssh-ng://, which sends them all at once."""
    with site(name, 1, 50) as where:
        where.machines(2)
        where.build(TRIVIAL, True, count=1)
        for count in (100, 400):

            def measure(ours: bool, count: int = count) -> float:
                return where.build(INPUTS, ours, count=count)

            times = where.compare(runs, measure)
            where.machines(2, "ssh-ng://")
            other = statistics.median(measure(False) for _ in range(runs))
            where.machines(2)
            note = f"stock over ssh-ng: {other:.2f} s, {other / times[0]:.1f}"
            yield Row(f"{count} small inputs, 50 ms, warm", *times, note)


def graph(name: str, runs: int) -> Iterator[Row]:
    """80 derivations over 4 builders x 4 slots, cold; noted beside: 16 local jobs."""
    for delay_ms in (0, 10, 50):
        with site(name, 4, delay_ms) as where:
            where.machines(4)

            def measure(ours: bool) -> float:
                where.forget_connections()
                return where.build(GRAPH, ours, count=80)

            times = where.compare(runs, measure)
            where.client.write("/etc/nix/machines", "")
            here = where.build(GRAPH, True, count=80, jobs=16)
            note = f"16 local jobs: {here:.1f} s"
            yield Row(
                f"graph of 80 of 0.3 s, 4 x 4 slots, {delay_ms} ms, cold", *times, note
            )


def local(name: str, runs: int) -> Iterator[Row]:
    with site(name, 4) as where:
        where.machines(2)
        for seconds in (0, 0.3):

            def measure(ours: bool, seconds: float = seconds) -> float:
                return where.build(TRIVIAL, ours, count=40, jobs=2, sleep=seconds)

            what = f"40 derivations of {seconds} s, and 2 local slots"
            yield Row(what, *where.compare(runs, measure))


def utilisation(name: str, runs: int) -> Iterator[Row]:
    """96 derivations of 5 s over 32 slots: 15 s if no slot ever were idle."""
    with site(name, 4, 50) as where:
        where.machines(8)
        shares: dict[bool, float] = {}

        def measure(ours: bool) -> float:
            with held_slots(where.client) as samples:
                seconds = where.build(TRIVIAL, ours, count=96, sleep=5)
            # From the first start to the last: the last 5 s hold only what was begun.
            busy = samples[next(i for i, n in enumerate(samples) if n) : -50]
            shares[ours] = 100 * sum(busy) / (32 * max(1, len(busy)))
            return seconds

        times = where.compare(1, measure)
        note = f"slots held {shares[True]:.0f} %, stock {shares[False]:.0f} %"
        yield Row("96 derivations of 5 s, 4 builders x 8 slots, 50 ms", *times, note)


@contextlib.contextmanager
def held_slots(client: Host) -> Iterator[list[int]]:
    """How many slot locks were held, sampled every 0.1 s, from the kernel's own list."""
    import threading

    samples: list[int] = []
    done = threading.Event()

    def sample() -> None:
        directory = client.path("/nix/var/nix/current-load")
        while not done.wait(0.1):
            slots = {p.stat().st_ino for p in directory.glob("ssh:__b*-[0-9]*")}
            locks = Path("/proc/locks").read_text().splitlines()
            held = {
                int(line.split()[5].split(":")[2]) for line in locks if "->" not in line
            }
            samples.append(len(slots & held))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def big(name: str, runs: int) -> Iterator[Row]:
    """1 GiB there and 1 GiB back, beside the same by hand with nix-copy-closure; noted:
    the processor time of all hosts, and the most memory that the hook had."""
    with site(name, 1) as where:
        where.machines(1)
        where.build(TRIVIAL, True, count=1)  # the bytecode is there from now on
        client, builder = where.client, where.builders[0]
        client.run("sh", "-c", "head -c 1073741824 /dev/urandom > /tmp/big")
        source = client.run("nix-store", "--add", "/tmp/big").stdout.strip()
        expression = """
        derivation { name = "out-%(tag)s"; system = "%(system)s"; builder = "/bin/sh";
          PATH = "/usr/bin:/bin"; args = [ "-c" "cat ${builtins.storePath SOURCE} > $out" ]; }
        """.replace("SOURCE", source)

        def by_hand() -> float:
            where.count += 1
            values = {"system": SYSTEM, "tag": where.count}
            client.write("/tmp/hand.nix", expression % values)
            start = time.monotonic()
            drv = client.run("nix-instantiate", "/tmp/hand.nix").stdout.strip()
            client.run("nix-copy-closure", "--to", "b0", drv, timeout=600)
            built = client.run("ssh", "b0", "nix-store", "--realise", drv, timeout=600)
            output = built.stdout.strip()
            client.run("nix-copy-closure", "--from", "b0", output, timeout=600)
            return time.monotonic() - start

        spent: dict[bool, list[float]] = {True: [], False: []}
        peaks: list[float] = []

        def measure(ours: bool) -> float:
            builder.run("nix-store", "--gc", timeout=600)  # the input is sent each time
            before = machine_time()
            with peak_memory(client, peaks):
                seconds = where.build(expression, True) if ours else by_hand()
            spent[ours].append(machine_time() - before)
            return seconds

        times = where.compare(runs, measure)
        used = [statistics.median(spent[ours]) / 2 for ours in (True, False)]
        note = f"processor s a GiB: {used[0]:.1f}, {used[1]:.1f}; {max(peaks):.0f} MiB"
        yield Row("1 GiB in, 1 GiB out; beside nix-copy-closure by hand", *times, note)


def machine_time() -> float:
    """Seconds that all processors have worked since the system's start."""
    words = Path("/proc/stat").read_text().splitlines()[0].split()
    user, nice, system, _, _, interrupts, soft = map(int, words[1:8])
    ticks = user + nice + system + interrupts + soft
    return ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def peak_memory(client: Host, peaks: list[float]) -> Iterator[None]:
    """Append the most memory (MiB) that a hook has had, ten times a second."""
    import threading

    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.1):
            for pid in hooks(client):
                with contextlib.suppress(OSError):
                    status = client.read(f"/proc/{pid}/status")
                    found = re.search(r"VmHWM:\s*(\d+)", status)
                    peaks.append(int(found[1]) / 1024 if found else 0)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def old(name: str, runs: int) -> Iterator[Row]:
    """The driver that plays Nix 1.11; there is no stock hook to run beside it."""
    with site(name, 4) as where:
        where.machines(2)
        where.client.copy(HERE / "old_nix.py", "/usr/local/lib/old_nix.py")

        def measure() -> float:
            where.count += 1
            values = {"system": SYSTEM, "tag": where.count, "sleep": 0, "count": 24}
            where.client.write("/tmp/bench.nix", TRIVIAL % values)
            done = where.client.run("nix-instantiate", "/tmp/bench.nix")
            derivations = done.stdout.split()
            command = ["python3", "/usr/local/lib/old_nix.py", "--hook", INSIDE]
            start = time.monotonic()
            environ = {"NIX_REMOTE_SYSTEMS": "/etc/nix/machines"}
            done = where.client.run(*command, *derivations, env=environ, timeout=600)
            seconds = time.monotonic() - start
            assert done.stdout.count('"result": "built"') == 24, done.stdout
            return seconds

        measure()
        seconds = statistics.median(measure() for _ in range(runs))
        yield Row("24 trivial, played by the driver of Nix 1.11, 0 ms", seconds, 0.0)


# Runs inside a client: how long a hook takes to answer its first and its next request,
# and its memory then.  Its arguments: a file of settings, a derivation, a system.
ASK = """
import os, re, struct, subprocess, sys, time
program, settings, derivation, system = sys.argv[1].split(), *sys.argv[2:]
def integer(n): return struct.pack("<Q", n)
def string(t): return integer(len(t)) + t.encode() + bytes(-len(t) % 8)
pairs = (line.split(" = ", 1) for line in open(settings).read().splitlines())
head = b"".join(integer(1) + string(k) + string(v) for k, v in pairs) + integer(0)
request = string("try") + integer(1) + string(system) + string(derivation) + integer(0)
pipe = subprocess.PIPE
log = open("/dev/null", "wb"); os.dup2(log.fileno(), 4)
start = time.monotonic()
hook = subprocess.Popen(program, stdin=pipe, stderr=pipe, bufsize=0, close_fds=False)
times = []
for data in (head + request, request):
    start = time.monotonic() if times else start
    hook.stdin.write(data)
    while not (line := hook.stderr.readline()).startswith(b"# "): assert line
    times.append(time.monotonic() - start)
    if line.startswith(b"# accept"): break
status = open(f"/proc/{hook.pid}/status").read()
print(*times, int(re.search(r"VmHWM:\\s*(\\d+)", status)[1]) / 1024, line.decode())
hook.kill()
"""


def ask(where: Site, ours: bool, derivation: str) -> list[float]:
    """Seconds to the first and to the next reply, if there are two, and MiB."""
    stock = (
        "/usr/libexec/nix/build-remote"
        if where.name in ("2.3", "2.8")
        else "nix __build-remote"
    )
    program = f"{INSIDE if ours else stock} 3"
    where.client.write("/tmp/ask.py", ASK.replace("\\\\", "\\"))
    arguments = ("/tmp/settings", derivation, SYSTEM)
    done = where.client.run("python3", "/tmp/ask.py", program, *arguments)
    return [float(word) for word in done.stdout.split("#")[0].split()]


def settings(where: Site, **more: str) -> None:
    """What a Nix of that age would send, as far as either hook looks at it."""
    values = {
        "builders": "@/etc/nix/machines",
        "system": SYSTEM,
        "max-jobs": "1",
        "experimental-features": "",
        "store": "auto",
        "extra-platforms": "",
        "system-features": "",
        "substituters": "",
        "fsync-metadata": "true",  # of which Lix tells only if it is set
        **more,
    }
    text = "".join(f"{name} = {value}\n" for name, value in values.items())
    where.client.write("/tmp/settings", text)


def replies(name: str, runs: int) -> Iterator[Row]:
    with site(name, 1) as where:
        where.machines(4)
        where.build(TRIVIAL, True, count=1)
        expression = TRIVIAL % {"tag": "ask", "count": 1, "sleep": 0, "system": SYSTEM}
        where.client.write("/tmp/ask.nix", expression)
        derivation = where.client.run("nix-instantiate", "/tmp/ask.nix").stdout.strip()
        settings(where)
        where.forget_connections()
        ask(where, True, derivation)
        times = where.compare(
            2 * runs + 1, lambda ours: ask(where, ours, derivation)[0]
        )
        yield Row("from start to accept, connection live", *times)
        lines = [f"builder{n:04} {SYSTEM} - 16\n" for n in range(1000)]
        where.client.write("/etc/nix/machines", "".join(lines))
        directory = where.client.path("/nix/var/nix/current-load")
        with all_slots_taken(directory, 1000, 16):
            found = {
                ours: [ask(where, ours, derivation) for _ in range(runs)]
                for ours in (True, False)
            }
        for position, what in enumerate(
            ("first reply, s", "next reply, s", "memory, MiB")
        ):
            ours, stock = (
                statistics.median(run[position] for run in found[kind])
                for kind in (True, False)
            )
            yield Row(f"1000 machines x 16 slots, all busy: {what}", ours, stock)


@contextlib.contextmanager
def all_slots_taken(directory: Path, machines: int, slots: int) -> Iterator[None]:
    import resource

    wanted = machines * slots + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(hard, wanted)))
    taken = []
    for machine in range(machines):
        for slot in range(slots):
            path = directory / f"ssh:__builder{machine:04}-{slot}"
            taken.append(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            fcntl.flock(taken[-1], fcntl.LOCK_EX)
    try:
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)


def waiting(name: str, runs: int) -> Iterator[Row]:
    """Processor time of 64 hooks that wait in line, in per cent of one core."""
    with site(name, 1) as where:
        where.client.write("/etc/nix/machines", f"builder0000 {SYSTEM} - 64\n")
        directory = where.client.path("/nix/var/nix/current-load")
        directory.mkdir(mode=0o700, parents=True)
        with all_slots_taken(directory, 1, 64):
            for nixes in (1, 64):
                used = cost_of_waiting(where.client, nixes, 64 // nixes)
                yield Row(f"64 hooks of {nixes} Nix in line: % of one core", used, 0.0)


def cost_of_waiting(client: Host, nixes: int, builds: int) -> float:
    """What it costs that so many Nixes wait with so many builds each."""
    processes = []
    for number in range(nixes):
        values = {"tag": f"{nixes}-{number}", "count": builds, "sleep": 0}
        path = f"/tmp/bench{number}.nix"
        client.write(path, TRIVIAL % {**values, "system": SYSTEM})
        command = ["nix-build", path, "--no-out-link", "--max-jobs", "0"]
        command += ["--option", "build-hook", INSIDE]
        processes.append(client.popen(*command, stderr=subprocess.DEVNULL))
    while len(hooks(client)) < nixes * builds:
        time.sleep(0.2)
    time.sleep(5)
    before, start = processor_time(client), time.monotonic()
    time.sleep(10)
    used = processor_time(client) - before
    took = time.monotonic() - start
    for process in processes:
        process.kill()
    while hooks(client):
        time.sleep(0.2)
    return 100 * used / took


def hooks(client: Host) -> list[int]:
    return [
        p.pid
        for p in client.processes()
        if INSIDE in p.cmdline and "SourceFile" in p.cmdline
    ]


def processor_time(client: Host) -> float:
    """Seconds, by the scheduler's own account: ticks are too coarse for so little."""
    spent = [client.read(f"/proc/{pid}/schedstat").split()[0] for pid in hooks(client)]
    return sum(map(int, spent)) / 1e9


ROWS = {
    "trivial": trivial,
    "chain": chain,
    "inputs": inputs,
    "graph": graph,
    "local": local,
    "utilisation": utilisation,
    "big": big,
    "old": old,
    "replies": replies,
    "waiting": waiting,
}


def elsewhere(machines: Path, runs: int) -> Iterator[Row]:
    """On builders that the reader names, with this machine's Nix."""
    with tempfile.TemporaryDirectory() as directory:
        expression = Path(directory, "bench.nix")

        def measure(ours: bool) -> float:
            tag = f"{os.getpid()}-{time.time_ns()}"
            values = {"tag": tag, "count": 24, "sleep": 0, "system": SYSTEM}
            expression.write_text(TRIVIAL % values)
            command = [
                "nix-build",
                str(expression),
                "--no-out-link",
                "--max-jobs",
                "0",
                "--option",
                "builders",
                f"@{machines.resolve()}",
            ]
            command += ["--option", "build-hook", str(HOOK)] * ours
            start = time.monotonic()
            subprocess.run(command, check=True, capture_output=True)
            return time.monotonic() - start

        times = {True: [measure(True)], False: [measure(False)]}
        for _ in range(runs):
            for ours in (True, False):
                times[ours].append(measure(ours))
        mine, stock = (statistics.median(times[kind][1:]) for kind in (True, False))
        yield Row("24 trivial derivations, warm", mine, stock)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", default="2.8,2.34")
    parser.add_argument("--machines", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--delays", help="round trips of the row trivial, in ms")
    parser.add_argument("rows", nargs="*")
    options = parser.parse_args()
    if options.delays:
        DELAYS_MS[:] = map(int, options.delays.split(","))
    print(
        f"| {'seconds, medians of ' + str(options.runs):58} |     ours |    stock | ratio | |"
    )
    print("|---|--:|--:|--:|---|")
    if options.machines:
        for row in elsewhere(options.machines, options.runs):
            print(row.text(), flush=True)
        return 0
    for name in options.engines.split(","):
        for title, rows in ROWS.items():
            if not options.rows or title in options.rows:
                for row in rows(name, options.runs):
                    print(row._replace(name=f"{name}: {row.name}").text(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
