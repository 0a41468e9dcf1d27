"""What a ``match`` in the JSON of nft asks of a packet. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from . import nftset
from .conditions import Among, Condition, Is, Never, StateOf, StatusOf, TypeIs, WayBack
from .nftset import NotUnderstood
from .packet import Field
from .values import Name

#: The sets and maps of a table, as they are listed, by their names.
Sets = Mapping[str, Mapping[str, Any]]


def implied(expression: Any) -> Iterator[Condition]:
    """Return what an expression asks without saying so: tcp dport is of tcp alone."""
    for field, number in nftset.implied_by(expression):
        yield Is(field, ((number, number),))


def conditions(its: Mapping[str, Any], sets: Sets) -> Iterator[Condition]:
    """Return what a ``match`` asks. Raises ``NotUnderstood``, and what a malformed one makes of it."""
    left, right, operator = its["left"], its["right"], its["op"]
    yield from implied(left)
    yield _condition(left, operator, right, sets)


def _condition(left: Any, operator: Any, right: Any, sets: Sets) -> Condition:
    kind, inner = nftset.only(left)
    negated = operator in ("!=", "!")
    if operator not in ("==", "!=", "in", "!", "<", ">", "<=", ">="):
        raise NotUnderstood
    if kind == "fib":
        return _fib(left, right, negated)
    if kind == "payload" and inner.get("protocol") in ("icmp", "icmpv6", "igmp", "esp", "ah", "dccp", "arp"):
        return Never()  # of another protocol, whatever is compared
    if kind == "ct" and inner.get("key") == "status":
        return _status(operator, right)
    mask = None
    if kind == "&":
        left, bits = inner
        mask = _bits(nftset.field_of(left), bits)
    fields = nftset.fields_of(left)
    if fields == (Field.TCP_FLAGS,) and mask is None and operator in ("in", "!"):
        mask = wanted = _bits(Field.TCP_FLAGS, right)
        return Is(Field.TCP_FLAGS, ((0, 0),), operator == "in", mask) if wanted else Never()
    if len(fields) == 1 and operator in ("<", ">", "<=", ">="):
        return Is(fields[0], _half(fields[0], operator, right), mask=mask)
    if isinstance(right, str) and right.startswith("@"):
        right = _named(sets, right).get("elem", [])
    elif isinstance(right, dict) and "set" in right:
        right = right["set"]
    elif fields == (Field.STATE,) and isinstance(right, list):
        return Is(Field.STATE, tuple(nftset.pattern(Field.STATE, word) for word in right), negated)
    elif fields == (Field.TCP_FLAGS,):
        wanted = _bits(Field.TCP_FLAGS, right)
        return Is(Field.TCP_FLAGS, ((wanted, wanted),), negated, mask)
    else:
        return _single(fields, nftset.patterns(fields, right), negated, mask)
    if mask is not None:
        raise NotUnderstood
    return Among(fields, nftset.elements(fields, right, lambda _: True, pairs=False), negated)


def _named(sets: Sets, name: str) -> Mapping[str, Any]:
    found = sets.get(name.removeprefix("@"))
    if found is None:
        raise NotUnderstood
    return found


def mapped(data: Any, sets: Sets) -> Any:
    """Return the elements of a map, by its name or as it stands there. Raises ``NotUnderstood``."""
    if isinstance(data, str) and data.startswith("@"):
        return _named(sets, data).get("elem", [])
    kind, listed = nftset.only(data)
    if kind != "set":
        raise NotUnderstood
    return listed


def _single(fields: tuple[Field, ...], patterns: tuple[Any, ...], negated: bool, mask: int | None) -> Condition:
    if len(fields) != 1:
        raise NotUnderstood
    if fields[0] is Field.STATE and isinstance(patterns[0], Name):
        return StateOf(frozenset({patterns[0].text}), negated)
    return Is(fields[0], patterns, negated, mask)


def _fib(left: Any, right: Any, negated: bool) -> Condition:
    if nftset.is_way_back(left):
        if right not in (True, False, 0, ""):
            raise NotUnderstood
        return WayBack(negated=negated is bool(right))
    source, here = nftset.type_of_address(left)
    kind = right.get("set") if isinstance(right, dict) else right
    words = frozenset(listed(kind))
    if not words <= {"local", "unicast", "broadcast", "multicast", "anycast", "blackhole", "unreachable", "prohibit"}:
        raise NotUnderstood
    return TypeIs(source, words, here, negated)


def listed(value: Any) -> list[str]:
    """Return words, of which there may be one alone. Raises ``NotUnderstood``."""
    found = value if isinstance(value, list) else [value]
    if not all(isinstance(word, str) for word in found):
        raise NotUnderstood
    return found


def _status(operator: str, right: Any) -> Condition:
    words = frozenset(listed(right))
    if operator not in ("in", "!") or not words <= {"dnat", "snat", "seen-reply", "confirmed", "assured"}:
        raise NotUnderstood  # an exact comparison would have to know every bit
    return StatusOf(words, negated=operator == "!")


def _bits(its: Field, value: Any) -> int:
    """Return bits that are given as a number, as a word, or as words in a row."""
    if isinstance(value, dict) and "|" in value:
        value = value["|"]
    total = 0
    for each in value if isinstance(value, list) else [value]:
        found = nftset.pattern(its, each)
        if not isinstance(found, tuple):
            raise NotUnderstood
        total |= found[0]
    return total


def _half(its: Field, operator: str, right: Any) -> tuple[tuple[int, int], ...]:
    found = nftset.pattern(its, right)
    if not isinstance(found, tuple):
        raise NotUnderstood
    least, most = 0, (1 << 128) - 1
    number = found[0]
    return {
        "<": ((least, number - 1),),
        ">": ((number + 1, most),),
        "<=": ((least, number),),
        ">=": ((number, most),),
    }[operator]
