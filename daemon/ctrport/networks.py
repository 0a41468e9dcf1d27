"""What a bridge gets that is run the Docker way, and what the addresses of Services must be spared. Pure.

The bridge's rules are Docker 20.10's for a network of its own, in our chains: its containers get out, masqueraded, and
reach one another; what comes in has to be published; and containers of two such networks reach only each other's
published ports, which are accepted before the isolation is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import ip_network

from .model import Address, BridgeNetwork, Family
from .rules import ACCEPT, DROP, MASQUERADE, RETURN, Jump, Layout, Match, Rule, Table, Verdict

#: Ranks in DOCKER-FORWARD, behind what lets published ports in, and in the chains of isolation.
_ISOLATION, _ESTABLISHED, _OUTGOING, _UNPUBLISHED = 30, 40, 50, 60
_FIRST, _END = 10, 90
#: Rank in DOCKER (nat), before every mapping.
_SERVICE = 5


def isolation(layout: Layout, family: Family) -> Iterator[Rule]:
    """Return the rules of isolation that stand as long as there is any network; none where there is none."""
    if not layout.networks:
        return
    jump = Jump(layout.isolation_stages[0])
    yield Rule(family, Table.FILTER, layout.forward, Match(), jump, "isolation", rank=_ISOLATION)
    for stage in layout.isolation_stages:
        yield Rule(family, Table.FILTER, stage, Match(), RETURN, "isolation", rank=_END)


def rules_of(network: BridgeNetwork, layout: Layout, families: Iterable[Family]) -> Iterator[Rule]:
    """Return the rules of one network in those families."""
    bridge, owner = network.bridge, f"network {network.bridge}"
    first, second = layout.isolation_stages
    chains: tuple[tuple[str, Match, Verdict | Jump, int], ...] = (
        (layout.forward, Match(out_device=bridge, established=True), ACCEPT, _ESTABLISHED),
        (layout.forward, Match(in_device=bridge, not_out_device=bridge), ACCEPT, _OUTGOING),
        (layout.forward, Match(in_device=bridge, out_device=bridge), ACCEPT, _OUTGOING),
        # Docker leaves this to the policy of FORWARD, which it sets to DROP for the whole node; we set no policy.
        (layout.forward, Match(not_in_device=bridge, out_device=bridge), DROP, _UNPUBLISHED),
        (first, Match(in_device=bridge, not_out_device=bridge), Jump(second), _FIRST),
        (second, Match(out_device=bridge), DROP, _FIRST),
    )
    families = tuple(families)
    for family in families:
        for chain, match, target, rank in chains:
            yield Rule(family, Table.FILTER, chain, match, target, owner, rank=rank)
    for subnet in network.subnets:
        match = Match(source=subnet, not_out_device=bridge)
        if Family.of(subnet) in families:
            yield Rule(Family.of(subnet), Table.NAT, layout.postrouting, match, MASQUERADE, owner, rank=_ESTABLISHED)


def rules_beside(service: Address, layout: Layout) -> Iterator[Rule]:
    """Return what keeps every mapping off the address of a Service that IPVS made an address of the node.

    There it is local, so a mapping on every address of the node would answer: on port 53, for the cluster's DNS.
    """
    match = Match(destination=ip_network(service))
    yield Rule(Family.of(service), Table.NAT, layout.chain, match, RETURN, f"service {service}", rank=_SERVICE)
