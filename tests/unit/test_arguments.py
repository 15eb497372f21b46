"""Arguments and settings: Nix's to us, and ours to the programs we start."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import fakes
import pytest

from nix_build_remote import (
    ALONE,
    CHATTY,
    COPY_BATCH_BYTES,
    SIGNS,
    USELESS,
    Error,
    Machine,
    Nix,
    Programs,
    SameStore,
    Seat,
    Ssh,
    Store,
    Talk,
    WrongHostKey,
    batches,
    find_program,
    heard,
    is_old_call,
    load_machines,
    old_nix,
    parse_version,
    printable,
    program_version,
    quoted,
    ssh_defaults,
    ssh_directory,
    ssh_options,
    user_ssh_options,
)

KEY_LINE = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE6kaVyB"
KEY = base64.b64encode(KEY_LINE.encode()).decode()


def machine(line: str) -> Machine:
    nix = Nix(False, {"system": "x86_64-linux"}, {})
    return Machine.parse("machines:1", line, nix)


# -- How Nix starts us ----------------------------------------------------------------


@pytest.mark.parametrize(
    "line, old",
    [
        ("x86_64-linux 0 0", True),
        ("x86_64-linux 3600 1 7200", True),
        ("i686-linux 0 0 0", True),
        ("3", False),
        ("--extra 3", False),
        ("--option 1 2", False),
        ("extra arguments 3", False),
        ("nix_build_remote.py 3", False),
        ("0 0 0", False),
        ("x86_64-linux 0", False),
        ("x86_64-linux 0 0 0 0", False),
        ("x86_64-linux 0 -1", False),
        ("--version", False),
        ("", False),
    ],
)
def test_old_calls_are_told_by_their_arguments(line: str, old: bool) -> None:
    assert is_old_call(line.split()) is old


@pytest.mark.parametrize(
    "arguments, setting, value",
    [
        (["i686-linux", "60", "0", "120"], "system", "i686-linux"),
        (["i686-linux", "60", "0", "120"], "max-silent-time", "60"),
        (["i686-linux", "60", "0", "120"], "timeout", "120"),
        (["i686-linux", "60", "0"], "timeout", "0"),
    ],
)
def test_old_arguments_become_settings(
    arguments: list[str], setting: str, value: str
) -> None:
    assert old_nix(arguments, {}).settings[setting] == value


@pytest.mark.parametrize("argument, trace", [("0", False), ("1", True)])
def test_old_build_traces_are_printed_when_asked_for(
    argument: str, trace: bool
) -> None:
    nix = old_nix(["i686-linux", "0", argument], {})
    assert bool(nix.number("print-build-trace")) is trace


def test_old_machines_come_from_nix_remote_systems(tmp_path: Path) -> None:
    (tmp_path / "machines").write_text("b1\n", encoding="utf-8")
    environ = {"NIX_REMOTE_SYSTEMS": str(tmp_path / "machines")}
    machines, _ = load_machines(old_nix(["i686-linux", "0", "0"], environ))
    assert [machine.destination for machine in machines] == ["b1"]


def test_new_machines_do_not_come_from_nix_remote_systems(tmp_path: Path) -> None:
    (tmp_path / "machines").write_text("b1\n", encoding="utf-8")
    environ = {"NIX_REMOTE_SYSTEMS": str(tmp_path / "machines")}
    machines, _ = load_machines(Nix(False, {"builders": "b2"}, environ))
    assert [machine.destination for machine in machines] == ["b2"]


@pytest.mark.parametrize(
    "nix, directory",
    [
        (Nix(True, {}, {}), "/run/nix/current-load"),
        (Nix(False, {}, {}), "/nix/var/nix/current-load"),
        (Nix(False, {}, {"NIX_STATE_DIR": "/s"}), "/s/current-load"),
        (Nix(False, {"store": "local?root=/r"}, {}), "/r/nix/var/nix/current-load"),
        (Nix(True, {}, {"NIX_CURRENT_LOAD": "/load"}), "/load"),
        (Nix(False, {}, {"NIX_CURRENT_LOAD": "/load"}), "/load"),
    ],
    ids=["1.x", "2.x", "NIX_STATE_DIR", "chroot store", "1.x chosen", "2.x chosen"],
)
def test_slots_are_in_the_stock_hooks_directory(nix: Nix, directory: str) -> None:
    assert nix.slot_directory == directory


# -- The local store ------------------------------------------------------------------

STORE, STATE = "/nix/store", "/nix/var/nix"


@pytest.mark.parametrize(
    "uri, directory, real, state",
    [
        ("", STORE, STORE, STATE),
        ("auto", STORE, STORE, STATE),
        ("daemon", STORE, STORE, STATE),
        ("local", STORE, STORE, STATE),
        ("local://", STORE, STORE, STATE),
        ("local?root=/r", STORE, "/r/nix/store", "/r/nix/var/nix"),
        ("local?root=/r/", STORE, "/r/nix/store", "/r/nix/var/nix"),
        ("local://?root=/r", STORE, "/r/nix/store", "/r/nix/var/nix"),
        ("local:///r", STORE, "/r/nix/store", "/r/nix/var/nix"),
        ("/r", STORE, "/r/nix/store", "/r/nix/var/nix"),
        ("/", STORE, STORE, STATE),
        ("local?root=/a%20b", STORE, "/a b/nix/store", "/a b/nix/var/nix"),
        ("local?root=/%C3%BC", STORE, "/ü/nix/store", "/ü/nix/var/nix"),
        ("local?root=/ü", STORE, "/ü/nix/store", "/ü/nix/var/nix"),
        ("local?root=/r&state=/s", STORE, "/r/nix/store", "/s"),
        ("local?real=/real", STORE, "/real", STATE),
        ("local?store=/s/store", "/s/store", "/s/store", STATE),
        ("local?store=/s/store&real=/real", "/s/store", "/real", STATE),
        ("local?store=/s/store&root=/r", "/s/store", "/r/nix/store", "/r/nix/var/nix"),
    ],
)
def test_a_store_is_found(uri: str, directory: str, real: str, state: str) -> None:
    store = Store.parse(uri, {})
    assert (store.directory, store.real, store.state) == (directory, real, state)


@pytest.mark.parametrize(
    "environ, uri, directory, real, state",
    [
        ({"NIX_STORE_DIR": "/s"}, "auto", "/s", "/s", STATE),
        ({"NIX_STORE": "/s"}, "auto", "/s", "/s", STATE),
        ({"NIX_STATE_DIR": "/t"}, "auto", STORE, STORE, "/t"),
        ({"NIX_STATE_DIR": "/t"}, "/r", STORE, "/r/nix/store", "/r/nix/var/nix"),
        ({"NIX_STORE_DIR": "/s"}, "/r", "/s", "/r/nix/store", "/r/nix/var/nix"),
    ],
    ids=[
        "store",
        "store by its old name",
        "state",
        "state in a root",
        "store in a root",
    ],
)
def test_a_store_is_where_the_environment_says(
    environ: dict[str, str], uri: str, directory: str, real: str, state: str
) -> None:
    store = Store.parse(uri, environ)
    assert (store.directory, store.real, store.state) == (directory, real, state)


@pytest.mark.parametrize(
    "path",
    [
        "/nix/store",
        f"/nix/store/{'0' * 32}",
        f"/nix/store/{'0' * 32}-",
        f"/nix/store/{'0' * 32}-x/y",
        f"/nix/store/{'0' * 32}-x\n",
        f"/nix/store/{'0' * 31}-x",
        f"/nix/store//{'0' * 32}-x",
        f"/nix/store/{'0' * 32}-{'x' * 212}",
        f"/gnu/store/{'0' * 32}-x",
        f"/nix/store/{'0' * 32}-$(reboot)",
    ],
)
def test_what_is_no_store_path_is_refused(path: str) -> None:
    with pytest.raises(Error, match="is not a store path"):
        Store.parse("", {}).name(path)


def test_a_store_path_of_the_greatest_length_is_accepted() -> None:
    name = f"{'0' * 32}-{'x' * 211}"
    assert Store.parse("", {}).file(f"/nix/store/{name}") == f"/nix/store/{name}"


# -- ssh ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, option",
    [
        ("b1:2222", "-oPort=2222"),
        ("b1 - /root/.ssh/id", "-i /root/.ssh/id"),
        ("ssh://b1?compress=true", "-oCompression=yes"),
    ],
)
def test_ssh_is_told_of(line: str, option: str) -> None:
    assert f" {option} " in f" {' '.join(ssh_options(machine(line), ''))} "


@pytest.mark.parametrize("option", ["-oPort", "-i", "-oCompression"])
def test_ssh_finds_in_its_configuration_what_the_line_does_not_say(option: str) -> None:
    options = ssh_options(machine("nix@b1"), "")
    assert not [word for word in options if word.startswith(option)]


@pytest.mark.parametrize(
    "option",
    [
        "-oRemoteCommand=none",
        "-oRequestTTY=no",
        "-oClearAllForwardings=yes",
        "-oStdinNull=no",
        "-oForkAfterAuthentication=no",
    ],
)
def test_what_spoils_a_session_is_switched_off(option: str) -> None:
    assert option in ssh_options(machine("b1"), "")


@pytest.mark.parametrize(
    "text, words",
    [
        ("", []),
        ("-p 22  -4", ["-p", "22", "-4"]),
        ('-o "User=a b"', ["-o", "User=a b"]),
        ("-o 'ProxyCommand=nc %h %p'", ["-o", "ProxyCommand=nc %h %p"]),
        (r"-i /a\ b", ["-i", "/a b"]),
        ("-o User=$USER", ["-o", "User=$USER"]),
    ],
    ids=["none", "plain", "double quotes", "single quotes", "backslash", "no shell"],
)
def test_nix_sshopts_are_split(text: str, words: list[str]) -> None:
    assert user_ssh_options({"NIX_SSHOPTS": text}) == words


def test_nix_sshopts_with_an_open_quote_are_an_error_that_shows_them() -> None:
    with pytest.raises(Error, match="NIX_SSHOPTS.*-o 'User=a"):
        user_ssh_options({"NIX_SSHOPTS": "-o 'User=a"})


def ssh(line: str, directory: Path, **environ: str) -> Ssh:
    fakes.write_program(directory / "bin/ssh", "")
    nix = Nix(False, {}, {"PATH": f"{directory}/bin", **environ})
    programs, folder = Programs(Talk(nix)), ssh_directory(str(directory))
    return Ssh.find(machine(line), nix, programs, folder)


def test_without_a_connection_no_file_of_the_users_is_a_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ssh("b1", tmp_path)
    (tmp_path / "none").write_text("mine", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir())
    seat = Seat(made)
    seat.connection.retire()
    seat.note_fewer()
    assert sorted(os.listdir()) == before


def test_the_users_options_come_before_our_defaults(tmp_path: Path) -> None:
    made = ssh("b1", tmp_path, NIX_SSHOPTS="-oConnectTimeout=99")
    options = made.session(ALONE)
    timeouts = [word for word in options if word.startswith("-oConnectTimeout=")]
    assert timeouts[0] == "-oConnectTimeout=99" and len(timeouts) == 2


def test_who_goes_alone_leaves_out_what_would_hide_the_reason(tmp_path: Path) -> None:
    made = ssh("b1", tmp_path, NIX_SSHOPTS="-q -4 -vvq -E /log -E/log -v -F -oUser=q")
    shared, alone = made.options("/socket"), made.options(ALONE)
    assert {"-q", "-vvq", "-E", "/log", "-E/log", "-v"} <= set(shared)
    assert alone[-6:] == [
        "-oClearAllForwardings=yes",
        "-4",
        "-F",
        "-oUser=q",
        "-S",
        "none",
    ]
    levels = [word for word in alone if word.startswith("-oLogLevel=")]
    assert levels[0] == "-oLogLevel=INFO"


@pytest.mark.parametrize(
    "configured, expected",
    [
        ("", ["ConnectTimeout=10", "ServerAliveInterval=10", "ServerAliveCountMax=3"]),
        (
            "connecttimeout none\nserveraliveinterval 0\nserveralivecountmax 3\n",
            ["ConnectTimeout=10", "ServerAliveInterval=10", "ServerAliveCountMax=3"],
        ),
        (
            "host b1\nconnecttimeout 120\n",
            ["ServerAliveInterval=10", "ServerAliveCountMax=3"],
        ),
        ("serveraliveinterval 300\n", ["ConnectTimeout=10"]),
    ],
    ids=[
        "nothing known",
        "nothing configured",
        "ConnectTimeout",
        "ServerAliveInterval",
    ],
)
def test_what_is_configured_is_left_alone(configured: str, expected: list[str]) -> None:
    options = ["-oBatchMode=yes", *(f"-o{option}" for option in expected)]
    assert ssh_defaults(configured) == options


def test_the_host_comes_after_the_end_of_options(tmp_path: Path) -> None:
    command = ssh("nix@b1", tmp_path).session(ALONE, "nix-store", "--serve")
    assert command[-4:] == ["--", "nix@b1", "nix-store", "--serve"]


def test_a_pinned_host_key_is_all_that_is_believed(tmp_path: Path) -> None:
    options = ssh(f"b1 - - 1 1 - - {KEY}", tmp_path).options(ALONE)
    (file,) = (word for word in options if word.startswith("-oUserKnownHostsFile="))
    assert "-oStrictHostKeyChecking=yes" in options
    assert Path(file.partition("=")[2]).read_text("ascii") == f"* {KEY_LINE}\n"


@pytest.mark.parametrize("name", ["DISPLAY", "SSH_ASKPASS", "NIX_HELD_LOCKS"])
def test_children_do_not_get(name: str, tmp_path: Path) -> None:
    assert name not in ssh("b1", tmp_path, **{name: "x"}).environ


# -- Programs -------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    """Four directories: a folder, a plain file and two programs of that name."""
    (tmp_path / "1/prog").mkdir(parents=True)
    for number in (2, 3, 4):
        fakes.write_program(tmp_path / f"{number}/prog", "")
    (tmp_path / "2/prog").chmod(0o644)
    return [str(tmp_path / str(number)) for number in (1, 2, 3, 4)]


def test_a_program_is_found_in_the_first_place_that_has_it(places: list[str]) -> None:
    assert find_program("prog", places) == f"{places[2]}/prog"


def test_a_missing_program_is_an_error_that_says_where_it_was_looked_for() -> None:
    with pytest.raises(Error) as caught:
        find_program("prog", ["/a", "/b", "/a"])
    assert str(caught.value) == "cannot find the program prog; looked in /a, /b"


@pytest.mark.parametrize(
    "answer, version",
    [
        ("", (1, 11)),
        ("nix-copy-closure (Nix) 2.3.7\n", (2, 3, 7)),
        ("nix-copy-closure (Nix) 2.34.8\n", (2, 34, 8)),
        ("nix-copy-closure (Nix) 2.28\n", (2, 28)),
        ("nix-copy-closure (Nix) 2.35.0pre20260901_0a1b2c3\n", (2, 35, 0)),
        ("nix-copy-closure (Lix, like Nix) 2.93.3\n", (2, 18)),
        ("nix-copy-closure (Determinate Nix 3.11.2) 2.31.1\n", (2, 31, 1)),
    ],
    ids=["1.11", "2.3", "2.34", "two numbers", "unreleased", "Lix", "Determinate"],
)
def test_the_version_of_nix_is_read(answer: str, version: tuple[int, ...]) -> None:
    assert parse_version(answer) == version


def version_asker(directory: Path, *, status: int = 0) -> Path:
    """A nix-copy-closure that counts how often it is asked for its version."""
    script = f"""
        open({str(directory / "asked")!r}, "a").write("once ")
        print("nix-copy-closure (Nix) 2.34.8")
        raise SystemExit({status})
    """
    return fakes.write_program(directory / "nix-copy-closure", dedent(script))


def ask(program: Path) -> tuple[int, ...]:
    nix = Nix(False, {}, {"PATH": ""})
    return program_version(str(program), nix, Programs(Talk(nix)), str(program.parent))


def asked(directory: Path) -> int:
    return len((directory / "asked").read_text(encoding="utf-8").split())


def test_a_program_is_asked_for_its_version_once(tmp_path: Path) -> None:
    program = version_asker(tmp_path)
    assert [ask(program) for _ in range(3)] == [(2, 34, 8)] * 3
    assert asked(tmp_path) == 1


def test_a_changed_program_is_asked_for_its_version_again(tmp_path: Path) -> None:
    program = version_asker(tmp_path)
    ask(program)
    os.utime(program, (1, 1))
    ask(program)
    assert asked(tmp_path) == 2


def test_the_version_of_a_program_that_failed_is_not_kept(tmp_path: Path) -> None:
    program = version_asker(tmp_path, status=1)
    ask(program)
    ask(program)
    assert asked(tmp_path) == 2


# -- Messages -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["plain", 'say "no"', "a\\b\\", "two\nlines\tand a tab", "größer", "{}[]\x00"],
)
def test_what_is_quoted_is_json(text: str) -> None:
    assert json.loads(quoted(text)) == text.replace("\x00", "")


@pytest.mark.parametrize(
    "text, left",
    [
        ("\x1b[31;1mred\x1b[0m", "red"),
        ("\x1b[31", ""),
        ("bell\x07, \x9b31m, \x7f\r\n", "bell, 31m, \n"),
        ("no \udcff UTF-8", "no \ufffd UTF-8"),
    ],
)
def test_control_characters_are_left_out(text: str, left: str) -> None:
    assert printable(text) == left


# -- Batches --------------------------------------------------------------------------

MANY = [f"/nix/store/{number:032}-{'x' * 100}" for number in range(20_000)]


def test_batches_fit_on_a_command_line() -> None:
    longest = max(len(" ".join(batch)) for batch in batches(MANY))
    assert longest <= COPY_BATCH_BYTES


def test_batches_lose_nothing() -> None:
    assert [path for batch in batches(MANY) for path in batch] == MANY


def test_few_paths_are_one_batch() -> None:
    assert list(batches(["/a", "/b"])) == [["/a", "/b"]]


def test_a_path_longer_than_a_batch_is_a_batch() -> None:
    long = "x" * (COPY_BATCH_BYTES + 1)
    assert list(batches(["a", long, "b"])) == [["a"], [long], ["b"]]


def test_nothing_is_no_batch() -> None:
    assert list(batches([])) == []


REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_start_imports_little() -> None:
    """Each of these would cost every build some ms."""
    dear = {"re", "enum", "typing", "collections", "contextlib", "subprocess", "json"}
    program = "import nix_build_remote, sys; print(*sys.modules)"
    command = [sys.executable, "-S", "-c", program]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert dear.isdisjoint(done.stdout.split())


@pytest.mark.parametrize("quote", ["", "'", '"'], ids=["2.8", "2.26", "2.34"])
def test_a_daemon_that_may_not_be_reached_is_no_wrong_key(quote: str) -> None:
    socket = f"{quote}/nix/var/nix/daemon-socket/socket{quote}"
    denied = (
        f"error: getting status of {socket}: Permission denied (ssh's exit status 1)"
    )
    assert "nix-users" in heard(Error, denied).remedy
    gone = "cannot connect to socket at '/nix/var/nix/daemon-socket/socket': Connection refused"
    error = heard(Error, gone)
    assert (
        error.lasting is False and "systemctl start nix-daemon.socket" in error.remedy
    )
    assert "key" in heard(Error, "Permission denied (publickey).").remedy


def test_a_remedy_names_how_that_machine_is_reached() -> None:
    b1 = machine("ssh://nix@b1:2222?compress=true - /root/.ssh/id 8")
    new = heard(Error, "Host key verification failed.", "ssh").remedy_for(b1.names)
    assert new.endswith(": ssh -i /root/.ssh/id -p 2222 nix@b1 true")
    changed = heard(Error, "HAS CHANGED", "ssh").remedy_for(b1.names)
    assert (
        "ssh-keygen -R '[b1]:2222' && ssh -i /root/.ssh/id -p 2222 nix@b1 " in changed
    )
    daemon = heard(Error, "protocol mismatch", "far").remedy_for(b1.names)
    assert "write ssh-ng://nix@b1:2222 in its line" in daemon
    unknown = heard(Error, "resolve hostname b1", "ssh").remedy_for(b1.names)
    assert unknown.startswith("correct machines:1, or add b1 to DNS")


def test_no_remedy_tells_to_log_in_on_a_store_here() -> None:
    here = machine("/srv/store").names
    assert heard(Error, "Host key verification failed.", "ssh").remedy_for(here) == ""
    assert "make room" in heard(Error, "disk is full").remedy_for(here)


def test_each_remedy_names_only_what_a_machine_has() -> None:
    names = machine("b1").names
    rows = [row.partition(" = ")[2] for row in SIGNS.splitlines()]
    for remedy in (*rows, USELESS, CHATTY, WrongHostKey.remedy, SameStore.remedy):
        assert set(re.findall("{(.*?)}", remedy)) <= names.keys()


DRV = "/nix/store/g8kcl4454zr4fc4isbkn2b3cdwj12qdj-a.drv"


@pytest.mark.parametrize(
    "words, meaning",
    [
        (f"error: builder for '{DRV}' failed with exit code 7", "BROKEN"),
        (f"error: builder for '{DRV}' failed to produce output path", "BROKEN"),
        (f"error: builder for '{DRV}-signature' failed with exit code 7", "BROKEN"),
        (f"error: builder for '{DRV}-unreachable' failed with exit code 7", "BROKEN"),
        (
            f"error: Cannot build '{DRV}'.\nReason: builder failed with exit code 7.",
            "BROKEN",
        ),
        (f"error: hash mismatch in fixed-output derivation '{DRV}':", "FAILED"),
        (f"error: derivation '{DRV}' may not be deterministic", "FAILED"),
        ("error: output '/nix/store/a' is not allowed to refer to", "FAILED"),
        (
            f"error: {DRV} killed after writing more than 9 bytes of log output",
            "FAILED",
        ),
        (f"error: {DRV} timed out after 4 seconds of silence", "OVERTIME"),
        (f"builder for '{DRV}' failed; No space left on device", "FULL"),
        (f"error: a 'kvm' is required to build '{DRV}'", "LACKS"),
        ("error: experimental Lix feature 'ca-derivations' is disabled", "LACKS"),
        ("error: Build failed due to failed dependency", ""),
        (f"error: 1 dependencies of derivation '{DRV}' failed to build", ""),
        (f"build of '{DRV}' failed", ""),
    ],
)
def test_a_daemons_words_tell_what_became_of_a_build(words: str, meaning: str) -> None:
    assert heard(Error, words, "far").meaning == meaning


@pytest.mark.parametrize("reason", ["bad permissions", "invalid format"])
def test_the_public_half_of_a_key_is_called_that(reason: str) -> None:
    words = f'Load key "/root/.ssh/id_builder.pub": {reason} Permission denied ('
    assert "name the private key" in heard(Error, words, "ssh").remedy
