"""What people type, in a terminal and without one, where no Nix need be."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import HANGS_S, poll
from scene import HOOK


class People:
    """The program as people start it, with a machines file and slots of its own."""

    def __init__(self, root: Path) -> None:
        self.machines, self.slots = root / "machines", root / "slots"
        self.environ = {
            "PATH": os.defpath,
            "TERM": "xterm",
            "NIX_CURRENT_LOAD": str(self.slots),
        }
        self.machines.write_text("nix@b1 - - 2\nnix@b2 - - 2\n", encoding="utf-8")

    def start(self, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-IS", str(HOOK), *words]
        command += ["--machines", str(self.machines)]
        return subprocess.Popen(command, env=self.environ, **options)

    def run(self, *words: str, status: int = 0) -> str:
        """What it says, on either output."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with self.start(*words, stdin=subprocess.DEVNULL, **pipes) as process:
            said, _ = process.communicate(timeout=HANGS_S)
        assert process.returncode == status, said
        return said.decode()

    def note(self, name: str, text: str) -> None:
        (self.slots / "own" / name).write_text(text, encoding="utf-8")


def names(people: People) -> list[str]:
    """What the slots of paused machines are called, as Nix 1.x or 2.x does."""
    notes = (people.slots / "own").glob("*.paused")
    return sorted(note.name.removesuffix(".paused") for note in notes)


@pytest.fixture
def people(tmp_path: Path) -> People:
    return People(tmp_path)


# -- pause and resume -----------------------------------------------------------------


def test_a_pause_is_shown_with_its_reason(people: People) -> None:
    people.environ["SUDO_USER"] = "alice"
    people.run("pause", "b1", "--for", "3d", "--why", "new disk")
    text = people.run("status")
    assert "paused by alice until" in text and "(new disk)" in text
    assert "b2" in text and text.count("paused") == 1


def test_explain_says_that_a_machine_is_paused(people: People) -> None:
    people.environ["SUDO_USER"] = "alice"
    people.run("pause", "b1", "b2")
    text = people.run("explain", "--system", os.uname().machine + "-linux", status=1)
    assert text.count("is paused by alice") == 2


def test_a_program_learns_of_a_pause_too(people: People) -> None:
    people.environ["SUDO_USER"] = "alice"
    people.run("pause", "b1")
    one, two = json.loads(people.run("status", "--json"))["machines"]
    assert one["paused"] == "paused by alice" and two["paused"] is None
    assert one["until"] is None


@pytest.mark.parametrize("verb", ["status", "resume"])
def test_a_program_learns_when_a_pause_ends(people: People, verb: str) -> None:
    before = time.time()
    people.run("pause", "b1", "--for", "2h")
    said = json.loads(people.run(verb, "b1", "--json"))
    [value] = said if verb == "resume" else said["machines"]
    assert before + 7200 <= value["until"] <= time.time() + 7200


def test_a_machine_that_is_not_listed_is_refused_with_those_that_are(
    people: People,
) -> None:
    text = people.run("pause", "b3", status=1)
    assert "no machine 'b3' is listed" in text and "there are: b1, b2" in text


def test_to_resume_what_is_not_paused_is_no_error(people: People) -> None:
    people.run("pause", "b1")
    assert "b1 was paused by" in people.run("resume", "b1")
    assert "b1 was not paused" in people.run("resume", "b1")


def test_pause_shows_what_goes_on_there_and_nothing_of_others(people: People) -> None:
    text = people.run("pause", "b1")
    assert "0 of 2 slots taken" in text and "paused by" in text and "b2" not in text


def test_this_machine_cannot_be_paused(people: People) -> None:
    people.machines.write_text("localhost\n", encoding="utf-8")
    text = people.run("pause", "localhost", status=1)
    assert "localhost is this machine" in text


@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_who_may_not_write_there_is_told_so(people: People, verb: str) -> None:
    people.environ["NIX_CURRENT_LOAD"] = "/proc/current-load"
    text = people.run(verb, "b1", status=1)
    assert "/proc/current-load" in text and "try it as root" in text


def test_a_last_word_of_digits_is_no_call_by_nix(people: People) -> None:
    words = ("pause", "b1", "--machines", str(people.machines), "--why", "4711")
    command = [sys.executable, "-IS", str(HOOK), *words]
    done = subprocess.run(command, env=people.environ, capture_output=True, check=True)
    assert b"(4711)" in done.stdout


def test_who_pauses_again_is_told_of_the_pause_before(people: People) -> None:
    people.run("pause", "b1", "--why", "new disk")
    assert "(new disk)" in people.run("pause", "b1")


@pytest.mark.parametrize("verb", ["status", "metrics"])
def test_output_that_cannot_be_written_is_a_failure(people: People, verb: str) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        process = people.start(verb, stdout=full, stderr=subprocess.PIPE)
        assert b"No space left" in process.communicate()[1] and process.returncode == 1


@pytest.mark.parametrize(("verb", "status"), [("status", 0), ("explain", 1)])
def test_who_lists_no_machines_is_told_how(
    people: People, verb: str, status: int
) -> None:
    people.machines.write_text("# none\n", encoding="utf-8")
    text = " ".join(people.run(verb, status=status).split())
    assert "no machines are listed" in text and "a line such as: nix@builder" in text


# -- status --watch -------------------------------------------------------------------


class Terminal:
    """One with the program in it, of so many rows."""

    def __init__(self, people: People, rows: int, stdin: int | None = None) -> None:
        self.ours, theirs = pty.openpty()
        size = struct.pack("4H", rows, 80, 0, 0)
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
        self.before = termios.tcgetattr(self.ours)
        self.process = people.start(
            *("status", "--watch"),
            stdin=theirs if stdin is None else stdin,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            # A shell has its programs in the background ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(theirs)
        self.seen = b""

    def see(self, text: str, count: int = 1) -> None:
        """Wait until that is seen for so many times."""
        while self.seen.count(text.encode()) < count:
            self.seen += os.read(self.ours, 4096)

    def is_as_before(self) -> bool:
        return termios.tcgetattr(self.ours) == self.before

    def end(self) -> int:
        """Its exit status; meanwhile it may write more than a terminal holds."""
        deadline = time.monotonic() + HANGS_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.ours], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # it has ended
                    os.read(self.ours, 4096)
        return int(self.process.returncode)


@contextlib.contextmanager
def terminal(
    people: People, rows: int = 24, stdin: int | None = None
) -> Iterator[Terminal]:
    shown = Terminal(people, rows, stdin)
    try:
        yield shown
    finally:
        shown.process.kill()
        shown.process.wait()
        os.close(shown.ours)


def test_q_ends_watching_and_leaves_the_terminal_as_it_was(people: People) -> None:
    with terminal(people) as shown:
        shown.see("(q: quit)")
        poll(lambda: not shown.is_as_before(), "another mode of the terminal")
        os.write(shown.ours, b"q")
        assert shown.end() == 0 and shown.is_as_before()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_the_terminal_as_it_was(people: People, number: int) -> None:
    with terminal(people) as shown:
        shown.see("(q: quit)")
        poll(lambda: not shown.is_as_before(), "another mode of the terminal")
        shown.process.send_signal(number)
        assert shown.end() == 128 + number and shown.is_as_before()


def test_an_error_leaves_the_terminal_as_it_was(people: People) -> None:
    people.run("pause", "b1")
    with terminal(people) as shown:
        shown.see("(q: quit)")
        poll(lambda: not shown.is_as_before(), "another mode of the terminal")
        (people.slots / "main-lock").unlink()
        (people.slots / "main-lock").mkdir()
        assert shown.end() == 1 and shown.is_as_before()


def test_it_is_watched_also_if_stdin_is_no_terminal(people: People) -> None:
    start = time.monotonic()
    with terminal(people, stdin=subprocess.DEVNULL) as shown:
        shown.see("left alone, ", 3)
        assert time.monotonic() > start + 1  # once a second


def test_machines_that_are_left_alone_are_in_sight_among_many(people: People) -> None:
    lines = "".join(f"b{number} - - 2\n" for number in range(1, 41))
    people.machines.write_text(lines, encoding="utf-8")
    people.run("pause", "b40", "--why", "new disk")
    with terminal(people, rows=12) as shown:
        shown.see("lines more\x1b[?7h\r\n")
        text = shown.seen.decode()
        assert text.count("\n") == 11 and "1 of 40 machines left alone" in text
        assert text.index("b40") < text.index("(new disk)") < text.index("b1 ")
        assert "... and 32 lines more" in text


def test_one_left_alone_is_in_sight_though_another_has_many_builds(
    people: People,
) -> None:
    people.machines.write_text("b1 - - 20\nb2 - - 2\n", encoding="utf-8")
    people.run("pause", "b1", "b2")
    slots = [people.slots / f"{name}-{n}" for name in names(people) for n in range(20)]
    with contextlib.ExitStack() as stack:
        for slot in slots[:20]:
            fcntl.flock(stack.enter_context(slot.open("w")), fcntl.LOCK_EX)
        with terminal(people, rows=12) as shown:
            shown.see("lines more\x1b[?7h\r\n")
            text = shown.seen.decode()
            assert text.index("b2") < text.index("b1") < text.index("another program")


@pytest.mark.parametrize("rows", [1, 2])
def test_a_picture_is_never_higher_than_the_terminal(people: People, rows: int) -> None:
    people.run("pause", "b1")
    with terminal(people, rows=rows) as shown:
        shown.see("lines more\x1b[?7h\r\n")
        assert shown.seen.count(b"\n") == 1


def test_each_picture_reaches_a_pipe_at_once(people: People) -> None:
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    with people.start("status", "--watch", "--json", **options) as process:
        assert process.stdout
        for _ in range(2):
            assert json.loads(process.stdout.readline())["waiting"] == []
        process.kill()


def test_files_have_the_same_names_in_each_locale(tmp_path: Path) -> None:
    """Nix says them in UTF-8, or in bytes that are none; Python would read ISO 8859-9."""
    head, _, _ = HOOK.read_text(encoding="utf-8").partition("from __future__")
    program = tmp_path / "program"
    program.write_text(f"{head}import sys\nprint(sys.flags.utf8_mode)\n", "utf-8")
    environ = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
    said = subprocess.check_output(["/bin/sh", str(program)], env=environ)
    assert said == b"1\n"
