"""What is pure of finding an endpoint. The texts are what a kernel prints in such a network namespace."""

from __future__ import annotations

import os
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrport import endpoints
from ctrport.endpoints import (
    Address6,
    Endpoints,
    Gone,
    Route,
    addresses6,
    choose,
    choose6,
    default_devices6,
    local_addresses,
    routes,
)
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


# IPv6

# Of a container on a bridge, the default way, just made: its address is tentative.
JUST_MADE = """\
00000000000000000000000000000001 01 80 10 80       lo
fe800000000000006469fbfffeb9ee55 02 40 20 c0     eth0
fd000017000000000000000000000002 02 40 00 c0     eth0
"""
# A duplicate of the bridge's own and a deprecated one, between others.
OF_ALL_KINDS = """\
fd000017000000000000000000000001 02 40 00 c8     eth0
00000000000000000000000000000001 01 80 10 80       lo
fe800000000000004c721efffead35c4 02 40 20 80     eth0
fd00001700000000000000000000000a 02 40 00 82     eth0
fe8000000000000090c586fffed8101a 03 40 20 80     eth1
fd000017000000000000000000000005 02 40 00 a2     eth0
20010db8000a00000000000000000007 03 40 00 82     eth1
fd000017000000000000000000000009 02 40 00 82     eth0
"""
OF_ALL_KINDS_ROUTES = """\
20010db8000a00000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 \
00000100 00000002 00000000 00000001     eth1
20010db8000b00000000000000000000 30 00000000000000000000000000000000 00 fd000017000000000000000000000001 \
00000400 00000001 00000000 00000003     eth0
fd000017000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 \
00000100 00000001 00000000 00000001     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 fd000017000000000000000000000001 \
00000400 00000001 00000000 00000003     eth0
00000000000000000000000000000001 80 00000000000000000000000000000000 00 00000000000000000000000000000000 \
00000000 00000003 00000000 80200001       lo
ff000000000000000000000000000000 08 00000000000000000000000000000000 00 00000000000000000000000000000000 \
00000100 00000005 00000000 00000001     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 \
ffffffff 00000001 00000000 00200200       lo
"""


def own6(address: str, device: str = "eth0", **state: bool) -> Address6:
    return Address6(IPv6Address(address), device, **state)


def test_addresses_of_ipv6_are_read_with_their_state_but_not_those_of_a_link_alone() -> None:
    assert addresses6(JUST_MADE) == [own6("::1", "lo"), own6("fd00:17::2", tentative=True)]
    assert addresses6(OF_ALL_KINDS) == [
        own6("fd00:17::1", tentative=True, duplicate=True),
        own6("::1", "lo"),
        own6("fd00:17::a"),
        own6("fd00:17::5", second_rate=True),
        own6("2001:db8:a::7", "eth1"),
        own6("fd00:17::9"),
    ]
    assert addresses6("fd000017000000000000000000000003 02 40 00 01     eth0\n") == [
        own6("fd00:17::3", second_rate=True)  # a temporary one, RFC 8981
    ]
    assert addresses6("") == []


IN_BOTH = {"fib_trie": ON_A_BRIDGE, "if_inet6": JUST_MADE}


@pytest.mark.parametrize(
    ("files", "families"),
    [
        (IN_BOTH, [Family.IPV4, Family.IPV6]),
        (IN_BOTH | {"fib_trie": trie()}, [Family.IPV6]),
        (IN_BOTH | {"if_inet6": "".join(JUST_MADE.splitlines(keepends=True)[:2])}, [Family.IPV4]),
        (IN_BOTH | {"if_inet6": OF_ALL_KINDS.splitlines(keepends=True)[0]}, [Family.IPV4]),
    ],
    ids=["both", "loopback of IPv4", "of a link alone", "a duplicate"],
)
def test_in_which_families_a_container_has_an_address_takes_one_file_each(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], families: list[Family]
) -> None:
    monkeypatch.setattr(endpoints, "read", lambda path: files[path.removeprefix("/proc/7/net/")])
    assert [family for family in Family if Endpoints.has_address(7, family)] == families


def test_a_default_route_that_refuses_is_none() -> None:
    assert default_devices6(OF_ALL_KINDS_ROUTES) == ["eth0"]
    assert default_devices6(OF_ALL_KINDS_ROUTES.replace("00000003     eth0", "00000003     eth1")) == ["eth1"]
    assert default_devices6("") == []


CHOSEN6: dict[str, tuple[list[Address6], list[str], str | None, str | None]] = {
    "all kinds": (addresses6(OF_ALL_KINDS), ["eth0"], None, "fd00:17::9"),
    "the default route's device": (addresses6(OF_ALL_KINDS), ["eth1"], None, "2001:db8:a::7"),
    "no default route": (addresses6(OF_ALL_KINDS), [], None, "2001:db8:a::7"),
    "a tentative one": (addresses6(JUST_MADE), [], None, "fd00:17::2"),
    "two routing tables": (addresses6(OF_ALL_KINDS), ["eth1", "eth0"], "eth0", "fd00:17::9"),
    "no default route beside IPv4": (addresses6(OF_ALL_KINDS), ["eth1"], "eth0", "2001:db8:a::7"),
    "a second-rate one alone": ([own6("fd00::1", second_rate=True)], ["eth0"], None, "fd00::1"),
    "a second-rate one beside another": (
        [own6("fd00::1", second_rate=True), own6("fd00::2", "eth1")],
        ["eth0"],
        None,
        "fd00::2",
    ),
    "a duplicate": ([own6("fd00::1", duplicate=True)], ["eth0"], None, None),
    "loopback alone": ([own6("::1", "lo")], [], None, None),
    "no IPv6": ([], [], None, None),
}


@pytest.mark.parametrize("case", CHOSEN6)
def test_of_ipv6_the_address_is_that_of_the_default_routes_device_or_the_lowest(case: str) -> None:
    own, defaults, beside, expected = CHOSEN6[case]
    chosen = choose6(own, defaults, beside)
    assert (None if chosen is None else str(chosen[0])) == expected
    if chosen is not None:
        assert chosen[1] == next(one.device for one in own if one.address == chosen[0])


def test_a_process_that_ended_is_gone() -> None:
    with pytest.raises(Gone):
        endpoints.started(2**22 + 1)


def test_a_process_began_once() -> None:
    assert endpoints.started(os.getpid()) == endpoints.started(os.getpid()) > 0


def test_a_process_may_call_itself_what_it_likes() -> None:
    began = endpoints.started(os.getpid())
    comm = Path("/proc/self/comm")
    before = comm.read_bytes()
    try:
        comm.write_bytes(b"\xff) S 1 (\n\x80")
        assert endpoints.started(os.getpid()) == began
    finally:
        comm.write_bytes(before)
