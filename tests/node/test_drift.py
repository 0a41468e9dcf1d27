"""Somebody takes rules of ours away, moves or doubles them: they are back before anybody calls for help."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest

from embedded.node import Node
from embedded.traffic import Refused, Reply, Server, eventually, probe_tcp
from tests.node.daemon import Ctrport, wait_open

PUBLISH = """
publish:
  - match: {container: web}
    ports: ["8080:80", "127.0.0.1:8081:80"]
  - match: {container: db}
    ports: ["9000-9002:90-92"]
"""
MARK = "ctrport"


class World:
    """A node with a published web and db, in both families, and the tables as they should be."""

    def __init__(self, node: Node) -> None:
        self.node = node
        node.add_network("docker0", subnet="172.17.0.0/16", subnet6="fd00:17::/64", ip_masq=False)
        for name, ports in (("web", [80]), ("db", [90, 91, 92])):
            container = node.start(name)
            for address in ("0.0.0.0", "::"):
                Server(container, ports, address=address)
        self.ctrport = Ctrport(node)
        self.ctrport.configure(PUBLISH)
        self.ctrport.start()
        self.open()
        self.whole = self.rules()

    def rules(self) -> list[str]:
        """Ours, in their order, and what of others stands between."""
        return self.node.tables().splitlines()

    def open(self) -> None:
        """Every published port answers, from where it is to."""
        node = self.node
        for port, name in ((8080, "web"), (9000, "db"), (9002, "db")):
            wait_open(node, port, name)
            wait_open(node, port, name, address=node.address6)
        eventually(lambda: isinstance(probe_tcp(node, "127.0.0.1", 8081), Reply), what="127.0.0.1:8081")

    @property
    def repairs(self) -> int:
        return int(self.ctrport.status()["repairs"])

    @property
    def told(self) -> list[str]:
        """What was said of drift."""
        return [line for line in self.ctrport.messages.splitlines() if "drift:" in line]

    def rule(self, table: str, chain: str, like: str, program: str = "iptables-nft") -> str:
        """The first rule of a chain with these words in it, behind the -A."""
        listed = self.node.run(program, "-t", table, "-S", chain).stdout.splitlines()
        return next(line.removeprefix("-A ") for line in listed if f"{like}" in f"{line} ")

    def write(self, table: str, *lines: str, program: str = "iptables-nft") -> None:
        """Commit lines to a table as somebody else."""
        text = "\n".join([f"*{table}", *lines, "COMMIT", ""])
        self.node.run(f"{program}-restore", "--noflush", input=text)


Do = Callable[[World], object]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Node() as node:
        node.start_containerd()
        yield World(node)


def delete(table: str, chain: str, like: str, program: str = "iptables-nft") -> Do:
    return lambda world: world.write(table, f"-D {world.rule(table, chain, like, program)}", program=program)


def double(table: str, chain: str, like: str) -> Do:
    return lambda world: world.write(table, f"-A {world.rule(table, chain, like)}")


def to_the_end(table: str, chain: str, like: str) -> Do:
    def move(world: World) -> None:
        rule = world.rule(table, chain, like)
        world.write(table, f"-D {rule}", f"-A {rule}")

    return move


def shell(*commands: str) -> Do:
    return lambda world: [world.node.run(*command.split(" ")) for command in commands]


def left_over(world: World) -> None:
    rule = world.rule("nat", "DOCKER", "--dport 8080 ").replace("default/web", "default/old")
    world.write("nat", f"-A {rule}")


#: What somebody does, and what is said of it, as a regular expression.
DAMAGES: dict[str, tuple[Do, str]] = {
    "a rule deleted": (
        delete("nat", "DOCKER", "--dport 8080 "),
        r"1 rule gone \(what publishes default/web 8080:80/tcp\), by iptables-nft-re \(pid \d+\)",
    ),
    "a rule of IPv6 deleted": (
        delete("filter", "DOCKER", "--dport 80 ", "ip6tables-nft"),
        r"1 rule gone \(what publishes default/web 8080:80/tcp\), by ip6tables-nft-r \(pid \d+\)",
    ),
    "a chain of nat flushed": (shell("iptables-nft -t nat -F DOCKER"), r"\d+ rules gone \(what publishes default/"),
    "a chain of filter flushed": (shell("iptables-nft -F DOCKER-FORWARD"), r"\d+ rules gone, by iptables-nft"),
    "all chains flushed": (
        shell("iptables-nft -F", "iptables-nft -t nat -F", "ip6tables-nft -t nat -F"),
        r"\d+ rules gone \(the jumps of FORWARD",
    ),
    "all chains deleted": (
        shell("iptables-nft -t nat -F", "iptables-nft -t nat -X", "iptables-nft -F", "iptables-nft -X"),
        r"rules gone \(the jumps",
    ),
    "a jump removed": (
        delete("nat", "PREROUTING", "-j DOCKER"),
        r"1 rule gone \(the jumps of PREROUTING\), by iptables-nft",
    ),
    "a jump pushed down": (
        shell("iptables-nft -I FORWARD -s 203.0.113.0/24 -j DROP"),
        r"out of place: a rule of FORWARD in filter, by iptables-nft \(",
    ),
    "a rule twice": (
        double("nat", "DOCKER", "--dport 8080 "),
        r"out of place: the chain DOCKER of nat, by iptables-nft",
    ),
    "rules in another order": (
        to_the_end("nat", "DOCKER", "-d 127.0.0.1/32"),
        r"out of place: the chain DOCKER of nat, by",
    ),
    "a rule with our mark that nobody asked for": (left_over, r"too many: 1 rule, by iptables-nft"),
    "a table gone": (shell("nft delete table ip nat"), r"\d+ rules gone \(the jumps of PREROUTING, OUTPUT"),
    "everything gone": (
        shell("nft flush ruleset"),
        r"\d+ rules gone \(the jumps of .*; what publishes .*, by nft \(pid \d+\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_taken_is_back_at_once_and_who_took_it_is_named(world: World, damage: str) -> None:
    (do, said), repairs = DAMAGES[damage], world.repairs
    world.ctrport.log.write_text("")
    do(world)
    eventually(lambda: world.repairs > repairs and world.told, what="the repair")
    world.open()
    eventually(lambda: _ours(world.rules()) == _ours(world.whole), what="the tables being as before")
    assert re.search(said, world.told[0]), world.told
    assert re.search(r"repaired after \d+ ms$", world.told[0])
    assert isinstance(probe_tcp(world.node.client, world.node.address, 8081, timeout=0.5), Refused)
    world.node.run("iptables-nft", "-D", "FORWARD", "-s", "203.0.113.0/24", "-j", "DROP", check=False)


def _ours(rules: list[str]) -> list[str]:
    """Rules of one rank may stand in any order."""
    return sorted(rule for rule in rules if MARK in rule)
