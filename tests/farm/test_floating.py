"""Derivations whose output paths depend on what is in them (floating content-addressed)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

import pytest
from scene import (
    HOOK,
    INSTALLED,
    SLOTS,
    Scene,
    change_hook,
    end_masters,
    forget,
    other,
    registered,
    scene,
    suitable,
    valid,
    version,
)
from test_trust import LIAR

FEATURES = "experimental-features = nix-command ca-derivations\n"
FLOATING = """
      __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256";
      requiredSystemFeatures = [ "ca-derivations" ];"""
numbers = itertools.count()


def graph() -> str:
    """One that reads an output of another, which has two."""
    number = next(numbers)
    return f"""
      let below = mk "below-{number}" "uname -n > $out; echo $out > $dev"
            {{ outputs = [ "out" "dev" ]; {FLOATING} }};
      in mk "above-{number}" "cat ${{below.dev}} ${{below}} > $out; uname -n >> $out"
            {{ {FLOATING} }}"""


@pytest.fixture(scope="module")
def hosts(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    """Both know of such derivations; 2.3 has never heard of them."""
    client = suitable(pytestconfig, client_engine, (2, 8).__le__)
    builder = suitable(pytestconfig, other(pytestconfig, client), (2, 4).__le__)
    with scene(client, builder, client_conf=FEATURES, builder_conf=FEATURES) as running:
        yield running


@pytest.fixture
def nix(hosts: Scene) -> Scene:
    forget(hosts)
    hosts.client.copy(HOOK, INSTALLED)
    hosts.machines("b1 - - 2 1 ca-derivations\n")
    return hosts


@pytest.mark.engines
def test_they_are_built_there_and_known_here(nix: Scene) -> None:
    expression = graph()
    outcome = nix.build(expression)
    below, *there = nix.client.read(outcome.output).split()
    assert there == ["b1", "b1"] and valid(nix.client, below, outcome.output)
    again = nix.build(expression)
    assert again.output == outcome.output and "building" not in again.log
    nix.settle()
    assert nix.locks() == []
    assert not folders(nix)


def folders(nix: Scene) -> list[str]:
    """Those in which Nix is told where the outputs are."""
    return [
        path.name for path in nix.client.path("/tmp").glob("nix-build-remote-*/cache*")
    ]


@pytest.mark.engines
def test_they_come_into_a_chroot_store(nix: Scene) -> None:
    store = f"/srv/root-{next(numbers)}"
    outcome = nix.build(graph(), "--store", f"local?root={store}")
    assert nix.client.path(f"{store}{outcome.output}").exists()


@pytest.mark.engines
def test_one_that_fails_fails(nix: Scene) -> None:
    bad = graph().replace("uname -n > $out", "echo oops; exit 3")
    outcome = nix.build(bad, check=False)
    assert outcome.status != 0 and "oops" in outcome.log
    assert "trying again" not in outcome.log


@pytest.mark.engines
def test_a_builder_that_is_too_old_is_told_of(pytestconfig: pytest.Config) -> None:
    client = suitable(pytestconfig, "2.34", (2, 8).__le__)
    builder = suitable(pytestconfig, "2.3", lambda found: found < (2, 4))
    assert version(builder) < (2, 4)
    with scene(client, builder, client_conf=FEATURES) as running:
        running.machines("b1 - - 2 1 ca-derivations\n")
        outcome = running.build(graph(), check=False)
        assert outcome.status != 0
        assert "too old for a content-addressed derivation" in outcome.log


def alone(script: str = "hostname > $out", *, below: str = "") -> str:
    return f'{below} mk "alone-{next(numbers)}" "{script}" {{ {FLOATING} }}'


@pytest.mark.parametrize("reads", [False, True], ids=["itself", "others and itself"])
def test_an_output_may_name_itself(nix: Scene, *, reads: bool) -> None:
    """With one Nix only: 2.8 hashes such outputs in another way than newer ones."""
    number = next(numbers)
    known = f'mk "known-{number}" "echo $out > $out" {{}}'
    floating = f'mk "below-{number}" "echo $out > $out" {{ {FLOATING} }}'
    below = f"let one = {known}; two = {floating}; in"
    script = (
        "cat ${one} ${two} > $out; echo $out >> $out" if reads else "echo $out > $out"
    )
    outcome = nix.build(alone(script, below=below))
    named = nix.client.read(outcome.output).split()
    query = ("nix-store", "--query", "--references", outcome.output)
    assert len(named) == (3 if reads else 1) and named[-1] == outcome.output
    assert {*nix.client.run(*query).stdout.split()} == {*named}
    assert valid(nix.client, *named)


# -- A builder that lies --------------------------------------------------------------

PLAIN = 'send(0, "", 0, 0, 0, 0, 0)'
TELLS = """
        told = open("/tmp/told").read()
        send(0, "", 0, 0, 0, 0, 1, "sha256:" + 64 * "0" + "!out", told)
"""


@pytest.fixture
def liar(nix: Scene) -> Iterator[Scene]:
    """Its builder says of a floating output what is in /tmp/told."""
    assert PLAIN in LIAR
    nix.builder.write("/tmp/lie", "")
    nix.builder.write(
        "/usr/local/bin/nix-store", LIAR.replace(PLAIN, TELLS.strip()), 0o755
    )
    yield nix
    nix.builder.run("rm", "/usr/local/bin/nix-store")


@pytest.mark.engines
def test_what_another_derivation_makes_is_no_output(liar: Scene) -> None:
    victim = liar.output(f'mk "victim-{next(numbers)}" "hostname > $out" {{}}')
    last = victim.rpartition("/")[2]
    told = {"id": "sha256:0!out", "outPath": last, "signatures": []}
    liar.builder.write("/tmp/victim", victim)
    liar.builder.write("/tmp/told", json.dumps({**told, "dependentRealisations": {}}))
    outcome = liar.build(alone(), check=False)
    assert outcome.status != 0 and "that of another path" in " ".join(
        outcome.log.split()
    )
    assert not registered(liar.client, victim)


@pytest.mark.parametrize("told", ["[" * 200_000, "{}", "7", '"', '{"outPath": 7}'])
def test_what_makes_no_sense_is_no_output(liar: Scene, told: str) -> None:
    liar.builder.write("/tmp/victim", "/nix/store/x")
    liar.builder.write("/tmp/told", told)
    log = liar.build(alone(), check=False).log
    assert "does not say which paths the outputs have" in " ".join(log.split())
    assert "a bug" not in log


# -- What is left, and where ----------------------------------------------------------


KILLED = """
real = hook.write_private
def write(path, *rest, **more):
    real(path, *rest, **more)
    if "/cache-" in path:
        hook.os.kill(hook.os.getpid(), 9)
hook.write_private = write
"""


def test_what_a_hook_leaves_that_is_killed_the_next_removes(nix: Scene) -> None:
    change_hook(nix, KILLED)
    nix.build(alone(), check=False)
    assert folders(nix)
    nix.client.copy(HOOK, INSTALLED)
    nix.build(alone())
    assert not folders(nix)


@pytest.mark.parametrize("lacks", ["size=128k", "nr_inodes=60"])
def test_a_slot_directory_that_is_full_is_not_needed(nix: Scene, lacks: str) -> None:
    nix.client.run("mkdir", "-p", SLOTS)
    nix.client.run("mount", "-t", "tmpfs", "-o", f"{lacks},mode=700", "small", SLOTS)
    try:
        nix.build(alone())
        fill = f"cd {SLOTS}; while echo x > $(mktemp -p . full.XXXXXXXX); do :; done"
        nix.client.run("sh", "-c", f"{fill}; cat /dev/zero > full", check=False)
        nix.build(alone())
    finally:
        nix.settle()
        end_masters(nix)
        nix.client.run("umount", SLOTS)
