"""The words in a rule's comment: what is written there is read back, and nothing else is taken for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrport import ports
from ctrport.model import ContainerKey, PortRange, Publication, State
from ctrport.owners import LocalnetRecord, Owner, owner_of
from tests.unit import strategies

WEB = ContainerKey("default", "web")


@st.composite
def owners(draw: st.DrawFn) -> Owner:
    """The owner of any publication: on the host ports it names, on those chosen out of a pool, or out of all."""
    mapping = draw(strategies.mappings())
    key = draw(strategies.container_keys)
    if not mapping.dynamic:
        return Owner(key, mapping, mapping)
    if mapping.host_ports is None:
        chosen = draw(strategies.port_ranges(len(mapping.container_ports)))
    else:
        first = draw(st.integers(mapping.host_ports.first, mapping.host_ports.last))
        chosen = PortRange(first, first)
    return Owner(key, mapping, replace(mapping, host_ports=chosen))


@given(owners())
def test_what_is_written_is_read_back(owner: Owner) -> None:
    assert Owner.parse(str(owner)) == owner
    assert LocalnetRecord.parse(str(owner)) is None


@given(owners(), owners())
def test_two_owners_are_two_texts(one: Owner, other: Owner) -> None:
    assert (str(one) == str(other)) is (one == other)


@given(st.text(max_size=40))
def test_whatever_is_read_would_be_written_so(text: str) -> None:
    owner = Owner.parse(text)
    assert owner is None or str(owner) == text


# Near misses: one character of an owner's text put elsewhere, doubled or lost.
@given(owners(), st.data())
def test_a_text_that_is_nearly_one_is_refused_or_another_owner(owner: Owner, data: st.DataObject) -> None:
    text = str(owner)
    at = data.draw(st.integers(0, len(text) - 1))
    mangled = (
        text[:at] + data.draw(st.sampled_from(["", text[at] * 2, " ", "/", ":", "-", "\n", "of"])) + text[at + 1 :]
    )
    read = Owner.parse(mangled)
    assert read is None or str(read) == mangled


@pytest.mark.parametrize(
    ("mapping", "bound", "text"),
    [
        ("8080:80", "8080:80", "default/web 8080:80/tcp"),
        ("127.0.0.1:53:53/udp", "127.0.0.1:53:53/udp", "default/web 127.0.0.1:53:53/udp"),
        ("[2001:db8::1]:8000-8001:80-81/sctp", None, "default/web [2001:db8::1]:8000-8001:80-81/sctp"),
        ("80", "32768:80", "default/web 32768:80/tcp of any"),
        ("80-81", "32768-32769:80-81", "default/web 32768-32769:80-81/tcp of any"),
        ("[::]::80", "[::]:32768:80", "default/web [::]:32768:80/tcp of any"),
        ("8000-8010:80", "8003:80", "default/web 8003:80/tcp of 8000-8010"),
    ],
)
def test_an_owner_says_what_it_has_and_out_of_what_it_was_chosen(mapping: str, bound: str | None, text: str) -> None:
    its, has = ports.parse(mapping), ports.parse(bound or mapping)
    publication = Publication(its, "config.yaml:1", WEB, State.ACTIVE, bound=has)
    assert owner_of(publication) == text
    assert Owner.parse(text) == Owner(WEB, its, has) == Owner.of(publication)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "chain",
        "jump",
        "localhost guard",
        "device docker0",
        "device docker0 route_localnet=set",
        "node 192.0.2.1",
        "default/web",
        "default/web ",
        "default/web 80",  # whose host port is to be chosen has no rule
        "default/web 80/tcp of any",
        "default/web 8000-8010:80/tcp",
        "default/web 8000-8010:80/tcp of any",
        "default/web 8003:80/tcp of 8000-8010/nonsense",
        "default/web 8003:80/tcp of none",
        "default/web 8003:80/icmp",
        "default/web 0:80",
        "default/-web 8080:80/tcp",
        "default/web/more 8080:80/tcp",
        "web 8080:80/tcp",
        "/web 8080:80/tcp",
        "default/ 8080:80/tcp",
        f"default/{'a' * 77} 8080:80/tcp",
        'default/web 8080:80/tcp" -j ACCEPT',
        " default/web 8080:80/tcp",
        # Nearly what we write:
        "default/web 8003:80/tcp of 8000-8010/udp",
        "default/web 8003:80/tcp of 8000-8010:80",
        "default/web 8003:80/tcp of 9000-9010",
        "default/web 8003:80/tcp of 8003",
        "default/web 8003:80/tcp of ",
        "default/web 8080:80",
        "default/web 8080:80/TCP",
        "default/web  8080:80/tcp",
        "default/web 8080:80/tcp ",
    ],
)
def test_what_is_none_is_refused(text: str) -> None:
    assert Owner.parse(text) is None


@given(st.from_regex(r"[A-Za-z0-9_.:@-]{1,15}", fullmatch=True), st.booleans())
def test_a_record_of_route_localnet_is_read_back(device: str, ours: bool) -> None:
    record = LocalnetRecord(device, ours)
    assert LocalnetRecord.parse(record.owner) == record
    assert Owner.parse(record.owner) is None
