"""Machines that people pause: builds there come to their end, no new ones go there."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import pytest
from held import HELD, afresh, at_work, let_go, two_builders
from lab import poll
from scene import INSTALLED, SLOTS, Outcome, Scene


@pytest.fixture(scope="module")
def hosts(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    with two_builders(pytestconfig, client_engine) as running:
        yield running


@pytest.fixture
def nix(hosts: Scene) -> Iterator[Scene]:
    with afresh(hosts, slots=2) as nix:
        yield nix


def say(nix: Scene, *words: str, status: int = 0) -> str:
    """What our program says on the client, on either output."""
    done = nix.client.run(INSTALLED, *words, check=False, timeout=120)
    assert done.returncode == status, done
    return done.stdout + done.stderr


def simple(*names: str) -> str:
    """Derivations that tell where they were built."""
    return " ".join(
        ["[", *(f'(mk "{name}" "hostname > $out" {{}})' for name in names), "]"]
    )


def built_on(nix: Scene, outcome: Outcome) -> set[str]:
    assert outcome.status == 0, outcome.log
    return {nix.client.read(path).strip() for path in outcome.outputs}


@pytest.mark.engines
def test_a_paused_machine_gets_no_new_builds_until_it_is_resumed(nix: Scene) -> None:
    say(nix, "pause", "b1")
    assert built_on(nix, nix.build(simple("first", "second"))) == {"b2"}
    assert "b1 was paused by" in say(nix, "resume", "b1")
    assert built_on(nix, nix.build(simple("third"))) == {"b1"}


def test_a_build_that_runs_there_comes_to_its_end(nix: Scene) -> None:
    run = nix.start(f'mk "runs" "{HELD}" {{}}')
    at_work(run, nix.builder)
    assert "building   runs" in say(nix, "pause", "b1")
    let_go(nix.builder)
    assert built_on(nix, run.end()) == {"b1"}


def test_builds_wait_and_go_on_when_it_is_resumed(nix: Scene) -> None:
    nix.machines("b1 - - 2\n")
    say(nix, "pause", "b1", "--for", "2h", "--why", "new disk")
    run = nix.start(simple("w-1", "w-2", "w-3", "w-4"))
    run.says("; waiting for a machine")
    poll(lambda: len(status(nix)["waiting"]) == 2, "two that wait")
    say(nix, "resume", "b1")
    outcome = run.end()
    assert built_on(nix, outcome) == {"b1"}
    said = re.findall(
        r"'ssh://b1' is paused by .* until .* \(new disk\); waiting", outcome.log
    )
    assert len(said) == 1, outcome.log


def status(nix: Scene) -> dict[str, list[dict[str, object]]]:
    said = json.loads(say(nix, "status", "--json"))
    assert isinstance(said, dict)
    return said


def test_who_waits_for_its_slot_does_not_take_it(nix: Scene) -> None:
    nix.machines("b1 - - 1\n")
    run = nix.start(f'[ (mk "one" "{HELD}" {{}}) (mk "two" "{HELD}" {{}}) ]')
    poll(lambda: len(status(nix)["waiting"]) == 1, "one that waits")
    say(nix, "pause", "b1")
    let_go(nix.builder)
    run.says("is paused by")
    assert status(nix)["machines"][0]["taken"] == 0
    say(nix, "resume", "b1")
    assert built_on(nix, run.end()) == {"b1"}


def test_nix_builds_it_itself_if_it_can(nix: Scene) -> None:
    nix.machines("b1 - - 2\n")
    say(nix, "pause", "b1")
    outcome = nix.build(simple("here"), "--max-jobs", "1")
    assert built_on(nix, outcome) == {"client"} and "paused" not in outcome.log


def test_wait_returns_when_nothing_is_built_there_any_more(nix: Scene) -> None:
    run = nix.start(f'mk "last" "{HELD}" {{}}')
    at_work(run, nix.builder)
    waits = nix.launch(INSTALLED, "pause", "b1", "--wait")
    poll(lambda: status(nix)["machines"][0]["away"], "the pause")
    assert not waits.ended
    let_go(nix.builder)
    assert waits.end().status == 0
    assert run.end().status == 0


def test_wait_ends_if_somebody_resumes_the_machine(nix: Scene) -> None:
    run = nix.start(f'mk "on" "{HELD}" {{}}')
    at_work(run, nix.builder)
    waits = nix.launch(INSTALLED, "pause", "b1", "--wait")
    poll(lambda: status(nix)["machines"][0]["away"], "the pause")
    say(nix, "resume", "b1")
    outcome = waits.end()
    assert outcome.status == 1 and "b1 is not paused any more" in outcome.log
    run.interrupt()


def test_check_tries_a_paused_machine_and_says_that_it_is_paused(nix: Scene) -> None:
    nix.machines("b1 - - 2\n")
    say(nix, "pause", "b1", "--why", "new disk")
    said = say(nix, "check")
    assert re.search(r"paused by \S+.* \(new disk\)", said) and "are well" in said
    say(nix, "pause", "b1", "--for", "2h")
    said = nix.client.run(INSTALLED, "check", "--json", "b1").stdout
    [machine] = json.loads(said)["machines"]
    assert time.time() + 7000 < machine["until"] <= time.time() + 7200


def test_an_outage_of_a_paused_machine_is_no_reason_to_give_up(nix: Scene) -> None:
    """It may be down for the very work that it is paused for."""
    nix.machines("b1 - - 2\n")
    late = f"9 {time.time() - 3600:.3f} {time.time():.3f} lasts it is broken"
    say(nix, "pause", "b1")
    nix.client.write(f"{SLOTS}/own/ssh:__b1.down", late)
    run = nix.start(simple("patient"))
    run.says("is paused by")
    nix.client.run("rm", f"{SLOTS}/own/ssh:__b1.down")
    say(nix, "resume", "b1")
    assert built_on(nix, run.end()) == {"b1"}


def test_builds_go_on_when_the_time_of_a_pause_is_over(nix: Scene) -> None:
    nix.machines("b1 - - 2\n")
    say(nix, "pause", "b1", "--for", "3s")
    run = nix.start(simple("timed"))
    run.says("is paused by")
    assert built_on(nix, run.end()) == {"b1"}
    assert not nix.client.path(f"{SLOTS}/own/ssh:__b1.paused").exists()


def test_who_is_neither_root_nor_the_owner_is_told_so(nix: Scene) -> None:
    say(nix, "pause", "b2")
    if not nix.client.path("/home/eve").exists():
        nix.client.add_user("eve")
    for verb in ("pause", "resume"):
        done = nix.client.run(INSTALLED, verb, "b1", check=False, user="eve")
        assert done.returncode == 1 and done.stderr.endswith("; try it as root\n")
        assert "Permission denied" in done.stderr


def test_root_may_pause_a_machine_for_who_owns_the_slots(nix: Scene) -> None:
    """Such as the one user of a Nix without a daemon."""
    load = "/home/eve/load"
    if not nix.client.path("/home/eve").exists():
        nix.client.add_user("eve")
    nix.client.run("install", "-d", "-m700", "-o", "eve", load)
    env = {"NIX_CURRENT_LOAD": load}
    nix.client.run(INSTALLED, "pause", "b1", env=env)
    for user in ("eve", None):
        done = nix.client.run(INSTALLED, "status", env=env, user=user)
        assert "paused by root" in done.stdout
    nix.client.run(INSTALLED, "resume", "b1", env=env, user="eve")
    assert "paused" not in nix.client.run(INSTALLED, "status", env=env).stdout
