from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

import pytest

from ctrport.firewall.fake import MemoryKernel
from ctrport.model import Family
from ctrport.rules import Table
from tests.contract.firewall import FirewallContract, Operator, Run

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
