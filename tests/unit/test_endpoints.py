"""What is pure of finding an endpoint. The texts are what a kernel prints in such a network namespace."""

from __future__ import annotations

import os
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrport import endpoints
from ctrport.endpoints import Gone, Route, choose, local_addresses, routes
from ctrport.model import Family

LOOPBACK_TRIE = """\
     +-- 127.0.0.0/8 2 0 2
        +-- 127.0.0.0/31 1 0 0
           |-- 127.0.0.0
              /8 host LOCAL
           |-- 127.0.0.1
              /32 host LOCAL
        |-- 127.255.255.255
           /32 link BROADCAST
"""
HEAD = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT     \n"


def trie(*own: str) -> str:
    """Both tables show the same trie where the kernel has merged them, as it does until a rule parts them."""
    inner = "".join(own) + LOOPBACK_TRIE
    return f"Main:\n  +-- 0.0.0.0/0 3 0 5\n{inner}Local:\n  +-- 0.0.0.0/0 3 0 5\n{inner}"


ON_A_BRIDGE = trie(
    """\
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 172.17.0.0/16 2 0 2
        +-- 172.17.0.0/30 2 0 2
           |-- 172.17.0.0
              /16 link UNICAST
           |-- 172.17.0.2
              /32 host LOCAL
        |-- 172.17.255.255
           /32 link BROADCAST
"""
)
ON_A_BRIDGE_ROUTES = f"""{HEAD}\
eth0\t00000000\t010011AC\t0003\t0\t0\t0\t00000000\t0\t0\t0       \n\
eth0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0       \n"""

ON_TWO_NETWORKS = trie(
    """\
     +-- 0.0.0.0/4 2 0 2
        |-- 0.0.0.0
           /0 universe UNICAST
        +-- 10.0.0.0/12 2 0 2
           +-- 10.1.0.0/24 2 0 2
              +-- 10.1.0.0/29 2 0 2
                 |-- 10.1.0.0
                    /24 link UNICAST
                 |-- 10.1.0.5
                    /32 host LOCAL
              |-- 10.1.0.255
                 /32 link BROADCAST
           |-- 10.9.0.0
              /16 universe UNICAST
""",
    """\
     +-- 172.20.0.0/24 2 0 2
        +-- 172.20.0.0/29 2 0 2
           |-- 172.20.0.0
              /24 link UNICAST
           |-- 172.20.0.7
              /32 host LOCAL
        |-- 172.20.0.255
           /32 link BROADCAST
""",
)
ON_TWO_NETWORKS_ROUTES = f"""{HEAD}\
eth1\t00000000\t010014AC\t0003\t0\t0\t0\t00000000\t0\t0\t0       \n\
eth0\t0000010A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0       \n\
eth0\t0000090A\t0100010A\t0003\t0\t0\t0\t0000FFFF\t0\t0\t0       \n\
eth1\t000014AC\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0       \n"""

WITH_A_SECOND_ADDRESS = trie(
    """\
     +-- 0.0.0.0/4 2 0 2
        |-- 0.0.0.0
           /0 universe UNICAST
        +-- 10.4.0.0/24 2 0 2
           +-- 10.4.0.0/28 2 1 2
              +-- 10.4.0.0/30 2 0 2
                 |-- 10.4.0.0
                    /24 link UNICAST
                 |-- 10.4.0.3
                    /32 host LOCAL
              |-- 10.4.0.9
                 /32 host LOCAL
           |-- 10.4.0.255
              /32 link BROADCAST
"""
)
WITH_A_SECOND_ADDRESS_ROUTES = f"""{HEAD}\
eth0\t00000000\t0100040A\t0003\t0\t0\t0\t00000000\t0\t0\t0       \n\
eth0\t0000040A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0       \n"""

# As Calico has it: an address without a network, and a gateway that does not exist.
POINT_TO_POINT = trie(
    """\
     |-- 0.0.0.0
        /0 universe UNICAST
     |-- 169.254.1.1
        /32 link UNICAST
     |-- 192.168.61.4
        /32 host LOCAL
"""
)
POINT_TO_POINT_ROUTES = f"""{HEAD}\
eth0\t00000000\t0101FEA9\t0003\t0\t0\t0\t00000000\t0\t0\t0       \n\
eth0\t0101FEA9\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0       \n"""

ADDRESSES = {
    "a bridge": (ON_A_BRIDGE, ["127.0.0.1", "172.17.0.2"]),
    "two networks": (ON_TWO_NETWORKS, ["10.1.0.5", "127.0.0.1", "172.20.0.7"]),
    "a second address": (WITH_A_SECOND_ADDRESS, ["10.4.0.3", "10.4.0.9", "127.0.0.1"]),
    "point to point": (POINT_TO_POINT, ["127.0.0.1", "192.168.61.4"]),
    "loopback alone": (trie(), ["127.0.0.1"]),
    "loopback down": ("Main:\nLocal:\n", []),
}


@pytest.mark.parametrize("case", ADDRESSES)
def test_the_addresses_of_a_namespace_are_its_own_ones_alone(case: str) -> None:
    text, expected = ADDRESSES[case]
    assert local_addresses(text) == [IPv4Address(address) for address in expected]


def test_an_address_that_is_its_networks_first_is_found_behind_the_network() -> None:
    text = trie("     |-- 10.0.0.0\n        /31 link UNICAST\n        /32 host LOCAL\n")
    assert IPv4Address("10.0.0.0") in local_addresses(text)


def test_this_machines_own_addresses_are_read() -> None:
    assert IPv4Address("127.0.0.1") in endpoints.node_facts().addresses


def test_routes_are_read_in_the_machines_byte_order() -> None:
    assert routes(ON_TWO_NETWORKS_ROUTES) == [
        Route("eth1", IPv4Network("0.0.0.0/0"), on_link=False),
        Route("eth0", IPv4Network("10.1.0.0/24"), on_link=True),
        Route("eth0", IPv4Network("10.9.0.0/16"), on_link=False),
        Route("eth1", IPv4Network("172.20.0.0/24"), on_link=True),
    ]
    assert routes(POINT_TO_POINT_ROUTES)[1] == Route("eth0", IPv4Network("169.254.1.1/32"), on_link=True)
    assert routes(HEAD) == []


CHOSEN = {
    "a bridge": (ON_A_BRIDGE, ON_A_BRIDGE_ROUTES, "172.17.0.2", "eth0"),
    # Not the lowest: the one that it answers through.
    "two networks": (ON_TWO_NETWORKS, ON_TWO_NETWORKS_ROUTES, "172.20.0.7", "eth1"),
    "a second address": (WITH_A_SECOND_ADDRESS, WITH_A_SECOND_ADDRESS_ROUTES, "10.4.0.3", "eth0"),
    "point to point": (POINT_TO_POINT, POINT_TO_POINT_ROUTES, "192.168.61.4", "eth0"),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_the_address_is_that_of_the_default_routes_device_or_the_lowest(case: str) -> None:
    addresses, known, address, device = CHOSEN[case]
    assert choose(local_addresses(addresses), routes(known)) == (IPv4Address(address), device)


def test_without_a_default_route_the_lowest_address_is_taken() -> None:
    known = [route for route in routes(ON_TWO_NETWORKS_ROUTES) if route.network.prefixlen]
    assert choose(local_addresses(ON_TWO_NETWORKS), known) == (IPv4Address("10.1.0.5"), "eth0")


def test_a_network_behind_a_gateway_is_not_the_devices_own() -> None:
    known = [
        Route("eth1", IPv4Network("0.0.0.0/0"), on_link=False),
        Route("eth1", IPv4Network("10.0.0.0/8"), on_link=False),
        Route("eth0", IPv4Network("10.1.0.0/24"), on_link=True),
        Route("eth1", IPv4Network("172.20.0.0/24"), on_link=True),
    ]
    addresses = [IPv4Address("10.1.0.5"), IPv4Address("172.20.0.7")]
    assert choose(addresses, known) == (addresses[1], "eth1")


def test_of_two_networks_that_overlap_the_narrower_is_the_addresss_own() -> None:
    known = [
        Route("eth0", IPv4Network("10.0.0.0/8"), on_link=True),
        Route("eth1", IPv4Network("10.1.0.0/24"), on_link=True),
    ]
    assert choose([IPv4Address("10.1.0.5")], known) == (IPv4Address("10.1.0.5"), "eth1")


def test_without_any_route_the_device_is_not_known() -> None:
    assert choose(local_addresses(ON_A_BRIDGE), []) == (IPv4Address("172.17.0.2"), None)


def test_loopback_addresses_are_never_chosen() -> None:
    assert choose(local_addresses(trie()), routes(HEAD)) is None
    assert choose([IPv4Address("127.0.0.53")], routes(ON_A_BRIDGE_ROUTES)) is None
    assert choose([], []) is None


addresses = st.integers(0, 2**32 - 1).map(IPv4Address)
networks = st.builds(lambda a, length: IPv4Network((a, length), strict=False), addresses, st.integers(0, 32))


@given(
    st.lists(addresses, max_size=4),
    st.lists(st.builds(Route, st.sampled_from(["eth0", "eth1"]), networks, st.booleans()), max_size=4),
)
def test_what_is_chosen_is_one_of_the_containers_own(own: list[IPv4Address], known: list[Route]) -> None:
    chosen = choose(sorted(own), known)
    usable = [address for address in own if not address.is_loopback]
    assert (chosen is None) is (not usable)
    if chosen is not None:
        assert chosen[0] in usable
        assert chosen[1] is None or chosen[1] in {route.device for route in known}


def test_a_process_that_ended_is_gone() -> None:
    with pytest.raises(Gone):
        endpoints.started(2**22 + 1)


def test_a_process_began_once() -> None:
    assert endpoints.started(os.getpid()) == endpoints.started(os.getpid()) > 0


def test_whether_the_node_forwards_is_read_from_the_kernel() -> None:
    with open("/proc/sys/net/ipv4/ip_forward", encoding="ascii") as switch:
        forwards = switch.read().strip() == "1"
    assert (Family.IPV4 in endpoints.node_facts().forwarding) is forwards
