"""What people type: check, status and explain, on the farm."""

from __future__ import annotations

import base64
import json
import os
import pty
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from lab import HANGS_S, Host, keypair, poll, trust
from scene import (
    HOOK,
    INSTALLED,
    Scene,
    change_hook,
    masters,
    other,
    scene,
    suitable,
)

KEY = "/root/.ssh/other"
GO = "/tmp/go"
WAITS = f"echo $$ > /tmp/running-$name; while ! [ -e {GO} ]; do sleep 0.05; done; echo > $out"

# -- check: each thing that it can find, and then its remedy ---------------------------


@pytest.fixture(scope="module")
def hosts(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    builder = other(pytestconfig, client_engine)
    with scene(client_engine, builder, builder) as running:
        change_hook(running, CONNECT_TIMEOUT_S=3)
        yield running


@pytest.fixture
def nix(hosts: Scene) -> Iterator[Scene]:
    hosts.machines("b1 - - 2\n")
    hosts.client.run("rm", "-rf", "/root/.ssh/known_hosts", "/nix/var/nix/current-load")
    for builder in hosts.builders:
        trust(hosts.client, builder)
    # That of OpenSSH 9.8 shuts out for a while who has not been let in too often.
    hosts.builder.restart_sshd(sessions=True)
    yield hosts
    if not hosts.builder.sshd_pid:
        hosts.builder.start_sshd()


def check(nix: Scene, *words: str) -> tuple[int, dict[str, Any]]:
    """Its exit status, and what it says."""
    command = (INSTALLED, "check", "--json", *words)
    done = nix.client.run(*command, check=False)
    return done.returncode, json.loads(done.stdout)


def wrong(nix: Scene) -> tuple[str, str, str]:
    """The one thing that is wrong: what, its text, its remedy."""
    status, said = check(nix)
    [machine] = said["machines"]
    found = [f for f in machine["findings"] if f["state"] == "wrong"]
    assert status == 1 and not machine["well"]
    assert len(found) == 1, machine["findings"]
    return found[0]["what"], found[0]["text"], found[0]["remedy"]


def well(nix: Scene) -> bool:
    status, said = check(nix)
    assert status == 0, said
    [machine] = said["machines"]
    states = {finding["what"]: finding["state"] for finding in machine["findings"]}
    assert list(states) == [
        "ssh",
        "login",
        "nix",
        "offers",
        "disk",
        "clock",
        "cores",
        "build",
    ]
    return bool(machine["well"])


def type_in(nix: Scene, command: str) -> None:
    """As a person would, who says yes to a new host key."""
    yes = re.sub(r"\bssh ", "ssh -oStrictHostKeyChecking=accept-new ", command)
    nix.client.run("sh", "-c", yes)


@pytest.mark.engines
def test_a_machine_that_is_well_is_well(nix: Scene) -> None:
    assert well(nix)


def test_a_key_that_the_builder_does_not_know(nix: Scene) -> None:
    nix.client.run("rm", "-f", KEY)
    nix.client.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", KEY)
    nix.machines(f"b1 - {KEY}\n")
    what, text, remedy = wrong(nix)
    assert what == "login" and remedy.startswith(f"ssh-copy-id -i {KEY} b1 (")
    assert "Permission denied" in text
    nix.builder.authorize(nix.client.read(f"{KEY}.pub"))  # what that does
    assert well(nix)


def test_a_key_that_is_not_there(nix: Scene) -> None:
    nix.client.run("rm", "-f", KEY)  # ssh would go on without it, if another is let in
    nix.machines(f"b1 - {KEY}\n")
    what, text, remedy = wrong(nix)
    make, _, copy = remedy.partition(": ")[2].partition(" && ")
    assert (what, copy) == ("login", f"ssh-copy-id -i {KEY} b1")
    assert f"no key {KEY}" in text
    nix.client.run(*shlex.split(make))
    nix.builder.authorize(nix.client.read(f"{KEY}.pub"))
    assert well(nix)


def test_a_key_with_a_passphrase(nix: Scene) -> None:
    nix.client.run("rm", "-f", KEY)
    nix.client.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", KEY)
    nix.builder.authorize(nix.client.read(f"{KEY}.pub"))
    nix.machines(f"b1 - {KEY}\n")
    what, text, remedy = wrong(nix)
    assert what == "login" and "passphrase" in text
    command = remedy.partition(": ")[2]
    assert command == f"ssh-keygen -p -N '' -f {KEY}"
    nix.client.run(*shlex.split(command), "-P", "secret")
    assert well(nix)


def test_a_key_that_others_may_read(nix: Scene) -> None:
    nix.client.run("rm", "-f", f"{KEY}.pub")
    nix.client.run("cp", "/root/.ssh/id_ed25519", KEY)
    nix.client.run("chmod", "644", KEY)
    nix.machines(f"b1 - {KEY}\n")
    what, text, remedy = wrong(nix)
    assert (what, remedy) == ("login", f"chmod 600 {KEY}")
    assert f"'{KEY}' are too open" in text
    type_in(nix, remedy)
    assert well(nix)


def test_a_key_that_others_may_read_and_that_only_ssh_knows(nix: Scene) -> None:
    key = "/root/.ssh/id_ed25519"
    nix.client.run("chmod", "644", key)
    what, text, remedy = wrong(nix)
    nix.client.run("chmod", "600", key)
    assert (what, remedy) == ("login", "chmod 600 the key file") and key in text
    assert well(nix)


def test_a_host_key_that_is_not_known(nix: Scene) -> None:
    nix.client.run("rm", "/root/.ssh/known_hosts")
    what, text, remedy = wrong(nix)
    assert what == "login" and "Host key verification failed" in text
    type_in(nix, remedy.partition(": ")[2])
    assert well(nix)


def test_a_host_key_that_has_changed(nix: Scene) -> None:
    key = "/etc/ssh/ssh_host_ed25519_key"
    nix.builder.run("rm", key)
    nix.builder.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    nix.builder.restart_sshd(sessions=True)
    what, text, remedy = wrong(nix)
    assert (what, text) == ("login", "its host key has changed")
    type_in(nix, remedy.partition(": ")[2])
    assert well(nix)


def test_another_host_key_than_the_machines_file_has(nix: Scene) -> None:
    key = keypair(nix.client)
    pinned = base64.b64encode(" ".join(key.split()[:2]).encode()).decode()
    nix.machines(f"b1 - - 2 1 - - {pinned}\n")
    what, text, remedy = wrong(nix)
    assert what == "login" and "not the one that /etc/nix/machines:1 asks for" in text
    command = remedy.partition("line: ")[2]
    right = nix.client.run("sh", "-c", command).stdout.strip()
    nix.machines(f"b1 - - 2 1 - - {right}\n")
    assert well(nix)


def test_no_nix_store_in_the_path(nix: Scene) -> None:
    elsewhere = "/nix/var/nix/profiles/default/bin"
    real = nix.builder.run("readlink", "-f", "/usr/bin/nix-store").stdout.strip()
    nix.builder.run("mkdir", "-p", elsewhere)
    nix.builder.run("ln", "-s", real, f"{elsewhere}/nix-store")
    nix.builder.run("mv", "/usr/bin/nix-store", "/usr/bin/kept")
    try:
        what, text, remedy = wrong(nix)
        assert what == "nix" and "not found" in text
        assert f"ln -s {elsewhere}/nix-store " in remedy
        uri = remedy.partition("write ")[2]
        nix.machines(f"{uri} - - 2\n")
        assert well(nix)
    finally:
        nix.builder.run("mv", "/usr/bin/kept", "/usr/bin/nix-store")
        nix.builder.run("rm", "-rf", "/usr/local/bin/nix-store", elsewhere)


def test_a_login_that_says_something(nix: Scene) -> None:
    nix.builder.write("/root/.ssh/rc", "echo welcome\n")
    try:
        what, text, remedy = wrong(nix)
        assert what == "nix" and "welcome" in text and "start-up file" in remedy
    finally:
        nix.builder.run("rm", "/root/.ssh/rc")
    assert well(nix)


def test_a_full_disk(nix: Scene) -> None:
    nix.builder.run("mount", "-t", "tmpfs", "-o", "size=300m", "small", "/nix")
    try:
        nix.builder.run("sh", "-c", "head -c 290000000 /dev/zero > /tmp/junk")
        nix.builder.run("nix-store", "--add", "/tmp/junk")
        what, text, remedy = wrong(nix)
        assert what == "disk" and "free in its store" in text
        type_in(nix, remedy)
        assert well(nix)
    finally:
        nix.builder.run("rm", "-f", "/tmp/junk")
        nix.builder.run("umount", "-l", "/nix")


def test_a_disk_that_is_so_full_that_nix_fails_there(nix: Scene) -> None:
    nix.builder.run("mount", "-t", "tmpfs", "-o", "size=5m", "small", "/nix")
    try:
        nix.builder.run("sh", "-c", "head -c 9m /dev/zero > /nix/junk || :")
        said = check(nix)[1]["machines"][0]["findings"]
        remedies = {f["what"]: f["remedy"] for f in said if f["state"] == "wrong"}
        assert remedies.keys() == {"nix", "disk"}
        assert "nix-collect-garbage" in remedies["disk"]
    finally:
        nix.builder.run("umount", "-l", "/nix")


def test_a_clock_that_is_off(nix: Scene) -> None:
    # The kernel has one clock for all: what puts it right is a fake, too.
    date, put_right = "/usr/local/bin/date", "/usr/local/bin/timedatectl"
    nix.builder.write(date, "#!/bin/sh\nexec /bin/date -d '-1 hour' \"$@\"\n", 0o755)
    nix.builder.write(put_right, f"#!/bin/sh\nrm {date}\n", 0o755)
    what, text, remedy = wrong(nix)
    assert what == "clock" and re.search("clock is (1 h 0|59) min.* behind", text)
    type_in(nix, remedy)
    assert well(nix)


def test_a_system_that_the_builder_is_not(nix: Scene) -> None:
    nix.machines("b1 aarch64-linux - 2\n")
    what, text, remedy = wrong(nix)
    assert what == "offers" and "/etc/nix/machines:1 says" in text
    nix.machines(f"b1 {remedy.rpartition(': ')[2]} - 2\n")
    assert well(nix)


def test_a_feature_that_the_builder_lacks(nix: Scene) -> None:
    nix.machines("b1 - - 2 1 quantum\n")
    what, text, remedy = wrong(nix)
    assert what == "offers" and "quantum" in text
    conf = nix.builder.read("/etc/nix/nix.conf")
    line = remedy.rpartition(": ")[2]
    nix.builder.write("/etc/nix/nix.conf", f"{conf}\n{line}\n")
    assert well(nix)
    nix.builder.write("/etc/nix/nix.conf", conf)


def test_nobody_listens(nix: Scene) -> None:
    nix.builder.stop_sshd()
    what, text, remedy = wrong(nix)
    assert what == "ssh" and "b1 port 22: Connection refused" in text
    assert remedy == "is sshd running there, on that port?"
    nix.builder.start_sshd()
    assert well(nix)


def test_nobody_answers(nix: Scene) -> None:
    nix.builder.swallow(True)
    try:
        what, text, remedy = wrong(nix)
    finally:
        nix.builder.swallow(False)
    assert what == "ssh" and "timed out" in text and "is the machine on" in remedy
    assert well(nix)


def test_a_name_that_is_not_known(nix: Scene) -> None:
    nix.machines("nowhere\n")
    what, text, remedy = wrong(nix)
    assert what == "ssh" and "resolve hostname nowhere" in text
    assert "/etc/nix/machines:1" in remedy


def test_a_bad_line(nix: Scene) -> None:
    nix.machines("b1 - - 2\nb2 - - many\n")
    status, said = check(nix)
    [complaint] = said["complaints"]
    assert status == 1 and complaint.startswith(
        "/etc/nix/machines:2: maxJobs is 'many'"
    )
    nix.machines("b1 - - 2\n")
    assert well(nix)


def test_no_machines_at_all(nix: Scene) -> None:
    nix.machines("")
    status, said = check(nix)
    assert status == 1 and "no machines are listed" in said["complaints"][0]
    nix.client.run("rm", "/etc/nix/machines")
    assert "/etc/nix/machines, which is not there" in check(nix)[1]["complaints"][0]


def test_only_those_named_are_checked(nix: Scene) -> None:
    nix.machines("b1 - - 2\nb2 - - 2\n")
    status, said = check(nix, "b2")
    assert (status, [m["machine"] for m in said["machines"]]) == (0, ["ssh://b2"])


def test_a_machine_that_is_put_right_is_used_again_at_once(nix: Scene) -> None:
    note = nix.client.path("/nix/var/nix/current-load/own/ssh:__b1.down")
    nix.builder.stop_sshd(sessions=True)
    nix.build('mk "put-right" "echo > $out" {}', "-j1")
    assert note.exists()
    nix.builder.start_sshd()
    assert well(nix) and not note.exists()


def test_hooks_of_another_environment_log_in_anew_after_a_check(nix: Scene) -> None:
    """nix-daemon has no HOME, or another one than who types."""
    nix.build('mk "homeless" "echo > $out" {}', "-j0", env={"HOME": "/tmp"})
    folder = nix.client.path("/nix/var/nix/current-load/ssh")
    [socket] = [path for path in folder.iterdir() if path.is_socket()]
    assert well(nix)
    assert not socket.exists()


def test_a_hook_that_nix_does_not_use_is_noticed(nix: Scene) -> None:
    """As Nix 2.25 to 2.33 forget it, if it stands in /etc/nix/nix.conf."""
    nix.client.copy(HOOK, INSTALLED)
    _, said = check(nix)
    assert said["note"].startswith("Note: Nix here does not use this hook now")
    nix.client.run("cp", INSTALLED, "/tmp/copy")
    new = not nix.client.engine.version.startswith(("2.3.", "2.8."))
    for setting, used in (
        (INSTALLED, True),
        ("/tmp/copy", True),
        (f"/usr/bin/python3 -IS {INSTALLED}", new),
    ):
        nix.client.write("/root/.config/nix/nix.conf", f"build-hook = {setting}\n")
        _, said = check(nix)
        assert (said["note"] == "") == used
    nix.client.run("rm", "-r", "/root/.config/nix", "/tmp/copy")


def test_a_check_that_is_interrupted_leaves_nothing(nix: Scene) -> None:
    nix.builder.swallow(True)
    try:
        check_all = nix.client.popen(INSTALLED, "check", stdout=subprocess.DEVNULL)
        poll(lambda: list(nix.client.path("/tmp").glob("check-*")), "its folder")
        check_all.send_signal(signal.SIGINT)
        assert check_all.wait(HANGS_S) == 130
    finally:
        nix.builder.swallow(False)
    assert not list(nix.client.path("/tmp").glob("check-*"))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_its_build_ends_with_a_check(nix: Scene, how: signal.Signals) -> None:
    # Lets check find out its version, and then keeps its build waiting.
    hang = "mkdir /tmp/served || { touch /tmp/hangs; exec cat > /dev/null; }"
    slow = "/usr/local/bin/nix-store"
    text = f'case "$*" in *--serve*) {hang};; esac\nexec /usr/bin/nix-store "$@"\n'
    nix.builder.write(slow, f"#!/bin/sh\n{text}", 0o755)
    check_all = nix.client.popen(INSTALLED, "check", stdout=subprocess.DEVNULL)
    try:
        poll(nix.builder.path("/tmp/hangs").exists, "its build")
        assert "tiny.nix" in commands(nix)
        check_all.send_signal(how)
        assert check_all.wait(HANGS_S) == 128 + how
    finally:
        nix.builder.run("rm", "-rf", slow, "/tmp/served", "/tmp/hangs")
    poll(lambda: "tiny.nix" not in commands(nix), "the end of its build")
    assert not list(nix.client.path("/tmp").glob("check-*"))


def test_check_waits_for_no_slot(nix: Scene) -> None:
    nix.machines("b1 - - 1\n")
    run = nix.start(f'mk "only" "{WAITS}" {{}}')
    poll(lambda: running_on(nix.builder), "a build in the only slot")
    assert well(nix)
    nix.builder.write(GO, "")
    assert run.end().status == 0
    nix.builder.run("sh", "-c", f"rm {GO} /tmp/running-*")


def test_check_leaves_no_connection(nix: Scene) -> None:
    assert well(nix)
    poll(lambda: not masters(nix), "the end of that of its build")


def commands(nix: Scene) -> str:
    return "\n".join(process.cmdline for process in nix.client.processes())


def test_a_login_that_no_longer_takes_options_is_well(nix: Scene) -> None:
    """So hooks find it, which ask such a nix-store again without --log-format."""
    nix.build('mk "asks" "echo > $out" {}')  # notes that it takes them
    serve, keys = "nix-store --serve --write", "/root/.ssh/authorized_keys"
    gate = (
        f'#!/bin/sh\n[ "$SSH_ORIGINAL_COMMAND" = "{serve}" ] && exec {serve}\nexit 1\n'
    )
    nix.builder.write("/root/gate", gate, 0o755)
    before = nix.builder.read(keys)
    lines = [f'command="/root/gate" {line}' for line in before.splitlines() if line]
    nix.builder.write(keys, "\n".join(lines) + "\n")
    try:
        status, said = check(nix)
    finally:
        nix.builder.write(keys, before)
    assert (status, said["machines"][0]["well"]) == (0, True), said


def test_many_lines_of_one_machine_do_it_no_harm(nix: Scene) -> None:
    """sshd of OpenSSH 9.8 shuts out for a while who connects and does not log in."""
    key = base64.b64encode(nix.builder.host_key.encode()).decode()
    lines = (f"ssh://root@b1?priority={n} - - 1 1 - - {key}\n" for n in range(8))
    nix.machines("".join(lines))
    for _ in range(3):
        assert check(nix)[0] == 0


def test_what_a_builder_says_gets_into_no_line(nix: Scene) -> None:
    says = "x86_64-linux /root/key 9 9 kvm ; evil"
    hostile = f"#!/bin/sh\necho 'system = {says}'\nexec /bin/sh \"$@\"\n"
    nix.builder.write("/usr/local/bin/sh", hostile, 0o755)
    nix.machines("b1 aarch64-linux\n")
    try:
        what, _, remedy = wrong(nix)
    finally:
        nix.builder.run("rm", "/usr/local/bin/sh")
    assert (what, remedy) == ("offers", "write into the second field: x86_64-linux")


# Says how many MiB a command, and what it starts, have taken at most.
MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)
"""


def test_what_a_builder_says_without_end_takes_no_memory(nix: Scene) -> None:
    liar = "#!/bin/dash\nexec head -c 200000000 /dev/zero\n"
    nix.builder.write("/usr/local/bin/sh", liar, 0o755)
    try:
        command = ("python3", "-c", MEASURE, INSTALLED, "check")
        assert int(nix.client.run(*command).stdout) < 100
    finally:
        nix.builder.run("rm", "/usr/local/bin/sh")


def test_without_the_right_to_check_it_says_so(nix: Scene) -> None:
    if not nix.client.path("/home/eve").exists():
        nix.client.add_user("eve")
    done = nix.client.run(INSTALLED, "check", check=False, user="eve")
    assert done.returncode == 1 and "as root" in done.stderr


def test_what_a_builder_says_gets_into_no_command(nix: Scene) -> None:
    hostile = "#!/bin/sh\necho 'place /bin; reboot'\nexec /bin/sh \"$@\"\n"
    nix.builder.write("/usr/local/bin/sh", hostile, 0o755)
    nix.builder.run("mv", "/usr/bin/nix-store", "/usr/bin/kept")
    try:
        what, _, remedy = wrong(nix)
    finally:
        nix.builder.run("mv", "/usr/bin/kept", "/usr/bin/nix-store")
        nix.builder.run("rm", "/usr/local/bin/sh")
    assert what == "nix" and "reboot" not in remedy


def test_the_table_has_a_remedy_under_each_thing(nix: Scene) -> None:
    nix.machines("b1 aarch64-linux - 2\nb2 - - 2\n")
    done = nix.client.run(INSTALLED, "check", check=False)
    lines = done.stdout.splitlines()
    rows = lines[: lines.index("1 of 2 machines are not well.")]
    assert [row.split()[0] for row in rows if row[0] != " "] == ["machine", "b1", "b2"]
    assert any(line.startswith("    to do: write into") for line in lines)
    wrapped = [line for line in lines if "to do:" not in line]  # those are pasted
    assert max(map(len, wrapped)) <= 80
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.engines
def test_a_user_who_is_not_trusted(
    client_engine: str, pytestconfig: pytest.Config
) -> None:
    builder = other(pytestconfig, client_engine)
    with scene(client_engine, builder) as nix:
        there = nix.builder
        there.add_user("nix")
        there.authorize(keypair(nix.client), "nix")
        daemon = there.start_daemon()
        nix.machines("nix@b1 - - 2\n")
        what, text, remedy = wrong(nix)
        assert what == "build" and "does not trust the user nix" in text
        line = re.search(r"nix.conf: (extra-trusted-users = nix) \(", remedy)
        assert line and "restart nix-daemon" in remedy
        conf = there.read("/etc/nix/nix.conf")
        old = there.engine.version.startswith("2.3.")
        setting = "trusted-users = root nix" if old else line[1]
        there.write("/etc/nix/nix.conf", f"{conf}\n{setting}\n")
        daemon.terminate()
        daemon.wait()
        daemon = there.start_daemon()
        assert well(nix)
        daemon.kill()
        daemon.wait()
        what, text, remedy = wrong(nix)
        assert what == "nix" and "daemon-socket" in text
        assert remedy == "as root there: systemctl start nix-daemon.socket"
        [machine] = check(nix)[1]["machines"]
        states = {found["what"]: found["state"] for found in machine["findings"]}
        assert states == {"ssh": "ok", "login": "ok", "nix": "wrong", "disk": "ok"}


# -- status ---------------------------------------------------------------------------


def status(nix: Scene) -> Any:
    return json.loads(nix.client.run(INSTALLED, "status", "--json").stdout)


def running_on(builder: Host) -> set[str]:
    """What it is building now, by its own account."""
    notes = builder.path("/tmp").glob("running-*")
    pids = {p.name.partition("-")[2]: p.read_text().strip() for p in notes}
    return {name for name, pid in pids.items() if builder.path(f"/proc/{pid}").exists()}


def names(holders: list[dict[str, str]]) -> set[str]:
    return {h["derivation"].partition("-")[2].removesuffix(".drv") for h in holders}


@pytest.mark.engines
def test_status_shows_what_runs_and_who_waits(nix: Scene) -> None:
    nix.machines("b1 - - 8\nb2 - - 4\n")
    run = nix.start(f'builtins.genList (n: mk "s-${{toString n}}" "{WAITS}" {{}}) 15')
    poll(lambda: sum(map(len, map(running_on, nix.builders))) == 12, "12")
    poll(lambda: len(status(nix)["waiting"]) == 3, "3 that wait")

    def phases() -> list[str]:
        machines = status(nix)["machines"]
        return [found["phase"] for m in machines for found in m["building"]]

    poll(lambda: phases() == ["building"] * 12, "12 that wait for their builds")
    said = status(nix)
    hooks = nix.client.run("pgrep", "-f", f"{INSTALLED} [0-9]").stdout.split()
    for machine, builder in zip(said["machines"], nix.builders):
        assert names(machine["building"]) == running_on(builder)
        assert machine["taken"] == len(machine["building"])
        assert {h["phase"] for h in machine["building"]} == {"building"}
        assert {str(h["pid"]) for h in machine["building"]} <= set(hooks)
    everything = {f"s-{n}" for n in range(15)}
    at_work = set.union(*(running_on(builder) for builder in nix.builders))
    assert names(said["waiting"]) == everything - at_work
    nixes = nix.client.run("pgrep", "-f", "nix-build").stdout.split()
    assert {str(waiter["nix"]) for waiter in said["waiting"]} <= set(nixes)
    text = nix.client.run(INSTALLED, "status").stdout
    assert "[########]  8 of 8 slots taken" in text and "waiting for b1, b2:" in text
    assert f" of Nix {said['waiting'][0]['nix']}\n" in text
    for builder in nix.builders:
        builder.write(GO, "")
    assert run.end().status == 0
    for builder in nix.builders:
        builder.run("sh", "-c", f"rm {GO} /tmp/running-*")
    nix.settle()
    text = nix.client.run(INSTALLED, "status").stdout
    assert "0 of 8 slots taken" in text and "waiting" not in text


def test_a_slot_held_by_another_program_is_shown_as_that(nix: Scene) -> None:
    nix.build('mk "before" "echo > $out" {}')
    slot = "/nix/var/nix/current-load/ssh:__b1-1"
    holder = nix.client.popen("flock", "-o", slot, "sleep", "60")

    def look() -> str:
        return nix.client.run(INSTALLED, "status").stdout

    poll(lambda: "1 of 2" in look(), "the slot")
    assert "taken by another program, such as Nix's own hook" in look()
    holder.kill()
    poll(lambda: "0 of 2" in look(), "a free slot")


def test_a_machine_left_alone_is_shown_with_the_reason(nix: Scene) -> None:
    nix.builder.stop_sshd(sessions=True)
    nix.build('mk "left-alone" "echo > $out" {}', "-j1")
    text = nix.client.run(INSTALLED, "status").stdout
    assert "left alone" in text and "Connection refused" in text


def test_without_the_right_to_look_status_says_so(nix: Scene) -> None:
    nix.client.run("mkdir", "-p", "-m", "700", "/nix/var/nix/current-load")
    nix.client.run("chmod", "700", "/nix/var/nix/current-load")
    if not nix.client.path("/home/eve").exists():
        nix.client.add_user("eve")
    done = nix.client.run(INSTALLED, "status", check=False, user="eve")
    assert done.returncode == 1
    assert "/nix/var/nix/current-load" in done.stderr and "as root" in done.stderr


def on_a_terminal(nix: Scene, *words: str, **env: str) -> tuple[str, int]:
    """What a terminal shows within a few seconds, and the exit status of a Ctrl-C."""
    ours, theirs = pty.openpty()
    process = nix.client.popen(
        INSTALLED,
        *words,
        env={"TERM": "xterm", **env},
        stdout=theirs,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs)
    data = b""
    try:
        while data.count(b"\x1b[H") < 3:
            data += os.read(ours, 4096)
    except OSError:  # its end
        pass
    os.close(ours)
    process.kill()
    return data.decode(), process.wait()


def test_watch_renews_the_picture_in_place(nix: Scene) -> None:
    text, _ = on_a_terminal(nix, "status", "--watch")
    assert text.count("\x1b[H") >= 3 and "\x1b[32m" in text


def test_no_color_is_honoured(nix: Scene) -> None:
    text, _ = on_a_terminal(nix, "status", "--watch", NO_COLOR="1")
    assert "\x1b[3" not in text


# -- explain --------------------------------------------------------------------------


def test_a_build_goes_where_explain_says(nix: Scene) -> None:
    nix.machines("b1 - - 4\nb2 - - 4 4\nnowhere x86_64-darwin\n")
    expression = 'mk "explained" "hostname > $out" { requiredSystemFeatures = [ ]; }'
    command = nix.nix_build(expression)
    drv = nix.client.run("nix-instantiate", command[1]).stdout.strip()
    said = json.loads(nix.client.run(INSTALLED, "explain", "--json", drv).stdout)
    assert said["system"] == "x86_64-linux" and not said["here"]
    assert [machine["machine"] for machine in said["machines"]] == [
        "ssh://b2",
        "ssh://b1",
    ]
    [out] = said["left-out"]
    assert (
        out["where"] == "/etc/nix/machines:3"
        and "builds x86_64-darwin" in out["reason"]
    )
    assert nix.client.read(nix.build(expression).output) == "b2\n"


def test_explain_reads_the_features_of_a_derivation(nix: Scene) -> None:
    nix.machines("b1\nb2 - - 1 1 quantum\n")
    expression = 'mk "q" "true" { requiredSystemFeatures = [ "quantum" ]; }'
    command = nix.nix_build(expression)
    drv = nix.client.run("nix-instantiate", command[1]).stdout.strip()
    text = nix.client.run(INSTALLED, "explain", drv).stdout
    assert re.search(r"^1\. +b2 ", text, re.MULTILINE)
    assert "b1 lacks the feature quantum (/etc/nix/machines:1)" in text


def test_explain_shows_which_of_equals_has_had_more_of_the_inputs(nix: Scene) -> None:
    source = 'mk "read" "echo > $out" {}'
    nix.machines("b2 - - 4\n")
    nix.build(source)
    nix.machines("b1 - - 4\nb2 - - 4\n")
    command = nix.nix_build(f'mk "reads" "true" {{ input = {source}; }}')
    drv = nix.client.run("nix-instantiate", command[1]).stdout.strip()
    said = json.loads(nix.client.run(INSTALLED, "explain", "--json", drv).stdout)
    known = [(machine["machine"], machine["inputs"]) for machine in said["machines"]]
    assert known == [("ssh://b2", 1), ("ssh://b1", 0)]


def test_explain_needs_no_derivation(nix: Scene) -> None:
    command = (INSTALLED, "explain", "--system", "riscv64-linux", "--features", "a,b")
    done = nix.client.run(*command, check=False)
    assert done.returncode == 1
    assert "needs riscv64-linux and a, b" in done.stdout
    assert "b1 builds x86_64-linux, not riscv64-linux" in done.stdout


def test_explain_says_what_is_no_derivation(nix: Scene) -> None:
    done = nix.client.run(INSTALLED, "explain", "/etc/hosts", check=False)
    assert done.returncode == 1
    assert (
        "cannot read the derivation /etc/hosts: it is not a well-formed" in done.stderr
    )


def test_explain_finds_a_derivation_of_the_store_by_its_name(nix: Scene) -> None:
    command = nix.nix_build('mk "by-name" "echo > $out" {}')
    path = nix.client.run("nix-instantiate", command[1]).stdout.strip()
    name = os.path.basename(path)
    said = nix.client.run(INSTALLED, "explain", "--json", name).stdout
    assert json.loads(said)["derivation"] == path


def test_another_machines_file_may_be_named(nix: Scene) -> None:
    nix.client.write("/tmp/others", "b2 - - 3\n")
    text = nix.client.run(INSTALLED, "status", "--machines", "/tmp/others").stdout
    assert text == "b2  [...]  0 of 3 slots taken\n"


def test_a_missing_machines_file_is_named(nix: Scene) -> None:
    done = nix.client.run(INSTALLED, "status", "--machines", "/nope", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "there is no machines file /nope" in done.stderr


# -- The progress of a build ----------------------------------------------------------


def events(nix: Scene, expression: str) -> list[dict[str, Any]]:
    """What Nix tells while it builds that."""
    run = nix.start(expression, "--log-format", "internal-json", "-v")
    assert run.end().status == 0, run.log
    lines = [line[5:] for line in run.log.splitlines() if line.startswith("@nix ")]
    return [json.loads(line) for line in lines]


@pytest.mark.engines
def test_bytes_and_paths_are_counted_to_the_end_and_never_beyond(
    client_engine: str, pytestconfig: pytest.Config
) -> None:
    client = suitable(pytestconfig, client_engine, (2, 4).__le__)
    expression = """mk "two" "cp $source $out; head -c 3000000 /dev/zero > $more" {
        outputs = [ "out" "more" ]; source = builtins.toFile "source" "text"; }"""
    with scene(client, other(pytestconfig, client_engine)) as nix:
        told = events(nix, expression)
    kinds = {e["id"]: e["type"] for e in told if e["action"] == "start"}
    ends: dict[int, list[int]] = {}  # what was told last: done, expected
    for event in told:
        if event["action"] == "result" and event["type"] == 105:
            done, expected = ends[event["id"]] = event["fields"][:2]
            assert done <= expected or kinds[event["id"]] not in (100, 103)
    paths = sorted(ends[n] for n, kind in kinds.items() if kind == 100)
    copies = [ends[n] for n, kind in kinds.items() if kind == 103 and n in ends]
    assert all(done == expected for done, expected in paths)
    assert len(paths) == 3 and paths[-1][0] > 3_000_000
    assert [1, 1] in copies and [2, 2] in copies


@pytest.mark.engines
def test_activities_are_well_formed_and_stopped_once(
    client_engine: str, pytestconfig: pytest.Config
) -> None:
    client = suitable(pytestconfig, client_engine, lambda version: version >= (2, 4))
    expression = """
      let first = mk "first" "head -c 3000000 /dev/urandom > $out" { };
      in mk "second" "cat $input > $out" { input = first; }"""
    with scene(client, other(pytestconfig, client_engine)) as nix:
        messages = events(nix, expression)
    started = {m["id"]: m for m in messages if m["action"] == "start"}
    stopped = [m["id"] for m in messages if m["action"] == "stop"]
    assert sorted(stopped) == sorted(started)
    said = [m["text"].partition(" ")[0] for m in started.values()]
    for word in ("connecting", "sending", "building", "fetching", "copying"):
        assert word in said, said


# -- Small mistakes -------------------------------------------------------------------


def test_check_names_the_private_half_if_the_public_one_is_listed(nix: Scene) -> None:
    nix.machines("b1 x86_64-linux /root/.ssh/id_ed25519.pub 4\n")
    what, text, remedy = wrong(nix)
    assert what == "login" and "/root/.ssh/id_ed25519.pub" in text
    assert remedy.startswith("in /etc/nix/machines:1, name the private key")


def with_hook(nix: Scene, hook: str) -> dict[str, str]:
    """An environment with that setting; 2.3 knows no NIX_CONFIG, 2.26 forgets nix.conf's."""
    nix.client.write("/tmp/conf/nix.conf", f"build-hook = {hook}\n")
    return {"NIX_CONF_DIR": "/tmp/conf", "NIX_CONFIG": f"build-hook = {hook}"}


def test_check_fails_if_the_hook_of_this_nix_is_missing(nix: Scene) -> None:
    """Else all would be well, and nothing would be built."""
    env = with_hook(nix, "/usr/lib/missing")
    done = nix.client.run(INSTALLED, "check", env=env, check=False)
    assert (
        done.returncode == 1 and "/usr/lib/missing, which is not there" in done.stdout
    )


def test_check_fails_if_the_hook_of_this_nix_is_not_executable(nix: Scene) -> None:
    nix.client.write("/tmp/conf/hook", "", 0o644)
    env = with_hook(nix, "/tmp/conf/hook")
    done = nix.client.run(INSTALLED, "check", "--json", env=env, check=False)
    complaint = json.loads(done.stdout)["complaints"][-1]
    assert done.returncode == 1 and complaint.endswith("chmod 755 /tmp/conf/hook")


def test_status_that_is_watched_by_a_program_is_one_line_each_time(nix: Scene) -> None:
    command = f"{INSTALLED} status --watch --json | head -n 2"
    first, second = nix.client.run("sh", "-c", command).stdout.splitlines()
    assert json.loads(first).keys() == json.loads(second).keys()
