"""What `ctrport ps` shows of what it is given: rows, filters, and whether all is well."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest

from ctrport import ps
from ctrport.ps import Filter, rows, verdict
from ctrport.status import AttachmentStatus, PublicationStatus, Status, Undeclared

WEB = PublicationStatus(
    namespace="default",
    container="web",
    pod="",
    mapping="80/tcp",
    bound="32768:80/tcp",
    addresses=["172.17.0.2", "fd00::2"],
    state="active",
    reason="",
    source="config.yaml:2",
    since="2024-05-01T10:00:00+00:00",
    owner="default/web 32768:80/tcp of any",
    process=4711,
    attachments=[
        AttachmentStatus("172.17.0.2", "docker0", "172.17.0.0/16", "veth1"),
        AttachmentStatus("fd00::2", "docker0", "fd00::/64", "veth1"),
    ],
    sources=["192.0.2.0/24", "2001:db8::/32"],
    interface="eth0",
    installed=True,
    connections=12,
    bytes=720,
)
POD = replace(
    WEB, namespace="k8s.io", container="f00d", pod="shop/web-0", mapping="81:80/tcp", bound="81:80/tcp", sources=[]
)
POD = replace(POD, interface="", owner="k8s.io/f00d 81:80/tcp")
IDLE = PublicationStatus(
    *("", "", "", "9:9/tcp", "", [], "waiting", "no running container matches container=x", "config.yaml:4", "")
)
LEFT = Undeclared("default", "gone", "7:7/tcp", "default/gone 7:7/tcp", 3, 180)
ALL = Status(
    *("1", True, 1, "", "connected, version 1.6.20", "in line"),
    publications=[WEB, POD, IDLE],
    undeclared=[LEFT],
    kernel="in line",
)
FINE = replace(ALL, publications=[WEB, POD], undeclared=[])


def ago(**time: float) -> str:
    return (datetime.now(timezone.utc) - timedelta(**time)).isoformat(timespec="seconds")


def test_rows_have_what_people_ask_for_first() -> None:
    head, web, pod, idle, left = rows(replace(ALL, publications=[replace(WEB, since=ago(minutes=5)), POD, IDLE]), False)
    assert head == ("CONTAINER", "MAPPING", "ADDRESS", "STATE", "SINCE", "CONNECTIONS", "REASON")
    assert web == ("default/web", "32768:80/tcp", "172.17.0.2,fd00::2", "active", "5m ago", "12", "")
    assert pod[0] == "pod:shop/web-0"
    assert idle == ("-", "9:9/tcp", "-", "waiting", "-", "-", "no running container matches container=x")
    assert left[:6] == ("default/gone", "7:7/tcp", "-", "undeclared", "-", "3")
    assert left[6] == "its rules are in the kernel, and nothing declares it"


def test_wide_rows_have_the_rest() -> None:
    head, web, pod, idle, left = rows(ALL, True)
    more = [dict(zip(head, row, strict=True)) for row in (web, pod, idle, left)]
    assert {key: more[0][key] for key in ("SINCE", *ps.WIDE)} == {
        "SINCE": "2024-05-01T10:00:00+00:00",
        "DEVICE": "docker0",
        "FROM": "192.0.2.0/24,2001:db8::/32 by eth0",
        "PID": "4711",
        "SANDBOX": "-",
        "SOURCE": "config.yaml:2",
    }
    assert (more[1]["FROM"], more[1]["SANDBOX"]) == ("anywhere", "k8s.io/f00d")
    assert [more[2][key] for key in ps.WIDE] == ["-", "-", "-", "-", "config.yaml:4"]
    assert [more[3][key] for key in ps.WIDE] == ["-"] * 5


def test_with_the_daemon_down_it_says_who_removes_what_nothing_declares() -> None:
    assert rows(replace(ALL, running=False), False)[-1][-1].endswith("`ctrport clean` removes them")


@pytest.mark.parametrize(
    ("time", "shown"),
    [
        ({"seconds": 5}, "5s ago"),
        ({"seconds": -100}, "0s ago"),  # the clock was set meanwhile
        ({"seconds": 118}, "118s ago"),
        ({"minutes": 2}, "2m ago"),
        ({"hours": 3}, "3h ago"),
        ({"days": 3}, "3d ago"),
    ],
)
def test_how_long_ago_something_was(time: dict[str, float], shown: str) -> None:
    found = ps._age(ago(**time))
    assert found == shown or int(found.rstrip("s ago")) == time["seconds"] + 1  # as the second was over


@pytest.mark.parametrize("since", ["", "yesterday", "2024-05-01T10:00:00"])
def test_what_is_no_time_is_not_shown(since: str) -> None:
    assert ps._age(since) == "-"


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        (Filter(), ["default/web", "pod:shop/web-0", "-", "default/gone"]),
        (Filter(states=("active",)), ["default/web", "pod:shop/web-0"]),
        (Filter(states=("waiting", "undeclared")), ["-", "default/gone"]),
        (Filter(namespaces=("default",)), ["default/web", "default/gone"]),
        (Filter(namespaces=("k8s*", "x")), ["pod:shop/web-0"]),
        (Filter(names=("web",)), ["default/web"]),
        (Filter(names=("default/w*", "gone")), ["default/web", "default/gone"]),
        (Filter(names=("pod:shop/*",)), ["pod:shop/web-0"]),
        (Filter(names=("*",)), ["default/web", "pod:shop/web-0", "-", "default/gone"]),
        (Filter(names=("f00d",)), []),  # a pod goes by its name, not by its sandbox's id
        (Filter(states=("active",), namespaces=("default",), names=("gone",)), []),
    ],
)
def test_filters_of_several_kinds_have_all_to_match(chosen: Filter, names: list[str]) -> None:
    seen = chosen.of(ALL)
    assert [*(its.name for its in seen.publications), *(its.name for its in seen.undeclared)] == names
    assert bool(chosen) == (chosen != Filter())


# Whether all is well


def test_all_is_well_where_what_is_declared_is_active_and_nothing_else_installed() -> None:
    assert verdict(FINE) == (True, "ok: 2 of 2 publications are active")
    assert verdict(replace(FINE, publications=[WEB])) == (True, "ok: 1 of 1 publication is active")
    assert verdict(replace(FINE, publications=[])) == (True, "ok: 0 of 0 publications are active")
    unasked = replace(FINE, kernel="not asked: that takes root")
    assert verdict(unasked) == (True, "ok: 2 of 2 publications are active (the kernel: not asked: that takes root)")


def test_who_waits_in_line_is_as_it_should_be_and_whoever_serves_it_is_not_forgotten() -> None:
    second = replace(WEB, container="web-2", state="waiting", place=1, owner="", bound="", reason="next in line")
    third = replace(second, container="web-3", place=2)
    assert verdict(replace(FINE, publications=[WEB, second, third])) == (
        True,
        "ok: 1 of 3 publications are active, 2 in line",
    )
    assert verdict(replace(FINE, publications=[second]), filtered=True) == (
        True,
        "ok: 0 of 1 publication is active, 1 in line",
    )
    lost = replace(WEB, state="waiting", installed=False, reason="gone")
    assert verdict(replace(FINE, publications=[lost, second, third])) == (
        False,
        "not ok: 1 of 3 publications are not active, the worst: waiting default/web 80/tcp: gone",
    )


@pytest.mark.parametrize(
    ("current", "line"),
    [
        (
            replace(FINE, publications=[WEB, IDLE]),
            f"1 of 2 publications are not active, the worst: waiting - 9:9/tcp: {IDLE.reason}",
        ),
        (replace(FINE, undeclared=[LEFT]), "in the kernel and undeclared: default/gone 7:7/tcp"),
        (replace(FINE, undeclared=[LEFT, LEFT]), "in the kernel and undeclared: default/gone 7:7/tcp and 1 more"),
        (replace(FINE, containerd="lost: it hangs"), "containerd: lost: it hangs"),
        (replace(FINE, firewall="all is lost"), "the kernel is not in line: all is lost"),
        (replace(FINE, config="f:1:1: no"), "an older configuration is in use: f:1:1: no"),
    ],
)
def test_what_is_not_well_is_said(current: Status, line: str) -> None:
    assert verdict(current) == (False, f"not ok: {line}")


def test_the_worst_is_named_what_the_kernel_lacks_before_all_else() -> None:
    waiting, conflict = replace(IDLE, reason="w"), replace(IDLE, state="conflict", reason="c")
    lost = replace(WEB, state="waiting", reason="gone", installed=False)
    assert verdict(replace(FINE, publications=[waiting, conflict]))[1].endswith("the worst: conflict - 9:9/tcp: c")
    assert verdict(replace(FINE, publications=[waiting, conflict, lost]))[1].endswith(
        "3 of 3 publications are not active, the worst: waiting default/web 80/tcp: gone"
    )


def test_a_daemon_that_is_not_there_or_hangs_is_said_first() -> None:
    lost = replace(FINE, running=False, containerd="answers, version 1", publications=[WEB, IDLE])
    right, line = verdict(lost, absent="the daemon is down")
    assert not right
    assert line.startswith("not ok: the daemon is down; 1 of 2 publications")
    assert verdict(replace(lost, publications=[WEB]), absent="the daemon is down") == (
        False,
        "not ok: the daemon is down",
    )
    assert verdict(FINE, silent=ps.HANGS + 1) == (False, "not ok: the daemon hangs, for 61 s")
    assert verdict(FINE, silent=ps.HANGS - 1)[0]
    assert verdict(FINE, trouble="no") == (False, "not ok: the kernel could not be asked: no")


def test_nothing_that_matches_is_not_well() -> None:
    nothing = replace(FINE, publications=[])
    assert verdict(nothing, filtered=True) == (False, "not ok: nothing is declared that matches")
    assert verdict(FINE, filtered=True)[0]
