"""Round trips: how often a build has to wait for what its builder says.

They are counted, not timed, by tests/delay.py in the place of the network.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab import Host, poll
from scene import Scene, distrustful, end_masters, masters, other, scene, text_of
from test_connections import sockets

TESTS = Path(__file__).resolve().parents[1]
NOTES = "/tmp/turns"
PROXY = f"ProxyCommand /usr/local/bin/delay.py %h %p turns {NOTES}\n"
# ssh's own probes of a silent line would be turns, too.
UNPROBED = {"NIX_SSHOPTS": "-oServerAliveInterval=0"}
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
        prepare(running)
        yield running
        end_masters(running)


def prepare(nix: Scene) -> None:
    """Have a live connection over the line that counts."""
    nix.client.copy(TESTS / "delay.py", "/usr/local/bin/delay.py")
    nix.client.write("/root/.ssh/config", PROXY, 0o600)
    count(nix, lambda: nix.build(reader(0), env=UNPROBED))


def reader(inputs: int) -> str:
    """A new derivation that reads so many files, which no builder has."""
    tag = next(numbers)
    file = f'builtins.toFile "input-{tag}-${{toString n}}" (toString n)'
    files = f"builtins.genList (n: {file}) {inputs}"
    return f'mk "reader-{tag}" "echo > $out" {{ inputs = {files}; }}'


def turns(nix: Scene, talk: Callable[[], object]) -> list[str]:
    """What is noted of each round trip until that has ended, without a spare session."""
    nix.settle()
    return turns_with_spare(nix, talk)


def turns_with_spare(nix: Scene, talk: Callable[[], object]) -> list[str]:
    """The same with the spare session that the last build has begun."""
    poll(lambda: not nix.hooks(), "the end of all hooks")
    rest(nix)
    connection = masters(nix)
    noted = count(nix, talk)
    assert masters(nix) == connection != []
    return noted


def rest(nix: Scene) -> None:
    """Wait until what sessions have left under way has arrived: until nobody works any more."""

    def nobody_works() -> bool:
        time.sleep(0.05)
        found = [(host, pid) for host in nix.everybody for pid, _ in host.processes()]
        return not {"R", "D"} & {state(host, pid) for host, pid in found}

    poll(lambda: all(nobody_works() for _ in range(10)), "rest")


def state(host: Host, pid: int) -> str:
    """Of that process, such as R: it runs; X if it has ended."""
    stat = text_of(host.path(f"/proc/{pid}/stat"))
    return (stat.rpartition(")")[2].split() or ["X"])[0]


def count(nix: Scene, talk: Callable[[], object]) -> list[str]:
    """The same, whatever becomes of the connection."""
    nix.client.write(NOTES, "")
    talk()
    noted = nix.client.read(NOTES).splitlines()
    nix.client.path(NOTES).unlink()
    return noted


# Two of these are ssh's: it opens a channel, and starts nix-store there before it sends
# anything on.  Then come the question for the inputs, and the build with its archive.


@pytest.mark.engines
def test_a_build_whose_inputs_must_be_sent_takes_at_most_four_round_trips(
    hosts: Scene,
) -> None:
    noted = turns(hosts, lambda: hosts.build(reader(30), env=UNPROBED))
    assert len(noted) <= 4, noted


@pytest.mark.engines
def test_a_build_whose_inputs_the_machine_has_had_takes_at_most_three(
    hosts: Scene,
) -> None:
    before = reader(3)
    hosts.build(before, env=UNPROBED)
    after = f'mk "after" "echo > $out" {{ before = {before}; }}'
    noted = turns(hosts, lambda: hosts.build(after, env=UNPROBED))
    assert len(noted) <= 3, noted


@pytest.mark.engines
def test_with_a_spare_session_it_takes_one_round_trip(hosts: Scene) -> None:
    before = reader(3)
    hosts.build(before, env=UNPROBED)
    after = f'mk "after" "echo > $out" {{ before = {before}; }}'
    noted = turns_with_spare(hosts, lambda: hosts.build(after, env=UNPROBED))
    assert len(noted) <= 1, noted


def test_with_a_spare_session_sending_takes_two(hosts: Scene) -> None:
    hosts.build(reader(0), env=UNPROBED)
    noted = turns_with_spare(hosts, lambda: hosts.build(reader(30), env=UNPROBED))
    assert len(noted) <= 2, noted


def test_inputs_that_the_machine_has_lost_since_are_sent_again(hosts: Scene) -> None:
    """The build that finds out begins again in a new session; those after it need not."""
    before = reader(3)
    hosts.build(before, env=UNPROBED)
    hosts.builder.run("nix-store", "--gc")
    said: list[str] = []
    after = f'mk "after" "cat $before > $out" {{ before = {before}; }}'
    noted = turns(hosts, lambda: said.append(hosts.build(after, env=UNPROBED).log))
    assert len(noted) <= 8, noted
    assert "missing" not in said[0]


def test_small_outputs_come_in_one_round_trip_however_many(hosts: Scene) -> None:
    script = "echo > $out; echo > $dev; echo > $doc; echo > $man"
    many = f'(mk "many" "{script}" {{ outputs = [ "out" "dev" "doc" "man" ]; }}).all'
    noted = turns(hosts, lambda: hosts.build(many, env=UNPROBED))
    assert len(noted) <= 4, noted


def test_a_build_for_a_user_who_is_not_trusted_takes_at_most_four(
    client_engine: str,
) -> None:
    """That he is not, which the first build has heard, is remembered."""
    with distrustful(client_engine, client_engine) as nix:
        prepare(nix)
        noted = turns(nix, lambda: nix.build(reader(0), env=UNPROBED))
        assert len(noted) <= 4, noted


@pytest.mark.engines
def test_a_build_that_fails_says_nothing_of_the_archive_that_was_asked_for(
    hosts: Scene,
) -> None:
    """Nor does a later one fail for it."""
    failing = f'mk "failing-{next(numbers)}" "echo its own words >&2; exit 1" {{ }}'
    done = hosts.build(failing, env=UNPROBED, check=False)
    assert "its own words" in done.log
    assert "is not" not in done.log
    hosts.build(reader(0), env=UNPROBED)


def test_each_answer_that_is_waited_for_is_a_round_trip(hosts: Scene) -> None:
    """The channel, the start of the program, three lines, and the end are six."""
    (socket,) = sockets(hosts)
    path = f"/{socket.relative_to(hosts.client.path('/'))}"
    noted = turns(hosts, lambda: hosts.client.run("sh", "-c", ASK, "sh", path))
    assert len(noted) == 6, noted
