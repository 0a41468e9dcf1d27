"""The kernel follows the publications, over tables in memory and switches in a directory."""

from __future__ import annotations

import asyncio
import copy
import errno
import logging
import re
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from ctrport import conntrack, localnet
from ctrport.conntrack import Closed, ConntrackError, Opened
from ctrport.dataplane import Dataplane, remove_everything
from ctrport.firewall import AnyPlan, Firewall, FirewallError
from ctrport.firewall.door import Door
from ctrport.firewall.fake import Chains, MemoryKernel
from ctrport.firewall.fake_table import MemoryTable
from ctrport.firewall.nftables import OwnTable
from ctrport.firewall.tables import Tables
from ctrport.model import Address, Count, Family, NodeFacts, Publication, State, Unread
from ctrport.owners import owner_of
from ctrport.publish import Change
from ctrport.rules import Layout, Table
from ctrport.tally import Tally
from tests.unit import worlds
from tests.unit.worlds import active

NODE = NodeFacts(frozenset(Family), frozenset[Address]({worlds.NODE4}))


def node(*addresses: Address) -> NodeFacts:
    return replace(NODE, addresses=frozenset(addresses))


def came(*publications: Publication) -> list[Change]:
    return [Change(None, publication) for publication in publications]


def went(*publications: Publication) -> list[Change]:
    return [Change(publication, None) for publication in publications]


def in_line(dataplane: Dataplane) -> bool:
    return dataplane.in_line  # asked anew each time: a type checker takes an attribute for a constant


def regardless_of_order(tables: dict[Table, Chains]) -> dict[Table, dict[str, list[str]]]:
    """Rules of one rank stand as they came."""
    return {table: {chain: sorted(rules) for chain, rules in chains.items()} for table, chains in tables.items()}


class Ground:
    """A kernel in memory, its switches, and what was asked of its flows."""

    def __init__(self, conf: Path, layout: Layout) -> None:
        self.kernel = MemoryKernel()
        self.layout = layout
        self.dropped: list[list[Opened | Closed]] = []
        self.conntrack_says: ConntrackError | None = None
        self.tally = Tally()
        self._conf = conf
        for device in ("docker0", "br-lan"):
            (conf / device).mkdir()
            self.switch(device, "0")

    def switch(self, device: str, value: str) -> None:
        (self._conf / device / "route_localnet").write_text(f"{value}\n")

    def switched(self, device: str = "docker0") -> str:
        return (self._conf / device / "route_localnet").read_text().strip()

    def lose(self, device: str) -> None:
        """The device goes, and its switch with it."""
        (self._conf / device / "route_localnet").unlink()
        (self._conf / device).rmdir()

    def dataplane(self) -> Dataplane:
        """A daemon's, that has just started."""
        return Dataplane({Family.IPV4: Tables(self.kernel, self.layout)}, self.layout, tally=self.tally)

    def rules(self, table: Table, chain: str) -> list[str]:
        return self.kernel.tables[table].get(chain, [])

    async def drop_stale(self, touched: Sequence[Opened | Closed], node: Collection[Address]) -> int:
        """Stands where conntrack is asked."""
        assert node == NODE.addresses
        if self.conntrack_says is not None:
            raise self.conntrack_says
        self.dropped.append(list(touched))
        return len(touched)


@pytest.fixture
def ground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ground:
    ground = Ground(tmp_path, Layout())
    monkeypatch.setattr(localnet, "_CONF", tmp_path)
    monkeypatch.setattr(conntrack, "drop_stale", ground.drop_stale)
    return ground


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        await work()

    asyncio.run(all_of_it())


WEB = active("8080:80")
DB = active("192.0.2.1:5432:5432", "172.17.0.3", name="db")


def test_rules_come_and_go_with_the_publications(ground: Ground) -> None:
    async def work() -> None:
        dataplane = ground.dataplane()
        await dataplane.start()
        assert not in_line(dataplane)
        assert ground.kernel.restores == []  # starting writes nothing
        await dataplane.follow([], NODE)
        assert in_line(dataplane)
        bare = ground.kernel.tables
        assert not await dataplane.follow(came(WEB, DB), NODE)  # nothing had drifted
        assert "172.17.0.2:80" in "".join(ground.rules(Table.NAT, "DOCKER"))
        await dataplane.follow(went(DB, WEB), NODE)
        assert ground.kernel.tables == bare
        assert dataplane.transactions == len(ground.kernel.restores) == 3

    run(work)


def test_the_nodes_own_addresses_have_their_rules_as_long_as_they_are_there(ground: Ground) -> None:
    second = IPv4Address("192.0.2.2")

    async def work() -> None:
        dataplane = ground.dataplane()
        await dataplane.start()
        await dataplane.follow([], NODE)
        bare = copy.deepcopy(ground.kernel.tables)
        await dataplane.follow([], node(worlds.NODE4, second))
        assert ground.kernel.restores[-1].count("\n-A ") == 2
        for table, chain in ((Table.FILTER, "DOCKER-FORWARD"), (Table.NAT, "DOCKER-POSTROUTING")):
            [rule] = [rule for rule in ground.rules(table, chain) if "node 192.0.2.2" in rule]
            assert "--ctorigdst 192.0.2.2 " in rule
        # Of a family that nobody serves, and loopback, which no forwarded flow was sent to.
        transactions = dataplane.transactions
        await dataplane.follow([], node(worlds.NODE4, second, worlds.NODE6, IPv4Address("127.0.0.1")))
        assert dataplane.transactions == transactions
        await dataplane.follow([], NODE)
        assert ground.kernel.tables == bare

    run(work)


def test_addresses_that_come_together_are_written_in_one_order(ground: Ground) -> None:
    addresses: list[Address] = [IPv4Address(f"198.51.100.{last}") for last in range(1, 9)]

    async def work() -> None:
        dataplane = ground.dataplane()
        await dataplane.start()
        await dataplane.follow([], node())
        await dataplane.follow([], node(*addresses))
        written = re.findall(r"DOCKER-FORWARD .*--ctorigdst (\S+)", ground.kernel.restores[-1])
        assert written == list(map(str, addresses))

    run(work)


def test_what_cannot_be_read_is_nothing_to_the_kernel(ground: Ground) -> None:
    async def work() -> None:
        dataplane = ground.dataplane()
        await dataplane.start()
        await dataplane.follow([], node(), mend=True)
        unread = Publication(Unread("'x'"), "label ctrport/ports", worlds.key("web"), State.REFUSED, "no mapping")
        await dataplane.follow(came(active("8080:80"), unread), node())
        await dataplane.follow([*went(active("8080:80")), Change(unread, None)], node())
        assert in_line(dataplane)

    run(work)


def test_many_changes_are_one_transaction_and_none_is_none(ground: Ground) -> None:
    async def work() -> None:
        dataplane = ground.dataplane()
        await dataplane.start()
        await dataplane.follow(came(*(active(f"{port}:80", name=f"web-{port}") for port in range(8000, 8050))), NODE)
        assert dataplane.transactions == 1
        assert not await dataplane.follow([], NODE)
        assert not await dataplane.follow([], NODE, mend=True)
        assert dataplane.transactions == 1

    run(work)


def test_the_guard_stands_whenever_localhost_is_routed(ground: Ground) -> None:
    seen: list[tuple[str, bool]] = []

    def look(table: Table) -> bool:
        seen.append((ground.switched(), bool(ground.rules(Table.RAW, "PREROUTING"))))
        return False

    async def work() -> None:
        dataplane = ground.dataplane()
        await dataplane.start()
        await dataplane.follow([], NODE)
        ground.kernel.fail_next_restore = look
        await dataplane.follow(came(WEB), NODE)
        assert ground.switched() == "1"
        await dataplane.follow(went(WEB), NODE)
        assert ground.switched() == "0"

    run(work)
    # Before each block: switched on never, as long as there is no guard; and off before the first rule goes.
    assert all(guarded or switched == "0" for switched, guarded in seen)
    assert {switched for switched, _ in seen} == {"0"}


def test_the_last_that_needs_localhost_switches_it_off(ground: Ground) -> None:
    other = active("8081:81", "172.17.0.3", name="db")

    async def work() -> None:
        dataplane = ground.dataplane()
        await dataplane.start()
        await dataplane.follow(came(WEB), NODE)
        await dataplane.follow(came(other), NODE)
        await dataplane.follow(went(WEB), NODE)
        assert ground.switched() == "1"
        await dataplane.follow(went(other), NODE)
        assert ground.switched() == "0"
        assert ground.rules(Table.RAW, "PREROUTING") == []

    run(work)


def test_what_does_not_need_localhost_leaves_the_switch_alone(ground: Ground) -> None:
    async def work() -> None:
        dataplane = ground.dataplane()
        await dataplane.start()
        await dataplane.follow(came(DB), NODE)
        assert ground.switched() == "0"

    run(work)


def test_a_switch_that_was_on_before_us_stays_on_after_us(ground: Ground) -> None:
    ground.switch("docker0", "1")

    async def work() -> None:
        dataplane = ground.dataplane()
        await dataplane.start()
        await dataplane.follow(came(WEB), NODE)
        assert "route_localnet=found" in "".join(ground.rules(Table.NAT, "DOCKER-POSTROUTING"))
        await dataplane.follow(went(WEB), NODE)
        assert ground.switched() == "1"

    run(work)


@pytest.mark.parametrize(("before", "after"), [("0", "0"), ("1", "1")])
def test_who_switched_it_on_outlives_the_daemon(ground: Ground, before: str, after: str) -> None:
    ground.switch("docker0", before)

    async def work() -> None:
        first = ground.dataplane()
        await first.start()
        await first.follow(came(WEB), NODE)
        second = ground.dataplane()
        await second.start()
        await second.follow(came(WEB), NODE)
        assert second.transactions == 0  # all was there already
        await second.follow(went(WEB), NODE)
        assert ground.switched() == after

    run(work)


@pytest.mark.parametrize("before", ["0", "1"])
def test_what_a_daemon_left_behind_is_taken_away_by_the_next(ground: Ground, before: str) -> None:
    ground.switch("docker0", before)

    async def work() -> None:
        first = ground.dataplane()
        await first.start()
        await first.follow(came(WEB), NODE)
        second = ground.dataplane()
        await second.start()
        await second.follow(came(DB), NODE)
        assert ground.switched() == before
        assert ground.rules(Table.RAW, "PREROUTING") == []
        assert "172.17.0.2" not in "".join(ground.rules(Table.NAT, "DOCKER"))

    run(work)


@pytest.mark.parametrize("localhost", [True, False])
@pytest.mark.parametrize("still", [True, False])
@pytest.mark.parametrize("before", ["0", "1"])
@pytest.mark.parametrize(("backend", "next_backend"), [("tables", "own table"), ("own table", "tables")])
def test_a_change_of_backend_leaves_no_switch_on_without_its_guard(
    ground: Ground, backend: str, next_backend: str, before: str, still: bool, localhost: bool
) -> None:
    ground.switch("docker0", before)
    own, seen = MemoryTable(), list[str]()

    def firewall(backend: str, layout: Layout) -> Firewall:
        if backend == "tables":
            return Tables(ground.kernel, layout)
        return OwnTable(own, layout, [Door(MemoryKernel(), layout)])

    async def work() -> None:
        first = Dataplane({Family.IPV4: firewall(backend, ground.layout)}, ground.layout)
        await first.start()
        await first.follow(came(WEB), NODE)
        layout = replace(ground.layout, localhost=localhost)
        left = firewall(backend, layout)
        apply = left.apply

        async def applied(plan: AnyPlan) -> None:
            seen.append(ground.switched())
            await apply(plan)

        left.apply = applied  # type: ignore[method-assign]
        second = Dataplane({Family.IPV4: firewall(next_backend, layout)}, layout, others=[left])
        await second.start()
        await second.follow(came(WEB) if still else [], NODE)
        await second.sweep()
        needed = still and localhost
        assert ground.switched() == ("1" if needed else before)
        assert set(seen) == {ground.switched()}  # off before the guard goes, and on all the while where it is needed
        await second.follow(went(WEB) if still else [], NODE)
        assert ground.switched() == before

    run(work)


def test_a_record_that_is_gone_says_nothing_about_the_next_time(ground: Ground) -> None:
    async def work() -> None:
        first = ground.dataplane()
        await first.start()
        await first.follow(came(WEB), NODE)
        second = ground.dataplane()
        await second.start()
        await second.follow([], NODE)
        assert ground.switched() == "0"
        ground.switch("docker0", "1")  # somebody else's doing, so ours to leave alone
        await second.follow(came(WEB), NODE)
        await second.follow(went(WEB), NODE)
        assert ground.switched() == "1"

    run(work)


def test_drift_is_mended_and_told(ground: Ground) -> None:
    async def work() -> None:
        dataplane = ground.dataplane()
        await dataplane.start()
        await dataplane.follow(came(WEB, DB), NODE)
        ground.kernel.tables[Table.NAT]["DOCKER"].pop()
        ground.switch("docker0", "0")
        assert dataplane.switched_off()
        drift = await dataplane.follow([], NODE, mend=True)
        assert str(drift) == "1 rule gone (what publishes default/web 8080:80/tcp); route_localnet off: docker0"
        assert ground.switched() == "1"
        assert not dataplane.switched_off()
        assert not await dataplane.follow([], NODE, mend=True)
        assert ground.switched() == "1"

    run(work)


def test_a_forward_that_begins_to_drop_is_no_drift_of_ours(ground: Ground) -> None:
    kernel, layout = MemoryKernel(), Layout(localhost=False)

    async def work() -> None:
        dataplane = Dataplane({Family.IPV4: OwnTable(MemoryTable(), layout, [Door(kernel, layout)])}, layout)
        await dataplane.start()
        await dataplane.follow(came(WEB), NODE)
        for policy, rules in (("DROP", 1), ("ACCEPT", 0), ("DROP", 1)):
            kernel.policies[Table.FILTER, "FORWARD"] = policy
            assert str(await dataplane.follow([], NODE, mend=True)) == ""
            assert len(kernel.tables[Table.FILTER]["FORWARD"]) == rules
        kernel.tables[Table.FILTER]["FORWARD"].clear()
        assert str(await dataplane.follow([], NODE, mend=True)) == "1 rule gone (the jumps of FORWARD)"

    run(work)


def test_flows_are_looked_at_after_the_rules_and_once(ground: Ground) -> None:
    [here] = WEB.attachments

    async def work() -> None:
        dataplane = ground.dataplane()
        await dataplane.start()
        await dataplane.follow([], NODE)
        await dataplane.drop_stale_flows()
        assert ground.dropped == []
        await dataplane.follow(came(WEB), NODE)
        await dataplane.drop_stale_flows()
        await dataplane.drop_stale_flows()
        assert ground.dropped == [[Opened(WEB.mapping, here)]]
        moved = active("8080:80", "172.17.0.9")
        await dataplane.follow([Change(WEB, moved)], NODE)
        await dataplane.drop_stale_flows()
        [there] = moved.attachments
        assert ground.dropped[1:] == [[Closed(WEB.mapping, here), Opened(WEB.mapping, there)]]

    run(work)


def test_what_is_served_on_keeps_its_flows_when_a_family_comes_or_goes(ground: Ground) -> None:
    both = active("8080:80", "172.17.0.2", "fd00::2")
    [here], [_, beside] = WEB.attachments, both.attachments

    async def work() -> None:
        dataplane = ground.dataplane()
        await dataplane.start()
        await dataplane.follow([], NODE)
        for changes in (came(WEB), [Change(WEB, both)], [Change(both, WEB)]):
            await dataplane.follow(changes, NODE)
            await dataplane.drop_stale_flows()
        opened = [Opened(WEB.mapping, here)]
        assert ground.dropped == [
            opened,
            [*opened, Opened(WEB.mapping, beside)],
            [Closed(WEB.mapping, beside), *opened],
        ]

    run(work)


def test_the_flows_of_a_mapping_that_was_mended_are_looked_at_and_no_others(ground: Ground) -> None:
    async def work() -> None:
        dataplane = ground.dataplane()
        await dataplane.start()
        await dataplane.follow(came(WEB, DB), NODE)
        await dataplane.drop_stale_flows()
        nat = ground.kernel.tables[Table.NAT]["DOCKER"]
        nat[:] = [rule for rule in nat if "172.17.0.3" not in rule]
        await dataplane.follow([], NODE, mend=True)
        await dataplane.drop_stale_flows()
        assert ground.dropped[-1] == [Opened(DB.mapping, DB.attachments[0])]

    run(work)


def test_flows_that_cannot_be_looked_at_are_complained_of_once(
    ground: Ground, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)

    async def work() -> None:
        dataplane = ground.dataplane()
        await dataplane.start()
        ground.conntrack_says = ConntrackError("conntrack is not installed")
        for changes in (came(WEB), went(WEB)):
            await dataplane.follow(changes, NODE)
            await dataplane.drop_stale_flows()
        assert caplog.messages == ["conntrack is not installed"]
        assert in_line(dataplane)
        ground.conntrack_says = None
        await dataplane.follow(came(WEB), NODE)
        await dataplane.drop_stale_flows()
        ground.conntrack_says = ConntrackError("conntrack is not installed")
        await dataplane.follow(went(WEB), NODE)
        await dataplane.drop_stale_flows()
        assert len(caplog.messages) == 2  # it had worked in between

    run(work)


def test_what_writing_took_and_what_failed_is_counted(ground: Ground) -> None:
    async def work() -> None:
        dataplane = ground.dataplane()
        await dataplane.start()
        await dataplane.follow([], NODE)
        assert ground.tally.writes[Family.IPV4].count == dataplane.transactions == 1
        await dataplane.follow(came(WEB), NODE)
        await dataplane.follow([], NODE, mend=True)  # nothing to write
        assert ground.tally.writes[Family.IPV4].count == 2
        ground.kernel.fail_next_restore = lambda _: True
        with pytest.raises(FirewallError):
            await dataplane.follow(came(DB), NODE)
        assert ground.tally.writes[Family.IPV4].count == 3
        assert ground.tally.write_errors == {Family.IPV4: 1, Family.IPV6: 0}
        await dataplane.follow([], NODE)
        await dataplane.drop_stale_flows()
        assert (ground.tally.flows_deleted, ground.tally.conntrack_errors) == (len(ground.dropped[0]), 0)
        ground.conntrack_says = ConntrackError("conntrack is not installed")
        await dataplane.follow(went(WEB), NODE)
        await dataplane.drop_stale_flows()
        assert (ground.tally.flows_deleted, ground.tally.conntrack_errors) == (len(ground.dropped[0]), 1)
        await dataplane.close()

    run(work)


def test_connections_are_the_kernels_by_family_and_owner(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        dataplane = ground.dataplane()
        await dataplane.start()
        await dataplane.follow(came(WEB, DB), NODE)
        tags = [line.split('"')[1] for line in ground.rules(Table.NAT, "DOCKER") if "8080" in line]
        ground.kernel.counted = {tag: Count(7, 420) for tag in tags}
        counts = await dataplane.counts()
        assert counts is not None
        assert counts.published == {owner_of(WEB): WEB, owner_of(DB): DB}
        assert counts.connections == {Family.IPV4: {owner_of(WEB): 7, owner_of(DB): 0}}
        await dataplane.follow(went(WEB), NODE)
        assert len(counts.published) == 2  # as it was then

        async def busy(table: Table, chain: str) -> list[tuple[str, Count]]:
            raise FirewallError("the chain DOCKER of the table nat changes all the time")

        monkeypatch.setattr(ground.kernel, "counts", busy)
        assert await dataplane.counts() is None

    run(work)


def test_flows_that_could_not_be_looked_at_are_looked_at_again(ground: Ground) -> None:
    moved = active("8080:80", "172.17.0.9")
    [first], [here], [there] = WEB.attachments, DB.attachments, moved.attachments

    async def work() -> None:
        dataplane = ground.dataplane()
        await dataplane.start()
        await dataplane.follow([], NODE)
        ground.conntrack_says = ConntrackError("conntrack did not end within 10 s")
        for changes in (came(WEB, DB), [Change(WEB, moved)]):
            await dataplane.follow(changes, NODE)
            await dataplane.drop_stale_flows()
        assert dataplane.complaint == "conntrack did not end within 10 s"
        ground.conntrack_says = None
        await dataplane.drop_stale_flows()  # with nothing new
        # As it is now: what was opened where it no longer is would cut whoever is there.
        assert ground.dropped == [[Opened(DB.mapping, here), Closed(WEB.mapping, first), Opened(WEB.mapping, there)]]
        assert dataplane.complaint == ""
        await dataplane.drop_stale_flows()
        assert len(ground.dropped) == 1

    run(work)


def test_flows_of_what_was_published_before_two_reloads_are_closed(ground: Ground) -> None:
    [here] = WEB.attachments

    async def work() -> None:
        dataplane = ground.dataplane()
        await dataplane.start()
        await dataplane.follow(came(WEB), NODE)
        await dataplane.drop_stale_flows()
        for _ in range(2):  # nothing of the first was followed
            before, dataplane = dataplane, ground.dataplane()
            await dataplane.start()
            dataplane.succeed(before)
        await dataplane.follow([], NODE)
        await dataplane.drop_stale_flows()
        assert Closed(WEB.mapping, here) in ground.dropped[-1]

    run(work)


def test_the_next_change_does_not_wait_for_flows(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = asyncio.Event()

    async def hangs(touched: Sequence[Opened | Closed], node: Collection[Address]) -> int:
        await let_go.wait()
        return await ground.drop_stale(touched, node)

    async def work() -> None:
        monkeypatch.setattr(conntrack, "drop_stale", hangs)
        dataplane = ground.dataplane()
        await dataplane.start()
        await dataplane.follow([], NODE)
        await dataplane.follow(came(WEB), NODE)
        dropping = dataplane.drop_stale_flows()
        await asyncio.sleep(0)
        await dataplane.follow(came(DB), NODE)
        assert dataplane.drop_stale_flows() is dropping
        assert ground.dropped == []
        let_go.set()
        await dropping
        assert [len(touched) for touched in ground.dropped] == [1, 1]

    run(work)


def test_a_switch_that_cannot_be_read_is_an_error_until_it_can(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_file(device: str) -> bool:
        raise OSError(errno.EMFILE, "Too many open files")

    async def work() -> None:
        dataplane = ground.dataplane()
        await dataplane.start()
        await dataplane.follow([], NODE)
        with monkeypatch.context() as patched:
            patched.setattr(localnet, "is_on", no_file)
            patched.setattr(localnet, "is_off", no_file)
            await dataplane.follow(came(WEB), NODE)
            with pytest.raises(FirewallError, match="route_localnet of docker0 cannot be read: Too many open files"):
                await dataplane.follow([], NODE, mend=True)
            assert not in_line(dataplane)
            assert not dataplane.switched_off()
        await dataplane.follow([], NODE)
        assert in_line(dataplane)
        await dataplane.follow(went(WEB), NODE)
        assert ground.switched() == "0"  # never left on without its guard, whatever it was before

    run(work)


@pytest.mark.parametrize("table", list(Table))
def test_after_an_error_the_kernel_is_not_in_line_until_it_was_read_anew(ground: Ground, table: Table) -> None:
    async def work() -> None:
        dataplane = ground.dataplane()
        await dataplane.start()
        await dataplane.follow([], NODE)
        ground.kernel.fail_next_restore = lambda which: which is table
        with pytest.raises(FirewallError):
            await dataplane.follow(came(WEB), NODE)
        assert not in_line(dataplane)
        assert ground.switched() == "0"
        await dataplane.follow(came(DB), NODE)  # and what it could not write before
        assert in_line(dataplane)
        assert ground.switched() == "1"
        mended, ground.kernel = ground.kernel.tables, MemoryKernel()
        ground.switch("docker0", "0")
        await ground.dataplane().follow(came(WEB, DB), NODE)
        assert regardless_of_order(mended) == regardless_of_order(ground.kernel.tables)

    run(work)


def test_an_error_while_removing_is_made_good_with_the_switch_off(ground: Ground) -> None:
    async def work() -> None:
        dataplane = ground.dataplane()
        await dataplane.start()
        await dataplane.follow(came(WEB), NODE)
        ground.kernel.fail_next_restore = lambda table: table is Table.NAT
        with pytest.raises(FirewallError):
            await dataplane.follow(went(WEB), NODE)
        await dataplane.follow([], NODE)
        assert ground.switched() == "0"
        assert "docker0" not in str(ground.kernel.tables)

    run(work)


def test_a_container_that_moved_to_another_bridge_takes_its_switch_along(ground: Ground) -> None:
    moved = active("8080:80", "10.0.0.2", device="br-lan")

    async def work() -> None:
        dataplane = ground.dataplane()
        await dataplane.start()
        await dataplane.follow(came(WEB), NODE)
        await dataplane.follow([Change(WEB, moved)], NODE)
        assert (ground.switched("docker0"), ground.switched("br-lan")) == ("0", "1")
        assert len(ground.rules(Table.RAW, "PREROUTING")) == 2

    run(work)


def test_a_device_that_is_gone_is_no_error(ground: Ground) -> None:
    async def work() -> None:
        dataplane = ground.dataplane()
        await dataplane.start()
        await dataplane.follow(came(WEB), NODE)
        ground.lose("docker0")
        await dataplane.follow(went(WEB), NODE)
        assert in_line(dataplane)
        assert not localnet.is_on("docker0")

    run(work)


@pytest.mark.parametrize("device", ["all", "default", ".", "..", "a/b"])
def test_only_one_devices_switch_is_ever_touched(ground: Ground, device: str) -> None:
    with pytest.raises(ValueError, match="not one device"):
        localnet.switch(device, True)
    with pytest.raises(ValueError, match="not one device"):
        localnet.is_on(device)


def test_removing_everything_leaves_the_node_as_it_was(ground: Ground) -> None:
    ground.switch("br-lan", "1")

    async def work() -> None:
        dataplane = ground.dataplane()
        await dataplane.start()
        await dataplane.follow(came(WEB, active("81:81", "10.0.0.2", name="db", device="br-lan")), NODE)
        assert ground.switched() == "1"
        firewall = Tables(ground.kernel, Layout("OTHER"))  # whatever the config says by now
        assert await remove_everything(firewall)
        assert (ground.switched("docker0"), ground.switched("br-lan")) == ("0", "1")
        assert not await remove_everything(firewall)

        assert ground.kernel.tables == MemoryKernel().tables

    run(work)
