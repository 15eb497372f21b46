"""What a builder said of itself, and what follows from it."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from test_choosing import NIX, machines

import nix_build_remote as hook
from nix_build_remote import (
    CLOSED_S,
    LOOK_AGE_S,
    MUTE_S,
    Away,
    Error,
    Line,
    Lock,
    Look,
    Machine,
    Need,
    Nix,
    Outages,
    Programs,
    Slots,
    Talk,
    hear,
    look_line,
    tell_all,
)

GIB = 1 << 20  # in KiB, as df has it


def answer(*lines: str, asked: float = 1, before: str = "") -> str:
    """A look's file, with an answer to what was asked so many seconds ago."""
    now = time.time()
    text = "\n".join([before, "end", f"asked {asked} s ago", *lines, "end", ""])
    return " " * 99 + re.sub(r"(\S+) s ago", lambda m: f"{now - float(m[1]):.3f}", text)


def seen(builds: int, before: float = 5) -> str:
    """That there were so many builds of others so many seconds ago."""
    return f"seen {before} s ago {builds}"


def look(*lines: str, asked: float = 1) -> Look:
    return Look.parse(answer(*lines, asked=asked))


@pytest.mark.parametrize(
    ("size", "free", "is_full"),
    [
        pytest.param(20 * GIB, 2 * GIB, False, id="2 GiB of 20"),
        pytest.param(20 * GIB, GIB - 1, True, id="less than 1 GiB"),
        pytest.param(1000 * GIB, 29 * GIB, True, id="less than 3 %"),
        pytest.param(1000 * GIB, 31 * GIB, False, id="more than 3 %"),
        pytest.param(GIB // 10, GIB // 50, False, id="a fifth of a small one"),
        pytest.param(
            GIB // 10, GIB // 110, True, id="less than a tenth of a small one"
        ),
        pytest.param(0, 0, False, id="nonsense"),
    ],
)
def test_a_store_without_room_gets_no_builds(
    size: int, free: int, is_full: bool
) -> None:
    assert (look(f"disk {size} {free}").closed is not None) == is_full


def test_a_file_on_the_builder_closes_it_in_its_own_words() -> None:
    assert look("closed until noon").closed == "has /etc/nix/no-builds: until noon"


def test_why_it_is_closed_is_believed_until_it_is_asked_again_but_not_for_ever() -> (
    None
):
    assert look("closed no", asked=CLOSED_S - 60).closed
    assert not look("closed no", asked=CLOSED_S + 60).closed


def test_builds_of_others_are_believed_for_a_minute() -> None:
    assert look("builds 3", seen(3), asked=LOOK_AGE_S - 5).taken(8) == 3
    assert look("builds 3", seen(3), asked=LOOK_AGE_S + 5).taken(8) == 0
    assert look("builds 0", seen(3, LOOK_AGE_S + 5)).taken(8) == 0


@pytest.mark.parametrize(
    ("lines", "taken"),
    [
        pytest.param(["builds 0"], 0, id="nobody"),
        pytest.param(["builds 2", seen(2)], 2, id="two, as before"),
        pytest.param(["builds 1", seen(2)], 2, id="one who may begin another"),
        pytest.param(["builds 2", seen(0)], 8, id="who has just come"),
        pytest.param(["builds 99", seen(9)], 8, id="more than slots"),
        pytest.param(["builds 0", "memory 81.5"], 8, id="memory is short"),
        pytest.param(["builds 0", "memory 12"], 0, id="memory is not short"),
        pytest.param(["cores 2"], 0, id="it cannot tell"),
        pytest.param(["builds -1", "memory 1e9"], 0, id="nonsense"),
    ],
)
def test_others_take_slots(lines: list[str], taken: int) -> None:
    assert look(*lines).taken(8) == taken


@pytest.mark.parametrize("text", ["", "junk", "x" * 5000, "\nend\n" * 9, " " * 99])
def test_of_a_file_that_says_nothing_nothing_follows(text: str) -> None:
    found = Look.parse(text)
    assert (found.closed, found.taken(8)) == (None, 0)


@pytest.mark.parametrize("disk", ["1 999999999999999", "1 200000000", "0 0", "9 0"])
def test_whatever_it_says_of_its_disk_people_see_a_bar_of_ten_characters(
    disk: str,
) -> None:
    assert re.fullmatch(
        r"disk \[[#.]{10}\] .* free; .* ago", look_line(look(f"disk {disk}"))
    )


def test_a_builder_cannot_say_that_it_is_being_asked() -> None:
    assert "awaited" not in look("builds 0", "awaited 9999999999").said


# -- Choosing -------------------------------------------------------------------------


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    slots = Slots(str(tmp_path / "current-load"))
    slots.make()
    return slots


def note(slots: Slots, machine: Machine, text: str) -> None:
    Path(slots.file(machine, "look")).write_text(text, encoding="utf-8")


def chosen(slots: Slots, *candidates: Machine) -> str:
    slot = slots.choose([*candidates])[0]
    return slot.machine.host if slot else ""


def test_each_client_keeps_a_slot_and_others_take_the_rest(slots: Slots) -> None:
    [b1] = machines("b1 - - 4")
    note(slots, b1, answer("builds 4", seen(4)))
    assert chosen(slots, b1) == "b1"
    assert chosen(slots, b1) == ""


def test_builds_of_others_count_as_load(slots: Slots) -> None:
    b1, b2 = machines("b1 - - 4\nb2 - - 4")
    note(slots, b1, answer("builds 2", seen(2)))
    assert chosen(slots, b1, b2) == "b2"


def test_a_closed_machine_is_passed_over_and_the_reason_kept(slots: Slots) -> None:
    b1, b2 = machines("b1 - - 4\nb2 - - 4")
    note(slots, b1, answer("closed for repair"))
    assert chosen(slots, b1, b2) == "b2"
    assert slots.refused == {b1: "has /etc/nix/no-builds: for repair"}


def test_a_login_that_chatters_is_heard_all_the_same(slots: Slots) -> None:
    [b1] = machines("b1 - - 4")
    chatter = "Welcome to this machine, and mind the step.\n" * 1000
    note(slots, b1, answer(chatter, "closed for repair"))
    assert chosen(slots, b1) == ""


def test_who_is_not_to_look_does_not_mind_what_others_saw(tmp_path: Path) -> None:
    environ = {"NIX_CURRENT_LOAD": str(tmp_path / "load"), "NIX_BLIND_HOOK": "1"}
    slots = Slots.find(Nix(False, {}, environ))
    slots.make()
    [b1] = machines("b1 - - 4")
    note(slots, b1, answer("closed for repair"))
    assert chosen(slots, b1) == "b1"


def test_only_of_a_machine_that_would_be_chosen_it_is_read(slots: Slots) -> None:
    candidates = machines("\n".join(f"b{number} - - 1" for number in range(50)))
    read: list[Machine] = []

    class Watched(Slots):
        def look(self, machine: Machine) -> Look:
            read.append(machine)
            return super().look(machine)

    assert chosen(Watched(slots.path), *candidates) == "b0"
    assert read == candidates[:1]


def test_while_it_is_asked_for_the_first_time_a_second_build_waits(
    slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook, "LOOK_WAIT_S", 600)
    [b1] = machines("b1 - - 4")
    outages = Outages(slots)
    outages.ask = lambda machine, output: None
    outages.look_again(b1)
    time.sleep(0.001)  # when it was asked is noted in milliseconds, rounded
    with Lock(slots.file(b1, "look")) as lock:
        assert lock.hold()
        assert chosen(slots, b1) == "b1"
        assert chosen(slots, b1) == ""
    assert chosen(slots, b1) == "b1"  # it has ended, and said nothing


def test_what_it_said_before_counts_until_it_has_answered_again(slots: Slots) -> None:
    [b1] = machines("b1 - - 4")
    note(slots, b1, answer("closed now", asked=30))
    outages = Outages(slots)
    outages.ask = lambda machine, output: None
    outages.look_again(b1)
    assert slots.look(b1).closed == "has /etc/nix/no-builds: now"
    assert chosen(slots, b1) == ""


def asked(slots: Slots, machine: Machine, text: str, *, begins: bool = True) -> bool:
    """Whether a builder of which that is noted is asked now."""
    note(slots, machine, text)
    found: list[Machine] = []

    def ask(machine: Machine, output: int) -> None:
        found.append(machine)

    outages = Outages(slots)
    outages.ask = ask
    slots.refused = {} if begins else {machine: ""}
    outages.look_again(*[machine] * begins)
    return bool(found)


def test_a_builder_is_asked_every_twenty_seconds(slots: Slots) -> None:
    [b1] = machines("b1 - - 4")
    assert not asked(slots, b1, answer("builds 0", asked=15))
    assert asked(slots, b1, answer("builds 0", asked=25))
    assert not asked(slots, b1, answer("closed now", asked=15), begins=False)
    assert asked(slots, b1, answer("closed now", asked=25), begins=False)


def test_beside_builds_of_others_each_of_ours_asks(slots: Slots) -> None:
    [b1] = machines("b1 - - 4")
    text = answer("builds 2", seen(2), asked=1)
    assert asked(slots, b1, text)
    assert not asked(slots, b1, text, begins=False)


def test_a_login_that_says_nonsense_is_asked_again_after_an_hour(slots: Slots) -> None:
    [b1] = machines("b1 - - 4")

    def nonsense(age: float, words: str) -> str:
        return f"{' ' * 99}\nend\nasked {time.time() - age:.3f}\n{words}"

    assert not asked(slots, b1, nonsense(60, "error: protocol mismatch"))
    assert asked(slots, b1, nonsense(MUTE_S + 60, "error: protocol mismatch"))
    refused = "ssh: connect to host b1 port 22: Connection refused"
    assert asked(slots, b1, nonsense(60, refused))


# -- In line --------------------------------------------------------------------------


def test_a_build_that_may_go_elsewhere_does_not_wait_for_a_closed_machine(
    slots: Slots,
) -> None:
    [b1] = machines("b1 - - 4")
    note(slots, b1, answer("closed for repair"))
    need = Need("/nix/store/x.drv", frozenset(), time.time(), [b1], impatient=True)
    with pytest.raises(Away):
        Line(Outages(slots), Talk(NIX), need).wait()


def test_what_could_not_be_asked_here_is_no_failure_of_a_machine(slots: Slots) -> None:
    """As where no program can be started."""
    [b1] = machines("b1")
    down = f"1 {time.time() - 9:.3f} {time.time() - 5:.3f} passes refused"
    Path(slots.file(b1, "down")).write_text(down, encoding="utf-8")

    def ask(machine: Machine, output: int) -> None:
        raise Error("cannot start ssh")

    for _ in range(3):
        Outages(slots, ask).find_out([b1])
    assert Path(slots.file(b1, "down")).read_text(encoding="utf-8") == down


def said(script: str) -> str:
    """What that is heard to say, which has ended, or might go on, before it is told anything."""
    pipe, environ = subprocess.PIPE, dict(os.environ)
    command = ["sh", "-c", script]
    with subprocess.Popen(command, 0, None, pipe, pipe, subprocess.STDOUT) as process:
        if "exit" in script:
            process.wait()
        tell_all(process, b"x" * 1000)
        words = hear(process, Programs(Talk(NIX)), environ)
        process.kill()
    return words


def test_a_program_that_has_ended_before_it_is_told_anything_is_heard_all_the_same() -> (
    None
):
    assert said("exec <&-; echo word; echo why >&2; exit 255") == "word\nwhy\n"


def test_what_never_ends_is_not_heard_to_its_end() -> None:
    assert said("exec cat /dev/zero") == "it says far more than it was asked for"
