"""Nix 1.x as client, played by old_nix.py: real stores, slots, ssh and builders."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pytest
from lab import HANGS_S, FarmError, Host, Inside, poll
from scene import (
    DRIVER,
    HOOK,
    INSTALLED,
    PRELUDE,
    TESTS,
    Scene,
    change_hook,
    end_masters,
    scene,
    suitable,
)

MACHINES = "/etc/old/machines"
SLOTS = "/run/slots"
ENVIRON = {"NIX_REMOTE_SYSTEMS": MACHINES, "NIX_CURRENT_LOAD": SLOTS}
TIMEOUT_S = HANGS_S
SESSION = "nix-store --serve"

every_version = pytest.mark.parametrize("version", ["1.0", "1.2", "1.11"])
numbers = itertools.count()

# Builds until it is told to go on, so that a test can look at it meanwhile.
WAIT = "while [ ! -e /tmp/go ]; do sleep 0.02; done"
HELD = f"{WAIT}; echo held > $out"


class Conversation(NamedTuple):
    """What one hook process said."""

    replies: list[str]
    messages: str
    log: str
    exit: int | None

    @property
    def traces(self) -> list[str]:
        return [line for line in self.messages.splitlines() if line.startswith("@ ")]


class Outcome(NamedTuple):
    """What the driver saw; derivations are told by their names."""

    results: dict[str, str]
    outputs: dict[str, dict[str, str]]
    hooks: list[Conversation]

    @classmethod
    def parse(cls, text: str) -> Outcome:
        account = json.loads(text)
        derivations = {
            path.partition("-")[2].removesuffix(".drv"): found
            for path, found in account["derivations"].items()
        }
        return cls(
            {name: found["result"] for name, found in derivations.items()},
            {name: found["outputs"] for name, found in derivations.items()},
            [said(hook) for hook in account["hooks"]],
        )

    @property
    def hook(self) -> Conversation:
        assert len(self.hooks) == 1, self.hooks
        return self.hooks[0]

    @property
    def result(self) -> str:
        assert len(self.results) == 1, self.results
        return next(iter(self.results.values()))

    @property
    def output(self) -> str:
        (outputs,) = self.outputs.values()
        return outputs["out"]


def said(hook: Mapping[str, Any]) -> Conversation:
    replies = [reply for _, reply in hook["replies"]]
    return Conversation(replies, hook["messages"], hook["log"], hook["exit"])


class OldNix(NamedTuple):
    """A client host on which Nix is played by the driver."""

    scene: Scene

    @property
    def client(self) -> Host:
        return self.scene.client

    @property
    def builder(self) -> Host:
        return self.scene.builder

    def machines(self, text: str) -> None:
        self.client.write(MACHINES, text)

    def instantiate(self, expression: str) -> list[str]:
        """The derivations of an expression that no other test has."""
        number = next(numbers)
        path = f"/tmp/old-{number}.nix"
        salted = PRELUDE.replace("shell = {", f'shell = {{ salt = "{number}";')
        self.client.write(path, salted + expression)
        done = self.client.run("nix-instantiate", path)
        return [line.partition("!")[0] for line in done.stdout.split()]

    def command(self, expression: str, *options: str) -> list[str]:
        derivations = self.instantiate(expression)
        return ["python3", DRIVER, "--hook", INSTALLED, *options, *derivations]

    def build(
        self, expression: str, *options: str, env: Mapping[str, str] = ENVIRON
    ) -> Outcome:
        command = self.command(expression, *options)
        done = self.client.run(*command, env=env, timeout=TIMEOUT_S)
        return Outcome.parse(done.stdout)

    def start(self, expression: str, *options: str, **env: str) -> Inside:
        command = self.command(expression, *options)
        environ = {**ENVIRON, **env}
        return self.client.popen(*command, env=environ, stdout=subprocess.PIPE)

    def slot_files(self, directory: str = SLOTS) -> set[str]:
        return {p.name for p in self.client.path(directory).iterdir() if p.is_file()}

    def take_slot(self, name: str) -> int:
        """Hold a slot, as another hook would; close it to let go."""
        self.client.path(SLOTS).mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(self.client.path(SLOTS) / name, os.O_RDWR | os.O_CREAT)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor


@pytest.fixture(scope="module")
def hosts(client_engine: str) -> Iterator[Scene]:
    with scene(client_engine, client_engine, client_engine) as running:
        running.client.copy(TESTS / "delay.py", "/usr/local/bin/delay.py")
        change_hook(running)
        yield running


@pytest.fixture
def nix(hosts: Scene) -> Iterator[OldNix]:
    """Two machines, no slot files, and no build that is told to go on."""
    for host in (hosts.client, *hosts.builders):
        host.run("rm", "-rf", SLOTS, "/run/nix", "/tmp/go")
    nix = OldNix(hosts)
    nix.machines("b1 x86_64-linux - 2\nb2 x86_64-linux - 2\n")
    yield nix
    left = [found.pid for found in hosts.client.processes() if DRIVER in found.cmdline]
    hosts.client.signal(signal.SIGKILL, *left)
    hosts.settle()


# -- Builds ---------------------------------------------------------------------------

GRAPH = """
let
  mk' = name: inputs: mk name "cat $inputs > $out; echo ${name} >> $out" {
    inherit inputs;
  };
  a = mk' "a" [ ./source ];
  b = mk' "b" [ a ];
  c = mk' "c" [ a ];
in mk' "top" [ b c ]
"""


@pytest.mark.engines
@every_version
def test_a_graph_builds(nix: OldNix, version: str) -> None:
    nix.client.write("/tmp/source", f"source {version}\n")
    outcome = nix.build(GRAPH, "--version", version)
    assert outcome.results == dict.fromkeys(["a", "b", "c", "top"], "built"), outcome
    content = nix.client.read(outcome.outputs["top"]["out"]).split()
    assert content == ["source", version, "a", "b", "source", version, "a", "c", "top"]


@pytest.mark.engines
def test_every_output_comes_back(nix: OldNix) -> None:
    script = "echo $lib > $out; echo lib > $lib; mkdir $doc; echo doc > $doc/doc"
    attributes = '{ outputs = [ "out" "lib" "doc" ]; }'
    outcome = nix.build(f'mk "many" "{script}" {attributes}')
    (outputs,) = outcome.outputs.values()
    assert outcome.result == "built", outcome
    assert nix.client.read(outputs["out"]).strip() == outputs["lib"]
    assert nix.client.read(outputs["doc"] + "/doc") == "doc\n"


@pytest.mark.engines
def test_the_whole_log_arrives(nix: OldNix) -> None:
    script = "seq 1 900; for n in $(seq 901 1800); do echo $n >&2; done; echo > $out"
    outcome = nix.build(f'mk "log" "{script}" {{}}')
    assert outcome.hook.log.split() == [str(n) for n in range(1, 1801)]


@pytest.mark.engines
def test_the_import_passes_the_held_output_locks(nix: OldNix) -> None:
    running = nix.start(f'mk "held" "{HELD}" {{}}')
    store = nix.client.path("/nix/store")
    poll(lambda: building(nix), "the build")
    (lock,) = store.glob("*-held.lock")
    held = [is_locked(lock, take) for take in (fcntl.flock, fcntl.lockf)]
    nix.builder.write("/tmp/go", "")
    outcome = Outcome.parse(running.communicate(timeout=TIMEOUT_S)[0])
    assert (held, outcome.result) == ([True, True], "built"), outcome


def test_no_message_is_lost_though_nix_is_busy_at_the_end(nix: OldNix) -> None:
    """1.x drops of both pipes what it has not read when it sees the end of either."""
    names = [f"o{n}" for n in range(60)]
    touch = "; ".join(f"echo > ${name}" for name in names)
    outputs = " ".join(f'"{name}"' for name in names)
    attributes = f"{{ outputs = [ {outputs} ]; }}"
    hook = build_while_nix_is_busy(nix, f'mk "many" "{WAIT}; {touch}" {attributes}')
    assert len(re.findall("copying path .* from 'b1'", hook.messages)) == len(names)


def test_no_log_is_lost_though_nix_is_busy_at_the_end(nix: OldNix) -> None:
    script = f"{WAIT}; seq 1 3000; echo > $out"
    hook = build_while_nix_is_busy(nix, f'mk "log" "{script}" {{}}')
    assert hook.log.split() == [str(n) for n in range(1, 3001)]


def build_while_nix_is_busy(nix: OldNix, expression: str) -> Conversation:
    """Nix reads nothing from when the build goes on until the hook can end."""
    running = nix.start(expression)
    pid = int(poll(lambda: building(nix), "the build")[0])
    running.send_signal(signal.SIGSTOP)
    nix.builder.write("/tmp/go", "")
    poll(lambda: not runs(nix.client, SESSION), "the end of ssh", timeout=TIMEOUT_S)
    with contextlib.suppress(FarmError):  # a hook that waits for Nix does not end now
        poll(lambda: has_ended(nix.client, pid), "the hook's end", timeout=1)
    running.send_signal(signal.SIGCONT)
    return Outcome.parse(running.communicate(timeout=TIMEOUT_S)[0]).hook


def has_ended(host: Host, pid: int) -> bool:
    """Only a zombie has surely closed its pipes."""
    return host.read(f"/proc/{pid}/stat").rpartition(")")[2].split()[0] == "Z"


def runs(host: Host, command: str) -> bool:
    return any(command in process.cmdline for process in host.processes())


@pytest.mark.engines
def test_no_lock_file_is_left_in_the_store(nix: OldNix) -> None:
    nix.build('mk "tidy" "echo > $out" {}')
    assert nix.scene.locks() == []


def building(nix: OldNix) -> list[str]:
    """What the slot file says of the running build: first of all its hook's pid."""
    files = nix.client.path(SLOTS).glob("*-[0-9]*")
    said = [path.read_text().split() for path in files]
    return next((words for words in said if "building" in words), [])


def is_locked(path: Path, take: Callable[[TextIO, int], None]) -> bool:
    with path.open("r+") as file:
        try:
            take(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        return False


PREFIX = "/opt/old"


@pytest.fixture(scope="module")
def perl(pytestconfig: pytest.Config) -> Iterator[OldNix]:
    """With a nix-copy-closure as 1.x has it; the real nix-store must know held locks in
    the way of 1.x."""
    client = suitable(pytestconfig, "host", (2, 29).__gt__)
    with scene(client, client) as running:
        running.client.copy(TESTS / "old_copy.py", f"{PREFIX}/bin/nix-copy-closure")
        running.client.run("ln", "-s", "/usr/bin/nix-store", f"{PREFIX}/bin/nix-store")
        running.client.copy(HOOK, f"{PREFIX}/libexec/nix/build-remote")
        nix = OldNix(running)
        nix.machines("b1 x86_64-linux - 2\n")
        yield nix
        running.settle()


@pytest.mark.parametrize("old_builder", [False, True], ids=["new", "1.11"])
def test_its_own_program_sends_over_the_shared_connection(
    perl: OldNix, old_builder: bool
) -> None:
    if old_builder:
        perl.builder.copy(TESTS / "old_serve.py", "/usr/local/bin/nix-store")
    end_masters(perl.scene)
    perl.client.run("rm", "-rf", SLOTS)
    perl.builder.write("/var/log/sshd.log", "")
    perl.client.write("/tmp/source", f"source {old_builder}\n")
    env = {**ENVIRON, "NIX_DEBUG_HOOK": "1"}
    hook = ("--hook", f"{PREFIX}/libexec/nix/build-remote")
    outcome = perl.build(GRAPH, *hook, env=env)
    assert outcome.results == dict.fromkeys(["a", "b", "c", "top"], "built"), outcome
    messages = "".join(hook.messages for hook in outcome.hooks)
    assert "missing paths to ‘b1’" in messages and "--import" in messages
    assert perl.builder.read("/var/log/sshd.log").count("Accepted publickey") == 1


def test_a_daemons_hook_does_not_ask_the_daemon(client_engine: str) -> None:
    """That may have NIX_REMOTE=daemon in its own environment. To import through it
    would wait for the lock that it holds itself, for ever."""
    environ = {**ENVIRON, "NIX_REMOTE": "daemon", "NIX_DEBUG_HOOK": "1"}
    with scene(client_engine, client_engine) as running:
        nix = OldNix(running)
        nix.machines("b1 x86_64-linux - 2\n")
        nix.client.start_daemon()
        outcome = nix.build('mk "own" "hostname > $out" {}', env=environ)
        running.settle()
    assert outcome.result == "built", outcome
    assert "NIX_REMOTE=daemon" not in outcome.hook.messages


# -- How builds fail ------------------------------------------------------------------


def test_what_depends_on_a_failed_build_is_not_asked_about(nix: OldNix) -> None:
    outcome = nix.build('mk "top" "cat $below" { below = mk "low" "exit 1" {}; }')
    assert outcome.results == {"low": "failed", "top": "dependency failed"}


def test_the_log_of_a_failed_build_arrives(nix: OldNix) -> None:
    outcome = nix.build('mk "bad" "echo last words; exit 3" {}')
    assert "last words\n" in outcome.hook.log


def test_a_failed_build_leaves_its_slot_free(nix: OldNix) -> None:
    nix.machines("b1 x86_64-linux\n")
    both = '[ (mk "p" "exit 1" {}) (mk "q" "exit 1" {}) ]'
    outcome = nix.build(both, "--poll-interval", "0.2")
    assert outcome.results == {"p": "failed", "q": "failed"}


# -- Messages -------------------------------------------------------------------------


@every_version
def test_build_traces_are_printed_when_asked_for(nix: OldNix, version: str) -> None:
    nix.machines("root@b1 x86_64-linux\n")
    (derivation,) = nix.instantiate('mk "traced" "echo > $out" {}')
    command = ("python3", DRIVER, "--hook", INSTALLED, "--version", version)
    done = nix.client.run(*command, "--trace", derivation, env=ENVIRON)
    assert Outcome.parse(done.stdout).hook.traces == [
        f"@ build-remote {derivation} root@b1",
        f"@ build-remote-start {derivation} root@b1",
        f"@ build-remote-done {derivation} root@b1",
    ]


@every_version
def test_build_traces_are_not_printed_unasked(nix: OldNix, version: str) -> None:
    outcome = nix.build('mk "untraced" "echo > $out" {}', "--version", version)
    assert (outcome.result, outcome.hook.traces) == ("built", [])


def test_a_failed_build_is_done_for_the_traces_too(nix: OldNix) -> None:
    outcome = nix.build('mk "traced" "exit 1" {}', "--trace")
    words = [line.split()[1] for line in outcome.hook.traces]
    assert words == ["build-remote", "build-remote-start", "build-remote-done"]


@pytest.mark.engines
def test_messages_are_plain_lines(nix: OldNix) -> None:
    source = '{ below = mk "low" "echo > $out" {}; }'
    outcome = nix.build(f'mk "plain" "cat $below; exit 1" {source}')
    assert all("@nix" not in hook.messages for hook in outcome.hooks)
    assert "plain.drv' on 'b1' failed" in outcome.hooks[1].messages


def test_a_build_says_where_it_happens(nix: OldNix) -> None:
    nix.machines("b2 x86_64-linux\n")
    outcome = nix.build('mk "where" "echo > $out" {}')
    assert "-where.drv' on 'b2'\n" in outcome.hook.messages


def test_nix_debug_hook_says_how_each_machine_was_judged(nix: OldNix) -> None:
    nix.machines("b1 riscv64-linux\nb2 x86_64-linux\n")
    outcome = nix.build(
        'mk "d" "echo > $out" {}', env={**ENVIRON, "NIX_DEBUG_HOOK": ""}
    )
    assert "'b1' builds riscv64-linux, not x86_64-linux" in outcome.hook.messages
    assert "'b2' can build" in outcome.hook.messages


def test_without_nix_debug_hook_machines_are_judged_in_silence(nix: OldNix) -> None:
    outcome = nix.build('mk "d" "echo > $out" {}')
    assert "can build" not in outcome.hook.messages


# -- Replies --------------------------------------------------------------------------

OTHER_SYSTEM = '{ system = "riscv64-linux"; }'


@pytest.mark.parametrize(
    ("attributes", "options", "reply"),
    [
        pytest.param("{}", [], "postpone", id="Nix has no slot either"),
        pytest.param("{}", ["--max-jobs", "1"], "decline", id="Nix can build it"),
    ],
)
def test_the_reply_when_all_slots_are_taken(
    nix: OldNix, attributes: str, options: list[str], reply: str
) -> None:
    nix.machines("b1 x86_64-linux,riscv64-linux\n")
    slot = nix.take_slot("x86_64-linux+riscv64-linux-b1-0")
    outcome = nix.build(f'mk "busy" "echo > $out" {attributes}', "--once", *options)
    os.close(slot)
    assert outcome.hook.replies == [reply], outcome


def test_a_postponed_build_is_accepted_once_a_slot_is_free(nix: OldNix) -> None:
    nix.machines("b1 x86_64-linux\n")
    slot = nix.take_slot("x86_64-linux-b1-0")
    running = nix.start('mk "later" "echo > $out" {}', "--poll-interval", "0.1")
    poll(lambda: "x86_64-linux-b1-0" in nix.slot_files(), "the slot file")
    poll(lambda: "main-lock" in nix.slot_files(), "the first question")
    os.close(slot)
    outcome = Outcome.parse(running.communicate(timeout=TIMEOUT_S)[0])
    assert (outcome.result, outcome.hook.replies[-1]) == ("built", "accept"), outcome


def test_a_build_that_nix_may_never_do_itself_waits_in_the_hook(nix: OldNix) -> None:
    """1.2 and newer say that they may run no jobs, so that it is never asked again."""
    nix.machines("b1 x86_64-linux\n")
    slot = nix.take_slot("x86_64-linux-b1-0")
    told = "build-cores=2\nbuild-max-jobs=0\n"
    running = nix.start('mk "waits" "echo > $out" {}', _NIX_OPTIONS=told)
    poll(lambda: "main-lock" in nix.slot_files(), "the first question")
    os.close(slot)
    outcome = Outcome.parse(running.communicate(timeout=TIMEOUT_S)[0])
    assert (outcome.result, outcome.hook.replies) == ("built", ["accept"]), outcome


@pytest.mark.parametrize(
    "attributes",
    [
        pytest.param(OTHER_SYSTEM, id="system"),
        pytest.param('{ requiredSystemFeatures = [ "perf" ]; }', id="feature"),
    ],
)
def test_what_no_machine_can_build_is_declined(nix: OldNix, attributes: str) -> None:
    outcome = nix.build(f'mk "odd" "echo > $out" {attributes}')
    assert outcome.hook.replies == ["decline"], outcome


def test_one_hook_process_answers_until_it_accepts(nix: OldNix) -> None:
    nix.machines("b1 x86_64-linux\n")
    odd = [f'(mk "odd{n}" "echo > $out" {OTHER_SYSTEM})' for n in range(3)]
    done = nix.build(f'mk "top" "echo > $out" {{ x = [ {" ".join(odd)} ]; }}', "--once")
    assert done.hook.replies == ["decline"] * 3, done


def test_a_hook_that_has_declined_still_accepts(nix: OldNix) -> None:
    nix.machines("b1 x86_64-linux\n")
    both = nix.instantiate(f'[ (mk "x" "" {OTHER_SYSTEM}) (mk "y" "echo >$out" {{}}) ]')
    requests = f"0 riscv64-linux {both[0]} \n0 x86_64-linux {both[1]} \n"
    lists = f"{both[1]} \n{output_of(nix, both[1])} \n"
    hook = (INSTALLED, "x86_64-linux", "0", "0", "0")
    done = nix.client.run(*hook, env=ENVIRON, input=requests + lists)
    replies = [line for line in done.stderr.splitlines() if line.startswith("# ")]
    assert replies == ["# decline", "# accept"]


def output_of(nix: OldNix, derivation: str) -> str:
    return nix.client.run("nix-store", "-q", "--outputs", derivation).stdout.strip()


@pytest.mark.parametrize("arguments", [["0", "0"], ["0", "0", "0"]], ids=["1.0", "1.2"])
def test_the_end_of_the_requests_is_no_failure(
    nix: OldNix, arguments: list[str]
) -> None:
    done = nix.client.run(INSTALLED, "x86_64-linux", *arguments, env=ENVIRON)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_end_of_the_requests_after_a_decline_is_no_failure(nix: OldNix) -> None:
    outcome = nix.build(f'mk "odd" "" {OTHER_SYSTEM}', "--version", "1.2")
    assert (outcome.hook.replies, outcome.hook.exit) == (["decline"], 0)


# -- Environment ----------------------------------------------------------------------


def test_a_relative_machines_file_is_an_error_and_declines(nix: OldNix) -> None:
    env = {**ENVIRON, "NIX_REMOTE_SYSTEMS": "etc/old/machines"}
    outcome = nix.build('mk "relative" "echo > $out" {}', env=env)
    assert outcome.hook.replies == ["decline"]
    assert "'etc/old/machines'" in outcome.hook.messages
    assert "must be absolute" in outcome.hook.messages


def test_a_missing_machines_file_declines_in_silence(nix: OldNix) -> None:
    env = {**ENVIRON, "NIX_REMOTE_SYSTEMS": "/etc/none"}
    outcome = nix.build('mk "missing" "echo > $out" {}', env=env)
    assert (outcome.hook.replies, outcome.hook.messages) == (["decline"], "")


def test_without_nix_remote_systems_the_machines_are_nixs(nix: OldNix) -> None:
    nix.scene.machines("b2 x86_64-linux\n")
    env = {"NIX_CURRENT_LOAD": SLOTS}
    outcome = nix.build('mk "default" "hostname > $out" {}', env=env)
    assert nix.client.read(outcome.output) == "b2\n"


# A build for which something must be sent.
def sent(name: str) -> str:
    return f'mk "{name}" "echo > $out" {{ it = builtins.toFile "source" "{name}"; }}'


def test_nix_current_load_is_the_slot_directory(nix: OldNix) -> None:
    nix.machines("b1 x86_64-linux\n")
    nix.build(sent("load"), env={**ENVIRON, "NIX_CURRENT_LOAD": "/run/l"})
    assert nix.slot_files("/run/l") > {"main-lock", "x86_64-linux-b1-0"}


def test_the_default_slot_directory_is_run_nix_current_load(nix: OldNix) -> None:
    nix.machines("b1 x86_64-linux\n")
    nix.build(sent("default"), env={"NIX_REMOTE_SYSTEMS": MACHINES})
    assert nix.slot_files("/run/nix/current-load") > {"main-lock", "x86_64-linux-b1-0"}


def test_slots_and_upload_locks_have_the_old_hooks_names(nix: OldNix) -> None:
    nix.machines("root@b1 x86_64-linux,i686-linux - 2\n")
    nix.build(sent("names"))
    assert nix.slot_files() == {
        "main-lock",
        "root@b1.upload-lock",
        "x86_64-linux+i686-linux-root@b1-0",
        "x86_64-linux+i686-linux-root@b1-1",
    }


@pytest.mark.engines
def test_nix_sshopts_reach_both_connections(nix: OldNix) -> None:
    move_sshd(nix.builder, 2222)
    nix.machines("b1 x86_64-linux\n")
    known = "-oUserKnownHostsFile=/dev/null -oStrictHostKeyChecking=no"
    env = {**ENVIRON, "NIX_SSHOPTS": f"-p 2222 {known}"}
    outcome = nix.build('mk "port" "echo > $out" {}', env=env)
    move_sshd(nix.builder, 22)
    assert outcome.result == "built", outcome


def move_sshd(host: Host, port: int) -> None:
    settings = host.read("/etc/ssh/sshd_config").partition("\nPort ")[0].rstrip("\n")
    host.write("/etc/ssh/sshd_config", f"{settings}\nPort {port}\n")
    host.restart_sshd()


def test_the_users_ssh_config_is_honoured(nix: OldNix) -> None:
    proxy = "sh -c 'echo >> /tmp/proxied; exec delay.py %h %p 20'"
    config = f"Host far\n  HostName b1\n  HostKeyAlias b1\n  ProxyCommand {proxy}\n"
    nix.client.write("/root/.ssh/config", config, 0o600)
    nix.machines("far x86_64-linux\n")
    outcome = nix.build('mk "far" "hostname > $out" {}')
    nix.client.run("rm", "/root/.ssh/config")
    assert nix.client.read(outcome.output) == "b1\n"
    assert nix.client.read("/tmp/proxied")


# -- check ----------------------------------------------------------------------------

# As Nix 1.x has its programs: `nix` is not among them.
WITHOUT_NIX = """
cd /usr/bin
for program in nix-*; do ln -f nix $program; done
rm nix
"""


@pytest.fixture(scope="module")
def plain(client_engine: str) -> Iterator[Scene]:
    with scene(client_engine, client_engine) as running:
        running.client.run("sh", "-ec", WITHOUT_NIX)
        running.client.copy(HOOK, "/usr/libexec/nix/ours")
        yield running


def note_of_check(plain: Scene, **env: str) -> str:
    command = (INSTALLED, "check", "--json")
    done = plain.client.run(*command, env=env, check=False)  # it may want to build
    return str(json.loads(done.stdout)["note"])


def test_check_advises_the_variable(plain: Scene) -> None:
    note = note_of_check(plain)
    assert f"NIX_BUILD_HOOK={INSTALLED}" in note and "nix.conf" not in note


@pytest.mark.parametrize("hook", [INSTALLED, "ours"], ids=["absolute", "in libexec"])
def test_check_finds_the_hook_where_nix_does(plain: Scene, hook: str) -> None:
    assert note_of_check(plain, NIX_BUILD_HOOK=hook) == ""
