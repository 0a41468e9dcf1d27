"""`ctrport plan`: what `run` would change now, line by line, and nothing changed by asking."""

from __future__ import annotations

import re
import shlex
import subprocess
from typing import Literal

import pytest

from embedded.node import Node
from embedded.traffic import Refused, Reply, Server, probe_tcp
from embedded.wait import eventually
from tests.node.daemon import Ctrport, publish, wait_open

WEB = publish(("{container: web}", "8080:80"))
MAPPING = "8080:80/tcp"
NOTHING = "nothing to change\n"
LOCALNET = "net/ipv4/conf/docker0/route_localnet"


def plan(ctrport: Ctrport) -> subprocess.CompletedProcess[str]:
    """Ask for the plan, and see that asking leaves the kernel as it is."""
    before = kernel(ctrport.node)
    ended: subprocess.CompletedProcess[str] = ctrport.run("plan", "--config", str(ctrport.config), check=False)
    assert kernel(ctrport.node) == before
    return ended


def kernel(node: Node) -> tuple[str, str]:
    """Return all that ctrport changes of a node: the rules of both families, and route_localnet of every device."""
    localnet = "grep -H . /proc/sys/net/ipv4/conf/*/route_localnet"
    return node.tables(), node.run("sh", "-c", localnet).stdout


def to_change(ctrport: Ctrport) -> list[str]:
    """Return the lines of a plan that has some: each is a table's name or a change."""
    ended = plan(ctrport)
    assert (ended.returncode, ended.stderr) == (3, "")
    lines: list[str] = ended.stdout.splitlines()
    assert lines
    assert all(re.fullmatch(r"\*(raw|nat|filter)( of IPv6)?|[+-] .+", line) for line in lines)
    return lines


def rules(lines: list[str], sign: str) -> list[tuple[str, str]]:
    """Return the rules that lines of a plan add or remove, each as table and ``iptables-save`` shows it."""
    found, table = [], ""
    for line in lines:
        if line.startswith("*"):
            table = line[1:]
        elif change := re.fullmatch(rf"\{sign} -[AID] (\S+)(?: [0-9]+)? (.+)", line):
            found.append((table, f"-A {change[1]} {change[2]}"))
    return found


def ours(node: Node) -> list[tuple[str, str]]:
    """Return the rules of ours that the kernel holds in both families, as `rules` does."""
    found, table = [], ""
    for program, family in (("iptables-nft-save", ""), ("ip6tables-nft-save", " of IPv6")):
        for line in node.run(program).stdout.splitlines():
            if line.startswith("*"):
                table = line[1:] + family
            elif '--comment "ctrport ' in line:
                found.append((table, line))
    return found


def test_plan_before_the_first_run_shows_what_run_then_does(node: Node, ctrport: Ctrport) -> None:
    Server(node.start("web"), 80)
    ctrport.configure(WEB)
    lines = to_change(ctrport)
    assert not [line for line in lines if line.startswith("-")]
    for line in ("+ -N DOCKER", "+ -N DOCKER-USER", "+ sysctl net.ipv4.conf.docker0.route_localnet=1"):
        assert line in lines
    assert any("-j DNAT --to-destination 172.17.0.2:80" in line for line in lines)
    assert isinstance(probe_tcp(node.client, node.address, 8080), Refused)
    assert not node.path("/run/ctrport").exists()

    ctrport.start()
    wait_open(node, 8080, "web")
    assert sorted(rules(lines, "+")) == sorted(ours(node))
    made = {line[1:].split()[0] for line in node.tables().splitlines() if re.fullmatch(r":DOCKER\S* -", line)}
    assert {line.removeprefix("+ -N ") for line in lines if line.startswith("+ -N ")} == made
    assert node.run("cat", f"/proc/sys/{LOCALNET}").stdout == "1\n"


def test_plan_without_a_container_shows_the_chains_alone(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(WEB)
    lines = to_change(ctrport)
    assert "+ -N DOCKER" in lines
    assert not [line for line in lines if "8080" in line or "sysctl" in line]


def test_plan_has_nothing_to_change_after_run(node: Node, ctrport: Ctrport) -> None:
    node.start("web")
    ctrport.configure(WEB)
    ctrport.start()
    ctrport.wait_for(MAPPING, "active")
    running = plan(ctrport)
    ctrport.stop()
    for ended in (running, plan(ctrport)):
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, NOTHING, "")


def test_plan_shows_exactly_the_rule_that_is_missing(node: Node, ctrport: Ctrport) -> None:
    node.start("web")
    ctrport.configure(WEB)
    ctrport.start()
    ctrport.wait_for(MAPPING, "active")
    for target in ("DNAT", "ACCEPT", "MASQUERADE"):
        ctrport.stop()
        [(table, rule)] = [
            (table, rule) for table, rule in ours(node) if f" default/web {MAPPING} " in rule and f"-j {target}" in rule
        ]
        node.run("iptables-nft", "-t", table, *shlex.split(rule.replace("-A", "-D", 1)))
        lines = to_change(ctrport)
        assert [line for line in lines if not line.startswith("*")] == [line for line in lines if line.startswith("+ ")]
        assert rules(lines, "+") == [(table, rule)]
        assert len(lines) == 2
        ctrport.start()
        assert plan(ctrport).stdout == NOTHING


def test_plan_shows_what_run_would_take_away(node: Node, ctrport: Ctrport) -> None:
    web = node.start("web")
    Server(node.start("shop"), 80)
    ctrport.configure(publish(("{container: web}", "8080:80"), ("{container: shop}", "8081:80")))
    ctrport.start()
    ctrport.wait_for(MAPPING, "active")
    ctrport.stop()
    node.delete(web)
    before = ours(node)
    lines = to_change(ctrport)
    gone = rules(lines, "-")
    assert {target for _, rule in gone for target in re.findall(r"-j (\w+)", rule)} == {"DNAT", "ACCEPT", "MASQUERADE"}
    assert all(f"ctrport default/web {MAPPING} " in rule for _, rule in gone)
    assert rules(lines, "+") == []
    ctrport.start()
    wait_open(node, 8081, "shop")
    assert sorted([*ours(node), *gone]) == sorted(before)


def test_plan_with_the_last_mapping_gone_switches_route_localnet_off_first(node: Node, ctrport: Ctrport) -> None:
    web = node.start("web")
    ctrport.configure(WEB)
    ctrport.start()
    ctrport.wait_for(MAPPING, "active")
    ctrport.stop()
    node.delete(web)
    lines = to_change(ctrport)
    assert lines[0] == "- sysctl net.ipv4.conf.docker0.route_localnet=1"
    assert len([line for line in lines if "ctrport localhost guard" in line and line.startswith("- ")]) == 2


def test_plan_of_another_configuration_while_the_daemon_runs(node: Node, ctrport: Ctrport) -> None:
    # What a restart would do after the file was changed.
    Server(node.start("web"), [80, 81])
    ctrport.configure(WEB)
    ctrport.start()
    wait_open(node, 8080, "web")
    with ctrport.frozen():
        ctrport.configure(publish(("{container: web}", "8080:80"), ("{container: web}", "8081:81")))
        lines = to_change(ctrport)
        assert rules(lines, "-") == []
        added = rules(lines, "+")
        assert len(added) == 3
        assert all("ctrport default/web 8081:81/tcp " in rule for _, rule in added)
        before = ours(node)
    wait_open(node, 8081, "web")
    assert sorted(ours(node)) == sorted(before + added)


def test_plan_while_the_daemon_holds_the_host_ports_shows_what_drifted_or_leads_elsewhere(
    node: Node, ctrport: Ctrport
) -> None:
    Server(node.start("web"), [80, 81])
    ctrport.configure(publish(("{container: web}", "8080:80"), ("{container: web}", "8000-8002:80/udp")))
    ctrport.start()
    wait_open(node, 8080, "web")
    gone = [rule for rule in ours(node) if rule[0].startswith("nat") and "-A DOCKER " in rule[1]]
    with ctrport.frozen():
        for program in ("iptables-nft", "ip6tables-nft"):
            node.run(program, "-t", "nat", "-F", "DOCKER")
        lines = to_change(ctrport)
    assert (sorted(rules(lines, "+")), rules(lines, "-")) == (sorted(gone), [])
    eventually(lambda: plan(ctrport).returncode == 0, what="the daemon having mended it")
    with ctrport.frozen():
        ctrport.configure(publish(("{container: web}", "8080:81"), ("{container: web}", "8000-8002:80/udp")))
        lines = to_change(ctrport)
    assert len(rules(lines, "+")) == len(rules(lines, "-")) == 3
    assert all("ctrport default/web 8080:81/tcp " in rule for _, rule in rules(lines, "+"))
    assert all("ctrport default/web 8080:80/tcp " in rule for _, rule in rules(lines, "-"))


def test_plan_takes_the_parts_in_conf_d(node: Node, ctrport: Ctrport) -> None:
    node.start("web")
    ctrport.configure("")
    parts = ctrport.config.parent / "conf.d"
    parts.mkdir()
    (parts / "web.yaml").write_text(WEB)
    (parts / "web.yaml.old").write_text("not read: [")
    assert any(f"ctrport default/web {MAPPING} " in line for line in to_change(ctrport))


def test_plan_without_containerd_fails_in_one_line(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(WEB)
    node.stop_containerd()
    ended = plan(ctrport)
    assert (ended.returncode, ended.stdout) == (1, "")
    [line] = ended.stderr.splitlines()
    assert line.startswith("ctrport: containerd cannot be reached at /run/containerd/containerd.sock: ")


def test_plan_beside_a_foreign_chain_says_what_run_would(node: Node, ctrport: Ctrport) -> None:
    node.run("iptables-nft", "-t", "nat", "-N", "DOCKER")
    node.run("iptables-nft", "-t", "nat", "-A", "DOCKER", "-i", "docker0", "-j", "RETURN")
    ctrport.configure(WEB)
    ended = plan(ctrport)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(r"ctrport: the chain DOCKER of the table nat is somebody else's .*\n", ended.stderr)


def test_plan_needs_root_and_iptables(node: Node, ctrport: Ctrport) -> None:
    readable = node.path("/run/config.yaml")
    readable.write_text(WEB)
    readable.chmod(0o644)
    ended = ctrport.run_as_nobody("plan", "--config", "/run/config.yaml")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "ctrport: ctrport plan needs root: it works with the kernel's tables\n"
    ended = ctrport.run("plan", "--config", "/run/config.yaml", check=False, env={"PATH": "/nonexistent"})
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(r"ctrport: iptables-nft(-save)? is not installed: install iptables .*\n", ended.stderr)


@pytest.mark.parametrize("policy", ["ACCEPT", "DROP"])
def test_what_is_shown_raw_does_what_run_would_in_nftables(node: Node, ctrport: Ctrport, policy: str) -> None:
    """With a FORWARD that drops, in which a rule comes first and goes last."""
    for program in ("iptables-nft", "ip6tables-nft"):
        node.run(program, "-P", "FORWARD", policy)
    empty = node.run("nft", "list", "ruleset").stdout
    web = node.start("web")
    Server(web, 80)
    ctrport.configure(publish(("{container: web}", "8080:80"), settings="firewall: {backend: nftables}"))
    first = raw(ctrport)
    assert first.startswith("nft" if policy == "ACCEPT" else "iptables-nft-restore --noflush <<'EOF'\n*filter\n")
    assert "nft -f - <<'EOF'\n" in first
    node.run("sh", "-ec", first)
    assert isinstance(probe_tcp(node.client, node.address, 8080), Reply)
    assert plan(ctrport).stdout == NOTHING
    ctrport.start()  # which finds all as it wants it
    assert ctrport.transactions == 0
    ctrport.stop()
    node.delete(web)
    second = raw(ctrport)
    assert "delete element ip ctrport" in second
    node.run("sh", "-ec", second)
    assert plan(ctrport).stdout == NOTHING
    ctrport.run("clean")
    # Counters aside, and tables of CNI that stay.
    after = node.run("nft", "list", "ruleset").stdout
    assert "ctrport" not in after
    assert "ctrport" not in empty


def raw(ctrport: Ctrport) -> str:
    """Return what would be written, after a check that it is something and that asking changes nothing."""
    before = kernel(ctrport.node)
    ended = ctrport.run("plan", "--raw", "--config", str(ctrport.config), check=False)
    assert (ended.returncode, ended.stderr) == (3, "")
    assert kernel(ctrport.node) == before
    said: str = ended.stdout
    return said


@pytest.mark.parametrize(
    ("program", "writer"),
    [("nft", "iptables-nft-restore --noflush"), ("legacy", "iptables-legacy-restore -w --noflush")],
)
def test_what_is_shown_raw_does_what_run_would(
    node: Node, ctrport: Ctrport, program: Literal["nft", "legacy"], writer: str
) -> None:
    if program == "legacy":
        for table in ("raw", "nat", "filter"):
            for tool in ("iptables-legacy", "ip6tables-legacy"):
                node.run(tool, "-t", table, "-L", "-n")
    empty = node.tables(backend=program)
    web = node.start("web")
    Server(web, 80)
    settings = f"firewall: {{backend: iptables-{program}, chain: WHALE}}"
    ctrport.configure(publish(("{container: web}", "8080:80"), settings=settings))
    first = raw(ctrport)
    words = first.splitlines()
    assert words[:2] == [f"{writer} <<'EOF'", "*raw"]
    assert words[-1] == "sysctl -w net/ipv4/conf/docker0/route_localnet=1"
    node.run("sh", "-ec", first)
    assert isinstance(probe_tcp(node.client, node.address, 8080), Reply)
    assert plan(ctrport).stdout == NOTHING
    again = ctrport.run("plan", "--raw", "--config", str(ctrport.config))
    assert (again.stdout, again.stderr) == ("", NOTHING)
    written = node.tables(backend=program)
    ctrport.start()  # which finds all as it wants it
    assert ctrport.transactions == 0
    assert node.tables(backend=program) == written
    ctrport.stop()
    # Another name, and nothing to publish: what is left of the old one goes last.
    node.delete(web)
    ctrport.configure(publish(("{container: web}", "8080:80"), settings=settings.replace("WHALE", "OTHER")))
    second = raw(ctrport)
    assert second.splitlines()[0] == "sysctl -w net/ipv4/conf/docker0/route_localnet=0"
    assert second.index("-N OTHER") < second.index("-X WHALE")
    node.run("sh", "-ec", second)
    assert "WHALE" not in node.tables(backend=program)
    assert plan(ctrport).stdout == NOTHING
    ctrport.run("clean")
    assert node.tables(backend=program) == empty
