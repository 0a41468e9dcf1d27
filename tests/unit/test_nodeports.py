"""The NodePorts of kube-proxy in nftables mode, as nft tells of them."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest

from ctrport import nodeports
from ctrport.model import Family
from ctrport.nodeports import Unknown, holders
from ctrport.programs import Ended, NotInstalled, ProgramError

CHAIN = "external-WEB5HTTP-shop/web/tcp/http"


def answer(*elements: Any) -> str:
    """Return what nft prints of a map: without elements it has none to tell of."""
    its = {"family": "ip", "name": "service-nodeports", "table": "kube-proxy", "map": "verdict"}
    metainfo = {"metainfo": {"version": "1.0.6", "json_schema_version": 1}}
    return json.dumps({"nftables": [metainfo, {"map": {**its, **({"elem": elements} if elements else {})}}]})


def element(protocol: str | int, port: int, chain: str = CHAIN) -> Any:
    return [{"concat": [protocol, port]}, {"goto": {"target": chain}}]


class Tables:
    """Has a table of kube-proxy's, or what it is to raise."""

    found: bool | OSError = True

    def has_table(self, family: int, table: str) -> bool:
        assert (family, table) in {(socket.AF_INET, "kube-proxy"), (socket.AF_INET6, "kube-proxy")}
        if isinstance(self.found, OSError):
            raise self.found
        return self.found

    def close(self) -> None:
        """There is nothing to close."""


def told(monkeypatch: pytest.MonkeyPatch, said: Ended | Exception, family: Family = Family.IPV4) -> list[str]:
    """Return who is found to hold what, where nft says this."""

    async def run(*argv: str, timeout: float) -> Ended:
        table = {Family.IPV4: "ip", Family.IPV6: "ip6"}[family]
        assert argv == ("nft", "--json", "list", "map", table, "kube-proxy", "service-nodeports")
        if isinstance(said, Exception):
            raise said
        return said

    monkeypatch.setattr(nodeports, "run", run)
    monkeypatch.setattr(nodeports, "NfTables", Tables)
    return [f"{holder.name} {holder.mapping}" for holder in asyncio.run(holders(family))]


def test_the_service_of_a_node_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    text = answer(
        element("tcp", 30080),
        element("udp", 30053, "external-ABCDEFG2-kube-system/dns/udp/"),
        [{"elem": {"val": {"concat": ["sctp", 30132]}, "comment": "some"}}, {"goto": {"target": CHAIN}}],
    )
    assert told(monkeypatch, Ended(0, text, "")) == [
        "kube-proxy (shop/web:http) 0.0.0.0:30080:30080/tcp",
        "kube-proxy (kube-system/dns) 0.0.0.0:30053:30053/udp",
        "kube-proxy (shop/web:http) 0.0.0.0:30132:30132/sctp",
    ]
    assert told(monkeypatch, Ended(0, answer(element("tcp", 30080)), ""), Family.IPV6) == [
        "kube-proxy (shop/web:http) [::]:30080:30080/tcp"
    ]


def test_a_protocol_may_be_a_number_and_is_one_that_has_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    text = answer(element(17, 30080), element("dccp", 30080), element(41, 30080))
    assert told(monkeypatch, Ended(0, text, "")) == ["kube-proxy (shop/web:http) 0.0.0.0:30080:30080/udp"]


@pytest.mark.parametrize(
    "verdict", [{"goto": {"target": "x\x1b[31m"}}, {"goto": {"target": f"{CHAIN}\n"}}, {"drop": None}, {"goto": None}]
)
def test_a_chain_that_is_named_after_no_service_is_not_printed(monkeypatch: pytest.MonkeyPatch, verdict: Any) -> None:
    text = answer([{"concat": ["tcp", 30080]}, verdict])
    assert told(monkeypatch, Ended(0, text, "")) == ["kube-proxy 0.0.0.0:30080:30080/tcp"]


@pytest.mark.parametrize(
    "said",
    [
        Ended(0, answer(), ""),
        Ended(1, "", "Error: No such file or directory\nlist map ip kube-proxy service-nodeports\n"),
        NotInstalled("nft is not installed"),
    ],
    ids=["empty", "no table", "no nft"],
)
def test_where_there_is_none_nothing_is_held(monkeypatch: pytest.MonkeyPatch, said: Ended | Exception) -> None:
    assert told(monkeypatch, said) == []


@pytest.mark.parametrize("family", Family)
def test_where_there_is_no_table_no_program_is_run(monkeypatch: pytest.MonkeyPatch, family: Family) -> None:
    monkeypatch.setattr(Tables, "found", False)
    assert told(monkeypatch, AssertionError("nft was run"), family) == []


def test_where_it_cannot_be_told_whether_there_is_one_nft_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tables, "found", PermissionError())
    text = answer(element("tcp", 30080))
    assert told(monkeypatch, Ended(0, text, "")) == ["kube-proxy (shop/web:http) 0.0.0.0:30080:30080/tcp"]
    with pytest.raises(Unknown, match="Operation not permitted"):
        told(monkeypatch, Ended(1, "", "Error: Operation not permitted"))


@pytest.mark.parametrize(
    "said",
    [
        ProgramError("nft did not end within 10 s"),
        Ended(1, "", "Error: Operation not permitted"),
        Ended(0, "", ""),
        Ended(0, "[]", ""),
        Ended(0, '{"nftables": 7}', ""),
        Ended(0, answer(element("tcp", 0)), ""),
        Ended(0, answer(element("tcp", 65536)), ""),
        Ended(0, answer([{"concat": ["tcp", "30080"]}, {"goto": {"target": CHAIN}}]), ""),
        Ended(0, answer([{"concat": ["tcp"]}, {"goto": {"target": CHAIN}}]), ""),
        Ended(0, answer([30080, {"goto": {"target": CHAIN}}]), ""),
        Ended(0, answer(["tcp"]), ""),
    ],
)
def test_what_is_not_understood_is_not_taken_for_nothing(
    monkeypatch: pytest.MonkeyPatch, said: Ended | Exception
) -> None:
    with pytest.raises(Unknown, match="nft"):
        told(monkeypatch, said)
