"""What systemd is told, and the files that it keeps: with real sockets, and a stand-in that keeps them as it does."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ctrport import config, systemd
from ctrport.portsockets import OTHER_FILES
from ctrport.systemd import FILES_A_MESSAGE, LENGTH_OF_NAMES, FileStore, received
from embedded.wait import eventually
from tests.systemd import Systemd

UNIT = (Path(__file__).parents[2] / "systemd" / "ctrport.service").read_text()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Systemd]:
    with Systemd(tmp_path / "notify") as manager:
        yield manager


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def bound(opened: ExitStack, number: int = 1, kind: socket.SocketKind = socket.SOCK_STREAM) -> dict[int, int]:
    """Return sockets by their ports, each bound and no more."""
    found = {}
    for _ in range(number):
        one = opened.enter_context(socket.socket(socket.AF_INET, kind))
        one.bind(("127.0.0.1", 0))
        found[one.getsockname()[1]] = one.fileno()
    return found


def kept(manager: Systemd) -> dict[str, set[int]]:
    """Return the ports that are kept, by the names of their lots, when all that was sent is read."""
    FileStore(str(manager.address)).wait()
    return manager.ports


def flush(store: FileStore) -> None:
    asyncio.run(store.flush())


# The store


def test_a_socket_that_is_bound_and_no_more_stays_in_the_store(manager: Systemd, opened: ExitStack) -> None:
    store, sockets = FileStore(str(manager.address), 10), bound(opened, 2)
    store.put("tcp-1", sockets)
    assert kept(manager) == {}  # not before it is asked for
    flush(store)
    assert kept(manager) == {"tcp-1": set(sockets)}
    assert len(manager.told("FDSTORE=1")) == 1
    flush(store)
    assert len(manager.told("FDSTORE=1")) == 1


def test_without_fdpoll_systemd_would_drop_it(manager: Systemd, opened: ExitStack) -> None:
    [file] = bound(opened).values()
    systemd._send(str(manager.address), "FDSTORE=1", "FDNAME=a", files=[file])
    assert kept(manager) == {}
    systemd._send(str(manager.address), "FDSTORE=1", "FDPOLL=0", "FDNAME=a", files=[file])
    assert len(kept(manager)["a"]) == 1


def test_a_lot_is_as_many_messages_as_it_takes(manager: Systemd, opened: ExitStack) -> None:
    store, sockets = FileStore(str(manager.address), 2000), bound(opened, 2 * FILES_A_MESSAGE + 1)
    store.put("tcp-1", sockets)
    flush(store)
    assert kept(manager) == {"tcp-1": set(sockets)}
    assert len(manager.told("FDSTORE=1")) == 3
    store.remove(sockets)
    assert kept(manager) == {}
    assert len(manager.told("FDSTOREREMOVE=1")) == 1


def test_what_is_left_of_a_lot_is_kept_on(manager: Systemd, opened: ExitStack) -> None:
    store, sockets = FileStore(str(manager.address), 10), bound(opened, 3)
    gone, *left = sockets
    store.put("tcp-1", sockets)
    flush(store)
    assert store.remove([gone])
    flush(store)
    assert kept(manager) == {"tcp-1": set(left)}
    assert not store.remove([gone, "nothing"])
    assert store.remove(left)
    assert kept(manager) == {}
    assert len(store) == 0


def test_what_was_not_sent_is_not_removed_either(manager: Systemd, opened: ExitStack) -> None:
    store, sockets = FileStore(str(manager.address), 10), bound(opened, 2)
    gone, left = sockets
    store.put("tcp-1", sockets)
    assert not store.remove([gone])
    flush(store)
    assert kept(manager) == {"tcp-1": {left}}
    assert manager.told("FDSTOREREMOVE=1") == []


def test_lots_named_alike_are_told_apart(manager: Systemd, opened: ExitStack) -> None:
    store, first, second = FileStore(str(manager.address), 10), bound(opened), bound(opened)
    store.put("tcp-1", first)
    store.put("tcp-1", second)
    flush(store)
    assert kept(manager) == {"tcp-1": set(first), "tcp-1-2": set(second)}
    store.remove(first)
    assert kept(manager) == {"tcp-1-2": set(second)}
    store.put("tcp-1", first)
    flush(store)
    assert kept(manager) == {"tcp-1": set(first), "tcp-1-2": set(second)}


def test_what_an_earlier_run_left_is_removed_like_ones_own(manager: Systemd, opened: ExitStack) -> None:
    whole, part, none = bound(opened, 2), bound(opened, 2), bound(opened)
    for name, files in (("whole", whole), ("part", part), ("none", none)):
        for file in files.values():
            manager.put(name, file)
    store = FileStore(str(manager.address), 10)
    store.adopt("whole", whole, whole=True)
    known = next(iter(part))
    store.adopt("part", {known: part[known]}, whole=False)
    store.adopt("none", {}, whole=False)
    flush(store)
    assert kept(manager) == {"whole": set(whole), "part": {known}}
    assert len(store) == 3
    asyncio.run(store.clear())
    assert kept(manager) == {}


def test_no_more_is_sent_than_a_process_can_be_started_with(manager: Systemd, opened: ExitStack) -> None:
    store, sockets = FileStore(str(manager.address), 3), bound(opened, 5)
    store.put("tcp-1", sockets)
    flush(store)
    first = list(sockets)[:3]
    assert kept(manager) == {"tcp-1": set(first)}
    store.put("tcp-2", bound(opened))
    flush(store)
    assert kept(manager) == {"tcp-1": set(first)}
    store.remove(sockets)
    more = bound(opened, 2)
    store.put("tcp-2", more)
    flush(store)
    assert kept(manager) == {"tcp-2": set(more)}


def test_the_names_fit_into_what_starts_a_process(manager: Systemd) -> None:
    store = FileStore(str(manager.address), 1_000_000)
    for first in range(10_000, 65_000, 100):
        store.put(f"sctp-{first}", {(first, n): 0 for n in range(200)})
    names = ":".join(store._name_of.values())
    assert LENGTH_OF_NAMES - 100 < len(names) < LENGTH_OF_NAMES
    subprocess.run([sys.executable, "-I", "-S", "-c", ""], env={"LISTEN_FDNAMES": names}, check=True)
    with pytest.raises(OSError, match="too long"):
        subprocess.run([sys.executable, "-I", "-S", "-c", ""], env={"LISTEN_FDNAMES": names * 2}, check=True)
    store.remove(list(store._name_of))
    assert store._length == 0


def test_what_a_full_manager_did_not_take_it_gets_later(
    tmp_path: Path, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd, "PATIENCE", 0.004)
    sockets = bound(opened, int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text()) + 20)
    listening = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    listening.bind(str(tmp_path / "busy"))
    store = FileStore(str(tmp_path / "busy"), 1000)
    for port, file in sockets.items():
        store.put(f"tcp-{port}", {port: file})
    flush(store)
    unsent = len(store._due)
    began = time.monotonic()
    store.remove([next(iter(sockets))])
    store.wait()
    assert time.monotonic() - began < 1
    told = []
    listening.settimeout(0.1)
    for _ in range(2 * len(sockets)):
        try:
            told.append(listening.recv(100).decode().split("\n"))
        except TimeoutError:
            break
        flush(store)
    assert unsent > 0
    first, *others = sockets
    assert {message[-1] for message in told} >= {f"FDNAME=tcp-{port}" for port in sockets}
    assert ["FDSTOREREMOVE=1", f"FDNAME=tcp-{first}"] in told
    assert sum(message[0] == "FDSTORE=1" for message in told) == len(sockets)
    assert len(others) == len(store)


def test_waiting_ends_when_all_is_read_or_a_second_is_over(
    manager: Systemd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd, "PATIENCE", 0.3)
    FileStore(str(manager.address)).wait()
    assert manager.messages == [["BARRIER=1"]]
    for nobody in ("", str(tmp_path / "nowhere")):
        began = time.monotonic()
        FileStore(nobody).wait()
        assert time.monotonic() - began < 0.2
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(tmp_path / "deaf"))
        began = time.monotonic()
        FileStore(str(tmp_path / "deaf")).wait()
        assert 0.2 < time.monotonic() - began < 1


def test_without_a_manager_nothing_is_noted(opened: ExitStack) -> None:
    store = FileStore()
    store.put("tcp-1", bound(opened))
    assert len(store) == 0
    flush(store)


# What is handed to a process

# Says what it was handed, and what of that the programs get that it starts.
_STARTED = """
import os, socket, subprocess
from ctrport.systemd import received
found = received()
print([(name, file, os.get_inheritable(file)) for name, file in found])
print(received(), [key for key in os.environ if key.startswith("LISTEN_")])
"""


def started(manager: Systemd, **env: str) -> list[str]:
    behind, files = manager.handover()
    argv = [*behind, "env", *(f"{key}={value}" for key, value in env.items()), sys.executable, "-c", _STARTED]
    environment = {**os.environ, "PYTHONPATH": str(Path(systemd.__file__).parents[1])}
    return subprocess.run(
        argv, pass_fds=files, env=environment, check=True, capture_output=True, text=True
    ).stdout.splitlines()


def test_a_process_takes_what_it_is_handed_and_hands_nothing_on(manager: Systemd, opened: ExitStack) -> None:
    for port, file in bound(opened, 2).items():
        manager.put(f"tcp-{port}", file)
    one, two = manager.names
    assert started(manager) == [str([(one, 3, False), (two, 4, False)]), "[] []"]
    assert started(manager, LISTEN_FDNAMES=one) == [str([("unknown", 3, False), ("unknown", 4, False)]), "[] []"]
    assert started(manager, LISTEN_FDS="") == ["[]", "[] []"]
    assert started(manager, LISTEN_FDS="x") == ["[]", "[] []"]
    assert started(manager, LISTEN_PID="1") == ["[]", "[] []"]  # somebody else's


def test_files_that_are_not_open_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    top = max(map(int, os.listdir("/proc/self/fd")))
    monkeypatch.setattr(systemd, "_FIRST_FILE", top + 100)
    for key, value in (("PID", str(os.getpid())), ("FDS", "2"), ("FDNAMES", "a:b")):
        monkeypatch.setenv(f"LISTEN_{key}", value)
    assert received() == []


# The unit


def setting(name: str) -> str:
    [value] = re.findall(f"^{name}=(.*)$", UNIT, re.MULTILINE)
    return str(value)


def test_the_unit_keeps_what_the_limit_allows_and_starts_with_it() -> None:
    most = int(setting("FileDescriptorStoreMax"))
    assert most == 2 * config.parse("", "").firewall.reserve_limit
    assert most * len("sctp-65535:") < LENGTH_OF_NAMES
    soft, hard = map(int, setting("LimitNOFILE").split(":"))
    assert most + OTHER_FILES <= soft <= hard


@pytest.mark.parametrize("address", ["", "notify", "vsock:2:1"])
def test_an_address_that_is_none_is_nobodys(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert systemd.manager() == ""
    systemd.notify("READY=1")


def test_an_abstract_address_is_told_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0ctrport-test-{os.getpid()}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@ctrport-test-{os.getpid()}")
        systemd.notify("READY=1", "STATUS=two\nlines")
        assert eventually(lambda: listening.recv(100), what="a message") == b"READY=1\nSTATUS=two lines"
