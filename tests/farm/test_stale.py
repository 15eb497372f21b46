"""Locks on a builder that nobody there will ever free, as those of a dead client's Nix.

b1 is the likeliest of two.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest
from held import NOISY, afresh, at_work, let_go, two_builders
from lab import Inside
from scene import Scene, change_hook, lose_connections, valid

numbers = itertools.count()


def noisy() -> str:
    return f"mk \"noisy-{next(numbers)}\" ''{NOISY}'' {{}}"


@pytest.fixture(scope="module")
def hosts(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    with two_builders(pytestconfig, client_engine) as running:
        yield running


@pytest.fixture
def nix(hosts: Scene) -> Iterator[Scene]:
    with afresh(hosts, slots=1) as nix:
        yield nix


@contextlib.contextmanager
def hold(nix: Scene, output: str) -> Iterator[Inside]:
    """Hold the output's lock on b1, from the moment on that Nix there lets go of it."""
    script = f"touch {output}.lock; exec flock -F {output}.lock sleep 3600"
    process = nix.builder.popen("sh", "-c", script)
    try:
        yield process
    finally:
        process.kill()
        nix.builder.run("rm", "-f", f"{output}.lock")


@pytest.mark.engines
def test_after_a_lost_session_a_build_goes_to_another_machine_that_is_free(
    nix: Scene,
) -> None:
    expression = noisy()
    output = nix.output(expression)
    run = nix.start(expression)
    at_work(run, nix.builder)
    with hold(nix, output):
        lose_connections(nix)
        at_work(run, nix.builders[1])
        let_go(nix.builders[1])
        outcome = run.end()
    assert nix.client.read(outcome.output) == "b2\n"
    assert valid(nix.client, outcome.output)


def meet(nix: Scene) -> None:
    """Let the hook learn that b1 tells what it waits for, as every Nix but 2.3 does."""
    nix.build(f'mk "first-{next(numbers)}" "echo > $out" {{}}')


def test_a_lock_on_the_only_machine_is_told_of_and_waited_for(nix: Scene) -> None:
    """And does not count as the build's silence."""
    change_hook(nix, STILL_S=1, STALLED_S=2, MARGIN_S=0)
    nix.machines("b1\n")
    meet(nix)
    expression = noisy()
    with hold(nix, nix.output(expression)):
        run = nix.start(expression, "--max-silent-time", "6")
        run.says("is waiting for lock on")
        nix.builder.run("sleep", "8")
    at_work(run, nix.builder)
    let_go(nix.builder)
    assert run.end().status == 0
    assert "cannot build" not in run.log


def test_a_lock_on_the_builder_is_told_of_and_waited_for_only_so_long(
    nix: Scene,
) -> None:
    change_hook(nix, STILL_S=1, STALLED_S=6)
    meet(nix)
    expression = noisy()
    with hold(nix, nix.output(expression)):
        run = nix.start(expression)
        run.says("is waiting for lock on")
        at_work(run, nix.builders[1])
        let_go(nix.builders[1])
        outcome = run.end()
    assert nix.client.read(outcome.output) == "b2\n"
    assert "cannot build" in outcome.log
