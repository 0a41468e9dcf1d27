"""Fields and values in the JSON of ``nft``: what a rule compares, and with what. Pure.

nft's JSON loses some of what it is to say: of a set with wildcards for names, or of a set whose key has an expression
that it has no JSON for. What does not fit together is not understood here, and never taken for something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import ip_address, ip_network
from typing import Any, TypeVar

from ..model import Address, PortRange
from .packet import Field
from .ruleset import To
from .values import Elements, Name, Pattern

T = TypeVar("T")


class NotUnderstood(Exception):
    """Something in the JSON is not known here."""


_PAYLOAD = {
    **{(family, "saddr"): Field.SOURCE for family in ("ip", "ip6")},
    **{(family, "daddr"): Field.DESTINATION for family in ("ip", "ip6")},
    **{(protocol, "sport"): Field.SOURCE_PORT for protocol in ("tcp", "udp", "sctp", "th")},
    **{(protocol, "dport"): Field.DESTINATION_PORT for protocol in ("tcp", "udp", "sctp", "th")},
    ("ip", "protocol"): Field.PROTOCOL,
    ("ip6", "nexthdr"): Field.PROTOCOL,
    ("ip", "version"): Field.FAMILY,
    ("ip6", "version"): Field.FAMILY,
    ("tcp", "flags"): Field.TCP_FLAGS,
}
_META = {
    "l4proto": Field.PROTOCOL,
    "nfproto": Field.FAMILY,
    "protocol": Field.FAMILY,
    "mark": Field.MARK,
    "iifname": Field.IN_DEVICE,
    "iif": Field.IN_DEVICE,
    "oifname": Field.OUT_DEVICE,
    "oif": Field.OUT_DEVICE,
    "pkttype": Field.PACKET_TYPE,
}
_CT = {"state": Field.STATE, "direction": Field.DIRECTION, "mark": Field.CT_MARK}
_TUPLE = {
    **{("original", key): Field.ORIGINAL_SOURCE for key in ("saddr", "ip saddr", "ip6 saddr")},
    **{("original", key): Field.ORIGINAL_DESTINATION for key in ("daddr", "ip daddr", "ip6 daddr")},
    ("original", "proto-src"): Field.ORIGINAL_SOURCE_PORT,
    ("original", "proto-dst"): Field.ORIGINAL_DESTINATION_PORT,
    **{("reply", key): Field.REPLY_SOURCE for key in ("saddr", "ip saddr", "ip6 saddr")},
    **{("reply", key): Field.REPLY_DESTINATION for key in ("daddr", "ip daddr", "ip6 daddr")},
    ("reply", "proto-src"): Field.REPLY_SOURCE_PORT,
    ("reply", "proto-dst"): Field.REPLY_DESTINATION_PORT,
    **{(direction, "protocol"): Field.PROTOCOL for direction in ("original", "reply")},
}

_NUMBERS = {
    Field.PROTOCOL: {"tcp": 6, "udp": 17, "sctp": 132, "icmp": 1, "ipv6-icmp": 58, "icmpv6": 58, "igmp": 2, "gre": 47}
    | {"esp": 50, "ah": 51, "dccp": 33, "udplite": 136, "comp": 108},
    Field.FAMILY: {"ipv4": 4, "ip": 4, "ipv6": 6, "ip6": 6},
    Field.TCP_FLAGS: {"fin": 1, "syn": 2, "rst": 4, "psh": 8, "ack": 16, "urg": 32, "ecn": 64, "cwr": 128},
}
_DEVICES = frozenset({Field.IN_DEVICE, Field.OUT_DEVICE})
_WORDS = {
    Field.STATE: {"new", "established", "related", "invalid", "untracked"},
    Field.DIRECTION: {"original", "reply"},
    Field.PACKET_TYPE: {"unicast", "host", "broadcast", "multicast", "other"},
}
_ADDRESSES = frozenset(
    {Field.SOURCE, Field.DESTINATION, Field.ORIGINAL_SOURCE, Field.ORIGINAL_DESTINATION}
    | {Field.REPLY_SOURCE, Field.REPLY_DESTINATION}
)

#: What a payload of these takes for granted: that the packet is of that protocol, or family.
_IMPLIED = {
    **{name: (Field.PROTOCOL, _NUMBERS[Field.PROTOCOL][name]) for name in ("tcp", "udp", "sctp")},
    **{name: (Field.FAMILY, _NUMBERS[Field.FAMILY][name]) for name in ("ip", "ip6")},
}


def only(value: Any) -> tuple[str, Any]:
    """Return the one key of an object, and what it has. Raises ``NotUnderstood`` for anything else."""
    if not isinstance(value, dict) or len(value) != 1:
        raise NotUnderstood
    [(key, its)] = value.items()
    return key, its


def field_of(expression: Any) -> Field:
    """Return what an expression reads. Raises ``NotUnderstood``."""
    kind, its = only(expression)
    found: Field | None = None
    if kind == "payload" and isinstance(its, dict):
        found = _PAYLOAD.get((str(its.get("protocol")), str(its.get("field"))))
    elif kind == "meta" and isinstance(its, dict):
        found = _META.get(str(its.get("key")))
    elif kind == "ct" and isinstance(its, dict):
        key, direction = str(its.get("key")), its.get("dir")
        found = _CT.get(key) if direction is None else _TUPLE.get((str(direction), key))
    if found is None:
        raise NotUnderstood
    return found


def fields_of(expression: Any) -> tuple[Field, ...]:
    """Return what an expression reads, which may be several things at once."""
    kind, its = only(expression)
    return tuple(map(field_of, its)) if kind == "concat" and isinstance(its, list) else (field_of(expression),)


def implied_by(expression: Any) -> Iterator[tuple[Field, int]]:
    """Return what an expression takes for granted, which nft does not say: tcp dport is of tcp alone."""
    kind, its = only(expression)
    for each in its if kind in ("concat", "&") and isinstance(its, list) else [expression]:
        if isinstance(each, dict) and isinstance(each.get("payload"), dict):
            its_own = _IMPLIED.get(str(each["payload"].get("protocol")))
            if its_own is not None:
                yield its_own
        if isinstance(each, dict) and isinstance(each.get("ct"), dict) and " " in str(each["ct"].get("key")):
            its_own = _IMPLIED.get(str(each["ct"]["key"]).partition(" ")[0])
            if its_own is not None:
                yield its_own


def pattern(its: Field, value: Any) -> Pattern:
    """Return a value that a field is compared with. Raises ``NotUnderstood``."""
    if isinstance(value, dict):
        kind, inner = only(value)
        if kind == "range" and isinstance(inner, list) and len(inner) == 2 and its not in _DEVICES:
            return (_number(its, inner[0]), _number(its, inner[1]))
        if kind == "prefix" and isinstance(inner, dict) and its in _ADDRESSES:
            network = _network(inner)
            return (int(network[0]), int(network[-1]))
        if kind == "elem" and isinstance(inner, dict) and "val" in inner:
            return pattern(its, inner["val"])
        raise NotUnderstood
    if its in _DEVICES:
        if not isinstance(value, str):
            raise NotUnderstood
        return Name(value[:-1], prefix=True) if value.endswith("*") else Name(value)
    if its in _WORDS:
        if value not in _WORDS[its]:
            raise NotUnderstood
        return Name("unicast" if value == "host" else value)
    number = _number(its, value)
    return (number, number)


def _number(its: Field, value: Any) -> int:
    if isinstance(value, bool):
        raise NotUnderstood
    if isinstance(value, int):
        return value
    if isinstance(value, str) and its in _ADDRESSES:
        return int(_address(value))
    found = _NUMBERS.get(its, {}).get(value) if isinstance(value, str) else None
    if found is None:
        raise NotUnderstood
    return found


def _address(value: Any) -> Address:
    try:
        return ip_address(value)
    except ValueError as error:
        raise NotUnderstood from error


def _network(value: Mapping[str, Any]) -> Any:
    try:
        return ip_network(f"{value['addr']}/{value['len']}", strict=False)
    except (ValueError, KeyError) as error:
        raise NotUnderstood from error


def patterns(fields: Sequence[Field], value: Any) -> tuple[Pattern, ...]:
    """Return an element of a set: a pattern for each field. Raises ``NotUnderstood``."""
    if isinstance(value, dict) and isinstance(value.get("elem"), dict):
        value = value["elem"].get("val")
    if len(fields) == 1:
        return (pattern(fields[0], value),)
    kind, parts = only(value)
    if kind != "concat" or not isinstance(parts, list) or len(parts) != len(fields):
        raise NotUnderstood
    return tuple(pattern(its, part) for its, part in zip(fields, parts, strict=True))


def elements(fields: Sequence[Field], listed: Any, read: Callable[[Any], T], pairs: bool) -> Elements[T]:
    """Return a set, or with ``pairs`` a map, of which some elements may not be understood."""
    found: list[tuple[tuple[Pattern, ...], T]] = []
    unread = False
    if not isinstance(listed, list):
        raise NotUnderstood
    for each in listed:
        try:
            if pairs and not (isinstance(each, list) and len(each) == 2):
                raise NotUnderstood
            key, value = each if pairs else (each, None)
            found.append((patterns(fields, key), read(value)))
        except NotUnderstood:
            unread = True
    return Elements(found, unread)


def place(value: Any, port: Any = None) -> To:
    """Return where ``dnat to`` sends packets. Raises ``NotUnderstood``."""
    if isinstance(value, dict) and "concat" in value and port is None:
        parts = value["concat"]
        if not isinstance(parts, list) or len(parts) != 2:
            raise NotUnderstood
        return place(parts[0], parts[1])
    addresses: tuple[Address, Address] | None = None
    if isinstance(value, str):
        addresses = (_address(value), _address(value))
    elif isinstance(value, dict) and isinstance(value.get("range"), list) and len(value["range"]) == 2:
        addresses = (_address(value["range"][0]), _address(value["range"][1]))
    elif value is not None:
        raise NotUnderstood
    return To(addresses, None if port is None else port_range(port))


def port_range(value: Any) -> PortRange:
    """Return one port, or a range of them. Raises ``NotUnderstood``."""
    ends = value.get("range") if isinstance(value, dict) else [value, value]
    if not isinstance(ends, list) or len(ends) != 2 or not all(type(end) is int for end in ends):
        raise NotUnderstood
    try:
        return PortRange(*ends)
    except ValueError as error:
        raise NotUnderstood from error


def type_of_address(expression: Any) -> tuple[bool, bool]:
    """Read ``fib saddr type`` and its like: whether it is of the source, and of the device that it came in by."""
    kind, its = only(expression)
    if kind != "fib" or not isinstance(its, dict) or its.get("result") != "type":
        raise NotUnderstood
    flags = its.get("flags")
    flags = {flags} if isinstance(flags, str) else set(flags or ())
    which = flags & {"saddr", "daddr"}
    if len(which) != 1 or flags - which - {"iif"}:
        raise NotUnderstood
    return which == {"saddr"}, "iif" in flags


def is_way_back(expression: Any) -> bool:
    """Whether it is ``fib saddr . iif oif``, perhaps with the mark: what firewalls filter reverse paths by."""
    kind, its = only(expression)
    if kind != "fib" or not isinstance(its, dict) or its.get("result") not in ("oif", "oifname", "check"):
        return False
    flags = its.get("flags")
    flags = {flags} if isinstance(flags, str) else set(flags or ())
    return {"saddr", "iif"} <= flags <= {"saddr", "iif", "mark"}


_SERVICE = re.compile(r"[a-z]+-[A-Z0-9]+-([a-z0-9.-]{1,63})/([a-z0-9.-]{1,63})/[a-z]+/([a-z0-9-]{0,63})(?:__.*)?")


def service_of(chain: str) -> str | None:
    """Return the Service that a chain of kube-proxy's is named after: namespace/name:port."""
    found = _SERVICE.fullmatch(chain)
    return f"{found[1]}/{found[2]}{':' if found[3] else ''}{found[3]}" if found else None
