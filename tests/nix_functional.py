"""Run Nix's own functional tests of distributed builds, with this hook and with Nix's own.

    tests/nix-functional CHECKOUT [--engine NAME] [--show] [TEST...]

CHECKOUT is a checkout of Nix's sources, of a version for which tests/engines has made an
engine (or this machine's own, --engine host). Nothing in it is changed: the tests run in a
host of the farm, on a copy. All of build-remote*.sh run and binary-cache-build-remote.sh, or
those whose names have one of the words TEST. Exit status 1 if one passes with Nix's own hook
and not with this one; --show prints what that one said.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab import ENGINES, Engine, FarmError, Host, Lab, engine
from scene import HOOK, INSTALLED

WHERE = "/srv/nix"
SKIPPED = (77, 99)
TIMEOUT_S = 300
# The tests want a shell without libraries for their sandboxes; ours have the host's own.
BUSYBOX = '#!/bin/sh\nshift\nexec /bin/sh "$@"\n'
SETTINGS = "sandbox-paths = /bin /usr /lib /lib64\n"
# What Nix's build system would put into the tests.
VARIABLES = {
    "bash": "/bin/bash",
    "bindir": "/usr/bin",
    "coreutils": "/usr/bin",
    "sandbox_shell": f"{WHERE}/busybox",
    "dot": "",
    "system": "x86_64-linux",
}


def tests_of(checkout: Path) -> Path:
    """The folder with the functional tests; it moved in 2.16."""
    for folder in (checkout / "tests/functional", checkout / "tests"):
        if (folder / "build-remote.sh").exists():
            return folder
    raise FarmError(f"{checkout} has no tests/functional/build-remote.sh")


def engine_for(checkout: Path, name: str) -> Engine:
    """The engine of that name, or the one of the version of the checkout."""
    if not name:
        version = (checkout / ".version").read_text()
        name = next((n for n in ENGINES if version.startswith(f"{n}.")), "host")
    return engine(name)


def bring(host: Host, folder: Path, version: str) -> None:
    """Copy the tests into the host, and fill in what the build system would."""
    files = subprocess.run(["tar", "c", "."], cwd=folder, stdout=-1, check=True).stdout
    host.run("mkdir", "-p", "/nix/store", f"{WHERE}/tests", f"{WHERE}/tmp")
    host.run("tar", "x", "--no-same-owner", "-C", f"{WHERE}/tests", input=files)
    host.write(f"{WHERE}/busybox", BUSYBOX, 0o755)
    host.copy(HOOK, INSTALLED)
    known = {**VARIABLES, "PACKAGE_VERSION": version}
    for path in host.path(f"{WHERE}/tests").rglob("*.in"):
        text = re.sub("@([A-Za-z_]+)@", lambda m: known.get(m[1], ""), path.read_text())
        path.with_suffix("").write_text(text)


def names_of(host: Host, words: list[str]) -> list[str]:
    """The tests to run: what the others are made of starts nothing by itself."""
    found = []
    for path in sorted(host.path(f"{WHERE}/tests").glob("*build-remote*.sh")):
        chosen = not words or any(word in path.name for word in words)
        if chosen and "source common.sh" in path.read_text():
            found.append(path.name)
    return found


def run(host: Host, name: str, hook: str) -> tuple[str, str]:
    """What has become of a test, and what it has said; hook: "" for Nix's own."""
    environ = {
        "TMPDIR": f"{WHERE}/tmp",
        "TEST_NAME": name,
        "TEST_SUITE_NAME": "main",  # from 2.35 on
        "NIX_REMOTE": "",
        "NIX_STORE": "/nix/store",
        "_NIX_TEST_SOURCE_DIR": f"{WHERE}/tests",
        "_NIX_TEST_BUILD_DIR": f"{WHERE}/tests",
        "NIX_CONFIG": SETTINGS + (f"build-hook = {hook}\n" if hook else ""),
    }
    script = f"cd {WHERE}/tests && {{ [ ! -e init.sh ] || bash -e init.sh; }} && "
    script += f"exec timeout {TIMEOUT_S} bash -e {name}"
    command = ("bash", "-c", f"{{ {script}; }} 2>&1")
    done = host.run(*command, env=environ, check=False, timeout=2 * TIMEOUT_S)
    if done.returncode in SKIPPED:
        return "skipped", done.stdout
    return ("FAILED" if done.returncode else "passed"), done.stdout


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT")
    parser.add_argument("--engine", default="", metavar="NAME")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("names", nargs="*", metavar="TEST")
    options = parser.parse_intermixed_args()
    worse = False
    with Lab() as lab:
        chosen = engine_for(options.checkout, options.engine)
        host = lab.host("tests", chosen, sshd=False)
        bring(host, tests_of(options.checkout), chosen.version)
        print(f"Nix {chosen.version}\n{'':48} {'own hook':10}this hook", flush=True)
        for name in names_of(host, options.names):
            stock, ours = run(host, name, "")[0], run(host, name, INSTALLED)
            print(f"{name:48} {stock:10}{ours[0]}", flush=True)
            worse |= stock == "passed" and ours[0] != "passed"
            if options.show and ours[0] == "FAILED":
                print(ours[1])
    return 1 if worse else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FarmError as error:
        sys.exit(f"nix-functional: {error}")
