"""What the unit leaves the daemon: how much systemd thinks that is, and that each capability is asked for by something.

The rest of its sandbox takes a systemd, and is tried by `make boot`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.commits import Commits
from bench.ground import Events
from embedded.node import Node
from embedded.traffic import Refused, Reply, Server, probe_tcp
from embedded.wait import eventually
from tests.node.daemon import Ctrport, publish, wait_closed, wait_open
from tests.node.prometheus import SETTINGS, scraped
from tests.node.test_install import UNIT, bounding_set

#: What systemd may make of the unit, 0 to 10.
EXPOSURE = 2.5

# 443 takes a socket below 1024, 9000 is another user's.
PORTS = [("{container: web}", f"{port}:80") for port in (8080, 443, 9000)]
NFT, LEGACY = publish(*PORTS, settings=SETTINGS), publish(*PORTS, settings="firewall: {backend: iptables-legacy}")
OWN = publish(*PORTS, settings="firewall: {backend: nftables}")


@pytest.fixture(scope="module")
def busy_node() -> Iterator[Node]:
    """A node with a container, and with a program of another user at port 9000."""
    with Node() as node:
        node.start_containerd()
        node.add_network("docker0")
        Server(node.start("web"), 80)
        nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        node.spawn(*nobody, "busybox", "httpd", "-f", "-p", "127.0.0.1:9000", cwd="/")

        def listens() -> bool:
            return not isinstance(probe_tcp(node, "127.0.0.1", 9000, timeout=0.1), Refused)  # it waits for a question

        eventually(listens, what="the other user's program listening")
        yield node


@pytest.fixture
def its(busy_node: Node) -> Iterator[Ctrport]:
    ctrport = Ctrport(busy_node)
    yield ctrport
    if ctrport.runs:
        ctrport.stop()
    ctrport.run("clean")
    ctrport.close()


def start(ctrport: Ctrport, config: str, *without: str) -> None:
    """Start the daemon with what the unit leaves it, less what is named."""
    kept = [each for each in bounding_set().split(",") if each not in {f"+{name}" for name in without}]
    assert len(kept) == len(bounding_set().split(",")) - len(without)
    ctrport.configure(config)
    ctrport.start(wait=False, behind=("setpriv", "--bounding-set", ",".join(kept), "--no-new-privs"))


def reasons(ctrport: Ctrport) -> dict[int, str]:
    """Return what is said of each port when all is settled; web is published all the same."""
    eventually(ctrport.in_line, what="the daemon being in line")
    node = ctrport.node
    assert isinstance(probe_tcp(node.client, node.address, 8080), Reply)
    assert isinstance(probe_tcp(node, "127.0.0.1", 8080), Reply)
    said = {one["mapping"]: one["reason"] for one in ctrport.status()["publications"]}
    return {port: said[f"{port}:80/tcp"] for port in (8080, 443, 9000)}


def refusal(ctrport: Ctrport) -> str:
    """Return why the daemon could not so much as begin."""
    assert ctrport.wait() == 1
    assert "Traceback" not in ctrport.messages
    wait_closed(ctrport.node, 8080)
    return ctrport.messages.splitlines()[-1]


@pytest.mark.parametrize("config", [NFT, LEGACY, OWN], ids=["nft", "legacy", "nftables"])
def test_what_the_unit_gives_is_enough(its: Ctrport, config: str) -> None:
    start(its, config)
    said = reasons(its)
    assert (said[8080], said[443]) == ("", "")
    assert config != NFT or scraped(its.node)["ctrport_in_line"] == 1
    assert said[9000].startswith("host port 9000/tcp is held by busybox (pid ")


def test_without_net_admin_there_is_no_rule(its: Ctrport) -> None:
    start(its, NFT, "net_admin")
    assert re.search("which backend .* cannot be told: iptables-nft-save: .*Permission denied", refusal(its))
    start(its, OWN, "net_admin")
    assert "whether IPv6 can be served cannot be told: nft: Operation not permitted" in refusal(its)


@pytest.mark.parametrize("without", [(), ("net_broadcast",)], ids=["with", "without"])
def test_without_net_broadcast_a_port_opens_behind_the_start(its: Ctrport, without: tuple[str, ...]) -> None:
    start(its, publish(("{container: late}", "8090:80"), settings="firewall: {backend: nftables}"), *without)
    eventually(its.in_line, what="the daemon being in line")
    node = its.node
    events = Events(node)
    with Commits(node) as commits:
        late = node.start("late")
        created, started = (events.at(topic, "late") for topic in ("/tasks/create", "/tasks/start"))
        with Server(late, 80):
            wait_open(node, 8090, "late")
        first = commits.first({Path(sys.executable).name[:15]}, created)
    node.delete(late)
    assert (first > started) is bool(without)


def test_without_net_bind_service_a_port_below_1024_is_not_reserved(its: Ctrport) -> None:
    start(its, NFT, "net_bind_service")
    assert reasons(its)[443] == "not reserved: the daemon may not bind port 443 (CAP_NET_BIND_SERVICE)"


def test_without_net_raw_there_are_no_legacy_tables(its: Ctrport) -> None:
    start(its, LEGACY, "net_raw")
    assert "the table nat could not be listed: iptables-save" in refusal(its)
    for config in (NFT, OWN):  # and nothing else asks for it
        start(its, config, "net_raw")
        assert reasons(its)[443] == ""
        its.stop()


def test_without_sys_ptrace_no_container_can_be_looked_at(its: Ctrport) -> None:
    start(its, NFT, "sys_ptrace")
    eventually(lambda: "/ns/net takes CAP_SYS_PTRACE" in its.messages, what="the daemon saying what it lacks")
    assert isinstance(probe_tcp(its.node.client, its.node.address, 8080), Refused)
    assert "Traceback" not in its.messages


def test_without_dac_read_search_programs_of_other_users_have_no_name(its: Ctrport) -> None:
    start(its, NFT, "dac_read_search")
    assert reasons(its) == {8080: "", 443: "", 9000: "host port 9000/tcp is held by another process"}


def test_systemd_thinks_little_of_what_is_left_open() -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    argv = (
        "systemd-analyze",
        "security",
        "--offline=true",
        "--no-pager",
        f"--threshold={EXPOSURE * 10:.0f}",
        str(UNIT),
    )
    ended = subprocess.run(argv, capture_output=True, text=True, check=False)
    print(next(line for line in ended.stdout.splitlines() if "Overall" in line))
    assert ended.returncode == 0, ended.stdout
