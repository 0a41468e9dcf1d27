"""The commands of iptables and nft, run to their end, with their failures as ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..programs import Ended, NotInstalled, ProgramError, run
from . import FirewallError, Unusable

#: Seconds a command may take before it is ended. 10,000 rules take 0.2 s.
TIMEOUT = 30.0


async def command(*argv: str) -> Ended:
    """Run one, and return how it ended. Raises ``FirewallError``, as ``Unusable`` where it is not installed."""
    with errors():
        return await run(*argv, timeout=TIMEOUT)


@contextlib.contextmanager
def errors(package: str = "iptables (1.8 or later)") -> Iterator[None]:
    """Make ours of what a program that cannot be run raises; it comes with ``package``."""
    try:
        yield
    except NotInstalled as error:
        raise Unusable(f"{error}: install {package}") from error
    except ProgramError as error:
        raise FirewallError(str(error)) from error


def failure(what: str, ended: Ended, kind: type[FirewallError] = FirewallError) -> FirewallError:
    """Return what to raise for a command that ended badly: ``what`` failed, and what the command said of it.

    It is of ``kind``, or ``Unusable`` where the command may not do it.
    """
    said = " ".join(line.strip() for line in ended.err.splitlines() if line.strip() and "Try `" not in line)
    forbidden = "Permission denied" in said or "Operation not permitted" in said
    return (Unusable if forbidden else kind)(f"{what}: {said or ended.manner}")
