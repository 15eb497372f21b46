"""Real builds on real builders: what reaches them, and what comes back."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator

import pytest
from lab import Host, poll
from scene import (
    HOOK,
    INSTALLED,
    TESTS,
    Outcome,
    Scene,
    change_hook,
    distrustful,
    other,
    scene,
    suitable,
    valid,
    verified,
    version,
)

pytestmark = pytest.mark.engines

BUILDER_CONF = "system-features = perf kvm big-parallel\n"
LOCAL = ("-j1", "--builders", "")
RECORDER = "/usr/local/bin/recorder"


@pytest.fixture(scope="module")
def pair_of_hosts(client_engine: str, builder_engine: str) -> Iterator[Scene]:
    """Each client engine with each builder engine."""
    with scene(client_engine, builder_engine, builder_engine) as hosts:
        record_exits(hosts)
        yield hosts


@pytest.fixture
def pair(pair_of_hosts: Scene) -> Iterator[Scene]:
    yield from watched(pair_of_hosts)


@pytest.fixture(scope="module")
def hosts(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    """Each client engine, with builders of another."""
    builder = other(pytestconfig, client_engine)
    with scene(client_engine, builder, builder, builder_conf=BUILDER_CONF) as hosts:
        record_exits(hosts)
        yield hosts


@pytest.fixture
def running(hosts: Scene) -> Iterator[Scene]:
    yield from watched(hosts)


def watched(hosts: Scene) -> Iterator[Scene]:
    """No test may leave a lock in the store, a process, or a session behind."""
    hosts.machines("b1 - - 4\nb2 - - 4\n")
    hosts.client.path("/tmp/exits").unlink(missing_ok=True)
    yield hosts
    hosts.settle()
    assert hosts.locks() == []


def record_exits(hosts: Scene) -> None:
    """A hook that calls ours and writes down how it ended."""
    script = f'#!/bin/sh\n{INSTALLED} "$@"\ns=$?; echo $s >> /tmp/exits; exit $s\n'
    hosts.client.write(RECORDER, script, 0o755)


def build_recorded(
    hosts: Scene, expression: str, *options: str
) -> tuple[Outcome, list[int]]:
    """Build; returns also with what each hook ended that had been given a build."""
    hook = ("--option", "build-hook", RECORDER)
    outcome = hosts.build(expression, *hook, *options, check=False)
    codes = [int(code) for code in hosts.client.read("/tmp/exits").split()]
    return outcome, [code for code in codes if code]


def copied(log: str, name: str) -> list[str]:
    """The lines that say that a path of that name was copied."""
    return re.findall(rf"(?m)^copying path .*-{re.escape(name)}'.*$", log)


def gate(name: str) -> str:
    """A command of a build: wait until the test lets it go on."""
    return f"while ! [ -e /tmp/open-{name} ]; do sleep 0.02; done"


def open_gate(builders: tuple[Host, ...], name: str) -> None:
    for builder in builders:
        builder.write(f"/tmp/open-{name}", "")


# -- Each client engine with each builder engine --------------------------------------

GRAPH = """
let
  a = mk "graph-a" "hostname > $out" {};
  b = mk "graph-b" "{ cat ${a}; hostname; } > $out" {};
  c = mk "graph-c" "{ cat ${a}; hostname; } > $out" {};
in mk "graph-d" "{ cat ${b} ${c}; hostname; } > $out" {}
"""


def test_a_graph_of_dependent_derivations_is_built_on_the_builders(pair: Scene) -> None:
    built = pair.build(GRAPH).output
    where = pair.client.read(built).split()
    assert len(where) == 5 and set(where) <= {"b1", "b2"}


def test_everything_that_was_built_is_valid_here(pair: Scene) -> None:
    built = pair.build(f'[ (mk "one" "echo 1 > $out" {{}}) ({GRAPH}) ]')
    assert valid(pair.client, *built.outputs) and verified(pair.client)


def test_what_came_back_is_what_a_build_here_makes(pair: Scene) -> None:
    expression = """
      mk "same" "mkdir $out; ln -s nowhere $out/l; echo x > $out/f; chmod +x $out/f" {}
    """
    hashes = []
    for options in ((), LOCAL):
        built = pair.build(expression, *options).output
        hashes.append(pair.client.run("nix-store", "-q", "--hash", built).stdout)
        pair.client.run("nix-store", "--delete", built)
    assert hashes[0] == hashes[1] != ""


def test_all_outputs_of_a_derivation_come_back(pair: Scene) -> None:
    built = pair.build("""
      let three = mk "three" "for i in $out $dev $doc; do hostname > $i; done" {
        outputs = [ "out" "dev" "doc" ];
      }; in [ three.out three.dev three.doc ]
    """)
    assert len(set(built.outputs)) == 3 and valid(pair.client, *built.outputs)
    assert {pair.client.read(output) for output in built.outputs} <= {"b1\n", "b2\n"}


def test_outputs_may_refer_to_each_other(pair: Scene) -> None:
    built = pair.build("""
      let chain = mk "chain" "echo $dev > $out; echo $lib > $dev; echo $out $lib > $doc;
        echo end > $lib" { outputs = [ "out" "dev" "doc" "lib" ]; };
      in [ chain.out chain.dev chain.doc chain.lib ]
    """)
    out, dev, doc, lib = built.outputs
    query = pair.client.run("nix-store", "--query", "--references", doc).stdout.split()
    assert set(query) == {out, lib} and valid(pair.client, *built.outputs)
    assert pair.client.read(out).split() == [dev]


def test_a_fixed_output_is_built_elsewhere(pair: Scene) -> None:
    built = pair.build("""
      mk "fixed" "hostname >&2; printf hello > $out" {
        outputHashMode = "flat"; outputHashAlgo = "sha256";
        outputHash = builtins.hashString "sha256" "hello";
      }
    """)
    assert pair.client.read(built.output) == "hello"
    assert valid(pair.client, built.output)
    assert re.search("(?m)^b[12]$", built.log)


def test_a_wrong_fixed_output_is_a_failed_build(pair: Scene) -> None:
    outcome, exits = build_recorded(
        pair,
        """
      mk "wrong" "printf other > $out" {
        outputHashMode = "flat"; outputHashAlgo = "sha256";
        outputHash = builtins.hashString "sha256" "hello";
      }
    """,
    )
    assert outcome.status and exits == [100]
    assert "hash mismatch" in outcome.log


def test_the_log_just_before_the_end_arrives_whole(pair: Scene) -> None:
    log = pair.build("""
      mk "burst" "echo done > $out; for i in $(seq 900); do echo line $i.; done" {}
    """).log
    assert re.findall(r"line (\d+)\.", log) == [str(n) for n in range(1, 901)]


def test_a_failed_build_is_one_for_nix_too(pair: Scene, client_engine: str) -> None:
    outcome, exits = build_recorded(pair, 'mk "fails" "echo so sad; exit 7" {}')
    assert exits == [100]
    # 2.29 and newer make nothing of how a hook ended
    assert outcome.status == (100 if version(client_engine) < (2, 29) else 1)


def test_a_failed_build_is_explained(pair: Scene) -> None:
    log = pair.build('mk "broken" "echo so sad; exit 7" {}', check=False).log
    assert "so sad" in log
    assert re.search(r"build of '.*-broken\.drv' on 'ssh://b[12]' failed: .*7", log)
    assert re.search(r"(?m)^error: build of '.*-broken\.drv' on", log)


def test_a_kept_build_directory_is_on_the_builder(
    pair: Scene, builder_engine: str
) -> None:
    expression = 'mk "keep" "echo > evidence-of-keep; exit 7" {}'
    log = pair.build(expression, "-K", check=False).log
    kept = [
        found
        for builder in pair.builders
        for place in ("/tmp", "/nix/var/nix/builds")
        for found in builder.path(place).glob("nix-*/**/evidence-of-keep")
    ]
    # older servers do not understand the wish
    is_new = version(builder_engine) >= (2, 4)
    assert len(kept) == (1 if is_new else 0)
    assert (
        "The failed build directory was kept on the remote builder" in log
    ) == is_new


# -- What is built where --------------------------------------------------------------


@pytest.mark.parametrize("feature, builder", [("perf", "b1"), ("kvm", "b2")])
def test_a_required_feature_leads_to_a_builder_that_has_it(
    running: Scene, feature: str, builder: str
) -> None:
    running.machines("b1 - - 4 1 perf\nb2 - - 4 1 kvm\n")
    name = f"needs-{feature}"
    features = f'{{ requiredSystemFeatures = [ "{feature}" ]; }}'
    built = running.build(f'mk "{name}" "hostname > $out" {features}')
    assert running.client.read(built.output) == f"{builder}\n"


def test_only_missing_outputs_come_back(running: Scene) -> None:
    expression = """
      let two = mk "two" "echo 1 > $out; echo 2 > $dev" { outputs = [ "out" "dev" ]; };
      in [ two.out two.dev ]
    """
    out, dev = running.build(expression).outputs
    running.client.run("nix-store", "--delete", dev)
    log = running.build(expression).log
    assert copied(log, "two-dev") and not copied(log, "two")
    assert valid(running.client, out, dev)


def test_an_input_is_sent_once(running: Scene) -> None:
    running.machines("b1 - - 4\n")
    template = """
      let input = builtins.toFile "shared-input" "text";
      in mk "%s" "cat ${input} > $out" {}
    """
    first, second = (running.build(template % name).log for name in ("s-1", "s-2"))
    assert len(copied(first, "shared-input")) == 1
    assert not copied(second, "shared-input")


def test_a_malformed_line_costs_only_that_machine(
    client_engine: str, pytestconfig: pytest.Config
) -> None:
    # 2.3 itself ends with "stoull" on a number that is none
    client = suitable(pytestconfig, client_engine, (2, 4).__le__)
    builder = other(pytestconfig, client)
    with scene(client, builder, builder) as running:
        running.machines("b1 - - four\nb2 - - 4\n")
        built = running.build("""
          mk "c" "hostname > $out" { a = mk "b" "hostname > $out" {}; }
        """)
        assert running.client.read(built.output) == "b2\n"
        assert built.log.count("/etc/nix/machines:1: maxJobs is 'four'") == 1


FLOATING = """
  mk "floating" "hostname > $out" {
    __contentAddressed = true;
    outputHashMode = "recursive"; outputHashAlgo = "sha256";
  }
"""
CA = ("--option", "experimental-features", "ca-derivations")


@pytest.fixture
def ca_scene(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    client = suitable(pytestconfig, client_engine, (2, 4).__le__)
    with scene(client, client) as running:
        running.machines("b1 - - 4 1 ca-derivations\n")
        yield running
        running.settle()


def test_a_builder_that_has_not_enabled_floating_outputs_is_told_of(
    ca_scene: Scene,
) -> None:
    outcome = ca_scene.build(FLOATING, *CA, check=False)
    assert outcome.status and outcome.log.count("cannot build") <= 2, outcome.log
    assert "extra-experimental-features = ca-derivations" in outcome.log


def test_a_floating_output_is_built_here_if_no_line_claims_it(ca_scene: Scene) -> None:
    ca_scene.machines("b1 - - 4\n")
    built = ca_scene.build(FLOATING, *CA, "-j1")
    assert ca_scene.client.read(built.output) == "client\n"


# -- While it builds ------------------------------------------------------------------


def test_the_log_arrives_as_it_is_written(running: Scene) -> None:
    run = running.start(f'mk "live" "echo first; {gate("live")}; echo > $out" {{}}')
    run.says("first")
    assert not run.ended
    open_gate(running.builders, "live")
    assert run.end().status == 0


def test_a_failed_build_leaves_no_folder_in_tmp(
    running: Scene, client_engine: str
) -> None:
    """The program that was to fetch its outputs has made one, from 2.4 on."""
    change_hook(running, FAREWELL_S=30)  # who is killed first leaves it
    run = running.start(f'mk "in-vain" "{gate("in-vain")}; exit 1" {{}}')
    folders = functools.partial(running.client.path("/tmp").glob, "nix-[0-9]*")
    if version(client_engine) >= (2, 4):
        poll(lambda: [*folders()], "the folder of nix-copy-closure")
    open_gate(running.builders, "in-vain")
    assert run.end().status != 0
    assert [*folders()] == []
    running.client.copy(HOOK, INSTALLED)


def test_a_hook_at_work_takes_less_than_20_mb(running: Scene) -> None:
    running.client.run(INSTALLED, "--version")  # compiles it, which takes more
    run = running.start(f"""
      let input = builtins.toFile "m-input" "text"; in
      mk "memory" "seq 100000; {gate("memory")}; cat ${{input}} > $out" {{}}
    """)
    run.says("100000")
    peak = peak_kb(running)
    open_gate(running.builders, "memory")
    while not run.ended:
        peak = max(peak, peak_kb(running))
    assert run.end().status == 0
    assert 0 < peak < 20 << 10


def peak_kb(running: Scene) -> int:
    """The most memory that a hook which runs now ever had; 0 without any."""
    peaks = [0]
    for pid in running.hooks():
        with contextlib.suppress(OSError):
            status = running.client.read(f"/proc/{pid}/status")
            peaks += map(int, re.findall(r"VmHWM:\s+(\d+) kB", status))
    return max(peaks)


@pytest.mark.parametrize("option", ["--timeout", "--max-silent-time"])
def test_a_build_that_takes_too_long_is_ended(
    running: Scene, client_engine: str, option: str
) -> None:
    name = option.strip("-")
    expression = f'mk "{name}" "echo begun; while :; do sleep 0.9; done" {{}}'
    outcome, exits = build_recorded(running, expression, option, "2")
    assert "begun" in outcome.log and exits == [101]
    assert outcome.status == (101 if version(client_engine) < (2, 29) else 1)


def test_a_log_that_is_too_long_ends_the_build(running: Scene) -> None:
    limit = ("--option", "max-build-log-size", "100000")
    endless = 'mk "long-log" "while :; do seq 1000; done" {}'
    outcome = running.build(endless, *limit, check=False)
    assert outcome.status and "more than 100000 bytes" in outcome.log


def test_what_is_left_of_a_failed_build_is_said_to_be_on_the_builder(
    client_engine: str, pytestconfig: pytest.Config
) -> None:
    """With -K; a builder before 2.4 cannot be told to keep it."""
    builder = suitable(pytestconfig, other(pytestconfig, client_engine), (2, 4).__le__)
    with scene(client_engine, builder) as running:
        outcome = running.build('mk "left" "echo > rest; exit 1" {}', "-K", check=False)
        words = "was kept on the remote builder due to `--keep-failed`: 'ssh://b1'"
        assert outcome.status and words in outcome.log
        find = ("find", "/tmp", "/nix/var/nix/builds", "-name", "rest")
        assert running.builder.run(*find, check=False).stdout
        running.settle()


# -- Builders with Nix 1.11 -----------------------------------------------------------


def test_a_builder_with_nix_1_11_is_of_use(
    client_engine: str, pytestconfig: pytest.Config
) -> None:
    """No newer nix-copy-closure can speak with it: from 2.4 on they want to know hashes,
    from 2.32 on they refuse serve protocol 2.2."""
    with scene(client_engine, other(pytestconfig, client_engine)) as running:
        record_exits(running)
        running.builder.copy(TESTS / "old_serve.py", "/usr/local/bin/nix-store")
        many = 'mk "many" "cat ${given} > $out; echo $out > $dev" { outputs = ["out" "dev"]; }'
        given = 'let given = builtins.toFile "given" "text"; in'
        outcome = running.build(f"{given} {many}")
        assert running.client.read(outcome.output) == "text"
        assert valid(running.client, outcome.output)
        assert copied(outcome.log, "given") and copied(outcome.log, "many-dev")
        built = running.build(GRAPH).output
        assert running.client.read(built).split() == ["b1"] * 5
        assert build_recorded(running, 'mk "bad" "exit 3" {}')[1] == [100]
        running.settle()
        assert verified(running.client) and running.locks() == []


# -- Builders with opinions -----------------------------------------------------------


def test_builders_use_substitutes(
    client_engine: str, pytestconfig: pytest.Config
) -> None:
    conf = "substituters = file:///var/cache/nix\nrequire-sigs = false\n"
    builder = other(pytestconfig, client_engine)
    with scene(client_engine, builder, builder_conf=conf) as running:
        path = running.client.run(
            "nix-store", "--add", "/etc/nix/nix.conf"
        ).stdout.strip()
        publish(running.client, path, running.builder)
        built = running.build(
            f'mk "s" "cat ${{builtins.storePath {path}}} > $out" {{}}',
            *("--option", "builders-use-substitutes", "true"),
        )
        assert f"'{path}' from 'file:///var/cache/nix'" in built.log
        assert f"'{path}' to 'ssh://b1'" not in built.log
        running.settle()


def test_inputs_are_sent_to_a_builder_whose_substituter_fails(
    client_engine: str, pytestconfig: pytest.Config
) -> None:
    """By ssh: that ends nix-store there, which a dead server of HTTP does not."""
    builder = other(pytestconfig, client_engine)
    conf = "substituters = ssh://nowhere\nrequire-sigs = false\n"
    with scene(client_engine, builder, builder_conf=conf) as running:
        wanted = ("--option", "builders-use-substitutes", "true")
        assert running.build(DEPENDENT, *wanted).outputs
        running.settle()


def publish(client: Host, path: str, builder: Host) -> None:
    """Make the builder's binary cache have that path of the client."""
    features = {"NIX_CONFIG": "experimental-features = nix-command"}
    client.run("nix", "copy", "--to", "file:///tmp/cache", path, env=features)
    client.run("tar", "-C", "/tmp/cache", "-cf", "/tmp/cache.tar", ".")
    builder.copy(client.path("/tmp/cache.tar"), "/tmp/cache.tar")
    builder.run("mkdir", "-p", "/var/cache/nix")
    builder.run("tar", "-C", "/var/cache/nix", "-xf", "/tmp/cache.tar")


INPUT = 'mk "input" "hostname > $out" {}'
DEPENDENT = f"""
  let input = {INPUT}; source = builtins.toFile "source" "text";
  in mk "dependent" "cat ${{input}} ${{source}} > $out; hostname >> $out" {{}}
"""


def test_an_untrusted_user_builds_from_signed_inputs(
    client_engine: str, pytestconfig: pytest.Config
) -> None:
    builder = other(pytestconfig, client_engine)
    with distrustful(client_engine, builder) as running:
        running.build(INPUT, *LOCAL)
        built = running.build(DEPENDENT).output
        assert running.client.read(built) == "client\ntextb1\n"
        assert valid(running.client, built)
        running.settle()
        assert running.locks() == []


def test_a_login_that_nix_1_11_does_not_trust_is_tried_twice(
    client_engine: str, pytestconfig: pytest.Config
) -> None:
    """It refuses what is not signed, such as a derivation, as often as that is sent."""
    with distrustful(client_engine, other(pytestconfig, client_engine)) as running:
        running.builder.copy(TESTS / "old_serve.py", "/usr/local/bin/nix-store")
        outcome = running.build(INPUT, check=False)
        assert outcome.status and "cannot send the inputs of '" in outcome.log
        assert outcome.log.count("copying path '") == 2


def test_an_untrusted_user_builds_a_whole_graph(
    client_engine: str, pytestconfig: pytest.Config
) -> None:
    builder = other(pytestconfig, client_engine)
    with distrustful(client_engine, builder) as running:
        built = running.build(GRAPH).output
        assert running.client.read(built).split() == ["b1"] * 5
        running.settle()
        assert running.locks() == []


def test_an_untrusted_user_is_told_of_an_unsigned_input(
    client_engine: str, pytestconfig: pytest.Config
) -> None:
    builder = other(pytestconfig, client_engine)
    with distrustful(client_engine, builder) as running:
        running.build(INPUT, *LOCAL, "--option", "secret-key-files", "")
        outcome = running.build(DEPENDENT, check=False)
        assert outcome.status
        assert "cannot send the inputs of '" in outcome.log
        assert "input' because it lacks a" in outcome.log
        running.settle()
        assert running.locks() == []


# What fails in a build by itself; a daemon there tells its client no status but 1, and of
# the second that of 2.3 says only in the log what it was.
BROKEN = {
    "fails": 'mk "fails" "echo run >> /tmp/runs; exit 7" {}',
    "makes nothing": 'mk "nothing" "echo run >> /tmp/runs" {}',
    "wrong": """mk "wrong" "echo run >> /tmp/runs; echo > $out" {
      outputHashMode = "flat"; outputHashAlgo = "sha256"; outputHash = "%s";
    }"""
    % ("0" * 64),
}


@pytest.mark.parametrize("how", list(BROKEN))
def test_what_fails_for_an_untrusted_user_is_not_built_again(
    client_engine: str, pytestconfig: pytest.Config, how: str
) -> None:
    builder = other(pytestconfig, client_engine)
    with distrustful(client_engine, builder) as running:
        record_exits(running)
        running.machines("nix@b1 - - 4\nssh://nix@b1:22 - - 4\n")
        _, exits = build_recorded(running, BROKEN[how])
        assert exits == [100]
        assert running.builder.read("/tmp/runs").split() == ["run"]


@pytest.mark.parametrize("trusted", ["root", "root nix"])
@pytest.mark.parametrize("said", ["echo begun", ":"], ids=["spoken", "silent"])
def test_a_daemon_that_is_not_told_of_the_limits_keeps_nobody_waiting(
    client_engine: str, pytestconfig: pytest.Config, trusted: str, said: str
) -> None:
    builder = other(pytestconfig, client_engine)
    conf = f"trusted-users = {trusted}\n"
    with distrustful(client_engine, builder, conf) as running:
        record_exits(running)
        change_hook(running, MARGIN_S=10_000)  # that of a builder who is told of them
        endless = f'mk "endless" "{said}; while :; do sleep 0.9; done" {{}}'
        outcome, exits = build_recorded(running, endless, "--timeout", "2")
        assert outcome.status and exits == [101]
        running.settle()
