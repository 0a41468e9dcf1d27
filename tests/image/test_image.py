"""The image's root, run by a real containerd with what the DaemonSet gives the pod, and no more.

`make image` builds the root. A kubelet and the API server are not here: what the kubelet makes of the manifest is made
of it below, and so is what it does to the files of a ConfigMap.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedded.node import Node
from embedded.traffic import Refused, Reply, Server, probe_tcp
from embedded.wait import eventually

ROOT = Path(__file__).resolve().parents[2]
IMAGE = ROOT / ".image" / "root"
DAEMONSET: dict[str, Any] = next(
    one
    for one in yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / "ctrport.yaml").read_text())
    if one["kind"] == "DaemonSet"
)
POD = DAEMONSET["spec"]["template"]["spec"]
[CONTAINER] = POD["containers"]
ADDED = {f"CAP_{name}" for name in CONTAINER["securityContext"]["capabilities"]["add"]}

#: What containerd gives a container that nothing is said of, and their numbers (capability.h).
NUMBERS = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_FOWNER": 3,
    "CAP_FSETID": 4,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_SETPCAP": 8,
    "CAP_NET_BIND_SERVICE": 10,
    "CAP_NET_BROADCAST": 11,
    "CAP_NET_ADMIN": 12,
    "CAP_NET_RAW": 13,
    "CAP_SYS_CHROOT": 18,
    "CAP_SYS_PTRACE": 19,
    "CAP_MKNOD": 27,
    "CAP_AUDIT_WRITE": 29,
    "CAP_SETFCAP": 31,
}
GIVEN = {*NUMBERS} - {"CAP_DAC_READ_SEARCH", "CAP_NET_ADMIN", "CAP_NET_BROADCAST", "CAP_SYS_PTRACE"}

#: As Debian's base image has it.
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class DaemonPod:
    """The pod of the DaemonSet on one node, as far as there is one without a kubelet."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.log = node.directory / "pod.log"
        self._config = node.directory / "configmap"
        self._config.mkdir()
        self._versions = 0
        self._name = ""

    def configure(self, text: str) -> None:
        """Exchange the files of the ConfigMap all at once, the way the kubelet does."""
        self._versions += 1
        new = self._config / f"..{self._versions}"
        new.mkdir()
        (new / "config.yaml").write_text(text)
        link = self._config / "..data_tmp"
        link.symlink_to(new.name)
        link.rename(self._config / "..data")
        if self._versions == 1:
            (self._config / "config.yaml").symlink_to("..data/config.yaml")
        else:
            shutil.rmtree(self._config / f"..{self._versions - 1}")

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        self._name = f"ctrport-{os.urandom(4).hex()}"
        argv = ["ctr", "--namespace", "k8s.io", "run", "--detach", "--log-uri", f"file://{self.log}", "--env", PATH]
        argv += ["--cgroup", f"/{self.node.directory.name}/{self._name}"]
        assert POD["hostNetwork"] is POD["hostPID"] is True
        argv += ["--net-host", "--with-ns", "pid:/proc/1/ns/pid"]
        assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        argv += ["--seccomp", "--read-only"]
        argv += [option for name in sorted(ADDED - GIVEN) for option in ("--cap-add", name)]
        argv += [option for name in sorted(GIVEN - ADDED) for option in ("--cap-drop", name)]
        argv += [option for mount in CONTAINER["volumeMounts"] for option in ("--mount", self._mount(mount))]
        self.node.run(*argv, "--rootfs", str(IMAGE), self._name, "/opt/ctrport/bin/ctrport", *CONTAINER["args"])
        eventually(self.ready, what="the pod being ready")

    def _mount(self, mount: dict[str, Any]) -> str:
        [volume] = [each for each in POD["volumes"] if each["name"] == mount["name"]]
        options = "rbind:rslave" if mount.get("mountPropagation") == "HostToContainer" else "rbind:rprivate"
        options += ":ro" if mount.get("readOnly") else ":rw"
        source = self._config if "configMap" in volume else Path(volume["hostPath"]["path"])
        kind = volume.get("hostPath", {}).get("type")
        if kind == "DirectoryOrCreate":
            self.node.run("mkdir", "-p", str(source))
        elif kind == "FileOrCreate":
            self.node.run("touch", str(source))
        else:
            assert kind in ("Directory", None)
        return f"type=bind,src={source},dst={mount['mountPath']},options={options}"

    def exec(self, *argv: str) -> Any:
        """Run a program in the container; its exit status is not checked."""
        id = f"exec-{os.urandom(4).hex()}"
        return self.node.run(
            "ctr", "--namespace", "k8s.io", "task", "exec", "--exec-id", id, self._name, *argv, check=False
        )

    def ready(self) -> bool:
        """Whether the readiness probe says so."""
        said = self.exec(*CONTAINER["readinessProbe"]["exec"]["command"])
        assert self._is("RUNNING"), self.log.read_text()
        assert said.returncode == 0, f"{said.stderr}\n{self.log.read_text()}"
        return True

    def status(self) -> dict[str, Any]:
        said: dict[str, Any] = json.loads(self.node.path("/run/ctrport/status.json").read_text())
        return said

    def stop(self) -> None:
        """End it the way the kubelet does, and wait until it is gone."""
        self.node.run("ctr", "--namespace", "k8s.io", "task", "kill", "--signal", "SIGTERM", self._name)
        eventually(lambda: self._is("STOPPED"), within=POD["terminationGracePeriodSeconds"], what="the pod's end")
        self.node.run("ctr", "--namespace", "k8s.io", "task", "delete", self._name)
        self.node.run("ctr", "--namespace", "k8s.io", "container", "delete", self._name)

    def _is(self, state: str) -> bool:
        lines = self.node.run("ctr", "--namespace", "k8s.io", "task", "list").stdout.splitlines()
        return any(fields[0] == self._name and fields[2] == state for fields in map(str.split, lines))


def config(*ports: int, settings: str = "") -> str:
    mappings = ", ".join(f'"{port}:80"' for port in ports)
    return f"{settings}\npublish:\n  - match: {{namespace: default, container: web}}\n    ports: [{mappings}]\n"


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    assert IMAGE.is_dir(), "make image builds it"
    with Node() as node:
        node.start_containerd()
        node.add_network("docker0")
        Server(node.start("web"), 80)
        yield node


@pytest.fixture(scope="module")
def before(node: Node) -> str:
    return node.tables()


@pytest.fixture(scope="module")
def pod(node: Node, before: str) -> DaemonPod:
    pod = DaemonPod(node)
    pod.configure(config(8080, 443))
    pod.start()
    return pod


def answered(node: Node, port: int) -> None:
    def reply() -> bool:
        outcome = probe_tcp(node.client, node.address, port, timeout=1)
        assert isinstance(outcome, Reply), outcome
        return outcome.name == "web"

    eventually(reply, what=f"port {port} being answered")


def refused(node: Node, port: int) -> None:
    def refusal() -> bool:
        return isinstance(probe_tcp(node.client, node.address, port, timeout=1), Refused)

    eventually(refusal, what=f"port {port} being refused")


def test_it_publishes_with_what_the_daemonset_gives_it(node: Node, pod: DaemonPod) -> None:
    answered(node, 8080)
    answered(node, 443)
    assert isinstance(probe_tcp(node, "127.0.0.1", 8080), Reply)  # which takes the sysctl route_localnet
    assert {(one["state"], one["reason"]) for one in pod.status()["publications"]} == {("active", "")}
    assert pod.status()["warnings"] == []


def test_that_is_no_more_than_it_says(node: Node, pod: DaemonPod) -> None:
    [pid] = node.run("pgrep", "-f", "/opt/ctrport/bin/ctrport run").stdout.split()
    said = dict(line.split(":\t", 1) for line in node.path(f"/proc/{pid}/status").read_text().splitlines())
    mask = sum(1 << NUMBERS[name] for name in ADDED)
    assert [int(said[each], 16) for each in ("CapEff", "CapPrm", "CapBnd")] == [mask] * 3
    assert (said["Seccomp"].strip(), said["NoNewPrivs"].strip()) == ("2", "1")
    for path in ("/opt/x", "/etc/ctrport/x", "/run/containerd/x"):
        assert pod.exec("touch", path).returncode != 0
    assert pod.exec("touch", "/run/ctrport/x").returncode == 0
    # Why the manifest mounts /proc/sys/net elsewhere.
    assert pod.exec("test", "-w", "/proc/sys/net/ipv4/conf/docker0/route_localnet").returncode != 0


def test_a_changed_configmap_is_taken_up(node: Node, pod: DaemonPod) -> None:
    pod.configure(config(8080, 8081))
    answered(node, 8081)
    refused(node, 443)
    answered(node, 8080)
    pod.configure("publish: [")  # which cannot be used
    eventually(lambda: "config.yaml" in str(pod.status()["config"]), what="the mistake being told")
    answered(node, 8081)
    pod.configure(config(8080, 8082))
    answered(node, 8082)
    refused(node, 8081)


def test_a_container_is_given_ports_by_a_command_in_the_pod(node: Node, pod: DaemonPod) -> None:
    given = pod.exec("/opt/ctrport/bin/ctrport", "publish", "web", "9090:80")
    assert given.returncode == 0, given.stderr
    assert isinstance(probe_tcp(node.client, node.address, 9090), Reply)
    taken = pod.exec("/opt/ctrport/bin/ctrport", "unpublish", "web")
    assert (taken.returncode, taken.stdout) == (0, "default/web 9090:80/tcp is withdrawn\n"), taken.stderr
    assert isinstance(probe_tcp(node.client, node.address, 9090), Refused)


def test_it_names_whose_a_port_is(node: Node, pod: DaemonPod) -> None:
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    server = node.spawn(*nobody, "busybox", "httpd", "-f", "-p", "9000", cwd="/")
    eventually(lambda: not isinstance(probe_tcp(node, "127.0.0.1", 9000, timeout=0.1), Refused), what="its listening")
    pod.configure(config(8080, 9000))

    def named() -> bool:
        reasons = [one["reason"] for one in pod.status()["publications"] if one["state"] == "conflict"]
        assert len(reasons) == 1
        assert "held by busybox (pid " in reasons[0], reasons
        return True

    eventually(named, what="the name of who has the port")
    server.kill()
    server.wait()
    pod.configure(config(8080, 8082))
    answered(node, 8082)


def test_it_is_ready_while_containerd_answers(node: Node, pod: DaemonPod) -> None:
    published = node.tables()
    node.stop_containerd()
    eventually(lambda: not pod.status()["containerd"].startswith("connected"), what="the loss being noticed")
    answered(node, 8080)
    node.start_containerd()  # with another socket, in the same directory
    eventually(pod.ready, what="the pod being ready again")
    assert node.tables() == published


def test_it_is_not_ready_by_what_a_killed_one_left(node: Node, pod: DaemonPod) -> None:
    file = node.path("/run/ctrport/status.json")
    text = file.read_text()
    file.write_text(text.replace(f'"pid": {pod.status()["pid"]}', '"pid": 4194303'))  # higher than any
    with pytest.raises(AssertionError):
        pod.ready()
    file.write_text(text)
    assert pod.ready()


def test_rules_stay_over_an_upgrade(node: Node, pod: DaemonPod) -> None:
    pod.configure(config(8080))
    refused(node, 8082)
    pod.stop()
    answered(node, 8080)
    pod.start()
    answered(node, 8080)
    assert pod.status()["transactions"] == 0


def test_legacy_tables_are_written_too(node: Node, pod: DaemonPod) -> None:
    legacy = "firewall: {backend: iptables-legacy}"
    pod.configure(config(8080, 8083, settings=legacy))
    answered(node, 8083)
    assert "8083" in node.run("iptables-legacy-save").stdout
    pod.configure(config(8080))
    refused(node, 8083)
    answered(node, 8080)


def test_nothing_is_left_with_on_stop_remove(node: Node, pod: DaemonPod, before: str) -> None:
    pod.configure(config(8080, 8084, settings="firewall: {on_stop: remove}"))
    answered(node, 8084)
    pod.stop()
    assert node.tables() == before
    refused(node, 8080)
    assert node.run("cat", "/proc/sys/net/ipv4/conf/docker0/route_localnet").stdout == "0\n"
