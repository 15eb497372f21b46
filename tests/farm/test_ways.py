"""Machines that are reached in other ways than by `nix-store --serve --write` over ssh."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from scene import Scene, forget, other, scene

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
