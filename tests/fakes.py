"""Fake programs, and a fake Nix that starts the hook as a real one does.

A fake is an executable script; nothing but Python is needed to run it, so PATH may hold
nothing else. FAKE_MANNERS in its environment picks how it misbehaves.
"""

from __future__ import annotations

import ast
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lab import HANGS_S
from launcher import assigned, launcher

HOOK = Path(__file__).resolve().parent.parent / "nix_build_remote.py"
TRANSCRIPTS = Path(__file__).resolve().parent / "transcripts"
VERSIONS = ("1.11.17", "2.3.7", "2.8.0", "2.26.3", "2.34.8", "2.35.2")

CAP_A_DRV = "/nix/store/ymyxp6ykgp8ksgrxg6rkp7yi86lf8fzk-cap-a.drv"
CAP_B_DRV = "/nix/store/a8zz7wvs1zizdcqm2prv7arm4n4sxw44-cap-b.drv"
CAP_C_DRV = "/nix/store/6xwmnlvmkf1qk3191w7lrhlycggpfjsr-cap-c.drv"
CAP_A = "/nix/store/vf6nq4xh5y2h8b3wyndv153wijd6qk6x-cap-a"
CAP_B = "/nix/store/n1iqdncg3v1gnn5vial2n07m70ngld1b-cap-b"
CAP_B_DEV = "/nix/store/x19h67liwyaibqdsli4abhbn5f8jjvci-cap-b-dev"
CAP_C = "/nix/store/dw5l2kin75s8gvfc55j81dj45y1hspwl-cap-c"

# -- Recorded conversations -----------------------------------------------------------


class Recording(NamedTuple):
    """A serve.txt: what the client sent, what the server answered, its stderr."""

    sent: list[bytes]
    answered: list[bytes]
    meanings: list[str]
    stderr: str


def recording(version: str) -> Recording:
    text = (TRANSCRIPTS / f"nix-{version}/serve.txt").read_text(encoding="utf-8")
    lines = text.splitlines()

    def marked(mark: str) -> list[str]:
        return [line[len(mark) :] for line in lines if line.startswith(mark)]

    return Recording(
        [bytes.fromhex(line) for line in marked("> ")],
        [bytes.fromhex(line) for line in marked("< ")],
        marked("# = "),
        "".join(f"{line}\n" for line in marked("! ")),
    )


class RecordedBuild(NamedTuple):
    """One of the three builds in every serve.txt."""

    path: str
    drv: str  # what its .drv file would say
    timeout: int


def recorded_build(digit: int, script: str, timeout: int = 0) -> RecordedBuild:
    out = f"/nix/store/{str(digit) * 32}-rec-{digit}"
    environment = (
        f'("PATH","/usr/bin:/bin"),("builder","/bin/sh"),("name","rec-{digit}"),'
        f'("out","{out}"),("system","x86_64-linux")'
    )
    drv = (
        f'Derive([("out","{out}","","")],[],[],"x86_64-linux","/bin/sh",'
        f'["-c","{script}"],[{environment}])'
    )
    return RecordedBuild(f"{out}.drv", drv, timeout)


RECORDED_BUILDS = (
    recorded_build(1, "echo hello; echo x > $out"),
    recorded_build(2, "echo oops; exit 3"),
    recorded_build(3, "sleep 5", timeout=1),
)

# -- Programs -------------------------------------------------------------------------

# Plays the server's side of a recording and keeps what it is sent.
PLAYER = """
import pathlib, signal, sys

if "-G" in sys.argv:  # it has no configuration to show
    sys.exit(1)
signal.alarm(300)  # rather than wait for ever for bytes that do not come
sent = open({sent!r}, "wb")
lines = pathlib.Path({script!r}).read_text(encoding="utf-8").splitlines()
for mark, text in ((line[0], line[2:]) for line in lines):
    if mark == ">":
        sent.write(sys.stdin.buffer.read(len(text) // 2))
        sent.flush()
    elif mark == "<":
        sys.stdout.buffer.write(bytes.fromhex(text))
        sys.stdout.flush()
    elif mark == "!":
        sys.stderr.buffer.write(text.encode() + b"\\n")
sent.write(sys.stdin.buffer.read())
sent.close()
"""

# A builder. It has the paths that the file `have` names, and writes down each call.
# Manners are those of the host that FAKE_HOST names, if it names one. As a master (-N)
# it shares nothing, as an ssh may that was built without that; with the manners "share"
# it listens as a master does, for a while, and no session goes through it.
SSH = """
import os, signal, socket, struct, sys, time

if "-G" in sys.argv:  # it has no configuration to show
    sys.exit(1)
manners = os.environ.get("FAKE_MANNERS", "")
if os.environ.get("FAKE_HOST", "") not in sys.argv[sys.argv.index("--") + 1]:
    manners = ""
options = os.environ.get("NIX_SSHOPTS", "")
with open({journal!r}, "a") as journal:
    print(repr(("ssh", sys.argv[1:], options, "")), file=journal)

def listen():
    signal.alarm(40)
    (path,) = (word[14:] for word in sys.argv if word[:14] == "-oControlPath=")
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(64)
    with open(path + ".pid", "w") as file:
        print(os.getpid(), file=file)
    os.dup2(1, 2)
    while True:
        server.accept()

def read(count):
    data = sys.stdin.buffer.read(count)
    if len(data) < count:
        sys.exit(0)
    return data

def number():
    return struct.unpack("<Q", read(8))[0]

def string():
    length = number()
    return read(length + -length % 8)[:length].decode()

def strings(each=1):
    return [string() for _ in range(each * number())]

def send(*values):
    for value in values:
        if isinstance(value, int):
            data = struct.pack("<Q", value)
        else:
            data = value.encode()
            data = struct.pack("<Q", len(data)) + data + bytes(-len(data) % 8)
        sys.stdout.buffer.write(data)
    sys.stdout.flush()

def end(status, words):
    sys.stdout.flush()
    sys.exit(print(words, file=sys.stderr) or status)

if "check" in sys.argv and os.path.exists(sys.argv[4] + ".pid"):
    with open(sys.argv[4] + ".pid") as file:
        end(0, f"Master running (pid={{file.read().strip()}})")
if "-O" in sys.argv:
    end(255, "Control socket connect: Connection refused")
if manners == "refuse":
    end(255, "root@b1: Permission denied (publickey).")
if manners == "away":
    end(255, "ssh: connect to host b1 port 22: Connection refused")
if "-N" in sys.argv and manners == "cannot share":
    with open({journal!r} + ".master", "w") as file:
        print(os.getpid(), file=file)
    print("disabling multiplexing", file=sys.stderr)
    os.close(2)
    time.sleep(60)
if "-N" in sys.argv:
    listen() if manners == "share" else sys.exit(0)
if manners == "exit 127":
    end(127, "sh: 1: nix-store: not found")
if manners == "noise":
    print("Welcome to the builder!", flush=True)
if manners == "half a greeting":
    send(0x5452EECB)
    sys.stdout.buffer.write(bytes(3))
    end(1, "nix-store: out of memory")
read(16)
send(0x5452EECB, 0x106 if manners == "too old" else 0x207)
while True:
    command = number()
    if command == 1:
        read(16)
        asked = strings()
        if manners == "huge string":
            send(1, 2**63)
        elif manners == "endless list":
            send(2**63)
            end(1, "gone")
        if manners == "flood":
            send(2**63)
        while manners == "flood":
            send(*["x" * 4000] * 64)
        with open({have!r}) as have:
            found = sorted(set(asked) & set(have.read().split()))
        send(len(found), *found)
    elif command == 2:
        for path in strings():
            send(path, "", 0, 0, 0, "sha256:" + 52 * "0", "", 0)
        send("")
    elif command == 8:
        string(), strings(4), strings(), string(), string(), strings(), strings(2)
        read(48)
        time.sleep(30 if manners == "no line, no end" else 0)
        print("log of the build", file=sys.stderr, flush=True)
        time.sleep(30 if manners == "one line, no end" else 0)
        for line in range(7 if manners == "a line each second" else 0):
            time.sleep(1)
            print(line, file=sys.stderr, flush=True)
        if manners == "half-way":
            sys.stdout.buffer.write(bytes(12))
            end(1, "Connection to b1 closed by remote host.")
        status = int(os.environ.get("FAKE_STATUS", "0"))
        send(status, "it went wrong" if status else "", 0, 0, 0, 0, 0)
"""

COPY = """
import os, sys

if sys.argv[1:] == ["--version"]:
    if os.environ.get("FAKE_MANNERS") == "vanish":
        os.unlink(sys.argv[0])
    sys.exit(print("nix-copy-closure (Nix) " + os.environ.get("FAKE_NIX", "2.34.8")))
options = os.environ.get("NIX_SSHOPTS", "")
held = os.environ.get("NIX_HELD_LOCKS", "")
with open({journal!r}, "a") as journal:
    print(repr((sys.argv[0], sys.argv[1:], options, held)), file=journal)
if os.environ.get("FAKE_MANNERS") == "copy fails":
    sys.exit("error: the disk is full")
if os.environ.get("FAKE_MANNERS") == "cut off once" and "--from" in sys.argv:
    cut = {have!r} + ".cut"
    if not os.path.exists(cut):
        open(cut, "w").close()
        sys.exit("error: unexpected end-of-file")
if "--to" in sys.argv:
    with open({have!r}, "a") as have:
        print(*(path for path in sys.argv if path[:11] == "/nix/store/"), file=have)
print("warning: deprecated setting 'build-hook' found", file=sys.stderr)
print("copying 1 paths...", file=sys.stderr)
"""


def write_program(path: Path, text: str, interpreter: str = sys.executable) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{interpreter} -IS\n{text}", encoding="utf-8")
    path.chmod(0o755)
    return path


def fake_player(directory: Path, version: str) -> Path:
    """Make an `ssh` there that plays the recording; returns the file of what it got."""
    script = TRANSCRIPTS / f"nix-{version}/serve.txt"
    sent = directory / "sent"
    text = PLAYER.format(script=str(script), sent=str(sent))
    write_program(directory / "ssh", text)
    return sent


# -- A fake Nix -----------------------------------------------------------------------


def number(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str) -> bytes:
    data = value.encode()
    return number(len(data)) + data + bytes(-len(data) % 8)


def texts(values: Iterable[str]) -> bytes:
    encoded = [text(value) for value in values]
    return number(len(encoded)) + b"".join(encoded)


class Call(NamedTuple):
    """One start of a fake program."""

    program: str
    arguments: list[str]
    sshopts: str
    held_locks: str

    @property
    def is_master(self) -> bool:
        return self.program == "ssh" and "-N" in self.arguments

    @property
    def is_session(self) -> bool:
        return self.program == "ssh" and not {"-N", "-O"} & set(self.arguments)

    @property
    def destination(self) -> str:
        """The host that ssh was called with."""
        return self.arguments[self.arguments.index("--") + 1]


class Answer(NamedTuple):
    """What came of one hook process."""

    status: int
    lines: list[str]  # of descriptor 2
    log: str  # of descriptor 4

    @property
    def replies(self) -> list[str]:
        return [line[2:] for line in self.lines if line.startswith("# ")]

    @property
    def messages(self) -> str:
        """All that is no reply."""
        return "\n".join(line for line in self.lines if not line.startswith("# "))

    @property
    def after_accept(self) -> list[str]:
        return self.lines[self.lines.index("# accept") + 1 :]


class Client:
    """A Nix of either dialect with a store, one machine and fake programs.

    The hook is in its libexec/nix, so that the fake nix-copy-closure in its bin
    is found before any real one.
    """

    def __init__(self, root: Path, *, old: bool) -> None:
        self.root, self.old = root, old
        self.prefix = root / "prefix"
        self.slots = root / "slots"
        self.machines = root / "machines"
        self.have = root / "have"
        self.journal = root / "journal"
        self.store = root / "chroot/nix/store"
        self.hook = self.prefix / "libexec/nix/build-remote"
        self.arguments = ["x86_64-linux", "0", "0", "0"] if old else ["3"]
        for directory in (self.hook.parent, self.store):
            directory.mkdir(parents=True)
        self.machines.write_text("root@b1 x86_64-linux - 2\n", encoding="utf-8")
        for file in (self.have, self.journal):
            file.touch()
        shutil.copy(HOOK, self.hook)
        # The fakes never recover, so there is nothing to wait for.
        self.constants = {"PAUSE_S": 0.4, "PAUSE_LIMIT_S": 5.0, "AWAY_TIMEOUT_S": 2.0}
        # And a slow machine has time to start them.
        self.constants |= {"REPLY_S": 30, "RETIRE_S": 30}
        for drv in (CAP_A_DRV, CAP_B_DRV):
            shutil.copy(TRANSCRIPTS / Path(drv).name, self.store)
        self.ssh = self.program("bin/ssh", SSH)
        self.copy = self.program("bin/nix-copy-closure", COPY)
        store = f"local?root={root}/chroot"
        self.settings = {
            "builders": f"@{self.machines}",
            "system": "x86_64-linux",
            "max-jobs": "1",
            "experimental-features": "",
            "fsync-metadata": "true",
            "store": store,
        }
        self.environ = {
            "HOME": str(root),
            "PATH": str(self.prefix / "bin"),
            "NIX_REMOTE": store if old else "",
            "NIX_REMOTE_SYSTEMS": str(self.machines) if old else "",
            "NIX_CURRENT_LOAD": str(self.slots),
            "NIX_BLIND_HOOK": "1",  # the fake builder has no sh
        }

    def program(self, name: str, source: str) -> Path:
        files = {"journal": str(self.journal), "have": str(self.have)}
        return write_program(self.prefix / name, source.format(**files))

    def calls(self) -> list[Call]:
        lines = self.journal.read_text(encoding="utf-8").splitlines()
        return [Call(*ast.literal_eval(line)) for line in lines]

    def sessions(self) -> list[Call]:
        return [call for call in self.calls() if call.is_session]

    def request(
        self,
        drv: str = CAP_A_DRV,
        system: str = "x86_64-linux",
        features: Iterable[str] = (),
        *,
        willing: bool = True,
    ) -> bytes:
        if self.old:
            words = [str(int(willing)), system, drv, ",".join(features)]
            return f"{' '.join(words)}\n".encode()
        start = text("try") + number(willing)
        return start + text(system) + text(drv) + texts(features)

    def lists(self, inputs: Iterable[str], outputs: Iterable[str]) -> bytes:
        """What follows an accept."""
        if self.old:
            return "".join(
                f"{' '.join(paths)} \n" for paths in (inputs, outputs)
            ).encode()
        return texts(inputs) + texts(outputs)

    def build(self, drv: str = CAP_A_DRV, *inputs: str) -> Answer:
        """Ask for cap-a or cap-b, and go on as if that were accepted."""
        outputs = [CAP_A] if drv == CAP_A_DRV else [CAP_B, CAP_B_DEV]
        return self.run(self.request(drv) + self.lists(inputs, outputs))

    def run(self, stdin: bytes) -> Answer:
        """One hook process: 1 and 2 are one pipe, 4 is the log's."""
        if not self.old:
            pairs = (text(k) + text(v) for k, v in self.settings.items())
            stdin = b"".join(number(1) + pair for pair in pairs) + number(0) + stdin
        descriptors = 'exec "$@" 4>&1 1>&2'
        start = launcher(str(self.hook), *assigned(self.constants))
        program = [sys.executable, "-ISc", start, *self.arguments]
        done = subprocess.run(
            ["/bin/sh", "-c", descriptors, "sh", *program],
            input=stdin,
            capture_output=True,
            env={name: value for name, value in self.environ.items() if value},
            timeout=HANGS_S,
            check=False,
        )
        lines = done.stderr.decode().splitlines()
        return Answer(done.returncode, lines, done.stdout.decode())
