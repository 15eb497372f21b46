"""Waiting in line: who waits, in which order, and at what cost."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import signal
from collections.abc import Iterator
from typing import TextIO

import pytest
from lab import HANGS_S, poll
from scene import (
    DRIVER,
    INSTALLED,
    SLOTS,
    Run,
    Scene,
    change_hook,
    other,
    places,
    scene,
    stand,
)

WAITING = "waiting for a builder"
SOON_S = LONG_S = HANGS_S
# With this, whoever must be asked for again is asked for too late for these tests.
NEVER_POLL = ("--option", "build-poll-interval", "6000")
# What is left to somebody is left for longer than a slow machine needs to take it.
LEFT_S = 30

numbers = itertools.count()

# Notes down on the builder what is built there, and how many builds run as it begins.
COUNTED = """
  mkdir -p /tmp/running
  touch /tmp/running/$name
  ls /tmp/running | wc -l >> /tmp/counts
  echo $name >> /tmp/order
  sleep 0.3
  rm /tmp/running/$name
  echo > $out
"""
# Builds until it, or everything, is told to go on.
HELD = """
  touch /tmp/held-$name
  while ! [ -e /tmp/go ] && ! [ -e /tmp/go-held-$name ]; do sleep 0.02; done
  echo > $out
"""


def many(count: int, label: str = "many", script: str = COUNTED) -> str:
    """Derivations that no other test has."""
    name = f'"{label}-${{toString n}}-{next(numbers)}"'
    return f"builtins.genList (n: mk {name} ''{script}'' {{}}) {count}"


def lines(nix: Scene, path: str) -> list[str]:
    return nix.builder.read(path).split()


def held(nix: Scene, count: int = 1) -> None:
    def at_work() -> int:
        return len(list(nix.builder.path("/tmp").glob("held-*")))

    poll(lambda: at_work() == count, f"{count} builds", timeout=SOON_S)


def waiting(nix: Scene) -> list[int]:
    """The hooks that stand in line."""
    return sorted(int(who.split()[0]) for who in places(nix))


def start_and_wait(nix: Scene, count: int, slots: int) -> Run:
    """A nix-build that holds all slots, while the rest of its builds stand in line."""
    run = nix.start(many(count, "held", HELD), *NEVER_POLL)
    held(nix, slots)
    stand(nix, count - slots)
    return run


@pytest.fixture(scope="module")
def hosts(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    with scene(client_engine, other(pytestconfig, client_engine)) as running:
        yield running


@pytest.fixture
def nix(hosts: Scene) -> Iterator[Scene]:
    """One builder with one slot."""
    clean = "rm -rf /tmp/go* /tmp/held-* /tmp/running /tmp/counts /tmp/order"
    hosts.builder.run("sh", "-c", clean)
    change_hook(hosts, LEAVE_S=LEFT_S)
    hosts.machines("b1 - - 1\n")
    yield hosts
    hosts.builder.write("/tmp/go", "")
    hosts.clear()


def let_eight_wait(nix: Scene) -> None:
    """A line is no longer than there are slots: let one slot have eight places."""
    eight = "property(lambda line: 8, lambda line, size: None)"
    change_hook(nix, f"hook.Line.size = {eight}", LEAVE_S=LEFT_S)


# -- What it brings -------------------------------------------------------------------


@pytest.mark.engines
def test_all_builds_succeed_one_at_a_time_on_one_slot(nix: Scene) -> None:
    outcome = nix.build(many(6), timeout=LONG_S)
    assert len(outcome.outputs) == 6
    assert set(lines(nix, "/tmp/counts")) == {"1"}


@pytest.mark.engines
def test_what_waits_in_line_is_not_asked_for_again(nix: Scene) -> None:
    let_eight_wait(nix)
    outcome = nix.build(many(6), *NEVER_POLL, timeout=LONG_S)
    assert len(outcome.outputs) == 6


@pytest.mark.engines
def test_nix_is_told_that_a_build_waits(nix: Scene) -> None:
    run = start_and_wait(nix, 2, 1)
    nix.builder.write("/tmp/go", "")
    outcome = run.end()
    assert outcome.status == 0 and f"on '{WAITING}'" in outcome.log


def test_a_line_is_as_long_as_there_are_slots(nix: Scene) -> None:
    nix.machines("b1 - - 2\n")
    nix.start(many(6, "held", HELD))
    held(nix, 2)
    stand(nix, 2)


def test_whatever_slot_is_free_first_is_taken(nix: Scene) -> None:
    nix.machines("b1 - - 2\n")
    run = start_and_wait(nix, 3, 2)
    first = next(iter(nix.builder.path("/tmp").glob("held-*")))
    nix.builder.write(f"/tmp/go-{first.name}", "")
    held(nix, 3)
    nix.builder.write("/tmp/go", "")
    assert run.end().status == 0


@pytest.mark.engines
def test_builds_go_on_though_somebody_removes_all_that_hooks_have(nix: Scene) -> None:
    """As people do with a lock of Nix's own hook that hangs: the line is there no more, nor
    the ssh that stands between us and what copies."""
    nix.machines("b1 - - 2\n")
    source = 'builtins.toFile "source" "${toString n}"'
    reads = many(4, "held", HELD).replace("{}", f"{{ source = {source}; }}")
    run = nix.start(reads, *NEVER_POLL)
    held(nix, 2)
    stand(nix, 2)
    nix.client.run("sh", "-c", f"rm -rf {SLOTS}/*")
    nix.builder.write("/tmp/go", "")
    assert run.end().status == 0


# -- In which order -------------------------------------------------------------------


def test_those_who_wait_come_before_newcomers(nix: Scene) -> None:
    first = nix.start(many(1, "held", HELD), *NEVER_POLL)
    held(nix)
    runs = []
    for number in range(4):
        runs.append(nix.start(many(1, f"wait{number}"), *NEVER_POLL))
        stand(nix, number + 1)
    nix.builder.write("/tmp/go", "")
    assert [run.end().status for run in (first, *runs)] == [0] * 5
    labels = [name.partition("-")[0] for name in lines(nix, "/tmp/order")]
    assert labels == [f"wait{number}" for number in range(4)]


@pytest.mark.engines
def test_the_next_slot_is_for_the_nix_that_has_fewest(nix: Scene) -> None:
    """Three more builds of a Nix that has all four slots wait before those of another."""
    nix.machines("b1 - - 4\n")
    let_eight_wait(nix)
    mine = nix.start(many(7, "held-mine", HELD), *NEVER_POLL)
    held(nix, 4)
    stand(nix, 3)
    others = nix.start(many(3, "held-other", HELD), *NEVER_POLL)
    stand(nix, 6)
    there = nix.builder.path("/tmp")
    begun = [path.name for path in there.glob("held-*")]
    for number in range(4):
        nix.builder.write(f"/tmp/go-{begun[number]}", "")
        held(nix, 5 + number)
        begun += {path.name for path in there.glob("held-*")}.difference(begun)
    labels = [name.split("-")[2] for name in begun[4:]]
    assert labels == ["other", "other", "mine", "mine"]
    nix.builder.write("/tmp/go", "")
    assert [run.end().status for run in (mine, others)] == [0, 0]


@pytest.mark.engines
def test_a_machine_goes_to_the_line_that_has_fewer_machines(nix: Scene) -> None:
    """b2 is not there, so all three builds wait for b1, but only one has to."""
    nix.build(many(1))
    nix.machines("b1 - - 1 1 nixos-test,benchmark\nb2 - - 1 1 benchmark\n")
    nix.builder.run("rm", "/tmp/order")
    with taken(nix, "ssh:__b1-0") as b1, taken(nix, "ssh:__b2-0"):
        wide = [needing("benchmark", number) for number in (1, 2)]
        runs = [nix.start(expression, *NEVER_POLL) for expression in wide]
        stand(nix, 2)
        runs.append(nix.start(needing("nixos-test", 3), *NEVER_POLL))
        stand(nix, 3)
        b1.close()
        assert [run.end().status for run in runs] == [0, 0, 0]
    assert [name[:3] for name in lines(nix, "/tmp/order")] == ["nix", "ben", "ben"]


def test_nobody_is_passed_more_than_a_few_times(nix: Scene) -> None:
    """As above, but many builds wait for b1 alone."""
    let_eight_wait(nix)
    nix.build(many(1))
    nix.machines("b1 - - 1 1 nixos-test,benchmark\nb2 - - 1 1 benchmark\n")
    nix.builder.run("rm", "/tmp/order")
    with taken(nix, "ssh:__b1-0") as b1, taken(nix, "ssh:__b2-0"):
        wide = nix.start(needing("benchmark", 1), *NEVER_POLL)
        stand(nix, 1)
        eight = " ".join(f"({needing('nixos-test', n)})" for n in range(8))
        narrow = nix.start(f"[ {eight} ]", *NEVER_POLL)
        stand(nix, 9)
        b1.close()
        assert [run.end().status for run in (wide, narrow)] == [0, 0]
    order = [name[:3] for name in lines(nix, "/tmp/order")]
    assert len(order) == 9 and 2 <= order.index("ben") <= 5


def test_two_lines_do_not_leave_a_free_slot_to_each_other(nix: Scene) -> None:
    """Each Nix has all slots of one machine, and may use a third, which is the same for both."""
    let_eight_wait(nix)
    nix.build(many(1))
    nix.machines(
        "b1 - - 2 8 benchmark\nroot@b1 - - 1 1 benchmark,nixos-test\n"
        "ssh://root@b1?priority=1 - - 2 8 nixos-test\n"
    )
    with taken(nix, "ssh:__root@b1-0"):
        for number, feature in enumerate(["benchmark", "nixos-test"], 1):
            four = " ".join(f"({needing(feature, n, HELD)})" for n in range(4))
            nix.start(f"[ {four} ]", *NEVER_POLL)
            held(nix, 2 * number)
            stand(nix, 2 * number)
    held(nix, 5)


def needing(feature: str, number: int, script: str = COUNTED) -> str:
    name = f"{feature}-{number}-{next(numbers)}"
    attributes = f'{{ requiredSystemFeatures = [ "{feature}" ]; }}'
    return f"mk \"{name}\" ''{script}'' {attributes}"


@contextlib.contextmanager
def taken(nix: Scene, slot: str) -> Iterator[TextIO]:
    """Hold a slot until it is closed or the block ends."""
    path = nix.client.path(SLOTS) / slot
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


# -- What may happen to those who wait ------------------------------------------------


@pytest.mark.parametrize("victim", [0, 1, 2], ids=["first", "middle", "last"])
def test_a_killed_hook_leaves_the_line_working(nix: Scene, victim: int) -> None:
    let_eight_wait(nix)
    first = nix.start(many(1, "held", HELD), *NEVER_POLL)
    held(nix)
    runs = []
    for number in range(3):
        runs.append(nix.start(many(1, "waits"), *NEVER_POLL))
        stand(nix, number + 1)
    old = waiting(nix)[victim]
    nix.client.signal(signal.SIGKILL, old)
    poll(lambda: old not in nix.hooks(), "the end of the hook", timeout=SOON_S)
    nix.builder.write("/tmp/go", "")
    assert first.end().status == 0
    statuses = [run.end().status for run in runs]
    assert [status == 0 for status in statuses] == [n != victim for n in range(3)]


@pytest.mark.engines
def test_when_nix_is_killed_its_hooks_leave_the_line(nix: Scene) -> None:
    let_eight_wait(nix)
    run = start_and_wait(nix, 5, 1)
    run.process.kill()
    poll(lambda: not nix.hooks(), "the end of the hooks", timeout=SOON_S)


@pytest.mark.engines
def test_when_nix_is_interrupted_its_hooks_leave_the_line(nix: Scene) -> None:
    let_eight_wait(nix)
    run = start_and_wait(nix, 5, 1)
    run.interrupt()
    poll(lambda: not nix.hooks(), "the end of the hooks", timeout=SOON_S)


@pytest.mark.parametrize("each", [6, 1], ids=["of one Nix", "of several"])
def test_waiting_takes_next_to_no_processor_time(nix: Scene, each: int) -> None:
    """For the first in line, who looks; and none at all for the others."""
    let_eight_wait(nix)
    for _ in range(6 // each):
        nix.start(many(each, "held", HELD), *NEVER_POLL)
    held(nix)
    stand(nix, 5)
    hooks = waiting(nix)
    hertz = os.sysconf("SC_CLK_TCK")

    def take_next_to_none() -> bool:
        before = [ticks(nix, pid) for pid in hooks]
        begin = clock(nix)
        poll(lambda: clock(nix) > begin + 2, "two seconds")
        spent = sorted(ticks(nix, pid) - was for pid, was in zip(hooks, before))
        return spent[-1] < 0.5 * hertz and sum(spent[:-1]) < 0.2 * hertz

    # not at once: whoever has just come still has to read what Nix says
    poll(take_next_to_none, "two seconds in which they spend next to nothing")


def clock(nix: Scene) -> float:
    return float(nix.client.read("/proc/uptime").split()[0])


def ticks(nix: Scene, pid: int) -> int:
    """The processor time of a process, of its own and of the kernel for it."""
    fields = nix.client.read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_a_hook_that_is_stopped_holds_up_no_other_nix(nix: Scene) -> None:
    """Such as one in a container that somebody pauses, and that shares our slots."""
    change_hook(nix)
    nix.build(many(1))
    nix.builder.write("/tmp/go", "")
    with taken(nix, "ssh:__b1-0"):
        stopped = nix.start(many(1, "stopped", HELD), *NEVER_POLL)
        stand(nix, 1)
        hooks = nix.hooks()
        run = nix.start(many(1, "other", HELD), *NEVER_POLL)
        stand(nix, 2)
        nix.client.signal(signal.SIGSTOP, *hooks)
    try:
        assert run.end().status == 0
    finally:
        nix.client.signal(signal.SIGCONT, *hooks)
    assert stopped.end().status == 0


# -- What does not wait ---------------------------------------------------------------


@pytest.mark.engines
def test_what_nix_can_build_itself_is_left_to_it(nix: Scene) -> None:
    run = nix.start(many(1, "held", HELD), *NEVER_POLL)
    held(nix)
    outcome = nix.build(many(2, "local", "hostname > $out"), "-j2", *NEVER_POLL)
    assert {nix.client.read(path) for path in outcome.outputs} == {"client\n"}
    assert not run.ended and places(nix) == []


def test_what_nix_might_build_later_does_not_wait_in_line(nix: Scene) -> None:
    nix.start(many(1, "held", HELD), *NEVER_POLL)
    held(nix)
    local = "touch /tmp/held-$name; while ! [ -e /tmp/go ]; do sleep 0.02; done"
    run = nix.start(many(3, "local", f"{local}; hostname > $out"), "-j1")
    there = nix.client.path("/tmp")
    poll(lambda: list(there.glob("held-local-*")), "a local build", timeout=SOON_S)
    nix.client.write("/tmp/go", "")
    outcome = run.end()
    nix.client.run("sh", "-c", "rm /tmp/go /tmp/held-*")
    assert {nix.client.read(path) for path in outcome.outputs} == {"client\n"}
    assert WAITING not in outcome.log


# -- Nix 1.x --------------------------------------------------------------------------


def by_old_nix(nix: Scene, expression: str, *options: str) -> list[str]:
    """Write an expression down; returns the driver's command for it."""
    done = nix.client.run("nix-instantiate", nix.nix_build(expression)[1])
    driver = ["python3", DRIVER, "--hook", INSTALLED, "--poll-interval", "600"]
    return [*driver, *options, *done.stdout.split()]


@pytest.mark.engines
def test_with_nix_1_too_another_systems_builds_wait_in_line(nix: Scene) -> None:
    system = nix.client.run(
        "nix-instantiate", "--eval", "-E", "builtins.currentSystem"
    ).stdout.strip('"\n')
    nix.client.write("/etc/old/machines", f"b1 {system} - 1\n")
    let_eight_wait(nix)
    command = by_old_nix(nix, many(6), "--system", "riscv64-linux")
    env = {"NIX_REMOTE_SYSTEMS": "/etc/old/machines", "NIX_CURRENT_LOAD": SLOTS}
    done = nix.client.run(*command, env=env, timeout=LONG_S)
    account = json.loads(done.stdout)
    results = {found["result"] for found in account["derivations"].values()}
    replies = {reply for hook in account["hooks"] for _, reply in hook["replies"]}
    assert (results, replies) == ({"built"}, {"accept"})
    assert set(lines(nix, "/tmp/counts")) == {"1"}
