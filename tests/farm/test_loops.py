"""Machines that are this machine, and builders that would send builds on and back."""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Iterator

import pytest
from lab import HANGS_S, connect, poll
from scene import (
    HOOK,
    INSTALLED,
    Scene,
    change_hook,
    distrustful,
    forget,
    other,
    scene,
    suitable,
    version,
)

LONG_S = HANGS_S
CONF = f"""
max-jobs = {{jobs}}
build-hook = {INSTALLED}
builders = @/etc/nix/machines
"""

numbers = itertools.count()


def one() -> str:
    """A derivation that no other test has."""
    return f'mk "loop-{next(numbers)}" "hostname > $out" {{}}'


@pytest.fixture(scope="module")
def hosts(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    """A client and two builders, each of which may log in on all, and has the hook."""
    builder = other(pytestconfig, client_engine)
    with scene(client_engine, builder, builder) as running:
        for host in running.everybody:
            host.copy(HOOK, INSTALLED)
            for peer in running.everybody:
                connect(host, peer)
        yield running


@pytest.fixture
def nix(hosts: Scene) -> Iterator[Scene]:
    forget(hosts)
    change_hook(hosts)
    yield hosts
    hosts.settle()


@pytest.mark.engines
def test_a_machine_that_is_this_one_is_not_used(nix: Scene) -> None:
    nix.machines("client - - 4 8\nb2 - - 4\n")
    outcome = nix.build(one(), timeout=LONG_S)
    assert nix.client.read(outcome.output) == "b2\n"
    assert "it is this very machine" in outcome.log


@pytest.mark.engines
def test_a_build_fails_if_this_machine_is_the_only_one(nix: Scene) -> None:
    nix.machines("client - - 4\n")
    often = ("--option", "build-poll-interval", "1")
    outcome = nix.build(one(), *often, check=False, timeout=LONG_S)
    assert outcome.status != 0 and "it is this very machine" in outcome.log
    time.sleep(3)  # it is tried again, and the connection is there
    assert nix.build(one(), check=False, timeout=LONG_S).status != 0


def test_a_job_that_comes_late_to_this_machine_is_not_used(nix: Scene) -> None:
    """As of a batch system whose nodes share the store of who submits them."""
    path = "/usr/local/bin/queue"
    nix.client.write(path, '#!/bin/sh\nsleep 7\nexec nix-store "$@"\n', 0o755)
    nix.machines(f"ssh://client?remote-program={path} - - 4 8\nb2 - - 4\n")
    outcome = nix.build(one(), timeout=LONG_S)
    assert nix.client.read(outcome.output) == "b2\n"
    assert "it is this very machine" in outcome.log


def test_a_builder_that_has_the_derivation_is_not_taken_for_this_machine(
    nix: Scene,
) -> None:
    nix.machines("b1 - - 4\n")
    expression = one()
    drv = nix.client.run("nix-instantiate", nix.nix_build(expression)[1])
    nix.client.run("nix-copy-closure", "--to", "b1", drv.stdout.strip())
    outcome = nix.build(expression)
    assert nix.client.read(outcome.output) == "b1\n"
    assert "very machine" not in outcome.log


@pytest.fixture
def untrusting(
    client_engine: str, pytestconfig: pytest.Config, request: pytest.FixtureRequest
) -> Iterator[Scene]:
    """b1 lists the client, and asks its own hook, as for users it does not trust.

    Not with Nix 2.25 to 2.33, which forget the hook that nix.conf names.
    """
    builder = suitable(
        pytestconfig,
        other(pytestconfig, client_engine),
        lambda version: not (2, 25) <= version < (2, 34),
    )
    with distrustful(client_engine, builder, CONF.format(jobs=request.param)) as nix:
        nix.builder.copy(HOOK, INSTALLED)
        nix.builder.write("/etc/nix/machines", "client - - 4\n")
        connect(nix.builder, nix.client)
        yield nix
        nix.settle()


@pytest.mark.engines
@pytest.mark.parametrize("untrusting", [1], indirect=True)
def test_a_builder_does_not_send_on_what_it_can_build(untrusting: Scene) -> None:
    outcome = untrusting.build(one(), timeout=LONG_S)
    assert untrusting.client.read(outcome.output) == "b1\n"


# A name server that answers nobody, and notes what it is asked.
MUTE = """
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))
print("bound", flush=True)
while True:
    question = server.recv(512)
    with open("/tmp/asked", "ab") as asked:
        asked.write(question)
"""


@pytest.mark.parametrize("untrusting", [1], indirect=True)
def test_no_name_is_asked_for_but_of_a_machine_that_could_build_it(
    untrusting: Scene,
) -> None:
    builder = untrusting.builder
    builder.write("/etc/nix/machines", "far riscv64-linux\nnear - - 4\nnext - - 4\n")
    builder.write("/etc/resolv.conf", "nameserver 127.0.0.1\n")
    builder.write("/etc/nsswitch.conf", "hosts: files dns\n")
    server = builder.popen("python3", "-c", MUTE, stdout=subprocess.PIPE)
    try:
        assert server.stdout and server.stdout.readline() == b"bound\n"
        outcome = untrusting.build(one(), timeout=LONG_S)
    finally:
        server.kill()
        server.communicate()
    assert untrusting.client.read(outcome.output) == "b1\n"
    asked = builder.path("/tmp/asked").read_bytes()
    assert b"near" in asked and b"far" not in asked and b"next" not in asked


@pytest.mark.parametrize("untrusting", [0], indirect=True)
def test_a_builder_does_not_send_back_what_it_cannot_build(untrusting: Scene) -> None:
    outcome = untrusting.build(one(), check=False, timeout=LONG_S)
    assert outcome.status != 0


def test_a_head_node_sends_on_what_others_send_it(nix: Scene) -> None:
    """b1 lists b2 alone, not where its builds come from, and may do one at a time."""
    if version(nix.builder.engine.name) < (2, 4):
        pytest.skip("its ssh-ng needs Nix 2.4 here")
    conf = nix.builder.read("/etc/nix/nix.conf")
    nix.builder.write("/etc/nix/nix.conf", f"{conf}\n{CONF.format(jobs=1)}")
    nix.builder.write("/etc/nix/machines", "b2 - - 4\n")
    name = f"sent-{next(numbers)}"
    script = "touch /tmp/at-$name; while ! [ -e /tmp/go ]; do sleep 0.02; done"
    each = f'mk "{name}-${{toString n}}" "{script}; hostname > $out" {{}}'
    command = nix.nix_build(f"builtins.genList (n: {each}) 5")[:3]
    run = nix.launch(*command, "--store", "ssh-ng://b1", "--max-jobs", "0")
    begun = [host.path("/tmp").glob for host in nix.builders]
    poll(lambda: all([*files(f"at-{name}*")] for files in begun), "a build on each")
    for host in nix.builders:
        host.write("/tmp/go", "")
    outcome = run.end()
    assert outcome.status == 0, outcome.log
    built = {nix.builder.read(output).strip() for output in outcome.outputs}
    nix.builder.write("/etc/nix/nix.conf", conf)
    assert built == {"b1", "b2"}
