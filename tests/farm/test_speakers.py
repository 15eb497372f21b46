"""Who says what: a program on the builder that refuses us is not taken for the network,
whose troubles pass, and is told of at once, once, and with a remedy."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator

import pytest
from lab import HANGS_S, Host, connect, poll
from scene import (
    INSTALLED,
    Outcome,
    Scene,
    change_hook,
    cleared,
    end_masters,
    other,
    scene,
    text_of,
)

# A build that waited for the machine to be of use again would take 15 minutes.
TIMEOUT_S = HANGS_S
GREETS = '#!/bin/sh\necho "Welcome to the builder!"\nexec /bin/sh "$@"\n'
numbers = itertools.count()


@pytest.fixture(scope="module")
def hosts(client_engine: str) -> Iterator[Scene]:
    with scene(client_engine, client_engine) as running:
        running.builder.write("/usr/local/bin/greets", GREETS, 0o755)
        yield running


@pytest.fixture
def nix(hosts: Scene) -> Iterator[Scene]:
    with cleared(hosts) as nix:
        change_hook(nix)
        yield nix


def newcomer(nix: Scene, shell: str = "/bin/sh") -> str:
    """A user of the builder with that shell, whom the machines file names."""
    name = f"user{next(numbers)}"
    nix.builder.add_user(name)
    users = nix.builder.read("/etc/passwd")
    home = f":/home/{name}:"
    nix.builder.write("/etc/passwd", users.replace(f"{home}/bin/sh", home + shell))
    connect(nix.client, nix.builder, name)
    nix.machines(f"{name}@b1 x86_64-linux\n")
    return name


def force(builder: Host, user: str, command: str) -> None:
    with builder.path("/etc/ssh/sshd_config").open("a") as file:
        file.write(f"Match User {user}\n  ForceCommand {command}\n")
    builder.restart_sshd()


def refused(nix: Scene, *options: str, **env: str) -> Outcome:
    """What becomes of a build, which ends soon."""
    expression = f'mk "job-{next(numbers)}" "echo > $out" {{}}'
    outcome = nix.build(
        expression, *options, check=False, timeout=TIMEOUT_S, env=env or None
    )
    assert outcome.status != 0 and "trying again" not in outcome.log, outcome.log
    return outcome


def told(outcome: Outcome) -> str:
    """The one line that tells why."""
    lines = [line for line in outcome.log.splitlines() if "cannot build on" in line]
    assert len(lines) == 1, outcome.log
    return lines[0]


def test_a_store_in_another_directory_is_told_at_once(nix: Scene) -> None:
    user = newcomer(nix)
    elsewhere = "env NIX_STORE_DIR=/home/store NIX_STATE_DIR=/home/state"
    elsewhere += " NIX_LOG_DIR=/home/log nix-store --serve --write"
    nix.builder.run("mkdir", "-m", "777", "/home/store", "/home/state", "/home/log")
    force(nix.builder, user, elsewhere)
    line = told(refused(nix))
    assert "is not in the Nix store" in line and "another directory" in line


@pytest.mark.parametrize(
    "shell, words, remedy",
    [
        ("/usr/sbin/nologin", "This account is currently not available", "chsh -s"),
        ("/usr/local/bin/greets", "Welcome to the builder!", "chsh -s"),
        ("/bin/false", "exit status 1", "nix-store --version"),
        ("/bin/missing", "", "a shell"),
    ],
)
def test_a_login_without_a_usual_shell_is_told_at_once(
    nix: Scene, shell: str, words: str, remedy: str
) -> None:
    user = newcomer(nix, shell)
    line = told(refused(nix))
    assert words in line and remedy in line
    assert remedy != "chsh -s" or f"chsh -s /bin/sh {user}" in line


def test_a_login_that_may_only_copy_files_is_told_at_once(nix: Scene) -> None:
    user = newcomer(nix)
    force(nix.builder, user, "internal-sftp")
    line = told(refused(nix))
    assert "sftp" in line and f"chsh -s /bin/sh {user}" in line


def test_a_user_who_may_not_write_the_store_is_no_wrong_key(nix: Scene) -> None:
    newcomer(nix)
    line = told(refused(nix))
    assert (
        re.search("denied|not permitted", line)
        and "nix-daemon" in line
        and "key" not in line
    )


def test_a_user_whom_the_daemon_does_not_allow_is_told_at_once(
    client_engine: str,
) -> None:
    with scene(
        client_engine, client_engine, builder_conf="allowed-users = root\n"
    ) as nix:
        change_hook(nix)
        user = newcomer(nix)
        nix.builder.start_daemon()
        assert f"allowed-users in nix.conf there must name {user}" in told(refused(nix))


@pytest.mark.parametrize("options", ["-q", "-vq", "-E /tmp/words", "-v -E/tmp/words"])
def test_an_ssh_that_may_say_nothing_is_asked_for_its_reason(
    nix: Scene, options: str
) -> None:
    nix.machines("nobody@b1 x86_64-linux\n")
    nix.builder.restart_sshd()  # so that it forgets what has failed before
    line = told(refused(nix, NIX_SSHOPTS=options))
    assert "Permission denied (publickey" in line


# What sshd from 9.8 on does for a while with a host whose logins have failed.
CLOSES = """
import socket
server = socket.create_server(("", 22))
while True:
    server.accept()[0].close()
    open("/tmp/closed", "a").write("x")
"""


@pytest.mark.engines
def test_an_sshd_that_refuses_this_host_for_a_while_is_waited_for(nix: Scene) -> None:
    """Newer versions of ssh say that less loudly, and more often than it would be hopeless."""
    change_hook(nix, PAUSE_S=0.1, PAUSE_LIMIT_S=0.2)
    nix.machines("b1 x86_64-linux\n")
    nix.builder.stop_sshd(sessions=True)
    closes = nix.builder.popen("python3", "-c", CLOSES)
    closed = nix.builder.path("/tmp/closed")
    try:
        run = nix.start(f'mk "job-{next(numbers)}" "echo > $out" {{}}')
        run.says("wait a minute")
        poll(lambda: run.ended or len(text_of(closed)) > 9, "ten tries")
    finally:
        closes.kill()
        closes.communicate()
        nix.builder.start_sshd()
    assert run.end().status == 0, run.log


def test_what_lasts_costs_the_next_builds_nothing(nix: Scene) -> None:
    newcomer(nix, "/bin/false")
    nix.machines(nix.client.read("/etc/nix/machines") + "b1 x86_64-linux - 1\n")
    name = f"job-{next(numbers)}"
    expression = f'mk "{name}-${{toString n}}" "echo > $out" {{}}'
    outcome = nix.build(f"builtins.genList (n: {expression}) 4", timeout=TIMEOUT_S)
    told(outcome)
    status = nix.client.run(INSTALLED, "status", "--json").stdout
    assert "exit status 1" in str(json.loads(status)["machines"][0])


@pytest.mark.engines
def test_a_machine_that_lacks_what_its_line_claims_is_left_for_another(
    client_engine: str, pytestconfig: pytest.Config
) -> None:
    """And the line is named, once: the next build does not try there first."""
    builder = other(pytestconfig, client_engine)
    with scene(client_engine, builder, builder) as nix:
        change_hook(nix)
        with nix.builders[1].path("/etc/nix/nix.conf").open("a") as conf:
            conf.write("system-features = quantum\n")
        nix.machines("b1 - - 4 8 quantum\nb2 - - 4 1 quantum\n")
        wants = '{ requiredSystemFeatures = [ "quantum" ]; }'
        logs = []
        for number in range(2):
            outcome = nix.build(f'mk "wants-{number}" "hostname > $out" {wants}')
            assert nix.client.read(outcome.output) == "b2\n"
            logs.append(outcome.log)
    assert ["machines:1 says that" in log for log in logs] == [True, False], logs


def test_a_lost_session_is_told_with_two_lines_of_the_log_at_most(nix: Scene) -> None:
    nix.machines("b1\n")
    script = """for n in 1 2 3 4 5 6 7 8 9; do echo "line $n of the log"; done
        touch /tmp/said; while ! [ -e /tmp/go ]; do sleep 0.02; done; echo > $out"""
    run = nix.start(f"mk \"chatty\" ''{script}'' {{}}")
    poll(nix.builder.path("/tmp/said").exists, "the build")
    run.says("line 9 of the log")
    end_masters(nix)
    run.says("trying again")
    nix.builder.write("/tmp/go", "")
    assert run.end().status == 0
    told = [line for line in run.log.splitlines() if "trying again" in line]
    assert len(told) == 1 and told[0].count("of the log") <= 2
