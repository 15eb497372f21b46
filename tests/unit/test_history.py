"""The history: lines that spoil no others, and what people and Prometheus make of them."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from fakes import HOOK
from lab import poll

import nix_build_remote as hook
from nix_build_remote import Nix, Screen, Slots

DRV = "/nix/store/" + "a" * 32 + "-part.drv"
LINE: dict[str, Any] = {
    "when": 1e9,
    "attempts": 1,
    "derivation": DRV,
    "machine": "ssh://nix@itchy",
    "result": "built",
    "reason": "",
    "waiting": 1.0,
    "connecting": 1.0,
    "sending": 2.0,
    "building": 5.0,
    "fetching": 1.0,
    "sent": 4096,
    "received": 100,
}


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    found = Slots(str(tmp_path / "load"))
    found.make()
    (tmp_path / "load/main-lock").touch()
    return found


def add(slots: Slots, **other: object) -> None:
    slots.add_to_history(json.dumps({**LINE, **other}))


def read(slots: Slots) -> list[dict[str, Any]]:
    return hook.read_history(slots, f"{slots.history}.old", slots.history)


def show(
    verb: str, slots: Slots, capsys: pytest.CaptureFixture[str], **options: object
) -> str:
    """What people get, with a machines file of two lines for one builder."""
    given = {"json": False, "watch": False, "failed": False, "machine": "", "since": ""}
    machines = "nix@itchy x86_64-linux - 2; nix@itchy i686-linux - 4"
    nix = Nix(False, {"builders": machines}, {"NIX_CURRENT_LOAD": slots.path})
    chosen = Namespace(**{**given, **options})
    run = {"history": hook.history, "metrics": hook.metrics}[verb]
    assert run(chosen, nix, Screen(chosen)) == 0
    return capsys.readouterr().out


def table(slots: Slots, capsys: pytest.CaptureFixture[str]) -> list[str]:
    return show("history", slots, capsys).splitlines()


# -- The file -------------------------------------------------------------------------


def test_half_a_line_spoils_no_other(slots: Slots) -> None:
    add(slots, attempts=1)
    with open(slots.history, "a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(LINE)[:40])  # the disk was full, or we were killed
    add(slots, attempts=2)
    assert [build["attempts"] for build in read(slots)] == [1, 2]


@pytest.mark.parametrize(
    "junk",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        "\0" * 4096,
        json.dumps({**LINE, "when": "yesterday"}),
        json.dumps({**LINE, "when": 1e300}),
        json.dumps({**LINE, "waiting": float("nan")}),
        json.dumps({**LINE, "sent": -1}),
        json.dumps({**LINE, "sent": None}),
        json.dumps({**LINE, "machine": ["b1"]}),
        json.dumps({**LINE, "machine": "\ud800"}),
        json.dumps({name: LINE[name] for name in list(LINE)[1:]}),
    ],
)
def test_what_is_no_line_of_ours_is_left_out(junk: str, slots: Slots) -> None:
    slots.add_to_history(junk)
    add(slots)
    assert len(read(slots)) == 1


@pytest.mark.parametrize("kind", ["a directory", "a link", "a fifo"])
def test_other_things_in_its_place_do_no_harm(kind: str, slots: Slots) -> None:
    if kind == "a directory":
        os.mkdir(slots.history)
    elif kind == "a link":
        os.symlink("/dev/null", slots.history)
    else:
        os.mkfifo(slots.history)
    add(slots)
    assert len(read(slots)) == (kind != "a fifo")  # which somebody has to take away


def test_without_its_directory_a_line_is_lost_and_nothing_else(slots: Slots) -> None:
    shutil.rmtree(slots.own)
    add(slots)
    assert read(slots) == []


def test_a_long_line_is_cut(slots: Slots) -> None:
    slots.add_to_history("x" * 10_000)
    add(slots)
    assert os.stat(slots.history).st_size < 4096 + 1000 and len(read(slots)) == 1


def test_its_size_is_bounded_and_the_newest_lines_are_there(
    slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook, "HISTORY_BYTES", 20_000)
    for number in range(1000):
        add(slots, attempts=number)
    names = sorted(os.listdir(slots.own))
    assert names == ["history", "history.old"]
    sizes = [os.stat(f"{slots.own}/{name}").st_size for name in names]
    assert max(sizes) < 21_000 and os.stat(slots.history).st_mode & 0o777 == 0o600
    numbers = [build["attempts"] for build in read(slots)]
    assert len(numbers) > 40 and numbers == [*range(1000)][-len(numbers) :]


# Writes lines of its own number, with a small limit, until it is killed or has written all.
WRITER = """
import json, os, sys
from importlib.machinery import SourceFileLoader
from types import ModuleType

hook = ModuleType("hook")
exec(SourceFileLoader("hook", sys.argv[1]).get_code("hook"), vars(hook))
hook.HISTORY_BYTES = int(sys.argv[4])
slots, line = hook.Slots(sys.argv[2]), json.loads(sys.argv[3])
tests = os.getppid()
print(flush=True)
for number in range(int(sys.argv[5])):
    if os.getppid() != tests:
        break
    slots.add_to_history(json.dumps({**line, "machine": sys.argv[6], "attempts": number}))
"""


def writers(slots: Slots, limit: int, count: int) -> list[subprocess.Popen[bytes]]:
    """Four of them, that have begun."""
    line = json.dumps(LINE)
    words = [sys.executable, "-c", WRITER, str(HOOK), slots.path, line]
    started = [
        subprocess.Popen(
            [*words, str(limit), str(count), f"m{n}"], stdout=subprocess.PIPE
        )
        for n in range(4)
    ]
    for process in started:
        assert process.stdout
        process.stdout.readline()
    return started


def ended(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    return [process.wait() for process in processes if process.communicate()]


def test_of_lines_that_several_write_at_once_none_is_lost(slots: Slots) -> None:
    assert ended(writers(slots, 1 << 30, 500)) == [0] * 4
    found = read(slots)
    for name in ("m0", "m1", "m2", "m3"):
        its = [build["attempts"] for build in found if build["machine"] == name]
        assert its == [*range(500)]


def test_several_that_begin_a_new_file_throw_only_old_lines_away(slots: Slots) -> None:
    """What two at once would rename, one after the other, is a file just begun."""
    assert ended(writers(slots, 20_000, 1000)) == [0] * 4
    assert Path(f"{slots.history}.old").stat().st_size >= 20_000
    assert max(build["attempts"] for build in read(slots)) == 999


def test_nobody_waits_to_begin_a_new_file(
    slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook, "HISTORY_BYTES", 1000)
    add(slots)
    with open(slots.history, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as who is about to rename it
        for _ in range(9):
            add(slots)
        assert os.listdir(slots.own) == ["history"]
    add(slots)
    assert os.listdir(slots.own) == ["history.old"] and len(read(slots)) == 11


def test_who_comes_too_late_to_begin_a_new_file_leaves_that_alone(
    slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the moment when it has the lock, another has renamed the file and begun a new one."""
    monkeypatch.setattr(hook, "HISTORY_BYTES", 1000)
    for number in range(3):
        add(slots, attempts=number)
    hold = hook.Lock.hold

    def late(lock: hook.Lock) -> bool:
        os.rename(slots.history, f"{slots.history}.old")
        Path(slots.history).write_text(f"\n{json.dumps(LINE)}", encoding="utf-8")
        return hold(lock)

    monkeypatch.setattr(hook.Lock, "hold", late)
    add(slots, attempts=3)
    monkeypatch.undo()
    assert [build["attempts"] for build in read(slots)] == [0, 1, 2, 3, 1]


def is_whole(line: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(json.loads(line))
    return False


def test_whoever_is_killed_while_writing_spoils_no_other_line(
    slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may cut the line of who is killed between two pages, but hardly ever does."""
    monkeypatch.setattr(hook, "HISTORY_BYTES", 1 << 30)
    for size in range(10_000, 60_000, 10_000):
        started = writers(slots, 1 << 30, 1_000_000)
        history = Path(slots.history)
        poll(lambda: history.exists() and history.stat().st_size > size, "lines")  # noqa: B023
        for process in started:
            process.kill()
        assert ended(started) == [-signal.SIGKILL] * 4
    add(slots, attempts=7)
    lines = Path(slots.history).read_text(encoding="utf-8").split("\n")[1:]
    assert json.loads(lines[-1])["attempts"] == 7
    assert sum(not is_whole(line) for line in lines) <= 5 * 4


# -- What is written ------------------------------------------------------------------


def test_a_build_that_no_machine_could_do_ends_for_the_reason_of_the_last() -> None:
    error = hook.NotHere("no space: disk is full", hook.BuildBroken("it failed"))
    assert error.verdict.meaning == "FULL"


# -- For people -----------------------------------------------------------------------


def test_history_shows_a_line_for_each_build_and_one_for_each_machine(
    slots: Slots, capsys: pytest.CaptureFixture[str]
) -> None:
    add(slots)
    add(slots, result="retried", reason="sessionlost", machine="ssh://scratchy")
    add(slots, result="failed", building=95)
    lines = [re.sub(" +", " ", line) for line in table(slots, capsys)]
    assert lines[0] == "ended took time sent received machine build result"
    assert [line.partition(" ")[2].partition(" ")[2] for line in lines[1:4]] == [
        "10.0 s wcssbbbbbf 4 KiB 100 B nix@itchy part built",
        "10.0 s wcssbbbbbf 4 KiB 100 B scratchy part retried: sessionlost",
        "1 min 40 s bbbbbbbbbb 4 KiB 100 B nix@itchy part failed",
    ]
    assert lines[4:] == [
        "machine builds failures waited time",
        "nix@itchy 2 1 2 s sbbbbbbbbb",
        "scratchy 1 1 1 s wcssbbbbbf",
        "time: w waiting, c connecting, s sending, b building, f fetching",
    ]


@pytest.mark.parametrize("word", ["itchy", "nix@itchy", "ssh://nix@itchy"])
def test_history_can_be_of_one_machine(
    word: str, slots: Slots, capsys: pytest.CaptureFixture[str]
) -> None:
    add(slots, attempts=1)
    add(slots, attempts=2, machine="ssh://nix@scratchy")
    add(slots, attempts=3, machine="ssh://nix@itchy?compress=true")
    text = show("history", slots, capsys, json=True, machine=word)
    assert [build["attempts"] for build in json.loads(text)] == [1, 3]


def test_history_can_be_of_failures(
    slots: Slots, capsys: pytest.CaptureFixture[str]
) -> None:
    for result in ("built", "failed", "timeout", "error", "retried", "cancelled"):
        add(slots, result=result)
    text = show("history", slots, capsys, json=True, failed=True)
    results = [build["result"] for build in json.loads(text)]
    assert results == ["failed", "timeout", "error", "retried"]


def test_history_can_be_of_the_last_days(
    slots: Slots, capsys: pytest.CaptureFixture[str]
) -> None:
    add(slots, attempts=1, when=time.time() - 90_000)
    add(slots, attempts=2, when=time.time() - 80_000)
    text = show("history", slots, capsys, json=True, since="1d")
    assert [build["attempts"] for build in json.loads(text)] == [2]


def test_nothing_in_a_name_reaches_the_terminal_but_its_letters(
    slots: Slots, capsys: pytest.CaptureFixture[str]
) -> None:
    add(slots, machine="ssh://\x1b[31mb1\x07\n\rx", reason="\x1b]0;title\x07")
    text = show("history", slots, capsys)
    assert text.replace("\n", "").isprintable() and len(text.splitlines()) == 5


def test_a_bar_has_its_length_if_there_was_any_time() -> None:
    for spent in itertools.product([0, 1, 7.5], repeat=5):
        text = hook.time_bar([dict(zip(hook.PHASES, spent))])
        assert len(text) == (10 if any(spent) else 0)
        assert "".join(sorted(text, key="wcsbf".index)) == text


def test_before_any_build_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slots = Slots(str(tmp_path / "none"))
    assert table(slots, capsys) == ["no such builds are noted"]


# -- For Prometheus -------------------------------------------------------------------

# Of its text format, version 0.0.4, what we use: a name, labels in any order, a number.
LABEL = r'[a-zA-Z_]\w*="(?:[^"\\\n]|\\[\\"n])*"'
SAMPLE = re.compile(rf"([a-z_:]+)(?:\{{({LABEL}(?:,{LABEL})*)\}})? (\S+)")


def parsed(text: str) -> dict[str, dict[str, float]]:
    """The values of each metric by its labels; every family stands together, with HELP and
    TYPE before it, and no sample comes twice."""
    families: dict[str, dict[str, float]] = {}
    lines = text.splitlines()
    assert text.endswith("\n")
    for number, line in enumerate(lines):
        if line.startswith("# HELP "):
            name = line.split()[2]
            assert name not in families and len(line.split()) > 3
            kind = "counter" if name.endswith("_total") else "gauge"
            assert lines[number + 1] == f"# TYPE {name} {kind}"
            families[name] = {}
        elif not line.startswith("# TYPE "):
            sample = SAMPLE.fullmatch(line)
            assert sample and sample[1] == [*families][-1], line
            assert sample[2] not in families[sample[1]]
            families[sample[1]][sample[2]] = float(sample[3])
    return {name.removeprefix("nix_build_remote_"): v for name, v in families.items()}


def test_metrics_count_builds_seconds_and_bytes(
    slots: Slots, capsys: pytest.CaptureFixture[str]
) -> None:
    add(slots)
    add(slots, waiting=2.25)
    add(slots, result="failed")
    found = parsed(show("metrics", slots, capsys))
    itchy = 'machine="ssh://nix@itchy"'
    assert found["builds_total"] == {
        f'{itchy},result="built"': 2,
        f'{itchy},result="failed"': 1,
    }
    assert found["seconds_total"][f'{itchy},phase="waiting"'] == 4.25
    assert found["bytes_total"] == {
        f'{itchy},direction="received"': 300,
        f'{itchy},direction="sent"': 3 * 4096,
    }


def test_metrics_tell_of_slots_once_for_each_machine(
    slots: Slots, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two lines of one builder have the same slots."""
    found = parsed(show("metrics", slots, capsys))
    [(labels, count)] = found["slots"].items()
    assert count == 4 and [*found["slots_taken"].values()] == [0]
    assert found["up"] == {labels: 1}


def test_metrics_of_any_name_can_be_read(
    slots: Slots, capsys: pytest.CaptureFixture[str]
) -> None:
    add(slots, machine='ssh://a\\b"c\nd\te\x00ü')
    text = show("metrics", slots, capsys)
    assert len(parsed(text)["builds_total"]) == 1
    if tool := shutil.which("promtool"):  # of Debian's package prometheus
        subprocess.run([tool, "check", "metrics"], input=text, text=True, check=True)


def test_counters_that_lose_lines_begin_again(
    slots: Slots, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prometheus takes a smaller counter for one that began again at 0, and counts all of
    it as new: so it must not be the rest of what there was."""
    monkeypatch.setattr(hook, "HISTORY_BYTES", 20_000)
    before = 0.0
    for _ in range(200):
        add(slots)
        counts = parsed(show("metrics", slots, capsys))["builds_total"]
        assert sum(counts.values()) in (before + 1, 0)
        before = sum(counts.values())
