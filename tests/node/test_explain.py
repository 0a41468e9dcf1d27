"""Nodes that are broken in one way each, with packets that show it: `ctrport explain` names that one cause.

One node serves for all, mended after each. Whatever is broken, the port that is whole works before and after.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from embedded.traffic import BOTH_FAMILIES, Reply, eventually, probe_tcp, probe_udp, serve
from tests.node.broken import CASES, CLIENT, CONFIG, NODE, NODE6, SECOND, Case, Probe, Stage, iptables, nft, sent
from tests.node.daemon import OFTEN, Ctrport, Listener
from tests.node.modules import ENVIRONMENT


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage() as node:
        node.start_containerd()
        node.add_network("docker0", subnet6="fd00:17::/64", ip_masq=False)
        net1 = node.add_network("net1", subnet="172.18.0.0/16", ip_masq=False)
        net2 = node.add_network("net2", subnet="172.19.0.0/16", ip_masq=False)
        node.sysctl("net/ipv4/icmp_ratelimit", 0)
        node.sysctl("net/bridge/bridge-nf-call-iptables", 0)
        node.sysctl("net/bridge/bridge-nf-call-ip6tables", 0)
        node.add_address(SECOND)
        node.web, node.sibling = node.start("web"), node.start("sibling")
        node.other, node.service = node.start("other", network=net1), node.start("service", network=net2)
        node.shop = node.start("shop", command=("/bin/busybox", "httpd", "-f", "-p", "80"))
        serve(node.web, 80, 53, addresses=BOTH_FAMILIES)
        serve(node.web, 82, addresses=("127.0.0.1",))
        serve(node.service, 80)
        node.client.run("ip", "route", "add", "172.16.0.0/12", "via", NODE)
        node.ctrport = Ctrport(node)
        node.ctrport.configure(CONFIG)
        node.ctrport.start(tick=OFTEN)
        argv, pipe = (sys.executable, "-c", _FORKS), subprocess.PIPE
        node.commands = node.spawn(*argv, env=ENVIRONMENT, stdin=pipe, stdout=pipe)
        yield node


# A process that has all imported, which takes longest, and runs each command in a child.
_FORKS = """
import json, os, sys
import ctrport.cli, ctrport.explain.answer, ctrport.report, ctrport.run
for line in sys.stdin:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 1)
        sys.argv = ["ctrport", *json.loads(line)]
        ctrport.cli.main()
    os.close(write)
    with os.fdopen(read) as said:
        out = said.read()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), out]), flush=True)
"""


def explain(stage: Stage, *arguments: str) -> dict[str, Any]:
    """Return what `ctrport explain` says as JSON, with its exit status."""
    commands = stage.commands
    assert commands.stdin is not None
    assert commands.stdout is not None
    print(
        json.dumps(["explain", *arguments, "--json", "--config", str(stage.ctrport.config)]),
        file=commands.stdin,
        flush=True,
    )
    status, text = json.loads(commands.stdout.readline())
    assert status in (0, 1), text
    said: dict[str, Any] = json.loads(text)
    return {**said, "status": status}


def works(stage: Stage) -> None:
    def answered() -> bool:
        outcome = probe_tcp(stage.client, NODE, 8080, timeout=1)
        assert isinstance(outcome, Reply), outcome
        return outcome.name == "web"

    eventually(answered, what="port 8080 being answered")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_one_cause_is_named(stage: Stage, case: Case) -> None:
    works(stage)
    with case.breaks(stage) if case.breaks is not None else contextlib.nullcontext():
        outcome = case.probe(stage)
        assert not outcome, outcome
        said = explain(stage, *case.asked)
        assert (said["outcome"], said["cause"], said["status"]) == ("fails", case.cause, 1), said
        assert said["sentence"].startswith("does not work, because ")
        for words in case.words:
            assert words in said["sentence"], said["sentence"]
    works(stage)


WHOLE: dict[str, tuple[tuple[str, ...], Probe, str]] = {
    "a-client": (("8080",), sent(), "172.17.0.2:80 in container default/web"),
    "this-client": (("8080", "--from", CLIENT), sent(), f"{CLIENT} reaches 172.17.0.2:80"),
    "another-address": ((f"{SECOND}:8085",), sent(port=8085, address=SECOND), "172.17.0.2:80"),
    "udp": (("5353/udp",), sent(port=5353, udp=True), "172.17.0.2:53"),
    "the-node": (("8080", "--from", NODE), sent("node"), "172.17.0.2:80"),
    "the-node-at-localhost": (("8080", "--from", "127.0.0.1"), sent("node", address="127.0.0.1"), "sees 172.17.0.1"),
    "a-sibling": (("8080", "--from", "172.17.0.3"), sent("sibling"), "sees 172.17.0.1 as its client"),
    "itself": (("8080", "--from", "172.17.0.2"), sent("web"), "sees 172.17.0.1 as its client"),
    "another-network": (("8080", "--from", "172.18.0.2"), sent("other"), "172.18.0.2 reaches 172.17.0.2:80"),
    "by-interface": (("8084", "--from", "172.17.0.3"), sent("sibling", 8084), "172.17.0.2:80"),
    "ipv6": ((f"[{NODE6}]:8080",), sent(address=NODE6), "[fd00:17::2]:80 in container default/web"),
    "sibling-by-its-link": (("172.17.0.2:80", "--from", "172.17.0.3"), sent("sibling", 80, "172.17.0.2"), "172.17.0.2"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_works_is_said_to_work(stage: Stage, name: str) -> None:
    asked, probe, words = WHOLE[name]
    assert isinstance(probe(stage), Reply)
    said = explain(stage, *asked)
    assert (said["outcome"], said["cause"], said["status"]) == ("works", "container-answers", 0), said
    assert words in said["sentence"], said["sentence"]


def test_a_program_is_named_that_listens_in_a_container(stage: Stage) -> None:
    said = explain(stage, "8088")
    assert said["outcome"] == "works"
    [step] = [step for step in said["steps"] if step["where"] == "container default/shop"]
    assert step["whose"].startswith(("busybox (pid ", "httpd (pid "))
    assert step["whose"].endswith(" in container default/shop")


def test_a_program_of_the_node_itself_works(stage: Stage) -> None:
    with Listener(stage, 8023) as program:
        said = explain(stage, "8023")
        assert (said["outcome"], said["cause"]) == ("works", "program-of-the-node-answers")
        assert str(program) in said["sentence"]


@pytest.mark.parametrize("matches", [True, False])
def test_a_rule_that_cannot_be_judged_is_named_and_nothing_guessed(stage: Stage, matches: bool) -> None:
    rule = f"-A DOCKER-USER -m length --length {'0:60000' if matches else '60000:60001'} -j DROP"
    with iptables(rule)(stage):
        assert bool(sent()(stage)) is not matches
        said = explain(stage, "8080")
    assert (said["outcome"], said["cause"], said["status"]) == ("unknown", "rule-not-understood", 1)
    assert said["sentence"].startswith("cannot be told, because it depends on the rule '-A DOCKER-USER -m length")


def test_one_that_decides_nothing_is_no_matter(stage: Stage) -> None:
    with iptables("-A DOCKER-USER -m length --length 0:60000 -j RETURN")(stage):
        assert explain(stage, "8080")["outcome"] == "works"


def test_flows_that_go_elsewhere_are_told(stage: Stage) -> None:
    with stage.client.socket(socket.SOCK_DGRAM) as client:
        client.bind((CLIENT, 40000))
        rule = "-I PREROUTING -p udp --dport 5353 -j DNAT --to-destination 172.19.0.2:53"
        with iptables(rule, table="nat")(stage):
            probe_udp(stage.client, NODE, 5353, timeout=0.2, over=client)
        said = explain(stage, "5353/udp")
    assert said["outcome"] == "works"
    told = [step["what"] for step in said["steps"] if step["where"] == "tracked flows"]
    assert told == [f"one that was sent to {NODE}:5353 goes on to 172.19.0.2:53"]


_WATCH = """table inet watch {
    chain sent {
        type filter hook output priority -350;
        meta l4proto { tcp, udp, icmp } counter
    }
    chain came {
        type filter hook prerouting priority -350;
        meta l4proto { tcp, udp, icmp } counter
    }
}
"""


def test_nothing_is_changed_and_nothing_sent(stage: Stage) -> None:
    def state() -> list[str]:
        return [
            stage.run("nft", "-s", "list", "ruleset").stdout,  # without the counters
            stage.run("nft", "list", "table", "inet", "watch").stdout,  # with them
            stage.run("cat", "/proc/net/ip_tables_names", "/proc/net/ip6_tables_names", check=False).stdout,
            stage.run("sh", "-c", "cat /proc/sys/net/ipv4/conf/*/* /proc/sys/net/ipv6/conf/*/*", check=False).stdout,
            stage.run("conntrack", "-L").stdout,
        ]

    with stage.ctrport.frozen():
        stage.run("nft", "-f", "-", input=_WATCH)
        try:
            stage.run("conntrack", "-F")
            before = state()
            for asked in (("8080",), ("8080", "--from", "127.0.0.1"), (f"[{NODE6}]:8080",), ("8999/udp",)):
                explain(stage, *asked)
            assert state() == before
        finally:
            stage.run("nft", "delete", "table", "inet", "watch")


def test_without_the_programs_that_show_rules_nothing_is_sure(stage: Stage) -> None:
    directory = stage.directory / "without"
    directory.mkdir()
    save = stage.run("sh", "-c", "command -v iptables-nft-save").stdout.strip()
    (directory / "iptables-nft-save").symlink_to(save)
    config = str(stage.ctrport.config)
    chain = "chain forward {\ntype filter hook forward priority 10;\n}"
    with nft("inet other", chain)(stage), iptables("-A INPUT -j ACCEPT", program="iptables-legacy")(stage):
        assert explain(stage, "8080")["outcome"] == "works"
        for program, missing in (
            ("", "iptables-legacy-save is not installed, and there are such tables"),
            ("iptables-legacy-save", "nft is not installed, and there is a table inet other"),
        ):
            if program:
                (directory / program).symlink_to(stage.run("sh", "-c", f"command -v {program}").stdout.strip())
            path = {"PATH": str(directory)}
            ended = stage.ctrport.run("explain", "8080", "--config", config, env=path, check=False)
            assert ended.returncode == 1
            assert ended.stdout.splitlines()[-1].startswith(
                "cannot be told, because nothing that was seen is in its way"
            )
            assert missing in ended.stdout


def test_people_get_a_line_a_step_and_the_sentence_last(stage: Stage) -> None:
    ended = stage.ctrport.run("explain", "8080", "--config", str(stage.ctrport.config))
    lines = ended.stdout.splitlines()
    assert lines[0].split() == [
        *("packet", "198.51.100.254", "to", f"{NODE}:8080/tcp,", "in", "by", "eth0"),
        *("some", "client,", "as", "--from", "names", "none"),
    ]
    # Others' jumps may be asked before ours.
    assert list(dict.fromkeys(line.split("  ")[0] for line in lines[1:-1])) == [
        *("ctrport", "raw PREROUTING", "nat PREROUTING", "route", "filter FORWARD"),
        *("nat POSTROUTING", "container default/web", "answer"),
    ]
    assert lines[-1] == "works: 198.51.100.254 reaches 172.17.0.2:80 in container default/web"
    assert "\x1b" not in ended.stdout


def test_without_containerd_and_daemon_the_kernel_still_tells(stage: Stage) -> None:
    stage.ctrport.stop()
    try:
        config = stage.directory / "elsewhere.yaml"
        config.write_text("containerd: {address: /run/nowhere.sock}\n" + CONFIG)
        ended = stage.ctrport.run("explain", "8080", "--config", str(config), check=False)
    finally:
        stage.ctrport.start(tick=OFTEN)
    assert ended.stderr.startswith("the daemon is down, and what is to be published is not known: ")
    assert "nat PREROUTING" in ended.stdout
    assert ended.stdout.splitlines()[-1].startswith("works: ")
