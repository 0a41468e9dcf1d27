"""The manifests in deploy/kubernetes: by Kubernetes' own schemas, and by what they promise."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from ctrport import config

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
MANIFESTS: list[dict[str, Any]] = [*yaml.safe_load_all((KUBERNETES / "ctrport.yaml").read_text())]
NAMESPACE, CONFIGMAP, DAEMONSET = MANIFESTS
POD = DAEMONSET["spec"]["template"]["spec"]
[CONTAINER] = POD["containers"]

#: The oldest Kubernetes that the schemas are there for, and the one that they were made for last.
VERSIONS = ("1.25", kubernetes_validate.latest_version())


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["kind"])
def test_kubernetes_takes_them(manifest: dict[str, Any], version: str) -> None:
    assert kubernetes_validate.validate(manifest, version, strict=True) == ".".join(version.split(".")[:2])


@pytest.mark.parametrize("version", VERSIONS)
def test_the_check_sees_what_is_wrong(version: str) -> None:
    misspelt = {**DAEMONSET, "spec": {**DAEMONSET["spec"], "updateStrateggy": {}}}
    with pytest.raises(kubernetes_validate.ValidationError, match="updateStrateggy"):
        kubernetes_validate.validate(misspelt, version, strict=True)


def test_the_configuration_is_taken() -> None:
    text = CONFIGMAP["data"]["config.yaml"]
    assert config.parse(text, "config.yaml").publish == ()
    declared = text.replace("publish: []", "publish:").replace("\n#", "\n")
    assert len(config.parse(declared, "config.yaml").publish) == 1


def test_the_pod_has_no_more_than_it_needs() -> None:
    context = CONTAINER["securityContext"]
    assert context["capabilities"]["drop"] == ["ALL"]
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert not {"privileged", "procMount"} & {*context}
    assert POD["automountServiceAccountToken"] is False
    assert "serviceAccountName" not in POD
    unit = (ROOT / "systemd" / "ctrport.service").read_text()
    bounding = re.search(r"^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)
    assert bounding is not None
    assert {f"CAP_{name}" for name in context["capabilities"]["add"]} <= {*bounding[1].split()}


def test_every_volume_is_there_and_used() -> None:
    used = [mount["name"] for mount in CONTAINER["volumeMounts"]]
    assert sorted(used) == sorted(volume["name"] for volume in POD["volumes"])


def test_the_labels_lead_to_the_pods() -> None:
    assert DAEMONSET["spec"]["selector"]["matchLabels"] == DAEMONSET["spec"]["template"]["metadata"]["labels"]
    assert {one["metadata"].get("namespace", NAMESPACE["metadata"]["name"]) for one in MANIFESTS} == {"ctrport"}
    [configmap] = [volume["configMap"]["name"] for volume in POD["volumes"] if "configMap" in volume]
    assert configmap == CONFIGMAP["metadata"]["name"]


def test_the_pod_monitor_finds_the_port_when_it_is_there() -> None:
    monitor = yaml.safe_load((KUBERNETES / "podmonitor.yaml").read_text())
    assert monitor["metadata"]["namespace"] == DAEMONSET["metadata"]["namespace"]
    assert monitor["spec"]["selector"] == DAEMONSET["spec"]["selector"]
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["honorLabels"] is True
    text = (KUBERNETES / "ctrport.yaml").read_text().replace("# ports:", "ports:")
    *_, daemonset = yaml.safe_load_all(text)
    assert kubernetes_validate.validate(daemonset, VERSIONS[-1], strict=True)
    [port] = daemonset["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert port["name"] == endpoint["port"]
    readme = (KUBERNETES / "README.md").read_text()
    listened = re.findall(r"^ *listen: (\S+)$|`(0\.0\.0\.0:\d+)`", readme, re.MULTILINE)
    assert {"".join(one).rpartition(":")[2] for one in listened} == {str(port["containerPort"])}


def test_the_alerts_are_those_of_a_rule_of_the_operator() -> None:
    block = re.search(
        r"^  \{ printf.*?\| kubectl apply", (KUBERNETES / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert block is not None
    command = block[0].removesuffix("| kubectl apply").strip()
    ended = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    rule = yaml.safe_load(ended.stdout)
    assert (rule["kind"], rule["metadata"]["namespace"]) == ("PrometheusRule", DAEMONSET["metadata"]["namespace"])
    assert rule["spec"] == yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text())


def test_the_image_has_the_version() -> None:
    from ctrport import __version__

    assert CONTAINER["image"].endswith(f":{__version__}")
    assert f"ctrport:{__version__} " in (KUBERNETES / "Containerfile").read_text()
