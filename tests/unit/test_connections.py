"""Connections per mapping: as the kernel counts them, in no more series than there may be, and none counted twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from ctrport.connections import Connections, Counts, Labels
from ctrport.model import Family, Publication
from ctrport.owners import owner_of
from tests.unit.worlds import active

WEB, DB, DNS = active("8080:80"), active("9000:90", name="db"), active("127.0.0.1:53:53/udp", name="dns")


def counts(*seen: tuple[Publication, int], published: Sequence[Publication] | None = None) -> Counts:
    known = [publication for publication, _ in seen] if published is None else published
    return Counts(
        {Family.IPV4: {owner_of(publication): count for publication, count in seen}},
        {owner_of(publication): publication for publication in known},
    )


def shown(connections: Connections) -> dict[str, int]:
    return {labels.host_port: count for labels, count in connections.series.items()}


def test_a_series_goes_by_container_and_host_port() -> None:
    assert Labels.of(DNS, Family.IPV4) == Labels("default", "dns", "", "127.0.0.1", "53", "udp", "ipv4")
    pod = replace(active("8000-8010:9000-9010", name="sandbox"), pod="shop/web-0")
    assert Labels.of(pod, Family.IPV6) == Labels("default", "", "shop/web-0", "", "8000-8010", "tcp", "ipv6")
    assert Labels.of(active("80", on="32768"), Family.IPV4).host_port == "32768"


def test_the_kernels_own_numbers_are_shown() -> None:
    connections = Connections()
    assert (connections.series, connections.rest, connections.left_out) == ({}, 0, 0)
    connections.take(counts((WEB, 3), (DB, 7)))
    assert shown(connections) == {"8080": 3, "9000": 7}
    connections.take(counts((WEB, 1), (DNS, 2)))  # written anew, gone, and come
    assert shown(connections) == {"8080": 1, "53": 2}
    assert (connections.rest, connections.left_out) == (0, 0)


def test_families_are_counted_apart() -> None:
    connections = Connections()
    owner = owner_of(WEB)
    connections.take(Counts({Family.IPV4: {owner: 3}, Family.IPV6: {owner: 5}}, {owner: WEB}))
    assert {labels.family: count for labels, count in connections.series.items()} == {"ipv4": 3, "ipv6": 5}


def test_who_has_a_series_keeps_it_and_the_next_gets_it() -> None:
    connections = Connections(most=1)
    connections.take(counts((WEB, 3), (DB, 7)))
    assert (shown(connections), connections.rest, connections.left_out) == ({"8080": 3}, 0, 1)
    connections.take(counts((DB, 9), (WEB, 4)))
    assert (shown(connections), connections.rest) == ({"8080": 4}, 2)
    connections.take(counts((DB, 10)))
    assert (shown(connections), connections.rest, connections.left_out) == ({"9000": 10}, 2, 0)


def test_the_rest_counts_from_when_it_was_first_looked() -> None:
    connections = Connections(most=0)
    connections.take(counts((WEB, 1000)))
    assert connections.rest == 0
    connections.take(counts((WEB, 1001), (DB, 5)))  # one that came since
    assert connections.rest == 6
    connections.take(counts((WEB, 2), (DB, 5)))  # written anew
    assert connections.rest == 8
    connections.take(counts())
    connections.take(counts((WEB, 1)))
    assert (connections.rest, connections.left_out) == (9, 1)


def test_what_nobody_publishes_has_no_series() -> None:
    connections = Connections()
    connections.take(counts((WEB, 3), (DB, 7), published=[WEB]))
    assert (shown(connections), connections.left_out) == ({"8080": 3}, 1)
    connections.take(counts((WEB, 3), (DB, 8), published=[WEB, DB]))
    assert (shown(connections), connections.rest, connections.left_out) == ({"8080": 3, "9000": 8}, 0, 0)
    # Its container ended, and its rules are just about to go.
    connections.take(counts((WEB, 3), (DB, 8), published=[WEB]))
    assert (shown(connections), connections.rest) == ({"8080": 3}, 0)


PORTS = [active(f"{port}:80") for port in range(8000, 8006)]
steps = st.lists(
    st.dictionaries(st.sampled_from(range(len(PORTS))), st.integers(0, 5), max_size=len(PORTS)), max_size=8
)


@given(steps, st.integers(0, 4))
def test_there_are_never_more_series_and_the_rest_never_falls(steps: list[dict[int, int]], most: int) -> None:
    connections, rest = Connections(most), 0
    for step in steps:
        connections.take(counts(*((PORTS[index], count) for index, count in step.items())))
        assert len(connections.series) == min(most, len(step))
        assert len(connections.series) + connections.left_out == len(step)
        assert connections.rest >= rest
        rest = connections.rest


@given(st.lists(st.lists(st.integers(0, 9), min_size=6, max_size=6), min_size=1, max_size=6), st.integers(0, 6))
def test_nothing_is_lost_and_nothing_counted_twice(growth: list[list[int]], most: int) -> None:
    """Where no rule is written anew, all series and the rest together grow by what came."""
    connections, totals = Connections(most), [100] * len(PORTS)
    connections.take(counts(*zip(PORTS, totals, strict=True)))
    before = sum(connections.series.values()) + connections.rest
    for step in growth:
        totals = [total + more for total, more in zip(totals, step, strict=True)]
        connections.take(counts(*zip(PORTS, totals, strict=True)))
    assert sum(connections.series.values()) + connections.rest == before + sum(map(sum, growth))
