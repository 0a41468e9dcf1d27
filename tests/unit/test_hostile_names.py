"""Names, labels and comments that strangers chose: none ends the daemon, becomes part of a rule, or forges a line."""

from __future__ import annotations

import json
import logging
import re
import shlex
import socket
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address, ip_network
from itertools import pairwise

import pytest
from google.protobuf.message import Message
from hypothesis import assume, example, given
from hypothesis import strategies as st

from ctrport import logs, status, systemd, taskevents, terminal
from ctrport.api import containers_pb2, payloads_pb2, task_pb2
from ctrport.chronicle import _subject
from ctrport.endpoints import Address6, addresses6, default_devices6, routes
from ctrport.events import Event
from ctrport.firewall import text
from ctrport.firewall.drift import Drift
from ctrport.firewall.entries import commit, from_json, to_json
from ctrport.firewall.plan import Line, Plan, plan_all
from ctrport.listed import Listed, as_listed
from ctrport.listeners import printable
from ctrport.model import (
    DEVICE_NAME,
    Attachment,
    Candidate,
    ContainerKey,
    Declaration,
    Endpoint,
    Family,
    NodeFacts,
    PodSelector,
    Publication,
    Role,
    Selector,
    State,
)
from ctrport.nfnetlink import _printable
from ctrport.owners import LocalnetRecord, Owner
from ctrport.pods import CONTAINER_NAME, POD_NAME, POD_NAMESPACE, POD_UID, Pods, Running
from ctrport.ports import parse
from ctrport.publish import Publications
from ctrport.rules import Layout, rules_for, skeleton
from ctrport.status import PublicationStatus, Status
from ctrport.stored import IN_POD, SANDBOX
from tests.unit import hostile
from tests.unit.hostile import fuzz
from tests.unit.test_containerd import envelope

DEVICE = "docker0"
DECLARATIONS = (
    Declaration(Selector(labels=(("app", "web"),)), (parse("80"), parse("127.0.0.1::81/udp")), "config.yaml:1"),
    Declaration(Selector(pod=PodSelector(labels=(("app", "web"),))), (parse("9000-9001"),), "config.yaml:2"),
)
NAME = "(?=.{1,76}$)[A-Za-z0-9]+([._-][A-Za-z0-9]+)*"
FACTS = NodeFacts(frozenset(Family), frozenset(), free_ports=(parse("30000-40000").container_ports,))

# From what containerd sends to what the kernel is given.


@dataclass(frozen=True)
class Stranger:
    """A container as whoever made it, or a containerd that went mad, would have it."""

    namespace: str
    id: str
    labels: Mapping[str, str]
    netns: int
    role: Role | None = None


labels = st.dictionaries(hostile.carried, hostile.carried, max_size=3)
cri_labels = st.fixed_dictionaries(
    {},
    optional={
        "app": st.sampled_from(["web", "web", "web"]) | hostile.carried,
        POD_UID: st.sampled_from(["1", "2"]) | hostile.carried,
        POD_NAME: hostile.carried,
        POD_NAMESPACE: hostile.carried,
        CONTAINER_NAME: hostile.carried,
    },
)
strangers = st.lists(
    st.builds(
        lambda namespace, id, free, known, netns, role: Stranger(namespace, id, {**free, **known}, netns, role),
        st.sampled_from(["default", "k8s.io"]) | hostile.carried_ids,
        hostile.carried_ids,
        labels,
        cri_labels,
        st.integers(1, 2),
        st.sampled_from([None, *Role]),
    ),
    max_size=4,
    unique_by=lambda stranger: (stranger.namespace, stranger.id),
)


def listed(stranger: Stranger) -> Listed | None:
    """Bring a container the way that events and lists bring it."""
    started: Message = payloads_pb2.TaskStart(container_id=stranger.id, pid=7)
    event = taskevents.task_event(envelope("/tasks/start", started, namespace=stranger.namespace))
    stored = containers_pb2.Container(id=stranger.id, labels=stranger.labels)
    if stranger.role is not None:
        stored.extensions[SANDBOX if stranger.role is Role.SANDBOX else IN_POD].value = b"{}"
    if event is None or not taskevents.checked(stored.id, "container id"):
        return None
    return as_listed(event.key, task_pb2.Process(pid=7, status=task_pb2.RUNNING), stored, True)


@pytest.mark.parametrize("role", [None, *Role])
def test_what_it_is_to_a_pod_says_what_the_cri_plugin_stored_and_no_label(role: Role | None) -> None:
    for kind in ("sandbox", "container", ""):
        found = listed(Stranger("k8s.io", "web", {"io.cri-containerd.kind": kind, POD_NAME: "web-1"}, 1, role))
        assert found is not None
        assert found.role is role


#: What there is to know of a container that was brought: its key, labels, network namespace, and what it is to a pod.
Found = tuple[ContainerKey, Mapping[str, str], int, Role | None]


def published(found: Iterable[Found]) -> list[Publication]:
    """Return what becomes of these, in the order in which they started."""
    pods, keys = Pods(), []
    for at, (key, its, netns, role) in enumerate(found):
        pods.see(Running(key, 100 + at, at, (4, netns), its, role=role))
        keys.append(key)
    publications = Publications(DECLARATIONS, FACTS)
    for at, key in enumerate(keys):
        container = pods.get(key)
        where = ip_address(f"172.17.0.{at + 2}")
        endpoint = Endpoint((Attachment(where, DEVICE, ip_network((where, 16), strict=False)),))
        publications.update(key, None if container is None else Candidate(container, endpoint))
    publications.settle()
    return list(publications)


def plan_of(publications: Iterable[Publication], layout: Layout | None = None, family: Family = Family.IPV4) -> Plan:
    its = layout or Layout()
    rules = [*skeleton(its, family), *(rule for one in publications for rule in rules_for(one, its))]
    wanted = [rule for rule in dict.fromkeys(rules) if rule.family is family]
    return plan_all(wanted, dict.fromkeys([*its.own_chains, *its.kernel_chains]), text.tag)


def operations(written: str) -> list[tuple[str, ...]]:
    """Read a restore's text as a restore does, and return the words of each line but for the comment."""
    assert written.isascii()
    read = []
    for line in written.split("\n")[:-1]:
        assert line.isprintable()
        words = shlex.split(line)
        if words[0] in ("-A", "-I"):
            assert words.count("--comment") == 1
            assert words.count("-j") <= 1
            at = words.index("--comment")
            assert text.TAG.fullmatch(words[at + 1])
            assert words[at - 2 : at] == ["-m", "comment"]
            assert not words[0].startswith("-I") or words[2].isdecimal()
            del words[at : at + 2]
        else:
            assert re.fullmatch(r"\*[a-z]+|COMMIT|-N [A-Z-]+|:[A-Z-]+ - \[0:0\]", line), line
        read.append(tuple(words))
    return read


def tame(found: list[Listed], netns: list[int]) -> list[Found]:
    """Return the same containers under names as they should be: what is equal stays equal."""
    uids: dict[str, str] = {}
    namespaces: dict[str, str] = {}
    result: list[Found] = []
    for at, (one, where) in enumerate(zip(found, netns, strict=True)):
        its = {key: value for key, value in one.labels.items() if (key, value) == ("app", "web")}
        its[POD_UID] = uids.setdefault(one.labels.get(POD_UID, ""), str(len(uids)))
        namespace = namespaces.setdefault(one.key.namespace, f"n{len(namespaces)}")
        result.append((ContainerKey(namespace, f"c{at}"), its, where, one.role))
    return result


@fuzz(400)
@given(strangers)
@example([Stranger("default", "web", {"app": "web", POD_NAME: '"\n-A INPUT -j ACCEPT'}, 1, Role.SANDBOX)])
@example([Stranger("default", 'web" -j ACCEPT', {"app": "web"}, 1)])
@example([Stranger("default", "web\n", {"app": "web"}, 1), Stranger("k8s.io\n", "web", {"app": "web"}, 1)])
def test_the_rules_are_those_that_tame_names_would_have_had(made: list[Stranger]) -> None:
    found = [(one, stranger.netns) for stranger in made if (one := listed(stranger)) is not None]
    for one, _ in found:
        assert re.fullmatch(
            r"[A-Za-z0-9]+([._-][A-Za-z0-9]+)*/[A-Za-z0-9]+([._-][A-Za-z0-9]+)*", str(one.key), re.ASCII
        )
    publications = published((one.key, one.labels, netns, one.role) for one, netns in found)
    plan = plan_of(publications)
    expected = published(tame([one for one, _ in found], [netns for _, netns in found]))
    written = text.restore_input(plan)
    assert Counter(operations(written)) == Counter(operations(text.restore_input(plan_of(expected))))
    # The same rules as data, for the library that writes legacy tables.
    commits = [commit(block, Family.IPV4) for block in plan.blocks]
    line = to_json(commits)
    assert "\n" not in line
    assert from_json(line) == commits
    steps = [step for each in commits for step in each.steps if step.do == "add"]
    assert len(steps) == sum(line.startswith(("-A ", "-I ")) for line in written.splitlines())
    owners = {text.owner(step.tag) for step in steps if "/" in step.tag.split()[1]}
    assert owners == {str(Owner.of(one)) for one in publications if one.state is State.ACTIVE}


# What is said of them.


def pairs_of(line: str) -> dict[str, str]:
    """Read a line of the log by its grammar, as anybody might: blanks part the pairs, but not within quotes."""
    found = re.findall(r'([a-z]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s"=\\]+))(?: |$)', line.partition(" ")[2])
    assert (
        " ".join(f'{key}="{quoted}"' if quoted or not plain else f"{key}={plain}" for key, quoted, plain in found)
        == (line.partition(" ")[2])
    )
    return {key: re.sub(r'\\(["\\])', r"\1", quoted) or plain for key, quoted, plain in found}


@fuzz(150)
@given(strangers, hostile.texts, hostile.texts)
@example([], "\n10:00:00 ERROR   forged", "\x1b[2J")
def test_each_publication_is_one_line_of_ps_and_of_the_log(
    capsys: pytest.CaptureFixture[str], made: list[Stranger], reason: str, warning: str
) -> None:
    found = [one for stranger in made if (one := listed(stranger)) is not None]
    publications = [
        *published((one.key, one.labels, 1, one.role) for one in found),
        Publication(parse("8080:80"), f"{warning}:1", None, State.WAITING, reason),
    ]
    shown = [PublicationStatus.of(one, reason) for one in publications]
    said = Status("1", True, 1, "", warning, reason, reason, publications=shown, warnings=[warning])
    assert Status.from_json(said.to_json()) == said
    json.loads(said.to_json().encode("ascii"))
    terminal.table(said)
    printed = capsys.readouterr()
    out, err = printed.out.split("\n"), printed.err.split("\n")
    assert len(out) == len(publications) + 2
    assert len(err) == 2 + bool(reason)
    assert all(line.isprintable() for line in (*out, *err))
    for each in publications:
        assert all(name.isprintable() for name in _subject(each).values())
        event = Event("published", **_subject(each), source=each.source, reason=each.reason)
        record = logging.LogRecord("x", 20, "", 1, event, None, None)
        styles = (logs.Lines("%(levelname)s %(message)s"), logs.Journal("%(message)s"), logs.Json(priority=True))
        for formatter in styles:
            assert formatter.format(record).isprintable()
        assert pairs_of(str(event)) == {key: terminal.one_line(str(value)) for key, value in event.fields.items()}


@fuzz(600)
@given(hostile.texts | hostile.long_texts)
@example("\ud800")
@example("it's\n")
def test_whatever_is_said_is_one_line(name: str) -> None:
    assert terminal.one_line(name).isprintable()
    assert terminal.one_line(name) == name or not name.isprintable()
    assert re.fullmatch("[ -~]{1,15}", _printable(name[:15]))
    assert re.fullmatch("[A-Za-z0-9 ._:/@+?-]{0,32}", printable(name))
    systemd.notify(f"STATUS={name}")  # nobody listens
    assert Drift(switches=(name,))


def test_a_status_that_is_no_utf_8_reaches_systemd(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("n") / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        systemd.notify("STATUS=\udcff\nREADY=1")
        assert manager.recv(100) == b"STATUS=\\udcff READY=1"


# What others wrote into the kernel.


def as_iptables_prints(comment: str) -> str:
    """Return a string option as xtables_save_string() has it: in quotes where it has anything but plain characters."""
    if re.fullmatch("[A-Za-z0-9_-]+", comment):
        return comment
    return '"' + re.sub(r"""(["\\'])""", r"\\\1", comment) + '"'


comments = (hostile.texts | st.text("ab\n-A DOCKER\"'\\", max_size=40)).map(lambda c: c.replace("\0", "")[:255])
comments = comments.filter(lambda comment: not text.TAG.fullmatch(comment))  # whoever writes that means us
PUBLISHED = Publication(
    *(parse("8080:80"), "config.yaml:1", ContainerKey("default", "web"), State.ACTIVE),
    attachments=(Attachment(IPv4Address("172.17.0.2"), DEVICE, IPv4Network("172.17.0.0/16")),),
    bound=parse("8080:80"),
)
OURS = [rule for rule in rules_for(PUBLISHED, Layout()) if rule.chain == "DOCKER" and rule.table.value == "nat"]


@fuzz(1200)
@given(st.lists(comments, min_size=1, max_size=4))
@example(['a\n-A FORWARD -j DOCKER\n:DOCKER - [0:0] "q'])
@example(["a\x0b-A DOCKER -j ACCEPT", "a\x85b", "a\u2028-A X", "\\"])
@example(["-p tcp -d 12 x --dport 22 -j DNAT"])
@example([f'x" --comment "ctrport default/web 8080:80/tcp {"0" * 12}'])
def test_a_comment_of_somebody_else_is_one_rule_and_none_of_ours(foreign: list[str]) -> None:
    theirs = [f"-A DOCKER -p udp -m comment --comment {as_iptables_prints(each)} -j ACCEPT" for each in foreign]
    ours = [f"-A {rule.chain} {text.arguments(rule)}" for rule in OURS]
    rules = "\n".join([*theirs, *ours, *theirs])
    printed = text.printed(f"-N DOCKER\n{rules}\n")
    assert printed == ["-N DOCKER", *theirs, *ours, *theirs]
    chains = text.saved(f"*nat\n:PREROUTING ACCEPT [0:0]\n:DOCKER - [0:0]\n{rules}\nCOMMIT\n")
    assert list(chains) == ["PREROUTING", "DOCKER"]
    lines = text.listing(printed)
    assert lines == chains["DOCKER"]
    assert [line.tag for line in lines if line.tag] == [text.tag(rule) for rule in OURS]
    assert {line.target for line in lines if line.tag is None} == {"ACCEPT"}
    assert list(text.holders("DOCKER", lines, Family.IPV4)) == []


words = st.sampled_from(
    [
        *(
            "-p tcp",
            "-p udp",
            "-m tcp --dport",
            "-m multiport --dports",
            "-d 10.0.0.1/32",
            "! -d 10.0.0.0/8",
            "-j DNAT",
        ),
        *("0", "0:1024", "1024:65535", "80", "80,0,90:91", "65535", "-j RETURN", "--to-destination 10.0.0.1:80"),
    ]
)
commented = comments.map(as_iptables_prints).map("--comment {}".format)


@fuzz(800)
@given(st.lists(words | commented, max_size=8), st.sampled_from(Family))
@example(["-p tcp", "-m tcp --dport", "0:1024", "-j DNAT"], Family.IPV4)
@example(["-p tcp", "-m tcp --dport", "0", "-j DNAT"], Family.IPV4)
@example(["-p tcp", '--comment "-d 12 x"', "-m tcp --dport", "80", "-j DNAT"], Family.IPV6)
def test_who_holds_a_port_is_read_out_of_any_rule(parts: list[str], family: Family) -> None:
    line = Line(f"-A CNI-HOSTPORT-DNAT {' '.join(parts)}", None)
    for holder in text.holders("CNI-HOSTPORT-DNAT", [line], family):
        assert holder.name.isprintable()
        assert holder.mapping.host_ports is not None
        assert any(part[0].isdecimal() for part in parts)


like_ours = st.builds(
    str.format,
    st.sampled_from(["ctrport {} 0123456789ab", "device {} route_localnet=set", "{}/web 80:80/tcp"]),
    hostile.texts,
).filter(bool)


@fuzz(1500)
@given(hostile.texts | like_ours)
@example("device ../../kernel route_localnet=set")
@example("device a/b route_localnet=found")
def test_a_comment_like_ours_is_an_owner_or_nothing(comment: str) -> None:
    for words in (comment, text.owner(comment)):
        owner, record = Owner.parse(words), LocalnetRecord.parse(words)
        assert owner is None or str(owner) == words
        assert record is None or (record.owner == words and DEVICE_NAME.fullmatch(record.device))


# Devices


@fuzz(800)
@given(st.lists(hostile.device_names, min_size=1, max_size=4))
@example(["a\x1cb", "c\u2028d", "\u3000", "\x85", "e\x1b[31m"])
def test_devices_of_a_container_are_read_whatever_they_are_called(names: list[str]) -> None:
    """As Linux prints them: net/ipv4/fib_trie.c, net/ipv6/addrconf.c and net/ipv6/route.c."""
    head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT".ljust(127)
    route = [f"{name}\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0".ljust(127) for name in names]
    read = routes("".join(f"{line}\n" for line in (head, *route)))
    assert [(one.device, one.network, one.on_link) for one in read] == [
        (name, IPv4Network("172.17.0.0/16"), True) for name in names
    ]
    zero = "0" * 32
    if_inet6 = "".join(f"fd00{'0' * 27}2 02 40 00 80 {name:>8}\n" for name in names)
    assert addresses6(if_inet6) == [Address6(IPv6Address("fd00::2"), name) for name in names]
    ipv6_route = "".join(
        f"{zero} 00 {zero} 00 {zero} 00000400 00000001 00000000 00000003 {name:>8}\n" for name in names
    )
    assert default_devices6(ipv6_route) == list(dict.fromkeys(names))


@fuzz(600)
@given(hostile.device_names | hostile.texts)
@example("a\n")
@example('e" -j')
def test_a_device_is_part_of_a_rule_or_refused(name: str) -> None:
    assume(name != "lo")  # which the guard of 127.0.0.0/8 names, and no container is behind
    where = IPv4Address("172.17.0.2")
    try:
        attachment = Attachment(where, name, IPv4Network("172.17.0.0/16"))
    except ValueError:
        assert re.fullmatch("[A-Za-z0-9_.:@-]{1,15}", name, re.ASCII) is None
        return
    written = text.restore_input(plan_of([replace(PUBLISHED, attachments=(attachment,))]))
    plain = text.restore_input(plan_of([PUBLISHED]))
    there = ("-i", name), ("-o", name)
    swapped = [
        (*line[:1], *(DEVICE if pair in there else pair[1] for pair in pairwise(line))) for line in operations(written)
    ]
    assert Counter(swapped) == Counter(operations(plain))


def test_status_of_a_stranger_is_kept_as_it_is(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("run")
    said = Status("1", True, 1, "", "x", "\udcff\n\x1b[2J", warnings=list(hostile.PIECES))
    status.write(directory, said)
    assert status.read(directory) == said
