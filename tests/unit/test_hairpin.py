"""When the hairpin mode is needed, as far as no device has to be there for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctrport import hairpin
from ctrport.model import Family


def switches(monkeypatch: pytest.MonkeyPatch, directory: Path, **texts: str) -> None:
    """Have the kernel's switches say that; a family that is not given has none."""
    for name, text in texts.items():
        (directory / name).write_text(text)
    monkeypatch.setattr(hairpin, "_SWITCHES", {family: directory / family.name for family in Family})


class Unasked:
    """Stands where netlink would be asked."""

    def __init__(self) -> None:
        raise AssertionError("netlink was asked")


def test_it_is_needed_where_the_familys_tables_are_asked_of_every_bridge(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    switches(monkeypatch, tmp_path, IPV4="0\n", IPV6="1\n")
    assert hairpin.is_needed("no-such-bridge", Family.IPV6)
    assert not hairpin.is_needed("no-such-bridge", Family.IPV4)


@pytest.mark.parametrize("family", Family)
def test_without_br_netfilter_no_bridge_needs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: Family
) -> None:
    switches(monkeypatch, tmp_path)
    monkeypatch.setattr(hairpin, "Netlink", Unasked)
    assert not hairpin.is_needed("docker0", family)


def test_a_port_that_is_gone_is_no_error() -> None:
    assert not hairpin.is_on("no-such-port")
    assert not hairpin.switch("no-such-port", True)


def test_many_ports_are_asked_for_at_once_and_few_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class All:
        def hairpins(self) -> set[str]:
            asked.append("all")
            return {"v1", "another"}

        def close(self) -> None:
            pass

    def is_on(port: str) -> bool:
        asked.append(port)
        return port == "v1"

    monkeypatch.setattr(hairpin, "Netlink", All)
    monkeypatch.setattr(hairpin, "is_on", is_on)
    few, many = [[f"v{number}" for number in range(count)] for count in (hairpin.MANY - 1, hairpin.MANY)]
    assert hairpin.lacking(few) == [port for port in few if port != "v1"]
    assert asked == few
    asked.clear()
    assert hairpin.lacking(many) == [port for port in many if port != "v1"]
    assert asked == ["all"]
