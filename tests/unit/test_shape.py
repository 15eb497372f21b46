"""The module stays small, and its functions short."""

from __future__ import annotations

import ast
import inspect
import pydoc
import statistics
import subprocess
import sys

import pytest
from fakes import HOOK

import nix_build_remote

# Lines. A feature pays for its own with what it replaces; see README.
HOOK_LINES, PEOPLE_LINES = 5757, 1143
PEOPLE = "\n# ==== People ="

SOURCE = HOOK.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try)


def length(function: ast.FunctionDef) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


def nesting(node: ast.AST, level: int = 0) -> int:
    """How deep blocks stand in each other; an elif is as deep as its if."""
    deepest = level
    for name, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        is_elif = name == "orelse" and [type(c) for c in children] == [ast.If]
        for child in children:
            if isinstance(child, ast.AST):
                deeper = isinstance(child, BLOCKS) and not (
                    is_elif and isinstance(node, ast.If)
                )
                deepest = max(deepest, nesting(child, level + deeper))
    return deepest


def parameters(function: ast.FunctionDef) -> list[str]:
    arguments = (
        function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    )
    return [a.arg for a in arguments if a.arg not in ("self", "cls")]


def test_each_part_is_within_its_budget() -> None:
    hook, _, people = SOURCE.partition(PEOPLE)
    assert people
    assert hook.count("\n") <= HOOK_LINES and people.count("\n") <= PEOPLE_LINES


def test_half_of_the_functions_have_at_most_eight_lines() -> None:
    assert statistics.median(map(length, FUNCTIONS)) <= 8


def test_nine_of_ten_functions_have_at_most_twenty_lines() -> None:
    short = sum(length(function) <= 20 for function in FUNCTIONS)
    assert short >= 0.9 * len(FUNCTIONS)


@pytest.mark.parametrize(
    "measure, most",
    [(length, 40), (nesting, 3), (lambda f: len(parameters(f)), 5)],
    ids=["lines", "levels", "parameters"],
)
def test_no_function_exceeds(measure: object, most: int) -> None:
    assert callable(measure)
    assert [f.name for f in FUNCTIONS if measure(f) > most] == []


def test_every_part_of_a_signature_has_a_type() -> None:
    hints = [f.name for f in FUNCTIONS if f.returns is None]
    assert set(hints) <= {"__init_subclass__", "__new__", "_asdict", "_replace"}


def test_sections_stand_in_the_order_of_a_build() -> None:
    titles = [
        line[7:].rstrip("- =") for line in SOURCE.splitlines() if line[:6] in BANNERS
    ]
    hook = titles[: titles.index("People")]
    assert hook == ORDER


BANNERS = ("# ----", "# ====")
ORDER = [
    *("Constants", "Stand-ins", "Errors", "Wire: Nix's integers and strings"),
    *(
        "The calling Nix",
        "Talking",
        "Machines",
        "Choosing",
        "Locks and slots",
        "Outages",
    ),
    *("The line", "Derivations", "ssh", "Session", "Site", "Copying", "One build"),
    "The hook",
]


def test_the_docstring_is_the_manual_to_everybody() -> None:
    manual = nix_build_remote.__doc__ or ""
    assert manual.startswith("nix_build_remote.py - ") and "importlib" not in manual
    assert (inspect.getdoc(nix_build_remote) or "").strip() == manual.strip()
    assert "importlib.machinery" not in pydoc.render_doc(nix_build_remote)
    command = [sys.executable, str(HOOK), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == manual.strip()


def test_no_private_module_is_imported() -> None:
    names = {
        alias.name
        for node in ast.walk(TREE)
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        node.module or "" for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)
    }
    assert [name for name in names if name[:1] == "_" and name != "__future__"] == []


def test_sections_use_only_those_above_them() -> None:
    """But in annotations, which nothing evaluates, and through values that they get."""
    named = [n for n in TREE.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    lines = {node.name: node.lineno for node in named}
    starts = [n for n, line in enumerate(SOURCE.splitlines(), 1) if line[:6] in BANNERS]
    forward = []
    for node in named:
        end = next((start for start in starts if start > node.lineno), sys.maxsize)
        used = names_in(node, ast.Load) - names_in(node, ast.Store) - hints_in(node)
        forward += [f"{node.name}: {name}" for name in used if lines.get(name, 0) > end]
    assert forward == []


def names_in(node: ast.AST, context: type[ast.expr_context]) -> set[str]:
    """The names that are read, or those that are bound, parameters too."""
    parts = list(ast.walk(node))
    found = {
        p.id for p in parts if isinstance(p, ast.Name) and isinstance(p.ctx, context)
    }
    bound = {part.arg for part in parts if isinstance(part, ast.arg)}
    return found | bound if context is ast.Store else found


def hints_in(node: ast.AST) -> set[str]:
    """The names in annotations; some of them may be used elsewhere, too."""
    hints = [
        getattr(p, name, None)
        for p in ast.walk(node)
        for name in ("annotation", "returns")
    ]
    return {name for hint in hints if hint for name in names_in(hint, ast.Load)}


@pytest.mark.parametrize("name", ["bench", "chaos", "fuzz", "nix_functional"])
def test_each_script_of_the_tests_says_how_it_is_used(name: str) -> None:
    """By itself: pytest would find the module for it."""
    command = [sys.executable, str(HOOK.parent / f"tests/{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
