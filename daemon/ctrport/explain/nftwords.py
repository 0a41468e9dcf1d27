"""A rule in words like nft's own, out of its JSON: for people to find it again, and for nothing else. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

#: Of a set that stands in a rule so many elements are shown.
_MOST = 6


def words_of(expressions: Iterable[Any]) -> str:
    """Return the words of a rule's expressions; of what has none here the JSON."""
    return " ".join(filter(None, map(_words, expressions)))


def _words(expression: Any) -> str:
    match expression:
        case {"match": {"op": str(operator), "left": left, "right": right}}:
            said = "" if operator in ("==", "in") else f"{operator} "
            return f"{_value(left)} {said}{_value(right)}"
        case {"counter": _}:
            return ""
        case {"jump": {"target": str(chain)}}:
            return f"jump {chain}"
        case {"goto": {"target": str(chain)}}:
            return f"goto {chain}"
        case {"vmap": {"key": key, "data": data}}:
            return f"{_value(key)} vmap {_value(data)}"
        case {"dnat": {"addr": _} as its}:
            return f"dnat to {_place(its)}"
        case {"snat": {"addr": _} as its}:
            return f"snat to {_place(its)}"
        case {"redirect": {"port": port}}:
            return f"redirect to :{_value(port)}"
        case {"mangle": {"key": key, "value": value}}:
            return f"{_value(key)} set {_value(value)}"
        case {"limit": {"rate": rate, "per": per, **rest}}:
            return f"limit rate {'over ' if rest.get('inv') else ''}{rate}/{per}"
        case {"xt": {"type": str(kind), "name": str(name)}}:
            return f"({kind} {name} of iptables)"
        case dict() if len(expression) == 1:
            [(kind, its)] = expression.items()
            return str(kind) if its is None or kind in ("log", "reject", "masquerade") else _json(expression)
    return _json(expression)


def _value(value: Any) -> str:
    match value:
        case {"payload": {"protocol": str(protocol), "field": str(field)}}:
            return f"{protocol} {field}"
        case {"meta": {"key": str(key)}}:
            return key if key.startswith(("iif", "oif")) else f"meta {key}"
        case {"ct": {"key": str(key), **rest}}:
            return " ".join(["ct", *([str(rest["dir"])] if "dir" in rest else []), key])
        case {"fib": {"result": str(result), "flags": flags}}:
            return f"fib {' . '.join(map(str, flags if isinstance(flags, list) else [flags]))} {result}"
        case {"prefix": {"addr": address, "len": length}}:
            return f"{_value(address)}/{length}"
        case {"range": [first, last]}:
            return f"{_value(first)}-{_value(last)}"
        case {"concat": list(parts)}:
            return " . ".join(map(_value, parts))
        case {"set": list(listed)}:
            shown = [_element(each) for each in listed[:_MOST]] + ["..."] * (len(listed) > _MOST)
            return f"{{ {', '.join(shown)} }}"
        case {"elem": {"val": its}}:
            return _value(its)
        case {"map": {"key": key, "data": data}}:
            return f"{_value(key)} map {_value(data)}"
        case {"&": [left, right]}:
            return f"{_value(left)} & {_value(right)}"
        case {"|": [left, right]}:
            return f"{_value(left)} | {_value(right)}"
        case {"^": [left, right]}:
            return f"{_value(left)} ^ {_value(right)}"
        case list():
            return ",".join(map(_value, value))
        case str() | int():
            return str(value)
    return _json(value)


def _place(its: dict[str, Any]) -> str:
    return _value(its["addr"]) + (f":{_value(its['port'])}" if "port" in its else "")


def _element(each: Any) -> str:
    if isinstance(each, list) and len(each) == 2:
        key, value = each
        return f"{_value(key)} : {_words(value) if isinstance(value, dict) else _value(value)}"
    return _value(each)


def _json(value: Any) -> str:
    return json.dumps(value)
