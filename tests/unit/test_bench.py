"""What becomes of figures: verdicts, a table, a page and pictures."""

from __future__ import annotations

from xml.etree import ElementTree

from bench import rows
from bench.plots import plots
from bench.rows import DOCKERD, IPTABLES, NFTABLES, PORTMAP, Figures, missed, verdicts
from bench.table import conclusion, page, shown, table


def measured(**of: float) -> Figures:
    figures = Figures()
    names = {"iptables": IPTABLES, "nftables": NFTABLES, "portmap": PORTMAP, "dockerd": DOCKERD}
    for name, figure in of.items():
        for off in (-0.1, 0, 0.1):
            figures.add(rows.ONE, names[name], figure + off)
    return figures


def test_a_target_is_a_ratio_of_medians_and_held_up_to_its_limit() -> None:
    found = verdicts(measured(iptables=10.0, portmap=50.0, dockerd=19.0))
    assert [verdict.held for verdict in found] == [True, False]
    assert str(found[0]) == "held: one port with iptables-nft, of portmap's time: 1/5 (at most 1/5)"
    assert str(found[1]) == "MISSED: one port with iptables-nft, of dockerd's: 1/1.9 (at most 1/2)"
    assert conclusion(found).splitlines()[-1] == "1 of 2 targets missed"
    assert missed(found) == found[1:]


def test_who_was_not_measured_has_no_verdict() -> None:
    assert verdicts(measured(nftables=1.0)) == []


def test_connections_are_compared_turn_by_turn() -> None:
    figures = Figures()
    for first, last in ((1000.0, 990.0), (2000.0, 1980.0), (3000.0, 1000.0)):  # from turn to turn the machine changes
        figures.add(rows.connections(10_000, "first"), NFTABLES, first)
        figures.add(rows.connections(10_000, "last"), NFTABLES, last)
    [verdict] = verdicts(figures)
    assert verdict.held
    assert round(verdict.ratio, 3) == 1.010


def test_a_row_says_where_a_peer_wins() -> None:
    lines = table(measured(nftables=5.0, dockerd=4.0)).splitlines()
    assert lines[1].split() == ["one", "port:", "event", "to", "commit", "[ms]", "5.00", "4.00", "dockerd", "wins"]
    figures = Figures()
    for name, figure in ((NFTABLES, 5.0), (DOCKERD, 4.0)):
        figures.add(rows.connections(1, "first"), name, figure)
    assert "wins" not in table(figures)  # more is better


def test_a_page_has_all_of_it() -> None:
    figures = measured(iptables=10.0, nftables=2.0, portmap=50.0, dockerd=20.0)
    drawn = plots(figures)
    said = page(figures, "Linux 6.1", verdicts(figures), list(drawn))
    assert "| one port: event to commit [ms] | 10.0 | 2.00 | 50.0 | 20.0 |  |" in said
    assert "![Ports published](pictures/publish.svg)" in said
    assert "- held: one port with nftables, of portmap's time: 1/25 (at most 1/10)" in said


def test_a_picture_has_a_bar_for_each_who_was_measured() -> None:
    picture = plots(measured(iptables=10.0, nftables=2.0, portmap=500.0))["publish"]
    bars = [each.text for each in ElementTree.fromstring(picture).iter() if each.tag.endswith("title")]
    assert bars == [f"{NFTABLES}: 2.00 ms", f"{IPTABLES}: 10.0 ms", f"{PORTMAP}: 500 ms"]


def test_a_figure_has_the_digits_that_it_is_worth() -> None:
    assert [shown(figure) for figure in (None, 0.123, 12.34, 1234.5)] == ["-", "0.12", "12.3", "1,234"]
