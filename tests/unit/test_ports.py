from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ctrport import ports
from ctrport.model import Mapping, PortRange, Protocol
from ctrport.ports import PortSpecError, quoted
from tests.unit import strategies

LOCALHOST = IPv4Address("127.0.0.1")
IPV6_LOCALHOST = IPv6Address("::1")
PORT_80 = PortRange(80, 80)
PORT_8080 = PortRange(8080, 8080)
TCP, UDP, SCTP = Protocol.TCP, Protocol.UDP, Protocol.SCTP

GOOD = {
    "80": Mapping(None, None, PORT_80, TCP),
    "80/udp": Mapping(None, None, PORT_80, UDP),
    "9000-9010": Mapping(None, None, PortRange(9000, 9010), TCP),
    "8080:80": Mapping(None, PORT_8080, PORT_80, TCP),
    "8080:80/tcp": Mapping(None, PORT_8080, PORT_80, TCP),
    "8080:80/UDP": Mapping(None, PORT_8080, PORT_80, UDP),
    "8080:80/Sctp": Mapping(None, PORT_8080, PORT_80, SCTP),
    "8000-8010:9000-9010": Mapping(None, PortRange(8000, 8010), PortRange(9000, 9010), TCP),
    "8000-8010:80": Mapping(None, PortRange(8000, 8010), PORT_80, TCP),
    "8080-8080:80-80": Mapping(None, PORT_8080, PORT_80, TCP),
    "127.0.0.1:8080:80": Mapping(LOCALHOST, PORT_8080, PORT_80, TCP),
    "127.0.0.1::80": Mapping(LOCALHOST, None, PORT_80, TCP),
    "127.0.0.1::8000-8001/udp": Mapping(LOCALHOST, None, PortRange(8000, 8001), UDP),
    "0.0.0.0:8080:80": Mapping(IPv4Address("0.0.0.0"), PORT_8080, PORT_80, TCP),
    "[::1]:8080:80": Mapping(IPV6_LOCALHOST, PORT_8080, PORT_80, TCP),
    "[::1]::80": Mapping(IPV6_LOCALHOST, None, PORT_80, TCP),
    "[0:0:0:0:0:0:0:1]:8080:80": Mapping(IPV6_LOCALHOST, PORT_8080, PORT_80, TCP),
    "[::]:8080:80": Mapping(IPv6Address("::"), PORT_8080, PORT_80, TCP),
    "[64:ff9b::192.0.2.1]:8080:80": Mapping(IPv6Address("64:ff9b::c000:201"), PORT_8080, PORT_80, TCP),
    "1:65535": Mapping(None, PortRange(1, 1), PortRange(65535, 65535), TCP),
}

A_PORT = "expected a number from 1 to 65535"
PLAIN = f"{A_PORT} in plain digits, no leading zeros"
AN_ADDRESS = "expected an IPv4 address or an IPv6 address in brackets"
GRAMMAR = "expected [hostIP:][hostPort[-end]:]containerPort[-end][/protocol]"

BAD = {
    "": f"the port mapping is empty; {GRAMMAR}, such as 8080:80",
    # Ports
    "0": f"'0' has the container port '0'; {A_PORT}",
    "0:80": f"'0:80' has the host port '0'; {A_PORT}",
    "65536:80": f"'65536:80' has the host port '65536'; {A_PORT}",
    "80:100000": f"'80:100000' has the container port '100000'; {A_PORT}",
    "080": f"'080' has the container port '080'; {PLAIN}",
    "00": f"'00' has the container port '00'; {PLAIN}",
    "+80": f"'+80' has the container port '+80'; {PLAIN}",
    " 80": f"' 80' has the container port ' 80'; {PLAIN}",
    "80\n": f"'80\\n' has the container port '80\\n'; {PLAIN}",
    "8080: 80": f"'8080: 80' has the container port ' 80'; {PLAIN}",
    "8_0": f"'8_0' has the container port '8_0'; {PLAIN}",
    "\u0668\u0660": f"'\u0668\u0660' has the container port '\u0668\u0660'; {PLAIN}",
    "\uff18\uff10:80": f"'\uff18\uff10:80' has the host port '\uff18\uff10'; {PLAIN}",
    "8\u00b2": f"'8\u00b2' has the container port '8\u00b2'; {PLAIN}",
    "http": f"'http' has the container port 'http'; {PLAIN}",
    "web:80": f"'web:80' has the host port 'web'; {PLAIN}",
    "127.0.0.1": f"'127.0.0.1' has the container port '127.0.0.1'; {PLAIN}",
    # Ranges
    "1-": f"'1-' has a container port range with an open end; {A_PORT} at both ends",
    "-1:80": f"'-1:80' has a host port range with an open end; {A_PORT} at both ends",
    "-": f"'-' has a container port range with an open end; {A_PORT} at both ends",
    "1-0": f"'1-0' has the container port '0'; {A_PORT}",
    "9-8": "'9-8' has a container port range that runs backwards; expected 8-9",
    "9-8:1-2": "'9-8:1-2' has a host port range that runs backwards; expected 8-9",
    "1-2-3": "'1-2-3' has the container port '1-2-3'; expected a port or a range, such as 8000-8010",
    "1-2:1-3": "'1-2:1-3' has 2 host ports for 3 container ports; "
    "expected as many of the one as of the other, or a single container port",
    "80:1-3": "'80:1-3' has 1 host port for 3 container ports; "
    "expected as many of the one as of the other, or a single container port",
    # Parts that are not there, and parts too many
    ":80": f"':80' has no host port; {GRAMMAR}",
    "80:": f"'80:' has no container port; {GRAMMAR}",
    ":": f"':' has no container port; {GRAMMAR}",
    "/tcp": f"'/tcp' has no container port; {GRAMMAR}",
    "127.0.0.1::": f"'127.0.0.1::' has no container port; {GRAMMAR}",
    "::80": f"'::80' has an empty host address; {AN_ADDRESS}, or none and no ':'",
    ":8080:80": f"':8080:80' has an empty host address; {AN_ADDRESS}, or none and no ':'",
    "[]:8080:80": f"'[]:8080:80' has an empty host address; {AN_ADDRESS}, or none and no ':'",
    "127.0.0.1:8080:80:90": f"'127.0.0.1:8080:80:90' has too many ':'; {GRAMMAR}",
    "[::1]:8080:80:90": f"'[::1]:8080:80:90' has too many ':'; {GRAMMAR}",
    "127.0.0.1:80": "'127.0.0.1:80' has a host address and only one port; "
    "expected '127.0.0.1:8080:80', or '127.0.0.1::80' for any free host port",
    "127.0.0.1:x": "'127.0.0.1:x' has a host address and only one port; "
    "expected '127.0.0.1:8080:80', or '127.0.0.1::80' for any free host port",
    "[::1]:80": "'[::1]:80' has a host address and only one port; "
    "expected '[::1]:8080:80', or '[::1]::80' for any free host port",
    # Protocols
    "80/": "'80/' has no protocol after the '/'; expected tcp, udp or sctp",
    "80/icmp": "'80/icmp' has the protocol 'icmp'; expected tcp, udp or sctp",
    "80/tcp ": "'80/tcp ' has the protocol 'tcp '; expected tcp, udp or sctp",
    "80/\u017fctp": "'80/\u017fctp' has the protocol '\u017fctp'; expected tcp, udp or sctp",
    "80/tcp/udp": f"'80/tcp/udp' has more than one '/'; {GRAMMAR}",
    "80//tcp": f"'80//tcp' has more than one '/'; {GRAMMAR}",
    # Host addresses
    "localhost:8080:80": f"'localhost:8080:80' has the host address 'localhost'; {AN_ADDRESS}",
    "1.2.3:8080:80": f"'1.2.3:8080:80' has the host address '1.2.3'; {AN_ADDRESS}",
    "127.0.0.01:8080:80": f"'127.0.0.01:8080:80' has the host address '127.0.0.01'; {AN_ADDRESS}",
    "127.0.0.\u0661:8080:80": f"'127.0.0.\u0661:8080:80' has the host address '127.0.0.\u0661'; {AN_ADDRESS}",
    "[127.0.0.1]:8080:80": f"'[127.0.0.1]:8080:80' has the host address '127.0.0.1'; {AN_ADDRESS}",
    "[::g]:8080:80": f"'[::g]:8080:80' has the host address '::g'; {AN_ADDRESS}",
    "::1:8080:80": "'::1:8080:80' has too many ':' for an IPv4 address and two ports; "
    "expected brackets around an IPv6 address, such as [::1]:8080:80",
    "[::1:8080:80": f"'[::1:8080:80' has a '[' without its ']'; {AN_ADDRESS}",
    "[::1]8080:80": f"'[::1]8080:80' has no ':' after the host address; {GRAMMAR}",
    "[::1]": f"'[::1]' has no ':' after the host address; {GRAMMAR}",
    "[fe80::1%eth0]:8080:80": "'[fe80::1%eth0]:8080:80' has the zone 'eth0' in its host address; "
    "expected the address alone, since no rule can hold a zone",
    "[::ffff:192.0.2.1]:8080:80": "'[::ffff:192.0.2.1]:8080:80' has an IPv4 address written as IPv6; "
    "expected it plainly, 192.0.2.1",
}


@pytest.mark.parametrize(("text", "mapping"), GOOD.items())
def test_reads_what_docker_reads(text: str, mapping: Mapping) -> None:
    assert ports.parse(text) == mapping


@pytest.mark.parametrize(("text", "message"), BAD.items())
def test_says_what_is_wrong_and_what_was_expected(text: str, message: str) -> None:
    with pytest.raises(PortSpecError) as caught:
        ports.parse(text)
    assert str(caught.value) == message


@given(strategies.mappings())
def test_a_printed_mapping_reads_as_itself(mapping: Mapping) -> None:
    assert ports.parse(str(mapping)) == mapping


# Near the grammar, or next to nothing would get past the first check.
nearly_specs = st.text("0189:-/[].% tcpudsf\n", max_size=25) | st.from_regex(
    r"(\[[0-9a-f:.]{2,9}\]:|[0-9]{1,3}(\.[0-9]{1,3}){3}:)?([0-9]{0,5}(-[0-9]{1,5})?:)?[0-9]{1,5}(-[0-9]{1,5})?(/[a-zA-Z]*)?",
    fullmatch=True,
)


@given(st.text() | nearly_specs)
@example("9" * 5000)
@example("[" + "1" * 5000 + "]:1:1")
@example("\x1b[2J" * 100)
@example("\ud800")
def test_any_text_is_a_mapping_or_a_sentence(text: str) -> None:
    outcome = read(text)
    if isinstance(outcome, Mapping):
        assert ports.parse(str(outcome)) == outcome
    else:
        assert outcome.isprintable()
        assert len(outcome) < 400
        assert "; expected " in outcome


def read(text: str) -> Mapping | str:
    try:
        return ports.parse(text)
    except PortSpecError as error:
        return str(error)


@given(st.text())
def test_quoted_text_is_short_and_harmless(text: str) -> None:
    shown = quoted(text)
    assert shown.isprintable()
    assert len(shown) <= 62
    assert shown == repr(text) or re.search(r"\.\.\.['\"]$", shown)


def test_quoted_text_is_cut_only_where_it_is_long() -> None:
    assert quoted("a" * 60) == f"'{'a' * 60}'"
    assert quoted("a" * 61) == f"'{'a' * 57}...'"
    assert quoted("\x1b" * 60) == "'" + "\\x1b" * 14 + "\\...'"
