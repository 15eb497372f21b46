"""A cluster behind one line: each session is a job of Slurm's, on one of two nodes that
share the store of the host where one logs in.

The hosts' root, with Debian's Slurm in it, is made by `tests/engines slurm`.
"""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from lab import CLUSTER, ENGINES_DIR, Host, Lab, connect, engine, poll, unavailable
from scene import HOOK, INSTALLED, SLOTS, Scene, change_hook, outage

numbers = itertools.count()
# -u: else srun keeps back what ends in no newline, and nix-store's greeting is of that kind
LINE = "ssh://login?remote-program=srun%20-u%20nix-store - - 4\n"
SERVICES = ("munged", "slurmctld", "slurmscriptd", "slurmd", "sshd")
CONF = """\
ClusterName=farm
SlurmctldHost=login
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MessageTimeout=10
KillWait=1
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldLogFile=/var/log/slurmctld.log
SlurmdLogFile=/var/log/slurmd.log
NodeName=n[1-2] CPUs=2
PartitionName=all Nodes=ALL Default=YES
"""
# Puts the /nix of one mount namespace into another, by open_tree and move_mount.
SHARE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def done(result):
    assert result >= 0, os.strerror(ctypes.get_errno())
    return result
ours, theirs = (os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY) for pid in sys.argv[1:])
done(libc.setns(ours, 0))
tree = done(libc.syscall(428, -100, b"/nix", 1))
done(libc.setns(theirs, 0))
done(libc.syscall(429, tree, b"", -100, b"/nix", 4))
"""


def share_store(owner: Host, node: Host) -> None:
    node.run("mkdir", "-p", "/nix")
    pids = (str(owner.pid), str(node.pid))
    subprocess.run([sys.executable, "-IS", "-c", SHARE, *pids], check=True)


def start_munge(host: Host) -> None:
    """All of one root have the same key."""
    folders = ("/run/munge", "/var/log/munge", "/var/lib/munge")
    host.run("install", "-d", "-o", "munge", *folders)
    host.run("setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged")


@pytest.fixture(scope="module")
def hosts(client_engine: str) -> Iterator[Scene]:
    if reason := unavailable():
        pytest.skip(reason)
    if not (ENGINES_DIR / CLUSTER).is_dir():
        pytest.skip(f"this needs a root with Slurm: run tests/engines {CLUSTER}")
    with Lab() as lab:
        root = engine(CLUSTER)
        login, *nodes = (lab.host(name, root) for name in ("login", "n1", "n2"))
        client = lab.host("client", engine(client_engine), nix_conf="max-jobs = 0\n")
        client.copy(HOOK, INSTALLED)
        connect(client, login)
        for host in (client, login):
            host.run("nix-store", "--init")
        for node in nodes:
            share_store(login, node)
        for host in (login, *nodes):
            host.write("/etc/slurm/slurm.conf", CONF)
            host.write("/etc/slurm/cgroup.conf", "CgroupPlugin=disabled\n")
            host.run("mkdir", "/var/spool/slurmctld", "/var/spool/slurmd")
            start_munge(host)
        login.run("slurmctld")
        running = Scene(client, (login, *nodes))
        for node in nodes:
            start_slurmd(running, node)
        running.machines(LINE)
        yield running


@pytest.fixture
def nix(hosts: Scene) -> Iterator[Scene]:
    yield hosts
    poll(lambda: not jobs(hosts) and not strays(hosts), f"the end of {strays(hosts)}")


def start_slurmd(nix: Scene, node: Host) -> None:
    node.run("slurmd")
    set_state(nix, node, "RESUME")
    asked = ("sinfo", "--noheader", "--nodes", node.name, "--format", "%T")
    idle = lambda: nix.builder.run(*asked, check=False).stdout == "idle\n"
    poll(idle, f"slurmd on {node.name}")


def set_state(nix: Scene, node: Host, state: str) -> None:
    update = ("scontrol", "update", f"NodeName={node.name}", "Reason=power")
    nix.builder.run(*update, f"State={state}", check=False)  # it may be so already


def jobs(nix: Scene) -> str:
    return nix.builder.run("squeue", "--noheader").stdout


def strays(nix: Scene) -> list[str]:
    """What runs on the nodes beside their services."""
    return [
        process.cmdline
        for node in nix.builders[1:]
        for process in node.processes()
        if not any(name in process.cmdline for name in SERVICES)
    ]


def fresh(script: str) -> str:
    return f'mk "job-{next(numbers)}" "{script}" {{}}'


def hosts_of(nix: Scene, outputs: list[str]) -> set[str]:
    return {nix.client.read(output).strip() for output in outputs}


@pytest.mark.engines
def test_builds_run_on_all_nodes(nix: Scene) -> None:
    """Each waits for all the others; a node has two processors."""
    number = next(numbers)
    meet = f"touch /nix/meet-{number}-$n"
    meet += f"; while [ $(ls /nix | grep -c meet-{number}) -lt 4 ]; do sleep 0.1; done"
    one = fresh(f"{meet}; hostname > $out").replace("{}", "{ inherit n; }")
    outcome = nix.build(f"builtins.genList (n: {one}) 4")
    assert hosts_of(nix, outcome.outputs) == {"n1", "n2"}
    assert "srun: error" not in outcome.log, outcome.log


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "SIGKILL"])
def test_a_build_that_is_cancelled_cancels_its_job(nix: Scene, how: str) -> None:
    run = nix.start(fresh("echo begun; exec sleep 98765"))
    run.says("begun")
    assert jobs(nix) and strays(nix)
    if how == "Ctrl-C":
        run.interrupt()
    else:
        nix.client.signal(getattr(signal, how), *nix.hooks())
    poll(lambda: not jobs(nix) and not strays(nix), "the end of the job")


def test_a_node_that_fails_is_an_outage_of_its_own_build_only(nix: Scene) -> None:
    """It goes to the other node when that has ended what it had."""
    nix.machines(LINE.replace("-u", "-u%20-c2"))  # a whole node for each
    number = next(numbers)
    wait = f"while [ ! -e /nix/go-{number} ]; do sleep 0.1; done"
    script = f"echo begun on $(hostname); {wait}; hostname > $out"
    builds = [nix.start(fresh(script)) for _ in range(2)]
    for build in builds:
        build.says("begun on")
    builds.sort(key=lambda build: "begun on n2" in build.log)
    lost, kept = builds
    node = nix.builders[1]
    node.signal(signal.SIGKILL, *(p.pid for p in node.processes()))
    set_state(nix, node, "DOWN")  # as Slurm finds out in five minutes
    try:
        lost.says("trying again")
        lost.says("queued and waiting for resources")
        assert not outage(nix, "login")
        nix.builder.write(f"/nix/go-{number}", "")
        outputs = [output for build in builds for output in build.end().outputs]
        assert hosts_of(nix, outputs) == {"n2"}
        assert "trying again" not in kept.log, kept.log
    finally:
        start_munge(node)
        start_slurmd(nix, node)
        nix.machines(LINE)


def test_a_build_waits_for_its_turn_in_the_queue_of_the_cluster(nix: Scene) -> None:
    """For longer than nix-store may take to begin elsewhere; and people are told why."""
    nix.build(fresh("echo > $out"))
    for proved in nix.client.path(SLOTS).glob("ssh/*.proved"):
        proved.unlink()  # as if nobody had got an answer over that connection yet
    change_hook(nix, REPLY_S=0.5, GREETING_TIMEOUT_S=1)
    others = nix.builder.popen("srun", "-N2", "--exclusive", "sleep", "98765")
    try:
        poll(lambda: "98765" in str(strays(nix)), "the job of others")
        run = nix.start(fresh("hostname > $out"))
        run.says("queued and waiting for resources")
        since = time.monotonic()
        poll(lambda: time.monotonic() > since + 3, "the time that others may take")
        nix.builder.run("scancel", "--name", "sleep")
        outcome = run.end()
        assert "trying again" not in outcome.log and "reached now" not in outcome.log
        assert hosts_of(nix, outcome.outputs) <= {"n1", "n2"}
    finally:
        others.kill()
        others.communicate()
        nix.client.copy(HOOK, INSTALLED)


def test_no_job_is_begun_before_it_is_needed(nix: Scene) -> None:
    """Though the line is long, so that elsewhere a session for the next build would be."""
    nix.build(fresh("echo > $out"))
    for proved in nix.client.path(SLOTS).glob("ssh/*.proved"):
        proved.write_text(f"{proved.read_text().rpartition(' ')[0]} True")
    nix.build(fresh("echo > $out"))
    assert not [*nix.client.path(SLOTS).glob("ssh/*.spare")]
    poll(lambda: not jobs(nix), "the end of the only job")


def test_while_the_controller_is_down_builds_wait(nix: Scene) -> None:
    login = nix.builder
    ours = [p.pid for p in login.processes() if "slurmctld" in p.cmdline]
    login.signal(signal.SIGTERM, *ours)
    poll(lambda: not any(map(login.is_running, ours)), "the end of slurmctld")
    try:
        run = nix.start(fresh("echo > $out"))
        run.says("Unable to contact slurm controller")
    finally:
        login.run("slurmctld")
    assert run.end().status == 0, run.log


def test_check_finds_a_cluster_well(nix: Scene) -> None:
    checked = nix.client.run(INSTALLED, "check", check=False).stdout
    assert "All machines are well." in checked, checked
