"""Derivations: real .drv files, every escape, and those that must be refused."""

from __future__ import annotations

import json
from pathlib import Path

import fakes
import pytest

from nix_build_remote import (
    Derivation,
    Error,
    Output,
    Store,
    cache_files,
    integer,
    read_derivation,
    string,
)

DRV = f"/nix/store/{'1' * 32}-x.drv"
OUT = f"/nix/store/{'1' * 32}-x"


def term(
    outputs: str = f'[("out","{OUT}","","")]',
    inputs: str = "[]",
    sources: str = "[]",
    arguments: str = "[]",
    environment: str = "[]",
) -> str:
    """What a .drv file says, one part of it as given."""
    program = f'"x86_64-linux","/bin/sh",{arguments},{environment}'
    return f"Derive({outputs},{inputs},{sources},{program})"


def read(directory: Path, text: str | bytes) -> Derivation:
    """As the hook does, from a store in that directory."""
    store = Store("/nix/store", str(directory), str(directory), "")
    data = text if isinstance(text, bytes) else text.encode()
    (directory / Path(DRV).name).write_bytes(data)
    return read_derivation(DRV, store)


# -- Recorded ones --------------------------------------------------------------------


def recorded(path: str) -> Derivation:
    store = Store("/nix/store", str(fakes.TRANSCRIPTS), "", "")
    return read_derivation(path, store)


@pytest.mark.parametrize(
    "path, outputs",
    [
        (fakes.CAP_A_DRV, [Output("out", fakes.CAP_A, "", "")]),
        (
            fakes.CAP_B_DRV,
            [
                Output("dev", fakes.CAP_B_DEV, "", ""),
                Output("out", fakes.CAP_B, "", ""),
            ],
        ),
        (fakes.CAP_C_DRV, [Output("out", fakes.CAP_C, "", "")]),
    ],
    ids=["cap-a", "cap-b", "cap-c"],
)
def test_recorded_outputs_are_read(path: str, outputs: list[Output]) -> None:
    assert list(recorded(path).outputs) == outputs


@pytest.mark.parametrize(
    "path, has",
    [(fakes.CAP_A_DRV, False), (fakes.CAP_B_DRV, True), (fakes.CAP_C_DRV, True)],
    ids=["cap-a", "cap-b", "cap-c"],
)
def test_recorded_input_derivations_are_seen(path: str, has: bool) -> None:
    assert bool(recorded(path).input_derivations) is has


@pytest.mark.parametrize(
    "path", [fakes.CAP_A_DRV, fakes.CAP_B_DRV, fakes.CAP_C_DRV], ids=["a", "b", "c"]
)
def test_recorded_builder_is_read(path: str) -> None:
    read = recorded(path)
    script = "for o in $outputs; do eval echo x '>' \\$$o; done"
    assert (read.platform, read.builder) == ("x86_64-linux", "/bin/sh")
    assert read.arguments == ("-c", script)


@pytest.mark.parametrize(
    "path, name, value",
    [
        (fakes.CAP_A_DRV, "requiredSystemFeatures", "kvm big-parallel"),
        (fakes.CAP_B_DRV, "a", fakes.CAP_A),
        (fakes.CAP_C_DRV, "text", 'tab\tquote"back\\slash\nnewline ünïcode'),
    ],
    ids=["cap-a", "cap-b", "every escape"],
)
def test_recorded_environment_is_read(path: str, name: str, value: str) -> None:
    assert (name, value) in recorded(path).environment


@pytest.mark.parametrize("build", fakes.RECORDED_BUILDS, ids=["works", "fails", "late"])
@pytest.mark.parametrize("version", fakes.VERSIONS)
def test_encoding_is_as_recorded(build: fakes.RecordedBuild, version: str) -> None:
    encoded = Derivation.parse(build.drv).encode(["/nix/store/unused"])
    (request,) = (
        sent for sent in fakes.recording(version).sent if build.path.encode() in sent
    )
    assert request.startswith(integer(8) + string(build.path) + encoded)


def test_inputs_stand_in_for_input_derivations() -> None:
    encoded = recorded(fakes.CAP_B_DRV).encode([fakes.CAP_A])
    assert fakes.texts([fakes.CAP_A]) + string("x86_64-linux") in encoded


def test_without_input_derivations_its_own_sources_are_sent() -> None:
    drv = Derivation.parse(term(sources='["/nix/store/a","/nix/store/b"]'))
    sources = fakes.texts(["/nix/store/a", "/nix/store/b"])
    assert sources + string("x86_64-linux") in drv.encode(["/nix/store/unused"])


# -- Strings --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written, meant",
    [
        (r"\n", "\n"),
        (r"\r", "\r"),
        (r"\t", "\t"),
        (r"\"", '"'),
        (r"\\", "\\"),
        (r"\\n", "\\n"),
        (r"\\\n", "\\\n"),
        (r"\x", "x"),
        ("a\nb\tc\r\nd", "a\nb\tc\r\nd"),
        ("[(,)]", "[(,)]"),
        ("", ""),
    ],
    ids=[
        "newline",
        "carriage return",
        "tab",
        "quote",
        "backslash",
        "backslash and n",
        "backslash and newline",
        "needless",
        "raw control characters",
        "brackets",
        "empty",
    ],
)
def test_an_escape_is_understood(written: str, meant: str, tmp_path: Path) -> None:
    drv = read(tmp_path, term(arguments=f'["{written}"]'))
    assert drv.arguments == (meant,)


def test_bytes_that_are_not_utf_8_reach_the_builder_unchanged(tmp_path: Path) -> None:
    drv = read(tmp_path, term(arguments='["caf\u00e9"]').encode("latin-1"))
    assert integer(4) + b"caf\xe9" in drv.encode([])


def test_a_string_of_a_megabyte_is_read(tmp_path: Path) -> None:
    drv = read(tmp_path, term(arguments=f'["{"a" * 2**20}"]'))
    assert len(drv.arguments[0]) == 2**20


# -- What is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Derive",
        "Derive(",
        "Derive()",
        "Derive([])",
        term()[:-1],
        term() + ",",
        term() + "x",
        term() + "()",
        term().replace("Derive", "derive"),
        term().replace("])", ")]"),
        term().replace('"/bin/sh"', '"/bin/sh'),
        term().replace('"/bin/sh"', "/bin/sh"),
        term().replace('"/bin/sh",', '"/bin/sh"'),
        term().replace('"/bin/sh"', '"/bin/sh",'),
        term().replace('"/bin/sh"', '["/bin/sh"]'),
        term().replace('"/bin/sh"', '"/bin/sh\\'),
        term(outputs='[("out","","")]'),
        term(outputs='[["out","","",""]'),
        term(outputs='[("out",[],"","")]'),
        term(sources="[[]]"),
        term(arguments='[("a")]'),
        term(environment='["ab"]'),
        term(environment='[("a")]'),
        term(environment='[("a","b","c")]'),
        term(outputs='"abcd"'),
        term(outputs='["abcd"]'),
        term(sources='"ab"'),
        term(arguments='"ab"'),
        term(arguments='["a",]'),
        "Derive" + "(" * 5000,
    ],
    ids=[
        "empty",
        "no term",
        "open",
        "no parts",
        "one part",
        "end cut off",
        "comma after it",
        "rubbish after it",
        "term after it",
        "another word",
        "crossed brackets",
        "open string",
        "no quotes",
        "missing comma",
        "one comma more",
        "list for string",
        "backslash at the end",
        "output of three",
        "open output",
        "list for a path",
        "list for a source",
        "tuple for an argument",
        "string for a pair",
        "pair of one",
        "pair of three",
        "string for outputs",
        "string for an output",
        "string for sources",
        "string for arguments",
        "comma before bracket",
        "deep",
    ],
)
def test_a_malformed_derivation_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(Error, match=f"{DRV}.*: it (is not|does not)"):
        read(tmp_path, text)


@pytest.mark.parametrize(
    "outputs",
    [
        '[("lib","","r:sha256","impure")]',
        '[("lib","","","")]',
        f'[("dev","{OUT}","",""),("lib","","","")]',
    ],
    ids=["impure", "deferred", "the second"],
)
def test_an_output_without_a_path_is_refused_by_name(
    outputs: str, tmp_path: Path
) -> None:
    with pytest.raises(Error, match=f"{DRV}.*'lib' is not known before the build"):
        read(tmp_path, term(outputs=outputs))


def test_a_dynamic_derivation_is_refused_by_that_word(tmp_path: Path) -> None:
    text = term().replace("Derive(", 'DrvWithVersion("xp-dyn-drv",')
    with pytest.raises(Error, match=f"{DRV}.* dynamic derivation"):
        read(tmp_path, text)


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "/nix/store/../../etc/passwd", "/nix/store/short", OUT + "/bin"],
)
def test_an_output_outside_the_store_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(Error, match="is not a store path"):
        read(tmp_path, term(outputs=f'[("out","{path}","","")]'))


def test_a_fixed_output_is_no_reason_to_refuse(tmp_path: Path) -> None:
    fixed = f'[("out","{OUT}","r:sha256","{"0" * 64}")]'
    output = read(tmp_path, term(outputs=fixed)).outputs[0]
    assert output == Output("out", OUT, "r:sha256", "0" * 64)


def test_a_missing_derivation_is_an_error_that_names_it(tmp_path: Path) -> None:
    store = Store("/nix/store", str(tmp_path), "", "")
    with pytest.raises(Error, match=f"{DRV}.*No such file"):
        read_derivation(DRV, store)


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", f"/nix/store/../{'1' * 32}-x.drv", f"/nix/store/{'e' * 32}-x.drv"],
    ids=["elsewhere", "dots", "no such letter"],
)
def test_a_derivation_outside_the_store_is_not_read(path: str, tmp_path: Path) -> None:
    with pytest.raises(Error, match="is not a store path"):
        read_derivation(path, Store("/nix/store", str(tmp_path), "", ""))


FLOATING = (
    'Derive([("out","","r:sha256","")],[],[],"x86_64-linux","/bin/sh",'
    '["-c","echo hi; echo CA > $out"],[("PATH","/usr/bin:/bin"),("builder","/bin/sh"),'
    '("name","ca"),("out","/1rz4g4znpzjwh1xymhjpm42vipw92pr73vdgl6xs1hycac8kf2n9"),'
    '("outputHashAlgo","sha256"),("outputHashMode","recursive"),'
    '("system","x86_64-linux")])'
)


def test_a_realisation_is_called_what_nix_calls_it() -> None:
    """As 2.8 and 2.34 say of it."""
    digest = "79f1fa33f1f21f0887901fa83e573951dc12fb6e52f190b8b36000d835312593"
    floating = Derivation.parse(FLOATING)
    assert floating.realisations() == {"out": f"sha256:{digest}!out"}


def test_where_an_output_is_is_told_as_2_34_wants_it_and_as_2_35() -> None:
    floating = Derivation.parse(FLOATING)
    path = f"/nix/store/{'1' * 32}-ca"
    files = cache_files(DRV, floating, {"out": path})
    old = files[f"realisations/{floating.realisations()['out']}.doi"]
    new = files[f"build-trace-v2/{Path(DRV).name}/out.doi"]
    assert json.loads(old)["outPath"] == json.loads(new)["outPath"] == Path(path).name


@pytest.mark.parametrize(
    "change, is_floating",
    [
        (("", ""), True),
        (('"r:sha256",""', '"r:sha256","impure"'), False),
        (('"r:sha256",""', '"",""'), False),
        (('("out",""', '("out","/nix/store/x"'), False),
        (("],[],[]", '],[("/nix/store/x.drv",["out"])],[]'), False),
        (('[("out"', '[("../../out"'), False),
    ],
    ids=["floating", "impure", "deferred", "known", "not resolved", "no name"],
)
def test_only_what_is_resolved_and_floating_is_sent(
    change: tuple[str, str], is_floating: bool
) -> None:
    assert Derivation.parse(FLOATING.replace(*change, 1)).is_floating == is_floating
