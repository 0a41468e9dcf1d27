"""A real Prometheus on a node, and plain scrapes of ctrport's metrics there."""

from __future__ import annotations

import http.client
import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from prometheus_client.parser import text_string_to_metric_families

from embedded.host import Place, end_process
from embedded.node import Node
from embedded.wait import eventually

if TYPE_CHECKING:
    from typing_extensions import Self

#: Where the metrics are, and where Prometheus answers, on the node's 127.0.0.1.
METRICS_PORT, PROMETHEUS_PORT = 9477, 9090
SETTINGS = f"metrics: {{listen: 127.0.0.1:{METRICS_PORT}}}"

DEPLOY = Path(__file__).resolve().parents[2] / "deploy" / "prometheus"

_CONFIG = """
global: {{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}}
rule_files: ["{rules}"]
scrape_configs:
  - job_name: ctrport
    honor_labels: true
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""


def get(place: Place, port: int, path: str, *, timeout: float = 10, address: str = "127.0.0.1") -> tuple[int, str]:
    """Ask for something from a place, at its own 127.0.0.1 or elsewhere; return the status and the text."""
    client = http.client.HTTPConnection(address, port)
    client.sock = place.socket()
    try:
        client.sock.settimeout(timeout)
        client.sock.connect((address, port))
        client.request("GET", path)
        answer = client.getresponse()
        return answer.status, answer.read().decode()
    finally:
        client.close()


def scraped(place: Place, port: int = METRICS_PORT, address: str = "127.0.0.1") -> dict[str, float]:
    """Return what ctrport says now: each value by its name, with its labels behind it where there are some."""
    status, text = get(place, port, "/metrics", address=address)
    assert status == 200, text
    return {
        sample.name + str({key: value for key, value in sorted(sample.labels.items()) if value} or ""): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Prometheus:
    """Scrapes ctrport every second, and evaluates the alert rules of ``deploy``. Its data goes with the node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        config = node.directory / "prometheus.yml"
        config.write_text(_CONFIG.format(rules=DEPLOY / "alerts.yaml", port=METRICS_PORT))
        self._log = (node.directory / "prometheus.log").open("w")
        self._process = node.spawn(
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={node.directory / 'prometheus'}",
            f"--web.listen-address=127.0.0.1:{PROMETHEUS_PORT}",
            "--log.level=warn",
            stdout=subprocess.DEVNULL,
            stderr=self._log,
        )

    def __enter__(self) -> Self:
        eventually(self._is_ready, within=30, what="Prometheus being ready")
        return self

    def __exit__(self, *exception: object) -> None:
        end_process(self._process)
        self._log.close()

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, Path(self._log.name).read_text()
        try:
            return get(self._node, PROMETHEUS_PORT, "/-/ready")[0] == 200
        except ConnectionRefusedError:
            return False

    def ask(self, what: str, **parameters: str) -> Any:
        """Return what its HTTP API answers."""
        query = f"?{urlencode(parameters)}" if parameters else ""
        status, text = get(self._node, PROMETHEUS_PORT, f"/api/v1/{what}{query}")
        answer = json.loads(text)
        assert (status, answer["status"]) == (200, "success"), answer
        return answer["data"]

    def values(self, expression: str) -> dict[str, float]:
        """Return the values of an expression now, by their labels but for the job and the instance."""
        found = {}
        for each in self.ask("query", query=expression)["result"]:
            labels = {key: value for key, value in each["metric"].items() if key not in ("job", "instance", "__name__")}
            found[",".join(f"{key}={value}" for key, value in sorted(labels.items()))] = float(each["value"][1])
        return found

    def value(self, expression: str) -> float | None:
        """Return the one value of an expression now; None where it has none."""
        found = self.values(expression)
        assert len(found) <= 1, found
        return next(iter(found.values()), None)

    def wait(self, expression: str, expected: float, *, within: float = 15) -> None:
        """Wait until an expression has that value."""

        def is_so() -> bool:
            value = self.value(expression)
            assert value == expected, value
            return True

        eventually(is_so, within=within, what=f"{expression} being {expected:g}")
