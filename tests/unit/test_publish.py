from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrport.model import (
    Candidate,
    ContainerKey,
    Declaration,
    Endpoint,
    Family,
    Mapping,
    NodeFacts,
    PortRange,
    Publication,
    Selector,
    State,
)
from ctrport.ports import parse
from ctrport.publish import Change, Publications
from tests.unit import worlds
from tests.unit.worlds import FACTS, NODE4, candidate, declaration, fresh, key, wishing

BOTH = (Family.IPV4, Family.IPV6)
Published = dict[tuple[ContainerKey | str, Mapping], Publication]
# What a daemon is told: of a container that runs or changed, of one that ended, of the node; None is a settle.
Told = Candidate | ContainerKey | NodeFacts | None
TELLING: st.SearchStrategy[list[Told]] = st.lists(
    worlds.candidates | st.sampled_from(worlds.NAMES).map(key) | worlds.facts | st.none(), max_size=15
)


def by_name(publications: Iterable[Publication]) -> Published:
    return {(p.container or p.source, p.mapping): p for p in publications}


def tell(publications: Publications, said: Told) -> tuple[Change, ...]:
    match said:
        case Candidate():
            publications.update(said.container.key, said)
        case ContainerKey():
            publications.update(said, None)
        case NodeFacts():
            publications.learn(said)
        case None:
            return publications.settle()
    return ()


def final(told: Sequence[Told]) -> tuple[dict[ContainerKey, Candidate], NodeFacts]:
    """What is true after all that was told."""
    running: dict[ContainerKey, Candidate] = {}
    facts = FACTS
    for said in told:
        match said:
            case Candidate():
                running[said.container.key] = said
            case ContainerKey():
                running.pop(said, None)
            case NodeFacts():
                facts = said
    return running, facts


@settings(deadline=None, max_examples=100)
@given(st.data(), worlds.declaration_lists(), TELLING, st.booleans())
def test_what_was_told_counts_and_not_the_order_of_telling(
    data: st.DataObject, declarations: list[Declaration], told: list[Told], localhost: bool
) -> None:
    followed = Publications(declarations, FACTS, families=BOTH, localhost=localhost)
    for said in told:
        tell(followed, said)
    followed.settle()
    running, facts = final(told)
    anew = fresh(declarations, data.draw(st.permutations(list(running.values()))), facts, localhost)
    assert by_name(followed) == by_name(anew)
    assert list(followed) == list(anew)
    assert len(followed) == len(by_name(followed))  # no name twice


def test_publications_are_listed_in_one_order_whatever_came_before() -> None:
    wanted = [declaration("db", "8080:80"), declaration("web", "8081:81", line=2)]
    publications = Publications(wanted, FACTS)
    before = list(publications)
    publications.update(key("db"), candidate("db"))
    publications.update(key("db"), None)
    assert list(publications) == before


@settings(deadline=None, max_examples=100)
@given(worlds.declaration_lists(), TELLING)
def test_changes_lead_from_one_settlement_to_the_next(declarations: list[Declaration], told: list[Told]) -> None:
    publications = Publications(declarations, FACTS, families=BOTH)
    known: Published = {}
    for said in [*told, None]:
        changes = tell(publications, said)
        for change in changes:
            assert change.before != change.after
            publication = change.after or change.before
            assert publication is not None
            name = (publication.container or publication.source, publication.mapping)
            assert known.pop(name, None) == change.before
            if change.after is not None:
                known[name] = change.after
        if said is None:
            assert known == by_name(publications)
    assert publications.settle() == ()


def claims(declarations: Sequence[Declaration], running: Iterable[Candidate]) -> list[tuple[Candidate, Mapping]]:
    """Every mapping that is asked for, once a container, in the order of precedence."""
    asked: list[tuple[Candidate, Mapping]] = []
    for each in sorted(running, key=lambda c: (c.container.started, c.container.key)):
        for one in declarations:
            if one.selector.matches(each.container):
                asked += [(each, mapping) for mapping in dict.fromkeys(one.mappings) if (each, mapping) not in asked]
    return asked


@settings(deadline=None, max_examples=100)
@given(worlds.declaration_lists(), TELLING)
def test_a_port_goes_to_who_started_first_of_those_that_could_be_served(
    declarations: list[Declaration], told: list[Told]
) -> None:
    publications = Publications(declarations, FACTS, families=BOTH)
    for said in told:
        tell(publications, said)
    publications.settle()
    running, _ = final(told)
    published = by_name(publications)
    holders: list[Mapping] = []
    for each, mapping in claims(declarations, running.values()):
        publication = published.pop((each.container.key, mapping))
        taken = any(mapping.overlaps(holder) for holder in holders)
        if publication.state is State.ACTIVE:
            assert not taken
            assert isinstance(each.endpoint, Endpoint)
            assert publication.attachments
            assert set(publication.attachments) <= set(each.endpoint.attachments)
            assert not publication.reason
            holders.append(mapping)
        else:
            # A conflict needs somebody earlier who has the port; everything else keeps nobody out.
            assert publication.attachments == ()
            assert publication.reason
            assert taken or mapping.dynamic or publication.state is not State.CONFLICT
    assert all(publication.container is None for publication in published.values())
    unmatched = {d.source for d in declarations if not any(d.selector.matches(c.container) for c in running.values())}
    assert {publication.source for publication in published.values()} == unmatched


@settings(deadline=None, max_examples=300)
@given(worlds.wish_lists, st.lists(worlds.wishful | st.sampled_from(worlds.NAMES).map(key), max_size=10))
def test_no_host_port_is_active_twice_whoever_asked_for_it(
    declarations: list[Declaration], told: list[Candidate | ContainerKey]
) -> None:
    publications = Publications(declarations, worlds.FEW, permissions=[worlds.ANYTHING])
    for said in told:
        tell(publications, said)
        publications.settle()
        bound = [p.bound for p in publications if p.state is State.ACTIVE and p.bound is not None]
        assert not [(one, other) for one, other in combinations(bound, 2) if one.overlaps(other)]


@pytest.mark.parametrize("own", ["8000:80", "80"])
def test_whoever_takes_any_free_port_takes_none_that_a_container_asked_for_by_itself(own: str) -> None:
    publications = Publications([declaration("web", "80")], worlds.FEW, permissions=[worlds.ANYTHING])
    # It has the port since before the daemon was started anew, which chooses from the first on.
    publications.recover({(key("api"), parse("80")): [PortRange(8000, 8000)]})
    publications.update(key("api"), wishing("api", 1, [own]))
    publications.settle()
    publications.update(key("web"), candidate("web", started=2))
    publications.settle()
    has = {p.container.id: str(p.bound) for p in publications if p.container and p.state is State.ACTIVE}
    assert has == {"api": "8000:80/tcp", "web": "8001:80/tcp"}


@pytest.mark.parametrize("earlier", [{}, {(key("api"), parse("80-81")): [PortRange(8000, 8001)]}])
def test_a_free_port_that_was_taken_back_is_not_had_again_from_whoever_has_it_now(
    earlier: dict[tuple[ContainerKey, Mapping], list[PortRange]],
) -> None:
    publications = Publications([], worlds.FEW)
    publications.recover(earlier)

    def give(name: str, started: int, *given: str) -> None:
        publications.update(key(name), wishing(name, started, given=given))
        publications.settle()

    give("api", 1, "80-81")  # two of the three that there are
    give("api", 1)
    give("db", 2, "80-81")
    give("api", 1, "80-81")
    has = {p.container.id: (p.state, str(p.bound)) for p in publications if p.container}
    assert has == {"api": (State.CONFLICT, "None"), "db": (State.ACTIVE, "8000-8001:80-81/tcp")}


@settings(deadline=None)
@given(worlds.declaration_lists(), TELLING)
def test_states_are_counted_as_they_are(declarations: list[Declaration], told: list[Told]) -> None:
    publications = Publications(declarations, FACTS, families=BOTH)
    for said in told:
        tell(publications, said)
    publications.settle()
    states = [publication.state for publication in publications]
    assert {state: publications.count(state) for state in State} == {state: states.count(state) for state in State}
    assert publications.standby == sum(publication.place > 0 for publication in publications)
    assert publications.unmatched == sum(publication.container is None for publication in publications)
    reasons = [publication.reason for publication in publications]
    assert publications.starved == sum("free host port" in reason for reason in reasons)


def states(publications: Publications) -> dict[str, State]:
    return {f"{p.container} {p.mapping}": p.state for p in publications if p.container is not None}


def test_the_next_in_line_takes_over_when_the_holder_ends() -> None:
    publications = Publications([declaration("*", "8080:80")], FACTS)
    for started, name in enumerate(worlds.NAMES, start=1):
        publications.update(key(name), candidate(name, started=started))
    publications.settle()
    assert line(publications) == {
        "api": (State.ACTIVE, ""),
        "db": (State.WAITING, "default/api serves host port 8080/tcp; next in line"),
        "web": (State.WAITING, "default/api serves host port 8080/tcp; 2nd in line"),
    }
    publications.update(key("api"), None)
    changes = publications.settle()
    # The one that still waits is told whom it waits for now.
    assert {str(p.container): (p.reason, p.place) for change in changes if (p := change.after)} == {
        "default/db": ("", 0),
        "default/web": ("default/db serves host port 8080/tcp; next in line", 1),
    }


def line(publications: Publications) -> dict[str, tuple[State, str]]:
    return {p.container.id: (p.state, p.reason) for p in publications if p.container is not None}


def test_a_line_is_in_the_order_of_the_start_whatever_was_heard_first() -> None:
    ordinals = ["", "next", "2nd", "3rd", *(f"{place}th" for place in range(4, 21)), "21st", "22nd", "23rd", "24th"]
    running = [candidate(f"web-{number:03}", started=number) for number in range(113, 113 - len(ordinals), -1)]
    publications = fresh([declaration("*", "8000-8001:80-81")], running, FACTS)
    its = list(line(publications).values())
    assert its[0] == (State.ACTIVE, "")
    assert [reason for _, reason in its[1:]] == [
        f"default/web-089 serves host ports 8000-8001/tcp; {ordinal} in line" for ordinal in ordinals[1:]
    ]


def test_only_who_matches_the_same_entry_stands_in_its_line() -> None:
    first, second = declaration("web-*", "8080:80", "8080:81/udp"), declaration("db-*", "8080:80", line=2)
    its = [candidate(name, started=n) for n, name in enumerate(["web-0", "db-0", "web-1", "db-1"])]
    publications = fresh([first, second], its, FACTS)
    held = "host port 8080/tcp is held by default/web-0 (8080:80/tcp)"
    assert {(p.container.id, p.reason) for p in publications if p.container and p.state is State.CONFLICT} == {
        ("db-0", held),
        ("db-1", held),
    }
    assert {(p.container.id, str(p.mapping)) for p in publications if p.container and p.place == 1} == {
        ("web-1", "8080:80/tcp"),
        ("web-1", "8080:81/udp"),
    }
    publications.update(key("web-0"), None)
    publications.settle()
    # db-0 started before web-1, so that the port goes over to the other line, which then is one.
    assert line(publications)["db-1"] == (State.WAITING, "default/db-0 serves host port 8080/tcp; next in line")


def test_a_container_without_an_address_stands_in_no_line() -> None:
    its = [candidate("api"), candidate("db", started=2, obstacle=worlds.NO_ADDRESS), candidate("web", started=3)]
    publications = fresh([declaration("*", "8080:80")], its, FACTS)
    assert line(publications)["db"] == (State.WAITING, "it has only a loopback address")
    assert line(publications)["web"][1].endswith("; next in line")


@settings(deadline=None, max_examples=100)
@given(worlds.declaration_lists(), TELLING)
def test_who_waits_in_a_line_waits_for_one_of_it_and_all_started_in_that_order(
    declarations: list[Declaration], told: list[Told]
) -> None:
    publications = Publications(declarations, FACTS, families=BOTH)
    for said in told:
        tell(publications, said)
    publications.settle()
    running, _ = final(told)
    lines: dict[tuple[str, Mapping], list[Publication]] = {}
    for publication in publications:
        if publication.place:
            lines.setdefault((publication.source, publication.mapping), []).append(publication)
    for (source, mapping), waiting in lines.items():
        serving = [p for p in publications if (p.source, p.asked, p.state) == (source, mapping, State.ACTIVE)]
        waiting.sort(key=lambda p: p.place)
        assert [p.place for p in waiting] == [*range(1, len(waiting) + 1)]
        assert {p.state for p in waiting} == {State.WAITING}
        started = [(running[p.container].container.started, p.container) for p in serving + waiting if p.container]
        assert len(serving) == 1
        assert started == sorted(started)


def test_who_loses_the_port_lets_go_of_all_of_its_range_and_a_third_may_have_the_rest() -> None:
    wanted = [
        declaration("api", "8000:80"),
        declaration("db", "8000-8001:80-81", line=2),
        declaration("web", "8001:80", line=3),
    ]
    publications = Publications(wanted, FACTS)
    for started, name in enumerate(worlds.NAMES, start=1):
        publications.update(key(name), candidate(name, started=started))
    publications.settle()
    assert list(states(publications).values()) == [State.ACTIVE, State.CONFLICT, State.ACTIVE]
    # The chain of rivals is followed to its end: api's end gives db its range, which takes web's port.
    publications.update(key("api"), None)
    publications.settle()
    assert list(states(publications).values()) == [State.ACTIVE, State.CONFLICT]


def test_a_container_that_started_earlier_takes_the_port_however_late_it_is_heard_of() -> None:
    publications = Publications([declaration("*", "8080:80")], FACTS)
    publications.update(key("db"), candidate("db", started=2))
    publications.settle()
    publications.update(key("web"), candidate("web", started=1))
    publications.settle()
    assert states(publications) == {
        "default/db 8080:80/tcp": State.WAITING,
        "default/web 8080:80/tcp": State.ACTIVE,
    }


def test_of_two_that_started_in_the_same_tick_the_first_by_name_has_the_port() -> None:
    publications = fresh([declaration("*", "8080:80")], [candidate("web"), candidate("db")], FACTS)
    assert states(publications) == {
        "default/db 8080:80/tcp": State.ACTIVE,
        "default/web 8080:80/tcp": State.WAITING,
    }


def test_a_container_without_an_endpoint_keeps_nobody_out() -> None:
    publications = Publications([declaration("*", "8080:80")], FACTS)
    publications.update(key("db"), candidate("db", started=1, obstacle=worlds.NO_ADDRESS))
    publications.update(key("web"), candidate("web", started=2))
    publications.settle()
    assert states(publications) == {
        "default/db 8080:80/tcp": State.WAITING,
        "default/web 8080:80/tcp": State.ACTIVE,
    }


def test_one_container_may_not_have_a_port_twice() -> None:
    publications = fresh([declaration("web", "8080:80", "0.0.0.0:8080:81")], [candidate("web")], FACTS)
    [wins, loses] = sorted(publications, key=lambda p: p.state)
    assert (wins.state, str(wins.mapping)) == (State.ACTIVE, "8080:80/tcp")
    assert loses.reason == "host port 8080/tcp is held by default/web (8080:80/tcp)"


def test_two_declarations_of_one_mapping_are_one_publication_of_the_first() -> None:
    wanted = [declaration("*", "8080:80", line=1), declaration("web", "8080:80", "8081:81", line=2)]
    publications = fresh(wanted, [candidate("web")], FACTS)
    assert [(str(p.mapping), p.source, p.state) for p in publications] == [
        ("8080:80/tcp", "config.yaml:1", State.ACTIVE),
        ("8081:81/tcp", "config.yaml:2", State.ACTIVE),
    ]


def test_host_addresses_of_their_own_are_no_rivals() -> None:
    other = IPv4Address("192.0.2.2")
    facts = NodeFacts(FACTS.forwarding, FACTS.addresses | {other})
    wanted = [declaration("db", f"{NODE4}:8080:80"), declaration("web", f"{other}:8080:80", "8080:80", line=2)]
    publications = fresh(wanted, [candidate("db"), candidate("web", started=2)], facts)
    assert [(str(p.mapping), p.state) for p in publications] == [
        ("192.0.2.1:8080:80/tcp", State.ACTIVE),
        ("192.0.2.2:8080:80/tcp", State.ACTIVE),
        ("8080:80/tcp", State.CONFLICT),
    ]


def test_a_declaration_that_matches_nothing_says_so_until_something_comes() -> None:
    publications = Publications([declaration("web", "8080:80", "8081:81")], FACTS)
    assert len(publications) == 2
    assert publications.count(State.WAITING) == 2
    assert {change.after for change in publications.settle()} == set(publications)
    assert {(p.container, p.source, p.reason) for p in publications} == {
        (None, "config.yaml:1", "no running container matches container=web")
    }
    publications.update(key("web"), candidate("web"))
    publications.update(key("db"), candidate("db"))
    changes = publications.settle()
    assert [p.container for p in publications] == [key("web"), key("web")]
    assert sum(change.after is None for change in changes) == 2
    publications.update(key("web"), None)
    publications.settle()
    assert [p.container for p in publications] == [None, None]
    assert publications.count(State.WAITING) == 2
    assert publications.count(State.ACTIVE) == 0


def test_the_node_changing_is_felt_by_everyone() -> None:
    publications = Publications([declaration("web", f"{NODE4}:8080:80")], NodeFacts(FACTS.forwarding, frozenset()))
    publications.update(key("web"), candidate("web"))
    publications.settle()
    assert states(publications) == {"default/web 192.0.2.1:8080:80/tcp": State.WAITING}
    publications.learn(FACTS)
    [change] = publications.settle()
    assert change.after is not None
    assert change.after.state is State.ACTIVE
    publications.learn(FACTS)
    assert publications.settle() == ()


def test_what_came_and_went_between_two_settlements_is_no_change() -> None:
    publications = Publications([declaration("web", "8080:80")], FACTS)
    publications.update(key("web"), candidate("web"))
    publications.settle()
    publications.update(key("web"), None)
    publications.update(key("web"), candidate("web"))
    assert publications.settle() == ()


def test_one_change_is_judged_at_its_own_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0
    overlaps = Mapping.overlaps

    def counted(self: Mapping, other: Mapping) -> bool:
        nonlocal asked
        asked += 1
        return overlaps(self, other)

    monkeypatch.setattr(Mapping, "overlaps", counted)
    ports = range(8000, 8100)
    wanted = [declaration(f"*-{port}", f"{port}:80", line=port) for port in ports]
    publications = Publications(wanted, FACTS)
    for port in ports:
        for started, name in enumerate(("first", "second")):
            publications.update(key(f"{name}-{port}"), candidate(f"{name}-{port}", started=started))
    publications.settle()
    assert asked == len(ports)  # each port has two who want it
    asked = 0
    publications.update(key("third-8000"), candidate("third-8000", started=3))
    publications.settle()
    assert asked == 2


def test_containers_that_nobody_declares_are_not_wanted() -> None:
    wanted = Declaration(Selector(labels=(("app", "web"),)), (parse("8080:80"),), "config.yaml:1")
    publications = Publications([wanted], FACTS)
    assert publications.wants(candidate("any", labels={"app": "web"}).container)
    assert not publications.wants(candidate("any").container)


def test_candidates_are_remembered_until_they_end() -> None:
    publications = Publications([], FACTS)
    web = candidate("web")
    publications.update(key("web"), web)
    assert (publications.candidate(key("web")), list(publications.candidates)) == (web, [web])
    publications.update(key("web"), None)
    publications.update(key("web"), None)  # told twice
    assert (publications.candidate(key("web")), list(publications.candidates)) == (None, [])
