"""SCTP, with real packets: a mapping of it translates and lets in what it should.

Chunks are made and read by hand on raw sockets, for a kernel that tracks SCTP connections may have no SCTP sockets.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from dataclasses import dataclass

import pytest

from embedded.host import Place
from embedded.node import Node
from embedded.traffic import eventually
from tests.node.daemon import Ctrport

pytestmark = pytest.mark.docker0(subnet6="fd00:17::/64")

IPPROTO_SCTP = 132
INIT, INIT_ACK = 1, 2
MAPPING = "8080:80/sctp"


def crc32c(data: bytes) -> int:
    """The checksum of SCTP (RFC 9260, appendix A)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@dataclass(frozen=True)
class Packet:
    """An SCTP packet of one INIT or INIT ACK chunk."""

    source: int
    destination: int
    verification: int
    chunk: int
    initiate: int

    def __bytes__(self) -> bytes:
        chunk = struct.pack("!BBHIIHHI", self.chunk, 0, 20, self.initiate, 65536, 1, 1, 1)
        if self.chunk == INIT_ACK:
            chunk = chunk[:2] + struct.pack("!H", 28) + chunk[4:] + struct.pack("!HHI", 7, 8, 0)  # a state cookie
        header = struct.pack("!HHI", self.source, self.destination, self.verification)
        checksum = struct.pack("<I", crc32c(header + bytes(4) + chunk))
        return header + checksum + chunk

    @classmethod
    def parse(cls, data: bytes) -> Packet:
        """Read a packet, whose checksum must be right: who translates a port has to mend it."""
        source, destination, verification = struct.unpack("!HHI", data[:8])
        assert struct.pack("<I", crc32c(data[:8] + bytes(4) + data[12:])) == data[8:12]
        return cls(source, destination, verification, data[12], struct.unpack("!I", data[16:20])[0])


class Peer:
    """One end of SCTP associations: what comes is read with the sender's address."""

    def __init__(self, place: Place, family: socket.AddressFamily) -> None:
        [self._socket] = place.sockets(1, socket.SOCK_RAW, family, IPPROTO_SCTP)

    def close(self) -> None:
        self._socket.close()

    def send(self, address: str, packet: Packet) -> None:
        self._socket.sendto(bytes(packet), (address, 0))

    def receive(self, within: float = 2) -> tuple[str, Packet]:
        """Return the next packet that comes, and who sent it."""
        self._socket.settimeout(within)
        data, sender = self._socket.recvfrom(4096)
        if self._socket.family == socket.AF_INET:  # which comes with the IP header
            data = data[(data[0] & 15) * 4 :]
        return sender[0], Packet.parse(data)

    def nothing(self) -> bool:
        """Whether nothing is there to be read."""
        try:
            self.receive(0.05)
        except TimeoutError:
            return True
        return False


def has_sctp_sockets() -> bool:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_SCTP).close()
    except OSError:
        return False
    return True


@pytest.fixture
def by_hand() -> None:
    """Skip where the kernel would answer for itself what comes to a raw socket as well."""
    if has_sctp_sockets():
        pytest.skip("this kernel has SCTP sockets: the packet table is tried with them")


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize("policy", ["ACCEPT", "DROP"])
def test_an_association_is_begun_through_a_published_port_and_no_other(
    node: Node, ctrport: Ctrport, policy: str
) -> None:
    web = node.start("web")
    for program in ("iptables-nft", "ip6tables-nft"):
        node.run(program, "-P", "FORWARD", policy)
    ctrport.configure(
        "publish:\n"
        f'  - match: {{container: web}}\n    ports: ["{MAPPING}"]\n'
        f'  - match: {{container: web}}\n    ports: ["8081:80/sctp"]\n    sources: [192.0.2.0/24, "2001:db8:99::/64"]\n'
    )
    ctrport.start()
    for family, address, own, client_address in (
        (socket.AF_INET, node.address, web.address, node.client_address),
        (socket.AF_INET6, node.address6, web.address6, node.client_address6),
    ):
        assert own is not None
        with contextlib.closing(Peer(web, family)) as server, contextlib.closing(Peer(node.client, family)) as client:
            # Neither the port inside, nor its neighbours, nor one for others; what is let in comes after, so that they
            # would have been here by then.
            for port in (80, 8079, 8082, 8081):
                client.send(address, Packet(5000, port, 0, INIT, 99))
            client.send(address, Packet(5001, 8080, 0, INIT, 7))
            assert server.receive() == (client_address, Packet(5001, 80, 0, INIT, 7))
            server.send(client_address, Packet(80, 5001, 7, INIT_ACK, 8))
            assert client.receive() == (address, Packet(8080, 5001, 7, INIT_ACK, 8))
            assert server.nothing()


@pytest.mark.usefixtures("by_hand")
def test_the_port_of_a_container_that_ended_leads_nowhere_and_keeps_no_flow(node: Node, ctrport: Ctrport) -> None:
    web = node.start("web")
    ctrport.configure(f'publish:\n  - match: {{container: web}}\n    ports: ["{MAPPING}"]\n')
    ctrport.start()
    with contextlib.closing(Peer(web, socket.AF_INET)) as server, lan(node) as client:
        client.send(node.address, Packet(5001, 8080, 0, INIT, 7))
        server.receive()
        assert f"src={web.address} " in flows(node)
        node.kill(web)
        eventually(lambda: f"src={web.address} " not in flows(node), what="the flow being gone")
        client.send(node.address, Packet(5001, 8080, 0, INIT, 7))
        assert f"src={web.address} " not in flows(node)


def lan(node: Node) -> contextlib.closing[Peer]:
    return contextlib.closing(Peer(node.client, socket.AF_INET))


def flows(node: Node) -> str:
    return node.run("conntrack", "-L", "-p", "sctp").stdout


def test_the_reason_says_where_the_kernel_has_no_sockets_to_reserve_with(node: Node, ctrport: Ctrport) -> None:
    node.start("web")
    ctrport.configure(f'publish:\n  - match: {{container: web}}\n    ports: ["{MAPPING}"]\n')
    ctrport.start()
    publication = ctrport.wait_for(MAPPING, "active")
    reason = "" if has_sctp_sockets() else "not reserved: this kernel has no SCTP sockets"
    assert publication["reason"] == reason
    assert reason in ctrport.run("ps").stdout
    assert reason in ctrport.messages
