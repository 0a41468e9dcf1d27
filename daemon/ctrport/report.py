"""What is published, for a command that asks: the daemon's word, or where it is down what can be seen without it.

Without the daemon it is worked out anew, by the same rooms: config and containerd say what should be, the kernel says
what of it there is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import __version__, ports, status
from .config import Config
from .containerd import Containerd
from .dataplane import Dataplane, Transition
from .endpoints import Endpoints
from .firewall import AnyPlan, Firewall, FirewallError
from .firewall.backends import others_than
from .hostports import Reservations
from .installed import Sight, shown
from .listeners import UNKNOWN
from .model import Family, Holder
from .owners import owner_of
from .rules import Layout
from .survey import Survey

# What is said of a socket that systemd alone has: one of tcp, which does not listen, is in no table of the kernel's.
_SYSTEMD = (UNKNOWN, "systemd (pid 1)")

NOT_INSTALLED = "its rules are not all in the kernel, and no daemon runs: systemctl start ctrport"


async def without_daemon(
    config: Config, firewalls: dict[Family, Firewall], layout: Layout, directory: Path
) -> status.Status:
    """Return what would be published and what of it the kernel holds. Changes nothing.

    Raises ``ContainerdError`` or ``FirewallError``.
    """
    survey, due, version = await _look(config, firewalls, layout, directory)
    last = status.read(directory)
    since = {its.owner: its.since for its in last.publications if its.owner} if last is not None else {}
    publications = [status.PublicationStatus.of(each, "") for each in survey.publications]
    current = status.Status(
        version=__version__,
        running=False,
        pid=0,
        updated=last.updated if last is not None else "",
        containerd=f"answers, version {version}",
        firewall="",
        publications=[replace(its, since=since.get(its.owner, "")) for its in publications],
        networks=status.networks(survey.facts, survey.amiss),
        warnings=[*survey.warnings, *await _elsewhere(firewalls.values(), layout)],
        backend=next(iter(firewalls.values())).name,
        families=[family.value for family in firewalls],
        layout=status.layout(layout),
        addresses=sorted(map(str, survey.facts.addresses)),
        services=sorted(map(str, survey.facts.services)),
    )
    seen = shown(current, await Sight.of(due, firewalls.values()), NOT_INSTALLED)
    return replace(seen, firewall=_summary(due, sum(its.installed is False for its in seen.publications)))


async def _elsewhere(firewalls: Collection[Firewall], layout: Layout) -> list[str]:
    """Return what the kernel holds of ours beside what is to be there, in a sentence each."""
    said = []
    if any([await firewall.plan_sweep() for firewall in firewalls]):
        said.append("the kernel holds chains of another firewall.chain, too: `ctrport plan` shows them")
    for other in await others_than(next(iter(firewalls)).name, layout):
        with contextlib.suppress(FirewallError):  # what cannot be read there is somebody else's, or not there
            if await other.counters():
                said.append(f"{other.name} holds rules of ours, too: the daemon removes them when it starts")
    return list(dict.fromkeys(said))


@dataclass(frozen=True)
class Pending:
    """What ``run`` would change in the kernel now: what is due, and then what deletes chains of another name."""

    due: Transition
    sweeps: Sequence[tuple[Firewall, AnyPlan]]

    def diff(self) -> list[str]:
        """Return the lines of a diff, empty where nothing is to change."""
        lines = [f"- sysctl net.ipv4.conf.{device}.route_localnet=1" for device in self.due.localnet_off]
        for firewall, plan in (*self.due.plans, *self.sweeps):
            lines += firewall.diff(plan)
        lines += [f"+ sysctl net.ipv4.conf.{device}.route_localnet=1" for device in self.due.localnet_on]
        return lines + [f"+ bridge link set dev {port} hairpin on" for port in self.due.hairpin_on]

    def script(self) -> list[str]:
        """Return lines of shell that do it, in the order of ``run``; empty where nothing is to change."""
        lines = [_switch(device, 0) for device in self.due.localnet_off]
        for firewall, plan in self.due.plans:
            lines += firewall.script(plan)
        lines += [_switch(device, 1) for device in self.due.localnet_on]
        lines += [f"bridge link set dev {port} hairpin on" for port in self.due.hairpin_on]
        for firewall, plan in self.sweeps:
            lines += firewall.script(plan)
        return lines


def _switch(device: str, value: int) -> str:
    # With slashes: the name of a device may have dots.
    return f"sysctl -w net/ipv4/conf/{device}/route_localnet={value}"


async def pending(config: Config, firewalls: dict[Family, Firewall], layout: Layout, directory: Path) -> Pending:
    """Return what ``run`` would change in the kernel now. Changes nothing.

    Raises ``ContainerdError`` or ``FirewallError``.
    """
    _, due, _ = await _look(config, firewalls, layout, directory)
    return Pending(due, [(firewall, await firewall.plan_sweep()) for firewall in firewalls.values()])


async def _look(
    config: Config, firewalls: dict[Family, Firewall], layout: Layout, directory: Path
) -> tuple[Survey, Transition, str]:
    """Return the node with its publications as they should be, what is due in the kernel, and containerd's version."""
    async with Containerd(config.containerd.address) as containerd, Endpoints() as endpoints:
        survey = Survey(config, containerd, endpoints, firewalls)
        version = await containerd.version()
        dataplane = Dataplane(firewalls, layout)
        await dataplane.start()
        survey.publications.recover(dataplane.chosen)
        await survey.everything()
    while True:
        changes = survey.publications.decide()
        reservations = Reservations(config.firewall.reserve_limit, survey.container_of)
        dataplane = Dataplane(firewalls, layout, reservations)
        await dataplane.start()
        due = await dataplane.preview(changes, survey.facts)
        wanted = [change for change in changes if change.after is not None and change.after.bound]
        if status.is_running(directory):
            # What is in the kernel has its host ports, and the daemon that put it there holds them.
            missing = {rule.owner for _, plan in due.plans for rule in plan.added}
            wanted = [change for change in wanted if change.after and owner_of(change.after) in missing]
        held: list[Holder] = []
        for change in wanted:
            held += dataplane.reserve([change])
            reservations.close()  # at once: a daemon that starts meanwhile would take it for a conflict
        await dataplane.close()
        held = _without_its_own(held, directory)
        if not held or not survey.publications.meet_also(held):
            return survey, due, version


def _without_its_own(held: list[Holder], directory: Path) -> list[Holder]:
    """Return who holds host ports beside the daemon, by what its status says is active.

    Rules of theirs may be missing all the same: by drift, or as the configuration has changed since it started. Where
    the daemon is down systemd may hold its sockets, until they are the next one's.
    """
    last = status.read(directory)
    its_own = [ports.parse(each.bound) for each in last.publications if each.bound] if last is not None else []
    others = [holder for holder in held if not any(holder.mapping.overlaps(mapping) for mapping in its_own)]
    if status.is_running(directory):
        return others
    return [holder for holder in held if holder in others or holder.name not in _SYSTEMD]


def _summary(due: Transition, lost: int) -> str:
    if lost:
        return f"{lost} mapping{'s are' if lost > 1 else ' is'} not all in the kernel"
    return "not in line: there is more in the kernel than should be, or elsewhere" if due else "in line"
