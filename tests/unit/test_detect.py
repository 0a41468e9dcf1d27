"""What this node's tables are written with, by what programs answer, and what is not decided as one of them failed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ctrport.firewall import FirewallError, Unusable, detect
from ctrport.firewall.backends import every_firewall
from ctrport.firewall.detect import choose, families
from ctrport.model import Family

BOTH, IPV4 = (Family.IPV4, Family.IPV6), (Family.IPV4,)
QUESTIONS = {"iptables-nft": "ip6tables-nft-save", "nftables": "nft"}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only directory that programs are in: none at first."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(detect, "_has_ipv6", lambda: True)
    monkeypatch.setattr(detect, "legacy_tables", lambda family: set())
    return tmp_path


def install(programs: Path, name: str, script: str) -> None:
    (programs / name).write_text(f"#!/bin/sh\n{script}\n")
    (programs / name).chmod(0o755)


@pytest.mark.parametrize("backend", QUESTIONS)
@pytest.mark.parametrize(
    ("script", "served"),
    [
        ("exit 0", BOTH),
        ("echo 'Failed to initialize nft: Protocol not supported' >&2; exit 1", IPV4),
        ("echo 'Error: Could not process rule: Operation not supported' >&2; exit 1", IPV4),
        ('echo "can\'t initialize ip6tables table: Table does not exist (do you need to insmod?)" >&2; exit 3', IPV4),
    ],
)
def test_ipv6_is_served_where_the_kernel_has_it(
    programs: Path, backend: str, script: str, served: tuple[Family, ...]
) -> None:
    install(programs, QUESTIONS[backend], script)
    assert asyncio.run(families(backend)) == served


def test_ipv6_is_not_served_where_its_program_is_not_installed(programs: Path) -> None:
    assert asyncio.run(families("iptables-nft")) == IPV4


@pytest.mark.parametrize("backend", QUESTIONS)
@pytest.mark.parametrize("script", ["exit 4", "kill -9 $$", "echo 'Resource temporarily unavailable' >&2; exit 4"])
def test_a_program_that_failed_once_is_no_reason_to_give_up_ipv6(programs: Path, backend: str, script: str) -> None:
    install(programs, QUESTIONS[backend], script)
    with pytest.raises(FirewallError, match="whether IPv6 can be served cannot be told: "):
        asyncio.run(families(backend))


def test_a_program_that_cannot_be_started_is_no_reason_to_give_up_ipv6(programs: Path) -> None:
    install(programs, "ip6tables-nft-save", "exit 0")
    (programs / "ip6tables-nft-save").chmod(0o644)
    with pytest.raises(FirewallError, match="ip6tables-nft-save could not be started: Permission denied"):
        asyncio.run(families("iptables-nft"))


def test_who_may_not_ask_is_told_so(programs: Path) -> None:
    install(programs, "ip6tables-nft-save", "echo 'Permission denied (you must be root)' >&2; exit 4")
    with pytest.raises(Unusable, match="you must be root"):
        asyncio.run(families("iptables-nft"))


def test_where_ipv6_is_in_doubt_its_tables_are_cleaned_too(programs: Path) -> None:
    install(programs, "iptables-nft-save", "exit 0")
    install(programs, "ip6tables-nft-save", "exit 4")
    assert sum(firewall.name == "iptables-nft" for firewall in asyncio.run(every_firewall())) == len(BOTH)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo ':KUBE-IPTABLES-HINT - [0:0]'", "the kubelet writes nft tables"),
        ("exit 0", "no kubelet has left a hint"),
        ("echo 'Failed to initialize nft: Protocol not supported' >&2; exit 1", "no kubelet has left a hint"),
        (None, "no kubelet has left a hint"),
    ],
)
def test_the_backend_is_the_one_of_the_kubelets_hint(programs: Path, script: str | None, reason: str) -> None:
    if script is not None:
        install(programs, "iptables-nft-save", script)
    assert asyncio.run(choose("auto")).reason == reason


@pytest.mark.parametrize("script", ["exit 4", "kill -9 $$"])
def test_a_program_that_failed_once_is_no_hint(programs: Path, script: str) -> None:
    install(programs, "iptables-nft-save", script)
    with pytest.raises(FirewallError, match="which backend the kubelet writes with cannot be told: "):
        asyncio.run(choose("auto"))
    assert asyncio.run(choose("nftables")).backend == "nftables"
