"""What builders tell of a build's phases, and that its log stays as it is meanwhile."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Iterator

import pytest
from scene import Scene, cleared, end_masters, scene, suitable, version

numbers = itertools.count()

PHASE = '@nix { "action": "setPhase", "phase": "testPhase" }'
# A line is empty, one has what JSON quotes, and the last has no end.
NOISY = f"""
  echo first
  echo '{PHASE}'
  echo
  printf 'quotes " \\\\, a tab \\t, a colour \\033[31mred\\033[0m\\n'
  printf last
  echo > $out
"""
LINES = ["first", "", 'quotes " \\, a tab \t, a colour \x1b[31mred\x1b[0m', "last"]


def noisy(nix: Scene) -> tuple[str, str]:
    """An expression, and its derivation."""
    expression = f"mk \"noisy-{next(numbers)}\" ''{NOISY}'' {{}}"
    command = nix.nix_build(expression)
    return expression, nix.client.run("nix-instantiate", command[1]).stdout.strip()


def log_of(nix: Scene) -> list[str]:
    """What is kept of the log of a new build."""
    expression, derivation = noisy(nix)
    nix.build(expression)
    return nix.client.run("nix-store", "--read-log", derivation).stdout.splitlines()


@pytest.fixture(scope="module")
def hosts(client_engine: str, builder_engine: str) -> Iterator[Scene]:
    with scene(client_engine, builder_engine) as running:
        yield running


@pytest.fixture
def nix(hosts: Scene) -> Iterator[Scene]:
    """A builder of which it is known what its nix-store can do."""
    with cleared(hosts):
        hosts.build(noisy(hosts)[0])
        yield hosts


@pytest.mark.engines
def test_a_phase_reaches_nix_and_no_line_of_the_log_is_lost(
    nix: Scene, builder_engine: str
) -> None:
    said = log_of(nix)
    phases = [line for line in said if line.startswith("@nix ")]
    lines = [line for line in said if line not in phases]
    if version(builder_engine) < (2, 4):
        assert phases == [] and [line[:5] for line in lines] == [x[:5] for x in LINES]
    else:
        assert [json.loads(phase[5:])["phase"] for phase in phases] == ["testPhase"]
        assert lines == LINES


def test_the_phase_is_that_of_the_builds_own_activity(
    client_engine: str, pytestconfig: pytest.Config
) -> None:
    modern = suitable(pytestconfig, client_engine, (2, 4).__le__)
    with scene(modern, modern) as nix:
        nix.build(noisy(nix)[0])
        log = nix.build(noisy(nix)[0], "--log-format", "internal-json", "-v").log
    lines = [line[5:] for line in log.splitlines() if line.startswith("@nix ")]
    events = [json.loads(line) for line in lines]
    builds = [e["id"] for e in events if (e["action"], e.get("type")) == ("start", 105)]
    phases = [e for e in events if (e["action"], e.get("type")) == ("result", 104)]
    assert [(e["id"], e["fields"]) for e in phases] == [(builds[0], ["testPhase"])]


FORCED = {
    "that allows no options": """
        case "$SSH_ORIGINAL_COMMAND" in
            "nix-store --serve --write") exec nix-store --serve --write;;
            *) echo "what is that?" >&2; exit 1;;
        esac""",
    "that takes no notice of options": "exec nix-store --serve --write",
}


@pytest.mark.engines
@pytest.mark.parametrize("script", FORCED.values(), ids=FORCED.keys())
def test_a_login_builds_all_the_same(nix: Scene, script: str) -> None:
    keys = "/root/.ssh/authorized_keys"
    before = nix.builder.read(keys)
    nix.builder.write("/root/forced", f"#!/bin/sh\n{script}\n", 0o755)
    nix.builder.write(keys, f'command="/root/forced" {before}', 0o600)
    end_masters(nix)
    try:
        for _ in range(2):
            assert [line[:5] for line in log_of(nix)] == [line[:5] for line in LINES]
    finally:
        nix.builder.write(keys, before, 0o600)


def test_a_builder_that_was_broken_for_a_while_tells_phases_again(nix: Scene) -> None:
    nix.builder.write("/usr/local/bin/nix-store", "#!/bin/sh\nexit 3\n", 0o755)
    end_masters(nix)
    assert nix.build(noisy(nix)[0], check=False).status != 0
    nix.builder.run("rm", "/usr/local/bin/nix-store")
    assert any(line.startswith("@nix ") for line in log_of(nix))


# -- What is in a log says the build --------------------------------------------------


@pytest.fixture(scope="module", params=["without phases", "with phases"])
def logging(
    request: pytest.FixtureRequest, client_engine: str, pytestconfig: pytest.Config
) -> Iterator[Scene]:
    """Before 2.4 nix-store's stderr is the log, and what it says itself is there, too."""
    is_old = bool(request.param == "without phases")
    name = "2.3" if is_old else client_engine
    builder = suitable(pytestconfig, name, lambda found: (found < (2, 4)) == is_old)
    with scene(client_engine, builder) as running:
        yield running
        running.clear()


@pytest.mark.parametrize(
    "words",
    ["error: $out/bin/tool is not stripped", "test 17: you are not privileged, ok"],
)
def test_a_log_is_shown_whole_that_begins_as_nix_would_speak(
    logging: Scene, words: str
) -> None:
    script = f"echo {words} >&2; echo second-line; echo > $out"
    outcome = logging.build(f'mk "spoken-{next(numbers)}" "{script}" {{}}')
    lines = outcome.log.splitlines()
    assert {words.replace("$out", outcome.output), "second-line"} <= {*lines}


def test_what_a_log_says_of_privileges_is_no_word_of_the_builders_nix(
    logging: Scene,
) -> None:
    """nix-store there is killed, as by who looks for memory, while such a build runs."""
    there = logging.builder
    there.run("sh", "-c", "rm -f /tmp/go /tmp/end")
    script = """
      echo begin
      while ! [ -e /tmp/go ]; do sleep 0.05; done
      echo you are not privileged
      while ! [ -e /tmp/end ]; do sleep 0.05; done
      echo > $out"""
    run = logging.start(f"mk \"privileged-{next(numbers)}\" ''{script}'' {{}}")
    run.says("begin")
    there.write("/tmp/go", "")
    run.says("you are not privileged")
    serving = [p.pid for p in there.processes() if "--serve" in p.cmdline]
    there.signal(signal.SIGKILL, *serving)
    run.says("trying again")
    there.write("/tmp/end", "")
    outcome = run.end()
    assert outcome.status == 0 and "does not trust its user" not in outcome.log
