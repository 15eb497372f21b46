"""Nix's integers and strings, and the recorded bytes of five versions of Nix."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import fakes
import pytest

import nix_build_remote
from nix_build_remote import (
    Derivation,
    Error,
    Machine,
    Nix,
    Nonsense,
    PathInfo,
    Programs,
    Request,
    Seat,
    Session,
    Ssh,
    Talk,
)


def reader(data: bytes) -> Callable[[int], bytes]:
    stream = io.BytesIO(data)

    def read(count: int) -> bytes:
        got = stream.read(count)
        if len(got) < count:
            raise EOFError
        return got

    return read


# -- Encoding -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, data",
    [
        ("", b"\0" * 8),
        ("a", b"\1" + b"\0" * 7 + b"a" + b"\0" * 7),
        ("12345678", b"\x08" + b"\0" * 7 + b"12345678"),
        ("ü", b"\2" + b"\0" * 7 + b"\xc3\xbc" + b"\0" * 6),
        ("\udcff", b"\1" + b"\0" * 7 + b"\xff" + b"\0" * 7),
    ],
    ids=["empty", "padded", "a multiple of 8", "utf-8", "not utf-8"],
)
class TestAString:
    def test_is_encoded(self, text: str, data: bytes) -> None:
        assert nix_build_remote.string(text) == data

    def test_is_decoded(self, text: str, data: bytes) -> None:
        assert nix_build_remote.read_string(reader(data)) == text


@pytest.mark.parametrize("number", [0, 1, 255, 2**32, 2**64 - 1])
def test_an_integer_survives_the_way(number: int) -> None:
    read = reader(nix_build_remote.integer(number))
    assert nix_build_remote.read_integer(read) == number


def test_an_integer_is_little_endian() -> None:
    assert nix_build_remote.integer(0x0102) == b"\2\1" + b"\0" * 6


@pytest.mark.parametrize("texts", [[], [""], ["out", "dev", "a longer one"]])
def test_a_list_survives_the_way(texts: list[str]) -> None:
    read = reader(nix_build_remote.strings(texts))
    assert nix_build_remote.read_strings(read) == texts


# -- Hostile bytes --------------------------------------------------------------------


@pytest.mark.parametrize("length", [64 * 2**20 + 1, 2**63, 2**64 - 1])
def test_a_string_that_is_announced_too_long_is_refused(length: int) -> None:
    with pytest.raises(Error, match=f"{length} bytes"):
        nix_build_remote.read_string(reader(fakes.number(length)))


@pytest.mark.parametrize("announced", [2**40, 2**63, 2**64 - 1])
def test_a_list_is_not_believed_beyond_what_arrives(announced: int) -> None:
    read = reader(fakes.number(announced) + fakes.text("only one"))
    with pytest.raises(EOFError):
        nix_build_remote.read_strings(read)


def test_a_huge_announced_list_takes_no_memory() -> None:
    tracemalloc.start()
    with contextlib.suppress(EOFError):
        nix_build_remote.read_strings(reader(fakes.number(2**40)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_truncated_list_is_the_end_of_the_conversation(cut: int) -> None:
    whole = fakes.texts(["12345678", "out"])
    with pytest.raises(EOFError):
        nix_build_remote.read_strings(reader(whole[:-cut]))


def test_padding_that_is_not_zero_is_refused() -> None:
    with pytest.raises(Error, match="padding"):
        nix_build_remote.read_string(reader(fakes.number(1) + b"a\0\0\0\0\0\0b"))


def test_what_is_said_of_paths_is_read_only_so_far() -> None:
    """Though each of its words may be as long as the longest string."""
    long = fakes.text("x" * (nix_build_remote.WIRE_LIMIT_BYTES // 2))
    info = fakes.texts([]) + 2 * fakes.number(0) + 2 * fakes.text("") + fakes.texts([])
    read_so_far = 0
    rest = bytearray()

    def read(count: int) -> bytes:
        nonlocal read_so_far
        while len(rest) < count:
            rest.extend(fakes.text(f"/nix/store/{read_so_far}") + long + info)
        data = bytes(rest[:count])
        del rest[:count]
        read_so_far += count
        return data

    with pytest.raises(Nonsense):
        nix_build_remote.read_infos(read, 0x207)
    assert read_so_far < 3 * nix_build_remote.WIRE_LIMIT_BYTES


# -- What Nix sent to the hook --------------------------------------------------------


class Sent(NamedTuple):
    """What one recorded hook-N.stdin says."""

    request: Request
    old_inputs: set[str]  # the closure of the derivation, as 1.x sends it
    inputs: set[str]
    outputs: dict[str, str]


def request(drv: str, *features: str) -> Request:
    return Request(False, "x86_64-linux", drv, frozenset(features))


SENT = [
    Sent(
        request(fakes.CAP_A_DRV, "kvm", "big-parallel"),
        {fakes.CAP_A_DRV},
        set(),
        {"out": fakes.CAP_A},
    ),
    Sent(
        request(fakes.CAP_B_DRV),
        {fakes.CAP_A_DRV, fakes.CAP_B_DRV, fakes.CAP_A},
        {fakes.CAP_A},
        {"out": fakes.CAP_B, "dev": fakes.CAP_B_DEV},
    ),
    Sent(
        request(fakes.CAP_C_DRV),
        {fakes.CAP_A_DRV, fakes.CAP_B_DRV, fakes.CAP_C_DRV}
        | {fakes.CAP_B, fakes.CAP_B_DEV},
        {fakes.CAP_B, fakes.CAP_B_DEV},
        {"out": fakes.CAP_C},
    ),
]


class Heard(NamedTuple):
    """The same, as the module understands it."""

    nix: Nix
    request: Request | None
    inputs: list[str]
    outputs: list[str]
    rest: bytes


@pytest.fixture(params=fakes.VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[0, 1, 2], ids=["cap-a", "cap-b", "cap-c"])
def number(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def argv(version: str) -> list[str]:
    path = fakes.TRANSCRIPTS / f"nix-{version}/argv"
    return path.read_text(encoding="utf-8").split()[1:]


@pytest.fixture
def heard(
    version: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Heard]:
    path = fakes.TRANSCRIPTS / f"nix-{version}/hook-{number}.stdin"
    with path.open(encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        old = nix_build_remote.is_old_call(argv(version))
        caller = nix_build_remote.old_nix if old else nix_build_remote.new_nix
        nix = caller(argv(version), {})
        asked = next(nix_build_remote.requests(nix))
        inputs, outputs = nix_build_remote.read_lists(nix)
        yield Heard(nix, asked, inputs, outputs, bytes(stdin.buffer.read()))


def test_recorded_argv_is_told_from_the_other_dialect(version: str) -> None:
    assert nix_build_remote.is_old_call(argv(version)) == (version == "1.11.17")


def test_recorded_request_is_understood(heard: Heard, number: int) -> None:
    assert heard.request == SENT[number].request


def test_recorded_inputs_are_understood(heard: Heard, number: int) -> None:
    sent = SENT[number]
    expected = sent.old_inputs if heard.nix.old else sent.inputs
    assert sorted(heard.inputs) == sorted(expected)


def test_recorded_outputs_are_understood(heard: Heard, number: int) -> None:
    outputs = SENT[number].outputs
    expected = outputs if heard.nix.since_2_4 else outputs.values()
    assert sorted(heard.outputs) == sorted(expected)


def test_recorded_bytes_are_read_to_the_last(heard: Heard) -> None:
    assert heard.rest == b""


@pytest.mark.parametrize("number", [0], ids=["cap-a"])
class TestRecordedSettings:
    def test_name_the_local_system(self, heard: Heard) -> None:
        assert heard.nix.settings["system"] == "x86_64-linux"

    @pytest.mark.parametrize("version", fakes.VERSIONS[1:])
    def test_name_the_default_machines_file(self, heard: Heard) -> None:
        assert heard.nix.settings["builders"] == "@/etc/nix/machines"

    @pytest.mark.parametrize(
        "version, count",
        [("2.3.7", 78), ("2.8.0", 91), ("2.26.3", 110), ("2.34.8", 122)],
    )
    def test_are_all_read(self, heard: Heard, count: int) -> None:
        assert len(heard.nix.settings.keys() - {"verbosity"}) == count

    @pytest.mark.parametrize(
        "version, since",
        [("2.3.7", False), ("2.8.0", True), ("2.26.3", True), ("2.34.8", True)],
    )
    def test_tell_2_4_from_older(self, heard: Heard, since: bool) -> None:
        assert heard.nix.since_2_4 is since

    @pytest.mark.parametrize(
        "version, slot",
        [
            ("2.3.7", "ssh:__b1?b=1&a=_"),
            ("2.8.0", "ssh:__b1?b=1&a=_"),
            ("2.26.3", "ssh:__b1?a=_&b=1"),
            ("2.34.8", "ssh:__b1?a=_&b=1"),
        ],
    )
    def test_tell_how_slots_are_named(self, heard: Heard, slot: str) -> None:
        name = nix_build_remote.machine_name("ssh://b1?b=1&a=/", heard.nix)
        assert nix_build_remote.file_name(name) == slot


# -- Content addresses ----------------------------------------------------------------

SHA256 = "00xyyr3fi8l6hb839bv3f7yb86yjv7xi1cgh1xnhipym4asvb4aq"
ADDRESSED = {
    "gwina1sjk7g95wq6fxc6b7s1hza53h74": (
        "fixed:r:sha256:04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw"
    ),
    "032avhrrgjp8441c41iid7ywc92j4z76": "fixed:sha1:iwjz551fyw0cxcjgf4l6c879zabd6wpm",
    "2z4pvdfchhd7fgqsqx4dd73arvck0fvf": (
        "fixed:r:sha512:2q80akf4fi29vbxj82s21m9y6xrdjnwi9q1c3kfab0032zdnl18nzninbjw6n0rz4p7"
        "6g8s1c5yv9hznv09l085azzqvk4hn9irv389"
    ),
    "8zv8i345w2xn27jrxj4cyjc6x3b4am1q": f"fixed:sha256:{SHA256}",
}


def addressed(digest: str, address: str) -> PathInfo:
    """What a builder says of a path without references, which has that content address."""
    rest = fakes.text(address) + fakes.texts([])
    return PathInfo(f"/nix/store/{digest}-hello", "", (), 0, "", rest)


@pytest.mark.parametrize("digest", ADDRESSED)
def test_a_content_address_makes_the_path_that_it_makes_in_nix(digest: str) -> None:
    info = addressed(digest, ADDRESSED[digest])
    assert info.addressed_path() == info.path


@pytest.mark.parametrize("digest", ADDRESSED)
@pytest.mark.parametrize(
    "address",
    [
        *("", "x", "e", ":", ":::", "ü:1", "fixed:r:sha256", "fixed:r:sha256:"),
        *("fixed:r:sha256:!", "fixed:r:sha256:" + "z" * 52, "fixed:r:sha256:ü"),
        *("fixed:r:sha256:" + "0" * n for n in (1, 51, 53, 9999)),
        *(f"{method}:{SHA256}" for method in ("text:sha256", "fixed:r:sha256", "junk")),
        *(
            f"fixed:{SHA256}",
            f"fixed:sha256:{SHA256.upper()}",
            f"fixed:sha256:{SHA256} ",
        ),
    ],
)
def test_no_other_content_address_does(digest: str, address: str) -> None:
    info = addressed(digest, address)
    assert info.addressed_path() != info.path


def test_a_path_without_a_content_address_has_none() -> None:
    info = PathInfo(f"/nix/store/{'0' * 32}-hello", "", (), 0)
    assert info.addressed_path() != info.path


# -- What a builder answered ----------------------------------------------------------


class Replay(NamedTuple):
    """The module's side of a serve.txt, over a real process that plays the server."""

    version: int
    valid: set[str]
    results: list[tuple[int, str]]
    sent: bytes
    log: str


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Let descriptor 4 be that file; what it was before comes back."""
    before = -1
    with contextlib.suppress(OSError):
        before = os.dup(4)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 4)
    try:
        yield
    finally:
        os.dup2(before, 4) if before >= 0 else os.close(4)
        if before >= 0:
            os.close(before)


def ask(session: Session, path: str) -> set[str]:
    return set(session.ask_valid([path]).get())


def replay(version: str, directory: Path) -> Replay:
    sent = fakes.fake_player(directory, version)
    nix = Nix(False, {}, {"PATH": str(directory)})
    machine, programs = Machine.parse("machines:1", "b1", nix), Programs(Talk(nix))
    session = Session(Seat(Ssh.find(machine, nix, programs, str(directory))))
    try:
        with log_to(directory / "log"):
            valid = ask(session, f"/nix/store/{'0' * 32}-nothing")
            results = [
                session.ask_to_build(
                    build.path,
                    Derivation.parse(build.drv).encode([]),
                    Nix(nix.old, {"timeout": str(build.timeout)}, nix.environ),
                ).get()
                for build in fakes.RECORDED_BUILDS
            ]
            session.finish()
    finally:
        session.cancel()
    log = (directory / "log").read_text(encoding="utf-8")
    return Replay(session.version, valid, results, sent.read_bytes(), log)


@pytest.fixture(scope="module")
def replays(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Replay]:
    """All of them, played once."""
    make = tmp_path_factory.mktemp
    return {version: replay(version, make(version)) for version in fakes.VERSIONS}


def meant(meanings: list[str]) -> list[tuple[int, str]]:
    """The statuses and messages that the recording's own notes tell of."""
    found = []
    for meaning in meanings:
        match = re.fullmatch(r"status (\d+), message (.+?), (no )?times.*", meaning)
        if match:
            found.append((int(match[1]), ast.literal_eval(match[2])))
    return found


@pytest.mark.parametrize(
    "version, spoken",
    [
        ("1.11.17", 0x202),
        ("2.3.7", 0x205),
        ("2.8.0", 0x207),
        ("2.26.3", 0x207),
        ("2.34.8", 0x207),
    ],
)
def test_the_lower_version_of_both_is_spoken(
    version: str, spoken: int, replays: dict[str, Replay]
) -> None:
    assert replays[version].version == spoken


def test_every_byte_sent_is_as_recorded(
    version: str, replays: dict[str, Replay]
) -> None:
    assert replays[version].sent == b"".join(fakes.recording(version).sent)


def test_no_path_is_valid_that_the_server_did_not_name(
    version: str, replays: dict[str, Replay]
) -> None:
    assert replays[version].valid == set()


def test_recorded_messages_are_understood(
    version: str, replays: dict[str, Replay]
) -> None:
    expected = [message for _, message in meant(fakes.recording(version).meanings)]
    assert [message for _, message in replays[version].results] == expected


def test_recorded_statuses_are_understood(
    version: str, replays: dict[str, Replay]
) -> None:
    expected = [status for status, _ in meant(fakes.recording(version).meanings)]
    assert [status for status, _ in replays[version].results] == expected


def test_the_servers_stderr_is_the_log(
    version: str, replays: dict[str, Replay]
) -> None:
    assert replays[version].log == fakes.recording(version).stderr
