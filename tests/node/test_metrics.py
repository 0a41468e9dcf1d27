"""What a real Prometheus sees of a real daemon, after real traffic: what was done, and nothing else."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ctrport.connections import SERIES
from embedded.node import Node
from embedded.traffic import Refused, Reply, Server, probe_tcp, probe_udp
from embedded.wait import eventually
from tests.node.daemon import Ctrport, Listener, publish, wait_open
from tests.node.prometheus import DEPLOY, METRICS_PORT, SETTINGS, Prometheus, get, scraped

ROOT = DEPLOY.parents[1]
ALERT_TESTS = ROOT / "tests" / "alerts" / "alerts.test.yaml"
DASHBOARD = ROOT / "deploy" / "grafana" / "ctrport.json"

CONFIG = publish(
    ("{container: web}", "8080:80"),
    ("{container: dns}", "5353:53/udp"),
    ("{container: nobody}", "9000:90"),
    settings=SETTINGS,
)
WEB = 'host_port="8080",family="ipv4"'


#: Who looks at the kernel's counters is not to be waited for.
IMPATIENT = "import ctrport.exposition; ctrport.exposition.LOOK_PAUSE = 0.5"


def start(ctrport: Ctrport) -> None:
    (ctrport.node.directory / "sitecustomize.py").write_text(IMPATIENT)
    ctrport.start(env={"PYTHONPATH": f"{ctrport.node.directory}:{Ctrport._environment()['PYTHONPATH']}"})


class World:
    """A node with a daemon that is scraped by a Prometheus."""

    def __init__(self, node: Node, prometheus: Prometheus) -> None:
        self.node, self.prometheus = node, prometheus
        self.ctrport = Ctrport(node)
        self.ctrport.configure(CONFIG)
        start(self.ctrport)
        self.web = node.start("web")
        self.server = Server(self.web, 80)
        wait_open(node, 8080, "web")
        self.ctrport.wait_for("8080:80/tcp", "active", "web")

    def connect(self, times: int) -> None:
        for _ in range(times):
            assert isinstance(probe_tcp(self.node.client, self.node.address, 8080), Reply)

    def connections(self) -> int:
        """What the kernel itself has counted for web."""
        listed = self.node.run("iptables-nft", "-t", "nat", "-vnxL", "DOCKER").stdout
        [count] = [line.split()[0] for line in listed.splitlines() if "default/web 8080" in line]
        return int(count)


@pytest.fixture(scope="module", autouse=True)
def able() -> None:
    """Skip where there is no Prometheus; never in CI."""
    absent = [program for program in ("prometheus", "promtool") if shutil.which(program) is None]
    if absent:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{absent[0]} is not installed: bin/install-tools")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Node() as node:
        node.sysctl("net/ipv4/icmp_ratelimit", 0)
        node.start_containerd()
        node.add_network("docker0")
        with Prometheus(node) as prometheus:
            yield World(node, prometheus)


def test_what_was_done_is_what_prometheus_says(world: World) -> None:
    asks = world.prometheus
    asks.wait('up{job="ctrport"}', 1)
    asks.wait('ctrport_publications{state="active"}', 1)
    assert asks.value('ctrport_publications{state="waiting"}') == asks.value("ctrport_publications_unmatched") == 2
    world.connect(7)
    for _ in range(3):
        assert isinstance(probe_tcp(world.node, "127.0.0.1", 8080), Reply)
    asks.wait(f"ctrport_mapping_connections_total{{{WEB}}}", len(world.server.visits))
    assert world.connections() == len(world.server.visits) >= 10
    labels = asks.values("ctrport_mapping_connections_total")
    assert "container=web,family=ipv4,host_port=8080,namespace=default,protocol=tcp" in labels

    status = world.ctrport.status()
    asks.wait("ctrport_firewall_transactions_total", status["transactions"])
    assert asks.value("sum(ctrport_events_total)") == status["events"]
    assert asks.value('ctrport_events_total{topic="/tasks/start"}') == 1
    assert asks.value("ctrport_start_to_open_seconds_count") == 1
    assert asks.value("sum(ctrport_firewall_write_duration_seconds_count)") == status["transactions"]
    assert asks.value("sum(ctrport_firewall_write_errors_total)") == 0
    assert (asks.value('ctrport_reconcile_duration_seconds_count{cause="event"}') or 0) >= 1
    assert asks.value("ctrport_host_ports_held") == 1
    assert asks.value("ctrport_in_line") == asks.value("ctrport_containerd_up") == 1
    [build] = asks.values("ctrport_build_info")
    assert "backend=iptables-nft" in build
    assert status["version"] in build
    memory = asks.value("process_resident_memory_bytes")
    assert memory is not None
    assert 20e6 < memory < 120e6
    took = asks.value("ctrport_start_to_open_seconds_sum")
    [logged] = re.findall(r"published .*mapping=8080.* after=([0-9.]+)ms", world.ctrport.messages)
    assert took == pytest.approx(float(logged) / 1000, abs=0.0001)


def test_drift_is_counted_and_a_counter_that_begins_anew_is_taken_for_that(world: World) -> None:
    asks = world.prometheus
    world.connect(9)
    asks.wait(f"ctrport_mapping_connections_total{{{WEB}}}", world.connections())
    world.node.run("iptables-nft", "-t", "nat", "-F", "DOCKER")
    eventually(lambda: world.ctrport.status()["repairs"] == 1, what="the repair")
    wait_open(world.node, 8080, "web")
    world.connect(2)
    asks.wait("ctrport_drift_repairs_total", 1)
    [gone] = re.findall(r'drift what="(\d+) rules gone', world.ctrport.messages)
    assert asks.value('ctrport_drift_repaired_total{kind="missing"}') == int(gone)
    assert asks.value("ctrport_drift_duration_seconds_count") == 1
    assert 0 < (asks.value("ctrport_drift_duration_seconds_sum") or 0) < 10
    asks.wait(f"ctrport_mapping_connections_total{{{WEB}}}", world.connections())
    assert asks.value(f"resets(ctrport_mapping_connections_total{{{WEB}}}[5m])") == 1


def test_connections_go_on_over_a_restart_of_the_daemon(world: World) -> None:
    asks, resets = world.prometheus, f"resets(ctrport_mapping_connections_total{{{WEB}}}[5m])"
    world.connect(1)
    asks.wait(f"ctrport_mapping_connections_total{{{WEB}}}", world.connections())
    before = asks.value(resets)
    assert world.ctrport.stop() == 0
    asks.wait('up{job="ctrport"}', 0)
    world.connect(5)  # the rules are in the kernel
    start(world.ctrport)
    asks.wait('up{job="ctrport"}', 1)
    world.connect(1)
    asks.wait(f"ctrport_mapping_connections_total{{{WEB}}}", world.connections())
    assert asks.value(resets) == before
    assert asks.value("resets(ctrport_firewall_transactions_total[5m])") == 1


def test_containerd_lost_and_back(world: World) -> None:
    asks = world.prometheus
    world.node.kill_containerd()
    asks.wait("ctrport_containerd_up", 0)
    assert (asks.value('ctrport_containerd_call_errors_total{reason="unavailable"}') or 0) >= 1
    asks.wait('ALERTS{alertname="CtrportContainerdLost", alertstate="pending"}', 1)
    world.connect(1)
    world.node.start_containerd()
    asks.wait("ctrport_containerd_up", 1)
    asks.wait("ctrport_containerd_reconnects_total", 1)


def test_a_configuration_that_cannot_be_used(world: World) -> None:
    asks, read_at = world.prometheus, "ctrport_config_last_reload_success_timestamp_seconds"
    asks.wait("ctrport_config_last_reload_successful", 1)
    before, reloads = asks.value(read_at) or 0, asks.value('ctrport_config_reloads_total{result="success"}') or 0
    world.ctrport.configure("publish: [")
    asks.wait("ctrport_config_last_reload_successful", 0)
    assert asks.value('ctrport_config_reloads_total{result="failure"}') == 1
    assert asks.value(read_at) == before
    world.ctrport.configure(CONFIG.replace("nobody", "somebody"))
    asks.wait("ctrport_config_last_reload_successful", 1)
    asks.wait('ctrport_config_reloads_total{result="success"}', reloads + 1)
    assert (asks.value(read_at) or 0) > before > 0
    world.ctrport.configure(CONFIG)
    asks.wait('ctrport_config_reloads_total{result="success"}', reloads + 2)


def test_flows_that_are_deleted_are_counted(world: World) -> None:
    node, asks = world.node, world.prometheus
    dns = node.start("dns")
    Server(dns, 53, kind=socket.SOCK_DGRAM)
    eventually(lambda: isinstance(probe_udp(node.client, node.address, 5353), Reply), what="dns being open")
    before = scraped(node)["ctrport_conntrack_deletions_total"]
    node.delete(dns)
    asks.wait("ctrport_conntrack_deletions_total > bool " + str(before), 1)
    assert asks.value("ctrport_conntrack_errors_total") == 0
    asks.wait('ctrport_publications{state="active"}', 1)


def test_a_write_that_fails_is_counted_and_the_kernel_is_not_in_line(world: World) -> None:
    node, asks = world.node, world.prometheus
    asks.wait("ctrport_in_line", 1)
    # Somebody else's rule in a chain of ours: the daemon leaves all of it alone, and says so.
    node.run("iptables-nft", "-t", "nat", "-A", "DOCKER", "-p", "tcp", "--dport", "9", "-j", "RETURN")
    asks.wait("ctrport_in_line", 0)
    assert asks.value('ctrport_publications{state="active"}') == 0  # as ps says
    asks.wait('ALERTS{alertname="CtrportNotInLine", alertstate="pending"}', 1)
    node.run("iptables-nft", "-t", "nat", "-D", "DOCKER", "-p", "tcp", "--dport", "9", "-j", "RETURN")
    asks.wait("ctrport_in_line", 1, within=25)


def test_who_connects_and_hangs_keeps_no_scrape_and_no_port_away(world: World) -> None:
    node, asks = world.node, world.prometheus
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError), contextlib.ExitStack() as closing:
                hanging = [closing.enter_context(one) for one in node.sockets(40)]
                for number, one in enumerate(hanging):
                    one.settimeout(0.5)
                    one.connect(("127.0.0.1", METRICS_PORT))
                    one.send((b"", b"GET", b"\xff" * 20000, b"GET /metrics HTTP/1.1\r\n\r\n")[number % 4])

    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        late = node.start("dns")
        Server(late, 53, kind=socket.SOCK_DGRAM)
        eventually(lambda: isinstance(probe_udp(node.client, node.address, 5353), Reply), what="dns being open")
        assert get(node, METRICS_PORT, "/metrics", timeout=30)[0] == 200
    finally:
        stop.set()
        flooding.join()
    asks.wait('up{job="ctrport"}', 1)
    assert len(list(Path(f"/proc/{world.ctrport.pid}/fd").iterdir())) < 60
    assert "Traceback" not in world.ctrport.messages
    node.delete(late)


def test_it_is_served_where_the_configuration_says_as_long_as_it_says_so(world: World) -> None:
    node, ctrport = world.node, world.ctrport
    world.connect(1)
    ctrport.configure(CONFIG.replace(str(METRICS_PORT), "9478"))
    eventually(lambda: not isinstance(probe_tcp(node, "127.0.0.1", 9478), Refused), what="the other port being open")
    assert isinstance(probe_tcp(node, "127.0.0.1", METRICS_PORT), Refused)
    assert scraped(node, 9478)["ctrport_in_line"] == 1
    ctrport.configure(CONFIG.replace(SETTINGS, ""))
    eventually(lambda: isinstance(probe_tcp(node, "127.0.0.1", 9478), Refused), what="no port being open")

    # Another program is in the way, and then it is not.
    with Listener(node, 9479, address="127.0.0.1", name="other"):
        ctrport.configure(CONFIG.replace(str(METRICS_PORT), "9479"))
        said = "metrics cannot be served at 127.0.0.1:9479: Address already in use"
        eventually(lambda: said in ctrport.messages, what="the port being named")
        world.connect(1)
    eventually(lambda: scraped_at_all(node, 9479), within=15, what="the metrics being served after all")
    assert ctrport.messages.count(said) == 1

    # A mapping does not get their port.
    ctrport.configure(
        CONFIG.replace(str(METRICS_PORT), "9479") + '  - match: {container: web}\n    ports: ["9479:80"]\n'
    )
    reason = str(ctrport.wait_for("9479:80/tcp", "conflict")["reason"])
    assert re.fullmatch(r"host port 9479/tcp is held by python\S* \(pid \d+\)", reason), reason
    ctrport.configure(CONFIG)
    world.prometheus.wait('up{job="ctrport"}', 1)


def scraped_at_all(node: Node, port: int) -> bool:
    try:
        return bool(scraped(node, port))
    except OSError:
        return False


def test_promtool_finds_nothing_to_say_of_the_names(world: World) -> None:
    status, text = get(world.node, METRICS_PORT, "/metrics")
    assert status == 200
    ended = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_prometheus_evaluates_the_alerts(world: World) -> None:
    world.prometheus.wait('up{job="ctrport"}', 1)

    def rules() -> list[dict[str, str]]:
        found: list[dict[str, str]] = world.prometheus.ask("rules")["groups"][0]["rules"]
        assert {rule["health"] for rule in found} == {"ok"}, found
        return found

    found = eventually(rules, what="all rules being evaluated")
    assert len(found) == len(yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"][0]["rules"])
    [target] = world.prometheus.ask("targets")["activeTargets"]
    assert target["lastError"] == ""


# Others nodes, and no node at all.


def test_there_are_no_more_series_than_may_be_and_the_rest_is_counted_together(node: Node, ctrport: Ctrport) -> None:
    more = 30
    ports = [*range(10000, 10000 + SERIES + more)]
    entries = ", ".join(f'"{port}:80"' for port in ports)
    ctrport.configure(f"{SETTINGS}\npublish:\n  - match: {{container: web}}\n    ports: [{entries}]\n")
    web = node.start("web")
    server = Server(web, 80)
    start(ctrport)

    def said() -> dict[str, float]:
        found = scraped(node)
        assert found["ctrport_mapping_series_left_out"] == more, found["ctrport_mapping_series_left_out"]
        return found

    found = eventually(said, within=30, what="all mappings being counted")
    series = {key: value for key, value in found.items() if key.startswith("ctrport_mapping_connections_total")}
    assert len(series) == SERIES
    assert set(series.values()) == {0}
    named = {int(match[1]) for key in series if (match := re.search(r"'host_port': '(\d+)'", key))}
    rest = [port for port in ports if port not in named]
    for port in (*rest[:3], *rest[:3], *sorted(named)[:2]):
        assert isinstance(probe_tcp(node.client, node.address, port), Reply)
    assert len(server.visits) == 8

    def counted() -> bool:
        found = scraped(node)
        assert found["ctrport_mapping_connections_rest_total"] == 6, found["ctrport_mapping_connections_rest_total"]
        return sum(value for key, value in found.items() if key.startswith("ctrport_mapping_connections_total")) == 2

    eventually(counted, within=30, what="the connections being counted")


def test_the_lock_that_others_hold_is_waited_for_and_told(node: Node, ctrport: Ctrport) -> None:
    ctrport.configure(
        publish(("{container: web}", "8080:80"), settings=f"{SETTINGS}\nfirewall: {{backend: iptables-legacy}}")
    )
    start(ctrport)
    count, total = "ctrport_xtables_lock_wait_seconds_count", "ctrport_xtables_lock_wait_seconds_sum"
    before = scraped(node)
    assert before["ctrport_build_info" + str(dict(sorted(_build(before).items())))] == 1
    assert before[count] >= 1
    with node.path("/run/xtables.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        web = node.start("web")
        Server(web, 80)
        eventually(lambda: scraped(node)["ctrport_events_total{'topic': '/tasks/start'}"] == 1, what="the event")
        time.sleep(1.2)  # which is what is measured
    wait_open(node, 8080, "web")
    assert isinstance(probe_tcp(node.client, node.address, 8080), Reply)

    def told() -> bool:
        after = scraped(node)
        assert after[count] > before[count], after[count]
        return 1.0 < after[total] - before[total] < 9

    eventually(told, what="the waiting being told")
    key = "ctrport_mapping_connections_total" + str(
        {"container": "web", "family": "ipv4", "host_port": "8080", "namespace": "default", "protocol": "tcp"}
    )
    eventually(lambda: scraped(node)[key] >= 2, within=20, what="connections being counted in legacy tables")


def _build(found: dict[str, float]) -> dict[str, str]:
    [key] = [key for key in found if key.startswith("ctrport_build_info")]
    labels: dict[str, str] = yaml.safe_load(key.removeprefix("ctrport_build_info"))
    assert labels["backend"] == "iptables-legacy"
    return labels


@pytest.mark.parametrize(
    "argv",
    [
        ("check", "rules", str(DEPLOY / "alerts.yaml")),
        ("test", "rules", str(ALERT_TESTS)),
        ("check", "config", str(DEPLOY / "prometheus.yml")),
    ],
    ids=lambda argv: " ".join(argv[:2]),
)
def test_promtool_takes_what_is_to_be_deployed(argv: tuple[str, ...]) -> None:
    ended = subprocess.run(["promtool", *argv], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_every_alert_is_tried() -> None:
    alerts = {rule["alert"] for rule in yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"][0]["rules"]}
    tried = {
        test["alertname"]
        for one in yaml.safe_load(ALERT_TESTS.read_text())["tests"]
        for test in one.get("alert_rule_test", ())
        if test["exp_alerts"]
    }
    assert tried == alerts


def test_promtool_takes_each_expression_of_the_dashboard(tmp_path: Path) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    expressions += [annotation["expr"] for annotation in dashboard["annotations"]["list"]]
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "1m")}
        for number, expression in enumerate(expressions)
    ]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    ended = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"{len(expressions)} rules found" in ended.stdout
