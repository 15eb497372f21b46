"""A farm of real hosts on one machine, for the tests and the demo.

    with Lab() as lab:
        builder = lab.host("b1", engine("2.34"))
        client = lab.host("client", engine("host"))
        builder.authorize(keypair(client))
        trust(client, builder)
        client.run("ssh", "b1", "nix-store", "--version")

Every host has its own network, mount, PID, UTS and IPC namespaces, a copy-on-write
root of its own over its engine's, its own /nix and its own sshd. An engine is a root
directory with a Nix in it: `host` is this machine as it is, the others are made by
tests/engines.

Nothing here needs cleaning up by hand. All hosts live in one PID namespace whose init
waits for the end of a pipe from this process. However this process ends, the kernel
then ends the init, with it every process in the lab, and with the last of them its
mounts, its files and its network. Nothing has a name outside.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar, final

ENGINES = {"2.3": "bullseye", "2.8": "bookworm", "2.26": "trixie", "2.34": "sid"}
CLUSTER = "slurm"  # one more root, of trixie, which has Slurm, too
ENGINES_DIR = Path(
    os.environ.get("NBR_ENGINES", "/var/cache/nix-build-remote/engines")
).absolute()
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TOOLS = ("chroot", "ip", "mount", "nsenter", "timeout", "unshare")
BUILD_USERS = 32
# Any of these may be a mount of its own on this machine, and an overlay of / would show
# only what lies beneath it, so it gets an overlay too.
OWN_MOUNTS = ("/nix", "/nix/store", "/nix/var", "/opt", "/usr", "/var")
# What the init of a host waits for, with a number that no test would use.
IDLE = "sleep 2147083"
# What takes longer hangs. No test depends on how fast a machine is, so this is never near.
HANGS_S = 300

T = TypeVar("T")

# -- Errors ---------------------------------------------------------------------------


class FarmError(RuntimeError):
    """The farm itself does not work here."""


class CommandFailed(AssertionError):
    """A command inside a host failed: a test that did not expect it fails with it."""


@functools.cache
def unavailable() -> str | None:
    """Why this machine cannot have a farm, or None if it can."""
    if not sys.platform.startswith("linux"):
        return "the farm needs Linux namespaces"
    if os.geteuid() != 0:
        return "the farm needs root"
    missing = [name for name in TOOLS if not shutil.which(name, path=PATH)]
    if missing:
        return f"the farm needs {', '.join(missing)}"
    # Root in an ordinary container may not.
    trial = ["unshare", "--mount", "--net", "--pid", "--fork", "true"]
    if subprocess.run(trial, capture_output=True, check=False).returncode:
        hint = "in Docker: run it with --privileged; "
        hint += "a chroot DIR must be a mount point: mount --bind DIR DIR"
        return f"the farm must make namespaces ({hint})"
    return None


def poll(found: Callable[[], T], what: str, *, timeout: float = HANGS_S) -> T:
    """Wait until `found` returns something true, and return that."""
    deadline = time.monotonic() + timeout
    while not (value := found()):
        if time.monotonic() > deadline:
            raise FarmError(f"gave up after {timeout} s waiting for {what}")
        time.sleep(0.005)
    return value


def is_taken(path: Path) -> bool:
    """Whether somebody holds the lock of that file, if it is there."""
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


# -- Engines --------------------------------------------------------------------------


class Engine(NamedTuple):
    """A root directory with a Nix in it."""

    name: str
    root: Path
    version: str
    path: str = PATH


@functools.cache
def engine(name: str) -> Engine:
    if name == "host":
        return _this_machine()
    root = ENGINES_DIR / name
    if not root.is_dir():
        raise FarmError(f"engine {name} is not there yet: run tests/engines {name}")
    return Engine(name, root, debian_version(root))


def debian_version(root: Path) -> str:
    """The version of Nix in a Debian root, without running it: 2.26 needs a /proc."""
    status = (root / "var/lib/dpkg/status").read_text(errors="replace")
    found = re.search(r"(?m)^Package: nix-bin\n(?:.+\n)*?Version: ([\d.]+)", status)
    if not found:
        raise FarmError(f"{root} has no Nix: remake it with tests/engines --force")
    return found[1]


def _this_machine() -> Engine:
    nix_store = shutil.which("nix-store")
    if not nix_store:
        raise FarmError("this machine has no Nix: apt-get install nix-bin")
    # nix-store would make a /nix on this machine only to tell its version
    asked = [os.path.join(os.path.dirname(nix_store), "nix-hash"), "--version"]
    said = subprocess.run(asked, capture_output=True, text=True, check=True)
    # /root is empty inside, so a Nix found through it is looked up where it really is
    where = os.path.dirname(nix_store)
    if where.startswith("/root/"):
        where = os.path.dirname(os.path.realpath(nix_store))
    path = PATH if where in PATH.split(":") else f"{where}:{PATH}"
    return Engine("host", Path("/"), said.stdout.split()[-1], path)


def _own_mounts() -> list[str]:
    """Those of this machine, outermost first."""
    with open("/proc/self/mountinfo") as mounts:
        points = {line.split()[4] for line in mounts}
    return [point for point in OWN_MOUNTS if point in points]


# -- Processes in the lab -------------------------------------------------------------

# The init of the lab's PID namespace: at the end of its stdin it ends, and all with it.
LAB_INIT = """
ip link set lo up
ip link add farm type bridge
ip link set farm up
echo ready
read -r _ || :
"""

# Becomes the init of a host. Its layers lie on a tmpfs mounted over /sys, the one
# directory that is always there and that no engine can be in.
HOST_INIT = r"""
lower=$1 name=$2 idle=$3 python=$4 become_root=$5; shift 5
echo "$name" >/proc/sys/kernel/hostname
mount -t tmpfs -o size=70%,mode=755 farm /sys
mkdir /sys/root
cd /sys/root

overlay() {
    mkdir "/sys/upper$layer" "/sys/work$layer"
    mount -t overlay \
        -o "lowerdir=$1,upperdir=/sys/upper$layer,workdir=/sys/work$layer" farm "$2"
    layer=$((layer + 1))
}
layer=0
overlay "$lower" /sys/root
cd /sys/root
for point; do overlay "$point" "/sys/root$point"; done

# no file, key or setting of this machine's users, nor the hook, if it is installed; no DNS
for empty in root:700 home:755 tmp:1777 run:755 dev:755; do
    mkdir -p "${empty%:*}"
    mount -t tmpfs -o "mode=${empty#*:}" farm "${empty%:*}"
done
rm -rf etc/ssh etc/nix etc/resolv.conf etc/hosts usr/local/bin/nix_build_remote.py
mkdir -p etc/ssh etc/nix proc sys run/sshd
sed -i 's/^root:[^:]*:/root:*:/' etc/shadow  # sshd refuses a locked account

cp -a /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty dev/
mkdir dev/pts
mkdir -m 1777 dev/shm
ln -s /proc/self/fd dev/fd
ln -s /proc/self/fd/0 dev/stdin
ln -s /proc/self/fd/1 dev/stdout
ln -s /proc/self/fd/2 dev/stderr
ln -s pts/ptmx dev/ptmx
mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts dev/pts
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys || :

# A shell that waits for a child reaps the orphans too, as an init must.
exec "$python" -IS -c "$become_root" \
    "echo ready; exec >/dev/null 2>&1; while :; do $idle; done"
"""

# Makes the working directory the root of this mount namespace, where whoever enters it
# comes out, as Nix 2.8 does before it starts ssh. If we are in a chroot, that is
# outside of it, and to be reached only by entering our own namespace.
BECOME_ROOT = """
import ctypes, os, sys
libc, here = ctypes.CDLL(None), os.open(".", os.O_RDONLY)
CLONE_NEWNS, MS_MOVE = 0x20000, 0x2000
assert libc.setns(os.open("/proc/self/ns/mnt", os.O_RDONLY), CLONE_NEWNS) == 0
os.fchdir(here)
assert libc.mount(b".", b"/", None, MS_MOVE, None) == 0
os.chroot(".")
os.execv("/bin/sh", ["sh", "-c", sys.argv[1]])
"""

NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid")


def _enter(pid: int, *namespaces: str) -> list[str]:
    return [_tool("nsenter"), "--target", str(pid), *namespaces, "--"]


def _run_within(pid: int) -> list[str]:
    """The start of a command line: run the rest in all namespaces of that process.

    To enter a PID namespace takes a fork, and so a process outside that waits for the
    one inside. nsenter would stop when that is stopped; a waiter that stands still never
    takes note of a killed process, and the kernel ends no namespace before. `timeout 0`
    waits until the end and then ends in the same way, by the same signal.
    """
    fork_into = [_tool("nsenter"), "--no-fork", "--target", str(pid), "--pid", "--"]
    wait = [_tool("timeout"), "--foreground", "0"]
    rest = [name for name in NAMESPACES if name != "--pid"]
    return [*fork_into, *wait, *_enter(pid, *rest)]


@functools.cache
def _tool(name: str) -> str:
    found = shutil.which(name, path=PATH)
    if not found:
        raise FarmError(f"the farm needs {name}")
    return found


def _only_child(pid: int) -> int:
    """The process that this one forked into new namespaces and waits for, or 0."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else 0
    return 0


def _start_init(
    prefix: list[str], script: str, *args: str, stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Start the init of new namespaces, and return when it says that it is ready."""
    new = ("--propagation", "private", "--fork", "--kill-child", *NAMESPACES)
    init = subprocess.Popen(
        [*prefix, _tool("unshare"), *new, "--", "/bin/sh", "-ec", script, "sh", *args],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        env={"PATH": PATH},
        start_new_session=True,  # a Ctrl-C is for the tests, which then end the lab
    )
    assert init.stdout and init.stderr
    if init.stdout.readline() != b"ready\n":
        reason = init.stderr.read().decode(errors="replace").strip()
        raise FarmError(f"cannot make the farm's namespaces: {reason}")
    return init


def _ip(commands: str, *prefix: str) -> None:
    """Run the lines of `commands` in one `ip` of this machine."""
    argv = [*prefix, _tool("ip"), "-batch", "-"]
    done = subprocess.run(
        argv, input=commands, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise FarmError(f"{' '.join(argv)}: {done.stderr.strip()}\n{commands}")


class Inside(subprocess.Popen[Any]):
    """A process inside a host. The Popen itself is the one outside that waits for it."""

    def send_signal(self, sig: int) -> None:
        """Signal the process inside, as soon as there is one; its waiter ends with it."""
        while self.poll() is None:
            if inner := _only_child(self.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(inner, sig)
                return
            time.sleep(0.001)


# -- Hosts ----------------------------------------------------------------------------

NIX_CONF = """\
substituters =
sandbox = false
build-users-group =
"""

# sshd's own defaults, but for what a host without PAM and passwords cannot have
SSHD_CONF = """\
HostKey /etc/ssh/ssh_host_ed25519_key
PermitRootLogin prohibit-password
PasswordAuthentication no
PidFile /run/sshd.pid
PrintMotd no
"""


class Process(NamedTuple):
    pid: int
    cmdline: str


class User(NamedTuple):
    name: str
    uid: int
    gid: int
    home: str


class Host:
    """One host of a lab; made by Lab.host."""

    def __init__(self, lab: Lab, name: str, engine: Engine, number: int) -> None:
        self.lab = lab
        self.name = name
        self.engine = engine
        self.number = number
        self.swallows = False
        self.address = f"10.77.{number >> 8}.{number & 255}"
        self.address6 = f"fd77::{number}"
        mounts = _own_mounts() if engine.name == "host" else []
        within_lab = _enter(lab.pid, "--net", "--pid")
        python = (sys.executable, BECOME_ROOT)
        args = (str(engine.root), name, IDLE, *python, *mounts)
        self._init = _start_init(within_lab, HOST_INIT, *args)
        # nsenter, unshare, and then the host's init
        self.pid = _only_child(_only_child(self._init.pid))

    # commands

    def popen(
        self,
        *argv: str,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        **options: Any,
    ) -> Inside:
        """Start a command inside; signals sent to it reach the command itself."""
        who = self.user(user or "root")
        as_user = ["/usr/bin/setpriv", f"--reuid={who.uid}", f"--regid={who.gid}"]
        prefix = [*as_user, "--init-groups"] if user else []
        options.setdefault("stdin", subprocess.DEVNULL)
        base = {"PATH": self.engine.path, "HOME": who.home, "USER": who.name}
        command = [*_run_within(self.pid), *prefix, *argv]
        return Inside(command, env={**base, **(env or {})}, **options)

    def run(
        self,
        *argv: str,
        env: Mapping[str, str] | None = None,
        input: str | bytes | None = None,
        check: bool = True,
        timeout: float = HANGS_S,
        user: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside; with `check`, any failure of it is the test's."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
        process = self.popen(*argv, env=env, user=user, stdin=stdin, **pipes)
        data = input.encode() if isinstance(input, str) else input
        try:
            out, err = process.communicate(data, timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = _what_was_said(process)
            raise self._failure(argv, f"no end after {timeout} s", out, err) from None
        except BaseException:
            process.kill()
            raise
        if check and process.returncode:
            raise self._failure(argv, f"exit {process.returncode}", out, err)
        return subprocess.CompletedProcess(
            argv, process.returncode, _text(out), _text(err)
        )

    def _failure(
        self, argv: tuple[str, ...], how: str, out: bytes, err: bytes
    ) -> CommandFailed:
        command = " ".join(argv)
        said = f"--- stdout\n{_text(out)}\n--- stderr\n{_text(err)}"
        return CommandFailed(f"on {self.name}: {command}: {how}\n{said}")

    def processes(self) -> list[Process]:
        """What runs inside, by the host's own process numbers, but for its init."""
        return [
            Process(pid, cmdline)
            for pid, cmdline in _cmdlines(self.path("/proc"))
            if cmdline and pid != 1 and cmdline != IDLE
        ]

    # files

    def path(self, inside: str) -> Path:
        """The host's file as this process sees it.

        Links are followed here, within the host: left to the kernel, an absolute one
        (/var/run, every ./result of Nix) would lead to the real machine's files.
        """
        root = Path(f"/proc/{self.pid}/root")
        ahead, behind, links = inside.split("/")[::-1], root, 0
        while ahead:
            part = ahead.pop()
            here = behind / part
            if part == "..":
                behind = behind if behind == root else behind.parent
            elif part and here.is_symlink():
                target = os.readlink(here)
                behind = root if target.startswith("/") else behind
                ahead += target.split("/")[::-1]
                links += 1
            else:
                behind = here
            if links > 40:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), inside)
        return behind

    def read(self, inside: str) -> str:
        return self.path(inside).read_text(errors="replace")

    def write(self, inside: str, content: str | bytes, mode: int = 0o644) -> None:
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            os.fchmod(file.fileno(), mode)  # not by its name: a hook may remove it
            file.write(content if isinstance(content, bytes) else content.encode())

    def copy(self, source: Path, inside: str, mode: int = 0o755) -> None:
        """Bring a file of the real machine, such as the hook, into the host."""
        self.write(inside, source.read_bytes(), mode)

    def _append(self, inside: str, text: str) -> None:
        with self.path(inside).open("a") as file:
            file.write(text)

    # users

    def user(self, name: str) -> User:
        for line in self.read("/etc/passwd").splitlines():
            fields = line.split(":")
            if fields[0] == name:
                return User(name, int(fields[2]), int(fields[3]), fields[5])
        raise FarmError(f"{self.name} has no user {name}")

    def add_user(self, name: str) -> User:
        """Add an ordinary user, who may log in by key only."""
        taken = {line.split(":")[2] for line in self.read("/etc/passwd").splitlines()}
        uid = next(uid for uid in range(1000, 60000) if str(uid) not in taken)
        self._append("/etc/passwd", f"{name}:*:{uid}:{uid}::/home/{name}:/bin/sh\n")
        self._append("/etc/group", f"{name}:x:{uid}:\n")
        home = self.path("/home") / name
        home.mkdir(mode=0o700)
        os.chown(home, uid, uid)
        return User(name, uid, uid, f"/home/{name}")

    def _ssh_file(self, user: str, name: str, line: str) -> None:
        """Append to a file in the user's .ssh, as private as sshd demands it."""
        who = self.user(user)
        directory = f"{who.home}/.ssh"
        self.path(directory).mkdir(mode=0o700, exist_ok=True)
        self._append(f"{directory}/{name}", line.rstrip("\n") + "\n")
        for made in (directory, f"{directory}/{name}"):
            os.chown(self.path(made), who.uid, who.gid)

    def authorize(self, public_key: str, user: str = "root") -> None:
        """Let the holder of that key log in here."""
        self._ssh_file(user, "authorized_keys", public_key)

    # services

    @property
    def host_key(self) -> str:
        """The public host key as known_hosts has it, without a name or comment."""
        return " ".join(self.read("/etc/ssh/ssh_host_ed25519_key.pub").split()[:2])

    def start_sshd(self) -> None:
        """Start sshd, and return when it listens (only then it writes its PID)."""
        # sshd insists on being called by its full path
        self.run("sh", "-c", 'exec "$(command -v sshd)" -E /var/log/sshd.log')
        poll(lambda: self.sshd_pid, f"sshd on {self.name}")

    @property
    def sshd_pid(self) -> int:
        """The listening sshd, by the host's own process numbers; 0 if none runs."""
        with contextlib.suppress(FileNotFoundError):
            return int(self.read("/run/sshd.pid") or 0)
        return 0

    def stop_sshd(self, *, sessions: bool = False) -> None:
        """Stop listening; with `sessions`, end the connections there are, too."""
        ended = f"the end of sshd on {self.name}"
        if listener := self.sshd_pid:
            self.signal(signal.SIGKILL, listener)
            # until then another cannot listen, and this one may begin a session
            poll(lambda: not self.is_running(listener), ended)
        while sessions and (found := self._sshd_sessions()):
            self.signal(signal.SIGKILL, *found)
            poll(lambda: not any(map(self.is_running, found)), ended)
        self.path("/run/sshd.pid").unlink(missing_ok=True)

    def _sshd_sessions(self) -> list[int]:
        """Those that run: "sshd: root@notty", from OpenSSH 9.8 on "sshd-session: ..."."""
        names = [(pid, line.split()[0]) for pid, line in self.processes()]
        found = [pid for pid, name in names if name.startswith("sshd")]
        return [pid for pid in found if self.is_running(pid)]

    def is_running(self, pid: int) -> bool:
        """Whether that process of the host's has not let go of its files yet."""
        try:
            text = self.path(f"/proc/{pid}/stat").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return False
        return text.rpartition(")")[2].split()[0] not in "ZX"

    def restart_sshd(self, *, sessions: bool = False) -> None:
        self.stop_sshd(sessions=sessions)
        self.start_sshd()

    def signal(self, sig: int, *pids: int) -> None:
        """Signal processes by the host's own process numbers; gone ones are fine."""
        numbers = [str(pid) for pid in pids]
        if numbers:
            kill = 'kill -"$@" 2>/dev/null'
            self.run("sh", "-c", kill, "sh", str(int(sig)), *numbers, check=False)

    def start_daemon(self, *, env: Mapping[str, str] | None = None) -> Inside:
        """Start nix-daemon with build users, and return when it listens.

        It has no more in its environment than systemd gives to a service.
        """
        if "nixbld:" not in self.read("/etc/group"):
            self._add_build_users()
        self._append("/etc/nix/nix.conf", "build-users-group = nixbld\n")
        # open to all, also where Debian's nix-setup-systemd is, which has a group for it
        self.run("install", "-d", "-m755", "/nix/var/nix/daemon-socket")
        bare = {"PATH": self.engine.path, **(env or {})}
        argv = ["env", "-i", *(f"{name}={value}" for name, value in bare.items())]
        with self.path("/var/log/nix-daemon.log").open("ab") as log:
            argv += ["nix-daemon", "--daemon"]  # as systemd does
            daemon = self.popen(*argv, stdout=log, stderr=log)
        poll(self._daemon_listens, f"nix-daemon on {self.name}")
        return daemon

    def _daemon_listens(self) -> bool:
        """Whether it does; its socket is there before, and after it was killed."""
        lines = Path(f"/proc/{self.pid}/net/unix").read_text().splitlines()
        listening = [line.split() for line in lines if " 00010000 " in line]
        return any(words[-1].endswith("/socket") for words in listening)

    def _add_build_users(self) -> None:
        names = [f"nixbld{n}" for n in range(1, BUILD_USERS + 1)]
        self._append("/etc/group", f"nixbld:x:30000:{','.join(names)}\n")
        for uid, name in enumerate(names, 30001):
            entry = f"{name}:*:{uid}:30000::/var/empty:/usr/sbin/nologin\n"
            self._append("/etc/passwd", entry)

    # network and life

    def link(self, up: bool) -> None:
        """Plug or pull the host's cable: packets are lost, and nobody is told."""
        state = "up" if up else "down"
        port = f"link set port{self.number} {state}\n"
        _ip(port, *_enter(self.lab.pid, "--net"))

    def swallow(self, on: bool) -> None:
        """Take in every packet and answer none, not even that nobody is there."""
        self.swallows = on
        verb = "add" if on else "del"
        nets = ("10.77.0.0/17", "10.77.128.0/17", "fd77::/65", "fd77::8000:0:0:0/65")
        routes = "".join(f"route {verb} blackhole {net}\n" for net in nets)
        _ip(routes, *_enter(self.pid, "--net"))

    def stop(self) -> None:
        """End the host; its peers see their connections close."""
        if self._init.poll() is None:  # its number may be another's otherwise
            os.kill(self.pid, signal.SIGKILL)
        self._init.communicate()
        self.lab.hosts.pop(self.name, None)

    def kill(self) -> None:
        """Cut the host's power; its peers see nothing at all."""
        self.link(False)
        self.stop()

    def _boot(self, nix_conf: str) -> None:
        """All that needs no other host: network, Nix's settings, a host key."""
        port = f"port{self.number}"
        _ip(
            f"link add {port} type veth peer name eth0 netns {self.pid}\n"
            f"link set {port} master farm up\n",
            *_enter(self.lab.pid, "--net"),
        )
        _ip(
            "link set lo up\n"
            f"addr add {self.address}/16 dev eth0\n"
            f"addr add {self.address6}/64 dev eth0 nodad\n"
            "link set eth0 up\n",
            *_enter(self.pid, "--net"),
        )
        self.write("/etc/nix/nix.conf", NIX_CONF + nix_conf)
        path = f"SetEnv PATH={self.engine.path}\n" if self.engine.path != PATH else ""
        self.write("/etc/ssh/sshd_config", SSHD_CONF + path)
        key = "/etc/ssh/ssh_host_ed25519_key"
        self.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


def _what_was_said(process: Inside) -> tuple[bytes, bytes]:
    """The output of a killed command; something it left may still hold the pipe."""
    try:
        out, err = process.communicate(timeout=2)
    except subprocess.TimeoutExpired as late:
        return late.stdout or b"", late.stderr or b""
    return out, err


def _cmdlines(proc: Path) -> Iterator[tuple[int, str]]:
    for entry in proc.iterdir():
        if entry.name.isdigit():
            # a process may end while it is looked at
            with contextlib.suppress(OSError):
                raw = (entry / "cmdline").read_bytes()
                yield int(entry.name), _text(raw).replace("\0", " ").strip()


# -- The lab --------------------------------------------------------------------------


@final
class Lab:
    """A bridge, and the hosts on it."""

    def __init__(self) -> None:
        self.hosts: dict[str, Host] = {}
        # None is used twice: the others still know the old host by its address.
        self._numbers = itertools.count(1)

    def __enter__(self) -> Lab:
        if reason := unavailable():
            raise FarmError(reason)
        self._init = _start_init([], LAB_INIT, stdin=subprocess.PIPE)
        self.pid = _only_child(self._init.pid)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the lab; when its init has ended, so has everything in it."""
        self._init.communicate()  # closes its stdin first
        for host in self.hosts.values():
            host._init.communicate()

    def host(
        self, name: str, engine: Engine, *, sshd: bool = True, nix_conf: str = ""
    ) -> Host:
        """Bring up a host that all others know by `name`, and by `name`6 for IPv6."""
        if name in self.hosts:
            raise FarmError(f"there is a host {name} already")
        host = Host(self, name, engine, next(self._numbers))
        host._boot(nix_conf)
        self.hosts[name] = host
        self._introduce()
        if sshd:
            host.start_sshd()
        return host

    def _introduce(self) -> None:
        known = "127.0.0.1 localhost\n::1 localhost\n" + "".join(
            f"{host.address} {host.name}\n{host.address6} {host.name}6\n"
            for host in self.hosts.values()
        )
        for host in self.hosts.values():
            host.write("/etc/hosts", known)


# -- ssh between hosts ----------------------------------------------------------------


def keypair(host: Host, user: str = "root") -> str:
    """Make the user's ~/.ssh/id_ed25519, and return the public half."""
    key = f"{host.user(user).home}/.ssh/id_ed25519"
    host.run("mkdir", "-p", "-m", "700", os.path.dirname(key), user=user)
    if not host.path(key).exists():
        host.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key, user=user)
    return host.read(f"{key}.pub").strip()


def trust(client: Host, builder: Host, user: str = "root") -> None:
    """Put the builder's host key into the user's known_hosts."""
    names = f"{builder.name},{builder.name}6,{builder.address},{builder.address6}"
    client._ssh_file(user, "known_hosts", f"{names} {builder.host_key}")


def connect(client: Host, builder: Host, user: str = "root") -> None:
    """Let root on the client, with a key of its own, log in as `user` on the builder."""
    builder.authorize(keypair(client), user)
    trust(client, builder)
