"""Slots: how many builds a machine gets, which machine, and who holds what."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from lab import HANGS_S, Host, is_taken, poll
from scene import (
    INSTALLED,
    PRELUDE,
    SLOTS,
    Run,
    Scene,
    change_hook,
    registered,
    scene,
    version,
)

POLL = ("--option", "build-poll-interval", "1")
SOON_S = LONG_S = HANGS_S

# Notes down on the builder how many builds run there as it begins; none ends before the
# test says so.
COUNTED = """
  mkdir -p /tmp/running
  touch /tmp/running/$name
  ls /tmp/running | wc -l >> /tmp/counts
  while ! [ -e /tmp/go ]; do sleep 0.02; done
  sleep 0.2
  rm /tmp/running/$name
  echo > $out
"""
HELD = 'mk "held" "sleep 600" {}'


class Holder(NamedTuple):
    """What a slot file says."""

    pid: int
    started: str
    since: float
    phase: str
    derivation: str


def many(label: str, count: int) -> str:
    one = f"mk \"{label}${{toString n}}\" ''{COUNTED}'' {{}}"
    return f"builtins.genList (n: {one}) {count}"


def most_at_once(builder: Host) -> int:
    return max(map(int, builder.read("/tmp/counts").split()))


def fill(*builders: Host) -> None:
    """Wait until two builds run on each, and then let all go on."""
    for builder in builders:
        running = builder.path("/tmp/running").glob
        poll(lambda: len([*running("*")]) > 1, f"two builds on {builder.name}")  # noqa: B023
    for builder in builders:
        builder.write("/tmp/go", "")


def slot_directory(nix: Scene) -> Path:
    return nix.client.path(SLOTS)


def slot_files(nix: Scene) -> list[Path]:
    names = [path for path in slot_directory(nix).iterdir() if path.is_file()]
    return [path for path in names if re.search(r"-\d+$", path.name)]


def holders(nix: Scene) -> list[Holder]:
    if not slot_directory(nix).exists():
        return []
    lines = [path.read_text().split() for path in slot_files(nix)]
    return [
        Holder(int(a), b, float(d), e, f) for a, b, _, d, e, f in filter(None, lines)
    ]


def building(nix: Scene) -> Holder:
    """The one hook whose build runs on the builder, once it does."""

    def found() -> Holder | None:
        at_work = [holder for holder in holders(nix) if holder.phase == "building"]
        return at_work[0] if at_work and runs(nix.builder, "sleep 600") else None

    holder = poll(found, "the build", timeout=SOON_S)
    assert holder
    return holder


def runs(host: Host, command: str) -> bool:
    return any(process.cmdline.startswith(command) for process in host.processes())


def sessions(client: Host) -> list[int]:
    wanted = "nix-store --serve"
    return [found.pid for found in client.processes() if wanted in found.cmdline]


def gone(host: Host, command: str) -> None:
    poll(lambda: not runs(host, command), f"the end of {command}", timeout=SOON_S)


def ended(host: Host, pid: int) -> None:
    poll(lambda: not is_alive(host, pid), f"the end of {pid}", timeout=SOON_S)


def is_alive(host: Host, pid: int) -> bool:
    return any(process.pid == pid for process in host.processes())


def take(nix: Scene, machine: str, slots: int) -> list[int]:
    """Hold a machine's first slots, as other hooks would; close them to let go."""
    directory = slot_directory(nix)
    directory.mkdir(mode=0o700, exist_ok=True)
    paths = [directory / f"ssh:__{machine}-{number}" for number in range(slots)]
    descriptors = [os.open(path, os.O_RDWR | os.O_CREAT, 0o600) for path in paths]
    for descriptor in descriptors:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptors


@pytest.fixture(scope="module")
def hosts(client_engine: str) -> Iterator[Scene]:
    with scene(client_engine, client_engine, client_engine) as running:
        change_hook(running)
        yield running


@pytest.fixture
def nix(hosts: Scene) -> Iterator[Scene]:
    """No slot files, nothing counted, and no build from an earlier test."""
    hosts.client.run("rm", "-rf", SLOTS)
    for builder in hosts.builders:
        builder.run("rm", "-rf", "/tmp/running", "/tmp/counts", "/tmp/go")
    yield hosts
    for process in hosts.client.processes():
        if "nix-build " in process.cmdline:
            hosts.client.signal(signal.SIGKILL, process.pid)
    hosts.settle()


# -- How many -------------------------------------------------------------------------


def test_two_nix_processes_never_exceed_the_slots(nix: Scene) -> None:
    nix.machines("b1 - - 2\nb2 - - 2\n")
    both = [nix.start(many(label, 12), *POLL) for label in ("left", "right")]
    fill(*nix.builders)
    assert [run.end(LONG_S).status for run in both] == [0, 0]
    assert [most_at_once(builder) for builder in nix.builders] == [2, 2]


@pytest.mark.engines
def test_ours_and_the_stock_hook_together_never_exceed_the_slots(nix: Scene) -> None:
    nix.machines("b1 - - 2\n")
    nix.client.write("/tmp/stock.nix", PRELUDE + many("stock", 5))
    stock = nix.client.popen("nix-build", "/tmp/stock.nix", "--no-out-link", *POLL)
    ours = nix.start(many("ours", 5), *POLL)
    fill(nix.builder)
    assert (ours.end(LONG_S).status, stock.wait(LONG_S)) == (0, 0)
    assert most_at_once(nix.builder) == 2


def test_two_lines_for_one_host_share_its_slots(nix: Scene) -> None:
    nix.machines("b1 - - 2\nb1 - - 2 4\n")
    run = nix.start(many("shared", 6), *POLL)
    fill(nix.builder)
    assert run.end().status == 0
    assert most_at_once(nix.builder) == 2


@pytest.mark.engines
@pytest.mark.parametrize(
    "uri",
    [
        "root@b1",
        "ssh-ng://b1",
        "ssh://b1?ssh-key=/root/.ssh/id_ed25519&compress=true",
        "root@ADDRESS",
        "ssh://[ADDRESS]",
    ],
)
def test_slot_files_have_the_stock_hooks_names(nix: Scene, uri: str) -> None:
    if version(nix.client.engine.name) < (2, 4):  # whose own hook cannot reach that
        uri = uri.replace("[ADDRESS]", "ADDRESS")
    uri = uri.replace("ADDRESS", nix.builder.address6)
    nix.machines(f"{uri} - - 2\n")
    nix.client.write("/tmp/stock.nix", PRELUDE + with_input(f"stock {uri}"))
    nix.client.run("nix-build", "/tmp/stock.nix", "--no-out-link")
    stock = names(nix)
    nix.client.run("rm", "-rf", SLOTS)
    nix.build(with_input(f"ours {uri}"))
    assert names(nix) == stock


def names(nix: Scene) -> set[str]:
    """Of what the stock hook knows: it has neither lines nor connections of its own."""
    return {path.name for path in slot_directory(nix).iterdir() if path.is_file()}


def with_input(content: str) -> str:
    """A build that needs something sent, and so the upload lock."""
    source = f'builtins.toFile "source" "{content}"'
    return f'mk "sent" "cat $source > $out" {{ source = {source}; }}'


# -- Where the inputs are -------------------------------------------------------------


def link(number: int) -> str:
    """A derivation that says where it and all that it depends on were built."""
    before = link(number - 1) if number else '"/dev/null"'
    script = "cat $before > $out; hostname >> $out"
    return f'(mk "link-{number}" "{script}" {{ before = {before}; }})'


def first_on_b2(nix: Scene, number: int) -> None:
    nix.machines("b2 - - 2\n")
    nix.build(link(number))
    nix.machines("b1 - - 2\nb2 - - 2\n")


def test_a_chain_stays_on_one_machine_though_another_is_idle_and_listed_first(
    nix: Scene,
) -> None:
    first_on_b2(nix, 0)
    built = nix.client.read(nix.build(link(3)).output)
    assert built.split() == ["b2"] * 4


def test_a_machine_with_the_inputs_but_more_load_does_not_come_first(
    nix: Scene,
) -> None:
    first_on_b2(nix, 4)
    for descriptor in take(nix, "b2", 1):
        with open(descriptor, "rb"):
            built = nix.client.read(nix.build(link(5)).output)
    assert built.split()[-1] == "b1"


# -- Sending --------------------------------------------------------------------------


@contextlib.contextmanager
def somebody_sends(nix: Scene, *paths: str) -> Iterator[None]:
    """Hold the lock of one who sends these paths, or who knows what, to b1."""
    lock = slot_directory(nix) / "ssh:__b1.upload-lock"
    hashes = " ".join(Path(path).name[:32] for path in paths)
    with lock.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(hashes)
        file.flush()
        yield
        file.truncate(0)


def sent(nix: Scene, content: str) -> tuple[str, str]:
    """A build, and the path it needs sent."""
    nix.machines("b1 - - 4\n")
    nix.build(with_input(f"before {content}"))
    expression = with_input(content)
    nix.client.write("/tmp/sent.nix", f'builtins.toFile "source" "{content}"')
    found = nix.client.run("nix-instantiate", "--eval", "/tmp/sent.nix")
    return expression, found.stdout.strip().strip('"')


def phase(nix: Scene) -> str:
    words = "".join(path.read_text() for path in slot_files(nix)).split()
    return words[4] if len(words) > 4 else ""


@pytest.mark.engines
def test_what_nobody_sends_is_sent_beside_another_sender(nix: Scene) -> None:
    expression, _ = sent(nix, "not what they send")
    with somebody_sends(nix, f"/nix/store/{'1' * 32}-big"):
        assert nix.build(expression).status == 0


@pytest.mark.parametrize("announced", [True, False], ids=["ours too", "untold"])
def test_what_another_may_send_is_waited_for(nix: Scene, announced: bool) -> None:
    expression, path = sent(nix, f"they may send it {announced}")
    with somebody_sends(nix, *[f"/nix/store/{'1' * 32}-big", path] * announced):
        run = nix.start(expression)
        poll(lambda: phase(nix) == "sending", "a build that sends", timeout=SOON_S)
        time.sleep(1)
        assert phase(nix) == "sending"
        assert not registered(nix.builder, path)
    assert run.end().status == 0


# -- Which machine --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slow", "fast", "chosen"),
    [
        pytest.param(0, 0, "b2", id="both idle: the faster"),
        pytest.param(0, 2, "b2", id="2/4 rounds down: the faster"),
        pytest.param(0, 3, "b1", id="3/4 rounds up: the idle one"),
        pytest.param(1, 3, "b2", id="1 against 3/4 is a tie: the faster"),
        pytest.param(1, 4, "b1", id="the faster is full: the slower"),
    ],
)
def test_the_faster_machine_gets_the_build_by_the_rounding_rule(
    nix: Scene, slow: int, fast: int, chosen: str
) -> None:
    nix.machines("b1 - - 4 1\nb2 - - 4 4\n")
    held = take(nix, "b1", slow) + take(nix, "b2", fast)
    outcome = nix.build(f'mk "on-{slow}-{fast}" "hostname > $out" {{}}')
    for descriptor in held:
        os.close(descriptor)
    assert nix.client.read(outcome.output) == f"{chosen}\n"


# -- Who holds what -------------------------------------------------------------------


@pytest.mark.engines
def test_a_slot_file_says_who_holds_it(nix: Scene) -> None:
    nix.machines("b1 - - 2\n")
    nix.start(HELD)
    holder = building(nix)
    process = nix.client.path(f"/proc/{holder.pid}")
    assert INSTALLED in (process / "cmdline").read_text().split("\0")
    after_name = (process / "stat").read_text().rpartition(")")[2].split()
    assert holder.started == after_name[19]
    assert holder.derivation.endswith("-held.drv")
    assert nix.client.path(holder.derivation).exists()


def test_slot_files_are_empty_afterwards(nix: Scene) -> None:
    nix.machines("b1 - - 2\n")
    nix.build('[ (mk "one" "echo > $out" {}) (mk "two" "echo > $out" {}) ]', *POLL)
    assert [path.read_text() for path in slot_files(nix)] == ["", ""]


def test_the_slot_of_a_failed_build_is_empty_afterwards(nix: Scene) -> None:
    nix.machines("b1\n")
    nix.build('mk "bad" "exit 1" {}', check=False)
    assert [path.read_text() for path in slot_files(nix)] == [""]


def test_nobody_else_may_read_or_write_slots(nix: Scene) -> None:
    nix.machines("b1 - - 2\n")
    nix.build(with_input("modes"))
    found = [slot_directory(nix), *slot_directory(nix).rglob("*")]
    assert {"main-lock", "ssh:__b1-0", "ssh:__b1.upload-lock"} <= names(nix)
    assert {mode(path) for path in found if not path.is_dir()} == {0o600, 0o700}
    assert {mode(path) for path in found if path.is_dir()} == {0o700}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -- Ends -----------------------------------------------------------------------------


@pytest.mark.engines
def test_a_killed_hook_frees_its_slot_and_ends_its_build(nix: Scene) -> None:
    """Nix, which would help it by ending the ssh too, is stopped meanwhile."""
    nix.machines("b1\n")
    run = nix.start(HELD)
    hook = building(nix)
    (slot,) = slot_files(nix)
    with stopped(run):
        nix.client.signal(signal.SIGKILL, hook.pid)
        poll(lambda: not is_taken(slot), "the slot", timeout=SOON_S)
        poll(lambda: not sessions(nix.client), "the end of its session", timeout=SOON_S)
        gone(nix.builder, "sleep 600")


def test_a_slot_is_taken_while_its_build_runs(nix: Scene) -> None:
    nix.machines("b1\n")
    nix.start(HELD)
    building(nix)
    assert [is_taken(slot) for slot in slot_files(nix)] == [True]


@contextlib.contextmanager
def stopped(run: Run) -> Iterator[None]:
    run.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        run.process.send_signal(signal.SIGCONT)


@pytest.mark.engines
def test_a_terminated_hook_ends_its_build(nix: Scene) -> None:
    nix.machines("b1\n")
    nix.start(HELD)
    hook = building(nix)
    nix.client.signal(signal.SIGTERM, hook.pid)
    ended(nix.client, hook.pid)
    gone(nix.builder, "sleep 600")


@pytest.mark.engines
def test_when_nix_is_killed_hook_and_build_end(nix: Scene) -> None:
    nix.machines("b1\n")
    run = nix.start(HELD)
    hook = building(nix)
    run.process.kill()
    ended(nix.client, hook.pid)
    gone(nix.builder, "sleep 600")


@pytest.mark.engines
def test_when_nix_is_interrupted_hook_and_build_end(nix: Scene) -> None:
    nix.machines("b1\n")
    run = nix.start(HELD)
    hook = building(nix)
    run.interrupt()
    ended(nix.client, hook.pid)
    gone(nix.builder, "sleep 600")
