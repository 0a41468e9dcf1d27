"""The steps, in order. Each returns what was seen, or raises ``AssertionError``."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from embedded.host import ALL_NAMESPACES, Place
from embedded.traffic import Outcome, Refused, Reply, Server, TimedOut, Unreachable, probe_tcp, probe_udp
from embedded.wait import eventually
from tests.boot.shown_commands import shown_commands
from tests.boot.tree import ROOT
from tests.boot.world import CLIENT, NODE, UNIT, World
from tests.node.prometheus import scraped

#: Seconds of the watchdog in here: more than two turns of an idle loop. The unit's own would take longer than the rest.
WATCHDOG = 25
_DROP_IN = f"""
[Service]
WatchdogSec={WATCHDOG}
"""

_CAPABILITIES = {
    "DAC_READ_SEARCH": 2,
    "NET_BIND_SERVICE": 10,
    "NET_BROADCAST": 11,
    "NET_ADMIN": 12,
    "NET_RAW": 13,
    "SYS_PTRACE": 19,
}

# 8082 has a program of another user, 8090 comes with a reload.
CONFIG = """
networks: [{bridge: docker0}]
publish:
  - match: {container: web}
    ports: ["8080:80", "443:80", "8053:53/udp", "8082:80"]
  - match: {container: far}
    ports: ["8081:80"]
"""
_MORE = (
    CONFIG
    + """
  - match: {container: web}
    ports: ["8090:80"]
"""
)
_LEGACY = (
    CONFIG
    + """
firewall: {backend: iptables-legacy}
"""
)

_OTHER = """
import socket, time
one = socket.socket()
one.bind(("0.0.0.0", 8082))
one.listen()
print(flush=True)
time.sleep(3600)
"""
# In the daemon's own cgroup, as if it were the daemon that sent something.
_SEND = """
echo $$ >/sys/fs/cgroup/system.slice/ctrport.service/cgroup.procs
exec python3 -c 'import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("198.51.100.2", 9))'
"""

# What docs/operating.md has for a Prometheus elsewhere: here the client.
_SCRAPED_BY_THE_CLIENT = """
[Service]
IPAddressAllow=198.51.100.2
"""

# An operator's own table that lets nothing through; what mends it is one rule.
_DROPPING = """
table inet other {
    chain forward { type filter hook forward priority 10; policy drop; ct state established accept; }
}
"""

# The machine that an archive is for has none of these.
_BARE = """
rm -rf /root/wheels /usr/bin/*gcc* /usr/bin/cc /usr/bin/c89* /usr/bin/c99* /usr/lib/gcc /usr/include
rm -rf /usr/lib/python3*/ensurepip /usr/share/python-wheels /usr/lib/python3/dist-packages/pip
! command -v cc gcc pip pip3
! python3 -c 'import ensurepip' 2>/dev/null
"""


def boots(world: World) -> str:
    """A Debian with systemd, cgroup v2 and containerd.service."""
    machine = world.machine
    version = machine.command("systemctl", "--version").split()[1]
    assert machine.path("/sys/fs/cgroup/cgroup.procs").exists(), "no cgroup v2 in there"
    assert machine.state == "running", machine.command("systemctl", "--failed", "--no-legend")
    containerd = machine.command("ctr", "version").split("Server:")[1].split()[1]
    return f"systemd {version} is running, with cgroup v2 and containerd {containerd}"


def make_install(world: World) -> str:
    """From a wheelhouse: the machine has no network."""
    began = time.monotonic()
    said = world.make("install")
    took = time.monotonic() - began
    assert "is installed. Declare ports" in said, said
    state = world.machine.show(UNIT, "UnitFileState"), world.machine.show(UNIT, "ActiveState")
    assert state == ("disabled", "inactive"), state
    _drop_in(world)
    return f"in {took:.0f} s, without a network; the unit is {' and '.join(state)}"


def archive_install(world: World) -> str:
    """From what `make dist` has built: the machine has no network, and by now no compiler and no pip either."""
    machine = world.machine
    archives = [*(ROOT / "dist").glob("ctrport-*.tar.gz")]
    assert len(archives) == 1, "expected one archive in dist: make dist"
    machine.shell(_BARE)
    name = archives[0].name
    shutil.copy(archives[0], machine.path(f"/root/{name}"))
    machine.shell(f"cd /root; tar -xzf {name}")
    began = time.monotonic()
    said = machine.command(f"/root/{name.removesuffix('.tar.gz')}/install")
    took = time.monotonic() - began
    assert "is installed. Declare ports" in said, said
    _drop_in(world)
    return f"in {took:.0f} s, without network, compiler and pip"


def _drop_in(world: World) -> None:
    drop_in = world.machine.path(f"/etc/systemd/system/{UNIT}.d/boot.conf")
    drop_in.parent.mkdir()
    drop_in.write_text(_DROP_IN)
    world.systemctl("daemon-reload")


def security(world: World) -> str:
    """What systemd makes of the unit."""
    machine = world.machine
    shown = machine.command("systemd-analyze", "security", "--no-pager", "--threshold=25", UNIT)
    verified = machine.run("systemd-analyze", "verify", "--man=no", UNIT)
    unknown = [line for line in verified.stderr.splitlines() if "'Restart" not in line]  # keys of systemd 254
    assert not unknown, unknown
    return next(line for line in shown.splitlines() if "Overall" in line).partition("Overall ")[2].rstrip(" :-)")


def containerd_comes_later(world: World) -> str:
    """Ordered behind containerd and not bound to it: it waits, begins when that answers, and stays when that goes."""
    machine = world.machine
    world.configure(CONFIG)
    world.before = world.tables()
    world.systemctl("stop", "containerd")
    world.systemctl("start", "--no-block", "ctrport")
    eventually(lambda: "waiting for it" in machine.journal(UNIT), what="the daemon waiting")
    assert machine.show(UNIT, "ActiveState") == "activating"
    assert machine.show("containerd", "ActiveState") == "inactive", "it was started along"
    world.systemctl("start", "containerd")
    began = time.monotonic()
    pid = world.wait_active()
    took = time.monotonic() - began
    world.systemctl("stop", "containerd")
    eventually(lambda: "containerd is lost" in machine.show(UNIT, "StatusText"), what="the loss being told")
    world.systemctl("start", "containerd")
    eventually(lambda: machine.show(UNIT, "StatusText").startswith("0 of"), what="containerd being there again")
    assert world.pid == pid
    return f"activating without it, active after {took:.1f} s with it; the same process when it was stopped and started"


def publishes(world: World) -> str:
    """Packets from elsewhere and from the node; a container in a user namespace; a port below 1024."""
    other = world.machine.spawn(
        *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "python3", "-c", _OTHER), stdout=-1
    )
    assert other.stdout is not None
    other.stdout.readline()
    web = world.start_container("web")
    Server(web, 53, kind=socket.SOCK_DGRAM, name="web")
    world.start_container("far", user_namespace=True)
    world.wait_open(8080)
    world.wait_open(8081)
    peer = world.asked(8080).peer
    assert peer == CLIENT, peer
    world.asked(443)
    world.asked(8081, "far")
    assert isinstance(probe_udp(world.client, NODE, 8053), Reply)
    world.asked(8080, place=world.machine, address="127.0.0.1")
    world.asked(8080, place=web)

    def settled() -> bool:
        states = [one["state"] for one in world.publications()]
        return sorted(states) == ["active"] * 4 + ["conflict"]

    eventually(settled, what="four active mappings and a conflict")
    shown = {one["mapping"]: one for one in world.publications()}
    reasons = {one["reason"] for one in shown.values() if one["state"] == "active"}
    assert reasons == {""}, reasons  # reserved, the one below 1024 too
    reason = shown["8082:80/tcp"]["reason"]
    assert "python3 (pid " in reason, reason
    return f"web answers {peer} at 8080, 443 and 8053/udp, the node, and itself; far in its user namespace; {reason}"


def least_privilege(world: World) -> str:
    """What the process itself has, and what it is refused."""
    outer = world.machine.outer_pid(world.pid)
    lines = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{outer}/status").read_text().splitlines() if ":\t" in line
    )
    assert int(lines["CapEff"], 16) == sum(1 << bit for bit in _CAPABILITIES.values()), lines["CapEff"]
    assert (lines["NoNewPrivs"], lines["Seccomp"]) == ("1", "2")
    inside = Place("the daemon's files", outer, ALL_NAMESPACES)
    for path in ("/etc/ctrport/new", "/opt/ctrport/new", "/run/new", "/usr/new", "/var/new"):
        ended = inside.run("touch", path, check=False)
        assert "Read-only file system" in ended.stderr, (path, ended.stderr)
    assert inside.run("ls", "/root", check=False).stdout == ""
    sent = world.machine.run("sh", "-c", _SEND, check=False)
    assert "PermissionError" in sent.stderr, "the service could send over IP"
    return (
        f"{len(_CAPABILITIES)} capabilities, a filter for system calls; /etc, /opt, /run, /usr, /var read-only; "
        "no IP but to the machine itself"
    )


def _again(world: World, how: Callable[[int], None]) -> str:
    """See that a port answers and is nobody else's while the daemon is replaced, and what systemd holds of it."""
    before = world.pid
    # Four mappings, two families. That a container's network made the node forward IPv6 is seen by the next look.
    held = eventually(
        lambda: world.machine.show(UNIT, "NFileDescriptorStore") == "8" and 8, within=15, what="8 sockets"
    )
    with world.asking(8080) as asking, world.grabbing(8080) as grabbing:
        how(before)
        world.wait_active(not_pid=before)
        eventually(lambda: world.machine.show(UNIT, "NFileDescriptorStore") == "8", what="the sockets being held")
    return f"{held} sockets held; {grabbing.never_had()}; {asking.none_lost()}"


def restart(world: World) -> str:
    """`systemctl restart`: the sockets that hold host ports stay with systemd."""
    return _again(world, lambda pid: world.systemctl("restart", "ctrport"))


def kill_9(world: World) -> str:
    """The same where the daemon has no chance to say anything."""
    before = world.restarts
    seen = _again(world, lambda pid: os.kill(world.machine.outer_pid(pid), signal.SIGKILL))
    assert world.restarts == before + 1
    return seen


def watchdog(world: World) -> str:
    """A daemon that idles is alive, one without containerd too; one that is stopped is not."""
    before, pid = world.restarts, world.pid
    time.sleep(WATCHDOG + 3)
    world.systemctl("stop", "containerd")
    time.sleep(WATCHDOG + 3)
    world.systemctl("start", "containerd")
    assert (world.restarts, world.pid) == (before, pid), "the watchdog took one for dead that was not"
    since, began = world.now(), time.monotonic()
    with world.asking(8080) as asking:
        os.kill(world.machine.outer_pid(pid), signal.SIGSTOP)
        world.wait_active(not_pid=pid, within=WATCHDOG + 40)
    took = time.monotonic() - began
    where = eventually(lambda: _traceback(world.log_since(since)), what="the journal having where it was")
    assert "Watchdog timeout" in world.log_since(since)
    assert world.restarts == before + 1
    return (
        f"limit {WATCHDOG} s here: quiet while idle and without containerd; SIGSTOP, and {took:.0f} s later another "
        f"process ({asking.none_lost()}); the journal has where it was ({where})"
    )


def _traceback(log: str) -> str:
    """Return the innermost line that faulthandler has for the main thread, which it writes last."""
    stack = log.rpartition("hread 0x")[2].splitlines()[1:2]
    return stack[0].strip() if "Fatal Python error: Aborted" in log and stack else ""


def reload(world: World) -> str:
    """`systemctl reload` takes up what is new in the configuration, in the same process."""
    pid = world.pid
    world.configure(_MORE)
    with world.asking(8080) as asking:
        world.systemctl("reload", "ctrport")
        took = world.wait_open(8090)
        world.configure(CONFIG)
        world.systemctl("reload", "ctrport")
        eventually(lambda: isinstance(probe_tcp(world.client, NODE, 8090), Refused), what="8090 being closed")
    assert world.pid == pid, "it is another process"
    world.wait_quiet()  # it watches the file as well, and mends all when it reads it anew
    return f"8090 opened after {took:.0f} ms and closed again by the same process; {asking.none_lost()}"


def metrics(world: World) -> str:
    """For this machine as the unit is; for others with the drop-in that is documented."""
    machine = world.machine
    world.configure(f"{CONFIG}metrics: {{listen: 127.0.0.1:9477}}\n")
    world.systemctl("reload", "ctrport")
    here = eventually(lambda: _scraped(machine, "127.0.0.1"), within=15, what="the metrics being served")
    assert here["ctrport_in_line"] == 1, here
    world.configure(f"{CONFIG}metrics: {{listen: {NODE}:9477}}\n")
    world.systemctl("reload", "ctrport")
    served = f"metrics are served at http://{NODE}:9477/metrics to everybody who can reach it"
    eventually(lambda: served in machine.journal(UNIT), what="the other address being served")
    filtered = probe_tcp(world.client, NODE, 9477, timeout=1)
    assert isinstance(filtered, TimedOut), filtered
    drop_in = machine.path(f"/etc/systemd/system/{UNIT}.d/metrics.conf")
    drop_in.write_text(_SCRAPED_BY_THE_CLIENT)
    world.systemctl("daemon-reload")
    world.systemctl("restart", "ctrport")
    there = eventually(lambda: _scraped(world.client, NODE), within=15, what="the client being answered")
    drop_in.unlink()
    world.systemctl("daemon-reload")
    world.configure(CONFIG)
    world.systemctl("restart", "ctrport")
    world.wait_quiet()
    memory = there["process_resident_memory_bytes"] / (1 << 20)
    return f"at 127.0.0.1; elsewhere nobody is answered, and the client with a drop-in; {memory:.0f} MiB resident"


def _scraped(place: Place, address: str) -> dict[str, float]:
    try:
        return scraped(place, address=address)
    except OSError:
        return {}


def legacy_tables(world: World) -> str:
    """The workers for legacy tables below the same unit."""
    machine = world.machine
    for config, program in ((_LEGACY, "iptables-legacy-save"), (CONFIG, "iptables-nft-save")):
        world.systemctl("stop", "ctrport")
        machine.command("ctrport", "clean")
        assert isinstance(probe_tcp(world.client, NODE, 8080), Refused)
        world.configure(config)
        world.systemctl("start", "ctrport")
        world.asked(8080)
        world.asked(8080, place=machine, address="127.0.0.1")
        assert "ctrport default/web 8080:80/tcp" in machine.command(program)
    return "published by iptables-legacy through python-iptables, and by iptables-nft again"


def _back(world: World, how: Callable[[], object]) -> str:
    """Do what takes our rules away; wait until they are back, and return what the daemon said of it."""
    pid, (before, _) = world.pid, world.repairs()
    how()
    eventually(lambda: world.repairs()[0] > before, within=15, what="a repair")
    world.wait_open(8080)
    eventually(lambda: world.machine.run("ctrport", "plan", check=False).returncode == 0, what="nothing to change")
    world.asked(8080, place=world.machine, address="127.0.0.1")
    assert world.pid == pid, "it is another process"
    return world.repairs()[1].rpartition(", ")[2]


def flush(world: World) -> str:
    """What any script can do."""
    return _back(world, lambda: world.machine.command("nft", "flush", "ruleset"))


def nftables_service(world: World) -> str:
    """Debian's: its start, its reload and its stop all flush what is there."""
    started = _back(world, lambda: world.systemctl("start", "nftables"))
    reloaded = _back(world, lambda: world.systemctl("reload", "nftables"))
    _back(world, lambda: world.systemctl("restart", "nftables"))
    _back(world, lambda: world.systemctl("stop", "nftables"))
    return f"start: {started}. reload: {reloaded}"


def firewalld(world: World) -> str:
    """Started and reloaded beside it; then what it lets through, by packets."""
    machine, web = world.machine, world.containers["web"]
    Server(world.client, 9000, name="outside")
    assert isinstance(probe_tcp(web, CLIENT, 9000), Reply)
    started = _back(world, lambda: world.systemctl("start", "firewalld"))
    machine.command("firewall-cmd", "--zone=public", "--add-interface=lan0")
    tables = machine.command("nft", "list", "tables")
    assert "inet firewalld" in tables, tables
    _back(world, lambda: machine.command("firewall-cmd", "--reload"))
    world.systemctl("reload", "firewalld")
    world.wait_active()
    world.wait_open(8080)
    world.asked(443)
    world.asked(8080, place=web)
    out = {"in no zone": probe_tcp(web, CLIENT, 9000)}
    machine.command("firewall-cmd", "--permanent", "--zone=trusted", "--add-interface=docker0")
    _back(world, lambda: machine.command("firewall-cmd", "--reload"))
    out["docker0 in trusted"] = probe_tcp(web, CLIENT, 9000)
    world.asked(8080)
    machine.command("firewall-cmd", "--zone=drop", "--change-interface=lan0")
    dropped = probe_tcp(world.client, NODE, 8080)
    seen = ", ".join(f"{where}: {_seen(outcome)}" for where, outcome in out.items())
    assert isinstance(out["in no zone"], Unreachable), seen
    assert isinstance(out["docker0 in trusted"], Reply), seen
    assert isinstance(dropped, Reply), dropped
    _back(world, lambda: world.systemctl("stop", "firewalld"))
    return f"{started}. Published ports answer, from its zone drop too; from the container to elsewhere, {seen}"


def _seen(outcome: Outcome) -> str:
    return "an answer" if isinstance(outcome, Reply) else type(outcome).__name__


def drop_in_another_table(world: World) -> str:
    """A limit: an accept of ours is not the last word where another table drops."""
    machine = world.machine
    machine.run("nft", "-f", "-", input=_DROPPING)
    dropped = probe_tcp(world.client, NODE, 8080, timeout=1)
    assert isinstance(dropped, TimedOut), dropped
    machine.command("nft", "insert", "rule", "inet", "other", "forward", "ct", "status", "dnat", "accept")
    world.asked(8080)
    machine.command("nft", "delete", "table", "inet", "other")
    return "policy drop in a forward chain of somebody's: no answer; with `ct status dnat accept` in it: an answer"


def upgrade(world: World) -> str:
    """`make install` once more, beside the running daemon."""
    said = ""

    def install(pid: int) -> None:
        nonlocal said
        said = world.make("install")

    seen = _again(world, install)
    assert "the running daemon is restarted" in said, said
    return seen


def uninstall(world: World) -> str:
    """Nothing is left but the configuration."""
    machine = world.machine
    world.systemctl("enable", "--quiet", "ctrport")
    said = world.make("uninstall")
    assert said.endswith("uninstall: done; /etc/ctrport stays\n"), said
    assert world.tables() == world.before, world.tables()
    assert isinstance(probe_tcp(world.client, NODE, 8080), Refused)
    paths = ("/opt/ctrport", f"/etc/systemd/system/{UNIT}", "/usr/local/sbin/ctrport", "/run/ctrport")
    wanted = f"/etc/systemd/system/multi-user.target.wants/{UNIT}"
    for path in (*paths, wanted):
        assert not os.path.lexists(machine.path(path)), path
    left = machine.run("pgrep", "-fa", "/opt/ctrport", check=False).stdout
    assert left == "", left
    with machine.socket() as one:
        one.bind(("0.0.0.0", 8080))  # nobody holds it any more
    assert machine.command("cat", "/proc/sys/net/ipv4/conf/docker0/route_localnet") == "0\n"
    return "no rule, no file, no process, no socket of it; /etc/ctrport stays"


STEPS: tuple[Callable[[World], str], ...] = (
    *(boots, make_install, security, containerd_comes_later, publishes, least_privilege),
    *(restart, kill_9, watchdog, legacy_tables, reload, metrics),
    *(flush, nftables_service, firewalld, drop_in_another_table, shown_commands, upgrade, uninstall),
)

#: What is tried of the archive of `make dist`; all else is the same program.
ARCHIVE_STEPS: tuple[Callable[[World], str], ...] = (
    *(boots, archive_install, containerd_comes_later, publishes, least_privilege, restart, legacy_tables, uninstall),
)
