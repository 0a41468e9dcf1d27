"""firewall.backend: nftables on a node: drift, FORWARD and tables of others, and what is left when it goes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from embedded.node import Node
from embedded.traffic import Refused, Reply, Server, TimedOut, eventually, probe_tcp
from tests.node.daemon import ROOT, Ctrport, wait_closed, wait_open

PUBLISH = """
firewall: {backend: nftables}
publish:
  - match: {container: web}
    ports: ["8080:80", "127.0.0.1:8081:80"]
  - match: {container: db}
    ports: ["9000-9002:90-92", "9100-9101:9100-9101", "93"]
  - match: {container: db}
    ports: ["8083:90"]
    sources: [198.51.100.2, "2001:db8:51::2"]
  - match: {container: late}
    ports: ["8082:80"]
"""
V4, V6 = "ip ctrport", "ip6 ctrport"


def tables(node: Node) -> list[str]:
    """Ours, without what they count, and in an order that is not that of a hash."""
    return [line for table in (V4, V6) for line in listed(node, f"table {table}")]


def listed(node: Node, what: str) -> list[str]:
    text = node.run("nft", "--stateless", "list", *what.split(" ")).stdout
    return sorted(re.split(r",\n?\s+|\n|elements = \{ | \}", text))


class World:
    """A node with a published web and db, in both families, and our tables as they should be."""

    def __init__(self, node: Node) -> None:
        self.node = node
        node.sysctl("net/ipv4/icmp_ratelimit", 0)
        node.add_network("docker0", subnet="172.17.0.0/16", subnet6="fd00:17::/64", ip_masq=False)
        for name, ports in (("web", [80, 99]), ("db", [90, 91, 92, 93, 9100, 9101])):
            container = node.start(name)
            for address in ("0.0.0.0", "::"):
                Server(container, ports, address=address)
        self.ctrport = Ctrport(node)
        self.ctrport.configure(PUBLISH)
        self.ctrport.start()
        self.open()
        self.whole = tables(node)

    def open(self) -> None:
        """Every published port answers, from where it is to."""
        node = self.node
        for port, name in ((8080, "web"), (8083, "db"), (9000, "db"), (9002, "db"), (9101, "db"), (self.chosen, "db")):
            wait_open(node, port, name)
            wait_open(node, port, name, address=node.address6)
        eventually(lambda: isinstance(probe_tcp(node, "127.0.0.1", 8081), Reply), what="127.0.0.1:8081")

    @property
    def chosen(self) -> int:
        return int(str(self.ctrport.publication("93/tcp")["bound"]).partition(":")[0])

    @property
    def repairs(self) -> int:
        return int(self.ctrport.status()["repairs"])

    @property
    def last_repair(self) -> str:
        return str(self.ctrport.status()["last_repair"])

    @property
    def warnings(self) -> list[str]:
        return list(self.ctrport.status()["warnings"])

    def nft(self, *lines: str) -> None:
        """Commit lines as somebody else."""
        self.node.run("nft", "-f", "-", input="".join(f"{line}\n" for line in lines))

    def handle(self, chain: str, like: str, table: str = V4) -> str:
        """What nft calls a rule, by words in it."""
        text = self.node.run("nft", "--handle", "list", "chain", *table.split(" "), chain).stdout
        return next(line.rpartition("# handle ")[2] for line in text.splitlines() if like in line)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Node() as node:
        node.start_containerd()
        yield World(node)


Do = Callable[[World], object]


def nft(*lines: str) -> Do:
    return lambda world: world.nft(*lines)


def rule(chain: str, like: str) -> Do:
    return lambda world: world.nft(f"delete rule {V4} {chain} handle {world.handle(chain, like)}")


#: What somebody does, and what is said of it, as a regular expression.
DAMAGES: dict[str, tuple[Do, str]] = {
    "an element deleted": (
        nft(f"delete element {V4} host-ports {{ tcp . 8080 }}"),
        r"1 rule gone \(what publishes default/web 8080:80/tcp\), by nft \(pid \d+\)",
    ),
    "one of IPv6 deleted": (
        nft(f"delete element {V6} host-ports {{ tcp . 8080 }}"),
        r"1 rule gone \(what publishes default/web 8080:80/tcp\), by nft",
    ),
    "a range deleted": (
        nft(f"delete element {V4} host-ranges-tcp {{ 9100-9101 }}"),
        r"1 rule gone \(what publishes default/db 9100-9101:9100-9101/tcp\), by nft",
    ),
    "an element edited": (
        nft(
            f"delete element {V4} host-ports {{ tcp . 8080 }}",
            f'add element {V4} host-ports {{ tcp . 8080 comment "ctrport default/web 8080:80/tcp" : 172.17.0.9 . 80 }}',
        ),
        r"1 rule edited \(what publishes default/web 8080:80/tcp\), by nft",
    ),
    "a comment edited": (
        nft(
            f"delete element {V4} host-ports {{ tcp . 8080 }}",
            f"add element {V4} host-ports {{ tcp . 8080 : 172.17.0.2 . 80 }}",
        ),
        r"1 rule edited \(what publishes default/web 8080:80/tcp\), by nft",
    ),
    "an element added": (
        nft(f"add element {V4} host-ports {{ tcp . 8888 : 172.17.0.2 . 80 }}"),
        r"too many: 1 rule, by nft",
    ),
    "all elements deleted": (
        nft(*(f"flush map {V4} {name}" for name in ("host-ports", "host-ports-at", "host-ranges-tcp", "from-32"))),
        r"\d+ rules gone \(what publishes default/",
    ),
    "a rule deleted": (
        rule("to-containers", "@host-ports "),
        r"gone or changed: the chain to-containers of ip ctrport, by nft",
    ),
    "a rule added": (
        nft(f"insert rule {V4} forward drop"),
        r"gone or changed: the chain forward of ip ctrport, by nft",
    ),
    "a chain flushed": (nft(f"flush chain {V4} output"), r"gone or changed: the chain output of ip ctrport, by nft"),
    "all rules deleted": (
        nft(f"flush table {V4}"),
        r"gone or changed: the chain localhost-guard of ip ctrport, .* and \d+ more, by nft",
    ),
    "a policy set": (
        nft(f"add chain {V4} forward {{ type filter hook forward priority -1 ; policy drop ; }}"),
        r"gone or changed: the chain forward of ip ctrport, by nft",
    ),
    "a chain deleted": (
        nft(f"flush chain {V4} forward", f"delete chain {V4} published-flows"),
        r"gone or changed: the chain published-flows of ip ctrport, the chain forward of ip ctrport, by nft",
    ),
    "a set of another kind": (
        lambda world: world.nft(
            *(f"flush chain {V4} {chain}" for chain in ("published-flows", "hairpin")),
            f"delete set {V4} published",
            f"add set {V4} published {{ type inet_service ; }}",
        ),
        r"gone or changed: the table ip ctrport",
    ),
    "put to sleep": (nft(f"add table {V4} {{ flags dormant ; }}"), r"gone or changed: the table ip ctrport, by nft"),
    "a table deleted": (
        nft(f"delete table {V4}"),
        r"gone or changed: the table ip ctrport; \d+ rules gone \(what publishes default/.*\), by nft \(pid \d+\)",
    ),
    "everything gone": (
        nft("flush ruleset"),
        r"gone or changed: the table ip ctrport, the table ip6 ctrport; \d+ rules gone .*, by nft \(pid \d+\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_taken_is_back_at_once_and_who_took_it_is_named(world: World, damage: str) -> None:
    (do, said), repairs = DAMAGES[damage], world.repairs
    pattern = rf"{said}.*; repaired after \d+ ms$"
    do(world)
    # One that was before may be told of only now.
    eventually(lambda: world.repairs > repairs and re.search(pattern, world.last_repair), what=pattern)
    world.open()
    eventually(lambda: tables(world.node) == world.whole, what="the tables being as before")
    assert isinstance(probe_tcp(world.node.client, world.node.address, 8888, timeout=0.5), Refused)


def test_what_others_do_with_their_own_is_let_pass(world: World) -> None:
    before = world.ctrport.status()
    for number in range(20):
        world.node.run("iptables-nft", "-t", "nat", "-N", f"KUBE-{number}")
    world.nft("add table ip firewall", "add chain ip firewall input { type filter hook input priority 0 ; }")
    # Nor does what ctrport writes itself make it look.
    other = world.node.start("late")
    world.ctrport.wait_for("8082:80/tcp", "active")
    world.node.delete(other)
    world.ctrport.wait_for("8082:80/tcp", "waiting")
    world.nft(f"delete element {V4} host-ports {{ tcp . 8080 }}")
    eventually(lambda: world.repairs > before["repairs"], what="what is ours being looked after")
    after = world.ctrport.status()
    assert after["repairs"] == before["repairs"] + 1
    assert after["transactions"] == before["transactions"] + 5  # two a family, and the repair
    world.open()
    world.nft("delete table ip firewall")
    world.node.run("iptables-nft", "-t", "nat", "-X")


def test_what_happens_together_is_put_right_together(world: World) -> None:
    """A container comes and another goes while the tables are taken away: nothing is said to have failed."""
    world.ctrport.log.write_text("")
    with world.ctrport.frozen():
        world.node.run("nft", "flush", "ruleset")
        late = world.node.start("late")
        Server(late, 80)
    wait_open(world.node, 8082, "late")
    world.open()
    with world.ctrport.frozen():
        world.nft(f"delete table {V6}", f"flush map {V4} host-ports")
        world.node.delete(late)
    wait_closed(world.node, 8082)
    world.open()
    eventually(lambda: tables(world.node) == world.whole, what="the tables being as before")
    assert "trying again" not in world.ctrport.messages


def test_each_mapping_has_counted_its_connections(world: World) -> None:
    def counted() -> int:
        text = world.node.run("nft", "list", "map", *V4.split(" "), "host-ports").stdout
        found = re.search(r"tcp \. 8080 counter packets (\d+) bytes", text)
        assert found is not None, text
        return int(found[1])

    before = counted()
    for _ in range(3):
        assert isinstance(probe_tcp(world.node.client, world.node.address, 8080), Reply)
    assert counted() == before + 3


def test_a_restart_takes_over_what_is_there_with_the_ports_that_were_chosen(world: World) -> None:
    chosen = world.chosen
    assert f" {chosen}:93/tcp of any" in world.node.run("nft", "list", "ruleset").stdout
    world.ctrport.stop()
    for port in (8080, 9000, chosen):
        wait_open(world.node, port)
    said = world.ctrport.run("plan", "--config", str(world.ctrport.config), check=False)
    assert said.stdout == "nothing to change\n"
    assert "active" in world.ctrport.run("ps", "--config", str(world.ctrport.config)).stdout
    world.ctrport.start()
    assert world.chosen == chosen
    assert world.ctrport.transactions == 0
    assert tables(world.node) == world.whole


def test_plan_and_ps_show_what_is_missing_in_the_words_of_nft(world: World) -> None:
    config = ("--config", str(world.ctrport.config))
    world.ctrport.stop()
    world.nft(f"delete element {V4} host-ports {{ tcp . 8080 }}", f"flush chain {V6} output")
    said = world.ctrport.run("plan", *config, check=False)
    assert said.returncode == 3
    assert said.stdout.splitlines()[:2] == [
        f'+ add element {V4} host-ports {{ tcp . 8080 comment "ctrport default/web 8080:80/tcp" : 172.17.0.2 . 80 }}',
        f"+ add chain {V6} output {{ type nat hook output priority -90 ; policy accept ; }}",
    ]
    assert f"- flush chain {V6} output" in said.stdout
    assert "its rules are not all in the kernel" in world.ctrport.run("ps", *config).stdout
    # What it shows is what nft takes.
    script = "".join(f"{line[2:]}\n" for line in said.stdout.splitlines())
    world.node.run("nft", "-f", "-", input=script)
    assert tables(world.node) == world.whole
    world.ctrport.start()
    assert world.ctrport.transactions == 0


# FORWARD of iptables.

DOOR = "--mark 0x40/0x40"


def forward(world: World, program: str = "iptables-nft") -> list[str]:
    return world.node.run(program, "-S", "FORWARD").stdout.splitlines()


@pytest.fixture
def dropping(world: World) -> Iterator[World]:
    """FORWARD drops, in both families, until the test is over."""
    for program in ("iptables-nft", "ip6tables-nft"):
        world.node.run(program, "-P", "FORWARD", "DROP")
    yield world
    for program in ("iptables-nft", "ip6tables-nft"):
        world.node.run(program, "-F", "FORWARD")
        world.node.run(program, "-P", "FORWARD", "ACCEPT")
    eventually(lambda: not any(DOOR in line for line in forward(world)), what="FORWARD being left alone")
    world.open()


def test_a_forward_that_drops_gets_one_rule_for_as_long_as_it_does(dropping: World) -> None:
    world = dropping
    world.open()
    for program in ("iptables-nft", "ip6tables-nft"):
        [policy, ours] = forward(world, program)
        assert (policy, DOOR in ours) == ("-P FORWARD DROP", True)
    # Nobody gets in by it who is not published.
    assert isinstance(probe_tcp(world.node.client, "172.17.0.2", 99, timeout=0.3), TimedOut)
    world.node.client.run("ip", "route", "add", "172.17.0.0/16", "via", world.node.address)
    try:
        for port in (99, 80):
            assert isinstance(probe_tcp(world.node.client, "172.17.0.2", port, timeout=0.3), TimedOut)
        # Somebody else's mark is nobody's ticket.
        world.nft(
            "add table ip marks",
            "add chain ip marks marking { type filter hook prerouting priority 0 ; }",
            "add rule ip marks marking meta mark set 0x41",  # the answers, too
        )
        assert isinstance(probe_tcp(world.node.client, "172.17.0.2", 99, timeout=0.3), TimedOut)
    finally:
        world.node.client.run("ip", "route", "del", "172.17.0.0/16")
        world.node.run("nft", "delete", "table", "ip", "marks", check=False)


def test_the_rule_in_forward_is_put_back_and_others_see_no_mark(dropping: World) -> None:
    world = dropping
    world.open()
    world.node.run("iptables-nft", "-F", "FORWARD")
    said = r"1 rule gone \(the jumps of FORWARD\), by iptables"
    eventually(lambda: re.search(said, world.last_repair), what="the repair")
    world.nft(
        "add table inet marks",
        "add chain inet marks behind { type filter hook forward priority 10 ; }",
        "add chain inet marks late { type filter hook postrouting priority 0 ; }",
        *(f"add rule inet marks {chain} meta mark != 0 counter drop" for chain in ("behind", "late")),
    )
    world.open()
    world.nft("delete table inet marks")


def test_a_policy_agent_is_asked_before(dropping: World) -> None:
    world = dropping
    world.open()
    world.node.run("iptables-nft", "-N", "KUBE-FORWARD")
    world.node.run("iptables-nft", "-I", "FORWARD", "-j", "KUBE-FORWARD")
    eventually(lambda: DOOR in forward(world)[2] and "KUBE" in forward(world)[1], what="the agent standing first")
    world.node.run("iptables-nft", "-A", "KUBE-FORWARD", "-p", "tcp", "--dport", "80", "-j", "DROP")
    assert isinstance(probe_tcp(world.node.client, world.node.address, 8080, timeout=0.3), TimedOut)
    world.node.run("iptables-nft", "-F", "FORWARD")
    world.node.run("iptables-nft", "-F", "KUBE-FORWARD")
    world.node.run("iptables-nft", "-X", "KUBE-FORWARD")
    world.open()


def test_a_forward_of_legacy_tables_that_drops_gets_its_rule_too(world: World) -> None:
    lock = {"XTABLES_LOCKFILE": str(world.node.directory / "xtables.lock")}
    for program in ("iptables-legacy", "ip6tables-legacy"):
        world.node.run(program, "-w", "-P", "FORWARD", "DROP", env=lock)
    # Nobody announces it: it is seen when all is looked at, at the latest a minute later.
    world.nft("delete element ip ctrport host-ports { tcp . 8080 }")
    world.nft("delete element ip6 ctrport host-ports { tcp . 8080 }")
    world.open()
    for program in ("iptables-legacy", "ip6tables-legacy"):
        assert DOOR in world.node.run(program, "-w", "-S", "FORWARD", env=lock).stdout
        world.node.run(program, "-w", "-P", "FORWARD", "ACCEPT", env=lock)
    world.nft("delete element ip ctrport host-ports { tcp . 8080 }")
    world.nft("delete element ip6 ctrport host-ports { tcp . 8080 }")
    for program in ("iptables-legacy", "ip6tables-legacy"):
        listing = (program, "-w", "-S", "FORWARD")
        eventually(
            lambda listing=listing: DOOR not in world.node.run(*listing, env=lock).stdout,  # type: ignore[misc]
            what="the rule being gone",
        )
    world.open()


def test_a_table_of_others_that_drops_is_warned_of(world: World) -> None:
    world.nft(
        "add table inet other",
        "add chain inet other forward { type filter hook forward priority 0 ; policy drop ; }",
    )
    warning = "the chain forward of the table inet other drops what it does not let through itself"
    eventually(lambda: any(warning in said for said in world.warnings), what="the warning")
    assert f"warning: {warning}" in world.ctrport.run("ps").stderr
    assert f'WARNING note text="{warning}' in world.ctrport.messages
    assert isinstance(probe_tcp(world.node.client, world.node.address, 8080, timeout=0.3), TimedOut)
    [said] = [each for each in world.warnings if warning in each]
    world.node.run(*said.partition("`")[2].rstrip("`").split(" "))  # as it says
    eventually(lambda: world.warnings == [], what="the warning being over")
    world.open()
    world.nft("delete table inet other")


def test_a_chain_of_the_operators_keeps_clients_out_as_documented(world: World) -> None:
    document = (ROOT / "docs" / "operating.md").read_text()
    example = document.partition("**Your own chain**")[2].partition("```sh\n")[2].partition("```")[0]
    here = example.replace("192.0.2.7", world.node.address).replace("198.51.100.0/24", "203.0.113.0/24")
    world.node.script(here)
    try:
        assert isinstance(probe_tcp(world.node.client, world.node.address, 8080, timeout=0.3), TimedOut)
        assert isinstance(probe_tcp(world.node.client, world.node.address, 9000), Reply)
        assert isinstance(probe_tcp(world.node, world.node.address, 8080), Reply)
    finally:
        world.nft("delete table ip mine")
    world.open()


@pytest.mark.parametrize(
    ("table", "chain", "rule"),
    [
        ("cni_hostport", "hostports", "tcp dport 8082 dnat to 172.17.0.9:80"),
        ("cni_hostport", "hostip_hostports", "ip daddr 198.51.100.1 tcp dport 8000-8082 dnat to 172.17.0.9"),
        ("docker-bridges", "nat-prerouting-and-output", 'tcp dport 8082 counter dnat to 172.17.0.9:80 comment "DNAT"'),
    ],
)
def test_a_host_port_in_a_table_of_portmaps_or_dockerds_own_is_theirs(
    world: World, table: str, chain: str, rule: str
) -> None:
    world.nft(
        *(f"add table ip {table}", f"add chain ip {table} {chain}"),
        *(f"add rule ip {table} {chain} {rule}", f"add rule ip {table} {chain} tcp dport 8080 accept"),
    )
    late = world.node.start("late")
    try:
        held = f"/tcp is held by {table}"
        publication = partial(world.ctrport.publication, "8082:80/tcp")
        # Seen at the next tick.
        eventually(lambda: publication()["reason"].endswith(held), within=15, what="the port being theirs")
        world.open()
    finally:
        world.node.delete(late)
        world.nft(f"delete table ip {table}")
    world.ctrport.wait_for("8082:80/tcp", "waiting")


# How it goes.


def test_clean_leaves_the_ruleset_as_it_was() -> None:
    with Node() as node:
        node.start_containerd()
        node.add_network("docker0", subnet6="fd00:17::/64")
        node.run("iptables-nft", "-P", "FORWARD", "DROP")
        Server(node.start("web"), 80)
        node.run("nft", "-f", "-", input="add table inet mine\nadd chain inet mine input\n")
        before = listed(node, "ruleset")
        ctrport = Ctrport(node)
        for stop, ending in (("keep", "clean"), ("remove", "stop")):
            ctrport.configure(f"firewall: {{backend: nftables, on_stop: {stop}}}\n{PUBLISH.partition('nftables}')[2]}")
            ctrport.start()
            wait_open(node, 8080, "web")
            assert DOOR in node.run("iptables-nft", "-S", "FORWARD").stdout
            ctrport.stop()
            if ending == "clean":
                assert ctrport.run("clean").stdout == "every rule of ctrport is removed\n"
                assert ctrport.run("clean").stdout == "there was no rule of ctrport\n"
            assert listed(node, "ruleset") == before
            assert node.script("cat /proc/sys/net/ipv4/conf/docker0/route_localnet") == "0\n"


def test_a_table_of_our_name_that_is_somebody_elses_is_left_alone(node: Node, ctrport: Ctrport) -> None:
    node.run("nft", "-f", "-", input="add table ip ctrport\nadd chain ip ctrport mine\nadd rule ip ctrport mine drop\n")
    before = listed(node, "ruleset")
    Server(node.start("web"), 80)
    ctrport.configure(PUBLISH)
    ctrport.start(wait=False)
    assert ctrport.wait() == 1
    assert "the table ip ctrport is somebody else's" in ctrport.messages
    assert "Traceback" not in ctrport.messages
    assert ctrport.run("clean").stdout == "there was no rule of ctrport\n"
    assert [line for line in before if "ctrport" in line] == [
        line for line in listed(node, "ruleset") if "ctrport" in line
    ]


def test_without_nft_the_daemon_says_so(node: Node, ctrport: Ctrport) -> None:
    programs = node.directory / "programs"
    programs.mkdir()
    ctrport.configure(PUBLISH)
    ctrport.start(wait=False, env={"PATH": str(programs)})
    eventually(lambda: "nft is not installed: install nftables" in ctrport.messages, what="the reason")
    assert "Traceback" not in ctrport.messages


def test_a_node_without_iptables_publishes_and_is_cleaned(node: Node, ctrport: Ctrport) -> None:
    programs = node.directory / "programs"
    programs.mkdir()
    (programs / "nft").symlink_to(node.run("sh", "-c", "command -v nft").stdout.strip())
    without = {"PATH": str(programs)}
    Server(node.start("web", network=node.networks[0]), 80)
    node.run("nft", "flush", "ruleset")  # what CNI has there would be asked for
    before = listed(node, "ruleset")
    ctrport.configure(PUBLISH)
    ctrport.start(env=without)
    wait_open(node, 8080, "web")
    assert ctrport.status()["warnings"] == []
    assert "WARNING" not in ctrport.messages
    ctrport.stop()
    assert ctrport.run("clean", env=without).stdout == "every rule of ctrport is removed\n"
    assert listed(node, "ruleset") == before


def test_names_as_long_as_containerd_takes_are_written_and_listed(node: Node, ctrport: Ctrport) -> None:
    namespace, name = "n" * 60, "c" * 70
    Server(node.start(name, namespace=namespace), 80)
    ctrport.configure('firewall: {backend: nftables}\npublish:\n  - match: {container: "c*"}\n    ports: ["8080:80"]\n')
    ctrport.start()
    wait_open(node, 8080)
    tagged = f'comment "ctrport {namespace}/{name} 8080:80/tcp"'
    assert tagged in node.run("nft", "list", "map", "ip", "ctrport", "host-ports").stdout
    assert json.loads(node.run("nft", "--json", "list", "map", "ip", "ctrport", "host-ports").stdout)
    assert ctrport.run("plan", "--config", str(ctrport.config)).stdout == "nothing to change\n"
