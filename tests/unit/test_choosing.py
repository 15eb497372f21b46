"""Which machine gets a build."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nix_build_remote import (
    DIGEST_LIMIT,
    LACK_S,
    LEAVE_S,
    Away,
    Error,
    Holder,
    Line,
    Lock,
    Machine,
    Need,
    Nix,
    Outages,
    Request,
    Slot,
    Slots,
    Talk,
    calling_process,
    is_alive,
    load_of,
    note,
    precedence,
    rank,
    start_time,
    unfit,
    why_not,
)

NIX = Nix(False, {"experimental-features": "", "system": "x86_64-linux"}, {})

MANUAL = """
nix@mcflurry.labs.cs.uu.nl  x86_64-darwin   /home/nix/.ssh/id_quarterpounder_auto  2
nix@scratchy.labs.cs.uu.nl  i686-linux      /home/nix/.ssh/id_scratchy_auto        8 1 kvm
nix@itchy.labs.cs.uu.nl     i686-linux      /home/nix/.ssh/id_scratchy_auto        8 2
nix@poochie.labs.cs.uu.nl   i686-linux      /home/nix/.ssh/id_scratchy_auto        8 2 kvm perf
"""  # noqa: E501, RUF100  (literally the manual)


def machines(text: str) -> list[Machine]:
    lines = text.strip().splitlines()
    return [Machine.parse("machines:1", line, NIX) for line in lines]


def ask(features: str = "", system: str = "i686-linux") -> Request:
    return Request(True, system, "/nix/store/x.drv", frozenset(features.split()))


def fit(text: str, request: Request) -> list[Machine]:
    return [m for m in machines(text) if not unfit(m, request, NIX)]


def short(machine: Machine) -> str:
    return machine.host.partition(".")[0]


def deal(directory: Path, candidates: list[Machine], builds: int) -> Counter[str]:
    """How many builds each machine gets, all of them running at once."""
    slots = Slots(str(directory))
    held: list[Slot | None] = [slots.choose(candidates)[0] for _ in range(builds)]
    taken = Counter(short(slot.machine) for slot in held if slot)
    for slot in filter(None, held):
        slot.free()
    return taken


# -- The manual's own example ---------------------------------------------------------


@pytest.mark.parametrize(
    "features, hosts",
    [
        ("kvm", ["scratchy"]),
        ("perf", ["poochie"]),
        ("kvm perf", ["poochie"]),
        ("", ["scratchy", "itchy"]),
        ("big-parallel", []),
    ],
    ids=["kvm", "perf", "kvm and perf", "nothing", "something nobody has"],
)
def test_manual_builds_that_require(features: str, hosts: list[str]) -> None:
    assert [short(machine) for machine in fit(MANUAL, ask(features))] == hosts


def test_manual_darwin_goes_to_mcflurry() -> None:
    found = fit(MANUAL, ask(system="x86_64-darwin"))
    assert [short(machine) for machine in found] == ["mcflurry"]


@pytest.mark.parametrize("builds", [1, 2, 3, 4, 8, 12, 15])
def test_manual_of_itchy_and_scratchy_the_faster_gets_more(
    builds: int, tmp_path: Path
) -> None:
    dealt = deal(tmp_path, fit(MANUAL, ask()), builds)
    assert dealt["itchy"] > dealt["scratchy"]


def test_manual_sixteen_builds_fill_itchy_and_scratchy(tmp_path: Path) -> None:
    dealt = deal(tmp_path, fit(MANUAL, ask()), 16)
    assert dealt == {"itchy": 8, "scratchy": 8}


def test_manual_sixteen_builds_with_slots_to_spare_go_mostly_to_itchy(
    tmp_path: Path,
) -> None:
    roomy = MANUAL.replace(" 8 ", " 16 ")
    assert deal(tmp_path, fit(roomy, ask()), 16) == {"itchy": 11, "scratchy": 5}


# -- Eligibility ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, features, reason",
    [
        ("b1 i686-linux", "", ""),
        ("b1 i686-linux - 1 1 kvm", "kvm", ""),
        ("b1 i686-linux - 1 1 - kvm", "kvm", ""),
        ("b1 i686-linux - 1 1 kvm,perf", "", ""),
        ("b1 x86_64-linux,armv7l-linux", "", "builds x86_64-linux, armv7l-linux, not"),
        ("b1 i686-linux", "kvm perf", "lacks the features kvm, perf"),
        (
            "b1 i686-linux - 1 1 - kvm,perf",
            "kvm",
            "is only for builds that require perf",
        ),
        ("b1 i686-linux - 0", "", "has maxJobs 0"),
    ],
    ids=[
        "the system is enough",
        "a supported feature",
        "a mandatory feature counts as supported",
        "supported features need not be asked for",
        "another system",
        "features it lacks",
        "mandatory features not asked for",
        "no slots",
    ],
)
def test_a_machine_is_unfit_for_a_reason(line: str, features: str, reason: str) -> None:
    (machine,) = machines(line)
    said = unfit(machine, ask(features), NIX)
    assert said.startswith(reason) and bool(said) == bool(reason)


@pytest.mark.parametrize(
    "settings, fits",
    [({"experimental-features": ""}, True), ({}, False)],
    ids=["from 2.4", "before 2.4"],
)
def test_builtin_fits_every_machine(settings: dict[str, str], fits: bool) -> None:
    (machine,) = machines("b1 i686-linux")
    said = unfit(machine, ask(system="builtin"), Nix(False, settings, {}))
    assert (said == "") is fits


# -- Order ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "load, speed, rounded",
    [
        (0, "1", 0),
        (1, "1", 1),
        (1, "2", 0),
        (3, "2", 1),
        (5, "2", 2),
        (2, "3", 1),
        (1, "3", 0),
        (1, "0.5", 2),
        (7, "4", 2),
    ],
)
def test_load_by_speed_is_rounded_half_down(
    load: int, speed: str, rounded: int
) -> None:
    (machine,) = machines(f"b1 i686-linux - 8 {speed}")
    assert rank(machine, load)[0] == rounded


@pytest.mark.parametrize(
    "text, loads, best",
    [
        ("b1 - - 9 1\nb2 - - 9 1", (2, 1), "b2"),
        ("b1 - - 9 1\nb2 - - 9 2", (0, 0), "b2"),
        ("b1 - - 9 1\nb2 - - 9 2", (0, 1), "b2"),
        ("b1 - - 9 1\nb2 - - 9 2", (0, 2), "b1"),
        ("b1 - - 9 4\nb2 - - 9 4", (2, 1), "b2"),
        ("b1 - - 9 1\nb2 - - 9 1", (1, 1), "b1"),
    ],
    ids=[
        "less load by speed",
        "idle, the faster",
        "a second build still goes to the faster",
        "a third goes to the idle slower",
        "equal after rounding, the lower load",
        "full ties, the first written",
    ],
)
def test_the_best_is(text: str, loads: tuple[int, int], best: str) -> None:
    candidates = zip(machines(text), loads)
    assert min(candidates, key=lambda pair: rank(*pair))[0].host == best


def test_slots_go_to_the_first_written_on_full_ties(tmp_path: Path) -> None:
    slots = Slots(str(tmp_path))
    slot = slots.choose(machines("b1\nb2\nb3"))[0]
    assert slot and slot.machine.host == "b1"


def test_no_slot_is_left_when_all_are_taken(tmp_path: Path) -> None:
    slots = Slots(str(tmp_path))
    candidates = machines("b1 - - 2\nb2 - - 1")
    taken = [slots.choose(candidates)[0] for _ in range(4)]
    assert [slot is not None for slot in taken] == [True, True, True, False]


def test_a_freed_slot_can_be_taken_again(tmp_path: Path) -> None:
    slots = Slots(str(tmp_path))
    first = slots.choose(machines("b1"))[0]
    assert first
    first.free()
    assert slots.choose(machines("b1"))[0]


# -- Where the inputs are -------------------------------------------------------------


def test_of_equals_the_one_that_has_had_more_of_the_inputs_is_chosen(
    tmp_path: Path,
) -> None:
    slots, (b1, b2, b3) = Slots(str(tmp_path)), machines("b1\nb2\nb3")
    slots.make()
    slots.note_paths(b2, frozenset(["a"]))
    slots.note_paths(b3, frozenset(["a", "b"]))
    slot = slots.choose([b1, b2, b3], frozenset(["a", "b", "c"]))[0]
    assert slot and slot.machine is b3


def test_load_and_speed_come_before_the_inputs(tmp_path: Path) -> None:
    slots, (b1, b2, fast) = Slots(str(tmp_path)), machines("b1\nb2 - - 2\nb3 - - 1 2")
    slots.make()
    inputs = frozenset(["a"])
    slots.note_paths(b2, inputs)
    first, second, third = (slots.choose([b1, b2, fast], inputs)[0] for _ in range(3))
    assert first and first.machine is fast
    assert second and second.machine is b2
    assert third and third.machine is b1


def test_the_paths_a_machine_has_had_longest_ago_are_forgotten(tmp_path: Path) -> None:
    slots, [machine] = Slots(str(tmp_path)), machines("b1")
    slots.make()
    for number in range(DIGEST_LIMIT + 2):
        slots.note_paths(machine, frozenset([f"{number:032}"]))
    slots.note_paths(machine, frozenset([f"{2:032}"]))  # had again
    kept = slots.digests(machine)
    assert (len(kept), kept[0], kept[-1]) == (DIGEST_LIMIT, f"{3:032}", f"{2:032}")


def test_what_stands_in_place_of_the_list_of_paths_is_no_trouble(
    tmp_path: Path,
) -> None:
    slots, [machine] = Slots(str(tmp_path)), machines("b1")
    slots.make()
    Path(slots.own, f"{machine.slot_prefix}.paths").mkdir()
    assert slots.known(machine, frozenset(["a"])) == 0
    slots.note_paths(machine, frozenset(["a"]))
    assert slots.known(machine, frozenset(["a"])) == 1


# -- What is known of machines --------------------------------------------------------


def test_explain_leaves_out_what_could_not_do_such_a_build(tmp_path: Path) -> None:
    nix = Nix(False, NIX.settings, {"NIX_CURRENT_LOAD": str(tmp_path)})
    slots, (b1, b2) = Slots(str(tmp_path)), machines("b1\nb2")
    slots.make()
    request = ask(system="x86_64-linux")
    note(slots.file(b1, "lacks"), request.kind)
    reasons = [why_not(m, load_of(slots, m), request, nix) for m in (b1, b2)]
    assert reasons == ["could not do such a build within the last hour", ""]


def test_a_machine_is_well_if_somebody_has_removed_what_was_noted(
    tmp_path: Path,
) -> None:
    assert Outages(Slots(str(tmp_path / "gone"))).away(machines("b1")) == {}


@pytest.mark.parametrize("age", [-1e8, LACK_S + 60, 60])
def test_what_a_machine_lacks_is_believed_for_an_hour(
    age: float, tmp_path: Path
) -> None:
    """Not longer either if the clock was set back since."""
    slots, [machine] = Slots(str(tmp_path)), machines("b1")
    slots.make()
    path = slots.file(machine, "lacks")
    note(path, "x86_64-linux kvm")
    os.utime(path, (time.time() - age, time.time() - age))
    assert slots.lacks(machine, "x86_64-linux kvm") == (age == 60)


# -- Who comes first of those who stand first in lines --------------------------------


@pytest.mark.parametrize(
    "first, second",
    [
        (("1 7 n 100 waiting /d", "b1"), ("2 7 o 100 waiting /d", "b1 b2")),
        (("1 7 n 100 overdue /d", "b1 b2"), ("2 7 o 100 waiting /d", "b1")),
        (("9 7 n 100 overdue /d", "b1 b2 b3"), ("2 7 o 101 overdue /d", "b1 b2")),
        (("9 7 o 101 waiting /d", "b1"), ("2 7 n 100 waiting /d", "b1")),
        (("9 7 n 101 waiting /d", "b1"), ("2 7 o 100 waiting /d", "b1 b2")),
    ],
    ids=[
        "fewer machines",
        "overdue",
        "longer overdue",
        "fewer slots",
        "rather fewer machines",
    ],
)
def test_one_line_comes_before_the_other(
    first: tuple[str, str], second: tuple[str, str]
) -> None:
    """The Nix n has two slots, o has one."""
    shares = ["n", "o", "n"]

    def turn(who: str, names: str) -> tuple[int, int, str]:
        return precedence(Holder(*who.split()), names.split(), shares)

    assert turn(*first) < turn(*second)


def test_lines_of_equally_many_machines_do_not_wait_for_each_other() -> None:
    one, other = (Holder("1", "7", nix, "100", "waiting", "/d") for nix in "no")
    assert precedence(one, ["b1"], []) == precedence(other, ["b2"], [])


# -- Two lines that share a machine ---------------------------------------------------


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    slots = Slots(str(tmp_path / "current-load"))
    slots.make()
    return slots


@contextlib.contextmanager
def taken(slots: Slots, machine: Machine, nix: str) -> Iterator[None]:
    """All its slots are held by hooks of that Nix."""
    us = os.getpid()
    with contextlib.ExitStack() as stack:
        for number in range(machine.max_jobs):
            path = f"{slots.path}/{machine.slot_prefix}-{number}"
            lock = stack.enter_context(Lock(path))
            assert lock.hold()
            lock.write(f"{us} {start_time(us)} {nix} 1 building /nix/store/x\n")
        yield


@pytest.fixture
def first(slots: Slots) -> Iterator[Callable[[list[Machine], str], Line]]:
    """Has a hook of that Nix stand first in the line for these machines."""
    found = []

    def stand(candidates: list[Machine], nix: str) -> Line:
        need = Need("/nix/store/x.drv", frozenset(), time.time(), candidates)
        line = Line(Outages(slots), Talk(NIX), need)
        line.who = line.who._replace(nix=nix)
        assert line.join() and line.place == 0
        found.append(line)
        return line

    yield stand
    for line in found:
        line.leave()


def test_of_two_lines_that_share_a_machine_one_has_its_free_slot_at_once(
    slots: Slots, first: Callable[[list[Machine], str], Line]
) -> None:
    """Each Nix has two builds on a machine that the other has not."""
    b1, b2, b3 = machines("b1 - - 2\nb2 - - 2\nb3 - - 2")
    with taken(slots, b1, "1.1"), taken(slots, b3, "2.2"):
        lines = first([b1, b2], "1.1"), first([b2, b3], "2.2")
        found = [line.find() for line in lines]
    assert any(found)


def test_a_free_slot_is_not_left_for_ever_to_who_does_not_take_it(
    slots: Slots, first: Callable[[list[Machine], str], Line]
) -> None:
    """To one Nix b1 has one slot, which is taken; to another eight."""
    [small], (large, b2) = machines("b1"), machines("b1 - - 8\nb2")
    with taken(slots, small, "3.3"), taken(slots, b2, "3.3"):
        narrow, wide = first([small], "1.1"), first([large, b2], "2.2")
        assert (narrow.find(), wide.find()) == (None, None)
        assert wide.left_since
        wide.left_since -= LEAVE_S
        slot = wide.find()
    assert slot and slot.machine is large


@pytest.mark.parametrize("pid", ["9" * 20, "-1", "x"])
def test_a_process_that_cannot_be_does_not_live(pid: str) -> None:
    assert not is_alive(pid, "-")


def test_whoever_holds_a_slot_counts_though_its_process_is_in_another_container(
    slots: Slots,
) -> None:
    [b1] = machines("b1")
    with Lock(slots.files(b1)[0]) as lock:
        lock.write("999999999 1 1.1 1 building /nix/store/x\n")
        assert slots.shares() == []
        assert lock.hold()
        assert slots.shares() == ["1.1"]


def test_who_is_not_to_wait_does_not_wait_for_its_turn_to_look(slots: Slots) -> None:
    [b1] = machines("b1")
    text = f"{time.time() + 600}\npaused"
    Path(slots.file(b1, "paused")).write_text(text, encoding="utf-8")
    need = Need("/nix/store/x.drv", frozenset(), time.time(), [b1], impatient=True)
    line = Line(Outages(slots), Talk(NIX), need)
    with Lock(f"{slots.own}/turn-{line.kind}") as turn:
        assert turn.hold()
        with pytest.raises(Away):
            line.wait()


def test_who_waits_in_line_has_a_slot_though_somebody_removes_the_directory(
    slots: Slots, first: Callable[[list[Machine], str], Line]
) -> None:
    """As people do with a lock of Nix's own hook that hangs."""
    fit = machines("b1 - - 2")
    first(fit, calling_process())
    need = Need("/nix/store/x.drv", frozenset(), time.time(), fit)
    line = Line(Outages(slots), Talk(NIX), need)
    assert line.join() and line.place == 1
    shutil.rmtree(slots.path)
    assert line.wait().machine == fit[0]


def test_a_file_that_cannot_be_locked_is_named(slots: Slots) -> None:
    """As on a network file system without locks."""
    lock = Lock(f"{slots.path}/main-lock")
    lock.release()
    with pytest.raises(Error, match="cannot lock .*/main-lock: "):
        lock.hold()
