"""What is wrong with a configuration, said all at once, each where it stands."""

from __future__ import annotations

import fnmatch
import json
import re
from dataclasses import fields
from ipaddress import ip_address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ctrport import config, schema
from ctrport.config import ConfigError, Problem
from ctrport.listen import Listen
from ctrport.schema import Containerd, Firewall


def problems(text: str) -> list[str]:
    """Return the lines of the error that `text` is refused with, none where it is taken."""
    try:
        config.parse(text, "f")
    except ConfigError as error:
        return str(error).split("\n")
    return []


# Everything that can be wrong.

MANY = """\
containerd:
  adress: /run/x.sock
  address: run/containerd.sock
  namespaces: [default, "k8s_", ~, [x], default/x]
firewall:
  backend: nft
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
f:6:12: `firewall.backend` is 'nft'; expected auto, iptables-nft, iptables-legacy or nftables
f:7:10: `firewall.chain` is 'INPUT', a word that iptables has a meaning for; expected {chain}
f:8:13: `firewall.position` is 'top'; expected auto, first or last
f:9:14: `firewall.localhost` is 'yes'; expected true or false
f:10:3: the key 'chain' stands on line 7 already; expected each once
f:11:15: `firewall.masquerade` is 'some'; expected hairpin or all
f:12:18: `firewall.reserve_limit` is '-1'; expected a number of ports from 0 to 196605, in plain digits
f:13:18: `firewall.poll_interval` is '0.5'; expected a number of seconds from 1 to 60, in plain digits
f:14:3: `firewall.on_stop` is empty; expected keep or remove
f:15:1: the file has no key 'publlish'; expected {keys} (did you mean publish?)
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
    keys="containerd, firewall, metrics, networks, publish or containers_may_publish",
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
FILE = (
    "a mapping with the keys containerd, firewall, metrics, networks, publish and containers_may_publish, "
    "each of which may be left out"
)
NO_KEY_A = (
    "f:1:1: the file has no key 'a'; expected containerd, firewall, metrics, networks, publish or "
    "containers_may_publish"
)
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
        NO_KEY_A.replace("f:1:1", "f:1:2"),
        "f:1:10: the key 'a' stands on line 1 already; expected each once",
    ],
    '"\\e[2J\\n": 1': [
        "f:1:1: the file has no key '\\x1b[2J\\n'; expected containerd, firewall, metrics, networks, publish or "
        "containers_may_publish"
    ],
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


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("127.0.0.1:9477", Listen(ip_address("127.0.0.1"), 9477)),
        ("0.0.0.0:1", Listen(ip_address("0.0.0.0"), 1)),
        ("[::1]:65535", Listen(ip_address("::1"), 65535)),
        ("[0:0::1]:80", Listen(ip_address("::1"), 80)),
        ("none", None),
    ],
)
def test_where_metrics_are_served(text: str, listen: Listen | None) -> None:
    assert config.parse(f'metrics: {{listen: "{text}"}}', "f").metrics.listen == listen
    if listen is not None:
        assert config.parse(f'metrics: {{listen: "{listen}"}}', "f").metrics.listen == listen
    assert config.parse("metrics: {}", "f").metrics.listen is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", ""),
        ("off", ""),
        ("127.0.0.1", ""),
        ("9477", ""),
        (":9477", ", which has no address: names are not looked up"),
        ("localhost:9477", ", which has no address: names are not looked up"),
        ("*:9477", ", which has no address: names are not looked up"),
        ("127.0.0.01:9477", ", which has no address: names are not looked up"),
        ("[]:9477", ", which has no address: names are not looked up"),
        ("[::1:9477", ", which has no address: names are not looked up"),
        ("127.0.0.1:0", ", which ends in no port from 1 to 65535"),
        ("127.0.0.1:65536", ", which ends in no port from 1 to 65535"),
        ("127.0.0.1:", ", which ends in no port from 1 to 65535"),
        ("[::1]", ", which ends in no port from 1 to 65535"),
        ("http://127.0.0.1:9477/metrics", ", which ends in no port from 1 to 65535"),
        ("[fe80::1%eth0]:9477", ", with a zone, which is not taken here"),
        ("::1:9477", ", and IPv6 addresses alone stand in brackets"),
        ("[127.0.0.1]:9477", ", and IPv6 addresses alone stand in brackets"),
    ],
)
def test_where_metrics_cannot_be_served(text: str, why: str) -> None:
    assert problems(f'metrics: {{listen: "{text}"}}') == [
        f"f:1:19: `metrics.listen` is '{text}'{why}; "
        "expected none, or an address and a port, such as 127.0.0.1:9477 or [::1]:9477"
    ]


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
    named = {known.rpartition(".")[::2] for known in schema.EXPECTED if known and known[-1] not in "]}"}
    assert named == {
        (place, field.name)
        for place, its in [
            ("", schema.File),
            ("containerd", Containerd),
            ("firewall", Firewall),
            ("metrics", schema.Metrics),
            ("networks[]", schema.Network),
            ("publish[]", schema.Entry),
            ("containers_may_publish[]", schema.MayPublish),
            ("publish[].match", schema.Match),
            ("publish[].match.pod", schema.PodMatch),
        ]
        for field in fields(its)
    }


# What containers may publish.

GOOD = "{kinds: [label], host_ports: [free]"


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("{kinds: [label]}", "`containers_may_publish[].host_ports` is missing; expected a list of ports"),
        ("{host_ports: [free]}", "`containers_may_publish[].kinds` is missing; expected a list of label"),
        ("{kinds: [], host_ports: [free]}", "`containers_may_publish[].kinds` is an empty list; expected"),
        ("{kinds: [pod], host_ports: [free]}", "an entry of `containers_may_publish[].kinds` is 'pod'; expected label"),
        ("{kinds: [label], host_ports: [0]}", "`containers_may_publish[].host_ports` is '0'; expected a port or"),
        ("{kinds: [label], host_ports: [9-8]}", "`containers_may_publish[].host_ports` is '9-8'; expected a port"),
        ("{kinds: [label], host_ports: [65536]}", "`containers_may_publish[].host_ports` is '65536'; expected"),
        (f"{GOOD}, host_ips: [10.0.0.1/8]}}", "is '10.0.0.1/8', which is a host in 10.0.0.0/8; expected an address"),
        (f"{GOOD}, protocols: [icmp]}}", "is 'icmp'; expected tcp, udp or sctp"),
        (f"{GOOD}, at_most: -1}}", "`containers_may_publish[].at_most` is '-1'; expected a number of ports"),
        (f"{GOOD}, namespace: a/b}}", "`containers_may_publish[].namespace` is 'a/b'; expected the name of a"),
        (f"{GOOD}, pods: x}}", "has no key 'pods'; expected kinds, host_ports, namespace, pod_namespace, host_ips, "),
    ],
)
def test_a_rule_of_what_containers_may_publish_is_checked(rule: str, expected: str) -> None:
    (problem,) = problems(f"containers_may_publish: [{rule}]")
    assert expected in problem


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
            st.sampled_from(sorted({part for known in schema.EXPECTED for part in re.findall(r"\w+", known)}))
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


@pytest.mark.parametrize("limit", ["196606", "4_096", "04096", "1e3", "0x10", "all", "'4096 '"])
def test_a_limit_for_reserved_ports_that_is_none_is_refused(limit: str) -> None:
    (problem,) = problems(f"firewall: {{reserve_limit: {limit}}}")
    assert problem.endswith("; expected a number of ports from 0 to 196605, in plain digits")


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


@pytest.mark.parametrize("seconds", ["0", "61", "010", "1.5", "10s", "-1", "1e1", "99999"])
def test_an_interval_that_is_none_is_refused(seconds: str) -> None:
    (problem,) = problems(f"firewall: {{poll_interval: {seconds}}}")
    assert problem.endswith("; expected a number of seconds from 1 to 60, in plain digits")
