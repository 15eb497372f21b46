"""What a builder can do to its client: give the outputs that are wanted, and nothing else.

b1 runs a nix-store that lies, in the way that its file /tmp/lie names, for the path in
/tmp/victim.  b2 is honest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from scene import (
    Scene,
    change_hook,
    forget,
    other,
    registered,
    scene,
    valid,
)

pytestmark = pytest.mark.engines

LIAR = r"""#!/usr/bin/env python3
import hashlib, os, struct, sys

if "--serve" not in sys.argv:
    os.execv("/usr/bin/nix-store", ["nix-store", *sys.argv[1:]])
lie = open("/tmp/lie").read()
victim = open("/tmp/victim").read()
outputs = []

def read(count):
    data = sys.stdin.buffer.read(count)
    if len(data) < count:
        sys.exit(0)
    return data

def number():
    return struct.unpack("<Q", read(8))[0]

def text():
    length = number()
    return read(length + -length % 8)[:length].decode()

def texts(each=1):
    return [text() for _ in range(each * number())]

def pack(*values):
    result = b""
    for value in values:
        if isinstance(value, int):
            result += struct.pack("<Q", value)
        else:
            data = value.encode()
            result += struct.pack("<Q", len(data)) + data + bytes(-len(data) % 8)
    return result

def send(*values):
    sys.stdout.buffer.write(pack(*values))
    sys.stdout.flush()

def archive(path):
    words = ("nix-archive-1", "(", "type", "regular", "contents")
    found = pack(*words, "forged by b1\n", ")")
    if lie == "smuggle" and path != victim:
        found += pack(0x4558494E, path, 0, "", 0, 1) + archive(victim)
        found += pack(0x4558494E, victim, 0, "", 0, 0)
    return found

def info(path):
    data = archive(path)
    digest = "sha256:" + hashlib.sha256(archive(victim)).hexdigest()
    refers = [path]
    if lie in ("refer", "late") and path != victim:
        refers.append(victim)
    if lie == "outside":
        refers.append("/nix/store/../../etc/passwd")
    if lie == "spoil":
        digest = "sha256:" + 64 * "1"
    size = len(data) - 8 if lie == "grow" else len(data)
    deriver = "junk" if lie == "derive" else ""
    send(path, deriver, len(refers), *refers, size, size, digest, "", 0)

read(16)
send(0x5452EECB, 0x207)
while True:
    command = number()
    if command == 1:
        read(16)
        asked = [path for path in texts() if not path.endswith((".drv", "-mark"))]
        asked = [] if lie in ("lack", "reckon") else asked
        send(len(asked), *asked)
    elif command == 2:
        for path in texts():
            if lie != "forget" and path in (*outputs, victim):
                info(path)
        if lie == "volunteer":
            info(victim)
        send("")
    elif command == 3:
        path = text()
        if path not in (*outputs, victim):
            sys.exit(f"error: path '{path}' is not valid")
        sys.stdout.buffer.write(archive(path))
        sys.stdout.flush()
    elif command == 7:
        read(8)
        texts()
        send(len(outputs) + 1, *outputs, victim)
    elif command == 8:
        drv, fields = text(), texts(4)
        outputs += fields[1::4]
        texts(), text(), text(), texts(), texts(2)
        read(48)
        if os.path.exists("/tmp/distrust"):
            open("/tmp/outputs", "w").write(" ".join(outputs))
            sys.exit("error: you are not privileged to build derivations")
        if lie == "stop":
            send(0)
            sys.stdin.buffer.read()
        send(0, "", 0, 0, 0, 0, 0)
    elif command == 6:
        texts()
        read(48)
        outputs += open("/tmp/outputs").read().split()
        send(0)
    elif command == 9:
        text(), text(), text(), texts(), number()
        size = number()
        number(), texts(), text(), read(size)
        if lie == "reckon":
            sys.exit("error: hash mismatch importing path '/nix/store/x'")
        send(1)
    else:
        sys.exit(f"unknown command {command}")
"""
LIES = ("refer", "outside", "spoil", "forget", "volunteer", "smuggle", "grow", "derive")
numbers = itertools.count()


def innocent() -> str:
    return f'mk "innocent-{next(numbers)}" "hostname > $out" {{}}'


@pytest.fixture(scope="module")
def hosts(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    builder = other(pytestconfig, client_engine)
    with scene(client_engine, builder, builder) as running:
        running.builder.write("/usr/local/bin/nix-store", LIAR, 0o755)
        yield running


@pytest.fixture
def nix(hosts: Scene) -> Scene:
    forget(hosts)
    change_hook(hosts)
    victim = hosts.output(f'mk "victim-{next(numbers)}" "hostname > $out" {{}}')
    hosts.builder.write("/tmp/victim", victim)
    return hosts


@pytest.fixture(params=["nix-copy-closure", "nix-store --import"])
def imports(nix: Scene, request: pytest.FixtureRequest) -> bool:
    """How outputs come in: the second with Nix 1.x and with old builders, which this makes
    of all."""
    old = bool(request.param == "nix-store --import")
    if old:
        change_hook(nix, JOINED_SINCE=0x999)
    return old


def lie(nix: Scene, how: str) -> str:
    """Have b1 tell that lie; returns the victim."""
    nix.builder.write("/tmp/lie", how)
    return nix.builder.read("/tmp/victim")


@pytest.mark.parametrize("how", LIES)
def test_nothing_comes_in_but_what_was_built(
    nix: Scene, how: str, imports: bool
) -> None:
    nix.machines("b1 - - 1\n")
    victim, expression = lie(nix, how), innocent()
    output = nix.output(expression)
    outcome = nix.build(expression, check=False)
    assert not registered(nix.client, victim)
    # The second way reads an archive to where it ends, and so gets what was built.
    honest = how in ("smuggle", "grow") and imports
    assert (outcome.status == 0, registered(nix.client, output)) == (honest, honest)


@pytest.mark.parametrize("how", ["refer", "volunteer"])
def test_nor_where_the_builder_does_not_trust_its_user(
    nix: Scene, how: str, imports: bool
) -> None:
    """Then the derivation is sent, and built by another command."""
    nix.machines("b1 - - 1\n")
    victim, expression = lie(nix, how), innocent()
    output = nix.output(expression)
    nix.builder.write("/tmp/distrust", "")
    outcome = nix.build(expression, check=False)
    nix.builder.run("rm", "/tmp/distrust")
    assert outcome.status != 0 and "does not trust its user" in outcome.log
    assert not registered(nix.client, victim) and not registered(nix.client, output)


@pytest.mark.parametrize("how", ["refer", "volunteer"])
def test_nor_into_a_chroot_store(nix: Scene, how: str, imports: bool) -> None:
    nix.machines("b1 - - 1\n")
    victim, expression = lie(nix, how), innocent()
    store = ("--store", f"local?root=/tmp/root-{next(numbers)}")
    load = {"NIX_CURRENT_LOAD": f"/tmp/load-{next(numbers)}"}
    outcome = nix.build(expression, *store, check=False, env=load)
    assert outcome.status != 0 and "cannot fetch the outputs" in outcome.log
    query = ("nix-store", *store, "--check-validity", victim)
    assert nix.client.run(*query, check=False).returncode != 0


def test_a_reference_that_is_not_valid_here_is_named(nix: Scene, imports: bool) -> None:
    nix.machines("b1 - - 1\n")
    victim, expression = lie(nix, "refer"), innocent()
    output = nix.output(expression)
    log = " ".join(nix.build(expression, check=False).log.split())
    assert f"the output '{output}' refers to '{victim}'" in log
    assert "from 'ssh://b1'" in log


def test_what_is_valid_here_may_be_referred_to(nix: Scene, imports: bool) -> None:
    nix.machines("b1 - - 1\n")
    victim = lie(nix, "refer")
    nix.client.write("/tmp/here", f"here {next(numbers)}")
    here = nix.client.run("nix-store", "--add", "/tmp/here").stdout.strip()
    nix.builder.write("/tmp/victim", here)
    output = nix.build(innocent()).output
    assert valid(nix.client, output) and not registered(nix.client, victim)
    found = nix.client.run("nix-store", "-q", "--references", output).stdout.split()
    assert set(found) == {here, output}


@pytest.mark.parametrize("how", ["spoil", "forget", "refer", "grow"])
def test_what_one_machine_has_spoilt_another_builds(nix: Scene, how: str) -> None:
    nix.machines("b1 - - 1 8\nb2 - - 1\n")
    lie(nix, how)
    outcome = nix.build(innocent())
    assert nix.client.read(outcome.output) == "b2\n"
    assert "trying again" in outcome.log


@pytest.mark.parametrize("how", ["lack", "reckon"])
def test_what_one_machine_cannot_take_in_another_builds(nix: Scene, how: str) -> None:
    """It never has what was sent, or says that it was spoilt on the way."""
    nix.machines("b1 - - 1 8\nb2 - - 1\n")
    lie(nix, how)
    number = next(numbers)
    source = f'builtins.toFile "source-{number}" "{number}"'
    script = f"cat ${{{source}}}; hostname > $out"
    outcome = nix.build(f'mk "taken-in-{number}" "{script}" {{}}')
    assert nix.client.read(outcome.output) == "b2\n"
