"""Spare sessions: while a build runs over a long line, one is begun for the next build."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import poll
from scene import SLOTS, Scene, end_masters, other, scene
from test_connections import one, sshd
from test_keeping import JUNK

SERVER = re.compile("nix-store .*--serve --write")


@pytest.fixture(scope="module")
def hosts(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    with scene(client_engine, other(pytestconfig, client_engine)) as running:
        yield running


@pytest.fixture
def nix(hosts: Scene) -> Iterator[Scene]:
    """A client that takes its connection for a long one, and has a spare session."""
    hosts.settle()
    end_masters(hosts)
    hosts.client.run("rm", "-rf", SLOTS)
    hosts.build(one())
    for proved in hosts.client.path(SLOTS).glob("ssh/*.proved"):
        proved.write_text(f"{proved.read_text().rpartition(' ')[0]} True")
    hosts.build(one())
    poll(lambda: len(servers(hosts)) == 1, "the spare session")
    yield hosts
    hosts.builder.run("rm", "-f", "/tmp/held")
    hosts.clear()


def spares(nix: Scene) -> list[Path]:
    return [*nix.client.path(SLOTS).glob("ssh/*.spare")]


def keeper_and_ssh(nix: Scene) -> list[int]:
    """The processes of the one spare session, as the client numbers them."""
    (spare,) = spares(nix)
    return [int(number) for number in spare.read_text().split()[2::2]]


def lives(nix: Scene, pid: int) -> bool:
    return nix.client.path(f"/proc/{pid}").exists()


def servers(nix: Scene) -> list[int]:
    """The sessions on the builder."""
    processes = nix.builder.processes()
    return [process.pid for process in processes if SERVER.match(process.cmdline)]


@pytest.mark.engines
def test_the_next_build_takes_it_and_begins_another(nix: Scene) -> None:
    before, waiting = keeper_and_ssh(nix), servers(nix)
    outcome = nix.build(one("echo a word >&2; hostname > $out"))
    assert "a word" in outcome.log and "trying again" not in outcome.log
    assert nix.client.read(outcome.output) == "b1\n"
    poll(lambda: not any(lives(nix, pid) for pid in before), "the end of the old one")
    poll(lambda: len(servers(nix)) == 1 and servers(nix) != waiting, "another")


def test_it_ends_when_nobody_comes(nix: Scene) -> None:
    keeper, ssh = keeper_and_ssh(nix)
    nix.client.run("kill", str(keeper))
    poll(lambda: not servers(nix) and not lives(nix, ssh), "the end of the session")
    assert "trying again" not in nix.build(one()).log


@pytest.mark.engines
def test_a_build_in_it_is_cancelled_when_its_hook_is_killed(nix: Scene) -> None:
    _, ssh = keeper_and_ssh(nix)
    run = nix.start(one("echo $$ > /tmp/held; exec sleep 1000"))
    held = nix.builder.path("/tmp/held")
    poll(lambda: held.exists() and held.read_text(), "the build")
    assert lives(nix, ssh)
    hook = min(nix.hooks())  # beside it, for a moment, a program that it starts
    nix.client.signal(signal.SIGKILL, hook)
    run.end()
    poll(lambda: not builds(nix), "the end of the build")
    held.unlink()


def builds(nix: Scene) -> list[str]:
    commands = [process.cmdline for process in nix.builder.processes()]
    return [command for command in commands if re.search("sleep 1000", command)]


@pytest.mark.engines
def test_a_build_that_fails_in_it_fails_once_with_its_whole_log(nix: Scene) -> None:
    script = "for n in 1 2 3 4 5; do echo line $n >&2; done; exit 1"
    outcome = nix.build(one(script), check=False)
    assert outcome.status  # from 2.29 on, Nix makes 1 of our 100
    assert all(f"line {n}\n" in outcome.log for n in range(1, 6))
    assert "trying again" not in outcome.log and "is not" not in outcome.log


def test_if_it_has_ended_meanwhile_a_new_session_is_begun(nix: Scene) -> None:
    _, ssh = keeper_and_ssh(nix)
    nix.client.run("kill", "-KILL", str(ssh))
    poll(lambda: not servers(nix), "the end of the session")
    assert "trying again" not in nix.build(one()).log


def test_that_of_a_connection_that_was_given_up_is_not_used(nix: Scene) -> None:
    keeper, _ = keeper_and_ssh(nix)
    (socket,) = nix.client.path(SLOTS).glob("ssh/*.proved")
    path = f"{SLOTS}/ssh/{socket.stem}"
    nix.client.run("ssh", "-O", "stop", "-S", path, "b1")
    nix.build(one())
    assert lives(nix, keeper)


def test_where_sshd_allows_two_sessions_builds_go_on(nix: Scene) -> None:
    sshd(nix, "MaxSessions 2")
    nix.build(one())
    for proved in nix.client.path(SLOTS).glob("ssh/*.proved"):
        proved.write_text(f"{proved.read_text().rpartition(' ')[0]} True")
    for _ in range(4):
        outcome = nix.build(f"[ ({one()}) ({one()}) ({one()}) ]")
        assert "trying again" not in outcome.log
    sshd(nix)


# Another named pipe that the next build would read says nothing for the 30 s that it may.
FILES = [(name, kind) for name in ("spare", "in", "out", "err") for kind in JUNK]
FILES.remove(("out", "fifo"))


@pytest.mark.parametrize("name, kind", FILES)
def test_any_junk_in_place_of_its_files_is_no_obstacle(
    nix: Scene, name: str, kind: str
) -> None:
    nix.client.write("/etc/kept", "kept")
    (file,) = nix.client.path(SLOTS).glob(f"ssh/*.{name}")
    file.unlink()
    JUNK[kind](file)
    for _ in range(2):
        assert "a bug" not in nix.build(one()).log
    assert nix.client.read("/etc/kept") == "kept"
