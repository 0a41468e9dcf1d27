"""The daemon where it writes legacy tables: which backend it takes and why, and the main job under that one."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from ctrport.firewall.detect import Choice, choose
from embedded.node import Node
from embedded.traffic import Refused, Reply, Server, probe_tcp
from embedded.wait import eventually
from tests.node import modules
from tests.node.daemon import Ctrport, publish, wait_closed, wait_open
from tests.node.test_install import bounding_set

LEGACY = "firewall: {backend: iptables-legacy}"
WEB = publish(("{container: web}", "8080:80"), settings=LEGACY)
MAPPING = "8080:80/tcp"
TABLES = ("raw", "nat", "filter")

NFT, OLD = "iptables-nft", "iptables-legacy"


def legacy(node: Node) -> str:
    """Return the legacy tables that there are, in both families, without what the kernel counts."""
    text = ""
    for family in ("ip", "ip6"):
        there = node.run("sh", "-c", f"cat /proc/net/{family}_tables_names 2>/dev/null || true").stdout.split()
        for table in (table for table in (*TABLES, "mangle") if table in there):
            text += node.run(f"{family}tables-legacy-save", "-t", table).stdout
    return re.sub(r" \[\d+:\d+\]$|^#.*\n", "", text, flags=re.MULTILINE)


def make_tables(node: Node) -> None:
    """Have all legacy tables there, and something of an operator's in them."""
    for program in ("iptables-legacy", "ip6tables-legacy"):
        for table in TABLES:
            node.run(program, "-w", "-t", table, "-A", "OUTPUT", "-o", "nowhere0", "-j", "RETURN")
        node.run(program, "-w", "-P", "FORWARD", "DROP")


@pytest.mark.parametrize(
    ("chains", "choice"),
    [
        ([], Choice(NFT, "no kubelet has left a hint")),
        ([(NFT, "mangle", "KUBE-IPTABLES-HINT")], Choice(NFT, "the kubelet writes nft tables")),
        ([(NFT, "mangle", "KUBE-KUBELET-CANARY")], Choice(NFT, "the kubelet writes nft tables")),
        ([(OLD, "mangle", "KUBE-IPTABLES-HINT")], Choice(OLD, "the kubelet writes legacy tables")),
        ([(OLD, "mangle", "KUBE-KUBELET-CANARY")], Choice(OLD, "the kubelet writes legacy tables")),
        # A node that was switched over keeps the old tables until it starts anew.
        (
            [(OLD, "mangle", "KUBE-IPTABLES-HINT"), (NFT, "mangle", "KUBE-IPTABLES-HINT")],
            Choice(NFT, "the kubelet writes nft tables"),
        ),
        ([(OLD, "mangle", "SOMETHING")], Choice(NFT, "no kubelet has left a hint")),
        ([(OLD, "filter", "KUBE-IPTABLES-HINT")], Choice(NFT, "no kubelet has left a hint")),
    ],
)
def test_auto_follows_the_kubelet(node: Node, chains: list[tuple[str, str, str]], choice: Choice) -> None:
    for program, table, chain in chains:
        node.run(program, "-t", table, "-N", chain)
    before = legacy(node)
    assert modules.run(node, choose, "auto") == choice
    assert legacy(node) == before
    assert modules.run(node, choose, "iptables-legacy").backend == "iptables-legacy"
    assert legacy(node) == before


def test_the_daemon_says_which_backend_it_took_and_why(node: Node, ctrport: Ctrport) -> None:
    node.run("iptables-legacy", "-t", "mangle", "-N", "KUBE-IPTABLES-HINT")
    ctrport.configure(publish(("{container: web}", "8080:80")))
    Server(node.start("web"), 80)
    before = node.tables()
    ctrport.start()
    wait_open(node, 8080, "web")
    assert (
        'firewall backend=iptables-legacy reason="the kubelet writes legacy tables" families=IPv4,IPv6'
        in ctrport.messages
    )
    assert "ctrport default/web 8080:80/tcp" in legacy(node)
    assert node.tables() == before


def test_the_main_job_in_legacy_tables(node: Node, ctrport: Ctrport) -> None:
    make_tables(node)
    before, nft = legacy(node), node.tables()
    ctrport.configure(WEB)
    ctrport.start()
    wait_closed(node, 8080)
    web = node.start("web")
    with Server(web, 80, name="web"):
        reply = wait_open(node, 8080, "web")
        assert reply.peer == node.client_address
        assert isinstance(probe_tcp(node, "127.0.0.1", 8080), Reply)
        assert isinstance(probe_tcp(web, node.address, 8080), Reply)
    node.delete(web)
    wait_closed(node, 8080)
    assert "default/web" not in legacy(node)
    assert node.tables() == nft
    assert ctrport.stop() == 0
    assert legacy(node) != before
    ctrport.run("clean")
    assert legacy(node) == before
    assert ctrport.run("clean").stdout == "there was no rule of ctrport\n"


def test_no_more_is_needed_than_the_unit_gives(node: Node, ctrport: Ctrport) -> None:
    make_tables(node)
    Server(node.start("web"), 80)
    ctrport.configure(WEB)
    ctrport.start(behind=("setpriv", "--bounding-set", bounding_set(), "--no-new-privs"))
    wait_open(node, 8080, "web")


def test_rules_are_removed_at_the_end_where_that_is_asked_for(node: Node, ctrport: Ctrport) -> None:
    make_tables(node)
    before = legacy(node)
    node.start("web")
    ctrport.configure(WEB.replace("legacy}", "legacy, on_stop: remove}"))
    ctrport.start()
    ctrport.wait_for(MAPPING, "active")
    assert ctrport.stop() == 0
    assert legacy(node) == before


def test_what_others_take_away_comes_back_when_the_daemon_starts(node: Node, ctrport: Ctrport) -> None:
    Server(node.start("web"), 80)
    ctrport.configure(WEB)
    ctrport.start()
    wait_open(node, 8080, "web")
    ctrport.stop()
    whole = legacy(node)
    for words in ("-t nat -F DOCKER", "-t filter -F FORWARD", "-t filter -F DOCKER-FORWARD", "-t nat -F OUTPUT"):
        node.run("iptables-legacy", "-w", *shlex.split(words))
    wait_closed(node, 8080)
    ctrport.start()
    wait_open(node, 8080, "web")
    assert sorted(legacy(node).splitlines()) == sorted(whole.splitlines())


@pytest.mark.parametrize("program", ["iptables-legacy", "ip6tables-legacy"])
def test_what_others_take_away_comes_back_when_it_is_looked_for(node: Node, ctrport: Ctrport, program: str) -> None:
    make_tables(node)
    Server(node.start("web"), 80)
    settings = "firewall: {backend: iptables-legacy, poll_interval: 1}"
    ctrport.configure(publish(("{container: web}", "8080:80"), settings=settings))
    ctrport.start()
    wait_open(node, 8080, "web")
    whole = legacy(node)
    for words in ("-t nat -F DOCKER", "-t filter -F FORWARD", "-t nat -F PREROUTING"):
        node.run(program, "-w", *shlex.split(words))
    eventually(lambda: ctrport.status()["repairs"], what="the repair")
    eventually(lambda: sorted(legacy(node).splitlines()) == sorted(whole.splitlines()), what="the tables as before")
    assert re.search(r'WARNING drift what="\d+ rules? gone.*" within=\d+s', ctrport.messages)
    wait_open(node, 8080, "web")
    # What is others' own is let pass.
    before = ctrport.status()
    node.run(program, "-w", "-A", "INPUT", "-s", "203.0.113.9" if program[2] == "t" else "2001:db8::9", "-j", "DROP")
    node.run(program, "-w", "-t", "nat", "-F", "DOCKER")
    eventually(lambda: ctrport.status()["repairs"] == before["repairs"] + 1, what="the repair")
    assert ctrport.status()["transactions"] == before["transactions"] + 1


def test_a_worker_that_is_killed_is_replaced(node: Node, ctrport: Ctrport) -> None:
    Server(node.start("web"), 80)
    ctrport.configure(publish(("{container: web}", "8080:80"), ("{container: late}", "8082:80"), settings=LEGACY))
    ctrport.start()
    wait_open(node, 8080, "web")
    first = eventually(lambda: _workers(ctrport), what="the workers waiting for the next change")
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    Server(node.start("late"), 80)
    wait_open(node, 8082, "late")
    ctrport.wait_for("8082:80/tcp", "active", "late")
    eventually(lambda: ctrport.in_line(), what="the kernel being in line")
    second = eventually(lambda: _workers(ctrport), what="other workers waiting for the next change")
    assert second.isdisjoint(first)
    assert ctrport.stop() == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in first | second)


def _workers(ctrport: Ctrport) -> set[int]:
    """Return the workers of both families, by their numbers on the machine."""
    daemon = ctrport.pid
    children = Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split()
    found = {int(pid) for pid in children if b"legacy_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()}
    assert len(found) == 2
    return found


def test_plan_and_ps_without_the_daemon_look_at_the_legacy_tables(node: Node, ctrport: Ctrport) -> None:
    Server(node.start("web"), 80)
    ctrport.configure(WEB)
    config = str(ctrport.config)

    def plan() -> subprocess.CompletedProcess[str]:
        before = legacy(node)
        ended: subprocess.CompletedProcess[str] = ctrport.run("plan", "--config", config, check=False)
        assert legacy(node) == before
        return ended

    first = plan()
    assert (first.returncode, first.stderr) == (3, "")
    ctrport.start()
    wait_open(node, 8080, "web")
    ctrport.stop()
    added = [line for line in first.stdout.splitlines() if line.startswith(("+ -A", "+ -I"))]
    assert len(added) == legacy(node).count('--comment "ctrport ')
    assert plan().stdout == "nothing to change\n"
    assert "active" in ctrport.run("ps", "--config", config).stdout
    node.run("iptables-legacy", "-w", "-t", "nat", "-D", "DOCKER", "2")
    assert plan().returncode == 3
    assert "waiting" in ctrport.run("ps", "--config", config).stdout


def test_clean_takes_the_rules_of_both_backends_away_and_makes_no_table(node: Node, ctrport: Ctrport) -> None:
    assert ctrport.run("clean").stdout == "there was no rule of ctrport\n"
    assert legacy(node) == ""
    node.start("web")
    before = node.tables()
    for settings in ("firewall: {backend: iptables-nft}", LEGACY):
        ctrport.configure(publish(("{container: web}", "8080:80"), settings=settings))
        ctrport.start()
        ctrport.wait_for(MAPPING, "active")
        ctrport.stop()
    assert "ctrport" in node.tables()
    assert "ctrport" in legacy(node)
    assert ctrport.run("clean").stdout == "every rule of ctrport is removed\n"
    assert node.tables() == before
    assert "ctrport" not in legacy(node)
    assert "DOCKER" not in legacy(node)


def test_without_python_iptables_the_daemon_says_so_and_goes_on_where_the_tables_are_nft(
    node: Node, ctrport: Ctrport, tmp_path: Path
) -> None:
    (tmp_path / "iptc.py").write_text("raise ImportError('No module named iptc')\n")
    path = {"PYTHONPATH": f"{tmp_path}:{Ctrport._environment()['PYTHONPATH']}"}
    Server(node.start("web"), 80)
    ctrport.configure(publish(("{container: web}", "8080:80")))
    ctrport.start(env=path)
    wait_open(node, 8080, "web")
    ctrport.stop()
    ctrport.run("clean")
    ctrport.configure(WEB)
    ctrport.start(wait=False, env=path)
    why = "python-iptables is not installed"
    eventually(lambda: why in ctrport.messages, what="the reason in the log")
    assert ctrport.messages.count("Traceback") == 0
    assert isinstance(probe_tcp(node.client, node.address, 8080), Refused)
