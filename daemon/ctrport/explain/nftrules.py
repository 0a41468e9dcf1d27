"""Tables out of what ``nft --json list`` prints, as libnftables-json(5) has it. Pure.

Like ``saved`` it reads a chain's rules when a packet comes to it, and makes a doubt of what it does not know.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..firewall.text import TAG
from . import nftset
from .conditions import Doubt
from .nftmatch import Sets, conditions, implied, listed, mapped
from .nftset import NotUnderstood
from .nftwords import words_of
from .packet import Field
from .ruleset import (
    NFT,
    Base,
    Chain,
    End,
    Jump,
    LookUp,
    Mark,
    NewDestination,
    NewSource,
    Part,
    Perhaps,
    Redirect,
    Return,
    Rule,
    Table,
    Toss,
    Untrack,
)

#: Which table is which: its family and its name.
Key = tuple[str, str]

#: Statements that are nothing to where a packet goes.
_HARMLESS = frozenset(
    {"counter", "log", "continue", "flow", "dup", "set", "map", "update", "add", "delete", "last", "comment", "secmark"}
    | {"ct helper", "ct timeout", "ct expectation"}
)


@dataclass
class _Raw:
    """A table as nft lists it."""

    chains: dict[str, dict[str, Any]] = field(default_factory=dict)
    rules: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)


def tables(objects: Iterable[Any], turns: Mapping[tuple[str, str, str], int]) -> list[Table]:
    """Return the tables that are listed; ``turns`` is when each chain that hooks in was made."""
    raws: dict[Key, _Raw] = {}
    for each in objects:
        try:
            kind, its = nftset.only(each)
            key = (str(its["family"]), str(its["name"] if kind == "table" else its["table"]))
            raw = raws.setdefault(key, _Raw())
            if kind == "chain":
                raw.chains[str(its["name"])] = its
            elif kind == "rule":
                raw.rules.setdefault(str(its["chain"]), []).append(its)
            elif kind in ("set", "map"):
                raw.sets[str(its["name"])] = its
        except (NotUnderstood, KeyError, TypeError, AttributeError):
            continue  # what is no part of a table
    found = []
    for (family, name), raw in raws.items():
        table = Table(NFT, family, name)
        for chain, its in raw.chains.items():
            reader = _Reader(raw.sets)
            rules = raw.rules.get(chain, [])
            base = _base(its, turns.get((family, name, chain), 0))
            table.chains[chain] = Chain(chain, base, partial(_rules, reader, rules))
        found.append(table)
    return found


def base_chains(objects: Iterable[Any]) -> dict[tuple[str, str, str], int]:
    """Return in which turn each chain that hooks in was made, out of ``nft --json list chains``."""
    chains = (each.get("chain") for each in objects if isinstance(each, dict))
    hooked = [its for its in chains if isinstance(its, dict) and "hook" in its]
    return {
        (str(its.get("family")), str(its.get("table")), str(its.get("name"))): turn for turn, its in enumerate(hooked)
    }


def _base(its: Mapping[str, Any], turn: int) -> Base | None:
    hook, priority = its.get("hook"), its.get("prio")
    if not isinstance(hook, str) or type(priority) is not int:
        return None
    policy = "drop" if its.get("policy") == "drop" else "accept"
    device = its.get("dev")
    devices = frozenset(map(str, device if isinstance(device, list) else [device] if device else []))
    return Base(hook, priority, str(its.get("type")), policy, turn, devices)


def _rules(reader: _Reader, listed: list[dict[str, Any]]) -> list[Rule]:
    return [reader.rule(each) for each in listed]


class _Reader:
    """Reads the rules of one table."""

    def __init__(self, sets: Sets) -> None:
        self._sets = sets

    def rule(self, its: Mapping[str, Any]) -> Rule:
        expressions = its.get("expr")
        parts: list[Part] = []
        for expression in expressions if isinstance(expressions, list) else []:
            parts += self._parts(expression)
        comment, handle = its.get("comment"), its.get("handle")
        comment = comment if isinstance(comment, str) else ""
        tag = comment if TAG.fullmatch(comment) else None
        text = words_of(expressions if isinstance(expressions, list) else [])
        return Rule(tuple(parts), text, comment, tag, handle if type(handle) is int else None)

    def _parts(self, expression: Any) -> Iterator[Part]:
        try:
            kind, its = nftset.only(expression)
            if kind == "match":
                yield from conditions(its, self._sets)
            else:
                yield from self._statement(kind, its)
        except (NotUnderstood, KeyError, TypeError, ValueError, AttributeError):
            words = words_of([expression])
            # A match, or a limit, is asked; what else there may be does something.
            yield Doubt(words) if _is_asked(expression) else Perhaps(words)

    # Statements

    def _statement(self, kind: str, its: Any) -> Iterator[Part]:
        if kind in ("accept", "drop", "return", "jump", "goto"):
            verdict = _verdict({kind: its})
            if verdict is not None:
                yield verdict
        elif kind == "reject":
            yield End("reject")
        elif kind == "set" and isinstance(its, dict) and its.get("stmt"):
            raise NotUnderstood  # it adds to a set and asks for a rate
        elif kind in _HARMLESS:
            return
        elif kind == "notrack":
            yield Untrack()
        elif kind == "vmap":
            found = mapped(its["data"], self._sets)
            if _is_tossed(its["key"]):
                yield Toss(tuple(_verdict(value) for _, value in found))
                return
            yield from implied(its["key"])
            key = nftset.fields_of(its["key"])
            yield LookUp(key, nftset.elements(key, found, _verdict, pairs=True))
        elif kind == "dnat":
            yield from self._destination(its)
        elif kind == "redirect":
            port = its.get("port") if isinstance(its, dict) else None
            yield Redirect(None if port is None else nftset.port_range(port))
        elif kind == "masquerade":
            yield NewSource(device=True)
        elif kind == "snat":
            addresses = nftset.place(its.get("addr")).addresses
            yield NewSource(addresses[0] if addresses and addresses[0] == addresses[1] else None)
        elif kind == "mangle":
            yield from self._mark(its)
        else:
            raise NotUnderstood

    def _destination(self, its: Mapping[str, Any]) -> Iterator[Part]:
        if "flags" in its and "netmap" in listed(its["flags"]):
            raise NotUnderstood
        address = its.get("addr")
        if not (isinstance(address, dict) and "map" in address):
            yield NewDestination(nftset.place(address, its.get("port")))
            return
        if "port" in its:
            raise NotUnderstood
        found = mapped(address["map"]["data"], self._sets)
        if _is_tossed(address["map"]["key"]):
            yield Toss(tuple(NewDestination(nftset.place(value)) for _, value in found))
            return
        yield from implied(address["map"]["key"])
        key = nftset.fields_of(address["map"]["key"])
        yield NewDestination(key=key, map=nftset.elements(key, found, nftset.place, pairs=True))

    def _mark(self, its: Mapping[str, Any]) -> Iterator[Part]:
        try:
            target = nftset.field_of(its["key"])
        except NotUnderstood:
            return  # such as an option of TCP
        if target not in (Field.MARK, Field.CT_MARK):
            return
        try:
            value = its["value"]
            if isinstance(value, dict) and "map" in value:
                key, found = nftset.fields_of(value["map"]["key"]), mapped(value["map"]["data"], self._sets)
                yield from implied(value["map"]["key"])
                yield Mark(target, target, key=key, map=nftset.elements(key, found, _number, pairs=True))
                return
            source, keep, flip = _combined(value)
        except (NotUnderstood, KeyError, TypeError, ValueError, AttributeError):
            yield Mark(target, None)
            return
        yield Mark(target, source or target, keep if source is not None else 0, flip)


def _number(value: Any) -> int:
    if type(value) is not int:
        raise NotUnderstood
    return value


def _is_asked(expression: Any) -> bool:
    """Whether an expression asks something, rather than do something."""
    match expression:
        case {"xt": {"type": "match"}}:
            return True
        case dict():
            return not expression.keys().isdisjoint({"match", "limit", "quota", "ct count", "meter", "set"})
    return False


def _is_tossed(key: Any) -> bool:
    """Whether a map is asked by a number that says nothing of the packet: kube-proxy chooses endpoints so."""
    return isinstance(key, dict) and not key.keys().isdisjoint({"numgen", "jhash", "symhash"})


def _verdict(value: Any) -> End | Return | Jump | None:
    kind, its = nftset.only(value)
    if kind in ("accept", "drop"):
        return End(kind)
    if kind == "return":
        return Return()
    if kind in ("jump", "goto") and isinstance(its, dict):
        return Jump(str(its["target"]), goto=kind == "goto")
    if kind == "continue":
        return None
    raise NotUnderstood


def _combined(value: Any) -> tuple[Field | None, int, int]:
    """Read what a mark is set to, as ``(field & keep) ^ flip``; a plain number has no field."""
    if type(value) is int:
        return None, 0, value
    kind, its = nftset.only(value)
    if kind in ("&", "|", "^") and isinstance(its, list) and len(its) == 2 and type(its[1]) is int:
        source, keep, flip = _combined(its[0])
        number = its[1]
        if kind == "&":
            return source, keep & number, flip & number
        if kind == "|":
            return source, keep & ~number, (flip & ~number) | number
        return source, keep, flip ^ number
    found = nftset.field_of(value)
    if found not in (Field.MARK, Field.CT_MARK):
        raise NotUnderstood
    return found, 0xFFFFFFFF, 0


def parse(answer: str) -> list[Any]:
    """Return the objects of what ``nft --json`` printed. Raises ``ValueError`` for anything else."""
    try:
        found = json.loads(answer)["nftables"]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("not what nft --json prints") from error
    if not isinstance(found, list):
        raise ValueError("not what nft --json prints")
    return found
