"""Round trips: how often a build has to wait for what its builder says.

They are counted, not timed, by tests/delay.py in the place of the network.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scene import Scene, end_masters, masters, other, scene
from test_connections import sockets

TESTS = Path(__file__).resolve().parents[1]
NOTES = "/tmp/turns"
PROXY = f"ProxyCommand /usr/local/bin/delay.py %h %p turns {NOTES}\n"
# ssh's own probes of a silent line would be turns, too.
UNPROBED = {"NIX_SSHOPTS": "-oServerAliveInterval=0"}
UNDER_WAY_S = 0.5  # what a session leaves under way has arrived by then
# Says three lines to a `cat` on the builder, each when it has heard the one before.
ASK = """\
mkfifo /tmp/lines
ssh -S "$1" b1 cat </tmp/lines | {
    exec 3>/tmp/lines
    for line in 1 2 3; do echo $line >&3; read -r _; done
}
"""

numbers = itertools.count()


@pytest.fixture(scope="module")
def hosts(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    """A client with a live connection to its builder, over a line that counts turns."""
    builder = other(pytestconfig, client_engine)
    with scene(client_engine, builder) as running:
        running.client.copy(TESTS / "delay.py", "/usr/local/bin/delay.py")
        running.client.write("/root/.ssh/config", PROXY, 0o600)
        running.build(reader(0), env=UNPROBED)
        yield running
        end_masters(running)


def reader(inputs: int) -> str:
    """A new derivation that reads so many files, which no builder has."""
    tag = next(numbers)
    file = f'builtins.toFile "input-{tag}-${{toString n}}" (toString n)'
    files = f"builtins.genList (n: {file}) {inputs}"
    return f'mk "reader-{tag}" "echo > $out" {{ inputs = {files}; }}'


def turns(nix: Scene, talk: Callable[[], object]) -> list[str]:
    """What is noted of each round trip until that has ended."""
    nix.settle()
    time.sleep(UNDER_WAY_S)
    connection = masters(nix)
    nix.client.write(NOTES, "")
    talk()
    noted = nix.client.read(NOTES).splitlines()
    nix.client.path(NOTES).unlink()
    assert masters(nix) == connection != []
    return noted


@pytest.mark.engines
@pytest.mark.parametrize("inputs", [0, 30])
def test_a_build_over_a_live_connection_takes_at_most_five_round_trips(
    hosts: Scene, inputs: int
) -> None:
    """From "accept" to the hook's end, inputs to send or not. Two of them are ssh's: it
    opens a channel, and starts nix-store there before it sends anything on."""
    noted = turns(hosts, lambda: hosts.build(reader(inputs), env=UNPROBED))
    assert len(noted) <= 5, noted


def test_each_answer_that_is_waited_for_is_a_round_trip(hosts: Scene) -> None:
    """The channel, the start of the program, three lines, and the end are six."""
    (socket,) = sockets(hosts)
    path = f"/{socket.relative_to(hosts.client.path('/'))}"
    noted = turns(hosts, lambda: hosts.client.run("sh", "-c", ASK, "sh", path))
    assert len(noted) == 6, noted
