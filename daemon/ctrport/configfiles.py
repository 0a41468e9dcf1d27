"""The files of the configuration: read as one, and watched for changes."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import os
from collections.abc import AsyncIterator
from pathlib import Path

from .config import PARTS, Config, parse

#: Seconds without a change after which a new version is whole: it is often several files, or one written in pieces. But
#: others may write beside it all the time, so no more than so many pauses are waited.
PAUSE, MOST_PAUSES = 0.1, 20
#: Bytes that a file may have at most: 100,000 entries, and half a minute to check.
LONGEST = 8 << 20


class Unreadable(Exception):
    """A file cannot be read as text; the message is one sentence for people."""


def load(path: str) -> Config:
    """Return the configuration of the file at ``path`` and the parts beside it.

    Raises ``ConfigError`` with every problem they have, or ``Unreadable``. What has not changed since the last time is
    not checked again.
    """
    (_, text), *parts = _texts(path)
    return _parsed(text, path, tuple(parts))


@functools.lru_cache(maxsize=1)
def _parsed(text: str, path: str, parts: tuple[tuple[str, str], ...]) -> Config:
    return parse(text, path, parts)


def _texts(path: str) -> list[tuple[str, str]]:
    """Return the name and the text of the file at ``path``, and of each part beside it. Raises ``Unreadable``."""
    text, directory = _text(Path(path)), Path(path).parent / PARTS
    try:
        # Not by glob(), to which a directory that cannot be read is an empty one.
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        raise Unreadable(f"{directory}: {error.strerror}; expected configuration files") from error
    # A hidden file is an editor's, or half of an upload.
    parts = [directory / name for name in sorted(names) if name.endswith(".yaml") and not name.startswith(".")]
    return [(path, text), *((str(part), _text(part)) for part in parts)]


def _text(path: Path) -> str:
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise Unreadable(f"{path}: not a regular file; expected a configuration file (--config)")
        with path.open("rb") as file:
            content = file.read(LONGEST + 1)
        if len(content) > LONGEST:
            raise Unreadable(f"{path}: longer than {LONGEST >> 20} MiB; expected a configuration file (--config)")
        return content.decode()
    except UnicodeDecodeError as error:
        raise Unreadable(f"{path}: byte {error.start} is not UTF-8; expected YAML text") from error
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}; expected a configuration file (--config)") from error


# linux/inotify.h. Directories are watched, not files: who writes a new version mostly renames it into place, and the
# files of a Kubernetes ConfigMap are links to others whose directory is exchanged.
_MODIFY, _CLOSE_WRITE, _MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x2, 0x8, 0x40, 0x80, 0x100, 0x200
_DELETE_SELF, _MOVE_SELF = 0x400, 0x800
_ANY_NAME = _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE
_ANY_CHANGE = _ANY_NAME | _MODIFY | _CLOSE_WRITE | _DELETE_SELF | _MOVE_SELF
_ONLY_DIRECTORY, _MASK_ADD = 0x01000000, 0x20000000
_LIBC = ctypes.CDLL(None, use_errno=True)


async def changes(path: str) -> AsyncIterator[None]:
    """Yield whenever the files of the configuration at ``path`` have changed, or cannot be read. Raises ``OSError``.

    And at first, when they are watched: what changed since they were read last was announced to nobody.

    Their directory may be exchanged for another, or be a link that is: the names beside it are watched, too, and none
    above.
    """
    places = _places(path)
    watching = _checked(_LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
    changed = asyncio.Event()

    def seen() -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(watching, 1 << 16):
                pass  # what it was is seen by reading the files
        changed.set()

    def watch(place: Path) -> int:
        # Two of them may be the same, by a link.
        its = _LIBC.inotify_add_watch(watching, os.fsencode(place), places[place] | _ONLY_DIRECTORY | _MASK_ADD)
        return int(its)

    loop = asyncio.get_running_loop()
    loop.add_reader(watching, seen)
    try:
        _checked(watch(next(iter(places))))
        watched = set(map(watch, places))
        before = _texts_if_any(path)
        yield
        while True:
            await changed.wait()
            for _ in range(MOST_PAUSES):  # what is read before it was written to its end may be another that is valid
                changed.clear()
                await asyncio.sleep(PAUSE)
                if not changed.is_set():
                    break
            # Each is watched where it is now, before it is read: it may have come just now, or be another.
            before_that, watched = watched, set(map(watch, places))
            for another in before_that - watched:
                _LIBC.inotify_rm_watch(watching, another)
            # Other files may be written beside these all the time, and to check thousands of lines takes seconds.
            now = _texts_if_any(path)
            if now is None or now != before:
                yield
            before = now
    finally:
        loop.remove_reader(watching)
        os.close(watching)


def _places(path: str) -> dict[Path, int]:
    """Return the directories to watch for the file at ``path``, its own first, each with what for."""
    directory = Path(path).absolute().parent
    places = {directory: _ANY_CHANGE, directory / PARTS: _ANY_CHANGE}
    places.setdefault(directory.parent, _ANY_NAME)
    return places


def _texts_if_any(path: str) -> list[tuple[str, str]] | None:
    with contextlib.suppress(Unreadable):
        return _texts(path)
    return None


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
