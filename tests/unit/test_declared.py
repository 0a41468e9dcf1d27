"""What containers declare by themselves, and what of it they are let have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_network

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ctrport.declared import BY_NERDCTL, LONGEST, MOST, NERDCTL_PORTS, NO_RULE, Kind, Permission, declares, wishes
from ctrport.model import Candidate, Container, Mapping, Member, Pod, PortRange, Protocol, Publication, State, Unread
from ctrport.ports import parse
from ctrport.publish import Publications
from ctrport.stored import LONGEST_SPEC, annotation_of
from tests.unit.worlds import FACTS, NO_ADDRESS, declaration, endpoint, key

LABEL, ANNOTATION = frozenset({Kind.LABEL}), frozenset({Kind.ANNOTATION})
RULE = Permission("f:1", LABEL, (PortRange(8000, 8999),))


def container(
    name: str = "web",
    label: str | None = None,
    *,
    started: int = 1,
    annotation: str | None = None,
    labels: dict[str, str] | None = None,
) -> Container:
    its = {**(labels or {}), **({} if label is None else {"ctrport/ports": label})}
    return Container(key(name), 100, started, (Member(name, None, its),), annotation=annotation)


def pod(annotation: str, namespace: str = "shop", label: str | None = None) -> Container:
    its = container(label=label, annotation=annotation)
    return replace(its, pod=Pod(namespace, "web-0"))


def judged(one: Container, *permissions: Permission) -> list[tuple[str, str]]:
    return [(str(wish.asked), wish.refusal) for wish in wishes(one, permissions)]


def refusal(one: Container, *permissions: Permission) -> str:
    (wish,) = wishes(one, permissions)
    return wish.refusal


def test_what_a_rule_allows_is_granted_and_says_where_it_is_from() -> None:
    both = replace(RULE, kinds=frozenset(Kind))
    its = wishes(container(label="8080:80, 8081:53/udp"), [both]) + wishes(container(annotation="8082:80"), [both])
    assert [(str(wish.asked), wish.source, wish.refusal) for wish in its] == [
        ("8080:80/tcp", "label ctrport/ports", ""),
        ("8081:53/udp", "label ctrport/ports", ""),
        ("8082:80/tcp", "annotation ctrport/ports", ""),
    ]


@pytest.mark.parametrize("label", ["8080:80", "none", ""])
def test_a_label_stands_before_the_annotation_that_ctr_made_of_an_earlier_one(label: str) -> None:
    both = replace(RULE, kinds=frozenset(Kind))
    its = wishes(container(label=label, annotation="8081:80"), [both])
    assert [str(wish.asked) for wish in its] == (["8080:80/tcp"] if label == "8080:80" else [])


@pytest.mark.parametrize("value", [None, "", "  ", "none"])
def test_an_empty_value_asks_for_nothing(value: str | None) -> None:
    assert not declares(container(label=value, annotation=value))
    assert wishes(container(label=value, annotation=value), [RULE]) == []


AT = "the rule of containers_may_publish at f:1 allows"


@pytest.mark.parametrize(
    ("mapping", "rule", "reason"),
    [
        ("7999:80", RULE, f"{AT} the host ports 8000-8999, not 7999"),
        ("9000:80", RULE, f"{AT} the host ports 8000-8999, not 9000"),
        ("8998-9000:80-82", RULE, f"{AT} the host ports 8000-8999, not 8998-9000"),
        ("8990-9000:80", RULE, f"{AT} the host ports 8000-8999, not 8990-9000"),
        ("80", RULE, f"{AT} the host ports 8000-8999, not any that is free"),
        ("80", replace(RULE, any_free=True), ""),
        ("8000-8999:80", RULE, ""),
        ("8080:80/udp", replace(RULE, protocols=frozenset({Protocol.TCP})), f"{AT} tcp, not udp"),
        ("8080:80", replace(RULE, host_ips=(ip_network("192.0.2.0/24"),)), "not every address"),
        ("192.0.3.1:8080:80", replace(RULE, host_ips=(ip_network("192.0.2.0/24"),)), "not 192.0.3.1"),
        ("0.0.0.0:8080:80", replace(RULE, host_ips=(ip_network("192.0.2.0/24"),)), "not 0.0.0.0"),
        ("[::1]:8080:80", replace(RULE, host_ips=(ip_network("192.0.2.0/24"),)), "not ::1"),
        ("192.0.2.9:8080:80", replace(RULE, host_ips=(ip_network("192.0.2.0/24"),)), ""),
        ("8000-8010:80-90", RULE, f"{AT} 10 in all, not 11"),
        ("8000-8009:80-89", RULE, ""),
        ("8080:80", replace(RULE, kinds=ANNOTATION), NO_RULE),
        ("8080:80", replace(RULE, namespace="k8s.io"), NO_RULE),
        ("8080:80", replace(RULE, namespace="def*"), ""),
        ("8080:80", replace(RULE, pod_namespace="*"), NO_RULE),
    ],
)
def test_a_rule_allows_what_it_says_and_no_more(mapping: str, rule: Permission, reason: str) -> None:
    said = refusal(container(label=mapping), rule)
    assert bool(said) == bool(reason)
    assert said.endswith(reason)


def test_without_a_rule_nothing_is_granted() -> None:
    assert refusal(container(label="8080:80")) == NO_RULE


def test_another_rule_may_allow_what_one_does_not_and_each_counts_its_own() -> None:
    low, high = replace(RULE, at_most=1), Permission("f:2", LABEL, (PortRange(9000, 9000),))
    assert judged(container(label="8000:80,9000:80,8001:80"), low, high) == [
        ("8000:80/tcp", ""),
        ("9000:80/tcp", ""),
        ("8001:80/tcp", f"{AT} 1 in all, not 2"),
    ]


def test_what_is_asked_for_twice_counts_once() -> None:
    rule = replace(RULE, at_most=1)
    assert judged(container(label="8080:80,8080:80/tcp"), rule) == [("8080:80/tcp", "")]


def test_of_a_pod_the_annotation_counts_and_no_label_of_its_containers() -> None:
    rule = replace(RULE, kinds=frozenset(Kind), pod_namespace="sh?p")
    its = pod("8080:80", label="8081:80")
    assert judged(its, rule) == [("8080:80/tcp", "")]
    assert refusal(pod("8080:80", "other"), rule) == NO_RULE


def test_a_bad_value_costs_nobody_else_a_port() -> None:
    its = judged(container(label="8080:80,x\x1b[2J,,8081:81"), RULE)
    assert its == [
        ("8080:80/tcp", ""),
        (
            "'x\\x1b[2J'",
            "'x\\x1b[2J' has the container port 'x\\x1b[2J'; expected a number from 1 to 65535 in plain digits, "
            "no leading zeros",
        ),
        (
            "''",
            "the port mapping is empty; expected [hostIP:][hostPort[-end]:]containerPort[-end][/protocol], "
            "such as 8080:80",
        ),
        ("8081:81/tcp", ""),
    ]


@pytest.mark.parametrize("value", ["8080:80," * MOST + "1", "1" * (LONGEST + 1)])
def test_of_a_value_that_is_too_long_nothing_is_read(value: str) -> None:
    (wish,) = wishes(container(label=value), [RULE])
    assert isinstance(wish.asked, Unread)
    assert wish.refusal.endswith((f"at most {MOST}", f"at most {LONGEST}"))


@settings(deadline=None)
@given(st.text(max_size=300) | st.lists(st.text("0123456789:-./[]tcpud", max_size=20)).map(",".join))
def test_any_value_is_answered_in_short_printable_sentences(value: str) -> None:
    for wish in wishes(container(label=value), [RULE]):
        assert str(wish.asked).isprintable()
        assert wish.refusal.isprintable()
        assert len(wish.refusal) < 400
        assert len(str(wish.asked)) < 100
        if not wish.refusal:
            assert isinstance(wish.asked, Mapping)
            assert wish.asked.host_ports is not None
            assert all(8000 <= port <= 8999 for port in wish.asked.host_ports)


@pytest.mark.parametrize(("ports", "left_alone"), [('[{"HostPort":80}]', True), ("[]", False), ("null", False)])
def test_what_nerdctl_publishes_by_itself_is_left_alone(ports: str, left_alone: bool) -> None:
    its = container(label="8080:80", labels={NERDCTL_PORTS: ports})
    assert refusal(its, RULE) == (BY_NERDCTL if left_alone else "")
    assert not declares(container(labels={NERDCTL_PORTS: ports}))


# Among the publications


def settled(declared: Sequence[Container], *declarations: str, rule: Permission = RULE) -> list[Publication]:
    entries = [declaration("db", mapping, line=line) for line, mapping in enumerate(declarations)]
    publications = Publications(entries, FACTS, permissions=[rule])
    for one in declared:
        publications.update(one.key, Candidate(one, endpoint("172.17.0.2")))
    publications.settle()
    return list(publications)


def test_a_container_gets_what_it_declares_and_a_refusal_for_the_rest() -> None:
    active, unread, refused = sorted(
        settled([container(label="8080:80,80:80,x")]), key=lambda p: str(p.state) + p.reason
    )
    assert (active.state, str(active.bound), active.source) == (State.ACTIVE, "8080:80/tcp", "label ctrport/ports")
    assert (unread.state, unread.asked, unread.attachments) == (State.REFUSED, Unread("'x'"), ())
    assert (refused.state, refused.asked) == (State.REFUSED, parse("80:80"))


def test_the_operators_word_comes_first_then_who_started_first() -> None:
    web, api = container("web", "8080:80", started=1), container("api", "8080:80", started=2)
    its = {str(p.container): p for p in settled([api, web])}
    assert (its["default/web"].state, its["default/api"].state) == (State.ACTIVE, State.CONFLICT)
    its = {str(p.container): p for p in settled([api, web, container("db", started=9)], "8080:80")}
    assert its["default/db"].state is State.ACTIVE
    for name in ("web", "api"):
        assert its[f"default/{name}"].reason == "host port 8080/tcp is held by default/db (8080:80/tcp)"


def test_what_the_operator_declares_too_is_the_operators() -> None:
    for label in ("8080:80", "80:80"):
        (publication,) = settled([container("db", label)], label)
        assert (publication.state, publication.source) == (State.ACTIVE, "config.yaml:0")


def test_a_label_that_changes_moves_its_mappings_and_the_rest_stays() -> None:
    publications = Publications([], FACTS, permissions=[RULE])
    publications.update(key("web"), Candidate(container(label="8080:80,8081:81"), endpoint("172.17.0.2")))
    publications.settle()
    publications.update(key("web"), Candidate(container(label="8081:81,8082:82,y"), endpoint("172.17.0.2")))
    changes = publications.settle()
    assert {(str(c.before.asked) if c.before else "", str(c.after.asked) if c.after else "") for c in changes} == {
        ("8080:80/tcp", ""),
        ("", "8082:82/tcp"),
        ("", "'y'"),
    }
    publications.update(key("web"), Candidate(container(), endpoint("172.17.0.2")))
    publications.settle()
    assert len(publications) == 0


def test_what_is_allowed_waits_like_any_other_mapping() -> None:
    publications = Publications([], FACTS, permissions=[RULE])
    publications.update(key("web"), Candidate(container(label="8080:80"), NO_ADDRESS))
    publications.settle()
    assert [publication.state for publication in publications] == [State.WAITING]


LABELS = st.lists(st.sampled_from(["8000:80", "8000-8001:80", "8001:80/udp", "80", "8001:81", "7:7", "x"]), max_size=4)


@example({"db": (["8001:81"], 1)}, ["8000-8001:90", "8000:80"])
@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(["api", "db", "web"]), st.tuples(LABELS, st.integers(1, 3))),
    st.lists(st.sampled_from(["8000:80", "8001:81", "8000-8001:90"]), max_size=2, unique=True),
)
def test_labels_never_keep_the_operator_out_and_the_order_of_telling_counts_for_nothing(
    labels: dict[str, tuple[list[str], int]], declarations: list[str]
) -> None:
    its = [container(name, ",".join(label), started=started) for name, (label, started) in labels.items()]
    found = settled(its, *declarations)
    assert found == settled(its[::-1], *declarations)
    alone = [p for p in settled([container(c.key.id, started=c.started) for c in its], *declarations) if p.container]
    mine = {(p.container, p.asked): p.state for p in found if p.source.startswith("config.yaml:")}
    for publication in alone:
        assert mine[publication.container, publication.asked] is publication.state


# What containerd stores of annotations


SPEC = json.dumps({"ociVersion": "1.0.2", "annotations": {"ctrport/ports": "8080:80", "a": "b"}}).encode()
METADATA = json.dumps({"Version": "v1", "Metadata": {"Config": {"annotations": {"ctrport/ports": "8081:80"}}}}).encode()


def test_an_annotation_is_read_from_the_spec_and_a_pods_from_its_sandbox() -> None:
    assert annotation_of(SPEC, None) == "8080:80"
    assert annotation_of(b"{}", METADATA) == "8081:80"
    assert annotation_of(SPEC, b"{}") is None
    assert annotation_of(b"{}", None) is None


NAMED = '"ctrport/ports"'


@pytest.mark.parametrize(
    "spec",
    [
        NAMED,
        f"{{{NAMED}: 1}}",
        f'{{"annotations": {{{NAMED}: 1}}}}',
        f'{{"annotations": {{{NAMED}: null}}}}',
        f'{{"annotations": [{NAMED}]}}',
        f'{{"annotations": {NAMED}}}',
        f"[{NAMED}",
        f"{'[' * 100_000}{NAMED}",
        SPEC.decode() + " " * LONGEST_SPEC,
    ],
)
def test_a_spec_that_is_none_says_nothing(spec: str) -> None:
    assert annotation_of(spec.encode(), None) is None
