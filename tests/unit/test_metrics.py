"""What Prometheus is told: each number under its name, as it is, and in a form that it takes."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import ctrport
from ctrport import exposition
from ctrport.connections import SERIES, Connections, Counts
from ctrport.exposition import Exposition
from ctrport.metrics import render
from ctrport.model import Family, State
from ctrport.owners import owner_of
from ctrport.tally import CALL_ERRORS, CAUSES, DRIFTS, Reading, Tally
from ctrport.taskevents import TOPICS
from tests.unit.worlds import active

ROOT = Path(__file__).resolve().parents[2]
STATES = [state.value for state in State]

WEB = active("8080:80")
OWNER = owner_of(WEB)


def reading(tally: Tally | None = None) -> Reading:
    """Numbers that differ from one another."""
    return Reading(
        version="0.1.0",
        backend="iptables-nft",
        counted=tally or Tally(),
        states={state: 10 + number for number, state in enumerate(State)},
        unmatched=2,
        standby=9,
        starved=3,
        unreserved=4,
        held_ports=5,
        held_ports_limit=4096,
        in_line=True,
        connected=False,
        config_in_use_is_current=True,
        reloaded_at=1_700_000_000.25,
        transactions=6,
        repairs=7,
        warnings=8,
    )


def samples(text: bytes) -> dict[str, float]:
    """Return each value by its name and labels, as they are written."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()) if value)
            key = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert key not in found
            found[key] = sample.value
    return found


def seen(count: int = 9) -> Counts:
    return Counts({Family.IPV4: {OWNER: count}}, {OWNER: WEB})


def test_every_number_is_told_as_it_is() -> None:
    tally = Tally(subscriptions=3, reloads=31, failed_reloads=32, flows_deleted=33, conntrack_errors=34)
    tally.expect(["/tasks/start"])
    tally.events["/tasks/start"] += 21
    tally.write_errors[Family.IPV6] += 22
    tally.call_errors["unresponsive"] += 23
    tally.drift.update(missing=24, surplus=25)
    tally.turns["event"].observe(0.004)
    tally.opened.observe(0.2)
    tally.writes[Family.IPV4].observe(3.5)
    tally.lock_waits.observe(40)
    tally.drift_lasted.observe(0.03)
    connections = Connections()
    connections.take(seen())
    found = samples(render(reading(tally), connections, 1.5))
    python = ".".join(map(str, sys.version_info[:3]))
    expected = {
        f"ctrport_build_info{{backend=iptables-nft,python={python},version=0.1.0}}": 1,
        "ctrport_in_line": 1,
        "ctrport_warnings": 8,
        "ctrport_publications{state=active}": 10,
        "ctrport_publications{state=waiting}": 11,
        "ctrport_publications{state=conflict}": 12,
        "ctrport_publications{state=refused}": 13,
        "ctrport_publications{state=unsupported}": 14,
        "ctrport_publications_unmatched": 2,
        "ctrport_publications_standby": 9,
        "ctrport_publications_without_free_port": 3,
        "ctrport_publications_unreserved": 4,
        "ctrport_host_ports_held": 5,
        "ctrport_host_ports_limit": 4096,
        "ctrport_start_to_open_seconds_bucket{le=0.1}": 0,
        "ctrport_start_to_open_seconds_bucket{le=0.25}": 1,
        "ctrport_start_to_open_seconds_bucket{le=+Inf}": 1,
        "ctrport_start_to_open_seconds_sum": 0.2,
        "ctrport_events_total{topic=/tasks/start}": 21,
        "ctrport_reconcile_duration_seconds_bucket{cause=event,le=0.0025}": 0,
        "ctrport_reconcile_duration_seconds_bucket{cause=event,le=0.005}": 1,
        "ctrport_reconcile_duration_seconds_count{cause=event}": 1,
        "ctrport_reconcile_duration_seconds_count{cause=tick}": 0,
        "ctrport_firewall_transactions_total": 6,
        "ctrport_firewall_write_duration_seconds_sum{family=ipv4}": 3.5,
        "ctrport_firewall_write_duration_seconds_count{family=ipv6}": 0,
        "ctrport_firewall_write_errors_total{family=ipv4}": 0,
        "ctrport_firewall_write_errors_total{family=ipv6}": 22,
        "ctrport_xtables_lock_wait_seconds_bucket{le=30.0}": 0,
        "ctrport_xtables_lock_wait_seconds_bucket{le=+Inf}": 1,
        "ctrport_drift_repairs_total": 7,
        "ctrport_drift_repaired_total{kind=missing}": 24,
        "ctrport_drift_repaired_total{kind=misplaced}": 0,
        "ctrport_drift_repaired_total{kind=surplus}": 25,
        "ctrport_drift_repaired_total{kind=route_localnet}": 0,
        "ctrport_drift_duration_seconds_sum": 0.03,
        "ctrport_containerd_up": 0,
        "ctrport_containerd_reconnects_total": 2,
        "ctrport_containerd_call_errors_total{reason=unavailable}": 0,
        "ctrport_containerd_call_errors_total{reason=unresponsive}": 23,
        "ctrport_config_reloads_total{result=success}": 31,
        "ctrport_config_reloads_total{result=failure}": 32,
        "ctrport_config_last_reload_successful": 1,
        "ctrport_config_last_reload_success_timestamp_seconds": 1_700_000_000.25,
        "ctrport_conntrack_deletions_total": 33,
        "ctrport_conntrack_errors_total": 34,
        (
            "ctrport_mapping_connections_total{container=web,family=ipv4,host_port=8080,namespace=default,protocol=tcp}"
        ): 9,
        "ctrport_mapping_connections_rest_total": 0,
        "ctrport_mapping_series_left_out": 0,
        "ctrport_mapping_connections_age_seconds": 1.5,
    }
    assert {key: found.get(key) for key in expected} == expected
    families = {re.sub("(_bucket|_sum|_count)?({.*)?$", "", key) for key in found}
    told = {re.sub("(_bucket|_sum|_count)?({.*)?$", "", key) for key in expected}
    assert {name for name in families if not name.startswith("process_")} == told
    for name in ("resident_memory_bytes", "cpu_seconds_total", "open_fds", "max_fds", "start_time_seconds"):
        assert found[f"process_{name}"] > 0


# What the names are documented as, and used for.

PAGE = ROOT / "docs" / "metrics.md"
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"
DASHBOARD = ROOT / "deploy" / "grafana" / "ctrport.json"


def documented() -> list[str]:
    """Return the rows of the reference table: what docs/metrics.md has to have."""
    connections, tally = Connections(), Tally()
    connections.take(seen())
    tally.expect(["/tasks/start"])
    rows = []
    for family in text_string_to_metric_families(render(reading(tally), connections, 1.5).decode()):
        if family.name.startswith("ctrport_"):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels = {label: None for sample in family.samples for label in sample.labels if label != "le"}
            shown = ", ".join(f"`{label}`" for label in labels)
            rows.append(f"| `{name}` | {family.type} | {shown} | {family.documentation} |")
    return rows


def used(text: str) -> set[str]:
    """Return the metrics that are named somewhere, without what a histogram adds to its name."""
    names = set(re.findall(r"\b(?:ctrport|process)_[a-z_]+\b", text)) - {"ctrport_build"}
    return {re.sub("_(bucket|sum|count)$", "", name) for name in names}


def exported() -> set[str]:
    rows = {row.split("`")[1] for row in documented()}
    return rows | {key for key in samples(render(reading(), Connections(), None)) if key.startswith("process_")}


def test_every_metric_is_documented_as_it_is_and_no_other() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `ctrport_")]
    assert rows == documented()
    assert used(PAGE.read_text()) == exported()
    assert f"At most {SERIES} series" in PAGE.read_text()


@pytest.mark.parametrize("values", [STATES, CAUSES, DRIFTS, CALL_ERRORS, TOPICS], ids=lambda values: values[0])
def test_each_value_of_a_label_is_explained(values: Sequence[str]) -> None:
    text = PAGE.read_text()
    assert [value for value in values if f"`{value}`" not in text] == []


@pytest.mark.parametrize("file", [ALERTS, DASHBOARD, PAGE.with_name("troubleshooting.md")], ids=lambda file: file.name)
def test_what_is_used_of_metrics_exists(file: Path) -> None:
    assert used(file.read_text()) - exported() == set()
    assert len(used(file.read_text())) > 5


def alerts() -> list[dict[str, Any]]:
    [group] = yaml.safe_load(ALERTS.read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def test_each_alert_leads_to_what_to_do() -> None:
    page = PAGE.with_name("troubleshooting.md")
    anchors = [
        re.sub(r"[^a-z0-9 _-]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in page.read_text().splitlines()
        if line.startswith("#")
    ]
    assert len(anchors) == len(set(anchors))
    for rule in alerts():
        file, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert file == "docs/troubleshooting.md"
        assert anchor in anchors, rule["alert"]
        assert anchor == rule["alert"].lower()
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert {"summary", "description"} <= rule["annotations"].keys()
    told = re.findall(r"^### (Ctrport\w+)$", page.read_text(), re.MULTILINE)
    assert told == [rule["alert"] for rule in alerts()]


def test_the_dashboard_is_one() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [tuple(panel["gridPos"][key] for key in "xywh") for panel in panels]
    for number, (x, y, w, h) in enumerate(places):
        assert x + w <= 24
        for x2, y2, w2, h2 in places[number + 1 :]:
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y, (panels[number]["title"], x2, y2)
    variables = {f"${one['name']}" for one in dashboard["templating"]["list"]} | {"$__rate_interval"}
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    assert all(set(re.findall(r"\$\w+", expression)) <= variables for expression in expressions)
    assert {panel["datasource"]["uid"] for panel in panels if panel["type"] != "row"} == {"${datasource}"}


def test_before_anything_was_counted_there_is_no_age() -> None:
    found = samples(render(reading(), Connections(), None))
    assert "ctrport_mapping_connections_age_seconds" not in found
    assert not any(key.startswith("ctrport_mapping_connections_total") for key in found)
    assert found["ctrport_containerd_reconnects_total"] == 0


@given(st.text(max_size=80))
def test_no_name_of_a_stranger_breaks_the_text(name: str) -> None:
    pod = replace(WEB, pod=name)
    connections = Connections()
    connections.take(Counts({Family.IPV4: {OWNER: 5}}, {OWNER: pod}))
    text = render(reading(), connections, 0.0).decode()
    [line] = [line for line in text.split("\n") if line.startswith("ctrport_mapping_connections_total{")]
    assert line.endswith("} 5.0")
    found = re.search(r'pod="((?:[^"\\]|\\.)*)"', line)
    assert found is not None
    assert re.sub(r"\\(.)", lambda escape: {"n": "\n"}.get(escape[1], escape[1]), found[1]) == name


def test_a_daemon_without_metrics_has_no_library_for_them() -> None:
    program = "import sys, ctrport.cli, ctrport.run, ctrport.report; print('prometheus_client' in sys.modules)"
    environment = {"PYTHONPATH": str(Path(ctrport.__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"


# How often it is made.


class Clock:
    """Goes on when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Kernel:
    """Counts how often it is asked, and says what a test wants."""

    def __init__(self) -> None:
        self.asked = 0
        self.says: Counts | None = seen()
        self.before: Callable[[], None] = lambda: None
        self.let_go = asyncio.Event()
        self.let_go.set()

    async def look(self) -> Counts | None:
        self.asked += 1
        self.before()
        await self.let_go.wait()
        return self.says


def connections_of(text: bytes) -> float | None:
    found = [value for key, value in samples(text).items() if key.startswith("ctrport_mapping_connections_total")]
    return found[0] if found else None


def test_a_text_is_good_for_a_while_and_made_once_for_all_who_ask(clock: Clock) -> None:
    readings, threads = 0, set[int]()

    def read() -> Reading:
        nonlocal readings
        readings += 1
        threads.add(threading.get_ident())
        return reading()

    async def work() -> None:
        its = Exposition(read, Kernel().look, clock)
        texts = await asyncio.gather(*(its.text() for _ in range(20)))
        assert len(set(map(id, texts))) == 1
        clock.now += exposition.FRESH - 0.01
        assert await its.text() is texts[0]
        assert readings == 1
        clock.now += 0.02
        assert await its.text() is not texts[0]
        assert readings == 2
        await its.close()

    asyncio.run(work())
    assert threads == {threading.get_ident()}  # what the loop owns is read by nobody else


def test_the_kernel_is_asked_not_more_often_than_it_is_worth(clock: Clock) -> None:
    async def work() -> None:
        kernel = Kernel()
        its = Exposition(reading, kernel.look, clock)
        assert connections_of(await its.text()) == 9
        kernel.says = seen(10)
        clock.now += exposition.LOOK_PAUSE - 1
        text = await its.text()
        assert connections_of(text) == 9
        assert samples(text)["ctrport_mapping_connections_age_seconds"] == exposition.LOOK_PAUSE - 1
        clock.now += 1
        assert connections_of(await its.text()) == 10
        assert kernel.asked == 2

        # One that takes a second may be asked every hundred seconds, once what may be taken ahead is used up.
        def slow() -> None:
            clock.now += 1.0

        kernel.before = slow
        clock.now += 1000.0
        began, kernel.asked = clock.now, 0
        while clock.now < began + 1000.0:
            await its.text()
            clock.now += exposition.LOOK_PAUSE
        assert 9 <= kernel.asked <= 11
        await its.close()

    asyncio.run(work())


def test_a_kernel_that_cannot_be_asked_leaves_what_was_known(clock: Clock) -> None:
    async def work() -> None:
        kernel = Kernel()
        its = Exposition(reading, kernel.look, clock)
        await its.text()
        kernel.says = None
        clock.now += 60.0
        text = await its.text()
        assert connections_of(text) == 9
        assert samples(text)["ctrport_mapping_connections_age_seconds"] == 60.0
        await its.close()

    asyncio.run(work())


def test_a_kernel_that_hangs_holds_up_no_scrape_for_long(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "LOOK_PATIENCE", 0.05)

    async def work() -> None:
        kernel = Kernel()
        kernel.let_go.clear()
        its = Exposition(reading, kernel.look, clock)
        assert connections_of(await its.text()) is None
        clock.now += 60.0
        assert connections_of(await its.text()) is None
        assert kernel.asked == 1  # it is at it still
        kernel.let_go.set()
        clock.now += 60.0
        assert connections_of(await its.text()) == 9
        await its.close()

    asyncio.run(work())


def test_what_is_being_done_ends_with_it(clock: Clock) -> None:
    async def work() -> None:
        kernel = Kernel()
        kernel.let_go.clear()
        its = Exposition(reading, kernel.look, clock)
        asking = asyncio.create_task(its.text())
        await asyncio.sleep(0.01)
        await its.close()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(work())
