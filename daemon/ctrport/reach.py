"""Where a mapping of a container leads, or why it cannot be served, whoever else wants its host port. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .model import Access, Attachment, Candidate, Endpoint, Family, Mapping, NodeFacts, Obstacle, State

FORWARDING_OFF = {
    Family.IPV4: "the node does not forward IPv4: sysctl -w net.ipv4.ip_forward=1",
    Family.IPV6: "the node does not forward IPv6: sysctl -w net.ipv6.conf.all.forwarding=1",
}


@dataclass(frozen=True)
class Reach:
    """What can be served on this node.

    ``families`` are those that it has rules for; ``localhost`` is whether 127.0.0.0/8 may be published on.
    """

    facts: NodeFacts
    families: tuple[Family, ...]
    localhost: bool

    def judge(self, candidate: Candidate, mapping: Mapping, access: Access) -> tuple[Attachment, ...] | Obstacle:
        """Return where the mapping would lead, or why it cannot be served whoever else wants its port."""
        if mapping.protocol not in self.facts.protocols:
            return Obstacle(State.UNSUPPORTED, f"this kernel does not track {mapping.protocol} connections")
        if isinstance(candidate.endpoint, Obstacle):
            return candidate.endpoint
        obstacle = self._unfit_host_ip(mapping)
        if obstacle is not None:
            return obstacle
        families = [family for family in mapping.families if family in self.families]
        if not families:
            return Obstacle(State.UNSUPPORTED, f"this node cannot publish on IPv{mapping.families[0].value}")
        admitted = [family for family in families if access.sources_of(family) is not None]
        if not admitted:
            names = " or ".join(f"IPv{family.value}" for family in families)
            return Obstacle(State.UNSUPPORTED, f"none of its sources is a network of {names}")
        attachments = _attachments(candidate.endpoint, admitted)
        if not attachments:
            names = " or ".join(f"IPv{family.value}" for family in admitted)
            return Obstacle(State.WAITING, f"the container has no {names} address that the host can reach")
        forwarded = tuple(a for a in attachments if Family.of(a.address) in self.facts.forwarding)
        if not forwarded:
            return Obstacle(State.WAITING, FORWARDING_OFF[Family.of(attachments[0].address)])
        return forwarded

    def _unfit_host_ip(self, mapping: Mapping) -> Obstacle | None:
        host_ip = mapping.host_ip
        if host_ip is None or mapping.any_host_ip:
            return None
        if host_ip.is_loopback and host_ip.version == 6:
            reason = f"the kernel sends nothing on that was sent to {host_ip}: publish on 127.0.0.1"
            return Obstacle(State.UNSUPPORTED, reason)
        if host_ip.is_loopback and not self.localhost:
            return Obstacle(State.UNSUPPORTED, f"{host_ip} is published only with firewall.localhost: true")
        if not host_ip.is_loopback and host_ip not in self.facts.addresses:
            return Obstacle(State.WAITING, f"{host_ip} is not an address of this node")
        return None


def _attachments(endpoint: Endpoint, families: Iterable[Family]) -> tuple[Attachment, ...]:
    found = (endpoint.at(family) for family in families)
    return tuple(attachment for attachment in found if attachment is not None)
