"""Where to listen: an address of the node and a port, as people write it. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address

from .model import Address

#: Nowhere. No word that YAML has another meaning for, as it has for "off".
NOWHERE = "none"


@dataclass(frozen=True)
class Listen:
    """Where to listen: on one address of the node, or on all of its family, at a port."""

    address: Address
    port: int

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{host}:{self.port}"


def parse(text: str) -> Listen | None:
    """Return where that is; None for ``NOWHERE``. Names are not looked up: what they stand for can change.

    Raises ``ValueError`` with what is wrong, or with nothing where that is obvious: "it is TEXT{error}; expected ...".
    """
    if text == NOWHERE:
        return None
    host, colon, port = text.rpartition(":")
    if not colon:
        raise ValueError
    if re.fullmatch(r"[1-9][0-9]{0,4}", port) is None or int(port) > 65535:
        raise ValueError(", which ends in no port from 1 to 65535")
    bare = host[1:-1] if host[:1] + host[-1:] == "[]" else host
    if "%" in bare:
        raise ValueError(", with a zone, which is not taken here")
    try:
        address = ip_address(bare)
    except ValueError:
        raise ValueError(", which has no address: names are not looked up") from None
    if (address.version == 6) != (bare != host):
        raise ValueError(", and IPv6 addresses alone stand in brackets")
    return Listen(address, int(port))
