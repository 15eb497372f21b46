"""The stand-in for ssh, with the manners of each nix-copy-closure that there is.

What a Nix of the matrix does is seen by a spy. Programs that we do not have are played:
the real one still copies, but what it takes for ssh talks to the ssh that it finds as
the other program would, and only then joins the two.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from lab import HANGS_S
from scene import HOOK, Scene, forget, masters, other, scene, suitable, valid, version

TIMEOUT_S = HANGS_S  # one that hangs would do so for hours
TRACE = "/tmp/trace"
PREFIX = "/opt/program"
REPLY = bytes.fromhex("cbee525400000000").decode("latin-1")  # a builder's first word
STARTED = "started\n"


class Program(NamedTuple):
    """A nix-copy-closure that is played: what it says of its version, how it calls ssh
    (HOST and OPTIONS are filled in), what it says and hears before it speaks as a
    client does, and whether its way with locks is that of 2.29."""

    version: str = ""
    call: tuple[str, ...] = ()  # as the real one
    steps: tuple[tuple[str, str], ...] = ()
    retires: bool = False


LOCAL_COMMAND = ("-oPermitLocalCommand=yes", "-oLocalCommand=echo started")
SERVE = ("nix-store", "--serve", "--write")
HEAR = ("hear", STARTED)
EXEC = ("say", f"exec {' '.join(SERVE)}\n")
LIX = """\
nix-copy-closure (Lix, like Nix) 2.93.0
System type: x86_64-linux
Additional system types: i686-linux, x86_64-v1-linux
Features: gc, signed-caches
System configuration file: /etc/nix/nix.conf
User configuration files: /root/.config/nix/nix.conf:/etc/xdg/nix/nix.conf
Store directory: /nix/store
Data directory: /nix/store/1v3xs4b3cnjzdmnyhk1v8jhpvbl8rywl-lix-2.93.0/share
"""
PLAYED = {
    "Determinate Nix 3.22": Program(
        "nix-copy-closure (Determinate Nix 3.22.2) 2.35.2\n",
        ("-x", "-a", "OPTIONS", *LOCAL_COMMAND, "-S", "none", "HOST", *SERVE),
        (HEAR,),
        retires=True,
    ),
    "Nix 2.15": Program(
        "nix-copy-closure (Nix) 2.15.1\n",
        ("HOST", "-x", "-a", "OPTIONS", *LOCAL_COMMAND, *SERVE),
        (HEAR,),
    ),
    "Lix 2.93.0": Program(
        LIX,
        ("HOST", "-x", "-T", "-oRemoteCommand=bash", "OPTIONS"),
        (("say", "echo started\n"), HEAR, EXEC),
    ),
}

# The ssh that the real program finds. It becomes the ssh that is next in PATH, so that
# the program ends that one; its child stands between the two.
SSH = """#!/usr/bin/python3
import json, os, shutil, subprocess, sys, threading

call, steps = {manners!r}
asked, way = sys.argv[1:], os.environ["WAY"]
os.environ["PATH"] = os.environ["PATH"].partition(":")[2]
local = "-oLocalCommand=echo started" in asked

def note(**what):
    with open({trace!r}, "a") as trace:
        print(json.dumps(dict(what, way=way)), file=trace)

if asked[:2] == ["-O", "check"]:
    if call:  # the one that is played never asks
        sys.exit(255)
    status = subprocess.run(["ssh", *asked]).returncode
    note(check=status)
    sys.exit(status)

fill = dict(HOST=asked[:1], OPTIONS=os.environ.get("NIX_SSHOPTS", "").split())
words = [word for part in call for word in fill.get(part, [part])] or asked
(reads, input), (output, writes) = os.pipe(), os.pipe()
if os.fork():
    os.dup2(reads, 0)
    os.dup2(writes, 1)
    os.execvp("ssh", ["ssh", *words])
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
kept = sorted((2, output, input, 64))
for before, after in zip(kept, kept[1:]):  # the hook waits for the end of some
    os.closerange(before + 1, after)

def send(data, to):
    while data:
        data = data[os.write(to, data):]

def read(count):
    data = b""
    while len(data) < count and (more := os.read(output, count - len(data))):
        data += more
    return data

def send_all():
    while data := os.read(0, 65536):
        send(data, input)
    os.close(input)

for what, text in steps:
    if what == "say":
        send(text.encode(), input)
    elif (heard := read(len(text))) != text.encode():
        note(heard=heard.decode("latin-1"))
        os._exit(1)
if call and local:
    send(b"started\\n", 1)
threading.Thread(target=send_all, daemon=True).start()
first = read(8)
note(first=first.decode("latin-1"), local=local, words=words, ssh=shutil.which("ssh"))
send(first, 1)
while data := os.read(output, 65536):
    send(data, 1)
os._exit(0)
"""
COPY = f"""#!/bin/sh
case $1 in --version) [ ! -s {PREFIX}/version ] || exec cat {PREFIX}/version;; esac
WAY=$1 PATH={PREFIX}/ssh:$PATH exec {PREFIX}/real/nix-copy-closure "$@"
"""
numbers = itertools.count()


def install(nix: Scene, program: Program) -> Scene:
    """Give the hook a prefix of its own, where that program comes before the real."""
    real = os.path.dirname(nix.client.run("sh", "-c", "command -v nix-store").stdout)
    nix.client.copy(HOOK, f"{PREFIX}/libexec/nix/hook")
    nix.client.write(f"{PREFIX}/version", program.version)
    nix.client.write(f"{PREFIX}/bin/nix-copy-closure", COPY, 0o755)
    ssh = SSH.format(manners=(program.call, program.steps), trace=TRACE)
    nix.client.write(f"{PREFIX}/ssh/ssh", ssh, 0o755)
    nix.client.run("ln", "-s", real, f"{PREFIX}/real")
    nix.client.run("ln", "-s", f"{real}/nix-store", f"{PREFIX}/bin/nix-store")
    return nix._replace(hook=("--option", "build-hook", f"{PREFIX}/libexec/nix/hook"))


def traced(nix: Scene, key: str) -> list[dict[str, Any]]:
    """What was noted since the last build began, of that kind."""
    notes = map(json.loads, nix.client.read(TRACE).splitlines())
    return [note for note in notes if key in note]


def build(nix: Scene) -> None:
    """Build what needs an input sent and an output fetched, and see that both came."""
    nix.client.write(TRACE, "")
    text = f"text {next(numbers)}"
    given = f"${{builtins.toFile ''input'' ''{text}''}}"
    expression = f'mk "a" "cat {given} > $out; hostname >> $out" {{}}'
    built = nix.build(expression, timeout=TIMEOUT_S).output
    assert nix.client.read(built) == f"{text}b1\n" and valid(nix.client, built)


def build_in_state(nix: Scene, state: str) -> None:
    """Build where no connection is up ("cold"), or where one is ("live"), and see that
    both ways went through the stand-in."""
    if state == "cold":
        forget(nix)
    elif not masters(nix):
        build(nix)
    assert bool(masters(nix)) == (state == "live")
    build(nix)
    connections = traced(nix, "first")
    assert {note["way"] for note in connections} == {"--to", "--from"}
    assert all("/bin-" in note["ssh"] for note in connections), connections


@pytest.fixture(scope="module")
def spied(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    with scene(client_engine, other(pytestconfig, client_engine)) as running:
        yield install(running, Program())


@pytest.fixture(scope="module", params=PLAYED)
def played(request: pytest.FixtureRequest) -> Iterator[Scene]:
    program = PLAYED[request.param]
    suits = (2, 29).__le__ if program.retires else (2, 29).__gt__
    with scene(suitable(request.config, "host", suits), "host") as running:
        yield install(running, program)


@pytest.fixture(params=["cold", "live"])
def state(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# -- Those of the matrix --------------------------------------------------------------


@pytest.mark.engines
def test_a_real_program_sends_and_fetches_through_the_stand_in(
    spied: Scene, state: str
) -> None:
    build_in_state(spied, state)
    spied.settle()


@pytest.mark.engines
def test_it_is_told_that_no_connection_is_shared_if_it_asks(
    spied: Scene, client_engine: str
) -> None:
    build(spied)
    ways = ["--to", "--from"] if version(client_engine) >= (2, 16) else []
    asked = {note["way"]: note["check"] for note in traced(spied, "check")}
    assert asked == dict.fromkeys(ways, 255)


@pytest.mark.engines
def test_it_hears_started_exactly_if_it_has_a_local_command(
    spied: Scene, client_engine: str
) -> None:
    build(spied)
    local = version(client_engine) >= (2, 15)
    expected = (local, STARTED if local else REPLY)
    connections = traced(spied, "first")
    assert {(note["local"], note["first"]) for note in connections} == {expected}


# -- Those that are played ------------------------------------------------------------


def test_a_played_program_sends_and_fetches_through_the_stand_in(
    played: Scene, state: str
) -> None:
    try:
        build_in_state(played, state)
    finally:
        played.clear()  # and no process is left behind
    assert {note["first"] for note in traced(played, "first")} == {REPLY}
