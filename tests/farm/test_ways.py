"""Machines that are reached in other ways than by `nix-store --serve --write` over ssh."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator

import pytest
from scene import INSTALLED, Scene, forget, other, scene, valid

pytestmark = pytest.mark.engines

numbers = itertools.count()
# A store in another place needs a sandbox, in which there has to be a shell.
SANDBOX = "sandbox-paths = /bin /usr /lib /lib64\n"


def fresh() -> str:
    return f'mk "fresh-{next(numbers)}" "echo here; hostname > $out" {{}}'


@pytest.fixture(scope="module")
def hosts(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    builder = other(pytestconfig, client_engine)
    conf = {"client_conf": SANDBOX, "builder_conf": SANDBOX}
    with scene(client_engine, builder, **conf) as running:
        yield running


@pytest.fixture
def nix(hosts: Scene) -> Scene:
    forget(hosts)
    return hosts


def test_a_program_and_a_store_there_may_be_named(nix: Scene) -> None:
    """The store's name has what a shell there would read in another way."""
    store = f"/tmp/a&b'-{next(numbers)}"
    uri = "ssh://b1?remote-program=env%20NIX_SHOW=1%20nix-store&remote-store="
    nix.machines(f"{uri}{store.replace('&', '%26')} - - 1\n")
    outcome = nix.build(fresh())
    assert nix.builder.path(f"{store}{outcome.output}").exists()
    assert not nix.builder.path(outcome.output).exists()


@pytest.mark.parametrize("uri", ["{}", "local?root={}", "localhost?remote-store={}"])
def test_a_store_here_is_a_machine(nix: Scene, uri: str) -> None:
    """Its line says which features it has."""
    store = f"/srv/here-{next(numbers)}"
    nix.machines(f"{uri.format(store)} - - 1 1 kvm\n")
    expression = fresh().replace("{}", '{ requiredSystemFeatures = [ "kvm" ]; }')
    outcome = nix.build(expression)
    assert "here" in outcome.log.splitlines()
    assert valid(nix.client, outcome.output)
    assert nix.client.path(f"{store}{outcome.output}").exists()


@pytest.mark.parametrize("uri", ["auto", "unix:///nix/var/nix/daemon-socket/socket"])
def test_the_usual_store_is_a_machine_to_another(nix: Scene, uri: str) -> None:
    nix.machines(f"{uri} - - 1\n")
    if uri != "auto":
        nix.client.start_daemon()
    there = f"/srv/root-{next(numbers)}"
    outcome = nix.build(fresh(), "--store", f"local?root={there}")
    assert "here" in outcome.log.splitlines()
    assert nix.client.path(f"{there}{outcome.output}").exists()
    assert valid(nix.client, outcome.output)


def test_the_store_here_is_no_machine_to_itself(nix: Scene) -> None:
    nix.machines("auto - - 1\n")
    outcome = nix.build(fresh(), check=False)
    assert outcome.status != 0 and "it is this very machine" in outcome.log


def test_a_build_in_a_store_here_fails_as_any_other(nix: Scene) -> None:
    nix.machines(f"/srv/here-{next(numbers)} - - 1\n")
    outcome = nix.build('mk "bad" "echo oops; exit 3" {}', check=False)
    assert outcome.status != 0 and "oops" in outcome.log.splitlines()
    assert "trying again" not in outcome.log


def test_a_build_in_a_store_here_obeys_a_timeout(nix: Scene) -> None:
    nix.machines(f"/srv/here-{next(numbers)} - - 1\n")
    slow = 'mk "slow" "sleep 60" {}'
    outcome = nix.build(slow, "--timeout", "1", check=False)
    assert outcome.status != 0 and "timed out" in outcome.log


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "SIGKILL"])
def test_a_build_in_a_store_here_ends_with_its_hook(nix: Scene, how: str) -> None:
    nix.machines(f"/srv/here-{next(numbers)} - - 1\n")
    run = nix.start('mk "long" "echo begun; sleep 98765" {}')
    run.says("begun")
    if how == "Ctrl-C":
        run.interrupt()
    else:
        nix.client.signal(getattr(signal, how), *nix.hooks())
    nix.settle()


def test_people_see_a_store_here(nix: Scene) -> None:
    store = f"/srv/here-{next(numbers)}"
    nix.machines(f"{store} - - 1\n")
    checked = nix.client.run(INSTALLED, "check", check=False)
    assert "All machines are well." in checked.stdout, checked.stdout
    for verb in ("status", "explain"):
        assert store in nix.client.run(INSTALLED, verb).stdout
