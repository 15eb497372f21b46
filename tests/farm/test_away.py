"""Machines that are away or of no use: who notices, who is spared, and how they return.

b1 is the likeliest of two. (The rest is in test_table.py.)
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
import time
from collections.abc import Iterator

import pytest
from held import BEGUN, HELD, afresh, at_work, let_go, two_builders
from lab import HANGS_S, is_taken, poll
from launcher import assigned
from scene import (
    SLOTS,
    Scene,
    change_hook,
    come_back,
    distrustful,
    go_away,
    other,
    outage,
    scene,
    suitable,
)
from test_trust import LIAR
from test_waiting import taken

LONG_S = HANGS_S

numbers = itertools.count()


def some(count: int, script: str = "hostname > $out") -> str:
    """Derivations that no other test has."""
    name = f'"some-{next(numbers)}-${{toString n}}"'
    return f'builtins.genList (n: mk {name} "{script}" {{}}) {count}'


def built_on(nix: Scene, expression: str, *options: str) -> set[str]:
    outcome = nix.build(expression, *options, timeout=LONG_S)
    return {nix.client.read(path).strip() for path in outcome.outputs}


@pytest.fixture(scope="module")
def hosts(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    with two_builders(pytestconfig, client_engine) as running:
        yield running


@pytest.fixture
def nix(hosts: Scene) -> Iterator[Scene]:
    with afresh(hosts, slots=4, CONNECT_TIMEOUT_S=3) as nix:
        yield nix


@pytest.fixture(params=["silent", "refusing"])
def without_b1(request: pytest.FixtureRequest, nix: Scene) -> Scene:
    go_away(nix.builder, request.param)
    return nix


# -- The others are spared ------------------------------------------------------------


def test_other_nix_processes_know_it_too(without_b1: Scene) -> None:
    built_on(without_b1, some(1))
    log = without_b1.build(some(1)).log
    assert "cannot build on" not in log


def test_it_is_told_of_once_in_sshs_own_words(without_b1: Scene) -> None:
    log = without_b1.build(some(12), timeout=LONG_S).log
    said = re.findall("cannot build on 'ssh://b1': .*(?:refused|timed out).*", log)
    assert len(said) == 1
    assert "is sshd running there" in said[0] or "is the machine on" in said[0]


# -- It comes back --------------------------------------------------------------------


@pytest.mark.engines
def test_a_machine_that_is_back_is_used_again(without_b1: Scene) -> None:
    nix = without_b1
    assert built_on(nix, some(1)) == {"b2"}
    come_back(nix.builder)
    poll(lambda: built_on(nix, some(1)) == {"b1"}, "a build on b1")
    assert outage(nix, "b1") == ""


def test_a_build_that_has_waited_long_in_line_is_not_given_up_at_the_next_failure(
    nix: Scene,
) -> None:
    """It was lost on b1, waited for b2 for longer than it is tried, and cannot connect."""
    change_hook(nix, AWAY_TIMEOUT_S=20)
    nix.machines("b1 - - 1 8\nb2 - - 1\n")
    nix.client.run("mkdir", "-p", SLOTS)
    with taken(nix, "ssh:__b2-0") as b2:
        run = nix.start(some(1, HELD))
        at_work(run, nix.builder)
        go_away(nix.builder)
        run.says("trying again")
        with taken(nix, "ssh:__b1-0"):
            come_back(nix.builder)
            time.sleep(21)
            go_away(nix.builders[1])
            b2.close()
            run.says("to 'ssh://b2': ssh: connect to host")
    let_go(*nix.builders)
    assert run.end(LONG_S).status == 0, run.log


# -- It is there, but of no use -------------------------------------------------------


def test_what_will_not_pass_is_not_waited_for(nix: Scene) -> None:
    """Such as a key that the machine does not know, if no other machine will do."""
    nix.client.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/tmp/strange")
    nix.machines("b1 - /tmp/strange 4\n")
    option = ("-oIdentitiesOnly=yes", "-oIdentityFile=/tmp/strange")
    outcome = nix.build(
        some(1), check=False, env={"NIX_SSHOPTS": " ".join(option)}, timeout=LONG_S
    )
    assert outcome.status != 0
    assert "Permission denied" in outcome.log
    assert "(ssh-copy-id -i /tmp/strange b1 " in outcome.log


def test_what_was_put_right_is_used_at_once(nix: Scene) -> None:
    nix.machines("b1 - - 4\n")
    allowed = nix.builder.read("/root/.ssh/authorized_keys")
    nix.builder.write("/root/.ssh/authorized_keys", "", 0o600)
    assert nix.build(some(1), check=False, timeout=LONG_S).status != 0
    nix.builder.write("/root/.ssh/authorized_keys", allowed, 0o600)
    assert built_on(nix, some(1)) == {"b1"}


# -- The note ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "note",
    [
        "",
        "x",
        "1 2 3 lasts",
        "1 1e400 nan lasts x",
        "1 {now} {now} likely x",
        "9 {now} {far} lasts set back",
        "7 {now} 0 lasts old",
    ],
    ids=["empty", "nonsense", "no words", "no numbers", "no kind", "clock set", "old"],
)
def test_a_note_that_means_nothing_keeps_nobody_away(nix: Scene, note: str) -> None:
    built_on(nix, some(1))
    now = time.time()
    text = note.format(now=now, far=now + 1e6)
    nix.client.write(f"{SLOTS}/own/ssh:__b1.down", text, 0o600)
    assert built_on(nix, some(1)) == {"b1"}
    assert outage(nix, "b1") == ""


def test_a_note_counts(nix: Scene) -> None:
    built_on(nix, some(1))
    text = f"3 {time.time()} {time.time() + 30} passes Connection refused"
    nix.client.write(f"{SLOTS}/own/ssh:__b1.down", text, 0o600)
    assert built_on(nix, some(1)) == {"b2"}


# -- What it must not do to others ----------------------------------------------------


def leave_alone(nix: Scene, host: str, words: str, seconds: int = 5) -> None:
    kind = "lasts" if "denied" in words else "passes"
    text = f"1 {time.time()} {time.time() + seconds} {kind} {words}"
    nix.client.write(f"{SLOTS}/own/ssh:__{host}.down", text, 0o600)


def test_a_hook_that_wants_to_go_back_does_not_wait_for_itself(nix: Scene) -> None:
    """Its session is lost just when another hook has found that the machine fails."""
    nix.machines("b1 - - 4\n")
    run = nix.start(some(1, HELD))
    at_work(run, nix.builder)
    leave_alone(nix, "b1", "Connection refused")
    let_go(nix.builder)
    nix.builder.restart_sshd(sessions=True)
    assert run.end(LONG_S).status == 0


def test_an_outage_of_long_ago_ends_no_build(nix: Scene) -> None:
    """Though its machine has not built since, and now loses a session twice."""
    nix.machines("b1 - - 4\n")
    built_on(nix, some(1))
    ended = time.time() - 3600
    note = f"1 {ended} {ended} lasts Permission denied (publickey)."
    nix.client.write(f"{SLOTS}/own/ssh:__b1.down", note, 0o600)
    run = nix.start(some(1, HELD))
    for _ in range(2):
        at_work(run, nix.builder)
        nix.builder.run("rm", BEGUN)
        found = nix.builder.processes()
        stores = [p.pid for p in found if "nix-store --serve" in p.cmdline]
        nix.builder.signal(signal.SIGKILL, *stores)
    let_go(nix.builder)
    assert run.end(LONG_S).status == 0, run.log


def test_one_builds_own_trouble_costs_no_other_build(nix: Scene) -> None:
    """Such as an input that is not there any more, though the store thinks so."""
    nix.machines("b1 - - 2\n")
    nix.client.write("/tmp/bad/input", "hello")
    path = nix.client.run("nix-store", "--add", "/tmp/bad/input").stdout.strip()
    nix.client.run("rm", "-rf", path)
    source = f'builtins.appendContext "{path}" {{ "{path}" = {{ path = true; }}; }}'
    bad = f'mk "bad-{next(numbers)}" "cat $src > $out" {{ src = {source}; }}'
    healthy = some(8, "sleep 0.5; hostname > $out")
    command = f"[ ({bad}) ] ++ ({healthy})"
    outcome = nix.build(command, "-k", check=False, timeout=LONG_S)
    nix.client.run("nix-store", "--delete", "--ignore-liveness", path, check=False)
    assert outcome.status != 0
    done = nix.build(healthy, "--dry-run", timeout=LONG_S)
    assert "will be built" not in done.log


@pytest.mark.parametrize("words", ["Permission denied (publickey)", "refused"])
def test_a_failure_that_nobody_else_can_try_is_a_failure(
    nix: Scene, words: str
) -> None:
    built_on(nix, some(1))
    name = f"fixed-{next(numbers)}"
    hash_ = f'outputHash = "{"0" * 52}"; outputHashAlgo = "sha256";'
    expression = f'mk "{name}" "exit 1" {{ {hash_} outputHashMode = "flat"; }}'
    leave_alone(nix, "b2", words, 30)
    outcome = nix.build(expression, check=False, timeout=LONG_S)
    assert outcome.status != 0 and words not in outcome.log


def test_a_daemon_that_stands_still_delays_no_reply(client_engine: str) -> None:
    with distrustful(client_engine, client_engine) as nix:
        change_hook(nix, GREETING_TIMEOUT_S=1)
        (daemon,) = daemons(nix)
        nix.builder.signal(signal.SIGSTOP, daemon)
        assert built_on(nix, some(3), "-j2") == {"client"}
        nix.builder.signal(signal.SIGCONT, daemon)


def test_whom_the_daemon_lets_in_later_gets_a_new_connection(
    client_engine: str,
) -> None:
    """An old one would keep the groups that its user had."""
    with distrustful(client_engine, client_engine) as nix:
        folder = "/nix/var/nix/daemon-socket"
        lock_out = f"echo friends:x:4242: >> /etc/group; chgrp 4242 {folder}"
        nix.builder.run("sh", "-c", f"{lock_out}; chmod 750 {folder}")
        outcome = nix.build(some(1), check=False, timeout=LONG_S)
        assert outcome.status != 0 and "usermod -aG nix-users nix)" in outcome.log
        nix.builder.run("sed", "-i", "s/^friends.*/&nix/", "/etc/group")
        assert built_on(nix, some(1)) == {"b1"}


def daemons(nix: Scene) -> list[int]:
    found = nix.builder.processes()
    return [process.pid for process in found if "nix-daemon" in process.cmdline]


@pytest.mark.engines
def test_a_dead_daemon_on_the_builder_is_an_outage(
    client_engine: str, pytestconfig: pytest.Config
) -> None:
    with distrustful(client_engine, other(pytestconfig, client_engine)) as nix:
        nix.build(some(1))  # then the connection is known to work
        nix.builder.signal(signal.SIGKILL, *daemons(nix))
        waiting = nix.start(some(4))
        note = nix.client.path(f"{SLOTS}/own/ssh:__nix@b1.down")
        poll(note.exists, "a note of the outage")
        assert "daemon-socket" in note.read_text()
        assert built_on(nix, some(3), "-j2") == {"client"}
        nix.builder.start_daemon()
        assert waiting.end(LONG_S).status == 0
        assert "systemctl start nix-daemon.socket" in waiting.log
        # Each build says it once, and while one tries again the others wait for it.
        assert 0 < waiting.log.count("trying again") <= 4


# -- It lets us in, and says nothing --------------------------------------------------

HANG = """#!/usr/bin/env python3
import struct, sys, time
manners = open("/tmp/manners").read()
if manners != "silent":
    sys.stdin.buffer.read(16)
    sys.stdout.buffer.write(struct.pack("<QQ", 0x5452EECB, 0x207))
    sys.stdout.flush()
time.sleep(1000)
"""


@pytest.fixture(params=["silent", "greets"])
def hung(request: pytest.FixtureRequest, nix: Scene) -> Iterator[Scene]:
    """b1's nix-store hangs from the start, or where it needs its store; its sshd is well.
    With b2 there is a connection, so that nobody has to be quick to reach that."""
    nix.machines("b2 - - 4\n")
    built_on(nix, some(1))
    nix.machines("b1 - - 4 8\nb2 - - 4\n")
    be_impatient(nix)
    nix.builder.write("/tmp/manners", request.param)
    nix.builder.write("/usr/local/bin/nix-store", HANG, 0o755)
    yield nix
    nix.builder.run("rm", "-f", "/usr/local/bin/nix-store")
    found = nix.builder.processes()
    nix.builder.signal(
        signal.SIGKILL, *(p.pid for p in found if "--serve" in p.cmdline)
    )


def be_impatient(nix: Scene) -> None:
    """The times are shorter, but as long beside each other as they are; a failure is
    remembered for long enough to find out again on a slow machine."""
    times = assigned({"REPLY_S": 1, "GREETING_TIMEOUT_S": 3, "LOGIN_TIMEOUT_S": 5})
    change_hook(nix, *times, PAUSE_S=0.5, PAUSE_LIMIT_S=50)


def fails(nix: Scene, times: int) -> None:
    """Build, until that many failures of b1 have been noted."""

    def failed() -> bool:
        assert built_on(nix, some(1)) == {"b2"}
        return int((outage(nix, "b1") or "0").split()[0]) >= times

    poll(failed, f"{times} failures")


@pytest.mark.engines
def test_each_failure_of_a_machine_that_hangs_is_noted(hung: Scene) -> None:
    """To find out takes longer than the machine is left alone, here."""
    for times in (1, 2, 3):
        fails(hung, times)


def test_who_finds_out_again_is_nobody_that_nix_waits_for(hung: Scene) -> None:
    """So it is told of once, by the first build."""
    logs = [hung.build(some(2)).log]
    fails(hung, 2)
    logs += [hung.build(some(1)).log for _ in range(2)]
    assert [log.count("cannot build on") for log in logs] == [1, 0, 0]


def test_a_live_connection_is_no_health(hung: Scene) -> None:
    """A machine that hangs after it has built is left alone, and comes back by itself."""
    hung.builder.run("rm", "/usr/local/bin/nix-store")
    change_hook(hung)
    assert built_on(hung, some(1)) == {"b1"}
    be_impatient(hung)
    hung.builder.write("/usr/local/bin/nix-store", HANG, 0o755)
    assert built_on(hung, some(2)) == {"b2"}
    assert outage(hung, "b1")
    assert built_on(hung, some(2)) == {"b2"}
    hung.builder.run("rm", "/usr/local/bin/nix-store")
    change_hook(hung)
    poll(lambda: built_on(hung, some(1)) == {"b1"}, "a build on b1")
    assert outage(hung, "b1") == ""


@pytest.mark.parametrize("program", ["env", "nice"])
def test_a_program_before_nix_store_gives_it_no_more_time(
    hung: Scene, program: str
) -> None:
    """These wait for no turn, as a batch system's do."""
    uri = f"ssh://b1?remote-program={program}%20nix-store"
    hung.machines(f"{uri} - - 4 8\nb2 - - 4\n")
    assert built_on(hung, some(1)) == {"b2"}


def test_a_builder_that_stops_in_the_middle_of_an_answer_is_given_up(
    nix: Scene,
) -> None:
    change_hook(nix, STALLED_S=5)
    nix.builder.write("/tmp/lie", "stop")
    nix.builder.write("/tmp/victim", "/nix/store/x")
    with lying(nix, LIAR):
        assert built_on(nix, some(1)) == {"b2"}


def test_what_a_builder_says_to_who_finds_out_fills_no_disk(nix: Scene) -> None:
    built_on(nix, some(1))
    with lying(nix, "#!/bin/sh\nexec head -c 60000000 /dev/zero\n"):
        leave_alone(nix, "b1", "refused", 0)
        probe = nix.client.path(f"{SLOTS}/own/ssh:__b1.probe")

        def has_heard() -> bool:
            assert built_on(nix, some(1)) == {"b2"}
            is_there = probe.exists() and probe.stat().st_size > 1 << 15
            return is_there and not is_taken(probe)

        poll(has_heard, "the end of what it says")
        assert probe.stat().st_size < 1 << 20


@contextlib.contextmanager
def lying(nix: Scene, program: str) -> Iterator[None]:
    """b1 has that program in the place of nix-store."""
    nix.builder.write("/usr/local/bin/nix-store", program, 0o755)
    try:
        yield
    finally:
        nix.builder.run("rm", "/usr/local/bin/nix-store")


# -- Who is told, and who can build here ----------------------------------------------

CONTAIN = ("unshare", "--pid", "--fork", "--mount-proc")


def test_each_nix_is_told_though_all_are_process_1_in_their_containers(
    nix: Scene,
) -> None:
    """They share a slot directory, and each has a namespace of its own."""
    nix.machines("b1 - - 4 8\nb2 - - 4\nb3 - - many\n")
    logs = [nix.client.run(*CONTAIN, *nix.nix_build(some(1))).stderr for _ in range(2)]
    assert [log.count("maxJobs is 'many'") for log in logs] == [1, 1]


def test_a_machine_put_right_is_tried_by_each_nix_that_is_process_1(nix: Scene) -> None:
    """For whom another, of the same number, has tried it in vain."""
    nix.machines("b1 - - 4 8\n")
    nix.builder.write("/usr/local/bin/nix-store", "#!/bin/sh\nexit 3\n", 0o755)
    for _ in range(2):
        command = nix.nix_build(some(1))
        assert nix.client.run(*CONTAIN, *command, check=False).returncode != 0
    nix.builder.run("rm", "/usr/local/bin/nix-store")
    nix.client.run(*CONTAIN, *nix.nix_build(some(1)), timeout=LONG_S)


# Called with a file of JSON that says what to build.
EXTERNAL = """#!/usr/bin/python3
import json, os, sys
job = json.load(open(sys.argv[1]))
print(chr(2), flush=True)
os.execve(job["builder"], [job["builder"], *job["args"]], {**job["env"], "WHO": "external"})
"""


def test_what_an_external_builder_can_build_here_waits_for_no_machine(
    client_engine: str, pytestconfig: pytest.Config
) -> None:
    client = suitable(pytestconfig, client_engine, (2, 33).__le__)
    with scene(client, client) as nix:
        nix.client.write("/usr/local/bin/external", EXTERNAL, 0o755)
        nix.machines("b1 riscv64-linux - 4\n")
        go_away(nix.builder)
        setting = {"systems": ["riscv64-linux"], "program": "/usr/local/bin/external"}
        told = nix.build(
            'mk "outside" "echo $WHO > $out" { system = "riscv64-linux"; }',
            *("--option", "extra-experimental-features", "external-builders"),
            *("--option", "external-builders", json.dumps([{**setting, "args": []}])),
            *("-j1", "--option", "sandbox", "false"),
        )
        assert nix.client.read(told.output) == "external\n"
        assert "no machine can build" not in told.log
