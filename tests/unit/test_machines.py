"""The machines file: every field, every form of a host, and what is refused."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from nix_build_remote import (
    Error,
    Machine,
    Nix,
    Slots,
    Way,
    file_name,
    load_machines,
)

OLD = Nix(True, {"system": "x86_64-linux"}, {})
NIX_2_3 = Nix(False, {}, {})
NIX_2_24 = Nix(
    False,
    {"experimental-features": "", "nix-shell-always-looks-for-shell-nix": "true"},
    {},
)
LIX = Nix(False, {"experimental-features": "", "repl-overlays": ""}, {})

NIX_2_31 = Nix(False, {**NIX_2_24.settings, "warn-short-path-literals": ""}, {})
NIX_2_36 = Nix(False, {**NIX_2_24.settings, "lint-short-path-literals": ""}, {})

KEY_LINE = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE6kaVyB root@b1"
KEY = base64.b64encode(KEY_LINE.encode()).decode()
FULL = (
    f"nix@b1 i686-linux,x86_64-linux /root/.ssh/id_b1 8 2.5 kvm,big-parallel perf {KEY}"
)


def parse(line: str, nix: Nix = OLD) -> Machine:
    return Machine.parse("machines:1", line, nix)


def load(builders: str) -> tuple[list[str], list[str]]:
    """The destinations of all machines, and all complaints."""
    settings = {"builders": builders, "system": "x86_64-linux"}
    machines, complaints = load_machines(Nix(False, settings, {}))
    return [machine.destination for machine in machines], complaints


# -- Fields ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value",
    [
        ("destination", "nix@b1"),
        ("systems", ("i686-linux", "x86_64-linux")),
        ("key", "/root/.ssh/id_b1"),
        ("max_jobs", 8),
        ("speed", 2.5),
        ("supported", {"kvm", "big-parallel"}),
        ("mandatory", {"perf"}),
        ("host_key", KEY_LINE),
    ],
)
def test_each_field_is_read(field: str, value: object) -> None:
    assert getattr(parse(FULL), field) == value


@pytest.mark.parametrize(
    "line", ["b1", "b1 - - - - - - -", "b1\t-  -"], ids=["missing", "dashes", "some"]
)
@pytest.mark.parametrize(
    "field, value",
    [
        ("systems", ("x86_64-linux",)),
        ("key", ""),
        ("max_jobs", 1),
        ("speed", 1),
        ("supported", set()),
        ("mandatory", set()),
        ("host_key", ""),
        ("port", 0),
        ("compress", False),
    ],
)
def test_each_field_has_a_default(line: str, field: str, value: object) -> None:
    assert getattr(parse(line), field) == value


def test_fields_are_separated_by_any_run_of_white_space() -> None:
    assert parse("b1  \t i686-linux\t\t-   4") == parse("b1 i686-linux - 4")


@pytest.mark.parametrize(
    "text, speed",
    [("0", 1), ("0.0", 1), ("2", 2), ("0.5", 0.5), (".5", 0.5), ("3.", 3)],
)
def test_speed_factor_is_a_decimal_and_zero_counts_as_one(
    text: str, speed: float
) -> None:
    assert parse(f"b1 - - 1 {text}").speed == speed


def test_max_jobs_may_be_zero() -> None:
    assert parse("b1 - - 0").max_jobs == 0


# -- Hosts ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host, destination, port",
    [
        ("b1", "b1", 0),
        ("nix@b1", "nix@b1", 0),
        ("my-alias_2.example.org", "my-alias_2.example.org", 0),
        ("b1:2222", "b1", 2222),
        ("ssh://b1", "b1", 0),
        ("ssh://b1/", "b1", 0),
        ("ssh://nix@b1:2222", "nix@b1", 2222),
        ("ssh-ng://nix@b1", "nix@b1", 0),
        ("::1", "::1", 0),
        ("nix@2001:db8::7", "nix@2001:db8::7", 0),
        ("[2001:db8::7]", "2001:db8::7", 0),
        ("ssh://[2001:db8::7]:2222", "2001:db8::7", 2222),
        ("ssh-ng://nix@[::1]:22", "nix@::1", 22),
        ("fe80::1%eth0", "fe80::1%eth0", 0),
        ("ssh://[fe80::1%25eth0]:22", "fe80::1%eth0", 22),
        ("192.0.2.7:22", "192.0.2.7", 22),
        ("ssh://alice%40corp@b1", "alice@corp@b1", 0),
        ("alice@corp@b1", "alice@corp@b1", 0),
        ("CORP\\alice@b1", "CORP\\alice@b1", 0),
        ("lab.builder_1~", "lab.builder_1~", 0),
        ("bü1", "bü1", 0),
        ("ssh://localhost:2222", "localhost", 2222),
    ],
)
def test_host_is_split_into_destination_and_port(
    host: str, destination: str, port: int
) -> None:
    machine = parse(host)
    assert (machine.destination, machine.port) == (destination, port)


@pytest.mark.parametrize(
    "parameter, field, value",
    [
        ("ssh-key=/root/.ssh/id", "key", "/root/.ssh/id"),
        ("ssh-key=/root/%2Essh/id", "key", "/root/.ssh/id"),
        ("compress=true", "compress", True),
        ("compress=false", "compress", False),
        (f"base64-ssh-public-host-key={KEY}", "host_key", KEY_LINE),
        (f"base64-ssh-public-host-key={KEY.rstrip('=')}", "host_key", KEY_LINE),
    ],
)
def test_parameters_of_a_uri_are_honoured(
    parameter: str, field: str, value: object
) -> None:
    assert getattr(parse(f"ssh://b1?{parameter}"), field) == value


def test_all_parameters_can_be_given_at_once() -> None:
    uri = f"ssh://b1?ssh-key=/k&compress=true&base64-ssh-public-host-key={KEY}"
    machine = parse(uri)
    assert (machine.key, machine.compress, machine.host_key) == ("/k", True, KEY_LINE)


def test_a_field_wins_over_the_parameter_of_the_same_meaning() -> None:
    assert parse("ssh://b1?ssh-key=/parameter - /field").key == "/field"


def test_parameters_that_change_nothing_here_are_accepted() -> None:
    assert (
        parse(
            "ssh://b1?max-connections=4&max-connection-age=9&trusted=true"
        ).destination
        == "b1"
    )


@pytest.mark.parametrize(
    "parameters, words",
    [
        ("", "nix-store --serve --write"),
        ("?remote-program=srun%20nix-store", "srun nix-store --serve --write"),
        ("?remote-program=/my$x", "'/my$x' --serve --write"),
        ("?remote-store=/s", "nix-store --serve --write --store /s"),
        (
            "?remote-store=/s?system-features=kvm%20b&compress=true",
            "nix-store --serve --write --store '/s?system-features=kvm b'",
        ),
    ],
)
def test_a_session_is_what_the_parameters_say(parameters: str, words: str) -> None:
    """Quoted for the shell there; a store may have parameters of its own."""
    (way,) = parse(f"ssh://b1{parameters}", NIX_2_24).ways
    assert " ".join(way.there) == words and not way.here


@pytest.mark.parametrize(
    "line, is_job",
    [
        ("ssh://b1", False),
        ("ssh://b1?remote-program=/a%20b/nix-store", True),
        ("ssh://b1?remote-program=/$a/nix-store", False),
        ("ssh-ng://b1?remote-program=/opt/nix-daemon", False),
        ("ssh://b1?remote-program=srun%20-u%20nix-store", True),
        ("ssh-ng://b1?remote-program=srun%20-u%20nix-daemon", True),
        ("ssh://b1?remote-program=/opt/in-the-cluster", True),
        ("/mnt/store", False),
    ],
)
def test_a_job_is_begun_by_another_program_than_nixs(line: str, is_job: bool) -> None:
    assert [way.is_job for way in parse(line, NIX_2_24).ways][-1] == is_job


@pytest.mark.parametrize(
    "line, store, features",
    [
        ("/mnt/store", "/mnt/store", ""),
        ("/mnt/s?system-features=c%20d - - 1 1 b a", "/mnt/s", "a b c d"),
        ("local?root=/r&real=/s", "local?real=/s&root=/r", ""),
        ("unix:///run/nix.socket", "unix:///run/nix.socket", ""),
        ("auto - - 1 1 kvm", "auto", "kvm"),
        ("localhost?remote-store=/s?x=y - - 1 1 a", "/s?x=y", "a"),
        ("ssh://localhost?remote-store=/s&remote-program=nix-store", "/s", ""),
        ("ssh://localhost/?remote-store=/s", "/s", ""),
    ],
)
def test_a_store_here_is_opened_by_a_program_here(
    line: str, store: str, features: str
) -> None:
    machine = parse(line, NIX_2_24)
    command = ("nix-store", "--serve", "--write", "--store", store)
    words = (*command, "--option", "system-features", features)
    assert (machine.ways, machine.destination) == ((Way((), words),), "")


@pytest.mark.parametrize(
    "parameters, serve, daemon",
    [
        ("", "nix-store --serve --write", "nix-daemon --stdio"),
        (
            "?remote-store=/s%20t",
            "nix-store --serve --write --store '/s t'",
            "nix-daemon --stdio --store '/s t'",
        ),
        ("?remote-program=/x%20nix-daemon", None, "/x nix-daemon --stdio"),
    ],
)
def test_what_speaks_the_daemons_protocol_is_reached_by_a_nix_store_here(
    parameters: str, serve: str | None, daemon: str
) -> None:
    """Where its program is named, that speaks no other."""
    ways = parse(f"ssh-ng://b1{parameters}", NIX_2_24).ways
    here = "nix-store --serve --write --store ssh-ng://builder"
    found = [(" ".join(way.there), " ".join(way.here)) for way in ways]
    assert found == [*([(serve, "")] if serve else []), (daemon, here)]


# -- What is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, reason",
    [
        ("ssh://b1?remote-store=/mnt", "Nix 1.x can use only the usual store"),
        ("ssh://b1?remote-program=nix", "Nix 1.x can use only the usual store"),
        ("ssh://b1?colour=blue", "'colour'"),
        ("ssh://b1/nix/store", "is not a host"),
        ("/mnt/store", "Nix 1.x can use only the usual store"),
        ("auto", "Nix 1.x can use only the usual store"),
        ("mnt/store", "'mnt/store' is no store to build in"),
        ("https://cache.example.org", "is no store to build in"),
        ("://b1", "is no store to build in"),
        ("ssh://", "is not a host name"),
        ("nix@", "is not a host name"),
        ("-oProxyCommand=evil", "'-oProxyCommand=evil' is not a host name"),
        ("ssh://-oProxyCommand=evil", "'-oProxyCommand=evil' is not a host name"),
        ("[-oProxyCommand=evil]", "'-oProxyCommand=evil' is not a host name"),
        ("nix@-oProxyCommand=evil", "'-oProxyCommand=evil' is not a host name"),
        ("-oProxyCommand=evil@b1", "'-oProxyCommand=evil' is not a user name"),
        ("ssh://-l@b1:22", "'-l' is not a user name"),
        ("$(reboot)", "is not a host name"),
        ("b1:65536", "there is no port 65536"),
        ("b1:", "is not a host name"),
        ("b1:ssh", "is not a host name"),
        (":22", "is not a host name"),
        ("[::1", "is not a host name"),
        ("[::1]22", "is not a host name"),
        ("[]", "is not a host name"),
        ("b\x011", "is not a host name"),
        ("b1\x7f", "is not a host name"),
        ("nix@b1;reboot", "is not a host name"),
        ("ssh://nix@b1%20-v", "is not a host name"),
        ("ssh://%2doProxyCommand=evil", "'-oProxyCommand=evil' is not a host name"),
        ("n\x1bix@b1", "is not a user name"),
        ("b1 x86_64-linux /root/my;key", "rename the file"),
        ("b1 x86_64-linux /root/$HOME", "rename the file"),
        ("ssh://b1?ssh-key=/root/my%20key", "rename the file"),
        ("b1 - - two", "maxJobs is 'two', not a whole number"),
        ("b1 - - -1", "maxJobs is '-1', not a whole number"),
        ("b1 - - 1.5", "maxJobs is '1.5', not a whole number"),
        ("b1 - - 99999999", "maxJobs is '99999999', not a whole number"),
        ("b1 - - ٣", "maxJobs is '٣', not a whole number"),
        ("b1 - - 1 fast", "speedFactor is 'fast', not a number of 0 or more"),
        ("b1 - - 1 -1", "speedFactor is '-1', not a number of 0 or more"),
        ("b1 - - 1 nan", "speedFactor is 'nan', not a number of 0 or more"),
        ("b1 - - 1 inf", "speedFactor is 'inf', not a number of 0 or more"),
        ("b1 - - 1 .", "speedFactor is '.', not a number of 0 or more"),
        ("b1 - - 1 1 - - AAAA", "the host key is not"),
        ("b1 - - 1 1 - - ssh-ed25519", "the host key is not"),
        ("ssh://b1?base64-ssh-public-host-key=x", "the host key is not"),
    ],
)
def test_a_line_that_cannot_be_used_is_refused(line: str, reason: str) -> None:
    with pytest.raises(Error) as caught:
        parse(line)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "key",
    ["ssh-ed25519 AAAA\n* ssh-rsa BBBB", "ssh-ed25519 AAAA\rx", "a\0 AAAA", "ü AAAA"],
    ids=["second line", "carriage return", "nul", "not ascii"],
)
def test_a_host_key_that_would_say_more_than_one_key_is_refused(key: str) -> None:
    encoded = base64.b64encode(key.encode()).decode()
    with pytest.raises(Error, match="the host key is not"):
        parse(f"b1 - - 1 1 - - {encoded}")


@pytest.mark.parametrize("nix", [OLD, NIX_2_3, NIX_2_24], ids=["1.x", "2.3", "2.24"])
@pytest.mark.parametrize(
    "line",
    ["b1 x86_64-\0linux", "b1 - - 1 1 k\0vm", "ssh://b1?priority=\0", "b1\0"],
    ids=["system", "feature", "parameter", "host"],
)
def test_a_nul_in_a_line_costs_no_other_machine(
    line: str, nix: Nix, tmp_path: Path
) -> None:
    file = tmp_path / "machines"
    file.write_text(f"{line}\nb2\n", encoding="utf-8")
    settings = {**nix.settings, "builders": f"@{file}", "system": "x86_64-linux"}
    environ = {"NIX_REMOTE_SYSTEMS": str(file)}
    nix = Nix(nix.old, settings, environ)
    slots = Slots(str(tmp_path))
    machines, _ = load_machines(nix)
    taken = [slots.choose([machine]) for machine in machines]
    assert machines[-1].destination == "b2" and all(taken)


# -- Files ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "builders, expected",
    [
        ("", []),
        ("b1", ["b1"]),
        ("b1;b2 ; b3", ["b1", "b2", "b3"]),
        ("b1\nb2\r\nb3\n", ["b1", "b2", "b3"]),
        ("# b1\nb2 # b3; b4\n#", ["b2"]),
        (" ;; \n ; b1 ;\n\n", ["b1"]),
    ],
    ids=["empty", "one", "semicolons", "lines", "comments", "nothing between"],
)
def test_builders_are_separated(builders: str, expected: list[str]) -> None:
    assert load(builders) == (expected, [])


def test_a_file_is_included_where_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "machines").write_text("b2\nb3\n", encoding="utf-8")
    assert load(f"b1; @{tmp_path}/machines ; b4")[0] == ["b1", "b2", "b3", "b4"]


def test_an_included_file_may_include_another(tmp_path: Path) -> None:
    (tmp_path / "outer").write_text(f"b1\n@{tmp_path}/inner\nb3", encoding="utf-8")
    (tmp_path / "inner").write_text("b2", encoding="utf-8")
    assert load(f"@{tmp_path}/outer")[0] == ["b1", "b2", "b3"]


def test_a_file_may_be_included_twice(tmp_path: Path) -> None:
    (tmp_path / "machines").write_text("b1", encoding="utf-8")
    assert load(f"@{tmp_path}/machines;@{tmp_path}/machines")[0] == ["b1", "b1"]


def test_a_missing_file_lists_no_machine_and_is_no_error(tmp_path: Path) -> None:
    assert load(f"b1;@{tmp_path}/missing;b2") == (["b1", "b2"], [])


def test_a_file_that_is_not_utf_8_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "machines").write_bytes(b"b1 # caf\xe9\n")
    assert load(f"@{tmp_path}/machines") == (["b1"], [])


@pytest.mark.parametrize(
    "bad, complaint",
    [
        ("b9:ssh", "builders:2: 'b9:ssh' is not a host name"),
        ("b9 - - many", "builders:2: maxJobs is 'many'"),
        ("@etc/machines", "builders:2: the machines file 'etc/machines'"),
        ("@", "builders:2: the machines file ''"),
        ("@/", "builders:2: the machines file '/': Is a directory"),
    ],
    ids=["host", "number", "relative file", "no file", "unreadable file"],
)
class TestOneBadLine:
    def test_gives_one_complaint_with_file_line_and_reason(
        self, bad: str, complaint: str
    ) -> None:
        (only,) = load(f"b1\n{bad}\nb2")[1]
        assert only.startswith(complaint)

    def test_costs_only_itself(self, bad: str, complaint: str) -> None:
        assert load(f"b1\n{bad}\nb2")[0] == ["b1", "b2"]


def test_a_complaint_names_the_included_file_and_its_line(tmp_path: Path) -> None:
    (tmp_path / "machines").write_text("b1\n\n# b2\nb9:ssh\n", encoding="utf-8")
    (complaint,) = load(f"@{tmp_path}/machines")[1]
    assert complaint.startswith(f"{tmp_path}/machines:4: 'b9:ssh'")


class TestAFileThatIncludesItself:
    @pytest.fixture
    def loaded(self, tmp_path: Path) -> tuple[list[str], list[str]]:
        path = tmp_path / "machines"
        path.write_text(f"b1\n@{path}\nb2\n", encoding="utf-8")
        return load(f"@{path}\nb3")

    def test_is_complained_of_once(self, loaded: tuple[list[str], list[str]]) -> None:
        (complaint,) = loaded[1]
        assert "machines:2: " in complaint and "includes itself" in complaint

    def test_costs_no_machine(self, loaded: tuple[list[str], list[str]]) -> None:
        assert loaded[0] == ["b1", "b2", "b3"]


@pytest.mark.parametrize(
    "line, slip",
    [
        ("b1 x86_64", "'x86_64'"),
        ("b1 X86_64-Linux", "'X86_64-Linux'"),
        ("b1 - id_rsa", "'id_rsa'"),
        ("b1 - - 1 1 - - - extra", "8 fields"),
    ],
    ids=["no kernel", "upper case", "relative key", "too many fields"],
)
class TestASlip:
    def test_is_warned_of_with_its_place(self, line: str, slip: str) -> None:
        (complaint,) = load(line)[1]
        assert complaint.startswith("builders:1: ") and slip in complaint

    def test_costs_nothing(self, line: str, slip: str) -> None:
        assert load(line)[0] == ["b1"]


# -- Names of lock files, as the stock hooks have them --------------------------------


@pytest.mark.parametrize(
    "nix, line, name",
    [
        (OLD, "nix@b1 i686-linux,x86_64-linux", "i686-linux+x86_64-linux-nix@b1"),
        (OLD, "nix@b1", "x86_64-linux-nix@b1"),
        (NIX_2_3, "nix@b1 i686-linux", "ssh:__nix@b1"),
        (NIX_2_3, "ssh-ng://nix@b1:22", "ssh-ng:__nix@b1:22"),
        (
            NIX_2_3,
            "ssh://b1?ssh-key=/root/.ssh/id&compress=true",
            "ssh:__b1?ssh-key=_root_.ssh_id&compress=true",
        ),
        (NIX_2_24, "nix@b1", "ssh:__nix@b1"),
        (NIX_2_24, "ssh://nix@b1:22", "ssh:__nix@b1:22"),
        (
            NIX_2_24,
            "ssh://b1?ssh-key=/root/.ssh/id&compress=true",
            "ssh:__b1?compress=true&ssh-key=_root_.ssh_id",
        ),
        (NIX_2_24, "ssh://b1?priority=%2b1", "ssh:__b1?priority=%2B1"),
        (LIX, "b1", "ssh:__b1-1k0ypn568k8hki3p"),
        (LIX, f"ssh://{'b' * 60}", f"ssh:__{'b' * 42}-1vk6fiagcvi6xbh1"),
        (NIX_2_3, "/s/m", "_s_m"),
        (NIX_2_24, "/s/m", "local:___s_m"),
        (NIX_2_3, "local?root=/r", "local?root=_r"),
        (NIX_2_24, "local?root=/r", "local:__?root=_r"),
        (NIX_2_24, "auto", "auto"),
        (NIX_2_24, "unix:///run/s", "unix:___run_s"),
        (
            NIX_2_24,
            "ssh://localhost?remote-store=/s?x=y z",
            "ssh:__localhost?remote-store=_s?x%3Dy",
        ),
        (NIX_2_24, "u@fd77::2", "ssh:__u@fd77::2"),
        (NIX_2_31, "u@fd77::2", "ssh:__u@[fd77::2]"),
        (NIX_2_36, "fd77::2", "ssh:__[fd77::2]"),
        (NIX_2_31, "ssh-ng://[fd77::2]:22", "ssh-ng:__[fd77::2]:22"),
        (NIX_2_31, "ssh://u@[fe80::1%eth0]", "ssh:__u@[fe80::1%25eth0]"),
        (NIX_2_31, "ssh://fd77::2?priority=1", "ssh:__[fd77::2]?priority=1"),
        (NIX_2_31, "nix@b1", "ssh:__nix@b1"),
    ],
)
def test_slot_files_have_the_stock_hooks_names(nix: Nix, line: str, name: str) -> None:
    assert parse(line, nix).slot_prefix == name


@pytest.mark.parametrize(
    "nix, name",
    [
        (OLD, "nix@b1"),
        (NIX_2_3, "ssh:__nix@b1"),
        (NIX_2_24, "ssh:__nix@b1"),
    ],
    ids=["1.x", "2.3", "2.24"],
)
def test_upload_locks_have_the_stock_hooks_names(nix: Nix, name: str) -> None:
    assert parse("nix@b1 i686-linux", nix).upload_prefix == name


LONG = [
    f"b1 {','.join(f'system{n}-linux' for n in range(40))}",
    f"ssh://b1?priority={'1' * 300}",
    f"b1 {'ü' * 190}-linux",
]


@pytest.mark.parametrize("nix", [OLD, NIX_2_3, NIX_2_24], ids=["1.x", "2.3", "2.24"])
@pytest.mark.parametrize("line", LONG, ids=["systems", "parameter", "not ascii"])
def test_a_long_name_still_fits_into_a_file_name(nix: Nix, line: str) -> None:
    assert len(f"{parse(line, nix).slot_prefix}-99.upload-lock".encode()) <= 255


def test_long_names_that_differ_at_the_end_stay_different() -> None:
    assert file_name("b" * 300) != file_name("b" * 299 + "c")
