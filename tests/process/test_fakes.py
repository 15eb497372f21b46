"""The hook as a process, started as Nix starts it, with fake programs around it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fakes import (
    CAP_A,
    CAP_A_DRV,
    CAP_B,
    CAP_B_DEV,
    CAP_B_DRV,
    COPY,
    HOOK,
    Answer,
    Client,
    write_program,
)
from lab import poll

import nix_build_remote as hook

# Bad manners, and the words in which the user is to hear of them.
BEFORE_ACCEPT = {
    "refuse": "root@b1: Permission denied (publickey).",
    "away": "Connection refused",
    "exit 127": "nix-store: not found",
    "noise": "Welcome",
    "half a greeting": "nix-store: out of memory",
    "too old": "1.6",
    "huge string": "9223372036854775808 bytes",
    "endless list": "gone",
    "flood": "no end",
}
AFTER_ACCEPT = {
    "huge string": "9223372036854775808 bytes",
    "endless list": "gone",
    "half-way": "Connection to b1 closed by remote host.",
    "copy fails": "the disk is full",
}


@pytest.fixture
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a name that is short enough for control sockets to be in it."""
    return tmp_path_factory.mktemp("nix")


@pytest.fixture
def new(root: Path) -> Client:
    return Client(root, old=False)


@pytest.fixture
def old(root: Path) -> Client:
    return Client(root, old=True)


@pytest.fixture(params=["1.x", "2.x"])
def client(request: pytest.FixtureRequest, root: Path) -> Client:
    return Client(root, old=request.param == "1.x")


def misbehave(client: Client, manners: str) -> Client:
    client.environ["FAKE_MANNERS"] = manners
    return client


def read_free(slot: Path) -> bytes:
    """What a slot's file says; BlockingIOError if it is taken."""
    with slot.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file.read()


# -- A build that works ---------------------------------------------------------------


def test_a_build_ends_with_0(client: Client) -> None:
    assert client.build().status == 0


def test_a_build_gets_one_reply(client: Client) -> None:
    assert client.build().replies == ["accept"]


def test_the_builders_stderr_is_the_log(client: Client) -> None:
    assert client.build().log == "log of the build\n"


def test_new_nix_gets_a_name_right_after_accept(new: Client) -> None:
    assert new.build().after_accept[0] == "ssh://root@b1"


def test_old_nix_gets_no_name(old: Client) -> None:
    assert "root@b1" not in old.build().lines


def test_messages_to_new_nix_are_json_after_accept(new: Client) -> None:
    _, *lines = new.build(CAP_B_DRV, CAP_A).after_accept
    assert lines
    for line in lines:
        assert line.startswith("@nix ") and json.loads(line[5:])["action"]


def test_messages_to_old_nix_are_plain_lines(old: Client) -> None:
    lines = old.build(CAP_B_DRV, CAP_A).after_accept
    assert lines and not [line for line in lines if line.startswith(("@", "#"))]


def activities(lines: list[str], action: str) -> list[int]:
    found = [json.loads(line[5:]) for line in lines if line.startswith("@nix {")]
    return [message["id"] for message in found if message["action"] == action]


def test_new_nix_is_told_of_activities_each_stopped_once(new: Client) -> None:
    lines = new.build(CAP_B_DRV, CAP_A).lines
    started = activities(lines, "start")
    assert len(started) >= 5 and sorted(set(started)) == started
    assert sorted(activities(lines, "stop")) == started


@pytest.mark.parametrize("word", ["connecting", "sending", "building", "fetching"])
def test_an_activity_says_what_is_done_and_where(word: str, new: Client) -> None:
    lines = new.build(CAP_B_DRV, CAP_A).lines
    text, *_ = [line for line in lines if f'"text":"{word} ' in line]
    assert "cap-b" in text and "root@b1" in text


def test_old_build_traces_name_derivation_and_machine(old: Client) -> None:
    old.arguments[2] = "1"
    traces = [line for line in old.build().lines if line.startswith("@ ")]
    events = ("build-remote", "build-remote-start", "build-remote-done")
    assert traces == [f"@ {event} {CAP_A_DRV} root@b1" for event in events]


def test_inputs_that_are_there_are_not_sent(client: Client) -> None:
    client.have.write_text(CAP_A, encoding="utf-8")
    client.build(CAP_B_DRV, CAP_A)
    assert not [call for call in client.calls() if "--to" in call.arguments]


def test_inputs_that_are_missing_are_sent(client: Client) -> None:
    client.build(CAP_B_DRV, CAP_A)
    (call,) = (call for call in client.calls() if "--to" in call.arguments)
    assert call.arguments[-1] == CAP_A


def test_outputs_are_fetched(client: Client) -> None:
    client.build(CAP_B_DRV)
    (call,) = (call for call in client.calls() if "--from" in call.arguments)
    assert call.arguments[-2:] == [CAP_B, CAP_B_DEV]


def test_output_names_are_understood(new: Client) -> None:
    new.run(new.request(CAP_B_DRV) + new.lists([], ["dev"]))
    (call,) = (call for call in new.calls() if "--from" in call.arguments)
    assert call.arguments[-1] == CAP_B_DEV and CAP_B not in call.arguments


FLOATING = """Derive([("out","","r:sha256","")],[],[],"x86_64-linux","/bin/sh",\
["-c","echo > $out"],[("out","/1rz4g4znpzjwh1xymhjpm42vipw92pr73vdgl6xs1hycac8kf2n9")])"""


@pytest.mark.parametrize(
    "version, reply", [("2.7.0", "decline"), ("2.8.0", "accept"), ("2.35.2", "accept")]
)
def test_floating_derivations_are_sent_away_from_2_8_on(
    version: str, reply: str, client: Client
) -> None:
    client.environ["FAKE_NIX"] = version
    drv = CAP_A_DRV.replace("cap-a", "floating")
    (client.store / Path(drv).name).write_text(FLOATING, encoding="utf-8")
    assert client.run(client.request(drv)).replies == [reply]


LIX = "(Lix, like Nix) 2.93.4\nSystem type: x86_64-linux\nFeatures: signed-caches"


@pytest.mark.parametrize(
    "version, held", [("2.28.5", CAP_A), ("2.29.0", ""), (LIX, CAP_A)]
)
def test_held_locks_are_named_up_to_2_28_and_for_lix(
    version: str, held: str, client: Client
) -> None:
    client.environ["FAKE_NIX"] = version
    client.build()
    assert client.calls()[-1].held_locks == held


@pytest.mark.parametrize("version, data", [("2.28.5", b""), ("2.29.0", b"d")])
def test_output_locks_are_retired_from_2_29(
    version: str, data: bytes, client: Client
) -> None:
    client.environ["FAKE_NIX"] = version
    with (client.store / f"{Path(CAP_A).name}.lock").open("x+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client.build()
        assert lock.read() == data


def test_ssh_is_asked_for_one_session(client: Client) -> None:
    client.build()
    (call,) = client.sessions()
    assert call.arguments[-5:] == ["--", "root@b1", "nix-store", "--serve", "--write"]


def test_ssh_gets_our_options_and_nix_copy_closure_needs_none(client: Client) -> None:
    client.machines.write_text("ssh://root@b1:2222\n", encoding="utf-8")
    client.build()
    (call,) = client.sessions()
    assert "-oPort=2222" in call.arguments and not client.calls()[-1].sshopts


def test_slot_files_are_those_of_the_stock_hook(client: Client) -> None:
    client.build(CAP_B_DRV, CAP_A)
    host = "root@b1" if client.old else "ssh:__root@b1"
    slot = f"x86_64-linux-{host}" if client.old else host
    names = {f"{slot}-0", f"{slot}-1", f"{host}.upload-lock", "main-lock"}
    assert {path.name for path in client.slots.iterdir() if path.is_file()} == names


def test_a_slot_is_empty_and_free_afterwards(client: Client) -> None:
    client.build()
    (path,) = client.slots.glob("*b1-*0")
    assert read_free(path) == b""


@pytest.mark.parametrize(
    "status, exit_status", [("3", 100), ("6", 100), ("8", 101), ("9", 1), ("2", 0)]
)
def test_the_builders_status_becomes_an_exit_status(
    status: str, exit_status: int, client: Client
) -> None:
    client.environ["FAKE_STATUS"] = status
    assert client.build().status == exit_status


def test_a_failed_build_is_reported_with_its_machine_and_words(client: Client) -> None:
    client.environ["FAKE_STATUS"] = "3"
    messages = client.build().messages
    assert CAP_A_DRV in messages and "root@b1" in messages
    assert "it went wrong" in messages


# -- Dialects -------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [["--extra"], ["a", "b"], ["nix_build_remote.py"]])
def test_extra_arguments_may_stand_before_the_verbosity(
    extra: list[str], new: Client
) -> None:
    new.arguments = [*extra, "3"]
    assert new.build().status == 0


def test_three_arguments_are_nix_1_0(old: Client) -> None:
    old.arguments = ["x86_64-linux", "0", "0"]
    assert old.build().status == 0


def test_nothing_to_do_ends_with_0(client: Client) -> None:
    answer = client.run(b"")
    assert (answer.status, answer.lines) == (0, [])


def test_anything_but_try_ends_with_0(new: Client) -> None:
    answer = new.run(b"\4" + b"\0" * 7 + b"quit" + b"\0" * 4)
    assert (answer.status, answer.lines) == (0, [])


def test_settings_that_break_off_end_with_1() -> None:
    command = [sys.executable, str(HOOK), "3"]
    done = subprocess.run(command, input=b"\1\0\0", capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (1, b"")


def test_several_requests_get_a_reply_each(client: Client) -> None:
    darwin = client.request(system="x86_64-darwin")
    accepted = client.request() + client.lists([], [CAP_A])
    assert client.run(darwin * 3 + accepted).replies == ["decline"] * 3 + ["accept"]


@pytest.mark.parametrize("willing, reply", [(True, "decline"), (False, "postpone")])
def test_without_a_free_slot_the_answer_is(
    willing: bool, reply: str, client: Client
) -> None:
    client.machines.write_text("root@b1 x86_64-linux - 1\n", encoding="utf-8")
    client.build()
    (path,) = client.slots.glob("*b1-*0")
    with path.open("r+b") as slot:
        fcntl.flock(slot, fcntl.LOCK_EX)
        assert client.run(client.request(willing=willing)).replies == [reply]


def test_required_features_are_heard(client: Client) -> None:
    machines = "root@b1 x86_64-linux\nroot@b2 x86_64-linux - 1 1 - kvm,perf\n"
    client.machines.write_text(machines, encoding="utf-8")
    asked = client.request(features=["kvm", "perf"])
    client.run(asked + client.lists([], [CAP_A]))
    assert "root@b2" in client.calls()[0].arguments


# -- Bad manners ----------------------------------------------------------------------


class Failed(NamedTuple):
    """What came of a machine with bad manners."""

    client: Client
    answer: Answer
    words: str


@pytest.fixture(scope="module", params=["1.x", "2.x"])
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=BEFORE_ACCEPT)
def refused(
    request: pytest.FixtureRequest,
    dialect: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Failed:
    """Three requests, to a machine that no session can be had with."""
    client = Client(tmp_path_factory.mktemp("nix"), old=dialect == "1.x")
    client.constants["PAUSE_S"] = 60.0  # all three come before it is tried again
    answer = misbehave(client, request.param).run(client.request() * 3)
    return Failed(client, answer, BEFORE_ACCEPT[request.param])


@pytest.fixture(scope="module", params=AFTER_ACCEPT)
def lost(
    request: pytest.FixtureRequest,
    dialect: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Failed:
    """One build, on a machine that fails in the middle of it."""
    client = connected(Client(tmp_path_factory.mktemp("nix"), old=dialect == "1.x"))
    answer = misbehave(client, request.param).build(CAP_B_DRV, CAP_A)
    return Failed(client, answer, AFTER_ACCEPT[request.param])


class TestAMachineThatFailsBeforeAccept:
    def test_gets_every_request_a_decline(self, refused: Failed) -> None:
        assert refused.answer.replies == ["decline"] * 3

    def test_is_tried_once(self, refused: Failed) -> None:
        """With one master and, if that does not fail, with one session."""
        kinds = [call.is_master for call in refused.client.calls()]
        assert kinds in ([True], [True, False])

    def test_is_named(self, refused: Failed) -> None:
        assert "root@b1" in refused.answer.messages

    def test_is_shown_in_its_own_words(self, refused: Failed) -> None:
        assert refused.words in refused.answer.messages

    def test_is_no_bug_of_ours(self, refused: Failed) -> None:
        assert "Traceback" not in refused.answer.messages

    def test_leaves_its_slot_free(self, refused: Failed) -> None:
        (path,) = refused.client.slots.glob("*b1-0")
        assert read_free(path) == b""


class TestAMachineThatFailsAfterAccept:
    def test_ends_the_hook_with_1(self, lost: Failed) -> None:
        assert lost.answer.status == 1

    def test_gets_no_second_reply(self, lost: Failed) -> None:
        assert lost.answer.replies == ["accept"]

    def test_is_named(self, lost: Failed) -> None:
        assert "root@b1" in "\n".join(lost.answer.after_accept[not lost.client.old :])

    def test_is_shown_in_its_own_words(self, lost: Failed) -> None:
        assert lost.words in lost.answer.messages

    def test_is_told_in_the_right_dialect(self, lost: Failed) -> None:
        lines = lost.answer.after_accept[not lost.client.old :]
        json_lines = [line for line in lines if line.startswith("@nix {")]
        assert lines and json_lines == ([] if lost.client.old else lines)

    def test_is_no_bug_of_ours(self, lost: Failed) -> None:
        assert "Traceback" not in lost.answer.messages

    def test_leaves_its_slot_free(self, lost: Failed) -> None:
        (path,) = lost.client.slots.glob("*b1-0")
        assert read_free(path) == b""


def test_the_next_machine_is_tried(client: Client) -> None:
    machines = "root@b1 x86_64-linux - 1 2\nroot@b2 x86_64-linux\n"
    client.machines.write_text(machines, encoding="utf-8")
    client.environ["FAKE_HOST"] = "b1"
    misbehave(client, "refuse").build()
    assert [call.destination for call in client.sessions()] == ["root@b2"]


# -- Builds that the machine could not do ---------------------------------------------


@pytest.mark.parametrize(("status", "end"), [("6", 100), ("9", 1)])
def test_a_machines_own_failure_is_tried_once_on_another(
    client: Client, status: str, end: int
) -> None:
    client.machines.write_text(TWO, encoding="utf-8")
    client.environ["FAKE_STATUS"] = status
    answer = client.build()
    hosts = [call.destination for call in client.sessions()]
    assert (answer.status, hosts) == (end, ["root@b1", "root@b2"])


@pytest.mark.parametrize(("status", "end"), [("6", 100), ("9", 1), ("3", 100)])
def test_without_another_machine_it_is_final(
    client: Client, status: str, end: int
) -> None:
    client.environ["FAKE_STATUS"] = status
    assert (client.build().status, len(client.sessions())) == (end, 1)


def test_a_failed_build_is_not_tried_elsewhere(client: Client) -> None:
    client.machines.write_text(TWO, encoding="utf-8")
    client.environ["FAKE_STATUS"] = "3"
    assert (client.build().status, len(client.sessions())) == (100, 1)


# -- Limits that a builder does not keep ----------------------------------------------


def limited(client: Client, timeout: int = 0, silence: int = 0) -> Client:
    """Nix's limits, and a hook that sees to them at once."""
    if client.old:
        client.arguments[1:] = [str(silence), "0", str(timeout)]
    client.settings["timeout"] = str(timeout)
    client.settings["max-silent-time"] = str(silence)
    client.constants["DAEMON_MARGIN_S"] = 1
    return client


@pytest.mark.parametrize("limits", [(1, 0), (0, 1)], ids=["timeout", "silence"])
def test_a_build_that_does_not_end_is_ended(
    client: Client, limits: tuple[int, int]
) -> None:
    answer = misbehave(limited(client, *limits), "one line, no end").build()
    assert answer.status == 101 and "limits" in answer.messages


def test_silence_is_counted_from_the_last_line(client: Client) -> None:
    answer = misbehave(limited(client, silence=4), "a line each second").build()
    assert answer.status == 0


@pytest.mark.parametrize("limits", [(1, 0), (0, 1)], ids=["timeout", "silence"])
def test_a_build_that_never_says_a_word_is_ended(
    client: Client, limits: tuple[int, int]
) -> None:
    answer = misbehave(limited(client, *limits), "no line, no end").build()
    assert answer.status == 101 and "limits" in answer.messages


# -- Settings -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"), [("build-users-group", "builders"), ("min-free", "7")]
)
def test_a_setting_that_matters_reaches_the_copying_program(
    new: Client, name: str, value: str
) -> None:
    new.settings[name] = value
    new.build()
    copies = [call.arguments for call in new.calls() if "--from" in call.arguments]
    assert f"--option {name} {value}" in " ".join(copies[0])


def test_an_ssh_that_was_to_be_shared_and_is_not_ends_though_nobody_sees_to_it(
    client: Client,
) -> None:
    """As it finds the socket of another, when somebody has removed the locks meanwhile."""
    client.machines.write_text(TWO, encoding="utf-8")
    client.environ["FAKE_HOST"] = "b2"  # which is connected to in advance
    misbehave(client, "cannot share").build()
    noted = Path(f"{client.journal}.master")
    poll(lambda: noted.exists() and noted.read_text("utf-8"), "its number")
    pid = noted.read_text("utf-8").strip()
    start = hook.start_time(int(pid))
    poll(lambda: not hook.is_alive(pid, start), "its end", timeout=30)


def test_outputs_are_fetched_again_if_what_fetches_them_is_cut_off(new: Client) -> None:
    """As when a `cat` of ours is killed by who looks for memory."""
    answer = misbehave(new, "cut off once").build()
    assert answer.status == 0
    assert "unexpected end-of-file (nix-copy-closure, status 1); try" in answer.messages


def test_other_settings_do_not_reach_the_copying_program(new: Client) -> None:
    new.settings["post-build-hook"] = "/somebody/elses"
    new.build()
    copies = [call.arguments for call in new.calls() if "--from" in call.arguments]
    assert "post-build-hook" not in copies[0]


# -- Early replies --------------------------------------------------------------------


def connected(client: Client) -> Client:
    """Its machines have live connections, over which it has built something."""
    misbehave(client, "share").build()
    return client


TWO = "root@b1 x86_64-linux - 1 2\nroot@b2 x86_64-linux\n"


def test_a_live_connection_gets_an_accept_without_a_session(client: Client) -> None:
    misbehave(connected(client), "refuse").run(client.request())
    assert len(client.sessions()) == 1


def test_the_only_machine_is_tried_again_and_again_after_an_early_accept(
    client: Client,
) -> None:
    client.constants |= {"PAUSE_LIMIT_S": 0.4, "AWAY_TIMEOUT_S": 8.0}
    misbehave(connected(client), "away").build()
    tries = [call for call in client.calls() if call.is_session or call.is_master]
    assert len(tries) > 4  # one master was there before


def test_what_will_not_pass_by_itself_is_not_waited_for(client: Client) -> None:
    misbehave(connected(client), "refuse").build()
    assert len(client.sessions()) == 2  # the first was there before; then ssh says no


def test_another_machine_builds_what_one_lost_after_an_early_accept(
    client: Client,
) -> None:
    client.machines.write_text(TWO, encoding="utf-8")
    client.environ["FAKE_HOST"] = "b1"
    answer = misbehave(connected(client), "refuse").build()
    hosts = [call.destination[-2:] for call in client.sessions()]
    # On a slow machine, whether b1 has come back may have been looked at, too.
    assert (answer.status, hosts[:2], hosts[-1]) == (0, ["b1", "b1"], "b2")


def test_a_loss_after_an_early_accept_is_told_with_its_words(client: Client) -> None:
    client.machines.write_text(TWO, encoding="utf-8")
    client.environ["FAKE_HOST"] = "b1"
    messages = misbehave(connected(client), "refuse").build().messages
    assert "root@b1" in messages and BEFORE_ACCEPT["refuse"] in messages


def test_a_build_that_fails_is_not_tried_again(client: Client) -> None:
    client.machines.write_text(TWO, encoding="utf-8")
    client.environ["FAKE_STATUS"] = "3"
    client.build()
    assert len(client.sessions()) == 1


def test_a_machine_without_a_live_connection_is_asked_before_the_reply(
    client: Client,
) -> None:
    client.run(client.request())
    assert len(client.sessions()) == 1


def test_the_likeliest_machines_are_connected_at_the_same_time(client: Client) -> None:
    client.machines.write_text(TWO, encoding="utf-8")
    misbehave(client, "share").build()

    def masters() -> set[str]:
        return {call.destination for call in client.calls() if call.is_master}

    poll(lambda: masters() == {"root@b1", "root@b2"}, "both masters")


# -- Waiting --------------------------------------------------------------------------


@contextlib.contextmanager
def somebody_waits(client: Client) -> Iterator[None]:
    """Somebody of the Nix that will ask, which is us, has the only place."""
    us = f"{os.getpid()}.{hook.start_time(os.getpid())}"
    (slot,) = client.slots.glob("*b1-*0")
    name = f"line-{hook.checksum(slot.name[:-2])}-{hook.checksum(us)}.0"
    with (client.slots / "own" / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def busy(client: Client, *, waiting: bool = False) -> Iterator[contextlib.ExitStack]:
    """The only slot is taken; and so is, if somebody is `waiting`, the only place."""
    client.machines.write_text("root@b1 x86_64-linux - 1\n", encoding="utf-8")
    client.build()
    with contextlib.ExitStack() as held:
        (path,) = client.slots.glob("*b1-*0")
        fcntl.flock(held.enter_context(path.open("r+b")), fcntl.LOCK_EX)
        if waiting:
            held.enter_context(somebody_waits(client))
        yield held


def unable(client: Client) -> Client:
    """It can never build anything itself."""
    if client.old:
        client.arguments[0] = "i686-linux"
    client.settings["max-jobs"] = "0"
    return client


def test_what_nix_can_never_build_waits_in_line(client: Client) -> None:
    with busy(unable(client)):
        assert client.run(client.request(willing=False)).replies == ["accept"]


def test_new_nix_is_told_that_it_waits_for_a_builder(new: Client) -> None:
    with busy(unable(new)):
        answer = new.run(new.request(willing=False))
        assert answer.after_accept[0] == "waiting for a builder"


def test_when_the_line_is_full_the_answer_is_postpone(client: Client) -> None:
    with busy(unable(client), waiting=True):
        assert client.run(client.request(willing=False)).replies == ["postpone"]


def test_no_newcomer_takes_a_slot_while_somebody_waits(client: Client) -> None:
    unable(client)
    client.machines.write_text("root@b1 x86_64-linux - 1\n", encoding="utf-8")
    client.build()
    with somebody_waits(client):
        client.run(client.request(willing=False))
    assert len(client.sessions()) == 1


# -- The history ----------------------------------------------------------------------


def history(client: Client) -> list[dict[str, Any]]:
    file = client.slots / "own/history"
    lines = file.read_text(encoding="utf-8").split("\n")[1:] if file.exists() else []
    return [json.loads(line) for line in lines]


def ends(client: Client) -> list[tuple[str, str, str, int]]:
    """Of each line of the history: machine, result, reason, attempts."""
    names = "machine", "result", "reason", "attempts"
    return [tuple(build[name] for name in names) for build in history(client)]


@pytest.mark.parametrize(
    ("status", "result", "reason"),
    [
        ("0", "built", ""),
        ("3", "failed", ""),
        ("8", "timeout", ""),
        ("9", "error", "buildbroken"),
    ],
)
def test_a_build_is_in_the_history_with_its_result(
    client: Client, status: str, result: str, reason: str
) -> None:
    client.environ["FAKE_STATUS"] = status
    client.build()
    name = "root@b1" if client.old else "ssh://root@b1"
    assert ends(client) == [(name, result, reason, 1)]


def test_each_attempt_is_in_the_history(new: Client) -> None:
    new.machines.write_text(TWO, encoding="utf-8")
    new.environ["FAKE_HOST"] = "b1"
    misbehave(new, "half-way").build()
    assert ends(new) == [
        ("ssh://root@b1", "retried", "sessionlost", 1),
        ("ssh://root@b2", "built", "", 2),
    ]


def test_a_build_that_ends_with_a_lost_machine_is_an_error(new: Client) -> None:
    misbehave(new, "half-way").build()
    *attempts, (_, result, reason, number) = ends(new)
    assert {attempt[1] for attempt in attempts} == {"retried"}
    assert (result, reason, number) == ("error", "sessionlost", len(attempts) + 1)


def test_what_is_declined_is_not_in_the_history(client: Client) -> None:
    misbehave(client, "away").build()
    assert ends(client) == []


def test_the_time_to_log_in_is_not_waiting(client: Client) -> None:
    """Of several builds, since a machine may stand still at any moment."""
    for _ in range(5):
        client.build()
    builds = history(client)
    assert len(builds) == 5
    assert sum(build["waiting"] < build["connecting"] for build in builds) > 2


def test_a_question_that_was_declined_does_not_count_for_the_next(new: Client) -> None:
    """The first one has to wait for a slot, for a time that no phase of the second has."""
    new.constants["PATIENCE_S"] = 3
    with busy(new):
        new.machines.write_text(
            "root@b1 x86_64-linux - 1\nroot@b2 x86_64-linux - 1 1 - kvm\n",
            encoding="utf-8",
        )
        first = new.request(willing=False)
        second = new.request(features=["kvm"]) + new.lists([], [CAP_A])
        new.settings["system-features"] = "kvm"
        before = time.monotonic()
        assert new.run(first + second).replies == ["postpone", "accept"]
        whole = time.monotonic() - before
    build = history(new)[-1]
    assert sum(build[phase] for phase in hook.PHASES) < whole - 3 + 0.01


def test_nix_does_not_build_itself_what_a_builder_is_about_to_have_a_slot_for(
    new: Client,
) -> None:
    """It is just being asked how it is, and does not answer before we say so here."""
    new.constants |= {"PATIENCE_S": 60, "LOOK_WAIT_S": 60}
    path = new.slots / "own" / "ssh:__root@b1.look"
    question = f"{' ' * hook.PROBE_HEAD}\nend\nasked {time.time():.3f}\n"
    with busy(new), ThreadPoolExecutor() as pool:
        new.machines.write_text("root@b1 x86_64-linux - 2\n", encoding="utf-8")
        del new.environ["NIX_BLIND_HOOK"]
        with hook.Lock(str(path)) as lock:
            assert lock.hold()
            lock.write(question)
            answer = pool.submit(new.build)
            time.sleep(1)  # if the hook is slower than that, it finds the answer
            lock.write(f"{question}builds 0\nend\n")
        assert answer.result().replies == ["accept"]


def is_waiting(client: Client) -> bool:
    places = client.slots.glob("own/line-*.0")
    return any(" waiting " in place.read_text(encoding="utf-8") for place in places)


def test_a_line_is_waited_in_also_after_a_machine_that_was_away(new: Client) -> None:
    new.environ["FAKE_HOST"] = "b2"
    with busy(unable(new)) as slot, ThreadPoolExecutor() as pool:
        new.machines.write_text(TWO, encoding="utf-8")
        asked = new.request(willing=False) + new.lists([], [CAP_A])
        answer = pool.submit(misbehave(new, "away").run, asked)
        poll(lambda: answer.done() or is_waiting(new), "its place in line")
        time.sleep(1)
        slot.close()
        assert "Connection refused" in answer.result().messages
    build = history(new)[-1]
    assert build["machine"] == "ssh://root@b1" and build["waiting"] > 0.9


def test_a_nix_that_ends_before_it_says_what_to_build_has_cancelled(
    client: Client,
) -> None:
    client.run(client.request())
    assert [end[1:] for end in ends(client)] == [("cancelled", "eoferror", 0)]


# -- What breaks here -----------------------------------------------------------------


def with_a_bug(client: Client) -> Client:
    source = client.hook.read_text(encoding="utf-8")
    client.hook.unlink()
    start, end = source.split('\nif __name__ == "__main__"', 1)
    bug = f'{start}\nrank = None\nif __name__ == "__main__"{end}'
    client.hook.write_text(bug, encoding="utf-8")
    return client


def test_a_bug_before_the_reply_still_gives_a_decline(client: Client) -> None:
    assert with_a_bug(client).run(client.request() * 2).replies == ["decline"] * 2


def test_a_bug_shows_its_traceback(client: Client) -> None:
    assert "Traceback" in with_a_bug(client).run(client.request()).messages


def test_a_program_that_cannot_be_started_gives_one_decline(client: Client) -> None:
    write_program(client.copy, "", interpreter="/nonexistent/python")
    assert client.run(client.request()).replies == ["decline"]


def test_a_bug_after_accept_gives_no_second_reply(client: Client) -> None:
    assert misbehave(client, "vanish").build().replies == ["accept"]


def test_a_bug_after_accept_ends_the_hook_with_1(client: Client) -> None:
    assert misbehave(client, "vanish").build().status == 1


def test_a_bug_after_accept_is_told_to_new_nix_in_json(new: Client) -> None:
    _, *lines = misbehave(new, "vanish").build().after_accept
    assert lines and not [line for line in lines if line[:6] != "@nix {"]


def test_a_slot_directory_that_cannot_be_made_gives_a_decline_that_names_it(
    client: Client,
) -> None:
    client.environ["NIX_CURRENT_LOAD"] = "/proc/nobody/can/make/this"
    answer = client.run(client.request() * 2)
    assert answer.replies == ["decline"] * 2
    assert answer.messages.count("/proc/nobody/can/make/this") == 1
    assert "Traceback" not in answer.messages


def test_a_slot_directory_that_is_a_file_is_left_alone(client: Client) -> None:
    client.slots.write_text("a file", encoding="utf-8")
    answer = client.run(client.request())
    assert answer.replies == ["accept"] and str(client.slots) in answer.messages
    assert client.slots.read_text(encoding="utf-8") == "a file"


def test_a_missing_derivation_gives_a_decline_that_names_it(client: Client) -> None:
    drv = CAP_A_DRV.replace("cap-a", "missing")
    answer = client.run(client.request(drv))
    assert answer.replies == ["decline"] and drv in answer.messages


def test_a_relative_nix_remote_systems_gives_a_decline(old: Client) -> None:
    old.environ["NIX_REMOTE_SYSTEMS"] = "etc/machines"
    assert old.run(old.request()).replies == ["decline"]


def test_a_relative_nix_remote_systems_is_named(old: Client) -> None:
    old.environ["NIX_REMOTE_SYSTEMS"] = "etc/machines"
    messages = old.run(old.request()).messages
    assert "NIX_REMOTE_SYSTEMS" in messages and "'etc/machines'" in messages
    assert "absolute" in messages


@pytest.mark.parametrize(
    "name", ["a;b", "a#b", "a b "], ids=["semicolon", "hash", "space"]
)
def test_nix_remote_systems_may_name_any_file(name: str, old: Client) -> None:
    path = old.machines.rename(old.root / name)
    old.environ["NIX_REMOTE_SYSTEMS"] = str(path)
    old.build()
    assert [call.destination for call in old.sessions()] == ["root@b1"]


def test_without_machines_new_nix_is_told_for_good(new: Client) -> None:
    new.machines.write_text("", encoding="utf-8")
    assert new.run(new.request()).replies == ["decline-permanently"]


def test_without_machines_old_nix_is_told_each_time(old: Client) -> None:
    old.machines.unlink()
    assert old.run(old.request() * 2).replies == ["decline"] * 2


@pytest.mark.parametrize("good", ["root@b1 x86_64-darwin", ""], ids=["rest", "all bad"])
def test_a_bad_line_is_complained_of_once(good: str, client: Client) -> None:
    client.machines.write_text(f"b9:ssh\n{good}\n", encoding="utf-8")
    messages = client.run(client.request(willing=False) * 3).messages
    assert messages.count(f"{client.machines}:1: 'b9:ssh'") == 1


def test_a_bad_line_is_complained_of_once_to_a_nix_that_starts_many_hooks(
    client: Client,
) -> None:
    with client.machines.open("a", encoding="utf-8") as file:
        file.write("b9:ssh\n")
    messages = [client.build().messages for _ in range(2)]
    assert ["'b9:ssh'" in text for text in messages] == [True, False]


def test_no_machine_for_it_is_told_with_a_reason_for_each(client: Client) -> None:
    messages = client.run(client.request(system="x86_64-darwin")).messages
    assert "root@b1" in messages and "x86_64-darwin" in messages


def test_nix_debug_hook_says_how_each_machine_was_judged(client: Client) -> None:
    client.environ["NIX_DEBUG_HOOK"] = "1"
    messages = client.run(client.request(features=["kvm"])).messages
    assert "root@b1" in messages and "kvm" in messages


def test_nix_debug_hook_shows_each_command_line_to_be_pasted(client: Client) -> None:
    client.environ["NIX_DEBUG_HOOK"] = "1"
    lines = client.build(CAP_B_DRV, CAP_A).lines
    texts = [
        json.loads(line[5:]).get("msg", "") if line[:5] == "@nix " else line
        for line in lines
    ]
    told = [text.partition("] + ")[2] for text in texts if text[:1] == "["]
    commands = [shlex.split(line) for line in told if line]
    pasted = [[w for w in words if not w.startswith("NIX_")] for words in commands]
    made = [[call.program, *call.arguments] for call in client.calls()]
    unnoted = (["--version"], ["-G"], ["bs=1"])  # by the fakes
    shown = [words[1:] for words in pasted if words[1:2] not in unnoted]
    # some are started beside each other
    assert sorted(shown) == sorted(words[1:] for words in made)


# -- A Nix that sends few of its settings ---------------------------------------------

SHOW_CONFIG = """
import os, sys

with open({journal!r}, "a") as journal:
    print(repr(("nix", sys.argv[1:], "", "")), file=journal)
if sys.argv[1:] != ["show-config"]:
    sys.exit("error: no such command")
print(os.environ["SETTINGS"])
"""


@pytest.fixture
def lix(new: Client) -> Client:
    """As Lix 2.92 and 2.93: what nix.conf says, their hook has to read for itself."""
    new.program("bin/nix", SHOW_CONFIG)
    told = {**new.settings, "system": "riscv64-linux", "max-jobs": "0"}
    told["repl-overlays"] = ""
    new.environ["FAKE_NIX"] = LIX
    new.environ["SETTINGS"] = "\n".join(f"{n} = {text}" for n, text in told.items())
    new.settings = {n: new.settings[n] for n in ("store", "max-jobs")}
    new.settings["builders-use-substitutes"] = "true"
    return new


def test_what_was_not_sent_is_asked_for(lix: Client) -> None:
    answer = lix.build()
    assert (answer.status, answer.replies[0]) == (0, "accept"), answer
    assert list(lix.slots.glob("ssh:__root@b1-????????????????-0"))


def test_it_is_asked_for_once_by_all_hooks_of_a_nix(lix: Client) -> None:
    for _ in range(3):
        assert lix.build().status == 0
    asked = [call.arguments for call in lix.calls() if call.program == "nix"]
    assert asked == [["config", "show"], ["show-config"]]


def test_what_that_nix_warns_of_its_programs_do_not_repeat(lix: Client) -> None:
    answer = lix.build()
    assert answer.status == 0 and "deprecated" not in answer.messages, answer


def test_what_was_sent_counts_more(lix: Client) -> None:
    lix.settings["builders"] = ""
    assert lix.build().replies == ["decline-permanently"]


@pytest.mark.parametrize("name", ["system", "experimental-features"])
def test_it_is_asked_for_whatever_the_command_line_sets(lix: Client, name: str) -> None:
    lix.settings.update({name: "x86_64-linux", "max-jobs": "0"})
    assert lix.build().replies[0] == "accept"


def asked_twice(lix: Client) -> Answer:
    """As Lix 2.92 and 2.93, which may build it too, asks when it has been declined."""
    lix.settings["system"] = "x86_64-linux"
    asks = [lix.request(willing=willing) for willing in (False, True)]
    return lix.run(b"".join(asks))


def test_what_no_machine_can_be_reached_for_lix_builds_at_once(lix: Client) -> None:
    assert asked_twice(misbehave(lix, "away")).replies == ["decline", "decline"]


def test_what_no_slot_is_free_for_lix_builds_at_once(lix: Client) -> None:
    with busy(lix):
        assert asked_twice(lix).replies == ["decline", "decline"]


def test_of_what_no_slot_is_free_for_lix_builds_as_many_as_it_may(lix: Client) -> None:
    with busy(lix):
        lix.settings["system"] = "x86_64-linux"
        ask = lix.request(willing=False)
        assert lix.run(ask + ask).replies == ["decline", "postpone"]


def test_a_nix_that_does_not_tell_builds_by_itself(lix: Client) -> None:
    (lix.prefix / "bin/nix").write_text("#!/bin/false\n", encoding="utf-8")
    answer = lix.build()
    assert answer.replies == ["decline-permanently"]
    assert "no machines are known" in answer.messages


# -- Programs -------------------------------------------------------------------------


def test_nix_copy_closure_in_our_own_prefix_comes_first(client: Client) -> None:
    other = client.program("other/nix-copy-closure", COPY)
    client.environ["PATH"] = f"{other.parent}:{client.environ['PATH']}"
    client.build()
    assert client.calls()[-1].program == str(client.copy)


# -- People ---------------------------------------------------------------------------


def people(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HOOK), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments, start",
    [
        ("--help", "nix_build_remote.py - a build hook"),
        ("--version", "nix_build_remote"),
    ],
)
def test_people_get_an_answer_on_stdout(arguments: str, start: str) -> None:
    done = people(arguments)
    assert done.stdout.startswith(start) and (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [[], ["--hepl"], ["help"]], ids=str)
def test_people_who_err_are_told_so(arguments: list[str]) -> None:
    done = people(*arguments)
    assert done.returncode == 2 and "--help" in done.stderr and not done.stdout
