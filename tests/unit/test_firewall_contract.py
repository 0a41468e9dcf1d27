from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import TypeVar

import pytest

from ctrport.firewall import sets
from ctrport.firewall.fake import MemoryKernel
from ctrport.firewall.fake_table import Content, MemoryTable
from ctrport.firewall.nftables import OwnTable
from ctrport.firewall.tableplan import HeldChain, HeldSet
from ctrport.firewall.text import listing
from ctrport.model import Count, Family, Protocol
from ctrport.rules import Layout, Table
from tests.contract.firewall import FirewallContract, Run, Visitor
from tests.contract.tables import Operator, TablesContract

T = TypeVar("T")


@pytest.fixture
def run() -> Run:
    def run(work: Coroutine[object, object, T]) -> T:
        async def awaited() -> T:
            return await work

        return asyncio.run(awaited())

    return run


class TestMemoryKernel(TablesContract):
    @pytest.fixture(params=list(Family))
    def kernel(self, request: pytest.FixtureRequest) -> MemoryKernel:
        return MemoryKernel(request.param)

    @pytest.fixture
    def operator(self, kernel: MemoryKernel) -> Operator:
        def write(table: Table, words: str) -> None:
            verb, chain, *rest = words.split(" ", 2)
            rule = rest[0] if rest else ""
            chains = kernel.tables[table]
            match verb:
                case "-N":
                    chains[chain] = []
                case "-A":
                    chains[chain].append(rule)
                case "-I":
                    position, _, rule = rule.partition(" ")
                    chains[chain].insert(int(position) - 1, rule)
                case "-D":
                    del chains[chain][int(rule) - 1]
                case "-F":
                    chains[chain].clear()
                case "-X":
                    del chains[chain]
                case "-P":
                    kernel.policies[table, chain] = rule
                case _:
                    raise ValueError(words)

        return write

    @pytest.fixture
    def visitor(self, kernel: MemoryKernel) -> Visitor:
        header = {Family.IPV4: 20, Family.IPV6: 40}[kernel.family]

        def visit(protocol: Protocol, port: int, packets: int = 1) -> None:
            lines = listing(f"-A DOCKER {rule}" for rule in kernel.tables[Table.NAT]["DOCKER"])
            for line in lines:
                first, _, last = (line.text.partition("--dport ")[2].partition(" ")[0] or "0").partition(":")
                if f"-p {protocol} " in line.text and int(first) <= port <= int(last or first):
                    assert line.tag is not None
                    first_packet = Count(1, header + (20 if protocol is Protocol.TCP else 8 + 5))
                    kernel.counted[line.tag] = kernel.counted.get(line.tag, Count()) + first_packet

        return visit


class MemoryGrounds:
    """Implements ``Grounds`` with a table of our own in memory."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.table = MemoryTable(family)

    @property
    def content(self) -> Content:
        assert self.table.content is not None
        return self.table.content

    @property
    def damages(self) -> Mapping[str, Callable[[], object]]:
        return {
            "a mapping deleted": lambda: self._delete(8080),
            "all mappings deleted": lambda: self.content.elements.clear(),
            "what leads to them deleted": self._flush,
            "all of it deleted": lambda: setattr(self.table, "content", None),
        }

    def _delete(self, number: int) -> None:
        there = self.content.elements
        there -= {one for one in there if one.set == "host-ports" and one.key.endswith(sets.port(number) + bytes(2))}

    def _flush(self) -> None:
        self.content.chains["prerouting"] = replace(self.content.chains["prerouting"], tags=())

    def firewall(self, layout: Layout) -> OwnTable:
        return OwnTable(self.table, layout)

    async def everything(self) -> object:
        return copy.deepcopy(self.table.content)

    def neighbour(self) -> None:
        pass  # all that is in our table is ours

    def usurper(self) -> None:
        self.table.content = Content(
            {"blocked": HeldSet(4, 0, False, False)}, {"forward": HeldChain(None, True, ("",))}
        )


class TestMemoryTable(FirewallContract):
    @pytest.fixture(params=list(Family))
    def grounds(self, request: pytest.FixtureRequest) -> MemoryGrounds:
        return MemoryGrounds(request.param)

    @pytest.fixture
    def visitor(self, grounds: MemoryGrounds) -> Visitor:
        header = {Family.IPV4: 20, Family.IPV6: 40}[grounds.family]

        def visit(protocol: Protocol, port: int, packets: int = 1) -> None:
            number = sets.port(port)
            for one in grounds.content.elements:
                ranged = one.set == f"host-ranges-{protocol}" and one.key <= number <= one.end
                exactly = ("host-ports", sets.packed(sets.protocol(protocol), number))
                if ranged or (one.set, one.key) == exactly:
                    first_packet = Count(1, header + (20 if protocol is Protocol.TCP else 8 + 5))
                    counted = grounds.table.counted
                    counted[one] = counted.get(one, Count()) + first_packet

        return visit
