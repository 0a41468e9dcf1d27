"""What every ``Firewall`` has to hold to, however it keeps rules: one suite, run over each and over those in memory.

A module that runs it derives from ``FirewallContract`` and gives it three fixtures: ``grounds``, tables that hold
nothing yet, with somebody else who writes there too; ``run``, which runs a coroutine where the tables are; and
``visitor``, who sends packets to the node.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import TypeVar

import pytest

from ctrport.firewall import AnyPlan, Firewall, ForeignChain, ForeignTable, Refused
from ctrport.model import Count, Family, Protocol, Publication
from ctrport.owners import LocalnetRecord, Owner, owner_of
from ctrport.rules import Layout, Rule, Ruleset, rules_at, rules_for, skeleton
from tests.unit.worlds import NODE, active

T = TypeVar("T")


class Run(typing.Protocol):
    """Runs a coroutine to its end."""

    def __call__(self, work: Coroutine[object, object, T]) -> T: ...


class Visitor(typing.Protocol):
    """Sends packets of one flow each time, of the family under test, to an address of the node."""

    def __call__(self, protocol: Protocol, port: int, packets: int = 1) -> None: ...


class Grounds(typing.Protocol):
    """Tables of one family.

    ``damages`` is what somebody else does to rules of ours, by the names of ``DAMAGES``.
    """

    @property
    def family(self) -> Family: ...

    @property
    def damages(self) -> Mapping[str, Callable[[], object]]: ...

    def firewall(self, layout: Layout) -> Firewall:
        """Return one that knows nothing yet of what is there."""
        ...

    async def everything(self) -> object:
        """Return all that is there, without what is counted, to be compared."""
        ...

    def neighbour(self) -> None:
        """Have somebody else's rules there, beside where ours will be."""
        ...

    def usurper(self) -> None:
        """Have somebody else's rules there, by the name that ours have."""
        ...


#: Every kind of mapping: a port, a host address, localhost, a range onto itself, a range with an offset.
ALL = (
    active("8080:80", "172.17.0.2", "fd00::2"),
    active("192.0.2.1:8081:81", "172.17.0.2"),
    active("[2001:db8::1]:8081:81", "fd00::2"),
    active("127.0.0.1:8082:82", "172.17.0.2"),
    active("9000-9010:9000-9010/udp", "172.17.0.3", "fd00::3", name="db"),
    active("7000-7002:80-82/sctp", "10.244.1.7", "fd00::4", name="api", device="cali12ab"),
    active("192.0.2.1:9100-9110:9100-9110", "172.17.0.3", name="db"),
    active("[2001:db8::1]:9100-9110:9100-9110", "fd00::3", name="db"),
    active("83", "172.17.0.2", "fd00::2", on="32768"),
)
LAYOUT = Layout()

#: What somebody may do, and what is said of it.
DAMAGES = {
    "a mapping deleted": r"1 rule gone \(what publishes default/",
    "all mappings deleted": r"rules gone \(what publishes default/",
    "what leads to them deleted": r"",
    "all of it deleted": r"rules gone \(",
}


def wanted(family: Family, publications: Iterable[Publication] = ALL, layout: Layout = LAYOUT) -> list[Rule]:
    rules = Ruleset(skeleton(layout, family))
    rules.replace((), (rule for address in NODE for rule in rules_at(address, layout)))
    for publication in publications:
        rules.replace((), rules_for(publication, layout))
    return [rule for rule in rules if rule.family is family]


async def fit(grounds: Grounds, rules: Iterable[Rule], layout: Layout = LAYOUT, *, words: bool = True) -> AnyPlan:
    firewall = grounds.firewall(layout)
    await firewall.read(words=words)
    plan = firewall.plan(rules)
    assert bool(plan) == bool(firewall.diff(plan))
    await firewall.apply(plan)
    return plan


class FirewallContract:
    """The suite."""

    def test_what_was_written_is_found_again(self, grounds: Grounds, run: Run) -> None:
        async def work() -> None:
            plan = await fit(grounds, wanted(grounds.family))
            assert set(plan.added) == set(wanted(grounds.family))
            for words in (True, False):
                assert not await fit(grounds, wanted(grounds.family), words=words)

        run(work())

    def test_changes_are_carried_out_one_by_one(self, grounds: Grounds, run: Run) -> None:
        async def work() -> None:
            rules = Ruleset(wanted(grounds.family, ()))
            firewall = grounds.firewall(LAYOUT)
            await firewall.read()
            await firewall.apply(firewall.plan(rules))
            bare = await grounds.everything()
            # Wildcards first, so that a host address has to be put before what is there.
            for publication in (*ALL, *ALL[::-1]):
                its = [rule for rule in rules_for(publication, LAYOUT) if rule.family is grounds.family]
                here = any(rule in rules for rule in its if rule.owner == owner_of(publication))
                difference = rules.replace(its, ()) if here else rules.replace((), its)
                await firewall.apply(firewall.plan_change(difference))
                look = grounds.firewall(LAYOUT)
                await look.read()
                assert look.diff(look.plan(rules)) == []
            assert await grounds.everything() == bare

        run(work())

    def test_a_port_goes_from_one_container_to_the_next_in_one_change(self, grounds: Grounds, run: Run) -> None:
        first = [active("8080:80", "172.17.0.2", "fd00::2"), active("9000-9010:9000-9010", "172.17.0.2", "fd00::2")]
        then = [active("8080:81", "172.17.0.3", "fd00::3"), active("9000-9008:9000-9008", "172.17.0.3", "fd00::3")]

        async def work() -> None:
            rules = Ruleset(wanted(grounds.family, first))
            firewall = grounds.firewall(LAYOUT)
            await firewall.read()
            await firewall.apply(firewall.plan(rules))
            old, new = wanted(grounds.family, first), wanted(grounds.family, then)
            await firewall.apply(firewall.plan_change(rules.replace(old, new)))
            assert not await fit(grounds, new)

        run(work())

    def test_connections_are_counted_by_the_owner_of_the_mapping(
        self, grounds: Grounds, run: Run, visitor: Visitor
    ) -> None:
        moved, onto_itself, idle = (
            active("8000-8002:80-82", "172.17.0.2", "fd00::2"),
            active("9000-9010:9000-9010/udp", "172.17.0.3", "fd00::3", name="db"),
            active("8443:443", "172.17.0.2", "fd00::2"),
        )
        firewall = grounds.firewall(LAYOUT)

        async def work() -> None:
            assert await firewall.counters() == {}  # there is nothing of ours yet
            await fit(grounds, wanted(grounds.family, (moved, onto_itself, idle)))
            assert await firewall.counters() == dict.fromkeys(map(owner_of, (moved, onto_itself, idle)), Count())

        async def after() -> None:
            counted = await firewall.counters()
            assert {its: count.packets for its, count in counted.items()} == {
                owner_of(moved): 2,
                owner_of(onto_itself): 1,
                owner_of(idle): 0,
            }
            assert counted[owner_of(idle)] == Count()
            size = 20 if grounds.family is Family.IPV4 else 40
            assert counted[owner_of(onto_itself)].bytes == size + 8 + 5  # of a datagram with five bytes
            assert counted[owner_of(moved)].bytes >= 2 * (size + 20)
            # A change of others leaves the counters alone.
            await firewall.read(words=False)
            await firewall.apply(firewall.plan(wanted(grounds.family, (moved, onto_itself))))
            counted.pop(owner_of(idle))
            assert await firewall.counters() == counted

        run(work())
        visitor(Protocol.TCP, 8000)
        visitor(Protocol.TCP, 8002)
        visitor(Protocol.UDP, 9005, packets=3)
        visitor(Protocol.UDP, 8443)  # nobody's
        run(after())

    def test_removal_leaves_what_was_there_before(self, grounds: Grounds, run: Run) -> None:
        grounds.neighbour()

        async def work() -> None:
            before = await grounds.everything()
            await fit(grounds, wanted(grounds.family))
            firewall = grounds.firewall(Layout("OTHER"))
            for plan in await firewall.plan_removal():
                await firewall.apply(plan)
            assert await grounds.everything() == before
            assert not any(await firewall.plan_removal())

        run(work())

    def test_what_is_somebody_elses_by_our_name_is_refused_untouched(self, grounds: Grounds, run: Run) -> None:
        grounds.usurper()

        async def work() -> None:
            before = await grounds.everything()
            with pytest.raises((ForeignChain, ForeignTable), match=r"is somebody else's .+: it is left alone"):
                await fit(grounds, wanted(grounds.family))
            firewall = grounds.firewall(LAYOUT)
            assert not any(await firewall.plan_removal())
            assert await grounds.everything() == before

        run(work())

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_drift_is_said_and_mended(self, grounds: Grounds, run: Run, damage: str) -> None:
        async def work() -> None:
            firewall = grounds.firewall(LAYOUT)
            await firewall.read(words=False)
            plan = firewall.plan(wanted(grounds.family))
            found = firewall.drift(plan)
            assert re.search(DAMAGES[damage], str(found)), str(found)
            # What was asked for just now did not drift.
            if damage in ("a mapping deleted", "all mappings deleted"):
                assert not firewall.drift(plan, asked=wanted(grounds.family))
            await firewall.apply(plan)
            assert not await fit(grounds, wanted(grounds.family))

        run(_all(fit(grounds, wanted(grounds.family))))
        grounds.damages[damage]()
        run(work())

    def test_a_change_of_what_is_there_no_more_is_refused(self, grounds: Grounds, run: Run) -> None:
        its = [rule for rule in rules_for(ALL[0], LAYOUT) if rule.family is grounds.family]
        rules = Ruleset(wanted(grounds.family, ()))
        firewall = grounds.firewall(LAYOUT)

        async def before() -> None:
            await firewall.read()
            await firewall.apply(firewall.plan(rules))

        async def after() -> None:
            plan = firewall.plan_change(rules.replace((), its))
            with pytest.raises(Refused):
                await firewall.apply(plan)
            await fit(grounds, rules, words=False)
            assert not await fit(grounds, rules)

        run(before())
        grounds.damages["all of it deleted"]()
        run(after())

    def test_what_nobody_asks_for_any_more_goes(self, grounds: Grounds, run: Run) -> None:
        async def work() -> None:
            await fit(grounds, wanted(grounds.family))
            plan = await fit(grounds, wanted(grounds.family, ALL[:2]), words=False)
            assert owner_of(ALL[4]) in plan.removed
            assert owner_of(ALL[0]) not in plan.removed
            assert not await fit(grounds, wanted(grounds.family, ALL[:2]))

        run(work())

    def test_who_switched_route_localnet_on_and_what_was_chosen_is_read_from_the_rules(
        self, grounds: Grounds, run: Run
    ) -> None:
        async def work() -> None:
            await fit(grounds, wanted(grounds.family))
            firewall = grounds.firewall(LAYOUT)
            await firewall.read()
            devices = {"docker0", "cali12ab"} if grounds.family is Family.IPV4 else set[str]()
            assert set(firewall.localnet_records) == {LocalnetRecord(device, ours=True) for device in devices}
            assert firewall.chosen == (Owner.of(ALL[-1]),)

        run(work())


async def _all(*work: Coroutine[object, object, object]) -> None:
    for each in work:
        await each
