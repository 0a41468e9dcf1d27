"""What containerd stores of what the operator had a container publish: as it was written, and as anybody left it."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ctrport.declared import LONGEST, MOST
from ctrport.model import Live, Mapping
from ctrport.ports import parse
from ctrport.stored import TYPE, live_of, value_of
from tests.unit import strategies


@given(st.lists(strategies.mappings(), max_size=20, unique=True), st.text("0123456789abcdef", min_size=1, max_size=32))
def test_what_was_written_is_read(mappings: list[Mapping], revision: str) -> None:
    assert live_of(TYPE, value_of(mappings, revision)) == Live(tuple(mappings), revision)


def test_an_extension_that_was_emptied_is_none() -> None:
    assert live_of("", b"") is None
    assert live_of(TYPE, value_of([], "1f")) == Live((), "1f")


def content(ports: object, revision: object = "1f") -> bytes:
    return json.dumps({"ports": ports, "revision": revision}).encode()


@pytest.mark.parametrize(
    ("kind", "value", "why"),
    [
        ("", content([]), f"it is of the type ''; expected {TYPE}"),
        ("x\x1b[2J", b"", f"it is of the type 'x\\x1b[2J'; expected {TYPE}"),
        (TYPE, b"", "it is no JSON with ports and revision"),
        (TYPE, b"\xff\xfe", "it is no JSON with ports and revision"),
        (TYPE, b"[" * LONGEST, "it is no JSON with ports and revision"),
        (TYPE, b"[]", "it is no JSON with ports and revision"),
        (TYPE, b'"ports"', "it is no JSON with ports and revision"),
        (TYPE, b'{"ports": []}', "it is no JSON with ports and revision"),
        (TYPE, content("8080:80"), "its ports are no list of mappings"),
        (TYPE, content([8080]), "its ports are no list of mappings"),
        (TYPE, content([], 1), "its revision is none"),
        (TYPE, content([], "1f\n"), "its revision is none"),
        (TYPE, content([], ""), "its revision is none"),
        (TYPE, content(["1"] * (MOST + 1)), f"it has {MOST + 1} mappings; expected at most {MOST}"),
        (TYPE, content(["1" * LONGEST]), f"it has {LONGEST + 33} bytes; expected at most {LONGEST}"),
    ],
)
def test_an_extension_that_is_none_of_ours_says_why(kind: str, value: bytes, why: str) -> None:
    live = live_of(kind, value)
    assert live is not None
    [(_, fault)] = live.unread
    assert fault == f"the extension ctrport/ports is not as ctrport writes it: {why}"
    assert (live.mappings, live.revision) == ((), "")


def test_a_mapping_that_is_none_costs_the_others_nothing() -> None:
    live = live_of(TYPE, content(["8080:80", "x\x1b[2J", "8080:80/tcp", "53:53/udp"]))
    assert live is not None
    assert live.mappings == (parse("8080:80"), parse("53:53/udp"))
    [(unread, fault)] = live.unread
    assert str(unread) == "'x\\x1b[2J'"
    assert "has the container port" in fault


@settings(deadline=None)
@given(
    st.sampled_from(["", TYPE, "text/plain"]) | st.text(max_size=20),
    st.binary(max_size=200)
    | st.text(max_size=100).map(str.encode)
    | st.builds(
        content,
        st.lists(st.text(max_size=30) | st.text("0123456789:-./[]tcpud", max_size=20) | st.integers(), max_size=5),
        st.text(max_size=40) | st.none() | st.floats(),
    ),
)
@example(TYPE, content(["[::1]:1:1"], "0"))
@example(TYPE, b'{"ports": [], "revision": "' + b"\xed\xa0\x80" + b'"}')
def test_whatever_is_there_is_answered_in_short_printable_sentences(kind: str, value: bytes) -> None:
    live = live_of(kind, value)
    if live is None:
        assert (kind, value) == ("", b"")
        return
    assert live.revision.isalnum() or live.revision == ""
    for unread, fault in live.unread:
        assert str(unread).isprintable()
        assert fault.isprintable()
        assert len(str(unread)) < 100
        assert len(fault) < 400
    if not live.unread:
        assert live_of(TYPE, value_of(live.mappings, live.revision)) == live


@pytest.mark.parametrize(
    ("mappings", "why"),
    [
        ([parse(f"{port}:80") for port in range(1, MOST + 2)], f"it has {MOST + 1} mappings"),
        (
            [
                parse(f"[2001:db8:1111:2222:3333:4444:5555:6666]:{p}-{p + 1}:{p}-{p + 1}/sctp")
                for p in range(9999, 10060)
            ],
            "bytes; expected at most",
        ),
    ],
)
def test_no_more_is_written_than_is_read(mappings: list[Mapping], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        value_of(mappings, "1f")
