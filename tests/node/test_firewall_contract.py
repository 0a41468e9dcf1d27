"""The suite over the real commands and the real kernel, in a network namespace of its own."""

from __future__ import annotations

import asyncio
import os
import shlex
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from ctrport.firewall import FirewallError, Unusable
from ctrport.firewall.iptables_legacy import LegacyTables
from ctrport.firewall.iptables_nft import NftCommands
from ctrport.model import Family
from ctrport.rules import Table
from embedded.host import Host, inside
from tests.contract.firewall import FirewallContract, Operator, Run

T = TypeVar("T")


def in_namespace_of(host: Host, work: Coroutine[object, object, T]) -> T:
    """Run ``work`` on an event loop of a thread in the host's network namespace: what it starts is in there too."""
    machine = os.readlink("/proc/self/ns/net")

    async def awaited() -> T:
        # The last look before something is written: never the machine's own tables.
        here = os.readlink("/proc/thread-self/ns/net")
        assert here == os.readlink(f"/proc/{host.pid}/ns/net")
        assert here != machine
        return await work

    # The network namespace alone: the loop needs threads, which nobody has who is between two PID namespaces.
    return inside(host.pid, ("net",), lambda: asyncio.run(awaited()))


@pytest.fixture
def host() -> Iterator[Host]:
    with Host("tables") as host:
        assert os.readlink(f"/proc/{host.pid}/ns/net") != os.readlink("/proc/self/ns/net")
        yield host


@pytest.fixture
def private_lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The lock of the legacy tables is a file, and the machine's is not the host's."""
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))


class TestNftCommands(FirewallContract):
    @pytest.fixture(params=list(Family))
    def kernel(self, request: pytest.FixtureRequest) -> NftCommands:
        return NftCommands(request.param)

    @pytest.fixture
    def run(self, host: Host) -> Run:
        def run(work: Coroutine[object, object, T]) -> T:
            return in_namespace_of(host, work)

        return run

    @pytest.fixture
    def operator(self, host: Host, kernel: NftCommands) -> Operator:
        program = "iptables-nft" if kernel.family is Family.IPV4 else "ip6tables-nft"

        def write(table: Table, words: str) -> None:
            host.run(program, "-t", table.value, *shlex.split(words))

        return write


class TestLegacyTables(FirewallContract):
    @pytest.fixture(params=list(Family))
    def kernel(self, request: pytest.FixtureRequest) -> LegacyTables:
        return LegacyTables(request.param)

    @pytest.fixture
    def run(self, host: Host, kernel: LegacyTables, private_lock: None) -> Run:
        async def closing(work: Coroutine[object, object, T]) -> T:
            try:
                return await work
            finally:
                await kernel.close()

        def run(work: Coroutine[object, object, T]) -> T:
            return in_namespace_of(host, closing(work))

        return run

    @pytest.fixture
    def operator(self, host: Host, kernel: LegacyTables, private_lock: None) -> Operator:
        program = "iptables-legacy" if kernel.family is Family.IPV4 else "ip6tables-legacy"

        def write(table: Table, words: str) -> None:
            host.run(program, "-w", "-t", table.value, *shlex.split(words))

        return write


def test_commands_reach_the_tables_of_the_namespace_that_they_start_in(host: Host) -> None:
    host.run("iptables-nft", "-t", "nat", "-N", "PROBE")
    with Host("other") as other:
        assert in_namespace_of(host, NftCommands().chain(Table.NAT, "PROBE")) == ["-N PROBE"]
        assert in_namespace_of(other, NftCommands().chain(Table.NAT, "PROBE")) is None


def test_programs_that_are_not_installed_are_named(
    host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unusable, match="iptables-nft is not installed: install iptables"):
        in_namespace_of(host, NftCommands().chain(Table.NAT, "DOCKER"))


def test_what_iptables_says_is_passed_on(host: Host) -> None:
    with pytest.raises(FirewallError, match=r"the chain x+ of the table nat could not be listed: .+too long"):
        in_namespace_of(host, NftCommands().chain(Table.NAT, "x" * 40))
