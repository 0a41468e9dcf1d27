"""The writer of legacy tables by itself: what it writes, beside whom, and what becomes of it when its worker ends.

Each test has network namespaces and a lock of its own; iptables-legacy is the oracle.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import sys
from collections.abc import Coroutine, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from ctrport.firewall import FirewallError, Unusable
from ctrport.firewall.detect import legacy_tables
from ctrport.firewall.iptables_legacy import LegacyTables
from ctrport.firewall.plan import Add, Block, Delete, Empty, Line, New, Plan, Remove
from ctrport.firewall.tables import Tables
from ctrport.firewall.text import arguments, restore_input
from ctrport.model import Family
from ctrport.rules import ACCEPT, Match, Rule, Table, Verdict
from embedded.host import Host, end_process
from embedded.wait import eventually
from tests.contract.firewall import LAYOUT, wanted
from tests.contract.tables import fit, lines
from tests.node.test_firewall_contract import in_namespace_of

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = {Family.IPV4: "iptables-legacy", Family.IPV6: "ip6tables-legacy"}
#: A worker that does something else on the way: what stands here comes before it begins.
_OTHERWISE = "import os, signal, subprocess, iptc\nfrom ctrport.firewall import legacy_worker as worker\n"


@pytest.fixture
def lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))
    return tmp_path / "xtables.lock"


@pytest.fixture
def host(lock: Path) -> Iterator[Host]:
    with Host("legacy") as host:
        yield host


def otherwise(code: str) -> list[str]:
    return [sys.executable, "-c", f"{_OTHERWISE}{code}\nworker.main()\n"]


def run(host: Host, kernels: Iterable[LegacyTables], work: Coroutine[object, object, T]) -> T:
    async def closing() -> T:
        try:
            return await work
        finally:
            for kernel in kernels:
                await kernel.close()

    return in_namespace_of(host, closing())


def save(host: Host, family: Family = Family.IPV4) -> list[str]:
    """Return all legacy tables of a family in the words of iptables-legacy-save, table by table, without counters."""
    text = "".join(host.run(f"{PROGRAM[family]}-save", "-t", table.value).stdout for table in Table)
    return [re.sub(r" \[\d+:\d+\]$", "", line) for line in text.splitlines() if not line.startswith("#")]


def by_restore(host: Host, plan: Plan, family: Family) -> None:
    host.run(f"{PROGRAM[family]}-restore", "--noflush", input=restore_input(plan))


def plan_of(*names: str, family: Family = Family.IPV4) -> Plan:
    """Return a plan that makes chains in ``filter`` and then in ``nat``, each with a rule."""

    def rules(table: Table) -> list[Rule]:
        return [Rule(family, table, name, Match(), ACCEPT, f"default/{name} 1:1/tcp") for name in names]

    return Plan(
        tuple(
            Block(table, (*map(New, names), *(Add(rule, None) for rule in rules(table))))
            for table in (Table.FILTER, Table.NAT)
        )
    )


@pytest.mark.parametrize("family", list(Family))
def test_it_writes_what_iptables_legacy_restore_writes(host: Host, family: Family) -> None:
    kernel, plans = LegacyTables(family), list[Plan]()

    async def work() -> None:
        plans.append(await fit(kernel, wanted(family)))

    run(host, [kernel], work())
    with Host("oracle") as oracle:
        by_restore(oracle, plans[0], family)
        assert save(host, family) == save(oracle, family)
    # As iptables compares: by the bytes of the rule, and not by what it prints of them.
    for rule in wanted(family):
        host.run("sh", "-c", f"{PROGRAM[family]} -w -t {rule.table} -C {rule.chain} {arguments(rule)}")


@pytest.mark.parametrize("family", list(Family))
def test_what_is_put_back_is_as_it_was(host: Host, family: Family) -> None:
    kernel = LegacyTables(family)
    accept = next(rule for rule in wanted(family) if (rule.table, rule.chain) == (Table.FILTER, "DOCKER"))

    async def work() -> tuple[Plan, Plan]:
        first = await fit(kernel, wanted(family))
        chain = await lines(kernel, Table.FILTER, "DOCKER-FORWARD")
        listed = await lines(kernel, Table.NAT, "DOCKER")
        again = [Add(line, None) for line in chain[::-1]]
        second = Plan(
            (
                Block(Table.FILTER, (Empty("DOCKER-FORWARD"), *again, Remove("DOCKER", accept))),
                Block(Table.NAT, (Empty("DOCKER"), *(Add(line, None) for line in listed[::-1]))),
                Block(Table.FILTER, (Remove("DOCKER-FORWARD", chain[-1]),)),
            )
        )
        await kernel.restore(second)
        return first, second

    first, second = run(host, [kernel], work())
    with Host("oracle") as oracle:
        by_restore(oracle, first, family)
        by_restore(oracle, second, family)
        assert save(host, family) == save(oracle, family)


def test_a_rule_that_is_put_back_keeps_its_counters(host: Host) -> None:
    kernel = LegacyTables()
    host.run("iptables-legacy", "-w", "-N", "DOCKER")
    rule = plan_of("DOCKER").added[0]
    host.run("sh", "-c", f"iptables-legacy -w -A DOCKER -c 5 300 {arguments(rule)}")

    async def work() -> None:
        [line] = await lines(kernel, Table.FILTER, "DOCKER")
        await kernel.restore(Plan((Block(Table.FILTER, (Empty("DOCKER"), Add(line, None))),)))

    run(host, [kernel], work())
    assert "[5:300] -A DOCKER " in host.run("iptables-legacy-save", "-c", "-t", "filter").stdout


def test_both_families_are_written_by_one_daemon(host: Host) -> None:
    kernels = {family: LegacyTables(family) for family in Family}

    async def work() -> None:
        for _ in range(2):  # the second time by workers that have written before
            for family, kernel in kernels.items():
                await fit(kernel, wanted(family))
                assert not await fit(kernel, wanted(family))
            for kernel in kernels.values():
                for plan in await Tables(kernel, LAYOUT).plan_removal():
                    await kernel.restore(plan)

    run(host, kernels.values(), work())
    assert not [line for family in Family for line in save(host, family) if "ctrport" in line]


def test_no_table_is_made_by_reading(host: Host) -> None:
    kernels = [LegacyTables(family) for family in Family]

    async def work() -> None:
        for kernel in kernels:
            tables = Tables(kernel, LAYOUT)
            await tables.read()
            assert await tables.holders() == []
            assert not any(await tables.plan_removal())
            assert legacy_tables(kernel.family) == set()

    run(host, kernels, work())


def test_only_the_tables_that_are_written_are_made(host: Host) -> None:
    kernel = LegacyTables()

    async def work() -> set[str]:
        await kernel.restore(plan_of("DOCKER"))
        return legacy_tables(Family.IPV4)

    assert run(host, [kernel], work()) == {"filter", "nat"}
    assert sorted(host.run("cat", "/proc/net/ip_tables_names").stdout.split()) == ["filter", "nat"]


_LOOP = """
i=0
while [ $i -lt 150 ]; do
    iptables-legacy -w -N OTHER || exit 1
    iptables-legacy -w -A OTHER -j RETURN || exit 2
    iptables-legacy -w -F OTHER || exit 3
    iptables-legacy -w -X OTHER || exit 4
    iptables-legacy -w -A OUTPUT -m comment --comment "other $i" || exit 5
    i=$((i + 1))
done
"""


def test_nobody_loses_an_update_where_others_write_all_the_time(host: Host) -> None:
    kernel, count, others_status = LegacyTables(), 0, -1

    async def work() -> None:
        nonlocal count, others_status
        await kernel.prepare()
        await kernel.restore(Plan((Block(Table.FILTER, (New("FIRST"), Delete("FIRST"))),)))  # the worker is up by now
        other = host.spawn("sh", "-c", _LOOP)
        while (status := other.poll()) is None:
            name = f"OURS-{count}"
            rule = Rule(Family.IPV4, Table.FILTER, name, Match(), ACCEPT, "default/web 1:1/tcp")
            await kernel.restore(Plan((Block(Table.FILTER, (New(name), Add(rule, None))),)))
            count += 1
        others_status = status

    run(host, [kernel], work())
    assert others_status == 0, "the other tool failed"
    there = save(host)
    assert {line for line in there if line.startswith(":OURS-")} == {f":OURS-{number} -" for number in range(count)}
    assert sum(line.startswith("-A OURS-") for line in there) == count
    others = [line for line in there if line.startswith("-A OUTPUT")]
    assert others == [f'-A OUTPUT -m comment --comment "other {number}"' for number in range(150)]
    assert not any("OTHER" in line for line in there)
    assert count >= 20, "too few to have met the other"


def test_a_commit_is_made_anew_where_somebody_came_before_it_without_the_lock(host: Host, tmp_path: Path) -> None:
    worker = otherwise(
        "commit, there = iptc.Table.commit, []\n"
        "def late(table):\n"
        "    if not there:\n"
        "        there.append(1)\n"
        f"        env = dict(os.environ, XTABLES_LOCKFILE={str(tmp_path / 'another')!r})\n"
        "        subprocess.run(['iptables-legacy', '-t', table.name, '-N', 'OTHER'], env=env, check=True)\n"
        "    commit(table)\n"
        "iptc.Table.commit = late"
    )
    kernel = LegacyTables(Family.IPV4, worker)
    run(host, [kernel], kernel.restore(plan_of("DOCKER")))
    assert ":OTHER -" in save(host)
    assert sum(line == ":DOCKER -" for line in save(host)) == 2


# In the worker, at its second commit: the first block is in the kernel then, and the second is not.
_AT_THE_SECOND = """
commit, counted = iptc.Table.commit, []
def second(table):
    counted.append(1)
    if len(counted) == 2:
        {}
    commit(table)
if not os.path.exists({!r}):
    iptc.Table.commit = second
"""


@pytest.mark.parametrize(
    ("number", "why"), [(signal.SIGKILL, "killed by signal 9"), (signal.SIGSTOP, "did not answer")]
)
def test_a_worker_that_ends_or_hangs_in_a_change_is_replaced_and_the_change_made_up_for(
    host: Host, tmp_path: Path, number: signal.Signals, why: str
) -> None:
    # The next worker finds the file and does as it should.
    once = str(tmp_path / "once")
    code = _AT_THE_SECOND.format(f"open({once!r}, 'w'); os.kill(os.getpid(), {int(number)})", once)
    kernel = LegacyTables(Family.IPV4, otherwise(code), timeout=4.0)
    rules = wanted(Family.IPV4)

    async def work() -> None:
        with pytest.raises(FirewallError, match=f"the worker for legacy tables .*{why}"):
            await fit(kernel, rules)
        assert await kernel.chain(Table.RAW, "PREROUTING") != ["-P PREROUTING ACCEPT"]
        assert await kernel.chain(Table.NAT, "DOCKER") is None
        assert await fit(kernel, rules)
        assert not await fit(kernel, rules)

    run(host, [kernel], work())
    with Host("oracle") as oracle:
        other = LegacyTables()
        run(oracle, [other], fit(other, rules))
        assert sorted(save(host)) == sorted(save(oracle))


def test_a_lock_that_others_hold_for_too_long_is_named(host: Host, lock: Path) -> None:
    kernel = LegacyTables(Family.IPV4, otherwise("worker.LOCK_TIMEOUT = 1"))

    async def work() -> None:
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            with pytest.raises(FirewallError, match=f"somebody has held the lock {lock} for 1 s"):
                await kernel.restore(plan_of("DOCKER"))
        await kernel.restore(plan_of("DOCKER"))

    run(host, [kernel], work())


_PARENT = """
import asyncio
from ctrport.firewall.iptables_legacy import LegacyTables
from tests.node.test_legacy_tables import plan_of
asyncio.run(LegacyTables().restore(plan_of("LATE")))
"""


def test_what_was_not_written_when_the_daemon_was_killed_never_is(host: Host, lock: Path) -> None:
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        env = {**os.environ, "PYTHONPATH": f"{ROOT / 'daemon'}:{ROOT}"}
        daemon = host.spawn(sys.executable, "-c", _PARENT, env=env)
        try:
            children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children")

            def waiting() -> int:
                pid = int(children.read_text() or 0)
                assert pid
                assert re.search(r"^\d+: -> FLOCK +ADVISORY +WRITE \d+ ", Path("/proc/locks").read_text(), re.MULTILINE)
                assert "xtables.lock" in str([os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()])
                return pid

            worker = eventually(waiting, what="the worker waiting for the lock")
            daemon.kill()
            daemon.wait()
            eventually(lambda: not _runs(worker), what="the worker being gone")
        finally:
            end_process(daemon)
    assert not any("LATE" in line for line in save(host))


def _runs(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "rule",
    [
        Rule(Family.IPV4, Table.FILTER, "DOCKER", Match(in_device="a/../b"), ACCEPT, "default/web 1:1/tcp"),
        Rule(Family.IPV4, Table.FILTER, "DOCKER", Match(), Verdict("x y"), "default/web 1:1/tcp"),
        Rule(Family.IPV4, Table.FILTER, "x" * 40, Match(), ACCEPT, "default/web 1:1/tcp"),
    ],
)
def test_a_value_that_cannot_be_part_of_a_rule_never_gets_to_the_worker(host: Host, tmp_path: Path, rule: Rule) -> None:
    started = tmp_path / "started"
    kernel = LegacyTables(Family.IPV4, [sys.executable, "-c", f"open({str(started)!r}, 'w')"])
    with pytest.raises(ValueError, match="not a"):
        run(host, [kernel], kernel.restore(Plan((Block(Table.FILTER, (Add(rule, None),)),))))
    assert not started.exists()


def test_what_the_kernel_refuses_is_said_in_one_sentence_and_the_worker_stays(host: Host, tmp_path: Path) -> None:
    kernel = LegacyTables()
    lost = Line("-A DOCKER", "ctrport default/web 1:1/tcp 0123456789ab")

    async def work() -> None:
        await kernel.restore(plan_of("DOCKER"))
        with pytest.raises(
            FirewallError, match=r"the table filter could not be written: .*DOCKER: Chain already exists"
        ):
            await kernel.restore(plan_of("DOCKER"))
        with pytest.raises(
            FirewallError, match=r"the chain DOCKER of the table nat holds no rule 'ctrport default/web "
        ):
            await kernel.restore(Plan((Block(Table.NAT, (Remove("DOCKER", lost),)),)))
        with pytest.raises(FirewallError, match=r"the table nat could not be written: .*DOCKER: Directory not empty"):
            await kernel.restore(Plan((Block(Table.NAT, (Delete("DOCKER"),)),)))

    run(host, [kernel], work())


def test_without_python_iptables_it_says_what_to_install(host: Host) -> None:
    code = "import sys\nfrom ctrport.firewall import legacy_worker as worker\nsys.modules['iptc'] = None\nworker.main()"
    kernel = LegacyTables(Family.IPV4, [sys.executable, "-c", code])
    with pytest.raises(Unusable, match=r"python-iptables is not installed .*pip install 'ctrport\[legacy\]'"):
        run(host, [kernel], kernel.restore(plan_of("DOCKER")))
