"""The matrix without its packets: that the selection has every pair, and what becomes of what was seen."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from tests.matrix.report import PAGE, condensed, table, written
from tests.matrix.rows import KNOWN, ROWS, Seen
from tests.matrix.settings import (
    FAMILIES,
    PROTOCOLS,
    Family,
    Protocol,
    Setting,
    Site,
    pairs,
    pairwise,
    product,
)

#: What is tried where the kernel has all protocols, where it has no SCTP, and of one family alone.
TRIED = [(PROTOCOLS, FAMILIES), (("tcp", "udp"), FAMILIES), (("tcp", "udp"), ("IPv6",))]


@pytest.mark.parametrize(("protocols", "families"), TRIED)
def test_the_selection_has_every_pair_of_values(protocols: tuple[Protocol, ...], families: tuple[Family, ...]) -> None:
    everything = product(protocols, families)
    dimensions = [
        sorted({getattr(setting, name) for setting in everything}, key=str)
        for name in ("protocol", "family", "bridge_nf", "forward_policy", "network", "backend")
    ]
    assert len(everything) == len({*itertools.product(*dimensions)})
    selected = pairwise(protocols, families)
    for one, other in itertools.combinations(range(6), 2):
        found = {(_values(setting)[one], _values(setting)[other]) for setting in selected}
        assert found == {*itertools.product(dimensions[one], dimensions[other])}
    assert len(selected) <= 18
    assert set(selected) <= set(everything)


def test_the_selection_is_the_same_each_time_and_sctp_only_adds_to_it() -> None:
    assert pairwise() == pairwise()
    assert set(pairwise(("tcp", "udp"))) == {setting for setting in pairwise() if setting.protocol != "sctp"}


def test_settings_of_one_site_stand_together() -> None:
    for settings in (product(), pairwise()):
        sites = [site for site, _ in itertools.groupby(settings, lambda setting: setting.site)]
        assert len(sites) == len(set(sites))


def _values(setting: Setting) -> list[object]:
    return [setting.protocol, setting.family, *_site(setting.site)]


def _site(site: Site) -> list[object]:
    return [site.bridge_nf, site.forward_policy, site.network, site.backend]


def test_a_setting_has_fifteen_pairs() -> None:
    assert len(pairs(product()[0])) == 15


def test_each_row_is_asked_somewhere_and_expects_something_there() -> None:
    assert len({row.name for row in ROWS}) == len({row.key for row in ROWS}) == len(ROWS)
    for row in ROWS:
        asked = [setting for setting in product() if row.left_out(setting) is None]
        assert asked
        assert all(row.expected(setting) for setting in asked)
        assert all(row.left_out(setting) for setting in product() if setting not in asked)


def test_what_is_known_to_fail_is_of_a_row_and_a_setting() -> None:
    for known in KNOWN:
        assert known.row in {row.name for row in ROWS}
        assert any(known.when(setting) for setting in product())


@pytest.mark.parametrize(
    ("see", "text"),
    [
        (lambda setting: Seen.OWN, "yes, with the client's own address"),
        (
            lambda setting: Seen.OWN if setting.forward_policy == "ACCEPT" else Seen.SILENT,
            "FORWARD ACCEPT: yes, with the client's own address; FORWARD DROP: no, no answer comes",
        ),
        (
            lambda setting: Seen.SILENT if setting.bridge_nf and setting.family == "IPv6" else Seen.REFUSED,
            "IPv4 and bridge-nf 0, IPv6 and bridge-nf 0, IPv4 and bridge-nf 1: no, refused at once; "
            "IPv6 and bridge-nf 1: no, no answer comes",
        ),
    ],
    ids=["all agree", "one dimension decides", "two decide"],
)
def test_what_all_settings_agree_on_is_said_once(see: Callable[[Setting], Seen], text: str) -> None:
    assert condensed({setting: see(setting) for setting in product()}) == text


def test_where_nothing_was_asked_nothing_is_said() -> None:
    assert condensed({}) == "—"


def test_the_table_has_a_line_for_each_row_and_says_what_is_lacking() -> None:
    seen = {
        (row, setting): Seen.OWN
        for setting in product(("tcp", "udp"), ("IPv4",))
        for row in ROWS
        if row.left_out(setting) is None
    }
    text = table(seen, ["the kernel has no sctp"])
    assert text == table(dict(seen), ["the kernel has no sctp"])
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[1:]] == [f"| {row.name}" for row in ROWS]
    assert "Not tried where this was made: the kernel has no sctp." in text


def test_the_table_takes_the_place_of_the_last_one() -> None:
    page = PAGE.read_text()
    once = written(page, "a table\n")
    assert "a table" in once
    assert written(once, "another\n") == written(page, "another\n")
    assert once.partition("<!--")[0] == page.partition("<!--")[0]
    with pytest.raises(ValueError, match="no place for the table"):
        written("# Another page", "a table\n")


def test_the_page_has_every_row_as_of_now() -> None:
    text = PAGE.read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[1:]] == [f"| {row.name}" for row in ROWS], "make matrix"
    tried = text.partition("every combination of:")[2].partition("|")[0]
    assert all(f" {family}" in tried for family in FAMILIES)
