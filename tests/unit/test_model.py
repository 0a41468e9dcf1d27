from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrport.model import (
    IDENTIFIER_MAX,
    Attachment,
    Container,
    ContainerKey,
    Endpoint,
    Family,
    Mapping,
    Member,
    Pod,
    PodSelector,
    PortRange,
    Selector,
    State,
    is_identifier,
)
from ctrport.ports import parse
from tests.unit import strategies, worlds


@pytest.mark.parametrize(("first", "last"), [(0, 80), (80, 79), (1, 65536), (-1, 1)])
def test_a_range_that_is_none_is_refused(first: int, last: int) -> None:
    with pytest.raises(ValueError, match=f"not a range of ports: {first}-{last}"):
        PortRange(first, last)


@given(strategies.port_ranges(), strategies.port_ranges())
def test_ranges_overlap_where_they_share_a_port(one: PortRange, other: PortRange) -> None:
    assert one.overlaps(other) is not set(one).isdisjoint(other)
    assert len(one) == len(set(one))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("8080:80", "8080:81", True),
        ("8080:80", "8081:80", False),
        ("8080:80/tcp", "8080:80/udp", False),
        ("8000-8010:8000-8010", "8010:80", True),
        ("8000-8010:8000-8010", "8011:80", False),
        # A host address excludes itself and the wildcards of its family, as bind(2) does without SO_REUSEADDR.
        ("192.0.2.1:8080:80", "192.0.2.2:8080:80", False),
        ("192.0.2.1:8080:80", "192.0.2.1:8080:80", True),
        ("192.0.2.1:8080:80", "0.0.0.0:8080:80", True),
        ("192.0.2.1:8080:80", "8080:80", True),
        ("192.0.2.1:8080:80", "[::]:8080:80", False),
        ("0.0.0.0:8080:80", "[::]:8080:80", False),
        ("8080:80", "[::]:8080:80", True),
        ("8080:80", "[2001:db8::1]:8080:80", True),
        ("127.0.0.1:8080:80", "8080:80", True),
        # Who asks for any free port can be given another.
        ("80", "80", False),
        ("80", "8080:80", False),
    ],
)
def test_mappings_overlap_as_bind_would_judge(one: str, other: str, expected: bool) -> None:
    assert parse(one).overlaps(parse(other)) is expected
    assert parse(other).overlaps(parse(one)) is expected


@given(strategies.mappings(), strategies.mappings())
def test_overlap_is_mutual(one: Mapping, other: Mapping) -> None:
    assert one.overlaps(other) is other.overlaps(one)


@given(strategies.mappings())
def test_a_mapping_with_host_ports_overlaps_with_itself(mapping: Mapping) -> None:
    assert mapping.overlaps(mapping) is (not mapping.dynamic)


def test_a_mapping_serves_the_families_of_its_host_address() -> None:
    assert parse("8080:80").families == (Family.IPV4, Family.IPV6)
    assert parse("0.0.0.0:8080:80").families == (Family.IPV4,)
    assert parse("[::]:8080:80").families == (Family.IPV6,)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("web", True),
        ("a" * IDENTIFIER_MAX, True),
        ("k8s.io", True),
        ("web_1-a.b", True),
        ("a" * (IDENTIFIER_MAX + 1), False),
        ("", False),
        (".web", False),
        ("web-", False),
        ("a--b", False),
        ("a/b", False),
        ('a"b', False),
        ("a b", False),
        ("web\n", False),
        ("wéb", False),
    ],
)
def test_identifiers_are_those_of_containerd(text: str, expected: bool) -> None:
    assert is_identifier(text) is expected


@pytest.mark.parametrize("device", ["", "a b", "eth0\n", 'e"', "x" * 16, "a/b", "-j DROP"])
def test_a_device_whose_name_could_end_its_place_in_a_rule_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match="not a device name that can be part of a rule"):
        Attachment(IPv4Address("172.17.0.2"), device, IPv4Network("172.17.0.0/16"))


def test_an_endpoint_has_an_attachment_a_family() -> None:
    four, six = worlds.attachment("172.17.0.2"), worlds.attachment("fd00::2")
    assert Endpoint((four, six)).at(Family.IPV4) is four
    assert Endpoint((four, six)).at(Family.IPV6) is six
    assert Endpoint((four,)).at(Family.IPV6) is None


@pytest.mark.parametrize(
    ("value", "family"),
    [
        (IPv4Address("0.0.0.0"), Family.IPV4),
        (IPv6Address("::"), Family.IPV6),
        (IPv4Network("10.0.0.0/8"), Family.IPV4),
        (IPv6Network("fd00::/8"), Family.IPV6),
    ],
)
def test_addresses_and_networks_have_a_family(
    value: IPv4Address | IPv6Address | IPv4Network | IPv6Network, family: Family
) -> None:
    assert Family.of(value) is family


WEB = Container(ContainerKey("k8s.io", "web-1"), 1, 1, (Member("web-1", None, {"app": "web", "tier": "front"}),))
POD = Container(
    ContainerKey("k8s.io", "5efb"),
    1,
    1,
    (Member("91ac", "redis", {"app": "redis"}), Member("77d0", "exporter", {"app": "metrics"})),
    Pod("prod", "redis-0", {"tier": "back"}),
)


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (Selector(), True),
        (Selector(namespace="k8s.io"), True),
        (Selector(namespace="k8s.*"), True),
        (Selector(namespace="default"), False),
        (Selector(container="web-?"), True),
        (Selector(container="web"), False),  # the whole name
        (Selector(container="WEB-1"), False),
        (Selector(namespace="default", container="web-1"), False),
        (Selector(labels=(("app", "web"), ("tier", "front"))), True),
        (Selector(labels=(("app", "web"), ("tier", "back"))), False),
        (Selector(labels=(("app", "w*"),)), False),  # labels are no globs
        (Selector(labels=(("zone", ""),)), False),  # a label that is not there is not an empty one
    ],
)
def test_a_selector_matches_where_every_condition_holds(selector: Selector, expected: bool) -> None:
    assert selector.matches(WEB) is expected


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (Selector(container="redis"), True),
        (Selector(container="91*"), True),
        (Selector(container="5efb"), False),  # the sandbox is none of the pod's containers
        (Selector(container="redis-0"), False),  # nor is the pod
        (Selector(container="redis", labels=(("app", "metrics"),)), False),  # not both of the same container
        (Selector(labels=(("tier", "back"),)), False),  # the pod's labels are asked for as the pod's
        (Selector(pod=PodSelector(namespace="pr*", name="redis-?", labels=(("tier", "back"),))), True),
        (Selector(pod=PodSelector(namespace="test")), False),
        (Selector(pod=PodSelector(name="redis")), False),
        (Selector(pod=PodSelector(labels=(("tier", "front"),))), False),
        (Selector(pod=PodSelector(namespace="prod"), container="exporter"), True),
        (Selector(pod=PodSelector(namespace="prod"), container="sidecar"), False),
        (Selector(pod=PodSelector(namespace="prod"), labels=(("app", "redis"),)), True),
        (Selector(pod=PodSelector(namespace="prod"), namespace="default"), False),
    ],
)
def test_a_pod_matches_by_itself_and_by_each_of_its_containers(selector: Selector, expected: bool) -> None:
    assert selector.matches(POD) is expected


def test_a_pod_selector_does_not_match_what_is_no_pod() -> None:
    assert not Selector(pod=PodSelector(name="*")).matches(WEB)


def test_a_pod_selector_matches_a_pod_in_which_nothing_runs_yet() -> None:
    empty = Container(ContainerKey("k8s.io", "5efb"), 1, 1, (), Pod("prod", "redis-0"))
    assert Selector(pod=PodSelector(namespace="prod")).matches(empty)
    assert not Selector(container="*").matches(empty)


def test_a_pod_selector_prints_its_conditions() -> None:
    pod = PodSelector("prod", "redis-*", (("app", "redis"),))
    assert str(Selector(pod=pod, container="redis")) == (
        "pod (namespace=prod, name=redis-*, label app=redis), container=redis"
    )


def test_a_selector_prints_its_conditions() -> None:
    selector = Selector(namespace="default", container="web-*", labels=(("app", "web"),))
    assert str(selector) == "namespace=default, container=web-*, label app=web"


@given(st.sampled_from(State))
def test_states_print_as_their_word(state: State) -> None:
    assert f"{state}" == state.value


PRINTED: list[tuple[Callable[[], object], str]] = [
    (lambda: ContainerKey("default", "web"), "default/web"),
    (lambda: PortRange(80, 80), "80"),
    (lambda: PortRange(80, 81), "80-81"),
    (lambda: parse("[::1]::80"), "[::1]::80/tcp"),
]


@pytest.mark.parametrize(("make", "text"), PRINTED)
def test_values_print_as_people_write_them(make: Callable[[], object], text: str) -> None:
    assert str(make()) == text
