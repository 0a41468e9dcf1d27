"""Why a mapping is not served, or not where it might be: what is in its way is named."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv6Address, ip_network

import pytest

from ctrport.model import (
    Access,
    Candidate,
    Container,
    Declaration,
    Endpoint,
    Family,
    Holder,
    Member,
    NodeFacts,
    Obstacle,
    Pod,
    PortRange,
    Protocol,
    State,
)
from ctrport.ports import parse
from ctrport.publish import Publications
from ctrport.reach import FORWARDING_OFF
from tests.unit import worlds
from tests.unit.worlds import FACTS, NODE4, candidate, declaration, fresh, key

BOTH = (Family.IPV4, Family.IPV6)


REASONS: dict[str, tuple[str, Endpoint | Obstacle, NodeFacts, bool, State, str]] = {
    "no port to choose": (
        *("80", worlds.endpoint("172.17.0.2"), FACTS, True),
        *(State.CONFLICT, "there is no free host port in net.ipv4.ip_local_port_range"),
    ),
    "no ports in a row": (
        *("80-81", worlds.endpoint("172.17.0.2"), replace(FACTS, free_ports=(PortRange(7, 7), PortRange(9, 9))), True),
        *(State.CONFLICT, "there are no 2 free host ports in a row in 7, 9"),
    ),
    "::1": (
        *("[::1]:8080:80", worlds.endpoint("fd00::2"), replace(FACTS, addresses=frozenset({IPv6Address("::1")})), True),
        *(State.UNSUPPORTED, "the kernel sends nothing on that was sent to ::1: publish on 127.0.0.1"),
    ),
    "a protocol that is not tracked": (
        *("80:80/sctp", worlds.endpoint("172.17.0.2"), replace(FACTS, protocols=frozenset({Protocol.TCP})), True),
        *(State.UNSUPPORTED, "this kernel does not track sctp connections"),
    ),
    "what the container lacks": (
        *("8080:80", worlds.NO_ADDRESS, FACTS, True),
        *(State.WAITING, "it has only a loopback address"),
    ),
    "what cannot be": (
        *("8080:80", Obstacle(State.UNSUPPORTED, "it is on the host's network"), FACTS, True),
        *(State.UNSUPPORTED, "it is on the host's network"),
    ),
    "localhost is off": (
        *("127.0.0.1:8080:80", worlds.endpoint("172.17.0.2"), FACTS, False),
        *(State.UNSUPPORTED, "127.0.0.1 is published only with firewall.localhost: true"),
    ),
    "not the node's address": (
        *("192.0.2.99:8080:80", worlds.endpoint("172.17.0.2"), FACTS, True),
        *(State.WAITING, "192.0.2.99 is not an address of this node"),
    ),
    "no address of the family": (
        *("0.0.0.0:8080:80", worlds.endpoint("fd00::2"), FACTS, True),
        *(State.WAITING, "the container has no IPv4 address that the host can reach"),
    ),
    "no IPv6 address": (
        *("[::]:8080:80", worlds.endpoint("172.17.0.2"), FACTS, True),
        *(State.WAITING, "the container has no IPv6 address that the host can reach"),
    ),
    "IPv4 is not forwarded": (
        *("8080:80", worlds.endpoint("172.17.0.2"), NodeFacts(frozenset(), FACTS.addresses), True),
        *(State.WAITING, FORWARDING_OFF[Family.IPV4]),
    ),
    "IPv6 is not forwarded": (
        *("8080:80", worlds.endpoint("fd00::2"), NodeFacts(frozenset({Family.IPV4}), FACTS.addresses), True),
        *(State.WAITING, FORWARDING_OFF[Family.IPV6]),
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_a_reason_names_what_is_in_the_way(case: str) -> None:
    mapping, where, facts, localhost, state, reason = REASONS[case]
    web = Candidate(Container(key("web"), 100, 1, (Member("web", None),)), where)
    [publication] = fresh([declaration("web", mapping)], [web], facts, localhost)
    assert (publication.state, publication.reason, publication.attachments) == (state, reason, ())


def test_the_port_that_is_named_is_the_first_of_those_contested() -> None:
    wanted = [declaration("db", "8005-8009:5-9"), declaration("web", "8000-8007:8000-8007/tcp", line=2)]
    publications = fresh(wanted, [candidate("db"), candidate("web", started=2)], FACTS)
    [_, loses] = publications
    assert loses.reason == "host port 8005/tcp is held by default/db (8005-8009:5-9/tcp)"


def test_of_two_families_the_one_that_is_forwarded_is_served() -> None:
    facts = NodeFacts(frozenset({Family.IPV6}), FACTS.addresses)
    web = candidate("web", "172.17.0.2", "fd00::2")
    [publication] = fresh([declaration("web", "8080:80")], [web], facts)
    assert publication.state is State.ACTIVE
    assert publication.attachments == (worlds.attachment("fd00::2"),)


def test_a_family_that_is_not_served_counts_for_nothing() -> None:
    publications = Publications([declaration("web", "8080:80")], FACTS, families=[Family.IPV4])
    publications.update(key("web"), candidate("web", "172.17.0.2", "fd00::2"))
    [change] = [c for c in publications.settle() if c.after and c.after.container]
    assert change.after is not None
    assert change.after.attachments == (worlds.attachment("172.17.0.2"),)


def test_a_mapping_for_a_family_that_is_not_served_does_not_blame_another() -> None:
    publications = Publications([declaration("web", "[::]:8080:80")], FACTS, families=[Family.IPV4])
    publications.update(key("web"), candidate("web", "172.17.0.2"))
    publications.settle()
    [publication] = publications
    assert publication.state in (State.WAITING, State.UNSUPPORTED)
    assert "IPv4" not in publication.reason  # it has an IPv4 address, and never asked for one


# Others who have a host port


def held(mapping: str, name: str = "KUBE-NODEPORTS") -> NodeFacts:
    return NodeFacts(FACTS.forwarding, FACTS.addresses, (Holder(name, parse(mapping)),))


@pytest.mark.parametrize(
    ("mapping", "state"),
    [
        ("30080:80", State.CONFLICT),
        (f"{NODE4}:30080:80", State.CONFLICT),
        ("30079-30081:80-82", State.CONFLICT),
        ("30080:80/udp", State.ACTIVE),
        ("30081:80", State.ACTIVE),
    ],
)
def test_a_port_that_another_answers_on_is_a_conflict_that_names_it(mapping: str, state: State) -> None:
    facts = held("30080:30080")
    [publication] = fresh([declaration("web", mapping)], [candidate("web")], facts, True)
    assert publication.state is state
    if state is State.CONFLICT:
        assert publication.reason == "host port 30080/tcp is held by KUBE-NODEPORTS"


def test_what_another_answers_on_is_taken_up_when_he_leaves() -> None:
    publications = Publications([declaration("web", "8080:80")], held("8080:8080", "CNI-HOSTPORT-DNAT"))
    publications.update(key("web"), candidate("web"))
    publications.settle()
    assert publications.count(State.CONFLICT) == 1
    assert publications.starved == 0  # there are others
    publications.learn(FACTS)
    [change] = publications.settle()
    assert change.after is not None
    assert change.after.state is State.ACTIVE
    publications.learn(held("8080:8080"))
    publications.settle()
    assert publications.count(State.ACTIVE) == 0


def test_a_pod_goes_by_its_name_and_a_name_that_is_none_is_quoted() -> None:
    wanted = [declaration("a", "8080:80"), declaration("b", "8080:80", line=2)]
    publications = Publications(wanted, FACTS)
    for started, (name, pod) in enumerate((("a", Pod("prod", "redis-0")), ("b", Pod("x\n", "\x1b[2J" * 90)))):
        one = candidate(name, f"172.17.0.{started + 2}", started=started)
        publications.update(key(name), replace(one, container=replace(one.container, pod=pod)))
    publications.settle()
    first, second = publications
    assert first.pod == "prod/redis-0"
    assert second.reason == "host port 8080/tcp is held by pod prod/redis-0 (8080:80/tcp)"
    assert second.pod is not None
    assert second.pod.isprintable()
    assert len(second.pod) <= 80


# Who may reach a mapping


def limited(*sources: str, mapping: str = "8080:80", line: int = 1, interface: str | None = None) -> Declaration:
    access = Access(tuple(map(ip_network, sources)), interface)
    return replace(declaration("web", mapping, line=line), access=access)


@pytest.mark.parametrize(
    ("sources", "served"),
    [
        ([], ["172.17.0.2", "fd00::2"]),
        (["192.0.2.0/24"], ["172.17.0.2"]),
        (["2001:db8::/32"], ["fd00::2"]),
        (["192.0.2.0/24", "2001:db8::/32"], ["172.17.0.2", "fd00::2"]),
    ],
)
def test_a_family_without_a_source_is_not_served(sources: list[str], served: list[str]) -> None:
    [publication] = fresh([limited(*sources)], [candidate("web", "172.17.0.2", "fd00::2")], FACTS)
    assert [str(attachment.address) for attachment in publication.attachments] == served


def test_sources_of_another_family_only_are_said() -> None:
    wanted = limited("2001:db8::/32", mapping="0.0.0.0:8080:80")
    [publication] = fresh([wanted], [candidate("web", "172.17.0.2")], FACTS)
    assert (publication.state, publication.reason) == (
        State.UNSUPPORTED,
        "none of its sources is a network of IPv4",
    )


def test_of_two_entries_with_different_access_the_first_has_the_port() -> None:
    wanted = [limited("192.0.2.0/24"), limited("198.51.100.0/24", line=2), limited("192.0.2.0/24", line=3)]
    first, second = fresh(wanted, [candidate("web")], FACTS)
    assert (first.state, first.source, first.access) == (State.ACTIVE, "config.yaml:1", wanted[0].access)
    assert (second.state, second.source) == (State.CONFLICT, "config.yaml:2")
    assert second.reason == "host port 8080/tcp is held by default/web (8080:80/tcp)"


# Sockets that hold host ports


def socket(name: str, mapping: str) -> Holder:
    return Holder(name, parse(mapping))


def test_a_socket_that_holds_a_port_is_named_until_it_is_gone() -> None:
    wanted = [declaration("web", "8080:80"), declaration("db", "8081:80", line=2)]
    publications = fresh(wanted, [candidate("web"), candidate("db")], FACTS)
    publications.meet([socket("nginx (pid 7)", "0.0.0.0:8080:8080")])
    [change] = publications.decide()
    assert change.after is not None
    assert (change.after.state, change.after.reason) == (
        State.CONFLICT,
        "host port 8080/tcp is held by nginx (pid 7)",
    )
    assert publications.met == [socket("nginx (pid 7)", "0.0.0.0:8080:8080")]
    publications.meet([])
    assert publications.decide() == ()  # nothing of it was taken yet
    assert publications.settle() == ()


def test_a_socket_keeps_out_whom_it_holds_the_port_against() -> None:
    wanted = [declaration("web", "8080:80"), declaration("db", f"{NODE4}:8081:80", "8082:80/udp", line=2)]
    publications = fresh(wanted, [candidate("web", "172.17.0.2"), candidate("db", started=2)], FACTS)
    elsewhere = ["[::]:8080:8080", "127.0.0.1:8081:8081", "0.0.0.0:8082:8082/tcp"]
    publications.meet([socket("another", mapping) for mapping in elsewhere])
    assert publications.settle() == ()


def test_who_waits_for_a_port_does_not_get_it_from_a_socket() -> None:
    wanted = [declaration("web", "8080:80"), declaration("db", "8080:81", line=2)]
    publications = fresh(wanted, [candidate("web"), candidate("db", started=2)], FACTS)
    publications.meet([socket("nginx (pid 7)", "0.0.0.0:8080:8080")])
    publications.update(key("web"), None)
    publications.settle()
    [db, _] = publications
    assert db.reason == "host port 8080/tcp is held by nginx (pid 7)"
