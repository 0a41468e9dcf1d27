"""Host ports that are chosen: which are offered, who gets which, and that whoever has one keeps it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrport import ports
from ctrport.choose import Ring, blocks
from ctrport.model import (
    Candidate,
    ContainerKey,
    Declaration,
    Holder,
    NodeFacts,
    PortRange,
    Protocol,
    Publication,
    State,
)
from ctrport.publish import Publications
from tests.unit import worlds
from tests.unit.worlds import candidate, declaration, key

FREE = (PortRange(100, 104), PortRange(110, 110))
FACTS = replace(worlds.FACTS, free_ports=FREE)


def texts(ranges: Iterable[PortRange]) -> list[str]:
    return [str(each) for each in ranges]


def test_blocks_stay_within_their_range() -> None:
    assert texts(blocks(FREE, 1)) == ["100", "101", "102", "103", "104", "110"]
    assert texts(blocks(FREE, 3)) == ["100-102", "101-103", "102-104"]
    assert texts(blocks(FREE, 6)) == []


@pytest.mark.parametrize(
    ("taken", "length", "offered"),
    [
        ("101", 1, ["102", "103", "104", "110", "100", "101"]),
        ("104", 1, ["110", "100", "101", "102", "103", "104"]),
        ("110", 1, ["100", "101", "102", "103", "104", "110"]),
        ("101", 2, ["102-103", "103-104", "100-101", "101-102"]),
        ("100-103", 2, ["100-101", "101-102", "102-103", "103-104"]),
        ("65535", 1, ["100", "101", "102", "103", "104", "110"]),
    ],
)
def test_a_ring_goes_on_behind_what_was_taken_and_comes_round(taken: str, length: int, offered: list[str]) -> None:
    ring = Ring()
    ring.turn(ports.parse(taken).container_ports)
    assert texts(ring.blocks(FREE, length)) == offered


def test_a_ring_offers_each_block_once() -> None:
    ring = Ring()
    for _ in range(12):
        for length in range(1, 7):
            assert sorted(ring.blocks(FREE, length)) == list(blocks(FREE, length))
        ring.turn(next(ring.blocks(FREE, 1)))


def publish(*declarations: Declaration, facts: NodeFacts = FACTS) -> Publications:
    return Publications(declarations, facts)


def start(publications: Publications, name: str, started: int = 1) -> None:
    publications.update(key(name), candidate(name, started=started))


def bound(publications: Publications) -> dict[str, str]:
    """Return by container what it has, or its state."""
    publications.settle()
    found = (p for p in publications if p.container is not None)
    return {f"{p.container.id}": str(p.bound or p.state) for p in found if p.container is not None}


def test_a_mapping_without_a_host_port_gets_one_that_is_free() -> None:
    publications = publish(declaration("*", "80"), declaration("db", "100:81/tcp", line=2))
    start(publications, "web")
    # 100 is declared, whether or not whoever declares it runs.
    assert bound(publications) == {"web": "101:80/tcp"}
    [publication] = [p for p in publications if p.container]
    assert str(publication.mapping) == "80/tcp"
    assert publication.state is State.ACTIVE


def test_several_ports_without_host_ports_get_as_many_in_a_row() -> None:
    publications = publish(declaration("web", "80-82"))
    start(publications, "web")
    assert bound(publications) == {"web": "100-102:80-82/tcp"}


def test_a_port_that_was_given_up_rests() -> None:
    publications = publish(declaration("*", "80"))
    start(publications, "web")
    assert bound(publications) == {"web": "100:80/tcp"}
    publications.update(key("web"), None)
    start(publications, "web", started=2)
    assert bound(publications) == {"web": "101:80/tcp"}


def test_udp_and_tcp_may_have_the_same_port() -> None:
    publications = publish(declaration("web", "80"), declaration("db", "80/udp", line=2), facts=only(100))
    start(publications, "web")
    start(publications, "db")
    assert bound(publications) == {"db": "100:80/udp", "web": "100:80/tcp"}


def only(*free: int) -> NodeFacts:
    return replace(FACTS, free_ports=tuple(PortRange(port, port) for port in free))


def test_when_all_are_taken_the_next_waits_for_one() -> None:
    publications = publish(declaration("*", "80"), facts=only(100))
    start(publications, "web")
    start(publications, "db", started=2)
    assert bound(publications) == {"db": "conflict", "web": "100:80/tcp"}
    publications.update(key("web"), None)
    assert bound(publications) == {"db": "100:80/tcp"}


def test_whoever_has_a_port_keeps_it_though_an_earlier_one_comes() -> None:
    publications = publish(declaration("*", "80"), facts=only(100))
    start(publications, "web", started=2)
    assert bound(publications) == {"web": "100:80/tcp"}
    start(publications, "db", started=1)
    assert bound(publications) == {"db": "conflict", "web": "100:80/tcp"}


def test_a_pool_gives_the_first_port_that_nobody_names() -> None:
    publications = publish(declaration("api", "8000:80"), declaration("*b", "8000-8002:81", line=2))
    for number, name in enumerate(["web", "db"], 2):
        start(publications, name, started=number)
    assert bound(publications) == {"web": "8001:81/tcp", "db": "8002:81/tcp"}


def test_a_pool_gives_a_port_that_somebody_names_before_it_gives_none() -> None:
    publications = publish(declaration("api", "8000-8001:80-81"), declaration("web", "8000-8001:81", line=2))
    start(publications, "web", started=2)
    assert bound(publications) == {"web": "8000:81/tcp"}
    start(publications, "api", started=1)
    assert bound(publications) == {"api": "8000-8001:80-81/tcp", "web": "conflict"}


def test_a_pool_that_is_used_up_says_so_and_gives_what_comes_free() -> None:
    publications = publish(declaration("*", "8000-8001:80"))
    for number, name in enumerate(["api", "db", "web"]):
        start(publications, name, started=number)
    assert bound(publications) == {"api": "8000:80/tcp", "db": "8001:80/tcp", "web": "conflict"}
    [last] = [p for p in publications if p.state is State.CONFLICT]
    assert last.reason == "every host port of 8000-8001/tcp is held"
    publications.update(key("api"), None)
    assert bound(publications) == {"db": "8001:80/tcp", "web": "8000:80/tcp"}


def test_one_that_names_its_port_takes_it_from_a_later_pool_which_moves_on() -> None:
    named = [declaration("db", "8000:80"), declaration("api", "8001:80", line=2)]
    publications = publish(*named, declaration("web", "8000-8001:80", line=3))
    start(publications, "web", started=2)
    assert bound(publications) == {"web": "8000:80/tcp"}
    start(publications, "db", started=1)
    assert bound(publications) == {"db": "8000:80/tcp", "web": "8001:80/tcp"}


def test_a_socket_makes_the_chosen_port_another() -> None:
    publications = publish(declaration("*", "80", "8000-8001:80/udp"))
    start(publications, "web")
    publications.settle()
    publications.meet([Holder("x", ports.parse("0.0.0.0:100:100")), Holder("x", ports.parse("0.0.0.0:8000:1/udp"))])
    changes = publications.settle()
    assert sorted(str(change.after and change.after.bound) for change in changes) == ["101:80/tcp", "8001:80/udp"]


def test_the_ports_of_an_earlier_run_are_had_again() -> None:
    publications = publish(declaration("*", "80", "8000-8003:81"))
    publications.recover(
        {
            (key("db"), ports.parse("80")): (PortRange(103, 103),),
            (key("db"), ports.parse("8000-8003:81")): (PortRange(8002, 8002),),
            (key("web"), ports.parse("80")): (PortRange(999, 999),),
        }
    )
    for number, name in enumerate(["api", "db", "web"]):
        start(publications, name, started=number)
    publications.settle()
    assert {f"{p.container} {p.bound}" for p in publications} == {
        *("default/api 100:80/tcp", "default/db 103:80/tcp", "default/web 999:80/tcp"),
        *("default/api 8000:81/tcp", "default/db 8002:81/tcp", "default/web 8001:81/tcp"),
    }


def test_a_port_of_an_earlier_run_that_is_held_by_now_is_given_up() -> None:
    publications = publish(declaration("*", "80"))
    publications.recover({(key("web"), ports.parse("80")): (PortRange(103, 103),)})
    publications.meet([Holder("x", ports.parse("0.0.0.0:103:1"))])
    start(publications, "web")
    assert bound(publications) == {"web": "100:80/tcp"}


# Whatever happens, in whatever order

WANTED = st.lists(
    st.tuples(
        st.sampled_from(["*", *worlds.NAMES]),
        st.lists(
            st.sampled_from(["80", "81-82", "100:80", "101:80", "100-102:80", "100-103:81", "103:80/udp", "80/udp"]),
            min_size=1,
            max_size=3,
            unique=True,
        ),
    ),
    max_size=3,
)
STEPS = st.lists(
    st.one_of(
        worlds.candidates,
        st.sampled_from(worlds.NAMES).map(key),
        st.sets(st.sampled_from([100, 101, 102, 103])).map(sorted),
        st.none(),
    ),
    max_size=15,
)


@settings(deadline=None, max_examples=200)
@given(WANTED, STEPS)
def test_no_two_have_a_port_and_each_has_what_it_asked_for(
    wanted: list[tuple[str, list[str]]], steps: list[object]
) -> None:
    declarations = [declaration(name, *mappings, line=line) for line, (name, mappings) in enumerate(wanted)]
    publications = publish(*declarations)
    held: set[int] = set()
    for step in [*steps, None]:
        match step:
            case ContainerKey():
                publications.update(step, None)
            case Candidate():
                publications.update(step.container.key, step)
            case list():
                held = set(step)
                publications.meet(Holder("x", ports.parse(f"0.0.0.0:{port}:1")) for port in held)
            case _:
                publications.settle()
                active = [publication for publication in publications if publication.state is State.ACTIVE]
                for index, publication in enumerate(active):
                    check(publication, held, active[:index])


def host_ports(publication: Publication) -> set[int]:
    assert publication.bound is not None
    assert publication.bound.host_ports is not None
    return set(publication.bound.host_ports)


def check(one: Publication, held: set[int], others: list[Publication]) -> None:
    """One that is active has host ports that it asked for, and that nobody else has."""
    assert one.bound is not None
    assert replace(one.bound, host_ports=one.mapping.host_ports) == one.mapping
    families = {attachment.address.version for attachment in one.attachments}
    assert 4 not in families or one.mapping.protocol is not Protocol.TCP or not held & host_ports(one)
    if one.mapping.host_ports is not None:
        assert host_ports(one) <= set(one.mapping.host_ports)
    else:
        assert any(host_ports(one) <= set(free) for free in FREE)
    assert not any(other.bound is not None and other.bound.overlaps(one.bound) for other in others)


@settings(deadline=None, max_examples=200)
@given(WANTED, STEPS, st.sampled_from(worlds.NAMES))
def test_what_has_a_port_keeps_it_when_others_come_and_go(
    wanted: list[tuple[str, list[str]]], steps: list[object], name: str
) -> None:
    declarations = [declaration(name, *mappings, line=line) for line, (name, mappings) in enumerate(wanted)]
    publications = publish(*declarations)
    start(publications, name, started=0)  # before all others: nobody may take what it has
    publications.settle()
    before = {p.mapping: p.bound for p in publications if p.container == key(name)}
    for step in steps:
        match step:
            case ContainerKey() if step != key(name):
                publications.update(step, None)
            case Candidate() if step.container.key != key(name):
                publications.update(step.container.key, step)
            case None:
                publications.settle()
    publications.settle()
    assert {p.mapping: p.bound for p in publications if p.container == key(name)} == before


# What a change reaches


def test_a_pool_takes_what_is_only_named_before_what_another_has() -> None:
    named = declaration("api", "8001:80")  # which never starts
    publications = publish(named, declaration("*b", "8000-8001:80", line=2))
    start(publications, "web", started=2)
    assert bound(publications) == {"web": "8000:80/tcp"}
    start(publications, "db", started=1)
    assert bound(publications) == {"db": "8001:80/tcp", "web": "8000:80/tcp"}


def test_who_found_no_port_looks_again_when_one_comes_free() -> None:
    publications = publish(declaration("api", "80-84"), declaration("web", "80-82", line=2))
    start(publications, "api", started=1)
    start(publications, "web", started=2)
    assert bound(publications) == {"api": "100-104:80-84/tcp", "web": "conflict"}
    publications.update(key("db"), None)
    assert bound(publications)["web"] == "conflict"
    publications.update(key("api"), None)
    assert bound(publications) == {"web": "100-102:80-82/tcp"}


def test_who_found_no_port_looks_again_when_there_are_more_to_choose_from() -> None:
    publications = publish(declaration("web", "80-86"))
    start(publications, "web")
    assert bound(publications) == {"web": "conflict"}
    publications.learn(replace(FACTS, free_ports=(PortRange(200, 210),)))
    assert bound(publications) == {"web": "200-206:80-86/tcp"}


def test_a_port_that_comes_free_in_a_pool_reaches_those_that_wait_for_one() -> None:
    publications = publish(declaration("api", "8001:81"), declaration("web", "8000-8001:80", line=2))
    start(publications, "web", started=1)
    start(publications, "api", started=0)
    other = Holder("x", ports.parse("0.0.0.0:8000:1"))
    publications.meet([other])
    assert bound(publications) == {"api": "8001:81/tcp", "web": "conflict"}
    assert publications.met == [other]
    publications.meet([])
    assert bound(publications) == {"api": "8001:81/tcp", "web": "8000:80/tcp"}


def test_sockets_on_ports_that_nobody_wants_are_forgotten() -> None:
    publications = publish(declaration("*", "80", "8000-8001:81"))
    start(publications, "web")
    wanted, unwanted = Holder("x", ports.parse("0.0.0.0:8001:1")), Holder("x", ports.parse("0.0.0.0:104:1"))
    assert publications.meet_also([wanted, unwanted])
    assert not publications.meet_also([wanted])
    assert publications.met == [wanted]


def test_a_large_pool_costs_what_is_taken_of_it() -> None:
    publications = publish(declaration("*", "1024-65535:80"))
    for number in range(300):
        start(publications, f"web-{number}", started=number)
    assert len(publications.settle()) == 300
    taken = {next(iter(host_ports(p))) for p in publications if p.bound is not None}
    assert taken == set(range(1024, 1324))
    publications.update(key("web-7"), None)
    publications.settle()
    start(publications, "db", started=1000)
    [change] = publications.settle()
    assert change.after is not None
    assert str(change.after.bound) == "1031:80/tcp"
