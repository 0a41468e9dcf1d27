"""The commands on a node: what they print, what they leave alone, and what they end with."""

from __future__ import annotations

import json
import re
import shlex
import signal

import pytest

from embedded.node import Node
from embedded.traffic import Refused, Reply, Server, eventually, probe_tcp
from tests.node.daemon import Ctrport, publish, wait_closed, wait_open

WEB = publish(("{container: web}", "8080:80"))
MAPPING = "8080:80/tcp"
DOWN = "the daemon is down; this is what can be seen without it\n"
HEADER = ["CONTAINER", "MAPPING", "ADDRESS", "STATE", "SINCE", "CONNECTIONS", "REASON"]
NOT_INSTALLED = "its rules are not all in the kernel, and no daemon runs: systemctl start ctrport"


def rows(table: str) -> list[list[str]]:
    """Return the cells of what ``ps`` prints, the header too: columns are parted by two blanks or more."""
    return [re.split(r"\s{2,}", line) for line in table.splitlines()]


def started(node: Node, ctrport: Ctrport, config: str = WEB) -> None:
    """Have the container web published on 8080."""
    Server(node.start("web"), 80)
    ctrport.configure(config)
    ctrport.start()
    wait_open(node, 8080, "web")
    ctrport.wait_for(MAPPING, "active")


# ps


def test_ps_shows_each_mapping_with_its_state_and_why(node: Node, ctrport: Ctrport) -> None:
    started(
        node,
        ctrport,
        publish(("{container: web}", "8080:80"), ("{container: web}", "9:80"), ("{container: no}", "7:70")),
    )
    shown = ctrport.run("ps", "--config", "/nonexistent")  # not needed: the daemon has read it
    assert shown.stderr == ""
    header, lower, web, no = rows(shown.stdout)
    assert header == HEADER
    assert web[:4] == ["default/web", MAPPING, "172.17.0.2", "active"]
    assert re.fullmatch(r"\d+s ago", web[4])
    assert int(web[5]) >= 1  # that it was answered
    assert (lower[:2], lower[5]) == (["default/web", "9:80/tcp"], "0")
    assert no[:4] == ["-", "7:70/tcp", "-", "waiting"]
    assert no[5:] == ["-", "no running container matches container=no"]


def test_ps_says_in_json_what_the_status_file_says(node: Node, ctrport: Ctrport) -> None:
    started(node, ctrport)
    shown = ctrport.run("ps", "--json")
    assert shown.stderr == ""
    said, kernel = json.loads(shown.stdout), ctrport.status()
    assert (said.pop("kernel"), kernel.pop("kernel")) == ("in line", "")
    [its], [daemons] = said["publications"], kernel["publications"]
    asked = {key: its.pop(key) for key in ("installed", "connections", "bytes")}
    assert {daemons.pop(key) for key in asked} == {None}
    assert said == kernel
    assert (said["running"], said["backend"], said["families"]) == (True, "iptables-nft", [4, 6])
    assert asked["installed"] is True
    assert asked["connections"] >= 1
    assert asked["bytes"] >= 40 * asked["connections"]
    assert its["owner"] == f"default/web {MAPPING}"
    assert (
        node.run("readlink", f"/proc/{its['process']}/ns/net").stdout != node.run("readlink", "/proc/1/ns/net").stdout
    )
    [attachment] = its["attachments"]
    assert (attachment["address"], attachment["device"]) == ("172.17.0.2", "docker0")


def test_ps_needs_no_root_while_the_daemon_runs_and_says_that_the_kernel_was_not_asked(
    node: Node, ctrport: Ctrport
) -> None:
    started(node, ctrport)
    unprivileged = ctrport.run_as_nobody("ps")
    assert unprivileged.returncode == 0
    assert unprivileged.stderr == "the kernel was not asked: that takes root; this is the daemon's word\n"
    web = rows(unprivileged.stdout)[1]
    assert (web[:4], web[5]) == (["default/web", MAPPING, "172.17.0.2", "active"], "-")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ps_without_the_daemon_says_so_and_shows_what_still_works(
    node: Node, ctrport: Ctrport, number: signal.Signals
) -> None:
    started(node, ctrport)
    ctrport.stop(number)
    before = node.tables()
    shown = ctrport.run("ps", "--config", str(ctrport.config))
    assert shown.stderr == DOWN
    header, web = rows(shown.stdout)
    assert (header, web[:4]) == (HEADER, ["default/web", MAPPING, "172.17.0.2", "active"])
    assert int(web[5]) >= 1
    assert web[4].endswith(" ago")  # as the daemon had it
    assert isinstance(probe_tcp(node.client, node.address, 8080), Reply)
    assert node.tables() == before


def test_ps_without_the_daemon_in_json_is_json_alone_on_stdout(node: Node, ctrport: Ctrport) -> None:
    started(node, ctrport)
    ctrport.stop()
    shown = ctrport.run("ps", "--config", str(ctrport.config), "--json")
    assert shown.stderr == DOWN
    said = json.loads(shown.stdout)
    assert (said["running"], said["pid"], said["firewall"]) == (False, 0, "in line")
    assert [(p["mapping"], p["state"]) for p in said["publications"]] == [(MAPPING, "active")]
    assert (said["kernel"], said["undeclared"]) == ("in line", [])


@pytest.mark.parametrize("target", ["DNAT", "ACCEPT", "MASQUERADE"])
def test_ps_without_the_daemon_calls_nothing_active_that_has_lost_a_rule(
    node: Node, ctrport: Ctrport, target: str
) -> None:
    started(node, ctrport)
    ctrport.stop()
    table = "filter" if target == "ACCEPT" else "nat"
    [lost] = [
        line
        for line in node.run("iptables-nft", "-t", table, "-S").stdout.splitlines()
        if f"default/web {MAPPING}" in line and f"-j {target}" in line
    ]
    node.run("iptables-nft", "-t", table, *shlex.split(lost.replace("-A", "-D", 1)))
    shown = ctrport.run("ps", "--config", str(ctrport.config))
    web = rows(shown.stdout)[1]
    assert (web[:4], web[6]) == (["default/web", MAPPING, "-", "waiting"], NOT_INSTALLED)


def test_ps_without_the_daemon_counts_the_mappings_that_have_lost_a_rule(node: Node, ctrport: Ctrport) -> None:
    started(node, ctrport)
    ctrport.stop()
    node.run("iptables-nft", "-t", "nat", "-F")
    said = json.loads(ctrport.run("ps", "--config", str(ctrport.config), "--json").stdout)
    assert said["firewall"].startswith("1 mapping")


@pytest.mark.parametrize(
    "jump",
    [["nat", "PREROUTING"], ["filter", "FORWARD"]],
    ids=["prerouting", "forward"],
)
def test_ps_without_the_daemon_calls_nothing_active_that_no_packet_gets_to(
    node: Node, ctrport: Ctrport, jump: list[str]
) -> None:
    started(node, ctrport)
    ctrport.stop()
    node.run("iptables-nft", "-P", "FORWARD", "DROP")
    node.run("iptables-nft", "-t", jump[0], "-F", jump[1])
    assert not probe_tcp(node.client, node.address, 8080, timeout=0.3)
    shown = ctrport.run("ps", "--config", str(ctrport.config))
    assert rows(shown.stdout)[1][3] == "waiting"


def test_ps_without_the_daemon_sees_what_changed_since(node: Node, ctrport: Ctrport) -> None:
    # on_stop: keep. The rules of web lead nowhere by now, and shop has none.
    config = publish(("{container: web}", "8080:80"), ("{container: shop}", "8081:80"))
    web = node.start("web")
    ctrport.configure(config)
    ctrport.start()
    ctrport.wait_for(MAPPING, "active")
    ctrport.stop()
    node.delete(web)
    node.start("shop")
    shop, gone, left = rows(ctrport.run("ps", "--config", str(ctrport.config)).stdout)[1:]
    assert (shop[:4], shop[6]) == (["default/shop", "8081:80/tcp", "-", "waiting"], NOT_INSTALLED)
    assert (gone[:4], gone[6]) == (["-", MAPPING, "-", "waiting"], "no running container matches container=web")
    assert (left[:4], left[5]) == (["default/web", MAPPING, "-", "undeclared"], "0")
    assert left[6].startswith("its rules are in the kernel, and nothing declares it: ")


def test_ps_without_the_daemon_takes_a_route_localnet_that_was_on_before_for_no_loss(
    node: Node, ctrport: Ctrport
) -> None:
    Server(node.start("web"), 80)
    node.sysctl("net/ipv4/conf/docker0/route_localnet", 1)
    ctrport.configure(WEB)
    ctrport.start()
    wait_open(node, 8080, "web")
    ctrport.stop()
    said = json.loads(ctrport.run("ps", "--config", str(ctrport.config), "--json").stdout)
    assert said["firewall"] == "in line"


def test_ps_without_the_daemon_does_not_call_a_kernel_in_line_that_holds_too_much(node: Node, ctrport: Ctrport) -> None:
    web = node.start("web")
    ctrport.configure(WEB)
    ctrport.start()
    ctrport.wait_for(MAPPING, "active")
    ctrport.stop()
    node.delete(web)
    assert "DNAT --to" in node.tables()
    said = json.loads(ctrport.run("ps", "--config", str(ctrport.config), "--json").stdout)
    assert said["firewall"] != "in line"


def test_ps_without_the_daemon_says_what_is_left_under_another_name_and_in_other_tables(
    node: Node, ctrport: Ctrport
) -> None:
    for tool in ("iptables-legacy", "ip6tables-legacy"):
        for table in ("raw", "nat", "filter"):
            node.run(tool, "-t", table, "-L", "-n")
    Server(node.start("web"), 80)
    legacy = ""
    for settings in ("firewall: {backend: iptables-legacy}", "firewall: {chain: WHALE}"):
        ctrport.configure(publish(("{container: web}", "8080:80"), settings=settings))
        ctrport.start()
        wait_open(node, 8080, "web")
        ctrport.stop()
        legacy = legacy or node.run("iptables-legacy-save", "-t", "nat").stdout
    node.run("iptables-legacy-restore", "--noflush", input=legacy)  # as a daemon leaves it that was killed in between
    ctrport.configure(WEB)
    before = node.tables()
    said = ctrport.run("ps", "--config", str(ctrport.config)).stderr.splitlines()
    assert said[1:] == [
        "warning: the kernel holds chains of another firewall.chain, too: `ctrport plan` shows them",
        "warning: iptables-legacy holds rules of ours, too: the daemon removes them when it starts",
    ]
    assert node.tables() == before


def test_ps_on_a_node_where_ctrport_never_ran(node: Node, ctrport: Ctrport) -> None:
    node.start("web")
    before = node.tables()
    ctrport.configure(WEB)
    shown = ctrport.run("ps", "--config", str(ctrport.config))
    assert shown.stderr == DOWN
    web = rows(shown.stdout)[1]
    assert (web[:4], web[6]) == (["default/web", MAPPING, "-", "waiting"], NOT_INSTALLED)
    assert node.tables() == before
    assert not node.path("/run/ctrport").exists()


def test_ps_without_daemon_and_containerd_is_one_line(node: Node, ctrport: Ctrport) -> None:
    node.stop_containerd()
    ctrport.configure(WEB)
    shown = ctrport.run("ps", "--config", str(ctrport.config), check=False)
    assert (shown.returncode, shown.stdout) == (1, "")
    reason = f"containerd cannot be reached at {node.containerd_socket}: No such file or directory"
    assert shown.stderr == f"ctrport: {reason}\n"


# clean


def localnet(node: Node) -> str:
    return node.run("cat", "/proc/sys/net/ipv4/conf/docker0/route_localnet").stdout.strip()


def test_clean_leaves_everything_as_it_was_with_neither_configuration_nor_containerd(
    node: Node, ctrport: Ctrport
) -> None:
    Server(node.start("web"), 80)
    before = node.tables()
    ctrport.configure(WEB)
    ctrport.start()
    wait_open(node, 8080, "web")
    eventually(lambda: localnet(node) == "1", what="localhost being served")
    ctrport.stop()
    ctrport.config.unlink()
    node.stop_containerd()
    cleaned = ctrport.run("clean")
    assert (cleaned.stdout, cleaned.stderr) == ("every rule of ctrport is removed\n", "")
    assert node.tables() == before
    assert localnet(node) == "0"
    assert isinstance(probe_tcp(node.client, node.address, 8080), Refused)


def test_clean_leaves_a_route_localnet_on_that_was_on_before(node: Node, ctrport: Ctrport) -> None:
    web = node.start("web")
    node.sysctl("net/ipv4/conf/docker0/route_localnet", 1)
    Server(web, 80)
    ctrport.configure(WEB)
    ctrport.start()
    wait_open(node, 8080, "web")
    ctrport.stop()
    ctrport.run("clean")
    assert localnet(node) == "1"


def test_clean_again_finds_nothing(node: Node, ctrport: Ctrport) -> None:
    before = node.tables()
    ctrport.configure(WEB)
    ctrport.start()
    ctrport.stop()
    ctrport.run("clean")
    again = ctrport.run("clean")
    assert (again.stdout, again.stderr) == ("there was no rule of ctrport\n", "")
    assert node.tables() == before


def test_clean_where_ctrport_never_ran_finds_nothing(node: Node, ctrport: Ctrport) -> None:
    node.run("iptables-nft", "-N", "DOCKER-USER")
    node.run("iptables-nft", "-t", "nat", "-N", "DOCKER")
    node.run("iptables-nft", "-t", "nat", "-A", "PREROUTING", "-j", "DOCKER")
    before = node.tables()
    cleaned = ctrport.run("clean")
    assert (cleaned.stdout, cleaned.stderr) == ("there was no rule of ctrport\n", "")
    assert node.tables() == before


def test_clean_removes_rules_whatever_their_chain_is_called(node: Node, ctrport: Ctrport) -> None:
    # Two in one: a name was changed, and the daemon that was to sweep up after the old one was killed before it did.
    Server(node.start("web"), 80)
    before = node.tables()
    ctrport.configure(publish(("{container: web}", "8080:80"), settings="firewall: {chain: WHALE}"))
    ctrport.start()
    wait_open(node, 8080, "web")
    ctrport.stop()
    whale = node.run("iptables-nft-save", "-t", "filter").stdout
    ctrport.run("clean")
    ctrport.configure(publish(("{container: web}", "8080:80")))
    ctrport.start()
    wait_open(node, 8080, "web")
    ctrport.stop()
    old = [line for line in whale.splitlines() if "WHALE" in line or line in ("*filter", "COMMIT")]
    node.run("iptables-nft-restore", "--noflush", input="\n".join(old) + "\n")
    assert ":WHALE-FORWARD" in node.tables()
    assert ":DOCKER-FORWARD" in node.tables()
    assert ctrport.run("clean").stdout == "every rule of ctrport is removed\n"
    assert node.tables() == before


def test_clean_keeps_what_the_operator_put_into_docker_user(node: Node, ctrport: Ctrport) -> None:
    started(node, ctrport)
    node.run("iptables-nft", "-A", "DOCKER-USER", "-s", "203.0.113.0/24", "-j", "DROP")
    ctrport.stop()
    ctrport.run("clean")
    ours = [line for line in node.tables().splitlines() if "DOCKER" in line]
    assert ours == [":DOCKER-USER -", "-A DOCKER-USER -s 203.0.113.0/24 -j DROP"]


def test_clean_keeps_a_docker_user_that_others_jump_to(node: Node, ctrport: Ctrport) -> None:
    started(node, ctrport)
    node.run("iptables-nft", "-A", "INPUT", "-j", "DOCKER-USER")
    ctrport.stop()
    ctrport.run("clean")
    ours = [line for line in node.tables().splitlines() if "DOCKER" in line]
    assert ours == [":DOCKER-USER -", "-A INPUT -j DOCKER-USER"]


def test_clean_refuses_while_the_daemon_runs(node: Node, ctrport: Ctrport) -> None:
    started(node, ctrport)
    before = node.tables()
    refused = ctrport.run("clean", check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert len(refused.stderr.splitlines()) == 1
    assert refused.stderr.startswith("ctrport: the daemon runs and would put its rules back: stop it first")
    assert "--force" in refused.stderr
    assert node.tables() == before


def test_clean_with_force_removes_them_under_a_daemon_that_hangs(node: Node, ctrport: Ctrport) -> None:
    Server(node.start("web"), 80)
    before = node.tables()
    ctrport.configure(WEB)
    ctrport.start()
    wait_open(node, 8080, "web")
    with ctrport.frozen():
        assert ctrport.run("clean", "--force").stdout == "every rule of ctrport is removed\n"
        assert node.tables() == before
        assert isinstance(probe_tcp(node.client, node.address, 8080), Refused)
    wait_open(node, 8080, "web")  # it is back, and so are they


@pytest.mark.parametrize("change", ["start", "end"])
def test_the_daemon_gets_over_a_clean_with_force_amid_a_change(node: Node, ctrport: Ctrport, change: str) -> None:
    other = node.start("other")
    started(node, ctrport, publish(("{container: web}", "8080:80"), ("{container: other}", "8081:80")))
    if change == "start":
        node.delete(other)
        wait_closed(node, 8081)
        ctrport.wait_for("8081:80/tcp", "waiting")
    with ctrport.frozen():
        ctrport.run("clean", "--force")
        if change == "start":
            Server(node.start("other"), 80)
        else:
            node.delete(other)
    if change == "start":
        wait_open(node, 8081, "other")
    wait_open(node, 8080, "web")
    eventually(ctrport.in_line, what="the daemon being in line again")
    eventually(lambda: localnet(node) == "1", what="the switch being on again")
    assert "Traceback" not in ctrport.messages


# version


def test_version_is_one_word_after_the_name(node: Node, ctrport: Ctrport) -> None:
    assert re.fullmatch(r"ctrport \d+\.\d+\S*\n", ctrport.run("version").stdout)
