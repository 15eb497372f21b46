"""Machines that people have paused, as hooks see them."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

import nix_build_remote as hook
from nix_build_remote import (
    Error,
    Machine,
    Nix,
    Outages,
    Slots,
    machines_named,
    pause_text,
    seconds_of,
)

NIX = Nix(False, {"system": "x86_64-linux"}, {})
B1, B2 = (Machine.parse("machines:1", f"{name} - - 2", NIX) for name in ("b1", "b2"))
BROKEN = "9 {0:.3f} {0:.3f} lasts it is broken"


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    slots = Slots(str(tmp_path / "load"))
    slots.make()
    return slots


def write(slots: Slots, what: str, text: str) -> Path:
    path = Path(slots.file(B1, what))
    path.write_text(text, encoding="utf-8")
    return path


# -- How long, and what is written ----------------------------------------------------


@pytest.mark.parametrize(
    "text, length", [("90s", 90), ("30m", 1800), ("2h", 7200), ("1d", 86400)]
)
def test_a_length_of_time_is_understood(text: str, length: int) -> None:
    assert seconds_of(text) == length


@pytest.mark.parametrize(
    "text", ["", "2", "h", "0s", "2x", "-1h", "1.5h", "1h30m", "²h", "9999999d"]
)
def test_what_is_no_length_of_time_is_refused_by_name(text: str) -> None:
    with pytest.raises(Error, match=f"{text!r} is no length of time such as 90s"):
        seconds_of(text)


def test_a_pause_says_by_whom_until_when_and_why(
    slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUDO_USER", "alice")
    write(slots, "paused", pause_text("3d", "a new\n disk"))
    words, until = slots.pause(B1)
    day = time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(until))
    assert words == f"paused by alice until {day} (a new disk)"
    assert until == pytest.approx(time.time() + 3 * 86400, abs=600)


def test_a_pause_without_an_end_names_none(
    slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUDO_USER", "alice")
    write(slots, "paused", pause_text("", ""))
    assert slots.pause(B1) == ("paused by alice", 0)


def test_a_reason_may_be_as_long_as_one_likes(slots: Slots) -> None:
    write(slots, "paused", pause_text("", "\N{SNOWMAN}" * 100_000))
    assert slots.pause(B1)[0].endswith("\N{SNOWMAN}")


# -- What counts as one ---------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "inf",
        "17",
        "inf\n",
        "nan\npaused",
        "junk\npaused",
        "\0\xff\npaused",
        "1000000000\npaused in 2001",
        "inf\n" + "x" * 10_000,
    ],
)
def test_what_is_over_or_junk_is_no_pause(slots: Slots, text: str) -> None:
    write(slots, "paused", text)
    slot, _ = slots.choose([B1])
    assert slots.pause(B1) == ("", 0) and slot


def test_a_directory_in_its_place_is_no_pause(slots: Slots) -> None:
    Path(slots.file(B1, "paused")).mkdir()
    slot, _ = slots.choose([B1])
    assert slots.pause(B1) == ("", 0) and slot


def test_the_file_of_a_pause_that_is_over_goes_away_with_the_next_build(
    slots: Slots,
) -> None:
    path = write(slots, "paused", "1000000000\npaused in 2001")
    slots.choose([B1])
    assert not path.exists()


def test_a_pause_that_just_begins_is_not_taken_for_one_that_is_over(
    slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever pauses holds the main lock, and so does who removes what is over."""
    free = []
    note = lambda path: free.append(hook.is_free(f"{slots.path}/main-lock"))
    monkeypatch.setattr(hook, "remove", note)
    slots.choose([B1])
    assert free == [False]


# -- What it means --------------------------------------------------------------------


def test_a_paused_machine_gets_no_build(slots: Slots) -> None:
    path = write(slots, "paused", "inf\npaused")
    assert slots.choose([B1]) == (None, {B1: 0})
    assert path.exists()
    path.unlink()
    slot, _ = slots.choose([B1])
    assert slot and slot.load == 0  # nothing was left held


def test_nobody_despairs_of_a_paused_machine(slots: Slots) -> None:
    """It may be down for the very work that it is paused for."""
    write(slots, "down", BROKEN.format(time.time()))
    assert Outages(slots).despair([B1])
    write(slots, "paused", "inf\npaused")
    assert not Outages(slots).despair([B1])


def test_a_damaged_note_of_an_outage_is_no_pause(slots: Slots) -> None:
    now = time.time()
    write(slots, "down", f"0 {now:.3f} {now:.3f} lasts it is broken")
    assert Outages(slots).of(B1) is None


def test_nobody_finds_out_whether_a_paused_machine_is_of_use_again(
    slots: Slots,
) -> None:
    def probe(machine: Machine, output: int) -> None:
        raise AssertionError

    write(slots, "down", BROKEN.format(time.time()))
    write(slots, "paused", "inf\npaused")
    Outages(slots, probe).find_out([B1])


def test_what_fails_on_a_paused_machine_is_no_outage(slots: Slots) -> None:
    """A build that runs there while it is being restarted."""
    outages = Outages(slots)
    write(slots, "paused", "inf\npaused")
    outages.note(B1, None, Error("connection lost"))
    Path(slots.file(B1, "paused")).unlink()
    assert outages.of(B1) is None


def test_until_a_pause_ends_no_outage_says_anything(slots: Slots) -> None:
    write(slots, "paused", f"{math.inf}\npaused by alice")
    write(slots, "down", BROKEN.format(time.time()))
    assert Outages(slots).of(B1) is None


# -- How people name a machine --------------------------------------------------------


@pytest.mark.parametrize(
    "word",
    ["b1", "nix@b1", "nix@b1:22", "ssh://nix@b1:22?compress=1"],
)
def test_a_machine_may_be_named_as_written_or_as_shown(
    word: str, tmp_path: Path
) -> None:
    file = tmp_path / "machines"
    file.write_text("ssh://nix@b1:22?compress=1\nb2\n", encoding="utf-8")
    nix = Nix(False, {"system": "x86_64-linux", "builders": f"@{file}"}, {})
    [machine], _ = machines_named([word], nix)
    assert machine.host == "b1"


def test_a_name_that_fits_several_lines_names_all_of_them(tmp_path: Path) -> None:
    file = tmp_path / "machines"
    file.write_text("nix@b1\nroot@b1\nb2\n", encoding="utf-8")
    nix = Nix(False, {"system": "x86_64-linux", "builders": f"@{file}"}, {})
    found, _ = machines_named(["b1"], nix)
    assert [machine.destination for machine in found] == ["nix@b1", "root@b1"]
