"""A short run of tests/chaos: builds while everything goes wrong lose nothing."""

from __future__ import annotations

import argparse

import pytest
from chaos import report
from lab import unavailable
from scene import other


@pytest.mark.engines
def test_nothing_is_lost(client_engine: str, pytestconfig: pytest.Config) -> None:
    if reason := unavailable():
        pytest.skip(reason)
    options = argparse.Namespace(
        seed=1,
        derivations=40,
        engine=client_engine,
        builders=other(pytestconfig, client_engine),
        logs="",
    )
    passed, table = report(options, ours=True)
    assert passed, "\n".join(f"{name}: {value}" for name, value in table.items())
