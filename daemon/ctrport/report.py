"""What is published, for a command that asks: the daemon's word, or where it is down what can be seen without it.

Without the daemon it is worked out anew, by the same rooms: config and containerd say what should be, the kernel says
what of it there is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from . import __version__, status
from .config import Config
from .containerd import Containerd
from .endpoints import Endpoints
from .firewall import Firewall
from .model import Family, Publication, State
from .rules import Layout, owner_of, rules_for
from .survey import Survey

NOT_INSTALLED = "its rules are not in the kernel, and no daemon runs: systemctl start ctrport"


async def without_daemon(
    config: Config, firewalls: dict[Family, Firewall], layout: Layout, directory: Path
) -> status.Status:
    """Return what would be published and what of it the kernel holds. Changes nothing.

    Raises ``ContainerdError`` or ``FirewallError``.
    """
    async with Containerd(config.containerd.address) as containerd, Endpoints() as endpoints:
        survey = Survey(config, containerd, endpoints)
        version = await containerd.version()
        await survey.everything()
        survey.publications.settle()
    last = status.read(directory)
    missing = await _missing(survey.publications, firewalls, layout)
    return status.Status(
        version=__version__,
        running=False,
        pid=0,
        updated=last.updated if last is not None else "",
        containerd=f"answers, version {version}",
        firewall=f"{len(missing)} mappings are not in the kernel" if missing else "in line",
        publications=[
            status.PublicationStatus.of(_as_it_is(publication, missing), "") for publication in survey.publications
        ],
    )


def _as_it_is(publication: Publication, missing: set[str]) -> Publication:
    if publication.state is not State.ACTIVE or owner_of(publication) not in missing:
        return publication
    return replace(publication, state=State.WAITING, reason=NOT_INSTALLED, attachments=())


async def _missing(publications: Iterable[Publication], firewalls: dict[Family, Firewall], layout: Layout) -> set[str]:
    """Return the owners of the rules that should be in the kernel and are not."""
    missing: set[str] = set()
    publications = list(publications)
    for family, firewall in firewalls.items():
        await firewall.read()
        wanted = (rule for publication in publications for rule in rules_for(publication, layout))
        missing |= {rule.owner for rule in firewall.plan(r for r in wanted if r.family is family).added}
    return missing
