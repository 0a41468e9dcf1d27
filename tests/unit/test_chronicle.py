"""What is told of events: once, and not before it is so."""

from __future__ import annotations

import logging
import time

import pytest

from ctrport.chronicle import TELL_SAME, Chronicle
from ctrport.firewall.drift import Drift
from ctrport.publish import Change
from ctrport.rules import Layout, rules_for
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


def test_where_all_begins_anew_only_what_differs_is_told(caplog: pytest.LogCaptureFixture) -> None:
    chronicle = Chronicle()
    told(chronicle, caplog, Change(None, WEB), Change(None, DB))
    since = chronicle.shown(WEB, "", "").since
    late = active("9999:99", name="late")
    news = chronicle.compared([WEB, DB], [Change(None, WEB), Change(None, late)])
    assert news == [Change(None, late), Change(DB, None)]
    assert told(chronicle, caplog, *news) == ["published9999:", "withdrawn9000:"]
    assert chronicle.shown(WEB, "", "").since == since


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
