"""The rules of bridges that are run the Docker way, and what is spared of Services."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from ctrport.firewall.text import arguments
from ctrport.model import BridgeNetwork, Family
from ctrport.networks import isolation, rules_beside, rules_of
from ctrport.rules import Layout, Rule, Table, rules_at, rules_for, skeleton
from tests.unit.worlds import NODE4, active

LAYOUT = Layout(networks=True)
DOCKER0 = BridgeNetwork("docker0", (ip_network("172.17.0.0/16"), ip_network("fd00:17::/64")))
BR1 = BridgeNetwork("br1", (ip_network("172.18.0.0/16"),))


def chain(rules: list[Rule], name: str, family: Family = Family.IPV4, table: Table = Table.FILTER) -> list[str]:
    """Return the rules of a chain in its order, as iptables takes them, without their comments."""
    its = [rule for rule in rules if (rule.family, rule.table, rule.chain) == (family, table, name)]
    return [
        " ".join(word for word in _without_comment(arguments(rule)).split())
        for rule in sorted(its, key=lambda rule: rule.rank)
        if rule.owner != "chain"
    ]


def _without_comment(text: str) -> str:
    before, _, rest = text.partition('-m comment --comment "')
    return before + rest.partition('"')[2]


def everything(*networks: BridgeNetwork) -> list[Rule]:
    rules = [rule for family in Family for rule in (*skeleton(LAYOUT, family), *isolation(LAYOUT, family))]
    rules += [rule for network in networks for rule in rules_of(network, LAYOUT, Family)]
    return [*rules, *rules_at(NODE4, LAYOUT), *rules_for(active("8080:80"), LAYOUT)]


def test_published_ports_are_let_in_before_isolation_is_asked_and_all_else_is_decided_after() -> None:
    assert chain(everything(DOCKER0), "DOCKER-FORWARD") == [
        "-o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -m conntrack --ctstate DNAT -j ACCEPT",
        "-i docker0 -m conntrack --ctstate RELATED,ESTABLISHED -m conntrack --ctstate DNAT -j ACCEPT",
        f"-m conntrack --ctstate DNAT --ctorigdst {NODE4} -j DOCKER",
        "-j DOCKER-ISOLATION-STAGE-1",
        "-o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-i docker0 ! -o docker0 -j ACCEPT",
        "-i docker0 -o docker0 -j ACCEPT",
        "! -i docker0 -o docker0 -j DROP",
    ]


@pytest.mark.parametrize("family", Family)
def test_who_leaves_a_network_may_not_enter_another(family: Family) -> None:
    rules = everything(DOCKER0, BR1)
    assert chain(rules, "DOCKER-ISOLATION-STAGE-1", family) == [
        "-i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2",
        "-i br1 ! -o br1 -j DOCKER-ISOLATION-STAGE-2",
        "-j RETURN",
    ]
    assert chain(rules, "DOCKER-ISOLATION-STAGE-2", family) == ["-o docker0 -j DROP", "-o br1 -j DROP", "-j RETURN"]


def test_what_gets_out_is_masqueraded_in_the_family_of_each_subnet() -> None:
    rules = everything(DOCKER0, BR1)
    assert chain(rules, "DOCKER-POSTROUTING", Family.IPV4, Table.NAT)[-2:] == [
        "-s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
        "-s 172.18.0.0/16 ! -o br1 -j MASQUERADE",
    ]
    masqueraded = chain(rules, "DOCKER-POSTROUTING", Family.IPV6, Table.NAT)
    assert masqueraded == ["-s fd00:17::/64 ! -o docker0 -j MASQUERADE"]


def test_without_networks_there_is_no_isolation() -> None:
    assert not list(isolation(Layout(), Family.IPV4))
    assert not any("ISOLATION" in chain for _, chain in Layout().own_chains)
    assert [chain for _, chain in Layout("CTRPORT", networks=True).own_chains if "ISOLATION" in chain] == [
        "CTRPORT-ISOLATION-STAGE-1",
        "CTRPORT-ISOLATION-STAGE-2",
    ]


def test_the_longest_chain_name_is_one_that_iptables_takes() -> None:
    assert max(len(name) for _, name in Layout("C234567890", networks=True).own_chains) == 28


def test_the_address_of_a_service_is_spared_before_every_mapping() -> None:
    rules = [*rules_for(active("192.0.2.1:53:53/udp"), LAYOUT), *rules_beside(ip_address("10.96.0.10"), LAYOUT)]
    rules += rules_beside(ip_address("fd00:10::a"), LAYOUT)
    spared, mapped = chain(rules, "DOCKER", table=Table.NAT)
    assert spared == "-d 10.96.0.10/32 -j RETURN"
    assert "DNAT" in mapped
    assert chain(rules, "DOCKER", Family.IPV6, Table.NAT) == ["-d fd00:10::a/128 -j RETURN"]


def test_a_name_that_no_rule_can_hold_is_no_network() -> None:
    with pytest.raises(ValueError, match="not a device name"):
        BridgeNetwork("a b", ())
