from __future__ import annotations

import json
import re
from dataclasses import fields
from ipaddress import IPv4Address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ctrport import config, schema
from ctrport.config import Config, ConfigError
from ctrport.declared import Kind, Permission
from ctrport.listen import NOWHERE
from ctrport.model import Access, Declaration, Mapping, PodSelector, PortRange, Protocol, Selector
from ctrport.schema import Containerd, Firewall
from tests.unit import strategies

EXAMPLE = Path(__file__).parents[2] / "config.example.yaml"


# What a good file says.


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n", "--- # nothing\n", "~", "null\n", "{}", "\ufeff"])
def test_an_empty_file_is_all_defaults(text: str) -> None:
    assert config.parse(text, "f") == Config()


def test_defaults() -> None:
    assert Config() == Config(
        Containerd(address="/run/containerd/containerd.sock", namespaces=()),
        Firewall(backend="auto", chain="DOCKER", position="auto", localhost=True, on_stop="keep"),
        (),
    )


def test_every_key() -> None:
    text = """\
containerd: {address: "unix:///run/k3s/containerd/containerd.sock", namespaces: [default, k8s.io]}
firewall: {backend: iptables-nft, chain: PORTS, position: last, localhost: FALSE, on_stop: remove}
publish:
  - match: {namespace: default, container: redis}
    ports: ["6379:6379", "127.0.0.1:8443:443/tcp", "5000-5010:5000-5010/udp"]

  - match:
      labels: {tier: front, app: web}
    ports:
      - 8080:80
"""
    tcp, udp = Protocol.TCP, Protocol.UDP
    https = Mapping(IPv4Address("127.0.0.1"), PortRange(8443, 8443), PortRange(443, 443), tcp)
    assert config.parse(text, "/etc/x.yaml") == Config(
        Containerd("/run/k3s/containerd/containerd.sock", ("default", "k8s.io")),
        Firewall("iptables-nft", "PORTS", "last", localhost=False, on_stop="remove"),
        (
            Declaration(
                Selector("default", "redis"),
                (
                    Mapping(None, PortRange(6379, 6379), PortRange(6379, 6379), tcp),
                    https,
                    Mapping(None, PortRange(5000, 5010), PortRange(5000, 5010), udp),
                ),
                "/etc/x.yaml:4",
            ),
            Declaration(
                Selector(labels=(("app", "web"), ("tier", "front"))),
                (Mapping(None, PortRange(8080, 8080), PortRange(80, 80), tcp),),
                "/etc/x.yaml:7",
            ),
        ),
    )


def test_pods() -> None:
    text = """\
publish:
- match: {pod: {namespace: shop, name: "web-*", labels: {tier: front, app.kubernetes.io/name: web}}}
  ports: ["80:8080"]
- match: {namespace: k8s.io, pod: {labels: {app: ""}}, container: nginx, labels: {a: b}}
  ports: ["81:81"]
- match: {pod: {name: 010}}
  ports: ["82:82"]
"""
    first, second, third = (declaration.selector for declaration in config.parse(text, "f").publish)
    labels = (("app.kubernetes.io/name", "web"), ("tier", "front"))
    assert first == Selector(pod=PodSelector("shop", "web-*", labels))
    assert second == Selector("k8s.io", "nginx", (("a", "b"),), PodSelector(labels=(("app", ""),)))
    assert third == Selector(pod=PodSelector(name="010"))


def test_scalars_are_the_text_that_was_written() -> None:
    text = """\
publish:
- match: {namespace: 010, container: 1_0, labels: {on: off, 1: 0x1F, a: 2001-01-01, b: 1:20, c: "", d: "null", =: =}}
  ports: [22:22, 1:1, 59:59/udp]
"""
    (declaration,) = config.parse(text, "f").publish
    assert declaration.selector.namespace == "010"
    assert declaration.selector.container == "1_0"
    assert dict(declaration.selector.labels) == {
        "on": "off",
        "1": "0x1F",
        "a": "2001-01-01",
        "b": "1:20",
        "c": "",
        "d": "null",
        "=": "=",
    }
    assert [str(mapping) for mapping in declaration.mappings] == ["22:22/tcp", "1:1/tcp", "59:59/udp"]


def test_an_alias_stands_for_what_its_anchor_does() -> None:
    text = """\
publish:
- match: {container: a}
  ports: &web ["80:80"]
- match: {container: b}
  ports: *web
"""
    first, second = config.parse(text, "f").publish
    assert first.mappings == second.mappings
    assert (first.source, second.source) == ("f:2", "f:4")


@pytest.mark.parametrize(("word", "value"), [("true", True), ("True", True), ("TRUE", True), ('"true"', True)])
@pytest.mark.parametrize("negate", [False, True])
def test_localhost(word: str, value: bool, negate: bool) -> None:
    if negate:
        word = {"true": "false", "True": "False", "TRUE": "FALSE", '"true"': '"false"'}[word]
    assert config.parse(f"firewall: {{localhost: {word}}}", "f").firewall.localhost is (value is not negate)


@given(st.lists(strategies.declarations(), max_size=4))
def test_declarations_come_back_as_written(declarations: list[Declaration]) -> None:
    entries: list[dict[str, Any]] = []
    for declaration in declarations:
        selector = declaration.selector
        match = {"namespace": selector.namespace, "container": selector.container, "labels": dict(selector.labels)}
        entries.append(
            {
                "match": {key: value for key, value in match.items() if value},
                "ports": [str(mapping) for mapping in declaration.mappings],
            }
        )
    parsed = config.parse(json.dumps({"publish": entries}), "f").publish
    assert [(d.selector, d.mappings) for d in parsed] == [(d.selector, d.mappings) for d in declarations]


def watched(text: str) -> set[str]:
    parsed = config.parse(text, "f")
    return {namespace for namespace in ("default", "k8s.io", "moby") if parsed.watches(namespace)}


def test_watches_every_namespace_but_dockerds() -> None:
    assert watched("") == {"default", "k8s.io"}
    assert watched("publish: [{match: {namespace: m*}, ports: ['80:80']}]") == {"default", "k8s.io"}


def test_watches_dockerds_namespace_where_it_is_named() -> None:
    assert watched("publish: [{match: {namespace: moby}, ports: ['80:80']}]") == {"default", "k8s.io", "moby"}
    assert watched("containerd: {namespaces: [moby]}") == {"moby"}


def test_watches_only_the_namespaces_listed() -> None:
    assert watched("containerd: {namespaces: [k8s.io]}") == {"k8s.io"}
    assert watched(
        "{containerd: {namespaces: [default]}, publish: [{match: {namespace: moby}, ports: ['80:80']}]}"
    ) == {"default"}


# Further files beside the first.


def in_parts(text: str, *parts: str) -> Config:
    return config.parse(text, "main.yaml", [(f"conf.d/{number}.yaml", part) for number, part in enumerate(parts)])


def problems_in_parts(text: str, *parts: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        in_parts(text, *parts)
    return [str(problem) for problem in caught.value.problems]


def entry(container: str, port: int) -> str:
    return f'publish:\n- match: {{container: {container}}}\n  ports: ["{port}:80"]\n'


def test_the_declarations_of_parts_come_after_those_of_the_main_file() -> None:
    parsed = in_parts("firewall: {chain: PORTS}\n" + entry("z", 1), entry("b", 2), "", "# none\n", entry("a", 3))
    assert [(declaration.selector.container, declaration.source) for declaration in parsed.publish] == [
        ("z", "main.yaml:3"),
        ("b", "conf.d/0.yaml:2"),
        ("a", "conf.d/3.yaml:2"),
    ]
    assert parsed.firewall == Firewall(chain="PORTS")


def test_a_main_file_need_not_publish_anything_itself() -> None:
    assert len(in_parts("", entry("a", 1)).publish) == 1
    assert in_parts("", "", "publish: []") == Config()


def test_a_part_has_a_word_in_which_namespaces_are_watched() -> None:
    assert in_parts("", "publish: [{match: {namespace: moby}, ports: ['1:1']}]").watches("moby")


def test_files_may_claim_one_host_port() -> None:
    # As entries of one file may: which container comes first is decided when they run.
    assert len(in_parts(entry("a", 80), entry("b", 80)).publish) == 2


@pytest.mark.parametrize("key", ["containerd", "firewall"])
@pytest.mark.parametrize("value", ["{}", "{chain: X}", "~", "1"])
def test_a_part_sets_nothing_but_publish(key: str, value: str) -> None:
    said = problems_in_parts("", f"# a part\n{entry('a', 1)}{key}: {value}\n")
    refusal = f"conf.d/0.yaml:5:1: `{key}` is set in the main file alone; expected nothing but publish here"
    assert refusal in said
    assert all(problem.startswith("conf.d/0.yaml:5:") for problem in said)


def test_the_problems_of_all_files_are_reported_at_once_in_the_order_of_the_files() -> None:
    said = problems_in_parts(
        "firewall: {on_stop: x}\nfoo: 1\n",
        "publish:\n- match: {container: a}\n  ports: [0]\nfirewall: {}\ncontainerd: {}\n",
        entry("good", 1),
        "publish: [\n",
        "- a",
    )
    assert [": ".join(problem.split(": ")[:1]) for problem in said] == [
        "main.yaml:1:21",
        "main.yaml:2:1",
        "conf.d/0.yaml:3:11",
        "conf.d/0.yaml:4:1",
        "conf.d/0.yaml:5:1",
        "conf.d/2.yaml:2:1",
        "conf.d/3.yaml:1:1",
    ]


def test_problems_keep_the_order_of_the_files_whatever_these_are_called() -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse("x: 1", "z.yaml", [("m.yaml", "x: 1"), ("a.yaml", "x: 1\ny: 2")])
    assert [(problem.file, problem.line) for problem in caught.value.problems] == [
        ("z.yaml", 1),
        ("m.yaml", 1),
        ("a.yaml", 1),
        ("a.yaml", 2),
    ]


# The example that is shipped.


def uncommented() -> str:
    text = EXAMPLE.read_text()
    before, after = text.split("\npublish: []\n")
    return f"{before}\npublish:\n" + re.sub("^#", "", after, flags=re.MULTILINE)


def test_the_example_is_valid_and_publishes_nothing() -> None:
    assert config.parse(EXAMPLE.read_text(), "f") == Config()


def test_the_example_names_every_key_with_its_default() -> None:
    shown = yaml.safe_load(EXAMPLE.read_text())
    assert shown.keys() == {field.name for field in fields(Config)}
    assert shown["metrics"] == {"listen": NOWHERE}
    for section in (Containerd(), Firewall()):
        values = {field.name: getattr(section, field.name) for field in fields(section)}
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        assert shown[type(section).__name__.lower()] == values
    entries = yaml.safe_load(uncommented())["publish"]
    assert {key for entry in entries for key in entry} == {field.name for field in fields(schema.Entry)}
    matches = [entry["match"] for entry in entries]
    assert {key for match in matches for key in match} == {field.name for field in fields(schema.Match)}
    pods = [match["pod"] for match in matches if "pod" in match]
    assert {key for pod in pods for key in pod} == {field.name for field in fields(schema.PodMatch)}


def test_the_commented_rules_of_the_example_are_good() -> None:
    _, after = EXAMPLE.read_text().split("containers_may_publish: []\n")
    rules = after.partition("\n\n# What is published")[0]
    text = "containers_may_publish:\n" + re.sub("^#", "", rules, flags=re.MULTILINE)
    labels, pods = config.parse(text, "f").containers_may_publish
    assert labels == Permission(
        *("f:4", frozenset(Kind), (PortRange(8000, 8999),), True),
        namespace="default",
        at_most=5,
    )
    assert pods == Permission(
        *("f:11", frozenset({Kind.ANNOTATION}), (PortRange(30000, 30999),)),
        namespace="k8s.io",
        pod_namespace="shop-*",
        host_ips=(ip_network("192.0.2.7"), ip_network("2001:db8::/64")),
        protocols=frozenset({Protocol.TCP}),
    )
    named = {key for rule in yaml.safe_load(text)["containers_may_publish"] for key in rule}
    assert named == {field.name for field in fields(schema.MayPublish)}


def test_annotations_are_read_only_where_a_rule_is_about_them() -> None:
    def reads(*kinds: str) -> bool:
        rules = "".join(f"{{kinds: [{kind}], host_ports: [free]}}, " for kind in kinds)
        return config.parse(f"containers_may_publish: [{rules}]", "f").reads_annotations

    assert [reads(), reads("label"), reads("label", "annotation")] == [False, False, True]


def test_what_containers_may_publish_is_said_in_the_main_file_alone() -> None:
    with pytest.raises(ConfigError, match="`containers_may_publish` is set in the main file alone"):
        config.parse("", "a.yaml", [("b.yaml", "containers_may_publish: [{kinds: [label], host_ports: [free]}]")])


def test_the_commented_entries_of_the_example_are_good() -> None:
    declarations = config.parse(uncommented(), "f").publish
    assert [str(declaration.selector) for declaration in declarations] == [
        "namespace=default, container=redis",
        "container=worker-*",
        "container=admin",
        "label app=web",
        "pod (namespace=shop, name=web-*)",
        "pod (label app=dns), container=coredns",
    ]
    assert [str(mapping) for declaration in declarations for mapping in declaration.mappings] == [
        "6379:6379/tcp",
        "127.0.0.1:8443:443/tcp",
        "5000-5010:5000-5010/udp",
        "8000-8010:80/tcp",
        "9090/tcp",
        "8443:443/tcp",
        "[2001:db8::7]:8444:443/tcp",
        "8080:80/tcp",
        "8081:80/tcp",
        "192.0.2.7:53:53/udp",
        "192.0.2.7:53:53/tcp",
    ]


def test_who_may_reach_the_ports_is_read() -> None:
    text = """
publish:
  - match: {container: a}
    ports: ["80", "8000-8010:80", "[2001:db8::1]:53:53/UDP", "9:9/sctp"]
    sources: [192.0.2.0/24, 198.51.100.7, "2001:db8::/32"]
    interface: eth0.7
  - match: {container: b}
    ports: ["80"]
"""
    limited, anyone = config.parse(text, "f").publish
    networks = ("192.0.2.0/24", "198.51.100.7/32", "2001:db8::/32")
    assert limited.access == Access(tuple(map(ip_network, networks)), "eth0.7")
    assert list(map(str, limited.mappings)) == ["80/tcp", "8000-8010:80/tcp", "[2001:db8::1]:53:53/udp", "9:9/sctp"]
    assert anyone.access == Access()


@pytest.mark.parametrize("limit", ["0", "4096", "196605"])
def test_a_limit_for_reserved_ports_is_a_number(limit: str) -> None:
    assert config.parse(f"firewall: {{reserve_limit: {limit}}}", "f").firewall.reserve_limit == int(limit)


@pytest.mark.parametrize("seconds", ["1", "10", "60"])
def test_an_interval_is_a_number_of_seconds(seconds: str) -> None:
    assert config.parse(f"firewall: {{poll_interval: {seconds}}}", "f").firewall.poll_interval == int(seconds)


def test_networks_are_named_by_their_bridges() -> None:
    assert config.parse("networks: [{bridge: docker0}, {bridge: br-7}]", "f").networks == ("docker0", "br-7")
    assert config.parse("networks: []", "f").networks == ()
