#!/bin/sh
""":"
# sh runs these lines.  They find a Python, 3.9 or newer, that is no script; it runs bytecode if nobody but us and root could have written that.
PATH=${PATH:-/usr/bin:/bin}:/run/current-system/sw/bin:/nix/var/nix/profiles/default/bin:/usr/local/bin:/opt/homebrew/bin:/usr/bin:/bin
IFS=:; for at in $PATH; do read -r it <$at/python3 && case $it$NOT_PYTHON: in "#!"*|*":$at:"*) ;; *) break;; esac; at=; done 2>/dev/null
[ "$at" ] || python3 -IS -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null || { echo "nix_build_remote.py: there is no Python 3.9 or newer in $PATH"
case $1-$3 in [0-9]-) echo "# decline-permanently"; exec cat >/dev/null;; *-[01]) while read -r _; do echo "# decline"; done;; esac; exit 1; } >&2
exec "${at:+$at/}python3" -ISXutf8 -c 'import importlib.machinery, os, sys
sys.version_info < (3, 9) and (os.environ.update(NOT_PYTHON=os.environ.get("NOT_PYTHON", "") + ":" + sys.argv[1]), os.execv("/bin/sh", ["sh"] + sys.argv[2:]))
os.umask(0o022); del sys.argv[:2]; __file__ = sys.argv[0]; path = os.path.realpath(__file__); folder = os.path.dirname(path)
me = importlib.machinery.SourceFileLoader("__main__", path); sys.dont_write_bytecode = os.stat(path).st_mtime < 2  # as in a Nix store
cache = folder + "/__pycache__"; place = os.lstat(cache if os.path.lexists(cache) else folder)
safe = place.st_uid in (0, os.getuid()) and not place.st_mode & 0o1022  # sticky: others may add files
exec(me.get_code("__main__") if safe else compile(me.get_data(path), path, "exec"))' "$at" "$0" "$@"
"""

from __future__ import annotations

__doc__ = """nix_build_remote.py - a build hook for Nix: sends builds to other machines

Nix starts this program, not you: as build-hook (Nix 2.x) or NIX_BUILD_HOOK (Nix 1.x).
It reads from Nix which derivation is to be built, picks a machine of the right system
that has a free slot, copies the missing inputs there with nix-copy-closure, builds over
ssh, passes on the log and brings the outputs back.

Install, for any Nix 2.x, in /etc/nix/nix.conf, or for 2.25 to 2.33, which ignore it
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
                       too) with the parameters ssh-key, compress, remote-program,
                       remote-store and base64-ssh-public-host-key; or a store that
                       Nix here opens: /PATH, local?root=R, unix://SOCKET; or localhost,
                       whose line says how fast this machine is beside the others
    systems            comma-separated: i686-linux,x86_64-linux (default: this one's)
    sshKey             private key without a passphrase (default: those ssh would try)
    maxJobs            builds at once on the machine: its slots (default: 1)
    speedFactor        relative speed: faster machines get more builds (default: 1)
    supportedFeatures  comma-separated; covers a derivation's requiredSystemFeatures
    mandatoryFeatures  comma-separated; builds that do not require all of them stay away
    hostKey            base64 of the host's public key; no other key is then believed

    # starts a comment; `;` separates machines like a new line; @FILE includes a file.

A builder that has the file /etc/nix/no-builds gets no builds, nor one whose disk is full.

Environment:
    NIX_REMOTE_SYSTEMS  the machines file of Nix 1.x; must be absolute
    NIX_CURRENT_LOAD    the directory of slot files (default: Nix's own current-load)
    NIX_SSHOPTS         more options for ssh
    NIX_DEBUG_HOOK      if set, say how each machine was judged, and what is run
    NIX_BLIND_HOOK      if set, do not look how full and how busy builders are
    NIX_STORE_DIR, NIX_STATE_DIR, NIX_REMOTE  as Nix itself reads them

Exit status:
    0    all outputs are in the local store, or there was nothing to do
    100  the build itself failed: building again would not help
    101  the build took, or was silent for, longer than Nix allows
    1    the hook failed;  128 and more: a signal ended it

Command line, for people:
    nix_build_remote.py check [MACHINE...]    try the machines, say what is wrong
    nix_build_remote.py status [MACHINE...] [--watch]   what is built where, who waits
    nix_build_remote.py explain [DERIVATION]  where it would go, and why not elsewhere;
                        or for [--system S] [--features F,...]
    nix_build_remote.py pause MACHINE [--for 2h] [--why TEXT] [--wait]   no new builds go
                        there; with --wait, return when those that run have ended
    nix_build_remote.py resume MACHINE        builds go there again
    nix_build_remote.py history [--failed] [--machine M] [--since 2d]   what was built
    nix_build_remote.py metrics   the same as counters, for Prometheus' node_exporter
    nix_build_remote.py --help | --version
    They take --json, and --machines FILE.
"""

# The words of this program, each for one thing:
# machine     one entry of the machines file;  builder: the host behind it
# slot        one of a machine's maxJobs, a lock file;  load: how many are taken
# history     a line for each build that has ended: where, how, how long
# line        the queue of hooks that wait for one set of machines, each at its place
# outage      what all hooks remember of a machine that failed
# closed      said of a machine that gets no new builds now, though it is well
# look        what a builder says of its disk and memory, and of others' builds there
# connection  one shared ssh master;  seat: one hook's right to a session on it
# session     one `nix-store --serve --write` on a builder;  way: how one is had
# attempt     one try of a build on one machine
# relay       the hook, where it stands between nix-copy-closure and a session
# site        what a hook knows of where it runs

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
    import subprocess
    from argparse import Namespace
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, NamedTuple, Self, TypeVar

    E = TypeVar("E", bound="Error")

    Read = Callable[[int], bytes]  # exactly so many bytes, or an exception
    Hear = Callable[[float], Any]  # an answer, until that (monotonic) time
    Infos = dict[str, "PathInfo"]  # what a builder says of paths, by these
    Ask = Callable[[Any, int], None]  # a builder something, into a file

VERSION = "0.1"
START = time.monotonic()

# ---- Constants ----------------------------------------------------------------------

# Talking with Nix
DRAIN_TIMEOUT_S = 10  # for Nix to read the end of the log, without any progress
SAID_LIMIT = 1000  # messages remembered as said
COMPLAINTS = 20  # about the machines file, at once
SETTINGS_LIMIT_BYTES = 1 << 20  # of all that Nix says it is set to
WIRE_LIMIT_BYTES = 64 << 20  # the longest string or list that anybody may send us

# Slots, lines and outages
WAIT_S = 0.02  # between two looks for a free slot
PATIENCE_S = 1.0  # a request waits so long for a slot, where Nix can ask again later,
IMPATIENCE_S = 4.0  # and after it has waited in vain, others do not for so long
BEGIN_S = 1.0  # for Nix to begin a build itself
LINE_S = 60  # so long the file of a place stays that nobody has
LEAVE_S = 2.0  # for which a free slot is left to who should have it
LINE_LIMIT = 64  # hooks that wait for one set of machines
PASSES = 3  # so often a hook may be passed by those with fewer machines to wait for;
OVERDUE = "overdue"  # then the file of its place says this, and it comes before them
LOCK_LIMIT_BYTES = 8 << 20  # of what a lock's file says
MAIN_LOCK_TIMEOUT_S = 10  # it is held for milliseconds, unless somebody means harm
NAME_LIMIT_BYTES = 200  # of a slot file's name without its number
LACK_S = 60 * 60  # a machine that could not do such a build is not asked again so long
DIGEST_LIMIT = 1000  # of sources and derivations that were last used on a machine
UNKNOWN_FAILURES = 3  # in a row for an unknown reason; one more, and that is hopeless
PAUSE_S = 1  # a machine that has failed is left alone for that,
PAUSE_LIMIT_S = 60  # and for longer each time it fails again
AWAY_TIMEOUT_S = 15 * 60  # wait that long for one of the machines to come back
OUTAGE_LIMIT = 1000  # characters of what is remembered of a failure
HISTORY_BYTES = 2 << 20  # of the history's file, before a new one is begun,
RECORD_BYTES = 4096  # of a line there
PHASES = ("waiting", "connecting", "sending", "building", "fetching")  # of a build
PROBE_HEAD = 99  # bytes of a probe's file, before what ssh and nix-store said
LOOK_S = 20  # a builder is asked no more often how it is, if nobody else builds there,
LOOK_AGE_S = 60  # and what it said is believed for so long,
CLOSED_S = 60 * 60  # but that it is full, or closed, for so long
MUTE_S = 60 * 60  # a login that does not let us ask is not asked again so long
LOOK_WAIT_S = 3  # its answer is waited for so long, before more builds of ours begin
SETTLE_S = 3  # so long others must have had fewer builds, before that is believed
ROOM_SHARE = 0.03  # a store is full if a smaller share of it is free,
ROOM_BYTES = 1 << 30  # or if less is free than this and than a tenth of it
PRESSURE = 80  # per cent of the time that some program there has waited for memory

# ssh and sessions
CONNECT_TIMEOUT_S = 10  # ssh's own, for the TCP connection and the key exchange
LOGIN_TIMEOUT_S = 90  # to connect and log in, where nobody waits for a reply
TELL_S = 3  # after which it is told what is said while we log in
GREETING_TIMEOUT_S = 30  # to start nix-store on the builder, and for its first answer
REPLY_S = 5  # for all of these together while Nix waits for our reply
ALIVE_INTERVAL_S = 10  # a silent link is noticed after ALIVE_COUNT_MAX probes of these
ALIVE_COUNT_MAX = 3
RETIRE_S = 2  # for a connection's master to answer when it is asked, or told to end
IDLE_S = 120  # then a shared connection that nobody uses ends by itself
SEATS = 8  # on one connection: sshd allows it 10 sessions, and a hook needs one
CONNECTIONS = 16  # to one machine
SPARES = 2  # sessions begun beforehand on one connection,
SPARE_S = 50  # which end if nobody comes within that time,
FAR_S = 0.02  # where a question and its answer take longer than this
WARM_AT_ONCE = 6  # connections begun at the same time
SOCKET_LIMIT_BYTES = 86  # of a control socket's name (Linux 90): ssh appends 17 to bind
TAIL_BYTES = 4096  # of ssh's stderr, or of a small file of ours
HEARD_LIMIT_BYTES = 1 << 16  # of what a program says into a file
ANSWER_TIMEOUT_S = 15 * 60  # for a builder to say what it has, or take our question
SUBSTITUTE_TIMEOUT_S = 4 * 60 * 60  # the same if it may download what it has not
CANCEL_S = 0.3  # for a nix-store here to end its build
QUIET_S = 2  # after a build: no more of its log will come

# Copying and building
SENDERS = 4  # of different things to one machine at the same time
UPLOAD_LOCK_TIMEOUT_S = 15 * 60  # as the stock hook: then go on without it
STILL_S = 60  # in which not a byte is copied: that is told
STALLED_S = 5 * 60  # the same of an archive that a builder sends: that is given up
FAREWELL_S = 0.2  # for a program to end by itself, when told that there is no more
COPY_TIMEOUT_S = 30 * 60  # for a store that takes no byte: it may wait for others
COPY_BATCH_BYTES = 100_000  # of paths at once: MAX_ARG_STRLEN of Linux is 128 KiB
MOVE_BYTES = 1 << 20  # at once, if the system lets pipes hold so much
AHEAD_BYTES = 1 << 20  # outputs fetched before they are asked for, if that is all
BULK_BYTES, BULK_PAUSE_S = 1 << 14, 0.0005  # after a read so big, wait: more is coming
LOSSES = 5  # of a session with a builder; with one more, a build is given up
# How much later than Nix's limits of time and silence we end a build: where nix-store there
# builds, and keeps to them; where it hands builds to a daemon that does not hear of them;
# and where a nix-store here does that.
MARGIN_S, DAEMON_MARGIN_S, HERE_MARGIN_S = 60, 5, 2

# Of Nix's serve protocol (serve-protocol.hh)
SERVE_HELLO, SERVE_REPLY = 0x390C9DEB, 0x5452EECB
SERVE_VERSION = 0x207  # 2.7; to less than 2.6, Nix 2.4 to 2.10 answer as to 2.6
# From which version on a builder ...
BARE_SINCE = 0x201  # builds a derivation that is not in its store
LOG_SIZE_SINCE = 0x202  # wants to know how long the log may be
TIMES_SINCE = 0x203  # says when the build began and ended, and may repeat it
HASHES_SINCE = 0x204  # tells a path's hash,
JOINED_SINCE = HASHES_SINCE  # which nix-copy-closure --from wants to know
ARCHIVES_SINCE = 0x205  # takes one path, with its archive behind it
OUTPUTS_SINCE = 0x206  # tells which paths the outputs have
KEPT_SINCE = 0x207  # keeps what a failed build leaves, if told to: Nix 2.4 and newer
QUERY_VALID_PATHS, QUERY_PATH_INFOS, DUMP_STORE_PATH, IMPORT_PATHS = 1, 2, 3, 4
BUILD_PATHS, QUERY_CLOSURE, BUILD_DERIVATION, ADD_TO_STORE_NAR = 6, 7, 8, 9
EXPORT_MAGIC = 0x4558494E  # after each archive in what nix-store --import reads
BUILT = (0, 1, 2, 13)  # built, substituted, already valid, resolves to already valid
PERMANENT, REJECTED, TRANSIENT, TIMED_OUT, MISC, DEPENDENCY = 3, 4, 6, 8, 9, 10

SIGTERM = 15  # POSIX has fixed it; to import signal takes 2 ms
MESSAGES, LOG = 2, 4  # the descriptors that Nix reads messages and the build's log from

DIGITS = "0123456789"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
WORD = DIGITS + LETTERS + "_"
STORE_DIGITS = "0123456789abcdfghijklmnpqrsvwxyz"  # of Nix's base 32
# What ssh in its options, and any shell on the way there, read as it stands.
PLAIN = WORD + "@%+=:,./~-"

# ---- Stand-ins ----------------------------------------------------------------------

# Each build has a hook process of its own, which over a live connection imports nothing
# slow before it replies to Nix.  What these stand for would take (Python
# 3.11, processor time, 40 starts): typing 10 ms, 2 ms if subprocess is there already,
# and 0.2 ms for each of its classes; contextlib 3 ms; json 8 ms (`quoted`).

if not TYPE_CHECKING:

    class NamedTuple(tuple):
        """A class of tuples whose fields have names, as typing's with that name."""

        def __init_subclass__(cls):
            names = cls._fields = tuple(cls.__annotations__)
            cls._field_defaults = {n: vars(cls)[n] for n in names if n in vars(cls)}
            for number, name in enumerate(names):
                setattr(cls, name, property(lambda self, number=number: self[number]))

        def __new__(cls, *values, **named):
            given = dict(zip(cls._fields, values))
            full = {**cls._field_defaults, **given, **named}
            twice = len(values) > len(given) or given.keys() & named.keys()
            if twice or full.keys() != set(cls._fields):
                raise TypeError(f"{cls.__name__} takes each of {cls._fields} once")
            return tuple.__new__(cls, [full[name] for name in cls._fields])

        def _asdict(self):
            return dict(zip(self._fields, self))

        def _replace(self, **named):
            return type(self)(**{**self._asdict(), **named})


class suppress:
    """Go on after the block if one of these errors ends it, as contextlib's."""

    def __init__(self, *errors: type[BaseException]) -> None:
        self.errors = errors

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> bool:
        return kind is not None and issubclass(kind, self.errors)


# ---- Errors -------------------------------------------------------------------------


class Error(Exception):
    """Something expected goes wrong; people see it as one line, without a traceback.

    lasting: whether it will not pass by itself, None if that is not known; remedy: what
    to do about it; meaning: as SIGNS has it, if it is ssh or Nix that says it.
    """

    status = 1  # our exit status
    lasting: bool | None = None
    remedy = ""
    meaning = ""

    def become(self, kind: type[E]) -> E:
        """This error as one of that kind, which decides what its catcher does about it."""
        error = kind(str(self))
        error.lasting, error.remedy = self.lasting, self.remedy
        error.meaning = self.meaning
        return error

    def told(self, names: dict[str, str]) -> str:
        """Its words with the remedy; names: see Machine.names."""
        remedy = self.remedy_for(names)
        return f"{self} ({remedy})" if remedy else str(self)

    def remedy_for(self, names: dict[str, str]) -> str:
        """The remedy with a machine's names in it; "" if it needs others."""
        with suppress(KeyError):
            return self.remedy.format_map(names)
        return ""


class Unreachable(Error):
    """There is no session with the builder; another machine may do."""


class WrongHostKey(Unreachable):
    """The host is not the one whose key the machines file names."""

    lasting = True
    # From OpenSSH 10 on ssh-keyscan prints comments, too.
    remedy = "if it has a new key, write into the last field of its line: "
    remedy += "ssh-keyscan -t ed25519 -p {PORT} {HOST} | grep -v '^#' | cut -d' ' -f2- | base64 -w0"


class SameStore(Unreachable):
    """The builder's store is the one here, so that builds would wait for themselves."""

    lasting, remedy = True, "take its line out of the machines file here"


class Unsendable(Error):
    """A derivation that only the Nix here can build."""


class Away(Error):
    """All machines that might do are left alone, since they failed for other builds."""


class SessionLost(Error):
    """The session with the builder, or a copy over it, ended too early."""


class Refused(SessionLost):
    """A program on the builder has ended, or spoken out of turn, instead of serving us."""


class Late(SessionLost):
    """An answer did not come in time."""

    lasting = False


class Stuck(Late):
    """A builder has waited too long for a lock there; another would not have to."""


class Nonsense(SessionLost):
    """What was read is not in the protocol, or is too much."""


class Spoilt(Error):
    """What the builder has made, or says of it, is not to be let in here."""


class NotHere(Error):
    """The builder could not do it, and another may; verdict: what to end with if none does."""

    def __init__(self, words: str, verdict: Error) -> None:
        super().__init__(words)
        self.verdict = verdict
        self.meaning = verdict.meaning = heard(Error, words).meaning


class BuildBroken(Error):
    """The build could not be done, for a reason that may not be its own."""


class BuildFailed(Error):
    """The derivation's own builder failed; building it again would not help."""

    status = 100


class BuildTimedOut(Error):
    """The build exceeded Nix's timeout or max-silent-time."""

    status = 101


class Stop(BaseException):
    """Nobody waits for the build any more, so we clean up and end with that status."""

    def __init__(self, status: int = 1) -> None:
        self.status = status


class NixGone(Stop):
    """Nobody reads our messages: the Nix that started us has ended."""


DAEMON = "if that login allows only nix-daemon, write ssh-ng://{ADDRESS} in its line"

# All that is decided by what ssh (7.6 and newer) and Nix say in words.  Columns: whether
# it lasts; who says it: ssh, or a program on the builder (far; FAR only if that is sure); what
# Error.meaning becomes, `-` if no code asks for it; the words, one of which is enough; behind
# ` = ` a remedy, with names of the machine (see Machine.names).  The first row that fits counts:
# an ssh that is refused may add that the connection was closed.
SIGNS = """\
lasts   far -        daemon-socket/socket: Permission | daemon-socket/socket': Permission | daemon-socket/socket": Permission = as root there, on Debian: usermod -aG nix-users {USER}
lasts   ssh CHANGED  HAS CHANGED = if it was set up anew: ssh-keygen -R '{KNOWN}' && ssh {LOGIN} true
lasts   ssh NEW      Host key verification failed = compare its host key and say yes: ssh {LOGIN} true
lasts   ssh -        .pub": = in {WHERE}, name the private key: that is its public half
lasts   ssh OPEN     bad permissions = chmod 600 {KEY}
lasts   ssh -        Bad owner or permissions = that file of ssh's configuration must be its owner's, chmod 600
lasts   ssh -        Bad configuration option = correct that file of ssh's configuration
lasts   ssh -        no matching = ssh here and sshd there have no cipher or key type in common
lasts   ssh -        Too many authentication failures = name one key in the machines file, with IdentitiesOnly in ssh's configuration
lasts   ssh DENIED   Permission denied ( = ssh-copy-id {LOGIN} (it asks for a password), or append the public key to ~/.ssh/authorized_keys there; the key must have no passphrase, and {USER} a shell
lasts   far -        command not found | nix-store: not found = as root there: ln -s /DIR/nix-store /usr/bin/; or in {WHERE}, write ssh://{ADDRESS}?remote-program=/DIR/nix-store
lasts   far DAEMON   protocol mismatch | EOF from daemon socket = DAEMON
lasts   any READONLY paths is not allowed = the command of that key there must be: nix-store --serve --write
lasts   far -        is not in the Nix store = its store is in another directory than the one here: no build of yours can run there
lasts   any LIMITED  you are not privileged
lasts   any -        lacks a signature | lacks a valid signature = sign it, or make the user trusted where it was refused
lasts   FAR -        ermission denied | peration not permitted = {USER} cannot write the store there: have nix-daemon run there, or log in as root
passes  far -        daemon-socket = as root there: systemctl start nix-daemon.socket
lasts   FAR -        onnection reset by peer | Broken pipe = allowed-users in nix.conf there must name {USER}, or its disk is full
passes  any UNSHARED Control socket connect(
passes  ssh SILENT   Connection refused = is sshd running there, on that port?
passes  ssh SILENT   onnection timed out | peration timed out = is the machine on, and can it be reached from here?
passes  ssh SLOW     timed out = is the machine on, and can it be reached from here?
passes  ssh SILENT   No route to host | is down = is the machine on, and can it be reached from here?
passes  ssh NAMELESS resolve hostname = correct {WHERE}, or add {HOST} to DNS, /etc/hosts or ~/.ssh/config
passes  ssh -        kex_exchange_identification | Connection closed by = if logins have just failed, sshd there may refuse this host: wait a minute
passes  any FULL     disk is full | No space left on device | lack of free disk space = make room there, with nix-collect-garbage
passes  ssh SLOW     not responding
passes  any -        Broken pipe | onnection reset | onnection closed | closed by | is unreachable | shutting down
passes  any -        emporarily unavailable | annot allocate memory | is busy
passes  far -        slurm controller | odes are busy | ode failure | ask launch for | been revoked | Socket timed out
passes  FAR -        disconnected unexpectedly | end-of-file = is nix-daemon well? as root there: systemctl start nix-daemon.socket
passes  FAR -        Too many open files | creating thread | interrupted by
unknown any UNSEATED refused by peer
unknown any UNSHARED disabling multiplexing
unknown any LACKS    experimental Nix feature | experimental Lix feature = in nix.conf there: extra-experimental-features = ca-derivations
unknown any LACKS    is required to build | platform mismatch | missing system features
unknown any SPOILT   hash mismatch importing | size mismatch importing | is not valid | bad archive | Nix archive
unknown any SPOILT   look like something created by
unknown far OVERTIME timed out after
unknown far BROKEN   builder for ' | builder failed
unknown any CUT      unexpected end-of-file | Broken pipe | builder.invalid
unknown far FAILED   in fixed-output derivation | may not be deterministic | is not allowed to | bytes of log output
""".replace("= DAEMON", f"= {DAEMON}")
LASTING = {"lasts": True, "passes": False, "unknown": None}
# Whose words a row may be in; "" if that is not known.
SPEAKERS = {"ssh": ("ssh", ""), "far": ("far", ""), "FAR": ("far",)}
SPEAKERS["any"] = ("ssh", "far", "")
# What to do if a program there ends, or ssh does, and nothing above tells why.
USELESS = "that login does not run nix-store; try: ssh {LOGIN} nix-store --version"
CHATTY = "a start-up file there may print nothing; or is {USER}'s shell none?"
CHATTY += " as root there: chsh -s /bin/sh {USER}"


def signs_in(words: str, speaker: str = "") -> Iterator[tuple[bool | None, str, str]]:
    """For each row of SIGNS that fits these words, and may be that speaker's ("": anybody's):
    whether it lasts, its meaning or "", its remedy or ""."""
    for row in SIGNS.splitlines():
        lasting, who, meaning, rest = row.split(None, 3)
        said, _, remedy = rest.partition(" = ")
        if speaker in SPEAKERS[who] and any(s in words for s in said.split(" | ")):
            yield LASTING[lasting], meaning.strip("-"), remedy


def heard(kind: type[E], words: str, speaker: str = "") -> E:
    """An error with these words.  The first row of SIGNS that fits says whether it lasts, what
    it means and what helps.  If none fits: what ssh says will pass; what a program says that
    should be nix-store, and answers no question, will last; of others it is not known."""
    lasting = {"ssh": False, "far": True}.get(speaker)
    unknown = lasting, "", USELESS if speaker == "far" else ""
    error = kind(words)
    error.lasting, error.meaning, error.remedy = next(signs_in(words, speaker), unknown)
    return error


def means(words: str, meaning: str) -> bool:
    """Whether ssh or Nix says, among other things, what means that."""
    return any(found == meaning for _, found, _ in signs_in(words))


def refuses(words: str, *meanings: str) -> bool:
    """Whether nix-store itself says in these lines, as no build's log does, what means one of
    those."""
    own = "\n".join(line for line in words.splitlines() if line.startswith("error:"))
    return any(means(own, meaning) for meaning in meanings or ("LIMITED", "READONLY"))


# ---- Wire: Nix's integers and strings -----------------------------------------------


def encode(text: str) -> bytes:
    """Nix's strings are bytes; here they are text that can hold any of them."""
    return text.encode("utf-8", "surrogateescape")


def text_of(data: bytes) -> str:
    """The text that encode would make these bytes of."""
    return data.decode("utf-8", "surrogateescape")


def decode(data: bytes) -> str:
    """Words for people, of bytes that may be anything: what is no UTF-8 becomes U+FFFD."""
    return data.decode("utf-8", "replace")


def integer(number: int) -> bytes:
    """64 bits, little-endian."""
    return struct.pack("<Q", number)


def string(text: str) -> bytes:
    """The length, the bytes, and zeros up to a multiple of 8."""
    data = encode(text)
    return integer(len(data)) + data + bytes(-len(data) % 8)


def strings(texts: Iterable[str]) -> bytes:
    """A list or set: the count, and each string."""
    encoded = [string(text) for text in texts]
    return integer(len(encoded)) + b"".join(encoded)


def read_integer(read: Read) -> int:
    """The next integer; read, here and below, returns exactly so many bytes."""
    return int(struct.unpack("<Q", read(8))[0])


def read_string(read: Read) -> str:
    """The next string; Nonsense if it is too long or not padded with zeros."""
    length = read_integer(read)
    if length > WIRE_LIMIT_BYTES:
        raise Nonsense(f"a string of {length} bytes was announced: that cannot be")
    padded = read(length + -length % 8)
    if any(padded[length:]):
        raise Nonsense("the padding of a string is not zero")
    return text_of(padded[:length])


def read_strings(read: Read, each: int = 1) -> list[str]:
    """A list or set of items of so many strings; its count is believed only as far as these
    arrive."""
    result: list[str] = []
    size = 0
    for _ in range(each * read_integer(read)):
        result.append(read_string(read))
        size += 64 + len(result[-1])
        if size > WIRE_LIMIT_BYTES:
            raise Nonsense("a list of strings has no end")
    return result


def sha256_of(text: str) -> bytes:
    """The SHA-256 of a text; to import hashlib takes a while."""
    import hashlib

    return hashlib.sha256(encode(text)).digest()


def base32(data: bytes) -> str:
    """A hash in the digits of Nix's own base 32."""
    number, count = int.from_bytes(data, "little"), (8 * len(data) + 4) // 5
    places = reversed(range(count))
    return "".join(STORE_DIGITS[number >> 5 * place & 31] for place in places)


def from_base32(text: str) -> bytes:
    """What base32 would make that text of; ValueError if it is none."""
    number = 0
    for digit in text:
        number = number << 5 | STORE_DIGITS.index(digit)
    return number.to_bytes(len(text) * 5 // 8, "little")


class PathInfo(NamedTuple):
    """What a builder says of a path in its store.

    size: of its archive (NAR), in bytes; hash: of that, such as sha256:0mdq..., told from
    protocol 2.4 on, as is rest: its content address and its signatures, as they came.
    """

    path: str
    deriver: str
    references: tuple[str, ...]
    size: int
    hash: str = ""
    rest: bytes = b""

    def encode(self) -> bytes:
        """As the answer to QueryPathInfos has it."""
        head = string(self.path) + string(self.deriver) + strings(self.references)
        sizes = integer(self.size) + integer(self.size)  # to download; of the archive
        tail = string(self.hash) + self.rest if self.rest else b""  # from 2.4 on
        return head + sizes + tail

    @property
    def address(self) -> str:
        """Its content address, such as fixed:r:sha256:04zw..., or ""."""
        return text_of(self.rest[8 : 8 + int.from_bytes(self.rest[:8], "little")])

    def addressed_path(self) -> str:
        """The path that its content address makes (as makeFixedOutputPath in Nix's
        store-dir-config.cc), or "".  Nix itself checks that what is in it has that address."""
        method, _, digits = self.address.rpartition(":")
        directory, _, last = self.path.rpartition("/")
        others = sorted({*self.references} - {self.path})
        others += ["self"] if self.path in self.references else []
        try:
            digest, kind = from_base32(digits).hex(), ":".join(["source", *others])
        except (OverflowError, ValueError):
            return ""
        if method == "text:sha256":
            kind = ":".join(["text", *others])
        elif method != "fixed:r:sha256":
            kind, flat = "output:out", method.replace("fixed", "fixed:out", 1)
            digest = sha256_of(f"{flat}:{digest}:").hex()
        whole = sha256_of(f"{kind}:sha256:{digest}:{directory}:{last[33:]}")
        folded = bytes(a ^ b for a, b in zip(whole[:20], whole[20:] + bytes(8)))
        return f"{directory}/{base32(folded)}-{last[33:]}"


def read_infos(read: Read, version: int) -> Infos:
    """The answer to QueryPathInfos in that version of the protocol, by path."""
    infos: Infos = {}
    most = WIRE_LIMIT_BYTES
    while path := read_string(read):
        deriver, references = read_string(read), tuple(read_strings(read))
        read_integer(read)
        size, digest, rest = read_integer(read), "", b""
        if version >= HASHES_SINCE:
            digest = read_string(read)
            rest = string(read_string(read)) + strings(read_strings(read))
        infos[path] = PathInfo(path, deriver, references, size, digest, rest)
        most -= sum(64 + len(word) for word in (path, deriver, digest, *references))
        most -= len(rest)
        if most < 0:
            raise Nonsense("a list of paths has no end")
    return infos


# ---- The calling Nix ----------------------------------------------------------------


def only(text: str, characters: str) -> bool:
    """Whether the text has no other characters than these."""
    return not text.strip(characters)


def unquote(text: str) -> str:
    """Percent-decoding."""
    if "%" not in text:
        return text
    from urllib import parse

    return parse.unquote(text, errors="surrogateescape")


def quote(text: str) -> str:
    """Percent-encoding as Nix 2.24 and newer render the parameters of a store URI."""
    if only(text, WORD):
        return text
    from urllib import parse

    return parse.quote(text, safe="~!$'()*,;:@/?", errors="surrogateescape")


def split_parameters(uri: str) -> tuple[str, dict[str, str]]:
    """A store URI without its parameters, and those by name."""
    base, _, query = uri.partition("?")
    pairs = [item.partition("=") for item in query.split("&") if item]
    return base, {name: unquote(value) for name, _, value in pairs}


def with_parameters(base: str, parameters: dict[str, str]) -> str:
    """The store URI that split_parameters would cut into these."""
    pairs = (f"{quote(k)}={quote(v)}" for k, v in sorted(parameters.items()))
    return f"{base}?{'&'.join(pairs)}" if parameters else base


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
        path = unquote(base.removeprefix("local://"))
        root = parameters.get("root", path if path.startswith("/") else "").rstrip("/")
        directory = parameters.get("store") or (default or "/nix/store").rstrip("/")
        state = environ.get("NIX_STATE_DIR") or "/nix/var/nix"
        return cls(
            directory=directory,
            real=parameters.get("real", f"{root}/nix/store" if root else directory),
            state=parameters.get("state", f"{root}/nix/var/nix" if root else state),
            remote="" if uri == "auto" else uri,
        )

    def owns(self, path: str) -> bool:
        """Whether that is what a path in it looks like, as every Nix makes them."""
        directory, _, last = path.rpartition("/")
        digest, dash, name = last[:32], last[32:33], last[33:]
        right = only(digest, STORE_DIGITS) and only(name, WORD + "+-.?=")
        whole = dash == "-" and 0 < len(name) < 212
        return directory == self.directory and right and whole

    def name(self, path: str) -> str:
        """The last part of a store path; Error if it is not one of this store."""
        if not self.owns(path):
            raise Error(f"{path!r} is not a store path in {self.directory}")
        return path.rpartition("/")[2]

    @property
    def is_cache(self) -> bool:
        """Whether it is no directory of files, but a binary cache, as file:// and s3://."""
        scheme, separator, _ = self.remote.partition("://")
        return bool(separator) and scheme not in ("local", "local-overlay", "unix")

    def file(self, path: str) -> str:
        """The file name of what has that store path."""
        return f"{self.real}/{self.name(path)}"


# What matters to a program that reads or writes the local store.  The build users'
# group goes along because opening the store as root gives the store to that group.
PASSED_SETTINGS = """build-users-group experimental-features auto-optimise-store
use-case-hack fsync-metadata fsync-store-paths sync-before-registering use-sqlite-wal
allow-symlinked-store ignored-acls min-free max-free"""


class Nix:
    """The Nix that started us: its settings, arguments among them; old: it is a 1.x."""

    def __init__(
        self, old: bool, settings: dict[str, str], environ: dict[str, str]
    ) -> None:
        self.old, self.settings, self.environ = old, settings, environ
        default = environ.get("NIX_REMOTE", "") if old else ""
        uri = settings.get("store", default) or "auto"
        if uri.startswith("."):  # up to 2.26: as seen from where Nix runs
            uri = os.path.realpath(f"/proc/{os.getppid()}/cwd/{uri}")
        self.store = Store.parse(uri, environ)
        file = environ.get("NIX_REMOTE_SYSTEMS") or "/etc/nix/machines"
        self.builders = f"@{file}" if old else settings.get("builders", "")
        default = f"{'/run/nix' if old else self.store.state}/current-load"
        self.slot_directory = environ.get("NIX_CURRENT_LOAD") or default
        # Nix sends all its settings (some Lix few: is_terse), so each tells its version.
        self.since_2_3 = "trace-function-calls" in settings
        self.since_2_4 = "experimental-features" in settings
        self.since_2_24 = "nix-shell-always-looks-for-shell-nix" in settings
        self.is_lix = "repl-overlays" in settings
        self.is_terse = False  # whether it sends few of them, as Lix 2.92 and 2.93
        lint = "short-path-literals"  # warn-... at first, and lint-... from 2.36 on
        self.since_2_31 = any(name.endswith(lint) for name in settings)

    def words(self, setting: str) -> list[str]:
        """The words of a setting that is a list."""
        return self.settings.get(setting, "").split()

    def number(self, setting: str) -> int:
        """A setting that is a number; 0 if it is not."""
        text = self.settings.get(setting, "")
        return min(int(text[:20]), (1 << 64) - 1) if text.isdecimal() else 0

    def enabled(self, setting: str) -> bool:
        """Whether a setting is on."""
        return self.settings.get(setting) == "true"

    def options(self) -> list[str]:
        """The PASSED_SETTINGS that it has, as words `--option NAME VALUE`, which every 2.x knows."""
        settings = self.settings
        known = [name for name in PASSED_SETTINGS.split() if name in settings]
        return [word for name in known for word in ("--option", name, settings[name])]

    def child_environ(self, **more: str) -> dict[str, str]:
        """The environment of ssh and Nix's programs: nobody is there for a prompt."""
        unwanted = ("DISPLAY", "SSH_ASKPASS", "NIX_HELD_LOCKS", "NIX_BUILD_REMOTE_SSH")
        kept = {n: text for n, text in self.environ.items() if n not in unwanted}
        return {**kept, **more}

    def store_environ(self) -> dict[str, str]:
        """The environment of a program that is to open the local store."""
        remote = self.store.remote
        return self.child_environ(**({"NIX_REMOTE": remote} if remote else {}))


class Request(NamedTuple):
    """Nix asks: may this be built elsewhere?  willing: it has a slot of its own free; able: it
    could build this itself, perhaps later."""

    willing: bool
    system: str
    derivation: str
    features: frozenset[str]
    able: bool = False

    @property
    def kind(self) -> str:
        """What a machine must be able to do."""
        return " ".join([self.system, *sorted(self.features)])


def might_build_itself(nix: Nix, request: Request) -> bool:
    """Whether the calling Nix could build this, perhaps later."""
    if nix.settings.get("max-jobs") == "0":
        return False
    if nix.old:  # it has no features, and builds what requires some all the same
        return request.system == nix.settings["system"]
    systems = [*nix.words("system"), *nix.words("extra-platforms"), "builtin"]
    if f'"{request.system}"' in nix.settings.get("external-builders", "[]"):
        systems.append(request.system)  # that is JSON, from 2.33 on
    # Some experimental features are system features too, which it does not tell us.
    features = nix.words("system-features") + nix.words("experimental-features")
    return request.system in systems and request.features.issubset(features)


def read_stdin(count: int) -> bytes:
    """So many bytes that Nix sends; EOFError if it has ended."""
    data = sys.stdin.buffer.read(count)
    if len(data) != count:
        raise EOFError
    return data


def read_line() -> str:
    """A line that Nix 1.x sends; EOFError if it has ended."""
    line = sys.stdin.buffer.readline(WIRE_LIMIT_BYTES)
    if not line.endswith(b"\n"):
        raise EOFError
    return text_of(line)


def is_old_call(arguments: list[str]) -> bool:
    """Whether Nix 1.x calls: localSystem maxSilentTime printBuildTrace [buildTimeout]."""
    system, *numbers = arguments or [""]
    is_system = not system.isdigit() and not system.startswith("-")
    return is_system and len(numbers) in (2, 3) and all(map(str.isdigit, numbers))


def old_nix(arguments: list[str], environ: dict[str, str]) -> Nix:
    """The Nix 1.x that calls with these arguments."""
    names = ("system", "max-silent-time", "print-build-trace", "timeout")
    settings = dict(zip(names, [*arguments, "0"]))
    if environ.get("NIX_REMOTE") == "daemon":  # which we work for: it holds the locks
        environ = {**environ, "NIX_REMOTE": ""}
    # From 1.2 on it says what its nix.conf and its command line have set.
    options = environ.get("_NIX_OPTIONS", "").splitlines()
    settings["max-jobs"] = "0" if "build-max-jobs=0" in options else ""
    return Nix(True, settings, environ)


def new_nix(arguments: list[str], environ: dict[str, str]) -> Nix:
    """The Nix 2.x that sends its settings first; the last argument is its verbosity."""
    settings = {}
    while read_integer(read_stdin):
        name = read_string(read_stdin)
        settings[name] = read_string(read_stdin)
    return Nix(False, {**settings, "verbosity": arguments[-1]}, environ)


def requests(nix: Nix) -> Iterator[Request]:
    """What Nix asks, one at a time, until it has no more."""
    with suppress(EOFError):
        while request := read_old_request() if nix.old else read_new_request():
            yield request


def read_old_request() -> Request:
    """A line: willing, system, derivation, and features from 1.1 on."""
    line = read_line()
    words = line.split()
    if len(words) not in (3, 4):
        raise Error(f"cannot understand Nix's request {line!r}")
    features = frozenset(filter(None, ",".join(words[3:]).split(",")))
    return Request(words[0] == "1", words[1], words[2], features)


def read_new_request() -> Request | None:
    """A request of Nix 2.x, which begins with the word `try`; None for any other word."""
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


# ---- Talking ------------------------------------------------------------------------

ERROR, WARN, INFO, TALKATIVE, DEBUG = range(5)
# Nix's types of an activity, and of news of one:
COPY_PATH, COPY_PATHS, WAITING = 100, 103, 111
LOG_LINE, PHASE, PROGRESS = 101, 104, 105
# The characters that `printable` takes out, as str.translate wants it:
CONTROLS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {*b"\n\t"})


def printable(text: str) -> str:
    """The text without colours and other control characters, which a builder may send."""
    first, *parts = text.split("\x1b[")
    text = first + "".join(part.lstrip(DIGITS + ";")[1:] for part in parts)
    text = decode(encode(text))  # Nix reads no JSON that is not UTF-8
    return text.translate(CONTROLS)


def quoted(text: str) -> str:
    """A string of JSON, as json.dumps writes it but for control characters."""
    text = printable(text).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + text.replace("\n", "\\n").replace("\t", "\\t") + '"'


def short(derivation: str) -> str:
    """The name of a derivation, without the store and the hash."""
    return derivation.rpartition("/")[2][33:].removesuffix(".drv") or derivation


class Tally:
    """What a build has taken so far: seconds, and bytes copied, by phase."""

    def __init__(self) -> None:
        self.phase, self.since = PHASES[0], time.monotonic()
        self.seconds, self.bytes = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0)

    def begin(self, phase: str) -> None:
        """Count what comes now for that phase."""
        now = time.monotonic()
        self.seconds[self.phase] += now - self.since
        self.phase, self.since = phase, now


class Talk:
    """Replies, messages and activities to Nix, on descriptor 2, in its dialect."""

    def __init__(self, nix: Nix) -> None:
        self.old = nix.old
        self.debug = "NIX_DEBUG_HOOK" in nix.environ
        self.verbosity = nix.number("verbosity")
        # Nix's numbers of error, warn, info, talkative and debug, in this order: 2.0 has no
        # warn, 2.3 inserted it, 2.4 notice; 1.x has error, info, talkative, chatty, debug.
        self.levels = (0, 0, 1, 2, 4)
        if nix.old:
            self.levels = (0, 0, 0, 1, 1)
        elif nix.since_2_4:
            self.levels = (0, 1, 3, 4, 6)
        elif nix.since_2_3:
            self.levels = (0, 1, 2, 3, 5)
        self.started = 0  # how many activities have been
        # Of those that go on, the number, how much is done, and of how much; each is a part
        # of the one before (for us: Nix is told no parent).
        self.running: list[tuple[int, int, int]] = []
        self.told = 0.0  # when Nix was last told how much is done
        self.tally = Tally()  # of the build that we were asked of last

    def write(self, line: str) -> None:
        """A line to Nix; NixGone if it has ended."""
        write_all(MESSAGES, encode(line) + b"\n")

    def say(self, level: int, text: str) -> None:
        """Show a message, if the user wants that level.  2.x drops plain lines once a build
        is accepted, so for it all are @nix lines."""
        if not self.debug and self.levels[level] > self.verbosity:
            return
        if level == DEBUG:
            text = f"[{time.monotonic() - START:.3f} s] {text}"
        if not self.old:
            number = 0 if self.debug else self.levels[level]
            self.write(f'@nix {{"action":"msg","level":{number},"msg":{quoted(text)}}}')
            return
        for line in printable(text).splitlines():
            self.write(f" {line}" if line[:2] in ("# ", "@ ") else line)

    def begin(self, depth: int, text: str, *fields: str, size: int = 0) -> None:
        """Begin an activity for the progress bar of 2.x; what runs at that depth, or deeper,
        is over.  depth: 0 for a step of the build, 1 for so many paths copied in it, 2 for each,
        of so many bytes."""
        self.end(depth)
        if not self.old:
            self.started += 1
            self.running.append((self.started, 0, size))
            values = ",".join(map(quoted, fields))
            level = self.levels[INFO if depth else TALKATIVE]
            kind = (0, COPY_PATHS, COPY_PATH)[depth]
            head = f'"id":{self.started},"level":{level},"type":{kind}'
            tail = f'"text":{quoted(text)},"parent":0,"fields":[{values}]'
            self.write(f'@nix {{"action":"start",{head},{tail}}}')

    def progress(self, more: int) -> None:
        """Tell that so many bytes more were copied, at most every 0.1 s and at the end."""
        self.tally.bytes[self.tally.phase] += more
        if self.running[2:] and self.advance(2, more):
            self.end(2)
            self.advance(1, 1)

    def advance(self, depth: int, more: int) -> bool:
        """Tell that the activity at that depth has done so much more; whether that is all."""
        number, done, size = self.running[depth]
        done = min(done + more, size)
        self.running[depth] = number, done, size
        if done == size or depth == 1 or time.monotonic() > self.told + 0.1:
            self.told = time.monotonic()
            head = f'"action":"result","id":{number},"type":{PROGRESS}'
            self.write(f'@nix {{{head},"fields":[{done},{size},0,0]}}')
        return done == size

    def end(self, depth: int = 0) -> None:
        """End the activities at that depth and deeper."""
        while len(self.running) > depth:
            self.write(f'@nix {{"action":"stop","id":{self.running.pop()[0]}}}')

    def say_failure(self, error: Error) -> None:
        """Show what we end with, as Nix does its own errors."""
        if self.old:
            self.say(ERROR, f"error: {error}")
        else:
            text = '"\\u001b[31;1merror:\\u001b[0m ' + quoted(str(error))[1:]
            self.write(f'@nix {{"action":"msg","level":0,"msg":{text}}}')

    def say_bug(self) -> None:
        """Show the traceback of what must not happen."""
        import traceback

        text = "a bug in nix_build_remote.py, please report it:"
        self.say(ERROR, f"{text}\n{traceback.format_exc()}")

    def reply(self, word: str, name: str = "") -> None:
        """Answer `# accept` and so on; 2.x waits for a name right after an accept."""
        self.say(DEBUG, f"the answer is: {word} {name}".rstrip())
        self.write(f"# {word}")
        if word == "accept" and not self.old:
            self.write(name)


def write_all(descriptor: int, data: bytes) -> None:
    """Write to Nix, which reads the messages and the log for as long as it lives."""
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BrokenPipeError:
            raise NixGone from None


def nix_has_gone() -> bool:
    """Whether nobody reads our messages any more."""
    poll = select.poll()
    poll.register(MESSAGES, select.POLLHUP)  # which macOS says, and Linux does not
    gone = select.POLLERR | select.POLLHUP
    return any(event & gone for _, event in poll.poll(0))


def wait_readable(
    descriptors: Iterable[int], timeout_s: float, full: Iterable[int] = ()
) -> set[int]:
    """Wait for one of these to have something to read, or to end, or for one of those that
    were full to take something again; returns all that do, none if the time is over.
    NixGone if Nix ends meanwhile."""
    poll = select.poll()
    poll.register(MESSAGES, select.POLLHUP)
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    for descriptor in full:
        poll.register(descriptor, select.POLLOUT)
    most = (1 << 31) - 1  # milliseconds that poll can take: 24 days
    events = poll.poll(None if timeout_s == math.inf else min(timeout_s * 1000, most))
    ready = {descriptor for descriptor, _ in events if descriptor != MESSAGES}
    if not ready and nix_has_gone():
        raise NixGone
    return ready


def wait_until_read() -> None:
    """Wait until Nix has read the log and all messages: what is unread when we exit is
    dropped (2.x reads the messages to their end, 1.x neither of them)."""
    unread: int | None = None  # bytes, at the last look
    deadline = time.monotonic() + DRAIN_TIMEOUT_S
    while unread != 0 and time.monotonic() < deadline and not nix_has_gone():
        left = unread_in(MESSAGES) + unread_in(LOG)
        if left != unread:
            unread, deadline = left, time.monotonic() + DRAIN_TIMEOUT_S
        time.sleep(0.002 if unread else 0)


def unread_in(pipe: int) -> int:
    """How many bytes in a pipe nobody has read yet."""
    from termios import FIONREAD

    with suppress(OSError):
        if stat.S_ISFIFO(os.fstat(pipe).st_mode):
            return int(struct.unpack("i", fcntl.ioctl(pipe, FIONREAD, bytes(4)))[0])
    return 0


# ---- Machines -----------------------------------------------------------------------

# What store URIs may say; only those of the first line mean something to a hook.
PARAMETERS = """ssh-key compress base64-ssh-public-host-key remote-program remote-store
max-connections max-connection-age trusted path-info-cache-size priority want-mass-query system-features"""
OWN_STORES = ("auto", "daemon", "local")  # of this machine, without any scheme
# How people name the machine that they are on:
THIS_MACHINE = ("localhost", "ssh://localhost", "ssh-ng://localhost")
SERVE = ("nix-store", "--serve", "--write")
PREFIXES = ["sudo", "doas", "env", "nice", "ionice"]  # of a command that begins at once


class Way(NamedTuple):
    """How a session with a machine is had.

    there: what ssh runs there, as words for the shell there; () without ssh.  here: the
    command that runs here, a nix-store which opens the machine's store; () if none does.
    `there` alone is a nix-store by ssh; `here` alone is another store that Nix here opens;
    with both, ssh leads from the nix-store here to a nix-daemon there.
    """

    there: tuple[str, ...] = ()
    here: tuple[str, ...] = ()

    @property
    def is_job(self) -> bool:
        """Whether it is another program that starts Nix's there, as `srun nix-store` does: it
        may have to wait for its turn, and what it holds others may want."""
        program = (*self.there, SERVE[0])[0].strip("'").rpartition("/")[2]
        return program not in (SERVE[0], "nix-daemon", *PREFIXES)


class Machine(NamedTuple):
    """A builder, as one line of the machines file describes it.

    where: file:line; text: as it was written; name: what Nix's own hook calls it;
    slot_prefix, upload_prefix: what the names of its slot files and of its upload lock begin
    with, as that hook has them; destination: [user@]host, "" if it is a store that a program
    here opens; port: 0 for what ssh finds in its configuration; key: a private key's file, or
    ""; host_key: a line such as "ssh-ed25519 AAAA...", or ""; ways: to have a session, where
    only trying shows which of them its login allows; none if it is this machine.
    """

    where: str
    text: str
    name: str
    slot_prefix: str
    upload_prefix: str
    destination: str
    port: int
    systems: tuple[str, ...]
    key: str
    max_jobs: int
    speed: float
    supported: frozenset[str]
    mandatory: frozenset[str]
    host_key: str
    compress: bool
    ways: tuple[Way, ...]

    @classmethod
    def parse(cls, where: str, text: str, nix: Nix) -> Machine:
        """Understand one entry, which is at `file:line`; Error if that cannot be."""
        given = ["" if field == "-" else field for field in text.split()] + [""] * 8
        uri, systems, key, jobs, speed, supported, mandatory, host_key = given[:8]
        try:
            base, parameters = split_parameters(uri)
            destination, port = parse_destination(base, parameters)
            if not "".join(given).isprintable():
                raise ValueError(f"{text!r} has characters that cannot be printed")
            known = listed(systems) or (nix.settings.get("system", ""),)
            features = listed(f"{supported},{mandatory}")
            name = machine_name(uri, nix)
            uploads = file_name(name, in_lix=nix.is_lix)
            slots = file_name(f"{'+'.join(known)}-{name}")
            pinned = host_key or parameters.get("base64-ssh-public-host-key", "")
            return cls(
                where=where,
                text=" ".join(text.split()),
                name=name,
                slot_prefix=slots if nix.old else uploads,
                upload_prefix=uploads,
                destination=destination,
                port=port,
                systems=known,
                key=parse_key(key or parameters.get("ssh-key", "")),
                max_jobs=parse_max_jobs(jobs),
                speed=parse_speed(speed),
                supported=frozenset(listed(supported)),
                mandatory=frozenset(listed(mandatory)),
                host_key=parse_host_key(pinned),
                compress=parameters.get("compress") in ("true", "yes", "1"),
                ways=parse_ways(base, parameters, nix, features),
            )
        except ValueError as error:
            raise Error(f"{where}: {error}") from None

    @property
    def host(self) -> str:
        """The destination without the user."""
        return self.destination.rpartition("@")[2]

    @property
    def names(self) -> dict[str, str]:
        """What remedies name, as far as it has that; a store here is reached without ssh.
        LOGIN is what a person types behind `ssh`, KNOWN its name in known_hosts."""
        key, port, host = self.key, self.port, self.host
        user = self.destination.rpartition("@")[0] or "USER"
        names = {"WHERE": self.where, "KEY": key or "the key file", "USER": user}
        if host:
            words = [f"-i {key} " if key else "", f"-p {port} " if port else ""]
            names["LOGIN"] = "".join(words) + self.destination
            names["KNOWN"] = f"[{host}]:{port}" if port else host
            names["ADDRESS"] = called(self.name)
            names |= {"HOST": host, "PORT": str(port or 22)}
        return names


def called(name: str) -> str:
    """What people call it: the name between :// and ?, or all of it if there is nothing."""
    return name.partition("?")[0].partition("://")[2] or name or "-"


def listed(text: str) -> tuple[str, ...]:
    """The words of a comma-separated list."""
    return tuple(filter(None, text.split(",")))


def machine_name(uri: str, nix: Nix) -> str:
    """What Nix's own hook calls that machine, in messages and in file names."""
    if nix.old:
        return uri
    base, parameters = split_parameters(uri)
    if "://" not in base and base not in OWN_STORES and base[:1] != "/":
        base, uri = f"ssh://{base}", f"ssh://{uri}"
    if nix.since_2_31:  # it parses and renders addresses anew,
        begin, slash, authority = base.rpartition("//")
        user, at, host = authority.rpartition("@")
        host = unquote(host.strip("[]"))
        if is_address(host):
            base = f"{begin}{slash}{user}{at}[{host.replace('%', '%25')}]"
    if not nix.since_2_24:
        return uri if parameters else base
    if base[:1] == "/" or (base == "local" and parameters):
        base = f"local://{base.removeprefix('local')}"
    return with_parameters(base, parameters)  # and parameters


def file_name(text: str, *, in_lix: bool = False) -> str:
    """The stock hook's way to make one; too long a name ends in its hash, and in Lix each."""
    name = text.replace("/", "_")
    if len(encode(name)) <= NAME_LIMIT_BYTES and not in_lix:
        return name
    sha256 = sha256_of(text)
    if in_lix:
        return f"{decode(encode(name)[:48])}-{base32(sha256)[:16]}"
    return f"{name[:50]}-{sha256.hex()[:32]}"


def is_here(base: str) -> bool:
    """Whether a program here opens that store.  For Nix, too, localhost is no ssh."""
    scheme, separator, _ = base.rpartition("://")
    is_own = base.removesuffix("/") in THIS_MACHINE or base in OWN_STORES
    is_path = not separator and base.startswith("/")
    return is_own or is_path or scheme in ("local", "unix")


def parse_destination(base: str, parameters: dict[str, str]) -> tuple[str, int]:
    """[user@]host, "" for a store here, and port; ValueError says what is wrong."""
    scheme, separator, authority = base.rpartition("://")
    if is_here(base):
        return "", 0
    if scheme not in ("ssh", "ssh-ng") and (separator or "/" in base):
        hint = "use ssh://[user@]host[:port]"
        raise ValueError(f"{base!r} is no store to build in; {hint}")
    user, at, rest = authority.removesuffix("/" if separator else "").rpartition("@")
    if separator:
        user, rest = unquote(user), unquote(rest)
    if at and not is_word(user):
        raise ValueError(f"{user!r} is not a user name")
    host, port = parse_host(rest)
    for name in sorted(parameters.keys() - PARAMETERS.split()):  # we shall not obey it
        known = "this hook does not support the parameter"
        raise ValueError(f"{known} {name!r}; the machine can be used without it")
    return user + at + host, port


def parse_host(text: str) -> tuple[str, int]:
    """host, host:port, IPv6 with or without brackets, [IPv6]:port; port 0 if none."""
    host, port = text, ""
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        if not bracket or port == ":" or port[:1] not in ("", ":"):
            host = ""
        port = port[1:]
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
        host = host if port else ""
    if not only(port, DIGITS) or (":" in host and not is_address(host)):
        host = ""
    if not is_word(host):
        raise ValueError(f"{host or text!r} is not a host name")
    if len(port) > 5 or int(port or 0) > 65535:
        raise ValueError(f"there is no port {port}")
    return host, int(port or 0)


def is_address(text: str) -> bool:
    """Whether that is an address of IPv6, perhaps with a zone."""
    address, percent, zone = text.partition("%")
    right = address.count(":") > 1 and only(address, DIGITS + "abcdefABCDEF:.")
    return right and (not percent or is_word(zone))


def is_word(text: str) -> bool:
    """Whether ssh takes that as a user or a host (valid_ruser, valid_hostname in its ssh.c):
    it may not look like an option, or have white space or marks of the shell."""
    strange = set(" '`\"$;&<>|(){},/").intersection(text)
    return text[:1] not in ("", "-", "%") and text.isprintable() and not strange


def parse_ways(
    base: str, parameters: dict[str, str], nix: Nix, offered: tuple[str, ...]
) -> tuple[Way, ...]:
    """What that store URI makes of a session.  offered: the features that its line lists;
    as with Nix's own hook, a store here has no others."""
    is_this = base.removesuffix("/") in THIS_MACHINE
    if is_this and "remote-store" not in parameters:
        return ()
    program = parameters.get("remote-program", "").split()
    store, here = parameters.get("remote-store", ""), is_here(base)
    if here and not is_this:
        rest = {**parameters}
        offered += (*rest.pop("system-features", "").split(),)
        program, store = [], with_parameters(base, rest)
    stored = ("--store", store) if store else ()
    if not "".join([*program, store]).isprintable():
        raise ValueError("its parameters have characters that cannot be printed")
    if nix.old and (program or store):  # its programs connect by themselves
        raise ValueError("Nix 1.x can use only the usual store of a host")
    serve = (*(program or SERVE[:1]), *SERVE[1:], *stored)
    if here:
        features = ("--option", "system-features", " ".join(sorted({*offered})))
        return (Way(here=(*serve, *features)),)
    if not base.startswith("ssh-ng:") or nix.old:
        return (Way(for_shell(serve)),)
    daemon = for_shell((*(program or ["nix-daemon"]), "--stdio", *stored))
    bridge = Way(daemon, (*SERVE, "--store", "ssh-ng://builder"))
    return (bridge,) if program else (Way(for_shell(serve)), bridge)


def for_shell(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words, quoted for a shell where they must be."""
    if only("".join(words), PLAIN):
        return words
    import shlex

    return tuple(map(shlex.quote, words))


def parse_key(text: str) -> str:
    """The name of a private key's file."""
    if not only(text, PLAIN) or text.startswith("-"):
        hint = "has characters that cannot be handed on to ssh; rename the file"
        raise ValueError(f"the key's name {text!r} {hint}")
    return text


def parse_max_jobs(text: str) -> int:
    """A whole number, 1 if it is missing."""
    if len(text) > 6 or not only(text, DIGITS):
        raise ValueError(f"maxJobs is {text!r}, not a whole number")
    return int(text or 1)


def parse_speed(text: str) -> float:
    """Any non-negative decimal, as from 2.20 on (before: whole); 0 counts as 1."""
    whole, _, fraction = text.partition(".")
    digits = whole + fraction
    is_short = len(whole) <= 9 and len(fraction) <= 9
    if not is_short or not only(digits, DIGITS) or (text and not digits):
        raise ValueError(f"speedFactor is {text!r}, not a number of 0 or more")
    return float(text or 1) or 1.0


def parse_host_key(text: str) -> str:
    """The line that the base64 stands for, or ""."""
    if not text:
        return ""
    import binascii
    import re

    try:
        padded = text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4)
        line = binascii.a2b_base64(padded.encode()).decode("ascii").strip()
    except ValueError:
        line = ""
    if not re.fullmatch(r"[a-z0-9@.-]+ [A-Za-z0-9+/=]+( [ -~]*)?", line):
        hint = "(make it with: base64 -w0 ssh_host_ed25519_key.pub)"
        raise ValueError(f"the host key is not base64 of 'ssh-ed25519 AAAA...' {hint}")
    return line


def slips(machine: Machine) -> Iterator[str]:
    """What a line may say, but was hardly meant to."""
    for system in machine.systems:
        words = system.split("-")
        right = all(word and only(word, WORD) for word in words)
        if len(words) < 2 or not right or system != system.lower():
            yield f"no system is called {system!r}; they look like x86_64-linux"
    if machine.key and machine.key[0] not in "/~%":
        yield f"the key {machine.key!r} is not an absolute file name"
    if len(machine.text.split()) > 8:
        yield "only the first 8 fields mean anything"


def entries(text: str, file: str, seen: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """The entries of a `builders` setting or a machines file, includes in place: where each
    stands, and its text; without text, it is a complaint of a file that was to be there."""
    for number, line in enumerate(text.split("\n"), 1):
        for entry in map(str.strip, line.partition("#")[0].split(";")):
            if entry.startswith("@"):
                yield from include(f"{file}:{number}", entry[1:].strip(), seen)
            elif entry:
                yield f"{file}:{number}", entry


def include(where: str, path: str, seen: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """The entries of that file; one that is missing lists none, as in every Nix."""
    try:
        if not path.startswith("/"):
            raise ValueError("must be absolute")
        if path in seen:
            raise ValueError("includes itself")
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            text = file.read().removeprefix("\ufeff")  # a byte order mark
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        yield f"{where}: the machines file {path!r}: {reason}", ""
    else:
        yield from entries(text, path, (*seen, path))


def load_machines(nix: Nix) -> tuple[list[Machine], list[str]]:
    """The usable machines in the order written, and a complaint for each fault."""
    machines, complaints = [], []
    found = entries(nix.builders, "builders", ())
    if nix.old:  # whatever characters its name has
        found = include("NIX_REMOTE_SYSTEMS", nix.builders[1:], ())
    for where, text in found:
        try:
            if not text:
                raise Error(where)
            machine = Machine.parse(where, text, nix)
            machines.append(machine)
            complaints += [f"{where}: {slip}" for slip in slips(machine)]
        except Error as error:
            complaints.append(f"{error} (left out)")
    return machines, complaints


# ---- Choosing -----------------------------------------------------------------------


def unfit(machine: Machine, request: Request, nix: Nix) -> str:
    """Why a machine can never do this build, or "" if it can."""
    if not machine.ways:
        return "is this machine, where Nix itself builds"
    anywhere = request.system == "builtin" and nix.since_2_4
    if request.system not in machine.systems and not anywhere:
        return f"builds {', '.join(machine.systems)}, not {request.system}"
    lacking = sorted(request.features - machine.supported - machine.mandatory)
    if lacking:
        feature = "feature" if len(lacking) == 1 else "features"
        return f"lacks the {feature} {', '.join(lacking)}"
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


# ---- Locks and slots ----------------------------------------------------------------


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
    is_open = info.st_mode & 0o022
    return stat.S_ISDIR(info.st_mode) and info.st_uid in owners and not is_open


def is_private(path: str) -> bool:
    """Whether nobody but us and root can change what is in that directory, or put another
    in its place: each directory above, too, and above each link on the way, must be theirs
    or ours alone, or sticky, as /tmp is.  What is not there yet counts as private."""
    # Whoever owns the root can do everything: not always 0 in a user namespace.
    trusted = {0, os.geteuid(), os.stat("/").st_uid}
    goal = os.path.realpath(path)

    def is_theirs(place: str) -> bool:
        info = os.lstat(place)
        sticky = info.st_mode & stat.S_ISVTX and place != goal
        may_be_open = stat.S_ISLNK(info.st_mode) or sticky
        return info.st_uid in trusted and bool(may_be_open or is_shut(info, trusted))

    with suppress(OSError):
        return all(map(is_theirs, filter(os.path.lexists, on_the_way(path))))
    return False


def on_the_way(path: str) -> list[str]:
    """A path, all that is above it, and the same for where each link of these leads."""
    places = [os.path.normpath(path)]
    for place in places:  # which grow meanwhile
        more = [os.path.dirname(place)]
        if os.path.islink(place):
            more.append(os.path.normpath(os.path.join(place, "..", os.readlink(place))))
        places += [other for other in more if other not in places]
    return places


def checksum(text: str) -> str:
    """8 digits that tell texts apart, as long as nobody means harm."""
    import zlib

    return f"{zlib.crc32(encode(text)):08x}"


def digest(path: str) -> str:
    """The 32 digits in a store path's name, which tell it from all others."""
    return path.rpartition("/")[2][:32]


def spare_directory(instead_of: str = "") -> str:
    """A directory of our own, where nobody else's files are in the way."""
    name = f"nix-build-remote-{os.geteuid()}"
    numbered = [f"/tmp/{name}.{number}" for number in range(1, 10)]
    for folder in [f"/tmp/{name}", *numbered, f"/run/{name}"]:
        path = f"{folder}/{checksum(instead_of)}" if instead_of else folder
        with suppress(OSError):
            with suppress(FileExistsError):
                os.mkdir(folder, 0o700)
            if is_shut(os.lstat(folder), {os.geteuid()}):
                make_directory(path)
                return path
    raise Error(f"cannot make a directory of our own, such as /tmp/{name}")


def ssh_directory(slot_directory: str) -> str:
    """A directory for what ssh reads, which only we can write, and whose name ssh can take."""
    wanted = f"{slot_directory}/ssh"
    plain = only(wanted, PLAIN) and "%" not in wanted  # ssh would expand that
    if not plain or len(f"{wanted}/0123456789abcdef-15") > SOCKET_LIMIT_BYTES:
        return spare_directory()
    make_directory(wanted)
    return wanted


def remove(path: str) -> None:
    """Have nothing there; a directory is renamed, to PATH.junk-....  OSError if not."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EPERM):  # macOS says the latter
            raise
        os.rename(path, f"{path}.junk-{os.urandom(4).hex()}")


def read_private(path: str, limit: int = TAIL_BYTES) -> str | None:
    """What a file of ours says; None if it is missing, too long, or no regular file."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    opener: Callable[[str, int], int] = lambda path, _: os.open(path, flags)
    with suppress(OSError), open(path, "rb", opener=opener) as file:
        data = file.read(limit + 1)
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode) and len(data) <= limit:
            return text_of(data)
    return None


def write_private(
    path: str, text: str, mode: int = 0o600, *, durable: bool = True
) -> None:
    """Make or replace a file in a private directory: as a whole, or not at all (OSError).  A
    durable one also survives a power loss, which a busy disk may take seconds for."""
    temporary = f"{path}.{os.urandom(8).hex()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        with open(os.open(temporary, flags, mode), "wb") as file:
            file.write(encode(text))
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if os.path.isdir(path):
            remove(path)
        os.rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def keep(path: str, text: str, mode: int = 0o600) -> None:
    """Have a private file say that; mostly it does already."""
    if read_private(path) != text:
        write_private(path, text, mode)


def note(path: str, text: str) -> None:
    """Have a private file say that; it may be lost, if the disk is full or power fails."""
    with suppress(OSError):
        write_private(path, text, durable=False)


def start_time(process: int) -> str:
    """When it started, in kernel ticks, which tells it from a later namesake; "-" if the
    system does not say, or it has ended."""
    with suppress(OSError), open(f"/proc/{process}/stat", "rb") as file:
        words = decode(file.read().rpartition(b")")[2]).split()
        return "-" if words[0] == "Z" else words[19]
    return "-"


def process_space() -> str:
    """What tells the processes that we can see from those of another container."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def is_alive(pid: str, start: str) -> bool:
    """Whether that process lives; start: as start_time has it."""
    if not pid.isdecimal() or len(pid) > 9:
        return False
    if start != "-":
        return start_time(int(pid)) == start
    try:
        os.kill(int(pid), 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


class Lock:
    """A file that one process at a time may hold, and whose text says who does.

    The kernel frees the lock when the last process ends that has the descriptor: its
    holder, or a program that it gave that to.  A directory, a link or a socket in its place
    is removed.  Raises Error if there is no room for the file.
    """

    FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK

    def __init__(self, path: str) -> None:
        self.path = path
        try:  # to ask for a file to be made is dear, also if it is there
            self.descriptor = os.open(path, self.FLAGS)
        except OSError:
            self.descriptor = self.make()

    def make(self) -> int:
        """Make the file, and open it."""
        try:
            with suppress(FileNotFoundError):
                if not stat.S_ISREG(os.lstat(self.path).st_mode):
                    remove(self.path)
            return os.open(self.path, self.FLAGS | os.O_CREAT, 0o600)
        except OSError as error:
            raise Error(f"cannot open {self.path}: {error.strerror}") from None

    @classmethod
    def take(cls, *paths: str) -> Lock | None:
        """The first of these locks that nobody holds, now ours."""
        for lock in map(cls, paths):
            if lock.hold():
                return lock
            lock.release()
        return None

    def hold(self, kind: int = fcntl.LOCK_EX) -> bool:
        """Have it from now on; False if somebody else does.  Error if its file system has no
        locks, as some network file systems."""
        try:
            fcntl.flock(self.descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise Error(f"cannot lock {self.path}: {error.strerror}") from None
        return True

    def is_free(self) -> bool:
        """Whether nobody holds it.  Meanwhile others may ask the same, but nobody take it."""
        free = self.hold(fcntl.LOCK_SH)
        if free:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        return free

    @classmethod
    def said_by_holder(cls, path: str) -> str | None:
        """What that lock's file says, if somebody holds it."""
        with cls(path) as lock:
            return None if lock.is_free() else lock.read()

    def wait(self, timeout_s: float = math.inf, kind: int = fcntl.LOCK_EX) -> bool:
        """Wait until we hold it; False if the time is over.  NixGone soon after Nix ends."""
        if self.hold(kind):
            return True
        import signal

        deadline, is_over = time.monotonic() + timeout_s, False

        def ring(number: int, frame: object) -> None:
            if not is_over and nix_has_gone():
                raise NixGone
            if not is_over and time.monotonic() >= deadline:
                raise Late("no end within the time for it")

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, min(2.0, max(0.001, timeout_s)), 2)
        try:
            fcntl.flock(self.descriptor, kind)
        except Late:
            return self.hold(kind)
        finally:
            is_over = True  # it may ring once more
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        return True

    def read(self, limit: int = LOCK_LIMIT_BYTES) -> str:
        """What its file says; nothing if it is a fifo."""
        with suppress(OSError):
            return text_of(os.pread(self.descriptor, limit, 0))
        return ""

    def write(self, text: str) -> None:
        """Have the file say that alone; that a disk is full must not cost a build."""
        with suppress(OSError):
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, encode(text), 0)

    def touch(self) -> None:
        """Have its file show that its holder does not stand still."""
        with suppress(OSError):  # a full disk
            os.utime(self.descriptor)

    def release(self) -> None:
        """Close it; only once, since the descriptor's number is used again."""
        os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def is_free(path: str) -> bool:
    """Whether nobody holds that lock, for whose file there may be no room."""
    with suppress(Error), Lock(path) as lock:
        return lock.is_free()
    return True


def calling_process() -> str:
    """What tells the Nix that started us from all others; in each container it may be 1."""
    nix = os.getppid()
    return f"{nix}.{start_time(nix)}"


class Holder(NamedTuple):
    """Who holds a lock, as the first line of its file says.

    pid, start: see is_alive; nix: the calling_process of that; since: in seconds since
    1970; phase: one of PHASES, or OVERDUE; derivation: the path of that.
    """

    pid: str
    start: str
    nix: str
    since: str
    phase: str
    derivation: str

    @classmethod
    def ours(cls, phase: str, derivation: str, since: float) -> Holder:
        """This process, as a holder."""
        us, nix = os.getpid(), calling_process()
        return cls(str(us), start_time(us), nix, f"{since:.3f}", phase, derivation)

    @classmethod
    def parse(cls, text: str) -> Holder | None:
        """Who is said to hold the lock; None if that is not known."""
        words = text.partition("\n")[0].split(" ")
        return cls(*words) if len(words) == 6 else None

    def text(self) -> str:
        """The first line of the lock's file."""
        return " ".join(self) + "\n"


class Slot:
    """A machine's slot, ours for as long as its file is locked; load: the machine's, without us.

    The build's ssh does not hold it too.  If we are killed, that finds the end of its pipes
    and ends, and with it the remote build.
    """

    def __init__(self, machine: Machine, lock: Lock, load: int = 0) -> None:
        self.machine, self.lock, self.load = machine, lock, load
        self.outage: Outage | None = None  # of the machine, as it was when we took it
        self.is_ours = True  # until it is freed

    def note(self, phase: str, derivation: str) -> None:
        """Say who holds it and why; the lock alone decides."""
        self.lock.write(Holder.ours(phase, derivation, time.time()).text())

    def free(self) -> None:
        """Let go, if it is still ours."""
        if self.is_ours:
            self.is_ours = False
            self.lock.write("")
            self.lock.release()


CLOSED = "/etc/nix/no-builds"  # a builder that has this file gets no builds


def facts(said: str) -> dict[str, str]:
    """Lines that begin with a name, by that; the first of a name counts."""
    lines = (line.partition(" ") for line in reversed(printable(said).splitlines()))
    return {name: words.removeprefix("= ").strip() for name, _, words in lines}


class Look(NamedTuple):
    """What a builder last said of itself, by name (see LOOK), and times of ours, in seconds
    since 1970: `asked`, for that answer; `awaited`, if it was asked again and has not answered;
    `seen`, with the most builds of others lately; `met`, when there were any last."""

    said: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Look:
        """What its file says: behind the head of a probe's the answer before, and that now,
        each up to a line `end`."""
        parts = text[PROBE_HEAD:].split("\nend\n", 2)
        before, now, *rest = map(facts, [*parts, ""])
        now.pop("awaited", None)  # that is not for a builder to say
        awaited = "" if len(rest) > 1 else now.get("asked", "")
        return cls({**before, "awaited": awaited} if awaited else now)

    def number(self, name: str, place: int = 0) -> float:
        """One of the numbers that it has said of that; 0 if it has not."""
        word = "".join(self.said.get(name, "").split()[place : place + 1])[:15]
        return float(word) if word.replace(".", "", 1).isdecimal() else 0.0

    def is_young(self, name: str, limit_s: float) -> bool:
        """Whether a time that is noted there is not longer ago than that."""
        return 0 <= time.time() - self.number(name) < limit_s

    @property
    def is_shared(self) -> bool:
        """Whether others have had builds there within a minute."""
        return self.is_young("asked" if self.number("builds") else "met", LOOK_AGE_S)

    def carried(self) -> str:
        """Lines for the next look: `seen`, with the most builds of others within SETTLE_S, as they
        are fewer for a moment between two of theirs; and `met`."""
        asked, builds = self.number("asked"), self.number("builds")
        seen, most = self.number("seen"), self.number("seen", 1)
        if asked > seen + SETTLE_S:
            seen, most = asked, 0
        met = asked if builds else self.number("met")
        return f"seen {seen:.3f} {max(most, builds):.0f}\nmet {met:.3f}\n"

    @property
    def closed(self) -> str | None:
        """Why it is to have no new builds; None if it may, or if that was said long ago."""
        size, free = (int(self.number("disk", place)) << 10 for place in (0, 1))
        is_full = free < max(ROOM_SHARE * size, min(ROOM_BYTES, size / 10))
        if self.is_young("asked", CLOSED_S) and "closed" in self.said:
            return f"has {CLOSED}: {self.said['closed'] or 'no reason given'}"
        if self.is_young("asked", CLOSED_S) and is_full:
            return f"has only {free >> 20} MiB ({free / size:.0%}) free in its store"
        return None

    @property
    def before(self) -> float:
        """The most builds of other clients that earlier answers told of within a minute."""
        return self.number("seen", 1) if self.is_young("seen", LOOK_AGE_S) else 0.0

    @property
    def others(self) -> int:
        """How many builds of other clients there are, as far as known."""
        most = max(self.number("builds"), self.before)
        return int(most) if self.is_young("asked", LOOK_AGE_S) else 0

    def taken(self, slots: int) -> int:
        """How many of its slots others take: all if its memory is short, if they have just
        come and may be beginning many, or if it is being asked and may have more by now."""
        is_known = self.is_young("asked", LOOK_AGE_S)
        is_short = is_known and self.number("memory") >= PRESSURE
        is_open = self.others > 0 and not self.before
        is_asked = self.is_young("awaited", LOOK_WAIT_S)
        is_open |= is_asked and (self.is_shared or not is_known)
        return slots if is_short or is_open else min(self.others, slots)


class Slots:
    """Nix's directory current-load, and in it `own`, for what the stock hook does not know."""

    def __init__(self, path: str, talk: Talk | None = None) -> None:
        self.path, self.own, self.history = path, f"{path}/own", f"{path}/own/history"
        self.talk = talk  # is told if somebody keeps the main lock
        self.is_stuck = False  # whether somebody did
        self.is_blind = False  # whether how builders are is not to matter
        # Why machines with a free slot got no build, when we last chose; "" if builds of
        # other clients fill them.
        self.refused: dict[Machine, str] = {}

    @classmethod
    def find(cls, nix: Nix, talk: Talk | None = None) -> Slots:
        """The directory that Nix names, unless others could change what is in it."""
        wanted = nix.slot_directory
        slots = cls(wanted if is_private(wanted) else spare_directory(wanted), talk)
        slots.is_blind = "NIX_BLIND_HOOK" in nix.environ
        return slots

    def make(self) -> None:
        """Have the directories; Error if that cannot be."""
        try:
            os.makedirs(self.path, 0o700, exist_ok=True)
        except OSError as error:
            raise Error(f"cannot make {self.path}: {error.strerror}") from None
        if not is_private(self.path):
            raise Error(f"somebody else has just made {self.path}")
        make_directory(self.own)

    def main_lock(self) -> Lock:
        """Taken while we choose, for milliseconds.  If somebody holds it for long, we go on
        without: a message may be said twice, or a slot not be seen as free."""
        lock = Lock(f"{self.path}/main-lock")
        if os.fstat(lock.descriptor).st_mode & 0o077:  # others could open and hold it
            with suppress(OSError):
                os.fchmod(lock.descriptor, 0o600)
        if not lock.hold() and not self.is_stuck and not lock.wait(MAIN_LOCK_TIMEOUT_S):
            self.is_stuck = True
            if self.talk:
                text = f"somebody has held {lock.path} for {MAIN_LOCK_TIMEOUT_S} s"
                self.talk.say(WARN, f"{text} (fuser says who); going on without it")
        return lock

    def files(self, machine: Machine) -> list[str]:
        """The locks that are its slots."""
        begin = f"{self.path}/{machine.slot_prefix}"
        return [f"{begin}-{n}" for n in range(machine.max_jobs)]

    def choose(
        self, machines: list[Machine], digests: frozenset[str] = frozenset()
    ) -> tuple[Slot | None, dict[Machine, int]]:
        """A free slot of the best of these machines, or None if there is none to be had; and
        the load of each.  Of equals, that which has most of these paths is the best, then
        the first in the list."""
        best: Slot | None = None
        self.refused, failures = {}, []

        def is_best(machine: Machine) -> bool:
            if not best:
                return True
            key, best_key = (rank(m, loads[m]) for m in (machine, best.machine))
            if key == best_key:
                return self.known(machine, digests) > self.known(best.machine, digests)
            return key < best_key

        with self.main_lock():
            loads = {m: sum(not is_free(f) for f in self.files(m)) for m in machines}
            # Lazily: what was seen there is read only of a machine that would be chosen.
            free = (m for m in machines if loads[m] < m.max_jobs and is_best(m))
            for machine in (m for m in free if self.admits(m, loads) and is_best(m)):
                try:
                    best = self.take(machine, loads[machine], best)
                except Error as error:  # no room for a file: others may have theirs
                    failures.append(error)
        if failures and len(failures) == len(machines):
            raise failures[0]
        return best, loads

    def take(self, machine: Machine, load: int, before: Slot | None) -> Slot | None:
        """A free slot of that machine, which is not paused, now ours instead of that before;
        Error if there is no room for its file."""
        lock = Lock.take(*self.files(machine))
        with suppress(OSError):  # a pause there is over
            remove(self.file(machine, "paused"))
        if lock and before:
            before.free()
        return Slot(machine, lock, load) if lock else before

    def look(self, machine: Machine) -> Look:
        """What it last said of itself."""
        path = self.file(machine, "look")
        said = None if self.is_blind else read_private(path, LOCK_LIMIT_BYTES)
        look = Look.parse(said or "")
        if look.is_young("awaited", LOOK_WAIT_S) and is_free(path):  # in vain
            del look.said["awaited"]
        return look

    def admits(self, machine: Machine, loads: dict[Machine, int]) -> bool:
        """Whether a machine with a free slot may have a new build; notes in `refused` if not, and
        adds the builds of other clients to its load.  If we have none there, they leave us one
        slot: else clients that see each other's builds would wait for each other."""
        look, most = self.look(machine), machine.max_jobs
        pause, load = self.pause(machine)[0], loads[machine]
        why = f"is {pause}" if pause else look.closed
        limit = most if load or why else max(0, most - 1)
        loads[machine] = min(load + look.taken(most), limit)
        if why or loads[machine] >= most:
            self.refused[machine] = why or ""
        return machine not in self.refused

    def are_asked(self) -> bool:
        """Whether a machine was refused a build only as it is being asked how it is."""
        looks = (self.look(machine) for machine, why in self.refused.items() if not why)
        return any(look.is_young("awaited", LOOK_WAIT_S) for look in looks)

    def known(self, machine: Machine, digests: frozenset[str]) -> int:
        """How many of these paths the machine is known to have had."""
        return len(digests.intersection(self.digests(machine))) if digests else 0

    def digests(self, machine: Machine) -> list[str]:
        """Those of the paths that it is known to have had, the latest last."""
        said = read_private(self.file(machine, "paths"), 33 * DIGEST_LIMIT)
        return (said or "").split()

    def note_paths(self, machine: Machine, digests: frozenset[str]) -> None:
        """Note that the machine has these; two at once lose nothing that matters."""
        kept = [digest for digest in self.digests(machine) if digest not in digests]
        latest = [*kept, *sorted(digests)][-DIGEST_LIMIT:]
        note(self.file(machine, "paths"), " ".join(latest))

    def file(self, machine: Machine, what: str) -> str:
        """Where that of a machine is kept: `paths`, see digests; `lacks`, a kind of build that
        it cannot do, though its line says so; `paused`, see pause; `fetch-N`, locks of builds
        that fetch their outputs; `down`, `probe`, `look`, see Outages."""
        return f"{self.own}/{machine.slot_prefix}.{what}"

    def shares(self) -> list[str]:
        """For each slot that a hook holds, the Nix that it works for."""
        files = [f"{self.path}/{name}" for name in os.listdir(self.path)]
        holders = ((Holder.parse(read_private(file) or ""), file) for file in files)
        return [who.nix for who, file in holders if who and not is_free(file)]

    def lacks(self, machine: Machine, kind: str) -> bool:
        """Whether it was noted within the last hour that it cannot do builds of that kind."""
        path = self.file(machine, "lacks")
        with suppress(OSError):
            is_new = 0 <= time.time() - os.stat(path).st_mtime < LACK_S
            return is_new and read_private(path) == kind
        return False

    def pause(self, machine: Machine) -> tuple[str, float]:
        """By whom it is paused, in words that go behind `is`, or "" if it is not; and until when,
        in seconds since 1970, 0 if it has no end.  The first line of a pause's file is that time,
        or `inf`; below it stand the words."""
        said = read_private(self.file(machine, "paused")) or ""
        until, _, words = said.partition("\n")
        with suppress(ValueError):
            if time.time() < float(until):
                end = float(until) if math.isfinite(float(until)) else 0.0
                return " ".join(printable(words).split()), end
        return "", 0.0

    def add_to_history(self, line: str) -> None:
        """Add that to the file with a line for each build that has ended; a big one becomes
        history.old.  Each line begins with its newline: if the disk was full, or somebody
        killed, what is left of a line spoils no other."""
        with suppress(Error, OSError), Lock(self.history) as file:  # a full disk
            fcntl.fcntl(file.descriptor, fcntl.F_SETFL, os.O_APPEND)
            os.write(file.descriptor, encode(f"\n{line}"[:RECORD_BYTES]))
            info = os.fstat(file.descriptor)
            is_ours = info.st_size > HISTORY_BYTES and file.hold()
            if is_ours and os.path.samestat(info, os.lstat(self.history)):
                os.rename(self.history, f"{self.history}.old")

    def remember(self, text: str) -> bool:
        """Note in the main lock's file, for hooks to come, that we have said or done this for
        the Nix that started us; False if that was noted already."""
        entry = f"{calling_process()}-{checksum(text)}"
        with self.main_lock() as lock:
            said = lock.read(100 * SAID_LIMIT).split()
            if entry in said:
                return False
            lock.write(" ".join([*said[1 - SAID_LIMIT :], entry]))
        return True


# ---- Outages ------------------------------------------------------------------------


class Outage(NamedTuple):
    """A machine that failed, as all hooks remember it until it is of use again.

    failures: in a row; since: when the first was, until: leave the machine alone, both in
    seconds since 1970; lasting: as the error knew it; words: what went wrong.
    """

    failures: int = 0
    since: float = 0.0
    until: float = 0.0
    lasting: bool | None = None
    words: str = ""

    @classmethod
    def parse(cls, text: str) -> Outage | None:
        """What text() made; None if that says nothing."""
        with suppress(ValueError, KeyError):
            failures, since, until, lasting, words = text.split(" ", 4)
            times = float(since), float(until)
            if math.isfinite(sum(times)) and int(failures[:9]) > 0:
                return cls(int(failures[:9]), *times, LASTING[lasting], words)
        return None

    def text(self) -> str:
        """One line for its file."""
        kinds = {lasting: kind for kind, lasting in LASTING.items()}
        numbers = f"{self.failures} {self.since:.3f} {self.until:.3f}"
        return f"{numbers} {kinds[self.lasting]} {self.words}"

    @property
    def is_old(self) -> bool:
        """Whether it says nothing any more: a probe that began at `until` must have ended
        long ago, and nobody has noted how; or the clock was set."""
        age = time.time() - self.until
        probe_s = LOGIN_TIMEOUT_S + GREETING_TIMEOUT_S
        return not -PAUSE_LIMIT_S <= age <= PAUSE_LIMIT_S + probe_s

    @property
    def is_hopeless(self) -> bool:
        """Whether it is no use to wait: that is known, or it has failed too often."""
        many = self.lasting is None and self.failures > UNKNOWN_FAILURES
        return self.lasting is True or many

    def again(self, error: Error) -> Outage:
        """This outage after one more failure."""
        # The delay doubles with each failure, and is not the same for all.
        delay = min(PAUSE_S * 2 ** min(self.failures + 1, 9), PAUSE_LIMIT_S)
        until = time.time() + delay * (0.5 + os.urandom(1)[0] / 512)
        words = " ".join(str(error).split())[:OUTAGE_LIMIT]
        since = self.since or time.time()
        return Outage(self.failures + 1, since, until, error.lasting, words)


class Outages:
    """Which machines all hooks leave alone, until when, and whether they are of use again.

    In `own` a machine has NAME.down, its outage, and NAME.probe, which an ssh that finds
    out keeps locked, and in which it says how that went; and in the same way NAME.look, in
    which a builder says how full and how busy it is.
    """

    def __init__(self, slots: Slots, probe: Ask | None = None) -> None:
        self.slots = slots
        self.probe = probe  # begins to find out into that file
        self.ask: Ask | None = None  # does so for a look, unless that is not wanted
        self.forgiven: set[Machine] = set()  # which we try all the same

    def of(self, machine: Machine) -> Outage | None:
        """Its outage; None if it has none, if that is old, or while the machine is paused."""
        if self.slots.pause(machine)[0]:
            return None
        outage = Outage.parse(read_private(self.slots.file(machine, "down")) or "")
        return None if outage and outage.is_old else outage

    def noted(self, machines: Iterable[Machine]) -> dict[Machine, Outage]:
        """The outages of those of the machines that have one."""
        files: list[tuple[str, str, str]] = []
        with suppress(FileNotFoundError):  # somebody has removed it
            files += (file.rpartition(".") for file in os.listdir(self.slots.own))
        # Of 1000 machines few have one: to look for each one's files would take 20 ms.
        marked = {name for name, _, what in files if what == "down"}
        found = ((m, self.of(m)) for m in machines if m.slot_prefix in marked)
        return {machine: outage for machine, outage in found if outage}

    def away(self, machines: Iterable[Machine]) -> dict[Machine, Outage]:
        """The outages of those of the machines that are left alone."""
        noted = self.noted(machines).items()
        return {machine: o for machine, o in noted if machine not in self.forgiven}

    def despair(self, machines: list[Machine]) -> Error | None:
        """The error to end with if all of these are away, and all are hopeless or none has been of
        use for AWAY_TIMEOUT_S; None while it makes sense to wait."""
        outages = self.away(machines).values()
        if len(outages) < len(machines):
            return None
        last = max(outages, key=lambda outage: outage.since)
        is_hopeless = all(outage.is_hopeless for outage in outages)
        if not is_hopeless and last.since > time.time() - AWAY_TIMEOUT_S:
            return None
        waited = f"was there for {AWAY_TIMEOUT_S // 60} minutes"
        why = "can be used" if is_hopeless else waited
        error = heard(Error, f"no machine for it {why}: {last.words}")
        error.remedy = error.remedy or (USELESS if is_hopeless and last.lasting else "")
        return error

    def forgive(self, machines: Iterable[Machine]) -> None:
        """Have the first hook of each Nix try those that seem hopeless: they may be well again."""
        for machine, outage in self.noted(machines).items():
            tried = f"tried {machine.slot_prefix}"
            if outage.is_hopeless and self.slots.remember(tried):
                self.forgiven.add(machine)

    def note(self, machine: Machine, before: Outage | None, error: Error) -> None:
        """Write down that it failed; builds that fail together there are one failure."""
        self.forgiven.discard(machine)
        self.slots.remember(f"tried {machine.slot_prefix}")
        with self.slots.main_lock():
            is_paused = bool(self.slots.pause(machine)[0])
            if not is_paused and self.of(machine) in (before, None):
                after = (before or Outage()).again(error)
                note(self.slots.file(machine, "down"), after.text())

    def end(self, machine: Machine) -> None:
        """Write down that it is of use."""
        with suppress(OSError):
            remove(self.slots.file(machine, "down"))

    def find_out(self, machines: Iterable[Machine]) -> None:
        """See to it that somebody finds out whether those whose time is over are of use
        again, in the background; who comes next hears of it."""
        for machine, outage in self.noted(machines).items():
            if time.time() >= outage.until:
                with suppress(Error, OSError), self.take(machine, "probe") as lock:
                    self.find_out_of(machine, outage, lock)

    def find_out_of(self, machine: Machine, outage: Outage, lock: Lock) -> None:
        """Judge what the last probe of a machine has said, or begin one.  At the head of its file,
        of PROBE_HEAD bytes, stands the `until` of the outage for which it was begun: if the
        outage has another now, the answer is too old."""
        until = f"{outage.until:.3f}"
        text = lock.read()
        head, said = text[:PROBE_HEAD].split(), encode(text[PROBE_HEAD:])
        words, _, rest = said.partition(integer(SERVE_REPLY))
        if self.of(machine) != outage:
            pass  # somebody else was quicker
        elif head[:1] != [until] and self.probe:
            self.begin(self.probe, machine, lock, until)
        elif rest[8:16] == integer(0) and not means(outage.words, "READONLY"):
            self.end(machine)  # it has greeted, and its store has answered
        else:
            told = " ".join(printable(decode(words + rest[8:])).split())
            # That way may not be allowed, or whoever answers may not write there.
            vague = len(machine.ways) > 1 or means(outage.words, "READONLY")
            if vague and (not told or means(told, "DAEMON")):
                told = outage.words
            error = heard(Unreachable, told or "no answer")
            if error.lasting is None and told == outage.words:
                error.lasting = outage.lasting
            self.note(machine, outage, error)

    def take(self, machine: Machine, what: str) -> Lock:
        """The file of a probe or a look, now ours; Late if one still writes there."""
        if lock := Lock.take(self.slots.file(machine, what)):
            return lock
        raise Late("it is being asked")

    def begin(
        self, ask: Ask, machine: Machine, lock: Lock, stamp: str, text: str = ""
    ) -> None:
        """Begin to find something out, into the file of the lock, behind that text.  The stamp
        comes last: while the head is blank, nothing is begun."""
        with self.slots.main_lock():  # nobody reads half of it
            lock.write(" " * PROBE_HEAD + text)
        os.lseek(lock.descriptor, 0, os.SEEK_END)
        ask(machine, lock.descriptor)
        os.pwrite(lock.descriptor, encode(stamp), 0)

    def look_again(self, *machines: Machine) -> None:
        """Ask these machines, where builds of ours begin, how they are, and those that we last
        refused one, unless they have said so lately; who chooses next hears of it."""
        for machine in (*machines, *self.slots.refused):
            if self.ask and machine.destination:  # else it is a store here
                with suppress(Error, OSError), self.take(machine, "look") as lock:
                    self.look_at(self.ask, machine, lock, machine in machines)

    def look_at(self, ask: Ask, machine: Machine, lock: Lock, begins: bool) -> None:
        """Ask one machine how it is, if it is time; begins: whether a build of ours does there."""
        text, now = lock.read(), f"{time.time():.3f}"
        look, said = Look.parse(text), text.rpartition("\nend\n")[2]
        pause_s = LOOK_S if look.number("builds") == look.before else SETTLE_S / 3
        if begins and look.is_shared:
            pause_s = 0  # what is free there may be taken at any moment
        elif look.number("awaited") and heard(Error, said).lasting is not False:
            pause_s = MUTE_S  # that login does not let us ask
        last = look.number("awaited") or look.number("asked")
        if not 0 <= float(now) - last < pause_s:
            before = "".join(f"{name} {words}\n" for name, words in look.said.items())
            text = f"{before}\nend\nasked {now}\n{look.carried()}"
            self.begin(ask, machine, lock, now, text)


# ---- The line -----------------------------------------------------------------------


class Need(NamedTuple):
    """A build that needs a slot.

    path: its derivation's; digests: of what it reads, see Derivation.digests; since: when it
    began to wait, in seconds since 1970; machines: any of which will do; shunned: the one
    that it should go to only if no other has a free slot, or None; impatient: not to wait
    if all are away.
    """

    path: str
    digests: frozenset[str]
    since: float
    machines: list[Machine]
    shunned: Machine | None = None
    impatient: bool = False


def precedence(
    who: Holder, names: list[str], shares: list[str]
) -> tuple[int, int, str]:
    """A key to sort those who stand first in lines: first who was passed too often, by time; then
    who waits for fewer machines (names); then whose Nix holds fewer slots; shares: for each
    slot that is taken, the Nix that holds it."""
    if who.phase == OVERDUE:
        return 0, 0, who.since
    return len(names), shares.count(who.nix), ""


class Line:
    """Where hooks wait for a slot on one of some machines.

    Those of one Nix stand one behind the other, at places that are locks, whose files say who
    stands there: whoever has one waits for the lock of the one before, so that waiting costs
    nothing and nobody is passed.  Of all who are first and wait for the same machines, one at
    a time looks for a free slot; if another has a sooner turn, see precedence(), it lets go of
    that.  Machines that somebody of a sooner turn waits for in another line are left alone.
    Who stands still, or waits for us in turn, so that it does not take what is free, is passed.
    """

    def __init__(self, outages: Outages, talk: Talk, need: Need) -> None:
        self.outages, self.slots, self.talk = outages, outages.slots, talk
        self.need, self.machines = need, need.machines
        self.away: dict[Machine, Outage] = {}  # those that were when we last looked
        self.has_told = False  # whether the first look was told of
        self.told = ""  # of why no machine takes new builds
        self.names = sorted(machine.slot_prefix for machine in need.machines)
        self.size = min(LINE_LIMIT, sum(machine.max_jobs for machine in need.machines))
        self.who = Holder.ours(PHASES[0], need.path, need.since)
        self.kind, nix = checksum("\n".join(self.names)), checksum(calling_process())
        self.path = f"{self.slots.own}/line-{self.kind}-{nix}"
        self.place = 0  # ours, if we have its lock
        self.lock: Lock | None = None
        self.is_late = False  # whether one who waits for the same has a sooner turn
        # Since when there is a slot that we leave to somebody (monotonic), if there is.
        self.left_since: float | None = None
        self.passed_by: set[str] = set()  # those with fewer machines, by their pids

    def find(self) -> Slot | None:
        """A free slot on a machine that nobody else should have first, or that they leave; None
        if there is none.  Begins to find out how machines are whose outage is over."""
        self.outages.find_out(self.machines)
        self.away, reserved = self.outages.away(self.machines), self.reserved()
        there = (m for m in self.machines if m not in self.away)
        free = [machine for machine in there if machine.slot_prefix not in reserved]
        others = [machine for machine in free if machine != self.need.shunned]
        slot, loads = self.slots.choose(others, self.need.digests)
        if not slot and others != free:
            slot, loads = self.slots.choose(free, self.need.digests)
        slot = slot or self.left_over(reserved)
        if slot or not self.has_told:
            self.has_told = True
            self.tell(loads)
        if slot:
            slot.outage = self.outages.of(slot.machine)
        return slot

    def left_over(self, reserved: set[str]) -> Slot | None:
        """A slot that is for somebody else, who has not taken it for a while."""
        there = (m for m in self.machines if m not in self.away)
        left = [machine for machine in there if machine.slot_prefix in reserved]
        refused, now = self.slots.refused, time.monotonic()
        slot = self.slots.choose(left)[0] if left else None
        self.slots.refused = {**self.slots.refused, **refused}
        self.left_since = (self.left_since or now) if slot else None
        if slot and self.left_since and now < self.left_since + LEAVE_S:
            slot.free()
            return None
        return slot

    def tell(self, loads: dict[Machine, int]) -> None:
        """Say for NIX_DEBUG_HOOK how things are with each machine."""
        for machine in self.machines:
            why = "is away" if machine in self.away else "is waited for by others"
            if machine in loads:
                taken = f"{loads[machine]} of {machine.max_jobs} slots taken"
                why = f"has {taken}, at speed {machine.speed:g}"
            why = self.slots.refused.get(machine) or why
            self.talk.say(DEBUG, f"'{machine.name}' {why}")

    def rivals(self) -> Iterator[tuple[Holder, list[str]]]:
        """Each other hook that is first in a line and waits for some of our machines, with the
        slot prefixes of all machines that it waits for."""
        entries: list[str] = []
        with suppress(FileNotFoundError):  # somebody has removed it
            entries = os.listdir(self.slots.own)
        for entry in entries:
            if entry.startswith("line-") and entry.endswith(".0"):
                said = Lock.said_by_holder(f"{self.slots.own}/{entry}") or ""
                who, names = Holder.parse(said), said.split("\n")[1:]  # or not yet
                if who and who != self.who and not set(names).isdisjoint(self.names):
                    yield who, names

    def reserved(self) -> set[str]:
        """The slots' names of machines whose next free slot is for somebody else.  Takes note
        of those, and says so if too many came before us."""
        rivals, ours, me = [*self.rivals()], self.names, self.who
        shares = self.slots.shares() if rivals else []

        def is_sooner(who: Holder, names: list[str]) -> bool:
            turns = precedence(who, names, shares), precedence(me, ours, shares)
            if names == ours and turns[0] == turns[1]:  # who waits for longer
                return (who.since, who.derivation) < (me.since, me.derivation)
            return turns[0] < turns[1]

        ahead = [rival for rival in rivals if is_sooner(*rival)]
        self.is_late = any(names == ours for _, names in ahead)
        passing = {who.pid for who, names in ahead if len(names) < len(ours)}
        self.passed_by |= passing
        if len(self.passed_by - passing) >= PASSES and self.who.phase != OVERDUE:
            self.who = self.who._replace(phase=OVERDUE)
            if self.lock:
                self.lock.write(self.text)
        return {name for _, names in ahead for name in names}

    @property
    def text(self) -> str:
        """What our place's file says: who stands there, and for which machines."""
        return self.who.text() + "\n".join(self.names)

    def file(self, number: int) -> str:
        """The lock's file of that place, the first being 0."""
        return f"{self.path}.{number}"

    def is_taken(self, number: int) -> bool:
        """Whether somebody stands there."""
        return os.path.lexists(self.file(number)) and not is_free(self.file(number))

    def join(self) -> bool:
        """Take the place behind the last that is taken; False if there is none to be had."""
        with suppress(Error, OSError), self.slots.main_lock():
            self.sweep()
            last = next(filter(self.is_taken, reversed(range(self.size))), -1)
            if last + 1 < self.size and (lock := Lock.take(self.file(last + 1))):
                self.stand(last + 1, lock)
        return self.lock is not None

    def sweep(self) -> None:
        """Remove the files of places and turns that nobody has held for LINE_S."""
        marks, entries = ("line-", "turn-"), os.listdir(self.slots.own)
        for path in (f"{self.slots.own}/{e}" for e in entries if e.startswith(marks)):
            with suppress(OSError):
                if os.stat(path).st_mtime < time.time() - LINE_S and is_free(path):
                    os.unlink(path)

    def stand(self, number: int, lock: Lock) -> None:
        """Have that place, and no other any more."""
        self.leave()
        self.place, self.lock = number, lock
        lock.write(self.text)

    def leave(self) -> None:
        """Have no place any more."""
        if self.lock:
            self.lock.release()
            self.lock = None

    def wait(self) -> Slot:
        """Wait for a slot; then we have left."""
        try:
            with suppress(Error):  # no room, or somebody has removed our directory
                while self.lock and self.place > 0:
                    lock = Lock(self.file(self.place - 1))
                    lock.wait()
                    self.stand(self.place - 1, lock)
            pause_s = WAIT_S
            while not (slot := self.look_in_turn()):
                wait_readable([], pause_s)  # for another to take it
                pause_s = min(1.0, 2 * pause_s)
            return slot
        finally:
            self.leave()

    def look_in_turn(self) -> Slot | None:
        """Wait for a slot when it is our turn to look."""
        turn = None if self.need.impatient else self.take_turn()
        try:
            return self.look_for_slot(turn)
        finally:
            if turn:
                turn.release()

    def take_turn(self) -> Lock | None:
        """Wait for the lock that lets one hook at a time look for a slot; None, to look without it,
        if its holder stands still, as in a paused container, or if there is no room for the file."""
        with suppress(Error, OSError):
            lock = Lock(f"{self.slots.own}/turn-{self.kind}")
            while not lock.wait(LEAVE_S):
                if time.time() - os.fstat(lock.descriptor).st_mtime > 2 * LEAVE_S:
                    lock.release()
                    return None
            return lock
        return None

    def look_for_slot(self, turn: Lock | None) -> Slot | None:
        """Wait for a slot; None if somebody who waits for the same should have it first."""
        while True:
            if turn:
                turn.touch()
            self.outages.look_again()
            start = time.monotonic()
            if slot := self.find_if_possible():
                return slot
            if self.need.impatient and self.absence():
                raise Away("it failed for another build, too")
            if despair := self.outages.despair(self.machines):
                raise despair
            self.tell_of_absence()
            if self.is_late:
                return None
            # Looking at many slots takes long; it must not be what we do all the time.
            wait_readable([], min(1.0, max(WAIT_S, 100 * (time.monotonic() - start))))

    def find_if_possible(self) -> Slot | None:
        """A free slot; None also if the disk is full, or our directory is gone."""
        with suppress(Error, OSError):
            return self.find()
        with suppress(Error):
            self.slots.make()
        return None

    def absence(self) -> str:
        """Why no machine of the line takes new builds now; "" if one might."""
        whys = {m: f"'{m.name}' {why}" for m, why in self.slots.refused.items() if why}
        whys |= {machine: outage.words for machine, outage in self.away.items()}
        is_all = len(whys) == len(self.machines)
        return "; ".join(sorted({*whys.values()})) if is_all else ""

    def tell_of_absence(self) -> None:
        """Say that once for each Nix and reason."""
        words, told = self.absence(), self.told
        self.told = f"{words}; waiting for a machine"
        if words and told != self.told and self.slots.remember(self.told):
            self.talk.say(WARN, f"'{self.need.path}': {self.told[:TAIL_BYTES]}")


# ---- Derivations --------------------------------------------------------------------


class Output(NamedTuple):
    """An output of a derivation; path is "" if it is not known before the build."""

    name: str
    path: str
    algorithm: str
    hash: str


class Derivation(NamedTuple):
    """What a .drv file says, as far as a builder needs it."""

    outputs: tuple[Output, ...]
    input_derivations: tuple[str, ...]
    sources: tuple[str, ...]
    platform: str
    builder: str
    arguments: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    text: str = ""  # of the file

    @classmethod
    def parse(cls, text: str) -> Derivation:
        """Read the one term `Derive(...)`; Error if it is anything else."""
        if text.startswith("DrvWithVersion("):
            raise Unsendable("it is a dynamic derivation, for Nix itself to build")
        try:
            if not text.startswith("Derive("):
                raise ValueError(text[:7])
            outputs, inputs, sources, *run, arguments, variables = parse_term(text[6:])
            platform, builder = texts(run)
            return cls(
                tuple(Output(*texts(output)) for output in outputs),
                texts([path for path, _ in inputs]),
                texts(sources),
                platform,
                builder,
                texts(arguments),
                tuple((key, value) for key, value in map(texts, variables)),
                text,
            )
        except (TypeError, ValueError):
            raise Error("it is not a well-formed derivation") from None

    @property
    def is_floating(self) -> bool:
        """Whether what is in its outputs will decide on their paths; Nix hands it on when
        it has put paths in the place of input derivations.  No name may lead elsewhere."""
        kinds = {("/" in n, path, bool(a), hash) for n, path, a, hash in self.outputs}
        return kinds == {(False, "", True, "")} and not self.input_derivations

    def realisations(self) -> dict[str, str]:
        """What Nix calls each output of a floating one where it notes its path: the hash of
        the file, in which nothing stands for the paths (hashDerivationModulo)."""
        import re

        names = "|".join(re.escape(output.name) for output in self.outputs)
        text = re.sub(rf'\(("(?:{names})"),"[^"]*"\)', r'(\1,"")', self.text)
        found = sha256_of(text).hex()
        return {output.name: f"sha256:{found}!{output.name}" for output in self.outputs}

    def digests(self) -> frozenset[str]:
        """Of all that it reads: sources, and derivations whose outputs it reads."""
        return frozenset(map(digest, (*self.input_derivations, *self.sources)))

    def encode(self, inputs: Iterable[str]) -> bytes:
        """As BuildDerivation wants it.  The inputs replace what the input derivations make; a
        derivation without those names all its inputs itself, and they enter its hash."""
        fields = [field for output in self.outputs for field in output]
        pairs = [word for pair in self.environment for word in pair]
        outputs = integer(len(self.outputs)) + b"".join(map(string, fields))
        reads = strings(inputs if self.input_derivations else self.sources)
        run = string(self.platform) + string(self.builder) + strings(self.arguments)
        variables = integer(len(self.environment)) + b"".join(map(string, pairs))
        return outputs + reads + run + variables


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
        before = text[position:quote]
        if (len(before) - len(before.rstrip("\\"))) % 2 == 0:
            return quote
        position = quote + 1


def unescape(text: str) -> str:
    """The string that is written so between quotes."""
    if "\\" not in text:
        return text
    parts = text.split("\\\\")  # from the left, so these are the escaped backslashes
    # Any other character stands for itself.
    for escape, meant in (("\\n", "\n"), ("\\r", "\r"), ("\\t", "\t")):
        parts = [part.replace(escape, meant) for part in parts]
    return "\\".join(part.replace("\\", "") for part in parts)


def texts(values: list[object]) -> tuple[str, ...]:
    """A list of strings; TypeError if it is anything else."""
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise TypeError
    return tuple(map(str, values))


def read_derivation(path: str, store: Store, text: str | None = None) -> Derivation:
    """The derivation of that store path; Error says why it cannot be sent away.  text: what
    its file says, None to read that."""
    try:
        if text is None:
            with open(store.file(path), "rb") as stream:
                text = text_of(stream.read())
        derivation = Derivation.parse(text)
        for output in () if derivation.is_floating else derivation.outputs:
            if not output.path:
                why = "is not known before the build (impure, or not resolved)"
                raise Unsendable(f"the path of its output '{output.name}' {why}")
            store.name(output.path)
    except (Error, OSError) as error:
        kind = Unsendable if isinstance(error, Unsendable) else Error
        reason = error.strerror if isinstance(error, OSError) else error
        raise kind(f"cannot send '{path}' to another machine: {reason}") from None
    return derivation


# ---- ssh ----------------------------------------------------------------------------

PROFILES = """/run/current-system/sw/bin /nix/var/nix/profiles/default/bin
~/.nix-profile/bin /usr/local/bin /opt/homebrew/bin /usr/bin /bin"""


def nix_directories(environ: dict[str, str]) -> Iterator[str]:
    """Where the programs of the Nix that called us are, the surest place first: their flags
    and their way with locks differ between versions, and on PATH may be any."""
    directory = os.path.dirname(os.path.abspath(__file__))
    if directory.endswith("/libexec/nix"):
        yield directory[: -len("libexec/nix")] + "bin"
    with suppress(OSError):  # no /proc, or no right to look
        yield os.path.dirname(os.readlink(f"/proc/{os.getppid()}/exe"))
    yield from program_directories(environ)


def program_directories(environ: dict[str, str]) -> Iterator[str]:
    """Where programs are that need not be those of the calling Nix."""
    yield from filter(None, environ.get("PATH", "").split(":"))
    yield from map(os.path.expanduser, PROFILES.split())


def find_program(name: str, directories: Iterable[str]) -> str:
    """The first program of that name; Error if there is none."""
    looked = dict.fromkeys(directories)  # each once
    for directory in looked:
        path = f"{directory}/{name}"
        if os.access(path, os.X_OK) and os.path.isfile(path):
            return path
    raise Error(f"cannot find the program {name}; looked in {', '.join(looked)}")


STREAMS = ("stdin", "stdout", "stderr")


class Programs:
    """Starts programs, and with NIX_DEBUG_HOOK says what a shell would be told."""

    SHOWN = ("NIX_SSHOPTS", "NIX_REMOTE", "NIX_HELD_LOCKS")

    def __init__(self, talk: Talk) -> None:
        self.talk = talk

    def start(
        self, command: list[str], environ: dict[str, str], *piped: str, **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start a program, with pipes for those of STREAMS, unless the options, which are
        those of subprocess.Popen, say otherwise; with the others it reads and writes nothing.
        Error if it cannot be started."""
        import subprocess

        if self.talk.debug:
            import shlex

            told = [name for name in self.SHOWN if name in environ]
            shown = [f"{name}={shlex.quote(environ[name])}" for name in told]
            self.talk.say(DEBUG, " ".join(["+", *shown, shlex.join(command)]))
        for name in STREAMS:
            pipe = subprocess.PIPE if name in piped else subprocess.DEVNULL
            options.setdefault(name, pipe)
        try:
            return subprocess.Popen(command, bufsize=0, env=environ, **options)
        except OSError as error:
            raise Error(f"cannot start {command[0]}: {error.strerror}") from None

    def outlet(self, file: int, environ: dict[str, str]) -> Any:
        """A pipe for the words of a program that may outlive us: a `dd`, which then holds that
        file's lock, puts them there at once, up to a limit.  A limit of the program's own
        would not do: over a shared connection it is the master that writes."""
        dd = find_program("dd", program_directories(environ))
        command = [dd, "bs=1", f"count={HEARD_LIMIT_BYTES}"]
        apart = {"stdout": file, "start_new_session": True}
        return self.start(command, environ, "stdin", **apart).stdin

    def output(
        self,
        command: list[str],
        environ: dict[str, str],
        within_s: float | None = None,
        **options: Any,
    ) -> tuple[int, str, str]:
        """Run it; returns its exit status, and what it wrote on stdout and stderr.  What has
        not ended in time is killed: a negative status, and no words."""
        import subprocess

        process = self.start(command, environ, "stdout", "stderr", **options)
        said = b"", b""
        try:
            with suppress(subprocess.TimeoutExpired):
                said = process.communicate(timeout=within_s)
        finally:
            end(process)
        return process.returncode, decode(said[0]), decode(said[1])


def end_in_time(time_s: float = LOGIN_TIMEOUT_S + GREETING_TIMEOUT_S) -> None:
    """Have the program that this process becomes end after a while, though we may not be there
    to see to it: an alarm outlasts exec, but not a fork, and ssh and nix-store set none."""
    import signal

    signal.setitimer(signal.ITIMER_REAL, time_s)


def status_within(
    process: subprocess.Popen[bytes] | Spare, timeout_s: float
) -> int | None:
    """Its exit status, negative for a signal; None if it still runs by then."""
    import subprocess

    with suppress(subprocess.TimeoutExpired):
        return process.wait(timeout_s)
    return None


def end(process: subprocess.Popen[bytes] | Spare) -> None:
    """End it, if it has not ended, and forget its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe:
            pipe.close()


def ssh_options(machine: Machine, known_hosts: str) -> list[str]:
    """They switch off what a user's ssh_config may set and would spoil a session, as ssh takes
    the first value it meets."""
    # Not every ssh knows StdinNull, ForkAfterAuthentication and SessionType (8.7), nor all
    # that a user's IgnoreUnknown, which ours replaces, lets pass.
    options = ["-x", "-a", "-oIgnoreUnknown=*", "-oStdinNull=no", "-oLogLevel=ERROR"]
    # What 10.1 and newer say of weak ciphers would stand before the reason of a failure.
    options += ["-oWarnWeakCrypto=no"]
    options += ["-oForkAfterAuthentication=no", "-oSessionType=default"]
    options += ["-oChannelTimeout=none"]  # a build may say nothing for long
    options += ["-oRemoteCommand=none", "-oRequestTTY=no", "-oClearAllForwardings=yes"]
    if machine.port:
        options.append(f"-oPort={machine.port}")
    if machine.key:
        options += ["-i", machine.key]
    if machine.compress:
        options.append("-oCompression=yes")
    if known_hosts:
        options.append(f"-oUserKnownHostsFile={known_hosts}")
        options += ["-oGlobalKnownHostsFile=/dev/null", "-oStrictHostKeyChecking=yes"]
        options += ["-oVerifyHostKeyDNS=no", "-oUpdateHostKeys=no", "-oCheckHostIP=no"]
        options.append("-oKnownHostsCommand=none")
    return options


def ssh_defaults(configured: str = "", *, patient: bool = False) -> list[str]:
    """What stands behind the user's NIX_SSHOPTS, so that those win, as does what `ssh -G`
    says is configured.  A patient ssh goes without an answer for as long as a login takes."""
    pairs = (line.partition(" ") for line in configured.splitlines())
    settings = {name: value for name, _, value in pairs}
    options = ["-oBatchMode=yes"]
    if settings.get("connecttimeout", "none") == "none":
        options.append(f"-oConnectTimeout={CONNECT_TIMEOUT_S}")
    if settings.get("serveraliveinterval", "0") == "0":
        count = LOGIN_TIMEOUT_S // ALIVE_INTERVAL_S if patient else ALIVE_COUNT_MAX
        options.append(f"-oServerAliveInterval={ALIVE_INTERVAL_S}")
        options.append(f"-oServerAliveCountMax={count}")
    return options


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


def aloud(options: Iterable[str]) -> Iterator[str]:
    """The words without those that would have ssh say more or less, or into a file."""
    rest = iter(options)
    for word in rest:
        if word == "-E":
            next(rest, "")
        elif word[:2] != "-E" and word.rstrip("qv") != "-":
            yield word


def pin_host_key(machine: Machine, directory: str) -> str:
    """A known_hosts file that knows just this machine's key; "" if none is pinned."""
    if not machine.host_key:
        return ""
    path = f"{directory}/known_hosts-{sha256_of(machine.host_key).hex()[:32]}"
    try:
        keep(path, f"* {machine.host_key}\n")
    except OSError as error:
        text = f"cannot keep its host key in {path}: {error.strerror}"
        raise Unreachable(text) from None
    return path


# How lines of ssh's begin that are no reason: of a new host key, of old ciphers.
CHATTER = ("Warning:", "** WARNI", "** This ", "** The s")


def command_here(way: Way, nix: Nix) -> list[str]:
    """What a way runs here, if anything, which has no machines of its own."""
    if not way.here:
        return []
    name, *words = way.here
    program = name if "/" in name else find_program(name, nix_directories(nix.environ))
    alone = ("--option", "builders", "", "--option", "max-jobs", "1")
    return [program, *words, *nix.options(), *alone]


class Ssh(NamedTuple):
    """The ssh for one machine: command lines, an environment, and what starts them."""

    programs: Programs
    directory: str  # for files that it reads, see Connection
    machine: Machine
    program: str  # its file
    own: tuple[str, ...]  # our options
    user: tuple[str, ...]  # those of NIX_SSHOPTS
    environ: dict[str, str]
    here: tuple[list[str], ...]  # for each of the machine's ways what runs here

    @classmethod
    def find(
        cls, machine: Machine, nix: Nix, programs: Programs, directory: str
    ) -> Ssh:
        """The one on PATH."""
        program = find_program("ssh", program_directories(nix.environ))
        path = f"{os.path.dirname(program)}:{nix.environ.get('PATH', '')}".rstrip(":")
        own = tuple(ssh_options(machine, pin_host_key(machine, directory)))
        user = tuple(user_ssh_options(nix.environ))
        environ = nix.child_environ(PATH=path)
        here = tuple(command_here(way, nix) for way in machine.ways)
        return cls(programs, directory, machine, program, own, user, environ, here)

    def warn(self, words: str) -> None:
        """Tell people what the machine says or does."""
        self.programs.talk.say(WARN, f"'{self.machine.name}' {words}")

    def options(self, socket: str) -> list[str]:
        """For a connection at that control socket."""
        all_else = [*self.own, *self.user]
        if socket == ALONE:  # the one before may have failed and not told us why
            socket = "none"
            all_else = ["-oLogLevel=INFO", *self.own, *aloud(self.user)]
        # The first -oControlPath counts, but a later -S, the user's or ours, beats it.
        return [f"-oControlPath={socket}", *all_else, "-S", socket]

    def command(self, *options: str) -> list[str]:
        """The command line with these options; a program to run there may follow."""
        return [self.program, *options, "--", self.machine.destination]

    def session(self, socket: str, *remote: str) -> list[str]:
        """The command line that runs a program on the machine."""
        defaults = self.defaults(patient=True) if socket == ALONE else ssh_defaults()
        options = ["-oControlMaster=no", *self.options(socket), *defaults, "-T"]
        return [*self.command(*options, "-oPermitLocalCommand=no"), *remote]

    def master(self, socket: str, *, patient: bool) -> list[str]:
        """The one that makes a shared connection, which ends when it has been idle.  Only
        its words are heard if it fails, so it shall say all, and show the banner."""
        sharing = ["-N", "-oControlMaster=yes", f"-oControlPersist={IDLE_S}"]
        sharing += ["-oLogLevel=INFO", *self.options(socket)]
        return self.command(*sharing, *self.defaults(patient=patient))

    def defaults(self, *, patient: bool) -> list[str]:
        """Those of our defaults that are not configured in another way."""
        return ssh_defaults(self.configured(), patient=patient)

    def configured(self) -> str:
        """All that ssh finds in its configuration and our options, as `ssh -G` says it in
        8 ms.  Without BatchMode: Debian's would then say that probes are configured."""
        canonical = "-oCanonicalizeHostname=no"
        command = self.command("-G", canonical, *self.own, *self.user)
        return self.programs.output(command, self.environ, RETIRE_S)[1]

    def base(self) -> str:
        """What the paths of its sockets begin with: eight digits for where they lead, then
        others for each way to connect."""
        whole = [self.program, *self.own, *self.user]
        whole += [word for way in self.machine.ways for word in (*way.there, *way.here)]
        whole += [self.environ.get(name, "") for name in ("HOME", "SSH_AUTH_SOCK")]
        whole.append(process_space())
        name = checksum(self.machine.destination) + checksum("\0".join(whole))
        return f"{self.directory}/{name}"

    def refusal(self, words: str) -> Unreachable | None:
        """What ssh's words come to, if it said any."""
        lines = [line for line in words.splitlines() if line[:8] not in CHATTER]
        text = " ".join(word for word in " ".join(lines).split() if word.strip("@"))
        error = heard(Unreachable, text[-OUTAGE_LIMIT:], "ssh")
        if self.machine.host_key and error.meaning in ("CHANGED", "NEW"):
            where = self.machine.where
            return WrongHostKey(f"its host key is not the one that {where} asks for")
        return error if text else None


class Proof(NamedTuple):
    """That somebody has talked with nix-store over a connection."""

    pid: str  # of its master, see is_alive
    start: str
    version: int  # of the serve protocol, such as 0x207
    trusted: bool = True  # whether that login may build a bare derivation, if known
    is_far: bool = False  # whether a question takes long, so that spares are of use

    @classmethod
    def parse(cls, text: str) -> Proof | None:
        """What text() made; None if it is anything else."""
        pid, start, version, *rest = (text.split() + [""] * 5)[:5]
        if not version or not only(version, DIGITS):
            return None
        return cls(pid, start, int(version[:9]), *(word == "True" for word in rest))

    def text(self) -> str:
        """One line for its file."""
        return " ".join(map(str, self))


# The ssh that Nix's programs find first in their PATH.  It behaves as an ssh that shares
# nothing, which every version can use: -O check fails, and it says `started` exactly if
# it is asked to.  Most ask by an option; Lix 2.93.0 (ssh.cc) asks for a shell, tells that
# to say so, and then to become nix-store.  After that it becomes the ssh of a session, if
# NIX_BUILD_REMOTE_SSH has one, a word a line; else it joins nix-copy-closure with us, on
# descriptors 8 and 9, so that we are the builder to it.  When done, that kills it.
STAND_IN = """#!/bin/sh
case "$*" in *"-O check"*) exit 255;; esac
case "$*" in
    *"LocalCommand=echo started"*) echo started;;
    *RemoteCommand=bash*) while read -r word rest && [ "$word" = echo ]; do echo "$rest"; done;;
esac
set -f
IFS='
'
[ -z "$NIX_BUILD_REMOTE_SSH" ] || exec $NIX_BUILD_REMOTE_SSH
exec 2> /dev/null
PATH=$PATH:/usr/bin:/bin:/run/current-system/sw/bin
exec 3<&0
cat <&3 >&9 8<&- &
exec cat <&8 3<&- 9>&-
"""


def stand_in(directory: str, refused: str = "") -> str:
    """A folder whose only program is the stand-in for ssh: in that directory, or in our spare
    one if nothing may be executed there."""
    folder = f"{directory}/bin-{checksum(STAND_IN)}"
    with suppress(OSError):
        os.makedirs(folder, 0o700, exist_ok=True)
        keep(f"{folder}/ssh", STAND_IN, 0o700)
    if os.access(f"{folder}/ssh", os.X_OK):
        return folder
    if refused:
        hint = "mount one of them without noexec, and with room for small files"
        raise Error(f"no program can be put into {refused} or {directory}; {hint}")
    return stand_in(spare_directory(), directory)


# In place of a control socket: nothing is shared, and no file can be there.
ALONE = "/dev/null/alone"


class Connection:
    """One ssh master, which hooks share and which outlives them; or none, if ALONE.

    The first hook to need it starts it apart from our process group, which Nix kills.  In the
    directory ssh/, NAME being of the machine (see Ssh.base) and N of the connection:

    NAME-N         its control socket, with which only ssh talks
    NAME-N.start   its stderr, which it keeps locked until it has connected or failed
    NAME-N.proved  its Proof, once somebody has talked with nix-store over it
    NAME-N.slow    is there if it took long to log in
    NAME-N.S       the lock of seat S; behind that name .spare, .in, .out, .err: see Spare
    NAME.seats     how many sessions sshd allows it, if that was fewer than SEATS
    NAME.tells     whether nix-store there takes --log-format: "1", "0" if it does not
    NAME.way       the number of that of the machine's ways which its login allows
    """

    def __init__(self, ssh: Ssh, socket: str) -> None:
        self.ssh, self.socket = ssh, socket
        self.master: subprocess.Popen[bytes] | None = None  # if we have started it

    def is_up(self) -> bool:
        """Whether its master lives; that says nothing of the network."""
        is_noted = os.path.exists(f"{self.socket}.proved")
        return os.path.exists(self.socket) and not (is_noted and not self.proof())

    def proof(self) -> Proof | None:
        """That somebody has talked with nix-store over this very connection, if so."""
        proof = Proof.parse(read_private(f"{self.socket}.proved") or "")
        return proof if proof and is_alive(proof.pid, proof.start) else None

    def prove(self, version: int) -> None:
        """Note that we have, and what process its master is."""
        if self.socket == ALONE:
            return
        _, said, words = self.ask("check")
        pid = f"{said}{words}".partition("(pid=")[2].partition(")")[0]
        if pid.isdecimal():
            proof = Proof(pid, start_time(int(pid)), version)
            note(f"{self.socket}.proved", proof.text())

    def change(self, **known: Any) -> None:
        """Keep what is known besides, by the names that Proof has."""
        if proof := self.proof():
            note(f"{self.socket}.proved", proof._replace(**known).text())

    def answers(self) -> bool:
        """Whether its master does; that is not whether the network does."""
        return self.socket == ALONE or self.ask("check")[0] == 0

    def ask(self, word: str) -> tuple[int, str, str]:
        """Have ssh tell the master that: its exit status, stdout and stderr."""
        command = self.ssh.command("-O", word, "-S", self.socket)
        return self.ssh.programs.output(command, self.ssh.environ, RETIRE_S)

    def words(self) -> tuple[str, bool]:
        """What its master has said at the start, and whether it still connects."""
        with suppress(Error), Lock(f"{self.socket}.start") as lock:
            connecting = not lock.is_free()
            return lock.read(TAIL_BYTES), connecting
        return "", False  # our directory is gone

    def start(self) -> None:
        """Begin to connect, unless somebody does; Error without room for its file."""
        with Lock(f"{self.socket}.start") as lock:
            while not lock.hold():  # it is a master's, or of one who just looks
                if not lock.is_free():
                    return
            if self.is_up():
                return
            slow = f"{self.socket}.slow"
            if heard(Error, lock.read(TAIL_BYTES), "ssh").meaning == "SLOW":
                note(slow, "")
            lock.write("")
            # What a killed master has left: ssh would share nothing if it found that.
            for stale in (f"{self.socket}.proved", self.socket):
                with suppress(OSError):
                    remove(stale)
            command = self.ssh.master(self.socket, patient=os.path.exists(slow))
            programs, environ = self.ssh.programs, self.ssh.environ
            # It forks when it is shared; if a socket is there by now, it would stay for ever.
            bound = {"preexec_fn": lambda: end_in_time(AWAY_TIMEOUT_S)}
            with programs.outlet(lock.descriptor, environ) as said:
                apart: dict[str, Any] = {"stderr": said, "start_new_session": True}
                self.master = programs.start(command, environ, **apart, **bound)

    def connect(self, patience_s: float) -> None:
        """Wait until it is up, or go on ALONE if this ssh shares nothing, though it does not
        fail.  Raises Unreachable with ssh's own words."""
        start, told = time.monotonic(), ""
        try:
            self.start()
        except Error:
            self.socket = ALONE
        while self.socket != ALONE and not self.is_up():
            words, connecting = self.words()
            if words != told and time.monotonic() > start + TELL_S:
                told = words
                self.ssh.warn(f"says while we log in: {words}")
            if means(words, "UNSHARED"):  # it would stay, of no use
                if self.master and connecting:
                    self.master.terminate()
                self.socket = ALONE
            elif not connecting and not self.is_up():
                if refusal := self.ssh.refusal(words):
                    raise refusal
                self.socket = ALONE
            elif time.monotonic() > start + patience_s:
                late = Late(f"no connection within {patience_s:.0f} s")
                late.remedy = "is the machine on, and can it be reached from here?"
                raise late.become(Unreachable)
            wait_readable([], 0.005)

    def retire(self) -> None:
        """Let whoever comes next make a new connection, since this may be the trouble:
        its logins keep the groups that the user had.  Sessions that it has go on."""
        if os.path.exists(self.socket) and self.ask("stop")[0] != 0:
            with suppress(OSError):  # its master stands still
                remove(self.socket)


def make_pipe(path: str) -> tuple[int, int]:
    """A new named pipe, to read and to write."""
    remove(path)
    os.mkfifo(path, 0o600)
    reads = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)  # nobody writes
    os.set_blocking(reads, True)
    return reads, os.open(path, os.O_WRONLY | os.O_NOFOLLOW)


class Spare:
    """A session on a seat, begun in advance: stands for its ssh, as subprocess.Popen does.

    Two of the three or four round trips of a build over a live connection are ssh's own: to
    open a channel, and to start nix-store in it.  So while a build runs, its hook begins a
    session for the next one, where that is far: 50 ms away that saves 100 ms and ssh's
    start.  Its ssh reads and writes named pipes, whose other ends a `sleep` holds until
    somebody comes; if nobody does, it ends, and so does ssh.
    """

    def __init__(self, connection: Connection, ssh: list[str], *pipes: int) -> None:
        self.connection, self.ssh = connection, ssh
        self.stdin = os.fdopen(pipes[0], "wb", 0)
        self.stdout, self.stderr = (os.fdopen(pipe, "rb", 0) for pipe in pipes[1:])
        self.returncode: int | Any = None  # as Popen has it

    @staticmethod
    def begin(seat: Seat, file: str, proof: Proof) -> None:
        """Begin one on the seat of that file, which we hold."""
        environ, apart = seat.ssh.environ, {"start_new_session": True}
        command = [find_program("sleep", program_directories(environ)), str(SPARE_S)]
        pipes = [*map(make_pipe, (f"{file}.in", f"{file}.out", f"{file}.err"))]
        (reads, feeds), (hears, says), (listens, complains) = pipes
        theirs = dict(zip(STREAMS, (reads, says, complains)))
        others = dict(zip(STREAMS, (hears, feeds, listens)))
        keeper = seat.ssh.programs.start(command, environ, **apart, **others)
        try:
            ssh = seat.serve(tells=seat.tells(), **apart, **theirs)
            pids = [proof.pid, proof.start]
            for process in (keeper, ssh):
                pids += [str(process.pid), start_time(process.pid)]
            write_private(f"{file}.spare", " ".join(pids), durable=False)
        except BaseException:
            keeper.kill()
            raise
        finally:
            for pipe in (end for ends in pipes for end in ends):
                os.close(pipe)

    @staticmethod
    def at(file: str, proof: Proof | None) -> list[str]:
        """Of the spare session on the seat of that file: process id and start of its `sleep`
        and of its ssh; nothing if there is none over the connection with that proof."""
        if not proof:
            return []
        pids = ((read_private(f"{file}.spare") or "").split() + [""] * 6)[:6]
        is_there = tuple(pids[:2]) == proof[:2] and is_alive(*pids[2:4])
        return pids[2:] if is_there else []

    @classmethod
    def take(cls, connection: Connection, file: str) -> Spare | None:
        """That on the seat of that file, which we hold; None if there is none."""
        pipes: list[int] = []
        with suppress(OSError):
            ways = {"in": os.O_WRONLY, "out": os.O_RDONLY, "err": os.O_RDONLY}
            for name, way in ways.items():
                flags = way | os.O_NONBLOCK | os.O_NOFOLLOW
                pipes.append(os.open(f"{file}.{name}", flags))
            whole = all(stat.S_ISFIFO(os.fstat(pipe).st_mode) for pipe in pipes)
            # What it reads was open all the time if its `sleep` still lives.
            if whole and (pids := cls.at(file, connection.proof())):
                remove(f"{file}.spare")
                os.kill(int(pids[0]), SIGTERM)
                return cls(connection, pids[2:], *pipes)
        for pipe in pipes:
            os.close(pipe)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """A guess at its exit status: ssh's 255 if the connection has gone."""
        import subprocess

        poll = select.poll()
        poll.register(self.stdout, 0)  # it is always told that nobody writes any more
        if self.returncode is None:
            if not poll.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired("ssh", timeout or 0)
            ended = 0 if self.stdin.closed else 1
            self.returncode = ended if self.connection.is_up() else 255
        return int(self.returncode)

    def kill(self) -> None:
        """End it at once, if it has not ended."""
        if self.returncode is None:
            self.returncode = -SIGTERM
            with suppress(OSError):  # it ends at this moment
                if is_alive(*self.ssh):
                    os.kill(int(self.ssh[0]), SIGTERM)

    terminate = kill


class Seat:
    """One hook's right to a session with a machine, over a connection if there is one; it is
    kept until we end."""

    def __init__(self, ssh: Ssh) -> None:
        self.ssh, self.base = ssh, ssh.base()
        self.connection = Connection(ssh, ALONE)
        self.is_plain = False  # whether --log-format was refused, and is not asked for
        self.has_alternatives = False  # whether another machine might do the same
        self.lock: Lock | None = None
        way = read_private(f"{self.base}.way") if ssh.machine.ways[1:] else "0"
        self.chosen = int(way == "1")  # the number of the way that we take

    @property
    def way(self) -> Way:
        """The way to a session that we take."""
        return self.ssh.machine.ways[self.chosen]

    @property
    def greeting_s(self) -> float:
        """How long to wait for the first answer in a session."""
        return AWAY_TIMEOUT_S if self.way.is_job else GREETING_TIMEOUT_S

    def other_way(self) -> bool:
        """Take the other way from now on; False if there is none."""
        self.chosen = len(self.ssh.machine.ways) - 1 - self.chosen
        return len(self.ssh.machine.ways) > 1

    def keep_way(self) -> None:
        """Let all hooks take this way, which has led to a session."""
        if len(self.ssh.machine.ways) > 1:
            note(f"{self.base}.way", str(self.chosen))

    def take(self) -> None:
        """Take one on the first connection that has one; with the last seat of one, the
        next connection is begun.  Without room for a file nothing is shared."""
        seats = self.allowed()
        with suppress(Error, OSError):
            for number, file in self.places(seats):
                self.lock = Lock.take(file)
                if self.lock:
                    break
            else:
                return
            self.connection = self.connection_at(number)
            if file.endswith(f".{seats - 1}") and number + 1 < CONNECTIONS:
                self.connection_at(number + 1).start()

    def places(self, seats: int) -> list[tuple[int, str]]:
        """The connection and the file of each seat, those with spare sessions first."""
        proofs = [self.connection_at(number).proof() for number in range(CONNECTIONS)]
        every = [(n, seat) for n in range(CONNECTIONS) for seat in range(seats)]
        files = [(n, f"{self.base}-{n}.{seat}") for n, seat in every]
        return sorted(files, key=lambda file: not Spare.at(file[1], proofs[file[0]]))

    def connection_at(self, number: int) -> Connection:
        """That connection to the machine."""
        socket = f"{self.base}-{number}" if self.way.there else ALONE
        return Connection(self.ssh, socket)

    def allowed(self) -> int:
        """How many sessions a connection to this machine may have."""
        text = read_private(f"{self.base}.seats") or ""
        return (int(text) if only(text, DIGITS) and 0 < len(text) < 3 else 0) or SEATS

    def note_fewer(self) -> None:
        """Remember how many sessions sshd allows, since it has refused us one more."""
        files = [f"{self.connection.socket}.{n}" for n in range(self.allowed())]
        proof = self.connection.proof()
        with suppress(Error, OSError):  # a full disk
            taken = [f for f in files if not is_free(f) or Spare.at(f, proof)]
            if len(taken) > 1:  # else sessions that are ending count there
                note(f"{self.base}.seats", str(len(taken) - 1))

    def tells(self) -> bool:
        """Whether nix-store there is known to tell of its activities, for a Nix 2.x."""
        known = not self.ssh.programs.talk.old and not self.is_plain
        return known and read_private(f"{self.base}.tells") == "1"

    def prove(self, version: int) -> None:
        """Note what has led to a session, which speaks that version: the way, the connection,
        and whether nix-store there tells of its activities; once it did not, that stays."""
        self.keep_way()
        self.connection.prove(version)
        can = version >= KEPT_SINCE and not self.is_plain  # from Nix 2.4 on
        can = can and read_private(f"{self.base}.tells") != "0"
        note(f"{self.base}.tells", str(int(can)))

    def prepare(self) -> None:
        """Begin a session for who comes next, on a free seat but the last, if that is of use."""
        proof = self.connection.proof()
        # A process of which the system tells no start might be a later namesake.
        if not proof or not proof.is_far or proof.start == "-" or self.way.is_job:
            return
        files = [f"{self.connection.socket}.{n}" for n in range(self.allowed() - 1)]
        empty = [file for file in files if not Spare.at(file, proof)]
        if len(empty) <= len(files) - SPARES:
            return
        with suppress(Error, OSError):  # a full disk
            if lock := Lock.take(*empty):
                with lock:
                    Spare.begin(self, lock.path, proof)

    def session(self, tells: bool) -> subprocess.Popen[bytes] | Spare:
        """nix-store on the machine: the spare one of our seat, or a new one, see serve."""
        spare = Spare.take(self.connection, self.lock.path) if self.lock else None
        return spare or self.serve(tells=tells)

    def start(self, *remote: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a program on the machine, with pipes, but for what the options say."""
        command = self.ssh.session(self.connection.socket, *remote)
        return self.ssh.programs.start(command, self.ssh.environ, *STREAMS, **options)

    def serve(self, *, tells: bool = False, **options: Any) -> subprocess.Popen[bytes]:
        """Start what speaks the serve protocol for the machine's store, to tell of its
        activities or not.  A nix-store here hears that we end, and ends its build."""
        there, more = self.way.there, ["--log-format", "internal-json"] if tells else []
        if not self.way.here:
            return self.start(*there, *more, **options)
        environ = {n: v for n, v in self.ssh.environ.items() if n != "NIX_REMOTE"}
        if there:  # it opens another store by an ssh
            environ["PATH"] = f"{stand_in(self.ssh.directory)}:{environ['PATH']}"
            command = self.ssh.session(self.connection.socket, *there)
            environ["NIX_BUILD_REMOTE_SSH"] = "\n".join(command)
        command = [*self.ssh.here[self.chosen], *more]
        options = {"start_new_session": True, **options}
        return self.ssh.programs.start(command, environ, *STREAMS, **options)

    def margin_s(self) -> float:
        """How long a build there may outlast Nix's limits; without root, a daemon builds."""
        if self.way.here:
            return HERE_MARGIN_S
        is_root = "user root" in self.ssh.configured().splitlines()
        return MARGIN_S if is_root else DAEMON_MARGIN_S


# ---- Session ------------------------------------------------------------------------


class Answer:
    """What a builder will say to a question.  Answers come in the order of the questions: to
    get one, those before it are heard first.  hear reads it, within time_s."""

    def __init__(self, session: Session, hear: Hear, time_s: float) -> None:
        self.session, self.hear, self.time_s = session, hear, time_s
        self.value: Any = None  # once it is heard
        self.is_heard = False
        session.awaited.append(self)

    def get(self, within_s: float = math.inf) -> Any:
        """The answer; if it is late: Late, or Unreachable if the session has answered nothing yet."""
        session, until = self.session, time.monotonic() + within_s
        while not self.is_heard:
            if not session.awaited:  # it was to be heard, in vain
                raise SessionLost("the builder's answers cannot be told apart any more")
            first = session.awaited.pop(0)
            limit = math.inf if session.is_useful else session.deadline
            try:
                limit = min(limit, until, time.monotonic() + first.time_s)
                first.value = first.hear(limit)
            except Late as error:
                if session.is_useful:
                    raise
                raise error.become(Unreachable) from None
            first.is_heard = True
            session.is_useful = first is not session.greeting
        return self.value


class Awaited(NamedTuple):
    """A lock that a builder's Nix waits for, in its words; "" if there is none."""

    activity: int = -1  # its number
    words: str = ""
    since: float = 0.0  # in monotonic time
    is_told: bool = False


class Activities:
    """What nix-store tells of its activities if it is to (--log-format internal-json): a
    line of JSON for each event, among them each line of a build's log.  Besides there are
    ssh's words, and the log itself where a login allows no options."""

    # How nearly all lines begin and end (JSONLogger in Nix's logging.cc).
    HEAD = b'@nix {"action":"result","fields":["'
    ID, TAIL = b'"],"id":', b',"type":101}'
    LIMIT_BYTES = 16 << 20  # of a line; what is longer is passed on as it is

    def __init__(self) -> None:
        self.begun = b""  # a line that has not ended yet
        self.lock = Awaited()
        self.absent: tuple[str, ...] = ()  # paths that may be missing, see no_path
        self.are_over = False  # whether it has said that one of them is

    def plain(self, data: bytes) -> bytes:
        """What a log says in place of that; no data means the end."""
        lines = (self.begun + data).split(b"\n")
        self.begun = lines.pop() if len(lines[-1]) < self.LIMIT_BYTES else b""
        if not data and self.begun:
            lines, self.begun = [self.begun], b""
        return b"".join(map(self.plain_line, lines))

    def plain_line(self, line: bytes) -> bytes:
        """What a log says in place of one line; nothing if that is of no use there."""
        text, _, rest = line.partition(self.ID)
        quick = text.startswith(self.HEAD) and rest.endswith(self.TAIL)
        if quick and b"\\" not in text:
            return text[len(self.HEAD) :] + b"\n"
        if self.is_dull(line) or self.is_excuse(line):
            return b""
        if not line.startswith(b"@nix {"):
            return line + b"\n"
        import json

        try:
            said = self.hear(json.loads(line[5:]))
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
            return line + b"\n"
        return b"" if said is None else said.encode("utf-8", "replace") + b"\n"

    def hear(self, event: dict[str, Any]) -> str | None:
        """Take note of an event; returns its line for the log, from which the Nix here reads
        a phase, too, or None if it has none."""
        action, kind = event["action"], event.get("type")
        if action == "msg":
            return printable(event["msg"])  # which has colours only here
        if action == "result" and kind == LOG_LINE:
            return str(event["fields"][0])
        if action == "result" and kind == PHASE:
            phase = quoted(str(event["fields"][0]))
            return f'@nix {{"action":"setPhase","phase":{phase}}}'
        if action == "start" and kind == COPY_PATH:
            return f"{event['text']}..."
        if action == "start" and kind == WAITING and " lock on " in event["text"]:
            words = printable(event["text"])
            self.lock = Awaited(event["id"], words, time.monotonic())
        elif action == "stop" and event["id"] == self.lock.activity:
            self.lock = Awaited()
        return None

    def is_dull(self, line: bytes) -> bool:
        """Whether that is an event of no use to us.  Mostly all are; json takes 3 ms to import."""
        action, kind = line[:22], line.rpartition(b'"type":')[2]
        if action == b'@nix {"action":"stop",':
            return not self.lock.words
        if action == b'@nix {"action":"start"':
            return kind in (b"0}", b"102}", b"103}", b"104}", b"105}")
        return action == b'@nix {"action":"result' and kind in (b"105}", b"106}")

    def is_excuse(self, words: bytes) -> bool:
        """Whether that is nix-store's error that a path of `absent` is not valid, or as Lix has it
        does not exist in store, with which it is meant to end; takes note of that."""
        is_event = words.startswith(b'@nix {"action":"msg"')  # which has colours
        quote = "" if is_event else "'"
        named = any(f"{quote}{path}{quote}".encode() in words for path in self.absent)
        is_error = (is_event and b"error:" in words) or words.startswith(b"error:")
        if named and is_error and b" not " in words:
            self.are_over = True
            return True
        return False


class Session:
    """One `nix-store --serve --write` on a builder.

    What it was asked about with the lock flag, and what it built, is safe from the builder's
    garbage collector for as long as it is open.  Its stderr carries ssh's own words until
    the greeting, then the log of the build.
    """

    def __init__(self, seat: Seat) -> None:
        self.seat = seat
        self.proof = seat.connection.proof()  # what is known of it before it greets
        # Of the protocol, as it is or as it must be; 0 if not known.
        self.version = self.proof.version if self.proof else 0
        self.awaited: list[Answer] = []  # in the order in which they will come
        self.greeting = Answer(self, self.hear_greeting, math.inf)
        self.deadline = time.monotonic() + seat.greeting_s  # for that, and one answer
        self.tail = b""  # of stderr
        self.tells = seat.tells()  # whether it is to tell of its activities
        self.activities = Activities()  # those that it has told of, on stderr
        self.inbox = bytearray()  # what it said and nobody has read yet
        self.is_useful = False  # whether it has answered anything: that needs its store
        self.unasked: float = math.inf  # archives that are still to be asked for
        self.realised: dict[str, str] = {}  # what it said of outputs, in JSON, by name
        # How long a running build may take, and say nothing, before we end it.
        self.limits = math.inf, math.inf
        self.is_silent = True  # whether the running build has said nothing yet
        self.first = self.last = 0.0  # when the log began, and was last heard of
        self.process = seat.session(self.tells)
        pipes = (self.process.stdin, self.process.stdout, self.process.stderr)
        numbers = [pipe.fileno() for pipe in pipes if pipe]
        self.stdin: int | None = numbers[0]  # None: it will be asked no more
        self.stdout = numbers[1]
        self.stderr: int | None = numbers[2]  # None: it has ended
        os.set_blocking(numbers[0], False)
        self.write(GREETING)

    def hear_greeting(self, until: float) -> None:
        """Read the answer to our hello; SessionLost, with ssh's own words, if it fails."""
        try:
            magic = self.read(8, min(until, time.monotonic() + REPLY_S))
        except Late:
            if not self.seat.connection.answers():
                words = "the connection to it does not answer"
                raise Late(words).become(SessionLost) from None
            said = " ".join(printable(decode(self.tail)).split()) or "nothing"
            self.seat.ssh.warn(f"lets us wait for nix-store, and says: {said}")
            magic = self.read(8, until)
        if magic != integer(SERVE_REPLY):
            raise self.no_greeting(magic)
        version = read_integer(self.reader(until))
        if version >> 8 != 2:
            spoken = f"serve protocol {version >> 8}.{version & 255}"
            raise SessionLost(f"its Nix is older than 1.8, or no Nix ({spoken})")
        version, relied_on = min(SERVE_VERSION, version), self.version
        if relied_on not in (0, version):
            raise SessionLost("its Nix is not the one that it was")
        self.version = version
        words = decode(self.tail)
        if means(words, "UNSEATED"):  # ssh then made a connection of its own
            self.seat.note_fewer()
        elif means(words, "UNSHARED"):
            self.seat.connection.retire()

    def no_greeting(self, begin: bytes) -> SessionLost:
        """What to raise if it does not begin as nix-store does: a shell that greets, or that
        is there to say that nobody may log in."""
        with suppress(SessionLost):
            while b"\n" not in begin and len(begin) < OUTAGE_LIMIT:
                begin += self.read(1, time.monotonic() + QUIET_S / 2)
        self.seat.is_plain = self.tells
        line = printable(decode(begin)).strip()
        error = Refused(f"it says {line!r} before nix-store's own words")
        error.lasting, error.remedy = True, CHATTY
        return error

    def pipes(self) -> list[int]:
        """Where it may say something."""
        return [self.stdout] if self.stderr is None else [self.stdout, self.stderr]

    def pump(self, ready: set[int]) -> None:
        """Take in what has arrived on these: an answer, ssh's words, or the log.  What comes
        with the greeting belongs to the log, and is left until that has been read."""
        greets = not self.greeting.is_heard and self.stdout in ready
        if self.stderr in ready and not greets:
            self.take_log(os.read(self.stderr, 65536))
        if self.stdout in ready:
            data = os.read(self.stdout, 65536)
            if not data:
                raise self.lost()
            self.inbox += data
            if len(self.inbox) > 2 * WIRE_LIMIT_BYTES:
                raise Nonsense("it says more than anybody asked for")

    def take_log(self, data: bytes) -> None:
        """Pass some of its stderr on to Nix; no data means its end."""
        if not data:
            self.stderr = None
        greeted = self.greeting.is_heard
        self.last = time.monotonic() if data and greeted else self.last
        data = self.activities.plain(data)
        told = data
        if self.is_silent:  # if it refuses us, we go on in another way or elsewhere
            lines = data.splitlines(keepends=True)
            told = b"".join(line for line in lines if not refuses(decode(line)))
        if told and greeted:
            write_all(LOG, told)
            self.first = self.last if self.is_silent else self.first
            self.is_silent = False
        self.tail = (self.tail + data)[-TAIL_BYTES:]

    def watch_lock(self, now: float) -> float:
        """When to look next whether it waits too long for a lock there, which is told after
        a minute; Stuck if another machine might do."""
        lock = self.activities.lock
        if not lock.words:
            return math.inf
        told_at, end_at = lock.since + STILL_S, lock.since + STALLED_S
        if now >= end_at and self.seat.has_alternatives:
            raise Stuck(f"it has been {lock.words} for {STALLED_S} s")
        if now >= told_at and not lock.is_told:
            self.activities.lock = lock._replace(is_told=True)
            self.seat.ssh.warn(f"is {lock.words}")
        return min((t for t in (told_at, end_at) if t > now), default=math.inf)

    def read(self, count: int, deadline: float = math.inf) -> bytes:
        """So much of what it says; Late, or BuildTimedOut if the running build is too late."""
        while len(self.inbox) < count:
            now, limit = time.monotonic(), self.build_limit()
            if now >= limit:
                limits = "it exceeds the limits of time or silence that Nix has set"
                raise BuildTimedOut(f"{limits}, and the builder let it")
            if now >= deadline:
                raise Late("no answer within the time for it")
            until = min(deadline, limit, self.watch_lock(now))
            self.pump(wait_readable(self.pipes(), until - now))
        return self.from_inbox(count)

    def from_inbox(self, limit: int) -> bytes:
        """Some of what has arrived, at most so much."""
        data = bytes(self.inbox[:limit])
        del self.inbox[:limit]
        return data

    def reader(self, deadline: float) -> Read:
        """Reads until then."""
        return lambda count: self.read(count, deadline)

    def write(self, data: bytes) -> None:
        """Send all of it, still taking in what arrives."""
        if self.stdin is None:
            raise SessionLost("the builder was told that it would be asked no more")
        view = memoryview(data)
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while view:
            try:
                view = view[os.write(self.stdin, view) :]
                deadline = time.monotonic() + ANSWER_TIMEOUT_S
            except BlockingIOError:
                left = max(0.0, deadline - time.monotonic())
                ready = wait_readable(self.pipes(), left, [self.stdin])
                self.pump(ready)
                if not ready:
                    raise Late("no answer: it does not read") from None
            except BrokenPipeError:
                raise self.lost() from None

    def drain(self) -> None:
        """Pass on stderr to its end, or until nothing comes for a while: a start-up file
        of the builder's shell may have left a process that keeps it open, or writes."""
        deadline = time.monotonic() + MARGIN_S
        while self.stderr is not None:
            left = min(QUIET_S, deadline - time.monotonic())
            if left <= 0 or not wait_readable([self.stderr], left):
                return
            self.take_log(os.read(self.stderr, 65536))

    def last_words(self) -> str:
        """What ssh or nix-store said at the end; ends it if it has not."""
        if status_within(self.process, 1) is None:
            self.process.kill()
        self.drain()
        lines = decode(self.tail).split("\n")
        if self.is_useful:  # the rest is the build's log, which Nix has got
            lines = [line[-OUTAGE_LIMIT // 2 :] for line in lines[-2:]]
        else:
            lines.append(printable(decode(bytes(self.inbox))))
        if self.process.wait() == 255 and not self.seat.connection.is_up():
            lines.append(self.seat.connection.words()[0])
        return " ".join(" ".join(lines).split())

    def lost(self) -> SessionLost:
        """What to raise after its end.  ssh ends with 255 if it is ssh that speaks; and a
        program with more than 128 if it was killed."""
        words = self.last_words()
        status = self.process.returncode
        greeted = self.greeting.is_heard
        began = "the connection was lost: " if greeted and status == 255 else ""
        who = "nix-store" if self.seat.way.here else "ssh"
        text = f"{began}{words or 'the session ended'} ({who}'s exit status {status})"
        fresh = not self.is_useful and 0 <= status <= 128
        speaker = "ssh" if status == 255 else "far" if fresh else ""
        error = heard(Refused if speaker == "far" else SessionLost, text, speaker)
        if fresh and self.tells:
            self.seat.is_plain = True
        if status == 255 and not greeted and not words:
            error.lasting, error.remedy = None, USELESS
        if fresh and status == 0 and not words:  # so ends nix-daemon for other users
            error.meaning, error.remedy = "DAEMON", DAEMON
        return error

    def ask_no_more(self) -> None:
        """Let it end when it has answered, so that its log's end comes right behind."""
        if self.process.stdin:
            self.process.stdin.close()
        self.stdin = None

    def finish(self) -> None:
        """End it in peace, so that the last of the log arrives."""
        self.ask_no_more()
        self.drain()

    def cancel(self) -> None:
        """End it at once: when its ssh ends, the builder cancels the build.  A nix-store here
        ends its own build, if it may."""
        if self.seat.way.here and self.process.returncode is None:
            self.process.terminate()
            status_within(self.process, CANCEL_S)
        end(self.process)

    def ask_valid(self, paths: Iterable[str], substitute: bool = False) -> Answer:
        """Ask which of the paths (a set) it has, and is to keep until the session ends."""
        self.write(valid_question(paths, substitute))
        time_s = SUBSTITUTE_TIMEOUT_S if substitute else ANSWER_TIMEOUT_S
        return Answer(self, lambda until: set(read_strings(self.reader(until))), time_s)

    def infos_answer(self) -> Answer:
        """The answer to infos_question, when that was sent: a dict of PathInfo."""
        hear = lambda until: read_infos(self.reader(until), self.version)
        return Answer(self, hear, ANSWER_TIMEOUT_S)

    def build_options(self, nix: Nix) -> bytes:
        """Nix's settings that concern a build, as this version of the protocol wants."""
        numbers = [nix.number("max-silent-time"), nix.number("timeout")]
        version = self.version
        if version >= LOG_SIZE_SINCE:
            numbers.append(nix.number("max-build-log-size"))
        if version >= TIMES_SINCE:
            numbers.append(nix.number("repeat"))  # 2.13 and newer have neither of them
            numbers.append(int(nix.enabled("enforce-determinism")))
        if version >= KEPT_SINCE:
            numbers.append(int(nix.enabled("keep-failed")))
        return b"".join(map(integer, numbers))

    def build_limit(self) -> float:
        """When the running build will have exceeded Nix's limits by far, counted from our question
        or the first of its log, before which it may wait for its turn, or for a lock."""
        if self.activities.lock.words:
            return math.inf
        return min(self.first + self.limits[0], self.last + self.limits[1])

    def ask_to_build(
        self, path: str, encoded: bytes | None, nix: Nix, then: bytes = b""
    ) -> Answer:
        """Ask for the build of a derivation, and at once the next question; encoded: None if
        it is there, for the older command.  The answer: a status as the builder's Nix has
        it, 0 if it was built, and a message."""
        build, by_path = integer(BUILD_PATHS) + strings([path]), encoded is None
        if encoded is not None:
            build = integer(BUILD_DERIVATION) + string(path) + encoded
        self.write(build + self.build_options(nix) + then)
        hear: Hear = lambda _: self.hear_of_build(nix, by_path)
        return Answer(self, hear, math.inf)

    def hear_of_build(self, nix: Nix, by_path: bool) -> tuple[int, str]:
        """Read the answer to BuildPaths or to BuildDerivation."""
        status = self.wait_for_build(nix)
        if by_path and status == 0:
            return 0, ""
        read = self.reader(time.monotonic() + STALLED_S)
        message = read_string(read)
        if by_path:  # a mask from 100 up: 1 a timeout, 2 a hash mismatch, ...
            kind = MISC if status < 100 else TIMED_OUT if status & 1 else PERMANENT
            return kind, message
        if self.version >= TIMES_SINCE:
            read(4 * 8)  # times built, non-deterministic, start, stop
        if self.version >= OUTPUTS_SINCE:
            words = read_strings(read, 2)
            names = (name.rpartition("!")[2] for name in words[::2])
            self.realised.update(zip(names, words[1::2]))
        return (0 if status in BUILT else status), message

    def wait_for_build(self, nix: Nix) -> int:
        """The status of the running build, when it has ended."""
        timeout, silence = nix.number("timeout"), nix.number("max-silent-time")
        self.first = self.last = time.monotonic()
        self.is_silent = True
        margin_s = self.seat.margin_s() if timeout or silence else 0.0
        self.limits = (timeout or math.inf) + margin_s, (silence or math.inf) + margin_s
        try:
            return read_integer(self.read)
        finally:
            self.limits = math.inf, math.inf


GREETING = integer(SERVE_HELLO) + integer(SERVE_VERSION)


def valid_question(paths: Iterable[str], substitute: bool) -> bytes:
    """QueryValidPaths of these, which are to be kept."""
    flags = integer(1) + integer(int(substitute))
    return integer(QUERY_VALID_PATHS) + flags + strings(sorted(paths))


def infos_question(paths: Iterable[str]) -> bytes:
    """QueryPathInfos of these."""
    return integer(QUERY_PATH_INFOS) + strings(sorted(paths))


def dump_question(path: str) -> bytes:
    """DumpStorePath: its archive.  If it is not there, nix-store says so, and ends."""
    return integer(DUMP_STORE_PATH) + string(path)


def no_path(path: str) -> str:
    """A store path beside that one, which nobody has.  If asked for its archive, nix-store
    fails and so ends.  To close its input would end it, too, but cancel the build before."""
    return f"{os.path.dirname(path)}/{'0' * 32}-the-end"


# ---- Site ---------------------------------------------------------------------------


def program_version(
    program: str, nix: Nix, programs: Programs, directory: str
) -> tuple[int, ...]:
    """(2, 26, 3) for a nix-copy-closure of that version.  Asking takes 30 ms, so the answer
    is kept in that directory for as long as the program's file is the same."""
    info = os.stat(program)
    key = f"{program} {info.st_dev} {info.st_ino} {info.st_size} {info.st_mtime_ns}"
    path = f"{directory}/version-{checksum(key)}"
    said = read_private(path) or ""
    if parse_version(said) == NIX_1 or said[-1:] != "\n":  # not known, or cut off
        status, said, _ = programs.output([program, "--version"], nix.child_environ())
        if status == 0:
            note(path, said)
    return parse_version(said)


NIX_1 = (1, 11)


def parse_version(text: str) -> tuple[int, ...]:
    """Of `nix-copy-closure (Nix) 2.26.3`.  Lix, with more lines behind that, counts on from
    Nix 2.18, whose locks it has; in Nix 1.x it is a Perl script without --version."""
    line = text.strip().split("\n")[0]
    last = line.split(" ")[-1]
    number = last[: len(last) - len(last.lstrip(f"{DIGITS}."))]  # 2.35pre20260101_abc
    numbers = tuple(int(part[:9]) for part in number.split(".") if part)
    if len(numbers) < 2:
        return NIX_1
    return (2, 18) if "Lix" in line else numbers


class Site:
    """What a hook knows of where it runs, and what several of its parts need.  directory: for
    what ssh reads, see Connection; copy_program, store_program: nix-copy-closure and nix-store
    of the calling Nix."""

    def __init__(self, nix: Nix, talk: Talk, slots: Slots) -> None:
        self.nix, self.talk, self.slots = nix, talk, slots
        self.programs = Programs(talk)
        self.outages = Outages(slots, self.probe)
        self.outages.ask = None if slots.is_blind else self.look
        self.directory = ssh_directory(slots.path)
        stand_in(self.directory)  # else nothing can be copied
        places = nix_directories(nix.environ)
        program = self.copy_program = find_program("nix-copy-closure", places)
        self.store_program = f"{os.path.dirname(program)}/nix-store"
        self.copy_version = program_version(program, nix, self.programs, self.directory)
        self.seats: dict[Machine, Seat] = {}  # those that we have

    def read_derivation(self, path: str) -> Derivation:
        """The derivation of that store path, also if the store here is a binary cache."""
        store = self.nix.store
        if not store.is_cache:
            derivation = read_derivation(path, store)
            if derivation.is_floating and self.copy_version < (2, 8):
                why = "it is content-addressed, and this Nix is older than 2.8"
                raise Unsendable(f"cannot send '{path}' to another machine: {why}")
            return derivation
        command = [f"{os.path.dirname(self.copy_program)}/nix", "store", "cat"]
        command += ["--extra-experimental-features", "nix-command"]
        command += ["--store", store.remote, path]
        environ = self.nix.child_environ()
        status, text, _ = self.programs.output(command, environ, REPLY_S)
        if status or "\ufffd" in text:  # it is not UTF-8
            raise Error(f"cannot read '{path}' from {store.remote}")
        return read_derivation(path, store, text)

    def new_seat(self, machine: Machine) -> Seat:
        """One that has no connection yet."""
        return Seat(Ssh.find(machine, self.nix, self.programs, self.directory))

    def seat(self, machine: Machine) -> Seat:
        """Ours with that machine, kept until we end."""
        if machine not in self.seats:
            self.seats[machine] = self.new_seat(machine)
            self.seats[machine].take()
        return self.seats[machine]

    def retire(self, machine: Machine) -> None:
        """Let who comes next to that machine make a new connection, if we have one."""
        if machine in self.seats:
            self.seats[machine].connection.retire()

    def probe(self, machine: Machine, output: int) -> None:
        """Have nix-store on the machine answer a question, over a connection of its own,
        into that file, in the background."""
        seat = self.new_seat(machine)
        if read_private(f"{seat.base}.way") not in ("0", "1"):
            # Any of them: probes that follow each other will try all.
            seat.chosen = os.urandom(1)[0] % len(machine.ways)
        with self.programs.outlet(output, seat.ssh.environ) as said:
            process = seat.serve(stdout=said, stderr=said, **APART)
        tell_all(process, GREETING + valid_question([], False))

    def look(self, machine: Machine, output: int) -> None:
        """Have a machine say how it is into that file, in the background, over a connection
        that is shared, if it is up."""
        seat = self.seats.get(machine)
        if not seat:
            seat = self.new_seat(machine)
            seat.connection = seat.connection_at(0)
        with self.programs.outlet(output, seat.ssh.environ) as said:
            process = seat.start("sh", stdout=said, stderr=said, **APART)
        store = "".join(seat.way.there).partition("--store")[2]
        tell_all(process, encode(f"store={store}\n{LOOK}"))


def tell_all(process: subprocess.Popen[bytes], data: bytes) -> None:
    """Have a program read that and nothing more."""
    if process.stdin:
        with suppress(BrokenPipeError):  # it has ended
            process.stdin.write(data)
        process.stdin.close()


# Of a program that goes on when we end.
APART: dict[str, Any] = {"start_new_session": True, "preexec_fn": end_in_time}


# Runs on the builder, on the standard input of its sh; a login that allows nothing but
# nix-store says nothing of all this.  What it builds are the children of Nix's programs;
# they are ours if they come from our connection, or from the address that it comes from,
# which a session, and through it nix-daemon's process for that, has in its environment.
# If `df` hangs, as on a dead network file system, that must not keep the connection: so it
# ends itself after a while.
LOOK = """\
exec 2> /dev/null
trap '' PIPE
(trap 'kill $!; exit' TERM; sleep 20 & wait $! && kill -9 $$) < /dev/null > /dev/null &
guard=$!
echo "disk $(df -Pk "${store:-${NIX_STORE_DIR:-/nix/store}}" | awk 'END { print $(NF-4), $(NF-2) }')"
echo "cores $(getconf _NPROCESSORS_ONLN || sysctl -n hw.ncpu)"
echo "load $(uptime | sed 's/.*: *//; s/,.*//')"
echo "memory $(sed -n 's/^some avg10=\\([0-9.]*\\).*/\\1/p' /proc/pressure/memory)"
[ -e NO_BUILDS ] && echo "closed $(head -c 300 NO_BUILDS | tr '\\n' ' ')"
ours=$(grep -lsF "SSH_CONNECTION=${SSH_CONNECTION%% *} " /proc/[0-9]*/environ | tr -dc '0-9\\n')
[ "$ours" ] && ps -A -o pid= -o ppid= -o args= | awk -v "ours=$PPID $(echo $ours)" '
BEGIN { split(ours, list); for (i in list) own[list[i]] }
{ up[$1] = $2; peer[$1] = $4; sub(".*/", "", $3); name[$1] = /build[-_]remote|<defunct>/ ? "nix" : $3 }
END { for (p in up) if (name[up[p]] ~ /^nix-(store|daemon|build)$/ && name[p] !~ /^(nix|ssh)/) {
        n = up[p]; if (name[n] == "nix-daemon" && peer[n] != "--stdio") n = peer[n]
        if (n in up) { while (n > 0 && n in up && !(n in own)) n = up[n]; others += !(n in own) } }
    print "builds", others + 0 }'
kill $guard
echo end
""".replace("NO_BUILDS", CLOSED)


# ---- Copying ------------------------------------------------------------------------

LONGER = "size mismatch importing what the builder has"
TOLD = ("copying ", "warning: deprecated")  # by us; by the calling Nix, once
JOINED = (8, 9)  # sh knows only descriptors of one digit
F_SETPIPE_SZ = 1031  # of Linux; fcntl has it from Python 3.10 on


def keep_free(numbers: tuple[int, ...]) -> None:
    """Have nothing of ours on these descriptors, and let nothing come there."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in set(numbers) - {null}:
        os.dup2(null, number, inheritable=False)
    if null not in numbers:
        os.close(null)


class CopyEnded(Exception):
    """The program that copies asks and reads no more."""


class Relay:
    """A program that copies, and what stands between it and our session with the builder.

    Everything is moved through here, so that we know how much, and what nix-copy-closure
    --from learns of: only of the outputs that are wanted.  It would bring in, and
    register as root and unchecked, whatever else a builder says that they refer to.
    """

    def __init__(self, session: Session, direction: str, here: str) -> None:
        self.session, self.here = session, here
        self.direction = direction  # "to" the builder, or "from" it
        self.programs, self.name = session.seat.ssh.programs, ""  # of the program
        self.talk = self.programs.talk
        self.problem = ""  # what the program says from its first error on
        # What the builder has, lacks, and has to offer, of all that is copied.
        self.there, self.lacking = set[str](), set[str]()
        self.infos: Infos = {}
        self.rest = b""  # of its stderr: the begun line
        self.ended = False  # its stderr has
        self.is_open = True  # until we hang up
        self.ahead: dict[str, bytes] = {}  # archives that were fetched already
        self.quiet: list[int] = []  # where nothing may be said while the program asks

    def start(self, command: list[str], environ: dict[str, str]) -> None:
        """Start the program: it, or the stand-in as its ssh, reads our input and writes our
        output."""
        self.name, session = os.path.basename(command[0]), self.session
        reads, self.input = os.pipe()
        self.output, writes = os.pipe()
        os.set_blocking(self.input, False)
        for pipe in filter(None, (session.stdin, session.stdout, reads, writes)):
            with suppress(OSError):  # more than the user may have, or not Linux
                fcntl.fcntl(pipe, F_SETPIPE_SZ, MOVE_BYTES)
        for number, end in zip(JOINED, (reads, writes)):
            os.dup2(end, number, inheritable=False)
        given: dict[str, Any] = {"stdin": reads, "pass_fds": JOINED}
        try:
            self.process = self.programs.start(command, environ, "stderr", **given)
        finally:
            os.close(reads)
            os.close(writes)
            keep_free(JOINED)
        self.stderr = self.process.stderr.fileno() if self.process.stderr else MESSAGES

    def hang_up(self) -> None:
        """Let it hear the end, and say no more to us."""
        if self.is_open:
            self.is_open = False
            os.close(self.input)
            os.close(self.output)

    def end(self) -> None:
        """End it, if it has not ended; it gets a moment to take its folder in /tmp away."""
        self.hang_up()
        status_within(self.process, FAREWELL_S)
        end(self.process)

    def run(self, count: int, join: Callable[..., None], *given: Any) -> str:
        """Have it copy so many paths; returns what is wrong, or ""."""
        self.talk.begin(1, f"copying {count} paths", size=count)
        try:
            with suppress(CopyEnded):
                join(*given)
            self.finish()
            status = self.process.wait()
        finally:
            self.end()
            self.talk.end(1)
        if status == 0:
            return ""
        if status < 0:  # the session is in the middle of it
            raise SessionLost(f"{self.name} was killed by signal {-status}")
        words = self.words().removeprefix("error: ")
        return f"{words or 'it gave no reason'} ({self.name}, status {status})"

    def words(self) -> str:
        """What is wrong in the words of the program, if it has said so."""
        return " ".join(self.problem.split())

    def finish(self) -> None:
        """Wait for the end of the program."""
        with suppress(CopyEnded):
            self.step([])

    def begin(self, path: str, size: int) -> None:
        """Tell that a path is copied now, whose archive has that size."""
        machine = self.session.seat.ssh.machine.name
        line = f"copying path '{path}' {self.direction} '{machine}'"
        ends = (self.here, machine) if self.direction == "to" else (machine, self.here)
        if self.talk.old:
            self.talk.say(INFO, line)
        self.talk.begin(2, line, path, *ends, size=size)

    def tell(self, data: bytes) -> None:
        """Pass a line of the program's stderr on to Nix."""
        line = printable(decode(data))  # Lix may be told to colour
        wrong = line.startswith("error:") and "(ignored)" not in line
        is_told = line.startswith(TOLD) and " missing paths " not in line  # Nix 1.x
        if self.problem or wrong:  # it goes into our own message
            self.problem = f"{self.problem} {line}"[:TAIL_BYTES]
        elif line and not is_told:
            self.talk.say(INFO, line)

    def step(
        self, sources: list[int], full: Iterable[int] = (), most_s: float = math.inf
    ) -> set[int]:
        """Wait for one of these, and pass on what is said on both stderrs meanwhile.
        Raises CopyEnded when the program's own has ended."""
        patience_s = min(COPY_TIMEOUT_S, most_s)
        while True:
            if self.ended:
                raise CopyEnded
            logs = [] if self.session.stderr is None else [self.session.stderr]
            heard_from = [self.stderr, *logs, *sources]
            still_s = min(STILL_S, patience_s)
            ready = wait_readable(heard_from, still_s, full)
            if not ready and still_s < patience_s:
                self.tell(f"no progress of copying for {still_s} s".encode())
                ready = wait_readable(heard_from, patience_s - still_s, full)
            if not ready:
                raise SessionLost(f"no progress of copying in {patience_s} s")
            self.session.pump(ready.intersection(logs))
            if self.stderr in ready:
                self.relay_stderr()
            if found := ready.intersection([*sources, *full]):
                return found

    def relay_stderr(self) -> None:
        """Pass on the lines of the program's stderr."""
        data = os.read(self.stderr, 65536)
        self.ended = not data
        lines = (self.rest[:65536] + data).split(b"\n")
        self.rest = lines.pop() if data else b""
        for line in lines:
            self.tell(line)

    # What the program says and hears

    def some(self, limit: int) -> bytes:
        """Some of what it says, so much at most; CopyEnded at its end."""
        while self.session.stdout in self.step([self.output, *self.quiet]):
            self.quiet = []
            # It ends, as it was told, or its archive is longer than announced.
            if os.read(self.session.stdout, TAIL_BYTES):
                raise Spoilt(LONGER)
        if data := os.read(self.output, limit):
            return data
        raise CopyEnded

    def read(self, count: int) -> bytes:
        """Exactly so much of what it says."""
        data = b""
        while len(data) < count:
            data += self.some(count - len(data))
        return data

    def expect_silence(self) -> None:
        """Let nothing more be said: it would mean that an archive is longer than announced."""
        self.quiet = [self.session.stdout]
        if self.session.inbox:
            raise Spoilt(LONGER)

    def reply(self, data: bytes) -> None:
        """Say that to the program; CopyEnded if it hears nothing any more."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self.input, view) :]
            except BlockingIOError:
                self.step([], [self.input])
            except BrokenPipeError:
                raise CopyEnded from None

    def take(self, limit: int, most_s: float = math.inf) -> bytes:
        """Some of what the builder says next, as it is; SessionLost at the end."""
        session = self.session
        if session.inbox:
            return session.from_inbox(limit)
        self.step([session.stdout], most_s=most_s)
        if data := os.read(session.stdout, limit):
            return data
        raise session.lost()

    def pass_on(self, count: int, see: Callable[[bytes], None] | None = None) -> bytes:
        """Pass on so much of what the builder says, and show it to see; returns its tail."""
        kept = b""
        while count:
            # It is sending, and has nothing to wait for.
            data = self.take(min(count, MOVE_BYTES), STALLED_S)
            self.reply(data)
            if see:
                see(data)
            count -= len(data)
            kept = (kept + data[-TAIL_BYTES:])[-TAIL_BYTES:]
            self.count(data)
        return kept

    def count(self, data: bytes) -> None:
        """Take note of bytes that were moved."""
        self.talk.progress(len(data))
        if len(data) >= BULK_BYTES:  # let more pile up, to move it at once
            time.sleep(BULK_PAUSE_S)

    def serve(self) -> None:
        """Be the builder to nix-copy-closure, until that ends."""
        while True:
            self.answer(read_integer(self.read))

    def answer(self, command: int) -> None:
        """Answer one command; what we do not know, the builder is asked."""
        if command == SERVE_HELLO:  # which may come again after an error of its own
            self.read(8)  # its version
            # 2.32 and newer speak to no builder before 2.1, whose dialect we can translate.
            version = max(self.session.version, ARCHIVES_SINCE)
            self.reply(integer(SERVE_REPLY) + integer(version))
        elif command == QUERY_VALID_PATHS:
            flags, asked = self.read(16), set(read_strings(self.read))
            if not asked <= self.there | self.lacking:
                read = self.ask(integer(command) + flags + strings(sorted(asked)))
                self.there |= set(read_strings(read))
            self.reply(strings(sorted(asked & self.there)))
        elif command == QUERY_PATH_INFOS:  # also of each path that it is about to send
            asked = set(read_strings(self.read))
            infos = (self.infos[path].encode() for path in asked & self.infos.keys())
            self.reply(b"".join(infos) + string(""))
        elif command == QUERY_CLOSURE:  # in that of what it is offered is nothing else
            self.read(8)  # whether outputs of derivations are meant, too
            self.reply(strings(p for p in read_strings(self.read) if p in self.infos))
        elif command == DUMP_STORE_PATH:
            self.give_archive(read_string(self.read))
        elif command == ADD_TO_STORE_NAR:
            self.take_archive()
        elif self.direction == "to":  # such as ImportPaths, of Nix 1.x
            self.ask(integer(command))
            self.exchange()
        else:
            raise Error(f"nix-copy-closure asks for something unknown ({command})")

    # Sending

    def send(self, there: set[str], lacking: set[str]) -> None:
        """Be the builder that it copies to, and let nothing wait for a round trip: we know
        which paths are there, as far as these say, and hear of what is copied when all is
        sent.  If the session ends, it hears that its ssh has ended, and fails."""
        self.there, self.lacking = there, lacking
        try:
            self.serve()
        except SessionLost:
            self.hang_up()
            self.finish()
            raise

    def exchange(self) -> None:
        """Move all the rest as it is, both ways, until the program ends."""
        while True:
            ready = self.step([self.output, self.session.stdout])
            if self.output in ready:
                self.send_on(self.some(MOVE_BYTES))
            if self.session.stdout in ready or self.session.inbox:
                self.reply(self.take(MOVE_BYTES))

    def send_on(self, data: bytes) -> int:
        """Send that to the builder; returns how much it is."""
        self.session.write(data)
        self.count(data)
        return len(data)

    def take_archive(self) -> None:
        """Pass on a path: its name, deriver, hash, references, time, size, whether it was
        built here, signatures and content address; and its archive, of that size."""
        path = read_string(self.read)
        self.there.add(path)
        deriver = string(read_string(self.read))
        digest = string(read_string(self.read))
        references, when = strings(read_strings(self.read)), self.read(8)
        size = read_integer(self.read)
        self.begin(path, size)
        tail = self.read(8) + strings(read_strings(self.read))
        tail += string(read_string(self.read))
        head = integer(ADD_TO_STORE_NAR) + string(path) + deriver + digest
        head, tail = head + references + when + integer(size) + tail, b""
        if self.session.version < ARCHIVES_SINCE:  # as nix-store --export has it
            head = integer(IMPORT_PATHS) + integer(1)
            tail = integer(EXPORT_MAGIC) + string(path) + references + deriver
            tail += integer(0) + integer(0)  # without a signature; no more paths
        self.session.write(head)
        while size:
            size -= self.send_on(self.some(min(size, MOVE_BYTES)))
        self.session.write(tail)
        Answer(self.session, self.hear_of_copy, COPY_TIMEOUT_S)
        self.reply(integer(1))

    def hear_of_copy(self, deadline: float) -> None:
        """Hear whether what was copied is there: the builder says 1, or its end."""
        if read_integer(self.session.reader(deadline)) != 1:
            raise Nonsense("it does not say that it has what was copied")

    def ask(self, question: bytes) -> Read:
        """Ask the builder when it owes no answer; returns what reads this one."""
        while self.session.awaited:
            self.session.awaited[0].get()
        self.session.write(question)
        return self.session.reader(time.monotonic() + COPY_TIMEOUT_S)

    # Fetching with nix-copy-closure --from

    def offer(self, infos: Infos) -> None:
        """Be a builder that has these."""
        self.infos, sizes = infos, [info.size for info in infos.values()]
        if len(sizes) > 1 and sum(sizes) <= AHEAD_BYTES:
            for path in infos:
                self.ask_for_archive(path)
            read = self.session.reader(time.monotonic() + COPY_TIMEOUT_S)
            self.ahead = {path: read(info.size) for path, info in infos.items()}
        if not self.session.activities.absent:
            self.expect_silence()
        self.serve()

    def give_archive(self, path: str) -> None:
        """Give it the archive of a path."""
        if path not in self.infos:
            raise Error(f"nix-copy-closure asks for {path}, which nobody wanted")
        size = self.infos[path].size
        self.begin(path, size)
        if path in self.ahead:
            self.reply(self.ahead.pop(path))
            self.talk.progress(size)
        else:
            self.ask_for_archive(path)
            self.pass_on(size)
            self.expect_silence()

    def ask_for_archive(self, path: str) -> None:
        """Ask for an archive, unless that was done with the build; after the last, no more."""
        session = self.session
        if path not in session.activities.absent:
            session.write(dump_question(path))
        session.unasked -= 1
        if not session.unasked:
            session.ask_no_more()

    # Fetching with nix-store --import

    def export(self, infos: Infos) -> None:
        """Write these as nix-store --export would, each behind those it refers to."""
        for info in infos.values():
            self.ask_for_archive(info.path)
            self.begin(info.path, info.size)
            self.reply(integer(1))
            (kind, _, told), found = info.hash.partition(":"), self.pass_archive()
            # Old builders tell none.
            if kind == "sha256" and told not in (found.hex(), base32(found)):
                raise Spoilt(f"hash mismatch importing '{info.path}'")
            names = string(info.path) + strings(info.references)
            self.reply(integer(EXPORT_MAGIC) + names)
            self.reply(string(info.deriver) + integer(0))
        self.reply(integer(0))

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
                depth += 1 if word == b"(" else -1 if word == b")" else 0
        return digest.digest()


class Copier:
    """The programs of the calling Nix that copy, and one builder."""

    def __init__(self, site: Site, session: Session, locks: OutputLocks) -> None:
        self.site, self.nix, self.session, self.locks = site, site.nix, session, locks
        self.programs, self.program = site.programs, site.copy_program
        self.early: Relay | None = None  # will fetch, when the outputs are built
        ssh = session.seat.ssh
        self.environ = {**self.nix.store_environ(), "PATH": ssh.environ["PATH"]}
        # Any name would do that leads nowhere, but some versions do not call ssh for localhost,
        # and they want IPv6 bare (2.3) or in brackets (2.34); 1.x shows it.
        since_2 = site.copy_version >= (2,)
        self.target = "builder.invalid" if since_2 else ssh.machine.destination
        # To fetch, 1.x has a Perl script of other ways; and 2.4 and newer want to know the
        # hashes, which builders before 2.0 do not tell: nix-store --import does that.
        self.fetches_joined = since_2 and session.version >= JOINED_SINCE

    def start(self, direction: str, command: list[str], **more: str) -> Relay:
        """Start a program that copies "to" or "from" the builder."""
        relay = Relay(self.session, direction, self.nix.store.remote or "local")
        # Somebody may have removed it: a real ssh must not be found in its place.
        path = f"{stand_in(self.site.directory)}:{self.environ['PATH']}"
        relay.start(command, {**self.environ, "PATH": path, **more})
        return relay

    # Sending

    def send(self, paths: set[str], there: set[str]) -> None:
        """Copy the closures of these paths to the builder, of which it has those."""
        command = [self.program, "--to", self.target, *self.nix.options()]
        there, lacking = set(there), paths - there
        for batch in batches(sorted(paths)):
            relay = self.start("to", [*command, *batch])
            try:
                problem = relay.run(len(batch), relay.send, there, lacking)
            except SessionLost as error:
                if not self.lost_session():
                    raise
                problem = relay.words() or str(error)
            if problem:
                raise self.blame_for_sending(batch, problem)

    def blame_for_sending(self, paths: Iterable[str], problem: str) -> Error:
        """The error to raise: the builder's fault, unless a path is gone or spoilt here."""
        lost = self.lost_session()
        tail = decode(self.session.tail)
        _, spoilt, words = tail.partition("hash mismatch importing")
        if spoilt:
            lost, problem = None, " ".join(f"{spoilt}{words}".split())
        # If it found them odd, or says that they are spoilt, we look.
        is_known = lost and lost.lasting is not None
        wrong = "" if is_known else self.verify(sorted(paths))
        return heard(Error, wrong) if wrong else self.lost_with(lost, problem)

    def lost_session(self) -> SessionLost | None:
        """The error that the session ended with; None if it still runs, or ended well or as planned."""
        if not status_within(self.session.process, 1):
            return None
        self.session.drain()
        return None if self.session.activities.are_over else self.session.lost()

    def lost_with(self, lost: SessionLost | None, problem: str) -> SessionLost:
        """The end of a session and what else is wrong, as one error; the end may tell better
        whether that lasts."""
        told = [str(lost), problem] if lost else [problem]
        error = heard(SessionLost, "; ".join(dict.fromkeys(told)))
        if lost and lost.lasting is not None:
            error.lasting = lost.lasting
        return error

    def verify(self, paths: list[str]) -> str:
        """What is wrong with these in the store here, or ""."""
        for batch in batches(paths):
            command = [self.site.store_program, "--verify-path", *batch]
            status, _, said = self.programs.output(command, self.environ)
            if status:
                return printable(" ".join(said.split()))[:TAIL_BYTES]
        return ""

    # Fetching

    def fetch(self, outputs: list[str], infos: Infos, inputs: list[str]) -> None:
        """Bring exactly these outputs, of which the builder says that, into the store here,
        past the locks that Nix holds on them; Spoilt if one of them may not come in."""
        self.check(outputs, inputs, infos)
        if self.site.copy_version >= (2, 29):
            self.locks.retire(outputs)
        self.session.unasked = len(infos)
        for batch in batches(in_order(infos)):
            self.fetch_some({path: infos[path] for path in batch})

    def fetch_some(self, infos: Infos) -> None:
        """Bring these, each behind those it refers to."""
        relay = self.early
        if not relay or relay.process.poll() is not None:
            relay = self.start_to_fetch([*infos])
        give = relay.offer if self.fetches_joined else relay.export
        if problem := relay.run(len(infos), give, infos):
            # As the outputs could be built, it mostly is the fault of our store.
            if lost := self.lost_session():
                raise self.lost_with(lost, problem)
            if means(problem, "CUT"):  # as when a cat of ours is killed
                raise SessionLost(problem)
            raise Spoilt(problem) if means(problem, "SPOILT") else Error(problem)

    def start_to_fetch(self, paths: list[str]) -> Relay:
        """Start the program that is to bring these."""
        options, locks = self.nix.options(), dict[str, str]()
        command = [self.site.store_program, "--import", *options]
        if self.fetches_joined:
            command = [self.program, "--from", self.target, *options, *paths]
        if self.site.copy_version < (2, 29):
            held = " ".join(path for path in paths if path in self.locks.outputs)
            locks = {"NIX_HELD_LOCKS": held} if held else {}
        return self.start("from", command, **locks)

    def register(
        self, path: str, derivation: Derivation, outputs: dict[str, str]
    ) -> None:
        """Tell the store here where the outputs of a floating derivation are, which are
        valid: nix copy does, from a binary cache that has nothing but what we say."""
        import shutil

        parent, us = spare_directory(), os.getpid()  # the slots' disk may be full
        head = f"cache-{checksum(process_space())}"
        for name in os.listdir(parent):
            mark, pid, start = (name.split(".") + [""] * 3)[:3]
            if mark == head and not is_alive(pid, start):  # who made it was killed
                shutil.rmtree(f"{parent}/{name}", ignore_errors=True)
        folder = f"{parent}/{head}.{us}.{start_time(us)}"
        command = [f"{os.path.dirname(self.program)}/nix", "copy", *self.nix.options()]
        command += ["--extra-experimental-features", "nix-command ca-derivations"]
        command += ["--no-recursive", "--no-check-sigs", "--from", f"file://{folder}"]
        command.append(f"{path}^*" if self.site.copy_version >= (2, 13) else path)
        try:
            for name, text in cache_files(path, derivation, outputs).items():
                os.makedirs(os.path.dirname(f"{folder}/{name}"), 0o700, exist_ok=True)
                write_private(f"{folder}/{name}", text, durable=False)
            status, _, said = self.programs.output(command, self.environ)
        except OSError as error:
            raise Error(f"cannot write {folder}: {error.strerror}") from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if status:
            raise Error(f"the store here does not take its outputs: {printable(said)}")

    def prepare_to_fetch(self, outputs: list[str]) -> None:
        """Start it while they are built, if one can bring all: to start takes 20 ms."""
        if not self.early and list(batches(outputs)) == [outputs]:
            self.early = self.start_to_fetch(outputs)

    def end(self) -> None:
        """Forget what was to be fetched."""
        if self.early:
            self.early.end()

    def check(self, outputs: list[str], inputs: list[str], infos: Infos) -> None:
        """Make sure that every output is there, and that what it refers to is another of
        them, an input, or otherwise valid here already; no other path will come in."""
        for output in outputs:
            if output not in infos:
                raise Spoilt(f"it says that '{output}' was built, but does not have it")
        if not infos.keys() <= {*outputs}:
            raise Nonsense("it answers of paths that it was not asked for")
        strange = {r for info in infos.values() for r in info.references}
        invalid = self.invalid_here(sorted(strange.difference(outputs, inputs)))
        for output, info in infos.items():
            if info.deriver and not self.nix.store.owns(info.deriver):
                raise Spoilt(f"it says that {info.deriver[:200]!r} made '{output}'")
            if found := sorted(invalid.intersection(info.references)):
                hint = "neither an output of this build nor valid here; it was refused"
                what = f"the output '{output}' refers to '{found[0]}'"
                raise Spoilt(f"{what}, which is {hint}")

    def invalid_here(self, paths: list[str]) -> set[str]:
        """Those of the paths that are not valid in the store here."""
        ours = [path for path in paths if self.nix.store.owns(path)]
        invalid = set(paths) - set(ours)
        for batch in batches(ours):
            command = [self.site.store_program, "--check-validity", "--print-invalid"]
            status, said, _ = self.programs.output([*command, *batch], self.environ)
            if status != 0:
                text = "the store here does not say whether it has what an output refers to"
                raise Error(text)
            invalid.update(said.split())
        return invalid


def cache_files(
    path: str, derivation: Derivation, outputs: dict[str, str]
) -> dict[str, str]:
    """The files of a binary cache that tells where the outputs of that derivation are."""
    words = ("nix-archive-1", "(", "type", "regular", "contents", derivation.text, ")")
    archive = b"".join(map(string, words))
    found = sha256_of(text_of(archive)).hex()
    head = f"Compression: none\nNarHash: sha256:{found}\n"
    head += f"NarSize: {len(archive)}\nReferences: \nURL: archive\nStorePath: "
    files = {f"{digest(p)}.narinfo": f"{head}{p}\n" for p in (path, *outputs.values())}
    files["archive"] = text_of(archive)
    files["nix-cache-info"] = f"StoreDir: {path.rpartition('/')[0]}\n"
    for name, identity in derivation.realisations().items():
        text = f'{{"id":"{identity}","outPath":"{os.path.basename(outputs[name])}"}}'
        since_2_35 = f"build-trace-v2/{os.path.basename(path)}/{name}.doi"
        files[f"realisations/{identity}.doi"] = files[since_2_35] = text
    return files


def in_order(infos: Infos) -> list[str]:
    """The paths, each behind those of the others that it refers to."""
    order: list[str] = []
    while left := infos.keys() - order:
        free = [p for p in left if left.isdisjoint({*infos[p].references} - {p})]
        if not free:
            raise Spoilt("its outputs refer to each other in a circle")
        order += sorted(free)
    return order


def batches(paths: list[str]) -> Iterator[list[str]]:
    """Cut into lists that fit on a command line."""
    size = COPY_BATCH_BYTES // (1 + max(map(len, paths), default=0)) or 1
    for start in range(0, len(paths), size):
        yield paths[start : start + size]


class OutputLocks:
    """The locks on the outputs, which the Nix that started us holds while we run.

    To import an output takes the same lock, up to 2.28 unless NIX_HELD_LOCKS names it.  From
    2.29 we retire it as its holder may: unlink its file and then write into it, so that
    whoever gets it sees that it is stale and opens a fresh one.  That is sound only while
    the holder lives, only for the very file it held when we accepted, and only once:
    afterwards the fresh lock may be another's.
    """

    def __init__(self, store: Store, outputs: Iterable[str]) -> None:
        self.parent = os.getppid()
        self.store, self.outputs = store, frozenset(outputs)
        self.seen: dict[str, os.stat_result] = {}  # the files of those that there were
        for output in self.outputs:
            with suppress(FileNotFoundError):
                self.seen[output] = os.lstat(f"{store.file(output)}.lock")

    def retire(self, outputs: Iterable[str]) -> None:
        """Retire the locks on these, those that we have seen and not retired yet."""
        for output in outputs:
            expected = self.seen.pop(output, None)
            if os.getppid() != self.parent or nix_has_gone():
                raise NixGone
            if expected:
                self.retire_file(f"{self.store.file(output)}.lock", expected)

    def retire_file(self, path: str, expected: os.stat_result) -> None:
        """Retire one, if it is still that file."""
        flags = os.O_WRONLY | os.O_NOFOLLOW
        with suppress(FileNotFoundError), open(os.open(path, flags), "wb", 0) as file:
            if os.path.samestat(os.fstat(file.fileno()), expected):
                os.unlink(path)
                file.write(b"d")


class UploadLock:
    """The right to send some paths to a machine, when nobody else sends any of them.

    So all hooks do not send the same, and a small build waits for another's gigabytes only
    if it needs those too.  There are a few of these locks, the first of which the stock hook
    knows too; their files name what is sent, or else it may be anything.
    """

    def __init__(self, slots: Slots, machine: Machine, paths: set[str]) -> None:
        name = f"{machine.upload_prefix}.upload-lock"
        own = (f"{slots.own}/{name}.{number}" for number in range(1, SENDERS))
        self.files = [f"{slots.path}/{name}", *own]
        self.slots = slots
        self.digests = set(map(digest, paths))
        self.lock: Lock | None = None  # ours, if we have one

    def __enter__(self) -> bool:
        """Whether we had to wait, and others may have sent what we were to send."""
        waited, deadline = False, time.monotonic() + UPLOAD_LOCK_TIMEOUT_S
        with suppress(Error):  # no room for the locks' files: go on without the right
            while rival := self.take_or_rival():
                waited = True
                with rival:
                    in_time = rival.wait(deadline - time.monotonic(), fcntl.LOCK_SH)
                if not in_time:
                    break
        return waited

    def take_or_rival(self) -> Lock | None:
        """Take one of the locks; or, if that has to wait, return the one to wait for."""
        with self.slots.main_lock():
            rivals = [f for f in self.files if self.overlaps(Lock.said_by_holder(f))]
            self.lock = None if rivals else Lock.take(*self.files)
            if self.lock:
                self.lock.write(" ".join(self.digests))
                return None
        return Lock([*rivals, *self.files][0])

    def overlaps(self, said: str | None) -> bool:
        """Whether something of ours may be sent by who says that in a lock's file, if anybody
        holds it."""
        return said == "" or not self.digests.isdisjoint((said or "").split())

    def __exit__(self, *error: object) -> None:
        if self.lock:
            self.lock.write("")
            self.lock.release()


# ---- One build ----------------------------------------------------------------------


def open_session(site: Site, seat: Seat, path: str, patience_s: float) -> Session:
    """A session to build that derivation in, which it is asked for; if the connection
    is proved, that is not answered yet, so that the next question can go along.
    Raises Unreachable, if there is another way only after that has failed, too."""
    deadline = time.monotonic() + patience_s
    seat.connection.connect(min(LOGIN_TIMEOUT_S, patience_s))
    try:
        return open_in_one_way(site, seat, path, deadline)
    except SessionLost as error:
        failure = error
    if isinstance(failure, Refused) and seat.other_way():
        try:
            return open_in_one_way(site, seat, path, deadline)
        except SessionLost as error:
            if failure.meaning == "DAEMON":  # it is nix-daemon, and what it says counts
                seat.keep_way()
                failure = error
            else:
                seat.other_way()
    raise failure.become(Unreachable)


def open_in_one_way(site: Site, seat: Seat, path: str, deadline: float) -> Session:
    """A session as open_session has it, in the way that the seat takes; raises SessionLost, too."""
    session, left = Session(seat), max(1.0, deadline - time.monotonic())
    try:
        answer = session.ask_valid([path])
        job, soon = seat.way.is_job, min(REPLY_S, left)
        if session.proof or (job and not wait_readable([session.stdout], soon)):
            return session
        prove(site, session, answer, min(GREETING_TIMEOUT_S, left))
        return session
    except BaseException as error:
        session.cancel()
        refused = isinstance(error, SessionLost) and session.tells
        if refused and seat.is_plain:  # it may be refused that
            return open_in_one_way(site, seat, path, deadline)
        raise


def prove(
    site: Site, session: Session, answer: Answer, within_s: float = math.inf
) -> None:
    """Hear the first answer, which says whether the derivation is there, and note what has
    led to the session; raises SameStore, too."""
    if answer.get(within_s):
        make_sure_of_another_store(site, session)
    session.seat.prove(session.version)


def make_sure_of_another_store(site: Site, session: Session) -> None:
    """Raise SameStore if the builder's store is the one here: Nix's own lock on the output
    would keep the build waiting for ever.  We ask for something that is in the store here
    for just as long, so that nobody can have put it there."""

    def run_here(*arguments: str) -> str:
        command, environ = [site.store_program, *arguments], site.nix.store_environ()
        return site.programs.output(command, environ, REPLY_S)[1].strip()

    content = f"{site.slots.own}/{os.urandom(8).hex()}-mark"
    note(content, os.urandom(16).hex())
    mark, same = run_here("--add", content), None
    try:
        same = session.ask_valid([mark]).get(REPLY_S) if mark else None
    finally:
        with suppress(OSError):
            remove(content)
        if mark:
            run_here("--delete", mark)
    if same:
        raise SameStore("it is this very machine; builds would wait for ever")


class Retry(NamedTuple):
    """Where a build goes on after a failure."""

    need: Need
    pause_s: float  # to wait before
    outage: bool  # all hooks are to leave the failed machine alone
    renew: bool  # its connection may be the trouble, and should be a new one


class Retries:
    """Says where a build goes on after each failure, or that it does not.

    If a session was lost: first on the same machine, whose connection may have been an
    old one, and which may have the outputs already.  If it has not, another that is free
    comes first: the lost session may live on there, and hold locks.  After that, and if it
    could not do the build, on any other; if all have failed, on any, after a pause.
    """

    def __init__(self, need: Need) -> None:
        self.need, self.fit = need, need.machines
        self.avoided: set[Machine] = set()  # which have failed since the last pause
        self.pause_s = float(PAUSE_S)  # the next one
        self.verdict: Error | None = None  # to end with, if no other machine may try
        self.may_pass = False  # whether one of those failed for what may pass
        self.losses = 0  # of sessions, in a build or not for the network's sake
        # How long we have tried and paused since the first failure, or since a build last
        # began; to wait for a slot while others are well is not counted.
        self.tried_s: float | None = None

    def after(
        self, error: Error, machine: Machine, *, phase: str, took: float
    ) -> Retry:
        """The next turn, when that has ended an attempt in one of PHASES, which took so many
        seconds; raises the error to end with if there is none."""
        again = machine in self.avoided
        if isinstance(error, Away) and self.verdict:
            raise self.verdict
        if isinstance(error, NotHere):
            self.verdict = self.verdict_of(error, machine)
        self.count(error, phase in ("building", "fetching"), took)
        self.avoided.add(machine)
        pause_s, machines = 0.0, [m for m in self.fit if m not in self.avoided]
        once_more = isinstance(error, SessionLost) and not again
        once_more = once_more and not isinstance(error, Stuck)
        shunned = machine if phase in ("sending", "building") else None
        if once_more:
            machines = [*machines, machine] if shunned else [machine]
        elif not machines:
            pause_s, machines = self.start_over(error), self.fit
        unknown = phase == "connecting" and not isinstance(error, Away)
        outage = isinstance(error, Unreachable) or (unknown and again)
        impatient = once_more or self.verdict is not None
        need = self.need._replace(machines=machines, shunned=shunned)
        need = need._replace(impatient=impatient)
        return Retry(need, pause_s, outage, renew=outage or unknown)

    def verdict_of(self, error: NotHere, machine: Machine) -> Error:
        """What to end with if no other can do it; raises that if none is left.  One other
        may try; if the disk is full, each."""
        is_full = error.meaning == "FULL"
        tried = self.avoided if is_full else set()
        others = {*self.fit} - {machine} - tried
        if not others or (self.verdict and not is_full):
            raise error.verdict
        return error.verdict

    def count(self, error: Error, begun: bool, took: float) -> None:
        """Take note of a failure, of a build that has begun or not; raises it if there have
        been too many."""
        # What is in a log may be anything, so that of a running build says nothing.
        self.may_pass |= error.lasting is not True or begun
        blamed = begun or error.lasting is not False
        lost = isinstance(error, SessionLost) and not isinstance(error, Stuck)
        self.losses += 1 if lost and blamed else 0
        is_first = self.tried_s is None or begun
        self.tried_s = 0.0 if is_first else (self.tried_s or 0.0) + took
        if self.losses > LOSSES or self.tried_s > AWAY_TIMEOUT_S:
            raise error

    def start_over(self, error: Error) -> float:
        """How long to wait before all are tried again; raises the error if in vain."""
        if not self.may_pass:
            raise error
        self.may_pass = False
        self.avoided.clear()
        pause_s, self.pause_s = self.pause_s, min(2 * self.pause_s, PAUSE_LIMIT_S)
        self.tried_s = (self.tried_s or 0.0) + pause_s
        return pause_s


UNTRUSTED_USER = "does not trust its user"  # which check looks for in what a build says


class Attempt:
    """One try of a build on the machine of a slot, from connecting to the outputs."""

    def __init__(self, build: Build, slot: Slot) -> None:
        self.site, self.slot, self.machine = build.site, slot, slot.machine
        self.nix, self.talk = self.site.nix, self.site.talk
        self.start = time.monotonic()
        self.path, self.derivation = build.path, build.derivation
        self.inputs, self.outputs, self.locks = build.inputs, build.outputs, build.locks
        self.has_alternatives = len(build.fit) > 1  # whether another machine might do
        self.substitute = build.may_substitute
        self.doing = f"build '{self.path}'"  # for messages
        self.trusted = True  # whether we may build a bare derivation, as far as we know
        # What becomes of the build, and what the builder says of the outputs, once asked.
        self.asked: list[Answer] = []
        self.phase = "connecting"  # one of PHASES
        self.paths: dict[str, str] = {}  # of a floating derivation's outputs, by name

    def perform(self, session: Session | None) -> None:
        """Do all of it; session: one that was opened for it already."""
        self.begin("connecting", "connect for", "to")
        patience_s = LOGIN_TIMEOUT_S + GREETING_TIMEOUT_S
        seat = self.site.seat(self.machine)
        seat.has_alternatives = self.has_alternatives
        self.session = session or open_session(self.site, seat, self.path, patience_s)
        self.trusted = not self.session.proof or self.session.proof.trusted
        self.copier = Copier(self.site, self.session, self.locks)
        try:
            there = self.ask_for_inputs()
            self.site.outages.end(self.machine)
            self.trace("build-remote")
            infos = self.build(there)
            self.begin("fetching", "fetch the outputs of", "from")
            self.leave_slot()
            self.fetch(infos)
            self.session.finish()
        except SessionLost as error:
            if self.session.process.returncode == 1:  # as if a substituter is away
                self.substitute = False
            if error.meaning != "READONLY" or not self.session.is_silent:
                raise
            self.phase = "sending"
            raise error.become(Unreachable) from None
        finally:
            self.copier.end()
            self.session.cancel()

    def begin(self, phase: str, verb: str, preposition: str) -> None:
        """Tell everybody what we do now."""
        path, name, what = self.path, self.machine.name, phase + verb.lstrip(LETTERS)
        self.phase, self.doing = phase, f"{verb} '{path}' {preposition} '{name}'"
        self.slot.note(phase, path)
        text = f"{what} '{path}' {preposition} '{name}'"
        self.talk.begin(0, f"{what} {short(path)} {preposition} {name}")
        self.talk.tally.begin(phase)
        self.talk.say(DEBUG, text)
        if self.nix.old and phase != "connecting":
            self.talk.say(INFO, text)

    def trace(self, event: str) -> None:
        """A line for the programs that Nix 1.x is to write these for."""
        if self.nix.number("print-build-trace"):
            self.talk.write(f"@ {event} {self.path} {self.machine.name}")

    def failed(self, error: Error) -> str:
        """What people are told of that error."""
        return f"cannot {self.doing}: {error.told(self.machine.names)}"

    def ask_for_inputs(self) -> set[str]:
        """Ask which inputs are there, which also keeps them there.  If the machine is known
        to have had them all, it is asked to build at once, too."""
        session, digests = self.session, self.derivation.digests()
        if not (session.is_useful or session.proof):  # a job that had to wait
            prove(self.site, session, session.awaited[1])
        # The answer takes one round trip, whose time is taken below.
        empty = session.ask_valid([]) if session.is_useful else None
        answer = session.ask_valid(self.inputs, self.substitute)
        if self.is_bare and digests <= {*self.site.slots.digests(self.machine)}:
            self.ask_to_build()
        self.site.outages.look_again(self.machine)
        if empty:
            begin = time.monotonic()
            empty.get()
            session.seat.connection.change(is_far=time.monotonic() - begin > FAR_S)
        return set(answer.get())

    @property
    def is_bare(self) -> bool:
        """Whether the derivation goes along with the question to build, as builders from 1.10
        on let trusted users do; else its closure must be there."""
        return self.trusted and self.session.version >= BARE_SINCE

    def build(self, there: set[str]) -> Infos:
        """Build on the builder, which has those of the inputs; returns what it says of the
        outputs."""
        while not (ended := self.try_to_build(there)):
            there = self.reconnect()
        self.trace("build-remote-done")
        status, message = ended
        if status:
            self.session.finish()
            if self.nix.enabled("keep-failed") and self.session.version >= KEPT_SINCE:
                # In the words of the stock hook, for which Nix's own tests look.
                text = "The failed build directory was kept on the remote builder"
                name = self.machine.name
                self.talk.say(WARN, f"{text} due to `--keep-failed`: '{name}'.")
            raise self.verdict(status, message)
        if self.derivation.is_floating:
            return self.find_outputs()
        return dict(self.asked[1].get())

    def try_to_build(self, there: set[str]) -> tuple[int, str] | None:
        """Make the builder have, and keep, what the build needs (to ask has locked what is
        there), and build; returns status and message.  None if a new session may do better:
        it was asked before it had all inputs, or does not trust us."""
        lacking, early = {*self.inputs} - there, bool(self.asked)
        self.begin("sending", "send the inputs of", "to")
        if early and lacking:  # it has lost some, but may be able to all the same
            note(self.site.slots.file(self.machine, "paths"), "")
        elif not early:
            self.send(lacking if self.is_bare else {*lacking, self.path}, there)
        self.trace("build-remote-start")
        self.begin("building", "build", "on")
        try:
            status, message = self.asked[0].get()
        except SessionLost as error:
            tail = decode(self.session.tail)
            if self.derivation.is_floating and means(tail, "LACKS"):
                raise NotHere(str(error), BuildBroken(self.failed(error))) from None
            if not (self.is_bare and refuses(tail, "LIMITED")):
                raise
            self.distrust()
            return None
        if early and lacking and status in (REJECTED, TRANSIENT, MISC, DEPENDENCY):
            return None
        return status, message

    def distrust(self) -> None:
        """Remember that the builder does not trust its user to build a bare derivation."""
        self.trusted = False
        self.session.seat.connection.change(trusted=False)
        text = f"{UNTRUSTED_USER}; sending the derivation's closure"
        self.talk.say(INFO, f"'{self.machine.name}' {text}")

    def reconnect(self) -> set[str]:
        """Have a new session in place of one that has ended, or will; returns which of the
        inputs are there, which it keeps."""
        self.begin("connecting", "connect for", "to")
        self.copier.end()
        self.session.finish()
        self.session.cancel()
        self.session, self.asked = Session(self.session.seat), []
        there = self.session.ask_valid(self.inputs, self.substitute).get()
        self.copier = Copier(self.site, self.session, self.locks)
        return set(there)

    def send(self, paths: set[str], there: set[str]) -> None:
        """Send these paths to the builder, of which it has those, and ask it to build, which
        does not wait for it to say that it has them."""
        if not paths:
            self.ask_to_build()
            return
        with UploadLock(self.site.slots, self.machine, paths) as waited:
            if waited:
                there = there | self.session.ask_valid(paths).get()
                paths = paths - there
            self.copier.send(paths, there)
            try:
                answer = self.session.ask_valid(paths)
                self.ask_to_build()
                paths = paths - answer.get()
            except SessionLost as error:  # it may refuse so late what was sent
                raise self.copier.blame_for_sending(paths, str(error)) from None
        if paths:
            raise SessionLost(f"it still lacks {min(paths)} after that was sent")

    def ask_to_build(self) -> None:
        """Ask the builder for the build, and for what the fetch will need."""
        session = self.session
        if self.derivation.is_floating and session.version < OUTPUTS_SINCE:
            why = "its Nix is too old for a content-addressed derivation"
            raise NotHere(why, BuildBroken(self.failed(Error(why))))
        encoded = self.derivation.encode(self.inputs) if self.is_bare else None
        then = self.questions_behind()
        built = session.ask_to_build(self.path, encoded, self.nix, then)
        self.asked = [built, session.infos_answer()]
        # Meanwhile, what need not wait for the build:
        session.seat.prepare()
        self.copier.prepare_to_fetch(self.outputs)
        digests = self.derivation.digests() | {digest(self.path)}
        self.site.slots.note_paths(self.machine, digests)

    def questions_behind(self) -> bytes:
        """What is asked with the build: what the outputs are, and if there is just one, and so
        just one order for them, its archive, after which nix-store shall end."""
        session, outputs = self.session, self.outputs
        questions = infos_question(outputs)
        # Nix before 2.0, and nix-daemon, begin to send an archive before they look for it;
        # and srun says that a job has ended badly.
        way = session.seat.way
        looks_first = session.version >= HASHES_SINCE and not (way.here or way.is_job)
        if len(outputs) == 1 and looks_first:
            session.activities.absent = (outputs[0], no_path(outputs[0]))
            questions += b"".join(map(dump_question, session.activities.absent))
        return questions

    def find_outputs(self) -> Infos:
        """Learn which paths the outputs of a floating derivation have got."""
        import json

        store, self.paths = self.nix.store, {}
        for output in self.derivation.outputs:
            with suppress(ValueError, TypeError, KeyError, RecursionError):
                last = json.loads(self.session.realised[output.name])["outPath"]
                if store.owns(path := f"{store.directory}/{last}"):
                    self.paths[output.name] = path
        if len(self.paths) < len(self.derivation.outputs):
            text = "it does not say which paths the outputs have"
            raise NotHere(text, BuildBroken(self.failed(Error(text))))
        self.outputs = sorted({*self.paths.values()})
        self.session.write(infos_question(self.outputs))
        return dict(self.session.infos_answer().get())

    def verdict(self, status: int, message: str) -> Error:
        """What a build that failed with that status has come to."""
        # A daemon there quotes the log, which Nix mostly has: ...; last 9 log lines: ...
        message = message[:TAIL_BYTES]
        head, quotes, _ = message.partition(" log lines:")
        if quotes and not self.session.is_silent:
            message = head.rstrip(DIGITS + " ")[: -len("last")].rstrip(" ;\n")
        if status == MISC:
            status = self.status_told(message)
        message = message or "the log says why"
        kinds = {TIMED_OUT: BuildTimedOut, MISC: BuildBroken}
        text = f"build of '{self.path}' on '{self.machine.name}' failed: {message}"
        verdict = kinds.get(status, BuildFailed)(text)
        if means(message, "LACKS"):
            message = " ".join(message.split())
            message += f"; {self.machine.where} says that it can build this"
        may_move = status in (REJECTED, TRANSIENT, MISC)
        return NotHere(message, verdict) if may_move else verdict

    def status_told(self, message: str) -> int:
        """The status that the words of a daemon there mean, which loses the number if we are
        untrusted; that of 2.3 puts some of them only into the log.  MISC if it is not known."""
        last = decode(self.session.tail).rstrip().rpartition("\n")[2]
        is_new = self.session.version >= OUTPUTS_SINCE
        words = message if is_new else f"{message} {last}"
        is_fixed = any(output.hash for output in self.derivation.outputs)
        broken = TRANSIENT if is_fixed else PERMANENT  # as BuildDerivation has it
        told = {"OVERTIME": TIMED_OUT, "BROKEN": broken, "FAILED": PERMANENT}
        return told.get(heard(Error, words, "far").meaning, MISC)

    def leave_slot(self) -> None:
        """Let the next build start while we fetch, unless as many fetch already as may
        build: else sessions would pile up on a machine that builds fast."""
        slots, machine = self.site.slots, self.machine
        files = (slots.file(machine, f"fetch-{n}") for n in range(machine.max_jobs))
        with suppress(Error):  # no room for a file
            if lock := Lock.take(*files):
                self.slot.free()
                self.slot = Slot(machine, lock)
                self.slot.note("fetching", self.path)

    def fetch(self, infos: Infos) -> None:
        """Bring the outputs in; NotHere if the builder has spoilt them."""
        try:
            if self.derivation.is_floating:
                check_addresses(infos)
            self.copier.fetch(self.outputs, infos, self.inputs)
        except Spoilt as error:
            raise NotHere(str(error), BuildBroken(self.failed(error))) from None
        if self.derivation.is_floating:
            self.copier.register(self.path, self.derivation, self.paths)


def check_addresses(infos: Infos) -> None:
    """Make sure that the outputs of a floating derivation are where what is in them belongs:
    the builder, which says where they are, could name the output of another derivation."""
    for info in infos.values():
        if info.path != info.addressed_path():
            address = f"content address {info.address[:200]!r} is that of another path"
            raise Spoilt(f"it says that '{info.path}' is an output, whose {address}")


class Build:
    """An accepted build: attempts, one after another, until one succeeds."""

    def __init__(
        self, site: Site, request: Request, derivation: Derivation, fit: list[Machine]
    ) -> None:
        self.site, self.talk, self.request = site, site.talk, request
        self.path, self.derivation, self.fit = request.derivation, derivation, fit
        need = Need(self.path, derivation.digests(), time.time(), fit)
        self.retries = Retries(need)
        # Where it goes on: in that slot, in a session if one is open, or else in that line.
        self.line = Line(site.outages, site.talk, need)
        self.slot: Slot | None = None
        self.session: Session | None = None
        self.inputs: list[str] = []  # the paths that are to be on the builder
        self.outputs: list[str] = []  # those that are to be here,
        self.locks = OutputLocks(site.nix.store, [])  # and the locks on them
        self.said: set[str] = set()  # what is said once for each build
        self.machine, self.attempts = "", 0  # where it is, and how many there were
        # Whether a builder may download inputs: if one has failed, it may be for that.
        self.may_substitute = site.nix.enabled("builders-use-substitutes")
        self.cause: Error | None = None  # of the error that it ends with

    def understand(self, inputs: list[str], outputs: list[str]) -> None:
        """Take the lists that follow an accept: outputs are names (2.4+) or paths."""
        by_name = {output.name: output.path for output in self.derivation.outputs}
        missing = [by_name.get(output, output) for output in outputs]
        if self.derivation.is_floating:
            inputs, missing = [*inputs, self.path], []  # all of its outputs, in the end
        for path in inputs:
            self.site.nix.store.name(path)
        if self.site.nix.old:  # which names all derivations behind it, too
            sources = self.derivation.sources
            inputs = [p for p in inputs if not p.endswith(".drv") or p in sources]
        if not set(missing) <= set(by_name.values()):
            raise Error(f"'{self.path}' has no output {', '.join(outputs)}")
        self.inputs, self.outputs = inputs, missing
        self.locks = OutputLocks(self.site.nix.store, missing)

    def perform(self) -> None:
        """Build on one machine after another, until it succeeds or fails for reasons of its own."""
        last: Attempt | None = None
        while True:
            attempt: Attempt | None = None
            try:
                slot = self.slot or self.wait()
                attempt = last = Attempt(self, slot)
                self.machine, self.attempts = slot.machine.name, self.attempts + 1
                attempt.perform(self.session)
                return
            except (Unreachable, SessionLost, NotHere, Away) as error:
                self.move(last, error)
            except Error as error:
                raise self.final(attempt, error) from None
            finally:
                if attempt:
                    attempt.slot.free()
                self.talk.end()

    def wait(self) -> Slot:
        """Wait for a slot, and say where the build goes, which Nix does not know."""
        self.talk.tally.begin("waiting")
        self.talk.begin(0, f"waiting for a builder for {short(self.path)}")
        if self.site.nix.old:
            self.talk.say(INFO, f"waiting for a builder for '{self.path}'")
        start = time.monotonic()
        slot = self.line.wait()
        waited = "has waited, and " if time.monotonic() > start + PATIENCE_S else ""
        self.say_once(INFO, f"'{self.path}' {waited}goes to '{slot.machine.name}'")
        return slot

    def say_once(self, level: int, text: str) -> None:
        """Say it, but not again for each attempt."""
        if text not in self.said:
            self.said.add(text)
            self.talk.say(level, text)

    def move(self, attempt: Attempt | None, error: Error) -> None:
        """Stand in line for the next attempt."""
        if not attempt:
            raise self.final(attempt, error)
        attempt.slot.free()
        self.may_substitute = attempt.substitute
        machine, took = attempt.machine, time.monotonic() - attempt.start
        took = 0.0 if isinstance(error, Away) else took
        try:
            retry = self.retries.after(error, machine, phase=attempt.phase, took=took)
        except Error as last:
            raise self.final(attempt, last) from None
        if isinstance(error, NotHere) and error.meaning == "LACKS":
            note(self.site.slots.file(machine, "lacks"), self.request.kind)
        if not isinstance(error, Away):
            self.record(error, "retried")
            self.say_once(WARN, f"{attempt.failed(error)}; trying again")
        if retry.outage:
            self.site.outages.note(machine, attempt.slot.outage, error)
        if retry.renew:
            self.site.retire(machine)
        if retry.pause_s:
            if despair := self.site.outages.despair(self.fit):
                raise self.final(attempt, despair)
            wait_readable([], retry.pause_s)
        self.slot = self.session = None
        self.line = Line(self.site.outages, self.talk, retry.need)
        self.line.join()

    def final(self, attempt: Attempt | None, error: Error) -> Error:
        """The error that the build ends with, which tells what was tried."""
        self.cause = error
        if isinstance(error, (BuildFailed, BuildTimedOut, BuildBroken)):
            return error
        if attempt:
            return Error(attempt.failed(error))
        return Error(f"cannot build '{self.path}': {error.told({})}")

    def record(self, error: BaseException | None, result: str = "") -> None:
        """Add to the history how the build has ended, None being success, or an attempt."""
        results = {type(None): "built", BuildFailed: "failed", BuildTimedOut: "timeout"}
        other = "cancelled" if isinstance(error, (Stop, EOFError)) else "error"
        words = {"derivation": self.path, "machine": self.machine, "reason": ""}
        words["result"] = result or results.get(type(error), other)
        if type(error) not in results:
            cause = self.cause or error
            word = getattr(cause, "meaning", "") or type(cause).__name__
            words["reason"] = word.lower()
        tally, self.talk.tally, self.machine = self.talk.tally, Tally(), ""
        tally.begin("waiting")
        received = tally.bytes.pop("fetching")
        line = f'{{"when":{time.time():.3f},"attempts":{self.attempts}'
        line += "".join(f',"{name}":{quoted(text)}' for name, text in words.items())
        line += "".join(f',"{phase}":{s:.3f}' for phase, s in tally.seconds.items())
        line += f',"sent":{sum(tally.bytes.values())},"received":{received}}}'
        self.site.slots.add_to_history(line)


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
        serves = "--serve" in words or "--stdio" in words
        variables = process_words(process, "environ") if serves else []
        found = [word for word in variables if word.startswith("SSH_CONNECTION=")]
        return found[0].partition("=")[2].split()[0]
    return ""


def process_words(process: int, file: str) -> list[str]:
    """What /proc says there of a process, as words that end in zeros."""
    with open(f"/proc/{process}/{file}", "rb") as stream:
        return decode(stream.read()).split("\0")


def builds_of_nix() -> int:
    """How many builds the Nix that started us does itself now; 0 if the system does not
    tell.  They are its children, as its hooks are, which are called as we are."""
    nix, count = os.getppid(), 0
    with suppress(OSError):
        with open(f"/proc/{nix}/task/{nix}/children", encoding="ascii") as file:
            children = file.read().split()
        hook = process_words(os.getpid(), "cmdline")
        for child in children:
            with suppress(OSError):  # it has just ended
                count += process_words(int(child), "cmdline") not in (hook, [""])
    return count


def addresses(host: str) -> set[str]:
    """The addresses of a host."""
    import socket

    with suppress(OSError, ValueError):
        return {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    return set()


class Hook:
    """Answers Nix's requests until it accepts one, then performs that build."""

    def __init__(self, nix: Nix, talk: Talk) -> None:
        self.nix, self.talk = nix, talk
        self.site: Site | None = None  # once there is a machine
        self.machines: list[Machine] | None = None  # once they were read
        self.origin = origin()
        self.back: dict[Machine, bool] = {}  # see leads_back
        # How many builds Nix does itself with the last that we left to it, for as long as
        # that may not have begun (monotonic time).
        self.stayed = 0.0, 0
        self.patient_from = 0.0  # monotonic time; before, nobody waits for a slot
        self.told = ""  # why we could not answer, the last time that we could not

    def prepare(self) -> list[Machine]:
        """Read the machines; complain of bad lines once for each Nix process."""
        machines, complaints = load_machines(self.nix)
        if machines:
            slots = Slots.find(self.nix, self.talk)
            slots.make()
            if slots.path != self.nix.slot_directory:
                hint = f"slots are counted in {slots.path}"
                what = "is no directory that nobody else can change"
                complaints.append(f"{self.nix.slot_directory} {what}; {hint}")
            self.site = Site(self.nix, self.talk, slots)
        text = "\n".join(complaints)
        if text and (not self.site or self.site.slots.remember(text)):
            for complaint in complaints[:COMPLAINTS]:
                self.talk.say(WARN, complaint)
            if more := len(complaints[COMPLAINTS:]):
                hint = "nix_build_remote.py check shows all"
                self.talk.say(WARN, f"and {more} more; {hint}")
        return machines

    def serve(self) -> None:
        """The whole life of a hook."""
        for request in requests(self.nix):
            if build := self.answer(request):
                heed_signals()
                try:
                    build.understand(*read_lists(self.nix))
                    build.perform()
                finally:
                    build.record(sys.exc_info()[1])
                return

    def answer(self, request: Request) -> Build | None:
        """Reply to one request, whatever happens: else Nix 2.x would give up all builds."""
        try:
            able = might_build_itself(self.nix, request)
            request = request._replace(willing=request.willing and able, able=able)
            if self.machines is None:
                self.machines = self.prepare()
            return self.consider(request, self.machines)
        except Error as error:
            is_usual = request.able and isinstance(error, Unsendable)
            is_new, self.told = str(error) != self.told, str(error)
            self.talk.say(ERROR if is_new and not is_usual else TALKATIVE, str(error))
        except Exception:  # noqa: BLE001  (a bug of ours must not cost the reply)
            self.talk.say_bug()
        self.talk.reply("decline")
        return None

    def consider(self, request: Request, machines: list[Machine]) -> Build | None:
        """Find a slot or a place in line, and reply; returns the build, None if it is not accepted.
        For a slot without a proved connection, a session is opened before we reply."""
        what = f"'{request.derivation}' for {request.kind}"
        self.talk.say(DEBUG, f"may {what} be sent to one of {len(machines)} machines?")
        # A terse Nix takes a slot of its own only for what is declined, and asks again.
        is_left = request.willing and self.nix.is_terse
        fit = [] if is_left else self.eligible(request, machines)
        if not fit or not self.site:
            is_final = not machines and not self.nix.old
            self.talk.reply("decline-permanently" if is_final else "decline")
            return None
        if self.nix.is_terse and request.able:
            has_room = self.builds_here() < self.nix.number("max-jobs")
            request = request._replace(willing=has_room)
        derivation = self.site.read_derivation(request.derivation)
        self.talk.tally = Tally()
        fit = [m for m in fit if not self.site.slots.lacks(m, request.kind)] or fit
        build = Build(self.site, request, derivation, fit)
        self.site.outages.forgive(fit)
        self.find_place(build, machines)
        if build.slot:
            self.talk.reply("accept", build.slot.machine.name)
        elif build.line.lock:
            self.talk.reply("accept", "waiting for a builder")
        else:
            self.talk.reply(self.turn_down(build.line, request))
            self.site.outages.look_again()
            return None
        return build

    def find_place(self, build: Build, machines: list[Machine]) -> None:
        """Find it a slot, or else a place in line, if Nix could never build it itself."""
        until = time.monotonic() + REPLY_S
        for _ in build.fit:  # of which all may fail
            slot = self.find_slot(build.line, build.request)
            if slot and self.stays(slot, machines, build.request):
                slot.free()
                return
            if not slot or self.reach(slot, build, until):
                return
            if time.monotonic() > until:
                if not build.request.able:
                    build.line.join()
                return

    def stays(self, slot: Slot, machines: list[Machine], request: Request) -> bool:
        """Whether a build should not leave for that slot: Nix would begin it now, and by load
        and speed this machine, if it is listed, is no worse."""
        here = next((machine for machine in machines if not machine.ways), None)
        if not here or not request.willing:
            return False
        load = self.builds_here()
        text = f"'{here.name}' builds {load} here, at speed {here.speed:g}"
        self.talk.say(DEBUG, text)
        is_worse = rank(here, load) > rank(slot.machine, slot.load)
        return load < here.max_jobs and not is_worse

    def builds_here(self) -> int:
        """How many builds Nix does itself, with the last that we left to it."""
        until, after = self.stayed
        return max(builds_of_nix(), after if time.monotonic() < until else 0)

    def eligible(self, request: Request, machines: list[Machine]) -> list[Machine]:
        """Those that can do it; says why if none can and Nix cannot either."""
        fit, reasons = [], []
        for machine in machines:
            reason = unfit(machine, request, self.nix)
            if not reason and self.leads_back(machine):
                reason = "is where this build comes from"
                if request.able:
                    self.talk.say(DEBUG, f"not sent on: '{machine.name}' {reason}")
                    return []
            self.talk.say(DEBUG, f"'{machine.name}' {reason or 'can build it'}")
            if reason:
                reasons.append(f"'{machine.name}' {reason}")
            elif machine not in fit:  # a file may be included twice
                fit.append(machine)
        if not fit and self.site and not request.able:
            why = "; ".join(reasons)
            if self.site.slots.remember(why):
                text = f"no machine can build '{request.derivation}', or others like it"
                self.talk.say(WARN, f"{text}: {why}")
        return fit

    def leads_back(self, machine: Machine) -> bool:
        """Whether builds come here from that machine, or may, as its name is known to ssh
        only.  To ask takes seconds where no name server answers."""
        if self.origin and machine.destination and machine not in self.back:
            found = addresses(machine.host)
            self.back[machine] = self.origin in found or not found
        return self.back.get(machine, False)

    def find_slot(self, line: Line, request: Request) -> Slot | None:
        """A slot if one is free and nobody waits; else stand in the line if Nix could
        never build this itself; else wait for a slot, but for no more than a moment, and not
        if Nix would begin it now, unless a builder is just being asked whether it has one."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            if not line.is_taken(0):
                slot = line.find()
                if slot or line.outages.despair(line.machines):
                    return slot
            is_left = request.willing and not line.slots.are_asked()
            is_settled = is_left if request.able else line.join()
            if is_settled or time.monotonic() < self.patient_from:
                return None
            if time.monotonic() > deadline:
                self.patient_from = time.monotonic() + IMPATIENCE_S
                return None
            wait_readable([], WAIT_S)

    def reach(self, slot: Slot, build: Build, until: float) -> bool:
        """Have the build go on in that slot; False, and it is free, if that is of no use."""
        machine, site = slot.machine, build.site
        try:
            seat = site.seat(machine)
            if not seat.connection.proof():
                heed_signals()
                Attempt(build, slot).begin("connecting", "connect for", "to")
                self.warm(build)
                left = max(1.0, until - time.monotonic())
                build.session = open_session(site, seat, build.path, left)
            build.slot = slot
        except (Unreachable, SessionLost) as error:
            site.outages.note(machine, slot.outage, error)
            site.retire(machine)
            told = error.told(machine.names)
            text = f"cannot build on '{machine.name}': {told}"
            if site.slots.remember(text):
                self.talk.say(ERROR, text)
        finally:
            if not build.slot:
                slot.free()
            self.talk.end()
        return build.slot is not None

    def warm(self, build: Build) -> None:
        """Connect to the likeliest machines all at once: a cold start costs one handshake."""
        site, away = build.site, build.site.outages.away(build.fit)
        there = [machine for machine in build.fit if machine not in away]
        there.sort(key=lambda machine: rank(machine, 0))
        for machine in there[:WARM_AT_ONCE]:
            with suppress(Error):  # whoever needs it will hear
                if not site.slots.pause(machine)[0]:
                    site.new_seat(machine).connection_at(0).start()

    def turn_down(self, line: Line, request: Request) -> str:
        """The reply to what no machine can take now."""
        if request.willing:
            self.stayed = time.monotonic() + BEGIN_S, self.builds_here() + 1
            return "decline"
        if despair := line.outages.despair(line.machines):
            if line.slots.remember(str(despair)):
                self.talk.say(WARN, f"'{request.derivation}': {despair}")
            return "decline"
        line.tell_of_absence()
        return "postpone"


def terminate(number: int, frame: object) -> None:
    """The handler of signals that ask us to end."""
    raise Stop(128 + number)


def heed_signals() -> None:
    """End in order when we are asked to, since there is something to lose now."""
    import signal

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, terminate)


def prepare_descriptors() -> None:
    """Have descriptors as a hook needs them, and none for our children.  4 takes the log; 5,
    from 2.1 on, is its reading end, which would hide from us that Nix has gone.  Newer Nix
    leaves a mount namespace on 3."""
    try:
        os.fstat(LOG)
    except OSError:  # started by hand
        os.dup2(MESSAGES, LOG)
    with suppress(OSError):  # it is not open
        if stat.S_ISFIFO(os.fstat(5).st_mode):
            os.close(5)
    keep_free(JOINED)
    for descriptor in range(3, 64):
        with suppress(OSError):
            os.set_inheritable(descriptor, False)


def settings_of(program: str, environ: dict[str, str]) -> str:
    """What `nix show-config` says, which is `nix config show` from 2.20 on."""
    more = environ.get("NIX_CONFIG", "") + "\nextra-experimental-features = nix-command"
    environ = {**environ, "NIX_CONFIG": more}
    programs = Programs(Talk(Nix(True, {}, {})))
    for words in (["config", "show"], ["show-config"]):
        status, text, complaint = programs.output([program, *words], environ)
        if status == 0:
            return text
    raise Error(f"'nix show-config' fails: {' '.join(complaint.split())}")


def parse_settings(text: str) -> dict[str, str]:
    """The settings in that, by name."""
    pairs = (line.partition(" = ") for line in text.splitlines())
    return {name: value.strip() for name, mark, value in pairs if mark}


def with_all_settings(nix: Nix, talk: Talk) -> Nix:
    """The same Nix with the settings that it did not send: Lix 2.92 and 2.93 leave out what
    stands in /etc/nix/nix.conf, and what is set nowhere.  As to ask takes 30 ms, the answer
    is kept until another Nix asks."""
    head = f"{calling_process()}\n"
    try:
        slots = Slots.find(nix)
        slots.make()
        path = f"{slots.own}/settings"
        text = read_private(path, SETTINGS_LIMIT_BYTES) or ""
        if not text.startswith(head):
            program = find_program("nix", nix_directories(nix.environ))
            text = head + settings_of(program, nix.environ)
            note(path, text)
    except Error as error:
        talk.say(ERROR, f"no machines are known: {error}")
        return nix
    nix = Nix(False, {**parse_settings(text), **nix.settings}, nix.environ)
    nix.is_terse = True
    return nix


def run_hook(arguments: list[str]) -> int:
    """Serve the Nix that calls with these arguments; returns our exit status."""
    prepare_descriptors()
    environ = dict(os.environ)
    if sys.stdin is None:
        return 1
    status, talk = 0, Talk(Nix(True, {}, environ))
    try:
        nix = (old_nix if is_old_call(arguments) else new_nix)(arguments, environ)
        talk = Talk(nix)
        if not nix.old and "fsync-metadata" not in nix.settings:  # which few set
            nix = with_all_settings(nix, talk)
            talk = Talk(nix)
        Hook(nix, talk).serve()
    except EOFError:
        return 1
    except Error as error:
        talk.say_failure(error)
        status = error.status
    except Exception:  # noqa: BLE001  (2.x would drop a plain traceback)
        talk.say_bug()
        status = 1
    wait_until_read()
    return status


# ==== People =========================================================================

# What a hook does not need: the commands for people.

CHECK_TIMEOUT_S = 90  # for the tiny build
CLOCK_S = 60  # clocks may differ by that
BAR = 20  # characters

OK, NOTE, WRONG, UNKNOWN = "ok", "note", "wrong", "unknown"


class Screen:
    """Standard output, with colours and renewal only if it is a terminal."""

    def __init__(self, options: Namespace) -> None:
        import shutil

        self.json, self.watch = options.json, options.watch
        self.terminal = sys.stdout.isatty()
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self.colours = self.terminal and not plain
        size = shutil.get_terminal_size()
        self.width, self.height = max(40, size.columns), size.lines or 24

    def paint(self, text: str, state: str) -> str:
        """The text in the colour of that state."""
        code = {OK: 32, NOTE: 33, WRONG: 31}.get(state)
        return f"\x1b[{code}m{text}\x1b[0m" if code and self.colours else text

    def wrap(self, indent: str, *texts: str) -> list[str]:
        """Cut texts into lines, indented; the second and further ones of a text more."""
        import textwrap

        wrapper = textwrap.TextWrapper(self.width, indent, f"{indent}    ")
        wrapper.break_long_words = wrapper.break_on_hyphens = False
        return [line for text in texts for line in wrapper.wrap(printable(text))]

    def show(self, value: object, lines: list[str]) -> None:
        """Print the lines for people, or the value for programs that ask for it."""
        import json

        text = "\n".join(lines)
        if self.json:  # what is watched is one line each time
            text = json.dumps(value, indent=None if self.watch else 2)
        elif self.watch and self.terminal:  # which cuts what is longer than a row
            room = max(0, self.height - 2)
            if len(lines) > room + 1:
                lines = [*lines[:room], f"... and {len(lines) - room} lines more"]
            text = "\x1b[?7l\x1b[H\x1b[J" + "\n".join(lines) + "\x1b[?7h"
        print(text, flush=self.watch)


def table(rows: list[list[str]]) -> list[str]:
    """Rows of equally many cells, as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(f"{c:{w}}" for c, w in zip(row, widths)) for row in rows)
    return [line.rstrip() for line in lines]


def duration(seconds: float) -> str:
    """As people say it: 1 h 2 min."""
    minutes, rest = divmod(max(0, int(seconds)), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def seconds_of(text: str) -> float:
    """What people mean by 90s, 30m, 2h or 1d; Error if it is nothing of that kind."""
    number, unit = text[:-1], {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:])
    if not unit or len(number) > 6 or not only(number, DIGITS) or not int(number or 0):
        raise Error(f"{text!r} is no length of time such as 90s, 30m, 2h or 1d")
    return float(number) * unit


def amount(size: float) -> str:
    """Bytes as people say it: 3 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


# ---- The machines, as the hook would find them --------------------------------------


def calling_nix(machines: str) -> Nix:
    """What the Nix here would tell the hook, or Error; machines: another file of them."""
    environ, program = dict(os.environ), ""
    with suppress(Error):  # there is a Nix 1.x, or none
        program = find_program("nix", nix_directories(environ))
    if program:
        nix = Nix(False, parse_settings(settings_of(program, environ)), environ)
    else:
        kind, machine = os.uname().sysname.lower(), os.uname().machine
        machine = {"arm64": "aarch64"}.get(machine, machine)
        nix = Nix(True, {"system": f"{machine}-{kind}"}, environ)
    if machines:
        nix.builders = f"@{os.path.abspath(machines)}"
    if machines and not os.path.isfile(machines):
        raise Error(f"there is no machines file {machines}")
    return nix


def pause_of(slots: Slots, machine: Machine) -> dict[str, Any]:
    """For programs: by whom it is paused, and until when in seconds since 1970, if at all."""
    words, until = slots.pause(machine)
    return {"paused": words or None, "until": until or None}


def machines_named(words: list[str], nix: Nix) -> tuple[list[Machine], list[str]]:
    """The machines that people name, or all of them; and complaints about the file."""
    known, complaints = load_machines(nix)
    at, file = nix.builders[:1], nix.builders[1:]
    where = file if nix.old else f"builders = {nix.builders}"
    where += ", which is not there" if at == "@" and not os.path.exists(file) else ""
    if not known:
        example = "a line such as: nix@builder x86_64-linux /root/.ssh/id_builder 8"
        complaints.append(f"no machines are listed ({where}); {example}")
    chosen = []
    for word in words:
        names = {m: (m.name, m.host, m.destination, called(m.name)) for m in known}
        found = [m for m in known if word in (*names[m], m.text.split()[0])]
        if not found:
            there = ", ".join(m.host or called(m.name) for m in known) or "none"
            raise Error(f"no machine {word!r} is listed in {where}; there are: {there}")
        chosen += found
    return chosen or known, complaints


# ---- check --------------------------------------------------------------------------

# What check runs on the builder before LOOK.
ASK = """\
exec 2> /dev/null
echo "user $(id -un)"
for place in /nix/var/nix/profiles/default/bin "$HOME/.nix-profile/bin" \\
    /run/current-system/sw/bin /usr/bin /usr/local/bin /opt/nix/bin
do [ -x "$place/nix-store" ] && echo "place $place/nix-store" && PATH=$PATH:$place; done
echo "nix $(nix-store --version)"
echo "time $(date +%s)"
export NIX_CONFIG='extra-experimental-features = nix-command'
(nix config show || nix show-config) | grep -E '^(system|extra-platforms|system-features) ='
"""

# What every Nix offers, or so few builds require that it is no loss not to claim it.
RARE_FEATURES = "benchmark nixos-test uid-range ca-derivations recursive-nix"
UNSAID = UNKNOWN, "-", "that cannot be found out"
COLUMNS = ("ssh", "login", "nix", "offers", "disk", "clock", "cores", "build")


def hear(
    process: subprocess.Popen[bytes], programs: Programs, environ: dict[str, str]
) -> str:
    """What a program says, but no more than it was asked for; or that it has not ended in
    time, or says far too much."""
    head = find_program("head", program_directories(environ))
    limit, within, pipe = f"-c{HEARD_LIMIT_BYTES}", LOGIN_TIMEOUT_S, process.stdout
    ended, said, _ = programs.output([head, limit], environ, within, stdin=pipe)
    status_within(process, 1)
    if ended != 0:
        return f"no answer within {LOGIN_TIMEOUT_S} s"
    is_whole = len(encode(said)) < HEARD_LIMIT_BYTES
    return said if is_whole else "it says far more than it was asked for"


class Inspection:
    """All that there is to find out about one machine.  Its tiny build has a directory of slots
    of its own: it waits for no slot, a paused machine is tried too, and no history is told."""

    def __init__(self, machine: Machine, nix: Nix, folder: str) -> None:
        self.machine, self.nix, self.folder = machine, nix, folder
        self.names = machine.names
        self.there = f"ssh {self.names.get('LOGIN', '')}"  # begins what is typed there
        self.found: dict[str, dict[str, str]] = {}  # see add
        self.phase = "waiting"  # what is done now, for people
        self.facts: dict[str, str] = {}  # what ASK and LOOK say
        self.process: subprocess.Popen[bytes] | None = None  # nix-build

    def run(self) -> None:
        """As far as it goes: each step needs the ones before."""
        try:
            talk = Talk(Nix(True, {}, self.nix.environ))  # in plain lines
            self.site = Site(self.nix, talk, Slots.find(self.nix))
            self.seat = self.site.new_seat(self.machine)
            # What was found out before may have changed.
            self.seat.chosen, self.seat.is_plain = 0, True
            steps = (self.log_in, self.find_nix, self.measure, self.build)
            all(step() for step in steps)  # until one says no
        except (Error, OSError, ValueError) as error:
            column = [*COLUMNS, COLUMNS[-1]][len(self.found)]  # the next
            self.add(column, WRONG, "FAILED", str(error))
        except Stop:
            pass

    def as_dict(self) -> dict[str, Any]:
        """For programs; it is well if nothing is wrong, up to the build."""
        states = {what: found["state"] for what, found in self.found.items()}
        well = "build" in states and WRONG not in states.values()
        pause = pause_of(Slots.find(self.nix), self.machine)
        value = {"machine": self.machine.name, "where": self.machine.where}
        return {**value, "well": well, **pause, "findings": [*self.found.values()]}

    def add(self, what: str, state: str, *words: str) -> bool:
        """Note a finding for that column; returns whether there is a point in going on.  words:
        brief ones for the table, a text, and what to type or to write if it is wrong."""
        found = dict(zip(("brief", "text", "remedy"), (*words, "")))
        self.found[what] = {"what": what, "state": state, **found}
        return state != WRONG

    def log_in(self) -> bool:
        """By an ssh of its own: a shared one may be older than what has changed."""
        import subprocess

        self.phase = "logging in"
        if not self.machine.ways:
            return not self.add("build", OK, "here", "it is this machine")
        if not self.seat.way.there:
            return self.add("ssh", *UNSAID) and self.add("login", *UNSAID)
        key = os.path.expanduser(self.machine.key)
        if key and "%" not in key and not os.path.isfile(key):  # ssh goes on without it
            make = f"ssh-keygen -t ed25519 -N '' -f {key}"
            remedy = f"if {self.machine.where} names the right file: {make}"
            remedy += f" && ssh-copy-id {self.names['LOGIN']}"
            return self.add("login", WRONG, "NO KEY", f"there is no key {key}", remedy)
        self.asked = int(time.time())
        process = self.seat.start("sh", stderr=subprocess.STDOUT)
        tell_all(process, encode(ASK + LOOK))
        said = hear(process, self.site.programs, self.seat.ssh.environ)
        end(process)
        self.answered, self.facts = int(time.time()), facts(said)
        user = self.facts.get("user", "")
        if is_word(user):  # people will paste it
            self.names["USER"] = user
        if process.returncode in (255, -9):  # by ssh; or we have killed it
            return self.refused(said, key)
        self.add("ssh", OK, "ok", "reached")
        return self.add("login", OK, user or "ok", f"logs in as {user or 'its user'}")

    def refused(self, words: str, key: str) -> bool:
        """Tell of ssh's own words, or ours if they are clearer, and what to type."""
        error = self.seat.ssh.refusal(words) or Unreachable("ssh ended without a word")
        text, remedy = str(error).removeprefix("ssh: "), error.remedy_for(self.names)
        command, brief = ["ssh-keygen", "-y", "-P", "", "-f", key], "FAILED"
        if error.meaning == "CHANGED":
            text = "its host key has changed"
        if error.meaning == "DENIED":
            brief, environ = "DENIED", self.seat.ssh.environ
            if key and self.site.programs.output(command, environ)[0] != 0:
                text = f"the key {key} has a passphrase, or is none; {text}"
                remedy = f"take the passphrase off: ssh-keygen -p -N '' -f {key}"
        column = "ssh" if error.meaning in ("NAMELESS", "SILENT") else "login"
        return self.add(column, WRONG, brief, text, remedy)

    def find_nix(self) -> bool:
        """Talk with nix-store there."""
        from timeit import repeat

        self.phase = "asking nix-store"
        session = Session(self.seat)
        try:
            ask = lambda: session.ask_valid([]).get(GREETING_TIMEOUT_S)
            took = f"{1000 * min(repeat(ask, repeat=3, number=1)):.1f} ms"
            if self.seat.way.there:
                self.add("ssh", OK, took, f"reached, round trip {took}")
        except (SessionLost, Unreachable) as error:
            refused = isinstance(error, Refused)
            if refused and self.seat.other_way() and self.seat.chosen:
                return self.find_nix()
            place, remedy = self.facts.get("place"), error.remedy_for(self.names)
            if place and only(place, PLAIN):  # people will paste it
                remedy = remedy.replace("/DIR/nix-store", place)
            self.add("nix", WRONG, "FAILED", str(error), remedy)
            self.add("disk", *self.disk())  # if that is full, that is why
            return False
        finally:
            session.cancel()
        self.retire(self.site.directory)
        self.seat.keep_way()  # hooks are to find what we have found,
        self.site.outages.end(self.machine)  # and to leave it alone no longer
        version = self.facts.get("nix", "").rpartition(" ")[2]
        protocol = f"{session.version >> 8}.{session.version & 255}"
        text = f"nix-store {version}, serve protocol {protocol}"
        if self.seat.way.here and self.seat.way.there:
            text = "that login allows only nix-daemon, with which nix-store here talks"
            protocol = "daemon"
        return self.add("nix", OK, version or protocol, text)

    def retire(self, directory: str) -> None:
        """End the connections to it there, and forget what was found out of them."""
        # Those of nix-daemon have another environment, and so another name.
        begin = os.path.basename(self.seat.base)[:8]
        for file in (f for f in os.listdir(directory) if f.startswith(begin)):
            path = f"{directory}/{file}"
            if file.endswith((".seats", ".tells", ".slow")):
                with suppress(OSError):
                    remove(path)
            elif "." not in file:
                Connection(self.seat.ssh, path).retire()

    def measure(self) -> bool:
        """What the builder says of itself, beside what is claimed here."""
        steps = (self.offers, self.disk, self.clock, self.cores)
        right = [self.add(step.__name__, *step()) for step in steps]
        return all(right)

    def offers(self) -> tuple[str, ...]:
        """Systems and features; only 2.x tells."""
        machine, where = self.machine, self.machine.where
        if "system" not in self.facts:
            return UNSAID
        told = f"{self.facts['system']} {self.facts.get('extra-platforms', '')}".split()
        offered = [system for system in told if only(system, PLAIN)]  # for our remedy
        lacking = {*machine.systems} - {*offered, "builtin"}
        right = sorted({*machine.systems} & {*offered}) or offered[:1]
        brief, remedy = "SYSTEM", f"write into the second field: {','.join(right)}"
        claimed = machine.supported | machine.mandatory
        if not lacking:
            offered = self.facts.get("system-features", "").split()
            brief, lacking = "FEATURE", {*claimed} - {*offered}
            remedy = "take it out there, or write into nix.conf on the builder: "
            remedy += f"extra-system-features = {' '.join(sorted(lacking))}"
        if lacking:
            text = f"{where} says that it offers {', '.join(sorted(lacking))}, "
            text += f"but its Nix offers {', '.join(offered) or 'nothing'}"
            return WRONG, brief, text, remedy
        if more := sorted({*offered} - claimed - {*RARE_FEATURES.split()}):
            text = f"it also offers {', '.join(more)}, which {where} does not claim"
            return NOTE, "ok", text
        return OK, "ok", "builds what is claimed"

    def disk(self) -> tuple[str, ...]:
        """How much room its store has, if there is one yet."""
        look = Look({"disk": self.facts.get("disk", ""), "asked": str(time.time())})
        free, remedy = amount(1024 * look.number("disk", 1)), "nix-collect-garbage -d"
        if look.closed:
            text = f"it {look.closed}: no builds go there"
            return WRONG, free, text, f"{self.there} {remedy}"
        if not look.number("disk"):
            return UNSAID
        return OK, free, f"{free} free in its store"

    def clock(self) -> tuple[str, ...]:
        """Whether its clock is that of here."""
        if not self.facts.get("time", "").isdigit():
            return UNSAID
        there = int(self.facts["time"])
        off = there - max(self.asked, min(there, self.answered))
        brief, side = f"{off:+} s" if off else "ok", "ahead" if off > 0 else "behind"
        if abs(off) <= CLOCK_S:
            return OK, brief, "its clock is right"
        text = f"its clock is {duration(abs(off))} {side} of the one here"
        return WRONG, brief, text, f"{self.there} timedatectl set-ntp true"

    def cores(self) -> tuple[str, ...]:
        """Whether it has cores for its jobs."""
        cores, jobs = self.facts.get("cores", ""), self.machine.max_jobs
        if not cores.isdigit():
            return UNSAID
        load = self.facts.get("load", "unknown")
        text = f"{cores} cores for {jobs} jobs, load {load}"
        if jobs <= 2 * int(cores):
            return OK, f"{cores}/{jobs}", text
        return NOTE, f"{cores}/{jobs}", f"{text}: a lower maxJobs would be quicker"

    def build(self) -> bool:
        """A real build, by the Nix here and this very hook."""
        self.phase = "building"
        if "closed" in self.facts:  # its admin lets no builds go there
            text = f"it has {CLOSED}: {self.facts['closed'] or 'no reason given'}"
            return self.add("build", WRONG, "CLOSED", text, f"{self.there} rm {CLOSED}")
        if os.geteuid() != 0 and not os.access(self.nix.store.real, os.W_OK):
            text = "not tried: the daemon builds here, so try it as root"
            return self.add("build", UNKNOWN, "-", text)
        os.mkdir(self.folder)
        hook = os.path.realpath(__file__)
        if not os.access(hook, os.X_OK):  # build-hook names Python, and then this file
            words = f"'{sys.executable}' -IS '{hook}' \"$@\""
            hook = f"{self.folder}/hook"
            write_private(hook, f"#!/bin/sh\nexec {words}\n", 0o700)
        command, environ = self.tiny_build(hook)
        with open(f"{self.folder}/log", "w+b") as log:
            start, programs = time.monotonic(), self.site.programs
            self.process = programs.start(command, environ, stdout=log, stderr=log)
            status = status_within(self.process, CHECK_TIMEOUT_S)
            took = time.monotonic() - start
            end(self.process)
            log.seek(0)
            said = decode(log.read())
        with suppress(OSError):  # it came to no connection
            self.retire(f"{self.folder}/ssh")
        return self.judge(status, took, said)

    def tiny_build(self, hook: str) -> tuple[list[str], dict[str, str]]:
        """A command, and its environment, that builds something new on this machine."""
        features = " ".join(f'"{name}"' for name in sorted(self.machine.mandatory))
        tiny, machines = f"{self.folder}/tiny.nix", f"{self.folder}/machines"
        write_private(machines, f"{self.machine.text}\n")
        text = f"""derivation {{
            name = "check"; system = "{self.machine.systems[0]}";
            builder = "/bin/sh"; args = [ "-c" "echo well > $out" ];
            requiredSystemFeatures = [ {features} ];
            random = "{os.urandom(8).hex()}"; }}"""
        write_private(tiny, text)
        program = find_program("nix-build", nix_directories(self.nix.environ))
        command = [program, tiny, "--no-out-link", "--max-jobs", "0"]
        environ = self.nix.child_environ(NIX_CURRENT_LOAD=self.folder)
        if self.nix.old:
            environ |= {"NIX_BUILD_HOOK": hook, "NIX_REMOTE_SYSTEMS": machines}
            return command, environ
        command += ["--option", "build-hook", hook, "--option", "substitute", "false"]
        return [*command, "--option", "builders", f"@{machines}"], environ

    def judge(self, status: int | None, took: float, said: str) -> bool:
        """What has come of the tiny build."""
        if status is None:
            text = f"a tiny build did not end within {CHECK_TIMEOUT_S} s"
            return self.add("build", WRONG, "NO END", text)
        if status != 0:
            lines = [line for line in said.splitlines() if line.strip()]
            bad = (n for n, l in enumerate(lines) if "cannot" in l or "error" in l)
            text = "\n".join(lines[next(bad, -3) :])
            text = text.partition("\nerror:")[0]  # Nix's own comes last
            error = heard(Error, " ".join(text.removeprefix("error: ").split()))
            text, remedy = f"a tiny build failed: {error}", error.remedy_for(self.names)
            return self.add("build", WRONG, "FAILED", text, remedy)
        if UNTRUSTED_USER in said:
            user, conf = self.names["USER"], "/etc/nix/nix.conf"
            text = f"its Nix does not trust the user {user}: builds take longer (the "
            text += "derivation's closure is sent), and unsigned inputs will be refused"
            remedy = f"on the builder, in {conf}: extra-trusted-users = {user} (in 2.3 "
            remedy += f"and older: trusted-users = root {user}); "
            remedy += "then: systemctl restart nix-daemon"
            return self.add("build", WRONG, "LIMITED", text, remedy)
        brief = f"{took:.1f} s"
        return self.add("build", OK, brief, f"built something in {brief}")


def hook_words(nix: Nix) -> list[str]:
    """What Nix here starts as its hook: a program, and arguments from 2.10 on."""
    word = nix.environ.get("NIX_BUILD_HOOK", "")
    if not nix.old or not word:
        return [] if nix.old else nix.words("build-hook")
    program = find_program("nix-store", nix_directories(nix.environ))
    prefix = os.path.dirname(os.path.dirname(os.path.realpath(program)))
    return [os.path.join(prefix, "libexec/nix", word)]


def unused(nix: Nix) -> str:
    """What to say if the Nix here has another hook; "" if it has this one, or a copy."""
    import filecmp

    mine, words = os.path.realpath(__file__), hook_words(nix)
    is_mine = lambda word: os.path.isfile(word) and filecmp.cmp(word, mine, False)
    # 2.0 to 2.9 take no arguments there; 2.10 brought that setting.
    if any(map(is_mine, words)) and (len(words) == 1 or "ignore-try" in nix.settings):
        return ""
    now = " ".join(words) or "not set"
    name = "NIX_BUILD_HOOK" if nix.old else "build-hook"
    text = f"Note: Nix here does not use this hook now ({name} is {now}); to do: "
    if nix.old:
        return f"{text}{name}={mine} in the environment of nix-build, or of nix-daemon."
    text += f"{name} = {mine} in /etc/nix/nix.conf, or with 2.25 to 2.33 in "
    text += "/root/.config/nix/nix.conf"
    return f"{text}; a daemon learns of it when it is restarted."


def wrong_hook(nix: Nix) -> Iterator[str]:
    """Why Nix here cannot start its hook, if it cannot."""
    files = [word for word in hook_words(nix) if word.startswith("/")]
    for file in files:
        if not os.path.exists(file):
            yield f"Nix is to start {file}, which is not there"
        elif file is files[0] and not os.access(file, os.X_OK):
            yield f"Nix is to start {file}, which is not executable: chmod 755 {file}"


def check(options: Namespace, nix: Nix, screen: Screen) -> int:
    """Try each machine, and say what is wrong and what to do."""
    machines, complaints = machines_named(options.MACHINE, nix)
    if machines:
        make_slots(nix)
    note = unused(nix)
    complaints += wrong_hook(nix)
    found = [i.as_dict() for i in inspect_all(machines, nix, screen)]
    value = {"complaints": complaints, "note": note, "machines": found}
    screen.show(value, check_lines(value, screen) + screen.wrap("", note))
    return 0 if all(m["well"] for m in found) and not complaints else 1


def make_slots(nix: Nix) -> Slots:
    """Have the directory with the slots, as a hook makes it."""
    try:
        slots = Slots.find(nix)
        slots.make()
        if not os.access(slots.path, os.W_OK):
            raise Error(f"cannot write into {slots.path}")
        return slots
    except Error as error:
        raise Error(f"{error}; try it as root") from None


def inspect_all(machines: list[Machine], nix: Nix, screen: Screen) -> list[Inspection]:
    """Inspect all at the same time; whatever ends us leaves no build and no file."""
    import shutil
    import tempfile
    from threading import Thread

    # Its name is known before it is made: a signal may come at any moment.
    folder = f"{tempfile.gettempdir()}/check-{os.urandom(8).hex()}"
    inspections = [Inspection(m, nix, f"{folder}/{n}") for n, m in enumerate(machines)]
    try:
        os.mkdir(folder, 0o700)
        threads = {Thread(target=i.run, daemon=True): i for i in inspections}
        for thread in threads:
            thread.start()
        watch_inspections(threads, screen)
    finally:  # what has a pipe of ours ends with us
        for inspection in inspections:
            if inspection.process:
                inspection.process.kill()
        shutil.rmtree(folder, ignore_errors=True)
    return inspections


def watch_inspections(threads: dict[Any, Inspection], screen: Screen) -> None:
    """Until all are done, say on standard error how far they are."""
    terminal, left, count = sys.stderr.isatty(), len(threads), len(threads)
    while left:
        time.sleep(0.1)
        before, busy = left, [i for t, i in threads.items() if t.is_alive()]
        left = len(busy)
        names = ", ".join(f"{called(i.machine.name)} {i.phase}" for i in busy)
        text = f"{count - left} of {count} done" + (f"; {names}" if busy else "")
        if terminal:
            text = text[: screen.width - 1] if busy else ""
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        elif left != before:
            print(text, file=sys.stderr)


def check_lines(value: dict[str, Any], screen: Screen) -> list[str]:
    """A table, and below each line what is wrong."""
    complaints, machines = value["complaints"], value["machines"]
    lines = [screen.paint(text, WRONG) for text in screen.wrap("", *complaints)]
    rows = [["machine", *COLUMNS]]
    for machine in machines:
        brief = {found["what"]: found["brief"] for found in machine["findings"]}
        cells = [brief.get(column, "-") for column in COLUMNS]
        rows.append([called(machine["machine"]), *cells])
    head, *heads = table(rows)
    if max(map(len, [head, *heads])) > screen.width:  # then each name has its own line
        head, *heads = table([row[1:] for row in rows])
        heads = [f"{row[0]}\n{text}" for row, text in zip(rows[1:], heads)]
    lines += [head] if machines else []
    for text, machine in zip(heads, machines):
        lines.append(screen.paint(text, OK if machine["well"] else WRONG))
        lines += screen.wrap("    ", machine["paused"] or "")
        for found in machine["findings"]:
            if found["state"] in (WRONG, NOTE):
                lines += screen.wrap("    ", f"{found['what']}: {found['text']}")
            if found["remedy"]:  # whole, to be pasted
                lines.append(f"    to do: {printable(found['remedy'])}")
    ill = sum(not machine["well"] for machine in machines)
    verdict = "Not all is well." if complaints else "All machines are well."
    if ill:
        are = "machine is" if len(machines) == 1 else "machines are"
        verdict = f"{ill} of {len(machines)} {are} not well."
    return [*lines, screen.paint(verdict, WRONG if ill or complaints else OK)]


# ---- status -------------------------------------------------------------------------


def holder_of(text: str) -> dict[str, Any]:
    """Who holds a lock, for which Nix, as its file says; pid 0 if that is not known: what
    another program says, or an ended process, is not believed."""
    said, who = (0, 0, 0.0, "", ""), Holder.parse(text)
    with suppress(ValueError):
        if who and is_alive(who.pid, who.start) and math.isfinite(float(who.since)):
            nix = int(who.nix.partition(".")[0])
            said = int(who.pid), nix, float(who.since), who.phase, who.derivation
    return dict(zip(("pid", "nix", "since", "phase", "derivation"), said))


def holder_line(holder: dict[str, Any]) -> str:
    """Who holds a lock, for people."""
    if not holder["pid"]:
        return "taken by another program, such as Nix's own hook"
    age, name = duration(time.time() - holder["since"]), short(holder["derivation"])
    phase = "" if holder["phase"] == "waiting" else f"{holder['phase']:10} "
    return printable(f"{phase}{name} for {age}, pid {holder['pid']}")


def overview(slots: Slots, machines: list[Machine]) -> dict[str, list[dict[str, Any]]]:
    """How things are with these machines, and who waits; Error if we may not read that.
    Hooks have to wait for the main lock while one machine is looked at, not for all."""
    try:
        with suppress(FileNotFoundError), open(f"{slots.path}/main-lock", "rb"):
            pass  # if a hook has ever run, it is there, and is ours
        loads = [load_of(slots, machine) for machine in machines]
        return {"machines": loads, "waiting": waiters_in(slots)}
    except OSError as error:
        raise Error(f"cannot read {error.filename}; try it as root") from None


def load_of(slots: Slots, machine: Machine) -> dict[str, Any]:
    """How things are with one machine.

    here: whether it is this machine; taken: its slots that are, load: by others, too;
    away: its outage, closed: why it gets no new builds, else None; paused, until: see
    pause_of; look: what it said.
    """
    fetches = [slots.file(machine, f"fetch-{n}") for n in range(machine.max_jobs)]
    building, fetching = (
        [*map(holder_of, held(slots, files).values())]
        for files in (slots.files(machine), fetches)
    )
    outage, loads = Outages(slots).of(machine), {machine: len(building)}
    slots.admits(machine, loads)
    look, closed = slots.look(machine), slots.refused.get(machine) or None
    value: dict[str, Any] = {"machine": machine.name, "where": machine.where}
    value |= {"here": not machine.ways, "speed": machine.speed}
    value |= {"slots": machine.max_jobs, "taken": len(building)}
    value |= {"load": loads[machine], "others": look.others}
    value |= {"building": building, "fetching": fetching, "look": look.said}
    value |= {"away": outage and outage._asdict(), "closed": closed}
    return value | pause_of(slots, machine)


def waiters_in(slots: Slots) -> list[dict[str, Any]]:
    """Who stands in the lines, from the first place of each on."""
    own = os.listdir(slots.own) if os.path.isdir(slots.own) else []
    lines = (entry.partition(".") for entry in own if entry.startswith("line-"))
    places = sorted((line, int(n)) for line, _, n in lines if n.isdecimal())
    files = {f"{slots.own}/{line}.{place}": place + 1 for line, place in places}
    return [
        {"place": files[file], **holder_of(text), "slot-names": text.split("\n")[1:]}
        for file, text in held(slots, [*files]).items()
    ]


def held(slots: Slots, paths: list[str]) -> dict[str, str]:
    """Those locks that somebody holds, and what they say; nobody takes us for a holder."""
    there = [*filter(os.path.lexists, paths)]
    if not there:  # perhaps no hook has ever run
        return {}
    with slots.main_lock() as lock:
        if slots.is_stuck:
            raise Error(f"somebody holds {lock.path} (fuser says who)")
        said = {path: Lock.said_by_holder(path) for path in there}
    return {path: text for path, text in said.items() if text is not None}


def status(options: Namespace, nix: Nix, screen: Screen) -> int:
    """Show what is built where, and who waits."""
    if options.watch:
        watch(lambda: show_status(options, nix, Screen(options)), screen.terminal)
    else:
        show_status(options, nix, screen)
    return 0


def watch(show: Callable[[], None], terminal: bool) -> None:
    """Show it once a second, until `q` is typed if that is read from a terminal, which is
    afterwards as it was."""
    if not (terminal and os.isatty(0)):
        while True:
            show()
            time.sleep(1)
    import termios
    import tty

    before, typed = termios.tcgetattr(0), b"-"
    try:
        while typed and b"q" not in typed:
            tty.setcbreak(0, termios.TCSANOW)  # again, since Ctrl-Z ends that
            show()
            typed = os.read(0, 99) if select.select([0], [], [], 1)[0] else b"-"
    finally:
        termios.tcsetattr(0, termios.TCSANOW, before)


def show_status(options: Namespace, nix: Nix, screen: Screen) -> None:
    """Show once what is built where, and who waits."""
    from itertools import groupby

    machines, complaints = machines_named(options.MACHINE, nix)
    value, lines = overview(Slots.find(nix), machines), []
    loads, waiters = value.values()
    if options.watch:  # what there is no room for is at the end
        ill = [load for load in loads if load["away"] or load["closed"]]
        ill.sort(key=lambda load: len(load["building"]))
        text = f"{len(ill)} of {len(loads)} machines left alone, {len(waiters)} waiting"
        loads = ill + [load for load in loads if load not in ill]
        quits = " (q: quit)" if screen.terminal else ""
        lines = screen.wrap("", f"{time.strftime('%H:%M:%S')}  {text}{quits}")
    lines += status_lines(loads, screen)
    hosts = {m.slot_prefix: called(m.name) for m in load_machines(nix)[0]}
    for names, line in groupby(waiters, key=lambda waiter: waiter["slot-names"]):
        known = sorted({hosts.get(name, name) for name in names if name})
        lines += screen.wrap("", f"waiting for {', '.join(known)}:")
        lines += [f"    {w['place']}. {holder_line(w)} of Nix {w['nix']}" for w in line]
    screen.show(value, lines + screen.wrap("", *complaints))


def slots_line(load: dict[str, Any]) -> list[str]:
    """What the machine is called, a character for each slot, or fewer, and the count."""
    name, taken, slots = called(load["machine"]), load["taken"], load["slots"]
    if load["here"]:
        return [name, "", f"this machine, of speed {load['speed']:g}"]
    others, whole = load["others"], slots or 1
    more = f", {others} by builds of others" if others else ""
    shares = bar(min(slots, BAR), (taken + others) / whole, taken / whole)
    return [name, shares, f"{taken} of {slots} slots taken{more}"]


def bar(width: int, full: float, ours: float = 1) -> str:
    """A bar of so many characters, of which that share is full, ours with another mark."""
    many = max(0, min(width, math.ceil(width * full)))
    own = min(many, math.ceil(width * ours))
    return f"[{'#' * own}{'o' * (many - own)}{'.' * (width - many)}]"


def look_line(look: Look) -> str:
    """What a builder said of itself, for people; "" if that is nothing."""
    size, free = (1024 * look.number("disk", place) for place in (0, 1))
    load, cores, memory = map(look.number, ("load", "cores", "memory"))
    shares = (
        ("disk", 1 - free / (size or 1), f"{amount(free)} free"),
        ("load", load / (cores or 1), f"{load:g} on {cores:g} cores"),
        ("memory", memory / 100, f"{memory:.0f} % waited for"),
    )
    told = [share for share in shares if look.said.get(share[0])]
    bars = [f"{name} {bar(10, share)} {text}" for name, share, text in told]
    age = duration(time.time() - look.number("asked"))
    return f"{'; '.join(bars)}; {age} ago" if bars else ""


def left_alone(
    failures: int, since: float, until: float, words: str, **more: Any
) -> str:
    """What people are told of an outage."""
    now = time.time()
    end = f"for {duration(until - now)} more" if until > now else "until it answers"
    times = "once" if failures == 1 else f"{failures} times"
    return f"left alone {end}, failed {times} in {duration(now - since)}: {words}"


def status_lines(loads: list[dict[str, Any]], screen: Screen) -> list[str]:
    """How things are with these machines, for people."""
    lines = []
    for head, load in zip(table([*map(slots_line, loads)]), loads):
        away, closed = load["away"], load["closed"]
        lines.append(screen.paint(head, NOTE if away or closed else OK))
        why = f"gets no new builds: it {closed}" if closed else ""
        why = left_alone(**away) if away else load["paused"] or why
        lines += screen.wrap("    ", why, look_line(Look(load["look"])))
        holders = (*load["building"], *load["fetching"])
        lines += [f"    {holder_line(holder)}" for holder in holders]
    return lines


# ---- pause and resume ---------------------------------------------------------------


def pause_text(length: str, why: str) -> str:
    """What Slots.pause reads: until when, and the words for people."""
    import pwd

    until, user = math.inf, f"user {os.getuid()}"
    with suppress(KeyError):  # it has no name
        user = os.environ.get("SUDO_USER") or pwd.getpwuid(os.getuid()).pw_name
    words = f"paused by {user}"
    if length:
        until = time.time() + seconds_of(length)
        end, now = time.localtime(until), time.localtime()
        form = "%H:%M" if end[:3] == now[:3] else "%Y-%m-%d %H:%M"
        words += time.strftime(f" until {form} %Z", end)
    words += f" ({why})" if why else ""
    return f"{until}\n{words[:OUTAGE_LIMIT]}"


def slots_of(options: Namespace, nix: Nix) -> tuple[Slots, list[Machine]]:
    """The slots that hooks count, and the named machines."""
    machines, _ = machines_named(options.MACHINE, nix)
    if here := [called(machine.name) for machine in machines if not machine.ways]:
        raise Error(f"{here[0]} is this machine: Nix itself builds here")
    return make_slots(nix), machines


def pause(options: Namespace, nix: Nix, screen: Screen) -> int:
    """Send a machine no new builds until `resume`; those that run there come to their end."""
    slots, machines = slots_of(options, nix)
    text = pause_text(vars(options)["for"], options.why)
    # Who has looked before that has a slot then, and nobody takes the file for one that is over.
    with slots.main_lock():
        for machine in machines:
            if before := slots.pause(machine)[0]:
                print(f"{called(machine.name)} was {before}", file=sys.stderr)
            write_private(slots.file(machine, "paused"), text)
    show_status(options, nix, screen)
    while options.wait and is_busy(slots, machines):
        time.sleep(0.5)
    return 0


def is_busy(slots: Slots, machines: list[Machine]) -> bool:
    """Whether builds still use one of these paused machines; Error if one is not paused."""
    loads = overview(slots, machines)["machines"]
    for machine in machines:
        if not slots.pause(machine)[0]:
            raise Error(f"{called(machine.name)} is not paused any more")
    return any(load["building"] or load["fetching"] for load in loads)


def resume(options: Namespace, nix: Nix, screen: Screen) -> int:
    """Send a machine builds again."""
    slots, machines = slots_of(options, nix)
    was = [{"machine": m.name, **pause_of(slots, m)} for m in machines]
    lines = [f"{called(m['machine'])} was {m['paused'] or 'not paused'}" for m in was]
    for machine in machines:
        remove(slots.file(machine, "paused"))
    screen.show(was, lines)
    return 0


# ---- explain ------------------------------------------------------------------------


def wanted_build(options: Namespace, nix: Nix) -> tuple[Request, frozenset[str]]:
    """What Nix would ask of that derivation, or the options; digests of what it reads."""
    import json

    features = frozenset(listed(options.features))
    if not options.DERIVATION:
        system = options.system or nix.settings["system"]
        return Request(False, system, "", features), frozenset()
    path = options.DERIVATION
    if "/" not in path and not os.path.exists(path):
        path = f"{nix.store.real}/{path}"
    path = os.path.realpath(path)
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            derivation = Derivation.parse(file.read())
    except (Error, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        hint = "get one with: nix-instantiate FILE"
        raise Error(f"cannot read the derivation {path}: {reason}; {hint}") from None
    environment = dict(derivation.environment)
    words = environment.get("requiredSystemFeatures", "").split()
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        more = texts(json.loads(environment["__json"])["requiredSystemFeatures"])
        # Half a surrogate pair, which JSON may write, is a ValueError.
        words += map(decode, map(encode, more))
    request = Request(False, derivation.platform, path, features.union(words))
    return request, derivation.digests()


# What rank and Slots.choose do, for people.
RANKING = """The first is asked first.  Of equals: the faster, then the less loaded, then
the one that has had more of the inputs, then the one that is written first."""


def why_not(machine: Machine, load: dict[str, Any], request: Request, nix: Nix) -> str:
    """Why a machine would not get this build now, or "" if it might."""
    if reason := unfit(machine, request, nix):
        return reason
    if load["away"]:
        return f"is {left_alone(**load['away'])}"
    if Slots.find(nix).lacks(machine, request.kind):
        return "could not do such a build within the last hour"
    taken, others = load["taken"], load["others"]
    if taken >= machine.max_jobs:
        return f"has no free slot: all {taken} are taken"
    if load["closed"] or load["load"] < machine.max_jobs:
        return load["closed"] or ""
    short = f"{Look(load['look']).number('memory'):.0f} % of the time"
    others = f"{others} builds of other clients run there"
    return f"is full: {taken} slots are taken, {others}, its memory is short {short}"


def choice_lines(value: dict[str, Any], screen: Screen) -> list[str]:
    """Where a build would go, for people."""
    features = ", ".join(value["features"]) or "no features"
    what = f"{value['derivation'] or 'A build'} needs {value['system']} and {features}."
    rows = [["", "machine", "taken", "speed", "taken / speed", "rounded", "inputs"]]
    for number, load in enumerate(value["machines"], 1):
        taken, speed = load["load"], load["speed"]
        cells = [f"{number}.", called(load["machine"]), f"{taken} of {load['slots']}"]
        cells += [f"{speed:g}", f"{taken / speed:.2f}"]
        rows.append([*cells, str(load["rank"]), str(load["inputs"])])
    lines = screen.wrap("", what)
    if value["machines"]:
        lines += [*table(rows), *screen.wrap("", RANKING)]
    else:
        lines.append(screen.paint("No machine can take it now.", WRONG))
    left_out = value["left-out"]
    lines += ["Left out:"] if left_out else []
    out = (f"{called(m['machine'])} {m['reason']} ({m['where']})" for m in left_out)
    lines += screen.wrap("    ", *out)
    itself = "may build it itself"
    if any(machine["here"] for machine in left_out):
        itself += ", if it has a job free and no better machine has a free slot"
    never = "can never build it itself (max-jobs, system or features)"
    return lines + screen.wrap("", f"Nix here {itself if value['here'] else never}.")


def explain(options: Namespace, nix: Nix, screen: Screen) -> int:
    """Show where a build would go, and why not elsewhere."""
    request, digests = wanted_build(options, nix)
    machines, complaints = machines_named([], nix)
    slots = Slots.find(nix)
    try:
        found = overview(slots, machines)["machines"]
    except Error as error:
        complaints.append(f"{error}; all slots are taken to be free")
        found = overview(Slots("/nowhere"), machines)["machines"]
    loads = dict(zip(machines, found))
    for machine, load in loads.items():
        load["inputs"] = slots.known(machine, digests)
        load["reason"] = why_not(machine, load, request, nix)
        load["rank"] = rank(machine, load["load"])[0]
    order = lambda m: (*rank(m, loads[m]["load"]), -loads[m]["inputs"])
    ranked = [loads[m] for m in sorted(loads, key=order) if not loads[m]["reason"]]
    value: dict[str, Any] = {"derivation": request.derivation}
    value |= {"system": request.system, "features": sorted(request.features)}
    value |= {"here": might_build_itself(nix, request), "machines": ranked}
    value["left-out"] = [load for load in loads.values() if load["reason"]]
    value["complaints"] = complaints
    screen.show(value, choice_lines(value, screen) + screen.wrap("", *complaints))
    return 0 if ranked else 1


# ---- history and metrics ------------------------------------------------------------

DIRECTIONS = ("sent", "received")
NUMBERS = ("when", "attempts", *PHASES, *DIRECTIONS)  # in a line, see Build.record
WORDS = ("derivation", "machine", "result", "reason")
WELL = ("built", "cancelled")  # results that are no failure
# What Prometheus is told: all but the first for each machine.
METRICS = {
    "waiting": "gauge Builds that wait in line for a slot.",
    "builds_total": "counter Builds that have ended there, or were tried again.",
    "seconds_total": "counter Where the time of these builds went.",
    "bytes_total": "counter Archives copied for these builds.",
    "slots": "gauge Builds that it may have at once.",
    "slots_taken": "gauge Builds that it has.",
    "up": "gauge 0 while it is left alone after a failure, else 1.",
    "closed": "gauge 1 if it gets no new builds though it is up: paused, full, no-builds.",
}


def read_history(slots: Slots, *files: str) -> list[dict[str, Any]]:
    """The lines of these, if they are there, but what is half a line, or none of ours."""
    import json

    overview(slots, [])  # Error if we may not read what is there
    found: list[dict[str, Any]] = []
    texts = (read_private(file, LOCK_LIMIT_BYTES) or "" for file in files)
    for line in "\n".join(texts).split("\n"):
        with suppress(Exception):
            said = json.loads(line)
            words = {name: " ".join(printable(said[name]).split()) for name in WORDS}
            if all(0 <= said[name] < 1e15 for name in NUMBERS):
                found.append({**{name: said[name] for name in NUMBERS}, **words})
    return found


def time_bar(builds: list[dict[str, Any]]) -> str:
    """The first letter of each phase, as often as its share of their time is."""
    spent = [sum(build[phase] for build in builds) for phase in PHASES]
    text, whole = "", sum(spent) or 1
    for number, phase in enumerate(PHASES, 1):
        text += phase[0] * (round(BAR / 2 * sum(spent[:number]) / whole) - len(text))
    return text


def history_lines(builds: list[dict[str, Any]]) -> list[str]:
    """These builds for people, and then how many there were on each machine."""
    if not builds:
        return ["no such builds are noted"]
    rows = [["ended", "took", "time", "sent", "received", "machine", "build", "result"]]
    for build in builds:
        took, name = sum(build[phase] for phase in PHASES), build["derivation"]
        cells = [time.strftime("%m-%d %H:%M:%S", time.localtime(build["when"]))]
        cells += [f"{took:.1f} s" if took < 60 else duration(took), time_bar([build])]
        cells += [*map(amount, (build["sent"], build["received"]))]
        end = ": ".join(filter(None, (build["result"], build["reason"])))
        rows.append([*cells, called(build["machine"]), short(name), end])
    sums = [["machine", "builds", "failures", "waited", "time"]]
    for host in sorted({called(build["machine"]) for build in builds}):
        its = [build for build in builds if called(build["machine"]) == host]
        failures = sum(build["result"] not in WELL for build in its)
        waited = duration(sum(build["waiting"] for build in its))
        sums.append([host, str(len(its)), str(failures), waited, time_bar(its)])
    legend = ", ".join(f"{phase[0]} {phase}" for phase in PHASES)
    return [*table(rows), *table(sums), f"time: {legend}"]


def history(options: Namespace, nix: Nix, screen: Screen) -> int:
    """Show which builds have ended, where, how long they took, and why they failed."""
    slots, wanted = Slots.find(nix), called(options.machine)
    since = time.time() - seconds_of(options.since) if options.since else 0
    builds = [
        build
        for build in read_history(slots, f"{slots.history}.old", slots.history)
        if build["when"] >= since
        and wanted in ("-", name := called(build["machine"]), name.rpartition("@")[2])
        and not (options.failed and build["result"] in WELL)
    ]
    screen.show(builds, history_lines(builds))
    return 0


def metrics(options: Namespace, nix: Nix, screen: Screen) -> int:
    """Print counts in Prometheus' text format, for node_exporter's textfile folder."""
    slots, samples = Slots.find(nix), dict[str, float]()
    # Without the older file: a counter that loses something must begin again at 0.
    for build in read_history(slots, slots.history):
        head = f"{{machine={quoted(build['machine'])},"
        more = {f"builds_total{head}result={quoted(build['result'])}}}": 1}
        more |= {f'seconds_total{head}phase="{p}"}}': build[p] for p in PHASES}
        more |= {f'bytes_total{head}direction="{d}"}}': build[d] for d in DIRECTIONS}
        samples |= {key: samples.get(key, 0) + number for key, number in more.items()}
    # Lines of the same name share their slots.
    machines = [machine for machine in load_machines(nix)[0] if machine.ways]
    machines.sort(key=lambda machine: machine.max_jobs)
    found = overview(slots, machines)
    samples["waiting"] = len(found["waiting"])
    for load in found["machines"]:
        which, away = f"{{machine={quoted(load['machine'])}}}", load["away"]
        samples[f"slots{which}"] = load["slots"]
        samples[f"slots_taken{which}"] = load["taken"]
        samples[f"up{which}"] = int(not away)
        samples[f"closed{which}"] = int(bool(load["closed"]))
    lines = []
    for metric, text in METRICS.items():
        name, (kind, _, words) = f"nix_build_remote_{metric}", text.partition(" ")
        lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
        its = (key for key in sorted(samples) if key.partition("{")[0] == metric)
        lines += [f"nix_build_remote_{key} {round(samples[key], 3)}" for key in its]
    screen.show(samples, lines)
    return 0


# ---- Command line -------------------------------------------------------------------

# What each takes: words (? at most one, * any number, + at least one), and options, some
# with an example of what goes behind them.
COMMANDS = {
    check: "MACHINE*",
    status: "MACHINE* --watch",
    explain: "DERIVATION? --system=x86_64-linux --features=kvm,big-parallel",
    pause: "MACHINE+ --for=2h --why=TEXT --wait",
    resume: "MACHINE+",
    history: "--failed --machine=MACHINE --since=2d",
    metrics: "",
}


HELP = {
    "--machines": "instead of the hook's",
    "--json": "for programs",
    "--watch": "renew it each second",
    "--for": "such as 90s, 30m, 2h or 1d",
    "--why": "for others",
    "--wait": "until no build is left there",
    "--failed": "only failures",
    "--machine": "only what was there",
    "--since": "only what is not older",
}


def parse_options(arguments: list[str]) -> Namespace:
    """What people want of us."""
    import argparse

    names, prog = " | ".join(run.__name__ for run in COMMANDS), "nix_build_remote.py"
    usage = f"{prog} {names} | --help | --version"
    parser = argparse.ArgumentParser(prog=prog, usage=usage)
    verbs = parser.add_subparsers(dest="verb", required=True, prog=prog)
    for run, takes in COMMANDS.items():
        about = f"{run.__doc__}  More of it: {prog} --help"
        part = verbs.add_parser(run.__name__, help=run.__doc__, description=about)
        part.set_defaults(run=run, watch=False)
        for word in f"{takes} --json --machines=FILE".split():
            name, _, example = word.partition("=")
            if not name.startswith("--"):
                part.add_argument(name[:-1], nargs=name[-1])
            elif example:
                text = HELP.get(name)
                part.add_argument(name, default="", metavar=example, help=text)
            else:
                part.add_argument(name, action="store_true", help=HELP[name])
    return parser.parse_args(arguments)


def run_for_people(arguments: list[str]) -> int:
    """Do what people want; returns the exit status."""
    import signal

    if arguments in (["--version"], ["--help"]):
        manual, version = str(__doc__).strip(), f"nix_build_remote.py {VERSION}"
        print(version if arguments == ["--version"] else manual)
        return 0
    options = parse_options(arguments)
    os.dup2(os.open(os.devnull, os.O_RDWR), LOG)  # of a build, for a hook
    signal.signal(signal.SIGTERM, terminate)
    try:
        nix = calling_nix(options.machines)
        if options.run is not check and os.geteuid() == 0:
            with suppress(OSError):  # there is none; else root sees what its owner does
                os.seteuid(os.stat(nix.slot_directory).st_uid)
        status = int(options.run(options, nix, Screen(options)))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        return 128 + 13  # as if SIGPIPE had ended us
    except (Error, OSError) as error:
        print(f"nix_build_remote.py: {error}", file=sys.stderr)
    return 1


def main(arguments: list[str]) -> int:
    """What Nix or people start; returns the exit status."""
    first, last = arguments[0] if arguments else "", arguments[-1] if arguments else ""
    by_nix = last.isdigit() and first not in [run.__name__ for run in COMMANDS]
    try:
        return run_hook(arguments) if by_nix else run_for_people(arguments)
    except Stop as stop:
        return stop.status
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    exit_status = main(sys.argv[1:])
    with suppress(OSError):
        if sys.stdout:
            sys.stdout.flush()
    os._exit(exit_status)  # taking Python apart in order would cost each build 2 ms
