"""Looks: what a builder says of its disk, its memory and the builds of other clients."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from lab import Host, connect, engine, is_taken, poll
from scene import (
    INSTALLED,
    SLOTS,
    Run,
    Scene,
    change_hook,
    cleared,
    masters,
    other,
    scene,
)

CLOSED = "/etc/nix/no-builds"
SECONDS = 4  # that a build takes


@pytest.fixture(scope="module")
def hosts(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    name = other(pytestconfig, client_engine)
    with scene(client_engine, name, client_engine) as running:
        yield running


@pytest.fixture
def nix(hosts: Scene) -> Iterator[Scene]:
    """Each build looks."""
    with cleared(hosts):
        change_hook(hosts, LOOK_S=0.1)
        hosts.machines("b1 - - 4\n")
        yield hosts
        hosts.builder.run("rm", "-f", CLOSED)


def many(label: str, count: int, seconds: float = 0) -> str:
    script = f"sleep {seconds}; hostname > $out"
    return f'builtins.genList (n: mk "{label}${{toString n}}" "{script}" {{}}) {count}'


def looked(nix: Scene, host: str = "b1") -> str:
    """What is noted of that builder, once it has answered."""

    def found() -> str:
        notes = [*nix.client.path(f"{SLOTS}/own").glob(f"*{host}.look")]
        return notes[0].read_text() if notes else ""

    def answer() -> str:
        said = found()
        return said if said.endswith("\nend\n") else ""

    return poll(answer, f"what {host} says of itself")


def people(nix: Scene, *words: str) -> Any:
    done = nix.client.run(INSTALLED, *words, "--json", check=False)
    return json.loads(done.stdout)


# -- Other clients' builds ------------------------------------------------------------


def running(builder: Host) -> int:
    """How many builds run there; the sh of one is there twice for a moment, its sleep once."""
    commands = [process.cmdline for process in builder.processes()]
    # A look has a sleep of its own, of 20 s.
    return sum(bool(re.fullmatch(r"sleep (?!20$)\d+", line)) for line in commands)


def counts_until_both_end(builder: Host, runs: list[Run]) -> list[int]:
    counts = []
    while not all(run.ended for run in runs):
        counts.append(running(builder))
        time.sleep(0.1)
    assert [run.end().status for run in runs] == [0, 0]
    return counts


@pytest.fixture
def colleague(nix: Scene) -> Iterator[Scene]:
    """Another client of the same builder."""
    name = nix.client.engine.name
    client = nix.client.lab.host("colleague", engine(name), nix_conf="max-jobs = 0\n")
    connect(client, nix.builder)
    client.run("nix-store", "--init")
    theirs = Scene(client, nix.builders)
    theirs.machines("b1 - - 4\n")
    for each in (nix, theirs):  # a slow builder has not answered within seconds
        change_hook(each, LOOK_WAIT_S=60)
    yield theirs
    client.stop()


@pytest.mark.engines
def test_two_clients_together_take_its_slots_and_one_more_at_most(
    nix: Scene, colleague: Scene
) -> None:
    runs = [s.start(many(s.client.name, 10, SECONDS)) for s in (nix, colleague)]
    counts = counts_until_both_end(nix.builder, runs)
    too_many = [count for count in counts if count > 5]
    assert len(too_many) < len(counts) / 2  # two builds of the four or five in a row
    assert max(counts) < 8


@pytest.mark.engines
def test_a_client_that_comes_later_leaves_the_slots_to_who_has_them(
    nix: Scene, colleague: Scene
) -> None:
    theirs = colleague.start(many("long", 4, 600))
    poll(lambda: running(nix.builder) == 4, "their builds")
    assert nix.build(many("ours", 3)).status == 0  # one after another
    ours = nix.start(many("more", 3, 600))
    poll(lambda: running(nix.builder) == 5, "one of ours")
    why = "4 builds of other clients"
    poll(lambda: why in str(people(nix, "explain")["left-out"]), why)
    shown = people(nix, "status")["machines"][0]
    assert (shown["taken"], shown["others"]) == (1, 4)
    theirs.interrupt()
    poll(lambda: running(nix.builder) == 3, "all of ours")
    ours.interrupt()


def test_who_does_not_look_takes_all_slots(nix: Scene, colleague: Scene) -> None:
    theirs = colleague.start(many("blind", 4, 600))
    poll(lambda: running(nix.builder) == 4, "their builds")
    ours = nix.start(many("sighted", 4, 600), env={"NIX_BLIND_HOOK": "1"})
    poll(lambda: running(nix.builder) == 8, "all of ours")
    for run in (theirs, ours):
        run.interrupt()


@pytest.mark.engines
def test_our_own_builds_are_not_taken_for_those_of_others(nix: Scene) -> None:
    """Behind nix-daemon, by an ordinary user, over more than one connection."""
    there = nix.builder
    there.add_user("nix")
    connect(nix.client, there, "nix")
    conf = there.read("/etc/nix/nix.conf")
    there.write("/etc/nix/nix.conf", f"{conf}trusted-users = root nix\n")
    daemon = there.start_daemon()
    nix.machines("nix@b1 - - 12\n")
    try:
        run = nix.start(many("daemon", 12, 600))
        poll(lambda: running(there) == 12, "all of them")
        assert "\nbuilds 0\n" in looked(nix)
        run.interrupt()
    finally:
        nix.clear()
        daemon.kill()
        there.write("/etc/nix/nix.conf", conf)
        there.run("rm", "-rf", "/nix/var/nix/daemon-socket")


# -- A builder that gets no builds ----------------------------------------------------


def builder_of(nix: Scene, name: str) -> str:
    return nix.client.read(nix.build(f'mk "{name}" "hostname > $out" {{}}').output)


@pytest.mark.engines
def test_a_builder_without_room_gets_no_builds_until_it_has_room_again(
    nix: Scene,
) -> None:
    nix.machines("b1 - - 4\nb2 - - 4\n")
    small = "size=300m"
    nix.builder.run("mount", "-t", "tmpfs", "-o", small, "small", "/nix")
    try:
        assert builder_of(nix, "room") == "b1\n"
        looked(nix)
        nix.builder.run("sh", "-c", "head -c 275m /dev/zero > /nix/junk")
        assert builder_of(nix, "looks") == "b1\n"
        poll(lambda: " free in its store" in closed(nix), "that it is full")
        assert builder_of(nix, "full") == "b2\n"
        left_out = people(nix, "explain")["left-out"][0]["reason"]
        assert re.search(r"has only \d+ MiB \(\d+%\) free in its store", left_out)
        nix.builder.run("rm", "/nix/junk")
        names = (f"again{number}" for number in range(100))
        poll(lambda: builder_of(nix, next(names)) == "b1\n", "builds on b1")
    finally:
        nix.clear()
        nix.builder.run("umount", "-l", "/nix")


def closed(nix: Scene) -> str:
    return people(nix, "status")["machines"][0]["closed"] or ""


@pytest.mark.engines
def test_what_the_admin_of_a_builder_writes_there_stops_builds_until_it_is_gone(
    nix: Scene,
) -> None:
    nix.builder.write(CLOSED, "new disks\nuntil Friday\n")
    assert nix.build(many("first", 1)).status == 0  # which looks
    looked(nix)
    run = nix.start(many("next", 3))
    run.says(f"'ssh://b1' has {CLOSED}: new disks until Friday")
    assert closed(nix) == f"has {CLOSED}: new disks until Friday"
    assert not run.ended
    nix.builder.run("rm", CLOSED)
    assert run.end().status == 0


def test_check_says_that_its_admin_lets_no_builds_go_there(nix: Scene) -> None:
    nix.builder.write(CLOSED, "new disks\n")
    machine = people(nix, "check")["machines"][0]
    found = {finding["what"]: finding for finding in machine["findings"]}
    assert not machine["well"] and "new disks" in found["build"]["text"]
    nix.client.run("sh", "-c", found["build"]["remedy"])
    assert people(nix, "check")["machines"][0]["well"]


# -- Where nobody can be asked --------------------------------------------------------


@pytest.mark.engines
def test_a_login_that_allows_only_nix_store_is_not_asked_again(nix: Scene) -> None:
    keys = "/root/.ssh/authorized_keys"
    before = nix.builder.read(keys)
    nix.builder.write(keys, f'command="nix-store --serve --write" {before}', 0o600)
    try:
        nix.build(many("only", 4))
        note = next(nix.client.path(f"{SLOTS}/own").glob("*b1.look"))
        poll(lambda: not is_taken(note), "the end of the answer")
        said = note.read_text()
        assert "\nend\n" not in said.partition("\nasked")[2]
        nix.build(many("more", 4))
        assert note.read_text() == said
    finally:
        nix.builder.write(keys, before, 0o600)


def test_a_look_that_hangs_costs_no_build(nix: Scene) -> None:
    nix.builder.write("/usr/local/bin/df", "#!/bin/sh\nexec sleep 1000\n", 0o755)
    try:
        nix.build(many("beside", 3))
        end = ("pkill", "-f", "^sleep 1000")
        poll(lambda: not nix.builder.run(*end, check=False).returncode, "what hangs")
    finally:
        nix.builder.run("rm", "/usr/local/bin/df")


def test_what_a_builder_says_of_itself_fills_no_disk(nix: Scene) -> None:
    """Its sh says much, but only to who says nothing to it, as a look."""
    much = "[ $# = 0 ] && exec head -c 60000000 /dev/zero"
    nix.builder.write(
        "/usr/local/bin/sh", f'#!/bin/dash\n{much}\nexec dash "$@"\n', 0o755
    )
    try:
        nix.build(many("much", 1))
        note = nix.client.path(f"{SLOTS}/own/ssh:__b1.look")

        def is_heard() -> bool:
            return note.stat().st_size > 1 << 15 and not is_taken(note)

        poll(is_heard, "the end of what it says")
        assert note.stat().st_size < 1 << 20
    finally:
        nix.builder.run("rm", "/usr/local/bin/sh")


@pytest.mark.parametrize("hangs", [False, True], ids=["answers", "hangs"])
def test_a_connection_ends_when_idle_whatever_a_look_does(
    nix: Scene, *, hangs: bool
) -> None:
    change_hook(nix, IDLE_S=2, LOGIN_TIMEOUT_S=5, GREETING_TIMEOUT_S=5)
    if hangs:
        nix.builder.write("/usr/local/bin/df", "#!/bin/sh\nexec sleep 1000\n", 0o755)
    try:
        script = "while ! [ -e /tmp/idle ]; do sleep 0.02; done; echo > $out"
        run = nix.start(f'mk "idle-{hangs}" "{script}" {{}}')
        poll(lambda: masters(nix), "the connection")
        nix.builder.write("/tmp/idle", "")
        assert run.end().status == 0
        poll(lambda: not masters(nix), "the end of the idle connection")
    finally:
        nix.builder.run("pkill", "-f", "^sleep 1000", check=False)
        nix.builder.run("rm", "-f", "/usr/local/bin/df", "/tmp/idle")


@pytest.mark.engines
def test_memory_that_is_short_leaves_us_one_slot(nix: Scene) -> None:
    nix.builder.write("/tmp/pressure", "some avg10=93.40 avg60=1 avg300=1 total=1\n")
    nix.builder.run("mount", "--bind", "/tmp/pressure", "/proc/pressure/memory")
    try:
        nix.build(many("pressed", 1))
        looked(nix)
        run = nix.start(many("short", 3, SECONDS))
        counts = []
        while not run.ended:
            counts.append(running(nix.builder))
            time.sleep(0.1)
        assert run.end().status == 0
        assert max(counts) == 1
    finally:
        nix.builder.run("umount", "/proc/pressure/memory")
