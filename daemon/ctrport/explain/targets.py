"""What the targets of iptables do, out of their names and options. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import ip_address

from ..model import Address, PortRange
from .packet import Field
from .ruleset import Action, End, Mark, NewDestination, NewSource, Perhaps, Redirect, Return, To, Untrack

#: Targets that are nothing to where a packet goes.
HARMLESS = frozenset(
    {"LOG", "NFLOG", "ULOG", "TRACE", "AUDIT", "CLASSIFY", "DSCP", "TOS", "ECN", "TTL", "HL", "TCPMSS", "TCPOPTSTRIP"}
    | {"CHECKSUM", "SET", "SECMARK", "CONNSECMARK", "IDLETIMER", "LED", "RATEEST", "TEE", "ACCOUNT"}
)

#: What reads a target's options.
_Act = Callable[[dict[str, str]], tuple[Action, ...]]


class _NotKnown(Exception):
    """An option that is not understood here."""


def actions_of(name: str, options: list[str]) -> tuple[Action, ...]:
    """Return what a target does; of one that is not known, that it may do anything."""
    if name in HARMLESS:
        return ()
    try:
        return _TARGETS[name](_by_name(options))
    except (_NotKnown, ValueError, IndexError, KeyError):
        return (Perhaps(" ".join(["-j", name, *options])),)


def _by_name(words: list[str]) -> dict[str, str]:
    """Return a target's options, each with its value; empty for those without."""
    found: dict[str, str] = {}
    last = ""
    for word in words:
        if word.startswith("--"):
            last = word
            found[last] = ""
        elif last:
            found[last] = f"{found[last]} {word}".strip()
    return found


_PLACE = re.compile(
    r"(?:\[([^]]+)\]|([0-9.-]*)|([0-9a-fA-F.:-]+))"  # [IPv6], IPv4, IPv6 without a port
    r"(?::([0-9]+)(?:-([0-9]+))?(?:/([0-9]+))?)?"
)


def _place(text: str) -> To:
    """Read ``address[-address][:port[-port[/base]]]``, with an IPv6 address in brackets where a port follows."""
    found = re.fullmatch(
        r"(?:\[([^]]+)\]|([0-9.-]*)|([0-9a-fA-F.:-]+))(?::([0-9]+)(?:-([0-9]+))?(?:/([0-9]+))?)?", text
    )
    if found is None:
        raise _NotKnown
    addresses: tuple[Address, Address] | None = None
    words = found[1] or found[2] or found[3]
    if words:
        first, _, last = words.partition("-")
        addresses = (ip_address(first), ip_address(last or first))
    ports = PortRange(int(found[4]), int(found[5] or found[4])) if found[4] else None
    return To(addresses, ports, int(found[6]) if found[6] else None)


def _dnat(options: dict[str, str]) -> tuple[Action, ...]:
    return (NewDestination(_place(options["--to-destination"])),)


def _redirect(options: dict[str, str]) -> tuple[Action, ...]:
    text = options.get("--to-ports")
    if not text:
        return (Redirect(),)
    first, _, last = text.partition("-")
    return (Redirect(PortRange(int(first), int(last or first))),)


def _snat(options: dict[str, str]) -> tuple[Action, ...]:
    addresses = _place(options["--to-source"]).addresses
    if addresses is None:
        return (NewSource(),)
    return (NewSource(addresses[0] if addresses[0] == addresses[1] else None),)


def _set_mark(field: Field) -> _Act:
    def read(options: dict[str, str]) -> tuple[Action, ...]:
        other = Field.MARK if field is Field.CT_MARK else Field.CT_MARK
        if "--set-xmark" in options:
            value, _, mask = options["--set-xmark"].partition("/")
            return (Mark(field, field, 0xFFFFFFFF & ~int(mask or "0xffffffff", 0), int(value, 0)),)
        packets, flows = (int(options.get(each) or "0xffffffff", 0) for each in ("--nfmask", "--ctmask"))
        if field is Field.CT_MARK and "--save-mark" in options:
            return (Mark(field, other, packets, own=0xFFFFFFFF & ~flows),)
        if field is Field.CT_MARK and "--restore-mark" in options:
            return (Mark(other, field, flows, own=0xFFFFFFFF & ~packets),)
        return (Mark(Field.MARK, None), Mark(Field.CT_MARK, None))

    return read


def _ct(options: dict[str, str]) -> tuple[Action, ...]:
    if "--notrack" in options:
        return (Untrack(),)
    if "--zone" in options or "--zone-orig" in options:
        raise _NotKnown
    return ()


def _always(*actions: Action) -> _Act:
    return lambda options: actions


_TARGETS: dict[str, _Act] = {
    "ACCEPT": _always(End("accept")),
    "DROP": _always(End("drop")),
    "REJECT": _always(End("reject")),
    "RETURN": _always(Return()),
    "DNAT": _dnat,
    "REDIRECT": _redirect,
    "SNAT": _snat,
    "MASQUERADE": _always(NewSource(device=True)),
    "MARK": _set_mark(Field.MARK),
    "CONNMARK": _set_mark(Field.CT_MARK),
    "CT": _ct,
    "NOTRACK": _always(Untrack()),
}
