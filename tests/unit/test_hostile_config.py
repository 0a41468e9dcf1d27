"""Configurations and port mappings of any content: a meaning or a sentence, within seconds and megabytes."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shlex
import socket
import time
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from ctrport import config, configfiles, ports
from ctrport.claims import Claims
from ctrport.config import Config, ConfigError, Problem
from ctrport.configfiles import Unreadable
from ctrport.firewall import text
from ctrport.model import Mapping, PortRange, Protocol
from ctrport.ports import PortSpecError
from tests.unit import hostile, strategies
from tests.unit.hostile import fuzz
from tests.unit.test_config_problems import MANY, PIECES

EXAMPLE = (Path(__file__).parents[2] / "config.example.yaml").read_text()
VALID = """\
containerd:
  address: /run/k3s/containerd/containerd.sock
  namespaces: [default, k8s.io]
firewall: {backend: iptables-nft, chain: PORTS, position: last, localhost: false, masquerade: all, on_stop: remove}
networks: [{bridge: docker0}]
publish:
  - match: {namespace: default, container: "web-*", labels: {app: web, "a b": ""}}
    ports: ["8080:80", "127.0.0.1:5353:53/udp", "[::1]:81:81", "9000-9010:9000-9010", "100-200:7", "127.0.0.1::8"]
    sources: [192.0.2.0/24, "2001:db8::/32"]
    interface: eth0
  - match: {pod: {namespace: kube-system, name: "dns-?", labels: {k8s-app: dns}}}
    ports: ["53:53/udp"]
"""

# What is promised of each.

_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")


def outcome(content: str) -> Config | None:
    """Return what a text is as a configuration, None where it is refused in good words."""
    try:
        return config.parse(content, "f")
    except ConfigError as error:
        said = error.problems
    lines = _BREAK.split(content)
    assert said
    assert len(said) == len(set(said)) <= 2 * len(content) + 1
    assert list(said) == sorted(said)
    for problem in said:
        in_good_words(problem)
        assert 1 <= problem.line <= len(lines)
        assert 1 <= problem.column <= len(lines[problem.line - 1]) + 1
    return None


def in_good_words(problem: Problem) -> None:
    assert str(problem).isprintable()
    assert len(problem.message) < 500
    assert problem.message.strip() == problem.message != ""


def is_in_order(its: Config | None) -> None:
    """Check that nothing of a configuration that was taken can become more than a word of a rule."""
    if its is None:
        return
    for name in (*its.networks, its.firewall.chain, *(d.access.interface or "x" for d in its.publish)):
        assert text.CHAIN_NAME.fullmatch(name) or re.fullmatch("[A-Za-z0-9_.:@-]{1,15}", name, re.ASCII)
        assert shlex.split(name) == [name]
    for declaration in its.publish:
        assert declaration.mappings
        assert re.fullmatch(r"f:[1-9][0-9]*", declaration.source)
        assert all(ports.parse(str(mapping)) == mapping for mapping in declaration.mappings)
        assert all(re.fullmatch("[0-9a-f.:]+/[0-9]+", str(source)) for source in declaration.access.sources)


# Whole files with something wrong in them.

Path_ = tuple[Any, ...]
values = (
    hostile.texts
    | st.none()
    | st.sampled_from(
        [[], {}, [[]], {"": None}, 0, -1, 10**400, 1.5e308, True, "80:80", "[::1]:80:80", "a*", "1-65535:1"]
    )
    | st.lists(hostile.texts, max_size=3)
    | st.dictionaries(hostile.texts, hostile.texts, max_size=3)
)


def places(node: object, above: Path_ = ()) -> Iterable[Path_]:
    """Return where something stands in a tree."""
    children: Iterable[tuple[Any, object]] = ()
    if isinstance(node, dict):
        children = node.items()
    elif isinstance(node, list):
        children = enumerate(node)
    for key, child in children:
        yield (*above, key)
        yield from places(child, (*above, key))


PLACES = list(places(yaml.safe_load(VALID)))


def changed(changes: list[tuple[Path_, bool, Any]]) -> Any:
    """Return the valid configuration with these values, or keys, in place of its own."""
    tree = yaml.safe_load(VALID)
    for place, is_key, value in changes:
        parent = tree
        try:
            for step in place[:-1]:
                parent = parent[step]
            if is_key and isinstance(parent, dict) and isinstance(value, str):
                parent[value] = parent.pop(place[-1])
            else:
                parent[place[-1]] = value
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took that place away
    return tree


trees = st.lists(st.tuples(st.sampled_from(PLACES), st.booleans(), values), min_size=1, max_size=3).map(changed)
DUMPS: list[Callable[[Any], str]] = [
    json.dumps,
    lambda tree: json.dumps(tree, ensure_ascii=False, indent=1),
    lambda tree: str(yaml.safe_dump(tree, allow_unicode=True)),
    lambda tree: str(yaml.safe_dump(tree, default_flow_style=True, width=20, line_break="\r\n")),
    lambda tree: str(yaml.safe_dump(tree, default_style="|", explicit_start=True)),
]


@fuzz(600)
@given(trees, st.sampled_from(DUMPS))
def test_a_file_with_other_values_is_a_config_or_problems(tree: Any, dump: Callable[[Any], str]) -> None:
    is_in_order(outcome(dump(tree)))


BITS = (
    *PIECES,
    *(piece for piece in hostile.PIECES if len(piece) < 50),
    *(
        "&a ",
        "*a",
        "&a [*a]",
        "<<: *a\n",
        "? [a]\n: b\n",
        "!!python/object/apply:os.system [x]\n",
        "!!binary x",
        "!<x> ",
    ),
    *("!!int 1", "!!map {}", "\ufeff", "\r\n", "\r", "\t", "%TAG ! x\n", "%YAML 9.9\n", "--- ", "...", ">-\n", "|2\n"),
    *(
        "9" * 400,
        "-.inf",
        "[" * 40,
        "{a: " * 40,
        "]",
        "}",
        "- " * 40,
        "\n" + " " * 300,
        '"\\x',
        '"\\U00110000"',
        "@",
        "`",
    ),
)
edits = st.lists(
    st.tuples(
        st.sampled_from(["insert", "replace", "delete", "double"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 12),
        st.sampled_from(BITS),
    ),
    min_size=1,
    max_size=4,
)


def edited(content: str, changes: list[tuple[str, float, int, str]]) -> str:
    """Return a text with these edits, each so far along and of so many characters, or doubled lines."""
    for what, along, length, bit in changes:
        at = int(along * (len(content) + 1))
        if what == "double":
            lines = content.splitlines(keepends=True)
            at = int(along * len(lines))
            content = "".join([*lines[:at], *lines[at : at + length % 3 + 1] * 2, *lines[at + length % 3 + 1 :]])
        else:
            end = at if what == "insert" else at + length
            content = content[:at] + ("" if what == "delete" else bit) + content[end:]
    return content


@fuzz(800)
@given(st.sampled_from([VALID, VALID, MANY, EXAMPLE]), edits)
@example(VALID, [("insert", 0.0, 1, "\ufeff")])
@example(VALID.replace("\n", "\r\n"), [("insert", 0.5, 1, "\t")])
@example(VALID.replace("\n", "\u2028"), [("insert", 0.5, 1, "\0")])
def test_an_edited_file_is_a_config_or_problems(content: str, changes: list[tuple[str, float, int, str]]) -> None:
    is_in_order(outcome(edited(content, changes)))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("etc")


@fuzz(400)
@given(st.binary(max_size=60) | st.tuples(edits, st.binary(max_size=3), st.floats(0, 1)))
@example(b"\xff\xfep\0u\0")
@example(b"\xef\xbb\xbf{}")
@example(b"a: \xed\xa0\x80")
def test_any_bytes_are_a_config_or_said_to_be_none(directory: Path, content: Any) -> None:
    if not isinstance(content, bytes):
        changes, bit, along = content
        whole = edited(VALID, changes).encode(errors="surrogatepass")
        at = int(along * len(whole))
        content = whole[:at] + bit + whole[at:]
    path = directory / "config.yaml"
    path.write_bytes(content)
    try:
        content.decode()
    except UnicodeDecodeError:
        with pytest.raises(Unreadable, match=r": byte \d+ is not UTF-8; expected YAML text$"):
            configfiles.load(str(path))
        return
    try:
        configfiles.load(str(path))
    except ConfigError as error:
        for problem in error.problems:
            in_good_words(problem)


@pytest.mark.parametrize(
    "name", [b"a\nb.yaml", b"\xff.yaml", b"\x1b[2J.yaml", b"-.yaml", b"'\".yaml", b"a:1:1: b.yaml"]
)
def test_a_part_may_be_called_anything(tmp_path: Path, name: bytes) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "config.yaml").touch()
    part = os.path.join(os.fsencode(tmp_path), b"conf.d", name)
    with open(part, "wb") as file:
        file.write(b"publish: [{match: {container: web}, ports: ['8080:80']}]")
    (one,) = configfiles.load(str(tmp_path / "config.yaml")).publish
    assert one.source == f"{os.fsdecode(part)}:1"


# Few bytes that stand for much.

laughs = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
many = 6000
BOMBS = {
    "aliases that multiply": f"a0: &a0 [x]\n{laughs}publish: *a11\n",
    "lists within lists": "[" * 100_000,
    "mappings within mappings": "a: " + "{a: " * 100_000,
    "blocks within blocks": "".join(" " * i + "-\n" for i in range(1000)),
    "keys that are unknown": "".join(f"k{i}: 1\n" for i in range(many)),
    "labels without a value": f"publish: [{{match: {{labels: {{{', '.join(f'k{i}: ' for i in range(many))}}}}}}}]",
    "every port again": "publish: [{match: {container: a}, ports: [" + "'1-65535:1-65535', " * many + "]}]",
    "every port of many addresses": "publish:\n- match: {container: a}\n  ports: ["
    + "".join(f"'127.0.{i // 250}.{i % 250}:1-65535:1-65535', " for i in range(1000))
    + "]",
    "every port by aliases": "publish:\n- match: {container: a}\n  ports: [&a '1-65535:1-65535'" + ", *a" * many + "]",
    "ports one by one, then all": "publish:\n- match: {container: a}\n  ports: ["
    + "".join(f"'{i}:{i}', " for i in range(1, 2 * many, 2))
    + "".join(f"'127.0.0.{i}:1-65535:1-65535', " for i in range(200))
    + "]",
    "a glob of many stars": f"publish: [{{match: {{container: '{'*a' * 20_000}'}}, ports: ['1:1']}}]",
    "a glob of many brackets": f"publish: [{{match: {{container: '{'[ab-c]' * 9000}['}}, ports: ['1:1']}}]",
    "one long word": "x" * 300_000,
    "one long text": f'containerd: {{address: "/{"x" * 300_000}"}}',
    "many lines": "\n" * 100_000 + "publish: x",
    "many digits": f"firewall: {{reserve_limit: {'9' * 100_000}, poll_interval: 1{'0' * 100_000}}}",
    "many documents": "--- a\n" * many,
    "many anchors": f"publish: [{', '.join(f'&a{i} x' for i in range(many))}]",
    "many tags": f"publish: [{'!!python/object:x x, ' * 2000}]",
    "many directives": "%TAG !a! b\n" * 2000 + "--- {}",
}


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
def test_what_is_short_to_write_is_short_to_check(content: str) -> None:
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    is_in_order(outcome(content))
    assert time.process_time() - began < 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


@fuzz(200)
@given(st.lists(strategies.mappings(), max_size=12), st.integers(0, 2**32))
def test_who_claims_a_port_is_found_as_by_looking_at_each_pair(wanted: list[Mapping], seed: int) -> None:
    few = random.Random(seed)
    chosen: list[Mapping] = []
    for mapping in wanted:
        first = few.randint(1, 30)
        its = PortRange(first, few.randint(first, 40))
        host_ip = few.choice(
            [None, None, mapping.host_ip, *map(IPv4Address, ("0.0.0.0", "127.0.0.1")), IPv6Address("::")]
        )
        chosen.append(Mapping(host_ip, few.choice([its, its, None]), its, few.choice([Protocol.TCP, mapping.protocol])))
    claims = Claims()
    for at, mapping in enumerate(chosen):
        rivals = [other for other in chosen[:at] if other.overlaps(mapping)]
        found = claims.claim(mapping, str(at))
        assert (found is None) == (not rivals)
        assert found is None or chosen[int(found)] in rivals


# The grammar of -p.

_PORT = "[0-9]{1,5}"
_RANGE = f"{_PORT}(?:-{_PORT})?"
_SPEC = re.compile(
    rf"(?:(?:(?P<v4>[0-9.]+)|\[(?P<v6>[0-9a-fA-F:.]+)\]):(?P<on>{_RANGE})?:|(?P<host>{_RANGE}):)?"
    rf"(?P<container>{_RANGE})(?:/(?P<protocol>tcp|udp|sctp))?",
    re.ASCII | re.IGNORECASE,
)


def as_docker_would(spec: str) -> Mapping | None:
    """Return what a mapping means, read in another way than the product's: one expression, and inet_pton(3)."""
    found = _SPEC.fullmatch(spec)
    if found is None:
        return None
    try:
        container, host = _range(found["container"]), _range(found["on"] or found["host"])
        host_ip = _address(found["v4"], found["v6"])
    except (ValueError, OSError):
        return None
    assert container is not None
    if host is not None and len(container) != 1 and len(container) != len(host):
        return None
    return Mapping(host_ip, host, container, Protocol((found["protocol"] or "tcp").lower()))


def _range(written: str | None) -> PortRange | None:
    if written is None:
        return None
    numbers = [int(number) for number in written.split("-")]
    if "-".join(map(str, numbers)) != written:
        raise ValueError("leading zeros")
    return PortRange(numbers[0], numbers[-1])


def _address(v4: str | None, v6: str | None) -> IPv4Address | IPv6Address | None:
    if v4 is not None:
        packed = socket.inet_pton(socket.AF_INET, v4)
        if ".".join(map(str, packed)) != v4:
            raise ValueError("leading zeros")
        return IPv4Address(packed)
    if v6 is None:
        return None
    packed = socket.inet_pton(socket.AF_INET6, v6)
    if packed.startswith(bytes(10) + b"\xff\xff"):
        raise ValueError("an IPv4 address")
    return IPv6Address(packed)


numbers = st.integers(1, 65535).map(str) | st.sampled_from(
    ["0", "1", "65535", "65536", "080", "00", "99999", "+1", "\u0661"]
)
ranges = numbers | st.tuples(numbers, numbers).map("-".join) | st.integers(1, 65530).map(lambda n: f"{n}-{n + 5}")
addresses = (
    st.ip_addresses(v=4).map(str)
    | st.ip_addresses(v=6).map(lambda ip: f"[{ip}]")
    | st.ip_addresses(v=6).map(lambda ip: f"[{ip.exploded.upper()}]")
    | st.sampled_from(["", "[::]", "0.0.0.0", "[::1]", "::1", "[::ffff:1.2.3.4]", "[1::2:3:4:5:6:7:8]", "[1::2.3.4.5]"])
    | st.sampled_from(
        ["[fe80::1%eth0]", "127.1", "1.2.3.4.5", "256.1.1.1", "01.2.3.4", "[127.0.0.1]", "localhost", "[]"]
    )
)
specs = st.builds(
    lambda address, host, container, protocol: (
        ":".join(part for part in (address, host, container) if part is not None) + protocol
    ),
    st.none() | addresses,
    st.none() | ranges | st.just(""),
    ranges,
    st.sampled_from(["", "", "/tcp", "/UDP", "/sctp", "/", "/icmp", "/tcp/udp", "/\u017fctp"]),
)
slips = st.lists(
    st.tuples(st.booleans(), st.floats(0, 1), st.sampled_from(["", *"0189:-/[].% tcpudsf\n\0_+\u0660"])), max_size=2
)


def with_slips(spec: str, changes: list[tuple[bool, float, str]]) -> str:
    for over, along, character in changes:
        at = int(along * len(spec))
        spec = spec[:at] + character + spec[at + over :]
    return spec


@fuzz(3500)
@given(st.builds(with_slips, specs, slips) | hostile.texts)
@example("8000-8010:80")
@example("80\n")
@example("9" * 100_000)
@example("127.0.0.1:" * 20_000)
@example("[" + ":" * 100_000 + "]:1:1")
@example("80/" + "t" * 100_000)
@example("1-" * 50_000)
def test_a_port_mapping_means_what_another_reader_finds_or_is_refused_in_a_line(spec: str) -> None:
    expected = as_docker_would(spec)
    if expected is None:
        with pytest.raises(PortSpecError) as refused:
            ports.parse(spec)
        said = str(refused.value)
        assert said.isprintable()
        assert len(said) < 400
        assert "; expected " in said
        return
    mapping = ports.parse(spec)
    assert mapping == expected
    assert ports.parse(str(mapping)) == mapping
    assert as_docker_would(str(mapping)) == mapping
