"""What the daemon says of itself to Prometheus: its numbers under the names that are API, with a word on each.

Imported only where metrics are on, as the library is. Nothing is counted here, and nothing is served.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, fields
from itertools import accumulate, chain

from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from .connections import Connections, Labels
from .model import Family
from .tally import Histogram, Reading

#: Of the text that ``render`` returns.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

#: By the values of the labels; a number alone where there are none.
Values = Mapping[tuple[str, ...], float] | float


def render(reading: Reading, connections: Connections, age: float | None) -> bytes:
    """Return the text: of these numbers, of the connections as they were ``age`` seconds ago, and of this process."""
    return generate_latest(_Collected(chain(_of(reading), _of_connections(connections, age), _PROCESS.collect())))


_PROCESS = ProcessCollector(registry=None)


@dataclass(frozen=True)
class _Collected:
    """What is to be written, in the form in which the library takes it."""

    families: Iterable[Metric]

    def collect(self) -> Iterable[Metric]:
        return self.families


def _of(reading: Reading) -> Iterator[Metric]:
    tally = reading.counted
    yield _gauge(
        "ctrport_build_info",
        "What runs: the daemon's version, the firewall backend in use, and the version of Python. Always 1.",
        {(reading.version, reading.backend, platform.python_version()): 1},
        ("version", "backend", "python"),
    )
    yield _gauge(
        "ctrport_in_line",
        "Whether the kernel holds what it should (1), or could not be written or has not been read yet (0).",
        reading.in_line,
    )
    yield _gauge("ctrport_warnings", "Warnings that `ctrport ps` shows.", reading.warnings)

    yield _gauge(
        "ctrport_publications",
        "Mappings by state, as `ctrport ps` shows them.",
        {(state.value,): number for state, number in reading.states.items()},
        ("state",),
    )
    yield _gauge(
        "ctrport_publications_unmatched",
        "Mappings that wait because no running container matches.",
        reading.unmatched,
    )
    yield _gauge(
        "ctrport_publications_standby",
        "Mappings that wait in line behind another container of the same entry, which serves.",
        reading.standby,
    )
    yield _gauge(
        "ctrport_publications_without_free_port",
        "Mappings in conflict that would take any free host port, or any of a pool, while there is none.",
        reading.starved,
    )
    yield _gauge(
        "ctrport_publications_unreserved",
        "Mappings that are published on host ports that another program could take.",
        reading.unreserved,
    )
    yield _gauge("ctrport_host_ports_held", "Host ports that sockets of the daemon hold.", reading.held_ports)
    yield _gauge(
        "ctrport_host_ports_limit",
        "How many host ports may be held: firewall.reserve_limit, or what open files allow.",
        reading.held_ports_limit,
    )
    yield _histogram(
        "ctrport_start_to_open_seconds",
        "Seconds from what led to it, such as a container's address or start, to the rules of a mapping in the kernel.",
        {(): tally.opened},
    )

    yield _counter(
        "ctrport_events_total",
        "Events of containerd about containers in namespaces that are looked at, by topic.",
        {(topic,): number for topic, number in tally.events.items()},
        ("topic",),
    )
    yield _histogram(
        "ctrport_reconcile_duration_seconds",
        "Seconds that a turn of the loop took, by what it was for; its count is the number of turns.",
        {(cause,): turns for cause, turns in tally.turns.items()},
        ("cause",),
    )

    yield _counter(
        "ctrport_firewall_transactions_total", "Changes that were written to the kernel.", reading.transactions
    )
    yield _histogram(
        "ctrport_firewall_write_duration_seconds",
        "Seconds that a write to the kernel took, failed or not, waiting for others included.",
        {(_family(family),): writes for family, writes in tally.writes.items()},
        ("family",),
    )
    yield _counter(
        "ctrport_firewall_write_errors_total",
        "Writes to the kernel that failed, those that others had come before included. They are tried again.",
        {(_family(family),): number for family, number in tally.write_errors.items()},
        ("family",),
    )
    yield _histogram(
        "ctrport_xtables_lock_wait_seconds",
        "Seconds that a write of legacy tables waited for /run/xtables.lock. iptables-nft takes no lock.",
        {(): tally.lock_waits},
    )

    yield _counter(
        "ctrport_drift_repairs_total",
        "Times that what others had done to our rules was repaired.",
        reading.repairs,
    )
    yield _counter(
        "ctrport_drift_repaired_total",
        "What was repaired: rules that were missing, that stood elsewhere, that nobody asked for, and "
        "route_localnet that was off.",
        {(kind,): number for kind, number in tally.drift.items()},
        ("kind",),
    )
    yield _histogram(
        "ctrport_drift_duration_seconds",
        "Seconds for which rules were not as they should be: since the write that did it, or since the last look.",
        {(): tally.drift_lasted},
    )

    yield _gauge(
        "ctrport_containerd_up",
        "Whether containerd answers and has listed its containers (1), or the daemon waits for that (0).",
        reading.connected,
    )
    yield _counter(
        "ctrport_containerd_reconnects_total",
        "Times that containerd's events were subscribed to once more.",
        max(0, tally.subscriptions - 1),
    )
    yield _counter(
        "ctrport_containerd_call_errors_total",
        "Calls that failed: nobody there (unavailable), no answer in time (unresponsive), or refused.",
        {(reason,): number for reason, number in tally.call_errors.items()},
        ("reason",),
    )

    yield _counter(
        "ctrport_config_reloads_total",
        "Times that another configuration was read, and whether it could be used.",
        {("success",): tally.reloads, ("failure",): tally.failed_reloads},
        ("result",),
    )
    yield _gauge(
        "ctrport_config_last_reload_successful",
        "Whether the configuration in use is that of the files (1), or an older one as theirs cannot be used (0).",
        reading.config_in_use_is_current,
    )
    yield _gauge(
        "ctrport_config_last_reload_success_timestamp_seconds",
        "When the configuration in use was read, in seconds since 1970.",
        reading.reloaded_at,
    )

    yield _counter(
        "ctrport_conntrack_deletions_total",
        "Flows that were deleted as their mapping came or went.",
        tally.flows_deleted,
    )
    yield _counter(
        "ctrport_conntrack_errors_total",
        "Times that flows of mappings that came or went could not be looked for or deleted. It is tried again.",
        tally.conntrack_errors,
    )


def _of_connections(connections: Connections, age: float | None) -> Iterator[Metric]:
    yield _counter(
        "ctrport_mapping_connections_total",
        "Connections to a mapping, as the kernel's rules count them; they begin anew when these are written anew.",
        {astuple(labels): number for labels, number in connections.series.items()},
        tuple(field.name for field in fields(Labels)),
    )
    yield _counter(
        "ctrport_mapping_connections_rest_total",
        "Connections to all mappings without a series of their own, since the daemon has looked first.",
        connections.rest,
    )
    yield _gauge(
        "ctrport_mapping_series_left_out",
        "Mappings, those of both families twice, that have no series of their own.",
        connections.left_out,
    )
    yield _gauge(
        "ctrport_mapping_connections_age_seconds",
        "Seconds since the kernel was asked for connections; with thousands of mappings it is not for each scrape.",
        {} if age is None else age,
    )


def _gauge(name: str, help: str, values: Values, labels: tuple[str, ...] = ()) -> Metric:
    return _filled(GaugeMetricFamily(name, help, labels=labels), values)


def _counter(name: str, help: str, values: Values, labels: tuple[str, ...] = ()) -> Metric:
    return _filled(CounterMetricFamily(name, help, labels=labels), values)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: Values) -> Metric:
    for labels, value in values.items() if isinstance(values, Mapping) else [((), values)]:
        family.add_metric(labels, value)
    return family


def _histogram(
    name: str, help: str, values: Mapping[tuple[str, ...], Histogram], labels: tuple[str, ...] = ()
) -> Metric:
    family = HistogramMetricFamily(name, help, labels=labels)
    for its, histogram in values.items():
        bounds = (*map(str, histogram.bounds), "+Inf")
        family.add_metric(its, list(zip(bounds, accumulate(histogram.counts), strict=True)), histogram.sum)
    return family


def _family(family: Family) -> str:
    return f"ipv{family.value}"
