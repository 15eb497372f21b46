#!/bin/sh
# For sh, these lines start Python in a way that keeps the compiled program beside this
# file: else it would be compiled at every start, which takes 10 ms and 5 MB.  (Not
# where others may put files, or could when they were made, nor in a Nix store, where all
# is of 1970.)  They also find Python where a daemon's PATH does not.  For Python, they
# are a string.
''':'
PATH=${PATH:+$PATH:}/run/current-system/sw/bin:/nix/var/nix/profiles/default/bin
PATH=$PATH:/usr/local/bin:/usr/bin:/bin:/opt/homebrew/bin exec python3 -IS -c '
import os, sys
from _frozen_importlib_external import SourceFileLoader
del sys.argv[0]
__file__ = sys.argv[0]
source = os.path.realpath(__file__)
loader = SourceFileLoader(__name__, source)
folder = os.path.dirname(source)
cache = folder + "/__pycache__"
writable = os.stat(folder).st_mode & 0o1002
if os.path.lexists(cache):
    info = os.lstat(cache)
    writable |= info.st_mode & 0o1022
    writable |= info.st_uid not in (0, os.stat(source).st_uid)
if writable or os.stat(source).st_mtime < 2:
    text = loader.get_data(source)
    if sys.argv[-1].isdigit():
        text = text.rpartition(b"# ==== For people")[0]
    exec(compile(text, source, "exec"))
else:
    mask = os.umask(0o022)
    code = loader.get_code(__name__)
    os.umask(mask)
    exec(code)
' "$0" "$@"
''' """
nix_build_remote.py - a build hook for Nix: sends builds to other machines over ssh.

Nix starts this program, not you: as build-hook (Nix 2.x) or NIX_BUILD_HOOK (Nix 1.x).
It reads from Nix which derivation is to be built, picks a machine of the right system
that has a free slot, copies the missing inputs there with nix-copy-closure, builds over
ssh, relays the log and brings the outputs back.

Install, for any Nix 2.x, in /etc/nix/nix.conf, or for 2.25 to 2.33, which forget it
there, in /root/.config/nix/nix.conf:

    build-hook = /usr/local/lib/nix_build_remote.py

For Nix 1.x, in the environment of nix-build or nix-daemon:

    NIX_BUILD_HOOK=/usr/local/lib/nix_build_remote.py
    NIX_REMOTE_SYSTEMS=/etc/nix/machines

Up to Nix 2.9 it may instead stand at PREFIX/libexec/nix/build-remote.  In 2.x that is a
link to nix itself: remove the link first, never write through it.

Machines stand in /etc/nix/machines (or nix.conf's `builders`), one a line; fields after
the host may be missing or `-`:

    host systems sshKey maxJobs speedFactor supportedFeatures mandatoryFeatures hostKey

    host               name, user@name, ssh alias, or ssh://[user@]host[:port] (ssh-ng
                       too) with the parameters ssh-key, compress and
                       base64-ssh-public-host-key
    systems            comma-separated: i686-linux,x86_64-linux (default: this one's)
    sshKey             private key without a passphrase (default: those ssh would try)
    maxJobs            builds at once on the machine: its slots (default: 1)
    speedFactor        relative speed: faster machines get more builds (default: 1)
    supportedFeatures  comma-separated; covers a derivation's requiredSystemFeatures
    mandatoryFeatures  comma-separated; builds that do not require all of them stay away
    hostKey            base64 of the host's public key; no other key is then believed

    # starts a comment; `;` separates machines like a new line; @FILE includes a file.

Environment:
    NIX_REMOTE_SYSTEMS  the machines file of Nix 1.x; must be absolute
    NIX_CURRENT_LOAD    the directory of slot files (default: Nix's own current-load)
    NIX_SSHOPTS         more options for ssh
    NIX_DEBUG_HOOK      if set, say how each machine was judged
    NIX_STORE_DIR, NIX_STATE_DIR, NIX_REMOTE  as Nix itself reads them

Exit status:
    0    all outputs are in the local store, or there was nothing to do
    100  the build itself failed: building again would not help
    101  the build took, or was silent for, longer than Nix allows
    1    the hook failed

Command line, for people:
    nix_build_remote.py check [MACHINE...]    try the machines, say what is wrong
    nix_build_remote.py status [--watch]      what is built where, and who waits
    nix_build_remote.py explain [DERIVATION]  where it would go, and why not elsewhere
    nix_build_remote.py --help | --version
    They take --json, and --machines FILE.
"""

from __future__ import annotations

# One process for each build: what re, typing, contextlib and enum would bring is not
# worth the 12 ms that importing them takes, more than half of the whole start.
import errno
import fcntl
import math
import os
import select
import stat
import struct
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    import signal
    from argparse import Namespace
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, NamedTuple

    Read = Callable[[int], bytes]  # exactly so many bytes, or an exception
else:
    import _signal as signal

    class NamedTuple(tuple):
        """typing's, as far as it is used here."""

        def __init_subclass__(cls):
            fields = cls.fields = tuple(cls.__annotations__)
            cls.defaults = {n: vars(cls)[n] for n in fields if n in vars(cls)}
            for number, name in enumerate(fields):
                setattr(cls, name, property(lambda self, number=number: self[number]))

        def __new__(cls, *values, **named):
            if len(values) != len(cls.fields):
                given = {**cls.defaults, **dict(zip(cls.fields, values)), **named}
                if len(given) != len(cls.fields) or len(values) > len(cls.fields):
                    raise TypeError(cls)
                values = [given[name] for name in cls.fields]
            return tuple.__new__(cls, values)


VERSION = "0.1"
START = time.monotonic()

CONNECT_TIMEOUT_S = 10  # ssh's own, for the TCP connection and the key exchange
LOGIN_TIMEOUT_S = 90  # connecting and logging in, where nobody waits for a reply
GREETING_TIMEOUT_S = 30  # starting nix-store on the builder, and its first answer
REPLY_S = 5  # all of that where Nix waits for our reply, and does nothing else
ALIVE_INTERVAL_S = 10  # a silent link is noticed after ALIVE_COUNT_MAX probes of these
ALIVE_COUNT_MAX = 3
RETIRE_S = 2  # for a connection's master to take a call, or to hear that it gets no more
IDLE_S = 120  # then a shared connection that nobody uses ends by itself
SEATS = 8  # hooks on one: sshd allows it 10 sessions, and a hook has one
CONNECTIONS = 16  # to one machine
SOCKET_LIMIT_BYTES = 86  # of a control socket's name: Linux 90, macOS 86
WARM_AT_ONCE = 6  # connections begun at the same time
UNKNOWN_FAILURES = 3  # in a row, for a reason we don't know, may pass by themselves
LOSSES = 5  # of a session with a builder, before a build is given up
PAUSE_S = 1  # a machine that has failed is left alone for that,
PAUSE_LIMIT_S = 60  # and for longer each time it fails again
PROBE_S = LOGIN_TIMEOUT_S + GREETING_TIMEOUT_S  # to find out if it is of use again
AWAY_TIMEOUT_S = 15 * 60  # wait that long for one of the machines to come back
WAIT_S = 0.02  # between two looks for a free slot
LINE = 64  # hooks that wait for one set of machines
PATIENCE_S, IMPATIENCE_S = 1.0, 4.0  # wait that long for a slot; then not for so long
SENDERS = 4  # of different things to one machine at the same time
UPLOAD_LOCK_TIMEOUT_S = 15 * 60  # as the stock hook: then go on without it
LOCK_POLL_S = 0.05
ANSWER_TIMEOUT_S = 15 * 60  # for a builder to say what it has, or take our question
SUBSTITUTE_TIMEOUT_S = 4 * 60 * 60  # the same if it may download what it has not
COPY_TIMEOUT_S = 30 * 60  # in which not a byte is copied
OWN_SSH_COPY_TIMEOUT_S = 12 * 60 * 60  # where we cannot see that: nothing is said
MARGIN_S = 60  # a builder has to enforce Nix's limits itself; later than that we do it
DRAIN_TIMEOUT_S = 10  # for Nix to read the end of the log, without any progress
QUIET_S = 2  # after a build: no more of its log will come
COPY_BATCH_BYTES = 100_000  # of store paths on a command line; in a variable Linux
# takes 128 KiB at most (MAX_ARG_STRLEN)
WIRE_LIMIT_BYTES = 64 << 20  # the longest string or list anybody may send us
LOCK_LIMIT_BYTES = 8 << 20  # of what a lock's file says
MAIN_LOCK_TIMEOUT_S = 10  # it is held for milliseconds, unless somebody means harm
OUTAGE_LIMIT = 1000  # characters of what is remembered of a failure
TAIL_BYTES = 4096  # of ssh's stderr, kept to explain why a connection ended
NAME_LIMIT_BYTES = 200  # of a slot file's name without its number
SAID_LIMIT = 1000  # messages remembered as said
DESCRIPTORS = 4096  # more than that, and old programs take seconds to close them all
COMPLAINTS = 20  # about the machines file, at once

SERVE_HELLO, SERVE_REPLY = 0x390C9DEB, 0x5452EECB
SERVE_VERSION = 0x207  # offered less than 2.6, servers of 2.4 to 2.10 answer as 2.6
QUERY_VALID_PATHS, QUERY_PATH_INFOS, DUMP_STORE_PATH = 1, 2, 3
BUILD_PATHS, QUERY_CLOSURE, BUILD_DERIVATION, ADD_TO_STORE_NAR = 6, 7, 8, 9
EXPORT_MAGIC = 0x4558494E  # after each archive in what nix-store --import reads
BUILT = {0, 1, 2, 13}  # built, substituted, already valid, resolves to already valid
PERMANENT, TRANSIENT, TIMED_OUT, MISC = 3, 6, 8, 9

FIONREAD = 0x541B if sys.platform == "linux" else 0x4004667F

DIGITS = "0123456789"
HEX = DIGITS + "abcdefABCDEF"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
WORD = DIGITS + LETTERS + "_"
STORE_DIGITS = "0123456789abcdfghijklmnpqrsvwxyz"  # of Nix's base 32
# What sh (Nix 1.x), splitting at white space (2.0 to 2.25) and shell-like splitting
# (2.26+) of NIX_SSHOPTS all read as it stands.
PLAIN = WORD + "@%+=:,./~-"


# ---- Errors -------------------------------------------------------------------------


class Error(Exception):
    """Expected; shown as its one line, without a traceback."""

    status = 1  # our exit status


class BadMachine(Error):
    """One machine's line cannot be used: `file:line: reason`."""


class Unreachable(Error):
    """No session with the builder; another machine may do."""


class Away(Unreachable):
    """It has just failed for somebody else."""


class SessionLost(Error):
    """The session with the builder ended before it had answered."""


class Late(SessionLost):
    """It says nothing for too long."""


class Nonsense(SessionLost):
    """Bytes that are not what the protocol says, or too many."""


class BuildBroken(Error):
    """The build could not be done, for a reason that may not be its own."""


class NotHere(Error):
    """The same, if another machine may do; verdict: what to say if none does."""

    def __init__(self, words: str, verdict: Error) -> None:
        super().__init__(words)
        self.verdict = verdict


class Spoilt(Error):
    """What the builder has made, or says of it, is not to be let in here."""


class BuildFailed(Error):
    """The derivation's own builder failed; building it again would not help."""

    status = 100


class BuildTimedOut(Error):
    """The build exceeded Nix's timeout or max-silent-time."""

    status = 101


class Stop(Exception):
    """Nobody waits for the build any more: clean up and go."""

    status = 1


class NixGone(Stop):
    """Nobody reads our messages: the Nix that started us has ended."""


class Terminated(Stop):
    """A signal asked us to end."""

    def __init__(self, number: int) -> None:
        self.status = 128 + number


class suppress:
    """Go on after the block if one of these errors ends it."""

    def __init__(self, *errors: type[Exception]) -> None:
        self.errors = errors

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> bool:
        return kind is not None and issubclass(kind, self.errors)


# What ssh and Nix say when something is wrong, and what to do about it.  The first that
# fits counts: an ssh that is refused may add that the connection was closed.
STAYS = """\
daemon-socket/socket: Permission = as root there, on Debian: usermod -aG nix-users USER
daemon-socket/socket': Permission = as root there, on Debian: usermod -aG nix-users USER
HAS CHANGED = if HOST was set up anew: ssh-keygen -R HOST, then log in once
Host key verification failed = log in once from here, to confirm the host key
its host key is not = correct that field if the machine has a new key
bad permissions = chmod 600 the key file
Permission denied ( = can you log in from here with that key and no passphrase?
command not found = link nix-store into a directory like /usr/bin there
nix-store: not found = link nix-store into a directory like /usr/bin there
this very machine = take its line out of the machines file here
signature = sign it, or make the user trusted where it was refused
"""
PASSES = """\
daemon-socket = as root there: systemctl start nix-daemon.socket
Connection refused = is sshd running there, on that port?
timed out = is the machine on, and can it be reached from here?
No route to host = is the machine on, and can it be reached from here?
is down = is the machine on, and can it be reached from here?
resolve hostname = is the name right, in the machines file and in DNS?
disk is full = make room there, with nix-collect-garbage
No space left on device = make room there, with nix-collect-garbage
not responding =
Broken pipe =
onnection reset =
onnection closed =
closed by =
unreachable =
shutting down =
connection was lost =
session ended =
does not answer =
no answer =
no connection within =
"""


def trouble(words: str) -> tuple[bool | None, str]:
    """Whether it may pass by itself (None: unknown), and what to do about it."""
    for table, passes in ((STAYS, False), (PASSES, True)):
        for line in table.splitlines():
            sign, _, remedy = line.partition(" =")
            if sign in words:
                return passes, remedy.strip()
    return None, ""


def remedy_of(words: str, destination: str) -> str:
    """For the machine that is reached as [user@]host."""
    user, _, host = destination.rpartition("@")
    _, remedy = trouble(words)
    return remedy.replace("HOST", host).replace("USER", user or "USER")


def with_remedy(words: str, destination: str) -> str:
    remedy = remedy_of(words, destination)
    return f"{words} ({remedy})" if remedy else words


# ---- The wire: Nix's integers and strings -------------------------------------------


def integer(number: int) -> bytes:
    return struct.pack("<Q", number)


def encode(text: str) -> bytes:
    """Nix's strings are bytes; here they are text that can hold any of them."""
    return text.encode("utf-8", "surrogateescape")


def decode(data: bytes) -> str:
    """Words for people."""
    return data.decode("utf-8", "replace")


def string(text: str) -> bytes:
    data = encode(text)
    return integer(len(data)) + data + bytes(-len(data) % 8)


def strings(texts: Iterable[str]) -> bytes:
    encoded = [string(text) for text in texts]
    return integer(len(encoded)) + b"".join(encoded)


def read_integer(read: Read) -> int:
    return int(struct.unpack("<Q", read(8))[0])


def read_string(read: Read) -> str:
    length = read_integer(read)
    if length > WIRE_LIMIT_BYTES:
        raise Nonsense(f"a string of {length} bytes was announced: that cannot be")
    padded = read(length + -length % 8)
    if any(padded[length:]):
        raise Nonsense("the padding of a string is not zero")
    return padded[:length].decode("utf-8", "surrogateescape")


def read_strings(read: Read) -> list[str]:
    """A list or set; its count is believed only as far as strings arrive."""
    result: list[str] = []
    size = 0
    for _ in range(min(read_integer(read), sys.maxsize)):
        result.append(read_string(read))
        size += 64 + len(result[-1])
        if size > WIRE_LIMIT_BYTES:
            raise Nonsense("a list of strings has no end")
    return result


class PathInfo(NamedTuple):
    """What a builder says of a path in its store, as nix-store answers it."""

    path: str
    deriver: str
    references: tuple[str, ...]
    size: int  # of its archive (NAR), in bytes
    hash: str = ""  # of that, such as sha256:0mdq...; told from protocol 2.4 on, as are
    rest: bytes = b""  # its content address and its signatures, as they came

    def encode(self) -> bytes:
        head = string(self.path) + string(self.deriver) + strings(self.references)
        tail = string(self.hash) + self.rest if self.rest else b""
        return head + 2 * integer(self.size) + tail  # download size, size


def read_infos(read: Read, version: int) -> dict[str, PathInfo]:
    """The answer to QueryPathInfos in that version of the protocol."""
    infos: dict[str, PathInfo] = {}
    while path := read_string(read):
        deriver, references = read_string(read), tuple(read_strings(read))
        read_integer(read)
        size, digest, rest = read_integer(read), "", b""
        if version >= 0x204:
            digest = read_string(read)
            rest = string(read_string(read)) + strings(read_strings(read))
        infos[path] = PathInfo(path, deriver, references, size, digest, rest)
        if len(infos) * 64 > WIRE_LIMIT_BYTES:
            raise Nonsense("a list of paths has no end")
    return infos


# ---- The Nix that called us ---------------------------------------------------------


def only(text: str, characters: str) -> bool:
    """Whether there are no others in it."""
    return not text.strip(characters)


def is_store_name(text: str) -> bool:
    """The last part of a store path, as every Nix makes them."""
    digest, dash, name = text[:32], text[32:33], text[33:]
    return (
        (len(digest), dash) == (32, "-")
        and only(digest, STORE_DIGITS)
        and 0 < len(name) <= 211
        and only(name, WORD + "+-.?=")
    )


class Store(NamedTuple):
    """Where the local store is.

    directory: as store paths name it; real: as the file system has it (they differ for
    a chroot store); state: Nix's state directory; remote: what NIX_REMOTE must be for a
    program of the same Nix to open this store, "" if nothing special.
    """

    directory: str
    real: str
    state: str
    remote: str

    @classmethod
    def parse(cls, uri: str, environ: dict[str, str]) -> Store:
        """Understand the setting `store`: auto, local?root=R, local://?root=R, /R."""
        default = environ.get("NIX_STORE_DIR") or environ.get("NIX_STORE")
        base, parameters = split_parameters(uri)
        path = base
        if base.startswith("local://"):
            path = unquote(base[len("local://") :])
        root = parameters.get("root", path if path.startswith("/") else "").rstrip("/")
        directory = parameters.get("store") or (default or "/nix/store").rstrip("/")
        state = environ.get("NIX_STATE_DIR") or "/nix/var/nix"
        return cls(
            directory=directory,
            real=parameters.get("real", f"{root}/nix/store" if root else directory),
            state=parameters.get("state", f"{root}/nix/var/nix" if root else state),
            remote="" if uri == "auto" else uri,
        )

    def name(self, path: str) -> str:
        """The last part of a store path; Error if it is not one of this store."""
        name = path[len(self.directory) + 1 :]
        if path != f"{self.directory}/{name}" or not is_store_name(name):
            raise Error(f"{path!r} is not a store path in {self.directory}")
        return name

    def owns(self, path: str) -> bool:
        """Whether that is what a path in it looks like."""
        with suppress(Error):
            return bool(self.name(path))
        return False

    def file(self, path: str) -> str:
        return f"{self.real}/{self.name(path)}"


class Nix(NamedTuple):
    """What the calling Nix told us when it started us.

    old: Nix 1.x, whose arguments are turned into the settings they stand for.
    verbosity: in its own levels, see Talk; trace: old build traces are wanted.
    """

    old: bool
    settings: dict[str, str]
    environ: dict[str, str]
    verbosity: int = 0
    trace: bool = False

    def words(self, setting: str) -> list[str]:
        return self.settings.get(setting, "").split()

    def number(self, setting: str) -> int:
        text = self.settings.get(setting, "")
        return min(int(text[:20]), (1 << 64) - 1) if text.isdecimal() else 0

    def enabled(self, setting: str) -> bool:
        return self.settings.get(setting) == "true"

    @property
    def since_2_4(self) -> bool:
        return "experimental-features" in self.settings

    @property
    def store(self) -> Store:
        default = self.environ.get("NIX_REMOTE", "") if self.old else ""
        return Store.parse(self.settings.get("store", default) or "auto", self.environ)

    @property
    def slot_directory(self) -> str:
        parent = "/run/nix" if self.old else self.store.state
        return self.environ.get("NIX_CURRENT_LOAD") or f"{parent}/current-load"


class Request(NamedTuple):
    """One question of Nix: may this derivation be built elsewhere?"""

    willing: bool  # a local slot is free
    system: str
    derivation: str
    features: frozenset[str]


def might_build_itself(nix: Nix, request: Request) -> bool:
    """Whether the calling Nix could build this, perhaps later."""
    if nix.old:  # it says neither how many jobs it may run nor what features it has
        return request.system == nix.settings["system"]
    systems = [*nix.words("system"), *nix.words("extra-platforms"), "builtin"]
    # Some experimental features are system features too, which it does not tell us.
    features = nix.words("system-features") + nix.words("experimental-features")
    return (
        nix.settings.get("max-jobs") != "0"
        and request.system in systems
        and request.features.issubset(features)
    )


# ---- Machines -----------------------------------------------------------------------


def unquote(text: str) -> str:
    """Percent-decoding, here because urllib costs each start 10 ms."""
    data, *parts = encode(text).split(b"%")
    for part in parts:
        is_code = len(part) > 1 and only(decode(part[:2]), HEX)
        data += bytes([int(part[:2], 16)]) + part[2:] if is_code else b"%" + part
    return data.decode("utf-8", "surrogateescape")


def quote(text: str) -> str:
    """Percent-encoding as Nix 2.24 and newer render the parameters of a store URI."""
    kept = encode(WORD + "-.~!$'()*,;:@/?")
    return "".join(chr(b) if b in kept else f"%{b:02X}" for b in encode(text))


def split_parameters(uri: str) -> tuple[str, dict[str, str]]:
    base, _, query = uri.partition("?")
    pairs = [item.partition("=") for item in query.split("&") if item]
    return base, {name: unquote(value) for name, _, value in pairs}


class Machine(NamedTuple):
    """A builder, as one line of the machines file describes it."""

    where: str  # file:line
    uri: str  # as it was written
    destination: str  # [user@]host
    port: int  # 0: what ssh finds in its configuration
    systems: tuple[str, ...]
    key: str  # private key file, or ""
    max_jobs: int
    speed: float
    supported: frozenset[str]
    mandatory: frozenset[str]
    host_key: str  # a line such as "ssh-ed25519 AAAA...", or ""
    compress: bool

    @classmethod
    def parse(cls, where: str, text: str, system: str) -> Machine:
        """One entry; system is what a missing list of systems means.

        Raises BadMachine with `file:line: reason`.
        """
        given = ["" if field == "-" else field for field in text.split()] + [""] * 8
        try:
            destination, port, parameters = parse_uri(given[0])
            if not "".join(given).isprintable():
                raise ValueError(f"{text!r} has characters that cannot be printed")
            return cls(
                where, given[0], destination, port,
                systems=tuple(filter(None, given[1].split(","))) or (system,),
                key=parse_key(given[2] or parameters.get("ssh-key", "")),
                max_jobs=parse_whole("maxJobs", given[3]),
                speed=parse_speed(given[4]),
                supported=frozenset(filter(None, given[5].split(","))),
                mandatory=frozenset(filter(None, given[6].split(","))),
                host_key=parse_host_key(
                    given[7] or parameters.get("base64-ssh-public-host-key", "")
                ),
                compress=parameters.get("compress") in ("true", "yes", "1"),
            )  # fmt: skip
        except ValueError as error:
            raise BadMachine(f"{where}: {error}") from None

    @property
    def host(self) -> str:
        return self.destination.rpartition("@")[2]

    def name(self, nix: Nix) -> str:
        """What Nix's own hook calls this machine, in messages and in file names."""
        if nix.old:
            return self.uri
        uri = self.uri if "://" in self.uri else f"ssh://{self.uri}"
        base, parameters = split_parameters(uri)
        # 2.24 and newer (which brought this setting) parse and render it anew.
        if parameters and "nix-shell-always-looks-for-shell-nix" in nix.settings:
            pairs = (f"{quote(k)}={quote(v)}" for k, v in sorted(parameters.items()))
            return f"{base}?{'&'.join(pairs)}"
        return uri

    def slot_name(self, nix: Nix) -> str:
        """The stock hook's name of the slot files, without the number."""
        prefix = "+".join(self.systems) + "-" if nix.old else ""
        return file_name(prefix + self.name(nix))


def file_name(text: str) -> str:
    """The stock hook's way to make one; too long a name ends in its hash."""
    name = text.replace("/", "_")
    if len(encode(name)) <= NAME_LIMIT_BYTES:
        return name
    import hashlib

    return f"{name[:50]}-{hashlib.sha256(encode(text)).hexdigest()[:32]}"


def parse_uri(uri: str) -> tuple[str, int, dict[str, str]]:
    """[user@]host, port and parameters; ValueError says what is wrong."""
    base, parameters = split_parameters(uri)
    scheme, separator, authority = base.rpartition("://")
    if scheme not in ("ssh", "ssh-ng") and (separator or "/" in base):
        raise ValueError(f"{uri!r} is not reached by ssh; use ssh://[user@]host[:port]")
    user, at, rest = authority.removesuffix("/" if separator else "").rpartition("@")
    if at and not is_name(user, "+-."):
        raise ValueError(f"{user!r} is not a user name")
    host, port = parse_host(rest)
    if not separator and host in ("auto", "daemon", "local"):
        raise ValueError(f"{uri!r} is a store of this machine, not another machine")
    if host == "localhost" and not user and not port:
        raise ValueError("'localhost' is this machine: nix-copy-closure would not use "
                         "ssh, and builds would wait for themselves")  # fmt: skip
    check_parameters(parameters)
    return user + at + host, port, parameters


def parse_host(text: str) -> tuple[str, int]:
    """host, host:port, IPv6 with or without brackets, [IPv6]:port."""
    host, port = text, ""
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        if not bracket or port == ":" or port[:1] not in ("", ":"):
            host = ""
        port = port[1:]
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
        host = host if port else ""
    host = host.replace("%25", "%")
    if not only(port, DIGITS):
        host = ""
    if not is_name(host, "+-.") and not is_address(host):
        raise ValueError(f"{host or text!r} is not a host name")
    if len(port) > 5 or int(port or 0) > 65535:
        raise ValueError(f"there is no port {port}")
    return host, int(port or 0)


def is_address(text: str) -> bool:
    """Of IPv6, perhaps with a zone."""
    address, percent, zone = text.partition("%")
    right = address.count(":") > 1 and only(address, HEX + ":.")
    return right and (not percent or is_name(zone, "-."))


def is_name(text: str, marks: str) -> bool:
    return text != "" and only(text[0], WORD) and only(text, WORD + marks)


def check_parameters(parameters: dict[str, str]) -> None:
    known = ("ssh-key", "compress", "base64-ssh-public-host-key", "max-connections",
             "path-info-cache-size", "priority", "want-mass-query", "system-features",
             "trusted")  # fmt: skip
    for name in parameters:
        if name not in known:
            raise ValueError(f"this hook does not support the parameter {name!r}; "
                             "without it, it would use the machine")  # fmt: skip


def parse_key(text: str) -> str:
    if not only(text, PLAIN) or text.startswith("-"):
        raise ValueError(f"the key's name {text!r} has characters that cannot be "
                         "handed on to ssh; rename the file")  # fmt: skip
    return text


def parse_whole(name: str, text: str) -> int:
    if len(text) > 6 or not only(text, DIGITS):
        raise ValueError(f"{name} is {text!r}, not a whole number")
    return int(text or 1)


def parse_speed(text: str) -> float:
    """Any non-negative decimal, as from 2.20 on (before: whole); 0 counts as 1."""
    whole, _, fraction = text.partition(".")
    digits = whole + fraction
    short = len(whole) <= 9 and len(fraction) <= 9
    if not short or not only(digits, DIGITS) or (text and not digits):
        raise ValueError(f"speedFactor is {text!r}, not a number of 0 or more")
    return float(text or 1) or 1.0


def parse_host_key(text: str) -> str:
    if not text:
        return ""
    import binascii
    import re

    try:
        line = binascii.a2b_base64(text.encode()).decode("ascii").strip()
    except ValueError:
        line = ""
    if not re.fullmatch(r"[a-z0-9@.-]+ [A-Za-z0-9+/=]+( [ -~]*)?", line):
        raise ValueError("the host key is not base64 of 'ssh-ed25519 AAAA...' (make it "
                         "with: base64 -w0 ssh_host_ed25519_key.pub)")  # fmt: skip
    return line


def slips(machine: Machine, text: str) -> Iterator[str]:
    """What is allowed but is hardly what was meant."""
    for system in machine.systems:
        words = system.split("-")
        right = all(word and only(word, WORD) for word in words)
        if len(words) < 2 or not right or system != system.lower():
            yield f"no system is called {system!r}; they look like x86_64-linux"
    if machine.key and machine.key[0] not in "/~%":
        yield f"the key {machine.key!r} is not an absolute file name"
    if len(text.split()) > 8:
        yield "only the first 8 fields mean anything"


Entry = tuple[str, str]  # file:line, text


def expand_builders(
    text: str, file: str, seen: tuple[str, ...] = ()
) -> Iterator[Entry]:
    """The entries of a `builders` setting or a machines file, includes in place."""
    entries = [
        (number, entry.strip())
        for number, line in enumerate(text.split("\n"), 1)
        for entry in line.partition("#")[0].split(";")
    ]
    for number, entry in entries:
        if entry.startswith("@"):
            yield from include(f"{file}:{number}", entry[1:].strip(), seen)
        elif entry:
            yield f"{file}:{number}", entry


def include(where: str, path: str, seen: tuple[str, ...]) -> Iterator[Entry]:
    """A missing file is no error and lists no machine, as in every Nix."""
    try:
        if not path.startswith("/"):
            raise ValueError("must be absolute")
        if path in seen:
            raise ValueError("includes itself")
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            text = file.read()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        # An entry that no machine can be read from carries the reason to where the
        # others are complained of.
        yield f"{where}: the machines file {path!r}: {reason}", ""
        return
    yield from expand_builders(text, path, (*seen, path))


def load_machines(nix: Nix) -> tuple[list[Machine], list[str]]:
    """The usable machines in the order written, and a complaint for each fault."""
    machines, complaints = [], []
    if nix.old:
        file = nix.environ.get("NIX_REMOTE_SYSTEMS") or "/etc/nix/machines"
        entries = include("NIX_REMOTE_SYSTEMS", file, ())
    else:
        entries = expand_builders(nix.settings.get("builders", ""), "builders")
    for where, text in entries:
        try:
            if not text:
                raise BadMachine(where)
            machine = Machine.parse(where, text, nix.settings.get("system", ""))
        except BadMachine as error:
            complaints.append(f"{error} (left out)")
        else:
            machines.append(machine)
            complaints += [f"{where}: {slip}" for slip in slips(machine, text)]
    return machines, complaints


# ---- Choosing -----------------------------------------------------------------------


def unfit(machine: Machine, request: Request, nix: Nix) -> str:
    """Why a machine can never do this build, or "" if it can."""
    anywhere = request.system == "builtin" and nix.since_2_4
    if request.system not in machine.systems and not anywhere:
        return f"builds {', '.join(machine.systems)}, not {request.system}"
    lacking = request.features - machine.supported - machine.mandatory
    if lacking:
        return f"lacks the feature{'s' * (len(lacking) > 1)} {', '.join(sorted(lacking))}"
    reserved = machine.mandatory - request.features
    if reserved:
        return f"is only for builds that require {', '.join(sorted(reserved))}"
    return "" if machine.max_jobs else "has maxJobs 0"


def rank(machine: Machine, load: int) -> tuple[int, float, int]:
    """Sorts machines, the best first.

    Load divided by speed factor, rounded to the nearest whole number, half down; then
    the higher speed factor; then the lower load.  That is the rule of Nix 1.x.  2.0 to
    2.19 truncate, and from 2.20 nothing is rounded, which sends a second build to an
    idle slow machine however much faster the first one is.
    """
    return math.ceil(load / machine.speed - 0.5), -machine.speed, load


# ---- Slots --------------------------------------------------------------------------


# What the system says of a directory, a link and a socket (Linux, macOS) in its place.
NO_FILE = (errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.EOPNOTSUPP)
LOCK_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def open_lock(path: str, directory: int | None = None) -> int:
    """Open it, and make it if need be; relative names are of that open directory.  What
    is no file but stands in its place is removed.  Raises Error."""
    try:
        try:  # to ask for a file to be made is dear even if it is there
            descriptor = os.open(path, LOCK_FLAGS, dir_fd=directory)
            # A slot's lock need be no file: there may be thousands to look at.
            if directory is not None or stat.S_ISREG(os.fstat(descriptor).st_mode):
                return descriptor
            os.close(descriptor)
            remove(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in NO_FILE:
                raise
            remove(path, directory)
        return os.open(path, LOCK_FLAGS | os.O_CREAT, 0o600, dir_fd=directory)
    except OSError as error:
        raise Error(f"cannot open {path}: {error.strerror}") from None


def remove(path: str, directory: int | None = None) -> None:
    """Whatever it is, out of the way; OSError if that cannot be."""
    try:
        os.unlink(path, dir_fd=directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EPERM):  # macOS says the latter
            raise
        aside = f"{path}.junk-{os.urandom(4).hex()}"
        os.rename(path, aside, src_dir_fd=directory, dst_dir_fd=directory)


def try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Whether we have the lock now; asking for a shared one disturbs no other asker."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_into(descriptor: int, text: str) -> None:
    """All that the file says from now on, unless the disk is full: that must not cost
    a build."""
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, encode(text), 0)


def read_lock(descriptor: int) -> str:
    """What a lock's file says; nothing if it is no file."""
    try:
        data = os.pread(descriptor, LOCK_LIMIT_BYTES, 0)
    except OSError:
        data = b""
    return data.decode("utf-8", "surrogateescape")


def start_time(process: int) -> str:
    """When it started, in kernel ticks: tells it from a later namesake."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return decode(file.read().rpartition(b")")[2].split()[19])
    except OSError:
        return "-"


OURSELVES: list[str] = []  # once it is known


def holder(phase: str, derivation: str, since: float) -> str:
    """What a lock's file says of who holds it, for `status`: pid, its start time,
    seconds since 1970, phase, derivation."""
    if not OURSELVES:
        OURSELVES.append(f"{os.getpid()} {start_time(os.getpid())}")
    return f"{OURSELVES[0]} {since:.0f} {phase} {derivation}\n"


class Slot:
    """A machine's slot, ours for as long as its file is locked.

    The kernel frees it when we die, however we die.  The build's ssh cannot hold it too
    (it closes what it inherits), but it ends, and with it the remote build, as soon as
    nobody is at the other end of its pipes.  While we hold the lock, the file says who
    we are; the lock alone decides.
    """

    def __init__(self, machine: Machine, descriptor: int) -> None:
        self.machine, self.descriptor = machine, descriptor
        self.outage: Outage | None = None  # of the machine, as it was when we took it

    def note(self, phase: str, derivation: str) -> None:
        write_into(self.descriptor, holder(phase, derivation, time.time()))

    def free(self) -> None:
        """Let go; only once, since then it may be another's."""
        if self.descriptor >= 0:
            with suppress(OSError):
                os.ftruncate(self.descriptor, 0)
            os.close(self.descriptor)
            self.descriptor = -1


class Outage(NamedTuple):
    """A machine that failed, as all hooks remember it until it is of use again.

    failures: in a row; since: when the first was, until: leave the machine alone, both
    in seconds since 1970; words: what ssh said.
    """

    failures: int = 0
    since: float = 0.0
    until: float = 0.0
    words: str = ""

    @classmethod
    def parse(cls, text: str) -> Outage | None:
        try:
            failures, since, until, words = text.split(" ", 3)
            found = cls(int(failures[:9]), float(since), float(until), words)
        except ValueError:
            return None
        return found if math.isfinite(found.since + found.until) else None

    def text(self) -> str:
        return f"{self.failures} {self.since:.3f} {self.until:.3f} {self.words}"

    @property
    def old(self) -> bool:
        """Whether nobody has tried for so long that it says nothing any more (or the
        clock was set).  That counts from when a try must have ended."""
        age = time.time() - self.until
        return not -PAUSE_LIMIT_S <= age <= PAUSE_LIMIT_S + PROBE_S

    @property
    def hopeless(self) -> bool:
        """Whether it is no use to wait: that is known, or it has failed too often."""
        passes, _ = trouble(self.words)
        return passes is False or (
            passes is None and self.failures > UNKNOWN_FAILURES
        )

    def again(self, words: str) -> Outage:
        """After one more failure."""
        # The delay doubles with each failure, and is not the same for all.
        delay = min(PAUSE_S * 2 ** min(self.failures + 1, 9), PAUSE_LIMIT_S)
        until = round(time.time() + delay * (0.5 + os.urandom(1)[0] / 512), 3)
        since = self.since or round(time.time(), 3)
        return Outage(self.failures + 1, since, until, words[:OUTAGE_LIMIT])


class MainLock:
    """Held while choosing, which takes milliseconds, and the kernel frees it with a dead
    holder.  Whoever holds it for long means harm or stands still, and we go on without
    it: what it keeps apart then costs a message said twice, or a slot not seen as free.
    """

    stuck = False  # it was once, for this process
    tell: Callable[[str], None] | None = None  # how to complain of that

    def __init__(self, path: str) -> None:
        self.path, self.descriptor = path, open_lock(path)
        if os.fstat(self.descriptor).st_mode & 0o077:  # others could open, and hold it
            with suppress(OSError):
                os.fchmod(self.descriptor, 0o600)

    def __enter__(self) -> int:
        if MainLock.stuck:
            try_lock(self.descriptor)
        elif not is_locked_within(self.descriptor, MAIN_LOCK_TIMEOUT_S):
            MainLock.stuck = True
            if MainLock.tell:
                MainLock.tell(f"somebody has held {self.path} for {MAIN_LOCK_TIMEOUT_S} s "
                              "(fuser says who); going on without it")  # fmt: skip
        return self.descriptor

    def __exit__(self, *error: object) -> None:
        os.close(self.descriptor)


class Bell:
    """Raises Late in the middle of what takes longer, such as waiting for a lock."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        self.before = signal.signal(signal.SIGALRM, self.ring)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *error: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)

    def ring(self, number: int, frame: object) -> None:
        raise Late("no end within the time for it")


def is_locked_within(descriptor: int, seconds: float) -> bool:
    """Whether we got that lock in time."""
    if try_lock(descriptor):
        return True
    try:
        with Bell(seconds):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except Late:
        return False
    return True


class SlotDirectory(NamedTuple):
    """Nix's directory current-load, with the locks that count, and in it one for those
    that the stock hook does not know."""

    path: str

    @classmethod
    def find(cls, nix: Nix) -> SlotDirectory:
        """The one that Nix names, unless others could change what is in it."""
        wanted = nix.slot_directory
        return cls(wanted if is_private(wanted) else spare_directory(wanted))

    @property
    def own(self) -> str:
        return f"{self.path}/own"

    def make(self) -> None:
        try:
            os.makedirs(self.path, 0o700, exist_ok=True)
        except OSError as error:
            raise Error(f"cannot make {self.path}: {error.strerror}") from None
        if not is_private(self.path):
            raise Error(f"somebody else has just made {self.path}")
        make_directory(self.own)

    def main_lock(self) -> MainLock:
        return MainLock(f"{self.path}/main-lock")

    def survey(
        self, machine: Machine, name: str, directory: int
    ) -> tuple[int, Slot | None]:
        """A machine's load (slots taken), and a free slot, now ours, if it has one."""
        load, free = 0, None
        for number in range(machine.max_jobs):
            try:
                descriptor = open_lock(f"{name}-{number}", directory)
            except Error:  # no room for its file
                if free:
                    break
                raise
            if not try_lock(descriptor):
                load += 1
            elif free is None:
                free = Slot(machine, descriptor)
                continue
            os.close(descriptor)
        return load, free

    def take(self, machines: dict[str, Machine]) -> tuple[Slot | None, dict[str, int]]:
        """The free slot of the best of these, which their slots' names lead to, or None
        if all slots are taken; and the load of each."""
        loads: dict[str, int] = {}
        best: Slot | None = None
        best_key = (0, 0.0, 0)
        failure: Error | None = None
        with self.main_lock():
            directory = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                for name, machine in machines.items():
                    try:
                        loads[name], slot = self.survey(machine, name, directory)
                    except Error as error:  # no room for a file: others may have theirs
                        failure = failure or error
                        continue
                    key = rank(machine, loads[name])
                    if slot and (best is None or key < best_key):  # or the first written
                        best, best_key, slot = slot, key, best
                    if slot:
                        os.close(slot.descriptor)
            except BaseException:
                if best:
                    os.close(best.descriptor)
                raise
            finally:
                os.close(directory)
        if failure and not loads:
            raise failure
        return best, loads

    def outage(self, name: str) -> Outage | None:
        """Of the machine whose slots have that name; what is old says nothing."""
        outage = Outage.parse(read_private(f"{self.own}/{name}.down") or "")
        return None if outage and outage.old else outage

    def note_outage(self, name: str, before: Outage | None, words: str) -> None:
        """Write it down, unless somebody else has since it was as before: builds that
        fail together are one failure."""
        with self.main_lock():
            if self.outage(name) in (before, None):
                after = (before or Outage()).again(words)
                with suppress(OSError):  # a full disk
                    path = f"{self.own}/{name}.down"
                    write_private(path, after.text(), lasting=False)

    def begin_probe(self, name: str, outage: Outage) -> int | None:
        """The lock of who finds out whether a machine is of use again, if nobody else
        does, or has just done so."""
        try:
            descriptor = open_lock(f"{self.own}/{name}.probe")
        except Error:  # no room for its file
            return None
        if try_lock(descriptor) and self.outage(name) == outage:
            return descriptor
        os.close(descriptor)
        return None

    def note_success(self, name: str) -> None:
        with suppress(OSError):
            remove(f"{self.own}/{name}.down")

    def fetching_place(self, machine: Machine, name: str) -> Slot | None:
        """A place to bring outputs home from; there are as many as slots."""
        with suppress(Error):  # no room for its file
            for number in range(machine.max_jobs):
                descriptor = open_lock(f"{self.own}/{name}.fetch-{number}")
                if try_lock(descriptor):
                    return Slot(machine, descriptor)
                os.close(descriptor)
        return None

    def first_time(self, text: str) -> bool:
        """Whether the Nix that started us has not been told this yet.

        Each build has a hook process of its own, so what was said is remembered in the
        main lock's file, with the process id of the Nix it was said to.
        """
        import zlib

        entry = f"{os.getppid()}-{zlib.crc32(encode(text)):08x}"
        with self.main_lock() as descriptor:
            said = read_lock(descriptor)[: 100 * SAID_LIMIT].split()
            if entry in said:
                return False
            write_into(descriptor, " ".join([*said[1 - SAID_LIMIT :], entry]))
        return True


class Line:
    """Where hooks wait for a slot on one of some machines: places, which are locks.

    Whoever has a place waits for the lock of the one before, and only the holder of
    the first looks for a free slot, so that waiting costs nothing and nobody is passed.
    A place's file says who stands there, and names the machines: lines of more machines
    leave those alone that somebody waits for in first place.  Machines that are away
    are waited for, unless the line is `impatient`.
    """

    def __init__(
        self,
        hook: Hook,
        machines: list[Machine],
        path: str,
        *,
        impatient: bool = False,
        since: float = 0,
    ) -> None:
        import zlib

        self.hook, self.slots, self.impatient = hook, hook.slots, impatient
        self.since = since or time.time()
        self.machines = {machine.slot_name(hook.nix): machine for machine in machines}
        self.all_away = self.looked = False
        self.text = "\n".join(sorted(self.machines))
        self.name = f"{self.slots.own}/line-{zlib.crc32(encode(self.text)):08x}"
        self.path = path
        self.size = min(LINE, sum(machine.max_jobs for machine in machines))
        self.number = self.descriptor = -1

    def take(self) -> Slot | None:
        """A free slot, if nobody should have it before the first of this line."""
        away = self.hook.away(self.machines, self.path)
        self.all_away = len(away) == len(self.machines)
        out = away | self.reserved()
        machines = {n: m for n, m in self.machines.items() if n not in out}
        slot, loads = self.slots.take(machines)
        if self.hook.talk.wants(DEBUG) and (slot or not self.looked):
            self.looked = True
            for name, machine in self.machines.items():
                why = "is away" if name in away else "is waited for by others"
                if name in loads:
                    why = (f"has {loads[name]} of {machine.max_jobs} slots taken, at "
                           f"speed {machine.speed:g}")  # fmt: skip
                self.hook.talk.say(DEBUG, f"'{machine.name(self.hook.nix)}' {why}")
        if slot:
            slot.outage = self.slots.outage(slot.machine.slot_name(self.hook.nix))
        return slot

    def reserved(self) -> set[str]:
        """The machines whose next free slot is for a line of fewer machines."""
        reserved: set[str] = set()
        for entry in os.listdir(self.slots.own):
            if entry.startswith("line-") and entry.endswith(".0"):
                names = self.waited_for(f"{self.slots.own}/{entry}")
                if len(names) < len(self.machines):
                    reserved.update(names)
        return reserved

    def waited_for(self, first_place: str) -> list[str]:
        """The slots' names of the machines that somebody in that line waits for; none
        if nobody does, "" if they are not written down yet."""
        descriptor = open_lock(first_place)
        try:
            if try_lock(descriptor, fcntl.LOCK_SH):
                return []
            return read_lock(descriptor).split("\n")[1:] or [""]
        finally:
            os.close(descriptor)

    def empty(self) -> bool:
        return not self.waited_for(f"{self.name}.0")

    def join(self) -> bool:
        """Take the place behind the last that is taken, if the line is not full and
        there is room for its file."""
        with suppress(Error), self.slots.main_lock():
            for number in reversed(range(self.size)):
                descriptor = open_lock(f"{self.name}.{number}")
                if not try_lock(descriptor):
                    os.close(descriptor)
                    break
                self.stand(number, descriptor)
        return self.descriptor >= 0

    def stand(self, number: int, descriptor: int) -> None:
        self.leave()
        self.number, self.descriptor = number, descriptor
        write_into(descriptor, holder("waiting", self.path, self.since) + self.text)

    def leave(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.number = self.descriptor = -1

    def wait(self) -> Slot:
        """Move up to the first place, then wait for a slot; in the end we have left."""
        try:
            return self.stand_in_line()
        finally:
            self.leave()

    def stand_in_line(self) -> Slot:
        with Alarms():
            while self.number > 0:
                descriptor = open_lock(f"{self.name}.{self.number - 1}")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                self.stand(self.number - 1, descriptor)
        told = False
        while True:
            start = time.monotonic()
            slot = self.take()
            if slot:
                return slot
            if self.all_away and self.impatient:
                raise Away("it failed for another build, too")
            if self.all_away and (why := self.hook.despair(self.machines)):
                raise Error(why)
            if self.all_away and not told:
                told = True
                self.hook.tell_of_absence(self)
            # Looking at many slots takes long; it must not be what we do all the time.
            wait_readable([], max(WAIT_S, 100 * (time.monotonic() - start)))


class Alarms:
    """Look every two seconds whether Nix has gone, also while we wait for a lock."""

    def __enter__(self) -> None:
        signal.signal(signal.SIGALRM, self.look)
        signal.setitimer(signal.ITIMER_REAL, 2, 2)

    def __exit__(self, *error: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def look(self, number: int, frame: object) -> None:
        if nix_has_gone():
            raise NixGone


# ---- Derivations --------------------------------------------------------------------


class Output(NamedTuple):
    name: str
    path: str  # "" if it is not known before the build
    algorithm: str
    hash: str


class Derivation(NamedTuple):
    """What a .drv file says, as far as a builder needs it."""

    outputs: tuple[Output, ...]
    has_input_derivations: bool
    sources: tuple[str, ...]
    platform: str
    builder: str
    arguments: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, text: str) -> Derivation:
        """Read the one term `Derive(...)`; Error if it is anything else."""
        if text.startswith("DrvWithVersion("):
            raise Error("it is a dynamic derivation, which only Nix itself can build")
        try:
            name, term = text[:6], parse_term(text[6:])
            outputs, inputs, sources, platform, builder, arguments, environment = term
            if name != "Derive":
                raise ValueError(name)
            return cls(
                tuple(Output(*texts(output)) for output in outputs),
                bool(inputs),
                texts(sources),
                texts([platform])[0],
                texts([builder])[0],
                texts(arguments),
                tuple((key, value) for key, value in map(texts, environment)),
            )
        except (TypeError, ValueError):
            raise Error("it is not a well-formed derivation") from None

    def encode(self, inputs: Iterable[str]) -> bytes:
        """As BuildDerivation wants it.  The inputs replace what the input derivations
        make; one without those names all its inputs itself, and they enter its hash."""
        return b"".join([
            integer(len(self.outputs)),
            *(string(field) for output in self.outputs for field in output),
            strings(inputs if self.has_input_derivations else self.sources),
            string(self.platform),
            string(self.builder),
            strings(self.arguments),
            integer(len(self.environment)),
            *(string(field) for pair in self.environment for field in pair),
        ])  # fmt: skip


ESCAPES = {"\\n": "\n", "\\r": "\r", "\\t": "\t"}  # any other stands for itself


def parse_term(text: str) -> list:  # type: ignore[type-arg]  # nested lists of strings
    """One list or tuple of strings, lists and tuples; ValueError if it is malformed."""
    stack: list[list] = [[]]  # type: ignore[type-arg]
    position, after_value = 0, False
    while position < len(text):
        comma = after_value and text[position] == ","
        position += comma
        mark = text[position : position + 1]
        if after_value and (mark in ("]", ")")) == comma:
            raise ValueError(position)
        if mark == '"':
            end = closing_quote(text, position + 1)
            stack[-1].append(unescape(text[position + 1 : end]))
            position = end
        elif mark in ("[", "("):
            stack.append([mark])
        else:
            closed = stack.pop()
            if not stack or closed.pop(0) + mark not in ("()", "[]"):
                raise ValueError(position)
            stack[-1].append(closed)
        position, after_value = position + 1, mark not in ("[", "(")
    [[term]] = stack  # else a ValueError of Python's own
    return list(term) if isinstance(term, list) else []


def closing_quote(text: str, position: int) -> int:
    """The first quote from there on that no backslash escapes; ValueError if none."""
    while True:
        quote = text.index('"', position)
        before = quote
        while before > position and text[before - 1] == "\\":
            before -= 1
        if (quote - before) % 2 == 0:
            return quote
        position = quote + 1


def unescape(text: str) -> str:
    if "\\" not in text:
        return text
    parts = text.split("\\\\")  # from the left, so these are the escaped backslashes
    for escape, meant in ESCAPES.items():
        parts = [part.replace(escape, meant) for part in parts]
    return "\\".join(part.replace("\\", "") for part in parts)


def texts(values: list[object]) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise TypeError
    return tuple(map(str, values))


def read_derivation(path: str, store: Store) -> Derivation:
    """The derivation of that store path; Error says why it cannot be sent away."""
    file = store.file(path)
    try:
        with open(file, "rb") as stream:
            text = stream.read().decode("utf-8", "surrogateescape")
        derivation = Derivation.parse(text)
        for output in derivation.outputs:
            if not output.path:
                raise Error(
                    f"the path of its output '{output.name}' is not known before the "
                    "build (content-addressed or impure)"
                )
            store.name(output.path)
    except (Error, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise Error(f"cannot send '{path}' to another machine: {reason}") from None
    return derivation


# ---- Talking with Nix ---------------------------------------------------------------

ERROR, WARN, INFO, TALKATIVE, DEBUG = range(5)
COPY_PATH, PROGRESS = 100, 105  # Nix's types of an activity, and of news of one


def printable(text: str) -> str:
    """Without colours and other control characters, which a builder may send."""
    first, *parts = text.split("\x1b[")
    text = first + "".join(part.lstrip(DIGITS + ";")[1:] for part in parts)
    text = encode(text).decode("utf-8", "replace")  # Nix reads no other JSON
    return "".join(
        c for c in text if c in "\n\t" or c >= " " and not "\x7f" <= c <= "\x9f"
    )


def quoted(text: str) -> str:
    """A string of JSON.  (The module json takes 8 ms to import.)"""
    text = printable(text).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + text.replace("\n", "\\n").replace("\t", "\\t") + '"'


def short(derivation: str) -> str:
    """Its name, without the store and the hash."""
    return derivation.rpartition("/")[2][33:].removesuffix(".drv") or derivation


class Talk:
    """Replies, messages and activities to Nix, on descriptor 2, in its dialect."""

    def __init__(self, nix: Nix) -> None:
        self.old = nix.old
        self.debug = "NIX_DEBUG_HOOK" in nix.environ
        # The numbers of the levels above: 2.3 inserted warn, 2.4 notice.
        self.verbosity = nix.verbosity
        if nix.old:
            self.levels, self.verbosity = (0, 0, 0, 1, 1), 0
        elif nix.since_2_4:
            self.levels = (0, 1, 3, 4, 6)
        elif "trace-function-calls" in nix.settings:
            self.levels = (0, 1, 2, 3, 5)
        else:
            self.levels = (0, 0, 1, 2, 4)
        self.started = 0  # activities
        self.running: list[int] = []  # of them, each a part of the one before

    def write(self, line: str) -> None:
        write_all(2, encode(line) + b"\n")

    def wants(self, level: int) -> bool:
        """Whether the user wants messages of that level."""
        return self.debug or self.levels[level] <= self.verbosity

    def say(self, level: int, text: str) -> None:
        """Show a message of one or more lines, if the user wants that level.

        2.x drops plain lines once a build is accepted, so for it all are @nix lines.
        """
        if not self.wants(level):
            return
        if level == DEBUG:
            text = f"[{time.monotonic() - START:.3f} s] {text}"
        if not self.old:
            number = 0 if self.debug else self.levels[level]
            self.write(f'@nix {{"action":"msg","level":{number},"msg":{quoted(text)}}}')
            return
        for line in printable(text).splitlines():
            self.write(f" {line}" if line[:2] in ("# ", "@ ") else line)

    def begin(
        self, depth: int, text: str, level: int = TALKATIVE, kind: int = 0, *fields: str
    ) -> None:
        """An activity: something that takes time, for the progress bar of 2.x.  All
        that run at that depth and below are over."""
        self.end(depth)
        if not self.old:
            self.started += 1
            self.running.append(self.started)
            level = self.levels[level]
            self.write(f'@nix {{"action":"start","id":{self.started},"level":{level},'
                       f'"type":{kind},"text":{quoted(text)},"parent":0,'
                       f'"fields":[{",".join(map(quoted, fields))}]}}')  # fmt: skip

    def progress(self, bytes_done: int) -> None:
        """Of the innermost activity."""
        if self.running:
            self.write(f'@nix {{"action":"result","id":{self.running[-1]},"type":'
                       f'{PROGRESS},"fields":[{bytes_done},0,0,0]}}')  # fmt: skip

    def end(self, depth: int = 0) -> None:
        while len(self.running) > depth:
            self.write(f'@nix {{"action":"stop","id":{self.running.pop()}}}')

    def say_bug(self) -> None:
        import traceback

        text = "a bug in nix_build_remote.py, please report it:"
        self.say(ERROR, f"{text}\n{traceback.format_exc()}")

    def reply(self, word: str, name: str = "") -> None:
        """`# accept` and so on; new Nix waits for a name right after an accept."""
        self.say(DEBUG, f"the answer is: {word} {name}".rstrip())
        self.write(f"# {word}")
        if word == "accept" and not self.old:
            self.write(name)


def write_all(descriptor: int, data: bytes) -> None:
    """To Nix, which reads the messages and the log for as long as it lives."""
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BrokenPipeError:
            raise NixGone from None


NO_READER = select.POLLERR | select.POLLHUP


def nix_has_gone() -> bool:
    poll = select.poll()
    poll.register(2, select.POLLHUP)  # which macOS says, and Linux does not
    return any(event & NO_READER for _, event in poll.poll(0))


def wait_readable(
    descriptors: Iterable[int], timeout_s: float, full: Iterable[int] = ()
) -> set[int]:
    """Those with something to read, or at their end, and of those that were full, those
    that can be written again; NixGone if Nix ends meanwhile."""
    poll = select.poll()
    poll.register(2, select.POLLHUP)
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    for descriptor in full:
        poll.register(descriptor, select.POLLOUT)
    most = (1 << 31) - 1  # milliseconds that poll can take: 24 days
    events = poll.poll(None if timeout_s == math.inf else min(timeout_s * 1000, most))
    ready = {descriptor for descriptor, event in events if descriptor != 2}
    if not ready and any(event & NO_READER for _, event in events):
        raise NixGone
    return ready


# ---- Programs -----------------------------------------------------------------------

PROFILES = ("/run/current-system/sw/bin", "/nix/var/nix/profiles/default/bin",
            "~/.nix-profile/bin", "/usr/local/bin", "/opt/homebrew/bin", "/usr/bin",
            "/bin")  # fmt: skip


def nix_directories(environ: dict[str, str]) -> Iterator[str]:
    """Where the programs of the Nix that called us are, the surest place first.

    Their flags and their way with locks differ between versions, so those on PATH, of
    whatever version, come after our own prefix and the directory of the caller.
    """
    directory = os.path.dirname(os.path.abspath(__file__))
    if directory.endswith("/libexec/nix"):
        yield directory[: -len("libexec/nix")] + "bin"
    with suppress(OSError):  # no /proc, or no right to look
        yield os.path.dirname(os.readlink(f"/proc/{os.getppid()}/exe"))
    yield from program_directories(environ)


def program_directories(environ: dict[str, str]) -> Iterator[str]:
    yield from filter(None, environ.get("PATH", "").split(":"))
    yield from map(os.path.expanduser, PROFILES)


def find_program(name: str, directories: Iterable[str]) -> str:
    looked: list[str] = []
    for directory in directories:
        path = f"{directory}/{name}"
        if os.access(path, os.X_OK) and os.path.isfile(path):
            return path
        if directory not in looked:
            looked.append(directory)
    raise Error(f"cannot find the program {name}; looked in {', '.join(looked)}")


def child_environ(nix: Nix, **more: str) -> dict[str, str]:
    """For ssh and Nix's programs: nobody is there to answer a prompt."""
    unwanted = ("DISPLAY", "SSH_ASKPASS", "NIX_HELD_LOCKS")
    kept = {name: nix.environ[name] for name in nix.environ if name not in unwanted}
    return {**kept, **more}


def spawn(
    command: list[str],
    environ: dict[str, str],
    descriptors: dict[int, int],
    *,
    detached: bool = False,
) -> int:
    """Start a program; returns its process id.  (subprocess would cost each hook 7 ms
    and 1 MB.)  It gets the descriptors given, the rest of 0, 1 and 2 as /dev/null, and
    no others of ours.  Detached, Nix does not kill it with our process group."""
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = []
    for number in (0, 1, 2, 8, 9):
        if number in descriptors:
            actions.append((os.POSIX_SPAWN_DUP2, descriptors[number], number))
        elif number < 3:
            null = (os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0)
            actions.append(null)
    try:
        # Python ignores SIGPIPE, which programs would inherit.
        return os.posix_spawn(
            command[0], command, environ, file_actions=actions,
            setsigdef=[signal.SIGPIPE], setsid=detached,
        )  # fmt: skip
    except OSError as error:
        raise Error(f"cannot start {command[0]}: {error.strerror}") from None


def make_pipes(numbers: str) -> tuple[list[int], dict[int, int]]:
    """Pipes for those of a program's descriptors: our ends, and its own by number.  It
    reads from 0 and 8, and writes to the others."""
    ours, theirs = [], {}
    for number in map(int, numbers):
        ends = []
        for end in os.pipe():
            # Out of the way of the numbers that descriptors have in children.
            ends.append(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20))
            os.close(end)
        reads = number in (0, 8)
        theirs[number] = ends[not reads]
        ours.append(ends[reads])
    return ours, theirs


class Child:
    """A program we started.  Of its descriptors 0, 1 and 2, those asked for are pipes,
    whose other ends are `pipes`."""

    def __init__(
        self,
        command: list[str],
        environ: dict[str, str],
        piped: str,
        more: dict[int, int] | None = None,
    ) -> None:
        self.pipes, theirs = make_pipes(piped)
        try:
            self.pid = spawn(command, environ, {**theirs, **(more or {})})
            self.status: int | None = None
        finally:
            for descriptor in theirs.values():
                os.close(descriptor)

    def wait(self, timeout_s: float = math.inf) -> int | None:
        """Its exit status, negative for a signal; None if it still runs by then."""
        deadline = time.monotonic() + timeout_s
        while self.status is None:
            block = timeout_s == math.inf
            pid, status = os.waitpid(self.pid, 0 if block else os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                break
            else:
                time.sleep(0.005)
        return self.status

    def output(self) -> str:
        """All that it writes on its one pipe."""
        answer = b""
        while data := os.read(self.pipes[0], 65536):
            answer += data
        self.wait()
        self.kill()
        return decode(answer)

    def stop(self) -> None:
        """End it, if it has not ended."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def kill(self) -> None:
        """End it, and forget its pipes."""
        self.stop()
        while self.pipes:
            os.close(self.pipes.pop())


# ---- The builder: ssh and nix-store --serve -----------------------------------------


def ssh_options(machine: Machine, known_hosts: str) -> list[str]:
    """For our sessions and, in NIX_SSHOPTS, for nix-copy-closure's.

    ssh takes the first value it meets, from the command line before its files: these
    switch off what a user's ssh_config may set and would spoil a session.  Nothing here
    may hold a space or a shell's character, see PLAIN.
    """
    options = [
        "-x", "-a",
        # Not every ssh knows these three (8.7), nor all that a user's IgnoreUnknown,
        # which ours replaces, lets pass.
        "-oIgnoreUnknown=*", "-oStdinNull=no", "-oForkAfterAuthentication=no",
        "-oSessionType=default", "-oRemoteCommand=none", "-oRequestTTY=no",
        "-oClearAllForwardings=yes", "-oLogLevel=ERROR",
    ]  # fmt: skip
    if machine.port:
        options.append(f"-oPort={machine.port}")
    if machine.key:
        options += ["-i", machine.key]
    if machine.compress:
        options.append("-oCompression=yes")
    if known_hosts:
        options += [
            "-oStrictHostKeyChecking=yes", f"-oUserKnownHostsFile={known_hosts}",
            "-oGlobalKnownHostsFile=/dev/null", "-oKnownHostsCommand=none",
            "-oVerifyHostKeyDNS=no", "-oUpdateHostKeys=no", "-oCheckHostIP=no",
        ]  # fmt: skip
    return options


# After the user's NIX_SSHOPTS, so that those win.
SSH_DEFAULTS = ("-oBatchMode=yes", f"-oConnectTimeout={CONNECT_TIMEOUT_S}",
                f"-oServerAliveInterval={ALIVE_INTERVAL_S}",
                f"-oServerAliveCountMax={ALIVE_COUNT_MAX}")  # fmt: skip


def user_ssh_options(environ: dict[str, str]) -> list[str]:
    """NIX_SSHOPTS as our own ssh gets it: words, quoted as for a shell if at all."""
    text = environ.get("NIX_SSHOPTS", "")
    if not any(mark in text for mark in "'\"\\"):
        return text.split()
    import shlex

    try:
        return shlex.split(text)
    except ValueError as error:
        raise Error(f"NIX_SSHOPTS cannot be read: {error}: {text}") from None


def alias(machine: Machine) -> str:
    """[user@]host for nix-copy-closure, with -oHostName for the true one.

    nix-copy-closure wants IPv6 bare (2.3) or in brackets (2.34), and runs its command
    here instead of over ssh for the name `localhost`.
    """
    if ":" not in machine.host and machine.destination != "localhost":
        return machine.destination
    user, at, host = machine.destination.rpartition("@")
    plain = "".join(c if only(c, DIGITS + LETTERS) else "-" for c in host)
    return f"{user}{at}builder-{plain}"


def private_directory(wanted: str) -> str:
    """A directory only we can write, for files ssh reads: wanted, or one in /tmp if its
    name could not be handed on to ssh."""
    plain = only(wanted, PLAIN) and "%" not in wanted  # ssh would expand that
    if not plain or len(wanted) + 30 >= SOCKET_LIMIT_BYTES:
        return spare_directory()
    make_directory(wanted)
    return wanted


def make_directory(path: str) -> None:
    """Have a directory that only we can write; what else is there is put aside."""
    try:
        for _ in range(2):
            with suppress(FileExistsError):
                os.makedirs(path, 0o700)
            if is_shut(os.lstat(path), {os.geteuid()}):
                return
            remove(path)
    except OSError as error:
        raise Error(f"cannot make {path}: {error.strerror}") from None
    raise Error(f"{path} is not a directory that only we can write; remove it")


def is_shut(info: os.stat_result, owners: set[int]) -> bool:
    """Whether that is a directory of one of these, that nobody else can write."""
    shut = not info.st_mode & 0o022
    return stat.S_ISDIR(info.st_mode) and info.st_uid in owners and shut


def is_private(path: str) -> bool:
    """Whether nobody else can change what is there, nor put something else in its place,
    as who may write a directory above it could.  (Not if that is sticky, as /tmp is.)
    What is not there yet is private if we could make it so."""
    # Whoever owns the root can do everything: not always 0 in a user namespace.
    trusted = {0, os.geteuid(), os.stat("/").st_uid}
    above = {part for way in (path, os.path.realpath(path)) for part in parents(way)}
    try:
        if os.path.lexists(path) and not is_shut(os.stat(path), trusted):
            return False
        for part in filter(os.path.lexists, above):
            info = os.stat(part)
            sticky = info.st_mode & stat.S_ISVTX and info.st_uid in trusted
            if not sticky and not is_shut(info, trusted):
                return False
    except OSError:
        return False
    links = filter(os.path.islink, {path, *above})
    return all(os.lstat(link).st_uid in trusted for link in links)


def parents(path: str) -> list[str]:
    """The directories above an absolute name, one in the other."""
    parts = os.path.normpath(path).split("/")
    return ["/".join(parts[:count]) or "/" for count in range(1, len(parts))]


def spare_directory(instead_of: str = "") -> str:
    """A directory of our own, where nobody else's files are in the way."""
    import zlib

    name = f"nix-build-remote-{os.geteuid()}"
    for folder in [f"/tmp/{name}", *(f"/tmp/{name}.{n}" for n in range(1, 10)), f"/run/{name}"]:
        try:
            with suppress(FileExistsError):
                os.mkdir(folder, 0o700)
            if is_shut(os.lstat(folder), {os.geteuid()}):
                break
        except OSError:
            continue
    else:
        raise Error(f"cannot make a directory of our own, such as /tmp/{name}")
    if not instead_of:
        return folder
    path = f"{folder}/{zlib.crc32(encode(instead_of)):08x}"
    make_directory(path)
    return path


def read_private(path: str, limit: int = TAIL_BYTES) -> str | None:
    """What a file of ours says; None if there is none, or something else in its place
    (a fifo would keep us waiting), or more than that."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        data = os.read(descriptor, limit + 1)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return data.decode("utf-8", "surrogateescape") if len(data) <= limit else None


def write_private(
    path: str, text: str, mode: int = 0o600, *, lasting: bool = True
) -> None:
    """Make or replace a file in a private directory: it is there as a whole, or not at
    all, also after a power loss if it is `lasting`, which a busy disk may take seconds
    for.  Raises OSError, as when the disk is full."""
    import _thread

    temporary = f"{path}.{os.getpid()}.{_thread.get_ident()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    try:
        with open(os.open(temporary, flags, mode), "wb") as file:
            file.write(encode(text))
            file.flush()
            if lasting:
                os.fsync(file.fileno())
        os.rename(temporary, path)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)
        if not os.path.isdir(path):
            raise
        remove(path)
        write_private(path, text, mode, lasting=lasting)


def keep(path: str, text: str, mode: int = 0o600) -> None:
    """Have a private file say that; mostly it does already."""
    if read_private(path) != text:
        write_private(path, text, mode)


def pin_host_key(machine: Machine, slot_directory: str) -> str:
    """A known_hosts file that knows just this machine's key; "" if none is pinned."""
    if not machine.host_key:
        return ""
    import hashlib

    directory = private_directory(f"{slot_directory}/ssh")
    digest = hashlib.sha256(machine.host_key.encode()).hexdigest()
    path = f"{directory}/known_hosts-{digest[:32]}"
    try:
        keep(path, f"* {machine.host_key}\n")
    except OSError as error:
        raise Unreachable(f"cannot keep its host key in {path}: {error.strerror}") from None
    return path


class Link:
    """A way to one machine: a seat on a shared connection, and all that every command
    line to the machine needs.

    Connections are shared between hooks and outlive them.  The first hook to need one
    starts its master, an ssh of its own session (Nix kills ours) that ends when it has
    been idle.  Its stderr is the file `socket`.start, which it keeps locked just until
    it has connected or failed, even if the hook that started it dies.
    """

    def __init__(self, machine: Machine, nix: Nix, slot_directory: str) -> None:
        self.machine, self.name, self.nix = machine, machine.name(nix), nix
        self.ssh = find_program("ssh", program_directories(nix.environ))
        self.own = ssh_options(machine, pin_host_key(machine, slot_directory))
        self.user = user_ssh_options(nix.environ)
        self.path = f"{os.path.dirname(self.ssh)}:{nix.environ.get('PATH', '')}"
        self.environ = child_environ(nix, PATH=self.path.rstrip(":"))
        self.user_text = nix.environ.get("NIX_SSHOPTS", "")
        self.directory = private_directory(f"{slot_directory}/ssh")
        self.socket, self.seat, self.number = "none", -1, 0
        self.master = 0  # the process id of one we have started

    def base(self) -> str:
        """What the names of this machine's sockets begin with: whoever would connect in
        another way has another name."""
        import zlib

        whole = [self.ssh, *self.own, *self.user, self.machine.destination]
        whole += [self.environ.get(name, "") for name in ("HOME", "SSH_AUTH_SOCK")]
        data = encode("\0".join(whole))
        return f"{self.directory}/{zlib.crc32(data):08x}{zlib.adler32(data):08x}"

    def sit(self) -> None:
        """Take a seat on the first connection that has one, and keep it until we end.
        With the last seat of one, the next connection is begun.  Raises Error if there
        is no room for a file; then nothing is shared."""
        base, seats = self.base(), self.seats()
        for place in range(CONNECTIONS * seats):
            connection, seat = divmod(place, seats)
            descriptor = open_lock(f"{base}-{connection}.{seat}")
            if not try_lock(descriptor):
                os.close(descriptor)
                continue
            self.socket = f"{base}-{connection}"
            self.seat, self.number = descriptor, seat
            if seat == seats - 1:
                self.start(f"{base}-{connection + 1}")
            return

    def seats(self) -> int:
        """How many sessions a connection to this machine may have."""
        text = read_private(f"{self.base()}.seats") or ""
        return (int(text) if only(text, DIGITS) and 0 < len(text) < 3 else 0) or SEATS

    def lose_seat(self) -> None:
        """sshd has refused us a session: remember how many it allows."""
        with suppress(OSError):  # a full disk
            write_private(f"{self.base()}.seats", str(max(1, self.number)))

    def live(self) -> bool:
        """Whether a master answers at our socket; that says nothing of the network."""
        return self.socket != "none" and answers(self.socket)

    @staticmethod
    def master_words(name: str) -> tuple[str, bool]:
        """What the last master of that socket has said, and if it still connects."""
        descriptor = open_lock(f"{name}.start")
        try:
            connecting = not try_lock(descriptor, fcntl.LOCK_SH)
            return read_lock(descriptor)[:TAIL_BYTES], connecting
        finally:
            os.close(descriptor)

    def start(self, name: str) -> None:
        """Begin to connect that socket, unless somebody already does."""
        descriptor = open_lock(f"{name}.start")
        while not try_lock(descriptor):  # it is a master's, or of one who just looks
            if not try_lock(descriptor, fcntl.LOCK_SH):
                os.close(descriptor)
                return
        try:
            if not answers(name):
                self.start_master(name, descriptor)
        finally:
            os.close(descriptor)

    def start_master(self, name: str, descriptor: int) -> None:
        """Its stderr is that file, in which nothing is said yet."""
        with suppress(OSError):  # a full disk
            os.ftruncate(descriptor, 0)
        # What a killed master has left: ssh would share nothing if it found that.
        for stale in (f"{name}.proved", f"{name}.direct", name):
            with suppress(OSError):
                remove(stale)
        command = [self.ssh, "-N", "-oControlMaster=yes"]
        command += [f"-oControlPersist={IDLE_S}", *self.options(name)]
        command += ["--", self.machine.destination]
        self.master = spawn(command, self.environ, {2: descriptor}, detached=True)

    def connect(self, patience_s: float) -> None:
        """Return with a live connection, or raise Unreachable with ssh's own words.  An
        ssh that shares nothing, but does not fail either, is used without a master."""
        if self.socket == "none":
            return
        deadline = time.monotonic() + patience_s
        try:
            self.start(self.socket)
        except Error:  # no room for its file
            self.socket = "none"
            return
        while not self.live():
            words, connecting = self.master_words(self.socket)
            if "disabling multiplexing" in words:  # it would stay, of no use
                self.socket = "none"
                if self.master and connecting:
                    os.kill(self.master, signal.SIGTERM)
                return
            if not connecting and not self.live():
                self.complain(words)
                self.socket = "none"
                return
            if time.monotonic() > deadline:
                raise Unreachable(f"no connection within {patience_s:.0f} s")
            wait_readable([], LOCK_POLL_S / 10)

    def complain(self, words: str) -> None:
        """Raise Unreachable with what ssh said, if it said anything."""
        if self.machine.host_key and "Host key verification failed" in words:
            where = self.machine.where
            raise Unreachable(f"its host key is not the one that {where} asks for")
        text = " ".join(word for word in words.split() if word.strip("@"))
        if text:
            raise Unreachable(text)

    def proved(self) -> bool:
        """Whether somebody has talked with nix-store over this very connection."""
        return self.live() and os.path.exists(f"{self.socket}.proved")

    def prove(self) -> None:
        if self.socket != "none":
            with suppress(Error):  # no room for the file
                os.close(open_lock(f"{self.socket}.proved"))

    def retire(self, name: str) -> None:
        """Let whoever comes next make a new connection, since this may be the trouble:
        it keeps the groups that its user had.  Sessions that it has go on."""
        if name == "none" or not answers(name):
            return
        command = [self.ssh, "-O", "stop", "-S", name, "--", self.machine.destination]
        child = Child(command, self.environ, "2")
        if child.wait(RETIRE_S) != 0:  # its master stands still
            with suppress(FileNotFoundError):
                os.unlink(name)
        child.kill()

    def options(self, name: str) -> list[str]:
        # The first -oControlPath counts, but a later -S, the user's or ours, beats it.
        sharing = [f"-oControlPath={name}", *self.own, *self.user, "-S", name]
        return [*sharing, *SSH_DEFAULTS]

    def run(self, deadline: float, *remote: str) -> Child:
        """Start a program on the machine; SessionLost if its connection stands still."""
        if self.socket != "none" and self.direct():
            with suppress(OSError):  # no master, or no more sessions: ssh knows a way
                return Remote(self.socket, " ".join(remote), deadline)
        return Child(self.command(*remote), self.environ, "012")

    def direct(self) -> bool:
        """Whether the master may be asked directly: only a whole ssh sends variables to
        the machine, as it may be configured to.  (Those that Debian's ssh sends on its
        own are about terminals.)  The answer is kept for this connection."""
        path = f"{self.socket}.direct"
        kept = read_private(path)
        if kept in ("yes", "no"):
            return kept == "yes"
        program, *options = self.command()
        child = Child([program, "-G", *options], self.environ, "1")
        lines = child.output().split("\n")
        usual = ("sendenv LANG", "sendenv LC_", "sendenv COLORTERM", "sendenv NO_COLOR")
        sent = [line for line in lines if line.startswith(("setenv ", "sendenv "))]
        answer = child.wait() == 0 and all(line.startswith(usual) for line in sent)
        with suppress(OSError):  # a full disk
            write_private(path, "yes" if answer else "no")
        return answer

    def command(self, *remote: str) -> list[str]:
        options = ["-oControlMaster=no", *self.options(self.socket), "-T"]
        options.append("-oPermitLocalCommand=no")
        return [self.ssh, *options, "--", self.machine.destination, *remote]

    def copy_environ(self) -> dict[str, str]:
        """For nix-copy-closure, which splits NIX_SSHOPTS as its own version does, so
        that the user's part goes on as it came.  If it must have an ssh of its own,
        that has its own connection: on ours, sshd may refuse a second session."""
        own = ["-oControlMaster=no", "-oControlPath=none", *self.own]
        if alias(self.machine) != self.machine.destination:
            own.append(f"-oHostName={self.machine.host.replace('%', '%%')}")
        text = " ".join([*own, self.user_text, "-S none", *SSH_DEFAULTS])
        return {**self.environ, "NIX_SSHOPTS": text}


def call(name: str) -> _socket.socket:
    """Connect to that control socket.  Raises OSError if nobody listens there;
    BlockingIOError if its master takes no calls any more, so that too many wait."""
    import _socket  # socket itself takes 6 ms to import

    caller = _socket.socket(_socket.AF_UNIX)
    caller.setblocking(False)
    deadline = time.monotonic() + RETIRE_S
    while True:
        try:
            caller.connect(name)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(LOCK_POLL_S)
                continue
            caller.close()
            raise
        except OSError:
            caller.close()
            raise
        return caller


def answers(name: str) -> bool:
    """Whether something listens at that control socket."""
    with suppress(OSError):
        call(name).close()
        return True
    return False


class Remote(Child):
    """A program on the builder, run over a shared connection.

    Its master is asked for that directly, as an ssh would ask it (PROTOCOL.mux of
    OpenSSH, version 4): an ssh for each build would take 6 ms of processor time.  The
    program ends when the control connection is closed.

    Raises OSError if there is no master, if it refuses or is just dying, SessionLost if
    it says nothing.
    """

    HELLO, NEW_SESSION = 1, 0x10000002
    EXIT, OPENED = 0x80000004, 0x80000006

    def __init__(self, control_socket: str, command: str, deadline: float) -> None:
        import _socket

        self.control = call(control_socket)
        self.pipes, theirs = make_pipes("012")
        self.status = None
        try:
            self.send(self.HELLO, struct.pack(">I", 4))
            texts = [struct.pack(">I", len(t)) + encode(t) for t in ("", "", command)]
            flags = struct.pack(">5I", 0, 0, 0, 0, 0xFFFFFFFF)  # no terminal, no escape
            request = struct.pack(">I", 0) + texts[0] + flags + texts[1] + texts[2]
            self.send(self.NEW_SESSION, request)
            for descriptor in theirs.values():
                rights = struct.pack("i", descriptor)
                control = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)
                self.control.sendmsg([b"\0"], [control])
            hello = self.receive(time.monotonic() + REPLY_S)  # it need not ask anybody
            if not hello.startswith(struct.pack(">II", self.HELLO, 4)):
                raise OSError("ssh's master speaks another protocol")
            answer = self.receive(deadline)
            if not answer.startswith(struct.pack(">I", self.OPENED)):
                raise OSError(f"ssh's master opens no session: {answer!r}")
        except BaseException as error:
            self.kill()
            if isinstance(error, TimeoutError):
                raise SessionLost("the connection does not answer") from None
            raise
        finally:
            for descriptor in theirs.values():
                os.close(descriptor)

    def send(self, kind: int, body: bytes) -> None:
        self.control.sendall(struct.pack(">II", 4 + len(body), kind) + body)

    def receive(self, deadline: float) -> bytes:
        """The next message; OSError if none comes."""
        length = int.from_bytes(self.read(4, deadline), "big")
        if length > 65536:
            raise OSError("ssh's master sends too much")
        return self.read(length, deadline)

    def read(self, count: int, deadline: float) -> bytes:
        data = b""
        while len(data) < count:
            left = max(0.0, deadline - time.monotonic())
            if not wait_readable([self.control.fileno()], left):
                raise TimeoutError
            more = self.control.recv(min(count - len(data), TAIL_BYTES))
            if not more:
                raise ConnectionResetError
            data += more
        return data

    def wait(self, timeout_s: float = math.inf) -> int | None:
        deadline = time.monotonic() + timeout_s
        while self.status is None:
            try:
                message = self.receive(deadline)
            except TimeoutError:
                break
            except OSError:
                self.status = 255  # as ssh has it
            else:
                if message.startswith(struct.pack(">I", self.EXIT)):
                    self.status = int.from_bytes(message[8:12], "big")
        return self.status

    def stop(self) -> None:
        self.control.close()
        if self.status is None:
            self.status = 255


class Answer:
    """What a builder will say to something that it has been asked or told.

    It answers in the order of the questions, so those before are heard first.  To hear
    is to read, within so many seconds or the question's own time.
    """

    def __init__(self, session: Session, hear: Callable[[float], Any], time_s: float) -> None:
        self.session, self.hear, self.time_s = session, hear, time_s
        self.value: Any = None
        self.heard = False
        session.awaited.append(self)

    def get(self, time_s: float | None = None) -> Any:
        while not self.heard:
            if not self.session.awaited:  # it was to be heard, in vain
                raise SessionLost("the builder's answers cannot be told apart any more")
            first = self.session.awaited.pop(0)
            within = time_s if first is self and time_s is not None else first.time_s
            first.value = first.hear(time.monotonic() + within)
            first.heard = True
        return self.value


class Session:
    """One `nix-store --serve --write` on a builder.

    It stays open from the first question to the last output, because what it was asked
    about with the lock flag, and what it built, is safe from the builder's garbage
    collector for just that long.  Its stderr carries ssh's own words until the
    greeting, then the log of the build.
    """

    def __init__(self, link: Link, patience_s: float = GREETING_TIMEOUT_S) -> None:
        self.link = link
        self.deadline = time.monotonic() + patience_s  # for the first answer
        self.version = 0
        self.awaited: list[Answer] = []  # in the order in which they will come
        self.tail = b""  # of stderr
        self.inbox = bytearray()
        self.limits: tuple[int, int] = (0, 0)  # of the running build, see build_limit
        self.silent = True  # it has said nothing yet
        self.first = self.last = 0.0  # when its log began, and was heard of last
        self.child = link.run(self.deadline, "nix-store", "--serve", "--write")
        self.stdin, self.stdout, self.stderr = self.child.pipes
        os.set_blocking(self.stdin, False)
        try:
            self.write(integer(SERVE_HELLO) + integer(SERVE_VERSION))
        except BaseException:
            self.child.kill()
            raise

    def greet(self) -> None:
        """Read the answer to our hello; SessionLost, with ssh's own words, if it fails.
        Questions may be asked before: it saves a round trip."""
        magic = self.read(8, self.deadline)
        if magic != integer(SERVE_REPLY):
            raise SessionLost(f"it sent {magic!r} before nix-store's own words (does a "
                              "start-up file of the shell print that?)")  # fmt: skip
        version = read_integer(self.reader(self.deadline))
        if version >> 8 != 2:
            raise SessionLost("its Nix is older than 1.8, or no Nix (serve protocol "
                              f"{version >> 8}.{version & 255})")  # fmt: skip
        self.version = min(SERVE_VERSION, version)
        if b"refused by peer" in self.tail:  # ssh then made a connection of its own
            self.link.lose_seat()

    def pipes(self) -> list[int]:
        return [self.stdout] + [self.stderr] * (self.stderr >= 0)

    def pump(self, ready: set[int]) -> None:
        """Take in what has arrived on stdout and stderr."""
        if self.stderr in ready:
            data = os.read(self.stderr, 65536)
            if data and self.version:
                write_all(4, data)
                self.last = time.monotonic()
                self.first = self.last if self.silent else self.first
                self.silent = False
            self.tail = (self.tail + data)[-TAIL_BYTES:]
            if not data:
                self.stderr = -1
        if self.stdout in ready:
            data = os.read(self.stdout, 65536)
            if not data:
                raise SessionLost(self.last_words())
            self.inbox += data
            if len(self.inbox) > 2 * WIRE_LIMIT_BYTES:
                raise Nonsense("it says more than anybody asked for")

    def read(self, count: int, deadline: float = math.inf) -> bytes:
        while len(self.inbox) < count:
            now, limit = time.monotonic(), self.build_limit()
            if now >= limit:
                raise BuildTimedOut("it exceeds the limits of time or silence that Nix "
                                    "has set, and the builder let it")  # fmt: skip
            if now >= deadline:
                raise Late("no answer within the time for it")
            self.pump(wait_readable(self.pipes(), min(deadline, limit) - now))
        data = bytes(self.inbox[:count])
        del self.inbox[:count]
        return data

    def write(self, data: bytes) -> None:
        """Send all of it, still relaying what arrives."""
        if self.stdin < 0:
            raise SessionLost("the builder was told that it would be asked no more")
        view = memoryview(data)
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while view:
            try:
                view = view[os.write(self.stdin, view) :]
            except BlockingIOError:
                left = max(0.0, deadline - time.monotonic())
                ready = wait_readable(self.pipes(), left, [self.stdin])
                self.pump(ready)
                if not ready:
                    raise Late("no answer: it does not read") from None
            except BrokenPipeError:
                raise SessionLost(self.last_words()) from None

    def drain(self) -> None:
        """Relay stderr to its end, or until nothing comes for a while: a start-up file
        of the builder's shell may have left a process that keeps it open."""
        while self.stderr >= 0:
            ready = wait_readable([self.stderr], QUIET_S)
            if not ready:
                return
            self.pump(ready)

    def last_words(self) -> str:
        """What ssh or nix-store said at the end."""
        if self.child.wait(1) is None:
            self.child.stop()
        self.drain()
        status = self.child.wait()
        lines = decode(self.tail).split("\n")
        if self.version:  # the rest is the build's log, which Nix has got
            lines = ["the connection was lost:" * (status == 255), *lines[-2:]]
        if status == 255 and self.link.socket != "none" and not self.link.live():
            lines += self.link.master_words(self.link.socket)[:1]
        words = " ".join(" ".join(lines).split())
        return f"{words or 'the session ended'} (ssh's exit status {status})"

    def ask_no_more(self) -> None:
        """Let it end when it has answered, so that its log's end comes right behind."""
        if self.stdin >= 0:
            self.child.pipes.remove(self.stdin)
            os.close(self.stdin)
            self.stdin = -1

    def finish(self) -> None:
        """End it in peace, so that the last of the log arrives."""
        self.ask_no_more()
        self.drain()

    def cancel(self) -> None:
        """End it at once: when its ssh ends, the builder cancels the build."""
        self.child.kill()

    def ask_valid(self, paths: Iterable[str], substitute: bool) -> Answer:
        """Ask which of the paths the builder has, and have it keep them until the
        session ends.  The answer is a set."""
        self.write(
            integer(QUERY_VALID_PATHS) + integer(1) + integer(int(substitute))
            + strings(sorted(paths))
        )  # fmt: skip
        time_s = SUBSTITUTE_TIMEOUT_S if substitute else ANSWER_TIMEOUT_S
        return Answer(self, lambda until: set(read_strings(self.reader(until))), time_s)

    def reader(self, deadline: float) -> Read:
        return lambda count: self.read(count, deadline)

    def first_answer(self, answer: Answer) -> Any:
        """The answer to the first question, with the greeting before it: that needs the
        builder's store, and so tells that it is of use.  Raises Unreachable if it does
        not come in time."""
        try:
            self.greet()
            return answer.get(self.deadline - time.monotonic())
        except Late as error:
            raise Unreachable(str(error)) from None

    def hear_all(self) -> None:
        """All that has not been heard yet."""
        while self.awaited:
            self.awaited[0].get()

    def take(self, limit: int, wait: Callable[[list[int]], object]) -> bytes:
        """Some of what it says next, as it is; wait is called until there is something.
        SessionLost at the end."""
        if not self.inbox:
            wait([self.stdout])
            data = os.read(self.stdout, limit)
            if not data:
                raise SessionLost(self.last_words())
            return data
        data = bytes(self.inbox[:limit])
        del self.inbox[:limit]
        return data

    def ask_infos(self, paths: Iterable[str]) -> Answer:
        """Ask what it knows of those of the paths that it has; a dict of PathInfo."""
        self.write(infos_question(paths))
        return self.infos_answer()

    def infos_answer(self) -> Answer:
        return Answer(
            self, lambda until: read_infos(self.reader(until), self.version),
            ANSWER_TIMEOUT_S,
        )  # fmt: skip

    def build_options(self, nix: Nix) -> bytes:
        numbers = [nix.number("max-silent-time"), nix.number("timeout")]
        if self.version >= 0x202:
            numbers.append(nix.number("max-build-log-size"))
        if self.version >= 0x203:
            numbers.append(nix.number("repeat"))  # 2.13 and newer have neither of them
            numbers.append(int(nix.enabled("enforce-determinism")))
        if self.version >= 0x207:
            numbers.append(int(nix.enabled("keep-failed")))
        return b"".join(map(integer, numbers))

    def build_limit(self) -> float:
        """When the running build will have gone too far beyond what Nix allows; that
        counts from the first of its log, since before it may wait for its turn; but from
        when we asked for it as long as it says nothing."""
        timeout, silence = self.limits
        limits = [self.first + timeout] * (timeout > 0)
        limits += [self.last + silence] * (silence > 0)
        return min(limits, default=math.inf) + MARGIN_S

    def ask_to_build(
        self, path: str, encoded: bytes, nix: Nix, then: bytes = b""
    ) -> Answer:
        """The answer: its status as the builder's Nix has it, 0 if it was built, and a
        message.  then: the next question, to be sent at once."""
        build = integer(BUILD_DERIVATION) + string(path) + encoded
        self.write(build + self.build_options(nix) + then)
        return Answer(self, lambda until: self.hear_of_build(nix), math.inf)

    def hear_of_build(self, nix: Nix) -> tuple[int, str]:
        status, message = self.wait_for_build(nix), read_string(self.read)
        if self.version >= 0x203:
            self.read(4 * 8)  # times built, non-deterministic, start, stop
        if self.version >= 0x206:
            for _ in range(2 * min(read_integer(self.read), WIRE_LIMIT_BYTES)):
                read_string(self.read)
        return (0 if status in BUILT else status), message

    def wait_for_build(self, nix: Nix) -> int:
        self.limits = nix.number("timeout"), nix.number("max-silent-time")
        self.first = self.last = time.monotonic()
        self.silent = True
        try:
            return read_integer(self.read)
        finally:
            self.limits = (0, 0)

    def build_paths(self, path: str, nix: Nix) -> tuple[int, str]:
        """The same by the older command.  It answers with nix-build's exit status,
        which is a mask from 100 up: 1 a timeout, 2 a hash mismatch, ..."""
        self.write(integer(BUILD_PATHS) + strings([path]) + self.build_options(nix))
        status = self.wait_for_build(nix)
        if status == 0:
            return 0, ""
        kind = MISC if status < 100 else TIMED_OUT if status & 1 else PERMANENT
        return kind, read_string(self.read)


def infos_question(paths: Iterable[str]) -> bytes:
    return integer(QUERY_PATH_INFOS) + strings(sorted(paths))


def wait_until_read() -> None:
    """Until Nix has read the whole log and, for 1.x, all messages: what is unread when
    we exit is dropped (2.x reads the messages to their end, 1.x neither of them)."""
    unread, deadline = -1, time.monotonic() + DRAIN_TIMEOUT_S
    while unread and time.monotonic() < deadline and not nix_has_gone():
        counts = [unread_in(descriptor) for descriptor in (2, 4)]
        if sum(counts) != unread:
            unread, deadline = sum(counts), time.monotonic() + DRAIN_TIMEOUT_S
        time.sleep(0.002 if unread else 0)


def unread_in(pipe: int) -> int:
    try:
        if not stat.S_ISFIFO(os.fstat(pipe).st_mode):
            return 0
        return int(struct.unpack("i", fcntl.ioctl(pipe, FIONREAD, bytes(4)))[0])
    except OSError:
        return 0


# ---- Copying ------------------------------------------------------------------------

# What matters to a program that reads or writes the local store.  The build users'
# group goes along because opening the store as root gives the store to that group.
PASSED_SETTINGS = (
    "build-users-group", "experimental-features", "auto-optimise-store",
    "use-case-hack", "fsync-metadata", "fsync-store-paths", "sync-before-registering",
    "use-sqlite-wal", "allow-symlinked-store", "ignored-acls", "min-free", "max-free",
)  # fmt: skip


# The ssh that nix-copy-closure finds first in its PATH: it joins that program with us, on
# descriptors 8 and 9, so that we are the builder to it.  It behaves as an ssh that shares
# nothing, which every version can use: -O check fails, and it says `started` exactly if
# it is asked to.  When done, nix-copy-closure kills it.
STAND_IN = """#!/bin/sh
case "$*" in *"-O check"*) exit 255;; esac
exec 2> /dev/null
case "$*" in *"LocalCommand=echo started"*) echo started;; esac
PATH=$PATH:/usr/bin:/bin:/run/current-system/sw/bin
exec 3<&0
cat <&3 >&9 8<&- &
exec cat <&8 3<&- 9>&-
"""
MOVE_BYTES = 1 << 20  # at once, if the system lets pipes hold so much
BULK_BYTES, BULK_PAUSE_S = 1 << 14, 0.0005
F_SETPIPE_SZ = 1031  # of Linux; fcntl has it from Python 3.10 on


class CopyEnded(Exception):
    """The program that copies asks and reads no more."""


class Relay:
    """Stands between a program that copies and our session with the builder.

    The program's pipes are its stderr, and what it reads from and writes to as if it
    were the builder's nix-store.  Everything is moved through here, so that we know how
    much, and what nix-copy-closure --from learns of: only of the outputs that are
    wanted.  It would bring in, and register as root and unchecked, whatever else a
    builder says that they refer to.
    """

    def __init__(
        self,
        session: Session,
        child: Child,
        tell: Callable[[bytes], None],
        progress: Callable[[int], None],
    ) -> None:
        self.session, self.child = session, child
        self.tell = tell  # is given each line of the program's stderr,
        self.progress = progress  # and how many bytes have been copied, now and then
        self.stderr, self.input, self.output = child.pipes
        self.rest = b""  # of its stderr: the begun line
        self.moved = 0  # bytes
        self.patience_s = COPY_TIMEOUT_S
        self.ended = False  # its stderr has
        self.dumps_left: float = math.inf  # archives to ask for, before there is an end
        self.quiet: list[int] = []  # where nothing may be said while the program asks
        os.set_blocking(self.input, False)
        for pipe in (session.stdin, session.stdout, self.input, self.output):
            if sys.platform == "linux":
                with suppress(OSError):  # more than the user may have
                    fcntl.fcntl(pipe, F_SETPIPE_SZ, MOVE_BYTES)

    def step(self, sources: list[int], full: Iterable[int] = ()) -> set[int]:
        """Wait for one of these, and pass on what is said on both stderrs meanwhile.
        Raises CopyEnded when the program's own has ended."""
        while True:
            if self.ended:
                raise CopyEnded
            stderr = [self.session.stderr] * (self.session.stderr >= 0)
            ready = wait_readable([self.stderr, *stderr, *sources], self.patience_s, full)
            if not ready:
                raise SessionLost(f"no progress of copying in {self.patience_s} s")
            self.session.pump(ready.intersection(stderr))
            if self.stderr in ready:
                self.relay_stderr()
            if found := ready.intersection([*sources, *full]):
                return found

    def relay_stderr(self) -> None:
        data = os.read(self.stderr, 65536)
        self.ended = not data
        lines = (self.rest[:65536] + data).split(b"\n")
        self.rest = lines.pop() if data else b""
        for line in lines:
            self.tell(line)

    def finish(self) -> None:
        """Wait for the end of the program."""
        with suppress(CopyEnded):
            self.step([])

    # What the program says and hears

    def read(self, count: int) -> bytes:
        """Exactly so much of what it says; CopyEnded at its end."""
        data = b""
        while len(data) < count:
            if self.session.stdout in self.step([self.output, *self.quiet]):
                self.hear_surplus()
                continue
            more = os.read(self.output, count - len(data))
            if not more:
                raise CopyEnded
            data += more
        return data

    def hear_surplus(self) -> None:
        """Nothing was asked of the builder, and it says something: its archive is longer
        than it had said.  Or it ends, as it was told."""
        self.quiet = []
        if os.read(self.session.stdout, TAIL_BYTES):
            raise Spoilt("size mismatch importing what the builder has")

    def reply(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self.input, view) :]
            except BlockingIOError:
                self.step([], [self.input])
            except BrokenPipeError:
                raise CopyEnded from None

    def pass_on(self, count: int, see: Callable[[bytes], None] | None = None) -> bytes:
        """So much of what the builder says; see is given all of it.  Returns the last
        of it, which is all of what is short."""
        kept = b""
        while count:
            data = self.session.take(min(count, MOVE_BYTES), self.step)
            self.reply(data)
            if see:
                see(data)
            count -= len(data)
            kept = (kept + data[-TAIL_BYTES:])[-TAIL_BYTES:]
            self.count(data)
        return kept

    def count(self, data: bytes) -> None:
        self.moved += len(data)
        self.progress(self.moved)
        if len(data) >= BULK_BYTES:  # much is coming: let it pile up, to move more at once
            time.sleep(BULK_PAUSE_S)

    def greet(self) -> None:
        """Be a builder that says hello; our session has had its own."""
        start = self.read(8)
        if start.startswith(b"exec "):  # what Lix 2.93.0 says to a shell of its own
            while self.read(1) != b"\n":
                pass
            start = self.read(8)
        if start != integer(SERVE_HELLO):
            raise Error("nix-copy-closure does not speak as expected")
        self.welcome()

    def welcome(self) -> None:
        """Also a second time: after an error of its own, it may connect once more."""
        self.read(8)  # its version
        self.reply(integer(SERVE_REPLY) + integer(self.session.version))

    def send(self, there: set[str], lacking: set[str]) -> None:
        """Be the builder that it copies to, and let nothing wait for a round trip: which
        paths are there we know, as far as these say, and the builder's answers to what
        is copied are heard when all is sent.  If the session ends, it hears that its ssh
        has ended, and fails."""
        self.there, self.lacking = there, lacking
        lost: SessionLost | None = None
        with suppress(CopyEnded):
            self.greet()
            try:
                while True:
                    self.take_in(read_integer(self.read))
            except SessionLost as error:
                lost = error
                self.hang_up()
        self.finish()
        if lost:
            raise lost

    def take_in(self, command: int) -> None:
        """One command of nix-copy-closure --to, Nix 2.x."""
        if command == ADD_TO_STORE_NAR:
            self.take_archive()
        elif command == SERVE_HELLO:
            self.welcome()
        elif command == QUERY_VALID_PATHS:
            flags, asked = self.read(16), set(read_strings(self.read))
            if asked <= self.there | self.lacking:
                self.reply(strings(sorted(asked & self.there)))
            else:
                self.ask(integer(command) + flags + strings(sorted(asked)))
                self.reply(strings(read_strings(self.builders_reader())))
        elif command == QUERY_PATH_INFOS:
            asked = set(read_strings(self.read))
            if asked <= self.lacking:
                self.reply(string(""))
            else:
                self.ask(integer(command) + strings(sorted(asked)))
                infos = read_infos(self.builders_reader(), self.session.version)
                self.reply(b"".join(i.encode() for i in infos.values()) + string(""))
        else:  # such as ImportPaths, for builders before 2.1: the rest goes as it is
            self.ask(integer(command))
            while self.exchange():
                pass

    def exchange(self) -> bool:
        """Move what is there, both ways; False at the end of what it says."""
        ready = self.step([self.output, self.session.stdout])
        if self.output in ready:
            data = os.read(self.output, MOVE_BYTES)
            if not data:
                return False
            self.session.write(data)
            self.count(data)
        if self.session.stdout in ready or self.session.inbox:
            self.reply(self.session.take(MOVE_BYTES, self.step))
        return True

    def take_archive(self) -> None:
        """A path: its name, deriver, hash, references, time, size, whether it was built
        here, signatures and content address; and its archive, of that size."""
        path = read_string(self.read)
        self.there.add(path)
        self.lacking.discard(path)
        head = string(path) + string(read_string(self.read))
        head += string(read_string(self.read))
        head += strings(read_strings(self.read)) + self.read(8)
        size = read_integer(self.read)
        tail = self.read(8) + strings(read_strings(self.read))
        tail += string(read_string(self.read))
        self.session.write(integer(ADD_TO_STORE_NAR) + head + integer(size) + tail)
        while size:
            self.step([self.output])
            data = os.read(self.output, min(size, MOVE_BYTES))
            if not data:
                raise CopyEnded
            self.session.write(data)
            size -= len(data)
            self.count(data)
        Answer(self.session, self.hear_of_copy, self.patience_s)
        self.reply(integer(1))

    def hear_of_copy(self, deadline: float) -> None:
        """Whether what was copied is there: the builder says 1, or its end."""
        if read_integer(self.session.reader(deadline)) != 1:
            raise Nonsense("it does not say that it has what was copied")

    def ask(self, question: bytes) -> None:
        self.session.hear_all()
        self.session.write(question)

    def builders_reader(self) -> Read:
        return self.session.reader(time.monotonic() + self.patience_s)

    def hang_up(self) -> None:
        for pipe in (self.input, self.output):
            self.child.pipes.remove(pipe)
            os.close(pipe)

    def offer(self, infos: dict[str, PathInfo], last: bool) -> None:
        """Be a builder that has these paths, in whose closure there is nothing else.
        Their archives come from the true one, which is asked no more after the last."""
        self.dumps_left = len(infos) if last else math.inf
        self.quiet = [self.session.stdout]
        with suppress(CopyEnded):
            self.greet()
            while True:
                self.answer(read_integer(self.read), infos)
        self.finish()

    def answer(self, command: int, infos: dict[str, PathInfo]) -> None:
        if command == QUERY_CLOSURE:
            self.read(8)  # whether outputs of derivations are meant, too
            asked = read_strings(self.read)
            self.reply(strings(path for path in asked if path in infos))
        elif command == QUERY_PATH_INFOS:
            found = [infos[p] for p in read_strings(self.read) if p in infos]
            self.reply(b"".join(info.encode() for info in found) + string(""))
        elif command == DUMP_STORE_PATH:
            path = read_string(self.read)
            if path not in infos:
                raise Error(f"nix-copy-closure asks for {path}, which nobody wanted")
            self.ask_for_archive(path)
            self.pass_on(infos[path].size)
        elif command == SERVE_HELLO:
            self.welcome()
        else:
            raise Error(f"nix-copy-closure asks for something unknown ({command})")

    def ask_for_archive(self, path: str) -> None:
        self.session.write(integer(DUMP_STORE_PATH) + string(path))
        self.dumps_left -= 1
        if not self.dumps_left:
            self.session.ask_no_more()

    # For nix-store --import

    def export(self, infos: dict[str, PathInfo], last: bool) -> None:
        """Write these as nix-store --export would, each behind those it refers to."""
        self.dumps_left = len(infos) if last else math.inf
        with suppress(CopyEnded):
            for info in infos.values():
                self.ask_for_archive(info.path)
                self.reply(integer(1))
                if not is_hash(info.hash, self.pass_archive()):
                    raise Spoilt(f"hash mismatch importing '{info.path}'")
                names = string(info.path) + strings(info.references)
                self.reply(integer(EXPORT_MAGIC) + names)
                self.reply(string(info.deriver) + integer(0))
            self.reply(integer(0))
        self.finish()

    def pass_archive(self) -> bytes:
        """Pass on one archive (NAR), and not a byte behind its end: there, a builder
        could add paths of its own.  It is a tree of strings, where what follows
        `contents`, `target` and `name` is data.  Returns its SHA-256."""
        import hashlib

        digest, depth, word = hashlib.sha256(), 0, b""
        while depth or word != b")":
            length = int.from_bytes(self.pass_on(8, digest.update), "little")
            padded = length + -length % 8
            if word in (b"contents", b"target", b"name"):
                self.pass_on(padded, digest.update)
                word = b""
            elif length > 16:
                raise Nonsense("what it sends is no archive")
            else:
                word = self.pass_on(padded, digest.update)[:length]
                depth += (word == b"(") - (word == b")")
        return digest.digest()


# What the program that brings outputs in says if the fault is theirs, not that of the
# store here (Nix's local-store.cc, archive.cc, export-import.cc, all versions).
SPOILT_SIGNS = ("hash mismatch importing", "size mismatch importing", "is not valid",
                "bad archive", "Nix archive", "look like something created by")  # fmt: skip


# What Nix says of a build or a copy for which there was no room.
FULL_SIGNS = ("lack of free disk space", "No space left on device", "disk is full")


class Copier:
    """The programs of the calling Nix that copy, and one builder."""

    def __init__(
        self, program: str, version: tuple[int, ...], talk: Talk, session: Session
    ) -> None:
        self.program, self.version, self.talk = program, version, talk
        self.session, self.nix = session, session.link.nix
        self.told = 0.0  # of progress, last
        self.problem = ""  # what the running program says from its first error on
        self.relay: Relay | None = None  # of the running program
        self.environ = session.link.copy_environ()
        if self.nix.store.remote:
            self.environ["NIX_REMOTE"] = self.nix.store.remote
        folder = stand_in(session.link.directory)
        # 1.x has a Perl script of other ways, which connects by itself to send.
        self.joined = bool(folder) and self.version >= (2,)
        if self.joined:
            self.environ["PATH"] = f"{folder}:{self.environ['PATH']}"

    @property
    def store_program(self) -> str:
        return f"{os.path.dirname(self.program)}/nix-store"

    def options(self) -> list[str]:
        """Settings go as --option, which every 2.x knows (NIX_CONFIG only 2.4+)."""
        settings = self.nix.settings
        known = [name for name in PASSED_SETTINGS if name in settings]
        return [w for name in known for w in ("--option", name, settings[name])]

    def command(self, *flags: str) -> list[str]:
        return [self.program, *flags, alias(self.session.link.machine), *self.options()]

    # Sending

    def send(self, paths: set[str], substitute: bool, there: set[str]) -> None:
        """Copy the closures of these paths to the builder, of which it has those."""
        command = self.command("--to", *["--use-substitutes"] * substitute)
        there = set(there)
        for batch in batches(sorted(paths)):
            try:
                problem = self.run(
                    [*command, *batch], {}, lambda relay: self.join(relay, there, paths)
                )
            except SessionLost as error:
                if not self.words_of_the_end():
                    raise
                problem = " ".join(self.problem.split()) or str(error)
            if problem:
                raise self.blame_for_sending(batch, problem)

    def join(self, relay: Relay, there: set[str], paths: set[str]) -> None:
        if self.joined:
            relay.send(there, paths - there)
        else:
            relay.patience_s = OWN_SSH_COPY_TIMEOUT_S
            relay.finish()

    def blame_for_sending(self, paths: Iterable[str], problem: str) -> Error:
        """The error to raise.  It is mostly the builder's fault, unless a path is gone
        or spoilt here."""
        theirs = self.words_of_the_end()
        tail = decode(self.session.tail)
        _, spoilt, words = tail.partition("hash mismatch importing")
        files = map(self.nix.store.file, paths)
        here = bool(spoilt) or not all(map(os.path.lexists, files))
        problem = " ".join(f"{spoilt}{words}".split()) or join_words(theirs, problem)
        if not here and trouble(theirs)[0] is None:  # it found them odd
            words = self.verify(sorted(paths))
            here, problem = bool(words), words or problem
        return Error(problem) if here else SessionLost(problem)

    def words_of_the_end(self) -> str:
        """What the builder said if the session has ended, and not in peace."""
        return self.session.last_words() if self.session.child.wait(1) else ""

    def verify(self, paths: list[str]) -> str:
        """What is wrong with these in the store here."""
        for batch in batches(paths):
            child = Child([self.store_program, "--verify-path", *batch], self.environ, "2")
            if words := printable(" ".join(child.output().split())):
                return words[:TAIL_BYTES]
        return ""

    # Fetching

    def fetch(
        self,
        outputs: list[str],
        infos: dict[str, PathInfo],
        inputs: list[str],
        locks: OutputLocks,
    ) -> None:
        """Bring exactly these into the local store, past the locks that Nix holds on
        them.  infos: what the builder says of them.  Raises Spoilt if one of them may
        not come in."""
        self.check(outputs, inputs, infos)
        if self.version >= (2, 29):
            locks.retire(outputs)
        ordered = in_order(infos)
        for batch in batches(ordered):
            environ = {}
            if self.version < (2, 29):
                environ["NIX_HELD_LOCKS"] = " ".join(batch)
            some = {path: infos[path] for path in batch}
            problem = self.bring(some, environ, batch[-1] == ordered[-1])
            if problem:
                raise self.blame_for_fetching(problem)

    def bring(
        self, infos: dict[str, PathInfo], environ: dict[str, str], last: bool
    ) -> str:
        """These, each behind those it refers to; returns what went wrong, or ""."""
        if self.joined:
            command = [*self.command("--from"), *infos]
            return self.run(command, environ, lambda relay: relay.offer(infos, last))
        command = [self.store_program, "--import", *self.options()]
        join: Callable[[Relay], None] = lambda relay: relay.export(infos, last)
        return self.run(command, environ, join, "201")

    def check(
        self, outputs: list[str], inputs: list[str], infos: dict[str, PathInfo]
    ) -> None:
        """Every output is there, and what it refers to is another of them, an input, or
        otherwise valid here already; no other path will come in."""
        for output in outputs:
            if output not in infos:
                raise Spoilt(f"it says that '{output}' was built, but does not have it")
        wanted, known = set(outputs), {*outputs, *inputs}
        if not infos.keys() <= wanted:
            raise Nonsense("it answers of paths that it was not asked for")
        strange = {r for info in infos.values() for r in info.references} - known
        invalid = self.invalid_here(sorted(strange))
        for output, info in infos.items():
            if info.deriver and not self.nix.store.owns(info.deriver):
                raise Spoilt(f"it says that {info.deriver[:200]!r} made '{output}'")
            if found := sorted(invalid.intersection(info.references)):
                raise Spoilt(f"the output '{output}' refers to '{found[0]}', which is "
                             "neither an output of this build nor valid here; it was "
                             "refused")  # fmt: skip

    def invalid_here(self, paths: list[str]) -> set[str]:
        """Those of the paths that are not valid in the store here."""
        ours = [path for path in paths if self.nix.store.owns(path)]
        invalid = set(paths) - set(ours)
        for batch in batches(ours):
            command = [self.store_program, "--check-validity", "--print-invalid", *batch]
            child = Child(command, self.environ, "1")
            words = child.output().split()
            if child.wait() != 0:
                raise Error("the store here does not say whether it has what an output "
                            "refers to")  # fmt: skip
            invalid.update(words)
        return invalid

    def blame_for_fetching(self, problem: str) -> Error:
        """The error to raise.  After it could be built, that an output cannot be brought
        in is mostly the fault of the store here."""
        if theirs := self.words_of_the_end():
            return SessionLost(join_words(theirs, problem))
        spoilt = any(sign in problem for sign in SPOILT_SIGNS)
        return Spoilt(problem) if spoilt else Error(problem)

    # Both

    def run(
        self,
        command: list[str],
        environ: dict[str, str],
        join: Callable[[Relay], None],
        piped: str = "289",
    ) -> str:
        """Run it to its end, joined with the builder; returns what went wrong, or ""."""
        self.problem = ""
        child = Child(command, {**self.environ, **environ}, piped)
        try:
            self.relay = Relay(self.session, child, self.tell, self.tell_progress)
            join(self.relay)
            status = child.wait()
        finally:
            child.kill()
            self.talk.end(1)
        if status == 0:
            return ""
        if status is not None and status < 0:  # the session is in the middle of it
            raise SessionLost(f"{command[0]} was killed by signal {-status}")
        words = " ".join(self.problem.split()).removeprefix("error: ")
        name = os.path.basename(command[0])
        return f"{words or 'it gave no reason'} ({name}, status {status})"

    def tell(self, data: bytes) -> None:
        """Pass a line of its stderr on to Nix."""
        line = printable(decode(data))  # Lix may be told to colour
        wrong = line.startswith("error:") and "(ignored)" not in line
        if self.problem or wrong:  # it goes into our own message
            self.problem = f"{self.problem} {line}"[:TAIL_BYTES]
        elif line:
            self.tell_line(line)

    def tell_progress(self, moved: int) -> None:
        """At most ten times a second."""
        if time.monotonic() > self.told + 0.1:
            self.told = time.monotonic()
            self.talk.progress(moved)

    def tell_line(self, line: str) -> None:
        """Of `copying path 'P' to 'ssh://b1'...` as Nix itself would, to its own."""
        if self.nix.old or not line.startswith("copying path '"):
            self.talk.say(INFO, line)
            return
        path, way, machine = f"{line}' ' '".split("'")[1:4]
        here = self.nix.store.remote or "local"
        ends = (machine, here) if "from" in way else (here, machine)
        self.talk.begin(1, line.rstrip("."), INFO, COPY_PATH, path, *ends)
        if self.relay:
            self.relay.moved = 0


def is_hash(text: str, sha256: bytes) -> bool:
    """Whether that is what is meant by Nix's text: base 16 or Nix's own base 32.  What
    is no such text, as with old builders, says nothing."""
    kind, _, digest = text.partition(":")
    number = int.from_bytes(sha256, "little")
    digits = (STORE_DIGITS[number >> 5 * place & 31] for place in reversed(range(52)))
    return kind != "sha256" or digest in (sha256.hex(), "".join(digits))


def join_words(*words: str) -> str:
    return "; ".join(dict.fromkeys(filter(None, words)))


def in_order(infos: dict[str, PathInfo]) -> list[str]:
    """The paths, each behind those of the others that it refers to."""
    left, order = dict(infos), []
    while left:
        free = [p for p in sorted(left) if not (left.keys() - {p}) & {*left[p].references}]
        if not free:
            raise Spoilt("its outputs refer to each other in a circle")
        order += free
        for path in free:
            del left[path]
    return order


def stand_in(directory: str) -> str:
    """A folder in that directory whose only program is the stand-in for ssh; "" if it
    cannot be written, or nothing may be executed there."""
    import zlib

    folder = f"{directory}/bin-{zlib.crc32(STAND_IN.encode()):08x}"
    program = f"{folder}/ssh"
    with suppress(OSError):
        os.makedirs(folder, 0o700, exist_ok=True)
        keep(program, STAND_IN, 0o700)
    return folder if os.access(program, os.X_OK) else ""


def program_version(program: str, nix: Nix, slots: SlotDirectory) -> tuple[int, ...]:
    """(2, 26, 3) for a nix-copy-closure of that version.

    Asking takes 30 ms, so the answer is kept for as long as the program's file is the
    same.
    """
    import zlib

    info = os.stat(program)
    key = f"{program} {info.st_dev} {info.st_ino} {info.st_size} {info.st_mtime_ns}"
    directory = private_directory(f"{slots.path}/ssh")
    path = f"{directory}/version-{zlib.crc32(encode(key)):08x}"
    kept = read_private(path) or ""
    numbers = [number for number in kept.removesuffix("\n").split(".") if number]
    if kept.endswith("\n") and len(numbers) > 1 and only("".join(numbers), DIGITS):
        return tuple(map(int, numbers))
    child = Child([program, "--version"], child_environ(nix), "1")
    version = parse_version(child.output())
    if child.wait() == 0:
        with suppress(OSError):  # a full disk
            write_private(path, ".".join(map(str, version)) + "\n")
    return version


def parse_version(text: str) -> tuple[int, ...]:
    """Of `nix-copy-closure (Nix) 2.26.3`.  Lix counts on from Nix 2.18, whose locks it
    has; in Nix 1.x it is a Perl script that has no --version."""
    numbers: list[int] = []
    for part in text.split(" ")[-1].strip().split("."):
        digits = part[: len(part) - len(part.lstrip(DIGITS))]
        numbers += [int(digits[:9])] if digits else []
        if digits != part:  # 2.35pre20260101_abc
            break
    if len(numbers) < 2:
        return (1, 11)
    return (2, 18) if "Lix" in text else tuple(numbers)


def batches(paths: list[str]) -> Iterator[list[str]]:
    """Cut into lists that fit on a command line."""
    batch: list[str] = []
    size = 0
    for path in paths:
        if batch and size + len(path) > COPY_BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(path)
        size += len(path) + 1
    if batch:
        yield batch


class OutputLocks:
    """The locks on the outputs, which the Nix that started us holds while we run.

    Importing an output takes the same lock.  Up to 2.28 the importing program skips
    those that NIX_HELD_LOCKS names.  From 2.29 we retire them as their holder may:
    unlink the lock's file and then write into it, so that whoever gets the old lock
    sees that it is stale and opens a fresh one.  That is sound only while the holder
    lives, only for the very file it held when we accepted, and only once: afterwards
    the fresh lock may be another's.
    """

    def __init__(self, store: Store, outputs: Iterable[str]) -> None:
        self.parent = os.getppid()
        self.files = {output: f"{store.file(output)}.lock" for output in outputs}
        self.seen = {output: self.identity(file) for output, file in self.files.items()}

    @staticmethod
    def identity(file: str | int) -> tuple[int, int] | None:
        try:
            info = os.stat(file) if isinstance(file, int) else os.lstat(file)
        except FileNotFoundError:
            return None
        return info.st_dev, info.st_ino

    def retire(self, outputs: Iterable[str]) -> None:
        for output in outputs:
            expected = self.seen.pop(output, None)
            if os.getppid() != self.parent or nix_has_gone():
                raise NixGone
            if expected:
                self.retire_file(self.files[output], expected)

    def retire_file(self, path: str, expected: tuple[int, int]) -> None:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return
        try:
            if self.identity(descriptor) == expected:
                os.unlink(path)
                os.write(descriptor, b"d")
        finally:
            os.close(descriptor)


# ---- One build, from accept to outputs ----------------------------------------------


class Sending:
    """The right to send some paths to a machine, when nobody else sends any of them.

    So all hooks do not send the same, and a small build waits for another's gigabytes
    only if it needs those too.  The rights are a few locks, the first of which the
    stock hook knows too; their files name what is sent, or else it may be anything.
    """

    def __init__(self, slots: SlotDirectory, name: str, paths: set[str]) -> None:
        name += ".upload-lock"
        own = (f"{slots.own}/{name}.{number}" for number in range(1, SENDERS))
        self.locks = [f"{slots.path}/{name}", *own]
        self.slots = slots
        self.hashes = {path.rpartition("/")[2][:32] for path in paths}
        self.descriptor = -1

    def __enter__(self) -> bool:
        """Whether we had to wait, and others may have sent what we were to send."""
        waited, deadline = False, time.monotonic() + UPLOAD_LOCK_TIMEOUT_S
        with suppress(Error):  # no room for the locks' files: go on without the right
            while time.monotonic() < deadline and (descriptor := self.take()) >= 0:
                waited = True
                try:
                    while not try_lock(descriptor, fcntl.LOCK_SH):
                        wait_readable([], LOCK_POLL_S)
                        if time.monotonic() > deadline:  # the same
                            break
                finally:
                    os.close(descriptor)
        return waited

    def take(self) -> int:
        """Take a lock, or return one to wait for."""
        with self.slots.main_lock():
            opened = [open_lock(lock) for lock in self.locks]
            free = [descriptor for descriptor in opened if try_lock(descriptor)]
            busy = [descriptor for descriptor in opened if descriptor not in free]
            rivals = [descriptor for descriptor in busy if self.shares(descriptor)]
            awaited = rivals or ([] if free else busy)
            chosen = (awaited or free)[0]
            for descriptor in opened:
                if descriptor != chosen:
                    os.close(descriptor)
            if awaited:
                return chosen
            self.descriptor = chosen
            write_into(chosen, " ".join(self.hashes))
        return -1

    def shares(self, descriptor: int) -> bool:
        """Whether something of ours may be sent by who holds that lock."""
        said = read_lock(descriptor)
        return not said or not self.hashes.isdisjoint(said.split())

    def __exit__(self, *error: object) -> None:
        if self.descriptor >= 0:
            with suppress(OSError):
                os.ftruncate(self.descriptor, 0)
            os.close(self.descriptor)


class Build:
    """An accepted build: where it runs and all that belongs to it."""

    def __init__(
        self, hook: Hook, path: str, derivation: Derivation, fit: list[Machine]
    ) -> None:
        self.hook, self.nix, self.talk = hook, hook.nix, hook.talk
        self.path, self.derivation = path, derivation
        self.inputs: list[str] = []
        self.missing: list[str] = []  # outputs
        self.built: Answer | None = None  # to the question to build, if it was asked
        self.task = ("build", "", "")  # verb, preposition and machine, for messages
        self.substitute = self.nix.enabled("builders-use-substitutes")
        self.fit = fit
        self.avoided: set[Machine] = set()
        self.since = time.time()
        self.pause_s = float(PAUSE_S)
        self.trouble_since = 0.0  # without having come as far as to build
        self.verdict_elsewhere: Error | None = None  # of a machine that may be to blame
        self.said: set[str] = set()
        self.may_pass = False  # what the machines tried have failed for
        self.greeted = False  # by the builder in this attempt,
        self.begun = False  # which was asked to build, too
        self.losses = 0  # after that

    def understand(self, inputs: list[str], outputs: list[str]) -> None:
        """Take the lists that follow an accept: outputs are names (2.4+) or paths."""
        by_name = {output.name: output.path for output in self.derivation.outputs}
        self.inputs = inputs
        self.missing = [by_name.get(output, output) for output in outputs]
        for path in inputs:
            self.nix.store.name(path)
        if not set(self.missing) <= set(by_name.values()):
            raise Error(f"'{self.path}' has no output {', '.join(outputs)}")
        self.locks = OutputLocks(self.nix.store, self.missing)

    def perform(self, place: Slot | Line) -> None:
        """Send the inputs, build, bring the outputs in, on one machine after another
        for as long as it is the machine or the way to it that fails."""
        while True:
            try:
                self.slot = self.wait(place) if isinstance(place, Line) else place
                self.link = self.hook.link(self.slot.machine)
                self.attempt()
                return
            except (Unreachable, SessionLost, NotHere) as error:
                place = self.move(error)
            except Error as error:
                if isinstance(error, (BuildFailed, BuildTimedOut, BuildBroken)):
                    raise
                raise Error(self.failure(error)) from None
            finally:
                self.talk.end()

    def wait(self, line: Line) -> Slot:
        """In the end also say where the build goes, which Nix does not know."""
        self.talk.begin(0, f"waiting for a builder for {short(self.path)}")
        if self.nix.old:
            self.talk.say(INFO, f"waiting for a builder for '{self.path}'")
        slot = line.wait()
        name = slot.machine.name(self.nix)
        self.say_once(INFO, f"'{self.path}' has waited, and goes to '{name}'")
        return slot

    def say_once(self, level: int, text: str) -> None:
        """However often it is tried again."""
        if text not in self.said:
            self.said.add(text)
            self.talk.say(level, text)

    def attempt(self) -> None:
        """All of it on the machine of our slot."""
        self.greeted = self.begun = False
        self.begin("connecting", "connect for", "to")
        self.session = self.hook.session or self.hook.open_session(self.link, self.path)
        self.hook.session = None
        program, version = self.hook.copy_program, self.hook.copy_version
        self.copier = Copier(program, version, self.talk, self.session)
        try:
            answer = self.session.ask_valid(self.inputs, self.substitute)
            if not self.session.version:  # and Nix no longer waits for our reply
                self.session.deadline = time.monotonic() + GREETING_TIMEOUT_S
                self.session.first_answer(self.session.awaited[0])
            there = answer.get()
            self.greeted = True
            self.hook.slots.note_success(self.slot.machine.slot_name(self.nix))
            self.trace("build-remote")
            self.begin("sending", "send the inputs of", "to")
            self.send_inputs(there, self.ask_to_build)
            self.trace("build-remote-start")
            self.begun, self.trouble_since = True, 0.0
            self.begin("building", "build", "on")
            infos = self.build()
            self.begin("fetching", "fetch the outputs of", "from")
            self.leave_slot()
            self.fetch(infos)
            self.session.finish()
        finally:
            self.session.cancel()
            self.slot.free()

    def fetch(self, infos: dict[str, PathInfo]) -> None:
        try:
            self.copier.fetch(self.missing, infos, self.inputs, self.locks)
        except Spoilt as error:
            raise self.elsewhere(str(error), BuildBroken(self.failure(error))) from None

    def elsewhere(self, words: str, verdict: Error) -> Error:
        """What to raise if this machine may be to blame: that once another may try, if
        one is there, else the verdict.  If its disk is full, each other one may."""
        others = {m.slot_name(self.nix): m for m in self.fit if m != self.slot.machine}
        full = any(sign in words for sign in FULL_SIGNS)
        if full:
            others = {n: m for n, m in others.items() if m not in self.avoided}
        away = self.hook.away(others, self.path)
        if (self.verdict_elsewhere and not full) or len(away) == len(others):
            return verdict
        return NotHere(words, verdict)

    def leave_slot(self) -> None:
        """Let the next build start while we fetch, unless as many fetch already as may
        build: else sessions would pile up on a machine that builds fast."""
        slots, machine = self.hook.slots, self.slot.machine
        place = slots.fetching_place(machine, machine.slot_name(self.nix))
        if place:
            self.slot.free()
            self.slot = place
            self.slot.note("fetching", self.path)

    def move(self, error: Error) -> Line:
        """Where to wait for the next attempt.  If a session was lost: first for the
        same machine, whose connection may have been an old one, and which may have the
        outputs already.  After that, and if it could not do the build, for any other;
        if all have failed, for any, after a while."""
        self.slot.free()
        machine = self.slot.machine
        if isinstance(error, Away) and self.verdict_elsewhere:
            raise self.verdict_elsewhere
        if isinstance(error, Away):
            self.may_pass = True
        else:
            self.note(error)
            self.say_once(WARN, f"{self.failure(error)}; trying again")
        again = isinstance(error, SessionLost) and machine not in self.avoided
        self.avoided.add(machine)
        if again:
            fit = [machine]
        else:
            fit = [other for other in self.fit if other not in self.avoided]
        if not fit:
            self.start_over(error)
        impatient = bool(again or self.verdict_elsewhere)
        line = Line(self.hook, fit or self.fit, self.path, impatient=impatient,
                    since=self.since)  # fmt: skip
        line.join()
        return line

    def start_over(self, error: Error) -> None:
        """After a while any machine may be tried again, unless that is of no use."""
        if not self.may_pass:
            raise Error(self.failure(error))
        self.may_pass = False
        everywhere = {other.slot_name(self.nix): other for other in self.fit}
        if why := self.hook.despair(everywhere):
            raise Error(self.failure(Error(why)))
        wait_readable([], self.pause_s)
        self.pause_s = min(2 * self.pause_s, PAUSE_LIMIT_S)
        self.avoided.clear()

    def note(self, error: Error) -> None:
        """What an attempt has come to: raises if there should be no other."""
        now = time.monotonic()
        self.trouble_since = self.trouble_since or now
        passes, _ = trouble(str(error))
        self.may_pass |= passes is not False or self.begun  # a log may say anything
        self.losses += isinstance(error, SessionLost) and (self.begun or not passes)
        if isinstance(error, NotHere):
            self.verdict_elsewhere = error.verdict
        elif isinstance(error, Unreachable) or (
            not self.greeted and self.slot.machine in self.avoided
        ):
            self.hook.note_failure(self.slot, error)
        elif not self.greeted:  # its connection may be the trouble
            self.link.retire(self.link.socket)
        if self.losses > LOSSES or now > self.trouble_since + AWAY_TIMEOUT_S:
            raise Error(self.failure(error))

    def begin(self, phase: str, verb: str, preposition: str) -> None:
        self.task = verb, f" {preposition} ", f"'{self.link.name}'"
        self.slot.note(phase, self.path)
        what = phase + verb.lstrip(LETTERS)
        text = f"{what} '{self.path}' {preposition} '{self.link.name}'"
        brief = f"{what} {short(self.path)} {preposition} {self.link.name}"
        self.talk.begin(0, brief)
        self.talk.say(DEBUG, text)
        if self.nix.old and phase != "connecting":
            self.talk.say(INFO, text)

    def failure(self, error: Error) -> str:
        verb, preposition, machine = self.task
        words = with_remedy(str(error), self.link.machine.destination if machine else "")
        return f"cannot {verb} '{self.path}'{preposition}{machine}: {words}"

    def trace(self, event: str) -> None:
        if self.nix.trace:
            self.talk.write(f"@ {event} {self.path} {self.link.name}")

    def send_inputs(self, there: set[str], ask: Callable[[], None]) -> None:
        """Make the builder have, and keep, all inputs, and ask it for what comes next,
        which does not wait for it to say that it has them.

        Asking has locked what is there, and the builder substitutes meanwhile if it
        should.
        """
        lacking = set(self.inputs) - there
        if not lacking:
            ask()
            return
        with self.sending(lacking) as waited:
            if waited:
                lacking -= self.session.ask_valid(lacking, False).get()
            self.copier.send(lacking, self.substitute, set(self.inputs) - lacking)
            try:
                answer = self.session.ask_valid(lacking, False)
                ask()
                lacking -= answer.get()
            except SessionLost as error:  # it may refuse so late what was sent
                raise self.copier.blame_for_sending(lacking, str(error)) from None
        if lacking:
            raise Error(f"it still lacks {min(lacking)} after that was sent")

    def ask_to_build(self) -> None:
        """In the way that only trusted users may, but in which nothing else need be
        sent; and for what the fetch will need."""
        self.built = None
        if self.session.version >= 0x201:
            encoded = self.derivation.encode(self.inputs)
            then = infos_question(self.missing)
            self.built = self.session.ask_to_build(self.path, encoded, self.nix, then)
            self.infos = self.session.infos_answer()

    def sending(self, paths: set[str]) -> Sending:
        return Sending(self.hook.slots, file_name(self.link.name), paths)

    def build(self) -> dict[str, PathInfo]:
        """Build on the builder, in whichever way it lets us; returns what it says of the
        outputs."""
        try:
            status, message = self.built.get() if self.built else self.build_closure()
        except SessionLost:
            if b"you are not privileged" not in self.session.tail:
                raise
            self.reconnect()
            status, message = self.build_closure()
        self.trace("build-remote-done")
        if status:
            self.session.finish()
            raise self.verdict(status, message)
        return dict(self.infos.get())

    def verdict(self, status: int, message: str) -> Error:
        # A daemon on the builder quotes the end of the log, which Nix has already.
        message, quotes, _ = message[:TAIL_BYTES].partition(" log lines:")
        if quotes:
            message = message.rstrip(DIGITS + " ")[: -len("last")].rstrip(" ;\n")
        message = message or "the log says why"
        text = f"build of '{self.path}' on '{self.link.name}' failed: {message}"
        kind = {TIMED_OUT: BuildTimedOut, MISC: BuildBroken}.get(status, BuildFailed)
        if status not in (TRANSIENT, MISC):
            return kind(text)
        return self.elsewhere(message, kind(text))

    def reconnect(self) -> None:
        """A new session, whose inputs are kept alive again: the builder has ended the
        old one because it does not trust its user to build a bare derivation."""
        text = "does not trust its user; sending the derivation's closure"
        self.talk.say(INFO, f"'{self.link.name}' {text}")
        self.session.cancel()
        self.session = self.copier.session = Session(self.link)
        answer = self.session.ask_valid(self.inputs, self.substitute)
        self.session.greet()
        self.send_inputs(answer.get(), lambda: None)

    def build_closure(self) -> tuple[int, str]:
        """As an untrusted user may build, and the only way on builders before 1.10."""
        with self.sending({self.path}):
            self.copier.send({self.path}, False, set())
            self.session.hear_all()
        status, message = self.session.build_paths(self.path, self.nix)
        if not status:
            self.infos = self.session.ask_infos(self.missing)
        return status, message


# ---- The conversation ---------------------------------------------------------------


def read_stdin(count: int) -> bytes:
    data = sys.stdin.buffer.read(count)
    if len(data) != count:
        raise EOFError
    return data


def read_line() -> str:
    line = sys.stdin.buffer.readline(WIRE_LIMIT_BYTES)
    if not line.endswith(b"\n"):
        raise EOFError
    return line.decode("utf-8", "surrogateescape")


def is_old_call(arguments: list[str]) -> bool:
    """Nix 1.x: localSystem maxSilentTime printBuildTrace [buildTimeout]."""
    return (
        len(arguments) in (3, 4)
        and not arguments[0].isdigit()
        and not arguments[0].startswith("-")
        and all(argument.isdigit() for argument in arguments[1:])
    )


def old_nix(arguments: list[str], environ: dict[str, str]) -> Nix:
    system, max_silent_time, trace, timeout = [*arguments, "0"][:4]
    limits = {"max-silent-time": max_silent_time, "timeout": timeout}
    return Nix(True, {"system": system, **limits}, environ, trace=trace != "0")


def new_nix(arguments: list[str], environ: dict[str, str]) -> Nix:
    """Read the settings that 2.x sends first; the last argument is its verbosity."""
    settings = {}
    while read_integer(read_stdin):
        name = read_string(read_stdin)
        settings[name] = read_string(read_stdin)
    return Nix(False, settings, environ, verbosity=int(arguments[-1]))


def requests(nix: Nix) -> Iterator[Request]:
    """One at a time, until Nix has no more."""
    while True:
        try:
            request = read_old_request() if nix.old else read_new_request()
        except EOFError:
            return
        if request is None:
            return
        yield request


def read_old_request() -> Request:
    line = read_line()
    words = line.split()
    if len(words) not in (3, 4):
        raise Error(f"cannot understand Nix's request {line!r}")
    features = frozenset(filter(None, ",".join(words[3:]).split(",")))
    return Request(words[0] == "1", words[1], words[2], features)


def read_new_request() -> Request | None:
    if read_string(read_stdin) != "try":
        return None
    willing = read_integer(read_stdin) != 0
    system, derivation = read_string(read_stdin), read_string(read_stdin)
    return Request(willing, system, derivation, frozenset(read_strings(read_stdin)))


def read_lists(nix: Nix) -> tuple[list[str], list[str]]:
    """The inputs and the missing outputs, which Nix sends after an accept."""
    if nix.old:
        return read_line().split(), read_line().split()
    return read_strings(read_stdin), read_strings(read_stdin)


# ---- The hook -----------------------------------------------------------------------


def origin() -> str:
    """The address of the machine that sends builds to the Nix that started us, if that
    serves another machine; "" if not, or if the system does not tell."""
    process = os.getppid()
    with suppress(OSError, ValueError, IndexError):
        words = process_words(process, "cmdline")
        if words[0].endswith("nix-daemon") and words[1].isdecimal():
            process = int(words[1])  # of its client, as nix-daemon shows it
            words = process_words(process, "cmdline")
        if "--serve" in words or "--stdio" in words:
            for word in process_words(process, "environ"):
                if word.startswith("SSH_CONNECTION="):
                    return word.partition("=")[2].split()[0]
    return ""


def process_words(process: int, file: str) -> list[str]:
    with open(f"/proc/{process}/{file}", "rb") as stream:
        return decode(stream.read()).split("\0")


def addresses(host: str) -> set[str]:
    import socket

    with suppress(OSError, ValueError):
        return {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    return set()


class Hook:
    """Answers Nix's requests until it accepts one, then performs that build."""

    def __init__(self, nix: Nix) -> None:
        self.nix = nix
        self.talk = Talk(nix)
        self.slots = SlotDirectory(nix.slot_directory)  # until we have looked at it
        self.machines: list[Machine] | None = None
        self.copy_program = ""
        self.copy_version: tuple[int, ...] = ()
        self.links: dict[Machine, Link] = {}
        self.session: Session | None = None  # opened before we accept
        self.origin = origin()
        self.patient_from = 0.0  # monotonic time

    def prepare(self) -> list[Machine]:
        """Read the machines; complain of bad lines once for each Nix process."""
        machines, complaints = load_machines(self.nix)
        MainLock.tell = lambda text: self.talk.say(WARN, text)
        if machines:
            self.slots = SlotDirectory.find(self.nix)
            self.slots.make()
            if self.slots.path != self.nix.slot_directory:
                complaints.append(f"{self.nix.slot_directory} is no directory that nobody else "
                                  f"can change; slots are counted in {self.slots.path}")  # fmt: skip
            directories = nix_directories(self.nix.environ)
            self.copy_program = find_program("nix-copy-closure", directories)
            self.copy_version = program_version(self.copy_program, self.nix, self.slots)
        if complaints and (not machines or self.slots.first_time("\n".join(complaints))):
            for complaint in complaints[:COMPLAINTS]:
                self.talk.say(WARN, complaint)
            if more := len(complaints[COMPLAINTS:]):
                self.talk.say(WARN, f"and {more} more; nix_build_remote.py check shows all")
        return machines

    def serve(self) -> None:
        for request in requests(self.nix):
            accepted = self.answer(request)
            if accepted:
                build, place = accepted
                build.understand(*read_lists(self.nix))
                build.perform(place)
                return

    def answer(self, request: Request) -> tuple[Build, Slot | Line] | None:
        """Reply to one request, whatever happens: without a reply Nix 2.x would give up
        everything it builds."""
        try:
            if self.machines is None:
                self.machines = self.prepare()
            return self.consider(request, self.machines)
        except Stop:
            raise
        except Error as error:
            self.talk.say(ERROR, str(error))
        except Exception:  # noqa: BLE001  (a bug of ours must not cost the reply)
            self.talk.say_bug()
        self.talk.reply("decline")
        return None

    def consider(
        self, request: Request, machines: list[Machine]
    ) -> tuple[Build, Slot | Line] | None:
        """Find a slot or a place in line, and reply; returns the build if we accept it.

        A machine with a live connection is accepted at once; else we open a session
        first, so that one that cannot be used costs no build a move.
        """
        reply = self.without_looking(request, machines)
        fit = [] if reply else self.eligible(request, machines)
        if not fit:
            self.talk.reply(reply or "decline")
            return None
        derivation = read_derivation(request.derivation, self.nix.store)
        build = Build(self, request.derivation, derivation, fit)
        line = Line(self, fit, request.derivation)
        until = time.monotonic() + REPLY_S
        for _ in fit:  # of which all may fail
            slot = self.find_slot(line, request)
            if not slot:
                break
            if self.reach(slot, build, until):
                self.talk.reply("accept", slot.machine.name(self.nix))
                return build, slot
            if time.monotonic() > until:
                if not might_build_itself(self.nix, request):
                    line.join()
                break
        if line.number >= 0:
            self.talk.reply("accept", "waiting for a builder")
            return build, line
        self.talk.reply(self.turn_down(line, request))
        return None

    def without_looking(self, request: Request, machines: list[Machine]) -> str:
        """The reply if nothing is ever sent away from here, or this is not; or ""."""
        features = f" ({', '.join(sorted(request.features))})" * bool(request.features)
        text = f"may '{request.derivation}' for {request.system}{features} be sent away?"
        self.talk.say(DEBUG, text)
        if not machines:
            self.talk.say(DEBUG, "no machines are listed")
            return "decline" if self.nix.old else "decline-permanently"
        if self.origin and might_build_itself(self.nix, request):
            self.talk.say(DEBUG, f"not sent on: it was sent here by {self.origin}")
            return "decline" if request.willing else "postpone"
        return ""

    def turn_down(self, line: Line, request: Request) -> str:
        """The reply to what no machine can take now."""
        if request.willing and might_build_itself(self.nix, request):
            return "decline"
        if len(self.away(line.machines, line.path)) == len(line.machines):
            if hopeless := self.despair(line.machines):
                if self.slots.first_time(hopeless):
                    self.talk.say(WARN, f"'{request.derivation}': {hopeless}")
                return "decline"
            self.tell_of_absence(line)
        return "postpone"

    def tell_of_absence(self, line: Line) -> None:
        """Once for each Nix and reason: all machines of that line are away."""
        noted = filter(None, map(self.slots.outage, line.machines))
        words = "; ".join(sorted({outage.words for outage in noted}))
        text = f"no machine for it can be reached now; waiting for one: {words}"
        if self.slots.first_time(text):
            self.talk.say(WARN, f"'{line.path}': {text[:TAIL_BYTES]}")

    def find_slot(self, line: Line, request: Request) -> Slot | None:
        """A slot if one is free and nobody waits; else stand in the line if Nix could
        never build this itself; else wait for a slot, but for no more than a moment."""
        might = might_build_itself(self.nix, request)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            if line.empty():
                slot = line.take()
                if slot or (line.all_away and self.despair(line.machines)):
                    return slot
            if (request.willing if might else line.join()):
                return None
            if time.monotonic() < self.patient_from:
                return None
            if time.monotonic() > deadline:
                self.patient_from = time.monotonic() + IMPATIENCE_S
                return None
            wait_readable([], WAIT_S)

    def link(self, machine: Machine) -> Link:
        if machine not in self.links:
            self.links[machine] = Link(machine, self.nix, self.slots.path)
            with suppress(Error):
                self.links[machine].sit()
        return self.links[machine]

    def reach(self, slot: Slot, build: Build, until: float) -> bool:
        """Be sure of that slot's machine by then; without it the slot is free again."""
        try:
            link = self.link(slot.machine)
            if not link.proved():
                text = f"connecting for {short(build.path)} to {link.name}"
                self.talk.begin(0, text)
                self.talk.say(DEBUG, text)
                if not link.live():
                    self.warm(build.fit, build.path)
                left = max(1.0, until - time.monotonic())
                self.session = self.open_session(link, build.path, left)
            return True
        except BaseException as error:
            slot.free()
            if not isinstance(error, (Unreachable, SessionLost)):
                raise
            self.note_failure(slot, error)
            words = with_remedy(str(error), slot.machine.destination)
            text = f"cannot build on '{slot.machine.name(self.nix)}': {words}"
            if self.slots.first_time(text):
                self.talk.say(ERROR, text)
            return False
        finally:
            self.talk.end()

    def open_session(
        self, link: Link, path: str, patience_s: float = PROBE_S
    ) -> Session:
        """A session to build that derivation in, which it is asked for; if the connection
        is proved, that is not answered yet, so that the next question can go along."""
        deadline = time.monotonic() + patience_s
        link.connect(min(LOGIN_TIMEOUT_S, patience_s))
        left = max(1.0, deadline - time.monotonic())
        try:
            session = Session(link, min(GREETING_TIMEOUT_S, left))
        except SessionLost as error:
            raise Unreachable(str(error)) from None
        try:
            answer = session.ask_valid([path], False)
            if link.proved():
                return session
            if session.first_answer(answer):
                self.make_sure_of_another_store(session)
        except SessionLost as error:
            session.cancel()
            raise Unreachable(str(error)) from None
        except BaseException:
            session.cancel()
            raise
        link.prove()
        return session

    def make_sure_of_another_store(self, session: Session) -> None:
        """Raise Unreachable if the builder's store is the one here, as it may be if all
        machines of a network share one machines file: Nix's own lock on the output
        would keep the build waiting for ever.  Mostly that is clear, since the builder
        does not have the derivation; else we ask for something that is in the store here
        for just as long, so that nobody can have put it there."""
        content = f"{self.slots.own}/{os.urandom(8).hex()}-mark"
        try:
            write_private(content, os.urandom(16).hex())
        except OSError:  # a full disk
            return
        mark = self.run_here("--add", content)
        try:
            same = session.ask_valid([mark] if mark else [], False).get(REPLY_S)
        finally:
            os.unlink(content)
            if mark:
                self.run_here("--delete", mark)
        if same:
            raise Unreachable("it is this very machine; builds would wait for ever")

    def run_here(self, *arguments: str) -> str:
        """What nix-store says when it does that to the store here."""
        program = find_program("nix-store", nix_directories(self.nix.environ))
        remote = self.nix.store.remote
        environ = child_environ(self.nix, **({"NIX_REMOTE": remote} if remote else {}))
        return Child([program, *arguments], environ, "1").output().strip()

    def note_failure(self, slot: Slot, error: Exception) -> None:
        """Of what began when we took that slot: all hooks leave its machine alone."""
        words, name = " ".join(str(error).split()), slot.machine.slot_name(self.nix)
        self.slots.first_time(f"tried {name}")
        self.slots.note_outage(name, slot.outage, words)
        if slot.machine in self.links:
            link = self.links[slot.machine]
            link.retire(link.socket)

    def away(self, machines: dict[str, Machine], path: str) -> set[str]:
        """Those that have failed, and are left alone for now."""
        entries = os.listdir(self.slots.own)
        noted = [entry[:-5] for entry in entries if entry.endswith(".down")]
        known = [name for name in noted if name in machines]
        return {name for name in known if self.is_away(name, machines[name], path)}

    def is_away(self, name: str, machine: Machine, path: str) -> bool:
        """When its time is over, somebody finds out whether it is of use again, and
        nobody waits for that."""
        outage = self.slots.outage(name)
        if not outage:
            return False
        if outage.hopeless and self.slots.first_time(f"tried {name}"):
            return False  # it may have been put right: each Nix tries it once
        if time.time() > outage.until:
            descriptor = self.slots.begin_probe(name, outage)
            if descriptor is not None:
                with suppress(OSError):  # no more processes may be made
                    if is_forked(descriptor):
                        self.probe(name, machine, outage, path)
                os.close(descriptor)
        return True

    def probe(self, name: str, machine: Machine, outage: Outage, path: str) -> None:
        """Find out, in a process of our own, whether that machine is of use again.  Only
        an answer of its nix-store says so: a connection may live over which it hangs."""
        link: Link | None = None
        try:
            link = Link(machine, self.nix, self.slots.path)
            with suppress(Error):
                link.sit()
            with suppress(OSError):
                os.unlink(f"{link.socket}.proved")
            self.open_session(link, path).cancel()
            self.slots.note_success(name)
        except (Error, OSError) as error:
            if link:
                link.retire(link.socket)
            self.slots.note_outage(name, outage, " ".join(str(error).split()))
            time.sleep(PAUSE_S)  # if that could not be noted, nobody else tries at once
        finally:
            os._exit(0)

    def despair(self, machines: dict[str, Machine]) -> str:
        """What to say if all of these have failed and it is no use to wait longer."""
        outages = list(filter(None, map(self.slots.outage, machines)))
        if len(outages) < len(machines):
            return ""
        last = max(outages, key=lambda outage: outage.since)
        if all(outage.hopeless for outage in outages):
            return f"no machine for it can be used: {last.words}"
        if last.since > time.time() - AWAY_TIMEOUT_S:
            return ""
        minutes = AWAY_TIMEOUT_S // 60
        return f"no machine for it was there for {minutes} minutes: {last.words}"

    def warm(self, fit: list[Machine], path: str) -> None:
        """Begin to connect to the likeliest machines all at once, so that a cold start
        costs one handshake and not one for each machine."""
        away = self.away({machine.slot_name(self.nix): machine for machine in fit}, path)
        there = [machine for machine in fit if machine.slot_name(self.nix) not in away]
        there.sort(key=lambda machine: rank(machine, 0))
        for machine in there[:WARM_AT_ONCE]:
            link = Link(machine, self.nix, self.slots.path)
            link.start(f"{link.base()}-0")

    def eligible(self, request: Request, machines: list[Machine]) -> list[Machine]:
        """Those that can do it; says why if none can and Nix cannot either."""
        fit, reasons = [], []
        for machine in machines:
            reason = unfit(machine, request, self.nix)
            if self.origin and not reason and self.origin in addresses(machine.host):
                reason = "is where this build comes from"
            name = machine.name(self.nix)
            verdict = reason or "can build it"
            self.talk.say(DEBUG, f"'{name}' {verdict}")
            if reason:
                reasons.append(f"'{name}' {reason}")
            else:
                fit.append(machine)
        if not fit and not might_build_itself(self.nix, request):
            why = "; ".join(reasons)
            if self.slots.first_time(why):
                text = f"no machine can build '{request.derivation}', or others like it"
                self.talk.say(WARN, f"{text}: {why}")
        return fit


def is_forked(kept: int) -> bool:
    """Go on in two processes, and say which this is.  In the new one, Nix neither waits
    for us nor kills us; of what was open, it has only that descriptor.  Raises OSError
    if there can be no more processes."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return False
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        let_go(kept)
    except BaseException:  # noqa: BLE001  (there must not be two of this hook)
        os._exit(1)
    return True


def let_go(kept: int) -> None:
    """Of all that this process shares with the one that forked it, but that descriptor."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    reader, writer = os.pipe()  # instead of Nix's: it has a reader, ourselves
    for descriptor in (0, 1, 4):
        os.dup2(null, descriptor)
    os.dup2(writer, 2)
    numbers = set(range(DESCRIPTORS))
    with suppress(OSError):
        numbers = {int(name) for name in os.listdir("/dev/fd")}
    for descriptor in numbers - {0, 1, 2, 4, kept, reader}:
        with suppress(OSError):  # locks are among them, which would stay taken
            os.close(descriptor)


def terminate(number: int, frame: object) -> None:
    raise Terminated(number)


def prepare_descriptors() -> None:
    """Descriptor 4 takes the log; 5, from 2.1 on, is its reading end, which must not
    stay open here: it would hide from us that Nix has gone.  Newer Nix leaves a mount
    namespace on 3.  None of them is for our children."""
    try:
        os.fstat(4)
    except OSError:  # started by hand
        os.dup2(2, 4)
    with suppress(OSError):  # it is not open
        if stat.S_ISFIFO(os.fstat(5).st_mode):
            os.close(5)
    for descriptor in range(3, 64):
        with suppress(OSError):
            os.set_inheritable(descriptor, False)
    import resource  # 0.3 ms

    most = DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def run_hook(arguments: list[str]) -> int:
    prepare_descriptors()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, terminate)
    environ = dict(os.environ)
    if sys.stdin is None:
        return 1
    status, talk = 0, Talk(Nix(True, {}, environ))
    try:
        caller = old_nix if is_old_call(arguments) else new_nix
        hook = Hook(caller(arguments, environ))
        talk = hook.talk
        hook.serve()
    except EOFError:
        return 1
    except Stop as stop:
        return stop.status
    except Error as error:
        talk.say(ERROR, str(error))
        status = error.status
    except Exception:  # noqa: BLE001  (2.x would drop a plain traceback)
        talk.say_bug()
        status = 1
    wait_until_read()
    return status


# ---- Started by whom ----------------------------------------------------------------


def called_by_nix(arguments: list[str]) -> bool:
    return is_old_call(arguments) or bool(arguments and arguments[-1].isdigit())


if __name__ == "__main__" and called_by_nix(sys.argv[1:]):
    exit_status = run_hook(sys.argv[1:])
    if sys.stdout:
        sys.stdout.flush()
    os._exit(exit_status)  # taking Python apart in order would cost each build 2 ms


# ==== For people =====================================================================

# check, status and explain.  A hook never comes here, and need not even compile it.

CHECK_TIMEOUT_S = 90  # for the tiny build
ROOM_B = 100 << 20  # less than that is a full disk
CLOCK_S = 60  # clocks may differ by that
BAR = 20  # characters

OK, NOTE, WRONG, UNKNOWN = "ok", "note", "wrong", "unknown"


# ---- What people see ----------------------------------------------------------------


class Screen:
    """Standard output, with colours and renewal only if it is a terminal."""

    def __init__(self, environ: dict[str, str]) -> None:
        import shutil

        self.terminal = sys.stdout.isatty()
        plain = environ.get("NO_COLOR") or environ.get("TERM") == "dumb"
        self.colours = self.terminal and not plain
        size = shutil.get_terminal_size()
        self.width, self.height = max(40, size.columns), size.lines

    def paint(self, text: str, state: str) -> str:
        code = {OK: 32, NOTE: 33, WRONG: 31}.get(state)
        return f"\x1b[{code}m{text}\x1b[0m" if code and self.colours else text

    def wrap(self, text: str, indent: str, first: str) -> list[str]:
        """Cut into lines; `first` stands before the first, `indent` before the rest."""
        import textwrap

        return textwrap.wrap(
            printable(text), self.width, initial_indent=first, subsequent_indent=indent,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip

    def say(self, text: str, indent: str = "    ", first: str = "") -> None:
        print("\n".join(self.wrap(text, indent, first)))

    def fit(self, lines: list[str]) -> list[str]:
        """As many as there is room for; a long one takes several rows."""
        room = self.height - 1
        for number, line in enumerate(lines):
            room -= max(1, math.ceil(len(line) / self.width))
            if room < 0:
                return lines[:number]
        return lines


def table(rows: list[list[str]]) -> list[str]:
    """Rows of equally many cells, as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(f"{c:{w}}" for c, w in zip(row, widths)) for row in rows)
    return [line.rstrip() for line in lines]


def duration(seconds: float) -> str:
    whole = max(0, int(seconds))
    minutes, hours = whole // 60, whole // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def amount(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def as_json(value: object) -> str:
    import json

    return json.dumps(value, indent=2)


# ---- The machines, as the hook would find them --------------------------------------


def output_of(command: list[str], environ: dict[str, str]) -> tuple[int, str, str]:
    """Exit status, and what it wrote on both."""
    import subprocess

    done = subprocess.run(
        command, env=environ, stdin=subprocess.DEVNULL, capture_output=True,
        errors="replace", check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def settings_of(text: str) -> dict[str, str]:
    """Of `nix show-config`, which is `nix config show` from 2.20 on."""
    pairs = (line.partition(" = ") for line in text.splitlines())
    return {name: value.strip() for name, separator, value in pairs if separator}


def calling_nix(environ: dict[str, str], machines: str) -> Nix:
    """What the Nix here would tell the hook.  machines: another file of them, or "".

    Raises Error if there is a Nix here that does not tell its settings.
    """
    if machines and not os.path.isfile(machines):
        raise Error(f"there is no machines file {machines}")
    machines = machines and os.path.abspath(machines)
    more = environ.get("NIX_CONFIG", "") + "\nextra-experimental-features = nix-command"
    try:
        program = find_program("nix", nix_directories(environ))
    except Error:  # a Nix 1.x, or none
        kind, machine = os.uname().sysname.lower(), os.uname().machine
        machine = {"arm64": "aarch64"}.get(machine, machine)
        if machines:
            environ = {**environ, "NIX_REMOTE_SYSTEMS": machines}
        return Nix(True, {"system": f"{machine}-{kind}"}, environ)
    for words in (["config", "show"], ["show-config"]):
        command = [program, *words]
        status, text, complaint = output_of(command, {**environ, "NIX_CONFIG": more})
        if status == 0:
            break
    else:
        raise Error(f"'nix show-config' fails: {' '.join(complaint.split())}")
    settings = settings_of(text)
    if machines:
        settings["builders"] = f"@{machines}"
    return Nix(False, settings, environ)


def where_machines_stand(nix: Nix) -> str:
    if nix.old:
        return nix.environ.get("NIX_REMOTE_SYSTEMS") or "/etc/nix/machines"
    return f"builders = {nix.settings.get('builders', '')}"


def label(machine: Machine) -> str:
    """What people call it."""
    return machine.destination + f":{machine.port}" * bool(machine.port)


def machines_named(words: list[str], nix: Nix) -> tuple[list[Machine], list[str]]:
    """Those that people mean by these words, or all if there are none; and complaints
    about the file."""
    listed, complaints = load_machines(nix)
    chosen = []
    for word in words:
        means = [m for m in listed if word in (m.host, m.uri, m.destination)]
        if not means:
            there = ", ".join(machine.host for machine in listed)
            raise Error(f"no machine {word!r} is listed in {where_machines_stand(nix)}; "
                        f"there are: {there or 'none'}")  # fmt: skip
        chosen += means
    return chosen or listed, complaints


def line_of(machine: Machine) -> str:
    """For a machines file that holds nothing else."""
    import base64

    host_key = base64.b64encode(machine.host_key.encode()).decode()
    fields = [
        machine.uri, ",".join(machine.systems), machine.key, str(machine.max_jobs),
        f"{machine.speed:g}", ",".join(sorted(machine.supported)),
        ",".join(sorted(machine.mandatory)), host_key,
    ]  # fmt: skip
    return " ".join(field or "-" for field in fields) + "\n"


# ---- check --------------------------------------------------------------------------

# Runs on the builder, on the standard input of its sh.  A login that allows nothing but
# nix-store says nothing of all this.
LOOK = """\
exec 2> /dev/null
echo "begin ."
echo "path $PATH"
echo "user $(id -un)"
echo "found $(command -v nix-store)"
echo "nix $(nix-store --version)"
for place in /nix/var/nix/profiles/default/bin "$HOME/.nix-profile/bin" \\
    /run/current-system/sw/bin /usr/bin /usr/local/bin /opt/nix/bin
do [ -x "$place/nix-store" ] && echo "place $place/nix-store"; done
echo "cores $(getconf _NPROCESSORS_ONLN || sysctl -n hw.ncpu)"
echo "load $(uptime)"
echo "time $(date +%s)"
echo "disk $(df -Pk "${NIX_STORE_DIR:-/nix/store}" | tail -n 1)"
export NIX_CONFIG='extra-experimental-features = nix-command'
(nix config show || nix show-config) | grep -E '^(system|extra-platforms|system-features) ='
"""

# What every Nix offers, or so few builds require that it is no loss not to claim it.
RARE_FEATURES = ("benchmark", "nixos-test", "uid-range", "ca-derivations",
                 "recursive-nix")  # fmt: skip
COLUMNS = ("ssh", "login", "nix", "offers", "disk", "clock", "cores", "build")


class Finding(NamedTuple):
    """what: the column; text: for people; brief: for the table; remedy: what to type or
    to write, if it is wrong."""

    what: str
    state: str
    brief: str
    text: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        return dict(zip(Finding.__annotations__, self))


class Inspection:
    """All that there is to find out about one machine."""

    def __init__(self, machine: Machine, nix: Nix, folder: str) -> None:
        self.machine, self.nix, self.folder = machine, nix, folder
        self.found: list[Finding] = []
        self.phase = "waiting"
        self.facts: dict[str, str] = {}
        self.done = False
        self.child: Child | None = None  # nix-build

    def run(self) -> None:
        """As far as it goes: each step needs the ones before."""
        try:
            self.link = Link(self.machine, self.nix, SlotDirectory.find(self.nix).path)
            steps = (self.log_in, self.find_nix, self.measure, self.build)
            all(step() for step in steps)  # until one says no
        except (Error, OSError, ValueError) as error:
            self.add(COLUMNS[min(len(self.found), 7)], WRONG, "FAILED", str(error))
        except Stop:
            pass
        finally:
            self.done = True

    @property
    def well(self) -> bool:
        states = {found.what: found.state for found in self.found}
        return self.done and "build" in states and WRONG not in states.values()

    def add(
        self, what: str, state: str, brief: str, text: str, remedy: str = ""
    ) -> bool:
        """Whether there is a point in going on."""
        self.found.append(Finding(what, state, brief, text, remedy))
        return state != WRONG

    def port(self) -> str:
        return f"-p {self.machine.port} " * bool(self.machine.port)

    def target(self) -> str:
        return self.port() + self.machine.destination

    def ssh_line(self, *words: str) -> str:
        """What a person types to do something there."""
        key = f"-i {self.machine.key} " * bool(self.machine.key)
        return " ".join([f"ssh {key}{self.target()}", *words])

    def log_in(self) -> bool:
        """By an ssh of its own: a shared connection may have been made before something
        changed."""
        self.phase = "logging in"
        key = os.path.expanduser(self.machine.key)
        if key and "%" not in key and not os.path.isfile(key):
            remedy = (f"if {self.machine.where} names the right file: ssh-keygen -t ed25519 "
                      f"-N '' -f {key} && {self.copy_key(key)}")  # fmt: skip
            return self.add("login", WRONG, "NO KEY", f"there is no key {key}", remedy)
        start = time.time()
        child = Child(self.link.command("sh"), self.link.environ, "012")
        answer, words = self.converse(child, LOOK.encode())
        for line in decode(answer).splitlines():
            name, _, value = line.partition(" ")
            self.facts.setdefault(name, printable(value.removeprefix("= ").strip()))
        self.facts["asked"] = str(int(start))
        self.facts["answered"] = str(int(time.time()))
        return self.refused(words) if child.status == 255 else True

    def converse(self, child: Child, question: bytes) -> tuple[bytes, bytes]:
        """All that it writes on both, if it ends in time; with 255 if it does not."""
        stdin, stdout, stderr = child.pipes
        said: dict[int, bytes] = {stdout: b"", stderr: b""}
        with suppress(BrokenPipeError):
            os.write(stdin, question)
        child.pipes.remove(stdin)
        os.close(stdin)
        there = set(said)
        deadline = time.monotonic() + LOGIN_TIMEOUT_S
        while there and time.monotonic() < deadline:
            for end in wait_readable(there, 1):
                data = os.read(end, 65536)
                said[end] = (said[end] + data)[-16 * TAIL_BYTES :]
                there -= set() if data else {end}
        if child.wait(0 if there else math.inf) is None:
            child.stop()
            child.status = 255
            said[stderr] = f"no answer within {LOGIN_TIMEOUT_S} s".encode()
        child.kill()
        return said[stdout], said[stderr]

    def refused(self, words: bytes) -> bool:
        """ssh's own words, and what to type, as exactly as they tell it."""
        try:
            self.link.complain(decode(words))
            text = "ssh ended without a word"
        except Unreachable as error:
            text = str(error).removeprefix("ssh: ")
        text, remedy = self.explain_refusal(text)
        reached = "resolve hostname" not in text and "connect to host" not in text
        brief = "DENIED" if "denied" in text else "FAILED"
        return self.add("login" if reached else "ssh", WRONG, brief, text, remedy)

    def explain_refusal(self, text: str) -> tuple[str, str]:
        """ssh's words, or ours if they are clearer, and the remedy."""
        machine, host, once = self.machine, self.machine.host, self.ssh_line("true")
        name = f"[{host}]:{machine.port}" if machine.port else host
        scan = f"ssh-keyscan -t ed25519 {self.port()}{host} | cut -d' ' -f2- | base64 -w0"
        new = f"the machine has a new key, write this into the last field of its line: {scan}"
        others = f"the key {machine.key} may be read by others"
        lookup = f"correct {machine.where}, or add {host} to DNS, /etc/hosts or ~/.ssh/config"
        changed, anew = "its host key has changed", "if it was set up anew"
        for sign, clearer, remedy in (
            ("its host key is not", "", f"if that is right, and {new}"),
            ("HAS CHANGED", changed, f"{anew}: ssh-keygen -R '{name}' && {once}"),
            ("Host key verification", "", f"compare its host key and say yes: {once}"),
            ("bad permissions", others, f"chmod 600 {machine.key}"),
            ("resolve hostname", "", lookup),
        ):
            if sign in text:
                return clearer or text, remedy
        return self.denied(text) if "denied" in text else (text, trouble(text)[1])

    def denied(self, text: str) -> tuple[str, str]:
        """Why a key does not let us in, as far as it can be seen from here."""
        key, target = os.path.expanduser(self.machine.key), self.target()
        if not key:
            return text, (f"ssh-copy-id {target} (it asks for a password), or append "
                          "your public key to ~/.ssh/authorized_keys there")  # fmt: skip
        command = ["ssh-keygen", "-y", "-P", "", "-f", key]
        if output_of(command, self.link.environ)[0] != 0:
            return (f"the key {key} has a passphrase, or is none; {text}",
                    f"take the passphrase off: ssh-keygen -p -N '' -f {key}")  # fmt: skip
        return text, self.copy_key(key)

    def copy_key(self, key: str) -> str:
        return (f"ssh-copy-id -i {key} {self.target()} (it asks for a password), or append "
                f"{key}.pub to ~/.ssh/authorized_keys there")  # fmt: skip

    def find_nix(self) -> bool:
        self.phase = "asking nix-store"
        if "begin" in self.facts and not self.facts.get("found"):
            return self.no_nix()
        session = Session(self.link)
        try:
            session.greet()
            self.logged_in(f"{1000 * min(self.round_trips(session)):.1f} ms")
        except SessionLost as error:
            if "begin" in self.facts:
                self.logged_in()
            remedy = remedy_of(str(error), self.machine.destination)
            return self.add("nix", WRONG, "FAILED", str(error), remedy)
        finally:
            session.cancel()
        # Hooks need not leave it alone any longer, and shall have what we have found.
        for number in range(CONNECTIONS):
            self.link.retire(f"{self.link.base()}-{number}")
        slots = SlotDirectory.find(self.nix)
        slots.note_success(self.machine.slot_name(self.nix))
        version = self.facts.get("nix", "").rpartition(" ")[2]
        protocol = f"{session.version >> 8}.{session.version & 255}"
        return self.add("nix", OK, version or protocol,
                        f"nix-store {version}, serve protocol {protocol}")  # fmt: skip

    def logged_in(self, round_trip: str = "") -> None:
        text = f"reached, round trip {round_trip}" if round_trip else "reached"
        self.add("ssh", OK, round_trip or "ok", text)
        user = self.facts.get("user")
        self.add("login", OK, user or "ok", f"logs in as {user or 'its user'}")

    def round_trips(self, session: Session) -> Iterator[float]:
        """In seconds, of questions that are answered at once."""
        for _ in range(3):
            start = time.monotonic()
            session.ask_valid([], False).get(GREETING_TIMEOUT_S)
            yield time.monotonic() - start

    def no_nix(self) -> bool:
        user, place = self.facts.get("user", ""), self.facts.get("place", "")
        remedy = f"install Nix there; its PATH is {self.facts.get('path', '')}"
        if place and only(place, PLAIN):  # people will paste it
            line = f"ln -s {place} /usr/local/bin/"
            remedy = self.ssh_line(line) if user == "root" else f"as root there: {line}"
        self.logged_in()
        return self.add("nix", WRONG, "NONE", "no nix-store in the PATH of a login "
                        "without a terminal", remedy)  # fmt: skip

    def measure(self) -> bool:
        """What the builder says of itself, beside what is claimed here."""
        if "begin" not in self.facts:
            for what in ("offers", "disk", "clock", "cores"):
                self.add(what, UNKNOWN, "-", "that login allows nothing but nix-store")
            return True
        return all([self.offers(), self.disk(), self.clock(), self.cores()])

    def offers(self) -> bool:
        """Systems and features; only 2.x tells."""
        machine, where = self.machine, self.machine.where
        if "system" not in self.facts:
            return self.add("offers", UNKNOWN, "-", "its Nix does not say for what it "
                            "builds")  # fmt: skip
        told = f"{self.facts['system']} {self.facts.get('extra-platforms', '')}".split()
        systems = [system for system in told if only(system, PLAIN)]  # for our remedy
        features = self.facts.get("system-features", "").split()
        if lacking := sorted(set(machine.systems) - {*systems, "builtin"}):
            return self.add("offers", WRONG, "SYSTEM", f"{where} says that it builds "
                            f"{', '.join(lacking)}, but its Nix builds "
                            f"{', '.join(systems)}", "write into the second field: "
                            f"{','.join(sorted({*machine.systems} & {*systems}) or systems[:1])}")  # fmt: skip
        claimed = machine.supported | machine.mandatory
        if lacking := sorted(claimed - set(features)):
            return self.add("offers", WRONG, "FEATURE", f"{where} says that it has "
                            f"{', '.join(lacking)}, but its Nix offers "
                            f"{', '.join(features) or 'no features'}", "take it out "
                            "there, or write into nix.conf on the builder: "
                            f"extra-system-features = {' '.join(lacking)}")  # fmt: skip
        more = sorted(set(features) - claimed - set(RARE_FEATURES))
        text = f"it also offers {', '.join(more)}, which {where} does not claim"
        if more:
            return self.add("offers", NOTE, "ok", text)
        return self.add("offers", OK, "ok", "builds what is claimed")

    def disk(self) -> bool:
        words = self.facts.get("disk", "").split()
        if len(words) < 6 or not words[3].isdigit():
            return self.add("disk", UNKNOWN, "-", "it does not say how full its disk is "
                            "(there may be no store yet)")  # fmt: skip
        free = int(words[3]) << 10
        if free < ROOM_B:
            return self.add("disk", WRONG, amount(free), f"only {amount(free)} are free "
                            "in its store", self.ssh_line("nix-collect-garbage -d"))  # fmt: skip
        return self.add("disk", OK, amount(free), f"{amount(free)} free in its store")

    def clock(self) -> bool:
        if not self.facts.get("time", "").isdigit():
            return self.add("clock", UNKNOWN, "-", "it does not say what time it is")
        there = int(self.facts["time"])
        before, after = int(self.facts["asked"]), int(self.facts["answered"])
        off = there - max(before, min(there, after))
        if abs(off) > CLOCK_S:
            side = "ahead" if off > 0 else "behind"
            return self.add("clock", WRONG, f"{off:+} s", f"its clock is "
                            f"{duration(abs(off))} {side} of the one here",
                            self.ssh_line("timedatectl set-ntp true"))  # fmt: skip
        return self.add("clock", OK, f"{off:+} s" if off else "ok", "its clock is right")

    def cores(self) -> bool:
        cores, jobs = self.facts.get("cores", ""), self.machine.max_jobs
        load = self.facts.get("load", "").rpartition(":")[2].split(",")[0].split()[:1]
        if not cores.isdigit():
            return self.add("cores", UNKNOWN, "-", "it does not say how many cores it has")
        text = f"{cores} cores for {jobs} jobs, load {(load or ['unknown'])[0]}"
        state = OK
        if jobs > 2 * int(cores):
            state, text = NOTE, f"{text}: a lower maxJobs would be quicker"
        return self.add("cores", state, f"{cores}/{jobs}", text)

    def build(self) -> bool:
        """A real one, by the Nix here and this very hook."""
        self.phase = "building"
        mine = os.path.realpath(__file__)
        if os.geteuid() != 0 and not os.access(self.nix.store.real, os.W_OK):
            return self.add("build", UNKNOWN, "-", "not tried: the daemon builds here, so "
                            "try it as root")  # fmt: skip
        os.mkdir(self.folder)
        command, environ = self.tiny_build(self.folder, mine)
        with open(f"{self.folder}/log", "w+b") as log:
            out = {1: log.fileno(), 2: log.fileno()}
            start = time.monotonic()
            self.child = Child(command, environ, "", out)
            status = self.child.wait(CHECK_TIMEOUT_S)
            took = time.monotonic() - start
            self.child.stop()
            log.seek(0)
            said = decode(log.read())
        return self.judge(status, took, said)

    def tiny_build(self, folder: str, hook: str) -> tuple[list[str], dict[str, str]]:
        """A command, and its environment, that builds something new on this machine."""
        features = " ".join(f'"{name}"' for name in sorted(self.machine.mandatory))
        with open(f"{folder}/tiny.nix", "w", encoding="utf-8") as file:
            file.write(f"""derivation {{
                name = "check"; system = "{self.machine.systems[0]}";
                builder = "/bin/sh"; args = [ "-c" "echo well > $out" ];
                requiredSystemFeatures = [ {features} ];
                random = "{os.urandom(8).hex()}"; }}""")
        machines = f"{folder}/machines"
        with open(machines, "w", encoding="utf-8") as file:
            file.write(line_of(self.machine))
        program = find_program("nix-build", nix_directories(self.nix.environ))
        command = [program, f"{folder}/tiny.nix", "--no-out-link", "--max-jobs", "0"]
        if self.nix.old:
            more = {"NIX_BUILD_HOOK": hook, "NIX_REMOTE_SYSTEMS": machines}
            return command, child_environ(self.nix, **more)
        command += ["--option", "build-hook", hook, "--option", "builders", f"@{machines}"]
        command += ["--option", "substitute", "false"]
        return command, child_environ(self.nix)

    def judge(self, status: int | None, took: float, said: str) -> bool:
        if status is None:
            return self.add("build", WRONG, "NO END", "a tiny build did not end within "
                            f"{CHECK_TIMEOUT_S} s; all its slots may be taken")  # fmt: skip
        lines = [line for line in said.splitlines() if line.strip()]
        if status != 0:
            told = [n for n, line in enumerate(lines) if "cannot" in line or "error" in line]
            text = "\n".join(lines[told[0] if told else -3 :])
            text = " ".join(text.partition("\nerror:")[0].split())  # Nix's own comes last
            return self.add("build", WRONG, "FAILED", f"a tiny build failed: {text}",
                            remedy_of(text, self.machine.destination))  # fmt: skip
        if "does not trust its user" in said:
            user = self.facts.get("user", "")
            user = user if is_name(user, "+-.") else "USER"
            return self.add("build", WRONG, "LIMITED", "its Nix does not trust the user "
                            f"{user}: builds work, but take longer (the derivation's "
                            "closure is sent), and unsigned inputs will be refused",
                            "on the builder, in /etc/nix/nix.conf: extra-trusted-users = "
                            f"{user} (in 2.3 and older: trusted-users = root {user}); then: systemctl "
                            "restart nix-daemon")  # fmt: skip
        return self.add("build", OK, f"{took:.1f} s", f"built something in {took:.1f} s")


def same_file(path: str, other: str) -> bool:
    """Or a copy of it."""
    import filecmp

    with suppress(OSError):
        return filecmp.cmp(path, other, shallow=False)
    return False


def takes_arguments(nix: Nix) -> bool:
    """Whether the Nix here lets the hook have some of its own."""
    program = find_program("nix", nix_directories(nix.environ))
    _, text, _ = output_of([program, "--version"], nix.environ)
    return parse_version(text) >= (2, 10)


def unused(nix: Nix) -> str:
    """What to say if the Nix here has another hook."""
    mine = os.path.realpath(__file__)
    words = nix.settings.get("build-hook", "").split()
    if nix.old:
        words = nix.environ.get("NIX_BUILD_HOOK", "").split()
    for word in words:  # 2.0 to 2.9 take no arguments there
        if same_file(word, mine) and (len(words) == 1 or takes_arguments(nix)):
            return ""
    return (f"Note: Nix here does not use this hook now (build-hook is "
            f"{' '.join(words) or 'not set'}); to do: build-hook = {mine} in "
            "/etc/nix/nix.conf, or with 2.25 to 2.33 in /root/.config/nix/nix.conf.")  # fmt: skip


def check(options: Namespace, nix: Nix, screen: Screen) -> int:
    """Inspect the machines, all at once; 0 only if all is well."""
    machines, complaints = machines_named(options.names, nix)
    if not machines:
        complaints.append(f"no machines are listed ({where_machines_stand(nix)}); a line "
                          "such as: nix@builder x86_64-linux /root/.ssh/id_builder 8")  # fmt: skip
    else:
        make_slots(nix)
    note = unused(nix)
    inspections = inspect_all(machines, nix, screen)
    if options.json:
        findings = [{"machine": inspection.machine.name(nix),
                     "where": inspection.machine.where, "well": inspection.well,
                     "findings": [found.as_dict() for found in inspection.found]}
                    for inspection in inspections]  # fmt: skip
        print(as_json({"complaints": complaints, "note": note, "machines": findings}))
    else:
        show_inspections(inspections, complaints, screen)
        if note:
            screen.say(note)
    return 0 if all(i.well for i in inspections) and not complaints else 1


def make_slots(nix: Nix) -> None:
    """The directory that the tiny builds need, as a hook makes it."""
    try:
        slots = SlotDirectory.find(nix)
        slots.make()
    except Error as error:
        raise Error(f"{error}; try it as root") from None
    if not os.access(slots.path, os.W_OK):
        raise Error(f"cannot write into {slots.path}; try it as root")


def inspect_all(machines: list[Machine], nix: Nix, screen: Screen) -> list[Inspection]:
    """At the same time; whatever ends us leaves no build and no file behind."""
    import shutil
    import tempfile
    import threading

    # Its name is known before it is made: a signal may come at any moment.
    folder = f"{tempfile.gettempdir()}/check-{os.urandom(8).hex()}"
    inspections = [
        Inspection(machine, nix, f"{folder}/{number}")
        for number, machine in enumerate(machines)
    ]
    try:
        os.mkdir(folder, 0o700)
        for inspection in inspections:
            threading.Thread(target=inspection.run, daemon=True).start()
        watch_inspections(inspections, screen)
    finally:  # what has a pipe of ours ends with us
        for inspection in inspections:
            if inspection.child and inspection.child.status is None:
                os.kill(inspection.child.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
    return inspections


def watch_inspections(inspections: list[Inspection], screen: Screen) -> None:
    """Until all are done, say on standard error how far they are."""
    terminal = sys.stderr.isatty()
    told: set[Inspection] = set()
    while len(told) < len(inspections):
        time.sleep(0.1)
        for inspection in inspections:
            if inspection.done and inspection not in told:
                told.add(inspection)
                if not terminal:
                    state = "well" if inspection.well else "not well"
                    count = f"{len(told)} of {len(inspections)} tried"
                    print(f"{label(inspection.machine)}: {state} ({count})", file=sys.stderr)
        if terminal:
            busy = [f"{label(i.machine)} {i.phase}" for i in inspections if not i.done]
            text = f"{len(told)} of {len(inspections)} done; {', '.join(busy)}"
            text = text[: screen.width - 1] if busy else ""
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def show_inspections(
    inspections: list[Inspection], complaints: list[str], screen: Screen
) -> None:
    for complaint in complaints:
        print(screen.paint("\n".join(screen.wrap(complaint, "    ", "")), WRONG))
    rows = [["machine", *COLUMNS]]
    for inspection in inspections:
        brief = {found.what: found.brief for found in inspection.found}
        cells = [brief.get(column, "-") for column in COLUMNS]
        rows.append([label(inspection.machine), *cells])
    lines = table(rows)
    if max(map(len, lines)) > screen.width:  # then each machine's name has its own line
        lines = table([row[1:] for row in rows])
        lines = [lines[0], *(f"{r[0]}\n{line}" for r, line in zip(rows[1:], lines[1:]))]
    if inspections:
        print(lines[0])
    for line, inspection in zip(lines[1:], inspections):
        print(screen.paint(line, OK if inspection.well else WRONG))
        for found in inspection.found:
            if found.state in (WRONG, NOTE):
                text = f"{found.what}: {found.text}"
                screen.say(text, "        ", "    ")
            if found.state == WRONG and found.remedy:
                print(f"    to do: {printable(found.remedy)}")  # whole, to be pasted
    ill = sum(not inspection.well for inspection in inspections)
    if ill or complaints:
        of = f"{ill} of {len(inspections)} machines are not well" if ill else "Not all is well"
        print(screen.paint(f"{of}.", WRONG))
    else:
        print(screen.paint("All machines are well.", OK))


# ---- status -------------------------------------------------------------------------


class Holder(NamedTuple):
    """Who holds a lock, as its file says; pid 0 if that is not known."""

    pid: int
    since: float
    phase: str
    derivation: str

    @classmethod
    def parse(cls, line: str) -> Holder:
        """What is said of a process that has ended, or by another program, is not
        believed."""
        try:
            pid, start, since, phase, derivation = line.split(" ")
            if is_alive(int(pid), start) and math.isfinite(float(since)):
                return cls(int(pid), float(since), phase, derivation)
        except ValueError:
            pass
        return cls(0, 0.0, "", "")

    def text(self, now: float) -> str:
        if not self.pid:
            return "taken by another program, such as Nix's own hook"
        age = duration(now - self.since)
        phase = "" if self.phase == "waiting" else f"{self.phase:10} "
        return printable(f"{phase}{short(self.derivation)} for {age}, pid {self.pid}")


def is_alive(pid: int, start: str) -> bool:
    """start: as `start_time` had it, "-" where the system does not tell."""
    if start != "-":
        return start_time(pid) == start
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


class Load(NamedTuple):
    """How things are with one machine."""

    machine: Machine
    building: list[Holder]
    fetching: list[Holder]
    outage: Outage | None


class Waiter(NamedTuple):
    place: int
    holder: Holder
    names: list[str]  # of the slot files of the machines waited for


class Overview(NamedTuple):
    loads: list[Load]
    waiters: list[Waiter]


class Looker:
    """Reads the locks in the slot directory without ever seeming to hold one."""

    def __init__(self, nix: Nix) -> None:
        self.nix, self.slots = nix, SlotDirectory.find(nix)
        self.lock = -1

    def look(self, machines: list[Machine]) -> Overview:
        """Raises Error if we may not read what is there.  Hooks that want the main lock,
        too, have to wait for no more than one machine to be looked at."""
        try:
            self.lock = os.open(f"{self.slots.path}/main-lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # no hook has ever run
            return Overview([Load(m, [], [], None) for m in machines], [])
        except OSError as error:
            raise Error(f"cannot look into {self.slots.path}: {error.strerror}; try it "
                        "as root") from None  # fmt: skip
        try:
            own = os.listdir(self.slots.own) if os.path.isdir(self.slots.own) else []
            loads = [self.load(machine, own) for machine in machines]
            places = [entry.partition(".") for entry in own if entry.startswith("line-")]
            places = [place for place in places if place[2].isdecimal()]
            places.sort(key=lambda place: (place[0], int(place[2])))
            lines = self.taken([f"{self.slots.own}/{''.join(place)}" for place in places])
            waiters = [self.waiter(path, text) for path, text in lines]
        except PermissionError as error:
            raise Error(f"cannot read {error.filename}; try it as root") from None
        finally:
            os.close(self.lock)
        return Overview(loads, waiters)

    def load(self, machine: Machine, own: list[str]) -> Load:
        name = machine.slot_name(self.nix)
        slots = [f"{self.slots.path}/{name}-{n}" for n in range(machine.max_jobs)]
        places = sorted(e for e in own if e.startswith(f"{name}.fetch-"))
        building = self.holders(slots)
        fetching = self.holders([f"{self.slots.own}/{place}" for place in places])
        return Load(machine, building, fetching, self.slots.outage(name))

    def holders(self, paths: list[str]) -> list[Holder]:
        return [Holder.parse(text.partition("\n")[0]) for _, text in self.taken(paths)]

    def waiter(self, path: str, text: str) -> Waiter:
        first, *names = text.split("\n")
        return Waiter(int(path.rpartition(".")[2]), Holder.parse(first), names)

    def taken(self, paths: list[str]) -> list[tuple[str, str]]:
        """Those that somebody holds, and what they say."""
        if not is_locked_within(self.lock, MAIN_LOCK_TIMEOUT_S):
            raise Error(f"somebody holds {self.slots.path}/main-lock (fuser says who)")
        try:
            found = [(path, self.held(path)) for path in paths]
        finally:
            fcntl.flock(self.lock, fcntl.LOCK_UN)
        return [(path, text) for path, text in found if text is not None]

    def held(self, path: str) -> str | None:
        """What the file says, if somebody holds its lock."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            if try_lock(descriptor, fcntl.LOCK_SH):
                return None
            return read_lock(descriptor)
        finally:
            os.close(descriptor)


def status(options: Namespace, nix: Nix, screen: Screen) -> int:
    """What runs where, once or again and again."""
    while True:
        machines, complaints = machines_named(options.names, nix)
        overview = Looker(nix).look(machines)
        if options.json:
            print(as_json(overview_json(overview, nix)))
        else:
            lines = overview_lines(overview, nix, screen)
            if not machines:
                lines = [f"no machines are listed ({where_machines_stand(nix)})"]
            for complaint in complaints:
                lines += screen.wrap(complaint, "    ", "")
            if options.watch and screen.terminal:
                lines = screen.fit(lines)
                print("\x1b[H\x1b[J", end="")
            print("\n".join(lines), flush=True)
        if not options.watch:
            return 0
        time.sleep(1)


def bar(taken: int, slots: int) -> str:
    """One character a slot, or fewer."""
    width = min(slots, BAR)
    full = math.ceil(width * taken / slots) if slots else 0
    return f"[{'#' * full}{'.' * (width - full)}]"


def left_alone(outage: Outage) -> str:
    now = time.time()
    left = outage.until - now
    until = f"for {duration(left)} more" if left > 0 else "until it answers"
    times = "once" if outage.failures == 1 else f"{outage.failures} times"
    age = duration(now - outage.since)
    return f"left alone {until}, failed {times} in {age}: {outage.words}"


def overview_lines(overview: Overview, nix: Nix, screen: Screen) -> list[str]:
    now = time.time()
    lines = []
    heads = [
        [label(load.machine), bar(len(load.building), load.machine.max_jobs),
         f"{len(load.building)} of {load.machine.max_jobs} slots taken"]
        for load in overview.loads
    ]  # fmt: skip
    for head, load in zip(table(heads) if heads else [], overview.loads):
        lines.append(screen.paint(head, NOTE if load.outage else OK))
        lines += [f"    {h.text(now)}" for h in (*load.building, *load.fetching)]
        if load.outage:
            lines += screen.wrap(left_alone(load.outage), "        ", "    ")
    hosts = {load.machine.slot_name(nix): label(load.machine) for load in overview.loads}
    before: list[str] = []
    for waiter in overview.waiters:
        known = sorted({hosts.get(name, name) for name in waiter.names if name})
        if waiter.names != before:
            lines += screen.wrap(f"waiting for {', '.join(known)}:", "    ", "")
        before = waiter.names
        lines.append(f"    {waiter.place + 1}. {waiter.holder.text(now)}")
    return lines


def overview_json(overview: Overview, nix: Nix) -> dict[str, object]:
    def holders(found: list[Holder]) -> list[dict[str, object]]:
        return [dict(zip(Holder.__annotations__, holder)) for holder in found]

    machines = [
        {
            "machine": load.machine.name(nix),
            "slots": load.machine.max_jobs,
            "taken": len(load.building),
            "building": holders(load.building),
            "fetching": holders(load.fetching),
            "away": load.outage and dict(zip(Outage.__annotations__, load.outage)),
        }
        for load in overview.loads
    ]
    waiting = [
        {"place": w.place + 1, **holders([w.holder])[0], "slot-names": w.names}
        for w in overview.waiters
    ]
    return {"machines": machines, "waiting": waiting}


# ---- explain ------------------------------------------------------------------------


def wanted_build(options: Namespace, nix: Nix) -> Request:
    """The request that Nix would make for that derivation, or for the options."""
    features = frozenset(filter(None, options.features.split(",")))
    if not options.derivation:
        system = options.system or nix.settings["system"]
        return Request(False, system, "", features)
    path = os.path.realpath(options.derivation)
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            derivation = Derivation.parse(file.read())
    except (Error, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise Error(f"cannot read the derivation {path}: {reason}; get one with: "
                    "nix-instantiate FILE") from None  # fmt: skip
    environment = dict(derivation.environment)
    words = environment.get("requiredSystemFeatures", "").split()
    if "__json" in environment:
        import json

        with suppress(ValueError, TypeError, AttributeError, RecursionError):
            more = json.loads(environment["__json"])
            # Half a surrogate pair, which JSON may write, is a ValueError.
            words += map(decode, map(encode, texts(more.get("requiredSystemFeatures", []))))
    return Request(False, derivation.platform, path, features.union(words))


def explain(options: Namespace, nix: Nix, screen: Screen) -> int:
    """Where a build would go now, and why not elsewhere; 0 if anywhere."""
    request = wanted_build(options, nix)
    machines, complaints = machines_named([], nix)
    try:
        overview = Looker(nix).look(machines)
    except Error as error:
        complaints.append(f"{error}; all slots are taken to be free")
        overview = Overview([Load(m, [], [], None) for m in machines], [])
    ranked, out = judge_machines(overview, request, nix)
    itself = might_build_itself(nix, request)
    if options.json:
        print(as_json({
            "derivation": request.derivation, "system": request.system,
            "features": sorted(request.features), "complaints": complaints,
            "here": itself,
            "machines": [
                {"machine": m.name(nix), "load": key[2], "slots": m.max_jobs,
                 "speed": m.speed, "rank": key[0]} for key, m in ranked],
            "left-out": [
                {"machine": m.name(nix), "where": m.where, "reason": reason}
                for m, reason in out],
        }))  # fmt: skip
    else:
        show_choice(request, ranked, out, itself, screen)
        for complaint in complaints:
            screen.say(complaint)
    return 0 if ranked else 1


Ranked = list[tuple[tuple[int, float, int], Machine]]


def judge_machines(
    overview: Overview, request: Request, nix: Nix
) -> tuple[Ranked, list[tuple[Machine, str]]]:
    """Those that could take it now, the best first; and why not the others."""
    ranked, out = [], []
    for load in overview.loads:
        machine, taken = load.machine, len(load.building)
        reason = unfit(machine, request, nix)
        if not reason and load.outage:
            reason = f"is {left_alone(load.outage)}"
        if not reason and taken >= machine.max_jobs:
            reason = f"has no free slot: all {taken} are taken"
        if reason:
            out.append((machine, reason))
        else:
            ranked.append((rank(machine, taken), machine))
    ranked.sort(key=lambda pair: pair[0])
    return ranked, out


def show_choice(
    request: Request,
    ranked: Ranked,
    out: list[tuple[Machine, str]],
    itself: bool,
    screen: Screen,
) -> None:
    features = ", ".join(sorted(request.features)) or "no features"
    screen.say(f"{request.derivation or 'A build'} needs {request.system} and {features}.")
    if ranked:
        rows = [["", "machine", "taken", "speed", "taken / speed", "rounded"]]
        for number, (key, machine) in enumerate(ranked, 1):
            taken, speed = key[2], machine.speed
            rows.append([f"{number}.", label(machine), f"{taken} of {machine.max_jobs}",
                         f"{speed:g}", f"{taken / speed:.2f}", str(key[0])])  # fmt: skip
        print("\n".join(table(rows)))
        screen.say("The first is asked first.  Of equals: the faster, then the less "
                   "loaded, then the one that is written first.")  # fmt: skip
    else:
        print(screen.paint("No machine can take it now.", WRONG))
    if out:
        print("Left out:")
    for machine, reason in out:
        text = f"{label(machine)} {reason} ({machine.where})"
        screen.say(text, "        ", "    ")
    screen.say("Nix here may build it itself." if itself else
               "Nix here can never build it itself (max-jobs, system or features).")  # fmt: skip


# ---- Command line -------------------------------------------------------------------


def parse_options(arguments: list[str]) -> Namespace:
    import argparse

    parser = argparse.ArgumentParser(
        prog="nix_build_remote.py",
        usage="nix_build_remote.py check | status | explain | --help | --version",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, prog=parser.prog)
    for run, text in (
        (check, "try each machine, and say what is wrong and what to do"),
        (status, "show what is built where, and who waits"),
        (explain, "show where a build would go, and why not elsewhere"),
    ):
        part = verbs.add_parser(run.__name__, help=text, description=text)
        part.set_defaults(run=run)
        part.add_argument("--machines", default="", metavar="FILE",
                          help="instead of those that the hook would use")  # fmt: skip
        part.add_argument("--json", action="store_true", help="for programs")
        if run is explain:
            part.add_argument("derivation", nargs="?", metavar="DERIVATION")
            part.add_argument("--system", default="", help="such as x86_64-linux")
            part.add_argument("--features", default="", help="such as kvm,big-parallel")
        else:
            part.add_argument("names", nargs="*", metavar="MACHINE")
        if run is status:
            part.add_argument("--watch", action="store_true", help="renew it each second")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """For people; returns the exit status."""
    if arguments == ["--version"]:
        print(f"nix_build_remote.py {VERSION}")
        return 0
    if arguments == ["--help"]:
        print((__doc__ or "").partition('"$@"\n')[2].strip())
        return 0
    options = parse_options(arguments)
    environ = dict(os.environ)
    os.dup2(os.open(os.devnull, os.O_RDWR), 4)  # the log of a build, for a hook
    signal.signal(signal.SIGTERM, terminate)
    try:
        nix = calling_nix(environ, options.machines)
        return int(options.run(options, nix, Screen(environ)))
    except Error as error:
        print(f"nix_build_remote.py: {error}", file=sys.stderr)
    except (KeyboardInterrupt, BrokenPipeError, Stop):
        return 130
    return 1


if __name__ == "__main__":
    exit_status = main(sys.argv[1:])
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(exit_status)
