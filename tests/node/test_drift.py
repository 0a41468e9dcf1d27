"""Somebody takes rules of ours away, moves or doubles them: they are back before anybody calls for help."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from embedded.node import Node
from embedded.traffic import Refused, Reply, Server, eventually, probe_tcp
from tests.node.daemon import Ctrport, wait_closed, wait_open

PUBLISH = """
publish:
  - match: {container: web}
    ports: ["8080:80", "127.0.0.1:8081:80"]
  - match: {container: db}
    ports: ["9000-9002:90-92"]
  - match: {container: late}
    ports: ["8082:80"]
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

    def was_repaired(self, times: int) -> bool:
        """Whether it was, so often since the daemon started."""
        return self.repairs >= times

    @property
    def told(self) -> list[str]:
        """What was said of drift."""
        return [line for line in self.ctrport.messages.splitlines() if " drift " in line]

    def is_in_order(self) -> bool:
        """Where it matters: host addresses before wildcards, and the operator's rules before all."""
        listed = self.node.run("iptables-nft", "-t", "nat", "-S", "DOCKER").stdout
        forward = self.node.run("iptables-nft", "-S", "FORWARD").stdout.splitlines()
        jumps = [line.rpartition(" ")[2] for line in forward[1:3]]
        return listed.index("127.0.0.1/32") < listed.index("--dport 8080") and jumps == [
            "DOCKER-USER",
            "DOCKER-FORWARD",
        ]

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
    return lambda world: [world.node.run(*command.split(" "), check=False) for command in commands]


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
        r"\d+ rules gone \(the jumps of ",
    ),
    "all chains deleted": (
        # Of what comes back between the two the second is told that it is in use.
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
    do(world)
    eventually(lambda: world.repairs > repairs, what="the repair")
    world.open()
    eventually(lambda: _ours(world.rules()) == _ours(world.whole), what="the tables being as before")
    assert world.is_in_order()
    repair = world.ctrport.status()["last_repair"]
    assert re.search(said, repair), repair
    assert re.search(r"; repaired after \d+ ms$", repair)
    assert isinstance(probe_tcp(world.node.client, world.node.address, 8081, timeout=0.5), Refused)
    world.node.run("iptables-nft", "-D", "FORWARD", "-s", "203.0.113.0/24", "-j", "DROP", check=False)


def test_what_others_do_with_their_own_is_let_pass(world: World) -> None:
    before = world.ctrport.status()
    for number in range(20):
        world.node.run("iptables-nft", "-t", "nat", "-N", f"KUBE-{number}")
    world.node.run("nft", "add table ip firewall { chain input { type filter hook input priority 0; }; }")
    # Nor does what ctrport writes itself make it look.
    world.ctrport.configure(PUBLISH)
    other = world.node.start("other")
    world.node.delete(other)
    world.write("nat", f"-D {world.rule('nat', 'DOCKER', '--dport 8080 ')}")
    eventually(lambda: world.repairs > before["repairs"], what="what is ours being looked after")
    after = world.ctrport.status()
    assert after["repairs"] == before["repairs"] + 1
    assert after["transactions"] == before["transactions"] + 1
    world.open()


def test_what_happens_together_is_put_right_together(world: World) -> None:
    """A container comes and another goes while the rules are taken away: nothing is said to have failed."""
    world.ctrport.log.write_text("")
    with world.ctrport.frozen():
        world.node.run("nft", "flush", "ruleset")
        late = world.node.start("late")
        Server(late, 80)
    wait_open(world.node, 8082, "late")
    world.open()
    with world.ctrport.frozen():
        world.node.run("iptables-nft", "-t", "nat", "-F", "DOCKER")
        world.node.delete(late)
    wait_closed(world.node, 8082)
    world.open()
    eventually(lambda: _ours(world.rules()) == _ours(world.whole), what="the tables being as before")
    assert "trying again" not in world.ctrport.messages


def test_a_switch_that_was_switched_off_is_on_again(world: World) -> None:
    """The kernel announces it to nobody: it is looked at every 10 seconds."""
    repairs = world.repairs
    world.node.sysctl("net/ipv4/conf/docker0/route_localnet", 0)
    eventually(lambda: world.repairs > repairs, within=25, what="the repair")
    world.open()
    assert re.fullmatch(
        r"route_localnet off: docker0; repaired after at most \d+ s", world.ctrport.status()["last_repair"]
    )


def test_the_same_again_and_again_is_said_three_times_a_minute(world: World) -> None:
    assert world.ctrport.stop() == 0  # what was said before is not to count
    world.ctrport.start()
    world.ctrport.log.write_text("")
    for turn in range(1, 6):
        world.node.run("iptables-nft", "-t", "nat", "-F", "DOCKER-HAIRPIN")
        eventually(partial(world.was_repaired, turn), what="the repair")
    assert len(world.told) == 3, world.told


def _ours(rules: list[str]) -> list[str]:
    """Rules of one rank may stand in any order."""
    return sorted(rule for rule in rules if MARK in rule)
