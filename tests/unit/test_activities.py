"""What nix-store tells of its activities, as JSON: which lines of a log that stands for."""

from __future__ import annotations

import json

import pytest

from nix_build_remote import Activities


def event(**fields: object) -> bytes:
    """As Nix writes one: keys in their order, no spaces, UTF-8 as it is."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"@nix {text}\n".encode()


def line(text: str) -> bytes:
    return event(action="result", fields=[text], id=7, type=101)


def heard(data: bytes) -> bytes:
    activities = Activities()
    return activities.plain(data) + activities.plain(b"")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        "üñ",
        'with " and \\',
        "a\ttab",
        "\x1b[31mred",
        '"],"id":7,"type":101}',
    ],
)
def test_a_line_of_the_log_is_as_the_build_wrote_it(text: str) -> None:
    assert heard(line(text)) == f"{text}\n".encode()


@pytest.mark.parametrize("size", [1, 7, 64])
def test_lines_may_come_in_pieces(size: int) -> None:
    whole, activities = line("one") + line('t"wo'), Activities()
    pieces = [whole[n : n + size] for n in range(0, len(whole), size)]
    assert b"".join(map(activities.plain, pieces)) == b'one\nt"wo\n'


@pytest.mark.parametrize(
    "data",
    [
        b"ssh's own words\n",
        b"\n",
        b"no end",
        b"@nix nonsense\n",
        b"@nix {}\n",
        b'@nix {"action":' + 100_000 * b"[" + b"\n",
        b'@nix {"action":"result","type":101}\n',
        b'@nix {"action":"result","fields":[],"type":101}\n',
        b"\xff\n",
    ],
)
def test_what_is_no_event_passes_as_it_is(data: bytes) -> None:
    assert heard(data).strip() == data.strip()


def test_a_phase_is_told_as_a_build_here_tells_it() -> None:
    said = heard(event(action="result", fields=["build"], id=7, type=104))
    assert said == b'@nix {"action":"setPhase","phase":"build"}\n'


def test_a_message_is_its_words() -> None:
    red = "\x1b[31;1merror:\x1b[0m no"
    assert heard(event(action="msg", level=0, msg=red)) == b"error: no\n"


def test_a_copy_is_told_as_without_json() -> None:
    said = heard(
        event(action="start", id=7, level=3, text="copying path 'P'", type=100)
    )
    assert said == b"copying path 'P'...\n"


def test_all_other_events_are_no_lines() -> None:
    start = event(action="start", id=7, level=3, text="building 'P'", type=105)
    progress = event(action="result", fields=[1, 2, 0, 0], id=7, type=105)
    assert heard(start + progress + event(action="stop", id=7)) == b""


WAITS = "waiting for lock on '\x1b[35;1m/nix/store/x\x1b[0m'"


def test_a_lock_that_is_waited_for_is_known_until_it_is_had() -> None:
    activities = Activities()
    activities.plain(event(action="start", id=7, level=1, text=WAITS, type=111))
    assert activities.lock.words == "waiting for lock on '/nix/store/x'"
    activities.plain(event(action="stop", id=8))
    assert activities.lock.words
    activities.plain(event(action="stop", id=7))
    assert not activities.lock.words


def test_to_wait_for_a_machine_is_no_lock() -> None:
    activities = Activities()
    text = "waiting for a machine to build 'P'"
    activities.plain(event(action="start", id=7, level=3, text=text, type=111))
    assert not activities.lock.words


def test_a_line_without_an_end_takes_only_so_much_memory() -> None:
    activities = Activities()
    said = activities.plain(b"x" * activities.LIMIT_BYTES)
    assert said and not activities.begun


@pytest.mark.parametrize("action, kind", [("start", 104), ("result", 105)])
def test_an_event_that_tells_nothing_is_not_read(action: str, kind: int) -> None:
    """Though it looks like one that is: to read JSON takes time."""
    activities = Activities()
    assert activities.is_dull(event(action=action, id=1, type=kind)[:-1])
    assert not activities.is_dull(event(action="result", fields=["x"], id=1, type=104))


def test_the_end_of_a_lock_is_heard_of() -> None:
    activities = Activities()
    text = "waiting for lock on '/nix/store/x'"
    activities.plain(event(action="start", id=7, level=1, text=text, type=111))
    assert activities.lock.words
    activities.plain(event(action="stop", id=7))
    assert not activities.lock.words


@pytest.mark.parametrize("words", ["is not valid", "does not exist in store"])
def test_that_what_was_not_built_is_not_there_is_no_line(words: str) -> None:
    """As Nix and Lix say it, when a build has failed whose output was asked for with it."""
    activities = Activities()
    activities.absent = ("/nix/store/x",)
    assert activities.plain(f"error: path '/nix/store/x' {words}\n".encode()) == b""
    assert activities.are_over


@pytest.mark.parametrize(
    "words",
    [
        "error: /nix/store/x/bin/tool was not stripped, going on",
        "  error: path '/nix/store/x' is not valid",
        "error: path '/nix/store/y' is not valid",
        "path '/nix/store/x' is not there yet",
    ],
)
def test_a_line_of_a_log_that_only_names_the_output_is_one(words: str) -> None:
    activities = Activities()
    activities.absent = ("/nix/store/x",)
    said = f"{words}\n".encode()
    assert activities.plain(said) == said and not activities.are_over


def test_that_it_is_not_there_may_be_said_in_colours() -> None:
    activities = Activities()
    activities.absent = ("/nix/store/x",)
    path = "\x1b[35;1m/nix/store/x\x1b[0m"
    red = f"\x1b[31;1merror:\x1b[0m path '{path}' is not valid"
    assert activities.plain(event(action="msg", level=0, msg=red)) == b""
    assert activities.are_over
