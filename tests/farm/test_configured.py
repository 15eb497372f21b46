"""How long a login may take: what people have configured for ssh wins, and one that is
slow without that is waited for, too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from lab import poll
from scene import TESTS, Scene, change_hook, cleared, outage, scene

CONFIG = "/root/.ssh/config"
PROXY = "/usr/local/bin/delay.py"
# An sshd that says nothing for a while when somebody logs in, as one that asks elsewhere.
KEYS = "#!/bin/sh\nsleep 4\ncat /root/.ssh/authorized_keys\n"
ASKS = (
    "AuthorizedKeysFile none\nAuthorizedKeysCommand /usr/bin/keys\nBanner /etc/banner\n"
)
SSHD = "/etc/ssh/sshd_config"
numbers = itertools.count()


@pytest.fixture(scope="module")
def hosts(client_engine: str) -> Iterator[Scene]:
    with scene(client_engine, client_engine) as running:
        running.client.copy(TESTS / "delay.py", PROXY)
        yield running


@pytest.fixture
def nix(hosts: Scene) -> Iterator[Scene]:
    with cleared(hosts, CONFIG) as nix:
        yield nix


def one() -> str:
    return f'mk "job-{next(numbers)}" "echo > $out" {{}}'


def test_a_time_to_connect_that_is_configured_is_waited_for(nix: Scene) -> None:
    """As for a machine that is started when it is asked for."""
    change_hook(nix, CONNECT_TIMEOUT_S=1)
    wait = f"ProxyCommand sh -c 'sleep 3; exec {PROXY} b1 22 0'\n"
    nix.client.write(CONFIG, f"{wait}ConnectTimeout 60\n", 0o600)
    assert "cannot build" not in nix.build(one()).log


def test_a_time_to_connect_that_is_configured_is_not_exceeded(nix: Scene) -> None:
    change_hook(nix, CONNECT_TIMEOUT_S=60, REPLY_S=60)
    nix.client.write(CONFIG, "ConnectTimeout 1\n", 0o600)
    nix.builder.swallow(True)
    try:
        run = nix.start(one())
        poll(lambda: "timed out" in outage(nix, "b1"), "the outage")
    finally:
        nix.builder.swallow(False)
    assert run.end().status == 0


def test_a_login_that_outlasts_the_probes_of_a_silent_line_is_waited_for(
    nix: Scene,
) -> None:
    change_hook(nix, ALIVE_INTERVAL_S=1, ALIVE_COUNT_MAX=2)
    before = nix.builder.read(SSHD)
    user = "AuthorizedKeysCommandUser root\n"
    nix.builder.write("/usr/bin/keys", KEYS, 0o755)
    nix.builder.write("/etc/banner", "Say yes at https://example.org\n")
    nix.builder.write(SSHD, f"{ASKS}{user}{before}")
    nix.builder.restart_sshd()
    try:
        log = nix.build(one()).log
    finally:
        nix.builder.write(SSHD, before)
        nix.builder.restart_sshd()
    assert "says while we log in: Say yes at https://example.org" in log


def test_a_channel_that_says_nothing_for_longer_than_is_configured_goes_on(
    nix: Scene,
) -> None:
    """As in OpenSSH 9.9 and newer; those before do not know that word."""
    nix.client.write(CONFIG, "ChannelTimeout session=1s\n", 0o600)
    silent = f'mk "job-{next(numbers)}" "sleep 4; echo > $out" {{}}'
    assert "cannot build" not in nix.build(silent).log
