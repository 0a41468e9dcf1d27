"""A real dockerd on the same node: with a chain of its own each publishes, and without one ctrport does not fight."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from embedded.container import Container
from embedded.dockerd import DockerContainer, Dockerd, missing
from embedded.host import CommandError, Place
from embedded.node import Node
from embedded.traffic import Refused, Reply, Server, TimedOut, eventually, probe_tcp
from tests.node.daemon import Ctrport, wait_open

#: The host ports of ctrport's containers and of dockerd's; of those, one that the other side wants too.
OURS, WANTED, SOON, DOCKERS, TAKEN = 8080, 8082, 8083, 8081, 8081
CHAIN, OWN_TABLE = "firewall: {chain: CTRPORT}\n", "firewall: {backend: nftables}\n"
PUBLISH = f"""\
publish:
  - match: {{container: web}}
    ports: ["{OURS}:80", "{WANTED}:82"]
  - match: {{container: late}}
    ports: ["{TAKEN}:80"]
  - match: {{container: soon}}
    ports: ["{SOON}:80"]
"""
REFUSAL = "the chain DOCKER of the table nat is somebody else's ("
MEND = "it is left alone. Set firewall.chain to another name, such as CTRPORT"


@pytest.fixture(scope="module", autouse=True)
def able_too(able: None) -> None:
    """Skip where there is no dockerd, but never in CI."""
    reason = missing()
    if reason is not None:
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@dataclass
class Beside:
    """A node that drops what nobody lets through, with a container of ctr's, web, and one of dockerd's, shop."""

    node: Node
    ctrport: Ctrport
    dockerd: Dockerd
    web: Container
    shop: DockerContainer
    #: What the tables held before ctrport came.
    alone: str = field(default="")

    def restart_dockerd(self) -> None:
        self.dockerd.stop()
        self.dockerd.start()
        self.shop = self.dockerd.container("shop")
        Server(self.shop, 80)

    def restart_ctrport(self) -> None:
        assert self.ctrport.stop() == 0
        self.ctrport.start()

    def assert_both_answer(self) -> None:
        """Both ports answer from everywhere that is promised, each by its own container."""
        ways: list[tuple[Place, str]] = [(place, self.node.address) for place in self.everybody]
        for place, address in [*ways, (self.node, "127.0.0.1")]:
            for port, name in ((OURS, "web"), (DOCKERS, "shop")):
                outcome = probe_tcp(place, address, port)
                assert isinstance(outcome, Reply), (place.name, address, port, outcome)
                assert outcome.name == name

    @property
    def everybody(self) -> tuple[Place, ...]:
        return (self.node.client, self.node, self.web, self.shop)


def make_containerd_connect_anew(node: Node, ctrport: Ctrport) -> None:
    """Make the daemon look at everything, as it does each minute: what it then says comes after this."""
    told = ctrport.messages.count("cannot be reached")
    node.stop_containerd()
    eventually(lambda: ctrport.messages.count("cannot be reached") > told, what="the daemon missing containerd")
    node.start_containerd()
    eventually(lambda: str(ctrport.status()["containerd"]).startswith("connected"), what="containerd being back")


def rules(tables: str) -> list[str]:
    return [line for line in tables.splitlines() if line.startswith("-A ")]


def forward(node: Node) -> list[str]:
    return node.run("iptables-nft", "-S", "FORWARD").stdout.splitlines()


@pytest.fixture(scope="module", params=[CHAIN, OWN_TABLE], ids=["chain", "table"])
def beside(request: pytest.FixtureRequest) -> Iterator[Beside]:
    with Node() as node:
        node.run("iptables-nft", "-P", "FORWARD", "DROP")
        node.start_containerd()
        node.add_network("ctr0", subnet="172.30.0.0/16")
        web = node.start("web")
        dockerd = Dockerd(node)
        dockerd.start()
        shop = dockerd.run("shop", f"{DOCKERS}:80", options=("--restart", "always"))
        for place in (web, shop):
            Server(place, 80)
        ctrport = Ctrport(node)
        beside = Beside(node, ctrport, dockerd, web, shop, node.tables())
        ctrport.configure(request.param + PUBLISH)
        ctrport.start()
        yield beside


# Chain CTRPORT


def test_both_publish(beside: Beside) -> None:
    beside.assert_both_answer()


def test_a_port_that_dockerd_has_is_in_conflict_and_stays_dockerds(beside: Beside) -> None:
    late = beside.node.start("late")
    try:
        said = beside.ctrport.wait_for(f"{TAKEN}:80/tcp", "conflict")["reason"]
        assert said == f"host port {TAKEN}/tcp is held by DOCKER"
        beside.assert_both_answer()
    finally:
        beside.node.delete(late)


def test_dockerd_gets_no_port_that_ctrport_has_and_the_rest(beside: Beside) -> None:
    with pytest.raises(CommandError, match=rf"0\.0\.0\.0:{WANTED}: bind: address already in use"):
        beside.dockerd.run("greedy", f"{WANTED}:80")
    beside.dockerd.docker("rm", "--force", "greedy")
    modest = beside.dockerd.run("modest", "8084:80")
    Server(modest, 80)
    wait_open(beside.node, 8084, "modest")
    beside.dockerd.remove(modest)
    beside.assert_both_answer()


def test_a_restart_of_dockerd_leaves_ctrports_ports_and_the_order_is_put_right(beside: Beside) -> None:
    beside.dockerd.stop()
    for place in (beside.node.client, beside.node, beside.web):
        assert isinstance(probe_tcp(place, beside.node.address, OURS), Reply), place.name
    beside.dockerd.start()
    beside.shop = beside.dockerd.container("shop")
    Server(beside.shop, 80)
    # dockerd puts its own on top, which is seen at once.
    if OWN_TABLE in beside.ctrport.config.read_text():
        eventually(lambda: "ctrport nftables" in forward(beside.node)[2], what="our rule being behind the operator's")
    else:
        eventually(lambda: "ctrport" in forward(beside.node)[1], what="our jump being on top again")
    assert forward(beside.node)[1].endswith("-j DOCKER-USER")
    beside.assert_both_answer()
    # The connection to containerd was dockerd's as well: it goes on publishing.
    assert beside.dockerd.docker("ps", "--quiet").stdout


def test_a_restart_of_ctrport_leaves_dockerds_ports(beside: Beside) -> None:
    before = beside.node.tables()
    assert beside.ctrport.stop() == 0
    beside.assert_both_answer()
    beside.ctrport.start()
    assert beside.node.tables() == before
    beside.assert_both_answer()


def test_what_the_operator_drops_in_docker_user_is_dropped_for_both_and_outlives_both(beside: Beside) -> None:
    rule = ("DOCKER-USER", "-s", beside.node.client_address, "-j", "DROP")
    beside.node.run("iptables-nft", "-I", *rule)
    try:
        for restart in (None, beside.restart_dockerd, beside.restart_ctrport):
            if restart is not None:
                restart()
            for port in (OURS, DOCKERS):
                outcome = probe_tcp(beside.node.client, beside.node.address, port, timeout=0.3)
                assert isinstance(outcome, TimedOut), (port, outcome)
                assert isinstance(probe_tcp(beside.node, beside.node.address, port), Reply)
    finally:
        beside.node.run("iptables-nft", "-D", *rule)
    beside.assert_both_answer()


def test_clean_leaves_dockerds_rules_as_they_are(beside: Beside) -> None:
    assert beside.ctrport.stop() == 0
    before = rules(beside.node.tables())
    beside.ctrport.run("clean")
    left = beside.node.tables()
    assert rules(left) == [line for line in before if "ctrport" not in line]
    assert isinstance(probe_tcp(beside.node.client, beside.node.address, DOCKERS), Reply)
    assert isinstance(probe_tcp(beside.node.client, beside.node.address, OURS), Refused)
    # dockerd was restarted since, so its own order may be another.
    assert sorted(left.splitlines()) == sorted(beside.alone.splitlines())
    beside.ctrport.start()
    beside.assert_both_answer()


# Chain DOCKER


@pytest.mark.parametrize("beside", [CHAIN], indirect=True)
@pytest.mark.parametrize("empty", [False, True], ids=["dockerd-publishes", "dockerd-publishes-nothing"])
def test_with_dockerds_chain_it_says_why_it_does_not_start_and_changes_nothing(beside: Beside, empty: bool) -> None:
    node, ctrport = beside.node, beside.ctrport
    assert ctrport.stop() == 0
    ctrport.run("clean")
    ctrport.log.unlink()
    if empty:
        beside.dockerd.remove(beside.shop)
    try:
        before = node.tables()
        ctrport.configure(PUBLISH)
        ctrport.start(wait=False)
        assert ctrport.wait() == 1
        [said] = [line for line in ctrport.messages.splitlines() if "somebody else's" in line]
        assert REFUSAL in said
        assert said.endswith(MEND)
        for command in ("plan", "ps"):
            refused = ctrport.run(command, "--config", str(ctrport.config), check=False)
            assert (refused.returncode, refused.stdout) == (1, "")
            [line] = refused.stderr.splitlines()
            assert line.startswith(f"ctrport: {REFUSAL}")
            assert line.endswith(MEND)
        assert node.tables() == before
    finally:
        if empty:
            beside.shop = beside.dockerd.run("shop", f"{DOCKERS}:80", options=("--restart", "always"))
            Server(beside.shop, 80)
        ctrport.configure(CHAIN + PUBLISH)
        ctrport.start()
    beside.assert_both_answer()


def _without_cni(tables: str) -> list[str]:
    return [line for line in tables.splitlines() if "CNI-" not in line]


def test_dockerd_that_takes_the_chain_of_a_running_daemon_has_it_and_the_daemon_says_so() -> None:
    with Node() as node:
        node.start_containerd()
        node.add_network("ctr0", subnet="172.30.0.0/16")
        web = node.start("web")
        Server(web, 80)
        ctrport = Ctrport(node)
        ctrport.configure(PUBLISH)
        ctrport.start()
        wait_open(node, OURS, "web")
        dockerd = Dockerd(node)
        # It empties the chain. That is mended like any drift until it jumps there, which tells whose the chain is now.
        dockerd.start()
        said = ctrport.wait_for(f"{OURS}:80/tcp", "waiting")["reason"]
        assert said.startswith(REFUSAL)
        left = _without_cni(node.tables())
        soon = node.start("soon")
        Server(soon, 80)
        ctrport.wait_for(f"{SOON}:80/tcp", "waiting", "soon")
        assert isinstance(probe_tcp(node.client, node.address, SOON), Refused)
        make_containerd_connect_anew(node, ctrport)
        assert said.endswith(MEND)
        assert said in ctrport.run("ps").stdout
        assert f"{said}; trying again until it works" in ctrport.messages
        assert "in line: containerd" not in ctrport.messages.split(said, 1)[1]
        assert _without_cni(node.tables()) == left
        shop = dockerd.run("shop", f"{DOCKERS}:80")
        Server(shop, 80)
        wait_open(node, DOCKERS, "shop")
        before = node.tables()

        # As it says.
        ctrport.configure(CHAIN + PUBLISH)
        ctrport.wait_for(f"{OURS}:80/tcp", "active")
        Beside(node, ctrport, dockerd, web, shop).assert_both_answer()
        tables = eventually(
            lambda: "DOCKER-HAIRPIN" not in node.tables() and node.tables(), what="the old chains going"
        )
        assert isinstance(tables, str)
        ours = [line for line in tables.splitlines() if "ctrport" in line]
        assert not [line for line in ours if line.startswith("-A DOCKER")]
        dockers = [line for line in before.splitlines() if line.startswith("-A DOCKER") and "ctrport" not in line]
        assert dockers == [line for line in tables.splitlines() if line.startswith("-A DOCKER")]
        dockerd.stop()  # while containerd is there, without which it waits for it
