"""The locks on outputs, which Nix holds while the hook runs: when they may be retired."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lab import poll

from nix_build_remote import OutputLocks, Store

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "nix/store").mkdir(parents=True)
    return Store.parse(str(tmp_path), {})


def held(store: Store, letter: str = "a") -> tuple[str, Path, int]:
    """An output, its lock's file, and that file as Nix holds it open."""
    output = f"/nix/store/{letter * 32}-out"
    file = Path(f"{store.file(output)}.lock")
    return output, file, os.open(file, os.O_RDWR | os.O_CREAT)


def test_a_lock_is_retired_as_its_holder_would(store: Store) -> None:
    output, file, nix = held(store)
    OutputLocks(store, [output]).retire([output])
    assert not file.exists()
    assert os.fstat(nix).st_size > 0  # says to whoever waits for it that it is stale


def test_a_fresh_lock_may_be_anothers_and_stays(store: Store) -> None:
    """Two clients of one derivation: the other has retired it meanwhile."""
    output, file, _ = held(store)
    locks = OutputLocks(store, [output])
    file.unlink()
    _, file, other = held(store)
    locks.retire([output])
    assert file.exists() and os.fstat(other).st_size == 0


def test_a_lock_is_retired_only_once(store: Store) -> None:
    """A retry after a failed import waits for whoever has the fresh lock."""
    output, file, _ = held(store)
    locks = OutputLocks(store, [output])
    locks.retire([output])
    _, file, other = held(store)
    locks.retire([output])
    assert file.exists() and os.fstat(other).st_size == 0


def test_a_lock_that_nobody_held_when_we_accepted_stays(store: Store) -> None:
    output = f"/nix/store/{'a' * 32}-out"
    locks = OutputLocks(store, [output])
    _, file, other = held(store)
    locks.retire([output])
    assert file.exists() and os.fstat(other).st_size == 0


def test_only_the_outputs_that_are_fetched_are_touched(store: Store) -> None:
    first, file, _ = held(store, "a")
    second, other_file, other = held(store, "b")
    OutputLocks(store, [first, second]).retire([first])
    assert not file.exists()
    assert other_file.exists() and os.fstat(other).st_size == 0


def test_a_link_is_not_followed(store: Store, tmp_path: Path) -> None:
    output, file, _ = held(store)
    locks = OutputLocks(store, [output])
    victim = tmp_path / "victim"
    victim.write_text("")
    file.unlink()
    file.symlink_to(victim)
    with pytest.raises(OSError):
        locks.retire([output])
    assert victim.read_text() == ""


# Its parent is killed before it retires the lock; it writes down what came of it.
ORPHAN = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from nix_build_remote import NixGone, OutputLocks, Store
locks = OutputLocks(Store.parse(sys.argv[2], {}), [sys.argv[3]])
parent = os.getppid()  # before that may be killed
print("ready", flush=True)
while os.getppid() == parent:
    time.sleep(0.01)
try:
    locks.retire([sys.argv[3]])
except NixGone:
    open(sys.argv[4], "w").write("gone")
else:
    open(sys.argv[4], "w").write("retired")
"""


def test_the_lock_of_a_nix_that_was_killed_stays(store: Store, tmp_path: Path) -> None:
    """It is free again: another Nix may have it by now."""
    output, file, nix = held(store)
    result = tmp_path / "result"
    arguments = ["-c", ORPHAN, str(ROOT), str(tmp_path), output, str(result)]
    script = f"import subprocess; subprocess.call({[sys.executable, *arguments]!r})"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout and parent.stdout.readline() == b"ready\n"
        parent.kill()
    poll(lambda: result.exists() and result.read_text(), "what came of it")
    assert result.read_text() == "gone"
    assert file.exists() and os.fstat(nix).st_size == 0
