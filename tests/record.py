"""Record how a real Nix talks: makes a folder like those in transcripts/.

    python3 tests/record.py ENGINE FOLDER      (as root; tests/engines makes the engines)

It writes how that Nix calls the hook (argv), every byte it sends for three derivations
(hook-N.stdin), and a conversation with its `nix-store --serve --write` (serve.txt): `>`
what is sent, `<` what is answered, `!` its stderr, `# =` what that means.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fakes import RECORDED_BUILDS
from lab import Host
from scene import Scene, change_hook, scene

import nix_build_remote as hook

EXPRESSION = """
let
  mk = name: outputs: attributes: derivation ({
    inherit name outputs; system = "x86_64-linux"; builder = "/bin/sh";
    args = [ "-c" "for o in $outputs; do eval echo x '>' \\\\$$o; done" ];
    PATH = "/usr/bin:/bin"; } // attributes);
in rec {
  a = mk "cap-a" [ "out" ] { requiredSystemFeatures = [ "kvm" "big-parallel" ]; };
  b = mk "cap-b" [ "out" "dev" ] { inherit a; };
  c = mk "cap-c" [ "out" ] {
    inherit b; dev = b.dev; text = "tab\\tquote\\"back\\\\slash\\nnewline ünïcode"; };
}
"""
RECORD = """
sent = open(os.environ["RECORD"], "wb", buffering=0)
open("/tmp/argv", "w").write(" ".join(["build-remote", *sys.argv[1:]]) + "\\n")
real = hook.read_stdin
def read_stdin(count):
    data = real(count)
    sent.write(data)
    return data
hook.read_stdin = read_stdin
"""


def record_calls(nix: Scene, folder: Path) -> None:
    nix.machines("b1 x86_64-linux - 1 1 kvm,big-parallel\n")
    nix.client.write("/tmp/cap.nix", EXPRESSION)
    change_hook(nix, RECORD)
    for number, name in enumerate("abc"):
        command = ["nix-build", "/tmp/cap.nix", "-A", name, "--no-out-link", *nix.hook]
        nix.client.run(*command, env={"RECORD": f"/tmp/hook-{number}.stdin"})
        data = nix.client.path(f"/tmp/hook-{number}.stdin").read_bytes()
        (folder / f"hook-{number}.stdin").write_bytes(data)
    (folder / "argv").write_text(nix.client.read("/tmp/argv"), encoding="utf-8")


class Here(hook.Seat):
    """A session with the nix-store of a host of the lab, without ssh."""

    greeting_s = 30

    def __init__(self, host: Host) -> None:
        nothing: Any = None
        self.host = host
        self.connection = hook.Connection(nothing, hook.ALONE)

    def tells(self) -> bool:
        return False

    def margin_s(self) -> float:
        return hook.MARGIN_S

    def session(self, tells: bool) -> Any:
        return self.host.popen(*hook.SERVE, stdin=-1, stdout=-1, stderr=-1)


class Recorder(hook.Session):
    """Notes what is sent and what was read of the answers, one line for each."""

    lines: list[str]

    def write(self, data: bytes) -> None:
        self.lines = getattr(self, "lines", [])
        self.lines.append(f"> {data.hex()}")
        super().write(data)

    def from_inbox(self, limit: int) -> bytes:
        data = super().from_inbox(limit)
        if self.lines[-1].startswith("< "):
            self.lines[-1] += data.hex()
        else:
            self.lines.append(f"< {data.hex()}")
        return data


def record_session(host: Host, folder: Path) -> None:
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 4)
        session = Recorder(Here(host))
        session.greeting.get()
        session.ask_valid([f"/nix/store/{'0' * 32}-nothing"]).get()
        for build in RECORDED_BUILDS:
            nix = hook.Nix(False, {"timeout": str(build.timeout)}, {})
            encoded = hook.Derivation.parse(build.drv).encode([])
            status, message = session.ask_to_build(build.path, encoded, nix).get()
            meaning = f"status {status}, message {message!r}, times and outputs"
            session.lines.append(f"# = {meaning}")
        session.finish()
        log.seek(0)
        said = log.read().decode().splitlines()
    text = "\n".join([*session.lines, *(f"! {line}" for line in said)])
    (folder / "serve.txt").write_text(text + "\n", encoding="utf-8")


def main(name: str, target: str) -> None:
    os.dup2(os.open(os.devnull, os.O_RDWR), 4)  # the log's: nothing else may come there
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    features = "system-features = kvm big-parallel"
    with scene(name, name, builder_conf=features) as nix:
        record_calls(nix, folder)
        record_session(nix.builder, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
