"""What the hook keeps in Nix's current-load: whatever becomes of it, builds go on.

Power fails, disks fill up, and other users of the client mean harm.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab import Inside, poll
from scene import (
    HOOK,
    INSTALLED,
    SLOTS,
    Scene,
    change_hook,
    end_masters,
    forget,
    masters,
    other,
    scene,
)

pytestmark = pytest.mark.engines

HELD = "touch /tmp/held; while ! [ -e /tmp/go ]; do sleep 0.02; done; hostname > $out"
INPUT = "cat ${builtins.toFile ''input'' ''text''} > /dev/null; hostname > $out"
numbers = itertools.count()


def one(script: str = INPUT) -> str:
    return f'mk "kept-{next(numbers)}" "{script}" {{}}'


@pytest.fixture(scope="module")
def hosts(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    builder = other(pytestconfig, client_engine)
    with scene(client_engine, builder, builder) as running:
        running.client.add_user("mallory")
        yield running


@pytest.fixture
def nix(hosts: Scene) -> Iterator[Scene]:
    forget(hosts)
    change_hook(hosts)
    hosts.machines("b1 - - 1 8\nb2 - - 1\n")
    for builder in hosts.builders:
        builder.run("rm", "-f", "/tmp/go", "/tmp/held")
    yield hosts
    hosts.settle()


def built_on(nix: Scene, **how: str) -> str:
    outcome = nix.build(one(), env=how)
    assert "a bug" not in outcome.log
    return nix.client.read(outcome.output).strip()


def kept(nix: Scene) -> list[Path]:
    """All files of a hook that has built something, sockets among them."""
    nix.client.write(f"{SLOTS}/own/ssh:__b2.down", "1 1 1 passes refused", 0o600)
    found = nix.client.path(SLOTS).rglob("*")
    return [path for path in found if not path.is_dir()]


# -- Whatever is there ----------------------------------------------------------------


def make_directory(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("x")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{os.open(path.parent, os.O_RDONLY)}/{path.name}")


JUNK: dict[str, Callable[[Path], object]] = {
    "empty": Path.touch,
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "words": lambda path: path.write_text("junk, 1 1 1 1\n"),
    "bytes": lambda path: path.write_bytes(bytes(range(256)) * 99),
    "directory": make_directory,
    "fifo": os.mkfifo,
    "socket": make_socket,
    "dangling link": lambda path: path.symlink_to("/nowhere/at/all"),
    "link": lambda path: path.symlink_to("/etc/kept"),
}


@pytest.mark.parametrize("kind", JUNK)
def test_any_junk_in_place_of_its_files_is_no_obstacle(nix: Scene, kind: str) -> None:
    built_on(nix)
    end_masters(nix)
    files = kept(nix)
    assert len(files) > 8
    nix.client.write("/etc/kept", "kept")
    for file in files:
        file.unlink()
        JUNK[kind](file)
    for _ in range(2):
        assert built_on(nix) == "b1"
    assert nix.client.read("/etc/kept") == "kept"


@pytest.mark.parametrize("kind", JUNK)
@pytest.mark.parametrize("name", ["own", "ssh"])
def test_any_junk_in_place_of_its_directories_is_no_obstacle(
    nix: Scene, name: str, kind: str
) -> None:
    built_on(nix)
    end_masters(nix)
    shutil.rmtree(path := nix.client.path(SLOTS) / name)
    JUNK[kind](path)
    assert built_on(nix) == "b1"
    assert path.is_dir() and not path.is_symlink()


def test_what_was_empty_after_a_power_loss_is_made_again(nix: Scene) -> None:
    built_on(nix)
    end_masters(nix)
    files = [file for file in kept(nix) if re.search("version|proved|/bin-", str(file))]
    assert len(files) == 3, files
    for file in files:
        file.write_bytes(b"")
    assert built_on(nix) == "b1"
    assert all(file.stat().st_size for file in files if file.exists())


# -- A full disk ----------------------------------------------------------------------


@pytest.mark.parametrize("full", ["bytes", "inodes"])
def test_a_full_slot_directory_loses_no_build(nix: Scene, full: str) -> None:
    """Also not one that has to move then."""
    size = "size=128k" if full == "bytes" else "nr_inodes=60"
    nix.client.run("mkdir", "-p", SLOTS)
    nix.client.run("mount", "-t", "tmpfs", "-o", f"{size},mode=700", "x", SLOTS)
    try:
        run = nix.start(one(HELD))
        poll(nix.builder.path("/tmp/held").exists, "the build")
        fill = "while echo x > $(mktemp -p . full.XXXXXXXX); do :; done"
        if full == "bytes":
            fill = "cat /dev/zero > full"
        nix.client.run("sh", "-c", f"cd {SLOTS}; {fill} 2> /dev/null", check=False)
        nix.builders[1].write("/tmp/go", "")
        nix.builder.stop_sshd(sessions=True)
        outcome = run.end()
        assert outcome.status == 0, outcome.log
        assert nix.client.read(outcome.output) == "b2\n" and "a bug" not in outcome.log
    finally:
        nix.builder.start_sshd()
        nix.settle()
        end_masters(nix)
        nix.client.run("umount", SLOTS)


# -- Other users ----------------------------------------------------------------------


def hold(nix: Scene, path: str) -> Inside:
    """Have mallory hold that lock."""
    done = nix.client.popen("flock", path, "sleep", "1000", user="mallory")
    test = ("flock", "--nonblock", path, "true")
    poll(lambda: nix.client.run(*test, check=False).returncode, "the lock")
    return done


def test_a_lock_that_another_user_holds_is_not_waited_for(nix: Scene) -> None:
    change_hook(nix, MAIN_LOCK_TIMEOUT_S=1)
    lock = f"{SLOTS}/main-lock"
    nix.client.run("mkdir", "-p", SLOTS)
    nix.client.write(lock, "", 0o644)
    holder = hold(nix, lock)
    outcome = nix.build(one())
    holder.kill()
    holder.wait()
    for process in nix.client.processes():
        if process.cmdline == "sleep 1000":
            nix.client.signal(9, process.pid)
    assert nix.client.read(outcome.output) == "b1\n"
    assert f"somebody has held {lock} for 1 s" in outcome.log
    assert nix.client.path(lock).stat().st_mode & 0o777 == 0o600


THEIRS = {
    "another user's": "mkdir /tmp/theirs/load; chown mallory /tmp/theirs/load",
    "open to all": "mkdir -m 777 /tmp/theirs/load",
    "below another user's": "chown mallory /tmp/theirs; mkdir /tmp/theirs/load",
    "not there, below another user's": "chown mallory /tmp/theirs",
    "a link in another user's": "ln -s /root /tmp/theirs/load; chown mallory /tmp/theirs",
    "another user's link": "ln -s /root /tmp/theirs/load; chown -h mallory /tmp/theirs/load",
}


@pytest.mark.parametrize("how", THEIRS)
def test_nothing_is_kept_where_others_could_change_it(nix: Scene, how: str) -> None:
    nix.client.run("sh", "-c", f"rm -rf /tmp/theirs; mkdir /tmp/theirs; {THEIRS[how]}")
    outcome = nix.build(one(), env={"NIX_CURRENT_LOAD": "/tmp/theirs/load"})
    assert nix.client.read(outcome.output) == "b1\n"
    assert "/tmp/theirs/load is no directory that nobody else can change" in outcome.log
    assert nix.client.run("find", "/tmp/theirs", "-mindepth", "2").stdout == ""
    assert masters(nix)


def test_a_directory_of_another_user_in_tmp_is_passed_over(nix: Scene) -> None:
    mallory = nix.client.user("mallory")
    for path in map(
        nix.client.path, ("/tmp/nix-build-remote-0", "/tmp/nix-build-remote-0.1")
    ):
        if path.exists():
            shutil.rmtree(path)
        path.mkdir()
        os.chown(path, mallory.uid, mallory.gid)
    load = f"/tmp/{'long' * 30}"
    assert built_on(nix, NIX_CURRENT_LOAD=load) == "b1"
    assert [*nix.client.path("/tmp/nix-build-remote-0").iterdir()] == []
    end_masters(nix)


def test_what_tells_this_store_from_others_stays_nowhere(nix: Scene) -> None:
    """Whoever could have it put on a builder could have that taken for this machine."""
    drv = nix.client.run("nix-instantiate", nix.nix_build(expression := one())[1])
    nix.client.run("nix-copy-closure", "--to", "b1", drv.stdout.strip())
    assert nix.client.read(nix.build(expression).output) == "b1\n"
    store, own = nix.client.path("/nix/store"), nix.client.path(f"{SLOTS}/own")
    assert [*store.glob("*-mark"), *own.glob("*mark*")] == []


@pytest.mark.parametrize("how", ["umask", "open before"])
def test_no_compiled_program_that_others_can_write_is_run(nix: Scene, how: str) -> None:
    nix.client.copy(HOOK, INSTALLED)
    folder = os.path.dirname(INSTALLED)
    cache = nix.client.path(folder) / "__pycache__"
    shutil.rmtree(cache, ignore_errors=True)
    if how == "open before":
        cache.mkdir()
        cache.chmod(0o777)
    nix.client.run("sh", "-c", f"umask 0; {INSTALLED} --version")
    assert built_on(nix) == "b1"
    if how == "umask":
        assert cache.stat().st_mode & 0o022 == 0
        assert [file.stat().st_mode & 0o022 for file in cache.iterdir()] == [0]
    else:
        assert [*cache.iterdir()] == []
    shutil.rmtree(cache)


# -- Much of it -----------------------------------------------------------------------


def test_many_machines_need_few_descriptors(nix: Scene) -> None:
    others = "".join(f"b2?priority={n} - - 1 0.{n + 1000}\n" for n in range(300))
    nix.machines("b1 - - 1 8\n" + others)
    command = nix.nix_build(one())
    few = ("sh", "-c", 'ulimit -n 100; exec "$@"', "sh", *command)
    done = nix.client.run(*few)
    assert nix.client.read(done.stdout.strip()) == "b1\n"


def test_outputs_may_be_many_and_have_long_names(nix: Scene) -> None:
    expression = (
        f'mk "long-{next(numbers)}-{"n" * 130}"'
        ' "for o in $outputs; do eval \\"echo x > \\\\$$o\\"; done"'
        f' {{ outputs = builtins.genList (n: "o${{toString n}}_{"x" * 50}") 600; }}'
    )
    outcome = nix.build(f"map (o: ({expression}).${{o}}) ({expression}).outputs")
    assert len(set(outcome.outputs)) == 600


def test_bad_lines_are_told_of_once_and_not_one_by_one(nix: Scene) -> None:
    bad = "".join(f"host/{n} - - 1\n" for n in range(3000))
    nix.machines(f"{bad}b1 - - 1\n")
    name = f'"bad-{next(numbers)}-${{toString n}}"'
    expression = f'builtins.genList (n: mk {name} "echo x > $out" {{}}) 3'
    log = nix.build(expression).log
    assert (
        log.count("is no store to build in") == 20 and log.count("and 2980 more") == 1
    )
