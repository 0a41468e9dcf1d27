"""What the operator gave a container while it runs, among the other declarations."""

from __future__ import annotations

from dataclasses import replace

from ctrport.declared import Kind, Permission
from ctrport.model import Candidate, Container, Live, Member, PortRange, Publication, Role, State, Unread
from ctrport.pods import POD_UID, Pods, Running
from ctrport.ports import parse
from ctrport.publish import LIVE_SOURCE, Publications
from tests.unit.worlds import FACTS, declaration, endpoint, key

RULE = Permission("f:1", frozenset(Kind), (PortRange(8000, 8999),))


def live(*mappings: str, revision: str = "1") -> Live:
    return Live(tuple(map(parse, mappings)), revision)


def container(name: str, its: Live | None, *, started: int = 1, label: str | None = None) -> Container:
    labels = {} if label is None else {"ctrport/ports": label}
    return Container(key(name), 100, started, (Member(name, None, labels),), live=its)


def settled(*running: Container, declared: tuple[str, ...] = ()) -> list[Publication]:
    entries = [declaration("db", mapping, line=line) for line, mapping in enumerate(declared)]
    publications = Publications(entries, FACTS, permissions=[RULE])
    for one in running:
        publications.update(one.key, Candidate(one, endpoint("172.17.0.2")))
    publications.settle()
    return [publication for publication in publications if publication.container is not None]


def test_it_takes_no_rule_and_says_where_it_is_from() -> None:
    [publication] = settled(container("web", live("80:80")))
    assert (publication.state, publication.source) == (State.ACTIVE, LIVE_SOURCE)
    publications = Publications([], FACTS)
    assert publications.wants(container("web", live("80:80")))
    assert not publications.wants(container("web", live()))
    assert publications.wants(container("web", Live((), unread=((Unread("'x'"), "x"),))))


def test_it_comes_before_what_containers_declare_and_beside_the_file_who_started_first_has_the_port() -> None:
    label, word = container("label", None, started=1, label="8080:80"), container("word", live("8080:81"), started=2)
    states = {str(p.container): p.state for p in settled(label, word)}
    assert states == {"default/label": State.CONFLICT, "default/word": State.ACTIVE}
    for started, state in ((1, State.CONFLICT), (3, State.ACTIVE)):
        its = settled(word, container("db", None, started=started), declared=("8080:80",))
        assert {str(p.container): p.state for p in its}["default/word"] is state


def test_of_one_container_the_file_comes_first_then_the_operators_word_then_its_own() -> None:
    its = container("db", live("8080:80", "8080:81", "8081:80"), label="8081:80,8081:81,8082:82")
    found = {(str(p.asked), p.source): p.state for p in settled(its, declared=("8080:80",))}
    assert found == {
        ("8080:80/tcp", "config.yaml:0"): State.ACTIVE,
        ("8080:81/tcp", LIVE_SOURCE): State.CONFLICT,
        ("8081:80/tcp", LIVE_SOURCE): State.ACTIVE,
        ("8081:81/tcp", "label ctrport/ports"): State.CONFLICT,
        ("8082:82/tcp", "label ctrport/ports"): State.ACTIVE,
    }


def test_two_with_the_same_mapping_of_their_own_stand_in_no_line() -> None:
    first, second = settled(container("api", live("8080:80")), container("web", live("8080:80"), started=2))
    assert (first.state, second.state, second.place) == (State.ACTIVE, State.CONFLICT, 0)
    assert second.reason == "host port 8080/tcp is held by default/api (8080:80/tcp)"


def test_what_cannot_be_read_is_refused_and_costs_nobody_else_a_port() -> None:
    broken = replace(live("8080:80"), unread=((Unread("'x'"), "it is none"),))
    publications = settled(container("web", broken), container("db", live("8081:80")))
    assert {(str(p.asked), p.state, p.reason) for p in publications} == {
        ("8080:80/tcp", State.ACTIVE, ""),
        ("8081:80/tcp", State.ACTIVE, ""),
        ("'x'", State.REFUSED, "it is none"),
    }


def test_it_changes_while_the_container_runs_and_what_stays_is_not_touched() -> None:
    publications = Publications([], FACTS)
    for its in (live("8080:80", "8081:81"), live("8081:81", "80", revision="2")):
        publications.update(key("web"), Candidate(container("web", its), endpoint("172.17.0.2")))
        changes = publications.settle()
    assert {(str(c.before.asked) if c.before else "", str(c.after.asked) if c.after else "") for c in changes} == {
        ("8080:80/tcp", ""),
        ("", "80/tcp"),
    }
    [chosen] = [p.bound for p in publications if str(p.asked) == "80/tcp"]
    publications.update(key("web"), Candidate(container("web", live("80", revision="3")), endpoint("172.17.0.2")))
    publications.settle()
    assert [p.bound for p in publications] == [chosen]


def running(name: str, role: Role | None = None, its: Live | None = None, started: int = 1) -> Running:
    labels = {POD_UID: "u"} if role is not None else {}
    return Running(key(name), 100, started, (4, 7), labels, live=its, role=role)


def test_of_a_pod_the_word_that_is_kept_with_the_sandbox_counts() -> None:
    pods = Pods()
    pods.see(running("sandbox", Role.SANDBOX, live("8080:80")))
    pods.see(running("main", Role.MEMBER, live("9090:90")))
    pods.see(running("web", its=live("7070:70")))
    for name, mapping in (("sandbox", "8080:80"), ("web", "7070:70")):
        published = pods.get(key(name))
        assert published is not None
        assert published.live == live(mapping)


def test_the_revision_that_a_container_was_seen_with_is_known_while_it_runs() -> None:
    pods = Pods()
    pods.see(running("web", its=live("8080:80")))
    pods.see(running("db"))
    assert pods.revisions == {key("web"): "1"}
    pods.see(running("web", its=live(revision="2")))
    assert pods.revisions == {key("web"): "2"}
    pods.see(running("web"))
    assert pods.revisions == {}
    pods.see(running("web", its=live(revision="3")))
    pods.forget(key("web"))
    assert pods.revisions == {}
