"""The rows of the packet table: who asks what, with real packets, and what is to come of it.

Left out, since ctrport runs no networks yet (`networks:`): "another network -> container IP", which is their isolation,
and "LAN -> an unpublished port" under FORWARD ACCEPT, where it is the policy that lets it through, not ctrport.
"""

from __future__ import annotations

import contextlib
import enum
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from embedded.host import Place
from embedded.loopback import loopback_goes_to, loopback_leaves
from embedded.traffic import Outcome, Refused, Reply, TimedOut
from tests.matrix.life import Life
from tests.matrix.settings import Setting
from tests.matrix.street import (
    HOST_SERVICE,
    OFFSET,
    ON_LOCALHOST,
    PORTS,
    PRIVATE,
    PUBLISHED,
    SAME,
    UNPUBLISHED,
    WEB,
    World,
)

#: Seconds to wait for an answer that is not to come: one that does come takes a thousandth of it.
NOT_TO_COME = 0.3


class Seen(enum.Enum):
    """What came of it, in the words of the table."""

    OWN = "yes, with the client's own address"
    TRANSLATED = "yes, with an address of the node"
    REACHED = "yes"
    WRONG = "somebody else answers"
    LEFT = "no, but a flow is left"
    REFUSED = "no, refused at once"
    SILENT = "no, no answer comes"


YES = frozenset({Seen.OWN, Seen.TRANSLATED, Seen.REACHED})
NO = frozenset({Seen.REFUSED, Seen.SILENT})
OWN = frozenset({Seen.OWN})
AT_ONCE = frozenset({Seen.REFUSED})


@dataclass(frozen=True)
class Row:
    """One line of the table.

    ``expected`` is what may be seen in a setting; ``left_out`` says why a setting has no such row, or None.
    """

    name: str
    probe: Callable[[World], Seen]
    expected: Callable[[Setting], frozenset[Seen]]
    left_out: Callable[[Setting], str | None]

    @property
    def key(self) -> str:
        """A name without spaces."""
        return self.probe.__name__


def always(seen: frozenset[Seen]) -> Callable[[Setting], frozenset[Seen]]:
    """Expect the same in every setting."""
    return lambda setting: seen


def everywhere(setting: Setting) -> str | None:
    """Leave out nothing."""
    return None


def ipv4_alone(setting: Setting) -> str | None:
    """Leave out IPv6, where the row has no meaning."""
    if setting.family == "IPv4":
        return None
    return "IPv6: there the kernel keeps localhost to itself"


def ipv6_alone(setting: Setting) -> str | None:
    """Leave out IPv4."""
    return None if setting.family == "IPv6" else "IPv4: the row is about ::1"


def udp_alone(setting: Setting) -> str | None:
    """Leave out what has connections: they end with the container."""
    return None if setting.protocol == "udp" else "tcp, sctp: a connection ends with its container"


def _seen(world: World, place: Place, outcome: Outcome, port: int) -> Seen:
    """Return what came of a probe from ``place`` that is for a port of the published container."""
    if isinstance(outcome, Refused):
        return Seen.REFUSED
    if isinstance(outcome, TimedOut):
        return Seen.SILENT
    assert isinstance(outcome, Reply), outcome
    if (outcome.name, outcome.port) != (world.street.web.name, port):
        return Seen.WRONG
    # The node has many addresses: its own is the one that it asked from.
    own = outcome.source[0] if place is world.street.node else world.address(place)
    return Seen.OWN if outcome.peer == own else Seen.TRANSLATED


def _all(seen: Iterable[Seen]) -> Seen:
    """Return what was seen each time; where it differs, what is to be seen least."""
    found = set(seen)
    return next(one for one in _WORST_FIRST if one in found)


_WORST_FIRST = (Seen.WRONG, Seen.LEFT, Seen.SILENT, Seen.REFUSED, Seen.REACHED, Seen.TRANSLATED, Seen.OWN)


def _from(world: World, place: Place, address: str, port: int, inside: int, timeout: float = 2.0) -> Seen:
    return _seen(world, place, world.probe(place, address, port, timeout=timeout), inside)


# From the LAN.


def lan(world: World) -> Seen:
    client = world.street.node.client
    addresses = (world.node_address, world.second_address)
    return _all(_from(world, client, address, PUBLISHED, WEB) for address in addresses)


def _range(world: World, first: int, inside: int) -> Seen:
    client, address = world.street.node.client, world.node_address
    return _all(_from(world, client, address, first + number, inside + number) for number in range(PORTS))


def same_range(world: World) -> Seen:
    return _range(world, *SAME)


def offset_range(world: World) -> Seen:
    return _range(world, *OFFSET)


def two_addresses(world: World) -> Seen:
    # Behind the node the two flows are one and the same, and the kernel has to give one of them another client port:
    # another port of the container would be the neighbour's.
    return _all(
        _both(world, first + number, inside + number) for first, inside in (SAME, OFFSET) for number in range(PORTS)
    )


def _both(world: World, port: int, inside: int) -> Seen:
    """Return what one client port sees of a port at both addresses, the first flow being tracked still."""
    client, seen = world.street.node.client, set()
    with contextlib.ExitStack() as opened:
        own = 0
        for address in (world.node_address, world.second_address):
            asking = opened.enter_context(world.socket(client))
            asking.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            asking.settimeout(2)
            asking.bind((world.address(client), own))
            own = asking.getsockname()[1]
            try:
                asking.connect((address, port))
                asking.send(b"who?\n")
                line = asking.recv(200).decode().splitlines()[0]
            except TimeoutError as error:
                seen.add(_seen(world, client, TimedOut(str(error)), inside))
            except ConnectionError as error:
                seen.add(_seen(world, client, Refused(str(error)), inside))
            else:
                seen.add(_seen(world, client, Reply(line, (world.address(client), own)), inside))
    return _all(seen)


def published_on_localhost(world: World) -> Seen:
    client = world.street.node.client
    # Not because nothing is published there.
    open_to_the_host = _from(world, world.street.node, world.localhost, ON_LOCALHOST, PRIVATE)
    assert open_to_the_host in YES, open_to_the_host
    addresses = (world.node_address, world.second_address)
    return _all(_from(world, client, address, ON_LOCALHOST, PRIVATE) for address in addresses)


def route_to_localhost(world: World) -> Seen:
    client = world.street.node.client
    with loopback_goes_to(world.node_address, client):
        return _most(
            _from(world, client, world.localhost, port, inside, NOT_TO_COME)
            for port, inside in ((ON_LOCALHOST, PRIVATE), (PUBLISHED, WEB))
        )


def unpublished(world: World) -> Seen:
    client, web = world.street.node.client, world.street.web
    timeout = NOT_TO_COME if world.setting.forward_policy == "DROP" else 2.0
    # The published one as well: it is published at the node's addresses, not at the container's.
    return _most(_from(world, client, world.address(web), port, port, timeout) for port in (UNPUBLISHED, WEB))


def _most(seen: Iterable[Seen]) -> Seen:
    """Return what was seen each time; where it differs, what reached most."""
    found = set(seen)
    return next(one for one in reversed(_WORST_FIRST) if one in found)


def kept_sending(world: World) -> Seen:
    life = _life(world)
    assert life.kept_sending is not None
    return Seen.REACHED if isinstance(life.kept_sending, Reply) else Seen.SILENT


def ended(world: World) -> Seen:
    life = _life(world)
    assert life.tracked
    if life.left:
        return Seen.LEFT
    seen = {type(outcome) for outcome in life.after}
    return Seen.REACHED if Reply in seen else Seen.REFUSED if seen == {Refused} else Seen.SILENT


def _life(world: World) -> Life:
    life = world.street.life[world.setting.family, world.setting.protocol]
    assert all(isinstance(outcome, Reply) for outcome in life.before), life.before
    return life


# From the node.


def host(world: World) -> Seen:
    node = world.street.node
    addresses = (world.node_address, world.second_address)
    return _all(_from(world, node, address, PUBLISHED, WEB) for address in addresses)


def host_localhost(world: World) -> Seen:
    node = world.street.node
    ports = ((PUBLISHED, WEB), (ON_LOCALHOST, PRIVATE))
    return _all(_from(world, node, world.localhost, port, inside) for port, inside in ports)


def host_localhost6(world: World) -> Seen:
    timeout = NOT_TO_COME if Seen.SILENT in _reserved(world.setting) else 2.0
    return _from(world, world.street.node, world.localhost, PUBLISHED, WEB, timeout)


# From containers.


def itself(world: World) -> Seen:
    return _from(world, world.street.web, world.node_address, PUBLISHED, WEB)


def sibling(world: World) -> Seen:
    return _from(world, world.street.sibling, world.node_address, PUBLISHED, WEB)


def stranger(world: World) -> Seen:
    return _from(world, world.street.stranger, world.node_address, PUBLISHED, WEB)


def to_127(world: World) -> Seen:
    thief = world.street.sibling
    with loopback_goes_to(world.street.network.gateway, thief):
        outcome = world.probe(thief, world.localhost, HOST_SERVICE, timeout=NOT_TO_COME)
    return _host_service(outcome)


def from_127(world: World) -> Seen:
    # No answer would come anyway, since it goes to the node itself: what tells is whether the packet is let in.
    spoofer, gateway = world.street.sibling, world.street.network.gateway
    world.street.node.run(world.street.site.program, "-Z", "INPUT")
    with loopback_leaves(spoofer), world.socket(spoofer) as sender:
        sender.bind(("127.0.0.5", 0))
        sender.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            sender.connect((gateway, HOST_SERVICE))
            sender.send(b"I am you\n")
        # The same wire keeps the order: once this one is answered, what came before was counted or dropped.
        assert _host_service(world.probe(spoofer, gateway, HOST_SERVICE)) is Seen.REACHED
    [count] = [
        int(line.split()[0])
        for line in world.street.node.run(world.street.site.program, "-nvxL", "INPUT").stdout.splitlines()
        if "127.0.0.0/8" in line
    ]
    return Seen.REACHED if count else Seen.SILENT


def _host_service(outcome: Outcome) -> Seen:
    if isinstance(outcome, Reply):
        return Seen.REACHED if outcome.name == "host" else Seen.WRONG
    return Seen.REFUSED if isinstance(outcome, Refused) else Seen.SILENT


def _unpublished(setting: Setting) -> frozenset[Seen]:
    return NO if setting.forward_policy == "DROP" else OWN


def _reserved(setting: Setting) -> frozenset[Seen]:
    """What the socket that reserves a host port tells who meets it."""
    return frozenset({Seen.SILENT}) if setting.protocol == "udp" else AT_ONCE


#: In the order of the table.
ROWS = (
    Row("LAN → hostIP:port", lan, always(OWN), everywhere),
    Row("LAN → a port of a range onto the same ports", same_range, always(OWN), everywhere),
    Row("LAN → a port of a range with an offset", offset_range, always(OWN), everywhere),
    Row(
        "LAN → a port of a range, from one client port at two addresses of the node",
        two_addresses,
        always(OWN),
        everywhere,
    ),
    Row("host → its own IP:port", host, always(YES), everywhere),
    Row("host → 127.0.0.1:port", host_localhost, always(YES), ipv4_alone),
    Row("host → [::1]:port", host_localhost6, _reserved, ipv6_alone),
    Row("LAN → a port published on 127.0.0.1", published_on_localhost, always(AT_ONCE), ipv4_alone),
    Row("LAN → 127.0.0.1:port, by a route over the LAN", route_to_localhost, always(NO), ipv4_alone),
    Row("container → a service of the host on 127.0.0.1, by a route over its network", to_127, always(NO), ipv4_alone),
    Row("container → a service of the host, from a source in 127.0.0.0/8", from_127, always(NO), ipv4_alone),
    Row("container → its own published port", itself, always(YES), everywhere),
    Row("sibling → hostIP:port", sibling, always(YES), everywhere),
    Row("container on another network → hostIP:port", stranger, always(YES), everywhere),
    Row("LAN → the container's own IP, any port", unpublished, _unpublished, everywhere),
    Row("client that went on sending UDP while the rule was away", kept_sending, always(YES), udp_alone),
    Row("anyone → the port after the container ended", ended, always(AT_ONCE), everywhere),
)


@dataclass(frozen=True)
class Known:
    """A row that fails as of now, in which settings, and why: to be mended, and then to be deleted here."""

    row: str
    when: Callable[[Setting], bool]
    why: str


KNOWN: tuple[Known, ...] = ()


def known(row: Row, setting: Setting) -> Known | None:
    """Return why a row fails in a setting as of now, None where it does not."""
    return next((one for one in KNOWN if one.row == row.name and one.when(setting)), None)
