"""Play Nix 1.0, 1.2 or 1.11 towards a build hook.

    python3 old_nix.py --version 1.11 --hook FILE DERIVATION...

Starts the hook, asks it, reads it and ends it as those versions do, over a real local
store that the installed Nix looks after. Builds every derivation's whole graph, in
dependency order and as many at once as the hook accepts, and prints what happened as
JSON. Nothing is built here: what the hook declines stays unbuilt. Only with `--build`
it does as nix-build does: it builds here what is declined, if --max-jobs lets it, prints
the outputs and fails if there is one that it has not. The hook's messages and logs are
shown in any case, on stderr.

What 1.x does was read from its build.cc, pathlocks.cc and util.cc. What may surprise:

- 1.0 and 1.1 do not pass on the build timeout, and name all outputs as missing ones.
- The hook runs in a session of its own, in /, with SIGPIPE ignored. Its descriptors are
  0, 1, 2 and 4; all others of Nix are closed on exec. Nix 1.11's hooks die with it.
- Nix waits in a blocking read for a reply, a byte at a time, and serves nobody else.
- It reads 4096 bytes at a time from the message pipe and the log pipe. At the end of
  *either* it waits for the hook's exit, serving nobody else, and then closes both: what
  it has not read by then is lost.
- Output locks are POSIX locks on OUTPUT.lock. So that an importing Nix 2.x, which uses
  flock, meets a held lock just as one of 1.x would, each file is locked in both ways.
- At the end a hook that has accepted nothing sees its stdin close. 1.0 and 1.2 then
  wait for it; 1.11 kills its process group at once.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

READ_BYTES = 4096
PR_SET_PDEATHSIG = 1

# -- The local store ------------------------------------------------------------------


class Derivation(NamedTuple):
    path: str
    outputs: dict[str, str]
    inputs: dict[str, list[str]]
    sources: list[str]
    system: str
    environment: dict[str, str]

    @property
    def features(self) -> list[str]:
        return self.environment.get("requiredSystemFeatures", "").split()


def read_derivation(path: str) -> Derivation:
    """Its one term is, but for the name in front, a tuple as Python writes it."""
    with open(path, encoding="utf-8") as file:
        term = ast.literal_eval(file.read()[len("Derive") :])
    outputs, inputs, sources, system, _, _, environment = term
    named = {output[0]: output[1] for output in outputs}
    return Derivation(path, named, dict(inputs), sources, system, dict(environment))


def query(*arguments: str) -> list[str]:
    command = ["nix-store", *arguments]
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, encoding="utf-8"
    ).stdout.split()


def closure(paths: list[str]) -> set[str]:
    return set(query("-qR", *paths)) if paths else set()


def is_valid(path: str) -> bool:
    command = ["nix-store", "--check-validity", path]
    return (
        subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
    )


def true_inputs(derivation: Derivation) -> set[str]:
    """The closure of the sources and of the outputs of other derivations it uses."""
    wanted = list(derivation.sources)
    for path, names in derivation.inputs.items():
        outputs = read_derivation(path).outputs
        wanted += [outputs[name] for name in names]
    return closure(wanted)


class OutputLocks:
    """Held from before the request until the hook has ended, on all outputs."""

    def __init__(self) -> None:
        self.held: list[int] = []
        self.files: list[str] = []

    def take(self, outputs: list[str]) -> bool:
        """All of them, or none: then somebody else is building this."""
        for path in sorted(f"{output}.lock" for output in outputs):
            descriptor = lock_file(path)
            if descriptor is None:
                self.release(delete=False)
                return False
            self.held.append(descriptor)
            self.files.append(path)
        return True

    def release(self, delete: bool) -> None:
        """1.x deletes lock files only once their outputs are valid."""
        for path, descriptor in zip(self.files, self.held):
            if delete:
                if os.path.exists(path):
                    os.unlink(path)
                os.write(descriptor, b"d")
            os.close(descriptor)
        self.held, self.files = [], []


def lock_file(path: str) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        if os.fstat(descriptor).st_size == 0:
            return descriptor
        os.close(descriptor)  # stale: unlinked by its last holder


# -- The hook -------------------------------------------------------------------------


class Options(NamedTuple):
    version: str
    hook: str
    system: str
    max_jobs: int
    max_silent_time: int
    timeout: int
    trace: bool
    poll_interval: float
    once: bool
    build: bool

    def arguments(self) -> list[str]:
        trace = str(int(self.trace))
        three = [self.system, str(self.max_silent_time), trace]
        if self.version == "1.0":
            return [self.hook, *three]
        name = self.hook if self.version == "1.2" else os.path.basename(self.hook)
        return [name, *three, str(self.timeout)]


class Hook:
    """One hook process."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.replies: list[list[str]] = []
        self.messages = b""
        self.log = b""
        self.exit: int | None = None
        messages, messages_in = os.pipe()
        requests_out, requests = os.pipe()
        log, log_in = os.pipe()
        self.from_hook, self.to_hook, self.builder_out = messages, requests, log
        self.pid = os.fork()
        if self.pid == 0:
            self.become(requests_out, messages_in, log_in)
        for descriptor in (messages_in, requests_out, log_in):
            os.close(descriptor)

    def become(self, requests: int, messages: int, log: int) -> None:
        """The child's part, which never returns."""
        try:
            if self.options.version == "1.11":
                libc = ctypes.CDLL(None, use_errno=True)
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.setsid()
            os.dup2(messages, 2)
            os.dup2(2, 1)
            os.chdir("/")
            os.dup2(requests, 0)
            os.dup2(log, 4)
            os.execv(self.options.hook, self.options.arguments())
        except OSError as error:
            os.write(2, f"executing {self.options.hook}: {error}\n".encode())
        finally:
            os._exit(1)

    def write_line(self, line: str) -> None:
        data = line.encode() + b"\n"
        while data:
            data = data[os.write(self.to_hook, data) :]

    def read_line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self.from_hook, 1)
            if not byte:
                raise EOFError(f"unexpected EOF reading a line: {self.messages!r}")
            line += byte
        return line

    def ask(self, willing: bool, derivation: Derivation) -> str:
        """Send one request; what is not the reply goes to the user's terminal."""
        features = ",".join(derivation.features)
        request = f"{int(willing)} {derivation.system} {derivation.path} {features}"
        self.write_line(request)
        while not (line := self.read_line()).startswith(b"# "):
            self.messages += line
            os.write(2, line)
        reply = line[2:].decode().rstrip("\n")
        self.replies.append([derivation.path, reply])
        return reply

    def instruct(self, inputs: list[str], outputs: list[str]) -> None:
        """After an accept; each list ends with a space, as 1.x writes it."""
        self.write_line("".join(f"{path} " for path in inputs))
        self.write_line("".join(f"{path} " for path in outputs))
        os.close(self.to_hook)

    def read_some(self, descriptor: int) -> bool:
        """One read; False at the end of the pipe."""
        data = os.read(descriptor, READ_BYTES)
        if descriptor == self.from_hook:
            self.messages += data
        else:
            self.log += data
        os.write(2, data)
        return bool(data)

    def wait(self) -> int:
        """Its exit status, or minus its signal; the rest of both pipes is dropped."""
        _, status = os.waitpid(self.pid, 0)
        killed = os.WIFSIGNALED(status)
        self.exit = -os.WTERMSIG(status) if killed else os.WEXITSTATUS(status)
        os.close(self.from_hook)
        os.close(self.builder_out)
        return self.exit

    def dismiss(self) -> None:
        """No more requests for a hook that has accepted nothing."""
        os.close(self.to_hook)
        if self.options.version == "1.11":
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()

    def account(self) -> dict[str, Any]:
        return {
            "replies": self.replies,
            "messages": self.messages.decode("utf-8", "replace"),
            "log": self.log.decode("utf-8", "replace"),
            "exit": self.exit,
        }


# -- The worker -----------------------------------------------------------------------


class Running(NamedTuple):
    derivation: Derivation
    hook: Hook
    locks: OutputLocks


class Worker:
    """Asks about what can be built, and looks after the hooks that build."""

    def __init__(self, options: Options, roots: list[str]) -> None:
        self.options = options
        paths = sorted(path for path in closure(roots) if path.endswith(".drv"))
        self.graph = {path: read_derivation(path) for path in paths}
        self.results: dict[str, str] = {}
        self.running: list[Running] = []
        self.hooks: list[Hook] = []
        self.waiting: Hook | None = None
        self.asleep: set[str] = set()
        self.wake_at = 0.0

    def run(self) -> None:
        while self.undone():
            self.start_what_can_be()
            if self.running or self.asleep:
                self.wait_for_input()
        if self.waiting:
            self.waiting.dismiss()

    def undone(self) -> bool:
        return len(self.results) < len(self.graph)

    def start_what_can_be(self) -> None:
        busy = {running.derivation.path for running in self.running}
        for path, derivation in self.graph.items():
            if path in busy or path in self.results or path in self.asleep:
                continue
            before = [self.results.get(needed) for needed in derivation.inputs]
            if any(result not in (None, "built", "valid") for result in before):
                self.results[path] = "dependency failed"
            elif None not in before:
                self.try_to_build(derivation)

    def try_to_build(self, derivation: Derivation) -> None:
        outputs = list(derivation.outputs.values())
        locks = OutputLocks()
        if not locks.take(outputs):
            self.sleep(derivation)
            return
        missing = [output for output in outputs if not is_valid(output)]
        if not missing:
            self.results[derivation.path] = "valid"
            locks.release(delete=True)
            return
        reply = self.ask(derivation)
        if reply == "accept":
            self.accepted(derivation, missing, locks)
            return
        locks.release(delete=False)
        if reply == "postpone" and not self.options.once:
            self.sleep(derivation)
        elif reply == "decline" and self.options.build and self.options.max_jobs:
            self.results[derivation.path] = build_here(derivation)
        else:
            self.results[derivation.path] = reply

    def sleep(self, derivation: Derivation) -> None:
        """Until the poll interval is over; that a build ends does not wake it."""
        if not self.asleep:
            self.wake_at = time.monotonic() + self.options.poll_interval
        self.asleep.add(derivation.path)

    def ask(self, derivation: Derivation) -> str:
        if not self.waiting:
            self.waiting = Hook(self.options)
            self.hooks.append(self.waiting)
        return self.waiting.ask(self.options.max_jobs > 0, derivation)

    def accepted(
        self, derivation: Derivation, missing: list[str], locks: OutputLocks
    ) -> None:
        hook = self.waiting
        assert hook
        self.waiting = None
        inputs = true_inputs(derivation) | closure([derivation.path])
        new_enough = self.options.version == "1.11"
        outputs = missing if new_enough else list(derivation.outputs.values())
        hook.instruct(sorted(inputs), sorted(outputs))
        self.running.append(Running(derivation, hook, locks))

    def wait_for_input(self) -> None:
        """One round over all pipes; then look after those that ended in it."""
        timeout = max(0.0, self.wake_at - time.monotonic()) if self.asleep else None
        pipes = [
            pipe
            for running in self.running
            for pipe in (running.hook.from_hook, running.hook.builder_out)
        ]
        ready, _, _ = select.select(pipes, [], [], timeout)
        ended = [running for running in self.running if read_round(running, ready)]
        for running in ended:
            self.build_done(running)
        if time.monotonic() >= self.wake_at:
            self.asleep.clear()

    def build_done(self, running: Running) -> None:
        derivation, hook, locks = running
        status = hook.wait()
        self.running.remove(running)
        result = {0: "built", 100: "failed", 101: "timed out"}.get(
            status, "hook failed"
        )
        if status == 0 and not all(map(is_valid, derivation.outputs.values())):
            result = "outputs not valid"  # 1.x would register whatever lies there
        self.results[derivation.path] = result
        locks.release(delete=result == "built")

    def account(self) -> dict[str, Any]:
        derivations = {
            path: {"result": self.results[path], "outputs": derivation.outputs}
            for path, derivation in self.graph.items()
        }
        hooks = [hook.account() for hook in self.hooks]
        return {"derivations": derivations, "hooks": hooks}


def build_here(derivation: Derivation) -> str:
    """Have the installed Nix build it without a hook."""
    command = ["nix-store", "--realise", "-j1", "--builders", "", derivation.path]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    return "failed" if done.returncode else "built"


def read_round(running: Running, ready: list[int]) -> bool:
    """Read once from each pipe that has something; True if one of them has ended."""
    pipes = (running.hook.from_hook, running.hook.builder_out)
    alive = [running.hook.read_some(pipe) for pipe in pipes if pipe in ready]
    return not all(alive)


# -- Command line ---------------------------------------------------------------------


def reserve_low_descriptors() -> None:
    """So that no pipe gets the number 4 before it is moved there."""
    while os.open("/dev/null", os.O_RDWR) < 10:
        pass


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--version", choices=["1.0", "1.2", "1.11"], default="1.11")
    parser.add_argument("--hook", required=True)
    parser.add_argument("--system", default="x86_64-linux")
    parser.add_argument("--max-jobs", type=int, default=0, help="0: never willing")
    parser.add_argument("--max-silent-time", type=int, default=0)
    parser.add_argument("--timeout", type=int, default=0)
    parser.add_argument("--trace", action="store_true", help="print build traces")
    parser.add_argument("--poll-interval", type=float, default=5)
    parser.add_argument("--once", action="store_true", help="a postpone is final")
    parser.add_argument("--build", action="store_true", help="do as nix-build does")
    parser.add_argument("derivations", nargs="*")
    given = vars(parser.parse_args())
    roots = given.pop("derivations")
    reserve_low_descriptors()
    worker = Worker(Options(**given), roots)
    worker.run()
    if not worker.options.build:
        json.dump(worker.account(), sys.stdout)
        return 0
    outputs = [path for root in roots for path in worker.graph[root].outputs.values()]
    print(*filter(is_valid, outputs), sep="\n")
    return 0 if all(map(is_valid, outputs)) else 1


if __name__ == "__main__":
    sys.exit(main())
