"""Everything that a stranger may name is named to hurt, on one node: it serves what was asked for, and nothing else."""

from __future__ import annotations

import asyncio
import os
import re
import shutil

import pytest

from ctrport.api import containers_pb2
from ctrport.containerd import Containerd
from ctrport.firewall.text import printed
from ctrport.stored import SANDBOX
from embedded.node import Node
from embedded.traffic import Server, eventually
from tests.node.daemon import Ctrport, Listener, wait_open

FORGED = "\n10:00:00 ERROR   forged"
LABELS = {
    "app": 'shop" -j ACCEPT\n-A INPUT -j DROP\nCOMMIT',
    "long": "$(reboot)" * 450,
    "\u202e\u200b\U0001f4a9": "`reboot`",
}
POD_LABELS = {
    "io.cri-containerd.kind": "sandbox",
    "io.kubernetes.pod.name": f"\x1b[2J{FORGED}",
    "io.kubernetes.pod.namespace": '" -j ACCEPT --comment "',
}
CONFIG = """
publish:
  - match: {container: web}
    ports: ["8080:80"]
  - match: {labels: {"shown\\n10:00:00 ERROR   forged": "\\e[2J\\0\\u2028\\u202e"}}
    ports: ["8082:80"]
  - match: {pod: {name: "*"}}
    ports: ["8083:80"]
"""
PART = '{publish: [{match: {container: "odd*"}, ports: ["8081:80"]}]}'
#: Devices that the kernel takes, and that Python's split() takes for several words or lines.
DEVICES = ("a\x1cb", "c\u2028d", "\u3000e", "\x1b[2J\x85")
#: What others have in the tables: a comment that forges rules, and ports that are written in another way.
OTHERS = (
    ("-N", "ELSEWHERE"),
    ("-A", "FORWARD", "-m", "comment", "--comment", 'a\n-A FORWARD -j DOCKER\n:DOCKER - [0:0] "q', "-j", "ELSEWHERE"),
    ("-t", "nat", "-N", "CNI-HOSTPORT-DNAT"),
    *(
        ("-t", "nat", "-A", "CNI-HOSTPORT-DNAT", "-p", "tcp", "--dport", *words)
        for words in (
            (":20", "-m", "comment", "--comment", "-d 12 x", "-j", "DNAT", "--to-destination", "192.0.2.1"),
            ("0", "-j", "DNAT", "--to-destination", "192.0.2.1"),
        )
    ),
)
NAME = 'x\n"<3> -j'  # a process may call itself anything, in 15 bytes
LINE = re.compile(r"\d\d:\d\d:\d\d (INFO   |WARNING) \S.*")


def rules_of_others(tables: str) -> list[str]:
    return [line for line in printed(tables) if line.startswith("-A ") and "ctrport " not in line]


async def make_sandbox(node: Node, id: str) -> None:
    """Store what the CRI plugin stores, of a container that it would not have made."""
    container = containers_pb2.Container(id=id)
    container.extensions[SANDBOX].value = b"{}"
    request = containers_pb2.UpdateContainerRequest(container=container)
    request.update_mask.paths.append(f"extensions.{SANDBOX}")
    async with Containerd(str(node.path(node.containerd_socket))) as containerd:
        await containerd._call(containerd._update, request, "default")


def test_what_strangers_name_is_served_as_asked_and_forges_nothing(node: Node, ctrport: Ctrport) -> None:
    for arguments in OTHERS:
        node.run("iptables-nft", *arguments)
    nft = shutil.which("nft")
    if nft is None:
        pytest.skip("there is no nft here")
    own_nft = node.directory / NAME
    shutil.copy(nft, own_nft)
    ctrport.configure(CONFIG)
    parts = node.directory / "conf.d"
    parts.mkdir()
    (parts / f"\udcff{FORGED}.yaml").write_text(PART)
    Server(node.start("web", labels=LABELS), 80)
    node.start("pod", labels=POD_LABELS)
    asyncio.run(make_sandbox(node, "pod"))
    node.start("poser", labels=POD_LABELS)  # as whoever builds images can have it
    odd = node.start("odd", labels=dict.fromkeys(("\x7f", "-j"), FORGED))
    Server(odd, 80)
    for first, second in (DEVICES[:2], DEVICES[2:]):
        odd.run("ip", "link", "add", "name", first, "type", "veth", "peer", "name", second)
        odd.run("ip", "address", "add", f"10.9.{len(first)}.1/24", "dev", first)
        odd.run("ip", "link", "set", first, "up")
        odd.run("ip", "link", "set", second, "up")
    with Listener(node, 8083, name=NAME):
        before = node.tables()
        ctrport.start()
        wait_open(node, 8080, "web")
        wait_open(node, 8081, "odd")
        assert ctrport.wait_for("8083:80/tcp", "conflict")["reason"].startswith("host port 8083/tcp is held by x?")
        assert not [one for one in ctrport.status()["publications"] if one["container"] == "poser"]
        whole = node.tables()
        assert rules_of_others(whole) == rules_of_others(before)
        targets = re.findall(r"^-A DOCKER .*-j DNAT --to-destination (\S+)", whole, re.MULTILINE)
        assert len(targets) == 2
        # As the tables are printed, and by their quotes, so that the comment of the others is one word.
        assert not re.search("reboot|shop|forged", whole)
        assert not ctrport.status()["repairs"]

        # Somebody else writes, under such a name.
        node.run(str(own_nft), "flush chain ip nat DOCKER")
        eventually(lambda: node.tables() == whole and ctrport.status()["repairs"] == 1, what="the rules being back")
        eventually(lambda: " drift " in ctrport.messages, what="its being told")
        assert re.search(r' drift what=".*" by="x\?\\"<3> -j \(pid \d+\)" after=\d+ms\n', ctrport.messages)

        # And the part becomes wrong.
        part = parts / f"\udcff{FORGED}.yaml"
        part.write_text("publish: {}")
        eventually(lambda: " not-reloaded " in ctrport.messages, what="what is wrong being told")
        eventually(lambda: ctrport.status()["config"], what="its being in the status")
        shown = ctrport.run("ps")
    assert ctrport.stop() == 0
    lines = ctrport.messages.split("\n")[:-1]
    assert all(line.isprintable() and LINE.fullmatch(line) for line in lines if " not-reloaded " not in line), lines
    assert [line[9:14] for line in lines if " not-reloaded " in line] == ["ERROR"]
    # A table of four publications under its head, and a warning for the file.
    assert len(shown.stdout.splitlines()) == 5
    assert len(shown.stderr.splitlines()) == 1
    for line in (shown.stdout + shown.stderr).split("\n"):
        assert line.isprintable()
    assert os.fsencode(FORGED) not in os.fsencode(shown.stdout + shown.stderr)
    ctrport.run("clean")
    assert node.tables() == before
