"""Builds that are big, many at once, or go wrong half-way."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import pytest
from lab import Host, poll
from scene import Run, Scene, change_hook, other, registered, scene, valid, verified

pytestmark = pytest.mark.engines


@pytest.fixture
def running(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    with scene(client_engine, other(pytestconfig, client_engine)) as hosts:
        yield hosts
        hosts.settle()
        assert hosts.locks() == []


# -- Big ------------------------------------------------------------------------------


def test_an_output_of_120_mb_comes_back(running: Scene) -> None:
    built = running.build('mk "big" "head -c 120000000 /dev/urandom > $out" {}').output
    assert running.client.path(built).stat().st_size == 120_000_000
    assert valid(running.client, built)


def test_a_log_of_50_mb_arrives_whole(running: Scene) -> None:
    log = running.build("""
      mk "long-log" "seq -f %0100.0f 500000; echo > $out" {}
    """).log
    numbers = [int(line) for line in log.splitlines() if len(line) == 100]
    assert numbers == list(range(1, 500_001))


def test_a_derivation_may_have_20000_inputs(running: Scene) -> None:
    built = running.build("""
      mk "many" "xargs cat < $inputsPath > $out" {
        passAsFile = [ "inputs" ];
        inputs = builtins.genList (n:
          builtins.toFile "input-${toString n}" "${toString n}\\n") 20000;
      }
    """)
    content = running.client.read(built.output).split()
    assert content == [str(number) for number in range(20_000)]


def test_names_may_be_as_long_as_nix_allows(running: Scene) -> None:
    name = "n" * 207  # with ".drv", or with "-doc", that makes 211
    built = running.build(f"""
      let long = mk "{name}" "echo $out > $doc; hostname > $out" {{
        outputs = [ "out" "doc" ];
      }}; in [ long.out long.doc ]
    """)
    assert running.client.read(built.outputs[0]) == "b1\n"
    assert valid(running.client, *built.outputs)


# -- An import that fails -------------------------------------------------------------


# A nix-store that says no more than 8 MB in a session before it is told to go on.
GATE = """#!/usr/bin/python3
import os, subprocess, sys, time
real = [@, *sys.argv[1:]]
if "--serve" not in sys.argv:
    os.execv(real[0], real)
process, passed = subprocess.Popen(real, stdout=subprocess.PIPE), 0
while data := process.stdout.read1(65536):
    while passed > 8_000_000 and not os.path.exists("/tmp/go-on"):
        time.sleep(0.02)
    passed += len(data)
    sys.stdout.buffer.write(data)
    sys.stdout.flush()
sys.exit(process.wait())
"""


def start_arriving(running: Scene, expression: str) -> Run:
    """Start a build, and return when its output is about to come back, which stands still
    until /tmp/go-on is there."""
    real = running.builder.run("sh", "-c", "command -v nix-store").stdout.strip()
    gate = GATE.replace("@", repr(real))
    running.builder.write("/usr/local/bin/nix-store", gate, 0o755)
    output = running.client.path(running.output(expression))
    run = running.start(expression)

    def arrives() -> bool:
        return output.exists() and output.stat().st_size > 1 << 20

    poll(lambda: arrives() or run.ended, "the output's first bytes")
    assert not run.ended, run.log
    return run


def test_nothing_is_registered_if_the_connection_breaks(running: Scene) -> None:
    expression = 'mk "cut" "head -c 30000000 /dev/zero > $out" {}'
    run = start_arriving(running, expression)
    running.builder.stop_sshd(sessions=True)
    poll(lambda: "cannot fetch the outputs of '" in run.log, "the loss")
    assert not registered(running.client, running.output(expression))
    running.builder.write("/tmp/go-on", "")
    running.builder.start_sshd()
    assert valid(running.client, run.end().output)


def test_a_build_succeeds_after_a_broken_import(running: Scene) -> None:
    expression = 'mk "again" "head -c 30000000 /dev/zero > $out" {}'
    run = start_arriving(running, expression)
    running.builder.restart_sshd(sessions=True)
    running.builder.write("/tmp/go-on", "")
    run.end()
    assert valid(running.client, running.build(expression).output)


def test_a_copy_that_is_killed_is_made_again(running: Scene) -> None:
    expression = 'mk "killed" "head -c 30000000 /dev/zero > $out" {}'
    run = start_arriving(running, expression)
    copies = [p.pid for p in running.client.processes() if " --from " in p.cmdline]
    running.client.signal(signal.SIGKILL, *copies)
    running.builder.write("/tmp/go-on", "")
    outcome = run.end()
    assert copies
    assert valid(running.client, outcome.output)


def test_a_copy_that_stands_still_is_made_again(running: Scene) -> None:
    change_hook(running, COPY_TIMEOUT_S=5)
    expression = 'mk "still" "head -c 30000000 /dev/zero > $out" {}'
    run = start_arriving(running, expression)
    run.says("no progress of copying in 5")
    running.builder.write("/tmp/go-on", "")
    assert valid(running.client, run.end().output)


def test_nothing_is_registered_if_the_store_is_full(running: Scene) -> None:
    small = ("mount", "-t", "tmpfs", "-o", "size=8m", "small", "/nix/store")
    running.client.run(*small)
    expression = 'mk "too-big" "head -c 20000000 /dev/urandom > $out" {}'
    output = running.output(expression)
    outcome = running.build(expression, check=False)
    assert outcome.status and "No space left on device" in outcome.log
    assert not registered(running.client, output)


def copiers(running: Scene) -> list[int]:
    found = running.client.processes()
    return [
        process.pid for process in found if "nix-copy-closure --from" in process.cmdline
    ]


def cats(running: Scene) -> int:
    """The programs that the stand-in for ssh becomes."""
    return sum(process.cmdline == "cat" for process in running.client.processes())


def test_junk_at_the_output_path_does_not_become_valid(running: Scene) -> None:
    expression = """
      mk "blocked" "while ! [ -e /tmp/go ]; do sleep 0.02; done; echo > $out" {}
    """
    output = running.output(expression)
    run = running.start(expression)
    poll(lambda: "while !" in str(running.builder.processes()), "the build")
    # A mount point cannot be removed or replaced. Nix, and so the hook, may have a
    # mount namespace of its own, and so may the program that waits to fetch.
    running.client.path(output).mkdir()
    # Before its ssh is there, a child of its own looks like it for a moment.
    poll(lambda: cats(running) == 2, "a program that waits to fetch")
    for process in (*running.hooks(), *copiers(running)):
        enter = ("nsenter", "--target", str(process), "--mount")
        running.client.run(*enter, "mount", "-t", "tmpfs", "junk", output)
        running.client.run(*enter, "touch", f"{output}/junk")
    running.builder.write("/tmp/go", "")
    assert run.end().status and not registered(running.client, output)


# -- Many at once ---------------------------------------------------------------------


def test_two_clients_may_build_the_same_at_once(running: Scene) -> None:
    expression = """
      let
        low = n: mk "low-${toString n}" "sleep 0.2; echo ${toString n} > $out" {};
        lows = builtins.genList low 6;
        high = n: mk "high-${toString n}" "cat $lows > $out" { inherit lows; };
      in builtins.genList high 4
    """
    poll_often = ("--option", "build-poll-interval", "1")
    runs = [running.start(expression, *poll_often) for _ in range(2)]
    first, second = (run.end() for run in runs)
    assert (first.status, second.status) == (0, 0), first.log + second.log
    assert first.outputs == second.outputs and valid(running.client, *first.outputs)
    assert verified(running.client)


@contextlib.contextmanager
def collecting_garbage(builder: Host) -> Iterator[None]:
    """The builder deletes, again and again, all that nobody needs."""
    loop = "while :; do nix-store --gc >>/tmp/gc.log 2>&1; done"
    process = builder.popen("sh", "-c", loop)
    try:
        yield
        poll(lambda: "deleting '/nix/store/" in builder.read("/tmp/gc.log"), "any")
    finally:
        process.kill()
        process.wait()


def test_collecting_garbage_on_the_builder_does_no_harm(running: Scene) -> None:
    with collecting_garbage(running.builder):
        built = running.build("""
          let
            source = n: builtins.toFile "source-${toString n}" "${toString n} ";
            link = n: below: mk "link-${toString n}"
              "cat ${source n} ${if n == 0 then "" else below} > $out; sleep 0.1" {};
            numbers = builtins.genList (n: n) 8;
          in builtins.foldl' (below: n: link n below) "" numbers
        """).output
    assert running.client.read(built).split() == list("76543210")
    assert valid(running.client, built)
