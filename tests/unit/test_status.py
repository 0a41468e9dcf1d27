from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrport import status
from ctrport.model import Publication, State
from ctrport.rules import Gate, Layout, Place
from ctrport.status import AlreadyRunning, AttachmentStatus, PublicationStatus, Status
from tests.unit.worlds import active

publication_statuses = st.builds(PublicationStatus)
statuses = st.builds(Status)
NOW = Status(
    version="0.1",
    running=True,
    pid=1,
    updated="2026-01-02T03:04:05+00:00",
    containerd="connected",
    firewall="in line",
    publications=[PublicationStatus.of(active("8080:80"), "2026-01-02T03:04:05+00:00")],
)


@given(statuses)
def test_a_status_is_read_as_it_was_written(said: Status) -> None:
    assert Status.from_json(said.to_json()) == said


def test_a_status_has_a_line_for_each_publication() -> None:
    lines = replace(NOW, publications=NOW.publications * 3).to_json().splitlines()
    assert sum('"mapping": "8080:80/tcp"' in line for line in lines) == 3


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '"text"', "{}", '{"publications": null}', '{"publications": [[]]}'),
        *('{"publications": [{"unheard": 1}]}', '{"publications": [], "version": "1"}'),
        NOW.to_json().replace('"pid"', '"process"'),
    ],
)
def test_what_is_no_status_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Status.from_json(text)


def test_a_publication_is_shown_in_words() -> None:
    shown = PublicationStatus.of(active("127.0.0.1:8080:80", "172.17.0.2", "fd00::2"), "now")
    assert shown == PublicationStatus(
        namespace="default",
        container="web",
        pod="",
        mapping="127.0.0.1:8080:80/tcp",
        bound="127.0.0.1:8080:80/tcp",
        addresses=["172.17.0.2", "fd00::2"],
        state="active",
        reason="",
        source="config.yaml:1",
        since="now",
        owner="default/web 127.0.0.1:8080:80/tcp",
        attachments=[
            AttachmentStatus("172.17.0.2", "docker0", "172.17.0.0/16", ""),
            AttachmentStatus("fd00::2", "docker0", "fd00::/64", ""),
        ],
    )


def test_a_publication_without_a_container_is_shown_without_a_name() -> None:
    unmatched = Publication(active("8080:80").mapping, "config.yaml:7", None, State.WAITING, "nobody")
    shown = PublicationStatus.of(unmatched, "")
    assert (shown.namespace, shown.container, shown.addresses, shown.reason) == ("", "", [], "nobody")


def test_who_waits_in_line_is_shown_with_the_place() -> None:
    second = Publication(active("8080:80").mapping, "f:7", active("8080:80").container, State.WAITING, "next", place=1)
    shown = PublicationStatus.of(second, "")
    assert shown.place == PublicationStatus.read(json.loads(shown.json)).place == 1
    assert PublicationStatus.of(active("8080:80"), "").place == 0


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout("CTRPORT", Place.LAST, localhost=False, networks=True, gates=(Gate(4, 24, interface=True),))],
)
def test_what_shapes_the_rules_is_read_as_it_was_shown(layout: Layout) -> None:
    assert status.layout_of(json.loads(json.dumps(status.layout(layout)))) == layout


def test_times_are_shown_to_the_second() -> None:
    assert status.shown(datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=timezone.utc)) == "2026-01-02T03:04:05+00:00"


def test_what_is_written_is_read_back_and_replaces_what_was(tmp_path: Path) -> None:
    status.write(tmp_path, NOW)
    assert status.read(tmp_path) == NOW
    status.write(tmp_path, Status("0.2", False, 2, "", "", ""))
    again = status.read(tmp_path)
    assert again is not None
    assert again.version == "0.2"
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_reader_that_has_opened_the_file_goes_on_reading_the_old_one(tmp_path: Path) -> None:
    status.write(tmp_path, NOW)
    with open(tmp_path / "status.json", encoding="utf-8") as reader:
        status.write(tmp_path, Status("0.2", False, 2, "", "", ""))
        assert Status.from_json(reader.read()) == NOW


def test_a_write_that_fails_leaves_the_old_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status.write(tmp_path, NOW)

    def full(self: Path, text: str) -> int:
        self.write_bytes(text[:10].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        status.write(tmp_path, Status("0.2", False, 2, "", "", ""))
    assert status.read(tmp_path) == NOW


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"[1]"])
def test_where_nothing_can_be_read_there_is_no_status(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "status.json").write_bytes(content)
    assert status.read(tmp_path) is None


def test_one_daemon_holds_a_run_directory_and_the_next_is_told_who(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "ctrport"
    assert not status.is_running(directory)
    with status.only_one(directory):
        assert status.is_running(directory)
        refused = pytest.raises(AlreadyRunning, match=rf"pid {os.getpid()}, run directory {directory}")
        with refused, status.only_one(directory):
            raise AssertionError("two daemons")
        assert status.is_running(directory)  # who was refused has not let go of it
    assert not status.is_running(directory)
    with status.only_one(directory):
        assert (directory / "lock").read_text() == f"{os.getpid()}\n"


def test_how_long_a_daemon_has_not_come_round_is_told_by_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert status.silent_for(tmp_path) == 0
    with status.only_one(tmp_path) as lock:
        assert status.silent_for(tmp_path) == 0  # it has not come round once
        lock.turned()
        assert status.silent_for(tmp_path) <= 1
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 100)
        assert 99 <= status.silent_for(tmp_path) <= 101
        lock.turned()
        assert status.silent_for(tmp_path) <= 1
        refused = pytest.raises(AlreadyRunning, match=rf"\(pid {os.getpid()}, ")
        with refused, status.only_one(tmp_path):
            raise AssertionError("two daemons")
    with status.only_one(tmp_path):
        assert status.silent_for(tmp_path) == 0


def test_two_run_directories_are_two_daemons(tmp_path: Path) -> None:
    with status.only_one(tmp_path / "a"), status.only_one(tmp_path / "b"):
        assert status.is_running(tmp_path / "a")
        assert status.is_running(tmp_path / "b")


def test_a_holder_that_has_not_written_its_pid_yet_is_just_starting(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(AlreadyRunning, match="just starting"), status.only_one(tmp_path):
            raise AssertionError("two daemons")


def test_the_lock_ends_with_the_process_that_held_it(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, sys\n"
        "from ctrport import status\n"
        "with status.only_one(pathlib.Path(sys.argv[1])):\n"
        "    os.write(1, b'held\\n')\n"
        "    sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(status.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert status.is_running(tmp_path)
        other.kill()
    assert not status.is_running(tmp_path)
    with status.only_one(tmp_path):
        pass


def test_asking_whether_a_daemon_runs_keeps_none_from_starting(tmp_path: Path) -> None:
    with status.only_one(tmp_path):
        pass
    assert not status.is_running(tmp_path)
    with status.only_one(tmp_path):
        assert status.is_running(tmp_path)
