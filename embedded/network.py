"""Container networks: what CNI is told to build, and the removal that nobody else asks CNI for."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from embedded.host import Host

CNI_VERSION = "0.4.0"
#: Where CNI looks for its plugins, and ctr for the one network that it joins containers to.
PLUGINS = "/opt/cni/bin"
CONFIGS = "/etc/cni/net.d"
#: The runtime handlers by which pods join another network than the first, each with the directory of its network.
HANDLERS = {f"net{number}": f"/etc/cni/net{number}.d" for number in range(1, 5)}

Kind = Literal["bridge", "ptp"]

# A plugin that is to remove the masquerading of a container reads the addresses from the container's interface. Where
# the container died its network namespace is gone, and with an empty CNI_NETNS the rules would stay for ever; so it is
# given a namespace that looks like the one that was.
_STAND_IN = """
name=$1
shift
ip netns add "$name"
ip -n "$name" link add eth0 type veth peer name peer0
for address in "$@"; do ip -n "$name" addr add "$address" dev eth0; done
"""


@dataclass(frozen=True)
class Network:
    """A network that containers join: a bridge of that name, or (ptp) a routed veth for each container."""

    name: str
    kind: Kind
    subnet: str
    subnet6: str | None
    ip_masq: bool
    hairpin: bool
    #: Whether the portmap plugin follows, which serves the host ports of pods, and does nothing for containers of ctr.
    portmap: bool
    #: The directory in the node that holds this network's configuration and no other.
    directory: str

    @property
    def handler(self) -> str:
        """The CRI runtime handler for pods on this network, empty for the default one."""
        if self.directory == CONFIGS:
            return ""
        for name, directory in HANDLERS.items():
            if directory == self.directory:
                return name
        raise RuntimeError(f"network {self.name}: there are runtime handlers for {len(HANDLERS)} more than the first")

    @property
    def gateway(self) -> str:
        """The node's own IPv4 address on it, which host-local takes from the front."""
        return str(ipaddress.ip_network(self.subnet)[1])

    @property
    def plugin(self) -> dict[str, Any]:
        """The configuration of its CNI plugin."""
        subnets = [self.subnet] if self.subnet6 is None else [self.subnet, self.subnet6]
        plugin: dict[str, Any] = {
            "type": self.kind,
            "ipMasq": self.ip_masq,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": subnet}] for subnet in subnets],
                "routes": [{"dst": "::/0" if ":" in subnet else "0.0.0.0/0"} for subnet in subnets],
            },
        }
        if self.kind == "bridge":
            plugin |= {"bridge": self.name, "isGateway": True, "hairpinMode": self.hairpin}
        return plugin

    def write(self, node: Host) -> None:
        """Write the configuration where CNI finds it."""
        portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
        plugins = [self.plugin, portmap] if self.portmap else [self.plugin]
        config = {"cniVersion": CNI_VERSION, "name": self.name, "plugins": plugins}
        directory = node.path(self.directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"10-{self.name}.conflist").write_text(json.dumps(config, indent=2) + "\n")

    def joining(self, *argv: str) -> list[str]:
        """Return a command line that runs ``argv`` where this is the only network that CNI knows."""
        if self.directory == CONFIGS:
            return list(argv)
        bind = f'mount --bind "{self.directory}" {CONFIGS}; exec "$@"'
        return ["unshare", "--mount", "sh", "-ec", bind, "sh", *argv]

    def leave(self, node: Host, cni_id: str, interfaces: Sequence[str]) -> None:
        """Do CNI DEL for a container that is gone: ctr does it for containers in the foreground only, and half."""
        stand_in = f"was-{cni_id}"
        try:
            node.script(_STAND_IN, stand_in, *interfaces)
            node.run(
                f"{PLUGINS}/{self.kind}",
                input=json.dumps({"cniVersion": CNI_VERSION, "name": self.name, **self.plugin}),
                env={
                    "CNI_COMMAND": "DEL",
                    "CNI_CONTAINERID": cni_id,
                    "CNI_NETNS": f"/run/netns/{stand_in}",
                    "CNI_IFNAME": "eth0",
                    "CNI_PATH": PLUGINS,
                },
            )
        finally:
            node.run("ip", "netns", "delete", stand_in, check=False)
        node.path(f"/var/lib/cni/results/{self.name}-{cni_id}-eth0").unlink(missing_ok=True)
