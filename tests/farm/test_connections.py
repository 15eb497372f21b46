"""Shared connections: who shares one, how they live, and what may end them."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import fakes
import pytest
from lab import HANGS_S, connect, poll
from scene import (
    SLOTS,
    Scene,
    change_hook,
    distrustful,
    end_masters,
    masters,
    other,
    scene,
    valid,
)
from test_builds import DEPENDENT, INPUT, LOCAL

from nix_build_remote import (
    SOCKET_LIMIT_BYTES,
    Machine,
    Nix,
    Programs,
    Seat,
    Ssh,
    Talk,
    ssh_directory,
)

TESTS = Path(__file__).resolve().parents[1]
SSHD_CONF = "/etc/ssh/sshd_config"
SSHD_LOG = "/var/log/sshd.log"
# What ssh says when something goes wrong with a shared connection.
NOISE = re.compile(r"mux_|refused by peer|multiplex|ControlSocket|Control socket")
SOON_S = LONG_S = HANGS_S

numbers = itertools.count()


def one(script: str = "hostname > $out") -> str:
    """A derivation that no other test has."""
    return f'mk "one-{next(numbers)}" "{script}" {{}}'


def many(count: int, script: str = "hostname > $out") -> str:
    name = f'"many-{next(numbers)}-${{toString n}}"'
    return f'builtins.genList (n: mk {name} "{script}" {{}}) {count}'


# Stays in its build until the test lets it go on.
HELD = "touch /tmp/held-$name; while ! [ -e /tmp/go ]; do sleep 0.02; done; echo > $out"


def held(nix: Scene, count: int) -> None:
    """Wait until so many builds are at work at once."""

    def at_work() -> int:
        tmp = (builder.path("/tmp") for builder in nix.builders)
        return sum(len(list(path.glob("held-*"))) for path in tmp)

    poll(lambda: at_work() == count, f"{count} builds at once", timeout=LONG_S)


def release(nix: Scene) -> None:
    for builder in nix.builders:
        builder.write("/tmp/go", "")


def logins(nix: Scene, builder: int = 0) -> int:
    """How many connections the builder has let in during this test."""
    return nix.builders[builder].read(SSHD_LOG).count("Accepted publickey for")


def sockets(nix: Scene) -> list[Path]:
    return [path for path in nix.client.path(SLOTS).rglob("*") if path.is_socket()]


def configure(nix: Scene, text: str) -> None:
    """The user's ~/.ssh/config."""
    nix.client.write("/root/.ssh/config", text, 0o600)


def sshd(nix: Scene, *settings: str) -> None:
    """Restart the builder's sshd with more settings; the first one counts."""
    plain = nix.builder.read(SSHD_CONF).rpartition("# plain\n")[2]
    text = "\n".join([*settings, "# plain", plain])
    nix.builder.write(SSHD_CONF, text)
    nix.builder.restart_sshd(sessions=True)


@pytest.fixture(scope="module")
def hosts(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    builder = other(pytestconfig, client_engine)
    with scene(client_engine, builder, builder) as running:
        running.client.copy(TESTS / "delay.py", "/usr/local/bin/delay.py")
        yield running


@pytest.fixture
def nix(hosts: Scene) -> Iterator[Scene]:
    """One builder, no connection, no slot files, and the settings of everybody."""
    end_masters(hosts)
    hosts.client.run("rm", "-rf", SLOTS, "/root/.ssh/config", "/root/.ssh/user")
    change_hook(hosts)
    for builder in hosts.builders:
        builder.run("sh", "-c", f"rm -rf /tmp/go /tmp/held-*; : > {SSHD_LOG}")
    hosts.machines("b1 - - 4\n")
    yield hosts
    release(hosts)
    for process in hosts.client.processes():
        if "nix-build " in process.cmdline:
            hosts.client.signal(signal.SIGKILL, process.pid)
    hosts.settle()
    assert hosts.locks() == []


@pytest.fixture
def limited(nix: Scene) -> Iterator[Scene]:
    """The builder's sshd gets its plain settings back afterwards."""
    yield nix
    sshd(nix)


# -- Sharing --------------------------------------------------------------------------


@pytest.mark.engines
def test_six_builds_share_one_connection(nix: Scene) -> None:
    nix.machines("b1 - - 6\n")
    run = nix.start(many(6, HELD))
    held(nix, 6)
    release(nix)
    assert run.end().status == 0
    assert logins(nix) == 1


@pytest.mark.engines
def test_twelve_builds_at_once_need_two_connections(nix: Scene) -> None:
    nix.machines("b1 - - 12\n")
    run = nix.start(many(12, HELD))
    held(nix, 12)
    release(nix)
    outcome = run.end()
    assert (outcome.status, logins(nix)) == (0, 2)
    assert not NOISE.search(outcome.log)


@pytest.mark.engines
def test_the_next_nix_build_uses_the_same_connection(nix: Scene) -> None:
    nix.build(one())
    nix.build(one())
    assert logins(nix) == 1


def test_two_nix_processes_at_the_same_time_share(nix: Scene) -> None:
    runs = [nix.start(many(2, HELD)) for _ in range(2)]
    held(nix, 4)
    release(nix)
    assert [run.end().status for run in runs] == [0, 0]
    assert logins(nix) == 1


def test_every_machine_has_a_connection_of_its_own(nix: Scene) -> None:
    nix.machines("b1 - - 1\nb2 - - 1\n")
    run = nix.start(many(2, HELD))
    held(nix, 2)
    release(nix)
    assert run.end().status == 0
    assert [logins(nix, number) for number in (0, 1)] == [1, 1]


def test_an_idle_connection_ends_by_itself(nix: Scene) -> None:
    change_hook(nix, IDLE_S=1)
    nix.build(one())
    poll(lambda: not masters(nix), "the end of the connection", timeout=SOON_S)
    assert sockets(nix) == []


def test_a_connection_in_use_is_not_idle(nix: Scene) -> None:
    change_hook(nix, IDLE_S=4)  # more than a hook takes to begin its session
    outcome = nix.build(one("sleep 6; hostname > $out"))
    assert nix.client.read(outcome.output) == "b1\n"
    assert logins(nix) == 1


def seat(line: str, tmp_path: Path, **environ: str) -> Seat:
    fakes.write_program(tmp_path / "bin/ssh", "")
    given = {"PATH": f"{tmp_path}/bin", "HOME": "/root", **environ}
    nix, directory = Nix(False, {}, given), ssh_directory(str(tmp_path))
    machine, programs = Machine.parse("machines:1", line, nix), Programs(Talk(nix))
    return Seat(Ssh.find(machine, nix, programs, directory))


@pytest.mark.parametrize(
    "line, environ",
    [
        ("b2", {}),
        ("nix@b1", {}),
        ("b1:2222", {}),
        ("b1 - /root/key", {}),
        ("ssh://b1?compress=true", {}),
        ("b1", {"HOME": "/home/nix"}),
        ("b1", {"SSH_AUTH_SOCK": "/tmp/agent"}),
        ("b1", {"NIX_SSHOPTS": "-i /root/key"}),
    ],
    ids=["host", "user", "port", "key", "compression", "HOME", "agent", "NIX_SSHOPTS"],
)
def test_whoever_connects_in_another_way_shares_nothing(
    line: str, environ: dict[str, str], tmp_path: Path
) -> None:
    assert seat(line, tmp_path, **environ).base != seat("b1", tmp_path).base


def test_what_does_not_matter_to_ssh_does_not_keep_from_sharing(tmp_path: Path) -> None:
    bases = {seat(line, tmp_path).base for line in ("b1", "ssh://b1 - - 8 2 kvm")}
    assert len(bases) == 1


@pytest.mark.engines
def test_two_users_of_one_machine_share_nothing(nix: Scene) -> None:
    nix.builder.add_user("second")
    connect(nix.client, nix.builder, "second")
    nix.build(one())
    before = set(sockets(nix))
    nix.machines("second@b1 - - 4\n")
    nix.build(one(), check=False)  # that user may not write the builder's store
    assert logins(nix) > 1 and before <= set(sockets(nix))


# -- Files ----------------------------------------------------------------------------


def test_nobody_else_may_use_a_connection(nix: Scene) -> None:
    nix.build(one())
    (socket,) = sockets(nix)
    assert stat.S_IMODE(socket.lstat().st_mode) == 0o600
    assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700


def test_a_private_directory_is_made_for_us_alone(tmp_path: Path) -> None:
    path = ssh_directory(f"{tmp_path}/s")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700


@pytest.fixture
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place for sockets that is not left for /tmp because its name is too long."""
    return tmp_path_factory.mktemp("s")


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777], ids=oct)
def test_a_directory_that_others_could_write_is_made_anew(
    mode: int, short: Path
) -> None:
    """What is in it may be theirs."""
    (short / "ssh").mkdir()
    (short / "ssh/theirs").touch()
    (short / "ssh").chmod(mode)
    assert ssh_directory(str(short)) == f"{short}/ssh"
    assert os.listdir(short / "ssh") == []
    assert stat.S_IMODE((short / "ssh").stat().st_mode) == 0o700


def test_a_link_is_replaced_by_a_directory(short: Path) -> None:
    (short / "there").mkdir(mode=0o700)
    (short / "ssh").symlink_to("there")
    ssh_directory(str(short))
    assert not (short / "ssh").is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_directory_of_somebody_else_is_put_aside(short: Path) -> None:
    (short / "ssh").mkdir(mode=0o700)
    os.chown(short / "ssh", 12345, 12345)
    ssh_directory(str(short))
    assert (short / "ssh").stat().st_uid == os.geteuid()


@pytest.mark.parametrize("length", range(1, 200, 13))
def test_a_control_sockets_name_fits_whatever_the_slot_directorys(
    length: int, tmp_path: Path
) -> None:
    """ssh binds another name first, with 17 characters more."""
    made = seat("b1", tmp_path / ("d" * length))
    assert len(f"{made.base}-15") <= SOCKET_LIMIT_BYTES


def test_a_slot_directory_may_have_a_long_name(nix: Scene) -> None:
    load = f"/tmp/{'long' * 30}"
    for _ in range(2):
        outcome = nix.build(one(), env={"NIX_CURRENT_LOAD": load})
        assert nix.client.read(outcome.output) == "b1\n"
    assert logins(nix) == 1


@pytest.mark.engines
def test_the_slot_directory_may_be_mounted_noexec(nix: Scene) -> None:
    nix.client.run("mkdir", "-p", "/tmp/noexec")
    nix.client.run("mount", "-t", "tmpfs", "-o", "noexec,mode=700", "x", "/tmp/noexec")
    script = "cat ${builtins.toFile ''noexec'' ''text''} > $out"
    outcome = nix.build(one(script), env={"NIX_CURRENT_LOAD": "/tmp/noexec/load"})
    assert nix.client.read(outcome.output) == "text"
    end_masters(nix)  # nothing else keeps the mount


def test_where_nothing_may_be_executed_it_is_said_what_to_do(nix: Scene) -> None:
    nix.client.run("mount", "-t", "tmpfs", "-o", "noexec,mode=1777", "x", "/tmp")
    outcome = nix.build(one(), check=False, env={"NIX_CURRENT_LOAD": "/tmp/load"})
    nix.client.run("umount", "-l", "/tmp")
    log = " ".join(outcome.log.split())
    assert outcome.status != 0 and "no program can be put into /tmp/load/ssh or" in log
    assert "mount one of them without noexec" in log


# -- Connections that end -------------------------------------------------------------


@pytest.mark.engines
def test_after_a_killed_master_there_is_a_new_one(nix: Scene) -> None:
    nix.build(one())
    end_masters(nix)
    outcome = nix.build(one())
    assert nix.client.read(outcome.output) == "b1\n"
    assert len(masters(nix)) == 1


def test_a_stale_socket_is_no_obstacle(nix: Scene) -> None:
    """Killed, a master leaves one behind, and the note that it was proved."""
    nix.build(one())
    end_masters(nix)
    assert len(sockets(nix)) == 1
    nix.build(one())
    nix.build(one())
    assert logins(nix) == 2


def test_a_master_that_stands_still_is_not_used_again(nix: Scene) -> None:
    """Its machine is well, and builds again over a new connection."""
    change_hook(nix, REPLY_S=5, RETIRE_S=2)
    nix.machines("b1 - - 1\n")
    nix.build(one())
    still = masters(nix)
    nix.client.signal(signal.SIGSTOP, *still)
    nix.machines("b1 - - 1 9\nb2 - - 1\n")

    def built_on_b1() -> bool:
        outcome = nix.build(one(), timeout=SOON_S)
        return nix.client.read(outcome.output) == "b1\n"

    poll(built_on_b1, "a build on b1", timeout=SOON_S)
    nix.client.signal(signal.SIGKILL, *still)  # a look may wait for it


def test_a_master_whose_socket_takes_no_more_calls_is_not_used_again(
    nix: Scene,
) -> None:
    """As that of one that stands still when many have called: to call it would wait."""
    change_hook(nix, REPLY_S=5, RETIRE_S=2)
    nix.build(one())
    still = masters(nix)
    nix.client.signal(signal.SIGSTOP, *still)
    (path,) = sockets(nix)
    calls = []
    with contextlib.suppress(BlockingIOError):
        for _ in range(200):
            calls.append(socket.socket(socket.AF_UNIX))
            calls[-1].setblocking(False)
            calls[-1].connect(str(path))
    assert len(calls) < 200
    outcome = nix.build(one(), timeout=SOON_S)
    assert nix.client.read(outcome.output) == "b1\n"
    for call in calls:
        call.close()
    nix.client.signal(signal.SIGKILL, *still)  # whom a spare session may wait for


@pytest.mark.engines
def test_builds_go_on_after_the_builder_has_restarted(nix: Scene) -> None:
    nix.build(one())
    nix.builder.restart_sshd(sessions=True)
    outcome = nix.build(one())
    assert nix.client.read(outcome.output) == "b1\n"


@pytest.mark.engines
def test_builds_are_done_again_after_the_builder_has_restarted(nix: Scene) -> None:
    run = nix.start(many(3, HELD))
    held(nix, 3)
    nix.builder.restart_sshd(sessions=True)
    release(nix)
    outcome = run.end()
    assert outcome.status == 0, outcome.log
    assert valid(nix.client, *outcome.outputs)


def test_a_build_moves_when_the_network_to_its_builder_is_silent(nix: Scene) -> None:
    """The connection seems to live, so the build is accepted at once."""
    change_hook(nix, ALIVE_INTERVAL_S=1)
    nix.build(one())
    nix.machines("b1 - - 1 9\nb2 - - 1\n")
    nix.builder.swallow(True)
    outcome = nix.build(one(), check=False, timeout=LONG_S)
    nix.builder.swallow(False)
    assert nix.client.read(outcome.output) == "b2\n"


def test_a_connection_outlives_the_end_of_all_that_began_it(nix: Scene) -> None:
    """A Ctrl-C is for nix-build and for all that belong to its process group."""
    run = nix.start(one(HELD))
    held(nix, 1)
    before = masters(nix)
    run.interrupt()
    nix.settle()
    assert masters(nix) == before != []


def test_a_connection_is_in_no_group_of_nixs(nix: Scene) -> None:
    nix.build(one())
    (master,) = masters(nix)
    fields = nix.client.read(f"/proc/{master}/stat").rpartition(")")[2].split()
    group, session = int(fields[2]), int(fields[3])
    alive = {process.pid for process in nix.client.processes()}
    assert not {group, session} & (alive - {master})


# -- Machines that cannot be reached --------------------------------------------------


@pytest.fixture(params=["silent", "refusing"])
def dead(request: pytest.FixtureRequest, nix: Scene) -> Iterator[Scene]:
    """b1 is the likeliest, and either never answers or has nothing that listens."""
    change_hook(nix, CONNECT_TIMEOUT_S=2)
    nix.machines("b1 - - 4 8\nb2 - - 4\n")
    silent = request.param == "silent"
    nix.builder.swallow(True) if silent else nix.builder.stop_sshd(sessions=True)
    yield nix
    nix.builder.swallow(False) if silent else nix.builder.start_sshd()


def test_without_any_machine_alive_builds_happen_here(dead: Scene) -> None:
    dead.machines("b1 - - 4 8\n")
    outcome = dead.build(one(), "-j1")
    assert dead.client.read(outcome.output) == "client\n"


# -- What the user's ssh_config says --------------------------------------------------


@pytest.fixture
def watched(nix: Scene) -> Iterator[Scene]:
    """Says on the builder what variable MARK it was started with."""
    sshd(nix, "AcceptEnv MARK")
    real = nix.builder.run("sh", "-c", "command -v nix-store").stdout.strip()
    script = f'#!/bin/sh\necho "mark:$MARK." >> /tmp/marks\nexec {real} "$@"\n'
    nix.builder.write("/usr/local/bin/nix-store", script, 0o755)
    yield nix
    nix.builder.run("rm", "/usr/local/bin/nix-store", "/tmp/marks")
    sshd(nix)


@pytest.mark.parametrize(
    "config, options",
    [("SetEnv MARK=here\n", ""), ("SendEnv MA*\n", ""), ("", "-oSetEnv=MARK=here")],
    ids=["SetEnv", "SendEnv", "NIX_SSHOPTS"],
)
def test_variables_are_sent_as_ssh_is_told(
    watched: Scene, config: str, options: str
) -> None:
    configure(watched, config)
    for _ in range(2):
        watched.build(one(), env={"MARK": "here", "NIX_SSHOPTS": options})
    assert set(watched.builder.read("/tmp/marks").split()) == {"mark:here."}
    assert logins(watched) == 1


SHARING = "ControlMaster auto\nControlPath /root/.ssh/user-%C\nControlPersist 60\n"


@pytest.mark.engines
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(SHARING, id="ControlMaster"),
        pytest.param(SHARING.replace("auto", "autoask"), id="ControlMaster autoask"),
        pytest.param("ControlPath none\n", id="ControlPath none"),
        pytest.param("ControlPersist no\n", id="ControlPersist no"),
        pytest.param("RemoteCommand echo no\n", id="RemoteCommand"),
        pytest.param("RequestTTY force\n", id="RequestTTY"),
        pytest.param("StdinNull yes\n", id="StdinNull"),
        pytest.param("ForkAfterAuthentication yes\n", id="ForkAfterAuthentication"),
        pytest.param("SessionType none\n", id="SessionType"),
        pytest.param("LogLevel QUIET\n", id="LogLevel QUIET"),
        pytest.param("LogLevel DEBUG3\n", id="LogLevel DEBUG3"),
        pytest.param("LocalForward 7777 b1:22\n", id="LocalForward"),
        pytest.param("RemoteForward 7777 b1:22\n", id="RemoteForward"),
        pytest.param("DynamicForward 7777\n", id="DynamicForward"),
        pytest.param("LocalForward 22 b1:22\nExitOnForwardFailure yes\n", id="taken"),
        pytest.param("PermitLocalCommand yes\nLocalCommand cat\n", id="LocalCommand"),
        pytest.param("EscapeChar none\nTunnel yes\n", id="Tunnel"),
        pytest.param("SendEnv *\nSetEnv A=b\n", id="SendEnv"),
    ],
)
def test_builds_work_though_ssh_config_has(nix: Scene, config: str) -> None:
    configure(nix, f"IgnoreUnknown *\nHost b1\n{config}")
    script = "cat ${builtins.toFile ''config'' ''text''} > $out"
    for _ in range(2):
        outcome = nix.build(one(f"{script}; hostname >> $out"))
        assert nix.client.read(outcome.output) == "textb1\n"
    assert logins(nix) == 1


def test_the_users_own_connection_is_not_ours(nix: Scene) -> None:
    configure(nix, SHARING)
    nix.build(one())
    assert not list(nix.client.path("/root/.ssh").glob("user-*"))


# -- Ways to a builder ----------------------------------------------------------------

DELAYED = "ProxyCommand /usr/local/bin/delay.py %h %p 20\n"


@pytest.fixture(params=["ProxyCommand", "ProxyJump"])
def proxied(request: pytest.FixtureRequest, nix: Scene) -> Iterator[Scene]:
    """b1 is reached by way of a program, or of b2."""
    way = DELAYED if request.param == "ProxyCommand" else "ProxyJump b2\n"
    configure(nix, f"Host b1\n{way}")
    yield nix
    end_masters(nix)  # and with them the proxies, which settle() would wait for


@pytest.mark.engines
def test_builds_go_through_a_proxy(proxied: Scene) -> None:
    outcome = proxied.build(many(3))
    assert {proxied.client.read(path) for path in outcome.outputs} == {"b1\n"}


@pytest.mark.engines
def test_a_connection_through_a_proxy_outlives_its_hook(proxied: Scene) -> None:
    proxied.build(one())
    proxied.build(one())
    assert logins(proxied) == 1


def test_a_connection_through_a_proxy_outlives_an_interrupt(proxied: Scene) -> None:
    run = proxied.start(one(HELD))
    held(proxied, 1)
    run.interrupt()
    release(proxied)
    proxied.build(one())
    assert logins(proxied) == 1


# -- What sshd allows -----------------------------------------------------------------


@pytest.mark.engines
@pytest.mark.parametrize("sessions", [1, 2])
def test_a_burst_succeeds_though_sshd_allows_few_sessions(
    limited: Scene, sessions: int
) -> None:
    sshd(limited, f"MaxSessions {sessions}")
    limited.machines("b1 - - 8\n")
    outcome = limited.build(many(8, "cat ${builtins.toFile ''few'' ''few''} > $out"))
    assert not NOISE.search(outcome.log), outcome.log


@pytest.mark.parametrize("sessions", [1, 2])
def test_how_many_sessions_sshd_allows_is_learnt(limited: Scene, sessions: int) -> None:
    sshd(limited, f"MaxSessions {sessions}")
    limited.machines("b1 - - 4\n")
    run = limited.start(many(4, HELD))
    held(limited, 4)
    release(limited)
    assert run.end().status == 0
    before = logins(limited)
    limited.builder.run("rm", "/tmp/go")
    run = limited.start(many(4, HELD))
    held(limited, 8)
    release(limited)
    assert run.end().status == 0
    # no session is refused any more, which would make a connection of its own
    assert logins(limited) - before <= 4 // sessions + 1


@pytest.mark.engines
def test_a_burst_succeeds_though_sshd_drops_connections(limited: Scene) -> None:
    sshd(limited, "MaxStartups 1:50:2")
    limited.machines("b1 - - 24\n")
    runs = [limited.start(many(12)) for _ in range(2)]
    assert [run.end().status for run in runs] == [0, 0]


def test_a_builder_that_allows_no_session_is_told_of(limited: Scene) -> None:
    sshd(limited, "MaxSessions 0")
    outcome = limited.build(one(), "-j1")
    assert limited.client.read(outcome.output) == "client\n"
    assert "cannot build on 'ssh://b1': " in outcome.log


# -- What goes through ----------------------------------------------------------------


@pytest.mark.engines
def test_a_big_input_arrives_intact(nix: Scene) -> None:
    nix.client.run("sh", "-c", "head -c 100000000 /dev/urandom > /tmp/big-input")
    expected = nix.client.run("sha256sum", "/tmp/big-input").stdout.split()[0]
    outcome = nix.build(one("sha256sum < ${/tmp/big-input} > $out"))
    assert nix.client.read(outcome.output).split()[0] == expected


@pytest.mark.engines
def test_a_big_output_arrives_intact(nix: Scene) -> None:
    script = "head -c 100000000 /dev/urandom > $out; sha256sum < $out"
    outcome = nix.build(one(script))
    got = nix.client.run("sha256sum", outcome.output).stdout.split()[0]
    assert got in outcome.log and valid(nix.client, outcome.output)


@pytest.mark.engines
def test_an_input_an_output_and_a_log_may_all_be_big(nix: Scene) -> None:
    nix.client.run("sh", "-c", "head -c 30000000 /dev/urandom > /tmp/input")
    script = "seq 200000; cat ${/tmp/input} ${/tmp/input} > $out"
    outcome = nix.build(one(script))
    sizes = [nix.client.path(path).stat().st_size for path in (outcome.output,)]
    assert sizes == [60_000_000] and "\n200000\n" in outcome.log


# As Lix starts its ssh: with a socket for both of its ends, which nobody can open again.
SOCKET_SSH = """#!/usr/bin/python3
import os, socket, sys, threading
ours, theirs = socket.socketpair()
if os.fork():
    os.environ["PATH"] = os.environ["PATH"].partition(":")[2]
    for number in (0, 1):
        os.dup2(theirs.fileno(), number)
    os.execvp("ssh", ["ssh", *sys.argv[1:]])
os.closerange(2, ours.fileno())
os.closerange(ours.fileno() + 1, 20)
def send():
    while data := os.read(0, 65536):
        ours.sendall(data)
    ours.shutdown(socket.SHUT_WR)
threading.Thread(target=send, daemon=True).start()
while data := ours.recv(65536):
    os.write(1, data)
os._exit(0)
"""
COPY = "/usr/bin/nix-copy-closure"


def test_an_ssh_that_has_a_socket_is_served(nix: Scene) -> None:
    there = nix.client.run("readlink", "-f", COPY).stdout.strip()
    nix.client.write("/opt/socket/ssh", SOCKET_SSH, 0o755)
    nix.client.run("ln", "-sfn", there, "/opt/nix-copy-closure")
    nix.client.run("mv", COPY, "/opt/kept")
    wrapper = 'PATH=/opt/socket:$PATH exec /opt/nix-copy-closure "$@"'
    nix.client.write(COPY, f"#!/bin/sh\n{wrapper}\n", 0o755)
    try:
        nix.client.write("/tmp/small", os.urandom(100000))
        outcome = nix.build(one("cat ${/tmp/small} > $out"))
    finally:
        nix.client.run("mv", "/opt/kept", COPY)
    assert nix.client.path(outcome.output).stat().st_size == 100000
    assert "a bug" not in outcome.log


def test_proc_may_show_the_processes_of_others(nix: Scene) -> None:
    """That of the machine, in a container whose own processes have other numbers."""
    command = nix.nix_build(one("cat ${builtins.toFile ''small'' ''text''} > $out"))
    apart = ("unshare", "--pid", "--fork", "--kill-child")
    outcome = nix.launch(*apart, *command).end()
    assert outcome.status == 0, outcome.log


@pytest.mark.parametrize("apart", [False, True], ids=["beside", "in containers"])
def test_who_builds_by_turns_needs_one_connection_each(
    nix: Scene, *, apart: bool
) -> None:
    """In containers that share the slots, they do not end each other's."""
    contain = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    nix.client.run("sh", "-c", "rm -f /tmp/[ab]-* /tmp/end")
    for who in "ab":
        turns = "; ".join(turn(nix, f"/tmp/{who}-{number}") for number in range(4))
        script = f"{turns}; until [ -e /tmp/end ]; do sleep 0.05; done"
        nix.client.popen(*contain[: 5 * apart], "sh", "-c", script)
    try:
        for number, who in itertools.product(range(4), "ab"):
            nix.client.write(f"/tmp/{who}-{number}", "")
            done = nix.client.path(f"/tmp/{who}-{number}.done")
            poll(done.exists, f"turn {number} of {who}")
    finally:
        nix.client.write("/tmp/end", "")
    assert logins(nix) <= 2


def turn(nix: Scene, file: str) -> str:
    """For a shell: build when there is that file, and then make another."""
    build = shlex.join(nix.nix_build(one()))
    return f"until [ -e {file} ]; do sleep 0.05; done; {build} && touch {file}.done"


@pytest.mark.engines
def test_an_untrusted_user_builds_over_a_shared_connection(
    client_engine: str, pytestconfig: pytest.Config
) -> None:
    builder = other(pytestconfig, client_engine)
    with distrustful(client_engine, builder) as running:
        running.build(INPUT, *LOCAL)
        built = running.build(DEPENDENT).output
        again = running.build(one()).output
        assert valid(running.client, built, again)
        assert logins(running) == 1
        running.settle()
