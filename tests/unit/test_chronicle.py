"""What is told of events: once, and not before it is so."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import replace

import pytest

from ctrport.chronicle import TELL_SAME, Chronicle
from ctrport.firewall.drift import Drift
from ctrport.model import Publication, State
from ctrport.publish import Change
from ctrport.rules import Layout, rules_for
from ctrport.status import PublicationStatus
from ctrport.suspicion import Grounds
from ctrport.tally import Tally
from tests.unit.worlds import active

WEB, DB = active("8080:80"), active("9000:90", "172.17.0.3", name="db")


def told(chronicle: Chronicle, caplog: pytest.LogCaptureFixture, *changes: Change, in_line: bool = True) -> list[str]:
    caplog.set_level(logging.INFO)
    caplog.clear()
    chronicle.take(changes, None)
    chronicle.tell(lambda _: "", in_line=in_line)
    return [message.split(" ")[0] + message.partition("mapping=")[2][:5] for message in caplog.messages]


def test_what_changes_is_told_and_since_when(caplog: pytest.LogCaptureFixture) -> None:
    chronicle = Chronicle()
    assert told(chronicle, caplog, Change(None, WEB), Change(None, DB)) == ["published8080:", "published9000:"]
    assert chronicle.shown(WEB, "", "").since
    assert told(chronicle, caplog, Change(WEB, None)) == ["withdrawn8080:"]
    assert not chronicle.shown(WEB, "", "").since
    assert chronicle.shown(DB, "a remark", "").reason == "a remark"


def test_each_change_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    chronicle = Chronicle()
    held = "host port 8080/tcp is held by default/db"
    lost = replace(WEB, state=State.CONFLICT, reason=held, bound=None, attachments=())
    of_pod = replace(active("8080:80", "172.17.0.2", "fd00::2"), pod="shop/web")
    lines = []
    for change in (Change(None, lost), Change(lost, WEB), Change(WEB, None), Change(None, of_pod)):
        told(chronicle, caplog, change)
        lines += caplog.messages
    assert lines == [
        f'conflict container=default/web mapping=8080:80/tcp source=config.yaml:1 reason="{held}"',
        f'taken-over container=default/web mapping=8080:80/tcp address=172.17.0.2 was="{held}"',
        "withdrawn container=default/web mapping=8080:80/tcp",
        "published pod=shop/web sandbox=default/web mapping=8080:80/tcp address=172.17.0.2,fd00::2",
    ]


def test_what_is_to_be_said_of_what_is_published_is_said_with_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    chronicle = Chronicle()
    chronicle.take([Change(None, WEB)], since=time.monotonic())
    chronicle.tell(lambda _: "not reserved: no socket", in_line=True)
    [line] = caplog.messages
    assert re.search(r' address=172.17.0.2 remark="not reserved: no socket" after=\d+\.\dms$', line)


def test_drift_is_told_with_who_and_how_long(caplog: pytest.LogCaptureFixture) -> None:
    chronicle = Chronicle()
    chronicle.repaired(Drift(surplus=1), Grounds(time.monotonic(), ("nft (pid 7)", "x (pid 8)")), 0.0)
    assert re.fullmatch(
        r'drift what="too many: 1 rule" by="nft \(pid 7\) or x \(pid 8\)" after=\d+ms', caplog.messages[0]
    )
    chronicle.repaired(Drift(surplus=2), Grounds(), time.monotonic() - 7)
    assert re.fullmatch(r'drift what="too many: 2 rules" within=7s', caplog.messages[1])


def test_nothing_is_said_to_be_published_before_the_kernel_has_it(caplog: pytest.LogCaptureFixture) -> None:
    chronicle = Chronicle()
    assert told(chronicle, caplog, Change(None, WEB), in_line=False) == []
    shown = chronicle.shown(WEB, "", "somebody has held the lock")
    assert (shown.state, shown.reason, shown.since) == ("waiting", "somebody has held the lock", "")
    assert told(chronicle, caplog, Change(None, DB), in_line=False) == []
    assert told(chronicle, caplog) == ["published8080:", "published9000:"]
    # What is over before it was so was never told.
    other = active("9999:99", name="other")
    assert told(chronicle, caplog, Change(None, other), in_line=False) == []
    assert told(chronicle, caplog, Change(other, None), in_line=False) == []
    assert told(chronicle, caplog, Change(WEB, None), in_line=False) == []
    assert told(chronicle, caplog) == ["withdrawn8080:"]


def test_how_long_it_took_is_counted_once_it_is_open() -> None:
    tally = Tally()
    chronicle = Chronicle(tally)
    chronicle.take([Change(None, WEB)], time.monotonic() - 0.3)
    chronicle.tell(lambda _: "", in_line=False)
    assert tally.opened.count == 0
    chronicle.tell(lambda _: "", in_line=True)
    assert tally.opened.count == 1
    assert 0.3 <= tally.opened.sum < 10
    chronicle.take([Change(WEB, None), Change(None, DB)], None)  # of no event: found when all was listed
    chronicle.tell(lambda _: "", in_line=True)
    assert tally.opened.count == 1


def test_what_was_repaired_is_counted_with_how_long_it_was_so() -> None:
    tally, rule = Tally(), rules_for(WEB, Layout())[0]
    chronicle, now = Chronicle(tally), time.monotonic()
    chronicle.repaired(Drift((rule,), ("a", "b"), 3), Grounds(now - 0.2, ("nft (pid 7)",)), now - 50)
    chronicle.repaired(Drift(switches=("docker0",)), Grounds(), now - 50)
    assert tally.drift == {"missing": 1, "misplaced": 2, "surplus": 3, "route_localnet": 1}
    assert 50.2 <= tally.drift_lasted.sum < 60
    assert chronicle.repairs == tally.drift_lasted.count == 2


def test_of_a_line_each_is_told_when_it_joins_and_when_it_serves_and_not_at_each_step(
    caplog: pytest.LogCaptureFixture,
) -> None:
    chronicle = Chronicle()
    joined = [replace(WEB, state=State.WAITING, reason=f"in line {place}", place=place) for place in (3, 2, 1)]
    assert told(chronicle, caplog, Change(None, joined[0])) == ["waiting8080:"]
    assert caplog.records[0].levelname == "INFO"
    since = chronicle.shown(joined[0], "", "").since
    assert told(chronicle, caplog, Change(joined[0], joined[1])) == []
    assert told(chronicle, caplog, Change(joined[1], joined[2])) == []
    assert (chronicle.shown(joined[2], "", "").reason, chronicle.shown(joined[2], "", "").since) == ("in line 1", since)
    assert told(chronicle, caplog, Change(joined[2], WEB)) == ["taken-over8080:"]
    elsewhere = replace(WEB, state=State.WAITING, reason="it has no address")
    told(chronicle, caplog, Change(WEB, joined[2]))
    assert told(chronicle, caplog, Change(joined[2], elsewhere)) == ["waiting8080:"]


def test_where_all_begins_anew_only_what_differs_is_told(caplog: pytest.LogCaptureFixture) -> None:
    chronicle = Chronicle()
    told(chronicle, caplog, Change(None, WEB), Change(None, DB))
    since = chronicle.shown(WEB, "", "").since
    late = active("9999:99", name="late")
    news = chronicle.compared([WEB, DB], [Change(None, WEB), Change(None, late)])
    assert news == [Change(None, late), Change(DB, None)]
    assert told(chronicle, caplog, *news) == ["published9999:", "withdrawn9000:"]
    assert chronicle.shown(WEB, "", "").since == since


def test_what_is_shown_follows_what_is_told(caplog: pytest.LogCaptureFixture) -> None:
    chronicle, remarks = Chronicle(), {WEB: "a remark"}

    def shown(*publications: Publication, problem: str = "") -> list[PublicationStatus]:
        return chronicle.all_shown(publications, lambda publication: remarks.get(publication, ""), problem)

    told(chronicle, caplog, Change(None, WEB), Change(None, DB), in_line=False)
    assert [(its.since, its.reason) for its in shown(WEB, DB)] == [("", "a remark"), ("", "")]
    told(chronicle, caplog)
    before = shown(WEB, DB)
    assert all(its.since for its in before)
    assert all(one is other for one, other in zip(shown(WEB, DB), before, strict=True))  # nothing is made anew
    assert [its.state for its in shown(WEB, DB, problem="no kernel")] == ["waiting", "waiting"]
    assert shown(WEB, DB) == before
    remarks.clear()
    assert shown(WEB, DB) == before
    chronicle.look_anew()
    assert [its.reason for its in shown(WEB, DB)] == ["", ""]
    # Where all begins anew, how long it has been so may be known by now.
    late = replace(WEB)
    assert [its.since for its in shown(late)] == [before[0].since]
    for _ in range(10):  # what is over is not kept for ever
        passing = replace(WEB)
        shown(passing)
        told(chronicle, caplog, Change(passing, None))
    assert len(chronicle._shown) < 5


def test_the_same_drift_is_told_a_few_times_whichever_process_it_was(caplog: pytest.LogCaptureFixture) -> None:
    chronicle = Chronicle()
    for pid in range(10):
        chronicle.repaired(Drift(surplus=1), Grounds(1.0, (f"nft (pid {pid})",)), 0.0)
    assert len(caplog.messages) == TELL_SAME
    assert chronicle.repairs == 10
    assert chronicle.last_repair.startswith("too many: 1 rule, by nft (pid 9); repaired after ")
    chronicle.repaired(Drift(surplus=2), Grounds(), 0.0)
    assert len(caplog.messages) == TELL_SAME + 1
    assert "by" not in chronicle.last_repair


def test_of_what_could_not_be_written_it_is_told_what_its_rules_would_be() -> None:
    chronicle = Chronicle()
    chronicle.take([Change(None, WEB)], None)
    failed = chronicle.shown(WEB, "", "somebody has held the lock", 8)
    assert (failed.state, failed.bound) == ("waiting", "")
    assert (failed.owner, failed.process) == ("default/web 8080:80/tcp", 8)
