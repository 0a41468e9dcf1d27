"""What of the configuration's files cannot be read, in one sentence each."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from ctrport import configfiles
from ctrport.configfiles import LONGEST, Unreadable, changes, load

CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (lambda path: None, "No such file or directory; expected a configuration file (--config)"),
    "a directory": (lambda path: path.mkdir(), "Is a directory; expected a configuration file (--config)"),
    "a pipe": (os.mkfifo, "not a regular file; expected a configuration file (--config)"),
    "bytes": (lambda path: path.write_bytes(b"publish: [] # \xff"), "byte 14 is not UTF-8; expected YAML text"),
    "endless": (
        lambda path: path.symlink_to("/dev/zero"),
        "not a regular file; expected a configuration file (--config)",
    ),
    "too long": (
        lambda path: path.write_bytes(b"#" * (LONGEST + 1)),
        "longer than 8 MiB; expected a configuration file (--config)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_read_is_named(tmp_path: Path, case: str) -> None:
    make, said = CASES[case]
    make(tmp_path / "config.yaml")
    with pytest.raises(Unreadable) as caught:
        load(str(tmp_path / "config.yaml"))
    assert str(caught.value) == f"{tmp_path}/config.yaml: {said}"


def test_parts_that_cannot_be_listed_are_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    parts = tmp_path / "conf.d"
    parts.write_text("")  # as a file it has none
    assert load(str(tmp_path / "config.yaml")).publish == ()
    parts.unlink()
    parts.symlink_to("conf.d")
    with pytest.raises(Unreadable) as caught:
        load(str(tmp_path / "config.yaml"))
    assert str(caught.value) == f"{parts}: Too many levels of symbolic links; expected configuration files"


def test_parts_are_taken_in_the_order_of_their_names_and_hidden_ones_are_not(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    parts = tmp_path / "conf.d"
    parts.mkdir()
    for name, port in (("b.yaml", 2), ("a.yaml", 1), (".c.yaml", 3), ("d.yml", 4)):
        (parts / name).write_text(f'publish: [{{match: {{container: web}}, ports: ["{port}:{port}"]}}]')
    ports = [
        str(mapping) for declaration in load(str(tmp_path / "config.yaml")).publish for mapping in declaration.mappings
    ]
    assert ports == ["1:1/tcp", "2:2/tcp"]


async def watched(path: Path) -> AsyncIterator[None]:
    """Return what tells of changes, from now on."""
    told = changes(str(path))
    await asyncio.wait_for(told.__anext__(), 5)
    return told


@pytest.mark.asyncio
async def test_what_changed_before_anybody_watched_is_told_of(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("publish: []")
    before = load(str(path))
    path.write_text("firewall: {localhost: false}")
    await watched(path)  # ends only if it tells of that
    assert load(str(path)) != before


@pytest.mark.asyncio
async def test_a_change_is_told_of_the_files_of_the_configuration_and_of_none_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configfiles, "PAUSE", 0.005)
    config, beside = tmp_path / "config.yaml", tmp_path / "log"
    config.write_text("publish: []")
    told = await watched(config)
    change = asyncio.ensure_future(told.__anext__())
    for _ in range(2):
        beside.write_text("something")
        config.write_text("publish: []")  # written, and the same
        await asyncio.sleep(0.05)  # many times what it is told after, where it is
        assert not change.done()
    config.write_text("publish: [] # changed")
    await asyncio.wait_for(change, 5)
    change = asyncio.ensure_future(told.__anext__())
    config.unlink()
    await asyncio.wait_for(change, 5)


@pytest.mark.asyncio
async def test_what_is_written_in_pieces_is_told_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configfiles, "PAUSE", 0.5)
    path = tmp_path / "config.yaml"
    path.write_text("publish: []")
    told = await watched(path)
    change = asyncio.ensure_future(told.__anext__())
    await asyncio.sleep(0)
    (tmp_path / "swap").write_text("as an editor has it")
    with path.open("w") as file:  # there is nothing in it now, which would be a configuration
        for _ in range(40):
            file.write("# a piece\n")
            file.flush()
            await asyncio.sleep(0.02)  # more than a pause in all
            assert not change.done()
    await asyncio.wait_for(change, 5)


def renamed(directory: Path, other: Path) -> None:
    directory.rename(directory.with_name("old"))
    other.rename(directory)


def made_anew(directory: Path, other: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()
    (directory / "config.yaml").write_text((other / "config.yaml").read_text())


def linked(directory: Path, other: Path) -> None:
    link = directory.with_name("link")
    link.symlink_to(other)
    link.rename(directory)


@pytest.mark.asyncio
@pytest.mark.parametrize("exchange", [renamed, made_anew, linked])
async def test_a_directory_that_is_exchanged_is_watched_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: Callable[[Path, Path], None]
) -> None:
    monkeypatch.setattr(configfiles, "PAUSE", 0.005)
    directory, first, other = tmp_path / "ctrport", tmp_path / "first", tmp_path / "other"
    for made in (first, other):
        made.mkdir()
        (made / "config.yaml").write_text(f"# {made.name}")
    if exchange is linked:
        directory.symlink_to(first)
    else:
        first.rename(directory)
    config = directory / "config.yaml"
    told = await watched(config)
    exchange(directory, other)
    await until(told, lambda: config.exists() and config.read_text() == "# other")
    config.write_text("# changed")
    await until(told, lambda: config.read_text() == "# changed")
    (directory / "conf.d").mkdir()
    (directory / "conf.d" / "part.yaml").write_text("# a part")
    await asyncio.wait_for(told.__anext__(), 5)


async def until(told: AsyncIterator[None], condition: Callable[[], bool]) -> None:
    """Wait until it is told of a change, and of as many as it takes until there is what is waited for."""
    while True:
        await asyncio.wait_for(told.__anext__(), 5)
        if condition():
            return


@pytest.mark.asyncio
async def test_a_directory_that_was_exchanged_is_watched_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configfiles, "PAUSE", 0.005)
    directory = tmp_path / "ctrport"
    directory.symlink_to(tmp_path / "0")
    for number in range(5):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "config.yaml").write_text(f"# {number}")
    told = await watched(directory / "config.yaml")
    for number in range(1, 5):
        linked(directory, tmp_path / str(number))
        await asyncio.wait_for(told.__anext__(), 5)
    assert watches_beside(tmp_path) == 2  # where it is now, and the names beside it


def watches_beside(directory: Path) -> int:
    """How many directories this process watches by what watches this one."""
    for file in Path("/proc/self/fdinfo").iterdir():
        with contextlib.suppress(OSError):  # it was open for the listing
            if f"ino:{directory.stat().st_ino:x} " in (text := file.read_text()):
                return text.count("inotify wd:")
    return 0
