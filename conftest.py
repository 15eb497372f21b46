"""What all tests share: a clean environment, and the engines to run the farm with.

`pytest` alone runs the farm with this machine's own Nix as client and as builder.
`pytest --engines 2.3,2.8,2.26,2.34 -m engines` runs the engine matrix: every test marked
`engines` with each of them as client, the pairs in both directions.
A test's folder is its marker: unit, process or farm; see tests/README.md.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--engines",
        default="host",
        help="comma-separated engines for the farm: host, 2.3, 2.8, 2.26, 2.34",
    )
    parser.addoption(
        "--part",
        default="1/1",
        help="such as 1/3: run about a third of the tests, whole modules, as tests/run does",
    )


def pytest_configure() -> None:
    """Clean up also when tests/run is interrupted: it ends what it runs beside itself."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(item.path.parent.name)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leave the tests of other parts out."""
    part, parts = map(int, config.getoption("--part").split("/"))
    sizes = Counter(item.path for item in items)
    loads = [0] * parts
    chosen: set[Path] = set()
    for path, size in sizes.most_common():  # the biggest first, where least is
        lightest = loads.index(min(loads))
        loads[lightest] += size if path.parent.name == "farm" else size // 9
        if lightest == part - 1:
            chosen.add(path)
    config.hook.pytest_deselected(items=[i for i in items if i.path not in chosen])
    items[:] = [item for item in items if item.path in chosen]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`client_engine` alone runs over all engines, or over those that the module names;
    with `builder_engine`, over all pairs."""
    engines = metafunc.config.getoption("--engines").split(",")
    wanted = getattr(metafunc.module, "ENGINES", engines)
    engines = [name for name in engines if name in wanted]
    for name in ("client_engine", "builder_engine"):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, engines, scope="module")


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the settings, keys or agents of whoever runs it."""
    for name in list(os.environ):
        if name.startswith(("NIX_", "SSH_")):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Why tests were skipped, each reason once."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = [str(report.longrepr[2]) for report in skipped]
    for reason in sorted(set(reasons)):
        terminalreporter.write_line(f"{reasons.count(reason)} x {reason}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a test that had to skip is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") == "true" and reporter and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter.write_line("FAILED: skipped tests count as failures in CI", red=True)
