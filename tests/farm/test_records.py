"""history and metrics, of real builds."""

from __future__ import annotations

import itertools
import json
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from held import HELD, afresh, at_work, let_go, two_builders
from lab import poll
from scene import (
    INSTALLED,
    SLOTS,
    Scene,
    change_hook,
    end_masters,
    go_away,
    stand,
)

pytestmark = pytest.mark.engines

numbers = itertools.count()


@pytest.fixture(scope="module")
def hosts(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    with two_builders(pytestconfig, client_engine) as running:
        yield running


@pytest.fixture
def nix(hosts: Scene) -> Iterator[Scene]:
    with afresh(hosts, slots=1) as nix:
        yield nix


def mk(script: str = "echo > $out", attributes: str = "") -> str:
    return f'mk "in-history-{next(numbers)}" "{script}" {{ {attributes} }}'


def history(nix: Scene, *options: str) -> list[dict[str, Any]]:
    done = nix.client.run(INSTALLED, "history", "--json", *options)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def ends(nix: Scene) -> list[tuple[str, str, str]]:
    return [(b["machine"], b["result"], b["reason"]) for b in history(nix)]


def metrics(nix: Scene) -> dict[str, float]:
    """The samples, without what all of their names begin with."""
    lines = nix.client.run(INSTALLED, "metrics").stdout.splitlines()
    pairs = (line.rpartition(" ") for line in lines if line[0] != "#")
    return {key.removeprefix("nix_build_remote_"): float(n) for key, _, n in pairs}


def test_history_tells_where_time_and_bytes_went(nix: Scene) -> None:
    zeros = 'zeros = builtins.toFile "zeros" (builtins.concatStringsSep "" (builtins.genList (n: "0") 300000));'
    before = time.time()
    nix.build(mk("sleep 1; cat $zeros $zeros > $out", zeros))
    [build] = history(nix)
    assert (build["machine"], build["result"]) == ("ssh://b1", "built")
    assert before < build["when"] < time.time() and build["attempts"] == 1
    assert 300_000 < build["sent"] < 400_000 and 600_000 < build["received"] < 700_000
    # what is measured is rounded, and begins a moment after what it is of
    assert build["building"] > 0.9 and 0 < build["connecting"]
    phases = ("waiting", "connecting", "sending", "building", "fetching")
    assert sum(build[phase] for phase in phases) < time.time() - before + 0.01


def test_history_tells_how_long_a_build_has_waited_in_line(nix: Scene) -> None:
    nix.machines("b1 - - 1\n")
    before = time.time()
    run = nix.start(f"[ ({mk(HELD)}) ({mk(HELD)}) ]")
    at_work(run, nix.builder)
    stand(nix, 1)
    begin = time.monotonic()
    poll(lambda: time.monotonic() > begin + 2, "two seconds")
    let_go(nix.builder)
    assert run.end().status == 0
    whole = time.time() - before
    first, second = history(nix)
    assert min(first["building"], second["waiting"]) > 1.9
    # these follow each other, so that none of them has counted what another one is
    follow = (first["waiting"], first["building"], second["building"])
    assert sum(follow) < whole + 0.01


def test_history_tells_why_builds_have_failed(nix: Scene) -> None:
    nix.build(mk("exit 3"), check=False)
    nix.build(mk("sleep 60"), "--timeout", "1", check=False)
    assert ends(nix) == [
        ("ssh://b1", "failed", ""),
        ("ssh://b1", "timeout", ""),
    ]
    text = nix.client.run(INSTALLED, "history", "--failed", "--machine", "b1").stdout
    assert re.search("^b1 +2 +2 ", text, re.MULTILINE)
    assert history(nix, "--machine", "b2") == []
    poll(lambda: history(nix, "--since", "1s") == [], "builds of long ago only")


def test_history_tells_which_machine_was_lost(nix: Scene) -> None:
    run = nix.start(mk(HELD))
    at_work(run, nix.builder)
    let_go(nix.builders[1])
    go_away(nix.builder)
    assert run.end().status == 0
    lost, built = history(nix)
    assert (lost["machine"], lost["result"], lost["attempts"]) == (
        "ssh://b1",
        "retried",
        1,
    )
    assert (built["machine"], built["result"], built["attempts"]) == (
        "ssh://b2",
        "built",
        2,
    )
    assert lost["derivation"] == built["derivation"]


@pytest.mark.parametrize("how", ["hook terminated", "hook killed", "Nix killed"])
def test_who_is_cancelled_says_so_unless_it_is_killed(nix: Scene, how: str) -> None:
    """As it is with a Nix that is killed (PR_SET_PDEATHSIG)."""
    run = nix.start(mk(HELD))
    at_work(run, nix.builder)
    if how == "Nix killed":
        run.process.kill()
    else:
        number = signal.SIGKILL if how == "hook killed" else signal.SIGTERM
        nix.client.signal(number, *nix.hooks(INSTALLED))
    run.end()
    nix.settle()
    said = how == "hook terminated"
    assert ends(nix) == ([("ssh://b1", "cancelled", "stop")] if said else [])


# Writes half of the line, as much as a full disk may take, and is killed at that moment.
KILLED = """
add = hook.Slots.add_to_history
def killed(slots, line):
    add(slots, line[:60])
    os.kill(os.getpid(), 9)
hook.Slots.add_to_history = killed
"""


def test_a_hook_killed_while_it_writes_spoils_no_line_and_no_build(nix: Scene) -> None:
    nix.build(mk())
    expression = mk()
    change_hook(nix, KILLED)
    run = nix.start(expression)
    assert run.end().status != 0
    change_hook(nix)
    assert nix.build(expression).status == 0
    nix.build(mk())
    assert [end[1] for end in ends(nix)] == ["built"] * len(ends(nix))
    text = nix.client.read(f"{SLOTS}/own/history")
    assert len(ends(nix)) == len(text.split("\n{")) - 2


def test_a_full_disk_costs_no_build_and_spoils_no_later_line(nix: Scene) -> None:
    """Pages are full one after the other: so some line is cut."""
    nix.client.run("mkdir", "-p", SLOTS)
    nix.client.run("mount", "-t", "tmpfs", "-o", "size=400k,mode=700", "x", SLOTS)
    try:
        change_hook(nix, LOOK_S=600)  # one who looks again gives room back meanwhile
        nix.build(mk())
        nix.settle()
        junk = nix.client.path(f"{SLOTS}/own/history")
        line = junk.read_text()
        junk.write_text(line + "\n" + "x" * (4000 - len(line) - 1))
        fill = f"cat /dev/zero > {SLOTS}/full 2> /dev/null"
        nix.client.run("sh", "-c", fill, check=False)
        assert nix.build(mk()).status == 0
        cut = junk.read_text().rpartition("\n")[2]
        assert cut == '{"when":' + cut[8:] and 4000 + 1 + len(cut) == 4096
        nix.client.run("rm", f"{SLOTS}/full")
        assert nix.build(mk()).status == 0
        assert [end[1] for end in ends(nix)] == ["built", "built"]
    finally:
        nix.settle()
        end_masters(nix)
        nix.client.run("umount", SLOTS)


def test_metrics_tell_what_runs_and_who_is_away(nix: Scene) -> None:
    nix.build(mk())
    run = nix.start(mk(HELD))
    at_work(run, nix.builder)
    found = metrics(nix)
    assert found['builds_total{machine="ssh://b1",result="built"}'] == 1
    assert found['slots{machine="ssh://b1"}'] == 1
    assert found['slots_taken{machine="ssh://b1"}'] == 1
    assert found['slots_taken{machine="ssh://b2"}'] == 0
    assert found['up{machine="ssh://b1"}'] == found['up{machine="ssh://b2"}'] == 1
    let_go(nix.builder)
    assert run.end().status == 0
    go_away(nix.builder)
    nix.build(mk())
    assert metrics(nix)['up{machine="ssh://b1"}'] == 0


def test_metrics_count_the_builds_that_wait_in_line(nix: Scene) -> None:
    nix.machines("b1 - - 1\n")
    run = nix.start(f"[ ({mk(HELD)}) ({mk(HELD)}) ]")
    poll(lambda: metrics(nix)["waiting"] == 1, "one that waits")
    let_go(nix.builder)
    assert run.end().status == 0
    assert metrics(nix)["waiting"] == 0


def test_the_tiny_builds_of_check_are_no_history(nix: Scene) -> None:
    checked = json.loads(nix.client.run(INSTALLED, "check", "--json").stdout)
    builds = [machine["findings"][-1] for machine in checked["machines"]]
    assert [build["state"] for build in builds] == ["ok", "ok"]
    assert history(nix) == []


def test_other_users_may_not_read_it(nix: Scene) -> None:
    nix.build(mk())
    if not nix.client.path("/home/eve").exists():
        nix.client.add_user("eve")
    for verb in ("history", "metrics"):
        done = nix.client.run(INSTALLED, verb, check=False, user="eve")
        assert (done.returncode, done.stdout) == (1, "")
        assert "cannot read" in done.stderr and "as root" in done.stderr


def test_the_columns_stand_below_each_other(nix: Scene) -> None:
    nix.build(mk())
    head, build, _, total, _ = nix.client.run(INSTALLED, "history").stdout.splitlines()
    assert re.match(r"\d\d-\d\d \d\d:\d\d:\d\d  \d+\.\d s +[wcsbf]{10}  ", build)
    assert head.index("machine") == build.index("b1") and total.split()[:2] == [
        "b1",
        "1",
    ]
