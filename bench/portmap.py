"""CNI's portmap plugin, called the way a container runtime calls it, and how long that takes."""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from embedded.container import Container
from embedded.host import ALL_NAMESPACES, CommandError, end_process, inside
from embedded.network import CNI_VERSION, PLUGINS
from embedded.node import PLUGIN_DIRECTORIES, Node

PLUGIN = f"{PLUGINS}/portmap"
Command = Literal["ADD", "DEL"]
#: Where it may be installed: the node has it at ``PLUGIN``.
DIRECTORIES = PLUGIN_DIRECTORIES


@dataclass(frozen=True)
class Ran:
    """When the plugin was started and when it had ended, in ns since the epoch, and its processor time in seconds.

    That includes the programs that it ran.
    """

    began: int
    ended: int
    processor: float


def call(node: Node, command: Command, container: Container, ports: Mapping[int, int], *, within: float = 30.0) -> Ran:
    """Run the plugin for TCP ports of a container, by their host ports. Raises ``CommandError``."""
    assert container.network is not None
    mappings = [{"hostPort": host, "containerPort": port, "protocol": "tcp"} for host, port in ports.items()]
    config = {
        "cniVersion": CNI_VERSION,
        "name": container.network.name,
        "type": "portmap",
        "runtimeConfig": {"portMappings": mappings},
        "prevResult": {
            "cniVersion": CNI_VERSION,
            "interfaces": [{"name": "eth0", "sandbox": f"/proc/{container.pid}/ns/net"}],
            "ips": [{"version": "4", "interface": 0, "address": container.interfaces[0]}],
        },
    }
    env = {
        **os.environ,
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": container.cni_id,
        "CNI_NETNS": f"/proc/{container.pid}/ns/net",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": PLUGINS,
    }
    # Files, not pipes: nothing is left to do between its start and its end but to wait.
    given, said = node.directory / "portmap.in", node.directory / "portmap.out"
    given.write_text(json.dumps(config))
    with given.open() as stdin, said.open("w") as stdout:

        def start() -> tuple[int, subprocess.Popen[bytes]]:
            # The way into the namespaces is this benchmark's own affair, and not on the clock.
            return time.time_ns(), subprocess.Popen([PLUGIN], stdin=stdin, stdout=stdout, stderr=stdout, env=env)

        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began, process = inside(node.pid, ALL_NAMESPACES, start)
    try:
        # Not by Popen.wait with a timeout, which looks only now and then.
        pidfd = os.pidfd_open(process.pid)
        try:
            done = select.select([pidfd], [], [], within)[0]
            ended = time.time_ns()
        finally:
            os.close(pidfd)
    finally:
        end_process(process)
    if not done or process.returncode != 0:
        raise CommandError(f"portmap {command}: exit status {process.returncode}: {said.read_text().strip()}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Ran(began, ended, spent)
