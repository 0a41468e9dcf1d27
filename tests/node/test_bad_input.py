"""What is wrong on the node or in what ctrport is given: one line that says so, no traceback, and nothing touched."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from embedded.node import Node
from embedded.traffic import Refused, Reply, Server, eventually, probe_tcp, probe_udp
from tests.node.daemon import Ctrport, publish, wait_open

WEB = publish(("{container: web}", "8080:80"))
MAPPING = "8080:80/tcp"

#: What ``run`` logs of itself before it can know that it will fail.
_PREAMBLE = re.compile(r"\d\d:\d\d:\d\d INFO    (started|configuration|firewall|host-ports|neighbours) .*")
#: And why it does then.
_STOPPED = re.compile(r'\d\d:\d\d:\d\d ERROR   stopped reason=(".*")')


def failing(ended: subprocess.CompletedProcess[str], status: int = 1) -> str:
    """Return the one line that a command fails with, or why ``run`` did, after a check that there is no other."""
    assert ended.returncode == status, ended
    assert ended.stdout == ""
    lines = [line for line in ended.stderr.splitlines() if not _PREAMBLE.fullmatch(line)]
    assert len(lines) == 1, ended.stderr
    stopped = _STOPPED.fullmatch(lines[0])
    return lines[0] if stopped is None else f"ctrport: {json.loads(stopped[1])}"


def test_a_second_daemon_names_the_first(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(WEB)
    ctrport.start()
    Server(node.start("web"), 80)
    wait_open(node, 8080, "web")
    before = node.tables()
    said = failing(ctrport.run("run", "--config", str(ctrport.config), check=False))
    assert said == f"ctrport: another daemon runs already (pid {ctrport.status()['pid']}, run directory /run/ctrport)"
    assert node.tables() == before
    assert ctrport.status()["running"] is True
    assert isinstance(probe_tcp(node.client, node.address, 8080), Reply)


def test_a_run_directory_that_cannot_be_made(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(WEB)
    ended = ctrport.run("run", "--config", str(ctrport.config), "--run-dir", "/proc/nowhere", check=False)
    assert "/proc/nowhere" in failing(ended)
    assert node.tables() == ""


# Chains of others

FOREIGN = {
    "nat": [["-t", "nat", "-N", "DOCKER"], ["-t", "nat", "-A", "DOCKER", "-i", "docker0", "-j", "RETURN"]],
    "filter": [["-N", "DOCKER"], ["-A", "DOCKER", "-d", "172.18.0.2/32", "-p", "tcp", "-j", "ACCEPT"]],
    "of-the-family": [["-N", "DOCKER-FORWARD"], ["-A", "DOCKER-FORWARD", "-j", "RETURN"]],
    "empty-in-forward": [["-N", "DOCKER"], ["-A", "FORWARD", "-o", "docker0", "-j", "DOCKER"]],
    "empty-in-prerouting": [
        ["-t", "nat", "-N", "DOCKER"],
        ["-t", "nat", "-A", "PREROUTING", "-m", "addrtype", "--dst-type", "LOCAL", "-j", "DOCKER"],
    ],
    # Somebody else's comment is not our tag.
    "commented": [
        ["-t", "nat", "-N", "DOCKER"],
        ["-t", "nat", "-A", "DOCKER", "-m", "comment", "--comment", "ctrport is to keep off", "-j", "RETURN"],
    ],
}


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_chain_of_somebody_else_is_left_alone(node: Node, ctrport: Ctrport, foreign: list[list[str]]) -> None:
    for rule in foreign:
        node.run("iptables-nft", *rule)
    node.start("web")
    before = node.tables()
    ctrport.configure(WEB)
    said = failing(ctrport.run("run", "--config", str(ctrport.config), check=False))
    assert re.match(r"ctrport: the chain DOCKER\S* of the table (nat|filter) is somebody else's \(", said)
    assert said.endswith("it is left alone. Set firewall.chain to another name, such as CTRPORT")
    assert node.tables() == before
    assert node.run("cat", "/proc/sys/net/ipv4/conf/docker0/route_localnet").stdout == "0\n"


def test_another_chain_name_works_beside_a_foreign_chain(node: Node, ctrport: Ctrport) -> None:
    for key in ("nat", "filter", "of-the-family"):
        for rule in FOREIGN[key]:
            node.run("iptables-nft", *rule)
    Server(node.start("web"), 80)
    before = node.tables()
    ctrport.configure(publish(("{container: web}", "8080:80"), settings="firewall: {chain: CTRPORT}"))
    ctrport.start()
    wait_open(node, 8080, "web")
    assert isinstance(probe_tcp(node, "127.0.0.1", 8080), Reply)
    now = node.tables().splitlines()
    assert set(before.splitlines()) <= set(now)
    chains = {line for line in now if line.startswith(":")} - set(before.splitlines())
    own = {chain for chain in chains if chain.endswith(" -")}  # the kernel's have a policy there
    assert {":CTRPORT -", ":CTRPORT-FORWARD -", ":CTRPORT-POSTROUTING -", ":DOCKER-USER -"} <= own
    assert all(chain.startswith((":CTRPORT -", ":CTRPORT-")) for chain in own - {":DOCKER-USER -"})
    ours = [line for line in now if "ctrport" in line and "DOCKER" in line]
    assert [line.split()[-1] for line in ours] == ["DOCKER-USER"] * 2  # in each family
    ctrport.stop()
    ctrport.run("clean")
    assert node.tables() == before


def test_a_new_chain_name_leaves_nothing_of_the_old(node: Node, ctrport: Ctrport) -> None:
    Server(node.start("web"), 80)
    ctrport.configure(publish(("{container: web}", "8080:80"), settings="firewall: {chain: CTRPORT}"))
    ctrport.start()
    wait_open(node, 8080, "web")
    wanted = node.tables()
    ctrport.stop()
    ctrport.run("clean")
    ctrport.configure(WEB)
    ctrport.start()
    wait_open(node, 8080, "web")
    ctrport.stop()
    ctrport.configure(publish(("{container: web}", "8080:80"), settings="firewall: {chain: CTRPORT}"))
    ctrport.start()

    def same() -> bool:
        assert node.tables() == wanted
        return True

    eventually(same, what="nothing but the new chains")
    wait_open(node, 8080, "web")


def test_what_a_flush_left_of_our_own_chains_is_taken_over(node: Node, ctrport: Ctrport) -> None:
    Server(node.start("web"), 80)
    ctrport.configure(WEB)
    ctrport.start()
    wait_open(node, 8080, "web")
    ctrport.stop()
    for table in ("nat", "filter", "raw"):
        node.run("iptables-nft", "-t", table, "-F")
    assert isinstance(probe_tcp(node.client, node.address, 8080), Refused)
    ctrport.start()
    wait_open(node, 8080, "web")


# Without what it needs


@pytest.mark.parametrize("command", ["run", "ps", "clean"])
def test_without_root_it_says_that_it_needs_it(node: Node, ctrport: Ctrport, command: str) -> None:
    readable = node.path("/run/config.yaml")
    readable.write_text(WEB)
    readable.chmod(0o644)
    options = [] if command == "clean" else ["--config", "/run/config.yaml"]
    when = ", while no daemon answers," if command == "ps" else ""
    said = failing(ctrport.run_as_nobody(command, *options))
    assert said == f"ctrport: ctrport {command}{when} needs root: it works with the kernel's tables"


@pytest.mark.parametrize("command", ["run", "ps", "clean"])
def test_without_iptables_it_says_what_to_install(node: Node, ctrport: Ctrport, command: str) -> None:
    ctrport.configure(WEB)
    options = [] if command == "clean" else ["--config", str(ctrport.config)]
    said = failing(ctrport.run(command, *options, check=False, env={"PATH": "/nonexistent"}))
    assert re.fullmatch(r"ctrport: iptables-nft(-save)? is not installed: install iptables \(1\.8 or later\)", said)


def test_it_takes_no_other_programs_than_those_of_iptables(node: Node, ctrport: Ctrport) -> None:
    programs = node.directory / "programs"
    programs.mkdir()
    for name in ("iptables-nft", "iptables-nft-save", "iptables-nft-restore"):
        found = shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    ctrport.configure(publish(("{container: web}", "8080:80"), ("{container: dns}", "5353:53/udp")))
    ctrport.start(env={"PATH": str(programs)})
    Server(node.start("web"), 80)
    wait_open(node, 8080, "web")
    with node.client.socket(socket.SOCK_DGRAM) as client:  # whose flow is older than the mapping
        assert isinstance(probe_udp(node.client, node.address, 5353, over=client), Refused)
        dns = node.start("dns")
        Server(dns, 53, kind=socket.SOCK_DGRAM)
        ctrport.wait_for("5353:53/udp", "active")
        eventually(
            lambda: isinstance(probe_udp(node.client, node.address, 5353, over=client), Reply), what="dns answering it"
        )
    node.delete(dns)
    ctrport.wait_for("5353:53/udp", "waiting")
    eventually(
        lambda: "dport=5353" not in node.run("conntrack", "-L", "-p", "udp").stdout, what="no flow of it being left"
    )
    assert ctrport.status()["warnings"] == []
    assert "Traceback" not in ctrport.messages


def test_tables_that_cannot_be_written_are_reported_until_they_can(node: Node, ctrport: Ctrport) -> None:
    # As when another xtables program of another release is put in the way: the reading works, the writing does not.
    programs = node.directory / "programs"
    programs.mkdir()
    broken = programs / "iptables-nft-restore"
    broken.write_text("#!/bin/sh\necho 'iptables-restore: line 3 failed' >&2\nexit 4\n")
    broken.chmod(0o755)
    Server(node.start("web"), 80)
    ctrport.configure(WEB)
    ctrport.start(wait=False, env={"PATH": f"{programs}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"})
    why = "the rules could not be written: iptables-restore: line 3 failed"
    eventually(lambda: ctrport.status()["firewall"] == why, what="the status saying what is wrong")
    assert ctrport.wait_for(MAPPING, "waiting", "web")["reason"] == why
    assert isinstance(probe_tcp(node.client, node.address, 8080), Refused)
    broken.unlink()
    wait_open(node, 8080, "web")
    ctrport.wait_for(MAPPING, "active", "web")
    assert ctrport.messages.count(why) == 1
    assert ctrport.messages.count(" in-line ") == 1
    assert "Traceback" not in ctrport.messages


# Configurations


@pytest.mark.parametrize("command", ["run", "ps", "check"])
def test_a_configuration_that_may_not_be_read(node: Node, ctrport: Ctrport, command: str) -> None:
    secret = node.path("/run/config.yaml")
    secret.write_text(WEB)
    secret.chmod(0o600)
    ended = ctrport.run_as_nobody(command, "--config", "/run/config.yaml")
    if command == "ps":  # which says first what is needed in any case
        assert "needs root" in failing(ended)
    else:
        expected = "ctrport: /run/config.yaml: Permission denied; expected a configuration file (--config)"
        assert failing(ended, 2) == expected
    if command == "check":  # nor the directory that it is in
        ended = ctrport.run_as_nobody(command, "--config", str(ctrport.config))
        expected = f"ctrport: {ctrport.config}: Permission denied; expected a configuration file (--config)"
        assert failing(ended, 2) == expected


def test_run_with_a_wrong_configuration_tells_every_problem_and_touches_nothing(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure('publish:\n  - match: {container: web}\n    ports: ["0:80", "8080:80", "8080:81/tcp"]\nfoo: 1\n')
    ended = ctrport.run("run", "--config", str(ctrport.config), check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    places = [line.split(": ")[0] for line in ended.stderr.splitlines()]
    assert places == [f"{ctrport.config}:{place}" for place in ("3:13", "3:32", "4:1")]
    assert node.tables() == ""
    assert not node.path("/run/ctrport").exists()


# Containers


def test_containers_that_die_while_they_are_looked_at_disturb_nobody(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(publish(('{container: "short*"}', "8081:80"), ("{container: web}", "8080:80")))
    ctrport.start()

    def short_lived(number: int) -> None:
        name = f"short{number}"
        cgroup = f"/{node.directory.name}/default-{name}"
        argv = ["ctr", "run", "--detach", "--cni", "--cgroup", cgroup, "--rootfs", str(node.rootfs), name]
        node.run(*argv, *(["/bin/true"] if number % 2 else ["/bin/sleep", "0.02"]))

    with ThreadPoolExecutor(4) as together:
        list(together.map(short_lived, range(16)))
    Server(node.start("web"), 80)
    wait_open(node, 8080, "web")
    assert isinstance(probe_tcp(node.client, node.address, 8081), Refused)
    assert ctrport.wait_for("8081:80/tcp", "waiting")["reason"] == "no running container matches container=short*"
    assert "DNAT --to-destination" in node.tables()
    assert node.tables().count("DNAT --to-destination") == 1
    assert "Traceback" not in ctrport.messages
    assert not [line for line in ctrport.messages.splitlines() if " ERROR " in line]
    assert ctrport.stop() == 0


def test_a_container_whose_network_is_taken_away_under_it_disturbs_nobody(node: Node, ctrport: Ctrport) -> None:
    web = node.start("web")
    ctrport.configure(publish(("{container: web}", "8080:80"), ("{container: shop}", "8081:80")))
    ctrport.start()
    ctrport.wait_for(MAPPING, "active", "web")
    web.run("ip", "link", "delete", "eth0")
    Server(node.start("shop"), 80)
    wait_open(node, 8081, "shop")
    node.delete(web)
    ctrport.wait_for(MAPPING, "waiting")
    assert "8080" not in node.tables()
    assert "Traceback" not in ctrport.messages


def test_labels_made_to_hurt_reach_no_rule(node: Node, ctrport: Ctrport) -> None:
    hurtful = {"app": 'shop" -j ACCEPT\n-F', "COMMIT": "[red]x[/red]", "x": "$(reboot)"}
    Server(node.start("web", labels=hurtful), 80)
    ctrport.configure(WEB)
    ctrport.start()
    wait_open(node, 8080, "web")
    for text in ("shop", "reboot", "[red]"):
        assert text not in node.tables()
        assert text not in ctrport.run("ps").stdout
