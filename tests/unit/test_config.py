from __future__ import annotations

import fnmatch
import json
import re
from dataclasses import fields
from ipaddress import IPv4Address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from ctrport import config
from ctrport.config import Config, ConfigError, Containerd, Firewall, Problem
from ctrport.model import Access, Declaration, Mapping, PodSelector, PortRange, Protocol, Selector
from tests.unit import strategies

EXAMPLE = Path(__file__).parents[2] / "config.example.yaml"


def problems(text: str) -> list[str]:
    """Return the lines of the error that `text` is refused with, none where it is taken."""
    try:
        config.parse(text, "f")
    except ConfigError as error:
        return str(error).split("\n")
    return []


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
    assert config.DEFAULT_PATH == "/etc/ctrport/config.yaml"


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
    before, after = text.split("publish: []\n")
    return f"{before}publish:\n" + re.sub("^#", "", after, flags=re.MULTILINE)


def test_the_example_is_valid_and_publishes_nothing() -> None:
    assert config.parse(EXAMPLE.read_text(), "f") == Config()


def test_the_example_names_every_key_with_its_default() -> None:
    shown = yaml.safe_load(EXAMPLE.read_text())
    assert shown.keys() == {field.name for field in fields(Config)}
    for section in (Containerd(), Firewall()):
        values = {field.name: getattr(section, field.name) for field in fields(section)}
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        assert shown[type(section).__name__.lower()] == values
    entries = yaml.safe_load(uncommented())["publish"]
    assert {key for entry in entries for key in entry} == {field.name for field in fields(config._Entry)}
    matches = [entry["match"] for entry in entries]
    assert {key for match in matches for key in match} == {field.name for field in fields(config._Match)}
    pods = [match["pod"] for match in matches if "pod" in match]
    assert {key for pod in pods for key in pod} == {field.name for field in fields(config._PodMatch)}


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


# Everything that can be wrong.

MANY = """\
containerd:
  adress: /run/x.sock
  address: run/containerd.sock
  namespaces: [default, "k8s_", ~, [x], default/x]
firewall:
  backend: nftables
  chain: INPUT
  position: top
  localhost: yes
  chain: OK
  masquerade: some
  reserve_limit: -1
  poll_interval: 0.5
  on_stop:
publlish: []
publish:
  - match: {}
    ports: []
  - match: {namespace: "web app", container: "[b-a]", labels: {app: , "": x, c: [y]}}
    ports: ["8080:80", 8080:81, "80:80:80", ~, {a: b}, "127.0.0.1:8080:1/udp", "53:53/sctp", "[::1]:1:1"]
  - ports: "80:80"
  - match: {labels: {}}
    ports: [80, "127.0.0.1::80", "8000-8010:80"]
    port: ["1:1"]
  - match: {container: a}
    ports: ["1:1"]
    sources: [10.0.0.0/8, 10.0.0.1, 10.0.0.1/8, ten, ~, 10/8, "fe80::1%eth0", "2001:db8::/32"]
    interface: eth0/1
  - match: {container: a}
    ports: ["1:1"]
    sources: []
    interface: ["eth0"]
  - nothing
  -
  - match: {pod: {}}
    ports: ["1:1"]
  - match: {pod: {namespace: a/b, name: "[a", labels: {app: , "": x}, label: {a: b}}}
    ports: ["1:1"]
  - match: {pod: web}
    ports: ["1:1"]
"""

MANY_PROBLEMS = """\
f:2:3: `containerd` has no key 'adress'; expected address or namespaces (did you mean address?)
f:3:12: `containerd.address` is 'run/containerd.sock'; expected {address}
f:4:25: an entry of `containerd.namespaces` is 'k8s_'; expected {a_namespace}
f:4:33: an entry of `containerd.namespaces` is empty; expected {a_namespace}
f:4:36: an entry of `containerd.namespaces` is a list; expected {a_namespace}
f:4:41: an entry of `containerd.namespaces` is 'default/x'; expected {a_namespace}
f:6:12: `firewall.backend` is 'nftables'; expected auto, iptables-nft or iptables-legacy
f:7:10: `firewall.chain` is 'INPUT', a word that iptables has a meaning for; expected {chain}
f:8:13: `firewall.position` is 'top'; expected auto, first or last
f:9:14: `firewall.localhost` is 'yes'; expected true or false
f:10:3: the key 'chain' stands on line 7 already; expected each once
f:11:15: `firewall.masquerade` is 'some'; expected hairpin or all
f:12:18: `firewall.reserve_limit` is '-1'; expected a number of ports from 0 to 196605, in plain digits
f:13:18: `firewall.poll_interval` is '0.5'; expected a number of seconds from 1 to 60, in plain digits
f:14:3: `firewall.on_stop` is empty; expected keep or remove
f:15:1: the file has no key 'publlish'; expected containerd, firewall, networks or publish (did you mean publish?)
f:17:12: `publish[].match` is a mapping without a condition, which would match every container; expected {match}
f:18:12: `publish[].ports` is an empty list; expected {ports}
f:19:24: `publish[].match.namespace` is 'web app'; expected {namespace_glob}
f:19:46: `publish[].match.container` is '[b-a]', with a range that runs backwards; expected {container_glob}
f:19:64: the label 'app' is empty; expected text, or "" for an empty value
f:19:71: a label has no name; expected one, such as app in {{app: web}}
f:19:81: the label 'c' is a list; expected text, or "" for an empty value
f:20:24: '8080:81' claims a host port that '8080:80' on line 20 has; expected each once
f:20:33: '80:80:80' has the host address '80'; expected an IPv4 address or an IPv6 address in brackets
f:20:45: an entry of `publish[].ports` is empty; expected {port}
f:20:48: an entry of `publish[].ports` is a mapping; expected {port}
f:21:5: `publish[].match` is missing; expected {match}
f:21:12: `publish[].ports` is '80:80'; expected {ports}
f:22:12: `publish[].match` is a mapping without a condition, which would match every container; expected {match}
f:24:5: an entry of `publish` has no key 'port'; expected match, ports, sources or interface (did you mean ports?)
f:27:37: an entry of `publish[].sources` is '10.0.0.1/8', which is a host in 10.0.0.0/8; expected {source}
f:27:49: an entry of `publish[].sources` is 'ten'; expected {source}
f:27:54: an entry of `publish[].sources` is empty; expected {source}
f:27:57: an entry of `publish[].sources` is '10/8'; expected {source}
f:27:63: an entry of `publish[].sources` is 'fe80::1%eth0', with a zone, which no rule can hold; expected {source}
f:28:16: `publish[].interface` is 'eth0/1'; expected the name of one of the node's devices, such as eth0
f:31:14: `publish[].sources` is an empty list; expected {sources}
f:32:16: `publish[].interface` is a list; expected the name of one of the node's devices, such as eth0
f:33:5: an entry of `publish` is 'nothing'; expected {entry}
f:34:4: an entry of `publish` is empty; expected {entry}
f:35:18: `publish[].match.pod` is a mapping without a condition, which would match every pod; expected {pod}
f:37:30: `publish[].match.pod.namespace` is 'a/b'; expected {pod_namespace_glob}
f:37:41: `publish[].match.pod.name` is '[a', with a '[' that is not closed; expected {pod_name_glob}
f:37:56: the label 'app' is empty; expected text, or "" for an empty value
f:37:63: a label has no name; expected one, such as app in {{app: web}}
f:37:71: `publish[].match.pod` has no key 'label'; expected namespace, name or labels (did you mean labels?)
f:39:18: `publish[].match.pod` is 'web'; expected {pod}
""".format(
    address="the absolute path of a unix socket, such as /run/containerd/containerd.sock",
    a_namespace="the name of a containerd namespace, such as k8s.io",
    chain="1 to 10 letters, digits, '_' and '-', beginning with a letter, such as DOCKER",
    match="a mapping with pod, namespace, container or labels, to say which containers are meant",
    namespace_glob="the name of a containerd namespace, in which * ? and [...] match as in a shell",
    container_glob="the id of a container or its name in a pod; * ? and [...] match as in a shell",
    pod="a mapping with namespace, name or labels of a pod, as Kubernetes knows it",
    pod_namespace_glob="the name of a Kubernetes namespace, in which * ? and [...] match as in a shell",
    pod_name_glob="the name of a pod, in which * ? and [...] match as in a shell",
    entry="a mapping with match and ports, and perhaps sources and interface",
    source="an address or a network, such as 192.0.2.0/24",
    sources="a list of the networks that may reach the ports, such as [192.0.2.0/24, 2001:db8::/32]",
    ports='a list of port mappings, such as ["8080:80"]',
    port="a port mapping, [hostIP:][hostPort[-end]:]containerPort[-end][/protocol]",
)


def test_every_problem_is_reported_at_once() -> None:
    assert problems(MANY) == MANY_PROBLEMS.splitlines()


def test_problems_are_values_in_the_order_of_the_file() -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse("publish:\nfirewall: {on_stop: x}", "dir/f.yaml")
    assert caught.value.problems == (
        Problem(
            1,
            1,
            "`publish` is empty; expected a list of entries, each with match and ports, or [] for none",
            "dir/f.yaml",
        ),
        Problem(2, 21, "`firewall.on_stop` is 'x'; expected keep or remove", "dir/f.yaml"),
    )
    assert str(caught.value) == "\n".join(str(problem) for problem in caught.value.problems)
    assert str(caught.value.problems[1]) == "dir/f.yaml:2:21: `firewall.on_stop` is 'x'; expected keep or remove"


FIREWALL = (
    "a mapping with backend, chain, position, localhost, masquerade, reserve_limit, poll_interval and on_stop, "
    "or the key left out"
)
FILE = "a mapping with the keys containerd, firewall, networks and publish, each of which may be left out"
NO_KEY_A = "f:1:1: the file has no key 'a'; expected containerd, firewall, networks or publish"
BAD_YAML = {
    "firewall: {}\n---\nfirewall: {}\n": ["f:2:1: a second document begins here; expected one alone"],
    "---\n---\n": ["f:2:1: a second document begins here; expected one alone"],
    "firewall:\n\tchain: x\n": ["f:2:1: a tab cannot indent or begin a value in YAML; expected spaces"],
    "firewall: {}\nx: a: b\n": ["f:2:5: this is not YAML: mapping values are not allowed here"],
    "\n\na: 'x\n\n": [
        "f:5:1: this is not YAML: found unexpected end of stream while scanning a quoted scalar that begins on line 3"
    ],
    "publish: *all": ["f:1:10: this is not YAML: found undefined alias 'all'"],
    "publish: *" + "a" * 500: ["f:1:10: this is not YAML: found undefined alias '" + "a" * 177],
    "&a a: &a b": ["f:1:7: second occurrence of an anchor; expected each to be defined once"],
    'a: "\\U00110000"': ["f:1:7: this is not YAML: a number is out of range"],
    'a: "\\UFFFFFFFF"': ["f:1:7: this is not YAML: a number is out of range"],
    "%YAML 1." + "9" * 5000 + "\n--- {}": ["f:1:9: this is not YAML: a number is out of range"],
    "a: b\0": ["f:1:5: the character U+0000 cannot stand in YAML; expected printable text"],
    "a:\r\n  \x1b[2J": ["f:2:3: the character U+001B cannot stand in YAML; expected printable text"],
    "\ud800": ["f:1:1: the character U+D800 cannot stand in YAML; expected printable text"],
    "[" * 5000: ["f:1:33: this is not YAML: nested more than 32 levels deep"],
    "- a": [f"f:1:1: the file is a list; expected {FILE}"],
    "text": [f"f:1:1: the file is 'text'; expected {FILE}"],
    "a: &a [*a]": [NO_KEY_A, "f:1:4: an alias brings this into itself; expected it to end somewhere"],
    "&a {a: *a}": [
        "f:1:1: an alias brings this into itself; expected it to end somewhere",
        NO_KEY_A.replace("f:1:1:", "f:1:5:"),
    ],
    "? [a]\n: b\n": ["f:1:3: a key is a list; expected text"],
    "{{a: b}: c}": ["f:1:2: a key is a mapping; expected text"],
    "firewall: {<<: {chain: A}}": ["f:1:12: merging with '<<' is not taken here; expected the keys written out"],
    "firewall: !!python/object:os.system {}": [
        "f:1:11: the tag '!!python/object:os.system' is not taken here; expected the value without a tag"
    ],
    "firewall: {chain: !!str A, on_stop: !x keep}": [
        "f:1:19: the tag '!!str' is not taken here; expected the value without a tag",
        "f:1:37: the tag '!x' is not taken here; expected the value without a tag",
    ],
    'firewall: {chain: "\\ud800"}': ["f:1:19: half of a surrogate pair is no character; expected text"],
    'firewall: {"\\udfff": x}': ["f:1:12: half of a surrogate pair is no character; expected text"],
    "firewall:": [f"f:1:1: `firewall` is empty; expected {FIREWALL}"],
    "firewall: []": [f"f:1:11: `firewall` is an empty list; expected {FIREWALL}"],
    "firewall: {chain: ~}": [
        "f:1:12: `firewall.chain` is empty; expected 1 to 10 letters, digits, '_' and '-', "
        "beginning with a letter, such as DOCKER"
    ],
    "a: {b: {c: 1, c: 2}}": [NO_KEY_A, "f:1:15: the key 'c' stands on line 1 already; expected each once"],
    '{"a": 1, a: 2}': [
        "f:1:2: the file has no key 'a'; expected containerd, firewall, networks or publish",
        "f:1:10: the key 'a' stands on line 1 already; expected each once",
    ],
    '"\\e[2J\\n": 1': ["f:1:1: the file has no key '\\x1b[2J\\n'; expected containerd, firewall, networks or publish"],
}


@pytest.mark.parametrize(("text", "expected"), BAD_YAML.items(), ids=lambda value: repr(value)[:40])
def test_bad_yaml_is_refused_in_a_sentence(text: str, expected: list[str]) -> None:
    assert problems(text) == expected


def test_aliases_that_multiply_are_refused() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 10)
    )
    (problem,) = [problem for problem in problems(bomb) if "no key" not in problem]
    assert re.fullmatch(r"f:1:\d+: the aliases of this file stand for more than 10000 values", problem)


def test_aliases_that_nest_are_refused() -> None:
    chain = ", ".join(["&a0 [x]"] + [f"&a{level} [*a{level - 1}]" for level in range(1, 60)])
    assert "f:1:5: aliases nest this more than 32 levels deep" in problems(f"x: [{chain}]")


def test_many_nodes_without_aliases_are_fine() -> None:
    listed = "".join(f"  - {port}:80\n" for port in range(1, 3001))
    text = "".join(f"- match: {{container: {name}}}\n  ports:\n{listed}" for name in "abcd")
    assert len(config.parse(f"publish:\n{text}", "f").publish) == 4


def test_a_problem_at_an_anchor_is_said_once() -> None:
    text = "publish:\n- match: &m {container: a/b}\n  ports: ['1:1']\n- {match: *m, ports: ['2:2']}\n"
    (problem,) = problems(text)
    assert problem.startswith("f:2:25: `publish[].match.container` is 'a/b'; expected ")


# Single values.


@pytest.mark.parametrize(
    ("address", "path"),
    [("/run/c.sock", "/run/c.sock"), ("unix:///run/c.sock", "/run/c.sock"), ("/" + "a" * 106, "/" + "a" * 106)],
)
def test_a_good_address(address: str, path: str) -> None:
    assert config.parse(f'containerd: {{address: "{address}"}}', "f").containerd.address == path


@pytest.mark.parametrize(
    "address",
    ["", "run/c.sock", "unix://run/c.sock", "unix:/run/c.sock", "tcp://127.0.0.1:1", "/", "/run/", "/a\\n", "/a\\0"],
)
def test_a_bad_address(address: str) -> None:
    (problem,) = problems(f'containerd: {{address: "{address}"}}')
    assert problem.startswith("f:1:23: `containerd.address` is '")
    assert problem.endswith("; expected the absolute path of a unix socket, such as /run/containerd/containerd.sock")


def test_an_address_longer_than_the_kernel_takes() -> None:
    (problem,) = problems(f'containerd: {{address: "/{"a" * 105}\u00e4"}}')
    assert "', which is longer than the 107 bytes that the path of a socket can have; expected " in problem


@pytest.mark.parametrize("chain", ["DOCKER", "a", "A1_b-C", "ABCDEFGHIJ", "input", "KUBERNETES", "CNIx"])
def test_a_good_chain(chain: str) -> None:
    assert config.parse(f"firewall: {{chain: {chain}}}", "f").firewall.chain == chain


@pytest.mark.parametrize(
    ("chain", "why"),
    [
        ("", ""),
        ("ABCDEFGHIJK", ""),
        ("1A", ""),
        ("-A", ""),
        ("A B", ""),
        ("A\\n", ""),
        ("\u00c4", ""),
        *((word, ", a word that iptables has a meaning for") for word in ["INPUT", "FORWARD", "DNAT", "LOG", "TRACE"]),
        ("KUBE", ", and chains of such names belong to kube-proxy"),
        ("KUBE-X", ", and chains of such names belong to kube-proxy"),
        ("CNI", ", and chains of such names belong to the CNI plugins"),
        ("cali", ", and chains of such names belong to Calico"),
    ],
)
def test_a_bad_chain(chain: str, why: str) -> None:
    (problem,) = problems(f'firewall: {{chain: "{chain}"}}')
    assert f"'{chain}'{why}; expected 1 to 10 letters" in problem


@pytest.mark.parametrize("word", ["yes", "on", "1", "tRUE", "", "truee", " true"])
def test_other_words_than_true_and_false(word: str) -> None:
    (problem,) = problems(f'firewall: {{localhost: "{word}"}}')
    assert problem == f"f:1:23: `firewall.localhost` is '{word}'; expected true or false"


@pytest.mark.parametrize(
    "glob", ["a", "web-1.x_y", "*", "web-*", "?", "[a-c]*", "[!a-c]", "[]]", "[!]]", "*-", "*]", "[-a]x"]
)
def test_a_good_glob(glob: str) -> None:
    (declaration,) = config.parse(f'publish: [{{match: {{container: "{glob}"}}, ports: ["1:1"]}}]', "f").publish
    assert declaration.selector.container == glob


@pytest.mark.parametrize(
    ("glob", "why"),
    [
        ("", ""),
        ("a b", ""),
        ("a/b", ""),
        ("\u00e4*", ""),
        ("a$", ""),
        ("-a", ", which containerd takes for no name"),
        ("a--b", ", which containerd takes for no name"),
        ("a" * 77, ", which containerd takes for no name"),
        ("[a", ", with a '[' that is not closed"),
        ("[]", ", with a '[' that is not closed"),
        ("[!]", ", with a '[' that is not closed"),
        ("[a]*[", ", with a '[' that is not closed"),
        ("[b-a]", ", with a range that runs backwards"),
        ("[!a-cz-b]x", ", with a range that runs backwards"),
    ],
)
@pytest.mark.parametrize("key", ["namespace", "container"])
def test_a_bad_glob(key: str, glob: str, why: str) -> None:
    (problem,) = problems(f'publish: [{{match: {{{key}: "{glob}"}}, ports: ["1:1"]}}]')
    assert re.fullmatch(rf"f:1:\d+: `publish\[\].match.{key}` is \S.*", problem)
    assert f"{why}; expected the " in problem


@pytest.mark.parametrize("key", ["namespace", "name"])
@pytest.mark.parametrize(
    ("glob", "why"), [("", ""), ("a b", ""), ("[a", ", with a '['"), ("[b-a]", ", with a range"), ("-a", ", which")]
)
def test_a_bad_glob_for_pods(key: str, glob: str, why: str) -> None:
    (problem,) = problems(f'publish: [{{match: {{pod: {{{key}: "{glob}"}}}}, ports: ["1:1"]}}]')
    assert f"`publish[].match.pod.{key}` is '{glob}'{why}" in problem
    assert problem.endswith(", in which * ? and [...] match as in a shell")


@given(st.text("ab-!]*?[.", max_size=12))
@example("[b-a]")
@example("[a-b-a]")
@example("[--a]")
def test_what_passes_as_a_glob_can_be_matched(glob: str) -> None:
    if problems(f'publish: [{{match: {{container: "{glob}"}}, ports: ["1:1"]}}]') == []:
        fnmatch.fnmatchcase("redis", glob)
        # Empty brackets are how fnmatch writes a range that runs backwards.
        assert "(?!)" not in fnmatch.translate(glob)


@pytest.mark.parametrize(
    ("first", "second", "clash"),
    [
        ("80:80", "80:81", True),
        ("80:80", "80:80", True),
        ("80:80", "0.0.0.0:80:81", True),
        ("80:80", "127.0.0.1:80:81", True),
        ("127.0.0.1:80:80", "127.0.0.1:80:81", True),
        ("127.0.0.1:80:80", "127.0.0.2:80:81", False),
        ("80:80", "80:80/udp", False),
        ("80:80", "81:80", False),
        ("80-90:80-90", "90-95:1-6", True),
        ("80-90:80-90", "91-95:1-5", False),
    ],
)
def test_two_mappings_that_claim_one_host_port(first: str, second: str, clash: bool) -> None:
    text = f'publish:\n- match: {{container: a}}\n  ports:\n  - "{first}"\n  - "9999:80"\n  - "{second}"\n'
    expected = [f"f:6:5: '{second}' claims a host port that '{first}' on line 4 has; expected each once"]
    assert problems(text) == (expected if clash else [])


def test_mappings_of_different_entries_may_claim_one_host_port() -> None:
    entry = '{match: {container: a}, ports: ["80:80"]}'
    assert problems(f"publish: [{entry}, {entry}]") == []


def test_ports_are_checked_in_an_entry_that_is_wrong_elsewhere() -> None:
    text = 'publish: [{match: 1, prots: 2, ports: ["0", "80:80", "80:80"]}]'
    assert [problem.split(":")[2] for problem in problems(text)] == ["19", "22", "40", "54"]


def test_a_list_of_bad_items_is_not_called_empty() -> None:
    (problem,) = problems("publish: [{match: {container: a}, ports: [~]}]")
    assert problem.startswith("f:1:43: an entry of `publish[].ports` is empty; expected ")


def test_every_place_of_the_schema_says_what_is_expected() -> None:
    named = {known.rpartition(".")[::2] for known in config._EXPECTED if known and known[-1] not in "]}"}
    assert named == {
        (place, field.name)
        for place, schema in [
            ("", config._File),
            ("containerd", Containerd),
            ("firewall", Firewall),
            ("networks[]", config._Network),
            ("publish[]", config._Entry),
            ("publish[].match", config._Match),
            ("publish[].match.pod", config._PodMatch),
        ]
        for field in fields(schema)
    }


# Anything at all.

PIECES = [
    *("containerd: ", "firewall: ", "publish: ", "match: ", "ports: ", "labels: ", "namespace: ", "container: "),
    *("pod: ", "name: "),
    *("address: ", "namespaces: ", "backend: ", "chain: ", "localhost: ", "on_stop: ", "? ", ": ", "<<: ", "- "),
    *("\n", "\n  ", "\n    ", "\t", "{", "}", "[", "]", ", ", "&a ", "*a", "!!str ", "!x ", "~", "'", '"', "|\n", "#"),
    *(
        "80:80",
        "'[::1]:80:80'",
        "auto",
        "x",
        "---\n",
        "...\n",
        "%YAML 1.1\n",
        "\0",
        '"\\ud800"',
        '"\\UFFFFFFFF"',
        "\u2028",
    ),
]

yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["80:80", "1:1", "a*", "auto"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(sorted({part for known in config._EXPECTED for part in re.findall(r"\w+", known)}))
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
)


@given(
    st.text()
    | st.lists(st.sampled_from(PIECES), max_size=30).map("".join)
    | st.binary().map(lambda content: content.decode("utf-8", "surrogateescape"))
    | yaml_values.map(json.dumps)
    | st.builds(lambda inner: json.dumps({"publish": [inner]}), yaml_values)
    | st.builds(
        lambda match, listed: json.dumps({"publish": [{"match": match, "ports": listed}]}), yaml_values, yaml_values
    )
)
@example('{"publish": [{"match": {"labels": {"[key]": null, "": null}}, "ports": [null]}]}')
@example('"<<": 1\n<<: 2')
def test_any_text_is_a_config_or_problems(text: str) -> None:
    for problem in problems(text):
        assert problem.isprintable()
        assert len(problem) < 500
        assert re.match(r"f:[1-9][0-9]*:[1-9][0-9]*: \S", problem)


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


@pytest.mark.parametrize("limit", ["196606", "4_096", "04096", "1e3", "0x10", "all", "'4096 '"])
def test_a_limit_for_reserved_ports_that_is_none_is_refused(limit: str) -> None:
    (problem,) = problems(f"firewall: {{reserve_limit: {limit}}}")
    assert problem.endswith("; expected a number of ports from 0 to 196605, in plain digits")


@pytest.mark.parametrize("seconds", ["1", "10", "60"])
def test_an_interval_is_a_number_of_seconds(seconds: str) -> None:
    assert config.parse(f"firewall: {{poll_interval: {seconds}}}", "f").firewall.poll_interval == int(seconds)


@pytest.mark.parametrize("seconds", ["0", "61", "010", "1.5", "10s", "-1", "1e1", "99999"])
def test_an_interval_that_is_none_is_refused(seconds: str) -> None:
    (problem,) = problems(f"firewall: {{poll_interval: {seconds}}}")
    assert problem.endswith("; expected a number of seconds from 1 to 60, in plain digits")


def test_networks_are_named_by_their_bridges() -> None:
    assert config.parse("networks: [{bridge: docker0}, {bridge: br-7}]", "f").networks == ("docker0", "br-7")
    assert config.parse("networks: []", "f").networks == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("networks: docker0", "f:1:11: `networks` is 'docker0'; expected a list of bridges to run the Docker way, "),
        ("networks: [docker0]", "f:1:12: an entry of `networks` is 'docker0'; expected a mapping with bridge"),
        ("networks: [{}]", "f:1:12: `networks[].bridge` is missing; expected the name of a bridge, such as docker0"),
        ("networks: [{bridge: a/b}]", "f:1:21: `networks[].bridge` is 'a/b'; expected the name of a bridge, "),
        ("networks: [{bridge: a, name: b}]", "f:1:24: an entry of `networks` has no key 'name'; expected bridge"),
        ("networks:\n- bridge: a\n- bridge: a", "f:3:11: the bridge a is named on line 2 already; expected each once"),
    ],
)
def test_a_network_that_is_none_is_refused(text: str, problem: str) -> None:
    (found,) = problems(text)
    assert found.startswith(problem)
