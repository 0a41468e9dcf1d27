"""What a command makes of the ports of a container, and what it says where it makes nothing of them."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrport.amend import Elsewhere, Unusable, added, elsewhere, taken
from ctrport.amend import given as written
from ctrport.declared import Kind, Permission
from ctrport.model import Access, Container, Live, Mapping, Member, PortRange, Unread
from ctrport.ports import parse
from tests.unit import strategies
from tests.unit.worlds import ANYONE, declaration, key

RULE = Permission("f:1", frozenset(Kind), (PortRange(8000, 8999),))
LIMITED = Access((ip_network("192.0.2.0/24"),))


def live(*mappings: str) -> Live:
    return Live(tuple(map(parse, mappings)), "1")


def file(mapping: str, access: Access = ANYONE) -> Elsewhere:
    return Elsewhere(parse(mapping), access, "f:3", own=False)


def label(mapping: str) -> Elsewhere:
    return Elsewhere(parse(mapping), Access(), "label ctrport/ports", own=True)


def why_not(name: str, *arguments: object) -> str:
    with pytest.raises(Unusable) as caught:
        {"added": added, "taken": taken}[name]("default/web", *arguments)  # type: ignore[operator]
    return str(caught.value)


def test_what_is_declared_in_other_ways_is_found_with_where() -> None:
    container = Container(key("web"), 1, 1, (Member("web", None, {"ctrport/ports": "8080:80,80:80,x"}),))
    entries = [declaration("web", "9090:90", "9091:91"), declaration("db", "9092:92", line=2)]
    assert elsewhere(container, entries, [RULE]) == [
        Elsewhere(parse("9090:90"), Access(), "config.yaml:1", own=False),
        Elsewhere(parse("9091:91"), Access(), "config.yaml:1", own=False),
        Elsewhere(parse("8080:80"), Access(), "label ctrport/ports", own=True),
        Elsewhere(parse("80:80"), Access(), "label ctrport/ports", own=True),
    ]


def test_what_is_written_is_taken_once_each() -> None:
    assert written(["8080:80", "8080:80/tcp", "80"]) == (parse("8080:80"), parse("80"))
    for specs, said in (
        (["8080:80", "8080"], None),
        (
            ["8080:80", "0.0.0.0:8080:81"],
            "8080:80/tcp and 0.0.0.0:8080:81/tcp claim the same host port; expected each once",
        ),
        (["0:80"], "'0:80' has the host port '0'; expected a number from 1 to 65535"),
        (["\x1b[2J"], "'\\x1b[2J' has the container port"),
    ):
        if said is None:
            assert len(written(specs)) == 2
        else:
            with pytest.raises(Unusable) as caught:
                written(specs)
            assert str(caught.value).startswith(said)


def test_what_is_given_comes_to_what_is_there() -> None:
    new = written(["8081:81", "8080:80"])
    assert added("default/web", None, new, []) == new
    assert added("default/web", live("8080:80", "53:53/udp"), new, []) == (
        *map(parse, ("8080:80", "53:53/udp", "8081:81")),
    )


def test_what_another_declaration_of_the_same_container_has_is_not_given() -> None:
    new = [parse("8080:80")]
    assert why_not("added", live("8000-8090:8000-8090"), new, []) == (
        "8080:80/tcp claims a host port that default/web was given as 8000-8090:8000-8090/tcp already; "
        "to take that back: ctrport unpublish default/web 8000-8090:8000-8090/tcp"
    )
    said = "8080:80/tcp claims a host port that f:3 declares for default/web, as {}"
    assert why_not("added", None, new, [file("8080:81")]) == said.format("8080:81/tcp")
    assert why_not("added", None, new, [file("8080:80", LIMITED)]) == said.format("8080:80/tcp")


@pytest.mark.parametrize("other", [file("8080:80"), file("8081:80"), file("80"), file("8080:80/udp"), label("8080:81")])
def test_the_same_of_the_file_and_what_it_declares_itself_keep_nothing_out(other: Elsewhere) -> None:
    assert added("default/web", None, [parse("8080:80")], [other]) == (parse("8080:80"),)


HAS = live("8080:80", "53:53/udp", "80", "127.0.0.1:9090:90", "9000-9002:90-92", "7000:70", "127.0.0.2:7000:70")


@pytest.mark.parametrize(
    ("spec", "mapping"),
    [
        ("8080:80", "8080:80"),
        ("8080", "8080:80"),
        ("8080/tcp", "8080:80"),
        ("53/udp", "53:53/udp"),
        ("53:53/udp", "53:53/udp"),
        ("80", "80"),
        ("80/tcp", "80"),
        ("32768", "80"),
        ("32768:80/tcp", "80"),
        ("9090", "127.0.0.1:9090:90"),
        ("127.0.0.1:9090:90", "127.0.0.1:9090:90"),
        ("9000-9002", "9000-9002:90-92"),
        ("7000:70", "7000:70"),
        ("127.0.0.2:7000:70", "127.0.0.2:7000:70"),
    ],
)
def test_a_mapping_is_meant_by_itself_or_by_its_host_port(spec: str, mapping: str) -> None:
    bound = {parse("80"): parse("32768:80")}
    assert taken("default/web", HAS, [spec, spec], bound, [file("8080:80")]) == (parse(mapping),)


@pytest.mark.parametrize(
    ("spec", "others", "said"),
    [
        ("7000", [], "'7000' may be 7000:70/tcp or 127.0.0.2:7000:70/tcp; expected the whole of one"),
        (
            "x",
            [],
            "'x' has the container port 'x'; expected a number from 1 to 65535 in plain digits, no leading zeros",
        ),
        (
            "6000",
            [file("6000:60")],
            "6000:60/tcp of default/web is declared elsewhere (f:3), and stays: it is changed there",
        ),
        (
            "6000:60",
            [label("6000:60")],
            "6000:60/tcp of default/web is declared elsewhere (label ctrport/ports), and stays: it is changed there",
        ),
        (
            "9001",
            [file("6000:60")],
            "'9001' is nothing that `ctrport publish` gave default/web, which is 8080:80/tcp, ",
        ),
        ("8080:81", [], "'8080:81' is nothing that `ctrport publish` gave default/web, which is 8080:80/tcp, "),
        ("53", [], "'53' is nothing that `ctrport publish` gave default/web, which is 8080:80/tcp, 53:53/udp, "),
    ],
)
def test_what_means_none_or_several_is_said_and_takes_nothing(spec: str, others: list[Elsewhere], said: str) -> None:
    assert why_not("taken", HAS, ["8080", spec], {}, others).startswith(said)


def test_where_two_forms_meet_the_whole_one_is_exact() -> None:
    has = live("80", "80:8000")
    assert why_not("taken", has, ["80"], {}, []) == "'80' may be 80/tcp or 80:8000/tcp; expected the whole of one"
    assert taken("default/web", has, ["80/tcp"], {}, []) == (parse("80"),)
    assert why_not("taken", None, ["80"], {}, []).endswith("gave default/web, which is nothing")


def test_what_cannot_be_read_is_not_changed_in_part() -> None:
    broken = replace(live("8080:80"), unread=((Unread("'x'"), "'x' is none"),))
    said = (
        "what default/web was given cannot be read, and so not be changed: 'x' is none; "
        "to take all of it back: ctrport unpublish default/web"
    )
    assert why_not("added", broken, [parse("8081:80")], []) == said
    assert why_not("taken", broken, ["8080"], {}, []) == said


@given(st.lists(strategies.mappings(), max_size=6, unique=True))
def test_what_was_given_is_taken_by_its_own_text(mappings: list[Mapping]) -> None:
    given_ = Live(tuple(mappings), "1")
    assert taken("default/web", given_, [*map(str, mappings)], {}, []) == tuple(mappings)
