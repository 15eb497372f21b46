"""The farm itself: what happens in it happens nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lab import HANGS_S

TESTS = Path(__file__).resolve().parent.parent
IN_A_CHROOT = 'mount --rbind / "$1"; exec chroot "$1" "$2" -c "$3"'
ENTERS_ITS_OWN_NAMESPACE = """
from lab import Lab, engine
with Lab() as lab:
    host = lab.host("alone", engine("host"))
    host.write("/srv/mark", "inside")
    print(host.run("nsenter", "--mount=/proc/self/ns/mnt", "cat", "/srv/mark").stdout)
"""


def test_the_farm_stays_within_a_chroot(tmp_path: Path) -> None:
    """As Nix 2.8 enters the namespace it is in, before it starts ssh."""
    command = ["unshare", "--mount", "--propagation", "private"]
    command += ["sh", "-ec", IN_A_CHROOT, "sh", str(tmp_path)]
    command += [sys.executable, ENTERS_ITS_OWN_NAMESPACE]
    environ = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        command,
        env=environ,
        capture_output=True,
        text=True,
        timeout=HANGS_S,
        check=False,
    )
    assert done.stdout == "inside\n", done.stderr
