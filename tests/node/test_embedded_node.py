"""The embedded node itself: a test that fails on it would otherwise look like a fault of the daemon."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from embedded.container import Container
from embedded.host import CommandError, Host
from embedded.loopback import loopback_goes_to, loopback_leaves
from embedded.network import Kind
from embedded.node import Node
from embedded.tables import TABLES
from embedded.traffic import Refused, Reply, Server, TimedOut, Unreachable, Visit, eventually, probe_tcp, probe_udp


def address_of(container: Container) -> str:
    assert container.address is not None
    return container.address


def runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # empty: ended, and its new parent has not asked yet
    except OSError:
        return False


def processes_of(host: Host) -> list[str]:
    own = os.readlink(f"/proc/{host.pid}/ns/pid")
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "ns" / "pid_for_children") == own:
                found.append(process.name)
        except OSError:
            pass
    return found


def machine() -> dict[str, str]:
    def of(*argv: str) -> str:
        out = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
        return "\n".join(line for line in out.splitlines() if not line.startswith("#"))

    return {
        "mounts": Path("/proc/self/mountinfo").read_text(),
        "links": of("ip", "-oneline", "link", "show"),
        "addresses": of("ip", "-brief", "address", "show"),
        "routes": of("ip", "route", "show", "table", "all"),
        "rules": of("iptables-nft-save"),
        "forwarding": Path("/proc/sys/net/ipv4/ip_forward").read_text(),
    }


def test_a_container_starts_and_is_seen_by_both_counts(node: Node) -> None:
    web = node.start("web", labels={"app": "a shop", "tier": "front"})
    assert node.status(web) == "RUNNING"
    assert Path(f"/proc/{web.outer_pid}/cmdline").read_bytes() == b"/bin/sleep\x00600\x00"
    assert node.run("cat", f"/proc/{web.pid}/cmdline").stdout == "/bin/sleep\x00600\x00"
    info = node.run("ctr", "container", "info", "web").stdout
    assert '"app": "a shop"' in info
    assert '"tier": "front"' in info


def test_equal_ids_in_two_namespaces_are_two_containers(node: Node) -> None:
    here, there = node.start("web"), node.start("web", namespace="k8s.io")
    assert here.outer_pid != there.outer_pid
    assert here.address != there.address
    node.delete(there)
    assert node.status(here) == "RUNNING"


def test_the_node_and_the_lan_reach_a_container(node: Node) -> None:
    web = node.start("web")
    with Server(web, 80) as server:
        answer = probe_tcp(node, address_of(web), 80)
        assert isinstance(answer, Reply)
        assert (answer.name, answer.peer, answer.port) == ("web", "172.17.0.1", 80)
        answer = probe_tcp(node.client, address_of(web), 80, source=(node.client_address, 5000))
        assert isinstance(answer, Reply)
        assert (answer.peer, answer.peer_port) == (node.client_address, 5000)
        assert server.visits[-1] == Visit(node.client_address, 5000, 80)


def test_the_lan_client_reaches_the_node(node: Node) -> None:
    node.add_address("198.51.100.3")
    for address in (node.address, "198.51.100.3", node.address6):
        with Server(node, 22, address=address):
            answer = probe_tcp(node.client, address, 22)
            assert isinstance(answer, Reply)
            assert answer.name == "node"
            assert answer.peer in (node.client_address, node.client_address6)


def test_one_source_port_can_be_used_again_at_once(node: Node) -> None:
    with Server(node, 22):
        for _ in range(3):
            assert isinstance(probe_tcp(node.client, node.address, 22, source=("0.0.0.0", 5000)), Reply)


def test_refused_timed_out_and_unreachable_are_told_apart(node: Node) -> None:
    assert isinstance(probe_tcp(node.client, node.address, 23), Refused)
    assert isinstance(probe_udp(node.client, node.address, 23), Refused)
    node.run("iptables-nft", "-A", "INPUT", "-p", "tcp", "--dport", "24", "-j", "DROP")
    assert isinstance(probe_tcp(node.client, node.address, 24, timeout=0.2), TimedOut)
    node.client.run("ip", "route", "add", "unreachable", "203.0.113.0/24")
    assert isinstance(probe_tcp(node.client, "203.0.113.1", 24), Unreachable)


def test_a_server_serves_many_ports(node: Node) -> None:
    web = node.start("web")
    ports = range(9000, 9300)
    with Server(web, ports), Server(web, ports, kind=socket.SOCK_DGRAM):
        for port in (9000, 9150, 9299):
            for answer in (probe_tcp(node, address_of(web), port), probe_udp(node, address_of(web), port)):
                assert isinstance(answer, Reply)
                assert answer.port == port


def test_a_server_of_one_family_leaves_the_port_to_the_other(node: Node) -> None:
    network = node.add_network("br1", subnet="172.18.0.0/16", subnet6="fd00:18::/64")
    web = node.start("web", network=network)
    for kind, probe in ((socket.SOCK_STREAM, probe_tcp), (socket.SOCK_DGRAM, probe_udp)):
        Server(web, 80, kind=kind, address="::", name="six")
        assert isinstance(probe(node.client, address_of(web), 80), Refused)
        Server(web, 80, kind=kind, name="four")
        for address, name, peer in (
            (address_of(web), "four", node.client_address),
            (str(web.address6), "six", node.client_address6),
        ):
            answer = probe(node.client, address, 80)
            assert isinstance(answer, Reply)
            assert (answer.name, answer.peer, answer.source[0]) == (name, peer, peer)


def test_sctp_is_asked_as_tcp_is(node: Node) -> None:
    try:
        node.socket(proto=socket.IPPROTO_SCTP).close()
    except OSError as error:
        pytest.skip(f"this kernel has no sctp: {error}")
    Server(node, 22, name="tcp")
    for address in (node.address, node.address6):
        Server(node, 22, proto=socket.IPPROTO_SCTP, address=address)
        answer = probe_tcp(node.client, address, 22, proto=socket.IPPROTO_SCTP)
        assert isinstance(answer, Reply)
        assert (answer.name, answer.port) == ("node", 22)
        assert isinstance(probe_tcp(node.client, address, 23, proto=socket.IPPROTO_SCTP), Refused)


def test_what_is_for_127_0_0_1_leaves_a_place_that_is_told_so_and_no_longer(node: Node) -> None:
    network = node.networks[0]
    web = node.start("web")
    Server(node, 22, address="127.0.0.1")
    for place, gateway, device in ((node.client, node.address, "eth0"), (web, network.gateway, network.name)):
        Server(place, 22, address="127.0.0.1", name=f"itself-{place.name}")
        node.sysctl(f"net/ipv4/conf/{device}/route_localnet", 1)  # a node that lets it in
        with loopback_goes_to(gateway, place):
            answer = probe_tcp(place, "127.0.0.1", 22)
        assert isinstance(answer, Reply)
        assert answer.name == "node"
        answer = probe_tcp(place, "127.0.0.1", 22)
        assert isinstance(answer, Reply)
        assert answer.name == f"itself-{place.name}"
    trusting = Server(node, 7000, kind=socket.SOCK_DGRAM, address=network.gateway)
    with loopback_leaves(web), web.socket(socket.SOCK_DGRAM) as sender:
        sender.bind(("127.0.0.5", 0))
        sender.sendto(b"I am you\n", (network.gateway, 7000))
        eventually(lambda: [visit.peer for visit in trusting.visits] == ["127.0.0.5"], what="its packet being let in")


def test_a_connection_stays_and_is_answered_again(node: Node) -> None:
    with Server(node, 22) as server, node.client.socket() as client:
        client.settimeout(5)
        client.connect((node.address, 22))
        first = client.recv(100)
        client.sendall(b"still there?\n")
        assert client.recv(100) == first
        server.close()
        assert client.recv(100) == b""


def test_a_udp_flow_keeps_its_port(node: Node) -> None:
    web = node.start("web")
    with Server(web, 53, kind=socket.SOCK_DGRAM) as server, node.client.socket(socket.SOCK_DGRAM) as client:
        for _ in range(3):
            assert isinstance(probe_udp(node.client, address_of(web), 53, over=client), Reply)
        server.close()
        assert isinstance(probe_udp(node.client, address_of(web), 53, over=client), Refused)
        assert len({visit.peer_port for visit in server.visits}) == 1


def test_what_listens_in_a_container_ends_with_it(node: Node) -> None:
    web = node.start("web")
    Server(web, 80)
    node.kill(web)
    assert node.status(web) == "STOPPED"
    eventually(lambda: "veth" not in node.run("ip", "link").stdout, what="the container's device is gone")
    with pytest.raises(RuntimeError, match="web has ended"):
        web.socket()


# The ptp plugin waits 1.5 s for IPv6's duplicate address detection, so its own address is IPv4 only.
@pytest.mark.parametrize(
    ("kind", "subnet6", "address6"), [("bridge", "fd00:18::/64", "fd00:18::2"), ("ptp", None, None)]
)
def test_nothing_of_a_deleted_container_stays_in_the_node(
    node: Node, kind: Kind, subnet6: str | None, address6: str | None
) -> None:
    network = node.add_network("net1", kind=kind, subnet="172.18.0.0/16", subnet6=subnet6)
    before = node.tables()
    web = node.start("web", network=network)
    assert (web.address, web.address6) == ("172.18.0.2", address6)
    assert "MASQUERADE" in node.tables()
    node.delete(web)
    assert node.tables() == before
    died = node.start("web", network=network)
    node.kill(died)
    node.delete(died)
    assert node.tables() == before
    assert node.run("ctr", "container", "list", "--quiet").stdout == ""
    assert not list(node.path("/var/lib/cni/networks/net1").glob("172.*"))
    assert not list(node.path("/var/lib/cni/results").iterdir())
    assert not list(Path("/sys/fs/cgroup").glob(f"**/{node.directory.name}/*/"))


def test_a_container_that_ends_by_itself_is_deleted_too(node: Node) -> None:
    before = node.tables()
    short = node.start("short", command=("/bin/sh", "-c", "trap exit TERM; while :; do sleep 0.01; done"))
    node.exec(short, "kill", "-TERM", "1")
    eventually(lambda: node.status(short) == "STOPPED", what="it ends")
    node.delete(short)
    assert node.tables() == before


def test_pause_and_resume(node: Node) -> None:
    web = node.start("web")
    node.pause(web)
    assert node.status(web) == "PAUSED"
    node.resume(web)
    assert node.status(web) == "RUNNING"
    node.pause(web)
    node.delete(web)
    assert node.status(web) is None


def test_exec_sees_the_containers_own_root(node: Node) -> None:
    web = node.start("web")
    assert node.exec(web, "ls", "/").stdout.split() == sorted(os.listdir(node.rootfs))
    with pytest.raises(CommandError, match="exit status 3"):
        node.exec(web, "sh", "-c", "exit 3")


def test_host_network(node: Node) -> None:
    agent = node.start("agent", network="host")
    assert agent.address is None
    with Server(agent, 9100):
        answer = probe_tcp(node.client, node.address, 9100)
    assert isinstance(answer, Reply)
    assert answer.name == "agent"


def test_no_network_is_loopback_only(node: Node) -> None:
    alone = node.start("alone", network=None)
    assert alone.address is None
    assert alone.run("ls", "/proc/self/net/dev_snmp6").stdout.split() == ["lo"]
    with Server(alone, 80):
        assert isinstance(probe_tcp(alone, "127.0.0.1", 80), Reply)


def test_two_bridges(node: Node) -> None:
    other = node.add_network("br1", subnet="172.18.0.0/16", ip_masq=False)
    web, db = node.start("web"), node.start("db", network=other)
    assert (web.address, db.address) == ("172.17.0.2", "172.18.0.2")
    with Server(db, 5432):
        assert isinstance(probe_tcp(web, address_of(db), 5432), Reply)


def test_containerd_ends_and_comes_back_with_its_containers(node: Node) -> None:
    web = node.start("web")
    for end in (node.stop_containerd, node.kill_containerd):
        end()
        assert not node.containerd_listens()
        assert web.alive()
        node.start_containerd()
        assert node.status(web) == "RUNNING"


def test_a_container_can_die_while_containerd_is_away(node: Node) -> None:
    web = node.start("web")
    node.stop_containerd()
    node.kill(web)
    assert not web.alive()
    node.start_containerd()
    node.delete(web)


def test_containerd_hangs_and_goes_on(node: Node) -> None:
    node.pause_containerd()
    with pytest.raises(CommandError, match="not done after"):
        node.run("ctr", "version", timeout=0.3)
    node.continue_containerd()
    node.run("ctr", "version")


def test_tables_say_nothing_about_chains_that_were_only_touched(node: Node) -> None:
    before = node.tables()
    for program in ("iptables-nft", "ip6tables-nft"):
        for table in TABLES:
            node.run(program, "-t", table, "-L")
    assert node.tables() == before == ""
    node.run("ip6tables-nft", "-P", "FORWARD", "DROP")
    assert node.tables().splitlines() == ["ip6tables filter", ":INPUT ACCEPT", ":FORWARD DROP", ":OUTPUT ACCEPT"]


def test_a_program_gets_the_signal_itself(node: Node) -> None:
    # And not a nsenter in front of it, which would die alone.
    daemon = node.spawn("sleep", "600")
    command_line = Path(f"/proc/{daemon.pid}/cmdline")  # empty until exec is over, a moment after spawn returned
    assert eventually(command_line.read_bytes, what="sleep runs") == b"sleep\x00600\x00"
    daemon.terminate()
    assert daemon.wait(5) == -15


def test_sysctls_and_devices_are_the_nodes_own(node: Node) -> None:
    forwarding = Path("/proc/sys/net/ipv4/conf/lo/route_localnet").read_text()
    node.sysctl("net/ipv4/conf/lo/route_localnet", 1 - int(forwarding))
    assert Path("/proc/sys/net/ipv4/conf/lo/route_localnet").read_text() == forwarding
    assert node.run("cat", "/proc/sys/net/ipv4/conf/lo/route_localnet").stdout != forwarding
    assert node.run("ls", "/sys/class/net").stdout.split() == ["eth0", "lo"]


def test_eventually_says_what_it_waited_for() -> None:
    with pytest.raises(AssertionError, match=r"not within 0.05 s: the moon is blue \(last seen: \[\]\)"):
        eventually(list, within=0.05, what="the moon is blue")


def test_nothing_is_left_on_the_machine() -> None:
    before, open_before = machine(), set(os.listdir("/proc/self/fd"))
    with Node() as node:
        node.start_containerd()
        node.add_network()
        web = node.start("web")
        node.start("frozen", namespace="k8s.io")
        Server(web, range(1000, 1010))
        node.client.spawn("sleep", "600")
        hosts = [node, node.client]
        namespaces = {os.readlink(f"/proc/{host.pid}/ns/pid") for host in hosts}
        assert all(processes_of(host) for host in hosts)
        assert machine() == before
    for process in Path("/proc").glob("[0-9]*"):
        try:
            assert os.readlink(process / "ns" / "pid_for_children") not in namespaces
        except OSError:
            continue
    assert machine() == before
    assert not node.directory.exists()
    assert not list(Path("/sys/fs/cgroup").glob(f"**/{node.directory.name}"))
    assert set(os.listdir("/proc/self/fd")) == open_before


def test_a_half_built_node_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Node] = []

    def fail(self: Node) -> None:
        built.append(self)
        raise OSError("no LAN today")

    monkeypatch.setattr(Node, "_join_lan", fail)
    with pytest.raises(OSError, match="no LAN today"):
        Node()
    assert not built[0].directory.exists()
    assert not Path(f"/proc/{built[0].pid}").exists()
    assert not Path(f"/proc/{built[0].client.pid}").exists()


def test_the_node_ends_when_the_process_that_made_it_is_killed() -> None:
    made = subprocess.run(
        [sys.executable, "-c", _MAKE_AND_DIE],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert made.returncode == -9
    pids = made.stdout.split()
    assert len(pids) == 2
    eventually(lambda: not any(runs(pid) for pid in pids), what="both hosts have ended")


_MAKE_AND_DIE = """
import os, shutil, signal
from embedded.node import Node
node = Node()
print(node.pid, node.client.pid, flush=True)
shutil.rmtree(node.directory)
os.kill(os.getpid(), signal.SIGKILL)
"""
