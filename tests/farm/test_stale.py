"""Locks on a builder that nobody there will ever free, as those of a dead client's Nix.

b1 is the likeliest of two.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest
from lab import Inside, poll
from scene import Run, Scene, change_hook, end_masters, forget, other, scene, valid

LONG_S = 120

numbers = itertools.count()

# Says something all the time, and says where it was built when it is told to go on.
NOISY = """
  touch /tmp/held
  while ! [ -e /tmp/go ]; do echo noise; sleep 0.05; done
  hostname > $out
"""


def noisy() -> str:
    return f"mk \"noisy-{next(numbers)}\" ''{NOISY}'' {{}}"


@pytest.fixture(scope="module")
def hosts(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    builder = other(pytestconfig, client_engine)
    with scene(client_engine, builder, builder) as running:
        yield running


@pytest.fixture
def nix(hosts: Scene) -> Iterator[Scene]:
    forget(hosts)
    change_hook(hosts)
    hosts.machines("b1 - - 1 8\nb2 - - 1\n")
    for builder in hosts.builders:
        builder.run("rm", "-f", "/tmp/go", "/tmp/held")
    yield hosts
    for builder in hosts.builders:
        builder.write("/tmp/go", "")
    hosts.clear()


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


def at_work(nix: Scene, run: Run, number: int) -> None:
    there = nix.builders[number - 1].path("/tmp/held")
    poll(lambda: there.exists() or run.ended, f"a build on b{number}")
    assert not run.ended, run.log


@pytest.mark.engines
def test_after_a_lost_session_a_build_goes_to_another_machine_that_is_free(
    nix: Scene,
) -> None:
    expression = noisy()
    output = nix.output(expression)
    run = nix.start(expression)
    at_work(nix, run, 1)
    with hold(nix, output):
        end_masters(nix)
        at_work(nix, run, 2)
        nix.builders[1].write("/tmp/go", "")
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
        run = nix.start(expression, "--max-silent-time", "1")
        run.says("is waiting for lock on")
        nix.builder.run("sleep", "2")
    at_work(nix, run, 1)
    nix.builder.write("/tmp/go", "")
    assert run.end().status == 0
    assert "cannot build" not in run.log


def test_a_lock_on_the_builder_is_told_of_and_waited_for_only_so_long(
    nix: Scene,
) -> None:
    change_hook(nix, STILL_S=1, STALLED_S=3)
    meet(nix)
    expression = noisy()
    with hold(nix, nix.output(expression)):
        run = nix.start(expression)
        run.says("is waiting for lock on")
        at_work(nix, run, 2)
        nix.builders[1].write("/tmp/go", "")
        outcome = run.end()
    assert nix.client.read(outcome.output) == "b2\n"
    assert "cannot build" in outcome.log
