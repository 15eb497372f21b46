"""The design's table *When things go wrong*, row by row.

Every row is made to happen to a real nix-build, and to Nix 1.x as the driver plays it.
b1 is the likelier one of two builders. Builds note down on their builder that they run,
and hooks on the client how they ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import platform
import re
import signal
import struct
import termios
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import fakes
import pytest
import scene as setting
from lab import HANGS_S, Host, is_taken, poll
from scene import (
    DRIVER,
    INSTALLED,
    SLOTS,
    Outcome,
    Run,
    Scene,
    begun,
    come_back,
    go_away,
    other,
    outage,
    valid,
)

pytestmark = pytest.mark.engines
ENGINES = ("host", "2.8", "2.34")  # as clients; five minutes each

MACHINES = "/etc/nix/machines"
SYSTEM = f"{platform.machine()}-linux"
SERVE = "nix-store --serve"
LONG_S = HANGS_S
BIG = 8_000_000
HELD = "touch /tmp/held; while ! [ -e /tmp/go ]; do sleep 0.02; done; hostname > $out"
LEFT = "rm -rf /tmp/go /tmp/held /tmp/runs /tmp/exits /usr/local/bin/nix-store"
numbers = itertools.count()


class Caller(NamedTuple):
    """A Nix on the client that calls the hook: nix-build, or that of the driver."""

    scene: Scene
    old: bool
    client: Host
    b1: Host
    b2: Host

    def machines(self, *lines: str) -> None:
        self.client.write(MACHINES, "".join(f"{line}\n" for line in lines))

    def start(
        self,
        expression: str,
        *,
        jobs: int = 0,  # that it may run itself
        limits: tuple[int, int] = (0, 0),  # timeout and max-silent-time
        **env: str,
    ) -> Run:
        options = ["--max-jobs", str(jobs), "--timeout", str(limits[0])]
        options += ["--max-silent-time", str(limits[1])]
        if not self.old:
            options += ["--option", "build-poll-interval", "1"]
            return self.scene.start(expression, *options, env=env)
        options += ["--poll-interval", "1", "--system", SYSTEM, *self.drvs(expression)]
        env |= {"NIX_REMOTE_SYSTEMS": MACHINES, "NIX_CURRENT_LOAD": SLOTS}
        driver = ("python3", DRIVER, "--build", "--hook", INSTALLED)
        return self.scene.launch(*driver, *options, env=env)

    def build(self, expression: str, **how: Any) -> Outcome:
        return self.start(expression, **how).end(LONG_S)

    def drvs(self, expression: str) -> list[str]:
        path = self.scene.nix_build(expression)[1]
        return self.client.run("nix-instantiate", path).stdout.split()

    def built_on(self, run: Run | Outcome) -> set[str]:
        """The hosts that the outputs name."""
        outcome = run.end(LONG_S) if isinstance(run, Run) else run
        assert outcome.status == 0, outcome.log
        return {self.client.read(path).strip() for path in outcome.outputs}

    @property
    def runs(self) -> tuple[int, int]:
        """How often builds were run on b1 and on b2."""
        return len(words(self.b1, "/tmp/runs")), len(words(self.b2, "/tmp/runs"))

    @property
    def exits(self) -> list[str]:
        """How those hooks ended that did not succeed."""
        return [status for status in words(self.client, "/tmp/exits") if status != "0"]

    def hold(self, builder: Host) -> None:
        """Wait until a build is held there."""
        poll(builder.path("/tmp/held").exists, "the build", timeout=LONG_S)

    def release(self) -> None:
        for builder in self.scene.builders:
            builder.write("/tmp/go", "")


def words(host: Host, path: str) -> list[str]:
    return host.read(path).split() if host.path(path).exists() else []


def pids(host: Host, pattern: str) -> list[int]:
    return [pid for pid, cmdline in host.processes() if re.search(pattern, cmdline)]


def one(script: str = "hostname > $out", attributes: str = "") -> str:
    """A derivation that no other test has."""
    script = f"echo run >> /tmp/runs; {script}"
    return f"mk \"row-{next(numbers)}\" ''{script}'' {{ {attributes} }}"


def some(count: int, script: str = "hostname > $out") -> str:
    name = f'"rows-{next(numbers)}-${{toString n}}"'
    return f"builtins.genList (n: mk {name} ''{script}'' {{}}) {count}"


def hello(script: str) -> str:
    """A derivation whose output has to be that word: a download, for Nix."""
    digest = 'outputHash = builtins.hashString "sha256" "hello";'
    return one(script, f'outputHashAlgo = "sha256"; outputHashMode = "flat"; {digest}')


def install(nix: Caller, *statements: str, **constants: float) -> None:
    """The hook, with a note of how it ends, and with other constants."""
    note = 'open("/tmp/exits", "a").write(f"{status}\\n")'
    setting.change_hook(nix.scene, *statements, after=note, **constants)


def taken(nix: Caller) -> list[str]:
    """The locks that somebody holds."""
    files = [path for path in nix.client.path(SLOTS).rglob("*") if path.is_file()]
    return [path.name for path in files if is_taken(path)]


@pytest.fixture(scope="module")
def hosts(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    builder = other(pytestconfig, client_engine)
    with setting.scene(client_engine, builder, builder) as running:
        running.client.write("/usr/local/bin/ssh", setting.SSH, 0o755)
        yield running


@pytest.fixture(params=["nix-build", "1.x"])
def nix(request: pytest.FixtureRequest, hosts: Scene) -> Iterator[Caller]:
    """Whatever happens in a test, nothing but idle connections may outlive it."""
    nix = Caller(hosts, request.param == "1.x", hosts.client, *hosts.builders)
    setting.forget(hosts)
    for host in (nix.client, nix.b1, nix.b2):
        host.run("sh", "-c", LEFT)
    install(nix)
    nix.machines(f"b1 {SYSTEM} - 4 8", f"b2 {SYSTEM} - 4")
    yield nix
    nix.release()
    come_back(nix.b1)
    come_back(nix.b2)
    hosts.clear()
    poll(lambda: not taken(nix), f"the end of {taken(nix)}")
    assert hosts.locks() == []


# -- Rows that end before the reply ---------------------------------------------------


def test_without_machines_2x_is_told_once_and_for_all(nix: Caller) -> None:
    nix.machines()
    outcome = nix.build(some(2), jobs=1, NIX_DEBUG_HOOK="1")
    assert nix.built_on(outcome) == {"client"}
    assert outcome.log.count("one of 0 machines?") == (2 if nix.old else 1)


def test_a_bad_line_costs_only_that_machine_and_is_told_once(nix: Caller) -> None:
    nix.machines("ssh://b1?colour=blue", f"b2 {SYSTEM} - 4")
    outcome = nix.build(some(3))
    assert nix.built_on(outcome) == {"b2"}
    assert outcome.log.count(f"{MACHINES}:1: ") == 1
    assert "parameter 'colour'" in outcome.log


def test_what_no_machine_can_build_nix_builds_itself_in_silence(nix: Caller) -> None:
    nix.machines("b1 riscv64-linux - 4", f"b2 {SYSTEM} - 4 1 - kvm")
    outcome = nix.build(one(), jobs=1)
    assert nix.built_on(outcome) == {"client"}
    assert "no machine can build" not in outcome.log


def test_what_nobody_can_build_is_told_with_each_machines_reason(nix: Caller) -> None:
    nix.machines(f"b1 {SYSTEM} - 4", "b2 riscv64-linux - 4")
    odd = 'requiredSystemFeatures = [ "kvm" ]; system = "riscv64-linux";'
    outcome = nix.build(one(attributes=odd))
    (line,) = re.findall("no machine can build .*", outcome.log)
    assert outcome.status and f"b1' builds {SYSTEM}, not riscv64-linux" in line
    assert re.search("b2' .*kvm", line)


@pytest.fixture(params=["silent", "refusing"])
def without_b1(request: pytest.FixtureRequest, nix: Caller) -> Caller:
    install(nix, CONNECT_TIMEOUT_S=5)
    go_away(nix.b1, request.param)
    return nix


def test_the_next_machine_builds_and_ssh_is_quoted_once(without_b1: Caller) -> None:
    """Or that it says nothing for longer than Nix may wait for a reply."""
    install(without_b1, CONNECT_TIMEOUT_S=10, REPLY_S=5)
    outcome = without_b1.build(some(6))
    assert without_b1.built_on(outcome) == {"b2"}
    said = re.findall(
        "cannot build on '.*b1': .*(?:refused|no connection)", outcome.log
    )
    assert len(said) == 1


def test_one_hook_at_a_time_probes_it(without_b1: Caller) -> None:
    """Also when several look at it as its time is over."""
    without_b1.build(some(16, "sleep 0.5; hostname > $out"))
    failures = int(outage(without_b1.scene, "b1").split()[0])
    assert begun(without_b1.scene, "b1") <= failures + 1


def test_it_is_left_alone_for_longer_and_longer(nix: Caller) -> None:
    """For half a second to one at first, then each time for twice that, until it is
    tried successfully: when a delay is over, the next build begins to find out, and the
    one after that hears of it."""
    go_away(nix.b1)
    count = until = 0.0
    for failures in (1, 2, 3):
        while count < failures:
            before = time.time()
            nix.build(one())
            count, _, until = map(float, outage(nix.scene, "b1").split()[:3])
        assert count == failures
        assert before + 2**failures / 2 <= until <= time.time() + 2**failures
        time.sleep(max(0.0, until - time.time()))


def test_what_nix_can_build_itself_waits_for_no_machine(nix: Caller) -> None:
    nix.machines(f"b1 {SYSTEM} - 4")
    go_away(nix.b1)
    assert nix.built_on(nix.start(some(2), jobs=1)) == {"client"}


def test_what_nix_cannot_build_waits_until_a_machine_is_back(nix: Caller) -> None:
    go_away(nix.b1)
    go_away(nix.b2)
    run = nix.start(some(2))
    run.says("; waiting for a machine")
    come_back(nix.b2)
    assert nix.built_on(run) == {"b2"}


def test_after_15_minutes_it_is_waited_for_no_more(nix: Caller) -> None:
    install(nix, AWAY_TIMEOUT_S=2)  # instead of those
    go_away(nix.b1)
    go_away(nix.b2)
    outcome = nix.build(one())
    assert outcome.status and nix.exits == ([] if nix.old else ["1"])
    assert re.search("no machine for it was there for .* refused", outcome.log)


def test_what_was_not_expected_is_told_and_declined(nix: Caller) -> None:
    install(nix, "hook.rank = None")
    outcome = nix.build(some(2), jobs=1)
    assert nix.built_on(outcome) == {"client"}
    assert "a bug in nix_build_remote.py" in outcome.log


# -- The builder is lost after accept -------------------------------------------------


def lose(nix: Caller, how: str) -> None:
    """End the session with b1, on which one build is held."""
    nix.b1.run("rm", "-f", "/tmp/held")
    if how == "connection":
        nix.client.signal(signal.SIGKILL, *pids(nix.client, "^ssh: |^/usr/bin/ssh "))
    elif how == "sshd":  # but for the one that listens
        sessions = set(pids(nix.b1, "^sshd")) - {nix.b1.sshd_pid}
        nix.b1.signal(signal.SIGKILL, *sessions)
    else:  # with its build, which nobody else would end
        nix.b1.signal(signal.SIGKILL, *pids(nix.b1, f"{SERVE}|/tmp/go"))


@pytest.mark.parametrize("how", ["connection", "sshd", "nix-store"])
def test_it_goes_on_on_another_machine_that_is_free(nix: Caller, how: str) -> None:
    run = nix.start(one(HELD))
    nix.hold(nix.b1)
    lose(nix, how)
    nix.hold(nix.b2)
    nix.release()
    assert nix.built_on(run) == {"b2"} and nix.runs == (1, 1)


def test_it_is_tried_once_more_if_no_other_is_free(nix: Caller) -> None:
    nix.machines(f"b1 {SYSTEM} - 1 8", f"b2 {SYSTEM} - 1")
    run = nix.start(one(HELD))
    nix.hold(nix.b1)
    other = nix.start(one(HELD))
    nix.hold(nix.b2)
    lose(nix, "sshd")
    nix.hold(nix.b1)
    nix.release()
    assert nix.built_on(run) == {"b1"} and nix.built_on(other) == {"b2"}
    assert nix.runs == (2, 1)


def test_silence_beyond_the_keep_alive_is_a_loss(nix: Caller) -> None:
    install(nix, ALIVE_INTERVAL_S=1, CONNECT_TIMEOUT_S=5)
    run = nix.start(one(HELD))
    nix.hold(nix.b1)
    go_away(nix.b1, "silent")
    nix.hold(nix.b2)
    nix.release()
    assert nix.built_on(run) == {"b2"} and nix.runs == (1, 1)


def test_the_build_waits_in_line_for_the_next_machine(nix: Caller) -> None:
    nix.machines(f"b1 {SYSTEM} - 1 8", f"b2 {SYSTEM} - 1")
    moves = nix.start(one(HELD))
    nix.hold(nix.b1)
    stays = nix.start(one(HELD))
    nix.hold(nix.b2)
    go_away(nix.b1)
    waits = lambda: any("b2" in who for who in setting.places(nix.scene))
    poll(waits, "the line for b2")
    assert nix.runs == (1, 1)
    nix.release()
    assert nix.built_on(moves) == nix.built_on(stays) == {"b2"}


def test_what_was_accepted_waits_until_its_machine_is_back(nix: Caller) -> None:
    nix.machines(f"b1 {SYSTEM} - 4")
    run = nix.start(one(HELD))
    nix.hold(nix.b1)
    go_away(nix.b1)

    def failures() -> int:
        return int(outage(nix.scene, "b1").partition(" ")[0] or 0)

    poll(lambda: failures() > 1, "two failures")
    nix.release()
    come_back(nix.b1)
    assert nix.built_on(run) == {"b1"}


def test_what_was_accepted_fails_after_15_minutes(nix: Caller) -> None:
    install(nix, AWAY_TIMEOUT_S=2)  # instead of those
    nix.machines(f"b1 {SYSTEM} - 4")
    run = nix.start(one(HELD))
    nix.hold(nix.b1)
    go_away(nix.b1)
    outcome = run.end(LONG_S)
    assert outcome.status and nix.exits == ["1"]
    assert "Connection refused" in outcome.log


def test_the_sixth_loss_of_a_build_that_had_begun_is_its_end(nix: Caller) -> None:
    """Here the build itself kills the nix-store that serves it."""
    outcome = nix.build(one("kill -9 $PPID; exit 1"))
    assert outcome.status and nix.exits == ["1"] and sum(nix.runs) == 6


# -- Sending or fetching fails --------------------------------------------------------


@contextlib.contextmanager
def mounted(options: str, *places: tuple[Host, str]) -> Iterator[None]:
    for host, place in places:
        host.run("mkdir", "-p", place)
        host.run("mount", "-t", "tmpfs", "-o", options, "none", place)
    yield
    for host, place in places:
        host.run("umount", "-l", place)


SMALL = f"size={BIG // 2}"


def test_what_does_not_fit_on_a_machine_is_sent_to_the_next(nix: Caller) -> None:
    source = f"/tmp/big-{next(numbers)}"
    nix.client.run("sh", "-c", f"head -c {BIG} /dev/urandom > {source}")
    with mounted(SMALL, (nix.b1, "/nix/store")):
        outcome = nix.build(one(f"cat ${{{source}}} > /dev/null; hostname > $out"))
    assert nix.built_on(outcome) == {"b2"} and nix.runs == (0, 1)
    assert "No space left on device" in outcome.log


@pytest.mark.parametrize(
    "command", ["rm", "sed -i s/same/else/", "sed -i s/same/something/"]
)
def test_an_input_that_is_gone_or_spoilt_here_fails_its_build_alone(
    nix: Caller, command: str
) -> None:
    source = f"/tmp/same-{next(numbers)}"
    nix.client.write(source, source)
    path = nix.client.run("nix-store", "--add", source).stdout.strip()
    nix.client.run(*command.split(), path)
    context = f'builtins.appendContext "{path}" {{ "{path}" = {{ path = true; }}; }}'
    outcome = nix.build(one("cat $src > $out", f"src = {context};"))
    nix.client.run("nix-store", "--delete", "--ignore-liveness", path, check=False)
    assert outcome.status and nix.exits == ["1"] and nix.runs == (0, 0)
    assert "trying again" not in outcome.log
    said = re.findall("cannot send the inputs of .*", outcome.log)
    assert len(said) == 1 and path in said[0]
    assert outage(nix.scene, "b1") == outage(nix.scene, "b2") == ""


def slots(nix: Caller) -> str:
    """What all slot files say."""
    files = nix.client.path(SLOTS).glob("*-[0-9]*")
    return "".join(file.read_text() for file in files if file.is_file())


def unread(client: Host, hook: int) -> int:
    """Bytes that its session has said, and that the hook has not read yet."""
    (session,) = pids(client, r"^/usr/bin/ssh .* nix-store --serve --write")
    said = os.readlink(client.path(f"/proc/{session}/fd") / "1")
    for link in client.path(f"/proc/{hook}/fd").iterdir():
        if os.readlink(link) == said:
            with link.open("rb") as pipe:
                answer = fcntl.ioctl(pipe, termios.FIONREAD, bytes(4))
            return int(struct.unpack("i", answer)[0])
    raise AssertionError(f"no pipe of {hook} comes from {session}")


def test_outputs_that_were_lost_on_their_way_are_not_built_again(nix: Caller) -> None:
    """The session is lost while the hook, which stands still, has not read the news."""
    run = nix.start(one(f"{HELD}; printf %{BIG}s >> $out"))
    nix.hold(nix.b1)
    poll(lambda: " building " in slots(nix), "the hook to wait for it")
    hook = min(nix.scene.hooks())  # what it just starts looks like it for a moment
    nix.client.signal(signal.SIGSTOP, hook)
    nix.release()
    poll(lambda: unread(nix.client, hook), "the news that it is built", timeout=LONG_S)
    lose(nix, "nix-store")
    nix.client.signal(signal.SIGCONT, hook)
    assert nix.built_on(run) == {"b1"} and nix.runs == (1, 0)
    assert "cannot fetch the outputs of" in run.log


def test_outputs_that_a_builder_cannot_read_are_built_elsewhere(nix: Caller) -> None:
    expression = one()
    output = nix.build(expression).output
    nix.client.run("nix-store", "--delete", output)
    nix.b1.run("rm", output)
    assert nix.built_on(nix.start(expression)) == {"b2"} and nix.runs == (1, 1)


def test_a_full_store_here_fails_the_build_with_its_words(nix: Caller) -> None:
    with mounted(SMALL, (nix.client, "/nix/store")):
        outcome = nix.build(one(f"head -c {BIG} /dev/urandom > $out"))
    assert outcome.status and nix.exits == ["1"] and nix.runs == (1, 0)
    assert "No space left on device" in outcome.log


# -- The build fails ------------------------------------------------------------------


@pytest.mark.parametrize("script", ["exit 7", "true", "printf other > $out"])
def test_a_failed_build_is_never_tried_again(nix: Caller, script: str) -> None:
    """By its script, without an output, or (5) with a wrong one."""
    outcome = nix.build(hello(script) if "other" in script else one(script))
    assert outcome.status and nix.exits == ["100"] and nix.runs == (1, 0)


@pytest.mark.parametrize("status", [7, 10, 11, 12, 14, 15, 99])
def test_nor_is_what_will_always_fail_in_other_ways(nix: Caller, status: int) -> None:
    outcome = build_that_ends_with(nix, status)
    assert outcome.status and nix.exits == ["100"] and nix.runs == (1, 0)


def test_what_a_machine_rejects_is_tried_on_one_other(nix: Caller) -> None:
    """4: it may lack what its line claims."""
    outcome = build_that_ends_with(nix, 4)
    assert outcome.status and nix.exits == ["100"] and nix.runs == (1, 1)


def build_that_ends_with(nix: Caller, status: int) -> Outcome:
    """With a fake nix-store, that has what 1.x would send: the derivation."""
    expression = one()
    fake = fakes.SSH.format(journal="/tmp/journal", have="/tmp/have")
    start = f"echo run >> /tmp/runs; FAKE_STATUS={status} exec /usr/local/lib/fake -- b"
    for builder in (nix.b1, nix.b2):
        builder.write("/tmp/have", " ".join(nix.drvs(expression)))
        builder.write("/usr/local/lib/fake", f"#!/usr/bin/python3 -IS\n{fake}", 0o755)
        builder.write("/usr/local/bin/nix-store", f"#!/bin/sh\n{start}\n", 0o755)
    return nix.build(expression)


by_limit = pytest.mark.parametrize(
    "limits", [(5, 0), (0, 5)], ids=["timeout", "max-silent-time"]
)


@by_limit
def test_nor_is_what_takes_too_long(nix: Caller, limits: tuple[int, int]) -> None:
    outcome = nix.build(one("echo begun; sleep 600"), limits=limits)
    assert outcome.status and nix.exits == ["101"] and nix.runs == (1, 0)
    assert "begun" in outcome.log and "timed out after 5 seconds" in outcome.log


@by_limit
def test_nor_is_that_if_the_builder_lets_it(
    nix: Caller, limits: tuple[int, int]
) -> None:
    """Its nix-store stands still; when it goes on, the build must end there."""
    install(nix, MARGIN_S=1)
    limits = 2 * limits[0], 2 * limits[1]  # it must stand still before
    run = nix.start(one("echo begun; sleep 600"), limits=limits)
    run.says("begun")
    still = pids(nix.b1, SERVE)
    nix.b1.signal(signal.SIGSTOP, *still)
    outcome = run.end(LONG_S)
    nix.b1.signal(signal.SIGCONT, *still)
    assert outcome.status and nix.exits == ["101"] and nix.runs == (1, 0)
    assert "and the builder let it" in outcome.log


def test_a_failed_download_succeeds_on_another_machine(nix: Caller) -> None:
    run = nix.start(hello("[ $(hostname) = b2 ] && printf hello > $out"))
    assert nix.built_on(run) == {"hello"} and nix.runs == (1, 1)


@pytest.mark.parametrize("machines", [1, 2])
def test_a_download_that_fails_everywhere_failed(nix: Caller, machines: int) -> None:
    nix.machines(*(f"b{n} {SYSTEM} - 4" for n in range(1, machines + 1)))
    outcome = nix.build(hello("exit 1"))
    assert outcome.status and nix.exits == ["100"] and nix.runs == (1, machines - 1)


def no_room(*builders: Host) -> contextlib.AbstractContextManager[None]:
    """They cannot make a directory to build in; not all Nixes make it in /tmp."""
    places = ("/tmp", "/nix/var/nix/builds")
    return mounted("ro", *itertools.product(builders, places))


def test_what_one_machine_is_unable_to_do_another_does(nix: Caller) -> None:
    with no_room(nix.b1):
        assert nix.built_on(nix.start(one())) == {"b2"}


def test_what_two_machines_are_unable_to_do_fails_the_hook(nix: Caller) -> None:
    with no_room(nix.b1, nix.b2):
        outcome = nix.build(one())
    assert outcome.status and nix.exits == ["1"]


# -- The hook gets a signal -----------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_the_hooks_end_ends_the_remote_build(nix: Caller, name: str) -> None:
    """And nothing remains, as the fixture sees."""
    run = nix.start(expression := one(HELD))
    nix.hold(nix.b1)
    nix.client.signal(signal.Signals[name], *nix.scene.hooks())
    assert run.end(LONG_S).status
    nix.scene.settle()
    assert not nix.client.path(nix.scene.output(expression)).exists()
    nix.release()
    assert valid(nix.client, nix.build(expression).output)
