"""What the daemon says of itself: the first lines of its log, and what it keeps of what happens."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

from ctrport.lines import pair
from embedded.host import end_process
from embedded.node import Node
from embedded.traffic import Server
from embedded.wait import eventually
from tests.node.daemon import Ctrport, Listener, publish, wait_closed, wait_open

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


# What is kept of what happens


def told(ctrport: Ctrport, *options: str) -> list[dict[str, Any]]:
    """What `ctrport events` shows for programs."""
    shown = ctrport.run("events", "--json", *options)
    return [json.loads(line) for line in shown.stdout.splitlines()]


def words(events: list[dict[str, Any]]) -> list[str]:
    return [each["event"] for each in events]


def test_what_happens_is_kept_over_failover_drift_reload_and_restarts(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(publish(("{container: web}", "8080:80"), ("{container: db}", "8080:80")))
    ctrport.start()
    web = node.start("web")
    Server(web, 80)
    wait_open(node, 8080, "web")
    db = node.start("db")
    Server(db, 80)
    ctrport.wait_for(MAPPING, "conflict", "db")
    node.delete(web)
    wait_open(node, 8080, "db")
    ctrport.wait_for(MAPPING, "active", "db")
    assert words(told(ctrport, "--name", "web", "--name", "db")) == ["published", "conflict", "withdrawn", "taken-over"]
    taken = told(ctrport, "--name", "db")[-1]
    assert taken["was"] == "host port 8080/tcp is held by default/web (8080:80/tcp)"
    assert float(taken["after"].removesuffix("ms")) > 0
    line = ctrport.run("events", "--state", "active", "--lines", "1").stdout
    assert re.fullmatch(
        rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d  taken-over +container=default/db mapping={MAPPING} address={db.address} "
        r'was="host port 8080/tcp is held by default/web \(8080:80/tcp\)" after=\S+ms\n',
        line,
    )

    # Who is not root may read it, as the rest of the directory.
    assert ctrport.run_as_nobody("events", "--state", "active", "--lines", "1").stdout == line

    node.run("iptables-nft", "-t", "nat", "-F", "DOCKER")
    eventually(lambda: words(told(ctrport))[-1] == "drift", what="the drift")
    drift = told(ctrport)[-1]
    assert re.match(r"iptables-nft|iptables \(pid|xtables-nft", drift["by"]), drift
    assert "what publishes default/db 8080:80/tcp" in drift["what"]

    ctrport.configure(publish(("{container: db}", "8081:80")))
    eventually(lambda: words(told(ctrport))[-1] == "reloaded", what="the configuration in use")
    assert words(told(ctrport))[-4:] == ["drift", "published", "withdrawn", "reloaded"]
    ctrport.configure("publish: 1\n")
    eventually(lambda: words(told(ctrport))[-1] == "not-reloaded", what="what is wrong with it")
    ctrport.configure(publish(("{container: db}", "8081:80")))

    node.kill_containerd()
    eventually(lambda: words(told(ctrport))[-1] == "containerd-lost", what="containerd being missed")
    node.start_containerd()
    eventually(lambda: words(told(ctrport))[-1] == "containerd-back", what="containerd being found again")
    assert words(told(ctrport)).count("containerd-lost") == 1

    assert ctrport.stop() == 0
    ctrport.start()
    last = words(told(ctrport))
    assert last[last.index("containerd-back") :] == ["containerd-back", "stopped", "started", "published", "in-line"]
    assert ctrport.stop(signal.SIGKILL) == -signal.SIGKILL
    ctrport.start()
    assert words(told(ctrport))[-3:] == ["started", "published", "in-line"]
    # Each is in the log as well, once, in the same words.
    for each in told(ctrport):
        fields = " ".join(pair(key, value) for key, value in list(each.items())[3:])
        assert f" {each['event']} {fields}\n" in ctrport.messages


def test_what_happens_is_followed(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(WEB)
    ctrport.start()
    output = node.directory / "followed"
    with output.open("w") as file:
        argv = Ctrport._argv("events", "--follow", "--lines", "0", "--name", "web")
        following = node.spawn(*argv, env=Ctrport._environment(), stdout=file, stderr=subprocess.STDOUT)
    try:
        eventually(lambda: is_asleep(following.pid), what="its waiting for what comes")
        web = node.start("web")
        eventually(lambda: " published " in output.read_text(), what="what comes being shown")
        node.delete(web)
        eventually(lambda: " withdrawn " in output.read_text(), what="what goes being shown")
        following.send_signal(signal.SIGINT)
        assert following.wait(5) == 0
    finally:
        end_process(following)
    assert [line.split()[2] for line in output.read_text().splitlines()] == ["published", "withdrawn"]


def is_asleep(pid: int) -> bool:
    """Whether a process waits in a sleep, not for a file that it reads."""
    return "nanosleep" in Path(f"/proc/{pid}/wchan").read_text()


def test_a_full_run_directory_costs_events_and_nothing_else(node: Node, ctrport: Ctrport) -> None:
    node.script("mkdir -p /run/ctrport && mount -t tmpfs -o size=24k,mode=755 tmpfs /run/ctrport")
    try:
        web = node.start("web")
        Server(web, 80)
        ctrport.configure(WEB)
        ctrport.start()
        wait_open(node, 8080, "web")
        kept = node.path("/run/ctrport/events.jsonl")
        with kept.open("a") as file:
            file.write(" " * (4095 - kept.stat().st_size % 4096) + "\n")  # the next line takes a page more
        node.run("sh", "-c", "cat /dev/zero >/run/ctrport/filler || true")
        before = told(ctrport)
        node.delete(web)
        wait_closed(node, 8080)
        eventually(lambda: "what happens cannot be kept" in ctrport.messages, what="its being said")
        assert told(ctrport) == before
        node.run("rm", "/run/ctrport/filler")
        node.start("web")
        eventually(lambda: told(ctrport)[-1]["event"] == "published", what="its being kept again")
        assert ctrport.messages.count("what happens cannot be kept") <= 2
    finally:
        ctrport.stop()
        node.run("umount", "/run/ctrport")
