"""events.jsonl: whole lines, never much of it, and no harm to whoever writes it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ctrport import events
from ctrport.events import NAME, Event, Reader, Recorder

log = logging.getLogger("ctrport.test")


@pytest.fixture(autouse=True)
def recording(tmp_path: Path) -> Iterator[None]:
    logging.getLogger("ctrport").setLevel(logging.INFO)
    with events.recorded(tmp_path):
        yield
    logging.getLogger("ctrport").setLevel(logging.NOTSET)


def names(found: list[events.Told]) -> list[object]:
    return [each.get("mapping", each["event"]) for each in found]


def test_an_event_is_in_the_file_as_it_is_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    event = Event("published", container="default/web", mapping="8080:80/tcp", after="1.0ms", count=3, source="")
    log.info(event)
    [line] = (tmp_path / NAME).read_text().splitlines()
    assert line.isascii()
    [told] = Reader(tmp_path).new()
    time = str(told.pop("time"))
    assert time == events.moment(caplog.records[0].created)
    assert told == {"v": 1, "event": "published", **event.fields}
    assert "source" not in told


def test_what_is_no_news_is_not_in_the_file(tmp_path: Path) -> None:
    log.warning("a sentence")
    log.info(Event("neighbours", found="none"))
    log.debug(Event("published"))
    logging.getLogger("other").warning(Event("published"))
    assert not (tmp_path / NAME).exists()
    assert Reader(tmp_path).new() == []


def test_the_file_is_for_everybody_to_read(tmp_path: Path) -> None:
    log.info(Event("started"))
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o644


def test_there_is_never_more_of_it_than_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LARGEST", 4000)
    reader, seen = Reader(tmp_path), []
    for number in range(500):
        log.info(Event("waiting", mapping=str(number), reason="x" * (number % 300)))
        if number % 7 == 0:
            seen += reader.new()
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, f"{NAME}.1"]
    assert all(path.stat().st_size <= 4000 for path in tmp_path.iterdir())
    seen += reader.new()
    assert names(seen) == [str(number) for number in range(500)]  # who follows misses none of it
    last = names(Reader(tmp_path).new())
    assert last == [str(number) for number in range(500 - len(last), 500)]
    assert 20 < len(last) < 100


def test_who_looks_while_the_file_is_put_aside_is_told_nothing_twice_and_misses_nothing(tmp_path: Path) -> None:
    path, older = tmp_path / NAME, tmp_path / f"{NAME}.1"
    reader = Reader(tmp_path)
    assert reader.new() == []  # nothing has happened yet
    log.info(Event("published", mapping="1"))
    assert names(reader.new()) == ["1"]
    log.info(Event("published", mapping="2"))
    path.rename(older)
    assert names(Reader(tmp_path).new()) == ["1", "2"]
    seen = [reader.new(), reader.new()]
    log.info(Event("published", mapping="3"))
    seen += [reader.new(), reader.new()]
    assert [name for found in seen for name in names(found)] == ["2", "3"]


def test_a_value_that_is_too_long_is_cut(tmp_path: Path) -> None:
    log.info(Event("not-reloaded", reason="x" * 5000))
    assert len((tmp_path / NAME).read_text()) < events.LONGEST + 200


def test_what_others_wrote_is_skipped(tmp_path: Path) -> None:
    log.info(Event("published", mapping="1"))
    with (tmp_path / NAME).open("ab") as file:
        for line in ('{"v": 2, "time": "", "event": "new"}', "[1]", "null", "{", '{"v": 1}', "\udcff", ""):
            file.write(line.encode(errors="surrogateescape") + b"\n")
        file.write(b'{"v": 1, "time": "t", "event": "x", "deep": {"a": 1}, "none": null}\n{"v": 1, "ti')
    assert names(Reader(tmp_path).new()) == ["1", "x"]
    with events.recorded(tmp_path):  # the next daemon: half a line is ended first
        logging.getLogger("ctrport").handlers[0].close()
        logging.getLogger("ctrport").handlers[-1].emit(record("2"))
    assert names(Reader(tmp_path).new()) == ["1", "x", "2"]


def record(mapping: str) -> logging.LogRecord:
    return logging.LogRecord("ctrport", logging.INFO, "", 1, Event("published", mapping=mapping), None, None)


def test_a_file_that_was_removed_is_made_anew(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    log.info(Event("published", mapping="1"))
    assert names(reader.new()) == ["1"]
    (tmp_path / NAME).unlink()
    assert reader.new() == []
    log.info(Event("published", mapping="2"))
    assert names(reader.new()) == ["2"]


def test_half_a_line_is_read_when_it_is_whole(tmp_path: Path) -> None:
    line = json.dumps({"v": 1, "time": "t", "event": "started"})
    path, reader = tmp_path / NAME, Reader(tmp_path)
    path.write_text(line[:10])
    assert reader.new() == []
    path.write_text(f"{line}\n")
    assert names(reader.new()) == ["started"]
    assert reader.new() == []


def full(file: int, data: bytes) -> int:
    raise OSError(28, "No space left on device")


def half(write: Callable[[int, bytes], int]) -> Callable[[int, bytes], int]:
    return lambda file, data: write(file, data[: len(data) // 2])


@pytest.mark.parametrize("how", ["full", "half"])
def test_a_full_disk_is_said_once_and_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    log.info(Event("published", mapping="1"))
    before = (tmp_path / NAME).read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full if how == "full" else half(os.write))
        for _ in range(3):
            log.info(Event("published", mapping="2"))
        assert (tmp_path / NAME).read_bytes() == before
    complaints = [line for line in caplog.messages if "what happens cannot be kept" in line]
    assert len(complaints) == 1
    assert complaints[0].lower().endswith(("no space left on device", "no space is left"))
    log.info(Event("published", mapping="3"))
    assert names(Reader(tmp_path).new()) == ["1", "3"]


def test_a_directory_that_cannot_be_written_harms_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(tmp_path / "absent")
    for _ in range(2):
        recorder.handle(record("1"))
    recorder.close()
    assert len(caplog.messages) == 1


def test_each_kind_is_explained_in_few_words() -> None:
    assert all(len(words) < 90 and not words.endswith(".") for words in events.KINDS.values())
