"""Starts the hook with other values of its constants.

A test that has no time for the real ones installs this text in the hook's place:

    launcher("/usr/local/lib/nix_build_remote.py", "hook.PAUSE_S = 0.1")

It loads the hook as a module, executes the statements, which may change anything in
`hook`, and calls its `main`. Then `after` may use `status`. The module itself is never
rewritten.
"""

from __future__ import annotations

TEXT = """#!{python} -IS
import os
import sys
from importlib.machinery import SourceFileLoader
from types import ModuleType

hook = ModuleType("hook")
hook.__file__ = {path!r}
exec(SourceFileLoader("hook", {path!r}).get_code("hook"), vars(hook))
{statements}
status = hook.main(sys.argv[1:])
{after}
sys.stdout.flush()
os._exit(status)
"""


def launcher(
    path: str, *statements: str, python: str = "/usr/bin/python3", after: str = ""
) -> str:
    lines = "\n".join(statements)
    return TEXT.format(path=path, statements=lines, python=python, after=after)


def assigned(constants: dict[str, float]) -> list[str]:
    """The statements that give these constants of the hook other values."""
    return [f"assert {n!r} in vars(hook); hook.{n} = {v}" for n, v in constants.items()]
