"""Two builders, of which b1 is the likelier, and builds that end when they are told to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from lab import Host, poll
from scene import Run, Scene, change_hook, come_back, forget, other, scene

GO, BEGUN = "/tmp/go", "/tmp/held"
LOOP = f"touch {BEGUN}; while ! [ -e {GO} ]; do SAY sleep 0.02; done; hostname > $out"
# Scripts of builds that are held, without a word or not, and then say where they were.
HELD, NOISY = LOOP.replace("SAY", ""), LOOP.replace("SAY", "echo noise;")


@contextlib.contextmanager
def two_builders(config: pytest.Config, client: str) -> Iterator[Scene]:
    builder = other(config, client)
    with scene(client, builder, builder) as running:
        yield running


@contextlib.contextmanager
def afresh(hosts: Scene, slots: int, **constants: Any) -> Iterator[Scene]:
    """With nothing learnt, and so many slots each; afterwards nothing is held."""
    forget(hosts)
    change_hook(hosts, **constants)
    hosts.machines(f"b1 - - {slots} 8\nb2 - - {slots}\n")
    for builder in hosts.builders:
        builder.run("rm", "-f", GO, BEGUN)
    yield hosts
    let_go(*hosts.builders)
    for builder in hosts.builders:
        come_back(builder)
    hosts.clear()


def at_work(run: Run, builder: Host) -> None:
    """Wait until a build of that nix-build is held there."""
    begun = builder.path(BEGUN)
    poll(lambda: begun.exists() or run.ended, f"a build on {builder.name}")
    assert not run.ended, run.log


def let_go(*builders: Host) -> None:
    for builder in builders:
        builder.write(GO, "")
