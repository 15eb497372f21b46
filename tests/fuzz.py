"""What Nix, builders and files say, spoilt in many ways: only our own errors come out.

    python3 tests/fuzz.py [--cases 100000] [--seed 1] [--number N] [TARGET...]

A case is a valid sample, spoilt at a few places or at none; seed, target and number
make it. Wrong is any exception that is none of the module's own, an accepted value that
breaks a promise, more than TIME_S, and memory out of proportion to the case. The first
case that is wrong ends the run, and is printed with the command that runs it again.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).parent)]

import fakes

import nix_build_remote as hook
from nix_build_remote import Derivation, Machine, Nix, integer, string, strings

Rng = random.Random
TIME_S = 60
MEMORY_BYTES, MEMORY_RATIO = 16 << 20, 300  # for one case, and more for each byte of it
ADDRESSES_BYTES = 4 << 30  # of the whole process, while up to 2**64 bytes are announced
LONG_EVERY, LONG_BYTES = 1000, 1 << 20  # one case in so many repeats something
SYSTEM, PATH, NEXT = "x86_64-linux", fakes.CAP_A, fakes.CAP_B
STDERR = b"\n== stderr ==\n"  # what is behind it comes on a session's stderr

# -- Samples --------------------------------------------------------------------------

KEY = base64.b64encode(b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE6kaVyB a@b").decode()
HOSTS = [
    "b1",
    "nix@b1",
    "b1:2222",
    "ssh://b1",
    "ssh-ng://nix@b1:22",
    "::1",
    "192.0.2.7",
    "ssh://[2001:db8::7]:22",
    "fe80::1%eth0",
    "ssh://[fe80::1%25eth0]",
    "nix@::1",
    "ssh://b1?ssh-key=/root/%2Essh/id&compress=true",
    "ssh://localhost:2222",
]
FIELDS = [
    [*HOSTS, f"b1?base64-ssh-public-host-key={KEY}"],
    ["-", SYSTEM, f"a-b,{SYSTEM}"],
    ["-", "/root/.ssh/id_b1"],
    ["-", "8", "0"],
    ["-", "1", "2.5", ".5"],
    ["-", "kvm,a"],
    ["-", "perf"],
    ["-", KEY],
]
MESSAGES = ["", "builder failed", "x; last 2 log lines:\n> a\n> b", "\x1b[31mü\n"]
LOGS = [b"", b"log\n", b"two\nlines", b"root@b1: Permission denied (publickey).\r\n"]
COPYING = [
    "",
    "copying 2 paths...",
    "# accept",
    "@ x",
    "error (ignored): busy",
    "warning: ü",
    f"copying path '{PATH}' to 'ssh://b1'...",
    "copying path '",
    "\x1b[31mred\x1b[0m",
]
NOTES = [
    b"2 NOW.5 NOW.2 passes Connection refused",
    b"1 1.5 2 lasts ",
    b"9 NOW NOW unknown \xc3\xbc\n",
    b"",
]
PAUSES = [b"inf\npaused by alice", b"9e9\npaused (\xc3\xbc)", b"1.5\npaused", b""]
PROGRAMS = [
    b"nix-copy-closure (Nix) 2.26.3",
    b"(Nix) 2.35pre20260101_abc",
    b"Nix 2.3\n",
    b"nix (Lix, like Nix) 2.91.1",
    b"",
    b"usage: nix-copy-closure",
]
RECORDINGS = [fakes.recording(version) for version in fakes.VERSIONS]
DERIVATIONS = [path.read_bytes() for path in sorted(fakes.TRANSCRIPTS.glob("*.drv"))]
NODE = b"".join(map(string, ("(", "type", "regular", "contents", ")(", ")")))
ENTRY = b"".join(map(string, ("entry", "(", "name", "(", "node"))) + NODE + string(")")
FOLDER = b"".join(map(string, ("(", "type", "directory")))
ARCHIVES = [
    string("nix-archive-1") + NODE,
    string("nix-archive-1") + FOLDER + 3 * ENTRY + string(")"),
    string("nix-archive-1") + NODE + string("more"),
]
OLD, NEW = (
    [path.read_bytes() for path in sorted(fakes.TRANSCRIPTS.glob(f"nix-{n}*/*.stdin"))]
    for n in (1, 2)
)


def bent(rng: Rng, text: str) -> str:
    """Now and then spoilt, but what is then made of it is not."""
    if rng.random() < 0.8:
        return text
    return spoil(rng, text.encode(), b"", False).decode("utf-8", "surrogateescape")


def machines(rng: Rng) -> bytes:
    lines = ["@machines", "@/none", "@none", "# b1", ""][rng.randrange(6) :]
    for _ in range(rng.randint(1, 4)):
        lines.append(" ".join(map(rng.choice, FIELDS[: rng.randint(1, 8)])))
    return rng.choice("\n;").join(lines).encode()


def old_stdin(rng: Rng) -> bytes:
    declined = f"1 {SYSTEM} {NEXT}.drv {rng.choice(['', 'kvm', 'a,,b'])}\n"
    return declined.encode() * rng.randrange(3) + rng.choice(OLD)


def new_stdin(rng: Rng) -> bytes:
    if rng.random() < 0.2:
        return rng.choice(NEW)
    names = ["system", "timeout", "max-silent-time", "store", "builders"]
    values = [SYSTEM, "0", "3600", "auto", "local?root=/r%20", "/root", ""]
    settings = (
        string(rng.choice(names)) + string(bent(rng, rng.choice(values)))
        for _ in range(4)
    )
    request = string("try") + integer(rng.randrange(2)) + string(bent(rng, SYSTEM))
    request += string(bent(rng, PATH)) + strings(["kvm"] * rng.randrange(3))
    start = b"".join(integer(1) + pair for pair in settings) + integer(0)
    lists = strings([PATH] * rng.randrange(3)) + strings(["out", "dev"])
    return start + request * rng.randint(1, 3) + lists


def session(rng: Rng, minor: int) -> bytes:
    """A greeting, which paths are valid, and how a build went (2.0: by BuildPaths)."""
    if rng.random() < 0.1:
        real = rng.choice(RECORDINGS)
        return b"".join(real.answered) + STDERR + real.stderr.encode()
    status = rng.choice([0, 0, 0, 1, 2, 3, 6, 8, 9, 12, 13, 100, 101, 102])
    data = integer(hook.SERVE_REPLY) + integer(0x200 + minor)
    data += strings([PATH, bent(rng, NEXT)][: rng.randrange(3)]) + integer(status)
    if status or minor:
        data += string(bent(rng, rng.choice(MESSAGES)))
    if minor >= 3:
        data += integer(1) + integer(0) + integer(1700000000) * 2
    if minor >= 6:
        data += integer(1) + string("sha256:00!out") + string("{}")
    return data + STDERR + rng.choice(LOGS)


def copying(rng: Rng) -> bytes:
    lines = [bent(rng, line) for line in rng.choices(COPYING, k=rng.randrange(8))]
    lines += rng.choice([[], [], ["error: it is full", "", "  it really is"]])
    return hook.encode("\n".join(lines)) + STDERR + rng.choice(LOGS)


def infos(rng: Rng) -> bytes:
    info = hook.PathInfo(
        *(PATH, rng.choice(["", f"{PATH}.drv"]), (PATH, bent(rng, NEXT))),
        96,
        f"sha256:{'1' * 52}",
        string(rng.choice(["", f"fixed:r:sha256:{'1' * 52}"])) + strings([]),
    )
    return info.encode() * rng.choice([0, 1, 1, 1, 2]) + string("")


def asked(rng: Rng) -> bytes:
    hello = integer(hook.SERVE_HELLO) + integer(0x206)
    closure = integer(hook.QUERY_CLOSURE) + integer(0) + strings([PATH])
    of_path = integer(hook.QUERY_PATH_INFOS) + strings([bent(rng, PATH)])
    dump = integer(hook.DUMP_STORE_PATH) + string(PATH)
    other = integer(rng.choice([1, 4, 99])) * (rng.random() < 0.2)
    return hello + closure + of_path + other + dump * rng.randrange(3)


def told(rng: Rng) -> bytes:
    hello = integer(hook.SERVE_HELLO) + integer(0x206)
    valid = integer(hook.QUERY_VALID_PATHS) + integer(0) * 2 + strings([PATH, NEXT])
    of_path = integer(hook.QUERY_PATH_INFOS) + strings([bent(rng, PATH)])
    size = rng.choice([0, len(ARCHIVES[0])])
    head = string(PATH) + string("") + string("sha256:00") + strings([NEXT])
    tail = integer(0) + strings(["a:b"]) + string("")
    add = integer(hook.ADD_TO_STORE_NAR) + head + integer(9) + integer(size) + tail
    return hello + valid + of_path + (add + ARCHIVES[0][:size]) * rng.randrange(3)


# -- Spoiling -------------------------------------------------------------------------

EXTREMES = [
    0,
    1,
    2,
    9,
    255,
    2**16,
    2**26,
    2**26 + 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**63,
    2**64 - 8,
    2**64 - 1,
]
TOKENS = [
    b"\0",
    b"\n",
    b"\r",
    b"\t",
    b" ",
    b"\x1b[31m",
    b"\x7f",
    b"\x85",
    b"\xff\xfe",
    b"-",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\\ud800",
    b"\\u0000",
    b"%",
    b"%0a",
    b"%00",
    b"%ff",
    b"--",
    b"-oProxyCommand=id",
    b"@",
    b";",
    b"#",
    b"\n# accept\n",
    b"\n@ x\n",
    b"[",
    b"]",
    b"(",
    b")",
    b"{",
    b",",
    b'"',
    b"\\",
    b'\\"',
    b"'",
    b"`",
    b"$(id)",
    b"9",
    b"../",
    b"1e308",
    b"nan",
    b"-1",
    b" 1_0 ",
    b".",
    b"error:",
    b"Lix",
    b"NOW",
    STDERR,
    "²٣\u2028\u00a0\u3000".encode(),
]


def spoil(rng: Rng, data: bytes, other: bytes, long: bool) -> bytes:
    """Once, in one of many ways."""
    start = rng.randint(0, len(data))
    end = rng.randint(start, min(len(data), start + rng.choice([8, 64, 9999])))
    part, extreme = data[start:end], rng.choice(EXTREMES)
    times = rng.choice([1, 1, 1, 2, 3, 10, 100, 999, 9999])
    kind = 8 if long else rng.randrange(10)
    if kind == 0 and part:  # another bit
        part = bytes([part[0] ^ 1 << rng.randrange(8)]) + part[1:]
    elif kind == 1:  # a piece is lost
        part = b""
    elif kind == 2:  # the end is lost
        return data[:start]
    elif kind == 3:  # the rest is another's
        return data[:start] + other[rng.randint(0, len(other)) :]
    elif kind == 4:  # another integer of Nix's
        start = start // 8 * 8
        part, end = struct.pack("<Q", extreme), start + 8
    elif kind == 5:  # or of ssh's
        start = start // 4 * 4
        part, end = struct.pack(">Q", extreme)[4:], start + 4
    elif kind == 6 and (numbers := [*re.finditer(rb"[0-9]+", data[:9999])]):
        start, end = rng.choice(numbers).span()
        part = rng.choice([b"%d" % extreme, b"9" * times, b"-" + b"9" * times])
    elif kind == 7:
        part += bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
    else:
        repeated = part if part and kind == 9 else rng.choice(TOKENS)
        most = LONG_BYTES // len(repeated)
        part += repeated * (most if long else min(times, most // 16))
    return data[:start] + part + data[end:]


# -- Taking it in ---------------------------------------------------------------------


def written(drv: Derivation) -> str:
    """As a .drv file has it."""

    def quoted(text: str) -> str:
        for mark, escape in ("\\\\", '""', "\nn", "\rr", "\tt"):
            text = text.replace(mark, f"\\{escape}")
        return f'"{text}"'

    def row(texts: tuple[str, ...]) -> str:
        return ",".join(map(quoted, texts))

    def rows(values: tuple[tuple[str, ...], ...]) -> str:
        return ",".join(f"({row(value)})" for value in values)

    inputs = ",".join(f'({quoted(path)},["out"])' for path in drv.input_derivations)
    program = f"{row((drv.platform, drv.builder))},[{row(drv.arguments)}]"
    parts = f"[{rows(drv.outputs)}],[{inputs}],[{row(drv.sources)}],{program}"
    return f"Derive({parts},[{rows(drv.environment)}])"


def pipe_with(data: bytes) -> int:
    """The reading end of a pipe that says this and ends."""
    reading, writing = os.pipe()

    def fill() -> None:
        with contextlib.suppress(BrokenPipeError), open(writing, "wb") as file:
            file.write(data)

    if len(data) > 4096:  # or it might not fit
        threading.Thread(target=fill, daemon=True).start()
    else:
        fill()
    return reading


class Ended:
    """A program on a builder that has ended, and what it has said."""

    returncode = 255

    def __init__(self, *said: bytes) -> None:
        self.stdin = open(os.devnull, "wb", buffering=0)  # noqa: SIM115 (the hook does)
        ends = [open(pipe_with(data), "rb", buffering=0) for data in said]  # noqa: SIM115
        self.stdout, self.stderr = ends

    def wait(self, timeout: float = 0) -> int:
        return self.returncode

    def kill(self) -> None:
        pass


class FakeSeat(hook.Seat):
    said = (b"", b"")

    def start(self, *remote: str, **options: Any) -> Any:
        return Ended(*self.said)


class FakeRelay(hook.Relay):
    """For a program that copies, which has said this and ended; `heard` is what it is told."""

    heard: Path
    said: tuple[bytes, bytes]

    def start(self, command: list[str], environ: dict[str, str]) -> None:
        self.process: Any = Ended(*self.said)
        self.input = os.open(self.heard, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self.output = os.dup(self.process.stdout.fileno())
        self.stderr = self.process.stderr.fileno()


def is_plain(text: str) -> bool:
    """Whether it may stand in a command line of ssh, and is no option."""
    safe = text.isprintable() and not set(" '`;&<>|(){},").intersection(text)
    return text[:1] not in ("", "-") and safe


class Taker:
    """Takes cases in as the hook does: each method returns whether it accepts one, or
    raises one of our own errors."""

    def __init__(self, directory: Path) -> None:
        self.directory, load = directory, str(directory / "load")
        fakes.write_program(directory / "ssh", "")
        environ = {"PATH": str(directory), "NIX_CURRENT_LOAD": load}
        self.old = Nix(True, {"system": SYSTEM}, environ)
        settings = {"experimental-features": "", "timeout": "9", "system": SYSTEM}
        self.new = Nix(False, {**settings, "verbosity": "9"}, environ)
        self.talks = [hook.Talk(nix) for nix in (self.old, self.new)]
        self.machine = Machine.parse("machines:1", "ssh://root@b1", self.new)
        slots = hook.Slots(load)
        slots.make()
        fakes.write_program(directory / "nix-copy-closure", "print('(Nix) 2.30.0')")
        self.sites = [hook.Site(self.new, talk, slots) for talk in self.talks]
        self.seat = FakeSeat(self.sites[1].new_seat(self.machine).ssh)

    def machines(self, case: bytes) -> bool:
        file = self.directory / "machines"
        file.write_bytes(case.replace(b"@machines", b"@" + bytes(file)))
        settings, old = {"builders": f"@{file}", "system": SYSTEM}, len(case) % 2 == 0
        environ = {"NIX_REMOTE_SYSTEMS": str(file)}
        machines, complaints = hook.load_machines(Nix(old, settings, environ))
        assert all(text.startswith(str(file)) for text in complaints)
        for machine in machines:
            words = [machine.destination, machine.host]  # none for a store here
            assert all(map(is_plain, words)) or words == ["", ""], words
            assert hook.only(machine.key, hook.PLAIN) and machine.key[:1] != "-"
            options = " ".join(hook.ssh_options(machine, "/known"))
            assert hook.only(options, hook.PLAIN + "* ")
            assert 0 <= machine.port <= 65535 and 0 <= machine.max_jobs < 10**6
            assert 0 < machine.speed <= 10**9 and machine.host_key.isprintable()
            assert machine.slot_prefix.isprintable() and "/" not in machine.slot_prefix
            assert len(machine.slot_prefix.encode()) < 236  # and a number, or the like
        if not machines:
            raise hook.Error("; ".join(complaints))
        return True

    def stdin(self, case: bytes, old: bool) -> bool:
        """All that the hook asks of what Nix sends; who is willing is declined."""
        before = sys.stdin
        try:
            with open(pipe_with(case), encoding="utf-8") as sys.stdin:
                arguments = [SYSTEM, "0", "0", "0"] if old else ["3"]
                nix = (hook.old_nix if old else hook.new_nix)(arguments, {})
                assert all(integer(nix.number(name)) for name in nix.settings)
                assert nix.slot_directory
                for request in hook.requests(nix):
                    hook.might_build_itself(nix, request)
                    hook.unfit(self.machine, request, nix)
                    if not request.willing:
                        inputs, _ = hook.read_lists(nix)
                        return all(map(nix.store.name, [request.derivation, *inputs]))
        except EOFError:  # Nix has ended
            pass
        finally:
            sys.stdin = before
        return False

    def derivation(self, case: bytes) -> bool:
        directory, path = str(self.directory), f"{PATH}.drv"
        (self.directory / Path(path).name).write_bytes(case)
        drv = hook.read_derivation(path, hook.Store("/nix/store", directory, "", ""))
        with contextlib.suppress(hook.Error):
            assert Derivation.parse(written(drv))._replace(text=drv.text) == drv
            return len(drv.encode([PATH])) % 8 == 0
        raise AssertionError("it cannot be read again")

    @contextlib.contextmanager
    def talking(self, case: bytes) -> Iterator[hook.Session]:
        stdout, _, stderr = case.partition(STDERR)
        self.seat.said = (stdout, stderr)
        session = hook.Session(self.seat)
        try:
            yield session
        finally:
            session.cancel()

    def greeted(self, session: hook.Session) -> None:
        """Have it be as if its builder had greeted."""
        session.version, session.greeting.is_heard = 0x207, True
        session.awaited = [a for a in session.awaited if a is not session.greeting]

    def session(self, case: bytes) -> bool:
        with self.talking(case) as session:
            valid = session.ask_valid([PATH]).get()
            assert all(isinstance(path, str) for path in valid)
            if session.version == 0x200:
                status, message = session.ask_to_build(PATH, None, self.new).get()
            else:
                status, message = session.ask_to_build(PATH, b"", self.new).get()
            session.finish()
        if status:
            drv = Derivation.parse(fakes.RECORDED_BUILDS[0].drv)
            request = hook.Request(False, SYSTEM, PATH, frozenset())
            build = hook.Build(self.sites[1], request, drv, [self.machine])
            slot = self.sites[1].slots.choose([self.machine])[0]
            assert slot
            slot.free()
            attempt = hook.Attempt(build, slot)
            attempt.session = session
            raise attempt.verdict(status, message)
        return 0x200 <= session.version <= 0x207

    def copying(self, case: bytes) -> bool:
        stderr, _, log = case.partition(STDERR)
        with self.talking(STDERR + log) as session:
            self.greeted(session)
            relay = self.relay(session, b"", stderr, len(case))
            relay.finish()
            relay.end()
            relay.talk.end()
        if relay.problem:
            raise hook.SessionLost(relay.problem)
        return True

    def relay(
        self, session: hook.Session, asked: bytes, stderr: bytes = b"", number: int = 1
    ) -> hook.Relay:
        """For a program that copies and has said this; `heard` is what it is told."""
        self.greeted(session)
        FakeRelay.heard, FakeRelay.said = self.directory / "heard", (asked, stderr)
        relay = FakeRelay(session, "to", "local")
        relay.talk = self.talks[number % 2]
        relay.start(["nix-copy-closure"], {})
        return relay

    def infos(self, case: bytes) -> bool:
        """What a builder says of the outputs that it has built."""
        with self.talking(case) as session:
            self.greeted(session)
            session.write(hook.infos_question([PATH]))
            infos = session.infos_answer().get()
            assert all(info.addressed_path() != PATH for info in infos.values())
            locks = hook.OutputLocks(self.new.store, [])
            hook.Copier(self.sites[1], session, locks).check([PATH], [NEXT], infos)
        assert infos.keys() == {PATH} and {*infos[PATH].references} <= {PATH, NEXT}
        assert hook.in_order(infos) == [PATH]
        data = io.BytesIO(infos[PATH].encode() + string(""))
        assert hook.read_infos(data.read, 0x207) == infos
        return True

    @contextlib.contextmanager
    def going_on(self, session: hook.Session, asked: bytes) -> Iterator[hook.Relay]:
        """For a program that says no more, but does not end: then it is given up."""
        relay = self.relay(session, asked)
        reading, writing = os.pipe()
        os.dup2(reading, relay.stderr)
        patience_s, vars(hook)["COPY_TIMEOUT_S"] = hook.COPY_TIMEOUT_S, 0.01
        try:
            yield relay
        finally:
            vars(hook)["COPY_TIMEOUT_S"] = patience_s
            relay.end()
            relay.talk.end()
            os.close(reading)
            os.close(writing)

    def archive(self, case: bytes) -> bool:
        """Passed on to nix-store --import: it ends where an archive ends."""
        with self.talking(case) as session, self.going_on(session, b"") as relay:
            digest = relay.pass_archive()
        passed = (self.directory / "heard").read_bytes()
        assert case.startswith(passed) and passed[-16:-7] == integer(1) + b")"
        return hashlib.sha256(passed).digest() == digest

    def asked(self, case: bytes) -> bool:
        """By nix-copy-closure --from, of whom we are the builder."""
        info = hook.PathInfo(PATH, "", (NEXT,), len(ARCHIVES[0]), "", b"")
        lost = contextlib.suppress(hook.SessionLost)  # the builder has ended
        with self.talking(b"") as session, self.going_on(session, case) as relay, lost:
            relay.direction = "from"
            relay.run(1, relay.offer, {PATH: info})
        return (self.directory / "heard").stat().st_size > 16  # more than a greeting

    def told(self, case: bytes) -> bool:
        """By nix-copy-closure --to: each path that it copies is acknowledged at once."""
        said, lost = 9 * integer(1), contextlib.suppress(hook.SessionLost)
        with self.talking(said) as session, self.going_on(session, case) as relay, lost:
            relay.run(1, relay.send, {NEXT}, {PATH})
            relay.ask(b"")
        return (self.directory / "heard").stat().st_size > 16

    def outage(self, case: bytes) -> bool:
        """`NOW` stands for the time."""
        outages = self.sites[1].outages
        now = b"%d" % time.time()
        Path(outages.slots.file(self.machine, "down")).write_bytes(
            case.replace(b"NOW", now)
        )
        found = outages.of(self.machine)
        despair = outages.despair([self.machine])
        assert despair or not found or not found.is_hopeless
        outages.note(self.machine, found, hook.heard(hook.Unreachable, "ü closed by"))
        after = outages.of(self.machine)
        assert after and after.words == "ü closed by" and after.lasting is False
        failures = found.failures if found else 0
        assert after.failures == failures + 1 or failures == 999999999  # digits kept
        return found is not None

    def version(self, case: bytes) -> bool:
        version = hook.parse_version(hook.decode(case))
        assert len(version) > 1 and min(version) >= 0
        return version != (1, 11)

    def proof(self, case: bytes) -> bool:
        proof = hook.Proof.parse(hook.decode(case))
        assert proof is None or 0 <= proof.version < 10**9
        assert proof is None or hook.Proof.parse(proof.text()) == proof
        return proof is not None

    def activities(self, case: bytes) -> bool:
        """What nix-store tells as JSON; how it is cut makes no difference."""
        cut, whole = hook.Activities(), hook.Activities()
        middle = len(case) // 2
        said = cut.plain(case[:middle]) + cut.plain(case[middle:]) + cut.plain(b"")
        assert said == whole.plain(case) + whole.plain(b"")
        assert cut.lock.words == whole.lock.words
        return bool(cut.lock.words)

    def pause(self, case: bytes) -> bool:
        """What is no pause keeps nobody from a slot, and its file goes away."""
        slots = self.sites[1].slots
        file = Path(slots.file(self.machine, "paused"))
        file.write_bytes(case)
        words, until = slots.pause(self.machine)
        assert 0 <= until < float("inf")
        assert "\n" not in words and words == hook.printable(words)
        slot, _ = slots.choose([self.machine])
        assert bool(words) == (slot is None) == file.exists()
        if slot:
            slot.free()
        file.unlink(missing_ok=True)
        return bool(words)

    def paths(self, case: bytes) -> bool:
        slots = self.sites[1].slots
        Path(slots.own, f"{self.machine.slot_prefix}.paths").write_bytes(case)
        known = slots.known(self.machine, frozenset(["a" * 32]))
        slots.note_paths(self.machine, frozenset(["b" * 32]))
        kept = slots.digests(self.machine)
        assert kept[-1] == "b" * 32 and len(kept) <= hook.DIGEST_LIMIT
        return known > 0


def activities(rng: Rng) -> bytes:
    """Some of what a builder tells while it waits and builds."""
    lock = "waiting for lock on '/nix/store/x'"
    begin = {"action": "start", "id": 7, "level": 1, "text": lock, "type": 111}
    others: list[dict[str, object]] = [
        {"action": "result", "fields": ['a "line"'], "id": 8, "type": 101},
        {"action": "result", "fields": ["plain"], "id": 8, "type": 101},
        {"action": "result", "fields": ["buildPhase"], "id": 8, "type": 104},
        {"action": "stop", "id": 9},
        {"action": "msg", "level": 0, "msg": "error: no"},
    ]
    events = [*rng.choices(others, k=3), begin, *rng.choices(others, k=3)]
    lines = [json.dumps(event, separators=(",", ":")) for event in events]
    return "".join(f"@nix {line}\n" for line in lines).encode()


Target = tuple[Callable[[Rng], bytes], Callable[[Taker, bytes], bool]]
TARGETS: dict[str, Target] = {
    "machines": (machines, Taker.machines),
    "stdin-1.x": (old_stdin, functools.partial(Taker.stdin, old=True)),
    "stdin-2.x": (new_stdin, functools.partial(Taker.stdin, old=False)),
    "derivation": (lambda rng: rng.choice(DERIVATIONS), Taker.derivation),
    "copying": (copying, Taker.copying),
    "infos": (infos, Taker.infos),
    "archive": (lambda rng: rng.choice(ARCHIVES), Taker.archive),
    "asked": (asked, Taker.asked),
    "told": (told, Taker.told),
    "outage": (lambda rng: rng.choice(NOTES), Taker.outage),
    "version": (lambda rng: rng.choice(PROGRAMS), Taker.version),
    "proof": (lambda rng: b"%d 4711 519 True" % rng.randrange(9999), Taker.proof),
    "activities": (activities, Taker.activities),
    "pause": (lambda rng: rng.choice(PAUSES), Taker.pause),
    "paths": (lambda rng: b" ".join([b"a" * 32] * rng.randrange(40)), Taker.paths),
}
for minor in range(8):
    sample = functools.partial(session, minor=minor)
    TARGETS[f"serve-2.{minor}"] = (sample, Taker.session)


# -- Running --------------------------------------------------------------------------


class TooLong(BaseException):
    """Not an Exception: those the hook might take care of."""


class Wrong(Exception):
    """A case that shows a bug."""


class Report(NamedTuple):
    outcomes: collections.Counter[str]  # "accepted", "refused", or the name of an error
    seconds: float
    growth: int  # in bytes, the most for one case


def too_long(number: int, frame: object) -> None:
    raise TooLong


def peak_bytes() -> int:
    """The most memory since the last call, or where the system can't say that, ever."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "wb") as file:
        file.write(b"5")
    return peak if sys.platform == "darwin" else peak << 10


@contextlib.contextmanager
def open_as(number: int, path: str) -> Iterator[None]:
    """Let that descriptor be that file; what it was before comes back."""
    before = -1
    with contextlib.suppress(OSError):
        before = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 20)
    opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)
    try:
        yield
    finally:
        os.dup2(before, number) if before >= 0 else os.close(number)
        if before >= 0:
            os.close(before)


@contextlib.contextmanager
def prepared() -> Iterator[Taker]:
    """With the limits, and with the descriptors that Nix gives a hook."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, too_long)
    with (
        tempfile.TemporaryDirectory(prefix="fuzz-") as directory,
        open_as(4, os.devnull),
        open_as(2, f"{directory}/said"),
    ):
        try:
            resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES_BYTES, limits[1]))
            yield Taker(Path(directory))
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
            signal.signal(signal.SIGALRM, handler)


def make_case(name: str, seed: int, number: int) -> bytes:
    rng, (sample, _) = Rng(f"{seed} {name} {number}"), TARGETS[name]
    case, long = sample(rng), number % LONG_EVERY == LONG_EVERY - 1
    for _ in range(rng.choice([0, 0, 1, 1, 1, 2, 3, 8])):
        case, long = spoil(rng, case, sample(rng), long), False
    return case


def outcome(taker: Taker, take: Callable[[Taker, bytes], bool], case: bytes) -> str:
    """ "accepted", "refused" or the name of our own error, which Nix is told."""
    signal.setitimer(signal.ITIMER_REAL, TIME_S)
    talk = taker.talks[len(case) % 2]
    try:
        result = "accepted" if take(taker, case) else "refused"
    except hook.Error as error:
        result = type(error).__name__
        talk.say(hook.ERROR, error.told(taker.machine.names))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    *lines, rest = os.pread(2, os.fstat(2).st_size, 0).decode().split("\n")
    os.ftruncate(2, 0)
    for line in lines:  # none of which Nix may take for a reply
        assert line[:2] not in ("# ", "@ ") and not rest, line
        assert talk.old or json.loads(line.removeprefix("@nix "))["action"], line
    return result


def fuzz(taker: Taker, name: str, cases: range, seed: int) -> Report:
    outcomes: collections.Counter[str] = collections.Counter()
    start, growth = time.monotonic(), 0
    for number in cases:
        case = make_case(name, seed, number)
        peak_bytes()
        before = peak_bytes()
        try:
            outcomes[outcome(taker, TARGETS[name][1], case)] += 1
            grown = peak_bytes() - before
            if grown > MEMORY_BYTES + MEMORY_RATIO * len(case):
                raise MemoryError(f"{grown} bytes for a case of {len(case)}")
        except (Exception, TooLong):  # noqa: BLE001  (all are printed)
            text = f"{traceback.format_exc()}\n{case[:2000]!r}, {len(case)} bytes\n"
            again = f"tests/fuzz.py --seed {seed} --number {number} {name}"
            raise Wrong(f"{text}again: python3 {again}") from None
        growth = max(growth, grown)
    return Report(outcomes, time.monotonic() - start, growth)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="of all targets")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--number", type=int, help="only that case")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    options = parser.parse_args()
    names = options.targets or list(TARGETS)
    cases = range(options.cases // len(names))
    if options.number is not None:
        cases = range(options.number, options.number + 1)
    print(f"| seed {options.seed} | cases | seconds | accepted | refused | MB |")
    print("|---|--:|--:|--:|---|--:|")
    for name in names:
        try:
            with prepared() as taker:
                outcomes, seconds, growth = fuzz(taker, name, cases, options.seed)
        except Wrong as wrong:
            print(hook.encode(f"{name}: {wrong}").decode("ascii", "backslashreplace"))
            return 1
        accepted = outcomes.pop("accepted", 0)
        refused = ", ".join(f"{word} {n}" for word, n in outcomes.most_common())
        row = f"{name} | {len(cases)} | {seconds:.1f} | {accepted} | {refused}"
        print(f"| {row} | {growth / 1e6:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
