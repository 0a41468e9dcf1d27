"""Installing, upgrading and removing with make, and what systemd is told: on a node, with nothing of the machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from embedded.host import Place
from embedded.node import Node
from embedded.traffic import Reply, Server, eventually, probe_tcp
from tests.node.daemon import ROOT, Ctrport, publish, wait_open

# What an installation writes to becomes the node's own: a copy of /etc, and an /opt of links to what the machine has.
_PRIVATE = """
mkdir /run/machine /run/machine/opt
cp -a /etc /run/machine/etc
mount --bind /run/machine/etc /etc
mkdir -p /etc/systemd/system
mount --rbind /opt /run/machine/opt
mount -t tmpfs -o mode=755 tmpfs /opt
for entry in /run/machine/opt/*; do
    [ ! -e "$entry" ] || ln -s "$entry" /opt/
done
mount -t tmpfs -o mode=755 tmpfs /usr/local/sbin
"""

# As far as bin/install and bin/uninstall call it, for the one daemon there is.
_SYSTEMCTL = """\
#!/bin/sh
echo "$*" >>"$0.log"
case "$*" in
    is-active*) flock -n /run/ctrport/lock true && exit 3 || exit 0 ;;
    disable*)
        kill "$(sed -n 's/.*"pid": \\([0-9]*\\).*/\\1/p' /run/ctrport/status.json)"
        flock -w 5 /run/ctrport/lock true ;;
esac
"""

#: What systemd gives a service by itself (systemd.exec(5)).
SERVICE = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}

UNIT = ROOT / "systemd" / "ctrport.service"


def bounding_set() -> str:
    """Return the capabilities that the unit leaves the daemon, as setpriv(1) takes them."""
    found = re.search(r"^CapabilityBoundingSet=(.+)$", UNIT.read_text(), re.MULTILINE)
    assert found is not None
    return ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in found[1].split())])


def active(node: Node, count: int) -> list[dict[str, Any]]:
    """Wait until the daemon says that so many mappings are active, and return what it says of them."""

    def said() -> list[dict[str, Any]] | None:
        published: list[dict[str, Any]] = json.loads(node.path("/run/ctrport/status.json").read_text())["publications"]
        return published if [one["state"] for one in published] == ["active"] * count else None

    found = eventually(said, what=f"{count} active mappings")
    assert found is not None
    return found


def seeming_systemctl(directory: Path) -> Path:
    """Write one into a directory of its own; it logs each call beside itself."""
    path = directory / "programs" / "systemctl"
    path.parent.mkdir()
    path.write_text(_SYSTEMCTL)
    path.chmod(0o755)
    return path


@pytest.mark.timeout(400)
def test_install_upgrade_and_uninstall(node: Node, tmp_path: Path) -> None:
    Server(node.start("web"), 80)
    before = node.tables()
    node.run("sh", "-ec", _PRIVATE)
    # With the machine's network: what ctrport needs comes from the package index. Its resolv.conf may be a link into
    # /run, which is the node's own.
    resolv = node.path("/etc/resolv.conf")
    resolv.unlink(missing_ok=True)
    resolv.write_bytes(Path("/etc/resolv.conf").read_bytes())
    installing = Place("the node's files", node.pid, ["mnt", "pid"])
    systemctl = seeming_systemctl(node.directory)
    make = ("make", "--no-print-directory", "-C", str(ROOT), f"PYTHON={sys.executable}")
    env = {"PATH": f"{systemctl.parent}:{SERVICE['PATH']}"}

    # Installed: nothing runs, nothing is published, and where systemd does not run it is not called.
    first = installing.run(*make, "install", timeout=180, env=env)
    assert "systemd does not run here: start `/opt/ctrport/bin/ctrport run` by other means" in first.stdout
    assert not systemctl.with_name("systemctl.log").exists()
    config = node.path("/etc/ctrport/config.yaml")
    assert config.read_text() == (ROOT / "config.example.yaml").read_text()
    assert node.path("/etc/ctrport/conf.d").is_dir()
    assert node.path("/usr/local/sbin/ctrport").readlink() == Path("/opt/ctrport/bin/ctrport")
    assert node.path("/etc/systemd/system/ctrport.service").read_text() == UNIT.read_text()
    where = node.run("/opt/ctrport/bin/python", "-I", "-c", "import ctrport; print(ctrport.__file__)").stdout
    assert where.startswith("/opt/ctrport/lib/")
    assert node.run("ctrport", "check", env=SERVICE, cwd="/").stdout.startswith("/etc/ctrport/config.yaml: in order")
    assert node.tables() == before
    if shutil.which("systemd-analyze") is not None:
        verified = node.run("systemd-analyze", "verify", "/etc/systemd/system/ctrport.service", check=False)
        # Keys of systemd 254, which the unit says are none to an older one.
        known = [line for line in verified.stderr.splitlines() if "'RestartSteps'" not in line]
        assert [line for line in known if "'RestartMaxDelaySec'" not in line] == []
        assert verified.returncode == 0

    # It runs with no more than the unit gives it.
    part = node.path("/etc/ctrport/conf.d/web.yaml")
    part.write_text(publish(("{container: web}", "8080:80"), ("{container: web}", "443:80")))
    with (tmp_path / "log").open("w") as log:
        argv = ("setpriv", "--bounding-set", bounding_set(), "--no-new-privs", "/usr/local/sbin/ctrport", "run")
        daemon = node.spawn(*argv, env=SERVICE, cwd="/", stderr=log)
    wait_open(node, 8080, "web")
    assert isinstance(probe_tcp(node, "127.0.0.1", 8080), Reply)
    wait_open(node, 443, "web")
    assert {one["reason"] for one in active(node, 2)} == {""}  # reserved, the port below 1024 too

    # While the daemon runs its rules cannot be removed, so the program is not either.
    refused = node.run(*make, "uninstall", check=False, env=env)
    assert refused.returncode == 2  # make's
    assert "uninstall: rules may be left, so nothing is deleted" in refused.stderr
    assert isinstance(probe_tcp(node.client, node.address, 8080), Reply)
    shown = [line.split()[:2] for line in node.run("ctrport", "ps", env=SERVICE).stdout.splitlines()[1:]]
    assert shown == [["default/web", "443:80/tcp"], ["default/web", "8080:80/tcp"]]

    # An upgrade leaves the configuration, and has a running service restarted without waiting for it.
    node.path("/run/systemd/system").mkdir(parents=True)
    config.write_text("# mine\n")
    stray = node.path("/opt/ctrport/lib/stray")
    stray.write_text("of the version before\n")
    again = installing.run(*make, "install", timeout=180, env=env)
    assert "install: /etc/ctrport/config.yaml is left as it is" in again.stdout
    assert config.read_text() == "# mine\n"
    assert not stray.exists()
    assert not [*node.path("/opt").glob("ctrport?*")]
    calls = systemctl.with_name("systemctl.log")
    expected = ["daemon-reload", "is-active --quiet ctrport.service", "--no-block try-restart ctrport.service"]
    assert calls.read_text().splitlines() == expected
    assert daemon.poll() is None
    assert isinstance(probe_tcp(node.client, node.address, 8080), Reply)

    # Uninstalled: the service is stopped, the rules go, then the program. The configuration stays.
    calls.unlink()
    removed = node.run(*make, "uninstall", env=env)
    assert "every rule of ctrport is removed" in removed.stdout
    assert removed.stdout.endswith("uninstall: done; /etc/ctrport stays\n")
    assert calls.read_text().splitlines() == ["disable --now --quiet ctrport.service", "daemon-reload"]
    assert daemon.wait(5) == 0
    assert node.tables() == before
    assert node.run("cat", "/proc/sys/net/ipv4/conf/docker0/route_localnet").stdout == "0\n"
    assert (config.read_text(), part.exists()) == ("# mine\n", True)
    for path in ("/opt/ctrport", "/etc/systemd/system/ctrport.service", "/usr/local/sbin/ctrport", "/run/ctrport"):
        # The link would be followed to nowhere.
        assert node.run("sh", "-c", 'test -e "$1" -o -L "$1"', "-", path, check=False).returncode == 1, path
    assert "Traceback" not in (tmp_path / "log").read_text()


# Without an index: a Python that only seems to make environments, and a pip that only seems to install.

_PYTHON = """\
#!/bin/sh
case "$1" in
    -c) exit 0 ;;
    -m) mkdir -p "$3/bin" "$3/lib"
        echo "command = $0 -m venv $3" >"$3/pyvenv.cfg"
        cp "$0" "$3/bin/python" ;;
    -I) [ "$3" != pip ] || {pip} ;;
esac
"""
_PIP = """printf '#!%s/bin/python\\n' "${0%/bin/python}" >"${0%/bin/python}/bin/ctrport" """


def seeming(directory: Path, pip: str = _PIP) -> str:
    path = directory / "python"
    path.write_text(_PYTHON.replace("{pip}", pip))
    path.chmod(0o755)
    return str(path)


def script(name: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run bin/install or bin/uninstall with nothing but these settings."""
    return subprocess.run(
        [ROOT / "bin" / name], env={**SERVICE, **settings}, capture_output=True, text=True, check=False
    )


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir() or path.is_symlink()}


@pytest.mark.parametrize("prefix", ["/opt/ctrport", "/srv/ports"])
def test_destdir_is_a_tree_for_a_package(tmp_path: Path, prefix: str) -> None:
    stage = tmp_path / "stage"
    settings = {"PYTHON": seeming(tmp_path), "DESTDIR": str(stage), "PREFIX": prefix}
    ended = script("install", **settings)
    assert (ended.returncode, ended.stderr) == (0, "")
    program = prefix.lstrip("/")
    assert files(stage) == {
        *(f"{program}/pyvenv.cfg", f"{program}/bin/python", f"{program}/bin/ctrport"),
        *("etc/ctrport/config.yaml", "etc/systemd/system/ctrport.service", "usr/local/sbin/ctrport"),
    }
    assert (stage / "etc/ctrport/conf.d").is_dir()
    assert (stage / program / "bin/ctrport").read_text() == f"#!{prefix}/bin/python\n"
    for path in stage.rglob("*"):
        assert not path.is_file() or str(stage) not in path.read_text(), path
    assert f"\nExecStart={prefix}/bin/ctrport run\n" in (stage / "etc/systemd/system/ctrport.service").read_text()
    assert (stage / "usr/local/sbin/ctrport").readlink() == Path(prefix, "bin/ctrport")

    ended = script("uninstall", **settings)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == f"uninstall: done; {stage}/etc/ctrport stays\n"
    assert files(stage) == {"etc/ctrport/config.yaml"}
    assert script("uninstall", **settings).returncode == 0  # nothing left to do is no failure


def test_an_upgrade_that_fails_leaves_the_old_program_whole(tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    assert script("install", PYTHON=seeming(tmp_path), DESTDIR=str(stage)).returncode == 0
    whole = {name: (stage / name).read_text() for name in files(stage) if not (stage / name).is_symlink()}
    ended = script("install", PYTHON=seeming(tmp_path, pip="exit 1"), DESTDIR=str(stage))
    assert ended.returncode == 1
    assert {name: (stage / name).read_text() for name in files(stage) if not (stage / name).is_symlink()} == whole


@pytest.mark.parametrize("takes", [True, False])
def test_a_running_daemon_is_restarted_only_with_a_configuration_that_the_new_one_takes(
    node: Node, ctrport: Ctrport, takes: bool
) -> None:
    node.run("sh", "-ec", _PRIVATE)
    systemctl = seeming_systemctl(node.directory)
    node.path("/run/systemd/system").mkdir(parents=True)
    ctrport.configure("")
    ctrport.start()
    new = f"#!/bin/sh\n[ $1 != check ] || {'exit 0' if takes else 'exit 2'}\necho ctrport 9\n"
    (node.directory / "new").write_text(new)
    python = seeming(node.directory, pip=f'install {node.directory}/new "${{0%/bin/python}}/bin/ctrport"')
    env = {"PATH": f"{systemctl.parent}:{SERVICE['PATH']}", "PYTHON": python, "DESTDIR": ""}
    ended = node.run(str(ROOT / "bin" / "install"), check=False, env=env)
    expected = ["daemon-reload", "is-active --quiet ctrport.service", "--no-block try-restart ctrport.service"]
    assert systemctl.with_name("systemctl.log").read_text().splitlines() == (expected if takes else expected[:2])
    if takes:
        assert (ended.returncode, ended.stderr) == (0, "")
        assert "install: ctrport 9 is installed, and the running daemon is restarted" in ended.stdout
    else:
        refusal = "install: ctrport 9 is installed, and refuses the configuration: mend it, then systemctl restart"
        assert (ended.returncode, ended.stderr) == (1, f"{refusal} ctrport\n")


@pytest.mark.parametrize("prefix", ["opt/ctrport", "/opt", "/", "/opt/ctrport/", "/opt/../etc", "/opt/a b", "/opt/a|b"])
def test_a_prefix_that_is_no_plain_path_is_refused(tmp_path: Path, prefix: str) -> None:
    ended = script("install", PYTHON=seeming(tmp_path), DESTDIR=str(tmp_path / "stage"), PREFIX=prefix)
    assert ended.returncode == 1
    assert re.fullmatch(rf"install: PREFIX is '{re.escape(prefix)}': expected .*\n", ended.stderr)
    assert not (tmp_path / "stage").exists()


@pytest.mark.parametrize("name", ["install", "uninstall"])
def test_a_directory_of_somebody_else_is_left_alone(tmp_path: Path, name: str) -> None:
    # PREFIX=/usr/local is what other programs take.
    other = tmp_path / "usr/local/bin/other"
    other.parent.mkdir(parents=True)
    other.touch()
    ended = script(name, PYTHON=seeming(tmp_path), DESTDIR=str(tmp_path), PREFIX="/usr/local")
    assert (ended.returncode, len(ended.stderr.splitlines())) == (1, 1)
    assert f"{tmp_path}/usr/local is " in ended.stderr
    assert files(tmp_path) == {"python", "usr/local/bin/other"}


def test_a_program_of_that_name_is_left_alone(tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    other = stage / "usr/local/sbin/ctrport"
    other.parent.mkdir(parents=True)
    other.touch()
    ended = script("install", PYTHON=seeming(tmp_path), DESTDIR=str(stage))
    assert ended.returncode == 1
    assert ended.stderr == f"install: {other} is there and is no link: move it out of the way\n"
    assert script("uninstall", DESTDIR=str(stage)).returncode == 0
    assert files(stage) == {"usr/local/sbin/ctrport"}


def test_without_a_fit_python_it_says_what_to_install(tmp_path: Path) -> None:
    ended = script("install", PYTHON="/nonexistent/python", DESTDIR=str(tmp_path / "stage"))
    assert ended.returncode == 1
    assert ended.stderr.startswith("install: /nonexistent/python is no Python 3.10 or later with venv: apt-get install")
    assert not (tmp_path / "stage").exists()


# What systemd is told.


class ServiceManager:
    """Listens where a daemon tells systemd of itself."""

    def __init__(self, node: Node) -> None:
        self.address = node.directory / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.address))
        node.at_close(self._socket.close)
        self.told: list[str] = []

    def listen(self, within: float) -> str:
        """Return the next message, or raise TimeoutError."""
        self._socket.settimeout(within)
        self.told.append(self._socket.recv(4096).decode())
        return self.told[-1]

    def hear_out(self, silence: float) -> list[str]:
        """Return all that has been told once nothing more came for as long as ``silence``."""
        with contextlib.suppress(TimeoutError):
            while True:
                self.listen(silence)
        return self.told

    def listen_for(self, word: str, within: float = 10) -> str:
        """Return the first message from now on that has ``word``."""

        def told() -> str | None:
            with contextlib.suppress(TimeoutError):
                message = self.listen(0.2)
                return message if word in message else None
            return None

        found = eventually(told, within=within, what=f"systemd being told {word}")
        assert found is not None
        return found


def test_ready_is_said_when_the_rules_are_in_the_kernel_and_not_before(node: Node, ctrport: Ctrport) -> None:
    manager = ServiceManager(node)
    Server(node.start("web"), 80)
    Server(node.start("shop"), 80)
    ctrport.configure(publish(("{container: web}", "8080:80"), ("{container: shop}", "8081:80")))
    node.stop_containerd()
    ctrport.start(wait=False, env={"NOTIFY_SOCKET": str(manager.address)})
    eventually(lambda: "waiting for it" in ctrport.messages, what="the daemon waiting for containerd")
    assert not any("READY=1" in message for message in manager.hear_out(1))
    assert not isinstance(probe_tcp(node.client, node.address, 8080, timeout=0.5), Reply)

    node.start_containerd()
    ready = manager.listen_for("READY=1")
    with ctrport.frozen():  # nothing that comes after READY=1 can help any more
        for port, name in ((8080, "web"), (8081, "shop")):
            outcome = probe_tcp(node.client, node.address, port)
            assert isinstance(outcome, Reply)
            assert outcome.name == name
    assert ready.splitlines() == ["READY=1", "STATUS=2 of 2 publications active"]

    node.stop_containerd()
    assert manager.listen_for("containerd is lost") == "STATUS=containerd is lost; rules stay as they are"
    assert ctrport.stop() == 0
    manager.listen_for("STOPPING=1")
    manager.hear_out(0.3)
    assert sum("STOPPING=1" in message for message in manager.told) == 1


def test_the_status_follows_the_publications(node: Node, ctrport: Ctrport) -> None:
    manager = ServiceManager(node)
    ctrport.configure(publish(("{container: web}", "8080:80"), ("{container: shop}", "8081:80")))
    ctrport.start(wait=False, env={"NOTIFY_SOCKET": str(manager.address)})
    assert "STATUS=0 of 2 publications active" in manager.listen_for("READY=1")
    web = node.start("web")
    assert manager.listen_for("STATUS=1 of 2") == "STATUS=1 of 2 publications active"
    node.delete(web)
    assert manager.listen_for("STATUS=0 of 2") == "STATUS=0 of 2 publications active"


# Started ahead of its input, as ever: so the change after the next is the first that is held up.
_HELD_UP = """\
#!/bin/sh
while [ -e "$0.held" ]; do sleep 0.05; done
PATH={path} exec "${{0##*/}}" "$@"
"""


def test_the_watchdog_hears_of_turns_that_were_completed_and_of_nothing_else(node: Node, ctrport: Ctrport) -> None:
    manager = ServiceManager(node)
    restore = node.directory / "programs" / "iptables-nft-restore"
    restore.parent.mkdir()
    restore.write_text(_HELD_UP.format(path=os.environ["PATH"]))
    restore.chmod(0o755)
    held = restore.with_name(f"{restore.name}.held")
    ctrport.configure(publish(*((f"{{container: {name}}}", f"{port}:80") for port, name in enumerate("abc", 8080))))
    env = {"NOTIFY_SOCKET": str(manager.address), "PATH": f"{restore.parent}:{os.environ['PATH']}"}
    ctrport.start(wait=False, env={**env, "WATCHDOG_USEC": "180000000"})
    manager.listen_for("READY=1")
    manager.listen_for("WATCHDOG=1")
    node.start("a")
    manager.listen_for("STATUS=1 of 3")
    manager.listen_for("WATCHDOG=1")
    manager.hear_out(0.3)

    held.touch()
    node.start("b")
    node.start("c")
    told = len(manager.hear_out(0.5))
    node.start("d")  # "c" is held up: events come, and the loop does not come round
    manager.hear_out(1)
    assert not any("WATCHDOG=1" in message for message in manager.told[told:])
    held.unlink()
    manager.listen_for("WATCHDOG=1")

    # A containerd that is not there is tried again and again.
    node.stop_containerd()
    manager.listen_for("containerd is lost")
    for _ in range(3):
        manager.listen_for("WATCHDOG=1", within=5)
    assert ctrport.stop() == 0


def test_without_a_watchdog_it_is_not_told(node: Node, ctrport: Ctrport) -> None:
    manager = ServiceManager(node)
    ctrport.configure("")
    ctrport.start(env={"NOTIFY_SOCKET": str(manager.address), "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"})
    assert not any("WATCHDOG" in message for message in manager.hear_out(0.3))
    assert ctrport.stop() == 0


@pytest.mark.parametrize("address", ["", "notify", "/nonexistent/notify"])
def test_a_service_manager_that_is_not_there_stops_nothing(node: Node, ctrport: Ctrport, address: str) -> None:
    Server(node.start("web"), 80)
    ctrport.configure(publish(("{container: web}", "8080:80")))
    ctrport.start(env={"NOTIFY_SOCKET": address})
    wait_open(node, 8080, "web")
    assert ctrport.stop() == 0
