"""Ends at any moment: of the hook, or of Nix, while it connects, sends, builds, fetches.

Each moment is a step of a build as the slot file or the hook's processes show it, or
some hundredths of a second after its start, where nothing can be seen from outside.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterator

import pytest
from lab import HANGS_S, poll
from scene import SLOTS, Run, Scene, other, scene, text_of, valid, verified

SOON_S = HANGS_S
numbers = itertools.count()

# With an input to send and an output to fetch, both of some size.
BUILD = """
  let input = builtins.toFile "input-{n}" (builtins.concatStringsSep "" (
    builtins.genList (n: "0123456789-{n}") 40000));
  in mk "moment-{n}" "cat $input $input $input > $out; sleep 0.3" {{ inherit input; }}
"""


@pytest.fixture(scope="module")
def hosts(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    with scene(client_engine, other(pytestconfig, client_engine)) as running:
        yield running


@pytest.fixture
def nix(hosts: Scene) -> Iterator[Scene]:
    hosts.machines("b1 - - 2\n")
    hosts.builder.run("sh", "-c", "rm -rf /root/.cache")
    yield hosts
    hosts.settle()


def phase(nix: Scene) -> str:
    """That of the one build, if there is one."""
    files = nix.client.path(SLOTS).rglob("ssh:__b1*-[0-9]")
    words = " ".join(map(text_of, files)).split()
    return words[4] if len(words) > 4 else ""


def reach(nix: Scene, run: Run, moment: str) -> None:
    """Wait for that moment, or for the end if it passed too quickly."""
    if moment.isdigit():
        poll(nix.hooks, "a hook", timeout=SOON_S)
        time.sleep(int(moment) / 100)
    else:
        poll(lambda: phase(nix) == moment or run.ended, moment, timeout=SOON_S)


@pytest.mark.parametrize(
    "how", ["hook killed", "hook terminated", "Nix killed", "Ctrl-C"]
)
@pytest.mark.parametrize(
    "moment",
    [
        "0",
        "2",
        "4",
        "7",
        "10",
        "15",
        "20",
        "30",
        "connecting",
        "sending",
        "building",
        "fetching",
    ],
)
def test_an_end_leaves_nothing_and_the_next_build_succeeds(
    nix: Scene, moment: str, how: str
) -> None:
    expression = BUILD.format(n=next(numbers))
    run = nix.start(expression)
    reach(nix, run, moment)
    if how == "Ctrl-C":
        run.interrupt()
    elif how == "Nix killed":
        run.process.kill()
    else:
        number = signal.SIGKILL if how == "hook killed" else signal.SIGTERM
        nix.client.signal(number, *nix.hooks())
    run.end(SOON_S)
    nix.settle()
    assert valid(nix.client, nix.build(expression).output)


def test_after_all_these_ends_the_stores_are_whole(nix: Scene) -> None:
    assert verified(nix.client) and verified(nix.builder)
