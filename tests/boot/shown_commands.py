"""What the documentation shows for systemd, the journal, firewalld and apt: as it is shown, in the booted machine."""

from __future__ import annotations

from embedded.wait import eventually
from tests.boot.machine import ENVIRONMENT
from tests.boot.world import UNIT, World
from tests.shown import BOOT, Way, texts

# It wants a terminal, and somebody who writes what docs/metrics.md has into it.
_TERMINAL = ("python3", "-c", "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)")
_EDITOR = ("env", r"SYSTEMD_EDITOR=sed -i 3i[Service]\nIPAddressAllow=192.0.2.10")
_EDITED = f"/etc/systemd/system/{UNIT}.d/override.conf"
_FIREWALLD = "systemctl start firewalld"
_NO_FIREWALLD = "systemctl stop firewalld"
_THERE = "is already the newest version"

WAYS = {
    "systemctl enable --now ctrport": Way(before="systemctl stop ctrport", after="systemctl disable --quiet ctrport"),
    "systemctl start ctrport": Way(before="systemctl stop ctrport"),
    "systemctl stop ctrport": Way(after="systemctl start ctrport"),
    "systemctl status ctrport": Way(says="publications active"),
    "systemctl status containerd": Way(says="active (running)"),
    "systemctl edit ctrport": Way(
        behind=(*_EDITOR, *_TERMINAL),
        after=f"grep -qx IPAddressAllow=192.0.2.10 {_EDITED} && rm {_EDITED} && systemctl daemon-reload",
    ),
    "systemd-analyze security ctrport.service": Way(says="Overall exposure level"),
    "journalctl -u ctrport -n 50": Way(says="in-line"),
    "journalctl -u ctrport -n 20": Way(says="in-line"),
    "journalctl -u ctrport -p warning": Way(says="containerd-lost"),
    "journalctl _PID=4711": Way(says="in-line"),
    "firewall-cmd --permanent --zone=trusted --add-interface=docker0": Way(before=_FIREWALLD, after=_NO_FIREWALLD),
    "firewall-cmd --reload": Way(before=_FIREWALLD, after=_NO_FIREWALLD),
    # There is no network: what is seen is that Debian has packages of these names.
    "apt-get install gcc libc6-dev python3-dev": Way(says=_THERE),
    "apt-get install python3-venv iptables": Way(says=_THERE),
    "apt-get install iptables": Way(says=_THERE),
    "apt-get install nftables": Way(says=_THERE),
}

#: What is not run here, and why, or where else.
ELSEWHERE = {
    "systemctl reload": "the name of a command; it is shown with ctrport, too",
    "systemctl restart": "the name of a command; it is shown with ctrport, too",
    "systemctl stop": "the name of a command; it is shown with ctrport, too",
    "systemd-analyze fdstore ctrport.service": "from systemd 254 on, as the page says; this one is older",
    "tar -xzf ctrport-0.1.0-linux-x86_64.tar.gz": "the archive of `make dist`: by the step archive_install",
}


def shown_commands(world: World) -> str:
    """What the documentation shows, in the order of the pages, beside a daemon that publishes web."""
    tried = [text for text in texts(BOOT) if text not in ELSEWHERE]
    for text in tried:
        _try(world, text, WAYS.get(text, Way()))
    world.wait_quiet()
    return f"{len(tried)} commands do what they are shown for"


def _try(world: World, text: str, way: Way) -> None:
    world.wait_active()
    world.wait_open(8080)
    pid = str(eventually(lambda: world.pid, what="the daemon's number"))
    for line, its in ((way.before, Way()), (text.replace("4711", pid), way), (way.after, Way())):
        if line:
            ended = world.machine.run(*its.behind, "sh", "-c", line, check=False, env=ENVIRONMENT, timeout=60)
            try:
                its.hold(ended.returncode, ended.stdout + ended.stderr)
            except AssertionError as error:
                raise AssertionError(f"{text}: {line}: {error}") from None
