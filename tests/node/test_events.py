"""What the daemon says of itself: the first lines of its log, and what it keeps of what happens."""

from __future__ import annotations

import json
import re
from typing import Any

from embedded.node import Node
from embedded.traffic import Server
from embedded.wait import eventually
from tests.node.daemon import Ctrport, Listener, publish, wait_open

WEB = publish(("{container: web}", "8080:80"))
MAPPING = "8080:80/tcp"


def test_the_first_lines_say_what_was_found(node: Node, ctrport: Ctrport) -> None:
    node.run("iptables-nft", "-t", "nat", "-N", "KUBE-SERVICES")
    node.script("ip link add cilium_host type bridge")
    node.start("web")
    ctrport.configure(
        publish(
            ("{container: web}", "8080:80"), ("{container: web}", "81:81"), settings="networks: [{bridge: docker0}]"
        )
    )
    with Listener(node, 9999, name="dockerd") as dockerd:
        ctrport.start()
        lines = [line.split(" ", 1)[1].lstrip() for line in ctrport.messages.splitlines()]
        version = ctrport.run("version").stdout.split()[1]
        kernel = node.run("uname", "-r").stdout.strip()
        begin = [
            f"INFO    started version={version} pid={ctrport.status()['pid']} kernel={kernel}",
            f"INFO    configuration file={ctrport.config} declarations=2 mappings=2 containers_may_publish=0 "
            "networks=docker0",
            'INFO    firewall backend=iptables-nft reason="no kubelet has left a hint" families=IPv4,IPv6 chain=DOCKER '
            'position=auto localhost=yes masquerade=hairpin alarm="the kernel announces changes"',
            "INFO    host-ports limit=4096 kept=0",
            f'INFO    neighbours cilium="device cilium_host" dockerd="pid {dockerd.pid}" '
            'kube-proxy="chains KUBE-SERVICES*"',
        ]
        assert lines[:5] == begin
        assert re.fullmatch(rf"INFO    containerd address={node.containerd_socket} version=\S+", lines[5])
        eventually(lambda: " in-line " in ctrport.messages, what="the line that says so")
        assert sum(not re.match(r"INFO    (published|waiting) |WARNING ", line) for line in lines) <= 7
    node.run("ip", "link", "delete", "cilium_host")


def test_the_log_can_be_json(node: Node, ctrport: Ctrport) -> None:
    Server(node.start("web"), 80)
    ctrport.configure(WEB)
    ctrport.start("--log", "json")
    wait_open(node, 8080, "web")
    ctrport.wait_for(MAPPING, "active")
    assert ctrport.stop() == 0
    said: list[dict[str, Any]] = [json.loads(line) for line in ctrport.messages.splitlines()]
    assert all(list(each)[:3] == ["time", "level", "event"] for each in said)
    assert {"started", "firewall", "published", "in-line", "stopped"} <= {each["event"] for each in said}
    [published] = [each for each in said if each["event"] == "published"]
    assert (published["container"], published["mapping"], published["address"]) == (
        "default/web",
        MAPPING,
        "172.17.0.2",
    )
