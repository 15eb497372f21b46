"""A few thousand cases of tests/fuzz.py, and whether that notices what is wrong."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import fuzz
import pytest

from nix_build_remote import (
    SERVE_REPLY,
    SERVE_VERSION,
    integer,
    wait_readable,
    write_all,
)

BULK = 64 << 20
GREETING = integer(SERVE_REPLY) + integer(SERVE_VERSION)


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_only_our_own_errors_come_out(name: str) -> None:
    with fuzz.prepared() as taker:
        outcomes = fuzz.fuzz(taker, name, range(750, 1050), seed=1).outcomes
    accepted = outcomes.pop("accepted")
    assert accepted > 20 and sum(outcomes.values()) > 20


@pytest.mark.parametrize(
    "name, case, end",
    [
        ("copying", b"x" * BULK, "accepted"),
        ("serve-2.7", GREETING + integer(2**63) + bytes(BULK), "Nonsense"),
    ],
    ids=["a line without end", "a list of paths"],
)
def test_what_has_no_end_takes_no_memory(name: str, case: bytes, end: str) -> None:
    with fuzz.prepared() as taker:
        fuzz.peak_bytes()
        before = fuzz.peak_bytes()
        assert fuzz.outcome(taker, fuzz.TARGETS[name][1], case) == end
        assert fuzz.peak_bytes() - before < BULK / 4


def test_any_limit_of_time_can_be_waited_for() -> None:
    reading = fuzz.pipe_with(b"x")
    assert wait_readable([reading], 365 * 24 * 60 * 60) == {reading}
    os.close(reading)


# -- Whether it notices ---------------------------------------------------------------


def divide(taker: fuzz.Taker, case: bytes) -> bool:
    return len(case) / 0 > 1


def hang(taker: fuzz.Taker, case: bytes) -> bool:
    time.sleep(60)
    return True


def grow(taker: fuzz.Taker, case: bytes) -> bool:
    return b"x" * BULK > case


def believe(taker: fuzz.Taker, case: bytes) -> bool:
    return bool(bytearray(2**40))


def forge(taker: fuzz.Taker, case: bytes) -> bool:
    write_all(2, b"# accept\n")
    return True


@pytest.mark.parametrize(
    "take, words",
    [
        (divide, "ZeroDivisionError"),
        (hang, "TooLong"),
        (grow, f"MemoryError: {BULK // 10**7}"),
        (believe, "MemoryError"),
        (forge, "AssertionError: # accept"),
    ],
)
def test_a_bug_is_noticed(
    take: Callable[[fuzz.Taker, bytes], bool],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if take is hang:
        monkeypatch.setattr(fuzz, "TIME_S", 0.2)
    monkeypatch.setitem(fuzz.TARGETS, "version", (fuzz.TARGETS["version"][0], take))
    with fuzz.prepared() as taker, pytest.raises(fuzz.Wrong, match=words) as caught:
        fuzz.fuzz(taker, "version", range(9), seed=5)
    again = "again: python3 tests/fuzz.py --seed 5 --number 0 version"
    assert again in str(caught.value)
