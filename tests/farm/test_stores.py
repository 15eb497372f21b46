"""Where the store here is not the usual one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scene import Scene, scene, suitable


@pytest.fixture(scope="module")
def nix(client_engine: str, pytestconfig: pytest.Config) -> Iterator[Scene]:
    """2.3 cannot read the files of a binary cache."""
    client = suitable(pytestconfig, client_engine, (2, 4).__le__)
    with scene(client, client) as running:
        yield running


@pytest.mark.engines
def test_a_store_that_is_a_binary_cache_gets_what_was_built(nix: Scene) -> None:
    """Its derivations are no files, and are read with Nix's own program."""
    command = nix.nix_build('mk "cached" "hostname > $out" {}')[:3]
    command += ["--store", "file:///tmp/cache", *nix.hook]
    done = nix.client.run(*command, check=False)
    assert done.returncode == 0, done.stderr
    assert "on 'ssh://b1'" in done.stderr
    name = done.stdout.strip().rpartition("/")[2][:32]
    assert nix.client.path(f"/tmp/cache/{name}.narinfo").exists()


def test_a_store_is_named_as_seen_from_where_nix_runs(nix: Scene) -> None:
    command = nix.nix_build('mk "here" "hostname > $out" {}')[:3]
    words = " ".join([*command, "--store ./foo", *nix.hook])
    done = nix.client.run("sh", "-c", f"cd /tmp && {words}", check=False)
    assert not nix.client.path("/foo").exists()
    assert done.returncode == 0, done.stderr
    assert nix.client.path(f"/tmp/foo{done.stdout.strip()}").exists()
