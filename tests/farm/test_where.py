"""The hook in every place where Nix may start it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import keypair, poll, trust
from scene import (
    HOOK,
    INSTALLED,
    Outcome,
    Run,
    Scene,
    other,
    registered,
    scene,
    suitable,
    valid,
    version,
)

pytestmark = pytest.mark.engines

README = HOOK.parent / "README.md"
IN_CONF = "/usr/local/lib/nix_build_remote.py"

# The output says where it was built; the gate lets a test look while it is built.
GRAPH = """
  let source = builtins.toFile "source" "text\\n";
  in mk "top" "{ cat $below; hostname; } > $out" {
    below = mk "below"
      "while ! [ -e /tmp/go ]; do sleep 0.02; done; cat ${source} > $out" {};
  }
"""


@pytest.fixture
def running(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    with scene(client_engine, other(pytestconfig, client_engine)) as hosts:
        yield hosts
        hosts.settle()
        assert hosts.locks() == []


def start_seen(
    running: Scene, hook: str, *options: str, user: str | None = None
) -> Run:
    """Start the graph, and see that it is this hook that builds it."""
    run = running.start(GRAPH, *options, user=user)
    poll(lambda: running.hooks(hook) or run.ended, f"a {hook}")
    assert not run.ended, run.log
    return run


def finish(running: Scene, run: Run) -> Outcome:
    running.builder.write("/tmp/go", "")
    outcome = run.end()
    assert outcome.status == 0, outcome.log
    return outcome


def build_seen(
    running: Scene, hook: str, *options: str, user: str | None = None
) -> None:
    """Build the graph, by this hook and there."""
    built = finish(running, start_seen(running, hook, *options, user=user)).output
    assert running.client.read(built) == "text\nb1\n"
    assert valid(running.client, built)


def readme(pattern: str) -> list[str]:
    """The README's command lines that match."""
    lines = README.read_text().splitlines()
    return [
        line.strip()
        for line in lines
        if line.startswith("    ") and re.search(pattern, line)
    ]


def type_in(running: Scene, commands: list[str]) -> None:
    """Do what the README says, in a directory that has the file."""
    running.client.copy(HOOK, "/tmp/unpacked/nix_build_remote.py", 0o644)
    running.client.run("sh", "-exc", "\n".join(["cd /tmp/unpacked", *commands]))


# -- How it is installed --------------------------------------------------------------


def by_the_readme(running: Scene) -> Scene:
    """Installed in nix.conf, in the one that this Nix heeds."""
    commands = readme(
        r"^    (install|mv) .* /usr/local/lib/nix_build_remote\.(new|py)$"
    )
    assert [line.split()[0] for line in commands] == ["install", "mv"]
    forgets = (2, 25) <= version(running.client.engine.name) < (2, 34)
    where = "/root/.config/nix" if forgets else "/etc/nix"
    commands += readme(f"^    (mkdir -p {where}|echo 'build-hook = .*>> {where}/)")
    assert f"echo 'build-hook = {IN_CONF}' >> {where}/nix.conf" in commands
    type_in(running, commands)
    return running._replace(hook=())


def test_the_readmes_lines_for_nix_conf_are_enough(running: Scene) -> None:
    build_seen(by_the_readme(running), IN_CONF)


@pytest.fixture
def old_debian(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    """A client whose default hook is libexec/nix/build-remote."""
    client = suitable(pytestconfig, client_engine, (2, 10).__gt__)
    with scene(client, other(pytestconfig, client)) as running:
        yield running._replace(hook=())
        running.settle()


LIBEXEC = "/usr/libexec/nix/build-remote"


def test_in_libexec_it_needs_no_setting(old_debian: Scene) -> None:
    commands = readme(LIBEXEC)
    assert len(commands) == 2
    type_in(old_debian, commands)
    build_seen(old_debian, LIBEXEC)


def test_bin_nix_survives_the_installation_in_libexec(old_debian: Scene) -> None:
    nix = old_debian.client.path("/usr/bin/nix")
    before = nix.read_bytes()
    type_in(old_debian, readme(LIBEXEC))
    assert nix.read_bytes() == before and not nix.is_symlink()
    assert old_debian.client.read(LIBEXEC) == HOOK.read_text()


def test_there_is_a_way_back_from_libexec(old_debian: Scene) -> None:
    type_in(old_debian, readme(LIBEXEC))
    build_seen(old_debian, LIBEXEC)
    back = re.findall(
        r"`((?:rm|dpkg-divert)[^`]+/usr/libexec[^`]+)`", README.read_text()
    )
    assert len(back) == 2
    type_in(old_debian, back)
    assert old_debian.client.path(LIBEXEC) == old_debian.client.path("/usr/bin/nix")
    assert os.listdir(old_debian.client.path(os.path.dirname(LIBEXEC))) == [
        "build-remote"
    ]


def test_it_runs_under_any_name(running: Scene) -> None:
    name = "/opt/my.hooks/build-remote-1"
    running.client.copy(HOOK, name)
    build_seen(running, name, "--option", "build-hook", name)


def test_in_a_nix_store_it_leaves_its_path_as_it_is(running: Scene) -> None:
    """Python would keep the compiled program there, and anybody's build replace it."""
    running.client.run("mkdir", "/tmp/package")
    running.client.copy(HOOK, "/tmp/package/hook")
    path = running.client.run("nix-store", "--add", "/tmp/package").stdout.strip()
    build_seen(running, f"{path}/hook", "--option", "build-hook", f"{path}/hook")
    assert valid(running.client, path)


# As README's lines for NixOS make it, without nixpkgs.
PACKAGE = """
  mk "package" ''
    mkdir -p $out
    cp ${/tmp/source/nix_build_remote.py} $out/nix_build_remote.py
    chmod 755 $out/nix_build_remote.py
    [ -z "$bytecode" ] || python3 -m compileall -q --invalidation-mode checked-hash $out
  '' { bytecode = "%s"; }
"""
# A python3 that tells what is compiled, and goes on; it does not look like a script.
TELLTALE = """
hook='import sys
def tell(event, arguments):
    if event == "compile" and str(arguments[1]).endswith("nix_build_remote.py"):
        print("compiled", file=sys.stderr)
sys.addaudithook(tell)
'
program=$3
shift 3
exec /usr/bin/python3 -IS -c "$hook$program" "$@"
"""


@pytest.mark.parametrize("bytecode", ["", "yes"], ids=["without", "with"])
def test_in_a_nix_store_bytecode_is_used_and_not_written(
    running: Scene, bytecode: str
) -> None:
    running.client.copy(HOOK, "/tmp/source/nix_build_remote.py")
    here = ("--option", "builders", "", "--option", "max-jobs", "1")
    path = running.build(PACKAGE % bytecode, *here).output
    hook = f"{path}/nix_build_remote.py"
    running.client.write("/tmp/tells/python3", TELLTALE, 0o755)
    told = running.client.run(
        "sh", "-c", f"PATH=/tmp/tells:$PATH exec {hook} --version"
    ).stderr
    assert told.count("compiled") == (0 if bytecode else 1)
    build_seen(running, hook, "--option", "build-hook", hook)
    assert valid(running.client, path)


def test_a_script_in_the_place_of_python_is_passed_over(running: Scene) -> None:
    """As macOS without tools and pyenv have there: it may say something and fail."""
    script = "#!/bin/sh\necho install something first\nexit 127\n"
    running.client.write("/tmp/stubs/python3", script, 0o755)
    command = f"PATH=/tmp/stubs:$PATH exec {INSTALLED} --version"
    said = running.client.run("sh", "-c", command).stdout
    assert said.startswith("nix_build_remote.py ")


OLD = """hook='import sys
sys.version_info = (3, 8)
'
program=$3
shift 3
exec /usr/bin/python3 -IS -c "$hook$program" "$@"
"""


def test_too_old_a_python_is_passed_over(running: Scene) -> None:
    for folder in ("/tmp/old", "/tmp/older"):
        running.client.write(f"{folder}/python3", OLD, 0o755)
    command = f"PATH=/tmp/old:/tmp/older:$PATH exec {INSTALLED} --version"
    said = running.client.run("sh", "-c", command).stdout
    assert said.startswith("nix_build_remote.py ")


@contextlib.contextmanager
def without_python(running: Scene) -> Iterator[None]:
    """The client has none in any place where it is looked for."""
    hide = "for p in /usr/bin/python3*; do mv $p /root/; done"
    running.client.run("sh", "-c", hide)
    try:
        yield
    finally:
        running.client.run("sh", "-c", "mv /root/python3* /usr/bin/")


def test_without_python_nix_builds_here_and_one_line_tells_why(running: Scene) -> None:
    expression = 'builtins.genList (n: mk "${toString n}" "hostname > $out" {}) 2'
    with without_python(running):
        outcome = running.build(expression, "-j1")
    assert {running.client.read(path) for path in outcome.outputs} == {"client\n"}
    assert outcome.log.count("there is no Python 3.9 or newer in") == 1


def test_without_python_nix_1_is_answered_each_time(running: Scene) -> None:
    with without_python(running):
        done = running.client.run(
            *(INSTALLED, "x86_64-linux", "0", "0", "0"),
            input="1 s /d\n" * 2,
            check=False,
        )
    assert done.stderr.splitlines()[1:] == ["# decline"] * 2


def test_it_keeps_no_compiled_program_where_others_may_write(running: Scene) -> None:
    running.client.copy(HOOK, "/tmp/hook")
    build_seen(running, "/tmp/hook", "--option", "build-hook", "/tmp/hook")
    assert not running.client.path("/tmp/__pycache__").exists()


def test_it_may_be_an_argument_of_python(
    client_engine: str, pytestconfig: pytest.Config
) -> None:
    client = suitable(pytestconfig, client_engine, (2, 10).__le__)
    with scene(client, other(pytestconfig, client)) as running:
        running.client.path(INSTALLED).chmod(0o644)
        hook = f"/usr/bin/python3 {INSTALLED}"
        build_seen(running, INSTALLED, "--option", "build-hook", hook)
        running.machines("b1\n")
        checked = running.client.run(*hook.split(), "check", check=False)
        assert "FAILED" not in checked.stdout and checked.returncode == 0
        running.settle()
        assert running.locks() == []


# -- Who starts it --------------------------------------------------------------------


def test_a_daemon_with_a_bare_environment_builds_for_its_users(running: Scene) -> None:
    by_conf = by_the_readme(running)
    client = running.client
    nix_daemon = client.run("sh", "-c", "command -v nix-daemon").stdout.strip()
    bare = f"#!/bin/sh\nexec env -i PATH=/usr/sbin:/usr/bin {nix_daemon}\n"
    client.write("/usr/local/sbin/nix-daemon", bare, 0o755)
    client.add_user("alice")
    client.start_daemon()
    daemon = {"NIX_REMOTE": "daemon"}
    run = by_conf.start(GRAPH, env=daemon, user="alice")
    poll(lambda: running.hooks(IN_CONF) or run.ended, "the hook")
    hook = min(running.hooks(IN_CONF))
    assert client.path(f"/proc/{hook}").stat().st_uid == 0
    built = finish(running, run).output
    assert client.read(built) == "text\nb1\n" and valid(client, built)
    assert client.path(built).stat().st_uid == 0


def test_a_single_user_needs_no_root(running: Scene) -> None:
    client = running.client
    client.add_user("alice")
    running.builder.authorize(keypair(client, "alice"))
    trust(client, running.builder, "alice")
    client.run("chown", "-R", "alice", "/nix")
    running.machines("root@b1 - - 4\n")
    build_seen(running, INSTALLED, user="alice")


# -- Where the store is ---------------------------------------------------------------


@pytest.mark.parametrize("store", ["local?root=/tmp/r", "/tmp/r"])
def test_outputs_come_into_a_chroot_store(
    client_engine: str, pytestconfig: pytest.Config, store: str
) -> None:
    wanted = (2, 3) if "root" in store else (2, 4)
    client = suitable(pytestconfig, client_engine, wanted.__le__)
    with scene(client, other(pytestconfig, client)) as running:
        option = ("--store", store)
        run = start_seen(running, INSTALLED, *option)
        real = running.client.path("/tmp/r/nix/store")
        assert list(real.glob("*-below.lock"))
        slots = running.client.path("/tmp/r/nix/var/nix/current-load")
        poll((slots / "ssh:__b1-0").exists, "the slot")
        finish(running, run)
        (top,) = real.glob("*-top")
        assert top.read_text() == "text\nb1\n"
        query = ("nix-store", *option, "--verify-path", f"/nix/store/{top.name}")
        running.client.run(*query)
        assert not registered(running.client, f"/nix/store/{top.name}")
        assert not list(real.glob("*.lock"))
        running.settle()


def test_the_store_may_be_mounted_read_only(running: Scene) -> None:
    running.client.run("mount", "--bind", "/nix/store", "/nix/store")
    running.client.run("mount", "-o", "remount,ro,bind", "/nix/store")
    assert running.client.run("touch", "/nix/store/x", check=False).returncode
    build_seen(running, INSTALLED)


def test_slots_are_where_nix_keeps_its_state(running: Scene) -> None:
    run = running.start(GRAPH, env={"NIX_STATE_DIR": "/tmp/state"})
    slot = running.client.path("/tmp/state/current-load/ssh:__b1-0")
    poll(lambda: slot.exists() or run.ended, "the slot")
    assert running.client.read(finish(running, run).output) == "text\nb1\n"


def test_slots_are_where_the_environment_wants_them(running: Scene) -> None:
    run = running.start(GRAPH, env={"NIX_CURRENT_LOAD": "/tmp/slots"})
    slot = running.client.path("/tmp/slots/ssh:__b1-0")
    poll(lambda: slot.exists() or run.ended, "the slot")
    assert running.client.read(finish(running, run).output) == "text\nb1\n"


# -- What it needs --------------------------------------------------------------------


@pytest.mark.parametrize("path", ["PATH=", "PATH=/nowhere"], ids=["empty", "useless"])
def test_it_finds_its_programs_without_a_path(running: Scene, path: str) -> None:
    where = running.client.run("sh", "-c", "command -v nix-build").stdout.strip()
    wrapper = f'#!/bin/sh\nexec /usr/bin/python3 {INSTALLED} "$@"\n'
    running.client.write("/usr/local/bin/wrapper", wrapper, 0o755)
    hook = ("--option", "build-hook", "/usr/local/bin/wrapper")
    _, *arguments = running.nix_build('mk "a" "hostname > $out" {}', *hook)
    done = running.client.run("/usr/bin/env", path, where, *arguments)
    assert running.client.read(done.stdout.strip()) == "b1\n"


@pytest.mark.parametrize("program", ["ssh", "nix-copy-closure"])
def test_a_missing_program_is_named_and_where_it_was_looked_for(
    running: Scene, program: str
) -> None:
    remove(running, program)
    outcome = running.build('mk "a" "hostname > $out" {}', check=False)
    assert outcome.status
    assert f"cannot find the program {program}; looked in " in outcome.log
    assert "/usr/bin" in outcome.log.partition("looked in ")[2].partition("\n")[0]


@pytest.mark.parametrize("program", ["ssh", "nix-copy-closure"])
def test_without_a_program_builds_happen_here(running: Scene, program: str) -> None:
    remove(running, program)
    built = running.build('mk "a" "hostname > $out" {}', "-j1").output
    assert running.client.read(built) == "client\n"


def remove(running: Scene, program: str) -> None:
    for directory in running.client.engine.path.split(":"):
        file = Path(f"/proc/{running.client.pid}/root{directory}/{program}")
        file.unlink(missing_ok=True)


# -- A Nix that sends few of its settings ---------------------------------------------

# Stands between Nix and the hook, and lets pass what Lix 2.92 and 2.93 would send: not
# what /etc/nix/nix.conf sets, nor what is set nowhere.
FEW = f"""#!/usr/bin/python3 -IS
import os, struct, sys

def number():
    return struct.unpack("<Q", sys.stdin.buffer.read(8))[0]

def string():
    length = number()
    return sys.stdin.buffer.read(length + -length % 8)[:length]

def packed(text):
    return struct.pack("<Q", len(text)) + text + bytes(-len(text) % 8)

few = b""
while number():
    name, value = string(), string()
    if name in (b"build-hook", b"max-jobs", b"keep-going"):
        few += struct.pack("<Q", 1) + packed(name) + packed(value)
reads, writes = os.pipe()
if os.fork():
    os.dup2(reads, 0)
    os.close(writes)
    os.execv("{INSTALLED}", ["{INSTALLED}", *sys.argv[1:]])
for number in (1, 2, 4, 5, reads):
    os.close(number)
os.write(writes, few + bytes(8))
while data := sys.stdin.buffer.read1():
    os.write(writes, data)
"""
FEW_HOOK = "/usr/local/bin/few"


@pytest.fixture
def terse(pytestconfig: pytest.Config, client_engine: str) -> Iterator[Scene]:
    engine = suitable(pytestconfig, client_engine, lambda v: not (2, 25) <= v < (2, 34))
    with scene(engine, engine) as running:
        running.client.write(FEW_HOOK, FEW, 0o755)
        yield running._replace(hook=("--option", "build-hook", FEW_HOOK))
        running.settle()


ONE = 'mk "one" "hostname > $out" {}'


def test_a_nix_that_sends_few_settings_finds_the_machines_file(terse: Scene) -> None:
    assert terse.client.read(terse.build(ONE).output) == "b1\n"


def test_its_daemon_finds_what_nix_conf_says(terse: Scene) -> None:
    terse.machines("b77 - - 1\n")
    conf = f"build-hook = {FEW_HOOK}\nbuilders = b1 x86_64-linux - 2\n"
    with terse.client.path("/etc/nix/nix.conf").open("a") as file:
        file.write(conf)
    terse.client.add_user("alice")
    terse.client.start_daemon()
    named = terse._replace(hook=())
    outcome = named.build(ONE, env={"NIX_REMOTE": "daemon"}, user="alice")
    assert terse.client.read(outcome.output) == "b1\n"
    command = [INSTALLED, "check", "--json"]
    found = terse.client.run(*command, env={"NIX_REMOTE": "daemon"}, check=False)
    assert '"ssh://b1"' in found.stdout and "b77" not in found.stdout
