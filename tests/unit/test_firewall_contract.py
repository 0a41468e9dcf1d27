from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

import pytest

from ctrport.firewall.fake import MemoryKernel
from ctrport.firewall.text import listing
from ctrport.model import Count, Family, Protocol
from ctrport.rules import Table
from tests.contract.firewall import FirewallContract, Operator, Run, Visitor

T = TypeVar("T")


class TestMemoryKernel(FirewallContract):
    @pytest.fixture(params=list(Family))
    def kernel(self, request: pytest.FixtureRequest) -> MemoryKernel:
        return MemoryKernel(request.param)

    @pytest.fixture
    def run(self) -> Run:
        def run(work: Coroutine[object, object, T]) -> T:
            async def awaited() -> T:
                return await work

            return asyncio.run(awaited())

        return run

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
