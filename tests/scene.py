"""What the farm's tests start from: a client with the hook, builders, and a build.

    with scene("2.34", "2.3", "host") as running:

Nothing is built on the client itself, unless a test gives nix-build `-j1`.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from lab import (
    ENGINES,
    ENGINES_DIR,
    HANGS_S,
    Host,
    Inside,
    Lab,
    connect,
    engine,
    is_taken,
    poll,
    unavailable,
)
from launcher import assigned, launcher

from nix_build_remote import SPARE_S

TESTS = Path(__file__).resolve().parent
HOOK = TESTS.parent / "nix_build_remote.py"
INSTALLED = "/usr/local/bin/nix_build_remote.py"
CHANGED = "/usr/local/lib/nix_build_remote_to_change.py"
DRIVER = "/usr/local/lib/old_nix.py"
SLOTS = "/nix/var/nix/current-load"

# Every expression may use `mk NAME SCRIPT ATTRIBUTES`, and `shell` to add the builder.
PRELUDE = """\
let
  system = builtins.currentSystem;
  shell = { inherit system; builder = "/bin/sh"; PATH = "/usr/bin:/bin"; };
  mk = name: script: attributes:
    derivation (shell // { inherit name; args = [ "-c" script ]; } // attributes);
in
"""


# An ssh on the client that notes down each connection that is begun.
JOURNAL = "/tmp/connections"
SSH = f"""#!/bin/sh
case " $* " in *" -N "*) echo "$*" >> {JOURNAL};; esac
exec /usr/bin/ssh "$@"
"""

KEEPER = f"sleep {SPARE_S}"  # which keeps a spare session

# With these no slow machine is taken for one that is away, or for one that is far, with
# which spare sessions would be begun.
PATIENT = {"REPLY_S": 20, "RETIRE_S": 20, "FAR_S": 1000}

MAY_STAY = (
    "nix-daemon",
    "delay.py",
    "-oControlPersist=",
    "[mux]",
    "sshd: ",
    "sshd-session: ",
)


class Outcome(NamedTuple):
    """How a nix-build ended."""

    status: int
    outputs: list[str]
    log: str

    @property
    def output(self) -> str:
        assert len(self.outputs) == 1, self.outputs
        return self.outputs[0]


class Run(NamedTuple):
    """A nix-build that was started."""

    process: Inside
    path: Path

    @property
    def log(self) -> str:
        """What it has said so far."""
        return self.path.read_text(errors="replace")

    def says(self, text: str) -> None:
        """Wait until it has said that."""
        poll(lambda: text in self.log or self.ended, f"{text!r} in the log")
        assert text in self.log, self.log[-4000:]

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def interrupt(self) -> None:
        """Press Ctrl-C, and again if need be: a Nix that is just about to wait for its
        children may have noted the first, and wait all the same (seen with 2.8)."""

        def gone() -> bool:
            self.process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            return self.ended

        poll(gone, "the end of nix-build")

    def end(self, timeout: float = HANGS_S) -> Outcome:
        out, _ = self.process.communicate(timeout=timeout)
        return Outcome(self.process.returncode, out.decode().split(), self.log)


class Scene(NamedTuple):
    """hook: what tells nix-build of it. Nix 2.25 to 2.33 forget what nix.conf says."""

    client: Host
    builders: tuple[Host, ...]
    hook: tuple[str, ...] = ("--option", "build-hook", INSTALLED)

    @property
    def everybody(self) -> tuple[Host, ...]:
        return (self.client, *self.builders)

    @property
    def builder(self) -> Host:
        return self.builders[0]

    def machines(self, text: str) -> None:
        self.client.write("/etc/nix/machines", text)

    def nix_build(self, expression: str, *options: str) -> list[str]:
        """Write the expression down, and return the command that builds it."""
        number = len(list(self.client.path("/tmp").glob("*.nix")))
        path = f"/tmp/{number}.nix"
        self.client.write(path, PRELUDE + expression)
        return ["nix-build", path, "--no-out-link", *self.hook, *options]

    def build(
        self,
        expression: str,
        *options: str,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        timeout: float = HANGS_S,
        user: str | None = None,
    ) -> Outcome:
        """Run nix-build; unless told not to `check`, its failure is the test's."""
        command = self.nix_build(expression, *options)
        done = self.client.run(
            *command, check=check, env=env, timeout=timeout, user=user
        )
        return Outcome(done.returncode, done.stdout.split(), done.stderr)

    def start(
        self,
        expression: str,
        *options: str,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> Run:
        """Start nix-build, and don't wait for it."""
        return self.launch(*self.nix_build(expression, *options), env=env, user=user)

    def launch(
        self,
        *command: str,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> Run:
        number = len(list(self.client.path("/tmp").glob("*.log")))
        log = self.client.path(f"/tmp/{number}.log")
        with log.open("w") as stderr:
            process = self.client.popen(
                *command, env=env, user=user, stdout=subprocess.PIPE, stderr=stderr
            )
        return Run(process, log)

    def output(self, expression: str) -> str:
        """The one output that the expression will have."""
        command = self.nix_build(expression)
        drv = self.client.run("nix-instantiate", command[1]).stdout.strip()
        return self.client.run("nix-store", "-q", "--outputs", drv).stdout.strip()

    def hooks(self, path: str = INSTALLED) -> list[int]:
        """The processes of the hooks that run now."""
        return [
            process.pid
            for process in self.client.processes()
            if re.fullmatch(rf"(?s)\S*python.* {path}( \S+)?( \d+)+", process.cmdline)
        ]

    def locks(self) -> list[str]:
        """The lock files of valid paths; Nix leaves one for each build that failed."""
        return [
            lock.name
            for lock in self.client.path("/nix/store").glob("*.lock")
            if registered(self.client, f"/nix/store/{lock.stem}")
        ]

    def settle(self) -> None:
        """Wait until no hook, no ssh and no session is left on any host.

        Idle shared connections may stay, as an ssh here and an sshd there; spare sessions
        are ended.  A build that is cancelled on a builder, or a session that ends there,
        takes a moment after nix-build has ended here.
        """

        def is_settled() -> bool:
            for host in self.everybody:
                for process in host.processes():
                    if process.cmdline.endswith(KEEPER):
                        host.signal(signal.SIGTERM, process.pid)
            return not self.busy()

        poll(is_settled, f"the end of {self.busy()}")

    def clear(self) -> None:
        """End every Nix here, and wait for what that ends."""
        for process in self.client.processes():
            if re.search("nix-build |old_nix", process.cmdline):
                self.client.signal(signal.SIGKILL, process.pid)
        self.settle()

    def busy(self) -> list[str]:
        return [
            f"{host.name}: {process.cmdline}"
            for host in self.everybody
            for process in host.processes()
            if not any(word in process.cmdline for word in MAY_STAY)
        ]


def registered(host: Host, *paths: str) -> bool:
    """Whether that host's Nix takes the paths for valid."""
    query = ("nix-store", "--check-validity", *paths)
    return host.run(*query, check=False).returncode == 0


def valid(host: Host, *paths: str) -> bool:
    """Whether the paths are registered there, and are what was registered."""
    verify = ("nix-store", "--verify-path", *paths)
    return registered(host, *paths) and not host.run(*verify, check=False).returncode


def verified(host: Host) -> bool:
    """Whether everything registered there is there, and what it should be."""
    command = ("nix-store", "--verify", "--check-contents")
    done = host.run(*command, check=False)
    return done.returncode == 0 and "error" not in done.stderr


def change_hook(
    nix: Scene, *statements: str, after: str = "", **constants: float
) -> None:
    """Install the hook with other values of some of its constants; see launcher.py."""
    nix.client.copy(HOOK, CHANGED)
    changes = [*assigned({**PATIENT, **constants}), *statements]
    nix.client.write(INSTALLED, launcher(CHANGED, *changes, after=after), 0o755)


def masters(nix: Scene) -> list[int]:
    return [
        process.pid
        for process in nix.client.processes()
        if re.search(r"ssh: \S+ \[mux\]|ssh -N -oControlMaster=yes", process.cmdline)
    ]


def end_masters(nix: Scene) -> None:
    pids = masters(nix)
    nix.client.signal(signal.SIGKILL, *pids)
    poll(lambda: not set(pids) & set(masters(nix)), "the end of the masters")


def lose_connections(nix: Scene) -> None:
    """All end at the same moment, as the hooks see it: else one might just be used anew."""
    hooks = nix.hooks()
    nix.client.signal(signal.SIGSTOP, *hooks)
    end_masters(nix)
    nix.client.signal(signal.SIGCONT, *hooks)


@contextlib.contextmanager
def cleared(nix: Scene, *files: str) -> Iterator[Scene]:
    """Afterwards nothing runs there, no connection is left, and these files are gone."""
    try:
        yield nix
    finally:
        nix.clear()
        end_masters(nix)
        nix.client.run("rm", "-rf", SLOTS, *files)


def forget(nix: Scene) -> None:
    """End all connections, and forget what was learnt."""
    end_masters(nix)
    nix.client.run("rm", "-rf", SLOTS, JOURNAL)


def begun(nix: Scene, host: str) -> int:
    """How many connections to that host hooks have begun; for clients with SSH."""
    journal = nix.client.path(JOURNAL)
    lines = journal.read_text().splitlines() if journal.exists() else []
    return sum(line.endswith(f"-- {host}") for line in lines)


@contextlib.contextmanager
def nobody_chooses(nix: Scene) -> Iterator[None]:
    """Hold the main lock: who chose now would take a lock that we look at for taken."""
    path = nix.client.path(SLOTS) / "main-lock"
    with contextlib.ExitStack() as held:
        with contextlib.suppress(FileNotFoundError):
            file = held.enter_context(path.open("r+b"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def places(nix: Scene) -> list[str]:
    """What is written at each place in line where a hook stands."""
    with nobody_chooses(nix):
        files = nix.client.path(SLOTS).glob("own/line-*")
        return [text_of(file) for file in files if is_taken(file)]


def stand(nix: Scene, count: int) -> None:
    """Wait until so many hooks stand in line, and have written down for what."""

    def are_there() -> bool:
        said = places(nix)
        return len(said) == count and all(said)

    poll(are_there, f"{count} in line")


def outage(nix: Scene, host: str) -> str:
    """What is noted down of that host: failures, since, until, words; or nothing."""
    notes = nix.client.path(f"{SLOTS}/own").glob(f"*{host}[.-]*down")
    return "".join(map(text_of, notes))


def text_of(file: Path) -> str:
    """What it says; nothing if it is gone, as a hook may remove it at any moment."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return file.read_text(errors="replace")
    return ""


def go_away(builder: Host, how: str = "refusing") -> None:
    """Nothing listens there any more, or ("silent") nothing answers at all."""
    if how == "silent":
        builder.swallow(True)
    else:
        builder.stop_sshd(sessions=True)


def come_back(builder: Host) -> None:
    if builder.swallows:
        builder.swallow(False)
    if not builder.sshd_pid:
        builder.start_sshd()


def engines(config: pytest.Config) -> list[str]:
    return str(config.getoption("--engines")).split(",")


def other(config: pytest.Config, name: str) -> str:
    """The engine after `name` in --engines, round and round: a builder for a client."""
    names = engines(config)
    position = names.index(name) if name in names else 0
    return names[(position + 1) % len(names)]


def version(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in engine(name).version.split("."))


def suitable(
    config: pytest.Config, name: str, suits: Callable[[tuple[int, ...]], bool]
) -> str:
    """That engine if its version suits; or another of --engines; or any there is."""
    reason = unavailable()
    if reason:
        pytest.skip(reason)
    installed = ["host", *(name for name in ENGINES if (ENGINES_DIR / name).is_dir())]
    wanted = [name] if name in installed else []
    for candidate in (*wanted, *engines(config), *installed):
        if suits(version(candidate)):
            return candidate
    pytest.skip("this needs another version of Nix: run tests/engines")


@contextlib.contextmanager
def scene(
    client: str,
    *builders: str,
    client_conf: str = "",
    builder_conf: str = "",
) -> Iterator[Scene]:
    """A client that has the hook and may log in on builders b1, b2 ... as root.

    In a lab of its own, so that a test may have one while its module has another.
    """
    if reason := unavailable():
        pytest.skip(reason)
    with Lab() as lab:
        there = tuple(
            lab.host(f"b{number}", engine(name), nix_conf=builder_conf)
            for number, name in enumerate(builders, 1)
        )
        conf = f"max-jobs = 0\n{client_conf}"
        here = lab.host("client", engine(client), nix_conf=conf)
        here.copy(HOOK, INSTALLED)
        here.copy(TESTS / "old_nix.py", DRIVER)
        for builder in there:
            connect(here, builder)
        # two of 2.3 that find no store stumble over each other while they make it
        for host in (here, *there):
            host.run("nix-store", "--init")
        running = Scene(here, there)
        running.machines("".join(f"{builder.name} - - 4\n" for builder in there))
        yield running


@contextlib.contextmanager
def distrustful(client: str, builder: str, conf: str = "") -> Iterator[Scene]:
    """A builder whose daemon trusts only root, and where we are the user `nix`.

    What the client builds itself it signs with a key that the builder knows, but not if
    it gets `--option secret-key-files ""`.
    """
    secret = "secret-key-files = /etc/nix/secret\n"
    conf = f"trusted-users = root\n{conf}"
    with scene(client, builder, client_conf=secret, builder_conf=conf) as running:
        there = running.builder
        running.client.run(
            *("nix-store", "--generate-binary-cache-key", "client"),
            *("/etc/nix/secret", "/etc/nix/public"),
        )
        public = running.client.read("/etc/nix/public")
        with there.path("/etc/nix/nix.conf").open("a") as file:
            file.write(f"trusted-public-keys = {public}\n")
        there.add_user("nix")
        connect(running.client, there, "nix")
        there.start_daemon()
        running.machines("nix@b1 - - 4\n")
        yield running
