"""Derivations whose output paths depend on what is in them (floating content-addressed)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from scene import Scene, forget, other, scene, suitable, valid, version

pytestmark = pytest.mark.engines

FEATURES = "experimental-features = nix-command ca-derivations\n"
numbers = itertools.count()


def graph() -> str:
    """One that reads an output of another, which has two."""
    number = next(numbers)
    floating = """
      __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256";
      requiredSystemFeatures = [ "ca-derivations" ];"""
    return f"""
      let below = mk "below-{number}" "uname -n > $out; echo $out > $dev"
            {{ outputs = [ "out" "dev" ]; {floating} }};
      in mk "above-{number}" "cat ${{below.dev}} ${{below}} > $out; uname -n >> $out"
            {{ {floating} }}"""


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
    hosts.machines("b1 - - 2 1 ca-derivations\n")
    return hosts


def test_they_are_built_there_and_known_here(nix: Scene) -> None:
    expression = graph()
    outcome = nix.build(expression)
    below, *there = nix.client.read(outcome.output).split()
    assert there == ["b1", "b1"] and valid(nix.client, below, outcome.output)
    again = nix.build(expression)
    assert again.output == outcome.output and "building" not in again.log
    nix.settle()
    assert nix.locks() == []
    assert not list(nix.client.path("/nix/var/nix/current-load/ssh").glob("cache-*"))


def test_they_come_into_a_chroot_store(nix: Scene) -> None:
    store = f"/srv/root-{next(numbers)}"
    outcome = nix.build(graph(), "--store", f"local?root={store}")
    assert nix.client.path(f"{store}{outcome.output}").exists()


def test_one_that_fails_fails(nix: Scene) -> None:
    bad = graph().replace("uname -n > $out", "echo oops; exit 3")
    outcome = nix.build(bad, check=False)
    assert outcome.status != 0 and "oops" in outcome.log
    assert "trying again" not in outcome.log


def test_a_builder_that_is_too_old_is_told_of(pytestconfig: pytest.Config) -> None:
    client = suitable(pytestconfig, "2.34", (2, 8).__le__)
    builder = suitable(pytestconfig, "2.3", lambda found: found < (2, 4))
    assert version(builder) < (2, 4)
    with scene(client, builder, client_conf=FEATURES) as running:
        running.machines("b1 - - 2 1 ca-derivations\n")
        outcome = running.build(graph(), check=False)
        assert outcome.status != 0
        assert "too old for a content-addressed derivation" in outcome.log
