"""Make the kernel hold the rules: one protocol, an implementation for each way the kernel keeps them.

    rules (typed)  ->  plan (what to write, in which order)  ->  the kernel's tables

A ``Firewall`` is for one address family. It knows what the kernel held when it last looked and what it wrote since, so
a change is planned without asking the kernel again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from ..lines import Failure
from ..model import Count, Holder
from ..owners import LocalnetRecord, Owner
from ..rules import Difference, Rule
from .drift import Drift


class FirewallError(Failure):
    """The kernel's tables could not be read or written; the message is one sentence for people."""


class Unusable(FirewallError):
    """It cannot work at all on this machine as it is: the program is missing, or it may not do it."""


class Refused(FirewallError):
    """What was to be written does not go with what is there: somebody else changed it since it was looked at."""


class ForeignChain(FirewallError):
    """A chain of the name we would use holds somebody else's rules. It was not touched."""


class ForeignTable(FirewallError):
    """A table of the name we would use is somebody else's. It was not touched."""


class AnyPlan(Protocol):
    """What is to be written, for the ``Firewall`` that made it. False where there is nothing to write."""

    def __bool__(self) -> bool: ...

    @property
    def added(self) -> Sequence[Rule]:
        """The rules that it writes."""
        ...

    @property
    def removed(self) -> Sequence[str]:
        """The owners of what was found and that it takes away."""
        ...


class Firewall(Protocol):
    """What keeps our rules of one family in the kernel."""

    name: str

    @property
    def warnings(self) -> tuple[str, ...]:
        """What of other tables may keep from working what is published, as of the last ``read``; a sentence each."""
        ...

    async def read(self, *, words: bool = True) -> None:
        """Look at what the kernel holds: our chains, and the kernel chains that we jump from.

        Without ``words`` it is quicker, where the kernel tells in another way whose each rule is. A plan is then
        applied like any other, but does not show in full what it removes.

        Raises ``ForeignChain``, ``Unusable``, or another ``FirewallError``.
        """
        ...

    @property
    def localnet_records(self) -> tuple[LocalnetRecord, ...]:
        """What our rules in the kernel say about who switched route_localnet on, as of the last ``read``."""
        ...

    @property
    def chosen(self) -> tuple[Owner, ...]:
        """The owners of rules in the kernel whose host ports were chosen, as of the last ``read``."""
        ...

    def plan(self, wanted: Iterable[Rule]) -> AnyPlan:
        """Return what makes the kernel hold exactly ``wanted`` of ours; empty where it does so already.

        Judged by what the last ``read`` saw and by what was applied since.
        """
        ...

    def plan_change(self, difference: Difference) -> AnyPlan:
        """Return what a difference takes, at a cost that depends on the difference alone."""
        ...

    async def apply(self, plan: AnyPlan) -> None:
        """Write a plan. After an error nothing is known of the kernel: ``read`` before planning again."""
        ...

    def diff(self, plan: AnyPlan) -> list[str]:
        """Return a plan for people: a line a change, in its order, ``+`` what comes and ``-`` what goes."""
        ...

    def script(self, plan: AnyPlan) -> list[str]:
        """Return a plan as lines of shell that write what ``apply`` would, byte for byte where that writes text.

        A plan that was made after a ``read`` with words. None where there is nothing to write.
        """
        ...

    def drift(self, plan: AnyPlan, asked: Collection[Rule] = (), dismissed: Collection[Rule] = ()) -> Drift:
        """Return what a plan mends, but for the rules that were ``asked`` for or ``dismissed`` just now."""
        ...

    async def holders(self) -> list[Holder]:
        """Return the host ports that others answer on in the kernel's tables. Raises ``FirewallError``."""
        ...

    async def counters(self) -> dict[str, Count]:
        """Return what the kernel counted at the DNAT rules of each owner, in the words of ``owner_of``, by asking it.

        The first packet of a flow alone passes them: packets are connections, and bytes those of these packets. They
        are counted from when a rule was written, and anew when it is written again. Who has no such rule in the kernel
        is not among them. Raises ``FirewallError``.
        """
        ...

    async def prepare(self) -> None:
        """Do ahead what can be done ahead of the next ``apply``."""
        ...

    async def close(self) -> None:
        """Give up what ``prepare`` holds."""
        ...

    async def plan_sweep(self) -> AnyPlan:
        """Return what deletes chains of ours that go by another name than the layout's.

        For after a whole plan was applied, which takes away the jumps to them. Raises ``FirewallError``.
        """
        ...

    async def plan_removal(self) -> tuple[AnyPlan, AnyPlan]:
        """Return what takes every rule of ours away, whatever our chains are called.

        The second plan removes the guard of 127.0.0.0/8, and is for after route_localnet was put back.
        """
        ...
