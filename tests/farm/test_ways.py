"""Machines that are reached in other ways than by `nix-store --serve --write` over ssh."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator

import pytest
from lab import HANGS_S, Host, connect, poll
from scene import (
    HOOK,
    INSTALLED,
    SLOTS,
    Run,
    Scene,
    change_hook,
    distrustful,
    forget,
    other,
    scene,
    valid,
    version,
)
from test_builds import DEPENDENT, INPUT, LOCAL

pytestmark = pytest.mark.engines

numbers = itertools.count()
# A build that waited for the machine to be of use again would take 15 minutes.
TIMEOUT_S = HANGS_S
OWN = f"{SLOTS}/own"
# A store in another place needs a sandbox, in which there has to be a shell.
SANDBOX = "sandbox-paths = /bin /usr /lib /lib64\n"


def fresh() -> str:
    return f'mk "fresh-{next(numbers)}" "echo here; hostname > $out" {{}}'


def dependent() -> str:
    """A derivation with something to send, and something that is built before it."""
    return f"""
      let source = builtins.toFile "source" "text";
          input = mk "input-{next(numbers)}" "echo input > $out" {{}};
      in mk "dependent" "cat ${{source}} ${{input}} > $out; hostname >> $out" {{}}"""


def to_send() -> str:
    """A derivation with nothing but something to send."""
    number = next(numbers)
    source = f'builtins.toFile "source-{number}" "text"'
    return f'mk "with-source-{number}" "cat ${{{source}}} > $out" {{}}'


@pytest.fixture(scope="module")
def hosts(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    builder = other(pytestconfig, client_engine)
    conf = {"client_conf": SANDBOX, "builder_conf": SANDBOX}
    with scene(client_engine, builder, **conf) as running:
        yield running


@pytest.fixture
def nix(hosts: Scene) -> Scene:
    forget(hosts)
    change_hook(hosts)
    return hosts


def test_a_program_and_a_store_there_may_be_named(nix: Scene) -> None:
    """The store's name has what a shell there would read in another way."""
    store = f"/tmp/a&b'-{next(numbers)}"
    uri = "ssh://b1?remote-program=env%20NIX_SHOW=1%20nix-store&remote-store="
    nix.machines(f"{uri}{store.replace('&', '%26')} - - 1\n")
    outcome = nix.build(fresh())
    assert nix.builder.path(f"{store}{outcome.output}").exists()
    assert not nix.builder.path(outcome.output).exists()


def test_it_is_told_that_a_build_directory_was_kept(
    nix: Scene, client_engine: str, pytestconfig: pytest.Config
) -> None:
    """As Nix's own hook does, and its tests want; builders since 2.4 can be asked to."""
    nix.machines("b1 - - 1\n")
    outcome = nix.build('mk "bad" "exit 3" {}', "--keep-failed", check=False)
    builder = other(pytestconfig, client_engine)
    kept = "The failed build directory was kept on the remote builder" in outcome.log
    assert kept == (version(builder) >= (2, 4)), outcome.log


@pytest.mark.parametrize("uri", ["{}", "local?root={}", "localhost?remote-store={}"])
def test_a_store_here_is_a_machine(nix: Scene, uri: str) -> None:
    """Its line says which features it has."""
    store = f"/srv/here-{next(numbers)}"
    nix.machines(f"{uri.format(store)} - - 1 1 kvm\n")
    expression = fresh().replace("{}", '{ requiredSystemFeatures = [ "kvm" ]; }')
    outcome = nix.build(expression)
    assert "here" in outcome.log.splitlines()
    assert valid(nix.client, outcome.output)
    assert nix.client.path(f"{store}{outcome.output}").exists()


@pytest.mark.parametrize("uri", ["auto", "unix:///nix/var/nix/daemon-socket/socket"])
def test_the_usual_store_is_a_machine_to_another(nix: Scene, uri: str) -> None:
    nix.machines(f"{uri} - - 1\n")
    if uri != "auto":
        nix.client.start_daemon()
    there = f"/srv/root-{next(numbers)}"
    outcome = nix.build(fresh(), "--store", f"local?root={there}")
    assert "here" in outcome.log.splitlines()
    assert nix.client.path(f"{there}{outcome.output}").exists()
    assert valid(nix.client, outcome.output)


def test_the_store_here_is_no_machine_to_itself(nix: Scene) -> None:
    nix.machines("auto - - 1\n")
    outcome = nix.build(fresh(), check=False)
    assert outcome.status != 0 and "it is this very machine" in outcome.log


def test_a_build_in_a_store_here_fails_as_any_other(nix: Scene) -> None:
    nix.machines(f"/srv/here-{next(numbers)} - - 1\n")
    outcome = nix.build('mk "bad" "echo oops; exit 3" {}', check=False)
    assert outcome.status != 0 and "oops" in outcome.log.splitlines()
    assert "trying again" not in outcome.log


def test_a_build_in_a_store_here_obeys_a_timeout(nix: Scene) -> None:
    nix.machines(f"/srv/here-{next(numbers)} - - 1\n")
    slow = 'mk "slow" "sleep 60" {}'
    outcome = nix.build(slow, "--timeout", "1", check=False)
    assert outcome.status != 0 and "timed out" in outcome.log


def end(nix: Scene, run: Run, how: str) -> None:
    """End its hook, or Nix by Ctrl-C, and see that all else ends, too."""
    if how == "Ctrl-C":
        run.interrupt()
    else:
        nix.client.signal(getattr(signal, how), *nix.hooks())
    nix.settle()


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "SIGKILL"])
def test_a_build_in_a_store_here_ends_with_its_hook(nix: Scene, how: str) -> None:
    nix.machines(f"/srv/here-{next(numbers)} - - 1\n")
    run = nix.start('mk "long" "echo begun; sleep 98765" {}')
    run.says("begun")
    end(nix, run, how)


def test_people_see_a_store_here(nix: Scene) -> None:
    store = f"/srv/here-{next(numbers)}"
    nix.machines(f"{store} - - 1\n")
    checked = nix.client.run(INSTALLED, "check", check=False)
    assert "All machines are well." in checked.stdout, checked.stdout
    for verb in ("status", "explain"):
        assert store in nix.client.run(INSTALLED, verb).stdout


# -- A login that allows nix-daemon only -----------------------------------------------


def allow(nix: Scene, command: str, *, how: str = "key", user: str = "nix") -> None:
    """Let that user log in, but only to run that."""
    if f"\n{user}:" not in nix.builder.read("/etc/passwd"):
        nix.builder.add_user(user)
    connect(nix.client, nix.builder, user)
    home = nix.builder.user(user).home
    keys = f"{home}/.ssh/authorized_keys"
    public = nix.client.read("/root/.ssh/id_ed25519.pub")
    limit = f'command="{command}" ' if how == "key" else ""
    nix.builder.write(keys, limit + public)
    conf = nix.builder.read("/etc/ssh/sshd_config").partition("Match")[0]
    if how == "ForceCommand":
        conf += f"Match User {user}\n  ForceCommand {command}\n"
    nix.builder.write("/etc/ssh/sshd_config", conf)
    nix.builder.restart_sshd()
    nix.machines(f"ssh-ng://{user}@b1 - - 4\n")


@pytest.fixture(scope="module")
def trusting(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    """A builder with a daemon that trusts the user nix."""
    builder = other(pytestconfig, client_engine)
    conf = "trusted-users = root nix\n"
    with scene(client_engine, builder, builder_conf=conf) as running:
        running.builder.start_daemon()
        yield running


@pytest.fixture
def limited(trusting: Scene) -> Scene:
    forget(trusting)
    return trusting


@pytest.mark.parametrize("user", ["root", "nix"])
@pytest.mark.parametrize("how", ["key", "ForceCommand"])
def test_a_login_for_nix_daemon_alone_builds(
    limited: Scene, how: str, user: str
) -> None:
    nix = limited
    allow(nix, "nix-daemon --stdio", how=how, user=user)
    outcome = nix.build(dependent(), env={"NIX_DEBUG_HOOK": "1"})
    assert valid(nix.client, outcome.output), outcome.log
    assert nix.client.read(outcome.output).endswith("b1\n")
    assert "trying again" not in outcome.log and "cannot build on" not in outcome.log


def test_it_is_found_out_once(limited: Scene) -> None:
    nix = limited
    allow(nix, "nix-daemon --stdio")
    for number in range(3):
        debug = {"NIX_DEBUG_HOOK": "1"}
        asked = nix.build(fresh(), env=debug).log.count("nix@b1 nix-store --serve")
        assert asked == (0 if number else 1)


def test_a_login_for_nix_store_alone_builds(limited: Scene) -> None:
    allow(limited, "nix-store --serve --write")
    outcome = limited.build(dependent())
    assert limited.client.read(outcome.output).endswith("b1\n")


@pytest.mark.parametrize("expression", [fresh, to_send])
@pytest.mark.parametrize("how", ["key", "ForceCommand"])
@pytest.mark.parametrize("scheme", ["ssh", "ssh-ng"])
def test_a_login_that_may_not_write_is_told_of_at_once(
    limited: Scene, how: str, scheme: str, expression: Callable[[], str]
) -> None:
    nix = limited
    allow(nix, "nix-store --serve", how=how)
    nix.machines(f"{scheme}://nix@b1 - - 4\n")
    outcome = nix.build(expression(), check=False, timeout=TIMEOUT_S)
    assert outcome.status != 0 and outcome.log.count("is not allowed") == 1, outcome.log
    assert "that key there must be: nix-store --serve --write" in outcome.log
    assert "trying again" not in outcome.log


def test_other_builds_leave_a_login_that_may_not_write_alone(limited: Scene) -> None:
    """Also after it has answered a question of who finds out whether it is of use again."""
    nix = limited
    allow(nix, "nix-store --serve")
    nix.machines("ssh://nix@b1 - - 1 9\nroot@b1 - - 1\n")
    change_hook(nix, PAUSE_S=0.1, PAUSE_LIMIT_S=0.1)
    connect(nix.client, nix.builder)
    try:
        names = [f"chain-{next(numbers)}" for _ in range(6)]
        links = "".join(
            f'{name} = mk "{name}" "sleep 0.3; echo > $out" {{ before = {before}; }};'
            for name, before in zip(names, ["null", *names])
        )
        outcome = nix.build(f"let {links} in {names[-1]}")
        # Again if who finds out was lost on the way, and so forgot the reason.
        assert outcome.log.count("is not allowed") < len(names), outcome.log
    finally:
        nix.client.copy(HOOK, INSTALLED)


def test_a_line_without_ng_is_told_of_it(limited: Scene) -> None:
    nix = limited
    allow(nix, "nix-daemon --stdio")
    nix.machines("nix@b1 - - 4\n")
    outcome = nix.build(fresh(), check=False, timeout=TIMEOUT_S)
    assert outcome.status != 0 and "write ssh-ng://nix@b1" in outcome.log, outcome.log
    assert "trying again" not in outcome.log, outcome.log


@pytest.fixture(scope="module")
def pair(client_engine: str, builder_engine: str) -> Iterator[Scene]:
    with scene(client_engine, builder_engine) as running:
        yield running


@pytest.mark.parametrize(
    "command, scheme, remedy",
    [
        ("nix-daemon --stdio", "ssh-ng", ""),
        ("nix-daemon --stdio", "ssh", "write ssh-ng://root@b1"),
        ("nix-store --serve", "ssh-ng", "there must be: nix-store --serve --write"),
    ],
)
def test_any_nix_with_any_other_builds_or_is_told_what_the_key_must_allow(
    pair: Scene, command: str, scheme: str, remedy: str
) -> None:
    forget(pair)
    allow(pair, command, user="root")
    pair.machines(f"{scheme}://root@b1 - - 4\n")
    outcome = pair.build(dependent(), check=False, timeout=TIMEOUT_S)
    assert (outcome.status != 0) == bool(remedy) and remedy in outcome.log, outcome.log
    assert "trying again" not in outcome.log


@pytest.mark.parametrize("known", [False, True])
def test_a_daemon_that_is_down_is_an_outage_of_its_own(
    limited: Scene, known: bool
) -> None:
    """Also where it was found out before that it is nix-daemon that one has to talk to."""
    nix = limited
    allow(nix, "nix-daemon --stdio")
    if known:
        nix.build(fresh())
    nix.builder.signal(signal.SIGKILL, *daemons(nix.builder))
    try:
        run = nix.start(fresh())
        run.says("waiting for a machine")
        poll(lambda: "probe" in str(list(nix.client.path(OWN).iterdir())), "a probe")
    finally:
        nix.builder.run("rm", "-f", "/nix/var/nix/daemon-socket/socket")
        nix.builder.start_daemon()
    assert run.end().status == 0, run.log
    assert "protocol mismatch" not in run.log, run.log
    assert "systemctl start nix-daemon.socket" in run.log, run.log


def daemons(host: Host) -> list[int]:
    return [p.pid for p in host.processes() if p.cmdline == "nix-daemon --daemon"]


def test_a_build_by_a_daemon_fails_as_any_other(limited: Scene) -> None:
    nix = limited
    allow(nix, "nix-daemon --stdio")
    outcome = nix.build('mk "bad" "echo oops; exit 3" {}', check=False)
    assert outcome.status != 0 and "oops" in outcome.log, outcome.log
    assert "trying again" not in outcome.log


def test_a_build_by_a_daemon_is_logged(limited: Scene, client_engine: str) -> None:
    """2.3's nix-store drops what a daemon tells it of a log."""
    nix = limited
    allow(nix, "nix-daemon --stdio")
    log = nix.build(fresh()).log
    assert ("here" in log.splitlines()) == (version(client_engine) >= (2, 4))


def test_a_build_by_a_daemon_obeys_a_timeout(limited: Scene) -> None:
    """No daemon is told of it."""
    nix = limited
    allow(nix, "nix-daemon --stdio")
    slow = f'mk "slow-{next(numbers)}" "sleep 98765" {{}}'
    outcome = nix.build(slow, "--timeout", "1", check=False, timeout=TIMEOUT_S)
    assert outcome.status != 0 and "it exceeds the limits" in outcome.log
    nix.settle()


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "SIGKILL"])
def test_a_build_by_a_daemon_ends_with_its_hook(limited: Scene, how: str) -> None:
    nix = limited
    allow(nix, "nix-daemon --stdio")
    script = f"touch /tmp/runs-{next(numbers)}; sleep 98765"
    run = nix.start(f'mk "long-{next(numbers)}" "{script}" {{}}')
    poll(lambda: "sleep 98765" in str(nix.builder.processes()), "the build")
    end(nix, run, how)


def test_check_says_that_it_is_nix_daemon(limited: Scene) -> None:
    nix = limited
    allow(nix, "nix-daemon --stdio")
    done = nix.client.run(INSTALLED, "check", "--json", check=False)
    assert done.returncode == 0 and "allows only nix-daemon" in done.stdout, done.stdout


# -- This machine's own line -----------------------------------------------------------

TWO = """[
  (mk "one-NUMBER" "while ! [ -e /tmp/go-NUMBER ]; do sleep 0.05; done; hostname > $out" {})
  (mk "two-NUMBER" "hostname > $out" {}) ]"""


@pytest.mark.parametrize(
    "speeds, jobs, where",
    [
        ((1, 1), 1, "client"),
        ((4, 1), 1, "client"),
        ((1, 4), 1, "b1"),
        ((4, 1), 0, "b1"),
    ],
    ids=["equal", "faster here", "faster there", "no jobs here"],
)
def test_a_build_stays_where_no_machine_is_better(
    nix: Scene, speeds: tuple[int, int], jobs: int, where: str
) -> None:
    nix.machines(f"localhost - - 4 {speeds[0]}\nb1 - - 4 {speeds[1]}\n")
    expression = fresh().replace("hostname", "uname -n")
    outcome = nix.build(expression, "--option", "max-jobs", str(jobs))
    assert nix.client.read(outcome.output) == f"{where}\n"


def test_a_build_leaves_if_this_machine_is_busier(nix: Scene) -> None:
    """The first is built here for as long as it takes to build the second elsewhere."""
    change_hook(nix, BEGIN_S=60)  # which a slow Nix may need
    nix.machines("localhost - - 4 1\nb1 - - 4 1\n")
    number = str(next(numbers))
    run = nix.start(TWO.replace("NUMBER", number), "--option", "max-jobs", "2")
    run.says("on 'ssh://b1'")
    for host in (nix.client, nix.builder):
        host.write(f"/tmp/go-{number}", "")
    found = [nix.client.read(output) for output in run.end().outputs]
    assert sorted(found) == ["b1\n", "client\n"]


def test_people_see_the_line_of_this_machine(nix: Scene) -> None:
    nix.machines("localhost - - 4 2\nb1 - - 4 1\n")
    checked = nix.client.run(INSTALLED, "check", check=False).stdout
    assert "All machines are well." in checked
    assert "localhost" in checked and "here" in checked
    assert "this machine, of speed 2" in nix.client.run(INSTALLED, "status").stdout
    explained = " ".join(nix.client.run(INSTALLED, "explain").stdout.split())
    assert "localhost is this machine, where Nix itself builds" in explained


def test_a_daemon_that_does_not_trust_its_user_builds_from_signed_inputs(
    client_engine: str, pytestconfig: pytest.Config
) -> None:
    """As without nix-daemon between: the derivation's closure is sent."""
    with distrustful(client_engine, other(pytestconfig, client_engine)) as nix:
        allow(nix, "nix-daemon --stdio")
        nix.build(INPUT, *LOCAL)
        outcome = nix.build(DEPENDENT)
        assert "does not trust its user" in outcome.log
        assert nix.client.read(outcome.output) == "client\ntextb1\n"
