"""What strangers may put in the way of a packet: it is walked to an end, and nothing of theirs reaches a terminal."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrport import terminal
from ctrport.explain.answer import Explanation
from ctrport.explain.facts import Next
from ctrport.explain.fate import Cause, Outcome
from ctrport.explain.inside import routes, routes6
from ctrport.explain.snapshot import served_by_ipvs
from ctrport.explain.steps import Step
from ctrport.explain.tables import _NAME
from ctrport.model import Protocol
from tests.unit import hostile
from tests.unit.hostile import fuzz
from tests.unit.ways import CLIENT, NODE, OURS, SIBLING, WEB, World

_MATCHES = st.sampled_from(
    [
        *("-s 198.51.100.0/24", "! -d 172.17.0.0/16", "-i eth0", "-o docker0", "-p tcp -m tcp --dport 8080", "-p udp"),
        *("-m conntrack --ctstate NEW", "-m mark --mark 0x1", "-m set --match-set x src", "-m limit --limit 1/sec"),
        *("-m addrtype --dst-type LOCAL", "-m statistic --mode random --probability 0.5", "-f", "-m nosuch --x y", ""),
    ]
)
_TARGETS = st.sampled_from(
    [
        *(
            "ACCEPT",
            "DROP",
            "REJECT",
            "RETURN",
            "a",
            "b",
            "MARK --set-xmark 0x1/0x1",
            "CONNMARK --restore-mark",
            "QUEUE",
        ),
        *("LOG --log-prefix x", "NFQUEUE", "CT --notrack", f"DNAT --to-destination {SIBLING}:80", "MASQUERADE"),
        *(f"DNAT --to-destination {WEB}-{SIBLING}:1-9", "REDIRECT --to-ports 80", f"SNAT --to-source {NODE}", ""),
    ]
)
_CHAINS = {
    "raw": ("PREROUTING", "OUTPUT"),
    "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
}


@st.composite
def everything(draw: st.DrawFn) -> str:
    """Return tables that nobody would write."""
    lines = []
    for table, chains in _CHAINS.items():
        lines += [f"*{table}", *(f":{chain} {draw(st.sampled_from(['ACCEPT', 'DROP']))} [0:0]" for chain in chains)]
        lines += [":a - [0:0]", ":b - [0:0]"]
        for chain in (*chains, "a", "b"):
            for _ in range(draw(st.integers(0, 2))):
                comment = json.dumps(draw(hostile.texts))
                how = draw(st.sampled_from(["-j", "-g"]))
                lines.append(f"-A {chain} {draw(_MATCHES)} -m comment --comment {comment} {how} {draw(_TARGETS)}")
        lines.append("COMMIT")
    return "\n".join(lines) + "\n"


@fuzz(150)
@given(everything(), st.sampled_from([None, CLIENT, NODE, "127.0.0.1", SIBLING, WEB]), st.booleans())
def test_every_packet_comes_to_an_end(text: str, source: str | None, listens: bool) -> None:
    world = World(text)
    world.inhabitants[WEB] = world.inhabitants[WEB] if listens else None
    said = world.explain("8080", source)
    assert said.sentence.startswith(("works: ", "does not work, because ", "cannot be told, because "))
    assert said.mend in said.sentence
    assert (said.outcome, said.cause) != ("works", Cause.UNTOLD.value)


@fuzz(100)
@given(hostile.texts, hostile.device_names)
def test_what_is_shown_of_a_packet_is_a_line_a_step(text: str, device: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        shown: list[str] = []
        patch.setattr("click.echo", lambda line, **_: shown.append(line))
        step = Step(f"filter {text}", text, device, "drop", text)
        terminal.way(Explanation(Outcome.FAILS, Cause.DROPPED, f"does not work, because {text}", text, (step, step)))
    assert len(shown) == 3
    for line in shown[:2]:
        assert line.count("\x1b") <= 2, line  # ours, around what the rule does
        assert line.replace("\x1b[31m", "").replace("\x1b[0m", "").isprintable(), line
    plain = shown[2].removeprefix("\x1b[31m").removesuffix("\x1b[0m")
    assert plain.isprintable()
    assert plain.startswith("does not work, because ")


@fuzz(50)
@given(hostile.texts)
def test_what_programs_get_is_json(text: str) -> None:
    step = Step(text, text, text, "", text)
    said = Explanation(Outcome.WORKS, Cause.CONTAINER, text, text, (step,)).to_json()
    assert said.isascii()
    loaded = json.loads(said)
    assert loaded["outcome"] == "works"
    assert loaded["steps"] == [{"where": text, "what": text, "whose": text, "does": "", "rule": text}]


@pytest.mark.parametrize(
    "name",
    [
        "x; flush ruleset",
        "x\nflush ruleset",
        "{",
        "-f",
        "--file",
        "",
        "a b",
        "x'",
        "$x",
        "@x",
        "1x",
        "x" * 300,
        "\u017fx",
    ],
)
def test_a_table_is_asked_for_by_nothing_but_a_name(name: str) -> None:
    assert _NAME.fullmatch(name) is None


@pytest.mark.parametrize("name", ["filter", "kube-proxy", "f2b-table", "docker_bridges", "a/b", "x.1"])
def test_the_names_that_tables_have_are_names(name: str) -> None:
    assert _NAME.fullmatch(name) is not None


def test_a_device_with_an_odd_name_is_named_and_no_more() -> None:
    world = World(OURS)
    device = "e\x1b[2Jth"
    world.facts = replace(
        world.facts,
        addresses=tuple((device if name == "eth0" else name, its) for name, its in world.facts.addresses),
        locals=tuple(replace(its, device=device if its.device == "eth0" else its.device) for its in world.facts.locals),
    )
    said = world.explain("8080", CLIENT)
    assert said.outcome == "works"
    assert any(device in step.what for step in said.steps)


pytestmark_little = pytest.mark.skipif(sys.byteorder != "little", reason="the samples are of a little-endian machine")

ROUTE = """\
Iface	Destination	Gateway 	Flags	RefCnt	Use	Metric	Mask		MTU	Window	IRTT
eth0	00000000	010011AC	0003	0	0	0	00000000	0	0	0
eth0	000011AC	00000000	0001	0	0	0	0000FFFF	0	0	0
*	0000000A	00000000	0200	0	0	0	000000FF	0	0	0
"""
ROUTE6 = """\
fd000017000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 fd000017000000000000000000000001 00000400 00000001 00000000 00000003     eth0
00000000000000000000000000000001 80 00000000000000000000000000000000 00 00000000000000000000000000000000 00000000 00000002 00000000 80200001       lo
ff000000000000000000000000000000 08 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000002 00000000 00000001     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo
"""  # noqa: E501 - as the kernel prints it


IP_VS = """\
IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A600050:0050 rr 
  -> AC110002:0050      Masq    1      0          0         
UDP  [2001:0db8:0051:0000:0000:0000:0000:0001]:7582 rr 
FWM  00000001 rr 
"""  # noqa: W291 - as the kernel prints it


def test_the_services_of_ipvs_are_read() -> None:
    assert list(served_by_ipvs(IP_VS)) == [(Protocol.TCP, 80), (Protocol.UDP, 30082)]
    assert list(served_by_ipvs("")) == []


@pytestmark_little
def test_the_routes_of_a_container_are_read() -> None:
    assert [str(route.network) for route in routes(ROUTE)] == ["0.0.0.0/0", "172.17.0.0/16"]
    assert [str(route.gateway) for route in routes(ROUTE)] == ["172.17.0.1", "None"]
    found = list(routes6(ROUTE6))
    assert [str(route.network) for route in found] == ["fd00:17::/64", "::/0"]
    assert [str(route.gateway) for route in found] == ["None", "fd00:17::1"]
    assert {route.device for route in found} == {"eth0"}


@fuzz(100)
@given(hostile.device_names)
def test_a_route_by_a_device_of_any_name_is_a_route(name: str) -> None:
    lines = ROUTE.replace("eth0", name)
    assert all(isinstance(route, Next) and route.device == name for route in routes(lines))
    assert all(route.device in (name, "lo") for route in routes6(ROUTE6.replace("eth0", name)))


def test_a_protocol_that_nobody_shows_is_not_judged() -> None:
    world = World()
    world.facts = replace(world.facts, keepers=((Protocol.UDP, "(pid 7)"),))
    assert world.explain("8080/sctp").outcome == "fails"
