"""The packet table with real packets, in settings that have each pair of values once: `make matrix` tries all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
from _pytest.mark import ParameterSet

from tests.matrix.rows import ROWS, Row, known
from tests.matrix.settings import PROTOCOLS, Protocol, Setting, Site, lacking, pairwise
from tests.matrix.street import Street, World, street

SELECTED = tuple(setting for setting in pairwise() if lacking(setting.protocol) is None)


@pytest.fixture(scope="module")
def at() -> Iterator[Callable[[Site], Street]]:
    """The street of a site, built when the first asks for it, and gone when the first asks for another."""
    streets: list[Street] = []
    with contextlib.ExitStack() as standing:

        def at(site: Site) -> Street:
            if not streets or streets[-1].site != site:
                standing.close()
                keys = tuple((setting.family, setting.protocol) for setting in SELECTED if setting.site == site)
                streets.append(standing.enter_context(street(site, keys)))
            return streets[-1]

        yield at


def cases() -> Iterator[ParameterSet]:
    for setting in SELECTED:
        for row in ROWS:
            failing = known(row, setting)
            marks = [] if failing is None else [pytest.mark.xfail(reason=failing.why, raises=AssertionError)]
            if row.left_out(setting) is None:
                yield pytest.param(setting, row, id=f"{setting}: {row.key}", marks=marks)


@pytest.mark.parametrize(("setting", "row"), list(cases()))
def test_the_packet_table(at: Callable[[Site], Street], setting: Setting, row: Row) -> None:
    assert row.probe(World(at(setting.site), setting)) in row.expected(setting)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_each_protocol_is_among_them(protocol: Protocol) -> None:
    lack = lacking(protocol)
    if lack is not None:
        pytest.skip(lack)
    assert any(setting.protocol == protocol for setting in SELECTED)
