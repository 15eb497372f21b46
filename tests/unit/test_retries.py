"""Where a build goes on after each failure: design's table of errors, without a farm."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from nix_build_remote import (
    AWAY_TIMEOUT_S,
    LOSSES,
    PAUSE_LIMIT_S,
    PAUSE_S,
    Away,
    BuildBroken,
    BuildFailed,
    Error,
    Late,
    Machine,
    Need,
    Nix,
    NotHere,
    Retries,
    Retry,
    SessionLost,
    Stuck,
    Unreachable,
    heard,
)

NIX = Nix(False, {"system": "x86_64-linux"}, {})
B1, B2, B3 = (Machine.parse(f"machines:{n}", f"b{n}", NIX) for n in (1, 2, 3))

REFUSED = heard(Unreachable, "Connection refused")
DENIED = heard(Unreachable, "Permission denied (publickey).")
LOST = heard(SessionLost, "Connection to b1 closed by remote host.")
ODD = heard(SessionLost, "nix-store: strange")
STUCK = Stuck("waiting for lock on '/nix/store/x.lock'")
BROKEN = BuildBroken("broken")
NOT_HERE = NotHere("broken", BROKEN)
FULL = NotHere("No space left on device", BROKEN)


class Step(NamedTuple):
    """What fails next, and where the build should go: hosts, or the error it ends with."""

    machine: Machine
    error: Error
    goes_to: str
    phase: str = "connecting"


def retries_on(*machines: Machine) -> Retries:
    return Retries(Need("/nix/store/x.drv", frozenset(), 0, [*machines]))


def failed(
    retries: Retries,
    took: float,
    machine: Machine,
    error: Error,
    phase: str = "connecting",
) -> Retry:
    return retries.after(error, machine, phase=phase, took=took)


def where(retry: Retry) -> str:
    return " ".join(machine.host for machine in retry.need.machines)


def play(retries: Retries, steps: list[Step]) -> list[Retry]:
    """Each failure in turn; all but the last must go where it says."""
    turns = []
    for step in steps:
        turns.append(failed(retries, 1, step.machine, step.error, step.phase))
        assert where(turns[-1]) == step.goes_to, step
    return turns


@pytest.mark.parametrize(
    "steps",
    [
        [Step(B1, REFUSED, "b2 b3"), Step(B2, REFUSED, "b3")],
        [Step(B1, LOST, "b2 b3 b1", "sending"), Step(B1, LOST, "b2 b3", "sending")],
        [Step(B1, LOST, "b2 b3 b1", "building"), Step(B1, LOST, "b2 b3", "building")],
        [Step(B1, LOST, "b1", "fetching"), Step(B1, LOST, "b2 b3", "sending")],
        [Step(B1, Late("no answer"), "b1"), Step(B1, Late("no answer"), "b2 b3")],
        [Step(B1, NOT_HERE, "b2 b3", "building")],
        [Step(B1, FULL, "b2 b3", "sending"), Step(B2, FULL, "b3", "sending")],
        [
            Step(B1, DENIED, "b2 b3"),
            Step(B2, REFUSED, "b3"),
            Step(B3, DENIED, "b1 b2 b3"),
        ],
        [Step(B1, LOST, "b1"), Step(B1, Away("others"), "b2 b3")],
        [Step(B1, STUCK, "b2 b3", "building"), Step(B2, STUCK, "b3", "building")],
    ],
    ids=[
        "unreachable: another",
        "lost before the build: any, then another",
        "lost in the build: any, then another",
        "lost with the outputs: once more, then another",
        "silent: once more, then another",
        "could not do it: another",
        "full disks: each other",
        "all failed, one may come back: any",
        "away when it was to be tried once more: another",
        "a lock is held there: another, at once",
    ],
)
def test_a_build_goes_on(steps: list[Step]) -> None:
    play(retries_on(B1, B2, B3), steps)


@pytest.mark.parametrize(
    "steps, last, end",
    [
        ([Step(B1, DENIED, "b2")], Step(B2, DENIED, ""), DENIED),
        (
            [Step(B1, NOT_HERE, "b2", "sending")],
            Step(B2, NOT_HERE, "", "sending"),
            BROKEN,
        ),
        ([Step(B1, FULL, "b2", "sending")], Step(B2, FULL, "", "sending"), BROKEN),
        ([Step(B1, NOT_HERE, "b2", "sending")], Step(B1, Away("others"), ""), BROKEN),
    ],
    ids=["all refuse for good", "two could not", "all disks full", "no other is there"],
)
def test_a_build_ends(steps: list[Step], last: Step, end: Error) -> None:
    retries = retries_on(B1, B2)
    play(retries, steps)
    with pytest.raises(type(end), match=str(end)[:9]):
        failed(retries, 9, last.machine, last.error, last.phase)


def test_the_only_machine_that_could_not_do_it_ends_the_build() -> None:
    with pytest.raises(BuildBroken):
        failed(retries_on(B1), 0, B1, NOT_HERE, "building")


def test_a_failed_build_is_no_failure_of_a_machine() -> None:
    """Its error says so by itself, and is not asked about: 100 and 101 end a build."""
    assert not isinstance(BuildFailed("x"), (Unreachable, SessionLost, NotHere, Away))


@pytest.mark.parametrize("built", [False, True])
def test_a_machine_that_may_hold_locks_for_a_lost_session_is_shunned(
    built: bool,
) -> None:
    retry = failed(retries_on(B1, B2), 0, B1, LOST, "fetching" if built else "building")
    assert retry.need.shunned == (None if built else B1)


def test_a_build_ends_after_some_losses() -> None:
    retries, steps = retries_on(B1), [Step(B1, LOST, "b1", "building")] * LOSSES
    play(retries, steps)
    with pytest.raises(SessionLost):
        failed(retries, 9, B1, LOST, "building")


def test_losses_that_the_network_is_to_blame_for_do_not_count() -> None:
    play(retries_on(B1), [Step(B1, LOST, "b1", "sending")] * (LOSSES + 9))


def test_a_lock_that_is_held_is_no_loss() -> None:
    steps = [Step(B1, STUCK, "b2", "building"), Step(B2, STUCK, "b1 b2", "building")]
    play(retries_on(B1, B2), steps * LOSSES)


def test_odd_losses_before_a_build_count() -> None:
    retries = retries_on(B1)
    play(retries, [Step(B1, ODD, "b1", "sending")] * LOSSES)
    with pytest.raises(SessionLost):
        failed(retries, 9, B1, ODD, "sending")


def test_a_build_is_tried_only_so_long() -> None:
    retries = retries_on(B1)
    for _ in range(2):  # what the first took does not count
        failed(retries, AWAY_TIMEOUT_S - 100, B1, REFUSED)
    with pytest.raises(Unreachable):
        failed(retries, 101, B1, REFUSED)


def test_who_has_waited_long_for_a_slot_is_not_given_up_at_the_next_failure() -> None:
    """b1 is lost in a build, which then waits for b2, whose slots are taken; a slot of b1 is
    free first, and that is tried in vain at once."""
    turns = play(
        retries_on(B1, B2),
        [Step(B1, LOST, "b2 b1", "building"), Step(B1, REFUSED, "b2")],
    )
    assert turns[-1].pause_s == 0


def test_the_pauses_count_as_time_in_which_it_is_tried() -> None:
    retries, paused = retries_on(B1), 0.0
    with pytest.raises(Unreachable):
        while True:
            paused += failed(retries, 0, B1, REFUSED).pause_s
    assert AWAY_TIMEOUT_S < paused < 2 * AWAY_TIMEOUT_S


def test_the_time_counts_anew_when_a_build_has_begun() -> None:
    retries = retries_on(B1)
    failed(retries, 0, B1, REFUSED)
    for _ in range(2):
        failed(retries, AWAY_TIMEOUT_S + 1, B1, LOST, "building")


def test_pauses_grow_and_come_only_when_all_have_failed() -> None:
    retries = retries_on(B1, B2)
    turns = play(retries, [Step(B1, REFUSED, "b2"), Step(B2, REFUSED, "b1 b2")] * 9)
    assert [retry.pause_s for retry in turns[::2]] == [0] * 9
    pauses = [retry.pause_s for retry in turns[1::2]]
    assert (
        pauses[:3] == [PAUSE_S, 2 * PAUSE_S, 4 * PAUSE_S]
        and pauses[-1] == PAUSE_LIMIT_S
    )


@pytest.mark.parametrize(
    "steps, outage, renew, impatient",
    [
        ([Step(B1, REFUSED, "b2")], True, True, False),
        ([Step(B1, LOST, "b1")], False, True, True),
        ([Step(B1, LOST, "b2 b1", "sending")], False, False, True),
        ([Step(B1, LOST, "b1"), Step(B1, LOST, "b2")], True, True, False),
        ([Step(B1, NOT_HERE, "b2", "sending")], False, False, True),
    ],
    ids=["unreachable", "no greeting", "greeted", "no greeting twice", "could not"],
)
def test_what_else_a_failure_means(
    steps: list[Step], outage: bool, renew: bool, impatient: bool
) -> None:
    retry = play(retries_on(B1, B2), steps)[-1]
    assert (retry.outage, retry.renew, retry.need.impatient) == (
        outage,
        renew,
        impatient,
    )
