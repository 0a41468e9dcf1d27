"""Which ports may be chosen at random, from what sysctl says."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrport.ephemeral import DEFAULT_RANDOM_PORTS, parse_port_range, parse_reserved, random_ports, without
from ctrport.model import PortRange
from tests.unit.strategies import port_ranges


def test_the_range_as_the_kernel_prints_it() -> None:
    assert parse_port_range("32768\t60999\n") == PortRange(32768, 60999)


@pytest.mark.parametrize("text", ["", "32768", "60999 32768", "0 5", "a b"])
def test_no_range(text: str) -> None:
    with pytest.raises(ValueError):
        parse_port_range(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n", []),
        ("8080\n", [PortRange(8080, 8080)]),
        ("8080,9148-9150\n", [PortRange(8080, 8080), PortRange(9148, 9150)]),
    ],
)
def test_reserved_ports(text: str, expected: list[PortRange]) -> None:
    assert parse_reserved(text) == expected


@pytest.mark.parametrize(
    ("taken", "expected"),
    [
        ([], [(10, 20)]),
        ([(15, 15)], [(10, 14), (16, 20)]),
        ([(18, 30), (1, 11)], [(12, 17)]),
        ([(10, 20)], []),
        ([(12, 18), (14, 15)], [(10, 11), (19, 20)]),
        ([(21, 30)], [(10, 20)]),
    ],
)
def test_without(taken: list[tuple[int, int]], expected: list[tuple[int, int]]) -> None:
    left = without(PortRange(10, 20), [PortRange(*one) for one in taken])
    assert [(one.first, one.last) for one in left] == expected


@given(port_ranges(), st.lists(port_ranges(), max_size=5))
def test_what_is_left_are_the_ports_not_taken(ports: PortRange, taken: list[PortRange]) -> None:
    left = list(without(ports, taken))
    assert left == sorted(left)
    assert [port for one in left for port in one] == sorted(set(ports).difference(*taken))


def test_what_the_kernel_says(tmp_path: Path) -> None:
    (tmp_path / "ip_local_port_range").write_text("100\t200\n")
    (tmp_path / "ip_local_reserved_ports").write_text("150\n")
    assert random_ports(tmp_path) == (PortRange(100, 149), PortRange(151, 200))


def test_where_the_kernel_does_not_say_it_is_as_with_docker(tmp_path: Path) -> None:
    assert random_ports(tmp_path) == (DEFAULT_RANDOM_PORTS,) == (PortRange(49153, 65535),)
